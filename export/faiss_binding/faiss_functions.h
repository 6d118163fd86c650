// Internal to export/faiss_binding/. The functions of FAISS that the binding calls, found in an open libfaiss.so.
//
// Functions that are exported are looked up by their mangled names, which encode the types of their arguments. Virtual
// functions are called through vtables. Their slots are found by looking for the address of an exported function in the
// vtables of several classes, which have to agree.
//
// Calls into FAISS may throw. Wrap them with CatchExceptions.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_FUNCTIONS_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_FUNCTIONS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "common/status.h"
#include "export/faiss_binding/faiss_layout.h"
#include "export/faiss_binding/faiss_metric.h"

// FAISS's classes. They are never complete here: the binding holds only the addresses of their objects.
namespace faiss {
struct Index;
struct IOReader;
struct InvertedLists;
struct InvertedListScanner;
struct SearchParametersIVF;
}  // namespace faiss

namespace dpsr {

// The version of FAISS whose layout and names this binding knows.
inline constexpr char kFaissVersion[] = "1.15.1";

inline constexpr char kFaissRemedy[] =
    "install faiss-cpu==1.15.1 or faiss-gpu==1.15.1 with pip, or set FAISS_LIBRARY to the libfaiss.so of one of them";

// The io_flags argument of FAISS's read functions: none of the options.
inline constexpr int kFaissIoFlags = 0;

// Memory in which FAISS constructs an object of unknown size is filled with this before. Bytes that still have the
// value afterwards show that the object fits.
inline constexpr unsigned char kUntouched = 0xA5;

// Runs a call into FAISS. An exception becomes a Status with `code` whose message begins with `what`.
template <typename Call>
Status CatchExceptions(StatusCode code, const std::string& what, const Call& call) {
  try {
    call();
    return Status();
  } catch (const std::bad_alloc&) {
    return MakeStatus(StatusCode::kResourceExhausted, what, ": out of memory");
  } catch (const std::exception& error) {
    return MakeStatus(code, what, ": ", error.what());
  } catch (...) {
    return MakeStatus(code, what, ": FAISS threw an object that is not a std::exception");
  }
}

// Immutable and thread-safe after LookUp.
class FaissFunctions {
 public:
  // Looks up everything in the library `handle`, which dlopen returned for `path`.
  // Errors: FailedPrecondition (another version, a name is missing, a vtable is not as expected).
  static Status LookUp(const std::string& path, void* handle, std::unique_ptr<const FaissFunctions>* functions);

  FaissFunctions(const FaissFunctions&) = delete;
  FaissFunctions& operator=(const FaissFunctions&) = delete;

  const std::string& path() const { return path_; }
  // Returns the FailedPrecondition that says that this library cannot be used, why, and what to do.
  Status Refuse(const std::string& reason) const;

  // Exported functions.
  faiss::Index* (*read_index)(const char* path, int io_flags) = nullptr;
  faiss::Index* (*read_index_from)(faiss::IOReader*, int io_flags) = nullptr;
  faiss::Index* (*index_factory)(int d, const char* description, FaissMetric metric, bool own_inverted_lists) = nullptr;
  void (*flat_add)(faiss::Index*, int64_t n, const float* x) = nullptr;   // IndexFlat::add
  void (*ivf_train)(faiss::Index*, int64_t n, const float* x) = nullptr;  // IndexIVF::train
  void (*ivf_add)(faiss::Index*, int64_t n, const float* x) = nullptr;    // IndexIVF::add
  void (*make_direct_map)(faiss::Index*, bool new_maintain) = nullptr;    // of IndexIVF
  const float* (*apply_chain)(const faiss::Index*, int64_t n, const float* x) = nullptr;  // of IndexPreTransform
  // Constructor, destructor and get_data_view of ZeroCopyIOReader.
  void (*construct_memory_reader)(void* reader, const uint8_t* data, size_t size) = nullptr;
  void (*destroy_memory_reader)(void* reader) = nullptr;
  size_t (*view_memory)(void* reader, void** data, size_t item_size, size_t items) = nullptr;
  // FAISS's own OpenMP runtime.
  void (*omp_set_num_threads)(int) = nullptr;
  int (*omp_get_max_threads)() = nullptr;
  // Functions of faiss-gpu. All four are there when has_gpu() is true.
  int (*num_gpus)() = nullptr;
  void (*construct_gpu_resources)(void*) = nullptr;  // StandardGpuResources
  void (*destroy_gpu_resources)(void*) = nullptr;
  faiss::Index* (*copy_to_gpu)(void* resources, int device, const faiss::Index*, const void* options) = nullptr;
  bool has_gpu() const;

