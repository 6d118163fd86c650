// A libFuzzer target: any tensor of a request either gets the type and size that it claims, or is refused. The input is
// a byte and, if that is even, the bytes of a TensorProto; if it is odd, values to make a TensorProto of, which reaches
// deeper.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "serving/model_server/inference.h"

namespace {

using tensorflow::TensorProto;

// Reads numbers from the front of an input; 0 at its end.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  template <typename T>
  T Read() {
    T value{};
    const size_t size = std::min(size_, sizeof(T));
    std::memcpy(&value, data_, size);
    data_ += size;
    size_ -= size;
    return value;
  }
  std::string Rest() const { return {reinterpret_cast<const char*>(data_), size_}; }
  bool empty() const { return size_ == 0; }

 private:
  const uint8_t* data_;
  size_t size_;
};

int64_t ReadDim(Source* source) {
  const int what = source->Read<uint8_t>();
  switch (what % 4) {
    case 0:
      return what / 4 % 8;
    case 1:
      return static_cast<int64_t>((uint64_t{1} << (what / 4)) - 1);
    case 2:
      return -what / 4;
    default:
      return source->Read<int64_t>();
  }
}

TensorProto MakeTensor(Source source) {
  TensorProto proto;
  const int dtype = source.Read<uint8_t>();
  proto.set_dtype(static_cast<tensorflow::DataType>(dtype < 200 ? dtype % 32 : dtype));
  const int shape = source.Read<uint8_t>();
  for (int i = 0; i < (shape < 250 ? shape % 6 : shape + 10); ++i) {
    proto.mutable_tensor_shape()->add_dim()->set_size(ReadDim(&source));
  }
  if (shape == 249) proto.mutable_tensor_shape()->set_unknown_rank(true);
  if (const int field = source.Read<uint8_t>() % 14; field == 0) {
    proto.set_tensor_content(source.Rest());
  } else {
    while (!source.empty()) {
      if (field == 1) proto.add_half_val(source.Read<int32_t>());
      if (field == 2) proto.add_float_val(source.Read<float>());
      if (field == 3) proto.add_double_val(source.Read<double>());
      if (field == 4) proto.add_int_val(source.Read<int32_t>());
      if (field == 5) proto.add_scomplex_val(source.Read<float>());
      if (field == 6) proto.add_int64_val(source.Read<int64_t>());
      if (field == 7) proto.add_bool_val(source.Read<uint8_t>() % 2 == 1);
      if (field == 8) proto.add_dcomplex_val(source.Read<double>());
      if (field == 9) proto.add_uint32_val(source.Read<uint32_t>());
      if (field == 10) proto.add_uint64_val(source.Read<uint64_t>());
      if (field == 11) proto.add_string_val(std::string(source.Read<uint8_t>(), 'a'));
      if (field == 12) proto.add_resource_handle_val()->set_name(std::string(source.Read<uint8_t>(), 'a'));
      if (field == 13) proto.add_variant_val()->set_metadata(std::string(source.Read<uint8_t>(), 'a'));
    }
  }
  return proto;
}

// Tensors up to the limit are allowed whatever the message carries, and would only take time here.
bool TakesLong(const TensorProto& proto) {
  double elements = 1;
  for (const auto& dim : proto.tensor_shape().dim()) elements *= static_cast<double>(dim.size());
  return elements > (1 << 12) && elements < (1 << 27);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  TensorProto proto;
  if (data[0] % 2 == 1) {
    proto = MakeTensor({data + 1, size - 1});
  } else if (!proto.ParseFromArray(data + 1, static_cast<int>(size - 1))) {
    return 0;
  }
  if (TakesLong(proto)) return 0;
  tensorflow::Tensor tensor;
  if (!dpsr::serving::ParseTensor("x", proto, &tensor).ok()) return 0;
  if (tensor.dtype() != proto.dtype() || tensor.dims() != proto.tensor_shape().dim_size()) std::abort();
  TensorProto content, fields, again;
  tensor.AsProtoTensorContent(&content);  // touches every element
  tensor.AsProtoField(&fields);
  tensorflow::Tensor copy;
  if (!dpsr::serving::ParseTensor("x", fields, &copy).ok()) std::abort();
  copy.AsProtoTensorContent(&again);
  // TensorFlow keeps a number beyond the range of a 4-bit type in the first form, and cuts it in the second.
  const bool has_4_bits = tensor.dtype() == tensorflow::DT_INT4 || tensor.dtype() == tensorflow::DT_UINT4;
  if (!has_4_bits && content.SerializeAsString() != again.SerializeAsString()) std::abort();
  return 0;
}
