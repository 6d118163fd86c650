#include "serving/wire/compression.h"

#include <sched.h>
#include <zlib.h>

#include <limits>
#include <new>

namespace dpsr::serving {
namespace {

constexpr int kWindowBits = 15;
constexpr int kGzipFormat = 16;  // added to the window's bits
constexpr int kMemoryLevel = 8;
constexpr size_t kStepBytes = 1 << 16;
constexpr size_t kMostRatio = 1032;  // the largest that deflate reaches

int FormatOf(std::string_view compression) { return kWindowBits + (compression == kGzip ? kGzipFormat : 0); }

}  // namespace

bool IsCompression(std::string_view name) { return name == kGzip || name == kDeflate; }

UnpackResult Unpack(std::string_view compression, std::string_view packed, size_t most, std::string* out) {
  out->clear();
  z_stream stream{};
  if (packed.size() > std::numeric_limits<uInt>::max()) return UnpackResult::kTooLarge;
  if (inflateInit2(&stream, FormatOf(compression)) != Z_OK) return UnpackResult::kBroken;
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  UnpackResult result = UnpackResult::kOk;
  int status = Z_OK;
  try {
    // Reserves the address space at once, so that growing copies nothing. Memory is used page by page, as it is filled.
    const size_t possible = packed.size() > most / kMostRatio ? most : packed.size() * kMostRatio;
    out->reserve(possible + kStepBytes);
    size_t size = 0;
    while (status == Z_OK && result == UnpackResult::kOk) {
      // Lets other threads run between two steps. Otherwise a gzip bomb delays their requests.
      if (size > 0) sched_yield();
      out->resize(size + kStepBytes);
      stream.next_out = reinterpret_cast<Bytef*>(out->data() + size);
      stream.avail_out = kStepBytes;
      status = inflate(&stream, Z_NO_FLUSH);
      size += kStepBytes - stream.avail_out;
      if (size > most) result = UnpackResult::kTooLarge;
    }
    out->resize(size);
  } catch (const std::bad_alloc&) {
    result = UnpackResult::kTooLarge;
  }
  if (result == UnpackResult::kOk && (status != Z_STREAM_END || stream.avail_in != 0)) result = UnpackResult::kBroken;
  inflateEnd(&stream);
  if (result != UnpackResult::kOk) std::string().swap(*out);
  return result;
}

bool Pack(std::string_view compression, std::string_view message, std::string* out) {
  z_stream stream{};
  if (deflateInit2(&stream, Z_BEST_SPEED, Z_DEFLATED, FormatOf(compression), kMemoryLevel, Z_DEFAULT_STRATEGY) != Z_OK) {
    return false;
  }
  const uLong bound = deflateBound(&stream, message.size());
  bool packed = false;
  // zlib counts 32 bits at once, and larger answers are not worth the code.
  if (bound <= std::numeric_limits<uInt>::max()) {
    try {
      out->resize(bound);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(message.data()));
      stream.avail_in = static_cast<uInt>(message.size());
      stream.next_out = reinterpret_cast<Bytef*>(out->data());
      stream.avail_out = static_cast<uInt>(bound);
      packed = deflate(&stream, Z_FINISH) == Z_STREAM_END && stream.total_out < message.size();
      out->resize(packed ? stream.total_out : 0);
    } catch (const std::bad_alloc&) {
    }
  }
  deflateEnd(&stream);
  return packed;
}

}  // namespace dpsr::serving
