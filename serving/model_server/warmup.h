// Replays the warm-up requests of a SavedModel before the version takes requests of clients. The first requests are
// slow, because TensorFlow and the memory map do part of their work only then.
#ifndef DPSR_SERVING_MODEL_SERVER_WARMUP_H_
#define DPSR_SERVING_MODEL_SERVER_WARMUP_H_

#include <string>

#include "serving/model_server/servable.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// Runs each request in `path`/assets.extra/tf_serving_warmup_requests, a TFRecord file of PredictionLog messages,
// `iterations` times. Does nothing if there is no such file. DATA_LOSS: not a TFRecord file. INVALID_ARGUMENT: a record
// that is not a PredictionLog, or more than 1000 records. UNIMPLEMENTED: a kind of request that cannot be replayed.
// Otherwise the error of a request that fails.
tensorflow::Status ReplayWarmup(const Servable& servable, const std::string& path, int iterations);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_WARMUP_H_
