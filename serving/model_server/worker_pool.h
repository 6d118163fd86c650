// A fixed number of threads that run tasks in order of arrival.
#ifndef DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
#define DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_

#include <semaphore.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dpsr::serving {

// The answer to a request that WorkerPool::Add refuses.
inline constexpr char kQueueIsFull[] =
    "the server's queue is full (--max_queued_requests); try again later, or elsewhere";

// The threads of the connections must not block, and TensorFlow computes for milliseconds. So these threads compute the
// requests, and their number limits how many are computed at the same time. Thread-safe.
//
// The thread that became idle last gets the next task, because its memory is still in the caches. Each waits for a
// semaphore of its own: with one condition variable for all, glibc makes a system call more for each task.
class WorkerPool {
 public:
  // At most `max_queued` tasks wait.
  explicit WorkerPool(int num_threads, size_t max_queued = std::numeric_limits<size_t>::max());
  // Runs all tasks that were added, then ends the threads.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // Adds a task, which must not throw. Returns false, and adds nothing, if the queue is full.
  bool Add(std::function<void()> task);

  // Adds threads until there are `num_threads`. Only one thread may call this.
  void GrowTo(size_t num_threads);

  // The numbers of tasks that wait and that run.
  size_t num_queued() const;
  size_t num_running() const;

 private:
  // An idle thread.
  struct Waiter {
    Waiter() { sem_init(&ready, 0, 0); }
    ~Waiter() { sem_destroy(&ready); }
    sem_t ready;
    std::function<void()> task;  // empty: the thread is to end
  };

  void Work();

  const size_t max_queued_;
  mutable std::mutex mutex_;
  size_t num_running_ = 0;
  std::deque<std::function<void()>> tasks_;  // none while there are idle threads
  std::vector<Waiter*> idle_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_WORKER_POOL_H_
