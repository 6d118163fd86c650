#include "serving/model_server/worker_pool.h"

#include <algorithm>
#include <utility>

namespace dpsr::serving {

WorkerPool::WorkerPool(const WorkerPoolOptions& options)
    : options_(options), begun_(options.num_threads, Clock::time_point::min()) {
  threads_.reserve(begun_.size());
  for (size_t i = 0; i < begun_.size(); ++i) threads_.emplace_back([this, i] { Work(i); });
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
  bool wake;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (tasks_.size() >= options_.max_queued) return false;
    tasks_.push_back(std::move(task));
    wake = NeedsThread();
  }
  if (wake) changed_.notify_one();
  return true;
}

size_t WorkerPool::num_queued() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return tasks_.size();
}

size_t WorkerPool::num_running() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_running_;
}

bool WorkerPool::HasRoom(size_t more) const {
  const size_t most = static_cast<size_t>(options_.max_prompt);
  if (num_running_ + more < most) return true;
  if (more >= most) return false;
  const auto now = Clock::now();
  const auto is_prompt = [&](Clock::time_point begun) {
    return begun != Clock::time_point::min() && now - begun < options_.patience;
  };
  return static_cast<size_t>(std::count_if(begun_.begin(), begun_.end(), is_prompt)) + more < most;
}

bool WorkerPool::NeedsThread() {
  if (tasks_.empty() || num_idle_ == num_waking_) return false;
  if (watched_ && !HasRoom(num_waking_)) return false;
  ++num_waking_;
  return true;
}

void WorkerPool::Work(size_t thread) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (tasks_.empty() || !(stopping_ || HasRoom(0))) {
      if (stopping_) return;
      const bool watches = !tasks_.empty() && !watched_;
      ++num_idle_;
      if (watches) {
        watched_ = true;
        changed_.wait_for(lock, options_.patience / 2);
        watched_ = false;
      } else {
        changed_.wait(lock);
      }
      --num_idle_;
      if (num_waking_ > 0) --num_waking_;
    }
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    ++num_running_;
    begun_[thread] = Clock::now();
    const bool wake = NeedsThread();
    lock.unlock();
    if (wake) changed_.notify_one();
    task();
    task = nullptr;  // what it holds goes before it counts as done
    lock.lock();
    --num_running_;
    begun_[thread] = Clock::time_point::min();
  }
}

}  // namespace dpsr::serving
