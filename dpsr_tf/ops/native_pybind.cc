// The Python module dpsr_tf.ops._native. _native.pyi has its types.
#include "dpsr_tf/ops/native_pybind.h"

namespace dpsr {

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ of training for NumPy arrays: codes of a product quantizer, and noise of training queries.";
  pybind11::options options;
  options.disable_function_signatures();
  DefineProductQuantizer(m);
  DefineQueryNoise(m);
}

}  // namespace dpsr
