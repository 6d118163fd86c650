// Runs against the FAISS library that FAISS_LIBRARY names.
#include "export/faiss_search/fresh_index.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "common/test_util.h"
#include "dpsr_tf/ops/permutation.h"
#include "export/faiss_binding/test_util.h"

namespace dpsr {
namespace {

constexpr int kDim = 8;
constexpr int64_t kItems = 1500;
constexpr int64_t kLists = 16;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One visible item, as a list of changes leaves it.
struct Item {
  std::vector<float> vector;
  double price = kNan;
  std::string brand;           // empty if missing
  std::set<std::string> tags;
};

using Filter = std::vector<std::string_view>;
using Passes = bool (*)(const Item&);

struct TestFilter {
  Filter include;
  Filter exclude;
  Passes passes;
};

const std::vector<TestFilter>& TestFilters() {
  static const std::vector<TestFilter> filters = {
      {{"price=10..20"}, {}, [](const Item& item) { return item.price >= 10 && item.price <= 20; }},
      {{"brand=b1|b7"}, {}, [](const Item& item) { return item.brand == "b1" || item.brand == "b7"; }},
      {{}, {"brand=b2"}, [](const Item& item) { return item.brand != "b2"; }},
      {{"brand=new1"}, {}, [](const Item& item) { return item.brand == "new1"; }},
      {{"tags=t1|fresh"}, {"price=..30"}, [](const Item& item) {
         return (item.tags.count("t1") != 0 || item.tags.count("fresh") != 0) && !(item.price <= 30);
       }},
      {{"price=77.125"}, {}, [](const Item& item) { return item.price == 77.125; }},
      {{"brand=a\\|b"}, {}, [](const Item& item) { return item.brand == "a|b"; }},
  };
  return filters;
}

class FreshIndexTest : public FileTest {
 protected:
  void SetUp() override {
    FileTest::SetUp();
    ASSERT_TRUE(IsOk(FaissLibrary::Get(&library_)));
    vectors_ = RandomVectors(kItems, kDim, 1);
  }

  // Builds an index of the vectors with the ids 0, 2, 4, ... and attributes for each of them. With `entries` 2, each
  // item is in two lists.
  void Build(const std::string& factory, const std::string& parameters, FreshIndex::Options options = {},
             int64_t entries = 1) {
    std::vector<int64_t> second_lists;
    for (int64_t i = 0; entries == 2 && i < kItems; ++i) second_lists.push_back(i % kLists);
    WriteTestIndex(*library_, path_, factory, kDim, FaissMetric::kInnerProduct, vectors_, kItems, second_lists);
    ids_.resize(kItems);
    for (int64_t i = 0; i < kItems; ++i) ids_[i] = 2 * i;
    Open(parameters, options, entries);
  }

  void Open(const std::string& parameters, FreshIndex::Options options, int64_t entries = 1) {
    fresh_.reset();
    ASSERT_TRUE(IsOk(FaissIndex::Read(*library_, path_, /*mmap=*/true, &index_)));
    ASSERT_TRUE(IsOk(index_->SetParameters(parameters)));
    ASSERT_TRUE(IsOk(FilteredSearch::Create(index_.get(), &search_, entries)));
    ASSERT_TRUE(IsOk(ItemIds::Check({ids_.data(), ids_.size()}, &item_ids_)));
    item_ids_.entries = entries;
    WriteAttributes();
    const auto items = static_cast<int64_t>(ids_.size());
    ASSERT_TRUE(IsOk(ItemFilters::Open(directory_ + "/attributes", items, 7, search_->order(), &filters_)));
    if (options.open_rows == 0) options.open_rows = 70;  // so that segments are sealed and merged
    fresh_ = std::make_unique<FreshIndex>(index_.get(), search_.get(), item_ids_, filters_.get(), options);
    model_.clear();
    versions_.clear();
    for (size_t i = 0; i < ids_.size(); ++i) model_[ids_[i]] = BaseItem(static_cast<int64_t>(i));
  }

  Item BaseItem(int64_t position) const {
    Item item;
    item.vector.assign(&vectors_[position * kDim], &vectors_[position * kDim] + kDim);
    if (position % 10 != 0) item.price = static_cast<double>(position % 100) / 2;
    if (position % 5 != 0) item.brand = "b" + std::to_string(position % 5);
    for (int64_t tag = 0; tag < position % 3; ++tag) item.tags.insert("t" + std::to_string((position + tag) % 4));
    return item;
  }

