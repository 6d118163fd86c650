#include "dpsr_tf/ops/product_quantizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DPSR_TARGET(features) __attribute__((target(features)))
#define DPSR_FOR_BYTES DPSR_TARGET("avx512f,avx512vnni")
#endif

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {
namespace {

// As many numbers as the widest register holds.
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// A panel holds kPanel centroids: minus half their squared lengths [kPanel], then [width, kPanel] with a column for each.
// The inner loop scores kRows vectors with kVectors registers of a panel's centroids and keeps the scores in registers.
constexpr int64_t kVectors = 2, kPanel = kVectors * kLanes;
constexpr int64_t kRows = 4;
// Vectors that are scored with the same panels, one after the other, while the panels are in the first cache.
constexpr int64_t kBlock = 64;
constexpr int64_t kPanelBytes = 32 << 10;
// Columns of a unit of the gradient.
constexpr int64_t kSlice = 64;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
DPSR_INLINE void Load(const float* from, T* to) {
  std::memcpy(to, from, sizeof(*to));
}

// Registers of kWide numbers. Compilers also split wider vectors for narrower registers, but then the scores of the
// inner loop are in memory, which takes up to fifty times as long.
template <int64_t kWide>
struct Registers;
template <>
struct Registers<16> {
  using Numbers = Floats;
  using Integers = Ints;
};
template <>
struct Registers<8> {
  using Numbers = float __attribute__((vector_size(32)));
  using Integers = int32_t __attribute__((vector_size(32)));
};
template <>
struct Registers<4> {
  using Numbers = float __attribute__((vector_size(16)));
  using Integers = int32_t __attribute__((vector_size(16)));
};

// For each lane of a register, the highest score so far and the number of its centroid.
template <int64_t kWide>
struct Highest {
  typename Registers<kWide>::Numbers score;
  typename Registers<kWide>::Integers number;
};

// Scores kRows vectors with `count` panels, the first of which begins with the centroid `first`. The score, the inner
// product minus half of the centroid's squared length, falls as the distance grows.
template <int64_t kWide, typename Width>
DPSR_INLINE void ScorePanels(const float* const (&x)[kRows], const float* panel, int64_t count, Width width,
                             int32_t first, Highest<kWide>* highest) {
  using Numbers = typename Registers<kWide>::Numbers;
  using Integers = typename Registers<kWide>::Integers;
  constexpr int64_t kTogether = kVectors * kWide;
  Integers numbers{};
  for (int64_t lane = 0; lane < kWide; ++lane) numbers[lane] = first + static_cast<int32_t>(lane);
  Highest<kWide> found[kRows];
  for (int64_t row = 0; row < kRows; ++row) found[row] = highest[row];
  for (int64_t p = 0; p < count; ++p, panel += kPanel * (1 + width)) {
    for (int64_t column = 0; column < kPanel; column += kTogether) {
      const float* from = panel + column;
      Numbers scores[kRows][kVectors];
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t v = 0; v < kVectors; ++v) Load(from + v * kWide, &scores[row][v]);
      }
      from += kPanel;
      for (int64_t k = 0; k < width; ++k, from += kPanel) {
        Numbers centroids[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) Load(from + v * kWide, &centroids[v]);
        for (int64_t row = 0; row < kRows; ++row) {
          for (int64_t v = 0; v < kVectors; ++v) scores[row][v] += x[row][k] * centroids[v];
        }
      }
      for (int64_t v = 0; v < kVectors; ++v, numbers += static_cast<int32_t>(kWide)) {
        for (int64_t row = 0; row < kRows; ++row) {
          const Integers higher = scores[row][v] > found[row].score;
          found[row].score = higher ? scores[row][v] : found[row].score;
          found[row].number = higher ? numbers : found[row].number;
        }
      }
    }
  }
  for (int64_t row = 0; row < kRows; ++row) highest[row] = found[row];
}

