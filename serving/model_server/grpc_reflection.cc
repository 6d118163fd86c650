#include "serving/model_server/grpc_reflection.h"

#include <memory>
#include <set>
#include <string_view>
#include <utility>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "serving/dpsr_serving/reflection.pb.h"

namespace dpsr::serving {
namespace {

namespace v1 = ::grpc::reflection::v1;
using google::protobuf::Descriptor;
using google::protobuf::DescriptorPool;
using google::protobuf::FileDescriptor;
using google::protobuf::FileDescriptorProto;

constexpr char kV1[] = "grpc.reflection.v1";
constexpr char kV1Alpha[] = "grpc.reflection.v1alpha";
constexpr char kService[] = "ServerReflection";
constexpr char kMethod[] = "ServerReflectionInfo";
constexpr int kNotFound = 5;

// Returns the program's descriptors, and those of the package v1alpha, which are made of v1's.
const DescriptorPool& Descriptors() {
  static const auto* const pool = [] {
    auto* made = new DescriptorPool(DescriptorPool::generated_pool());
    FileDescriptorProto file;
    v1::ServerReflectionRequest::descriptor()->file()->CopyTo(&file);
    const std::string old = std::string(".") + kV1 + ".";
    const auto rename = [&old](std::string* type) {
      if (type->rfind(old, 0) == 0) *type = std::string(".") + kV1Alpha + "." + type->substr(old.size());
    };
    file.set_name("grpc/reflection/v1alpha/reflection.proto");
    file.set_package(kV1Alpha);
    for (auto& message : *file.mutable_message_type()) {
      for (auto& field : *message.mutable_field()) rename(field.mutable_type_name());
    }
    for (auto& method : *file.mutable_service(0)->mutable_method()) {
      rename(method.mutable_input_type());
      rename(method.mutable_output_type());
    }
    made->BuildFile(file);
    return made;
  }();
  return *pool;
}

// Adds a file after all that it imports, so that a tool need not ask for each.
void AddFile(const FileDescriptor& file, std::set<std::string>* added, v1::FileDescriptorResponse* response) {
  if (!added->insert(file.name()).second) return;
  for (int i = 0; i < file.dependency_count(); ++i) AddFile(*file.dependency(i), added, response);
  FileDescriptorProto proto;
  file.CopyTo(&proto);
  response->add_file_descriptor_proto(proto.SerializeAsString());
}

bool AddExtensions(const Descriptor* type, v1::ExtensionNumberResponse* response) {
  if (type == nullptr) return false;
  std::vector<const google::protobuf::FieldDescriptor*> extensions;
  Descriptors().FindAllExtensions(type, &extensions);
  response->set_base_type_name(type->full_name());
  for (const auto* extension : extensions) response->add_extension_number(extension->number());
  return true;
}

// Answers one request. Returns false if what it asks for is not there.
bool LookUp(const v1::ServerReflectionRequest& request, v1::ServerReflectionResponse* response) {
  const DescriptorPool& pool = Descriptors();
  const FileDescriptor* file = nullptr;
  switch (request.message_request_case()) {
    case v1::ServerReflectionRequest::kFileByFilename:
      file = pool.FindFileByName(request.file_by_filename());
      break;
    case v1::ServerReflectionRequest::kFileContainingSymbol:
      file = pool.FindFileContainingSymbol(request.file_containing_symbol());
      break;
    case v1::ServerReflectionRequest::kFileContainingExtension: {
      const v1::ExtensionRequest& wanted = request.file_containing_extension();
      const Descriptor* const type = pool.FindMessageTypeByName(wanted.containing_type());
      const auto* const extension =
          type == nullptr ? nullptr : pool.FindExtensionByNumber(type, wanted.extension_number());
      if (extension != nullptr) file = extension->file();
      break;
    }
    case v1::ServerReflectionRequest::kAllExtensionNumbersOfType:
      return AddExtensions(pool.FindMessageTypeByName(request.all_extension_numbers_of_type()),
                           response->mutable_all_extension_numbers_response());
    default:
      return false;
  }
  if (file == nullptr) return false;
  std::set<std::string> added;
  AddFile(*file, &added, response->mutable_file_descriptor_response());
  return true;
}

std::string Answer(const v1::ServerReflectionRequest& request, const std::vector<std::string>& services) {
  v1::ServerReflectionResponse response;
  response.set_valid_host(request.host());
  *response.mutable_original_request() = request;
  if (request.has_list_services()) {
    for (const std::string& name : services) response.mutable_list_services_response()->add_service()->set_name(name);
  } else if (!LookUp(request, &response)) {
    response.mutable_error_response()->set_error_code(kNotFound);
    response.mutable_error_response()->set_error_message("the server does not have it");
  }
  return response.SerializeAsString();
}

}  // namespace

void AddReflection(std::vector<std::string> services, std::unordered_map<std::string, Method>* methods) {
  for (const char* package : {kV1, kV1Alpha}) services.push_back(std::string(package) + "." + kService);
  const auto shared = std::make_shared<const std::vector<std::string>>(std::move(services));
  const auto begin = [shared](const std::shared_ptr<Call>& call) {
    Call* const raw = call.get();
    call->on_message = [raw, shared](std::string_view message) {
      v1::ServerReflectionRequest request;
      if (request.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
        raw->Write(Answer(request, *shared));
      } else {
        raw->Finish(kGrpcInternal, "the message is not a ServerReflectionRequest", {}, {});
      }
    };
    call->on_end = [raw](bool cancelled) {
      if (!cancelled) raw->Finish(0, "", {}, {});
    };
  };
  for (const char* package : {kV1, kV1Alpha}) {
    methods->emplace(std::string("/") + package + "." + kService + "/" + kMethod, Method{MethodKind::kStreaming, begin});
  }
}

}  // namespace dpsr::serving
