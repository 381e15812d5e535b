"""What a soup is made of: models of one architecture, one tokenizer and one starting point, and their weights."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel

from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.evaluation.model import quiet
from pretrain.export import FACTS, export, resolve_checkpoint
from pretrain.model.encoder import is_encoder_decoder
from pretrain.training.saving import STATE

WEIGHTS = "model.safetensors"
_LABELS = ("id2label", "label2id", "problem_type")  # of a head for classification; others carry them along
# What of a Hugging Face config decides neither shapes nor what is computed without dropout.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "transformers_version",
    "use_cache",
    *_LABELS,
}
_OTHER_HEADS = "; give --as to export all alike, or average the backbones alone with --as backbone"
_OF_TOKENIZATION = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
"""What of ``tokenizer.json`` decides which tokens a text becomes."""


@dataclass(frozen=True)
class Ingredient:
    """A model to average: a Hugging Face export, or a checkpoint that is exported first."""

    name: str
    """As the user named it."""
    source: Path
    """The export, or the checkpoint."""
    is_export: bool
    initialisation: str | None
    """Fingerprint of the weights that its backbone began with; None if it does not say."""

    @property
    def described(self) -> Path:
        """The folder of its configuration and tokenizer."""
        return self.source if self.is_export else self.source / "model"


def find_ingredients(paths: Sequence[str | Path], kind: str | None = None) -> list[Ingredient]:
    """Return what the user named: exports, checkpoints, or runs, whose newest good checkpoints are taken; ``kind`` is
    what checkpoints will be exported as.

    Raises:
        UserError: if there are fewer than two, one is given twice, or one is none of these.
    """
    if len(paths) < 2:
        raise UserError(f"{', '.join(map(str, paths)) or 'nothing'}: a soup is of two models at least; name more")
    found: dict[Path, Ingredient] = {}
    for ingredient in (_find(path, kind) for path in paths):
        if (before := found.get(ingredient.source)) is not None:
            raise UserError(f"{before.name} and {ingredient.name}: are the same folder; name each ingredient once")
        found[ingredient.source] = ingredient
    return list(found.values())


def check_alike(ingredients: Sequence[Ingredient], *, any_start: bool = False) -> None:
    """Compare every ingredient with the first, reading no weights. With ``any_start`` some need not say how they began.

    Raises:
        UserError: naming two folders and the first difference in architecture, tokenizer or starting point.
    """
    first, *others = ingredients
    for describe in (_architecture, _tokenization):
        expected = describe(first.described)
        for other in others:
            _check_equal(first, other, expected, describe(other.described))
    for ingredient in ingredients:
        if ingredient.initialisation is None and not any_start:
            other = others[0] if ingredient is first else first
            raise UserError(
                f"{ingredient.name}: does not say which weights it began with; "
                f"if they are those that {other.name} began with, give --any-start"
            )
    known = [each for each in ingredients if each.initialisation is not None]
    for other in known[1:]:
        if other.initialisation != known[0].initialisation:
            raise UserError(
                f"{known[0].name} and {other.name}: began with other weights (initialisation "
                f"{known[0].initialisation[:12]} and {other.initialisation[:12]}); a soup needs one starting point"
            )


@contextmanager
def as_exports(
    ingredients: Sequence[Ingredient], kind: str | None, say: Callable[[str], None]
) -> Iterator[list["Weights"]]:
    """Give the weights of every ingredient; checkpoints are exported to a temporary folder first, as ``kind``.

    Of a kind ``backbone`` are the backbones of exports of any kind, without what a pooler adds.

    Raises:
        UserError: if an export is of another kind than the first, or has other tensors.
    """
    with tempfile.TemporaryDirectory(prefix="medley-soup-") as folder:
        opened = []
        for number, each in enumerate(ingredients):
            source = each.source
            if not each.is_export:
                say(f"exporting {source}")
                with quiet():
                    source = export(source, Path(folder) / str(number), kind)
            opened.append(Weights(source, backbone=kind == "backbone"))
        for ingredient, weights in zip(ingredients[1:], opened[1:], strict=True):
            _check_equal(ingredients[0], ingredient, opened[0].config, weights.config, _OTHER_HEADS)
            _check_tensors(ingredients[0], ingredient, opened[0], weights)
        yield opened


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face folder by name, read when asked for.

    Args:
        backbone: show the backbone's alone, under the names that they have without a head.

    Raises:
        UserError: if the folder holds no safetensors that can be read.
    """

    def __init__(self, folder: Path, *, backbone: bool = False):
        self.folder, config = folder, _config(folder)
        model_class = AutoModel._model_mapping[type(config)] if backbone else None
        if backbone and is_encoder_decoder(config):
            raise UserError(f"--as backbone: {folder} is an encoder–decoder ('{config.model_type}'), which has none")
        self.architectures = [model_class.__name__] if backbone else config.architectures
        classifies = any(name.endswith("ForSequenceClassification") for name in self.architectures or ())
        labels = {key: getattr(config, key) for key in _LABELS} if classifies else {}
        self.config: dict[str, Any] = {"architectures": self.architectures, **labels, **_architecture(folder)}
        """What of its configuration others have to share."""
        try:
            files = [safe_open(path, "pt") for path in _files(folder)]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: its weights cannot be read ({error})") from None
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        self._places = {name: (file, name) for name, file in stored.items()}
        if backbone:
            prefix = f"{model_class.base_model_prefix}."
            inside = {name.removeprefix(prefix): each for name, each in self._places.items() if name.startswith(prefix)}
            own = inside or self._places
            self._places = {name: place for name, place in own.items() if not name.startswith("pooler.")}

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self._places[name]
        return file.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def described(self, name: str) -> str:
        """Return a tensor's dtype and shape, without reading it."""
        file, stored = self._places[name]
        piece = file.get_slice(stored)
        return f"{piece.get_dtype()} {piece.get_shape()}"


