// gRPC's compressions of messages: gzip, and deflate, by which gRPC means zlib's format.
#ifndef DPSR_SERVING_WIRE_COMPRESSION_H_
#define DPSR_SERVING_WIRE_COMPRESSION_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace dpsr::serving {

inline constexpr char kIdentity[] = "identity";
inline constexpr char kDeflate[] = "deflate";
inline constexpr char kGzip[] = "gzip";

// The names of all of them, as the header grpc-accept-encoding has them.
inline constexpr char kCompressions[] = "identity,deflate,gzip";

// Whether Pack and Unpack know it.
bool IsCompression(std::string_view name);

enum class UnpackResult { kOk, kBroken, kTooLarge };

// Unpacks a message into `out`, which has at most `most` bytes then.
UnpackResult Unpack(std::string_view compression, std::string_view packed, size_t most, std::string* out);

// Packs a message, at the fastest level, because an answer is packed once for each request. Returns false if the message
// does not become smaller, or if memory is not enough.
bool Pack(std::string_view compression, std::string_view message, std::string* out);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_WIRE_COMPRESSION_H_
