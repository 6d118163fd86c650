#include "export/fresh_items/change_log.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "common/test_util.h"

namespace dpsr {
namespace {

std::string Name(int64_t first, int64_t end) {
  char name[64];
  std::snprintf(name, sizeof(name), "%020lld-%020lld.dpsr", static_cast<long long>(first), static_cast<long long>(end));
  return name;
}

class ChangeLogTest : public FileTest {
 protected:
  // Writes the changes [first, end): change i puts the item 100 + i with the example "example i".
  std::string WriteSegment(int64_t first, int64_t end, bool keys = false, uint8_t kind = 0) const {
    const std::string path = directory_ + "/" + Name(first, end);
    std::vector<uint8_t> kinds;
    std::vector<int64_t> ids, versions, splits{0};
    std::vector<double> times;
    std::string examples;
    for (int64_t i = first; i < end; ++i) {
      kinds.push_back(kind);
      ids.push_back(100 + i);
      versions.push_back(i);
      times.push_back(1e9 + static_cast<double>(i));
      examples += StrCat("example ", i);
      splits.push_back(static_cast<int64_t>(examples.size()));
    }
    PackedFileWriter writer(path, "item_changes");
    EXPECT_TRUE(IsOk(writer.Open()));
    EXPECT_TRUE(IsOk(writer.Add("kind", DataType::kUint8, kinds.data(), kinds.size())));
    EXPECT_TRUE(IsOk(writer.Add("id", DataType::kInt64, ids.data(), 8 * ids.size())));
    EXPECT_TRUE(IsOk(writer.Add("version", DataType::kInt64, versions.data(), 8 * versions.size())));
    EXPECT_TRUE(IsOk(writer.Add("time", DataType::kFloat64, times.data(), 8 * times.size())));
    for (const char* name : {"key", "example"}) {
      if (std::string(name) == "key" && !keys) continue;
      EXPECT_TRUE(IsOk(writer.Add(StrCat(name, ".splits"), DataType::kInt64, splits.data(), 8 * splits.size())));
      EXPECT_TRUE(IsOk(writer.Add(StrCat(name, ".bytes"), DataType::kUint8, examples.data(), examples.size())));
    }
    EXPECT_TRUE(IsOk(writer.Finish()));
    return path;
  }

  // Reads from `offset` on and expects the changes [offset, next).
  void ExpectRead(ChangeLogReader* reader, int64_t offset, int64_t max_changes, int64_t next) const {
    ItemChanges changes;
    ASSERT_TRUE(IsOk(reader->Read(offset, max_changes, &changes)));
    EXPECT_EQ(changes.next_offset, next);
    ASSERT_EQ(changes.item_ids.size(), static_cast<size_t>(next - offset));
    for (int64_t i = offset; i < next; ++i) {
      const auto row = static_cast<size_t>(i - offset);
      EXPECT_EQ(changes.item_ids[row], 100 + i);
      EXPECT_EQ(changes.versions[row], i);
      EXPECT_EQ(changes.times[row], 1e9 + static_cast<double>(i));
      EXPECT_EQ(changes.examples[row], StrCat("example ", i));
    }
  }

