#include "export/faiss_search/retrieval.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Hit = std::pair<int64_t, float>;  // position, score

struct Result {
  Status status;
  std::vector<int64_t> ids;
  std::vector<float> scores;
  std::vector<int32_t> heads;
};

// As an index has them.
ItemIds Checked(const std::vector<int64_t>& ids) {
  ItemIds checked;
  EXPECT_TRUE(ItemIds::Check({ids.data(), ids.size()}, &checked).ok());
  return checked;
}

// Retrieves with a search whose answers are given: query [h] of dim 1 holds 1 + the index into `hits`, and each answer
// is cut or padded to k.
Result Retrieve(const std::vector<int64_t>& item_ids, const std::vector<std::vector<Hit>>& hits, int64_t k,
                std::vector<float> query = {}) {
  const HeadSearch search = [&hits](const float* head, int64_t wanted, float* scores, int64_t* labels) {
    const std::vector<Hit>& found = hits[static_cast<size_t>(*head) - 1];
    for (int64_t i = 0; i < wanted; ++i) {
      const bool present = i < static_cast<int64_t>(found.size());
      labels[i] = present ? found[i].first : -1;
      scores[i] = present ? found[i].second : -std::numeric_limits<float>::max();
    }
    return Status();
  };
  if (query.empty()) {
    query.resize(hits.size());
    std::iota(query.begin(), query.end(), 1.0f);
  }
  Retriever retriever(Checked(item_ids), search);
  Result result;
  result.ids.resize(k, 12345);
  result.scores.resize(k, 12345);
  result.heads.resize(k, 12345);
  result.status = retriever.Retrieve(query.data(), static_cast<int64_t>(query.size()), 1, k, result.ids.data(),
                                     result.scores.data(), result.heads.data());
  return result;
}

void ExpectEmpty(const Result& result) {
  EXPECT_TRUE(result.status.ok()) << result.status.message();
  for (size_t i = 0; i < result.ids.size(); ++i) {
    EXPECT_EQ(result.ids[i], -1);
    EXPECT_EQ(result.scores[i], -kInfinity);
    EXPECT_EQ(result.heads[i], -1);
  }
}

TEST(RetrieverTest, MapsPositionsToItemIds) {
  const Result result = Retrieve({70, 80, 90}, {{{2, 3.0f}, {0, 2.0f}, {1, 1.0f}}}, 3);
  ASSERT_TRUE(result.status.ok()) << result.status.message();
  EXPECT_EQ(result.ids, (std::vector<int64_t>{90, 70, 80}));
  EXPECT_EQ(result.scores, (std::vector<float>{3, 2, 1}));
  EXPECT_EQ(result.heads, (std::vector<int32_t>{0, 0, 0}));
}

TEST(RetrieverTest, OrdersTiesOfOneHeadByAscendingId) {
  const Result result = Retrieve({9, 8, 7, 6}, {{{3, 2.0f}, {0, 1.0f}, {2, 1.0f}, {1, 1.0f}}}, 4);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{6, 7, 8, 9}));
  EXPECT_EQ(result.scores, (std::vector<float>{2, 1, 1, 1}));
}

TEST(RetrieverTest, SortsASearchThatIsOutOfOrder) {
  const Result result = Retrieve({10, 11, 12}, {{{0, 1.0f}, {1, 3.0f}, {2, 2.0f}}}, 3);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{11, 12, 10}));
}

// An index returns equal scores in any order, and there may be as many of them as results.
TEST(RetrieverTest, OrdersManyTiesByAscendingId) {
  constexpr int64_t kTies = 5000;
  std::vector<int64_t> item_ids(2 * kTies);
  std::iota(item_ids.begin(), item_ids.end(), 0);
  const std::vector<int64_t> expected = item_ids;
  std::vector<Hit> worst;  // the better half first, each in descending order of ids
  for (int64_t id = kTies; id-- > 0;) worst.emplace_back(id, 1.0f);
  for (int64_t id = 2 * kTies; id-- > kTies;) worst.emplace_back(id, id % 2 == 0 ? 0.0f : -0.0f);
  std::vector<Hit> reversed(worst.rbegin(), worst.rend());
  for (const std::vector<Hit>& hits : {worst, reversed}) {
    EXPECT_EQ(Retrieve(item_ids, {hits}, 2 * kTies).ids, expected);
    EXPECT_EQ(Retrieve(item_ids, {hits, hits}, 2 * kTies).ids, expected);
    const Result result = Retrieve(item_ids, {hits}, 2 * kTies);
    for (int64_t i = kTies; i < 2 * kTies; ++i) ASSERT_EQ(std::signbit(result.scores[i]), i % 2 != 0) << i;
  }
}

