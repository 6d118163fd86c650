#include "serving/model_server/rest_server.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "serving/model_server/metrics.h"

namespace dpsr::serving {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using tcp = asio::ip::tcp;

// A client that sends nothing for so long on an open connection is gone.
constexpr std::chrono::seconds kIdle(120);
// How long a connection that is to end takes what the client is still sending.
constexpr std::chrono::seconds kLinger(5);
// Between two tries to take a connection, where the process has no room for one (files, memory).
constexpr std::chrono::milliseconds kAcceptAgain(50);

// What all connections share.
struct Shared {
  RestServerOptions options;
  const RestApi* api;
  WorkerPool* workers;
  std::mutex mutex;
  std::condition_variable idle;
  bool draining = false;
  int busy = 0;  // requests that are read and not yet answered

  // A request begins to be answered. False: the server stops, and nothing may begin.
  bool Begin() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!draining) ++busy;
    return !draining;
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

// One connection: reads a request, has it answered by a worker, writes the answer, and again. It lives as long as
// something of that is under way.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, Shared* shared) : stream_(std::move(socket)), shared_(shared) {}

  void Read() {
    parser_.emplace();
    parser_->body_limit(shared_->options.max_body_bytes);
    stream_.expires_after(kIdle);
    http::async_read_header(stream_, buffer_, *parser_, [self = shared_from_this()](beast::error_code error, size_t) {
      if (error) {
        self->OnRead(error);
      } else if (beast::iequals(self->parser_->get()[http::field::expect], "100-continue")) {
        self->WriteContinue();
      } else {
        self->ReadBody();
      }
    });
  }

 private:
  // The client waits for a word before it sends a large body.
  void WriteContinue() {
    static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
    asio::async_write(stream_, asio::buffer(kContinue.data(), kContinue.size()),
                      [self = shared_from_this()](beast::error_code error, size_t) {
                        if (!error) self->ReadBody();
                      });
  }

  void ReadBody() {
    http::async_read(stream_, buffer_, *parser_,
                     [self = shared_from_this()](beast::error_code error, size_t) { self->OnRead(error); });
  }

  void OnRead(beast::error_code error) {
    const bool not_http = error && error.category() == http::make_error_code(http::error::bad_method).category() &&
                          error != http::error::end_of_stream && error != http::error::partial_message;
    if (error && !not_http) return;  // the client closed, or time is up: the connection ends with this object
    stream_.expires_never();         // the request has its own limit
    if (!shared_->Begin()) return;
    if (error == http::error::body_limit) {
      Write(ErrorReply(413, "the request's body is too large"), false);
      return;
    }
    if (not_http) {
      Write(ErrorReply(400, "no HTTP request: " + error.message()), false);
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
    request.body = std::move(parser_->get().body());
    if (preflight) {
      Write({200, "text/plain", ""}, keep_alive);
      return;
    }
    if (message.method() != http::verb::post) {
      Write(shared_->api->Answer(request), keep_alive);
      return;
    }
    const auto arrival = std::chrono::steady_clock::now();
    auto work = [self = shared_from_this(), request = std::move(request), keep_alive, arrival] {
      RecordQueueing(MicrosecondsSince(arrival));
      RestReply reply = self->shared_->api->Answer(request);
      asio::post(self->stream_.get_executor(), [self, reply = std::move(reply), keep_alive]() mutable {
        self->Write(std::move(reply), keep_alive);
      });
    };
    if (!shared_->workers->Add(std::move(work))) {
      Write(ErrorReply(429, kQueueIsFull), keep_alive);
    }
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
    response_->keep_alive(keep_alive);
    response_->body() = std::move(reply.body);
    response_->prepare_payload();
    if (is_head_) response_->body().clear();  // but not its length
    stream_.expires_after(kIdle);
    http::async_write(stream_, *response_, [self = shared_from_this(), keep_alive](beast::error_code error, size_t) {
      self->shared_->End();
      if (error) return;
      if (keep_alive) {
        self->Read();
      } else {
        self->Close();
      }
    });
  }

  // A socket that is closed with something unread resets the connection, and the client may lose the answer: tell it
  // that nothing more comes, and read what it has sent, for a while.
  void Close() {
    beast::error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    stream_.expires_after(kLinger);
    Discard();
  }

  void Discard() {
    buffer_.clear();
    stream_.async_read_some(buffer_.prepare(size_t{64} << 10),
                            [self = shared_from_this()](beast::error_code error, size_t) {
                              if (!error) self->Discard();
                            });
  }

  beast::tcp_stream stream_;
  Shared* const shared_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  std::optional<http::response<http::string_body>> response_;
  unsigned version_ = 11;
  bool is_head_ = false;
};

class RestServerImpl final : public RestServer {
 public:
  RestServerImpl(const RestServerOptions& options, const RestApi* api, WorkerPool* workers)
      : io_(options.num_threads), work_(io_.get_executor()), acceptor_(asio::make_strand(io_)), accept_again_(acceptor_.get_executor()) {
    shared_.options = options;
    shared_.api = api;
    shared_.workers = workers;
  }

  ~RestServerImpl() override {
    {
      std::unique_lock<std::mutex> lock(shared_.mutex);
      shared_.idle.wait(lock, [this] { return shared_.busy == 0; });
    }
    io_.stop();
    for (std::thread& thread : threads_) thread.join();
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
    for (int i = 0; i < options.num_threads; ++i) threads_.emplace_back([this] { io_.run(); });
    return {};
  }

  int port() const override { return acceptor_.local_endpoint().port(); }

  void Shutdown(std::chrono::milliseconds drain) override {
    asio::post(acceptor_.get_executor(), [this] {
      beast::error_code ignored;
      acceptor_.close(ignored);
      accept_again_.cancel();
    });
    std::unique_lock<std::mutex> lock(shared_.mutex);
    shared_.draining = true;
    shared_.idle.wait_for(lock, drain, [this] { return shared_.busy == 0; });
  }

 private:
  void Accept() {
    acceptor_.async_accept(asio::make_strand(io_), [this](beast::error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted || !acceptor_.is_open()) return;
      if (error) {  // such as too many open files
        accept_again_.expires_after(kAcceptAgain);
        accept_again_.async_wait([this](beast::error_code) {
          if (acceptor_.is_open()) Accept();
        });
        return;
      }
      beast::error_code ignored;
      socket.set_option(tcp::no_delay(true), ignored);
      std::make_shared<Connection>(std::move(socket), &shared_)->Read();
      Accept();
    });
  }

  Shared shared_;
  asio::io_context io_;
  // Threads stay while all that is left is a request that a worker computes.
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  tcp::acceptor acceptor_;
  asio::steady_timer accept_again_;
  std::vector<std::thread> threads_;
};

}  // namespace

Status RestServer::Start(const RestServerOptions& options, const RestApi* api, WorkerPool* workers,
                         std::unique_ptr<RestServer>* server) {
  auto started = std::make_unique<RestServerImpl>(options, api, workers);
  DPSR_RETURN_IF_ERROR(started->Listen());
  *server = std::move(started);
  return {};
}

}  // namespace dpsr::serving
