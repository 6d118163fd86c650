#include "dpsr_tf/ops/training_store.h"

#include <limits>
#include <tuple>
#include <utility>

namespace dpsr {
namespace {

// With fewer positives than this, a scan is faster than a lookup.
constexpr int64_t kHeadPositives = 128;
constexpr size_t kItemsPerFilterWord = 4;
// Rows of queries are int32.
constexpr int64_t kMaxQueries = std::numeric_limits<int32_t>::max();

// Checks the order of positives: the mask of clicked items searches the positives of a query.
Status CheckPositives(const SectionReader& reader, const InteractionsShard& shard) {
  const RaggedColumn& items = shard.positives;
  for (int64_t q = 0; q < items.rows(); ++q) {
    for (int64_t row = items.splits[q] + 1; row < items.splits[q + 1]; ++row) {
      if (items.values[row] < items.values[row - 1]) {
        return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section positive.item row ", row, " is ",
                          items.values[row], " after ", items.values[row - 1],
                          ", expected the items of a query in ascending order; ingest the log again");
      }
    }
  }
  return Status();
}

}  // namespace

std::vector<uint64_t> ItemFilter::Of(Span<const int32_t> items) {
  std::vector<uint64_t> words(items.size() / kItemsPerFilterWord + 1);
  for (int32_t item : items) {
    const Key key = KeyOf(item);
    words[uint64_t{key.word} * words.size() >> 32] |= key.bits;
  }
  return words;
}

void InteractionsShard::FindQueries() {
  for (int64_t q = 0, row = 0; q < positives.rows(); ++q) {
    for (; row < positives.splits[q + 1]; row += kQueryStride) {
      query_of.push_back(static_cast<int32_t>(q));
    }
  }
  // Add the query of the last positive, which queries without positives may follow.
  int64_t last = positives.rows();
  while (last > 0 && positives.length(last - 1) == 0) --last;
  if (last > 0) query_of.push_back(static_cast<int32_t>(last - 1));
}

void InteractionsShard::FindHeads() {
  for (int64_t q = 0; q < positives.rows(); ++q) {
    const Span<const int32_t> all = positives[q];
    if (static_cast<int64_t>(all.size()) < kHeadPositives) continue;
    HeadClicks head;
    std::unique_copy(all.begin(), all.end(), std::back_inserter(head.items));
    head.filter = ItemFilter::Of({head.items.data(), head.items.size()});
    if (2 * head.items.size() > all.size()) head.items.clear();
    head.items.shrink_to_fit();
    heads.push_back(static_cast<int32_t>(q));
    head_clicks.push_back(std::move(head));
  }
}

Clicks InteractionsShard::ClicksOf(int64_t local_query) const {
  Clicks clicks{positives[local_query], {}};
  if (static_cast<int64_t>(clicks.items.size()) < kHeadPositives) return clicks;
  const auto place = std::lower_bound(heads.begin(), heads.end(), local_query) - heads.begin();
  const HeadClicks& head = head_clicks[static_cast<size_t>(place)];
  if (!head.items.empty()) clicks.items = {head.items.data(), head.items.size()};
  clicks.filter.words = {head.filter.data(), head.filter.size()};
  return clicks;
}

Status TextColumn::Read(const SectionReader& reader, const std::string& name, int64_t rows) {
  DPSR_RETURN_IF_ERROR(reader.Array(name + ".bytes", SectionReader::kAnyLength, &bytes));
  return reader.Splits(name + ".splits", rows, static_cast<int64_t>(bytes.size()), &splits);
}

