#include "dpsr_tf/ops/query_noise.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "tokenizer_cc/tokenizer.h"

namespace dpsr {
namespace {

std::vector<std::string> Words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// Insertions, deletions, changes and exchanges of neighbours between two words.
size_t Distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

TEST(PieceOfTest, IsSomeConsecutiveWordsButAFew) {
  const std::string title = "Delta 3.5-in. 1-Handle SHOWER Faucet, Trim Kit";
  const std::vector<std::string> words = {"delta", "3.5", "in", "1", "handle", "shower", "faucet", "trim", "kit"};
  std::map<size_t, int> lengths;
  std::set<std::string> firsts;
  int gaps = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    RandomStream random(seed);
    const std::vector<std::string> piece = Words(PieceOf(title, nullptr, /*typo_rate=*/0, &random));
    ASSERT_FALSE(piece.empty());
    firsts.insert(piece[0]);
    ++lengths[piece.size()];
    auto at = std::find(words.begin(), words.end(), piece[0]);
    for (size_t i = 1; i < piece.size(); ++i) {
      const auto next = std::find(at + 1, words.end(), piece[i]);
      ASSERT_NE(next, words.end()) << piece[i] << " follows " << piece[i - 1];
      gaps += next != at + 1;
      at = next;
    }
  }
  EXPECT_EQ(firsts.size(), words.size());
  EXPECT_EQ(lengths.rbegin()->first, kLongestPiece);
  for (size_t length = 1; length <= kLongestPiece; ++length) EXPECT_GT(lengths[length], 100) << length;
  EXPECT_GT(gaps, 200);
}

TEST(PieceOfTest, CharactersWithoutSpacesStayTogetherUnlessOneIsLeftOut) {
  std::set<std::string> pieces;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    RandomStream random(seed);
    pieces.insert(PieceOf("红色跑鞋 43码", nullptr, 0, &random));
  }
  for (const char* piece : {"红", "红色", "红色跑鞋", "跑鞋 43 码", "色 鞋", "红色跑鞋 43"}) EXPECT_TRUE(pieces.count(piece)) << piece;
  // Such characters on both sides of a space or of one that was left out are no neighbours.
  for (const char* piece : {"红跑", "鞋码", "鞋43"}) EXPECT_FALSE(pieces.count(piece)) << piece;
}

TEST(PieceOfTest, WordsStayAsOftenAsTheirRateSays) {
  const KeepRate keep_rate = [](std::string_view word) { return word == "in" ? 0.1 : word == "x" ? 0.0 : 1.0; };
  std::map<std::string, int> counts;
  const int n = 8000;
  for (uint64_t seed = 0; seed < n; ++seed) {
    RandomStream random(seed);
    for (const std::string& word : Words(PieceOf("saw IN box x", keep_rate, 0, &random))) ++counts[word];
  }
  EXPECT_EQ(counts.count("x"), 0u);
  EXPECT_GT(counts["saw"], n / 2);
  // Of the titles that have it, as often as the words beside it.
  EXPECT_NEAR(counts["in"], 0.1 * counts["saw"], 0.03 * n);
  RandomStream random(1);
  EXPECT_EQ(PieceOf("x", keep_rate, 0, &random), "x") << "rather than nothing";
}

TEST(PieceOfTest, AnyBytesWillDo) {
  for (const std::string& title : {std::string(), std::string(" -/ \t"), std::string("\0\xff\xfe\xe6\x89", 5)}) {
    RandomStream random(1);
    EXPECT_EQ(PieceOf(title, nullptr, 0.5, &random), "");
  }
  RandomStream bytes(2);
  for (int i = 0; i < 20000; ++i) {
    std::string title;
    for (uint64_t n = bytes.Uniform(40); n > 0; --n) title += static_cast<char>(bytes.Uniform(256));
    RandomStream random(static_cast<uint64_t>(i));
    const std::string piece = PieceOf(title, nullptr, 1, &random);
    RandomStream again(static_cast<uint64_t>(i));
    ASSERT_EQ(PieceOf(title, nullptr, 1, &again), piece);
    RandomStream other(static_cast<uint64_t>(i));
    Misspelt(title, 1, &other);
  }
}

