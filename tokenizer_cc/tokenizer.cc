#include "tokenizer_cc/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "tokenizer_cc/token_scanner.h"

namespace dpsr {
namespace {

constexpr char kVersionKey[] = "tokenizer_version";
// Every change that gives a text other tokens must increase the version, because the ids of a vocabulary change their
// meaning.
constexpr char kVersion[] = "1";

struct Switch {
  std::string_view key;
  bool TokenizerConfig::*value;
};

constexpr std::array<Switch, 7> kSwitches = {{
    {"word_unigrams", &TokenizerConfig::word_unigrams},
    {"word_bigrams", &TokenizerConfig::word_bigrams},
    {"letter_trigrams", &TokenizerConfig::letter_trigrams},
    {"char_unigrams", &TokenizerConfig::char_unigrams},
    {"char_bigrams", &TokenizerConfig::char_bigrams},
    {"number_parts", &TokenizerConfig::number_parts},
    {"markers", &TokenizerConfig::markers},
}};

// NFKC writes ½ with this slash. It is treated as '/'.
constexpr utf8proc_int32_t kFractionSlash = 0x2044;

struct Range {
  utf8proc_int32_t first;
  utf8proc_int32_t last;
  // Whether all code points of the block are characters. In Han blocks they are, even if this Unicode version does not
  // know them or calls them symbols. In other scripts only letters, marks and numbers are, and punctuation separates.
  bool whole;
};

// The blocks of scripts that are written without spaces, in ascending order.
constexpr Range kUnspacedRanges[] = {
    {0x0E00, 0x0EFF, false},    // Thai, Lao
    {0x1000, 0x109F, false},    // Myanmar
    {0x1780, 0x17FF, false},    // Khmer
    {0x2E80, 0x2FDF, true},     // CJK and Kangxi radicals
    {0x3005, 0x3007, false},    // Han iteration mark, closing mark, zero
    {0x3021, 0x3029, false},    // Hangzhou numerals
    {0x3031, 0x3035, false},    // Kana repeat marks
    {0x3038, 0x303C, false},    // Hangzhou numerals, vertical iteration mark, masu mark
    {0x3041, 0x312F, false},    // Hiragana, Katakana, Bopomofo
    {0x31A0, 0x31BF, false},    // Bopomofo Extended
    {0x31F0, 0x31FF, false},    // Katakana Phonetic Extensions
    {0x3400, 0x4DBF, true},     // Han Extension A
    {0x4E00, 0x9FFF, true},     // Han
    {0xA9E0, 0xA9FF, false},    // Myanmar Extended-B
    {0xAA60, 0xAA7F, false},    // Myanmar Extended-A
    {0xF900, 0xFAFF, true},     // Han Compatibility Ideographs
    {0x1AFF0, 0x1B16F, false},  // Kana Extended-A, -B, Supplement, Small Kana
    {0x20000, 0x3FFFD, true},   // Han Extensions B and on: the planes 2 and 3
};

bool IsUnspaced(utf8proc_int32_t c, bool is_word_category) {
  const Range* range = std::lower_bound(std::begin(kUnspacedRanges), std::end(kUnspacedRanges), c,
                                        [](const Range& r, utf8proc_int32_t value) { return r.last < value; });
  return range != std::end(kUnspacedRanges) && range->first <= c && (range->whole || is_word_category);
}

// Finds the class of a code point by its Unicode category, which is slow.
CharClass ClassifyByCategory(utf8proc_int32_t c) {
  if (c < 128) return ClassOf(kAscii.unit[c]);
  CharClass char_class = CharClass::kSeparator;
  switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      char_class = CharClass::kLetter;
      break;
    case UTF8PROC_CATEGORY_ND:
      char_class = CharClass::kDigit;
      break;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
      char_class = CharClass::kMark;
      break;
    default:
      break;
  }
  // A mark of an unspaced script stays a mark, because it needs a character before it.
  if (char_class != CharClass::kMark && IsUnspaced(c, char_class != CharClass::kSeparator)) return CharClass::kUnspaced;
  return char_class;
}

// Brings each run of marks into canonical order. (utf8proc_decompose exchanges neighbours, which takes quadratic time
// for a text that consists of marks.)
void OrderMarks(std::vector<utf8proc_int32_t>* text) {
  const auto combining_class = [](utf8proc_int32_t c) {
    return c < 0x300 ? 0 : utf8proc_get_property(c)->combining_class;
  };
  auto begin = text->begin();
  while (begin != text->end()) {
    if (combining_class(*begin) == 0) {
      ++begin;
      continue;
    }
    auto end = begin + 1;
    while (end != text->end() && combining_class(*end) != 0) ++end;
    if (end - begin > 1) {
      std::stable_sort(begin, end, [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
    }
    begin = end;
  }
}

constexpr auto kNormalForm = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT |
                                                            UTF8PROC_CASEFOLD | UTF8PROC_IGNORE);
// Upper limit for the number of code points that one code point decomposes into. In Unicode 15 the largest number is
// 18.
constexpr size_t kMaxExpansion = 32;

// Appends the NFKC_Casefold decomposition of one code point, before marks are ordered and composed.
void Decompose(utf8proc_int32_t c, std::vector<utf8proc_int32_t>* out) {
  const size_t size = out->size();
  out->resize(size + kMaxExpansion);
  const utf8proc_ssize_t count = utf8proc_decompose_char(
      c, out->data() + size, static_cast<utf8proc_ssize_t>(kMaxExpansion), kNormalForm, nullptr);
  out->resize(
      size + static_cast<size_t>(std::clamp<utf8proc_ssize_t>(count, 0, static_cast<utf8proc_ssize_t>(kMaxExpansion))));
}

// Orders and composes the output of Decompose.
void Compose(std::vector<utf8proc_int32_t>* text) {
  OrderMarks(text);
  const utf8proc_ssize_t count =
      utf8proc_normalize_utf32(text->data(), static_cast<utf8proc_ssize_t>(text->size()), kNormalForm);
  text->resize(static_cast<size_t>(std::max<utf8proc_ssize_t>(count, 0)));
}

CharUnit MakeUnitOf(utf8proc_int32_t c) {
  if (c == kFractionSlash) c = '/';
  return MakeUnit(static_cast<uint32_t>(c), ClassifyByCategory(c));
}

// Returns whether c, which has combining class 0, may compose with the code point before it (vowel signs of Indic
// scripts, Hangul vowels and finals). These code points are the later parts of canonical decompositions.
bool ComposesBackward(utf8proc_int32_t c) {
  static const std::vector<utf8proc_int32_t>* const kParts = [] {
    auto* parts = new std::vector<utf8proc_int32_t>;
    for (utf8proc_int32_t composed = 0x80; composed < 0x110000; ++composed) {
      const utf8proc_property_t* property = utf8proc_get_property(composed);
      if (property->decomp_seqindex == UINT16_MAX || property->decomp_type != 0) continue;
      utf8proc_int32_t decomposed[kMaxExpansion];
      const auto count = utf8proc_decompose_char(composed, decomposed, static_cast<utf8proc_ssize_t>(kMaxExpansion),
                                                 static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE),
                                                 nullptr);
      for (utf8proc_ssize_t i = 1; i < count; ++i) parts->push_back(decomposed[i]);
    }
    std::sort(parts->begin(), parts->end());
    parts->erase(std::unique(parts->begin(), parts->end()), parts->end());
    return parts;
  }();
  const bool is_hangul_vowel_or_final = c >= 0x1160 && c <= 0x11FF;
  return is_hangul_vowel_or_final || std::binary_search(kParts->begin(), kParts->end(), c);
}

// The normal forms of 256 code points. A page is made when the first of its code points occurs in a text.
//
// A code point is independent if its decomposition begins with a code point that has combining class 0 and does not
// compose with one before it. Its normal form is the same in all texts whose other code points are independent, too.
class Page {
 public:
  // An entry is kDependent; or kSequence | position in sequences << 8 | length; or the single unit of the normal form.
  static constexpr uint32_t kDependent = 1u << 31;
  static constexpr uint32_t kSequence = 1u << 30;

