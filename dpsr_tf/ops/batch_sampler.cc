#include "dpsr_tf/ops/batch_sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>

#include "dpsr_tf/ops/query_noise.h"

namespace dpsr {
namespace {

// Seeds that give each purpose random numbers of its own.
constexpr uint64_t kNegativeStream = 0x6e65676174697665ULL;
constexpr uint64_t kTitleStream = 0x7469746c65717279ULL;
constexpr uint64_t kTypoStream = 0x7479706f2d717279ULL;
constexpr uint64_t kGraphStream = 0x6e65696768626f72ULL;
constexpr uint64_t kOwnStream = 0x6f776e2d6e656761ULL;
// Number of examples between a prefetch and its use.
constexpr size_t kAhead = 8;

// Prefetches a few cache lines of the elements begin to end, which are used soon.
template <typename T>
void Prefetch(const T* array, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(T), kMostLines = 4;
  const int64_t last = std::min(end, begin + kMostLines * kLine);
  for (int64_t i = begin; i < last; i += kLine) __builtin_prefetch(array + i);
}

}  // namespace

BatchSampler::BatchSampler(const TrainingStore& store, const BatchOptions& options)
    : store_(store),
      options_(options),
      log_batch_(options.batch_size - options.num_title_queries),
      stride_(store.sharded_by_file() ? 1 : options.num_shards),
      first_(store.sharded_by_file() ? 0 : options.shard_index),
      // A shard beyond the last interaction is empty.
      shard_size_(std::max<int64_t>(0, (store.num_positives() - first_ + stride_ - 1) / stride_)),
      num_batches_(log_batch_ == 0           ? -1
                   : shard_size_ == 0        ? 0
                   : options.num_epochs == 0 ? -1
                                             : options.pretrain_steps + shard_size_ * options.num_epochs / log_batch_) {}

void BatchSampler::Sample(int64_t step, Batch* batch) const {
  const size_t b = static_cast<size_t>(options_.batch_size);
  batch->query.resize(b);
  batch->user.resize(b);
  batch->weight.resize(b);
  batch->label.resize(b);
  batch->type.resize(b);
  batch->item.resize(b + options_.num_random_negatives + b * options_.num_own_negatives);
  SampleLog(step, batch);
  batch->made_tokens.clear();
  batch->made_splits.assign(1, 0);
  if (options_.query_typo_rate > 0) MisspellQueries(step, batch);
  SampleTitles(step, batch);
  SampleNegatives(step, batch);
  SampleOwnNegatives(step, batch);
  SampleHistories(batch);
  if (!options_.graph_fan_out.empty()) SampleGraph(step, batch);
}

void BatchSampler::SampleLog(int64_t step, Batch* batch) const {
  const uint64_t n = store_.num_positives();
  const uint64_t window = std::max<int64_t>(1, (options_.shuffle_buffer + kShuffleBlock - 1) / kShuffleBlock);
  const size_t count = step < options_.pretrain_steps ? 0 : static_cast<size_t>(log_batch_);
  batch->rows.resize(count);
  if (count == 0) return;
  int64_t position = (step - options_.pretrain_steps) * log_batch_;
  for (size_t i = 0; i < count;) {
    const int64_t epoch = position / shard_size_;
    BlockShuffle shuffle(n, kShuffleBlock, window, Mix64(options_.seed) ^ epoch);
    // Workers that share files read disjoint parts of one shuffle.
    for (int64_t p = position % shard_size_; i < count && p < shard_size_; ++i, ++p, ++position) {
      Batch::Row& r = batch->rows[i];
      r.shard = &store_.ShardOfPositive(static_cast<int64_t>(shuffle(p * stride_ + first_)), &r.row);
      __builtin_prefetch(&r.shard->query_of[r.row / InteractionsShard::kQueryStride]);
      __builtin_prefetch(&r.shard->user[r.row]);
      __builtin_prefetch(&r.shard->positives.values[r.row]);
      __builtin_prefetch(&r.shard->time[r.row]);
      __builtin_prefetch(&r.shard->type[r.row]);
      r.shard->weight.Prefetch(r.row);
      r.shard->label.Prefetch(r.row);
    }
  }
  for (const Batch::Row& r : batch->rows) {
    const InteractionsShard& shard = *r.shard;
    __builtin_prefetch(&shard.positives.splits[shard.query_of[r.row / InteractionsShard::kQueryStride] + 1]);
  }
  for (size_t i = 0; i < count; ++i) {
    Batch::Row& r = batch->rows[i];
    const InteractionsShard& shard = *r.shard;
    r.query = shard.QueryOfPositive(r.row);
    batch->query[i] = static_cast<int32_t>(shard.first_query + r.query);
    batch->user[i] = shard.user[r.row];
    batch->item[i] = shard.positives.values[r.row];
    batch->type[i] = shard.type[r.row];
    batch->weight[i] = shard.weight.empty() ? 1 : shard.weight[r.row];
    batch->label[i] = shard.label.empty() ? 1 : shard.label[r.row];
    r.time = shard.time[r.row];
  }
}

void BatchSampler::MisspellQueries(int64_t step, Batch* batch) const {
  RandomStream random = Random(step, kTypoStream);
  for (const Batch::Row& r : batch->rows) {
    store_.vocabulary().Encode(Misspelt(r.shard->query_text[r.query], options_.query_typo_rate, &random),
                               &batch->made_tokens);
    batch->made_splits.push_back(static_cast<int64_t>(batch->made_tokens.size()));
  }
}

void BatchSampler::SampleTitles(int64_t step, Batch* batch) const {
  if (batch->rows.size() == batch->query.size()) return;  // without title queries there may be no vocabulary
  RandomStream random = Random(step, kTitleStream);
  const Vocabulary& vocabulary = store_.vocabulary();
  KeepRate keep_rate;
  if (options_.title_subsampling > 0) {
    // Subsampling as in word2vec (Mikolov et al., NIPS 2013): a word that stands in every other title does not tell
    // items apart, and users rarely type it.
    const double frequent = options_.title_subsampling * static_cast<double>(store_.num_items());
    keep_rate = [&vocabulary, frequent](std::string_view word) {
      const double count = static_cast<double>(vocabulary.Count(vocabulary.Lookup(word)));
      return count > frequent ? std::sqrt(frequent / count) : 1.0;
    };
  }
  for (size_t i = batch->rows.size(); i < batch->query.size(); ++i) {
    const int32_t item = static_cast<int32_t>(random.Uniform(store_.num_items()));
    const std::string query = PieceOf(store_.titles()[item], keep_rate, options_.title_typo_rate, &random);
    vocabulary.Encode(query, &batch->made_tokens);
    batch->made_splits.push_back(static_cast<int64_t>(batch->made_tokens.size()));
    batch->query[i] = Batch::kTitleQuery;
    batch->user[i] = 0;
    batch->weight[i] = 1;
    batch->label[i] = 1;
    batch->type[i] = kClick;
    batch->item[i] = item;
  }
}

void BatchSampler::SampleNegatives(int64_t step, Batch* batch) const {
  RandomStream random = Random(step, kNegativeStream);
  int32_t* out = batch->item.data() + options_.batch_size;
  for (int64_t i = 0; i < options_.num_random_negatives; ++i) {
    if (i < options_.num_supervised_negatives && !batch->rows.empty()) {
      const Batch::Row& r = batch->rows[random.Uniform(batch->rows.size())];
      const Span<const int32_t> labelled = r.shard->negatives[r.query];
      if (!labelled.empty()) {
        *out++ = labelled[random.Uniform(labelled.size())];
        continue;
      }
    }
    *out++ = static_cast<int32_t>(random.Uniform(store_.num_items()));
  }
}

// Items that were shown with the pair stay its negatives even if other users clicked them for the same query. That this
// user did not click them is what a personalised query tower learns from.
void BatchSampler::SampleOwnNegatives(int64_t step, Batch* batch) const {
  const size_t m = static_cast<size_t>(options_.num_own_negatives);
  batch->own_negative_mask.assign(options_.batch_size * m, 0);
  if (m == 0) return;
  RandomStream random = Random(step, kOwnStream);
  int32_t* out = batch->item.data() + options_.batch_size + options_.num_random_negatives;
  std::fill(out, out + options_.batch_size * m, 0);
  std::vector<int32_t>& candidates = batch->candidates;
  for (size_t i = 0; i < batch->rows.size(); ++i, out += m) {
    const Batch::Row& r = batch->rows[i];
    Span<const int32_t> shown, labelled;
    if (options_.own_impressions() && !r.shard->request.empty() && r.shard->request[r.row] >= 0) {
      shown = r.shard->impressions[r.shard->request[r.row]];
    }
    if (options_.own_labels()) labelled = r.shard->negatives[r.query];
    candidates.clear();
    std::set_union(shown.begin(), shown.end(), labelled.begin(), labelled.end(), std::back_inserter(candidates));
    const size_t taken = std::min(m, candidates.size());
    for (size_t j = 0; j < taken; ++j) {
      std::swap(candidates[j], candidates[j + random.Uniform(candidates.size() - j)]);
      out[j] = candidates[j];
      batch->own_negative_mask[i * m + j] = 1;
    }
  }
}

void BatchSampler::SampleHistories(Batch* batch) const {
  const size_t b = batch->query.size(), count = batch->rows.size();
  batch->history_item.clear();
  batch->history_type.clear();
  batch->query_history.clear();
  batch->history_splits.assign(b + 1, 0);
  batch->query_history_splits.assign(b + 1, 0);
  if (options_.history_length == 0 && options_.query_history_length == 0) return;
  const int64_t* splits = store_.event_splits().data();
  const uint32_t* times = store_.event_time().data();
  // A binary search without a branch, which no CPU could predict.
  const auto first_not_before = [times](int64_t begin, int64_t end, uint32_t time) {
    for (int64_t left = end - begin; left > 0;) {
      const int64_t half = (left + 1) / 2;
      begin += times[begin + half - 1] < time ? half : 0;
      left -= half;
    }
    return begin;
  };
  for (size_t i = 0; i < count; ++i) {
    if (i + 2 * kAhead < count) __builtin_prefetch(splits + batch->user[i + 2 * kAhead]);
    if (i + kAhead < count) Prefetch(times, splits[batch->user[i + kAhead]], splits[batch->user[i + kAhead] + 1]);
    // Strictly before the request began: neither the pair itself nor what else the user clicked for this request is
    // known when the query comes.
    Batch::Row& r = batch->rows[i];
    r.event_begin = splits[batch->user[i]];
    r.event_end = first_not_before(r.event_begin, splits[batch->user[i] + 1], r.time);
  }
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const Batch::Row& next = batch->rows[i + kAhead];
      const int64_t first = std::max(next.event_begin, next.event_end - options_.history_length);
      Prefetch(store_.event_item().data(), first, next.event_end);
      Prefetch(store_.event_type().data(), first, next.event_end);
      if (options_.query_history_length > 0) {
        const int64_t first_query = std::max(next.event_begin, next.event_end - 2 * options_.query_history_length);
        Prefetch(store_.event_query().data(), first_query, next.event_end);
      }
    }
    const Batch::Row& r = batch->rows[i];
    AppendHistory(r.event_begin, r.event_end, batch);
    batch->history_splits[i + 1] = static_cast<int64_t>(batch->history_item.size());
    AppendQueryHistory(r.event_begin, r.event_end, batch);
    batch->query_history_splits[i + 1] = static_cast<int64_t>(batch->query_history.size());
  }
  // Title queries have no user.
  for (size_t i = count; i < b; ++i) {
    batch->history_splits[i + 1] = batch->history_splits[i];
    batch->query_history_splits[i + 1] = batch->query_history_splits[i];
  }
}

