#include "export/faiss_binding/faiss_functions.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <utility>

namespace dpsr {
namespace {

using faiss_layout::VirtualFunction;

// Returns a class name as it appears in mangled names: "IndexFlat" -> "9IndexFlat".
std::string Mangled(const std::string& name) { return std::to_string(name.size()) + name; }

// Returns the number of virtual functions of a class, from the size of its vtable's symbol, or 0 when it is not known.
int VtableSize(void** vtable) {
  Dl_info info;
  void* symbol = nullptr;
  if (dladdr1(vtable, &info, &symbol, RTLD_DL_SYMENT) == 0 || symbol == nullptr) return 0;
  const auto words = static_cast<const ElfW(Sym)*>(symbol)->st_size / sizeof(void*);
  return static_cast<int>(words) - faiss_layout::kVtableHeaderWords;
}

}  // namespace

Status FaissFunctions::LookUp(const std::string& path, void* handle,
                              std::unique_ptr<const FaissFunctions>* functions) {
  std::unique_ptr<FaissFunctions> found(new FaissFunctions(path, handle));
  DPSR_RETURN_IF_ERROR(found->CheckVersion());
  DPSR_RETURN_IF_ERROR(found->LookUpFunctions());
  DPSR_RETURN_IF_ERROR(found->LookUpTypes());
  found->LookUpGpuFunctions();
  DPSR_RETURN_IF_ERROR(found->FindIndexSlots());
  DPSR_RETURN_IF_ERROR(found->FindListSlots());
  DPSR_RETURN_IF_ERROR(found->CheckScannerSlots());
  DPSR_RETURN_IF_ERROR(found->ConstructParameterSpace());
  *functions = std::move(found);
  return Status();
}

Status FaissFunctions::Refuse(const std::string& reason) const {
  return MakeStatus(StatusCode::kFailedPrecondition, "the FAISS library ", path_, " cannot be used: ", reason, "; ",
                    kFaissRemedy);
}

Status FaissFunctions::CheckVersion() {
  faiss_layout::ReturnedString (*get_version)() = nullptr;
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss11get_versionB5cxx11Ev", &get_version));
  std::string version;
  DPSR_RETURN_IF_ERROR(CatchExceptions(StatusCode::kFailedPrecondition, path_ + ": get_version", [&] {
    const faiss_layout::ReturnedString returned = get_version();
    version.assign(returned.data, returned.size);
  }));
  if (version == kFaissVersion) return Status();
  return Refuse(StrCat("it is FAISS version ", version, ", version ", kFaissVersion, " is needed"));
}

Status FaissFunctions::LookUpFunctions() {
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss10read_indexEPKci", &read_index));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss10read_indexEPNS_8IOReaderEi", &read_index_from));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss13index_factoryEiPKcNS_10MetricTypeEb", &index_factory));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss14IndexFlatCodes3addElPKf", &flat_add));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss8IndexIVF5trainElPKf", &ivf_train));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss8IndexIVF3addElPKf", &ivf_add));
  DPSR_RETURN_IF_ERROR(Find("_ZNK5faiss17IndexPreTransform11apply_chainElPKf", &apply_chain));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss8IndexIVF15make_direct_mapEb", &make_direct_map));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss16ZeroCopyIOReaderC1EPKhm", &construct_memory_reader));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss16ZeroCopyIOReaderD1Ev", &destroy_memory_reader));
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss16ZeroCopyIOReader13get_data_viewEPPvmm", &view_memory));
  // dlsym also searches the libraries that FAISS depends on, so these come from the OpenMP runtime that FAISS uses.
  DPSR_RETURN_IF_ERROR(Find("omp_set_num_threads", &omp_set_num_threads));
  return Find("omp_get_max_threads", &omp_get_max_threads);
}

