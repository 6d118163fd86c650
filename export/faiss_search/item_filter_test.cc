#include "export/faiss_search/item_filter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "common/packed_file.h"
#include "common/test_util.h"

namespace dpsr {
namespace {

constexpr int64_t kItems = 1000;  // no multiple of 64
constexpr uint64_t kFingerprint = 7;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

bool IsSet(const std::vector<uint64_t>& words, int64_t bit) { return (words[bit / 64] >> (bit % 64) & 1) != 0; }

// Writes attributes of kItems items:
//   colour   "blue", "green", "red" (codes 1 to 3 of one byte), none every fourth item
//   shop     "s000" to "s299" (two bytes)
//   maker    "m000" to "m299" (four bytes)
//   price    position / 8 as float, NaN for every tenth
//   weight   position / 10 as double
//   tags     of "t0" to "t4", position % 3 of them
class ItemFilterTest : public FileTest {
 protected:
  void SetUp() override {
    FileTest::SetUp();
    Write(kFingerprint);
  }

  void Write(uint64_t fingerprint) {
    std::vector<uint8_t> colour;
    std::vector<uint16_t> shop;
    std::vector<int32_t> maker;
    std::vector<float> price;
    std::vector<double> weight;
    std::vector<int64_t> tag_splits = {0};
    std::vector<uint8_t> tags;
    for (int64_t i = 0; i < kItems; ++i) {
      colour.push_back(static_cast<uint8_t>(i % 4));
      shop.push_back(static_cast<uint16_t>(1 + i % 300));
      maker.push_back(static_cast<int32_t>(1 + i * 7 % 300));
      price.push_back(i % 10 == 0 ? static_cast<float>(kNan) : static_cast<float>(i) / 8);
      weight.push_back(static_cast<double>(i) / 10);
      for (int64_t tag = 0; tag < i % 3; ++tag) tags.push_back(static_cast<uint8_t>(1 + (i + tag) % 5));
      tag_splits.push_back(static_cast<int64_t>(tags.size()));
    }
    PackedFileWriter writer(path_, "item_attributes");
    ASSERT_TRUE(IsOk(writer.Open()));
    Add(&writer, "item_ids.fingerprint", std::vector<uint64_t>{fingerprint});
    Add(&writer, "value.colour", colour);
    AddTexts(&writer, "text.colour", {"blue", "green", "red"});
    Add(&writer, "value.shop", shop);
    AddTexts(&writer, "text.shop", Numbered("s"));
    Add(&writer, "value.maker", maker);
    AddTexts(&writer, "text.maker", Numbered("m"));
    Add(&writer, "value.price", price);
    Add(&writer, "value.weight", weight);
    Add(&writer, "value.tags", tags);
    Add(&writer, "splits.tags", tag_splits);
    AddTexts(&writer, "text.tags", {"t0", "t1", "t2", "t3", "t4"});
    ASSERT_TRUE(IsOk(writer.Finish()));
  }

  static std::vector<std::string> Numbered(const std::string& prefix) {
    std::vector<std::string> texts;
    for (int i = 0; i < 300; ++i) {
      const std::string digits = std::to_string(i);
      texts.push_back(prefix + std::string(3 - digits.size(), '0') + digits);
    }
    return texts;
  }

  std::unique_ptr<ItemFilters> Open(const ItemOrder& order = {}, size_t cache_bytes = ItemFilters::kCacheBytes) {
    std::unique_ptr<ItemFilters> filters;
    EXPECT_TRUE(IsOk(ItemFilters::Open(path_, kItems, kFingerprint, order, &filters, cache_bytes)));
    return filters;
  }

  using Filter = std::vector<std::string_view>;

  static Status Error(const ItemFilters& filters, const Filter& include, const Filter& exclude = {}) {
    std::shared_ptr<const ItemMask> mask;
    return filters.Apply(include, exclude, &mask);
  }

