// Checks that the binding does not depend on the ABI of std::string: the build compiles it, and this program, with
// _GLIBCXX_USE_CXX11_ABI=0, as TensorFlow Serving's build does. FAISS has the other ABI.
//
//   faiss_old_abi_test WRONG_VERSION_FAISS
//
// looks for libfaiss.so beside this program, as a server does that the ops are linked into. WRONG_VERSION_FAISS is a
// library that claims to be another version. It writes one line for each fault, and ends with status 1 if there is one.
#include <iostream>
#include <memory>
#include <string>

#include "export/faiss_binding/faiss_library.h"

static_assert(_GLIBCXX_USE_CXX11_ABI == 0, "compile this program with -D_GLIBCXX_USE_CXX11_ABI=0");

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: faiss_old_abi_test WRONG_VERSION_FAISS\n";
    return 2;
  }
  bool failed = false;
  // Loading also runs the self-test: it reads, searches and filters small indices, and makes FAISS throw.
  const dpsr::FaissLibrary* faiss = nullptr;
  const dpsr::Status loaded = dpsr::FaissLibrary::Get(&faiss);
  if (!loaded.ok()) {
    std::cerr << "FAISS was not loaded: " << loaded.message() << "\n";
    failed = true;
  } else if (faiss->path().find("/export/../faiss/libfaiss.so") == std::string::npos || faiss->path()[0] != '/') {
    std::cerr << "FAISS was loaded from " << faiss->path() << ", expected the one beside this program's folder\n";
    failed = true;
  }
  std::unique_ptr<dpsr::FaissLibrary> library;
  const dpsr::Status refused = dpsr::FaissLibrary::Load(argv[1], &library);
  if (refused.message().find("it is FAISS version 9.8.7, version 1.15.1 is needed") == std::string::npos) {
    std::cerr << "another version gave: " << refused.message() << "\n";
    failed = true;
  }
  return failed ? 1 : 0;
}
