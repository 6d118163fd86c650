#include "serving/model_server/worker_pool.h"

#include <utility>

namespace dpsr::serving {

WorkerPool::WorkerPool(int num_threads, size_t max_queued) : max_queued_(max_queued) {
  threads_.reserve(num_threads);
  GrowTo(num_threads);
}

WorkerPool::~WorkerPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool WorkerPool::Add(std::function<void()> task) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (tasks_.size() >= max_queued_) return false;
    tasks_.push_back(std::move(task));
  }
  changed_.notify_one();
  return true;
}

void WorkerPool::GrowTo(size_t num_threads) {
  while (threads_.size() < num_threads) threads_.emplace_back([this] { Work(); });
}

size_t WorkerPool::num_queued() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return tasks_.size();
}

size_t WorkerPool::num_running() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_running_;
}

void WorkerPool::Work() {
  for (;;) {
    std::function<void()> task;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
      ++num_running_;
    }
    task();
    // Destroys what the task holds before the task counts as done.
    task = nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    --num_running_;
  }
}

}  // namespace dpsr::serving
