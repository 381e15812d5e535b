"""Every command of the README works, in its order, in a folder that holds nothing but the repository."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 400
SMALL_DEMO = {
    "DEMO_MEGABYTES": "3",
    "DEMO_RECIPE": "training.steps=6 heldout.rows=16",
    "DEMO_EVALUATE": "--seeds 2 --epochs 1 --max-train 64",
}


def commands() -> list[str]:
    """Return the lines of the README's bash blocks, without comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the repository's files, and the environment of this test's interpreter in place of a new one."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("Makefile", "setup.py", "constraints.txt", "README.md", "pretrain", "launch", "configs", "tests"):
        (place / name).symlink_to(ROOT / name)
    environment = place / "environment"
    environment.mkdir()
    (environment / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in ("installed", "installed-test"):
        (environment / stamp).touch()
    return place


def run(command: str, folder: Path) -> str:
    """Run one command of the README in a shell; return what it printed."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        **SMALL_DEMO,
        "VENV": "environment",
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=environment, text=True, capture_output=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_runs(folder):
    listed = commands()
    assert listed[:2] == ["make demo", "make test"]
    demo = run("make demo", folder)
    table = demo[demo.index("held-out loss") :]
    assert all(
        word in table for word in ("mlm", "rtd", "cse", "tokens/s", "untrained", "majority", "model: demo/run/export")
    )
    assert "pytest" in run("make -n test", folder)  # the suite does not run itself
    for command in listed[2:]:
        run(command, folder)
    assert (folder / "runs" / "electra" / "export" / "config.json").is_file()


def test_every_page_the_readme_names_exists():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name} names {target}"
