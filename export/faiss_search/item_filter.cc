#include "export/faiss_search/item_filter.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dpsr {
namespace {

constexpr char kKind[] = "item_attributes";
// Prefixes of section names.
constexpr char kValues[] = "value.";   // codes or numbers
constexpr char kSplits[] = "splits.";  // where the values of each position begin, for multi-valued attributes
constexpr char kTexts[] = "text.";     // texts of the codes 1, 2, ..., ascending; numbers have none
constexpr char kItemIds[] = "item_ids.fingerprint";

constexpr int64_t kBits = 64;
// Up to this many codes are compared one after the other. More codes are looked up in a table.
constexpr size_t kFewCodes = 4;
constexpr size_t kQuotedBytes = 100;
// Slots are looked up by value if at most one in this many meets the expression. Otherwise a pass over the column is
// faster.
constexpr int64_t kOverFew = 8;
// Number of words, evenly spread, from which the number of passing items is estimated.
constexpr int64_t kSampledWords = 256;

// Returns the size of the UTF-8 character at the start of `text`, or 0 when there is none.
size_t CharacterBytes(std::string_view text) {
  const auto byte = [&text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const size_t size = byte(0) < 0x80 ? 1 : byte(0) < 0xC2 ? 0 : byte(0) < 0xE0 ? 2 : byte(0) < 0xF0 ? 3 : 4;
  if (size == 0 || size > text.size() || byte(0) > 0xF4) return 0;
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const bool bad = (byte(0) == 0xE0 && byte(1) < 0xA0) || (byte(0) == 0xED && byte(1) > 0x9F) ||
                   (byte(0) == 0xF0 && byte(1) < 0x90) || (byte(0) == 0xF4 && byte(1) > 0x8F);
  return bad ? 0 : size;
}

// Returns a text for a message: in quotes, valid UTF-8, without control characters, and not too long.
std::string Quoted(std::string_view text) {
  std::string quoted = "\"";
  while (!text.empty() && quoted.size() <= kQuotedBytes) {
    const size_t size = CharacterBytes(text);
    const bool shown = size > 1 || (size == 1 && text[0] >= ' ' && text[0] != 0x7F);
    quoted += shown ? std::string(text.substr(0, size)) : "?";
    text.remove_prefix(std::max<size_t>(size, 1));
  }
  return quoted + (text.empty() ? "\"" : "...\"");
}

struct Range {
  double low;
  double high;
};

// Reads "10", "10..20", "..20" or "10..". Returns false for other texts.
bool ParseRange(std::string_view text, Range* range) {
  const auto number = [](std::string_view digits, double* value) {
    const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), *value);
    return read.ec == std::errc() && read.ptr == digits.data() + digits.size() && std::isfinite(*value);
  };
  const size_t dots = text.find("..");
  if (dots == std::string_view::npos) {
    if (!number(text, &range->low)) return false;
    range->high = range->low;
    return true;
  }
  const std::string_view low = text.substr(0, dots);
  const std::string_view high = text.substr(dots + 2);
  range->low = -std::numeric_limits<double>::infinity();
  range->high = std::numeric_limits<double>::infinity();
  if (low.empty() && high.empty()) return false;
  return (low.empty() || number(low, &range->low)) && (high.empty() || number(high, &range->high)) &&
         range->low <= range->high;
}

// Packs 64 bytes that are 0 or 1 into 64 bits.
uint64_t Pack(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * i, sizeof(eight));
    bits |= (eight * 0x0102040810204080ull >> 56) << (8 * i);
  }
  return bits;
}

// Returns 64 bits. `mark(flags)` sets flags[i] to 1 for the bits that are 1.
template <typename Mark>
uint64_t Marked(const Mark& mark) {
  alignas(64) uint8_t flags[kBits] = {};
  mark(flags);
  return Pack(flags);
}

// The slots [begin, end) and their bits. begin is a multiple of 64. The bits of slots that meet an expression are
// cleared if it is to be excluded; otherwise the bits of those that do not.
struct Slots {
  int64_t begin;
  int64_t end;
  bool exclude;
  uint64_t* words;
};

