// The options of a training batch: what it holds, and in which order its examples come.
//
// They travel from Python to C++ as one JSON object, whose keys are the names of the members below. A name is the same
// in the `train` section of a config file, in dpsr_tf.data.examples_dataset.BatchOptions, in that object, and here.
#ifndef DPSR_DPSR_TF_OPS_BATCH_OPTIONS_H_
#define DPSR_DPSR_TF_OPS_BATCH_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "dpsr_tf/ops/columns.h"

namespace dpsr {

// The number of a batch is at most this, which keeps steps times batch sizes within 64 bits.
constexpr int64_t kMaxStep = int64_t{1} << 40;

// Where the own negatives of a pair come from.
enum class OwnNegativeSource {
  kImpressions,  // items shown in the pair's request and not clicked
  kLabels,       // labelled negatives of the pair's query
  kBoth,
};

// Which edges of a node lead to its neighbours.
enum class GraphSampling { kWeighted, kStrongest };

// The table of fields in batch_options.cc gives each member its key and its allowed values.
struct BatchOptions {
  // Positive pairs of a batch.
  int64_t batch_size = 64;
  // Pairs whose query is a piece of a random item's title. At most batch_size; with as many, the log is not read.
  int64_t num_title_queries = 0;
  // Number of batches at the start of training in which every pair has a title query.
  int64_t pretrain_steps = 0;
  // In a title query, words that occur in more than this share of the titles are kept less often. 0 turns this off.
  float title_subsampling = 0;
  // Share of the words in title queries that get a typing error, see query_noise.h.
  float title_typo_rate = 0;
  // Share of the words in logged queries that get a typing error.
  float query_typo_rate = 0;
  // Random items that are negatives of every pair of the batch.
  int64_t num_random_negatives = 64;
  // How many of the random negatives are replaced by labelled negatives of the batch's queries.
  int64_t num_supervised_negatives = 0;
  // Items that are negatives of one pair only, for each pair, and where they come from.
  int64_t num_own_negatives = 0;
  OwnNegativeSource own_negative_source = OwnNegativeSource::kImpressions;
  // Whether the batch has the mask of shared negatives, see BatchSampler::NegativeMask.
  bool negative_mask = true;
  // Features of the users, of the items, and of the items in histories.
  FeatureNames user_features, item_features, history_features;
  // Number of the user's last events before the pair's request began.
  int64_t history_length = 0;
  // Bit t is set where events of type t belong to the history. 0: events of all types do.
  int64_t history_types = 0;
  // Whether the batch has the texts of the items in histories.
  bool history_text = false;
  // Number of the user's last queries before the pair's request began. Of equal queries in a row, one counts.
  int64_t query_history_length = 0;
  // Largest number of neighbours in the click graph, for each hop from a query or item of the batch: none, one or two
  // numbers. Without numbers, batches have no neighbours.
  std::vector<int64_t> graph_fan_out;
  // Whether neighbours are drawn by the weights of their edges, or are those of the strongest edges.
  GraphSampling graph_sampling = GraphSampling::kWeighted;
  // Share of the queries and items that get no neighbours by clicks.
  float graph_dropout = 0;
  // Item features whose values are nodes of the graph.
  FeatureNames graph_attributes;
  // Number of positives that are shuffled together. A log that fits is shuffled as a whole.
  int64_t shuffle_buffer = 1 << 22;
  int64_t seed = 0;
  // Passes over the log. 0: no end.
  int64_t num_epochs = 0;
  // This worker's number and the number of workers, which share the log.
  int64_t shard_index = 0;
  int64_t num_shards = 1;
  // Number of batches that are assembled ahead, in parallel.
  int64_t num_parallel_calls = 0;

  bool own_impressions() const { return own_negative_source != OwnNegativeSource::kLabels; }
  bool own_labels() const { return own_negative_source != OwnNegativeSource::kImpressions; }

  // Reads the JSON object `json`, which must have every key and no other. InvalidArgument, with the option, its value
  // and what is allowed, for text that is not such an object and for values out of range.
  static Status Parse(const std::string& json, BatchOptions* options);
  // InvalidArgument for a value out of range.
  Status Validate() const;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_BATCH_OPTIONS_H_
