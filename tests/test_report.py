"""The report of a run."""

import json

import pytest

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
