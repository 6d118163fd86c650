#include "export/faiss_search/faiss_library.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

// What FAISS takes as search parameters, in its layout: FAISS tells the classes apart by the names of their types, so
// that these have to be the same and visible. SelfTest() checks that what is set here arrives.
#pragma GCC visibility push(default)
namespace faiss {

struct IDSelector {
  virtual bool is_member(int64_t id) const = 0;
  virtual ~IDSelector() = default;
};

struct SearchParameters {
  const IDSelector* sel = nullptr;
  virtual ~SearchParameters() = default;
};

struct SearchParametersIVF : SearchParameters {
  size_t nprobe = 1;
  unsigned char others[248] = {};  // more limits, and pointers: 0 is none
};

struct SearchParametersHNSW : SearchParameters {
  int efSearch = 16;
  bool check_relative_distance = true;
  bool bounded_queue = true;
  unsigned char others[104] = {};
};

struct IndexRefineSearchParameters : SearchParameters {
  float k_factor = 1;
  const SearchParameters* base_index_params = nullptr;
  unsigned char others[96] = {};
};

struct SearchParametersPreTransform : SearchParameters {
  const SearchParameters* index_params = nullptr;
  unsigned char others[104] = {};
};

}  // namespace faiss
#pragma GCC visibility pop

namespace dpsr {
namespace {

// Fields of FAISS's classes, in bytes from the start of an object. SelfTest() checks all of them.
constexpr size_t kOffsetD = 8;  // of Index
constexpr size_t kOffsetNtotal = 16;
constexpr size_t kOffsetIsTrained = 25;
constexpr size_t kOffsetMetric = 28;
constexpr size_t kOffsetQuantizer = 48;  // of IndexIVF
constexpr size_t kOffsetNlist = 56;
constexpr size_t kOffsetNprobe = 144;
constexpr size_t kOffsetInvlists = 160;
constexpr size_t kOffsetListsNlist = 8;  // of InvertedLists
constexpr size_t kOffsetListsCodeSize = 16;
constexpr size_t kOffsetTransformed = 64;  // IndexPreTransform::index
constexpr size_t kOffsetRefineBase = 40;   // of IndexRefine
constexpr size_t kOffsetKFactor = 60;
constexpr size_t kOffsetEfSearch = 5232;  // IndexHNSW::hnsw.efSearch

// Slots of faiss::InvertedListScanner. Its set_list and one that follows are found by their addresses; the two that are
// pure virtual stand beside them, and the destructors behind the last.
constexpr int kSetQuerySlot = 0;
constexpr int kSetListSlot = 1;
constexpr int kScoreSlot = 2;
constexpr int kIterateSlot = 3;
constexpr int kLastScannerSlot = 6;
constexpr int kDeleteScannerSlot = kLastScannerSlot + 2;

constexpr int kIoFlags = 0;

// What objects that FAISS constructs in our memory are surrounded with, to see that they fit.
constexpr unsigned char kUntouched = 0xA5;

// A vtable symbol points at the offset-to-top and the type info; objects point behind these two words.
constexpr int kVtableHeaderWords = 2;

constexpr char kRemedy[] =
    "install faiss-cpu==1.15.1 or faiss-gpu==1.15.1 with pip, or set FAISS_LIBRARY to the libfaiss.so of one of them";

// What libfaiss.so of faiss-gpu is linked with, in the order of their needs, and where pip puts it.
constexpr const char* kCudaLibraries[][2] = {{"cuda_runtime", "libcudart.so.12"},
                                             {"cublas", "libcublasLt.so.12"},
                                             {"cublas", "libcublas.so.12"}};

// Runs a call into FAISS; whatever it throws becomes a Status of `code` that begins with `what`.
template <typename Call>
Status CatchAll(StatusCode code, const std::string& what, const Call& call) {
  try {
    call();
    return Status();
  } catch (const std::bad_alloc&) {
    return MakeStatus(StatusCode::kResourceExhausted, what, ": out of memory");
  } catch (const std::exception& error) {
    return MakeStatus(code, what, ": ", error.what());
  } catch (...) {
    return MakeStatus(code, what, ": FAISS threw something that is no std::exception");
  }
}

template <typename T>
T ReadField(const void* object, size_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(object) + offset, sizeof(value));
  return value;
}

// The function in a slot of an object's vtable.
template <typename Function>
Function* Virtual(const void* object, int slot) {
  void* const* const vtable = *static_cast<void* const* const*>(object);
  return reinterpret_cast<Function*>(vtable[slot]);
}

using ReconstructFunction = void(const void*, int64_t position, float* x);
using MakeScannerFunction = void*(const void*, bool store_pairs, const void* selector, const void* search_parameters);
using ListSizeFunction = size_t(const void*, size_t list);
using ListCodesFunction = const uint8_t*(const void*, size_t list);
using ListIdsFunction = const void*(const void*, size_t list);

// FAISS asks this, of one position after another, whether it may be found.
class PositionSelector : public faiss::IDSelector {
 public:
  explicit PositionSelector(PositionSet allowed) : allowed_(allowed) {}
  bool is_member(int64_t id) const override {
    return static_cast<uint64_t>(id) / 64 < allowed_.size() && (allowed_[id / 64] >> (id % 64) & 1) != 0;
  }