Status FaissFunctions::LookUpTypes() {
  for (const auto& [name, type] : {std::pair{"Index", &index_type_}, std::pair{"IndexIVF", &ivf_type},
                                   std::pair{"IndexIVFFastScan", &fast_scan_type},
                                   std::pair{"IndexIVFScalarQuantizer", &ivf_scalar_type},
                                   std::pair{"IndexHNSW", &hnsw_type}, std::pair{"IndexRefine", &refine_type},
                                   std::pair{"IndexPreTransform", &pre_transform_type}}) {
    const std::string symbol = "_ZTIN5faiss" + Mangled(name) + "E";
    *type = dlsym(handle_, symbol.c_str());
    if (*type == nullptr) return Refuse("it does not export " + symbol);
  }
  return Status();
}

void FaissFunctions::LookUpGpuFunctions() {
  num_gpus = FindIfThere<int()>("_ZN5faiss3gpu13getNumDevicesEv");
  construct_gpu_resources = FindIfThere<void(void*)>("_ZN5faiss3gpu20StandardGpuResourcesC1Ev");
  destroy_gpu_resources = FindIfThere<void(void*)>("_ZN5faiss3gpu20StandardGpuResourcesD1Ev");
  copy_to_gpu = FindIfThere<faiss::Index*(void*, int, const faiss::Index*, const void*)>(
      "_ZN5faiss3gpu16index_cpu_to_gpuEPNS0_20GpuResourcesProviderEiPKNS_5IndexEPKNS0_16GpuClonerOptionsE");
}

bool FaissFunctions::has_gpu() const {
  return num_gpus != nullptr && construct_gpu_resources != nullptr && destroy_gpu_resources != nullptr &&
         copy_to_gpu != nullptr;
}

Status FaissFunctions::FindIndexSlots() {
  for (const std::string name : {"IndexFlat", "IndexIVF", "IndexHNSW", "IndexRefine", "IndexPreTransform"}) {
    const std::string in_class = "5faiss" + Mangled(name);
    DPSR_RETURN_IF_ERROR(FindSameSlot(name, "search()",
                                      "_ZNK" + in_class + "6searchElPKflPfPlPKNS_16SearchParametersE", &search_slot_));
    DPSR_RETURN_IF_ERROR(
        FindSameSlot(name, "reconstruct()", "_ZNK" + in_class + "11reconstructElPf", &reconstruct_slot_));
    // Classes whose destructors are implicit do not export them. IndexRefine and others do. The destructor that also
    // frees the memory follows the one that does not.
    const int destroy = FindSlot(name, "_ZN" + in_class + "D1Ev");
    if (destroy < 0) continue;
    DPSR_RETURN_IF_ERROR(FindSameSlot(name, "the destructor", "_ZN" + in_class + "D0Ev", &delete_slot_));
    if (delete_slot_ != destroy + 1) {
      return Refuse(StrCat("the place of the destructor in the vtable of ", name, " is not as expected"));
    }
  }
  if (delete_slot_ < 0) return Refuse("no index class exports its destructor");
  return Status();
}

Status FaissFunctions::FindListSlots() {
  // These classes inherit it.
  for (const std::string name : {"IndexIVF", "IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"}) {
    DPSR_RETURN_IF_ERROR(FindSameSlot(name, "search_preassigned()",
                                      "_ZNK5faiss8IndexIVF18search_preassignedElPKflPKlS2_PfPlbPKNS_"
                                      "19SearchParametersIVFEPNS_13IndexIVFStatsE",
                                      &search_lists_slot_));
  }
  for (const std::string name : {"IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"}) {
    DPSR_RETURN_IF_ERROR(FindSameSlot(
        name, "get_InvertedListScanner()",
        "_ZNK5faiss" + Mangled(name) + "23get_InvertedListScannerEbPKNS_10IDSelectorEPKNS_19SearchParametersIVFE",
        &new_list_scanner_slot_));
    DPSR_RETURN_IF_ERROR(FindSameSlot(
        name, "encode_vectors()", "_ZNK5faiss" + Mangled(name) + "14encode_vectorsElPKfPKlPhb", &encode_slot_));
    DPSR_RETURN_IF_ERROR(FindSameSlot(
        name, "decode_vectors()", "_ZNK5faiss" + Mangled(name) + "14decode_vectorsElPKhPKlPf", &decode_slot_));
  }
  const std::string lists = "ArrayInvertedLists";
  const std::string in_lists = "_ZNK5faiss" + Mangled(lists);
  list_size_slot_ = FindSlot(lists, in_lists + "9list_sizeEm");
  list_codes_slot_ = FindSlot(lists, in_lists + "9get_codesEm");
  list_ids_slot_ = FindSlot(lists, in_lists + "7get_idsEm");
  if (std::min({list_size_slot_, list_codes_slot_, list_ids_slot_}) < 0) {
    return Refuse("the vtable of ArrayInvertedLists is not as expected");
  }
  return Status();
}

