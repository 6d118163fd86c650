#include "serving/model_server/worker_pool.h"

#include <atomic>
#include <future>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr::serving {
namespace {

TEST(WorkerPoolTest, RunsEveryTaskBeforeItEnds) {
  std::atomic<int> ran{0};
  {
    WorkerPool pool(3);
    for (int i = 0; i < 1000; ++i) pool.Add([&] { ++ran; });
  }
  EXPECT_EQ(ran, 1000);
}

TEST(WorkerPoolTest, OneThreadKeepsTheOrder) {
  std::vector<int> order;
  {
    WorkerPool pool(1);
    for (int i = 0; i < 100; ++i) pool.Add([&order, i] { order.push_back(i); });
  }
  ASSERT_EQ(order.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

TEST(WorkerPoolTest, RunsAsManyTasksAtATimeAsItHasThreads) {
  constexpr int kThreads = 4;
  std::atomic<int> waiting{0};
  std::promise<void> all_wait;
  std::shared_future<void> release = all_wait.get_future().share();
  WorkerPool pool(kThreads);
  // Each task ends only when the last one has begun: fewer threads would never get there.
  for (int i = 0; i < kThreads; ++i) {
    pool.Add([&] {
      if (++waiting == kThreads) all_wait.set_value();
      release.wait();
    });
  }
  release.wait();
  EXPECT_EQ(waiting, kThreads);
}

TEST(WorkerPoolTest, RefusesBeyondItsQueue) {
  std::promise<void> begun, end;
  std::shared_future<void> release = end.get_future().share();
  WorkerPool pool(1, 2);
  EXPECT_TRUE(pool.Add([&] {
    begun.set_value();
    release.wait();
  }));
  begun.get_future().wait();
  EXPECT_TRUE(pool.Add([] {}));
  EXPECT_TRUE(pool.Add([] {}));
  EXPECT_FALSE(pool.Add([] {}));
  EXPECT_EQ(pool.num_queued(), 2u);
  EXPECT_EQ(pool.num_running(), 1u);
  end.set_value();
}

}  // namespace
}  // namespace dpsr::serving
