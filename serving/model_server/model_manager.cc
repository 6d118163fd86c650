#include "serving/model_server/model_manager.h"

#include <algorithm>
#include <set>
#include <utility>

#include "serving/model_server/log.h"
#include "tensorflow/core/platform/env.h"
#include "tokenizer_cc/status.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::GetModelStatusResponse;
using ::tensorflow::serving::ModelSpec;
using ::tensorflow::serving::ModelVersionStatus;

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

}  // namespace

ModelManager::ModelManager(ModelManagerOptions options) : options_(std::move(options)) {
  for (const ModelConfig& model : options_.models) models_[model.name].base_path = model.base_path;
}

ModelManager::~ModelManager() {
  {
    Lock lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ModelManager::Start() {
  thread_ = std::thread([this] { Run(); });
}

std::optional<tensorflow::Status> ModelManager::AwaitFirstLoads(std::chrono::milliseconds timeout) {
  Lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return first_loads_.has_value(); });
  return first_loads_;
}

tensorflow::Status ModelManager::Find(const ModelSpec& spec, std::shared_ptr<const Servable>* servable) const {
  if (spec.name().empty()) return absl::InvalidArgumentError("ModelSpec has no name specified.");
  if (spec.version_choice_case() == ModelSpec::kVersionLabel) {
    return absl::InvalidArgumentError("Unrecognized servable version label: " + spec.version_label());
  }
  Lock lock(mutex_);
  if (!first_loads_) return absl::UnavailableError("The server is starting: its models are not loaded yet");
  const auto model = models_.find(spec.name());
  if (model != models_.end()) {
    const auto& versions = model->second.versions;
    for (auto version = versions.rbegin(); version != versions.rend(); ++version) {
      if (version->second.state != VersionState::kReady) continue;
      if (spec.has_version() && spec.version().value() != version->first) continue;
      *servable = version->second.lease;
      return tensorflow::OkStatus();
    }
  }
  return absl::NotFoundError(
      StrCat("Servable not found for request: ",
             spec.has_version() ? StrCat("Specific(", spec.name(), ", ", spec.version().value(), ")")
                                : StrCat("Latest(", spec.name(), ")")));
}

