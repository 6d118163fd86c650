// Filters on attributes of items: "brand=acme", "price=10..20", "tags=new|sale". Without TensorFlow and FAISS.
//
// An expression is NAME=VALUE, or NAME=A|B|C, where one of the alternatives has to match. A backslash makes a following
// | or backslash an ordinary character. A number also compares with ranges, which include both ends: price=10..20,
// price=..20, price=10.. . For a multi-valued attribute, one matching value is enough. A value that no item has is not
// an error: no item meets the expression. An item without a value meets no expression on that attribute.
//
// An item passes a filter when it meets all expressions to include and none to exclude. The result is one bit for each
// item. It is cached when the same filter is asked for the second time. The first time, if many items pass and the
// index has groups, no bits are computed in advance: the search asks for the bits of the groups that it reads. An
// expression that few items meet is looked up in a list of slots by value; all others take a pass over the column.
#ifndef DPSR_EXPORT_FAISS_SEARCH_ITEM_FILTER_H_
#define DPSR_EXPORT_FAISS_SEARCH_ITEM_FILTER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"
#include "export/faiss_search/changed_attributes.h"

namespace dpsr {

// Limits: number of expressions to include, or to exclude, in one filter; bytes of one expression.
inline constexpr size_t kMaxExpressions = 256;
inline constexpr size_t kMaxExpressionBytes = 1 << 16;

// The order in which an index stores its items. Slot i holds the item with the position positions[i]. Group g, a list
// of the index, has the slots [group_begins[g], group_begins[g + 1]). An item has several slots if it is in several
// lists.
struct ItemOrder {
  std::vector<int32_t> positions;     // [slots]; empty when slot i is position i
  std::vector<int64_t> group_begins;  // [groups + 1]; empty when there are no groups
};

// The items that pass a filter.
struct ItemMask {
  std::vector<uint64_t> words;        // slot i is bit i % 64 of word i / 64; bits behind the last slot are 0
  int64_t count = 0;                  // number of bits that are 1, estimated if `keep` is set
  std::vector<int32_t> group_counts;  // [groups], number of bits that are 1 in each group
  // If this is set, words and group_counts are empty, and the bits have to be computed by calling it. It clears the
  // bits of slots in [begin, end) that do not pass. Bit 0 of the first word is slot `begin`, which is a multiple of 64.
  std::function<void(int64_t begin, int64_t end, uint64_t* words)> keep;
};

// Returns the number of bits in [begin, end) that are 1.
int64_t CountBits(Span<const uint64_t> words, int64_t begin, int64_t end);

// One expression: a name, and the alternatives without escapes.
struct FilterExpression {
  std::string name;
  std::vector<std::string> values;

  // Errors: InvalidArgument, with the text and the expected form.
  static Status Parse(std::string_view text, FilterExpression* expression);
};

// The attributes of the items of an index. Thread-safe: only its cache changes, and the texts that changes bring.
class ItemFilters {
 private:
  struct Column;
  struct Predicate;

 public:
  // A compiled filter: expressions to include and to exclude. It is valid as long as the ItemFilters.
  using Predicates = std::vector<Predicate>;

  // Default size of the cache of results.
  static constexpr size_t kCacheBytes = size_t{64} << 20;
  // With at least this many items, of which at least one in kOverMany passes, bits are computed group by group.
  static constexpr int64_t kManyItems = 1 << 17;
  static constexpr int64_t kOverMany = 16;

  // Opens a packed file of the kind "item_attributes" (dpsr_export/item_attributes.py describes it) for `items` items
  // in this order. With an empty path there are no attributes. `item_ids_fingerprint` identifies the item ids with
  // which the file must have been written. `order` is copied.
  // Errors: those of PackedFile::Open; DataLoss (sections are missing or do not fit together); FailedPrecondition (the
  // file has another number of items, or was written with other item ids).
  static Status Open(const std::string& path, int64_t items, uint64_t item_ids_fingerprint, const ItemOrder& order,
                     std::unique_ptr<ItemFilters>* filters, size_t cache_bytes = kCacheBytes);
  ~ItemFilters();
  ItemFilters(const ItemFilters&) = delete;
  ItemFilters& operator=(const ItemFilters&) = delete;

  // Finds the items that meet all expressions of `include` and none of `exclude`. Empty expressions are ignored.
  // Errors: InvalidArgument (malformed, an unknown name, a text where a number is needed, too many or too long), with
  // the given and the allowed value.
  // With `changes`, the values that they have count. The caller must have got `changes` before the call.
  Status Apply(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
               std::shared_ptr<const ItemMask>* mask,
               const std::shared_ptr<const ChangedAttributes>& changes = nullptr) const;

