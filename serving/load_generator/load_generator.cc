// Sends requests to a model server, and reports how fast it answered. See --help.
//
// Closed loop (--concurrency): a fixed number of requests is always unanswered; the next one is sent when one is
// answered. Open loop (--rate): requests are due at times that do not depend on the server. A latency is counted from
// the time when the request was due. So a server that stalls, or a generator that is late, cannot hide requests that
// should have been sent meanwhile (coordinated omission).
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "serving/load_generator/histogram.h"
#include "serving/load_generator/programs.h"
#include "tensorflow_serving/apis/predict.pb.h"

namespace dpsr::serving {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr char kHelp[] =
    R"(dpsr_load_generator: sends requests to a model server, and prints a JSON object for each load

usage: dpsr_load_generator --target=HOST:PORT (--requests_file=F | --query_file=F)
                           (--concurrency=8,32 | --rate=1000,2000)

  --target=HOST:PORT     address of the server
  --requests_file=F      file of serialized requests, each after its size as a varint; they are sent in turn
  --query_file=F         file with a query on each line, sent as PredictRequests with these settings:
  --model=default, --signature=serving_default, --input=query, --batch=1
                         model, signature, name of the string input, and number of queries in a request
  --method=/tensorflow.serving.PredictionService/Predict
                         gRPC method to call
  --concurrency=N,...    closed loop with N unanswered requests; several loads run one after the other
  --rate=R,...           open loop with R requests per second; latencies are counted from when a request was due
  --arrivals=poisson     distribution of the times when requests are due: poisson or uniform
  --seconds=10           length of the measurement
  --warmup_seconds=2     time before the measurement in which requests are sent, too
  --channels=4           number of connections
  --threads=1            number of threads that receive answers; the open loop has as many that send
  --timeout_seconds=10   deadline of each request
  --max_outstanding=10000  largest number of unanswered requests in the open loop; further requests wait, and this time
                         counts for their latency; those still waiting at the end are reported as unsent
  --server_pid=0         process on this machine whose CPU time and memory are reported; 0: none
  --seed=1               seed of the arrivals
)";

struct Options {
  std::string target, requests_file, query_file, concurrency, rate;
  std::string model = "default", signature = "serving_default", input = "query";
  std::string method = "/tensorflow.serving.PredictionService/Predict";
  std::string arrivals = "poisson";
  double seconds = 10, warmup_seconds = 2, timeout_seconds = 10;
  int batch = 1, channels = 4, threads = 1, max_outstanding = 10'000, server_pid = 0, seed = 1;
};

template <typename Number>
Number Parse(const std::string& flag, const std::string& text) {
  Number number{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end || number < 0)
    Fail("--" + flag + "=" + text + ": expected a number of at least 0");
  return number;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  const std::map<std::string, std::string*> texts = {
      {"target", &options.target},         {"requests_file", &options.requests_file},
      {"query_file", &options.query_file}, {"concurrency", &options.concurrency},
      {"rate", &options.rate},             {"model", &options.model},
      {"signature", &options.signature},   {"input", &options.input},
      {"method", &options.method},         {"arrivals", &options.arrivals}};
  const std::map<std::string, double*> reals = {{"seconds", &options.seconds},
                                                {"warmup_seconds", &options.warmup_seconds},
                                                {"timeout_seconds", &options.timeout_seconds}};
  const std::map<std::string, int*> integers = {
      {"batch", &options.batch},           {"channels", &options.channels},
      {"threads", &options.threads},       {"max_outstanding", &options.max_outstanding},
      {"server_pid", &options.server_pid}, {"seed", &options.seed}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    const size_t equals = argument.find('=');
    const bool is_flag = argument.rfind("--", 0) == 0 && equals != std::string::npos;
    const std::string name = is_flag ? argument.substr(2, equals - 2) : "";
    const std::string value = is_flag ? argument.substr(equals + 1) : "";
    if (texts.count(name) > 0) {
      *texts.at(name) = value;
    } else if (reals.count(name) > 0) {
      *reals.at(name) = Parse<double>(name, value);
    } else if (integers.count(name) > 0) {
      *integers.at(name) = Parse<int>(name, value);
    } else {
      Fail("unknown argument " + argument + "; see --help");
    }
  }
  if (options.target.empty()) Fail("--target=HOST:PORT is missing");
  if (options.requests_file.empty() == options.query_file.empty()) Fail("give one of --requests_file and --query_file");
  if (options.concurrency.empty() == options.rate.empty()) Fail("give one of --concurrency and --rate");
  if (options.arrivals != "poisson" && options.arrivals != "uniform") Fail("--arrivals: expected poisson or uniform");
  if (std::min({options.batch, options.channels, options.threads, options.max_outstanding}) < 1) {
    Fail("--batch, --channels, --threads and --max_outstanding must be at least 1");
  }
  if (options.seconds <= 0) Fail("--seconds must be more than 0");
  return options;
}

