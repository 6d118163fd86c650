#include "serving/model_server/grpc_server.h"

#include <grpc/grpc_security.h>
#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>

#include "serving/model_server/metrics.h"
#include "serving/model_server/parse_number.h"
#include "serving/model_server/request_scope.h"
#include "serving/model_server/server_options.h"
#include "tensorflow_serving/apis/model_service.grpc.pb.h"
#include "tensorflow_serving/apis/prediction_service.grpc.pb.h"

namespace dpsr::serving {
namespace {

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

// Answers a call on the workers, because gRPC's own threads must not block. If too many calls wait, calls `refused`.
template <typename Answer, typename Refused>
Reactor* OnWorkers(WorkerPool* workers, Context* context, Answer answer, Refused refused) {
  Reactor* reactor = context->DefaultReactor();
  const auto arrival = std::chrono::steady_clock::now();
  const bool added = workers->Add([context, reactor, arrival, answer] {
    RecordQueueing(MicrosecondsSince(arrival));
    // A call that was cancelled in the queue, or whose deadline passed there, needs no answer.
    if (context->IsCancelled()) {
      reactor->Finish(grpc::Status::CANCELLED);
      return;
    }
    tensorflow::Status status;
    {
      const RequestScope scope(context->deadline(), [context] { return context->IsCancelled(); });
      status = answer();
    }
    reactor->Finish(ToGrpc(status));
  });
  if (!added) {
    refused();
    reactor->Finish(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, kQueueIsFull));
  }
  return reactor;
}

class PredictionServiceImpl final : public PredictionService::CallbackService {
 public:
  PredictionServiceImpl(const RequestHandler* handler, WorkerPool* workers) : handler_(handler), workers_(workers) {}

  Reactor* Predict(Context* context, const apis::PredictRequest* request, apis::PredictResponse* response) override {
    return OnWorkers(workers_, context, [=] {
      return handler_->Predict(*request, context->deadline(), kEntrypoint, response);
    }, [=] { handler_->RecordRefused(request->model_spec(), "Predict", kEntrypoint); });
  }

  Reactor* Classify(Context* context, const apis::ClassificationRequest* request,
                    apis::ClassificationResponse* response) override {
    return OnWorkers(workers_, context, [=] {
      return handler_->Classify(*request, context->deadline(), kEntrypoint, response);
    }, [=] { handler_->RecordRefused(request->model_spec(), "Classify", kEntrypoint); });
  }

  Reactor* Regress(Context* context, const apis::RegressionRequest* request,
                   apis::RegressionResponse* response) override {
    return OnWorkers(workers_, context, [=] {
      return handler_->Regress(*request, context->deadline(), kEntrypoint, response);
    }, [=] { handler_->RecordRefused(request->model_spec(), "Regress", kEntrypoint); });
  }

  Reactor* MultiInference(Context* context, const apis::MultiInferenceRequest* request,
                          apis::MultiInferenceResponse* response) override {
    return OnWorkers(workers_, context, [=] {
      return handler_->MultiInference(*request, context->deadline(), kEntrypoint, response);
    }, [=] {
      tensorflow::Status status;
      const apis::ModelSpec* const spec = SpecOf(*request, &status);
      handler_->RecordRefused(spec == nullptr ? apis::ModelSpec() : *spec, "MultiInference", kEntrypoint);
    });
  }

  Reactor* GetModelMetadata(Context* context, const apis::GetModelMetadataRequest* request,
                            apis::GetModelMetadataResponse* response) override {
    return OnWorkers(workers_, context, [=] { return handler_->GetModelMetadata(*request, response); }, [] {});
  }

 private:
  const RequestHandler* const handler_;
  WorkerPool* const workers_;
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
      reactor->Finish(ToGrpc(handler_->Reload(*request, cancelled, response)));
    });
    return reactor;
  }

 private:
  const RequestHandler* const handler_;
  const bool takes_reloads_;
  WorkerPool reloads_;
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
  GrpcServerImpl(const RequestHandler* handler, WorkerPool* workers)
      : handler_(handler), prediction_service_(handler, workers) {}

  Status Listen(const GrpcServerOptions& options) {
    model_service_ = std::make_unique<ModelServiceImpl>(handler_, options.reload_address.empty());
    credentials_ = Credentials(options.tls);
    reload_credentials_ = Credentials(options.tls);
    DPSR_RETURN_IF_ERROR(ListenForReloads(options));
    const std::string address = ServerAddress(options.host, options.port);
    grpc::EnableDefaultHealthCheckService(options.health_service);
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
    server_ = builder.BuildAndStart();
    if (server_ != nullptr && port_ != 0 && socket_bound != 0) {
      SetServing(false);
      return {};
    }
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
    grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
    if (health == nullptr) return;
    for (const char* service : {"ModelService", "PredictionService"}) health->SetServingStatus(service, serving);
    // The status of the server as a whole.
    health->SetServingStatus(serving);
  }

  void Shutdown(std::chrono::milliseconds drain) override {
    SetServing(false);
    const auto deadline = std::chrono::system_clock::now() + drain;
    if (reload_server_ != nullptr) reload_server_->Shutdown(deadline);
    server_->Shutdown(deadline);
  }

 private:
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
  // server_ is the last member, so that it is destroyed first: then no call uses the services any more.
  PredictionServiceImpl prediction_service_;
  std::unique_ptr<ModelServiceImpl> model_service_;
  std::unique_ptr<ModelServiceImpl> reload_service_;
  // The servers call these for each connection, so they outlive the servers.
  std::shared_ptr<grpc::ServerCredentials> credentials_;
  std::shared_ptr<grpc::ServerCredentials> reload_credentials_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> reload_server_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

Status GrpcServer::Start(const GrpcServerOptions& options, RequestHandler* handler, WorkerPool* workers,
                         std::unique_ptr<GrpcServer>* server) {
  auto started = std::make_unique<GrpcServerImpl>(handler, workers);
  DPSR_RETURN_IF_ERROR(started->Listen(options));
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
