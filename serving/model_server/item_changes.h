// Applies changes of items to a loaded version, if its model can: a thread calls the signature `apply_changes`, which
// reads the log beside the versions (dpsr_export/fresh_items.py). The server knows no more of it.
#ifndef DPSR_SERVING_MODEL_SERVER_ITEM_CHANGES_H_
#define DPSR_SERVING_MODEL_SERVER_ITEM_CHANGES_H_

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "serving/model_server/metrics.h"
#include "serving/model_server/servable.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// Runs from Start() to its destruction.
class ItemChangeFollower {
 public:
  // Calls the signature once, and then again and again in a thread of its own. Returns null if the servable has no
  // signature `apply_changes` with outputs of a follower. `servable` must outlive the follower, and no request should use
  // it yet. Throws std::system_error if no thread can be started.
  static std::unique_ptr<ItemChangeFollower> Start(const Servable& servable);
  // Waits for the call that runs.
  ~ItemChangeFollower();
  ItemChangeFollower(const ItemChangeFollower&) = delete;
  ItemChangeFollower& operator=(const ItemChangeFollower&) = delete;

 private:
  ItemChangeFollower(const Servable& servable, std::vector<std::string> fetches);
  void Run(std::chrono::milliseconds wait);
  // Calls the signature once, and returns how long to wait before the next call.
  std::chrono::milliseconds Call();
  // Calls the signature once. Fills `state_`, and `changes` with the number of changes that were applied.
  tensorflow::Status Apply(int64_t* changes);
  // Records a call, and returns how long to wait before the next one.
  std::chrono::milliseconds After(const tensorflow::Status& status, int64_t changes);

  const Servable& servable_;
  const std::vector<std::string> fetches_;  // the tensors of kOutputs, in order
  ItemChangeState state_;
  std::string problem_;  // the error of the last call; logged when it changes
  double problem_since_ = 0;
  std::chrono::milliseconds backoff_{0};

  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_ITEM_CHANGES_H_