// Returns the number of the highest score, the lowest number of equal ones. Without branches, which would be
// mispredicted.
template <int64_t kWide>
DPSR_INLINE int32_t HighestNumber(const Highest<kWide>& highest) {
  float scores[kWide];
  int32_t numbers[kWide];
  std::memcpy(scores, &highest.score, sizeof(scores));
  std::memcpy(numbers, &highest.number, sizeof(numbers));
  float most = scores[0];
  for (int64_t lane = 1; lane < kWide; ++lane) most = scores[lane] > most ? scores[lane] : most;
  int32_t number = std::numeric_limits<int32_t>::max();
  for (int64_t lane = 0; lane < kWide; ++lane) {
    const int32_t candidate = scores[lane] == most ? numbers[lane] : std::numeric_limits<int32_t>::max();
    number = candidate < number ? candidate : number;
  }
  return number;
}

template <int64_t kWide, typename Width>
DPSR_INLINE void FindNearestOf(const float* x, int64_t n, const CodebookShape& shape, Width width, const float* panels,
                               int64_t num_panels, int32_t* codes) {
  const int64_t dim = shape.parts * width, panel_size = kPanel * (1 + width);
  const int64_t together = std::max<int64_t>(1, kPanelBytes / (panel_size * sizeof(float)));
  Highest<kWide> highest[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t rows = std::min(kBlock, n - begin);
    for (int64_t part = 0; part < shape.parts; ++part) {
      const float* of_part = panels + part * num_panels * panel_size;
      // Where all scores are NaN, the number stays 0.
      for (Highest<kWide>& each : highest) each = {decltype(each.score){} - kInfinity, decltype(each.number){}};
      for (int64_t p = 0; p < num_panels; p += together) {
        for (int64_t row = 0; row < rows; row += kRows) {
          const float* of_rows[kRows];
          for (int64_t i = 0; i < kRows; ++i) {
            of_rows[i] = x + (begin + std::min(row + i, rows - 1)) * dim + part * width;
          }
          ScorePanels<kWide>(of_rows, of_part + p * panel_size, std::min(together, num_panels - p), width,
                             static_cast<int32_t>(p * kPanel), highest + row);
        }
      }
      for (int64_t row = 0; row < rows; ++row) codes[(begin + row) * shape.parts + part] = HighestNumber(highest[row]);
    }
  }
}

// Type of `width` in the inner loops, so that the compiler knows the most common ones.
template <int64_t kWidth>
using Fixed = std::integral_constant<int64_t, kWidth>;

template <int64_t kWide>
DPSR_INLINE void FindNearestBy(const float* x, int64_t n, const CodebookShape& shape, const float* panels,
                               int64_t num_panels, int32_t* codes) {
  if (shape.width == 4) {
    FindNearestOf<kWide>(x, n, shape, Fixed<4>(), panels, num_panels, codes);
  } else if (shape.width == 8) {
    FindNearestOf<kWide>(x, n, shape, Fixed<8>(), panels, num_panels, codes);
  } else {
    FindNearestOf<kWide>(x, n, shape, shape.width, panels, num_panels, codes);
  }
}

using FindFunction = void(const float* x, int64_t n, const CodebookShape& shape, const float* panels,
                          int64_t num_panels, int32_t* codes);

void FindNearestOnAny(const float* x, int64_t n, const CodebookShape& shape, const float* panels, int64_t num_panels,
                      int32_t* codes) {
  FindNearestBy<4>(x, n, shape, panels, num_panels, codes);
}

#ifdef DPSR_TARGET
DPSR_TARGET("avx512f") void FindNearestOnAvx512(const float* x, int64_t n, const CodebookShape& shape,
                                                const float* panels, int64_t num_panels, int32_t* codes) {
  FindNearestBy<16>(x, n, shape, panels, num_panels, codes);
}
DPSR_TARGET("avx2,fma") void FindNearestOnAvx2(const float* x, int64_t n, const CodebookShape& shape,
                                               const float* panels, int64_t num_panels, int32_t* codes) {
  FindNearestBy<8>(x, n, shape, panels, num_panels, codes);
}

