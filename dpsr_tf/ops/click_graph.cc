#include "dpsr_tf/ops/click_graph.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace dpsr {

void PickNeighbours(const Edges& edges, const NeighbourLimits& limits, RandomStream* random,
                    std::vector<float>* weights, std::vector<int32_t>* found) {
  const auto counts = [&](size_t e) {
    return edges.nodes[e] != limits.excluded && (edges.times.empty() || edges.times[e] < limits.before);
  };
  const size_t begin = found->size(), most = static_cast<size_t>(limits.most);
  if (most == 0) return;
  if (limits.strongest) {
    for (size_t e = 0; e < edges.nodes.size() && found->size() - begin < most; ++e) {
      if (counts(e)) found->push_back(edges.nodes[e]);
    }
    return;
  }
  weights->clear();
  double total = 0;
  for (size_t e = 0; e < edges.nodes.size() && weights->size() < kDrawnFrom; ++e) {
    if (!counts(e)) continue;
    found->push_back(edges.nodes[e]);
    weights->push_back(edges.weights[e]);
    total += edges.weights[e];
  }
  const size_t candidates = weights->size();
  if (candidates <= most) return;
  // Draws move to the front; the others stay candidates.
  int32_t* nodes = found->data() + begin;
  float* left = weights->data();
  for (size_t drawn = 0; drawn < most; ++drawn) {
    double remaining = random->Fraction() * total;
    size_t e = drawn;
    while (e + 1 < candidates && (remaining -= left[e]) >= 0) ++e;
    total -= left[e];
    std::swap(nodes[drawn], nodes[e]);
    std::swap(left[drawn], left[e]);
  }
  found->resize(begin + most);
}

Status ClickGraph::Open(const std::vector<std::string>& paths, const std::vector<std::string>& attributes,
                        int64_t num_queries, int64_t num_items, const FileOpener& open,
                        std::unique_ptr<ClickGraph>* graph) {
  std::unique_ptr<ClickGraph> g(new ClickGraph);
  if (paths.empty()) {
    return MakeStatus(StatusCode::kFailedPrecondition,
                      "the store has no click graph, expected the section graph in its schema; add it and ingest again");
  }
  int64_t query = 0, item = 0;
  for (const std::string& path : paths) {
    g->files_.emplace_back();
    DPSR_RETURN_IF_ERROR(open(path, "graph", &g->files_.back()));
    const SectionReader reader(*g->files_.back());
    Part of_queries, of_items;
    of_queries.first = query;
    DPSR_RETURN_IF_ERROR(Read(reader, "query", "item", SectionReader::kAnyLength, num_items, &of_queries));
    DPSR_RETURN_IF_ERROR(Read(reader, "item", "query", SectionReader::kAnyLength, num_queries, &of_items));
    Span<const int64_t> first;
    DPSR_RETURN_IF_ERROR(reader.Array("item.first", 1, &first));
    if (first[0] != item) {
      return MakeStatus(StatusCode::kDataLoss, path, ": section item.first is ", first[0], ", expected ", item,
                        ", the end of the file before it; ingest the log again");
    }
    of_items.first = item;
    query += of_queries.edges.rows();
    item += of_items.edges.rows();
    g->queries_.push_back(of_queries);
    g->items_.push_back(of_items);
  }
  for (const auto& [name, got, expected] :
       {std::tuple{"queries", query, num_queries}, std::tuple{"items", item, num_items}}) {
    if (got != expected) {
      return MakeStatus(StatusCode::kDataLoss, paths.back(), ": the graph has ", got, " ", name, ", expected ", expected,
                        ", as many as the store; ingest the log again");
    }
  }
  const SectionReader reader(*g->files_[0]);
  for (const std::string& name : attributes) {
    const std::string prefix = "value." + name;
    if (!reader.Has(prefix + ".splits")) {
      return MakeStatus(StatusCode::kNotFound, paths[0], ": the graph has no attribute '", name,
                        "'; name it under graph: attributes in the schema and ingest again");
    }
    g->values_.emplace_back();
    DPSR_RETURN_IF_ERROR(
        Read(reader, prefix, "item", SectionReader::kAnyLength, num_items, &g->values_.back()));
  }
  *graph = std::move(g);
  return Status();
}

Status ClickGraph::Read(const SectionReader& reader, const std::string& prefix, const char* neighbour, int64_t rows,
                        int64_t num_neighbours, Part* part) {
  const std::string nodes = StrCat(prefix, ".", neighbour), weight = prefix + ".weight", time = prefix + ".time";
  DPSR_RETURN_IF_ERROR(reader.Ragged(prefix + ".splits", nodes, rows, &part->edges));
  DPSR_RETURN_IF_ERROR(reader.CheckRows(nodes, part->edges.values, num_neighbours, "nodes"));
  const int64_t edges = static_cast<int64_t>(part->edges.values.size());
  DPSR_RETURN_IF_ERROR(reader.Array(weight, edges, &part->weights));
  for (int64_t e = 0; e < edges; ++e) {
    if (!(part->weights[e] > 0) || !std::isfinite(part->weights[e])) {
      return MakeStatus(StatusCode::kDataLoss, reader.file().path(), ": section ", weight, " row ", e, " is ",
                        part->weights[e], ", expected a number above 0; ingest the log again");
    }
  }
  if (reader.Has(time)) DPSR_RETURN_IF_ERROR(reader.Array(time, edges, &part->times));
  return Status();
}

Edges ClickGraph::Of(const Part& part, int64_t row) {
  const int64_t begin = part.edges.splits[row], end = part.edges.splits[row + 1];
  const size_t count = static_cast<size_t>(end - begin);
  Edges edges{{part.edges.values.data() + begin, count}, {part.weights.data() + begin, count}, {}};
  if (!part.times.empty()) edges.times = {part.times.data() + begin, count};
  return edges;
}

Edges ClickGraph::Find(const std::vector<Part>& parts, int64_t row) {
  const auto after = std::upper_bound(parts.begin(), parts.end(), row,
                                      [](int64_t wanted, const Part& part) { return wanted < part.first; });
  const Part& part = *(after - 1);
  return Of(part, row - part.first);
}

void RowNumbers::Clear() {
  rows_.clear();
  std::fill(slots_.begin(), slots_.end(), 0);
}

int32_t RowNumbers::NumberOf(int32_t row) {
  if (2 * (rows_.size() + 1) > slots_.size()) Grow();
  const size_t mask = slots_.size() - 1;
  size_t slot = Mix64(static_cast<uint64_t>(row)) & mask;
  for (; slots_[slot] != 0; slot = (slot + 1) & mask) {
    if (rows_[slots_[slot] - 1] == row) return slots_[slot] - 1;
  }
  rows_.push_back(row);
  slots_[slot] = static_cast<int32_t>(rows_.size());
  return slots_[slot] - 1;
}

void RowNumbers::Grow() {
  slots_.assign(std::max<size_t>(64, 2 * slots_.size()), 0);
  const size_t mask = slots_.size() - 1;
  for (size_t number = 0; number < rows_.size(); ++number) {
    size_t slot = Mix64(static_cast<uint64_t>(rows_[number])) & mask;
    while (slots_[slot] != 0) slot = (slot + 1) & mask;
    slots_[slot] = static_cast<int32_t>(number) + 1;
  }
}

}  // namespace dpsr
