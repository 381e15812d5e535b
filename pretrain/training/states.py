"""Weights and optimizer states of all ranks: written as fragments by name, read back at any world size and stage.

Every rank writes ``states-<rank>.safetensors`` with the fp32 masters it holds and their optimizer states, cut by
parameter, and the place of each fragment in its parameter. Reading copies whatever overlaps, so the same world size and
stage get back the same bits, and any other the same numbers. Nothing is pickled.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from pretrain.errors import UserError
from pretrain.training.flat import Flat, Fragment

_WEIGHT, _BUFFER, _STATE = "weight", "buffer", "state"
_QUIET_SECONDS = 3.0


def save_states(
    folder: Path, rank: int, module: nn.Module, flats: list[Flat], state: dict, replicated: bool
) -> Path | None:
    """Write this rank's fragments of weights and optimizer ``state`` and, from rank 0, the module's buffers; return the
    file.

    ``replicated``: every rank holds everything (stage 0), so rank 0 alone writes.
    """
    if replicated and rank > 0:
        return None
    names, tensors, places = _names(module), {}, {}
    for flat in flats:
        for fragment in flat.fragments:
            name = names[id(fragment.parameter)]
            places[name] = [fragment.start, fragment.numel]
            tensors[f"{_WEIGHT}/{name}"] = _own(fragment.of(flat.master))
            for key, value in state.get(flat.master, {}).items():
                whole = value.numel() != flat.master.numel() or value.ndim == 0  # a step counter, say
                tensors[f"{_STATE}/{key}/{name}"] = _own(value if whole else fragment.of(value))
    if rank == 0:
        tensors |= {f"{_BUFFER}/{name}": _own(buffer) for name, buffer in module.named_buffers()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"states-{rank:05d}.safetensors"
    save_file(tensors, path, metadata={"places": json.dumps(places)})
    return path


def load_states(folder: Path, module: nn.Module, flats: list[Flat], state: dict) -> None:
    """Fill this rank's masters, optimizer ``state`` and the module's buffers from the fragments of all ranks' files.

    Raises:
        UserError: if there are no files, or they lack a part of a parameter (another model, or a damaged checkpoint).
    """
    elements = sum(fragment.numel for flat in flats for fragment in flat.fragments)
    with _Files(folder) as files, _bar(elements) as bar:
        names = _names(module)
        for flat in flats:
            state.pop(flat.master, None)
            for fragment in flat.fragments:
                name = names[id(fragment.parameter)]
                files.copy(f"{_WEIGHT}/{name}", name, fragment, fragment.of(flat.master))
                for key in files.state_keys(name):
                    _load_state(files, key, name, fragment, flat.master, state.setdefault(flat.master, {}))
                bar.update(fragment.numel)
        for name, buffer in module.named_buffers():
            buffer.copy_(files.whole(f"{_BUFFER}/{name}"))


def load_weights(folder: Path, module: nn.Module) -> None:
    """Fill the parameters and buffers of a whole ``module``, in one process without an engine, from all ranks' files.

    Raises:
        UserError: as ``load_states``.
    """
    with _Files(folder) as files, torch.no_grad():
        for name, parameter in module.named_parameters():
            fragment = Fragment(parameter, 0, 0, parameter.numel())
            files.copy(f"{_WEIGHT}/{name}", name, fragment, parameter.view(-1))
        for name, buffer in module.named_buffers():
            buffer.copy_(files.whole(f"{_BUFFER}/{name}"))


def consolidate(module: nn.Module, flats: list[Flat], rank: int, replicated: bool) -> dict[str, Tensor] | None:
    """Return the module's state dict with the fp32 masters as weights, on the CPU of rank 0; None on other ranks.

    Tied parameters appear under all their names and share one tensor. One parameter at a time travels.
    """
    whole: dict[int, Tensor] = {}
    for flat in flats:
        own = {id(fragment.parameter): fragment for fragment in flat.fragments}
        for parameter, shape in zip(flat.parameters, flat.shapes, strict=True):
            full = torch.zeros(shape.numel(), dtype=flat.master.dtype, device=parameter.device)
            if (fragment := own.get(id(parameter))) is not None:
                full.narrow(0, fragment.start, fragment.numel).copy_(fragment.of(flat.master))
            if not replicated:
                torch.distributed.reduce(full, 0)
            if rank == 0:
                whole[id(parameter)] = full.view(shape).cpu()
    if rank > 0:
        return None
    return {
        name: whole[id(value)] if isinstance(value, nn.Parameter) else value.detach().cpu().clone()
        for name, value in module.state_dict(keep_vars=True).items()
    }


def _bar(elements: int) -> tqdm:
    """Return a progress bar of rank 0, shown where reading takes more than some seconds."""
    silent = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    options = {"unit": " parameters", "unit_scale": True, "delay": _QUIET_SECONDS, "mininterval": 1.0}
    return tqdm(desc="resuming", total=elements, disable=silent, leave=False, **options)


def _load_state(files: "_Files", key: str, name: str, fragment: Fragment, master: Tensor, into: dict) -> None:
    """Read one optimizer state of one parameter, either laid out like the parameter or a single number."""
    stored = f"{_STATE}/{key}/{name}"
    if files.is_number(stored):
        number = files.whole(stored)
        if key in into and not torch.equal(into[key], number):
            raise UserError(f"{files.folder}: '{key}' of {name} differs from its group's; the objectives have changed")
        into[key] = number
        return
    if key not in into:
        into[key] = torch.zeros_like(master)
    files.copy(stored, name, fragment, fragment.of(into[key]))


def _names(module: nn.Module) -> dict[int, str]:
    """Return the first name of each parameter by its id (a tied one has several)."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _own(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that shares no memory, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


