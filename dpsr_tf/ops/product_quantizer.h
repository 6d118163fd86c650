// Codes of a product quantizer: the nearest centroid of each part of a vector, the centroids that codes name, and their
// gradient. A coarse quantizer is one with a single part.
//
// x is [n, parts * width], codebooks are [parts, size, width] float32, codes [n, parts] int32, all row by row. Results
// do not depend on how rows and units are divided among threads.
#ifndef DPSR_TF_OPS_PRODUCT_QUANTIZER_H_
#define DPSR_TF_OPS_PRODUCT_QUANTIZER_H_

#include <cstdint>
#include <memory>

namespace dpsr {

struct CodebookShape {
  int64_t parts, size, width;

  int64_t dim() const { return parts * width; }
};

class ByteCodebooks;

// Codebooks in the order in which NearestCodes reads them. Threads may share them.
class PackedCodebooks {
 public:
  // `codebooks` must outlive it. Where the CPU multiplies bytes, wide parts are compared as bytes first; `may_use_bytes`
  // is false only in tests.
  PackedCodebooks(const float* codebooks, const CodebookShape& shape, bool may_use_bytes = true);
  ~PackedCodebooks();

  // Writes for each of the `n` rows of x the numbers of the centroids that are nearest to its parts by Euclidean
  // distance; of equally near ones the lowest number. Numbers are 0 to size - 1, also where NaN leaves none nearest.
  // Bytes only tell which centroids may be the nearest, so they change a result at most as rounding does.
  void NearestCodes(const float* x, int64_t n, int32_t* codes) const;

 private:
  const CodebookShape shape_;
  const int64_t panels_;  // of a part
  std::unique_ptr<float[]> values_;             // if there are no bytes
  std::unique_ptr<const ByteCodebooks> bytes_;  // null where floats are as good
};

// out[i] = the centroids codes[i], one after the other: [n, parts * width]. Codes must be below `size`.
void LookUpCodes(const int32_t* codes, int64_t n, const float* codebooks, const CodebookShape& shape, float* out);

// The gradient of LookUpCodes with respect to the codebooks: of_codebooks[m, k] = the sum of the parts m of `upstream`,
// [n, parts * width], over the rows i with codes[i, m] = k, in the order of the rows. The work is divided into units
// that write different numbers; a call does units `begin` to `end` - 1.
int64_t GradientUnits(const CodebookShape& shape);
void LookUpCodesGradient(const int32_t* codes, int64_t n, const float* upstream, const CodebookShape& shape,
                         int64_t begin, int64_t end, float* of_codebooks);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_PRODUCT_QUANTIZER_H_
