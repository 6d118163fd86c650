// libFuzzer: any bytes of a request's tensor become a tensor of the size that they say, or are refused.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "serving/model_server/inference.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tensorflow::TensorProto proto;
  if (!proto.ParseFromArray(data, static_cast<int>(size))) return 0;
  tensorflow::Tensor tensor;
  if (!dpsr::serving::ParseTensor("x", proto, &tensor).ok()) return 0;
  tensorflow::TensorProto again;
  tensor.AsProtoTensorContent(&again);  // touches every element
  if (tensor.dtype() != proto.dtype()) std::abort();
  return 0;
}
