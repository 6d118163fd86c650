#include "serving/model_server/warmup.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "common/status.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/inference.h"
#include "serving/model_server/metrics.h"
#include "tensorflow/core/lib/io/record_reader.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow_serving/apis/prediction_log.pb.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::PredictionLog;

constexpr char kFile[] = "/assets.extra/tf_serving_warmup_requests";
constexpr int kMaxRecords = 1000;

tensorflow::Status Replay(const Servable& servable, const PredictionLog& log) {
  switch (log.log_type_case()) {
    case PredictionLog::kPredictLog: {
      tensorflow::serving::PredictResponse response;
      return Predict(servable, log.predict_log().request(), Deadline::max(), &response);
    }
    case PredictionLog::kClassifyLog: {
      tensorflow::serving::ClassificationResponse response;
      return Classify(servable, log.classify_log().request(), Deadline::max(), &response);
    }
    case PredictionLog::kRegressLog: {
      tensorflow::serving::RegressionResponse response;
      return Regress(servable, log.regress_log().request(), Deadline::max(), &response);
    }
    case PredictionLog::kMultiInferenceLog: {
      tensorflow::serving::MultiInferenceResponse response;
      return MultiInference(servable, log.multi_inference_log().request(), Deadline::max(), &response);
    }
    case PredictionLog::LOG_TYPE_NOT_SET:
      return tensorflow::OkStatus();
    default:
      return absl::UnimplementedError(
          StrCat("Unsupported log_type for warmup: ", static_cast<int>(log.log_type_case())));
  }
}

tensorflow::Status ReplayFile(const Servable& servable, const std::string& file, int iterations) {
  std::unique_ptr<tensorflow::RandomAccessFile> opened;
  TF_RETURN_IF_ERROR(tensorflow::Env::Default()->NewRandomAccessFile(file, &opened));
  tensorflow::io::SequentialRecordReader reader(opened.get());
  tensorflow::tstring record;
  for (int count = 0;; ++count) {
    const tensorflow::Status read = reader.ReadRecord(&record);
    if (absl::IsOutOfRange(read)) return tensorflow::OkStatus();
    if (!read.ok()) {
      return absl::DataLossError(StrCat(std::string(read.message()), "; ", file,
                                        " cannot be read. Please verify your warmup data is in TFRecord format."));
    }
    if (count == kMaxRecords) {
      return absl::InvalidArgumentError(
          StrCat("Number of warmup records exceeds the maximum (", kMaxRecords, ") at ", file));
    }
    PredictionLog log;
    if (!log.ParseFromArray(record.data(), static_cast<int>(record.size()))) {
      return absl::InvalidArgumentError(StrCat("Failed to parse warmup record ", count, " of ", file));
    }
    for (int i = 0; i < iterations; ++i) {
      const tensorflow::Status status = Replay(servable, log);
      if (status.ok()) continue;
      return tensorflow::Status(status.code(),
                                StrCat("warm-up request ", count, " failed: ", std::string(status.message())));
    }
  }
}

}  // namespace

tensorflow::Status ReplayWarmup(const Servable& servable, const std::string& path, int iterations) {
  const std::string file = path + kFile;
  if (!tensorflow::Env::Default()->FileExists(file).ok()) return tensorflow::OkStatus();
  const auto begin = std::chrono::steady_clock::now();
  const tensorflow::Status status =
      CatchExceptions("a warm-up request", [&] { return ReplayFile(servable, file, std::max(1, iterations)); });
  RecordWarmup(path, status, MicrosecondsSince(begin));
  return status;
}

}  // namespace dpsr::serving
