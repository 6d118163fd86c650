// The gRPC server: PredictionService, ModelService, the health service, and the reflection of all of them. The wire
// (serving/wire/call_server.h) carries their calls.
#ifndef DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
#define DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"
#include "serving/model_server/request_handler.h"
#include "serving/model_server/request_log.h"
#include "serving/model_server/tls.h"
#include "serving/model_server/worker_pool.h"

namespace dpsr::serving {

struct GrpcServerOptions {
  std::string host;
  int port = 0;             // 0: the system picks a free port
  std::string socket_path;  // of a UNIX socket to listen on as well; empty: none
  std::shared_ptr<TlsFile> tls;  // of the port; null: no TLS. A UNIX socket needs none
  // Settings by the names that they have in the gRPC library. Those that the server does not have are logged.
  std::vector<std::pair<std::string, std::string>> channel_arguments;
  size_t max_held_bytes = 0;     // by requests that are not answered and answers that are not read; 0: by the memory
  int threads = 1;               // for the connections; requests are computed by others
  bool health_service = false;  // with the status of each model under its name
  // Where HandleReloadConfigRequest is taken: "" for the port above, kNoReloads, or an address of its own for the whole
  // ModelService: HOST:PORT or unix:/PATH.
  std::string reload_address;
};

inline constexpr char kNoReloads[] = "off";

class GrpcServer {
 public:
  // Listens. `workers` compute the requests. `handler`, `workers` and `log` must outlive the server. kFailedPrecondition says
  // why the server cannot listen.
  static Status Start(const GrpcServerOptions& options, RequestHandler* handler, WorkerPool* workers,
                      RequestLog* log, std::unique_ptr<GrpcServer>* server);
  virtual ~GrpcServer() = default;

  // Sets the answer of the health service, which is "not serving" at first. From `true` on it also follows the models;
  // `false` ends this for ever, and ends the calls that watch the health.
  virtual void SetServing(bool serving) = 0;

  // Returns the port on which the server listens.
  virtual int port() const = 0;

  // Takes no new requests, waits for running requests at most for `drain`, and cancels the rest.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
