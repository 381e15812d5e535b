"""K: the layers whose gradients score a sample, by name."""

from fnmatch import fnmatchcase

from torch import nn

from pretrain.errors import UserError, unknown
from pretrain.influence.layers import KINDS, Layer
from pretrain.model.encoder_decoder import ProjectionHead
from pretrain.model.multi_objective import MultiObjectiveModel

ALL, FIRST_BLOCK, LAYER_NORMS = "all", "first_block", "layer_norms"


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a model whose gradients can be told apart by sample, as far as their types say; layers that
    are trained as a whole."""
    layers, inner = [], set()
    for name, module in model.named_modules():
        kind = next((kind for kind in KINDS if id(module) not in inner and kind.fits(module)), None)
        if kind is None:
            continue
        layer = kind(name, module)
        if layer.method != "forward":  # it is called for the modules within
            inner.update(id(each) for each in module.children() if set(each.parameters()) == set(layer.parameters))
        if layer.parameters and len(layer.parameters) >= len(list(module.parameters(recurse=False))):
            layers.append(layer)
    return layers


def select(
    model: MultiObjectiveModel, names: str | list[str], layers: list[Layer], idle: set[int], norms_only: bool
) -> set[int]:
    """Return the ids of the matrices and scales that K holds.

    Args:
        names: ``all``, ``first_block``, ``layer_norms``, or names of modules or patterns of them (``*``, ``?``).
        layers: of the model, those whose gradients can be told apart.
        idle: ids of parameters that have no part in anything, so none in K.
        norms_only: of these, only the normalisations.

    Raises:
        UserError: if a name is that of no module, or K holds something that cannot be told apart, or nothing.
    """
    wanted: set[int] = set()
    for name in [names] if isinstance(names, str) else names:
        wanted |= _parameters(model, name, layers) - idle
    by_parameter = {id(each): layer for layer in layers for each in layer.parameters}
    if norms_only:
        wanted = {each for each in wanted if each in by_parameter and by_parameter[each].normalises}
    for head in model.modules():
        if isinstance(head, ProjectionHead) and head.bias is not None and id(head.projection.weight) in wanted:
            family = model.encoder.config.model_type
            raise UserError(f"weigher.layers: '{family}' adds a constant to its logits; leave its embeddings out")
    named = {id(each): name for name, each in model.named_parameters()}
    for lost in (name for each, name in named.items() if each in wanted and each not in by_parameter):
        raise UserError(
            f"weigher.layers: {lost} is part of it, whose gradient cannot be told apart by sample; "
            f"use {LAYER_NORMS}, or names of modules without it"
        )
    if not wanted:
        what = "no normalisation that is trained" if norms_only else "no layer that is trained"
        raise UserError(f"weigher.layers: there is {what} in {names}; use {ALL}")
    return {id(by_parameter[each].parameters[0]) for each in wanted}


def _parameters(model: MultiObjectiveModel, name: str, layers: list[Layer]) -> set[int]:
    """Return the ids of the trained parameters that a name stands for."""
    if name == LAYER_NORMS:
        return {id(each) for layer in layers if layer.normalises for each in layer.parameters}
    modules: list[nn.Module] = [model]
    if name == FIRST_BLOCK:
        modules = first_blocks(model)
    elif name != ALL:
        found = dict(model.named_modules())
        modules = [module for path, module in found.items() if path and fnmatchcase(path, name)]
        if not modules:
            raise unknown("module", name, [ALL, FIRST_BLOCK, LAYER_NORMS, *filter(None, found)], "weigher.layers")
    return {id(each) for module in modules for each in module.parameters() if each.requires_grad}


def first_blocks(model: MultiObjectiveModel) -> list[nn.Module]:
    """Return the backbone's first block, or of an encoder–decoder the first of either.

    Raises:
        UserError: if its blocks are in no list.
    """
    encoder = model.encoder
    found = []
    for stack in (encoder.encoder, encoder.decoder) if hasattr(encoder, "decoder") else (encoder.backbone,):
        blocks = next((module for module in stack.modules() if isinstance(module, nn.ModuleList) and len(module)), None)
        if blocks is None:
            family = encoder.config.model_type
            raise UserError(
                f"weigher.layers: '{family}' keeps its blocks in no list; name modules, or use {LAYER_NORMS}"
            )
        found.append(blocks[0])
    return found
