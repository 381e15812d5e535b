"""Job scripts for SLURM: what ``medley slurm`` prints, and what the script does on signals (stubs stand for SLURM)."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from pretrain.cli import main
from pretrain.config import apply_overrides
from pretrain.errors import UserError
from pretrain.slurm import TEMPLATE, seconds

ROOT = Path(__file__).parents[1]
LAUNCH = TEMPLATE.with_name("launch.sh")
LIMIT_SECONDS = 60
RUN = "it's a \"run\\"
"""A folder whose name means something to shells and to YAML."""
BASE = ["configs/recipes/base.yaml", "training.micro_batch_rows=8"]

# What stands for SLURM: srun runs rank 1 of 3 on the spot, scontrol names two nodes, and the rest is noted.
STUBS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; export SLURM_PROCID=1 SLURM_LOCALID=0; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"; [ "$1" != show ] || printf "node7\\nnode9\\n"',
    "sbatch": 'echo "sbatch $*" >>"$CALLS"; echo "$(wc -l <"$CALLS");cluster"',
    "deepspeed": 'echo "deepspeed $*" >>"$CALLS"; cat hostfile-* >>"$CALLS"',
}
# What stands for training: it says that it has begun, and ends as it is told once a signal has come that it ends on.
RANK = """\
trap '' USR1
trap 'stop=1' ${ENDS_ON:-USR1 TERM}
echo "rank $RANK/$WORLD_SIZE local $LOCAL_RANK master $MASTER_ADDR:$MASTER_PORT threads $OMP_NUM_THREADS"
printf '<%s>' "$@"; echo
echo begun
[ -z "${MISTAKEN:-}" ] || touch "$MEDLEY_MISTAKE"
[ -z "${SAVES:-}" ] || { mkdir -p "$RUN/checkpoints"; echo "$SAVES" >"$RUN/checkpoints/latest"; }
while [ -z "${stop:-}" ] && [ "${WAIT:-1}" = 1 ]; do read -r -t 0.1 <>"$PIPE"; done
exit "${CODE:-0}"
"""


@pytest.fixture
def cluster(tmp_path):
    """Return a folder with the stubs on the environment's PATH, and that environment."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {**STUBS, "rank": RANK}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "calls").touch()
    script = (
        TEMPLATE.read_text()
        .replace("\npython=python\n", "\npython=rank\n")
        .replace("\nrun=runs/base\n", f"\nrun={shlex.quote(RUN)}\n")
    )
    (tmp_path / "job.sbatch").write_text(script)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP"))}
    variables = {"RUN": RUN, "CALLS": str(tmp_path / "calls"), "PIPE": str(tmp_path / "pipe")}
    return tmp_path, {**clean, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}


JOB = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "5"}


def run_job(cluster, *arguments: str, send: tuple[int, ...] = (), **variables: str) -> tuple[int, str, str]:
    """Run the script as a job, send it signals once its rank has begun; return exit code, output, SLURM's orders."""
    folder, environment = cluster
    process = subprocess.Popen(
        ["bash", "job.sbatch", *arguments],
        cwd=folder,
        env={**environment, **JOB, "WAIT": str(len(send)), **variables},
        text=True,
        stdout=subprocess.PIPE,
    )
    output = ""
    while "begun" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    ranks = psutil.Process(process.pid).children()
    for number in send:
        process.send_signal(number)
        if number == signal.SIGTERM:  # SLURM sends it to the ranks as well
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.terminate()
    output += process.communicate(timeout=LIMIT_SECONDS)[0]
    return process.returncode, output, (folder / "calls").read_text()


def test_ranks_find_each_other_by_slurms_variables(cluster):
    code, output, calls = run_job(cluster)
    assert code == 0
    assert "rank 1/3 local 0 master node7:20123 threads 5" in output
    assert "<-u><launch/train.py><--ds_config><configs/ds/zero2-bf16.json>" in output
    (run,) = re.findall("<(run=.*?)>", output)
    assert apply_overrides({}, [run]) == {"run": RUN}
    assert calls == "scontrol show hostnames node[7,9]\n"


