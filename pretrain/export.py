"""From a checkpoint to a Hugging Face folder: weights, configuration, tokenizer, and a card that says how it was
made."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, ElectraForPreTraining, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pretrain import __version__
from pretrain.data.output import whole_folder
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.model.classifier import sequence_classifier
from pretrain.model.disentangled import folded
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import Recipe, load_recipe
from pretrain.training import checkpoint as checkpoints
from pretrain.training.build import build_model
from pretrain.training.log import read_metrics
from pretrain.training.saving import STATE
from pretrain.training.states import load_weights

FACTS = "medley.json"  # what Medley knows of a model and Hugging Face has no place for
MARKS = ("config.json", "model.safetensors", "README.md")  # what tells an export from another folder
KINDS = ("masked-lm", "causal-lm", "seq2seq-lm", "discriminator", "generator", "sequence-classification", "backbone")


def export(
    checkpoint: str | Path, out: str | Path, kind: str | None = None, *, overwrite: bool = False, best: bool = False
) -> Path:
    """Write a checkpoint as a Hugging Face folder and return that folder.

    Args:
        checkpoint: a checkpoint, or a run folder, whose newest good checkpoint is then taken.
        out: the folder to make.
        kind: one of :data:`KINDS`; None takes what fits the objectives: a masked, causal or sequence-to-sequence
            language model where one was trained, ELECTRA's discriminator where only that was, else the backbone.
        overwrite: replace ``out`` if it exists.
        best: take the run's checkpoint that scored best on dev, not the newest.

    Raises:
        UserError: if there is no good checkpoint, ``out`` exists, or the kind was not trained.
    """
    folder, out = resolve_checkpoint(checkpoint, best), Path(out)
    if out.resolve() in (folder, *folder.parents):
        raise UserError(f"{out}: holds the checkpoint that is to be exported; choose another --out")
    manifest = checkpoints.verify(folder)
    recipe = load_recipe(folder / "config.yaml")
    tokenizer = load_tokenizer(folder / "model")
    model = load_model(folder, recipe, Vocabulary.of(tokenizer))
    chosen = _choose(model, kind or _fitting_kind(model))
    with whole_folder(out, overwrite, MARKS) as partial:
        chosen.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(folder, manifest, recipe, chosen), encoding="utf-8")
        state = json.loads((folder / STATE).read_text())
        write_facts(partial, None if kind == "generator" else state.get("initialisation"))
    return out


def write_facts(folder: Path, initialisation: str | None) -> None:
    """Write what an export says of itself beside its card; ``initialisation`` is the fingerprint of the weights that
    its backbone began with, None where it is not known."""
    facts = {"format_version": 1, "initialisation": initialisation, "program": f"medley {__version__}"}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def resolve_checkpoint(path: str | Path, best: bool = False) -> Path:
    """Return ``path`` if it is a checkpoint, or the newest good checkpoint (the ``best``) if it is a run folder."""
    path = Path(path).resolve()
    if best:
        if (found := checkpoints.best(path)) is None:
            raise UserError(f"{path}: no run with a best checkpoint; a run with early stopping has one (stopping.…)")
        return found
    if (path / "checkpoints").is_dir():
        newest = checkpoints.newest(path)
        if newest is None:
            raise UserError(f"{path}: has no checkpoint that verifies")
        return newest
    if not (path / checkpoints.MANIFEST).is_file():
        raise UserError(f"{path}: neither a checkpoint (no {checkpoints.MANIFEST}) nor a run folder (no checkpoints/)")
    return path


def load_model(folder: Path, recipe: Recipe, vocabulary: Vocabulary) -> MultiObjectiveModel:
    """Return the training model of a checkpoint saved at any ZeRO stage and world size, in fp32 on the CPU."""
    keys = {"checkpoint": None, "attention": "blocks"}  # no other weights, and nothing that needs a GPU
    scratch = recipe.model_copy(update={"model": recipe.model.model_copy(update=keys)})
    config = AutoConfig.from_pretrained(folder / "model")
    model = build_model(scratch, vocabulary, config, dtype=torch.float32)
    load_weights(folder / "engine", model)
    return model.eval()


def _fitting_kind(model: MultiObjectiveModel) -> str:
    if isinstance(model.encoder, EncoderDecoder):
        return "seq2seq-lm"
    if "vocabulary" in model.heads:
        return "causal-lm" if model.encoder.causal_only else "masked-lm"
    electra = model.encoder.config.model_type == "electra"
    return "discriminator" if "detection" in model.heads and electra else "backbone"


def _choose(model: MultiObjectiveModel, kind: str) -> PreTrainedModel:
    """Return the Hugging Face model of a kind, sharing the training model's weights."""
    trained, family = ", ".join(model.objectives), model.encoder.config.model_type
    if isinstance(model.encoder, EncoderDecoder) != (kind == "seq2seq-lm"):
        raise UserError(f"--as {kind}: the run trained none ({trained} on '{family}')")
    pretrained = folded(model.encoder.pretrained)
    if kind == "seq2seq-lm":
        return pretrained
    if kind in ("masked-lm", "causal-lm"):
        if "vocabulary" not in model.heads or model.encoder.causal_only != (kind == "causal-lm"):
            raise UserError(f"--as {kind}: the run trained none ({trained} on '{family}')")
        return pretrained
    if kind == "generator":
        if "generator" not in model.heads:
            raise UserError(f"--as generator: the run trained none ({trained})")
        return model.heads["generator"].encoder.pretrained
    if kind == "discriminator":
        return _discriminator(model, pretrained.base_model)
    if kind == "sequence-classification":
        if "end_task" not in model.heads or model.objectives["end_task"].config.pooling != "first":
            raise UserError(f"--as {kind}: needs 'end_task' on the first token ({trained})")
        return sequence_classifier(model.encoder, model.heads["end_task"])
    return pretrained.base_model


