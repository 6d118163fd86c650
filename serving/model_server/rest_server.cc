#include "serving/model_server/rest_server.h"

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "serving/model_server/json_tensor.h"
#include "serving/model_server/metrics.h"

namespace dpsr::serving {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;

// A client that sends nothing for so long on an open connection is gone.
constexpr std::chrono::seconds kIdle(120);

// What all connections share.
struct Shared {
  RestServerOptions options;
  const RestApi* api;
  WorkerPool* workers;
  std::atomic<bool> draining{false};
  std::mutex mutex;
  std::condition_variable idle;
  int busy = 0;  // requests that are read and not yet answered

  void Begin() {
    std::lock_guard<std::mutex> lock(mutex);
    ++busy;
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
    http::async_read(stream_, buffer_, *parser_,
                     [self = shared_from_this()](beast::error_code error, size_t) { self->OnRead(error); });
  }

 private:
  void OnRead(beast::error_code error) {
    if (error == http::error::body_limit) {
      shared_->Begin();
      Write({413, "application/json", WriteErrorJson("the request's body is too large")}, false);
      return;
    }
    if (error && error.category() == http::make_error_code(http::error::bad_method).category() &&
        error != http::error::end_of_stream && error != http::error::partial_message) {
      shared_->Begin();
      Write({400, "application/json", WriteErrorJson("no HTTP request: " + error.message())}, false);
      return;
    }
    if (error) return;  // the client closed, or time is up: the connection ends with this object
    stream_.expires_never();  // the request has its own limit
    const auto& message = parser_->get();
    RestRequest request;
    request.method = std::string(message.method_string());
    request.path = std::string(message.target().substr(0, message.target().find('?')));
    request.deadline = std::chrono::system_clock::now() + shared_->options.timeout;
    const bool keep_alive = message.keep_alive() && !shared_->draining;
    const bool preflight = shared_->options.enable_cors && message.method() == http::verb::options;
    version_ = message.version();
    request.body = std::move(parser_->get().body());
    shared_->Begin();
    if (preflight) {
      Write({200, "text/plain", ""}, keep_alive);
      return;
    }
    const auto arrival = Clock::now();
    auto work = [self = shared_from_this(), request = std::move(request), keep_alive, arrival] {
      RecordQueueing(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - arrival).count());
      RestReply reply = self->shared_->api->Answer(request);
      asio::post(self->stream_.get_executor(), [self, reply = std::move(reply), keep_alive]() mutable {
        self->Write(std::move(reply), keep_alive);
      });
    };
    if (!shared_->workers->Add(std::move(work))) {
      Write({429, "application/json",
             WriteErrorJson("the server's queue is full (--max_queued_requests); try again later, or elsewhere")},
            keep_alive);
    }
  }

  void Write(RestReply reply, bool keep_alive) {
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
    stream_.expires_after(kIdle);
    http::async_write(stream_, *response_, [self = shared_from_this(), keep_alive](beast::error_code error, size_t) {
      self->shared_->End();
      if (error) return;
      if (keep_alive && !self->shared_->draining) {
        self->Read();
        return;
      }
      beast::error_code ignored;
      self->stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    });
  }

  beast::tcp_stream stream_;
  Shared* const shared_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  std::optional<http::response<http::string_body>> response_;
  unsigned version_ = 11;
};

class RestServerImpl final : public RestServer {
 public:
  RestServerImpl(const RestServerOptions& options, const RestApi* api, WorkerPool* workers)
      : io_(options.num_threads), acceptor_(io_) {
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
    shared_.draining = true;
    asio::post(io_, [this] {
      beast::error_code ignored;
      acceptor_.close(ignored);
    });
    std::unique_lock<std::mutex> lock(shared_.mutex);
    shared_.idle.wait_for(lock, drain, [this] { return shared_.busy == 0; });
  }

 private:
  void Accept() {
    acceptor_.async_accept(asio::make_strand(io_), [this](beast::error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted || !acceptor_.is_open()) return;
      if (!error) {
        beast::error_code ignored;
        socket.set_option(tcp::no_delay(true), ignored);
        std::make_shared<Connection>(std::move(socket), &shared_)->Read();
      }
      Accept();
    });
  }

  Shared shared_;
  asio::io_context io_;
  tcp::acceptor acceptor_;
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