TEST(MisspeltTest, WithoutTyposIsTheText) {
  RandomStream random(1);
  EXPECT_EQ(Misspelt("Rain  SHOWER-head, 3.5in", 0, &random), "rain shower head 3.5in");
  EXPECT_EQ(Misspelt("Straße 手机 壳 no5", 0, &random), "strasse 手机 壳 no5");
}

TEST(MisspeltTest, WithoutTyposTheTokensAreThoseOfTheText) {
  TokenizerConfig config;
  config.word_bigrams = config.markers = true;
  const Tokenizer tokenizer(config);
  const auto tokens = [&tokenizer](const std::string& text) {
    std::vector<std::string> all;
    tokenizer.Tokenize(text, [&all](std::string_view token) { all.emplace_back(token); });
    return all;
  };
  const std::vector<std::string> parts = {"red", " ", "1", ",", "000", ".", "5", "/", "-", "手", "机", "é", "\u0301", "½",
                                          "ｶﾞ", "mm", "กำ", "\xff", "　", "ß", "12", "가"};
  RandomStream random(3);
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (uint64_t n = random.Uniform(12); n > 0; --n) text += parts[random.Uniform(parts.size())];
    ASSERT_EQ(tokens(Misspelt(text, 0, &random)), tokens(text)) << text;
  }
}

TEST(MisspeltTest, AWordHasOneErrorAsOftenAsTheRateSays) {
  const std::string word = "sprinkler";
  for (double rate : {0.1, 0.5, 1.0}) {
    int wrong = 0, split = 0;
    std::set<std::string> forms;
    const int n = 4000;
    for (uint64_t seed = 0; seed < n; ++seed) {
      RandomStream random(seed);
      std::string text = Misspelt(word, rate, &random);
      const size_t space = text.find(' ');
      if (space != text.npos) {
        ++split;
        text.erase(space, 1);
      }
      ASSERT_LE(Distance(word, text), 1u) << text;
      ASSERT_FALSE(text.empty());
      wrong += text != word;
      forms.insert(text);
    }
    // A vowel may be changed into itself, neighbouring equal letters exchanged.
    EXPECT_NEAR(wrong, 0.98 * rate * n, 0.03 * n) << rate;
    EXPECT_NEAR(split, 0.1 * rate * n, 0.02 * n) << rate;
    EXPECT_GT(forms.size(), 40u);
  }
}

TEST(MisspeltTest, ShortWordsNumbersAndCharactersStay) {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    RandomStream random(seed);
    std::string text = Misspelt("6 ft x12ab34 1998 红色跑鞋 ab", 1, &random);
    text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
    EXPECT_EQ(text, "6ftx12ab341998红色跑鞋ab");
  }
}

TEST(MisspeltTest, WordsAreWrittenAsOneNowAndThen) {
  int joined = 0;
  const int n = 4000;
  for (uint64_t seed = 0; seed < n; ++seed) {
    RandomStream random(seed);
    const std::string text = Misspelt("led saw kit", 0.5, &random);
    ASSERT_TRUE(text == "led saw kit" || text == "ledsaw kit" || text == "led sawkit") << text;
    joined += text != "led saw kit";
  }
  EXPECT_NEAR(joined, 0.4 * 0.5 * n, 0.03 * n);
}

TEST(ShortenedTest, WordsAreLeftOutAsOftenAsTheRateSays) {
  std::map<std::string, int> counts;
  const int n = 4000;
  for (uint64_t seed = 0; seed < n; ++seed) {
    RandomStream random(seed);
    const std::vector<std::string> words = Words(Shortened("Saw, BLADE 10in", 0.2, 0, &random));
    ASSERT_FALSE(words.empty()) << "rather than nothing, all stay";
    for (const std::string& word : words) ++counts[word];
  }
  ASSERT_EQ(counts.size(), 3u);
  for (const auto& [word, count] : counts) EXPECT_NEAR(count, (0.8 + 0.2 * 0.2 * 0.2) * n, 0.03 * n) << word;
}

TEST(ShortenedTest, WithoutDropsIsMisspelt) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    RandomStream random(seed);
    const std::string all = Shortened("rain shower head 手机", 0, 0, &random);
    EXPECT_EQ(all, "rain shower head 手机");
  }
  RandomStream random(1);
  EXPECT_EQ(Shortened("\xff", 0.5, 0.5, &random), "");
}

}  // namespace
}  // namespace dpsr
