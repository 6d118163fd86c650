#include "export/faiss_search/filtered_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "export/faiss_binding/faiss_list_scanner.h"
#include "export/faiss_search/best_items.h"
#include "export/faiss_search/inner_product.h"

namespace dpsr {
namespace {

// A code is prefetched from memory this many codes before it is scored.
constexpr size_t kAhead = 32;
// Scores that differ by a smaller share are equal: the sums were computed in another order.
constexpr float kRounding = 1e-3f;
// Items are scored in this many portions. The results of the last two of them tell whether more are worth their time.
constexpr int64_t kPortions = 8;
// A search continues while twice as many scored items would give more than this share of new results. Searches that
// probe a larger share of the lists are to be more thorough, and continue longer.
constexpr double kNewResults = 0.2;
// A search scores at least this many times k items.
constexpr int64_t kLeastOverK = 2;
// A search scores at most this many times the items that it has to.
constexpr int64_t kMostTimes = 4;
// With a filter, a graph search takes about k * ntotal / passing steps. One step takes as long as scoring 40 items.
constexpr double kStepOverScore = 40;

// Returns the share of the passing items that a search has to score to find as much as a search without a filter that
// scores a share `effort` of all items. `passing` is the share of the items that pass, `results` k over their number.
//
// If passing items are a small share, the k best of them are spread over many lists, but need not be looked for as
// thoroughly: with the same number of scored items, a search finds more of them than without a filter. The formula was
// fitted to filters that are independent of the vectors; where they are not, searches go on.
double ShareToScore(double effort, double passing, double results) {
  if (effort >= 1) return 1;
  const double excess = 1 + 2.0 * std::pow(1 - effort, 8) * std::max(0.0, 1 - results);
  return std::min(1.0, effort / (passing + excess * effort * (1 - std::min(1.0, passing))));
}

}  // namespace

Status FilteredSearch::Create(FaissIndex* index, std::unique_ptr<FilteredSearch>* search, int64_t entries) {
  if (index->ntotal() > std::numeric_limits<int32_t>::max()) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the index has ", index->ntotal(), " items, expected at most ",
                      std::numeric_limits<int32_t>::max(), ": spread the items over several shards");
  }
  if (entries > 1 && (!index->is_ivf() || index->can_reconstruct())) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the index has ", entries,
                      " entries for each item, expected one: it has no inverted lists, or refines their results");
  }
  std::unique_ptr<FilteredSearch> created(new FilteredSearch(*index, entries));
  if (index->has_lists()) DPSR_RETURN_IF_ERROR(created->ReadLists(index));
  DPSR_RETURN_IF_ERROR(created->CompareScores());
  *search = std::move(created);
  return Status();
}

Status FilteredSearch::ReadLists(FaissIndex* index) {
  const int64_t ntotal = index_.ntotal();
  const int64_t lists = index_.num_lists();
  order_.group_begins.reserve(lists + 1);
  order_.group_begins.push_back(0);
  order_.positions.reserve(ntotal);
  const int64_t items = num_items();
  std::vector<uint8_t> seen(items, 0);  // number of entries of each position
  std::vector<int64_t> ids;
  bool in_order = true;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t size = index_.list_size(list);
    if (size > ntotal - order_.group_begins.back()) {
      return MakeStatus(StatusCode::kDataLoss, "its lists hold more items than its ntotal, ", ntotal);
    }
    ids.resize(size);
    index_.ReadListIds(list, ids.data());
    for (int64_t i = 0; i < size; ++i) {
      if (ids[i] < 0 || ids[i] >= items || seen[ids[i]] == entries_) {
        return MakeStatus(StatusCode::kDataLoss, "its labels are not the positions 0 to ", items - 1, " (there is ",
                          ids[i], "): it is damaged, or was built with ids instead of positions");
      }
      ++seen[ids[i]];
      in_order = in_order && ids[i] == static_cast<int64_t>(order_.positions.size());
      order_.positions.push_back(static_cast<int32_t>(ids[i]));
    }
    order_.group_begins.push_back(order_.group_begins.back() + size);
    list_codes_.push_back(index_.list_codes(list));
  }
  // Vectors that hold a NaN are in no list. They get the last slots, which belong to no group, so no search reads them.
  for (int64_t position = 0; order_.group_begins.back() < ntotal && position < items; ++position) {
    for (; seen[position] < entries_; ++seen[position]) {
      in_order = in_order && position == static_cast<int64_t>(order_.positions.size());
      order_.positions.push_back(static_cast<int32_t>(position));
    }
  }
  if (in_order) order_.positions = {};
  centroids_.resize(lists * index_.list_dim());
  return index->ReadCentroids(centroids_.data());
}

