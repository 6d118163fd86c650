#include "serving/wire/call_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace dpsr::serving {
namespace {

using std::chrono::milliseconds;

constexpr char kEcho[] = "/s/Echo";
constexpr char kHold[] = "/s/Hold";
constexpr char kChat[] = "/s/Chat";
constexpr auto kPatience = std::chrono::seconds(30);

Message MessageOf(std::string text) {
  auto owner = std::make_shared<std::string>(std::move(text));
  return {owner->data(), owner->size(), owner, {}};
}

// A socket, in plain text or with TLS, that waits at most kPatience.
class Socket {
 public:
  explicit Socket(int port) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    Connect(reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  }
  explicit Socket(const std::string& path) {
    fd_ = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    Connect(reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  }
  ~Socket() {
    if (ssl_ != nullptr) SSL_free(ssl_);
    if (context_ != nullptr) SSL_CTX_free(context_);
    close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  bool connected() const { return connected_; }

  bool StartTls() {
    context_ = SSL_CTX_new(TLS_client_method());
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, fd_);
    return SSL_connect(ssl_) == 1;
  }

  bool Send(const std::string& bytes) {
    size_t sent = 0;
    while (sent < bytes.size()) {
      const ssize_t size = ssl_ != nullptr ? SSL_write(ssl_, bytes.data() + sent, static_cast<int>(bytes.size() - sent))
                                           : send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (size <= 0) return false;
      sent += static_cast<size_t>(size);
    }
    return true;
  }

  // What has come; empty at the end.
  std::string Receive() {
    char buffer[1 << 14];
    const ssize_t size =
        ssl_ != nullptr ? SSL_read(ssl_, buffer, sizeof(buffer)) : recv(fd_, buffer, sizeof(buffer), 0);
    return std::string(buffer, static_cast<size_t>(std::max<ssize_t>(size, 0)));
  }

 private:
  void Connect(const sockaddr* address, socklen_t size) {
    const timeval patience{std::chrono::seconds(kPatience).count(), 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    connected_ = connect(fd_, address, size) == 0;
  }

  int fd_ = -1;
  bool connected_ = false;
  SSL_CTX* context_ = nullptr;
  SSL* ssl_ = nullptr;
};

// A client on a socket, on the wire's own session.
class Client {
 public:
  explicit Client(Socket* socket) : socket_(socket), session_(Session::Role::kClient, limits_, nullptr, nullptr, 0) {}

  int32_t Begin(const std::string& path, const std::string& message = "", double timeout_s = -1,
                const std::vector<Header>& metadata = {}) {
    const int32_t stream = session_.Call(path, "x", false, timeout_s, metadata, MessageOf(message));
    Flush();
    return stream;
  }

  // Waits for the answer to a call. code -1: the connection ended.
  Event Await(int32_t stream) {
    for (;;) {
      for (const Event& event : events_) {
        const bool ends = event.kind == EventKind::kAnswer || event.kind == EventKind::kEnd;
        if (ends && event.stream == stream) return event;
      }
      if (!Receive()) {
        Event ended{};
        ended.kind = EventKind::kEnd;
        return ended;
      }
    }
  }

  bool Receive() {
    const std::string bytes = socket_->Receive();
    if (bytes.empty()) return false;
    session_.Receive(bytes, 0, &events_);
    Flush();
    return true;
  }

  std::string Ask(const std::string& path, const std::string& message) {
    const Event event = Await(Begin(path, message));
    return event.code == 0 && event.has_message ? event.data.substr(5) : "code " + std::to_string(event.code);
  }

  void GiveUp(int32_t stream) {
    session_.Reset(stream, NGHTTP2_CANCEL);
    Flush();
  }

  bool Saw(EventKind kind) const {
    for (const Event& event : events_) {
      if (event.kind == kind) return true;
    }
    return false;
  }

 private:
  void Flush() {
    for (;;) {
      const std::string bytes = session_.Send(1 << 16);
      if (bytes.empty() || !socket_->Send(bytes)) return;
    }
  }

  SessionLimits limits_{128, 1 << 16, 1 << 30, 1 << 30, 1e9, 1e9, 1e9};
  Socket* const socket_;
  Session session_;
  std::vector<Event> events_;
};

class CallServerTest : public testing::Test {
 protected:
  CallServerTest() {
    options_.threads = 2;
    options_.limits.message_bytes = 1 << 24;
    options_.limits.connection_bytes = 1 << 26;
  }
  ~CallServerTest() override {
    server_.reset();
    for (std::thread& thread : threads_) thread.join();
  }

  void Start(const TlsSource& tls = nullptr) {
    Make();
    ASSERT_TRUE(server_->Listen({"127.0.0.1", 0, ""}, tls, &port_).ok());
    ASSERT_TRUE(server_->Start().ok());
  }

  void Make() {
    server_ = CallServer::Make(
        options_, {{kEcho, {MethodKind::kUnary, [this](const std::shared_ptr<Call>& call) { Echo(call); }}},
                   {kHold, {MethodKind::kUnary, [this](const std::shared_ptr<Call>& call) { Hold(call); }}},
                   {kChat, {MethodKind::kStreaming, [this](const std::shared_ptr<Call>& call) { Chat(call); }}}});
  }

  // Answers from another thread, with the message and the metadata `suffix`.
  void Echo(const std::shared_ptr<Call>& call) {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.emplace_back([call] {
      call->Finish(0, "", MessageOf(std::string(call->message()) + std::string(call->Metadata("suffix"))),
                   {{"after", "all"}});
      call->Finish(5, "a second answer", {}, {});
    });
  }

  void Hold(const std::shared_ptr<Call>& call) {
    std::lock_guard<std::mutex> lock(mutex_);
    held_.push_back(call);
    changed_.notify_all();
  }

  // Says each message again, until "end".
  void Chat(const std::shared_ptr<Call>& call) {
    Call* const raw = call.get();
    call->on_message = [this, raw](std::string_view message) {
      const std::string text(message);
      if (text == "end") {
        raw->Finish(0, "", {}, {});
      } else {
        raw->Write("you said " + text);
      }
      Note("message " + text);
    };
    call->on_end = [this, raw](bool cancelled) {
      raw->Finish(0, "", {}, {});
      Note(cancelled ? "cancelled" : "half closed");
    };
  }

  void Note(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    notes_.push_back(text);
    changed_.notify_all();
  }

  bool Await(const std::function<bool()>& done) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, done);
  }

