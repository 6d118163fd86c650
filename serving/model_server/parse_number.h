// Numbers in flags, paths and file names.
#ifndef DPSR_SERVING_MODEL_SERVER_PARSE_NUMBER_H_
#define DPSR_SERVING_MODEL_SERVER_PARSE_NUMBER_H_

#include <charconv>
#include <string_view>
#include <system_error>

namespace dpsr::serving {

// Reads a decimal integer. Returns false if `text` is anything else or the number does not fit into T.
template <typename T>
bool ParseNumber(std::string_view text, T* number) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *number);
  return error == std::errc() && stop == end;
}

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_PARSE_NUMBER_H_
