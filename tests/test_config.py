import math
from typing import Literal

import pytest
from pydantic import Field

from pretrain.config import Config, Scheduled, ScheduledFraction, ScheduledNumber, apply_overrides, parse, read_yaml
from pretrain.errors import UserError, nearest, unknown


class Inner(Config):
    width: int = Field(3, ge=1)
    kind: Literal["narrow", "wide"] = "narrow"
    rate: ScheduledFraction = Scheduled(start=0.5)


class Outer(Config):
    name: str
    size: float = 1.0
    limit: int | None = None
    inner: Inner = Inner()
    many: list[Literal["a", "b"]] = []


class Numbers(Config):
    value: ScheduledNumber


def message_of(values, model=Outer) -> str:
    with pytest.raises(UserError) as caught:
        parse(model, values, "r.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nme": "x"}, "r.yaml: name: is required (and 1 more)"),
        ({"name": "x", "nam": 1}, "r.yaml: nam: unknown key; did you mean 'name'?"),
        ({"name": "x", "zzzz": 1}, "r.yaml: zzzz: unknown key; valid: inner, limit, many, name, size"),
        ({"name": "x", "inner": {"widht": 1}}, "r.yaml: inner.widht: unknown key; did you mean 'width'?"),
        ({"name": "x", "inner": {"rate": {"fro": 1}}}, "r.yaml: inner.rate.from: is required (and 1 more)"),
        (
            {"name": "x", "inner": {"rate": {"from": 1, "schedul": 1}}},
            "r.yaml: inner.rate.schedul: unknown key; did you mean 'schedule'?",
        ),
        ({"name": "x", "inner": 3}, "r.yaml: inner: input should be a valid dictionary or instance of Inner (got 3)"),
        (
            {"name": "x", "inner": {"width": 0}},
            "r.yaml: inner.width: input should be greater than or equal to 1 (got 0)",
        ),
        (
            {"name": "x", "inner": {"kind": "wid"}},
            "r.yaml: inner.kind: input should be 'narrow' or 'wide' (got 'wid'); did you mean 'wide'?",
        ),
        ({"name": "x", "inner": {"rate": 1.5}}, "r.yaml: inner.rate: must lie between 0 and 1 (got 1.5)"),
        ({"name": "x", "size": math.inf}, "r.yaml: size: input should be a finite number (got inf)"),
        ({"name": "x", "size": math.nan}, "r.yaml: size: input should be a finite number (got nan)"),
        ({"name": 3}, "r.yaml: name: input should be a valid string (got 3)"),
        ({"name": "x", "many": ["a", "c"]}, "r.yaml: many.1: input should be 'a' or 'b' (got 'c')"),
        ([1], "r.yaml: recipe: input should be a valid dictionary or instance of Outer"),
        ({"name": "x", 5: 1}, "r.yaml: 5: keys should be strings (got 5)"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_one_line_with_file_dotted_key_and_nearest_name(values, message):
    assert message_of(values) == message


def test_configs_do_not_change_after_validation():
    config = parse(Outer, {"name": "x"}, "r.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "y"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"a": {"b": 1}}),
        (["a.b=2"], {"a": {"b": 2}}),
        (["a.c=x"], {"a": {"b": 1, "c": "x"}}),
        (["p.q.r=[1, 2.5, null]"], {"a": {"b": 1}, "p": {"q": {"r": [1, 2.5, None]}}}),
        (["a={b: {c: true}}", "a.b.d=no=yes"], {"a": {"b": {"c": True, "d": "no=yes"}}}),
        (["a="], {"a": None}),
        (["a=", "a.b=3"], {"a": {"b": 3}}),
    ],
)
def test_overrides_are_yaml_values_at_dotted_keys_and_make_the_groups_they_need(overrides, expected):
    document = {"a": {"b": 1}}
    assert apply_overrides(document, overrides) == expected
    assert document == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "command line: 'a.b' is not of the form key=value"),
        ("=3", "command line: '=3' is not of the form key=value"),
        ("a..b=3", "command line: 'a..b=3' is not of the form key=value"),
        (".a=3", "command line: '.a=3' is not of the form key=value"),
        ("a.b.c=3", "command line: a.b.c: 'b' is a value, not a group of keys"),
        ("a.b=[1", "command line: a.b: '[1' is not valid YAML"),
        ("a.b={x: 1, x: 2}", "command line: a.b: '{x: 1, x: 2}' is not valid YAML"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(override, message):
    with pytest.raises(UserError) as caught:
        apply_overrides({"a": {"b": 1}}, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ":3", "not valid YAML"),
        ("a: 1\n  b: 2\n", ":2", "not valid YAML: mapping values are not allowed here"),
        ("a:\n  mlm: 1\n  rtd: 2\n  mlm: 3\n", ":4", "not valid YAML: key 'mlm' is there twice"),
        ("- a\n- b\n", "", "the top level must be a mapping of keys, not a list"),
        ("just text", "", "the top level must be a mapping of keys, not a str"),
        ("a: \x07\n", "", "not valid YAML: unacceptable character #x0007"),
        ("a: !!python/object:os.system {}\n", ":1", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_line(tmp_path, text, where, reason):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}{where}: {reason}")
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_mapping_and_anchors_merge(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")
    assert read_yaml(path)["y"] == {"a": 1, "b": 3}


def test_a_missing_file_names_its_nearest_sibling(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"quikstart.yaml: no such file; did you mean '.*/quickstart.yaml'\?$"):
        read_yaml(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match=r"no such file$"):
        read_yaml(tmp_path / "nowhere" / "x.yaml")


def test_a_folder_and_a_file_that_is_no_text_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_yaml(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.3, [0.3] * 5),
        (2, [2.0] * 5),
        ("1e-1", [0.1] * 5),  # YAML 1.1 reads 1e-1 as text
        ({"from": 0.3}, [0.3] * 5),
        ({"schedule": "linear", "from": 0.4, "to": 0.2}, [0.4, 0.35, 0.3, 0.25, 0.2]),
        ({"schedule": "cosine", "from": 1.0, "to": 0.0}, [(1 + math.cos(math.pi * p / 4)) / 2 for p in range(5)]),
        ({"schedule": "steps", "from": 0.1, "steps": {0.75: 0.3, 0.5: 0.2}}, [0.1, 0.1, 0.2, 0.3, 0.3]),
        ({"schedule": "steps", "from": 9, "steps": {0: 1}}, [1.0] * 5),
    ],
    ids=str,
)
def test_a_scheduled_number_has_its_value_at_every_part_of_the_run(value, expected):
    scheduled = parse(Numbers, {"value": value}, "r.yaml").value
    assert [scheduled.at(progress / 4) for progress in range(5)] == pytest.approx(expected)
    assert scheduled.at(-0.1) == scheduled.at(0.0) and scheduled.at(1.1) == scheduled.at(1.0)
    again = parse(Numbers, Numbers(value=scheduled).model_dump(mode="json", by_alias=True), "r.yaml")
    assert again.value == scheduled


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"from": 0.3, "to": 0.1}, r"value: 'to' goes with 'schedule: linear'"),
        ({"schedule": "linear", "from": 0.3}, r"value: 'to' goes with"),
        ({"schedule": "linear", "to": 0.3}, r"value\.from: is required"),
        ({"schedule": "steps", "from": 0.3}, r"value: 'steps: .*' goes with 'schedule: steps'"),
        ({"from": 0.3, "steps": {0.5: 1}}, r"value: 'steps: .*' goes with 'schedule: steps'"),
        ({"schedule": "steps", "from": 0.3, "steps": {500: 1}}, r"value: the keys of 'steps' are fractions of the run"),
        ({"schedule": "linaer", "from": 1, "to": 2}, r"value\.schedule: .*did you mean 'linear'\?"),
        ("much", r"value\.from: .*valid number.*'much'"),
        (None, r"value\.from: .*valid number"),
        ([1], r"value\.from: .*valid number"),
        ({"from": 1, "start": 2}, r"value\.start: unknown key"),
    ],
    ids=str,
)
def test_an_incomplete_or_contradictory_schedule_is_refused(value, message):
    assert message_of({"value": value}, Numbers).startswith("r.yaml: value")
    with pytest.raises(UserError, match=message):
        parse(Numbers, {"value": value}, "r.yaml")


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert nearest("mln", ["clm", "mlm", "rtd"]) == "mlm"
    assert nearest("zzz", ["clm", "mlm"]) is None
    assert nearest("x", []) is None
    assert str(unknown("objective", "zzz", ["b", "a"], "r.yaml: objectives")) == (
        "r.yaml: objectives: unknown objective 'zzz'; valid: a, b"
    )
    assert str(unknown("family", "x", [])) == "unknown family 'x'; valid: none"
