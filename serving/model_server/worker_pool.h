// A fixed number of threads that run tasks in the order of their arrival.
#ifndef DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
#define DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dpsr::serving {

// gRPC's callback threads must not block, and TensorFlow computes for milliseconds: requests are handed over to these
// threads, whose number bounds how many are computed at a time. Thread-safe.
class WorkerPool {
 public:
  explicit WorkerPool(int num_threads);
  // Runs what was added, then ends the threads.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // `task` must not throw.
  void Add(std::function<void()> task);

 private:
  void Work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
