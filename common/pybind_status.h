// Raises the core's errors as Python exceptions, for the pybind11 modules.
#ifndef DPSR_COMMON_PYBIND_STATUS_H_
#define DPSR_COMMON_PYBIND_STATUS_H_

#include <pybind11/pybind11.h>

#include <string_view>

#include "common/status.h"

namespace dpsr {

// The class dpsr_common.packed_file.FormatError. The module dpsr_common._native creates it; every other module sets
// this to the class that it imports from there.
inline pybind11::object& FormatErrorType() {
  // Never destroyed, because the interpreter may have ended before.
  static auto* const type = new pybind11::object();
  return *type;
}

// Returns bytes as a str. They need not be UTF-8, for example in a path; what is not becomes U+FFFD.
inline pybind11::str ToStr(std::string_view text) {
  PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<pybind11::ssize_t>(text.size()), "replace");
  if (str == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(str);
}

// Returns the exception class of a code.
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

// Raises the exception of a status that is not OK.
inline void RaiseIfError(const Status& status) {
  if (status.ok()) return;
  PyErr_SetObject(ExceptionType(status.code()), ToStr(status.message()).ptr());
  throw pybind11::error_already_set();
}

// Runs `function`, which returns a Status, without the GIL. Raises its error.
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
