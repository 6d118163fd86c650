// Queries that nobody has typed yet: pieces of a title for items without clicks, and texts with typing errors. What a
// misspelt word looks like to the towers is learned from these. The text goes through the tokenizer afterwards, as a
// query at serving does.
#ifndef DPSR_DPSR_TF_OPS_QUERY_NOISE_H_
#define DPSR_DPSR_TF_OPS_QUERY_NOISE_H_

#include <functional>
#include <string>
#include <string_view>

#include "dpsr_tf/ops/permutation.h"

namespace dpsr {

// Any bytes are valid input; the output is normalised text (tokenizer_cc/tokenizer.h) in UTF-8: words, and characters
// of scripts written without spaces. Neighbouring such characters stay together; between all else is one space.
//
// A word of four or more letters and nothing else has a typing error with probability `typo_rate`: a letter is missing
// (0.3 of the errors), changed (0.25: a vowel for another, a neighbour on the keyboard), one too many (0.3: doubled, or
// a neighbour on the keyboard), in exchange with the next one (0.15). A tenth of these words fall apart in addition. Two
// words of a text are written as one with probability 0.4 * typo_rate. Those shares are about what spelling corrections
// of shop queries show.

// How likely a word or character is to stay in a title, 0 to 1.
using KeepRate = std::function<double(std::string_view word)>;

// Some consecutive words or characters of what stays of `title`, 1 to kLongestPiece of them, one in eight left out. Where
// none would be left all are; empty where the title has none. `keep_rate` may be null: all stay.
std::string PieceOf(std::string_view title, const KeepRate& keep_rate, double typo_rate, RandomStream* random);
// The whole of `text`.
std::string Misspelt(std::string_view text, double typo_rate, RandomStream* random);

constexpr size_t kLongestPiece = 6;

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_QUERY_NOISE_H_
