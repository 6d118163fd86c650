#include "serving/model_server/rest_api.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace dpsr::serving {
namespace {

// A server without models tells where a path leads: UNAVAILABLE comes from the models, the rest from the path.
class RestApiTest : public testing::Test {
 protected:
  RestReply Ask(const std::string& method, const std::string& path) { return api_.Answer({method, path, "{}"}); }

  ModelManager models_{{}};
  RequestHandler handler_{&models_};
  WorkerPool workers_{1};
  RestApi api_{&handler_, {&workers_}, "/metrics"};
};

TEST_F(RestApiTest, PathsThatReachAModel) {
  for (const std::string spec : {"m", "m/versions/1", "m/versions/007", "m/labels/l", "m%20 \xff", "1"}) {
    for (const std::string method : {"predict", "classify", "REGRESS"}) {
      const RestReply reply = Ask("POST", "/v1/models/" + spec + ":" + method);
      // Classify and regress look at the body first.
      EXPECT_EQ(reply.status, method == "predict" ? 503 : 400) << spec << method;
      EXPECT_EQ(reply.body.find("Malformed"), std::string::npos) << reply.body;
    }
    EXPECT_EQ(Ask("GET", "/V1/MODELS/" + spec + "/Metadata").status, 503) << spec;
  }
  EXPECT_EQ(Ask("GET", "/v1/models/m").status, 404);
  EXPECT_EQ(Ask("GET", "/v1/models/m/versions/9223372036854775807").status, 404);
}

TEST_F(RestApiTest, ModelsAreNotReplacedBeforeTheFirstOnes) {
  std::set<std::string> fresh;
  EXPECT_EQ(models_.Configure({}, &fresh).code(), absl::StatusCode::kUnavailable);
}

TEST_F(RestApiTest, NamesAreDecoded) {
  const auto error = [this](const std::string& path) { return Ask("GET", path).body; };
  EXPECT_EQ(error("/v1/models/a%20%62%2fc"), "{\"error\":\"Could not find any versions of model a b/c\"}");
  EXPECT_EQ(error("/v1/models/100%"), "{\"error\":\"Could not find any versions of model 100%\"}");
  EXPECT_EQ(error("/v1/models/a%2"), "{\"error\":\"Could not find any versions of model a%2\"}");
  EXPECT_EQ(error("/v1/models/a%zz"), "{\"error\":\"Could not find any versions of model a%zz\"}");
}

TEST_F(RestApiTest, PathsThatDoNot) {
  for (const char* path : {"/v1", "/v1/", "/v1/m", "/v1/models/m/", "/v1/models/m//", "/v1/models/m/versions",
                           "/v1/models/m/versions/", "/v1/models/m/versions/+1", "/v1/models/m/versions/1x",
                           "/v1/models/m/labels/", "/v1/models/m/labels/l/versions/1", "/v1/models/m:predict",
                           "/v1/models/m/metadata/", "/v1/models/m/versions/1:", "/v1/models/", "/v1/models/:predict",
                           "/v1/models//metadata"}) {
    const RestReply reply = Ask("GET", path);
    EXPECT_EQ(reply.status, 400) << path;
    EXPECT_EQ(reply.body, std::string("{\"error\":\"Malformed request: GET ") + path + "\"}");
    EXPECT_EQ(reply.content_type, "application/json");
  }
  EXPECT_EQ(Ask("GET", "/v1/models").body, "{\"error\":\"Missing model name in request.\"}");
  EXPECT_EQ(Ask("GET", "/v1/models/m/versions/9223372036854775808").body,
            "{\"error\":\"Failed to convert version: 9223372036854775808 to numeric.\"}");
  EXPECT_EQ(Ask("GET", "").status, 404);
  EXPECT_EQ(Ask("GET", "/v10").status, 404);
}

TEST_F(RestApiTest, PathsOfTheServerItself) {
  EXPECT_EQ(Ask("GET", "/healthz").status, 200);
  EXPECT_EQ(Ask("GET", "/readyz").status, 503);
  EXPECT_EQ(Ask("GET", "/metrics").status, 200);
  EXPECT_EQ(Ask("POST", "/metrics").status, 405);
}

TEST(HttpStatusTest, Table) {
  using Code = absl::StatusCode;
  const std::pair<Code, int> table[] = {{Code::kOk, 200},
                                        {Code::kCancelled, 499},
                                        {Code::kUnknown, 500},
                                        {Code::kInvalidArgument, 400},
                                        {Code::kDeadlineExceeded, 504},
                                        {Code::kNotFound, 404},
                                        {Code::kAlreadyExists, 409},
                                        {Code::kPermissionDenied, 403},
                                        {Code::kResourceExhausted, 429},
                                        {Code::kFailedPrecondition, 400},
                                        {Code::kAborted, 409},
                                        {Code::kOutOfRange, 400},
                                        {Code::kUnimplemented, 501},
                                        {Code::kInternal, 500},
                                        {Code::kUnavailable, 503},
                                        {Code::kDataLoss, 500},
                                        {Code::kUnauthenticated, 401}};
  for (const auto& [code, status] : table) EXPECT_EQ(HttpStatus(tensorflow::Status(code, "")), status);
}

}  // namespace
}  // namespace dpsr::serving
