// gRPC's reflection service, by which tools such as grpcurl learn the methods and messages of a server.
#ifndef DPSR_SERVING_MODEL_SERVER_GRPC_REFLECTION_H_
#define DPSR_SERVING_MODEL_SERVER_GRPC_REFLECTION_H_

#include <string>
#include <unordered_map>
#include <vector>

#include "serving/wire/call_server.h"

namespace dpsr::serving {

// Adds the method of the reflection service, in its packages v1 and v1alpha, which have the same messages. `services` are
// the full names of the other services; their descriptors are linked into the program.
void AddReflection(std::vector<std::string> services, std::unordered_map<std::string, Method>* methods);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_GRPC_REFLECTION_H_
