// Runs against the FAISS library that the environment variable FAISS_LIBRARY names. DPSR_WRONG_VERSION_FAISS names a
// library that claims to be another version.
#include "export/faiss_binding/faiss_library.h"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

TEST(FaissLibraryTest, LoadsOnceFromTheEnvironment) {
  const FaissLibrary* first = nullptr;
  const FaissLibrary* second = nullptr;
  const Status status = FaissLibrary::Get(&first);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_TRUE(FaissLibrary::Get(&second).ok());
  EXPECT_EQ(first, second);
  EXPECT_EQ(first->path(), Environment("FAISS_LIBRARY"));
}

TEST(FaissLibraryTest, RefusesAnotherVersion) {
  const std::string path = Environment("DPSR_WRONG_VERSION_FAISS");
  std::unique_ptr<FaissLibrary> library;
  const Status status = FaissLibrary::Load(path, &library);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(library, nullptr);
  for (const std::string& part : std::vector<std::string>{path, "9.8.7", "1.15.1 is needed", "install"}) {
    EXPECT_NE(status.message().find(part), std::string::npos) << part << " in " << status.message();
  }
}

TEST(FaissLibraryTest, RefusesWhatIsNoFaiss) {
  std::unique_ptr<FaissLibrary> library;
  const Status missing = FaissLibrary::Load("/no/such/libfaiss.so", &library);
  EXPECT_EQ(missing.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(missing.message().find("/no/such/libfaiss.so"), std::string::npos) << missing.message();
  const Status other = FaissLibrary::Load("libm.so.6", &library);
  EXPECT_EQ(other.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(other.message().find("does not export"), std::string::npos) << other.message();
  EXPECT_EQ(library, nullptr);
}

}  // namespace
}  // namespace dpsr