 private:
  const PositionSet allowed_;
};

// "IndexFlat" -> "9IndexFlat", as it stands in mangled names.
std::string Mangled(const std::string& name) { return std::to_string(name.size()) + name; }

// The number of virtual functions of a class, from the size of its vtable symbol; 0 when it has none.
int VtableSize(void** vtable) {
  Dl_info info;
  void* symbol = nullptr;
  if (dladdr1(vtable, &info, &symbol, RTLD_DL_SYMENT) == 0 || symbol == nullptr) return 0;
  return static_cast<int>(static_cast<const ElfW(Sym)*>(symbol)->st_size / sizeof(void*)) - kVtableHeaderWords;
}

// The slot in which the vtable of faiss::`class_name` holds `function`, or -1.
int FindSlot(void* handle, const std::string& class_name, const std::string& function) {
  void** vtable = static_cast<void**>(dlsym(handle, ("_ZTVN5faiss" + Mangled(class_name) + "E").c_str()));
  const void* address = dlsym(handle, function.c_str());
  if (vtable == nullptr || address == nullptr) return -1;
  const int size = VtableSize(vtable);
  for (int slot = 0; slot < size; ++slot) {
    if (vtable[kVtableHeaderWords + slot] == address) return slot;
  }
  return -1;
}

// Why dlopen failed; its text begins with the file.
std::string LastLinkerError() {
  const char* error = dlerror();
  return error == nullptr ? "unknown error" : error;
}

// The folder of the shared library or program this code was linked into.
std::string OwnFolder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&OwnFolder), &info) == 0 || info.dli_fname == nullptr) return ".";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

// Opens a FAISS library; where that fails, once more with the CUDA libraries that faiss-gpu's needs.
void* OpenLibrary(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr || access(path.c_str(), F_OK) != 0) return handle;
  const std::string packages = path.substr(0, path.rfind('/') + 1) + "../nvidia/";
  for (const auto& [package, name] : kCudaLibraries) {
    if (dlopen(name, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      dlopen((packages + package + "/lib/" + name).c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
  return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
}

}  // namespace

std::string FaissMetricName(FaissMetric metric) {
  switch (metric) {
    case FaissMetric::kInnerProduct:
      return "inner product";
    case FaissMetric::kL2:
      return "L2";
  }
  return StrCat("faiss::MetricType(", static_cast<int32_t>(metric), ")");
}

Status SearchParameters::Parse(const std::string& text, SearchParameters* parameters) {
  *parameters = {};
  const auto refuse = [&text](const std::string& why) {
    return MakeStatus(StatusCode::kInvalidArgument, "search parameters are \"", text, "\": ", why,
                      "; expected, for example, \"nprobe=32\" or \"nprobe=32,k_factor_rf=4\"");
  };
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    begin = end + 1;
    if (begin == text.size()) return refuse("it ends in a comma");
    const size_t equals = std::min(part.find('='), part.size());
    const std::string name = part.substr(0, equals);
    double value = 0;
    const char* const first = part.data() + std::min(equals + 1, part.size());
    const char* const last = part.data() + part.size();
    const auto read = std::from_chars(first, last, value);
    const bool is_number = read.ec == std::errc() && read.ptr == last && value >= 1 && value <= 1e9;
    int64_t* const whole = name == "nprobe" ? &parameters->nprobe : name == "efSearch" ? &parameters->ef_search : nullptr;
    if (whole == nullptr && name != "k_factor_rf") {
      return refuse(StrCat("\"", name, "\" is none of nprobe, efSearch, k_factor_rf"));
    }
    if (!is_number || (whole != nullptr && value != std::floor(value))) {
      return refuse(StrCat(name, " is no ", whole == nullptr ? "" : "whole ", "number from 1 to 1e9"));
    }
    if (whole == nullptr ? parameters->k_factor != 0 : *whole != 0) return refuse(StrCat(name, " stands twice"));
    if (whole == nullptr) {
      parameters->k_factor = value;
    } else {
      *whole = static_cast<int64_t>(value);
    }
  }
  return Status();
}

Status SearchParameters::CheckBounds(const SearchParameters& bounds) const {
  const auto check = [](const char* name, auto value, auto bound) {
    if (value == 0 || value <= bound) return Status();
    if (bound == 0) {
      return MakeStatus(StatusCode::kInvalidArgument, "search parameters: ", name, " cannot be set by a request here");
    }
    return MakeStatus(StatusCode::kInvalidArgument, "search parameters: ", name, " is ", value, ", expected at most ",
                      bound);
  };
  DPSR_RETURN_IF_ERROR(check("nprobe", nprobe, bounds.nprobe));
  DPSR_RETURN_IF_ERROR(check("efSearch", ef_search, bounds.ef_search));
  return check("k_factor_rf", k_factor, bounds.k_factor);
}

// Sets the calling thread's number of OpenMP threads and restores it at the end of the scope.
class FaissLibrary::OmpThreads {
 public:
  OmpThreads(const FaissLibrary& library, int nthreads) : library_(library), before_(library.omp_get_max_threads_()) {
    library_.omp_set_num_threads_(nthreads);
  }
  ~OmpThreads() { library_.omp_set_num_threads_(before_); }
  OmpThreads(const OmpThreads&) = delete;
  OmpThreads& operator=(const OmpThreads&) = delete;

 private:
  const FaissLibrary& library_;
  const int before_;
};

// A faiss::ZeroCopyIOReader: indexes read from it point into its memory instead of copying large arrays.
//
// FAISS's own mapping of files (IO_FLAG_MMAP_IFC) does the same, but it overruns when a truncated file ends within a
// number (version 1.15.1). This reader stops there, except that it may deliver the last item of an array of which only
// a part is left; the position is then behind the end, all further reads fail, and OverranEnd() tells.
class FaissLibrary::MemoryReader {
 public:
  MemoryReader(const FaissLibrary& library, const void* data, size_t size) : library_(library) {
    object_.fill(kUntouched);
    library_.construct_memory_reader_(object_.data(), static_cast<const uint8_t*>(data), size);
  }
  ~MemoryReader() { library_.destroy_memory_reader_(object_.data()); }
  MemoryReader(const MemoryReader&) = delete;
  MemoryReader& operator=(const MemoryReader&) = delete;

  Reader* get() { return reinterpret_cast<Reader*>(object_.data()); }

  // To be called once, after the last read. One more byte is there (1), or none (0), or, behind the end, a number of
  // bytes below zero that wraps around.
  bool OverranEnd() {
    void* unused = nullptr;
    return library_.view_memory_(object_.data(), &unused, 1, 1) > 1;
  }

  // That the object, whose size is not known, fits into the memory it was given.
  bool Fits() const { return object_.back() == kUntouched; }

 private:
  const FaissLibrary& library_;
  alignas(64) std::array<unsigned char, 256> object_;
};

Status FaissLibrary::Get(const FaissLibrary** library) {
  static std::mutex* mutex = new std::mutex;
  static const FaissLibrary* loaded = nullptr;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (loaded == nullptr) {
    std::vector<std::string> candidates;
    const char* chosen = std::getenv("FAISS_LIBRARY");
    if (chosen != nullptr && *chosen != '\0') {
      candidates = {chosen};
    } else {
      const std::string folder = OwnFolder();
      candidates = {folder + "/libfaiss.so", folder + "/../faiss/libfaiss.so", "libfaiss.so"};
    }
    std::string failures;
    std::unique_ptr<FaissLibrary> opened;
    for (const std::string& candidate : candidates) {
      void* handle = OpenLibrary(candidate);
      if (handle != nullptr) {
        DPSR_RETURN_IF_ERROR(Bind(candidate, handle, &opened));
        break;
      }
      failures += "\n  " + LastLinkerError();
    }
    if (opened == nullptr) {
      return MakeStatus(StatusCode::kFailedPrecondition, "cannot open the FAISS library; ", kRemedy,
                        ". Tried:", failures);
    }
    loaded = opened.release();
  }
  *library = loaded;
  return Status();
}

Status FaissLibrary::Load(const std::string& path, std::unique_ptr<FaissLibrary>* library) {
  void* handle = OpenLibrary(path);
  if (handle == nullptr) {
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot open the FAISS library; ", kRemedy, ". Tried:\n  ",
                      LastLinkerError());
  }
  return Bind(path, handle, library);
}

