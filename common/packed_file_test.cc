#include "common/packed_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "common/test_util.h"

namespace dpsr {
namespace {

class PackedFileTest : public FileTest {
 protected:
  // ids int64 [3], names uint8 [5], empty float32 [0].
  void WriteSmall() {
    const std::vector<int64_t> ids = {7, -1, int64_t{1} << 40};
    PackedFileWriter writer(path_, "items");
    ASSERT_TRUE(IsOk(writer.Open()));
    ASSERT_TRUE(IsOk(writer.Add("ids", DataType::kInt64, ids.data(), 3 * sizeof(int64_t))));
    ASSERT_TRUE(IsOk(writer.Add("names", DataType::kUint8, "hello", 5)));
    ASSERT_TRUE(IsOk(writer.Add("empty", DataType::kFloat32, nullptr, 0)));
    ASSERT_TRUE(IsOk(writer.Finish()));
  }

  // Makes the checksums of table and header right again after an edit: the checks behind them must hold too.
  static void Seal(std::string* bytes) {
    uint64_t table_offset;
    std::memcpy(&table_offset, bytes->data() + 16, 8);
    if (table_offset <= bytes->size()) {
      const uint64_t table = XXH3_64bits(bytes->data() + table_offset, bytes->size() - table_offset);
      std::memcpy(bytes->data() + 48, &table, 8);
    }
    const uint64_t header = XXH3_64bits(bytes->data(), 56);
    std::memcpy(bytes->data() + 56, &header, 8);
  }
  Status Open(bool verify = true, const std::string& kind = "items") {
    return PackedFile::Open(path_, kind, verify, &file_);
  }

  std::unique_ptr<PackedFile> file_;
};

TEST_F(PackedFileTest, ReadsBackWhatWasWritten) {
  WriteSmall();
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_EQ(file_->kind(), "items");
  EXPECT_EQ(file_->path(), path_);
  ASSERT_EQ(file_->sections().size(), 3u);
  Span<const int64_t> ids;
  ASSERT_TRUE(IsOk(file_->Get("ids", &ids)));
  EXPECT_EQ(std::vector<int64_t>(ids.begin(), ids.end()), (std::vector<int64_t>{7, -1, int64_t{1} << 40}));
  Span<const uint8_t> names;
  ASSERT_TRUE(IsOk(file_->Get("names", &names)));
  EXPECT_EQ(std::string(names.begin(), names.end()), "hello");
  Span<const float> empty;
  ASSERT_TRUE(IsOk(file_->Get("empty", &empty)));
  EXPECT_TRUE(empty.empty());
  for (const PackedFile::Section& section : file_->sections()) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(section.data) % 64, 0u) << section.name;
  }
  EXPECT_EQ(FilesInDirectory(), 1u) << "no temporary file stays";
}

TEST_F(PackedFileTest, FileWithoutSections) {
  PackedFileWriter writer(path_, "items");
  ASSERT_TRUE(IsOk(writer.Open()));
  ASSERT_TRUE(IsOk(writer.Finish()));
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_TRUE(file_->sections().empty());
}

TEST_F(PackedFileTest, StreamedSectionEqualsWholeSection) {
  std::vector<int32_t> values(1000003);  // beyond the write buffer
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i * 2654435761u);
  const auto write = [&](size_t piece) {
    PackedFileWriter writer(path_, "items");
    EXPECT_TRUE(IsOk(writer.Open()));
    EXPECT_TRUE(IsOk(writer.Begin("values", DataType::kInt32)));
    for (size_t i = 0; i < values.size(); i += piece) {
      EXPECT_TRUE(IsOk(writer.Append(values.data() + i, std::min(piece, values.size() - i) * 4)));
    }
    EXPECT_TRUE(IsOk(writer.Add("after", DataType::kUint8, "x", 1)));
    EXPECT_TRUE(IsOk(writer.Finish()));
    return ReadBytes();
  };
  const std::string whole = write(values.size());
  ASSERT_TRUE(IsOk(Open()));
  const uint64_t fingerprint = file_->fingerprint();
  Span<const int32_t> read;
  ASSERT_TRUE(IsOk(file_->Get("values", &read)));
  ASSERT_EQ(read.size(), values.size());
  EXPECT_EQ(std::memcmp(read.data(), values.data(), values.size() * 4), 0);
  EXPECT_EQ(write(997), whole);
  values[values.size() / 2] ^= 1;
  write(997);
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_NE(file_->fingerprint(), fingerprint);
}

TEST_F(PackedFileTest, EveryTruncationIsDetected) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  for (size_t size = 0; size < bytes.size(); ++size) {
    WriteBytes(bytes.substr(0, size));
    const Status status = Open(/*verify=*/false);
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << size;
    ASSERT_TRUE(Contains(status.message(), path_));
  }
  WriteBytes(bytes + '\0');
  EXPECT_EQ(Open(/*verify=*/false).code(), StatusCode::kDataLoss);
}

