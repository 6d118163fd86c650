// The gRPC front of the server: PredictionService and ModelService on one port.
#ifndef DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
#define DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_

#include <chrono>
#include <memory>
#include <string>

#include "serving/model_server/model_manager.h"
#include "tokenizer_cc/status.h"

namespace dpsr::serving {

class GrpcServer {
 public:
  // Listens on host:port; port 0 lets the system choose. At most `num_threads` requests are computed at a time, the
  // others wait. `models` must outlive the server. kFailedPrecondition says why the address cannot be listened on.
  static Status Start(const std::string& host, int port, int num_threads, ModelManager* models,
                      std::unique_ptr<GrpcServer>* server);
  virtual ~GrpcServer() = default;

  // The port that it listens on.
  virtual int port() const = 0;

  // Takes no new request, lets those that run end, for at most `drain`, and cancels the rest.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_GRPC_SERVER_H_
