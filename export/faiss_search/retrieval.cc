#include "export/faiss_search/retrieval.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

namespace dpsr {
namespace {

// Results come sorted, apart from a few ties, so moving these is the fastest way to sort them. But all scores may tie.
// After so many moves for each result, the results are sorted in another way, which never takes quadratic time.
constexpr int64_t kMovesPerResult = 8;

}  // namespace

Status ItemIds::Check(Span<const int64_t> ids, ItemIds* item_ids) {
  item_ids->ids = ids;
  item_ids->distinct = true;
  for (size_t position = 0; position < ids.size(); ++position) {
    if (ids[position] < 0) {
      return MakeStatus(StatusCode::kFailedPrecondition, "the item id at position ", position, " is ", ids[position],
                        ", expected ids >= 0 (", kNoItem, " marks a missing result)");
    }
    if (position > 0 && ids[position] <= ids[position - 1]) item_ids->distinct = false;
  }
  return Status();
}

Retriever::Retriever(const ItemIds& item_ids, HeadSearch search)
    : item_ids_(item_ids), search_(std::move(search)) {}

Status Retriever::Retrieve(const float* query_embedding, int64_t heads, int64_t dim, int64_t k, int64_t* ids,
                           float* scores, int32_t* heads_out) {
  if (heads < 1 || heads > kMaxHeads || dim < 1 || k < 1 || k > kMaxResults) {
    return MakeStatus(StatusCode::kInvalidArgument, "retrieval with ", heads, " heads, dim ", dim, ", k ", k,
                      ", expected 1 to ", kMaxHeads, " heads, dim >= 1, k from 1 to ", kMaxResults);
  }
  const auto is_finite = [](float value) { return std::isfinite(value); };
  const auto is_zero = [](float value) { return value == 0; };
  candidates_.clear();
  heads_.clear();
  int64_t found = 0;
  if (std::all_of(query_embedding, query_embedding + heads * dim, is_finite)) {
    const bool alone = heads == 1 && item_ids_.distinct && item_ids_.entries == 1 && num_excluded_ == 0;
    for (int64_t head = 0; head < heads; ++head) {
      const float* query = query_embedding + head * dim;
      if (std::all_of(query, query + dim, is_zero)) continue;
      DPSR_RETURN_IF_ERROR(alone ? SearchAlone(query, k, ids, scores, &found)
                                 : SearchHead(query, static_cast<int32_t>(head), k));
    }
    if (alone) {
      std::fill(heads_out, heads_out + found, 0);
    } else {
      found = Merge(k, ids, scores, heads_out);
    }
  }
  std::fill(ids + found, ids + k, kNoItem);
  std::fill(scores + found, scores + k, kNoScore);
  std::fill(heads_out + found, heads_out + k, kNoHead);
  return Status();
}

Status Retriever::Exclude(Span<const int64_t> ids) {
  if (static_cast<int64_t>(ids.size()) > kMaxExcluded) {
    return MakeStatus(StatusCode::kInvalidArgument, "there are ", ids.size(), " excluded item ids, expected at most ",
                      kMaxExcluded);
  }
  excluded_.Reset(static_cast<int64_t>(ids.size()));
  num_excluded_ = 0;
  for (const int64_t id : ids) {
    if (id >= 0 && excluded_.Insert(id)) ++num_excluded_;
  }
  return Status();
}

Status Retriever::PositionOutOfRange(int64_t position) const {
  return MakeStatus(StatusCode::kDataLoss, "the index returned position ", position, ", but there are only ",
                    item_ids_.size(),
                    " item ids: the index file is damaged, or was built with ids instead of positions");
}

Status Retriever::SearchAlone(const float* query, int64_t k, int64_t* ids, float* scores, int64_t* found) {
  const auto ntotal = item_ids_.size();
  const int64_t wanted = std::min(k, ntotal);
  if (wanted == 0) return Status();
  // FAISS keeps its heap in the results. This memory is in the cache; that of a batch's results is not.
  scores_.resize(wanted);
  labels_.resize(wanted);
  DPSR_RETURN_IF_ERROR(search_(query, wanted, scores_.data(), labels_.data()));
  // The ids are all over a large array. After some loads a processor waits for the first one, but not after prefetches.
  const auto indexed = static_cast<int64_t>(item_ids_.ids.size());
  for (const int64_t position : labels_) {
    if (position >= 0 && position < indexed) __builtin_prefetch(&item_ids_.ids[position]);
  }
  int64_t end = 0;
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t position = labels_[i];
    if (position == -1 || std::isnan(scores_[i])) continue;
    if (position < 0 || position >= ntotal) return PositionOutOfRange(position);
    ids[end] = item_ids_[position];
    scores[end++] = scores_[i];
  }
  int64_t moves = kMovesPerResult * end;
  for (int64_t i = 1; i < end && moves >= 0; ++i) {
    for (int64_t j = i; j > 0 && Better({scores[j], ids[j]}, {scores[j - 1], ids[j - 1]}); --j) {
      std::swap(scores[j], scores[j - 1]);
      std::swap(ids[j], ids[j - 1]);
      --moves;
    }
  }
  if (moves < 0) {
    for (int64_t i = 0; i < end; ++i) candidates_.push_back({scores[i], ids[i]});
    std::sort(candidates_.begin(), candidates_.end(), Better);
    for (int64_t i = 0; i < end; ++i) {
      scores[i] = candidates_[i].score;
      ids[i] = candidates_[i].id;
    }
  }
  *found = end;
  return Status();
}

