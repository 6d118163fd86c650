#include "tokenizer_cc/tokenizer.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/test_util.h"
#include "tokenizer_cc/token_scanner.h"

namespace dpsr {
namespace {

using Tokens = std::vector<std::string>;

Tokens Tokenize(std::string_view text, const TokenizerConfig& config = {}) {
  Tokens tokens;
  Tokenizer(config).Tokenize(text, [&](std::string_view token) { tokens.emplace_back(token); });
  return tokens;
}

TokenizerConfig OnlyWords() {
  TokenizerConfig config;
  config.letter_trigrams = config.char_bigrams = false;
  return config;
}

// Words and characters, without their n-grams.
Tokens Words(std::string_view text) { return Tokenize(text, OnlyWords()); }

TEST(TokenizerTest, WordWithTrigrams) {
  EXPECT_EQ(Tokenize("Deck"), (Tokens{"deck", "##de", "#dec", "#eck", "#ck#"}));
  EXPECT_EQ(Tokenize("tv"), (Tokens{"tv", "##tv", "#tv#"}));
  EXPECT_EQ(Tokenize("x"), (Tokens{"x", "##x#"}));
}

TEST(TokenizerTest, NothingToTokenize) {
  EXPECT_EQ(Tokenize(""), Tokens{});
  EXPECT_EQ(Tokenize(std::string_view()), Tokens{});
  EXPECT_EQ(Tokenize(" \t\r\n\v\f!?#-_.,;"), Tokens{});
  EXPECT_EQ(Tokenize("　、。！"), Tokens{});
}

TEST(TokenizerTest, SeparatorsSplitWords) {
  EXPECT_EQ(Words("a b\tc\nd,e-f/g_h"), (Tokens{"a", "b", "c", "d", "e", "f", "g", "h"}));
  EXPECT_EQ(Words("a　b\u00A0c\u2003d\u2028e"), (Tokens{"a", "b", "c", "d", "e"}));
  EXPECT_EQ(Words(std::string_view("a\0b", 3)), (Tokens{"a", "b"}));
  EXPECT_EQ(Words(std::string_view("á\0b", 4)), (Tokens{"á", "b"}));
  EXPECT_EQ(Words("c++ c# #deck"), (Tokens{"c", "c", "deck"}));
  EXPECT_EQ(Words("a😀b👍🏽c"), (Tokens{"a", "b", "c"}));
  EXPECT_EQ(Words("a\uE000b\u0378c"), (Tokens{"a", "b", "c"})) << "private use, unassigned";
}

TEST(TokenizerTest, NumbersHaveNoTrigrams) {
  EXPECT_EQ(Tokenize("2024"), (Tokens{"2024"}));
  EXPECT_EQ(Tokenize("3.5 5/8 1,5"), (Tokens{"3.5", "5/8", "1,5"}));
  EXPECT_EQ(Tokenize("٢٣"), (Tokens{"٢٣"})) << "digits of any script";
  EXPECT_EQ(Tokenize("3\u0301"), (Tokens{"3\u0301", "##3\u0301", "#3\u0301#"})) << "a mark is no digit";
}

TEST(TokenizerTest, PartsOfWordsWithNumbers) {
  EXPECT_EQ(Tokenize("4k"), (Tokens{"4k", "4", "k", "##4k", "#4k#"}));
  EXPECT_EQ(Tokenize("3.5m"), (Tokens{"3.5m", "3.5", "m", "##3.", "#3.5", "#.5m", "#5m#"}));
  EXPECT_EQ(Words("iPhone11Pro sc141"), (Tokens{"iphone11pro", "iphone", "11", "pro", "sc141", "sc", "141"}));
  EXPECT_EQ(Words("１００ＭＬ ５寸"), (Tokens{"100ml", "100", "ml", "5", "寸"}));
  EXPECT_EQ(Words("дом٢٣é4"), (Tokens{"дом٢٣é4", "дом", "٢٣", "é", "4"}));
  EXPECT_EQ(Words("3\u0301x"), (Tokens{"3\u0301x", "3\u0301", "x"})) << "a mark belongs to what is before it";
  EXPECT_EQ(Words("a1,000/2b"), (Tokens{"a1000/2b", "a", "1000/2", "b"}));
  TokenizerConfig config;
  config.word_bigrams = true;
  EXPECT_EQ(Tokenize("x 2m", config), (Tokens{"x", "##x#", "2m", "2", "m", "x 2m", "##2m", "#2m#"}));
  config.number_parts = false;
  EXPECT_EQ(Tokenize("2m", config), (Tokens{"2m", "##2m", "#2m#"}));
  config.number_parts = true;
  config.word_unigrams = false;
  EXPECT_EQ(Tokenize("2m", config), (Tokens{"##2m", "#2m#"})) << "parts are unigrams";
}

TEST(TokenizerTest, JoinersWithinNumbers) {
  EXPECT_EQ(Words("1.2.3 2024/01/02"), (Tokens{"1.2.3", "2024/01/02"}));
  EXPECT_EQ(Words("1. .5 1..2 1,,2 x.5 5.x a/b 1-2"),
            (Tokens{"1", "5", "1", "2", "1", "2", "x", "5", "5", "x", "a", "b", "1", "2"}));
  EXPECT_EQ(Words("１．５　½ 1\u20442"), (Tokens{"1.5", "1/2", "1/2"}));
  EXPECT_EQ(Words("٣.٥ 3.๕"), (Tokens{"٣.٥", "3", "๕"})) << "Thai digits are characters";
  EXPECT_EQ(Words("3\u0301.5"), (Tokens{"3\u0301", "5"}));
}

TEST(TokenizerTest, ThousandsSeparators) {
  EXPECT_EQ(Words("1,000 12,500.5 1,234,567"), (Tokens{"1000", "12500.5", "1234567"}));
  EXPECT_EQ(Words("1,00 1,0000 1,000,00 1,000.000"), (Tokens{"1,00", "1,0000", "1000,00", "1000.000"}));
  EXPECT_EQ(Words("１，０００ 1,000mm 1,000,"), (Tokens{"1000", "1000mm", "1000", "mm", "1000"}));
  EXPECT_EQ(Words("1,000手"), (Tokens{"1000", "手"}));
}

TEST(TokenizerTest, Markers) {
  TokenizerConfig config;
  config.markers = true;
  config.letter_trigrams = false;
  EXPECT_EQ(Tokenize("", config), (Tokens{"<s>", "</s>"}));
  EXPECT_EQ(Tokenize("　!", config), (Tokens{"<s>", "</s>"}));
  EXPECT_EQ(Tokenize("red shoes", config), (Tokens{"<s>", "red", "shoes", "</s>"}));
  EXPECT_EQ(Tokenize("手机", config), (Tokens{"<s>", "手", "<s>手", "机", "手机", "机</s>", "</s>"}));
  EXPECT_EQ(Tokenize("手", config), (Tokens{"<s>", "手", "<s>手", "手</s>", "</s>"}));
  EXPECT_EQ(Tokenize("red手", config), (Tokens{"<s>", "red", "手", "手</s>", "</s>"}));
  config.word_bigrams = true;
  EXPECT_EQ(Tokenize("", config), (Tokens{"<s>", "</s>"})) << "no bigram of two markers";
  EXPECT_EQ(Tokenize("Red shoes!", config),
            (Tokens{"<s>", "red", "<s> red", "shoes", "red shoes", "shoes </s>", "</s>"}));
  EXPECT_EQ(Tokenize("手 red", config), (Tokens{"<s>", "手", "<s>手", "red", "red </s>", "</s>"}));
  EXPECT_EQ(Tokenize("été", config), (Tokens{"<s>", "été", "<s> été", "été </s>", "</s>"}));
  EXPECT_EQ(Tokenize("<s>", config), (Tokens{"<s>", "s", "<s> s", "s </s>", "</s>"}));
}

TEST(TokenizerTest, NormalForms) {
  EXPECT_EQ(Words("ＡＢＣ"), (Tokens{"abc"})) << "full width";
  EXPECT_EQ(Words("ｱｲｶﾞ"), (Tokens{"ア", "イ", "ガ"})) << "half width, with a voiced mark that composes";
  EXPECT_EQ(Words("Straße"), (Tokens{"strasse"}));
  EXPECT_EQ(Words("ΣΊΣΥΦΟΣ"), (Tokens{"σίσυφοσ"}));
  EXPECT_EQ(Words("ﬁne"), (Tokens{"fine"}));
  EXPECT_EQ(Words("Cafe\u0301"), Words("CAFÉ"));
  EXPECT_EQ(Words("CAFÉ"), (Tokens{"café"}));
  EXPECT_EQ(Words("x²y"), (Tokens{"x2y", "x", "2", "y"}));
  EXPECT_EQ(Words("wi\u00ADfi\u200Bx\uFEFF"), (Tokens{"wifix"})) << "ignorable code points go";
  EXPECT_EQ(Words("\u2F00"), (Tokens{"一"})) << "Kangxi radical one";
  EXPECT_EQ(Words("\uF900"), (Tokens{"豈"})) << "compatibility ideograph";
  EXPECT_EQ(Words("\u1112\u1161\u11AB"), (Tokens{"한"}));
}

TEST(TokenizerTest, MarksComeInCanonicalOrder) {
  EXPECT_EQ(Words("q\u0307\u0323"), Words("q\u0323\u0307"));
  EXPECT_EQ(Words("q\u0307\u0323"), (Tokens{"q\u0323\u0307"}));
}

TEST(TokenizerTest, AlphabetsAreWords) {
  EXPECT_EQ(Tokenize("Éà"), (Tokens{"éà", "##éà", "#éà#"}));
  EXPECT_EQ(Tokenize("ДОМ"), (Tokens{"дом", "##до", "#дом", "#ом#"}));
  EXPECT_EQ(Tokenize("한국어"), (Tokens{"한국어", "##한국", "#한국어", "#국어#"}));
  EXPECT_EQ(Tokenize("я"), (Tokens{"я", "##я#"}));
  EXPECT_EQ(Words("हिन्दी पुस्तक"), (Tokens{"हिन्दी", "पुस्तक"})) << "marks belong to the word";
  EXPECT_EQ(Tokenize("𐐀a"), (Tokens{"𐐨a", "##𐐨a", "#𐐨a#"})) << "four-byte letters with case";
}

TEST(TokenizerTest, UnspacedScriptsAreCharacters) {
  EXPECT_EQ(Tokenize("手"), (Tokens{"手"}));
  EXPECT_EQ(Tokenize("手机壳"), (Tokens{"手", "机", "手机", "壳", "机壳"}));
  EXPECT_EQ(Tokenize("手 机"), (Tokens{"手", "机"})) << "no bigram across a separator";
  EXPECT_EQ(Tokenize("ひカ"), (Tokens{"ひ", "カ", "ひカ"}));
  EXPECT_EQ(Tokenize("กข"), (Tokens{"ก", "ข", "กข"}));
  // One of each block, the first and last of Han; U+323B0 is not yet assigned in Unicode 15.
  for (const char* character :
       {"\u0E01", "\u0E82", "\u1000", "\u1780", "\u2E80", "\u3005", "\u3007", "\u3021", "\u3031", "\u303C", "\u3041",
        "\u30FC", "\u3105", "\u31A0", "\u31F0", "\u3400", "\u4DBF", "\u4E00", "\u9FFF", "\uA9E0", "\uAA60", "\uFA0E",
        "\U0001B000", "\U00020000", "\U0002A6D6", "\U00030000", "\U000323B0"}) {
    EXPECT_EQ(Tokenize(character), (Tokens{character}));
  }
  EXPECT_EQ(Tokenize("カ・カ"), (Tokens{"カ", "カ"})) << "the middle dot separates";
}

TEST(TokenizerTest, RunsSplitWhereTheScriptChanges) {
  EXPECT_EQ(Words("iPhone手机case"), (Tokens{"iphone", "手", "机", "case"}));
  EXPECT_EQ(Tokenize("tv机").back(), "机");
}

TEST(TokenizerTest, MarksNeedSomethingBeforeThem) {
  EXPECT_EQ(Tokenize("\u0301"), Tokens{});
  EXPECT_EQ(Words("a \u0301b"), (Tokens{"a", "b"})) << "U+0020 U+0301 stays apart";
  EXPECT_EQ(Tokenize("\u0E34"), Tokens{}) << "a Thai vowel sign alone";
  EXPECT_EQ(Tokenize("กิ"), (Tokens{"ก", "\u0E34", "กิ"}));
}

TEST(TokenizerTest, WordBigrams) {
  TokenizerConfig config;
  config.word_bigrams = true;
  config.letter_trigrams = false;
  EXPECT_EQ(Tokenize("red,  running shoes", config),
            (Tokens{"red", "running", "red running", "shoes", "running shoes"}));
  EXPECT_EQ(Tokenize("RED　ÉTÉ", config), (Tokens{"red", "été", "red été"}));
  EXPECT_EQ(Tokenize("red 鞋 shoes", config), (Tokens{"red", "鞋", "shoes"})) << "unspaced text stands between them";
  config.word_unigrams = false;
  EXPECT_EQ(Tokenize("a b c", config), (Tokens{"a b", "b c"}));
}

TEST(TokenizerTest, EveryKindHasItsSwitch) {
  const TokenizerConfig none = {false, false, false, false, false, false, false};
  EXPECT_EQ(Tokenize("ab cd 手机", none), Tokens{});
  TokenizerConfig config = none;
  config.word_unigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"ab", "cd"}));
  config = none;
  config.word_bigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"ab cd"}));
  config = none;
  config.letter_trigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"##ab", "#ab#", "##cd", "#cd#"}));
  config = none;
  config.char_unigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"手", "机"}));
  config = none;
  config.char_bigrams = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"手机"}));
  config = none;
  config.markers = true;
  EXPECT_EQ(Tokenize("ab cd 手机", config), (Tokens{"<s>", "</s>"}));
}