  // Expects exactly the positions for which `passes` says so.
  static void Expect(const ItemFilters& filters, const Filter& include, const Filter& exclude,
                     const std::function<bool(int64_t)>& passes, const std::vector<int32_t>& order = {}) {
    std::shared_ptr<const ItemMask> mask;
    ASSERT_TRUE(IsOk(filters.Apply(include, exclude, &mask)));
    ASSERT_EQ(mask->words.size(), 16U);
    int64_t count = 0;
    for (int64_t slot = 0; slot < 1024; ++slot) {
      const bool passed = IsSet(mask->words, slot);
      const bool expected = slot < kItems && passes(order.empty() ? slot : order[slot]);
      ASSERT_EQ(passed, expected) << "slot " << slot;
      count += passed ? 1 : 0;
    }
    EXPECT_EQ(mask->count, count);
  }
};

bool HasTag(int64_t position, int tag) {
  for (int64_t i = 0; i < position % 3; ++i) {
    if ((position + i) % 5 == tag) return true;
  }
  return false;
}

TEST_F(ItemFilterTest, ComparesCodesOfEachWidth) {
  const auto filters = Open();
  Expect(*filters, {"colour=red"}, {}, [](int64_t i) { return i % 4 == 3; });
  Expect(*filters, {"colour=red|blue"}, {}, [](int64_t i) { return i % 4 == 3 || i % 4 == 1; });
  Expect(*filters, {"colour=blue|blue|no such"}, {}, [](int64_t i) { return i % 4 == 1; });
  Expect(*filters, {"shop=s017"}, {}, [](int64_t i) { return i % 300 == 17; });
  Expect(*filters, {"maker=m000|m299"}, {}, [](int64_t i) { return i * 7 % 300 == 0 || i * 7 % 300 == 299; });
  const std::string_view many = "shop=s000|s001|s002|s003|s004|s005|s299";
  Expect(*filters, {many}, {}, [](int64_t i) { return i % 300 <= 5 || i % 300 == 299; });
  Expect(*filters, {}, {many}, [](int64_t i) { return i % 300 > 5 && i % 300 != 299; });
}

TEST_F(ItemFilterTest, AValueThatNoItemHasIsMetByNone) {
  const auto filters = Open();
  for (const char* text : {"shop=s0", "shop=s0000", "shop=a", "shop=z", "maker=\xFF\xFE", "tags=t"}) {
    Expect(*filters, {text}, {}, [](int64_t) { return false; });
    Expect(*filters, {}, {text}, [](int64_t) { return true; });
  }
}

TEST_F(ItemFilterTest, AnItemWithoutAValueMeetsNothing) {
  const auto filters = Open();
  Expect(*filters, {"colour=red|green|blue"}, {}, [](int64_t i) { return i % 4 != 0; });
  Expect(*filters, {}, {"colour=red|green|blue"}, [](int64_t i) { return i % 4 == 0; });
  Expect(*filters, {"price=-1e300..1e300"}, {}, [](int64_t i) { return i % 10 != 0; });
  Expect(*filters, {}, {"price=0.."}, [](int64_t i) { return i % 10 == 0; });
}

TEST_F(ItemFilterTest, RangesIncludeBothEnds) {
  const auto filters = Open();
  const auto price = [](int64_t i, double low, double high) {
    return i % 10 != 0 && static_cast<double>(i) / 8 >= low && static_cast<double>(i) / 8 <= high;
  };
  Expect(*filters, {"price=10.125..20"}, {}, [&](int64_t i) { return price(i, 10.125, 20); });
  Expect(*filters, {"price=..20"}, {}, [&](int64_t i) { return price(i, -1, 20); });
  Expect(*filters, {"price=20.."}, {}, [&](int64_t i) { return price(i, 20, 1e9); });
  Expect(*filters, {"price=20.125"}, {}, [&](int64_t i) { return i == 161; });
  Expect(*filters, {"price=1e1..1.5e1|..1|100.."}, {},
         [&](int64_t i) { return price(i, 10, 15) || price(i, -1, 1) || price(i, 100, 1e9); });
  // Between two floats lies no float: 20.125 as a bound is not that of 20.1250001.
  Expect(*filters, {"price=20.1250001..20.2499999"}, {}, [](int64_t) { return false; });
  Expect(*filters, {"price=20.1249999..20.2500001"}, {}, [](int64_t i) { return i == 161 || i == 162; });
  Expect(*filters, {"price=-0.0..0.125"}, {}, [](int64_t i) { return i == 1; });
  Expect(*filters, {"weight=0.3"}, {}, [](int64_t i) { return i == 3; });
  Expect(*filters, {"weight=0.3..0.7"}, {}, [](int64_t i) { return i >= 3 && i <= 7; });
  Expect(*filters, {"weight=1e39.."}, {}, [](int64_t) { return false; });
  Expect(*filters, {"price=1e39.."}, {}, [](int64_t) { return false; });
  Expect(*filters, {"price=-1e39..1"}, {}, [&](int64_t i) { return price(i, -1, 1); });
}

TEST_F(ItemFilterTest, AnyOfManyValuesCounts) {
  const auto filters = Open();
  Expect(*filters, {"tags=t2"}, {}, [](int64_t i) { return HasTag(i, 2); });
  Expect(*filters, {"tags=t2|t4"}, {"tags=t3"},
         [](int64_t i) { return (HasTag(i, 2) || HasTag(i, 4)) && !HasTag(i, 3); });
}

TEST_F(ItemFilterTest, AllExpressionsCount) {
  const auto filters = Open();
  Expect(*filters, {"colour=red", "price=10..", "tags=t1"}, {"shop=s017|s035", "weight=50..60"}, [](int64_t i) {
    return i % 4 == 3 && i % 10 != 0 && i >= 80 && HasTag(i, 1) && i % 300 != 17 && i % 300 != 35 &&
           !(i >= 500 && i <= 600);
  });
  Expect(*filters, {"", "colour=red", ""}, {""}, [](int64_t i) { return i % 4 == 3; });
  Expect(*filters, {}, {}, [](int64_t) { return true; });
  Expect(*filters, {"colour=red", "colour=blue"}, {}, [](int64_t) { return false; });
}

TEST_F(ItemFilterTest, FollowsTheOrderOfTheIndex) {
  ItemOrder order;
  for (int32_t i = 0; i < kItems; ++i) order.positions.push_back(i);
  std::shuffle(order.positions.begin(), order.positions.end(), std::mt19937(1));
  order.group_begins = {0, 0, 100, 990, 990};  // the last ten are of no group
  const auto filters = Open(order);
  std::shared_ptr<const ItemMask> mask;
  for (const char* text : {"colour=red", "maker=m004|m100", "price=..50", "weight=10..20", "tags=t0|t1"}) {
    const auto in_order = Open();
    std::shared_ptr<const ItemMask> by_position;
    ASSERT_TRUE(IsOk(in_order->Apply({text}, {}, &by_position)));
    ASSERT_TRUE(IsOk(filters->Apply({text}, {}, &mask)));
    int64_t of_groups = 0;
    for (int64_t slot = 0; slot < kItems; ++slot) {
      const int32_t position = order.positions[slot];
      const bool passed = IsSet(mask->words, slot);
      ASSERT_EQ(passed, IsSet(by_position->words, position)) << text << " " << slot;
      of_groups += passed && slot < 990 ? 1 : 0;
    }
    EXPECT_EQ(mask->count, of_groups);
    ASSERT_EQ(mask->group_counts.size(), 4U);
    EXPECT_EQ(mask->group_counts[0] + mask->group_counts[3], 0);
    EXPECT_EQ(mask->group_counts[1] + mask->group_counts[2], of_groups);
  }
}

TEST_F(ItemFilterTest, RefusesWhatItDoesNotUnderstand) {
  const auto filters = Open();
  const std::pair<std::string, std::string> cases[] = {
      {"size=3", "there is no such attribute, expected one of: colour, shop, maker, price, weight, tags"},
      {"Colour=red", "no such attribute"},
      {"colour", "has no ="},
      {"=red", "has no name"},
      {"colour=", "has an empty value"},
      {"colour=red|", "has an empty value"},
      {"colour=|red", "has an empty value"},
      {"colour=a\\b", "has a backslash that is not followed by"},
      {"colour=\\", "has a backslash"},
      {"price=cheap", "\"price\" is a number, but \"cheap\" is neither"},
      {"price=2..1", "neither a number nor a range"},
      {"price=..", "neither a number nor a range"},
      {"price=1...2", ""},  // 1 to 0.2
      {"price=nan", "neither a number nor a range"},
      {"price=inf..", "neither a number nor a range"},
      {"price=1e999", "neither a number nor a range"},
      {"price=0x10", "neither a number nor a range"},
      {"price=+1", "neither a number nor a range"},
      {"price=1 ", "neither a number nor a range"},
      {std::string(kMaxExpressionBytes + 1, '='), "has 65537 bytes, expected at most 65536"},
  };
  for (const auto& [text, message] : cases) {
    for (const bool exclude : {false, true}) {
      const Status status = exclude ? Error(*filters, {}, {text}) : Error(*filters, {text});
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << text;
      EXPECT_TRUE(Contains(status.message(), message));
      EXPECT_LT(status.message().size(), 500U);
    }
  }
  const std::vector<std::string> prices = [] {
    std::vector<std::string> texts;
    for (size_t i = 0; i <= kMaxExpressions; ++i) texts.push_back("price=" + std::to_string(i) + "..");
    return texts;
  }();
  Filter many(prices.begin(), prices.end());
  EXPECT_TRUE(Contains(Error(*filters, many).message(), "257 filters to include, expected at most 256"));
  many.pop_back();
  EXPECT_TRUE(IsOk(Error(*filters, many)));
}

TEST_F(ItemFilterTest, MessagesAreText) {
  const auto filters = Open();
  EXPECT_TRUE(Contains(Error(*filters, {"\xFF\xFE\x01手机=1"}).message(), "\"???手机\""));
  EXPECT_TRUE(Contains(Error(*filters, {"\xED\xA0\x80=1"}).message(), "\"???\""));
  EXPECT_TRUE(Contains(Error(*filters, {std::string(300, 'x') + "=1"}).message(), "xxx...\""));
}

TEST_F(ItemFilterTest, WithoutAttributesEveryNameIsUnknown) {
  std::unique_ptr<ItemFilters> filters;
  ASSERT_TRUE(IsOk(ItemFilters::Open("", kItems, 0, {}, &filters)));
  EXPECT_TRUE(Contains(Error(*filters, {"colour=red"}).message(), "no attributes to filter by"));
  EXPECT_TRUE(IsOk(Error(*filters, {""})));
}

TEST_F(ItemFilterTest, RefusesFilesOfOtherItems) {
  std::unique_ptr<ItemFilters> filters;
  Status status = ItemFilters::Open(path_, kItems, kFingerprint + 1, {}, &filters);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Contains(status.message(), "belongs to another index"));
  status = ItemFilters::Open(path_, kItems + 1, kFingerprint, {}, &filters);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Contains(status.message(), "has 1000 items, but the index has 1001"));
}

