// Internal to export/faiss_binding/. A file whose bytes are mapped read-only.
#ifndef DPSR_EXPORT_FAISS_BINDING_MAPPED_FILE_H_
#define DPSR_EXPORT_FAISS_BINDING_MAPPED_FILE_H_

#include <cstddef>
#include <memory>
#include <string>

#include "common/status.h"

namespace dpsr {

class MappedFile {
 public:
  // Maps a FAISS index file. FAISS reports everything that can be wrong with a file as one kind of exception, so what
  // can be told apart is told apart here.
  // Errors: NotFound (no such file), DataLoss (not a regular file, empty, cannot be opened), ResourceExhausted.
  static Status Open(const std::string& path, std::unique_ptr<MappedFile>* file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  MappedFile(void* data, size_t size) : data_(data), size_(size) {}

  void* const data_;
  const size_t size_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_MAPPED_FILE_H_
