#include "export/faiss_search/item_filter.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <type_traits>
#include <unordered_map>
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

// Counts the bits in [begin, end) that are 1.
inline int64_t CountRange(const uint64_t* words, int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  const int64_t first = begin / kBits;
  const int64_t last = (end - 1) / kBits;
  const uint64_t head = ~uint64_t{0} << (begin % kBits);
  const uint64_t tail = ~uint64_t{0} >> (kBits - 1 - (end - 1) % kBits);
  if (first == last) return __builtin_popcountll(words[first] & head & tail);
  int64_t found = __builtin_popcountll(words[first] & head) + __builtin_popcountll(words[last] & tail);
  for (int64_t i = first + 1; i < last; ++i) found += __builtin_popcountll(words[i]);
  return found;
}

// Counts the bits of each group that are 1. Returns their sum.
inline int64_t CountRanges(const uint64_t* words, const std::vector<int64_t>& begins, int32_t* counts) {
  int64_t sum = 0;
  for (size_t group = 0; group + 1 < begins.size(); ++group) {
    const int64_t count = CountRange(words, begins[group], begins[group + 1]);
    counts[group] = static_cast<int32_t>(count);
    sum += count;
  }
  return sum;
}

// Not all processors have the popcnt instruction. Without it, counting the bits of a word is a function call.
#if defined(__x86_64__)
__attribute__((target("popcnt"), flatten)) int64_t CountRangePopcnt(const uint64_t* words, int64_t begin, int64_t end) {
  return CountRange(words, begin, end);
}
__attribute__((target("popcnt"), flatten)) int64_t CountRangesPopcnt(const uint64_t* words,
                                                                     const std::vector<int64_t>& begins,
                                                                     int32_t* counts) {
  return CountRanges(words, begins, counts);
}
bool HasPopcnt() {
  static const bool has = __builtin_cpu_supports("popcnt");
  return has;
}
#endif

int64_t CountGroups(const uint64_t* words, const std::vector<int64_t>& begins, int32_t* counts) {
#if defined(__x86_64__)
  if (HasPopcnt()) return CountRangesPopcnt(words, begins, counts);
#endif
  return CountRanges(words, begins, counts);
}

}  // namespace

