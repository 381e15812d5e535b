"""``medley learn-mask supervised``: a span extractor learnt from answers in their contexts (arXiv 2104.08840).

What people ask about is what a model does well to recover: spans that look like answers are masked. The paper's
architecture could not be read; this one has a logit for a span's start and one for its end at every token, and the loss
−log p(start) − log p(end) of each answer, normalised over the places where words begin and where they end.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from pretrain import __version__
from pretrain.data.output import whole_folder
from pretrain.errors import UserError
from pretrain.evaluation.model import hugging_face_source
from pretrain.masking.learning.answers import Context, read_answers
from pretrain.masking.learning.extractor import CARD, WEIGHTS, Card, Extractor
from pretrain.masking.learning.training import Settings, train
from pretrain.masking.learning.windows import Window, WindowMaker

FORMAT_VERSION = 1
MARKS = (CARD, WEIGHTS)  # what tells an extractor's folder from another


def _to_stderr(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def learn(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = _to_stderr,
) -> dict:
    """Learn an extractor and write it to the folder ``out``; return what its ``metrics.json`` says.

    ``model`` is a Hugging Face folder or name, or a run or checkpoint of ours. The caller's random state
    is left as it was.

    Raises:
        UserError: if model, data, settings or output cannot be used, or the loss is not finite.
    """
    settings, began = settings or Settings(), time.perf_counter()
    answers = read_answers(data, settings.max_bad)
    for line in answers.examples:
        log(f"left out: {line}")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with whole_folder(out, overwrite, MARKS) as folder, torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)  # draws the outputs, then dropout
        with hugging_face_source(model) as source:
            extractor, random = Extractor.on(source)
        if random:
            log(f"note: {len(random)} weights of the encoder are not in the model's files, such as {random[0]}")
        if extractor.longest < settings.max_length:
            log(f"note: the model takes {extractor.longest} tokens, fewer than --max-length {settings.max_length}")
        windows, told = _windows(extractor, answers.contexts, settings, str(data))
        best, moments = train(extractor, windows["train"], windows["dev"], settings, log)
        max_length = min(settings.max_length, extractor.longest)
        extractor.save(folder, Card("supervised", max_length, settings.max_span, settings.top_k))
        result = {
            "format_version": FORMAT_VERSION,
            "method": "supervised",
            "model": str(model),
            "data": {"file": str(data), "sha256": answers.sha256, "bad_answers": answers.bad, **told},
            "settings": dataclasses.asdict(settings),
            "step": best.step,
            "dev": best.dev,
            "control": best.control,
            "moments": [dataclasses.asdict(moment) for moment in moments],
            "seconds": time.perf_counter() - began,
            "versions": {
                "medley": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": torch.cuda.get_device_name() if devices else "cpu",
            },
        }
        (folder / "metrics.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def is_dev(context: str, fraction: float) -> bool:
    """Whether a context is in the dev part; equal contexts always are alike."""
    return int.from_bytes(hashlib.sha256(context.encode()).digest()[:8], "big") < fraction * 2**64


def _windows(
    extractor: Extractor, contexts: list[Context], settings: Settings, file: str
) -> tuple[dict[str, list[Window]], dict]:
    """Return the windows of train and dev, and their counts for ``metrics.json``."""
    max_length = min(settings.max_length, extractor.longest)
    overlap = max_length // 4 if settings.overlap is None else settings.overlap
    try:
        make = WindowMaker(extractor.tokenizer, max_length, overlap)
    except ValueError as error:
        raise UserError(f"--overlap {overlap}: windows of {max_length} tokens have {error}") from None
    parts: dict[str, list[Context]] = {"train": [], "dev": []}
    for context in contexts:
        parts["dev" if is_dev(context.text, settings.dev_fraction) else "train"].append(context)
    windows, counts = {}, {}
    for part, its in parts.items():
        windows[part], left_out = make(its, settings.max_span if part == "train" else None)
        if not windows[part]:
            told = ", ".join(f"{count:,} × {kind}" for kind, count in left_out.items() if count) or "no context"
            raise UserError(
                f"{file}: {part} has no window with an answer ({told}); --dev-fraction or more data may help"
            )
        counts[part] = {
            "contexts": len(its),
            "windows": len(windows[part]),
            "answers": sum(len(window.answers) for window in windows[part]),
            "left_out": {kind: count for kind, count in left_out.items() if count},
        }
    return windows, counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``medley learn-mask supervised``."""
    defaults = Settings()
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a Hugging Face folder or name, a run or a checkpoint folder"
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="contexts and answers: JSON lines, SQuAD"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the extractor goes")
    parser.add_argument("--overwrite", action="store_true", help="replace an extractor")
    add = parser.add_argument_group("data").add_argument
    add("--max-length", type=int, metavar="TOKENS", help="of a window, specials included (default: %(default)s)")
    add("--overlap", type=int, metavar="TOKENS", help="that two windows share (default: a quarter of --max-length)")
    add("--max-span", type=int, metavar="TOKENS", help="of the longest span (default: %(default)s)")
    add("--dev-fraction", type=float, metavar="F", help="of contexts that choose the step (default: %(default)s)")
    add("--max-bad", type=float, metavar="F", help="of answers that may not fit their context (default: %(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N", help="default: %(default)s")
    add("--batch", type=int, metavar="WINDOWS", help="a step (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, help="default: %(default)s")
    add("--dev-interval", type=int, metavar="STEPS", help="between looks at dev (default: a tenth of --steps)")
    add("--top-k", type=int, metavar="K", help="spans of a window to look for answers in (default: %(default)s)")
    parser.set_defaults(**dataclasses.asdict(defaults))


def run(args: argparse.Namespace) -> None:
    """Learn, and print the scores beside the control's."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    print(table(learn(args.model, args.data, args.out, settings, overwrite=args.overwrite)))
    print(f"written: {args.out}")


def table(result: dict) -> str:
    """Lay out the scores of the chosen step beside those of random spans of the same lengths."""
    data, k = result["data"], result["settings"]["top_k"]
    names = {"exact_match": "EM", "f1": "F1", "recall_at_1": "recall@1", "recall_at_k": f"recall@{k}"}
    lines = [
        f"{part}: {data[part]['answers']:,} answers in {data[part]['windows']:,} windows" for part in ("train", "dev")
    ]
    lines += [
        f"{part}: left out {count:,} × {kind}"
        for part in ("train", "dev")
        for kind, count in data[part]["left_out"].items()
    ]
    if data["bad_answers"]:
        lines.append(f"left out {data['bad_answers']:,} × answers that contradict their context")
    heading = f"dev, step {result['step']:,}"
    lines.append(f"{heading:20}{'learnt':>10}{'random spans':>14}")
    lines += [f"{told:20}{result['dev'][name]:>10.4f}{result['control'][name]:>14.4f}" for name, told in names.items()]
    return "\n".join(lines)