  // Writes what BaseItem returns.
  void WriteAttributes() const {
    std::vector<float> price;
    std::vector<uint8_t> brand, tags;
    std::vector<int64_t> tag_splits = {0};
    for (size_t i = 0; i < ids_.size(); ++i) {
      const Item item = BaseItem(static_cast<int64_t>(i));
      price.push_back(static_cast<float>(item.price));
      brand.push_back(item.brand.empty() ? 0 : static_cast<uint8_t>(item.brand[1] - '0'));
      for (const std::string& tag : item.tags) tags.push_back(static_cast<uint8_t>(1 + tag[1] - '0'));
      tag_splits.push_back(static_cast<int64_t>(tags.size()));
    }
    PackedFileWriter writer(directory_ + "/attributes", "item_attributes");
    ASSERT_TRUE(IsOk(writer.Open()));
    Add(&writer, "item_ids.fingerprint", std::vector<uint64_t>{7});
    Add(&writer, "value.price", price);
    Add(&writer, "value.brand", brand);
    AddTexts(&writer, "text.brand", {"b1", "b2", "b3", "b4"});
    Add(&writer, "value.tags", tags);
    Add(&writer, "splits.tags", tag_splits);
    AddTexts(&writer, "text.tags", {"t0", "t1", "t2", "t3"});
    ASSERT_TRUE(IsOk(writer.Finish()));
  }

  // Changes. A change holds a pointer to its vector, which lives in vectors_of_changes_.

  ItemChange Put(int64_t id, const Item& item, int64_t version = 0) {
    ItemChange change;
    change.kind = ItemChangeKind::kPut;
    change.id = id;
    change.version = version;
    if (!std::isnan(item.price)) change.attributes.push_back({"price", {item.price}, {}});
    if (!item.brand.empty()) change.attributes.push_back({"brand", {}, {item.brand}});
    change.attributes.push_back({"tags", {}, {item.tags.begin(), item.tags.end()}});
    vectors_of_changes_.push_back(std::make_unique<std::vector<float>>(item.vector));
    change.vector = vectors_of_changes_.back()->data();
    return change;
  }
  static ItemChange Update(int64_t id, std::vector<AttributeValue> attributes, int64_t version = 0) {
    ItemChange change;
    change.kind = ItemChangeKind::kUpdate;
    change.id = id;
    change.version = version;
    change.attributes = std::move(attributes);
    return change;
  }
  static ItemChange Delete(int64_t id, int64_t version = 0) {
    ItemChange change;
    change.kind = ItemChangeKind::kDelete;
    change.id = id;
    change.version = version;
    return change;
  }

  void Apply(const std::vector<ItemChange>& changes) {
    const int64_t offset = fresh_->state().offset;
    bool applied = false;
    ASSERT_TRUE(IsOk(fresh_->Apply(offset, offset + static_cast<int64_t>(changes.size()), changes, &applied)));
    ASSERT_TRUE(applied);
  }

  Item RandomItem(std::mt19937* random) const {
    const auto below = [random](int n) { return static_cast<int>((*random)() % n); };
    // Like a vector of the base, so that the codec of the base fits.
    Item item = BaseItem(below(kItems));
    for (float& value : item.vector) value *= 1 + static_cast<float>(below(100)) / 5000;
    item.price = kNan;
    item.tags.clear();
    if (below(5) != 0) item.price = below(200) / 4.0;
    const char* const brands[] = {"", "b1", "b2", "b3", "new1", "new2", "a|b"};
    item.brand = brands[below(7)];
    const char* const tags[] = {"t0", "t1", "t3", "fresh"};
    for (int i = 0; i < below(3); ++i) item.tags.insert(tags[below(4)]);
    return item;
  }

