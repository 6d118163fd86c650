// The Python module dpsr_common._native, which adapts the C++ core. _native.pyi has its types.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "common/packed_file.h"
#include "common/pybind_status.h"
#include "common/status.h"

namespace py = pybind11;

namespace dpsr {
namespace {

struct NumpyType {
  DataType dtype;
  char kind;  // as numpy.dtype.kind
  py::ssize_t itemsize;
};

constexpr NumpyType kNumpyTypes[] = {
    {DataType::kUint8, 'u', 1},   {DataType::kInt8, 'i', 1},   {DataType::kInt32, 'i', 4}, {DataType::kInt64, 'i', 8},
    {DataType::kFloat32, 'f', 4}, {DataType::kUint32, 'u', 4}, {DataType::kUint64, 'u', 8},
    {DataType::kUint16, 'u', 2},  {DataType::kFloat64, 'f', 8}};

uint64_t ChecksumOf(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw py::value_error("the buffer is not contiguous");
  const py::gil_scoped_release released;
  return Checksum(info.ptr, static_cast<size_t>(info.size * info.itemsize));
}

// A PackedFileWriter that threads may share. Remembers the section that it is appending to.
class SharedWriter {
 public:
  SharedWriter(const std::filesystem::path& path, const std::string& kind)
      : path_(path), writer_(std::make_unique<PackedFileWriter>(path_, kind)) {
    RaiseIfError(writer_->Open());
  }

  void Add(const std::string& name, const py::array& values) {
    Write(name, values, [&](DataType dtype, const void* data, size_t bytes) -> Status {
      DPSR_RETURN_IF_ERROR(writer_->Add(name, dtype, data, bytes));
      streaming_.clear();
      return Status();
    });
  }

  void Append(const std::string& name, const py::array& values) {
    Write(name, values, [&](DataType dtype, const void* data, size_t bytes) -> Status {
      if (streaming_ != name) {
        DPSR_RETURN_IF_ERROR(writer_->Begin(name, dtype));
        streaming_ = name;
        streaming_dtype_ = dtype;
      } else if (dtype != streaming_dtype_) {
        return MakeStatus(StatusCode::kInvalidArgument, path_, ": section \"", name, "\" was begun as ",
                          DataTypeName(streaming_dtype_), ", got ", DataTypeName(dtype));
      }
      return writer_->Append(data, bytes);
    });
  }

  // Finishes the file if `commit`, else removes it. Does nothing if the file is closed already.
  void Close(bool commit) {
    RunReleased([&]() -> Status {
      const std::lock_guard<std::mutex> lock(mutex_);
      const std::unique_ptr<PackedFileWriter> writer = std::move(writer_);
      return writer == nullptr || !commit ? Status() : writer->Finish();
    });
  }

 private:
  // Calls write(dtype, data, bytes) for the memory of `values`, while no other thread writes.
  template <typename Function>
  void Write(const std::string& name, const py::array& values, const Function& write) {
    DataType dtype;
    const py::array array = ToContiguous(name, values, &dtype);
    const void* data = array.data();
    const auto bytes = static_cast<size_t>(array.nbytes());
    RunReleased([&]() -> Status {
      const std::lock_guard<std::mutex> lock(mutex_);
      DPSR_RETURN_IF_ERROR(CheckOpen());
      return write(dtype, data, bytes);
    });
  }

  Status CheckOpen() const {
    if (writer_ != nullptr) return Status();
    return MakeStatus(StatusCode::kInvalidArgument, path_, ": the file is closed");
  }

  // Returns `values` as contiguous memory, with its type in `dtype`.
  py::array ToContiguous(const std::string& name, const py::array& values, DataType* dtype) const {
    if (values.ndim() != 1) {
      throw py::value_error(StrCat(path_, ": section \"", name, "\" has ", values.ndim(),
                                   " dimensions, expected 1; use array.reshape(-1)"));
    }
    for (const NumpyType& type : kNumpyTypes) {
      if (values.dtype().kind() != type.kind || values.itemsize() != type.itemsize) continue;
      if (values.dtype().byteorder() == '>') break;
      *dtype = type.dtype;
      return py::array::ensure(values, py::array::c_style);
    }
    throw py::value_error(StrCat(path_, ": section \"", name, "\" has dtype ",
                                 std::string(py::str(values.dtype())),
                                 ", expected uint8, int8, uint16, int32, uint32, int64, uint64, float32 or float64 "
                                 "(little endian)"));
  }

