"""Two hosts, simulated by network namespaces joined by a virtual cable; one of them is lost and returns."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.231.77.1", "10.231.77.2")
STEPS = 16
RECIPE = (
    "recipes/train_grpo.py", "--config", "train_configs/debug.toml", "--parallel.data_parallel", "hsdp",
    "--parallel.timeout", "60", "--training.steps", str(STEPS), "--checkpoint.interval", "1", "--checkpoint.sharded",
    "--metrics.image_interval", "0",
)  # fmt: skip

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


class Host:
    """A namespace with a torchrun agent and one worker."""

    def __init__(self, number: int, prefix: str, log: Path) -> None:
        self.number, self.namespace, self.interface = number, f"{prefix}{number}", f"{prefix}{number}"
        self.log = log
        self.agent: subprocess.Popen | None = None

    def start(self, run_dir: Path, port: int) -> None:
        launcher = [
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", f"--rdzv-id={run_dir.name}",
            f"--rdzv-conf=is_host={str(self.number == 0).lower()}", f"--local-addr={ADDRESSES[self.number]}",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as docs/scaling.md says: else a returning host waits in vain
        }
        environment.pop("GLOO_SOCKET_IFNAME", None)  # the trainer finds the interface by itself
        command = ["ip", "netns", "exec", self.namespace, sys.executable, *launcher, *RECIPE]
        with self.log.open("a") as output:
            self.agent = subprocess.Popen(
                [*command, "--metrics.run_dir", str(run_dir)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def lose(self) -> None:
        """Kill everything on this host at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self.agent.wait()


@pytest.fixture
def hosts(tmp_path):
    """Two hosts that reach each other and nothing else."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("simulating hosts needs Linux and the program ip (package iproute2)")
    prefix = f"g{uuid.uuid4().hex[:6]}"
    pair = [Host(number, prefix, tmp_path / f"host{number}.log") for number in range(2)]
    made = []
    try:
        for host in pair:
            result = subprocess.run(["ip", "netns", "add", host.namespace], capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"simulating hosts needs permission to make network namespaces: {result.stderr.strip()}")
            made.append(host)
        try:
            ip("link", "add", pair[0].interface, "type", "veth", "peer", "name", pair[1].interface)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"simulating hosts needs virtual interfaces (veth): {error.stderr.strip()}")
        for host in pair:
            ip("link", "set", host.interface, "netns", host.namespace)
            ip("-n", host.namespace, "addr", "add", f"{ADDRESSES[host.number]}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", host.interface, "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield pair
    finally:
        for host in made:
            if host.agent is not None and host.agent.poll() is None:
                host.lose()
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def metrics(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, what, hosts, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(f"{host.log.name}:\n{host.log.read_text()[-3000:]}" for host in hosts)
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s\n{logs}"
        time.sleep(0.05)


def finish(hosts):
    """Wait for the end of the run; the first agent that fails is enough to end the test."""

    def ended():
        codes = [host.agent.poll() for host in hosts]
        assert not any(codes), "\n".join(host.log.read_text()[-3000:] for host in hosts)
        return None not in codes

    wait_until(ended, "the end of the run", hosts)


def test_a_lost_host_returns_and_the_run_ends_as_if_nothing_had_happened(hosts, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for host in hosts:
        host.start(whole, 29501)
    finish(hosts)

    for host in hosts:
        host.start(broken, 29502)
    wait_until(lambda: len(metrics(broken)) >= 4, "the fourth step", hosts)
    hosts[1].lose()
    lost_at = len(metrics(broken))
    assert lost_at < STEPS, "the host was lost too late to matter"
    hosts[1].start(broken, 29502)
    finish(hosts)

    names = ("step", "loss", "grad_norm", "reward_mean", "entropy")
    exact = [[[float(line[name]).hex() for name in names] for line in metrics(run)] for run in (whole, broken)]
    assert len(exact[0]) == STEPS
    assert exact[0] == exact[1]
    assert "resumed from" in (broken / "log.txt").read_text()
