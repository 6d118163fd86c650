#include "dpsr_tf/ops/embedding_bag.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

// The loops over a row are compiled for AVX2 too, chosen when the library loads. Sanitizers do not go with that.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define DPSR_FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define DPSR_FOR_EACH_CPU
#endif

namespace dpsr {
namespace {

constexpr int64_t kHeader = 2;
// How many rows ahead of their use are fetched: enough to hide the latency of memory, few enough to stay in the cache.
constexpr int64_t kRowsAhead = 8;

DPSR_FOR_EACH_CPU void AddScaled(const float* __restrict x, float scale, int64_t n, float* __restrict sum) {
  for (int64_t k = 0; k < n; ++k) sum[k] += scale * x[k];
}

DPSR_FOR_EACH_CPU void AdagradRow(const float* __restrict gradient, float learning_rate, int64_t n,
                                  float* __restrict row, float* __restrict accumulator) {
  for (int64_t k = 0; k < n; ++k) {
    const float g = gradient[k], total = accumulator[k] + g * g;
    accumulator[k] = total;
    row[k] -= learning_rate * g / std::sqrt(total);
  }
}

void Prefetch(const float* row, int64_t dim) {
  for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(row + k);
}

// One id of one text.
struct Occurrence {
  uint32_t row;
  float weight;
  const float* gradient;
};

// Sorts by row and keeps the order of equal ones: least significant digits first, as many as `num_rows` has.
void SortByRow(int64_t num_rows, std::vector<Occurrence>* occurrences) {
  constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
  std::vector<Occurrence> sorted(occurrences->size());
  for (int shift = 0; shift < 32 && (num_rows - 1) >> shift != 0; shift += kDigitBits) {
    size_t begin[kDigits + 1] = {};
    for (const Occurrence& o : *occurrences) ++begin[((o.row >> shift) & (kDigits - 1)) + 1];
    for (int digit = 0; digit < kDigits; ++digit) begin[digit + 1] += begin[digit];
    for (const Occurrence& o : *occurrences) sorted[begin[(o.row >> shift) & (kDigits - 1)]++] = o;
    occurrences->swap(sorted);
  }
}

Status Check(const TokenLists& list, int64_t num_ids) {
  const int64_t* splits = list.row_splits;
  if (splits[0] != 0 || splits[list.num_texts] != list.num_values) {
    return MakeStatus(StatusCode::kInvalidArgument, "row_splits go from ", splits[0], " to ", splits[list.num_texts],
                      ", expected 0 to the ", list.num_values, " values");
  }
  for (int64_t text = 0; text < list.num_texts; ++text) {
    if (splits[text] > splits[text + 1]) {
      return MakeStatus(StatusCode::kInvalidArgument, "row_splits fall from ", splits[text], " to ", splits[text + 1],
                        " at text ", text, ", expected ascending ones");
    }
  }
  for (int64_t i = 0; i < list.num_values; ++i) {
    if (list.values[i] < 0 || list.values[i] >= num_ids) {
      const int64_t text = std::upper_bound(splits, splits + list.num_texts + 1, i) - splits - 1;
      return MakeStatus(StatusCode::kInvalidArgument, "id ", list.values[i], " in text ", text,
                        ", expected 0 to ", num_ids - 1, ", the rows of the table");
    }
  }
  return Status();
}

}  // namespace

Status PackTokens(const std::vector<TokenLists>& lists, const std::vector<int64_t>& first_rows,
                  const std::function<int32_t*(int, int64_t)>& allocate) {
  const int num_shards = first_rows.size() - 1;
  auto shard_of = [&](int32_t id) {
    return num_shards == 1 ? 0 : std::upper_bound(first_rows.begin(), first_rows.end(), id) - first_rows.begin() - 1;
  };
  std::vector<int64_t> counts(num_shards);
  int64_t num_texts = 0, num_values = 0;
  bool one_per_text = num_shards == 1;
  for (const TokenLists& list : lists) {
    DPSR_RETURN_IF_ERROR(Check(list, first_rows.back()));
    for (int64_t text = 0; one_per_text && text < list.num_texts; ++text) {
      one_per_text = list.row_splits[text + 1] == text + 1;
    }
    num_texts += list.num_texts;
    num_values += list.num_values;
    if (num_shards > 1) {
      for (int64_t i = 0; i < list.num_values; ++i) ++counts[shard_of(list.values[i])];
    }
  }
  if (num_shards == 1) counts[0] = num_values;
  if (num_texts + 2 * num_values + kHeader > std::numeric_limits<int32_t>::max()) {
    return MakeStatus(StatusCode::kInvalidArgument, num_texts, " texts with ", num_values,
                      " ids in one call, expected fewer than 2^30; take smaller batches");
  }
  const bool weighted = !lists.empty() && lists[0].weights != nullptr;
  struct Writer {
    int32_t *ends, *rows, *weights;
    int32_t n = 0;
  };
  std::vector<Writer> writers(num_shards);
  for (int shard = 0; shard < num_shards; ++shard) {
    const int64_t num_ends = one_per_text ? 0 : num_texts;
    int32_t* out = allocate(shard, kHeader + num_ends + (weighted ? 2 : 1) * counts[shard]);
    out[0] = one_per_text ? kOnePerText : static_cast<int32_t>(num_texts);
    out[1] = weighted;
    writers[shard].ends = out + kHeader;
    writers[shard].rows = out + kHeader + num_ends;
    writers[shard].weights = writers[shard].rows + counts[shard];
  }
  for (const TokenLists& list : lists) {
    for (int64_t text = 0; text < list.num_texts; ++text) {
      for (int64_t i = list.row_splits[text]; i < list.row_splits[text + 1]; ++i) {
        const int shard = shard_of(list.values[i]);
        Writer& writer = writers[shard];
        if (weighted) std::memcpy(writer.weights + writer.n, list.weights + i, sizeof(float));
        writer.rows[writer.n++] = list.values[i] - static_cast<int32_t>(first_rows[shard]);
      }
      if (one_per_text) continue;
      for (Writer& writer : writers) *writer.ends++ = writer.n;
    }
  }
  return Status();
}

Status PackedTokens::Parse(const int32_t* data, int64_t size, int64_t num_rows, PackedTokens* tokens) {
  auto broken = [&](const auto&... what) {
    return MakeStatus(StatusCode::kInvalidArgument, "packed tokens of ", size, " numbers: ", what...);
  };
  if (size < kHeader) return broken("expected at least ", kHeader);
  const int32_t num_texts = data[0];
  const bool one_per_text = num_texts == kOnePerText, weighted = data[1] == 1;
  if (num_texts < kOnePerText || data[1] < 0 || data[1] > 1) return broken("the header is ", data[0], ", ", data[1]);
  const int64_t num_ends = one_per_text ? 0 : num_texts, rest = size - kHeader - num_ends;
  if (rest < 0 || (weighted && rest % 2 != 0)) return broken(num_texts, " texts do not fit");
  PackedTokens result;
  result.num_values_ = weighted ? rest / 2 : rest;
  result.num_texts_ = one_per_text ? result.num_values_ : num_texts;
  result.ends_ = one_per_text ? nullptr : data + kHeader;
  result.rows_ = data + kHeader + num_ends;
  result.weights_ = weighted ? result.rows_ + result.num_values_ : nullptr;
  int64_t begin = 0;
  for (int64_t text = 0; text < num_ends; ++text) {
    if (result.ends_[text] < begin) return broken("text ", text, " ends at ", result.ends_[text], ", before its begin");
    begin = result.ends_[text];
  }
  if (!one_per_text && begin != result.num_values_) {
    return broken("the last text ends at ", begin, ", expected ", result.num_values_);
  }
  for (int64_t i = 0; i < result.num_values_; ++i) {
    if (result.rows_[i] < 0 || result.rows_[i] >= num_rows) {
      return broken("row ", result.rows_[i], ", expected 0 to ", num_rows - 1, ", the rows of the table");
    }
  }
  *tokens = result;
  return Status();
}

float PackedTokens::weight(int64_t i) const {
  if (weights_ == nullptr) return 1;
  float weight;
  std::memcpy(&weight, weights_ + i, sizeof(weight));
  return weight;
}

RowLocks& RowLocks::OfProcess() {
  static RowLocks* locks = new RowLocks;
  return *locks;
}

// Rows that are used much lie side by side (ids go by frequency): the low bits spread them.
RowLocks::Holder::Holder(RowLocks& locks, int64_t row) : held_(locks.locks_[row & ((1 << kBits) - 1)].held) {
  while (held_.exchange(true, std::memory_order_acquire)) {
    // A row's step is short, so the holder is nearly done, unless it has lost its core.
    for (int i = 0; i < 100 && held_.load(std::memory_order_relaxed); ++i) {
    }
    if (held_.load(std::memory_order_relaxed)) std::this_thread::yield();
  }
}

void SumRows(const float* table, int64_t dim, const PackedTokens& tokens, RowLocks& locks, float* out) {
  std::fill(out, out + tokens.num_texts() * dim, 0.f);
  for (int64_t i = 0; i < std::min(kRowsAhead, tokens.num_values()); ++i) Prefetch(table + tokens.row(i) * dim, dim);
  int64_t i = 0;
  for (int64_t text = 0; text < tokens.num_texts(); ++text, out += dim) {
    for (; i < tokens.end(text); ++i) {
      if (i + kRowsAhead < tokens.num_values()) Prefetch(table + tokens.row(i + kRowsAhead) * dim, dim);
      const RowLocks::Holder lock(locks, tokens.row(i));
      AddScaled(table + tokens.row(i) * dim, tokens.weight(i), dim, out);
    }
  }
}

void ApplyAdagrad(const std::vector<PooledGradient>& gradients, float learning_rate, int64_t num_rows, int64_t dim,
                  RowLocks& locks, float* table, float* accumulator) {
  std::vector<Occurrence> occurrences;
  int64_t n = 0;
  for (const PooledGradient& pooled : gradients) n += pooled.tokens.num_values();
  occurrences.reserve(n);
  for (const PooledGradient& pooled : gradients) {
    int64_t i = 0;
    for (int64_t text = 0; text < pooled.tokens.num_texts(); ++text) {
      for (; i < pooled.tokens.end(text); ++i) {
        occurrences.push_back({static_cast<uint32_t>(pooled.tokens.row(i)), pooled.tokens.weight(i),
                               pooled.gradient + text * dim});
      }
    }
  }
  SortByRow(num_rows, &occurrences);
  std::vector<float> sum(dim);
  for (int64_t i = 0; i < n;) {
    const int64_t row = occurrences[i].row;
    if (i + kRowsAhead < n) {
      Prefetch(table + occurrences[i + kRowsAhead].row * dim, dim);
      Prefetch(accumulator + occurrences[i + kRowsAhead].row * dim, dim);
    }
    std::fill(sum.begin(), sum.end(), 0.f);
    for (; i < n && occurrences[i].row == row; ++i) {
      AddScaled(occurrences[i].gradient, occurrences[i].weight, dim, sum.data());
    }
    const RowLocks::Holder lock(locks, row);
    AdagradRow(sum.data(), learning_rate, dim, table + row * dim, accumulator + row * dim);
  }
}

}  // namespace dpsr
