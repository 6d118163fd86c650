// The server's log on standard error: one line for each event of the server. request_log.h has the lines of requests.
// Its functions do not throw: a line for which there is no memory is left out.
#ifndef DPSR_SERVING_MODEL_SERVER_LOG_H_
#define DPSR_SERVING_MODEL_SERVER_LOG_H_

#include <cstdio>
#include <ctime>
#include <new>
#include <string>

#include "common/status.h"

namespace dpsr::serving {

// For LogInfo and LogWarning only.
template <typename... Args>
void LogLine(char severity, const Args&... args) {
  std::string message;
  try {
    message = StrCat(args...);
  } catch (const std::bad_alloc&) {
    return;
  }
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char stamp[32];
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%d %H:%M:%S", &local);
  // A single call, so that the lines of several threads do not mix. stderr is not buffered.
  std::fprintf(stderr, "%c %s model_server: %s\n", severity, stamp, message.c_str());
}

template <typename... Args>
void LogInfo(const Args&... args) {
  LogLine('I', args...);
}

template <typename... Args>
void LogWarning(const Args&... args) {
  LogLine('W', args...);
}

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_LOG_H_
