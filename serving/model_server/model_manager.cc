#include "serving/model_server/model_manager.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "common/status.h"
#include "serving/model_server/log.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/priority.h"
#include "serving/model_server/warmup.h"
#include "tensorflow/core/platform/env.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::GetModelStatusResponse;
using ::tensorflow::serving::ModelSpec;
using ::tensorflow::serving::ModelVersionStatus;

// Number of ended versions that are remembered for each model: a new version every minute for a week.
constexpr size_t kMaxEnded = 10'000;

ModelVersionStatus::State ApiState(VersionState state) {
  switch (state) {
    case VersionState::kNew:
      return ModelVersionStatus::START;
    case VersionState::kLoading:
      return ModelVersionStatus::LOADING;
    case VersionState::kReady:
      return ModelVersionStatus::AVAILABLE;
    case VersionState::kUnloading:
      return ModelVersionStatus::UNLOADING;
    case VersionState::kFailed:
      return ModelVersionStatus::END;
  }
  return ModelVersionStatus::UNKNOWN;
}

void AddStatus(int64_t version, ModelVersionStatus::State state, const tensorflow::Status& error,
               GetModelStatusResponse* response) {
  ModelVersionStatus* status = response->add_model_version_status();
  status->set_version(version);
  status->set_state(state);
  status->mutable_status()->set_error_code(static_cast<tensorflow::error::Code>(error.code()));
  status->mutable_status()->set_error_message(std::string(error.message()));
}

// Returns whether another try to load may succeed: files of the version may still be missing or half-written, or a file
// system may be unavailable. If TensorFlow could read the files, another try gives the same error.
bool MayLoadLater(const tensorflow::Status& status) {
  if (Servable::IsFinal(status)) return false;
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnknown:
      return true;
    default:
      return false;
  }
}

tensorflow::Status LabelError(const std::string& model, int64_t version, const std::string& reason = "") {
  return absl::FailedPreconditionError(StrCat("Request to assign label to version ", version, " of model ", model,
                                              ", which is not currently available for inference", reason));
}

tensorflow::Status VersionsOnDisk(const std::string& base_path, std::map<int64_t, std::string>* versions,
                                  std::vector<std::string>* duplicates) {
  std::vector<std::string> children;
  TF_RETURN_IF_ERROR(tensorflow::Env::Default()->GetChildren(base_path, &children));
  *versions = VersionsOfChildren(std::move(children), duplicates);
  return tensorflow::OkStatus();
}

}  // namespace

ModelManager::ModelManager(ModelManagerOptions options)
    : options_(std::move(options)),
      search_threads_(new WorkerPool(1)),
      load_threads_(new WorkerPool(std::max(1, options_.num_load_threads))),
      unload_threads_(new WorkerPool(std::max(1, options_.num_unload_threads))) {}

ModelManager::~ModelManager() {
  {
    Lock lock(mutex_);
    stopping_ = true;
    NotifyChanged();
  }
  if (thread_.joinable()) thread_.join();
}

void ModelManager::Start(const std::vector<ModelConfig>& models) {
  Servable::StartSharedThreads(options_.servable);
  Lock lock(mutex_);
  for (const ModelConfig& config : models) {
    // Without a search for versions there is nothing to wait for.
    if (options_.poll_wait_seconds >= 0) first_models_.insert(config.name);
    ApplyConfig(config);
  }
  started_ = true;
  thread_ = std::thread([this] { Run(); });
}

std::optional<tensorflow::Status> ModelManager::AwaitFirstLoads(std::chrono::milliseconds timeout) {
  Lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return first_loads_.has_value(); });
  return first_loads_;
}

tensorflow::Status ModelManager::Configure(const std::vector<ModelConfig>& models, std::set<std::string>* fresh) {
  std::lock_guard<std::mutex> one_at_a_time(configure_mutex_);
  Lock lock(mutex_);
  if (end_waits_) return absl::CancelledError("the server is stopping");
  // Start would add its models to these.
  if (!started_) return absl::UnavailableError("The server is starting: it has no models yet; try again");
  for (const ModelConfig& config : models) TF_RETURN_IF_ERROR(CheckLabels(config, &lock));
  std::set<std::string> named;
  for (const ModelConfig& config : models) {
    named.insert(config.name);
    const auto model = models_.find(config.name);
    if (model == models_.end() || model->second.removed) fresh->insert(config.name);
    ApplyConfig(config);
  }
  for (auto& [name, model] : models_) {
    if (named.count(name) > 0) continue;
    model.removed = true;
    model.labels.clear();
    model.pending.clear();
    for (auto& [number, version] : model.versions) version.aspired = false;
  }
  poll_now_ = true;
  NotifyChanged();
  return tensorflow::OkStatus();
}

