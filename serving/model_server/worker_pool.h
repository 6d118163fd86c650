// A fixed number of threads that run tasks in the order of their arrival.
#ifndef DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
#define DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace dpsr::serving {

struct WorkerPoolOptions {
  int num_threads = 1;
  // Tasks that may wait.
  size_t max_queued = std::numeric_limits<size_t>::max();
  // No further task begins while so many have run for less than `patience`: tasks that compute only take the processors
  // from each other, and pay for it. Those that have run for longer may be waiting, for a lock or a file: they do not
  // count.
  int max_prompt = std::numeric_limits<int>::max();
  std::chrono::microseconds patience{1000};
};

// gRPC's callback threads must not block, and TensorFlow computes for milliseconds: requests are handed over to these
// threads, whose number bounds how many are computed at a time. Thread-safe.
class WorkerPool {
 public:
  explicit WorkerPool(const WorkerPoolOptions& options);
  explicit WorkerPool(int num_threads) : WorkerPool(WorkerPoolOptions{num_threads}) {}
  // Runs what was added, then ends the threads.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // `task` must not throw. False, and nothing is added, where as many as may wait already do.
  bool Add(std::function<void()> task);

  // Tasks that wait, and tasks that run.
  size_t num_queued() const;
  size_t num_running() const;

 private:
  using Clock = std::chrono::steady_clock;

  void Work(size_t thread);
  // These need the lock. Whether a further task may begin where `more` are about to; whether to notify a thread, which
  // counts as told.
  bool HasRoom(size_t more) const;
  bool NeedsThread();

  const WorkerPoolOptions options_;
  mutable std::mutex mutex_;
  size_t num_running_ = 0;
  size_t num_idle_ = 0;    // threads that wait
  size_t num_waking_ = 0;  // of these, those that have been told of a task
  bool watched_ = false;   // one of these looks now and then whether tasks that wait may begin
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  std::vector<Clock::time_point> begun_;  // by thread, min() where it runs no task
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
