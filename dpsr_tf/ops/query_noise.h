// Makes queries that are not in the log: pieces of titles, for items without clicks, and texts with typing errors, from
// which the towers learn misspelt words. The tokenizer reads the result as it reads a query at serving time.
#ifndef DPSR_DPSR_TF_OPS_QUERY_NOISE_H_
#define DPSR_DPSR_TF_OPS_QUERY_NOISE_H_

#include <functional>
#include <string>
#include <string_view>

#include "dpsr_tf/ops/permutation.h"

namespace dpsr {

// Any bytes are valid input. The output is normalised text (tokenizer_cc/tokenizer.h) in UTF-8: words, and characters
// of scripts that are written without spaces. Such characters stay together if they were neighbours; everything else is
// separated by one space.
//
// A word of four or more letters, and nothing but letters, gets a typing error with probability `typo_rate`. A letter
// is missing (0.3 of the errors), replaced (0.25: a vowel by another vowel, a letter by its neighbour on the keyboard),
// added (0.3: doubled, or a neighbour on the keyboard), or swapped with the next one (0.15). A tenth of these words are
// also split in two. Two words of a text are joined with probability 0.4 * typo_rate. These shares are about what
// spelling corrections of shop queries show.

// Returns the probability that a word or character stays in a title, 0 to 1.
using KeepRate = std::function<double(std::string_view word)>;

// Returns a piece of `title` with typing errors: after dropping words by `keep_rate` (null keeps all), 1 to
// kLongestPiece consecutive words or characters, of which one in eight is left out. A step that would leave nothing
// keeps everything. Empty for a title without words.
std::string PieceOf(std::string_view title, const KeepRate& keep_rate, double typo_rate, RandomStream* random);
// Returns all of `text` with typing errors.
std::string Misspelt(std::string_view text, double typo_rate, RandomStream* random);
// Returns `text` with typing errors, and without each of its words with probability `drop_rate`; never without all.
std::string Shortened(std::string_view text, double drop_rate, double typo_rate, RandomStream* random);

constexpr size_t kLongestPiece = 6;

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_QUERY_NOISE_H_