tensorflow::Status ModelManager::Reconfigure(const std::vector<ModelConfig>& models,
                                             const std::function<bool()>& cancelled) {
  std::set<std::string> fresh;
  TF_RETURN_IF_ERROR(Configure(models, &fresh));
  // As in Start, there is nothing to wait for without a search for versions.
  if (options_.poll_wait_seconds < 0) return tensorflow::OkStatus();

  std::optional<tensorflow::Status> result;
  const auto settle = [&]() -> std::optional<tensorflow::Status> {
    if (stopping_ || end_waits_) return absl::CancelledError("the server is stopping");
    for (const ModelConfig& config : models) {
      const auto model = models_.find(config.name);
      if (model == models_.end() || model->second.removed) {
        return absl::AbortedError(StrCat("a later configuration removed model ", config.name));
      }
    }
    const std::optional<tensorflow::Status> loads = LoadResult(fresh);
    if (!loads || !loads->ok()) return loads;
    // A label waits while its version is loading.
    for (const ModelConfig& config : models) {
      const Model& model = models_.at(config.name);
      for (const auto& [label, number] : config.labels) {
        const auto given = model.labels.find(label);
        if (given != model.labels.end() && given->second == number) continue;
        const auto pending = model.pending.find(label);
        if (pending == model.pending.end() || pending->second != number) {
          return absl::AbortedError(StrCat("a later configuration removed label ", label, " of model ", config.name));
        }
        if (MayBecomeReady(model, number)) return std::nullopt;
        return LabelError(config.name, number, ": it did not load");
      }
    }
    return tensorflow::OkStatus();
  };
  // There is no notification when `cancelled` becomes true, so it is checked at intervals.
  constexpr std::chrono::milliseconds kCheckInterval(100);
  Lock lock(mutex_);
  while (!changed_.wait_for(lock, kCheckInterval, [&] { return (result = settle()).has_value(); })) {
    if (cancelled()) return absl::CancelledError("the request was cancelled; the models continue to load");
  }
  return *result;
}

void ModelManager::EndWaits() {
  Lock lock(mutex_);
  end_waits_ = true;
  NotifyChanged();
}

// A label may name a version that is ready or that this configuration loads. If the flag allows it, a new label may
// name any version. TensorFlow Serving checks labels before it loads, so that labels at start-up always fail there.
tensorflow::Status ModelManager::CheckLabels(const ModelConfig& config, Lock* lock) {
  std::set<int64_t> aspired;
  bool looked = false;
  for (const auto& [label, number] : config.labels) {
    if (IsReady(config.name, number)) continue;
    const auto model = models_.find(config.name);
    if (options_.allow_labels_for_unavailable &&
        (model == models_.end() || !MovesLabel(model->second, label, number))) {
      continue;
    }
    if (!looked) {
      looked = true;
      lock->unlock();
      std::map<int64_t, std::string> versions;
      std::vector<std::string> duplicates;
      if (VersionsOnDisk(config.base_path, &versions, &duplicates).ok()) {
        aspired = AspiredVersions(versions, config.policy);
      }
      lock->lock();
    }
    if (aspired.count(number) > 0) continue;
    return LabelError(config.name, number);
  }
  return tensorflow::OkStatus();
}

void ModelManager::ApplyConfig(const ModelConfig& config) {
  Model& model = models_[config.name];
  // It comes back before the last of its old versions has ended. What is wrong with it is logged again.
  if (model.removed) model.problem.clear();
  model.config = config;
  model.generation = ++last_generation_;
  model.removed = false;
  model.polled = false;
  model.pending.clear();
  for (auto label = model.labels.begin(); label != model.labels.end();) {
    label = config.labels.count(label->first) > 0 ? std::next(label) : model.labels.erase(label);
  }
  for (const auto& [label, number] : config.labels) {
    const bool may_be_unavailable = options_.allow_labels_for_unavailable && !MovesLabel(model, label, number);
    if (may_be_unavailable || IsReady(config.name, number)) {
      model.labels[label] = number;
    } else {
      model.pending[label] = number;
    }
  }
}