TEST_F(ItemFilterTest, EveryDamageIsRefused) {
  const std::string whole = ReadBytes();
  std::unique_ptr<ItemFilters> filters;
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {
    std::string damaged = whole;
    damaged[random() % whole.size()] ^= static_cast<char>(1 + random() % 255);
    WriteBytes(i % 3 == 0 ? whole.substr(0, random() % whole.size()) : damaged);
    const Status status = ItemFilters::Open(path_, kItems, kFingerprint, {}, &filters);
    EXPECT_TRUE(status.code() == StatusCode::kDataLoss || status.code() == StatusCode::kFailedPrecondition)
        << status.message();
  }
}

TEST_F(ItemFilterTest, KeepsWhatIsAskedAgainWithinItsMemory) {
  const auto filters = Open({}, 4000);
  std::shared_ptr<const ItemMask> first;
  std::shared_ptr<const ItemMask> again;
  ASSERT_TRUE(IsOk(filters->Apply({"colour=red", "price=1.."}, {"tags=t1"}, &again)));
  EXPECT_EQ(filters->cached_bytes(), 0U);
  ASSERT_TRUE(IsOk(filters->Apply({"colour=red", "price=1.."}, {"tags=t1"}, &first)));
  EXPECT_NE(first, again);
  ASSERT_TRUE(IsOk(filters->Apply({"price=1..", "", "colour=red", "colour=red"}, {"tags=t1"}, &again)));
  EXPECT_EQ(first, again);
  ASSERT_TRUE(IsOk(filters->Apply({"colour=red", "price=1..", "tags=t1"}, {}, &again)));
  EXPECT_NE(first, again);
  for (int i = 0; i < 100; ++i) {
    std::shared_ptr<const ItemMask> other;
    const std::string text = "weight=" + std::to_string(i) + "..";
    ASSERT_TRUE(IsOk(filters->Apply({text}, {}, &other)));
    ASSERT_TRUE(IsOk(filters->Apply({text}, {}, &other)));
    EXPECT_LE(filters->cached_bytes(), 4000U);
    EXPECT_GT(filters->cached_bytes(), 0U);
  }
  ASSERT_TRUE(IsOk(filters->Apply({"colour=red", "price=1.."}, {"tags=t1"}, &again)));
  EXPECT_NE(first, again);  // it had to go
  EXPECT_EQ(first->words, again->words);
  EXPECT_EQ(Open({}, 10)->cached_bytes(), 0U);
}