  // Makes a random change, and applies it to the model.
  ItemChange RandomChange(std::mt19937* random) {
    const auto below = [random](int n) { return static_cast<int>((*random)() % n); };
    const int64_t id = below(2 * static_cast<int>(kItems)) + (below(4) == 0 ? 2 * kItems : 0);
    const int64_t version = below(3) == 0 ? 1 + below(20) : 0;
    const int kind = below(10);
    int64_t& known = versions_[id];
    const bool is_old = version > 0 && version < known;
    const bool is_there = model_.count(id) != 0;
    if (kind < 5) {
      const Item item = RandomItem(random);
      if (!is_old) model_[id] = item;
      if (!is_old && version > 0) known = version;
      return Put(id, item, version);
    }
    if (kind < 8) {
      std::vector<AttributeValue> attributes;
      const Item values = RandomItem(random);
      Item unused;
      Item& item = is_there && !is_old ? model_[id] : unused;
      if (below(2) == 0) {
        attributes.push_back({"price", {}, {}});
        if (!std::isnan(values.price)) attributes.back().texts = {std::to_string(values.price)};
        item.price = values.price;
      }
      if (below(2) == 0) {
        attributes.push_back({"brand", {}, {}});
        if (!values.brand.empty()) attributes.back().texts = {values.brand};
        item.brand = values.brand;
      }
      if (below(2) == 0) {
        attributes.push_back({"tags", {}, {values.tags.begin(), values.tags.end()}});
        item.tags = values.tags;
      }
      attributes.push_back({"unknown", {1}, {}});
      if (is_there && !is_old && version > 0) known = version;
      return Update(id, attributes, version);
    }
    if (!is_old) model_.erase(id);
    if (!is_old && version > 0) known = version;
    return Delete(id, version);
  }

  struct Found {
    std::vector<int64_t> ids;
    std::vector<float> scores;
  };

  // Searches as the op does, with one head.
  Found Search(const float* x, int64_t k, const SearchParameters& parameters = {}, const Filter& include = {},
               const Filter& exclude = {}) const {
    const std::shared_ptr<const FreshItems> items = fresh_->items();
    std::shared_ptr<const ItemMask> mask;
    FreshRowMasks rows;
    if (!include.empty() || !exclude.empty()) {
      EXPECT_TRUE(IsOk(filters_->Apply(include, exclude, &mask, items->attributes())));
      std::shared_ptr<const ItemFilters::Predicates> predicates;
      EXPECT_TRUE(IsOk(filters_->Compile(include, exclude, &predicates)));
      rows = items->FindRows(*predicates);
    }
    Retriever retriever(items->item_ids(), [&](const float* query, int64_t wanted, float* scores, int64_t* labels) {
      return items->Search(query, wanted, parameters, mask.get(), mask == nullptr ? nullptr : &rows, scores, labels);
    });
    Found found = {std::vector<int64_t>(k), std::vector<float>(k)};
    std::vector<int32_t> heads(k);
    EXPECT_TRUE(IsOk(retriever.Retrieve(x, 1, kDim, k, found.ids.data(), found.scores.data(), heads.data())));
    const auto end = std::find(found.ids.begin(), found.ids.end(), kNoItem);
    found.scores.resize(end - found.ids.begin());
    found.ids.erase(end, found.ids.end());
    return found;
  }

  // Expects all visible items that pass, and the best of them, with scores that differ from the exact ones by at most
  // `tolerance`.
  void ExpectModel(const float* x, float tolerance, const TestFilter* filter = nullptr) const {
    std::map<int64_t, float> expected;
    for (const auto& [id, item] : model_) {
      if (filter != nullptr && !filter->passes(item)) continue;
      expected[id] = std::inner_product(x, x + kDim, item.vector.begin(), 0.0f);
    }
    const Filter none;
    const Filter& include = filter != nullptr ? filter->include : none;
    const Filter& exclude = filter != nullptr ? filter->exclude : none;
    const Found all = Search(x, static_cast<int64_t>(model_.size()) + 10, {}, include, exclude);
    const std::set<int64_t> there(all.ids.begin(), all.ids.end());
    EXPECT_EQ(there.size(), all.ids.size());
    EXPECT_EQ(there.size(), expected.size());
    for (size_t i = 0; i < all.ids.size(); ++i) {
      const auto at = expected.find(all.ids[i]);
      ASSERT_NE(at, expected.end()) << "item " << all.ids[i];
      EXPECT_NEAR(all.scores[i], at->second, tolerance) << "item " << all.ids[i];
    }
    SearchParameters every_list;
    if (index_->is_ivf()) every_list.nprobe = kLists;
    const Found best = Search(x, 10, every_list, include, exclude);
    EXPECT_EQ(best.ids.size(), std::min<size_t>(10, expected.size()));
    std::vector<float> scores;
    for (const auto& [id, score] : expected) scores.push_back(score);
    std::sort(scores.begin(), scores.end(), std::greater<>());
    for (size_t i = 0; i < best.ids.size(); ++i) EXPECT_NEAR(best.scores[i], scores[i], tolerance);
  }

