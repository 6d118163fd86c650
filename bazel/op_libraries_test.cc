// Checks that TensorFlow knows the ops of DPSR, each with a kernel for the CPU. Compiled as two programs:
//   op_libraries_test   loads the op libraries that its arguments name, as tf.load_op_library and our server do;
//   linked_ops_test     gets no arguments, and links the ops, as a TensorFlow Serving build would.
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "tensorflow/c/c_api.h"
#include "tensorflow/core/framework/kernel_def.pb.h"
#include "tensorflow/core/framework/op_def.pb.h"

namespace {

using Names = std::set<std::string>;

std::vector<std::string> g_libraries;

using StatusPtr = std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)>;
using BufferPtr = std::unique_ptr<TF_Buffer, decltype(&TF_DeleteBuffer)>;

// The names of DPSR's ops in TensorFlow's registry.
Names RegisteredOps() {
  const BufferPtr buffer(TF_GetAllOpList(), &TF_DeleteBuffer);
  tensorflow::OpList list;
  EXPECT_TRUE(list.ParseFromArray(buffer->data, static_cast<int>(buffer->length)));
  Names names;
  for (const tensorflow::OpDef& op : list.op()) {
    if (op.name().rfind("Dpsr", 0) == 0) names.insert(op.name());
  }
  return names;
}

// The devices for which `op` has kernels.
Names KernelDevices(const std::string& op) {
  const StatusPtr status(TF_NewStatus(), &TF_DeleteStatus);
  const BufferPtr buffer(TF_GetRegisteredKernelsForOp(op.c_str(), status.get()), &TF_DeleteBuffer);
  EXPECT_EQ(TF_GetCode(status.get()), TF_OK) << TF_Message(status.get());
  tensorflow::KernelList list;
  EXPECT_TRUE(list.ParseFromArray(buffer->data, static_cast<int>(buffer->length)));
  Names devices;
  for (const tensorflow::KernelDef& kernel : list.kernel()) devices.insert(kernel.device_type());
  return devices;
}

TEST(OpLibrariesTest, EveryOpIsRegisteredWithItsKernel) {
  if (!g_libraries.empty()) {
    ASSERT_EQ(RegisteredOps(), Names()) << "before any library is loaded";
  }
  for (const std::string& library : g_libraries) {
    const StatusPtr status(TF_NewStatus(), &TF_DeleteStatus);
    TF_Library* handle = TF_LoadLibrary(library.c_str(), status.get());
    ASSERT_EQ(TF_GetCode(status.get()), TF_OK) << library << ": " << TF_Message(status.get());
    TF_DeleteLibraryHandle(handle);  // the library itself stays
  }
  const Names ops = RegisteredOps();
  // One of each library; a list of all would only repeat the registrations.
  for (const char* op : {"DpsrTokenize", "DpsrExamplesDataset", "DpsrFaissSearch"}) EXPECT_EQ(ops.count(op), 1U) << op;
  for (const std::string& op : ops) EXPECT_EQ(KernelDevices(op), Names({"CPU"})) << op;
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  g_libraries.assign(argv + 1, argv + argc);
  return RUN_ALL_TESTS();
}
