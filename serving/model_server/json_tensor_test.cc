#include "serving/model_server/json_tensor.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <string>

#include "google/protobuf/text_format.h"
#include "tensorflow/core/framework/tensor.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::Tensor;
using ::tensorflow::TensorProto;
using ::tensorflow::serving::PredictRequest;

// The signature `serving_default` with these inputs.
SignatureDefs Signatures(const std::map<std::string, tensorflow::DataType>& inputs) {
  SignatureDefs signatures;
  for (const auto& [name, dtype] : inputs) {
    (*signatures["serving_default"].mutable_inputs())[name].set_dtype(dtype);
  }
  return signatures;
}

tensorflow::Status Read(const std::string& text, tensorflow::DataType dtype, Tensor* tensor) {
  PredictRequest request;
  JsonFormat format;
  TF_RETURN_IF_ERROR(ReadPredictJson(text, Signatures({{"x", dtype}}), &request, &format));
  EXPECT_EQ(request.inputs_size(), 1);
  EXPECT_TRUE(tensor->FromProto(request.inputs().at("x")));
  return tensorflow::OkStatus();
}

std::string Write(const std::map<std::string, Tensor>& tensors, JsonFormat format) {
  google::protobuf::Map<std::string, TensorProto> outputs;
  for (const auto& [name, tensor] : tensors) tensor.AsProtoField(&outputs[name]);
  std::string text;
  const tensorflow::Status status = WritePredictJson(outputs, format, &text);
  return status.ok() ? text : std::string(status.message());
}

TEST(Defaults, InputsWithADefaultMayBeLeftOut) {
  SignatureDefs signatures = Signatures({{"query", tensorflow::DT_STRING}, {"k", tensorflow::DT_INT32}});
  (*signatures["serving_default"].mutable_defaults())["k"] = TensorProto();
  const auto names = [&](const std::string& text) {
    PredictRequest request;
    JsonFormat format;
    const tensorflow::Status status = ReadPredictJson(text, signatures, &request, &format);
    if (!status.ok()) return std::string(status.message());
    std::set<std::string> sent;
    for (const auto& [name, tensor] : request.inputs()) sent.insert(name);
    std::string joined;
    for (const std::string& name : sent) joined += name + " ";
    return joined;
  };
  EXPECT_EQ(names(R"({"inputs": {"query": ["a"]}})"), "query ");
  EXPECT_EQ(names(R"({"inputs": {"query": ["a"], "k": 3}})"), "k query ");
  EXPECT_EQ(names(R"({"inputs": ["a", "b"]})"), "query ");
  EXPECT_EQ(names(R"({"instances": ["a", "b"]})"), "query ");
  EXPECT_EQ(names(R"({"instances": [{"query": "a"}, {"query": "b"}]})"), "query ");
  EXPECT_EQ(names(R"({"instances": [{"query": "a", "k": 1}]})"), "k query ");
  EXPECT_NE(names(R"({"inputs": {"k": 3}})").find("Missing named input: query"), std::string::npos);
  EXPECT_NE(names(R"({"instances": [{"k": 1}]})").find("keys are missing"), std::string::npos);
  EXPECT_NE(names(R"({"instances": [{"query": "a"}, {"query": "b", "k": 1}]})").find("give all instances the same keys"),
            std::string::npos);
  EXPECT_NE(names(R"({"instances": [{"query": "a", "k": 1}, {"query": "b"}]})").find("give all instances the same keys"),
            std::string::npos);
  EXPECT_NE(names(R"({"instances": [{"query": "a", "n": 1}]})").find("key n is not expected"), std::string::npos);
}

// Every type goes in as numbers, at the ends of its range, and comes out as the same numbers.
template <typename T>
class NumberTest : public testing::Test {};
using Numbers = testing::Types<int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t>;
TYPED_TEST_SUITE(NumberTest, Numbers);

