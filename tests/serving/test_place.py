"""`dpsr place`: its file, its plan, and real servers that it changes while a client asks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
import yaml
from model_servers import Server, State, serving
from processes import run_command
from proxy_backends import Load, StartProxy, call, predict, write_yaml

from dpsr_common import serving_apis
from dpsr_common.command_line import main
from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.placement.config import parse_config
from dpsr_serving.placement.planner import Model

SERVERS = "servers: {a: {address: 'h:1', memory: 8GiB}}\n"


def test_whole_file(tmp_path: Path) -> None:
    (tmp_path / "m" / "3").mkdir(parents=True)
    (tmp_path / "m" / "3" / "saved_model.pb").write_bytes(b"x" * 1000)
    (tmp_path / "m" / "4" / "assets").mkdir(parents=True)
    (tmp_path / "m" / "4" / "assets" / "index").write_bytes(b"x" * 2000)
    config = parse_config(
        f"""
        servers:
          b: {{address: "h:2", memory: 1.5KiB, zone: east, leaving: true}}
          a: {{address: "h:1", memory: 5000}}
        models:
          given: {{
            base_path: "gs://x", memory: 2MB, replicas: 2, requests_per_s: 3, versions: [7, 8], labels: {{c: 8}}
            }}
          measured: {{base_path: "{tmp_path}/m"}}
          both: {{base_path: "{tmp_path}/m", latest: 2}}
        tls: {{ca: x.pem}}
        """
    )
    assert list(config.servers) == ["a", "b"] and config.addresses == {"a": "h:1", "b": "h:2"}
    assert config.servers["b"].memory == 1536 and config.servers["b"].leaving and config.servers["b"].zone == "east"
    given = config.models["given"]
    assert given.model == Model("given", 4_000_000, 2_000_000, 2, 3.0)
    assert (given.versions, dict(given.labels)) == ((7, 8), {"c": 8})
    # A fifth more than the files of the largest version that is served.
    assert config.models["measured"].model == Model("measured", 2400, 2400)
    assert config.models["both"].model == Model("both", 4800, 2400)
    text = f"{SERVERS}models: {{m: {{base_path: /m, memory: 5}}}}\nswap_room: false"
    assert parse_config(text).models["m"].model.swap == 0


def test_the_guides_file_is_one() -> None:
    """The example in the guide has every key but `latest`, which excludes `versions`."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"^```yaml\n(servers:\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    config = parse_config(example)
    assert set(config.models) == {"shop", "books"} and config.servers["c"].leaving
    with pytest.raises(UsageError) as raised:
        parse_config("servers: {a: {address: 'h:1', memory: 1}}\nmodels: {m: {x: 1}}")
    keys = str(raised.value).partition("allowed: ")[2].split(", ")
    assert set(keys) <= set(yaml.safe_load(example)["models"]["shop"]) | {"latest"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "servers: got None, expected a mapping"),
        (SERVERS, "models: got None, expected a mapping"),
        ("servers: {a: {address: h, memory: 1}}", "servers.a.address: got 'h', expected host:port"),
        ("servers: {a: {address: 'h:1'}}", "servers.a.memory: got None"),
        ("servers: {a: {address: 'h:1', memory: 1GIB}}", "servers.a.memory: got '1GIB', expected bytes above 0, or a"),
        ("servers: {a: {address: 'h:1', memory: 1}, b: {address: 'h:1', memory: 1}}", "a different address for each"),
        (SERVERS + "models: {m: {base_path: m}}", "models.m.base_path: got 'm', expected an absolute path or URI"),
        (SERVERS + "models: {m: {memory: 5}}", "models.m.base_path: got None"),
        (
            SERVERS + "models: {m: {base_path: /nowhere}}",
            "models.m.memory: not given, and the files cannot be measured",
        ),
        (SERVERS + "models: {m: {base_path: /proc/self/fd}}", "has no version to measure"),
        (
            SERVERS + "models: {m: {base_path: /proc/self/fd, versions: [7777, 8888]}}",
            "has none of the versions 7777, 8888 to measure (versions there: 0, 1, 2",
        ),
        (SERVERS + "models: {m: {base_path: /m, memory: 1, replicas: 0}}", "models.m.replicas: got 0, expected an int"),
        (SERVERS + "models: {m: {base_path: /m, memory: 1, versions: [x]}}", "models.m.versions: got ['x'], expected"),
        (
            SERVERS + "models: {m: {base_path: /m, memory: 1, versions: [1], latest: 2}}",
            "models.m.latest: cannot be combined with versions",
        ),
        (SERVERS + "models: {m: {base_path: /m, memory: 1, labels: {a: b}}}", "models.m.labels: got {'a': 'b'}"),
        (SERVERS + "models: {m: {base_path: /m, memory: 1}}\ntls: {key: k}", "expected certificate and key together"),
        (SERVERS + "more: 1", "unknown key 'more'"),
    ],
)
def test_wrong_files_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config(text)
    assert words in str(raised.value)


def test_a_version_that_is_removed_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m" / "3").mkdir(parents=True)
    (tmp_path / "m" / "3" / "saved_model.pb").write_bytes(b"x")

    def remove(path: Path) -> bool:
        path.unlink()
        return True

    with (
        monkeypatch.context() as patch,
        pytest.raises(CommandError, match="was the version removed meanwhile") as error,
    ):
        patch.setattr(Path, "is_file", remove)
        parse_config(f"{SERVERS}models: {{m: {{base_path: '{tmp_path / 'm'}'}}}}")
    assert error.type is CommandError and "3/saved_model.pb: No such file" in str(error.value)


def test_plan_without_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def place(*arguments: str) -> tuple[int, str, str]:
        status = main(["place", *arguments])
        return status, *capsys.readouterr()

    text = "servers: {a: {address: 'h:1', memory: 10GiB}, b: {address: 'h:2', memory: 4GiB}}\nmodels:\n"
    models = "  shop: {base_path: /m, memory: 2GiB, replicas: 2}\n"
    flag = write_yaml(tmp_path / "p.yaml", text + models)
    status, out, errors = place(flag, "--offline")
    assert (status, errors) == (0, "")
    assert out.splitlines() == [
        "server    memory  models     need       ->  models     need",
        "a       10.0 GiB       0  0 bytes  0 %  ->       1  4.0 GiB   40 %",
        "b        4.0 GiB       0  0 bytes  0 %  ->       1  4.0 GiB  100 %",
        "",
        "model   memory  moves",
        "shop   2.0 GiB  + a, + b",
        "",
        "2 loads, 4.0 GiB, in 1 steps",
        "nothing was changed; --apply carries it out",
    ]
    write_yaml(tmp_path / "p.yaml", f"{text}{models}  large: {{base_path: /m, memory: 9GiB}}")
    status, out, errors = place(flag, "--offline")
    assert status == 1
    assert "1 of 1  needs 9.0 GiB, and 9.0 GiB for a next version; of the servers" in out
    assert errors.startswith("dpsr place: error: 1 replicas of 1 models do not fit; nothing was changed")
    for wrong in (("--offline", "--apply"), ("--offline", "--proxy_config=x"), ("--config=none",)):
        assert place(flag, *wrong)[0] == 2
    status, _, errors = place(
        write_yaml(
            tmp_path / "p.yaml",
            "servers: {a: {address: '127.0.0.1:1', memory: 9}}\nmodels: {m: {base_path: /m, memory: 1}}",
        ),
    )
    assert status == 1 and "server a (127.0.0.1:1) does not answer; start it, or say" in errors


class Fleet:
    """Servers without a model, and the file that places models on them."""

    def __init__(self, folder: Path, servers: dict[str, Server], models: dict[str, str]) -> None:
        self.folder = folder
        self.servers = servers
        self.models = models
        self.keys = dict.fromkeys(servers, "memory: 200MB")

    def place(self, *names: str, **more: str) -> tuple[int, str, str]:
        """Runs `dpsr place --apply` for these servers; returns status, output, errors."""
        servers = {name: f"{{address: '127.0.0.1:{self.servers[name].port}', {self.keys[name]}}}" for name in names}
        models = {name: f"{{memory: 1MB, {keys}}}" for name, keys in self.models.items()}
        lines = ["servers:", *(f"  {key}: {value}" for key, value in servers.items())]
        lines += ["models:", *(f"  {key}: {value}" for key, value in models.items())]
        flag = write_yaml(self.folder / "placement.yaml", "\n".join(lines))
        flags = {"settle_s": "2", **more}
        result = run_command("place", flag, "--apply", *(f"--{key}={value}" for key, value in flags.items()))
        return result.returncode, result.stdout, result.stderr

    def holders(self, model: str) -> set[str]:
        return {name for name, server in self.servers.items() if answering(server, model)}


def answering(server: Server, model: str) -> set[int]:
    """The versions of the model that answer."""
    try:
        return {version for version, state in server.states(model).items() if state == State.AVAILABLE}
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND, error
        return set()


@pytest.fixture
def start_fleet(exported: Path, tmp_path: Path) -> Iterator[Callable[[int, int], Fleet]]:
    """(servers, models) -> servers s0, s1, ... and models m000, m001, ... of one SavedModel; every fourth twice."""
    with contextlib.ExitStack() as stack:

        def start(num_servers: int, num_models: int) -> Fleet:
            empty = tmp_path / "models.config"
            empty.write_text("model_config_list {}")
            servers = {}
            for number in range(num_servers):
                folder = tmp_path / f"s{number}"
                folder.mkdir()
                servers[folder.name] = stack.enter_context(serving(folder, f"--model_config_file={empty}"))
            models = {}
            for number in range(num_models):
                base_path = tmp_path / f"m{number:03}"
                base_path.mkdir()
                (base_path / "1").symlink_to(exported / "half_plus_1")
                models[base_path.name] = f"base_path: {base_path}, replicas: {1 + (number % 4 == 0)}"
            return Fleet(tmp_path, servers, models)

        yield start


@pytest.mark.long
@pytest.mark.slow
def test_200_models_move_between_4_servers_without_a_failed_request(
    start_fleet: Callable[[int, int], Fleet], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A fourth server comes and another leaves, under load by way of two proxies: one reads our file, one discovers."""
    fleet = start_fleet(4, 200)
    routes = tmp_path / "proxy.yaml"
    health = "health: {every_s: 0.3, return_s: 0}\n"
    status, out, err = fleet.place("s0", "s1", "s2", proxy_config=str(routes))
    assert (status, err) == (0, ""), out
    assert "250 loads, " in out and "done: 250 replicas answer as planned" in out
    routed = yaml.safe_load(routes.read_text())["models"]
    assert len(routed) == 200 and all(len(routed[name]["backends"]) == 1 + (int(name[1:]) % 4 == 0) for name in routed)
    routes.write_text(routes.read_text() + health)
    everywhere = [f"127.0.0.1:{server.port}" for server in fleet.servers.values()]
    discovering = write_yaml(tmp_path / "d.yaml", f"{health}default: {{backends: {everywhere}, discover: true}}")
    proxies = [start_proxy(f"--config={routes}"), start_proxy(discovering)]
    requests = [predict(name, x=np.float32([2])) for name in fleet.models]
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(Load(proxy.target, requests, threads=1, pause_s=0.005)) for proxy in proxies]
        for load in loads:
            load.wait_for(200)
        # Nothing to do, nothing done.
        status, out, err = fleet.place("s0", "s1", "s2", proxy_config=str(routes))
        assert status == 0 and "\nno moves\n" in out, err
        status, out, err = fleet.place("s0", "s1", "s2", "s3", proxy_config=str(routes), rebalance="true")
        assert status == 0 and "in 2 steps" in out, err
        fleet.keys["s1"] += ", leaving: true"
        status, out, err = fleet.place("s0", "s1", "s2", "s3", proxy_config=str(routes))
        assert status == 0 and "in 2 steps" in out, err
        for load in loads:
            load.wait_for(200)
    assert [load.failed for load in loads] == [0, 0], [load.details[:3] for load in loads]
    held = {
        name: sum(bool(answering(server, model)) for model in fleet.models) for name, server in fleet.servers.items()
    }
    assert held["s1"] == 0 and sum(held.values()) == 250 and held["s3"] >= 50
    assert yaml.safe_load(routes.read_text())["health"] == {"every_s": 0.3, "return_s": 0}


@pytest.mark.slow
def test_a_model_that_does_not_load_stops_the_plan(start_fleet: Callable[[int, int], Fleet], tmp_path: Path) -> None:
    """The other models are placed, the output says where; the next run continues, with another version and a label."""
    fleet = start_fleet(2, 3)
    version = tmp_path / "m001" / "1"
    model = version.resolve()
    version.unlink()
    saved_models.write_unknown_op(version, "NoSuchOp")
    status, out, err = fleet.place("s0", "s1")
    assert status == 1 and err.startswith("dpsr place: error: step 1 of 1 failed: server s")
    assert "NoSuchOp" in err and "m001 answers on: no server" in out
    (place,) = fleet.holders("m002")
    assert f"m002 answers on: {place}" in out
    (tmp_path / "m001" / "2").symlink_to(model)
    fleet.models["m001"] += ", versions: [2], labels: {stable: 2}"
    status, out, err = fleet.place("s0", "s1", config_dir=str(tmp_path))
    assert (status, err) == (0, ""), out
    (place,) = fleet.holders("m001")
    assert answering(fleet.servers[place], "m001") == {2}
    request = serving_apis.PredictRequest.FromString(predict("m001", x=np.float32([2])))
    request.model_spec.version_label = "stable"
    # A label for a version that does not load: the error gives the reason.
    version = tmp_path / "m001" / "3"
    saved_models.write_unknown_op(version, "NoSuchOp")
    fleet.models["m001"] = fleet.models["m001"].replace("[2]", "[2, 3]").replace("stable: 2", "stable: 3")
    status, out, err = fleet.place("s0", "s1")
    assert (
        status == 1
        and "not all versions and labels are as the file says" in err
        and "model m001 version 3: " in err
        and "NoSuchOp" in err
    )
    # A server that starts again with the written file has its models again.
    with serving(tmp_path, f"--model_config_file={tmp_path}/{place}.config") as again:
        assert answering(again, "m001") == {2}
    address = f"127.0.0.1:{fleet.servers[place].port}"
    assert call(address, serving_apis.PREDICT, request.SerializeToString())[0] is grpc.StatusCode.OK


@pytest.mark.slow
def test_what_a_dead_server_held_goes_elsewhere(start_fleet: Callable[[int, int], Fleet]) -> None:
    fleet = start_fleet(2, 3)
    assert fleet.place("s0", "s1")[0] == 0
    fleet.servers["s0"].process.kill()
    fleet.servers["s0"].process.wait()
    status, _, err = fleet.place("s0", "s1")
    assert status == 1 and "server s0 (" in err and "does not answer" in err
    fleet.keys["s0"] += ", leaving: true"
    status, out, err = fleet.place("s0", "s1")
    assert status == 1 and "m000" in out and "wants 2 servers, but only 1 stay" in out
    fleet.models = {name: keys.partition(", replicas")[0] for name, keys in fleet.models.items()}
    status, out, err = fleet.place("s0", "s1")
    assert (status, err) == (0, "") and "leaves, does not answer" in out
    assert all(answering(fleet.servers["s1"], model) == {1} for model in fleet.models)


def test_servers_with_tls(exported: Path, certificates: Path, base_path: Path, tmp_path: Path) -> None:
    (base_path / "1").symlink_to(exported / "half_plus_1")
    pem = {name: (certificates / name).read_text() for name in ("server.key", "server.pem", "ca.pem")}
    ssl = tmp_path / "ssl.config"
    ssl.write_text(
        f"server_key: '{pem['server.key']}' server_cert: '{pem['server.pem']}' custom_ca: '{pem['ca.pem']}'".replace(
            "\n", "\\n"
        )
        + " client_verify: true"
    )
    empty = tmp_path / "models.config"
    empty.write_text("model_config_list {}")
    with serving(tmp_path, f"--model_config_file={empty}", f"--ssl_config_file={ssl}") as server:
        text = f"servers: {{a: {{address: 'localhost:{server.port}', memory: 9MB}}}}\n"
        text += f"models: {{m: {{base_path: {base_path}}}}}\n"
        files = f"ca: {certificates}/ca.pem, certificate: {certificates}/client.pem, key: {certificates}/client.key"
        result = run_command("place", write_yaml(tmp_path / "p.yaml", text + f"tls: {{{files}}}"), "--apply")
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert "done: 1 replicas answer as planned" in result.stdout
        for tls, status, words in (
            ("", 1, "server a (localhost:"),
            (f"tls: {{ca: {certificates}/ca.pem}}", 1, "does not answer"),
            ("tls: {ca: /nowhere.pem}", 2, "tls: /nowhere.pem: No such file"),
        ):
            result = run_command("place", write_yaml(tmp_path / "p.yaml", text + tls))
            assert result.returncode == status and words in result.stderr, result.stderr
