"""The files of serving/deploy agree with the programs and with each other."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from model_servers import BINARY, State, eventually, predict_request, serving
from processes import command_line, free_port, run_command
from proxy_backends import StartProxy, call, get, http_address, predict, wait_until

from dpsr_common import serving_apis
from dpsr_serving.proxy.config import parse_config
from dpsr_serving.proxy.metrics import METRICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
KUBERNETES = ("server", "proxy")
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = DEPLOY / "grafana" / "dpsr.json"


def load(*parts: str) -> Any:
    return yaml.safe_load(DEPLOY.joinpath(*parts).read_text())


def resources(name: str) -> dict[str, Any]:
    """The resources of a Kubernetes file by kind; each kind once."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def workload(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a Kubernetes file, and its one container."""
    kinds = resources(name)
    pod = (kinds.get("Deployment") or kinds["StatefulSet"])["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    return pod, container


def unit_arguments(name: str) -> list[str]:
    """The arguments that a systemd unit passes to dpsr."""
    text = (DEPLOY / "systemd" / f"dpsr-{name}.service").read_text().replace("\\\n", " ")
    line = re.search(r"^ExecStart=(.*)", text, re.MULTILINE)
    assert line is not None
    program, command, *arguments = shlex.split(line[1])
    assert program == "/opt/dpsr/bin/dpsr" and command == {"server": "serve", "proxy": "proxy"}[name]
    return arguments


def entry_point(target: str) -> list[str]:
    """The arguments in the image's entry point, which come before those of the command."""
    stage = (DEPLOY / "docker" / "Dockerfile").read_text().partition(f" AS {target}\n")[2].partition("\nFROM ")[0]
    program, *arguments = yaml.safe_load(stage.partition("ENTRYPOINT ")[2].partition("\n")[0])
    assert program == "dpsr"
    return arguments[1:]


def all_arguments(name: str) -> dict[str, list[str]]:
    """File -> the arguments that it passes to the server or the proxy."""
    services = load("docker", "docker-compose.yaml")["services"]
    of_compose = [services["proxy"]] if name == "proxy" else [services["server-1"], services["server-2"]]
    return {
        "systemd": unit_arguments(name),
        "kubernetes": entry_point(name) + workload(name)[1]["args"],
        **{f"compose {i}": entry_point(name) + service["command"] for i, service in enumerate(of_compose)},
    }


def flag(arguments: list[str], name: str) -> str:
    (value,) = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"--{name}=")]
    return value


@pytest.mark.parametrize("name", KUBERNETES)
def test_flags_exist_and_ports_are_one_set(name: str) -> None:
    ours = run_command({"server": "serve", "proxy": "proxy"}[name], "--help").stdout
    if name == "server":
        ours += subprocess.run([str(BINARY), "--help"], capture_output=True, text=True, timeout=60).stdout
    known = set(re.findall(r"^  --(?:\[no\])?(\w+)[:=]", ours, re.MULTILINE))
    http = {"server": ("rest_api_port", "8501"), "proxy": ("http_port", "8601")}[name]
    for where, arguments in all_arguments(name).items():
        for argument in arguments:
            key, equals, value = argument.removeprefix("--").partition("=")
            assert argument.startswith("--") and key in known and equals and value, (where, argument)
        assert flag(arguments, "port") == {"server": "8500", "proxy": "8600"}[name], where
        assert flag(arguments, http[0]) == http[1], where
        assert flag(arguments, "host") == "0.0.0.0", where
    # A file that the arguments name is there: a key of the ConfigMap, a volume of the service.
    pod, container = workload(name)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert set(mounts) == volumes
    files = {f"{mounts['config']}/{key}" for key in resources(name)["ConfigMap"]["data"]}
    assert {value for value in map(path_of, container["args"]) if value} == files
    services = load("docker", "docker-compose.yaml")["services"]
    for service in services.values():
        bound = [volume.rsplit(":", 2) for volume in service["volumes"]]
        targets = {target for _, target, mode in bound}
        assert {mode for *_, mode in bound} == {"ro"}
        assert {path for path in map(path_of, service.get("command", ())) if path} <= targets
        for source, *_ in bound:
            assert source.startswith("${MODELS") or (DEPLOY / "docker" / source).is_file(), source


