#include "serving/wire/session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dpsr::serving {
namespace {

constexpr char kPath[] = "/s/Predict";
constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

constexpr char kWatch[] = "/s/Watch";

const Methods& ServerMethods() {
  static const auto* const methods =
      new Methods{{kPath, MethodKind::kUnary}, {kWatch, MethodKind::kStreaming}};
  return *methods;
}

Message MessageOf(const std::string& text) {
  auto owner = std::make_shared<std::string>(text);
  return {owner->data(), owner->size(), owner};
}

std::string Frame(int type, int flags, uint32_t stream, const std::string& payload) {
  std::string out;
  for (const int shift : {16, 8, 0}) out += static_cast<char>(payload.size() >> shift);
  out += static_cast<char>(type);
  out += static_cast<char>(flags);
  for (const int shift : {24, 16, 8, 0}) out += static_cast<char>(stream >> shift);
  return out + payload;
}

std::string Number(uint32_t value) {
  std::string out;
  for (const int shift : {24, 16, 8, 0}) out += static_cast<char>(value >> shift);
  return out;
}

std::string Literal(const std::string& name, const std::string& value) {
  return std::string("\0", 1) + static_cast<char>(name.size()) + name + static_cast<char>(value.size()) + value;
}

std::string Head(const std::string& path = kPath) {
  return "\x83\x86" + Literal(":path", path) + Literal(":authority", "x") + Literal("te", "trailers") +
         Literal("content-type", "application/grpc");
}

std::string Framed(const std::string& message) {
  return std::string("\0", 1) + Number(static_cast<uint32_t>(message.size())) + message;
}

// A server's session that receives the bytes of a client.
class Server {
 public:
  explicit Server(const SessionLimits& limits = SessionLimits())
      : session(Session::Role::kServer, limits, &ServerMethods(), &budget, 0) {
    Receive(std::string(kPreface) + Frame(NGHTTP2_SETTINGS, 0, 0, ""));
  }

  bool Receive(const std::string& bytes, double now = 0) { return session.Receive(bytes, now, &events); }

  // Sends all that can be sent now.
  std::string Send() {
    std::string all;
    for (;;) {
      const std::string& some = session.Send(1 << 16);
      if (some.empty()) return all;
      all += some;
    }
  }

  void Call(uint32_t stream, const std::string& message = "m", const std::string& head = Head()) {
    Receive(Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, stream, head) +
            Frame(NGHTTP2_DATA, NGHTTP2_FLAG_END_STREAM, stream, Framed(message)));
  }

  size_t CountCalls() const {
    return static_cast<size_t>(std::count_if(events.begin(), events.end(),
                                             [](const Event& event) { return event.kind == EventKind::kCall; }));
  }

  Budget budget;
  std::vector<Event> events;
  Session session;
};

// A client and a server that are connected.
struct Pair {
  explicit Pair(const SessionLimits& limits = SessionLimits())
      : server(Session::Role::kServer, limits, &ServerMethods(), &budget, 0),
        client(Session::Role::kClient, SessionLimits(), nullptr, nullptr, 0) {}

  // Moves bytes until none are left.
  void Run() {
    for (bool moved = true; moved;) {
      moved = false;
      const std::string up = client.Send(1 << 14);
      if (!up.empty()) moved = server.Receive(up, 0, &calls);
      const std::string down = server.Send(1 << 14);
      if (!down.empty()) moved = client.Receive(down, 0, &answers);
    }
  }

  int32_t Call(const std::string& message, std::vector<Header> metadata = {}, const std::string& path = kPath) {
    return client.Call(path, "x", false, 2.5, metadata, MessageOf(message));
  }

  const Event& Answer() {
    for (const Event& event : answers) {
      if (event.kind == EventKind::kAnswer) return event;
    }
    static const Event none{};
    return none;
  }

  Budget budget;
  std::vector<Event> calls, answers;
  Session server, client;
};