void BatchSampler::AppendHistory(int64_t begin, int64_t end, Batch* batch) const {
  const int32_t* items = store_.event_item().data();
  const uint8_t* types = store_.event_type().data();
  int64_t first = end;
  for (int64_t left = options_.history_length; left > 0 && first > begin;) {
    if (options_.history_types == 0) {
      first = std::max(begin, end - left);
      break;
    }
    --first;
    if (options_.history_types >> types[first] & 1) --left;
  }
  if (options_.history_types == 0) {
    batch->history_item.insert(batch->history_item.end(), items + first, items + end);
    batch->history_type.insert(batch->history_type.end(), types + first, types + end);
    return;
  }
  for (int64_t e = first; e < end; ++e) {
    if ((options_.history_types >> types[e] & 1) == 0) continue;
    batch->history_item.push_back(items[e]);
    batch->history_type.push_back(types[e]);
  }
}

void BatchSampler::AppendQueryHistory(int64_t begin, int64_t end, Batch* batch) const {
  const int32_t* queries = store_.event_query().data();
  const size_t first = batch->query_history.size();
  int64_t left = options_.query_history_length;
  for (int64_t e = end; left > 0 && e > begin; --e) {
    if (e < end && queries[e - 1] == queries[e]) continue;
    batch->query_history.push_back(queries[e - 1]);
    --left;
  }
  std::reverse(batch->query_history.begin() + first, batch->query_history.end());
}