FindFunction* ForThisCpu() {
  if (__builtin_cpu_supports("avx512f")) return FindNearestOnAvx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? FindNearestOnAvx2 : FindNearestOnAny;
}
#else
FindFunction* ForThisCpu() { return FindNearestOnAny; }
#endif

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

// Finds nearest centroids in two passes. The first one rounds vectors and centroids to bytes, of which a CPU multiplies
// four times as many in the same time. By the inequality of Cauchy and Schwarz, a score differs from the exact one by at
// most |x - x'| |c| + |x'| |c - c'|, where x' and c' are what the bytes stand for. So the nearest centroid is among those
// whose scores come within twice that bound of the highest. The second pass compares these few exactly.
class ByteCodebooks {
 public:
  // Returns null if the CPU has no instruction for it, or floats are as good: few or narrow centroids, or values that
  // are not finite.
  static std::unique_ptr<const ByteCodebooks> Make(const float* codebooks, const CodebookShape& shape);

  void NearestCodes(const float* x, int64_t n, int32_t* codes) const;

 private:
  // Numbers of a vector that are multiplied in one lane, and centroids that are scored together.
  static constexpr int64_t kWord = 4, kRegisters = 4, kGroup = kRegisters * kLanes;
  // Below it, the second pass takes longer than bytes save.
  static constexpr int64_t kLeastWidth = 64, kLeastSize = 128;
  // Scores that are kept between the passes.
  static constexpr int64_t kScores = 1 << 17;

  struct Part {
    std::unique_ptr<uint8_t[]> bytes;  // [groups, words, kGroup, kWord], 128 more than the rounded values
    std::vector<float> scales, biases;  // of each centroid: what a byte stands for, and minus half the squared length
    float longest = 0, farthest = 0;    // the largest |c| and |c - c'|
  };
  // A vector x that is rounded to the vector x' of bytes times `scale`. The scale is NaN if x is not finite.
  struct Row {
    const int8_t* bytes;  // [words, kWord]
    int32_t sum;          // of the bytes
    float scale, length, error;  // the latter two are |x'| and |x - x'|
  };

  ByteCodebooks(const float* codebooks, const CodebookShape& shape)
      : codebooks_(codebooks),
        shape_(shape),
        words_(shape.width / kWord),
        groups_((shape.size + kGroup - 1) / kGroup),
        parts_(shape.parts) {}

  bool Pack();
  static Row Rounded(const float* x, int64_t width, int8_t* bytes);
  void ScoreRows(const Row* rows, const Part& part, float* scores, float* highest) const;
  int32_t Nearest(const float* x, int64_t part, const float* scores, float threshold) const;

  const float* const codebooks_;
  const CodebookShape shape_;
  const int64_t words_, groups_;  // of a part
  std::vector<Part> parts_;
};

#ifdef DPSR_TARGET

std::unique_ptr<const ByteCodebooks> ByteCodebooks::Make(const float* codebooks, const CodebookShape& shape) {
  const bool fits = shape.width >= kLeastWidth && shape.width % kLanes == 0 && shape.size >= kLeastSize;
  if (!fits || !__builtin_cpu_supports("avx512vnni")) return nullptr;
  std::unique_ptr<ByteCodebooks> made(new ByteCodebooks(codebooks, shape));
  return made->Pack() ? std::move(made) : nullptr;
}

