"""``medley plan``: a table, a line that can be pasted, and mistakes in one line."""

import re
import shlex

import pytest
import yaml

from pretrain.cli import main
from pretrain.planning.command import parse_memory
from pretrain.recipe import load_recipe
from pretrain.training.ds_config import resolve_ds_config
from tests.training.runs import recipe, write_corpus


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    document = recipe(write_corpus(folder / "store"), folder / "run", objectives={"mlm": {}}, sampler={"name": "fixed"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"


def test_the_recommended_line_is_one_that_a_run_accepts(path, capsys):
    assert main(["plan", str(path), "--gpus", "4", "--gpu-memory", "8GB", "training.batch_rows=24"]) == 0
    out = capsys.readouterr().out
    words = shlex.split(re.search(r"recommended: launch/train.py (.*)", out)[1])
    options = dict(zip(words[:4:2], words[1:4:2], strict=True))
    chosen = load_recipe(options["--config"], words[4:])
    assert (chosen.training.batch_rows, chosen.training.micro_batch_rows) == (24, 6)
    config = resolve_ds_config(
        options["--ds_config"],
        micro_batch_rows=6,
        batch_rows=24,
        world_size=4,
        gradient_clipping=1.0,
        device_type="cuda",
    )
    assert config["gradient_accumulation_steps"] == 1 and config["bf16"]["enabled"]
    assert all(f"zero{stage}" in out for stage in (0, 1, 2, 3)) and "6 × 1" in out


def test_what_does_not_fit_says_by_how_much_and_what_to_change(path, capsys):
    arguments = ["plan", str(path), "--gpus", "2", "--gpu-memory", "0.1MB", "--ds_config", "configs/ds/zero0.json"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "GB more; " in error and "zero0.json" in error


@pytest.mark.parametrize(
    "options, words",
    [
        (["--gpus", "4", "--gpu-memory", "80Gb"], "--gpu-memory: unknown unit 'Gb'; did you mean '80GB'?"),
        (["--gpus", "4", "--gpu-memory", "80parsecs"], "valid: MB"),
        (["--gpus", "4", "--gpu-memory", "80"], "--gpu-memory: unknown unit"),
        (["--gpus", "4", "--gpu-memory", "much"], "--gpu-memory: 'much' is no size"),
        (["--gpus", "4", "--gpu-memory", "0GB"], "--gpu-memory: '0GB' is no size"),
        (["--gpus", "0", "--gpu-memory", "80GB"], "--gpus: must be at least 1, not 0"),
        (["--gpus", "4", "--gpu-memory", "80GB", "--gpus-per-node", "0"], "--gpus-per-node: must be at least 1"),
        (["--gpus", "13", "--gpu-memory", "80GB"], "--gpus: 13 is not a multiple of the 8 of a node"),
        (["--gpus", "3", "--gpu-memory", "80GB"], "the nearest valid value is 9"),
        (["--gpus", "4", "--gpu-memory", "80GB", "--ds_config", "no/such.json"], "no/such.json"),
        (["--gpus", "4", "--gpu-memory", "80GB", "training.batch_row=4"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(path, options, words, capsys):
    assert main(["plan", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("medley plan: error: ") and len(error.splitlines()) == 1 and words in error


def test_memory_is_read_in_powers_of_ten_and_of_two():
    assert parse_memory("80GB") == 80e9 and parse_memory("1.5 GiB") == 1.5 * 2**30 and parse_memory("7MB") == 7e6
