"""Files of contexts and answers."""

import json

import pytest

from pretrain.errors import UserError
from pretrain.masking.learning.answers import Context, read_answers

TEXT = "Ada Lovelace was born in London in 1815."
GOOD = {"text": "London", "start": 25}


def write(tmp_path, *rows):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_json_lines_and_squad_give_the_same(tmp_path):
    rows = [
        {"context": TEXT, "answers": [GOOD, {"text": "1815", "start": 35}]},
        {"context": "none here", "answers": []},
        {"context": "  é: Ünïcode counts characters", "answers": [{"text": "Ünïcode", "start": 5}]},
    ]

    def question(number, answers, **more):
        marked = [{"text": a["text"], "answer_start": a["start"]} for a in answers]
        return {"id": f"q{number}", "question": "?", "answers": marked, **more}

    first, empty, other = (row["answers"] for row in rows)
    paragraphs = [
        {"context": TEXT, "qas": [question(0, first[:1]), question(1, first[1:])]},
        {"context": "none here", "qas": [question(2, empty, is_impossible=True, plausible_answers=[{"text": "none"}])]},
    ]
    document = {
        "version": "v2.0",
        "data": [
            {"title": "a", "paragraphs": paragraphs},
            {"title": "b", "paragraphs": [{"context": rows[2]["context"], "qas": [question(3, other)]}]},
        ],
    }
    squad = tmp_path / "squad.json"
    lines = read_answers(write(tmp_path, *rows), 0)
    assert lines.contexts == [
        Context(TEXT, ((25, 31), (35, 39))),
        Context("none here", ()),
        Context("  é: Ünïcode counts characters", ((5, 12),)),
    ]
    for indent in (None, 1):
        squad.write_text(json.dumps(document, indent=indent))
        assert read_answers(squad, 0).contexts == lines.contexts
    squad.write_text(json.dumps(rows[0]))  # one line, without the line's end
    assert read_answers(squad, 0).contexts == lines.contexts[:1]


def test_equal_contexts_are_one_and_equal_answers_too_without_the_space_around_them(tmp_path):
    rows = [
        {"context": TEXT, "answers": [GOOD, GOOD]},
        {"context": TEXT, "answers": [{"text": " London ", "start": 24}]},
    ]
    assert read_answers(write(tmp_path, *rows), 0).contexts == [Context(TEXT, ((25, 31),))]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"text": "London", "start": 24}, "answer 'London' at 24: the context has ' Londo' there; it stands at 25"),
        ({"text": "Paris", "start": 25}, "answer 'Paris' at 25: the context has 'Londo' there"),
        (
            {"text": "1815.", "start": 37},
            "answer '1815.' at 37 lies outside its context of 40 characters; it stands at 35",
        ),
        ({"text": ".", "start": -1}, "answer '.' at -1 lies outside its context of 40 characters; it stands at 39"),
        ({"text": " ", "start": 3}, "the answer's text is ' '; it must be text that stands in the context"),
        ({"text": None, "start": 3}, "the answer's text is None; it must be text that stands in the context"),
        ({"text": "Ada", "start": "0"}, "answer 'Ada': its start is '0', not a number of characters"),
        ({"text": "Ada", "start": False}, "answer 'Ada': its start is False, not a number of characters"),
    ],
)
def test_an_answer_that_contradicts_its_context_is_told_with_file_and_line(answer, told, tmp_path):
    file = write(tmp_path, {"context": TEXT, "answers": [GOOD]}, {"context": TEXT, "answers": [answer]})
    with pytest.raises(UserError) as error:
        read_answers(file, 0.49)
    assert str(error.value) == f"{file}:2: {told} (1 of 2 answers are bad, --max-bad is 0.49)"
    left = read_answers(file, 0.5)
    assert (left.bad, left.examples, left.contexts) == (1, [f"{file}:2: {told}"], [Context(TEXT, ((25, 31),))])


def test_a_bad_answer_of_squad_is_told_with_the_id_of_its_question(tmp_path):
    question = {"id": "57", "answers": [{"text": "Paris", "answer_start": 25}]}
    file = write(tmp_path, {"data": [{"paragraphs": [{"context": TEXT, "qas": [question]}]}]})
    with pytest.raises(UserError, match=f"^{file}: question 57: answer 'Paris' at 25: the context has 'Londo' there"):
        read_answers(file, 0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"context": ', ":1: not JSON"),
        ("3", ":1: a int where an object with 'answers' is needed"),
        ({"context": TEXT, "answer": []}, ":1: no 'answers' (there is context, answer); did you mean 'answer'?"),
        ({"context": TEXT, "answers": {}}, ":1: 'answers' is {}, not a list"),
        ({"context": TEXT, "answers": ["London"]}, ":1: a str where an object with 'text' is needed"),
        ({"context": TEXT, "answers": [{"text": "Ada"}]}, ":1: no 'start' (there is text)"),
        ({"context": 5, "answers": []}, ":1: 'context' is 5, not a str"),
        ({"context": TEXT, "answers": []}, ": holds no answer"),
        ("", ": holds no answer"),
        ({"data": 7}, ": 'data' is 7, not a list"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, ": data[0].paragraphs[0]: no 'context' (there is qas)"),
        (
            {"data": [{"paragraphs": [{"context": TEXT, "qas": [{"question": "?"}]}]}]},
            ": data[0].paragraphs[0].qas[0]: no 'answers' (there is question)",
        ),
    ],
)
def test_a_file_of_another_shape_is_told_in_one_line_with_its_place(row, told, tmp_path):
    file = write(tmp_path, row)
    with pytest.raises(UserError) as error:
        read_answers(file, 0.5)
    assert str(error.value).startswith(f"{file}{told}") and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_answers(tmp_path / "none", 0)
    (tmp_path / "binary").write_bytes(b"{\xff}")
    with pytest.raises(UserError, match="not UTF-8 at byte 1"):
        read_answers(tmp_path / "binary", 0)
