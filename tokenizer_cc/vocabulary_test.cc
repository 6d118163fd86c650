#include "tokenizer_cc/vocabulary.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "common/test_util.h"

namespace dpsr {
namespace {

constexpr int64_t kNoLimit = Vocabulary::kMaxIds;

TokenizerConfig OnlyWords() { return {true, false, false, true, false, false, false}; }

class VocabularyTest : public FileTest {
 protected:
  // "b" twice, "a" and "手" once, "c" three times.
  static VocabularyBuilder SmallBuilder() {
    VocabularyBuilder builder(OnlyWords());
    EXPECT_TRUE(IsOk(builder.Add("b c a")));
    EXPECT_TRUE(IsOk(builder.Add("C c b手")));
    return builder;
  }
  Status Open(bool verify = true) { return Vocabulary::Open(path_, verify, &vocabulary_); }
  void WriteAndOpen(const VocabularyBuilder& builder, int64_t min_count, int64_t max_size, int64_t buckets) {
    ASSERT_TRUE(IsOk(builder.Write(path_, min_count, max_size, buckets)));
    ASSERT_TRUE(IsOk(Open()));
  }
  std::vector<std::string> Tokens() const {
    std::vector<std::string> tokens;
    for (int32_t id = 0; id < vocabulary_->size(); ++id) tokens.emplace_back(vocabulary_->Token(id));
    return tokens;
  }
  std::vector<int32_t> Encode(std::string_view text) const {
    std::vector<int32_t> ids;
    vocabulary_->Encode(text, &ids);
    return ids;
  }

  std::unique_ptr<Vocabulary> vocabulary_;
};

TEST_F(VocabularyTest, IdsByCountThenBytes) {
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 0);
  EXPECT_EQ(Tokens(), (std::vector<std::string>{"c", "b", "a", "手"}));
  EXPECT_EQ(vocabulary_->size(), 4);
  EXPECT_EQ(vocabulary_->num_ids(), 4);
  EXPECT_EQ(vocabulary_->Count(0), 3);
  EXPECT_EQ(vocabulary_->Count(1), 2);
  EXPECT_EQ(vocabulary_->Count(3), 1);
  EXPECT_EQ(vocabulary_->config(), OnlyWords());
  EXPECT_EQ(vocabulary_->path(), path_);
}

TEST_F(VocabularyTest, EncodeAppends) {
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 0);
  std::vector<int32_t> ids = {99};
  vocabulary_->Encode("A 手 unknown C", &ids);
  EXPECT_EQ(ids, (std::vector<int32_t>{99, 2, 3, 0})) << "unknown tokens are dropped without buckets";
}

TEST_F(VocabularyTest, OtherTokensFallIntoBuckets) {
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 3);
  EXPECT_EQ(vocabulary_->num_oov_buckets(), 3);
  EXPECT_EQ(vocabulary_->num_ids(), 7);
  std::set<int32_t> buckets;
  for (int i = 0; i < 100; ++i) {
    const int32_t id = vocabulary_->Lookup(StrCat("unknown", i));
    EXPECT_EQ(id, vocabulary_->Lookup(StrCat("unknown", i)));
    buckets.insert(id);
  }
  EXPECT_EQ(buckets, (std::set<int32_t>{4, 5, 6}));
  EXPECT_EQ(Encode("c zebra").size(), 2u);
}

TEST_F(VocabularyTest, IdsOutsideHaveNoToken) {
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 3);
  for (int32_t id : {-1, 4, 6, 7, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(vocabulary_->Token(id), "");
    EXPECT_EQ(vocabulary_->Count(id), 0);
  }
}

