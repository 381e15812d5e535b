#!/usr/bin/env python3
"""Show what masking policies hide: texts of a prepared corpus, each token coloured by how often it is hidden.

    python studies/show_masks.py CORPUS [--samples 3,14] [--recipe FILE] [--masking '{policy: span}' …] --out masks

writes ``masks.html`` and, with matplotlib, ``masks.png``. The probabilities are estimated by drawing many visits.
"""

import argparse
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script; when it is imported they are there

from pretrain.config import parse  # noqa: E402
from pretrain.data.alignment import TokenText  # noqa: E402
from pretrain.data.store import Store  # noqa: E402
from pretrain.data.tokenization import load_tokenizer  # noqa: E402
from pretrain.errors import EXIT_USER_ERROR, UserError  # noqa: E402
from pretrain.masking.config import MaskingConfig  # noqa: E402
from pretrain.masking.masker import Masker  # noqa: E402
from pretrain.model.vocabulary import Vocabulary  # noqa: E402
from pretrain.recipe import load_recipe  # noqa: E402
from studies.cloze import detokenizer  # noqa: E402
from studies.drawing import draw_masks  # noqa: E402

DEFAULT = ("{policy: random}", "{policy: whole_word}", "{policy: span}", "{policy: frequency}")
COLOUR = (178, 58, 46)  # of what is always hidden; what never is stays white
PNG_COLUMNS = 100


@dataclass(frozen=True)
class Shown:
    """One text under one policy."""

    title: str
    text: TokenText
    probabilities: np.ndarray
    """``[tokens]`` of being hidden."""

    def pieces(self) -> list[tuple[str, float]]:
        """Return the text in pieces, each with its probability; what stands between tokens has 0."""
        pieces, done = [], 0
        for start, end, probability in zip(self.text.starts, self.text.ends, self.probabilities, strict=True):
            start = max(start, done)
            if end > start:
                pieces += [(self.text.text[done:start], 0.0), (self.text.text[start:end], float(probability))]
                done = end
        return [piece for piece in (*pieces, (self.text.text[done:], 0.0)) if piece[0]]


def show(corpus: Path, samples: Sequence[int], maskings: dict[str, MaskingConfig], visits: int) -> list[Shown]:
    """Return every sample under every policy.

    Raises:
        UserError: if a sample or an annotation does not exist.
    """
    store, tokenizer = Store(corpus / "train"), load_tokenizer(corpus / "tokenizer")
    for sample in samples:
        if not 0 <= sample < len(store):
            raise UserError(f"--samples {sample}: {corpus} has samples 0 to {len(store) - 1}")
    vocabulary, text_of = Vocabulary.of(tokenizer, store.token_counts(len(tokenizer))), detokenizer(tokenizer)
    texts, shown = [text_of(store[sample].astype(np.int64)) for sample in samples], []
    for title, masking in maskings.items():
        drawn = draw_masks(Masker(masking, vocabulary, 0, "mlm"), store, np.array(samples), visits)
        shown += [Shown(title, text, masks.mean(0)) for text, masks in zip(texts, drawn, strict=True)]
    return shown


def shade(probability: float) -> tuple[int, int, int]:
    """Return the colour of a probability: from white to :data:`COLOUR`, by its square root, since rates are small."""
    return tuple(round(255 + (channel - 255) * probability**0.5) for channel in COLOUR)


def write_html(path: Path, shown: Sequence[Shown]) -> None:
    """Write a page; the probability of a token is shown when the mouse is over it."""
    parts, titles = [], list(dict.fromkeys(each.title for each in shown))
    for title in titles:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for each in shown:
            if each.title == title:
                spans = "".join(_span(piece, probability) for piece, probability in each.pieces())
                parts.append(f"<p>{spans}</p>")
    style = "body{font:16px/1.6 Georgia,serif;max-width:46em;margin:2em auto}h2{font:600 14px sans-serif}"
    scale = "".join(_span(f" {percent} % ", percent / 100) for percent in (0, 5, 15, 30, 60, 100))
    page = f"<!doctype html><meta charset=utf-8><title>Masks</title><style>{style}</style><p>hidden: {scale}</p>"
    path.write_text(page + "\n".join(parts) + "\n", encoding="utf-8")