// Clears the bits of the slots that do not pass. Bit i of `met(first, count)` tells whether slot first + i meets the
// expression. It is not called for words that are already 0.
template <typename Met>
void Keep64(const Slots& slots, const Met& met) {
  for (int64_t first = slots.begin; first < slots.end; first += kBits) {
    uint64_t& word = slots.words[(first - slots.begin) / kBits];
    if (word == 0) continue;
    const uint64_t bits = met(first, std::min(kBits, slots.end - first));
    word &= slots.exclude ? ~bits : bits;
  }
}

#if defined(__x86_64__)
// Returns which of 64 values are in [low, high].
__attribute__((target("avx2"))) uint64_t InRangeAvx2(const float* from, float low, float high) {
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  uint64_t bits = 0;
  for (int i = 0; i < kBits; i += 8) {
    const __m256 values = _mm256_loadu_ps(from + i);
    const __m256 met = _mm256_and_ps(_mm256_cmp_ps(values, lows, _CMP_GE_OQ), _mm256_cmp_ps(values, highs, _CMP_LE_OQ));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(met))) << i;
  }
  return bits;
}
#endif

template <typename T>
uint64_t InRange(const T* from, int64_t count, T low, T high) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2 && count == kBits) return InRangeAvx2(from, low, high);
  }
#endif
  return Marked([&](uint8_t* flags) {
    for (int64_t i = 0; i < count; ++i) flags[i] = static_cast<uint8_t>((from[i] >= low) & (from[i] <= high));
  });
}

// AtLeast returns the smallest value of type T that is not below `bound`; AtMost the largest that is not above it.
template <typename T>
T AtLeast(double bound) {
  const T value = static_cast<T>(bound);
  return static_cast<double>(value) < bound ? std::nextafter(value, std::numeric_limits<T>::infinity()) : value;
}
template <typename T>
T AtMost(double bound) {
  const T value = static_cast<T>(bound);
  return static_cast<double>(value) > bound ? std::nextafter(value, -std::numeric_limits<T>::infinity()) : value;
}

template <typename T>
void KeepRanges(Span<const T> values, const std::vector<Range>& ranges, const Slots& slots) {
  std::vector<std::pair<T, T>> ends;
  for (const Range& range : ranges) ends.emplace_back(AtLeast<T>(range.low), AtMost<T>(range.high));
  Keep64(slots, [&](int64_t first, int64_t count) {
    uint64_t met = 0;
    for (const auto& [low, high] : ends) met |= InRange<T>(values.data() + first, count, low, high);
    return met;
  });
}

// Slots whose value is one of `codes` meet the expression. wanted[code] is 1 for these codes. All values are below
// wanted.size().
template <typename T>
void KeepCodes(Span<const T> values, const std::vector<uint32_t>& codes, const std::vector<uint8_t>& wanted,
               const Slots& slots) {
  if (codes.size() <= kFewCodes) {
    Keep64(slots, [&](int64_t first, int64_t count) {
      const T* const from = values.data() + first;
      return Marked([&](uint8_t* flags) {
        for (const uint32_t code : codes) {
          for (int64_t i = 0; i < count; ++i) flags[i] |= static_cast<uint8_t>(from[i] == static_cast<T>(code));
        }
      });
    });
    return;
  }
  Keep64(slots, [&](int64_t first, int64_t count) {
    return Marked([&](uint8_t* flags) {
      for (int64_t i = 0; i < count; ++i) flags[i] = wanted[values[first + i]];
    });
  });
}

template <typename T>
void KeepAnyCode(Span<const int64_t> splits, Span<const T> values, const std::vector<uint8_t>& wanted,
                 const Slots& slots) {
  Keep64(slots, [&](int64_t first, int64_t count) {
    return Marked([&](uint8_t* flags) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t v = splits[first + i]; v < splits[first + i + 1]; ++v) flags[i] |= wanted[values[v]];
      }
    });
  });
}

// Returns whether splits [rows + 1] ascend from 0 to `values`.
bool AreSplits(Span<const int64_t> splits, size_t rows, size_t values) {
  return splits.size() == rows + 1 && splits[0] == 0 && splits[rows] == static_cast<int64_t>(values) &&
         std::is_sorted(splits.begin(), splits.end());
}

// Not all processors have the popcnt instruction. Without it, counting the bits of a word is a function call.
#if defined(__x86_64__)
__attribute__((target("popcnt"))) int64_t CountWordsPopcnt(const uint64_t* words, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += __builtin_popcountll(words[i]);
  return found;
}
#endif

