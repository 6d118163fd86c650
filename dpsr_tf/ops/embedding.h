// Sums of table rows and their AdaGrad step, at the place where the table lies (DPSR section 5.1.3): a worker sends the
// ids of its texts and gets one vector a text; it sends back one gradient a text. Rows themselves never travel.
//
// Tables and accumulators are [rows, dim] float32, row by row. Ids travel packed, see PackTokens.
#ifndef DPSR_DPSR_TF_OPS_EMBEDDING_H_
#define DPSR_DPSR_TF_OPS_EMBEDDING_H_

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "common/status.h"

namespace dpsr {

// Texts as lists of ids: text i has the ids values[row_splits[i]] to values[row_splits[i + 1] - 1].
struct TokenLists {
  const int32_t* values;
  int64_t num_values;
  const int64_t* row_splits;  // [num_texts + 1]
  int64_t num_texts;
  const float* weights;  // [num_values], or null: each 1
};

// Writes all texts of `lists`, one list after the other, into one int32 array for each shard of a table. Shard s has the
// ids first_rows[s] to first_rows[s + 1] - 1; its array holds every text, with those of its ids that lie in the shard.
// `allocate(shard, size)` gives the place for `size` numbers. The array:
//
//   [0]       number of texts; kOnePerText when each text has exactly one id: `ends` is left out then
//   [1]       1 when there are weights, else 0
//   ends      [texts] where each text ends in `rows`
//   rows      [n] id - first_rows[s]
//   weights   [n] bits of float32, when there are any
//
// InvalidArgument for an id outside of the table and for row splits that do not fit; nothing is allocated then. Either
// all lists have weights or none has.
constexpr int32_t kOnePerText = -1;
Status PackTokens(const std::vector<TokenLists>& lists, const std::vector<int64_t>& first_rows,
                  const std::function<int32_t*(int shard, int64_t size)>& allocate);

// A packed array, checked. Points into it.
class PackedTokens {
 public:
  // InvalidArgument when the array is no packed one, or names rows that a table of `num_rows` does not have.
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

// Locks of rows. Many rows share one, those of different tables too; no thread holds two at a time.
class RowLocks {
 public:
  // The locks of all tables of this process: two steps that meet in a table take the same ones.
  static RowLocks* OfProcess();

  class Holder {
   public:
    // Holds nothing where `locks` is null. Rows that are used much lie side by side (ids go by frequency): the low bits
    // spread them.
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
  // A cache line each, or locks of different rows would be in each other's way.
  struct alignas(64) Lock {
    std::atomic<bool> held{false};
  };
  Lock locks_[1 << kBits];
};

// out[t] = sum over the ids of text t of weight * table[id]; zeros for a text without ids. `out` is [num_texts, dim].
// A row is read as it is before or after a concurrent step, never in between; with null for `locks` there must be none.
void SumRows(const float* table, int64_t dim, const PackedTokens& tokens, RowLocks* locks, float* out);

// d(loss)/d(sum) of texts that have been summed in this step.
struct PooledGradient {
  PackedTokens tokens;
  const float* gradient;  // [num_texts, dim]
};

// One AdaGrad step on the rows of all these texts. The gradient g of a row is the sum over all its occurrences, then
// once: accumulator += g^2, table -= learning_rate * g / sqrt(accumulator). Rows that do not occur are not touched.
// Each row's step is atomic against other calls of this and SumRows on the same table; with null for `locks` there must
// be none meanwhile. The order of summation is that of the occurrences: the same input gives the same bits.
void ApplyAdagrad(const std::vector<PooledGradient>& gradients, float learning_rate, int64_t num_rows, int64_t dim,
                  RowLocks* locks, float* table, float* accumulator);

// The same step on `n` numbers that lie side by side: the weights of a layer.
void ApplyDenseAdagrad(const float* gradient, int64_t n, float learning_rate, float* values, float* accumulator);

// Asks the system to keep this memory, a table, in pages of megabytes: rows that are read at random then need fewer
// lookups of where a page lies. Its content stays. Where a system has no such pages, nothing happens.
void UseHugePages(void* data, int64_t bytes);

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_EMBEDDING_H_
