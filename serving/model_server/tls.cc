#include "serving/model_server/tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>

#include <chrono>
#include <cstring>
#include <utility>

#include "serving/model_server/errors.h"
#include "serving/model_server/log.h"
#include "serving/model_server/server_config.h"
#include "serving/model_server/server_files.pb.h"
#include "tensorflow/core/platform/env.h"

namespace dpsr::serving {
namespace {

constexpr std::chrono::seconds kLookEvery(1);

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

// Without this, OpenSSL would ask for the password of an encrypted key on the terminal.
int NoPassword(char*, int, int, void*) { return -1; }

Bio Reader(const std::string& text) {
  return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), BIO_free);
}

// Returns an error with OpenSSL's reason for its last failure.
tensorflow::Status Refused(const std::string& what) {
  const char* reason = ERR_reason_error_string(ERR_peek_last_error());
  ERR_clear_error();
  return InvalidArgument(StrCat(what, reason == nullptr ? "" : StrCat(" (", reason, ")")));
}

// Calls `take` with each certificate of a PEM text; returns their number, or -1 if `take` returns false or a certificate
// is broken.
template <typename Take>
int ForEachCertificate(const std::string& text, Take take) {
  const Bio reader = Reader(text);
  int count = 0;
  for (;; ++count) {
    Certificate certificate(PEM_read_bio_X509(reader.get(), nullptr, NoPassword, nullptr), X509_free);
    if (certificate == nullptr) break;
    if (!take(certificate.get(), count)) return -1;
  }
  // This is how OpenSSL tells the end of the text from a broken certificate.
  if (ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE) return -1;
  ERR_clear_error();
  return count;
}

// `ours` is a string that outlives the context: the name of our protocol, after its length.
int ChooseProtocol(SSL*, const unsigned char** chosen, unsigned char* chosen_size, const unsigned char* offered,
                   unsigned int offered_size, void* ours) {
  const auto* const name = static_cast<const std::string*>(ours);
  unsigned char* protocol = nullptr;
  if (SSL_select_next_proto(&protocol, chosen_size, reinterpret_cast<const unsigned char*>(name->data()),
                            static_cast<unsigned int>(name->size()), offered, offered_size) != OPENSSL_NPN_NEGOTIATED) {
    return SSL_TLSEXT_ERR_ALERT_FATAL;
  }
  *chosen = protocol;
  return SSL_TLSEXT_ERR_OK;
}