def path_of(argument: str) -> str:
    value = argument.partition("=")[2]
    return value if value.startswith("/") else ""


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_resources_fit_together(name: str) -> None:
    kinds = resources(name)
    controller = kinds.get("Deployment") or kinds["StatefulSet"]
    pod, container = workload(name)
    app = {"app": f"dpsr-{name}"}
    assert pod["metadata"]["labels"] == app
    assert controller["spec"]["selector"] == {"matchLabels": app} == kinds["PodDisruptionBudget"]["spec"]["selector"]
    assert kinds["Service"]["spec"]["selector"] == app
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in kinds["Service"]["spec"]["ports"]} == ports
    assert set(ports) == {"grpc", "http"}
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    scaler = kinds["HorizontalPodAutoscaler"]["spec"]
    target = {"apiVersion": "apps/v1", "kind": controller["kind"], "name": controller["metadata"]["name"]}
    assert scaler["scaleTargetRef"] == target
    assert "replicas" not in controller["spec"]  # the autoscaler sets them
    assert "cpu" in container["resources"]["requests"]  # the autoscaler's utilization is a share of it
    if name == "server":
        assert controller["spec"]["serviceName"] == kinds["Service"]["metadata"]["name"]
        # The proxy follows the pods of the headless Service.
        config = parse_config(resources("proxy")["ConfigMap"]["data"]["proxy.yaml"])
        assert config.default is not None and config.default.discover
        service = kinds["Service"]
        port = next(port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc")
        assert service["spec"]["clusterIP"] == "None"
        assert config.default.shards == ((f"dns:{service['metadata']['name']}:{port}",),)
        # Nobody but the proxy reaches the port on which models can be loaded.
        policy = kinds["NetworkPolicy"]["spec"]
        assert policy["podSelector"] == {"matchLabels": app} and policy["policyTypes"] == ["Ingress"]
        allowed = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
        assert set(allowed) == set(ports)
        assert allowed["grpc"] == [
            {"podSelector": {"matchLabels": resources("proxy")["Deployment"]["spec"]["template"]["metadata"]["labels"]}}
        ]
        claim = kinds["PersistentVolumeClaim"]["metadata"]["name"]
        assert claim in [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]]
    else:
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pause + float(flag(container["args"], "drain_s")) < pod["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_schemas(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="108 MB of schemas: pip install kubernetes-validate")
    for resource in resources(name).values():
        validate.validate(resource, validate.latest_version(), strict=True)


def test_images() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    targets = {target: base for base, target in re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)}
    assert set(targets) == {"build", "base", "server", "proxy"}
    # The versions that the package wants; the same Python where it is built and where it runs.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = re.findall(r"\b(?:tensorflow|faiss-cpu)==\S+", text)
    assert sorted(pins) == ["faiss-cpu==1.15.1", "tensorflow==2.15.1"]
    assert set(pins) <= {*extras["train"], *extras["faiss-cpu"]}
    assert targets["build"] == targets["base"] and (targets["server"], targets["proxy"]) == ("base", "base")
    assert re.search(r"^wheel:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, exposed in (("server", "8500 8501"), ("proxy", "8600 8601")):
        stage = text.partition(f" AS {name}\n")[2].partition("\nFROM ")[0]
        assert f"EXPOSE {exposed}\n" in stage and "USER 10001\n" in stage
        assert workload(name)[0]["spec"]["securityContext"]["runAsUser"] == 10001
    for service in load("docker", "docker-compose.yaml")["services"].values():
        build = service.get("build")
        if build is not None:
            context = (DEPLOY / "docker" / build["context"]).resolve()
            assert context == ROOT and (context / build["dockerfile"]).is_file() and build["target"] in targets


def test_proxy_configuration_of_compose() -> None:
    services = load("docker", "docker-compose.yaml")["services"]
    config = parse_config((DEPLOY / "docker" / "proxy.yaml").read_text())
    assert config.default is not None
    assert list(config.default.shards[0]) == [f"{name}:8500" for name in services if name.startswith("server-")]


# Metrics


def expressions() -> dict[str, str]:
    rules = [rule for group in load("prometheus", "alerts.yaml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return {rule["alert"]: rule["expr"] for rule in rules}


def charts() -> dict[str, str]:
    """Panel and letter -> the expression that the dashboard draws."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    return {f"panel {p['id']} {t['refId']}": t["expr"] for p in panels for t in p["targets"]}


def names_in(expression: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"(?<![\w:])(dpsr_proxy_\w+|:\w+(?::\w+)+)", re.sub(r'"[^"]*"', '""', expression)))


def labels_of(expression: str, metric: str) -> set[str]:
    """The labels by which an expression selects a metric."""
    matchers = re.findall(rf"(?<![\w:]){re.escape(metric)}\{{([^}}]*)\}}", expression)
    return {label for matcher in matchers for label in re.findall(r"(\w+)\s*[=!]", re.sub(r'"[^"]*"', "", matcher))}


def test_every_metric_of_the_rules_exists(base_path: Path, tmp_path: Path, start_proxy: StartProxy) -> None:
    """On a real server, with the monitoring file and the probes of the deployment, and a real proxy."""
    import saved_models

    saved_models.write_half_plus(tmp_path / "model", 1.0, item_changes=True)
    saved_models.publish(tmp_path / "model", base_path, 1)
    saved_models.write_warmup(base_path / "1")
    monitoring = DEPLOY / "prometheus" / "monitoring.config"
    arguments = (f"--model_base_path={base_path}", f"--monitoring_config_file={monitoring}")
    with serving(tmp_path, *arguments, rest_port=free_port()) as server:
        server.predict(predict_request())
        saved_models.write_unknown_op(tmp_path / "broken", "NoSuchOp")
        saved_models.publish(tmp_path / "broken", base_path, 2)
        eventually(lambda: server.states().get(2) == State.END, "version 2 has failed")
        proxy = start_proxy(f"--backend=127.0.0.1:{server.port}", "--http_port=0")
        http = http_address(proxy)
        for probe in ("livenessProbe", "readinessProbe"):
            assert server.rest(workload("server")[1][probe]["httpGet"]["path"]).status == 200
            path = workload("proxy")[1][probe]["httpGet"]["path"]
            wait_until(lambda path=path: get(http, path)[0] == 200)
        compose = (DEPLOY / "docker" / "docker-compose.yaml").read_text()
        for port, path in re.findall(r"http://127.0.0.1:(\d+)(/\w+)", compose):
            assert (server.rest(path).status if port == "8501" else get(http, path)[0]) == 200
        call(proxy.target, serving_apis.PREDICT, predict("default"))
        scraped = {
            "dpsr-server": server.rest(load("docker", "prometheus.yaml")["scrape_configs"][0]["metrics_path"]).text,
            "dpsr-proxy": get(http, "/metrics")[1],
        }
    series: dict[str, set[str]] = {name: set(labels) for name, (_, labels, _) in METRICS.items()}
    for line in "\n".join(scraped.values()).splitlines():
        kind = re.fullmatch(r"# TYPE (\S+) (\w+)", line)
        if kind:
            series.setdefault(kind[1], set())
            if kind[2] == "histogram":
                series |= {f"{kind[1]}{end}": {*series[kind[1]], "le"} for end in ("_bucket", "_sum", "_count")}
        elif line and not line.startswith("#"):
            name, _, labels = line.partition("{")
            series.setdefault(name.split()[0], set()).update(re.findall(r'(\w+)="', labels))
    assert ":tensorflow:cc:saved_model:load_attempt_count{model_path" in scraped["dpsr-server"]
    for where, expression in (expressions() | charts()).items():
        assert names_in(expression) or "up{" in expression, where
        for metric in names_in(expression):
            assert metric in series, (where, metric)
            # A histogram that has counted nothing shows no labels.
            known = series[metric] | ({"model_path", "status"} if "warmup" in metric else set())
            assert labels_of(expression, metric) <= known, (where, metric)
    jobs = set(re.findall(r'job="([^"]+)"', ALERTS.read_text()))
    for file in ("docker/prometheus.yaml", "prometheus/prometheus.yaml", "prometheus/prometheus-kubernetes.yaml"):
        assert {job["job_name"] for job in load(file)["scrape_configs"]} == set(scraped) == jobs, file


def test_dashboard() -> None:
    """Panels do not overlap, and a legend names only labels that its expression keeps."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23
    for target in (target for panel in panels for target in panel.get("targets", ())):
        (grouped,) = re.findall(r"\bby \(([^)]*)\)", target["expr"]) or [""]
        left = {label.strip() for label in grouped.split(",")} - {"le"}
        legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert legend == left - {""} or not grouped, target


def test_scraped_addresses_are_those_the_proxy_knows() -> None:
    """The label `backend` of a scraped server is what the proxy's metrics call it."""
    cases = {
        "docker/prometheus.yaml": ("server-1:8501", "server-1:8500"),
        "prometheus/prometheus.yaml": ("10.0.0.1:8501", "10.0.0.1:8500"),
        "prometheus/prometheus-kubernetes.yaml": ("10.1.2.3", "10.1.2.3:8500"),
    }
    for file, (source, wanted) in cases.items():
        rules = load(file)["scrape_configs"][0]["relabel_configs"]
        (rule,) = [rule for rule in rules if rule.get("target_label") == "backend"]
        pattern = rule.get("regex", "(.*)")
        assert re.sub(f"^{pattern}$", rule["replacement"].replace("$1", r"\1"), source) == wanted, file


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool", path=os.pathsep.join([str(ROOT / "build"), os.environ.get("PATH", "")]))
    if promtool is None:
        pytest.skip("promtool is not installed: run make build/promtool")
    folder = ALERTS.parent
    for arguments in (
        ("check", "rules", "alerts.yaml"),
        ("test", "rules", "alerts_test.yaml"),
        ("check", "config", "--syntax-only", "prometheus.yaml"),
        ("check", "config", "--syntax-only", "../docker/prometheus.yaml"),
    ):
        done = subprocess.run([promtool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# systemd


@pytest.mark.parametrize("name", KUBERNETES)
def test_units(name: str, tmp_path: Path) -> None:
    unit = DEPLOY / "systemd" / f"dpsr-{name}.service"
    text = unit.read_text()
    keys = [line.partition("=")[0] for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)]
    assert len(keys) == len(set(keys))
    if name == "proxy":
        stop = float(re.search(r"^TimeoutStopSec=(\d+)", text, re.MULTILINE)[1])
        assert stop > float(flag(unit_arguments(name), "drain_s"))
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: run make test-tools")
    here = tmp_path / unit.name
    here.write_text(text.replace("/opt/dpsr/bin/dpsr", command_line()[0]))
    shutil.copytree(unit.parent / "dpsr-.service.d", tmp_path / "dpsr-.service.d")
    done = subprocess.run([analyze, "verify", "--man=no", str(here)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", str(here)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout[-500:]


# The guide


def test_guide_explains_every_alert_and_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = set(re.findall(r"^\| `(Dpsr\w+)` \|", text, re.MULTILINE))
    assert rows == set(expressions())
    watched = {re.sub(r"_(bucket|sum|count)$", "", name) for e in expressions().values() for name in names_in(e)}
    assert {name for name in watched if f"`{name}" not in text} == set()
