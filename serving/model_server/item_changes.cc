#include "serving/model_server/item_changes.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "common/status.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/log.h"
#include "serving/model_server/priority.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace dpsr::serving {
namespace {

constexpr char kSignature[] = "apply_changes";
// The outputs that are read. The signature may have more.
enum Output { kChanges, kOffset, kItems, kOpen, kSealed, kHidden, kIgnored, kNotIndexed, kLastTime, kDrift, kNumOutputs };
constexpr std::array<const char*, kNumOutputs> kOutputs = {"changes", "offset",  "items",       "open",      "sealed",
                                                           "hidden",  "ignored", "not_indexed", "last_time", "drift"};

// Time between two calls, and bounds of the time after an error, which doubles each time.
constexpr std::chrono::milliseconds kInterval(100);
// After so many changes there may be more, and the next call follows at once. After fewer, it would find few or none, and
// a call that finds none costs as much as ten changes.
constexpr int64_t kManyChanges = 256;
constexpr std::chrono::milliseconds kFirstBackoff(200);
constexpr std::chrono::milliseconds kLongestBackoff(10'000);

double Now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Returns the value of a scalar of one of the types that the outputs have.
tensorflow::Status Read(const tensorflow::Tensor& tensor, const char* name, double* value) {
  if (tensor.NumElements() == 1) {
    switch (tensor.dtype()) {
      case tensorflow::DT_INT32:
        *value = tensor.flat<int32_t>()(0);
        return tensorflow::OkStatus();
      case tensorflow::DT_INT64:
        *value = static_cast<double>(tensor.flat<tensorflow::int64>()(0));
        return tensorflow::OkStatus();
      case tensorflow::DT_FLOAT:
        *value = tensor.flat<float>()(0);
        return tensorflow::OkStatus();
      case tensorflow::DT_DOUBLE:
        *value = tensor.flat<double>()(0);
        return tensorflow::OkStatus();
      default:
        break;
    }
  }
  return InvalidArgument(StrCat("output ", name, " of ", kSignature, " is ",
                                tensorflow::DataTypeString(tensor.dtype()), " ", tensor.shape().DebugString(),
                                ", expected one number"));
}

}  // namespace

std::unique_ptr<ItemChangeFollower> ItemChangeFollower::Start(const Servable& servable) {
  const Signature* signature = servable.FindSignature(kSignature);
  if (signature == nullptr) return nullptr;
  std::vector<std::string> fetches;
  for (const char* name : kOutputs) {
    const auto output = std::find_if(signature->outputs.begin(), signature->outputs.end(),
                                     [&](const Endpoint& endpoint) { return endpoint.alias == name; });
    if (output == signature->outputs.end()) return nullptr;
    fetches.push_back(output->tensor);
  }
  std::unique_ptr<ItemChangeFollower> follower(new ItemChangeFollower(servable, std::move(fetches)));
  // For the first call the session makes an executor, which takes tens of milliseconds. Requests would wait meanwhile.
  const std::chrono::milliseconds wait = follower->Call();
  follower->thread_ = std::thread([started = follower.get(), wait] { started->Run(wait); });
  return follower;
}

ItemChangeFollower::ItemChangeFollower(const Servable& servable, std::vector<std::string> fetches)
    : servable_(servable), fetches_(std::move(fetches)) {}

ItemChangeFollower::~ItemChangeFollower() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  ForgetItemChanges(servable_.name(), servable_.version());
}

void ItemChangeFollower::Run(std::chrono::milliseconds wait) {
  LowerThreadPriority();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!wake_.wait_for(lock, wait, [this] { return stopping_; })) {
    lock.unlock();
    wait = Call();
    lock.lock();
  }
}

std::chrono::milliseconds ItemChangeFollower::Call() {
  int64_t changes = 0;
  const tensorflow::Status status = CatchExceptions(kSignature, [&] { return Apply(&changes); });
  return After(status, changes);
}

tensorflow::Status ItemChangeFollower::Apply(int64_t* changes) {
  // Inputs have their defaults, and there is no batching.
  std::vector<tensorflow::Tensor> outputs;
  TF_RETURN_IF_ERROR(servable_.Run(Feeds(), fetches_, Deadline::max(), &outputs));
  std::array<double, kNumOutputs> values;
  for (size_t i = 0; i < kNumOutputs; ++i) TF_RETURN_IF_ERROR(Read(outputs[i], kOutputs[i], &values[i]));
  *changes = static_cast<int64_t>(values[kChanges]);
  state_.offset = static_cast<int64_t>(values[kOffset]);
  state_.items = static_cast<int64_t>(values[kItems]);
  state_.open = static_cast<int64_t>(values[kOpen]);
  state_.sealed = static_cast<int64_t>(values[kSealed]);
  const double entries = values[kItems] + values[kHidden];
  state_.hidden_share = entries > 0 ? values[kHidden] / entries : 0;
  state_.ignored = static_cast<int64_t>(values[kIgnored]);
  state_.not_indexed = static_cast<int64_t>(values[kNotIndexed]);
  state_.drift = values[kDrift];
  // Whatever comes after the changes of this call is not older than the last of them.
  state_.lag_seconds = *changes > 0 ? std::max(0.0, Now() - values[kLastTime]) : 0;
  return tensorflow::OkStatus();
}

std::chrono::milliseconds ItemChangeFollower::After(const tensorflow::Status& status, int64_t changes) {
  std::chrono::milliseconds wait = changes >= kManyChanges ? std::chrono::milliseconds(0) : kInterval;
  if (status.ok()) {
    if (!problem_.empty()) {
      LogInfo("model ", servable_.name(), " version ", servable_.version(), " applies changes of items again");
    }
    problem_.clear();
    backoff_ = kFirstBackoff;
    state_.applied += changes;
  } else {
    const std::string problem(status.message());
    if (problem_.empty()) {
      problem_since_ = Now();
      backoff_ = kFirstBackoff;
    }
    if (problem != problem_) {
      LogWarning("model ", servable_.name(), " version ", servable_.version(), " cannot apply changes of items: ",
                 problem, "; it answers with the items that it has");
    }
    problem_ = problem;
    ++state_.errors;
    state_.lag_seconds = Now() - problem_since_;
    wait = backoff_;
    backoff_ = std::min(2 * backoff_, kLongestBackoff);
  }
  RecordItemChanges(servable_.name(), servable_.version(), state_);
  return wait;
}

}  // namespace dpsr::serving
