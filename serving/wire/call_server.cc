#include "serving/wire/call_server.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <random>
#include <system_error>
#include <thread>
#include <utility>

namespace dpsr::serving {
namespace {

constexpr size_t kReadBytes = 1 << 16;   // that one turn of a connection reads
constexpr size_t kWriteBytes = 1 << 16;  // that are taken from a session at once
constexpr int kEventsPerTurn = 64;
constexpr double kMostSweepS = 1;    // between two looks at the connections' time limits
constexpr double kLeastSweepS = 0.02;
constexpr double kLingerS = 2;       // how long a connection that ends waits for the client to end it
constexpr double kAcceptAgainS = 0.05;  // between two tries to accept, if the process lacks files or memory for it
constexpr double kAgeJitter = 0.1;
constexpr auto kLookEvery = std::chrono::milliseconds(5);  // at the calls that a server which ends waits for

// A connection on which nothing comes is asked whether it still lives.
constexpr int kKeepAliveIdleS = 60;
constexpr int kKeepAliveIntervalS = 20;
constexpr int kKeepAliveProbes = 3;

constexpr uint64_t kWakeId = 0;  // of events that are not those of a connection
constexpr uint64_t kFirstListenerId = 1;
constexpr uint64_t kFirstConnectionId = 1 << 10;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A file descriptor that is closed at its end.
class File {
 public:
  explicit File(int fd = -1) : fd_(fd) {}
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~File() { Close(); }

  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

bool IsTransient(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

Status SystemError() { return MakeStatus(StatusCode::kFailedPrecondition, std::strerror(errno)); }

// OpenSSL's side of a connection, without its socket: received bytes go in, bytes to send come out.
class Tls {
 public:
  explicit Tls(const std::shared_ptr<SSL_CTX>& context) : ssl_(SSL_new(context.get()), SSL_free) {
    if (ssl_ == nullptr) return;
    in_ = BIO_new(BIO_s_mem());
    out_ = BIO_new(BIO_s_mem());
    SSL_set_bio(ssl_.get(), in_, out_);  // which owns them now
    SSL_set_accept_state(ssl_.get());
  }

  bool ok() const { return ssl_ != nullptr && in_ != nullptr && out_ != nullptr; }

  // Takes received bytes and appends what they say to `plain`. Returns false if the connection cannot go on.
  bool Receive(std::string_view data, std::string* plain) {
    ERR_clear_error();
    if (BIO_write(in_, data.data(), static_cast<int>(data.size())) != static_cast<int>(data.size())) return false;
    char buffer[16 << 10];
    for (;;) {
      const int size = SSL_read(ssl_.get(), buffer, sizeof(buffer));
      if (size <= 0) return SSL_get_error(ssl_.get(), size) == SSL_ERROR_WANT_READ;
      plain->append(buffer, static_cast<size_t>(size));
    }
  }

  // Encrypts bytes. Returns false if the connection cannot go on.
  bool Send(std::string_view plain) {
    ERR_clear_error();
    return plain.empty() || SSL_write(ssl_.get(), plain.data(), static_cast<int>(plain.size())) > 0;
  }

  // Says that nothing more comes.
  void End() {
    ERR_clear_error();
    if (SSL_is_init_finished(ssl_.get())) SSL_shutdown(ssl_.get());
  }

  // Moves the bytes to send to the end of `out`.
  void Take(std::string* out) {
    const size_t size = BIO_ctrl_pending(out_);
    const size_t begin = out->size();
    out->resize(begin + size);
    const int taken = size == 0 ? 0 : BIO_read(out_, out->data() + begin, static_cast<int>(size));
    out->resize(begin + static_cast<size_t>(std::max(taken, 0)));
  }

 private:
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_;
  BIO* in_ = nullptr;
  BIO* out_ = nullptr;
};

class Connection;
class Loop;

class CallImpl final : public Call, public std::enable_shared_from_this<CallImpl> {
 public:
  CallImpl(std::shared_ptr<Connection> connection, Event event)
      : connection_(std::move(connection)), event_(std::move(event)) {
    if (event_.timeout_s < 0) return;
    const Time now = std::chrono::system_clock::now();
    const double most = std::chrono::duration<double>(Time::max() - now).count();
    // Half of what the clock can hold is as good as no limit.
    if (event_.timeout_s > most / 2) return;
    deadline_ = now + std::chrono::duration_cast<Time::duration>(std::chrono::duration<double>(event_.timeout_s));
  }

  std::string_view message() const override {
    constexpr size_t kPrefix = 5;
    return event_.has_message ? std::string_view(event_.data).substr(kPrefix) : std::string_view();
  }
  const std::string& encoding() const override { return event_.encoding; }
  const std::string& asked() const override { return event_.asked; }
  const std::string& accepted() const override { return event_.accepted; }
  std::string_view Metadata(std::string_view key) const override {
    for (const Header& header : event_.metadata) {
      if (header.name == key) return header.value;
    }
    return {};
  }
  Time deadline() const override { return deadline_; }
  bool IsOver() const override { return cancelled_ || std::chrono::system_clock::now() >= deadline_; }
  void Finish(int code, std::string_view details, Message response, std::vector<Header> trailing) override;
  bool Write(std::string_view message) override;

  int32_t stream() const { return event_.stream; }
  const std::string& path() const { return event_.path; }
  void Cancel() { cancelled_ = true; }
  bool is_finished() const { return finished_; }

 private:
  const std::shared_ptr<Connection> connection_;
  const Event event_;
  Time deadline_ = Time::max();
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> finished_{false};
};

// What a method is told, after the connection is unlocked.
struct Notice {
  EventKind kind;
  std::shared_ptr<CallImpl> call;
  std::string message;
};

// What the connections of a server share.
struct Shared {
  Shared(const CallServerOptions& given, std::unordered_map<std::string, Method> of)
      : options(given), methods(std::move(of)) {
    budget.limit = options.total_bytes;
    for (const auto& [path, method] : methods) kinds.emplace(path, method.kind);
  }

  const CallServerOptions options;
  const std::unordered_map<std::string, Method> methods;
  Methods kinds;
  Budget budget;
  std::atomic<size_t> num_connections{0};
  std::atomic<bool> draining{false};
};

// A client's connection. Its thread reads and closes it; any thread may answer its calls.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Loop* loop, Shared* shared, uint64_t id, File file, std::unique_ptr<Tls> tls)
      : id_(id), made_(Now()), loop_(loop), shared_(shared), file_(std::move(file)), tls_(std::move(tls)) {
    ++shared_->num_connections;
    const double jitter = kAgeJitter * static_cast<double>(id * 2654435761u % 1000) / 1000;
    ends_ = made_ + shared_->options.age_s * (1 - jitter);
  }
  ~Connection() { Close(nullptr); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  uint64_t id() const { return id_; }
  int fd() const { return file_.get(); }

  // Reads what has come, sends what can be sent, and appends what the methods are to be told. Returns false if the
  // connection has ended.
  bool Turn(bool readable, std::vector<Notice>* notices) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return false;
    if (readable && !broken_) Read(notices);
    TakeEvents(notices);
    Flush();
    TakeEvents(notices);
    if (!broken_ && !Ends()) return true;
    CloseLocked(notices);
    return false;
  }

  // Ends calls and the connection where they have passed their time limits. Returns false if the connection has ended.
  bool Sweep(double now, std::vector<Notice>* notices) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return false;
    const CallServerOptions& options = shared_->options;
    if (linger_since_ > 0) {
      broken_ |= now - linger_since_ > kLingerS;
    } else if (!settled_) {
      broken_ |= now - made_ > options.connect_s || shared_->draining;
    } else {
      session_->Expire(now);
      TakeEvents(notices);
      broken_ |= blocked_since_ > 0 && now - blocked_since_ > options.limits.answer_s;
      const double idle = session_->num_streams() == 0 ? now - session_->idle_since() : 0;
      if (drained_at_ == 0 && (shared_->draining || now > ends_ || idle > options.idle_s)) Drain(now);
      if (drained_at_ > 0) {
        // A client that does not answer the ping has no calls on their way after this time, or cannot be helped.
        broken_ |= session_->num_streams() == 0 && now - drained_at_ > kLingerS;
        broken_ |= now - drained_at_ > options.grace_s;
      }
    }
    Flush();
    if (!broken_ && !Ends()) return true;
    CloseLocked(notices);
    return false;
  }

