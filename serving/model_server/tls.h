// Keys and certificates of the server. The files that hold them are read again when they change, so that certificates
// are renewed without a restart.
#ifndef DPSR_SERVING_MODEL_SERVER_TLS_H_
#define DPSR_SERVING_MODEL_SERVER_TLS_H_

#include <openssl/types.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// The content of an SSLConfig; keys and certificates are PEM texts.
struct TlsConfig {
  std::string server_key;
  std::string server_cert;     // and the authorities between it and a root, if any
  std::string custom_ca;       // the authorities that sign the certificates of clients; may be empty
  bool client_verify = false;  // whether clients must show a certificate
};

// A configuration that has been checked: the key is that of the certificate.
struct TlsState {
  TlsConfig config;
  // The same for OpenSSL: TLS 1.2 at least, and the server's protocol by ALPN.
  std::shared_ptr<SSL_CTX> context;
};

// An SSLConfig file. A thread looks every second whether it, or a file that it names, has changed. Thread-safe.
class TlsFile {
 public:
  // Reads the file at `path`, an SSLConfig in text format. `flag` names it in errors. `protocol` is ALPN's name of what
  // the server speaks, such as "h2"; clients that offer others only are refused. INVALID_ARGUMENT: not an SSLConfig, or
  // OpenSSL does not accept its key and certificates; other codes: a file cannot be read.
  static tensorflow::Status Open(const std::string& flag, const std::string& path, const std::string& protocol,
                                 std::shared_ptr<TlsFile>* file);
  ~TlsFile();
  TlsFile(const TlsFile&) = delete;
  TlsFile& operator=(const TlsFile&) = delete;

  // Returns what new connections are to use: the last content of the files that was correct. Another content is
  // another object. Never null.
  std::shared_ptr<const TlsState> Current() const;

 private:
  TlsFile(std::string flag, std::string path, const std::string& protocol);
  void Watch();
  void ReadAgain();

  const std::string flag_;
  const std::string path_;
  const std::string protocol_;  // after its length, as TLS has it; contexts refer to it
  // Of Watch only. A change is logged as refused when it is met a second time, because key and certificate may be
  // replaced one after the other.
  std::string problem_;
  bool logged_ = false;

  mutable std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::shared_ptr<const TlsState> state_;
  std::thread thread_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_TLS_H_