TEST(TokenizerTest, InvalidBytesSeparate) {
  EXPECT_EQ(Words("a\xFF" "b"), (Tokens{"a", "b"}));
  EXPECT_EQ(Words("a\x80\x80" "b"), (Tokens{"a", "b"})) << "stray continuation bytes";
  EXPECT_EQ(Words("手\xE6\x89"), (Tokens{"手"})) << "cut short";
  EXPECT_EQ(Words("\xE6\x89手"), (Tokens{"手"}));
  EXPECT_EQ(Words("a\xC0\x80" "b"), (Tokens{"a", "b"})) << "overlong";
  EXPECT_EQ(Words("a\xED\xA0\x80" "b"), (Tokens{"a", "b"})) << "a surrogate";
  EXPECT_EQ(Words("a\xF4\x90\x80\x80" "b"), (Tokens{"a", "b"})) << "beyond U+10FFFF";
  EXPECT_EQ(Tokenize("手\xFF机"), (Tokens{"手", "机"})) << "no bigram across it";
}

TEST(TokenizerTest, AsciiPathEqualsUnicodePath) {
  std::mt19937 random(1);
  TokenizerConfig config;
  config.word_bigrams = true;
  constexpr std::string_view kNumbers = "0123456789.,/,,x";
  for (int round = 0; round < 4000; ++round) {
    std::string text;
    for (int i = 0; i < 40; ++i) {
      text += round % 2 == 0        ? kNumbers[random() % kNumbers.size()]
              : random() % 3 == 0 ? static_cast<char>(random() % 128)
                                  : static_cast<char>('A' + random() % 58);
    }
    config.markers = round % 3 == 0;
    ASSERT_EQ(Tokenize(text, config), Tokenize(text + "　", config)) << text;
  }
}

