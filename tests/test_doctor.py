import argparse
import json
import os
import select
import subprocess
import sys
import time

import pytest
from packaging.requirements import Requirement

from pretrain import doctor
from pretrain.cli import main
from pretrain.doctor_probes import Outcome, finish, start


@pytest.fixture(scope="module")
def sections() -> dict[str, list[doctor.Check]]:
    """The real checks of this machine, with time to spare for a busy one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "TIME_LIMIT", 120.0)
        return doctor.examine()


def test_the_page_mentions_what_training_needs_and_finds_it_here(sections):
    found = {check.name: check for checks in sections.values() for check in checks}
    for name in ("python", "torch", "deepspeed", "transformers", "launcher", "torch backends", "import deepspeed"):
        assert found[name].status == "ok", found[name]
    assert found["gloo all-reduce"].detail == "two processes agree"
    assert {"CPU", "memory", "free disk here", "SLURM", "triton", "wandb", "flash-attn"} <= found.keys()
    assert all(check.remedy for check in found.values() if check.status != "ok")


def test_an_empty_path_is_a_missing_compiler_with_its_remedy(sections, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    tools = list(doctor._build_tools(cuda=False))
    monkeypatch.setattr(doctor, "examine", lambda: {**sections, "Building DeepSpeed's ops": tools})
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    page = capsys.readouterr().out
    assert "missing c++ compiler" in page
    assert "→ apt install g++" in page
    assert page.splitlines()[-1].startswith("not ready: c++ compiler, ninja")


def test_on_a_gpu_a_missing_compiler_is_told_but_not_essential(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    tools = {check.name: check for check in doctor._build_tools(cuda=True)}
    assert tools["nvcc"].status == tools["c++ compiler"].status == "missing"
    assert not any(check.essential for check in tools.values())


def test_json_holds_the_same_checks(sections, monkeypatch, capsys):
    healthy = {"Machine": [doctor.Check("CPU", "ok", "one"), doctor.Check("GPU", "missing", "none", "buy one")]}
    monkeypatch.setattr(doctor, "examine", lambda: healthy)
    doctor.run(argparse.Namespace(json=True))
    assert [check["name"] for check in json.loads(capsys.readouterr().out)["Machine"]] == ["CPU", "GPU"]


def test_versions_are_held_against_their_ranges():
    assert doctor._package(Requirement("pytest>=1"), essential=True).status == "ok"
    broken = doctor._package(Requirement("pytest<1"), essential=True)
    assert (broken.status, broken.remedy) == ("broken", 'pip install "pytest<1"')
    assert doctor._package(Requirement("no-such-distribution-here>2"), essential=False).status == "missing"


def test_without_an_installation_the_ranges_come_from_setup_py(monkeypatch):
    def not_installed(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", not_installed)
    requirements = doctor._requirements()
    assert requirements["torch"][1]
    assert requirements["deepspeed"][0].specifier.contains("0.19.8")
    assert not requirements["wandb"][1]


def test_a_probe_that_hangs_is_killed_with_its_children():
    nap = "[sys.executable, '-c', 'import time; time.sleep(90)'], stdout=-3, stderr=-3"
    process = start(f"import subprocess, sys; p = subprocess.Popen({nap}); print(p.pid, file=sys.stderr); p.wait()")
    child = os.pidfd_open(int(process.stderr.readline()))
    slow = finish(process, time.monotonic())
    assert (slow.slow, process.returncode) == (True, -9)
    assert select.select([child], [], [], 30)[0] == [child]  # readable once the process has ended
    os.close(child)


def test_a_probe_slow_in_its_imports_is_not_an_essential_failure():
    check = doctor._live("import deepspeed", Outcome("", "imports too slow", slow=True), "")
    assert (check.status, check.essential) == ("broken", False)


def test_a_probe_that_hangs_after_its_imports_is_an_essential_failure():
    process = start("import time; print('imported', flush=True); time.sleep(90)")
    select.select([process.stdout], [], [], 60)
    outcome = finish(process, time.monotonic())
    assert (outcome.slow, outcome.answer) == (False, "imported")
    check = doctor._live("gloo all-reduce", outcome, "export")
    assert (check.status, check.essential) == ("broken", True)


def test_a_failing_probe_tells_the_last_line_of_its_error():
    assert (
        finish(start("raise ValueError('no such link')"), time.monotonic() + 60).failure == "ValueError: no such link"
    )
    assert finish(start("import os; os._exit(3)"), time.monotonic() + 60).failure == "exit code 3"
    assert finish(start("print('first'); print('last')"), time.monotonic() + 60).answer == "last"


def test_only_files_that_no_process_maps_are_stale(tmp_path):
    mapped, stale = tmp_path / "deepspeed_mapped", tmp_path / "deepspeed_stale"
    for path in (mapped, stale):
        path.write_bytes(bytes(4096))
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print('ok', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(mapped)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        assert doctor._unmapped([mapped, stale]) == [stale]
        holder.communicate("\n")
    assert doctor._unmapped([]) == []
