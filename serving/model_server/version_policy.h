// Which versions of a model exist, and which to load or unload next: pure functions on names and snapshots.
#ifndef DPSR_SERVING_MODEL_SERVER_VERSION_POLICY_H_
#define DPSR_SERVING_MODEL_SERVER_VERSION_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace dpsr::serving {

// Where a version stands. Loading and failed versions need no action of the policy.
enum class VersionState {
  kNew,        // seen, load not begun
  kLoading,    // from before the load to its end
  kReady,      // takes requests
  kUnloading,  // takes no new request; ends when its running requests have
  kFailed,     // the load ended with an error
};

struct VersionSnapshot {
  int64_t version = 0;
  VersionState state = VersionState::kNew;
  bool aspired = false;  // the source of models wants it served
};

struct VersionAction {
  enum class Kind { kLoad, kUnload };
  Kind kind = Kind::kLoad;
  int64_t version = 0;

  bool operator==(const VersionAction& other) const { return kind == other.kind && version == other.version; }
};

// The versions among the names of a base path's children: a name that reads as int64 in full, without a sign, is one
// (`00000123` is 123); the others are ignored. Of several names of one version the first in order of names stays, the
// others go to `duplicates`.
std::map<int64_t, std::string> VersionsOfChildren(std::vector<std::string> children,
                                                  std::vector<std::string>* duplicates);

// Which versions of a model are to be served.
struct VersionPolicy {
  enum class Kind { kLatest, kAll, kSpecific };
  Kind kind = Kind::kLatest;
  size_t num_latest = 1;        // of kLatest
  std::set<int64_t> specific;   // of kSpecific

  bool operator==(const VersionPolicy& other) const {
    return kind == other.kind && num_latest == other.num_latest && specific == other.specific;
  }
};

// The versions to serve of those that exist. A specific one that does not exist is left out.
std::set<int64_t> AspiredVersions(const std::map<int64_t, std::string>& existing, const VersionPolicy& policy);

// The next step towards serving the aspired versions, or none. Availability comes first: a version that is no longer
// aspired is unloaded, lowest first, only where that leaves the model answering (an aspired version is ready), or where
// nothing is aspired at all, or where another un-aspired version is ready too. Otherwise the highest new aspired
// version is loaded. So a change from 1 to 2 loads 2 before it unloads 1, and a broken 2 leaves 1 serving.
std::optional<VersionAction> NextVersionAction(const std::vector<VersionSnapshot>& versions);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_VERSION_POLICY_H_
