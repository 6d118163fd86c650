#include "serving/wire/session.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

namespace dpsr::serving {
namespace {

constexpr size_t kPrefixBytes = 5;      // of a message: whether it is compressed, and its length
constexpr size_t kFrameHeadBytes = 9;   // of each frame (RFC 9113, 4.1)
constexpr size_t kHeaderOverhead = 32;  // bytes that a header counts beyond its name and value (RFC 9113, 10.5.1)
// Headers of this many times the limit end their connection; with less, only the call is refused.
constexpr size_t kHeaderExcess = 4;
constexpr size_t kMostWords = 256;  // bytes of a refused call's details, which may repeat what the client sent

// What the other side may send before it hears from us. What a client's session receives is bounded by the limits alone.
// A server's gives a stream a larger window when its message is admitted; the first one is that of HTTP/2.
constexpr uint32_t kFirstWindow = (1 << 16) - 1;
constexpr uint32_t kStreamWindow = 1 << 24;
constexpr int32_t kConnectionWindow = 1 << 26;
constexpr size_t kMostComing = 1 << 24;  // bytes of the large messages that may come at the same time
constexpr uint32_t kFrameBytes = 1 << 16;

// Frames that carry nothing cost a client credit: pings, settings, priorities, window updates, resets, data in small
// pieces, and data of calls that are over. Calls and answers earn some, and a second earns the rest. A client without
// credit loses its connection. So floods end after a moment, while a client that makes calls never notices.
constexpr double kMostCredit = 10'000;
constexpr double kCreditPerSecond = 1000;
constexpr double kCreditPerCall = 20;
constexpr double kCreditPerDataFrame = 4;
constexpr size_t kSmallData = 1024;
constexpr double kCostOfReset = 2;
constexpr double kCostOfSettings = 50;
// Of each kLateData bytes of calls that are over. A client that has not heard of the end yet sends 16 MB at most.
constexpr int64_t kLateData = 1 << 14;
constexpr double kCostOfLateData = 4;
constexpr double kCostOfOurReset = 10;  // a client can make us reset streams, which then no longer count as open

constexpr char kDrainPing[] = "draining";

bool StartsWith(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

size_t MessageBytes(std::string_view data) {
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<uint8_t>(data[i])); };
  return byte(1) << 24 | byte(2) << 16 | byte(3) << 8 | byte(4);
}

bool IsOneMessage(const std::string& data) {
  return data.size() >= kPrefixBytes && MessageBytes(data) == data.size() - kPrefixBytes;
}

std::string NotOneMessage(size_t bytes) {
  return "expected exactly one message, got " + std::to_string(bytes) + " bytes that are not one";
}

std::string_view ToView(const uint8_t* data, size_t size) {
  return std::string_view(reinterpret_cast<const char*>(data), size);
}

// Only headers that are the same in most calls enter the connection's table of headers. Metadata does not: the table of
// a connection to a server is shared by all clients.
bool IsIndexed(std::string_view name) {
  return StartsWith(name, ":") || name == "te" || name == "content-type" || name == "user-agent" ||
         name == "grpc-status";
}

nghttp2_nv ToNv(std::string_view name, std::string_view value) {
  const auto bytes = [](std::string_view text) {
    return const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(text.data()));
  };
  const uint8_t flags = IsIndexed(name) ? NGHTTP2_NV_FLAG_NONE : NGHTTP2_NV_FLAG_NO_INDEX;
  return {bytes(name), bytes(value), name.size(), value.size(), flags};
}

}  // namespace

struct Session::Stream {
  int32_t id = 0;
  Phase phase = Phase::kHeaders;
  double since = 0;
  size_t charged = 0;

  // What was received.
  size_t header_bytes = 0;
  bool in_trailers = false;  // server: the headers that come now follow the message, and are ignored
  bool ended = false;
  bool refused = false;
  int refusal = -1;  // a code, if the headers so far make the call fail
  std::string refusal_details;
  size_t announced = 0;   // bytes of a message that is too large for the first window, with its prefix
  bool admitted = false;  // server: it may send more than the first window
  size_t unread = 0;      // server: bytes that were received and not given back to its window
  bool is_streaming = false;
  bool answered = false;  // streaming: its owner, or this class, has ended it
  std::string method, content_type, path, encoding, accepted, timeout;
  bool has_timeout = false;
  double timeout_s = -1;
  std::vector<Header> initial, block;
  int http_status = 0;
  int block_status = 0;
  int code = -1;
  std::string details;
  std::string data;

  // What is sent.
  char prefix[kPrefixBytes] = {};
  Message message;
  std::string pushed;     // streaming: messages with their prefixes
  bool has_head = false;  // streaming: whether the answer's headers are on their way
  size_t size = 0;        // of prefix and message, or of `pushed`
  size_t sent = 0;
  bool sent_all = false;
  bool reset = false;
  std::vector<Header> trailers;  // server: sent after the message

  // Whether the owner of a server's session has the call and has not answered it.
  bool IsOwners() const { return is_streaming ? !answered : phase == Phase::kOwner; }
};

struct Session::Callbacks {
  static Session* Self(void* user_data) { return static_cast<Session*>(user_data); }

