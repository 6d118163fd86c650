// Replays the requests that a SavedModel brings along, before the version takes those of clients: the first ones are
// slow, for what TensorFlow and the memory map do lazily.
#ifndef DPSR_SERVING_MODEL_SERVER_WARMUP_H_
#define DPSR_SERVING_MODEL_SERVER_WARMUP_H_

#include <string>

#include "serving/model_server/servable.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// Runs each request of `path`/assets.extra/tf_serving_warmup_requests, a TFRecord file of PredictionLog, `iterations`
// times. No such file is fine. DATA_LOSS (no TFRecord file), INVALID_ARGUMENT (a record that is no PredictionLog, more
// than 1000 of them), UNIMPLEMENTED (a kind that cannot be replayed), or the error of a request that fails.
tensorflow::Status ReplayWarmup(const Servable& servable, const std::string& path, int iterations);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_WARMUP_H_
