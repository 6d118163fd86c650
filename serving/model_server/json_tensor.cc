#include "serving/model_server/json_tensor.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "absl/strings/escaping.h"
#include "common/status.h"
#include "rapidjson/document.h"
#include "rapidjson/error/en.h"
#include "rapidjson/memorystream.h"
#include "rapidjson/stringbuffer.h"
#include "rapidjson/writer.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/servable.h"
#include "tensorflow/core/example/example.pb.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::Tensor;
using ::tensorflow::TensorProto;
using ::tensorflow::tstring;
using Json = rapidjson::Value;
using Writer = rapidjson::Writer<rapidjson::StringBuffer, rapidjson::UTF8<>, rapidjson::UTF8<>,
                                 rapidjson::CrtAllocator, rapidjson::kWriteNanAndInfFlag>;

constexpr char kBase64[] = "b64";
// A tensor has at most kMaxDims dimensions. Deeper lists than kMaxDepth would exhaust the stack.
constexpr int kMaxDims = 254;
constexpr int kMaxDepth = 1000;

std::string TypeName(const Json& value) {
  switch (value.GetType()) {
    case rapidjson::kNullType:
      return "Null";
    case rapidjson::kFalseType:
    case rapidjson::kTrueType:
      return "Bool";
    case rapidjson::kObjectType:
      return "Object";
    case rapidjson::kArrayType:
      return "Array";
    case rapidjson::kStringType:
      return "String";
    case rapidjson::kNumberType:
      return "Number";
  }
  return "Unknown";
}

// Returns the start of a value, for an error.
std::string Show(const Json& value) {
  rapidjson::StringBuffer buffer;
  Writer writer(buffer);
  value.Accept(writer);
  std::string text(buffer.GetString(), buffer.GetSize());
  constexpr size_t kMost = 60;
  return text.size() > kMost ? text.substr(0, kMost) + "..." : text;
}

tensorflow::Status TypeError(const Json& value, const std::string& expected) {
  return InvalidArgument(
      StrCat("JSON Value: ", Show(value), " Type: ", TypeName(value), " is not of expected type: ", expected));
}