  static int Fail(Session* self, uint32_t error) {
    self->failure_ = error;
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  }

  static int OnBeginFrame(nghttp2_session*, const nghttp2_frame_hd* head, void* user_data) {
    Session* self = Self(user_data);
    if (self->role_ == Role::kClient) return 0;
    self->ignored_ -= static_cast<int64_t>(kFrameHeadBytes + head->length);
    double cost = 1;
    if (head->type == NGHTTP2_DATA && (head->length >= kSmallData || head->flags & NGHTTP2_FLAG_END_STREAM)) cost = 0;
    if (head->type == NGHTTP2_RST_STREAM) cost = kCostOfReset;
    if (head->type == NGHTTP2_SETTINGS) cost = kCostOfSettings;
    return self->Spend(cost) ? 0 : Fail(self, NGHTTP2_ENHANCE_YOUR_CALM);
  }

  static int OnBeginHeaders(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    Session* self = Self(user_data);
    const int32_t id = frame->hd.stream_id;
    if (self->role_ == Role::kServer && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
      self->Open(id);
      return 0;
    }
    Stream* stream = self->Find(id);
    if (stream == nullptr) return 0;
    if (self->role_ == Role::kServer) {
      // Only trailers may follow, and they end the stream.
      if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return Fail(self, NGHTTP2_PROTOCOL_ERROR);
      stream->in_trailers = true;
    } else {
      stream->block.clear();
      stream->header_bytes = 0;
      stream->block_status = 0;
    }
    return 0;
  }

  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void* user_data) {
    return Add(Self(user_data), frame->hd.stream_id, ToView(name, name_size), ToView(value, value_size), true);
  }

  static int OnInvalidHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                             const uint8_t* value, size_t value_size, uint8_t, void* user_data) {
    return Add(Self(user_data), frame->hd.stream_id, ToView(name, name_size), ToView(value, value_size), false);
  }

  static int Add(Session* self, int32_t id, std::string_view name, std::string_view value, bool valid) {
    Stream* stream = self->Find(id);
    if (stream == nullptr) return 0;
    self->OnHeader(stream, name, value, valid);
    const bool excess = stream->header_bytes > kHeaderExcess * self->limits_.header_bytes;
    return excess ? Fail(self, NGHTTP2_ENHANCE_YOUR_CALM) : 0;
  }

  static int OnDataChunk(nghttp2_session*, uint8_t, int32_t id, const uint8_t* data, size_t size, void* user_data) {
    Session* self = Self(user_data);
    Stream* stream = self->Find(id);
    if (self->role_ == Role::kClient) {
      if (stream != nullptr) self->OnData(stream, ToView(data, size));
      return 0;
    }
    nghttp2_session_consume_connection(self->session_, size);
    if (stream == nullptr) return 0;
    stream->unread += size;
    self->OnData(stream, ToView(data, size));
    if (stream->is_streaming || stream->admitted) {
      nghttp2_session_consume_stream(self->session_, id, std::exchange(stream->unread, 0));
    }
    return 0;
  }

  static int OnFrame(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    Session* self = Self(user_data);
    Event event{};
    switch (frame->hd.type) {
      case NGHTTP2_HEADERS: {
        Stream* stream = self->Find(frame->hd.stream_id);
        if (stream != nullptr && self->role_ == Role::kServer && !stream->in_trailers) self->OnRequestHeaders(stream);
        if (stream != nullptr && self->role_ == Role::kClient && stream->block_status / 100 != 1) {
          if (stream->block_status != 0) stream->http_status = stream->block_status;
          if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) stream->initial = std::move(stream->block);
        }
        if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) End(self, frame->hd.stream_id);
        return 0;
      }
      case NGHTTP2_DATA:
        if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) End(self, frame->hd.stream_id);
        return 0;
      case NGHTTP2_RST_STREAM:
        // nghttp2 would only ask the client to make no more calls.
        if (self->role_ == Role::kClient || --self->resets_ >= 0) return 0;
        return Fail(self, NGHTTP2_ENHANCE_YOUR_CALM);
      case NGHTTP2_SETTINGS:
        if (frame->hd.flags & NGHTTP2_FLAG_ACK) return 0;
        event.kind = EventKind::kSettings;
        break;
      case NGHTTP2_GOAWAY:
        event.kind = EventKind::kGoAway;
        break;
      case NGHTTP2_PING:
        if ((frame->hd.flags & NGHTTP2_FLAG_ACK) == 0) return 0;
        if (std::memcmp(frame->ping.opaque_data, kDrainPing, sizeof(frame->ping.opaque_data)) != 0) return 0;
        event.kind = EventKind::kDrained;
        break;
      default:
        return 0;
    }
    self->pending_.push_back(std::move(event));
    return 0;
  }

  static void End(Session* self, int32_t id) {
    if (Stream* stream = self->Find(id)) self->OnEnd(stream);
  }

  // A call beyond the limit of streams costs its client credit at once, not when its reset is sent: thousands of them may
  // come before that.
  static int OnInvalidFrame(nghttp2_session*, const nghttp2_frame*, int error, void* user_data) {
    Session* self = Self(user_data);
    if (self->role_ == Role::kClient || error != NGHTTP2_ERR_REFUSED_STREAM || self->Spend(kCostOfOurReset)) return 0;
    return Fail(self, NGHTTP2_ENHANCE_YOUR_CALM);
  }

  static int OnStreamClose(nghttp2_session*, int32_t id, uint32_t error, void* user_data) {
    Session* self = Self(user_data);
    Stream* stream = self->Find(id);
    if (stream == nullptr) return 0;
    const auto is_call = [id](const Event& event) { return event.kind == EventKind::kCall && event.stream == id; };
    const auto call = std::find_if(self->pending_.begin(), self->pending_.end(), is_call);
    if (call != self->pending_.end()) {
      self->pending_.erase(call);  // the owner never hears of a call that is given up at once
    } else if (self->role_ == Role::kClient || stream->IsOwners()) {
      Event event{};
      event.kind = EventKind::kEnd;
      event.stream = id;
      event.error = error;
      self->pending_.push_back(std::move(event));
    }
    self->Close(stream);
    return 0;
  }

  static int OnFrameSent(nghttp2_session* session, const nghttp2_frame* frame, void* user_data) {
    Session* self = Self(user_data);
    if (self->role_ == Role::kClient) return 0;
    if (frame->hd.type == NGHTTP2_DATA) {
      self->credit_ = std::min(kMostCredit, self->credit_ + kCreditPerDataFrame);
    } else if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code == NGHTTP2_FLOW_CONTROL_ERROR) {
      // The client sends more than its windows allow. What breaks this rule once does it again on the next stream.
      self->Terminate(NGHTTP2_FLOW_CONTROL_ERROR);
    } else if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code != NGHTTP2_NO_ERROR &&
               frame->rst_stream.error_code != NGHTTP2_REFUSED_STREAM) {
      self->credit_ -= kCostOfOurReset;
    } else if (frame->hd.type == NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
      // The call is answered; what the client still wants to send of it is not needed (RFC 9113, 8.1).
      const Stream* stream = self->Find(frame->hd.stream_id);
      if (stream != nullptr && !stream->ended) {
        nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
      }
    }
    return 0;
  }

  static int OnFrameNotSent(nghttp2_session* session, const nghttp2_frame* frame, int error, void* user_data) {
    Session* self = Self(user_data);
    if (frame->hd.type != NGHTTP2_HEADERS) return 0;
    Stream* stream = self->Find(frame->hd.stream_id);
    if (stream == nullptr) return 0;
    if (self->role_ == Role::kServer) {
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_INTERNAL_ERROR);
      return 0;
    }
    return OnStreamClose(
        session, stream->id,
        error == NGHTTP2_ERR_START_STREAM_NOT_ALLOWED ? NGHTTP2_REFUSED_STREAM : NGHTTP2_INTERNAL_ERROR, user_data);
  }

  static ssize_t Send(nghttp2_session*, const uint8_t* data, size_t size, int, void* user_data) {
    Session* self = Self(user_data);
    if (self->out_.size() >= self->most_) return NGHTTP2_ERR_WOULDBLOCK;
    self->out_.append(reinterpret_cast<const char*>(data), size);
    return static_cast<ssize_t>(size);
  }

  // Says how much data of a stream the next frame holds; SendData() copies it.
  static ssize_t ReadData(nghttp2_session* session, int32_t id, uint8_t*, size_t size, uint32_t* flags,
                          nghttp2_data_source*, void* user_data) {
    Session* self = Self(user_data);
    Stream* stream = self->Find(id);
    if (stream == nullptr) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    const size_t count = std::min(size, stream->size - stream->sent);
    const bool may_grow = stream->is_streaming && !stream->answered;
    if (count == 0 && may_grow) return NGHTTP2_ERR_DEFERRED;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (stream->sent + count == stream->size && !may_grow) {
      *flags |= NGHTTP2_DATA_FLAG_EOF;
      stream->sent_all = true;
      if (!stream->trailers.empty()) {
        *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
        std::vector<nghttp2_nv> values;
        for (const Header& header : stream->trailers) values.push_back(ToNv(header.name, header.value));
        nghttp2_submit_trailer(session, id, values.data(), values.size());
        stream->trailers.clear();
      }
    }
    return static_cast<ssize_t>(count);
  }

  static int SendData(nghttp2_session*, nghttp2_frame* frame, const uint8_t* head, size_t size, nghttp2_data_source*,
                      void* user_data) {
    Session* self = Self(user_data);
    if (self->out_.size() >= self->most_) return NGHTTP2_ERR_WOULDBLOCK;
    Stream* stream = self->Find(frame->hd.stream_id);
    if (stream == nullptr) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    self->out_.append(reinterpret_cast<const char*>(head), 9);
    if (stream->is_streaming) {
      self->out_.append(stream->pushed, stream->sent, size);
      stream->sent += size;
      if (stream->sent == stream->size) self->OnAllSent(stream);
      return 0;
    }
    if (stream->sent < kPrefixBytes && size > 0) {
      const size_t count = std::min(size, kPrefixBytes - stream->sent);
      self->out_.append(stream->prefix + stream->sent, count);
      stream->sent += count;
      size -= count;
    }
    if (size > 0) self->out_.append(stream->message.data + (stream->sent - kPrefixBytes), size);
    stream->sent += size;
    return 0;
  }

  // The callbacks are the same for all sessions, the options for all of a role.
  static nghttp2_session_callbacks* All() {
    static nghttp2_session_callbacks* const all = [] {
      nghttp2_session_callbacks* made = nullptr;
      nghttp2_session_callbacks_new(&made);
      nghttp2_session_callbacks_set_on_begin_frame_callback(made, OnBeginFrame);
      nghttp2_session_callbacks_set_on_begin_headers_callback(made, OnBeginHeaders);
      nghttp2_session_callbacks_set_on_header_callback(made, OnHeader);
      nghttp2_session_callbacks_set_on_invalid_header_callback(made, OnInvalidHeader);
      nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made, OnDataChunk);
      nghttp2_session_callbacks_set_on_frame_recv_callback(made, OnFrame);
      nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(made, OnInvalidFrame);
      nghttp2_session_callbacks_set_on_stream_close_callback(made, OnStreamClose);
      nghttp2_session_callbacks_set_on_frame_send_callback(made, OnFrameSent);
      nghttp2_session_callbacks_set_on_frame_not_send_callback(made, OnFrameNotSent);
      nghttp2_session_callbacks_set_send_callback(made, Send);
      nghttp2_session_callbacks_set_send_data_callback(made, SendData);
      return made;
    }();
    return all;
  }

  static nghttp2_option* Options(Role role) {
    static nghttp2_option* const client = MakeOptions(Role::kClient);
    static nghttp2_option* const server = MakeOptions(Role::kServer);
    return role == Role::kServer ? server : client;
  }

  static nghttp2_option* MakeOptions(Role role) {
    nghttp2_option* made = nullptr;
    nghttp2_option_new(&made);
    nghttp2_option_set_no_closed_streams(made, 1);  // they would only serve priorities
    nghttp2_option_set_stream_reset_rate_limit(made, UINT32_MAX, UINT32_MAX);  // OnFrame() has a limit of its own
    nghttp2_option_set_no_auto_window_update(made, role == Role::kServer);
    return made;
  }
};

