// Items that are added, replaced, updated and deleted while an index is being searched.
//
// The index itself, the base, never changes. A change hides entries of the base, and adds items to segments. There is
// one open segment, which holds vectors and is searched completely. When it is full, it is sealed: its items are put
// into lists like those of the base, with the codes of the base's codec, so a search reads only the nearest lists.
// Four sealed segments of one tier are merged to one of the next tier, without the items that have gone. If the lists
// of the base cannot be read (Flat, HNSW, refined indexes), sealed segments keep vectors, and are searched completely.
//
// Readers never wait for a writer: they search FreshItems, an immutable snapshot, and each batch of changes makes a new
// one. It shares with the one before whatever has not changed.
#ifndef DPSR_EXPORT_FAISS_SEARCH_FRESH_INDEX_H_
#define DPSR_EXPORT_FAISS_SEARCH_FRESH_INDEX_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/span.h"
#include "common/status.h"
#include "export/faiss_binding/faiss_index.h"
#include "export/faiss_search/best_items.h"
#include "export/faiss_search/changed_attributes.h"
#include "export/faiss_search/filtered_search.h"
#include "export/faiss_search/item_filter.h"
#include "export/faiss_search/retrieval.h"

namespace dpsr {

// The numbers are stored in files, so their meaning never changes.
enum class ItemChangeKind : int32_t {
  kPut = 0,     // the whole item: adds or replaces it
  kUpdate = 1,  // only attributes for filters
  kDelete = 2,
};

struct ItemChange {
  ItemChangeKind kind = ItemChangeKind::kPut;
  int64_t id = 0;
  int64_t version = 0;  // 0 if not given
  double time = 0;      // seconds since the epoch
  std::string key;      // the shop's own id, if item ids are texts
  std::vector<AttributeValue> attributes;
  const float* vector = nullptr;  // [dim], of a put
};

// Added items. Rows that a snapshot holds never change. The open segment gets more rows behind them.
struct FreshSegment {
  std::vector<int64_t> ids;    // [rows]
  std::vector<float> vectors;  // [rows, dim]; of the open segment, and of sealed ones without lists
  // If the base has lists that can be read: lists and codes of the entries of each row. The list of a second entry may
  // be -1: the row has no such entry.
  std::vector<int32_t> row_lists;  // [rows, entries]
  std::vector<uint8_t> codes;      // [rows, entries, code_size]; of sealed segments [slots, code_size]
  // Of sealed ones. Slots are the entries in the order of their lists.
  std::vector<int32_t> list_begins;  // [lists + 1]
  std::vector<int32_t> slot_rows;    // [slots]
  std::vector<int32_t> row_slots;    // [rows, entries], -1 if there is none

  bool is_listed() const { return !list_begins.empty(); }
};

// A segment as one snapshot sees it.
struct FreshSegmentView {
  std::shared_ptr<const FreshSegment> segment;
  int64_t rows = 0;
  std::shared_ptr<const std::vector<uint64_t>> alive;  // bit i: row i is visible
  int64_t num_alive = 0;
  std::shared_ptr<const ChangedAttributes> attributes;  // of the rows; null if the index has no attributes
  int64_t serial = 0;  // distinguishes segments
  int tier = -1;       // 0 for a sealed open segment, one more with each merge; -1 for the open one
  int64_t label = 0;   // of row 0
};

// The rows of each segment that pass a filter, and are visible.
using FreshRowMasks = std::vector<std::vector<uint64_t>>;

// What a search sees: the base without hidden entries, and the added items. Immutable and thread-safe.
class FreshItems {
 public:
  // Returns the ids of the labels that Search returns.
  const ItemIds& item_ids() const { return item_ids_; }
  // Returns the changed attributes of the base, which ItemFilters::Apply is to be given; null if there are none.
  const std::shared_ptr<const ChangedAttributes>& attributes() const { return attributes_; }
  // Returns whether there are added items.
  bool has_added() const { return !segments_.empty(); }
  // Returns the rows that pass a filter.
  FreshRowMasks FindRows(const ItemFilters::Predicates& predicates) const;
  // Returns the number of hidden entries of the base.
  int64_t num_hidden() const { return num_hidden_; }

  // Searches like FaissIndex::Search, with one query and one thread. Finds k visible items if there are so many.
  // With a filter, `mask` has the items of the base that pass, and `rows` those of the segments.
  Status Search(const float* x, int64_t k, const SearchParameters& parameters, const ItemMask* mask,
                const FreshRowMasks* rows, float* scores, int64_t* labels) const;

 private:
  friend class FreshIndex;
  FreshItems() = default;
  struct ListQuery;
  bool has_listed() const;
  int64_t NumProbes(const SearchParameters& parameters) const;
  Status FindLists(const float* x, int64_t lists, ListQuery* query) const;
  Status SearchBase(const float* x, int64_t k, const SearchParameters& parameters, const ItemMask* mask,
                    ListQuery* query, float* scores, int64_t* labels) const;
  Status SearchSegments(const float* x, const SearchParameters& parameters, const FreshRowMasks* rows,
                        ListQuery* query, BestItems* best) const;
  Status SearchListed(const float* x, const SearchParameters& parameters, const FreshRowMasks* rows, bool all,
                      ListQuery* query, BestItems* best) const;
  const std::vector<uint64_t>& RowsOf(size_t segment, const FreshRowMasks* rows) const;
  void ScoreVectors(const float* x, const FreshSegmentView& view, const std::vector<uint64_t>& rows,
                    BestItems* best) const;

