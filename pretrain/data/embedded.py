"""``medley corpus``: English text that every machine has, the documentation of its Python packages.

Nothing is downloaded and nothing is imported: documentation strings are read off the syntax trees of the installed
packages and the standard library, and ``.rst``, ``.md`` and ``.txt`` documents are read as they are. The text is
as free as the packages it comes from; it stays on the machine.
"""

import argparse
import ast
import gc
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from pretrain.data.output import whole_folder
from pretrain.data.pool import cores, in_order
from pretrain.data.prose import clean, masked
from pretrain.errors import UserError

LABELS = 10  # packages to tell apart in the end task
TASK_SIZES = {"train": 2000, "dev": 500, "test": 500}
TASK_CHARACTERS = (200, 4000)  # length of a text in the end task
LARGEST_FILE = 1 << 21  # bytes; what is larger is generated
FILES_AT_ONCE = 32
MARKS = ("corpus.jsonl", "task/test.jsonl")  # what tells an embedded corpus from another folder
STANDARD_LIBRARY = "python"
NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|top_level|entry_points|requirements|record|cmakelists|vocab", re.I
)
TESTS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Text:
    """A piece of documentation: ``label`` is the package, ``id`` the package, file and, in Python, the name."""

    text: str
    label: str
    id: str


def write_corpus(
    out: str | Path, max_megabytes: float | None = None, workers: int | None = None, overwrite: bool = False
) -> dict:
    """Write the embedded corpus and its end task; the same environment gives the same files.

    ``out/corpus.jsonl`` has ``{"text", "label", "id"}`` a line; ``out/task/{train,dev,test}.jsonl`` has
    ``{"text", "label"}``: which of the packages with most text does a text come from, with the packages' names
    masked. No text is in two splits; those of dev and test are not in ``corpus.jsonl``.

    Args:
        max_megabytes: bound of ``corpus.jsonl``'s text; which texts are taken then depends on their hash.
        workers: number of processes, by default one a core.
        overwrite: replace ``out`` if it is such a corpus.

    Returns:
        ``megabytes`` {package: MB of text in ``corpus.jsonl``}, largest first, and ``task`` {split: texts}.

    Raises:
        UserError: if ``out`` exists, or the environment has no documentation (``python -OO`` installs, say).
    """
    with whole_folder(out, overwrite, MARKS) as folder:
        texts = gather(installed_files(), workers or cores())
        if not texts:
            raise UserError("the installed packages have no documentation strings to make a corpus of")
        task = end_task(texts)
        kept_out = {text.id for split in ("dev", "test") for text in task[split]}
        bound = float("inf") if max_megabytes is None else max_megabytes * 1e6
        sizes: Counter[str] = Counter()
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                size = len(text.text.encode())
                if text.id not in kept_out and sizes.total() + size <= bound:
                    sizes[text.label] += size
                    file.write(json.dumps(text.__dict__, ensure_ascii=False) + "\n")
        (folder / "task").mkdir()
        for split, examples in task.items():
            lines = (json.dumps({"text": text.text, "label": text.label}, ensure_ascii=False) for text in examples)
            (folder / "task" / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {
        "megabytes": {label: size / 1e6 for label, size in sizes.most_common()},
        "task": {split: len(examples) for split, examples in task.items()},
    }


def installed_files() -> list[tuple[str, str, str]]:
    """Return (package, name, path) of the Python files and documents of all installed packages, sorted."""
    found = {}
    for distribution in metadata.distributions():
        label = distribution.metadata["Name"]
        for file in distribution.files or ():
            if label and _wanted(Path(file)):
                found[f"{label}/{file}"] = (label, str(file), str(distribution.locate_file(file)))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if _wanted(name):
            found[f"{STANDARD_LIBRARY}/{name}"] = (STANDARD_LIBRARY, str(name), str(path))
    return [found[key] for key in sorted(found)]


def _wanted(name: Path) -> bool:
    if TESTS.intersection(name.parts[:-1]) or name.name.startswith("test_"):
        return False
    return name.suffix == ".py" or (name.suffix in (".rst", ".md", ".txt") and not NOT_PROSE.search(str(name)))


def gather(files: Iterable[tuple[str, str, str]], workers: int) -> list[Text]:
    """Read the documentation in ``files`` (package, name, path), clean it, and drop what occurs twice.

    The order is that of the texts' hashes: mixed, but always the same.
    """
    files = list(files)
    chunks = [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
    unique: dict[bytes, Text] = {}
    with tqdm(total=len(files), unit="file", disable=None, desc="reading") as bar:
        for texts in in_order(_start, chunks, workers):
            for text in texts:
                unique.setdefault(_digest(text.text), text)
            bar.update(min(FILES_AT_ONCE, len(files) - bar.n))
    return [unique[digest] for digest in sorted(unique)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _start() -> Callable[[list[tuple[str, str, str]]], list[Text]]:
    return lambda files: [text for file in files for text in _texts(*file)]


def _texts(label: str, name: str, path: str) -> Iterator[Text]:
    """Yield the clean texts of one file; an unreadable or unparsable file has none."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return
    if len(content) > LARGEST_FILE:
        return
    if not name.endswith(".py"):
        if text := clean(content.decode(errors="ignore")):
            yield Text(text, label, f"{label}/{name}")
    elif b'"""' in content or b"'''" in content:
        for qualified, docstring in _docstrings(content):
            if text := clean(docstring):
                yield Text(text, label, f"{label}/{name}:{qualified}")


def _docstrings(source: bytes) -> list[tuple[str, str]]:
    """Return (qualified name, documentation) of a module, its classes and their functions, as far as documented."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no cycles: this halves the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    finally:
        if collecting:
            gc.enable()
    found, pending = [], [("", tree)]
    while pending:
        name, node = pending.pop()
        if text := ast.get_docstring(node):
            found.append((name, text.encode(errors="ignore").decode()))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                pending.append((f"{name}.{child.name}".lstrip("."), child))
    return found


def end_task(texts: list[Text]) -> dict[str, list[Text]]:
    """Return the examples of each split, balanced over the packages with most texts of a fit length, names masked."""
    shortest, longest = TASK_CHARACTERS
    fit: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        if shortest <= len(text.text) <= longest:
            fit[text.label].append(text)
    labels = sorted(sorted(fit, key=lambda label: (-len(fit[label]), label))[:LABELS])
    named = (text for label in labels if label != STANDARD_LIBRARY for text in fit[label])
    mask = masked({*labels, *(text.id.split("/")[1].removesuffix(".py") for text in named)})  # sklearn, for one
    seen: set[str] = set()
    task: dict[str, list[Text]] = {split: [] for split in TASK_SIZES}
    for label in labels:
        examples = []
        for text in fit[label]:
            hidden = mask(text.text)
            if len(hidden) >= shortest and hidden not in seen:
                seen.add(hidden)
                examples.append(Text(hidden, label, text.id))
        start, share = 0, min(1, len(examples) * LABELS / sum(TASK_SIZES.values()))
        for split, size in TASK_SIZES.items():
            count = int(size / LABELS * share)
            task[split] += examples[start : start + count]
            start += count
    return {split: sorted(examples, key=lambda text: _digest(text.text)) for split, examples in task.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``medley corpus``."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where corpus.jsonl and task/ go")
    parser.add_argument("--max-megabytes", type=float, metavar="MB", help="bound of the corpus (default: all there is)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an embedded corpus")


def run(args: argparse.Namespace) -> None:
    """Run ``medley corpus`` and print what was gathered."""
    for name in ("max_megabytes", "workers"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be more than 0")
    summary = write_corpus(args.out, args.max_megabytes, args.workers, args.overwrite)
    sizes = summary["megabytes"]
    for label in list(sizes)[:LABELS]:
        print(f"{label:24}{sizes[label]:8.1f} MB")
    print(
        f"{f'{len(sizes) - LABELS} others':24}{sum(list(sizes.values())[LABELS:]):8.1f} MB"
        if len(sizes) > LABELS
        else ""
    )
    print(f"{'together':24}{sum(sizes.values()):8.1f} MB → {args.out}/corpus.jsonl")
    counts = " / ".join(f"{count:,}" for count in summary["task"].values())
    print(f"end task: {counts} texts (train / dev / test) → {args.out}/task")
