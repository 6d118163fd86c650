// The loop that splits normalised text into tokens, for Tokenizer and Vocabulary::Encode. Internal to tokenizer_cc. The
// rules are in tokenizer.h. The receiver of the tokens is a template parameter, because a vocabulary finds the ids of
// most tokens by their code points, and does not need their text.
#ifndef DPSR_TOKENIZER_CC_TOKEN_SCANNER_H_
#define DPSR_TOKENIZER_CC_TOKEN_SCANNER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "tokenizer_cc/tokenizer.h"

namespace dpsr {

// kMark has the class of the code point before it. kJoiner (. , /) is part of a number between two digits, and a
// separator elsewhere.
enum class CharClass : uint8_t { kSeparator, kLetter, kDigit, kUnspaced, kMark, kJoiner };

// A code point of normalised text and its class.
using CharUnit = uint32_t;
constexpr CharUnit MakeUnit(uint32_t code_point, CharClass char_class) {
  return code_point | static_cast<uint32_t>(char_class) << 24;
}
constexpr uint32_t CodePointOf(CharUnit unit) { return unit & 0x1FFFFF; }
constexpr CharClass ClassOf(CharUnit unit) { return static_cast<CharClass>(unit >> 24); }

// An array that is on the stack as long as it is short. Only Reserve() makes it larger. Does not initialise its
// elements.
template <typename T, size_t kInline>
class Scratch {
 public:
  // Makes room for `capacity` elements, and keeps the first `keep` elements.
  void Reserve(size_t capacity, size_t keep) {
    if (capacity <= capacity_) return;
    std::unique_ptr<T[]> grown(new T[capacity]);
    std::memcpy(grown.get(), data_, keep * sizeof(T));
    heap_ = std::move(grown);
    data_ = heap_.get();
    capacity_ = capacity;
  }
  T* data() { return data_; }
  size_t capacity() const { return capacity_; }

 private:
  T inline_[kInline];
  T* data_ = inline_;
  size_t capacity_ = kInline;
  std::unique_ptr<T[]> heap_;
};

// The class and the lower case of each ASCII byte, and its digit in the index of a trigram.
struct AsciiTables {
  CharUnit unit[128];
  uint8_t symbol[128];
};

// The number of characters of ASCII words, including '#'. The index of a trigram has three digits to this base.
constexpr uint32_t kAsciiSymbols = 40;
constexpr uint32_t kAsciiTrigrams = kAsciiSymbols * kAsciiSymbols * kAsciiSymbols;

constexpr AsciiTables MakeAsciiTables() {
  AsciiTables tables = {};
  for (uint32_t c = 0; c < 128; ++c) {
    const uint32_t lower = c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c;
    CharClass char_class = CharClass::kSeparator;
    if (lower >= 'a' && lower <= 'z') {
      char_class = CharClass::kLetter;
      tables.symbol[c] = static_cast<uint8_t>(1 + lower - 'a');
    } else if (c >= '0' && c <= '9') {
      char_class = CharClass::kDigit;
      tables.symbol[c] = static_cast<uint8_t>(27 + c - '0');
    } else if (c == '.' || c == ',' || c == '/') {
      char_class = CharClass::kJoiner;
      tables.symbol[c] = c == '.' ? 37 : c == ',' ? 38 : 39;
    }
    tables.unit[c] = MakeUnit(lower, char_class);
  }
  return tables;
}

inline constexpr AsciiTables kAscii = MakeAsciiTables();

// The normalised text of one call, on the stack if it is short.
using CharUnits = Scratch<CharUnit, 512>;

// Normalise `text` and return the number of units. The fast function looks up each code point, and returns false if
// code points depend on each other (marks that compose or change places). The slow function handles any text.
bool NormaliseFast(std::string_view text, CharUnits* units, size_t* size);
size_t NormaliseSlow(std::string_view text, CharUnits* units);

// Returns the class of a code point of normalised text.
CharClass Classify(uint32_t code_point);

inline bool IsAscii(std::string_view text) {
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

// Writes a valid code point as UTF-8, and returns its length, 1 to 4.
inline size_t EncodeUtf8(uint32_t c, char* out) {
  if (c < 0x80) {
    out[0] = static_cast<char>(c);
    return 1;
  }
  if (c < 0x800) {
    out[0] = static_cast<char>(0xC0 | c >> 6);
    out[1] = static_cast<char>(0x80 | (c & 0x3F));
    return 2;
  }
  if (c < 0x10000) {
    out[0] = static_cast<char>(0xE0 | c >> 12);
    out[1] = static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out[2] = static_cast<char>(0x80 | (c & 0x3F));
    return 3;
  }
  out[0] = static_cast<char>(0xF0 | c >> 18);
  out[1] = static_cast<char>(0x80 | (c >> 12 & 0x3F));
  out[2] = static_cast<char>(0x80 | (c >> 6 & 0x3F));
  out[3] = static_cast<char>(0x80 | (c & 0x3F));
  return 4;
}

// Returns the length of the sequence that begins with `lead`, a lead byte of valid UTF-8.
inline size_t SequenceLength(char lead) {
  const unsigned char c = static_cast<unsigned char>(lead);
  return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}

// Returns the code point of a valid sequence of this length.
inline uint32_t DecodeUtf8(const char* text, size_t length) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text);
  if (length == 1) return bytes[0];
  uint32_t c = bytes[0] & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) c = c << 6 | (bytes[i] & 0x3Fu);
  return c;
}

