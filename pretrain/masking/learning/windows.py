"""From contexts to the windows of tokens that an extractor reads, with the answers' places in them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pretrain.data.samples import encoder
from pretrain.data.tokenization import frame
from pretrain.masking.learning.answers import Context
from pretrain.model.vocabulary import Vocabulary

ENCODED_AT_ONCE = 256  # contexts


@dataclass(frozen=True)
class Window:
    """A part of a context as a model reads it, like a sample of a store: special tokens before and after the text.

    Arrays have one element a token; special tokens stand for no characters.
    """

    tokens: np.ndarray
    """``[length]`` int64."""
    starts: np.ndarray
    ends: np.ndarray
    """``[length]`` int64: the characters of the context that a token stands for."""
    context: str
    answers: tuple[tuple[int, int], ...]
    """Distinct (first, last) places of the answers, in whole words."""

    def text(self, first: int, last: int) -> str:
        """Return the text of the tokens from ``first`` to ``last``."""
        return self.context[self.starts[first] : self.ends[last]].strip()


class WindowMaker:
    """Cuts contexts into windows.

    Args:
        max_length: most tokens of a window, special ones included.
        overlap: tokens of text that a window shares with the one before.

    Raises:
        ValueError: if the special tokens and the overlap leave no room.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, overlap: int):
        self.before, self.after = (np.array(ids, np.int64) for ids in frame(tokenizer))
        self.room, self.overlap = max_length - len(self.before) - len(self.after), overlap
        if not 0 <= overlap < self.room:
            raise ValueError(f"room for {self.room} tokens of text, overlap of {overlap}")
        self._encode = encoder(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        vocabulary = Vocabulary.of(tokenizer)
        self._is_text, self._continues = np.ones(vocabulary.size, bool), np.zeros(vocabulary.size, bool)
        self._is_text[vocabulary.special_ids] = False
        self._continues[vocabulary.continuing_ids] = True

    def __call__(self, contexts: Sequence[Context], longest: int | None = None) -> tuple[list[Window], Counter[str]]:
        """Return the windows that hold an answer, and counts of what is left out, in words.

        Args:
            longest: leave out answers of more tokens than this.
        """
        windows, left_out = [], Counter()
        for at in range(0, len(contexts), ENCODED_AT_ONCE):
            part = contexts[at : at + ENCODED_AT_ONCE]
            for context, encoding in zip(part, self._encode([context.text for context in part]), strict=True):
                offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                windows += self._of(context, np.array(encoding.ids, np.int64), *offsets.T, longest, left_out)
        return windows, left_out

    def _of(
        self,
        context: Context,
        ids: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        longest: int | None,
        left_out: Counter,
    ) -> list[Window]:
        placed = []
        for answer in context.answers:
            place = answer_tokens(starts, ends, answer)
            if place is None or not self._is_text[ids[place[0] : place[1] + 1]].all():
                left_out["answers that are no tokens of text"] += 1
                continue
            first, last = self._whole_words(ids, *place)
            if longest is not None and last - first >= longest:
                left_out[f"answers of more than {longest} tokens"] += 1
            elif last - first >= self.room:
                left_out["answers longer than a window"] += 1
            else:
                placed.append((first, last))
        windows, seen = [], set()
        for begin, end in cuts(len(ids), self.room, self.overlap):
            inside = {place for place in placed if begin <= place[0] and place[1] < end}
            seen |= inside
            if not inside:
                left_out["windows without an answer"] += 1
                continue
            shift, padding = len(self.before) - begin, (len(self.before), len(self.after))
            windows.append(
                Window(
                    np.concatenate([self.before, ids[begin:end], self.after]),
                    np.pad(starts[begin:end], padding),
                    np.pad(ends[begin:end], padding),
                    context.text,
                    tuple(sorted((first + shift, last + shift) for first, last in inside)),
                )
            )
        left_out["answers cut by every window"] += len(set(placed) - seen)
        return windows

    def _whole_words(self, ids: np.ndarray, first: int, last: int) -> tuple[int, int]:
        """Widen a place to the words that it touches."""
        while first > 0 and self._goes_on(ids, first):
            first -= 1
        while last + 1 < len(ids) and self._goes_on(ids, last + 1):
            last += 1
        return first, last

    def _goes_on(self, ids: np.ndarray, place: int) -> bool:
        """Whether a token belongs to the word of the token before it."""
        return bool(self._continues[ids[place]] and self._is_text[ids[place - 1]])


def cuts(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Return the windows (begin, one behind the end) of a text of so many tokens, none for an empty one."""
    if tokens == 0:
        return []
    begins = range(0, max(tokens - overlap, 1), room - overlap)
    return [(begin, min(begin + room, tokens)) for begin in begins]


def answer_tokens(starts: np.ndarray, ends: np.ndarray, answer: tuple[int, int]) -> tuple[int, int] | None:
    """Return the first and last token that stand for a character of an answer; None if no token does.

    Args:
        starts, ends: ``[tokens]`` the characters that each token stands for.
        answer: (start, end) in characters.
    """
    inside = np.flatnonzero((starts < answer[1]) & (ends > answer[0]))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None