TEST(RetrieverTest, UnitesHeadsByLargestScore) {
  const Result result = Retrieve({10, 11, 12, 13},
                                 {{{0, 5.0f}, {1, 4.0f}, {2, 1.0f}}, {{1, 6.0f}, {3, 4.5f}, {0, 0.5f}}}, 3);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{11, 10, 13}));
  EXPECT_EQ(result.scores, (std::vector<float>{6, 5, 4.5f}));
  EXPECT_EQ(result.heads, (std::vector<int32_t>{1, 0, 1}));
}

TEST(RetrieverTest, GivesTheLowestOfTheHeadsThatTie) {
  const Result result = Retrieve({10, 11}, {{{0, 1.0f}, {1, 2.0f}}, {{1, 2.0f}, {0, 3.0f}}, {{0, 3.0f}, {1, 2.0f}}}, 2);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{10, 11}));
  EXPECT_EQ(result.heads, (std::vector<int32_t>{1, 0}));
}

TEST(RetrieverTest, OrdersTiesAcrossHeadsByAscendingId) {
  const Result result = Retrieve({30, 20, 10}, {{{0, 1.0f}}, {{1, 1.0f}}, {{2, 1.0f}}}, 3);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{10, 20, 30}));
  EXPECT_EQ(result.heads, (std::vector<int32_t>{2, 1, 0}));
}

TEST(RetrieverTest, CutsTheUnionAtK) {
  const Result result = Retrieve({10, 11, 12, 13}, {{{0, 4.0f}, {1, 3.0f}}, {{2, 2.0f}, {3, 1.0f}}}, 2);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{10, 11}));
}

TEST(RetrieverTest, PadsMissingResults) {
  const Result result = Retrieve({10, 11, 12}, {{{1, 2.0f}, {-1, -kInfinity}}, {{1, 3.0f}}}, 5);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{11, -1, -1, -1, -1}));
  EXPECT_EQ(result.scores, (std::vector<float>{3, -kInfinity, -kInfinity, -kInfinity, -kInfinity}));
  EXPECT_EQ(result.heads, (std::vector<int32_t>{1, -1, -1, -1, -1}));
}

TEST(RetrieverTest, JoinsPositionsOfOneItem) {
  const Result result = Retrieve({10, 10, 11}, {{{1, 3.0f}, {2, 2.0f}, {0, 1.0f}}}, 3);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{10, 11, -1}));
  EXPECT_EQ(result.scores[0], 3.0f);
}

TEST(RetrieverTest, DropsNanScoresAndKeepsInfiniteOnes) {
  const Result result = Retrieve({10, 11, 12, 13}, {{{0, kNan}, {1, 1.0f}, {2, kInfinity}, {3, kNan}}}, 4);
  EXPECT_EQ(result.ids, (std::vector<int64_t>{12, 11, -1, -1}));
  EXPECT_EQ(result.scores[0], kInfinity);
}

TEST(RetrieverTest, QueryThatIsNotFiniteRetrievesNothing) {
  const std::vector<std::vector<Hit>> hits = {{{0, 1.0f}}};
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    ExpectEmpty(Retrieve({10}, hits, 2, {bad}));
    ExpectEmpty(Retrieve({10}, hits, 2, {1.0f, bad}));
  }
}

TEST(RetrieverTest, HeadOfZerosRetrievesNothing) {
  const std::vector<std::vector<Hit>> hits = {{{0, 1.0f}}};
  ExpectEmpty(Retrieve({10}, hits, 2, {0.0f, -0.0f}));
  const Result second = Retrieve({10}, hits, 1, {0.0f, 1.0f});
  EXPECT_EQ(second.ids, (std::vector<int64_t>{10}));
  EXPECT_EQ(second.heads, (std::vector<int32_t>{1}));
}

