// The REST API: turns the method, path and body of a request into a status and a text. Does not use sockets.
#ifndef DPSR_SERVING_MODEL_SERVER_REST_API_H_
#define DPSR_SERVING_MODEL_SERVER_REST_API_H_

#include <string>
#include <utility>
#include <vector>

#include "serving/model_server/request_handler.h"
#include "serving/model_server/worker_pool.h"

namespace dpsr::serving {

struct RestRequest {
  std::string method;  // GET, POST, ...
  std::string path;    // without the query part
  std::string body;
  Deadline deadline = Deadline::max();
};

struct RestReply {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  // further ones
};

// Returns the HTTP status for a code.
int HttpStatus(const tensorflow::Status& status);

// Returns the reply `{"error": message}`.
RestReply ErrorReply(int status, const std::string& message);

// Thread-safe.
class RestApi {
 public:
  // The metrics, including those of `workers`, are at `metrics_path`; an empty path means that they are not shown.
  // `handler` and `workers` must outlive this object.
  RestApi(const RequestHandler* handler, std::vector<const WorkerPool*> workers, std::string metrics_path)
      : handler_(handler), workers_(std::move(workers)), metrics_path_(std::move(metrics_path)) {}

  // Answers a request. Does not throw. Only a POST may take long.
  RestReply Answer(const RestRequest& request) const;

  // Records a POST request that no thread can take, because too many wait.
  void RecordRefused(const RestRequest& request) const;

 private:
  tensorflow::Status AnswerPath(const RestRequest& request, RestReply* reply) const;
  RestReply AnswerMetrics(const std::string& method) const;
  tensorflow::Status AnswerModel(const RestRequest& request, std::string* body) const;
  tensorflow::Status Infer(const std::string& method, const tensorflow::serving::ModelSpec& spec,
                           const RestRequest& request, std::string* body) const;

  const RequestHandler* const handler_;
  const std::vector<const WorkerPool*> workers_;
  const std::string metrics_path_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REST_API_H_
