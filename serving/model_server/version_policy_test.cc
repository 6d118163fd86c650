#include "serving/model_server/version_policy.h"

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr::serving {
namespace {

using Action = VersionAction;
constexpr Action::Kind kLoad = Action::Kind::kLoad;
constexpr Action::Kind kUnload = Action::Kind::kUnload;
constexpr VersionState kNew = VersionState::kNew;
constexpr VersionState kLoading = VersionState::kLoading;
constexpr VersionState kReady = VersionState::kReady;
constexpr VersionState kUnloading = VersionState::kUnloading;
constexpr VersionState kFailed = VersionState::kFailed;

TEST(NextVersionActionTest, Table) {
  struct Case {
    std::string name;
    std::vector<VersionSnapshot> versions;
    std::optional<Action> expected;
  };
  const std::vector<Case> cases = {
      {"nothing known", {}, std::nullopt},
      {"first version", {{1, kNew, true}}, Action{kLoad, 1}},
      {"highest new first", {{1, kNew, true}, {3, kNew, true}, {2, kNew, true}}, Action{kLoad, 3}},
      {"a new version that nobody wants", {{1, kNew, false}}, std::nullopt},
      {"serving, nothing to do", {{1, kReady, true}}, std::nullopt},
      {"1 to 2: load 2 first", {{1, kReady, false}, {2, kNew, true}}, Action{kLoad, 2}},
      {"1 to 2: 2 still loads", {{1, kReady, false}, {2, kLoading, true}}, std::nullopt},
      {"1 to 2: 2 is ready", {{1, kReady, false}, {2, kReady, true}}, Action{kUnload, 1}},
      {"1 to 2: 1 drains", {{1, kUnloading, false}, {2, kReady, true}}, std::nullopt},
      {"1 to 2: 2 is broken, 1 stays", {{1, kReady, false}, {2, kFailed, true}}, std::nullopt},
      {"3 after a broken 2", {{1, kReady, false}, {2, kFailed, false}, {3, kNew, true}}, Action{kLoad, 3}},
      {"3 was deleted: load 2 first", {{2, kNew, true}, {3, kReady, false}}, Action{kLoad, 2}},
      {"two left over, the lower goes", {{1, kReady, false}, {2, kReady, false}, {3, kNew, true}}, Action{kUnload, 1}},
      {"two left over, one may go",
       {{2, kReady, false}, {1, kReady, false}, {3, kFailed, true}},
       Action{kUnload, 1}},
      {"nothing is aspired: unload lowest", {{5, kReady, false}, {4, kReady, false}}, Action{kUnload, 4}},
      {"nothing is aspired: unload last", {{5, kReady, false}}, Action{kUnload, 5}},
      {"unload before load when one serves",
       {{1, kReady, false}, {2, kReady, true}, {3, kNew, true}},
       Action{kUnload, 1}},
      {"add one to the aspired", {{2, kReady, true}, {3, kNew, true}}, Action{kLoad, 3}},
      {"broken alone", {{1, kFailed, true}}, std::nullopt},
  };
  for (const Case& c : cases) {
    const std::optional<Action> action = NextVersionAction(c.versions);
    EXPECT_EQ(action.has_value(), c.expected.has_value()) << c.name;
    if (action && c.expected) {
      EXPECT_TRUE(*action == *c.expected) << c.name << ": version " << action->version;
    }
  }
}

// Whatever the order of events, a model that serves keeps serving until nothing is aspired.
TEST(NextVersionActionTest, FollowingTheActionsNeverLeavesAGap) {
  for (int64_t from = 1; from <= 3; ++from) {
    for (int64_t to = 1; to <= 3; ++to) {
      std::map<int64_t, VersionState> states = {{from, kReady}};
      states.emplace(to, kNew);
      for (int step = 0; step < 10; ++step) {
        std::vector<VersionSnapshot> snapshot;
        for (const auto& [version, state] : states) snapshot.push_back({version, state, version == to});
        const std::optional<Action> action = NextVersionAction(snapshot);
        if (!action) break;
        if (action->kind == kLoad) {
          states[action->version] = kReady;
        } else {
          states.erase(action->version);
        }
        int ready = 0;
        for (const auto& [version, state] : states) ready += state == kReady;
        EXPECT_GE(ready, 1) << from << " to " << to;
      }
      EXPECT_EQ(states, (std::map<int64_t, VersionState>{{to, kReady}})) << from << " to " << to;
    }
  }
}

TEST(VersionsOfChildrenTest, TakesWhatReadsAsANumber) {
  std::vector<std::string> duplicates;
  const auto versions = VersionsOfChildren(
      {"2", "tmp", "00000123", "10", "-1", "+4", " 5", "6a", "", "1.5", "9223372036854775807", "9223372036854775808"},
      &duplicates);
  EXPECT_EQ(versions, (std::map<int64_t, std::string>{
                          {2, "2"}, {10, "10"}, {123, "00000123"}, {9223372036854775807, "9223372036854775807"}}));
  EXPECT_TRUE(duplicates.empty());
}

TEST(VersionsOfChildrenTest, ReportsDuplicates) {
  std::vector<std::string> duplicates;
  const auto versions = VersionsOfChildren({"7", "07", "007"}, &duplicates);
  EXPECT_EQ(versions, (std::map<int64_t, std::string>{{7, "007"}}));
  EXPECT_EQ(duplicates, (std::vector<std::string>{"07", "7"}));
}

TEST(AspiredVersionsTest, Table) {
  using Kind = VersionPolicy::Kind;
  const std::map<int64_t, std::string> existing = {{1, "1"}, {12, "12"}, {3, "3"}};
  EXPECT_EQ(AspiredVersions({}, {}), std::set<int64_t>{});
  EXPECT_EQ(AspiredVersions(existing, {}), std::set<int64_t>{12});
  EXPECT_EQ(AspiredVersions(existing, {Kind::kLatest, 2, {}}), (std::set<int64_t>{3, 12}));
  EXPECT_EQ(AspiredVersions(existing, {Kind::kLatest, 9, {}}), (std::set<int64_t>{1, 3, 12}));
  EXPECT_EQ(AspiredVersions(existing, {Kind::kAll, 1, {}}), (std::set<int64_t>{1, 3, 12}));
  EXPECT_EQ(AspiredVersions(existing, {Kind::kSpecific, 1, {1, 12}}), (std::set<int64_t>{1, 12}));
  EXPECT_EQ(AspiredVersions(existing, {Kind::kSpecific, 1, {2, 3}}), std::set<int64_t>{3});
  EXPECT_EQ(AspiredVersions(existing, {Kind::kSpecific, 1, {}}), std::set<int64_t>{});
}

}  // namespace
}  // namespace dpsr::serving
