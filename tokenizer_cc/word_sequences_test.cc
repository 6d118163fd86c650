#include "tokenizer_cc/word_sequences.h"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/test_util.h"

namespace dpsr {
namespace {

class WordSequencesTest : public FileTest {
 protected:
  // red 4, shoes 5, 3.5mm 6, 手 7, 机 8
  void SetUp() override {
    FileTest::SetUp();
    VocabularyBuilder builder(WordTokens());
    for (const char* text : {"red shoes 3.5mm 手机", "RED shoes 3.5mm", "red shoes", "red"}) {
      ASSERT_TRUE(IsOk(builder.Add(text)));
    }
    ASSERT_TRUE(IsOk(builder.Write(path_, 1, 100, 0)));
    ASSERT_TRUE(IsOk(Vocabulary::Open(path_, true, &vocabulary_)));
    ASSERT_TRUE(IsOk(WordSequences::Check(*vocabulary_)));
  }
  std::vector<int32_t> Encode(std::string_view text, int64_t max_words, bool ends = false) const {
    // One more place shows that nothing is written behind the end.
    std::vector<int32_t> ids(max_words + 1, -7);
    WordSequences(*vocabulary_).Encode(text, max_words, ends, ids.data());
    EXPECT_EQ(ids.back(), -7);
    ids.pop_back();
    return ids;
  }