  explicit Page(uint32_t index) {
    std::vector<utf8proc_int32_t> form;
    for (uint32_t i = 0; i < 256; ++i) {
      const auto c = static_cast<utf8proc_int32_t>(index << 8 | i);
      classes_[i] = c == kFractionSlash ? CharClass::kJoiner : ClassifyByCategory(c);
      form.clear();
      // Surrogates are never decoded.
      if (c >= 0xD800 && c <= 0xDFFF) continue;
      Decompose(c, &form);
      if (!form.empty() && (utf8proc_get_property(form[0])->combining_class != 0 || ComposesBackward(form[0]))) {
        entries_[i] = kDependent;
        continue;
      }
      Compose(&form);
      if (form.size() == 1) {
        entries_[i] = MakeUnitOf(form[0]);
      } else {
        entries_[i] = kSequence | static_cast<uint32_t>(sequences_.size()) << 8 | static_cast<uint32_t>(form.size());
        for (utf8proc_int32_t each : form) sequences_.push_back(MakeUnitOf(each));
      }
    }
  }

  uint32_t entry(uint32_t code_point) const { return entries_[code_point & 0xFF]; }
  CharClass char_class(uint32_t code_point) const { return classes_[code_point & 0xFF]; }
  const CharUnit* sequence(uint32_t entry) const { return sequences_.data() + (entry >> 8 & 0x3FFFFF); }

