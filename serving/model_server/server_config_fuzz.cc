// A libFuzzer target: any text of a configuration file is read or refused.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "serving/model_server/server_config.h"
#include "serving/model_server/server_files.pb.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dpsr::serving;  // NOLINT
  const std::string text(reinterpret_cast<const char*>(data), size);
  tensorflow::serving::ModelServerConfig config;
  std::vector<ModelConfig> models;
  if (ParseTextProto(text, &config).ok()) (void)ModelsOf(config, &models);
  BatchingParameters batching;
  (void)ParseTextProto(text, &batching);
  SSLConfig tls;
  (void)ParseTextProto(text, &tls);
  return 0;
}
