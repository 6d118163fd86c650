// The models that the server holds: looks for their versions in the file system, loads and unloads them, and hands the
// loaded ones to requests.
#ifndef DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_
#define DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "serving/model_server/servable.h"
#include "serving/model_server/version_policy.h"
#include "serving/model_server/worker_pool.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/apis/get_model_status.pb.h"
#include "tensorflow_serving/apis/model.pb.h"

namespace dpsr::serving {

struct ModelConfig {
  std::string name;
  std::string base_path;  // its numbered children are the versions
  VersionPolicy policy;
  std::map<std::string, int64_t> labels;  // names of versions
};

struct ModelManagerOptions {
  ServableOptions servable;
  int64_t poll_wait_seconds = 1;  // 0: look for versions once; negative: never
  int num_load_threads = 1;
  int num_unload_threads = 1;
  // Tries after the first one of a load whose error another try may mend.
  int max_num_load_retries = 5;
  int64_t load_retry_interval_micros = 60'000'000;
  // Replay the requests that a version brings along, so many times each; 0: not at all.
  int warmup_iterations = 1;
  // A label that is new may name a version that is not available.
  bool allow_labels_for_unavailable = false;
  // After a load, let go of what TensorFlow's file systems keep of its files.
  bool flush_file_system_caches = true;
};

// Thread-safe. A thread of its own decides; loads and unloads run on threads of theirs, so that a slow one holds up no
// other model; requests only take a short lock.
class ModelManager {
 public:
  explicit ModelManager(ModelManagerOptions options);
  // Ends the threads, and unloads what is loaded. No servable that was handed out may be held any more.
  ~ModelManager();
  ModelManager(const ModelManager&) = delete;
  ModelManager& operator=(const ModelManager&) = delete;

  // Begins to serve these models. Call once. A label is given to its version as soon as that is available.
  void Start(const std::vector<ModelConfig>& models);

  // Waits until every model of Start has versions and its first loads have ended, at most for `timeout`. Nothing: not
  // yet. An error names the models that did not become available.
  std::optional<tensorflow::Status> AwaitFirstLoads(std::chrono::milliseconds timeout);

  // Serves these models from now on: those that are not named any more are unloaded. FAILED_PRECONDITION (a label that
  // cannot be): nothing changes. Does not wait for anything to load; `fresh` gets the names of the new models.
  tensorflow::Status Configure(const std::vector<ModelConfig>& models, std::set<std::string>* fresh);

  // Configure, and waits until the new models are available, and so the versions that labels name; not beyond the time
  // that `cancelled` turns true. UNKNOWN (a new model did not become available: the others are served);
  // FAILED_PRECONDITION (a version that a label names did not load); ABORTED (a later configuration took the model or
  // the label away); CANCELLED (as asked, or the server stops). All but the first FAILED_PRECONDITION leave the
  // configuration in force.
  tensorflow::Status Reconfigure(const std::vector<ModelConfig>& models, const std::function<bool()>& cancelled);

  // From now on Reconfigure waits no more.
  void EndWaits();

  // The version that `spec` asks for, the highest ready one where it names none. Holding it keeps it loaded. What is
  // not there is UNAVAILABLE until the first loads have ended; after that TensorFlow Serving's codes and messages.
  tensorflow::Status Find(const tensorflow::serving::ModelSpec& spec, std::shared_ptr<const Servable>* servable) const;

  // The states of the model's versions, the highest first, or that of the one that `spec` names.
  tensorflow::Status GetStatus(const tensorflow::serving::ModelSpec& spec,
                               tensorflow::serving::GetModelStatusResponse* response) const;

  // Whether every model of the configuration has a version that answers.
  bool AllAvailable() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  struct Version {
    std::string path;
    bool aspired = true;
    VersionState state = VersionState::kNew;
    tensorflow::Status error;  // of the last try to load
    int tries = 0;
    bool busy = false;          // a load or destruction of it is queued or runs
    Clock::time_point next_try;  // of a load that failed, and is tried again
    std::unique_ptr<Servable> servable;
    // What requests copy. Its deleter leaves the servable alone, and sets `released`.
    std::shared_ptr<const Servable> lease;
    bool released = false;
    bool destroyed = false;
  };

  struct Model {
    ModelConfig config;
    bool removed = false;  // from the configuration; goes when its versions have
    bool polled = false;
    std::map<int64_t, Version> versions;
    std::map<std::string, int64_t> labels;   // given
    std::map<std::string, int64_t> pending;  // to be given when their version is available
    std::string problem;                     // of the last poll, reported when it changes
  };

  void Run();
  void StopAll(Lock* lock);
  // These are called with the lock held, and let go of it while they wait for the file system or TensorFlow.
  void Poll(Model* model, Lock* lock);
  void TakeActions(Model* model, Lock* lock);
  void Load(const std::string& name, int64_t number, Version* version);
  void Unload(const std::string& name, int64_t number, Version* version, Lock* lock);
  void Destroy(const std::string& name, int64_t number, Version* version);
  // Forgets versions that ended. Whether any is left.
  bool ForgetEndedVersions(Model* model);
  // How the first loads of these models went; nothing while one, or a version that a label names, may still become
  // available.
  std::optional<tensorflow::Status> LoadResult(const std::set<std::string>& names) const;
  bool IsReady(const std::string& name, int64_t version) const;
  // Whether giving `label` to `version` takes it from another one.
  static bool MovesLabel(const Model& model, const std::string& label, int64_t version);
  // Whether the version is there, or may still come.
  static bool MayBecomeReady(const Model& model, int64_t version);
  tensorflow::Status CheckLabels(const ModelConfig& config, Lock* lock);
  void ApplyConfig(const ModelConfig& config);
  void NotifyChanged();

  const ModelManagerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool dirty_ = true;  // something for the thread to look at
  bool poll_now_ = true;
  bool stopping_ = false;
  bool end_waits_ = false;
  std::map<std::string, Model> models_;  // only the thread erases
  // Versions that are gone, with the error of those that failed: GetStatus still knows them.
  std::map<std::string, std::map<int64_t, tensorflow::Status>> ended_;
  std::set<std::string> first_models_;
  std::optional<tensorflow::Status> first_loads_;
  std::mutex configure_mutex_;  // one Configure at a time; taken before mutex_

  std::unique_ptr<WorkerPool> load_threads_;
  std::unique_ptr<WorkerPool> unload_threads_;
  std::thread thread_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_
