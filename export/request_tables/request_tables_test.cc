#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "dpsr_tf/ops/permutation.h"
#include "export/request_tables/file_fingerprint.h"
#include "export/request_tables/key_table.h"
#include "common/test_util.h"

namespace dpsr {
namespace {

std::string TempPath(const std::string& name) { return testing::TempDir() + "/request_tables_test_" + name; }

void Write(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// What hashlib.blake2b(key, digest_size=8) gives, as dpsr_tf/data/encode.py takes it.
TEST(KeyIdTest, EqualsHashlib) {
  EXPECT_EQ(KeyId(""), 7252660547403494068);
  EXPECT_EQ(KeyId("sku-1"), 5596144926642894054);
  EXPECT_EQ(KeyId("手机"), 8828379026775584957);
  EXPECT_EQ(KeyId(std::string(127, 'x')), 1040508188551303164);
  EXPECT_EQ(KeyId(std::string(128, 'x')), 1161052895217525762) << "a whole block";
  EXPECT_EQ(KeyId(std::string(129, 'x')), 1791892490181060003);
  EXPECT_EQ(KeyId(std::string(300, 'y')), 9172024340984245241);
}

TEST(TrimmedTest, WhiteSpaceOfUnicodeAtBothEnds) {
  EXPECT_EQ(Trimmed("a b"), "a b");
  EXPECT_EQ(Trimmed("\t\n a b\r\v\f\x1c\x1f "), "a b");
  EXPECT_EQ(Trimmed("\u3000\u00a0\u0085\u1680手\u3000机\u2000\u200a\u2028\u2029\u202f\u205f\u3000"), "手\u3000机");
  EXPECT_EQ(Trimmed("\u200b"), "\u200b") << "no white space";
  EXPECT_EQ(Trimmed(" \u3000 "), "");
  EXPECT_EQ(Trimmed("\xe3\x80"), "\xe3\x80") << "a piece of one";
  EXPECT_EQ(Trimmed(""), "");
}

class KeyTableTest : public testing::Test {
 protected:
  // Writes a table of these keys; codes are 10, 11, ... or left out.
  void WriteTable(const std::vector<std::string>& keys, bool codes) {
    std::vector<int64_t> ids, splits{0};
    std::string bytes;
    std::vector<int32_t> code;
    for (const std::string& key : keys) {
      ids.push_back(KeyId(key));
      bytes += key;
      splits.push_back(static_cast<int64_t>(bytes.size()));
      code.push_back(10 + static_cast<int32_t>(code.size()));
    }
    int bits = 0;
    while ((size_t{1} << bits) < keys.size()) ++bits;
    std::vector<int32_t> bucket_splits{0}, rows;
    for (uint64_t bucket = 0; bucket < uint64_t{1} << bits; ++bucket) {
      for (size_t row = 0; row < ids.size(); ++row) {
        if ((bits == 0 ? 0 : Mix64(static_cast<uint64_t>(ids[row])) >> (64 - bits)) == bucket) {
          rows.push_back(static_cast<int32_t>(row));
        }
      }
      bucket_splits.push_back(static_cast<int32_t>(rows.size()));
    }
    PackedFileWriter writer(path_, "keys");
    ASSERT_TRUE(IsOk(writer.Open()));
    ASSERT_TRUE(IsOk(writer.Add("id", DataType::kInt64, ids.data(), ids.size() * 8)));
    ASSERT_TRUE(IsOk(writer.Add("id_index.splits", DataType::kInt32, bucket_splits.data(), bucket_splits.size() * 4)));
    ASSERT_TRUE(IsOk(writer.Add("id_index.rows", DataType::kInt32, rows.data(), rows.size() * 4)));
    ASSERT_TRUE(IsOk(writer.Add("key.splits", DataType::kInt64, splits.data(), splits.size() * 8)));
    ASSERT_TRUE(IsOk(writer.Add("key.bytes", DataType::kUint8, bytes.data(), bytes.size())));
    if (codes) {
      ASSERT_TRUE(IsOk(writer.Add("code", DataType::kInt32, code.data(), code.size() * 4)));
    }
    ASSERT_TRUE(IsOk(writer.Finish()));
  }

  const std::string path_ = TempPath("keys.dpsr");
  std::unique_ptr<KeyTable> table_;
};

TEST_F(KeyTableTest, FindsEveryKeyAndNoOther) {
  std::vector<std::string> keys;
  for (int i = 0; i < 1000; ++i) keys.push_back(StrCat("sku-", i, i % 7 == 0 ? "手机" : ""));
  WriteTable(keys, /*codes=*/true);
  ASSERT_TRUE(IsOk(KeyTable::Open(path_, &table_)));
  ASSERT_EQ(table_->size(), 1000);
  for (int i = 0; i < 1000; ++i) {
    const int32_t row = table_->Find(keys[i]);
    ASSERT_EQ(row, i);
    EXPECT_EQ(table_->key(row), keys[i]);
    EXPECT_EQ(table_->code(row), 10 + i);
    EXPECT_EQ(table_->FindId(KeyId(keys[i])), i);
    EXPECT_EQ(table_->Find(keys[i] + " "), -1);
  }
  EXPECT_EQ(table_->Find(""), -1);
  EXPECT_EQ(table_->FindId(5), -1);
}

TEST_F(KeyTableTest, AnEmptyTableAndOneWithoutCodes) {
  WriteTable({}, /*codes=*/true);
  ASSERT_TRUE(IsOk(KeyTable::Open(path_, &table_)));
  EXPECT_EQ(table_->Find("a"), -1);
  WriteTable({"a"}, /*codes=*/false);
  ASSERT_TRUE(IsOk(KeyTable::Open(path_, &table_)));
  EXPECT_EQ(table_->code(table_->Find("a")), 0);
}

TEST_F(KeyTableTest, DamagedFilesAreRefused) {
  WriteTable({"a", "bc"}, /*codes=*/true);
  std::ifstream file(path_, std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(file)), {});
  for (size_t at = 64; at < good.size(); at += 3) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x40);
    Write(path_, bad);
    const Status status = KeyTable::Open(path_, &table_);
    // Padding between sections is checked with the section before it.
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << at << ": " << status.message();
  }
  Write(path_, good.substr(0, good.size() - 1));
  EXPECT_EQ(KeyTable::Open(path_, &table_).code(), StatusCode::kDataLoss);
  std::remove(path_.c_str());
  EXPECT_EQ(KeyTable::Open(path_, &table_).code(), StatusCode::kNotFound);
}

