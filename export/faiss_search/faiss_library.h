// The run-time binding to libfaiss.so of the faiss-cpu or faiss-gpu wheel.
//
// The wheels ship no headers, so nothing of FAISS is known at compile time. FaissLibrary opens the library and looks up
// a handful of exported functions by their mangled names, which encode the argument types; the vtable slots of `search`
// and of the destructor are found by the addresses of those functions in the vtables of several index classes, which
// have to agree. What is left to trust, the offsets of four fields of faiss::Index, is proved by a self-test at every
// load. One FAISS version is accepted, every other is refused.
//
// This is also the boundary at which FAISS's exceptions end: everything here returns a dpsr::Status.
//
//   const FaissLibrary* faiss = nullptr;
//   DPSR_RETURN_IF_ERROR(FaissLibrary::Get(&faiss));
//   std::unique_ptr<FaissIndex> index;
//   DPSR_RETURN_IF_ERROR(FaissIndex::Read(*faiss, "items.faiss", /*mmap=*/true, &index));
//   DPSR_RETURN_IF_ERROR(index->SetParameters("nprobe=32"));
//   DPSR_RETURN_IF_ERROR(index->Search(n, x, k, distances, labels));
//
// Names and conventions are FAISS's: matrices are row-major, n is the number of queries, d the dimension, k the number
// of results a query; distances and labels are [n, k], best first, missing results have label -1.
#ifndef DPSR_EXPORT_FAISS_SEARCH_FAISS_LIBRARY_H_
#define DPSR_EXPORT_FAISS_SEARCH_FAISS_LIBRARY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "tokenizer_cc/status.h"

namespace dpsr {

// faiss::MetricType. Values other than these two are possible in an index file.
enum class FaissMetric : int32_t { kInnerProduct = 0, kL2 = 1 };

// "inner product", "L2", or "faiss::MetricType(4)" for the others.
std::string FaissMetricName(FaissMetric metric);

// One loaded and self-tested libfaiss.so. Immutable and thread-safe after Load.
class FaissLibrary {
 public:
  // The version whose layout this binding knows.
  static constexpr char kVersion[] = "1.15.1";

  // The library of this process, loaded by the first successful call and kept until the process ends; thread-safe.
  // Where it is looked for: $FAISS_LIBRARY if that is set (and then nowhere else); otherwise libfaiss.so in the folder
  // of the library or program that holds this code, in ../faiss beside that folder (both in one site-packages), and on
  // the dynamic linker's own path. The first that can be opened counts.
  // Errors: FailedPrecondition (none can be opened, another version, failed self-test), with path and remedy.
  static Status Get(const FaissLibrary** library);

  // Opens and tests one given file. Errors as above. The file stays mapped even when it is refused or when the object
  // is destroyed: unloading a library that has started OpenMP threads is not safe.
  static Status Load(const std::string& path, std::unique_ptr<FaissLibrary>* library);

  FaissLibrary(const FaissLibrary&) = delete;
  FaissLibrary& operator=(const FaissLibrary&) = delete;

  // The file as it was given to the dynamic linker.
  const std::string& path() const { return path_; }

 private:
  friend class FaissIndex;

  // A faiss::Index. Never complete here: only its address and, through the functions below, its contents are used.
  struct Index;
  // A faiss::IOReader.
  struct Reader;
  using SearchFunction = void(const Index*, int64_t n, const float* x, int64_t k, float* distances, int64_t* labels,
                              const void* search_parameters);
  using DeleteFunction = void(Index*);
  class OmpThreads;
  class MemoryReader;

  FaissLibrary(std::string path, void* handle) : path_(std::move(path)), handle_(handle) {}
  static Status Bind(const std::string& path, void* handle, std::unique_ptr<FaissLibrary>* library);
  Status Resolve();
  Status FindVtableSlots();
  Status ConstructParameterSpace();
  Status SelfTest() const;
  Status SelfTestMetric(FaissMetric metric) const;
  Status SelfTestMemoryReader() const;
  Status Refuse(const std::string& reason) const;

  void Search(const Index* index, int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) const;
  void Delete(Index* index) const;

  const std::string path_;
  void* const handle_;
  int search_slot_ = -1;
  int delete_slot_ = -1;
  std::string (*get_version_)() = nullptr;
  Index* (*read_index_)(const char* path, int io_flags) = nullptr;
  Index* (*read_index_from_)(Reader*, int io_flags) = nullptr;
  void (*construct_memory_reader_)(void* reader, const uint8_t* data, size_t size) = nullptr;
  void (*destroy_memory_reader_)(void* reader) = nullptr;
  size_t (*view_memory_)(void* reader, void** data, size_t item_size, size_t items) = nullptr;
  Index* (*index_factory_)(int d, const char* description, FaissMetric metric, bool own_inverted_lists) = nullptr;
  void (*index_flat_add_)(Index*, int64_t n, const float* x) = nullptr;
  void (*construct_parameter_space_)(void*) = nullptr;
  void (*set_index_parameters_)(const void* parameter_space, Index*, const char* parameters) = nullptr;
  void (*omp_set_num_threads_)(int) = nullptr;
  int (*omp_get_max_threads_)() = nullptr;
  // Room for a faiss::ParameterSpace, whose size is not known; ConstructParameterSpace proves that it fits.
  alignas(64) std::array<unsigned char, 4096> parameter_space_;
};

// One index, read from a file. Search is safe from any number of threads; SetParameters is not, call it before.
class FaissIndex {
 public:
  // Reads an index file into memory or, with `mmap`, maps its large arrays read-only: loading takes milliseconds, and
  // processes share the pages (FastScan lists and small arrays are copied all the same). A mapped file must not change
  // while the index lives: replace it by renaming another over it.
  // Errors: NotFound (no such file), DataLoss (not an index, truncated, corrupt), ResourceExhausted.
  static Status Read(const FaissLibrary& library, const std::string& path, bool mmap,
                     std::unique_ptr<FaissIndex>* index);
  ~FaissIndex();
  FaissIndex(const FaissIndex&) = delete;
  FaissIndex& operator=(const FaissIndex&) = delete;

  int64_t d() const;
  int64_t ntotal() const;
  bool is_trained() const;
  FaissMetric metric() const;

  // Sets search parameters as faiss::ParameterSpace names them, comma separated: "nprobe=32", "efSearch=64",
  // "nprobe=64,k_factor_rf=4". Empty changes nothing. Errors: InvalidArgument, with FAISS's own words.
  Status SetParameters(const std::string& parameters);

  // x [n, d] -> distances [n, k], labels [n, k]. Uses `nthreads` OpenMP threads and leaves the calling thread's own
  // setting as it was. Errors: InvalidArgument (n < 0, k < 1, nthreads < 1), Internal (FAISS failed).
  Status Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads = 1) const;

 private:
  // A file's bytes, mapped read-only.
  struct Mapping {
    ~Mapping();
    void* data = nullptr;
    size_t size = 0;
  };

  FaissIndex(const FaissLibrary& library, FaissLibrary::Index* index, std::unique_ptr<Mapping> mapping)
      : library_(library), mapping_(std::move(mapping)), index_(index) {}
  static Status ReadMapped(const FaissLibrary& library, const std::string& path, int file, size_t size,
                           std::unique_ptr<FaissIndex>* index);

  const FaissLibrary& library_;
  const std::unique_ptr<Mapping> mapping_;  // null when the index is in memory; index_ points into it
  FaissLibrary::Index* const index_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_FAISS_LIBRARY_H_
