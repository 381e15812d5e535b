"""What a run tells."""

import importlib.machinery
import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.errors import UserError
from pretrain.training.log import RunLog, check_trackers, peak_flops, read_metrics


def record(step, loss=2.0, **more):
    fields = {"step": step, "loss": loss, "losses": {"mlm": loss}, "lr": 1e-3, "grad_norm": 1.5, "tokens": 100}
    return {**fields, "seconds": 0.5, "mfu": None, **more}


def open_log(run, *, first_step=0, trackers=(), interval_steps=2):
    run.mkdir(exist_ok=True)
    keys = {"steps": 9, "interval_steps": interval_steps, "trackers": list(trackers), "settings": {"seed": 1}}
    return RunLog(run, first_step=first_step, **keys)


def test_every_step_is_a_line_and_a_status_line_comes_at_intervals(tmp_path, capsys):
    log = open_log(tmp_path / "run")
    for step in (1, 2, 3):
        log.step(record(step))
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("step 2/9 | loss 2.0000 | mlm 2.0000")
    assert "200 tokens/s" in lines[0] and "eta 0:00:03" in lines[0]


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path, capsys):
    log = open_log(tmp_path / "run", interval_steps=1)
    log.step(record(1, math.nan, losses={"mlm": math.inf}, grad_norm=None))
    log.close()
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["loss"] is None and entry["losses"] == {"mlm": None}
    assert "skipped" in capsys.readouterr().out


def test_steps_that_will_be_repeated_are_cut_off(tmp_path):
    log = open_log(tmp_path / "run")
    for step in (1, 2, 3):
        log.step(record(step))
    log.close()
    open_log(tmp_path / "run", first_step=2).close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    log = open_log(tmp_path / "run")
    log.step(record(1, 3.0))
    log.step(record(2, 2.5))
    log.close()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("losses/mlm")] == [(1, 3.0), (2, 2.5)]


def test_trackers_get_the_settings_and_every_number(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: logged.append("end")
    )
    fake = types.ModuleType("trackio")
    fake.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    fake.init = lambda **keys: logged.append(keys) or run
    monkeypatch.setitem(sys.modules, "trackio", fake)
    check_trackers(["trackio"])
    log = open_log(tmp_path / "run", trackers=["trackio"])
    log.step(record(1))
    log.close()
    assert logged[0] == {"project": "medley", "name": "run", "config": {"seed": 1}}
    assert logged[1][0] == 1 and logged[1][1]["losses/mlm"] == 2.0
    assert logged[2] == "end"


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_the_peak_of_a_known_gpu_is_found_by_its_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40") is None  # not an L4
