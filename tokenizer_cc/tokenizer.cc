#include "tokenizer_cc/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace dpsr {
namespace {

constexpr char kVersionKey[] = "tokenizer_version";
// Raise it with every change that gives any text other tokens: ids of a vocabulary would then mean something else.
constexpr char kVersion[] = "1";

struct Switch {
  std::string_view key;
  bool TokenizerConfig::*value;
};

constexpr std::array<Switch, 5> kSwitches = {{
    {"word_unigrams", &TokenizerConfig::word_unigrams},
    {"word_bigrams", &TokenizerConfig::word_bigrams},
    {"letter_trigrams", &TokenizerConfig::letter_trigrams},
    {"char_unigrams", &TokenizerConfig::char_unigrams},
    {"char_bigrams", &TokenizerConfig::char_bigrams},
}};

// kMark stands for the class of the code point before it.
enum class CharClass : uint8_t { kSeparator, kLetter, kDigit, kUnspaced, kMark };

struct Range {
  utf8proc_int32_t first;
  utf8proc_int32_t last;
  // Han: all code points are characters, those too that this Unicode version calls symbols or does not know yet. Of the
  // other scripts the letters, marks and numbers are, so that their punctuation separates.
  bool whole;
};

// Blocks of scripts written without spaces, ascending.
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

constexpr CharClass ClassifyAscii(unsigned char c) {
  if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return CharClass::kLetter;
  return c >= '0' && c <= '9' ? CharClass::kDigit : CharClass::kSeparator;
}

// Class and lower case of each ASCII byte.
struct AsciiTables {
  CharClass char_class[128];
  char lower[128];
};

constexpr AsciiTables MakeAsciiTables() {
  AsciiTables tables = {};
  for (int c = 0; c < 128; ++c) {
    tables.char_class[c] = ClassifyAscii(static_cast<unsigned char>(c));
    tables.lower[c] = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  }
  return tables;
}

constexpr AsciiTables kAscii = MakeAsciiTables();

CharClass Classify(utf8proc_int32_t c) {
  if (c < 128) return kAscii.char_class[c];
  if (c >= 0x4E00 && c <= 0x9FFF) return CharClass::kUnspaced;  // most of all Chinese text
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
  // A mark of an unspaced script still needs a character before it.
  if (char_class != CharClass::kMark && IsUnspaced(c, char_class != CharClass::kSeparator)) return CharClass::kUnspaced;
  return char_class;
}

bool IsAscii(std::string_view text) {
  constexpr uint64_t kHighBits = 0x8080808080808080;
  size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + i, 8);
    if ((word & kHighBits) != 0) return false;
  }
  for (; i < text.size(); ++i) {
    if ((text[i] & 0x80) != 0) return false;
  }
  return true;
}

// Length of the UTF-8 sequence that begins with `lead`, a lead byte of valid UTF-8.
size_t SequenceLength(char lead) {
  const unsigned char c = static_cast<unsigned char>(lead);
  return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}

// Brings the marks of each run of marks into canonical order. (utf8proc_decompose does it by exchanging neighbours: a
// text of nothing but marks would take quadratic time.)
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

// UTF-8 to code points in NFKC_Casefold form; each byte that is no part of valid UTF-8 becomes U+0000, a separator.
std::vector<utf8proc_int32_t> Normalise(std::string_view text) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT |
                                                           UTF8PROC_CASEFOLD | UTF8PROC_IGNORE);
  constexpr size_t kMaxExpansion = 32;  // of one code point; Unicode 15 has 18
  std::vector<utf8proc_int32_t> out;
  out.reserve(text.size() + kMaxExpansion);
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  bool may_compose = false;
  for (size_t i = 0; i < text.size();) {
    if (bytes[i] < 128) {
      out.push_back(static_cast<unsigned char>(kAscii.lower[bytes[i++]]));
      continue;
    }
    utf8proc_int32_t c;
    const utf8proc_ssize_t length = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    if (length <= 0) {
      out.push_back(0);
      ++i;
      continue;
    }
    i += static_cast<size_t>(length);
    if (c >= 0x4E00 && c <= 0x9FFF) {  // neither changes nor composes with anything
      out.push_back(c);
      continue;
    }
    may_compose = true;
    const size_t size = out.size();
    out.resize(size + kMaxExpansion);
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(c, out.data() + size, static_cast<utf8proc_ssize_t>(kMaxExpansion), kOptions, nullptr);
    out.resize(size + static_cast<size_t>(
                          std::clamp<utf8proc_ssize_t>(count, 0, static_cast<utf8proc_ssize_t>(kMaxExpansion))));
  }
  if (may_compose) {
    OrderMarks(&out);
    const utf8proc_ssize_t count =
        utf8proc_normalize_utf32(out.data(), static_cast<utf8proc_ssize_t>(out.size()), kOptions);
    out.resize(static_cast<size_t>(std::max<utf8proc_ssize_t>(count, 0)));
  }
  return out;
}

// Turns runs into tokens. Runs lie in one buffer in which neighbouring words have exactly one space between them, so
// that every unigram and bigram is a view of the buffer.
class RunEmitter {
 public:
  RunEmitter(const TokenizerConfig& config, TokenSink sink) : config_(config), sink_(sink) {}

