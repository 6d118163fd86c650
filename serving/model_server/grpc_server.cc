#include "serving/model_server/grpc_server.h"

#include <grpc/grpc_security.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string_view>
#include <thread>

#include "serving/dpsr_serving/health.grpc.pb.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/parse_number.h"
#include "serving/model_server/request_scope.h"
#include "serving/model_server/server_options.h"
#include "tensorflow_serving/apis/model_service.grpc.pb.h"
#include "tensorflow_serving/apis/prediction_service.grpc.pb.h"

// gRPC shows a server the compression of a request only by this function, which its own interoperability tests use.
grpc_compression_algorithm grpc_call_test_only_get_compression_algorithm(grpc_call* call);

namespace dpsr::serving {
namespace {

using ::grpc::health::v1::Health;
using ::grpc::health::v1::HealthCheckRequest;
using ::grpc::health::v1::HealthCheckResponse;
using ::tensorflow::serving::ModelService;
using ::tensorflow::serving::PredictionService;
using Context = grpc::CallbackServerContext;
using Reactor = grpc::ServerUnaryReactor;
namespace apis = ::tensorflow::serving;

constexpr char kEntrypoint[] = "GRPC";

// gRPC sends the text of an error in a header, and clients limit the size of headers.
constexpr size_t kMaxErrorBytes = 1024;

// Number of calls that a connection may have at the same time. Without a limit, calls with large headers take the memory
// of the server: gigabytes in seconds.
constexpr int kMaxStreams = 1024;

// Number of reloads that may wait for models at the same time. A reload whose models do not load must not block the
// next reload, which may correct it.
constexpr int kReloads = 8;

grpc::Status ToGrpc(const tensorflow::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxErrorBytes) message = message.substr(0, kMaxErrorBytes) + "...TRUNCATED";
  // Both libraries use the same numbers for their codes.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

// Answers below this size are never compressed: they fit into one packet.
constexpr size_t kMinCompressedBytes = 1024;

// What all calls for inference need.
struct Shared {
  const RequestHandler* handler;
  WorkerPool* workers;
  RequestLog* log;
};

// Returns the value of the client's metadata with this key, or an empty text.
std::string_view MetadataOf(const Context& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(key);
  return found == metadata.end() ? std::string_view() : std::string_view(found->second.data(), found->second.size());
}

// Compresses the answer as the client compressed its request, as gRPC for Go does, too. What a client accepts says less:
// the libraries accept every compression by default, and compressing costs more than most answers.
void CompressAsAsked(Context* context, const google::protobuf::Message& response) {
  const grpc_compression_algorithm asked = grpc_call_test_only_get_compression_algorithm(context->c_call());
  if (asked != GRPC_COMPRESS_NONE && response.ByteSizeLong() >= kMinCompressedBytes) {
    context->set_compression_algorithm(asked);
  }
}

// Ends a call that was computed: reports its times if the client's trace is kept, and logs it if it is worth it.
void End(const Shared& shared, Context* context, const char* method, const apis::ModelSpec& spec,
         const tensorflow::Status& status, const RequestTimes& times) {
  const std::string_view parent = MetadataOf(*context, kTraceParent);
  if (!parent.empty()) {
    const std::optional<TraceParent> trace = ParseTraceParent(parent);
    if (trace.has_value() && trace->sampled) {
      context->AddTrailingMetadata(kQueueMicros, std::to_string(times.queue_micros));
      context->AddTrailingMetadata(kComputeMicros, std::to_string(times.compute_micros));
    }
  }
  const bool failed = IsServersFault(status);
  if (!shared.log->Wants(failed, times)) return;
  shared.log->Write(StrCat(method, " of model ", spec.name()), failed ? status.ToString() : "", times, parent);
}

// Answers a call on the workers, because gRPC's own threads must not block. `spec` says which model the call is for.
template <typename Response, typename Answer>
Reactor* OnWorkers(const Shared& shared, Context* context, const char* method, const apis::ModelSpec& spec,
                   Response* response, Answer answer) {
  Reactor* reactor = context->DefaultReactor();
  const auto arrival = std::chrono::steady_clock::now();
  const bool added = shared.workers->Add([&shared, context, reactor, method, &spec, response, arrival, answer] {
    RequestTimes times;
    times.queue_micros = MicrosecondsSince(arrival);
    RecordQueueing(times.queue_micros);
    // A call that was cancelled in the queue, or whose deadline passed there, needs no answer.
    if (context->IsCancelled()) {
      reactor->Finish(grpc::Status::CANCELLED);
      return;
    }
    const tensorflow::Status answered = CatchExceptions("the request", [&] {
      tensorflow::Status status;
      {
        const RequestScope scope(context->deadline(), [context] { return context->IsCancelled(); });
        status = answer();
      }
      times.compute_micros = MicrosecondsSince(arrival) - times.queue_micros;
      End(shared, context, method, spec, status, times);
      if (status.ok()) CompressAsAsked(context, *response);
      return status;
    });
    reactor->Finish(ToGrpc(answered));
  });
  if (!added) {
    shared.handler->RecordRefused(spec, method, kEntrypoint);
    reactor->Finish(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, kQueueIsFull));
  }
  return reactor;
}

class PredictionServiceImpl final : public PredictionService::CallbackService {
 public:
  explicit PredictionServiceImpl(const Shared& shared) : shared_(shared) {}

