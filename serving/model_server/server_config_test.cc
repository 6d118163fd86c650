#include "serving/model_server/server_config.h"

#include <gtest/gtest.h>

#include "serving/model_server/server_files.pb.h"

namespace dpsr::serving {
namespace {

// The models of a configuration's text, or the error.
std::string Read(const std::string& text, std::vector<ModelConfig>* models) {
  tensorflow::serving::ModelServerConfig config;
  tensorflow::Status status = ParseTextProto(text, &config);
  if (status.ok()) status = ModelsOf(config, models);
  return std::string(status.message());
}

TEST(ServerConfigTest, Models) {
  std::vector<ModelConfig> models;
  const std::string error = Read(R"(
    # two models
    model_config_list {
      config: { name: "a", base_path: "/a", model_platform: "tensorflow",
                model_version_policy: { specific { versions: 2 versions: 7 } },
                version_labels { key: "stable" value: 2 } version_labels { key: "canary" value: 7 } }
      config { name: "b" base_path: "gs://b/c" model_platform: "tensorflow" model_version_policy { latest { } } }
      config { name: "c" base_path: "/c" model_platform: "tensorflow" model_version_policy { all { } } }
      config { name: "d" base_path: "/d" model_platform: "tensorflow"
               model_version_policy { latest { num_versions: 3 } } }
    })",
                                &models);
  ASSERT_EQ(error, "");
  ASSERT_EQ(models.size(), 4u);
  EXPECT_EQ(models[0].name, "a");
  EXPECT_EQ(models[0].base_path, "/a");
  EXPECT_EQ(models[0].policy.kind, VersionPolicy::Kind::kSpecific);
  EXPECT_EQ(models[0].policy.specific, (std::set<int64_t>{2, 7}));
  EXPECT_EQ(models[0].labels, (std::map<std::string, int64_t>{{"stable", 2}, {"canary", 7}}));
  EXPECT_EQ(models[1].policy, VersionPolicy());
  EXPECT_EQ(models[2].policy.kind, VersionPolicy::Kind::kAll);
  EXPECT_EQ(models[3].policy.num_latest, 3u);
}

TEST(ServerConfigTest, ErrorsTellThePlace) {
  std::vector<ModelConfig> models;
  EXPECT_EQ(Read("model_config_list {\n  confic { } }", &models),
            "Error parsing text-format tensorflow.serving.ModelServerConfig: 2:10: Message type "
            "\"tensorflow.serving.ModelConfigList\" has no field named \"confic\".");
  EXPECT_NE(Read(std::string(100'000, '{'), &models), "");
  std::string deep = "model_config_list { config { logging_config { ";
  for (int i = 0; i < 10'000; ++i) deep += "a { ";
  EXPECT_NE(Read(deep, &models), "");
}

TEST(ServerConfigTest, FilesOfOurOwn) {
  SSLConfig tls;
  EXPECT_TRUE(ParseTextProto("server_key: 'a\\nb' client_verify: true", &tls).ok());
  EXPECT_EQ(tls.server_key(), "a\nb");
  BatchingParameters batching;
  EXPECT_TRUE(
      ParseTextProto("max_batch_size { value: 8 } allowed_batch_sizes: 4 allowed_batch_sizes: 8", &batching).ok());
  EXPECT_EQ(batching.max_batch_size().value(), 8);
  MonitoringConfig monitoring;
  EXPECT_TRUE(ParseTextProto("prometheus_config: { enable: true, path: \"/m\" }", &monitoring).ok());
  EXPECT_EQ(monitoring.prometheus_config().path(), "/m");
  EXPECT_NE(ReadTextProto("/nowhere/file", &monitoring).message().find("/nowhere/file"), std::string::npos);
}

}  // namespace
}  // namespace dpsr::serving