// Where there are many items, in groups, the bits of one that many pass are computed when they are asked for.
TEST_F(ItemFilterTest, ManyThatPassAreNotLookedForBeforehand) {
  const int64_t items = ItemFilters::kManyItems + 1001;
  std::mt19937 random(3);
  std::vector<uint8_t> colour(items);
  std::vector<float> price(items);
  std::vector<uint8_t> tags;
  std::vector<int64_t> tag_splits = {0};
  for (int64_t i = 0; i < items; ++i) {
    colour[i] = static_cast<uint8_t>(random() % 4);
    price[i] = random() % 50 == 0 ? static_cast<float>(kNan) : static_cast<float>(random() % 10000) / 100;
    for (uint32_t tag = random() % 3; tag > 0; --tag) tags.push_back(static_cast<uint8_t>(1 + random() % 2));
    tag_splits.push_back(static_cast<int64_t>(tags.size()));
  }
  PackedFileWriter writer(path_, "item_attributes");
  ASSERT_TRUE(IsOk(writer.Open()));
  Add(&writer, "item_ids.fingerprint", std::vector<uint64_t>{kFingerprint});
  Add(&writer, "value.colour", colour);
  AddTexts(&writer, "text.colour", {"blue", "green", "red"});
  Add(&writer, "value.price", price);
  Add(&writer, "value.tags", tags);
  Add(&writer, "splits.tags", tag_splits);
  AddTexts(&writer, "text.tags", {"t0", "t1"});
  ASSERT_TRUE(IsOk(writer.Finish()));
  struct Case {
    Filter include;
    Filter exclude;
    bool many;
    std::function<bool(int64_t)> passes;
  };
  const auto within = [&price](int64_t i, float low, float high) { return price[i] >= low && price[i] <= high; };
  const std::vector<Case> cases = {
      {{"colour=red"}, {}, true, [&](int64_t i) { return colour[i] == 3; }},
      {{"colour=red", "price=..50"}, {}, true, [&](int64_t i) { return colour[i] == 3 && within(i, 0, 50); }},
      {{}, {"price=10..20"}, true, [&](int64_t i) { return !within(i, 10, 20); }},
      {{"price=10..20"}, {}, true, [&](int64_t i) { return within(i, 10, 20); }},
      {{"price=10..11"}, {}, false, [&](int64_t i) { return within(i, 10, 11); }},
      {{"price=3|10..11"}, {"colour=blue"}, false,
       [&](int64_t i) { return (within(i, 3, 3) || within(i, 10, 11)) && colour[i] != 1; }},
      {{"price=10..11", "price=10.5.."}, {"price=10.75"}, false,
       [&](int64_t i) { return within(i, 10.5, 11) && price[i] != 10.75f; }},
      {{"tags=t0", "price=..10"}, {"tags=t1"}, false,
       [&](int64_t i) {
         const auto has = [&](int tag) {
           return std::count(tags.begin() + tag_splits[i], tags.begin() + tag_splits[i + 1], tag) > 0;
         };
         return has(1) && !has(2) && within(i, 0, 10);
       }},
      {{"colour=pink"}, {}, false, [](int64_t) { return false; }},
  };
  // An item has as many slots as the index has entries for it.
  for (const int64_t entries : {1, 2}) {
    ItemOrder order;
    const int64_t slots = entries * items;
    for (int64_t begin = 0; begin < slots; begin += 1 + begin % 997) order.group_begins.push_back(begin);
    order.group_begins.push_back(slots);
    order.positions.resize(slots);
    for (int64_t i = 0; i < slots; ++i) order.positions[i] = static_cast<int32_t>(i % items);
    std::shuffle(order.positions.begin(), order.positions.end(), random);
    std::unique_ptr<ItemFilters> filters;
    ASSERT_TRUE(IsOk(ItemFilters::Open(path_, items, kFingerprint, order, &filters)));
    for (const Case& one : cases) {
      std::shared_ptr<const ItemMask> first;
      std::shared_ptr<const ItemMask> second;
      ASSERT_TRUE(IsOk(filters->Apply(one.include, one.exclude, &first)));
      ASSERT_TRUE(IsOk(filters->Apply(one.include, one.exclude, &second)));
      EXPECT_EQ(first->keep != nullptr, one.many);
      EXPECT_EQ(second->keep, nullptr) << "asked again, all is known";
      EXPECT_NEAR(static_cast<double>(first->count), static_cast<double>(second->count), 0.1 * second->count);
      int64_t count = 0;
      for (size_t group = 0; group + 1 < order.group_begins.size(); ++group) {
        const int64_t end = order.group_begins[group + 1];
        const int64_t begin = order.group_begins[group] / 64 * 64;
        std::vector<uint64_t> words((end - begin + 63) / 64, ~uint64_t{0});
        if (first->keep) first->keep(begin, end, words.data());
        int64_t in_group = 0;
        for (int64_t slot = order.group_begins[group]; slot < end; ++slot) {
          const bool expected = one.passes(order.positions[slot]);
          ASSERT_EQ(IsSet(second->words, slot), expected) << "slot " << slot;
          ASSERT_EQ(first->keep ? IsSet(words, slot - begin) : IsSet(first->words, slot), expected) << "slot " << slot;
          in_group += expected ? 1 : 0;
        }
        EXPECT_EQ(second->group_counts[group], in_group);
        count += in_group;
      }
      EXPECT_EQ(second->count, count);
    }
  }
}

