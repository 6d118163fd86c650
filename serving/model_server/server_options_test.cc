#include "serving/model_server/server_options.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr::serving {
namespace {

struct Parsed {
  Status status;
  ServerOptions options;
  std::vector<std::string> unknown;
};

Parsed Parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "dpsr_model_server");
  Parsed result;
  result.status = ParseServerOptions(static_cast<int>(arguments.size()), arguments.data(), &result.options,
                                     &result.unknown);
  return result;
}

TEST(ServerOptionsTest, DefaultsAreTensorFlowServings) {
  const Parsed parsed = Parse({});
  ASSERT_TRUE(parsed.status.ok());
  EXPECT_EQ(parsed.options.port, 8500);
  EXPECT_EQ(parsed.options.host, "127.0.0.1");
  EXPECT_EQ(parsed.options.model_name, "default");
  EXPECT_EQ(parsed.options.file_system_poll_wait_seconds, 1);
  EXPECT_EQ(parsed.options.saved_model_tags, std::vector<std::string>{"serve"});
  EXPECT_FALSE(parsed.options.enable_serialization_as_tensor_content);
}

TEST(ServerOptionsTest, ReadsEveryKindOfFlag) {
  const Parsed parsed = Parse({"--port=0", "--host=::1", "--model_base_path=/m=1", "--op_library=a.so,,b.so",
                               "--file_system_poll_wait_seconds=-1", "--saved_model_tags=serve,gpu",
                               "--enable_serialization_as_tensor_content", "--version=false"});
  ASSERT_TRUE(parsed.status.ok()) << parsed.status.message();
  EXPECT_EQ(parsed.options.port, 0);
  EXPECT_EQ(parsed.options.host, "::1");
  EXPECT_EQ(parsed.options.model_base_path, "/m=1");
  EXPECT_EQ(parsed.options.op_libraries, (std::vector<std::string>{"a.so", "b.so"}));
  EXPECT_EQ(parsed.options.file_system_poll_wait_seconds, -1);
  EXPECT_EQ(parsed.options.saved_model_tags, (std::vector<std::string>{"serve", "gpu"}));
  EXPECT_TRUE(parsed.options.enable_serialization_as_tensor_content);
  EXPECT_FALSE(parsed.options.version);
  EXPECT_TRUE(parsed.unknown.empty());
}

TEST(ServerOptionsTest, UnknownArgumentsAreHandedBackNotRefused) {
  const Parsed parsed = Parse({"--rest_api_portt=1", "stray", "-port=1", "--", "--=", "--model_name=m"});
  ASSERT_TRUE(parsed.status.ok());
  EXPECT_EQ(parsed.unknown, (std::vector<std::string>{"--rest_api_portt=1", "stray", "-port=1", "--", "--="}));
  EXPECT_EQ(parsed.options.model_name, "m");
  EXPECT_EQ(parsed.options.port, 8500);
}

TEST(ServerOptionsTest, AValueThatDoesNotFitNamesFlagValueAndWhatIsAllowed) {
  for (const char* bad : {"--port=http", "--port=65536", "--port=-1", "--port=", "--port=80 ", "--port=0x50", "--port",
                          "--file_system_poll_wait_seconds=9223372036854775808", "--grpc_max_threads=5000",
                          "--tensorflow_session_parallelism=-1", "--help=yes", "--model_name"}) {
    const Parsed parsed = Parse({bad});
    EXPECT_EQ(parsed.status.code(), StatusCode::kInvalidArgument) << bad;
    EXPECT_NE(parsed.status.message().find(bad), std::string::npos) << parsed.status.message();
    EXPECT_NE(parsed.status.message().find("expected"), std::string::npos) << parsed.status.message();
  }
}

TEST(ServerOptionsTest, ValidateWantsAnAbsoluteBasePathAndAName) {
  ServerOptions options;
  EXPECT_NE(ValidateServerOptions(options).message().find("--model_base_path"), std::string::npos);
  options.model_base_path = "models/m";
  EXPECT_EQ(ValidateServerOptions(options).message(),
            "Expected model default to have an absolute path or URI; got base_path()=models/m");
  options.model_base_path = "/models/m";
  EXPECT_TRUE(ValidateServerOptions(options).ok());
  options.model_name = "";
  EXPECT_NE(ValidateServerOptions(options).message().find("--model_name"), std::string::npos);
}

TEST(ServerOptionsTest, ValidateRefusesAllThreeParallelismFlags) {
  ServerOptions options;
  options.model_base_path = "/m";
  options.tensorflow_session_parallelism = 2;
  options.tensorflow_intra_op_parallelism = 2;
  EXPECT_TRUE(ValidateServerOptions(options).ok());
  options.tensorflow_inter_op_parallelism = 2;
  EXPECT_EQ(ValidateServerOptions(options).code(), StatusCode::kInvalidArgument);
}

TEST(ServerOptionsTest, HelpNamesEveryFlagWithItsDefault) {
  const std::string help = ServerOptionsHelp();
  for (const char* line : {"--port=8500\n", "--host=\"127.0.0.1\"\n", "--saved_model_tags=\"serve\"\n",
                           "--op_library=\"\"\n", "--enable_serialization_as_tensor_content=false\n"}) {
    EXPECT_NE(help.find(line), std::string::npos) << line;
  }
}

TEST(ServerOptionsTest, AddressPutsIpv6IntoBrackets) {
  EXPECT_EQ(ServerAddress("127.0.0.1", 8500), "127.0.0.1:8500");
  EXPECT_EQ(ServerAddress("::1", 1), "[::1]:1");
}

}  // namespace
}  // namespace dpsr::serving
