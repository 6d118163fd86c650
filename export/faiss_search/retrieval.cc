#include "export/faiss_search/retrieval.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dpsr {

Status CheckItemIds(Span<const int64_t> item_ids) {
  for (size_t position = 0; position < item_ids.size(); ++position) {
    if (item_ids[position] < 0) {
      return MakeStatus(StatusCode::kFailedPrecondition, "the item id at position ", position, " is ",
                        item_ids[position], ", expected ids >= 0 (", kNoItem, " marks a missing result)");
    }
  }
  return Status();
}

Retriever::Retriever(Span<const int64_t> item_ids, HeadSearch search)
    : item_ids_(item_ids), search_(std::move(search)) {}

Status Retriever::Retrieve(const float* query_embedding, int64_t heads, int64_t dim, int64_t k, int64_t* ids,
                           float* scores, int32_t* heads_out) {
  if (heads < 1 || heads > kMaxHeads || dim < 1 || k < 1 || k > kMaxResults) {
    return MakeStatus(StatusCode::kInvalidArgument, "retrieval with ", heads, " heads, dim ", dim, ", k ", k,
                      ", expected 1 to ", kMaxHeads, " heads, dim >= 1, k from 1 to ", kMaxResults);
  }
  candidates_.clear();
  heads_.clear();
  if (std::all_of(query_embedding, query_embedding + heads * dim, [](float value) { return std::isfinite(value); })) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* query = query_embedding + head * dim;
      if (std::all_of(query, query + dim, [](float value) { return value == 0; })) continue;
      DPSR_RETURN_IF_ERROR(SearchHead(query, static_cast<int32_t>(head), k));
    }
  }
  const int64_t found = Merge(k, ids, scores, heads_out);
  std::fill(ids + found, ids + k, kNoItem);
  std::fill(scores + found, scores + k, kNoScore);
  std::fill(heads_out + found, heads_out + k, kNoHead);
  return Status();
}

Status Retriever::SearchHead(const float* query, int32_t head, int64_t k) {
  // No more can be found than there is; an empty index is not asked at all.
  const int64_t wanted = std::min<int64_t>(k, static_cast<int64_t>(item_ids_.size()));
  if (wanted == 0) return Status();
  scores_.resize(wanted);
  labels_.resize(wanted);
  DPSR_RETURN_IF_ERROR(search_(query, wanted, scores_.data(), labels_.data()));

  const size_t begin = candidates_.size();
  bool ordered = true;
  for (int64_t i = 0; i < wanted; ++i) {
    if (labels_[i] == -1 || std::isnan(scores_[i])) continue;
    if (labels_[i] < 0 || labels_[i] >= static_cast<int64_t>(item_ids_.size())) {
      return MakeStatus(StatusCode::kDataLoss, "the index returned position ", labels_[i], ", but there are only ",
                        item_ids_.size(),
                        " item ids: the index file is damaged, or was built with ids instead of positions");
    }
    candidates_.push_back({scores_[i], item_ids_[labels_[i]]});
    if (candidates_.size() > begin + 1 && Better(candidates_.back(), candidates_[candidates_.size() - 2])) {
      ordered = false;
    }
  }
  // A search returns the best first, so that as a rule only ties can be out of order.
  if (!ordered) std::sort(candidates_.begin() + begin, candidates_.end(), Better);
  heads_.push_back({head, begin, candidates_.size()});
  return Status();
}

// Merges the ordered candidates of all heads; returns how many results there are, at most k. Since the best comes
// first, an item's first appearance has its score, and its head, as heads_ is in ascending order.
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
  // Multiplication spreads runs of consecutive ids over the table; its upper bits are the well mixed ones.
  size_t slot = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ull) >> 32 & mask_;
  while (slots_[slot] != kNoItem) {
    if (slots_[slot] == id) return false;
    slot = (slot + 1) & mask_;
  }
  slots_[slot] = id;
  return true;
}

}  // namespace dpsr
