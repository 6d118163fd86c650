#include "serving/model_server/rest_server.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/http/rfc7230.hpp>
#include <boost/beast/ssl.hpp>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "serving/model_server/metrics.h"
#include "serving/wire/compression.h"

namespace dpsr::serving {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using tcp = asio::ip::tcp;
using TlsStream = beast::ssl_stream<beast::tcp_stream>;

// An open connection on which a client sends nothing for this time is closed.
constexpr std::chrono::seconds kIdle(120);
// The time that a client may take to agree on keys.
constexpr std::chrono::seconds kHandshake(10);
// How long a connection that ends still reads what the client sends.
constexpr std::chrono::seconds kLinger(5);
// The time between two tries to accept a connection, if the process lacks files or memory for it.
constexpr std::chrono::milliseconds kAcceptAgain(50);

// What a connection that an exception ends is called in the log.
constexpr char kLoggedConnection[] = "a REST connection";

// Answers below this size are not compressed: they fit into one packet.
constexpr size_t kMinCompressedBytes = 1024;

// Returns whether a client that sends this Accept-Encoding takes gzip.
bool TakesGzip(beast::string_view accepted) {
  for (const auto& [coding, parameters] : http::ext_list(accepted)) {
    (void)parameters;
    if (beast::iequals(coding, "gzip") || beast::iequals(coding, "x-gzip")) return true;
  }
  return false;
}

// Compresses a large answer.
void Compress(RestReply* reply) {
  if (reply->body.size() < kMinCompressedBytes) return;
  std::string packed;
  if (!Pack(kGzip, reply->body, &packed)) return;
  reply->body = std::move(packed);
  reply->headers.emplace_back("Content-Encoding", "gzip");
  reply->headers.emplace_back("Vary", "Accept-Encoding");
}

// The state that all connections share.
struct Shared {
  RestServerOptions options;
  const RestApi* api;
  WorkerPool* workers;
  RequestLog* log;
  std::mutex mutex;
  std::condition_variable idle;
  bool draining = false;
  int busy = 0;  // requests that have been read and not yet answered
  int held = 0;  // connections that workers hold

  // Counts a request that is to be answered. Returns false if the server stops, so that it must not be answered.
  bool Begin() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!draining) ++busy;
    return !draining;
  }
  // Counts a connection that a worker holds.
  void Hold() {
    std::lock_guard<std::mutex> lock(mutex);
    ++held;
  }
  void Release() {
    std::lock_guard<std::mutex> lock(mutex);
    if (--held == 0) idle.notify_all();
  }
  bool IsDraining() {
    std::lock_guard<std::mutex> lock(mutex);
    return draining;
  }
  void End() {
    std::lock_guard<std::mutex> lock(mutex);
    if (--busy == 0) idle.notify_all();
  }
};