DPSR_FOR_BYTES bool ByteCodebooks::Pack() {
  std::vector<int8_t> rounded(shape_.width);
  for (int64_t p = 0; p < shape_.parts; ++p) {
    Part& part = parts_[p];
    part.bytes.reset(new uint8_t[groups_ * words_ * kGroup * kWord]());
    part.scales.assign(groups_ * kGroup, 0);
    part.biases.assign(groups_ * kGroup, -kInfinity);  // what does not exist is never nearest
    for (int64_t i = 0; i < shape_.size; ++i) {
      const float* centroid = codebooks_ + (p * shape_.size + i) * shape_.width;
      const Row row = Rounded(centroid, shape_.width, rounded.data());
      if (!std::isfinite(row.scale)) return false;
      const float squared = Dot(centroid, centroid, shape_.width);
      part.scales[i] = row.scale;
      part.biases[i] = -squared / 2;
      part.longest = std::max(part.longest, std::sqrt(squared));
      part.farthest = std::max(part.farthest, row.error);
      uint8_t* to = part.bytes.get() + (i / kGroup * words_ * kGroup + i % kGroup) * kWord;
      for (int64_t word = 0; word < words_; ++word, to += kGroup * kWord) {
        for (int64_t k = 0; k < kWord; ++k) to[k] = static_cast<uint8_t>(rounded[word * kWord + k] + 128);
      }
    }
  }
  return true;
}

DPSR_FOR_BYTES ByteCodebooks::Row ByteCodebooks::Rounded(const float* x, int64_t width, int8_t* bytes) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  Floats largest{}, values;
  for (int64_t k = 0; k < width; k += kLanes) {
    Load(x + k, &values);
    values = values < 0 ? -values : values;
    largest = values > largest ? values : largest;
  }
  float most = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
  if (!std::isfinite(Dot(x, x, width))) {
    std::memset(bytes, 0, width);
    return {bytes, 0, std::numeric_limits<float>::quiet_NaN(), 0, 0};
  }
  // Added and taken off again, it rounds to the nearest integer.
  constexpr float kRounding = 3 << 22;
  const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
  Floats errors{};
  Ints sums{}, squares{};
  for (int64_t k = 0; k < width; k += kLanes) {
    Load(x + k, &values);
    const Floats rounded = (values * inverse + kRounding) - kRounding, error = values - rounded * scale;
    const Ints integers = __builtin_convertvector(rounded, Ints);
    const Bytes narrow = __builtin_convertvector(integers, Bytes);
    std::memcpy(bytes + k, &narrow, sizeof(narrow));
    errors += error * error;
    sums += integers;
    squares += integers * integers;
  }
  float error = 0;
  int32_t sum = 0, square = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    error += errors[lane];
    sum += sums[lane];
    square += squares[lane];
  }
  return {bytes, sum, scale, scale * std::sqrt(static_cast<float>(square)), std::sqrt(error)};
}

// Scores kRows rows with all centroids: [kRows, groups * kGroup].
DPSR_FOR_BYTES void ByteCodebooks::ScoreRows(const Row* rows, const Part& part, float* scores, float* highest) const {
  const int64_t stride = groups_ * kGroup;
  Floats most[kRows];
  for (Floats& each : most) each = Floats{} - kInfinity;
  const uint8_t* bytes = part.bytes.get();
  for (int64_t group = 0; group < groups_; ++group) {
    __m512i sums[kRows][kRegisters];
    for (int64_t row = 0; row < kRows; ++row) {
      for (__m512i& sum : sums[row]) sum = _mm512_set1_epi32(-128 * rows[row].sum);
    }
    for (int64_t word = 0; word < words_; ++word, bytes += kGroup * kWord) {
      __m512i centroids[kRegisters];
      for (int64_t i = 0; i < kRegisters; ++i) centroids[i] = _mm512_loadu_si512(bytes + i * sizeof(__m512i));
      for (int64_t row = 0; row < kRows; ++row) {
        int32_t four;
        std::memcpy(&four, rows[row].bytes + word * kWord, sizeof(four));
        const __m512i x = _mm512_set1_epi32(four);
        for (int64_t i = 0; i < kRegisters; ++i) sums[row][i] = _mm512_dpbusd_epi32(sums[row][i], centroids[i], x);
      }
    }
    for (int64_t i = 0; i < kRegisters; ++i) {
      const int64_t first = group * kGroup + i * kLanes;
      Floats scales, biases;
      Load(part.scales.data() + first, &scales);
      Load(part.biases.data() + first, &biases);
      for (int64_t row = 0; row < kRows; ++row) {
        Ints products;
        std::memcpy(&products, &sums[row][i], sizeof(products));
        const Floats found = __builtin_convertvector(products, Floats) * rows[row].scale * scales + biases;
        std::memcpy(scores + row * stride + first, &found, sizeof(found));
        most[row] = found > most[row] ? found : most[row];
      }
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    highest[row] = most[row][0];
    for (int64_t lane = 1; lane < kLanes; ++lane) highest[row] = std::max(highest[row], most[row][lane]);
  }
}

// Returns the nearest of the centroids whose scores are not below `threshold`, all of them if it is NaN.
DPSR_FOR_BYTES int32_t ByteCodebooks::Nearest(const float* x, int64_t part, const float* scores,
                                              float threshold) const {
  const __m512 least = _mm512_set1_ps(threshold);
  const float* centroids = codebooks_ + part * shape_.size * shape_.width;
  float best = -kInfinity;
  int32_t nearest = 0;
  for (int64_t first = 0; first < shape_.size; first += kLanes) {
    uint32_t there = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + first), least, _CMP_NLT_UQ);
    for (; there != 0; there &= there - 1) {
      const int64_t i = first + __builtin_ctz(there);
      if (i >= shape_.size) break;
      const float score = Dot(x, centroids + i * shape_.width, shape_.width) + parts_[part].biases[i];
      if (score > best) {
        best = score;
        nearest = static_cast<int32_t>(i);
      }
    }
  }
  return nearest;
}