// Checks that ten items that FAISS finds get the same scores here. This proves that order, centroids, transforms and
// scanner of this index are read correctly.
Status FilteredSearch::CompareScores() const {
  const int64_t ntotal = index_.ntotal();
  const int64_t k = std::min<int64_t>(10, ntotal);
  if (k == 0 || !index_.has_lists()) return Status();
  std::vector<float> x(index_.d());
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i * i)) / std::sqrt(x.size());
  std::vector<float> scores(k);
  std::vector<int64_t> positions(k);
  DPSR_RETURN_IF_ERROR(index_.Search(1, x.data(), k, scores.data(), positions.data()));
  std::vector<bool> found_there(num_items(), false);
  for (const int64_t position : positions) {
    if (position >= 0 && position < num_items()) found_there[position] = true;
  }
  ItemMask mask;
  mask.words.assign((ntotal + kBits - 1) / kBits, 0);
  mask.group_counts.assign(order_.group_begins.size() - 1, 0);
  for (size_t list = 0; list + 1 < order_.group_begins.size(); ++list) {
    for (int64_t slot = order_.group_begins[list]; slot < order_.group_begins[list + 1]; ++slot) {
      const int64_t position = order_.positions.empty() ? slot : order_.positions[slot];
      if (!found_there[position]) continue;
      mask.words[slot / kBits] |= uint64_t{1} << (slot % kBits);
      ++mask.group_counts[list];
      ++mask.count;
    }
  }
  // All entries of these items.
  const int64_t all = std::max(k, mask.count);
  std::vector<float> again(all);
  std::vector<int64_t> positions_again(all);
  DPSR_RETURN_IF_ERROR(Search(x.data(), all, mask, {}, again.data(), positions_again.data()));
  for (int64_t i = 0; i < k; ++i) {
    if (positions[i] < 0 || !std::isfinite(scores[i])) continue;
    float nearest = std::numeric_limits<float>::quiet_NaN();  // of the scores of the item's entries
    for (int64_t j = 0; j < all; ++j) {
      if (positions_again[j] != positions[i]) continue;
      if (!(std::fabs(nearest - scores[i]) <= std::fabs(again[j] - scores[i]))) nearest = again[j];
    }
    if (!(std::fabs(nearest - scores[i]) <= kRounding * std::max(1.0f, std::fabs(scores[i])))) {
      return MakeStatus(StatusCode::kDataLoss, "position ", positions[i], " scores ", scores[i],
                        " in a search by FAISS, but ", nearest, " in its lists: the index is damaged");
    }
  }
  return Status();
}

float FilteredSearch::CentroidScore(const float* query, int64_t list) const {
  return FastInnerProduct()(query, centroids_.data() + list * index_.list_dim(), index_.list_dim());
}

