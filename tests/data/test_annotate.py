"""``medley annotate`` and ``medley prepare --annotate`` from end to end, and a run that reads what they made."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from pretrain import cli
from pretrain.data import annotate as annotate_module
from pretrain.data import prepare as prepare_module
from pretrain.data.alignment import Detokenizer
from pretrain.data.annotate import annotate
from pretrain.data.annotations import NO_UNIT, PARTS_OF_SPEECH, Annotation
from pretrain.data.prepare import prepare
from pretrain.data.store import Store
from pretrain.data.tokenization import barred_ids, load_tokenizer
from pretrain.errors import UserError
from tests.training.runs import metrics, recipe, train

KINDS = {"salient": "spans", "pos": "classes"}
PLACES = ("London", "New York", "Łódź", "Cape Town")


def document(number):
    """A document of its own for each number, of one sentence to a dozen, each with a place, a date and a number."""
    sentences = [
        f"The captain left {PLACES[(number + i) % 4]} on {1 + i * number % 28} March {1900 + number} "
        f"with {i + 2} ships, and didn't look back."
        for i in range(1 + number * number % 12)
    ]
    return " ".join(sentences)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus for each kind of tokenizer, annotated when it was prepared."""
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(90)))
    keys = {"heldout": 0.1, "workers": 1, "annotate": "salient,pos", "max_length": 512, "vocabulary": 700}
    prepare([folder / "in.jsonl"], folder / "bpe", train_tokenizer="bpe", **keys)
    prepare([folder / "in.jsonl"], folder / "cased", **keys)
    prepare([folder / "in.jsonl"], folder / "uncased", lowercase=True, **keys)
    prepare([folder / "in.jsonl"], folder / "short", train_tokenizer="bpe", **keys | {"max_length": 24})
    return folder


@pytest.fixture
def bare(corpora, tmp_path):
    """A copy of a corpus without annotations."""
    shutil.copytree(corpora / "bpe", tmp_path / "bare", ignore=shutil.ignore_patterns("annotations"))
    return tmp_path / "bare"


def units(corpus, split, name):
    return Annotation(Store(corpus / split), name, KINDS[name]).units[:]


def files(corpus):
    folders = [corpus / split / "annotations" for split in ("train", "heldout")]
    return {
        str(path.relative_to(corpus)): path.read_bytes() for one in folders for path in one.rglob("*") if path.is_file()
    }


def marked(corpus, split="train", name="salient"):
    """The text of each unit, sample by sample, read from the tokens alone."""
    store, annotation = Store(corpus / split), units(corpus, split, name)
    barred = barred_ids(load_tokenizer(corpus / "tokenizer"))
    text_of = Detokenizer(Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json")), barred)
    found = []
    for sample in range(len(store)):
        start, length = int(store.offsets[sample]), int(store.lengths[sample])
        its, text = annotation[start : start + length], text_of(store[sample])
        assert (its[np.isin(store[sample], list(barred))] == NO_UNIT).all()
        numbers = sorted(set(its.tolist()) - {NO_UNIT})
        places = [np.flatnonzero(its == number) for number in numbers]
        found.append([(number, text.text[text.starts[p[0]] : text.ends[p[-1]]].strip()) for number, p in
                      zip(numbers, places, strict=True)])  # fmt: skip
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["bpe", "cased"])
def test_annotating_afterwards_gives_what_preparing_did_where_the_tokenizer_keeps_the_case(
    corpora, tmp_path, kind, name
):
    shutil.copytree(corpora / kind, tmp_path / "again", ignore=shutil.ignore_patterns("annotations"))
    annotate(tmp_path / "again", name, workers=1)
    for split in ("train", "heldout"):
        raw, decoded = (units(corpus, split, name) for corpus in (corpora / kind, tmp_path / "again"))
        assert len(raw) > 0 and raw.tolist() == decoded.tolist()


@pytest.mark.parametrize("kind", ["bpe", "cased", "uncased"])
def test_spans_are_the_names_dates_and_numbers_of_the_text(corpora, kind):
    documents = {}
    for sample in marked(corpora / kind) + marked(corpora / kind, "heldout"):
        assert [number for number, _ in sample] == list(range(len(sample)))
        documents[" ".join(text for _, text in sample).lower()] = sample
    for number in (3, 10):
        spans = [
            part
            for i in range(1 + number * number % 12)
            for part in (PLACES[(number + i) % 4], f"{1 + i * number % 28} March {1900 + number}", f"{i + 2}")
        ]
        expected = " ".join(spans).lower()
        if kind == "uncased":  # it strips accents
            expected = expected.replace("ó", "o").replace("ź", "z")
        assert expected in documents


def test_a_span_ends_where_its_sample_ends(corpora):
    store = Store(corpora / "short" / "train")
    samples = marked(corpora / "short")
    assert store.max_length <= 24 and len(samples) == len(store)
    whole = {part for number in range(90) for sentence in [document(number)] for part in sentence.split()}
    cut = [text for sample in samples for _, text in sample if not set(text.split()) <= whole]
    for sample in samples:
        assert [number for number, _ in sample] == list(range(len(sample)))
    assert len(cut) < sum(map(len, samples)) / 5  # few are cut: samples end with sentences as far as they can