  // Asks the client to make no more calls.
  void Drain(double now) {
    drained_at_ = now;
    session_->Drain();
  }

  void Close(std::vector<Notice>* notices) {
    std::lock_guard<std::mutex> lock(mutex_);
    CloseLocked(notices);
  }

  // Closes the connection if it has no calls. Its thread forgets it at the next sweep.
  bool CloseIfIdle() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || !IsIdle()) return false;
    CloseLocked(nullptr);
    return true;
  }

  // Has its thread close the connection.
  void Break() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    broken_ = true;
    WakeLoop();
  }

  void Finish(int32_t stream, int code, std::string_view details, Message response, std::vector<Header> trailing) {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(stream);
    if (closed_) return;
    session_->Answer(stream, code, details, {}, std::move(response), std::move(trailing));
    FlushFromOutside();
  }

  bool Write(int32_t stream, std::string_view message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return false;
    const bool pushed = session_->Push(stream, message);
    FlushFromOutside();
    return pushed;
  }

  struct State {
    size_t held = 0;          // bytes of its calls
    bool is_stalled = false;  // these make no progress
    bool is_idle = false;     // it has none
    double idle_since = 0;
    bool had_calls = false;
    bool has_ended = false;   // nothing is sent any more
  };
  State state() {
    std::lock_guard<std::mutex> lock(mutex_);
    State state;
    state.idle_since = made_;
    state.had_calls = had_calls_;
    state.is_idle = !closed_ && IsIdle();
    state.has_ended = closed_ || linger_since_ > 0;
    if (session_ == nullptr) return state;
    state.held = session_->held();
    state.is_stalled = session_->is_stalled();
    state.idle_since = session_->idle_since();
    return state;
  }

 private:
  // Reads once, so that the other connections of the thread have their turn.
  void Read(std::vector<Notice>* notices);

  void Feed(std::string_view data, std::vector<Notice>* notices) {
    if (data.empty() || linger_since_ > 0) return;
    if (session_ == nullptr) {
      session_ = std::make_unique<Session>(Session::Role::kServer, shared_->options.limits, &shared_->kinds,
                                           &shared_->budget, Now());
    }
    if (!session_->Receive(data, Now(), &events_)) broken_ = true;
    Note(notices);
  }

  void TakeEvents(std::vector<Notice>* notices) {
    if (session_ == nullptr || !session_->has_events()) return;
    session_->TakeEvents(&events_);
    Note(notices);
  }

  // Turns the session's events into notices.
  void Note(std::vector<Notice>* notices) {
    for (Event& event : events_) {
      switch (event.kind) {
        case EventKind::kCall: {
          had_calls_ = true;
          const int32_t stream = event.stream;
          auto call = std::make_shared<CallImpl>(shared_from_this(), std::move(event));
          calls_[stream] = call;
          notices->push_back({EventKind::kCall, std::move(call), ""});
          break;
        }
        case EventKind::kMessage:
        case EventKind::kHalfClose:
          if (const auto found = calls_.find(event.stream); found != calls_.end()) {
            constexpr size_t kPrefix = 5;
            std::string message = event.data.size() > kPrefix ? event.data.substr(kPrefix) : std::string();
            notices->push_back({event.kind, found->second, std::move(message)});
          }
          break;
        case EventKind::kEnd:
          if (const auto found = calls_.find(event.stream); found != calls_.end()) {
            found->second->Cancel();
            notices->push_back({EventKind::kEnd, std::move(found->second), ""});
            calls_.erase(found);
          }
          break;
        case EventKind::kSettings:
          settled_ = true;
          break;
        case EventKind::kDrained:
          session_->Settle();
          break;
        case EventKind::kGoAway:
        case EventKind::kAnswer:
          break;
      }
    }
    events_.clear();
  }

  // Sends what the session has to send and the socket takes.
  void Flush();

  // Sends the bytes of `out_` that the socket takes. Returns false if some are left or the connection is broken.
  bool SendOut();

  // Flushes on a thread that is not the connection's own, which hears of what only it may do.
  void FlushFromOutside() {
    Flush();
    if (broken_ || session_->has_events() || session_->finished()) WakeLoop();
  }

  // Whether the connection can be closed. One with nothing more to say still reads for a while, because closing a socket
  // with unread bytes resets the connection, and the client may lose the answer. What a client sends that has broken a
  // rule is not read: so a flood stops, and cannot begin anew at once.
  bool Ends() {
    if (session_ == nullptr || !session_->finished() || !out_.empty() || linger_since_ > 0) return false;
    if (tls_ != nullptr) {
      tls_->End();
      tls_->Take(&out_);
      SendOut();
    }
    shutdown(file_.get(), SHUT_WR);
    linger_since_ = Now();
    if (session_->has_failed()) StopReading();
    return false;
  }

  void CloseLocked(std::vector<Notice>* notices) {
    if (closed_) return;
    closed_ = true;
    for (auto& [stream, call] : calls_) {
      call->Cancel();
      if (notices != nullptr) notices->push_back({EventKind::kEnd, std::move(call), ""});
    }
    calls_.clear();
    session_.reset();
    tls_.reset();
    file_.Close();
    --shared_->num_connections;
  }

  bool IsIdle() const { return session_ == nullptr || session_->num_streams() == 0; }
  void WakeLoop();
  void StopReading();
  void SetBlocked(bool blocked);

  const uint64_t id_;
  const double made_;
  Loop* const loop_;      // valid until the connection is closed
  Shared* const shared_;  // likewise
  double ends_ = 0;       // when it is old
  std::mutex mutex_;      // of all that follows
  File file_;
  std::unique_ptr<Tls> tls_;          // null without TLS
  std::unique_ptr<Session> session_;  // null before the first bytes
  std::unordered_map<int32_t, std::shared_ptr<CallImpl>> calls_;  // that are not answered
  std::vector<Event> events_;         // empty between two calls of a function
  std::string out_;                   // bytes that the socket did not take
  size_t out_sent_ = 0;
  double blocked_since_ = 0;  // since when the socket takes nothing; 0: it does
  double drained_at_ = 0;     // when the client was asked to make no more calls; 0: it was not
  double linger_since_ = 0;   // since when only the client's end is awaited; 0: it is not
  bool settled_ = false;      // the client has sent its settings
  bool had_calls_ = false;
  bool broken_ = false;       // to be closed
  bool closed_ = false;
};