def test_a_seed_of_an_array_has_its_own_run(cluster):
    _, output, _ = run_job(cluster, SLURM_ARRAY_TASK_ID="7")
    (run,) = re.findall("<seed=7><(run=.*?)>", output)
    assert apply_overrides({}, [run]) == {"run": f"{RUN}/seed-7"}


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_job_that_was_warned_goes_back_into_the_queue_whatever_its_ranks_exit_code(cluster, code):
    done, _, calls = run_job(cluster, send=(signal.SIGUSR1,), CODE=str(code))
    assert done == 0 and calls.splitlines()[1:] == ["scontrol requeue 40123"]


def test_a_users_mistake_does_not_go_back_into_the_queue(cluster):
    done, _, calls = run_job(cluster, send=(signal.SIGUSR1,), CODE="2")
    assert done == 2 and "requeue" not in calls


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_is_done_or_a_mistake_does_not_go_back_into_the_queue(cluster, code):
    done, _, calls = run_job(cluster, CODE=str(code))
    assert done == code and "requeue" not in calls


def test_a_mistake_in_one_rank_is_one_whatever_exit_code_srun_has(cluster):
    done, _, calls = run_job(cluster, CODE="143", MISTAKEN="1")
    assert done == 2 and "requeue" not in calls
    assert not list(cluster[0].glob(".mistake-*"))


@pytest.mark.parametrize("send", [(), (signal.SIGUSR1,)], ids=["failed", "warned"])
def test_a_job_that_comes_to_nothing_is_tried_again_thrice_in_a_row(cluster, send):
    codes = {"CODE": "137"}
    for saves in ("", "", "step-00000007", "", "", ""):
        done, output, calls = run_job(cluster, send=send, SAVES=saves, **codes)
        assert done == 0 and calls.endswith("scontrol requeue 40123\n") and "exit code 137" in output
    before = (cluster[0] / "calls").read_text().count("requeue")
    done, _, calls = run_job(cluster, send=send, **codes)
    assert done == 137 and calls.count("requeue") == before
    assert not list(cluster[0].glob(".vain-*"))


def test_a_job_of_a_chain_that_fails_ends_the_chain(cluster):
    done, _, calls = run_job(cluster, "chained", CODE="137")
    assert done == 137 and "requeue" not in calls


@pytest.mark.parametrize(
    "send", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)], ids=str
)
def test_a_cancelled_job_does_not_go_back_into_the_queue(cluster, send):
    _, _, calls = run_job(cluster, send=send, ENDS_ON="TERM")  # not before the last signal was sent
    assert "requeue" not in calls


def test_a_job_that_may_not_requeue_fails_and_says_so(cluster):
    (cluster[0] / "bin" / "scontrol").write_text("#!/bin/bash\n[ $1 = show ]\n")
    assert run_job(cluster, send=(signal.SIGUSR1,))[0] == 1


def test_a_job_of_a_chain_leaves_going_on_to_the_next(cluster):
    done, _, calls = run_job(cluster, "chained", send=(signal.SIGUSR1,), CODE="143")
    assert done == 0 and "requeue" not in calls


@pytest.mark.parametrize(("array", "dependency"), [("##SBATCH --array=", "afterok"), ("#SBATCH --array=", "aftercorr")])
def test_a_chain_is_submitted_one_after_another(cluster, array, dependency):
    folder, environment = cluster
    script = folder / "job.sbatch"
    script.write_text(script.read_text().replace("##SBATCH --array=", array).replace("\nchain=1\n", "\nchain=3\n"))
    subprocess.run(["bash", "job.sbatch"], cwd=folder, env=environment, check=True, timeout=LIMIT_SECONDS)
    options = "sbatch --parsable --kill-on-invalid-dep=yes"
    assert (folder / "calls").read_text().splitlines() == [
        f"{options} job.sbatch chained",
        f"{options} --dependency={dependency}:1 job.sbatch chained",
        f"{options} --dependency={dependency}:2 job.sbatch chained",
    ]


