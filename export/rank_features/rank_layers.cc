// Compiled with -ffp-contract=fast, so that products and sums become one instruction.
#include "export/rank_features/rank_layers.h"

#include <algorithm>
#include <cmath>

namespace dpsr {
namespace {

#define DPSR_ALWAYS_INLINE inline __attribute__((always_inline))

// Adds x [kRows, k] times kernel [k, kVectors * kLanes] to y. The sums stay in registers.
template <int kLanes, int kRows, int kVectors>
DPSR_ALWAYS_INLINE void Block(const float* x, size_t k, const float* kernel, size_t m, float* y) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  // The same in memory, at any address.
  typedef float Loose __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
  Vector sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = *reinterpret_cast<const Loose*>(y + r * m + v * kLanes);
  }
  for (size_t p = 0; p < k; ++p) {
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = *reinterpret_cast<const Loose*>(kernel + p * m + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r * k + p];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += row[v] * value;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Loose*>(y + r * m + v * kLanes) = sums[r][v];
  }
}

template <int kLanes, int kRows, int kVectors>
DPSR_ALWAYS_INLINE void Product(const float* x, const float* kernel, size_t n, size_t k, size_t m, float* y) {
  constexpr size_t kColumns = kLanes * kVectors;
  size_t column = 0;
  // All rows of one piece of the kernel first: it stays in the cache.
  for (; column + kColumns <= m; column += kColumns) {
    size_t row = 0;
    for (; row + kRows <= n; row += kRows) {
      Block<kLanes, kRows, kVectors>(x + row * k, k, kernel + column, m, y + row * m + column);
    }
    for (; row < n; ++row) Block<kLanes, 1, kVectors>(x + row * k, k, kernel + column, m, y + row * m + column);
  }
  for (; column < m; ++column) {
    // Several rows at a time, because each sum waits for its last product.
    constexpr size_t kAtOnce = 8;
    for (size_t row = 0; row < n; row += kAtOnce) {
      float sums[kAtOnce] = {};
      const size_t rows = std::min(kAtOnce, n - row);
      // The last rows are computed more than once rather than one by one.
      for (size_t p = 0; p < k; ++p) {
        for (size_t r = 0; r < kAtOnce; ++r) {
          sums[r] += x[std::min(row + r, n - 1) * k + p] * kernel[p * m + column];
        }
      }
      for (size_t r = 0; r < rows; ++r) y[(row + r) * m + column] += sums[r];
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vl,fma"))) void ProductAvx512(const float* x, const float* kernel, size_t n,
                                                                    size_t k, size_t m, float* y) {
  Product<16, 8, 2>(x, kernel, n, k, m, y);
}
__attribute__((target("avx2,fma"))) void ProductAvx2(const float* x, const float* kernel, size_t n, size_t k, size_t m,
                                                     float* y) {
  Product<8, 4, 2>(x, kernel, n, k, m, y);
}
#endif

float Scaled(const NumberScale& scale, float cut, float x) {
  // Most counts are 0.
  const float log = x == 0 ? 0.0f : std::copysign(std::log1p(std::fabs(x) / scale.unit), x);
  return std::min(std::max((log - scale.mean) / scale.std, -cut), cut);
}

float Inner(const float* a, const float* b, size_t n) {
  // Several sums at a time, because each addition waits for the one before it.
  float sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float part : sums) sum += part;
  return sum;
}

}  // namespace

void AddProduct(const float* x, const float* kernel, size_t n, size_t k, size_t m, float* y) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    return ProductAvx512(x, kernel, n, k, m, y);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ProductAvx2(x, kernel, n, k, m, y);
#endif
  Product<4, 4, 2>(x, kernel, n, k, m, y);
}

float* Scales::Apply(const float* values, float* out) const {
  for (size_t i = 0; i < numbers.size(); ++i) *out++ = std::isnan(values[i]) ? 0.0f : Scaled(numbers[i], cut, values[i]);
  for (const int32_t place : may_miss) *out++ = std::isnan(values[place]) ? 1.0f : 0.0f;
  return out;
}

void PairInputs(const PairLayout& layout, const RankedRequest& request, const float* numbers, const float* vector,
                const float* offered, const float* codes, float* out) {
  out = layout.scales.Apply(numbers, out);
  for (size_t i = 0; i < request.wanted.size(); ++i) *out++ = request.wanted[i] * offered[i];
  if (!request.text.empty()) *out++ = Inner(vector, request.text.data(), request.text.size());
  if (!request.pooled.empty()) {
    size_t begin = 0;
    for (const int32_t width : layout.fields) {
      *out++ = Inner(vector + begin, request.pooled.data() + begin, static_cast<size_t>(width));
      begin += static_cast<size_t>(width);
    }
  }
  const size_t f = request.matches.size();
  for (size_t code = 0; code < f; ++code, ++out) {
    const std::vector<CodeMatch>& of_code = request.matches[code];
    const auto match =
        std::find_if(of_code.begin(), of_code.end(), [&](const CodeMatch& m) { return m.code == codes[code]; });
    const bool found = match != of_code.end();
    out[0] = found ? std::log1p(match->count) : 0.0f;
    out[f] = found ? match->count / static_cast<float>(request.events) : 0.0f;
    out[2 * f] = found ? match->recent : 0.0f;
  }
}

void RankedRequest::SetHistory(const float* history, size_t num_events, size_t codes, float half_life) {
  events = num_events;
  matches.assign(codes, {});
  const float decay = std::exp2(-1.0f / half_life);
  float weight = 1;
  for (size_t event = events; event-- > 0;) {
    weight *= decay;
    for (size_t place = 0; place < codes; ++place) {
      const float code = history[event * codes + place];
      if (!(code > 0)) continue;
      std::vector<CodeMatch>& of_code = matches[place];
      auto match = std::find_if(of_code.begin(), of_code.end(), [&](const CodeMatch& m) { return m.code == code; });
      if (match == of_code.end()) match = of_code.insert(match, {code, 0, 0});
      match->count += 1;
      match->recent += weight;
    }
  }
}

}  // namespace dpsr
