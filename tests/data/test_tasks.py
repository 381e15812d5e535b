import csv
import json
from pathlib import Path

import datasets
import pytest

from pretrain.data.tasks import limit_train, load_task
from pretrain.errors import UserError

ROWS = {
    "train": [{"text": f"sample {i} of train", "label": ["red", "blue", "green"][i % 3]} for i in range(31)],
    "dev": [{"text": "the sea", "label": "blue"}, {"text": "a leaf", "label": "green"}],
    "test": [{"text": "a rose", "label": "red"}],
}


def write(folder: Path, tables: dict, suffix: str = ".jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        with open(folder / f"{split}{suffix}", "w", encoding="utf-8", newline="") as file:
            if suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                continue
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
            writer = csv.DictWriter(file, list(rows[0]), **dialect)
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    rows = {**ROWS, "test": [{"text": '"rosé", she said, "and left', "label": "red"}]}
    task = load_task(write(tmp_path / "colours", rows, suffix))
    assert (task.name, task.regression, task.notes) == ("colours", False, [])
    assert task.label_names == ["blue", "green", "red"]
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 31, "dev": 2, "test": 1}
    assert task.splits["train"].labels[:4] == [2, 0, 1, 2]
    assert task.splits["test"].texts == ['"rosé", she said, "and left']
    assert task.splits["test"].pairs is None


def test_labels_may_be_integers_or_their_text_and_sort_as_numbers(tmp_path):
    rows = {
        "train": [{"text": str(i), "label": i} for i in (10, 9, 2, 10)],
        "dev": [{"text": "x", "label": "9"}],
        "test": [{"text": "y", "label": 10.0}],
    }
    task = load_task(write(tmp_path / "t", rows))
    assert task.label_names == ["2", "9", "10"]
    assert [task.splits[split].labels for split in ("train", "dev", "test")] == [[2, 1, 0, 2], [1], [2]]


def test_pairs_are_found_by_default_or_by_name(tmp_path):
    rows = {split: [{"text_a": f"a{i}", "text_b": f"b{i}", "label": i % 2} for i in range(3)] for split in ROWS}
    task = load_task(write(tmp_path / "default", rows))
    assert (task.splits["dev"].texts, task.splits["dev"].pairs) == (["a0", "a1", "a2"], ["b0", "b1", "b2"])
    rows = {split: [{"q": f"a{i}", "s": f"b{i}", "gold": i % 2} for i in range(3)] for split in ROWS}
    named = load_task(write(tmp_path / "named", rows), text_field="q", pair_field="s", label_field="gold")
    assert named.splits == task.splits


def test_fractional_labels_are_regression_and_said_so(tmp_path):
    rows = {split: [{"text": f"{split}{i}", "label": f"{i / 2:.3f}"} for i in range(5)] for split in ROWS}
    task = load_task(write(tmp_path / "t", rows, ".tsv"))
    assert task.regression
    assert task.label_names == []
    assert task.splits["dev"].labels == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert task.notes == ["labels are fractional numbers: taken as regression"]
    whole = {split: [{"text": f"{split}{i}", "label": i} for i in range(3)] for split in ROWS}
    assert not load_task(write(tmp_path / "whole", whole)).regression
    assert load_task(tmp_path / "whole", regression=True).splits["test"].labels == [0.0, 1.0, 2.0]


def test_dev_is_parted_from_train_by_content_when_missing(tmp_path):
    train = ROWS["train"] * 3 + [{"text": f"more {i}", "label": "red"} for i in range(57)]
    task = load_task(write(tmp_path / "a", {"train": train, "test": ROWS["test"]}))
    parts = task.splits["train"], task.splits["dev"]
    assert len(parts[0]) + len(parts[1]) == len(train)
    assert not set(parts[0].texts) & set(parts[1].texts)
    assert set(parts[1].labels) <= set(parts[0].labels) == {0, 1, 2}
    assert task.notes == [f"no dev split: {len(parts[1])} of train's samples, chosen by hash, take its place"]
    turned = load_task(write(tmp_path / "b", {"train": train[::-1], "test": ROWS["test"]}))
    assert sorted(turned.splits["dev"].texts) == sorted(parts[1].texts)


def test_leaks_and_empty_texts_are_counted(tmp_path):
    test = [*ROWS["test"], ROWS["train"][4], {"text": " ", "label": "red"}]
    task = load_task(write(tmp_path / "t", {**ROWS, "test": test}))
    assert task.notes == [
        "test: 1 of 3 samples have an empty text",
        "test: 1 of 3 samples occur in train as well",
    ]


def test_limit_train_keeps_the_same_samples_whatever_the_order(tmp_path):
    task = load_task(write(tmp_path / "a", ROWS))
    turned = load_task(write(tmp_path / "b", {**ROWS, "train": ROWS["train"][::-1]}))
    kept = limit_train(task, 7)
    assert len(kept.splits["train"]) == 7
    assert kept.splits["train"].texts == limit_train(turned, 7).splits["train"].texts[::-1]
    assert kept.notes == ["train limited to 7 of 31 samples, chosen by hash"]
    assert kept.splits["test"] == task.splits["test"]
    assert limit_train(task, 31) is task


def test_limit_train_keeps_every_class_that_there_is_room_for(tmp_path):
    rare = [{"text": f"rare {i}", "label": ["grey", "pink"][i % 2]} for i in range(4)]
    task = load_task(write(tmp_path / "a", {**ROWS, "train": ROWS["train"] * 9 + rare}))
    kept = limit_train(task, 6).splits["train"]
    assert len(kept) == 6 and {task.label_names[label] for label in kept.labels} == set(task.label_names)
    assert len(limit_train(task, 2).splits["train"]) == 2


