// Assertions and fixtures for the C++ tests of all folders.
#ifndef DPSR_COMMON_TEST_UTIL_H_
#define DPSR_COMMON_TEST_UTIL_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

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
  size_t FilesInDirectory() const {
    return std::distance(std::filesystem::directory_iterator(directory_), std::filesystem::directory_iterator());
  }

  std::string directory_;
  std::string path_;
};

}  // namespace dpsr

#endif  // DPSR_COMMON_TEST_UTIL_H_