// One connection. It reads a request, lets a worker answer it, writes the answer, and starts again. The object lives as
// long as one of these operations is running. `Stream` is beast::tcp_stream, or TlsStream.
template <typename Stream>
class Connection : public std::enable_shared_from_this<Connection<Stream>> {
 public:
  Connection(tcp::socket socket, Shared* shared) : stream_(std::move(socket)), shared_(shared) {}
  Connection(tcp::socket socket, const std::shared_ptr<asio::ssl::context>& tls, Shared* shared)
      : tls_(tls), stream_(std::move(socket), *tls), shared_(shared) {}
  ~Connection() {
    // An exception has ended it before its answer.
    if (begun_) shared_->End();
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void Start() {
    if constexpr (kIsTls) {
      Tcp().expires_after(kHandshake);
      stream_.async_handshake(asio::ssl::stream_base::server, [self = Self()](beast::error_code error) {
        if (!error) self->Read();
      });
    } else {
      Read();
    }
  }

 private:
  static constexpr bool kIsTls = std::is_same_v<Stream, TlsStream>;

  std::shared_ptr<Connection> Self() { return this->shared_from_this(); }
  beast::tcp_stream& Tcp() { return beast::get_lowest_layer(stream_); }

  void Read() {
    parser_.emplace();
    parser_->body_limit(shared_->options.max_body_bytes);
    Tcp().expires_after(kIdle);
    http::async_read_header(stream_, buffer_, *parser_, [self = Self()](beast::error_code error, size_t) {
      if (error) {
        self->OnRead(error);
      } else if (beast::iequals(self->parser_->get()[http::field::expect], "100-continue")) {
        self->WriteContinue();
      } else {
        self->ReadBody();
      }
    });
  }

  // Tells a client that waits before it sends a large body to go on.
  void WriteContinue() {
    static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
    asio::async_write(stream_, asio::buffer(kContinue.data(), kContinue.size()),
                      [self = Self()](beast::error_code error, size_t) {
                        if (!error) self->ReadBody();
                      });
  }

  void ReadBody() {
    http::async_read(stream_, buffer_, *parser_,
                     [self = Self()](beast::error_code error, size_t) { self->OnRead(error); });
  }

  void OnRead(beast::error_code error) {
    const bool not_http = error && error.category() == http::make_error_code(http::error::bad_method).category() &&
                          error != http::error::end_of_stream && error != http::error::partial_message;
    // If the client closed the connection or the time is up, the connection ends with this object.
    if (error && !not_http) return;
    // From here on the time limit of the request counts.
    Tcp().expires_never();
    if (!shared_->Begin()) return;
    begun_ = true;
    if (error == http::error::body_limit) {
      Write(ErrorReply(413, "the request's body is too large"), false);
      return;
    }
    if (not_http) {
      Write(ErrorReply(400, "not an HTTP request: " + error.message()), false);
      return;
    }
    const auto& message = parser_->get();
    RestRequest request;
    request.method = std::string(message.method_string());
    request.path = std::string(message.target().substr(0, message.target().find('?')));
    request.deadline = std::chrono::system_clock::now() + shared_->options.timeout;
    const bool keep_alive = message.keep_alive();
    const bool preflight = shared_->options.enable_cors && message.method() == http::verb::options;
    version_ = message.version();
    is_head_ = message.method() == http::verb::head;
    takes_gzip_ = TakesGzip(message[http::field::accept_encoding]);
    trace_parent_ = std::string(message[kTraceParent]);
    request.body = std::move(parser_->get().body());
    if (preflight) {
      Write({200, "text/plain", "", {}}, keep_alive);
      return;
    }
    if (message.method() != http::verb::post) {
      RestReply reply = shared_->api->Answer(request);
      if (takes_gzip_) Compress(&reply);
      Write(std::move(reply), keep_alive);
      return;
    }
    const auto arrival = std::chrono::steady_clock::now();
    const auto shared_request = std::make_shared<const RestRequest>(std::move(request));
    auto work = [self = Self(), shared_request, keep_alive, arrival]() mutable {
      Shared* const shared = self->shared_;
      try {
        self->Compute(*shared_request, keep_alive, arrival);
      } catch (const std::exception& exception) {
        // For example no memory. The connection ends, as after an exception in Run.
        shared->log->Write(kLoggedConnection, exception.what(), {}, "");
      }
      // The server may end once the answer is out, and the connection needs the server.
      self = nullptr;
      shared->Release();
    };
    shared_->Hold();
    bool added = false;
    try {
      added = shared_->workers->Add(std::move(work));
    } catch (...) {
      shared_->Release();
      throw;  // the connection ends
    }
    if (!added) {
      shared_->Release();
      shared_->api->RecordRefused(*shared_request);
      Write(ErrorReply(429, kQueueIsFull), keep_alive);
    }
  }

  // Computes the answer to a request, and has it written. A worker calls it. If it throws, nothing is written.
  void Compute(const RestRequest& request, bool keep_alive, std::chrono::steady_clock::time_point arrival) {
    RequestTimes times;
    times.queue_micros = MicrosecondsSince(arrival);
    RecordQueueing(times.queue_micros);
    RestReply reply = shared_->api->Answer(request);
    times.compute_micros = MicrosecondsSince(arrival) - times.queue_micros;
    Report(request, times, &reply);
    if (takes_gzip_) Compress(&reply);
    asio::post(stream_.get_executor(), [self = Self(), reply = std::move(reply), keep_alive]() mutable {
      self->Write(std::move(reply), keep_alive);
    });
  }

  // Reports the times of a request if the client's trace is kept, and logs it if it is worth it.
  void Report(const RestRequest& request, const RequestTimes& times, RestReply* reply) const {
    const std::optional<TraceParent> trace = ParseTraceParent(trace_parent_);
    if (trace.has_value() && trace->sampled) {
      reply->headers.emplace_back(kQueueMicros, std::to_string(times.queue_micros));
      reply->headers.emplace_back(kComputeMicros, std::to_string(times.compute_micros));
    }
    const bool failed = reply->status == 500 || reply->status == 504;  // as IsServersFault
    if (!shared_->log->Wants(failed, times)) return;
    shared_->log->Write(request.method + " " + request.path, failed ? StrCat(reply->status, " ", reply->body) : "", times,
                        trace_parent_);
  }

  void Write(RestReply reply, bool keep_alive) {
    keep_alive = keep_alive && !shared_->IsDraining();
    response_.emplace(static_cast<http::status>(reply.status), version_);
    response_->set(http::field::content_type, reply.content_type);
    if (shared_->options.enable_cors) {
      response_->set(http::field::access_control_allow_origin, "*");
      response_->set(http::field::access_control_allow_methods, "GET, POST, OPTIONS");
      response_->set(http::field::access_control_allow_headers, "Content-Type");
    }
    for (const auto& [name, value] : reply.headers) response_->set(name, value);
    response_->keep_alive(keep_alive);
    response_->body() = std::move(reply.body);
    response_->prepare_payload();
    // The answer to HEAD keeps the length of the body that it does not have.
    if (is_head_) response_->body().clear();
    Tcp().expires_after(kIdle);
    http::async_write(stream_, *response_, [self = Self(), keep_alive](beast::error_code error, size_t) {
      self->begun_ = false;
      self->shared_->End();
      if (error) return;
      if (keep_alive) {
        self->Read();
      } else {
        self->Close();
      }
    });
  }

  // Closing a socket that has unread bytes resets the connection, and the client may lose the answer. So this tells the
  // client that nothing more comes, and goes on reading what it has sent, for a limited time.
  void Close() {
    Tcp().expires_after(kLinger);
    if constexpr (kIsTls) {
      // Sends TLS's own end, and waits for the client's.
      stream_.async_shutdown([self = Self()](beast::error_code) {});
    } else {
      beast::error_code ignored;
      stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
      Discard();
    }
  }

  void Discard() {
    buffer_.clear();
    stream_.async_read_some(buffer_.prepare(size_t{64} << 10),
                            [self = Self()](beast::error_code error, size_t) {
                              if (!error) self->Discard();
                            });
  }

  const std::shared_ptr<asio::ssl::context> tls_;  // null without TLS; outlives the stream
  Stream stream_;
  Shared* const shared_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  std::optional<http::response<http::string_body>> response_;
  bool begun_ = false;  // whether `shared_` counts a request of this connection
  unsigned version_ = 11;
  bool is_head_ = false;
  bool takes_gzip_ = false;
  std::string trace_parent_;
};

class RestServerImpl final : public RestServer {
 public:
  RestServerImpl(const RestServerOptions& options, const RestApi* api, WorkerPool* workers, RequestLog* log)
      : io_(options.num_threads),
        work_(io_.get_executor()),
        acceptor_(asio::make_strand(io_)),
        accept_again_(acceptor_.get_executor()) {
    shared_.options = options;
    shared_.api = api;
    shared_.workers = workers;
    shared_.log = log;
  }

