#include "export/request_tables/file_fingerprint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

// Compiles the hash into this file, so that no library is needed at run time.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace dpsr {
namespace {

constexpr int64_t kBlock = int64_t{64} << 10;
constexpr int64_t kBlocks = 1024;

struct File {
  ~File() {
    if (descriptor >= 0) close(descriptor);
  }
  int descriptor;
};

Status Failed(const std::string& path) {
  return MakeStatus(errno == ENOENT ? StatusCode::kNotFound : StatusCode::kInternal, path, ": cannot be read: ",
                    std::strerror(errno));
}

}  // namespace

Status FileFingerprint(const std::string& path, std::string* fingerprint) {
  const File file{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat status;
  if (file.descriptor < 0 || fstat(file.descriptor, &status) != 0) return Failed(path);
  const int64_t size = status.st_size;
  XXH3_state_t hash;
  XXH3_64bits_reset(&hash);
  XXH3_64bits_update(&hash, &size, sizeof(size));
  const int64_t blocks = std::min(kBlocks, (size + kBlock - 1) / kBlock);
  std::vector<char> block(static_cast<size_t>(std::min(kBlock, size)));
  for (int64_t i = 0; i < blocks; ++i) {
    // A small file is read block after block. The blocks of a large file begin between 0 and size - kBlock.
    const bool whole = size <= kBlocks * kBlock;
    const int64_t begin = whole ? i * kBlock : i * ((size - kBlock) / (kBlocks - 1)) +
                                                   (i == kBlocks - 1 ? (size - kBlock) % (kBlocks - 1) : 0);
    const int64_t end = std::min(begin + kBlock, size);
    for (int64_t at = begin; at < end;) {
      const ssize_t got = pread(file.descriptor, block.data(), static_cast<size_t>(end - at), at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return Failed(path);
      if (got == 0) return MakeStatus(StatusCode::kInternal, path, ": the file became shorter while it was read");
      XXH3_64bits_update(&hash, block.data(), static_cast<size_t>(got));
      at += got;
    }
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(XXH3_64bits_digest(&hash)));
  *fingerprint = text;
  return Status();
}

}  // namespace dpsr
