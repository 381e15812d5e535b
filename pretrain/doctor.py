"""``medley doctor``: what this machine has, what works, and the command that mends what does not.

Nothing here may hang: what could is tried in a process of its own, with a time limit.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pretrain.doctor_probes import Outcome, probes
from pretrain.errors import EXIT_FAILURE

DISTRIBUTION = "medley-pretrain"
OPTIONAL = {  # distribution → what it is for
    "triton": "fused kernels on a GPU",
    "wandb": "tracking",
    "trackio": "tracking",
    "flash-attn": "attention over packed rows on a GPU",
}
TIME_LIMIT = 12.0  # seconds for all probes together
LEAST_DISK, LEAST_MEMORY, LEAST_SHM = 5 << 30, 2 << 30, 256 << 20  # bytes
STALE_LOCK_SECONDS = 600  # no build of DeepSpeed's takes that long


@dataclass(frozen=True)
class Check:
    """One line of the page."""

    name: str
    status: str
    """``ok``, ``missing`` or ``broken``."""
    detail: str
    remedy: str = ""
    """The command, or the sentence, that mends it."""
    essential: bool = False
    """Whether training cannot run without it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley doctor``."""
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the page; exit with code 1 if something essential is missing or broken."""
    sections = examine()
    failed = [check for checks in sections.values() for check in checks if check.essential and check.status != "ok"]
    if args.json:
        document = {title: [dataclasses.asdict(check) for check in checks] for title, checks in sections.items()}
        print(json.dumps(document, indent=2))
    else:
        for title, checks in sections.items():
            print(title)
            for check in checks:
                print(f"  {check.status:8}{check.name:20}{check.detail}".rstrip())
                if check.remedy and check.status != "ok":
                    print(f"{'':10}→ {check.remedy}")
        names = ", ".join(check.name for check in failed)
        print(f"not ready: {names}" if failed else "ready: nothing essential is missing or broken")
    if failed:
        raise SystemExit(EXIT_FAILURE)


def examine() -> dict[str, list[Check]]:
    """Return all checks by section. Takes the time to import torch, and at most ``TIME_LIMIT`` seconds more."""
    with probes(TIME_LIMIT) as outcomes:
        cuda, devices = _devices()
        sections = {
            "Packages": list(_packages()),
            "Machine": [*devices, *_resources()],
            "Building DeepSpeed's ops": list(_build_tools(cuda)),
            "Launching": [*_launchers(), *_backends(cuda)],
            "Optional": list(_optional()),
        }
    gloo, deepspeed = outcomes
    sections["Launching"] += [
        _live("gloo all-reduce", gloo, "export GLOO_SOCKET_IFNAME=lo, or a cluster's interface"),
        _live("import deepspeed", deepspeed, "pip install --force-reinstall deepspeed"),
    ]
    return sections


def _live(name: str, outcome: Outcome, remedy: str) -> Check:
    if outcome.slow:  # says nothing against what was to be tried
        return Check(name, "broken", outcome.failure, "run medley doctor again: a second import is faster")
    return Check(name, "broken" if outcome.failure else "ok", outcome.failure or outcome.answer, remedy, essential=True)