Session::Session(Role role, const SessionLimits& limits, const Methods* methods, Budget* budget,
                 double now)
    : role_(role),
      limits_(limits),
      methods_(methods),
      budget_(budget),
      now_(now),
      idle_since_(now),
      credit_(kMostCredit),
      resets_(limits.most_resets) {
  const auto make = role == Role::kServer ? nghttp2_session_server_new2 : nghttp2_session_client_new2;
  make(&session_, Callbacks::All(), this, Callbacks::Options(role));
  const auto header_bytes = static_cast<uint32_t>(std::min<size_t>(limits.header_bytes, UINT32_MAX));
  const uint32_t window = role == Role::kServer ? kFirstWindow : kStreamWindow;
  std::vector<nghttp2_settings_entry> settings = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, window},
                                                  {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, kFrameBytes},
                                                  {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, header_bytes}};
  if (role == Role::kServer) {
    settings.push_back({NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits.streams});
  } else {
    settings.push_back({NGHTTP2_SETTINGS_ENABLE_PUSH, 0});
  }
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings.data(), settings.size());
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Session::~Session() {
  nghttp2_session_del(session_);
  SetUnsent(0);
  if (budget_ == nullptr) return;
  budget_->used -= held_;
  for (const auto& entry : streams_) {
    if (entry.second->admitted) budget_->coming -= entry.second->announced;
  }
}

