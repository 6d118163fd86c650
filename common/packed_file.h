// The container of all our files on disk: named, typed, checksummed arrays in one memory-mapped file. The vocabulary
// and the users, items and interactions of a store are packed files. They differ in their kind and their sections.
//
// Layout, little endian (docs/data_format.md describes it for users):
//
//   header     64 bytes: magic "DPSRPACK", u32 format version, u32 section count, u64 table offset, u64 file size,
//              char kind[16] (zero padded), u64 xxh3 of the table, u64 xxh3 of the 56 header bytes before it
//   sections   raw array data, each section aligned to 64 bytes; the gaps are zero
//   table      a 64-byte entry for each section: char name[32] (zero padded), u32 dtype, u32 reserved (0), u64 offset,
//              u64 bytes, u64 xxh3 of the data
//
// The layout is canonical: sections follow one another in table order, with only the zero padding between them. The
// table follows the last section and ends the file. So a check covers every byte of a file, and equal content gives
// equal bytes.
//
// A file is written under a temporary name in the same directory, and renamed by Finish(). So a reader sees a whole
// file or none. Open() checks magic, version, kind, sizes, and the checksums of header and table; with `verify`, also
// the data. A reader that needs only some sections opens the file without `verify`, and calls Verify() for these
// sections. Never change a file in place, because readers have it mapped: write a new file in its place.
//
//   PackedFileWriter writer("items.dpsr", "items");
//   DPSR_RETURN_IF_ERROR(writer.Open());
//   DPSR_RETURN_IF_ERROR(writer.Add("id", DataType::kInt64, ids.data(), ids.size() * sizeof(ids[0])));
//   DPSR_RETURN_IF_ERROR(writer.Finish());
//
//   std::unique_ptr<PackedFile> file;
//   DPSR_RETURN_IF_ERROR(PackedFile::Open("items.dpsr", "items", /*verify=*/true, &file));
//   Span<const int64_t> ids;
//   DPSR_RETURN_IF_ERROR(file->Get("id", &ids));
#ifndef DPSR_COMMON_PACKED_FILE_H_
#define DPSR_COMMON_PACKED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/span.h"
#include "common/status.h"

namespace dpsr {

// The numbers are stored in files, so their meaning never changes.
enum class DataType : uint32_t {
  kUint8 = 1,
  kInt32 = 2,
  kInt64 = 3,
  kFloat32 = 4,
  kUint32 = 5,
  kUint64 = 6,
  kInt8 = 7,
  kUint16 = 8,
  kFloat64 = 9,
};

template <typename T>
struct DataTypeOf;
template <> struct DataTypeOf<uint8_t> { static constexpr DataType value = DataType::kUint8; };
template <> struct DataTypeOf<int32_t> { static constexpr DataType value = DataType::kInt32; };
template <> struct DataTypeOf<int64_t> { static constexpr DataType value = DataType::kInt64; };
template <> struct DataTypeOf<float> { static constexpr DataType value = DataType::kFloat32; };
template <> struct DataTypeOf<uint32_t> { static constexpr DataType value = DataType::kUint32; };
template <> struct DataTypeOf<uint64_t> { static constexpr DataType value = DataType::kUint64; };
template <> struct DataTypeOf<int8_t> { static constexpr DataType value = DataType::kInt8; };
template <> struct DataTypeOf<uint16_t> { static constexpr DataType value = DataType::kUint16; };
template <> struct DataTypeOf<double> { static constexpr DataType value = DataType::kFloat64; };

// Returns the bytes of one element; 0 for a value that is not a DataType.
size_t DataTypeSize(DataType dtype);
// Returns "int64", "float32", ...; "unknown(99)" for a value that is not a DataType.
std::string DataTypeName(DataType dtype);

// Computes the checksum that packed files store for their sections, XXH3 with 64 bits.
uint64_t Checksum(const void* data, size_t bytes);

// Writes a packed file. Not thread-safe. A writer that is destroyed before Finish() removes its temporary file.
class PackedFileWriter {
 public:
  // `kind` is at most 15 bytes and names what the file is ("vocabulary", "items").
  PackedFileWriter(std::string path, std::string kind);
  ~PackedFileWriter();
  PackedFileWriter(const PackedFileWriter&) = delete;
  PackedFileWriter& operator=(const PackedFileWriter&) = delete;

  // Creates the temporary file beside `path`.
  Status Open();
  // Adds a section. `name` has 1 to 31 bytes and must be new to this file; `bytes` is a multiple of the element size.
  Status Add(std::string_view name, DataType dtype, const void* data, size_t bytes);
  // Add a section in pieces, for arrays that do not fit in memory: call Begin, then Append any number of times. The
  // next Begin, Add or Finish closes the section.
  Status Begin(std::string_view name, DataType dtype);
  Status Append(const void* data, size_t bytes);
  // Writes table and header, syncs, and renames the file to `path`. Replaces a file that is there.
  Status Finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A packed file, mapped read-only. Thread-safe after Open. Spans are valid as long as the file object lives.
class PackedFile {
 public:
  static constexpr uint32_t kFormatVersion = 1;

  struct Section {
    std::string name;
    DataType dtype;
    size_t count;  // number of elements
    size_t bytes;
    const void* data;
    uint64_t offset;    // of the data, in the file
    uint64_t checksum;  // that the data must have, see Verify
  };

  // Maps `path`. An empty `kind` accepts any kind. `verify` computes the checksum of every section (some 10 GB/s).
  // Errors: NotFound (no such file), DataLoss (not a packed file, truncated, or a wrong checksum; names file, section
  // and offset), FailedPrecondition (another format version or another kind).
  static Status Open(const std::string& path, std::string_view kind, bool verify, std::unique_ptr<PackedFile>* file);
  // Opens a file whose `size` bytes are in memory already, for other file systems. Errors name it `path`. `data` must
  // be aligned to 8 bytes, and must not change as long as `owner` lives. Errors: the ones of Open, and InvalidArgument
  // (memory that is not aligned).
  static Status OpenMemory(std::string path, std::string_view kind, bool verify, std::shared_ptr<const void> owner,
                           const void* data, size_t size, std::unique_ptr<PackedFile>* file);
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  const std::string& path() const { return path_; }
  const std::string& kind() const { return kind_; }
  const std::vector<Section>& sections() const { return sections_; }
  // Identifies the content. This is the checksum of the table, which has all names, dtypes, sizes and section
  // checksums.
  uint64_t fingerprint() const { return fingerprint_; }
  // Returns null if the file lacks the section.
  const Section* Find(std::string_view name) const;
  // Computes the checksum of one of sections(). Error: DataLoss, with file and offset, if it or the padding is wrong.
  Status Verify(const Section& section) const;

  // Returns a section as a typed array. Error: DataLoss if it is missing or has another dtype.
  template <typename T>
  Status Get(std::string_view name, Span<const T>* out) const {
    const Section* section = nullptr;
    DPSR_RETURN_IF_ERROR(Lookup(name, DataTypeOf<T>::value, &section));
    *out = Span<const T>(static_cast<const T*>(section->data), section->count);
    return Status();
  }

 private:
  PackedFile() = default;
  Status Lookup(std::string_view name, DataType dtype, const Section** section) const;

  std::string path_;
  std::string kind_;
  std::shared_ptr<const void> memory_;  // owns the bytes of the sections
  uint64_t fingerprint_ = 0;
  std::vector<Section> sections_;
};

}  // namespace dpsr

#endif  // DPSR_COMMON_PACKED_FILE_H_