std::string ToUtf8(uint32_t c) {
  char utf8[4];
  return std::string(utf8, EncodeUtf8(c, utf8));
}

// The units of `text` by both ways to normalise it.
void ExpectSameNormalForm(const std::string& text, bool must_be_fast) {
  CharUnits fast, slow;
  size_t fast_size = 0;
  const bool is_fast = NormaliseFast(text, &fast, &fast_size);
  EXPECT_TRUE(is_fast || !must_be_fast) << text;
  if (!is_fast) return;
  const size_t slow_size = NormaliseSlow(text, &slow);
  ASSERT_EQ(std::vector<CharUnit>(fast.data(), fast.data() + fast_size),
            std::vector<CharUnit>(slow.data(), slow.data() + slow_size))
      << text;
}

TEST(NormaliseTest, EveryCodePointAlone) {
  for (uint32_t c = 1; c < 0x110000; ++c) {
    if (c < 0xD800 || c > 0xDFFF) ExpectSameNormalForm(ToUtf8(c), false);
  }
}

TEST(NormaliseTest, UsualTextIsFast) {
  ExpectSameNormalForm("Straße CAFÉ ½ ﬁne … 5″ 100℃ ™ дом ΣΊΣΥΦΟΣ 한국어 手机壳　ＡＢＣ ｱｲ ไทย 😀 \xFF \xE6\x89", true);
}