Status FaissFunctions::CheckScannerSlots() const {
  const std::string scanner = "InvertedListScanner";
  const std::string in_scanner = "5faiss" + Mangled(scanner);
  const int set_list = FindSlot(scanner, "_ZN" + in_scanner + "8set_listElf");
  const int iterate =
      FindSlot(scanner, "_ZNK" + in_scanner + "13iterate_codesEPNS_21InvertedListsIteratorEPfPlmRm");
  const int scan =
      FindSlot(scanner, "_ZNK" + in_scanner + "10scan_codesEmPKhPKlRNS_22ResultHandlerUnorderedIflEE");
  if (set_list != faiss_layout::kScannerSetList || iterate != faiss_layout::kScannerIterateCodes ||
      scan != faiss_layout::kScannerScanCodes) {
    return Refuse("the vtable of InvertedListScanner is not as expected");
  }
  return Status();
}

Status FaissFunctions::ConstructParameterSpace() {
  void (*construct)(void*) = nullptr;
  DPSR_RETURN_IF_ERROR(Find("_ZN5faiss14ParameterSpaceC1Ev", &construct));
  DPSR_RETURN_IF_ERROR(
      Find("_ZNK5faiss14ParameterSpace20set_index_parametersEPNS_5IndexEPKc", &set_index_parameters_));
  parameter_space_.fill(kUntouched);
  DPSR_RETURN_IF_ERROR(CatchExceptions(StatusCode::kFailedPrecondition, path_ + ": ParameterSpace",
                                       [&] { construct(parameter_space_.data()); }));
  const auto tail = parameter_space_.begin() + parameter_space_.size() / 2;
  if (!std::all_of(tail, parameter_space_.end(), [](unsigned char byte) { return byte == kUntouched; })) {
    return Refuse("its ParameterSpace is larger than expected");
  }
  return Status();
}

// Returns null when the library does not export the name.
template <typename Function>
Function* FaissFunctions::FindIfThere(const char* mangled_name) const {
  return reinterpret_cast<Function*>(dlsym(handle_, mangled_name));
}

template <typename Function>
Status FaissFunctions::Find(const char* mangled_name, Function** function) const {
  *function = FindIfThere<Function>(mangled_name);
  return *function != nullptr ? Status() : Refuse(StrCat("it does not export ", mangled_name));
}

// Returns the slot in which the vtable of faiss::`class_name` holds the function, or -1.
int FaissFunctions::FindSlot(const std::string& class_name, const std::string& mangled_name) const {
  void** vtable = static_cast<void**>(dlsym(handle_, ("_ZTVN5faiss" + Mangled(class_name) + "E").c_str()));
  const void* address = dlsym(handle_, mangled_name.c_str());
  if (vtable == nullptr || address == nullptr) return -1;
  const int size = VtableSize(vtable);
  for (int slot = 0; slot < size; ++slot) {
    if (vtable[faiss_layout::kVtableHeaderWords + slot] == address) return slot;
  }
  return -1;
}

// Finds the slot of a function in the vtable of one more class. It has to be the one that `slot` holds, unless that is
// still -1.
Status FaissFunctions::FindSameSlot(const std::string& class_name, const char* function,
                                    const std::string& mangled_name, int* slot) const {
  const int found = FindSlot(class_name, mangled_name);
  if (found < 0 || (*slot >= 0 && found != *slot)) {
    return Refuse(StrCat("the place of ", function, " in the vtable of ", class_name, " is not as expected"));
  }
  *slot = found;
  return Status();
}

