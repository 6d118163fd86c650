#include "serving/lists/lists_pybind.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <vector>

#include "serving/lists/diversity.h"

namespace py = pybind11;

namespace dpsr::serving {
namespace {

using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Reads values that are numbered through all attributes: value % attributes is the number of the attribute.
std::vector<ResultValue> ToValues(const Ints& places, const Ints& values, size_t results, size_t attributes) {
  if (places.ndim() != 1 || values.ndim() != 1 || places.size() != values.size()) {
    throw py::value_error("places and values: expected arrays of one dimension and the same length");
  }
  if (attributes == 0) throw py::value_error("attributes: got 0, expected at least 1");
  std::vector<ResultValue> found(static_cast<size_t>(places.size()));
  for (size_t i = 0; i < found.size(); ++i) {
    const int64_t place = places.data()[i], value = values.data()[i];
    if (place < 0 || static_cast<size_t>(place) >= results || value < 0) {
      throw py::value_error("places and values: expected places of results, and values of at least 0");
    }
    found[i] = {static_cast<size_t>(place), static_cast<size_t>(value) % attributes, value};
  }
  return found;
}

Ints ToArray(const std::vector<size_t>& order) {
  Ints array(static_cast<py::ssize_t>(order.size()));
  int64_t* to = array.mutable_data();
  for (const size_t place : order) *to++ = static_cast<int64_t>(place);
  return array;
}

Ints Mmr(const Doubles& gains, const Ints& places, const Ints& values, size_t attributes, size_t window, double cost) {
  if (gains.ndim() != 1) throw py::value_error("gains: expected an array of one dimension");
  const auto results = static_cast<size_t>(gains.size());
  const std::vector<double> copied(gains.data(), gains.data() + results);
  const std::vector<ResultValue> read = ToValues(places, values, results, attributes);
  return ToArray(MaximalMarginalRelevance(copied, read, attributes, window, cost));
}

Ints Window(size_t results, const Ints& places, const Ints& values, size_t window, size_t most) {
  if (window == 0) throw py::value_error("window: got 0, expected at least 1");
  return ToArray(SlidingWindow(results, ToValues(places, values, results, 1), window, most));
}

}  // namespace

void AddLists(py::module_& module) {
  module.def("maximal_marginal_relevance", &Mmr, py::arg("gains"), py::arg("places"), py::arg("values"),
             py::arg("attributes"), py::arg("window"), py::arg("cost"));
  module.def("sliding_window", &Window, py::arg("results"), py::arg("places"), py::arg("values"), py::arg("window"),
             py::arg("most"));
}

}  // namespace dpsr::serving