TYPED_TEST(NumberTest, RoundTrip) {
  using Limits = std::numeric_limits<TypeParam>;
  const auto dtype = tensorflow::DataTypeToEnum<TypeParam>::value;
  const std::string values = "[" + std::to_string(Limits::min()) + "," + std::to_string(Limits::max()) + "]";
  Tensor tensor;
  ASSERT_TRUE(Read("{\"inputs\":" + values + "}", dtype, &tensor).ok());
  EXPECT_EQ(tensor.vec<TypeParam>()(0), Limits::min());
  EXPECT_EQ(tensor.vec<TypeParam>()(1), Limits::max());
  EXPECT_EQ(Write({{"y", tensor}}, JsonFormat::kColumn), "{\"outputs\":" + values + "}");
  // One more than the largest; the last digit of each is below 9.
  std::string more = std::to_string(Limits::max());
  ++more.back();
  for (const std::string& bad : {more, std::string("1.0"), std::string("1e1"), std::string("-99999999999999999999")}) {
    EXPECT_FALSE(Read("{\"inputs\":" + bad + "}", dtype, &tensor).ok()) << bad;
  }
  if (!Limits::is_signed) {
    EXPECT_FALSE(Read("{\"inputs\":-1}", dtype, &tensor).ok());
  }
}

TEST(JsonTensorTest, Floats) {
  for (const auto dtype :
       {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE, tensorflow::DT_HALF, tensorflow::DT_BFLOAT16}) {
    Tensor tensor;
    ASSERT_TRUE(Read("{\"instances\":[1,-0.5,NaN,-Infinity,2e2]}", dtype, &tensor).ok());
    EXPECT_EQ(tensor.dtype(), dtype);
    EXPECT_EQ(Write({{"y", tensor}}, JsonFormat::kRow), "{\"predictions\":[1.0,-0.5,NaN,-Infinity,200.0]}")
        << tensorflow::DataTypeString(dtype);
  }
  Tensor tensor;
  ASSERT_TRUE(Read("{\"inputs\":0.1}", tensorflow::DT_FLOAT, &tensor).ok());
  EXPECT_EQ(Write({{"y", tensor}}, JsonFormat::kColumn), "{\"outputs\":0.1}");  // no digits that a float has not
}

TEST(JsonTensorTest, BoolsAndTexts) {
  Tensor tensor;
  ASSERT_TRUE(Read("{\"inputs\":[true,false]}", tensorflow::DT_BOOL, &tensor).ok());
  EXPECT_EQ(Write({{"y", tensor}}, JsonFormat::kColumn), "{\"outputs\":[true,false]}");
  EXPECT_FALSE(Read("{\"inputs\":1}", tensorflow::DT_BOOL, &tensor).ok());

  ASSERT_TRUE(Read("{\"inputs\":[\"a\\u0000\\u00e9\",{\"b64\":\"/w==\"}]}", tensorflow::DT_STRING, &tensor).ok());
  EXPECT_EQ(tensor.vec<tensorflow::tstring>()(0), std::string("a\0\xc3\xa9", 4));
  EXPECT_EQ(tensor.vec<tensorflow::tstring>()(1), "\xff");
  EXPECT_EQ(Write({{"y", tensor}}, JsonFormat::kColumn), "{\"outputs\":[\"a\\u0000\xc3\xa9\",{\"b64\":\"/w==\"}]}");
  EXPECT_EQ(Write({{"y_bytes", tensor}}, JsonFormat::kColumn),
            "{\"outputs\":[{\"b64\":\"YQDDqQ==\"},{\"b64\":\"/w==\"}]}");
}

TEST(JsonTensorTest, TypesThatJsonDoesNotHave) {
  Tensor tensor;
  EXPECT_EQ(Read("{\"inputs\":[1]}", tensorflow::DT_COMPLEX64, &tensor).code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Write({{"y", Tensor(tensorflow::DT_COMPLEX64, {1})}}, JsonFormat::kColumn),
            "Conversion of type: complex64 to JSON");
}