TEST_F(PackedFileTest, EveryBitFlipIsDetected) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = bytes;
      flipped[i] ^= static_cast<char>(1 << bit);
      WriteBytes(flipped);
      const Status status = Open();
      ASSERT_FALSE(status.ok()) << "byte " << i << " bit " << bit;
      ASSERT_TRUE(Contains(status.message(), path_));
      // 8 to 11 is the version: such a file might be a newer one.
      ASSERT_EQ(status.code(), i >= 8 && i < 12 ? StatusCode::kFailedPrecondition : StatusCode::kDataLoss) << i;
    }
  }
}

// A file that lies under correct checksums may be refused or opened, but all that it opens to lies in the file.
TEST_F(PackedFileTest, LyingFileStaysInBounds) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  uint64_t table;
  std::memcpy(&table, bytes.data() + 16, 8);
  std::vector<size_t> fields = {12, 16, 24};
  for (size_t entry = table; entry < bytes.size(); entry += 64) {
    for (size_t field : {32, 36, 40, 48}) fields.push_back(entry + field);
  }
  const uint64_t lies[] = {0, 1, 3, 63, 64, 65, 128, bytes.size(), uint64_t{1} << 32, uint64_t{1} << 63,
                           ~uint64_t{0}, ~uint64_t{0} - 63, ~uint64_t{0} - 127};
  for (size_t field : fields) {
    for (uint64_t lie : lies) {
      std::string edited = bytes;
      std::memcpy(edited.data() + field, &lie, field % 8 == 4 || (field - table) % 64 == 32 ? 4 : 8);
      Seal(&edited);
      WriteBytes(edited);
      if (edited == bytes) continue;
      file_.reset();
      const Status status = Open(/*verify=*/false);
      if (!status.ok()) {
        ASSERT_TRUE(Contains(status.message(), path_));
        continue;
      }
      const char* begin = static_cast<const char*>(file_->sections().front().data) - 64;
      for (const PackedFile::Section& section : file_->sections()) {
        const char* data = static_cast<const char*>(section.data);
        ASSERT_GE(data, begin + 64);
        ASSERT_LE(data + section.bytes, begin + bytes.size());
      }
    }
  }
}

TEST_F(PackedFileTest, OpensMemoryThatSomebodyElseHolds) {
  WriteSmall();
  const auto bytes = std::make_shared<std::vector<char>>();
  {
    const std::string read = ReadBytes();
    bytes->assign(read.begin(), read.end());
  }
  ASSERT_EQ(reinterpret_cast<uintptr_t>(bytes->data()) % 8, 0u);
  const auto open = [&](const char* data, size_t size) {
    return PackedFile::OpenMemory("ram://small", "items", /*verify=*/true, bytes, data, size, &file_);
  };
  ASSERT_TRUE(IsOk(open(bytes->data(), bytes->size())));
  EXPECT_EQ(file_->path(), "ram://small");
  EXPECT_GT(bytes.use_count(), 1) << "held as long as the file lives";
  Span<const int64_t> ids;
  ASSERT_TRUE(IsOk(file_->Get("ids", &ids)));
  EXPECT_EQ(ids[2], int64_t{1} << 40);
  file_.reset();
  EXPECT_EQ(bytes.use_count(), 1);

  for (size_t size = 0; size < bytes->size(); ++size) {
    const Status status = open(bytes->data(), size);
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << size;
    ASSERT_TRUE(Contains(status.message(), "ram://small"));
  }
  EXPECT_EQ(open(nullptr, 0).code(), StatusCode::kDataLoss);
  EXPECT_EQ(open(bytes->data() + 4, bytes->size() - 4).code(), StatusCode::kInvalidArgument);
}

// A flip in a section is found when that section is verified, and by no other.
TEST_F(PackedFileTest, SectionsAreVerifiedOneByOne) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  for (const auto& [offset, name] : {std::pair<size_t, const char*>{64, "ids"}, {87, "ids"}, {90, "ids"},
                                     {128, "names"}, {132, "names"}, {140, "names"}}) {
    std::string flipped = bytes;
    flipped[offset] ^= 1;
    WriteBytes(flipped);
    ASSERT_TRUE(IsOk(Open(/*verify=*/false)));
    for (const PackedFile::Section& section : file_->sections()) {
      const Status status = file_->Verify(section);
      ASSERT_EQ(status.ok(), section.name != name) << offset << ' ' << section.name;
      if (!status.ok()) {
        EXPECT_EQ(status.code(), StatusCode::kDataLoss);
        EXPECT_TRUE(Contains(status.message(), path_));
        EXPECT_TRUE(Contains(status.message(), StrCat("section \"", name, "\" (byte ")));
      }
    }
  }
}