TEST(SessionTest, ACallAndItsAnswerPass) {
  Pair pair;
  const int32_t stream = pair.Call("question", {{"user-id", "u1"}, {"grpclb_client_stats", "x"}});
  pair.Run();
  ASSERT_EQ(pair.calls.size(), 2u);  // settings, call
  const Event& call = pair.calls[1];
  EXPECT_EQ(call.kind, EventKind::kCall);
  EXPECT_EQ(call.path, kPath);
  EXPECT_EQ(call.data.substr(5), "question");
  EXPECT_DOUBLE_EQ(call.timeout_s, 2.5);
  ASSERT_EQ(call.metadata.size(), 1u);  // what only gRPC's libraries may send goes no further
  EXPECT_EQ(call.metadata[0].name, "user-id");
  ASSERT_TRUE(pair.server.Answer(call.stream, 0, "", {{"a", "1"}}, MessageOf("answer"), {{"b", "2"}}));
  pair.Run();
  const Event& answer = pair.Answer();
  EXPECT_EQ(answer.stream, stream);
  EXPECT_EQ(answer.code, 0);
  EXPECT_EQ(answer.data.substr(5), "answer");
  EXPECT_EQ(answer.metadata.at(0).value, "1");
  EXPECT_EQ(answer.trailing.at(0).value, "2");
  EXPECT_EQ(pair.server.num_streams(), 0u);
  EXPECT_EQ(pair.budget.used, 0u);
  EXPECT_FALSE(pair.server.Answer(call.stream, 0, "", {}, Message(), {}));
}

TEST(SessionTest, LargeMessagesPassThroughWindows) {
  Pair pair;
  std::string text(20'000'000, 'x');
  text[12'345'678] = 'y';
  pair.Call(text);
  pair.Run();
  ASSERT_EQ(pair.calls.size(), 2u);
  EXPECT_TRUE(pair.calls[1].data.substr(5) == text);
  EXPECT_GE(pair.budget.used, text.size());
  pair.server.Answer(pair.calls[1].stream, 0, "", {}, MessageOf(text.substr(0, 12'400'000)), {});
  pair.Run();
  EXPECT_TRUE(pair.Answer().data.substr(5) == text.substr(0, 12'400'000));
  EXPECT_EQ(pair.budget.used, 0u);
}

// Returns how far the windows were opened, by stream, in bytes that a server has sent.
std::map<uint32_t, size_t> WindowUpdates(const std::string& sent) {
  const auto number = [&](size_t begin, size_t size) {
    size_t value = 0;
    for (size_t i = begin; i < begin + size; ++i) value = value << 8 | static_cast<uint8_t>(sent[i]);
    return value;
  };
  std::map<uint32_t, size_t> updates;
  for (size_t at = 0; at + 9 <= sent.size(); at += 9 + number(at, 3)) {
    if (sent[at + 3] == NGHTTP2_WINDOW_UPDATE) updates[static_cast<uint32_t>(number(at + 5, 4))] += number(at + 9, 4);
  }
  return updates;
}

