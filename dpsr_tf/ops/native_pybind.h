// The parts of the Python module dpsr_tf.ops._native, one for each file that adapts a core.
#ifndef DPSR_TF_OPS_NATIVE_PYBIND_H_
#define DPSR_TF_OPS_NATIVE_PYBIND_H_

#include <pybind11/pybind11.h>

namespace dpsr {

void DefineProductQuantizer(pybind11::module_& m);
void DefineQueryNoise(pybind11::module_& m);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_NATIVE_PYBIND_H_