TEST_F(VocabularyTest, MinCountAndMaxSize) {
  WriteAndOpen(SmallBuilder(), 2, kNoLimit, 0);
  EXPECT_EQ(Tokens(), (std::vector<std::string>{"c", "b"}));
  WriteAndOpen(SmallBuilder(), 1, 3, 0);
  EXPECT_EQ(Tokens(), (std::vector<std::string>{"c", "b", "a"}));
  WriteAndOpen(SmallBuilder(), 1, 0, 5);
  EXPECT_EQ(vocabulary_->size(), 0);
  EXPECT_EQ(Encode("c b a").size(), 3u) << "buckets alone";
}

TEST_F(VocabularyTest, BadArgumentsAreNamed) {
  const VocabularyBuilder builder = SmallBuilder();
  const auto message = [&](int64_t min_count, int64_t max_size, int64_t buckets) {
    const Status status = builder.Write(path_, min_count, max_size, buckets);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_TRUE(Contains(message(0, 1, 1), "min_count is 0, expected 1 to 2147483647"));
  EXPECT_TRUE(Contains(message(1, -1, 1), "max_size is -1, expected 0"));
  EXPECT_TRUE(Contains(message(1, 1, -1), "num_oov_buckets is -1, expected 0"));
  EXPECT_TRUE(Contains(message(1, kNoLimit, kNoLimit), "more than 2147483647 ids"));
  EXPECT_TRUE(Contains(message(9, kNoLimit, 0), "none of the 4 tokens is kept (min_count 9"));
  EXPECT_EQ(FilesInDirectory(), 0u);
}

TEST_F(VocabularyTest, ContentDecidesTheFile) {
  VocabularyBuilder builder(OnlyWords());
  ASSERT_TRUE(IsOk(builder.Add("手 c")));
  ASSERT_TRUE(IsOk(builder.Add("c b")));
  ASSERT_TRUE(IsOk(builder.Add("b c a")));
  ASSERT_TRUE(IsOk(builder.Write(path_, 1, kNoLimit, 2)));
  const std::string bytes = ReadBytes();
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 2);
  EXPECT_EQ(ReadBytes(), bytes) << "the order of the corpus does not matter";
  const uint64_t fingerprint = vocabulary_->fingerprint();
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 3);
  EXPECT_NE(vocabulary_->fingerprint(), fingerprint);
}

TEST_F(VocabularyTest, CountsOfPartsGiveTheWhole) {
  WriteAndOpen(SmallBuilder(), 1, kNoLimit, 2);
  const std::string whole = ReadBytes();
  const VocabularyBuilder::Options little = {1, 1, ::testing::TempDir()};  // every added count makes a run
  VocabularyBuilder merged(OnlyWords(), little);
  for (const char* text : {"b c a", "C c b手", ""}) {
    VocabularyBuilder part(OnlyWords());
    ASSERT_TRUE(IsOk(part.Add(text)));
    WriteAndOpen(part, 1, kNoLimit, 1);
    ASSERT_TRUE(IsOk(merged.AddCounts(*vocabulary_)));
  }
  WriteAndOpen(merged, 1, kNoLimit, 2);
  EXPECT_EQ(ReadBytes(), whole);
  VocabularyBuilder other(TokenizerConfig{});
  const Status status = other.AddCounts(*vocabulary_);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(Contains(status.message(), "count all texts with the same tokenizer"));
  EXPECT_TRUE(IsOk(other.Add("c"))) << "nothing was added, so the builder goes on";
}

