// The reference `limit` in benchmarks/training.py: its model and training step, written by hand for one thread, without
// a framework. It is not a limit, despite its name: a better loop is possible.
// It has two advantages over a framework: tokens are in memory, and all texts have the same number of tokens.
//
//   training_limit FOLDER BATCH_SIZE NUM_IDS   trains from FOLDER/queries.bin and titles.bin (int32 ids). Each line on
//                                              standard input is a number of CPU seconds; the answer is what was done.
//   training_limit check START                 prints the losses of the steps from START (write_start of training.py)
#include <sys/mman.h>

#include <Eigen/Dense>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::RowVectorXf;

constexpr int kDim = 64, kWidths[] = {256, 128, 64}, kLayers = 3;
constexpr int kQueryTokens = 10, kTitleTokens = 30, kRandom = 64;
constexpr int kCheckRows = 2000, kCheckBatch = 64, kCheckSteps = 5;
constexpr float kMargin = 0.1f, kLearningRate = 0.01f, kInitialAccumulator = 0.1f, kAlpha = 0.5f;

void AdagradStep(const float* gradient, int64_t n, float* accumulator, float* value) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i], total = accumulator[i] + g * g;
    accumulator[i] = total;
    value[i] -= kLearningRate * g / std::sqrt(total);
  }
}

// A fully connected layer, with ReLU or without.
class Layer {
 public:
  Layer(int inputs, int outputs, bool relu)
      : kernel_(Matrix::Random(inputs, outputs) * std::sqrt(6.f / (inputs + outputs))),
        kernel_accumulator_(Matrix::Constant(inputs, outputs, kInitialAccumulator)),
        bias_(Vector::Zero(outputs)),
        bias_accumulator_(Vector::Constant(outputs, kInitialAccumulator)),
        relu_(relu) {}

  const Matrix& Forward(const Matrix& x) {
    input_ = &x;
    output_.noalias() = x * kernel_;
    output_.rowwise() += bias_;
    if (relu_) output_ = output_.cwiseMax(0.f);
    return output_;
  }

  // Takes the gradient of the output, returns the gradient of the input, and trains one step. Overwrites `gradient`.
  const Matrix& Backward(Matrix* gradient) {
    if (relu_) *gradient = (output_.array() > 0).select(*gradient, 0.f);
    input_gradient_.noalias() = *gradient * kernel_.transpose();
    kernel_gradient_.noalias() = input_->transpose() * *gradient;
    bias_gradient_.noalias() = gradient->colwise().sum();
    AdagradStep(kernel_gradient_.data(), kernel_.size(), kernel_accumulator_.data(), kernel_.data());
    AdagradStep(bias_gradient_.data(), bias_.size(), bias_accumulator_.data(), bias_.data());
    return input_gradient_;
  }

  Matrix* kernel() { return &kernel_; }
  Vector* bias() { return &bias_; }
  Matrix* input_gradient() { return &input_gradient_; }

 private:
  Matrix kernel_, kernel_accumulator_;
  Vector bias_, bias_accumulator_;
  bool relu_;
  const Matrix* input_ = nullptr;
  Matrix output_, input_gradient_, kernel_gradient_;
  Vector bias_gradient_;
};

// The layers of a tower, whose outputs are scaled to length 1.
class Tower {
 public:
  Tower() {
    for (int i = 0; i < kLayers; ++i) layers_.emplace_back(i == 0 ? kDim : kWidths[i - 1], kWidths[i], i < kLayers - 1);
  }

  const Matrix& Forward(const Matrix& x) {
    const Matrix* y = &x;
    for (Layer& layer : layers_) y = &layer.Forward(*y);
    scale_ = y->rowwise().squaredNorm().cwiseMax(1e-12f).cwiseSqrt().cwiseInverse();
    unit_.noalias() = scale_.asDiagonal() * *y;
    return unit_;
  }

  // Takes the gradient of the unit vectors, returns the gradient of the input, and trains one step.
  const Matrix& Backward(Matrix* gradient) {
    for (int64_t i = 0; i < gradient->rows(); ++i) {
      gradient->row(i) = scale_[i] * (gradient->row(i) - gradient->row(i).dot(unit_.row(i)) * unit_.row(i));
    }
    for (int i = kLayers - 1; i >= 0; --i) {
      layers_[i].Backward(gradient);
      gradient = layers_[i].input_gradient();
    }
    return *gradient;
  }

  std::vector<Layer>& layers() { return layers_; }

 private:
  std::vector<Layer> layers_;
  Eigen::VectorXf scale_;
  Matrix unit_;
};

void Prefetch(const float* row) {
  for (int k = 0; k < kDim; k += 16) __builtin_prefetch(row + k, 1);
}

