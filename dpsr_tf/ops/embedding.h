// Sums of table rows and their AdaGrad step, on the machine that holds the table (DPSR section 5.1.3). A worker sends
// the ids of its texts and receives one vector for each text; it sends back one gradient for each text. Rows never
// travel.
//
// Tables and accumulators are [rows, dim] float32, row by row. Ids travel packed, see PackTokens.
#ifndef DPSR_DPSR_TF_OPS_EMBEDDING_H_
#define DPSR_DPSR_TF_OPS_EMBEDDING_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "common/status.h"

namespace dpsr {

// Texts as lists of ids. Text i has the ids values[row_splits[i]] to values[row_splits[i + 1] - 1].
struct TokenLists {
  const int32_t* values;
  int64_t num_values;
  const int64_t* row_splits;  // [num_texts + 1]
  int64_t num_texts;
  const float* weights;  // [num_values]; null: every weight is 1
};

// Maps an id of a table to its shard and to its row in that shard.
class RowRanges {
 public:
  struct Place {
    int shard;
    int32_t row;
  };

  // Range r has the ids first_ids[r] to first_ids[r + 1] - 1. It lies in shard shards[r], behind the ranges before it
  // that lie there too. Without `shards`, range s is shard s. InvalidArgument if the ids do not ascend from 0, if there
  // are not as many shards as ranges, or if one of them is not 0 to num_shards - 1.
  static Status Make(const std::vector<int64_t>& first_ids, const std::vector<int64_t>& shards, int num_shards,
                     RowRanges* ranges);

  int num_shards() const { return num_shards_; }
  int64_t num_ids() const { return first_ids_.back(); }

  // `id` must be 0 to num_ids() - 1.
  Place Find(int32_t id) const {
    if (num_shards_ == 1) return {0, id};
    const int64_t range = std::upper_bound(first_ids_.begin(), first_ids_.end(), id) - first_ids_.begin() - 1;
    return {shards_[range], id - shifts_[range]};
  }

 private:
  int num_shards_ = 0;
  std::vector<int64_t> first_ids_;  // [ranges + 1]
  std::vector<int> shards_;         // [ranges]
  std::vector<int32_t> shifts_;     // [ranges], id - row
};

// Writes all texts of `lists`, one list after the other, into one int32 array for each shard of a table. The array of a
// shard holds every text, with those of its ids that are in the shard. `allocate(shard, size)` returns memory for
// `size` numbers. The layout of the array:
//
//   [0]       number of texts; kOnePerText if each text has exactly one id, and then there is no `ends`
//   [1]       1 if there are weights, else 0
//   ends      [texts] position in `rows` where each text ends
//   rows      [n] row of each id in the shard
//   weights   [n] bits of float32, if there are weights
//
// Either all lists have weights or none has. InvalidArgument for an id outside of the table and for row splits that do
// not fit; nothing is allocated then.
constexpr int32_t kOnePerText = -1;
Status PackTokens(const std::vector<TokenLists>& lists, const RowRanges& ranges,
                  const std::function<int32_t*(int shard, int64_t size)>& allocate);

// A packed array that has been checked. Points into it.
class PackedTokens {
 public:
  // InvalidArgument if the array was not made by PackTokens, or names rows that a table of `num_rows` does not have.
  static Status Parse(const int32_t* data, int64_t size, int64_t num_rows, PackedTokens* tokens);

  int64_t num_texts() const { return num_texts_; }
  int64_t num_values() const { return num_values_; }
  int64_t end(int64_t text) const { return ends_ == nullptr ? text + 1 : ends_[text]; }
  int32_t row(int64_t i) const { return rows_[i]; }
  float weight(int64_t i) const {
    float weight = 1;
    if (weights_ != nullptr) std::memcpy(&weight, weights_ + i, sizeof(weight));
    return weight;
  }

 private:
  int64_t num_texts_ = 0, num_values_ = 0;
  const int32_t* ends_ = nullptr;
  const int32_t* rows_ = nullptr;
  const int32_t* weights_ = nullptr;
};

// Locks of rows. Many rows, also rows of different tables, share one lock. No thread holds two at a time.
class RowLocks {
 public:
  // The locks of all tables of this process, so that two steps that use the same table take the same locks.
  static RowLocks* OfProcess();

  class Holder {
   public:
    // Holds nothing if `locks` is null. Frequent rows are neighbours, because ids are sorted by frequency; taking the
    // low bits of the row gives them different locks.
    Holder(RowLocks* locks, int64_t row)
        : held_(locks == nullptr ? nullptr : &locks->locks_[row & ((1 << kBits) - 1)].held) {
      if (held_ != nullptr && held_->exchange(true, std::memory_order_acquire)) Wait();
    }
    ~Holder() {
      if (held_ != nullptr) held_->store(false, std::memory_order_release);
    }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

   private:
    void Wait();

    std::atomic<bool>* const held_;
  };

 private:
  static constexpr int kBits = 10;
  // Each lock has a cache line of its own, so that threads with different locks do not slow each other down.
  struct alignas(64) Lock {
    std::atomic<bool> held{false};
  };
  Lock locks_[1 << kBits];
};

// out[t] = sum over the ids of text t of weight * table[id]; zeros for a text without ids. `out` is [num_texts, dim].
// A row is read as it is before or after a concurrent step, never in between. If `locks` is null, no step may run
// concurrently.
void SumRows(const float* table, int64_t dim, const PackedTokens& tokens, RowLocks* locks, float* out);

// d(loss)/d(sum) of texts that SumRows has summed in this step.
struct PooledGradient {
  PackedTokens tokens;
  const float* gradient;  // [num_texts, dim]
};

// Applies one AdaGrad step to the rows of all these texts. The gradient g of a row is the sum over all its occurrences;
// then accumulator += g^2 and table -= learning_rate * g / sqrt(accumulator), once. Rows that do not occur are not
// touched. The step of a row is atomic with respect to other calls of this function and of SumRows on the same table;
// if `locks` is null, there must be no concurrent calls. Gradients are summed in the order of the occurrences, so the
// same input gives the same bits. With `decay` below 1, accumulator = decay * accumulator + (1 - decay) * g^2, so that
// the steps of frequent rows do not shrink for ever (RMSProp).
void ApplyAdagrad(const std::vector<PooledGradient>& gradients, float learning_rate, int64_t num_rows, int64_t dim,
                  RowLocks* locks, float* table, float* accumulator, float decay = 1);

// Applies the same step, without decay, to `n` consecutive numbers, the weights of a layer.
void ApplyDenseAdagrad(const float* gradient, int64_t n, float learning_rate, float* values, float* accumulator);

// Asks the system to keep the memory of a table in huge pages, which saves page table lookups when rows are read at
// random. The content does not change. Without huge pages nothing happens.
void UseHugePages(void* data, int64_t bytes);

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_EMBEDDING_H_