bool Session::Receive(std::string_view data, double now, std::vector<Event>* events) {
  credit_ = std::min(kMostCredit, credit_ + (now - now_) * kCreditPerSecond);
  resets_ = std::min(limits_.most_resets, resets_ + (now - now_) * limits_.resets_per_s);
  now_ = now;
  bool speaks = true;
  if (!ended_) {
    const ssize_t taken =
        nghttp2_session_mem_recv(session_, reinterpret_cast<const uint8_t*>(data.data()), data.size());
    speaks = taken != NGHTTP2_ERR_BAD_CLIENT_MAGIC;
    if (taken == NGHTTP2_ERR_FLOODED) failure_ = NGHTTP2_ENHANCE_YOUR_CALM;
    if (taken < 0 && failure_ == NGHTTP2_NO_ERROR) failure_ = NGHTTP2_INTERNAL_ERROR;
    if (taken < 0) Terminate(failure_);
    // nghttp2 reports all frames but those that it ignores.
    ignored_ += static_cast<int64_t>(data.size());
    if (role_ == Role::kServer && ignored_ >= kLateData) {
      const int64_t times = ignored_ / kLateData;
      ignored_ -= times * kLateData;
      if (!Spend(kCostOfLateData * static_cast<double>(times))) Terminate(NGHTTP2_ENHANCE_YOUR_CALM);
    }
    AdmitWaiting();
  }
  TakeEvents(events);
  return speaks;
}

void Session::TakeEvents(std::vector<Event>* events) {
  std::move(pending_.begin(), pending_.end(), std::back_inserter(*events));
  pending_.clear();
}

