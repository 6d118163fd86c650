// Adapts product_quantizer.h to arrays.
#include "dpsr_tf/ops/product_quantizer.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "common/status.h"
#include "dpsr_tf/ops/native_pybind.h"

namespace py = pybind11;

namespace dpsr {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

// Finds the nearest centroids of one set of codebooks.
class NearestCodes {
 public:
  explicit NearestCodes(Floats codebooks)
      : codebooks_(std::move(codebooks)), shape_(ShapeOf(codebooks_)), packed_(codebooks_.data(), shape_) {}

  py::array_t<int32_t> operator()(const Floats& x) const {
    if (x.ndim() != 2 || x.shape(1) != shape_.dim()) {
      throw py::value_error(StrCat("x has ", x.ndim(), " dimensions and ", x.size(), " numbers, expected [n, ",
                                   shape_.dim(), "]"));
    }
    py::array_t<int32_t> codes({x.shape(0), static_cast<py::ssize_t>(shape_.parts)});
    const float* from = x.data();
    int32_t* to = codes.mutable_data();
    const int64_t n = x.shape(0);
    const py::gil_scoped_release release;
    packed_.NearestCodes(from, n, to);
    return codes;
  }

 private:
  static CodebookShape ShapeOf(const Floats& codebooks) {
    if (codebooks.ndim() != 3 || codebooks.size() == 0) {
      throw py::value_error(StrCat("codebooks have ", codebooks.ndim(), " dimensions and ", codebooks.size(),
                                   " numbers, expected [parts, size, width], none of them 0"));
    }
    return {codebooks.shape(0), codebooks.shape(1), codebooks.shape(2)};
  }

  const Floats codebooks_;
  const CodebookShape shape_;
  const PackedCodebooks packed_;
};

}  // namespace

void DefineProductQuantizer(py::module_& m) {
  py::class_<NearestCodes>(m, "NearestCodes", R"(Finds nearest centroids. Immutable, thread-safe.

codebooks: float32 [parts, size, width], which must not change. Raises ValueError for another number of dimensions, or
none of a kind.)")
      .def(py::init<Floats>(), py::arg("codebooks"))
      .def("__call__", &NearestCodes::operator(), py::arg("x"),
           R"(Returns the numbers of the centroids nearest to the parts of x by Euclidean distance, int32 [n, parts].

Of equally near ones, the lowest number. It holds no lock of Python while it computes.

x: float32 [n, parts * width]. Raises ValueError for another shape.)");
}

}  // namespace dpsr