Status TrainingStore::Open(const Options& options, const FileOpener& open, std::unique_ptr<TrainingStore>* store) {
  std::unique_ptr<TrainingStore> s(new TrainingStore);
  const size_t files = options.interactions.size();
  if (files == 0) return MakeStatus(StatusCode::kInvalidArgument, "no interactions file is given, expected one or more");
  const bool knows_queries = !options.queries.empty();
  if (knows_queries && options.queries.size() != files) {
    return MakeStatus(StatusCode::kInvalidArgument, "queries has ", options.queries.size(),
                      " numbers, expected one for each of the ", files, " interactions files");
  }
  DPSR_RETURN_IF_ERROR(open(options.users, "users", &s->users_));
  std::unique_ptr<PackedFile> items;
  DPSR_RETURN_IF_ERROR(open(options.items, "items", &items));
  DPSR_RETURN_IF_ERROR(ItemTable::Open(std::move(items), options.item_features, /*with_ids=*/false, &s->items_));
  DPSR_RETURN_IF_ERROR(SectionReader(s->items_->file())
                           .Features(options.history_features, s->num_items(), "item", &s->history_features_));
  const PackedFile::Section* users = s->users_->Find("id");
  s->num_users_ = users == nullptr ? 0 : static_cast<int64_t>(users->count);

  s->sharded_by_file_ = static_cast<int64_t>(files) >= options.num_shards;
  s->shards_.resize(files);
  s->own_rows_.push_back(0);
  int64_t positives = 0;
  bool reads_all = true;
  for (size_t f = 0; f < files; ++f) {
    InteractionsShard& shard = s->shards_[f];
    shard.own = !s->sharded_by_file_ || static_cast<int64_t>(f) % options.num_shards == options.shard_index;
    shard.first_query = s->num_queries_;
    s->first_queries_.push_back(shard.first_query);
    int64_t queries = knows_queries ? options.queries[f] : 0;
    if (queries < 0 || queries > kMaxQueries) {
      return MakeStatus(StatusCode::kInvalidArgument, "queries has the number ", queries, ", expected 0 to ",
                        kMaxQueries);
    }
    if (shard.own || options.all_queries || !knows_queries) {
      DPSR_RETURN_IF_ERROR(open(options.interactions[f], "interactions", &shard.file));
      DPSR_RETURN_IF_ERROR(s->OpenShard(options, &shard));
      if (knows_queries && shard.query_tokens.rows() != queries) {
        return MakeStatus(StatusCode::kDataLoss, shard.file->path(), ": has ", shard.query_tokens.rows(),
                          " queries, the manifest says ", queries, "; ingest the log again");
      }
      queries = shard.query_tokens.rows();
      if (const PackedFile::Section* rows = shard.file->Find("positive.item")) positives += rows->count;
    } else {
      reads_all = false;
    }
    s->num_queries_ += queries;
    if (s->num_queries_ > kMaxQueries) {
      return MakeStatus(StatusCode::kFailedPrecondition, options.interactions[f], ": ", s->num_queries_,
                        " queries up to here, at most ", kMaxQueries, " fit one store; split the log");
    }
    if (!shard.own) continue;
    s->own_shards_.push_back(&shard);
    s->own_rows_.push_back(s->own_rows_.back() + static_cast<int64_t>(shard.user.size()));
  }
  if (s->num_items() == 0) {
    return MakeStatus(StatusCode::kFailedPrecondition, s->items_->file().path(), ": has no items to train with");
  }
  if (positives == 0 && reads_all && options.reads_log) {
    return MakeStatus(StatusCode::kFailedPrecondition, options.interactions[0],
                      ": has no positive interactions; ingest a log, or train on titles alone, with num_title_queries "
                      "as large as batch_size");
  }
  DPSR_RETURN_IF_ERROR(s->OpenUsers(options));
  if (options.has_titles) DPSR_RETURN_IF_ERROR(s->OpenTitles(options.titles, open));
  if (options.has_titles || options.has_query_texts) {
    DPSR_RETURN_IF_ERROR(s->OpenVocabulary(options.vocabulary, open));
  }
  if (options.has_graph) DPSR_RETURN_IF_ERROR(s->OpenGraph(options, open));
  *store = std::move(s);
  return Status();
}

Status TrainingStore::OpenShard(const Options& options, InteractionsShard* shard) const {
  const SectionReader reader(*shard->file);
  DPSR_RETURN_IF_ERROR(
      reader.Ragged("query.splits", "query.tokens", SectionReader::kAnyLength, &shard->query_tokens));
  DPSR_RETURN_IF_ERROR(
      reader.CheckRows("query.tokens", shard->query_tokens.values, int64_t{1} << 31, "tokens"));
  if (!shard->own) return Status();

  const int64_t queries = shard->query_tokens.rows();
  if (options.has_query_texts) DPSR_RETURN_IF_ERROR(shard->query_text.Read(reader, "query_text", queries));
  DPSR_RETURN_IF_ERROR(reader.Ragged("positive.splits", "positive.item", queries, &shard->positives));
  const int64_t positives = static_cast<int64_t>(shard->positives.values.size());
  DPSR_RETURN_IF_ERROR(reader.Array("positive.user", positives, &shard->user));
  DPSR_RETURN_IF_ERROR(reader.Array("positive.time", positives, &shard->time));
  DPSR_RETURN_IF_ERROR(reader.Array("positive.type", positives, &shard->type));
  for (auto [name, column] : {std::pair{"positive.weight", &shard->weight}, {"positive.label", &shard->label}}) {
    if (reader.Has(name)) DPSR_RETURN_IF_ERROR(reader.Numbers(name, positives, column));
  }
  DPSR_RETURN_IF_ERROR(reader.Ragged("negative.splits", "negative.item", queries, &shard->negatives));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("positive.user", shard->user, num_users_, "users"));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("positive.item", shard->positives.values, num_items(), "items"));
  DPSR_RETURN_IF_ERROR(CheckPositives(reader, *shard));
  DPSR_RETURN_IF_ERROR(reader.CheckTypes("positive.type", shard->type));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("negative.item", shard->negatives.values, num_items(), "items"));
  DPSR_RETURN_IF_ERROR(reader.CheckAscending("negative.item", shard->negatives));
  shard->FindQueries();
  shard->FindHeads();

  const bool has_impressions = reader.Has("positive.request");
  if (options.impressions && !has_impressions) {
    return MakeStatus(StatusCode::kFailedPrecondition, shard->file->path(),
                      ": has no impressions to take negatives from; name the schema's type column with impression or "
                      "skip among its types and ingest again, or take labelled negatives");
  }
  if (has_impressions && (options.impressions || options.impressions_if_any)) {
    DPSR_RETURN_IF_ERROR(
        reader.Ragged("impression.splits", "impression.item", SectionReader::kAnyLength, &shard->impressions));
    DPSR_RETURN_IF_ERROR(reader.Array("positive.request", positives, &shard->request));
    DPSR_RETURN_IF_ERROR(
        reader.CheckRows("positive.request", shard->request, shard->impressions.rows(), "requests", -1));
    DPSR_RETURN_IF_ERROR(reader.CheckRows("impression.item", shard->impressions.values, num_items(), "items"));
    DPSR_RETURN_IF_ERROR(reader.CheckAscending("impression.item", shard->impressions));
  }
  return Status();
}

