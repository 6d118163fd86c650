#include "dpsr_tf/ops/batch_components.h"

#include <utility>

#include "rapidjson/stringbuffer.h"
#include "rapidjson/writer.h"

namespace dpsr {
namespace {

constexpr const char* DtypeName(int32_t) { return "int32"; }
constexpr const char* DtypeName(int64_t) { return "int64"; }
constexpr const char* DtypeName(float) { return "float32"; }

// Visits the components to write down their names, types and shapes.
class Describer {
 public:
  std::vector<BatchComponent> components;

  template <typename T>
  void Vector(const char* name, int64_t size, std::vector<T> Batch::*) {
    Add(name, DtypeName(T()), {size});
  }
  void PairQueries(const char* name, int64_t texts) { AddTexts(name, texts); }
  void LogQueries(const char* name, int64_t texts, std::vector<int32_t> Batch::*) { AddTexts(name, texts); }
  void ItemTexts(const char* name, int64_t texts, std::vector<int32_t> Batch::*) { AddTexts(name, texts); }
  template <typename Columns>
  void Features(const std::string& name, int64_t num_rows, const FeatureNames& names, Columns,
                std::vector<int32_t> Batch::*) {
    Add(name + ".codes", "int32", {num_rows, static_cast<int64_t>(names.fixed.size())});
    for (size_t i = 0; i < names.lists.size(); ++i) AddTexts(StrCat(name, ".lists.", i), num_rows);
  }
  void NegativeMask(const char* name, int64_t rows, int64_t columns) { Add(name, "bool", {rows, columns}); }
  void OwnNegativeMask(const char* name, int64_t rows, int64_t columns) { Add(name, "bool", {rows, columns}); }

 private:
  void Add(std::string name, const char* dtype, std::vector<int64_t> shape) {
    components.push_back({std::move(name), dtype, std::move(shape)});
  }
  void AddTexts(const std::string& name, int64_t texts) {
    Add(name + ".values", "int32", {kAnySize});
    Add(name + ".row_splits", "int64", {texts == kAnySize ? kAnySize : texts + 1});
  }
};

}  // namespace

std::vector<BatchComponent> BatchComponents(const BatchOptions& options) {
  Describer describer;
  VisitBatchComponents(options, &describer);
  return std::move(describer.components);
}

std::string DescribeBatchComponents(const std::string& options_json) {
  rapidjson::StringBuffer buffer;
  rapidjson::Writer<rapidjson::StringBuffer> writer(buffer);
  writer.StartObject();
  BatchOptions options;
  const Status status = BatchOptions::Parse(options_json, &options);
  if (!status.ok()) {
    writer.Key("error");
    writer.String(status.message().data(), static_cast<rapidjson::SizeType>(status.message().size()));
  } else {
    writer.Key("components");
    writer.StartArray();
    for (const BatchComponent& component : BatchComponents(options)) {
      writer.StartArray();
      writer.String(component.name.data(), static_cast<rapidjson::SizeType>(component.name.size()));
      writer.String(component.dtype);
      writer.StartArray();
      for (int64_t size : component.shape) writer.Int64(size);
      writer.EndArray();
      writer.EndArray();
    }
    writer.EndArray();
  }
  writer.EndObject();
  return std::string(buffer.GetString(), buffer.GetSize());
}

}  // namespace dpsr
