// Runs a fuzz target for some seconds without libFuzzer, first on its seeds and then on mutations of them. Every run is
// the same. Sanitizers end the program at the first fault.
//
//   x_fuzz_replay SEED_FOLDER RUNS
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// TensorFlow's libraries are not built with sanitizers, and never free what they register.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace {

using Random = std::mt19937_64;

constexpr size_t kMaxBytes = 4096;

size_t Below(size_t n, Random* random) { return (*random)() % n; }

// Makes one small change: to a bit, a byte or a number, or to a part, which is removed, doubled, or copied from
// `other`.
void Mutate(const std::string& other, Random* random, std::string* text) {
  const size_t at = Below(text->size() + 1, random);
  const size_t count = 1 + Below(8, random);
  switch (text->empty() ? 4 : Below(7, random)) {
    case 0:
      (*text)[at % text->size()] ^= static_cast<char>(1 << Below(8, random));
      break;
    case 1:
      (*text)[at % text->size()] = static_cast<char>(Below(256, random));
      break;
    case 2:
      text->erase(at, count);
      break;
    case 3:
      text->insert(at, text->substr(at, count));
      break;
    case 4:
      text->insert(at, count, static_cast<char>(Below(256, random)));
      break;
    case 5:
      text->insert(at, std::to_string(static_cast<int64_t>((*random)()) >> Below(64, random)));
      break;
    default:
      text->replace(at, count, other, Below(other.size() + 1, random), Below(64, random));
  }
  text->resize(std::min(text->size(), kMaxBytes));
}

void Run(const std::string& text) {
  // The copy has no spare memory at its end, so that sanitizers notice reads beyond it.
  const std::vector<uint8_t> bytes(text.begin(), text.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SEED_FOLDER RUNS\n", argv[0]);
    return 2;
  }
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> seeds;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    Run(seeds.back());
  }
  if (seeds.empty()) {
    std::fprintf(stderr, "no seeds in %s\n", argv[1]);
    return 1;
  }
  Random random(1);
  const int runs = std::atoi(argv[2]);
  for (int i = 0; i < runs; ++i) {
    std::string text = seeds[Below(seeds.size(), &random)];
    for (size_t changes = 1 + Below(6, &random); changes > 0; --changes) {
      Mutate(seeds[Below(seeds.size(), &random)], &random, &text);
    }
    Run(text);
  }
  std::printf("%zu seeds and %d mutations\n", seeds.size(), runs);
  return 0;
}
