// Decides which versions of a model exist and which one to load or unload next. Pure functions of names and snapshots.
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

// The state of a version. The policy does nothing with loading and failed versions.
enum class VersionState {
  kNew,        // found, but its load has not begun
  kLoading,    // from just before the load to its end
  kReady,      // takes requests
  kUnloading,  // takes no new requests, and is unloaded when its running requests have ended
  kFailed,     // its load ended with an error
};

struct VersionSnapshot {
  int64_t version = 0;
  VersionState state = VersionState::kNew;
  bool aspired = false;  // whether it should be served
};

struct VersionAction {
  enum class Kind { kLoad, kUnload };
  Kind kind = Kind::kLoad;
  int64_t version = 0;

  bool operator==(const VersionAction& other) const { return kind == other.kind && version == other.version; }
};

// Finds the versions among the names of a base path's children. A name that is an int64 without a sign is a version
// (`00000123` is 123); other names are ignored. If several names mean the same version, the alphabetically first one is
// used, and the others are put into `duplicates`.
std::map<int64_t, std::string> VersionsOfChildren(std::vector<std::string> children,
                                                  std::vector<std::string>* duplicates);

// Says which versions of a model should be served.
struct VersionPolicy {
  enum class Kind { kLatest, kAll, kSpecific };
  Kind kind = Kind::kLatest;
  size_t num_latest = 1;       // for kLatest
  std::set<int64_t> specific;  // for kSpecific

  bool operator==(const VersionPolicy& other) const {
    return kind == other.kind && num_latest == other.num_latest && specific == other.specific;
  }
};

// Returns the versions to serve among those that exist. A specific version that does not exist is left out.
std::set<int64_t> AspiredVersions(const std::map<int64_t, std::string>& existing, const VersionPolicy& policy);

// Returns the next step towards serving the aspired versions, or none. Availability comes first. The lowest version
// that is ready but no longer aspired is unloaded only if an aspired version is ready, if no version is aspired at all,
// or if another version that is not aspired is ready, too. Otherwise the highest new aspired version is loaded. So a
// change from 1 to 2 loads 2 before it unloads 1, and if 2 is broken, 1 keeps serving.
std::optional<VersionAction> NextVersionAction(const std::vector<VersionSnapshot>& versions);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_VERSION_POLICY_H_
