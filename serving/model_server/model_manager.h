// The models that the server holds: looks for their versions in the file system, loads and unloads them, and hands the
// loaded ones to requests.
#ifndef DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_
#define DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "serving/model_server/servable.h"
#include "serving/model_server/version_policy.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/apis/get_model_status.pb.h"
#include "tensorflow_serving/apis/model.pb.h"

namespace dpsr::serving {

struct ModelConfig {
  std::string name;
  std::string base_path;  // its numbered children are the versions
};

struct ModelManagerOptions {
  std::vector<ModelConfig> models;
  ServableOptions servable;
  int64_t poll_wait_seconds = 1;  // 0: look for versions once; negative: never
};

// Thread-safe. One thread of its own polls, loads and unloads; requests only take a short lock.
class ModelManager {
 public:
  explicit ModelManager(ModelManagerOptions options);
  // Ends the thread, and unloads what is loaded. No servable that was handed out may be held any more.
  ~ModelManager();
  ModelManager(const ModelManager&) = delete;
  ModelManager& operator=(const ModelManager&) = delete;

  // Begins to look for versions. Call once.
  void Start();

  // Waits until every model has versions and each first load has ended, at most for `timeout`. Nothing: not yet. An
  // error names the models that did not become available.
  std::optional<tensorflow::Status> AwaitFirstLoads(std::chrono::milliseconds timeout);

  // The version that `spec` asks for, the highest ready one where it names none. Holding it keeps it loaded. Until the
  // first loads have ended UNAVAILABLE; after that TensorFlow Serving's codes and messages.
  tensorflow::Status Find(const tensorflow::serving::ModelSpec& spec, std::shared_ptr<const Servable>* servable) const;

  // The states of the model's versions, the highest first, or that of the one that `spec` names.
  tensorflow::Status GetStatus(const tensorflow::serving::ModelSpec& spec,
                               tensorflow::serving::GetModelStatusResponse* response) const;

 private:
  struct Version {
    std::string path;
    bool aspired = true;
    VersionState state = VersionState::kNew;
    tensorflow::Status error;  // of state kFailed
    std::unique_ptr<Servable> servable;
    // What requests copy. Its deleter leaves the servable alone, and sets `released`.
    std::shared_ptr<const Servable> lease;
    bool released = false;
  };

  struct Model {
    std::string base_path;
    std::map<int64_t, Version> versions;
    // Versions that are gone, with the error of those that failed: GetStatus still knows them.
    std::map<int64_t, tensorflow::Status> ended;
    std::string problem;  // of the last poll, reported when it changes
  };

  using Lock = std::unique_lock<std::mutex>;

  void Run();
  // These are called with the lock held, and let go of it while they wait for the file system or TensorFlow.
  void Poll(const std::string& name, Model* model, Lock* lock);
  void Load(const std::string& name, int64_t number, Version* version, Lock* lock);
  void Unload(const std::string& name, int64_t number, Version* version, Lock* lock);
  void DestroyReleased(const std::string& name, Model* model, Lock* lock);
  void NoteFirstLoads();

  const ModelManagerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Model> models_;
  std::optional<tensorflow::Status> first_loads_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_
