// Internal to export/faiss_binding/. Searches that wait for one another are done together.
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

// For a device that does one search at a time, and takes hardly longer for many queries than for one. While it searches,
// the callers that come wait. Then one of them searches for all that want as many results as the one that waits longest.
class CombinedSearches {
 public:
  // x [n, d] -> distances [n, k], labels [n, k].
  using Function = std::function<void(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels)>;
  // At most so many queries are put together. A caller's own are never split.
  static constexpr int64_t kMaxQueries = 1024;

  CombinedSearches(int64_t d, Function search) : d_(d), search_(std::move(search)) {}
  CombinedSearches(const CombinedSearches&) = delete;
  CombinedSearches& operator=(const CombinedSearches&) = delete;

  // Thread-safe. Throws what the search throws; an exception of a search for several callers goes to all of them.
  void Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels);

  // Returns how many callers wait, without the one that searches.
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

  // Takes the request that waits longest out of waiting_, and those that go with it. Needs the lock.
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