bool ModelManager::MovesLabel(const Model& model, const std::string& label, int64_t version) {
  const auto given = model.labels.find(label);
  return given != model.labels.end() && given->second != version;
}

bool ModelManager::IsReady(const std::string& name, int64_t version) const {
  const auto model = models_.find(name);
  if (model == models_.end()) return false;
  const auto found = model->second.versions.find(version);
  return found != model->second.versions.end() && found->second.state == VersionState::kReady;
}

tensorflow::Status ModelManager::Find(const ModelSpec& spec, std::shared_ptr<const Servable>* servable) const {
  if (spec.name().empty()) return absl::InvalidArgumentError("ModelSpec has no name specified.");
  Lock lock(mutex_);
  const tensorflow::Status starting =
      first_loads_ ? tensorflow::OkStatus()
                   : absl::UnavailableError("The server is starting: not all of its models are loaded yet");
  const auto model = models_.find(spec.name());
  std::optional<int64_t> wanted;
  if (spec.has_version()) wanted = spec.version().value();
  if (spec.version_choice_case() == ModelSpec::kVersionLabel) {
    const bool known = model != models_.end() && model->second.labels.count(spec.version_label()) > 0;
    if (!known) {
      TF_RETURN_IF_ERROR(starting);
      return absl::InvalidArgumentError("Unrecognized servable version label: " + spec.version_label());
    }
    wanted = model->second.labels.at(spec.version_label());
  }
  if (model != models_.end()) {
    const auto& versions = model->second.versions;
    for (auto version = versions.rbegin(); version != versions.rend(); ++version) {
      if (version->second.state != VersionState::kReady || (wanted && *wanted != version->first)) continue;
      *servable = version->second.lease;
      return tensorflow::OkStatus();
    }
  }
  TF_RETURN_IF_ERROR(starting);
  return absl::NotFoundError(StrCat(
      "Servable not found for request: ",
      wanted ? StrCat("Specific(", spec.name(), ", ", *wanted, ")") : StrCat("Latest(", spec.name(), ")")));
}

tensorflow::Status ModelManager::GetStatus(const ModelSpec& spec, GetModelStatusResponse* response) const {
  std::map<int64_t, std::pair<ModelVersionStatus::State, tensorflow::Status>> states;
  {
    Lock lock(mutex_);
    const auto ended = ended_.find(spec.name());
    if (ended != ended_.end()) {
      for (const auto& [version, error] : ended->second) states[version] = {ModelVersionStatus::END, error};
    }
    const auto model = models_.find(spec.name());
    if (model != models_.end()) {
      for (const auto& [version, entry] : model->second.versions) {
        states[version] = {ApiState(entry.state), entry.error};
      }
    }
  }
  if (spec.has_version()) {
    const int64_t version = spec.version().value();
    const auto found = states.find(version);
    if (found == states.end()) {
      return absl::NotFoundError(StrCat("Could not find version ", version, " of model ", spec.name()));
    }
    AddStatus(version, found->second.first, found->second.second, response);
    return tensorflow::OkStatus();
  }
  if (states.empty()) return absl::NotFoundError("Could not find any versions of model " + spec.name());
  for (auto state = states.rbegin(); state != states.rend(); ++state) {
    AddStatus(state->first, state->second.first, state->second.second, response);
  }
  return tensorflow::OkStatus();
}

bool ModelManager::AllAvailable() const {
  Lock lock(mutex_);
  return first_loads_ && std::all_of(models_.begin(), models_.end(), [](const auto& entry) {
           return entry.second.removed || HasReadyVersion(entry.second);
         });
}

std::map<std::string, bool> ModelManager::Available() const {
  Lock lock(mutex_);
  std::map<std::string, bool> available;
  for (const auto& [name, model] : models_) {
    if (!model.removed) available[name] = HasReadyVersion(model);
  }
  return available;
}

bool ModelManager::HasReadyVersion(const Model& model) {
  return std::any_of(model.versions.begin(), model.versions.end(),
                     [](const auto& version) { return version.second.state == VersionState::kReady; });
}

