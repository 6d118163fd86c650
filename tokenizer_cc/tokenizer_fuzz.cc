// A libFuzzer target: for any bytes and any configuration, all tokens are valid, not empty, and of the kinds that are
// on, and a text has the words of its normal text. The input is a byte, whose bits are the switches in the order of
// TokenizerConfig, and then the text.
#include <utf8proc.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "tokenizer_cc/tokenizer.h"
#include "tokenizer_cc/word_sequences.h"

namespace {

void Check(bool condition) {
  if (!condition) std::abort();
}

bool IsValidUtf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t c;
    const utf8proc_ssize_t length = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    if (length <= 0) return false;
    i += static_cast<size_t>(length);
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto is_on = [&](int i) { return (data[0] >> i & 1) != 0; };
  dpsr::TokenizerConfig config;
  config.word_unigrams = is_on(0);
  config.word_bigrams = is_on(1);
  config.letter_trigrams = is_on(2);
  config.char_unigrams = is_on(3);
  config.char_bigrams = is_on(4);
  config.number_parts = is_on(5);
  config.markers = is_on(6);
  dpsr::TokenizerConfig parsed;
  Check(dpsr::TokenizerConfig::Parse(config.Serialize(), &parsed).ok());
  Check(parsed == config);

  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  size_t tokens = 0;
  size_t trigrams = 0;
  std::string last;
  dpsr::Tokenizer(config).Tokenize(text, [&](std::string_view token) {
    Check(!token.empty());
    Check(IsValidUtf8(token));
    if (config.markers && tokens == 0) Check(token == "<s>");
    // No other kind of token contains '#'.
    if (token[0] == '#') ++trigrams;
    ++tokens;
    last = token;
  });
  if (config.markers) Check(tokens >= 2 && last == "</s>");
  if (!config.letter_trigrams) Check(trigrams == 0);

  const auto words = [](std::string_view of) {
    std::string joined;
    dpsr::Tokenizer(dpsr::WordTokens()).Tokenize(of, [&](std::string_view word) { joined.append(word) += ' '; });
    return joined;
  };
  const std::string normal = dpsr::NormalText(text);
  Check(words(normal) == words(text));
  Check(dpsr::NormalText(normal) == normal);
  return 0;
}
