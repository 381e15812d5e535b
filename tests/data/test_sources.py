"""Finding, opening and reading inputs: every format gives the same documents, and nothing is lost silently."""

import gzip
import json
import lzma

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from pretrain.data import documents as documents_module
from pretrain.data.documents import EMPTY, Reader, Tally
from pretrain.data.sources import find_sources
from pretrain.data.splitting import PIECE_CHARACTERS
from pretrain.errors import UserError

TEXTS = ["One day.\nA line.", "naïve 漢字 🙂", "The third."]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(*inputs, field="text", documents="blank_line", max_bad=0.0, split="train", check=True):
    """Return ([documents, each a list of pieces], tally, lines said)."""
    said = []
    tally = Tally(max_bad, field, said.append)
    found = []
    for text, first in Reader(find_sources(inputs)[0], field, documents, None, split).pieces(tally):
        found += [[text]] if first else []
        if not first:
            found[-1].append(text)
    if check:
        tally.check()
    assert tally.documents == len(found)
    return found, tally, said


def json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet_file(path, texts):
    parquet.write_table(pa.table({"text": texts, "other": ["x"] * len(texts)}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path, compression):
    lines, text = tmp_path / f"a.jsonl{compression}", tmp_path / f"b.txt{compression}"
    lines.write_bytes(COMPRESS[compression](json_lines(*({"text": text} for text in TEXTS))))
    text.write_bytes(COMPRESS[compression]("\n\n".join(TEXTS).encode()))
    assert read(lines)[0] == read(text)[0] == [[text] for text in TEXTS]


def test_a_zstd_file_of_several_frames_is_read_to_its_end(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(compress(b"One.\n\nTw") + compress(b"o.\n"))
    assert read(tmp_path / "a.txt.zst")[0] == [["One."], ["Two."]]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none of it" + data])
def test_a_damaged_compressed_file_is_named(tmp_path, compression, damage):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(damage(COMPRESS[compression](" ".join(map(str, range(100_000))).encode())))
    with pytest.raises(UserError, match=rf"a\.txt{compression}: truncated or damaged"):
        read(path)


def test_parquet_and_datasets_give_the_same_documents_as_json_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = parquet_file(tmp_path / "a.parquet", TEXTS)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    parquet_file(tmp_path / "raw" / "train.parquet", TEXTS)
    expected = [[text] for text in TEXTS]
    assert read(file)[0] == expected
    assert read(f"hf:{tmp_path / 'saved'}")[0] == expected
    assert read(f"hf:{tmp_path / 'raw'}")[0] == expected
    with pytest.raises(UserError, match="cannot be read by datasets"):
        read(f"hf:{tmp_path / 'raw'}", split="nosuch")
    with pytest.raises(UserError, match=r"unknown field 'txt'; did you mean 'text'\?"):
        read(f"hf:{tmp_path / 'saved'}", field="txt")


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("blank_line", [["a\nb"], ["c"]]),
        ("line", [["a"], ["b"], ["c"]]),
        ("file", [["a\nb\n \n\n\nc"]]),
    ],
)
def test_documents_of_a_text_file_are_what_the_option_says(tmp_path, documents, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n\na\r\nb\r\n \r\n\r\n\nc\n\n")
    assert read(tmp_path / "a.txt", documents=documents)[0] == expected


@pytest.mark.parametrize("documents", ["blank_line", "line", "file"])
@pytest.mark.parametrize("unit", ["word " * 13, "漢字", "x"])
def test_a_long_document_comes_in_bounded_pieces_without_a_loss(tmp_path, documents, unit):
    text = (unit * (3 * PIECE_CHARACTERS // len(unit))).strip()
    (tmp_path / "a.txt").write_text(text + "\n\nNext.\n" * (documents != "file"))
    found, _, _ = read(tmp_path / "a.txt", documents=documents)
    assert len(found) == 1 + (documents != "file") and len(found[0]) > 2
    assert all(len(piece) <= PIECE_CHARACTERS for piece in found[0])
    assert "".join(found[0]).replace(" ", "") == text.replace(" ", "")
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": text}))
    pieces = read(tmp_path / "a.jsonl")[0][0]
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "") and len(pieces) > 2


def test_long_documents_of_many_lines_are_cut_at_lines(tmp_path):
    lines = [f"This is line number {number}." for number in range(10_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found, _, _ = read(tmp_path / "a.txt")
    assert len(found) == 1 and len(found[0]) > 2
    assert [line for piece in found[0] for line in piece.split("\n")] == lines


def test_bad_documents_are_counted_by_kind_and_the_first_are_told_with_their_line(tmp_path):
    good = json_lines({"text": "good"})
    bad = [
        b'{"text": \n',
        b"[1]\n",
        b'{"text": "\xff"}\n',
        b'{"txt": "x"}\n',
        b'{"text": 7}\n',
        b'{"text": "\\ud800"}\n',
    ]
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + b"".join(bad) + b'{"text": " "}\n' + b"[2]\n[3]\n" + good)
    found, tally, said = read(tmp_path / "a.jsonl", max_bad=0.9)
    assert found == [["good"], ["good"]]
    assert tally.skipped == {
        "broken JSON": 4, "invalid UTF-8": 2, "no such field": 1, "field is not text": 1, EMPTY: 1
    }  # fmt: skip
    assert tally.bad == 8
    assert f"skipped {tmp_path}/a.jsonl:3: broken JSON" in said
    assert f"skipped {tmp_path}/a.jsonl:5: invalid UTF-8" in said
    assert sum(line.endswith("broken JSON") for line in said) == 3  # the fourth is only counted


def test_invalid_utf8_in_a_text_file_costs_its_document_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\n\nTwo\nis \xff bad\nhere.\n\nThree.\n")
    found, tally, said = read(tmp_path / "a.txt", max_bad=0.5)
    assert found == [["One."], ["Three."]]
    assert tally.skipped == {"invalid UTF-8": 1} and said == [f"skipped {tmp_path}/a.txt:4: invalid UTF-8"]


def test_more_bad_documents_than_allowed_is_an_error_that_names_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "good"}) * 9 + b"broken\n")
    assert read(tmp_path / "a.jsonl", max_bad=0.1)[1].bad == 1
    with pytest.raises(UserError, match=r"^1 of 10 documents are bad, .*--max-bad 0\.09.*a\.jsonl:10: broken JSON$"):
        read(tmp_path / "a.jsonl", max_bad=0.09)


