// Manages the models of the server: finds their versions in the file system, loads and unloads them, and gives the
// loaded versions to requests.
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

#include "serving/model_server/item_changes.h"
#include "serving/model_server/servable.h"
#include "serving/model_server/version_policy.h"
#include "serving/model_server/worker_pool.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/apis/get_model_status.pb.h"
#include "tensorflow_serving/apis/model.pb.h"

namespace dpsr::serving {

struct ModelConfig {
  std::string name;
  std::string base_path;  // its numbered folders are the versions
  VersionPolicy policy;
  std::map<std::string, int64_t> labels;  // label -> version
};

struct ModelManagerOptions {
  ServableOptions servable;
  int64_t poll_wait_seconds = 1;  // 0: search for versions once; negative: never
  int num_load_threads = 1;
  int num_unload_threads = 1;
  // How often a load is tried again after an error that may go away.
  int max_num_load_retries = 5;
  int64_t load_retry_interval_micros = 60'000'000;
  // How often each warm-up request of a version is replayed; 0: not at all.
  int warmup_iterations = 1;
  // Whether a new label may name a version that is not available.
  bool allow_labels_for_unavailable = false;
  // Whether to flush the caches of TensorFlow's file systems after each load.
  bool flush_file_system_caches = true;
};

// Thread-safe. One thread takes the decisions. Searches for versions, loads and unloads run on other threads, so that a
// slow load, or a file system that hangs, does not delay other models. Requests only take a lock for a short time.
class ModelManager {
 public:
  explicit ModelManager(ModelManagerOptions options);
  // Ends the threads, and unloads all versions. Waits until no request holds a servable any more.
  ~ModelManager();
  ModelManager(const ModelManager&) = delete;
  ModelManager& operator=(const ModelManager&) = delete;

  // Begins to serve these models. Call once. A label is set as soon as its version is available.
  void Start(const std::vector<ModelConfig>& models);

  // Waits at most for `timeout` until every model of Start has versions and its first loads have ended. Returns nullopt
  // if they have not. An error names the models that did not become available.
  std::optional<tensorflow::Status> AwaitFirstLoads(std::chrono::milliseconds timeout);

  // Serves these models from now on, and unloads all other models. Does not wait for loads. `fresh` gets the names of
  // the new models. FAILED_PRECONDITION: a label names a version that will not be available. UNAVAILABLE: Start was not
  // called yet. CANCELLED: the server stops. After an error nothing has changed.
  tensorflow::Status Configure(const std::vector<ModelConfig>& models, std::set<std::string>* fresh);

  // Calls Configure, and waits until the new models and the versions that labels name are available, or until
  // `cancelled` returns true. UNKNOWN: a new model did not become available; the other models are served.
  // FAILED_PRECONDITION: as Configure, or a version that a label names did not load. ABORTED: a later configuration
  // removed the model or the label. CANCELLED: `cancelled` returned true, or the server stops. The configuration stays
  // in force after all these errors except those of Configure.
  tensorflow::Status Reconfigure(const std::vector<ModelConfig>& models, const std::function<bool()>& cancelled);

  // Ends all waits of Reconfigure, now and later. From now on configurations are refused.
  void EndWaits();

  // Finds the version that `spec` asks for, by default the highest version that is ready. It stays loaded as long as
  // the caller holds it. A version that is not there is UNAVAILABLE until the first loads have ended; after that,
  // errors have TensorFlow Serving's codes and messages.
  tensorflow::Status Find(const tensorflow::serving::ModelSpec& spec, std::shared_ptr<const Servable>* servable) const;

  // Returns the states of the model's versions, the highest version first, or the state of the version that `spec`
  // names.
  tensorflow::Status GetStatus(const tensorflow::serving::ModelSpec& spec,
                               tensorflow::serving::GetModelStatusResponse* response) const;

  // Returns whether every model of the configuration has a version that is ready.
  bool AllAvailable() const;

  // Returns, for each model of the configuration, whether it has a version that is ready.
  std::map<std::string, bool> Available() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  struct Version {
    std::string path;
    bool aspired = true;
    VersionState state = VersionState::kNew;
    tensorflow::Status error;  // of the last load
    int tries = 0;
    bool busy = false;           // whether its load or destruction is queued or running
    Clock::time_point next_try;  // when a load that failed is tried again
    std::unique_ptr<Servable> servable;
    // Uses the servable, and is destroyed before it.
    std::unique_ptr<ItemChangeFollower> follower;
    // Requests copy this pointer. Its deleter does not delete the servable, but sets `released`.
    std::shared_ptr<const Servable> lease;
    bool released = false;
    bool destroyed = false;
  };

  struct Model {
    ModelConfig config;
    bool removed = false;  // from the configuration; forgotten when its versions have ended
    bool polled = false;   // whether its versions were searched for since its configuration changed
    uint64_t generation = 0;  // of its configuration
    std::map<int64_t, Version> versions;
    std::map<std::string, int64_t> labels;   // in force
    std::map<std::string, int64_t> pending;  // labels to set when their version is available
    std::string problem;                     // found by the last poll; logged when it changes
  };

  void Run();
  void StopAll(Lock* lock);
  // Call these with the lock held.
  // Lets a thread search for versions of the model, unless one is doing so.
  void Poll(const std::string& name);
  // Takes over what a search has found with the model's configuration. Returns whether something has changed.
  struct Found {
    tensorflow::Status status;
    std::map<int64_t, std::string> versions;
    std::vector<std::string> duplicates;
  };
  static bool ApplyFound(const Found& found, Model* model);
  // These release the lock while they wait for TensorFlow.
  void TakeActions(Model* model, Lock* lock);
  void Load(const std::string& name, int64_t number, Version* version);
  void Unload(const std::string& name, int64_t number, Version* version, Lock* lock);
  void Destroy(const std::string& name, int64_t number, Version* version);
  // Forgets versions that have ended. Returns whether any version is left.
  bool ForgetEndedVersions(Model* model);
  // Returns whether these models have become available, or nullopt while a model, or a version that a label names, may
  // still become available.
  std::optional<tensorflow::Status> LoadResult(const std::set<std::string>& names) const;
  bool IsReady(const std::string& name, int64_t version) const;
  static bool HasReadyVersion(const Model& model);
  // Returns whether setting `label` to `version` takes it away from another version.
  static bool MovesLabel(const Model& model, const std::string& label, int64_t version);
  // Returns whether the version is ready or may still become ready.
  static bool MayBecomeReady(const Model& model, int64_t version);
  tensorflow::Status CheckLabels(const ModelConfig& config, Lock* lock);
  void ApplyConfig(const ModelConfig& config);
  void NotifyChanged();

  const ModelManagerOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool dirty_ = true;  // whether the thread has something to do
  bool poll_now_ = true;
  bool started_ = false;
  bool stopping_ = false;
  bool end_waits_ = false;
  std::map<std::string, Model> models_;  // only the thread erases models
  // Versions that have ended, with their errors, for GetStatus.
  std::map<std::string, std::map<int64_t, tensorflow::Status>> ended_;
  std::set<std::string> first_models_;
  std::optional<tensorflow::Status> first_loads_;
  uint64_t last_generation_ = 0;
  std::set<std::string> searched_;  // the models whose versions a thread is searching for
  std::mutex configure_mutex_;  // allows one Configure at a time; locked before mutex_

  std::unique_ptr<WorkerPool> search_threads_;
  std::unique_ptr<WorkerPool> load_threads_;
  std::unique_ptr<WorkerPool> unload_threads_;
  std::thread thread_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_MODEL_MANAGER_H_
