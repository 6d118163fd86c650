#include "serving/model_server/grpc_server.h"

#include <grpcpp/grpcpp.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <limits>

#include "serving/model_server/server_options.h"
#include "serving/model_server/worker_pool.h"
#include "tensorflow_serving/apis/model_service.grpc.pb.h"
#include "tensorflow_serving/apis/prediction_service.grpc.pb.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::GetModelStatusRequest;
using ::tensorflow::serving::GetModelStatusResponse;
using ::tensorflow::serving::ModelService;
using ::tensorflow::serving::PredictionService;
using ::tensorflow::serving::PredictRequest;
using ::tensorflow::serving::PredictResponse;

// gRPC keeps an error's text in a header, whose size clients limit.
constexpr size_t kMaxErrorBytes = 1024;

grpc::Status ToGrpc(const tensorflow::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxErrorBytes) message = message.substr(0, kMaxErrorBytes) + "...TRUNCATED";
  // Both number their codes alike.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

tensorflow::Status MissingModelSpec() { return absl::InvalidArgumentError("Missing ModelSpec"); }

class PredictionServiceImpl final : public PredictionService::CallbackService {
 public:
  PredictionServiceImpl(const ModelManager* models, WorkerPool* workers) : models_(models), workers_(workers) {}

  grpc::ServerUnaryReactor* Predict(grpc::CallbackServerContext* context, const PredictRequest* request,
                                    PredictResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    workers_->Add([this, context, request, response, reactor] {
      // Nobody waits for the answer of a call that was cancelled, or whose deadline passed, in the queue.
      if (context->IsCancelled()) {
        reactor->Finish(grpc::Status::CANCELLED);
        return;
      }
      reactor->Finish(ToGrpc(Answer(*context, *request, response)));
    });
    return reactor;
  }

 private:
  tensorflow::Status Answer(const grpc::CallbackServerContext& context, const PredictRequest& request,
                            PredictResponse* response) const {
    if (!request.has_model_spec()) return MissingModelSpec();
    std::shared_ptr<const Servable> servable;
    TF_RETURN_IF_ERROR(models_->Find(request.model_spec(), &servable));
    try {  // an op library may throw, and memory may run out
      return servable->Predict(request, context.deadline(), response);
    } catch (const std::exception& error) {
      return absl::InternalError(StrCat("the model threw an exception: ", error.what()));
    }
  }

  const ModelManager* const models_;
  WorkerPool* const workers_;
};

class ModelServiceImpl final : public ModelService::CallbackService {
 public:
  explicit ModelServiceImpl(const ModelManager* models) : models_(models) {}

  grpc::ServerUnaryReactor* GetModelStatus(grpc::CallbackServerContext* context, const GetModelStatusRequest* request,
                                           GetModelStatusResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(request->has_model_spec() ? models_->GetStatus(request->model_spec(), response)
                                                     : MissingModelSpec()));
    return reactor;
  }

 private:
  const ModelManager* const models_;
};

// Why host:port cannot be bound, as the system calls it. gRPC only says that it cannot.
std::string BindError(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* address = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &address);
  if (error != 0) return gai_strerror(error);
  std::string reason = "unknown error";
  const int fd = socket(address->ai_family, address->ai_socktype, 0);
  if (fd < 0 || bind(fd, address->ai_addr, address->ai_addrlen) != 0 || listen(fd, 1) != 0) reason = strerror(errno);
  if (fd >= 0) close(fd);
  freeaddrinfo(address);
  return reason;
}

class GrpcServerImpl final : public GrpcServer {
 public:
  GrpcServerImpl(int num_threads, const ModelManager* models)
      : workers_(num_threads), prediction_service_(models, &workers_), model_service_(models) {}

  Status Listen(const std::string& host, int port) {
    const std::string address = ServerAddress(host, port);
    grpc::ServerBuilder builder;
    // Otherwise a second server on the port would start, and share the requests of the first.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port_);
    builder.SetMaxReceiveMessageSize(std::numeric_limits<int32_t>::max());
    builder.RegisterService(&prediction_service_);
    builder.RegisterService(&model_service_);
    server_ = builder.BuildAndStart();
    if (server_ != nullptr && port_ != 0) return {};
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on ", address, ": ", BindError(host, port),
                      "; choose another address with --host and --port (--port=0 picks a free one), or stop what "
                      "listens there");
  }

  int port() const override { return port_; }

  void Shutdown(std::chrono::milliseconds drain) override {
    server_->Shutdown(std::chrono::system_clock::now() + drain);
  }

 private:
  // The server is destroyed first, when no call is left; the workers last.
  WorkerPool workers_;
  PredictionServiceImpl prediction_service_;
  ModelServiceImpl model_service_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

Status GrpcServer::Start(const std::string& host, int port, int num_threads, ModelManager* models,
                         std::unique_ptr<GrpcServer>* server) {
  auto started = std::make_unique<GrpcServerImpl>(num_threads, models);
  DPSR_RETURN_IF_ERROR(started->Listen(host, port));
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
