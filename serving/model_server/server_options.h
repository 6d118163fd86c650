// The command line of the model server: TensorFlow Serving's flags, by its names, defaults and syntax `--name=value`.
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
  int32_t port = 8500;  // 0: the system picks a free one
  std::string model_name = "default";
  std::string model_base_path;
  std::vector<std::string> op_libraries;
  int64_t file_system_poll_wait_seconds = 1;  // 0: poll once; negative: never
  int32_t tensorflow_session_parallelism = 0;
  int32_t tensorflow_intra_op_parallelism = 0;
  int32_t tensorflow_inter_op_parallelism = 0;
  std::vector<std::string> saved_model_tags = {"serve"};
  int32_t grpc_max_threads = 0;  // 0: four times the number of CPUs
  bool enable_serialization_as_tensor_content = false;
  int32_t max_queued_requests = 10'000;
  std::string grpc_socket_path;
  std::string grpc_channel_arguments;  // "k=v,k=v"
  bool enable_grpc_healthcheck_service = false;
  std::string ssl_config_file;
  int32_t rest_api_port = 0;         // 0: no REST
  int32_t rest_api_num_threads = 0;  // 0: as many as grpc_max_threads 0 gives
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

  // The pairs of grpc_channel_arguments; a part without `=` has the empty value.
  std::vector<std::pair<std::string, std::string>> ChannelArguments() const;
};

// Reads argv[1..argc) into `options`. Arguments that are no flag of this server go to `unknown` and are otherwise
// ignored, as TensorFlow Serving does, so that its start scripts work unchanged. A value that does not fit its flag is
// kInvalidArgument with flag, value and what is allowed.
Status ParseServerOptions(int argc, const char* const* argv, ServerOptions* options, std::vector<std::string>* unknown);

// Checks what concerns several flags at once, or the model; kInvalidArgument says why the server cannot start.
Status ValidateServerOptions(const ServerOptions& options);

// One line a flag: name, default and meaning.
std::string ServerOptionsHelp();

// `host:port` as gRPC expects it; an IPv6 host is put into brackets.
std::string ServerAddress(const std::string& host, int port);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVER_OPTIONS_H_
