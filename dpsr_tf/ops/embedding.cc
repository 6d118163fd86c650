#include "dpsr_tf/ops/embedding.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {
namespace {

constexpr int64_t kHeader = 2;
// Number of rows that are prefetched: enough to hide the latency of memory, few enough to stay in the cache.
constexpr int64_t kRowsAhead = 12;

// Type of `dim` in the loops over rows, so that the compiler knows the most common widths.
template <int64_t kDim>
using Fixed = std::integral_constant<int64_t, kDim>;

template <int kForWriting>
void Prefetch(const float* row, int64_t dim) {
  for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(row + k, kForWriting);
}

// One id of one text.
struct Occurrence {
  uint32_t row;
  float weight;
  const float* gradient;
};

// Sorts by row and keeps the order of equal rows: a radix sort from the least significant digit, with as many digits as
// `num_rows` needs. Both arrays hold `n` elements; the one that is returned has the result.
Occurrence* SortByRow(int64_t num_rows, int64_t n, Occurrence* occurrences, Occurrence* sorted) {
  constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
  for (int shift = 0; shift < 32 && (num_rows - 1) >> shift != 0; shift += kDigitBits) {
    uint32_t begin[kDigits + 1] = {};
    for (int64_t i = 0; i < n; ++i) ++begin[((occurrences[i].row >> shift) & (kDigits - 1)) + 1];
    for (int digit = 0; digit < kDigits; ++digit) begin[digit + 1] += begin[digit];
    for (int64_t i = 0; i < n; ++i) sorted[begin[(occurrences[i].row >> shift) & (kDigits - 1)]++] = occurrences[i];
    std::swap(occurrences, sorted);
  }
  return occurrences;
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

Status RowRanges::Make(const std::vector<int64_t>& first_ids, const std::vector<int64_t>& shards, int num_shards,
                       RowRanges* ranges) {
  if (first_ids.size() < 2 || first_ids[0] != 0 || !std::is_sorted(first_ids.begin(), first_ids.end()) ||
      first_ids.back() > std::numeric_limits<int32_t>::max()) {
    return MakeStatus(StatusCode::kInvalidArgument, "first_rows has ", first_ids.size(),
                      " numbers, expected ascending ones from 0 to the number of ids, at most 2^31 - 1");
  }
  const size_t num_ranges = first_ids.size() - 1;
  if (shards.empty() ? static_cast<int64_t>(num_ranges) != num_shards : shards.size() != num_ranges) {
    return MakeStatus(StatusCode::kInvalidArgument, "first_rows has ", first_ids.size(), " numbers, and shards ",
                      shards.size(), "; expected one number more than the ", shards.empty() ? num_shards : shards.size(),
                      " shards of the ranges");
  }
  *ranges = RowRanges();
  ranges->num_shards_ = num_shards;
  ranges->first_ids_ = first_ids;
  std::vector<int64_t> num_rows(num_shards);
  for (size_t range = 0; range < num_ranges; ++range) {
    const int64_t shard = shards.empty() ? range : shards[range];
    if (shard < 0 || shard >= num_shards) {
      return MakeStatus(StatusCode::kInvalidArgument, "range ", range, " is in shard ", shard, ", expected 0 to ",
                        num_shards - 1);
    }
    ranges->shards_.push_back(static_cast<int>(shard));
    ranges->shifts_.push_back(static_cast<int32_t>(first_ids[range] - num_rows[shard]));
    num_rows[shard] += first_ids[range + 1] - first_ids[range];
  }
  return Status();
}

Status PackTokens(const std::vector<TokenLists>& lists, const RowRanges& ranges,
                  const std::function<int32_t*(int, int64_t)>& allocate) {
  const int num_shards = ranges.num_shards();
  std::vector<int64_t> counts(num_shards);
  int64_t num_texts = 0, num_values = 0;
  bool one_per_text = num_shards == 1;
  for (const TokenLists& list : lists) {
    DPSR_RETURN_IF_ERROR(Check(list, ranges.num_ids()));
    for (int64_t text = 0; one_per_text && text < list.num_texts; ++text) {
      one_per_text = list.row_splits[text + 1] == text + 1;
    }
    num_texts += list.num_texts;
    num_values += list.num_values;
    if (num_shards > 1) {
      for (int64_t i = 0; i < list.num_values; ++i) ++counts[ranges.Find(list.values[i]).shard];
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
        const RowRanges::Place place = ranges.Find(list.values[i]);
        Writer& writer = writers[place.shard];
        if (weighted) std::memcpy(writer.weights + writer.n, list.weights + i, sizeof(float));
        writer.rows[writer.n++] = place.row;
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

RowLocks* RowLocks::OfProcess() {
  static RowLocks* locks = new RowLocks;
  return locks;
}

void RowLocks::Holder::Wait() {
  do {
    // The step of a row is short, so the holder is nearly done, unless it has lost its core.
    for (int i = 0; i < 100 && held_->load(std::memory_order_relaxed); ++i) {
    }
    if (held_->load(std::memory_order_relaxed)) std::this_thread::yield();
  } while (held_->exchange(true, std::memory_order_acquire));
}

namespace {

template <typename Dim>
DPSR_INLINE void SumRowsOf(const float* __restrict table, Dim dim, const PackedTokens& tokens, RowLocks* locks,
                           float* __restrict out) {
  const int64_t num_values = tokens.num_values();
  for (int64_t i = 0; i < std::min(kRowsAhead, num_values); ++i) Prefetch<0>(table + tokens.row(i) * dim, dim);
  int64_t i = 0;
  for (int64_t text = 0; text < tokens.num_texts(); ++text, out += dim) {
    std::fill(out, out + dim, 0.f);
    for (const int64_t end = tokens.end(text); i < end; ++i) {
      if (i + kRowsAhead < num_values) Prefetch<0>(table + tokens.row(i + kRowsAhead) * dim, dim);
      const float* __restrict row = table + tokens.row(i) * dim;
      const float weight = tokens.weight(i);
      const RowLocks::Holder lock(locks, tokens.row(i));
      for (int64_t k = 0; k < dim; ++k) out[k] += weight * row[k];
    }
  }
}

template <typename Dim>
DPSR_INLINE void AdagradStep(const float* __restrict gradient, Dim n, float learning_rate, float decay,
                             float* __restrict values, float* __restrict accumulator) {
  const float added = decay < 1 ? 1 - decay : 1;
  for (int64_t k = 0; k < n; ++k) {
    const float g = gradient[k], total = decay * accumulator[k] + added * g * g;
    accumulator[k] = total;
    values[k] -= learning_rate * g / std::sqrt(total);
  }
}

// `sum` is working memory for one row.
template <typename Dim>
DPSR_INLINE void ApplyAdagradTo(const Occurrence* occurrences, int64_t n, float learning_rate, float decay, Dim dim,
                                RowLocks* locks, float* __restrict sum, float* __restrict table,
                                float* __restrict accumulators) {
  for (int64_t i = 0; i < n;) {
    const int64_t row = occurrences[i].row;
    std::fill(sum, sum + dim, 0.f);
    for (; i < n && occurrences[i].row == row; ++i) {
      if (const int64_t ahead = i + kRowsAhead; ahead < n && occurrences[ahead].row != occurrences[ahead - 1].row) {
        Prefetch<1>(table + occurrences[ahead].row * dim, dim);
        Prefetch<1>(accumulators + occurrences[ahead].row * dim, dim);
      }
      const float weight = occurrences[i].weight;
      const float* __restrict gradient = occurrences[i].gradient;
      for (int64_t k = 0; k < dim; ++k) sum[k] += weight * gradient[k];
    }
    const RowLocks::Holder lock(locks, row);
    AdagradStep(sum, dim, learning_rate, decay, table + row * dim, accumulators + row * dim);
  }
}

DPSR_FOR_EACH_CPU void ApplyAdagradToRows(const Occurrence* occurrences, int64_t n, float learning_rate, float decay,
                                          int64_t dim, RowLocks* locks, float* table, float* accumulator) {
  if (dim == 64) {
    float sum[64];
    ApplyAdagradTo(occurrences, n, learning_rate, decay, Fixed<64>(), locks, sum, table, accumulator);
  } else {
    std::vector<float> sum(dim);
    ApplyAdagradTo(occurrences, n, learning_rate, decay, dim, locks, sum.data(), table, accumulator);
  }
}

}  // namespace

DPSR_FOR_EACH_CPU void SumRows(const float* table, int64_t dim, const PackedTokens& tokens, RowLocks* locks,
                               float* out) {
  if (dim == 64) {
    SumRowsOf(table, Fixed<64>(), tokens, locks, out);
  } else {
    SumRowsOf(table, dim, tokens, locks, out);
  }
}

void ApplyAdagrad(const std::vector<PooledGradient>& gradients, float learning_rate, int64_t num_rows, int64_t dim,
                  RowLocks* locks, float* table, float* accumulator, float decay) {
  int64_t n = 0;
  for (const PooledGradient& pooled : gradients) n += pooled.tokens.num_values();
  // Plain arrays, because vectors would be filled with zeros first.
  const std::unique_ptr<Occurrence[]> occurrences(new Occurrence[n]), sorted(new Occurrence[n]);
  Occurrence* next = occurrences.get();
  for (const PooledGradient& pooled : gradients) {
    int64_t i = 0;
    for (int64_t text = 0; text < pooled.tokens.num_texts(); ++text) {
      const float* gradient = pooled.gradient + text * dim;
      for (const int64_t end = pooled.tokens.end(text); i < end; ++i) {
        *next++ = {static_cast<uint32_t>(pooled.tokens.row(i)), pooled.tokens.weight(i), gradient};
      }
    }
  }
  ApplyAdagradToRows(SortByRow(num_rows, n, occurrences.get(), sorted.get()), n, learning_rate, decay, dim, locks, table,
                     accumulator);
}

DPSR_FOR_EACH_CPU void ApplyDenseAdagrad(const float* gradient, int64_t n, float learning_rate, float* values,
                                         float* accumulator) {
  AdagradStep(gradient, n, learning_rate, 1, values, accumulator);
}

void UseHugePages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // since Linux 6.1; older kernels make huge pages later, in the background
#endif
  const uintptr_t page = sysconf(_SC_PAGESIZE), address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace dpsr