// Called with the lock held: once the lock is released, the destructor may destroy the condition variable.
void ModelManager::NotifyChanged() {
  dirty_ = true;
  changed_.notify_all();
}

void ModelManager::Run() {
  Lock lock(mutex_);
  // Limited, so that a huge value of the flag does not overflow the clock.
  const std::chrono::seconds wait(std::min<int64_t>(options_.poll_wait_seconds, 365 * 86400));
  auto next_poll = Clock::time_point::max();
  bool lacks_threads = false;  // logged once
  while (!stopping_) {
    dirty_ = false;
    const bool due = poll_now_ || Clock::now() >= next_poll;
    if (due && options_.poll_wait_seconds >= 0) {
      poll_now_ = false;
      // A search that still runs since the last time may hang, and does not delay the others.
      try {
        search_threads_->GrowTo(searched_.size() + 1);
      } catch (const std::system_error& error) {
        // The process may have as many threads as it is allowed. Those that exist go on.
        if (!lacks_threads) LogWarning("cannot start a thread that searches for versions: ", error.what());
        lacks_threads = true;
      }
      for (const auto& [name, model] : models_) {
        if (!model.removed) Poll(name);
      }
      if (options_.poll_wait_seconds > 0) next_poll = Clock::now() + wait;
    }
    auto wake = next_poll;
    for (auto model = models_.begin(); model != models_.end();) {
      TakeActions(&model->second, &lock);
      for (const auto& [number, version] : model->second.versions) {
        if (version.state == VersionState::kLoading && !version.busy) wake = std::min(wake, version.next_try);
      }
      const bool holds_versions = ForgetEndedVersions(&model->second);
      model = holds_versions || !model->second.removed ? std::next(model) : models_.erase(model);
    }
    if (!first_loads_) first_loads_ = LoadResult(first_models_);
    // Wakes the threads that wait for the result of a load.
    changed_.notify_all();
    const auto work = [this] { return dirty_ || stopping_; };
    if (wake == Clock::time_point::max()) {
      changed_.wait(lock, work);
    } else {
      changed_.wait_until(lock, wake, work);
    }
  }
  StopAll(&lock);
}

void ModelManager::StopAll(Lock* lock) {
  const auto none = [this](auto condition) {
    for (const auto& [name, model] : models_) {
      for (const auto& [number, version] : model.versions) {
        if (condition(version)) return false;
      }
    }
    return true;
  };
  changed_.notify_all();
  changed_.wait(*lock, [&] { return none([](const Version& version) { return version.busy; }); });
  for (auto& [name, model] : models_) {
    for (auto& [number, version] : model.versions) {
      if (version.state == VersionState::kReady) Unload(name, number, &version, lock);
    }
  }
  changed_.wait(*lock, [&] {
    return none([](const Version& version) { return version.state == VersionState::kUnloading && !version.released; });
  });
  for (auto& [name, model] : models_) {
    for (auto& [number, version] : model.versions) {
      if (version.state == VersionState::kUnloading) Destroy(name, number, &version);
    }
  }
  changed_.wait(*lock, [&] { return none([](const Version& version) { return version.busy; }); });
}

void ModelManager::Poll(const std::string& name) {
  if (!searched_.insert(name).second) return;
  const Model& asked = models_.at(name);
  search_threads_->Add([this, name, base_path = asked.config.base_path, generation = asked.generation] {
    Found found;
    found.status = VersionsOnDisk(base_path, &found.versions, &found.duplicates);
    Lock lock(mutex_);
    searched_.erase(name);
    const auto model = models_.find(name);
    if (model != models_.end() && !model->second.removed) {
      if (model->second.generation != generation) {
        poll_now_ = true;  // the configuration was replaced meanwhile
        NotifyChanged();
      } else if (ApplyFound(found, &model->second)) {
        NotifyChanged();
      }
    }
  });
}