 private:
  uint32_t entries_[256] = {};
  CharClass classes_[256] = {};
  std::vector<CharUnit> sequences_;
};

// Returns the page of a code point. Pages live as long as the process.
const Page& PageOf(uint32_t code_point) {
  static std::atomic<const Page*> pages[0x110000 >> 8];
  std::atomic<const Page*>& slot = pages[code_point >> 8];
  const Page* page = slot.load(std::memory_order_acquire);
  if (page != nullptr) return *page;
  const Page* made = new Page(code_point >> 8);
  if (slot.compare_exchange_strong(page, made, std::memory_order_acq_rel)) return *made;
  delete made;  // another thread was first
  return *page;
}

// Decodes the sequence at `i`, whose first byte is not ASCII, and moves i behind it. Returns false if it is not valid.
bool DecodeNext(const unsigned char* bytes, size_t size, size_t* i, uint32_t* code_point) {
  const unsigned char* p = bytes + *i;
  const size_t left = size - *i;
  const auto continues = [p](size_t k) { return (p[k] & 0xC0) == 0x80; };
  if (p[0] >= 0xE0 && p[0] < 0xF0) {
    if (left < 3 || !continues(1) || !continues(2)) return false;
    *code_point = (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    *i += 3;
    if (*code_point >= 0x800 && (*code_point < 0xD800 || *code_point > 0xDFFF)) return true;
    *i -= 3;
    return false;
  }
  if (p[0] >= 0xC2 && p[0] < 0xE0) {
    if (left < 2 || !continues(1)) return false;
    *code_point = (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu);
    *i += 2;
    return true;
  }
  if (p[0] < 0xF0 || p[0] > 0xF4 || left < 4 || !continues(1) || !continues(2) || !continues(3)) return false;
  *code_point = (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
  if (*code_point < 0x10000 || *code_point > 0x10FFFF) return false;
  *i += 4;
  return true;
}

// Passes the tokens to a TokenSink as text.
class SinkEmitter {
 public:
  explicit SinkEmitter(TokenSink sink) : sink_(sink) {}
  void Token(std::string_view token) const { sink_(token); }
  void AsciiTrigram(const char* token, uint32_t) const { sink_(std::string_view(token, 4)); }
  void Character(uint32_t c) const {
    char token[4];
    sink_(std::string_view(token, EncodeUtf8(c, token)));
  }
  void CharacterPair(uint32_t first, uint32_t second) const {
    char token[8];
    const size_t length = EncodeUtf8(first, token);
    sink_(std::string_view(token, length + EncodeUtf8(second, token + length)));
  }

 private:
  const TokenSink sink_;
};

}  // namespace

CharClass Classify(uint32_t code_point) {
  return code_point < 128 ? ClassOf(kAscii.unit[code_point]) : PageOf(code_point).char_class(code_point);
}

bool NormaliseFast(std::string_view text, CharUnits* units, size_t* size) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  units->Reserve(text.size(), 0);
  CharUnit* out = units->data();
  size_t count = 0;
  // The number of units above one for each byte, for which Reserve made room.
  size_t extra = 0;
  for (size_t i = 0; i < text.size();) {
    if (bytes[i] < 128) {
      out[count++] = kAscii.unit[bytes[i++]];
      continue;
    }
    uint32_t c = 0;
    if (!DecodeNext(bytes, text.size(), &i, &c)) {
      out[count++] = MakeUnit(0, CharClass::kSeparator);
      ++i;
      continue;
    }
    // Most characters of Chinese text.
    if (c >= 0x4E00 && c <= 0x9FFF) {
      out[count++] = MakeUnit(c, CharClass::kUnspaced);
      continue;
    }
    const Page& page = PageOf(c);
    const uint32_t entry = page.entry(c);
    if (entry < Page::kSequence) {
      out[count++] = entry;
      continue;
    }
    if ((entry & Page::kDependent) != 0) return false;
    const size_t length = entry & 0xFF;
    extra += length;
    if (text.size() + extra > units->capacity()) {
      units->Reserve(2 * (text.size() + extra), count);
      out = units->data();
    }
    std::copy_n(page.sequence(entry), length, out + count);
    count += length;
  }
  *size = count;
  return true;
}

size_t NormaliseSlow(std::string_view text, CharUnits* units) {
  std::vector<utf8proc_int32_t> normal;
  normal.reserve(text.size() + kMaxExpansion);
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t c;
    const utf8proc_ssize_t length = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    if (length <= 0) {
      normal.push_back(0);
      ++i;
      continue;
    }
    i += static_cast<size_t>(length);
    Decompose(c, &normal);
  }
  Compose(&normal);
  units->Reserve(normal.size(), 0);
  std::transform(normal.begin(), normal.end(), units->data(), [](utf8proc_int32_t c) -> CharUnit {
    if (c == kFractionSlash) c = '/';
    return MakeUnit(static_cast<uint32_t>(c), Classify(static_cast<uint32_t>(c)));
  });
  return normal.size();
}

