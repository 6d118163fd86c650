// The model server, which serves SavedModels over TensorFlow Serving's gRPC and REST APIs, and loads op libraries. See
// --help.
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "google/protobuf/stubs/logging.h"
#include "serving/model_server/batching.h"
#include "serving/model_server/grpc_server.h"
#include "serving/model_server/log.h"
#include "serving/model_server/model_manager.h"
#include "serving/model_server/request_handler.h"
#include "serving/model_server/request_log.h"
#include "serving/model_server/request_scope.h"
#include "serving/model_server/rest_api.h"
#include "serving/model_server/rest_server.h"
#include "serving/model_server/server_config.h"
#include "serving/model_server/server_files.pb.h"
#include "serving/model_server/server_options.h"
#include "serving/model_server/tls.h"
#include "serving/model_server/worker_pool.h"
#include "tensorflow/c/c_api.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/public/version.h"

namespace dpsr::serving {
namespace {

using std::chrono::seconds;

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

// One thread reads and writes some hundred thousand small messages in a second.
constexpr int kMostConnectionThreads = 4;

// After a signal, running requests have kDrain to end, and the whole server has kDrain + kTeardown.
constexpr seconds kDrain(10);
constexpr seconds kTeardown(5);

// TensorFlow writes log lines from initialisers that run before main, and reads its log level from the environment. So,
// if the user has not set a level, the program starts itself again with one, from the only hook that runs even earlier.
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
  // With /proc/self/exe itself the process would be named `exe`.
  char self[4096];
  const ssize_t size = readlink("/proc/self/exe", self, sizeof(self) - 1);
  if (size <= 0) return;
  self[size] = '\0';
  // If this fails, TensorFlow's log lines appear.
  execve(self, argv, extended);
}

__attribute__((section(".preinit_array"), used)) void (*const kQuietTensorFlow)(int, char**,
                                                                                char**) = QuietTensorFlow;

int NumCpus() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

// Raises the limit of open files as far as the system allows, because each connection takes one.
void RaiseFileLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

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
  // The library stays loaded; this only frees the list of its ops.
  TF_Library* library = TF_LoadLibrary(path.c_str(), status.get());
  if (TF_GetCode(status.get()) != TF_OK) {
    return MakeStatus(StatusCode::kFailedPrecondition, "--op_library: cannot load ", path, ": ",
                      TF_Message(status.get()));
  }
  TF_DeleteLibraryHandle(library);
  return {};
}

// Reads --tensorflow_session_config_file, and then the other flags for sessions, which override it.
tensorflow::Status ReadSessionConfig(const ServerOptions& options, tensorflow::ConfigProto* config) {
  if (!options.tensorflow_session_config_file.empty()) {
    TF_RETURN_IF_ERROR(ReadTextProto(options.tensorflow_session_config_file, config));
  }
  int32_t intra = options.tensorflow_intra_op_parallelism;
  int32_t inter = options.tensorflow_inter_op_parallelism;
  if (options.tensorflow_session_parallelism > 0) {
    if (intra == 0) intra = options.tensorflow_session_parallelism;
    if (inter == 0) inter = options.tensorflow_session_parallelism;
  }
  if (intra > 0) config->set_intra_op_parallelism_threads(intra);
  if (inter > 0) config->set_inter_op_parallelism_threads(inter);
  return tensorflow::OkStatus();
}

tensorflow::Status ReadManagerOptions(const ServerOptions& options, ModelManagerOptions* result) {
  result->poll_wait_seconds = options.file_system_poll_wait_seconds;
  result->num_load_threads = options.num_load_threads;
  result->num_unload_threads = options.num_unload_threads;
  result->max_num_load_retries = options.max_num_load_retries;
  result->load_retry_interval_micros = options.load_retry_interval_micros;
  result->flush_file_system_caches = options.flush_filesystem_caches;
  result->warmup_iterations =
      options.enable_model_warmup ? std::max(1, options.num_request_iterations_for_warmup) : 0;
  result->allow_labels_for_unavailable = options.allow_version_labels_for_unavailable_models;
  result->servable.tags.insert(options.saved_model_tags.begin(), options.saved_model_tags.end());
  tensorflow::ConfigProto* session = &result->servable.session_options.config;
  TF_RETURN_IF_ERROR(ReadSessionConfig(options, session));
  result->servable.run_in_caller_thread = session->inter_op_parallelism_threads() <= 1;
  result->servable.check_method_names = options.enable_signature_method_name_check;
  result->servable.tensor_content = options.enable_serialization_as_tensor_content;
  return tensorflow::OkStatus();
}