  // Type infos, for IsA.
  const void* ivf_type = nullptr;  // IndexIVF
  const void* fast_scan_type = nullptr;
  const void* ivf_scalar_type = nullptr;  // IndexIVFScalarQuantizer
  const void* hnsw_type = nullptr;
  const void* refine_type = nullptr;
  const void* pre_transform_type = nullptr;
  // Returns whether the dynamic type of `index` is the class with this type info, or is derived from it.
  bool IsA(const faiss::Index* index, const void* type_info) const;

  // Applies parameters such as "nprobe=32" to an index, with ParameterSpace::set_index_parameters.
  void SetIndexParameters(faiss::Index* index, const char* parameters) const;

  // Virtual functions of Index.
  void Search(const faiss::Index* index, int64_t n, const float* x, int64_t k, float* distances, int64_t* labels,
              const faiss::SearchParameters* parameters = nullptr) const;
  void Reconstruct(const faiss::Index* index, int64_t position, float* x) const;
  void Delete(faiss::Index* index) const;
  // IndexIVF::get_InvertedListScanner.
  faiss::InvertedListScanner* NewListScanner(const faiss::Index* ivf) const;
  // IndexIVF::search_preassigned: a search of the `nprobe` lists in `lists` [n, nprobe].
  void SearchLists(const faiss::Index* ivf, int64_t n, const float* x, int64_t k, const int64_t* lists,
                   const float* list_scores, float* distances, int64_t* labels,
                   const faiss::SearchParametersIVF* parameters) const;
  // IndexIVF::encode_vectors and decode_vectors, without the numbers of the lists in the codes.
  void EncodeVectors(const faiss::Index* ivf, int64_t n, const float* x, const int64_t* lists, uint8_t* codes) const;
  void DecodeVectors(const faiss::Index* ivf, int64_t n, const uint8_t* codes, const int64_t* lists, float* x) const;
  // Virtual functions of InvertedLists: list_size, get_codes and get_ids.
  size_t ListSize(const faiss::InvertedLists* lists, size_t list) const;
  const uint8_t* ListCodes(const faiss::InvertedLists* lists, size_t list) const;
  const void* ListIds(const faiss::InvertedLists* lists, size_t list) const;

 private:
  FaissFunctions(const std::string& path, void* handle) : path_(path), handle_(handle) {}

  Status CheckVersion();
  Status LookUpFunctions();
  Status LookUpTypes();
  void LookUpGpuFunctions();
  Status FindIndexSlots();
  Status FindListSlots();
  Status CheckScannerSlots() const;
  Status ConstructParameterSpace();

  template <typename Function>
  Function* FindIfThere(const char* mangled_name) const;
  template <typename Function>
  Status Find(const char* mangled_name, Function** function) const;
  int FindSlot(const std::string& class_name, const std::string& mangled_name) const;
  Status FindSameSlot(const std::string& class_name, const char* function, const std::string& mangled_name,
                      int* slot) const;

  const std::string path_;
  void* const handle_;
  const void* index_type_ = nullptr;  // type info of Index
  int search_slot_ = -1;
  int reconstruct_slot_ = -1;
  int delete_slot_ = -1;
  int new_list_scanner_slot_ = -1;
  int search_lists_slot_ = -1;
  int encode_slot_ = -1;
  int decode_slot_ = -1;
  int list_size_slot_ = -1;
  int list_codes_slot_ = -1;
  int list_ids_slot_ = -1;
  void (*set_index_parameters_)(const void* parameter_space, faiss::Index*, const char* parameters) = nullptr;
  // Memory for a faiss::ParameterSpace, whose size is not known. ConstructParameterSpace checks that it fits.
  alignas(64) std::array<unsigned char, 4096> parameter_space_;
};

// Sets the calling thread's number of OpenMP threads, and restores it at the end of the scope.
class OmpThreads {
 public:
  OmpThreads(const FaissFunctions& faiss, int nthreads) : faiss_(faiss), before_(faiss.omp_get_max_threads()) {
    faiss_.omp_set_num_threads(nthreads);
  }
  ~OmpThreads() { faiss_.omp_set_num_threads(before_); }
  OmpThreads(const OmpThreads&) = delete;
  OmpThreads& operator=(const OmpThreads&) = delete;

 private:
  const FaissFunctions& faiss_;
  const int before_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_FUNCTIONS_H_
