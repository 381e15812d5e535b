"""``medley corpus``: prose of the installed packages, and a task without overlaps or give-aways."""

import json
import re

import pytest

from pretrain import cli
from pretrain.data import embedded
from pretrain.data.embedded import end_task, gather, installed_files, write_corpus
from pretrain.data.prose import clean, masked
from pretrain.errors import UserError

SENTENCE = "This is the first line of a text that says what the function does and when it is of use to you."

DOCSTRING = f"""{SENTENCE}

    Parameters
    ----------
    value : int
        The value that is to be shown, or None if it is not known.

    >>> show(3)
    3
    three

    The example is over. See :class:`~package.module.Thing` and ``literal`` for `more <there>`_.

    Code follows::

        for i in range(10):
            print(i)

    ```python
    import fenced
    ```

    ===== =====
    one   two
    ===== =====
    | a | b |

    a = b[i] + c(d)[:, 3] ** 2; x = {{1: 2}}
    """


def test_cleaning_keeps_the_prose_and_drops_code_tables_and_markup():
    text = clean(DOCSTRING)
    assert text.startswith(SENTENCE)
    assert (
        "The value that is to be shown" in text and "The example is over. See package.module.Thing and literal" in text
    )
    for gone in (">>>", "three", "print(i)", "fenced", "=====", "| a |", "----", "``", ":class:", "** 2"):
        assert gone not in text, gone


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Too short to be of use.",
        f"{SENTENCE}\n\nLicensed under the Apache License, Version 2.0.",
        "x = [1, 2, 3]; y = {4: 5}\n" * 20,
        "alpha beta gamma delta epsilon zeta eta theta iota kappa\n" * 20,
        "El barco salió al amanecer y nadie sabía adónde iba, ni siquiera el capitán. " * 3,
    ],
)
def test_what_is_no_english_prose_is_dropped_whole(text):
    assert clean(text) is None


def test_masking_hides_names_in_any_spelling_and_dotted_paths():
    mask = masked(["scikit-learn", "torch", "pip"])
    text = "PyTorch, scikit_learn, TORCH, torch.nn.Linear, nn.Linear and pip; a pipe, e.g. 3.5, ends. So."
    assert mask(text) == "PACKAGE, PACKAGE, PACKAGE, PACKAGE, PACKAGE and PACKAGE; a pipe, e.g. 3.5, ends. So."


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Files of twelve packages in place of the installed ones."""
    files = []
    for number in range(12):
        label = f"package{chr(97 + number)}"
        names = []
        for function in range(6 + number):
            body = (
                f"{SENTENCE} It is number {number * 100 + function} of {label}, which is {label}.core.f{function}. " * 3
            )
            names.append(f'def f{function}():\n    """{body}"""\n')
        path = tmp_path / f"{label}.py"
        path.write_text(f'"""{SENTENCE} All of the packages have this."""\n' + "\n".join(names))
        files.append((label, f"{label}.py", str(path)))
    (tmp_path / "broken.py").write_text('def (:\n """no"""')
    files += [("broken", "broken.py", str(tmp_path / "broken.py")), ("gone", "gone.md", str(tmp_path / "gone.md"))]
    (tmp_path / "guide.md").write_text(f"# Guide\n\n{SENTENCE} The guide is a document.\n")
    files.append(("packagea", "guide.md", str(tmp_path / "guide.md")))
    monkeypatch.setattr(embedded, "installed_files", lambda: files)
    return files


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_are_unique_and_carry_their_package_and_name(packages):
    texts = gather(packages, workers=1)
    assert len({text.text for text in texts}) == len(texts) == sum(6 + number for number in range(12)) + 2
    by_id = {text.id: text for text in texts}
    assert by_id["packageb/packageb.py:f3"].text.startswith(SENTENCE)
    assert by_id["packagea/guide.md"].label == "packagea"
    assert sum("All of the packages" in text.text for text in texts) == 1


def test_same_environment_gives_the_same_files_with_any_number_of_workers(packages, tmp_path):
    for workers in (1, 2):
        write_corpus(tmp_path / str(workers), workers=workers)
    for name in ("corpus.jsonl", "task/train.jsonl", "task/dev.jsonl", "task/test.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() != b""


def test_the_task_is_balanced_hides_the_names_and_shares_no_text(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "TASK_SIZES", {"train": 40, "dev": 20, "test": 20})
    summary = write_corpus(tmp_path / "out", workers=1)
    task = {split: lines(tmp_path / "out" / "task" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert summary["task"] == {"train": 40, "dev": 20, "test": 20}
    for examples in task.values():
        counts = [sum(example["label"] == label for example in examples) for label in {e["label"] for e in examples}]
        assert len(counts) == 10 and max(counts) == min(counts)
    every = [example["text"] for examples in task.values() for example in examples]
    assert len(set(every)) == len(every) and all(len(text) >= 200 for text in every)
    assert not any(re.search(r"package[a-l]|core", text) for text in every)
    numbers = {re.search(r"number (\d+)", e["text"])[1] for split in ("dev", "test") for e in task[split]}
    corpus = lines(tmp_path / "out" / "corpus.jsonl")
    assert not numbers & {found[1] for line in corpus if (found := re.search(r"number (\d+)", line["text"]))}
    assert {"text", "label", "id"} == set(corpus[0])


def test_packages_with_few_texts_still_give_every_split_some(packages):
    task = end_task(gather(packages, workers=1))
    assert 0 < len(task["dev"]) < len(task["train"]) <= 10 * 18


def test_the_bound_on_the_corpus_holds(packages, tmp_path):
    full = write_corpus(tmp_path / "full", workers=1)
    part = write_corpus(tmp_path / "part", max_megabytes=0.01, workers=1)
    assert sum(full["megabytes"].values()) > 0.015
    size = sum(len(line["text"].encode()) for line in lines(tmp_path / "part" / "corpus.jsonl"))
    assert 0.005e6 < size <= 0.01e6 and sum(part["megabytes"].values()) == pytest.approx(size / 1e6)


def test_the_installed_packages_are_listed_without_tests_and_licences():
    files = installed_files()
    labels = {label for label, _, _ in files}
    assert {"numpy", "torch", "python"} <= labels and files == sorted(files, key=lambda file: f"{file[0]}/{file[1]}")
    assert not any("/tests/" in name or "LICENSE" in name or "site-packages" in name for _, name, _ in files)


def test_an_environment_without_documentation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "installed_files", list)
    with pytest.raises(UserError, match="have no documentation"):
        write_corpus(tmp_path / "out", workers=1)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_it_gathered_and_refuses_to_overwrite(packages, tmp_path, capsys):
    arguments = ["corpus", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 others" in printed and "together" in printed and "train / dev / test" in printed
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert cli.main([*arguments, "--max-megabytes", "0"]) == 2
