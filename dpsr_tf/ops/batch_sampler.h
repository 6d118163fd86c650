// Chooses the examples of training batch number n: Algorithm 1 of the DPSR paper, lines 3 and 4, as a pure function.
//
// A batch holds `batch_size` positive pairs. The last `num_title_queries` of them are a random item with a title query,
// a piece of the item's title; this helps shops with a small log. In the first `pretrain_steps` batches all pairs are
// of this kind. The other pairs come from the log, which is shuffled anew for each epoch.
//
// To the pairs it adds `num_random_negatives` items that serve as negatives of every query of the batch (section
// 4.4.1): up to `num_supervised_negatives` labelled negatives of the batch's queries (section 4.5), the rest uniform
// over all items. It also adds `num_own_negatives` items for each pair alone, which were shown with it and not clicked
// or are labelled negatives of its query. Each pair comes with the history of its user as of the time when the pair's request
// began: a click or an order comes after its query, and so do the other clicks for it.
//
// With `graph_fan_out` a batch also holds the neighbourhoods of its queries and items in the click graph, one or two hops
// wide. The neighbourhood of a pair's query is without its item, and that of its item without its query, so the edge of
// the pair is on no path. Only edges count whose first click was before the pair's request began. A random negative sees
// the graph of the moment of one of the pairs; otherwise it would be known by its many edges.
//
// A batch depends on (store, options, step) only, so the step is the whole state of an iterator.
#ifndef DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_
#define DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "dpsr_tf/ops/batch_options.h"
#include "dpsr_tf/ops/permutation.h"
#include "dpsr_tf/ops/training_store.h"
#include "common/status.h"

namespace dpsr {

// Finds the positions of values in an array. It keeps its memory when it is built again.
class PositionIndex {
 public:
  // `values` must outlive the index.
  void Build(const int32_t* values, size_t n);
  // Calls found(j) for each j with values[j] == value, ascending.
  template <typename Found>
  void ForEach(int32_t value, Found found) const {
    for (int32_t j = first_[Hash(value) >> first_shift_]; j >= 0; j = next_[j]) {
      if (values_[j] == value) found(static_cast<size_t>(j));
    }
  }
  // Does the same for each of many values, most of which are not in the array.
  template <typename Found>
  void ForEachOf(Span<const int32_t> values, Found found) const {
    constexpr size_t kBlock = 8;  // values that share one branch
    const int32_t* value = values.begin();
    for (; value + kBlock <= values.end(); value += kBlock) {
      uint64_t any = 0;
      for (size_t k = 0; k < kBlock; ++k) any |= MayStand(value[k]);
      if ((any & 1) == 0) continue;
      for (size_t k = 0; k < kBlock; ++k) {
        if (MayStand(value[k]) & 1) ForEach(value[k], found);
      }
    }
    for (; value != values.end(); ++value) ForEach(*value, found);
  }
  // Returns the smallest such j, which must exist.
  size_t First(int32_t value) const {
    int32_t j = first_[Hash(value) >> first_shift_];
    while (values_[j] != value) j = next_[j];
    return static_cast<size_t>(j);
  }

 private:
  static uint32_t Hash(int32_t value) { return static_cast<uint32_t>(value) * 0x9e3779b1u; }
  // The lowest bit of the result is 0 if the value is not in the array.
  uint64_t MayStand(int32_t value) const {
    const uint32_t bit = Hash(value) >> bits_shift_;
    return bits_[bit >> 6] >> (bit & 63);
  }

  const int32_t* values_ = nullptr;
  std::vector<uint64_t> bits_;         // bit set of the hashes of the values
  std::vector<int32_t> first_, next_;  // chains of positions with equal hash
  int bits_shift_ = 0, first_shift_ = 0;
};

// Rows of the store's tables, and what goes with them. n = batch_size + num_random_negatives +
// batch_size * num_own_negatives. A batch that is filled again and again keeps its memory.
struct Batch {
  std::vector<int32_t> query;  // [batch_size] global rows, kTitleQuery where the query is a piece of the item's text
  // Token ids of the queries whose text is made here, the last ones of the batch: title queries, and before them those
  // of the log where they may have typos.
  std::vector<int32_t> made_tokens;
  std::vector<int64_t> made_splits;  // [made queries + 1]
  std::vector<int32_t> user;   // [batch_size]; row 0, the anonymous user, for title queries
  std::vector<float> weight;   // [batch_size]
  std::vector<float> label;    // [batch_size]
  std::vector<int32_t> type;   // [batch_size]
  std::vector<int32_t> item;   // [n]: the positives in order, the shared negatives, the own ones of each pair
  std::vector<uint8_t> own_negative_mask;  // [batch_size * num_own_negatives], 1 where it is there; the others are row 0
  std::vector<int64_t> history_splits;        // [batch_size + 1], over
  std::vector<int32_t> history_item;          // item rows, oldest first
  std::vector<int32_t> history_type;
  std::vector<int64_t> query_history_splits;  // [batch_size + 1], over
  std::vector<int32_t> query_history;         // global query rows, oldest first

