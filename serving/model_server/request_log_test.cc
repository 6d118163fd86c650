#include "serving/model_server/request_log.h"

#include <gtest/gtest.h>

namespace dpsr::serving {
namespace {

constexpr char kParent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceParentTest, ReadsW3C) {
  const auto parent = ParseTraceParent(kParent);
  ASSERT_TRUE(parent.has_value());
  EXPECT_EQ(parent->trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_TRUE(parent->sampled);
  EXPECT_FALSE(ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")->sampled);
  EXPECT_TRUE(ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0b")->sampled);
  // A later version may have more parts.
  EXPECT_TRUE(ParseTraceParent("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more").has_value());
}

TEST(TraceParentTest, RefusesOthers) {
  for (const char* text : {
           "", "00", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
           "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
           "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
           "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
           "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
           "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
           "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01more",
           "00x4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
       }) {
    EXPECT_FALSE(ParseTraceParent(text).has_value()) << text;
  }
}

TEST(RequestLogTest, WantsFailedAndSlowRequests) {
  const RequestLog log(std::chrono::milliseconds(20)), none(std::chrono::milliseconds(0));
  EXPECT_TRUE(log.Wants(true, {0, 0}));
  EXPECT_TRUE(none.Wants(true, {0, 0}));
  EXPECT_FALSE(none.Wants(false, {1 << 30, 1 << 30}));
  EXPECT_FALSE(log.Wants(false, {9'999, 10'000}));
  EXPECT_TRUE(log.Wants(false, {10'000, 10'000}));
}

TEST(RequestLogTest, LineNamesRequestTimesErrorAndTrace) {
  RequestLog log(std::chrono::milliseconds(0));
  const auto now = RequestLog::Clock::now();
  EXPECT_EQ(*log.Line("Predict of model shop", "INTERNAL: no\nluck\xff", {1'250, 10'000}, kParent, now),
            "Predict of model shop failed after 11.2 ms, 1.2 ms of it in the queue: INTERNAL: no?luck? "
            "trace=4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(*log.Line("Predict of model shop", "", {0, 10'000}, "no trace", now),
            "Predict of model shop took 10 ms, 0 ms of it in the queue");
  const std::string long_line = *log.Line("x", std::string(10'000, 'e'), {}, "", now);
  EXPECT_LT(long_line.size(), RequestLog::kMaxOutcomeBytes + 100);
  EXPECT_EQ(long_line.substr(long_line.size() - 4), "e...");
}

TEST(RequestLogTest, LimitsTheLinesOfASecond) {
  RequestLog log(std::chrono::milliseconds(0));
  auto now = RequestLog::Clock::now();
  for (int i = 0; i < RequestLog::kLinesPerSecond; ++i) EXPECT_TRUE(log.Line("x", "", {}, "", now).has_value());
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(log.Line("x", "", {}, "", now).has_value());
  now += std::chrono::seconds(1);
  EXPECT_EQ(*log.Line("x", "", {}, "", now),
            "x took 0 ms, 0 ms of it in the queue (5 such lines before it were left out)");
  EXPECT_EQ(*log.Line("x", "", {}, "", now), "x took 0 ms, 0 ms of it in the queue");
}

}  // namespace
}  // namespace dpsr::serving