// A text that has only ASCII bytes.
class AsciiText {
 public:
  explicit AsciiText(std::string_view text) : text_(text) {}
  size_t size() const { return text_.size(); }
  CharUnit operator[](size_t i) const { return kAscii.unit[static_cast<unsigned char>(text_[i])]; }
  static size_t Append(CharUnit unit, char* out) {
    *out = static_cast<char>(unit);
    return 1;
  }

 private:
  std::string_view text_;
};

// A normalised text.
class UnicodeText {
 public:
  UnicodeText(const CharUnit* units, size_t size) : units_(units), size_(size) {}
  size_t size() const { return size_; }
  CharUnit operator[](size_t i) const { return units_[i]; }
  static size_t Append(CharUnit unit, char* out) { return EncodeUtf8(CodePointOf(unit), out); }

 private:
  const CharUnit* units_;
  size_t size_;
};

// Passes the tokens, in their order, to these functions of Emitter:
//
//   void Token(std::string_view token)
//   void AsciiTrigram(const char* token, uint32_t index)   a token of four bytes, with its index < kAsciiTrigrams
//   void Character(uint32_t code_point)                    a character unigram
//   void CharacterPair(uint32_t first, uint32_t second)    a character bigram
template <typename Emitter>
class TokenScanner {
 public:
  TokenScanner(const TokenizerConfig& config, Emitter* emitter) : config_(config), emitter_(*emitter) {}

  void Scan(std::string_view text) {
    if (IsAscii(text)) return ScanText(AsciiText(text), 1);
    CharUnits units;
    size_t size = 0;
    if (!NormaliseFast(text, &units, &size)) size = NormaliseSlow(text, &units);
    ScanText(UnicodeText(units.data(), size), 4);
  }

 private:
  static constexpr std::string_view kBegin = "<s>";
  static constexpr std::string_view kEnd = "</s>";

  static bool IsWordClass(CharClass c) {
    return c == CharClass::kLetter || c == CharClass::kDigit || c == CharClass::kMark;
  }
  static constexpr unsigned Bit(CharClass c) { return 1u << static_cast<unsigned>(c); }

  // Words are stored in one buffer with a space between them, so that unigrams and bigrams are views of the buffer.
  template <typename Text>
  void ScanText(const Text& text, size_t bytes_per_unit) {
    Scratch<char, 2560> buffer;
    buffer.Reserve((bytes_per_unit + 1) * text.size() + kBegin.size() + kEnd.size() + 1, 0);
    buffer_ = buffer.data();
    size_ = 0;
    word_ = kNoWord;
    character_ = kNoCharacter;
    bool at_begin = false;
    if (config_.markers) {
      std::memcpy(buffer_, kBegin.data(), kBegin.size());
      size_ = kBegin.size();
      word_ = 0;
      at_begin = true;
      emitter_.Token(kBegin);
    }
    for (size_t i = 0; i < text.size();) {
      const CharClass char_class = ClassOf(text[i]);
      if (char_class == CharClass::kLetter || char_class == CharClass::kDigit) {
        i = ScanWord(text, i);
        at_begin = false;
      } else if (char_class == CharClass::kUnspaced) {
        i = ScanUnspaced(text, i, at_begin);
        at_begin = false;
      } else {
        ++i;
      }
    }
    if (config_.markers) EmitEnd(at_begin);
  }

  // Emits the tokens of the word that begins at i, and returns where it ends.
  template <typename Text>
  size_t ScanWord(const Text& text, size_t i) {
    if (size_ > 0) buffer_[size_++] = ' ';
    const size_t begin = size_;
    const size_t text_size = text.size();
    size_t length = 0;
    unsigned classes = 0;
    char* out = buffer_ + size_;
    for (;;) {
      const CharUnit unit = text[i];
      const CharClass char_class = ClassOf(unit);
      if (!IsWordClass(char_class)) {
        if (char_class != CharClass::kJoiner || !IsInNumber(text, i)) break;
        if (IsThousandsSeparator(text, i)) {
          ++i;
          continue;
        }
      }
      classes |= Bit(char_class);
      out += Text::Append(unit, out);
      ++length;
      if (++i == text_size) break;
    }
    size_ = static_cast<size_t>(out - buffer_);
    EmitWord(begin, classes, /*ascii=*/size_ - begin == length);
    return i;
  }

  template <typename Text>
  static bool IsDigit(const Text& text, size_t i) {
    return i < text.size() && ClassOf(text[i]) == CharClass::kDigit;
  }
  // Returns whether the joiner at i, which is not the first unit of the text, is between two digits.
  template <typename Text>
  static bool IsInNumber(const Text& text, size_t i) {
    return IsDigit(text, i - 1) && IsDigit(text, i + 1);
  }
  template <typename Text>
  static bool IsThousandsSeparator(const Text& text, size_t i) {
    return CodePointOf(text[i]) == ',' && IsDigit(text, i + 2) && IsDigit(text, i + 3) && !IsDigit(text, i + 4);
  }

