// How the Python modules of the project raise the core's errors.
#ifndef DPSR_COMMON_PYBIND_STATUS_H_
#define DPSR_COMMON_PYBIND_STATUS_H_

#include <pybind11/pybind11.h>

#include <string_view>

#include "common/status.h"

namespace dpsr {

// dpsr_common.packed_file.FormatError. Module dpsr_common._native creates it; other modules import it from there.
inline pybind11::object& FormatErrorType() {
  static auto* const type = new pybind11::object();  // never destroyed: the interpreter may be gone by then
  return *type;
}

// A str of bytes that need not be UTF-8, such as those of a path.
inline pybind11::str ToStr(std::string_view text) {
  PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<pybind11::ssize_t>(text.size()), "replace");
  if (str == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(str);
}

inline PyObject* ExceptionType(StatusCode code) {
  switch (code) {
    case StatusCode::kInvalidArgument:
      return PyExc_ValueError;
    case StatusCode::kNotFound:
      return PyExc_FileNotFoundError;
    case StatusCode::kDataLoss:
    case StatusCode::kFailedPrecondition:
      return FormatErrorType().ptr();
    case StatusCode::kOk:
    case StatusCode::kResourceExhausted:
    case StatusCode::kInternal:
      break;
  }
  return PyExc_OSError;
}

inline void RaiseIfError(const Status& status) {
  if (status.ok()) return;
  PyErr_SetObject(ExceptionType(status.code()), ToStr(status.message()).ptr());
  throw pybind11::error_already_set();
}

// Runs `function` without the GIL; raises when it fails.
template <typename Function>
void RunReleased(Function function) {
  Status status;
  {
    const pybind11::gil_scoped_release release;
    status = function();
  }
  RaiseIfError(status);
}

}  // namespace dpsr

#endif  // DPSR_COMMON_PYBIND_STATUS_H_
