#include "serving/model_server/server_options.h"

#include <limits>
#include <optional>
#include <string_view>
#include <variant>

#include "serving/model_server/parse_number.h"

namespace dpsr::serving {
namespace {

// The target of an integer flag, and the range of its values.
template <typename T>
struct Integer {
  T* value;
  T min = std::numeric_limits<T>::min();
  T max = std::numeric_limits<T>::max();
};

struct Text {
  std::string* value;
};

// A list separated by commas. Empty parts are dropped.
struct List {
  std::vector<std::string>* value;
};

struct Switch {
  bool* value;
};

struct Flag {
  std::string_view name;
  std::variant<Integer<int32_t>, Integer<int64_t>, Text, List, Switch> target;
  std::string_view help;
};

std::vector<Flag> Flags(ServerOptions* options) {
  return {
      {"host", Text{&options->host}, "address to listen on; 0.0.0.0 for every IPv4 interface"},
      {"port", Integer<int32_t>{&options->port, 0, 65535},
       "port of the gRPC API; with 0 the server picks a free port and prints it"},
      {"model_name", Text{&options->model_name}, "name by which clients ask for the model"},
      {"model_base_path", Text{&options->model_base_path},
       "absolute path of the folder that holds the model's versions, one numbered folder for each"},
      {"op_library", List{&options->op_libraries},
       "libraries of TensorFlow ops to load before any model, separated by commas"},
      {"file_system_poll_wait_seconds", Integer<int64_t>{&options->file_system_poll_wait_seconds},
       "seconds between two searches for new versions; with 0 the server searches once, with a negative value never"},
      {"tensorflow_session_parallelism", Integer<int32_t>{&options->tensorflow_session_parallelism, 0},
       "sets both tensorflow_intra_op_parallelism and tensorflow_inter_op_parallelism; 0 sets neither"},
      {"tensorflow_intra_op_parallelism", Integer<int32_t>{&options->tensorflow_intra_op_parallelism, 0},
       "number of threads that one op may use; with 0 TensorFlow chooses"},
      {"tensorflow_inter_op_parallelism", Integer<int32_t>{&options->tensorflow_inter_op_parallelism, 0},
       "number of threads that run the ops of a graph; with 0 or 1, the graph of a request runs in the thread that "
       "serves the request"},
      {"saved_model_tags", List{&options->saved_model_tags},
       "tags of the graph to load from the SavedModel, separated by commas"},
      {"grpc_max_threads", Integer<int32_t>{&options->grpc_max_threads, 0, 4096},
       "number of requests that are computed at the same time, while others wait; 0 means four times the number of "
       "CPUs, and with batching also enough to fill the batches"},
      {"enable_serialization_as_tensor_content", Switch{&options->enable_serialization_as_tensor_content},
       "send the tensors of an answer as raw bytes (tensor_content) instead of typed fields"},
      {"max_queued_requests", Integer<int32_t>{&options->max_queued_requests, 1},
       "number of requests that may wait for a thread; any further request fails with RESOURCE_EXHAUSTED"},
      {"max_results_per_request", Integer<int64_t>{&options->max_results_per_request, 1, int64_t{1} << 40},
       "largest number of results, queries times k, that a request may ask of a servable of `dpsr export`"},
      {"max_held_bytes", Integer<int64_t>{&options->max_held_bytes, 0, int64_t{1} << 50},
       "bytes that unanswered gRPC requests and unread answers may hold; beyond it, the connections that hold the most "
       "end. 0 means 1/64 of the memory, and 256 MiB at least"},
      {"reload_address", Text{&options->reload_address},
       "where HandleReloadConfigRequest is taken, by which clients replace the list of models: HOST:PORT or unix:/PATH "
       "for an address of its own, off for nowhere; empty for the gRPC port, which is safe only if none but operators "
       "reach it"},
      {"grpc_socket_path", Text{&options->grpc_socket_path},
       "path of a UNIX socket on which the server listens as well"},
      {"grpc_channel_arguments", Text{&options->grpc_channel_arguments},
       "settings of connections by the names that the gRPC library has for them, as name=value,name=value"},
      {"enable_grpc_healthcheck_service", Switch{&options->enable_grpc_healthcheck_service},
       "offer grpc.health.v1.Health (Check and Watch) for the server, ModelService, PredictionService and each model"},
      {"slow_request_ms", Integer<int32_t>{&options->slow_request_ms, 0},
       "log requests for inference that take this many milliseconds or longer, at most 10 in a second; 0 logs none. "
       "Requests that fail by the server's fault are always logged"},
      {"ssl_config_file", Text{&options->ssl_config_file},
       "text file with an SSLConfig message (server_key, server_cert, custom_ca, client_verify), to encrypt the gRPC "
       "port; read again when it changes"},
      {"rest_api_ssl_config_file", Text{&options->rest_api_ssl_config_file},
       "text file with an SSLConfig message, to encrypt the REST port, which then speaks HTTPS only; may be that of "
       "ssl_config_file"},
      {"rest_api_port", Integer<int32_t>{&options->rest_api_port, 0, 65535},
       "port of the REST API; 0 means no REST API"},
      {"rest_api_num_threads", Integer<int32_t>{&options->rest_api_num_threads, 0, 4096},
       "number of REST requests that are computed at the same time, besides the gRPC requests; 0 means the number that "
       "grpc_max_threads=0 gives"},
      {"rest_api_timeout_in_ms", Integer<int32_t>{&options->rest_api_timeout_in_ms, 1},
       "milliseconds that a REST request may take"},
      {"rest_api_enable_cors_support", Switch{&options->rest_api_enable_cors_support},
       "allow web pages of other hosts to send requests (CORS)"},
      {"model_config_file", Text{&options->model_config_file},
       "text file with a ModelServerConfig message, which lists models, their versions and labels; replaces "
       "model_name and model_base_path"},
      {"model_config_file_poll_wait_seconds", Integer<int32_t>{&options->model_config_file_poll_wait_seconds, 0},
       "seconds between two checks whether model_config_file has changed; 0 means that it is read once"},
      {"num_load_threads", Integer<int32_t>{&options->num_load_threads, 0, 1024},
       "number of versions that are loaded at the same time; 0 means 1"},
      {"num_unload_threads", Integer<int32_t>{&options->num_unload_threads, 0, 1024},
       "number of versions that are unloaded at the same time; 0 means 1"},
      {"max_num_load_retries", Integer<int32_t>{&options->max_num_load_retries, 0},
       "number of times that a failed load is tried again, if its files may still arrive"},
      {"load_retry_interval_micros", Integer<int64_t>{&options->load_retry_interval_micros, 0, int64_t{1} << 50},
       "microseconds between two tries to load a version"},
      {"flush_filesystem_caches", Switch{&options->flush_filesystem_caches},
       "flush the caches of TensorFlow's file systems after each load"},
      {"allow_version_labels_for_unavailable_models", Switch{&options->allow_version_labels_for_unavailable_models},
       "allow a new label to name a version that is not available yet"},
      {"tensorflow_session_config_file", Text{&options->tensorflow_session_config_file},
       "text file with a tensorflow.ConfigProto message for all sessions"},
      {"enable_batching", Switch{&options->enable_batching}, "compute the requests of several clients in one batch"},
      {"batching_parameters_file", Text{&options->batching_parameters_file},
       "text file with a BatchingParameters message; requires enable_batching"},
      {"enable_per_model_batching_parameters", Switch{&options->enable_per_model_batching_parameters},
       "use a version's own batching_params.pbtxt, if it has one, instead of batching_parameters_file"},
      {"enable_model_warmup", Switch{&options->enable_model_warmup},
       "replay assets.extra/tf_serving_warmup_requests before a version takes requests"},
      {"num_request_iterations_for_warmup", Integer<int32_t>{&options->num_request_iterations_for_warmup, 0},
       "number of times that each warm-up request is replayed; 0 means 1"},
      {"monitoring_config_file", Text{&options->monitoring_config_file},
       "text file with a MonitoringConfig message, prometheus_config {enable path}, to show metrics on the REST port"},
      {"enable_signature_method_name_check", Switch{&options->enable_signature_method_name_check},
       "refuse Classify and Regress requests for signatures with another method name"},
      {"version", Switch{&options->version}, "print versions and exit"},
      {"help", Switch{&options->help}, "print this text and exit"},
  };
}

std::vector<std::string> Split(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    if (comma > 0) parts.emplace_back(text.substr(0, comma));
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return parts;
}

// Each overload stores `value` in the flag's target, or returns what is allowed.
template <typename T>
std::optional<std::string> Store(std::string_view value, const Integer<T>& target) {
  T number = 0;
  if (!ParseNumber(value, &number) || number < target.min || number > target.max) {
    return StrCat("an integer from ", target.min, " to ", target.max);
  }
  *target.value = number;
  return std::nullopt;
}

std::optional<std::string> Store(std::string_view value, const Text& target) {
  *target.value = std::string(value);
  return std::nullopt;
}

std::optional<std::string> Store(std::string_view value, const List& target) {
  *target.value = Split(value);
  return std::nullopt;
}

std::optional<std::string> Store(std::string_view value, const Switch& target) {
  if (value != "true" && value != "false" && value != "1" && value != "0") return "true or false";
  *target.value = value == "true" || value == "1";
  return std::nullopt;
}

std::string Show(const Text& target) { return "\"" + *target.value + "\""; }

std::string Show(const Switch& target) { return *target.value ? "true" : "false"; }

template <typename T>
std::string Show(const Integer<T>& target) {
  return std::to_string(*target.value);
}

std::string Show(const List& target) {
  std::string text;
  for (const std::string& part : *target.value) text += (text.empty() ? "" : ",") + part;
  return "\"" + text + "\"";
}

}  // namespace

std::vector<std::pair<std::string, std::string>> ServerOptions::ChannelArguments() const {
  std::vector<std::pair<std::string, std::string>> arguments;
  for (const std::string& part : Split(grpc_channel_arguments)) {
    const size_t equals = std::min(part.find('='), part.size());
    arguments.emplace_back(part.substr(0, equals), part.substr(std::min(equals + 1, part.size())));
  }
  return arguments;
}

Status ParseServerOptions(int argc, const char* const* argv, ServerOptions* options,
                          std::vector<std::string>* unknown) {
  const std::vector<Flag> flags = Flags(options);
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const size_t equals = argument.find('=');
    const Flag* flag = nullptr;
    if (argument.substr(0, 2) == "--") {
      const std::string_view name = argument.substr(2, equals == std::string_view::npos ? equals : equals - 2);
      for (const Flag& candidate : flags) {
        if (candidate.name == name) flag = &candidate;
      }
    }
    if (flag == nullptr) {
      unknown->emplace_back(argument);
      continue;
    }
    std::optional<std::string> allowed;
    std::string_view value;
    if (equals != std::string_view::npos) {
      value = argument.substr(equals + 1);
      allowed = std::visit([&](const auto& target) { return Store(value, target); }, flag->target);
    } else if (const Switch* target = std::get_if<Switch>(&flag->target)) {
      *target->value = true;
    } else {
      allowed = StrCat("--", flag->name, "=VALUE in one argument");
    }
    if (allowed) {
      return MakeStatus(StatusCode::kInvalidArgument, "flag --", flag->name, ": got \"", argument, "\", expected ",
                        *allowed);
    }
  }
  return {};
}

