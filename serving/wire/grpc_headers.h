// gRPC's rules for headers: what may be metadata, what belongs to a single hop, and the forms of time limits and messages.
// https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
#ifndef DPSR_SERVING_WIRE_GRPC_HEADERS_H_
#define DPSR_SERVING_WIRE_GRPC_HEADERS_H_

#include <string>
#include <string_view>

namespace dpsr::serving {

struct Header {
  std::string name;
  std::string value;
};

// The largest of gRPC's status codes, and those that the wire itself answers with.
inline constexpr int kMaxGrpcCode = 16;
inline constexpr int kGrpcUnknown = 2;
inline constexpr int kGrpcInvalidArgument = 3;
inline constexpr int kGrpcDeadlineExceeded = 4;
inline constexpr int kGrpcResourceExhausted = 8;
inline constexpr int kGrpcUnimplemented = 12;
inline constexpr int kGrpcInternal = 13;

// Returns whether a name and a value may be sent as metadata: names of a-z 0-9 _ - . and values of printable ASCII; the
// value of a name that ends in "-bin" is base64.
bool IsMetadata(std::string_view name, std::string_view value);

// Returns whether a header concerns a single hop, so that it is never forwarded. gRPC's libraries exchange some headers
// among themselves that clients must not be able to send to a server, such as grpclb_client_stats, which ends servers of
// gRPC before 1.53 (CVE-2023-1428).
bool IsHopHeader(std::string_view name);

// Reads the header `grpc-timeout`: at most 8 digits and a unit of H M S m u n. Returns false if it is something else.
bool ParseTimeout(std::string_view text, double* seconds);

// Returns the header `grpc-timeout` for this many seconds, rounded up.
std::string FormatTimeout(double seconds);

// Encodes and decodes the header `grpc-message`, which has bytes other than printable ASCII as %XX.
std::string EscapeMessage(std::string_view text);
std::string UnescapeMessage(std::string_view text);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_WIRE_GRPC_HEADERS_H_