Status FaissLibrary::Bind(const std::string& path, void* handle, std::unique_ptr<FaissLibrary>* library) {
  std::unique_ptr<FaissLibrary> bound(new FaissLibrary(path, handle));
  DPSR_RETURN_IF_ERROR(bound->Resolve());
  DPSR_RETURN_IF_ERROR(bound->FindVtableSlots());
  DPSR_RETURN_IF_ERROR(bound->FindListSlots());
  DPSR_RETURN_IF_ERROR(bound->ConstructParameterSpace());
  DPSR_RETURN_IF_ERROR(bound->SelfTest());
  *library = std::move(bound);
  return Status();
}

Status FaissLibrary::Refuse(const std::string& reason) const {
  return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS library ", path_, " cannot be used: ", reason, "; ",
                    kRemedy);
}

Status FaissLibrary::Resolve() {
  const auto find = [this](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle_, name));
    return *function != nullptr ? Status() : Refuse(StrCat("it does not export ", name));
  };
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss11get_versionB5cxx11Ev", &get_version_));
  std::string version;
  DPSR_RETURN_IF_ERROR(
      CatchAll(StatusCode::kFailedPrecondition, path_ + ": get_version", [&] { version = get_version_(); }));
  if (version != kVersion) return Refuse(StrCat("it is FAISS version ", version, ", version ", kVersion, " is needed"));

  DPSR_RETURN_IF_ERROR(find("_ZN5faiss10read_indexEPKci", &read_index_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss10read_indexEPNS_8IOReaderEi", &read_index_from_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss16ZeroCopyIOReaderC1EPKhm", &construct_memory_reader_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss16ZeroCopyIOReaderD1Ev", &destroy_memory_reader_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss16ZeroCopyIOReader13get_data_viewEPPvmm", &view_memory_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss13index_factoryEiPKcNS_10MetricTypeEb", &index_factory_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss14IndexFlatCodes3addElPKf", &index_flat_add_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss14ParameterSpaceC1Ev", &construct_parameter_space_));
  DPSR_RETURN_IF_ERROR(
      find("_ZNK5faiss14ParameterSpace20set_index_parametersEPNS_5IndexEPKc", &set_index_parameters_));
  DPSR_RETURN_IF_ERROR(find("_ZNK5faiss17IndexPreTransform11apply_chainElPKf", &apply_chain_));
  DPSR_RETURN_IF_ERROR(find("_ZN5faiss8IndexIVF15make_direct_mapEb", &make_direct_map_));
  for (const auto& [name, type] : {std::pair{"Index", &index_type_}, std::pair{"IndexIVF", &ivf_type_},
                                   std::pair{"IndexIVFFastScan", &fast_scan_type_}, std::pair{"IndexHNSW", &hnsw_type_},
                                   std::pair{"IndexRefine", &refine_type_},
                                   std::pair{"IndexPreTransform", &pre_transform_type_}}) {
    const std::string symbol = "_ZTIN5faiss" + Mangled(name) + "E";
    *type = dlsym(handle_, symbol.c_str());
    if (*type == nullptr) return Refuse("it does not export " + symbol);
  }
  const auto find_if_there = [this](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle_, name));
  };
  find_if_there("_ZN5faiss3gpu13getNumDevicesEv", &num_gpus_);
  find_if_there("_ZN5faiss3gpu20StandardGpuResourcesC1Ev", &construct_gpu_resources_);
  find_if_there("_ZN5faiss3gpu20StandardGpuResourcesD1Ev", &destroy_gpu_resources_);
  find_if_there(
      "_ZN5faiss3gpu16index_cpu_to_gpuEPNS0_20GpuResourcesProviderEiPKNS_5IndexEPKNS0_16GpuClonerOptionsE",
      &copy_to_gpu_);
  // dlsym searches what the library depends on too: these are of the OpenMP runtime that FAISS itself uses.
  DPSR_RETURN_IF_ERROR(find("omp_set_num_threads", &omp_set_num_threads_));
  return find("omp_get_max_threads", &omp_get_max_threads_);
}

