// The log of item changes, which a servable replays: new items, new attributes of items, and deletions. Python writes it
// (dpsr_export/item_changes.py). The changes of a servable are in the directory `item_changes` beside its versions, in
// immutable packed files of kind "item_changes", which are called segments:
//
//   00000000000000000000-00000000000000000128.dpsr    the changes from offset 0 to before offset 128
//   00000000000000000128-00000000000000000130.dpsr    the next two
//
// Offsets count changes. Each segment begins where the one before it ends. The oldest segments may have been removed. A
// segment appears by a rename, so that a reader sees a whole one or none. The sections of a segment with n changes:
//
//   kind             uint8 [n]      see ItemChangeKind
//   id               int64 [n]      item id, at least 0
//   version          int64 [n]      number that the shop gave, or 0
//   time             float64 [n]    when the change was acknowledged, in seconds since 1970
//   key.splits       int64 [n + 1]  where the shop's own id of each item begins in key.bytes;
//   key.bytes        uint8          both only if these ids are texts
//   example.splits   int64 [n + 1]  where each serialized tf.train.Example begins in example.bytes
//   example.bytes    uint8
#ifndef DPSR_EXPORT_FRESH_ITEMS_CHANGE_LOG_H_
#define DPSR_EXPORT_FRESH_ITEMS_CHANGE_LOG_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/packed_file.h"
#include "common/span.h"
#include "common/status.h"

namespace dpsr {

// The numbers are stored in segments, so their meaning never changes.
enum class ItemChangeKind : uint8_t {
  kPut = 0,     // the whole item, which is added or replaced
  kUpdate = 1,  // new values of attributes that searches filter by
  kDelete = 2,
};
constexpr uint8_t kNumItemChangeKinds = 3;

// n changes in the order of the log, one element of each vector for each change.
struct ItemChanges {
  std::vector<int32_t> kinds;  // values of ItemChangeKind
  std::vector<int64_t> item_ids;
  std::vector<int64_t> versions;
  std::vector<double> times;
  std::vector<std::string> keys;  // empty where item ids are numbers
  std::vector<std::string> examples;
  int64_t next_offset = 0;  // of the change after the last one
};

// Returns the directory of the log of a servable: "BASE/item_changes" for "BASE/VERSION/assets/FILE" and up = 3, the
// number of levels from the file to BASE. Returns "" if the file is on another file system ("scheme://..."), or if the
// name of the version is not a whole number: a servable that is being exported, or a copy elsewhere, has no log.
std::string ChangeLogDirectory(const std::string& asset_path, int up);

// Reads a log. Thread-safe. A log on a local file system is found to have no new changes without reading its directory.
class ChangeLogReader {
 public:
  explicit ChangeLogReader(std::string directory) : directory_(std::move(directory)) {}

  const std::string& directory() const { return directory_; }

  // Reads at most `max_changes` changes from `offset` on, which may be fewer than there are. There are none at the end
  // of the log, and if the directory does not exist.
  //
  // Errors: InvalidArgument (a negative offset, or max_changes below 1), FailedPrecondition (the directory cannot be
  // read), DataLoss (the segment with `offset` is damaged or missing, or the log ends before it). A call that has read
  // changes before the damage returns them, and the next one fails.
  Status Read(int64_t offset, int64_t max_changes, ItemChanges* changes);

 private:
  struct Segment {
    int64_t first = 0;
    int64_t end = 0;
  };
  // A segment that is open and verified.
  struct Open {
    Segment segment;
    std::unique_ptr<PackedFile> file;
    Span<const uint8_t> kinds;
    Span<const int64_t> item_ids, versions, key_splits, example_splits;
    Span<const double> times;
    Span<const uint8_t> key_bytes, example_bytes;
  };

  Status List();
  Status OpenAt(int64_t offset, bool* listed, bool* at_end);
  Status OpenSegment(const Segment& segment, Open* open) const;
  std::string PathOf(const Segment& segment) const;

  const std::string directory_;
  std::mutex mutex_;
  // The segments by their first offset, as of the last listing, and the directory's time of change then; -1 if it must
  // be listed again.
  std::vector<Segment> segments_;
  int64_t listed_ns_ = -1;
  Open open_;
};

}  // namespace dpsr

#endif  // DPSR_EXPORT_FRESH_ITEMS_CHANGE_LOG_H_
