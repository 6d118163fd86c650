// Search among the items that pass a filter. Scores are FAISS's own, and a filter does not make the search much more
// expensive.
//
// If the index has inverted lists, the search reads them directly. The items are numbered so that each list is a range
// of bits of the mask. An unfiltered search scores about nprobe * ntotal / nlist items. A filtered search scores as
// many items that pass, or fewer if these would be a large part of them (ShareToScore in the .cc file). It goes through
// the lists in the order of their centroids' scores, skips lists in which nothing passes, and stops when it has scored
// enough. So the fewer items pass, the more lists it reads.
//
// The neighbours of a query may not pass, so that the items that pass are spread over many lists. Therefore the search
// continues, an eighth more at a time, while the last two eighths gave many of the k results: so many that twice as
// many scored items would bring a fifth of new ones. It scores at most four times as many items in all. If no more items
// pass than it would score, or only a few, it scores all of them, and the result is exact.
//
// Other indexes (Flat, HNSW, refined ones) score the items that pass one by one if this is cheaper. Otherwise FAISS
// searches with a selector, and with nprobe or efSearch divided by the share of items that pass. If FAISS then finds
// too few, the items are scored one by one after all. FastScan lists, whose items cannot be scored one by one, are
// searched completely instead.
#ifndef DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_
#define DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "export/faiss_binding/faiss_index.h"
#include "export/faiss_search/item_filter.h"
#include "common/status.h"

namespace dpsr {

class BestItems;

// In an index with lists, an item has one entry, or one in each of several lists. All numbers of items below are then
// numbers of entries, and a search finds the same item several times.
//
// Immutable and thread-safe.
class FilteredSearch {
 public:
  // If no more items than this pass, all of them are scored.
  static constexpr int64_t kFewItems = 8192;

  // Reads the order of the items in the index, and checks that its own scores agree with FAISS's. The index must
  // outlive the object. It has `entries` entries for each item, so its labels are the positions 0 to ntotal / entries -
  // 1, each `entries` times.
  // Errors: DataLoss (other labels, scores that differ), FailedPrecondition (more than 2^31 - 1 entries, several entries
  // for an item in an index without lists), Internal (FAISS failed).
  static Status Create(FaissIndex* index, std::unique_ptr<FilteredSearch>* search, int64_t entries = 1);

  // Returns how masks number the items.
  const ItemOrder& order() const { return order_; }

  // Returns the inner product of a transformed query [list_dim] and the centroid of a list.
  float CentroidScore(const float* query, int64_t list) const;

  // Searches like FaissIndex::Search, with one query and one thread, among the items of `mask`. Finds min(k,
  // mask.count) items, in any order. The rest of scores [k] and positions [k] is padded with position -1. With a
  // max_codes, a search of lists scores at most so many items, or k if that is more. With `visible`, whose words are
  // known, only items that are in both masks are found: as many of them as there are, up to k.
  Status Search(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters, float* scores,
                int64_t* positions, const ItemMask* visible = nullptr) const;

 private:
  FilteredSearch(const FaissIndex& index, int64_t entries) : index_(index), entries_(entries) {}
  int64_t num_items() const { return index_.ntotal() / entries_; }
  Status ReadLists(FaissIndex* index);
  Status CompareScores() const;
  Status SearchLists(const float* x, const ItemMask& mask, const ItemMask* visible, const SearchParameters& parameters,
                     BestItems* best) const;
  Status SearchSelected(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters,
                        float* scores, int64_t* positions) const;
  Status ScoreAll(const float* x, const ItemMask& mask, BestItems* best) const;
  // A list that SearchLists may read.
  struct List {
    float centroid_score;
    int32_t list;
    float passing;  // number of its items that pass, estimated if it is not known
  };
  using Lists = std::vector<List>;
  static bool Nearer(const List& a, const List& b) { return a.centroid_score > b.centroid_score; }
  // Items that pass.
  struct PassingItems {
    std::vector<const uint8_t*> codes;
    std::vector<int64_t> slots;
    std::vector<uint64_t> words;  // working memory for the bits of one list
  };
  Lists ListsOf(const float* query, const ItemMask& mask) const;
  void FindPassing(int32_t list, const ItemMask& mask, const ItemMask* visible, PassingItems* passing) const;
  static Lists::iterator Nearest(double wanted, Lists::iterator begin, Lists::iterator end);

  const FaissIndex& index_;
  const int64_t entries_;  // of each item
  ItemOrder order_;
  std::vector<float> centroids_;            // [lists, list_dim]
  std::vector<const uint8_t*> list_codes_;  // [lists]
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_FILTERED_SEARCH_H_