// rapidjson uses a stack frame for each level, so texts that are nested too deeply must be refused before it parses
// them.
bool NestsTooDeep(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

tensorflow::Status Parse(const std::string& text, rapidjson::Document* document) {
  if (NestsTooDeep(text)) return InvalidArgument(StrCat("JSON Parse error: nested deeper than ", kMaxDepth, " levels"));
  document->Parse<rapidjson::kParseNanAndInfFlag | rapidjson::kParseValidateEncodingFlag>(text.data(), text.size());
  if (document->GetParseError() == rapidjson::kParseErrorDocumentEmpty) {
    return InvalidArgument("JSON Parse error: The document is empty");
  }
  if (document->HasParseError()) {
    return InvalidArgument(StrCat("JSON Parse error: ", rapidjson::GetParseError_En(document->GetParseError()),
                                  " at offset: ", document->GetErrorOffset()));
  }
  if (!document->IsObject()) return InvalidArgument(StrCat("JSON Value: ", Show(*document), " Is not object"));
  return tensorflow::OkStatus();
}

const Json* Member(const Json& object, const char* key) {
  const auto found = object.FindMember(key);
  return found == object.MemberEnd() ? nullptr : &found->value;
}

// Returns whether the value is `{"b64": "..."}`, bytes that need not be UTF-8.
bool IsBytes(const Json& value) {
  return value.IsObject() && value.MemberCount() == 1 && value.MemberBegin()->name == kBase64;
}

tensorflow::Status ReadText(const Json& value, std::string* text) {
  if (value.IsString()) {
    text->assign(value.GetString(), value.GetStringLength());
    return tensorflow::OkStatus();
  }
  if (!IsBytes(value) || !value.MemberBegin()->value.IsString()) return TypeError(value, "string");
  const Json& encoded = value.MemberBegin()->value;
  if (absl::Base64Unescape({encoded.GetString(), encoded.GetStringLength()}, text)) return tensorflow::OkStatus();
  return InvalidArgument(StrCat("Unable to base64 decode: ", Show(encoded)));
}

template <typename T>
bool ReadInteger(const Json& value, T* number) {
  if (value.IsInt64()) {
    const int64_t v = value.GetInt64();
    if constexpr (std::is_unsigned_v<T>) {
      if (v < 0 || static_cast<uint64_t>(v) > std::numeric_limits<T>::max()) return false;
    } else if (v < std::numeric_limits<T>::min() || v > std::numeric_limits<T>::max()) {
      return false;
    }
    *number = static_cast<T>(v);
    return true;
  }
  if (!value.IsUint64() || value.GetUint64() > static_cast<uint64_t>(std::numeric_limits<T>::max())) return false;
  *number = static_cast<T>(value.GetUint64());
  return true;
}

template <typename T, typename Field>
tensorflow::Status AddInteger(const Json& value, DataType dtype, Field* field) {
  T number;
  if (!ReadInteger(value, &number)) return TypeError(value, DataTypeString(dtype));
  field->Add(number);
  return tensorflow::OkStatus();
}

// Appends a scalar to the field that belongs to the tensor's type.
tensorflow::Status AddValue(const Json& value, TensorProto* tensor) {
  const DataType dtype = tensor->dtype();
  switch (dtype) {
    case tensorflow::DT_FLOAT:
      if (!value.IsNumber()) return TypeError(value, DataTypeString(dtype));
      tensor->add_float_val(static_cast<float>(value.GetDouble()));
      return tensorflow::OkStatus();
    case tensorflow::DT_DOUBLE:
      if (!value.IsNumber()) return TypeError(value, DataTypeString(dtype));
      tensor->add_double_val(value.GetDouble());
      return tensorflow::OkStatus();
    case tensorflow::DT_HALF:
    case tensorflow::DT_BFLOAT16: {
      if (!value.IsNumber()) return TypeError(value, DataTypeString(dtype));
      const float number = static_cast<float>(value.GetDouble());
      const bool half = dtype == tensorflow::DT_HALF;
      tensor->add_half_val(half ? Eigen::numext::bit_cast<uint16_t>(static_cast<Eigen::half>(number))
                                : Eigen::numext::bit_cast<uint16_t>(static_cast<Eigen::bfloat16>(number)));
      return tensorflow::OkStatus();
    }
    case tensorflow::DT_INT8:
      return AddInteger<int8_t>(value, dtype, tensor->mutable_int_val());
    case tensorflow::DT_INT16:
      return AddInteger<int16_t>(value, dtype, tensor->mutable_int_val());
    case tensorflow::DT_INT32:
      return AddInteger<int32_t>(value, dtype, tensor->mutable_int_val());
    case tensorflow::DT_UINT8:
      return AddInteger<uint8_t>(value, dtype, tensor->mutable_int_val());
    case tensorflow::DT_UINT16:
      return AddInteger<uint16_t>(value, dtype, tensor->mutable_int_val());
    case tensorflow::DT_INT64:
      return AddInteger<int64_t>(value, dtype, tensor->mutable_int64_val());
    case tensorflow::DT_UINT32:
      return AddInteger<uint32_t>(value, dtype, tensor->mutable_uint32_val());
    case tensorflow::DT_UINT64:
      return AddInteger<uint64_t>(value, dtype, tensor->mutable_uint64_val());
    case tensorflow::DT_BOOL:
      if (!value.IsBool()) return TypeError(value, DataTypeString(dtype));
      tensor->add_bool_val(value.GetBool());
      return tensorflow::OkStatus();
    case tensorflow::DT_STRING:
      return ReadText(value, tensor->add_string_val());
    default:
      return absl::UnimplementedError(
          StrCat("Conversion of JSON Value: ", Show(value), " to type: ", DataTypeString(dtype)));
  }
}

// Appends a value that has the dimensions of `shape` from `dim` on. The first value in each dimension sets its size,
// and all others must have the same size.
tensorflow::Status AddTensor(const Json& value, size_t dim, std::vector<int64_t>* shape, bool* shape_known,
                             TensorProto* tensor) {
  if (!value.IsArray()) {
    if (*shape_known ? dim != shape->size() : false) {
      return InvalidArgument(StrCat("Encountered scalar ", Show(value), " where a list of dimension ", dim,
                                    " was expected; all parts of a tensor must have the same shape"));
    }
    *shape_known = true;
    return AddValue(value, tensor);
  }
  const int64_t size = value.Size();
  if (*shape_known) {
    if (dim >= shape->size() || (*shape)[dim] != size) {
      return InvalidArgument(StrCat("Encountered list at unexpected depth or of size: ", size, " at dimension: ", dim,
                                    " expected size: ", dim < shape->size() ? (*shape)[dim] : 0));
    }
  } else {
    if (shape->size() >= kMaxDims) return InvalidArgument(StrCat("a tensor has at most ", kMaxDims, " dimensions"));
    shape->push_back(size);
  }
  for (const Json& element : value.GetArray()) {
    TF_RETURN_IF_ERROR(AddTensor(element, dim + 1, shape, shape_known, tensor));
  }
  // No deeper value can add dimensions.
  if (size == 0) *shape_known = true;
  return tensorflow::OkStatus();
}

void SetShape(const std::vector<int64_t>& shape, TensorProto* tensor) {
  for (const int64_t size : shape) tensor->mutable_tensor_shape()->add_dim()->set_size(size);
}

// Collects instances of the same shape into one tensor.
class RowTensor {
 public:
  explicit RowTensor(DataType dtype) { proto_.set_dtype(dtype); }
  tensorflow::Status Add(const Json& value) { return AddTensor(value, 0, &shape_, &shape_known_, &proto_); }
  // Returns the tensor, whose first dimension has size `instances`.
  TensorProto Finish(int64_t instances) {
    std::vector<int64_t> shape = {instances};
    shape.insert(shape.end(), shape_.begin(), shape_.end());
    SetShape(shape, &proto_);
    return std::move(proto_);
  }

 private:
  TensorProto proto_;
  std::vector<int64_t> shape_;
  bool shape_known_ = false;
};

using Inputs = google::protobuf::Map<std::string, tensorflow::TensorInfo>;

std::string Keys(const Inputs& inputs) {
  std::set<std::string> names;
  for (const auto& [name, info] : inputs) names.insert(name);
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

using Defaults = google::protobuf::Map<std::string, TensorProto>;

// Returns the names of the inputs that a request must have.
std::set<std::string> Required(const Inputs& inputs, const Defaults& defaults) {
  std::set<std::string> names;
  for (const auto& [name, info] : inputs) {
    if (defaults.count(name) == 0) names.insert(name);
  }
  return names;
}

// Returns the only input that a value without a name can be, or "" if there are several.
std::string OnlyInput(const Inputs& inputs, const std::set<std::string>& required) {
  if (inputs.size() == 1) return inputs.begin()->first;
  return required.size() == 1 ? *required.begin() : "";
}

tensorflow::Status ReadRows(const Json& instances, const Inputs& inputs, const Defaults& defaults,
                            google::protobuf::Map<std::string, TensorProto>* tensors) {
  if (!instances.IsArray()) {
    return InvalidArgument(
        StrCat("Excepting 'instances' to be an list/array. Got JSON Type: ", TypeName(instances)));
  }
  if (instances.Empty()) return InvalidArgument("Expected at least one instance, got an empty list");
  std::map<std::string, RowTensor> rows;
  for (const auto& [name, info] : inputs) rows.emplace(name, RowTensor(info.dtype()));
  const bool named = instances[0].IsObject() && !IsBytes(instances[0]);
  const std::set<std::string> required = Required(inputs, defaults);
  const std::string only = OnlyInput(inputs, required);
  if (!named && only.empty()) {
    return InvalidArgument(StrCat("instances is a plain list, but expecting list of objects as multiple input tensors "
                                  "required as per tensorinfo_map: ",
                                  Keys(inputs)));
  }
  std::set<std::string> given;
  if (!named) given.insert(only);
  for (const Json& instance : instances.GetArray()) {
    if (!named) {
      if (instance.IsObject() && !IsBytes(instance)) {
        return InvalidArgument("'instances' mixes objects and plain values; send either kind alone");
      }
      TF_RETURN_IF_ERROR(rows.at(only).Add(instance));
      continue;
    }
    if (!instance.IsObject() || IsBytes(instance)) {
      return InvalidArgument(
          StrCat("'instances' mixes objects and plain values: expected an object, got ", Show(instance)));
    }
    std::set<std::string> seen;
    for (const auto& member : instance.GetObject()) {
      const std::string name(member.name.GetString(), member.name.GetStringLength());
      const auto row = rows.find(name);
      if (row == rows.end() || !seen.insert(name).second) {
        return InvalidArgument(StrCat("Failed to process element: ", Show(instance), " key ", name,
                                      row == rows.end() ? " is not expected" : " is given twice",
                                      "; expected keys: ", Keys(inputs)));
      }
      TF_RETURN_IF_ERROR(row->second.Add(member.value));
    }
    for (const std::string& name : required) {
      if (seen.count(name) == 0) {
        return InvalidArgument(
            StrCat("Failed to process element: ", Show(instance), " keys are missing; expected keys: ", Keys(inputs)));
      }
    }
    if (&instance == instances.Begin()) given = seen;
    if (seen != given) {
      return InvalidArgument(StrCat("Failed to process element: ", Show(instance),
                                    " has other keys than the first instance; give all instances the same keys"));
    }
  }
  for (const std::string& name : given) (*tensors)[name] = rows.at(name).Finish(instances.Size());
  return tensorflow::OkStatus();
}

tensorflow::Status ReadColumn(const Json& value, DataType dtype, TensorProto* tensor) {
  tensor->set_dtype(dtype);
  std::vector<int64_t> shape;
  bool shape_known = false;
  TF_RETURN_IF_ERROR(AddTensor(value, 0, &shape, &shape_known, tensor));
  tensor->mutable_tensor_shape();
  SetShape(shape, tensor);
  return tensorflow::OkStatus();
}

tensorflow::Status ReadColumns(const Json& values, const Inputs& inputs, const Defaults& defaults,
                               google::protobuf::Map<std::string, TensorProto>* tensors) {
  if (!values.IsObject() || IsBytes(values)) {
    const std::set<std::string> required = Required(inputs, defaults);
    const std::string only = OnlyInput(inputs, required);
    if (only.empty()) {
      return InvalidArgument(StrCat("inputs is a plain value/list, but expecting an object as multiple input tensors "
                                    "required as per tensorinfo_map: ",
                                    Keys(inputs)));
    }
    return ReadColumn(values, inputs.at(only).dtype(), &(*tensors)[only]);
  }
  for (const auto& [name, info] : inputs) {
    const Json* value = Member(values, name.c_str());
    if (value == nullptr) {
      if (defaults.count(name) > 0) continue;
      return InvalidArgument(StrCat("Missing named input: ", name, " in 'inputs' object; expected ", Keys(inputs)));
    }
    TF_RETURN_IF_ERROR(ReadColumn(*value, info.dtype(), &(*tensors)[name]));
  }
  std::set<std::string> seen;
  for (const auto& member : values.GetObject()) {
    const std::string name(member.name.GetString(), member.name.GetStringLength());
    if (inputs.count(name) == 0 || !seen.insert(name).second) {
      return InvalidArgument(StrCat(inputs.count(name) == 0 ? "Unexpected" : "Repeated", " named input: ", name,
                                    "; expected ", Keys(inputs)));
    }
  }
  return tensorflow::OkStatus();
}

tensorflow::Status ReadSignatureName(const Json& document, std::string* name) {
  const Json* value = Member(document, "signature_name");
  if (value == nullptr) return tensorflow::OkStatus();
  if (!value->IsString()) return InvalidArgument("'signature_name' key must be a string value.");
  name->assign(value->GetString(), value->GetStringLength());
  return tensorflow::OkStatus();
}

// Writes the shortest text that reads back as the same number. It has a point, so that JSON readers see a float.
template <typename T>
void WriteFloat(T number, Writer* writer) {
  if (!std::isfinite(number)) {
    writer->Double(static_cast<double>(number));
    return;
  }
  char buffer[40];
  char* end = std::to_chars(buffer, buffer + sizeof(buffer) - 2, number).ptr;
  if (std::string_view(buffer, end - buffer).find_first_of(".e") == std::string_view::npos) {
    *end++ = '.';
    *end++ = '0';
  }
  writer->RawValue(buffer, end - buffer, rapidjson::kNumberType);
}

bool IsUtf8(const tstring& text) {
  rapidjson::MemoryStream stream(text.data(), text.size());
  rapidjson::GenericStringBuffer<rapidjson::UTF8<>> sink;
  while (stream.Tell() < text.size()) {
    if (!rapidjson::UTF8<>::Validate(stream, sink)) return false;
    sink.Clear();
  }
  return true;
}

void WriteText(const tstring& text, bool as_bytes, Writer* writer) {
  // Bytes that are not UTF-8 cannot be a JSON string, so they are written in base64.
  if (!as_bytes && IsUtf8(text)) {
    writer->String(text.data(), text.size());
    return;
  }
  const std::string encoded = absl::Base64Escape({text.data(), text.size()});
  writer->StartObject();
  writer->Key(kBase64);
  writer->String(encoded.data(), encoded.size());
  writer->EndObject();
}

tensorflow::Status WriteValue(const Tensor& tensor, int64_t i, bool as_bytes, Writer* writer) {
  switch (tensor.dtype()) {
    case tensorflow::DT_FLOAT:
      WriteFloat(tensor.flat<float>()(i), writer);
      break;
    case tensorflow::DT_DOUBLE:
      WriteFloat(tensor.flat<double>()(i), writer);
      break;
    case tensorflow::DT_HALF:
      WriteFloat(static_cast<float>(tensor.flat<Eigen::half>()(i)), writer);
      break;
    case tensorflow::DT_BFLOAT16:
      WriteFloat(static_cast<float>(tensor.flat<Eigen::bfloat16>()(i)), writer);
      break;
    case tensorflow::DT_INT8:
      writer->Int(tensor.flat<int8_t>()(i));
      break;
    case tensorflow::DT_INT16:
      writer->Int(tensor.flat<int16_t>()(i));
      break;
    case tensorflow::DT_INT32:
      writer->Int(tensor.flat<int32_t>()(i));
      break;
    case tensorflow::DT_INT64:
      writer->Int64(tensor.flat<int64_t>()(i));
      break;
    case tensorflow::DT_UINT8:
      writer->Uint(tensor.flat<uint8_t>()(i));
      break;
    case tensorflow::DT_UINT16:
      writer->Uint(tensor.flat<uint16_t>()(i));
      break;
    case tensorflow::DT_UINT32:
      writer->Uint(tensor.flat<uint32_t>()(i));
      break;
    case tensorflow::DT_UINT64:
      writer->Uint64(tensor.flat<uint64_t>()(i));
      break;
    case tensorflow::DT_BOOL:
      writer->Bool(tensor.flat<bool>()(i));
      break;
    case tensorflow::DT_STRING:
      WriteText(tensor.flat<tstring>()(i), as_bytes, writer);
      break;
    default:
      return absl::UnimplementedError(StrCat("Conversion of type: ", DataTypeString(tensor.dtype()), " to JSON"));
  }
  return tensorflow::OkStatus();
}

// Writes the part of a tensor that has the dimensions from `dim` on and begins at element `*next`.
tensorflow::Status WriteTensor(const Tensor& tensor, int dim, bool as_bytes, int64_t* next, Writer* writer) {
  if (dim == tensor.dims()) return WriteValue(tensor, (*next)++, as_bytes, writer);
  writer->StartArray();
  for (int64_t i = 0; i < tensor.dim_size(dim); ++i) {
    TF_RETURN_IF_ERROR(WriteTensor(tensor, dim + 1, as_bytes, next, writer));
  }
  writer->EndArray();
  return tensorflow::OkStatus();
}

bool IsBytesName(const std::string& name) {
  constexpr std::string_view kSuffix = "_bytes";
  return name.size() >= kSuffix.size() && name.compare(name.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0;
}

// Reads the value of a feature of a tf.Example. All elements of a list have the same kind; if one number has a point,
// all become floats.
tensorflow::Status ReadFeature(const Json& value, const std::string& name, tensorflow::Feature* feature) {
  std::vector<const Json*> values;
  if (value.IsArray()) {
    for (const Json& element : value.GetArray()) values.push_back(&element);
  } else {
    values.push_back(&value);
  }
  bool all_integers = true, all_numbers = true;
  for (const Json* element : values) {
    all_numbers &= element->IsNumber();
    all_integers &= element->IsInt64();
  }
  for (const Json* element : values) {
    if (element->IsBool() || element->IsNull() || element->IsArray()) {
      return InvalidArgument(StrCat("Unexpected JSON type ", TypeName(*element), " in feature named: ", name,
                                    "; expected a number, a string, or a list of them"));
    }
    if (all_integers) {
      feature->mutable_int64_list()->add_value(element->GetInt64());
    } else if (all_numbers) {
      feature->mutable_float_list()->add_value(static_cast<float>(element->GetDouble()));
    } else {
      TF_RETURN_IF_ERROR(ReadText(*element, feature->mutable_bytes_list()->add_value()));
    }
  }
  return tensorflow::OkStatus();
}

tensorflow::Status ReadExample(const Json& value, tensorflow::Example* example) {
  if (!value.IsObject()) return InvalidArgument("Example must be JSON object but got JSON " + TypeName(value));
  auto* features = example->mutable_features()->mutable_feature();
  for (const auto& member : value.GetObject()) {
    const std::string name(member.name.GetString(), member.name.GetStringLength());
    TF_RETURN_IF_ERROR(ReadFeature(member.value, name, &(*features)[name]));
  }
  return tensorflow::OkStatus();
}

std::string TextOf(const rapidjson::StringBuffer& buffer) { return {buffer.GetString(), buffer.GetSize()}; }

}  // namespace

tensorflow::Status ReadPredictJson(const std::string& text, const SignatureDefs& signatures,
                                   tensorflow::serving::PredictRequest* request, JsonFormat* format) {
  rapidjson::Document document;
  TF_RETURN_IF_ERROR(Parse(text, &document));
  std::string name;
  TF_RETURN_IF_ERROR(ReadSignatureName(document, &name));
  request->mutable_model_spec()->set_signature_name(name);
  const auto signature = signatures.find(ResolveSignatureName(name));
  if (signature == signatures.end()) {
    return InvalidArgument(
        StrCat("Serving signature name: \"", ResolveSignatureName(name), "\" not found in signature def"));
  }
  const Json* instances = Member(document, "instances");
  const Json* inputs = Member(document, "inputs");
  if (instances != nullptr && inputs != nullptr) {
    return InvalidArgument("Not formatted correctly expecting only one of 'instances' or 'inputs' keys to exist ");
  }
  if (instances == nullptr && inputs == nullptr) return InvalidArgument("Missing 'inputs' or 'instances' key");
  if (signature->second.inputs().empty()) {
    return InvalidArgument(StrCat("Signature ", signature->first, " has no inputs; send the request over gRPC"));
  }
  *format = instances != nullptr ? JsonFormat::kRow : JsonFormat::kColumn;
  const tensorflow::SignatureDef& found = signature->second;
  return instances != nullptr ? ReadRows(*instances, found.inputs(), found.defaults(), request->mutable_inputs())
                              : ReadColumns(*inputs, found.inputs(), found.defaults(), request->mutable_inputs());
}

tensorflow::Status WritePredictJson(const google::protobuf::Map<std::string, TensorProto>& outputs, JsonFormat format,
                                    std::string* text) {
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, proto] : outputs) {
    if (!tensors[name].FromProto(proto)) return absl::InternalError("cannot read tensor " + name + " of the answer");
  }
  if (tensors.empty()) return InvalidArgument("Cannot convert empty tensor map to JSON");
  rapidjson::StringBuffer buffer;
  Writer writer(buffer);
  writer.StartObject();
  std::map<std::string, int64_t> next;
  if (format == JsonFormat::kColumn) {
    writer.Key("outputs");
    if (tensors.size() > 1) writer.StartObject();
    for (const auto& [name, tensor] : tensors) {
      if (tensors.size() > 1) writer.Key(name.c_str());
      TF_RETURN_IF_ERROR(WriteTensor(tensor, 0, IsBytesName(name), &next[name], &writer));
    }
    if (tensors.size() > 1) writer.EndObject();
  } else {
    const Tensor& first = tensors.begin()->second;
    for (const auto& [name, tensor] : tensors) {
      if (tensor.dims() == 0 || tensor.dim_size(0) != first.dim_size(0)) {
        return InvalidArgument(StrCat(
            "Tensor name: ", name, " has ",
            tensor.dims() == 0 ? "no shape information" : StrCat("inconsistent batch size: ", tensor.dim_size(0)),
            ", but 'instances' are answered one by one; send 'inputs' instead"));
      }
    }
    writer.Key("predictions");
    writer.StartArray();
    for (int64_t i = 0; i < first.dim_size(0); ++i) {
      if (tensors.size() > 1) writer.StartObject();
      for (const auto& [name, tensor] : tensors) {
        if (tensors.size() > 1) writer.Key(name.c_str());
        TF_RETURN_IF_ERROR(WriteTensor(tensor, 1, IsBytesName(name), &next[name], &writer));
      }
      if (tensors.size() > 1) writer.EndObject();
    }
    writer.EndArray();
  }
  writer.EndObject();
  *text = TextOf(buffer);
  return tensorflow::OkStatus();
}