TEST(FileFingerprintTest, TellsContentsAndSizes) {
  const std::string path = TempPath("file");
  const auto fingerprint = [&](const std::string& bytes) {
    Write(path, bytes);
    std::string found;
    EXPECT_TRUE(IsOk(FileFingerprint(path, &found)));
    return found;
  };
  const std::string empty = fingerprint("");
  EXPECT_EQ(empty.size(), 16u);
  EXPECT_NE(empty, fingerprint(std::string(1, '\0')));
  const std::string text(200'000, 'a');
  const std::string whole = fingerprint(text);
  EXPECT_EQ(whole, fingerprint(text));
  for (const size_t at : {size_t{0}, size_t{65'535}, size_t{65'536}, size_t{131'072}, text.size() - 1}) {
    std::string other = text;
    other[at] = 'b';
    EXPECT_NE(whole, fingerprint(other)) << at;
  }
  std::remove(path.c_str());
  std::string found;
  EXPECT_EQ(FileFingerprint(path, &found).code(), StatusCode::kNotFound);
}

// A sparse file of 1 GiB: the first and the last block count, and the time is that of 64 MiB.
TEST(FileFingerprintTest, LargeFilesAreSampled) {
  const std::string path = TempPath("large");
  const auto fingerprint = [&](int64_t at) {
    std::ofstream file(path, std::ios::binary);
    file.seekp((int64_t{1} << 30) - 1).put('\0');
    file.seekp(at).put('x');
    file.close();
    std::string found;
    EXPECT_TRUE(IsOk(FileFingerprint(path, &found)));
    return found;
  };
  const std::string first = fingerprint(0), last = fingerprint((int64_t{1} << 30) - 1);
  EXPECT_NE(first, last);
  EXPECT_NE(first, fingerprint(5));
  std::remove(path.c_str());
}

}  // namespace
}  // namespace dpsr