def _find(path: str | Path, kind: str | None) -> Ingredient:
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; an ingredient is an export, a checkpoint or a run folder")
    if (folder / "config.json").is_file():
        return Ingredient(str(path), folder, True, _initialisation(folder / FACTS))
    checkpoint = resolve_checkpoint(folder)
    began = None if kind == "generator" else _initialisation(checkpoint / STATE)  # what is recorded is the backbone's
    return Ingredient(str(path), checkpoint, False, began)


def _initialisation(file: Path) -> str | None:
    try:
        return json.loads(file.read_text()).get("initialisation")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error})") from None


def _config(folder: Path):
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: its config.json cannot be read: {reason}") from None


def _architecture(folder: Path) -> dict[str, Any]:
    facts = _config(folder).to_dict()
    return {
        key: facts[key]
        for key in ("model_type", *sorted(facts))
        if key not in _INCIDENTAL and "drop" not in key and not key.startswith("_attn")
    }


def _tokenization(folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokens = {f"token {index}": token for token, index in vocabulary}
    sections = {f"{name} of the tokenizer": document.get(name) for name in _OF_TOKENIZATION}
    return {"the number of tokens": len(tokens), **tokens, **tokenizer.special_tokens_map, **sections}


def _check_equal(first: Ingredient, other: Ingredient, expected: dict, found: dict, remedy: str = "") -> None:
    for key in [*expected, *(key for key in found if key not in expected)]:
        one, two = expected.get(key), found.get(key)
        if one != two:
            values = f"{one!r} and {two!r}"
            told = f": {values}" if len(values) <= 100 else ""
            raise UserError(f"{first.name} and {other.name}: differ in {key}{told}{remedy}")


def _check_tensors(first: Ingredient, other: Ingredient, expected: Weights, found: Weights) -> None:
    """Raise :class:`UserError` unless both have the same tensors, and the same numbers where these are integers."""
    both = f"{first.name} and {other.name}"
    for name in sorted(expected.keys() ^ found.keys()):
        has = first if name in expected else other
        raise UserError(f"{both}: only {has.name} has '{name}'{_OTHER_HEADS}")
    for name in expected:
        one, two = expected.described(name), found.described(name)
        if one != two:
            raise UserError(f"{both}: differ in '{name}': {one} and {two}")
        if not one.startswith(("F", "BF")) and not torch.equal(expected[name], found[name]):
            raise UserError(f"{both}: differ in '{name}', whose numbers ({one}) cannot be averaged")


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        shards = json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"].values()
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {WEIGHTS}; save the model with safetensors") from None
    return [folder / name for name in sorted(set(shards))]
