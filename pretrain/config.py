"""How recipes are read: strict pydantic models, YAML, dotted overrides, and errors that name file and key.

A wrong key or value never gets past this file, and the message is one line: the file, the dotted key, what is wrong,
and the nearest valid name.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pretrain.errors import UserError, nearest, unknown


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, numbers are finite, and values do not change after
    validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in kinds and kinds.intersection((int, float)):
            raise ValueError("must be a number")
        return value


class Scheduled(Config):
    """A number that changes over the run: ``0.3``, or ``{schedule: linear, from: 0.3, to: 0.15}``."""

    model_config = ConfigDict(populate_by_name=True)

    schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    start: float = Field(alias="from")
    """Value at the start of the run."""
    end: float | None = Field(None, alias="to")
    """Value at the end of the run, for ``linear`` and ``cosine``."""
    steps: dict[float, float] = {}
    """Fraction of the run → value from there on, for ``steps``."""

    @model_validator(mode="after")
    def _complete(self):
        if (self.schedule in ("linear", "cosine")) != (self.end is not None):
            raise ValueError("'to' goes with 'schedule: linear' or 'schedule: cosine', and they with it")
        if (self.schedule == "steps") != bool(self.steps):
            raise ValueError("'steps: {fraction of the run: value}' goes with 'schedule: steps', and it with them")
        if not all(0 <= fraction <= 1 for fraction in self.steps):
            raise ValueError("the keys of 'steps' are fractions of the run, between 0 and 1")
        return self

    def values(self) -> list[float]:
        """Return every number the schedule can end or start at, for range checks."""
        return [self.start, *([] if self.end is None else [self.end]), *self.steps.values()]

    def at(self, progress: float) -> float:
        """Return the value at ``progress``, the fraction of the run done, 0 to 1."""
        progress = min(max(progress, 0.0), 1.0)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * progress
        if self.schedule == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
        reached = [fraction for fraction in self.steps if fraction <= progress]
        return self.steps[max(reached)] if reached else self.start


def _within_unit(value: Scheduled) -> Scheduled:
    if not all(0.0 <= number <= 1.0 for number in value.values()):
        raise ValueError("must lie between 0 and 1")
    return value


def _scheduled(value: Any) -> Any:
    return value if isinstance(value, dict | Scheduled) else {"from": value}


ScheduledNumber = Annotated[Scheduled, BeforeValidator(_scheduled)]
ScheduledFraction = Annotated[Scheduled, BeforeValidator(_scheduled), AfterValidator(_within_unit)]

C = TypeVar("C", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, for which a key written twice is an error: the first would be lost silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file whose top level is a mapping; a :class:`UserError` names file and line otherwise."""
    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        match = nearest(path.name, siblings)
        hint = f"; did you mean '{path.parent / match}'?" if match else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: the top level must be a mapping of keys, not a {type(document).__name__}")
    return document


def apply_overrides(document: dict, overrides: list[str]) -> dict:
    """Return ``document`` with dotted ``key=value`` overrides applied; values are parsed as YAML."""
    result = copy.deepcopy(document)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"command line: '{text}' is not of the form key=value")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise UserError(f"command line: {key}: '{value}' is not valid YAML") from None
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise UserError(f"command line: {key}: '{parent}' is a value, not a group of keys")
        place[last] = parsed
    return result


def _fields(model: type[BaseModel], path: tuple) -> list[str]:
    """Names that are valid at ``path`` below ``model``."""
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        model = inner or model
    return [f.alias or name for name, f in model.model_fields.items()]


def explain(error: ValidationError, model: type[BaseModel], where: str, prefix: tuple[str, ...] = ()) -> UserError:
    """Turn pydantic's report into one line for the first problem, naming ``where`` (a file) and the dotted key."""
    problems = error.errors()
    first = problems[0]
    path = prefix + tuple(str(part) for part in first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        valid = _fields(model, first["loc"][:-1])
        match = nearest(path[-1], valid)
        reason = f"unknown key; did you mean '{match}'?" if match else f"unknown key; valid: {', '.join(sorted(valid))}"
    elif first["type"] == "missing":
        reason = "is required"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[0].lower() + reason[1:]
        given = first["input"]
        if not isinstance(given, dict | list | BaseModel):
            reason += f" (got {given!r})"
            expected = first.get("ctx", {}).get("expected", "")
            match = nearest(str(given), [w.strip("' ") for w in expected.replace(" or ", ",").split(",")])
            reason += f"; did you mean '{match}'?" if match else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(f"{where}: {key or 'recipe'}: {reason}{more}")


def parse_named(kind: str, valid: Mapping[str, type[C]], values: Mapping[str, Any], default: str, where: str) -> C:
    """Validate ``values`` as the configuration that their ``name`` stands for in ``valid``; ``kind`` is the section's
    key. A wrong name or key is a one-line :class:`UserError` that names ``where`` and the key."""
    name = values.get("name", default)
    if not isinstance(name, str) or name not in valid:
        raise unknown(kind, str(name), valid, f"{where}: {kind}.name")
    return parse(valid[name], {**values, "name": name}, where, (kind,))


def parse(model: type[C], values: Any, where: str, prefix: tuple[str, ...] = ()) -> C:
    """Validate ``values`` as ``model``; a failure is a one-line :class:`UserError` that names ``where`` and the key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, where, prefix) from None
