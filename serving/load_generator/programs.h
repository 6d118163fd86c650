// What the two measuring programs share: how they fail, count CPU time, and read requests.
#ifndef DPSR_SERVING_LOAD_GENERATOR_PROGRAMS_H_
#define DPSR_SERVING_LOAD_GENERATOR_PROGRAMS_H_

#include <errno.h>
#include <sys/resource.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "google/protobuf/io/coded_stream.h"

namespace dpsr::serving {

// Ends the program with status 2 and one line on standard error.
[[noreturn]] inline void Fail(const std::string& error) {
  std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, error.c_str());
  std::exit(2);
}

// User and system time of this process so far.
inline double OwnCpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

// Reads a file of serialized requests, each after its size as a varint. Fails if it cannot be read or has none.
inline std::vector<std::string> ReadRequestsFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail("cannot read " + path);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  google::protobuf::io::CodedInputStream input(reinterpret_cast<const uint8_t*>(bytes.data()),
                                               static_cast<int>(bytes.size()));
  std::vector<std::string> requests;
  uint32_t size;
  while (input.ReadVarint32(&size)) {
    requests.emplace_back();
    if (!input.ReadString(&requests.back(), static_cast<int>(size))) Fail(path + " ends within a request");
  }
  if (requests.empty()) Fail(path + " holds no request");
  return requests;
}

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_LOAD_GENERATOR_PROGRAMS_H_