// One thread, and the connections whose sockets it waits for.
class Loop {
 public:
  explicit Loop(Shared* shared)
      : shared_(shared), epoll_(epoll_create1(EPOLL_CLOEXEC)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    Watch(wake_.get(), kWakeId, EPOLLIN);
  }
  ~Loop() { Stop(); }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  bool ok() const { return epoll_.get() >= 0 && wake_.get() >= 0; }

  // Has the thread call Host::Accept with the number of a listener when clients wait there.
  bool AddListener(int fd, size_t number) { return Watch(fd, kFirstListenerId + number, EPOLLIN); }
  void PauseListener(int fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

  // What the thread asks its server for.
  class Host {
   public:
    virtual void Accept(size_t listener) = 0;
    virtual void SweepListeners(double now) = 0;
    virtual void MakeRoom() = 0;

   protected:
    ~Host() = default;
  };

  // `accepts`: whether the listeners are this thread's.
  void Start(Host* host, bool accepts) {
    thread_ = std::thread([this, host, accepts] { Run(host, accepts); });
  }

  // Ends the thread, all connections and their calls.
  void Stop() {
    stopping_ = true;
    Wake();
    if (thread_.joinable()) thread_.join();
    std::vector<Notice> notices;
    for (const std::shared_ptr<Connection>& connection : Connections()) {
      connection->Close(&notices);
      Remove(connection->id());
    }
    Tell(&notices);
  }

  // Takes over a connection. Any thread may call it.
  void Add(std::shared_ptr<Connection> connection) {
    const int fd = connection->fd();
    const uint64_t id = connection->id();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      connections_.emplace(id, std::move(connection));
    }
    if (!Watch(fd, id, EPOLLIN | EPOLLRDHUP)) Remove(id);
  }