  // Does not wait for clients that do not read their answers: they had the time that Shutdown gives them.
  ~RestServerImpl() override {
    io_.stop();
    for (std::thread& thread : threads_) thread.join();
    // Nothing gives connections to workers any more.
    std::unique_lock<std::mutex> lock(shared_.mutex);
    shared_.idle.wait(lock, [this] { return shared_.held == 0; });
  }

  Status Listen() {
    const RestServerOptions& options = shared_.options;
    beast::error_code error;
    tcp::resolver resolver(io_);
    const auto found = resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive, error);
    if (!error) {
      const tcp::endpoint endpoint = found.begin()->endpoint();
      acceptor_.open(endpoint.protocol(), error);
      if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
      if (!error) acceptor_.bind(endpoint, error);
      if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    }
    if (error) {
      return MakeStatus(StatusCode::kFailedPrecondition, "cannot listen on ", options.host, ":", options.port,
                        " for REST: ", error.message(), "; choose another port with --rest_api_port");
    }
    Accept();
    for (int i = 0; i < options.num_threads; ++i) threads_.emplace_back([this] { Run(); });
    return {};
  }

  int port() const override { return acceptor_.local_endpoint().port(); }

  void Shutdown(std::chrono::milliseconds drain) override {
    // First, so that open connections take no request any more when new ones are refused.
    {
      std::lock_guard<std::mutex> lock(shared_.mutex);
      shared_.draining = true;
    }
    asio::post(acceptor_.get_executor(), [this] {
      beast::error_code ignored;
      acceptor_.close(ignored);
      accept_again_.cancel();
    });
    std::unique_lock<std::mutex> lock(shared_.mutex);
    shared_.idle.wait_for(lock, drain, [this] { return shared_.busy == 0; });
  }

