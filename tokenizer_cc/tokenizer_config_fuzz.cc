// A libFuzzer target: TokenizerConfig::Parse accepts or refuses any text, and Serialize writes an accepted text again.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "tokenizer_cc/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  dpsr::TokenizerConfig config;
  dpsr::TokenizerConfig again;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  if (!dpsr::TokenizerConfig::Parse(text, &config).ok()) return 0;
  if (!dpsr::TokenizerConfig::Parse(config.Serialize(), &again).ok() || again != config) std::abort();
  return 0;
}