def _requirements() -> dict[str, tuple[Requirement, bool]]:
    """Return distribution → (requirement, whether it is needed), of the installed package or of setup.py beside it."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        setup = Path(__file__).parent.parent / "setup.py"
        tree = ast.parse(setup.read_text(encoding="utf-8")) if setup.is_file() else ast.Module([], [])
        keywords = {
            word.arg: word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords
        }
        lines = ast.literal_eval(keywords["install_requires"]) if keywords else []
        extras = ast.literal_eval(keywords["extras_require"]) if keywords else {}
        lines += [f"{line}; extra == '{extra}'" for extra, members in extras.items() for line in members]
    requirements = [Requirement(line) for line in lines]
    return {item.name: (item, item.marker is None or item.marker.evaluate({"extra": ""})) for item in requirements}


def _packages() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()}, {sys.executable}", essential=True)
    try:
        yield Check("medley", "ok", metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield Check("medley", "missing", "not installed, running from the source tree", "pip install -e .")
    for requirement, needed in _requirements().values():
        if needed:
            yield _package(requirement, essential=True)


def _package(requirement: Requirement, essential: bool, purpose: str = "") -> Check:
    name, remedy = requirement.name, f'pip install "{requirement.name}{requirement.specifier}"'
    purpose = f"for {purpose}" if purpose else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", purpose, remedy, essential)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "broken", f"{version}, but {requirement.specifier} is needed", remedy, essential)
    wanted = f"({requirement.specifier})" if requirement.specifier else purpose
    return Check(name, "ok", f"{version} {wanted}".strip(), essential=essential)


def _optional() -> Iterator[Check]:
    requirements = _requirements()
    for name, purpose in OPTIONAL.items():
        requirement = requirements[name][0] if name in requirements else Requirement(name)
        yield _package(requirement, essential=False, purpose=purpose)
    try:
        status = "ok" if importlib.util.find_spec("torch.nn.attention.varlen") else "missing"
    except Exception:  # a torch that cannot be imported is told under "Machine"
        status = "missing"
    yield Check("varlen attention", status, "torch's own, used on a GPU", 'pip install "torch>=2.11"')


def _devices() -> tuple[bool, list[Check]]:
    """Return whether CUDA can be used, and the lines on GPUs and CPU."""
    try:
        import torch
    except Exception as error:  # a torch that cannot be imported can fail in any way
        reason = str(error).splitlines()[0]
        return False, [Check("torch", "broken", f"import fails: {reason}", "pip install --force-reinstall torch", True)]
    checks = []
    cuda = torch.cuda.is_available()
    if cuda:
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            memory = f"{card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}, {bf16}"
            checks.append(Check(f"GPU {i}", "ok", f"{card.name}, {memory}"))
    elif Path("/proc/driver/nvidia/version").exists():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a build for the CPU"
        )
        remedy = "install the torch build for this driver: https://pytorch.org/get-started/locally"
        checks.append(Check("GPU", "broken", f"there is an NVIDIA driver, but {built} and finds no device", remedy))
    else:
        checks.append(Check("GPU", "missing", "training will use the CPU", "use a machine with an NVIDIA GPU"))
    return cuda, [*checks, _cpu()]


def _cpu() -> Check:
    lines = [line for line in _read("/proc/cpuinfo").splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines)}
    flags = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    speed = ", ".join(flags) if flags else "no avx2"
    model = fields.get("model name") or platform.processor() or platform.machine()
    return Check("CPU", "ok", f"{model}, {cores} cores, {speed}" + ("" if "_bf16" in speed else ", bf16 is emulated"))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _resources() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    memory = min(memory, int(limit)) if limit.isdigit() else memory
    yield _room("memory", memory, LEAST_MEMORY, "ask for more memory (--mem in SLURM)")
    free = shutil.disk_usage(Path.cwd()).free
    yield _room("free disk here", free, LEAST_DISK, "free space, or put runs elsewhere: checkpoints are large")
    shm = Path("/dev/shm")
    if shm.is_dir():
        remedy = "mount -o remount,size=2G /dev/shm (for a container: --shm-size 2g)"
        yield _room("free /dev/shm", shutil.disk_usage(shm).free, LEAST_SHM, remedy)
        if stale := _unmapped(list(shm.glob("deepspeed_allreduce_buffer_*"))):
            size = sum(path.stat().st_size for path in stale) / 2**20
            detail = f"{len(stale)} files of ended DeepSpeed runs, {size:.0f} MiB of memory"
            yield Check("stale shared memory", "broken", detail, "rm " + " ".join(map(str, stale)))


def _room(name: str, size: int, least: int, remedy: str) -> Check:
    return Check(name, "ok" if size >= least else "broken", f"{size / 2**30:.1f} GiB", remedy)


def _unmapped(files: list[Path]) -> list[Path]:
    """Return those of our own files that no process has mapped."""
    mine = [path for path in files if path.stat().st_uid == os.getuid()]
    maps = "".join(_read(path) for path in Path("/proc").glob("[0-9]*/maps")) if mine else ""
    return [path for path in mine if str(path) not in maps]


def _build_tools(cuda: bool) -> Iterator[Check]:
    # on a CPU, DeepSpeed compiles its shared-memory op as soon as a process group is made
    needed = not cuda
    compiler = os.environ.get("CXX", "c++")
    yield _tool("c++ compiler", compiler, "apt install g++ (or: module load gcc; or set CXX)", needed)
    yield _tool("ninja", "ninja", "pip install ninja, and have its folder on PATH", needed)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    status = "ok" if header.is_file() else "missing"
    yield Check("Python headers", status, str(header), "apt install python3-dev (or the python3-devel package)", needed)
    if cuda:
        home = os.environ.get("CUDA_HOME")
        nvcc = f"{home}/bin/nvcc" if home else "nvcc"
        yield _tool("nvcc", nvcc, "module load cuda, or set CUDA_HOME", False)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    for lock in [*cache.glob("*/lock"), *cache.glob("*/*/lock")]:
        if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
            yield Check("build lock", "broken", "a build was cut off; later runs wait for it for ever", f"rm {lock}")


def _tool(name: str, command: str, remedy: str, essential: bool) -> Check:
    path = shutil.which(command)
    if path is None:
        return Check(name, "missing", f"{command} is not on PATH", remedy, essential)
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=3, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, "broken", f"{path}: {error}", remedy, essential)
    lines = [line for line in answer.stdout.splitlines() if line.strip()] or [""]
    version = next((line for line in lines if "release" in line), lines[0])  # nvcc's first line is its name
    return Check(name, "ok", f"{path}, {version}", essential=essential)


def _launchers() -> Iterator[Check]:
    launcher = shutil.which("deepspeed") or shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    remedy = "pip install --force-reinstall deepspeed"
    yield Check("launcher", "ok" if launcher else "missing", launcher or "deepspeed is not on PATH", remedy, True)
    found = [path for command in ("srun", "sbatch") if (path := shutil.which(command))]
    status = "ok" if len(found) == 2 else "missing"
    yield Check("SLURM", status, ", ".join(found) or "no srun, no sbatch", "log in to a cluster's head node, if meant")


def _backends(cuda: bool) -> Iterator[Check]:
    try:
        from torch import distributed
    except Exception:  # told already, under "Machine"
        return
    available = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    names = ", ".join(name for name, present in available.items() if present)
    wanted = "nccl" if cuda else "gloo"
    status = "ok" if available[wanted] else "missing"
    remedy = f"install a torch build with {wanted}: https://pytorch.org/get-started/locally"
    yield Check("torch backends", status, names or "none", remedy, essential=True)