tensorflow::Status ModelManager::GetStatus(const ModelSpec& spec, GetModelStatusResponse* response) const {
  std::map<int64_t, std::pair<ModelVersionStatus::State, tensorflow::Status>> states;
  {
    Lock lock(mutex_);
    const auto model = models_.find(spec.name());
    if (model != models_.end()) {
      for (const auto& [version, error] : model->second.ended) states[version] = {ModelVersionStatus::END, error};
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

void ModelManager::Run() {
  using Clock = std::chrono::steady_clock;
  Lock lock(mutex_);
  auto next_poll = Clock::now();
  bool polls = options_.poll_wait_seconds >= 0;
  while (!stopping_) {
    if (polls && Clock::now() >= next_poll) {
      for (auto& [name, model] : models_) Poll(name, &model, &lock);
      // Bounded, so that a huge flag does not overflow the clock.
      next_poll = Clock::now() + std::chrono::seconds(std::min<int64_t>(options_.poll_wait_seconds, 365 * 86400));
      polls = options_.poll_wait_seconds > 0;
    }
    for (auto& [name, model] : models_) {
      while (!stopping_) {
        std::vector<VersionSnapshot> snapshot;
        for (const auto& [number, version] : model.versions) {
          snapshot.push_back({number, version.state, version.aspired});
        }
        const std::optional<VersionAction> action = NextVersionAction(snapshot);
        if (!action) break;
        Version* version = &model.versions.at(action->version);
        if (action->kind == VersionAction::Kind::kLoad) {
          Load(name, action->version, version, &lock);
        } else {
          Unload(name, action->version, version, &lock);
        }
      }
      DestroyReleased(name, &model, &lock);
    }
    NoteFirstLoads();
    const auto work = [this] {
      if (stopping_) return true;
      for (const auto& [name, model] : models_) {
        for (const auto& [number, version] : model.versions) {
          if (version.released) return true;
        }
      }
      return false;
    };
    if (polls) {
      changed_.wait_until(lock, next_poll, work);
    } else {
      changed_.wait(lock, work);
    }
  }
  for (auto& [name, model] : models_) {
    for (auto& [number, version] : model.versions) {
      if (version.state == VersionState::kReady) Unload(name, number, &version, &lock);
    }
    const auto released = [&versions = model.versions] {
      return std::none_of(versions.begin(), versions.end(), [](const auto& entry) {
        return entry.second.state == VersionState::kUnloading && !entry.second.released;
      });
    };
    changed_.wait(lock, released);
    DestroyReleased(name, &model, &lock);
  }
}

void ModelManager::Poll(const std::string& name, Model* model, Lock* lock) {
  const std::string base_path = model->base_path;
  lock->unlock();
  std::vector<std::string> children;
  const tensorflow::Status status = tensorflow::Env::Default()->GetChildren(base_path, &children);
  std::vector<std::string> duplicates;
  const std::map<int64_t, std::string> existing = VersionsOfChildren(std::move(children), &duplicates);
  lock->lock();

  std::string problem;
  if (!status.ok()) {
    problem = StrCat("cannot read the base path of model ", name, ": ", std::string(status.message()),
                     "; nothing changes until it can be read");
  } else if (existing.empty()) {
    problem = StrCat("no versions of model ", name, " found under the base path ", base_path,
                     ". Did you forget to name your leaf directory as a number (eg. '/1/')?");
  } else if (!duplicates.empty()) {
    problem = StrCat("model ", name, " has several folders of one version under ", base_path, "; ignored: ",
                     duplicates.front(), duplicates.size() > 1 ? ", ..." : "");
  }
  if (problem != model->problem && !problem.empty()) LogWarning(problem);
  model->problem = problem;
  if (!status.ok()) return;

  const std::set<int64_t> aspired = AspiredVersions(existing);
  for (auto entry = model->versions.begin(); entry != model->versions.end();) {
    Version& version = entry->second;
    version.aspired = aspired.count(entry->first) > 0;
    const bool idle = version.state == VersionState::kNew || version.state == VersionState::kFailed;
    if (version.aspired || !idle) {
      ++entry;
      continue;
    }
    model->ended[entry->first] = version.error;
    entry = model->versions.erase(entry);
  }
  for (const int64_t number : aspired) {
    const auto [entry, fresh] = model->versions.try_emplace(number);
    if (fresh) entry->second.path = base_path + "/" + existing.at(number);
  }
}

void ModelManager::Load(const std::string& name, int64_t number, Version* version, Lock* lock) {
  version->state = VersionState::kLoading;
  lock->unlock();
  LogInfo("loading model ", name, " version ", number, " from ", version->path);
  std::unique_ptr<Servable> servable;
  const auto begin = std::chrono::steady_clock::now();
  const tensorflow::Status status = Servable::Load(options_.servable, name, number, version->path, &servable);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (status.ok()) {
    LogInfo("loaded model ", name, " version ", number, " in ", seconds, " s");
  } else {
    LogWarning("model ", name, " version ", number, " did not load from ", version->path, ": ", status.ToString());
  }
  lock->lock();
  if (!status.ok()) {
    version->state = VersionState::kFailed;
    version->error = status;
    return;
  }
  version->servable = std::move(servable);
  version->lease = std::shared_ptr<const Servable>(version->servable.get(), [this, version](const Servable*) {
    Lock release(mutex_);
    version->released = true;
    // Under the lock: once it is free, the manager may end and take the condition variable along.
    changed_.notify_all();
  });
  version->state = VersionState::kReady;
}

void ModelManager::Unload(const std::string& name, int64_t number, Version* version, Lock* lock) {
  version->state = VersionState::kUnloading;
  std::shared_ptr<const Servable> lease = std::move(version->lease);
  // The deleter takes the lock. Running requests hold their own copies: the last of them runs it.
  lock->unlock();
  LogInfo("unloading model ", name, " version ", number, " when its requests have ended");
  lease.reset();
  lock->lock();
}

void ModelManager::DestroyReleased(const std::string& name, Model* model, Lock* lock) {
  for (auto entry = model->versions.begin(); entry != model->versions.end();) {
    Version& version = entry->second;
    if (!version.released) {
      ++entry;
      continue;
    }
    lock->unlock();
    version.servable.reset();
    LogInfo("unloaded model ", name, " version ", entry->first);
    lock->lock();
    // Wanted again in the meantime: the next poll finds it as new.
    model->ended[entry->first] = tensorflow::OkStatus();
    entry = model->versions.erase(entry);
  }
}

void ModelManager::NoteFirstLoads() {
  if (first_loads_) return;
  std::string failed;
  int num_failed = 0;
  for (const auto& [name, model] : models_) {
    bool available = false;
    std::string errors;
    for (const auto& [number, version] : model.versions) {
      available |= version.aspired && version.state == VersionState::kReady;
      if (version.state == VersionState::kFailed) {
        errors = StrCat("{name: ", name, " version: ", number, "} due to error: ", version.error.ToString());
      }
    }
    if (!available && errors.empty()) return;
    if (!errors.empty()) {
      ++num_failed;
      failed += errors + "}, ";
    }
  }
  first_loads_ = num_failed == 0 ? tensorflow::OkStatus()
                                 : tensorflow::Status(absl::UnknownError(StrCat(
                                       num_failed, " model(s) did not become available: {", failed, "}")));
  changed_.notify_all();
}

}  // namespace dpsr::serving