TEST_F(PackedFileTest, TableThatIsNotCanonicalIsRefused) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  const size_t table = bytes.size() - 3 * 64;
  // Offset in the table, and what to write there.
  const std::pair<size_t, char> edits[] = {{0, '\0'}, {10, 'x'}, {32, 99}, {36, 1},
                                           {40, 65},  {48, 23},  {48, 0},  {64, 0}};
  for (const auto& [offset, value] : edits) {
    std::string edited = bytes;
    edited[table + offset] = value;
    Seal(&edited);
    WriteBytes(edited);
    const Status status = Open();
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << offset;
    EXPECT_TRUE(Contains(status.message(), offset == 48 ? "the file is corrupt" : "of the section table")) << offset;
  }
  std::string twice = bytes;
  twice.replace(table + 64, 32, bytes, table, 32);
  Seal(&twice);
  WriteBytes(twice);
  EXPECT_TRUE(Contains(Open().message(), "entry 1 of the section table (\"ids\""));
}

TEST_F(PackedFileTest, NamesAndTypesAreChecked) {
  WriteSmall();
  ASSERT_TRUE(IsOk(Open()));
  Span<const int32_t> wrong;
  Status status = file_->Get("ids", &wrong);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_TRUE(Contains(status.message(), "section \"ids\" is int64, expected int32"));
  status = file_->Get("prices", &wrong);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_TRUE(Contains(status.message(), "no section \"prices\" (it has: ids, names, empty)"));
  EXPECT_EQ(file_->Find("prices"), nullptr);
}

TEST_F(PackedFileTest, KindIsChecked) {
  WriteSmall();
  const Status status = Open(true, "users");
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Contains(status.message(), "kind \"items\", expected \"users\""));
  EXPECT_TRUE(IsOk(Open(true, "")));
}

TEST_F(PackedFileTest, OtherVersionIsNamed) {
  WriteSmall();
  std::string bytes = ReadBytes();
  bytes[8] = 9;
  Seal(&bytes);
  WriteBytes(bytes);
  const Status status = Open();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Contains(status.message(), "format version 9, this build reads version 1"));
}

TEST_F(PackedFileTest, WhatIsNoFile) {
  EXPECT_EQ(Open().code(), StatusCode::kNotFound);
  path_ = directory_;
  EXPECT_EQ(Open().code(), StatusCode::kDataLoss);
  PackedFileWriter writer(directory_ + "/missing/file.dpsr", "items");
  const Status status = writer.Open();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Contains(status.message(), "missing/file.dpsr"));
  EXPECT_EQ(writer.Finish().message(), status.message()) << "the first failure stays";
}

TEST_F(PackedFileTest, WriterRefusesBadArguments) {
  PackedFileWriter writer(path_, "items");
  EXPECT_EQ(writer.Finish().code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(IsOk(writer.Open()));
  EXPECT_EQ(writer.Open().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(writer.Append("x", 1).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(writer.Add("ids", DataType::kInt64, "12345", 5).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(writer.Add("", DataType::kUint8, "x", 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(writer.Add(std::string(32, 'n'), DataType::kUint8, "x", 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(writer.Add("bad", static_cast<DataType>(99), "x", 1).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(IsOk(writer.Add(std::string(31, 'n'), DataType::kUint8, "x", 1)));
  EXPECT_EQ(writer.Add(std::string(31, 'n'), DataType::kUint8, "x", 1).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(IsOk(writer.Finish())) << "a refused argument does not spoil the file";
  EXPECT_EQ(writer.Add("late", DataType::kUint8, "x", 1).code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(IsOk(Open()));
  EXPECT_EQ(file_->sections().size(), 1u);
  EXPECT_EQ(PackedFileWriter(path_, "").Open().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(PackedFileWriter(path_, std::string(16, 'k')).Open().code(), StatusCode::kInvalidArgument);
}

TEST_F(PackedFileTest, AbandonedWriterLeavesTheOldFile) {
  WriteSmall();
  const std::string bytes = ReadBytes();
  {
    PackedFileWriter writer(path_, "items");
    ASSERT_TRUE(IsOk(writer.Open()));
    ASSERT_TRUE(IsOk(writer.Add("other", DataType::kUint8, "x", 1)));
    EXPECT_EQ(FilesInDirectory(), 2u);
  }
  EXPECT_EQ(FilesInDirectory(), 1u);
  EXPECT_EQ(ReadBytes(), bytes);
}

TEST_F(PackedFileTest, OpenFileOutlivesItsReplacement) {
  WriteSmall();
  ASSERT_TRUE(IsOk(Open()));
  {
    PackedFileWriter writer(path_, "items");
    ASSERT_TRUE(IsOk(writer.Open()));
    ASSERT_TRUE(IsOk(writer.Finish()));
  }
  Span<const int64_t> ids;
  ASSERT_TRUE(IsOk(file_->Get("ids", &ids)));
  EXPECT_EQ(ids[0], 7);
}

}  // namespace
}  // namespace dpsr
