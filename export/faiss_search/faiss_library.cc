#include "export/faiss_search/faiss_library.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace dpsr {
namespace {

// Fields of faiss::Index, in bytes from its start. SelfTest() checks all four.
constexpr size_t kOffsetD = 8;
constexpr size_t kOffsetNtotal = 16;
constexpr size_t kOffsetIsTrained = 25;
constexpr size_t kOffsetMetric = 28;

constexpr int kIoFlags = 0;

// What objects that FAISS constructs in our memory are surrounded with, to see that they fit.
constexpr unsigned char kUntouched = 0xA5;

// A vtable symbol points at the offset-to-top and the type info; objects point behind these two words.
constexpr int kVtableHeaderWords = 2;

constexpr char kRemedy[] =
    "install faiss-cpu==1.15.1 or faiss-gpu==1.15.1 with pip, or set FAISS_LIBRARY to the libfaiss.so of one of them";

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
      void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
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
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
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
    if (destroy < 0) continue;
    if (destroy_and_free != destroy + 1 || (delete_slot_ >= 0 && destroy_and_free != delete_slot_)) {
      return Refuse(StrCat("the place of the destructor in the vtable of ", name, " is not as expected"));
    }
    delete_slot_ = destroy_and_free;
  }
  if (delete_slot_ < 0) return Refuse("no index class exports its destructor");
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

void FaissLibrary::Search(const Index* index, int64_t n, const float* x, int64_t k, float* distances,
                          int64_t* labels) const {
  void* const* const vtable = *reinterpret_cast<void* const* const*>(index);
  reinterpret_cast<SearchFunction*>(vtable[search_slot_])(index, n, x, k, distances, labels, nullptr);
}

void FaissLibrary::Delete(Index* index) const {
  void* const* const vtable = *reinterpret_cast<void* const* const*>(index);
  reinterpret_cast<DeleteFunction*>(vtable[delete_slot_])(index);
}

Status FaissIndex::Read(const FaissLibrary& library, const std::string& path, bool mmap,
                        std::unique_ptr<FaissIndex>* index) {
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
  } else if (mmap) {
    status = ReadMapped(library, path, file, static_cast<size_t>(information.st_size), index);
  } else {
    FaissLibrary::Index* read = nullptr;
    status = CatchAll(StatusCode::kDataLoss, StrCat("cannot read the FAISS index ", path),
                      [&] { read = library.read_index_(path.c_str(), kIoFlags); });
    if (status.ok()) index->reset(new FaissIndex(library, read, nullptr));
  }
  close(file);
  return status;
}

Status FaissIndex::ReadMapped(const FaissLibrary& library, const std::string& path, int file, size_t size,
                              std::unique_ptr<FaissIndex>* index) {
  auto mapping = std::make_unique<Mapping>();
  void* const data = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
  if (data == MAP_FAILED) {
    return MakeStatus(StatusCode::kResourceExhausted, "cannot map the FAISS index ", path, " (", size,
                      " bytes): ", std::strerror(errno));
  }
  mapping->data = data;
  mapping->size = size;
  FaissLibrary::Index* read = nullptr;
  bool overran_end = false;
  DPSR_RETURN_IF_ERROR(CatchAll(StatusCode::kDataLoss, StrCat("cannot read the FAISS index ", path), [&] {
    FaissLibrary::MemoryReader reader(library, data, size);
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

FaissIndex::~FaissIndex() { library_.Delete(index_); }

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

Status FaissIndex::Search(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels, int nthreads) const {
  if (n < 0 || k < 1 || nthreads < 1) {
    return MakeStatus(StatusCode::kInvalidArgument, "search with n = ", n, ", k = ", k, ", nthreads = ", nthreads,
                      ", expected n >= 0, k >= 1, nthreads >= 1");
  }
  if (n == 0) return Status();
  return CatchAll(StatusCode::kInternal, "FAISS search failed", [&] {
    const FaissLibrary::OmpThreads threads(library_, nthreads);
    library_.Search(index_, n, x, k, distances, labels);
  });
}

}  // namespace dpsr
