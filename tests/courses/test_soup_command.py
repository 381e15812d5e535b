"""``medley soup``: what it makes of folders, what it refuses, and that it leaves a whole folder or none."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from pretrain.cli import main
from pretrain.courses import command
from pretrain.courses.command import make_soup
from pretrain.data.tasks import load_task
from pretrain.errors import UserError
from pretrain.evaluation.model import quiet
from pretrain.export import write_facts
from tests.evaluation.conftest import make_tokenizer, sentiment_row, write_task

START = "5" * 64
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
QUICK = ["--epochs", "1", "--seeds", "1", "--max-train", "17", "--max-length", "12"]


def write_export(
    folder, seed: int, *, start: str | None = START, tokenizer=None, model_class=BertForMaskedLM, **config
):
    """Write what an export would be."""
    tokenizer = tokenizer or make_tokenizer()
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        keys = {"max_position_embeddings": 24, "initializer_range": 0.1, **SHAPE, **config}
        model_class(BertConfig(vocab_size=len(tokenizer), **keys)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_facts(folder, start)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    place = tmp_path_factory.mktemp("exports")
    return [write_export(place / name, seed, hidden_dropout_prob=seed / 10) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("tasks") / "sentiment", sentiment_row, (31, 11, 13))


def soup(*args) -> int:
    return main(["soup", *map(str, args)])


def silent(line: str) -> None:
    """Take the lines of progress and drop them."""


@torch.no_grad()
def test_the_soup_is_numpys_mean_loads_and_says_what_it_is(exports, tmp_path, capsys):
    out = tmp_path / "soup"
    assert soup(*exports, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"averaged 3 models → {out}" in printed and START[:12] in printed
    files = [load_file(folder / "model.safetensors") for folder in exports]
    made = load_file(out / "model.safetensors")
    assert made.keys() == files[0].keys()
    for name, values in made.items():
        np.testing.assert_array_equal(values, np.mean([np.float64(f[name]) for f in files], axis=0).astype(np.float32))
    model, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the river")["input_ids"] == make_tokenizer()("the river")["input_ids"]
    assert torch.isfinite(model(**tokenizer("the river", return_tensors="pt")).logits).all()
    record = json.loads((out / "soup.json").read_text())
    assert [each["folder"] for each in record["ingredients"]] == [str(folder) for folder in exports]
    assert record["initialisation"] == json.loads((out / "medley.json").read_text())["initialisation"] == START
    assert record["task"] is None and "BertForMaskedLM" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_a_soup_is_an_ingredient(exports, tmp_path):
    make_soup(exports[:2], tmp_path / "first", say=silent)
    make_soup([tmp_path / "first", exports[2]], tmp_path / "second", say=silent)
    a, b, c, made = (load_file(f / "model.safetensors") for f in (*exports, tmp_path / "second"))
    for name, values in made.items():
        np.testing.assert_allclose(values, (a[name] + b[name]) / 4 + c[name] / 2, rtol=0, atol=1e-7)


def test_copies_of_one_model_make_that_model(exports, tmp_path):
    copies = [shutil.copytree(exports[0], tmp_path / f"copy{number}") for number in range(4)]
    make_soup(copies, tmp_path / "soup", say=silent)
    assert (tmp_path / "soup" / "model.safetensors").read_bytes() == (exports[0] / "model.safetensors").read_bytes()


def test_the_backbones_of_different_exports_are_averaged_without_heads_and_pooler(exports, tmp_path):
    backbone = write_export(tmp_path / "backbone", 9, model_class=BertModel)  # which has a pooler
    made = make_soup([exports[1], backbone], tmp_path / "soup", kind="backbone", say=silent)
    assert made["architectures"] == ["BertModel"]
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["architectures"] == ["BertModel"]
    first, second, mean = (load_file(f / "model.safetensors") for f in (exports[1], backbone, tmp_path / "soup"))
    assert len(mean) == sum(name.startswith("bert.") for name in first)
    for name, values in mean.items():
        expected = (np.float64(first[f"bert.{name}"]) + second[name]) / 2
        np.testing.assert_array_equal(values, expected.astype(np.float32))
    _, info = AutoModel.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"} and not info["unexpected_keys"]


def test_shards_and_other_dtypes_are_read_and_the_dtype_is_kept(exports, tmp_path):
    folders = []
    for number, source in enumerate(exports[:2]):
        folders.append(tmp_path / f"half{number}")
        model = BertForMaskedLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(folders[-1], max_shard_size="4KB")
        make_tokenizer().save_pretrained(folders[-1])
        write_facts(folders[-1], START)
    assert len(list(folders[0].glob("*.safetensors"))) > 1
    make_soup(folders, tmp_path / "soup", say=silent)
    made = load_torch(tmp_path / "soup" / "model.safetensors")
    one, two = (BertForMaskedLM.from_pretrained(folder).state_dict() for folder in folders)
    for name, values in made.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, ((one[name].double() + two[name].double()) / 2).bfloat16())


def other_tokens(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["newer"])
    return write_export(folder, 1, tokenizer=tokenizer)


def other_case(folder):
    tokenizer = make_tokenizer()
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["normalizer"] = {"type": "Lowercase"}
    export = write_export(folder, 1)
    (export / "tokenizer.json").write_text(json.dumps(document))
    return export


def other_token_ids(folder):
    export = write_export(folder, 1)
    text = (export / "tokenizer.json").read_text()
    for old, new in (("river", "#"), ("letter", "river"), ("#", "letter")):
        text = text.replace(f'"{old}"', f'"{new}"')
    (export / "tokenizer.json").write_text(text)
    return export


def other_buffer(folder, number: int):
    export = write_export(folder, number)
    tensors = load_torch(export / "model.safetensors") | {"steps": torch.tensor([number])}
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    return export


MISMATCHES = {
    "family": (lambda f: write_export(f, 1, intermediate_size=40), "differ in intermediate_size: 24 and 40"),
    "activation": (lambda f: write_export(f, 1, hidden_act="relu"), "differ in hidden_act: 'gelu' and 'relu'"),
    "head": (lambda f: write_export(f, 1, model_class=BertModel), "architectures: .*--as backbone"),
    "tokens": (other_tokens, "differ in (vocab_size|the number of tokens)"),
    "token": (other_token_ids, "differ in token 9: 'river' and 'letter'"),
    "normalizer": (other_case, "differ in normalizer of the tokenizer"),
    "start": (lambda f: write_export(f, 1, start="7" * 64), "began with other weights .*555555555555 and 777777777777"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_what_does_not_fit_is_refused_in_one_line_that_names_both(exports, tmp_path, capsys, kind):
    make, reason = MISMATCHES[kind]
    other = make(tmp_path / "other")
    with pytest.raises(UserError, match=reason) as refusal:
        make_soup([exports[0], other], tmp_path / "soup", say=silent)
    assert f"{exports[0]} and {other}: " in str(refusal.value)
    assert soup(exports[0], exports[1], other, "--out", tmp_path / "soup", "--any-start") == 2
    error = capsys.readouterr().err
    assert error.startswith("medley soup: error: ") and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_tensors_that_differ_are_named(exports, tmp_path):
    one, two, same = (other_buffer(tmp_path / name, number) for name, number in (("1", 1), ("2", 2), ("3", 1)))
    with pytest.raises(UserError, match=r"differ in 'steps', whose numbers \(I64"):
        make_soup([one, two], tmp_path / "soup", say=silent)
    with pytest.raises(UserError, match=f"only {one} has 'steps'"):
        make_soup([exports[0], one], tmp_path / "soup", say=silent)
    shutil.copytree(one, tmp_path / "4")
    tensors = load_torch(one / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.bias"] = tensors["bert.embeddings.LayerNorm.bias"].half()
    save_file(tensors, tmp_path / "4" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'bert.embeddings.LayerNorm.bias': F32 \[16\] and F16 \[16\]"):
        make_soup([one, tmp_path / "4"], tmp_path / "soup", say=silent)
    make_soup([one, same], tmp_path / "soup", say=silent)
    assert load_torch(tmp_path / "soup" / "model.safetensors")["steps"].tolist() == [1]


def test_an_unknown_start_is_refused_until_it_is_allowed_and_then_stays_unknown(exports, tmp_path, capsys):
    foreign = write_export(tmp_path / "foreign", 1)
    (foreign / "medley.json").unlink()
    for order in ([exports[0], foreign], [foreign, exports[0]]):
        assert soup(*order, "--out", tmp_path / "soup") == 2
        error = capsys.readouterr().err
        assert f"{foreign}: does not say" in error and f"{exports[0]} began with, give --any-start" in error
    assert soup(exports[0], foreign, "--out", tmp_path / "soup", "--any-start") == 0
    captured = capsys.readouterr()
    assert f"note: {foreign} does not say" in captured.err and "not known of all (--any-start)" in captured.out
    assert json.loads((tmp_path / "soup" / "medley.json").read_text())["initialisation"] is None


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        ("a", [], "a soup is of two models at least"),
        ("aba", [], "are the same folder"),
        ("ab", ["--mode", "greedy"], "name the task with --task"),
        ("ab", ["--as", "masked-lm"], "all ingredients are exports"),
        ("az", [], "no such folder"),
        ("ab", ["--task", "no/such/task"], "no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(exports, tmp_path, capsys, names, options, reason):
    assert soup(*(exports[0].parent / name for name in names), "--out", tmp_path / "soup", *options) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith("medley soup: error: ") and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_same_folder_by_another_name_is_the_same(exports, tmp_path):
    (tmp_path / "link").symlink_to(exports[0])
    with pytest.raises(UserError, match="are the same folder"):
        make_soup([exports[0], tmp_path / "link"], tmp_path / "soup", say=silent)


def test_overwriting_deletes_soups_and_nothing_else(exports, tmp_path):
    out = tmp_path / "soup"
    make_soup(exports[:2], out, say=silent)
    with pytest.raises(UserError, match="exists already"):
        make_soup(exports, out, say=silent)
    make_soup(exports, out, overwrite=True, say=silent)
    assert len(json.loads((out / "soup.json").read_text())["ingredients"]) == 3
    precious = shutil.copytree(exports[0], tmp_path / "export")
    with pytest.raises(UserError, match="not a folder this command made"):
        make_soup(exports, precious, overwrite=True, say=silent)
    for held in (out, tmp_path):
        with pytest.raises(UserError, match="holds the ingredient"):
            make_soup([exports[0], out], held, overwrite=True, say=silent)


def test_greedy_keeps_what_does_not_lower_dev_and_writes_its_average(exports, task, tmp_path, monkeypatch, capsys):
    scores = {"a": 0.7, "b": 0.8, "c": 0.6, "ab": 0.75, "bc": 0.8, "abc": 0.1}
    name = "bert.embeddings.word_embeddings.weight"
    files = dict(zip("abc", (load_file(folder / "model.safetensors")[name] for folder in exports), strict=True))
    seen = []

    def score(folder, given, settings, log):
        assert given.name == "sentiment" and settings.seeds == 2
        found = load_file(f"{folder}/model.safetensors")[name]
        for members, value in scores.items():
            if np.array_equal(found, np.mean([np.float64(files[m]) for m in members], axis=0).astype(np.float32)):
                seen.append(members)
                log("note: once")
                return value
        raise AssertionError("the average of no ingredients that could be asked for")

    monkeypatch.setattr(command, "dev_score", score)
    out = tmp_path / "soup"
    assert soup(*exports, "--out", out, "--mode", "greedy", "--task", task, "--seeds", 2) == 0
    assert seen == ["a", "b", "c", "ab", "bc"]
    record = json.loads((out / "soup.json").read_text())
    rows = [(each["name"][-1], each["dev_alone"], each["dev_with_it"], each["kept"]) for each in record["ingredients"]]
    assert rows == [("b", 0.8, 0.8, True), ("a", 0.7, 0.75, False), ("c", 0.6, 0.8, True)]
    assert (record["dev"], record["metric"], record["task"]) == (0.8, "accuracy", "sentiment")
    made = load_file(out / "model.safetensors")[name]
    assert np.array_equal(made, ((np.float64(files["b"]) + files["c"]) / 2).astype(np.float32))
    captured = capsys.readouterr()
    assert captured.err.count("note: once") == 1
    lines = captured.out.splitlines()
    assert lines[0].split() == ["ingredient", "dev", "alone", "dev", "with", "it"]
    assert lines[2].split()[1:] == ["0.7000", "0.7500", "left", "out"]
    assert "soup of 2: accuracy 0.8000 on dev of sentiment, 2 seeds" in lines
    assert lines[2] in (out / "README.md").read_text()


def test_a_soup_is_scored_by_fine_tuning_and_test_is_never_read(exports, task, tmp_path, monkeypatch):
    fine_tuned = []
    real = command.dev_score
    monkeypatch.setattr(command, "dev_score", lambda *args: fine_tuned.append(real(*args)) or fine_tuned[-1])
    assert soup(*exports[:2], "--out", tmp_path / "soup", "--task", task, *QUICK) == 0
    record = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [each["dev_alone"] for each in record["ingredients"]] + [record["dev"]] == fine_tuned
    assert all(each["dev_with_it"] is None and each["kept"] for each in record["ingredients"])
    assert record["settings"]["epochs"] == 1
    with pytest.raises(UserError, match="unknown metric"):
        make_soup(exports, tmp_path / "no", task=load_task(task), settings=command.Settings(metric="f7"), say=silent)


def test_an_interrupted_search_leaves_nothing(exports, task, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "dev_score", interrupt)
    assert soup(*exports, "--out", tmp_path / "soup", "--mode", "greedy", "--task", task) == 130
    assert list(tmp_path.iterdir()) == []
