#include "export/rank_features/rank_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "common/test_util.h"
#include "dpsr_tf/ops/permutation.h"

namespace dpsr {
namespace {

using Section = std::variant<std::vector<int32_t>, std::vector<int64_t>, std::vector<float>, std::vector<uint8_t>>;

std::vector<uint8_t> Bytes(const std::string& text) { return {text.begin(), text.end()}; }

// The sections of an index of ids.
void AddIds(const std::vector<int64_t>& ids, std::map<std::string, Section>* sections) {
  int bits = 0;
  while ((size_t{1} << bits) < ids.size()) ++bits;
  std::vector<int32_t> splits{0}, rows;
  for (uint64_t bucket = 0; bucket < uint64_t{1} << bits; ++bucket) {
    for (size_t row = 0; row < ids.size(); ++row) {
      if ((bits == 0 ? 0 : Mix64(static_cast<uint64_t>(ids[row])) >> (64 - bits)) == bucket) {
        rows.push_back(static_cast<int32_t>(row));
      }
    }
    splits.push_back(static_cast<int32_t>(rows.size()));
  }
  *sections = {{"id", ids}, {"id_index.splits", splits}, {"id_index.rows", rows}};
}

void SetTexts(const std::string& name, const std::vector<std::string>& texts, std::map<std::string,
              Section>* sections) {
  std::vector<int64_t> splits{0};
  std::string bytes;
  for (const std::string& text : texts) {
    bytes += text;
    splits.push_back(static_cast<int64_t>(bytes.size()));
  }
  (*sections)[name + ".splits"] = splits;
  (*sections)[name + ".bytes"] = Bytes(bytes);
}

class RankTableTest : public FileTest {
 protected:
  // Three items with a title and a description: "drill 12mm" by Bolt Tools, "shoes" by Acme, and one with neither.
  void SetUp() override {
    FileTest::SetUp();
    AddIds({7, 9, 20}, &sections_);
    TokenizerConfig words;
    words.letter_trigrams = words.number_parts = false;
    sections_["tokenizer"] = Bytes(words.Serialize());
    TokenizerConfig trigrams;
    trigrams.word_unigrams = trigrams.number_parts = trigrams.char_unigrams = trigrams.char_bigrams = false;
    sections_["trigram_tokenizer"] = Bytes(trigrams.Serialize());
    // Those of drill, 12mm and shoes; brands have none.
    SetTexts("trigram",
             {"##dr", "#dri", "#ril", "#ill", "#ll#", "##12", "#12m", "#2mm", "#mm#", "##sh", "#sho", "#hoe", "#oes",
                           "#es#"},
             &sections_);
    sections_["word_trigrams.splits"] = std::vector<int64_t>{0, 5, 9, 14, 14, 14, 14, 14};
    sections_["word_trigrams.values"] = std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};
    sections_["title_trigrams"] = std::vector<int32_t>{9, 5, 0};
    SetTexts("word", {"drill", "12mm", "shoes", "tools", "bolt", "acme", "红"}, &sections_);
    sections_["digits"] = std::vector<int32_t>{'0', '9', 0x660, 0x669};
    sections_["text0.splits"] = std::vector<int64_t>{0, 2, 3, 3};
    sections_["text0.values"] = std::vector<int32_t>{0, 1, 2};
    sections_["text0.weights"] = std::vector<float>{1.5f, 2, 4};
    sections_["text1.splits"] = std::vector<int64_t>{0, 2, 2, 3};
    sections_["text1.values"] = std::vector<int32_t>{1, 6, 6};
    sections_["text1.weights"] = std::vector<float>{0.5f, 8, 16};
    sections_["brand"] = std::vector<int32_t>{1, 2, 0};
    sections_["brand_words.splits"] = std::vector<int64_t>{0, 2, 3, 3};
    sections_["brand_words.values"] = std::vector<int32_t>{3, 4, 5};
    SetTexts("query", {"shoes", "drill 12mm"}, &sections_);
    sections_["query_item.splits"] = std::vector<int64_t>{0, 1, 3};
    sections_["query_item.values"] = std::vector<int32_t>{1, 0, 2};
    sections_["query_item.numbers"] = std::vector<float>{10, 11, 20, 21, 30, 31};
    sections_["query_item.missing"] = std::vector<float>{0, 0.25f};
    sections_["price"] = std::vector<float>{10, 3, NAN};
    sections_["user.id"] = std::vector<int64_t>{3, 8};
    sections_["user.spending"] = std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8};
    sections_["user.missing"] = std::vector<float>{0, NAN, NAN, NAN};
    sections_["table0"] = std::vector<float>{1, 2, 3, 4, 5, 6};
    sections_["table0.width"] = std::vector<int32_t>{2};
  }