int64_t CountBits(Span<const uint64_t> words, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (HasPopcnt()) return CountRangePopcnt(words.data(), begin, end);
#endif
  return CountRange(words.data(), begin, end);
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
  // Texts that only changes have, with their codes: num_codes, num_codes + 1, ... Guarded by texts_mutex_.
  std::unordered_map<std::string, int32_t> new_texts;
  // Memory that the spans point into if slots are not positions.
  std::vector<char> own_values;
  std::vector<int64_t> own_splits;

  std::string_view Text(size_t code) const {
    return {reinterpret_cast<const char*>(text_bytes.data()) + text_splits[code - 1],
            static_cast<size_t>(text_splits[code] - text_splits[code - 1])};
  }

  bool is_number() const { return num_codes == 0; }
  bool is_multi() const { return !splits.empty(); }

  // Returns the code of a text, or 0 if no item of the file has it.
  uint32_t CodeInFile(const std::string& text) const {
    size_t low = 1;
    size_t high = num_codes;
    while (low < high) {
      const size_t middle = low + (high - low) / 2;
      if (Text(middle) < text) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < num_codes && Text(low) == text ? static_cast<uint32_t>(low) : 0;
  }

  // Returns the codes of those of the given values that exist, ascending. The caller holds texts_mutex_.
  std::vector<uint32_t> Codes(const std::vector<std::string>& values) const {
    std::vector<uint32_t> codes;
    for (const std::string& value : values) {
      const uint32_t code = CodeInFile(value);
      const auto found = code == 0 ? new_texts.find(value) : new_texts.end();
      if (code != 0 || found != new_texts.end()) codes.push_back(code != 0 ? code : found->second);
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

  size_t number = 0;                        // of the column
  const ChangedColumn* changed = nullptr;   // values that count instead of those of the file; may be null

  bool has_changes() const { return changed != nullptr && !changed->pages.empty(); }

  // Returns whether `slots` tells which slots meet the expression, and these are few.
  bool IsFew(int64_t items) const { return is_listed() && num_slots <= items / kOverFew; }
  bool is_listed() const { return !column->by_value.empty() && !(has_changes() && changed->many_slots); }

  // Clears the bits of the slots [begin, end) that do not pass.
  void Keep(int64_t begin, int64_t end, uint64_t* words) const {
    if (!has_changes()) {
      KeepInFile(begin, end, words);
      return;
    }
    ForEachPage(begin, end, [&](const AttributePage* page, int64_t page_begin, int64_t first, int64_t last) {
      uint64_t* const from = words + (first - begin) / kBits;
      if (page == nullptr) {
        KeepInFile(first, last, from);
      } else {
        KeepInPage(*page, first - page_begin, last - page_begin, from);
      }
    });
  }

  // The same for rows of a segment, whose attributes are `rows`.
  void KeepRows(const ChangedColumn& rows, int64_t end, uint64_t* words) const {
    for (int64_t first = 0; first < end; first += AttributePage::kPageSlots) {
      const int64_t last = std::min(first + AttributePage::kPageSlots, end);
      KeepInPage(*rows.Page(first), 0, last - first, words + first / kBits);
    }
  }

  // Clears the bits of all slots that do not pass, from the slots that meet the expression.
  void KeepFew(std::vector<uint64_t>* words) const {
    if (exclude) {
      ForEachFew([&](int32_t slot) { (*words)[slot / kBits] &= ~(uint64_t{1} << (slot % kBits)); });
      return;
    }
    std::vector<uint64_t> before(words->size(), 0);
    before.swap(*words);
    ForEachFew([&](int32_t slot) {
      (*words)[slot / kBits] |= before[slot / kBits] & (uint64_t{1} << (slot % kBits));
    });
  }

  // Sets the bits of the slots that pass. All bits must be 0, and the expression not one that excludes.
  void SetFew(std::vector<uint64_t>* words) const {
    uint64_t* const bits = words->data();
    ForEachFew([bits](int32_t slot) { bits[slot / kBits] |= uint64_t{1} << (slot % kBits); });
  }

 private:
  // Calls use(slot) for the slots that meet the expression.
  template <typename Use>
  void ForEachFew(const Use& use) const {
    const bool any_changes = has_changes();
    for (const auto& part : slots) {
      if (!any_changes) {
        for (const int32_t slot : part) use(slot);
        continue;
      }
      for (const int32_t slot : part) {
        if (changed->Page(slot) == nullptr || MeetsInPage(slot)) use(slot);
      }
    }
    if (!any_changes || changed->slots == nullptr) return;
    for (const int32_t slot : *changed->slots) {
      if (MeetsInPage(slot)) use(slot);
    }
  }

  template <typename Use>
  void ForEachPage(int64_t begin, int64_t end, const Use& use) const {
    for (int64_t first = begin; first < end;) {
      const int64_t page_begin = first / AttributePage::kPageSlots * AttributePage::kPageSlots;
      const int64_t last = std::min(page_begin + AttributePage::kPageSlots, end);
      use(changed->Page(first), page_begin, first, last);
      first = last;
    }
  }

  void KeepInFile(int64_t begin, int64_t end, uint64_t* words) const {
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

  // The slots count from the start of the page.
  void KeepInPage(const AttributePage& page, int64_t begin, int64_t end, uint64_t* words) const {
    const Slots asked = {begin, end, exclude, words};
    if (column->is_number()) {
      KeepRanges(Span<const double>(page.numbers.data(), page.numbers.size()), ranges, asked);
      return;
    }
    const Span<const int32_t> values(page.codes.data(), page.codes.size());
    if (column->is_multi()) {
      KeepAnyCode(Span<const int64_t>(page.splits.data(), page.splits.size()), values, wanted, asked);
    } else {
      KeepCodes(values, codes, wanted, asked);
    }
  }

  // Returns whether a slot in a changed page meets the expression. Not for multi-valued attributes.
  bool MeetsInPage(int64_t slot) const {
    const AttributePage& page = *changed->Page(slot);
    const int64_t place = slot % AttributePage::kPageSlots;
    if (!column->is_number()) return wanted[page.codes[place]] != 0;
    const double value = page.numbers[place];
    return std::any_of(ranges.begin(), ranges.end(),
                       [value](const Range& range) { return value >= range.low && value <= range.high; });
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

namespace {

// Puts the distinct expressions of each side in order.
Status Distinct(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
                std::set<std::string_view> (*sides)[2]) {
  for (const int side : {0, 1}) {
    std::set<std::string_view>& distinct = (*sides)[side];
    for (const std::string_view text : side == 0 ? include : exclude) {
      if (!text.empty()) distinct.insert(text);
    }
    if (distinct.size() > kMaxExpressions) {
      return MakeStatus(StatusCode::kInvalidArgument, "there are ", distinct.size(), " filters to ",
                        side == 0 ? "include" : "exclude", ", expected at most ", kMaxExpressions);
    }
  }
  return Status();
}

}  // namespace

Status ItemFilters::Apply(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
                          std::shared_ptr<const ItemMask>* mask,
                          const std::shared_ptr<const ChangedAttributes>& changes) const {
  // Equal filters have equal keys: the distinct expressions of each side in order, with their lengths.
  std::string key;
  std::set<std::string_view> sides[2];
  DPSR_RETURN_IF_ERROR(Distinct(include, exclude, &sides));
  for (const auto& side : sides) {
    for (const std::string_view text : side) key += StrCat(text.size(), ':', text);
    key += ';';
  }
  CachedMask old;
  *mask = FindInCache(key, changes.get(), &old);
  if (*mask != nullptr) return Status();

  std::vector<Predicate> predicates;
  DPSR_RETURN_IF_ERROR(CompileSides(sides, changes.get(), &predicates));
  // The predicates that leave the fewest items come first, so that the others have little to clear.
  std::stable_sort(predicates.begin(), predicates.end(), [this](const Predicate& a, const Predicate& b) {
    const auto left = [this](const Predicate& predicate) {
      if (predicate.exclude) return slots_ - predicate.num_slots;
      return predicate.column->by_value.empty() ? slots_ : predicate.num_slots;
    };
    return left(a) < left(b);
  });
  if (WasAsked(key)) {
    if (old.mask != nullptr && changes != nullptr) *mask = BringUpToDate(old, predicates, *changes);
    if (*mask == nullptr) *mask = Evaluate(predicates);
    AddToCache(key, predicates, *mask);
    return Status();
  }
  if (!group_begins_.empty() && slots_ >= kManyItems) {
    const int64_t count = EstimateCount(predicates);
    if (count >= slots_ / kOverMany) {
      auto unknown = std::make_shared<ItemMask>();
      unknown->count = count;
      // The changes are captured because the predicates point into them.
      unknown->keep = [predicates = std::move(predicates), changes](int64_t begin, int64_t end, uint64_t* words) {
        for (const Predicate& predicate : predicates) predicate.Keep(begin, end, words);
      };
      *mask = std::move(unknown);
      return Status();
    }
  }
  *mask = Evaluate(predicates);
  return Status();
}

Status ItemFilters::Compile(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
                            std::shared_ptr<const Predicates>* predicates) const {
  std::set<std::string_view> sides[2];
  DPSR_RETURN_IF_ERROR(Distinct(include, exclude, &sides));
  auto compiled = std::make_shared<Predicates>();
  DPSR_RETURN_IF_ERROR(CompileSides(sides, nullptr, compiled.get()));
  *predicates = std::move(compiled);
  return Status();
}

void ItemFilters::FindRows(const Predicates& predicates, const ChangedAttributes& attributes, int64_t rows,
                           std::vector<uint64_t>* words) {
  words->assign((rows + kBits - 1) / kBits, ~uint64_t{0});
  if (rows % kBits != 0) words->back() = (uint64_t{1} << (rows % kBits)) - 1;
  for (const Predicate& predicate : predicates) predicate.KeepRows(attributes[predicate.number], rows, words->data());
}

bool ItemFilters::WasAsked(const std::string& key) const {
  const size_t hash = std::hash<std::string>()(key);
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(asked_[hash % asked_.size()], hash) == hash;
}

std::shared_ptr<ItemMask> ItemFilters::Evaluate(const std::vector<Predicate>& predicates) const {
  auto computed = std::make_shared<ItemMask>();
  // The first expression leaves the fewest items.
  const bool few = !predicates.empty() && !predicates[0].exclude && predicates[0].IsFew(slots_);
  computed->words.assign((slots_ + kBits - 1) / kBits, few ? 0 : ~uint64_t{0});
  if (few) {
    predicates[0].SetFew(&computed->words);
  } else if (slots_ % kBits != 0) {
    computed->words.back() = (uint64_t{1} << (slots_ % kBits)) - 1;
  }
  for (size_t i = few ? 1 : 0; i < predicates.size(); ++i) {
    const Predicate& predicate = predicates[i];
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
  computed->group_counts.resize(group_begins_.size() - 1);
  computed->count = CountGroups(bits.data(), group_begins_, computed->group_counts.data());
  return computed;
}

// Estimates the number of items that pass from evenly spread words. Returns 0 if few are known to meet an expression.
int64_t ItemFilters::EstimateCount(const std::vector<Predicate>& predicates) const {
  for (const Predicate& predicate : predicates) {
    if (!predicate.exclude && predicate.is_listed() && predicate.num_slots < slots_ / kOverMany) return 0;
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

Status ItemFilters::CompileSides(const std::set<std::string_view> (&sides)[2], const ChangedAttributes* changes,
                                 Predicates* predicates) const {
  // Texts that changes bring later do not matter: nothing that the caller has holds their codes.
  const std::shared_lock<std::shared_mutex> lock(texts_mutex_);
  for (const int side : {0, 1}) {
    for (const std::string_view text : sides[side]) {
      Predicate& predicate = predicates->emplace_back();
      DPSR_RETURN_IF_ERROR(CompileOne(text, /*exclude=*/side == 1, &predicate));
      if (changes == nullptr) continue;
      predicate.changed = &(*changes)[predicate.number];
      if (predicate.changed->slots != nullptr) {
        predicate.num_slots += static_cast<int64_t>(predicate.changed->slots->size());
      }
    }
  }
  return Status();
}

Status ItemFilters::CompileOne(std::string_view text, bool exclude, Predicate* predicate) const {
  FilterExpression expression;
  DPSR_RETURN_IF_ERROR(FilterExpression::Parse(text, &expression));
  const auto found = std::find_if(columns_.begin(), columns_.end(),
                                  [&](const auto& column) { return column->name == expression.name; });
  if (found == columns_.end()) return UnknownName(expression.name);
  const Column& column = **found;
  predicate->column = &column;
  predicate->number = static_cast<size_t>(found - columns_.begin());
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
    predicate->wanted.assign(column.num_codes + column.new_texts.size(), 0);
    for (const uint32_t code : predicate->codes) {
      predicate->wanted[code] = 1;
      if (column.by_value.empty() || code >= column.num_codes) continue;
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

// Computes the words in which slots have changed since a mask was cached. Returns null if these are not known, or many.
std::shared_ptr<ItemMask> ItemFilters::BringUpToDate(const CachedMask& old, const Predicates& predicates,
                                                     const ChangedAttributes& changes) const {
  std::vector<int64_t> words;
  for (const auto& [number, generation] : old.generations) {
    const ChangedColumn& column = changes[number];
    if (column.generation < generation || column.recent_since > generation) return nullptr;
    for (const ChangedColumn::Batch& batch : column.recent) {
      if (batch.generation <= generation) continue;
      for (const int32_t slot : *batch.slots) words.push_back(slot / kBits);
    }
  }
  if (static_cast<int64_t>(words.size()) > slots_ / kBits / kOverFew) return nullptr;
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  auto mask = std::make_shared<ItemMask>(*old.mask);
  for (const int64_t word : words) {
    const int64_t begin = word * kBits;
    const int64_t end = std::min(begin + kBits, slots_);
    uint64_t bits = ~uint64_t{0} >> (kBits - (end - begin));
    for (const Predicate& predicate : predicates) predicate.Keep(begin, end, &bits);
    for (uint64_t differ = bits ^ mask->words[word]; differ != 0; differ &= differ - 1) {
      const int64_t slot = begin + __builtin_ctzll(differ);
      const int change = (bits >> (slot - begin) & 1) != 0 ? 1 : -1;
      if (group_begins_.empty()) {
        mask->count += change;
      } else if (slot < group_begins_.back()) {
        const auto group = std::upper_bound(group_begins_.begin(), group_begins_.end(), slot) - 1;
        mask->group_counts[group - group_begins_.begin()] += change;
        mask->count += change;
      }
    }
    mask->words[word] = bits;
  }
  return mask;
}

// `old` gets what is cached, but from before the last changes.
std::shared_ptr<const ItemMask> ItemFilters::FindInCache(const std::string& key, const ChangedAttributes* changes,
                                                         CachedMask* old) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return nullptr;
  for (const auto& [column, generation] : found->second->generations) {
    if (generation == (changes == nullptr ? 0 : (*changes)[column].generation)) continue;
    *old = *found->second;
    return nullptr;
  }
  cached_.splice(cached_.begin(), cached_, found->second);
  return found->second->mask;
}

void ItemFilters::AddToCache(const std::string& key, const Predicates& predicates,
                             const std::shared_ptr<const ItemMask>& mask) const {
  std::vector<std::pair<size_t, uint64_t>> generations;
  uint64_t age = 0;  // the sum of the generations, which never fall
  for (const Predicate& predicate : predicates) {
    generations.emplace_back(predicate.number, predicate.changed == nullptr ? 0 : predicate.changed->generation);
    age += generations.back().second;
  }
  const size_t bytes = key.size() + mask->words.size() * sizeof(uint64_t) +
                       mask->group_counts.size() * sizeof(int32_t) + sizeof(CachedMask) + sizeof(ItemMask);
  if (bytes > cache_bytes_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto remove = [this](std::list<CachedMask>::iterator cached) {
    by_key_.erase(cached->key);
    cached_bytes_ -= cached->bytes;
    cached_.erase(cached);
  };
  const auto found = by_key_.find(key);
  if (found != by_key_.end()) {
    // Another thread has added it, or it is from before some change.
    for (const auto& [column, generation] : found->second->generations) age -= generation;
    if (static_cast<int64_t>(age) <= 0) return;
    remove(found->second);
  }
  while (cached_bytes_ + bytes > cache_bytes_) remove(std::prev(cached_.end()));
  cached_.push_front({key, mask, bytes, std::move(generations)});
  by_key_.emplace(cached_.front().key, cached_.begin());
  cached_bytes_ += bytes;
}

size_t ItemFilters::cached_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cached_bytes_;
}

// The share of the slots of an index, one in this many, of which a column lists the changed ones.
constexpr int64_t kOverManyChanged = 64;
// A column remembers the slots of so many batches of changes.
constexpr size_t kRecentBatches = 50;

AttributeEditor::AttributeEditor(ItemFilters* filters, const std::shared_ptr<const ChangedAttributes>& before,
                                 bool rows, uint64_t generation)
    : filters_(filters),
      rows_(rows),
      generation_(generation),
      before_(before),
      edited_(filters->columns_.size()),
      changed_slots_(filters->columns_.size()) {}

// Returns a page that belongs to this editor: a copy of the one before, or of the values of the file.
AttributePage* AttributeEditor::EditPage(size_t column, int64_t page) {
  AttributePage*& edited = edited_[column][page];
  if (edited != nullptr) return edited;
  if (after_ == nullptr) {
    after_ = before_ != nullptr ? std::make_shared<ChangedAttributes>(*before_)
                                : std::make_shared<ChangedAttributes>(filters_->columns_.size());
  }
  const ItemFilters::Column& in_file = *filters_->columns_[column];
  auto& pages = (*after_)[column].pages;
  if (pages.empty() && !rows_) {
    pages.resize((filters_->slots_ + AttributePage::kPageSlots - 1) / AttributePage::kPageSlots);
  }
  if (rows_ && page == static_cast<int64_t>(pages.size())) pages.emplace_back();
  auto copy = std::make_shared<AttributePage>();
  if (pages[page] != nullptr) *copy = *pages[page];
  if (pages[page] == nullptr && !rows_) {
    const int64_t begin = page * AttributePage::kPageSlots;
    const int64_t end = std::min(begin + AttributePage::kPageSlots, filters_->slots_);
    if (in_file.floats.data() != nullptr) {
      copy->numbers.assign(in_file.floats.data() + begin, in_file.floats.data() + end);
    } else if (in_file.doubles.data() != nullptr) {
      copy->numbers.assign(in_file.doubles.data() + begin, in_file.doubles.data() + end);
    } else {
      in_file.WithCodes([&](const auto& values) {
        int64_t first = begin, last = end;
        if (in_file.is_multi()) {
          first = in_file.splits[begin];
          last = in_file.splits[end];
          for (int64_t slot = begin; slot <= end; ++slot) copy->splits.push_back(in_file.splits[slot] - first);
        }
        copy->codes.assign(values.data() + first, values.data() + last);
      });
    }
  }
  if (in_file.is_multi() && copy->splits.empty()) copy->splits.push_back(0);
  edited = copy.get();
  pages[page] = std::move(copy);
  return edited;
}

void AttributeEditor::Set(int64_t slot, const std::vector<AttributeValue>& values) {
  for (const AttributeValue& value : values) {
    for (size_t column = 0; column < filters_->columns_.size(); ++column) {
      if (filters_->columns_[column]->name == value.name) SetOne(column, slot, value);
    }
  }
}

void AttributeEditor::SetOne(size_t column, int64_t slot, const AttributeValue& value) {
  ItemFilters::Column& in_file = *filters_->columns_[column];
  AttributePage* const page = EditPage(column, slot / AttributePage::kPageSlots);
  const int64_t place = slot % AttributePage::kPageSlots;
  if (!rows_) changed_slots_[column].push_back(static_cast<int32_t>(slot));
  if (in_file.is_number()) {
    double number = std::numeric_limits<double>::quiet_NaN();
    if (!value.numbers.empty()) {
      number = value.numbers[0];
    } else if (!value.texts.empty()) {
      const std::string& text = value.texts[0];
      const auto read = std::from_chars(text.data(), text.data() + text.size(), number);
      if (read.ec != std::errc() || read.ptr != text.data() + text.size()) {
        number = std::numeric_limits<double>::quiet_NaN();
      }
    }
    page->numbers[place] = std::isfinite(number) ? number : std::numeric_limits<double>::quiet_NaN();
    return;
  }
  std::vector<int32_t> codes;
  for (const std::string& text : value.texts) {
    if (text.empty()) continue;
    auto code = static_cast<int32_t>(in_file.CodeInFile(text));
    if (code == 0) {
      const std::unique_lock<std::shared_mutex> lock(filters_->texts_mutex_);
      const auto next = static_cast<int32_t>(in_file.num_codes + in_file.new_texts.size());
      code = in_file.new_texts.emplace(text, next).first->second;
    }
    codes.push_back(code);
    if (!in_file.is_multi()) break;
  }
  if (!in_file.is_multi()) {
    page->codes[place] = codes.empty() ? 0 : codes[0];
    return;
  }
  const auto begin = page->codes.begin() + page->splits[place];
  const int64_t before = page->splits[place + 1] - page->splits[place];
  page->codes.insert(page->codes.erase(begin, begin + before), codes.begin(), codes.end());
  const int64_t more = static_cast<int64_t>(codes.size()) - before;
  for (size_t next = place + 1; next < page->splits.size(); ++next) page->splits[next] += more;
}

void AttributeEditor::AddRow() {
  for (size_t column = 0; column < filters_->columns_.size(); ++column) {
    const ItemFilters::Column& in_file = *filters_->columns_[column];
    const auto* const pages = after_ != nullptr ? &(*after_)[column].pages
                              : before_ != nullptr ? &(*before_)[column].pages : nullptr;
    int64_t last = pages == nullptr ? 0 : static_cast<int64_t>(pages->size()) - 1;
    const auto rows_in = [&](const AttributePage& page) {
      return static_cast<int64_t>(in_file.is_number()  ? page.numbers.size()
                                  : in_file.is_multi() ? page.splits.size() - 1
                                                       : page.codes.size());
    };
    if (last < 0) last = 0;
    if (pages != nullptr && !pages->empty() && rows_in(*pages->back()) == AttributePage::kPageSlots) ++last;
    AttributePage* const page = EditPage(column, last);
    if (in_file.is_number()) {
      page->numbers.push_back(std::numeric_limits<double>::quiet_NaN());
    } else if (in_file.is_multi()) {
      page->splits.push_back(page->splits.back());
    } else {
      page->codes.push_back(0);
    }
  }
}

void AttributeEditor::CopyRow(const ChangedAttributes& from, int64_t row) {
  AddRow();
  const int64_t place = row % AttributePage::kPageSlots;
  for (size_t column = 0; column < filters_->columns_.size(); ++column) {
    const ItemFilters::Column& in_file = *filters_->columns_[column];
    const AttributePage& source = *from[column].Page(row);
    const auto last = static_cast<int64_t>((*after_)[column].pages.size()) - 1;
    AttributePage* const page = EditPage(column, last);
    if (in_file.is_number()) {
      page->numbers.back() = source.numbers[place];
    } else if (in_file.is_multi()) {
      page->codes.insert(page->codes.end(), source.codes.begin() + source.splits[place],
                         source.codes.begin() + source.splits[place + 1]);
      page->splits.back() = static_cast<int64_t>(page->codes.size());
    } else {
      page->codes.back() = source.codes[place];
    }
  }
}

std::shared_ptr<const ChangedAttributes> AttributeEditor::Finish() {
  if (after_ == nullptr) return before_;
  for (size_t column = 0; column < changed_slots_.size(); ++column) {
    if (edited_[column].empty()) continue;
    ChangedColumn& changed = (*after_)[column];
    changed.generation = generation_;
    if (rows_) continue;
    changed.recent.push_back(
        {generation_, std::make_shared<const std::vector<int32_t>>(std::move(changed_slots_[column]))});
    const std::vector<int32_t>& added = *changed.recent.back().slots;
    while (changed.recent.size() > kRecentBatches) {
      changed.recent_since = changed.recent.front().generation;
      changed.recent.erase(changed.recent.begin());
    }
    if (changed.many_slots) continue;
    auto slots = changed.slots != nullptr ? std::make_shared<std::vector<int32_t>>(*changed.slots)
                                          : std::make_shared<std::vector<int32_t>>();
    slots->insert(slots->end(), added.begin(), added.end());
    changed.many_slots = static_cast<int64_t>(slots->size()) > filters_->slots_ / kOverManyChanged;
    changed.slots = changed.many_slots ? nullptr : std::move(slots);
  }
  return std::move(after_);
}

}  // namespace dpsr
