// Test fixture: a shared library that exports faiss::get_version() and nothing else, and says a version that does not
// exist.
#include <string>

namespace faiss {

__attribute__((visibility("default"))) std::string get_version();
std::string get_version() { return "9.8.7"; }

}  // namespace faiss