def test_classes_are_those_of_the_words(corpora):
    found = {}
    store, classes = Store(corpora / "cased" / "train"), units(corpora / "cased", "train", "pos")
    tokenizer = load_tokenizer(corpora / "cased" / "tokenizer")
    for token, number in zip(tokenizer.convert_ids_to_tokens(store.tokens[:].tolist()), classes.tolist(), strict=True):
        found.setdefault(token, set()).add("none" if number == NO_UNIT else PARTS_OF_SPEECH[number])
    expected = {"captain": "NOUN", "with": "ADP", "and": "CCONJ", "March": "PROPN", "London": "PROPN", ",": "PUNCT"}
    expected |= {"[CLS]": "none", "[SEP]": "none", "The": "DET"}
    assert {token: found[token] for token in expected} == {token: {tag} for token, tag in expected.items()}


def test_preparing_gives_the_same_annotations_with_any_number_of_workers(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 5_000)
    keys = {"tokenizer": corpora / "bpe" / "tokenizer", "max_length": 24, "heldout": 0.1, "annotate": "pos,salient"}
    for workers in (1, 2):
        prepare([corpora / "in.jsonl"], tmp_path / str(workers), workers=workers, **keys)
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) == 8
    for name in KINDS:
        assert units(tmp_path / "1", "train", name).tolist() == units(corpora / "short", "train", name).tolist()


def test_annotating_gives_the_same_bytes_with_any_number_of_workers_and_size_of_batch(bare, tmp_path, monkeypatch):
    shutil.copytree(bare, tmp_path / "other")
    annotate(bare, "salient", workers=1)
    monkeypatch.setattr(annotate_module, "BATCH_TOKENS", 300)
    annotate(tmp_path / "other", "salient", workers=2)
    assert files(bare) == files(tmp_path / "other") and len(files(bare)) == 4


def test_preparing_a_tokenizer_that_drops_what_it_cannot_say_keeps_units_and_tokens_together(corpora, tmp_path):
    from tests.data.test_prepare import word_tokenizer

    tokenizer = load_tokenizer(word_tokenizer(tmp_path / "words", {"<s>": "bos", "</s>": "eos"}))
    tokenizer.add_tokens(["London", "March", "12"])
    tokenizer.eos_token = "<unk>"  # so that an unknown word has nothing to become
    tokenizer.save_pretrained(tmp_path / "words")
    text = "the gull flew the gull </s> to London 12 March the gull flew the gull London"
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=tmp_path / "words", workers=1, heldout=0,
            annotate="salient", min_length=4)  # fmt: skip
    store = Store(tmp_path / "out" / "train")
    names = tokenizer.convert_ids_to_tokens(store[0].tolist())
    found = units(tmp_path / "out", "train", "salient").tolist()
    assert [name for name, unit in zip(names, found, strict=True) if unit != NO_UNIT] == [
        "London",
        "12",
        "March",
        "London",
    ]
    assert [unit for unit in found if unit != NO_UNIT] == [0, 1, 1, 2]


