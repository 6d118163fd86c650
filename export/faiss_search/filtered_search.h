// Search among the items that pass a filter: FAISS's own scores, at a cost that a filter does not raise.
//
// Where the index has inverted lists, these are read directly, in an order of the items in which each list is a run of
// bits of the mask. An unfiltered search scores about nprobe * ntotal / nlist items. A filtered one scores as many that
// pass: it takes the lists in the order of their centroids' scores, without those in which nothing passes, until it has
// them. So it goes through more lists the fewer items pass. Where the last half of them still gave more than a twelfth
// of the k results it goes on, by another half, up to four times as many in all: a query whose neighbours do not pass
// has the items that do all over their lists. Where no more pass than it would score, or few at all, it scores all of
// them: the result is then exact.
//
// Other indexes (Flat, HNSW, refined ones) score the items that pass one by one where they are few enough for that to be
// the cheaper way; otherwise FAISS searches with a selector, and with nprobe or efSearch divided by the share of items
// that pass. If that finds fewer than there are, they are scored one by one after all. FastScan lists, whose items cannot
// be taken one by one, are searched through to the end instead.
#ifndef DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_
#define DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "export/faiss_binding/faiss_index.h"
#include "export/faiss_search/item_filter.h"
#include "common/status.h"

namespace dpsr {

// Immutable and thread-safe.
class FilteredSearch {
 public:
  // Items that pass are all scored where they are no more than this.
  static constexpr int64_t kFewItems = 8192;

  // Reads where the items of the index lie; the index must outlive the object. Compares its own scores with FAISS's.
  // Errors: DataLoss (labels that are not the positions 0 to ntotal - 1, scores that differ), FailedPrecondition (more
  // than 2^31 - 1 items), Internal (FAISS failed).
  static Status Create(FaissIndex* index, std::unique_ptr<FilteredSearch>* search);

  // How masks number the items.
  const ItemOrder& order() const { return order_; }

  // As FaissIndex::Search for one query and one thread, among the items of `mask`: min(k, mask.count) of them are found,
  // in any order, the rest of scores [k] and positions [k] is padded with position -1.
  Status Search(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters, float* scores,
                int64_t* positions) const;

 private:
  class Best;

  explicit FilteredSearch(const FaissIndex& index) : index_(index) {}
  Status ReadLists(FaissIndex* index);
  Status CompareScores() const;
  Status SearchLists(const float* x, const ItemMask& mask, const SearchParameters& parameters, Best* best) const;
  Status SearchSelected(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters,
                        float* scores, int64_t* positions) const;
  Status ScoreAll(const float* x, const ItemMask& mask, Best* best) const;
  // What SearchLists goes through: lists with their centroids' scores, and how many items pass there, or may.
  struct List {
    float centroid_score;
    int32_t list;
    float passing;
  };
  using Lists = std::vector<List>;
  static bool Nearer(const List& a, const List& b) { return a.centroid_score > b.centroid_score; }
  // Items that pass, and room for the bits of a list.
  struct Found {
    std::vector<const uint8_t*> codes;
    std::vector<int64_t> slots;
    std::vector<uint64_t> words;
  };
  Lists ListsOf(const float* query, const ItemMask& mask) const;
  void FindPassing(int32_t list, const ItemMask& mask, Found* found) const;
  static Lists::iterator Nearest(double wanted, Lists::iterator begin, Lists::iterator end);

  const FaissIndex& index_;
  ItemOrder order_;
  std::vector<float> centroids_;            // [lists, list_dim]
  std::vector<const uint8_t*> list_codes_;  // [lists]
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_