bool TokenizerConfig::operator==(const TokenizerConfig& other) const {
  return std::all_of(kSwitches.begin(), kSwitches.end(),
                     [&](const Switch& s) { return this->*s.value == other.*s.value; });
}

std::string TokenizerConfig::Serialize() const {
  std::string text = StrCat(kVersionKey, "=", kVersion, "\n");
  for (const Switch& s : kSwitches) text += StrCat(s.key, "=", this->*s.value ? 1 : 0, "\n");
  return text;
}

Status TokenizerConfig::Parse(std::string_view text, TokenizerConfig* config) {
  const auto error = [](const auto&... args) {
    return MakeStatus(StatusCode::kInvalidArgument, "tokenizer config: ", args...);
  };
  TokenizerConfig parsed;
  std::array<bool, kSwitches.size()> seen = {};
  bool is_first = true;
  while (!text.empty()) {
    const size_t line_end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, line_end);
    text.remove_prefix(std::min(line_end + 1, text.size()));
    const size_t equals = line.find('=');
    if (equals == std::string_view::npos) return error("line \"", line, "\", expected key=value");
    const std::string_view key = line.substr(0, equals);
    const std::string_view value = line.substr(equals + 1);
    if (is_first) {
      if (key != kVersionKey) return error("the first key is \"", key, "\", expected ", kVersionKey);
      if (value != kVersion) {
        return MakeStatus(StatusCode::kFailedPrecondition, "tokenizer config: ", kVersionKey, " is \"", value,
                          "\", this build has the rules of version ", kVersion);
      }
      is_first = false;
      continue;
    }
    size_t i = 0;
    while (i < kSwitches.size() && kSwitches[i].key != key) ++i;
    if (i == kSwitches.size()) {
      std::string known;
      for (const Switch& s : kSwitches) known += StrCat(known.empty() ? "" : ", ", s.key);
      return error("unknown key \"", key, "\", expected one of ", known);
    }
    if (seen[i]) return error("key ", key, " is given twice");
    if (value != "0" && value != "1") return error(key, " is \"", value, "\", expected 0 or 1");
    seen[i] = true;
    parsed.*kSwitches[i].value = value == "1";
  }
  if (is_first) return error("empty text, expected ", kVersionKey, "=", kVersion, " and the switches");
  for (size_t i = 0; i < kSwitches.size(); ++i) {
    if (!seen[i]) return error("key ", kSwitches[i].key, " is missing");
  }
  *config = parsed;
  return Status();
}

void Tokenizer::Tokenize(std::string_view text, TokenSink sink) const {
  SinkEmitter emitter(sink);
  TokenScanner<SinkEmitter>(config_, &emitter).Scan(text);
}

}  // namespace dpsr