int64_t CountWords(const uint64_t* words, int64_t count) {
#if defined(__x86_64__)
  static const bool has_popcnt = __builtin_cpu_supports("popcnt");
  if (has_popcnt) return CountWordsPopcnt(words, count);
#endif
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += __builtin_popcountll(words[i]);
  return found;
}

}  // namespace

int64_t CountBits(Span<const uint64_t> words, int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  const int64_t first = begin / kBits;
  const int64_t last = (end - 1) / kBits;
  const uint64_t head = ~uint64_t{0} << (begin % kBits);
  const uint64_t tail = ~uint64_t{0} >> (kBits - 1 - (end - 1) % kBits);
  const uint64_t ends[] = {words[first] & head, words[last] & tail};
  const uint64_t both = ends[0] & ends[1];
  if (first == last) return CountWords(&both, 1);
  return CountWords(ends, 2) + CountWords(words.data() + first + 1, last - first - 1);
}

Status FilterExpression::Parse(std::string_view text, FilterExpression* expression) {
  const auto refuse = [&text](const char* why) {
    return MakeStatus(StatusCode::kInvalidArgument, "filter ", Quoted(text), " ", why,
                      "; expected NAME=VALUE, NAME=A|B|C or, of a number, NAME=LOW..HIGH");
  };
  if (text.size() > kMaxExpressionBytes) {
    return MakeStatus(StatusCode::kInvalidArgument, "filter ", Quoted(text), " has ", text.size(),
                      " bytes, expected at most ", kMaxExpressionBytes);
  }
  const size_t equals = text.find('=');
  if (equals == std::string_view::npos) return refuse("has no =");
  if (equals == 0) return refuse("has no name");
  expression->name = text.substr(0, equals);
  expression->values.assign(1, "");
  for (size_t i = equals + 1; i < text.size(); ++i) {
    if (text[i] == '|') {
      if (expression->values.back().empty()) return refuse("has an empty value");
      expression->values.emplace_back();
      continue;
    }
    if (text[i] == '\\') {
      if (++i == text.size() || (text[i] != '|' && text[i] != '\\')) {
        return refuse("has a backslash that is not followed by | or another backslash");
      }
    }
    expression->values.back() += text[i];
  }
  if (expression->values.back().empty()) return refuse("has an empty value");
  return Status();
}

// One attribute, in the order of slots. Exactly one of the spans of values is filled.
struct ItemFilters::Column {
  std::string name;
  size_t num_codes = 0;  // 1 + number of distinct texts; 0 for a number
  Span<const uint8_t> values8;
  Span<const uint16_t> values16;
  Span<const int32_t> values32;
  Span<const float> floats;
  Span<const double> doubles;
  Span<const int64_t> splits;  // only for a multi-valued attribute
  Span<const int64_t> text_splits;
  Span<const uint8_t> text_bytes;
  // The slots in the order of their values, if the attribute is not multi-valued. Code c has the range
  // [code_begins[c], code_begins[c + 1]). Numbers are in ascending order, without NaN.
  std::vector<int32_t> by_value;
  std::vector<int64_t> code_begins;
  // Memory that the spans point into if slots are not positions.
  std::vector<char> own_values;
  std::vector<int64_t> own_splits;

  std::string_view Text(size_t code) const {
    return {reinterpret_cast<const char*>(text_bytes.data()) + text_splits[code - 1],
            static_cast<size_t>(text_splits[code] - text_splits[code - 1])};
  }

