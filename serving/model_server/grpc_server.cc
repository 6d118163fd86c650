#include "serving/model_server/grpc_server.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <unordered_map>

#include "serving/dpsr_serving/health.pb.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/grpc_reflection.h"
#include "serving/model_server/log.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/parse_number.h"
#include "serving/model_server/request_scope.h"
#include "serving/model_server/server_options.h"
#include "serving/wire/call_server.h"
#include "serving/wire/compression.h"
#include "serving/wire/message_fields.h"
#include "tensorflow_serving/apis/classification.pb.h"
#include "tensorflow_serving/apis/get_model_metadata.pb.h"
#include "tensorflow_serving/apis/get_model_status.pb.h"
#include "tensorflow_serving/apis/inference.pb.h"
#include "tensorflow_serving/apis/model_management.pb.h"
#include "tensorflow_serving/apis/predict.pb.h"
#include "tensorflow_serving/apis/regression.pb.h"

namespace dpsr::serving {
namespace {

using ::grpc::health::v1::HealthCheckRequest;
using ::grpc::health::v1::HealthCheckResponse;
namespace apis = ::tensorflow::serving;
using CallPtr = std::shared_ptr<Call>;
using MethodMap = std::unordered_map<std::string, Method>;

constexpr char kEntrypoint[] = "GRPC";
constexpr char kPredictionService[] = "tensorflow.serving.PredictionService";
constexpr char kModelService[] = "tensorflow.serving.ModelService";
constexpr char kHealthService[] = "grpc.health.v1.Health";

// gRPC's status codes are those of absl.
constexpr int kUnavailable = static_cast<int>(absl::StatusCode::kUnavailable);
constexpr int kPermissionDenied = static_cast<int>(absl::StatusCode::kPermissionDenied);

// gRPC sends the text of an error in a header, and clients limit the size of headers.
constexpr size_t kMaxErrorBytes = 1024;

constexpr size_t kMaxMessageBytes = std::numeric_limits<int32_t>::max();  // protobuf's limit
// A packed message may become this large, because a small one could otherwise take all memory. One that is packed very
// well may become kSmallUnpackedBytes.
constexpr size_t kMaxUnpackedBytes = size_t{32} << 20;
constexpr size_t kSmallUnpackedBytes = size_t{4} << 20;
constexpr size_t kMaxPackRatio = 64;

// Number of calls that a connection may have at the same time, unless --grpc_channel_arguments says another one.
constexpr uint32_t kMaxStreams = 1024;
constexpr size_t kMaxConnections = 10'000;

// Calls that a client may give up at once, and in a second. They are many, because a proxy gives up the calls of all its
// clients on one connection, and would lose this connection with all calls on it.
constexpr double kMostResets = 10'000;
constexpr double kResetsPerSecond = 5'000;

// Number of reloads that may wait for models at the same time. A reload whose models do not load must not block the
// next reload, which may correct it.
constexpr int kReloads = 8;

// Answers below this size are never compressed: they fit into one packet.
constexpr size_t kMinCompressedBytes = 1024;

void FinishWith(const tensorflow::Status& status, Call* call, std::vector<Header> trailing = {}) {
  std::string message(status.message());
  if (message.size() > kMaxErrorBytes) message = message.substr(0, kMaxErrorBytes) + "...TRUNCATED";
  call->Finish(static_cast<int>(status.code()), message, {}, std::move(trailing));
}

// What the server does with messages. Set once, before the first call.
struct MessageOptions {
  size_t most_unpacked = kMaxUnpackedBytes;
  std::string compression;  // of answers to all clients that accept it; empty: of those whose requests ask for it
};

// Reads the request of a call, which may be packed.
tensorflow::Status ReadRequest(const Call& call, const MessageOptions& options, google::protobuf::Message* request) {
  std::string_view message = call.message();
  std::string unpacked;
  if (!call.encoding().empty()) {
    if (!IsCompression(call.encoding())) {
      return absl::UnimplementedError(
          StrCat("the message is compressed by '", call.encoding(), "'; expected one of ", kCompressions));
    }
    const size_t most =
        std::min(options.most_unpacked, std::max(kSmallUnpackedBytes, kMaxPackRatio * message.size()));
    switch (Unpack(call.encoding(), message, most, &unpacked)) {
      case UnpackResult::kOk:
        break;
      case UnpackResult::kBroken:
        return absl::InternalError(StrCat("the message is not a complete text in the format ", call.encoding()));
      case UnpackResult::kTooLarge:
        return absl::ResourceExhaustedError(StrCat("the message has more than ", most, " bytes when it is unpacked, ",
                                                   "which is the limit; send it without compression"));
    }
    message = unpacked;
  }
  MessageFields fields(message, kMostFields);
  for (MessageField field; fields.Next(&field);) {
  }
  if (fields.has_too_many()) {
    return absl::InvalidArgumentError(StrCat("the request has more than ", kMostFields, " fields, which is the limit"));
  }
  if (message.size() > kMaxMessageBytes || !request->ParseFromArray(message.data(), static_cast<int>(message.size()))) {
    return absl::InternalError(StrCat("the message is not a ", request->GetTypeName()));
  }
  return tensorflow::OkStatus();
}

// Returns whether a list of names with commas between them has this one.
bool Names(std::string_view list, std::string_view name) {
  while (!list.empty()) {
    const size_t end = std::min(list.find(','), list.size());
    std::string_view one = list.substr(0, end);
    one.remove_prefix(std::min(one.find_first_not_of(' '), one.size()));
    if (one.substr(0, one.find_last_not_of(' ') + 1) == name) return true;
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return false;
}

// Answers a call. Compresses the answer as the client compressed its request, as gRPC for Go does, too. What a client
// accepts says less: the libraries accept every compression by default, and compressing costs more than most answers.
tensorflow::Status FinishOk(const google::protobuf::Message& response, const MessageOptions& options, Call* call,
                            std::vector<Header> trailing) {
  const size_t size = response.ByteSizeLong();
  if (size > kMaxMessageBytes) {
    return absl::ResourceExhaustedError(
        StrCat("the answer has ", size, " bytes; a message has at most ", kMaxMessageBytes));
  }
  auto owner = std::make_shared<std::string>();
  response.SerializeToString(owner.get());
  std::string compression = IsCompression(call->asked()) ? call->asked() : std::string();
  if (!options.compression.empty() && Names(call->accepted(), options.compression)) compression = options.compression;
  if (!compression.empty() && size >= kMinCompressedBytes) {
    auto packed = std::make_shared<std::string>();
    if (Pack(compression, *owner, packed.get())) {
      owner = std::move(packed);
    } else {
      compression.clear();
    }
  } else {
    compression.clear();
  }
  Message message{owner->data(), owner->size(), owner, std::move(compression)};
  call->Finish(0, "", std::move(message), std::move(trailing));
  return tensorflow::OkStatus();
}

// Reads the request of a call, answers it on this thread, and finishes the call.
template <typename Request, typename Response, typename Answer>
void AnswerHere(const MessageOptions& options, Call* call, Answer answer) {
  const tensorflow::Status status = CatchExceptions("the request", [&]() -> tensorflow::Status {
    Request request;
    Response response;
    TF_RETURN_IF_ERROR(ReadRequest(*call, options, &request));
    TF_RETURN_IF_ERROR(answer(request, &response));
    return FinishOk(response, options, call, {});
  });
  if (!status.ok()) FinishWith(status, call);
}

// What all calls for inference need. Calls may outlive the server, but not what this points to.
struct Shared {
  const RequestHandler* handler;
  WorkerPool* workers;
  RequestLog* log;
  std::shared_ptr<const MessageOptions> messages;
};

// Logs a call that was computed, if it is worth it. Returns its times, if the client's trace is kept.
std::vector<Header> Report(const Shared& shared, const Call& call, const char* method, const apis::ModelSpec& spec,
                           const tensorflow::Status& status, const RequestTimes& times) {
  std::vector<Header> trailing;
  const std::string_view parent = call.Metadata(kTraceParent);
  if (!parent.empty()) {
    const std::optional<TraceParent> trace = ParseTraceParent(parent);
    if (trace.has_value() && trace->sampled) {
      trailing.push_back({kQueueMicros, std::to_string(times.queue_micros)});
      trailing.push_back({kComputeMicros, std::to_string(times.compute_micros)});
    }
  }
  const bool failed = IsServersFault(status);
  if (shared.log->Wants(failed, times)) {
    shared.log->Write(StrCat(method, " of model ", spec.name()), failed ? status.ToString() : "", times, parent);
  }
  return trailing;
}

// Returns the part of a request that says which model it is for.
template <typename Request>
const apis::ModelSpec& ModelSpecOf(const Request& request) {
  return request.model_spec();
}

template <>
const apis::ModelSpec& ModelSpecOf(const apis::MultiInferenceRequest& request) {
  tensorflow::Status status;
  const apis::ModelSpec* const spec = SpecOf(request, &status);
  return spec == nullptr ? apis::ModelSpec::default_instance() : *spec;
}

// Computes the answer to a call, on a worker.
template <typename Request, typename Response, typename Answer>
void Compute(const Shared& shared, Call* call, const char* method, std::chrono::steady_clock::time_point arrival,
             Answer answer) {
  RequestTimes times;
  times.queue_micros = MicrosecondsSince(arrival);
  RecordQueueing(times.queue_micros);
  // Nobody gets the answer to a call that was given up in the queue. If its deadline passed there, the client may not
  // have noticed yet.
  if (call->IsOver()) {
    FinishWith(absl::DeadlineExceededError("the deadline passed before the request was computed"), call);
    return;
  }
  std::vector<Header> trailing;
  const tensorflow::Status status = CatchExceptions("the request", [&]() -> tensorflow::Status {
    Request request;
    Response response;
    TF_RETURN_IF_ERROR(ReadRequest(*call, *shared.messages, &request));
    tensorflow::Status answered;
    {
      const RequestScope scope(Deadline::max(), [call] { return call->IsOver(); });
      answered = answer(request, call->deadline(), &response);
    }
    times.compute_micros = MicrosecondsSince(arrival) - times.queue_micros;
    trailing = Report(shared, *call, method, ModelSpecOf(request), answered, times);
    TF_RETURN_IF_ERROR(answered);
    return FinishOk(response, *shared.messages, call, trailing);
  });
  if (!status.ok()) FinishWith(status, call, std::move(trailing));
}

// A method that workers answer, because the threads of the connections must not block.
template <typename Request, typename Response, typename Answer>
Method OnWorkers(const Shared& shared, const char* name, Answer answer) {
  const auto begin = [shared, name, answer](CallPtr call) {
    const auto arrival = std::chrono::steady_clock::now();
    // The call is not moved, because it is answered here if the queue is full.
    const bool added = shared.workers->Add(
        [shared, name, answer, call, arrival] { Compute<Request, Response>(shared, call.get(), name, arrival, answer); });
    if (added) return;
    Request request;
    if (ReadRequest(*call, *shared.messages, &request).ok()) {
      shared.handler->RecordRefused(ModelSpecOf(request), name, kEntrypoint);
    }
    FinishWith(absl::ResourceExhaustedError(kQueueIsFull), call.get());
  };
  return {MethodKind::kUnary, [begin](CallPtr call) {
            Call* const kept = call.get();
            const tensorflow::Status status = CatchExceptions("the request", [&] {
              begin(std::move(call));
              return tensorflow::OkStatus();
            });
            if (!status.ok()) FinishWith(status, kept);
          }};
}

std::string PathOf(const char* service, const char* method) { return StrCat("/", service, "/", method); }

void AddPredictionService(const Shared& shared, MethodMap* methods) {
  const RequestHandler* const handler = shared.handler;
  const auto add = [&](const char* name, Method method) {
    methods->emplace(PathOf(kPredictionService, name), std::move(method));
  };
  add("Predict", OnWorkers<apis::PredictRequest, apis::PredictResponse>(
                     shared, "Predict", [handler](const auto& request, Deadline deadline, auto* response) {
                       return handler->Predict(request, deadline, kEntrypoint, response);
                     }));
  add("Classify", OnWorkers<apis::ClassificationRequest, apis::ClassificationResponse>(
                      shared, "Classify", [handler](const auto& request, Deadline deadline, auto* response) {
                        return handler->Classify(request, deadline, kEntrypoint, response);
                      }));
  add("Regress", OnWorkers<apis::RegressionRequest, apis::RegressionResponse>(
                     shared, "Regress", [handler](const auto& request, Deadline deadline, auto* response) {
                       return handler->Regress(request, deadline, kEntrypoint, response);
                     }));
  add("MultiInference", OnWorkers<apis::MultiInferenceRequest, apis::MultiInferenceResponse>(
                            shared, "MultiInference", [handler](const auto& request, Deadline deadline, auto* response) {
                              return handler->MultiInference(request, deadline, kEntrypoint, response);
                            }));
  add("GetModelMetadata", OnWorkers<apis::GetModelMetadataRequest, apis::GetModelMetadataResponse>(
                              shared, "GetModelMetadata", [handler](const auto& request, Deadline, auto* response) {
                                return handler->GetModelMetadata(request, response);
                              }));
}

// `reloads`: the threads on which reloads wait; null if the address takes none.
void AddModelService(const RequestHandler* handler, std::shared_ptr<const MessageOptions> options, WorkerPool* reloads,
                     MethodMap* methods) {
  const auto status = [handler, options](const CallPtr& call) {
    AnswerHere<apis::GetModelStatusRequest, apis::GetModelStatusResponse>(
        *options, call.get(),
        [&](const auto& request, auto* response) { return handler->GetModelStatus(request, response); });
  };
  // Waits for models to load, on threads that are used for nothing else. The status in the response is also the status
  // of the call.
  const auto reload = [handler, options, reloads](const CallPtr& call) {
    if (reloads == nullptr) {
      call->Finish(kPermissionDenied,
                   "this address takes no HandleReloadConfigRequest; see --reload_address of the server", {}, {});
      return;
    }
    reloads->Add([handler, options, call] {
      AnswerHere<apis::ReloadConfigRequest, apis::ReloadConfigResponse>(
          *options, call.get(), [&](const auto& request, auto* response) {
            return handler->Reload(request, [&] { return call->IsOver(); }, response);
          });
    });
  };
  methods->emplace(PathOf(kModelService, "GetModelStatus"), Method{MethodKind::kUnary, status});
  methods->emplace(PathOf(kModelService, "HandleReloadConfigRequest"), Method{MethodKind::kUnary, reload});
}

// The health service. Thread-safe.
class HealthService {
 public:
  // Sets whether some services serve. A service that was never set is unknown.
  void Set(const std::map<std::string, bool>& serving) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [service, serves] : serving) serving_[service] = serves;
    watchers_.remove_if([this](Watcher& watcher) { return Update(&watcher); });
  }