def test_the_deepspeed_launcher_gets_a_hostfile_of_the_allocation(cluster):
    folder, environment = cluster
    variables = {**environment, **JOB, "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_NODEID": "1"}
    subprocess.run([LAUNCH, "--config", "a b"], cwd=folder, env=variables, check=True, timeout=LIMIT_SECONDS)
    _, order, *hosts = (folder / "calls").read_text().splitlines()
    assert order.startswith("deepspeed --no_ssh --node_rank 1 --hostfile ")
    assert "--master_addr node7 --master_port 20123" in order and order.endswith("train.py --config a b")
    assert hosts == ["node7 slots=4", "node9 slots=4"]
    assert not list(folder.glob("hostfile-*"))


def test_the_deepspeed_launcher_outside_an_allocation_is_refused(cluster):
    done = subprocess.run([LAUNCH], cwd=cluster[0], env=cluster[1], text=True, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", [TEMPLATE, LAUNCH], ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", script], check=True)


def printed(capsys, *arguments: str) -> str:
    """Return the script that the command prints."""
    assert main(["slurm", *arguments]) == 0
    return capsys.readouterr().out


def test_the_printed_script_is_the_file_with_its_settings_filled_in(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = [
        "--nodes",
        "4",
        "--gpus",
        "8",
        "--cpus-per-gpu",
        "11",
        "--time",
        "1-12",
        "--partition",
        "long",
        "--mem",
        "0",
    ]
    script = printed(capsys, *options, "--array", "0-2", "--chain", "3", *BASE, "run=runs/my run", "data.store=a b")
    for line in (
        "#SBATCH --job-name=base",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=11",
        "#SBATCH --time=1-12",
        "#SBATCH --partition=long",
        "##SBATCH --account=NAME",
        "#SBATCH --mem=0",
        "#SBATCH --array=0-2",
        f"#SBATCH --chdir={ROOT}",
        "run='runs/my run'",
        "overrides=(training.micro_batch_rows=8 'data.store=a b')",
        "chain=3",
    ):
        assert line in script.splitlines()
    own = TEMPLATE.read_text()
    assert script[script.index("\nset -u") :] == own[own.index("\nset -u") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_without_options_the_printed_settings_are_the_files_own(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = re.findall(r"^#SBATCH.*", TEMPLATE.read_text(), re.MULTILINE)
    lines = printed(capsys, BASE[0]).splitlines()
    assert set(options) - {"#SBATCH --job-name=medley"} < set(lines)


def test_without_gpus_a_job_asks_for_none(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = printed(capsys, "--gpus", "0", "--tasks-per-node", "2", BASE[0])
    assert "\n#SBATCH --gpus" not in script and "\n#SBATCH --ntasks-per-node=2\n" in script and "cpu.json" in script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*BASE, "--nodes", "3"], ["base.yaml", "training.batch_rows", "8 × 24", "192"]),
        ([*BASE, "--nodes", "0"], ["--nodes", "at least 1"]),
        (["configs/recipes/bose.yaml"], ["no such file", "base.yaml"]),
        ([BASE[0], "training.stepz=1"], ["training.stepz", "steps"]),
        ([*BASE, "--ds_config", "no/such.json"], ["no/such.json"]),
        ([*BASE, "--time", "4"], ["--time", "--save-before"]),
        ([*BASE, "--time", "tomorrow"], ["--time", "tomorrow"]),
        ([*BASE, "--array", "a-b"], ["--array", "a-b"]),
        ([*BASE, "seed=3", "--array", "0-2"], ["seed", "--array"]),
        ([*BASE, "--tasks-per-node", "4"], ["--tasks-per-node", "--gpus"]),
        ([*BASE, 'run="a\\nb"'], ["base.yaml", "run: 'a\\nb'", "cannot pass on"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = [word for word in arguments if "=" not in word]
    assert main(["slurm", *options[1:], options[0], *(word for word in arguments if "=" in word)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("7", 420), ("7:30", 450), ("2:07:30", 7650), ("1-2", 93600), ("1-2:07", 94020), ("1-2:07:30", 94050)],
)
def test_limits_are_read_as_slurm_reads_them(time, expected):
    assert seconds(time) == expected


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(UserError, match="--time"):
        seconds("")
