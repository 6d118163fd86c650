// Filters on attributes of items: "brand=acme", "price=10..20", "tags=new|sale". Free of TensorFlow and FAISS.
//
// An expression is NAME=VALUE, with alternatives NAME=A|B|C, of which one has to hold; a backslash before | or \ takes
// that character as it is. A number also compares with ranges, both ends included: price=10..20, price=..20, price=10.. .
// Of a multi-valued attribute any value may hold. A value that no item has is no error: nothing meets it. An item
// without a value meets no expression on that attribute.
//
// An item passes a filter when it meets each expression to include and none to exclude. The outcome is a bit an item,
// computed and kept where the same is asked a second time. The first time, where many pass and the index has groups,
// nothing is computed beforehand: a search asks for the bits of the groups that it looks into. What few items meet is
// looked up in the slots of the column by value; all else takes a pass over the column.
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

// Expressions to include, or to exclude, of one filter, and bytes of one expression, at most.
inline constexpr size_t kMaxExpressions = 256;
inline constexpr size_t kMaxExpressionBytes = 1 << 16;

// The order in which an index reads its items: slot i holds the item of position positions[i]. The items of group g, a
// list of the index, are slots [group_begins[g], group_begins[g + 1]).
struct ItemOrder {
  std::vector<int32_t> positions;     // [items]; empty: slot i is position i
  std::vector<int64_t> group_begins;  // [groups + 1]; empty: there are no groups
};

// The items that pass a filter.
struct ItemMask {
  std::vector<uint64_t> words;        // slot i is bit i % 64 of word i / 64; no bit behind the last slot
  int64_t count = 0;                  // bits that are 1; estimated where they are not known
  std::vector<int32_t> group_counts;  // [groups]: of them in each group
  // Where it is set, words and group_counts are empty: clears those of the bits of the slots [begin, end) in `words`
  // that do not pass; bit 0 of the first word is slot `begin`, a multiple of 64.
  std::function<void(int64_t begin, int64_t end, uint64_t* words)> keep;
};

// The slots of [begin, end) whose bits are 1.
int64_t CountBits(Span<const uint64_t> words, int64_t begin, int64_t end);

// One expression: a name and the alternatives, escapes resolved.
struct FilterExpression {
  std::string name;
  std::vector<std::string> values;

  // Errors: InvalidArgument, with the text and the form that is expected.
  static Status Parse(std::string_view text, FilterExpression* expression);
};

// The attributes of the items of an index. Immutable but for its cache; thread-safe.
class ItemFilters {
 public:
  // Bytes of results that are kept.
  static constexpr size_t kCacheBytes = size_t{64} << 20;
  // From so many items on bits are computed group by group, where one in kOverMany passes or more.
  static constexpr int64_t kManyItems = 1 << 17;
  static constexpr int64_t kOverMany = 16;

  // Opens a packed file of the kind "item_attributes" (dpsr_export/attributes.py has its layout) for `items` items in
  // this order, of which the constructor's caller need not keep a copy. An empty path: there are no attributes.
  // `item_ids_fingerprint` is that of the item ids with which the file has to have been written.
  // Errors: those of PackedFile::Open; DataLoss (sections that are missing or do not fit together);
  // FailedPrecondition (of another number of items, or of other item ids).
  static Status Open(const std::string& path, int64_t items, uint64_t item_ids_fingerprint, const ItemOrder& order,
                     std::unique_ptr<ItemFilters>* filters, size_t cache_bytes = kCacheBytes);
  ~ItemFilters();
  ItemFilters(const ItemFilters&) = delete;
  ItemFilters& operator=(const ItemFilters&) = delete;

  // The items that meet each of `include` and none of `exclude`; expressions that are empty do not count.
  // Errors: InvalidArgument (malformed, an unknown name, no number where one is compared, too many or too long), with
  // what was given and what is allowed.
  Status Apply(const std::vector<std::string_view>& include, const std::vector<std::string_view>& exclude,
               std::shared_ptr<const ItemMask>* mask) const;

  // Bytes of results that are kept now.
  size_t cached_bytes() const;

 private:
  struct Column;
  struct Test;
  struct Kept {
    std::string key;
    std::shared_ptr<const ItemMask> mask;
    size_t bytes;
  };

  ItemFilters(int64_t items, std::vector<int64_t> group_begins, size_t cache_bytes);
  Status AddColumn(const std::string& name, const std::vector<int32_t>& positions);
  Status Compile(std::string_view text, bool exclude, Test* test) const;
  std::shared_ptr<ItemMask> Evaluate(const std::vector<Test>& tests) const;
  int64_t EstimateCount(const std::vector<Test>& tests) const;
  Status UnknownName(const std::string& name) const;
  std::shared_ptr<const ItemMask> Find(const std::string& key) const;
  bool WasAsked(const std::string& key) const;
  void Keep(const std::string& key, const std::shared_ptr<const ItemMask>& mask) const;

  const int64_t items_;
  const std::vector<int64_t> group_begins_;
  const size_t cache_bytes_;
  std::unique_ptr<PackedFile> file_;
  std::vector<std::unique_ptr<Column>> columns_;

  mutable std::mutex mutex_;
  mutable std::list<Kept> kept_;  // the most recently used first
  mutable std::unordered_map<std::string_view, std::list<Kept>::iterator> by_key_;  // keys are those of kept_
  mutable size_t kept_bytes_ = 0;
  // Hashes of keys that were asked: what is asked only once drives nothing out, and its memory is used again.
  mutable std::array<size_t, 4096> asked_ = {};
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_ITEM_FILTER_H_
