#include "serving/model_server/server_options.h"

#include <charconv>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>
#include <variant>

namespace dpsr::serving {
namespace {

// An integer flag and the values that it takes.
template <typename T>
struct Integer {
  T* value;
  T min = std::numeric_limits<T>::min();
  T max = std::numeric_limits<T>::max();
};

struct Text {
  std::string* value;
};

// Separated by commas; empty parts are dropped.
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
      {"port", Integer<int32_t>{&options->port, 0, 65535}, "port of the gRPC API; 0 picks a free one and prints it"},
      {"model_name", Text{&options->model_name}, "name under which clients ask for the model"},
      {"model_base_path", Text{&options->model_base_path},
       "absolute path of the folder whose numbered children are the versions of the model; required"},
      {"op_library", List{&options->op_libraries}, "libraries of TensorFlow ops, a.so,b.so, loaded before any model"},
      {"file_system_poll_wait_seconds", Integer<int64_t>{&options->file_system_poll_wait_seconds},
       "seconds between two looks for new versions; 0 looks once, a negative value never"},
      {"tensorflow_session_parallelism", Integer<int32_t>{&options->tensorflow_session_parallelism, 0},
       "threads of a session, within an op and between ops; 0 leaves the choice to the server"},
      {"tensorflow_intra_op_parallelism", Integer<int32_t>{&options->tensorflow_intra_op_parallelism, 0},
       "threads within an op; 0 leaves the choice to TensorFlow"},
      {"tensorflow_inter_op_parallelism", Integer<int32_t>{&options->tensorflow_inter_op_parallelism, 0},
       "threads that run the ops of a graph; up to 1, a request's graph runs in the thread that serves the request"},
      {"saved_model_tags", List{&options->saved_model_tags}, "tags of the graph to load from the SavedModel"},
      {"grpc_max_threads", Integer<int32_t>{&options->grpc_max_threads, 0, 4096},
       "requests that are computed at a time, the others wait; 0 for four times the number of CPUs"},
      {"enable_serialization_as_tensor_content", Switch{&options->enable_serialization_as_tensor_content},
       "answer tensors as raw bytes (tensor_content) instead of typed fields"},
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

// Each overload stores `value`, or says what is allowed.
template <typename T>
std::optional<std::string> Store(std::string_view value, const Integer<T>& target) {
  T number = 0;
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stop != end || number < target.min || number > target.max) {
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
      allowed = StrCat("--", flag->name, "=VALUE, without spaces");
    }
    if (allowed) {
      return MakeStatus(StatusCode::kInvalidArgument, "flag --", flag->name, ": got \"", argument, "\", expected ",
                        *allowed);
    }
  }
  return {};
}

Status ValidateServerOptions(const ServerOptions& options) {
  if (options.model_base_path.empty()) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "no model to serve; give the folder of its versions with --model_base_path=/absolute/path");
  }
  if (options.model_name.empty()) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "--model_name is empty; leave it out for the name \"default\", or give a name");
  }
  if (options.model_base_path[0] != '/' && options.model_base_path.find("://") == std::string::npos) {
    return MakeStatus(StatusCode::kInvalidArgument, "Expected model ", options.model_name,
                      " to have an absolute path or URI; got base_path()=", options.model_base_path);
  }
  if (options.tensorflow_session_parallelism > 0 && options.tensorflow_intra_op_parallelism > 0 &&
      options.tensorflow_inter_op_parallelism > 0) {
    return MakeStatus(StatusCode::kInvalidArgument,
                      "--tensorflow_session_parallelism stands for --tensorflow_intra_op_parallelism and "
                      "--tensorflow_inter_op_parallelism; give the first or the other two, not all three");
  }
  return {};
}

std::string ServerOptionsHelp() {
  ServerOptions defaults;
  std::string text =
      "dpsr_model_server: serves SavedModels over TensorFlow Serving's gRPC API\n\n"
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
