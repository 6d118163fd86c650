// Compiled with -ffp-contract=fast, so that products and sums become one instruction.
#include "export/rank_features/rank_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dpsr {
namespace {

#define DPSR_ALWAYS_INLINE inline __attribute__((always_inline))

// What a layer computes for some rows.
struct LayerCall {
  const DenseLayer& layer;
  const float* x;
  const float* const* start;  // null adds nothing
  float* y;
};

// Computes rows [row, row + kRows) and columns [column, column + kVectors * kLanes). `active` are the inputs that are not
// 0 in all of these rows, ascending. The sums stay in registers.
template <int kLanes, int kRows, int kVectors>
DPSR_ALWAYS_INLINE void Block(const LayerCall& call, size_t row, size_t column, Span<const uint32_t> active) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  // The same in memory, at any address.
  typedef float Loose __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
  const size_t k = call.layer.inputs, m = call.layer.outputs;
  const float* const x = call.x + row * k;
  const float* const kernel = call.layer.kernel + column;
  Vector sums[kRows][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const Vector bias = *reinterpret_cast<const Loose*>(call.layer.bias + column + v * kLanes);
    for (int r = 0; r < kRows; ++r) sums[r][v] = bias;
  }
  if (call.start != nullptr) {
    for (int r = 0; r < kRows; ++r) {
      const float* const start = call.start[row + r] + column;
      for (int v = 0; v < kVectors; ++v) sums[r][v] += *reinterpret_cast<const Loose*>(start + v * kLanes);
    }
  }
  for (const uint32_t p : active) {
    Vector weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = *reinterpret_cast<const Loose*>(kernel + p * m + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r * k + p];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[v] * value;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* const y = call.y + (row + r) * m + column;
    for (int v = 0; v < kVectors; ++v) {
      if (call.layer.relu) sums[r][v] = sums[r][v] > 0 ? sums[r][v] : Vector{};
      *reinterpret_cast<Loose*>(y + v * kLanes) = sums[r][v];
    }
  }
}

// Computes kRows rows from `row` on. `active` has room for the inputs of the layer.
template <int kLanes, int kRows, int kVectors>
DPSR_ALWAYS_INLINE void Rows(const LayerCall& call, size_t row, uint32_t* active) {
  const size_t k = call.layer.inputs, m = call.layer.outputs;
  const float* const x = call.x + row * k;
  size_t count = 0, p = 0;
  // The bits of 0 are 0, but for its sign.
  typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint32_t LooseBits __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
  for (; p + kLanes <= k; p += kLanes) {
    Bits any{};
    for (int r = 0; r < kRows; ++r) any |= *reinterpret_cast<const LooseBits*>(x + r * k + p);
    uint32_t bits[kLanes];
    *reinterpret_cast<LooseBits*>(bits) = any << 1;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      active[count] = static_cast<uint32_t>(p) + lane;
      count += bits[lane] != 0 ? 1 : 0;
    }
  }
  for (; p < k; ++p) active[count++] = static_cast<uint32_t>(p);
  const Span<const uint32_t> used{active, count};
  size_t column = 0;
  for (; column + kLanes * kVectors <= m; column += kLanes * kVectors) {
    Block<kLanes, kRows, kVectors>(call, row, column, used);
  }
  for (; column + kLanes <= m; column += kLanes) Block<kLanes, kRows, 1>(call, row, column, used);
  for (; column < m; ++column) {
    for (int r = 0; r < kRows; ++r) {
      float sum = call.layer.bias[column] + (call.start == nullptr ? 0.0f : call.start[row + r][column]);
      for (const uint32_t at : used) sum += x[r * k + at] * call.layer.kernel[at * m + column];
      call.y[(row + r) * m + column] = call.layer.relu ? std::max(sum, 0.0f) : sum;
    }
  }
}

template <int kLanes, int kRows, int kVectors>
DPSR_ALWAYS_INLINE void AllRows(const LayerCall& call, size_t n) {
  std::vector<uint32_t> active(call.layer.inputs);
  size_t row = 0;
  for (; row + kRows <= n; row += kRows) Rows<kLanes, kRows, kVectors>(call, row, active.data());
  for (; row < n; ++row) Rows<kLanes, 1, kVectors>(call, row, active.data());
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vl,fma"))) void AllRowsAvx512(const LayerCall& call, size_t n) {
  AllRows<16, 4, 4>(call, n);
}
__attribute__((target("avx2,fma"))) void AllRowsAvx2(const LayerCall& call, size_t n) {
  AllRows<8, 4, 2>(call, n);
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

void MoveCommonInputs(size_t n, size_t k, float* x, float* common) {
  // The majority vote of Boyer and Moore: a value of more than half of the rows outlives all others.
  std::vector<float> votes(k);
  std::fill_n(common, k, 0.0f);
  for (size_t i = 0; i < n; ++i) {
    for (size_t p = 0; p < k; ++p) {
      const float value = x[i * k + p];
      common[p] = votes[p] == 0 ? value : common[p];
      votes[p] += value == common[p] ? 1.0f : -1.0f;
    }
  }
  // No vote is left: no value is that of more than half of the rows.
  for (size_t p = 0; p < k; ++p) common[p] = votes[p] > 0 ? common[p] : 0.0f;
  for (size_t i = 0; i < n; ++i) {
    for (size_t p = 0; p < k; ++p) x[i * k + p] -= common[p];
  }
}

void DenseLayer::Apply(const float* x, const float* const* start, size_t n, float* y) const {
  const LayerCall call{*this, x, start, y};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return AllRowsAvx512(call, n);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AllRowsAvx2(call, n);
#endif
  AllRows<4, 4, 2>(call, n);
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
