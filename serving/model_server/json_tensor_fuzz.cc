// A libFuzzer target: any body of a REST request is read or refused, and inputs that were read can be written again.
// The input is a byte for the type of the tensor, then the body.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "serving/model_server/json_tensor.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dpsr::serving;  // NOLINT
  if (size == 0) return 0;
  const std::string body(reinterpret_cast<const char*>(data) + 1, size - 1);
  SignatureDefs signatures;
  auto* inputs = signatures["serving_default"].mutable_inputs();
  (*inputs)["x"].set_dtype(static_cast<tensorflow::DataType>(1 + (data[0] & 31) % 23));
  if (data[0] & 32) (*inputs)["y"].set_dtype(tensorflow::DT_STRING);

  tensorflow::serving::PredictRequest request;
  JsonFormat format;
  if (ReadPredictJson(body, signatures, &request, &format).ok()) {
    std::string text;
    // Everything that can be read can be written, and rows can always be written as columns.
    if (!WritePredictJson(request.inputs(), JsonFormat::kColumn, &text).ok()) std::abort();
    tensorflow::serving::PredictRequest again;
    text.replace(text.find("outputs"), 7, "inputs");
    if (!ReadPredictJson(text, signatures, &again, &format).ok()) std::abort();
  }
  std::string name;
  tensorflow::serving::Input input;
  (void)ReadExamplesJson(body, &name, &input);
  WriteErrorJson(body);
  return 0;
}