def _discriminator(model: MultiObjectiveModel, backbone: PreTrainedModel) -> ElectraForPreTraining:
    """Return a backbone with the head that tells replaced tokens from the originals."""
    trained, family = ", ".join(model.objectives), backbone.config.model_type
    if "detection" not in model.heads:
        raise UserError(
            f"--as discriminator: its head is that of 'rtd', which the run did not train ({trained}); "
            "--as backbone leaves heads out"
        )
    if family != "electra":
        raise UserError(
            f"--as discriminator: transformers has one for the family 'electra' alone; the run is of '{family}'"
        )
    discriminator = ElectraForPreTraining(backbone.config)
    discriminator.electra = backbone
    discriminator.discriminator_predictions.load_state_dict(model.heads["detection"].state_dict())
    return discriminator


def model_card(folder: Path, manifest: dict, recipe: Recipe, model: PreTrainedModel) -> str:
    """Return the README of an export: what it is, how to load it, and the run it comes from."""
    state = json.loads((folder / STATE).read_text())
    records = [r for r in read_metrics(folder.parents[1]) if r["step"] == manifest["step"]]
    losses = (
        {**records[-1]["losses"], **{f"{n} (held-out)": v for n, v in records[-1].get("heldout", {}).items()}}
        if records
        else {}
    )
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in losses.items() if value is not None)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("medley-pretrain", "torch", "transformers", "deepspeed")
    )
    loader = type(model).__name__
    return f"""---
library_name: transformers
tags: [medley, {", ".join(recipe.objective_configs)}]
---

# {Path(recipe.run).name}

A {model.config.model_type} model of {model.num_parameters():,} parameters, pre-trained with Medley on the objectives
{", ".join(recipe.objective_configs)}.

```python
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = {loader}.from_pretrained("THIS_FOLDER")
```

| | |
|---|---|
| steps | {manifest["step"]:,} |
| samples | {state["loader"]["samples"]:,} |
| tokens | {state["tokens"]:,} |
| store | {recipe.data.store} |
| store fingerprint | `{state["loader"]["identity"]["store"]}` |
| seed | {recipe.seed} |
| ranks, ZeRO stage | {manifest["world_size"]}, {manifest["zero_stage"]} |
| versions | {versions} |

| loss | at the last step |
|---|---|
{table}

The whole recipe:

```yaml
{(folder / "config.yaml").read_text().rstrip()}
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``medley export``."""
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder (its newest good checkpoint)")
    parser.add_argument("--best", action="store_true", help="of a run: the checkpoint that scored best on dev")
    parser.add_argument("--out", metavar="FOLDER", help="default: RUN/export")
    parser.add_argument("--as", dest="kind", choices=KINDS, help="default: what fits the objectives")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> None:
    """Run ``medley export``."""
    disable_progress_bar()
    folder = resolve_checkpoint(args.checkpoint, args.best)
    if args.out is None and folder.parent.name != "checkpoints":
        raise UserError(f"{folder}: is in no run's folder; say with --out where the export goes")
    out = Path(args.out) if args.out else folder.parents[1] / "export"
    print(f"exported {folder} → {export(folder, out, args.kind, overwrite=args.overwrite)}")