  std::shared_ptr<Call> AwaitHeld() {
    EXPECT_TRUE(Await([this] { return !held_.empty(); }));
    std::lock_guard<std::mutex> lock(mutex_);
    if (held_.empty()) return nullptr;
    std::shared_ptr<Call> call = held_.back();
    held_.pop_back();
    return call;
  }

  // Waits until a condition that nobody announces is true.
  static bool Eventually(const std::function<bool()>& done) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!done()) {
      if (std::chrono::steady_clock::now() > end) return false;
      std::this_thread::sleep_for(milliseconds(2));
    }
    return true;
  }

  CallServerOptions options_;
  std::unique_ptr<CallServer> server_;
  int port_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
  std::vector<std::shared_ptr<Call>> held_;
  std::vector<std::string> notes_;
};

TEST_F(CallServerTest, AnswersFromOtherThreads) {
  Start();
  Socket socket(port_);
  Client client(&socket);
  EXPECT_EQ(client.Ask(kEcho, "a"), "a");
  EXPECT_EQ(client.Ask(kEcho, ""), "");
  const Event event = client.Await(client.Begin(kEcho, "b", -1, {{"suffix", "c"}}));
  EXPECT_EQ(event.data.substr(5), "bc");
  ASSERT_EQ(event.trailing.size(), 1u);
  EXPECT_EQ(event.trailing[0].value, "all");
  EXPECT_EQ(client.Ask("/s/Nothing", "a"), "code 12");
}

TEST_F(CallServerTest, ManyThreadsAnswerManyConnections) {
  Start();
  std::vector<std::thread> clients;
  std::atomic<int> right{0};
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i, &right] {
      Socket socket(port_);
      Client client(&socket);
      std::vector<std::pair<int32_t, std::string>> calls;
      for (int j = 0; j < 20; ++j) {
        const std::string text = std::to_string(i) + " " + std::to_string(j) + std::string(j * 1000, 'x');
        calls.emplace_back(client.Begin(kEcho, text), text);
      }
      for (const auto& [stream, text] : calls) right += client.Await(stream).data.substr(5) == text;
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(right, 8 * 20);
}

TEST_F(CallServerTest, LargeMessagesPassTheWindowsAndTheSocket) {
  Start();
  Socket socket(port_);
  Client client(&socket);
  std::string text(10'000'000, ' ');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 2654435761u >> 13);
  const int32_t stream = client.Begin(kEcho, text);
  while (!client.Saw(EventKind::kAnswer)) ASSERT_TRUE(client.Receive());
  EXPECT_TRUE(client.Await(stream).data.substr(5) == text);
}

