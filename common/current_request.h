// Lets an op ask whether the request that it computes is over: its client has cancelled it, or its deadline has passed.
// TensorFlow tells ops so only if the graph runs on its own threads. The model server runs it in the request's thread.
#ifndef DPSR_COMMON_CURRENT_REQUEST_H_
#define DPSR_COMMON_CURRENT_REQUEST_H_

extern "C" {

struct DpsrRequest {
  bool (*is_over)(const void* state);  // thread-safe
  const void* state;
};

// Returns the request that the calling thread computes, or null. It lives until its op returns. Only the model server
// defines this function; in other programs its address is null.
__attribute__((weak, visibility("default"))) const DpsrRequest* DpsrCurrentRequest();

}  // extern "C"

#endif  // DPSR_COMMON_CURRENT_REQUEST_H_
