// The Python module dpsr_serving._native, which adapts the sessions of the wire. _native.pyi has its types. Python calls
// it a few times for each read or write of a socket and once to answer or make a call, never for a single frame.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/pybind_status.h"
#include "serving/lists/lists_pybind.h"
#include "serving/wire/message_fields.h"
#include "serving/wire/session.h"

namespace py = pybind11;

namespace dpsr::serving {
namespace {

// What the connections of a server share: the methods that it has, and the bytes that it may hold.
struct Host {
  Methods methods;
  Budget budget;
};

py::bytes ToBytes(std::string_view text) { return py::bytes(text.data(), text.size()); }

std::string_view ToView(const py::handle& bytes) {
  char* data = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
  return std::string_view(data, static_cast<size_t>(size));
}

py::tuple ToPairs(const std::vector<Header>& headers) {
  py::tuple pairs(headers.size());
  for (size_t i = 0; i < headers.size(); ++i) {
    pairs[i] = py::make_tuple(ToBytes(headers[i].name), ToBytes(headers[i].value));
  }
  return pairs;
}

std::vector<Header> FromPairs(const py::tuple& pairs) {
  std::vector<Header> headers;
  headers.reserve(pairs.size());
  for (const py::handle pair : pairs) {
    const auto items = py::reinterpret_borrow<py::tuple>(pair);
    headers.push_back({std::string(ToView(items[0])), std::string(ToView(items[1]))});
  }
  return headers;
}

// The message keeps the bytes object alive instead of copying it.
Message FromBytes(const py::bytes& bytes) {
  const std::string_view view = ToView(bytes);
  return {view.data(), view.size(), std::make_shared<py::object>(bytes), {}};
}

py::object MessageOf(const Event& event) {
  if (!event.has_message) return py::none();
  return ToBytes(std::string_view(event.data).substr(5));
}

py::tuple ToTuple(const Event& event) {
  const int kind = static_cast<int>(event.kind);
  switch (event.kind) {
    case EventKind::kCall:
      return py::make_tuple(kind, event.stream, ToStr(event.path), MessageOf(event), ToBytes(event.encoding),
                            event.timeout_s < 0 ? py::object(py::none()) : py::float_(event.timeout_s),
                            ToPairs(event.metadata), ToBytes(event.asked));
    case EventKind::kAnswer:
      return py::make_tuple(kind, event.stream, event.code, ToStr(event.details), MessageOf(event),
                            ToPairs(event.metadata), ToPairs(event.trailing), event.http_status);
    case EventKind::kEnd:
      return py::make_tuple(kind, event.stream, event.error);
    case EventKind::kMessage:
      return py::make_tuple(kind, event.stream, MessageOf(event));
    case EventKind::kHalfClose:
      return py::make_tuple(kind, event.stream);
    case EventKind::kSettings:
    case EventKind::kGoAway:
    case EventKind::kDrained:
      break;
  }
  return py::make_tuple(kind, 0);
}

py::list ToList(const std::vector<Event>& events) {
  py::list list(events.size());
  for (size_t i = 0; i < events.size(); ++i) list[i] = ToTuple(events[i]);
  return list;
}

std::unique_ptr<Session> MakeServerSession(const SessionLimits& limits, Host* host, double now) {
  return std::make_unique<Session>(Session::Role::kServer, limits, &host->methods, &host->budget, now);
}

std::unique_ptr<Session> MakeClientSession(const SessionLimits& limits, double now) {
  return std::make_unique<Session>(Session::Role::kClient, limits, nullptr, nullptr, now);
}

py::object Receive(Session* self, const py::buffer& buffer, size_t size, double now) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const std::unique_ptr<Py_buffer, decltype(&PyBuffer_Release)> release(&view, &PyBuffer_Release);
  if (static_cast<size_t>(view.len) < size) throw py::value_error("the buffer is too small");
  std::vector<Event> events;
  if (!self->Receive(std::string_view(static_cast<const char*>(view.buf), size), now, &events)) return py::none();
  return ToList(events);
}

py::list TakeEvents(Session* self) {
  std::vector<Event> events;
  self->TakeEvents(&events);
  return ToList(events);
}

// Returns the content of a length-delimited field of a protocol buffer message: of all of its occurrences together, or of
// the first one. Returns None if there is none. Raises ValueError if the bytes are not a message.
py::object FindField(const py::bytes& message, uint64_t wanted, bool first, size_t most) {
  const std::string_view data = ToView(message);
  MessageFields fields(data, most);
  std::optional<std::string_view> found;
  std::string joined;  // empty if there is only one
  for (MessageField field; fields.Next(&field);) {
    if (field.number != wanted || !field.is_bytes || (found && first)) continue;
    const std::string_view content = data.substr(field.content, field.end - field.content);
    if (found && joined.empty()) joined = *found;
    if (found) joined += content;
    if (!found) found = content;
  }
  if (!fields.error().empty()) throw py::value_error(fields.error());
  if (!found) return py::none();
  return ToBytes(joined.empty() ? *found : joined);
}

// Returns where a length-delimited field occurs in a protocol buffer message: begin and end of each occurrence, and
// between them the begin of its content. Raises ValueError if the bytes are not a message.
py::list FindPlaces(const py::bytes& message, uint64_t wanted, size_t most) {
  MessageFields fields(ToView(message), most);
  py::list places;
  for (MessageField field; fields.Next(&field);) {
    if (field.number == wanted && field.is_bytes) places.append(py::make_tuple(field.begin, field.content, field.end));
  }
  if (!fields.error().empty()) throw py::value_error(fields.error());
  return places;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  py::class_<SessionLimits>(module, "Limits")
      .def(py::init([](uint32_t streams, size_t header_bytes, size_t message_bytes, size_t connection_bytes,
                       double headers_s, double body_s, double answer_s) {
             return SessionLimits{streams,   header_bytes, message_bytes, connection_bytes,
                                  headers_s, body_s,       answer_s};
           }),
           py::kw_only(), py::arg("streams"), py::arg("header_bytes"), py::arg("message_bytes"),
           py::arg("connection_bytes"), py::arg("headers_s"), py::arg("body_s"), py::arg("answer_s"));

  py::class_<Host>(module, "Host")
      .def(py::init([](const py::iterable& paths, const py::iterable& streaming, size_t total_bytes) {
             auto host = std::make_unique<Host>();
             for (const py::handle path : paths) host->methods[py::cast<std::string>(path)] = MethodKind::kUnary;
             for (const py::handle path : streaming) {
               host->methods[py::cast<std::string>(path)] = MethodKind::kStreaming;
             }
             host->budget.limit = total_bytes;
             return host;
           }),
           py::arg("paths"), py::arg("streaming"), py::arg("total_bytes"))
      .def_property_readonly("held", [](const Host& self) { return self.budget.used.load(); })
      .def_property_readonly("over", [](const Host& self) { return self.budget.used > self.budget.limit; })
      .def_property(
          "total_bytes", [](const Host& self) { return self.budget.limit; },
          [](Host& self, size_t bytes) { self.budget.limit = bytes; });

  py::class_<Session>(module, "Session")
      .def("receive", &Receive, py::arg("buffer"), py::arg("size"), py::arg("now"))
      .def("take_events", &TakeEvents)
      .def("send", [](Session* self, size_t most) { return ToBytes(self->Send(most)); }, py::arg("most"))
      .def(
          "answer",
          [](Session* self, int32_t stream, int code, std::string_view details, const py::tuple& initial,
             const py::bytes& message, const py::tuple& trailing, const std::string& encoding) {
            Message body = FromBytes(message);
            body.encoding = encoding;
            return self->Answer(stream, code, details, FromPairs(initial), std::move(body), FromPairs(trailing));
          },
          py::arg("stream"), py::arg("code"), py::arg("details"), py::arg("initial"), py::arg("message"),
          py::arg("trailing"), py::arg("encoding") = "")
      .def(
          "call",
          [](Session* self, std::string_view path, std::string_view authority, bool tls,
             const std::optional<double>& timeout_s, const py::tuple& metadata, const py::bytes& message) {
            return self->Call(path, authority, tls, timeout_s.value_or(-1), FromPairs(metadata), FromBytes(message));
          },
          py::arg("path"), py::arg("authority"), py::arg("tls"), py::arg("timeout_s"), py::arg("metadata"),
          py::arg("message"))
      .def("push", &Session::Push, py::arg("stream"), py::arg("message"))
      .def("hold", &Session::Hold, py::arg("stream"), py::arg("bytes"))
      .def("reset", &Session::Reset, py::arg("stream"), py::arg("error"))
      .def("drain", &Session::Drain)
      .def("settle", &Session::Settle)
      .def("terminate", &Session::Terminate, py::arg("error"))
      .def("expire", &Session::Expire, py::arg("now"))
      .def("set_unsent", &Session::SetUnsent, py::arg("bytes"))
      .def_property_readonly("has_events", &Session::has_events)
      .def_property_readonly("wants_write", &Session::wants_write)
      .def_property_readonly("finished", &Session::finished)
      .def_property_readonly("has_failed", &Session::has_failed)
      .def_property_readonly("num_streams", &Session::num_streams)
      .def_property_readonly("held", &Session::held)
      .def_property_readonly("idle_since", &Session::idle_since)
      .def_property_readonly("is_stalled", &Session::is_stalled)
      .def_property_readonly("max_calls", &Session::max_calls);

  module.def("server_session", &MakeServerSession, py::arg("limits"), py::arg("host"), py::arg("now"),
             py::keep_alive<0, 2>());
  module.def("find_field", &FindField, py::arg("message"), py::arg("field"), py::arg("first") = false,
             py::arg("most") = kMostFields);
  module.def("find_places", &FindPlaces, py::arg("message"), py::arg("field"), py::arg("most") = kMostFields);
  module.def("client_session", &MakeClientSession, py::arg("limits"), py::arg("now"));
  AddLists(module);
}

}  // namespace dpsr::serving
