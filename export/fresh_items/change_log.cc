#include "export/fresh_items/change_log.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <utility>

namespace dpsr {
namespace {

constexpr char kDirectory[] = "item_changes";
constexpr char kKind[] = "item_changes";
constexpr size_t kOffsetDigits = 20;
constexpr char kSuffix[] = ".dpsr";
// File systems note the time of a change with a coarse clock, and network file systems know it late. A directory that
// was changed this short a time ago is listed again, even if its time stays the same.
constexpr int64_t kSettledNs = 3'000'000'000;

bool IsNumber(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// Reads an offset of kOffsetDigits digits.
bool ParseOffset(std::string_view digits, int64_t* offset) {
  // The largest int64 has 19 digits and begins with 9.
  if (digits[0] != '0' || digits[1] == '9' || !IsNumber(digits)) return false;
  *offset = 0;
  for (const char digit : digits) *offset = 10 * *offset + (digit - '0');
  return true;
}

// Reads "FIRST-END.dpsr". Returns false for any other name, such as that of a temporary file.
bool ParseName(std::string_view name, int64_t* first, int64_t* end) {
  if (name.size() != 2 * kOffsetDigits + 1 + std::strlen(kSuffix)) return false;
  if (name[kOffsetDigits] != '-' || name.substr(2 * kOffsetDigits + 1) != kSuffix) return false;
  return ParseOffset(name.substr(0, kOffsetDigits), first) &&
         ParseOffset(name.substr(kOffsetDigits + 1, kOffsetDigits), end) && *first < *end;
}

Status CheckSplits(const PackedFile& file, const char* name, Span<const int64_t> splits, size_t n, size_t bytes) {
  bool fits = splits.size() == n + 1 && splits[0] == 0 && splits[n] == static_cast<int64_t>(bytes);
  for (size_t i = 0; fits && i < n; ++i) fits = splits[i] <= splits[i + 1];
  if (fits) return Status();
  return MakeStatus(StatusCode::kDataLoss, file.path(), ": ", name, ".splits has ", splits.size(),
                    " values that do not fit ", n, " changes and ", bytes, " bytes");
}

std::string Text(Span<const int64_t> splits, Span<const uint8_t> bytes, size_t row) {
  if (splits.empty()) return "";
  const auto begin = static_cast<size_t>(splits[row]);
  return std::string(reinterpret_cast<const char*>(bytes.data()) + begin, static_cast<size_t>(splits[row + 1]) - begin);
}

}  // namespace

std::string ChangeLogDirectory(const std::string& asset_path, int up) {
  if (asset_path.find("://") != std::string::npos) return "";
  std::filesystem::path path = std::filesystem::absolute(asset_path).lexically_normal();
  std::filesystem::path version;
  for (int level = 0; level < up; ++level) {
    // The version is two levels above its assets; with shards, there are further levels above it.
    if (level == 2) version = path.filename();
    path = path.parent_path();
  }
  return IsNumber(version.string()) ? (path / kDirectory).string() : "";
}

// Lists the segments, unless the directory is surely as it was.
Status ChangeLogReader::List() {
  struct stat info;
  if (stat(directory_.c_str(), &info) != 0) {
    segments_.clear();
    listed_ns_ = -1;
    if (errno == ENOENT || errno == ENOTDIR) return Status();
    return MakeStatus(StatusCode::kFailedPrecondition, directory_, ": cannot be read: ", std::strerror(errno));
  }
  const int64_t changed_ns = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  if (changed_ns == listed_ns_) return Status();
  segments_.clear();
  listed_ns_ = -1;
  const int64_t now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(
                             std::chrono::system_clock::now().time_since_epoch()).count();
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(opendir(directory_.c_str()), &closedir);
  if (listing == nullptr) {
    return MakeStatus(StatusCode::kFailedPrecondition, directory_, ": cannot be read: ", std::strerror(errno));
  }
  errno = 0;
  while (const dirent* entry = readdir(listing.get())) {
    Segment segment;
    if (ParseName(entry->d_name, &segment.first, &segment.end)) segments_.push_back(segment);
  }
  if (errno != 0) {
    return MakeStatus(StatusCode::kFailedPrecondition, directory_, ": cannot be read: ", std::strerror(errno));
  }
  std::sort(segments_.begin(), segments_.end(), [](const Segment& a, const Segment& b) { return a.first < b.first; });
  if (changed_ns < now_ns - kSettledNs) listed_ns_ = changed_ns;
  return Status();
}

std::string ChangeLogReader::PathOf(const Segment& segment) const {
  const auto digits = [](int64_t offset) {
    const std::string number = std::to_string(offset);
    return std::string(kOffsetDigits - number.size(), '0') + number;
  };
  return directory_ + "/" + digits(segment.first) + "-" + digits(segment.end) + kSuffix;
}

// Opens the segment that holds `offset`. Sets `at_end` instead if the log ends there, or is empty. Lists the segments
// first, unless that was `listed` before: a log may have thousands of them.
Status ChangeLogReader::OpenAt(int64_t offset, bool* listed, bool* at_end) {
  *at_end = false;
  if (open_.segment.first <= offset && offset < open_.segment.end) return Status();
  if (!*listed) DPSR_RETURN_IF_ERROR(List());
  *listed = true;
  if (segments_.empty()) {
    *at_end = true;
    return Status();
  }
  const auto after = std::upper_bound(segments_.begin(), segments_.end(), offset,
                                      [](int64_t value, const Segment& segment) { return value < segment.first; });
  if (after == segments_.begin()) {
    return MakeStatus(StatusCode::kDataLoss, directory_, ": the changes ", offset, " to ", after->first - 1,
                      " are missing, before ", PathOf(*after), "; serve a version whose index has them (`dpsr index "
                      "--merge`)");
  }
  const Segment& segment = *std::prev(after);
  if (offset < segment.end) return OpenSegment(segment, &open_);
  if (after != segments_.end()) {
    return MakeStatus(StatusCode::kDataLoss, directory_, ": the changes ", offset, " to ", after->first - 1,
                      " are missing, between ", PathOf(segment), " and ", PathOf(*after), "; restore the missing segment");
  }
  *at_end = offset == segment.end;
  if (*at_end) return Status();
  return MakeStatus(StatusCode::kDataLoss, directory_, ": ends at the change ", segment.end, " (", PathOf(segment),
                    "), but the changes before ", offset, " were read before or are in the index: it is another log, or "
                    "segments at its end were removed");
}

Status ChangeLogReader::OpenSegment(const Segment& segment, Open* open) const {
  const std::string path = PathOf(segment);
  Open made;
  made.segment = segment;
  const Status opened = PackedFile::Open(path, kKind, /*verify=*/true, &made.file);
  // Whatever keeps a segment from being read, the log cannot be read past it.
  if (!opened.ok()) return Status(StatusCode::kDataLoss, opened.message());
  const PackedFile& file = *made.file;
  DPSR_RETURN_IF_ERROR(file.Get("kind", &made.kinds));
  DPSR_RETURN_IF_ERROR(file.Get("id", &made.item_ids));
  DPSR_RETURN_IF_ERROR(file.Get("version", &made.versions));
  DPSR_RETURN_IF_ERROR(file.Get("time", &made.times));
  DPSR_RETURN_IF_ERROR(file.Get("example.splits", &made.example_splits));
  DPSR_RETURN_IF_ERROR(file.Get("example.bytes", &made.example_bytes));
  const auto n = static_cast<size_t>(segment.end - segment.first);
  if (made.kinds.size() != n || made.item_ids.size() != n || made.versions.size() != n || made.times.size() != n) {
    return MakeStatus(StatusCode::kDataLoss, path, ": has ", made.kinds.size(), " kinds, ",
                      made.item_ids.size(), " ids, ", made.versions.size(), " versions and ", made.times.size(),
                      " times, expected ", n, " of each by its name");
  }
  for (size_t i = 0; i < n; ++i) {
    if (made.kinds[i] < kNumItemChangeKinds && made.item_ids[i] >= 0) continue;
    return MakeStatus(StatusCode::kDataLoss, path, ": change ", segment.first + static_cast<int64_t>(i),
                      " has the kind ", int{made.kinds[i]}, " and the item id ", made.item_ids[i],
                      ", expected a kind from 0 to ", kNumItemChangeKinds - 1, " and an id of 0 or more");
  }
  DPSR_RETURN_IF_ERROR(CheckSplits(file, "example", made.example_splits, n, made.example_bytes.size()));
  if (file.Find("key.splits") != nullptr) {
    DPSR_RETURN_IF_ERROR(file.Get("key.splits", &made.key_splits));
    DPSR_RETURN_IF_ERROR(file.Get("key.bytes", &made.key_bytes));
    DPSR_RETURN_IF_ERROR(CheckSplits(file, "key", made.key_splits, n, made.key_bytes.size()));
  }
  *open = std::move(made);
  return Status();
}

Status ChangeLogReader::Read(int64_t offset, int64_t max_changes, ItemChanges* changes) {
  if (offset < 0 || max_changes < 1) {
    return MakeStatus(StatusCode::kInvalidArgument, "offset is ", offset, " and max_changes is ", max_changes,
                      ", expected an offset of 0 or more and at least 1 change");
  }
  *changes = ItemChanges();
  changes->next_offset = offset;
  if (directory_.empty()) return Status();
  const std::lock_guard<std::mutex> lock(mutex_);
  bool listed = false;
  while (changes->next_offset - offset < max_changes) {
    bool at_end = false;
    const Status status = OpenAt(changes->next_offset, &listed, &at_end);
    if (!status.ok() && changes->next_offset == offset) return status;
    if (!status.ok() || at_end) break;
    const auto begin = static_cast<size_t>(changes->next_offset - open_.segment.first);
    const size_t end = begin + static_cast<size_t>(std::min(open_.segment.end - changes->next_offset,
                                                            max_changes - (changes->next_offset - offset)));
    for (size_t row = begin; row < end; ++row) {
      changes->kinds.push_back(open_.kinds[row]);
      changes->item_ids.push_back(open_.item_ids[row]);
      changes->versions.push_back(open_.versions[row]);
      changes->times.push_back(open_.times[row]);
      changes->keys.push_back(Text(open_.key_splits, open_.key_bytes, row));
      changes->examples.push_back(Text(open_.example_splits, open_.example_bytes, row));
    }
    changes->next_offset = open_.segment.first + static_cast<int64_t>(end);
  }
  return Status();
}

}  // namespace dpsr
