#include "dpsr_tf/ops/batch_options.h"

#include <cstddef>
#include <iterator>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "rapidjson/document.h"
#include "rapidjson/error/en.h"
#include "rapidjson/stringbuffer.h"
#include "rapidjson/writer.h"

namespace dpsr {
namespace {

using Json = rapidjson::Value;

// One kind of field for each type of member.
struct WholeNumber {
  const char* name;
  int64_t BatchOptions::*member;
  int64_t minimum, maximum;
};
struct Share {  // 0 to 1
  const char* name;
  float BatchOptions::*member;
};
struct Flag {
  const char* name;
  bool BatchOptions::*member;
};
struct Source {
  const char* name;
  OwnNegativeSource BatchOptions::*member;
};
struct Sampling {
  const char* name;
  GraphSampling BatchOptions::*member;
};
struct FanOut {
  const char* name;
  std::vector<int64_t> BatchOptions::*member;
};
struct Features {
  const char* name;
  FeatureNames BatchOptions::*member;
};

// A mask larger than this is a mistake; the limit also keeps products of these sizes within 64 bits.
constexpr int64_t kMaxItems = 1 << 20;
constexpr int64_t kMaxOwnNegatives = 1 << 24;
// No real training reaches these. They keep steps times batch sizes within 64 bits.
constexpr int64_t kMaxEpochs = 1 << 24, kMaxShards = 1 << 24, kMaxShuffleBuffer = int64_t{1} << 40;
constexpr int64_t kMaxParallelCalls = 1024;
constexpr size_t kMaxHops = 2;
constexpr int64_t kMaxFanOut = 256;

// The table of fields: the only place that lists the options for reading and checking.
constexpr std::tuple kFields{
    WholeNumber{"batch_size", &BatchOptions::batch_size, 1, kMaxItems},
    WholeNumber{"num_title_queries", &BatchOptions::num_title_queries, 0, kMaxItems},
    WholeNumber{"pretrain_steps", &BatchOptions::pretrain_steps, 0, kMaxStep},
    Share{"title_subsampling", &BatchOptions::title_subsampling},
    Share{"title_typo_rate", &BatchOptions::title_typo_rate},
    Share{"query_typo_rate", &BatchOptions::query_typo_rate},
    WholeNumber{"num_random_negatives", &BatchOptions::num_random_negatives, 0, kMaxItems},
    WholeNumber{"num_supervised_negatives", &BatchOptions::num_supervised_negatives, 0, kMaxItems},
    WholeNumber{"num_own_negatives", &BatchOptions::num_own_negatives, 0, kMaxOwnNegatives},
    Source{"own_negative_source", &BatchOptions::own_negative_source},
    Flag{"negative_mask", &BatchOptions::negative_mask},
    Features{"user_features", &BatchOptions::user_features},
    Features{"item_features", &BatchOptions::item_features},
    Features{"history_features", &BatchOptions::history_features},
    WholeNumber{"history_length", &BatchOptions::history_length, 0, kMaxItems},
    WholeNumber{"history_types", &BatchOptions::history_types, 0, (1 << kNumEventTypes) - 1},
    Flag{"history_text", &BatchOptions::history_text},
    WholeNumber{"query_history_length", &BatchOptions::query_history_length, 0, kMaxItems},
    FanOut{"graph_fan_out", &BatchOptions::graph_fan_out},
    Sampling{"graph_sampling", &BatchOptions::graph_sampling},
    Share{"graph_dropout", &BatchOptions::graph_dropout},
    Features{"graph_attributes", &BatchOptions::graph_attributes},
    WholeNumber{"shuffle_buffer", &BatchOptions::shuffle_buffer, 1, kMaxShuffleBuffer},
    WholeNumber{"seed", &BatchOptions::seed, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()},
    WholeNumber{"num_epochs", &BatchOptions::num_epochs, 0, kMaxEpochs},
    WholeNumber{"shard_index", &BatchOptions::shard_index, 0, kMaxShards},
    WholeNumber{"num_shards", &BatchOptions::num_shards, 1, kMaxShards},
    WholeNumber{"num_parallel_calls", &BatchOptions::num_parallel_calls, 0, kMaxParallelCalls},
};

// In the order of OwnNegativeSource.
constexpr const char* kSourceNames[] = {"impressions", "labels", "both"};
// In the order of GraphSampling.
constexpr const char* kSamplingNames[] = {"weighted", "strongest"};

// Calls visit(field) for each field up to the first error, which it returns.
template <typename Visit>
Status ForEachField(Visit visit) {
  Status status;
  std::apply([&](const auto&... field) { (void)((status = visit(field)).ok() && ...); }, kFields);
  return status;
}

template <typename Value>
Status Unexpected(const char* name, const Value& value, const std::string& expected) {
  return MakeStatus(StatusCode::kInvalidArgument, name, " is ", value, ", expected ", expected);
}

std::string Range(const WholeNumber& field) { return StrCat(field.minimum, " to ", field.maximum); }

Status Check(const WholeNumber& field, const BatchOptions& options) {
  const int64_t value = options.*field.member;
  if (value >= field.minimum && value <= field.maximum) return Status();
  return Unexpected(field.name, value, Range(field));
}

Status Check(const Share& field, const BatchOptions& options) {
  const float value = options.*field.member;
  if (value >= 0 && value <= 1) return Status();
  return Unexpected(field.name, value, "0 to 1");
}

Status Check(const FanOut& field, const BatchOptions& options) {
  const std::vector<int64_t>& hops = options.*field.member;
  if (hops.size() > kMaxHops) return Unexpected(field.name, hops.size(), StrCat("at most ", kMaxHops, " numbers"));
  for (int64_t most : hops) {
    if (most < 1 || most > kMaxFanOut) return Unexpected(field.name, most, StrCat("numbers from 1 to ", kMaxFanOut));
  }
  return Status();
}

// The other members have no values out of range.
template <typename Field>
Status Check(const Field&, const BatchOptions&) {
  return Status();
}

std::string Written(const Json& value) {
  rapidjson::StringBuffer buffer;
  rapidjson::Writer<rapidjson::StringBuffer, rapidjson::UTF8<>, rapidjson::UTF8<>, rapidjson::CrtAllocator,
                    rapidjson::kWriteNanAndInfFlag>
      writer(buffer);
  value.Accept(writer);
  return std::string(buffer.GetString(), buffer.GetSize());
}

Status Read(const WholeNumber& field, const Json& value, BatchOptions* options) {
  if (!value.IsInt64()) return Unexpected(field.name, Written(value), "a whole number, " + Range(field));
  options->*field.member = value.GetInt64();
  return Status();
}

Status Read(const Share& field, const Json& value, BatchOptions* options) {
  if (!value.IsNumber()) return Unexpected(field.name, Written(value), "a number, 0 to 1");
  options->*field.member = static_cast<float>(value.GetDouble());
  return Status();
}

Status Read(const Flag& field, const Json& value, BatchOptions* options) {
  if (!value.IsBool()) return Unexpected(field.name, Written(value), "true or false");
  options->*field.member = value.GetBool();
  return Status();
}

// Reads one of the names of an enumeration, which are in its order.
template <typename Field, size_t n>
Status ReadName(const Field& field, const Json& value, const char* const (&names)[n], BatchOptions* options) {
  std::string allowed;
  for (size_t i = 0; i < n; ++i) {
    if (value == names[i]) {
      options->*field.member = static_cast<std::decay_t<decltype(options->*field.member)>>(i);
      return Status();
    }
    allowed += StrCat(i == 0 ? "" : ", ", names[i]);
  }
  return Unexpected(field.name, Written(value), "one of " + allowed);
}

Status Read(const Source& field, const Json& value, BatchOptions* options) {
  return ReadName(field, value, kSourceNames, options);
}

Status Read(const Sampling& field, const Json& value, BatchOptions* options) {
  return ReadName(field, value, kSamplingNames, options);
}

Status Read(const FanOut& field, const Json& value, BatchOptions* options) {
  std::vector<int64_t>* hops = &(options->*field.member);
  hops->clear();
  bool is_list = value.IsArray();
  if (is_list) {
    for (const Json& most : value.GetArray()) {
      is_list &= most.IsInt64();
      if (is_list) hops->push_back(most.GetInt64());
    }
  }
  return is_list ? Status() : Unexpected(field.name, Written(value), "a list of whole numbers");
}

bool ReadNames(const Json& object, const char* key, std::vector<std::string>* names) {
  const auto found = object.FindMember(key);
  if (found == object.MemberEnd() || !found->value.IsArray()) return false;
  names->clear();
  for (const Json& name : found->value.GetArray()) {
    if (!name.IsString()) return false;
    names->emplace_back(name.GetString(), name.GetStringLength());
  }
  return true;
}

Status Read(const Features& field, const Json& value, BatchOptions* options) {
  FeatureNames* names = &(options->*field.member);
  if (!value.IsObject() || value.MemberCount() != 2 || !ReadNames(value, "fixed", &names->fixed) ||
      !ReadNames(value, "lists", &names->lists)) {
    return Unexpected(field.name, Written(value), R"({"fixed": [names], "lists": [names]})");
  }
  return Status();
}

}  // namespace

Status BatchOptions::Parse(const std::string& json, BatchOptions* options) {
  rapidjson::Document document;
  // Iterative: deep nesting cannot use up the stack.
  document.Parse<rapidjson::kParseIterativeFlag | rapidjson::kParseNanAndInfFlag |
                 rapidjson::kParseFullPrecisionFlag | rapidjson::kParseValidateEncodingFlag>(json.data(), json.size());
  if (document.HasParseError()) {
    return MakeStatus(StatusCode::kInvalidArgument, "the batch options are not valid JSON at byte ",
                      document.GetErrorOffset(), ": ", rapidjson::GetParseError_En(document.GetParseError()));
  }
  if (!document.IsObject()) return Unexpected("the text of the batch options", Written(document), "a JSON object");
  size_t num_fields = 0;
  DPSR_RETURN_IF_ERROR(ForEachField([&](const auto& field) {
    ++num_fields;
    const auto found = document.FindMember(field.name);
    if (found == document.MemberEnd()) {
      return MakeStatus(StatusCode::kInvalidArgument, "the batch options have no ", field.name,
                        ", expected all of them");
    }
    return Read(field, found->value, options);
  }));
  for (const auto& member : document.GetObject()) {
    bool is_known = false;
    DPSR_RETURN_IF_ERROR(ForEachField([&](const auto& field) {
      is_known |= member.name == field.name;
      return Status();
    }));
    if (!is_known) return Unexpected("a name in the batch options", Written(member.name), "a batch option");
  }
  if (document.MemberCount() != num_fields) {
    return MakeStatus(StatusCode::kInvalidArgument, "the batch options have a name twice, expected each once");
  }
  return options->Validate();
}

Status BatchOptions::Validate() const {
  DPSR_RETURN_IF_ERROR(ForEachField([this](const auto& field) { return Check(field, *this); }));
  if (num_title_queries > batch_size) {
    return Unexpected("num_title_queries", num_title_queries,
                      StrCat("at most batch_size, ", batch_size, ": the other pairs come from the log"));
  }
  if (num_title_queries == batch_size && num_epochs > 0) {
    return Unexpected("num_epochs", num_epochs, "0: with title queries only, there are no passes over the log");
  }
  if (num_supervised_negatives > num_random_negatives) {
    return Unexpected("num_supervised_negatives", num_supervised_negatives,
                      StrCat("at most num_random_negatives, ", num_random_negatives,
                             ": they replace random negatives"));
  }
  if (num_own_negatives > kMaxOwnNegatives / batch_size) {
    return Unexpected("num_own_negatives", num_own_negatives,
                      StrCat("at most ", kMaxOwnNegatives / batch_size, " with batch_size ", batch_size));
  }
  if (shard_index >= num_shards) {
    return Unexpected("shard_index", shard_index, StrCat("at most num_shards - 1, ", num_shards - 1));
  }
  return Status();
}

}  // namespace dpsr