  // From now on no service serves. Calls that watch are told so, and end.
  void Stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    watchers_.remove_if([this](Watcher& watcher) { return Update(&watcher); });
  }

  void AddMethods(std::shared_ptr<const MessageOptions> options, MethodMap* methods) {
    methods->emplace(PathOf(kHealthService, "Check"), Method{MethodKind::kUnary, [this, options](const CallPtr& call) {
      AnswerHere<HealthCheckRequest, HealthCheckResponse>(
          *options, call.get(), [this](const auto& request, auto* response) { return Check(request, response); });
    }});
    methods->emplace(PathOf(kHealthService, "Watch"),
                     Method{MethodKind::kStreaming, [this](const CallPtr& call) { BeginWatch(call); }});
  }

 private:
  struct Watcher {
    CallPtr call;
    std::string service;
    HealthCheckResponse::ServingStatus status = HealthCheckResponse::UNKNOWN;  // what was sent last
  };

  tensorflow::Status Check(const HealthCheckRequest& request, HealthCheckResponse* response) {
    std::lock_guard<std::mutex> lock(mutex_);
    response->set_status(StatusOf(request.service()));
    if (response->status() != HealthCheckResponse::SERVICE_UNKNOWN) return tensorflow::OkStatus();
    return absl::NotFoundError(StrCat("there is no service ", request.service()));
  }