Status FaissLibrary::FindVtableSlots() {
  for (const std::string name : {"IndexFlat", "IndexIVF", "IndexHNSW", "IndexRefine", "IndexPreTransform"}) {
    const std::string in_class = "5faiss" + Mangled(name);
    const int search = FindSlot(handle_, name, "_ZNK" + in_class + "6searchElPKflPfPlPKNS_16SearchParametersE");
    const int destroy = FindSlot(handle_, name, "_ZN" + in_class + "D1Ev");
    // Classes whose destructors are implicit export none; IndexRefine and others have theirs.
    const int destroy_and_free = destroy < 0 ? -1 : FindSlot(handle_, name, "_ZN" + in_class + "D0Ev");
    if (search < 0 || (search_slot_ >= 0 && search != search_slot_)) {
      return Refuse(StrCat("the place of search() in the vtable of ", name, " is not as expected"));
    }
    search_slot_ = search;
    const int reconstruct = FindSlot(handle_, name, "_ZNK" + in_class + "11reconstructElPf");
    if (reconstruct < 0 || (reconstruct_slot_ >= 0 && reconstruct != reconstruct_slot_)) {
      return Refuse(StrCat("the place of reconstruct() in the vtable of ", name, " is not as expected"));
    }
    reconstruct_slot_ = reconstruct;
    if (destroy < 0) continue;
    if (destroy_and_free != destroy + 1 || (delete_slot_ >= 0 && destroy_and_free != delete_slot_)) {
      return Refuse(StrCat("the place of the destructor in the vtable of ", name, " is not as expected"));
    }
    delete_slot_ = destroy_and_free;
  }
  if (delete_slot_ < 0) return Refuse("no index class exports its destructor");
  return Status();
}

Status FaissLibrary::FindListSlots() {
  for (const std::string name : {"IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"}) {
    const int slot = FindSlot(handle_, name, "_ZNK5faiss" + Mangled(name) +
                                                 "23get_InvertedListScannerEbPKNS_10IDSelectorEPKNS_19SearchParametersIVFE");
    if (slot < 0 || (make_scanner_slot_ >= 0 && slot != make_scanner_slot_)) {
      return Refuse(StrCat("the place of get_InvertedListScanner() in the vtable of ", name, " is not as expected"));
    }
    make_scanner_slot_ = slot;
  }
  const std::string lists = "ArrayInvertedLists";
  const std::string in_lists = "_ZNK5faiss" + Mangled(lists);
  list_size_slot_ = FindSlot(handle_, lists, in_lists + "9list_sizeEm");
  list_codes_slot_ = FindSlot(handle_, lists, in_lists + "9get_codesEm");
  list_ids_slot_ = FindSlot(handle_, lists, in_lists + "7get_idsEm");
  if (std::min({list_size_slot_, list_codes_slot_, list_ids_slot_}) < 0) {
    return Refuse("the vtable of ArrayInvertedLists is not as expected");
  }
  const std::string scanner = "InvertedListScanner";
  const std::string in_scanner = "5faiss" + Mangled(scanner);
  if (FindSlot(handle_, scanner, "_ZN" + in_scanner + "8set_listElf") != kSetListSlot ||
      FindSlot(handle_, scanner, "_ZNK" + in_scanner + "13iterate_codesEPNS_21InvertedListsIteratorEPfPlmRm") !=
          kIterateSlot ||
      FindSlot(handle_, scanner, "_ZNK" + in_scanner + "10scan_codesEmPKhPKlRNS_22ResultHandlerUnorderedIflEE") !=
          kLastScannerSlot) {
    return Refuse("the vtable of InvertedListScanner is not as expected");
  }
  return Status();
}

Status FaissLibrary::ConstructParameterSpace() {
  parameter_space_.fill(kUntouched);
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kFailedPrecondition, path_ + ": ParameterSpace",
                                [&] { construct_parameter_space_(parameter_space_.data()); }));
  const auto tail = parameter_space_.begin() + parameter_space_.size() / 2;
  if (!std::all_of(tail, parameter_space_.end(), [](unsigned char byte) { return byte == kUntouched; })) {
    return Refuse("its ParameterSpace is larger than expected");
  }
  return Status();
}

Status FaissLibrary::SelfTest() const {
  DPSR_RETURN_IF_ERROR(SelfTestMetric(FaissMetric::kInnerProduct));
  DPSR_RETURN_IF_ERROR(SelfTestMetric(FaissMetric::kL2));
  DPSR_RETURN_IF_ERROR(SelfTestMemoryReader());
  DPSR_RETURN_IF_ERROR(SelfTestFields());
  Index* untrained = nullptr;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kFailedPrecondition, path_ + ": self-test", [&] {
    untrained = index_factory_(2, "IVF2,Flat", FaissMetric::kInnerProduct, /*own_inverted_lists=*/true);
  }));
  const bool is_trained = ReadField<uint8_t>(untrained, kOffsetIsTrained) != 0;
  Delete(untrained);
  if (is_trained) return Refuse("self-test: an untrained index says that it is trained");

  // FAISS reports errors by exceptions: one has to arrive here, as std::exception with its text.
  const Status thrown = CatchAll(StatusCode::kInvalidArgument, "", [&] {
    Delete(index_factory_(2, "no_such_index", FaissMetric::kL2, /*own_inverted_lists=*/true));
  });
  if (thrown.code() != StatusCode::kInvalidArgument || thrown.message().find("no_such_index") == std::string::npos) {
    return Refuse("self-test: its exceptions do not arrive as expected");
  }
  return Status();
}

