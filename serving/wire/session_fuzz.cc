// A libFuzzer target: any bytes end a session at most. The first byte of the input chooses the side and what the owner
// does; the rest are the bytes that the other side sends, after what every connection begins with.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "serving/wire/session.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dpsr::serving;  // NOLINT
  if (size == 0) return 0;
  static const auto* const methods = new Methods{{"/p", MethodKind::kUnary}, {"/w", MethodKind::kStreaming}};
  static const std::string preface = std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  const std::string empty_settings("\0\0\0\4\0\0\0\0\0", 9);
  const int choice = data[0];
  std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool is_server = (choice & 1) == 0;
  bytes = (is_server ? preface : std::string()) + empty_settings + bytes;

  Budget budget;
  {
    SessionLimits limits;
    limits.streams = 8;
    limits.header_bytes = 512;
    limits.message_bytes = 1024;
    limits.connection_bytes = 4096;
    Session session(is_server ? Session::Role::kServer : Session::Role::kClient, limits, methods,
                    is_server ? &budget : nullptr, 0);
    const auto text = std::make_shared<std::string>(static_cast<size_t>(choice) * 64, 'x');
    std::vector<Event> events;
    if (!is_server) {
      for (int i = 0; i < 3; ++i) session.Call("/p", "a", false, 1, {{"k", "v"}}, {text->data(), text->size(), text});
    }
    const size_t step = 1 + static_cast<size_t>(choice >> 2) * 8;
    double now = 0;
    for (size_t begin = 0; begin < bytes.size(); begin += step) {
      events.clear();
      session.Receive(std::string_view(bytes).substr(begin, step), now, &events);
      for (const Event& event : events) {
        if (event.kind == EventKind::kMessage) session.Push(event.stream, event.data);
        if (event.kind == EventKind::kHalfClose) session.Answer(event.stream, 0, "", {}, {}, {{"t", "2"}});
        if (event.kind != EventKind::kCall || event.path == "/w") continue;
        if (event.data.size() < 5) std::abort();
        session.Hold(event.stream, 100);
        session.Answer(event.stream, choice & 2 ? 0 : 5, "d", {{"i", "1"}}, {text->data(), text->size(), text},
                       {{"t", "2"}});
      }
      if (choice & 2) session.SetUnsent(session.Send(256).size());
      now += 0.5;
      session.Expire(now);
    }
    session.Drain();
    session.Settle();
    while (!session.Send(1 << 16).empty()) {
    }
    // What clients can make a session hold has a bound. One message may pass it.
    if (is_server && session.held() > limits.connection_bytes + 2 * limits.message_bytes + text->size() + 8192) {
      std::abort();
    }
  }
  if (budget.used != 0) std::abort();
  return 0;
}