TEST(RetrieverTest, EmptyIndexIsNotSearched) {
  const HeadSearch never = [](const float*, int64_t, float*, int64_t*) {
    return MakeStatus(StatusCode::kInternal, "searched");
  };
  Retriever retriever(Checked({}), never);
  const float query = 1;
  Result result{{}, {0, 0}, {0, 0}, {0, 0}};
  result.status = retriever.Retrieve(&query, 1, 1, 2, result.ids.data(), result.scores.data(), result.heads.data());
  ExpectEmpty(result);
}

TEST(RetrieverTest, AsksForNoMoreThanThereIs) {
  int64_t asked = 0;
  const HeadSearch search = [&asked](const float*, int64_t k, float* scores, int64_t* labels) {
    asked = k;
    std::fill(scores, scores + k, 0.0f);
    std::fill(labels, labels + k, -1);
    return Status();
  };
  const std::vector<int64_t> item_ids = {1, 2, 3};
  Retriever retriever(Checked(item_ids), search);
  const float query = 1;
  std::vector<int64_t> ids(8);
  std::vector<float> scores(8);
  std::vector<int32_t> heads(8);
  for (const int64_t k : {2, 3, 8}) {
    ASSERT_TRUE(retriever.Retrieve(&query, 1, 1, k, ids.data(), scores.data(), heads.data()).ok());
    EXPECT_EQ(asked, std::min<int64_t>(k, 3));
  }
}

TEST(RetrieverTest, PositionsOutsideTheTableAreDataLoss) {
  for (const int64_t position : {int64_t{2}, int64_t{-2}, std::numeric_limits<int64_t>::max()}) {
    const Result result = Retrieve({10, 11}, {{{position, 1.0f}}}, 1);
    EXPECT_EQ(result.status.code(), StatusCode::kDataLoss);
    EXPECT_NE(result.status.message().find(StrCat("position ", position)), std::string::npos);
  }
}

TEST(RetrieverTest, PassesErrorsOfTheSearchOn) {
  const std::vector<int64_t> item_ids = {1};
  Retriever retriever(Checked(item_ids), [](const float*, int64_t, float*, int64_t*) {
    return MakeStatus(StatusCode::kInternal, "search failed");
  });
  const float query = 1;
  int64_t id;
  float score;
  int32_t head;
  const Status status = retriever.Retrieve(&query, 1, 1, 1, &id, &score, &head);
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_EQ(status.message(), "search failed");
}

TEST(RetrieverTest, RefusesSizesOutOfRange) {
  const std::vector<int64_t> item_ids = {1};
  Retriever retriever(Checked(item_ids),
                      [](const float*, int64_t, float*, int64_t*) { return Status(); });
  const std::vector<float> query(kMaxHeads + 1, 1.0f);
  int64_t id = 0;
  float score = 0;
  int32_t head = 0;
  const auto code = [&](int64_t heads, int64_t dim, int64_t k) {
    return retriever.Retrieve(query.data(), heads, dim, k, &id, &score, &head).code();
  };
  EXPECT_EQ(code(0, 1, 1), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(kMaxHeads + 1, 1, 1), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(1, 0, 1), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(1, 1, 0), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(1, 1, -1), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(1, 1, kMaxResults + 1), StatusCode::kInvalidArgument);
  EXPECT_EQ(id, 0);
}

// The rule, written down in the plainest way: best score and lowest head of each id, sorted by score and id.
Result Reference(const std::vector<int64_t>& item_ids, const std::vector<std::vector<Hit>>& hits, int64_t k) {
  std::map<int64_t, std::pair<float, int32_t>> best;
  for (size_t head = 0; head < hits.size(); ++head) {
    const int64_t wanted = std::min<int64_t>({k, static_cast<int64_t>(item_ids.size()),
                                              static_cast<int64_t>(hits[head].size())});
    for (int64_t i = 0; i < wanted; ++i) {
      const auto [position, score] = hits[head][i];
      const auto [entry, is_new] = best.emplace(item_ids[position], std::make_pair(score, static_cast<int32_t>(head)));
      if (!is_new && score > entry->second.first) entry->second = {score, static_cast<int32_t>(head)};
    }
  }
  std::vector<std::tuple<float, int64_t, int32_t>> order;
  for (const auto& [id, found] : best) order.emplace_back(-found.first, id, found.second);
  std::sort(order.begin(), order.end());
  Result result;
  for (int64_t i = 0; i < k; ++i) {
    const bool present = i < static_cast<int64_t>(order.size());
    result.scores.push_back(present ? -std::get<0>(order[i]) : kNoScore);
    result.ids.push_back(present ? std::get<1>(order[i]) : kNoItem);
    result.heads.push_back(present ? std::get<2>(order[i]) : kNoHead);
  }
  return result;
}

