"""``medley learn-mask meta``: learn what to mask from what helps an end task (arXiv 2104.08840, meta-learning)."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import model_validator

from fused_objectives.philox import scalar_seed
from pretrain.errors import UserError
from pretrain.masking.learning.meta_objective import HeadOnly, PolicyConfig, PolicyLearning
from pretrain.masking.learning.meta_trainer import MetaTrainer
from pretrain.recipe import Recipe
from pretrain.training.build import Parts, build
from pretrain.training.run import Kind, launch
from pretrain.training.run import add_arguments as add_run_arguments

_ROOT = Path(__file__).parents[3]
DEFAULT_RECIPE = _ROOT / "configs" / "learn-mask.yaml"
DEFAULT_DS_CONFIG = _ROOT / "configs" / "ds" / "cpu.json"

# option → (recipe key, help)
_OPTIONS = {
    "--out": ("run", "FOLDER", "the run's folder; the policy comes to lie in FOLDER/policy"),
    "--corpus": ("data.store", "FOLDER", "prepared corpus"),
    "--model": ("model.checkpoint", "MODEL", "Hugging Face folder or name of the model that is to gain"),
    "--task": ("objectives.end_task.task", "TASK", "end task: a folder, hf:NAME or the name of a GLUE task"),
    "--rate": ("objectives.mlm.masking.rate", "R", "share of a sample's text to hide"),
    "--steps": ("training.steps", "N", "steps"),
    "--inner-lr": ("training.optimizer.learning_rate", "LR", "peak learning rate of model and task head"),
    "--policy-lr": ("policy.learning_rate", "LR", "peak learning rate of the policy"),
    "--temperature": ("policy.temperature", "T", "temperature of the relaxed mask"),
    "--seed": ("seed", "N", "seed"),
}


class MetaRecipe(Recipe):
    """What is learnt: a recipe with the objectives ``mlm`` and ``end_task``, and a policy."""

    policy: PolicyConfig = PolicyConfig()

    @model_validator(mode="after")
    def _both_objectives(self):
        if set(self.objectives) != {"mlm", "end_task"}:
            raise ValueError("objectives: a policy is learnt with 'mlm' and 'end_task', and no other")
        return self


def build_meta(recipe: MetaRecipe, *, dtype: torch.dtype) -> Parts:
    """Build what :func:`pretrain.training.build.build` does, and the policy.

    Raises:
        UserError: as there; and for masking that leaves the policy nothing to decide, or a tokenizer without a mask
            token.
    """
    if recipe.weigher_config.name != "uniform":
        raise UserError("weigher.name: a policy is learnt from samples that count alike; set it to uniform")
    masking = recipe.objective_configs["mlm"].masking
    if masking.policy != "random":
        raise UserError(f"objectives.mlm.masking.policy: '{masking.policy}' leaves nothing to learn; leave the key out")
    if max(masking.rate.values()) >= 1:
        raise UserError("objectives.mlm.masking.rate: 1 leaves nothing to choose; set it below 1")
    parts = build(recipe, dtype=dtype)
    if parts.vocabulary.mask_id is None:
        raise UserError("data.store: its tokenizer has no mask token; prepare the corpus with one that does")
    torch.manual_seed(scalar_seed(recipe.seed, "policy", 0))
    model = parts.model
    policy = PolicyLearning(recipe.policy, parts.vocabulary, recipe.seed, parts.store.max_length)
    network = policy.build_heads(model.encoder)[policy.name]
    if recipe.data.packing and not network.encoder.packs_rows:
        family = network.encoder.config.model_type
        raise UserError(
            f"data.packing: the attention of '{family}' (policy.model) cannot keep packed samples apart; set it to off"
        )
    model.objectives["end_task"] = HeadOnly(model.objectives["end_task"])
    model.objectives[policy.name], model.heads[policy.name] = policy, network
    components = model.components()
    sizes = {name: sum(each.numel() for each in params) for name, params in components.items()}
    return replace(parts, heldout=None, components=components, sizes=sizes)


def _lr_scales(recipe: MetaRecipe) -> dict[str, float]:
    return {"head/policy": recipe.policy.learning_rate / recipe.training.optimizer.learning_rate}


META = Kind("learn-mask", MetaRecipe, build_meta, MetaTrainer, _lr_scales, own_keys=("policy",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley learn-mask meta``."""
    parser.add_argument("--config", default=str(DEFAULT_RECIPE), metavar="FILE", help="recipe (default: %(default)s)")
    parser.add_argument(
        "--ds_config", default=str(DEFAULT_DS_CONFIG), metavar="FILE", help="DeepSpeed JSON: fp32, stage 0, 1 or 2"
    )
    for option, (key, metavar, text) in _OPTIONS.items():
        parser.add_argument(option, metavar=metavar, help=f"{text} ({key})")
    add_run_arguments(parser)
    parser.set_defaults(dry_run=False)


def run(args: argparse.Namespace) -> None:
    """Learn as the only rank.

    Raises:
        SystemExit: with the exit code of a run that is not done.
    """
    if code := launch_meta(args):
        raise SystemExit(code)


def main(argv: list[str] | None = None) -> int:
    """Learn as one rank of several; return the exit code. What ``launch/learn_mask.py`` calls."""
    parser = argparse.ArgumentParser(description="Learn what to mask from what helps an end task.")
    add_arguments(parser)
    return launch_meta(parser.parse_intermixed_args(argv))


def launch_meta(args: argparse.Namespace) -> int:
    """Turn options into recipe keys and start the run; what is given as ``key=value`` comes last."""
    given = {key: getattr(args, option.strip("-").replace("-", "_")) for option, (key, *_) in _OPTIONS.items()}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    args.overrides = [*options, *args.overrides]
    return launch(args, META)