tensorflow::Status StartBatching(const ServerOptions& options, std::shared_ptr<BatchThreads>* threads) {
  if (!options.enable_batching) return tensorflow::OkStatus();
  BatchingParameters parameters;
  if (!options.batching_parameters_file.empty()) {
    TF_RETURN_IF_ERROR(ReadTextProto(options.batching_parameters_file, &parameters));
  }
  return BatchThreads::Start(parameters, options.enable_per_model_batching_parameters, threads);
}

// Returns how many requests are handled at the same time by default. A request that waits for its batch occupies a
// thread, so there are enough threads for the batches that run and for as many that are being filled, up to a limit.
int NumWorkers(const BatchThreads* batch_threads) {
  constexpr int64_t kMostForBatches = 256;
  int64_t workers = 4 * NumCpus();
  if (batch_threads != nullptr) {
    const BatchingParameters& parameters = batch_threads->parameters();
    const int64_t rows = std::min(parameters.max_batch_size().value(), kMostForBatches);
    workers = std::max(workers, std::min(2 * rows * parameters.num_batch_threads().value(), kMostForBatches));
  }
  return static_cast<int>(workers);
}

// Reads the models from the flags. `text` gets the text of --model_config_file.
tensorflow::Status ReadModels(const ServerOptions& options, std::string* text, std::vector<ModelConfig>* models) {
  if (options.model_config_file.empty()) {
    models->push_back({options.model_name, options.model_base_path, {}, {}});
    return tensorflow::OkStatus();
  }
  tensorflow::serving::ModelServerConfig config;
  TF_RETURN_IF_ERROR(tensorflow::ReadFileToString(tensorflow::Env::Default(), options.model_config_file, text));
  const tensorflow::Status parsed = ParseTextProto(*text, &config);
  if (!parsed.ok()) {
    return absl::InvalidArgumentError(StrCat(options.model_config_file, ": ", std::string(parsed.message())));
  }
  return ModelsOf(config, models);
}

tensorflow::Status ReadGrpcOptions(const ServerOptions& options, GrpcServerOptions* result) {
  result->host = options.host;
  result->port = options.port;
  result->socket_path = options.grpc_socket_path;
  result->health_service = options.enable_grpc_healthcheck_service;
  result->reload_address = options.reload_address;
  result->channel_arguments = options.ChannelArguments();
  result->max_held_bytes = static_cast<size_t>(options.max_held_bytes);
  result->threads = std::min(NumCpus(), kMostConnectionThreads);
  if (options.ssl_config_file.empty()) return tensorflow::OkStatus();
  return TlsFile::Open("--ssl_config_file", options.ssl_config_file, "h2", &result->tls);
}

// Reads the path of the metrics on the REST port. It is empty if they are not shown.
tensorflow::Status ReadMetricsPath(const ServerOptions& options, std::string* path) {
  if (options.monitoring_config_file.empty()) return tensorflow::OkStatus();
  MonitoringConfig config;
  TF_RETURN_IF_ERROR(ReadTextProto(options.monitoring_config_file, &config));
  if (!config.prometheus_config().enable()) return tensorflow::OkStatus();
  *path = config.prometheus_config().path().empty() ? "/monitoring/prometheus/metrics"
                                                    : config.prometheus_config().path();
  return tensorflow::OkStatus();
}

