#include "tokenizer_cc/word_sequences.h"

#include <algorithm>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "tokenizer_cc/token_scanner.h"

namespace dpsr {
namespace {

constexpr TokenizerConfig kWordTokens = WordTokens();

// Calls word(text) for each word of a text, for TokenScanner.
template <typename Use>
class WordEmitter {
 public:
  explicit WordEmitter(const Use& use) : use_(use) {}
  void Token(std::string_view word) { use_(word); }
  void Character(uint32_t code_point) {
    char utf8[4];
    use_(std::string_view(utf8, EncodeUtf8(code_point, utf8)));
  }
  // WordTokens() makes no other tokens.
  void AsciiTrigram(const char*, uint32_t) {}
  void CharacterPair(uint32_t, uint32_t) {}

 private:
  const Use& use_;
};

template <typename Use>
void ForEachWord(std::string_view text, const Use& use) {
  WordEmitter<Use> emitter(use);
  TokenScanner<WordEmitter<Use>>(kWordTokens, &emitter).Scan(text);
}

// A model depends on this number. A code point has 21 bits.
int32_t Piece(uint32_t first, uint32_t second, uint32_t third, int32_t num_pieces) {
  const uint64_t trigram = uint64_t{first} << 42 | uint64_t{second} << 21 | third;
  return 1 + static_cast<int32_t>(XXH3_64bits(&trigram, sizeof(trigram)) % static_cast<uint32_t>(num_pieces - 1));
}

constexpr uint32_t kLastCodePoint = 0x10FFFF;

// Returns the length of the code point at byte i of a word. A damaged vocabulary may have words that are not UTF-8.
size_t LengthAt(std::string_view word, size_t i) { return std::min(SequenceLength(word[i]), word.size() - i); }

}  // namespace

Status WordSequences::Check(const Vocabulary& vocabulary) {
  if (vocabulary.config() != kWordTokens) {
    return MakeStatus(StatusCode::kFailedPrecondition, vocabulary.path(),
                      ": is a vocabulary of other tokens than words and characters; use the store's vocabulary of words");
  }
  if (vocabulary.num_oov_buckets() != 0) {
    return MakeStatus(StatusCode::kFailedPrecondition, vocabulary.path(), ": has ", vocabulary.num_oov_buckets(),
                      " hash buckets, expected none; use the store's vocabulary of words");
  }
  return Status();
}

int32_t WordSequences::Id(std::string_view word) const {
  const int32_t id = vocabulary_.Lookup(word);
  return id < 0 ? int32_t{kUnknown} : kFirstWord + id;
}

void WordSequences::Encode(std::string_view text, int64_t max_words, bool ends, int32_t* ids) const {
  const int64_t limit = ends ? max_words - 1 : max_words;
  int64_t count = 0;
  ForEachWord(text, [&](std::string_view word) {
    if (count < limit) ids[count++] = Id(word);
  });
  if (ends && limit >= 0) ids[count++] = kEnd;
  std::fill(ids + count, ids + max_words, int32_t{kPadding});
}

void WordSequences::EncodePieces(std::string_view text, int64_t max_words, int64_t max_pieces, int32_t num_pieces,
                                 int32_t* pieces) const {
  int64_t count = 0;
  ForEachWord(text, [&](std::string_view word) {
    if (count < max_words) PiecesOfWord(word, max_pieces, num_pieces, pieces + max_pieces * count++);
  });
  std::fill(pieces + max_pieces * count, pieces + max_pieces * max_words, 0);
}

void WordSequences::EncodeBoth(std::string_view text, int64_t max_words, int64_t max_pieces, int32_t num_pieces,
                               int32_t* ids, int32_t* pieces) const {
  int64_t count = 0;
  ForEachWord(text, [&](std::string_view word) {
    if (count == max_words) return;
    PiecesOfWord(word, max_pieces, num_pieces, pieces + max_pieces * count);
    ids[count++] = Id(word);
  });
  std::fill(ids + count, ids + max_words, int32_t{kPadding});
  std::fill(pieces + max_pieces * count, pieces + max_pieces * max_words, 0);
}

void PiecesOfWord(std::string_view word, int64_t max_pieces, int32_t num_pieces, int32_t* pieces) {
  int64_t count = 0;
  uint32_t first = '^', second = 0;
  for (size_t i = 0; i <= word.size() && count < max_pieces;) {
    const size_t length = i < word.size() ? LengthAt(word, i) : 1;
    const uint32_t third = i < word.size() ? DecodeUtf8(word.data() + i, length) : '$';
    if (second != 0) {
      pieces[count++] = Piece(first, second, third, num_pieces);
      first = second;
    }
    second = third;
    i += length;
  }
  std::fill(pieces + count, pieces + max_pieces, 0);
}

bool IsCharacter(std::string_view word) {
  if (word.empty()) return false;
  const uint32_t first = DecodeUtf8(word.data(), LengthAt(word, 0));
  if (first > kLastCodePoint) return false;
  const CharClass char_class = Classify(first);
  // A mark within such a text is a token of its own. No word begins with a mark.
  return char_class == CharClass::kUnspaced || char_class == CharClass::kMark;
}

void AppendWord(std::string_view word, std::string* text) {
  if (!text->empty() && !IsCharacter(word)) *text += ' ';
  text->append(word);
}

std::string NormalText(std::string_view text) {
  std::string normal;
  ForEachWord(text, [&](std::string_view word) { AppendWord(word, &normal); });
  return normal;
}

}  // namespace dpsr