def _span(text: str, probability: float) -> str:
    if probability == 0:
        return html.escape(text)
    red, green, blue = shade(probability)
    return f'<span title="{probability:.0%}" style="background:rgb({red},{green},{blue})">{html.escape(text)}</span>'


def write_png(path: Path, shown: Sequence[Shown]) -> bool:
    """Draw the same with matplotlib, in a fixed-width font; False if it is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        return False
    lines: list[str | list[tuple[int, str, float]]] = []  # titles, or (column, text, probability)
    for number, each in enumerate(shown):
        if number == 0 or shown[number - 1].title != each.title:
            lines += ["", each.title]
        else:
            lines.append("")
        lines += _wrapped(each.pieces())
    figure = Figure(figsize=(8.6, 0.22 * len(lines) + 0.2))
    axes = figure.add_axes((0.02, 0, 0.96, 1))
    axes.set(xlim=(0, PNG_COLUMNS), ylim=(len(lines), -0.3))
    axes.axis("off")
    for row, line in enumerate(lines):
        if isinstance(line, str):
            axes.text(0, row + 0.5, line, va="center", fontsize=9.5, weight="bold")
            continue
        for column, text, probability in line:
            if probability:
                colour = tuple(channel / 255 for channel in shade(probability))
                axes.add_patch(Rectangle((column, row + 0.04), len(text), 0.92, color=colour, linewidth=0))
            for offset, letter in enumerate(text):
                axes.text(
                    column + offset + 0.5,
                    row + 0.5,
                    letter,
                    va="center",
                    ha="center",
                    fontsize=9,
                    family="monospace",
                    parse_math=False,
                )
    figure.savefig(path, dpi=90)
    return True


def _wrapped(pieces: list[tuple[str, float]]) -> list[list[tuple[int, str, float]]]:
    """Break pieces into lines of at most ``PNG_COLUMNS`` letters; a line ends where a word does, if it can."""
    lines, column = [[]], 0
    for text, probability in pieces:
        text = " ".join(text.split("\n"))
        if (
            column
            and column + len(text.rstrip()) > PNG_COLUMNS - 8
            and (text.isspace() or lines[-1][-1][1].endswith(" "))
        ):
            lines, column = [*lines, []], 0
            text = text.lstrip()
        if text:
            lines[-1].append((column, text, probability))
            column += len(text)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Write the pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("corpus", type=Path, metavar="CORPUS", help="folder that medley prepare wrote")
    add("--samples", default="0,1", metavar="NUMBERS", help="of its train store, with commas (default: %(default)s)")
    add("--recipe", metavar="FILE", help="show the masking of this recipe's mlm")
    add("--masking", action="append", default=[], metavar="YAML", help="keys of masking; may be given several times")
    add("--visits", type=int, default=400, metavar="N", help="draws a token (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="without suffix")
    args = parser.parse_args(argv)
    try:
        maskings = {}
        if args.recipe:
            mlm = load_recipe(args.recipe).objective_configs.get("mlm")
            if mlm is None:
                raise UserError(f"{args.recipe}: has no objective mlm, whose masking could be shown")
            maskings[args.recipe] = mlm.masking
        for given in args.masking or ([] if args.recipe else DEFAULT):
            keys = yaml.safe_load(given)
            if not isinstance(keys, dict):
                raise UserError(f"--masking {given}: give keys, such as {{policy: span, rate: 0.3}}")
            maskings[", ".join(f"{key}: {value}" for key, value in keys.items())] = parse(
                MaskingConfig, keys, "--masking"
            )
        samples = [int(number) for number in args.samples.split(",")]
        shown = show(args.corpus, samples, maskings, args.visits)
    except ValueError as error:
        print(f"show_masks: error: --samples: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"show_masks: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_html(args.out.with_suffix(".html"), shown)
    write_png(args.out.with_suffix(".png"), shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