Status FaissLibrary::SelfTestMetric(FaissMetric metric) const {
  constexpr int kDim = 3;
  constexpr int64_t kVectors = 4;
  constexpr int64_t kResults = 5;  // one more than there are vectors: the last is padding
  constexpr float kVector[kVectors * kDim] = {1, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0};
  constexpr float kQuery[kDim] = {1, .75f, .25f};
  const bool inner_product = metric == FaissMetric::kInnerProduct;
  const std::array<int64_t, kResults> expected =
      inner_product ? std::array<int64_t, kResults>{3, 0, 1, 2, -1} : std::array<int64_t, kResults>{0, 1, 3, 2, -1};
  const float expected_best = inner_product ? 2.0f : 0.625f;

  std::string failure;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kFailedPrecondition, path_ + ": self-test", [&] {
    Index* created = index_factory_(kDim, "Flat", metric, /*own_inverted_lists=*/true);
    const auto destroy = [this](Index* index) { Delete(index); };
    const std::unique_ptr<Index, decltype(destroy)> index(created, destroy);
    if (ReadField<int32_t>(created, kOffsetD) != kDim || ReadField<int64_t>(created, kOffsetNtotal) != 0 ||
        ReadField<uint8_t>(created, kOffsetIsTrained) != 1 ||
        ReadField<FaissMetric>(created, kOffsetMetric) != metric) {
      failure = "the fields of an index are not where they are expected";
      return;
    }
    index_flat_add_(created, kVectors, kVector);
    if (ReadField<int64_t>(created, kOffsetNtotal) != kVectors) {
      failure = "ntotal is not where it is expected";
      return;
    }
    const OmpThreads one_thread(*this, 1);
    std::array<float, kResults> distances = {};
    std::array<int64_t, kResults> labels = {};
    Search(created, 1, kQuery, kResults, distances.data(), labels.data());
    if (labels != expected || distances[0] != expected_best) {
      failure = StrCat("a search by ", FaissMetricName(metric), " gave a wrong result");
      return;
    }
    constexpr uint64_t kFirstTwo = 0b0011;
    const PositionSelector selector(PositionSet(&kFirstTwo, 1));
    faiss::SearchParameters parameters;
    parameters.sel = &selector;
    Search(created, 1, kQuery, 2, distances.data(), labels.data(), &parameters);
    std::array<float, kDim> second = {};
    Virtual<ReconstructFunction>(created, reconstruct_slot_)(created, 1, second.data());
    if (labels[0] != 0 || labels[1] != 1 || second != std::array<float, kDim>{0, 1, 0}) {
      failure = StrCat("a search among some vectors, by ", FaissMetricName(metric), ", gave a wrong result");
    }
  }));
  return failure.empty() ? Status() : Refuse("self-test: " + failure);
}

Status FaissLibrary::SelfTestMemoryReader() const {
  constexpr uint32_t kItems[2] = {0, 0};
  // Two items fit; a third of which nothing is left does not; after one of which a part is left, the end is overrun.
  MemoryReader whole(*this, kItems, sizeof(kItems));
  MemoryReader partial(*this, kItems, sizeof(kItems) - 1);
  void* view = nullptr;
  const bool views = view_memory_(whole.get(), &view, sizeof(uint32_t), 2) == 2 && view == kItems &&
                     view_memory_(whole.get(), &view, sizeof(uint32_t), 1) == 0 && !whole.OverranEnd() &&
                     view_memory_(partial.get(), &view, sizeof(uint32_t), 2) == 2 && partial.OverranEnd();
  if (!views || !whole.Fits()) return Refuse("self-test: its ZeroCopyIOReader is not as expected");

  MemoryReader no_index(*this, kItems, sizeof(kItems));
  const Status thrown =
      CatchAll(StatusCode::kDataLoss, "", [&] { Delete(read_index_from_(no_index.get(), kIoFlags)); });
  if (thrown.code() != StatusCode::kDataLoss) return Refuse("self-test: it reads an index where there is none");
  return Status();
}

Status FaissLibrary::SelfTestFields() const {
  constexpr int64_t kValue = 77;
  std::string failure;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kFailedPrecondition, path_ + ": self-test", [&] {
    const auto destroy = [this](Index* index) { Delete(index); };
    const auto make = [&](const char* factory, const char* parameters) {
      std::unique_ptr<Index, decltype(destroy)> index(
          index_factory_(4, factory, FaissMetric::kInnerProduct, /*own_inverted_lists=*/true), destroy);
      if (*parameters != '\0') set_index_parameters_(parameter_space_.data(), index.get(), parameters);
      return index;
    };
    const auto ivf = make("IVF3,SQ8", "nprobe=77");
    const auto lists = ReadField<const void*>(ivf.get(), kOffsetInvlists);
    const auto quantizer = ReadField<const Index*>(ivf.get(), kOffsetQuantizer);
    if (!Is(ivf.get(), ivf_type_) || Is(ivf.get(), hnsw_type_) || Is(ivf.get(), fast_scan_type_) ||
        ReadField<int64_t>(ivf.get(), kOffsetNlist) != 3 || ReadField<int64_t>(ivf.get(), kOffsetNprobe) != kValue ||
        ReadField<int32_t>(quantizer, kOffsetD) != 4 || ReadField<int64_t>(lists, kOffsetListsNlist) != 3 ||
        ReadField<int64_t>(lists, kOffsetListsCodeSize) != 4 ||
        Virtual<ListSizeFunction>(lists, list_size_slot_)(lists, 2) != 0) {
      failure = "IndexIVF";
      return;
    }
    const auto hnsw = make("HNSW4", "efSearch=77");
    if (!Is(hnsw.get(), hnsw_type_) || ReadField<int32_t>(hnsw.get(), kOffsetEfSearch) != kValue) {
      failure = "IndexHNSW";
      return;
    }
    const auto transform = make("PCA2,Flat", "");
    if (!Is(transform.get(), pre_transform_type_) ||
        ReadField<int32_t>(ReadField<const Index*>(transform.get(), kOffsetTransformed), kOffsetD) != 2) {
      failure = "IndexPreTransform";
      return;
    }
    const auto refine = make("SQ8,RFlat", "k_factor_rf=77");
    if (!Is(refine.get(), refine_type_) || ReadField<float>(refine.get(), kOffsetKFactor) != kValue ||
        ReadField<int32_t>(ReadField<const Index*>(refine.get(), kOffsetRefineBase), kOffsetD) != 4) {
      failure = "IndexRefine";
    }
  }));
  return failure.empty() ? Status()
                         : Refuse(StrCat("self-test: the fields of ", failure, " are not where they are expected"));
}