bool FaissFunctions::IsA(const faiss::Index* index, const void* type_info) const {
  return abi::__dynamic_cast(index, static_cast<const abi::__class_type_info*>(index_type_),
                             static_cast<const abi::__class_type_info*>(type_info), /*src2dst=*/0) != nullptr;
}

void FaissFunctions::SetIndexParameters(faiss::Index* index, const char* parameters) const {
  set_index_parameters_(parameter_space_.data(), index, parameters);
}

void FaissFunctions::Search(const faiss::Index* index, int64_t n, const float* x, int64_t k, float* distances,
                            int64_t* labels, const faiss::SearchParameters* parameters) const {
  using Function = void(const faiss::Index*, int64_t, const float*, int64_t, float*, int64_t*,
                        const faiss::SearchParameters*);
  VirtualFunction<Function>(index, search_slot_)(index, n, x, k, distances, labels, parameters);
}

void FaissFunctions::Reconstruct(const faiss::Index* index, int64_t position, float* x) const {
  using Function = void(const faiss::Index*, int64_t, float*);
  VirtualFunction<Function>(index, reconstruct_slot_)(index, position, x);
}

void FaissFunctions::Delete(faiss::Index* index) const {
  using Function = void(faiss::Index*);
  VirtualFunction<Function>(index, delete_slot_)(index);
}

faiss::InvertedListScanner* FaissFunctions::NewListScanner(const faiss::Index* ivf) const {
  using Function = faiss::InvertedListScanner*(const faiss::Index*, bool store_pairs, const faiss::IDSelector*,
                                               const faiss::SearchParametersIVF*);
  return VirtualFunction<Function>(ivf, new_list_scanner_slot_)(ivf, /*store_pairs=*/false, nullptr, nullptr);
}

void FaissFunctions::SearchLists(const faiss::Index* ivf, int64_t n, const float* x, int64_t k, const int64_t* lists,
                                 const float* list_scores, float* distances, int64_t* labels,
                                 const faiss::SearchParametersIVF* parameters) const {
  using Function = void(const faiss::Index*, int64_t, const float*, int64_t, const int64_t*, const float*, float*,
                        int64_t*, bool store_pairs, const faiss::SearchParametersIVF*, void* stats);
  VirtualFunction<Function>(ivf, search_lists_slot_)(ivf, n, x, k, lists, list_scores, distances, labels,
                                                     /*store_pairs=*/false, parameters, nullptr);
}

void FaissFunctions::EncodeVectors(const faiss::Index* ivf, int64_t n, const float* x, const int64_t* lists,
                                   uint8_t* codes) const {
  using Function = void(const faiss::Index*, int64_t, const float*, const int64_t*, uint8_t*, bool include_lists);
  VirtualFunction<Function>(ivf, encode_slot_)(ivf, n, x, lists, codes, /*include_lists=*/false);
}

void FaissFunctions::DecodeVectors(const faiss::Index* ivf, int64_t n, const uint8_t* codes, const int64_t* lists,
                                   float* x) const {
  using Function = void(const faiss::Index*, int64_t, const uint8_t*, const int64_t*, float*);
  VirtualFunction<Function>(ivf, decode_slot_)(ivf, n, codes, lists, x);
}

size_t FaissFunctions::ListSize(const faiss::InvertedLists* lists, size_t list) const {
  using Function = size_t(const faiss::InvertedLists*, size_t);
  return VirtualFunction<Function>(lists, list_size_slot_)(lists, list);
}

const uint8_t* FaissFunctions::ListCodes(const faiss::InvertedLists* lists, size_t list) const {
  using Function = const uint8_t*(const faiss::InvertedLists*, size_t);
  return VirtualFunction<Function>(lists, list_codes_slot_)(lists, list);
}

const void* FaissFunctions::ListIds(const faiss::InvertedLists* lists, size_t list) const {
  using Function = const void*(const faiss::InvertedLists*, size_t);
  return VirtualFunction<Function>(lists, list_ids_slot_)(lists, list);
}

}  // namespace dpsr