def broken(folder: Path, **changed) -> Path:
    """ROWS with some splits changed, or left out where None."""
    return write(folder, {split: rows for split, rows in {**ROWS, **changed}.items() if rows is not None})


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"train": None}, {}, r"no train\.jsonl, train\.tsv or train\.csv; add it"),
        ({"test": None}, {}, r"no test\.jsonl"),
        ({"test": None, "tset": ROWS["test"]}, {}, r"rename 'tset\.jsonl'\?"),
        ({"dev": []}, {}, "the dev split is empty"),
        ({"train": []}, {}, "the train split is empty"),
        ({}, {"text_field": "txt"}, r"train\.jsonl:1: no field 'txt' \(fields: text, label\); .*--text-field text\?"),
        ({}, {"label_field": "klass"}, r"train\.jsonl:1: no field 'klass'.* --label-field"),
        ({}, {"pair_field": "zzz"}, r"no field 'zzz'.* --pair-field"),
        ({"dev": [*ROWS["dev"], {"label": "red"}]}, {}, r"dev\.jsonl:3: no field 'text'"),
        ({"dev": [{"text": 5, "label": "red"}]}, {}, r"dev\.jsonl:1: field 'text' is int, not text"),
        ({"dev": [{"text": "x", "label": None}]}, {}, r"dev\.jsonl:1: label None is no class"),
        ({"train": [{"text": "x", "label": "red"}] * 3}, {}, "every training sample has the label 'red'"),
        (
            {"test": [*ROWS["test"], {"text": "x", "label": "blu"}]},
            {},
            r"test\.jsonl:2: .*'blu'; did you mean 'blue'\?",
        ),
        ({}, {"regression": True}, r"train\.jsonl:1: label 'red' is not a finite number"),
        ({"dev": None, "train": ROWS["train"][:5]}, {}, r"too few samples \(5\)"),
    ],
)
def test_mistakes_name_the_file_the_line_and_the_remedy(tmp_path, changed, options, message):
    folder = broken(tmp_path / "task", **changed)
    with pytest.raises(UserError, match=message) as error:
        load_task(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.jsonl", b'{"text": "a", "label": "red"}\n{"text": "b"\n', r"dev\.jsonl:2: not JSON"),
        ("dev.jsonl", b'\n["a", "red"]\n', r"dev\.jsonl:2: a list, not an object"),
        ("dev.jsonl", b'{"text": "caf\xe9", "label": "red"}\n', r"dev\.jsonl:1: not UTF-8"),
        ("dev.tsv", b"text\tlabel\nx\tred\nx\ty\tred\n", r"dev\.tsv:3: 3 fields, but the header has 2 \(text, label\)"),
        ("dev.csv", b"text,label\nx\n", r"dev\.csv:2: 1 fields"),
        ("test.tsv", b"text\tlabel\nx\tred\n", r"both test\.jsonl and test\.tsv"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, message):
    folder = broken(tmp_path / "task", dev=None)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_task(folder)


def test_unknown_sources_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mrpc'"):
        load_task("mrcp")
    with pytest.raises(UserError, match="no such folder"):
        load_task(tmp_path / "nowhere")


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: ``hub[(name, config)] = {split: dataset}``."""
    stored = {}

    def load_dataset(name, config=None):
        if (name, config) not in stored:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return datasets.DatasetDict(stored[name, config])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def labelled(rows: list[dict], names: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=names))


def test_a_hub_data_set_gives_class_names_and_counts_withheld_labels(hub):
    names = ["no", "yes"]
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(7)]
    hub["someone/set", "plain"] = {
        "train": labelled([*rows, {"text": "unsure", "label": -1}], names),
        "validation": labelled(rows[:3], names),
        "test": labelled([{"text": "new", "label": 1}], names),
        "extra": labelled(rows, names),
    }
    task = load_task("hf:someone/set", config="plain")
    assert task.name == "someone-set-plain"
    assert task.label_names == names
    assert (len(task.splits["train"]), task.splits["test"].labels) == (7, [1])
    assert task.notes == [
        "splits not used: extra",
        "train: 1 of 8 samples have no label and are left out",
    ]


def test_glue_reports_dev_and_chooses_on_a_part_of_train(hub):
    pairs = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 3} for i in range(60)]
    names = ["entailment", "neutral", "contradiction"]
    hidden = labelled([{**row, "label": -1} for row in pairs[:4]], names)
    hub["nyu-mll/glue", "mnli"] = {
        "train": labelled(pairs, names),
        "validation_matched": labelled([{**row, "premise": "dev"} for row in pairs[:5]], names),
        "validation_mismatched": labelled(pairs[:9], names),
        "test_matched": hidden,
        "test_mismatched": hidden,
    }
    task = load_task("mnli")
    assert set(task.splits["test"].texts) == {"dev"}
    assert (len(task.splits["train"]), len(task.splits["dev"]), len(task.splits["test"])) == (54, 6, 5)
    assert task.splits["test"].pairs[:2] == ["h0", "h1"]
    assert any("dev is reported in its place" in note for note in task.notes)


def test_numbers_that_happen_to_be_minus_one_are_labels(hub):
    rows = [{"text": f"t{i}", "label": i / 2 - 1} for i in range(5)]
    hub["tone", None] = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
    assert load_task("hf:tone").splits["train"].labels == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_an_unreachable_hub_is_one_line_with_the_remedy(hub):
    with pytest.raises(UserError, match=r"'nyu-mll/glue' cannot be loaded .* or give a folder"):
        load_task("sst2")


def test_a_hub_data_set_without_any_held_out_split_is_refused(hub):
    hub["bare", None] = {"train": datasets.Dataset.from_list(ROWS["train"])}
    with pytest.raises(UserError, match="no dev split to report"):
        load_task("hf:bare")
