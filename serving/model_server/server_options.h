// The command line of the model server. Names, defaults and syntax (`--name=value`) of the flags are TensorFlow
// Serving's.
#ifndef DPSR_SERVING_MODEL_SERVER_SERVER_OPTIONS_H_
#define DPSR_SERVING_MODEL_SERVER_SERVER_OPTIONS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"

namespace dpsr::serving {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int32_t port = 8500;  // 0: the system picks a free port
  std::string model_name = "default";
  std::string model_base_path;
  std::vector<std::string> op_libraries;
  int64_t file_system_poll_wait_seconds = 1;  // 0: poll once; negative: never poll
  int32_t tensorflow_session_parallelism = 0;
  int32_t tensorflow_intra_op_parallelism = 0;
  int32_t tensorflow_inter_op_parallelism = 0;
  std::vector<std::string> saved_model_tags = {"serve"};
  int32_t grpc_max_threads = 0;  // 0: four times the number of CPUs, more with batching
  bool enable_serialization_as_tensor_content = false;
  int32_t max_queued_requests = 10'000;
  int64_t max_results_per_request = 1'000'000;
  int64_t max_held_bytes = 0;  // 0: a share of the memory
  std::string reload_address;
  std::string grpc_socket_path;
  std::string grpc_channel_arguments;  // "k=v,k=v"
  bool enable_grpc_healthcheck_service = false;
  int32_t slow_request_ms = 0;  // 0: slow requests are not logged
  std::string ssl_config_file;
  std::string rest_api_ssl_config_file;
  int32_t rest_api_port = 0;         // 0: no REST API
  int32_t rest_api_num_threads = 0;  // 0: the number that grpc_max_threads = 0 gives
  int32_t rest_api_timeout_in_ms = 30'000;
  bool rest_api_enable_cors_support = false;
  std::string model_config_file;
  int32_t model_config_file_poll_wait_seconds = 0;
  int32_t num_load_threads = 0;
  int32_t num_unload_threads = 0;
  int32_t max_num_load_retries = 5;
  int64_t load_retry_interval_micros = 60'000'000;
  bool flush_filesystem_caches = true;
  bool allow_version_labels_for_unavailable_models = false;
  std::string tensorflow_session_config_file;
  bool enable_batching = false;
  std::string batching_parameters_file;
  bool enable_per_model_batching_parameters = false;
  bool enable_model_warmup = true;
  int32_t num_request_iterations_for_warmup = 0;
  std::string monitoring_config_file;
  bool enable_signature_method_name_check = false;
  bool version = false;
  bool help = false;

  // Returns the names and values in grpc_channel_arguments. A part without `=` has an empty value.
  std::vector<std::pair<std::string, std::string>> ChannelArguments() const;
};

// Reads argv[1..argc) into `options`. Arguments that are not flags of this server are put into `unknown` and ignored,
// as TensorFlow Serving does, so that its start scripts work unchanged. For a value that its flag does not allow,
// returns kInvalidArgument, which names the flag, the value and what is allowed.
Status ParseServerOptions(int argc, const char* const* argv, ServerOptions* options, std::vector<std::string>* unknown);

// Checks the flags that depend on each other and those of the model. kInvalidArgument says why the server cannot start.
Status ValidateServerOptions(const ServerOptions& options);

// Returns TensorFlow Serving's kInvalidArgument unless `base_path` is an absolute path or a URI.
Status CheckBasePath(const std::string& model, const std::string& base_path);

// Returns the text of --help: the name, default and meaning of each flag.
std::string ServerOptionsHelp();

// Returns `host:port` as gRPC expects it. An IPv6 host is put into brackets.
std::string ServerAddress(const std::string& host, int port);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVER_OPTIONS_H_