Status Retriever::SearchHead(const float* query, int32_t head, int64_t k) {
  // At most all entries can be found. An empty index is not searched.
  const auto ntotal = item_ids_.size();
  const size_t begin = candidates_.size();
  for (int64_t wanted = item_ids_.entries * std::min(k + num_excluded_, ntotal); wanted > 0;) {
    scores_.resize(wanted);
    labels_.resize(wanted);
    DPSR_RETURN_IF_ERROR(search_(query, wanted, scores_.data(), labels_.data()));

    // The ids are all over a large array. This loop only reads them, so the processor fetches many at once.
    ids_.resize(wanted);
    for (int64_t i = 0; i < wanted; ++i) {
      ids_[i] = labels_[i] >= 0 && labels_[i] < ntotal ? item_ids_[labels_[i]] : kNoItem;
    }
    candidates_.resize(begin);
    bool exhausted = wanted == item_ids_.entries * ntotal;
    int64_t dropped = 0;
    for (int64_t i = 0; i < wanted; ++i) {
      if (labels_[i] == -1) exhausted = true;
      if (labels_[i] == -1 || std::isnan(scores_[i])) continue;
      if (labels_[i] < 0 || labels_[i] >= ntotal) return PositionOutOfRange(labels_[i]);
      const int64_t id = ids_[i];
      if (num_excluded_ > 0 && excluded_.Contains(id)) {
        ++dropped;
        continue;
      }
      candidates_.push_back({scores_[i], id});
    }
    // If ids repeat, more positions than ids may have been dropped. Then the search is repeated with more results.
    if (exhausted || dropped <= item_ids_.entries * num_excluded_) break;
    wanted = std::min(2 * wanted, item_ids_.entries * ntotal);
  }
  int64_t moves = kMovesPerResult * static_cast<int64_t>(candidates_.size() - begin);
  for (size_t i = begin + 1; i < candidates_.size() && moves >= 0; ++i) {
    for (size_t j = i; j > begin && Better(candidates_[j], candidates_[j - 1]); --j) {
      std::swap(candidates_[j], candidates_[j - 1]);
      --moves;
    }
  }
  // Stable, as the moves are: 0 and -0 tie, and an item may have both.
  if (moves < 0) {
    std::stable_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(begin), candidates_.end(), Better);
  }
  candidates_.resize(std::min(candidates_.size(), begin + static_cast<size_t>(item_ids_.entries * k)));
  heads_.push_back({head, begin, candidates_.size()});
  return Status();
}

// Merges the sorted candidates of all heads. Returns the number of results, at most k. The best candidate comes first,
// so the first appearance of an item has its final score. It also has the right head, because heads_ is in ascending
// order.
int64_t Retriever::Merge(int64_t k, int64_t* ids, float* scores, int32_t* heads_out) {
  seen_.Reset(std::min<int64_t>(k, static_cast<int64_t>(candidates_.size())));
  int64_t found = 0;
  while (found < k) {
    HeadCandidates* best = nullptr;
    for (HeadCandidates& head : heads_) {
      if (head.next == head.end) continue;
      if (best == nullptr || Better(candidates_[head.next], candidates_[best->next])) best = &head;
    }
    if (best == nullptr) break;
    const Candidate& candidate = candidates_[best->next++];
    if (!seen_.Insert(candidate.id)) continue;
    ids[found] = candidate.id;
    scores[found] = candidate.score;
    heads_out[found] = best->head;
    ++found;
  }
  return found;
}

void Retriever::IdSet::Reset(int64_t capacity) {
  size_t slots = 4;
  while (slots < 2 * static_cast<size_t>(capacity)) slots *= 2;
  slots_.assign(slots, kNoItem);
  mask_ = slots - 1;
}

bool Retriever::IdSet::Insert(int64_t id) {
  const size_t slot = Slot(id);
  if (slots_[slot] == id) return false;
  slots_[slot] = id;
  return true;
}

size_t Retriever::IdSet::Slot(int64_t id) const {
  // The multiplication spreads consecutive ids over the table. The upper bits of the product are mixed best.
  size_t slot = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ull) >> 32 & mask_;
  while (slots_[slot] != kNoItem && slots_[slot] != id) slot = (slot + 1) & mask_;
  return slot;
}

}  // namespace dpsr
