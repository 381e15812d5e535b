"""Between text and tokens: the text that a sample's tokens stand for, and the tokens that marks in a text fall on."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from pretrain.data.annotations import NO_UNIT

UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # what an unknown token and a broken character stand for
Mark = tuple[int, int, int]
"""(start, end, class): characters of a text that belong together; the class is 0 where there are none."""


@dataclass(frozen=True)
class TokenText:
    """A text made of tokens. ``starts`` and ``ends`` ``[tokens]`` int64 are each token's characters in it.

    Tokens that share a character (parts of its bytes) all have it; a token that is no text has none.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray


class Detokenizer:
    """Gives the text of token ids, and of each token its place in it.

    Byte-level and SentencePiece tokens are the text, white space included, as far as the tokenizer's normaliser kept
    it. WordPiece and plain words have lost their white space: it is put back as English is written ("3.14", "(see
    p. 5)"), so that each token stands for itself but the spaces between tokens are a guess.

    Args:
        tokenizer: the backend (``tokenizer.json``).
        barred: ids that are no text.
    """

    def __init__(self, tokenizer: Tokenizer, barred: Iterable[int]):
        parts = json.loads(tokenizer.to_str())
        model = parts["model"]
        added = {token["id"]: token["content"] for token in parts["added_tokens"]}
        vocabulary = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
        size = max(vocabulary, default=-1) + 1
        unknown = _unknown_id(tokenizer, model)
        for index in barred:
            added[index] = ""
        if unknown is not None and unknown not in barred:
            added[unknown] = UNREADABLE
        kinds = {piece["type"] for name in ("decoder", "pre_tokenizer") for piece in _pieces(parts[name])}
        self.is_text = np.ones(size, bool)
        self.is_text[[index for index in barred if index < size]] = False
        marked = "ByteLevel" in kinds or any(token[:1] == "▁" for token in vocabulary.values())
        self._words = model["type"] in ("WordPiece", "WordLevel") or not marked
        if self._words:
            self._prefix = model.get("continuing_subword_prefix") or ("##" if model["type"] == "WordPiece" else "\0")
            self._suffix = model.get("end_of_word_suffix") or None
            self._tokens = [added.get(index, vocabulary.get(index, "")) for index in range(size)]
            return
        decode = _byte_level if "ByteLevel" in kinds else _sentencepiece
        self._bytes = [
            added[index].encode() if index in added else decode(vocabulary.get(index, "")) for index in range(size)
        ]
        self._lengths = np.array([len(piece) for piece in self._bytes], np.int64)

    def __call__(self, ids: np.ndarray) -> TokenText:
        """Return the text of one sample's ids ``[tokens]``."""
        return self._spaced(ids.tolist()) if self._words else self._joined(ids)

    def _joined(self, ids: np.ndarray) -> TokenText:
        raw = b"".join([self._bytes[index] for index in ids.tolist()])
        ends = np.cumsum(self._lengths[ids])
        starts = ends - self._lengths[ids]
        if raw.isascii():
            return TokenText(raw.decode(), starts, ends)
        try:
            text = raw.decode()
            character = np.cumsum((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80) - 1  # that each byte belongs to
        except UnicodeDecodeError:
            text = raw.decode(errors="surrogateescape")
            widths = [len(letter.encode(errors="surrogateescape")) for letter in text]
            character = np.repeat(np.arange(len(text)), widths)
            text = re.sub("[\udc80-\udcff]", UNREADABLE, text)
        character = np.append(character, len(text))
        first = character[starts]
        return TokenText(text, first, np.where(ends > starts, character[ends - 1] + 1, first))

    def _spaced(self, ids: list[int]) -> TokenText:
        pieces: list[str] = []
        starts, ends = np.zeros((2, len(ids)), np.int64)
        position, ended, spaces = 0, True, _Spaces()
        for number, index in enumerate(ids):
            token = self._tokens[index]
            if token.startswith(self._prefix) and position and self.is_text[index]:
                token = token[len(self._prefix) :]
                spaces.word += token
            elif token:
                if self._suffix is None or ended:
                    ahead = self._tokens[ids[number + 1]] if number + 1 < len(ids) else ""
                    if position and spaces.before(token.removesuffix(self._suffix or "\0"), ahead):
                        pieces.append(" ")
                        position += 1
                    spaces.word = token
                else:
                    spaces.word += token
                if self._suffix is not None:
                    ended = token.endswith(self._suffix)
                    token = token.removesuffix(self._suffix)
                    spaces.word = spaces.word.removesuffix(self._suffix)
            pieces.append(token)
            starts[number] = position
            position += len(token)
            ends[number] = position
        return TokenText("".join(pieces), starts, ends)


class _Spaces:
    """Decides, word by word, where English has a space between a word and the next."""

    CLOSING = frozenset(".,;:!?%)]}…’”°")
    OPENING = frozenset("([{$£€¥#@“‘")
    JOINING = frozenset("-/_@~+=&*")
    CLITICS = frozenset(("s", "t", "re", "ve", "ll", "d", "m"))

    def __init__(self):
        self.word = ""  # the last one, in full once the next begins
        self.earlier = ["", ""]
        self.open: set[str] = set()  # quotation marks

    def before(self, word: str, ahead: str) -> bool:
        """Whether a space goes before ``word``, the beginning of the next one; ``ahead`` is the token behind it."""
        last, (before_last, _) = self.word, self.earlier
        self.earlier = [last, before_last]
        if word[0].isalnum() and last[-1].isalnum():
            return True
        if word in ("'", '"'):
            plural = last[-1] == "s" and "'" not in self.open  # "the captains' ships"
            if word == "'" and last[-1].isalnum() and (ahead in self.CLITICS or len(last) == 1 or plural):
                return False
            closes = word in self.open
            self.open ^= {word}
            return not closes and last not in self.OPENING
        if last in ("'", '"'):
            inside = last in self.open
            if last == "'" and not inside and before_last[-1:].isalnum():
                return not (word.lower() in self.CLITICS or len(before_last) == 1)  # "don't", "O'Brien"
            return not inside and word not in self.CLOSING
        if word in self.CLOSING:
            return False
        if last in self.OPENING:
            return False
        if last in ".:," and word[0].isdigit() and before_last[-1:].isdigit():
            if last == ",":
                return not (len(before_last) <= 3 and len(word) == 3 and word.isdigit())  # "1,000" but "1999, 300"
            return last == "." and len(before_last) > 3
        if last == "." and len(before_last) == 1 and before_last.isalpha() and len(word) == 1 and ahead == ".":
            return False  # "U.S."
        if word in self.JOINING:
            return not (last[-1].isalnum() and ahead[:1].isalnum())
        if last in self.JOINING:
            return not (before_last[-1:].isalnum() and word[0].isalnum())
        if "–" in (word, last):
            digits = (last if word == "–" else before_last)[-1:] + (ahead if word == "–" else word)[:1]
            return not (len(digits) == 2 and digits.isdigit())
        return True


def numbered_spans(found: TokenText, marks: list[Mark]) -> np.ndarray:
    """Return ``[tokens]`` int64: the number of the mark that each token overlaps (the first of several), −1 in none.

    Args:
        found: where the tokens are in the text.
        marks: in order and without overlap, none of them empty.
    """
    if not marks:
        return np.full(len(found.starts), -1, np.int64)
    starts, ends, _ = np.fromiter(chain.from_iterable(marks), np.int64).reshape(-1, 3).T
    number = np.searchsorted(ends, found.starts, side="right")
    hit = starts[np.minimum(number, len(marks) - 1)] < found.ends
    return np.where(hit & (number < len(marks)), number, -1)


def sample_units(kind: str, numbers: np.ndarray, marks: list[Mark]) -> np.ndarray:
    """Return the units of one sample, ``[tokens of the sample]`` uint16.

    What reaches over the border of two samples is a unit in either.

    Args:
        numbers: of :func:`numbered_spans`, those of the sample's tokens.
    """
    if kind == "classes":
        return np.array([mark[2] for mark in marks] + [NO_UNIT], np.uint16)[numbers]
    inside = np.flatnonzero(numbers >= 0)
    units = np.full(len(numbers), NO_UNIT, np.uint16)
    units[inside] = np.cumsum(np.diff(numbers[inside], prepend=-1) > 0) - 1
    return units


def _unknown_id(tokenizer: Tokenizer, model: dict) -> int | None:
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if token is not None else model.get("unk_id")


def _pieces(part: dict | None) -> list[dict]:
    """Return the parts of a decoder or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers")
    return [piece for one in inner for piece in _pieces(one)] if inner else [part]


def _byte_table() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_table()


def _byte_level(token: str) -> bytes:
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