  void BeginWatch(const CallPtr& call) {
    Call* const raw = call.get();
    call->on_message = [this, raw, weak = std::weak_ptr<Call>(call)](std::string_view message) {
      HealthCheckRequest request;
      if (!request.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
        FinishWith(absl::InternalError("the message is not a HealthCheckRequest"), raw);
        return;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      Watcher watcher{weak.lock(), request.service()};
      if (!Update(&watcher)) watchers_.push_back(std::move(watcher));
    };
    call->on_end = [this, raw](bool cancelled) {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto is_this = [raw](const Watcher& watcher) { return watcher.call.get() == raw; };
      if (cancelled) {
        watchers_.remove_if(is_this);
      } else if (std::none_of(watchers_.begin(), watchers_.end(), is_this)) {
        FinishWith(absl::InternalError("the call has no message"), raw);
      }
    };
  }

  // Sends the status if the client does not have it, and ends the call if the server stops. Returns whether the call is
  // over. Called with the lock held.
  bool Update(Watcher* watcher) {
    const HealthCheckResponse::ServingStatus status = StatusOf(watcher->service);
    bool alive = true;
    if (status != watcher->status) {
      watcher->status = status;
      HealthCheckResponse response;
      response.set_status(status);
      alive = watcher->call->Write(response.SerializeAsString());
    }
    if (alive && stopping_) watcher->call->Finish(kUnavailable, "the server is stopping", {}, {});
    return !alive || stopping_;
  }

  // Called with the lock held.
  HealthCheckResponse::ServingStatus StatusOf(const std::string& service) const {
    const auto found = serving_.find(service);
    if (found == serving_.end()) return HealthCheckResponse::SERVICE_UNKNOWN;
    return found->second && !stopping_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  }

  std::mutex mutex_;  // of all that follows
  bool stopping_ = false;
  std::map<std::string, bool> serving_;
  std::list<Watcher> watchers_;
};

// Reads the settings of --grpc_channel_arguments. They have the names and meanings of the gRPC library's.
void ReadChannelArguments(const std::vector<std::pair<std::string, std::string>>& arguments, CallServerOptions* options,
                          MessageOptions* messages) {
  const std::map<std::string, std::function<void(int)>> known = {
      {"grpc.max_concurrent_streams", [&](int value) { options->limits.streams = static_cast<uint32_t>(value); }},
      {"grpc.max_receive_message_length",
       [&](int value) { options->limits.message_bytes = messages->most_unpacked = static_cast<size_t>(value); }},
      {"grpc.max_metadata_size", [&](int value) { options->limits.header_bytes = static_cast<size_t>(value); }},
      {"grpc.max_connection_idle_ms", [&](int value) { options->idle_s = value / 1e3; }},
      {"grpc.max_connection_age_ms", [&](int value) { options->age_s = value / 1e3; }},
      {"grpc.max_connection_age_grace_ms", [&](int value) { options->grace_s = value / 1e3; }},
      {"grpc.default_compression_algorithm",
       [&](int value) { messages->compression = value == 1 ? kDeflate : value == 2 ? kGzip : ""; }},
  };
  std::string names;
  for (const auto& entry : known) names += (names.empty() ? "" : ", ") + entry.first;
  for (const auto& [name, value] : arguments) {
    const auto found = known.find(name);
    int number = 0;
    if (found == known.end()) {
      LogWarning("--grpc_channel_arguments: this server has no ", name, ", and ignores it; it has ", names);
    } else if (!ParseNumber(value, &number) || (number < 0 && number != -1)) {
      LogWarning("--grpc_channel_arguments: ", name, "='", value, "' is ignored; expected a number, or -1 for no limit");
    } else if (number >= 0) {
      found->second(number);
    }
  }
}

// Returns how many connections there may be: each needs an open file, and models and others need some, too.
size_t MostConnections() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return kMaxConnections;
  return std::clamp<size_t>(limit.rlim_cur / 2, 1, kMaxConnections);
}