  // The word buffer[begin, end). `ascii`: it has only one-byte characters.
  void Word(const char* buffer, size_t begin, size_t end, bool only_digits, bool ascii) {
    const std::string_view word(buffer + begin, end - begin);
    if (config_.word_unigrams) sink_(word);
    if (config_.word_bigrams && has_previous_word_) {
      sink_(std::string_view(buffer + previous_word_, end - previous_word_));
    }
    previous_word_ = begin;
    has_previous_word_ = true;
    if (!config_.letter_trigrams || only_digits) return;
    if (ascii) {
      AsciiTrigrams(word);
    } else {
      Trigrams(word);
    }
  }

  // A run of unspaced text.
  void Unspaced(std::string_view run) {
    has_previous_word_ = false;
    size_t previous = 0;
    for (size_t i = 0; i < run.size();) {
      const size_t length = SequenceLength(run[i]);
      if (config_.char_unigrams) sink_(run.substr(i, length));
      if (config_.char_bigrams && i > 0) sink_(run.substr(previous, i + length - previous));
      previous = i;
      i += length;
    }
  }

 private:
  void AsciiTrigrams(std::string_view word) {
    char token[4] = {'#', '#', word[0], '#'};
    for (size_t i = 1; i < word.size(); ++i) {
      token[3] = word[i];
      sink_(std::string_view(token, 4));
      token[1] = token[2];
      token[2] = token[3];
    }
    token[3] = '#';
    sink_(std::string_view(token, 4));
  }

  void Trigrams(std::string_view word) {
    char token[1 + 3 * 4];
    token[0] = '#';
    size_t position = 0;
    const auto next = [&]() -> std::string_view {
      if (position >= word.size()) return "#";
      const std::string_view character = word.substr(position, SequenceLength(word[position]));
      position += character.size();
      return character;
    };
    std::string_view first = "#";
    std::string_view second = next();
    bool more = true;
    while (more) {
      more = position < word.size();
      const std::string_view third = next();
      size_t size = 1;
      for (std::string_view character : {first, second, third}) {
        std::memcpy(token + size, character.data(), character.size());
        size += character.size();
      }
      sink_(std::string_view(token, size));
      first = second;
      second = third;
    }
  }

  const TokenizerConfig& config_;
  const TokenSink sink_;
  bool has_previous_word_ = false;
  size_t previous_word_ = 0;
};

void TokenizeAscii(std::string_view text, RunEmitter* emitter) {
  char small[512];
  std::unique_ptr<char[]> large;
  char* buffer = small;
  if (text.size() > sizeof(small)) {
    large.reset(new char[text.size()]);
    buffer = large.get();
  }
  size_t size = 0;
  for (size_t i = 0; i < text.size();) {
    CharClass char_class = kAscii.char_class[static_cast<unsigned char>(text[i])];
    if (char_class == CharClass::kSeparator) {
      ++i;
      continue;
    }
    if (size > 0) buffer[size++] = ' ';
    const size_t begin = size;
    bool only_digits = true;
    do {
      only_digits &= char_class == CharClass::kDigit;
      buffer[size++] = kAscii.lower[static_cast<unsigned char>(text[i])];
      if (++i == text.size()) break;
      char_class = kAscii.char_class[static_cast<unsigned char>(text[i])];
    } while (char_class != CharClass::kSeparator);
    emitter->Word(buffer, begin, size, only_digits, /*ascii=*/true);
  }
}

void TokenizeUnicode(std::string_view text, RunEmitter* emitter) {
  const std::vector<utf8proc_int32_t> normal = Normalise(text);
  std::string buffer;
  buffer.reserve(text.size() + 16);
  for (size_t i = 0; i < normal.size();) {
    CharClass char_class = Classify(normal[i]);
    if (char_class == CharClass::kSeparator || char_class == CharClass::kMark) {
      ++i;
      continue;
    }
    const bool unspaced = char_class == CharClass::kUnspaced;
    if (!buffer.empty()) buffer += ' ';
    const size_t begin = buffer.size();
    const size_t first = i;
    bool only_digits = true;
    do {
      only_digits &= char_class == CharClass::kDigit;
      utf8proc_uint8_t utf8[4];
      buffer.append(reinterpret_cast<const char*>(utf8),
                    static_cast<size_t>(utf8proc_encode_char(normal[i], utf8)));
      if (++i == normal.size()) break;
      char_class = Classify(normal[i]);
    } while (char_class != CharClass::kSeparator &&
             (char_class == CharClass::kMark || (char_class == CharClass::kUnspaced) == unspaced));
    if (unspaced) {
      emitter->Unspaced(std::string_view(buffer).substr(begin));
    } else {
      emitter->Word(buffer.data(), begin, buffer.size(), only_digits, /*ascii=*/buffer.size() - begin == i - first);
    }
  }
}

}  // namespace

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
  RunEmitter emitter(config_, sink);
  if (IsAscii(text)) {
    TokenizeAscii(text, &emitter);
  } else {
    TokenizeUnicode(text, &emitter);
  }
}

}  // namespace dpsr
