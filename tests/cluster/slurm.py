"""A real SLURM on this machine: two nodes, each a slurmd of its own, all files and the munge key in one folder.

Nothing outside the folder is written, so that a cluster's own configuration stays as it is. The first node has the
machine's own name, which resolves; the second's is only ever a name.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"{HOST}-2")
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
START_SECONDS, POLL_SECONDS = 120, 0.2

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for the credentials of its last start to expire: two minutes by default. On a busy machine
# a start itself takes seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=20
MessageTimeout=60
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=512000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=512000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why SLURM cannot be started here, or None."""
    if os.geteuid() != 0:
        return "starting SLURM's daemons needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    try:
        socket.gethostbyname(HOST)
    except OSError:
        return f"this machine's own name, {HOST}, does not resolve"
    return None


class Slurm:
    """The cluster, its daemons and its commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Start all daemons and wait until both nodes can take jobs."""
        names = {"folder": self.folder, "host": HOST, "ports": _free_ports(3)}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**names, nodes=NODES))
        # The first version is named because slurmd starts with it where no cgroups are mounted.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        self.run("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", *(f"--{key}={self.folder}/munge.{end}" for key, end in files.items()))
        self.run("slurmctld")
        for node in NODES:
            self.run("slurmd", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() == [*NODES])

    def stop(self) -> None:
        """Cancel what runs and end the daemons that were started."""
        self.run("scancel", "--user=root", check=False)
        for name in ("slurmctld", *NODES, "munge"):
            file = self.folder / f"{name}.pid"
            pid = int(file.read_text()) if file.is_file() and file.read_text().strip() else None
            if pid is not None and _alive(pid):
                os.kill(pid, signal.SIGTERM)
                self.wait(lambda pid=pid: not _alive(pid))

    def run(self, *command: str, check: bool = True, limit_seconds: float = START_SECONDS, **variables: str) -> str:
        """Run a command of SLURM's; return what it printed."""
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=limit_seconds)
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, **variables: str) -> int:
        """Submit a job to run in the script's folder; return its number."""
        options = ("--parsable", f"--chdir={script.parent}", "--output=%j.out")
        return int(self.run("sbatch", *options, str(script), **variables))

    def job(self, number: int) -> dict[str, str]:
        """Return what SLURM knows of a job: JobState, Restarts, ExitCode, …"""
        words = self.run("scontrol", "-o", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: int, limit_seconds: float) -> dict[str, str]:
        """Wait until a job has ended for good; return what SLURM knows of it."""
        going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "PREEMPTED")
        self.wait(lambda: self.job(number)["JobState"] not in going, limit_seconds)
        return self.job(number)

    def wait(self, condition, limit_seconds: float = START_SECONDS) -> None:
        """Wait until ``condition()`` holds."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {log}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise AssertionError(f"not within {limit_seconds:g} s\n{self.run('squeue', check=False)}\n{logs}")
            time.sleep(POLL_SECONDS)


def _alive(pid: int) -> bool:
    """Whether a daemon still runs; one that has ended may wait to be reaped by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