// Returns the bytes that the calls of all connections may hold if no flag says it.
size_t DefaultHeldBytes() {
  constexpr size_t kLeast = size_t{256} << 20;
  constexpr size_t kShare = 64;
  const auto memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::max(kLeast, memory / kShare);
}

// Returns where to get the TLS context of a new connection.
TlsSource TlsOf(const std::shared_ptr<TlsFile>& file) {
  if (file == nullptr) return nullptr;
  return [file] { return file->Current()->context; };
}

// Reads HOST:PORT or unix:/PATH. Returns false if it is neither.
bool ParseAddress(const std::string& text, ListenAddress* address) {
  constexpr std::string_view kUnix = "unix:";
  if (text.rfind(kUnix, 0) == 0) {
    address->path = text.substr(kUnix.size());
    return !address->path.empty();
  }
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || !ParseNumber(text.substr(colon + 1), &address->port)) return false;
  address->host = text.substr(0, colon);
  if (address->host.size() > 2 && address->host.front() == '[' && address->host.back() == ']') {
    address->host = address->host.substr(1, address->host.size() - 2);
  }
  return !address->host.empty() && address->port >= 0 && address->port < 1 << 16;
}

class GrpcServerImpl final : public GrpcServer {
 public:
  GrpcServerImpl(const RequestHandler* handler, WorkerPool* workers, RequestLog* log)
      : handler_(handler), workers_(workers), log_(log) {}
  ~GrpcServerImpl() override {
    EndHealth();
    // Nothing begins any more. Reloads that wait end when their calls do.
    reload_server_.reset();
    server_.reset();
  }