Status FilteredSearch::Search(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters,
                              float* scores, int64_t* positions, const ItemMask* visible) const {
  if (visible != nullptr && !index_.has_lists()) {
    // Here the masks of both always have words.
    ItemMask both;
    both.words.resize(mask.words.size());
    for (size_t i = 0; i < both.words.size(); ++i) both.words[i] = mask.words[i] & visible->words[i];
    both.count = CountBits({both.words.data(), both.words.size()}, 0, num_items());
    return Search(x, k, both, parameters, scores, positions);
  }
  // Without lists that can be read, a mask has one bit for all entries of an item.
  const int64_t passing_entries = index_.has_lists() ? mask.count : mask.count * entries_;
  const int64_t wanted = mask.keep ? k : std::min(k, passing_entries);
  BestItems best(std::max<int64_t>(wanted, 1));
  if (wanted == 0) {
    best.Write(order_.positions, k, scores, positions);
    return Status();
  }
  if (index_.has_lists()) {
    SearchParameters effort = parameters;
    if (effort.nprobe == 0) effort.nprobe = index_.parameters().nprobe;
    if (effort.max_codes == 0) effort.max_codes = index_.parameters().max_codes;
    DPSR_RETURN_IF_ERROR(SearchLists(x, mask, visible, effort, &best));
    best.Write(order_.positions, k, scores, positions);
    return Status();
  }
  const auto passing = static_cast<double>(mask.count);
  const double steps = static_cast<double>(k) * static_cast<double>(num_items()) / passing;
  const bool one_by_one = mask.count <= kFewItems || passing <= kStepOverScore * steps;
  if (!one_by_one || !index_.can_reconstruct()) {
    SearchParameters effort = parameters;
    if (one_by_one) effort.nprobe = index_.num_lists();
    DPSR_RETURN_IF_ERROR(SearchSelected(x, k, mask, effort, scores, positions));
    const auto all_found = [&] { return std::count(positions, positions + k, -1) == k - wanted; };
    if (all_found()) return Status();
    if (!index_.can_reconstruct()) {
      effort.nprobe = index_.num_lists();
      return SearchSelected(x, k, mask, effort, scores, positions);
    }
  }
  DPSR_RETURN_IF_ERROR(ScoreAll(x, mask, &best));
  best.Write(order_.positions, k, scores, positions);
  return Status();
}

// Lets FAISS search with a selector. The fewer items pass, the more lists or candidates it gets.
Status FilteredSearch::SearchSelected(const float* x, int64_t k, const ItemMask& mask,
                                      const SearchParameters& parameters, float* scores, int64_t* positions) const {
  const double over_share = static_cast<double>(num_items()) / static_cast<double>(mask.count);
  SearchParameters effort = index_.parameters();
  if (parameters.k_factor != 0) effort.k_factor = parameters.k_factor;
  if (parameters.max_codes != 0) effort.max_codes = parameters.max_codes;
  if (effort.nprobe != 0) {
    const int64_t lists = parameters.nprobe != 0 ? parameters.nprobe : effort.nprobe;
    effort.nprobe = static_cast<int64_t>(std::min(std::ceil(static_cast<double>(lists) * over_share),
                                                  static_cast<double>(index_.num_lists())));
  }
  if (effort.ef_search != 0) {
    const int64_t candidates = std::max(k, parameters.ef_search != 0 ? parameters.ef_search : effort.ef_search);
    effort.ef_search = static_cast<int64_t>(
        std::min(static_cast<double>(candidates) * over_share, static_cast<double>(index_.ntotal())));
  }
  const PositionSet allowed(mask.words.data(), mask.words.size());
  return index_.Search(1, x, k, scores, positions, /*nthreads=*/1, effort, &allowed);
}

