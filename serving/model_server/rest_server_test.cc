#include "serving/model_server/rest_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

// Null unless the program has the address sanitizer.
extern "C" __attribute__((weak)) void __asan_init();

namespace dpsr::serving {
namespace {

// A server without models: what stands before them, HTTP and the paths, is what counts here.
class RestServerTest : public testing::Test {
 protected:
  void SetUp() override { StartServer(); }

  void StartServer(uint64_t max_body_bytes = 1 << 16) {
    RestServerOptions options;
    options.host = "127.0.0.1";
    options.max_body_bytes = max_body_bytes;
    ASSERT_TRUE(RestServer::Start(options, &api_, &workers_, &log_, &server_).ok());
  }

  // A new connection to the server.
  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(server_->port()));
    EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }

  // All that the server sends until it closes the connection; the client sends `bytes`, and then no more.
  std::string Ask(const std::string& bytes, size_t piece = std::string::npos) {
    const int fd = Connect();
    for (size_t begin = 0; begin < bytes.size(); begin += std::min(piece, bytes.size())) {
      const size_t size = std::min(piece, bytes.size() - begin);
      if (send(fd, bytes.data() + begin, size, MSG_NOSIGNAL) < 0) break;  // refused before its end
    }
    shutdown(fd, SHUT_WR);
    std::string answer;
    char buffer[4096];
    for (ssize_t size; (size = read(fd, buffer, sizeof(buffer))) > 0;) answer.append(buffer, size);
    close(fd);
    return answer;
  }

  static std::string Post(const std::string& body, const std::string& extra = "") {
    return "POST /v1/models/m:predict HTTP/1.1\r\nHost: h\r\n" + extra +
           "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }

  ModelManager models_{{}};
  RequestHandler handler_{&models_};
  WorkerPool workers_{2};
  RequestLog log_{std::chrono::milliseconds(0)};
  RestApi api_{&handler_, {&workers_}, "/metrics"};
  std::unique_ptr<RestServer> server_;
};

constexpr char kHealth[] = "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n";
constexpr char kLast[] = "GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST_F(RestServerTest, AnswersOneAfterTheOther) {
  std::string requests;
  for (int i = 0; i < 20; ++i) requests += kHealth + Post("{}");
  for (const size_t piece : {std::string::npos, size_t{7}, size_t{1}}) {
    const std::string answers = Ask(requests + kLast, piece);
    EXPECT_EQ(Count(answers, "HTTP/1.1 200 OK"), 20u);
    EXPECT_EQ(Count(answers, "HTTP/1.1 503 "), 20u);  // no model is there yet
    EXPECT_EQ(answers.substr(answers.size() - 32), "{\"error\":\"Not found: GET /last\"}") << answers;
  }
}

TEST_F(RestServerTest, RefusesWhatIsTooLargeOrNoHttp) {
  EXPECT_EQ(Ask(Post(std::string(1 << 20, 'x'))).substr(0, 13), "HTTP/1.1 413 ");
  EXPECT_EQ(Ask(Post(std::string(1 << 20, 'x'), "Transfer-Encoding: chunked\r\n")).substr(0, 13), "HTTP/1.1 400 ");
  for (const std::string text : {"\x16\x03\x01\r\n\r\n", "GET /healthz\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}) {
    EXPECT_EQ(Ask(text).substr(0, 13), "HTTP/1.1 400 ");
  }
  EXPECT_EQ(Ask(""), "");
}

TEST_F(RestServerTest, MutatedRequestsNeverEndIt) {
  const std::vector<std::string> seeds = {
      kHealth + Post("{\"instances\": [1]}"),
      "POST /v1/models/m/versions/12:predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
      "5\r\n{\"a\":\r\n2\r\n1}\r\n0\r\n\r\n",
      Post("{}", "Expect: 100-continue\r\n") + "HEAD /v1/models/m/labels/l/metadata HTTP/1.0\r\n\r\n"};
  std::mt19937 random(1);
  for (int i = 0; i < 1500; ++i) {
    std::string bytes = seeds[random() % seeds.size()];
    for (int changes = 1 + random() % 4; changes > 0; --changes) {
      const size_t at = random() % bytes.size();
      switch (random() % 3) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + random() % 8);
          bytes += ' ';
          break;
        default:
          bytes.insert(at, bytes, random() % bytes.size(), random() % 32);
      }
    }
    const std::string answer = Ask(bytes);
    EXPECT_TRUE(answer.empty() || answer.substr(0, 7) == "HTTP/1.") << answer;
  }
  EXPECT_EQ(Ask(kHealth).substr(0, 15), "HTTP/1.1 200 OK");
}

// A body that is announced may be larger than the memory that there is. The sanitizer would end the process itself.
TEST_F(RestServerTest, MemoryThatIsNotThereEndsOnlyItsConnection) {
  if (&__asan_init != nullptr) GTEST_SKIP();
  server_.reset();
  StartServer(std::numeric_limits<uint64_t>::max());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(Ask("POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: 4000000000000000000\r\n\r\n{"), "");
    EXPECT_EQ(Ask(Post("{}", "Connection: close\r\n")).substr(0, 13), "HTTP/1.1 503 ");
  }
  server_->Shutdown(std::chrono::seconds(10));
}

// A worker may still hold the request that it has answered when the last answer is out and the server ends.
TEST_F(RestServerTest, EndsWhileWorkersLetGoOfTheirRequests) {
  for (int i = 0; i < 200; ++i) {
    EXPECT_EQ(Ask(Post("{}", "Connection: close\r\n")).substr(0, 13), "HTTP/1.1 503 ");
    server_->Shutdown(std::chrono::seconds(10));
    server_.reset();
    StartServer();
  }
}

// The client asks until its socket takes no more for a second: the server then waits for it to read.
TEST_F(RestServerTest, EndsAlthoughAClientDoesNotReadItsAnswers) {
  const int fd = Connect();
  const timeval second{1, 0};
  ASSERT_EQ(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &second, sizeof(second)), 0);
  std::string requests;
  for (int i = 0; i < 1000; ++i) requests += "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n";
  while (send(fd, requests.data(), requests.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(requests.size())) continue;
  const auto begin = std::chrono::steady_clock::now();
  server_->Shutdown(std::chrono::milliseconds(0));
  server_.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
  close(fd);
}

}  // namespace
}  // namespace dpsr::serving