// Changes count in every way that a filter is computed: at once, group by group, and from the lists of slots by value,
// before and after so many slots have changed that these lists are not used any more.
TEST_F(ItemFilterTest, ChangedValuesCount) {
  const int64_t items = ItemFilters::kManyItems + 1001;
  std::vector<float> price(items);
  std::vector<uint8_t> colour(items), tags;
  std::vector<int64_t> tag_splits = {0};
  for (int64_t i = 0; i < items; ++i) {
    price[i] = static_cast<float>(i % 100);
    colour[i] = static_cast<uint8_t>(i % 3);
    for (int64_t tag = 0; tag < i % 3; ++tag) tags.push_back(static_cast<uint8_t>(1 + tag));
    tag_splits.push_back(static_cast<int64_t>(tags.size()));
  }
  PackedFileWriter writer(path_, "item_attributes");
  ASSERT_TRUE(IsOk(writer.Open()));
  Add(&writer, "item_ids.fingerprint", std::vector<uint64_t>{kFingerprint});
  Add(&writer, "value.price", price);
  Add(&writer, "value.colour", colour);
  AddTexts(&writer, "text.colour", {"blue", "red"});
  Add(&writer, "value.tags", tags);
  Add(&writer, "splits.tags", tag_splits);
  AddTexts(&writer, "text.tags", {"t0", "t1"});
  ASSERT_TRUE(IsOk(writer.Finish()));
  ItemOrder order;
  order.group_begins = {0, 1000, items / 2, items};
  std::unique_ptr<ItemFilters> filters;
  ASSERT_TRUE(IsOk(ItemFilters::Open(path_, items, kFingerprint, order, &filters)));

  std::vector<double> prices(price.begin(), price.end());
  const std::string texts[] = {"", "blue", "red", "pink"};
  std::vector<int> colours(colour.begin(), colour.end());
  std::vector<std::vector<std::string>> tag_texts(items);
  for (int64_t i = 0; i < items; ++i) {
    for (int64_t tag = 0; tag < i % 3; ++tag) tag_texts[i].push_back("t" + std::to_string(tag));
  }
  struct Case {
    Filter include;
    Filter exclude;
    std::function<bool(int64_t)> passes;
  };
  const auto has = [&](int64_t i, const char* text) {
    return std::count(tag_texts[i].begin(), tag_texts[i].end(), text) > 0;
  };
  const Case cases[] = {
      {{"price=10..60"}, {}, [&](int64_t i) { return prices[i] >= 10 && prices[i] <= 60; }},  // many
      {{"price=7|1000.25"}, {}, [&](int64_t i) { return prices[i] == 7 || prices[i] == 1000.25; }},
      {{"colour=pink"}, {}, [&](int64_t i) { return colours[i] == 3; }},
      {{"colour=red|pink"}, {"price=..50"}, [&](int64_t i) { return colours[i] >= 2 && !(prices[i] <= 50); }},
      {{"tags=t1|new"}, {"colour=pink"}, [&](int64_t i) { return (has(i, "t1") || has(i, "new")) && colours[i] != 3; }},
      {{}, {"price=10..60"}, [&](int64_t i) { return !(prices[i] >= 10 && prices[i] <= 60); }},
  };
  std::mt19937 random(2);
  std::shared_ptr<const ChangedAttributes> changes;
  std::shared_ptr<const ChangedAttributes> before;
  uint64_t generation = 0;
  // Masks are brought up to date if they are from few batches before, and else are computed anew.
  for (const int count : {100, 1, 3000, 1, 20, 5}) {
    before = changes;
    AttributeEditor editor(filters.get(), changes, /*rows=*/false, ++generation);
    for (int i = 0; i < count; ++i) {
      const auto slot = static_cast<int64_t>(random() % items);
      prices[slot] = random() % 4 == 0 ? kNan : random() % 2 == 0 ? 1000.25 : static_cast<double>(random() % 100);
      colours[slot] = static_cast<int>(random() % 4);
      tag_texts[slot].clear();
      for (size_t tag = 0; tag < random() % 3; ++tag) tag_texts[slot].push_back(tag == 0 ? "new" : "t1");
      std::vector<AttributeValue> values = {{"price", {}, {}}, {"colour", {}, {}}, {"tags", {}, tag_texts[slot]}};
      if (!std::isnan(prices[slot])) values[0].texts = {std::to_string(prices[slot])};
      if (colours[slot] != 0) values[1].texts = {texts[colours[slot]]};
      editor.Set(slot, values);
    }
    changes = editor.Finish();
    EXPECT_EQ((*changes)[0].many_slots, generation > 2);
    for (const Case& one : cases) {
      std::shared_ptr<const ItemMask> first;
      std::shared_ptr<const ItemMask> second;
      ASSERT_TRUE(IsOk(filters->Apply(one.include, one.exclude, &first, changes)));
      ASSERT_TRUE(IsOk(filters->Apply(one.include, one.exclude, &second, changes)));
      ASSERT_EQ(second->keep, nullptr);
      std::vector<uint64_t> words = first->words;
      if (first->keep) {
        words.assign((items + 63) / 64, ~uint64_t{0});
        first->keep(0, items, words.data());
      }
      int64_t passing = 0;
      for (int64_t slot = 0; slot < items; ++slot) {
        const bool expected = one.passes(slot);
        ASSERT_EQ(IsSet(words, slot), expected) << "slot " << slot << " of " << count;
        ASSERT_EQ(IsSet(second->words, slot), expected) << "slot " << slot << " of " << count;
        passing += expected ? 1 : 0;
      }
      EXPECT_EQ(second->count, passing);
      for (size_t group = 0; group + 1 < order.group_begins.size(); ++group) {
        const int64_t in_group = CountBits({second->words.data(), second->words.size()}, order.group_begins[group],
                                           order.group_begins[group + 1]);
        EXPECT_EQ(second->group_counts[group], in_group);
      }
    }
  }
  for (int batch = 0; batch < 60; ++batch) {
    AttributeEditor editor(filters.get(), changes, /*rows=*/false, ++generation);
    prices[batch] = 1000.25;
    editor.Set(batch, {{"price", {1000.25}, {}}});
    changes = editor.Finish();
  }
  std::shared_ptr<const ItemMask> late;
  ASSERT_TRUE(IsOk(filters->Apply(cases[1].include, {}, &late, changes)));
  for (int64_t slot = 0; slot < 200; ++slot) EXPECT_EQ(IsSet(late->words, slot), cases[1].passes(slot)) << slot;
  // A search that began before the last changes does not see them, and does not displace what they are cached with.
  std::shared_ptr<const ItemMask> newer, older, again;
  ASSERT_TRUE(IsOk(filters->Apply({"colour=pink"}, {}, &newer, changes)));
  ASSERT_TRUE(IsOk(filters->Apply({"colour=pink"}, {}, &older, before)));
  ASSERT_TRUE(IsOk(filters->Apply({"colour=pink"}, {}, &again, changes)));
  EXPECT_NE(older, newer);
  EXPECT_EQ(again, newer);
  ASSERT_TRUE(IsOk(filters->Apply({"colour=pink"}, {}, &older)));
  EXPECT_EQ(older->count, 0);
}

