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
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"

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

// The attributes of the items of an index. Thread-safe: only its cache changes.
class ItemFilters {
 public:
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
  Status Apply(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
               std::shared_ptr<const ItemMask>* mask) const;

  // Returns the bytes of results that are in the cache now.
  size_t cached_bytes() const;

 private:
  struct Column;
  struct Predicate;
  struct CachedMask {
    std::string key;
    std::shared_ptr<const ItemMask> mask;
    size_t bytes;
  };

  ItemFilters(int64_t slots, std::vector<int64_t> group_begins, size_t cache_bytes);
  Status AddColumn(const std::string& name, int64_t items, const std::vector<int32_t>& positions);
  Status Compile(std::string_view text, bool exclude, Predicate* predicate) const;
  std::shared_ptr<ItemMask> Evaluate(const std::vector<Predicate>& predicates) const;
  int64_t EstimateCount(const std::vector<Predicate>& predicates) const;
  Status UnknownName(const std::string& name) const;
  std::shared_ptr<const ItemMask> FindInCache(const std::string& key) const;
  bool WasAsked(const std::string& key) const;
  void AddToCache(const std::string& key, const std::shared_ptr<const ItemMask>& mask) const;

  const int64_t slots_;  // as many as items, or more
  const std::vector<int64_t> group_begins_;
  const size_t cache_bytes_;
  std::unique_ptr<PackedFile> file_;
  std::vector<std::unique_ptr<Column>> columns_;

  mutable std::mutex mutex_;
  mutable std::list<CachedMask> cached_;  // the most recently used first
  mutable std::unordered_map<std::string_view, std::list<CachedMask>::iterator> by_key_;  // keys are in cached_
  mutable size_t cached_bytes_ = 0;
  // Hashes of the keys that were asked for. A filter that is asked for only once is not cached, so it displaces
  // nothing.
  mutable std::array<size_t, 4096> asked_ = {};
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_ITEM_FILTER_H_
