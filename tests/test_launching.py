"""``medley launch``: every rank is told, none is left behind, and what failed is started again, but for mistakes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain import launching
from pretrain.cli import main
from pretrain.launching import Launcher

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 60

# What stands for training: notes that it was started, waits for a signal if told to, and ends with a code of its own.
RANK = """\
import os, signal, sys, time
signal.alarm(60)  # should nobody end it
rank, folder = os.environ["RANK"], sys.argv[1]
start = len([name for name in os.listdir(folder) if name.startswith(f"rank-{rank}-")])
stop = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))
names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open(f"{folder}/rank-{rank}-{start}", "w") as file:
    print(*(os.environ[name] for name in names), os.getsid(0) == os.getpid(), os.environ["MEDLEY_RESTART"], file=file)
sys.stdout.write(f"begun {rank}\\n")  # in one piece: both ranks write to one pipe
sys.stdout.flush()
while f"wait{rank}" in sys.argv and not stop:
    signal.pause()
if f"late{rank}" in sys.argv:
    time.sleep(0.5)
    print(f"rank {rank} ends", flush=True)
if stop:
    sys.stdout.write(f"rank {rank} heard {stop[0]}\\n")
    sys.stdout.flush()
codes = [word.split("=")[1].split(",") for word in sys.argv if word.startswith(f"codes{rank}=")]
code = int((codes[0][start:] or ["0"])[0]) if codes else 0
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@pytest.fixture
def command(tmp_path):
    """Return what makes a launcher's command of words for the ranks, and the folder they write in."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "out").mkdir()
    return lambda *words: [sys.executable, "-S", str(tmp_path / "rank.py"), str(tmp_path / "out"), *words]


def start_launcher(command: list[str], restarts: int = 0) -> subprocess.Popen:
    """Start a launcher of two ranks in a process of its own; return when both have begun."""
    arguments = f"{command!r}, 2, {restarts}"
    program = f"import sys; from pretrain.launching import Launcher; sys.exit(Launcher({arguments}).run())"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert {process.stdout.readline().strip() for _ in range(2)} == {"begun 0", "begun 1"}
    return process


def starts(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_ranks_find_each_other(command, tmp_path):
    assert Launcher(command(), 3).run() == 0
    assert starts(tmp_path) == ["rank-0-0", "rank-1-0", "rank-2-0"]
    lines = [(tmp_path / "out" / f"rank-{rank}-0").read_text().split() for rank in range(3)]
    assert [line[:4] for line in lines] == [[str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[4] for line in lines}) == 1
    assert {line[5] for line in lines} == {"True"}  # in sessions of their own, out of a terminal's reach


@pytest.mark.parametrize(("code", "told"), [(-9, "was killed by SIGKILL"), (1, "failed with exit code 1")])
def test_ranks_that_fail_are_started_again(command, tmp_path, capfd, code, told):
    assert Launcher(command(f"codes1={code},{code}"), 2, restarts=2).run() == 0
    assert starts(tmp_path) == [f"rank-{rank}-{start}" for rank in range(2) for start in range(3)]
    numbers = [(tmp_path / "out" / f"rank-0-{start}").read_text().split()[-1] for start in range(3)]
    assert numbers == ["0", "1", "2"]  # the ranks know that they shall go on
    assert f"launch: rank 1 {told}; starting again (1 of 2)" in capfd.readouterr().err


def test_a_run_that_goes_on_failing_fails(command, tmp_path):
    assert Launcher(command("codes0=1,1,1"), 1, restarts=2).run() == 1
    assert len(starts(tmp_path)) == 3


def test_the_rank_that_was_killed_is_named_and_not_those_that_failed_of_it(command, capfd):
    assert Launcher(command("codes0=1", "codes1=-9"), 2, restarts=1).run() == 0
    assert "launch: rank 1 was killed by SIGKILL; starting again" in capfd.readouterr().err


def test_ranks_may_end_by_themselves_after_another_has_failed(command, capfd):
    assert Launcher(command("codes0=1", "late1"), 2).run() == 1
    assert "rank 1 ends" in capfd.readouterr().out


@pytest.mark.parametrize("code", [1, 2])
def test_a_users_mistake_is_not_tried_again(command, tmp_path, code):
    assert Launcher(command(f"codes0={code}", "codes1=2"), 2, restarts=5).run() == 2
    assert starts(tmp_path) == ["rank-0-0", "rank-1-0"]


def test_a_rank_that_does_not_end_after_another_has_failed_is_killed(command, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.0)
    assert Launcher(command("wait0", "codes1=1"), 2).run() == 1
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda each: each.name)
def test_a_signal_reaches_all_ranks_and_their_end_is_waited_for(command, tmp_path, number):
    process = start_launcher(command("wait0", "wait1"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert sorted(output.splitlines()) == [f"rank {rank} heard {number.name}" for rank in range(2)]
    assert process.returncode == 0 and len(starts(tmp_path)) == 2


def test_a_run_that_was_told_to_stop_is_not_started_again_whatever_its_end(command, tmp_path):
    process = start_launcher(command("wait0", "wait1", "codes0=1"), restarts=3)
    process.terminate()
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1 and len(starts(tmp_path)) == 2


def test_a_signal_between_two_starts_reaches_all_ranks(command, tmp_path, monkeypatch, capfd):
    start = Launcher._start

    def interrupted(launcher: Launcher, rank: int, *others: int) -> subprocess.Popen:
        process = start(launcher, rank, *others)
        while not (tmp_path / "out" / f"rank-{rank}-0").exists():
            time.sleep(0.01)
        if rank == 0:
            signal.raise_signal(signal.SIGUSR1)
        return process

    monkeypatch.setattr(Launcher, "_start", interrupted)
    assert Launcher(command("wait0", "wait1"), 2).run() == 0
    assert capfd.readouterr().out.count("heard SIGUSR1") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell processes of their parent's end")
def test_ranks_are_told_to_end_when_the_launcher_is_killed(command):
    process = start_launcher(command("wait0", "wait1"))
    process.kill()
    assert sorted(process.stdout.read().splitlines()) == ["rank 0 heard SIGTERM", "rank 1 heard SIGTERM"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "--ranks: must be at least 1, not 0"),
        (["--restarts", "-1"], "--restarts: must be at least 0, not -1"),
        (["--script", "no/such.py"], "--script: no such file: no/such.py"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments, words, capsys):
    assert main(["launch", *arguments]) == 2
    assert capsys.readouterr().err == f"medley launch: error: {words}\n"


def test_arguments_of_the_script_are_passed_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; open({str(tmp_path / 'argv')!r}, 'w').write(repr(sys.argv[1:]))")
    arguments = ["--ds_config", "a b", "--resume", "never", "training.steps=3"]
    assert main(["launch", "--ranks", "1", "--script", str(script), "--", *arguments]) == 0
    assert (tmp_path / "argv").read_text() == repr(arguments)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