// Begins a message of `size` bytes, and sends `sent` bytes of it.
std::string Begin(uint32_t stream, size_t size, size_t sent) {
  std::string frames = Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, stream, Head());
  frames += Frame(NGHTTP2_DATA, 0, stream, std::string("\0", 1) + Number(static_cast<uint32_t>(size)));
  for (; sent > 0; sent -= std::min<size_t>(sent, 16'000)) {
    frames += Frame(NGHTTP2_DATA, 0, stream, std::string(std::min<size_t>(sent, 16'000), 'x'));
  }
  return frames;
}

TEST(SessionTest, LargeMessagesOfAConnectionWaitForEachOther) {
  constexpr size_t kSize = 6 << 20;  // two of them may come at the same time
  constexpr size_t kFirst = 65'535;
  Server server;
  server.Send();
  for (const uint32_t stream : {1, 3, 5, 7}) server.Receive(Begin(stream, kSize, 60'000));
  server.Receive(Begin(9, 60'000, 60'000));  // needs no more than it has
  auto updates = WindowUpdates(server.Send());
  EXPECT_EQ(updates[1], kSize + 5 - kFirst);
  EXPECT_EQ(updates[3], kSize + 5 - kFirst);
  EXPECT_EQ(updates.size(), 2u);
  EXPECT_EQ(server.budget.coming, 2 * (kSize + 5));
  // One that is given up and one that is complete make room.
  server.Receive(Frame(NGHTTP2_RST_STREAM, 0, 1, Number(NGHTTP2_CANCEL)));
  updates = WindowUpdates(server.Send());
  EXPECT_EQ(updates[5], kSize + 5 - kFirst);
  EXPECT_EQ(updates.size(), 1u);
  for (size_t sent = 60'000; sent < kSize; sent += 16'000) {
    const size_t left = std::min<size_t>(16'000, kSize - sent);
    server.Receive(Frame(NGHTTP2_DATA, left < 16'000 ? NGHTTP2_FLAG_END_STREAM : 0, 3, std::string(left, 'x')));
  }
  EXPECT_EQ(server.CountCalls(), 1u);
  EXPECT_EQ(server.events.back().data.size(), kSize + 5);
  updates = WindowUpdates(server.Send());
  EXPECT_EQ(updates[7], kSize + 5 - kFirst);
  // What a client sends beyond its windows is not held, and ends its connection.
  for (int i = 0; i < 1000; ++i) server.Receive(Frame(NGHTTP2_DATA, 0, 9, std::string(16'000, 'x')));
  EXPECT_LT(server.session.held(), kSize + 1'000'000);
  server.Send();
  EXPECT_TRUE(server.session.finished());
}

TEST(SessionTest, DataOfCallsThatAreOverIsReadForAWhile) {
  Server server;
  const std::string late = Frame(NGHTTP2_DATA, 0, 1, std::string(16'000, 'x'));
  const auto send = [&](int frames) {
    for (int i = 0; i < frames; ++i) server.Receive(late);
    server.Send();
  };
  server.Receive(Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head("/s/Nothing")));
  server.Send();
  send(1000);  // a client that has not heard of the end sends no more than 16 MB
  server.Call(3);
  EXPECT_EQ(server.CountCalls(), 1u);
  send(2000);
  EXPECT_TRUE(server.session.finished());
}

TEST(SessionTest, OneLargeMessageOfEachConnectionGoesOn) {
  constexpr size_t kSize = 12 << 20;
  Budget budget;
  std::vector<Event> events;
  Session first(Session::Role::kServer, SessionLimits(), &ServerMethods(), &budget, 0);
  auto second =
      std::make_unique<Session>(Session::Role::kServer, SessionLimits(), &ServerMethods(), &budget, 0);
  const std::string hello = std::string(kPreface) + Frame(NGHTTP2_SETTINGS, 0, 0, "");
  for (Session* session : {&first, second.get()}) {
    session->Receive(hello, 0, &events);
    session->Send(1 << 16);
    session->Receive(Begin(1, kSize, 100) + Begin(3, kSize, 100), 0, &events);
    const auto updates = WindowUpdates(session->Send(1 << 16));
    EXPECT_EQ(updates.count(1), 1u);
    EXPECT_EQ(updates.count(3), 0u);
  }
  EXPECT_EQ(budget.coming, 2 * (kSize + 5));
  // Where another connection makes room, the next look at the time limits finds it.
  first.Receive(Frame(NGHTTP2_RST_STREAM, 0, 1, Number(NGHTTP2_CANCEL)), 0, &events);
  EXPECT_EQ(WindowUpdates(first.Send(1 << 16)).count(3), 1u);
  first.Receive(Begin(5, 1 << 20, 100), 0, &events);
  EXPECT_EQ(WindowUpdates(first.Send(1 << 16)).count(5), 0u);
  second.reset();
  first.Expire(1);
  EXPECT_EQ(WindowUpdates(first.Send(1 << 16)).count(5), 1u);
  EXPECT_EQ(budget.coming, kSize + 5 + (1 << 20) + 5);
}

TEST(SessionTest, ManyLargeMessagesPass) {
  Pair pair;
  std::vector<std::string> texts;
  for (int i = 0; i < 12; ++i) texts.push_back(std::string(5'000'000 + i, static_cast<char>('a' + i)));
  for (const std::string& text : texts) pair.Call(text);
  pair.Run();
  // The connection may hold less than all of them. Those that do not fit are answered.
  const auto is_call = [](const Event& event) { return event.kind == EventKind::kCall; };
  const auto calls = std::count_if(pair.calls.begin(), pair.calls.end(), is_call);
  EXPECT_GE(calls, 6);
  EXPECT_EQ(static_cast<size_t>(calls) + pair.answers.size() - 1, texts.size());
  for (const Event& event : pair.calls) {
    if (!is_call(event)) continue;
    EXPECT_TRUE(event.data.substr(5) == texts[static_cast<size_t>(event.data[5] - 'a')]);
  }
  EXPECT_EQ(pair.budget.coming, 0u);
}

TEST(SessionTest, ErrorsKeepTheirDetails) {
  Pair pair;
  pair.Call("q");
  pair.Run();
  pair.server.Answer(pair.calls[1].stream, 5, "no \xC3\xA9 100%", {}, Message(), {{"b", "2"}});
  pair.Run();
  EXPECT_EQ(pair.Answer().code, 5);
  EXPECT_EQ(pair.Answer().details, "no \xC3\xA9 100%");
  EXPECT_EQ(pair.Answer().trailing.at(0).value, "2");
  EXPECT_FALSE(pair.Answer().has_message);
}

TEST(SessionTest, UnknownMethodsAreRefused) {
  Pair pair;
  pair.Call("q", {}, "/s/Nothing");
  pair.Run();
  EXPECT_EQ(pair.Answer().code, kGrpcUnimplemented);
  EXPECT_EQ(pair.calls.size(), 1u);
}

TEST(SessionTest, ATooLargeMessageIsRefusedBeforeItsEnd) {
  SessionLimits limits;
  limits.message_bytes = 1000;
  Pair pair(limits);
  pair.Call(std::string(1000, 'x'));
  pair.Call(std::string(1001, 'x'));
  pair.Run();
  EXPECT_EQ(pair.calls.size(), 2u);
  EXPECT_EQ(pair.Answer().code, kGrpcResourceExhausted);

  Server server(limits);
  server.Receive(Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head()) +
                 Frame(NGHTTP2_DATA, 0, 1, std::string("\0", 1) + Number(1 << 30)));
  server.Send();
  EXPECT_EQ(server.session.num_streams(), 0u);  // reset, after its answer
}

TEST(SessionTest, TooManyHeaderBytesAreRefusedAndFarTooManyEndTheConnection) {
  Server server;
  std::string head = Head();
  for (int i = 0; i < 100; ++i) head += Literal("a", std::string(100, 'x'));
  server.Call(1, "m", head);
  server.Call(3);
  EXPECT_EQ(server.CountCalls(), 1u);
  EXPECT_FALSE(server.session.finished());
  for (int i = 0; i < 200; ++i) head += Literal("a", std::string(100, 'x'));
  server.Call(5, "m", head);
  server.Send();
  EXPECT_TRUE(server.session.finished());
}

TEST(SessionTest, HeadersThatGrpcDoesNotAllowAreRefused) {
  const std::pair<const char*, const char*> bad[] = {
      {"a", "b\r\nc: d"}, {"a", "\xC3\xA9"}, {"t-bin", "!"}, {"a", "b\x01"}, {"UPPER", "b"}, {"a b", "c"}};
  Server server;
  uint32_t stream = 1;
  for (const auto& header : bad) {
    server.Call(stream, "m", Head() + Literal(header.first, header.second));
    stream += 2;
  }
  EXPECT_EQ(server.CountCalls(), 0u);
  server.Call(stream);
  EXPECT_EQ(server.CountCalls(), 1u);
}

TEST(SessionTest, AnswersThatAreNotReadAreHeldUpToTheLimit) {
  SessionLimits limits;
  limits.connection_bytes = 100'000;
  Server server(limits);
  server.Receive(Frame(NGHTTP2_SETTINGS, 0, 0, std::string("\0\4", 2) + Number(0)));  // windows of 0 bytes
  for (uint32_t stream = 1; stream < 201; stream += 2) {
    server.Call(stream);
    EXPECT_TRUE(server.session.Answer(static_cast<int32_t>(stream), 0, "", {}, MessageOf(std::string(5000, 'x')), {}));
    server.Send();
    EXPECT_LE(server.session.held(), limits.connection_bytes + 20'000);
  }
  EXPECT_LT(server.session.num_streams(), 25u);  // the others were answered with RESOURCE_EXHAUSTED
  EXPECT_EQ(server.budget.used, server.session.held());
}

TEST(SessionTest, FloodsEndTheConnectionAndLeaveLittleToSend) {
  const std::string opened = Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head());
  const std::string floods[] = {
      Frame(NGHTTP2_PING, 0, 0, "12345678"),
      Frame(NGHTTP2_SETTINGS, 0, 0, std::string("\0\4", 2) + Number(65535)),
      Frame(NGHTTP2_DATA, 0, 1, ""),
      Frame(NGHTTP2_WINDOW_UPDATE, 0, 1, Number(1)),
      Frame(NGHTTP2_PRIORITY, 0, 3, Number(0) + "x"),
  };
  for (const std::string& frame : floods) {
    SCOPED_TRACE(static_cast<int>(frame[3]));
    Server server;
    server.Send();
    server.Receive(opened);
    std::string flood;
    for (int i = 0; i < 20'000; ++i) flood += frame;
    server.Receive(flood);
    EXPECT_LT(server.Send().size(), 100'000u);
    EXPECT_TRUE(server.session.finished());
  }
}

TEST(SessionTest, CallsBeyondTheLimitOfStreamsEndTheConnectionBeforeAllAreRead) {
  Server server;
  server.Send();
  std::string flood;
  for (uint32_t stream = 1; stream < 20'000; stream += 2) {
    flood += Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS | NGHTTP2_FLAG_END_STREAM, stream, Head("/s/Nothing"));
  }
  server.Receive(flood);
  EXPECT_LT(server.Send().size(), 100'000u);
  EXPECT_TRUE(server.session.finished());
}

TEST(SessionTest, CallsThatAreGivenUpAtOnceEndTheConnection) {
  Server server;
  uint32_t stream = 1;
  for (int i = 0; i < 3000; ++i, stream += 2) {
    server.Call(stream);
    server.Receive(Frame(NGHTTP2_RST_STREAM, 0, stream, Number(NGHTTP2_CANCEL)));
    server.Send();
  }
  EXPECT_TRUE(server.session.finished());
  EXPECT_LT(server.CountCalls(), 210u);
}

TEST(SessionTest, OrdinaryCallsNeverLackCredit) {
  Pair pair;
  for (int i = 0; i < 11'000; ++i) {
    pair.calls.clear();
    pair.Call("q");
    pair.Run();
    pair.server.Answer(pair.calls.back().stream, 0, "", {}, MessageOf("a"), {});
    pair.Run();
  }
  EXPECT_FALSE(pair.server.finished());
  EXPECT_EQ(pair.answers.size(), 11'001u);
}

TEST(SessionTest, WhatTakesTooLongEnds) {
  Server server;
  server.Receive(Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head()));
  server.session.Expire(59);
  EXPECT_EQ(server.session.num_streams(), 1u);
  server.session.Expire(61);  // the body
  server.Send();
  EXPECT_EQ(server.session.num_streams(), 0u);

  Server blocked;
  blocked.Receive(Frame(NGHTTP2_SETTINGS, 0, 0, std::string("\0\4", 2) + Number(0)));
  blocked.Call(1);
  blocked.session.Answer(1, 0, "", {}, MessageOf("a"), {});
  blocked.Send();
  EXPECT_EQ(blocked.session.num_streams(), 1u);
  blocked.session.Expire(61);  // the answer
  blocked.Send();
  EXPECT_EQ(blocked.session.num_streams(), 0u);

  Server slow;
  slow.Receive(Frame(NGHTTP2_HEADERS, 0, 1, Head()));
  slow.session.Expire(11);  // the headers
  slow.Send();
  EXPECT_TRUE(slow.session.finished());
}

TEST(SessionTest, ACallThatTheClientGivesUpIsReported) {
  Server server;
  server.Call(1);
  server.Receive(Frame(NGHTTP2_RST_STREAM, 0, 1, Number(NGHTTP2_CANCEL)));
  EXPECT_EQ(server.events.back().kind, EventKind::kEnd);
  EXPECT_EQ(server.events.back().error, NGHTTP2_CANCEL);
  EXPECT_FALSE(server.session.Answer(1, 0, "", {}, Message(), {}));
  EXPECT_EQ(server.budget.used, 0u);
}

TEST(SessionTest, ACallThatIsGivenUpAtOnceIsNotReported) {
  Server server;
  const size_t before = server.events.size();
  server.Receive(Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head()) +
                 Frame(NGHTTP2_DATA, NGHTTP2_FLAG_END_STREAM, 1, Framed("m")) +
                 Frame(NGHTTP2_RST_STREAM, 0, 1, Number(NGHTTP2_CANCEL)));
  EXPECT_EQ(server.events.size(), before);
}

TEST(SessionTest, ADrainedConnectionAnswersWhatItHasAndIgnoresWhatComesLater) {
  Pair pair;
  pair.Call("q");
  pair.Run();
  pair.server.Drain();
  pair.Run();
  EXPECT_EQ(pair.answers.back().kind, EventKind::kGoAway);
  EXPECT_EQ(pair.calls.back().kind, EventKind::kDrained);
  pair.server.Settle();
  pair.server.Answer(pair.calls[1].stream, 0, "", {}, MessageOf("a"), {});
  pair.Run();
  EXPECT_EQ(pair.Answer().code, 0);
  EXPECT_EQ(pair.server.num_streams(), 0u);
}

TEST(SessionTest, BytesThatAreNotHttp2AreNotAnswered) {
  Budget budget;
  Session session(Session::Role::kServer, SessionLimits(), &ServerMethods(), &budget, 0);
  std::vector<Event> events;
  EXPECT_FALSE(session.Receive("GET / HTTP/1.1\r\n\r\n", 0, &events));
}

TEST(SessionTest, AnEndedSessionGivesItsBytesBack) {
  Budget budget;
  {
    Session session(Session::Role::kServer, SessionLimits(), &ServerMethods(), &budget, 0);
    std::vector<Event> events;
    session.Receive(std::string(kPreface) + Frame(NGHTTP2_SETTINGS, 0, 0, "") +
                        Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, Head()) +
                        Frame(NGHTTP2_DATA, 0, 1, Framed("mm").substr(0, 6)),
                    0, &events);
    session.SetUnsent(77);
    EXPECT_GT(budget.used, 77u);
  }
  EXPECT_EQ(budget.used, 0u);
}

// Streaming methods.

std::string Begin(uint32_t stream) { return Frame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, stream, Head(kWatch)); }

size_t CountEvents(const std::vector<Event>& events, EventKind kind) {
  return static_cast<size_t>(
      std::count_if(events.begin(), events.end(), [kind](const Event& event) { return event.kind == kind; }));
}

TEST(SessionTest, AStreamingCallHasMessagesBothWays) {
  Server server;
  server.Receive(Begin(1));
  EXPECT_EQ(server.CountCalls(), 1u);  // before any message
  const std::string both = Framed("one") + Framed("") + Framed("two");
  server.Receive(Frame(NGHTTP2_DATA, 0, 1, both.substr(0, 10)));
  EXPECT_EQ(CountEvents(server.events, EventKind::kMessage), 1u);
  server.Receive(Frame(NGHTTP2_DATA, 0, 1, both.substr(10)));
  ASSERT_EQ(CountEvents(server.events, EventKind::kMessage), 3u);
  EXPECT_EQ(server.events.back().data, Framed("two"));
  EXPECT_TRUE(server.session.Push(1, "a"));
  EXPECT_NE(server.Send().find(Framed("a")), std::string::npos);
  EXPECT_TRUE(server.session.Push(1, "b"));
  EXPECT_TRUE(server.session.Push(1, ""));
  EXPECT_NE(server.Send().find(Framed("b") + Framed("")), std::string::npos);
  EXPECT_EQ(server.Send(), "");
  EXPECT_EQ(CountEvents(server.events, EventKind::kHalfClose), 0u);
  server.Receive(Frame(NGHTTP2_DATA, NGHTTP2_FLAG_END_STREAM, 1, ""));
  EXPECT_EQ(CountEvents(server.events, EventKind::kHalfClose), 1u);
  EXPECT_TRUE(server.session.Answer(1, 0, "", {}, {}, {}));
  EXPECT_FALSE(server.session.Push(1, "late"));
  EXPECT_NE(server.Send(), "");
  EXPECT_EQ(server.session.num_streams(), 0u);
  EXPECT_EQ(server.budget.used, 0u);
}

TEST(SessionTest, AClientGetsTheMessageAndTheStatusOfAStreamingCall) {
  for (const int code : {0, 5}) {
    Pair pair;
    const int32_t stream = pair.Call("q", {}, kWatch);
    pair.Run();
    if (code == 0) {
      EXPECT_TRUE(pair.server.Push(stream, "answer"));
      pair.Run();
    }
    pair.server.Answer(stream, code, "words", {}, {}, {{"t", "2"}});
    pair.Run();
    EXPECT_EQ(pair.Answer().code, code);
    EXPECT_EQ(pair.Answer().details, "words");
    EXPECT_EQ(pair.Answer().data, code == 0 ? Framed("answer") : "");
    ASSERT_EQ(pair.Answer().trailing.size(), 1u);
  }
}

TEST(SessionTest, AStreamingCallThatBreaksARuleEnds) {
  SessionLimits limits;
  limits.message_bytes = 100;
  limits.connection_bytes = 500;
  const std::string compressed = std::string("\1", 1) + Framed("m").substr(1);
  const struct {
    std::string data;
    int flags;
    const char* status;
  } cases[] = {{compressed, 0, "12"},
               {Framed(std::string(101, 'm')).substr(0, 20), 0, "8"},
               {std::string(600, '\0'), 0, "8"},
               {Framed("m").substr(0, 3), NGHTTP2_FLAG_END_STREAM, "13"}};
  for (const auto& one : cases) {
    Server server(limits);
    server.Receive(Begin(1) + Frame(NGHTTP2_DATA, one.flags, 1, one.data));
    EXPECT_EQ(CountEvents(server.events, EventKind::kEnd), 1u) << one.status;
    EXPECT_FALSE(server.session.Push(1, "a"));
    EXPECT_NE(server.Send().find(one.status), std::string::npos);
    server.Receive(Frame(NGHTTP2_DATA, 0, 1, Framed("more")));
    EXPECT_EQ(CountEvents(server.events, EventKind::kEnd), 1u);
    EXPECT_LE(CountEvents(server.events, EventKind::kMessage), 100u);
  }
}

TEST(SessionTest, WhatAClientDoesNotReadOfAStreamingCallIsBounded) {
  SessionLimits limits;
  limits.connection_bytes = 2000;
  Server server(limits);
  server.Receive(Frame(NGHTTP2_SETTINGS, 0, 0, std::string("\0\4\0\0\0\0", 6)) + Begin(1));  // a window of 0
  int pushed = 0;
  while (server.session.Push(1, std::string(100, 'x')) && pushed < 1000) ++pushed;
  EXPECT_GT(pushed, 5);
  EXPECT_LT(pushed, 20);
  EXPECT_TRUE(server.session.has_events());
  server.Send();
  server.session.Expire(61);
  server.Send();
  EXPECT_EQ(server.session.num_streams(), 0u);
  EXPECT_EQ(server.budget.used, 0u);
  // Messages that are read do not add up.
  Server reading(limits);
  reading.Receive(Begin(1));
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(reading.session.Push(1, std::string(10, 'x')));
    reading.Send();
  }
  reading.session.Expire(1000);  // a call that waits may last
  EXPECT_EQ(reading.session.num_streams(), 1u);
}

TEST(SessionTest, TheOwnerHearsOfAStreamingCallThatIsGivenUp) {
  Server server;
  server.Receive(Begin(1));
  server.session.Push(1, "a");
  server.Send();
  server.Receive(Frame(NGHTTP2_RST_STREAM, 0, 1, Number(NGHTTP2_CANCEL)));
  EXPECT_EQ(CountEvents(server.events, EventKind::kEnd), 1u);
  EXPECT_FALSE(server.session.Push(1, "b"));
  EXPECT_FALSE(server.session.Answer(1, 0, "", {}, {}, {}));
}

}  // namespace
}  // namespace dpsr::serving