TEST(NormaliseTest, RandomTextFastAsSlow) {
  std::mt19937 random(5);
  // Where code points act on one another: accents, Hangul, Kana marks, Indic vowels, compatibility forms.
  constexpr uint32_t kBlocks[][2] = {{0x0, 0x24F},     {0x300, 0x36F},   {0x370, 0x3FF},   {0x900, 0xDFF},
                                     {0x1100, 0x11FF}, {0x1E00, 0x1FFF}, {0x2000, 0x21FF}, {0x3000, 0x33FF},
                                     {0xAC00, 0xADFF}, {0xF900, 0xFFEF}, {0x11100, 0x114FF}, {0x1F000, 0x1FAFF}};
  for (int round = 0; round < 200000; ++round) {
    std::string text;
    const size_t length = 1 + random() % 8;
    for (size_t i = 0; i < length; ++i) {
      const auto& block = kBlocks[random() % std::size(kBlocks)];
      text += ToUtf8(random() % 8 == 0 ? random() % 0xD800 : block[0] + random() % (block[1] - block[0] + 1));
      if (random() % 16 == 0) text += static_cast<char>(random());
    }
    ExpectSameNormalForm(text, false);
  }
}

TEST(NormaliseTest, DecodesAsUtf8procDoes) {
  std::mt19937 random(6);
  constexpr unsigned char kBytes[] = {0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2,
                                      0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xF8, 0xFF, 0xE6, 0x89};
  for (int round = 0; round < 200000; ++round) {
    std::string text;
    for (int i = 0; i < 6; ++i) text += static_cast<char>(kBytes[random() % std::size(kBytes)]);
    ExpectSameNormalForm(text, false);
  }
}