tensorflow::Status MakeContext(const TlsConfig& config, const std::string& protocol, std::shared_ptr<SSL_CTX>* result) {
  ERR_clear_error();
  const std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  if (context == nullptr) return Refused("OpenSSL does not start");
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_options(context.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
  SSL_CTX_set_mode(context.get(), SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_alpn_select_cb(context.get(), ChooseProtocol, const_cast<std::string*>(&protocol));

  const int chain = ForEachCertificate(config.server_cert, [&](X509* certificate, int index) {
    if (index == 0) return SSL_CTX_use_certificate(context.get(), certificate) == 1;
    return SSL_CTX_add1_chain_cert(context.get(), certificate) == 1;
  });
  if (chain <= 0) return Refused("server_cert is not a PEM text of a certificate");
  const Bio reader = Reader(config.server_key);
  const Key key(PEM_read_bio_PrivateKey(reader.get(), nullptr, NoPassword, nullptr), EVP_PKEY_free);
  if (key == nullptr) return Refused("server_key is not a PEM text of a private key without a password");
  if (SSL_CTX_use_PrivateKey(context.get(), key.get()) != 1) {
    return Refused("server_key is not the key of server_cert");
  }
  if (config.client_verify) {
    if (config.custom_ca.empty()) {
      return InvalidArgument("client_verify needs custom_ca, the authorities that sign the certificates of clients");
    }
    SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    // Sessions that are resumed must belong to this context.
    constexpr unsigned char kSessions[] = "dpsr_model_server";
    SSL_CTX_set_session_id_context(context.get(), kSessions, sizeof(kSessions) - 1);
  }
  if (!config.custom_ca.empty()) {
    const int authorities = ForEachCertificate(config.custom_ca, [&](X509* certificate, int) {
      return X509_STORE_add_cert(SSL_CTX_get_cert_store(context.get()), certificate) == 1 &&
             SSL_CTX_add_client_CA(context.get(), certificate) == 1;
    });
    if (authorities <= 0) return Refused("custom_ca is not a PEM text of certificates");
  }
  *result = context;
  return tensorflow::OkStatus();
}

// Reads one key or certificate: the text of the message, or of the file that it names.
tensorflow::Status ReadPem(const char* field, const std::string& text, const std::string& file, std::string* pem) {
  *pem = text;
  if (file.empty()) return tensorflow::OkStatus();
  if (!text.empty()) return InvalidArgument(StrCat(field, " and ", field, "_file are both given; leave out one"));
  return tensorflow::ReadFileToString(tensorflow::Env::Default(), file, pem);
}

bool Same(const TlsConfig& left, const TlsConfig& right) {
  return left.server_key == right.server_key && left.server_cert == right.server_cert &&
         left.custom_ca == right.custom_ca && left.client_verify == right.client_verify;
}

// Reads the file and those that it names. If they say the same as `before`, which may be null, `state` becomes `before`.
tensorflow::Status ReadState(const std::string& flag, const std::string& path, const std::string& protocol,
                             const std::shared_ptr<const TlsState>& before, std::shared_ptr<const TlsState>* state) {
  SSLConfig file;
  TF_RETURN_IF_ERROR(ReadTextProto(path, &file));
  auto read = std::make_shared<TlsState>();
  TlsConfig& config = read->config;
  config.client_verify = file.client_verify();
  tensorflow::Status status = ReadPem("server_key", file.server_key(), file.server_key_file(), &config.server_key);
  if (status.ok()) status = ReadPem("server_cert", file.server_cert(), file.server_cert_file(), &config.server_cert);
  if (status.ok()) status = ReadPem("custom_ca", file.custom_ca(), file.custom_ca_file(), &config.custom_ca);
  if (status.ok() && before != nullptr && Same(config, before->config)) {
    *state = before;
    return status;
  }
  if (status.ok()) status = MakeContext(config, protocol, &read->context);
  if (status.ok() && before != nullptr && config.client_verify != before->config.client_verify) {
    status = InvalidArgument("client_verify has changed; restart the server");
  }
  if (!status.ok()) {
    return tensorflow::Status(status.code(), StrCat(flag, "=", path, ": ", std::string(status.message())));
  }
  *state = std::move(read);
  return status;
}

}  // namespace

tensorflow::Status TlsFile::Open(const std::string& flag, const std::string& path, const std::string& protocol,
                                 std::shared_ptr<TlsFile>* file) {
  std::shared_ptr<TlsFile> opened(new TlsFile(flag, path, protocol));
  TF_RETURN_IF_ERROR(ReadState(flag, path, opened->protocol_, nullptr, &opened->state_));
  opened->thread_ = std::thread([raw = opened.get()] { raw->Watch(); });
  *file = std::move(opened);
  return tensorflow::OkStatus();
}

TlsFile::TlsFile(std::string flag, std::string path, const std::string& protocol)
    : flag_(std::move(flag)), path_(std::move(path)), protocol_(static_cast<char>(protocol.size()) + protocol) {}

TlsFile::~TlsFile() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<const TlsState> TlsFile::Current() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return state_;
}

void TlsFile::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_.wait_for(lock, kLookEvery, [this] { return stopping_; })) {
    lock.unlock();
    ReadAgain();
    lock.lock();
  }
}

void TlsFile::ReadAgain() {
  const std::shared_ptr<const TlsState> before = Current();
  std::shared_ptr<const TlsState> state;
  const tensorflow::Status status = ReadState(flag_, path_, protocol_, before, &state);
  const std::string problem(status.message());
  if (problem != problem_) {
    problem_ = problem;
    logged_ = false;
  } else if (!problem.empty() && !logged_) {
    LogWarning("the certificates were not renewed, and the old ones stay in use: ", problem);
    logged_ = true;
  }
  if (!status.ok() || state == before) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    state_ = state;
  }
  LogInfo("new connections use the renewed certificates of ", path_);
}

}  // namespace dpsr::serving