TEST_F(VocabularyTest, ManyTokensAgainstAMap) {
  std::mt19937 random(3);
  VocabularyBuilder builder(TokenizerConfig{});
  std::map<std::string, int64_t> counts;
  const Tokenizer tokenizer;
  for (int i = 0; i < 20000; ++i) {
    const std::string text = StrCat("w", random() % 30000, " 手机", static_cast<char>('a' + random() % 26));
    ASSERT_TRUE(IsOk(builder.Add(text)));
    tokenizer.Tokenize(text, [&](std::string_view token) { ++counts[std::string(token)]; });
  }
  int64_t num_tokens = 0;
  ASSERT_TRUE(IsOk(builder.NumTokens(&num_tokens)));
  EXPECT_EQ(static_cast<size_t>(num_tokens), counts.size());
  WriteAndOpen(builder, 1, kNoLimit, 0);
  ASSERT_EQ(static_cast<size_t>(vocabulary_->size()), counts.size());
  int64_t last = INT64_MAX;
  for (int32_t id = 0; id < vocabulary_->size(); ++id) {
    const std::string token(vocabulary_->Token(id));
    ASSERT_EQ(vocabulary_->Lookup(token), id);
    ASSERT_EQ(vocabulary_->Count(id), counts.at(token));
    ASSERT_LE(vocabulary_->Count(id), last);
    last = vocabulary_->Count(id);
  }
  EXPECT_EQ(vocabulary_->Lookup("no such token"), -1);
}

TEST_F(VocabularyTest, ThreadsAndMemoryDoNotChangeTheFile) {
  std::mt19937 random(4);
  std::vector<std::string> texts;
  for (int i = 0; i < 6000; ++i) {  // with the long token, the second half is enough for five threads
    texts.push_back(StrCat("Red", random() % 5000, " shoes 手机壳 été𠀀𠀁 ", random() % 700));
  }
  texts.push_back(std::string(200000, 'x'));  // a token larger than any buffer
  const std::vector<std::string_view> all(texts.begin(), texts.end());
  const std::vector<std::string_view> few(all.end() - 150, all.end());  // a run for each text takes its time
  const auto write = [&](const std::vector<std::string_view>& views, const VocabularyBuilder::Options& options,
                         int64_t max_size) {
    VocabularyBuilder builder({true, true, true, true, true, true, true}, options);
    const size_t half = views.size() / 2;
    EXPECT_TRUE(IsOk(builder.Add({views.data(), half})));
    EXPECT_TRUE(IsOk(builder.Write(path_, 1, max_size, 5))) << "does not disturb what follows";
    EXPECT_TRUE(IsOk(builder.Add({views.data() + half, views.size() - half})));
    EXPECT_TRUE(IsOk(builder.Write(path_, 2, max_size, 5)));
    return ReadBytes();
  };
  for (int64_t max_size : {kNoLimit, int64_t{1000}}) {
    for (const auto* views : {&all, &few}) {
      const std::string expected = write(*views, {1, int64_t{1} << 40, directory_}, max_size);
      for (int threads : {1, 2, 5}) {
        for (int64_t memory : {int64_t{1}, int64_t{100000}, int64_t{1} << 40}) {
          if (memory == 1 && views == &all) continue;
          EXPECT_TRUE(write(*views, {threads, memory, directory_}, max_size) == expected) << threads << " " << memory;
        }
      }
    }
  }
  EXPECT_EQ(FilesInDirectory(), 1u) << "no temporary files";
}

TEST_F(VocabularyTest, BuilderOptionsAndFoldersAreChecked) {
  EXPECT_TRUE(Contains(VocabularyBuilder({}, {-1, 1, ""}).status().message(), "num_threads is -1, expected 0 to 1024"));
  EXPECT_TRUE(Contains(VocabularyBuilder({}, {1, 0, ""}).status().message(), "max_memory_bytes is 0, expected"));
  VocabularyBuilder builder({}, {1, 1, directory_ + "/missing"});
  const Status status = builder.Add("red");
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Contains(status.message(), "missing/dpsr_vocabulary"));
  EXPECT_EQ(builder.Write(path_, 1, kNoLimit, 1).message(), status.message());
}