// Applies --model_config_file again when its text has changed. If that fails, for example because a label names a
// version that is still to come, tries again. A file that cannot be read or is wrong changes nothing.
class ConfigFilePoller {
 public:
  // `text` is the text of the file that `models` serves now.
  ConfigFilePoller(const ServerOptions& options, std::string text, ModelManager* models)
      : path_(options.model_config_file), served_text_(std::move(text)) {
    if (path_.empty() || options.model_config_file_poll_wait_seconds == 0) return;
    const seconds wait(options.model_config_file_poll_wait_seconds);
    thread_ = std::thread([this, models, wait] {
      std::unique_lock<std::mutex> lock(mutex_);
      while (!stop_.wait_for(lock, wait, [this] { return stopping_; })) {
        lock.unlock();
        ReadAgain(models);
        lock.lock();
      }
    });
  }
  ~ConfigFilePoller() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    stop_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void ReadAgain(ModelManager* models) {
    std::string text;
    tensorflow::Status status = tensorflow::ReadFileToString(tensorflow::Env::Default(), path_, &text);
    if (status.ok() && text == served_text_) return;
    tensorflow::serving::ModelServerConfig config;
    std::vector<ModelConfig> read;
    std::set<std::string> fresh;
    if (status.ok()) status = ParseTextProto(text, &config);
    // A file that is empty, perhaps because it is being written, must not remove all models.
    if (status.ok() && config.config_case() == tensorflow::serving::ModelServerConfig::CONFIG_NOT_SET) {
      status = absl::FailedPreconditionError("it is empty; to serve no model, write model_config_list {}");
    }
    if (status.ok()) status = ModelsOf(config, &read);
    if (status.ok()) status = models->Configure(read, &fresh);
    const std::string problem = status.ok() ? "" : status.ToString();
    if (status.ok()) {
      LogInfo("now serving the models of ", path_);
      served_text_ = std::move(text);
    } else if (problem != problem_) {
      LogWarning(path_, " was not applied: ", problem);
    }
    problem_ = problem;
  }

  const std::string path_;
  std::string served_text_;
  std::string problem_;  // of the last text that was not applied; logged when it changes
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;
};

// Returns true when SIGTERM or SIGINT has come, which all threads block.
bool SignalHasCome(const sigset_t& signals) {
  const timespec no_wait{};
  return sigtimedwait(&signals, nullptr, &no_wait) > 0;
}

// The settings of the server, read from the flags and from the files that they name.
struct ServerSetup {
  ModelManagerOptions manager;
  GrpcServerOptions grpc;
  std::shared_ptr<TlsFile> rest_tls;
  std::vector<ModelConfig> models;
  std::string model_config_text;  // of --model_config_file
  std::string metrics_path;       // on the REST port; empty: the server shows no metrics
};

tensorflow::Status ReadSetup(const ServerOptions& options, ServerSetup* setup) {
  TF_RETURN_IF_ERROR(ReadManagerOptions(options, &setup->manager));
  TF_RETURN_IF_ERROR(ReadModels(options, &setup->model_config_text, &setup->models));
  TF_RETURN_IF_ERROR(ReadGrpcOptions(options, &setup->grpc));
  if (!options.rest_api_ssl_config_file.empty()) {
    TF_RETURN_IF_ERROR(
        TlsFile::Open("--rest_api_ssl_config_file", options.rest_api_ssl_config_file, "http/1.1", &setup->rest_tls));
  }
  TF_RETURN_IF_ERROR(StartBatching(options, &setup->manager.servable.batch_threads));
  return ReadMetricsPath(options, &setup->metrics_path);
}

// Starts the REST server if the flags ask for one.
Status StartRest(const ServerOptions& options, std::shared_ptr<TlsFile> tls, int grpc_port, const RestApi* api,
                 WorkerPool* workers, RequestLog* log, std::unique_ptr<RestServer>* server) {
  if (options.rest_api_port == 0) return {};
  if (options.rest_api_port == grpc_port) {
    LogWarning("--rest_api_port=", grpc_port, " is the gRPC port; the server has no REST API");
    return {};
  }
  RestServerOptions rest;
  rest.host = options.host;
  rest.port = options.rest_api_port;
  rest.num_threads = NumCpus();
  rest.timeout = std::chrono::milliseconds(options.rest_api_timeout_in_ms);
  rest.enable_cors = options.rest_api_enable_cors_support;
  rest.tls = std::move(tls);
  return RestServer::Start(rest, api, workers, log, server);
}

// Waits for the first loads or a signal, whichever comes first. Nothing: a signal came.
std::optional<tensorflow::Status> AwaitFirstLoads(ModelManager* models, const sigset_t& signals) {
  for (;;) {
    std::optional<tensorflow::Status> loaded = models->AwaitFirstLoads(std::chrono::milliseconds(100));
    if (loaded && !loaded->ok()) return loaded;
    if (SignalHasCome(signals)) return std::nullopt;
    if (loaded) return loaded;
  }
}