// Huge pages, which ours uses too: they save page table lookups when rows are read at random.
void UseHugePages(const std::vector<float>& values) {
  constexpr uintptr_t kPage = 4096;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  const uintptr_t data = reinterpret_cast<uintptr_t>(values.data()), begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + values.size() * sizeof(float)) / kPage * kPage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
}

class Table {
 public:
  explicit Table(int64_t rows) : rows_(rows), table_(rows * kDim), accumulator_(rows * kDim, kInitialAccumulator) {
    UseHugePages(table_);
    UseHugePages(accumulator_);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-0.125f, 0.125f);
    for (float& x : table_) x = uniform(random);
  }

  void Sum(const std::vector<int32_t>& ids, int tokens, Matrix* out) const {
    const int64_t texts = ids.size() / tokens, n = ids.size();
    out->resize(texts, kDim);
    for (int64_t text = 0; text < texts; ++text) {
      float sum[kDim] = {};
      for (int64_t i = text * tokens; i < (text + 1) * tokens; ++i) {
        if (i + 8 < n) Prefetch(&table_[ids[i + 8] * int64_t{kDim}]);
        const float* row = &table_[ids[i] * int64_t{kDim}];
        for (int k = 0; k < kDim; ++k) sum[k] += row[k];
      }
      std::memcpy(out->data() + text * kDim, sum, sizeof(sum));
    }
  }

  // The gradients of all occurrences of a row are summed before its step.
  void Step(const std::vector<int32_t>& queries, const Matrix& of_queries, const std::vector<int32_t>& titles,
            const Matrix& of_titles) {
    occurrences_.clear();
    Add(queries, kQueryTokens, of_queries);
    Add(titles, kTitleTokens, of_titles);
    Sort();
    const int64_t n = occurrences_.size();
    for (int64_t i = 0; i < n;) {
      const int64_t row = occurrences_[i].row;
      if (i + 8 < n) {
        Prefetch(&table_[occurrences_[i + 8].row * int64_t{kDim}]);
        Prefetch(&accumulator_[occurrences_[i + 8].row * int64_t{kDim}]);
      }
      float sum[kDim] = {};
      for (; i < n && occurrences_[i].row == row; ++i) {
        for (int k = 0; k < kDim; ++k) sum[k] += occurrences_[i].gradient[k];
      }
      AdagradStep(sum, kDim, &accumulator_[row * kDim], &table_[row * kDim]);
    }
  }

  std::vector<float>& values() { return table_; }

 private:
  struct Occurrence {
    int32_t row;
    const float* gradient;
  };

  void Add(const std::vector<int32_t>& ids, int tokens, const Matrix& gradient) {
    for (size_t i = 0; i < ids.size(); ++i) occurrences_.push_back({ids[i], gradient.data() + i / tokens * kDim});
  }

  void Sort() {
    constexpr int kBits = 11;
    sorted_.resize(occurrences_.size());
    for (int shift = 0; (rows_ - 1) >> shift != 0; shift += kBits) {
      uint32_t begin[(1 << kBits) + 1] = {};
      for (const Occurrence& o : occurrences_) ++begin[((o.row >> shift) & ((1 << kBits) - 1)) + 1];
      for (int i = 0; i < 1 << kBits; ++i) begin[i + 1] += begin[i];
      for (const Occurrence& o : occurrences_) sorted_[begin[(o.row >> shift) & ((1 << kBits) - 1)]++] = o;
      occurrences_.swap(sorted_);
    }
  }

  int64_t rows_;
  std::vector<float> table_, accumulator_;
  std::vector<Occurrence> occurrences_, sorted_;
};

class Model {
 public:
  Model(int batch_size, int64_t rows) : batch_size_(batch_size), table_(rows) {
    const float count = batch_size - 1 + kRandom;
    of_batch_ = count * (1 - kAlpha) / (batch_size - 1);
    of_random_ = count * kAlpha / kRandom;
  }

  // Trains one step on [batch_size] queries and [batch_size + kRandom] titles, and returns its loss.
  float Step(const std::vector<int32_t>& queries, const std::vector<int32_t>& titles) {
    table_.Sum(queries, kQueryTokens, &query_input_);
    table_.Sum(titles, kTitleTokens, &title_input_);
    const Matrix& query = query_tower_.Forward(query_input_);
    const Matrix& title = title_tower_.Forward(title_input_);
    scores_.noalias() = query * title.transpose();
    const float loss = Hinge();
    query_gradient_.noalias() = scores_ * title;
    title_gradient_.noalias() = scores_.transpose() * query;
    const Matrix& of_queries = query_tower_.Backward(&query_gradient_);
    const Matrix& of_titles = title_tower_.Backward(&title_gradient_);
    table_.Step(queries, of_queries, titles, of_titles);
    return loss;
  }

