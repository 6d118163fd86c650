// Measures the CPU time that the graph of a SavedModel needs without a server: runs it on the requests of a file, in
// one thread, and prints the CPU time of a request. A model server cannot need less. Several files are separated by
// commas; each one is run for SECONDS and gets a line of output.
//
//   dpsr_session_run SAVED_MODEL REQUESTS_FILE[,REQUESTS_FILE...] SECONDS [OP_LIBRARY...]
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "serving/load_generator/programs.h"
#include "tensorflow/c/c_api.h"
#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow_serving/apis/predict.pb.h"

namespace {

using dpsr::serving::Fail;
using dpsr::serving::OwnCpuSeconds;
using tensorflow::Tensor;

struct Request {
  std::vector<std::pair<std::string, Tensor>> feeds;
  std::vector<std::string> fetches;
};

std::vector<Request> ReadRequests(const tensorflow::SavedModelBundleLite& bundle, const std::string& path) {
  std::vector<Request> requests;
  for (const std::string& text : dpsr::serving::ReadRequestsFile(path)) {
    tensorflow::serving::PredictRequest proto;
    if (!proto.ParseFromString(text)) Fail(path + " holds a request that is not a PredictRequest");
    const auto signature = bundle.GetSignatures().find(proto.model_spec().signature_name());
    if (signature == bundle.GetSignatures().end()) Fail("no signature " + proto.model_spec().signature_name());
    Request request;
    for (const auto& [alias, info] : signature->second.inputs()) {
      Tensor tensor;
      if (!tensor.FromProto(proto.inputs().at(alias))) Fail("the tensor " + alias + " of a request cannot be read");
      request.feeds.emplace_back(info.name(), tensor);
    }
    for (const auto& [alias, info] : signature->second.outputs()) request.fetches.push_back(info.name());
    requests.push_back(std::move(request));
  }
  return requests;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) Fail("usage: dpsr_session_run SAVED_MODEL REQUESTS_FILE[,REQUESTS_FILE...] SECONDS [OP_LIBRARY...]");
  TF_Status* loaded = TF_NewStatus();
  for (int i = 4; i < argc; ++i) {
    TF_LoadLibrary(argv[i], loaded);
    if (TF_GetCode(loaded) != TF_OK) Fail(TF_Message(loaded));
  }
  TF_DeleteStatus(loaded);
  tensorflow::SavedModelBundleLite bundle;
  const tensorflow::Status status = tensorflow::LoadSavedModel({}, {}, argv[1], {"serve"}, &bundle);
  if (!status.ok()) Fail(status.ToString());
  tensorflow::RunOptions options;
  // Runs the graph in this thread, as the server does.
  options.set_inter_op_thread_pool(-1);

  const double seconds = std::atof(argv[3]);
  std::istringstream paths(argv[2]);
  for (std::string path; std::getline(paths, path, ',');) {
    const std::vector<Request> requests = ReadRequests(bundle, path);
    size_t next = 0;
    const auto run = [&](double for_seconds) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(for_seconds);
      size_t count = 0;
      std::vector<Tensor> results;
      for (; count == 0 || std::chrono::steady_clock::now() < end; ++count, ++next) {
        const Request& request = requests[next % requests.size()];
        const tensorflow::Status ran =
            bundle.GetSession()->Run(options, request.feeds, request.fetches, {}, &results, nullptr);
        if (!ran.ok()) Fail(ran.ToString());
      }
      return count;
    };
    run(seconds / 4);
    const double begin = OwnCpuSeconds();
    const size_t count = run(seconds);
    const double microseconds = (OwnCpuSeconds() - begin) / static_cast<double>(count) * 1e6;
    std::printf("{\"requests\": %zu, \"cpu_us\": %.6g}\n", count, microseconds);
  }
}