  Reactor* Predict(Context* context, const apis::PredictRequest* request, apis::PredictResponse* response) override {
    return OnWorkers(shared_, context, "Predict", request->model_spec(), response, [=] {
      return shared_.handler->Predict(*request, context->deadline(), kEntrypoint, response);
    });
  }

  Reactor* Classify(Context* context, const apis::ClassificationRequest* request,
                    apis::ClassificationResponse* response) override {
    return OnWorkers(shared_, context, "Classify", request->model_spec(), response, [=] {
      return shared_.handler->Classify(*request, context->deadline(), kEntrypoint, response);
    });
  }

  Reactor* Regress(Context* context, const apis::RegressionRequest* request,
                   apis::RegressionResponse* response) override {
    return OnWorkers(shared_, context, "Regress", request->model_spec(), response, [=] {
      return shared_.handler->Regress(*request, context->deadline(), kEntrypoint, response);
    });
  }

  Reactor* MultiInference(Context* context, const apis::MultiInferenceRequest* request,
                          apis::MultiInferenceResponse* response) override {
    tensorflow::Status status;
    const apis::ModelSpec* const spec = SpecOf(*request, &status);
    return OnWorkers(shared_, context, "MultiInference", spec == nullptr ? apis::ModelSpec::default_instance() : *spec,
                     response, [=] {
                       return shared_.handler->MultiInference(*request, context->deadline(), kEntrypoint, response);
                     });
  }

  Reactor* GetModelMetadata(Context* context, const apis::GetModelMetadataRequest* request,
                            apis::GetModelMetadataResponse* response) override {
    return OnWorkers(shared_, context, "GetModelMetadata", request->model_spec(), response,
                     [=] { return shared_.handler->GetModelMetadata(*request, response); });
  }

 private:
  const Shared shared_;
};

class ModelServiceImpl final : public ModelService::CallbackService {
 public:
  ModelServiceImpl(const RequestHandler* handler, bool takes_reloads)
      : handler_(handler), takes_reloads_(takes_reloads), reloads_(takes_reloads ? kReloads : 0) {}

  Reactor* GetModelStatus(Context* context, const apis::GetModelStatusRequest* request,
                          apis::GetModelStatusResponse* response) override {
    Reactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(handler_->GetModelStatus(*request, response)));
    return reactor;
  }

  // Waits for models to load, on threads that are used for nothing else. The status in the response is also the status
  // of the call.
  Reactor* HandleReloadConfigRequest(Context* context, const apis::ReloadConfigRequest* request,
                                     apis::ReloadConfigResponse* response) override {
    Reactor* reactor = context->DefaultReactor();
    if (!takes_reloads_) {
      reactor->Finish(grpc::Status(grpc::StatusCode::PERMISSION_DENIED,
                                   "this address takes no HandleReloadConfigRequest; see --reload_address of the server"));
      return reactor;
    }
    reloads_.Add([=] {
      const auto cancelled = [context] { return context->IsCancelled(); };
      reactor->Finish(ToGrpc(
          CatchExceptions("the reload", [&] { return handler_->Reload(*request, cancelled, response); })));
    });
    return reactor;
  }

 private:
  const RequestHandler* const handler_;
  const bool takes_reloads_;
  WorkerPool reloads_;
};