  Status Open() {
    PackedFileWriter writer(path_, "rank_table");
    DPSR_RETURN_IF_ERROR(writer.Open());
    for (const auto& [name, section] : sections_) {
      Status added;
      std::visit(
          [&, &name = name](const auto& values) {
            using T = typename std::decay_t<decltype(values)>::value_type;
            added = writer.Add(name, DataTypeOf<T>::value, values.data(), values.size() * sizeof(T));
          },
          section);
      DPSR_RETURN_IF_ERROR(added);
    }
    DPSR_RETURN_IF_ERROR(writer.Finish());
    std::unique_ptr<PackedFile> file;
    DPSR_RETURN_IF_ERROR(PackedFile::Open(path_, "rank_table", /*verify=*/false, &file));
    return RankTable::Open(std::move(file), &table_);
  }

  // The numbers of a query with one item, for the user 3, whose mean price is 2.
  std::vector<float> Pair(const std::string& query, int32_t row) {
    std::vector<float> spending(static_cast<size_t>(table_->spending()));
    table_->Spending(3, spending.data());
    std::vector<float> out(static_cast<size_t>(table_->pair_numbers()));
    EXPECT_TRUE(IsOk(table_->Pairs(query, spending.data(), Span<const int32_t>(&row, 1), out.data())));
    return out;
  }

  std::map<std::string, Section> sections_;
  std::unique_ptr<RankTable> table_;
};

// Compares numbers; NaN equals NaN.
void ExpectNumbers(const std::vector<float>& got, const std::vector<float>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(expected[i])) {
      EXPECT_TRUE(std::isnan(got[i])) << i << ": " << got[i];
    } else {
      EXPECT_FLOAT_EQ(got[i], expected[i]) << i;
    }
  }
}

TEST_F(RankTableTest, NumbersOfPairs) {
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_EQ(table_->items(), 3);
  EXPECT_EQ(table_->FindItem(9), 1);
  EXPECT_EQ(table_->FindItem(8), -1);
  EXPECT_EQ(table_->FindItem(-1), -1);
  // text0, text1, query_in_title, title_in_query, number_match, shares of text0 and text1, query_in_texts,
  // missing_rarity, last_word_in_title, trigrams_in_title, trigram_overlap, brand_match, brand_other, two numbers of
  // query_item, price ratio. The rarity of a word that 0, 1 or 2 of 3 texts have is log(8), log(8 / 3) or log(1.6).
  ExpectNumbers(Pair("drill 12mm", 0), {3.5, 0.5, 1, 1, 1, 1.7842045f, 0.16338423f, 1, 0, 1, 1, 1, 0, 0, 20, 21, 5});
  ExpectNumbers(Pair("\u3000Drill 12MM", 0), {3.5, 0.5, 1, 1, 1, 1.7842045f, 0.16338423f, 1, 0, 1, 1, 1, 0, 0, 0,
                0.25, 5});
  ExpectNumbers(Pair(" drill 12mm \n", 0), {3.5, 0.5, 1, 1, 1, 1.7842045f, 0.16338423f, 1, 0, 1, 1, 1, 0, 0, 20, 21,
                5});
  // Only the text that the log has counts.
  ExpectNumbers(Pair("drill drill 13mm 12mm unknown", 0), {5, 0.5, 0.5, 1, 0.5, 0.70408941f, 0.053771562f, 0.5f,
                2.0794415f, 0, 0.47368421f, 0.47368421f, 0, 0, 0, 0.25, 5});
  ExpectNumbers(Pair("tools by bolt", 0), {0, 0, 0, 0, NAN, 0, 0, 0, 2.0794415f, 0, 0, 0, 1, 0, 0, 0.25, 5});
  ExpectNumbers(Pair("tools by bolt", 1), {0, 0, 0, 0, NAN, 0, 0, 0, 2.0794415f, 0, 0, 0, 0, 1, 0, 0.25, 1.5});
  ExpectNumbers(Pair("bolt shoes", 1), {4, 0, 0.5, 1, NAN, 1.3070739f, 0, 0.5f, 2.0794415f, 1, 0.55555556f,
                0.55555556f, 0, 0, 0, 0.25, 1.5});
  ExpectNumbers(Pair("红 ٣", 2), {0, 16, 0, NAN, 0, 0, 6.2758753f, 0.5f, 2.0794415f, 0, NAN, NAN, NAN, NAN, 0, 0.25,
                NAN});
  ExpectNumbers(Pair("", 2), {0, 0, NAN, NAN, NAN, NAN, NAN, NAN, 0, NAN, NAN, NAN, NAN, NAN, 0, 0.25, NAN});
  ExpectNumbers(Pair("shoes", -1), std::vector<float>(17, NAN));
  ExpectNumbers(Pair(std::string("\xff\x00 shoes", 8), 1), {4, 0, 1, 1, NAN, 4.0781818f, 0, 1, 0, 1, 1, 1, 0, 0, 0,
                0.25, 1.5});
  EXPECT_EQ(table_->tables(), 1);
  EXPECT_EQ(table_->width(0), 2);
  EXPECT_EQ(table_->Row(0, 2)[1], 6);
}