void FaissLibrary::Search(const Index* index, int64_t n, const float* x, int64_t k, float* distances, int64_t* labels,
                          const void* search_parameters) const {
  Virtual<SearchFunction>(index, search_slot_)(index, n, x, k, distances, labels, search_parameters);
}

void FaissLibrary::Delete(Index* index) const { Virtual<DeleteFunction>(index, delete_slot_)(index); }

bool FaissLibrary::Is(const Index* index, const void* type_info) const {
  return abi::__dynamic_cast(index, static_cast<const abi::__class_type_info*>(index_type_),
                             static_cast<const abi::__class_type_info*>(type_info), /*src2dst=*/0) != nullptr;
}

Status FaissIndex::Mapping::Make(const std::string& path, std::unique_ptr<Mapping>* mapping) {
  // FAISS reports all that can be wrong with a file as one kind of exception; a missing one is told apart here.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    const int error = errno;
    return MakeStatus(error == ENOENT ? StatusCode::kNotFound : StatusCode::kDataLoss, "cannot open the FAISS index ",
                      path, ": ", std::strerror(error));
  }
  struct stat information = {};
  Status status;
  if (fstat(file, &information) != 0 || !S_ISREG(information.st_mode) || information.st_size == 0) {
    status = MakeStatus(StatusCode::kDataLoss, "cannot read the FAISS index ", path, ": it is ",
                        S_ISREG(information.st_mode) ? "empty" : "not a regular file");
  } else {
    const auto size = static_cast<size_t>(information.st_size);
    void* const data = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) {
      status = MakeStatus(StatusCode::kResourceExhausted, "cannot map the FAISS index ", path, " (", size,
                          " bytes): ", std::strerror(errno));
    } else {
      *mapping = std::make_unique<Mapping>();
      (*mapping)->data = data;
      (*mapping)->size = size;
    }
  }
  close(file);
  return status;
}

Status FaissIndex::CheckFile(const std::string& path, uint64_t bytes, uint64_t checksum) {
  std::unique_ptr<Mapping> mapping;
  DPSR_RETURN_IF_ERROR(Mapping::Make(path, &mapping));
  if (mapping->size != bytes) {
    return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", path, " has ", mapping->size, " bytes, expected ",
                      bytes, ": it is truncated, or another one");
  }
  const uint64_t found = Checksum(mapping->data, mapping->size);
  if (found != checksum) {
    return MakeStatus(StatusCode::kDataLoss, "the FAISS index ", path, " has the checksum ", std::hex, found,
                      ", expected ", checksum, ": it is damaged, or another one");
  }
  return Status();
}

Status FaissIndex::Read(const FaissLibrary& library, const std::string& path, bool mmap,
                        std::unique_ptr<FaissIndex>* index) {
  std::unique_ptr<Mapping> mapping;
  DPSR_RETURN_IF_ERROR(Mapping::Make(path, &mapping));
  if (mmap) return ReadMapped(library, path, std::move(mapping), index);
  FaissLibrary::Index* read = nullptr;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kDataLoss, StrCat("cannot read the FAISS index ", path),
                                [&] { read = library.read_index_(path.c_str(), kIoFlags); }));
  index->reset(new FaissIndex(library, read, nullptr));
  return Status();
}

Status FaissIndex::ReadMapped(const FaissLibrary& library, const std::string& path, std::unique_ptr<Mapping> mapping,
                              std::unique_ptr<FaissIndex>* index) {
  const size_t size = mapping->size;
  FaissLibrary::Index* read = nullptr;
  bool overran_end = false;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kDataLoss, StrCat("cannot read the FAISS index ", path), [&] {
    FaissLibrary::MemoryReader reader(library, mapping->data, size);
    read = library.read_index_from_(reader.get(), kIoFlags);
    overran_end = reader.OverranEnd();
  }));
  std::unique_ptr<FaissIndex> mapped(new FaissIndex(library, read, std::move(mapping)));
  if (overran_end) {
    return MakeStatus(StatusCode::kDataLoss, "cannot read the FAISS index ", path, ": it is truncated, at ", size,
                      " bytes");
  }
  *index = std::move(mapped);
  return Status();
}

FaissIndex::Mapping::~Mapping() {
  if (data != nullptr) munmap(data, size);
}

