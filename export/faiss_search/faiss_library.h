// The run-time binding to libfaiss.so of the faiss-cpu or faiss-gpu wheel.
//
// The wheels ship no headers, so nothing of FAISS is known at compile time. FaissLibrary opens the library and looks up
// a handful of exported functions by their mangled names, which encode the argument types; the vtable slots of `search`
// and of the destructor are found by the addresses of those functions in the vtables of several index classes, which
// have to agree. What is left to trust, the offsets of a dozen fields and the layout of the search parameters, is proved
// by a self-test at every load. One FAISS version is accepted, every other is refused.
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
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/packed_file.h"
#include "common/status.h"

namespace dpsr {

// faiss::MetricType. Values other than these two are possible in an index file.
enum class FaissMetric : int32_t { kInnerProduct = 0, kL2 = 1 };

// "inner product", "L2", or "faiss::MetricType(4)" for the others.
std::string FaissMetricName(FaissMetric metric);

// Search parameters of one call; 0 leaves what the index has. FAISS's names: nprobe is the number of lists looked
// through, efSearch the candidates of an HNSW graph, k_factor_rf how many times k candidates are refined.
struct SearchParameters {
  int64_t nprobe = 0;
  int64_t ef_search = 0;
  double k_factor = 0;

  // Reads "nprobe=32,k_factor_rf=4". Empty text is all zeros.
  // Errors: InvalidArgument (another name, a name given twice, a value that is no number from 1 on), with the text.
  static Status Parse(const std::string& text, SearchParameters* parameters);

  // OK when no parameter is above its bound; a bound of 0 forbids the parameter. Errors: InvalidArgument, with both.
  Status CheckBounds(const SearchParameters& bounds) const;

  bool empty() const { return nprobe == 0 && ef_search == 0 && k_factor == 0; }
};

// One loaded and self-tested libfaiss.so. Immutable and thread-safe after Load.
class FaissLibrary {
 public:
  // The version whose layout this binding knows.
  static constexpr char kVersion[] = "1.15.1";

  // The library of this process, loaded by the first successful call and kept until the process ends; thread-safe.
  // Where it is looked for: $FAISS_LIBRARY if that is set (and then nowhere else); otherwise libfaiss.so in the folder
  // of the library or program that holds this code, in ../faiss beside that folder (both in one site-packages), and on
  // the dynamic linker's own path. The first that can be opened counts. That of faiss-gpu needs the CUDA libraries: they
  // are taken from the dynamic linker's path, or from ../nvidia beside its folder, where pip puts them.
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
  friend class FaissListScanner;

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
  Status FindListSlots();
  Status ConstructParameterSpace();
  Status SelfTest() const;
  Status SelfTestMetric(FaissMetric metric) const;
  Status SelfTestMemoryReader() const;
  Status SelfTestFields() const;
  Status Refuse(const std::string& reason) const;

  void Search(const Index* index, int64_t n, const float* x, int64_t k, float* distances, int64_t* labels,
              const void* search_parameters = nullptr) const;
  void Delete(Index* index) const;
  // Whether the dynamic type of `index` is, or is derived from, the class of this type info.
  bool Is(const Index* index, const void* type_info) const;

  const std::string path_;
  void* const handle_;
  int search_slot_ = -1;
  int delete_slot_ = -1;
  int reconstruct_slot_ = -1;
  int make_scanner_slot_ = -1;  // IndexIVF::get_InvertedListScanner
  int list_size_slot_ = -1;     // the three of InvertedLists
  int list_codes_slot_ = -1;
  int list_ids_slot_ = -1;
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
  void (*make_direct_map_)(Index*, bool) = nullptr;
  const float* (*apply_chain_)(const Index*, int64_t n, const float* x) = nullptr;
  const void* index_type_ = nullptr;  // type infos
  const void* ivf_type_ = nullptr;
  const void* fast_scan_type_ = nullptr;
  const void* hnsw_type_ = nullptr;
  const void* refine_type_ = nullptr;
  const void* pre_transform_type_ = nullptr;
  // Of faiss-gpu; null in faiss-cpu.
  int (*num_gpus_)() = nullptr;
  void (*construct_gpu_resources_)(void*) = nullptr;
  void (*destroy_gpu_resources_)(void*) = nullptr;
  Index* (*copy_to_gpu_)(void* resources, int device, const Index*, const void* options) = nullptr;
  void (*omp_set_num_threads_)(int) = nullptr;
  int (*omp_get_max_threads_)() = nullptr;
  // Room for a faiss::ParameterSpace, whose size is not known; ConstructParameterSpace proves that it fits.
  alignas(64) std::array<unsigned char, 4096> parameter_space_;
};

// What may be found: a set of positions, as a bit each. Position i is bit i % 64 of word i / 64.
using PositionSet = Span<const uint64_t>;

// One index, read from a file. Search is safe from any number of threads; SetParameters is not, call it before.
//
// An index of inverted lists is also open to a reader of its lists (has_lists): which position stands where, its code,
// and the score of a code for a query (FaissListScanner). FastScan, whose codes are interleaved, is not.
class FaissIndex {
 public:
  // Reads an index file into memory or, with `mmap`, maps its large arrays read-only: loading takes milliseconds, and
  // processes share the pages (FastScan lists and small arrays are copied all the same). A mapped file must not change
  // while the index lives: replace it by renaming another over it.
  // Errors: NotFound (no such file), DataLoss (not an index, truncated, corrupt), ResourceExhausted.
  static Status Read(const FaissLibrary& library, const std::string& path, bool mmap,
                     std::unique_ptr<FaissIndex>* index);
  // Errors: NotFound (no such file), DataLoss (it has not `bytes` bytes with this Checksum), with both values.
  static Status CheckFile(const std::string& path, uint64_t bytes, uint64_t checksum);
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