const std::string& Session::Send(size_t most) {
  out_.clear();
  most_ = most;
  if (nghttp2_session_send(session_) != 0) ended_ = broken_ = true;
  return out_;
}

bool Session::Hold(int32_t id, size_t bytes) {
  Stream* stream = Find(id);
  if (stream == nullptr || !MayCharge(*stream, bytes)) return false;
  Charge(stream, bytes);
  return true;
}

bool Session::Push(int32_t id, std::string_view message) {
  Stream* stream = Find(id);
  if (stream == nullptr || !stream->is_streaming || stream->answered) return false;
  const size_t bytes = kPrefixBytes + message.size();
  // Unlike a unary call, this one must not hold everything, because it may last for ever.
  if (held_ + bytes > limits_.connection_bytes) {
    BreakStreaming(stream, kGrpcResourceExhausted, HoldsTooMuch());
    return false;
  }
  Charge(stream, bytes);
  stream->pushed += '\0';
  for (const int shift : {24, 16, 8, 0}) {
    stream->pushed += static_cast<char>(static_cast<uint8_t>(message.size() >> shift));
  }
  stream->pushed += message;
  stream->size = stream->pushed.size();
  if (!stream->has_head) {
    stream->has_head = true;
    SubmitAnswer(stream, {{":status", "200"}, {"content-type", "application/grpc"}}, true);
  } else {
    if (stream->phase == Phase::kOwner) SetPhase(stream, Phase::kAnswer);
    nghttp2_session_resume_data(session_, id);
  }
  return true;
}

bool Session::Answer(int32_t id, int code, std::string_view details, const std::vector<Header>& initial,
                     Message message, std::vector<Header> trailing) {
  Stream* stream = Find(id);
  if (stream != nullptr && stream->is_streaming && !stream->answered) {
    EndStreaming(stream, code, details, std::move(trailing));
    return true;
  }
  if (stream == nullptr || stream->phase != Phase::kOwner) return false;
  if (code == 0 && !MayCharge(*stream, message.size)) {
    Refuse(stream, kGrpcResourceExhausted, HoldsTooMuch());
    return true;
  }
  std::vector<Header> status = {{"grpc-status", std::to_string(code)}};
  if (!details.empty()) status.push_back({"grpc-message", EscapeMessage(details)});
  std::move(trailing.begin(), trailing.end(), std::back_inserter(status));
  std::vector<Header> head = {{":status", "200"}, {"content-type", "application/grpc"}};
  if (code != 0 && initial.empty()) {
    std::move(status.begin(), status.end(), std::back_inserter(head));
    SubmitAnswer(stream, head, false);
    return true;
  }
  if (code == 0 && !message.encoding.empty()) head.push_back({"grpc-encoding", message.encoding});
  head.insert(head.end(), initial.begin(), initial.end());
  stream->trailers = std::move(status);
  if (code == 0) {
    Charge(stream, message.size);
    SetMessage(stream, std::move(message));
  }
  SubmitAnswer(stream, head, true);
  return true;
}

int32_t Session::Call(std::string_view path, std::string_view authority, bool tls, double timeout_s,
                      const std::vector<Header>& metadata, Message message) {
  std::vector<nghttp2_nv> values = {ToNv(":method", "POST"),
                                    ToNv(":scheme", tls ? "https" : "http"),
                                    ToNv(":path", path),
                                    ToNv(":authority", authority),
                                    ToNv("te", "trailers"),
                                    ToNv("content-type", "application/grpc"),
                                    ToNv("user-agent", "dpsr-proxy")};
  std::string timeout;
  if (timeout_s >= 0) {
    timeout = FormatTimeout(timeout_s);
    values.push_back(ToNv("grpc-timeout", timeout));
  }
  for (const Header& header : metadata) values.push_back(ToNv(header.name, header.value));
  nghttp2_data_provider provider = {};
  provider.read_callback = Callbacks::ReadData;
  const int32_t id = nghttp2_submit_request(session_, nullptr, values.data(), values.size(), &provider, nullptr);
  if (id < 0) return id;
  Stream* stream = Open(id);
  SetMessage(stream, std::move(message));
  return id;
}

void Session::Reset(int32_t id, uint32_t error) {
  nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, id, error);
  if (Stream* stream = Find(id)) Close(stream);
}

void Session::Drain() {
  nghttp2_submit_shutdown_notice(session_);
  nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, reinterpret_cast<const uint8_t*>(kDrainPing));
}

void Session::Settle() {
  nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session_),
                        NGHTTP2_NO_ERROR, nullptr, 0);
}

void Session::Terminate(uint32_t error) {
  if (ended_) return;
  ended_ = true;
  failed_ = error != NGHTTP2_NO_ERROR;
  nghttp2_session_terminate_session(session_, error);
}

void Session::Expire(double now) {
  now_ = std::max(now, now_);
  if (role_ == Role::kClient) return;
  for (auto& entry : streams_) {
    Stream* stream = entry.second.get();
    const double age = now - stream->since;
    if (stream->phase == Phase::kHeaders && age > limits_.headers_s) Terminate(NGHTTP2_ENHANCE_YOUR_CALM);
    if (stream->phase == Phase::kBody && age > limits_.body_s) {
      Refuse(stream, kGrpcDeadlineExceeded,
             "the message was not complete after " + std::to_string(static_cast<int64_t>(limits_.body_s)) + " s");
    } else if (stream->phase == Phase::kAnswer && age > limits_.answer_s && !stream->reset) {
      stream->reset = true;
      nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_CANCEL);
    }
  }
  AdmitWaiting();  // other connections may have made room
}