  const std::string path_;
  std::mutex mutex_;
  std::unique_ptr<PackedFileWriter> writer_;  // null after Close()
  std::string streaming_;                     // name of the section that Append() continues
  DataType streaming_dtype_ = DataType::kUint8;
};

std::unique_ptr<PackedFile> OpenPackedFile(const std::filesystem::path& path, const std::string& kind, bool verify) {
  std::unique_ptr<PackedFile> file;
  RunReleased([&] { return PackedFile::Open(path, kind, verify, &file); });
  return file;
}

// Returns a read-only array over the memory of a section, or None if the file lacks the section. The array keeps the
// file's Python object alive.
py::object GetSection(const py::object& self, const std::string& name) {
  const PackedFile::Section* section = self.cast<const PackedFile&>().Find(name);
  if (section == nullptr) return py::none();
  for (const NumpyType& type : kNumpyTypes) {
    if (type.dtype != section->dtype) continue;
    py::array array(py::dtype(StrCat('<', type.kind, type.itemsize)), {static_cast<py::ssize_t>(section->count)},
                    {type.itemsize}, section->data, self);
    array.attr("setflags")(py::arg("write") = false);
    return array;
  }
  throw py::value_error(StrCat("section \"", name, "\" has a dtype without a NumPy counterpart"));
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ core of dpsr_common.packed_file. Import that, not this.";
  py::options options;
  options.disable_function_signatures();

  PyObject* const format_error = PyErr_NewExceptionWithDoc(
      "dpsr_common.packed_file.FormatError",
      "A file is corrupt, truncated, of another version or of another kind. The message names the file.",
      PyExc_ValueError, nullptr);
  if (format_error == nullptr) throw py::error_already_set();
  FormatErrorType() = py::reinterpret_steal<py::object>(format_error);
  m.attr("FormatError") = FormatErrorType();

  py::class_<SharedWriter>(m, "PackedFileWriter", R"(Writes a packed file: named one-dimensional arrays.

    with PackedFileWriter("items.dpsr", "items") as file:
        file.add("id", ids)

The file gets its name when the block ends without an exception. After an exception the new file is removed, and a file
that was there before stays.

Dtypes are uint8, int8, uint16, int32, uint32, int64, uint64, float32 and float64.)")
      .def(py::init<const std::filesystem::path&, const std::string&>(), py::arg("path"), py::arg("kind"))
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](SharedWriter& writer, const py::object& type, const py::object&,
                          const py::object&) { writer.Close(type.is_none()); })
      .def("add", &SharedWriter::Add, py::arg("name"), py::arg("values"),
           "Adds a section with values [n] of one of the dtypes above. Raises ValueError and OSError.")
      .def("append", &SharedWriter::Append, py::arg("name"), py::arg("values"),
           "Begins a section or, if it is the last section begun by append(), continues it.");

  py::class_<PackedFile>(m, "PackedFile")
      .def(py::init(&OpenPackedFile), py::arg("path"), py::arg("kind"), py::arg("verify"))
      .def_property_readonly("path", [](const PackedFile& file) { return ToStr(file.path()); })
      .def_property_readonly("kind", [](const PackedFile& file) { return ToStr(file.kind()); })
      .def_property_readonly("fingerprint", &PackedFile::fingerprint)
      .def("names",
           [](const PackedFile& file) {
             py::list names;
             for (const PackedFile::Section& section : file.sections()) names.append(ToStr(section.name));
             return names;
           })
      .def("get", &GetSection, py::arg("name"))
      .def(
          "verify",
          [](const PackedFile& file, const std::string& name) {
            const PackedFile::Section* section = file.Find(name);
            if (section != nullptr) RunReleased([&] { return file.Verify(*section); });
          },
          py::arg("name"));

  m.def("checksum", &ChecksumOf, py::arg("data"),
        "Computes the checksum of a contiguous buffer as packed files store it for their sections: XXH3 with 64 bits.");
}

}  // namespace
}  // namespace dpsr