  // Copies the index to a GPU, and searches there from now on, one call at a time. What a GPU does not do is still
  // searched on the CPU: among allowed positions, with parameters of the call, for more than kMaxGpuResults. To be called
  // once, before any search. Errors: FailedPrecondition (a FAISS without GPUs, no such device, a kind of index that it
  // does not have, no memory); the index is then as before.
  static constexpr int64_t kMaxGpuResults = 2048;
  Status CopyToGpu(int device);

  // The search parameters in force; those that this kind of index does not have are 0.
  SearchParameters parameters() const;
  // OK when the index has every parameter that is given. Errors: InvalidArgument, with the names that it has.
  Status CheckParameters(const SearchParameters& parameters) const;

  // x [n, d] -> distances [n, k], labels [n, k]. Uses `nthreads` OpenMP threads and leaves the calling thread's own
  // setting as it was. `parameters` hold for this call; those that the index does not have are ignored. With `allowed`,
  // of ntotal bits, only these positions are found; what an approximate index then misses it misses.
  // Errors: InvalidArgument (n < 0, k < 1, nthreads < 1), Internal (FAISS failed).
  Status Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads = 1,
                const SearchParameters& parameters = {}, const PositionSet* allowed = nullptr) const;

  // Whether Reconstruct works: not in lists, which would need a table for it.
  bool can_reconstruct() const { return ivf_ == nullptr || refine_ != nullptr; }
  // Calls use(position, x [d]) with the vector of each position, as the index holds it. Errors: Internal (FAISS failed).
  Status Reconstruct(Span<const int64_t> positions, const std::function<void(int64_t, const float*)>& use) const;

  bool has_lists() const { return lists_ != nullptr; }
  int64_t num_lists() const;
  int64_t list_size(int64_t list) const;
  // Writes the positions that stand in a list: ids [list_size].
  void ReadListIds(int64_t list, int64_t* ids) const;
  const uint8_t* list_codes(int64_t list) const;  // [list_size, code_size]
  int64_t code_size() const;
  // The dimension in which lists lie; d() unless a transform stands before them.
  int64_t list_dim() const;
  // x [d] -> y [list_dim]: through the transforms before the lists, if any.
  Status Transform(const float* x, float* y) const;
  // centroids [num_lists, list_dim]. To be called once, before any search. Errors: Internal (FAISS failed).
  Status ReadCentroids(float* centroids);

 private:
  friend class FaissListScanner;
  // A file's bytes, mapped read-only.
  struct Mapping {
    ~Mapping();
    // Errors: NotFound, DataLoss (no regular file, or empty), ResourceExhausted.
    static Status Make(const std::string& path, std::unique_ptr<Mapping>* mapping);
    void* data = nullptr;
    size_t size = 0;
  };
  // The search parameter objects of one call.
  struct ParameterObjects;
  // The copy on a GPU.
  struct GpuCopy;

  FaissIndex(const FaissLibrary& library, FaissLibrary::Index* index, std::unique_ptr<Mapping> mapping);
  static Status ReadMapped(const FaissLibrary& library, const std::string& path, std::unique_ptr<Mapping> mapping,
                           std::unique_ptr<FaissIndex>* index);
  // What FAISS's search() has to be given, a faiss::SearchParameters; null: nothing.
  const void* Objects(const SearchParameters& parameters, const void* selector, ParameterObjects* objects) const;

  const FaissLibrary& library_;
  const std::unique_ptr<Mapping> mapping_;  // null when the index is in memory; index_ points into it
  FaissLibrary::Index* const index_;
  // What index_ consists of, from outside in; null where there is no such part.
  const FaissLibrary::Index* transform_ = nullptr;  // IndexPreTransform
  const FaissLibrary::Index* refine_ = nullptr;     // IndexRefine
  const FaissLibrary::Index* ivf_ = nullptr;
  const FaissLibrary::Index* hnsw_ = nullptr;
  const void* lists_ = nullptr;  // faiss::InvertedLists of ivf_, if they can be read
  std::unique_ptr<GpuCopy> gpu_;
};

// Scores codes of an index that has_lists. Keeps its memory in between: one object a thread and search.
class FaissListScanner {
 public:
  // The index must outlive the scanner. Errors of this and SetQuery: Internal (FAISS failed).
  static Status Create(const FaissIndex& index, std::unique_ptr<FaissListScanner>* scanner);
  ~FaissListScanner();
  FaissListScanner(const FaissListScanner&) = delete;
  FaissListScanner& operator=(const FaissListScanner&) = delete;

  // y [list_dim], which must live as long as it is the query.
  Status SetQuery(const float* y);
  // Says which list codes are of; `centroid_score` is the inner product of query and centroid.
  void SetList(int64_t list, float centroid_score) { set_list_(scanner_, list, centroid_score); }
  // The inner product of the query and the item of a code, as the index's own search computes it.
  float Score(const uint8_t* code) const { return score_(scanner_, code); }

 private:
  explicit FaissListScanner(void* scanner);

  using SetQueryFunction = void(void*, const float*);
  using SetListFunction = void(void*, int64_t, float);
  using ScoreFunction = float(const void*, const uint8_t*);
  void* const scanner_;  // faiss::InvertedListScanner
  SetQueryFunction* set_query_;
  SetListFunction* set_list_;
  ScoreFunction* score_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_SEARCH_FAISS_LIBRARY_H_
