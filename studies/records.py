"""The folder of a study: whose it is, and a record of everything that is done, so that nothing is done twice."""

import json
from pathlib import Path

from pretrain.errors import UserError

_IDENTITY, _RECORDS = "study.json", "records.jsonl"


def claim(folder: Path, identity: dict) -> None:
    """Make ``folder`` that of the study with this ``identity``.

    Raises:
        UserError: if it holds another.
    """
    kept = folder / _IDENTITY
    if kept.is_file() and json.loads(kept.read_text()) != identity:
        raise UserError(f"--out {folder}: holds a study with other settings; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(identity, indent=1) + "\n")


def read(folder: Path) -> list[dict]:
    """Return the records, in the order in which they were made."""
    file = folder / _RECORDS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def add(folder: Path, record: dict) -> None:
    """Keep a record: whole, or not at all if the process is killed."""
    partial = folder / f"{_RECORDS}.partial"
    partial.write_text("".join(json.dumps(each) + "\n" for each in [*read(folder), record]))
    partial.replace(folder / _RECORDS)


def has(folder: Path, **keys) -> bool:
    """Whether there is a record with these values."""
    return any(all(record[key] == value for key, value in keys.items()) for record in read(folder))