  // The neighbourhoods in the click graph. Query nodes and item nodes are numbered within the batch, each row once; t are
  // the n items of the batch. Lists hold numbers of nodes. An attribute of an item without a value is -1.
  RowNumbers graph_query_numbers, graph_item_numbers, graph_value_numbers;
  std::vector<int32_t> graph_query, graph_item;  // rows of the nodes
  std::vector<int32_t> graph_value;  // rows of the values: those of attribute a follow all codes of those before it
  std::vector<int64_t> graph_value_item_splits;  // [values + 1]
  std::vector<int32_t> graph_value_item;         // item nodes of each value
  std::vector<int32_t> graph_attributes;         // [t * attributes] values of the items of the batch, row by row
  std::vector<int32_t> graph_node_attributes;    // [items of queries * attributes] of the first item nodes
  std::vector<int64_t> graph_query_item_splits;  // [batch_size + 1], over p neighbours of queries
  std::vector<int32_t> graph_query_item;         // item nodes
  std::vector<int64_t> graph_query_item_query_splits;  // [p + 1]
  std::vector<int32_t> graph_query_item_query;         // query nodes
  std::vector<int64_t> graph_item_query_splits;        // [t + 1], over s neighbours of items
  std::vector<int32_t> graph_item_query;
  std::vector<int64_t> graph_item_query_item_splits;  // [s + 1]
  std::vector<int32_t> graph_item_query_item;

  static constexpr int32_t kTitleQuery = -1;

  // The working memory of the sampler.
  struct Row {
    const InteractionsShard* shard;
    int64_t row;
    int64_t query;  // row in the shard
    uint32_t time;  // when its request began
    int64_t event_begin, event_end;  // events of its user before it
  };
  std::vector<Row> rows;
  std::vector<Span<const int32_t>> texts;
  std::vector<int32_t> candidates;
  std::vector<Clicks> clicks;
  std::vector<ItemFilter::Key> keys;
  std::vector<int32_t> hits;
  PositionIndex columns, queries;
  std::vector<float> weights;
  std::vector<int32_t> neighbours;
};

// Thread-safe. The store must outlive it.
class BatchSampler {
 public:
  // Number of consecutive positives that are shuffled as one block if the log does not fit into the shuffle buffer.
  static constexpr int64_t kShuffleBlock = 4096;

  // The options are valid, and the store was opened with what they ask for: events, impressions, titles, query texts,
  // the same shard.
  BatchSampler(const TrainingStore& store, const BatchOptions& options);

  // Returns the number of batches, without a last partial one; -1 if there is no end.
  int64_t num_batches() const { return num_batches_; }
  // Fills `batch` with batch number `step`, 0 <= step <= kMaxStep, and step < num_batches() unless that is -1.
  void Sample(int64_t step, Batch* batch) const;
  // mask[i * columns + j] = 1 where item j of the batch, j < columns = batch_size + num_random_negatives, may serve as
  // a negative for query i: the query has no click on it anywhere in the log, its own positive included. Uses the
  // batch's working memory.
  void NegativeMask(Batch* batch, bool* mask) const;

 private:
  void SampleLog(int64_t step, Batch* batch) const;
  void MisspellQueries(int64_t step, Batch* batch) const;
  void SampleTitles(int64_t step, Batch* batch) const;
  void SampleNegatives(int64_t step, Batch* batch) const;
  void SampleOwnNegatives(int64_t step, Batch* batch) const;
  void SampleHistories(Batch* batch) const;
  void AppendHistory(int64_t begin, int64_t end, Batch* batch) const;
  void AppendQueryHistory(int64_t begin, int64_t end, Batch* batch) const;
  void SampleGraph(int64_t step, Batch* batch) const;
  void SampleValues(RandomStream* random, size_t first_items, Batch* batch) const;
  RandomStream Random(int64_t step, uint64_t purpose) const;

  const TrainingStore& store_;
  const BatchOptions options_;
  const int64_t log_batch_;  // number of pairs from the log in a batch after pretraining
  int64_t stride_, first_;   // this worker takes positions first_, first_ + stride_, ... of the shuffle
  int64_t shard_size_;       // number of these positions
  int64_t num_batches_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_
