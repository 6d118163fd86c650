// Which examples make up training batch number n: Algorithm 1 of the DPSR paper, lines 3 and 4, as a pure function.
//
// A batch holds `batch_size` positive pairs: the last `num_title_queries` of them are a random item under a piece of its
// own text (what a shop has when its log is small), the others come from one shuffle of the whole log an epoch. To these
// it adds `num_shared_negatives` items that serve as negatives for every query of the batch (section 4.4.1): first up to
// `num_supervised_negatives` labelled negatives of the batch's own queries (section 4.5), the rest uniform over all
// items. Since the batch depends only on (store, options, step), an iterator's whole state is its step.
#ifndef DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_
#define DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "dpsr_tf/ops/permutation.h"
#include "dpsr_tf/ops/training_store.h"
#include "tokenizer_cc/status.h"

namespace dpsr {

struct BatchOptions {
  int64_t batch_size = 64;
  int64_t num_title_queries = 0;         // less than batch_size
  int64_t num_shared_negatives = 64;
  int64_t num_supervised_negatives = 0;  // at most num_shared_negatives
  int64_t seed = 0;
  int64_t num_epochs = 0;  // 0: forever
  int64_t shard_index = 0;
  int64_t num_shards = 1;
};

// Rows of the store's tables, and what goes with them.
struct Batch {
  std::vector<int32_t> query;          // [batch_size], kTitleQuery where the query is a piece of the item's text
  std::vector<int32_t> query_tokens;   // token ids of the queries, one after another
  std::vector<int64_t> query_splits;   // [batch_size + 1], where each query's begin
  std::vector<int32_t> user;   // [batch_size]; row 0, the anonymous user, for title queries
  std::vector<float> weight;   // [batch_size]
  std::vector<int32_t> item;   // [batch_size + num_shared_negatives]: the positives in order, then the shared negatives

  static constexpr int32_t kTitleQuery = -1;
};

// Thread-safe. Refers to the store, which must outlive it.
class BatchSampler {
 public:
  static constexpr int64_t kMaxStep = int64_t{1} << 40;

  // Errors: InvalidArgument for options out of range (got and expected).
  static Status Validate(const BatchOptions& options);
  BatchSampler(const TrainingStore& store, const BatchOptions& options);

  // Batches that num_epochs give; the examples of a last partial batch are left out. Forever: -1.
  int64_t num_batches() const { return num_batches_; }
  // Batch `step`, 0 <= step <= kMaxStep, and step < num_batches() unless that is -1.
  void Sample(int64_t step, Batch* batch) const;
  // negative_mask[i * items + j] = 1 where item j of the batch may serve as a negative for query i: the query has no
  // click on it anywhere in the log, its own positive included. `mask` has query.size() * item.size() elements.
  void NegativeMask(const Batch& batch, bool* mask) const;

 private:
  void SampleLog(int64_t step, Batch* batch) const;
  void SampleTitles(int64_t step, Batch* batch) const;
  void SampleNegatives(int64_t step, Batch* batch) const;
  RandomStream Random(int64_t step, uint64_t purpose) const;

  const TrainingStore& store_;
  const BatchOptions options_;
  const int64_t log_batch_;  // pairs of a batch that come from the log
  int64_t shard_size_;   // positives of this shard an epoch
  int64_t num_batches_;
};

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_BATCH_SAMPLER_H_
