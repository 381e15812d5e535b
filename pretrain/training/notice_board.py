"""What the ranks' watches tell each other: beats and a verdict, through the key-value store that rank 0 keeps."""

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from pretrain.training.beats import Beat

_VERDICT, _SEEN = "verdict", "seen"


class NoticeBoard:
    """A connection of its own to the process group's store; every call waits for rank 0's answer, and may do so for
    ever where it is cut off.

    Raises:
        RuntimeError: in every call, once rank 0 has ended.
    """

    def __init__(self, name: str):
        store = torch.distributed.distributed_c10d._get_default_store().clone()
        self._store = torch.distributed.PrefixStore(f"watch-{name}", store)

    def put(self, rank: int, beat: Beat) -> None:
        """Tell a rank's beat."""
        self._store.set(f"{rank}", json.dumps(asdict(beat)))

    def beats(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """Return the last beats of those ranks that have told one."""
        told = [rank for rank in ranks if self._store.check([f"{rank}"])]
        found = self._store.multi_get([f"{rank}" for rank in told]) if told else []
        return {rank: Beat(**json.loads(content)) for rank, content in zip(told, found, strict=True)}

    def offer(self, verdict: dict) -> dict:
        """Leave a verdict unless there is one; return the one that stands."""
        return json.loads(self._store.compare_set(_VERDICT, "", json.dumps(verdict)))

    def verdict(self) -> dict | None:
        """Return the verdict, if there is one."""
        return json.loads(self._store.get(_VERDICT)) if self._store.check([_VERDICT]) else None

    def see(self, count: int = 1) -> int:
        """Count a rank that knows of the verdict; return how many do."""
        return self._store.add(_SEEN, count)


def bounded(limit_seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, or None if it fails or takes longer than the limit; then it is left behind."""
    result: list[Any] = []

    def call() -> None:
        try:
            result.append(function(*args))
        except (OSError, RuntimeError):
            return

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit_seconds)
    return result[0] if result else None