TEST(TokenizerTest, AnyBytesGiveValidTokens) {
  std::mt19937 random(2);
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    while (text.size() < 60) {
      utf8proc_uint8_t utf8[4];
      const auto c = static_cast<utf8proc_int32_t>(random() % (random() % 2 == 0 ? 0x110000 : 0x3100));
      text.append(reinterpret_cast<const char*>(utf8), static_cast<size_t>(utf8proc_encode_char(c, utf8)));
      if (random() % 4 == 0) text += static_cast<char>(random());
    }
    for (const std::string& token : Tokenize(text)) {
      ASSERT_FALSE(token.empty());
      const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(token.data());
      for (size_t i = 0; i < token.size();) {
        utf8proc_int32_t c;
        const utf8proc_ssize_t length =
            utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(token.size() - i), &c);
        ASSERT_GT(length, 0) << "invalid UTF-8 in a token of " << text;
        i += static_cast<size_t>(length);
      }
    }
  }
}

TEST(TokenizerTest, LongTexts) {
  const size_t megabyte = 1 << 20;
  EXPECT_EQ(Tokenize(std::string(megabyte, 'a')).size(), 1 + megabyte);
  std::string han, marks = "a", wide, dirty(megabyte, '\xFF');
  while (han.size() < megabyte) han += "手";
  EXPECT_EQ(Tokenize(han).size(), 2 * (han.size() / 3) - 1);
  // Alternating combining classes: quadratic where marks are ordered by exchanging neighbours.
  while (marks.size() < megabyte) marks += "\u0301\u0323";
  EXPECT_EQ(Words(marks).size(), 1u);
  while (wide.size() < megabyte) wide += "\uFDFA";  // expands to 18 code points
  EXPECT_EQ(Words(wide).size(), 3 * (wide.size() / 3) + 1);
  EXPECT_EQ(Tokenize(dirty), Tokens{});
}