  Status Listen(const GrpcServerOptions& options) {
    CallServerOptions calls;
    const auto messages = std::make_shared<MessageOptions>();
    calls.total_bytes = options.max_held_bytes > 0 ? options.max_held_bytes : DefaultHeldBytes();
    calls.limits.connection_bytes = calls.total_bytes;
    calls.limits.message_bytes = kMaxMessageBytes;
    calls.limits.streams = kMaxStreams;
    calls.limits.most_resets = kMostResets;
    calls.limits.resets_per_s = kResetsPerSecond;
    calls.connections = MostConnections();
    calls.threads = options.threads;
    ReadChannelArguments(options.channel_arguments, &calls, messages.get());
    const bool takes_reloads = options.reload_address.empty();
    if (options.reload_address != kNoReloads) reloads_ = std::make_unique<WorkerPool>(kReloads);
    DPSR_RETURN_IF_ERROR(ListenForReloads(options, calls, messages));

    MethodMap methods;
    AddPredictionService({handler_, workers_, log_, messages}, &methods);
    AddModelService(handler_, messages, takes_reloads ? reloads_.get() : nullptr, &methods);
    std::vector<std::string> services = {kPredictionService, kModelService};
    if (options.health_service) {
      health_ = std::make_unique<HealthService>();
      SetServices(false);
      health_->AddMethods(messages, &methods);
      services.push_back(kHealthService);
    }
    AddReflection(std::move(services), &methods);
    server_ = CallServer::Make(calls, std::move(methods));
    const Status port = server_->Listen({options.host, options.port, ""}, TlsOf(options.tls), &port_);
    if (!port.ok()) {
      return MakeStatus(port.code(), "cannot listen on ", ServerAddress(options.host, options.port), ": ",
                        port.message(),
                        "; choose another address with --host and --port (--port=0 picks a free port), or stop the "
                        "program that listens there");
    }
    if (!options.socket_path.empty()) {
      const Status socket = server_->Listen({"", 0, options.socket_path}, nullptr, nullptr);
      if (!socket.ok()) {
        return MakeStatus(socket.code(), "cannot listen on the UNIX socket ", options.socket_path, ": ",
                          socket.message(), "; choose another path with --grpc_socket_path");
      }
    }
    if (reload_server_ != nullptr) DPSR_RETURN_IF_ERROR(reload_server_->Start());
    return server_->Start();
  }