void Session::SetUnsent(size_t bytes) {
  if (budget_ != nullptr) budget_->used += bytes - unsent_;
  unsent_ = bytes;
}

bool Session::is_stalled() const {
  for (const auto& entry : streams_) {
    if (entry.second->phase != Phase::kOwner && now_ - entry.second->since > 1) return true;
  }
  return false;
}

Session::Stream* Session::Find(int32_t id) {
  const auto found = streams_.find(id);
  return found == streams_.end() ? nullptr : found->second.get();
}

Session::Stream* Session::Open(int32_t id) {
  auto made = std::make_unique<Stream>();
  made->id = id;
  made->since = now_;
  Stream* stream = made.get();
  streams_[id] = std::move(made);
  return stream;
}

void Session::Close(Stream* stream) {
  held_ -= stream->charged;
  if (budget_ != nullptr) budget_->used -= stream->charged;
  EndAdmission(stream);
  streams_.erase(stream->id);
  if (streams_.empty()) idle_since_ = now_;
}

void Session::Release(Stream* stream, size_t bytes) {
  stream->charged -= bytes;
  held_ -= bytes;
  if (budget_ != nullptr) budget_->used -= bytes;
}

// A client announces a message that needs more than the first window.
void Session::Announce(Stream* stream) {
  stream->announced = kPrefixBytes + MessageBytes(stream->data);
  waiting_.push_back(stream->id);
  AdmitWaiting();
}

// Lets large messages go on. One of each connection always may, so that all of them end if their clients send them.
void Session::AdmitWaiting() {
  for (; !waiting_.empty(); waiting_.pop_front()) {
    Stream* stream = Find(waiting_.front());
    if (stream == nullptr || stream->refused || stream->ended) continue;
    const size_t coming = budget_ == nullptr ? 0 : budget_->coming.load();
    if (num_admitted_ > 0 && coming + stream->announced > kMostComing) return;
    Admit(stream);
  }
}

void Session::Admit(Stream* stream) {
  stream->admitted = true;
  ++num_admitted_;
  if (budget_ != nullptr) budget_->coming += stream->announced;
  const size_t window = std::min<size_t>(stream->announced, kStreamWindow);
  stream->data.reserve(window);
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, stream->id, static_cast<int32_t>(window));
  nghttp2_session_consume_stream(session_, stream->id, std::exchange(stream->unread, 0));
}

// A message is complete, or nothing of it is wanted any more.
void Session::EndAdmission(Stream* stream) {
  if (!stream->admitted) return;
  stream->admitted = false;
  --num_admitted_;
  if (budget_ != nullptr) budget_->coming -= stream->announced;
}

// The other side has taken all messages of a streaming call so far.
void Session::OnAllSent(Stream* stream) {
  Release(stream, stream->size);
  stream->pushed.clear();
  stream->size = stream->sent = 0;
  if (!stream->answered) SetPhase(stream, Phase::kOwner);
}

void Session::Charge(Stream* stream, size_t bytes) {
  stream->charged += bytes;
  held_ += bytes;
  if (budget_ != nullptr) budget_->used += bytes;
}

// A single call may hold everything, or a message near the limit could never pass.
bool Session::MayCharge(const Stream& stream, size_t bytes) const {
  return held_ + bytes <= limits_.connection_bytes || held_ == stream.charged;
}

std::string Session::HoldsTooMuch() const {
  return "the calls of this connection hold more than " + std::to_string(limits_.connection_bytes) + " bytes";
}

void Session::SetPhase(Stream* stream, Phase phase) {
  stream->phase = phase;
  stream->since = now_;
}

void Session::SetMessage(Stream* stream, Message message) {
  stream->prefix[0] = message.encoding.empty() ? 0 : 1;
  for (size_t i = 0; i < 4; ++i) {
    stream->prefix[4 - i] = static_cast<char>(static_cast<uint8_t>(message.size >> (8 * i)));
  }
  stream->size = kPrefixBytes + message.size;
  stream->message = std::move(message);
}

bool Session::Spend(double cost) {
  credit_ -= cost;
  return credit_ >= 0;
}

