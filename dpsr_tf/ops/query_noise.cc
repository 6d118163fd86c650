#include "dpsr_tf/ops/query_noise.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tokenizer_cc/token_scanner.h"

namespace dpsr {
namespace {

// One in this many words of a piece of a title is left out.
constexpr uint64_t kDropOneIn = 8;
// Length of the shortest words that get typing errors.
constexpr size_t kShortestTypo = 4;
constexpr double kJoinRate = 0.4;
// One in this many misspelt words is split in two.
constexpr uint64_t kSplitOneIn = 10;

constexpr std::string_view kVowels = "aeiou";
// The letters beside a, b, ..., z in its row of the keyboard.
constexpr std::string_view kNeighbours[26] = {"s",  "vn", "xv", "sf", "wr", "dg", "fh", "gj", "uo",
                                              "hk", "jl", "k",  "n",  "bm", "ip", "o",  "w",  "et",
                                              "ad", "ry", "yi", "cb", "qe", "zc", "tu", "x"};

using Letters = std::vector<uint32_t>;  // code points

// A word, or a character of a script without spaces.
struct Piece {
  Letters letters;
  bool is_word;     // has letters or digits
  bool is_letters;  // and nothing but letters
  bool adjoins;     // a character that follows another one without anything between them
};

bool IsDigitAt(const CharUnit* units, size_t size, size_t i) {
  return i < size && ClassOf(units[i]) == CharClass::kDigit;
}

// The rules are those of TokenScanner.
std::vector<Piece> PiecesOf(std::string_view text) {
  CharUnits normal;
  size_t size = 0;
  if (!NormaliseFast(text, &normal, &size)) size = NormaliseSlow(text, &normal);
  const CharUnit* units = normal.data();
  std::vector<Piece> pieces;
  bool after_character = false;
  for (size_t i = 0; i < size;) {
    const CharClass first = ClassOf(units[i]);
    const bool is_word = first == CharClass::kLetter || first == CharClass::kDigit;
    if (!is_word && first != CharClass::kUnspaced) {
      after_character = false;
      ++i;
      continue;
    }
    Piece piece{{CodePointOf(units[i])}, is_word, first == CharClass::kLetter, after_character && !is_word};
    for (++i; i < size; ++i) {
      const CharClass c = ClassOf(units[i]);
      bool goes_on = c == CharClass::kMark;
      if (is_word) {
        goes_on = goes_on || c == CharClass::kLetter || c == CharClass::kDigit ||
                  (c == CharClass::kJoiner && IsDigitAt(units, size, i - 1) && IsDigitAt(units, size, i + 1));
      }
      if (!goes_on) break;
      piece.letters.push_back(CodePointOf(units[i]));
      piece.is_letters = piece.is_letters && c == CharClass::kLetter;
    }
    after_character = !is_word;
    pieces.push_back(std::move(piece));
  }
  return pieces;
}

// Another letter for the one at `i`.
uint32_t WrongLetter(const Letters& word, size_t i, RandomStream* random) {
  const uint32_t letter = word[i];
  if (letter < 'a' || letter > 'z') return word[random->Uniform(word.size())];
  const std::string_view near = kNeighbours[letter - 'a'];
  return static_cast<unsigned char>(near[random->Uniform(near.size())]);
}

void AddTypo(Letters* word, RandomStream* random) {
  const size_t i = random->Uniform(word->size());
  const double kind = random->Fraction();
  if (kind < 0.30) {
    word->erase(word->begin() + static_cast<ptrdiff_t>(i));
  } else if (kind < 0.45) {
    const size_t first = random->Uniform(word->size() - 1);
    std::swap((*word)[first], (*word)[first + 1]);
  } else if (kind < 0.60) {
    word->insert(word->begin() + static_cast<ptrdiff_t>(i), (*word)[i]);
  } else if (kind < 0.75) {
    word->insert(word->begin() + static_cast<ptrdiff_t>(i), WrongLetter(*word, i, random));
  } else if ((*word)[i] < 128 && kVowels.find(static_cast<char>((*word)[i])) != kVowels.npos && kind < 0.90) {
    (*word)[i] = static_cast<unsigned char>(kVowels[random->Uniform(kVowels.size())]);
  } else {
    (*word)[i] = WrongLetter(*word, i, random);
  }
}

void Append(const Letters& letters, std::string* text) {
  for (uint32_t letter : letters) {
    char utf8[4];
    text->append(utf8, EncodeUtf8(letter, utf8));
  }
}

constexpr uint32_t kSpace = ' ';

// Keeps the elements that `keeps` selects, or all if it selects none.
template <typename Keeps>
void Filter(std::vector<Piece>* pieces, Keeps keeps) {
  std::vector<Piece> kept;
  bool follows = false;  // the piece before this one was kept
  for (const Piece& piece : *pieces) {
    const bool stays = keeps(piece);
    if (stays) {
      kept.push_back(piece);
      // A character whose left neighbour was left out does not adjoin the character before that.
      kept.back().adjoins = piece.adjoins && follows;
    }
    follows = stays;
  }
  if (!kept.empty()) *pieces = std::move(kept);
}

// Joins the pieces to one text.
std::string Write(std::vector<Piece> pieces, double typo_rate, RandomStream* random) {
  std::string text;
  size_t joined = 0;  // piece that is written without a space before it
  if (pieces.size() > 1 && random->Fraction() < kJoinRate * typo_rate) joined = 1 + random->Uniform(pieces.size() - 1);
  for (size_t i = 0; i < pieces.size(); ++i) {
    Piece& piece = pieces[i];
    if (piece.is_letters && piece.letters.size() >= kShortestTypo && random->Fraction() < typo_rate) {
      AddTypo(&piece.letters, random);
      if (piece.letters.size() > kShortestTypo && random->Uniform(kSplitOneIn) == 0) {
        const size_t at = 2 + random->Uniform(piece.letters.size() - 3);
        piece.letters.insert(piece.letters.begin() + static_cast<ptrdiff_t>(at), kSpace);
      }
    }
    const bool as_one = i > 0 && i == joined && piece.is_word && pieces[i - 1].is_word;
    if (i > 0 && !piece.adjoins && !as_one) text += ' ';
    Append(piece.letters, &text);
  }
  return text;
}

}  // namespace

std::string PieceOf(std::string_view title, const KeepRate& keep_rate, double typo_rate, RandomStream* random) {
  std::vector<Piece> pieces = PiecesOf(title);
  if (pieces.empty()) return std::string();
  if (keep_rate) {
    Filter(&pieces, [&](const Piece& piece) {
      std::string word;
      Append(piece.letters, &word);
      return random->Fraction() < keep_rate(word);
    });
  }
  const size_t length = 1 + random->Uniform(std::min(pieces.size(), kLongestPiece));
  const auto begin = pieces.begin() + static_cast<ptrdiff_t>(random->Uniform(pieces.size() - length + 1));
  pieces = std::vector<Piece>(begin, begin + static_cast<ptrdiff_t>(length));
  Filter(&pieces, [&](const Piece&) { return random->Uniform(kDropOneIn) != 0; });
  return Write(std::move(pieces), typo_rate, random);
}

std::string Misspelt(std::string_view text, double typo_rate, RandomStream* random) {
  return Write(PiecesOf(text), typo_rate, random);
}

std::string Shortened(std::string_view text, double drop_rate, double typo_rate, RandomStream* random) {
  std::vector<Piece> pieces = PiecesOf(text);
  Filter(&pieces, [&](const Piece&) { return random->Fraction() >= drop_rate; });
  return Write(std::move(pieces), typo_rate, random);
}

}  // namespace dpsr
