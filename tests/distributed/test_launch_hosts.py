"""`dpsr launch --hosts`: a real training over a real sshd, which serves two loopback addresses as two hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from dpsr_common.command_line import main
from dpsr_common.errors import UsageError
from dpsr_common.object_store import upload
from dpsr_tf.data.store import Store
from dpsr_tf.training import launch as launch_module
from dpsr_tf.training.launch import free_ports
from dpsr_tf.training.ssh_hosts import SshHosts

HOSTS = ("127.0.0.1", "127.0.0.2")
SMALL = ["train.batch_size=16", "model.token_dim=8", "model.embedding_dim=8", "train.checkpoint_steps=100"]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command that reaches HOSTS: an sshd of our own, with keys of its own."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None:
        pytest.skip("no sshd: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (port,) = free_ports(1)
    listen = "\n".join(f"ListenAddress {host}" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"Port {port}\n{listen}\nHostKey {folder / 'host_key'}\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\n"
    )
    (folder / "config").write_text(
        f"Host *\nPort {port}\nIdentityFile {folder / 'user_key'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile {folder / 'known_hosts'}\nLogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd begins as root
    process = subprocess.Popen([server, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.PIPE, text=True)
    try:
        while True:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            with socket.socket() as probe:
                if probe.connect_ex((HOSTS[1], port)) == 0:
                    break
            time.sleep(0.02)
        yield shlex.join(["ssh", "-F", str(folder / "config")])
    finally:
        process.terminate()
        process.communicate()


def running(model: Path) -> list[int]:
    """The processes of a training that still run, on whichever host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"--out={model}" in words and "train" in words:
            found.append(int(path.parent.name))
    return found


def flags(ssh: str, store: Path, model: Path, *assignments: str) -> list[str]:
    first_port = free_ports(1)[0]
    return [
        f"--hosts={','.join(HOSTS)}", f"--ssh={ssh}", f"--port={first_port}", f"--store={store}", f"--out={model}",
        *(f"--set={each}" for each in (*SMALL, *assignments)),
    ]  # fmt: skip


def test_hosts_copy_from_an_object_store_themselves(
    shop_store: Store, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    class Processes:
        """Takes the arguments of the processes, and starts none."""

        def __init__(self, tasks: object, arguments: list[str], *_: object):
            given[:] = arguments

        def __enter__(self) -> Processes:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self) -> int:
            return 0

    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch_module, "_Processes", Processes)
    upload(shop_store.path, s3_url)
    arguments = ["launch", "--workers=1", f"--store={s3_url}", f"--out={tmp_path / 'model'}"]
    assert main([*arguments, "--hosts=one,two"]) == 0
    assert f"--store={s3_url}" in given
    assert main(arguments) == 0
    (store,) = [argument for argument in given if argument.startswith("--store=")]
    assert store.startswith(f"--store={tmp_path / 'cache'}"), "one copy for all processes of this machine"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_on_two_hosts(launch, ssh, shop_store, tmp_path):
    model = tmp_path / "a model"
    cluster = launch("--ps=1", "--workers=1", *flags(ssh, shop_store.path, model, "train.steps=100"))
    assert cluster.end() == 0, cluster.text()
    assert {line.partition(": ")[0] for line in cluster.lines} <= {"ps 0", "chief 0"}
    assert cluster.steps_of("chief 0") == [100], cluster.text()
    assert not running(model), "parameter servers never end by themselves"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_that_is_killed_on_its_host_is_started_again(launch, ssh, shop_store, tmp_path):
    model = tmp_path / "model"
    cluster = launch("--ps=1", "--workers=2", *flags(ssh, shop_store.path, model, "train.steps=600"))
    cluster.until_checkpoint(model, 100)
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().decode() for pid in running(model)}
    (worker,) = (pid for pid, text in environments.items() if '"task": {"type": "worker"' in text)
    connections = {text.partition("SSH_CONNECTION=")[2].split()[2] for text in environments.values()}
    assert connections == set(HOSTS), "each address of the server has been a host"
    os.kill(worker, signal.SIGKILL)
    assert cluster.end() == 0, cluster.text()
    assert "launch: worker 0 was ended by SIGKILL; restarting it" in cluster.lines
    step = tf.train.load_variable(tf.train.latest_checkpoint(str(model)), "global_step")
    assert 600 <= step <= 601
    assert not running(model)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_ends_the_launcher_ends_what_runs_on_the_hosts(launch, ssh, shop_store, tmp_path, number):
    model = tmp_path / "model"
    cluster = launch("--ps=1", "--workers=2", *flags(ssh, shop_store.path, model, "train.steps=1000000"))
    cluster.until_checkpoint(model, 100)
    assert len(running(model)) >= 3
    os.kill(cluster.process.pid, number)
    assert cluster.end() == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 60
    while running(model) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(model)


@pytest.mark.distributed
@pytest.mark.slow
def test_failures_on_hosts_have_their_status(launch, ssh, shop_store, tmp_path):
    unknown = launch("--ps=1", *flags(ssh, shop_store.path, tmp_path / "a"), "--remote_python=/nowhere/python")
    assert unknown.end() == 127, unknown.text()
    assert "/nowhere/python" in unknown.text() and "ps 0 failed with status 127" in unknown.lines[-1]
    unreached = launch("--ps=1", *flags("ssh -F /dev/null -p 1", shop_store.path, tmp_path / "b"))
    assert unreached.end() == 1, unreached.text()
    assert "ps 0: ssh to 127.0.0.1 failed; see its message above" in unreached.lines[-1]


def test_processes_are_dealt_out_and_quoted():
    hosts = SshHosts.of_flags(["a", "me@b"], "ssh -F 'my file'", "/opt/my python", 2222, 3)
    assert [hosts.address(n) for n in range(3)] == ["a:2222", "b:2223", "a:2224"]
    *ssh, name, command = hosts.command(1, {"task": {"index": 0}}, ["train", "--out=it's"])
    assert ssh[:3] == ["ssh", "-F", "my file"] and name == "me@b"
    inner = shlex.split(command)
    assert inner[:3] == ["exec", "sh", "-c"] and len(inner) == 4, "one word, whatever the shell of the user is"
    line = next(line for line in inner[3].splitlines() if line.startswith("TF_CONFIG="))
    assert shlex.split(line)[:5] == [
        'TF_CONFIG={"task": {"index": 0}}', "/opt/my python", "-m", "dpsr_common", "train"
    ]  # fmt: skip
    assert "--out=it's" in shlex.split(line)


@pytest.mark.parametrize(
    ("names", "ssh", "port", "message"),
    [
        (["a", ""], "ssh", 2222, "--hosts=a,: '' is not a host"),
        (["-oProxyCommand=x"], "ssh", 2222, "is not a host"),
        (["a:22"], "ssh", 2222, "'a:22' is not a host; expected HOST or USER@HOST"),
        (["a"], " ", 2222, "--ssh=' ': expected a command"),
        (["a"], "ssh", 65534, "--port=65534: 3 processes need as many ports"),
    ],
)
def test_wrong_hosts_are_refused(names, ssh, port, message):
    with pytest.raises(UsageError) as error:
        SshHosts.of_flags(names, ssh, "python", port, 3)
    assert message in str(error.value)
