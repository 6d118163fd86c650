// The HTTP server of the REST API.
#ifndef DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_
#define DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "common/status.h"
#include "serving/model_server/request_log.h"
#include "serving/model_server/rest_api.h"
#include "serving/model_server/tls.h"
#include "serving/model_server/worker_pool.h"

namespace dpsr::serving {

struct RestServerOptions {
  std::string host;
  int port = 0;
  int num_threads = 1;  // threads that read and write sockets
  std::chrono::milliseconds timeout{30'000};
  bool enable_cors = false;
  uint64_t max_body_bytes = uint64_t{1} << 30;
  std::shared_ptr<TlsFile> tls;  // null: no TLS
};

class RestServer {
 public:
  // Listens. `workers` compute inference requests; requests for a state are answered at once, even if the workers are
  // busy. `api`, `workers` and `log` must outlive the server. kFailedPrecondition says why the server cannot listen.
  static Status Start(const RestServerOptions& options, const RestApi* api, WorkerPool* workers, RequestLog* log,
                      std::unique_ptr<RestServer>* server);
  // Closes the connections, and waits for requests that are being computed.
  virtual ~RestServer() = default;

  virtual int port() const = 0;

  // Takes no new connections or requests, and waits for running requests, at most for `drain`.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REST_SERVER_H_
