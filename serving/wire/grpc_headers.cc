#include "serving/wire/grpc_headers.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dpsr::serving {
namespace {

constexpr std::string_view kHopHeaders[] = {
    "te", "content-type", "content-length", "user-agent", "host", "connection", "grpc-timeout", "grpc-encoding",
    "grpc-accept-encoding", "grpc-status", "grpc-message",
    // Headers that only gRPC's own libraries may send.
    "grpclb_client_stats", "grpc-internal-encoding-request", "grpc-internal-stream-encoding-request",
    "grpc-previous-rpc-attempts", "lb-token", "lb-cost-bin"};

bool EndsWith(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

bool IsNameCharacter(char c) {
  return (c >= 'a' && c <= 'z') || IsDigit(c) || c == '_' || c == '-' || c == '.';
}

// Several values of a name may come joined by commas.
bool IsBase64Character(char c) { return IsLetter(c) || IsDigit(c) || c == '+' || c == '/' || c == '=' || c == ','; }

bool IsPrintable(char c) { return c >= 0x20 && c <= 0x7E; }

int HexDigit(char c) {
  if (IsDigit(c)) return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

}  // namespace

bool IsMetadata(std::string_view name, std::string_view value) {
  if (name.empty() || !std::all_of(name.begin(), name.end(), IsNameCharacter)) return false;
  return std::all_of(value.begin(), value.end(), EndsWith(name, "-bin") ? IsBase64Character : IsPrintable);
}

bool IsHopHeader(std::string_view name) {
  return std::find(std::begin(kHopHeaders), std::end(kHopHeaders), name) != std::end(kHopHeaders);
}

bool ParseTimeout(std::string_view text, double* seconds) {
  if (text.size() < 2 || text.size() > 9) return false;
  uint64_t value = 0;
  for (const char c : text.substr(0, text.size() - 1)) {
    if (!IsDigit(c)) return false;
    value = 10 * value + static_cast<uint64_t>(c - '0');
  }
  double unit = 0;
  switch (text.back()) {
    case 'H':
      unit = 3600;
      break;
    case 'M':
      unit = 60;
      break;
    case 'S':
      unit = 1;
      break;
    case 'm':
      unit = 1e-3;
      break;
    case 'u':
      unit = 1e-6;
      break;
    case 'n':
      unit = 1e-9;
      break;
    default:
      return false;
  }
  *seconds = static_cast<double>(value) * unit;
  return true;
}

std::string FormatTimeout(double seconds) {
  double value = std::max(seconds, 0.0);
  char unit = 'S';
  if (value < 90) {
    value *= 1e6;
    unit = 'u';
  } else if (value < 90'000) {
    value *= 1e3;
    unit = 'm';
  }
  return std::to_string(static_cast<uint64_t>(std::min(std::ceil(value), 99'999'999.0))) + unit;
}

std::string EscapeMessage(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    if (IsPrintable(c) && c != '%') {
      out += c;
    } else {
      constexpr char kDigits[] = "0123456789ABCDEF";
      const auto byte = static_cast<uint8_t>(c);
      out += {'%', kDigits[byte >> 4], kDigits[byte & 0xF]};
    }
  }
  return out;
}

std::string UnescapeMessage(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const int high = text[i] == '%' && i + 2 < text.size() ? HexDigit(text[i + 1]) : -1;
    const int low = high >= 0 ? HexDigit(text[i + 2]) : -1;
    if (low >= 0) {
      out += static_cast<char>(high << 4 | low);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace dpsr::serving
