// Makes a request known to the ops that it runs (common/current_request.h).
#ifndef DPSR_SERVING_MODEL_SERVER_REQUEST_SCOPE_H_
#define DPSR_SERVING_MODEL_SERVER_REQUEST_SCOPE_H_

#include <functional>
#include <utility>

#include "common/current_request.h"
#include "serving/model_server/servable.h"

namespace dpsr::serving {

// The request that this thread computes, or null.
inline thread_local const DpsrRequest* current_request = nullptr;

// While it lives, the thread computes a request that is over when `deadline` passes or `cancelled`, which must be
// thread-safe, returns true. Requests that are computed in a batch with others are not over before the batch is.
class RequestScope {
 public:
  explicit RequestScope(Deadline deadline, std::function<bool()> cancelled = nullptr)
      : deadline_(deadline), cancelled_(std::move(cancelled)) {
    current_request = &request_;
  }
  ~RequestScope() { current_request = nullptr; }
  RequestScope(const RequestScope&) = delete;
  RequestScope& operator=(const RequestScope&) = delete;

 private:
  static bool IsOver(const void* state) {
    const auto* scope = static_cast<const RequestScope*>(state);
    return Deadline::clock::now() >= scope->deadline_ || (scope->cancelled_ && scope->cancelled_());
  }

  const Deadline deadline_;
  const std::function<bool()> cancelled_;
  const DpsrRequest request_{IsOver, this};
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REQUEST_SCOPE_H_