def test_hopeless_input_is_given_up_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "good"}) + b"broken\n" * 5000)
    with pytest.raises(UserError, match=r"^101 of 102 documents"):
        read(tmp_path / "a.jsonl", max_bad=0.001)


def test_a_wrong_field_is_an_error_with_the_nearest_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"content": "x", "id": 1}, {"content": "y"}))
    parquet_file(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"a\.jsonl:1: unknown field 'contents'; did you mean 'content'\?"):
        read(tmp_path / "a.jsonl", field="contents", max_bad=0.9)
    with pytest.raises(UserError, match=r"a\.parquet: unknown field 'texts'; did you mean 'text'\?"):
        read(tmp_path / "a.parquet", field="texts")


def test_parquet_that_is_no_parquet_or_has_no_text_is_refused_and_null_is_bad(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        read(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="column 'text' holds int64, not text"):
        read(tmp_path / "b.parquet")
    found, tally, _ = read(parquet_file(tmp_path / "c.parquet", ["a", None, "b"]), max_bad=0.5)
    assert found == [["a"], ["b"]] and tally.skipped == {"field is not text": 1}


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_input_without_a_document_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for documents in ("blank_line", "line", "file"):
        with pytest.raises(UserError, match="holds no document"):
            read(tmp_path / "a.txt", documents=documents)


def test_a_folder_gives_its_files_by_name_and_tells_what_it_passes_over(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name, text in (("z.txt", "last"), ("b/c/y.txt", "middle"), ("a.txt", "first"), ("b/readme.rst", "no")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path)[0] == [["first"], ["middle"], ["last"]]
    assert find_sources([tmp_path])[1] == [f"{tmp_path}/b/readme.rst"]
    assert read(f"{tmp_path}/**/[yz].txt")[0] == [["middle"], ["last"]]
    assert read(tmp_path / "z.txt", tmp_path)[0] == [["last"], ["first"], ["middle"]]  # each file once


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("*.none", "no such file"),
        ("a.csv", r"unknown suffix '\.csv'; valid: \.txt, \.jsonl, \.parquet"),
        ("a.parquet.gz", r"unknown suffix '\.parquet\.gz'"),
        ("empty", r"no \.txt, \.jsonl, \.parquet file in this folder"),
    ],
)
def test_inputs_that_cannot_be_are_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(UserError, match=message):
        find_sources([tmp_path / name])


def test_a_sample_takes_the_beginning_of_each_file_in_proportion(tmp_path):
    for name, count in (("a", 100), ("b", 300)):
        (tmp_path / f"{name}.txt").write_text(f"{name}{name}{name}\n" * count)
    reader = Reader(find_sources([tmp_path])[0], "text", "line", None, "train")
    texts = [text for text, _ in reader.sample(400, Tally(0, "text", print))]
    assert abs(texts.count("aaa") - 100 / 3) <= 1 and abs(texts.count("bbb") - 100) <= 1


def test_position_reaches_the_size_of_all_sources(tmp_path):
    parquet_file(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text"))
    reader = Reader(find_sources([tmp_path])[0], "text", "line", None, "train")
    assert reader.position == 0
    assert len(list(reader.pieces(Tally(0, "text", print)))) == 4
    assert reader.position == reader.total_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_kinds_of_bad_documents_are_the_ones_that_count():
    tally = Tally(0.0, "text", lambda line: None)
    tally.documents = 1
    for number, kind in enumerate(documents_module.BAD):
        tally.skip(kind, "a", number)
    tally.skip(EMPTY, "a", 9)
    assert tally.bad == len(documents_module.BAD)
