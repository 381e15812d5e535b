"""The report of a run."""

import json

import pytest
from matplotlib.axes import Axes

from pretrain.cli import main as medley
from pretrain.errors import UserError
from pretrain.report import report


def record(step, loss, **more):
    return {"step": step, "losses": {"mlm": loss}, "tokens_per_second": 100.0 * step, "tokens_seen": 10 * step, **more}


def write(run, records):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))


def test_losses_are_those_on_heldout_text_where_measured(tmp_path):
    write(tmp_path, [record(1, 9.0), record(2, 8.0), record(3, 7.0, heldout={"mlm": 6.0})])
    (tmp_path / "heldout-start.json").write_text(json.dumps({"mlm": 8.0}))
    text = report(tmp_path)
    assert "held-out loss" in text and "-25.0%" in text
    assert "3 steps, 30 tokens, 200 tokens/s" in text


def test_without_heldout_text_they_are_the_training_losses(tmp_path):
    write(tmp_path, [record(1, 8.0), record(2, 4.0)])
    assert "training loss" in report(tmp_path) and "-50.0%" in report(tmp_path)


def test_scores_stand_beside_the_untrained_model_and_the_baseline(tmp_path):
    write(tmp_path, [record(1, 8.0)])
    (tmp_path / "export").mkdir()
    for name, score in (("evaluation-task.json", 0.75), ("evaluation-task-untrained.json", 0.5)):
        result = {"task": "task", "mean": {"test": {"accuracy": score}}, "sd": {"test": {"accuracy": 0.01}}}
        result["baseline"] = {"name": "majority", "values": {"accuracy": 0.25}}
        (tmp_path / "export" / name).write_text(json.dumps(result))
    (tmp_path / "export" / "config.json").write_text("{}")
    text = report(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert line.split() == ["accuracy", "0.7500", "±", "0.0100", "0.5000", "±", "0.0100", "0.2500"]
    assert text.endswith(f"model: {tmp_path / 'export'}")


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is this a run folder"):
        report(tmp_path)


def test_the_picture_has_a_panel_for_each_thing_the_sampler_told(tmp_path, capsys, monkeypatch):
    told = {"alignments": {"mlm": 0.3, "cse": -0.1}, "rewards": {"all": 0.2}}
    entries = []
    for step in range(1, 8):
        losses = {("mlm", "cse")[step % 2]: 1.0 / step}  # one objective a step
        more = {"probabilities": {"mlm": 0.4, "cse": 0.6}, "sampler": told if step % 3 == 0 else {}}
        entries.append({**record(step, 0.0), "losses": losses, **more})
    entries[-1]["losses"] = {"mlm": None}  # a skipped step
    entries[-1]["heldout"] = {"mlm": 2.0}
    write(tmp_path, entries)
    drawn = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, label: drawn.append((label, len(axes.lines))))
    assert medley(["report", str(tmp_path)]) == 0
    assert drawn == [("loss", 3), ("probability", 2), ("alignments", 2), ("rewards", 1)]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report.png") in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write(tmp_path, [record(1, 8.0)])
    assert medley(["report", str(tmp_path), "--picture", str(tmp_path / "nowhere" / "a.png")]) == 2
    assert "--picture" in capsys.readouterr().err