TEST_F(VocabularyTest, EncodeIsLookupOfTheTokens) {
  // Encode finds ids by code points where it can, twice from the second time on.
  VocabularyBuilder builder({true, true, true, true, true, true, true});
  ASSERT_TRUE(IsOk(builder.Add("red shoe 12mm 3.5 手机壳 𠀀𠀁 été 手")));
  for (int64_t buckets : {0, 7}) {
    WriteAndOpen(builder, 1, kNoLimit, buckets);
    const Tokenizer tokenizer(vocabulary_->config());
    for (int round = 0; round < 2; ++round) {
      for (std::string text : {"Red shoes 12mm", "12,500.5/3x red", "手机 机手𠀀𠀁𠀀 ét", "#re ##", ""}) {
        std::vector<int32_t> expected;
        tokenizer.Tokenize(text, [&](std::string_view token) {
          if (const int32_t id = vocabulary_->Lookup(token); id >= 0) expected.push_back(id);
        });
        EXPECT_EQ(Encode(text), expected) << text;
      }
    }
  }
}

TEST_F(VocabularyTest, ThreadsShareOne) {
  VocabularyBuilder builder({true, true, true, true, true, true, true});
  const std::string texts[] = {"Red shoes 12mm", "12,500.5/3x red", "手机 机手𠀀𠀁𠀀 ét", "#re ##"};
  for (const std::string& text : texts) ASSERT_TRUE(IsOk(builder.Add(text)));
  WriteAndOpen(builder, 1, kNoLimit, 7);
  std::vector<std::vector<int32_t>> expected;
  for (const std::string& text : texts) expected.push_back(Encode(text));
  WriteAndOpen(builder, 1, kNoLimit, 7);  // a new one, whose caches are empty
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 100; ++i) EXPECT_EQ(Encode(texts[(thread + i) % 4]), expected[(thread + i) % 4]);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(VocabularyTest, OtherFilesAreRefused) {
  EXPECT_EQ(Open().code(), StatusCode::kNotFound);
  PackedFileWriter items(path_, "items");
  ASSERT_TRUE(IsOk(items.Open()));
  ASSERT_TRUE(IsOk(items.Finish()));
  EXPECT_EQ(Open().code(), StatusCode::kFailedPrecondition);
}

TEST_F(VocabularyTest, EveryFlippedByteIsRefused) {
  ASSERT_TRUE(IsOk(SmallBuilder().Write(path_, 1, kNoLimit, 2)));
  const std::string bytes = ReadBytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string flipped = bytes;
    flipped[i] ^= 0x41;
    WriteBytes(flipped);
    const Status status = Open();
    ASSERT_FALSE(status.ok()) << i;
    ASSERT_TRUE(Contains(status.message(), path_));
  }
}

// Files whose checksums are right and whose content is not.
class LyingVocabularyTest : public VocabularyTest {
 protected:
  std::vector<int64_t> meta_ = {1, 2};
  std::string config_ = OnlyWords().Serialize();
  std::string token_bytes_ = "abc";
  std::vector<uint64_t> token_offsets_ = {0, 1, 3};
  std::vector<int64_t> counts_ = {5, 4};
  std::vector<uint64_t> hash_table_ = {0, 0, 0, 0};

  Status WriteAndOpenLie() {
    PackedFileWriter writer(path_, "vocabulary");
    DPSR_RETURN_IF_ERROR(writer.Open());
    DPSR_RETURN_IF_ERROR(writer.Add("meta", DataType::kInt64, meta_.data(), meta_.size() * 8));
    DPSR_RETURN_IF_ERROR(writer.Add("config", DataType::kUint8, config_.data(), config_.size()));
    DPSR_RETURN_IF_ERROR(writer.Add("token_bytes", DataType::kUint8, token_bytes_.data(), token_bytes_.size()));
    DPSR_RETURN_IF_ERROR(writer.Add("token_offsets", DataType::kUint64, token_offsets_.data(),
                                    token_offsets_.size() * 8));
    DPSR_RETURN_IF_ERROR(writer.Add("counts", DataType::kInt64, counts_.data(), counts_.size() * 8));
    DPSR_RETURN_IF_ERROR(writer.Add("hash_table", DataType::kUint64, hash_table_.data(), hash_table_.size() * 8));
    DPSR_RETURN_IF_ERROR(writer.Finish());
    return Open();
  }
  void ExpectRefused(StatusCode code, std::string_view part) {
    const Status status = WriteAndOpenLie();
    EXPECT_EQ(status.code(), code);
    EXPECT_TRUE(Contains(status.message(), part));
    EXPECT_TRUE(Contains(status.message(), path_));
  }
};

