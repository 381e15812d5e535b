"""``medley prepare`` from end to end: what is stored, that nothing is lost, and how it ends when it cannot go on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pretrain import cli
from pretrain.data import prepare as prepare_module
from pretrain.data.prepare import _divided, prepare
from pretrain.data.samples import encoder
from pretrain.data.store import Store
from pretrain.data.tokenization import (
    barred_ids,
    frame,
    load_tokenizer,
    sentinel_ids,
    special_ids,
    train_tokenizer,
)
from pretrain.errors import UserError

NOUNS = ("ship", "Harbour", "lantern", "captain", "naïve gull", "storm", "漢字", "letter")
LITERALS = "[MASK] [SEP] [CLS] [PAD] [UNK] <s> </s> <mask> <pad> <unk>"


def document(number):
    """A document of its own for each number, from one sentence to many."""
    sentences = [
        f"The {NOUNS[(number + i) % 8]} no. {number} saw {i * number} {NOUNS[i % 7]}s, and that was all it saw."
        for i in range(1 + number * number % 23)
    ]
    return " ".join(sentences) + f" {LITERALS}" * (number % 3 == 0)


DOCUMENTS = [document(number) for number in range(120)]


def write_lines(path, documents=DOCUMENTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One prepared corpus for each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = write_lines(folder / "in.jsonl")
    for kind in ("wordpiece", "bpe"):
        prepare([lines], folder / kind, train_tokenizer=kind, vocabulary=600, max_length=32, heldout=0.1, workers=1)
    return folder


@pytest.fixture(params=["wordpiece", "bpe"])
def corpus(corpora, request):
    return corpora / request.param


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def as_text(tokenizer, text):
    """The ids of a text by the tokenizer itself, literal special tokens taken for text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_samples_without_their_special_tokens_are_the_documents_as_the_tokenizer_itself_reads_them(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    expected = sorted(tuple(as_text(tokenizer, text)) for text in DOCUMENTS)
    documents = []
    for split in ("train", "heldout"):
        store = Store(corpus / split)
        assert len(store) > 0 and store.max_length <= 32
        flat = []
        for sample_id in range(len(store)):
            sample = store[sample_id].tolist()
            assert (sample[0], sample[-1]) == (first, last) and len(sample) >= 2 + 8
            flat += sample[1:-1]
        while flat:  # documents lie one after another; none is the beginning of another
            ids = next(ids for ids in expected if tuple(flat[: len(ids)]) == ids)
            documents.append(ids)
            flat = flat[len(ids) :]
    assert sorted(documents) == expected


def test_literal_special_tokens_in_text_never_become_special_ids(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    barred = list(special_ids(tokenizer) - {tokenizer.unk_token_id})
    assert tokenizer.mask_token_id in barred
    store = Store(corpus / "train")
    for sample_id in range(len(store)):
        assert not np.isin(store[sample_id][1:-1], barred).any()
    assert any("mask" in tokenizer.decode(store[sample_id][1:-1].tolist()).lower() for sample_id in range(len(store)))


def test_the_saved_tokenizer_adds_the_special_tokens_the_samples_have(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    inner = as_text(tokenizer, "The captain saw it.")
    one = tokenizer("The captain saw it.")["input_ids"]
    pair = tokenizer("The captain saw it.", "The captain saw it.")["input_ids"]
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    assert one == first + inner + last and frame(tokenizer) == (first, last)
    middle = last if corpus.name == "wordpiece" else last * 2
    assert pair == first + inner + middle + inner + last
    assert tokenizer.model_max_length == 32 and tokenizer.is_fast
    names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    assert all(getattr(tokenizer, f"{name}_token_id") is not None for name in names)
    assert tokenizer.decode(inner).replace(" .", ".") == "The captain saw it."


def test_meta_tells_where_the_store_comes_from(corpus):
    metas = {split: json.loads((corpus / split / "meta.json").read_text()) for split in ("train", "heldout")}
    for meta in metas.values():
        file = corpus / split_path(meta)
        assert hashlib.sha256(file.read_bytes()).hexdigest() == meta["tokenizer"]["sha256"]
        assert meta["tokenizer"]["vocabulary_size"] == len(load_tokenizer(corpus / "tokenizer"))
        assert meta["source"]["options"]["max_length"] == 32 and meta["program"].startswith("medley ")
    assert sum(meta["documents"] for meta in metas.values()) == len(DOCUMENTS)
    assert sum(meta["characters"] for meta in metas.values()) == sum(map(len, DOCUMENTS))
    assert sum(meta["bytes"] for meta in metas.values()) == sum(len(text.encode()) for text in DOCUMENTS)


def split_path(meta):
    return Path(meta["tokenizer"]["path"]).name + "/tokenizer.json"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_same_input_gives_the_same_bytes_with_any_number_of_workers(corpora, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 10_000)
    options = {"train_tokenizer": kind, "vocabulary": 600, "max_length": 32, "heldout": 0.1}
    for workers in (1, 3):
        prepare([corpora / "in.jsonl"], tmp_path / str(workers), workers=workers, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    again = contents(corpora / kind)  # in batches of another size: the same but for the path of the input
    assert all(again[name] == data for name, data in contents(tmp_path / "1").items())


def held_out(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    store = Store(folder / "heldout")
    return {tuple(store[sample_id].tolist()) for sample_id in range(len(store))}, tokenizer


def test_held_out_documents_depend_neither_on_order_nor_on_file_names(corpora, tmp_path):
    tokenizer = corpora / "wordpiece" / "tokenizer"
    half = len(DOCUMENTS) // 2
    write_lines(tmp_path / "z.jsonl", DOCUMENTS[:half])
    write_lines(tmp_path / "y.jsonl", DOCUMENTS[half:][::-1])
    options = {"tokenizer": tokenizer, "max_length": 32, "heldout": 0.1, "workers": 1}
    summary = prepare([tmp_path / "y.jsonl", tmp_path / "z.jsonl"], tmp_path / "out", **options)
    assert held_out(tmp_path / "out")[0] == held_out(corpora / "wordpiece")[0]
    assert 3 <= summary["documents"]["heldout"] <= 30
    assert prepare([tmp_path / "y.jsonl"], tmp_path / "no", **{**options, "heldout": 0})["documents"]["heldout"] == 0


def test_all_pieces_of_a_document_go_to_the_split_of_its_first():
    pieces = [(f"{number} {part}", part == 0) for number in range(50) for part in range(4)]
    divided = list(_divided(pieces, 0.5))
    assert [text for text, _, _ in divided] == [text for text, _ in pieces]
    splits = [{split for _, split, _ in divided[start : start + 4]} for start in range(0, 200, 4)]
    assert all(len(split) == 1 for split in splits)
    assert {"train"} in splits and {"heldout"} in splits


@pytest.mark.parametrize("lowercase", [False, True])
def test_leaving_out_the_normaliser_on_plain_text_changes_nothing(lowercase):
    backend = train_tokenizer(lambda: iter(DOCUMENTS), "wordpiece", 500, lowercase, max_length=16).backend_tokenizer
    texts = [*DOCUMENTS, "Tab\tand\r\nline", "nul\x00 and \x7f", "É", "A\u00a0b", "", " ", LITERALS, "ſ İ"]
    expected = Tokenizer.from_str(backend.to_str())
    expected.encode_special_tokens = True
    for text, encoding in zip(texts, encoder(backend)(texts), strict=True):
        reference = expected.encode(text, add_special_tokens=False)
        assert (encoding.ids, encoding.offsets, encoding.word_ids) == (
            reference.ids,
            reference.offsets,
            reference.word_ids,
        )


def test_texts_too_short_for_a_sample_are_dropped_and_counted(corpora, tmp_path):
    write_lines(tmp_path / "in.jsonl", ["Hm.", *DOCUMENTS, "", "No."])
    options = {"tokenizer": corpora / "bpe" / "tokenizer", "workers": 1, "heldout": 0.0, "max_length": 32}
    summary = prepare([tmp_path / "in.jsonl"], tmp_path / "out", **options)
    assert summary["skipped"] == {"empty document": 1, "text too short for a sample": 2}
    assert summary["documents"]["train"] == len(DOCUMENTS) + 2
    meta = json.loads((tmp_path / "out" / "train" / "meta.json").read_text())
    assert meta["report"]["skipped"] == summary["skipped"] and meta["too_short"] == 2
    assert meta["report"]["examples"]["empty document"] == [f"{tmp_path}/in.jsonl:122"]


def word_tokenizer(folder, specials, template=None):
    """A tokenizer that takes each piece of text between white space for a word, special tokens among them."""
    from tokenizers import pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", *specials, "the", "gull", "flew"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": token for token, name in specials.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names).save_pretrained(folder)
    return folder


def test_a_tokenizer_that_would_read_special_tokens_in_text_is_kept_from_it(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "words", {"<s>": "bos", "</s>": "eos"})
    write_lines(tmp_path / "in.jsonl", ["the gull </s> flew <s> the gull flew the gull"])
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=str(tokenizer), workers=1, heldout=0)
    assert Store(tmp_path / "out" / "train")[0].tolist() == [1, 3, 4, 0, 5, 0, 3, 4, 5, 3, 4, 2]


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        ({}, ([], [])),
        ({"</s>": "eos"}, ([], [1])),
        ({"<s>": "bos"}, ([1], [])),
        ({"<s>": "bos", "</s>": "eos"}, ([1], [2])),
        ({"[CLS]": "cls", "[SEP]": "sep"}, ([1], [2])),
    ],
)
def test_samples_get_the_special_tokens_the_tokenizer_has(tmp_path, specials, expected):
    assert frame(load_tokenizer(word_tokenizer(tmp_path, specials))) == expected


def test_an_unknown_token_with_another_duty_is_barred_from_text(tmp_path):
    tokenizer = load_tokenizer(word_tokenizer(tmp_path, {"<s>": "bos"}))
    assert barred_ids(tokenizer) == {1} and special_ids(tokenizer) == {0, 1}
    tokenizer.eos_token = "<unk>"
    assert barred_ids(tokenizer) == {0, 1}


def test_a_lowercase_tokenizer_folds_case():
    tokenizer = train_tokenizer(lambda: iter(DOCUMENTS), "wordpiece", 400, lowercase=True, max_length=16)
    assert tokenizer("THE Storm")["input_ids"] == tokenizer("the storm")["input_ids"]
    assert len(tokenizer) <= 400


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_sentinels_are_special_tokens_within_the_vocabulary_that_no_text_becomes(tmp_path, kind):
    lines = write_lines(tmp_path / "in.jsonl", [f"{text} <extra_id_3> {text}" for text in DOCUMENTS[:9]])
    options = {"train_tokenizer": kind, "vocabulary": 400, "sentinels": 11, "min_length": 1}
    prepare([lines], tmp_path / "out", workers=1, **options)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    sentinels = sentinel_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(sentinels.tolist()) == [f"<extra_id_{number}>" for number in range(11)]
    assert len(tokenizer) <= 400 and set(sentinels.tolist()) < barred_ids(tokenizer)
    for split in ("train", "heldout"):
        assert not np.isin(Store(tmp_path / "out" / split).tokens[:], sentinels).any()
    assert tokenizer("<extra_id_3>", add_special_tokens=False)["input_ids"] == [sentinels[3]]


def test_a_tokenizer_without_sentinels_has_none():
    tokenizer = train_tokenizer(lambda: iter(DOCUMENTS), "wordpiece", 400, lowercase=False, max_length=16)
    assert len(sentinel_ids(tokenizer)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "page"}, "--documents: unknown value 'page'"),
        ({"train_tokenizer": "wordpeace"}, "did you mean 'wordpiece'"),
        ({"vocabulary": 20}, "--vocabulary 20: a wordpiece tokenizer needs at least 100"),
        ({"lowercase": True, "train_tokenizer": "bpe"}, "--lowercase is for a wordpiece tokenizer"),
        ({"max_length": 16}, "--max-length 16: leaves 14 tokens of text, .* twice --min-length 8"),
        ({"min_length": 0}, "--min-length 0"),
        ({"sentinels": -1}, "--sentinels -1"),
        ({"sentinels": 5, "tokenizer": "t5-small"}, "--sentinels is for a tokenizer trained here"),
        ({"sentinels": 201}, "--vocabulary 300: .* at least 100 entries beside 201 sentinels"),
        ({"heldout": 1.0}, r"--heldout 1\.0"),
        ({"workers": 0}, "--workers 0"),
        ({"tokenizer": "./none"}, "tokenizer ./none: no such folder"),
        ({"field": "texts"}, "unknown field 'texts'; did you mean 'text'"),
    ],
)
def test_a_wrong_option_is_told_in_one_line_and_leaves_nothing(tmp_path, options, message):
    lines = write_lines(tmp_path / "in.jsonl", DOCUMENTS[:9])
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        prepare([lines], tmp_path / "out", **{"vocabulary": 300, "workers": 1, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_folder_that_holds_no_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer [^\n]*: cannot be loaded[^\n]*$"):
        load_tokenizer(tmp_path)


def test_too_little_text_for_a_sample_is_an_error(tmp_path):
    lines = write_lines(tmp_path / "in.jsonl", ["Two words."])
    with pytest.raises(UserError, match="no sample for training in 1 documents"):
        prepare([lines], tmp_path / "out", vocabulary=300, workers=1, heldout=0)
    lines.write_text("")
    with pytest.raises(UserError, match="the input holds no document"):
        prepare([lines], tmp_path / "out", vocabulary=300, workers=1)


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_corpus(corpora, tmp_path):
    options = {"tokenizer": corpora / "bpe" / "tokenizer", "workers": 1}
    out, lines = tmp_path / "out", corpora / "in.jsonl"
    prepare([lines], out, **options)
    with pytest.raises(UserError, match="exists already"):
        prepare([lines], out, **options)
    before = contents(out)
    with pytest.raises(UserError):
        prepare([lines], out, overwrite=True, field="none", **options)
    assert contents(out) == before
    prepare([lines], out, overwrite=True, max_length=64, **options)
    assert Store(out / "train").max_length == 64 and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a folder this command made"):
        prepare([lines], tmp_path / "mine", overwrite=True, **options)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_command_prints_a_summary_and_its_errors_in_one_line(corpora, tmp_path, capsys):
    arguments = ["prepare", str(corpora / "in.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    arguments += ["--tokenizer", str(corpora / "bpe" / "tokenizer"), "--heldout", "0"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tokens/sample" in printed and "nothing is held out" in printed and str(tmp_path / "out") in printed
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("medley prepare: error: ") and "\n" not in error


STOPPABLE = """
import sys
from pretrain import cli
from pretrain.data.documents import Reader
pieces = Reader.pieces
def endless(self, tally):
    for _ in range(50):
        yield from pieces(self, tally)
    print("going", flush=True)
    while True:
        yield from pieces(self, tally)
Reader.pieces = endless
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_nothing_or_what_the_next_run_removes(corpora, tmp_path, sign, code):
    (tmp_path / "run.py").write_text(STOPPABLE)
    tokenizer = corpora / "bpe" / "tokenizer"
    command = [sys.executable, "run.py", "prepare", corpora / "in.jsonl", "--out", "out", "--tokenizer", tokenizer]
    process = subprocess.Popen(
        [*command, "--workers", "2"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout.readline() == "going\n"
    process.send_signal(sign)
    try:
        _, errors = process.communicate(timeout=60)  # the workers hold its pipes: so they have ended as well
    finally:
        process.kill()
    assert process.returncode == code
    left = {path.name for path in tmp_path.iterdir()} - {"run.py"}
    if sign == signal.SIGKILL:
        assert left == {f"out.partial-{process.pid}"}
        prepare([corpora / "in.jsonl"], tmp_path / "out", tokenizer=tokenizer, workers=1)
        assert {path.name for path in tmp_path.iterdir()} == {"run.py", "out"}
    else:
        assert left == set()
        assert errors == ("medley prepare: interrupted\n" if sign == signal.SIGINT else "")


def test_a_folder_another_run_is_writing_is_left_alone(corpora, tmp_path, monkeypatch):
    options = {"tokenizer": corpora / "bpe" / "tokenizer", "workers": 1}
    seen = []

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(prepare_module, "_write_samples", write_samples)
        with pytest.raises(UserError, match="another run is writing"):
            prepare([corpora / "in.jsonl"], tmp_path / "out", **options)
        seen.append([path.name for path in tmp_path.iterdir()])
        return write_samples(*args, **kwargs)

    write_samples = prepare_module._write_samples
    monkeypatch.setattr(prepare_module, "_write_samples", meanwhile)
    prepare([corpora / "in.jsonl"], tmp_path / "out", **options)
    assert seen == [[f"out.partial-{os.getpid()}"]] and [path.name for path in tmp_path.iterdir()] == ["out"]