Status ValidateServerOptions(const ServerOptions& options) {
  if (!options.batching_parameters_file.empty() && !options.enable_batching) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "--batching_parameters_file supplied without --enable_batching; add --enable_batching");
  }
  if (options.tensorflow_session_parallelism > 0 && options.tensorflow_intra_op_parallelism > 0 &&
      options.tensorflow_inter_op_parallelism > 0) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "--tensorflow_session_parallelism sets both --tensorflow_intra_op_parallelism and "
                      "--tensorflow_inter_op_parallelism; leave out one of the three");
  }
  // The file replaces name and path.
  if (!options.model_config_file.empty()) return {};
  if (options.model_base_path.empty()) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "no model to serve; give the folder of its versions with --model_base_path=/absolute/path, or a "
                      "list of models with --model_config_file");
  }
  if (options.model_name.empty()) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "--model_name is empty; give a name, or leave the flag out for \"default\"");
  }
  return CheckBasePath(options.model_name, options.model_base_path);
}

Status CheckBasePath(const std::string& model, const std::string& base_path) {
  if (base_path.find('/') == 0 || base_path.find("://") != std::string::npos) return {};
  return MakeStatus(StatusCode::kInvalidArgument, "Expected model ", model,
                    " to have an absolute path or URI; got base_path()=", base_path);
}

std::string ServerOptionsHelp() {
  ServerOptions defaults;
  std::string text =
      "dpsr_model_server: serves SavedModels over TensorFlow Serving's gRPC and REST APIs\n\n"
      "usage: dpsr_model_server --model_base_path=/path [--name=value ...]\n\n";
  for (const Flag& flag : Flags(&defaults)) {
    text += StrCat("  --", flag.name, "=", std::visit([](const auto& target) { return Show(target); }, flag.target),
                   "\n      ", flag.help, "\n");
  }
  return text;
}

std::string ServerAddress(const std::string& host, int port) {
  return host.find(':') == std::string::npos ? StrCat(host, ":", port) : StrCat("[", host, "]:", port);
}

}  // namespace dpsr::serving