void BatchSampler::SampleGraph(int64_t step, Batch* batch) const {
  RandomStream random = Random(step, kGraphStream);
  const size_t b = batch->query.size(), count = batch->rows.size(), n = batch->item.size();
  const size_t shared = b + static_cast<size_t>(options_.num_random_negatives);
  const int64_t second = options_.graph_fan_out.size() > 1 ? options_.graph_fan_out[1] : 0;
  const bool strongest = options_.graph_sampling == GraphSampling::kStrongest;
  const auto is_dropped = [&] { return random.Fraction() < options_.graph_dropout; };
  // If a pair has no time, edges of any time count.
  const auto moment = [&](size_t pair) {
    const uint32_t time = pair < count ? batch->rows[pair].time : 0;
    return time == 0 ? NeighbourLimits::kAnyTime : time;
  };
  for (RowNumbers* numbers : {&batch->graph_query_numbers, &batch->graph_item_numbers, &batch->graph_value_numbers}) {
    numbers->Clear();
  }
  // Appends the neighbours of `target`, and theirs, to two ragged lists.
  const auto expand = [&](int32_t target, const NeighbourLimits& limits, Edges (ClickGraph::*near)(int64_t) const,
                          Edges (ClickGraph::*far)(int64_t) const, RowNumbers* near_numbers, RowNumbers* far_numbers,
                          std::vector<int32_t>* near_out, std::vector<int64_t>* far_splits,
                          std::vector<int32_t>* far_out) {
    const ClickGraph& graph = store_.graph();
    std::vector<int32_t>& found = batch->neighbours;
    found.clear();
    PickNeighbours((graph.*near)(target), limits, &random, &batch->weights, &found);
    const size_t neighbours = found.size();
    for (size_t j = 0; j < neighbours; ++j) {
      near_out->push_back(near_numbers->NumberOf(found[j]));
      if (second > 0) {
        const size_t begin = found.size();
        PickNeighbours((graph.*far)(found[j]), {second, strongest, limits.before, target}, &random, &batch->weights,
                       &found);
        for (size_t k = begin; k < found.size(); ++k) far_out->push_back(far_numbers->NumberOf(found[k]));
      }
      far_splits->push_back(static_cast<int64_t>(far_out->size()));
    }
  };
  const int64_t first = options_.graph_fan_out[0];

  batch->graph_query_item.clear();
  batch->graph_query_item_query.clear();
  batch->graph_query_item_splits.assign(1, 0);
  batch->graph_query_item_query_splits.assign(1, 0);
  for (size_t i = 0; i < b; ++i) {
    if (i < count && !is_dropped()) {
      expand(batch->query[i], {first, strongest, moment(i), batch->item[i]}, &ClickGraph::OfQuery, &ClickGraph::OfItem,
             &batch->graph_item_numbers, &batch->graph_query_numbers, &batch->graph_query_item,
             &batch->graph_query_item_query_splits, &batch->graph_query_item_query);
    }
    batch->graph_query_item_splits.push_back(static_cast<int64_t>(batch->graph_query_item.size()));
  }
  // Only the items of queries need their attributes, and so far there are no other item nodes.
  const size_t items_of_queries = batch->graph_item_numbers.rows().size();

  batch->graph_item_query.clear();
  batch->graph_item_query_item.clear();
  batch->graph_item_query_splits.assign(1, 0);
  batch->graph_item_query_item_splits.assign(1, 0);
  for (size_t j = 0; j < n; ++j) {
    // A pair's own negatives are without its query, too: otherwise this edge would tell them from the positive.
    const bool is_of_pair = j < b || j >= shared;
    const size_t pair = j < b ? j : j >= shared ? (j - shared) / options_.num_own_negatives
                                                : count == 0 ? 0 : (j - b) % count;
    if (!is_dropped()) {
      expand(batch->item[j], {first, strongest, moment(pair), is_of_pair ? batch->query[pair] : -1},
             &ClickGraph::OfItem, &ClickGraph::OfQuery, &batch->graph_query_numbers, &batch->graph_item_numbers,
             &batch->graph_item_query, &batch->graph_item_query_item_splits, &batch->graph_item_query_item);
    }
    batch->graph_item_query_splits.push_back(static_cast<int64_t>(batch->graph_item_query.size()));
  }
  SampleValues(&random, items_of_queries, batch);
  batch->graph_query = batch->graph_query_numbers.rows();
  batch->graph_item = batch->graph_item_numbers.rows();
  batch->graph_value = batch->graph_value_numbers.rows();
}

