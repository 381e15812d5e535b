"""The bytes of all tensors that are there while something runs, and the most there were at once."""

from collections.abc import Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Follows every tensor that an operation takes or makes while this is entered, each storage once.

    What an operation needs within itself is not seen.

    Args:
        besides: tensors that do not count.
    """

    def __init__(self, besides: Iterable[Tensor] = ()):
        super().__init__()
        self._besides = {each.untyped_storage()._cdata for each in besides}
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, result)):
            if isinstance(each, Tensor) and not each.is_meta:
                storage = each.untyped_storage()
                if storage._cdata not in self._besides:
                    self._sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._peak = max(self._peak, self.now())
        return result

    def now(self) -> int:
        """Return the bytes that are there now."""
        self._sizes = {key: entry for key, entry in self._sizes.items() if not entry[0].expired()}
        return sum(size for _, size in self._sizes.values())

    def most(self) -> int:
        """Return the most bytes there were at once since the last call."""
        peak, self._peak = self._peak, 0
        return peak