tensorflow::Status ReadExamplesJson(const std::string& text, std::string* signature_name,
                                    tensorflow::serving::Input* input) {
  rapidjson::Document document;
  TF_RETURN_IF_ERROR(Parse(text, &document));
  TF_RETURN_IF_ERROR(ReadSignatureName(document, signature_name));
  const Json* examples = Member(document, "examples");
  if (examples == nullptr || !examples->IsArray() || examples->Empty()) {
    return InvalidArgument(
        "When method is classify or regress, 'examples' key must hold a list of at least one object");
  }
  const Json* context = Member(document, "context");
  if (context != nullptr) {
    TF_RETURN_IF_ERROR(ReadExample(*context, input->mutable_example_list_with_context()->mutable_context()));
  }
  for (const Json& example : examples->GetArray()) {
    TF_RETURN_IF_ERROR(ReadExample(example, context != nullptr
                                                ? input->mutable_example_list_with_context()->add_examples()
                                                : input->mutable_example_list()->add_examples()));
  }
  return tensorflow::OkStatus();
}

std::string WriteClassifyJson(const tensorflow::serving::ClassificationResult& result) {
  rapidjson::StringBuffer buffer;
  Writer writer(buffer);
  writer.StartObject();
  writer.Key("results");
  writer.StartArray();
  for (const auto& example : result.classifications()) {
    writer.StartArray();
    for (const auto& entry : example.classes()) {
      writer.StartArray();
      WriteText(entry.label(), /*as_bytes=*/false, &writer);
      WriteFloat(entry.score(), &writer);
      writer.EndArray();
    }
    writer.EndArray();
  }
  writer.EndArray();
  writer.EndObject();
  return TextOf(buffer);
}

std::string WriteRegressJson(const tensorflow::serving::RegressionResult& result) {
  rapidjson::StringBuffer buffer;
  Writer writer(buffer);
  writer.StartObject();
  writer.Key("results");
  writer.StartArray();
  for (const auto& example : result.regressions()) WriteFloat(example.value(), &writer);
  writer.EndArray();
  writer.EndObject();
  return TextOf(buffer);
}

std::string WriteErrorJson(const std::string& message) {
  rapidjson::StringBuffer buffer;
  Writer writer(buffer);
  writer.StartObject();
  writer.Key("error");
  // The message may contain bytes that a client sent, and JSON must be UTF-8.
  const tstring text(message);
  std::string clean = message;
  if (!IsUtf8(text)) {
    for (char& c : clean) {
      if (static_cast<unsigned char>(c) >= 0x80) c = '?';
    }
  }
  writer.String(clean.data(), clean.size());
  writer.EndObject();
  return TextOf(buffer);
}

}  // namespace dpsr::serving