  const FaissIndex* index_ = nullptr;
  const FilteredSearch* filtered_ = nullptr;
  ItemIds item_ids_;
  // The visible slots of the base, and the visible positions where these differ. Null when nothing is hidden.
  std::shared_ptr<const ItemMask> visible_;
  std::shared_ptr<const std::vector<uint64_t>> visible_positions_;
  int64_t num_hidden_ = 0;
  int64_t num_hidden_items_ = 0;
  std::shared_ptr<const ChangedAttributes> attributes_;
  std::vector<FreshSegmentView> segments_;  // the oldest first; the open one, if there is one, is the last
};

struct FreshIndexState {
  int64_t offset = 0;       // the first change that was not applied
  int64_t items = 0;        // visible ones
  int64_t open = 0;         // visible items in the open segment
  int64_t sealed = 0;       // visible items in sealed segments
  int64_t segments = 0;     // sealed ones
  int64_t hidden = 0;       // entries of the base
  int64_t ignored = 0;      // changes with an older version, updates and deletions of unknown ids
  int64_t not_indexed = 0;  // puts whose vector is zero or not finite
  int64_t updated = 0;      // updates of attributes
  double last_time = 0;     // of the last change, 0 if there was none
  // Mean squared distance of new vectors to what their codes stand for, over that of the base; NaN if unknown.
  double drift = std::numeric_limits<double>::quiet_NaN();
};

// An index that can be changed. Thread-safe.
class FreshIndex {
 public:
  struct Options {
    int64_t offset = 0;  // the base has all changes before this one
    int64_t shard = 0;
    int64_t num_shards = 1;
    // Mean squared distance of the base's vectors to what their codes stand for; NaN if unknown.
    double base_residual = std::numeric_limits<double>::quiet_NaN();
    int64_t open_rows = 0;  // capacity of the open segment; 0 lets the dimension decide
  };

  // All of them must outlive the object. `filters` gets new texts.
  FreshIndex(const FaissIndex* index, const FilteredSearch* filtered, const ItemIds& item_ids, ItemFilters* filters,
             const Options& options);

  // Sets the last version of an item, from before `offset`.
  void SetVersion(int64_t id, int64_t version);

  // Applies the changes [offset, next_offset), of which `changes` has those that count. Searches see all or none of
  // them. If `offset` is not the first change that is missing, nothing happens, and `applied` is false.
  // Errors: InvalidArgument (a negative id, a put without a vector, next_offset before offset), Internal (FAISS
  // failed). Nothing has then happened.
  Status Apply(int64_t offset, int64_t next_offset, const std::vector<ItemChange>& changes, bool* applied);

  // Returns what to search, or null as long as the base has not changed.
  std::shared_ptr<const FreshItems> items() const;
  FreshIndexState state() const;

  // Returns the key of an item that was put, or "".
  std::string FindKey(int64_t id) const;
  // Returns the id of an item that was put with this key, or -1.
  int64_t FindId(std::string_view key) const;

 private:
  // What is known of an item that was changed.
  struct Known {
    int64_t version = 0;
    int64_t serial = kInBase;  // the segment that it is in, or one of the next
    int64_t row = 0;
  };
  static constexpr int64_t kInBase = -1;
  static constexpr int64_t kNowhere = -2;
  struct Batch;

  Status ComputeCodes(const std::vector<ItemChange>& changes, Batch* batch) const;
  void ApplyOne(const ItemChange& change, int64_t put, Batch* batch);
  Known& KnownOf(int64_t id, Batch* batch);
  std::vector<int64_t> BasePositions(int64_t id);
  Span<const int32_t> SlotsOf(int64_t position, int32_t* buffer);
  void HideInBase(const std::vector<int64_t>& positions, Batch* batch);
  void HideRow(const Known& known, Batch* batch);
  void AddRow(const ItemChange& change, int64_t put, Batch* batch);
  void FinishAttributes(Batch* batch);
  void Seal(Batch* batch);
  void DropHiddenRows(Batch* batch);
  void Replace(size_t begin, size_t end, int tier, Batch* batch);
  FreshSegmentView MergeSegments(const FreshSegmentView* begin, const FreshSegmentView* end, int tier);

  const FaissIndex& index_;
  const FilteredSearch& filtered_;
  const ItemIds base_ids_;
  ItemFilters* const filters_;
  const Options options_;
  const int64_t dim_;
  const bool has_lists_;
  const int64_t entries_;
  const int64_t open_rows_;

  std::mutex apply_mutex_;  // of the next ones, which only Apply uses
  std::unordered_map<int64_t, Known> known_;
  std::vector<int32_t> by_id_;           // positions in the order of their ids, if these do not ascend
  std::vector<int32_t> position_slots_;  // [positions, entries], once it is needed
  std::shared_ptr<FreshSegment> open_;
  int64_t next_serial_ = 0;
  uint64_t generation_ = 0;
  double residual_sum_ = 0;
  int64_t num_residuals_ = 0;

  mutable std::mutex items_mutex_;
  std::shared_ptr<const FreshItems> items_;
  FreshIndexState state_;

  mutable std::shared_mutex keys_mutex_;
  std::unordered_map<int64_t, std::string> keys_;
  std::unordered_map<std::string, int64_t> ids_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_FRESH_INDEX_H_
