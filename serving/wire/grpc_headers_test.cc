#include "serving/wire/grpc_headers.h"

#include <gtest/gtest.h>

#include <string>

namespace dpsr::serving {
namespace {

TEST(GrpcHeadersTest, MetadataHasLowerCaseNamesAndPrintableValues) {
  EXPECT_TRUE(IsMetadata("user-id", "a b~"));
  EXPECT_TRUE(IsMetadata("x_1.y-2", ""));
  for (const char* name : {"", "A", "a b", "a:b", "a\n", "\xC3\xA9"}) EXPECT_FALSE(IsMetadata(name, "v")) << name;
  for (const char* value : {"a\r\nb", "a\tb", "\x7F", "\xC3\xA9"}) EXPECT_FALSE(IsMetadata("n", value)) << value;
}

TEST(GrpcHeadersTest, BinaryMetadataIsBase64) {
  EXPECT_TRUE(IsMetadata("trace-bin", "AP8=,ab+/"));
  EXPECT_FALSE(IsMetadata("trace-bin", "a b"));
  EXPECT_FALSE(IsMetadata("trace-bin", "a-b"));
}

TEST(GrpcHeadersTest, HeadersOfGrpcItselfAreOfOneHop) {
  for (const char* name : {"te", "content-type", "grpc-timeout", "grpclb_client_stats", "user-agent"}) {
    EXPECT_TRUE(IsHopHeader(name)) << name;
  }
  for (const char* name : {"authorization", "grpc-trace-bin", "traceparent", "te2"}) {
    EXPECT_FALSE(IsHopHeader(name)) << name;
  }
}

TEST(GrpcHeadersTest, TimeoutsHaveEightDigitsAndAUnit) {
  double seconds = -1;
  EXPECT_TRUE(ParseTimeout("99999999H", &seconds));
  EXPECT_EQ(seconds, 99999999.0 * 3600);
  EXPECT_TRUE(ParseTimeout("100m", &seconds));
  EXPECT_DOUBLE_EQ(seconds, 0.1);
  EXPECT_TRUE(ParseTimeout("0n", &seconds));
  EXPECT_EQ(seconds, 0);
  for (const char* text : {"", "S", "1", "1x", "-1S", "1.5S", "123456789S", " 1S", "1 S"}) {
    EXPECT_FALSE(ParseTimeout(text, &seconds)) << text;
  }
}

TEST(GrpcHeadersTest, FormattedTimeoutsAreRoundedUpAndCanBeRead) {
  EXPECT_EQ(FormatTimeout(0), "0u");
  EXPECT_EQ(FormatTimeout(-1), "0u");
  EXPECT_EQ(FormatTimeout(0.0000001), "1u");
  EXPECT_EQ(FormatTimeout(100), "100000m");
  EXPECT_EQ(FormatTimeout(1e30), "99999999S");
  for (const double wanted : {0.02, 1.5, 89.9, 1e4, 1e6}) {
    double seconds = -1;
    ASSERT_TRUE(ParseTimeout(FormatTimeout(wanted), &seconds));
    EXPECT_NEAR(seconds, wanted, 1e-6 * wanted + 1e-3);
  }
}

TEST(GrpcHeadersTest, MessagesAreEscapedAndBack) {
  EXPECT_EQ(EscapeMessage("100% \xC3\xA9\n"), "100%25 %C3%A9%0A");
  EXPECT_EQ(UnescapeMessage("100%25 %c3%A9%0A"), "100% \xC3\xA9\n");
  EXPECT_EQ(UnescapeMessage("%, %4, %zz"), "%, %4, %zz");
  std::string all;
  for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
  EXPECT_EQ(UnescapeMessage(EscapeMessage(all)), all);
}

}  // namespace
}  // namespace dpsr::serving
