// The gRPC front of the server: PredictionService, ModelService and the health service.
#ifndef DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
#define DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "serving/model_server/request_handler.h"
#include "serving/model_server/worker_pool.h"
#include "common/status.h"

namespace dpsr::serving {

// PEM texts of --ssl_config_file.
struct TlsConfig {
  std::string server_key;
  std::string server_cert;
  std::string custom_ca;       // signs the clients' certificates; empty: the system's
  bool client_verify = false;  // clients must show a certificate
};

struct GrpcServerOptions {
  std::string host;
  int port = 0;             // 0: the system picks a free one
  std::string socket_path;  // of a UNIX socket to listen on too; empty: none
  bool use_tls = false;     // on the port; a UNIX socket needs none
  TlsConfig tls;
  std::vector<std::pair<std::string, std::string>> channel_arguments;  // gRPC's own; a number where the text is one
  bool health_service = false;
};

class GrpcServer {
 public:
  // Listens. Requests are computed on `workers`; `handler` and `workers` must outlive the server. kFailedPrecondition
  // says why an address cannot be listened on.
  static Status Start(const GrpcServerOptions& options, RequestHandler* handler, WorkerPool* workers,
                      std::unique_ptr<GrpcServer>* server);
  virtual ~GrpcServer() = default;

  // What the health service answers from now on; at first it is not serving.
  virtual void SetServing(bool serving) = 0;

  // The port that it listens on.
  virtual int port() const = 0;

  // Takes no new request, lets those that run end, for at most `drain`, and cancels the rest.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
