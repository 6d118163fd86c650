// The libfaiss.so of the faiss-cpu or faiss-gpu wheel, opened at run time.
//
// This folder is the only place that knows how FAISS looks in memory; docs/faiss_binding.md says why it binds at run
// time and what a new FAISS version needs. The rest of the project uses four headers of it:
//
//   faiss_library.h       opens and checks the library
//   faiss_index.h         reads an index file, searches it, reads its inverted lists, copies it to a GPU
//   faiss_list_scanner.h  scores single codes of an inverted list
//   search_parameters.h   nprobe, efSearch and k_factor_rf of one search
//
//   const FaissLibrary* faiss = nullptr;
//   DPSR_RETURN_IF_ERROR(FaissLibrary::Get(&faiss));
//   std::unique_ptr<FaissIndex> index;
//   DPSR_RETURN_IF_ERROR(FaissIndex::Read(*faiss, "items.faiss", /*mmap=*/true, &index));
//   DPSR_RETURN_IF_ERROR(index->SetParameters("nprobe=32"));
//   DPSR_RETURN_IF_ERROR(index->Search(n, x, k, distances, labels));
//
// FAISS reports errors by exceptions. They end in this folder: everything here returns a dpsr::Status.
//
// The other headers are internal. They are, from the bottom up: faiss_layout.h (field offsets, vtable slots, parameter
// structs), faiss_functions.h (mangled names, and calls through what they name), faiss_memory_reader.h, self_test.h,
// faiss_gpu_copy.h and mapped_file.h.
#ifndef DPSR_EXPORT_FAISS_BINDING_FAISS_LIBRARY_H_
#define DPSR_EXPORT_FAISS_BINDING_FAISS_LIBRARY_H_

#include <memory>
#include <string>

#include "common/status.h"

namespace dpsr {

class FaissFunctions;

// One loaded and self-tested libfaiss.so. Immutable and thread-safe.
class FaissLibrary {
 public:
  // Returns the library of this process. The first successful call loads it, and it stays loaded until the process
  // ends. Thread-safe.
  //
  // If the environment variable FAISS_LIBRARY is set, only that file is tried. Otherwise these are tried in order, and
  // the first one that can be opened counts: libfaiss.so in the folder of the shared library or program that contains
  // this code; ../faiss/libfaiss.so seen from that folder (where both packages are in one site-packages); libfaiss.so
  // on the dynamic linker's search path. The library of faiss-gpu needs CUDA libraries. They are taken from the dynamic
  // linker's search path, or from ../nvidia beside FAISS's folder, where pip puts them.
  //
  // Errors: FailedPrecondition (no library can be opened, it has another version, it fails the self-test). The message
  // names the path and says what to install.
  static Status Get(const FaissLibrary** library);

  // Opens and tests the given file. Errors as for Get. The file stays mapped even when it is refused or the object is
  // destroyed, because it is not safe to unload a library that has started OpenMP threads.
  static Status Load(const std::string& path, std::unique_ptr<FaissLibrary>* library);

  ~FaissLibrary();
  FaissLibrary(const FaissLibrary&) = delete;
  FaissLibrary& operator=(const FaissLibrary&) = delete;

  // Returns the file name that was given to the dynamic linker.
  const std::string& path() const { return path_; }

 private:
  friend class FaissIndex;

  FaissLibrary(const std::string& path, std::unique_ptr<const FaissFunctions> functions);
  static Status Bind(const std::string& path, void* handle, std::unique_ptr<FaissLibrary>* library);

  const std::string path_;
  const std::unique_ptr<const FaissFunctions> functions_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FAISS_BINDING_FAISS_LIBRARY_H_
