#include "dpsr_tf/ops/product_quantizer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {
namespace {

// As many numbers as the widest register holds. Compilers split them for narrower ones.
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// A panel holds kPanel centroids: minus half their squared lengths [kPanel], then [width, kPanel] with a column for each.
// The inner loop scores kRows vectors with a panel and keeps the scores in registers.
constexpr int64_t kVectors = 2, kPanel = kVectors * kLanes;
constexpr int64_t kRows = 4;
// Vectors that are scored with the same panels, one after the other, while the panels are in the first cache.
constexpr int64_t kBlock = 64;
constexpr int64_t kPanelBytes = 32 << 10;
// Columns of a unit of the gradient.
constexpr int64_t kSlice = 64;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// For each lane, the highest score so far and the number of its centroid.
struct Highest {
  Floats score;
  Ints number;
};

DPSR_INLINE void Load(const float* from, Floats* to) { std::memcpy(to, from, sizeof(*to)); }

// Scores kRows vectors with `count` panels, the first of which begins with the centroid `first`. The score, the inner
// product minus half of the centroid's squared length, falls as the distance grows.
template <typename Width>
DPSR_INLINE void ScorePanels(const float* const (&x)[kRows], const float* panel, int64_t count, Width width,
                             int32_t first, Highest* highest) {
  Ints numbers;
  for (int64_t lane = 0; lane < kLanes; ++lane) numbers[lane] = first + lane;
  Highest found[kRows];
  for (int64_t row = 0; row < kRows; ++row) found[row] = highest[row];
  for (int64_t p = 0; p < count; ++p) {
    Floats scores[kRows][kVectors];
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t v = 0; v < kVectors; ++v) Load(panel + v * kLanes, &scores[row][v]);
    }
    panel += kPanel;
    for (int64_t k = 0; k < width; ++k, panel += kPanel) {
      Floats centroids[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) Load(panel + v * kLanes, &centroids[v]);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t v = 0; v < kVectors; ++v) scores[row][v] += x[row][k] * centroids[v];
      }
    }
    for (int64_t v = 0; v < kVectors; ++v, numbers += static_cast<int32_t>(kLanes)) {
      for (int64_t row = 0; row < kRows; ++row) {
        const Ints higher = scores[row][v] > found[row].score;
        found[row].score = higher ? scores[row][v] : found[row].score;
        found[row].number = higher ? numbers : found[row].number;
      }
    }
  }
  for (int64_t row = 0; row < kRows; ++row) highest[row] = found[row];
}

// Returns the number of the highest score, the lowest number of equal ones. Without branches, which would be
// mispredicted.
DPSR_INLINE int32_t HighestNumber(const Highest& highest) {
  float scores[kLanes];
  int32_t numbers[kLanes];
  std::memcpy(scores, &highest.score, sizeof(scores));
  std::memcpy(numbers, &highest.number, sizeof(numbers));
  float most = scores[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) most = scores[lane] > most ? scores[lane] : most;
  int32_t number = std::numeric_limits<int32_t>::max();
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int32_t candidate = scores[lane] == most ? numbers[lane] : std::numeric_limits<int32_t>::max();
    number = candidate < number ? candidate : number;
  }
  return number;
}

template <typename Width>
DPSR_INLINE void FindNearestOf(const float* x, int64_t n, const CodebookShape& shape, Width width, const float* panels,
                               int64_t num_panels, int32_t* codes) {
  const int64_t dim = shape.parts * width, panel_size = kPanel * (1 + width);
  const int64_t together = std::max<int64_t>(1, kPanelBytes / (panel_size * sizeof(float)));
  Highest highest[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t rows = std::min(kBlock, n - begin);
    for (int64_t part = 0; part < shape.parts; ++part) {
      const float* of_part = panels + part * num_panels * panel_size;
      // Where all scores are NaN, the number stays 0.
      for (Highest& each : highest) each = {Floats{} - kInfinity, Ints{}};
      for (int64_t p = 0; p < num_panels; p += together) {
        for (int64_t row = 0; row < rows; row += kRows) {
          const float* of_rows[kRows];
          for (int64_t i = 0; i < kRows; ++i) {
            of_rows[i] = x + (begin + std::min(row + i, rows - 1)) * dim + part * width;
          }
          ScorePanels(of_rows, of_part + p * panel_size, std::min(together, num_panels - p), width, p * kPanel,
                      highest + row);
        }
      }
      for (int64_t row = 0; row < rows; ++row) codes[(begin + row) * shape.parts + part] = HighestNumber(highest[row]);
    }
  }
}

// Type of `width` in the inner loops, so that the compiler knows the most common ones.
template <int64_t kWidth>
using Fixed = std::integral_constant<int64_t, kWidth>;

DPSR_FOR_EACH_CPU void FindNearest(const float* x, int64_t n, const CodebookShape& shape, const float* panels,
                                   int64_t num_panels, int32_t* codes) {
  if (shape.width == 4) {
    FindNearestOf(x, n, shape, Fixed<4>(), panels, num_panels, codes);
  } else if (shape.width == 8) {
    FindNearestOf(x, n, shape, Fixed<8>(), panels, num_panels, codes);
  } else {
    FindNearestOf(x, n, shape, shape.width, panels, num_panels, codes);
  }
}

