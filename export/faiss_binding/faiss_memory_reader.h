// Internal to export/faiss_binding/. Lets FAISS read an index from memory.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_MEMORY_READER_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_MEMORY_READER_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "export/faiss_binding/faiss_functions.h"

namespace dpsr {

// A faiss::ZeroCopyIOReader. An index that is read from it points into its memory instead of copying large arrays.
//
// FAISS's own mapping of files (IO_FLAG_MMAP_IFC) does the same, but version 1.15.1 reads past the end when a truncated
// file ends within a number. This reader stops at the end, with one exception: if only a part of the last item of an
// array is left, it may still deliver that item. Its position is then behind the end, all further reads fail, and
// OverranEnd() returns true.
class FaissMemoryReader {
 public:
  FaissMemoryReader(const FaissFunctions& faiss, const void* data, size_t size) : faiss_(faiss) {
    object_.fill(kUntouched);
    faiss_.construct_memory_reader(object_.data(), static_cast<const uint8_t*>(data), size);
  }
  ~FaissMemoryReader() { faiss_.destroy_memory_reader(object_.data()); }
  FaissMemoryReader(const FaissMemoryReader&) = delete;
  FaissMemoryReader& operator=(const FaissMemoryReader&) = delete;

  faiss::IOReader* get() { return reinterpret_cast<faiss::IOReader*>(object_.data()); }

  // Sets `view` to the next `items` items of `item_size` bytes, and returns how many of them there are.
  size_t View(void** view, size_t item_size, size_t items) {
    return faiss_.view_memory(object_.data(), view, item_size, items);
  }

  // To be called once, after the last read. FAISS is asked for one more byte: it delivers one, or none at the end.
  // Behind the end it computes a negative number of bytes, which wraps around.
  bool OverranEnd() {
    void* unused = nullptr;
    return View(&unused, 1, 1) > 1;
  }

  // Returns whether the object fits into the memory it was given.
  bool Fits() const { return object_.back() == kUntouched; }

 private:
  const FaissFunctions& faiss_;
  alignas(64) std::array<unsigned char, 256> object_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_MEMORY_READER_H_