  // Finds the rows of a segment of added items that meet the same filter: bit i of `words` is row i of [0, rows). The
  // pages of `attributes` have all rows. Errors as for Apply.
  Status Compile(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
                 std::shared_ptr<const Predicates>* predicates) const;
  static void FindRows(const Predicates& predicates, const ChangedAttributes& attributes, int64_t rows,
                       std::vector<uint64_t>* words);

  size_t num_columns() const { return columns_.size(); }
  int64_t num_slots() const { return slots_; }

  // Returns the bytes of results that are in the cache now.
  size_t cached_bytes() const;

 private:
  friend class AttributeEditor;
  struct CachedMask {
    std::string key;
    std::shared_ptr<const ItemMask> mask;
    size_t bytes = 0;
    // Generations of the columns that it was computed from.
    std::vector<std::pair<size_t, uint64_t>> generations;
  };

  ItemFilters(int64_t slots, std::vector<int64_t> group_begins, size_t cache_bytes);
  Status AddColumn(const std::string& name, int64_t items, const std::vector<int32_t>& positions);
  Status CompileSides(const std::set<std::string_view> (&sides)[2], const ChangedAttributes* changes,
                      Predicates* predicates) const;
  Status CompileOne(std::string_view text, bool exclude, Predicate* predicate) const;
  std::shared_ptr<ItemMask> Evaluate(const std::vector<Predicate>& predicates) const;
  int64_t EstimateCount(const std::vector<Predicate>& predicates) const;
  Status UnknownName(const std::string& name) const;
  std::shared_ptr<ItemMask> BringUpToDate(const CachedMask& old, const Predicates& predicates,
                                          const ChangedAttributes& changes) const;
  std::shared_ptr<const ItemMask> FindInCache(const std::string& key, const ChangedAttributes* changes,
                                              CachedMask* old) const;
  bool WasAsked(const std::string& key) const;
  void AddToCache(const std::string& key, const Predicates& predicates,
                  const std::shared_ptr<const ItemMask>& mask) const;

  const int64_t slots_;  // as many as items, or more
  const std::vector<int64_t> group_begins_;
  const size_t cache_bytes_;
  std::unique_ptr<PackedFile> file_;
  std::vector<std::unique_ptr<Column>> columns_;

  mutable std::shared_mutex texts_mutex_;  // of the new texts of all columns

  mutable std::mutex mutex_;
  mutable std::list<CachedMask> cached_;  // the most recently used first
  mutable std::unordered_map<std::string_view, std::list<CachedMask>::iterator> by_key_;  // keys are in cached_
  mutable size_t cached_bytes_ = 0;
  // Hashes of the keys that were asked for. A filter that is asked for only once is not cached, so it displaces
  // nothing.
  mutable std::array<size_t, 4096> asked_ = {};
};

// Changes attributes of the items of an index, or adds rows of attributes to a segment of added items. What it has
// returned never changes again. For one thread at a time.
class AttributeEditor {
 public:
  // Goes on from `before`, or from the values of the file if it is null. With `rows`, it edits a segment instead: no
  // page is there at first. `generation` is that of the changes, larger than any before.
  AttributeEditor(ItemFilters* filters, const std::shared_ptr<const ChangedAttributes>& before, bool rows,
                  uint64_t generation);

  // Sets the values of a slot. Attributes that the index does not have are ignored; texts that no item has had get a
  // code.
  void Set(int64_t slot, const std::vector<AttributeValue>& values);
  // Adds a row behind the last one to a segment, in which all attributes are missing.
  void AddRow();
  // Adds a row of another segment.
  void CopyRow(const ChangedAttributes& from, int64_t row);

  // Returns the attributes with all changes, or what it began with if there were none.
  std::shared_ptr<const ChangedAttributes> Finish();

 private:
  AttributePage* EditPage(size_t column, int64_t page);
  void SetOne(size_t column, int64_t slot, const AttributeValue& value);

  ItemFilters* const filters_;
  const bool rows_;
  const uint64_t generation_;
  std::shared_ptr<const ChangedAttributes> before_;
  std::shared_ptr<ChangedAttributes> after_;  // null until something changes
  // [columns], the pages that this editor has made, by number.
  std::vector<std::unordered_map<int64_t, AttributePage*>> edited_;
  std::vector<std::vector<int32_t>> changed_slots_;  // [columns]
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_ITEM_FILTER_H_