  // Has the thread look at a connection. Any thread may call it.
  void Look(uint64_t id) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      to_look_at_.push_back(id);
    }
    Wake();
  }

  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  }

  // Says what the thread waits for at a socket besides its end: EPOLLIN, EPOLLOUT.
  void WatchFor(int fd, uint64_t id, uint32_t what) {
    epoll_event event{};
    event.events = EPOLLRDHUP | what;
    event.data.u64 = id;
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
  }

  std::vector<std::shared_ptr<Connection>> Connections() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<Connection>> all;
    all.reserve(connections_.size());
    for (const auto& entry : connections_) all.push_back(entry.second);
    return all;
  }

  // What a connection reads into, while it has its turn.
  char* buffer() { return buffer_.data(); }
  std::string* plain() { return &plain_; }

 private:
  bool Watch(int fd, uint64_t id, uint32_t what) {
    epoll_event event{};
    event.events = what;
    event.data.u64 = id;
    return epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  }

  std::shared_ptr<Connection> Find(uint64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = connections_.find(id);
    return found == connections_.end() ? nullptr : found->second;
  }

  void Remove(uint64_t id) {
    std::shared_ptr<Connection> last;  // ends after the lock
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = connections_.find(id);
    if (found == connections_.end()) return;
    last = std::move(found->second);
    connections_.erase(found);
  }

  void Run(Host* host, bool accepts) {
    const CallServerOptions& options = shared_->options;
    const double shortest = std::min({options.connect_s, options.limits.headers_s, options.limits.body_s,
                                      options.limits.answer_s, options.idle_s, options.age_s, options.grace_s});
    const double sweep_s = std::clamp(shortest / 4, kLeastSweepS, kMostSweepS);
    double next_sweep = Now() + sweep_s;
    epoll_event events[kEventsPerTurn];
    while (!stopping_) {
      const auto wait_ms = static_cast<int>(std::max(0.0, next_sweep - Now()) * 1000) + 1;
      const int count = epoll_wait(epoll_.get(), events, kEventsPerTurn, wait_ms);
      for (int i = 0; i < count && !stopping_; ++i) {
        const uint64_t id = events[i].data.u64;
        if (id == kWakeId) {
          LookAround();
          // The server may have begun to end.
          if (shared_->draining) next_sweep = 0;
        } else if (id < kFirstConnectionId) {
          Guard(id, [&] { host->Accept(id - kFirstListenerId); });
        } else {
          Turn(id, (events[i].events & ~static_cast<uint32_t>(EPOLLOUT)) != 0);
        }
      }
      if (shared_->budget.used > shared_->budget.limit) Guard(kWakeId, [&] { host->MakeRoom(); });
      const double now = Now();
      if (now < next_sweep) continue;
      next_sweep = now + sweep_s;
      if (accepts) host->SweepListeners(now);
      Guard(kWakeId, [&] { Sweep(now); });
    }
  }

  // Runs a part of the loop. For want of memory, only the connection that asked for it ends.
  template <typename Part>
  void Guard(uint64_t id, Part part) {
    try {
      part();
    } catch (const std::exception&) {
      if (id < kFirstConnectionId) return;
      const std::shared_ptr<Connection> connection = Find(id);
      if (connection != nullptr) connection->Close(nullptr);
      Remove(id);
    }
  }

  void Turn(uint64_t id, bool readable) {
    Guard(id, [&] {
      const std::shared_ptr<Connection> connection = Find(id);
      if (connection == nullptr) return;
      std::vector<Notice> notices;
      if (!connection->Turn(readable, &notices)) Remove(id);
      Tell(&notices);
    });
  }

  void LookAround() {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t taken = read(wake_.get(), &count, sizeof(count));
    std::vector<uint64_t> ids;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ids.swap(to_look_at_);
    }
    for (const uint64_t id : ids) Turn(id, false);
  }

  void Sweep(double now) {
    std::vector<Notice> notices;
    for (const std::shared_ptr<Connection>& connection : Connections()) {
      if (!connection->Sweep(now, &notices)) Remove(connection->id());
    }
    Tell(&notices);
  }

  // Tells the methods what has happened to their calls.
  void Tell(std::vector<Notice>* notices) {
    for (Notice& notice : *notices) {
      CallImpl* const call = notice.call.get();
      switch (notice.kind) {
        case EventKind::kCall:
          shared_->methods.find(call->path())->second.begin(std::move(notice.call));
          break;
        case EventKind::kMessage:
          if (call->on_message && !call->is_finished()) call->on_message(notice.message);
          break;
        case EventKind::kHalfClose:
          if (call->on_end && !call->is_finished()) call->on_end(false);
          break;
        case EventKind::kEnd:
          if (call->on_end && !call->is_finished()) call->on_end(true);
          break;
        default:
          break;
      }
    }
    notices->clear();
  }

  Shared* const shared_;
  const File epoll_;
  const File wake_;
  std::vector<char> buffer_ = std::vector<char>(kReadBytes);
  std::string plain_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // of the two that follow
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> connections_;
  std::vector<uint64_t> to_look_at_;
  std::thread thread_;
};