Status TrainingStore::OpenUsers(const Options& options) {
  const SectionReader reader(*users_);
  DPSR_RETURN_IF_ERROR(reader.Features(options.user_features, num_users_, "user", &user_features_));
  if (!options.events) return Status();
  DPSR_RETURN_IF_ERROR(reader.Array("event.time", SectionReader::kAnyLength, &event_time_));
  const int64_t events = static_cast<int64_t>(event_time_.size());
  DPSR_RETURN_IF_ERROR(reader.Splits("event.splits", num_users_, events, &event_splits_));
  DPSR_RETURN_IF_ERROR(reader.Array("event.item", events, &event_item_));
  if (options.event_queries) DPSR_RETURN_IF_ERROR(reader.Array("event.query", events, &event_query_));
  DPSR_RETURN_IF_ERROR(reader.Array("event.type", events, &event_type_));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("event.item", event_item_, num_items(), "items"));
  DPSR_RETURN_IF_ERROR(reader.CheckRows("event.query", event_query_, num_queries_, "queries"));
  DPSR_RETURN_IF_ERROR(reader.CheckTypes("event.type", event_type_));
  return CheckEvents(reader);
}

Status TrainingStore::OpenTitles(const std::string& path, const FileOpener& open) {
  DPSR_RETURN_IF_ERROR(open(path, "titles", &titles_));
  return title_.Read(SectionReader(*titles_), "title", num_items());
}

Status TrainingStore::OpenVocabulary(const std::string& path, const FileOpener& open) {
  std::unique_ptr<PackedFile> file;
  DPSR_RETURN_IF_ERROR(open(path, Vocabulary::kKind, &file));
  for (const PackedFile::Section& section : file->sections()) DPSR_RETURN_IF_ERROR(file->Verify(section));
  return Vocabulary::Open(std::move(file), &vocabulary_);
}

Status TrainingStore::OpenGraph(const Options& options, const FileOpener& open) {
  const SectionReader items(items_->file());
  DPSR_RETURN_IF_ERROR(items.Features(options.graph_attributes, num_items(), "item", &graph_attributes_));
  const std::vector<std::string>& names = options.graph_attributes.fixed;
  DPSR_RETURN_IF_ERROR(ClickGraph::Open(options.graph, names, num_queries_, num_items(), open, &graph_));
  for (size_t a = 0; a < names.size(); ++a) {
    const CodeColumn& codes = graph_attributes_.fixed[a];
    for (int64_t item = 0; item < num_items(); ++item) {
      const int32_t code = codes.bytes.empty() ? codes.words[item] : codes.bytes[item];
      if (code < graph_->num_codes(a)) continue;
      return MakeStatus(StatusCode::kDataLoss, items.file().path(), ": section feature.", names[a], " row ", item,
                        " is ", code, ", expected at most ", graph_->num_codes(a) - 1,
                        ", the last value in the graph; ingest the log again");
    }
  }
  return Status();
}

// Checks that times ascend, because a binary search in them cuts histories, and that the anonymous user has no events.
// The order of events at the same time is checked only if their queries are read, by which they are sorted.
Status TrainingStore::CheckEvents(const SectionReader& reader) const {
  if (num_users_ > 0 && event_splits_[1] != 0) {
    return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section event.splits row 1 is ",
                      event_splits_[1], ", expected 0: the anonymous user, row 0, has no events; ingest the log again");
  }
  const auto rest = [this](int64_t e) { return std::make_tuple(event_query_[e], event_item_[e], event_type_[e]); };
  const auto is_before = [&](int64_t a, int64_t b) {
    if (event_time_[a] != event_time_[b]) return event_time_[a] < event_time_[b];
    return !event_query_.empty() && rest(a) < rest(b);
  };
  for (int64_t user = 0; user < num_users_; ++user) {
    for (int64_t e = event_splits_[user] + 1; e < event_splits_[user + 1]; ++e) {
      if (is_before(e, e - 1)) {
        return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section event.time row ", e,
                          " is before row ", e - 1, " of the same user (", event_time_[e], " after ", event_time_[e - 1],
                          "), expected events in ascending order of time, query, item and type; ingest the log again");
      }
    }
  }
  return Status();
}

}  // namespace dpsr