void Session::OnHeader(Stream* stream, std::string_view name, std::string_view value, bool valid) {
  const size_t bytes = name.size() + value.size() + kHeaderOverhead;
  stream->header_bytes += bytes;
  if (stream->in_trailers || stream->refusal >= 0) return;
  if (stream->header_bytes > limits_.header_bytes) {
    stream->refusal = kGrpcResourceExhausted;
    stream->refusal_details = "headers of more than " + std::to_string(limits_.header_bytes) + " bytes";
    stream->initial.clear();
    stream->block.clear();
    return;
  }
  if (role_ == Role::kServer) Charge(stream, bytes);
  if (StartsWith(name, ":")) {
    if (name == ":method") stream->method = value;
    if (name == ":path") stream->path = value;
    if (name == ":status") stream->block_status = std::atoi(std::string(value).c_str());
  } else if (name == "content-type") {
    stream->content_type = value;
  } else if (name == "grpc-encoding") {
    stream->encoding = value;
  } else if (role_ == Role::kServer && name == "grpc-accept-encoding") {
    stream->accepted = value;
  } else if (name == "grpc-timeout") {
    stream->has_timeout = true;
    stream->timeout = value;
  } else if (role_ == Role::kClient && name == "grpc-status") {
    const std::string text(value.substr(0, 4));
    const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
    const int code = digits ? std::atoi(text.c_str()) : kGrpcUnknown;
    stream->code = code > kMaxGrpcCode ? kGrpcUnknown : code;
  } else if (role_ == Role::kClient && name == "grpc-message") {
    stream->details = UnescapeMessage(value);
  } else if (!valid || (!IsHopHeader(name) && !IsMetadata(name, value))) {
    // A server's header that a client may not have is left out; a client's makes its call fail.
    if (role_ == Role::kClient) return;
    stream->refusal = kGrpcInvalidArgument;
    stream->refusal_details = "the header '" + std::string(name.substr(0, 64)) +
                              "' has a name or a value that gRPC does not allow in metadata";
  } else if (!IsHopHeader(name)) {
    (role_ == Role::kServer ? stream->initial : stream->block).push_back({std::string(name), std::string(value)});
  }
}

void Session::OnRequestHeaders(Stream* stream) {
  SetPhase(stream, Phase::kBody);
  double timeout_s = -1;
  if (stream->method != "POST") {
    SubmitRefusal(stream, {{":status", "405"}, {"allow", "POST"}});
  } else if (stream->refusal >= 0) {
    Refuse(stream, stream->refusal, stream->refusal_details);
  } else if (!StartsWith(stream->content_type, "application/grpc")) {
    SubmitRefusal(stream, {{":status", "415"}});
  } else if (stream->has_timeout && !ParseTimeout(stream->timeout, &timeout_s)) {
    Refuse(stream, kGrpcInternal, "cannot parse the header grpc-timeout: '" + stream->timeout + "'");
  } else if (methods_ != nullptr) {
    const auto found = methods_->find(stream->path);
    if (found == methods_->end()) {
      Refuse(stream, kGrpcUnimplemented, "Method not found: " + stream->path);
    } else {
      stream->is_streaming = found->second == MethodKind::kStreaming;
    }
  }
  stream->timeout_s = timeout_s;
  if (!stream->is_streaming) return;
  Event event{};
  event.kind = EventKind::kCall;
  event.stream = stream->id;
  event.path = std::move(stream->path);
  event.timeout_s = timeout_s;
  event.metadata = std::move(stream->initial);
  SetPhase(stream, Phase::kOwner);
  credit_ = std::min(kMostCredit, credit_ + kCreditPerCall);
  pending_.push_back(std::move(event));
}

void Session::OnData(Stream* stream, std::string_view data) {
  if (stream->refused || stream->ended) return;
  if (stream->is_streaming) {
    OnStreamingData(stream, data);
    return;
  }
  stream->data.append(data);
  // A client is refused before it has sent all that its message is going to hold.
  const bool is_announced = role_ == Role::kServer && stream->data.size() >= kPrefixBytes;
  const bool is_large = stream->data.size() > limits_.message_bytes + kPrefixBytes ||
                        (is_announced && MessageBytes(stream->data) > limits_.message_bytes);
  if (is_large) {
    const std::string words = "a message of more than " + std::to_string(limits_.message_bytes) + " bytes";
    if (role_ == Role::kServer) {
      Refuse(stream, kGrpcResourceExhausted, words);
    } else {
      Event event{};
      event.kind = EventKind::kAnswer;
      event.stream = stream->id;
      event.code = kGrpcResourceExhausted;
      event.details = words;
      pending_.push_back(std::move(event));
      Reset(stream->id, NGHTTP2_CANCEL);
    }
    return;
  }
  if (role_ == Role::kClient) return;
  if (is_announced && stream->announced == 0 && MessageBytes(stream->data) + kPrefixBytes > kFirstWindow) {
    Announce(stream);
  }
  // Without this, a message that goes on beyond its announced end could grow up to the limit.
  if (is_announced && stream->data.size() > MessageBytes(stream->data) + kPrefixBytes) {
    Refuse(stream, kGrpcInternal, NotOneMessage(stream->data.size()));
    return;
  }
  if (!MayCharge(*stream, data.size())) {
    Refuse(stream, kGrpcResourceExhausted, HoldsTooMuch());
    return;
  }
  Charge(stream, data.size());
}

