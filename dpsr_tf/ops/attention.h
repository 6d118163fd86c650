// Attention over the neighbours of rows, and its gradient, each in one pass: dpsr_tf/models/graph_encoder.py.
//
// Matrices are float32, row by row. Row i has the neighbours near[row_splits[i]] to near[row_splits[i + 1] - 1], which are
// rows of `messages`. The order of summation depends on the lists only.
#ifndef DPSR_TF_OPS_ATTENTION_H_
#define DPSR_TF_OPS_ATTENTION_H_

#include <cstdint>

namespace dpsr {

// Lists of neighbours of n rows.
struct NearRows {
  const int32_t* near;
  const int64_t* row_splits;  // [n + 1]
  int64_t n;
};

// y[i] = the sum over neighbours u of weight * messages[u], where the weights are the softmax over the neighbours of
// scale * <wanted[i], messages[u]>. Zero for a row without neighbours. wanted, y [n, dim], messages [m, dim], `weights`
// [neighbours of all rows].
void Attend(const float* wanted, const float* messages, const NearRows& rows, int64_t dim, float scale, float* y,
            float* weights);

// Writes the gradients of Attend. `weights` is what Attend wrote. of_wanted [n, dim], of_messages [m, dim].
void AttendGradient(const float* upstream, const float* wanted, const float* messages, const NearRows& rows,
                    const float* weights, int64_t m, int64_t dim, float scale, float* of_wanted, float* of_messages);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_ATTENTION_H_
