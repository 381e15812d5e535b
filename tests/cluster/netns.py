"""Two nodes on one machine: network namespaces that a virtual cable joins, each with its own name and addresses.

Only the two can be reached from within. Everything written lies in a folder of the caller's; ``stop`` leaves no
process, namespace or device behind. Needs root, and ``ip`` and ``tc`` of iproute2.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICE, PORT = "eth0", 29500
ADDRESSES = ("10.99.0.1", "10.99.0.2")
END_SECONDS = 30
_PROGRAMS = ("ip", "tc", "unshare", "mount")
_SETTLED = """\
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
shift 2
exec "$@"
"""


def missing() -> str | None:
    """Return why namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (iproute2, util-linux)"
    probe = f"medley-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


@dataclass(frozen=True)
class Traffic:
    """Bytes that a node has sent and received through its cable, headers of all layers with them."""

    sent: int
    received: int

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(self.sent - before.sent, self.received - before.received)


class Nodes:
    """Two nodes, 0 and 1; use as a context.

    Args:
        folder: for files of the nodes' own; exists.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = tuple(f"medley-{os.getpid()}-{number}" for number in (0, 1))
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Nodes":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> None:
        """Make both namespaces and the cable."""
        hosts = ["127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, self.names, strict=True))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")  # else every name waits for a name server
        for name in self.names:
            _run("ip", "netns", "add", name)
        first, second = self.names
        peer = ("peer", "name", DEVICE, "netns", second)
        _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", *peer)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")

    def stop(self) -> None:
        """End what was started on the nodes, and undo ``start``, as far as it came."""
        existing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
        for name in (each for each in self.names if each in existing):
            for pid in _run("ip", "netns", "pids", name).split():
                _run("kill", "-KILL", pid, check=False)  # it may have ended by itself
        for process in self._processes:
            process.wait(END_SECONDS)
        self._processes.clear()
        for name in (each for each in self.names if each in existing):
            _run("ip", "-n", name, "link", "del", DEVICE, check=False)  # went with the other node's end
            _run("ip", "netns", "del", name)

    def run(self, node: int, command: list[str], output: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a node, from the root of the repository; what it prints goes to a file."""
        within = ["ip", "netns", "exec", self.names[node], "unshare", "--mount", "--uts", "--propagation", "private"]
        settled = ["sh", "-c", _SETTLED, "sh", self.names[node], str(self.folder)]
        with open(output, "w") as file:
            process = subprocess.Popen(
                [*within, *settled, *command],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def train(self, output: Path, *arguments: str) -> list[subprocess.Popen]:
        """Start a training run of two ranks, one a node; rank N prints to ``output/rank-N.txt``."""
        command = [sys.executable, "launch/train.py", *arguments]
        return [self.run(rank, command, output / f"rank-{rank}.txt", **variables(rank)) for rank in (0, 1)]

    def cut(self) -> None:
        """Cut the cable: nothing gets through any more, and nobody is told."""
        _run("ip", "-n", self.names[0], "link", "set", DEVICE, "down")

    def mend(self) -> None:
        """Undo ``cut``."""
        _run("ip", "-n", self.names[0], "link", "set", DEVICE, "up")


def traffic(name: str | None = None) -> Traffic:
    """Return what a node has sent and received since it was made: by its name, or that this process runs on."""
    told = json.loads(_run("ip", *_on(name), "-j", "-s", "link", "show", "dev", DEVICE))
    counters = told[0]["stats64"]
    return Traffic(counters["tx"]["bytes"], counters["rx"]["bytes"])


def limit(bits_per_second: float | None, name: str | None = None) -> None:
    """Let a node, by its name, or that this process runs on, send so much and no more; None: whatever it can."""
    _run("tc", *_on(name), "qdisc", "del", "dev", DEVICE, "root", check=False)  # there may be none
    if bits_per_second is not None:
        bucket = max(64_000, int(bits_per_second / 8 / 100))  # bytes; what passes in a hundredth of a second
        shape = ("rate", f"{bits_per_second:.0f}bit", "burst", str(bucket), "latency", "400ms")
        _run("tc", *_on(name), "qdisc", "add", "dev", DEVICE, "root", "tbf", *shape)


def _on(name: str | None) -> tuple[str, ...]:
    return ("-n", name) if name else ()


def variables(rank: int) -> dict[str, str]:
    """Return the environment of one of two ranks, each alone on its node."""
    ours = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
    fixed = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": DEVICE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {**{name: str(value) for name, value in ours.items()}, **fixed}


def _run(*command: str, check: bool = True) -> str:
    """Run a command of the system's; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