// Parts of a unit of the gradient if parts are narrow, and units of a part if parts are wide.
int64_t PartsOfUnit(const CodebookShape& shape) { return std::max<int64_t>(1, kSlice / shape.width); }
int64_t UnitsOfPart(const CodebookShape& shape) { return (shape.width + kSlice - 1) / kSlice; }

// Adds 4 or 8 numbers. Left to itself, the compiler joins the narrow parts of a row, and scatters their lanes again.
template <int64_t kWidth>
DPSR_INLINE void AddTo(const float* of_row, Fixed<kWidth>, float* sum) {
  using Quad = float __attribute__((vector_size(4 * sizeof(float))));
  for (int64_t k = 0; k < kWidth; k += 4) {
    Quad a, b;
    std::memcpy(&a, sum + k, sizeof(a));
    std::memcpy(&b, of_row + k, sizeof(b));
    a += b;
    std::memcpy(sum + k, &a, sizeof(a));
  }
}
DPSR_INLINE void AddTo(const float* __restrict of_row, int64_t width, float* __restrict sum) {
  for (int64_t k = 0; k < width; ++k) sum[k] += of_row[k];
}

// Adds `width` columns, from `first` on, of `parts` parts.
template <typename Width>
DPSR_INLINE void AddPartsOf(const int32_t* codes, int64_t n, const float* upstream,
                            const CodebookShape& shape, int64_t parts, int64_t first, Width width,
                            float* of_parts) {
  upstream += first;
  of_parts += first;
  for (int64_t i = 0; i < n; ++i, codes += shape.parts, upstream += shape.dim()) {
    for (int64_t part = 0; part < parts; ++part) {
      AddTo(upstream + part * shape.width, width, of_parts + (part * shape.size + codes[part]) * shape.width);
    }
  }
}

DPSR_FOR_EACH_CPU void AddParts(const int32_t* codes, int64_t n, const float* upstream, const CodebookShape& shape,
                                int64_t parts, int64_t first, int64_t width, float* of_parts) {
  if (width == 4) {
    AddPartsOf(codes, n, upstream, shape, parts, first, Fixed<4>(), of_parts);
  } else if (width == 8) {
    AddPartsOf(codes, n, upstream, shape, parts, first, Fixed<8>(), of_parts);
  } else {
    AddPartsOf(codes, n, upstream, shape, parts, first, width, of_parts);
  }
}

}  // namespace

PackedCodebooks::PackedCodebooks(const float* codebooks, const CodebookShape& shape)
    : shape_(shape),
      panels_((shape.size + kPanel - 1) / kPanel),
      values_(new float[shape.parts * panels_ * kPanel * (1 + shape.width)]) {
  float* panel = values_.get();
  for (int64_t part = 0; part < shape.parts; ++part) {
    for (int64_t first = 0; first < shape.size; first += kPanel, panel += kPanel * (1 + shape.width)) {
      for (int64_t i = 0; i < kPanel; ++i) {
        const float* centroid = codebooks + (part * shape.size + first + i) * shape.width;
        const bool exists = first + i < shape.size;
        float squared = 0;
        for (int64_t k = 0; k < shape.width; ++k) {
          const float value = exists ? centroid[k] : 0;
          squared += value * value;
          panel[(1 + k) * kPanel + i] = value;
        }
        panel[i] = exists ? -squared / 2 : -kInfinity;  // what does not exist is never nearest
      }
    }
  }
}

void PackedCodebooks::NearestCodes(const float* x, int64_t n, int32_t* codes) const {
  FindNearest(x, n, shape_, values_.get(), panels_, codes);
}

void LookUpCodes(const int32_t* codes, int64_t n, const float* codebooks, const CodebookShape& shape, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float* codebook = codebooks;
    for (int64_t part = 0; part < shape.parts; ++part, codebook += shape.size * shape.width, out += shape.width) {
      std::memcpy(out, codebook + *codes++ * shape.width, shape.width * sizeof(float));
    }
  }
}

int64_t GradientUnits(const CodebookShape& shape) {
  const int64_t parts = PartsOfUnit(shape);
  return (shape.parts + parts - 1) / parts * UnitsOfPart(shape);
}

void LookUpCodesGradient(const int32_t* codes, int64_t n, const float* upstream, const CodebookShape& shape,
                         int64_t begin, int64_t end, float* of_codebooks) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / UnitsOfPart(shape) * PartsOfUnit(shape), first = unit % UnitsOfPart(shape) * kSlice;
    const int64_t parts = std::min(PartsOfUnit(shape), shape.parts - part);
    const int64_t width = std::min(kSlice, shape.width - first);
    float* of_parts = of_codebooks + part * shape.size * shape.width;
    for (int64_t k = 0; k < parts * shape.size; ++k) std::fill_n(of_parts + k * shape.width + first, width, 0.f);
    AddParts(codes + part, n, upstream + part * shape.width, shape, parts, first, width, of_parts);
  }
}

}  // namespace dpsr