void CallImpl::Finish(int code, std::string_view details, Message response, std::vector<Header> trailing) {
  if (finished_.exchange(true)) return;
  connection_->Finish(stream(), code, details, std::move(response), std::move(trailing));
}

bool CallImpl::Write(std::string_view message) { return !finished_ && connection_->Write(stream(), message); }

void Connection::WakeLoop() {
  if (!closed_) loop_->Look(id_);
}

void Connection::StopReading() { loop_->WatchFor(file_.get(), id_, 0); }

void Connection::Read(std::vector<Notice>* notices) {
  const ssize_t size = recv(file_.get(), loop_->buffer(), kReadBytes, 0);
  if (size == 0 || (size < 0 && !IsTransient(errno))) broken_ = true;
  if (size <= 0) return;
  const std::string_view data(loop_->buffer(), static_cast<size_t>(size));
  if (tls_ == nullptr) {
    Feed(data, notices);
    return;
  }
  std::string* const plain = loop_->plain();
  plain->clear();
  const bool goes_on = tls_->Receive(data, plain);
  Feed(*plain, notices);
  if (goes_on) return;
  // Its alert says why.
  tls_->Take(&out_);
  SendOut();
  broken_ = true;
}

void Connection::SetBlocked(bool blocked) {
  if (session_ != nullptr) session_->SetUnsent(out_.size() - out_sent_);
  if (blocked == (blocked_since_ > 0)) return;
  blocked_since_ = blocked ? Now() : 0;
  loop_->WatchFor(file_.get(), id_, EPOLLIN | (blocked ? EPOLLOUT : 0u));
}