  int port() const override { return port_; }

  void SetServing(bool serving) override {
    if (health_ == nullptr) return;
    if (serving) {
      SetServices(true);
      health_thread_ = std::thread([this] { ShowModels(); });
    } else {
      EndHealth();
      health_->Stop();
    }
  }

  void Shutdown(std::chrono::milliseconds drain) override {
    SetServing(false);
    const auto end = std::chrono::steady_clock::now() + drain;
    server_->Shutdown(drain);
    // A call that does not end on the other server must not take the time of the requests.
    const auto rest = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    if (reload_server_ != nullptr) reload_server_->Shutdown(std::max(rest, std::chrono::milliseconds(0)));
  }

 private:
  // Keeps the statuses of the models, under their names, and of the server as a whole: serving while every model has a
  // version that answers, as /readyz says. A model that was removed stays known, and does not serve.
  void ShowModels() {
    constexpr std::chrono::milliseconds kLookEvery(100);
    std::map<std::string, bool> shown;
    std::unique_lock<std::mutex> lock(health_mutex_);
    do {
      std::map<std::string, bool> present = handler_->models().Available();
      bool all = true;
      for (const auto& [name, available] : present) all &= available;
      for (const auto& [name, available] : shown) present.emplace(name, false);
      // These names belong to the services, which serve from the first loads to the end.
      for (const char* service : {"ModelService", "PredictionService"}) present.erase(service);
      present[""] = all;
      health_->Set(present);
      shown = std::move(present);
    } while (!health_stop_.wait_for(lock, kLookEvery, [this] { return health_ends_; }));
  }