  // Returns the codes of those of the given values that exist, ascending.
  std::vector<uint32_t> Codes(const std::vector<std::string>& values) const {
    std::vector<uint32_t> codes;
    for (const std::string& value : values) {
      size_t low = 1;
      size_t high = num_codes;
      while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (Text(middle) < value) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low < num_codes && Text(low) == value) codes.push_back(static_cast<uint32_t>(low));
    }
    std::sort(codes.begin(), codes.end());
    return codes;
  }

  // Calls `use` with the span of codes that is filled.
  template <typename Use>
  void WithCodes(const Use& use) const {
    if (values8.data() != nullptr) {
      use(values8);
    } else if (values16.data() != nullptr) {
      use(values16);
    } else {
      use(values32);
    }
  }

  template <typename T>
  void SortSlots(Span<const T> values) {
    const auto items = static_cast<int32_t>(values.size());
    if constexpr (std::is_integral_v<T>) {
      code_begins.assign(num_codes + 1, 0);
      for (const T value : values) ++code_begins[value + 1];
      for (size_t code = 0; code < num_codes; ++code) code_begins[code + 1] += code_begins[code];
      std::vector<int64_t> next(code_begins.begin(), code_begins.end() - 1);
      by_value.resize(items);
      for (int32_t slot = 0; slot < items; ++slot) by_value[next[values[slot]]++] = slot;
    } else {
      std::vector<std::pair<T, int32_t>> sorted;
      sorted.reserve(items);
      for (int32_t slot = 0; slot < items; ++slot) {
        if (!std::isnan(values[slot])) sorted.emplace_back(values[slot], slot);
      }
      std::sort(sorted.begin(), sorted.end());
      by_value.reserve(sorted.size());
      for (const auto& [value, slot] : sorted) by_value.push_back(slot);
    }
  }

  // Returns the part of by_value whose numbers are in the range.
  template <typename T>
  Span<const int32_t> SlotsWithin(Span<const T> values, const Range& range) const {
    const T low = AtLeast<T>(range.low), high = AtMost<T>(range.high);
    const auto begin = std::partition_point(by_value.begin(), by_value.end(),
                                            [&](int32_t slot) { return values[slot] < low; });
    const auto end = std::partition_point(begin, by_value.end(), [&](int32_t slot) { return values[slot] <= high; });
    return {by_value.data() + (begin - by_value.begin()), static_cast<size_t>(end - begin)};
  }

  // Copies values and splits from the order of positions into the order of slots.
  template <typename T>
  void Reorder(const std::vector<int32_t>& positions, Span<const T>* values) {
    size_t count = positions.size();
    if (!splits.empty()) {
      count = 0;
      for (const int32_t position : positions) count += splits[position + 1] - splits[position];
    }
    own_values.resize(count * sizeof(T));
    T* const to = reinterpret_cast<T*>(own_values.data());
    if (splits.empty()) {
      for (size_t slot = 0; slot < positions.size(); ++slot) to[slot] = (*values)[positions[slot]];
    } else {
      own_splits.assign(1, 0);
      own_splits.reserve(positions.size() + 1);
      for (const int32_t position : positions) {
        const int64_t values_here = splits[position + 1] - splits[position];
        std::copy_n(values->data() + splits[position], values_here, to + own_splits.back());
        own_splits.push_back(own_splits.back() + values_here);
      }
      splits = Span<const int64_t>(own_splits.data(), own_splits.size());
    }
    *values = Span<const T>(to, count);
  }
};

// An expression, compiled for the column that it names.
struct ItemFilters::Predicate {
  const Column* column = nullptr;
  bool exclude = false;
  std::vector<Range> ranges;    // for a number
  std::vector<uint32_t> codes;  // for other attributes, ascending
  std::vector<uint8_t> wanted;  // [num_codes], 1 for each of `codes`
  // The slots that meet the expression, if the column has by_value. A slot may be in several of the parts.
  std::vector<Span<const int32_t>> slots;
  int64_t num_slots = 0;  // sum of the sizes of `slots`

  bool IsFew(int64_t items) const { return !column->by_value.empty() && num_slots <= items / kOverFew; }

  // Clears the bits of the slots [begin, end) that do not pass.
  void Keep(int64_t begin, int64_t end, uint64_t* words) const {
    const Slots asked = {begin, end, exclude, words};
    if (column->floats.data() != nullptr) {
      KeepRanges(column->floats, ranges, asked);
    } else if (column->doubles.data() != nullptr) {
      KeepRanges(column->doubles, ranges, asked);
    } else {
      column->WithCodes([&](const auto& values) {
        if (column->splits.empty()) {
          KeepCodes(values, codes, wanted, asked);
        } else {
          KeepAnyCode(column->splits, values, wanted, asked);
        }
      });
    }
  }