 private:
  // Runs handlers until the server ends. One that throws, for example because there is no memory for a body, ends its
  // connection; the others go on.
  void Run() {
    for (;;) {
      try {
        io_.run();
        return;
      } catch (const std::exception& error) {
        shared_.log->Write(kLoggedConnection, error.what(), {}, "");
      }
    }
  }

  void Accept() {
    try {
      acceptor_.async_accept(asio::make_strand(io_), [this](beast::error_code error, tcp::socket socket) {
        if (error == asio::error::operation_aborted || !acceptor_.is_open()) return;
        // For example too many open files.
        if (error) {
          AcceptAgain();
          return;
        }
        // First, because starting a connection may throw, for example without memory for OpenSSL. Run logs it.
        Accept();
        StartConnection(std::move(socket));
      });
    } catch (const std::exception&) {
      // No memory.
      AcceptAgain();
    }
  }

  // Calls Accept after a short time.
  void AcceptAgain() {
    accept_again_.expires_after(kAcceptAgain);
    accept_again_.async_wait([this](beast::error_code) {
      if (acceptor_.is_open()) Accept();
    });
  }

  void StartConnection(tcp::socket socket) {
    beast::error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    if (shared_.options.tls == nullptr) {
      std::make_shared<Connection<beast::tcp_stream>>(std::move(socket), &shared_)->Start();
    } else {
      std::make_shared<Connection<TlsStream>>(std::move(socket), Tls(), &shared_)->Start();
    }
  }

  // Returns the present key and certificates. Only StartConnection calls it.
  std::shared_ptr<asio::ssl::context> Tls() {
    std::shared_ptr<const TlsState> state = shared_.options.tls->Current();
    if (state != tls_state_) {
      SSL_CTX_up_ref(state->context.get());  // the context takes one over
      tls_ = std::make_shared<asio::ssl::context>(state->context.get());
      tls_state_ = std::move(state);
    }
    return tls_;
  }

  Shared shared_;
  std::shared_ptr<const TlsState> tls_state_;
  std::shared_ptr<asio::ssl::context> tls_;  // of tls_state_
  asio::io_context io_;
  // Keeps the threads running while the only work is a request that a worker computes.
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  tcp::acceptor acceptor_;
  asio::steady_timer accept_again_;
  std::vector<std::thread> threads_;
};

}  // namespace

Status RestServer::Start(const RestServerOptions& options, const RestApi* api, WorkerPool* workers, RequestLog* log,
                         std::unique_ptr<RestServer>* server) {
  auto started = std::make_unique<RestServerImpl>(options, api, workers, log);
  DPSR_RETURN_IF_ERROR(started->Listen());
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