TEST(RetrieverTest, EqualsTheReferenceOnRandomResults) {
  std::mt19937 random(20);
  for (int round = 0; round < 500; ++round) {
    const int64_t ntotal = 1 + random() % 60;
    const int64_t k = 1 + random() % 80;
    std::vector<int64_t> item_ids(ntotal);
    for (int64_t& id : item_ids) id = random() % 50 * (round % 2 == 0 ? 1 : int64_t{1} << 40);
    if (round % 3 == 0) {  // distinct, and known to be
      for (int64_t i = 0; i < ntotal; ++i) item_ids[i] = 50 * i + item_ids[i] % 50;
      EXPECT_TRUE(Checked(item_ids).distinct);
    }
    std::vector<std::vector<Hit>> hits(1 + random() % 4);
    for (std::vector<Hit>& head : hits) {
      std::vector<int64_t> positions(ntotal);
      std::iota(positions.begin(), positions.end(), 0);
      std::shuffle(positions.begin(), positions.end(), random);
      positions.resize(random() % (std::min(k, ntotal) + 1));
      for (const int64_t position : positions) head.emplace_back(position, static_cast<float>(random() % 8) - 4);
    }
    const Result expected = Reference(item_ids, hits, k);
    const Result result = Retrieve(item_ids, hits, k);
    ASSERT_TRUE(result.status.ok()) << result.status.message();
    ASSERT_EQ(result.ids, expected.ids) << "round " << round;
    ASSERT_EQ(result.scores, expected.scores) << "round " << round;
    ASSERT_EQ(result.heads, expected.heads) << "round " << round;
  }
}

// Answers with the positions 0, 1, ... in order, with falling scores.
HeadSearch InOrder(std::vector<int64_t>* asked) {
  return [asked](const float*, int64_t wanted, float* scores, int64_t* labels) {
    asked->push_back(wanted);
    for (int64_t i = 0; i < wanted; ++i) {
      labels[i] = i;
      scores[i] = -static_cast<float>(i);
    }
    return Status();
  };
}

TEST(RetrieverTest, LeavesExcludedIdsOut) {
  std::vector<int64_t> item_ids(100);
  std::iota(item_ids.begin(), item_ids.end(), 1000);
  std::vector<int64_t> asked;
  Retriever retriever(Checked(item_ids), InOrder(&asked));
  const float query = 1;
  std::vector<int64_t> ids(3);
  std::vector<float> scores(3);
  std::vector<int32_t> heads(3);
  const auto retrieve = [&](const std::vector<int64_t>& excluded) {
    EXPECT_TRUE(retriever.Exclude({excluded.data(), excluded.size()}).ok());
    EXPECT_TRUE(retriever.Retrieve(&query, 1, 1, 3, ids.data(), scores.data(), heads.data()).ok());
    return ids;
  };
  EXPECT_EQ(retrieve({1001, 1001, -1, 7, 1002}), (std::vector<int64_t>{1000, 1003, 1004}));
  EXPECT_EQ(asked, (std::vector<int64_t>{6}));  // three, and one for each id that is excluded
  EXPECT_EQ(retrieve({-1}), (std::vector<int64_t>{1000, 1001, 1002}));
  item_ids.pop_back();
  EXPECT_EQ(retrieve(item_ids), (std::vector<int64_t>{1099, kNoItem, kNoItem}));
}

TEST(RetrieverTest, LooksFurtherWhereExcludedIdsRepeat) {
  std::vector<int64_t> item_ids(100, 5);
  item_ids[70] = 6;
  std::vector<int64_t> asked;
  Retriever retriever(Checked(item_ids), InOrder(&asked));
  const float query = 1;
  const int64_t excluded = 5;
  int64_t id = 0;
  float score = 0;
  int32_t head = 0;
  ASSERT_TRUE(retriever.Exclude({&excluded, 1}).ok());
  ASSERT_TRUE(retriever.Retrieve(&query, 1, 1, 1, &id, &score, &head).ok());
  EXPECT_EQ(id, 6);
  EXPECT_EQ(asked.back(), 100);
}

