"""Tokenizers: load one, train one, and know its special tokens."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDPIECE_SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
BPE_SPECIALS = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
KINDS = ("wordpiece", "bpe")
_ENDS = (".", "!", "?")
FEWEST_ENTRIES = {"wordpiece": 100, "bpe": 256 + len(BPE_SPECIALS)}  # a vocabulary smaller than this cannot work


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Load a Hugging Face tokenizer from a folder or by the name of a repository.

    Raises:
        UserError: if there is none, it cannot be read, or it is not a fast one (``tokenizers``).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if str(path).startswith(("/", ".", "~")) and not Path(path).exists():
        raise UserError(f"tokenizer {path}: no such folder")
    if Path(path).is_file():
        raise UserError(f"tokenizer {path}: is a file; name the folder that holds it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers, tokenizers and the hub's client raise whatever they meet
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {path}: cannot be loaded ({type(error).__name__}: {reason})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or len(tokenizer) == 0:
        raise UserError(f"tokenizer {path}: {type(tokenizer).__name__} is not a fast tokenizer (no tokenizer.json)")
    return tokenizer


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Return the ids of all special tokens: the named ones ([CLS], [MASK], …, [UNK] too) and those only marked so."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def barred_ids(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Return the special ids that text never becomes: all but the one of [UNK], unless that one has another duty."""
    names = ("bos", "eos", "cls", "sep", "mask", "pad")
    duties = {getattr(tokenizer, f"{name}_token_id") for name in names}
    return special_ids(tokenizer) - ({tokenizer.unk_token_id} - duties)


def sentinel(number: int) -> str:
    """Return the token that stands for the span of a number, by T5's name."""
    return f"<extra_id_{number}>"


def sentinel_ids(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return the int64 ids of ``<extra_id_0>``, ``<extra_id_1>``, … as far as the tokenizer has them."""
    entries = tokenizer.get_vocab()
    found = itertools.takewhile(lambda index: index is not None, map(entries.get, map(sentinel, itertools.count())))
    return np.array(list(found), np.int64)


def continues_word(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return the sorted int64 ids of tokens that belong to the word of the token before them.

    WordPiece marks them ("##ing"); byte-level BPE and SentencePiece mark those that begin a word ("Ġthe", "▁the"). A
    vocabulary with neither mark has whole words only, as far as can be told.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = special_ids(tokenizer)
    ordinary = [(index, token) for index, token in enumerate(tokens) if token and index not in special]
    if any(token.startswith("##") for _, token in ordinary):
        continuing = [index for index, token in ordinary if token.startswith("##")]
    elif any(token[0] in "Ġ▁" for _, token in ordinary):
        continuing = [index for index, token in ordinary if token[0] not in "Ġ▁"]
    else:
        continuing = []
    return np.array(continuing, np.int64)


def sentence_ends(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return the sorted int64 ids of the tokens that end a sentence: ".", "!" and "?", whatever marks word borders."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = special_ids(tokenizer)
    ends = [i for i, t in enumerate(tokens) if t and i not in special and t.removeprefix("##").lstrip("Ġ▁") in _ENDS]
    return np.array(ends, np.int64)


def frame(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Return the special ids before and after a sample's text.

    They are those the tokenizer itself adds; where it adds none, its cls or bos token goes before and its sep or eos
    token after, as far as it has them.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    first = (tokenizer.cls_token_id, tokenizer.bos_token_id)
    last = (tokenizer.sep_token_id, tokenizer.eos_token_id)
    return (
        before or [index for index in first if index is not None][:1],
        after or [index for index in last if index is not None][:1],
    )


def train_tokenizer(
    read: Callable[[], Iterator[str]], kind: str, vocabulary: int, lowercase: bool, max_length: int, sentinels: int = 0
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer and dress it as a Hugging Face one. The same text gives the same tokenizer.

    Args:
        read: gives the text to train on, from its beginning whenever it is called.
        kind: ``wordpiece`` (BERT's: [CLS] text [SEP]) or ``bpe`` (byte-level: <s> text </s>). Either has cls, sep,
            bos, eos, pad, unk and mask tokens, so it serves encoders and decoders.
        vocabulary: the most entries, special tokens included; little text gives fewer.
        lowercase: fold case and strip accents (``wordpiece`` only).
        max_length: the longest sample in tokens, kept as ``model_max_length``.
        sentinels: how many of ``vocabulary`` are special tokens that stand for spans, ``<extra_id_0>`` and so on.

    Raises:
        UserError: if ``vocabulary`` is too small to hold the special tokens and an alphabet.
    """
    from transformers import PreTrainedTokenizerFast

    if vocabulary - sentinels < FEWEST_ENTRIES[kind]:
        beside = f" beside {sentinels} sentinels" if sentinels else ""
        raise UserError(
            f"--vocabulary {vocabulary}: a {kind} tokenizer needs at least {FEWEST_ENTRIES[kind]} entries{beside}"
        )
    vocabulary -= sentinels
    if kind == "wordpiece":
        backend, specials, repeat = _wordpiece(read, vocabulary, lowercase), WORDPIECE_SPECIALS, 1
    else:
        backend, specials, repeat = _bpe(read, vocabulary), BPE_SPECIALS, 2
    backend.add_special_tokens([sentinel(number) for number in range(sentinels)])
    first, last = specials["cls"], specials["sep"]
    mark = ":1" if kind == "wordpiece" else ""  # BERT numbers the texts of a pair, RoBERTa doubles the border instead
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {' '.join([last] * repeat)} $B{mark} {last}{mark}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (first, last)],
    )
    named = {f"{name}_token": token for name, token in specials.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, eos_token=last, model_max_length=max_length, **named
    )
    return tokenizer


def _wordpiece(read: Callable[[], Iterator[str]], vocabulary: int, lowercase: bool) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    alphabet = _alphabet(read(), normalizer, vocabulary // 4)
    # The trainer numbers "##a", "##b", … as it meets them, which changes from run to run and decides ties between
    # merges. As special tokens they have fixed numbers; the tokenizer returned is made anew without these.
    specials = list(WORDPIECE_SPECIALS.values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=specials + [f"##{letter}" for letter in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = _dressed_wordpiece(models.WordPiece(unk_token=WORDPIECE_SPECIALS["unk"]), normalizer)
    _train(learner, trainer, read())
    model = models.WordPiece(learner.get_vocab(), unk_token=WORDPIECE_SPECIALS["unk"])
    backend = _dressed_wordpiece(model, normalizer)
    backend.add_special_tokens(specials)
    return backend


def _dressed_wordpiece(model: models.WordPiece, normalizer: normalizers.Normalizer) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _alphabet(texts: Iterator[str], normalizer: normalizers.Normalizer, size: int) -> list[str]:
    """Return the most frequent letters of the normalised text, at most ``size``, in the order of their code points."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        found = np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32))
        counts[: len(found)] += found
    letters: Counter[str] = Counter()
    for code in np.flatnonzero(counts):
        for letter in normalizer.normalize_str(chr(code)).replace(" ", ""):
            letters[letter] += int(counts[code])
    return sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:size])


def _bpe(read: Callable[[], Iterator[str]], vocabulary: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(BPE_SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(backend, trainer, read())
    return backend


def _train(backend: Tokenizer, trainer, texts: Iterator[str]) -> None:
    """Train in a thread: the library's long loops do not answer Ctrl-C, a waiting main thread does."""
    failures = []

    def work() -> None:
        try:
            backend.train_from_iterator(texts, trainer)
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