bool ModelManager::ApplyFound(const Found& found, Model* model) {
  const ModelConfig& config = model->config;
  const auto& [status, existing, duplicates] = found;
  const std::set<int64_t> aspired = AspiredVersions(existing, config.policy);
  std::vector<int64_t> missing;
  std::set_difference(config.policy.specific.begin(), config.policy.specific.end(), aspired.begin(), aspired.end(),
                      std::back_inserter(missing));
  std::string problem;
  if (!status.ok()) {
    problem = StrCat("cannot read the base path of model ", config.name, ": ", std::string(status.message()),
                     "; its versions stay as they are");
  } else if (existing.empty()) {
    problem = StrCat("no versions of model ", config.name, " found under the base path ", config.base_path,
                     ". Did you forget to name your leaf directory as a number (eg. '/1/')?");
  } else if (!missing.empty()) {
    problem = StrCat("version ", missing.front(), " of model ", config.name,
                     ", which its version policy names, was not found under ", config.base_path);
  } else if (!duplicates.empty()) {
    problem = StrCat("model ", config.name, " has several folders of one version under ", config.base_path,
                     "; ignored: ", duplicates.front(), duplicates.size() > 1 ? ", ..." : "");
  }
  if (problem != model->problem && !problem.empty()) LogWarning(problem);
  model->problem = problem;
  if (!status.ok()) return false;

  bool changed = !model->polled;
  model->polled = true;
  for (auto& [number, version] : model->versions) {
    const bool aspires = aspired.count(number) > 0;
    changed |= version.aspired != aspires;
    version.aspired = aspires;
  }
  for (const int64_t number : aspired) {
    const auto [entry, fresh] = model->versions.try_emplace(number);
    if (fresh) entry->second.path = config.base_path + "/" + existing.at(number);
    changed |= fresh;
  }
  return changed;
}

void ModelManager::TakeActions(Model* model, Lock* lock) {
  const std::string name = model->config.name;
  for (auto& [number, version] : model->versions) {
    if (version.state == VersionState::kLoading && !version.busy) {
      if (!version.aspired) {
        version.state = VersionState::kFailed;
      } else if (Clock::now() >= version.next_try) {
        Load(name, number, &version);
      }
    }
    if (version.released && !version.busy && !version.destroyed) Destroy(name, number, &version);
  }
  // Labels move before the versions that they leave are unloaded.
  for (auto label = model->pending.begin(); label != model->pending.end();) {
    if (IsReady(name, label->second)) {
      model->labels[label->first] = label->second;
      label = model->pending.erase(label);
    } else {
      ++label;
    }
  }
  while (!stopping_) {
    std::vector<VersionSnapshot> snapshot;
    for (const auto& [number, version] : model->versions) snapshot.push_back({number, version.state, version.aspired});
    const std::optional<VersionAction> action = NextVersionAction(snapshot);
    if (!action) break;
    Version* version = &model->versions.at(action->version);
    if (action->kind == VersionAction::Kind::kLoad) {
      Load(name, action->version, version);
    } else {
      Unload(name, action->version, version, lock);
    }
  }
}

void ModelManager::Load(const std::string& name, int64_t number, Version* version) {
  version->state = VersionState::kLoading;
  version->busy = true;
  ShowVersionPath(version->path, true);
  load_threads_->Add([this, name, number, version, path = version->path] {
    LogInfo("loading model ", name, " version ", number, " from ", path);
    std::unique_ptr<Servable> servable;
    std::unique_ptr<ItemChangeFollower> follower;
    const auto begin = Clock::now();
    const int64_t memory = ResidentBytes();
    tensorflow::Status status;
    const auto load = [&] {
      LowerThreadPriority();
      status = Servable::Load(options_.servable, name, number, path, &servable);
      if (status.ok() && options_.warmup_iterations > 0) {
        status = ReplayWarmup(*servable, path, options_.warmup_iterations);
      }
      if (status.ok()) follower = ItemChangeFollower::Start(*servable);
    };
    // The process may have as many threads as it is allowed.
    const auto with_threads = [&status](const auto& work) {
      try {
        work();
      } catch (const std::system_error& error) {
        status = absl::ResourceExhaustedError(StrCat("cannot start a thread: ", error.what()));
      }
    };
    // The thread is a separate one, because it has a low priority and must never hold the lock that requests need.
    with_threads([&] { std::thread([&] { with_threads(load); }).join(); });
    if (options_.flush_file_system_caches) tensorflow::Env::Default()->FlushFileSystemCaches().IgnoreError();
    if (status.ok()) SetVersionMemory(name, number, std::max<int64_t>(1, ResidentBytes() - memory));
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();

    Lock lock(mutex_);
    version->busy = false;
    version->error = status;
    if (status.ok()) {
      LogInfo("loaded model ", name, " version ", number, " in ", seconds, " s");
      version->servable = std::move(servable);
      version->follower = std::move(follower);
      version->lease = std::shared_ptr<const Servable>(version->servable.get(), [this, version](const Servable*) {
        Lock release(mutex_);
        version->released = true;
        NotifyChanged();
      });
      version->state = VersionState::kReady;
    } else {
      const bool again = version->tries++ < options_.max_num_load_retries && MayLoadLater(status);
      const std::chrono::microseconds wait(options_.load_retry_interval_micros);
      LogWarning("model ", name, " version ", number, " did not load from ", path, ": ", status.ToString(),
                 again ? StrCat("; trying again in ", options_.load_retry_interval_micros / 1e6, " s") : "");
      version->next_try = Clock::now() + wait;
      if (!again) version->state = VersionState::kFailed;
    }
    NotifyChanged();
  });
}

