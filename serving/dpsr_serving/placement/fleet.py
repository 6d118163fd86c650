"""Asks model servers which models they hold (GetModelStatus), and changes that (HandleReloadConfigRequest).

The servers hold the only state: nothing is remembered between two runs of the command. A reload request always carries
a server's whole list of models, because the server unloads what the list leaves out.
"""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent import futures
from pathlib import Path

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import replaced
from dpsr_serving.placement.config import PlacementConfig
from dpsr_serving.placement.planner import Assignment

_ASK_TIMEOUT_S = 10.0
_POLL_S = 0.1  # between two questions to a server whose models are loading
# Seconds that a version must stay failed before it counts as failed: a server that tries again takes a moment.
_FAILED_S = 5.0


@dataclasses.dataclass(frozen=True)
class FleetState:
    """What the servers said about the models of the placement file.

    Attributes:
        held: server -> models that are loaded or loading.
        answering: server -> models that are loaded.
        silent: servers that did not answer; they are in neither of the two mappings.
    """

    held: Assignment
    answering: Assignment
    silent: frozenset[str]


class Fleet:
    """Connections to the servers of a placement file. A context manager, which closes them."""

    def __init__(self, config: PlacementConfig, timeout_s: float, config_dir: Path | None) -> None:
        """Opens the connections.

        Args:
            config: the placement file.
            timeout_s: seconds that set_models() waits for models to load.
            config_dir: directory for each server's list of models, NAME.config; None: the lists are not written.

        Raises:
            UsageError: a TLS file cannot be read.
        """
        # Imported here, not at the top: gRPC is slow to import, and `dpsr place --help` does not need it.
        import grpc

        from dpsr_common import serving_apis

        self._grpc = grpc
        self._apis = serving_apis
        self._timeout_s = timeout_s
        self._config_dir = config_dir
        self.config = config
        options = list(serving_apis.CHANNEL_OPTIONS)
        credentials = None
        if config.tls:
            from dpsr_serving.client import Tls

            try:
                credentials = Tls(**config.tls).credentials()
            except OSError as error:
                raise UsageError(f"tls: {error.filename}: {error.strerror}") from None
            if "server_name" in config.tls:
                options.append(("grpc.ssl_target_name_override", config.tls["server_name"]))
        self._channels = {
            name: grpc.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.insecure_channel(address, options=options)
            for name, address in config.addresses.items()
        }
        self._pool = futures.ThreadPoolExecutor(max(1, min(64, len(self._channels))))

    def __enter__(self) -> Fleet:
        """Returns the fleet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        self._pool.shutdown(cancel_futures=True)
        for channel in self._channels.values():
            channel.close()

    def read_state(self) -> FleetState:
        """Asks every server about every model. Raises CommandError where a server answers with an unexpected error."""
        loaded, loaded_or_loading = {"AVAILABLE"}, {"START", "LOADING", "AVAILABLE"}

        def ask(server: str) -> tuple[set[str], set[str]] | None:
            held: set[str] = set()
            answering: set[str] = set()
            for model in self.config.models:
                versions = self._version_states(server, model)
                if versions is None:
                    return None
                states = {state for state, _ in versions.values()}
                if loaded_or_loading & states:
                    held.add(model)
                if loaded & states:
                    answering.add(model)
            return held, answering

        answers = dict(zip(self._channels, self._pool.map(ask, self._channels), strict=True))
        return FleetState(
            {server: frozenset(sets[0]) for server, sets in answers.items() if sets is not None},
            {server: frozenset(sets[1]) for server, sets in answers.items() if sets is not None},
            frozenset(server for server, sets in answers.items() if sets is None),
        )

    def set_models(self, wanted: Assignment) -> list[str]:
        """Gives each server its whole list of models, all servers at once, and waits until the models answer.

        Returns:
            What went wrong, one line for each server that failed.
        """

        def set_one(server: str) -> str:
            problem = self._reload(server, wanted[server])
            return f"server {server} ({self.config.addresses[server]}): {problem}" if problem else ""

        return [problem for problem in self._pool.map(set_one, sorted(wanted)) if problem]

    def _version_states(self, server: str, model: str) -> dict[int, tuple[str, str]] | None:
        """Returns version -> (state, error) of a model: {} if the server does not know it, None if it is silent."""
        request = self._apis.GetModelStatusRequest()
        request.model_spec.name = model
        try:
            answer = self._channels[server].unary_unary(
                self._apis.GET_MODEL_STATUS,
                request_serializer=self._apis.GetModelStatusRequest.SerializeToString,
                response_deserializer=self._apis.GetModelStatusResponse.FromString,
            )(request, timeout=_ASK_TIMEOUT_S)
        except self._grpc.RpcError as error:
            if error.code() is self._grpc.StatusCode.NOT_FOUND:
                return {}
            if error.code() in (self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            raise CommandError(
                f"server {server} ({self.config.addresses[server]}) did not say which models it holds: "
                f"{error.code().name}: {error.details()}"
            ) from None
        name = self._apis.ModelVersionStatus.State.Name
        return {
            status.version: (name(status.state), status.status.error_message if status.status.error_code else "")
            for status in answer.model_version_status
        }

    def _reload(self, server: str, models: frozenset[str]) -> str:
        """Changes one server and waits for its models; returns what went wrong, or ""."""
        end = time.monotonic() + self._timeout_s
        request = self._apis.ReloadConfigRequest()
        request.config.model_config_list.SetInParent()
        for name in sorted(models):
            entry = self.config.models[name]
            model = request.config.model_config_list.config.add(
                name=name, base_path=entry.base_path, model_platform="tensorflow"
            )
            if entry.versions:
                model.model_version_policy.specific.versions.extend(entry.versions)
            else:
                model.model_version_policy.latest.num_versions = entry.latest
            model.version_labels.update(entry.labels)
        try:
            answer = self._channels[server].unary_unary(
                self._apis.RELOAD_CONFIG,
                request_serializer=self._apis.ReloadConfigRequest.SerializeToString,
                response_deserializer=self._apis.ReloadConfigResponse.FromString,
            )(request, timeout=self._timeout_s)
        except self._grpc.RpcError as error:
            return "; ".join([f"{error.code().name}: {error.details()}", *self._load_errors(server, models)])
        if answer.status.error_code:
            return str(answer.status.error_message)
        problem = self._wait_for(server, models, end)
        if not problem and self._config_dir is not None:
            from google.protobuf import text_format

            write_file(self._config_dir / f"{server}.config", text_format.MessageToString(request.config))
        return problem

    def _load_errors(self, server: str, models: frozenset[str]) -> list[str]:
        """Returns why versions that the placement file names did not load.

        A server that refuses a label to a version which is not loaded does not say why that version is not loaded.
        """
        named = [(model, version) for model in sorted(models) for version in self.config.models[model].versions]
        states = {model: self._version_states(server, model) or {} for model, _ in named}
        errors = ((model, version, states[model].get(version, ("", ""))[1]) for model, version in named)
        return [f"model {model} version {version}: {error}" for model, version, error in errors if error]

    def _wait_for(self, server: str, models: frozenset[str], end: float) -> str:
        """Waits until all wanted versions of the models are loaded; returns what went wrong, or ""."""
        failed_since: dict[str, float] = {}
        waiting = sorted(models)
        while True:
            problem = ""
            for model in list(waiting):
                states = self._version_states(server, model)
                if states is None:
                    return "does not answer any more"
                entry = self.config.models[model]
                available = {version for version, (state, _) in states.items() if state == "AVAILABLE"}
                if (available >= set(entry.versions)) if entry.versions else available:
                    waiting.remove(model)
                    continue
                wanted = entry.versions or tuple(states)
                errors = [f"version {v}: {states[v][1]}" for v in wanted if v in states and states[v][1]]
                seen = {version: state for version, (state, _) in states.items()} or "no version"
                problem = problem or f"model {model} is not available: {'; '.join(errors) or seen}"
                if errors and time.monotonic() - failed_since.setdefault(model, time.monotonic()) > _FAILED_S:
                    return f"model {model} did not load: {'; '.join(errors)}"
                if not errors:
                    failed_since.pop(model, None)
            if not waiting:
                return ""
            if time.monotonic() > end:
                return f"not ready within --timeout_s={self._timeout_s:g}: {problem}"
            time.sleep(_POLL_S)


def write_file(path: Path, text: str) -> None:
    """Writes a file and puts it in place by one rename, so that no reader sees half of it. Raises CommandError."""
    try:
        with replaced(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
