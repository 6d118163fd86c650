// Reads TensorFlow Serving's configuration messages from text files, checks them, and turns them into our own structs.
#ifndef DPSR_SERVING_MODEL_SERVER_SERVER_CONFIG_H_
#define DPSR_SERVING_MODEL_SERVER_SERVER_CONFIG_H_

#include <string>
#include <vector>

#include "google/protobuf/message.h"
#include "serving/model_server/model_manager.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/config/model_server_config.pb.h"

namespace dpsr::serving {

// Reads a message from its text form. INVALID_ARGUMENT gives line, column and reason.
tensorflow::Status ParseTextProto(const std::string& text, google::protobuf::Message* message);

// Reads a message from a text file. Errors name the file.
tensorflow::Status ReadTextProto(const std::string& path, google::protobuf::Message* message);

// Reads the models of a configuration. The codes and messages of errors are TensorFlow Serving's.
tensorflow::Status ModelsOf(const tensorflow::serving::ModelServerConfig& config, std::vector<ModelConfig>* models);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVER_CONFIG_H_
