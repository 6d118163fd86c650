#include "serving/model_server/version_policy.h"

#include <algorithm>
#include <utility>

#include "serving/model_server/parse_number.h"

namespace dpsr::serving {

std::map<int64_t, std::string> VersionsOfChildren(std::vector<std::string> children,
                                                  std::vector<std::string>* duplicates) {
  std::sort(children.begin(), children.end());
  std::map<int64_t, std::string> versions;
  for (std::string& name : children) {
    int64_t version = 0;
    if (!ParseNumber(name, &version) || version < 0) continue;
    const bool fresh = versions.emplace(version, name).second;
    if (!fresh) duplicates->push_back(std::move(name));
  }
  return versions;
}

std::set<int64_t> AspiredVersions(const std::map<int64_t, std::string>& existing, const VersionPolicy& policy) {
  std::set<int64_t> aspired;
  for (auto entry = existing.rbegin(); entry != existing.rend(); ++entry) {
    if (policy.kind == VersionPolicy::Kind::kLatest && aspired.size() == policy.num_latest) break;
    if (policy.kind == VersionPolicy::Kind::kSpecific && policy.specific.count(entry->first) == 0) continue;
    aspired.insert(entry->first);
  }
  return aspired;
}

std::optional<VersionAction> NextVersionAction(const std::vector<VersionSnapshot>& versions) {
  bool any_aspired = false;
  bool aspired_ready = false;
  int unaspired_ready = 0;
  std::optional<int64_t> lowest_unaspired_ready;
  std::optional<int64_t> highest_aspired_new;
  for (const VersionSnapshot& v : versions) {
    const bool ready = v.state == VersionState::kReady;
    if (v.aspired) {
      any_aspired = true;
      aspired_ready |= ready;
      if (v.state == VersionState::kNew) {
        highest_aspired_new = std::max(v.version, highest_aspired_new.value_or(v.version));
      }
    } else if (ready) {
      ++unaspired_ready;
      lowest_unaspired_ready = std::min(v.version, lowest_unaspired_ready.value_or(v.version));
    }
  }
  if (lowest_unaspired_ready && (aspired_ready || !any_aspired || unaspired_ready > 1)) {
    return VersionAction{VersionAction::Kind::kUnload, *lowest_unaspired_ready};
  }
  if (highest_aspired_new) return VersionAction{VersionAction::Kind::kLoad, *highest_aspired_new};
  return std::nullopt;
}

}  // namespace dpsr::serving