// Finds the values of attributes, and the items of those values that the items of the batch have.
void BatchSampler::SampleValues(RandomStream* random, size_t first_items, Batch* batch) const {
  const FeatureColumns& attributes = store_.graph_attributes();
  const size_t count = attributes.fixed.size();
  const bool strongest = options_.graph_sampling == GraphSampling::kStrongest;
  const auto find = [&](Span<const int32_t> items, std::vector<int32_t>* out) {
    out->resize(items.size() * count);
    GatherCodes(attributes.fixed, items, out->data());
    int64_t offset = 0;
    for (size_t a = 0; a < count; ++a) {
      for (size_t i = a; i < out->size(); i += count) {
        int32_t& code = (*out)[i];
        code = code == 0 ? -1 : batch->graph_value_numbers.NumberOf(static_cast<int32_t>(offset + code));
      }
      offset += store_.graph().num_codes(a);
    }
  };
  find({batch->item.data(), batch->item.size()}, &batch->graph_attributes);
  const size_t of_batch = batch->graph_value_numbers.rows().size();
  find({batch->graph_item_numbers.rows().data(), first_items}, &batch->graph_node_attributes);
  batch->graph_value_item.clear();
  batch->graph_value_item_splits.assign(1, 0);
  const std::vector<int32_t>& values = batch->graph_value_numbers.rows();
  for (size_t v = 0; v < values.size(); ++v) {
    if (v < of_batch && options_.graph_fan_out.size() > 1) {
      int32_t code = values[v];
      size_t a = 0;
      while (code >= store_.graph().num_codes(a)) code -= static_cast<int32_t>(store_.graph().num_codes(a++));
      batch->neighbours.clear();
      PickNeighbours(store_.graph().OfValue(a, code), {options_.graph_fan_out[1], strongest}, random, &batch->weights,
                     &batch->neighbours);
      for (int32_t item : batch->neighbours) {
        batch->graph_value_item.push_back(batch->graph_item_numbers.NumberOf(item));
      }
    }
    batch->graph_value_item_splits.push_back(static_cast<int64_t>(batch->graph_value_item.size()));
  }
}

