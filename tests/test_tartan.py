"""The command that does both stages of TARTAN."""

import json

import pytest

from pretrain import cli, tartan
from pretrain.export import export
from pretrain.report import report
from tests.objectives.builders import write_task
from tests.training.runs import DS, metrics, recipe, train, write_corpus

SMALL = ["training.batch_rows=8", "training.micro_batch_rows=8", "training.steps=6", "stopping.interval_steps=2"]
SMALL += ["heldout.rows=0", "checkpoint.interval_steps=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, a task, and a BERT pre-trained on the corpus for one step."""
    folder = tmp_path_factory.mktemp("made")
    corpus, task = write_corpus(folder / "corpus"), write_task(folder / "letters", dev=21)
    assert train(recipe(corpus, folder / "run", objectives={"mlm": {}}, sampler={}, training__steps=1))[0] == 0
    return corpus, task, export(folder / "run", folder / "model")


def command(made, out, *more: str) -> list[str]:
    corpus, task, model = map(str, made)
    ds = ["--ds_config", str(DS / "zero0.json"), "--epochs", "2"]
    return ["tartan", "--task", task, "--corpus", corpus, "--model", model, "--out", str(out), *ds, *more, *SMALL]


def test_both_stages_are_done_once_and_reported(made, tmp_path, capsys, monkeypatch):
    out, more = tmp_path / "run", ("--seed", "3", "--metric", "macro_f1")
    meta = ["sampler.dev_samples=8", "sampler.head_samples=4"]
    assert cli.main([*command(made, out, *more), *meta]) == 0
    shown = capsys.readouterr().out
    assert "meta_tartan, seed 3: 6 steps, best " in shown and "macro_f1 *" in shown
    result = json.loads((out / "evaluation-letters.json").read_text())
    joint = result["joint"]
    scores = {record["step"]: record["dev"]["macro_f1"] for record in metrics(out) if "dev" in record}
    assert list(scores) == [2, 4, 6] and joint["dev"] == max(scores.values()) == scores[joint["best_step"]]
    assert f"| steps | {joint['best_step']} |" in (out / "export" / "README.md").read_text()
    assert [run["seed"] for run in result["runs"]] == [3] and not any("head" in note for note in result["notes"])
    assert (result["metric"], result["settings"]["lr"], result["settings"]["patience"]) == ("macro_f1", 5e-6, 3)
    assert "letters, test" in report(out)

    monkeypatch.setattr(tartan, "evaluate", None)  # done, and not to be done again
    assert cli.main([*command(made, out, *more), *meta]) == 0
    assert "macro_f1 *" in capsys.readouterr().out and len(metrics(out)) == 6


def test_a_joint_stage_that_was_stopped_is_gone_on_with(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("pretrain.training.stop.StopRequest.requested", True)
        assert cli.main(command(made, out, "--method", "mt")) == 0
    assert "the joint stage is not done" in capsys.readouterr().out and not (out / "export").exists()
    assert cli.main(command(made, out, "--method", "mt")) == 0
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert set(metrics(out)[-1]["plan"].values()) == {1 / 3}
    assert "mt_tartan, seed 0: 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--task", "nowhere/at/all"], "objectives.end_task.task: nowhere/at/all: no such folder"),
        (["--lr", "7"], "--lr 7.0"),
        (["--metric", "f1"], "stopping.metric: unknown metric 'f1'"),
        (["stopping.interval_steps=0"], "stopping.interval_steps: the last stage begins at the best step"),
    ],
)
def test_mistakes_are_told_in_the_last_line_before_anything_is_done(made, tmp_path, capsys, more, reason):
    options, keys = ([], more) if "=" in more[0] else (more, [])
    try:
        code = cli.main([*command(made, tmp_path / "run", "--method", "mt", *options), *keys])
    except SystemExit as left:
        code = left.code
    assert code == 2 and reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