void PrintAddresses(const ServerOptions& options, const GrpcServer& grpc, const RestServer* rest) {
  std::printf("Running gRPC ModelServer at %s ...\n", ServerAddress(options.host, grpc.port()).c_str());
  if (rest != nullptr) {
    std::printf("Exporting HTTP%s/REST API at:%s ...\n", options.rest_api_ssl_config_file.empty() ? "" : "S",
                ServerAddress(options.host, rest->port()).c_str());
  }
  std::fflush(stdout);
}

// Ends both servers once their running requests have ended. A second signal ends the process at once, and so does the
// time limit: a load or a request may never end.
void ShutDown(int exit_status, const sigset_t& signals, ModelManager* models, GrpcServer* grpc, RestServer* rest) {
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  try {
    std::thread([exit_status] {
      std::this_thread::sleep_for(kDrain + kTeardown);
      LogWarning("some requests or loads did not end in time; stopping without them");
      std::_Exit(exit_status);
    }).detach();
  } catch (const std::system_error&) {
    // The process may have no more threads. Then a signal ends it.
    alarm(static_cast<unsigned>((kDrain + kTeardown).count()));
  }
  if (exit_status == 0) LogInfo("stopping: running requests have ", kDrain.count(), " s to end");
  models->EndWaits();
  // At the same time, or one after the other if there can be no more threads.
  const std::future<void> rest_drain = std::async(std::launch::async | std::launch::deferred, [&] {
    if (rest != nullptr) rest->Shutdown(kDrain);
  });
  grpc->Shutdown(kDrain);
  rest_drain.wait();
}

// Serves until a signal comes; returns the exit status.
int Serve(const ServerOptions& options, const sigset_t& signals) {
  ServerSetup setup;
  const tensorflow::Status read = ReadSetup(options, &setup);
  if (!read.ok()) return FailToStart(std::string(read.message()));
  const int num_workers = NumWorkers(setup.manager.servable.batch_threads.get());
  ModelManager models(std::move(setup.manager));
  RequestHandler handler(&models);
  RequestLog log{std::chrono::milliseconds(options.slow_request_ms)};
  // The numbers of threads limit how many requests are computed at the same time.
  WorkerPool workers(options.grpc_max_threads > 0 ? options.grpc_max_threads : num_workers,
                     options.max_queued_requests);
  WorkerPool rest_workers(options.rest_api_num_threads > 0 ? options.rest_api_num_threads : num_workers,
                          options.max_queued_requests);
  // Both servers listen before any model loads: a port in use shows at once, and clients can watch the models' states.
  std::unique_ptr<GrpcServer> grpc;
  const Status listening = GrpcServer::Start(setup.grpc, &handler, &workers, &log, &grpc);
  if (!listening.ok()) return FailToStart(listening.message());
  const RestApi rest_api(&handler, {&workers, &rest_workers}, setup.metrics_path);
  std::unique_ptr<RestServer> rest;
  const Status rest_listening = StartRest(options, setup.rest_tls, grpc->port(), &rest_api, &rest_workers, &log, &rest);
  if (!rest_listening.ok()) return FailToStart(rest_listening.message());

  models.Start(setup.models);
  std::optional<ConfigFilePoller> poller;
  int exit_status = 0;
  const std::optional<tensorflow::Status> loaded = AwaitFirstLoads(&models, signals);
  if (loaded && !loaded->ok()) {
    exit_status = FailToStart(loaded->ToString());
  } else if (loaded) {
    PrintAddresses(options, *grpc, rest.get());
    grpc->SetServing(true);
    poller.emplace(options, std::move(setup.model_config_text), &models);
    int signal = 0;
    sigwait(&signals, &signal);
  }
  ShutDown(exit_status, signals, &models, grpc.get(), rest.get());
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

  RaiseFileLimit();
  // This must come before the first thread, because threads inherit the mask.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // A log that nobody reads any more, such as a pipe to a program that has ended, must not end the server.
  signal(SIGPIPE, SIG_IGN);
  // Our log reports the errors of protobuf. Without this, clients could fill it with its lines.
  google::protobuf::SetLogHandler(nullptr);
  // The retrieval op reads it.
  setenv("DPSR_MAX_RESULTS", std::to_string(options.max_results_per_request).c_str(), /*overwrite=*/1);
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

const DpsrRequest* DpsrCurrentRequest() { return dpsr::serving::current_request; }

int main(int argc, char** argv) { return dpsr::serving::Main(argc, argv); }
