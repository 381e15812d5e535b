"""Labelled end tasks: single texts or pairs of texts, with a class or a number to predict.

A task comes from a folder of ``train``, ``dev`` and ``test`` files (JSON lines, TSV or CSV), from a data set of the
Hugging Face hub, or by the name of a GLUE task. However it comes, dev chooses and test is looked at once.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.data.task_sources import (
    GLUE,
    GLUE_REGRESSION,
    GLUE_SPLITS,
    HUB_SPLITS,
    SPLITS,
    Row,
    Tables,
    read_folder,
    read_hub,
)
from pretrain.errors import UserError, nearest, unknown

HUB_PREFIX = "hf:"
DEV_PORTION = 10  # without a dev split, one in so many training samples becomes it


@dataclass(frozen=True)
class Split:
    """Samples of one split, in the order of the source."""

    texts: list[str]
    pairs: list[str] | None
    """The second texts, or None where the task has single texts."""
    labels: list[int] | list[float]
    """Indices into ``Task.label_names``, or numbers for regression."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> "Split":
        """Return the samples at ``indices``, in that order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Split([self.texts[i] for i in indices], pairs, [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Task:
    """A labelled task with the splits train, dev and test, none of them empty."""

    name: str
    splits: dict[str, Split]
    label_names: list[str]
    """Names of the classes; empty for regression."""
    regression: bool
    notes: list[str]
    """What the loader decided or left out, in sentences for the user."""


def load_task(
    source: str | Path,
    *,
    text_field: str | None = None,
    pair_field: str | None = None,
    label_field: str | None = None,
    config: str | None = None,
    regression: bool = False,
) -> Task:
    """Load a task from a folder, ``hf:NAME`` (with the data set's ``config``), or a GLUE task's name.

    Without names, the fields are ``text``, or ``text_a`` and ``text_b``, and ``label``. Labels are classes (strings,
    integers, booleans) unless ``regression`` is set or some of them are fractional. Without dev, a tenth of train,
    chosen by a hash of its content, takes its place. Without a labelled test (GLUE withholds it), dev is
    reported in its place and the choosing is done on a tenth of train.

    Raises:
        UserError: if the source, a file or a field is missing, a line cannot be read, a split is empty, train has
            only one label, or dev or test has a class that train lacks. Names file and line.
    """
    label_field = label_field or "label"
    path = Path(source)
    notes = []
    if str(source).startswith(HUB_PREFIX):
        hub_name = str(source).removeprefix(HUB_PREFIX)
        name = "-".join([*hub_name.split("/"), *([config] if config else [])])
        tables, notes = read_hub(hub_name, config, label_field, HUB_SPLITS)
    elif path.is_dir():
        name, tables = path.resolve().name, read_folder(path)
    elif source in GLUE:
        name = str(source)
        text_field, pair_field = GLUE[name]
        regression = name == GLUE_REGRESSION
        tables, notes = read_hub("nyu-mll/glue", name, label_field, GLUE_SPLITS)
    elif path.is_file() or len(path.parts) > 1:
        raise UserError(f"{source}: no such folder; a task is a folder of train, dev and test files, or hf:NAME")
    else:
        raise unknown("task", str(source), GLUE, "neither a folder nor a GLUE task")
    for split, rows in tables.items():
        if not rows:
            raise UserError(f"{source}: the {split} split is empty; every split needs samples")
    if "test" not in tables:
        if "dev" not in tables:
            raise UserError(f"{source}: no labelled test split and no dev split to report in its place")
        tables["test"] = tables.pop("dev")
        notes.append("test has no labels: dev is reported in its place, and the epoch is chosen on a tenth of train")
    return _build(name, tables, _Fields.choose(tables, text_field, pair_field, label_field), regression, notes)


@dataclass(frozen=True)
class _Fields:
    text: str
    pair: str | None
    label: str

    @classmethod
    def choose(cls, tables: Tables, text: str | None, pair: str | None, label: str) -> "_Fields":
        first = tables["train"][0][1]
        if text is None and pair is None and "text" not in first and "text_a" in first:
            return cls("text_a", "text_b" if "text_b" in first else None, label)
        return cls(text or "text", pair, label)


def _build(name: str, tables: Tables, fields: _Fields, regression: bool, notes: list[str]) -> Task:
    if not regression and _fractional([row.get(fields.label) for _, row in tables["train"]]):
        regression = True
        notes.append("labels are fractional numbers: taken as regression")
    read = _number if regression else _class_name
    values = {split: [read(place, _field(place, row, fields.label, "--label-field")) for place, row in rows]
              for split, rows in tables.items()}  # fmt: skip
    if len(set(values["train"])) < 2:
        place, label = tables["train"][0][0], values["train"][0]
        raise UserError(f"{place}: every training sample has the label '{label}'; there is nothing to learn")
    label_names = [] if regression else _class_names(values, tables)
    if not regression:
        index = {label: i for i, label in enumerate(label_names)}
        values = {split: [index[label] for label in labels] for split, labels in values.items()}
    splits = {split: _split(rows, fields, values[split]) for split, rows in tables.items()}
    if "dev" not in splits:
        splits["train"], splits["dev"] = _split_dev(splits["train"], name)
        notes.append(f"no dev split: {len(splits['dev'])} of train's samples, chosen by hash, take its place")
    splits = {split: splits[split] for split in SPLITS}
    return Task(name, splits, label_names, regression, [*notes, *_remarks(splits)])


def _field(place: str, row: dict, field: str, option: str) -> object:
    if field not in row:
        match = nearest(field, row)
        remedy = f"did you mean {option} {match}?" if match else f"name the right one with {option}"
        raise UserError(f"{place}: no field '{field}' (fields: {', '.join(row) or 'none'}); {remedy}")
    return row[field]


def _split(rows: list[Row], fields: _Fields, labels: list) -> Split:
    def texts(field: str, option: str) -> list[str]:
        found = [_field(place, row, field, option) for place, row in rows]
        for text, (place, _) in zip(found, rows, strict=True):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"{place}: field '{field}' is {kind}, not text; mend it or name another with {option}")
        return found

    pairs = None if fields.pair is None else texts(fields.pair, "--pair-field")
    return Split(texts(fields.text, "--text-field"), pairs, labels)


def _fractional(labels: list) -> bool:
    """Whether all labels are numbers, or texts that say a number, and some are not whole."""
    numbers = []
    for label in labels:
        try:
            numbers.append(float("none" if isinstance(label, bool) else label))
        except (TypeError, ValueError):
            return False
    return any(math.isfinite(number) and not number.is_integer() for number in numbers)


def _number(place: str, label: object) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: label {label!r} is not a finite number; mend it, or drop --regression for classes")
    return number


def _class_name(place: str, label: object) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is None or isinstance(label, list | dict) or not str(label).strip():
        raise UserError(f"{place}: label {label!r} is no class; give a string or an integer")
    return str(label).strip()


def _class_names(labels: dict[str, list[str]], tables: Tables) -> list[str]:
    """Return the classes of train, sorted (as numbers if all are), having checked that no other split has more."""
    names = set(labels["train"])
    for split in labels.keys() - {"train"}:
        for label, (place, _) in zip(labels[split], tables[split], strict=True):
            if label not in names:
                raise unknown("label", label, names, f"{place}: not a class of train")
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _content_hashes(split: Split) -> list[int]:
    pairs = split.pairs or [""] * len(split)
    contents = (f"{text}\0{pair}".encode() for text, pair in zip(split.texts, pairs, strict=True))
    return [int.from_bytes(hashlib.sha256(content).digest()[:8], "big") for content in contents]


def _split_dev(train: Split, name: str) -> tuple[Split, Split]:
    """Part train into train and dev class by class; samples of equal content stay together."""
    hashes = _content_hashes(train)
    classes = {}
    for i, label in enumerate(train.labels):
        classes.setdefault(None if isinstance(label, float) else label, []).append(i)
    dev = set()
    for members in classes.values():
        distinct = sorted({hashes[i] for i in members})
        chosen = set(distinct[: len(distinct) // DEV_PORTION])
        dev.update(i for i in members if hashes[i] in chosen)
    if not dev:
        raise UserError(f"{name}: train has too few samples ({len(train)}) to part a dev split from; add a dev file")
    kept = [i for i in range(len(train)) if i not in dev]
    return train.take(kept), train.take(sorted(dev))


def _remarks(splits: dict[str, Split]) -> list[str]:
    """What a reader of the scores should know about the samples: empty texts, and test samples seen in training."""
    remarks = []
    for split, samples in splits.items():
        if empty := sum(not text.strip() for text in samples.texts):
            remarks.append(f"{split}: {empty} of {len(samples)} samples have an empty text")
    seen = set(_content_hashes(splits["train"]))
    if leaked := sum(content in seen for content in _content_hashes(splits["test"])):
        remarks.append(f"test: {leaked} of {len(splits['test'])} samples occur in train as well")
    return remarks


def limit_train(task: Task, samples: int) -> Task:
    """Return the task with at most ``samples`` training samples: those of the lowest content hash, in their order."""
    train = task.splits["train"]
    if samples >= len(train):
        return task
    note = f"train limited to {samples} of {len(train)} samples, chosen by hash"
    return replace(task, splits={**task.splits, "train": limit_split(train, samples)}, notes=[*task.notes, note])


def limit_split(split: Split, samples: int) -> Split:
    """Return at most ``samples`` of a split's samples: those of the lowest content hash, in their order, but of every
    class at least one if there is room."""
    hashes = _content_hashes(split)
    order = sorted(range(len(split)), key=lambda i: hashes[i])
    firsts = {} if isinstance(split.labels[0], float) else {split.labels[i]: i for i in reversed(order)}
    order = sorted(order, key=lambda i: firsts.get(split.labels[i]) != i)
    return split.take(sorted(order[:samples]))