std::vector<double> ParseList(const std::string& flag, const std::string& text) {
  std::vector<double> numbers;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    numbers.push_back(Parse<double>(flag, part));
    if (numbers.back() == 0) Fail("--" + flag + ": expected numbers above 0");
  }
  return numbers;
}

// Makes serialized PredictRequests of the lines of --query_file.
std::vector<std::string> MakeQueryRequests(const Options& options) {
  std::ifstream file(options.query_file, std::ios::binary);
  if (!file) Fail("cannot read " + options.query_file);
  tensorflow::serving::PredictRequest request;
  request.mutable_model_spec()->set_name(options.model);
  request.mutable_model_spec()->set_signature_name(options.signature);
  tensorflow::TensorProto& tensor = (*request.mutable_inputs())[options.input];
  tensor.set_dtype(tensorflow::DT_STRING);
  tensor.mutable_tensor_shape()->add_dim()->set_size(options.batch);
  std::vector<std::string> requests;
  for (std::string line; std::getline(file, line);) {
    tensor.add_string_val(line);
    if (tensor.string_val_size() < options.batch) continue;
    requests.push_back(request.SerializeAsString());
    tensor.clear_string_val();
  }
  if (requests.empty()) Fail(options.query_file + " holds no request");
  return requests;
}

std::vector<grpc::ByteBuffer> ReadRequests(const Options& options) {
  std::vector<grpc::ByteBuffer> buffers;
  for (const std::string& request :
       options.requests_file.empty() ? MakeQueryRequests(options) : ReadRequestsFile(options.requests_file)) {
    const grpc::Slice slice(request);
    buffers.emplace_back(&slice, 1);
  }
  return buffers;
}

// CPU seconds and memory of a process.
struct Usage {
  double cpu = 0, rss_mib = 0, peak_rss_mib = 0;
};

Usage UsageOf(int pid) {
  Usage usage;
  if (pid == 0) return usage;
  const std::string folder = "/proc/" + std::to_string(pid);
  std::ifstream stat(folder + "/stat");
  std::string text;
  std::getline(stat, text);
  if (text.empty()) Fail("--server_pid: no process " + std::to_string(pid));
  // The name of the program is in brackets and may contain spaces. User and system time are fields 12 and 13 after it.
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string field;
  for (int i = 1; i <= 13 && fields >> field; ++i) {
    if (i >= 12) usage.cpu += std::stod(field) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }
  std::ifstream status(folder + "/status");
  while (status >> field) {
    if (field == "VmRSS:") status >> usage.rss_mib;
    if (field == "VmHWM:") status >> usage.peak_rss_mib;
  }
  usage.rss_mib /= 1024;
  usage.peak_rss_mib /= 1024;
  return usage;
}

struct Call {
  Clock::time_point due;
  grpc::ClientContext context;
  grpc::ByteBuffer response;
  grpc::Status status;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
};

// A thread that receives answers, and its counters.
struct Lane {
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  grpc::CompletionQueue queue;
  std::atomic<size_t> next{0};
  std::atomic<int64_t> outstanding{0};
  Histogram latency;  // of successful requests that were due during the measurement
  Histogram delay;    // between the times when a request was due and when it was sent
  std::map<int, int64_t> errors;
  std::string first_error;
  int64_t answered = 0;  // successful requests that were answered during the measurement
  int64_t unsent = 0;    // requests that were due, but could not be sent before the end
  size_t response_bytes = 0;
};