TEST(TokenizerTest, ThreadsShareOne) {
  const Tokenizer tokenizer;
  const std::string texts[] = {"red running shoes", "iPhone手机壳 Straße", "a\xFF　b"};
  std::vector<std::thread> threads;
  for (const std::string& text : texts) {
    threads.emplace_back([&tokenizer, &text] {
      const Tokens expected = Tokenize(text);
      for (int i = 0; i < 200; ++i) {
        Tokens tokens;
        tokenizer.Tokenize(text, [&](std::string_view token) { tokens.emplace_back(token); });
        EXPECT_EQ(tokens, expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TokenizerConfigTest, TextForm) {
  EXPECT_EQ(TokenizerConfig().Serialize(),
            "tokenizer_version=1\nword_unigrams=1\nword_bigrams=0\nletter_trigrams=1\nchar_unigrams=1\n"
            "char_bigrams=1\nnumber_parts=1\nmarkers=0\n");
}

TEST(TokenizerConfigTest, RoundTripOfEveryConfig) {
  for (int bits = 0; bits < 128; ++bits) {
    const TokenizerConfig config = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
                                    (bits & 16) != 0, (bits & 32) != 0, (bits & 64) != 0};
    TokenizerConfig parsed;
    ASSERT_TRUE(IsOk(TokenizerConfig::Parse(config.Serialize(), &parsed)));
    EXPECT_EQ(parsed, config);
    EXPECT_EQ(config == TokenizerConfig(), bits == 61);
  }
}

TEST(TokenizerConfigTest, ParseNamesWhatIsWrong) {
  const std::string good = TokenizerConfig().Serialize();
  const auto message = [](const std::string& text) {
    TokenizerConfig config;
    config.word_bigrams = true;
    const TokenizerConfig before = config;
    const Status status = TokenizerConfig::Parse(text, &config);
    EXPECT_FALSE(status.ok()) << text;
    EXPECT_EQ(config, before) << "untouched on failure";
    return status.message();
  };
  EXPECT_TRUE(Contains(message(""), "empty text"));
  EXPECT_TRUE(Contains(message("word_unigrams=1\n"), "the first key is \"word_unigrams\", expected tokenizer_version"));
  EXPECT_TRUE(Contains(message("tokenizer_version=2\n"), "tokenizer_version is \"2\", this build has"));
  EXPECT_TRUE(Contains(message(good + "stem=1\n"), "unknown key \"stem\", expected one of word_unigrams"));
  EXPECT_TRUE(Contains(message(good + "word_bigrams=0\n"), "word_bigrams is given twice"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams=yes\n"), "word_bigrams is \"yes\", expected 0 or 1"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams\n"), "line \"word_bigrams\", expected key=value"));
  EXPECT_TRUE(Contains(message("tokenizer_version=1\nword_bigrams=1\n"), "key word_unigrams is missing"));
}

}  // namespace
}  // namespace dpsr
