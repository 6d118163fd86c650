#include "common/packed_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#define XXH_INLINE_ALL
#include <xxhash.h>
#if XXH_VERSION_NUMBER < 800
#error "xxhash.h is older than 0.8.0, and its XXH3 gives other checksums: install xxhash 0.8.0 or later"
#endif

namespace dpsr {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed files are little endian and mapped as they are");

constexpr char kMagic[8] = {'D', 'P', 'S', 'R', 'P', 'A', 'C', 'K'};
constexpr uint64_t kAlignment = 64;
constexpr size_t kWriteBuffer = 1 << 20;
constexpr char kZeros[kAlignment] = {};

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t section_count;
  uint64_t table_offset;
  uint64_t file_size;
  char kind[16];
  uint64_t table_checksum;
  uint64_t header_checksum;  // of the bytes before this field
};
static_assert(sizeof(Header) == 64 && offsetof(Header, header_checksum) == 56, "the header is 64 bytes on disk");

struct TableEntry {
  char name[32];
  uint32_t dtype;
  uint32_t reserved;
  uint64_t offset;
  uint64_t bytes;
  uint64_t checksum;
};
static_assert(sizeof(TableEntry) == 64, "a table entry is 64 bytes on disk");

uint64_t HeaderChecksum(const Header& header) { return XXH3_64bits(&header, offsetof(Header, header_checksum)); }

// Returns how many bytes of padding bring `offset` to the next multiple of kAlignment.
uint64_t PaddingAfter(uint64_t offset) { return (kAlignment - offset % kAlignment) % kAlignment; }

// Checks that a name has 1 to capacity - 1 bytes, without NUL.
bool IsValidName(std::string_view name, size_t capacity) {
  return !name.empty() && name.size() < capacity && name.find('\0') == std::string_view::npos;
}

// Reads a zero-padded name. Returns false if it is empty, unterminated, or has bytes after its end.
template <size_t N>
bool ReadName(const char (&field)[N], std::string* name) {
  name->assign(field, strnlen(field, N));
  return IsValidName(*name, N) && std::all_of(field + name->size(), field + N, [](char c) { return c == 0; });
}

// Returns the error of the system call that has just failed, with the file and what the call was for.
Status SystemError(const std::string& path, const char* what) {
  const int error = errno;
  StatusCode code = StatusCode::kInternal;
  if (error == ENOENT || error == ENOTDIR) code = StatusCode::kNotFound;
  if (error == ENOSPC || error == EDQUOT || error == ENOMEM || error == EMFILE || error == ENFILE) {
    code = StatusCode::kResourceExhausted;
  }
  return MakeStatus(code, path, ": cannot ", what, ": ", std::strerror(error));
}

