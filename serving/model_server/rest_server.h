// The HTTP front of the REST API.
#ifndef DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_
#define DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "serving/model_server/rest_api.h"
#include "serving/model_server/worker_pool.h"
#include "common/status.h"

namespace dpsr::serving {

struct RestServerOptions {
  std::string host;
  int port = 0;
  int num_threads = 1;  // that read and write sockets
  std::chrono::milliseconds timeout{30'000};
  bool enable_cors = false;
  uint64_t max_body_bytes = uint64_t{1} << 30;
};

class RestServer {
 public:
  // Listens. Inference runs on `workers`; what only asks for a state is answered at once, however busy these are. `api`
  // and `workers` must outlive the server. kFailedPrecondition says why the address cannot be listened on.
  static Status Start(const RestServerOptions& options, const RestApi* api, WorkerPool* workers,
                      std::unique_ptr<RestServer>* server);
  // Ends connections, and waits for those whose request is being computed.
  virtual ~RestServer() = default;

  virtual int port() const = 0;

  // Takes no new connection or request, and lets those that run end, for at most `drain`.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_
