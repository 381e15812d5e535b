"""Where labelled rows come from: a folder of files, the Hugging Face hub, or the name of a GLUE task.

Every source gives the same thing, ``{"train" | "dev" | "test": [(place, row), …]}``: ``row`` maps field names to
values, and ``place`` says where it stood ("train.jsonl:12") for the error that may have to name it.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import UserError, nearest

Row = tuple[str, dict]
Tables = dict[str, list[Row]]

SPLITS = ("train", "dev", "test")
GLUE = {  # name → (text field, pair field)
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
GLUE_REGRESSION = "stsb"
HUB_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
# mnli alone has two of each; the matched ones are those whose genres were trained on
GLUE_SPLITS = HUB_SPLITS | {"validation_matched": "dev", "test_matched": "test"}


def read_folder(folder: Path) -> Tables:
    """Read the split files of a folder; a split without a file is absent from the result.

    Raises:
        UserError: if ``train`` or ``test`` has no file, a split has two, or a file is damaged.
    """
    tables = {}
    for split in SPLITS:
        files = [path for suffix in _READERS if (path := folder / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise UserError(f"{folder}: both {files[0].name} and {files[1].name}; keep one of them")
        if files:
            tables[split] = list(_READERS[files[0].suffix](files[0]))
        elif split != "dev":
            present = sorted(path.name for path in folder.iterdir())
            match = nearest(f"{split}.jsonl", present)
            hint = f"rename '{match}'?" if match and match.split(".")[0] not in SPLITS else "add it"
            raise UserError(f"{folder}: no {split}.jsonl, {split}.tsv or {split}.csv; {hint}")
    return tables


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a {type(row).__name__}, not an object; write {{'text': …, 'label': …}}")
        yield f"{path}:{number}", row


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_table(path)


def _read_table(path: Path, **dialect) -> Iterator[Row]:
    """Rows of a table with a header line. Tab-separated files know no quotes, as GLUE's do not."""
    reader = csv.reader((line for _, line in _lines(path)), **dialect)
    header = None
    try:
        for values in reader:
            if not values:
                continue
            if header is None:
                header = values
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(values)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}); mend the line"
                )
            yield f"{path}:{reader.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; mend the line") from None


_READERS = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".csv": _read_csv}


def read_hub(name: str, config: str | None, label_field: str, names: dict[str, str]) -> tuple[Tables, list[str]]:
    """Read a data set by ``datasets``; return its tables and what was left out, in words.

    Class numbers become class names. −1 is the hub's sign for a withheld label: as the number of a class, or as the
    label of a whole split, it drops the row, counted and told.
    ``names`` maps the data set's split names to ours.

    Raises:
        UserError: if the hub cannot be reached or the data set or its configuration is not there.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"data set '{name}' cannot be loaded ({reason}); check the name, --dataset-config and the network, "
            "or give a folder of train/dev/test.jsonl"
        ) from None
    tables, notes = {}, []
    unused = [split for split in dataset if split not in names]
    if unused:
        notes.append(f"splits not used: {', '.join(unused)}")
    for split, ours in names.items():
        if split not in dataset:
            continue
        rows = [(f"{name} {split} row {number}", row) for number, row in enumerate(dataset[split], 1)]
        feature = dataset[split].features.get(label_field)
        labelled = [(place, row) for place, row in rows if row.get(label_field) != -1]
        if labelled and not isinstance(feature, datasets.ClassLabel):
            labelled = rows  # a number that happens to be −1
        if len(labelled) < len(rows):
            notes.append(f"{split}: {len(rows) - len(labelled)} of {len(rows)} samples have no label and are left out")
        if rows and not labelled:
            continue
        if isinstance(feature, datasets.ClassLabel):
            labelled = [(place, {**row, label_field: feature.int2str(row[label_field])}) for place, row in labelled]
        tables[ours] = labelled
    if "train" not in tables:
        raise UserError(f"data set '{name}' has no labelled 'train' split (splits: {', '.join(dataset)})")
    return tables, notes
