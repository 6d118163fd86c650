#include "export/faiss_binding/combined_searches.h"

#include <algorithm>

namespace dpsr {

void CombinedSearches::Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
  Request own{n, x, k, distances, labels, false, nullptr};
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_.push_back(&own);
  while (!own.is_done) {
    if (is_searching_) {
      changed_.wait(lock);
      continue;
    }
    const std::vector<Request*> group = TakeGroup();
    is_searching_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      SearchFor(group);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    is_searching_ = false;
    for (Request* const request : group) {
      request->error = error;
      request->is_done = true;
    }
    changed_.notify_all();
  }
  lock.unlock();
  if (own.error) std::rethrow_exception(own.error);
}

std::vector<CombinedSearches::Request*> CombinedSearches::TakeGroup() {
  std::vector<Request*> group, others;
  int64_t queries = 0;
  for (Request* const request : waiting_) {
    const bool fits = group.empty() || (request->k == group[0]->k && queries + request->n <= kMaxQueries);
    if (fits) queries += request->n;
    (fits ? group : others).push_back(request);
  }
  waiting_.swap(others);
  return group;
}

void CombinedSearches::SearchFor(const std::vector<Request*>& group) const {
  const int64_t k = group[0]->k;
  if (group.size() == 1) {
    search_(group[0]->n, group[0]->x, k, group[0]->distances, group[0]->labels);
    return;
  }
  std::vector<float> x;
  for (const Request* const request : group) x.insert(x.end(), request->x, request->x + request->n * d_);
  const int64_t queries = static_cast<int64_t>(x.size()) / d_;
  std::vector<float> distances(queries * k);
  std::vector<int64_t> labels(queries * k);
  search_(queries, x.data(), k, distances.data(), labels.data());
  const float* distance = distances.data();
  const int64_t* label = labels.data();
  for (const Request* const request : group) {
    const int64_t results = request->n * k;
    std::copy(distance, distance + results, request->distances);
    std::copy(label, label + results, request->labels);
    distance += results;
    label += results;
  }
}

}  // namespace dpsr