Status FilteredSearch::SearchLists(const float* x, const ItemMask& mask, const ItemMask* visible,
                                   const SearchParameters& parameters, BestItems* best) const {
  const int64_t dim = index_.list_dim();
  const int64_t code_size = index_.code_size();
  std::vector<float> query(dim);
  DPSR_RETURN_IF_ERROR(index_.Transform(x, query.data()));
  std::unique_ptr<FaissListScanner> scanner;
  DPSR_RETURN_IF_ERROR(FaissListScanner::Create(index_, &scanner));
  DPSR_RETURN_IF_ERROR(scanner->SetQuery(query.data()));

  Lists lists = ListsOf(query.data(), mask);
  const double effort = std::min(1.0, static_cast<double>(parameters.nprobe) / static_cast<double>(index_.num_lists()));
  // The number of items that may still be scored.
  int64_t budget = parameters.max_codes == 0 ? std::numeric_limits<int64_t>::max()
                                             : std::max(best->k(), parameters.max_codes);
  const auto count = static_cast<double>(mask.count);
  const double needed = count * ShareToScore(effort, count / static_cast<double>(index_.ntotal()),
                                             static_cast<double>(best->k()) / count);
  const int64_t wanted = std::min(budget, std::max(kLeastOverK * best->k(), static_cast<int64_t>(needed)));
  PassingItems passing;
  std::vector<size_t> ends;
  // Scores the items that pass in the lists from `begin` on, until there are `enough`, the budget is spent, or the lists
  // end. Moves `begin` behind these lists. If few items pass, their codes are far apart in memory. So all of them are
  // collected before the first one is scored, and prefetched.
  const auto score = [&](Lists::iterator* begin, Lists::iterator end, double enough) {
    passing.codes.clear();
    passing.slots.clear();
    ends.clear();
    const double most = std::min(enough, static_cast<double>(budget));
    for (auto list = *begin; list != end && static_cast<double>(passing.codes.size()) < most; ++list) {
      FindPassing(list->list, mask, visible, &passing);
      if (static_cast<int64_t>(passing.codes.size()) > budget) passing.codes.resize(budget);
      ends.push_back(passing.codes.size());
    }
    budget -= static_cast<int64_t>(passing.codes.size());
    size_t i = 0;
    for (const size_t list_end : ends) {
      if (i < list_end) scanner->SetList((*begin)->list, (*begin)->centroid_score);
      ++*begin;
      for (; i < list_end; ++i) {
        if (i + kAhead < passing.codes.size()) {
          __builtin_prefetch(passing.codes[i + kAhead]);
          __builtin_prefetch(passing.codes[i + kAhead] + code_size - 1);
        }
        best->Add(scanner->Score(passing.codes[i]), passing.slots[i]);
      }
    }
    return static_cast<int64_t>(passing.codes.size());
  };

  auto begin = lists.begin();
  if (mask.count <= std::max(wanted, std::min(budget, kFewItems))) {
    score(&begin, lists.end(), std::numeric_limits<double>::infinity());
    return Status();
  }
  int64_t scored = 0;
  const double part = static_cast<double>(wanted) / kPortions;
  double portion = static_cast<double>(wanted) - 2 * part;
  const double enough = kNewResults * std::pow(1 - effort, 16);
  double ahead = static_cast<double>(wanted);
  auto far = begin;   // the lists in [begin, far) are the nearest of those that are left,
  auto near = begin;  // and those in [begin, near) the nearest of these
  while (begin != lists.end() && budget > 0 && scored < kMostTimes * wanted) {
    double in_portion = 0;
    while (begin != lists.end() && budget > 0 && in_portion < portion) {
      if (begin == far) {
        near = far = Nearest(ahead, begin, lists.end());
        if (mask.keep) {
          std::sort(begin, far, Nearer);
          ahead *= 2;  // fewer items than estimated may pass here
        } else {
          ahead = static_cast<double>(wanted) / 2;
          near = Nearest(portion - in_portion, begin, far);
        }
      } else if (begin == near) {
        near = Nearest(portion - in_portion, begin, far);
      }
      const int64_t found = score(&begin, near, portion - in_portion);
      in_portion += static_cast<double>(found);
      scored += found;
    }
    portion = part;
    const auto late = static_cast<double>(best->EndPortion());
    const double new_results = late / static_cast<double>(best->k()) * static_cast<double>(scored) / (2 * part);
    if (scored >= wanted && new_results <= enough) break;
  }
  return Status();
}

// Returns the lists in which items pass. If the number is not known, the share is assumed to be equal in all lists.
FilteredSearch::Lists FilteredSearch::ListsOf(const float* query, const ItemMask& mask) const {
  const int64_t dim = index_.list_dim();
  const double share = static_cast<double>(std::max<int64_t>(mask.count, 1)) / static_cast<double>(index_.ntotal());
  auto* const inner_product = FastInnerProduct();
  Lists lists;
  lists.reserve(order_.group_begins.size());
  for (size_t list = 0; list + 1 < order_.group_begins.size(); ++list) {
    const int64_t size = order_.group_begins[list + 1] - order_.group_begins[list];
    const double passing = mask.keep ? share * static_cast<double>(size) : mask.group_counts[list];
    if (passing == 0) continue;
    const float score = inner_product(query, centroids_.data() + list * dim, dim);
    lists.push_back({std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, static_cast<int32_t>(list),
                     static_cast<float>(passing)});
  }
  return lists;
}