bool Connection::SendOut() {
  while (out_sent_ < out_.size()) {
    const ssize_t size =
        send(file_.get(), out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (size >= 0) {
      out_sent_ += static_cast<size_t>(size);
      if (blocked_since_ > 0) blocked_since_ = Now();  // it moves
    } else if (errno != EINTR) {
      broken_ |= !IsTransient(errno);
      return false;
    }
  }
  out_.clear();
  out_sent_ = 0;
  return true;
}

void Connection::Flush() {
  if (broken_) return;
  if (tls_ != nullptr) tls_->Take(&out_);
  while (SendOut()) {
    if (session_ == nullptr || !session_->wants_write()) {
      SetBlocked(false);
      return;
    }
    const std::string& data = session_->Send(kWriteBytes);
    if (data.empty()) {
      SetBlocked(false);
      return;
    }
    if (tls_ == nullptr) {
      const ssize_t size = send(file_.get(), data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      out_sent_ = 0;
      out_.assign(data, static_cast<size_t>(std::max<ssize_t>(size, 0)));
      if (size < 0 && !IsTransient(errno)) broken_ = true;
    } else if (tls_->Send(data)) {
      tls_->Take(&out_);
    } else {
      broken_ = true;
    }
    if (broken_) return;
  }
  if (!broken_) SetBlocked(true);
}

// A socket that clients connect to.
struct Listener {
  File file;
  TlsSource tls;
  std::string path;  // of a UNIX socket
  bool paused = false;
  double resume_at = 0;
};

class CallServerImpl final : public CallServer, private Loop::Host {
 public:
  CallServerImpl(const CallServerOptions& options, std::unordered_map<std::string, Method> methods)
      : shared_(options, std::move(methods)) {
    for (int i = 0; i < std::max(1, options.threads); ++i) loops_.push_back(std::make_unique<Loop>(&shared_));
  }
  ~CallServerImpl() override {
    Shutdown(std::chrono::milliseconds(0));
    loops_.clear();  // before what they use
  }

  Status Listen(const ListenAddress& address, TlsSource tls, int* port) override {
    return address.path.empty() ? ListenOnPort(address, std::move(tls), port)
                                : ListenOnPath(address.path, std::move(tls));
  }

  Status Start() override {
    for (const auto& loop : loops_) {
      if (!loop->ok()) return SystemError();
    }
    try {
      // The first thread accepts connections, for all of them.
      for (size_t i = 0; i < loops_.size(); ++i) loops_[i]->Start(this, i == 0);
    } catch (const std::system_error& error) {
      return MakeStatus(StatusCode::kFailedPrecondition, error.what());
    }
    for (size_t i = 0; i < listeners_.size(); ++i) {
      if (!loops_[0]->AddListener(listeners_[i].file.get(), i)) return SystemError();
    }
    started_ = true;
    return {};
  }

  void Shutdown(std::chrono::milliseconds drain) override {
    if (started_) {
      shared_.draining = true;
      for (const auto& loop : loops_) loop->Wake();
      const auto end = std::chrono::steady_clock::now() + drain;
      while (!HaveEnded() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(kLookEvery);
    }
    started_ = false;
    for (const auto& loop : loops_) loop->Stop();
    for (Listener& listener : listeners_) CloseListener(&listener);
  }

 private:
  Status ListenOnPort(const ListenAddress& address, TlsSource tls, int* port) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    addrinfo* found = nullptr;
    const int error = getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
    if (error != 0) return MakeStatus(StatusCode::kFailedPrecondition, gai_strerror(error));
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
    int bound = address.port;
    bool first = true;
    // All addresses of a name get the port that the first one got.
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      File file(socket(one->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      const int yes = 1;
      setsockopt(file.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
      sockaddr_storage at{};
      std::memcpy(&at, one->ai_addr, one->ai_addrlen);
      SetPort(&at, bound);
      const bool listens = file.get() >= 0 &&
                           bind(file.get(), reinterpret_cast<sockaddr*>(&at), one->ai_addrlen) == 0 &&
                           listen(file.get(), SOMAXCONN) == 0;
      const bool is_missing = errno == EADDRNOTAVAIL || errno == EAFNOSUPPORT;
      if (!listens && (first || !is_missing)) return SystemError();
      if (!listens) continue;
      socklen_t size = sizeof(at);
      getsockname(file.get(), reinterpret_cast<sockaddr*>(&at), &size);
      bound = PortOf(at);
      first = false;
      listeners_.push_back({std::move(file), tls, "", false, 0});
    }
    if (port != nullptr) *port = bound;
    return {};
  }

  static void SetPort(sockaddr_storage* address, int port) {
    const auto number = htons(static_cast<uint16_t>(port));
    if (address->ss_family == AF_INET6) {
      reinterpret_cast<sockaddr_in6*>(address)->sin6_port = number;
    } else {
      reinterpret_cast<sockaddr_in*>(address)->sin_port = number;
    }
  }

  static int PortOf(const sockaddr_storage& address) {
    return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port
                                               : reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
  }

  Status ListenOnPath(const std::string& path, TlsSource tls) {
    sockaddr_un address{};
    if (path.size() >= sizeof(address.sun_path)) {
      return MakeStatus(StatusCode::kFailedPrecondition, "longer than ", sizeof(address.sun_path) - 1, " bytes");
    }
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    // A server that was killed has left its socket.
    struct stat there {};
    if (lstat(path.c_str(), &there) == 0 && S_ISSOCK(there.st_mode)) unlink(path.c_str());
    File file(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (file.get() < 0 || bind(file.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
        listen(file.get(), SOMAXCONN) != 0) {
      return SystemError();
    }
    listeners_.push_back({std::move(file), std::move(tls), path, false, 0});
    return {};
  }

  // Takes the connections that wait at a listener. Only the first loop's thread calls it.
  void Accept(size_t number) override {
    Listener* const listener = &listeners_[number];
    for (int i = 0; i < kEventsPerTurn; ++i) {
      if (shared_.num_connections >= shared_.options.connections) {
        if (!IsAwaited(listener->file.get())) return;
        if (!EndAnIdleOne()) {
          Pause(listener);  // all of them have calls
          return;
        }
      }
      File file(accept4(listener->file.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (file.get() < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK) return;
        // For example too many open files.
        if (errno != EINTR && errno != ECONNABORTED) {
          Pause(listener);
          return;
        }
        continue;
      }
      SetOptions(file.get());
      std::unique_ptr<Tls> tls;
      if (listener->tls) {
        tls = std::make_unique<Tls>(listener->tls());
        if (!tls->ok()) continue;
      }
      Loop* const loop = loops_[next_id_ % loops_.size()].get();
      loop->Add(std::make_shared<Connection>(loop, &shared_, next_id_, std::move(file), std::move(tls)));
      ++next_id_;
    }
  }

  // Whether a client waits at a listening socket.
  static bool IsAwaited(int fd) {
    pollfd waiting{fd, POLLIN, 0};
    return poll(&waiting, 1, 0) == 1;
  }

  static void SetOptions(int fd) {
    const auto set = [fd](int level, int name, int value) { setsockopt(fd, level, name, &value, sizeof(value)); };
    set(IPPROTO_TCP, TCP_NODELAY, 1);
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveIdleS);
    set(IPPROTO_TCP, TCP_KEEPINTVL, kKeepAliveIntervalS);
    set(IPPROTO_TCP, TCP_KEEPCNT, kKeepAliveProbes);
  }

  // Accepts nothing for a short time.
  void Pause(Listener* listener) {
    loops_[0]->PauseListener(listener->file.get());
    listener->paused = true;
    listener->resume_at = Now() + kAcceptAgainS;
  }

  void SweepListeners(double now) override {
    for (size_t i = 0; i < listeners_.size(); ++i) {
      Listener& listener = listeners_[i];
      if (shared_.draining) {
        CloseListener(&listener);
      } else if (listener.paused && now >= listener.resume_at) {
        listener.paused = !loops_[0]->AddListener(listener.file.get(), i);
      }
    }
  }

  void CloseListener(Listener* listener) {
    if (listener->file.get() >= 0 && !listener->path.empty()) unlink(listener->path.c_str());
    listener->file.Close();
  }

  // Makes room for a new connection: ends one without calls. Takes those that never made a call first, and among them
  // the one that has been idle longest. Returns false if all connections have calls.
  bool EndAnIdleOne() {
    std::shared_ptr<Connection> best;
    Connection::State best_state;
    for (auto& [state, connection] : States()) {
      if (!state.is_idle) continue;
      const bool better = best == nullptr || std::pair(state.had_calls, state.idle_since) <
                                                 std::pair(best_state.had_calls, best_state.idle_since);
      if (!better) continue;
      best = connection;
      best_state = state;
    }
    return best != nullptr && best->CloseIfIdle();
  }

  // Ends the connections that hold the most, until all hold less than the limit; first those that stall.
  void MakeRoom() override {
    const std::unique_lock<std::mutex> lock(room_mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    auto found = States();
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
      return std::pair(a.first.is_stalled, a.first.held) > std::pair(b.first.is_stalled, b.first.held);
    });
    size_t used = shared_.budget.used;
    for (const auto& [state, connection] : found) {
      if (used <= shared_.budget.limit || state.held == 0) break;
      connection->Break();
      used -= std::min(used, state.held);
    }
  }

  std::vector<std::pair<Connection::State, std::shared_ptr<Connection>>> States() {
    std::vector<std::pair<Connection::State, std::shared_ptr<Connection>>> found;
    for (const auto& loop : loops_) {
      for (std::shared_ptr<Connection>& connection : loop->Connections()) {
        const Connection::State state = connection->state();
        found.emplace_back(state, std::move(connection));
      }
    }
    return found;
  }

  // Whether no connection has anything more to send.
  bool HaveEnded() {
    const auto states = States();
    return std::all_of(states.begin(), states.end(), [](const auto& entry) { return entry.first.has_ended; });
  }

  Shared shared_;
  std::vector<std::unique_ptr<Loop>> loops_;
  std::vector<Listener> listeners_;
  uint64_t next_id_ = kFirstConnectionId;
  std::mutex room_mutex_;
  bool started_ = false;
};

}  // namespace

std::unique_ptr<CallServer> CallServer::Make(const CallServerOptions& options,
                                             std::unordered_map<std::string, Method> methods) {
  return std::make_unique<CallServerImpl>(options, std::move(methods));
}

}  // namespace dpsr::serving
