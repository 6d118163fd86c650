#include "export/faiss_binding/faiss_library.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "export/faiss_binding/faiss_functions.h"
#include "export/faiss_binding/self_test.h"

namespace dpsr {
namespace {

// The CUDA libraries that libfaiss.so of faiss-gpu is linked with: the folder in which pip installs each, and its file
// name. Each one needs those before it.
constexpr const char* kCudaLibraries[][2] = {{"cuda_runtime", "libcudart.so.12"},
                                             {"cublas", "libcublasLt.so.12"},
                                             {"cublas", "libcublas.so.12"}};

// Returns why the last dlopen failed. The text begins with the file name.
std::string LastLinkerError() {
  const char* error = dlerror();
  return error == nullptr ? "unknown error" : error;
}

// Returns the path of the running program, or "" if the system does not say it.
std::string ProgramPath() {
  char path[4096];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  return size > 0 && static_cast<size_t>(size) < sizeof(path) ? std::string(path, size) : "";
}

// Returns the folder of the shared library or program that this code was linked into.
std::string OwnFolder() {
  Dl_info info;
  void* object = nullptr;
  if (dladdr1(reinterpret_cast<void*>(&OwnFolder), &info, &object, RTLD_DL_LINKMAP) == 0 || object == nullptr) {
    return ".";
  }
  // For the program the linker knows argv[0], which is a mere name if the shell found the program on its PATH.
  std::string file = static_cast<const link_map*>(object)->l_name;
  if (file.empty()) file = ProgramPath();
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

// Returns where the library may be, in the order in which the places are tried.
std::vector<std::string> CandidatePaths() {
  const char* chosen = std::getenv("FAISS_LIBRARY");
  if (chosen != nullptr && *chosen != '\0') return {chosen};
  const std::string folder = OwnFolder();
  return {folder + "/libfaiss.so", folder + "/../faiss/libfaiss.so", "libfaiss.so"};
}

// Opens a FAISS library. When that fails although the file exists, loads the CUDA libraries and tries once more.
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

Status CannotOpen(const std::string& failures) {
  return MakeStatus(StatusCode::kFailedPrecondition, "cannot open the FAISS library; ", kFaissRemedy,
                    ". Tried:", failures);
}

}  // namespace

Status FaissLibrary::Get(const FaissLibrary** library) {
  static std::mutex* mutex = new std::mutex;
  static const FaissLibrary* loaded = nullptr;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (loaded == nullptr) {
    std::string failures;
    std::unique_ptr<FaissLibrary> opened;
    for (const std::string& path : CandidatePaths()) {
      void* handle = OpenLibrary(path);
      if (handle != nullptr) {
        DPSR_RETURN_IF_ERROR(Bind(path, handle, &opened));
        break;
      }
      failures += "\n  " + LastLinkerError();
    }
    if (opened == nullptr) return CannotOpen(failures);
    loaded = opened.release();
  }
  *library = loaded;
  return Status();
}

Status FaissLibrary::Load(const std::string& path, std::unique_ptr<FaissLibrary>* library) {
  void* handle = OpenLibrary(path);
  if (handle == nullptr) return CannotOpen("\n  " + LastLinkerError());
  return Bind(path, handle, library);
}

Status FaissLibrary::Bind(const std::string& path, void* handle, std::unique_ptr<FaissLibrary>* library) {
  std::unique_ptr<const FaissFunctions> functions;
  DPSR_RETURN_IF_ERROR(FaissFunctions::LookUp(path, handle, &functions));
  DPSR_RETURN_IF_ERROR(SelfTest(*functions));
  library->reset(new FaissLibrary(path, std::move(functions)));
  return Status();
}

FaissLibrary::FaissLibrary(const std::string& path, std::unique_ptr<const FaissFunctions> functions)
    : path_(path), functions_(std::move(functions)) {}

FaissLibrary::~FaissLibrary() = default;

}  // namespace dpsr