// The health service. That of the gRPC library cannot end the calls that watch a status, so they would delay the end of
// the server. Thread-safe.
class HealthServiceImpl final : public Health::CallbackService {
 public:
  // Sets whether some services serve. A service that was never set is unknown.
  void Set(const std::map<std::string, bool>& serving) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [service, serves] : serving) serving_[service] = serves;
    for (Watcher* watcher : watchers_) watcher->Update();
  }

  // From now on no service serves. Calls that watch are told so, and end.
  void Stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    for (Watcher* watcher : watchers_) watcher->Update();
  }

  Reactor* Check(Context* context, const HealthCheckRequest* request, HealthCheckResponse* response) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      response->set_status(StatusOf(request->service()));
    }
    const bool known = response->status() != HealthCheckResponse::SERVICE_UNKNOWN;
    Reactor* reactor = context->DefaultReactor();
    reactor->Finish(
        known ? grpc::Status::OK : ToGrpc(absl::NotFoundError(StrCat("there is no service ", request->service()))));
    return reactor;
  }

  grpc::ServerWriteReactor<HealthCheckResponse>* Watch(Context* /*context*/,
                                                       const HealthCheckRequest* request) override {
    auto watcher = std::make_unique<Watcher>(this, request->service());
    std::lock_guard<std::mutex> lock(mutex_);
    watchers_.insert(watcher.get());
    watcher->Update();
    return watcher.release();  // OnDone deletes it
  }

 private:
  // A call that watches a service. gRPC never calls back from within StartWrite or Finish, so these may hold the lock.
  class Watcher final : public grpc::ServerWriteReactor<HealthCheckResponse> {
   public:
    // `service` belongs to the request, which lives until OnDone.
    Watcher(HealthServiceImpl* health, const std::string& service) : health_(health), service_(service) {}

    // Sends the status if the client does not have it, and otherwise ends the call if the server stops. Called with the
    // lock held.
    void Update() {
      if (writing_ || finished_) return;
      const HealthCheckResponse::ServingStatus status = health_->StatusOf(service_);
      if (status != response_.status()) {
        response_.set_status(status);
        writing_ = true;
        StartWrite(&response_);
      } else if (health_->stopping_) {
        End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is stopping"));
      }
    }

    void OnWriteDone(bool /*ok*/) override {
      std::lock_guard<std::mutex> lock(health_->mutex_);
      writing_ = false;
      Update();
    }

    void OnCancel() override {
      std::lock_guard<std::mutex> lock(health_->mutex_);
      End(grpc::Status::CANCELLED);
    }

    void OnDone() override {
      {
        std::lock_guard<std::mutex> lock(health_->mutex_);
        health_->watchers_.erase(this);
      }
      delete this;
    }

   private:
    void End(const grpc::Status& status) {
      if (finished_) return;
      finished_ = true;
      Finish(status);
    }

    HealthServiceImpl* const health_;
    const std::string& service_;
    HealthCheckResponse response_;  // what was sent last; UNKNOWN at first
    bool writing_ = false;
    bool finished_ = false;
  };

  // Called with the lock held.
  HealthCheckResponse::ServingStatus StatusOf(const std::string& service) const {
    const auto found = serving_.find(service);
    if (found == serving_.end()) return HealthCheckResponse::SERVICE_UNKNOWN;
    return found->second && !stopping_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  }

  std::mutex mutex_;  // of all that follows, and of the watchers
  bool stopping_ = false;
  std::map<std::string, bool> serving_;
  std::set<Watcher*> watchers_;  // calls that are not done
};

// What BindError returns if the address can be bound.
constexpr char kBindable[] = "unknown error";

// Returns the system's reason why host:port cannot be bound. gRPC only says that it cannot.
std::string BindError(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* address = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &address);
  if (error != 0) return gai_strerror(error);
  std::string reason = kBindable;
  const int fd = socket(address->ai_family, address->ai_socktype, 0);
  if (fd < 0 || bind(fd, address->ai_addr, address->ai_addrlen) != 0 || listen(fd, 1) != 0) reason = strerror(errno);
  if (fd >= 0) close(fd);
  freeaddrinfo(address);
  return reason;
}

// Returns the system's reason why a UNIX socket cannot be bound.
std::string BindError(const std::string& path) {
  sockaddr_un address{};
  if (path.size() >= sizeof(address.sun_path)) return StrCat("longer than ", sizeof(address.sun_path) - 1, " bytes");
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  std::string reason = kBindable;
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  if (fd < 0 || bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    reason = strerror(errno);
  } else {
    unlink(path.c_str());
  }
  if (fd >= 0) close(fd);
  return reason;
}