// Closes a descriptor at the end of its scope.
class ScopedFd {
 public:
  explicit ScopedFd(int fd) : fd_(fd) {}
  ~ScopedFd() {
    if (fd_ >= 0) close(fd_);
  }
  ScopedFd(const ScopedFd&) = delete;
  ScopedFd& operator=(const ScopedFd&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

size_t DataTypeSize(DataType dtype) {
  switch (dtype) {
    case DataType::kUint8:
    case DataType::kInt8:
      return 1;
    case DataType::kUint16:
      return 2;
    case DataType::kInt32:
    case DataType::kUint32:
    case DataType::kFloat32:
      return 4;
    case DataType::kInt64:
    case DataType::kUint64:
    case DataType::kFloat64:
      return 8;
  }
  return 0;
}

std::string DataTypeName(DataType dtype) {
  switch (dtype) {
    case DataType::kUint8:
      return "uint8";
    case DataType::kInt32:
      return "int32";
    case DataType::kInt64:
      return "int64";
    case DataType::kFloat32:
      return "float32";
    case DataType::kUint32:
      return "uint32";
    case DataType::kUint64:
      return "uint64";
    case DataType::kInt8:
      return "int8";
    case DataType::kUint16:
      return "uint16";
    case DataType::kFloat64:
      return "float64";
  }
  return StrCat("unknown(", static_cast<uint32_t>(dtype), ")");
}

uint64_t Checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

struct PackedFileWriter::Impl {
  std::string path;
  std::string kind;
  std::string temporary;  // path of the temporary file; empty if there is none to remove
  int fd = -1;
  bool finished = false;
  Status error;  // the first failure; every later call returns it
  std::vector<TableEntry> table;
  bool section_open = false;
  uint64_t offset = 0;  // of the next byte
  std::vector<char> buffer;
  XXH3_state_t hash;

  Status Fail(Status status) {
    if (error.ok()) error = status;
    return status;
  }

  Status CheckWritable() const {
    if (!error.ok()) return error;
    if (finished) return MakeStatus(StatusCode::kFailedPrecondition, path, ": the file is already finished");
    if (fd < 0) return MakeStatus(StatusCode::kFailedPrecondition, path, ": the writer is not open; call Open() first");
    return Status();
  }

  Status WriteThrough(const char* data, size_t bytes) {
    while (bytes > 0) {
      const ssize_t written = write(fd, data, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return Fail(SystemError(path, "write"));
      data += written;
      bytes -= static_cast<size_t>(written);
    }
    return Status();
  }

  Status Flush() {
    Status status = WriteThrough(buffer.data(), buffer.size());
    buffer.clear();
    return status;
  }

  Status Write(const void* data, size_t bytes) {
    if (bytes == 0) return Status();
    offset += bytes;
    const char* begin = static_cast<const char*>(data);
    if (buffer.size() + bytes > kWriteBuffer) DPSR_RETURN_IF_ERROR(Flush());
    if (bytes > kWriteBuffer) return WriteThrough(begin, bytes);
    buffer.insert(buffer.end(), begin, begin + bytes);
    return Status();
  }

  Status CloseSection() {
    if (!section_open) return Status();
    section_open = false;
    table.back().bytes = offset - table.back().offset;
    table.back().checksum = XXH3_64bits_digest(&hash);
    return Write(kZeros, PaddingAfter(offset));
  }

  void RemoveTemporary() {
    if (fd >= 0) close(fd);
    fd = -1;
    if (!temporary.empty()) unlink(temporary.c_str());
    temporary.clear();
  }
};

PackedFileWriter::PackedFileWriter(std::string path, std::string kind) : impl_(new Impl) {
  impl_->path = std::move(path);
  impl_->kind = std::move(kind);
}

PackedFileWriter::~PackedFileWriter() { impl_->RemoveTemporary(); }

Status PackedFileWriter::Open() {
  Impl& impl = *impl_;
  if (!impl.error.ok()) return impl.error;
  if (impl.fd >= 0 || impl.finished) {
    return MakeStatus(StatusCode::kFailedPrecondition, impl.path, ": the writer is already open");
  }
  if (!IsValidName(impl.kind, sizeof(Header::kind))) {
    return impl.Fail(MakeStatus(StatusCode::kInvalidArgument, impl.path, ": the kind of a packed file is \"", impl.kind,
                                "\", expected 1 to ", sizeof(Header::kind) - 1, " bytes without NUL"));
  }
  // Unlike mkstemp, O_EXCL with a counted name gives the file the permissions of the umask. A name may be in use by a
  // file of another machine, or by one that a killed process left behind.
  static std::atomic<uint64_t> counter{0};
  do {
    impl.temporary = StrCat(impl.path, ".tmp.", getpid(), ".", counter++);
    impl.fd = open(impl.temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (impl.fd < 0 && errno == EEXIST);
  if (impl.fd < 0) {
    impl.temporary.clear();
    return impl.Fail(SystemError(impl.path, "create a file in its folder"));
  }
  impl.buffer.reserve(kWriteBuffer);
  // The file has no magic until Finish() writes the real header.
  return impl.Write(kZeros, sizeof(Header));
}

Status PackedFileWriter::Begin(std::string_view name, DataType dtype) {
  Impl& impl = *impl_;
  DPSR_RETURN_IF_ERROR(impl.CheckWritable());
  if (!IsValidName(name, sizeof(TableEntry::name))) {
    return MakeStatus(StatusCode::kInvalidArgument, impl.path, ": section name \"", name, "\", expected 1 to ",
                      sizeof(TableEntry::name) - 1, " bytes without NUL");
  }
  if (DataTypeSize(dtype) == 0) {
    return MakeStatus(StatusCode::kInvalidArgument, impl.path, ": section \"", name, "\" has dtype ",
                      DataTypeName(dtype), ", expected one of DataType");
  }
  for (const TableEntry& entry : impl.table) {
    if (name == entry.name) {
      return MakeStatus(StatusCode::kInvalidArgument, impl.path, ": section \"", name,
                        "\" is given twice; each name occurs once in a file");
    }
  }
  DPSR_RETURN_IF_ERROR(impl.CloseSection());
  TableEntry entry = {};
  std::copy(name.begin(), name.end(), entry.name);
  entry.dtype = static_cast<uint32_t>(dtype);
  entry.offset = impl.offset;
  impl.table.push_back(entry);
  impl.section_open = true;
  XXH3_64bits_reset(&impl.hash);
  return Status();
}

Status PackedFileWriter::Append(const void* data, size_t bytes) {
  Impl& impl = *impl_;
  DPSR_RETURN_IF_ERROR(impl.CheckWritable());
  if (!impl.section_open) {
    return MakeStatus(StatusCode::kFailedPrecondition, impl.path, ": Append() without a Begin() before it");
  }
  const TableEntry& entry = impl.table.back();
  const DataType dtype = static_cast<DataType>(entry.dtype);
  if (bytes % DataTypeSize(dtype) != 0) {
    return MakeStatus(StatusCode::kInvalidArgument, impl.path, ": section \"", entry.name, "\" is given ", bytes,
                      " bytes, expected a multiple of ", DataTypeSize(dtype), " (", DataTypeName(dtype), ")");
  }
  if (bytes == 0) return Status();
  XXH3_64bits_update(&impl.hash, data, bytes);
  return impl.Write(data, bytes);
}

Status PackedFileWriter::Add(std::string_view name, DataType dtype, const void* data, size_t bytes) {
  if (DataTypeSize(dtype) != 0 && bytes % DataTypeSize(dtype) != 0) {
    return MakeStatus(StatusCode::kInvalidArgument, impl_->path, ": section \"", name, "\" is given ", bytes,
                      " bytes, expected a multiple of ", DataTypeSize(dtype), " (", DataTypeName(dtype), ")");
  }
  DPSR_RETURN_IF_ERROR(Begin(name, dtype));
  DPSR_RETURN_IF_ERROR(Append(data, bytes));
  return impl_->CloseSection();
}

Status PackedFileWriter::Finish() {
  Impl& impl = *impl_;
  DPSR_RETURN_IF_ERROR(impl.CheckWritable());
  DPSR_RETURN_IF_ERROR(impl.CloseSection());
  const size_t table_bytes = impl.table.size() * sizeof(TableEntry);
  Header header = {};
  std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
  header.version = PackedFile::kFormatVersion;
  header.section_count = static_cast<uint32_t>(impl.table.size());
  header.table_offset = impl.offset;
  header.file_size = impl.offset + table_bytes;
  std::copy(impl.kind.begin(), impl.kind.end(), header.kind);
  header.table_checksum = XXH3_64bits(impl.table.data(), table_bytes);
  header.header_checksum = HeaderChecksum(header);
  DPSR_RETURN_IF_ERROR(impl.Write(impl.table.data(), table_bytes));
  DPSR_RETURN_IF_ERROR(impl.Flush());
  if (lseek(impl.fd, 0, SEEK_SET) != 0) return impl.Fail(SystemError(impl.path, "seek"));
  DPSR_RETURN_IF_ERROR(impl.WriteThrough(reinterpret_cast<const char*>(&header), sizeof(header)));
  if (fsync(impl.fd) != 0) return impl.Fail(SystemError(impl.path, "sync"));
  const int closed = close(impl.fd);
  impl.fd = -1;
  if (closed != 0) return impl.Fail(SystemError(impl.path, "close"));
  if (rename(impl.temporary.c_str(), impl.path.c_str()) != 0) {
    return impl.Fail(SystemError(impl.path, "rename the temporary file to it"));
  }
  impl.temporary.clear();
  impl.finished = true;
  // The rename survives a power cut only if the folder is synced, too. Some file systems cannot do that; the file is
  // whole in either case.
  const ScopedFd directory(open(DirectoryOf(impl.path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.get() >= 0) (void)fsync(directory.get());
  return Status();
}

Status PackedFile::Open(const std::string& path, std::string_view kind, bool verify,
                        std::unique_ptr<PackedFile>* file) {
  const ScopedFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) return SystemError(path, "open");
  struct stat stat_result;
  if (fstat(fd.get(), &stat_result) != 0) return SystemError(path, "stat");
  if (!S_ISREG(stat_result.st_mode)) {
    return MakeStatus(StatusCode::kDataLoss, path, ": not a regular file, expected a packed file");
  }
  const size_t size = static_cast<size_t>(stat_result.st_size);
  // An empty file cannot be mapped.
  if (size == 0) return OpenMemory(path, kind, verify, nullptr, nullptr, 0, file);
  void* map = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (map == MAP_FAILED) return SystemError(path, "map");
  std::shared_ptr<const void> owner(map, [size](void* mapped) { munmap(mapped, size); });
  return OpenMemory(path, kind, verify, std::move(owner), map, size, file);
}

Status PackedFile::OpenMemory(std::string path, std::string_view kind, bool verify, std::shared_ptr<const void> owner,
                              const void* data, size_t size, std::unique_ptr<PackedFile>* file) {
  if (reinterpret_cast<uintptr_t>(data) % sizeof(uint64_t) != 0) {
    return MakeStatus(StatusCode::kInvalidArgument, path, ": the memory is not aligned to ", sizeof(uint64_t),
                      " bytes");
  }
  if (size < sizeof(Header)) {
    return MakeStatus(StatusCode::kDataLoss, path, ": not a packed file or truncated: ", size,
                      " bytes, expected at least ", sizeof(Header));
  }
  std::unique_ptr<PackedFile> opened(new PackedFile);
  opened->path_ = path;
  opened->memory_ = std::move(owner);
  const char* base = static_cast<const char*>(data);

  Header header;
  std::memcpy(&header, base, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    return MakeStatus(StatusCode::kDataLoss, path, ": not a packed file (it does not begin with DPSRPACK)");
  }
  // This comes before the checksum, because another version may have another header.
  if (header.version != kFormatVersion) {
    return MakeStatus(StatusCode::kFailedPrecondition, path, ": format version ", header.version,
                      ", this build reads version ", kFormatVersion,
                      "; write the file again with this version of DPSR");
  }
  if (header.header_checksum != HeaderChecksum(header)) {
    return MakeStatus(StatusCode::kDataLoss, path, ": the checksum of the header is wrong; the file is corrupt");
  }
  if (header.file_size != size) {
    return MakeStatus(StatusCode::kDataLoss, path, ": ", size, " bytes, expected ", header.file_size,
                      "; the file is truncated or has grown");
  }
  if (!ReadName(header.kind, &opened->kind_)) {
    return MakeStatus(StatusCode::kDataLoss, path, ": the header names no valid kind; the file is corrupt");
  }
  const uint64_t table_bytes = uint64_t{header.section_count} * sizeof(TableEntry);  // below 2^38
  if (table_bytes > size - sizeof(Header) || header.table_offset != size - table_bytes) {
    return MakeStatus(StatusCode::kDataLoss, path, ": a table of ", header.section_count, " sections at byte ",
                      header.table_offset, " does not end the file of ", size, " bytes; the file is corrupt");
  }
  const char* table = base + header.table_offset;
  opened->fingerprint_ = XXH3_64bits(table, table_bytes);
  if (header.table_checksum != opened->fingerprint_) {
    return MakeStatus(StatusCode::kDataLoss, path, ": the checksum of the section table at byte ", header.table_offset,
                      " is wrong; the file is corrupt");
  }
  if (!kind.empty() && kind != opened->kind_) {
    return MakeStatus(StatusCode::kFailedPrecondition, path, ": a file of kind \"", opened->kind_, "\", expected \"",
                      kind, "\"");
  }

  uint64_t next = sizeof(Header);  // where the canonical layout puts the next section; never beyond table_offset
  for (uint32_t i = 0; i < header.section_count; ++i) {
    TableEntry entry;
    std::memcpy(&entry, table + i * sizeof(entry), sizeof(entry));
    Section section;
    section.dtype = static_cast<DataType>(entry.dtype);
    const size_t element = DataTypeSize(section.dtype);
    const bool well_formed = ReadName(entry.name, &section.name) && opened->Find(section.name) == nullptr &&
                             element != 0 && entry.reserved == 0 && entry.offset == next &&
                             entry.bytes <= header.table_offset - next && entry.bytes % element == 0 &&
                             PaddingAfter(entry.bytes) <= header.table_offset - next - entry.bytes;
    if (!well_formed) {
      return MakeStatus(StatusCode::kDataLoss, path, ": entry ", i, " of the section table (\"", section.name,
                        "\", dtype ", DataTypeName(section.dtype), ", byte ", entry.offset, ", ", entry.bytes,
                        " bytes) is not valid; the file is corrupt");
    }
    section.bytes = entry.bytes;
    section.count = entry.bytes / element;
    section.data = base + entry.offset;
    section.offset = entry.offset;
    section.checksum = entry.checksum;
    if (verify) DPSR_RETURN_IF_ERROR(opened->Verify(section));
    next = entry.offset + entry.bytes + PaddingAfter(entry.bytes);
    opened->sections_.push_back(std::move(section));
  }
  if (next != header.table_offset) {
    return MakeStatus(StatusCode::kDataLoss, path, ": the section table is at byte ", header.table_offset,
                      ", expected right after the last section at ", next, "; the file is corrupt");
  }
  *file = std::move(opened);
  return Status();
}

const PackedFile::Section* PackedFile::Find(std::string_view name) const {
  for (const Section& section : sections_) {
    if (section.name == name) return &section;
  }
  return nullptr;
}

Status PackedFile::Verify(const Section& section) const {
  if (XXH3_64bits(section.data, section.bytes) != section.checksum) {
    return MakeStatus(StatusCode::kDataLoss, path_, ": the checksum of section \"", section.name, "\" (byte ",
                      section.offset, ", ", section.bytes, " bytes) is wrong; the file is corrupt");
  }
  const char* end = static_cast<const char*>(section.data) + section.bytes;
  if (std::memcmp(end, kZeros, PaddingAfter(section.bytes)) != 0) {
    return MakeStatus(StatusCode::kDataLoss, path_, ": the padding after section \"", section.name, "\" (byte ",
                      section.offset + section.bytes, ") is not zero; the file is corrupt");
  }
  return Status();
}

Status PackedFile::Lookup(std::string_view name, DataType dtype, const Section** section) const {
  *section = Find(name);
  if (*section == nullptr) {
    std::string names;
    for (const Section& other : sections_) names += (names.empty() ? "" : ", ") + other.name;
    return MakeStatus(StatusCode::kDataLoss, path_, ": has no section \"", name, "\" (it has: ", names, ")");
  }
  if ((*section)->dtype != dtype) {
    return MakeStatus(StatusCode::kDataLoss, path_, ": section \"", name, "\" is ", DataTypeName((*section)->dtype),
                      ", expected ", DataTypeName(dtype));
  }
  return Status();
}

}  // namespace dpsr