  void SetServices(bool serving) {
    health_->Set({{"", serving}, {"ModelService", serving}, {"PredictionService", serving}});
  }

  void EndHealth() {
    {
      std::lock_guard<std::mutex> lock(health_mutex_);
      health_ends_ = true;
    }
    health_stop_.notify_all();
    if (health_thread_.joinable()) health_thread_.join();
  }

  // Serves reloads at their own address, if they have one.
  Status ListenForReloads(const GrpcServerOptions& options, const CallServerOptions& calls,
                          std::shared_ptr<const MessageOptions> messages) {
    if (options.reload_address.empty() || options.reload_address == kNoReloads) return {};
    MethodMap methods;
    AddModelService(handler_, std::move(messages), reloads_.get(), &methods);
    AddReflection({kModelService}, &methods);
    CallServerOptions own = calls;
    own.threads = 1;
    reload_server_ = CallServer::Make(own, std::move(methods));
    ListenAddress address;
    Status listening = MakeStatus(StatusCode::kInvalidArgument, "it is not an address");
    if (ParseAddress(options.reload_address, &address)) {
      listening = reload_server_->Listen(address, TlsOf(options.tls), nullptr);
    }
    if (listening.ok()) return {};
    return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on --reload_address=", options.reload_address,
                      ": ", listening.message(), "; give HOST:PORT that is free, unix:/PATH, or off");
  }

  const RequestHandler* const handler_;
  WorkerPool* const workers_;
  RequestLog* const log_;
  int port_ = 0;
  std::unique_ptr<HealthService> health_;  // null if the server does not offer it
  std::unique_ptr<WorkerPool> reloads_;    // null if the server takes no reloads
  std::unique_ptr<CallServer> reload_server_;
  std::unique_ptr<CallServer> server_;
  std::mutex health_mutex_;
  std::condition_variable health_stop_;
  bool health_ends_ = false;
  std::thread health_thread_;
};

}  // namespace

Status GrpcServer::Start(const GrpcServerOptions& options, RequestHandler* handler, WorkerPool* workers,
                         RequestLog* log, std::unique_ptr<GrpcServer>* server) {
  auto started = std::make_unique<GrpcServerImpl>(handler, workers, log);
  DPSR_RETURN_IF_ERROR(started->Listen(options));
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