// Credentials that follow a TlsFile: each new connection asks for the present key and certificates. gRPC's own C++
// credentials that can do this read separate files of their own, and keep no good certificate if a new one is broken.
class TlsCredentials final : public grpc::ServerCredentials {
 public:
  explicit TlsCredentials(std::shared_ptr<TlsFile> file) : file_(std::move(file)) {
    const auto ask = file_->Current()->config.client_verify ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                                            : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE;
    credentials_ = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(ask, Fetch, this));
  }
  ~TlsCredentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  // gRPC calls this for each connection, and keeps what it has if the answer is "unchanged".
  static grpc_ssl_certificate_config_reload_status Fetch(void* self, grpc_ssl_server_certificate_config** config) {
    auto* const credentials = static_cast<TlsCredentials*>(self);
    std::shared_ptr<const TlsState> state = credentials->file_->Current();
    std::lock_guard<std::mutex> lock(credentials->mutex_);
    if (state == credentials->given_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const TlsConfig& tls = state->config;
    const grpc_ssl_pem_key_cert_pair pair{tls.server_key.c_str(), tls.server_cert.c_str()};
    // gRPC aborts if there are no authorities, also where clients need no certificate.
    const std::string& authorities = tls.custom_ca.empty() ? tls.server_cert : tls.custom_ca;
    *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
    credentials->given_ = std::move(state);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<TlsFile> file_;
  std::mutex mutex_;
  std::shared_ptr<const TlsState> given_;
  grpc_server_credentials* credentials_ = nullptr;
};

// Returns the credentials of a port.
std::shared_ptr<grpc::ServerCredentials> Credentials(const std::shared_ptr<TlsFile>& tls) {
  if (tls == nullptr) return grpc::InsecureServerCredentials();
  return std::make_shared<TlsCredentials>(tls);
}

class GrpcServerImpl final : public GrpcServer {
 public:
  GrpcServerImpl(const RequestHandler* handler, WorkerPool* workers, RequestLog* log)
      : handler_(handler), prediction_service_({handler, workers, log}) {}
  ~GrpcServerImpl() override {
    EndHealth();
    // Without a deadline gRPC would wait for calls that may never end, such as those that watch the health. Nothing
    // happens here after Shutdown.
    for (grpc::Server* const server : {reload_server_.get(), server_.get()}) {
      if (server != nullptr) server->Shutdown(std::chrono::system_clock::now());
    }
  }

  Status Listen(const GrpcServerOptions& options) {
    model_service_ = std::make_unique<ModelServiceImpl>(handler_, options.reload_address.empty());
    credentials_ = Credentials(options.tls);
    reload_credentials_ = Credentials(options.tls);
    DPSR_RETURN_IF_ERROR(ListenForReloads(options));
    const std::string address = ServerAddress(options.host, options.port);
    // Linking gRPC's reflection adds it to every server, and this call is what links it.
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    bool limits_streams = false;
    for (const auto& [name, value] : options.channel_arguments) {
      limits_streams |= name == GRPC_ARG_MAX_CONCURRENT_STREAMS;
      int number = 0;
      if (ParseNumber(value, &number)) {
        builder.AddChannelArgument(name, number);
      } else {
        builder.AddChannelArgument(name, value);
      }
    }
    if (!limits_streams) builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreams);
    // Without this, a second server on the port would start, and share the requests of the first one.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(address, credentials_, &port_);
    int socket_bound = 1;
    if (!options.socket_path.empty()) {
      builder.AddListeningPort("unix:" + options.socket_path, grpc::InsecureServerCredentials(), &socket_bound);
    }
    builder.SetMaxReceiveMessageSize(std::numeric_limits<int32_t>::max());
    builder.RegisterService(&prediction_service_);
    builder.RegisterService(model_service_.get());
    if (options.health_service) {
      health_ = std::make_unique<HealthServiceImpl>();
      SetServices(false);
      builder.RegisterService(health_.get());
    }
    server_ = builder.BuildAndStart();
    if (server_ != nullptr && port_ != 0 && socket_bound != 0) return {};
    // gRPC only says that it failed. Find out why.
    const std::string port_error = port_ != 0 ? kBindable : BindError(options.host, options.port);
    if (port_error != kBindable) {
      return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on ", address, ": ", port_error,
                        "; choose another address with --host and --port (--port=0 picks a free port), or stop the "
                        "program that listens there");
    }
    const std::string socket_error = options.socket_path.empty() ? kBindable : BindError(options.socket_path);
    if (socket_error != kBindable || socket_bound == 0) {
      return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on the UNIX socket ", options.socket_path, ": ",
                        socket_error, "; choose another path with --grpc_socket_path");
    }
    if (options.tls != nullptr) {
      return MakeStatus(StatusCode::kFailedPrecondition,
                        "gRPC does not accept the key and certificates in --ssl_config_file; expected PEM texts of a "
                        "private key, its certificate, and the certificate of the authority for clients");
    }
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on ", address, ": ", port_error);
  }

  int port() const override { return port_; }

  void SetServing(bool serving) override {
    if (health_ == nullptr) return;
    if (serving) {
      SetServices(true);
      health_thread_ = std::thread([this] { ShowModels(); });
    } else {
      EndHealth();
      health_->Stop();
    }
  }

  void Shutdown(std::chrono::milliseconds drain) override {
    SetServing(false);
    const auto deadline = std::chrono::system_clock::now() + drain;
    // A call that does not end on the other server must not take the time of the requests.
    server_->Shutdown(deadline);
    if (reload_server_ != nullptr) reload_server_->Shutdown(deadline);
  }

 private:
  // Keeps the statuses of the models, under their names, and of the server as a whole: serving while every model has a
  // version that answers, as /readyz says. A model that was removed stays known, and does not serve.
  void ShowModels() {
    constexpr std::chrono::milliseconds kLookEvery(100);
    std::map<std::string, bool> shown;
    std::unique_lock<std::mutex> lock(health_mutex_);
    do {
      std::map<std::string, bool> present = handler_->models().Available();
      bool all = true;
      for (const auto& [name, available] : present) all &= available;
      for (const auto& [name, available] : shown) present.emplace(name, false);
      // These names belong to the services, which serve from the first loads to the end.
      for (const char* service : {"ModelService", "PredictionService"}) present.erase(service);
      present[""] = all;
      health_->Set(present);
      shown = std::move(present);
    } while (!health_stop_.wait_for(lock, kLookEvery, [this] { return health_ends_; }));
  }

  void SetServices(bool serving) {
    health_->Set({{"", serving}, {"ModelService", serving}, {"PredictionService", serving}});
  }

  void EndHealth() {
    {
      std::lock_guard<std::mutex> lock(health_mutex_);
      health_ends_ = true;
    }
    health_stop_.notify_all();
    if (health_thread_.joinable()) health_thread_.join();
  }

  // Serves reloads at their own address, if they have one.
  Status ListenForReloads(const GrpcServerOptions& options) {
    if (options.reload_address.empty() || options.reload_address == kNoReloads) return {};
    reload_service_ = std::make_unique<ModelServiceImpl>(handler_, true);
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    int bound = 0;
    builder.AddListeningPort(options.reload_address, reload_credentials_, &bound);
    builder.RegisterService(reload_service_.get());
    reload_server_ = builder.BuildAndStart();
    if (reload_server_ != nullptr && bound != 0) return {};
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on --reload_address=", options.reload_address,
                      "; give HOST:PORT that is free, unix:/PATH, or off");
  }

  const RequestHandler* const handler_;
  // server_ comes after all that it uses, so that it is destroyed first.
  PredictionServiceImpl prediction_service_;
  std::unique_ptr<ModelServiceImpl> model_service_;
  std::unique_ptr<ModelServiceImpl> reload_service_;
  std::unique_ptr<HealthServiceImpl> health_;  // null if the server does not offer it
  // The servers call these for each connection, so they outlive the servers.
  std::shared_ptr<grpc::ServerCredentials> credentials_;
  std::shared_ptr<grpc::ServerCredentials> reload_credentials_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> reload_server_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex health_mutex_;
  std::condition_variable health_stop_;
  bool health_ends_ = false;
  std::thread health_thread_;
};

}  // namespace

Status GrpcServer::Start(const GrpcServerOptions& options, RequestHandler* handler, WorkerPool* workers,
                         RequestLog* log, std::unique_ptr<GrpcServer>* server) {
  auto started = std::make_unique<GrpcServerImpl>(handler, workers, log);
  DPSR_RETURN_IF_ERROR(started->Listen(options));
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
