// Opens packed files on any file system of TensorFlow, for op files.
#ifndef DPSR_COMMON_TF_PACKED_FILE_H_
#define DPSR_COMMON_TF_PACKED_FILE_H_

#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "common/packed_file.h"
#include "common/status.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/file_system.h"

namespace dpsr {

// Translates the error of a file operation into ours, which names the file.
inline Status FromTensorFlow(const std::string& path, const tensorflow::Status& status) {
  if (status.ok()) return Status();
  StatusCode code = StatusCode::kInternal;
  if (tensorflow::errors::IsNotFound(status)) code = StatusCode::kNotFound;
  if (tensorflow::errors::IsResourceExhausted(status)) code = StatusCode::kResourceExhausted;
  if (tensorflow::errors::IsFailedPrecondition(status)) code = StatusCode::kFailedPrecondition;
  return MakeStatus(code, path, ": cannot be read: ", status.message());
}

// Opens `path` without verifying its sections. A plain path is mapped. "scheme://..." is mapped if its file system can
// do that, and read into memory otherwise. Errors: the ones of PackedFile::Open, and ResourceExhausted (no memory for
// the file).
inline Status OpenPackedFile(const std::string& path, const char* kind, std::unique_ptr<PackedFile>* file) {
  if (path.find("://") == std::string::npos) return PackedFile::Open(path, kind, /*verify=*/false, file);
  tensorflow::Env* env = tensorflow::Env::Default();
  std::unique_ptr<tensorflow::ReadOnlyMemoryRegion> region;
  if (env->NewReadOnlyMemoryRegionFromFile(path, &region).ok()) {
    const std::shared_ptr<tensorflow::ReadOnlyMemoryRegion> owner = std::move(region);
    return PackedFile::OpenMemory(path, kind, /*verify=*/false, owner, owner->data(), owner->length(), file);
  }
  // If the file itself cannot be read, these calls fail again and say why.
  std::unique_ptr<tensorflow::RandomAccessFile> source;
  tensorflow::uint64 size = 0;
  DPSR_RETURN_IF_ERROR(FromTensorFlow(path, env->GetFileSize(path, &size)));
  DPSR_RETURN_IF_ERROR(FromTensorFlow(path, env->NewRandomAccessFile(path, &source)));
  constexpr std::align_val_t kAlignment{64};
  void* memory = ::operator new(size, kAlignment, std::nothrow);
  if (memory == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted, path, ": not enough memory for its ", size,
                      " bytes, and its file system cannot map files; copy it to a local disk");
  }
  const std::shared_ptr<const void> owner(memory, [](void* p) { ::operator delete(p, std::align_val_t{64}); });
  tensorflow::StringPiece read;
  DPSR_RETURN_IF_ERROR(FromTensorFlow(path, source->Read(0, size, &read, static_cast<char*>(memory))));
  if (read.data() != memory && !read.empty()) std::memcpy(memory, read.data(), read.size());
  return PackedFile::OpenMemory(path, kind, /*verify=*/false, owner, memory, read.size(), file);
}

}  // namespace dpsr

#endif  // DPSR_COMMON_TF_PACKED_FILE_H_
