// Retrieval over heads (end of section 4.3 of the DPSR paper), free of TensorFlow and FAISS: from the query embedding
// of one request, [heads, dim], to its k best items.
//
// Each head retrieves its own k items; the results are united; an item's score is its largest inner product over the
// heads that retrieved it; equal scores are ordered by ascending item id; the best k remain. Which of equal items are
// among the k of a head is up to the index. Training differs: there the heads are joined by the soft dot product.
//
// Items that a request excludes by id are dropped from what the heads retrieve, which retrieve so many more.
//
// What cannot be answered is empty instead of wrong: a query embedding that holds a NaN or an infinity anywhere
// retrieves nothing, a head of zeros (the embedding of an empty query) retrieves nothing, and results whose score is
// NaN are dropped. Missing results are padded.
#ifndef DPSR_EXPORT_FAISS_SEARCH_RETRIEVAL_H_
#define DPSR_EXPORT_FAISS_SEARCH_RETRIEVAL_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

inline constexpr int64_t kMaxResults = 10000;  // the largest k
inline constexpr int64_t kMaxHeads = 16;
inline constexpr int64_t kMaxExcluded = 10000;  // ids that a request may exclude

// What stands in place of a missing result.
inline constexpr int64_t kNoItem = -1;
inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();
inline constexpr int32_t kNoHead = -1;

// Retrieves for one head: writes the `k` positions with the largest inner products with `query` [dim], and these, to
// labels [k] and scores [k], the best first (else it costs k^2 comparisons to put them in order), missing ones with label
// -1.
using HeadSearch = std::function<Status(const float* query, int64_t k, float* scores, int64_t* labels)>;

// The item ids of the positions of an index.
struct ItemIds {
  Span<const int64_t> ids;
  bool distinct = false;  // known to be; equal ones are joined

  // Ids in ascending order, as `dpsr index` writes them, are found to be distinct.
  // Errors: FailedPrecondition for a negative id, which would be taken for padding, with its position.
  static Status Check(Span<const int64_t> ids, ItemIds* item_ids);
};

// Retrieves for one query at a time and keeps its working memory in between: one object a thread.
class Retriever {
 public:
  // item_ids [ntotal] maps a position in the index, which is what a search returns, to the shop's item id. Ids may
  // repeat: an item's score is then its largest over its positions as well.
  Retriever(const ItemIds& item_ids, HeadSearch search);

  // The ids that the next calls of Retrieve leave out; those that no item has do not count.
  // Errors: InvalidArgument (more than kMaxExcluded).
  Status Exclude(Span<const int64_t> ids);

  // query_embedding [heads, dim] -> ids [k], scores [k], heads_out [k], the best first; heads_out holds the head that
  // gave the score, the lowest of those that gave the same.
  // Errors: InvalidArgument (heads outside 1..kMaxHeads, dim < 1, k outside 1..kMaxResults), DataLoss (the search
  // returned a position that item_ids does not have), and those of the search. The outputs are then unspecified.
  Status Retrieve(const float* query_embedding, int64_t heads, int64_t dim, int64_t k, int64_t* ids, float* scores,
                  int32_t* heads_out);

 private:
  struct Candidate {
    float score;
    int64_t id;
  };
  // The results of one head that are not yet merged, best first: candidates_[next, end).
  struct HeadCandidates {
    int32_t head;
    size_t next;
    size_t end;
  };

  // A set of item ids that is emptied for each query: open addressing in a power of two of slots.
  class IdSet {
   public:
    // Empties the set and makes room for `capacity` ids.
    void Reset(int64_t capacity);
    // False when the id was there already.
    bool Insert(int64_t id);
    bool Contains(int64_t id) const { return !slots_.empty() && slots_[Slot(id)] == id; }

   private:
    // Where `id` is, or would be put.
    size_t Slot(int64_t id) const;

    std::vector<int64_t> slots_;
    size_t mask_ = 0;
  };

  static bool Better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
  }
  // One head, distinct ids, none excluded: nothing to merge, so that the search writes into the outputs.
  Status SearchAlone(const float* query, int64_t k, int64_t* ids, float* scores, int64_t* found);
  Status SearchHead(const float* query, int32_t head, int64_t k);
  Status PositionOutOfRange(int64_t position) const;
  int64_t Merge(int64_t k, int64_t* ids, float* scores, int32_t* heads_out);

  const Span<const int64_t> item_ids_;
  const bool distinct_ids_;
  const HeadSearch search_;
  std::vector<float> scores_;
  std::vector<int64_t> labels_;
  std::vector<int64_t> ids_;
  std::vector<Candidate> candidates_;
  std::vector<HeadCandidates> heads_;
  IdSet seen_;
  IdSet excluded_;
  int64_t num_excluded_ = 0;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_RETRIEVAL_H_
