// Assertions and fixtures for the C++ tests of all folders.
#ifndef DPSR_COMMON_TEST_UTIL_H_
#define DPSR_COMMON_TEST_UTIL_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// For EXPECT_TRUE(IsOk(status)), which prints the message of a failure.
inline ::testing::AssertionResult IsOk(const Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << status.message();
}

// For EXPECT_TRUE(Contains(status.message(), "part")), which prints both texts on failure.
inline ::testing::AssertionResult Contains(std::string_view text, std::string_view part) {
  if (text.find(part) != std::string_view::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << text << "\" does not contain \"" << part << "\"";
}

// Gives each test a folder of its own, and the path of one file in it.
class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const ::testing::TestInfo* test = ::testing::UnitTest::GetInstance()->current_test_info();
    directory_ = StrCat(::testing::TempDir(), test->test_suite_name(), "_", test->name(), "_", getpid());
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directory(directory_);
    path_ = directory_ + "/file.dpsr";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string ReadBytes() const {
    std::ifstream in(path_, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  void WriteBytes(const std::string& bytes) const {
    std::ofstream out(path_, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  // Adds a section to a packed file.
  template <typename T>
  static void Add(PackedFileWriter* writer, const std::string& name, const std::vector<T>& values) {
    ASSERT_TRUE(IsOk(writer->Add(name, DataTypeOf<T>::value, values.data(), values.size() * sizeof(T))));
  }
  // Adds the sections NAME.splits and NAME.bytes of texts to a packed file.
  static void AddTexts(PackedFileWriter* writer, const std::string& name, const std::vector<std::string>& texts) {
    std::vector<int64_t> splits = {0};
    std::vector<uint8_t> bytes;
    for (const std::string& text : texts) {
      bytes.insert(bytes.end(), text.begin(), text.end());
      splits.push_back(static_cast<int64_t>(bytes.size()));
    }
    Add(writer, name + ".splits", splits);
    Add(writer, name + ".bytes", bytes);
  }

  size_t FilesInDirectory() const {
    return std::distance(std::filesystem::directory_iterator(directory_), std::filesystem::directory_iterator());
  }

  std::string directory_;
  std::string path_;
};

}  // namespace dpsr

#endif  // DPSR_COMMON_TEST_UTIL_H_