  const FaissLibrary* library_ = nullptr;
  std::vector<float> vectors_;
  std::vector<int64_t> ids_;
  std::unique_ptr<FaissIndex> index_;
  std::unique_ptr<FilteredSearch> search_;
  ItemIds item_ids_;
  std::unique_ptr<ItemFilters> filters_;
  std::unique_ptr<FreshIndex> fresh_;
  std::map<int64_t, Item> model_;
  std::map<int64_t, int64_t> versions_;
  std::vector<std::unique_ptr<std::vector<float>>> vectors_of_changes_;
};

TEST_F(FreshIndexTest, RandomChangesGiveWhatAModelHas) {
  struct Kind {
    const char* factory;
    const char* parameters;
    float tolerance;
    int64_t entries;
  };
  // The second lists of the test are far from their items, so their codes are rough.
  for (const Kind& kind : {Kind{"IVF16,SQ8", "nprobe=4", 0.3f, 1}, Kind{"IVF16,PQ8x4", "nprobe=4", 4, 1},
                           Kind{"IVF16,PQ8x4", "nprobe=4", 10, 2},
                           Kind{"Flat", "", 1e-3f, 1}, Kind{"HNSW16", "efSearch=100", 1e-3f, 1}}) {
    SCOPED_TRACE(kind.factory);
    Build(kind.factory, kind.parameters, {}, kind.entries);
    EXPECT_EQ(fresh_->items(), nullptr);
    std::mt19937 random(5);
    const std::vector<float> queries = RandomVectors(3, kDim, 9);
    for (int step = 0; step < 14; ++step) {
      std::vector<ItemChange> changes = {Delete(2 * step)};
      model_.erase(2 * step);
      const int more = step < 7 ? 20 : 250;
      for (int i = 0; i < more; ++i) changes.push_back(RandomChange(&random));
      Apply(changes);
      EXPECT_EQ(fresh_->state().items, static_cast<int64_t>(model_.size()));
      if (step % 3 != 0) continue;
      const float* const x = &queries[step % 3 * kDim];
      ExpectModel(x, kind.tolerance);
      for (const TestFilter& filter : TestFilters()) ExpectModel(x, kind.tolerance, &filter);
    }
    const FreshIndexState state = fresh_->state();
    EXPECT_LE(state.segments, 15);
    EXPECT_GT(state.segments, 1);
    EXPECT_EQ(state.sealed + state.open + kItems - state.hidden / kind.entries, state.items);
  }
}

// A snapshot goes on showing what it showed.
TEST_F(FreshIndexTest, SnapshotsDoNotChange) {
  Build("IVF16,SQ8", "nprobe=16");
  std::mt19937 random(1);
  std::vector<ItemChange> changes;
  for (int i = 0; i < 100; ++i) changes.push_back(RandomChange(&random));
  Apply(changes);
  const std::shared_ptr<const FreshItems> before = fresh_->items();
  const std::vector<float> x = RandomVectors(1, kDim, 2);
  const auto search = [&] {
    std::pair<std::vector<float>, std::vector<int64_t>> found = {std::vector<float>(300), std::vector<int64_t>(300)};
    EXPECT_TRUE(IsOk(before->Search(x.data(), 300, {}, nullptr, nullptr, found.first.data(), found.second.data())));
    return found;
  };
  const auto expected = search();
  for (int step = 0; step < 10; ++step) {
    changes.clear();
    for (int i = 0; i < 100; ++i) changes.push_back(RandomChange(&random));
    Apply(changes);
  }
  EXPECT_EQ(search(), expected);
}

TEST_F(FreshIndexTest, ADeletedNeighbourhoodDoesNotMakeResultsMissing) {
  for (const char* const factory : {"IVF16,SQ8", "Flat", "HNSW16"}) {
    SCOPED_TRACE(factory);
    Build(factory, factory[0] == 'I' ? "nprobe=1" : "");
    const float* const x = vectors_.data();
    std::vector<ItemChange> changes;
    std::vector<std::pair<float, int64_t>> order;
    for (const auto& [id, item] : model_) {
      order.emplace_back(std::inner_product(x, x + kDim, item.vector.begin(), 0.0f), id);
    }
    std::sort(order.begin(), order.end(), std::greater<>());
    for (int i = 0; i < 700; ++i) {
      changes.push_back(Delete(order[i].second));
      model_.erase(order[i].second);
    }
    Apply(changes);
    const Found found = Search(x, 100);
    EXPECT_EQ(found.ids.size(), 100U);
    for (const int64_t id : found.ids) EXPECT_EQ(model_.count(id), 1U);
    // The nearest that are left come from segments too.
    Item near;
    near.vector.assign(x, x + kDim);
    Apply({Put(1, near)});
    EXPECT_EQ(Search(x, 100).ids[0], 1);
  }
}

TEST_F(FreshIndexTest, EverythingIsDeleted) {
  for (const char* const factory : {"IVF16,SQ8", "Flat", "HNSW16"}) {
    Build(factory, "");
    std::vector<ItemChange> changes;
    for (const auto& [id, item] : model_) changes.push_back(Delete(id));
    Apply(changes);
    EXPECT_TRUE(Search(vectors_.data(), 10).ids.empty());
    EXPECT_TRUE(Search(vectors_.data(), 10, {}, {"brand=b1"}).ids.empty());
    Apply({Put(4, BaseItem(2))});
    EXPECT_EQ(Search(vectors_.data(), 10).ids, (std::vector<int64_t>{4}));
    EXPECT_EQ(fresh_->state().items, 1);
    EXPECT_EQ(fresh_->state().hidden, kItems);
  }
}

TEST_F(FreshIndexTest, SegmentsDoNotKeepItemsThatHaveGone) {
  for (const char* const factory : {"IVF16,SQ8", "Flat"}) {
    Build(factory, "");
    for (int round = 0; round < 40; ++round) {
      std::vector<ItemChange> changes;
      for (int64_t id = 0; id < 100; ++id) changes.push_back(Put(2 * id + 1, BaseItem(id)));
      Apply(changes);
    }
    EXPECT_EQ(fresh_->state().items, kItems + 100);
    EXPECT_LE(fresh_->items()->item_ids().size(), kItems + 300);
    std::vector<ItemChange> changes;
    for (int64_t id = 0; id < 100; ++id) changes.push_back(Delete(2 * id + 1));
    Apply(changes);
    EXPECT_EQ(fresh_->state().segments, 0);
    EXPECT_EQ(fresh_->state().items, kItems);
  }
}

TEST_F(FreshIndexTest, IdsThatRepeatInTheBase) {
  WriteTestIndex(*library_, path_, "IVF16,SQ8", kDim, FaissMetric::kInnerProduct, vectors_, kItems);
  for (int64_t i = 0; i < kItems; ++i) ids_.push_back((kItems - i) / 2);
  Open("nprobe=16", {});
  Apply({Delete(10), Update(20, {{"brand", {}, {"other"}}})});
  EXPECT_EQ(fresh_->state().hidden, 2);
  const Found found = Search(vectors_.data(), kItems);
  EXPECT_EQ(std::count(found.ids.begin(), found.ids.end(), 10), 0);
  EXPECT_EQ(Search(vectors_.data(), 10, {}, {"brand=other"}).ids, (std::vector<int64_t>{20}));
}

TEST_F(FreshIndexTest, OutcomesOfChanges) {
  Build("IVF16,SQ8", "nprobe=16");
  Item item = BaseItem(3);
  const auto is_there = [&](int64_t id) {
    const Found found = Search(item.vector.data(), 2 * kItems);
    return std::count(found.ids.begin(), found.ids.end(), id) == 1;
  };
  // Unknown ids.
  Apply({Delete(7), Update(9, {{"price", {3}, {}}})});
  EXPECT_EQ(fresh_->state().ignored, 2);
  EXPECT_EQ(fresh_->state().items, kItems);
  // The same change twice.
  Apply({Put(7, item, 5), Put(7, item, 5)});
  EXPECT_TRUE(is_there(7));
  EXPECT_EQ(fresh_->state().items, kItems + 1);
  // Out of order.
  Apply({Delete(7, 4)});
  EXPECT_TRUE(is_there(7));
  EXPECT_EQ(fresh_->state().ignored, 3);
  Apply({Delete(7, 6)});
  EXPECT_FALSE(is_there(7));
  Apply({Put(7, item, 5)});
  EXPECT_FALSE(is_there(7));
  // A change without a version is always in order, and the version stays.
  Apply({Put(7, item)});
  EXPECT_TRUE(is_there(7));
  Apply({Delete(7, 5)});
  EXPECT_TRUE(is_there(7));
  // A deletion of an unknown id counts against older puts, an update does not.
  Apply({Delete(11, 9), Update(13, {}, 9), Put(11, item, 8), Put(13, item, 8)});
  EXPECT_FALSE(is_there(11));
  EXPECT_TRUE(is_there(13));
  // Vectors that cannot be indexed hide the item.
  Item bad = item;
  bad.vector.assign(kDim, 0);
  Apply({Put(13, bad), Put(0, bad)});
  bad.vector[3] = std::numeric_limits<float>::infinity();
  Apply({Put(2, bad), Put(15, bad)});
  EXPECT_EQ(fresh_->state().not_indexed, 4);
  for (const int64_t id : {0, 2, 13, 15}) EXPECT_FALSE(is_there(id));
  const int64_t ignored = fresh_->state().ignored;
  Apply({Update(0, {}), Delete(13)});
  EXPECT_EQ(fresh_->state().ignored, ignored + 2);
  Apply({Put(0, item)});
  EXPECT_TRUE(is_there(0));
}

TEST_F(FreshIndexTest, OffsetsAndBadBatches) {
  FreshIndex::Options options;
  options.offset = 40;
  Build("Flat", "", options);
  bool applied = true;
  ASSERT_TRUE(IsOk(fresh_->Apply(39, 41, {Delete(0)}, &applied)));
  EXPECT_FALSE(applied);
  ASSERT_TRUE(IsOk(fresh_->Apply(40, 45, {}, &applied)));
  EXPECT_TRUE(applied);
  EXPECT_EQ(fresh_->items(), nullptr);
  EXPECT_EQ(fresh_->state().offset, 45);
  ItemChange unknown = Delete(0);
  unknown.kind = static_cast<ItemChangeKind>(3);
  ItemChange without_vector = Put(1, BaseItem(1));
  without_vector.vector = nullptr;
  for (const ItemChange& change : {unknown, without_vector, Delete(-1)}) {
    EXPECT_EQ(fresh_->Apply(45, 47, {Delete(2), change}, &applied).code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(applied);
  }
  EXPECT_EQ(fresh_->Apply(45, 44, {}, &applied).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(fresh_->items(), nullptr);
  EXPECT_EQ(fresh_->state().offset, 45);
}

TEST_F(FreshIndexTest, KeysOfItemsThatWerePut) {
  Build("Flat", "");
  ItemChange put = Put(5, BaseItem(1));
  put.key = "five";
  put.time = 12.5;
  Apply({put, Put(7, BaseItem(1))});
  EXPECT_EQ(fresh_->FindKey(5), "five");
  EXPECT_EQ(fresh_->FindKey(7), "");
  EXPECT_EQ(fresh_->FindId("five"), 5);
  EXPECT_EQ(fresh_->FindId("seven"), -1);
  EXPECT_EQ(fresh_->state().last_time, 12.5);
}

TEST_F(FreshIndexTest, VersionsFromBeforeTheBase) {
  Build("Flat", "");
  fresh_->SetVersion(4, 10);
  fresh_->SetVersion(5, 20);
  Apply({Delete(4, 9), Put(5, BaseItem(1), 19)});
  EXPECT_EQ(fresh_->state().ignored, 2);
  EXPECT_EQ(fresh_->state().items, kItems);
  Apply({Delete(4, 10), Put(5, BaseItem(1), 20)});
  EXPECT_EQ(fresh_->state().items, kItems);
  EXPECT_EQ(fresh_->state().hidden, 1);
}

// Each item is in exactly one of the shards, whichever had it before.
TEST_F(FreshIndexTest, ShardsShareTheItems) {
  std::set<int64_t> seen;
  int64_t added = 0;
  for (const int64_t shard : {0, 1}) {
    FreshIndex::Options options;
    options.shard = shard;
    options.num_shards = 2;
    Build("IVF16,SQ8", "nprobe=16", options);
    std::vector<ItemChange> changes;
    for (int64_t id = 0; id < 40; ++id) changes.push_back(Put(id, BaseItem(id), 3));
    changes.push_back(Delete(100));
    changes.push_back(Delete(101, 3));
    Apply(changes);
    Apply({Put(101, BaseItem(1), 2)});
    const FreshIndexState state = fresh_->state();
    EXPECT_EQ(state.hidden, 21);
    added += state.open;
    for (const int64_t id : Search(vectors_.data(), 2 * kItems).ids) {
      if (id < 40) {
        EXPECT_TRUE(seen.insert(id).second) << id;
        EXPECT_EQ(Mix64(id) % 2, static_cast<uint64_t>(shard));
      }
      EXPECT_NE(id, 100);
      EXPECT_NE(id, 101);
    }
  }
  EXPECT_EQ(seen.size(), 40U);
  EXPECT_EQ(added, 40);
}

TEST_F(FreshIndexTest, DriftTellsNewVectorsFromThoseOfTheBase) {
  FreshIndex::Options options;
  Build("IVF16,PQ4x4", "", options);
  Apply({Put(1, BaseItem(1))});
  EXPECT_TRUE(std::isnan(fresh_->state().drift));

  options.base_residual = 1;
  for (const float scale : {1.0f, 3.0f}) {
    Build("IVF16,PQ4x4", "", options);
    std::vector<ItemChange> changes;
    for (int64_t i = 0; i < kItems; ++i) {
      Item item = BaseItem(i);
      for (float& value : item.vector) value *= scale;
      changes.push_back(Put(2 * i + 1, item));
    }
    Apply(changes);
    if (scale == 1) {
      options.base_residual = fresh_->state().drift;
      EXPECT_GT(options.base_residual, 0);
    } else {
      EXPECT_GT(fresh_->state().drift, 3);
    }
  }
}

// Searches see each batch as a whole: in every batch the brand "moving" goes from one item to another.
TEST_F(FreshIndexTest, ThreadsSearchWhileChangesAreApplied) {
  Build("IVF16,SQ8", "nprobe=4");
  Apply({Put(1, BaseItem(0)), Update(4, {{"brand", {}, {"moving"}}})});
  std::atomic<bool> done = false;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      const std::vector<float> queries = RandomVectors(20, kDim, 100 + thread);
      for (int i = 0; i < 30 || !done; ++i) {
        const float* const x = &queries[i % 20 * kDim];
        EXPECT_EQ(Search(x, 50).ids.size(), 50U);
        EXPECT_LE(Search(x, 50, {}, {"brand=b1|b2"}, {"price=..20"}).ids.size(), 50U);
        EXPECT_EQ(Search(x, 50, {}, {"brand=moving"}).ids.size(), 1U);
        static_cast<void>(fresh_->state());
        static_cast<void>(fresh_->FindKey(1));
      }
    });
  }
  std::mt19937 random(3);
  int64_t moving = 4;
  for (int step = 0; step < 40; ++step) {
    std::vector<ItemChange> changes;
    const int64_t next = 2 * (step % 100) + 6;
    changes.push_back(Update(moving, {{"brand", {}, {"b1"}}}));
    changes.push_back(Update(next, {{"brand", {}, {"moving"}}}));
    moving = next;
    for (int i = 0; i < 20; ++i) {
      changes.push_back(Put(kItems + 2 * static_cast<int64_t>(random() % 500) + 1, RandomItem(&random)));
      changes.push_back(Delete(kItems + 2 * static_cast<int64_t>(random() % 500) + 1));
      changes.back().key = std::to_string(i);
      const auto price = static_cast<double>(random() % 50);
      changes.push_back(Update(1000 + 2 * static_cast<int64_t>(random() % 200), {{"price", {price}, {}}}));
    }
    Apply(changes);
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace dpsr
