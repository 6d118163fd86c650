#include "serving/model_server/worker_pool.h"

#include <utility>

namespace dpsr::serving {

WorkerPool::WorkerPool(int num_threads, size_t max_queued) : max_queued_(max_queued) {
  threads_.reserve(num_threads);
  GrowTo(num_threads);
}

WorkerPool::~WorkerPool() {
  std::vector<Waiter*> idle;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    idle.swap(idle_);
  }
  for (Waiter* waiter : idle) sem_post(&waiter->ready);
  for (std::thread& thread : threads_) thread.join();
}

bool WorkerPool::Add(std::function<void()> task) {
  Waiter* waiter = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) {
      if (tasks_.size() >= max_queued_) return false;
      tasks_.push_back(std::move(task));
      return true;
    }
    waiter = idle_.back();
    idle_.pop_back();
    ++num_running_;
    waiter->task = std::move(task);
  }
  // The waiter lives until its thread has seen this.
  sem_post(&waiter->ready);
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
  Waiter waiter;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    std::function<void()> task;
    if (!tasks_.empty()) {
      task = std::move(tasks_.front());
      tasks_.pop_front();
      ++num_running_;
      lock.unlock();
    } else if (stopping_) {
      return;
    } else {
      idle_.push_back(&waiter);
      lock.unlock();
      while (sem_wait(&waiter.ready) != 0) continue;  // a signal interrupted it
      task = std::exchange(waiter.task, nullptr);
      if (task == nullptr) return;
    }
    task();
    // Destroys what the task holds before the task counts as done.
    task = nullptr;
    lock.lock();
    --num_running_;
  }
}

}  // namespace dpsr::serving