TEST_F(CallServerTest, ACallKnowsWhenItIsOver) {
  Start();
  Socket socket(port_);
  Client client(&socket);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  ASSERT_NE(call, nullptr);
  EXPECT_FALSE(call->IsOver());
  EXPECT_EQ(call->deadline(), Call::Time::max());
  client.GiveUp(stream);
  EXPECT_TRUE(Eventually([&] { return call->IsOver(); }));
  call->Finish(0, "", MessageOf("too late"), {});
  EXPECT_EQ(client.Ask(kEcho, "next"), "next");

  client.Begin(kHold, "", 0.01);
  const std::shared_ptr<Call> late = AwaitHeld();
  ASSERT_NE(late, nullptr);
  EXPECT_TRUE(Eventually([&] { return late->IsOver(); }));
  client.Begin(kHold, "", 3600);
  const std::chrono::duration<double> left = AwaitHeld()->deadline() - std::chrono::system_clock::now();
  EXPECT_GT(left.count(), 3000);
  EXPECT_LE(left.count(), 3601);
}

TEST_F(CallServerTest, ACallIsOverWhenItsConnectionEnds) {
  Start();
  std::shared_ptr<Call> call;
  {
    Socket socket(port_);
    Client client(&socket);
    client.Begin(kHold);
    call = AwaitHeld();
    ASSERT_NE(call, nullptr);
  }
  EXPECT_TRUE(Eventually([&] { return call->IsOver(); }));
  call->Finish(0, "", {}, {});
}

TEST_F(CallServerTest, BytesThatAreNoHttp2EndTheConnection) {
  Start();
  Socket socket(port_);
  ASSERT_TRUE(socket.Send("GET / HTTP/1.1\r\nHost: x\r\n\r\n"));
  while (!socket.Receive().empty()) continue;
  Socket good(port_);
  EXPECT_EQ(Client(&good).Ask(kEcho, "a"), "a");
}

TEST_F(CallServerTest, AConnectionOnWhichNothingComesEnds) {
  options_.connect_s = 0.05;
  Start();
  Socket socket(port_);
  EXPECT_EQ(socket.Receive(), "");
}

TEST_F(CallServerTest, IdleAndOldConnectionsAreAskedToEnd) {
  options_.idle_s = 0.05;
  Start();
  Socket socket(port_);
  Client client(&socket);
  EXPECT_EQ(client.Ask(kEcho, "a"), "a");
  while (client.Receive()) continue;
  EXPECT_TRUE(client.Saw(EventKind::kGoAway));
}

TEST_F(CallServerTest, AnOldConnectionStillGetsItsAnswers) {
  options_.age_s = 0.05;
  Start();
  Socket socket(port_);
  Client client(&socket);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  while (!client.Saw(EventKind::kGoAway)) ASSERT_TRUE(client.Receive());
  call->Finish(0, "", MessageOf("still"), {});
  EXPECT_EQ(client.Await(stream).data.substr(5), "still");
  while (client.Receive()) continue;
}

TEST_F(CallServerTest, TheGraceOfAnOldConnectionEnds) {
  options_.age_s = 0.05;
  options_.grace_s = 0.05;
  Start();
  Socket socket(port_);
  Client client(&socket);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  EXPECT_EQ(client.Await(stream).kind, EventKind::kEnd);
  EXPECT_TRUE(Eventually([&] { return call->IsOver(); }));
}

TEST_F(CallServerTest, ANewConnectionTakesThePlaceOfAnIdleOne) {
  options_.connections = 2;
  Start();
  Socket busy(port_);
  Client client(&busy);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  Socket idle(port_), next(port_);
  EXPECT_EQ(Client(&next).Ask(kEcho, "a"), "a");
  EXPECT_EQ(idle.Receive(), "");
  call->Finish(0, "", MessageOf("b"), {});
  EXPECT_EQ(client.Await(stream).data.substr(5), "b");
}

TEST_F(CallServerTest, ANewConnectionWaitsWhileAllHaveCalls) {
  options_.connections = 1;
  Start();
  Socket busy(port_);
  Client client(&busy);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  Socket next(port_);
  Client waiting(&next);
  const int32_t later = waiting.Begin(kEcho, "a");
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_FALSE(call->IsOver());
  call->Finish(0, "", {}, {});
  EXPECT_EQ(client.Await(stream).code, 0);
  EXPECT_EQ(waiting.Await(later).data.substr(5), "a");
}

TEST_F(CallServerTest, TheConnectionThatHoldsTheMostEnds) {
  options_.total_bytes = 1 << 20;
  Start();
  Socket large(port_), small(port_);
  Client hog(&large), client(&small);
  const int32_t kept = client.Begin(kHold, std::string(1000, 'a'));
  const std::shared_ptr<Call> call = AwaitHeld();
  const int32_t stream = hog.Begin(kHold, std::string(2 << 20, 'a'));
  EXPECT_EQ(hog.Await(stream).kind, EventKind::kEnd);
  call->Finish(0, "", MessageOf("b"), {});
  EXPECT_EQ(client.Await(kept).data.substr(5), "b");
}

