// Internal to export/faiss_binding/. Puts searches of several threads together into one.
#ifndef DPSR_EXPORT_FAISS_BINDING_COMBINED_SEARCHES_H_
#define DPSR_EXPORT_FAISS_BINDING_COMBINED_SEARCHES_H_

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace dpsr {

// For a device that runs one search at a time, and takes hardly longer for many queries than for one. Callers wait
// while a search runs. Then one of them searches for the caller that has waited longest, and for others with its k.
class CombinedSearches {
 public:
  // x [n, d] -> distances [n, k], labels [n, k].
  using Function = std::function<void(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels)>;
  // Callers share a search of at most so many queries. A caller with more queries searches alone.
  static constexpr int64_t kMaxQueries = 1024;

  CombinedSearches(int64_t d, Function search) : d_(d), search_(std::move(search)) {}
  CombinedSearches(const CombinedSearches&) = delete;
  CombinedSearches& operator=(const CombinedSearches&) = delete;

  // Thread-safe. Throws what the search throws. If callers share a search that throws, each of them gets the exception.
  void Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels);

  // Returns the number of callers whose search has not begun.
  int64_t num_waiting() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(waiting_.size());
  }

 private:
  struct Request {
    int64_t n;
    const float* x;
    int64_t k;
    float* distances;
    int64_t* labels;
    bool is_done = false;
    std::exception_ptr error;
  };

  // Removes from waiting_ the oldest request and those that share its search, and returns them. Needs the lock.
  std::vector<Request*> TakeGroup();
  void SearchFor(const std::vector<Request*>& group) const;

  const int64_t d_;
  const Function search_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool is_searching_ = false;      // guarded by mutex_
  std::vector<Request*> waiting_;  // guarded by mutex_, oldest first
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_COMBINED_SEARCHES_H_
