#ifndef DPSR_SERVING_MODEL_SERVER_PRIORITY_H_
#define DPSR_SERVING_MODEL_SERVER_PRIORITY_H_

#include <unistd.h>

namespace dpsr::serving {

// Lowers the priority of the calling thread (Linux gives each thread a niceness of its own), so that requests go first if
// there are few processors. Threads that it starts have that priority too. It must never hold a lock that requests need.
inline void LowerThreadPriority() { static_cast<void>(nice(10)); }

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_PRIORITY_H_
