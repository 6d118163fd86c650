// Serves gRPC's calls on sockets: it listens, keeps the connections with their TLS, and gives each call to its method.
//
// Each of a few threads waits for the sockets of its connections. A method begins on such a thread and must not block
// it. It may answer from any thread: the answer is sent by the thread that gives it, without a change of threads.
#ifndef DPSR_SERVING_WIRE_CALL_SERVER_H_
#define DPSR_SERVING_WIRE_CALL_SERVER_H_

#include <openssl/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/status.h"
#include "serving/wire/session.h"

namespace dpsr::serving {

// One call of a client. Thread-safe, but for the functions that say otherwise.
class Call {
 public:
  using Time = std::chrono::system_clock::time_point;

  virtual ~Call() = default;

  // What the client sent with the call. `message` is that of a unary call, without its prefix.
  virtual std::string_view message() const = 0;
  // How the message is compressed; empty if it is not.
  virtual const std::string& encoding() const = 0;
  // How the client compresses messages, also where this one is not worth it, and which compressions it accepts: names
  // with commas between them.
  virtual const std::string& asked() const = 0;
  virtual const std::string& accepted() const = 0;
  // Returns the value of a metadata key, or an empty text.
  virtual std::string_view Metadata(std::string_view key) const = 0;
  // When the client stops to wait; the largest time if it does not.
  virtual Time deadline() const = 0;

  // Whether the client gave the call up, its deadline has passed, or the server ends.
  virtual bool IsOver() const = 0;

  // Ends the call; later calls of this function do nothing. A message is sent only by a unary call with code 0.
  virtual void Finish(int code, std::string_view details, Message response, std::vector<Header> trailing) = 0;

  // Sends a message of a streaming call. Returns false if the call is over.
  virtual bool Write(std::string_view message) = 0;

  // What a streaming call is told, one at a time and never from within Finish or Write: each message of the client, and
  // that it sends no more or has given up the call (`cancelled`). Set these while the method begins. They must not hold
  // a shared_ptr of the call, which owns them.
  std::function<void(std::string_view message)> on_message;
  std::function<void(bool cancelled)> on_end;
};

struct Method {
  MethodKind kind = MethodKind::kUnary;
  // Begins a call. Must not throw or block.
  std::function<void(std::shared_ptr<Call>)> begin;
};

struct CallServerOptions {
  static constexpr double kForever = std::numeric_limits<double>::infinity();

  SessionLimits limits;
  size_t total_bytes = size_t{1} << 30;  // what the calls of all connections hold; beyond it, connections end
  size_t connections = 10'000;
  double connect_s = 10;     // from a connection's beginning to the client's settings
  double idle_s = kForever;  // a connection without calls
  double age_s = kForever;   // a connection; a tenth less for some, so that they do not all end at once
  double grace_s = kForever; // from then on, for the calls that it still has
  int threads = 1;
};

// Where to listen. One of them is given.
struct ListenAddress {
  std::string host;
  int port = 0;      // 0: the system picks a free one
  std::string path;  // of a UNIX socket
};

// Returns the context of new connections. Called for each of them, by one thread at a time.
using TlsSource = std::function<std::shared_ptr<SSL_CTX>()>;

class CallServer {
 public:
  // `methods`: by path, such as "/package.Service/Method". Nothing is taken before Start.
  static std::unique_ptr<CallServer> Make(const CallServerOptions& options,
                                          std::unordered_map<std::string, Method> methods);
  virtual ~CallServer() = default;

  // Listens at an address; without `tls` in plain text. Sets `port`, if it is not null. The error is the system's
  // reason. A file at the path of a UNIX socket is replaced only if it is a socket.
  virtual Status Listen(const ListenAddress& address, TlsSource tls, int* port) = 0;

  // Begins to take connections. The error is that there can be no more threads.
  virtual Status Start() = 0;

  // Takes no more connections, asks clients to make no more calls, and waits for the calls that run at most for
  // `drain`. Then all that is left is over, and no method begins any more. Methods may still answer.
  virtual void Shutdown(std::chrono::milliseconds drain) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_WIRE_CALL_SERVER_H_