STOPPABLE = """
import os, signal, sys
from pretrain import cli
from pretrain.data import annotate, annotation_writer
annotate.BATCH_TOKENS = 300
annotation_writer.SAVE_SECONDS = float(sys.argv.pop(1))
stop, after = signal.Signals[sys.argv.pop(1)], int(sys.argv.pop(1))
append = annotation_writer.AnnotationWriter.append
def count(self, units, lengths):
    global after
    append(self, units, lengths)
    after -= 1
    if after == 0:
        os.kill(os.getpid(), stop)
annotation_writer.AnnotationWriter.append = count
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("sign", "code", "saves"), [("SIGINT", 130, "1000"), ("SIGKILL", -9, "0"), ("SIGKILL", -9, "1000")]
)
def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_bytes(bare, tmp_path, capsys, sign, code, saves):
    shutil.copytree(bare, tmp_path / "whole")
    annotate(tmp_path / "whole", "salient", workers=1)
    (tmp_path / "run.py").write_text(STOPPABLE)
    command = [sys.executable, tmp_path / "run.py", saves, sign, "5", "annotate", bare, "salient", "--workers", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == code and files(bare).keys() != files(tmp_path / "whole").keys()
    if sign == "SIGINT":
        assert done.stderr.splitlines()[-1] == "medley annotate: interrupted"
        assert "the same command goes on from there" in done.stderr.splitlines()[-2]
    with pytest.raises(UserError, match="has no annotation 'salient'"):
        units(bare, "train", "salient")
    capsys.readouterr()
    assert cli.main(["annotate", str(bare), "salient", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert ("going on after" in captured.err) == (saves == "0" or sign == "SIGINT")
    assert files(bare) == files(tmp_path / "whole")


def test_both_stores_are_annotated_and_the_throughput_is_told(bare, capsys):
    assert cli.main(["annotate", str(bare), "salient", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "tokens/s" in captured.out and "train" in captured.out and "heldout" in captured.out
    assert captured.err.count("\n") == 1 and "missing: names in lower case" in captured.err
    meta = json.loads((bare / "heldout" / "annotations" / "salient" / "meta.json").read_text())
    assert meta["made_by"] == {"annotation": "salient", "rules": 1, "text": "decoded"}
    assert meta["store"] == Store(bare / "heldout").fingerprint and meta["samples"] == len(Store(bare / "heldout"))


def test_a_tokenizer_that_folds_case_is_told_of(corpora, tmp_path, capsys):
    shutil.copytree(corpora / "uncased", tmp_path / "bare", ignore=shutil.ignore_patterns("annotations"))
    annotate(tmp_path / "bare", "salient", workers=1)
    assert "the tokenizer folds case" in capsys.readouterr().err
    found = {text for sample in marked(tmp_path / "bare") for _, text in sample}
    assert any("march 19" in text for text in found) and "london" not in found


def test_an_annotation_that_exists_is_replaced_only_when_asked(bare):
    annotate(bare, "pos", workers=1)
    before = files(bare)
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        annotate(bare, "pos", workers=1)
    annotate(bare, "pos", workers=1, overwrite=True)
    assert files(bare) == before
    shutil.rmtree(bare / "heldout" / "annotations")  # as if killed between the two stores
    assert list(annotate(bare, "pos", workers=1)["splits"]) == ["heldout"]
    assert files(bare) == before


def test_a_corpus_without_held_out_samples_is_annotated(bare):
    shutil.rmtree(bare / "heldout")
    assert list(annotate(bare, "salient", workers=1)["splits"]) == ["train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such", "salient"], "no/such: no prepared corpus: it has no store 'train'; make one with medley prepare"),
        (["{bare}/train", "salient"], "did you mean"),
        (["{bare}", "salent"], "NAME: unknown annotation 'salent'; did you mean 'salient'?"),
        (["{bare}", "salient", "--workers", "0"], "--workers 0: must be at least 1"),
        (["{bare}", "salient", "--spacy", "no/such/model"], "--spacy"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(bare, capsys, arguments, message):
    assert cli.main(["annotate", *(word.format(bare=bare) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("medley annotate: error: ") and error.count("\n") == 1 and message in error
    assert not (bare / "train" / "annotations").exists()


def test_another_tokenizer_in_the_corpus_is_refused(bare, corpora):
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(UserError, match="no such file"):
        annotate(bare, "salient")
    shutil.copytree(corpora / "cased" / "tokenizer", bare / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer the store was made with"):
        annotate(bare, "salient")


def test_preparing_with_an_unknown_annotation_is_refused_before_anything_is_read(corpora, tmp_path):
    with pytest.raises(UserError, match=r"--annotate: unknown annotation 'poss'; did you mean 'pos'\?"):
        prepare([corpora / "in.jsonl"], tmp_path / "out", annotate="salient,poss")
    with pytest.raises(UserError, match="--spacy goes with --annotate"):
        prepare([corpora / "in.jsonl"], tmp_path / "out", spacy="en_core_web_sm")
    assert list(tmp_path.iterdir()) == []


SALIENT = {"objectives": {"mlm": {"masking": {"policy": "salient"}}}, "sampler": {}, "training__steps": 3}


def test_a_run_that_masks_salient_spans_logs_where_it_found_none(corpora, tmp_path):
    document = recipe(corpora / "short", tmp_path / "run", **SALIENT, training__batch_rows=4)
    code, _, err = train(document)
    assert code == 0, err
    records = metrics(tmp_path / "run")
    assert len(records) == 3 and all(record["tallies"].keys() == {"mlm/masked_at_random"} for record in records)
    without = {number for number, sample in enumerate(marked(corpora / "short")) if not sample}
    assert all(0 <= record["tallies"]["mlm/masked_at_random"] <= len(without) for record in records)
    assert all(record["targets"]["mlm"] > 0 and np.isfinite(record["loss"]) for record in records)


@pytest.mark.parametrize("lacking", ["train", "heldout"])
def test_a_run_whose_store_lacks_the_annotation_is_refused_before_any_process_group(
    corpora, tmp_path, monkeypatch, lacking
):
    def refuse(*_):
        raise AssertionError("a process group was made")

    monkeypatch.setattr("pretrain.training.run.init_distributed", refuse)
    shutil.copytree(corpora / "short", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / lacking / "annotations" / "salient")
    code, _, err = train(recipe(tmp_path / "store", tmp_path / "run", **SALIENT, training__batch_rows=4))
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"{tmp_path / 'store' / lacking}: has no annotation 'salient'" in err
    assert f"make it with 'medley annotate {tmp_path / 'store'} salient'" in err
    assert not (tmp_path / "run").exists()