FaissIndex::FaissIndex(const FaissLibrary& library, FaissLibrary::Index* index, std::unique_ptr<Mapping> mapping)
    : library_(library), mapping_(std::move(mapping)), index_(index) {
  const FaissLibrary::Index* inner = index;
  const auto inside = [&](size_t offset) { inner = ReadField<const FaissLibrary::Index*>(inner, offset); };
  if (library.Is(inner, library.refine_type_)) {
    refine_ = inner;
    inside(kOffsetRefineBase);
  }
  if (library.Is(inner, library.pre_transform_type_)) {
    transform_ = inner;
    inside(kOffsetTransformed);
  }
  if (library.Is(inner, library.hnsw_type_)) hnsw_ = inner;
  if (!library.Is(inner, library.ivf_type_)) return;
  ivf_ = inner;
  // Where candidates are refined, the codes of the lists are not what counts.
  if (refine_ == nullptr && !library.Is(inner, library.fast_scan_type_)) {
    lists_ = ReadField<const void*>(inner, kOffsetInvlists);
  }
}

struct FaissIndex::GpuCopy {
  explicit GpuCopy(const FaissLibrary& faiss) : library(faiss) {
    resources.fill(kUntouched);
    library.construct_gpu_resources_(resources.data());
  }
  ~GpuCopy() {
    if (index != nullptr) library.Delete(index);
    library.destroy_gpu_resources_(resources.data());
  }

  const FaissLibrary& library;
  alignas(64) std::array<unsigned char, 1024> resources;  // a faiss::gpu::StandardGpuResources, which holds one pointer
  FaissLibrary::Index* index = nullptr;
  std::mutex mutex;  // resources are of one search at a time
};

Status FaissIndex::CopyToGpu(int device) {
  const FaissLibrary& faiss = library_;
  if (faiss.num_gpus_ == nullptr || faiss.construct_gpu_resources_ == nullptr ||
      faiss.destroy_gpu_resources_ == nullptr || faiss.copy_to_gpu_ == nullptr) {
    return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS library ", faiss.path(),
                      " knows no GPUs; install faiss-gpu==1.15.1 in the place of faiss-cpu");
  }
  return CatchAll(StatusCode::kFailedPrecondition, StrCat("cannot copy the index to GPU ", device), [&] {
    const int devices = faiss.num_gpus_();
    if (device < 0 || device >= devices) throw std::out_of_range(StrCat("there are ", devices, " GPUs"));
    auto copy = std::make_unique<GpuCopy>(faiss);
    if (copy->resources.back() != kUntouched) throw std::length_error("StandardGpuResources is larger than expected");
    copy->index = faiss.copy_to_gpu_(copy->resources.data(), device, index_, nullptr);
    gpu_ = std::move(copy);
  });
}

FaissIndex::~FaissIndex() {
  gpu_.reset();
  library_.Delete(index_);
}

int64_t FaissIndex::d() const { return ReadField<int32_t>(index_, kOffsetD); }
int64_t FaissIndex::ntotal() const { return ReadField<int64_t>(index_, kOffsetNtotal); }
bool FaissIndex::is_trained() const { return ReadField<uint8_t>(index_, kOffsetIsTrained) != 0; }
FaissMetric FaissIndex::metric() const { return ReadField<FaissMetric>(index_, kOffsetMetric); }

Status FaissIndex::SetParameters(const std::string& parameters) {
  if (parameters.empty()) return Status();
  return CatchAll(StatusCode::kInvalidArgument, StrCat("cannot set the search parameters \"", parameters, "\""), [&] {
    library_.set_index_parameters_(library_.parameter_space_.data(), index_, parameters.c_str());
  });
}

SearchParameters FaissIndex::parameters() const {
  SearchParameters found;
  if (ivf_ != nullptr) found.nprobe = ReadField<int64_t>(ivf_, kOffsetNprobe);
  if (hnsw_ != nullptr) found.ef_search = ReadField<int32_t>(hnsw_, kOffsetEfSearch);
  if (refine_ != nullptr) found.k_factor = ReadField<float>(refine_, kOffsetKFactor);
  return found;
}

Status FaissIndex::CheckParameters(const SearchParameters& parameters) const {
  std::string has;
  for (const auto& [name, there] : {std::pair{"nprobe", ivf_ != nullptr}, std::pair{"efSearch", hnsw_ != nullptr},
                                    std::pair{"k_factor_rf", refine_ != nullptr}}) {
    if (there) has += (has.empty() ? "" : ", ") + std::string(name);
  }
  const auto check = [&has](const char* name, bool given, bool there) {
    if (!given || there) return Status();
    return MakeStatus(StatusCode::kInvalidArgument, "search parameters: this index has no ", name, ", only ",
                      has.empty() ? "none" : has);
  };
  DPSR_RETURN_IF_ERROR(check("nprobe", parameters.nprobe != 0, ivf_ != nullptr));
  DPSR_RETURN_IF_ERROR(check("efSearch", parameters.ef_search != 0, hnsw_ != nullptr));
  return check("k_factor_rf", parameters.k_factor != 0, refine_ != nullptr);
}

struct FaissIndex::ParameterObjects {
  faiss::SearchParameters plain;
  faiss::SearchParametersIVF ivf;
  faiss::SearchParametersHNSW hnsw;
  faiss::IndexRefineSearchParameters refine;
  faiss::SearchParametersPreTransform transform;
};

const void* FaissIndex::Objects(const SearchParameters& parameters, const void* selector,
                                ParameterObjects* objects) const {
  if (parameters.empty() && selector == nullptr) return nullptr;
  const SearchParameters own = this->parameters();
  objects->plain.sel = static_cast<const faiss::IDSelector*>(selector);
  const faiss::SearchParameters* inner = selector == nullptr ? nullptr : &objects->plain;
  if (ivf_ != nullptr) {
    objects->ivf.sel = objects->plain.sel;
    objects->ivf.nprobe = static_cast<size_t>(parameters.nprobe != 0 ? parameters.nprobe : own.nprobe);
    inner = &objects->ivf;
  } else if (hnsw_ != nullptr) {
    objects->hnsw.sel = objects->plain.sel;
    objects->hnsw.efSearch = static_cast<int>(parameters.ef_search != 0 ? parameters.ef_search : own.ef_search);
    inner = &objects->hnsw;
  }
  if (transform_ != nullptr) {
    objects->transform.index_params = inner;
    inner = &objects->transform;
  }
  if (refine_ != nullptr) {
    objects->refine.base_index_params = inner;
    objects->refine.k_factor = static_cast<float>(parameters.k_factor != 0 ? parameters.k_factor : own.k_factor);
    inner = &objects->refine;
  }
  return inner;
}