// The items of an index with two entries for each, from searches that find either of them.
TEST(RetrieverTest, AnItemWithTwoEntriesCountsOnce) {
  constexpr int64_t kItems = 40;
  constexpr int64_t kHeads = 3;
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    std::vector<int64_t> item_ids(kItems);
    for (int64_t i = 0; i < kItems; ++i) item_ids[i] = 3 * i;
    if (round % 2 == 1) std::shuffle(item_ids.begin(), item_ids.end(), random);
    // Entry e of a head is one of position e / 2. Some scores are equal.
    std::vector<std::vector<Hit>> entries(kHeads);
    std::map<int64_t, float> best;
    for (std::vector<Hit>& head : entries) {
      for (int64_t e = 0; e < 2 * kItems; ++e) {
        head.emplace_back(e / 2, static_cast<float>(random() % 500));
        const auto added = best.emplace(item_ids[e / 2], head.back().second).first;
        added->second = std::max(added->second, head.back().second);
      }
      std::stable_sort(head.begin(), head.end(), [](const Hit& a, const Hit& b) { return a.second > b.second; });
    }
    std::vector<int64_t> excluded;
    while (random() % 4 != 0) {
      excluded.push_back(3 * static_cast<int64_t>(random() % kItems));
      best.erase(excluded.back());
    }
    std::vector<float> expected;
    for (const auto& [id, score] : best) expected.push_back(score);
    std::sort(expected.rbegin(), expected.rend());

    ItemIds checked = Checked(item_ids);
    checked.entries = 2;
    Retriever retriever(checked, [&entries](const float* head, int64_t wanted, float* scores, int64_t* labels) {
      EXPECT_LE(wanted, 2 * kItems);
      for (int64_t i = 0; i < wanted; ++i) {
        std::tie(labels[i], scores[i]) = entries[static_cast<size_t>(*head) - 1][i];
      }
      return Status();
    });
    ASSERT_TRUE(retriever.Exclude({excluded.data(), excluded.size()}).ok());
    const auto k = static_cast<int64_t>(1 + random() % (kItems + 5));
    const float query[kHeads] = {1, 2, 3};
    std::vector<int64_t> ids(k);
    std::vector<float> scores(k);
    std::vector<int32_t> heads(k);
    ASSERT_TRUE(retriever.Retrieve(query, kHeads, 1, k, ids.data(), scores.data(), heads.data()).ok());
    for (int64_t i = 0; i < k; ++i) {
      if (i < static_cast<int64_t>(expected.size())) {
        ASSERT_EQ(scores[i], expected[i]) << "round " << round;
        ASSERT_EQ(best.at(ids[i]), scores[i]);
        best.erase(ids[i]);  // no item is found again
      } else {
        ASSERT_EQ(ids[i], kNoItem);
      }
    }
  }
}

TEST(RetrieverTest, RefusesTooManyExcludedIds) {
  const std::vector<int64_t> ids(kMaxExcluded + 1, 1);
  std::vector<int64_t> asked;
  Retriever retriever(Checked(ids), InOrder(&asked));
  EXPECT_TRUE(retriever.Exclude({ids.data(), ids.size() - 1}).ok());
  EXPECT_EQ(retriever.Exclude({ids.data(), ids.size()}).code(), StatusCode::kInvalidArgument);
}

TEST(ItemIdsTest, RefusesNegativeIds) {
  const std::vector<int64_t> bad = {4, -1};
  ItemIds checked;
  const Status status = ItemIds::Check({bad.data(), bad.size()}, &checked);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("position 1 is -1"), std::string::npos) << status.message();
}

TEST(ItemIdsTest, KnowsAscendingIdsToBeDistinct) {
  EXPECT_TRUE(Checked({}).distinct);
  EXPECT_TRUE(Checked({0, 5, std::numeric_limits<int64_t>::max()}).distinct);
  EXPECT_FALSE(Checked({0, 5, 5}).distinct);
  EXPECT_FALSE(Checked({5, 0}).distinct);
}

}  // namespace
}  // namespace dpsr