// Adds the items of a list that pass to `passing`.
void FilteredSearch::FindPassing(int32_t list, const ItemMask& mask, const ItemMask* visible,
                                 PassingItems* passing) const {
  const int64_t begin = order_.group_begins[list];
  const int64_t end = order_.group_begins[list + 1];
  const int64_t code_size = index_.code_size();
  const uint64_t* words = mask.words.data();
  int64_t words_begin = 0;  // slot of the first bit in `words`
  if (mask.keep || visible != nullptr) {
    words_begin = begin / kBits * kBits;
    const int64_t count = (end - words_begin + kBits - 1) / kBits;
    if (mask.keep) {
      passing->words.assign(count, ~uint64_t{0});
      mask.keep(words_begin, end, passing->words.data());
    } else {
      passing->words.assign(words + words_begin / kBits, words + words_begin / kBits + count);
    }
    words = passing->words.data();
    for (int64_t i = 0; visible != nullptr && i < count; ++i) {
      passing->words[i] &= visible->words[words_begin / kBits + i];
    }
  }
  ForEachBit(words, begin - words_begin, end - words_begin, [&](int64_t bit) {
    const int64_t slot = words_begin + bit;
    passing->codes.push_back(list_codes_[list] + (slot - begin) * code_size);
    passing->slots.push_back(slot);
  });
}

// Moves to the front the lists with the highest scores in which together at least `wanted` items pass, and returns
// their end. This is a quickselect by weight. Many lists are first put into a histogram of their scores.
FilteredSearch::Lists::iterator FilteredSearch::Nearest(double wanted, Lists::iterator begin, Lists::iterator end) {
  constexpr size_t kBuckets = 256;
  if (end - begin > static_cast<int64_t>(4 * kBuckets)) {
    const auto [lowest, highest] = std::minmax_element(
        begin, end, [](const List& a, const List& b) { return a.centroid_score < b.centroid_score; });
    const float high = highest->centroid_score;
    const float scale = static_cast<float>(kBuckets - 1) / (high - std::max(lowest->centroid_score, high - 1e6f));
    const auto bucket_of = [high, scale](const List& list) {
      const float place = (high - list.centroid_score) * scale;
      return place < static_cast<float>(kBuckets - 1) ? static_cast<size_t>(place) : kBuckets - 1;  // also of NaN
    };
    std::array<double, kBuckets> passing = {};
    for (auto list = begin; list != end; ++list) passing[bucket_of(*list)] += list->passing;
    size_t last = 0;  // bucket in which the end is
    for (; last + 1 < kBuckets && passing[last] < wanted; ++last) wanted -= passing[last];
    const auto middle = std::partition(begin, end, [&](const List& list) { return bucket_of(list) <= last; });
    begin = std::partition(begin, middle, [&](const List& list) { return bucket_of(list) < last; });
    end = middle;
  }
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, Nearer);
    double passing = 0;
    for (auto list = begin; list != middle; ++list) passing += list->passing;
    if (passing >= wanted) {
      end = middle;
    } else {
      wanted -= passing;
      begin = middle;
    }
  }
  return end;
}

Status FilteredSearch::ScoreAll(const float* x, const ItemMask& mask, BestItems* best) const {
  // Slots are positions here, because only lists have their own order.
  std::vector<int64_t> slots;
  slots.reserve(mask.count);
  ForEachBit(mask.words.data(), 0, index_.ntotal(), [&](int64_t slot) { slots.push_back(slot); });
  const int64_t dim = index_.d();
  return index_.Reconstruct(Span<const int64_t>(slots.data(), slots.size()), [&](int64_t slot, const float* vector) {
    best->Add(InnerProduct(x, vector, dim), slot);
  });
}

}  // namespace dpsr
