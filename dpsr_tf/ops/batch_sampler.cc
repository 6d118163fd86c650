#include "dpsr_tf/ops/batch_sampler.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace dpsr {
namespace {

// Keep the random numbers of one purpose apart from another's.
constexpr uint64_t kNegativeStream = 0x6e65676174697665ULL;
constexpr uint64_t kTitleStream = 0x7469746c65717279ULL;
// A title query has this many tokens of the title, and lacks every so manieth of them.
constexpr uint64_t kShortestTitleQuery = 4;
constexpr uint64_t kLongestTitleQuery = 24;
constexpr uint64_t kDropOneIn = 8;
// A binary search costs about as much as this many hash lookups.
constexpr size_t kLongList = 4;

Status AtLeast(const char* name, int64_t value, int64_t minimum) {
  if (value >= minimum) return Status();
  return MakeStatus(StatusCode::kInvalidArgument, name, " is ", value, ", expected ", minimum, " or more");
}

}  // namespace

Status BatchSampler::Validate(const BatchOptions& o) {
  DPSR_RETURN_IF_ERROR(AtLeast("batch_size", o.batch_size, 1));
  DPSR_RETURN_IF_ERROR(AtLeast("num_shared_negatives", o.num_shared_negatives, 0));
  DPSR_RETURN_IF_ERROR(AtLeast("num_supervised_negatives", o.num_supervised_negatives, 0));
  DPSR_RETURN_IF_ERROR(AtLeast("num_epochs", o.num_epochs, 0));
  DPSR_RETURN_IF_ERROR(AtLeast("num_shards", o.num_shards, 1));
  // A mask larger than this is a mistake, and keeps the products below within 64 bits.
  constexpr int64_t kMaxItems = 1 << 20, kMaxEpochs = 1 << 24;
  if (o.batch_size > kMaxItems || o.num_shared_negatives > kMaxItems) {
    return MakeStatus(StatusCode::kInvalidArgument, "batch_size ", o.batch_size, " and num_shared_negatives ",
                      o.num_shared_negatives, ", expected at most ", kMaxItems, " each");
  }
  // Neither is a real training's; they keep steps times batch sizes within 64 bits.
  for (auto [name, value] : {std::pair{"num_epochs", o.num_epochs}, {"num_shards", o.num_shards}}) {
    if (value > kMaxEpochs) {
      return MakeStatus(StatusCode::kInvalidArgument, name, " is ", value, ", expected at most ", kMaxEpochs);
    }
  }
  if (o.num_title_queries < 0 || o.num_title_queries >= o.batch_size) {
    return MakeStatus(StatusCode::kInvalidArgument, "num_title_queries is ", o.num_title_queries,
                      ", expected 0 to batch_size - 1, ", o.batch_size - 1, ": the others come from the log");
  }
  if (o.num_supervised_negatives > o.num_shared_negatives) {
    return MakeStatus(StatusCode::kInvalidArgument, "num_supervised_negatives is ", o.num_supervised_negatives,
                      ", expected at most num_shared_negatives, ", o.num_shared_negatives,
                      ": they take places of the shared set");
  }
  if (o.shard_index < 0 || o.shard_index >= o.num_shards) {
    return MakeStatus(StatusCode::kInvalidArgument, "shard_index is ", o.shard_index, ", expected 0 to num_shards - 1, ",
                      o.num_shards - 1);
  }
  return Status();
}

BatchSampler::BatchSampler(const TrainingStore& store, const BatchOptions& options)
    : store_(store),
      options_(options),
      log_batch_(options.batch_size - options.num_title_queries),
      // A shard beyond the last interaction has nothing to give.
      shard_size_(std::max<int64_t>(
          0, (store.num_positives() - options.shard_index + options.num_shards - 1) / options.num_shards)),
      num_batches_(shard_size_ == 0          ? 0
                   : options.num_epochs == 0 ? -1
                                             : shard_size_ * options.num_epochs / log_batch_) {}

void BatchSampler::Sample(int64_t step, Batch* batch) const {
  batch->query.clear();
  batch->query_tokens.clear();
  batch->query_splits.assign(1, 0);
  batch->user.clear();
  batch->weight.clear();
  batch->item.clear();
  SampleLog(step, batch);
  SampleTitles(step, batch);
  SampleNegatives(step, batch);
}

