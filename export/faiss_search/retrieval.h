// Retrieval over heads (end of section 4.3 of the DPSR paper): from the query embedding of one request, [heads, dim],
// to its k best items. Without TensorFlow and FAISS.
//
// Each head retrieves its own k items, and the results are united. The score of an item is its largest inner product
// over the heads that retrieved it. Equal scores are ordered by ascending item id, and the best k remain. Which of
// several items with equal scores a head retrieves is up to the index. Training differs: it joins the heads by the soft
// dot product.
//
// An item may have several entries in an index: one in each of its lists. Each head then retrieves as many times more
// results, and the best entry of an item counts.
//
// Items that a request excludes by id are dropped from the results of the heads. Each head retrieves as many more.
//
// Instead of wrong results there are none: a query embedding that holds a NaN or an infinity retrieves nothing, a head
// of zeros (the embedding of an empty query) retrieves nothing, and results whose score is NaN are dropped. Missing
// results are padded.
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
inline constexpr int64_t kMaxExcluded = 10000;  // number of ids that a request may exclude

// Padding for missing results.
inline constexpr int64_t kNoItem = -1;
inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();
inline constexpr int32_t kNoHead = -1;

// Searches for one head. Writes the `k` positions with the largest inner products with `query` [dim] to labels [k], and
// the inner products to scores [k]. Missing results have the label -1. Results should come best first: then they need
// not be sorted.
using HeadSearch = std::function<Status(const float* query, int64_t k, float* scores, int64_t* labels)>;

// The item ids of the positions of an index.
struct ItemIds {
  Span<const int64_t> ids;
  bool distinct = false;  // whether they are known to be distinct; otherwise results with equal ids are joined
  int64_t entries = 1;    // number of times that a search may return the same position

  // Ids of the labels behind the positions of the index, from `begin` on: those of items that were added later.
  struct Added {
    int64_t begin;
    Span<const int64_t> ids;
  };
  std::vector<Added> added;  // one after the other, without gaps

  // Returns the number of labels.
  int64_t size() const {
    return added.empty() ? static_cast<int64_t>(ids.size())
                         : added.back().begin + static_cast<int64_t>(added.back().ids.size());
  }
  // Returns the id of a label in [0, size).
  int64_t operator[](int64_t label) const {
    if (label < static_cast<int64_t>(ids.size())) return ids[label];
    size_t part = added.size() - 1;
    while (added[part].begin > label) --part;
    return added[part].ids[label - added[part].begin];
  }

  // Checks ids. They are known to be distinct if they ascend, as `dpsr index` writes them.
  // Errors: FailedPrecondition for a negative id, which would look like padding, with its position.
  static Status Check(Span<const int64_t> ids, ItemIds* item_ids);
};

// Retrieves for one query at a time and keeps its working memory. Each thread needs its own object.
class Retriever {
 public:
  // `item_ids` [ntotal] has the shop's item id of each position in the index. Ids may repeat. The score of an item is
  // then the largest over its positions too.
  Retriever(const ItemIds& item_ids, HeadSearch search);

  // Sets the ids that the next calls of Retrieve leave out. Ids that no item has are allowed.
  // Errors: InvalidArgument (more than kMaxExcluded).
  Status Exclude(Span<const int64_t> ids);

  // Retrieves the best items: query_embedding [heads, dim] -> ids [k], scores [k], heads_out [k], best first. heads_out
  // has the head that gave the score, the lowest one if several gave the same.
  // Errors: InvalidArgument (heads outside 1..kMaxHeads, dim < 1, k outside 1..kMaxResults), DataLoss (the search
  // returned a position that item_ids does not have), and errors of the search. The outputs are then unspecified.
  Status Retrieve(const float* query_embedding, int64_t heads, int64_t dim, int64_t k, int64_t* ids, float* scores,
                  int32_t* heads_out);

 private:
  struct Candidate {
    float score;
    int64_t id;
  };
  // The results of one head that are not merged yet, best first: candidates_[next, end).
  struct HeadCandidates {
    int32_t head;
    size_t next;
    size_t end;
  };

  // A set of item ids that is emptied for each query. A hash table with open addressing and a power of two of slots.
  class IdSet {
   public:
    // Empties the set and makes room for `capacity` ids.
    void Reset(int64_t capacity);
    // Adds an id. Returns false when the set contains it already.
    bool Insert(int64_t id);
    bool Contains(int64_t id) const { return !slots_.empty() && slots_[Slot(id)] == id; }

   private:
    // Returns the slot where `id` is, or would be put.
    size_t Slot(int64_t id) const;

    std::vector<int64_t> slots_;
    size_t mask_ = 0;
  };

  static bool Better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
  }
  // Searches directly into the outputs. For one head, distinct ids, one entry of each item and no exclusions, there is
  // nothing to merge.
  Status SearchAlone(const float* query, int64_t k, int64_t* ids, float* scores, int64_t* found);
  Status SearchHead(const float* query, int32_t head, int64_t k);
  Status PositionOutOfRange(int64_t position) const;
  int64_t Merge(int64_t k, int64_t* ids, float* scores, int32_t* heads_out);

  const ItemIds item_ids_;
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
