// Runs queries on a servable with the ops linked into the program, as in a TensorFlow Serving build, instead of loaded
// from op libraries (docs/tensorflow_serving.md):
//
//   linked_servable BASE/VERSION "first query" "second query" ...
//
// prints the item ids that `serving_default` finds, one line for each query. Set FAISS_LIBRARY to the path of
// libfaiss.so.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/public/session_options.h"

namespace {

// Returns the path of an op library that this process has loaded, or "".
std::string LoadedOpLibrary() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libdpsr_") != std::string::npos) return line.substr(line.find('/'));
  }
  return "";
}

tensorflow::Status Ask(const std::string& path, const std::vector<std::string>& queries) {
  tensorflow::SavedModelBundle bundle;
  TF_RETURN_IF_ERROR(tensorflow::LoadSavedModel(tensorflow::SessionOptions(), tensorflow::RunOptions(), path, {"serve"},
                                                &bundle));
  const auto& signatures = bundle.GetSignatures();
  const auto found = signatures.find("serving_default");
  if (found == signatures.end()) return tensorflow::errors::NotFound(path, ": has no signature serving_default");
  tensorflow::Tensor query(tensorflow::DT_STRING, {static_cast<int64_t>(queries.size())});
  for (size_t i = 0; i < queries.size(); ++i) query.vec<tensorflow::tstring>()(static_cast<int64_t>(i)) = queries[i];
  std::vector<tensorflow::Tensor> outputs;
  TF_RETURN_IF_ERROR(bundle.GetSession()->Run({{found->second.inputs().at("query").name(), query}},
                                              {found->second.outputs().at("item_ids").name()}, {}, &outputs));
  const auto ids = outputs[0].matrix<int64_t>();
  for (int64_t row = 0; row < ids.dimension(0); ++row) {
    for (int64_t i = 0; i < ids.dimension(1); ++i) std::cout << (i == 0 ? "" : " ") << ids(row, i);
    std::cout << "\n";
  }
  return tensorflow::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: linked_servable BASE/VERSION QUERY ...\n";
    return 2;
  }
  const tensorflow::Status status = Ask(argv[1], std::vector<std::string>(argv + 2, argv + argc));
  if (!status.ok()) {
    std::cerr << "linked_servable: " << status.message() << "\n";
    return 1;
  }
  if (const std::string library = LoadedOpLibrary(); !library.empty()) {
    std::cerr << "linked_servable: " << library << " is loaded, expected only the ops of this program\n";
    return 1;
  }
  return 0;
}