Status FaissIndex::Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads,
                          const SearchParameters& parameters, const PositionSet* allowed) const {
  if (n < 0 || k < 1 || nthreads < 1) {
    return MakeStatus(StatusCode::kInvalidArgument, "search with n = ", n, ", k = ", k, ", nthreads = ", nthreads,
                      ", expected n >= 0, k >= 1, nthreads >= 1");
  }
  if (n == 0) return Status();
  return CatchAll(StatusCode::kInternal, "FAISS search failed", [&] {
    const FaissLibrary::OmpThreads threads(library_, nthreads);
    if (gpu_ != nullptr && allowed == nullptr && parameters.empty() && k <= kMaxGpuResults) {
      const std::lock_guard<std::mutex> lock(gpu_->mutex);
      library_.Search(gpu_->index, n, x, k, distances, labels);
      return;
    }
    const PositionSelector selector(allowed == nullptr ? PositionSet() : *allowed);
    ParameterObjects objects;
    library_.Search(index_, n, x, k, distances, labels,
                    Objects(parameters, allowed == nullptr ? nullptr : &selector, &objects));
  });
}

Status FaissIndex::Reconstruct(Span<const int64_t> positions,
                               const std::function<void(int64_t, const float*)>& use) const {
  return CatchAll(StatusCode::kInternal, "FAISS cannot reconstruct a vector", [&] {
    const FaissLibrary::OmpThreads one_thread(library_, 1);
    const auto reconstruct = Virtual<ReconstructFunction>(index_, library_.reconstruct_slot_);
    std::vector<float> x(d());
    for (const int64_t position : positions) {
      reconstruct(index_, position, x.data());
      use(position, x.data());
    }
  });
}

int64_t FaissIndex::num_lists() const { return ReadField<int64_t>(ivf_, kOffsetNlist); }

int64_t FaissIndex::list_size(int64_t list) const {
  return static_cast<int64_t>(Virtual<ListSizeFunction>(lists_, library_.list_size_slot_)(lists_, list));
}

void FaissIndex::ReadListIds(int64_t list, int64_t* ids) const {
  // In a mapped file they need not be aligned.
  const void* const from = Virtual<ListIdsFunction>(lists_, library_.list_ids_slot_)(lists_, list);
  const int64_t size = list_size(list);
  if (size > 0) std::memcpy(ids, from, size * sizeof(ids[0]));
}

const uint8_t* FaissIndex::list_codes(int64_t list) const {
  return Virtual<ListCodesFunction>(lists_, library_.list_codes_slot_)(lists_, list);
}

int64_t FaissIndex::code_size() const { return ReadField<int64_t>(lists_, kOffsetListsCodeSize); }
int64_t FaissIndex::list_dim() const { return ReadField<int32_t>(ivf_, kOffsetD); }

Status FaissIndex::Transform(const float* x, float* y) const {
  if (transform_ == nullptr) {
    std::copy_n(x, d(), y);
    return Status();
  }
  return CatchAll(StatusCode::kInternal, "FAISS cannot transform a vector", [&] {
    const FaissLibrary::OmpThreads one_thread(library_, 1);
    const float* const transformed = library_.apply_chain_(transform_, 1, x);
    std::copy_n(transformed, list_dim(), y);
    if (transformed != x) delete[] transformed;
  });
}

Status FaissIndex::ReadCentroids(float* centroids) {
  return CatchAll(StatusCode::kInternal, "FAISS cannot reconstruct the centroids", [&] {
    auto* const quantizer = ReadField<FaissLibrary::Index*>(ivf_, kOffsetQuantizer);
    // Centroids that lie in lists themselves are found by such a table only.
    if (library_.Is(quantizer, library_.ivf_type_)) library_.make_direct_map_(quantizer, /*new_maintain=*/true);
    for (int64_t list = 0; list < num_lists(); ++list) {
      Virtual<ReconstructFunction>(quantizer, library_.reconstruct_slot_)(quantizer, list,
                                                                         centroids + list * list_dim());
    }
  });
}

Status FaissListScanner::Create(const FaissIndex& index, std::unique_ptr<FaissListScanner>* scanner) {
  void* made = nullptr;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kInternal, "FAISS cannot scan the lists of this index", [&] {
    made = Virtual<MakeScannerFunction>(index.ivf_, index.library_.make_scanner_slot_)(index.ivf_, /*store_pairs=*/false,
                                                                                      nullptr, nullptr);
  }));
  scanner->reset(new FaissListScanner(made));
  return Status();
}

FaissListScanner::FaissListScanner(void* scanner)
    : scanner_(scanner),
      set_query_(Virtual<SetQueryFunction>(scanner, kSetQuerySlot)),
      set_list_(Virtual<SetListFunction>(scanner, kSetListSlot)),
      score_(Virtual<ScoreFunction>(scanner, kScoreSlot)) {}

FaissListScanner::~FaissListScanner() { Virtual<void(void*)>(scanner_, kDeleteScannerSlot)(scanner_); }

Status FaissListScanner::SetQuery(const float* y) {
  return CatchAll(StatusCode::kInternal, "FAISS cannot scan for a query", [&] { set_query_(scanner_, y); });
}

}  // namespace dpsr
