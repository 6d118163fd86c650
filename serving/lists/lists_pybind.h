// The functions over lists of results in the Python module dpsr_serving._native.
#ifndef DPSR_SERVING_LISTS_LISTS_PYBIND_H_
#define DPSR_SERVING_LISTS_LISTS_PYBIND_H_

#include <pybind11/pybind11.h>

namespace dpsr::serving {

// Adds them to the module.
void AddLists(pybind11::module_& module);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_LISTS_LISTS_PYBIND_H_