  void EmitWord(size_t begin, unsigned classes, bool ascii) {
    const std::string_view word(buffer_ + begin, size_ - begin);
    constexpr unsigned kMixed = Bit(CharClass::kLetter) | Bit(CharClass::kDigit);
    if (config_.word_unigrams) {
      emitter_.Token(word);
      if (config_.number_parts && (classes & kMixed) == kMixed) EmitParts(word);
    }
    if (config_.word_bigrams && word_ != kNoWord) {
      emitter_.Token(std::string_view(buffer_ + word_, size_ - word_));
    }
    word_ = begin;
    character_ = kNoCharacter;
    if (!config_.letter_trigrams || (classes & ~(Bit(CharClass::kDigit) | Bit(CharClass::kJoiner))) == 0) return;
    if (ascii) {
      EmitAsciiTrigrams(word);
    } else {
      EmitTrigrams(word);
    }
  }

  // Emits the longest parts of letters and of digits. A mark belongs to the part before it.
  void EmitParts(std::string_view word) {
    size_t begin = 0;
    bool in_number = false;
    for (size_t i = 0; i < word.size();) {
      const size_t length = SequenceLength(word[i]);
      const CharClass char_class = Classify(DecodeUtf8(word.data() + i, length));
      const bool number = char_class == CharClass::kMark
                              ? in_number
                              : char_class == CharClass::kDigit || char_class == CharClass::kJoiner;
      if (number != in_number && i > 0) {
        emitter_.Token(word.substr(begin, i - begin));
        begin = i;
      }
      in_number = number;
      i += length;
    }
    emitter_.Token(word.substr(begin));
  }

  void EmitAsciiTrigrams(std::string_view word) {
    const auto symbol = [](char c) -> uint32_t { return kAscii.symbol[static_cast<unsigned char>(c)]; };
    char token[4] = {'#', '#', word[0], '#'};
    // The index of the middle two characters of a trigram.
    uint32_t pair = symbol(word[0]);
    for (size_t i = 1; i <= word.size(); ++i) {
      const char next = i < word.size() ? word[i] : '#';
      const uint32_t digit = symbol(next);
      const uint32_t index = pair * kAsciiSymbols + digit;
      token[3] = next;
      emitter_.AsciiTrigram(token, index);
      token[1] = token[2];
      token[2] = next;
      pair = index % (kAsciiSymbols * kAsciiSymbols);
    }
  }

  void EmitTrigrams(std::string_view word) {
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
      emitter_.Token(std::string_view(token, size));
      first = second;
      second = third;
    }
  }

  // Emits the tokens of the unspaced text that begins at i, and returns where it ends.
  template <typename Text>
  size_t ScanUnspaced(const Text& text, size_t i, bool at_begin) {
    uint32_t previous = CodePointOf(text[i]);
    if (config_.char_unigrams) emitter_.Character(previous);
    if (at_begin && config_.char_bigrams) EmitCharacterBeside(kBegin, previous, {});
    while (++i < text.size()) {
      const CharUnit unit = text[i];
      if (ClassOf(unit) != CharClass::kUnspaced && ClassOf(unit) != CharClass::kMark) break;
      const uint32_t character = CodePointOf(unit);
      if (config_.char_unigrams) emitter_.Character(character);
      if (config_.char_bigrams) emitter_.CharacterPair(previous, character);
      previous = character;
    }
    word_ = kNoWord;
    character_ = previous;
    return i;
  }

  void EmitCharacterBeside(std::string_view before, uint32_t character, std::string_view after) {
    char utf8[4];
    std::string token(before);
    token.append(utf8, EncodeUtf8(character, utf8));
    emitter_.Token(token.append(after));
  }

  void EmitEnd(bool no_runs) {
    if (character_ != kNoCharacter && config_.char_bigrams) EmitCharacterBeside({}, character_, kEnd);
    if (word_ != kNoWord && !no_runs && config_.word_bigrams) {
      buffer_[size_++] = ' ';
      std::memcpy(buffer_ + size_, kEnd.data(), kEnd.size());
      size_ += kEnd.size();
      emitter_.Token(std::string_view(buffer_ + word_, size_ - word_));
    }
    emitter_.Token(kEnd);
  }

  static constexpr size_t kNoWord = SIZE_MAX;
  static constexpr uint32_t kNoCharacter = UINT32_MAX;

  const TokenizerConfig& config_;
  Emitter& emitter_;
  char* buffer_ = nullptr;
  size_t size_ = 0;
  // The last run: a word with its position in the buffer, or unspaced text with its last character.
  size_t word_ = kNoWord;
  uint32_t character_ = kNoCharacter;
};

}  // namespace dpsr

#endif  // DPSR_TOKENIZER_CC_TOKEN_SCANNER_H_
