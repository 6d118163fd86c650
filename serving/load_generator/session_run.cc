// What the graph of a SavedModel costs by itself: runs it on the requests of a file, in one thread and without a server,
// and prints the CPU time of a request. A model server cannot cost less. Of several files, in one argument with commas,
// each is run for so long and has a line.
//
//   dpsr_session_run SAVED_MODEL REQUESTS_FILE[,REQUESTS_FILE...] SECONDS [OP_LIBRARY...]
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "google/protobuf/io/coded_stream.h"
#include "tensorflow/c/c_api.h"
#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow_serving/apis/predict.pb.h"

namespace {

using tensorflow::Tensor;

struct Request {
  std::vector<std::pair<std::string, Tensor>> feeds;
  std::vector<std::string> fetches;
};

[[noreturn]] void Fail(const std::string& error) {
  std::fprintf(stderr, "dpsr_session_run: %s\n", error.c_str());
  std::exit(2);
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

std::vector<Request> ReadRequests(const tensorflow::SavedModelBundleLite& bundle, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  google::protobuf::io::CodedInputStream input(reinterpret_cast<const uint8_t*>(bytes.data()),
                                               static_cast<int>(bytes.size()));
  std::vector<Request> requests;
  uint32_t size;
  std::string text;
  while (input.ReadVarint32(&size)) {
    tensorflow::serving::PredictRequest proto;
    if (!input.ReadString(&text, static_cast<int>(size)) || !proto.ParseFromString(text)) Fail("a broken request");
    const auto signature = bundle.GetSignatures().find(proto.model_spec().signature_name());
    if (signature == bundle.GetSignatures().end()) Fail("no signature " + proto.model_spec().signature_name());
    Request request;
    for (const auto& [alias, info] : signature->second.inputs()) {
      Tensor tensor;
      if (!tensor.FromProto(proto.inputs().at(alias))) Fail("a broken tensor " + alias);
      request.feeds.emplace_back(info.name(), tensor);
    }
    for (const auto& [alias, info] : signature->second.outputs()) request.fetches.push_back(info.name());
    requests.push_back(std::move(request));
  }
  if (requests.empty()) Fail(path + " holds no request");
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
  options.set_inter_op_thread_pool(-1);  // in this thread, as the server does

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
    const double begin = CpuSeconds();
    const size_t count = run(seconds);
    const double microseconds = (CpuSeconds() - begin) / static_cast<double>(count) * 1e6;
    std::printf("{\"requests\": %zu, \"cpu_us\": %.6g}\n", count, microseconds);
  }
}