void ModelManager::Unload(const std::string& name, int64_t number, Version* version, Lock* lock) {
  version->state = VersionState::kUnloading;
  std::shared_ptr<const Servable> lease = std::move(version->lease);
  // Running requests hold copies of the lease, and the last one runs its deleter, which takes the lock.
  lock->unlock();
  LogInfo("unloading model ", name, " version ", number, " after its running requests");
  lease.reset();
  lock->lock();
}

void ModelManager::Destroy(const std::string& name, int64_t number, Version* version) {
  version->busy = true;
  unload_threads_->Add([this, name, number, version] {
    // No request uses the servable any more.
    version->follower.reset();
    version->servable.reset();
    SetVersionMemory(name, number, 0);
    LogInfo("unloaded model ", name, " version ", number);
    Lock lock(mutex_);
    version->busy = false;
    version->destroyed = true;
    NotifyChanged();
  });
}

bool ModelManager::ForgetEndedVersions(Model* model) {
  for (auto entry = model->versions.begin(); entry != model->versions.end();) {
    const Version& version = entry->second;
    const bool idle = version.state == VersionState::kNew || version.state == VersionState::kFailed;
    if (!version.destroyed && (version.aspired || !idle || version.busy)) {
      ++entry;
      continue;
    }
    // If the version has become aspired again, another search finds it as a new one.
    if (version.aspired) {
      poll_now_ = true;
      NotifyChanged();
    }
    auto& ended = ended_[model->config.name];
    ended[entry->first] = version.error;
    if (ended.size() > kMaxEnded) ended.erase(ended.begin());
    ShowVersionPath(version.path, false);
    entry = model->versions.erase(entry);
  }
  return !model->versions.empty();
}

bool ModelManager::MayBecomeReady(const Model& model, int64_t version) {
  const auto found = model.versions.find(version);
  return !model.polled || (found != model.versions.end() && found->second.state != VersionState::kFailed);
}

std::optional<tensorflow::Status> ModelManager::LoadResult(const std::set<std::string>& names) const {
  std::string failed;
  int num_failed = 0;
  for (const std::string& name : names) {
    const auto model = models_.find(name);
    if (model == models_.end() || model->second.removed) continue;
    // Before the search, the versions may be old ones that are being unloaded.
    bool available = false, waiting = !model->second.polled || model->second.versions.empty();
    std::string errors;
    for (const auto& [number, version] : model->second.versions) {
      available |= version.aspired && version.state == VersionState::kReady;
      if (version.state == VersionState::kFailed) {
        errors = StrCat("{name: ", name, " version: ", number, "} due to error: ", version.error.ToString());
      } else {
        waiting |= version.aspired;
      }
    }
    const auto& pending = model->second.pending;
    const bool labels_wait = std::any_of(
        pending.begin(), pending.end(), [&](const auto& label) { return MayBecomeReady(model->second, label.second); });
    if (available ? labels_wait : waiting) return std::nullopt;
    if (available) continue;
    ++num_failed;
    failed += errors + "}, ";
  }
  if (num_failed == 0) return tensorflow::OkStatus();
  return absl::UnknownError(StrCat(num_failed, " model(s) did not become available: {", failed, "}"));
}

}  // namespace dpsr::serving
