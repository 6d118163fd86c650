#include "serving/wire/compression.h"

#include <gtest/gtest.h>

#include <string>

namespace dpsr::serving {
namespace {

class CompressionTest : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(All, CompressionTest, testing::Values(kGzip, kDeflate));

TEST_P(CompressionTest, UnpacksWhatItPacked) {
  ASSERT_TRUE(IsCompression(GetParam()));
  const std::string message = std::string(100'000, 'a') + "the end";
  std::string packed, unpacked;
  ASSERT_TRUE(Pack(GetParam(), message, &packed));
  EXPECT_LT(packed.size(), message.size() / 10);
  EXPECT_EQ(Unpack(GetParam(), packed, message.size(), &unpacked), UnpackResult::kOk);
  EXPECT_EQ(unpacked, message);
}

TEST_P(CompressionTest, AMessageThatDoesNotBecomeSmallerIsNotPacked) {
  std::string packed;
  EXPECT_FALSE(Pack(GetParam(), "abc", &packed));
  EXPECT_FALSE(Pack(GetParam(), "", &packed));
}

TEST_P(CompressionTest, RefusesWhatIsTooLarge) {
  const std::string message(1'000'000, 'a');
  std::string packed, unpacked;
  ASSERT_TRUE(Pack(GetParam(), message, &packed));
  EXPECT_EQ(Unpack(GetParam(), packed, message.size() - 1, &unpacked), UnpackResult::kTooLarge);
  EXPECT_EQ(unpacked.capacity(), std::string().capacity());
}

TEST_P(CompressionTest, RefusesWhatIsBroken) {
  const std::string message(1000, 'a');
  std::string packed, unpacked;
  ASSERT_TRUE(Pack(GetParam(), message, &packed));
  for (const std::string& bytes : {std::string(), packed.substr(0, packed.size() - 1), packed + "x", message}) {
    EXPECT_EQ(Unpack(GetParam(), bytes, 1 << 20, &unpacked), UnpackResult::kBroken) << bytes.size();
    EXPECT_EQ(unpacked, "");
  }
}

TEST(CompressionTest, KnowsItsNames) {
  EXPECT_FALSE(IsCompression(kIdentity));
  EXPECT_FALSE(IsCompression("br"));
  EXPECT_FALSE(IsCompression(""));
}

}  // namespace
}  // namespace dpsr::serving
