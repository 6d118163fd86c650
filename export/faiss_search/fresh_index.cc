#include "export/faiss_search/fresh_index.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "dpsr_tf/ops/permutation.h"
#include "export/faiss_binding/faiss_list_scanner.h"
#include "export/faiss_search/inner_product.h"

namespace dpsr {
namespace {

// The open segment holds about so many bytes of vectors. Each search reads all of them.
constexpr int64_t kOpenBytes = 1 << 20;
constexpr int64_t kFewestOpenRows = 1024;
constexpr int64_t kMostOpenRows = 8192;
// So many sealed segments of one tier are merged.
constexpr int64_t kMergedAtOnce = 4;
// If no more rows of a segment pass a filter, all of them are scored.
constexpr int64_t kFewRows = 256;
// With a filter, a segment's search reads so many times the lists in which as many rows pass as without one.
constexpr double kMoreLists = 2;

bool Bit(const std::vector<uint64_t>& words, int64_t bit) { return (words[bit / kBits] >> (bit % kBits) & 1) != 0; }
void ClearBit(std::vector<uint64_t>* words, int64_t bit) { (*words)[bit / kBits] &= ~(uint64_t{1} << (bit % kBits)); }
void SetBit(std::vector<uint64_t>* words, int64_t bit) { (*words)[bit / kBits] |= uint64_t{1} << (bit % kBits); }
int64_t CountAll(const std::vector<uint64_t>& words, int64_t bits) {
  return CountBits({words.data(), words.size()}, 0, bits);
}

std::vector<uint64_t> Ones(int64_t bits) {
  std::vector<uint64_t> words((bits + kBits - 1) / kBits, ~uint64_t{0});
  if (bits % kBits != 0) words.back() = (uint64_t{1} << (bits % kBits)) - 1;
  return words;
}

}  // namespace

// Search.

FreshRowMasks FreshItems::FindRows(const ItemFilters::Predicates& predicates) const {
  FreshRowMasks masks(segments_.size());
  for (size_t i = 0; i < segments_.size(); ++i) {
    const FreshSegmentView& view = segments_[i];
    ItemFilters::FindRows(predicates, *view.attributes, view.rows, &masks[i]);
    for (size_t word = 0; word < masks[i].size(); ++word) masks[i][word] &= (*view.alive)[word];
  }
  return masks;
}

// The nearest lists of a query. The base and all segments share them.
struct FreshItems::ListQuery {
  std::vector<float> y;  // [list_dim], the transformed query; empty until it is known
  std::vector<int64_t> lists;  // the nearest first
  std::vector<float> scores;
};

bool FreshItems::has_listed() const {
  return std::any_of(segments_.begin(), segments_.end(),
                     [](const FreshSegmentView& view) { return view.segment->is_listed(); });
}

int64_t FreshItems::NumProbes(const SearchParameters& parameters) const {
  return std::min(index_->num_lists(), parameters.nprobe != 0 ? parameters.nprobe : index_->parameters().nprobe);
}

// Finds at least so many nearest lists.
Status FreshItems::FindLists(const float* x, int64_t lists, ListQuery* query) const {
  if (query->y.empty()) {
    query->y.resize(index_->list_dim());
    DPSR_RETURN_IF_ERROR(index_->Transform(x, query->y.data()));
  }
  if (lists <= static_cast<int64_t>(query->lists.size())) return Status();
  query->lists.resize(lists);
  query->scores.resize(lists);
  return index_->NearestLists(1, query->y.data(), lists, query->lists.data(), query->scores.data());
}

Status FreshItems::Search(const float* x, int64_t k, const SearchParameters& parameters, const ItemMask* mask,
                          const FreshRowMasks* rows, float* scores, int64_t* labels) const {
  ListQuery query;
  DPSR_RETURN_IF_ERROR(SearchBase(x, k, parameters, mask, &query, scores, labels));
  if (segments_.empty()) return Status();
  BestItems best(k);
  for (int64_t i = 0; i < k; ++i) {
    if (labels[i] >= 0) best.Add(scores[i], labels[i]);
  }
  DPSR_RETURN_IF_ERROR(SearchSegments(x, parameters, rows, &query, &best));
  best.Write({}, k, scores, labels);
  return Status();
}

Status FreshItems::SearchBase(const float* x, int64_t k, const SearchParameters& parameters, const ItemMask* mask,
                              ListQuery* query, float* scores, int64_t* labels) const {
  if (index_->ntotal() == 0 || (visible_ != nullptr && visible_->count == 0)) {
    std::fill(labels, labels + k, -1);
    std::fill(scores, scores + k, kNoScore);
    return Status();
  }
  if (mask != nullptr) return filtered_->Search(x, k, *mask, parameters, scores, labels, visible_.get());
  PositionSet positions;
  const PositionSet* allowed = nullptr;
  if (visible_ != nullptr) {
    positions = PositionSet(visible_positions_->data(), visible_positions_->size());
    allowed = &positions;
  }
  if (has_listed() && !index_->is_on_gpu()) {
    // The segments need the nearest lists too, and to find them takes a third of a search.
    const int64_t nprobe = NumProbes(parameters);
    DPSR_RETURN_IF_ERROR(FindLists(x, nprobe, query));
    const int64_t max_codes = parameters.max_codes != 0 ? parameters.max_codes : index_->parameters().max_codes;
    DPSR_RETURN_IF_ERROR(index_->SearchLists(query->y.data(), k, {query->lists.data(), static_cast<size_t>(nprobe)},
                                             query->scores.data(), max_codes, allowed, scores, labels));
  } else {
    DPSR_RETURN_IF_ERROR(index_->Search(1, x, k, scores, labels, /*nthreads=*/1, parameters, allowed));
  }
  if (visible_ == nullptr) return Status();
  // Where a whole neighbourhood is hidden, FAISS finds too few.
  const int64_t found = k - std::count(labels, labels + k, -1);
  if (found >= std::min(k, visible_->count)) return Status();
  return filtered_->Search(x, k, *visible_, parameters, scores, labels);
}

void FreshItems::ScoreVectors(const float* x, const FreshSegmentView& view, const std::vector<uint64_t>& rows,
                              BestItems* best) const {
  const int64_t dim = index_->d();
  const float* const vectors = view.segment->vectors.data();
  auto* const inner_product = FastInnerProduct();
  ForEachBit(rows.data(), 0, view.rows, [&](int64_t row) {
    best->Add(inner_product(x, vectors + row * dim, dim), view.label + row);
  });
}

// Returns the rows of a segment that are visible and, with a filter, pass.
const std::vector<uint64_t>& FreshItems::RowsOf(size_t segment, const FreshRowMasks* rows) const {
  return rows != nullptr ? (*rows)[segment] : *segments_[segment].alive;
}

Status FreshItems::SearchSegments(const float* x, const SearchParameters& parameters, const FreshRowMasks* rows,
                                  ListQuery* query, BestItems* best) const {
  for (size_t i = 0; i < segments_.size(); ++i) {
    if (!segments_[i].segment->is_listed()) ScoreVectors(x, segments_[i], RowsOf(i, rows), best);
  }
  if (!has_listed()) return Status();
  if (best->is_full()) return SearchListed(x, parameters, rows, /*all=*/false, query, best);
  // There are fewer than k items in the base. What is missing may be far from the query.
  BestItems found = *best;
  DPSR_RETURN_IF_ERROR(SearchListed(x, parameters, rows, /*all=*/false, query, &found));
  if (!found.is_full()) return SearchListed(x, parameters, rows, /*all=*/true, query, best);
  *best = std::move(found);
  return Status();
}

// Searches the segments that have lists: the nearest ones, or `all` rows.
Status FreshItems::SearchListed(const float* x, const SearchParameters& parameters, const FreshRowMasks* rows, bool all,
                                ListQuery* query, BestItems* best) const {
  const int64_t num_lists = index_->num_lists();
  const int64_t code_size = index_->code_size();
  const int64_t nprobe = NumProbes(parameters);
  // The segments, and the number of nearest lists to read in each; 0 to score all rows that pass.
  std::vector<size_t> listed;
  std::vector<int64_t> lists_to_read;
  int64_t most_lists = 0;
  for (size_t i = 0; i < segments_.size(); ++i) {
    const FreshSegmentView& view = segments_[i];
    if (!view.segment->is_listed()) continue;
    int64_t lists = all ? 0 : nprobe;
    if (!all && rows != nullptr) {
      const int64_t count = CountAll(RowsOf(i, rows), view.rows);
      if (count == 0) continue;
      const double share = static_cast<double>(count) / static_cast<double>(view.rows);
      const double wanted = kMoreLists * static_cast<double>(nprobe) / share;
      lists = count <= kFewRows || wanted >= static_cast<double>(num_lists) ? 0 : static_cast<int64_t>(wanted);
    }
    listed.push_back(i);
    lists_to_read.push_back(lists);
    most_lists = std::max(most_lists, lists);
  }
  if (listed.empty()) return Status();

  DPSR_RETURN_IF_ERROR(FindLists(x, most_lists, query));
  std::unique_ptr<FaissListScanner> scanner;
  DPSR_RETURN_IF_ERROR(FaissListScanner::Create(*index_, &scanner));
  DPSR_RETURN_IF_ERROR(scanner->SetQuery(query->y.data()));
  // Of the rows that pass in a segment where they are few, each is scored by its first entry.
  for (size_t j = 0; j < listed.size(); ++j) {
    if (lists_to_read[j] != 0) continue;
    const FreshSegmentView& view = segments_[listed[j]];
    const FreshSegment& segment = *view.segment;
    ForEachBit(RowsOf(listed[j], rows).data(), 0, view.rows, [&](int64_t row) {
      const int32_t slot = segment.row_slots[row * item_ids_.entries];
      const int32_t list = segment.row_lists[row * item_ids_.entries];
      scanner->SetList(list, filtered_->CentroidScore(query->y.data(), list));
      best->Add(scanner->Score(segment.codes.data() + slot * code_size), view.label + row);
    });
  }
  const int64_t max_codes = parameters.max_codes != 0 ? parameters.max_codes : index_->parameters().max_codes;
  int64_t budget = max_codes == 0 ? std::numeric_limits<int64_t>::max() : std::max(max_codes, best->k());
  for (int64_t n = 0; n < most_lists && budget > 0; ++n) {
    const int64_t list = query->lists[n];
    if (list < 0) continue;
    scanner->SetList(list, query->scores[n]);
    for (size_t j = 0; j < listed.size(); ++j) {
      if (n >= lists_to_read[j]) continue;
      const FreshSegmentView& view = segments_[listed[j]];
      const FreshSegment& segment = *view.segment;
      const std::vector<uint64_t>& words = RowsOf(listed[j], rows);
      for (int32_t slot = segment.list_begins[list]; slot < segment.list_begins[list + 1]; ++slot) {
        const int32_t row = segment.slot_rows[slot];
        if (!Bit(words, row)) continue;
        best->Add(scanner->Score(segment.codes.data() + slot * code_size), view.label + row);
        --budget;
      }
    }
  }
  return Status();
}

// Changes.

// A batch of changes that is being applied. What it shares with the snapshot before is copied before it is changed.
struct FreshIndex::Batch {
  Batch() = default;
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;
  // Puts back what is known of the items, unless the batch was applied. Allocates nothing.
  ~Batch() {
    for (auto change = undo.rbegin(); change != undo.rend(); ++change) *change->first = change->second;
  }

