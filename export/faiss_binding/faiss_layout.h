// Internal to export/faiss_binding/. What the binding assumes about the memory layout of FAISS 1.15.1: where fields are
// in its objects, where three functions are in a vtable, and how its search parameters are laid out. No other file
// contains such an assumption, and none of them is known at compile time: self_test.cc and faiss_functions.cc check all
// of them whenever the library is loaded.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_LAYOUT_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_LAYOUT_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

// FAISS finds out by dynamic_cast which parameters it was given, and dynamic_cast compares the names of types. So these
// structs need FAISS's own names and default visibility. Their `others` are fields that the binding leaves at zero.
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
  size_t max_codes = 0;            // 0 means no limit
  unsigned char others[240] = {};  // pointers
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

namespace dpsr::faiss_layout {

// Offsets of fields, in bytes from the start of an object.
inline constexpr size_t kIndexD = 8;
inline constexpr size_t kIndexNtotal = 16;
inline constexpr size_t kIndexIsTrained = 25;
inline constexpr size_t kIndexMetricType = 28;
inline constexpr size_t kIvfQuantizer = 48;  // of IndexIVF
inline constexpr size_t kIvfNlist = 56;
inline constexpr size_t kIvfNprobe = 144;
inline constexpr size_t kIvfMaxCodes = 152;
inline constexpr size_t kIvfInvlists = 160;
inline constexpr size_t kInvertedListsNlist = 8;
inline constexpr size_t kInvertedListsCodeSize = 16;
inline constexpr size_t kPreTransformIndex = 64;
inline constexpr size_t kRefineBaseIndex = 40;
inline constexpr size_t kRefineKFactor = 60;
inline constexpr size_t kHnswEfSearch = 5232;  // IndexHNSW::hnsw.efSearch

// Slots in the vtable of InvertedListScanner. set_list, iterate_codes and scan_codes are not pure virtual, so that
// their slots are checked by their addresses. set_query and distance_to_code, which are pure virtual, are declared just
// before and just after set_list. The two destructors follow scan_codes, the last function.
inline constexpr int kScannerSetQuery = 0;
inline constexpr int kScannerSetList = 1;
inline constexpr int kScannerDistanceToCode = 2;
inline constexpr int kScannerIterateCodes = 3;
inline constexpr int kScannerScanCodes = 6;
inline constexpr int kScannerDelete = kScannerScanCodes + 2;

// Number of words before the first function of a vtable: the offset to the top of the object, and the type info. The
// symbol of a vtable points at them; the vtable pointer of an object points behind them.
inline constexpr int kVtableHeaderWords = 2;

// A std::string that FAISS returns. FAISS is compiled with the new ABI of libstdc++. This code may be compiled with the
// old one (_GLIBCXX_USE_CXX11_ABI=0, as TensorFlow Serving's build has it), in which std::string is another type. Like
// std::string it has a destructor, so the compiler passes it through memory that the caller provides.
struct ReturnedString {
  const char* data;
  size_t size;
  char local[16];  // the text, if it fits

  ReturnedString() = delete;
  ReturnedString(const ReturnedString&) = delete;
  ReturnedString& operator=(const ReturnedString&) = delete;
  ~ReturnedString() {
    if (data != local) ::operator delete(const_cast<char*>(data));
  }
};
static_assert(sizeof(ReturnedString) == 32);

// Returns the field of type T that begins `offset` bytes after the start of `object`.
template <typename T>
T ReadField(const void* object, size_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(object) + offset, sizeof(value));
  return value;
}

// Returns the function in a slot of an object's vtable.
template <typename Function>
Function* VirtualFunction(const void* object, int slot) {
  void* const* const vtable = *static_cast<void* const* const*>(object);
  return reinterpret_cast<Function*>(vtable[slot]);
}

}  // namespace dpsr::faiss_layout

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_LAYOUT_H_