void Session::OnStreamingData(Stream* stream, std::string_view data) {
  if (stream->answered) return;
  if (held_ + data.size() > limits_.connection_bytes) {
    BreakStreaming(stream, kGrpcResourceExhausted, HoldsTooMuch());
    return;
  }
  Charge(stream, data.size());
  stream->data.append(data);
  size_t begin = 0;  // of the first message that was not reported
  while (stream->data.size() - begin >= kPrefixBytes) {
    const std::string_view rest = std::string_view(stream->data).substr(begin);
    const size_t bytes = MessageBytes(rest);
    if (rest[0] != 0) {
      BreakStreaming(stream, kGrpcUnimplemented, "messages of a streaming method must not be compressed");
      return;
    }
    if (bytes > limits_.message_bytes) {
      BreakStreaming(stream, kGrpcResourceExhausted,
                     "a message of more than " + std::to_string(limits_.message_bytes) + " bytes");
      return;
    }
    if (rest.size() < kPrefixBytes + bytes) break;
    Report(EventKind::kMessage, stream->id, std::string(rest.substr(0, kPrefixBytes + bytes)));
    begin += kPrefixBytes + bytes;
  }
  stream->data.erase(0, begin);
}

void Session::Report(EventKind kind, int32_t id, std::string data) {
  Event event{};
  event.kind = kind;
  event.stream = id;
  event.has_message = !data.empty();
  event.data = std::move(data);
  pending_.push_back(std::move(event));
}

// Ends a streaming call after the messages that are on their way.
void Session::EndStreaming(Stream* stream, int code, std::string_view details, std::vector<Header> trailing) {
  stream->answered = true;
  stream->data = std::string();
  std::vector<Header> status = {{"grpc-status", std::to_string(code)}};
  if (!details.empty()) status.push_back({"grpc-message", EscapeMessage(details)});
  std::move(trailing.begin(), trailing.end(), std::back_inserter(status));
  if (stream->has_head) {
    stream->trailers = std::move(status);
    SetPhase(stream, Phase::kAnswer);
    nghttp2_session_resume_data(session_, stream->id);
    return;
  }
  std::vector<Header> head = {{":status", "200"}, {"content-type", "application/grpc"}};
  std::move(status.begin(), status.end(), std::back_inserter(head));
  SubmitAnswer(stream, head, false);
}

// Ends a streaming call that breaks a limit, and tells its owner.
void Session::BreakStreaming(Stream* stream, int code, std::string_view details) {
  EndStreaming(stream, code, details.substr(0, kMostWords), {});
  Report(EventKind::kEnd, stream->id, "");
}

void Session::OnEnd(Stream* stream) {
  stream->ended = true;
  EndAdmission(stream);
  if (stream->refused) return;
  if (stream->is_streaming) {
    if (stream->answered) return;
    if (stream->data.empty()) {
      Report(EventKind::kHalfClose, stream->id, "");
    } else {
      BreakStreaming(stream, kGrpcInternal, "the last message is cut off");
    }
    return;
  }
  Event event{};
  event.stream = stream->id;
  event.has_message = IsOneMessage(stream->data);
  const bool is_compressed = event.has_message && stream->data[0] != 0;
  if (role_ == Role::kServer) {
    if (!event.has_message) {
      Refuse(stream, kGrpcInternal, NotOneMessage(stream->data.size()));
      return;
    }
    event.kind = EventKind::kCall;
    event.path = std::move(stream->path);
    if (is_compressed) event.encoding = stream->encoding.empty() ? "identity" : stream->encoding;
    event.asked = std::move(stream->encoding);
    event.accepted = std::move(stream->accepted);
    event.timeout_s = stream->timeout_s;
    event.metadata = std::move(stream->initial);
    event.data = std::move(stream->data);
    SetPhase(stream, Phase::kOwner);
    credit_ = std::min(kMostCredit, credit_ + kCreditPerCall);
    pending_.push_back(std::move(event));
    return;
  }
  event.kind = EventKind::kAnswer;
  event.has_message = event.has_message && !is_compressed;  // our calls accept no compression
  event.http_status = stream->http_status;
  event.code = stream->refusal >= 0 ? stream->refusal : stream->code;
  event.details = stream->refusal >= 0 ? std::move(stream->refusal_details) : std::move(stream->details);
  event.metadata = std::move(stream->initial);
  event.trailing = std::move(stream->block);
  event.data = std::move(stream->data);
  pending_.push_back(std::move(event));
  if (stream->sent_all) {
    Close(stream);
  } else {
    Reset(stream->id, NGHTTP2_CANCEL);  // the server has answered without reading all
  }
}

void Session::Refuse(Stream* stream, int code, std::string_view details) {
  SubmitRefusal(stream, {{":status", "200"},
                         {"content-type", "application/grpc"},
                         {"grpc-status", std::to_string(code)},
                         {"grpc-message", EscapeMessage(details.substr(0, kMostWords))}});
}

void Session::SubmitRefusal(Stream* stream, const std::vector<Header>& head) {
  stream->refused = true;
  EndAdmission(stream);
  stream->data = std::string();
  stream->initial.clear();
  SubmitAnswer(stream, head, false);
}

void Session::SubmitAnswer(Stream* stream, const std::vector<Header>& head, bool with_data) {
  SetPhase(stream, Phase::kAnswer);
  std::vector<nghttp2_nv> values;
  for (const Header& header : head) values.push_back(ToNv(header.name, header.value));
  nghttp2_data_provider provider = {};
  provider.read_callback = Callbacks::ReadData;
  nghttp2_submit_response(session_, stream->id, values.data(), values.size(), with_data ? &provider : nullptr);
}

}  // namespace dpsr::serving
