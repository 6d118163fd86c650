#include "export/faiss_binding/search_parameters.h"

#include "gtest/gtest.h"

namespace dpsr {
namespace {

TEST(SearchParametersTest, ReadsWhatItNames) {
  SearchParameters parameters;
  ASSERT_TRUE(SearchParameters::Parse("", &parameters).ok());
  EXPECT_TRUE(parameters.empty());
  ASSERT_TRUE(SearchParameters::Parse("efSearch=20,nprobe=3,max_codes=500,k_factor_rf=1.5", &parameters).ok());
  EXPECT_EQ(parameters.nprobe, 3);
  EXPECT_EQ(parameters.ef_search, 20);
  EXPECT_EQ(parameters.max_codes, 500);
  EXPECT_EQ(parameters.k_factor, 1.5);
  for (const char* text : {",", "nprobe", "nprobe=", "nprobe=x", "nprobe=1x", "nprobe=0", "nprobe=-1", "nprobe=1.5",
                           "nprobe=nan", "nprobe=inf", "nprobe=1e10", "nprobe=1,nprobe=2", "nprobe=1,", ",nprobe=1",
                           "nprobes=1", "=1", "k_factor_rf=0.5", "max_codes=0", "max_codes=1.5", "nprobe=1;efSearch=2"}) {
    const Status status = SearchParameters::Parse(text, &parameters);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << text;
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  }
}

TEST(SearchParametersTest, KeepsWithinBounds) {
  SearchParameters bounds;
  ASSERT_TRUE(SearchParameters::Parse("nprobe=64,k_factor_rf=4", &bounds).ok());
  for (const char* text : {"", "nprobe=64", "nprobe=1,k_factor_rf=4"}) {
    SearchParameters parameters;
    ASSERT_TRUE(SearchParameters::Parse(text, &parameters).ok());
    EXPECT_TRUE(parameters.CheckBounds(bounds).ok()) << text;
  }
  for (const char* text : {"nprobe=65", "k_factor_rf=4.1", "efSearch=1"}) {
    SearchParameters parameters;
    ASSERT_TRUE(SearchParameters::Parse(text, &parameters).ok());
    EXPECT_EQ(parameters.CheckBounds(bounds).code(), StatusCode::kInvalidArgument) << text;
  }
  // A scan budget makes a search cheaper, so it needs no bound. If there is one, it holds.
  SearchParameters budget;
  ASSERT_TRUE(SearchParameters::Parse("max_codes=1000", &budget).ok());
  EXPECT_TRUE(budget.CheckBounds(bounds).ok());
  bounds.max_codes = 999;
  EXPECT_EQ(budget.CheckBounds(bounds).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace dpsr
