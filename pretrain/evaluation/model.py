"""From what the user names (a Hugging Face model, a run, a checkpoint) to a classifier and its tokenizer."""

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pretrain.errors import UserError


@contextlib.contextmanager
def hugging_face_source(model: str | Path) -> Iterator[str]:
    """Give the folder or hub name to load ``model`` from; a run or checkpoint of ours is exported to a temporary one.

    Raises:
        UserError: if it is a path that does not exist or a folder that is neither an export, a run nor a checkpoint.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        yield str(path)
    elif (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        from pretrain.export import export

        with tempfile.TemporaryDirectory(prefix="medley-evaluate-") as folder:
            with quiet():
                exported = export(path, Path(folder) / "export")
            yield str(exported)
    elif path.is_dir():
        raise UserError(
            f"{path}: no model: no config.json (Hugging Face), checkpoints/ (a run) or manifest.json (a checkpoint)"
        )
    elif path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise UserError(f"{path}: no such folder")
    else:
        yield str(model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' reports and progress bars; :func:`load_classifier` tells what matters in them."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    with quiet():
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
            raise UserError(f"{source}: {what} cannot be loaded: {reason}") from None


def load_tokenizer(source: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder or name; one without a pad token pads with its end token.

    Raises:
        UserError: if there is none, or it has neither token.
    """
    with _loading("its tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{source}: its tokenizer has neither a pad nor an end token; add a pad token to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def head_labels(source: str) -> list[str] | None:
    """Return what the outputs of a model's own head for sequence classification stand for; None if it has none."""
    with _loading("the model", source):
        config = AutoConfig.from_pretrained(source)
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return [config.id2label[output] for output in range(config.num_labels)] if classifies else None


def load_classifier(
    source: str, tokenizer: Tokenizer, outputs: int, *, untrained: bool = False, new_head: bool = True
) -> tuple[PreTrainedModel, list[str]]:
    """Load an fp32 encoder with a head of ``outputs`` logits, the source's own unless ``new_head`` is set; the rest is
    as in :func:`load_with_head`."""
    auto = AutoModelForSequenceClassification
    model, random = load_with_head(auto, source, tokenizer, outputs, untrained=untrained)
    if new_head and not untrained and head_labels(source) is not None:
        drawn = auto.from_config(model.config, dtype=torch.float32)
        drawn.base_model.load_state_dict(model.base_model.state_dict())
        model = drawn
    return model, random


def load_with_head(
    auto: type, source: str, tokenizer: Tokenizer, outputs: int, *, untrained: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """Load an fp32 encoder with a head of ``outputs`` logits, drawn from torch's current random state unless the source
    has such a head.

    Args:
        auto: transformers' auto class of models with such a head.

    Returns:
        The model, on the CPU, and the names of the weights, other than those of head and pooler, that the source
        lacks or has in another shape, which are therefore random. ``untrained`` draws all weights, and lists none.

    Raises:
        UserError: if it cannot be loaded, its family has no class with such a head, or it has fewer embeddings than
            the tokenizer has tokens.
    """
    with _loading("the model", source):
        config = AutoConfig.from_pretrained(source, num_labels=outputs)
        config.pad_token_id = tokenizer.pad_token_id
        if untrained:
            model, random = auto.from_config(config, dtype=torch.float32), []
        else:
            model, report = auto.from_pretrained(
                source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
            random = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {embeddings} embeddings")
    backbone = f"{model.base_model_prefix}."
    return model, [name for name in random if name.startswith(backbone) and ".pooler." not in name]


def input_names(model: PreTrainedModel, tokenizer: Tokenizer) -> list[str]:
    """Return what the tokenizer makes and the model can take: token types only where the model has two of them."""
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
    if getattr(model.config, "type_vocab_size", 0) < 2 or "token_type_ids" not in tokenizer.model_input_names:
        names = [name for name in names if name != "token_type_ids"]
    return names


def longest_input(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Return the most tokens the model takes. RoBERTa's kind of positions begin after the pad token's index."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return min(positions, tokenizer.model_max_length)