class _Files:
    """All ranks' files of one folder, mapped, and where each tensor's fragments are."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(folder.glob("states-*.safetensors"))
        if not paths:
            raise UserError(f"{folder}: holds no states-*.safetensors; not the engine's part of a checkpoint")
        try:
            self._files = [safe_open(path, "pt") for path in paths]
        except Exception as error:
            raise UserError(f"{folder}: the states cannot be read ({error}); take an earlier checkpoint") from None
        self._places = [json.loads(file.metadata()["places"]) for file in self._files]
        self._holders: dict[str, list[int]] = {}
        self._state_keys: dict[str, set[str]] = {}
        for index, file in enumerate(self._files):
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                self._holders.setdefault(stored, []).append(index)
                kind, _, rest = stored.partition("/")
                if kind == _STATE:
                    key, _, name = rest.partition("/")
                    self._state_keys.setdefault(name, set()).add(key)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()  # unmaps them

    def state_keys(self, name: str) -> list[str]:
        """Return which optimizer states the checkpoint has of a parameter; none if its group was never active."""
        return sorted(self._state_keys.get(name, ()))

    def is_number(self, stored: str) -> bool:
        return not self._files[self._holders[stored][0]].get_slice(stored).get_shape()

    def whole(self, stored: str) -> Tensor:
        """Return a tensor that is not cut."""
        if stored not in self._holders:
            raise UserError(f"{self.folder}: has no '{stored}'; the checkpoint is of another model")
        return self._files[self._holders[stored][0]].get_tensor(stored)

    def copy(self, stored: str, name: str, fragment: Fragment, into: Tensor) -> None:
        """Fill ``into [fragment.numel]`` from the stored fragments that overlap it."""
        filled = 0
        for start, piece in self._pieces(stored, name):
            begin = max(start, fragment.start)
            end = min(start + piece.get_shape()[0], fragment.start + fragment.numel)
            if begin < end:
                into[begin - fragment.start : end - fragment.start].copy_(piece[begin - start : end - start])
                filled += end - begin
        if filled != fragment.numel:
            raise UserError(
                f"{self.folder}: has {filled} of {fragment.numel} elements of '{stored}'; "
                "the checkpoint is of another model, or damaged"
            )

    def _pieces(self, stored: str, name: str) -> Iterator[tuple[int, object]]:
        for index in self._holders.get(stored, ()):
            yield self._places[index][name][0], self._files[index].get_slice(stored)
