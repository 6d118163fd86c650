// One side of an HTTP/2 connection that carries gRPC's calls, without sockets: received bytes go in, events and bytes to
// send come out. nghttp2 keeps the protocol; this class adds what is gRPC's, and limits.
//
// A server's session collects each unary call and reports it once it is complete. A call that breaks a limit or a rule
// is answered here, and its owner never hears of it. A client's session reports each answer once it is complete; it
// makes unary calls only.
//
// A server's session lets a client send the first 64 KB of each message. A larger message goes on while all of them
// together are not too large, or if no other one of its connection is under way; the others wait. So a large message
// passes at full speed, and messages whose end never comes fill no memory.
//
// A server may have streaming methods too, of few and small messages (health, reflection): the owner hears of the call
// at its headers, then of each message, and sends messages until it answers. All messages that such a call receives
// count as held until its end.
#ifndef DPSR_SERVING_WIRE_SESSION_H_
#define DPSR_SERVING_WIRE_SESSION_H_

#include <nghttp2/nghttp2.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "serving/wire/grpc_headers.h"

namespace dpsr::serving {

struct SessionLimits {
  uint32_t streams = 128;         // calls under way on the connection
  size_t header_bytes = 8192;     // headers of a call or an answer, each counted with 32 bytes more, as in RFC 9113
  size_t message_bytes = 1 << 25; // one message
  size_t connection_bytes = 1 << 25;  // all that the connection's calls hold; a call that holds all of it may go on
  double headers_s = 10;          // from the first byte of a call's headers to their end
  double body_s = 60;             // from there to the end of the call's message
  double answer_s = 60;           // from an answer to the last byte of it that the other side takes
  double most_resets = 200;       // calls that a client may give up at once
  double resets_per_s = 200;      // and those of a second more; beyond them, its connection ends
};

enum class MethodKind { kUnary, kStreaming };

// The methods of a server, by their paths.
using Methods = std::unordered_map<std::string, MethodKind>;

// The bytes that the sessions of one process hold. Sessions are not thread-safe, but those of several threads may share
// a budget.
struct Budget {
  size_t limit = SIZE_MAX;
  std::atomic<size_t> used = 0;
  std::atomic<size_t> coming = 0;  // bytes of the large messages that clients may send now, as they announced them
};

// Bytes of somebody else. `owner` keeps them alive.
struct Message {
  const char* data = nullptr;
  size_t size = 0;
  std::shared_ptr<void> owner;
  std::string encoding = {};  // how the bytes are compressed; empty if they are not
};

enum class EventKind {
  kCall,      // server: a unary call is complete, or a streaming one has begun
  kAnswer,    // client: an answer is complete
  kEnd,       // the other side gave up a call: a server's after kCall, a client's before kAnswer
  kSettings,  // the other side sent its settings
  kGoAway,    // the other side accepts no more calls
  kDrained,   // the other side has seen Drain()
  kMessage,   // server: a streaming call has another message
  kHalfClose, // server: a streaming call has no more messages
};

struct Event {
  EventKind kind;
  int32_t stream = 0;
  uint32_t error = 0;             // kEnd: an HTTP/2 error code
  std::string path;               // kCall
  std::string encoding;           // kCall: how the message is compressed; empty if it is not
  std::string asked;              // kCall: how the client compresses messages, also where this one is not worth it
  std::string accepted;           // kCall: the compressions that the client accepts, with commas between them
  double timeout_s = -1;          // kCall: below 0 without a limit
  std::vector<Header> metadata;   // kCall; kAnswer: initial metadata
  std::string data;               // message with its prefix of 5 bytes
  bool has_message = false;       // whether `data` is exactly one message that is not compressed (kCall: or is)
  int http_status = 0;            // kAnswer
  int code = -1;                  // kAnswer: below 0 if there is none
  std::string details;            // kAnswer
  std::vector<Header> trailing;   // kAnswer
};

// All functions return at once. Time is in seconds, of a clock that the caller chooses.
class Session {
 public:
  enum class Role { kClient, kServer };
  // Calls of other `methods` are answered with UNIMPLEMENTED (server only). `budget` and `methods` must outlive the
  // session.
  Session(Role role, const SessionLimits& limits, const Methods* methods, Budget* budget, double now);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Takes received bytes and appends what they completed to `events`. After an error the session only has its farewell
  // to send. Returns false if not even that: the other side does not speak HTTP/2.
  bool Receive(std::string_view data, double now, std::vector<Event>* events);

  // Returns bytes to send, about `most` at most and none where windows or the protocol leave nothing to send.
  const std::string& Send(size_t most);

  // Counts bytes that the owner keeps for a call until it is answered. Returns false if the limit forbids it, or if the
  // call is gone.
  bool Hold(int32_t stream, size_t bytes);

