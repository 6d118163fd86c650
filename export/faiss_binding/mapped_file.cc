#include "export/faiss_binding/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace dpsr {

Status MappedFile::Open(const std::string& path, std::unique_ptr<MappedFile>* file) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    const int error = errno;
    return MakeStatus(error == ENOENT ? StatusCode::kNotFound : StatusCode::kDataLoss, "cannot open the FAISS index ",
                      path, ": ", std::strerror(error));
  }
  struct stat information = {};
  Status status;
  if (fstat(descriptor, &information) != 0 || !S_ISREG(information.st_mode) || information.st_size == 0) {
    status = MakeStatus(StatusCode::kDataLoss, "cannot read the FAISS index ", path, ": it is ",
                        S_ISREG(information.st_mode) ? "empty" : "not a regular file");
  } else {
    const auto size = static_cast<size_t>(information.st_size);
    void* const data = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) {
      status = MakeStatus(StatusCode::kResourceExhausted, "cannot map the FAISS index ", path, " (", size,
                          " bytes): ", std::strerror(errno));
    } else {
      file->reset(new MappedFile(data, size));
    }
  }
  close(descriptor);
  return status;
}

MappedFile::~MappedFile() { munmap(data_, size_); }

}  // namespace dpsr
