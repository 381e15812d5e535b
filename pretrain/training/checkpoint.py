"""Checkpoints that can be trusted: whole or not there at all, and verified before they are used.

A checkpoint is a folder ``checkpoints/step-00000100``. It is written under another name, listed in ``manifest.json``
with the size and sha256 of every file, renamed, and only then named in ``checkpoints/latest``. Whatever lacks a
manifest that verifies does not count. ``checkpoints/best`` names the best one of a run that is scored.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.data.output import sync
from pretrain.errors import UserError

MANIFEST, LATEST, BEST, _PARTIAL, _ASIDE = "manifest.json", "latest", "best", ".partial", "abandoned-"
PASSING_OVER = "warning: passing over a checkpoint"
_BLOCK_BYTES = 1 << 22
_SMALL_BYTES = 1 << 20


def folder_of(run: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps is."""
    return run / "checkpoints" / f"step-{step:08d}"


def partial_folder(run: Path, step: int) -> Path:
    """Return where that checkpoint is while it is being written."""
    return folder_of(run, step).with_suffix(_PARTIAL)


def publish(run: Path, step: int, facts: dict, described: Mapping[str, dict]) -> Path:
    """Turn a folder that all ranks have written into a checkpoint; one rank calls it.

    ``facts`` go into the manifest. Files that are ``described`` are not read again. Raises OSError if the disk will not
    take it; what was there before stays.
    """
    partial, final = partial_folder(run, step), folder_of(run, step)
    for name, expected in described.items():
        if (found := (partial / name).stat().st_size) != expected["bytes"]:
            raise OSError(f"{partial / name} has {found} bytes, where {expected['bytes']} were written")
    names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
    files = {name: described.get(name) or describe(partial / name) for name in names}
    _write(partial / MANIFEST, json.dumps({"step": step, **facts, "files": files}, indent=2) + "\n")
    for path in [partial, *partial.rglob("*")]:
        sync(path)
    replaced = final.with_suffix(f".old{_PARTIAL}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    sync(final.parent)
    _point(LATEST, final)
    return final


def mark_best(run: Path, step: int) -> None:
    """Name the checkpoint after ``step`` steps the best; where there is none, no checkpoint is named."""
    folder = folder_of(run, step)
    if folder.is_dir():
        _point(BEST, folder)
    else:
        (folder.parent / BEST).unlink(missing_ok=True)


def best(run: Path) -> Path | None:
    """Return the run's best checkpoint, verified or not, or None."""
    pointer = run / "checkpoints" / BEST
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def verify(folder: Path) -> dict:
    """Return a checkpoint's manifest after comparing every file with it.

    Raises:
        UserError: naming the first file that is missing or differs.
    """
    manifest = look_over(folder)
    compare(folder, manifest["files"])
    return manifest


def look_over(folder: Path) -> dict:
    """Return a checkpoint's manifest after comparing what takes no time: the sizes of all files, and the small ones.

    Raises:
        UserError: as :func:`verify`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"].items()
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint: no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged ({error})") from None
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, but the manifest lists it")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, but the manifest says {expected['bytes']}")
    compare(folder, {name: expected for name, expected in files if expected["bytes"] <= _SMALL_BYTES})
    return manifest


def compare(folder: Path, files: Mapping[str, dict]) -> None:
    """Read files of a checkpoint and compare them with what its manifest has of them.

    Raises:
        UserError: as :func:`verify`.
    """
    for name, expected in files.items():
        if describe(folder / name) != expected:
            raise UserError(f"{folder / name}: content differs from the manifest's sha256")


def candidates(run: Path) -> list[Path]:
    """Return the run's checkpoint folders, newest first, verified or not."""
    found = (p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest(
    run: Path, warn: Callable[[str], None] = print, check: Callable[[Path], dict] = verify, before: Path | None = None
) -> Path | None:
    """Return the newest checkpoint that verifies, or None; says through ``warn`` what is wrong with newer ones.

    Args:
        check: :func:`verify` or :func:`look_over`.
        before: one that the checkpoint must be older than.
    """
    for folder in candidates(run):
        if before is None or _step_of(folder) < _step_of(before):
            try:
                check(folder)
                return folder
            except UserError as error:
                warn(f"{PASSING_OVER}: {error}")
    return None


def set_aside(run: Path, after: int) -> None:
    """Rename the checkpoints of later steps than ``after``, from which the run has just gone on.

    They belong to a history that is being replaced, or are damaged, and must not be taken for the newest again.
    """
    for folder in candidates(run):
        if _step_of(folder) > after:
            target = folder.with_name(_ASIDE + folder.name)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def prune(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints and the best one, and what interrupted saves left."""
    for folder in (each for each in candidates(run)[keep:] if each != best(run)):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not look whole
        shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(f"*{_PARTIAL}"):
        shutil.rmtree(leftover)


def describe(path: Path) -> dict:
    """Return a file's size and sha256, as the manifest has them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _point(name: str, folder: Path) -> None:
    """Have the file ``name`` beside a checkpoint say that checkpoint's name."""
    new = folder.with_name(f"{name}.new")
    _write(new, folder.name + "\n")
    new.replace(folder.with_name(name))
    sync(folder.parent)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