  // Sends a message of a streaming call. Returns false if the call is gone, or ends because the connection would hold
  // too much; then kEnd follows.
  bool Push(int32_t stream, std::string_view message);

  // Answers a call. A message is sent only with code 0, and not by a streaming call. Returns false if the call is gone. If the connection would hold
  // too much, because the other side does not take its answers, the answer is RESOURCE_EXHAUSTED instead.
  bool Answer(int32_t stream, int code, std::string_view details, const std::vector<Header>& initial, Message message,
              std::vector<Header> trailing);

  // Begins a call and returns its stream, or a negative number if the connection takes no more. Below 0, `timeout_s`
  // means no limit.
  int32_t Call(std::string_view path, std::string_view authority, bool tls, double timeout_s,
               const std::vector<Header>& metadata, Message message);

  // Gives up a call. No event follows.
  void Reset(int32_t stream, uint32_t error);

  // Asks a client to make no more calls; kDrained tells when it knows. Then Settle() ignores later calls.
  void Drain();
  void Settle();

  // Ends the connection with an error code, once that is sent.
  void Terminate(uint32_t error);

  // Ends what has taken longer than the limits allow (server only).
  void Expire(double now);

  // Takes the events that came up outside of Receive().
  void TakeEvents(std::vector<Event>* events);
  bool has_events() const { return !pending_.empty(); }

  // Tells how many bytes that Send() returned still wait outside the session.
  void SetUnsent(size_t bytes);

  bool wants_write() const { return !broken_ && nghttp2_session_want_write(session_) != 0; }
  // Whether the connection can be closed: it has nothing more to send or to receive.
  bool finished() const { return !wants_write() && (ended_ || nghttp2_session_want_read(session_) == 0); }
  // Whether the connection ends because the other side broke a rule or a limit.
  bool has_failed() const { return failed_; }
  size_t num_streams() const { return streams_.size(); }
  size_t held() const { return held_ + unsent_; }
  double idle_since() const { return idle_since_; }
  // Whether an answer waits for the other side's window.
  bool is_stalled() const;
  uint32_t max_calls() const {
    return nghttp2_session_get_remote_settings(session_, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS);
  }

 private:
  enum class Phase { kHeaders, kBody, kOwner, kAnswer };
  struct Stream;
  struct Callbacks;

  Stream* Find(int32_t stream);
  Stream* Open(int32_t stream);
  void Close(Stream* stream);
  void Charge(Stream* stream, size_t bytes);
  void Release(Stream* stream, size_t bytes);
  bool MayCharge(const Stream& stream, size_t bytes) const;
  std::string HoldsTooMuch() const;
  void OnAllSent(Stream* stream);
  void Announce(Stream* stream);
  void Admit(Stream* stream);
  void AdmitWaiting();
  void EndAdmission(Stream* stream);
  void SetPhase(Stream* stream, Phase phase);
  void SetMessage(Stream* stream, Message message);
  bool Spend(double cost);

  void OnHeader(Stream* stream, std::string_view name, std::string_view value, bool valid);
  void OnRequestHeaders(Stream* stream);
  void OnData(Stream* stream, std::string_view data);
  void OnStreamingData(Stream* stream, std::string_view data);
  void OnEnd(Stream* stream);
  void EndStreaming(Stream* stream, int code, std::string_view details, std::vector<Header> trailing);
  void BreakStreaming(Stream* stream, int code, std::string_view details);
  void Report(EventKind kind, int32_t stream, std::string data);
  void Refuse(Stream* stream, int code, std::string_view details);
  void SubmitRefusal(Stream* stream, const std::vector<Header>& head);
  void SubmitAnswer(Stream* stream, const std::vector<Header>& head, bool with_data);

  const Role role_;
  const SessionLimits limits_;
  const Methods* const methods_;
  Budget* const budget_;
  nghttp2_session* session_ = nullptr;
  std::unordered_map<int32_t, std::unique_ptr<Stream>> streams_;
  std::deque<int32_t> waiting_;  // server: large messages that must wait, in the order in which they came
  size_t num_admitted_ = 0;      // server: large messages that may go on
  std::string out_;
  size_t most_ = 0;
  size_t held_ = 0;
  size_t unsent_ = 0;
  double now_;
  double idle_since_;
  double credit_;  // for frames that carry nothing
  double resets_;  // calls that the client may still give up
  int64_t ignored_ = 0;  // server: bytes received, less those of reported frames and of what was paid for
  uint32_t failure_ = NGHTTP2_NO_ERROR;  // why a callback failed
  bool ended_ = false;   // takes no more bytes
  bool failed_ = false;  // ended with an error
  bool broken_ = false;  // has no more bytes to send
  std::vector<Event> pending_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_WIRE_SESSION_H_