void ByteCodebooks::NearestCodes(const float* x, int64_t n, int32_t* codes) const {
  const int64_t stride = groups_ * kGroup;
  const int64_t block = std::clamp(kScores / stride / kRows * kRows, kRows, kBlock);
  std::vector<int8_t> bytes(block * shape_.width);
  std::vector<float> scores(block * stride), highest(block);
  std::vector<Row> rows(block);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t count = std::min(block, n - begin);
    for (int64_t p = 0; p < shape_.parts; ++p) {
      const Part& part = parts_[p];
      const float* of_part = x + begin * shape_.dim() + p * shape_.width;
      for (int64_t row = 0; row < count; ++row) {
        rows[row] = Rounded(of_part + row * shape_.dim(), shape_.width, bytes.data() + row * shape_.width);
      }
      for (int64_t row = count; row % kRows != 0; ++row) rows[row] = rows[count - 1];
      for (int64_t row = 0; row < count; row += kRows) {
        ScoreRows(&rows[row], part, scores.data() + row * stride, &highest[row]);
      }
      for (int64_t row = 0; row < count; ++row) {
        const float bound = rows[row].error * part.longest + rows[row].length * part.farthest;
        // What the rounding of sums and products of floats adds.
        const float slack = 1e-5f * (part.longest * part.longest + rows[row].length * part.longest);
        const float threshold = highest[row] - 2 * bound - slack;
        codes[(begin + row) * shape_.parts + p] =
            Nearest(of_part + row * shape_.dim(), p, scores.data() + row * stride, threshold);
      }
    }
  }
}

#else

std::unique_ptr<const ByteCodebooks> ByteCodebooks::Make(const float*, const CodebookShape&) { return nullptr; }
void ByteCodebooks::NearestCodes(const float*, int64_t, int32_t*) const {}

#endif

PackedCodebooks::~PackedCodebooks() = default;

PackedCodebooks::PackedCodebooks(const float* codebooks, const CodebookShape& shape, bool may_use_bytes)
    : shape_(shape), panels_((shape.size + kPanel - 1) / kPanel) {
  if (may_use_bytes) bytes_ = ByteCodebooks::Make(codebooks, shape);
  if (bytes_ != nullptr) return;
  values_.reset(new float[shape.parts * panels_ * kPanel * (1 + shape.width)]);
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
  if (bytes_ != nullptr) return bytes_->NearestCodes(x, n, codes);
  static FindFunction* const find_nearest = ForThisCpu();
  find_nearest(x, n, shape_, values_.get(), panels_, codes);
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