class Load {
 public:
  Load(const Options& options, const std::vector<grpc::ByteBuffer>& requests, double concurrency, double rate)
      : options_(options), requests_(requests), concurrency_(static_cast<int>(concurrency)), rate_(rate) {
    for (int i = 0; i < options.threads; ++i) lanes_.push_back(std::make_unique<Lane>());
    for (int i = 0; i < options.channels; ++i) {
      grpc::ChannelArguments arguments;
      // Gives the channel a connection of its own.
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      arguments.SetMaxReceiveMessageSize(-1);
      const auto channel = grpc::CreateCustomChannel(options.target, grpc::InsecureChannelCredentials(), arguments);
      if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10))) {
        Fail("no server answers at " + options.target);
      }
      lanes_[i % lanes_.size()]->stubs.push_back(std::make_unique<grpc::GenericStub>(channel));
      if (i + 1 == options.channels) {
        for (auto& lane : lanes_) {
          if (lane->stubs.empty()) lane->stubs.push_back(std::make_unique<grpc::GenericStub>(channel));
        }
      }
    }
  }

  // Applies the load, and prints the measurements.
  void Run() {
    begin_ = Clock::now() + After(options_.warmup_seconds);
    end_ = begin_ + After(options_.seconds);
    std::vector<std::thread> receivers, senders;
    for (size_t i = 0; i < lanes_.size(); ++i) {
      Lane* lane = lanes_[i].get();
      lane->next = i * requests_.size() / lanes_.size();
      receivers.emplace_back([this, lane] { Receive(lane); });
      if (rate_ > 0) senders.emplace_back([this, lane, i] { SendOnTime(lane, i); });
    }
    for (int i = 0; rate_ == 0 && i < concurrency_; ++i) Send(lanes_[i % lanes_.size()].get(), Clock::now());
    std::this_thread::sleep_until(begin_);
    const Usage server_begin = UsageOf(options_.server_pid);
    const double own_begin = OwnCpuSeconds();
    std::this_thread::sleep_until(end_);
    const Usage server_end = UsageOf(options_.server_pid);
    const double own_end = OwnCpuSeconds();
    for (std::thread& sender : senders) sender.join();
    // This ends, because every call has a deadline.
    for (auto& lane : lanes_) {
      while (lane->outstanding > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      lane->queue.Shutdown();
    }
    for (std::thread& receiver : receivers) receiver.join();
    Print(server_end, server_end.cpu - server_begin.cpu, own_end - own_begin);
  }

 private:
  static Clock::duration After(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
  }

  void Send(Lane* lane, Clock::time_point due) {
    auto* call = new Call;
    call->due = due;
    call->context.set_deadline(
        std::chrono::system_clock::now() +
        std::chrono::duration_cast<std::chrono::system_clock::duration>(Seconds(options_.timeout_seconds)));
    const size_t number = lane->next++;
    ++lane->outstanding;
    call->reader = lane->stubs[number % lane->stubs.size()]->PrepareUnaryCall(
        &call->context, options_.method, requests_[number % requests_.size()], &lane->queue);
    call->reader->StartCall();
    call->reader->Finish(&call->response, &call->status, call);
  }

  void SendOnTime(Lane* lane, size_t number) {
    std::mt19937_64 random(static_cast<uint64_t>(options_.seed) * 1'000'003 + number);
    const double rate = rate_ / static_cast<double>(lanes_.size());
    std::exponential_distribution<double> gap(rate);
    Clock::time_point due = Clock::now() + After(static_cast<double>(number) / rate_);
    while (due < end_) {
      std::this_thread::sleep_until(due);
      while (lane->outstanding >= options_.max_outstanding && Clock::now() < end_) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
      if (lane->outstanding < options_.max_outstanding) {
        if (due >= begin_) lane->delay.Add((Clock::now() - due).count());
        Send(lane, due);
      } else if (due >= begin_) {
        ++lane->unsent;
      }
      due += After(options_.arrivals == "poisson" ? gap(random) : 1 / rate);
    }
  }

  void Receive(Lane* lane) {
    void* tag = nullptr;
    bool ok = false;
    while (lane->queue.Next(&tag, &ok)) {
      const std::unique_ptr<Call> call(static_cast<Call*>(tag));
      const auto now = Clock::now();
      const bool is_measured = call->due >= begin_ && call->due < end_;
      if (call->status.ok()) {
        if (is_measured) lane->latency.Add((now - call->due).count());
        if (now >= begin_ && now < end_) ++lane->answered;
        lane->response_bytes = std::max(lane->response_bytes, call->response.Length());
      } else {
        if (lane->first_error.empty()) lane->first_error = call->status.error_message();
        if (is_measured) ++lane->errors[call->status.error_code()];
      }
      if (rate_ == 0 && now < end_) Send(lane, now);
      --lane->outstanding;
    }
  }

  void Print(const Usage& server, double server_cpu, double own_cpu) const {
    Histogram latency, delay;
    std::map<int, int64_t> errors;
    int64_t answered = 0, failed = 0, unsent = 0;
    size_t response_bytes = 0;
    for (const auto& lane : lanes_) {
      latency.Add(lane->latency);
      delay.Add(lane->delay);
      for (const auto& [code, count] : lane->errors) {
        errors[code] += count;
        failed += count;
      }
      answered += lane->answered;
      unsent += lane->unsent;
      response_bytes = std::max(response_bytes, lane->response_bytes);
      if (!lane->first_error.empty()) {
        std::fprintf(stderr, "dpsr_load_generator: an error: %s\n", lane->first_error.c_str());
      }
    }
    std::printf("{\"loop\": \"%s\", ", rate_ > 0 ? "open" : "closed");
    if (rate_ > 0) std::printf("\"rate\": %.10g, ", rate_);
    if (rate_ == 0) std::printf("\"concurrency\": %d, ", concurrency_);
    std::printf("\"seconds\": %.10g, \"qps\": %.6g, \"succeeded\": %lld, \"failed\": %lld, \"errors\": {",
                options_.seconds, static_cast<double>(answered) / options_.seconds,
                static_cast<long long>(latency.count()), static_cast<long long>(failed));
    for (auto error = errors.begin(); error != errors.end(); ++error) {
      std::printf("%s\"%d\": %lld", error == errors.begin() ? "" : ", ", error->first,
                  static_cast<long long>(error->second));
    }
    std::printf("}, \"unsent\": %lld, \"response_bytes\": %zu, \"latency_us\": ", static_cast<long long>(unsent),
                response_bytes);
    PrintQuantiles(latency);
    if (rate_ > 0) {
      std::printf(", \"send_delay_us\": ");
      PrintQuantiles(delay);
    }
    const double requests = static_cast<double>(std::max<int64_t>(1, answered + failed));
    std::printf(", \"client_cpu_us\": %.6g", own_cpu / requests * 1e6);
    if (options_.server_pid != 0) {
      std::printf(", \"server_cpu_us\": %.6g, \"server_cores\": %.4g, \"server_rss_mib\": %.6g, "
                  "\"server_peak_rss_mib\": %.6g",
                  server_cpu / requests * 1e6, server_cpu / options_.seconds, server.rss_mib, server.peak_rss_mib);
    }
    std::printf("}\n");
    std::fflush(stdout);
  }

  static void PrintQuantiles(const Histogram& histogram) {
    const auto us = [&](double q) { return static_cast<double>(histogram.Quantile(q)) / 1e3; };
    std::printf("{\"mean\": %.6g, \"p50\": %.6g, \"p90\": %.6g, \"p99\": %.6g, \"p99.9\": %.6g, \"max\": %.6g}",
                histogram.mean() / 1e3, us(0.5), us(0.9), us(0.99), us(0.999),
                static_cast<double>(histogram.max()) / 1e3);
  }

  const Options& options_;
  const std::vector<grpc::ByteBuffer>& requests_;
  const int concurrency_;
  const double rate_;  // 0: closed loop
  Clock::time_point begin_, end_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace
}  // namespace dpsr::serving

int main(int argc, char** argv) {
  using namespace dpsr::serving;
  const Options options = ParseOptions(argc, argv);
  const std::vector<grpc::ByteBuffer> requests = ReadRequests(options);
  for (const double concurrency : ParseList("concurrency", options.concurrency)) {
    Load(options, requests, concurrency, 0).Run();
  }
  for (const double rate : ParseList("rate", options.rate)) Load(options, requests, 0, rate).Run();
}
