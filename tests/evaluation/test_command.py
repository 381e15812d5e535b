import json
import shutil
import sys
import types

import pytest

from pretrain.cli import main

QUICK = ["--epochs", "1", "--seeds", "1", "--max-train", "21", "--max-length", "16"]


def evaluate(*args) -> int:
    return main(["evaluate", *map(str, args)])


def test_table_and_json_tell_the_same_scores(tiny_bert, sentiment, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert evaluate(tiny_bert, "--task", sentiment, "--out", out, "--seeds", 2, *QUICK[:2], *QUICK[4:]) == 0
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out
    mean, sd = result["mean"]["test"]["accuracy"], result["sd"]["test"]["accuracy"]
    row = next(line for line in printed.splitlines() if line.startswith("accuracy *"))
    assert f"{mean:.4f} ± {sd:.4f}" in row
    assert row.endswith(f"{result['baseline']['values']['accuracy']:.4f}")
    assert result["settings"]["seeds"] == len(result["runs"]) == 2
    assert result["versions"]["torch"]


def test_one_seed_has_no_spread_and_the_control_has_its_own_file(tiny_bert, sentiment, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    assert evaluate(model, "--task", sentiment, *QUICK) == 0
    assert evaluate(model, "--task", sentiment, *QUICK, "--untrained") == 0
    printed = capsys.readouterr().out
    assert "± n/a" in printed
    assert "nan" not in printed.lower()
    trained = json.loads((model / "evaluation-sentiment.json").read_text())
    control = json.loads((model / "evaluation-sentiment-untrained.json").read_text())
    assert trained["sd"]["test"]["accuracy"] is None
    assert (trained["settings"]["untrained"], control["settings"]["untrained"]) == (False, True)


@pytest.mark.parametrize("marker", ["checkpoints/step-00000010/manifest.json", "manifest.json"])
def test_a_run_or_checkpoint_is_exported_first(marker, tiny_bert, sentiment, tmp_path, monkeypatch):
    def export(checkpoint, out):
        asked.append(checkpoint)
        return shutil.copytree(tiny_bert, out)

    asked = []
    monkeypatch.setitem(sys.modules, "pretrain.export", types.SimpleNamespace(export=export))
    run = tmp_path / "run"
    (run / marker).parent.mkdir(parents=True)
    (run / marker).write_text("{}")
    assert evaluate(run, "--task", sentiment, *QUICK) == 0
    assert asked == [run]
    assert (run / "evaluation-sentiment.json").is_file()


def test_mistakes_are_one_line_and_exit_code_2(tiny_bert, sentiment, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "no model: no config.json": [empty, "--task", sentiment],
        "no such folder": [tmp_path / "nowhere", "--task", sentiment, "--out", tmp_path / "o.json"],
        "did you mean 'cola'": [tiny_bert, "--task", "colla"],
        "cannot be written": [tiny_bert, "--task", sentiment, "--out", tmp_path / "no" / "folder" / "o.json"],
        "--batch 0": [tiny_bert, "--task", sentiment, "--batch", 0],
        "no field 'txt'": [tiny_bert, "--task", sentiment, "--text-field", "txt"],
    }
    for expected, args in cases.items():
        assert evaluate(*args) == 2, expected
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1
        assert lines[0].startswith("medley evaluate: error: ")
        assert expected in lines[0]