TEST(JsonTensorTest, Shapes) {
  Tensor tensor;
  const auto shape = [&](const std::string& text) {
    const tensorflow::Status status = Read(text, tensorflow::DT_FLOAT, &tensor);
    return status.ok() ? tensor.shape().DebugString() : "error";
  };
  EXPECT_EQ(shape("{\"inputs\":1}"), "[]");
  EXPECT_EQ(shape("{\"inputs\":[]}"), "[0]");
  EXPECT_EQ(shape("{\"inputs\":[[],[]]}"), "[2,0]");
  EXPECT_EQ(shape("{\"inputs\":[[[1],[2]]]}"), "[1,2,1]");
  EXPECT_EQ(shape("{\"inputs\":[[],[1]]}"), "error");
  EXPECT_EQ(shape("{\"inputs\":[[1],[]]}"), "error");
  EXPECT_EQ(shape("{\"inputs\":[[[]],[[],[]]]}"), "error");
  EXPECT_EQ(shape("{\"inputs\":[1,[1]]}"), "error");
  EXPECT_EQ(shape("{\"instances\":[1,2,3]}"), "[3]");
  EXPECT_EQ(shape("{\"instances\":[[],[]]}"), "[2,0]");
  EXPECT_EQ(shape("{\"instances\":[[[1,2]],[[3,4]]]}"), "[2,1,2]");
  EXPECT_EQ(shape("{\"instances\":[]}"), "error");
  const auto nested = [](int depth) {
    return "{\"inputs\":" + std::string(depth, '[') + "1" + std::string(depth, ']') + "}";
  };
  EXPECT_NE(shape(nested(254)), "error");
  EXPECT_EQ(shape(nested(255)), "error");
  EXPECT_EQ(shape(nested(1'000'000)), "error");
}

TEST(JsonTensorTest, SeveralOutputs) {
  Tensor a(tensorflow::DT_INT32, {2}), b(tensorflow::DT_INT32, {2, 2}), scalar(tensorflow::DT_INT32, {});
  for (int i = 0; i < 2; ++i) a.flat<int32_t>()(i) = i;
  for (int i = 0; i < 4; ++i) b.flat<int32_t>()(i) = 10 + i;
  scalar.scalar<int32_t>()() = 5;
  EXPECT_EQ(Write({{"a", a}, {"b", b}}, JsonFormat::kRow),
            "{\"predictions\":[{\"a\":0,\"b\":[10,11]},{\"a\":1,\"b\":[12,13]}]}");
  EXPECT_EQ(Write({{"a", a}, {"b", b}}, JsonFormat::kColumn), "{\"outputs\":{\"a\":[0,1],\"b\":[[10,11],[12,13]]}}");
  EXPECT_EQ(Write({{"a", a}, {"s", scalar}}, JsonFormat::kColumn), "{\"outputs\":{\"a\":[0,1],\"s\":5}}");
  EXPECT_NE(Write({{"a", a}, {"s", scalar}}, JsonFormat::kRow).find("no shape information"), std::string::npos);
  EXPECT_EQ(Write({{"e", Tensor(tensorflow::DT_INT32, {0, 3})}}, JsonFormat::kRow), "{\"predictions\":[]}");
}

TEST(JsonTensorTest, Features) {
  std::string name;
  tensorflow::serving::Input input;
  ASSERT_TRUE(ReadExamplesJson(
                  R"({"signature_name":"s","examples":[{"i":[1,2],"f":[1,2.5],"t":"a","b":{"b64":"/w=="},"e":[]}]})",
                  &name, &input)
                  .ok());
  EXPECT_EQ(name, "s");
  const auto& features = input.example_list().examples(0).features().feature();
  EXPECT_EQ(features.at("i").int64_list().value(1), 2);
  EXPECT_EQ(features.at("f").float_list().value(0), 1.0f);
  EXPECT_EQ(features.at("t").bytes_list().value(0), "a");
  EXPECT_EQ(features.at("b").bytes_list().value(0), "\xff");
  EXPECT_EQ(features.at("e").kind_case(), tensorflow::Feature::KIND_NOT_SET);
}

TEST(JsonTensorTest, ErrorsAreJsonWhateverTheyHold) {
  EXPECT_EQ(WriteErrorJson("a \"b\"\n"), "{\"error\":\"a \\\"b\\\"\\n\"}");
  EXPECT_EQ(WriteErrorJson("\xff \xc3\xa9"), "{\"error\":\"? ??\"}");
}

}  // namespace
}  // namespace dpsr::serving
