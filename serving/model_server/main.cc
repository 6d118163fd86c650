// The model server: serves SavedModels over TensorFlow Serving's gRPC API, and loads op libraries. See --help.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "serving/model_server/grpc_server.h"
#include "serving/model_server/log.h"
#include "serving/model_server/model_manager.h"
#include "serving/model_server/server_options.h"
#include "tensorflow/c/c_api.h"
#include "tensorflow/core/public/version.h"

namespace dpsr::serving {
namespace {

using std::chrono::seconds;

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

// After a signal running requests get kDrain to end, and all of the server kDrain + kTeardown.
constexpr seconds kDrain(10);
constexpr seconds kTeardown(5);

// TensorFlow logs from initialisers that run before main, and reads the level of its log from the environment. So where
// the user has not set one, the program starts itself once more with it, from the one hook that runs still earlier.
void QuietTensorFlow(int /*argc*/, char** argv, char** environment) {
  constexpr char kLevel[] = "TF_CPP_MIN_LOG_LEVEL=";
  static char quiet[] = "TF_CPP_MIN_LOG_LEVEL=3";
  static char* extended[4096];
  size_t count = 0;
  for (; environment[count] != nullptr; ++count) {
    if (std::strncmp(environment[count], kLevel, sizeof(kLevel) - 1) == 0) return;
    if (count + 2 == std::size(extended)) return;
    extended[count] = environment[count];
  }
  extended[count] = quiet;
  char self[4096];  // not /proc/self/exe itself: the process would be named `exe`
  const ssize_t size = readlink("/proc/self/exe", self, sizeof(self) - 1);
  if (size <= 0) return;
  self[size] = '\0';
  execve(self, argv, extended);  // where it fails, the log is noisy
}

__attribute__((section(".preinit_array"), used)) void (*const kQuietTensorFlow)(int, char**,
                                                                                char**) = QuietTensorFlow;

int FailToStart(const std::string& error) {
  std::fprintf(stderr, "Failed to start server. Error: %s\n", error.c_str());
  return kFailed;
}

Status CheckTensorFlowVersion() {
  if (std::strcmp(TF_Version(), TF_VERSION_STRING) == 0) return {};
  return MakeStatus(StatusCode::kFailedPrecondition, "this server was built for TensorFlow ", TF_VERSION_STRING,
                    ", but found TensorFlow ", TF_Version(), "; install tensorflow==", TF_VERSION_STRING,
                    ", or build the server again");
}

Status LoadOpLibrary(const std::string& path) {
  const std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)> status(TF_NewStatus(), TF_DeleteStatus);
  // The library stays loaded; only the list of its ops is let go.
  TF_Library* library = TF_LoadLibrary(path.c_str(), status.get());
  if (TF_GetCode(status.get()) != TF_OK) {
    return MakeStatus(StatusCode::kFailedPrecondition, "--op_library: cannot load ", path, ": ",
                      TF_Message(status.get()));
  }
  TF_DeleteLibraryHandle(library);
  return {};
}

ModelManagerOptions ManagerOptions(const ServerOptions& options) {
  int32_t intra = options.tensorflow_intra_op_parallelism;
  int32_t inter = options.tensorflow_inter_op_parallelism;
  if (options.tensorflow_session_parallelism > 0) {
    if (intra == 0) intra = options.tensorflow_session_parallelism;
    if (inter == 0) inter = options.tensorflow_session_parallelism;
  }
  ModelManagerOptions result;
  result.models.push_back({options.model_name, options.model_base_path});
  result.poll_wait_seconds = options.file_system_poll_wait_seconds;
  result.servable.tags.insert(options.saved_model_tags.begin(), options.saved_model_tags.end());
  result.servable.session_options.config.set_intra_op_parallelism_threads(intra);
  result.servable.session_options.config.set_inter_op_parallelism_threads(inter);
  result.servable.run_in_caller_thread = inter <= 1;
  result.servable.tensor_content = options.enable_serialization_as_tensor_content;
  return result;
}

// True when SIGTERM or SIGINT has come, which all threads block.
bool TakeSignal(const sigset_t& signals) {
  const timespec none{};
  return sigtimedwait(&signals, nullptr, &none) > 0;
}

// Serves until a signal comes; returns the exit status.
int Serve(const ServerOptions& options, const sigset_t& signals) {
  const int cpus = std::max(1u, std::thread::hardware_concurrency());
  ModelManager models(ManagerOptions(options));
  std::unique_ptr<GrpcServer> server;
  // Listens before it loads, so that a port in use shows at once and clients can watch the state of the models.
  const int num_threads = options.grpc_max_threads > 0 ? options.grpc_max_threads : 4 * cpus;
  const Status listening = GrpcServer::Start(options.host, options.port, num_threads, &models, &server);
  if (!listening.ok()) return FailToStart(listening.message());
  models.Start();

  int exit_status = 0;
  bool stopped = false;
  std::optional<tensorflow::Status> loaded;
  while (!loaded && !stopped) {
    loaded = models.AwaitFirstLoads(std::chrono::milliseconds(100));
    stopped = TakeSignal(signals);
  }
  if (loaded && !loaded->ok()) {
    exit_status = FailToStart(loaded->ToString());
  } else if (!stopped) {
    std::printf("Running gRPC ModelServer at %s ...\n", ServerAddress(options.host, server->port()).c_str());
    std::fflush(stdout);
    int signal = 0;
    sigwait(&signals, &signal);
  }

  // A second signal ends the process at once, and so does time: a load or a request may never end.
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  std::thread([exit_status] {
    std::this_thread::sleep_for(kDrain + kTeardown);
    LogWarning("requests or loads did not end in time; leaving them behind");
    std::_Exit(exit_status);
  }).detach();
  if (exit_status == 0) LogInfo("stopping: no new requests; those that run get ", kDrain.count(), " s to end");
  server->Shutdown(kDrain);
  return exit_status;
}

int Main(int argc, char** argv) {
  ServerOptions options;
  std::vector<std::string> unknown;
  const Status parsed = ParseServerOptions(argc, argv, &options, &unknown);
  if (!parsed.ok()) {
    std::fprintf(stderr, "%s\n", parsed.message().c_str());
    return kBadUsage;
  }
  for (const std::string& argument : unknown) {
    std::fprintf(stderr, "unknown argument ignored: %s\n", argument.c_str());
  }
  if (options.help) {
    std::fputs(ServerOptionsHelp().c_str(), stdout);
    return 0;
  }
  if (options.version) {
    std::printf("dpsr_model_server, built for TensorFlow %s\n", TF_VERSION_STRING);
    std::printf("TensorFlow Library: %s\n", TF_Version());
    return 0;
  }
  const Status valid = ValidateServerOptions(options);
  if (!valid.ok()) return FailToStart(valid.message());
  const Status version = CheckTensorFlowVersion();
  if (!version.ok()) return FailToStart(version.message());

  // Before the first thread, which inherits the mask.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // gRPC's own errors reach our log in our words.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  for (const std::string& path : options.op_libraries) {
    const Status loaded = LoadOpLibrary(path);
    if (!loaded.ok()) return FailToStart(loaded.message());
  }
  const int exit_status = Serve(options, signals);
  if (exit_status == 0) LogInfo("stopped");
  return exit_status;
}

}  // namespace
}  // namespace dpsr::serving

int main(int argc, char** argv) { return dpsr::serving::Main(argc, argv); }