TEST_F(CallServerTest, StreamingCalls) {
  Start();
  // The wire's client makes unary calls only: one message, and no more.
  Socket socket(port_);
  Client client(&socket);
  const Event event = client.Await(client.Begin(kChat, "hello"));
  EXPECT_EQ(event.code, 0);
  EXPECT_EQ(event.data.substr(5), "you said hello");
  EXPECT_TRUE(Await([this] { return notes_ == std::vector<std::string>{"message hello", "half closed"}; }));
  EXPECT_EQ(client.Await(client.Begin(kChat, "end")).code, 0);
}

TEST_F(CallServerTest, ShutdownWaitsForCallsAndRefusesNewConnections) {
  Start();
  Socket socket(port_);
  Client client(&socket);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  std::thread shutdown([this] { server_->Shutdown(kPatience); });
  while (!client.Saw(EventKind::kGoAway)) ASSERT_TRUE(client.Receive());
  EXPECT_TRUE(Eventually([this] { return !Socket(port_).connected(); }));
  EXPECT_FALSE(call->IsOver());
  call->Finish(0, "", MessageOf("done"), {});
  EXPECT_EQ(client.Await(stream).data.substr(5), "done");
  while (client.Receive()) continue;
  shutdown.join();
}

TEST_F(CallServerTest, ShutdownEndsCallsThatTakeTooLong) {
  Start();
  Socket socket(port_);
  Client client(&socket);
  const int32_t stream = client.Begin(kHold);
  const std::shared_ptr<Call> call = AwaitHeld();
  server_->Shutdown(milliseconds(20));
  EXPECT_TRUE(call->IsOver());
  EXPECT_EQ(client.Await(stream).kind, EventKind::kEnd);
  server_.reset();
  call->Finish(0, "", MessageOf("nobody hears it"), {});
  EXPECT_FALSE(call->Write("nor this"));
}

TEST_F(CallServerTest, UnixSockets) {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / ("calls" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  const std::string path = folder / "s";
  Make();
  EXPECT_FALSE(server_->Listen({"", 0, folder / "no" / "s"}, nullptr, nullptr).ok());
  EXPECT_FALSE(server_->Listen({"", 0, std::string(200, 'a')}, nullptr, nullptr).ok());
  std::ofstream(path) << "a file that is not ours";
  EXPECT_FALSE(server_->Listen({"", 0, path}, nullptr, nullptr).ok());
  EXPECT_TRUE(std::filesystem::exists(path));
  std::filesystem::remove(path);
  ASSERT_TRUE(server_->Listen({"", 0, path}, nullptr, nullptr).ok());
  ASSERT_TRUE(server_->Start().ok());
  {
    Socket socket(path);
    EXPECT_EQ(Client(&socket).Ask(kEcho, "a"), "a");
  }
  server_->Shutdown(milliseconds(0));
  EXPECT_FALSE(std::filesystem::exists(path));
  std::filesystem::remove_all(folder);
}

TEST_F(CallServerTest, SaysWhyItCannotListen) {
  Start();
  const std::unique_ptr<CallServer> second = CallServer::Make(options_, {});
  const Status status = second->Listen({"127.0.0.1", port_, ""}, nullptr, nullptr);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), "Address already in use");
  EXPECT_FALSE(second->Listen({"no.such.host.invalid", 0, ""}, nullptr, nullptr).ok());
}

// A context with a key and a certificate of its own.
std::shared_ptr<SSL_CTX> MakeContext() {
  EVP_PKEY* const key = EVP_EC_gen("P-256");
  X509* const certificate = X509_new();
  X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
  X509_gmtime_adj(X509_getm_notAfter(certificate), 1000);
  X509_set_pubkey(certificate, key);
  X509_sign(certificate, key, EVP_sha256());
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  SSL_CTX_use_certificate(context.get(), certificate);
  SSL_CTX_use_PrivateKey(context.get(), key);
  X509_free(certificate);
  EVP_PKEY_free(key);
  return context;
}

TEST_F(CallServerTest, Tls) {
  const std::shared_ptr<SSL_CTX> context = MakeContext();
  Start([context] { return context; });
  Socket socket(port_);
  ASSERT_TRUE(socket.StartTls());
  Client client(&socket);
  const std::string text(3'000'000, 'a');
  EXPECT_EQ(client.Ask(kEcho, "a"), "a");
  EXPECT_TRUE(client.Ask(kEcho, text) == text);

  Socket plain(port_);
  ASSERT_TRUE(plain.Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
  while (!plain.Receive().empty()) continue;
  EXPECT_EQ(client.Ask(kEcho, "b"), "b");
}

}  // namespace
}  // namespace dpsr::serving