  // Clears the bits of all slots that do not pass, from the slots that meet the expression.
  void KeepFew(std::vector<uint64_t>* words) const {
    std::vector<uint64_t> before;
    if (!exclude) {
      before.assign(words->size(), 0);
      before.swap(*words);
    }
    for (const auto& part : slots) {
      for (const int32_t slot : part) {
        const uint64_t bit = uint64_t{1} << (slot % kBits);
        uint64_t& word = (*words)[slot / kBits];
        word = exclude ? word & ~bit : word | (before[slot / kBits] & bit);
      }
    }
  }
};

ItemFilters::ItemFilters(int64_t slots, std::vector<int64_t> group_begins, size_t cache_bytes)
    : slots_(slots), group_begins_(std::move(group_begins)), cache_bytes_(cache_bytes) {}

ItemFilters::~ItemFilters() = default;

Status ItemFilters::Open(const std::string& path, int64_t items, uint64_t item_ids_fingerprint, const ItemOrder& order,
                         std::unique_ptr<ItemFilters>* filters, size_t cache_bytes) {
  const int64_t slots = order.positions.empty() ? items : static_cast<int64_t>(order.positions.size());
  std::unique_ptr<ItemFilters> opened(new ItemFilters(slots, order.group_begins, cache_bytes));
  if (!path.empty()) {
    DPSR_RETURN_IF_ERROR(PackedFile::Open(path, kKind, /*verify=*/true, &opened->file_));
    Span<const uint64_t> fingerprint;
    DPSR_RETURN_IF_ERROR(opened->file_->Get(kItemIds, &fingerprint));
    if (fingerprint.size() != 1 || fingerprint[0] != item_ids_fingerprint) {
      return MakeStatus(StatusCode::kFailedPrecondition, path,
                        ": was written for other item ids, so it belongs to another index; run `dpsr index` again");
    }
    for (const PackedFile::Section& section : opened->file_->sections()) {
      if (section.name.rfind(kValues, 0) != 0) continue;
      DPSR_RETURN_IF_ERROR(opened->AddColumn(section.name.substr(sizeof(kValues) - 1), items, order.positions));
    }
  }
  *filters = std::move(opened);
  return Status();
}

Status ItemFilters::AddColumn(const std::string& name, int64_t items, const std::vector<int32_t>& positions) {
  const auto refuse = [&](const char* why) {
    return MakeStatus(StatusCode::kDataLoss, file_->path(), ": attribute ", Quoted(name), ": ", why);
  };
  auto column = std::make_unique<Column>();
  column->name = name;
  const PackedFile::Section& section = *file_->Find(kValues + name);
  const bool is_number = section.dtype == DataType::kFloat32 || section.dtype == DataType::kFloat64;
  const bool is_multi = file_->Find(kSplits + name) != nullptr;
  if (is_multi) DPSR_RETURN_IF_ERROR(file_->Get(kSplits + name, &column->splits));
  const size_t rows = is_multi ? column->splits.size() - 1 : section.count;
  if (is_multi && (column->splits.empty() || !AreSplits(column->splits, rows, section.count))) {
    return refuse("its splits do not fit its values");
  }
  if (static_cast<int64_t>(rows) != items) {
    return MakeStatus(StatusCode::kFailedPrecondition, file_->path(), ": attribute ", Quoted(name), " has ", rows,
                      " items, but the index has ", items, ": they belong to different indexes");
  }
  const auto read = [&](auto* values) {
    DPSR_RETURN_IF_ERROR(file_->Get(kValues + name, values));
    if constexpr (std::is_integral_v<std::remove_const_t<std::remove_pointer_t<decltype(values->data())>>>) {
      for (const auto value : *values) {
        if (static_cast<size_t>(value) >= column->num_codes) return refuse("a code is out of range");
      }
    }
    if (!positions.empty()) column->Reorder(positions, values);
    if (!is_multi) column->SortSlots(*values);
    return Status();
  };
  if (is_number) {
    if (is_multi) return refuse("numbers cannot be multi-valued");
    DPSR_RETURN_IF_ERROR(section.dtype == DataType::kFloat32 ? read(&column->floats) : read(&column->doubles));
  } else {
    DPSR_RETURN_IF_ERROR(file_->Get(kTexts + name + ".splits", &column->text_splits));
    DPSR_RETURN_IF_ERROR(file_->Get(kTexts + name + ".bytes", &column->text_bytes));
    if (column->text_splits.empty() ||
        !AreSplits(column->text_splits, column->text_splits.size() - 1, column->text_bytes.size())) {
      return refuse("its values are damaged");
    }
    column->num_codes = column->text_splits.size();
    switch (section.dtype) {
      case DataType::kUint8:
        DPSR_RETURN_IF_ERROR(read(&column->values8));
        break;
      case DataType::kUint16:
        DPSR_RETURN_IF_ERROR(read(&column->values16));
        break;
      default:
        DPSR_RETURN_IF_ERROR(read(&column->values32));
    }
  }
  columns_.push_back(std::move(column));
  return Status();
}