  std::vector<std::pair<Known*, Known>> undo;
  std::shared_ptr<FreshSegment> open;  // the open segment after the batch
  FreshItems* items = nullptr;         // the next snapshot
  FreshIndexState state;
  uint64_t generation = 0;
  // Lists and codes of the puts, [puts, entries].
  std::vector<int64_t> lists;
  std::vector<uint8_t> codes;
  double residual_sum = 0;
  int64_t num_residuals = 0;

  std::shared_ptr<ItemMask> visible;  // null until something in the base is hidden
  std::shared_ptr<std::vector<uint64_t>> visible_positions;
  std::unique_ptr<AttributeEditor> base_attributes;
  // By the serial number of a segment.
  std::unordered_map<int64_t, std::shared_ptr<std::vector<uint64_t>>> alive;
  std::unordered_map<int64_t, std::unique_ptr<AttributeEditor>> attributes;

  FreshSegmentView* Find(int64_t serial) const {
    const auto found = std::find_if(items->segments_.begin(), items->segments_.end(),
                                    [serial](const FreshSegmentView& view) { return view.serial == serial; });
    return &*found;
  }
};

FreshIndex::FreshIndex(const FaissIndex* index, const FilteredSearch* filtered, const ItemIds& item_ids,
                       ItemFilters* filters, const Options& options)
    : index_(*index),
      filtered_(*filtered),
      base_ids_(item_ids),
      filters_(filters),
      options_(options),
      dim_(index->d()),
      has_lists_(index->has_lists()),
      entries_(item_ids.entries),
      open_rows_(options.open_rows != 0
                     ? options.open_rows
                     : std::clamp<int64_t>(kOpenBytes / static_cast<int64_t>(dim_ * sizeof(float)), kFewestOpenRows,
                                           kMostOpenRows)) {
  state_.offset = options.offset;
  state_.items = static_cast<int64_t>(item_ids.ids.size());
}

void FreshIndex::SetVersion(int64_t id, int64_t version) {
  const std::lock_guard<std::mutex> lock(apply_mutex_);
  Known known;
  known.version = version;
  if (BasePositions(id).empty()) known.serial = kNowhere;
  known_[id] = known;
}

std::shared_ptr<const FreshItems> FreshIndex::items() const {
  const std::lock_guard<std::mutex> lock(items_mutex_);
  return items_;
}

FreshIndexState FreshIndex::state() const {
  const std::lock_guard<std::mutex> lock(items_mutex_);
  return state_;
}

std::string FreshIndex::FindKey(int64_t id) const {
  const std::shared_lock<std::shared_mutex> lock(keys_mutex_);
  const auto found = keys_.find(id);
  return found == keys_.end() ? "" : found->second;
}

int64_t FreshIndex::FindId(std::string_view key) const {
  const std::shared_lock<std::shared_mutex> lock(keys_mutex_);
  const auto found = ids_.find(std::string(key));
  return found == ids_.end() ? kNoItem : found->second;
}

Status FreshIndex::Apply(int64_t offset, int64_t next_offset, const std::vector<ItemChange>& changes, bool* applied) {
  *applied = false;
  if (next_offset < offset) {
    return MakeStatus(StatusCode::kInvalidArgument, "next_offset is ", next_offset, ", expected at least the offset ",
                      offset);
  }
  for (const ItemChange& change : changes) {
    const auto kind = static_cast<int32_t>(change.kind);
    if (kind < 0 || kind > static_cast<int32_t>(ItemChangeKind::kDelete)) {
      return MakeStatus(StatusCode::kInvalidArgument, "the kind of a change is ", kind,
                        ", expected 0 (put), 1 (update) or 2 (delete)");
    }
    if (change.id < 0) {
      return MakeStatus(StatusCode::kInvalidArgument, "the item id of a change is ", change.id, ", expected ids >= 0");
    }
    if (change.kind == ItemChangeKind::kPut && change.vector == nullptr) {
      return MakeStatus(StatusCode::kInvalidArgument, "item ", change.id, " is put without a vector");
    }
  }
  const std::lock_guard<std::mutex> lock(apply_mutex_);
  Batch batch;
  std::shared_ptr<const FreshItems> before;
  {
    const std::lock_guard<std::mutex> items_lock(items_mutex_);
    if (offset != state_.offset) return Status();
    before = items_;
    batch.state = state_;
  }
  DPSR_RETURN_IF_ERROR(ComputeCodes(changes, &batch));

  // From here on only memory can run out. Until the end, nothing changes that the batch does not undo: searches do not
  // see rows behind those of their snapshot, nor keys of items that they do not find.
  batch.open = open_;
  const std::shared_ptr<FreshItems> next(before != nullptr ? new FreshItems(*before) : new FreshItems);
  if (before == nullptr) {
    next->index_ = &index_;
    next->filtered_ = &filtered_;
  }
  batch.items = next.get();
  batch.generation = ++generation_;
  {
    const std::unique_lock<std::shared_mutex> keys_lock(keys_mutex_);
    for (const ItemChange& change : changes) {
      if (change.kind != ItemChangeKind::kPut || change.key.empty()) continue;
      keys_[change.id] = change.key;
      ids_[change.key] = change.id;
    }
  }
  int64_t put = 0;
  for (const ItemChange& change : changes) {
    ApplyOne(change, put, &batch);
    if (change.kind == ItemChangeKind::kPut) ++put;
    batch.state.last_time = std::max(batch.state.last_time, change.time);
  }
  FinishAttributes(&batch);
  DropHiddenRows(&batch);

  if (batch.visible != nullptr) {
    next->visible_ = batch.visible;
    next->visible_positions_ =
        batch.visible_positions != nullptr
            ? std::shared_ptr<const std::vector<uint64_t>>(batch.visible_positions)
            : std::shared_ptr<const std::vector<uint64_t>>(batch.visible, &batch.visible->words);
  }
  next->item_ids_ = base_ids_;
  FreshIndexState& state = batch.state;
  state.offset = next_offset;
  state.open = state.sealed = state.segments = 0;
  int64_t label = static_cast<int64_t>(base_ids_.ids.size());
  for (FreshSegmentView& view : next->segments_) {
    view.label = label;
    next->item_ids_.added.push_back({label, {view.segment->ids.data(), static_cast<size_t>(view.rows)}});
    label += view.rows;
    if (view.tier < 0) {
      state.open += view.num_alive;
    } else {
      state.sealed += view.num_alive;
      ++state.segments;
    }
  }
  state.hidden = next->num_hidden_;
  state.items = static_cast<int64_t>(base_ids_.ids.size()) - next->num_hidden_items_ + state.open + state.sealed;
  residual_sum_ += batch.residual_sum;
  num_residuals_ += batch.num_residuals;
  if (num_residuals_ > 0) state.drift = residual_sum_ / static_cast<double>(num_residuals_) / options_.base_residual;
  {
    const std::lock_guard<std::mutex> items_lock(items_mutex_);
    if (!changes.empty()) items_ = next;
    state_ = state;
  }
  open_ = std::move(batch.open);
  batch.undo.clear();
  *applied = true;
  return Status();
}

// Finds lists and codes of the puts whose vectors are indexed. Those of the others are not used.
Status FreshIndex::ComputeCodes(const std::vector<ItemChange>& changes, Batch* batch) const {
  if (!has_lists_) return Status();
  std::vector<float> x;
  int64_t puts = 0;
  for (const ItemChange& change : changes) {
    if (change.kind != ItemChangeKind::kPut) continue;
    x.insert(x.end(), change.vector, change.vector + dim_);
    ++puts;
  }
  if (puts == 0) return Status();
  for (float& value : x) value = std::isfinite(value) ? value : 0;
  const int64_t list_dim = index_.list_dim();
  const int64_t code_size = index_.code_size();
  std::vector<float> y(puts * list_dim);
  DPSR_RETURN_IF_ERROR(index_.Transform(x.data(), y.data(), puts));
  batch->lists.resize(puts * entries_);
  std::vector<float> scores(puts * entries_);
  DPSR_RETURN_IF_ERROR(index_.NearestLists(puts, y.data(), entries_, batch->lists.data(), scores.data()));
  batch->codes.resize(puts * entries_ * code_size);
  std::vector<int64_t> lists(puts);
  std::vector<uint8_t> codes(puts * code_size);
  std::vector<float> decoded(puts * list_dim);
  for (int64_t entry = 0; entry < entries_; ++entry) {
    for (int64_t i = 0; i < puts; ++i) {
      int64_t& list = batch->lists[i * entries_ + entry];
      if (entry == 0) list = std::max<int64_t>(list, 0);  // the first entry is always there
      lists[i] = std::max<int64_t>(list, 0);
    }
    DPSR_RETURN_IF_ERROR(index_.Encode(puts, y.data(), lists.data(), codes.data()));
    for (int64_t i = 0; i < puts; ++i) {
      std::copy_n(codes.data() + i * code_size, code_size, batch->codes.data() + (i * entries_ + entry) * code_size);
    }
    if (entry != 0) continue;
    DPSR_RETURN_IF_ERROR(index_.Decode(puts, codes.data(), lists.data(), decoded.data()));
    for (int64_t i = 0; i < puts; ++i) {
      double squares = 0, norm = 0;
      for (int64_t j = i * list_dim; j < (i + 1) * list_dim; ++j) {
        squares += (y[j] - decoded[j]) * (y[j] - decoded[j]);
        norm += y[j] * y[j];
      }
      if (norm == 0 || !std::isfinite(squares)) continue;
      batch->residual_sum += squares;
      ++batch->num_residuals;
    }
  }
  return Status();
}

void FreshIndex::ApplyOne(const ItemChange& change, int64_t put, Batch* batch) {
  const auto found = known_.find(change.id);
  std::vector<int64_t> positions;
  Known known;
  if (found != known_.end()) known = found->second;
  if (known.serial == kInBase) {
    positions = BasePositions(change.id);
    if (positions.empty()) known.serial = kNowhere;
  }
  const bool several = options_.num_shards > 1;
  const bool is_home = !several || static_cast<int64_t>(Mix64(static_cast<uint64_t>(change.id)) %
                                                        static_cast<uint64_t>(options_.num_shards)) == options_.shard;
  if (change.version > 0 && change.version < known.version) {
    if (is_home) ++batch->state.ignored;
    return;
  }
  const bool is_unknown = known.serial == kNowhere;
  if (is_unknown && change.kind != ItemChangeKind::kPut) {
    // The item may be in another shard, so here the change is not counted.
    if (!several) ++batch->state.ignored;
    // A put that comes later, but is older, must not bring the item back. If another shard may have the item, the same
    // holds for an update, so that all shards ignore the same puts.
    if (change.version > 0 && (several || change.kind == ItemChangeKind::kDelete)) {
      known.version = change.version;
      KnownOf(change.id, batch) = known;
    }
    return;
  }
  if (change.version > 0) known.version = change.version;

  if (change.kind == ItemChangeKind::kUpdate) {
    ++batch->state.updated;
    if (known.serial == kInBase) {
      if (batch->base_attributes == nullptr) {
        batch->base_attributes = std::make_unique<AttributeEditor>(filters_, batch->items->attributes_, /*rows=*/false,
                                                                   batch->generation);
      }
      int32_t buffer;
      for (const int64_t position : positions) {
        for (const int32_t slot : SlotsOf(position, &buffer)) batch->base_attributes->Set(slot, change.attributes);
      }
    } else {
      auto& editor = batch->attributes[known.serial];
      if (editor == nullptr) {
        editor = std::make_unique<AttributeEditor>(filters_, batch->Find(known.serial)->attributes, /*rows=*/true,
                                                   batch->generation);
      }
      editor->Set(known.row, change.attributes);
    }
    if (known.version > 0 || found != known_.end()) KnownOf(change.id, batch) = known;
    return;
  }

  if (!is_unknown) {
    if (known.serial == kInBase) {
      HideInBase(positions, batch);
    } else {
      HideRow(known, batch);
    }
  }
  known.serial = kNowhere;
  KnownOf(change.id, batch) = known;
  if (change.kind == ItemChangeKind::kDelete || !is_home) return;
  const auto is_finite = [](float value) { return std::isfinite(value); };
  const auto is_zero = [](float value) { return value == 0; };
  if (!std::all_of(change.vector, change.vector + dim_, is_finite) ||
      std::all_of(change.vector, change.vector + dim_, is_zero)) {
    ++batch->state.not_indexed;
    return;
  }
  AddRow(change, put, batch);
}

// Returns what is known of an item, to be changed by the batch. A new entry says no more than none.
FreshIndex::Known& FreshIndex::KnownOf(int64_t id, Batch* batch) {
  Known& known = known_[id];
  batch->undo.emplace_back(&known, known);
  return known;
}

// Returns the positions of an item in the base.
std::vector<int64_t> FreshIndex::BasePositions(int64_t id) {
  const Span<const int64_t> ids = base_ids_.ids;
  if (base_ids_.distinct) {
    const auto* const at = std::lower_bound(ids.begin(), ids.end(), id);
    if (at == ids.end() || *at != id) return {};
    return {at - ids.begin()};
  }
  if (by_id_.empty()) {
    by_id_.resize(ids.size());
    std::iota(by_id_.begin(), by_id_.end(), 0);
    std::sort(by_id_.begin(), by_id_.end(), [&](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  }
  std::vector<int64_t> positions;
  auto at = std::lower_bound(by_id_.begin(), by_id_.end(), id, [&](int32_t a, int64_t b) { return ids[a] < b; });
  for (; at != by_id_.end() && ids[*at] == id; ++at) positions.push_back(*at);
  return positions;
}

// Returns the slots of a position. `buffer` may be used for them.
Span<const int32_t> FreshIndex::SlotsOf(int64_t position, int32_t* buffer) {
  const std::vector<int32_t>& order = filtered_.order().positions;
  if (order.empty()) {
    *buffer = static_cast<int32_t>(position);
    return {buffer, 1};
  }
  if (position_slots_.empty()) {
    position_slots_.assign(order.size(), -1);
    for (size_t slot = 0; slot < order.size(); ++slot) {
      int32_t* at = &position_slots_[order[slot] * entries_];
      while (*at >= 0) ++at;
      *at = static_cast<int32_t>(slot);
    }
  }
  return {position_slots_.data() + position * entries_, static_cast<size_t>(entries_)};
}

void FreshIndex::HideInBase(const std::vector<int64_t>& positions, Batch* batch) {
  const ItemOrder& order = filtered_.order();
  FreshItems& items = *batch->items;
  if (batch->visible == nullptr) {
    if (items.visible_ != nullptr) {
      batch->visible = std::make_shared<ItemMask>(*items.visible_);
    } else {
      batch->visible = std::make_shared<ItemMask>();
      batch->visible->words = Ones(filters_->num_slots());
      batch->visible->count = index_.ntotal();
      for (size_t list = 0; list + 1 < order.group_begins.size(); ++list) {
        batch->visible->group_counts.push_back(
            static_cast<int32_t>(order.group_begins[list + 1] - order.group_begins[list]));
      }
    }
    if (!order.positions.empty()) {
      batch->visible_positions = items.visible_positions_ != nullptr
                                     ? std::make_shared<std::vector<uint64_t>>(*items.visible_positions_)
                                     : std::make_shared<std::vector<uint64_t>>(Ones(base_ids_.ids.size()));
    }
  }
  ItemMask& visible = *batch->visible;
  int32_t buffer;
  for (const int64_t position : positions) {
    ++items.num_hidden_items_;
    if (batch->visible_positions != nullptr) ClearBit(batch->visible_positions.get(), position);
    for (const int32_t slot : SlotsOf(position, &buffer)) {
      ClearBit(&visible.words, slot);
      ++items.num_hidden_;
      --visible.count;
      if (order.group_begins.empty() || slot >= order.group_begins.back()) continue;
      const auto group = std::upper_bound(order.group_begins.begin(), order.group_begins.end(), slot) - 1;
      --visible.group_counts[group - order.group_begins.begin()];
    }
  }
}

// Hides an item of a segment.
void FreshIndex::HideRow(const Known& known, Batch* batch) {
  FreshSegmentView* const view = batch->Find(known.serial);
  auto& alive = batch->alive[known.serial];
  if (alive == nullptr) {
    alive = std::make_shared<std::vector<uint64_t>>(*view->alive);
    view->alive = alive;
  }
  ClearBit(alive.get(), known.row);
  --view->num_alive;
}

void FreshIndex::AddRow(const ItemChange& change, int64_t put, Batch* batch) {
  std::vector<FreshSegmentView>& segments = batch->items->segments_;
  const int64_t code_size = has_lists_ ? index_.code_size() : 0;
  std::shared_ptr<FreshSegment>& open = batch->open;
  if (open == nullptr) {
    open = std::make_shared<FreshSegment>();
    open->ids.resize(open_rows_);
    open->vectors.resize(open_rows_ * dim_);
    if (has_lists_) {
      open->row_lists.resize(open_rows_ * entries_);
      open->codes.resize(open_rows_ * entries_ * code_size);
    }
    FreshSegmentView& view = segments.emplace_back();
    view.segment = open;
    view.serial = next_serial_++;
    view.alive = std::make_shared<std::vector<uint64_t>>((open_rows_ + kBits - 1) / kBits, 0);
  }
  FreshSegmentView& view = segments.back();
  const int64_t row = view.rows++;
  open->ids[row] = change.id;
  std::copy_n(change.vector, dim_, open->vectors.data() + row * dim_);
  for (int64_t entry = 0; has_lists_ && entry < entries_; ++entry) {
    open->row_lists[row * entries_ + entry] = static_cast<int32_t>(batch->lists[put * entries_ + entry]);
  }
  if (has_lists_) {
    std::copy_n(batch->codes.data() + put * entries_ * code_size, entries_ * code_size,
                open->codes.data() + row * entries_ * code_size);
  }
  auto& alive = batch->alive[view.serial];
  if (alive == nullptr) {
    alive = std::make_shared<std::vector<uint64_t>>(*view.alive);
    view.alive = alive;
  }
  SetBit(alive.get(), row);
  ++view.num_alive;
  auto& editor = batch->attributes[view.serial];
  if (editor == nullptr) {
    editor = std::make_unique<AttributeEditor>(filters_, view.attributes, /*rows=*/true, batch->generation);
  }
  editor->AddRow();
  editor->Set(row, change.attributes);
  Known& known = KnownOf(change.id, batch);
  known.serial = view.serial;
  known.row = row;
  if (view.rows == open_rows_) Seal(batch);
}

// Gives the changed attributes to the snapshot.
void FreshIndex::FinishAttributes(Batch* batch) {
  if (batch->base_attributes != nullptr) {
    batch->items->attributes_ = batch->base_attributes->Finish();
    batch->base_attributes.reset();
  }
  for (auto& [serial, editor] : batch->attributes) {
    FreshSegmentView* const view = batch->Find(serial);
    view->attributes = editor->Finish();
  }
  batch->attributes.clear();
}

// Seals the open segment, and merges segments of one tier.
void FreshIndex::Seal(Batch* batch) {
  FinishAttributes(batch);
  std::vector<FreshSegmentView>& segments = batch->items->segments_;
  batch->open.reset();
  Replace(segments.size() - 1, segments.size(), 0, batch);
  while (!segments.empty()) {
    const size_t size = segments.size();
    size_t begin = size;
    while (begin > 0 && segments[begin - 1].tier == segments.back().tier) --begin;
    if (size - begin < static_cast<size_t>(kMergedAtOnce)) return;
    Replace(begin, size, segments.back().tier + 1, batch);
  }
}

// Rewrites sealed segments in which most rows are hidden.
void FreshIndex::DropHiddenRows(Batch* batch) {
  std::vector<FreshSegmentView>& segments = batch->items->segments_;
  for (size_t i = segments.size(); i-- > 0;) {
    if (segments[i].tier >= 0 && 2 * segments[i].num_alive < segments[i].rows) {
      Replace(i, i + 1, segments[i].tier, batch);
    }
  }
}

// Replaces segments by one with their visible rows.
void FreshIndex::Replace(size_t begin, size_t end, int tier, Batch* batch) {
  std::vector<FreshSegmentView>& segments = batch->items->segments_;
  FreshSegmentView merged = MergeSegments(segments.data() + begin, segments.data() + end, tier);
  for (size_t i = begin; i < end; ++i) batch->alive.erase(segments[i].serial);
  segments.erase(segments.begin() + begin, segments.begin() + end);
  if (merged.rows == 0) return;
  for (int64_t row = 0; row < merged.rows; ++row) {
    Known& known = KnownOf(merged.segment->ids[row], batch);
    known.serial = merged.serial;
    known.row = row;
  }
  segments.insert(segments.begin() + begin, std::move(merged));
}

FreshSegmentView FreshIndex::MergeSegments(const FreshSegmentView* begin, const FreshSegmentView* end, int tier) {
  auto merged = std::make_shared<FreshSegment>();
  AttributeEditor attributes(filters_, nullptr, /*rows=*/true, generation_);
  const int64_t code_size = has_lists_ ? index_.code_size() : 0;
  std::vector<int32_t> lists;          // [rows, entries]
  std::vector<const uint8_t*> codes;  // [rows, entries]
  for (const FreshSegmentView* view = begin; view < end; ++view) {
    const FreshSegment& segment = *view->segment;
    ForEachBit(view->alive->data(), 0, view->rows, [&](int64_t row) {
      merged->ids.push_back(segment.ids[row]);
      if (filters_->num_columns() > 0) attributes.CopyRow(*view->attributes, row);
      if (!has_lists_) {
        const float* const vector = segment.vectors.data() + row * dim_;
        merged->vectors.insert(merged->vectors.end(), vector, vector + dim_);
        return;
      }
      for (int64_t entry = 0; entry < entries_; ++entry) {
        const int64_t at = row * entries_ + entry;
        const int64_t slot = segment.is_listed() ? segment.row_slots[at] : at;
        lists.push_back(segment.row_lists[at]);
        codes.push_back(segment.codes.data() + std::max<int64_t>(slot, 0) * code_size);
      }
    });
  }
  FreshSegmentView view;
  view.rows = static_cast<int64_t>(merged->ids.size());
  view.alive = std::make_shared<std::vector<uint64_t>>(Ones(view.rows));
  view.num_alive = view.rows;
  view.attributes = attributes.Finish();
  view.serial = next_serial_++;
  view.tier = tier;
  if (has_lists_) {
    std::vector<int32_t>& begins = merged->list_begins;
    begins.assign(index_.num_lists() + 1, 0);
    for (const int32_t list : lists) {
      if (list >= 0) ++begins[list + 1];
    }
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<int32_t> next(begins.begin(), begins.end() - 1);
    merged->slot_rows.resize(begins.back());
    merged->row_slots.resize(lists.size(), -1);
    merged->codes.resize(begins.back() * code_size);
    for (size_t at = 0; at < lists.size(); ++at) {
      if (lists[at] < 0) continue;
      const int32_t slot = next[lists[at]]++;
      merged->slot_rows[slot] = static_cast<int32_t>(at / entries_);
      merged->row_slots[at] = slot;
      std::copy_n(codes[at], code_size, merged->codes.data() + slot * code_size);
    }
    merged->row_lists = std::move(lists);
  }
  view.segment = std::move(merged);
  return view;
}

}  // namespace dpsr
