// The words of a text in their order, for models that read and write sequences of words (docs/rewriting.md). The rules
// are those of the tokenizer; a character of a script without spaces counts as a word.
//
// A model knows a word by its id in a vocabulary, and by its pieces: the trigrams of the code points of "^word$", hashed.
// So an unknown word, such as a misspelt one, still has pieces that it shares with known words.
#ifndef DPSR_TOKENIZER_CC_WORD_SEQUENCES_H_
#define DPSR_TOKENIZER_CC_WORD_SEQUENCES_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.h"
#include "tokenizer_cc/tokenizer.h"
#include "tokenizer_cc/vocabulary.h"

namespace dpsr {

// The tokens of a vocabulary of words: words and characters, nothing else.
constexpr TokenizerConfig WordTokens() { return {true, false, false, true, false, false, false}; }

// A view of a vocabulary, which must outlive it. Cheap to copy and thread-safe.
class WordSequences {
 public:
  // Ids that are no words. Word i of the vocabulary has the id kFirstWord + i.
  enum Reserved : int32_t { kPadding = 0, kUnknown = 1, kStart = 2, kEnd = 3, kFirstWord = 4 };

  // Returns FailedPrecondition unless the tokens of `vocabulary` are those of WordTokens() and it has no hash buckets.
  static Status Check(const Vocabulary& vocabulary);

  // `vocabulary` passes Check.
  explicit WordSequences(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Returns the number of ids, with the reserved ones.
  int32_t num_ids() const { return kFirstWord + vocabulary_.size(); }
  // Returns the word of an id; empty for a reserved id and for one out of range.
  std::string_view Word(int32_t id) const { return vocabulary_.Token(id - kFirstWord); }
  // Returns the id of a normalised word; kUnknown if the vocabulary does not have it.
  int32_t Id(std::string_view word) const;

  // Writes the ids of the first `max_words` words of `text`, and kPadding after the last. With `ends`, kEnd follows the
  // last word, so that at most max_words - 1 words are written.
  void Encode(std::string_view text, int64_t max_words, bool ends, int32_t* ids) const;
  // Writes the pieces of the first `max_words` words of `text`, [max_words, max_pieces], row by row: numbers from 1 to
  // num_pieces - 1, and 0 after the last. Only the first `max_pieces` pieces of a word are written.
  void EncodePieces(std::string_view text, int64_t max_words, int64_t max_pieces, int32_t num_pieces,
                    int32_t* pieces) const;
  // Both at once.
  void EncodeBoth(std::string_view text, int64_t max_words, int64_t max_pieces, int32_t num_pieces, int32_t* ids,
                  int32_t* pieces) const;

 private:
  const Vocabulary& vocabulary_;
};

// Writes the pieces of one normalised word, as EncodePieces does.
void PiecesOfWord(std::string_view word, int64_t max_pieces, int32_t num_pieces, int32_t* pieces);

// Returns whether a normalised word is a character of a script that is written without spaces.
bool IsCharacter(std::string_view word);

// Appends a normalised word to a text: after a space, unless the text is empty or the word is a character of a script
// without spaces. So the words of a text, appended in their order, give a text with the same words.
void AppendWord(std::string_view word, std::string* text);

// Returns the words of a text, joined by AppendWord. Texts with equal words have equal normal texts.
std::string NormalText(std::string_view text);

}  // namespace dpsr

#endif  // DPSR_TOKENIZER_CC_WORD_SEQUENCES_H_