Status ItemFilters::Apply(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
                          std::shared_ptr<const ItemMask>* mask) const {
  // Equal filters have equal keys: the distinct expressions of each side in order, with their lengths.
  std::string key;
  std::set<std::string_view> sides[2];
  for (const int side : {0, 1}) {
    for (const std::string_view text : side == 0 ? include : exclude) {
      if (!text.empty()) sides[side].insert(text);
    }
    if (sides[side].size() > kMaxExpressions) {
      return MakeStatus(StatusCode::kInvalidArgument, "there are ", sides[side].size(), " filters to ",
                        side == 0 ? "include" : "exclude", ", expected at most ", kMaxExpressions);
    }
    for (const std::string_view text : sides[side]) key += StrCat(text.size(), ':', text);
    key += ';';
  }
  *mask = FindInCache(key);
  if (*mask != nullptr) return Status();

  std::vector<Predicate> predicates;
  for (const int side : {0, 1}) {
    for (const std::string_view text : sides[side]) {
      DPSR_RETURN_IF_ERROR(Compile(text, /*exclude=*/side == 1, &predicates.emplace_back()));
    }
  }
  // The predicates that leave the fewest items come first, so that the others have little to clear.
  std::stable_sort(predicates.begin(), predicates.end(), [this](const Predicate& a, const Predicate& b) {
    const auto left = [this](const Predicate& predicate) {
      if (predicate.exclude) return slots_ - predicate.num_slots;
      return predicate.column->by_value.empty() ? slots_ : predicate.num_slots;
    };
    return left(a) < left(b);
  });
  if (WasAsked(key)) {
    *mask = Evaluate(predicates);
    AddToCache(key, *mask);
    return Status();
  }
  if (!group_begins_.empty() && slots_ >= kManyItems) {
    const int64_t count = EstimateCount(predicates);
    if (count >= slots_ / kOverMany) {
      auto unknown = std::make_shared<ItemMask>();
      unknown->count = count;
      unknown->keep = [predicates = std::move(predicates)](int64_t begin, int64_t end, uint64_t* words) {
        for (const Predicate& predicate : predicates) predicate.Keep(begin, end, words);
      };
      *mask = std::move(unknown);
      return Status();
    }
  }
  *mask = Evaluate(predicates);
  return Status();
}

bool ItemFilters::WasAsked(const std::string& key) const {
  const size_t hash = std::hash<std::string>()(key);
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(asked_[hash % asked_.size()], hash) == hash;
}

std::shared_ptr<ItemMask> ItemFilters::Evaluate(const std::vector<Predicate>& predicates) const {
  auto computed = std::make_shared<ItemMask>();
  computed->words.assign((slots_ + kBits - 1) / kBits, ~uint64_t{0});
  if (slots_ % kBits != 0) computed->words.back() = (uint64_t{1} << (slots_ % kBits)) - 1;
  for (const Predicate& predicate : predicates) {
    if (predicate.IsFew(slots_)) {
      predicate.KeepFew(&computed->words);
    } else {
      predicate.Keep(0, slots_, computed->words.data());
    }
  }
  const Span<const uint64_t> bits(computed->words.data(), computed->words.size());
  if (group_begins_.empty()) {
    computed->count = CountBits(bits, 0, slots_);
    return computed;
  }
  computed->group_counts.reserve(group_begins_.size() - 1);
  for (size_t group = 0; group + 1 < group_begins_.size(); ++group) {
    const int64_t count = CountBits(bits, group_begins_[group], group_begins_[group + 1]);
    computed->group_counts.push_back(static_cast<int32_t>(count));
    computed->count += count;
  }
  return computed;
}

