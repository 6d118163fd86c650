// Turns text into tokens (DPSR paper, section 5.1.1). Data preparation, training and serving all use this tokenizer.
//
// Text is UTF-8. It is normalised with Unicode's NFKC_Casefold (NFKC, case folding, ignorable code points removed), so
// that full-width and half-width forms, ligatures and upper case all become one form. Then:
//
// * Separators are all code points that are not letters, marks or numbers: white space (including U+3000), punctuation,
// symbols, emoji, control bytes (including NUL), unassigned and private code points; and each byte that is not part of
//   valid UTF-8.
// * A word is a run of letters, non-spacing and spacing marks, and numbers of any script except the ones below: "red",
//   "straße" as "strasse", "100ml", "3". It gives
//     word unigram      red
//     number parts      12mm 12 mm   if a word has letters and digits: after its unigram, the unigrams of its longest
//                                    parts of one kind, so that "12mm" and "12 mm" share them
//     word bigram       red shoes    neighbouring words joined by one space; words with unspaced text between them
//                                    are not neighbours
//     letter trigrams   ##re #red #ed#    the trigrams of the code points of "#red#", each with a leading '#'. '#' is
//                                    a separator, so a trigram never equals a word. Words of digits have no trigrams.
//   A '.', ',' or '/' directly between two digits (category Nd) is part of the word, and counts as a digit above:
// "3.5mm" (parts 3.5 and mm), "5/8", "1,5". A ',' before exactly three digits is a thousands separator and is dropped:
//   "1,000" is 1000, "12,500.5" is 12500.5. ½ is "1/2".
// * Unspaced text is a run of code points of a script that is written without spaces: Han (every block), Hiragana,
//   Katakana, Bopomofo, Thai, Lao, Khmer, Myanmar. (Hangul is written with spaces, so it gives words.) It gives
//     character unigrams  手 机     a character is a code point
//     character bigrams   手机
//   A run ends where the kind changes: "iPhone手机" is the word iphone and the run 手机. A mark belongs to the run
//   before it; if there is no run, it is a separator.
// * The markers <s> and </s> are the first and the last token of every text, including an empty one. They also form
//   bigrams: "<s> red", "shoes </s>", <s>手, 机</s>. '<' is a separator, so no word equals a marker.
//
// Tokens come in the order of the text: a word, its parts, its bigram with the word before it, its trigrams; a
// character, its bigram with the character before it. Every token is valid UTF-8. Any bytes are valid input.
#ifndef DPSR_TOKENIZER_CC_TOKENIZER_H_
#define DPSR_TOKENIZER_CC_TOKENIZER_H_

#include <string>
#include <string_view>
#include <type_traits>

#include "common/status.h"

namespace dpsr {

// Says which kinds of tokens a Tokenizer emits.
struct TokenizerConfig {
  bool word_unigrams = true;
  bool word_bigrams = false;
  bool letter_trigrams = true;
  bool char_unigrams = true;
  bool char_bigrams = true;
  bool number_parts = true;  // only if word_unigrams is on, too, because the parts are unigrams
  bool markers = false;

  bool operator==(const TokenizerConfig& other) const;
  bool operator!=(const TokenizerConfig& other) const { return !(*this == other); }

  // Returns the configuration as lines `key=value`. Equal configurations give equal text. The first line is the version
  // of the rules above:
  //
  //   tokenizer_version=1
  //   word_unigrams=1
  //   ...
  std::string Serialize() const;

  // Reads the text that Serialize returned: every key once, in any order after the version.
  // Errors: InvalidArgument (malformed line, unknown, repeated or missing key, value not 0 or 1); FailedPrecondition
  // (another tokenizer version, whose tokens differ from the tokens of this build).
  static Status Parse(std::string_view text, TokenizerConfig* config);
};

// A reference to a callable with signature void(std::string_view). The callable must outlive it.
class TokenSink {
 public:
  template <typename Callable, typename = std::enable_if_t<!std::is_same_v<std::decay_t<Callable>, TokenSink>>>
  TokenSink(Callable&& callable)  // NOLINT: implicit, so that callers can pass a lambda
      : object_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* object, std::string_view token) {
          (*static_cast<std::remove_reference_t<Callable>*>(object))(token);
        }) {}
  void operator()(std::string_view token) const { call_(object_, token); }

 private:
  void* object_;
  void (*call_)(void*, std::string_view);
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  explicit Tokenizer(const TokenizerConfig& config = {}) : config_(config) {}
  const TokenizerConfig& config() const { return config_; }

  // Calls sink(token) for each token of `text`. The token is valid only during the call. Needs some bytes of memory for
  // each byte of the text, and time linear in its length.
  void Tokenize(std::string_view text, TokenSink sink) const;

 private:
  TokenizerConfig config_;
};

}  // namespace dpsr

#endif  // DPSR_TOKENIZER_CC_TOKENIZER_H_