// The rows of added items, which have no values in the file.
TEST_F(ItemFilterTest, RowsOfAddedItems) {
  const auto filters = Open();
  constexpr int64_t kRows = 2 * AttributePage::kPageSlots + 70;
  std::shared_ptr<const ChangedAttributes> rows;
  for (const int64_t begin : {int64_t{0}, int64_t{100}, AttributePage::kPageSlots, kRows}) {
    // Each editor goes on where the one before has ended.
    static constexpr int64_t kEnds[] = {100, AttributePage::kPageSlots, kRows, kRows};
    AttributeEditor editor(filters.get(), rows, /*rows=*/true, 1);
    for (int64_t row = begin; row < kEnds[begin == 0 ? 0 : begin == 100 ? 1 : 2]; ++row) {
      editor.AddRow();
      if (row % 5 == 0) continue;
      editor.Set(row, {{"price", {static_cast<double>(row)}, {}},
                       {"colour", {}, {row % 2 == 0 ? "red" : "violet"}},
                       {"tags", {}, {"t1", "x" + std::to_string(row % 7)}}});
    }
    rows = editor.Finish();
  }
  AttributeEditor copy(filters.get(), nullptr, /*rows=*/true, 2);
  for (int64_t row = 1; row < kRows; row += 2) copy.CopyRow(*rows, row);
  const std::shared_ptr<const ChangedAttributes> odd = copy.Finish();
  const auto expect = [&](const Filter& include, const Filter& exclude, const std::function<bool(int64_t)>& passes) {
    std::shared_ptr<const ItemFilters::Predicates> predicates;
    ASSERT_TRUE(IsOk(filters->Compile(include, exclude, &predicates)));
    std::vector<uint64_t> words;
    ItemFilters::FindRows(*predicates, *rows, kRows, &words);
    std::vector<uint64_t> odd_words;
    ItemFilters::FindRows(*predicates, *odd, kRows / 2, &odd_words);
    ASSERT_EQ(words.size(), static_cast<size_t>((kRows + 63) / 64));
    for (int64_t row = 0; row < static_cast<int64_t>(64 * words.size()); ++row) {
      const bool expected = row < kRows && passes(row);
      ASSERT_EQ(IsSet(words, row), expected) << "row " << row;
      if (row % 2 == 1 && row / 2 < kRows / 2) {
        ASSERT_EQ(IsSet(odd_words, row / 2), expected) << "row " << row;
      }
    }
  };
  expect({"colour=violet"}, {}, [](int64_t row) { return row % 5 != 0 && row % 2 == 1; });
  expect({"price=..50.5"}, {}, [](int64_t row) { return row % 5 != 0 && row <= 50; });
  expect({"tags=x3"}, {"colour=red"}, [](int64_t row) { return row % 5 != 0 && row % 7 == 3 && row % 2 == 1; });
  expect({}, {"tags=t1"}, [](int64_t row) { return row % 5 == 0; });
  expect({"maker=m001"}, {}, [](int64_t) { return false; });
  EXPECT_EQ(Error(*filters, {"colour=violet", "nothing=1"}).code(), StatusCode::kInvalidArgument);
}