// Estimates the number of items that pass from evenly spread words. Returns 0 if few are known to meet an expression.
int64_t ItemFilters::EstimateCount(const std::vector<Predicate>& predicates) const {
  for (const Predicate& predicate : predicates) {
    if (!predicate.exclude && !predicate.column->by_value.empty() && predicate.num_slots < slots_ / kOverMany) return 0;
  }
  int64_t passing = 0;
  for (int64_t i = 0; i < kSampledWords; ++i) {
    const int64_t begin = i * (slots_ / kBits) / kSampledWords * kBits;
    uint64_t word = ~uint64_t{0};
    for (const Predicate& predicate : predicates) predicate.Keep(begin, begin + kBits, &word);
    passing += __builtin_popcountll(word);
  }
  return passing * slots_ / (kSampledWords * kBits);
}

Status ItemFilters::Compile(std::string_view text, bool exclude, Predicate* predicate) const {
  FilterExpression expression;
  DPSR_RETURN_IF_ERROR(FilterExpression::Parse(text, &expression));
  const auto found = std::find_if(columns_.begin(), columns_.end(),
                                  [&](const auto& column) { return column->name == expression.name; });
  if (found == columns_.end()) return UnknownName(expression.name);
  const Column& column = **found;
  predicate->column = &column;
  predicate->exclude = exclude;
  if (column.num_codes == 0) {
    predicate->ranges.resize(expression.values.size());
    for (size_t i = 0; i < predicate->ranges.size(); ++i) {
      if (!ParseRange(expression.values[i], &predicate->ranges[i])) {
        return MakeStatus(StatusCode::kInvalidArgument, "filter ", Quoted(text), ": ", Quoted(column.name),
                          " is a number, but ", Quoted(expression.values[i]),
                          " is neither a number nor a range; expected, for example, 10, 10..20, ..20 or 10..");
      }
      const Range& range = predicate->ranges[i];
      predicate->slots.push_back(column.floats.data() != nullptr ? column.SlotsWithin(column.floats, range)
                                                                 : column.SlotsWithin(column.doubles, range));
    }
  } else {
    predicate->codes = column.Codes(expression.values);
    predicate->wanted.assign(column.num_codes, 0);
    for (const uint32_t code : predicate->codes) {
      predicate->wanted[code] = 1;
      if (column.by_value.empty()) continue;
      const int64_t begin = column.code_begins[code];
      const auto size = static_cast<size_t>(column.code_begins[code + 1] - begin);
      predicate->slots.emplace_back(column.by_value.data() + begin, size);
    }
  }
  for (const auto& part : predicate->slots) predicate->num_slots += static_cast<int64_t>(part.size());
  return Status();
}

Status ItemFilters::UnknownName(const std::string& name) const {
  if (columns_.empty()) {
    return MakeStatus(StatusCode::kInvalidArgument, "filter on ", Quoted(name),
                      ": the items of this index have no attributes to filter by; name some in the schema under "
                      "items.filters");
  }
  std::string known;
  for (const auto& column : columns_) known += (known.empty() ? "" : ", ") + column->name;
  return MakeStatus(StatusCode::kInvalidArgument, "filter on ", Quoted(name),
                    ": there is no such attribute, expected one of: ", known);
}

std::shared_ptr<const ItemMask> ItemFilters::FindInCache(const std::string& key) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return nullptr;
  cached_.splice(cached_.begin(), cached_, found->second);
  return found->second->mask;
}

void ItemFilters::AddToCache(const std::string& key, const std::shared_ptr<const ItemMask>& mask) const {
  const size_t bytes = key.size() + mask->words.size() * sizeof(uint64_t) +
                       mask->group_counts.size() * sizeof(int32_t) + sizeof(CachedMask) + sizeof(ItemMask);
  if (bytes > cache_bytes_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (by_key_.count(key) != 0) return;  // another thread has added it
  while (cached_bytes_ + bytes > cache_bytes_) {
    by_key_.erase(cached_.back().key);
    cached_bytes_ -= cached_.back().bytes;
    cached_.pop_back();
  }
  cached_.push_front({key, mask, bytes});
  by_key_.emplace(cached_.front().key, cached_.begin());
  cached_bytes_ += bytes;
}

size_t ItemFilters::cached_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cached_bytes_;
}

}  // namespace dpsr