  std::unique_ptr<Vocabulary> vocabulary_;
};

std::vector<int32_t> Pieces(std::string_view word, int64_t max_pieces = 12, int32_t num_pieces = 16384) {
  std::vector<int32_t> pieces(max_pieces + 1, -7);
  PiecesOfWord(word, max_pieces, num_pieces, pieces.data());
  EXPECT_EQ(pieces.back(), -7);
  pieces.pop_back();
  return pieces;
}

size_t Count(const std::vector<int32_t>& pieces) {
  return pieces.size() - static_cast<size_t>(std::count(pieces.begin(), pieces.end(), 0));
}

TEST_F(WordSequencesTest, WordsInOrderThenPadding) {
  EXPECT_EQ(Encode("Shoes, RED 3.5mm!", 5), (std::vector<int32_t>{5, 4, 6, 0, 0}));
  EXPECT_EQ(Encode("red手机red", 5), (std::vector<int32_t>{4, 7, 8, 4, 0}));
  EXPECT_EQ(Encode("red zebra", 3), (std::vector<int32_t>{4, 1, 0}));
  EXPECT_EQ(Encode("red shoes red", 2), (std::vector<int32_t>{4, 5}));
  EXPECT_EQ(Encode("\xff !?", 2), (std::vector<int32_t>{0, 0}));
}

TEST_F(WordSequencesTest, AnEndTakesAPlace) {
  EXPECT_EQ(Encode("red shoes", 4, true), (std::vector<int32_t>{4, 5, 3, 0}));
  EXPECT_EQ(Encode("red shoes red", 3, true), (std::vector<int32_t>{4, 5, 3}));
  EXPECT_EQ(Encode("", 2, true), (std::vector<int32_t>{3, 0}));
  EXPECT_EQ(Encode("red", 1, true), (std::vector<int32_t>{3}));
}

TEST_F(WordSequencesTest, WordsOfIds) {
  const WordSequences sequences(*vocabulary_);
  EXPECT_EQ(sequences.num_ids(), 9);
  EXPECT_EQ(sequences.Word(4), "red");
  EXPECT_EQ(sequences.Word(8), "机");
  for (int32_t id : {-1, 0, 1, 2, 3, 9, 1 << 30}) EXPECT_EQ(sequences.Word(id), "") << id;
  for (int32_t id = WordSequences::kFirstWord; id < 9; ++id) EXPECT_EQ(sequences.Id(sequences.Word(id)), id);
  EXPECT_EQ(sequences.Id("zebra"), WordSequences::kUnknown);
}

TEST_F(WordSequencesTest, BothAtOnceIsTheSame) {
  const WordSequences sequences(*vocabulary_);
  for (const char* text : {"", "red", "Red zebra 手机 extraordinarily 3.5mm red shoes", "\xff手"}) {
    std::vector<int32_t> ids(4), pieces(4 * 5), only(4 * 5);
    sequences.EncodeBoth(text, 4, 5, 100, ids.data(), pieces.data());
    EXPECT_EQ(ids, Encode(text, 4));
    sequences.EncodePieces(text, 4, 5, 100, only.data());
    EXPECT_EQ(pieces, only) << text;
  }
}

TEST_F(WordSequencesTest, OtherVocabulariesAreRefused) {
  VocabularyBuilder trigrams(TokenizerConfig{});
  ASSERT_TRUE(IsOk(trigrams.Add("red")));
  ASSERT_TRUE(IsOk(trigrams.Write(path_, 1, 100, 0)));
  ASSERT_TRUE(IsOk(Vocabulary::Open(path_, true, &vocabulary_)));
  const Status tokens = WordSequences::Check(*vocabulary_);
  EXPECT_EQ(tokens.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Contains(tokens.message(), "other tokens than words and characters"));
  VocabularyBuilder buckets{WordTokens()};
  ASSERT_TRUE(IsOk(buckets.Add("red")));
  ASSERT_TRUE(IsOk(buckets.Write(path_, 1, 100, 3)));
  ASSERT_TRUE(IsOk(Vocabulary::Open(path_, true, &vocabulary_)));
  EXPECT_TRUE(Contains(WordSequences::Check(*vocabulary_).message(), "has 3 hash buckets, expected none"));
}

TEST(PiecesTest, TrigramsOfTheWordAndItsEnds) {
  EXPECT_EQ(Count(Pieces("sprinkler")), 9u);
  EXPECT_EQ(Count(Pieces("x")), 1u);
  EXPECT_EQ(Count(Pieces("手")), 1u);
  EXPECT_EQ(Count(Pieces("été")), 3u) << "code points, not bytes";
  EXPECT_EQ(Count(Pieces("")), 0u);
  for (int32_t piece : Pieces("sprinkler", 9, 10)) EXPECT_TRUE(piece >= 1 && piece < 10) << piece;
  // A model depends on these numbers.
  EXPECT_EQ(Pieces("red", 4), (std::vector<int32_t>{14459, 10089, 16050, 0}));
}

TEST(PiecesTest, AMisspeltWordSharesPieces) {
  const std::vector<int32_t> right = Pieces("sprinkler"), wrong = Pieces("sprinkeler");
  const std::set<int32_t> known(right.begin(), right.end());
  size_t shared = 0;
  for (int32_t piece : wrong) shared += piece != 0 && known.count(piece) != 0;
  EXPECT_EQ(shared, 7u);
  EXPECT_NE(Pieces("ab"), Pieces("ba"));
}

TEST(PiecesTest, ALongWordIsCutOff) {
  const std::vector<int32_t> all = Pieces("extraordinarily", 20), some = Pieces("extraordinarily", 4);
  EXPECT_EQ(Count(all), 15u);
  EXPECT_EQ(some, std::vector<int32_t>(all.begin(), all.begin() + 4));
}

TEST(PiecesTest, DamagedWordsStayWithinTheirBytes) {
  for (const char* word : {"\xf0", "a\xe6\x89", "\x80\x80\x80", "\xff\xff", "\xf4\xbf\xbf\xbf"}) {
    const std::string copy(word);
    Pieces(std::string_view(copy));
    IsCharacter(copy);
  }
}

TEST(NormalTextTest, IsTheWordsAndCharacters) {
  EXPECT_EQ(NormalText("  Red, RUNNING-shoes!"), "red running shoes");
  EXPECT_EQ(NormalText("iPhone 手机 壳 case 1,000"), "iphone手机壳 case 1000");
  EXPECT_EQ(NormalText(" \xff"), "");
  EXPECT_FALSE(IsCharacter("red") || IsCharacter("3") || IsCharacter(""));
  EXPECT_TRUE(IsCharacter("手") && IsCharacter("\u3099")) << "a mark within such a text is a character";
}

TEST(NormalTextTest, HasTheWordsOfTheText) {
  std::mt19937 random(7);
  const std::vector<std::string> parts = {"red",  "SHOES", " ", ",",  ".",   "1",  "23", "456",    "手", "机", "カ\u3099",
                                          "/",    "é",     "e\u0301", "\u0e01\u0e34", "½", "\xff", "㎜", "ß", "\u200b", "한국"};
  const Tokenizer tokenizer(WordTokens());
  const auto words = [&](const std::string& text) {
    std::vector<std::string> found;
    tokenizer.Tokenize(text, [&](std::string_view word) { found.emplace_back(word); });
    return found;
  };
  for (int run = 0; run < 20000; ++run) {
    std::string text;
    for (uint64_t n = random() % 12; n > 0; --n) text += parts[random() % parts.size()];
    const std::string normal = NormalText(text);
    ASSERT_EQ(words(normal), words(text)) << text << " -> " << normal;
    ASSERT_EQ(NormalText(normal), normal);
  }
}

}  // namespace
}  // namespace dpsr
