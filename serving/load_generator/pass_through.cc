// The smallest proxy on gRPC's C++ library: it forwards unary calls as bytes, with their deadline and metadata.
// benchmarks/proxy.py compares our proxy with it.
//
//   dpsr_pass_through HOST:PORT
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <memory>
#include <string>

namespace dpsr::serving {
namespace {

// Forwards one call and deletes itself.
class Forward : public grpc::ServerGenericBidiReactor {
 public:
  Forward(grpc::GenericStub* stub, grpc::GenericCallbackServerContext* server) : stub_(stub), server_(server) {
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status(grpc::StatusCode::INTERNAL, "the call has no message"));
      return;
    }
    client_.set_deadline(server_->deadline());
    for (const auto& entry : server_->client_metadata()) {
      const std::string name(entry.first.data(), entry.first.size());
      if (name != "user-agent") client_.AddMetadata(name, std::string(entry.second.data(), entry.second.size()));
    }
    stub_->UnaryCall(&client_, server_->method(), {}, &request_, &response_, [this](grpc::Status status) {
      if (status.ok()) {
        StartWriteAndFinish(&response_, grpc::WriteOptions(), status);
      } else {
        Finish(status);
      }
    });
  }

  void OnCancel() override { client_.TryCancel(); }
  void OnDone() override { delete this; }

 private:
  grpc::GenericStub* const stub_;
  grpc::GenericCallbackServerContext* const server_;
  grpc::ClientContext client_;
  grpc::ByteBuffer request_, response_;
};

class Service : public grpc::CallbackGenericService {
 public:
  explicit Service(const std::string& target)
      : stub_(grpc::CreateChannel(target, grpc::InsecureChannelCredentials())) {}

  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override {
    return new Forward(&stub_, context);
  }

 private:
  grpc::GenericStub stub_;
};

int Main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: dpsr_pass_through HOST:PORT\n");
    return 2;
  }
  Service service(argv[1]);
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    std::fprintf(stderr, "dpsr_pass_through: cannot listen\n");
    return 1;
  }
  std::printf("pass-through on 127.0.0.1:%d\n", port);
  std::fflush(stdout);
  server->Wait();
  return 0;
}

}  // namespace
}  // namespace dpsr::serving

int main(int argc, char** argv) { return dpsr::serving::Main(argc, argv); }
