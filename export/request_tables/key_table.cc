#include "export/request_tables/key_table.h"

#include <algorithm>
#include <cstring>

namespace dpsr {
namespace {

constexpr uint64_t kBlake2bStart[8] = {0x6a09e667f3bcc908ULL, 0xbb67ae8584caa73bULL, 0x3c6ef372fe94f82bULL,
                                       0xa54ff53a5f1d36f1ULL, 0x510e527fade682d1ULL, 0x9b05688c2b3e6c1fULL,
                                       0x1f83d9abfb41bd6bULL, 0x5be0cd19137e2179ULL};
constexpr uint8_t kBlake2bOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                           {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                           {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                           {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                           {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                           {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                           {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                           {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                           {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                           {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
constexpr size_t kBlake2bBlock = 128;
constexpr int kBlake2bRounds = 12;

uint64_t RotateRight(uint64_t x, int bits) { return (x >> bits) | (x << (64 - bits)); }

void Blake2bMix(uint64_t* v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
  v[a] += v[b] + x;
  v[d] = RotateRight(v[d] ^ v[a], 32);
  v[c] += v[d];
  v[b] = RotateRight(v[b] ^ v[c], 24);
  v[a] += v[b] + y;
  v[d] = RotateRight(v[d] ^ v[a], 16);
  v[c] += v[d];
  v[b] = RotateRight(v[b] ^ v[c], 63);
}

void Blake2bCompress(uint64_t* h, const uint8_t* block, uint64_t bytes_so_far, bool last) {
  uint64_t m[16];
  std::memcpy(m, block, sizeof(m));  // little endian, as are packed files
  uint64_t v[16];
  std::copy_n(h, 8, v);
  std::copy_n(kBlake2bStart, 8, v + 8);
  v[12] ^= bytes_so_far;
  if (last) v[14] = ~v[14];
  for (int round = 0; round < kBlake2bRounds; ++round) {
    const uint8_t* s = kBlake2bOrder[round % 10];
    Blake2bMix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
    Blake2bMix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
    Blake2bMix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
    Blake2bMix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
    Blake2bMix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
    Blake2bMix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
    Blake2bMix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
    Blake2bMix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
}

// The code points that Unicode calls white space, and the separators U+001C to U+001F, as UTF-8.
constexpr std::string_view kWhiteSpace[] = {
    "\t",           "\n",           "\v",           "\f",           "\r",           "\x1c",         "\x1d",
    "\x1e",         "\x1f",         " ",            "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80",
    "\xe2\x80\x81", "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86", "\xe2\x80\x87",
    "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f",
    "\xe3\x80\x80"};

// Returns whether white space can begin or end with this byte. Most text does not need a closer look.
bool MayBeWhiteSpace(char c) {
  return static_cast<unsigned char>(c) <= ' ' || static_cast<unsigned char>(c) >= 0x80;
}

}  // namespace

int64_t KeyId(std::string_view key) {
  constexpr uint64_t kDigestBytes = 8;
  uint64_t h[8];
  std::copy_n(kBlake2bStart, 8, h);
  h[0] ^= 0x01010000 ^ kDigestBytes;
  const uint8_t* data = reinterpret_cast<const uint8_t*>(key.data());
  size_t done = 0;
  for (; key.size() - done > kBlake2bBlock; done += kBlake2bBlock) {
    Blake2bCompress(h, data + done, done + kBlake2bBlock, /*last=*/false);
  }
  uint8_t rest[kBlake2bBlock] = {};
  if (key.size() > done) std::memcpy(rest, data + done, key.size() - done);
  Blake2bCompress(h, rest, key.size(), /*last=*/true);
  return static_cast<int64_t>(__builtin_bswap64(h[0]) & 0x7fffffffffffffffULL);
}

std::string_view Trimmed(std::string_view text) {
  for (bool found = true; found && !text.empty() && MayBeWhiteSpace(text.front());) {
    found = false;
    for (const std::string_view space : kWhiteSpace) {
      if (text.substr(0, space.size()) != space) continue;
      text.remove_prefix(space.size());
      found = true;
      break;
    }
  }
  for (bool found = true; found && !text.empty() && MayBeWhiteSpace(text.back());) {
    found = false;
    for (const std::string_view space : kWhiteSpace) {
      if (text.size() < space.size() || text.substr(text.size() - space.size()) != space) continue;
      text.remove_suffix(space.size());
      found = true;
      break;
    }
  }
  return text;
}

Status KeyTable::Open(const std::string& path, std::unique_ptr<KeyTable>* table) {
  std::unique_ptr<KeyTable> t(new KeyTable);
  DPSR_RETURN_IF_ERROR(PackedFile::Open(path, "", /*verify=*/false, &t->file_));
  const SectionReader reader(*t->file_);
  DPSR_RETURN_IF_ERROR(reader.Array("key.bytes", SectionReader::kAnyLength, &t->bytes_));
  DPSR_RETURN_IF_ERROR(reader.Splits("key.splits", SectionReader::kAnyLength, static_cast<int64_t>(t->bytes_.size()),
                                     &t->splits_));
  const int64_t keys = static_cast<int64_t>(t->splits_.size()) - 1;
  DPSR_RETURN_IF_ERROR(t->index_.Open(reader, keys));
  if (reader.Has("code")) DPSR_RETURN_IF_ERROR(reader.Array("code", keys, &t->codes_));
  *table = std::move(t);
  return Status();
}

int32_t KeyTable::Find(std::string_view text) const {
  const int32_t row = FindId(KeyId(text));
  return row >= 0 && key(row) == text ? row : -1;
}

std::string_view KeyTable::key(int32_t row) const {
  return {reinterpret_cast<const char*>(bytes_.data()) + splits_[row],
          static_cast<size_t>(splits_[row + 1] - splits_[row])};
}

}  // namespace dpsr