TEST_F(LyingVocabularyTest, TruthIsAccepted) { EXPECT_TRUE(IsOk(WriteAndOpenLie())); }

TEST_F(LyingVocabularyTest, Meta) {
  meta_ = {};
  ExpectRefused(StatusCode::kDataLoss, "\"meta\" is empty");
  meta_ = {1};
  ExpectRefused(StatusCode::kDataLoss, "has 1 numbers, expected 2");
  meta_ = {2, 0, 0};
  ExpectRefused(StatusCode::kFailedPrecondition, "layout version 2, this build reads version 1");
  meta_ = {1, -1};
  ExpectRefused(StatusCode::kDataLoss, "-1 buckets");
  meta_ = {1, INT64_MAX};
  ExpectRefused(StatusCode::kDataLoss, "buckets");
  meta_ = {1, INT32_MAX - 1};
  ExpectRefused(StatusCode::kDataLoss, "expected at most 2147483647 ids");
}

TEST_F(LyingVocabularyTest, Config) {
  config_ = "tokenizer_version=1\nstem=1\n";
  ExpectRefused(StatusCode::kDataLoss, "unknown key \"stem\"");
  config_ = "tokenizer_version=7\n";
  ExpectRefused(StatusCode::kFailedPrecondition, "tokenizer_version is \"7\"");
}

TEST_F(LyingVocabularyTest, Sizes) {
  token_offsets_ = {};
  ExpectRefused(StatusCode::kDataLoss, "0 token offsets for 2 counts");
  token_offsets_ = {0, 1, 3, 3};
  ExpectRefused(StatusCode::kDataLoss, "4 token offsets for 2 counts");
  token_offsets_ = {0, 1, 3};
  hash_table_ = {};
  ExpectRefused(StatusCode::kDataLoss, "a hash table of 0 slots");
  hash_table_ = {0, 0, 0};
  ExpectRefused(StatusCode::kDataLoss, "a hash table of 3 slots");
}

TEST_F(LyingVocabularyTest, OffsetsOutsideGiveNoToken) {
  token_offsets_ = {0, UINT64_MAX, 3};
  ASSERT_TRUE(IsOk(WriteAndOpenLie()));
  EXPECT_EQ(vocabulary_->Token(0), "");
  EXPECT_EQ(vocabulary_->Token(1), "");
  token_offsets_ = {2, 1, 4};
  ASSERT_TRUE(IsOk(WriteAndOpenLie()));
  EXPECT_EQ(vocabulary_->Token(0), "");
  EXPECT_EQ(vocabulary_->Token(1), "");
}

TEST_F(LyingVocabularyTest, SlotsOfNoTokenAreSkipped) {
  // Token() is empty for ids that do not exist: the empty string must not find them.
  const uint64_t tag = XXH3_64bits("", 0) >> 32 << 32;
  hash_table_ = {tag | 3, tag | 100, tag | UINT32_MAX, tag | 0x80000000};
  meta_ = {1, 0};
  ASSERT_TRUE(IsOk(WriteAndOpenLie()));
  EXPECT_EQ(vocabulary_->Lookup(""), -1);
}

TEST_F(LyingVocabularyTest, LookupEndsInAFullTable) {
  hash_table_ = {~uint64_t{0}, 1, uint64_t{1} << 32, 3};
  ASSERT_TRUE(IsOk(WriteAndOpenLie()));
  for (int i = 0; i < 1000; ++i) {
    const int32_t id = vocabulary_->Lookup(StrCat("t", i));
    EXPECT_GE(id, 2);
    EXPECT_LT(id, 4);
  }
}

}  // namespace
}  // namespace dpsr