void BatchSampler::SampleLog(int64_t step, Batch* batch) const {
  const uint64_t n = store_.num_positives();
  int64_t epoch = -1;
  Permutation shuffle(n, 0);
  for (int64_t i = 0; i < log_batch_; ++i) {
    const int64_t position = step * log_batch_ + i;
    if (position / shard_size_ != epoch) {
      epoch = position / shard_size_;
      shuffle = Permutation(n, Mix64(options_.seed) ^ epoch);
    }
    // Workers read disjoint parts of one shuffle: shard s takes positions s, s + num_shards, ... of the epoch's order.
    const uint64_t row = shuffle(position % shard_size_ * options_.num_shards + options_.shard_index);
    const int32_t query = store_.positive_query()[row];
    const Span<const int32_t> tokens = store_.query_tokens()[query];
    batch->query.push_back(query);
    batch->query_tokens.insert(batch->query_tokens.end(), tokens.begin(), tokens.end());
    batch->query_splits.push_back(batch->query_tokens.size());
    batch->user.push_back(store_.positive_user()[row]);
    batch->weight.push_back(store_.positive_weight()[row]);
    batch->item.push_back(store_.positive_item()[row]);
  }
}

void BatchSampler::SampleTitles(int64_t step, Batch* batch) const {
  RandomStream random = Random(step, kTitleStream);
  for (int64_t i = 0; i < options_.num_title_queries; ++i) {
    const int32_t item = static_cast<int32_t>(random.Uniform(store_.num_items()));
    const Span<const int32_t> text = store_.item_tokens()[item];
    // Tokens stand in the order of the text, a word's n-grams beside it: a run of them is a piece of the title, and
    // the tokens dropped from it are missing words and typing errors.
    const uint64_t longest = std::min<uint64_t>(text.size(), kLongestTitleQuery);
    const uint64_t length = std::min<uint64_t>(longest, kShortestTitleQuery + random.Uniform(longest + 1));
    const uint64_t begin = random.Uniform(text.size() - length + 1);
    for (uint64_t t = begin; t < begin + length; ++t) {
      if (random.Uniform(kDropOneIn) != 0) batch->query_tokens.push_back(text[t]);
    }
    batch->query.push_back(Batch::kTitleQuery);
    batch->query_splits.push_back(batch->query_tokens.size());
    batch->user.push_back(0);
    batch->weight.push_back(1);
    batch->item.push_back(item);
  }
}

void BatchSampler::SampleNegatives(int64_t step, Batch* batch) const {
  RandomStream random = Random(step, kNegativeStream);
  for (int64_t i = 0; i < options_.num_shared_negatives; ++i) {
    if (i < options_.num_supervised_negatives) {
      const Span<const int32_t> labelled = store_.negative_items()[batch->query[random.Uniform(log_batch_)]];
      if (!labelled.empty()) {
        batch->item.push_back(labelled[random.Uniform(labelled.size())]);
        continue;
      }
    }
    batch->item.push_back(static_cast<int32_t>(random.Uniform(store_.num_items())));
  }
}

RandomStream BatchSampler::Random(int64_t step, uint64_t purpose) const {
  return RandomStream(Mix64(Mix64(options_.seed) ^ purpose) ^ (step * options_.num_shards + options_.shard_index));
}

void BatchSampler::NegativeMask(const Batch& batch, bool* mask) const {
  const size_t items = batch.item.size();
  std::fill(mask, mask + batch.query.size() * items, true);
  // Positions of each item in the batch, as chains: `first` by item, `next` by position.
  std::unordered_map<int32_t, int32_t> first;
  first.reserve(items);
  std::vector<int32_t> next(items, -1);
  for (size_t j = 0; j < items; ++j) {
    auto [it, inserted] = first.emplace(batch.item[j], static_cast<int32_t>(j));
    if (!inserted) {
      next[j] = it->second;
      it->second = static_cast<int32_t>(j);
    }
  }
  for (size_t i = 0; i < batch.query.size(); ++i) {
    if (batch.query[i] == Batch::kTitleQuery) {
      for (int32_t j = first.at(batch.item[i]); j >= 0; j = next[j]) mask[i * items + j] = false;
      continue;
    }
    const Span<const int32_t> clicked = store_.clicked_items()[batch.query[i]];
    if (clicked.size() > kLongList * items) {  // a head query: look the batch up in its clicks, not the other way round
      for (size_t j = 0; j < items; ++j) {
        if (std::binary_search(clicked.begin(), clicked.end(), batch.item[j])) mask[i * items + j] = false;
      }
      continue;
    }
    for (int32_t item : clicked) {
      const auto it = first.find(item);
      if (it == first.end()) continue;
      for (int32_t j = it->second; j >= 0; j = next[j]) mask[i * items + j] = false;
    }
  }
}

}  // namespace dpsr