RandomStream BatchSampler::Random(int64_t step, uint64_t purpose) const {
  return RandomStream(Mix64(Mix64(options_.seed) ^ purpose) ^ (step * options_.num_shards + options_.shard_index));
}

void BatchSampler::NegativeMask(Batch* batch, bool* mask) const {
  const size_t b = batch->query.size(), columns = b + static_cast<size_t>(options_.num_random_negatives);
  const int32_t* items = batch->item.data();
  batch->columns.Build(items, columns);
  batch->queries.Build(batch->query.data(), b);
  batch->keys.resize(columns);
  batch->hits.resize(columns);
  for (size_t j = 0; j < columns; ++j) batch->keys[j] = ItemFilter::KeyOf(items[j]);
  const size_t count = batch->rows.size();
  batch->clicks.resize(count);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const Batch::Row& next = batch->rows[i + kAhead];
      __builtin_prefetch(&next.shard->positives.splits[next.query]);
    }
    batch->clicks[i] = batch->rows[i].shard->ClicksOf(batch->rows[i].query);
  }
  for (size_t i = 0; i < b; ++i) {
    if (i + kAhead < count) {
      const Span<const int32_t> next = batch->clicks[i + kAhead].items;
      Prefetch(next.data(), 0, static_cast<int64_t>(next.size()));
    }
    bool* row = mask + i * columns;
    const int32_t query = batch->query[i];
    const auto leave_out = [row](size_t j) { row[j] = false; };
    if (query == Batch::kTitleQuery) {
      std::memset(row, true, columns);
      batch->columns.ForEach(items[i], leave_out);
      continue;
    }
    // Queries are as skewed as the log, so a large batch has some of them many times.
    const size_t same = batch->queries.First(query);
    if (same < i) {
      std::memcpy(row, mask + same * columns, columns);
      continue;
    }
    std::memset(row, true, columns);
    const Clicks& clicks = batch->clicks[i];
    if (clicks.filter.words.empty() || clicks.items.size() < columns) {
      batch->columns.ForEachOf(clicks.items, leave_out);
      continue;
    }
    // The query has more clicks than the batch has items, so look up the items in the clicks.
    int32_t* hits = batch->hits.data();
    size_t num_hits = 0;
    for (size_t j = 0; j < columns; ++j) {
      hits[num_hits] = static_cast<int32_t>(j);
      num_hits += clicks.filter.MayHave(batch->keys[j]);
    }
    for (size_t h = 0; h < num_hits; ++h) {
      if (std::binary_search(clicks.items.begin(), clicks.items.end(), items[hits[h]])) row[hits[h]] = false;
    }
  }
}

void PositionIndex::Build(const int32_t* values, size_t n) {
  values_ = values;
  int log = 4;
  while ((size_t{1} << log) < 2 * n) ++log;
  first_shift_ = 32 - log;
  bits_shift_ = std::max(0, 32 - log - 5);  // 64 bits for each value, so that few absent values pass
  first_.assign(size_t{1} << log, -1);
  next_.resize(n);
  bits_.assign((size_t{1} << (32 - bits_shift_)) / 64, 0);
  for (size_t j = n; j-- > 0;) {  // backwards, so that chains ascend
    const uint32_t hash = Hash(values[j]);
    bits_[hash >> bits_shift_ >> 6] |= uint64_t{1} << (hash >> bits_shift_ & 63);
    int32_t& first = first_[hash >> first_shift_];
    next_[j] = first;
    first = static_cast<int32_t>(j);
  }
}

}  // namespace dpsr