TEST_F(RankTableTest, SpendingOfUsers) {
  ASSERT_TRUE(IsOk(Open()));
  std::vector<float> found(4);
  table_->Spending(8, found.data());
  ExpectNumbers(found, {5, 6, 7, 8});
  for (const int64_t unknown : {int64_t{-1}, int64_t{0}, int64_t{5}, int64_t{9}, INT64_MAX}) {
    table_->Spending(unknown, found.data());
    ExpectNumbers(found, {0, NAN, NAN, NAN});
  }
}

TEST_F(RankTableTest, OptionalSections) {
  for (const char* name : {"text1.splits", "text1.values", "text1.weights", "brand", "brand_words.splits",
                           "brand_words.values", "price", "user.id", "user.spending", "user.missing", "table0",
                           "table0.width"}) {
    sections_.erase(name);
  }
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_EQ(table_->spending(), 0);
  EXPECT_EQ(table_->tables(), 0);
  ExpectNumbers(Pair("drill 12mm", 0), {3.5, 1, 1, 1, 1.7842045f, 1, 0, 1, 1, 1, 20, 21});
}

TEST_F(RankTableTest, LongQueries) {
  ASSERT_TRUE(IsOk(Open()));
  std::string longest(RankTable::kMaxQueryBytes, 'x');
  longest.replace(0, 6, "shoes ");
  ExpectNumbers(Pair(longest, 1), {4, 0, 0.5, 1, NAN, 1.3070739f, 0, 0.5f, 2.0794415f, 0, 0.625f, 0.625f, 0, 0, 0,
                0.25, 1.5});
  const int32_t row = 1;
  std::vector<float> out(17), spending(4);
  const Status status = table_->Pairs(longest + "x", spending.data(), Span<const int32_t>(&row, 1), out.data());
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(Contains(status.message(), "query has 65537 bytes, expected at most 65536"));
  // Many words, all of them repeated.
  std::string words;
  while (words.size() + 12 < RankTable::kMaxQueryBytes) words += "drill 12mm ";
  const std::vector<float> found = Pair(words, 0);
  EXPECT_EQ(found[2], 1);
  EXPECT_GT(found[0], 10'000);
}

TEST_F(RankTableTest, SectionsThatDoNotFitTogether) {
  const auto expect = [&](const std::string& name, const Section& bad, const std::string& part) {
    const Section good = sections_[name];
    sections_[name] = bad;
    const Status status = Open();
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << name;
    EXPECT_TRUE(Contains(status.message(), part));
    sections_[name] = good;
  };
  expect("word.splits", std::vector<int64_t>{0, 3}, "word.splits");
  expect("text0.values", std::vector<int32_t>{0, 7, 2}, "row 7 of 7 words");
  expect("text0.values", std::vector<int32_t>{1, 0, 2}, "ascending");
  expect("text0.splits", std::vector<int64_t>{0, 2, 3}, "text0.splits");
  expect("text1.weights", std::vector<float>{1}, "text1.weights");
  expect("trigram.splits", std::vector<int64_t>{0, 3}, "trigram.splits");
  expect("word_trigrams.splits", std::vector<int64_t>{0, 14}, "word_trigrams.splits");
  expect("word_trigrams.values", std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14},
                "row 14 of 14 trigrams");
  expect("title_trigrams", std::vector<int32_t>{9}, "title_trigrams");
  expect("brand", std::vector<int32_t>{1, 2, 4}, "row 4 of 4 brands");
  expect("brand", std::vector<int32_t>{1, -1, 0}, "row -1");
  expect("brand_words.values", std::vector<int32_t>{3, 4, 9}, "row 9 of 7 words");
  expect("query_item.values", std::vector<int32_t>{1, 0, 3}, "row 3 of 3 items");
  expect("query_item.values", std::vector<int32_t>{1, 2, 2}, "ascending");
  expect("query_item.splits", std::vector<int64_t>{0, 3}, "query_item.splits");
  expect("query_item.numbers", std::vector<float>{1, 2}, "query_item.numbers");
  expect("price", std::vector<float>{1}, "price");
  expect("user.id", std::vector<int64_t>{8, 3}, "3 after 8");
  expect("user.spending", std::vector<float>{1}, "user.spending");
  expect("user.missing", std::vector<float>{1}, "user.missing");
  expect("table0", std::vector<float>{1}, "table0");
  expect("table0.width", std::vector<int32_t>{-2}, "width is -2");
  expect("id", std::vector<int64_t>{7, 9}, "id_index");
  sections_["tokenizer"] = Bytes("nonsense");
  EXPECT_FALSE(Open().ok());
}

TEST_F(RankTableTest, ThreadsShareATable) {
  ASSERT_TRUE(IsOk(Open()));
  const std::vector<float> expected = Pair("drill 12mm", 0);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 200; ++j) ExpectNumbers(Pair("drill 12mm", 0), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace dpsr