  void Load(std::istream& start) {
    auto read = [&](float* to, int64_t n) { start.read(reinterpret_cast<char*>(to), n * sizeof(float)); };
    read(table_.values().data(), table_.values().size());
    for (Tower* tower : {&query_tower_, &title_tower_}) {
      for (Layer& layer : tower->layers()) {
        read(layer.kernel()->data(), layer.kernel()->size());
        read(layer.bias()->data(), layer.bias()->size());
      }
    }
  }

 private:
  // Returns the loss of `scores_`, and overwrites them with its gradient.
  float Hinge() {
    float loss = 0;
    const int n = batch_size_ + kRandom;
    for (int i = 0; i < batch_size_; ++i) {
      float* row = &scores_(i, 0);
      const float bound = kMargin - row[i];
      auto group = [&](int begin, int end, float weight) {
        const float slope = weight / batch_size_;
        float total = 0, count = 0;
        for (int j = begin; j < end; ++j) {
          const float term = bound + row[j];
          total += std::max(term, 0.f);
          row[j] = term > 0 ? slope : 0.f;
          count += row[j];
        }
        loss += slope * total;
        return count;
      };
      // The pair's own title is not a negative.
      const float slopes = group(0, i, of_batch_) + group(i + 1, batch_size_, of_batch_) + group(batch_size_, n, of_random_);
      row[i] = -slopes;
    }
    return loss;
  }

  int batch_size_;
  float of_batch_, of_random_;
  Table table_;
  Tower query_tower_, title_tower_;
  Matrix query_input_, title_input_, scores_, query_gradient_, title_gradient_;
};

std::vector<int32_t> ReadTokens(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<int32_t> tokens(bytes.size() / sizeof(int32_t));
  std::memcpy(tokens.data(), bytes.data(), tokens.size() * sizeof(int32_t));
  return tokens;
}

void Check(const char* path) {
  std::ifstream start(path, std::ios::binary);
  Model model(kCheckBatch, kCheckRows);
  model.Load(start);
  const int64_t per_step[] = {int64_t{kCheckBatch} * kQueryTokens, int64_t{kCheckBatch + kRandom} * kTitleTokens};
  std::vector<std::vector<int32_t>> steps[2];
  for (int kind = 0; kind < 2; ++kind) {
    for (int step = 0; step < kCheckSteps; ++step) {
      steps[kind].emplace_back(per_step[kind]);
      start.read(reinterpret_cast<char*>(steps[kind].back().data()), per_step[kind] * sizeof(int32_t));
    }
  }
  if (!start) {
    std::cerr << "training_limit: " << path << ": too short\n";
    std::exit(1);
  }
  std::cout.precision(9);
  for (int step = 0; step < kCheckSteps; ++step) {
    std::cout << (step == 0 ? "[" : ", ") << model.Step(steps[0][step], steps[1][step]);
  }
  std::cout << "]" << std::endl;
}

double CpuSeconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

void Train(const std::string& folder, int batch_size, int64_t num_ids) {
  const std::vector<int32_t> queries = ReadTokens(folder + "/queries.bin"), titles = ReadTokens(folder + "/titles.bin");
  const int64_t pairs = queries.size() / kQueryTokens;
  if (pairs == 0) {
    std::cerr << "training_limit: " << folder << "/queries.bin: holds no queries\n";
    std::exit(1);
  }
  Model model(batch_size, num_ids);
  std::vector<int32_t> batch_queries, batch_titles;
  std::mt19937_64 random(1);
  auto append = [](const std::vector<int32_t>& from, int64_t row, int tokens, std::vector<int32_t>* to) {
    to->insert(to->end(), from.begin() + row * tokens, from.begin() + (row + 1) * tokens);
  };
  std::cout << "{\"ready\": true}" << std::endl;
  double seconds;
  while (std::cin >> seconds) {
    const auto wall = std::chrono::steady_clock::now();
    const double begin = CpuSeconds();
    int64_t steps = 0;
    while (steps % 4 != 0 || steps == 0 || CpuSeconds() - begin < seconds) {
      batch_queries.clear();
      batch_titles.clear();
      for (int i = 0; i < batch_size + kRandom; ++i) {
        const int64_t row = random() % pairs;
        if (i < batch_size) append(queries, row, kQueryTokens, &batch_queries);
        append(titles, row, kTitleTokens, &batch_titles);
      }
      model.Step(batch_queries, batch_titles);
      ++steps;
    }
    const double cpu = CpuSeconds() - begin;
    const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - wall).count();
    std::cout << "{\"steps\": " << steps << ", \"cpu\": " << cpu << ", \"wall\": " << passed << "}" << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "check") {
    Check(argv[2]);
  } else if (argc == 4) {
    Train(argv[1], std::stoi(argv[2]), std::stoll(argv[3]));
  } else {
    std::cerr << "usage: training_limit FOLDER BATCH_SIZE NUM_IDS | check START\n";
    return 2;
  }
}