  void ExpectDataLoss(int64_t offset, const std::string& part) const {
    ChangeLogReader reader(directory_);
    ItemChanges changes;
    const Status status = reader.Read(offset, 100, &changes);
    EXPECT_EQ(status.code(), StatusCode::kDataLoss);
    EXPECT_TRUE(Contains(status.message(), part));
  }
};

TEST_F(ChangeLogTest, ReadsAcrossSegmentsUpToTheLimit) {
  WriteSegment(0, 3);
  WriteSegment(3, 4);
  WriteSegment(4, 10);
  ChangeLogReader reader(directory_);
  ExpectRead(&reader, 0, 100, 10);
  ExpectRead(&reader, 0, 2, 2);
  ExpectRead(&reader, 2, 3, 5);
  ExpectRead(&reader, 9, 1, 10);
  ExpectRead(&reader, 10, 100, 10);
}

TEST_F(ChangeLogTest, NewSegmentsAreSeenAtOnce) {
  ChangeLogReader reader(directory_);
  ExpectRead(&reader, 0, 100, 0);
  for (int64_t i = 0; i < 20; ++i) {
    WriteSegment(i, i + 1);
    ExpectRead(&reader, i, 100, i + 1);
  }
}

TEST_F(ChangeLogTest, NoDirectoryIsAnEmptyLog) {
  ChangeLogReader reader(directory_ + "/item_changes");
  ExpectRead(&reader, 7, 100, 7);
  std::filesystem::create_directory(directory_ + "/item_changes");
  ExpectRead(&reader, 7, 100, 7);
  ChangeLogReader none("");
  ExpectRead(&none, 7, 100, 7);
}

TEST_F(ChangeLogTest, OtherFilesAreIgnored) {
  WriteSegment(0, 2);
  std::ofstream(directory_ + "/lock") << "";
  std::ofstream(directory_ + "/" + Name(2, 4) + ".tmp.17.0") << "half";
  std::ofstream(directory_ + "/2-4.dpsr") << "short name";
  std::ofstream(directory_ + "/" + Name(4, 4)) << "empty";
  // Offsets that are not numbers, or that int64 does not hold.
  std::ofstream(directory_ + "/0000000000000000000x-00000000000000000004.dpsr") << "letter";
  std::ofstream(directory_ + "/00000000000000000002-09999999999999999999.dpsr") << "large";
  std::ofstream(directory_ + "/00000000000000000002-10000000000000000000.dpsr") << "larger";
  ChangeLogReader reader(directory_);
  ExpectRead(&reader, 0, 100, 2);
}

TEST_F(ChangeLogTest, ReadsKeys) {
  WriteSegment(0, 2, /*keys=*/true);
  WriteSegment(2, 3);
  ChangeLogReader reader(directory_);
  ItemChanges changes;
  ASSERT_TRUE(IsOk(reader.Read(0, 100, &changes)));
  EXPECT_EQ(changes.keys, (std::vector<std::string>{"example 0", "example 1", ""}));
}

TEST_F(ChangeLogTest, AnyDamagedByteStopsTheLogBeforeItsSegment) {
  WriteSegment(0, 2);
  const std::string damaged = WriteSegment(2, 5);
  WriteSegment(5, 6);
  std::string bytes;
  {
    std::ifstream in(damaged, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  for (size_t place = 0; place < bytes.size(); place += 29) {
    std::string other = bytes;
    other[place] = static_cast<char>(other[place] ^ 0x10);
    std::ofstream(damaged, std::ios::binary) << other;
    ChangeLogReader reader(directory_);
    ExpectRead(&reader, 0, 100, 2);
    ItemChanges changes;
    const Status status = reader.Read(2, 100, &changes);
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << place;
    EXPECT_TRUE(Contains(status.message(), damaged));
  }
  for (size_t length = 0; length < bytes.size(); length += 150) {
    std::ofstream(damaged, std::ios::binary) << bytes.substr(0, length);
    ExpectDataLoss(2, damaged);
  }
  // The reader goes on when the segment is whole again.
  ChangeLogReader reader(directory_);
  ItemChanges changes;
  ASSERT_FALSE(reader.Read(2, 100, &changes).ok());
  std::ofstream(damaged, std::ios::binary) << bytes;
  ExpectRead(&reader, 2, 100, 6);
}

TEST_F(ChangeLogTest, GapsAndOtherLogsAreNamed) {
  const std::string first = WriteSegment(4, 6);
  const std::string last = WriteSegment(8, 9);
  ExpectDataLoss(0, "the changes 0 to 3 are missing, before " + first);
  ExpectDataLoss(6, "the changes 6 to 7 are missing, between " + first + " and " + last);
  ExpectDataLoss(7, "the changes 7 to 7 are missing");
  ExpectDataLoss(10, "ends at the change 9");
}

TEST_F(ChangeLogTest, ContentThatDoesNotFitTheNameIsRefused) {
  const std::string segment = WriteSegment(0, 2);
  std::filesystem::rename(segment, directory_ + "/" + Name(0, 3));
  ExpectDataLoss(0, "expected 3 of each");
  WriteSegment(0, 3, false, kNumItemChangeKinds);
  ExpectDataLoss(0, "expected a kind from 0 to 2");
}

TEST_F(ChangeLogTest, WrongArguments) {
  ChangeLogReader reader(directory_);
  ItemChanges changes;
  EXPECT_EQ(reader.Read(-1, 100, &changes).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(reader.Read(0, 0, &changes).code(), StatusCode::kInvalidArgument);
}

TEST_F(ChangeLogTest, ThreadsShareAReader) {
  for (int64_t i = 0; i < 8; ++i) WriteSegment(i * 10, i * 10 + 10);
  ChangeLogReader reader(directory_);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < 4; ++begin) {
    threads.emplace_back([&, begin] {
      for (int64_t offset = begin; offset < 80; offset += 7) ExpectRead(&reader, offset, 7, std::min<int64_t>(offset + 7, 80));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ChangeLogDirectoryTest, IsBesideTheVersions) {
  EXPECT_EQ(ChangeLogDirectory("/base/3/assets/item_ids.dpsr", 3), "/base/item_changes");
  EXPECT_EQ(ChangeLogDirectory("/out/shard-0-of-2/3/assets/item_ids.dpsr", 4), "/out/item_changes");
  EXPECT_EQ(ChangeLogDirectory("/base/../base/./00000003/assets/item_ids.dpsr", 3), "/base/item_changes");
  EXPECT_EQ(ChangeLogDirectory("base/3/assets/item_ids.dpsr", 3),
            (std::filesystem::current_path() / "base/item_changes").string());
}

TEST(ChangeLogDirectoryTest, OnlyAVersionHasALog) {
  EXPECT_EQ(ChangeLogDirectory("/base/.3.unfinished/assets/item_ids.dpsr", 3), "");
  EXPECT_EQ(ChangeLogDirectory("/base/copy/assets/item_ids.dpsr", 3), "");
  EXPECT_EQ(ChangeLogDirectory("gs://bucket/base/3/assets/item_ids.dpsr", 3), "");
  EXPECT_EQ(ChangeLogDirectory("/item_ids.dpsr", 3), "");
}

}  // namespace
}  // namespace dpsr
