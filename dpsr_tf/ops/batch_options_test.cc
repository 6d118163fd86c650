#include "dpsr_tf/ops/batch_options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "common/test_util.h"
#include "dpsr_tf/ops/batch_components.h"

namespace dpsr {
namespace {

using Options = std::vector<std::pair<std::string, std::string>>;  // names and values, in JSON

// All options, with values that are not the defaults.
Options Good() {
  return {{"batch_size", "8"},
          {"num_title_queries", "2"},
          {"pretrain_steps", "3"},
          {"title_subsampling", "0.25"},
          {"title_typo_rate", "0.5"},
          {"query_typo_rate", "1"},
          {"num_random_negatives", "6"},
          {"num_supervised_negatives", "4"},
          {"num_own_negatives", "5"},
          {"own_negative_source", R"("both")"},
          {"negative_mask", "false"},
          {"user_features", R"({"fixed": ["age"], "lists": []})"},
          {"item_features", R"({"lists": ["tags", "note"], "fixed": []})"},
          {"history_features", R"({"fixed": ["brand"], "lists": ["tags"]})"},
          {"history_length", "7"},
          {"history_types", "24"},
          {"history_text", "true"},
          {"query_history_length", "9"},
          {"graph_fan_out", "[10, 5]"},
          {"graph_sampling", R"("strongest")"},
          {"graph_dropout", "0.5"},
          {"graph_attributes", R"({"fixed": ["brand"], "lists": []})"},
          {"shuffle_buffer", "100"},
          {"seed", "-9223372036854775808"},
          {"num_epochs", "2"},
          {"shard_index", "1"},
          {"num_shards", "3"},
          {"num_parallel_calls", "11"}};
}

std::string ToJson(const Options& options) {
  std::string json = "{";
  for (const auto& [name, value] : options) json += StrCat(json.size() == 1 ? "" : ",", '"', name, "\": ", value);
  return json + "}";
}

// The error for one changed value, or for the text.
std::string ErrorOf(const std::string& json) {
  BatchOptions options;
  const Status status = BatchOptions::Parse(json, &options);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << json;
  return status.message();
}
std::string ErrorOf(const std::string& name, const std::string& value) {
  Options options = Good();
  for (auto& option : options) {
    if (option.first == name) option.second = value;
  }
  return ErrorOf(ToJson(options));
}

TEST(BatchOptionsTest, ReadsEachOption) {
  BatchOptions o;
  ASSERT_TRUE(IsOk(BatchOptions::Parse(ToJson(Good()), &o)));
  EXPECT_EQ(o.batch_size, 8);
  EXPECT_EQ(o.num_title_queries, 2);
  EXPECT_EQ(o.pretrain_steps, 3);
  EXPECT_EQ(o.title_subsampling, 0.25f);
  EXPECT_EQ(o.title_typo_rate, 0.5f);
  EXPECT_EQ(o.query_typo_rate, 1.0f);
  EXPECT_EQ(o.num_random_negatives, 6);
  EXPECT_EQ(o.num_supervised_negatives, 4);
  EXPECT_EQ(o.num_own_negatives, 5);
  EXPECT_EQ(o.own_negative_source, OwnNegativeSource::kBoth);
  EXPECT_TRUE(o.own_impressions() && o.own_labels());
  EXPECT_FALSE(o.negative_mask);
  EXPECT_EQ(o.user_features.fixed, std::vector<std::string>{"age"});
  EXPECT_TRUE(o.user_features.lists.empty() && o.item_features.fixed.empty());
  EXPECT_EQ(o.item_features.lists, (std::vector<std::string>{"tags", "note"}));
  EXPECT_EQ(o.history_features.lists, std::vector<std::string>{"tags"});
  EXPECT_EQ(o.history_length, 7);
  EXPECT_EQ(o.history_types, 24);
  EXPECT_TRUE(o.history_text);
  EXPECT_EQ(o.query_history_length, 9);
  EXPECT_EQ(o.shuffle_buffer, 100);
  EXPECT_EQ(o.seed, INT64_MIN);
  EXPECT_EQ(o.num_epochs, 2);
  EXPECT_EQ(o.shard_index, 1);
  EXPECT_EQ(o.num_shards, 3);
  EXPECT_EQ(o.num_parallel_calls, 11);
}

TEST(BatchOptionsTest, EachNameStandsOnce) {
  for (size_t i = 0; i < Good().size(); ++i) {
    Options options = Good();
    options.erase(options.begin() + i);
    EXPECT_EQ(ErrorOf(ToJson(options)),
              StrCat("the batch options have no ", Good()[i].first, ", expected all of them"));
    options.emplace_back("num_shared_negatives", "1");
    ErrorOf(ToJson(options));
  }
  Options options = Good();
  options.emplace_back("num_shared_negatives", "1");
  EXPECT_EQ(ErrorOf(ToJson(options)),
            "a name in the batch options is \"num_shared_negatives\", expected a batch option");
  options.back() = options.front();
  EXPECT_EQ(ErrorOf(ToJson(options)), "the batch options have a name twice, expected each once");
}

TEST(BatchOptionsTest, ValuesOfAnotherTypeAreNamed) {
  EXPECT_EQ(ErrorOf("batch_size", "8.5"), "batch_size is 8.5, expected a whole number, 1 to 1048576");
  EXPECT_EQ(ErrorOf("seed", "9223372036854775808"),
            "seed is 9223372036854775808, expected a whole number, -9223372036854775808 to 9223372036854775807");
  EXPECT_EQ(ErrorOf("title_typo_rate", "\"much\""), "title_typo_rate is \"much\", expected a number, 0 to 1");
  EXPECT_EQ(ErrorOf("negative_mask", "1"), "negative_mask is 1, expected true or false");
  EXPECT_EQ(ErrorOf("own_negative_source", "\"supervised\""),
            "own_negative_source is \"supervised\", expected one of impressions, labels, both");
  EXPECT_EQ(ErrorOf("own_negative_source", "0"), "own_negative_source is 0, expected one of impressions, labels, both");
  for (const char* bad : {"[]", "{}", R"({"fixed":[],"lists":[1]})", R"({"fixed":[],"lists":[],"more":[]})", "null"}) {
    EXPECT_EQ(ErrorOf("user_features", bad),
              StrCat("user_features is ", bad, R"(, expected {"fixed": [names], "lists": [names]})"));
  }
}

TEST(BatchOptionsTest, ValuesOutOfRangeAreNamed) {
  EXPECT_EQ(ErrorOf("batch_size", "0"), "batch_size is 0, expected 1 to 1048576");
  EXPECT_EQ(ErrorOf("batch_size", "1099511627776"), "batch_size is 1099511627776, expected 1 to 1048576");
  EXPECT_EQ(ErrorOf("num_random_negatives", "-1"), "num_random_negatives is -1, expected 0 to 1048576");
  EXPECT_EQ(ErrorOf("num_supervised_negatives", "7"),
            "num_supervised_negatives is 7, expected at most num_random_negatives, 6: they replace random negatives");
  EXPECT_EQ(ErrorOf("num_own_negatives", "-1"), "num_own_negatives is -1, expected 0 to 16777216");
  EXPECT_EQ(ErrorOf("num_own_negatives", "2097153"),
            "num_own_negatives is 2097153, expected at most 2097152 with batch_size 8");
  EXPECT_EQ(ErrorOf("num_title_queries", "9"),
            "num_title_queries is 9, expected at most batch_size, 8: the other pairs come from the log");
  BatchOptions titles_only;
  titles_only.num_title_queries = titles_only.batch_size;
  EXPECT_TRUE(titles_only.Validate().ok());
  titles_only.num_epochs = 1;
  EXPECT_EQ(titles_only.Validate().message(),
            "num_epochs is 1, expected 0: with title queries only, there are no passes over the log");
  EXPECT_EQ(ErrorOf("history_types", "32"), "history_types is 32, expected 0 to 31");
  EXPECT_EQ(ErrorOf("pretrain_steps", "-1"), "pretrain_steps is -1, expected 0 to 1099511627776");
  EXPECT_EQ(ErrorOf("title_typo_rate", "1.5"), "title_typo_rate is 1.5, expected 0 to 1");
  EXPECT_EQ(ErrorOf("title_subsampling", "-1"), "title_subsampling is -1, expected 0 to 1");
  EXPECT_EQ(ErrorOf("query_typo_rate", "NaN"), "query_typo_rate is nan, expected 0 to 1");
  EXPECT_EQ(ErrorOf("query_typo_rate", "1e300"), "query_typo_rate is inf, expected 0 to 1");
  EXPECT_EQ(ErrorOf("shuffle_buffer", "0"), "shuffle_buffer is 0, expected 1 to 1099511627776");
  EXPECT_EQ(ErrorOf("shard_index", "3"), "shard_index is 3, expected at most num_shards - 1, 2");
  EXPECT_EQ(ErrorOf("num_parallel_calls", "1025"), "num_parallel_calls is 1025, expected 0 to 1024");
}

TEST(BatchOptionsTest, TextThatIsNoObjectIsRefused) {
  EXPECT_NE(ErrorOf("{").find("not valid JSON at byte 1"), std::string::npos);
  EXPECT_NE(ErrorOf("").find("not valid JSON at byte 0"), std::string::npos);
  EXPECT_NE(ErrorOf("[8]").find("is [8], expected a JSON object"), std::string::npos);
  EXPECT_NE(ErrorOf(std::string(1000000, '[')).find("not valid JSON"), std::string::npos);
}

TEST(BatchComponentsTest, AreDescribedInOrder) {
  const std::string described = DescribeBatchComponents(ToJson(Good()));
  EXPECT_EQ(described.substr(0, 110),
            R"({"components":[["query.values","int32",[-1]],["query.row_splits","int64",[9]],["query_rows","int32",[8]],["ite)");
  EXPECT_NE(described.find(R"(["item_features.codes","int32",[54,0]],["item_features.lists.0.values","int32",[-1]])"),
            std::string::npos);
  EXPECT_NE(described.find(R"(["negative_mask","bool",[8,0]],["own_negative_mask","bool",[8,5]],["graph.0.query.values")"),
            std::string::npos);
  EXPECT_NE(described.find(R"(["graph.0.attributes","int32",[54]])"), std::string::npos);
  Options without = Good();
  for (auto& [name, value] : without) value = name == "graph_fan_out" ? "[]" : value;
  const std::string plain = DescribeBatchComponents(ToJson(without));
  EXPECT_EQ(plain.find("graph"), std::string::npos) << "a batch without neighbours has no component for them";
  EXPECT_EQ(DescribeBatchComponents("[]"),
            R"({"error":"the text of the batch options is [], expected a JSON object"})");
}

}  // namespace
}  // namespace dpsr