TEST_F(ItemFilterTest, ThreadsShareOne) {
  const auto filters = Open({}, 3000);
  std::vector<std::thread> threads;
  for (int seed = 0; seed < 8; ++seed) {
    threads.emplace_back([&filters, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 200; ++i) {
        const auto low = static_cast<int64_t>(random() % 20);
        const std::string text = "weight=" + std::to_string(low) + "..";
        std::shared_ptr<const ItemMask> mask;
        ASSERT_TRUE(IsOk(filters->Apply({text, "colour=red"}, {}, &mask)));
        int64_t expected = 0;
        for (int64_t item = 10 * low; item < kItems; ++item) expected += item % 4 == 3 ? 1 : 0;
        ASSERT_EQ(mask->count, expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(CountBitsTest, EqualsALoop) {
  std::mt19937_64 random(5);
  std::vector<uint64_t> words(5);
  for (uint64_t& word : words) word = random();
  for (int64_t begin = 0; begin <= 320; ++begin) {
    int64_t expected = 0;
    for (int64_t end = begin; end <= 320; ++end) {
      EXPECT_EQ(CountBits({words.data(), words.size()}, begin, end), expected);
      if (end < 320 && IsSet(words, end)) ++expected;
    }
  }
}

TEST(FilterExpressionTest, ResolvesEscapes) {
  FilterExpression expression;
  ASSERT_TRUE(IsOk(FilterExpression::Parse("a.b c=x\\|y|\\\\|=|z", &expression)));
  EXPECT_EQ(expression.name, "a.b c");
  EXPECT_EQ(expression.values, (std::vector<std::string>{"x|y", "\\", "=", "z"}));
}

}  // namespace
}  // namespace dpsr
