"""``medley influence``: what a run's weigher saw, as a page and as numbers."""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.influence.report_picture import draw, gathered
from pretrain.influence.sample_log import FILE, read_sample_log
from pretrain.recipe import Recipe, load_recipe
from pretrain.training.log import read_metrics

SHOWN_SAMPLES = 12  # of the highest scores, and of the lowest
SHOWN_CHARACTERS = 600
LATE = 0.25  # of the records: scores go stale, so samples are shown by the latest

_STYLE = """body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:right;vertical-align:top}
td,th{border-bottom:1px solid #ddd}td.text{text-align:left;font:13px/1.4 serif}img{max-width:100%}"""
_COLUMNS = {"score": "scores", "weight": "weights", "loss": "losses", "targets": "targets", "length": "lengths"}


def influence(run: str | Path, out: str | Path | None = None) -> tuple[Path, Path]:
    """Write the page and the numbers of a run's weigher; return ``FILE.html`` and ``FILE.json``.

    Args:
        run: folder of a run with a weigher other than ``uniform``.
        out: the page; None: ``RUN/influence.html``.

    Raises:
        UserError: if the run has weighed no sample, or a file cannot be written.
    """
    run = Path(run)
    records, metrics = read_sample_log(run), read_metrics(run)
    if not records or not metrics:
        if not metrics:
            raise UserError(f"{run}: no metrics.jsonl with a step in it; is this a run folder?")
        raise UserError(
            f"{run}: has no {FILE}: no recorded step weighed its samples; train with weigher.name=presence, or "
            "with a smaller log.interval_steps"
        )
    recipe, page = load_recipe(run / "config.yaml"), Path(out) if out else run / "influence.html"
    texts = _Texts(recipe, records[-1].get("store"))
    sizes = [each["effective_sample_size"] for each in metrics]
    parts, numbers = [], {"weigher": recipe.weigher_config.model_dump(mode="json", by_alias=True), "objectives": {}}
    for name in dict.fromkeys(each["objective"] for each in records):
        own = [each for each in records if each["objective"] == name]
        facts = _facts(own, sizes, texts)
        numbers["objectives"][name] = facts
        parts.append(_section(name, facts, draw(own, metrics, recipe.weigher_config.floor)))
    title = html.escape(f"{recipe.weigher_config.name}: {run.resolve().name}")
    note = f"<p>{html.escape(texts.missing)}</p>" if texts.missing else ""
    style = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    files = page, page.with_suffix(".json")
    try:
        files[0].write_text(f"{style}<h1>{title}</h1>{note}{''.join(parts)}\n", encoding="utf-8")
        files[1].write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be written: {error.strerror}; name another file with --out") from None
    return files


class _Texts:
    """The texts of samples; ``missing`` says why there are none, if there are none."""

    def __init__(self, recipe: Recipe, fingerprint: str | None):
        self.missing, corpus = "", Path(recipe.data.store)
        try:
            self.store, self.tokenizer = Store(corpus / "train"), load_tokenizer(corpus / "tokenizer")
            if self.store.fingerprint != fingerprint:
                self.missing = f"No texts: {corpus} is not the store that the run was trained on."
        except UserError as error:
            self.missing = f"No texts: {error}."

    def of(self, sample_id: int) -> str:
        """Return the text of a sample, shortened."""
        if self.missing:
            return ""
        text = self.tokenizer.decode(self.store[sample_id].tolist(), skip_special_tokens=True)
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _facts(records: Sequence[dict], sizes: Sequence[float], texts: _Texts) -> dict:
    """Return the numbers of one objective."""
    scores, targets = gathered(records, "scores"), gathered(records, "targets")
    scored = (targets > 0) & np.isfinite(scores)
    against = {name: gathered(records, name)[scored] for name in ("lengths", "targets", "losses") if name in records[0]}
    late = records[-max(1, round(LATE * len(records))) :]
    return {
        "records": len(records),
        "first_step": records[0]["step"],
        "last_step": records[-1]["step"],
        "effective_sample_size": {"mean": float(np.mean(sizes)), "least": float(np.min(sizes))},
        "score_quantiles": _quantiles(scores[scored]),
        "largest_weight": float(np.nanmax(gathered(records, "weights"))),
        "rank_correlation": {name: _rank_correlation(scores[scored], each) for name, each in against.items()},
        "samples": _samples(late, texts) if "sample_ids" in records[0] else {},
    }


def _quantiles(scores: np.ndarray) -> dict[str, float]:
    levels = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    return {f"{level:g}": float(each) for level, each in zip(levels, np.quantile(scores, levels), strict=True)} if len(
        scores
    ) else {}  # fmt: skip


def _rank_correlation(scores: np.ndarray, values: np.ndarray) -> float | None:
    """Return Spearman's correlation; None where one of the two does not vary."""
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(values) == 0:
        return None
    return float(spearmanr(scores, values).statistic)


def _samples(records: Sequence[dict], texts: _Texts) -> dict[str, list[dict]]:
    """Return the samples of the highest and of the lowest scores, each sample by the latest score it has."""
    latest: dict[int, dict] = {}
    for record in records:
        for place, sample in enumerate(record["sample_ids"]):
            if record["targets"][place] and record["scores"][place] is not None:
                numbers = {name: record[column][place] for name, column in _COLUMNS.items()}
                latest[sample] = {"sample": sample, "step": record["step"], **numbers}
    ordered = sorted(latest.values(), key=lambda each: (-each["score"], each["sample"]))
    number = min(SHOWN_SAMPLES, len(ordered) // 2)
    chosen = {"highest": ordered[:number], "lowest": ordered[::-1][:number]}
    return {which: [each | {"text": texts.of(each["sample"])} for each in its] for which, its in chosen.items()}


def _section(name: str, facts: dict, picture: str) -> str:
    """Return the part of the page on one objective."""
    correlations = facts["rank_correlation"].items()
    rows = {
        "steps recorded": f"{facts['records']} from {facts['first_step']} to {facts['last_step']}",
        "effective sample size": "mean {mean:.3f}, least {least:.3f}".format(**facts["effective_sample_size"]),
        "largest weight": f"{facts['largest_weight']:.3g}",
        "score, quantiles": ", ".join(f"{level}: {each:.3g}" for level, each in facts["score_quantiles"].items()),
        **{f"rank correlation of score and {one}": "–" if c is None else f"{c:.2f}" for one, c in correlations},
    }
    table = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(each)}</td></tr>" for key, each in rows.items())
    page = f"<h2>{html.escape(name)}</h2><table>{table}</table><img alt='' src='data:image/png;base64,{picture}'>"
    for which, samples in facts["samples"].items():
        page += f"<h3>{which} scores, latest steps</h3><table>{_head()}{''.join(map(_row, samples))}</table>"
    return page


def _head() -> str:
    return "<tr>" + "".join(f"<th>{each}</th>" for each in ("sample", "step", *_COLUMNS, "text")) + "</tr>"


def _row(sample: dict) -> str:
    numbers = [sample["sample"], sample["step"], *(sample[name] for name in _COLUMNS)]
    cells = "".join(f"<td>{f'{each:.4g}' if isinstance(each, float) else each}</td>" for each in numbers)
    return f"<tr>{cells}<td class=text>{html.escape(sample['text'])}</td></tr>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley influence``."""
    parser.add_argument("run", type=Path, help="folder of a run with a weigher")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: RUN/influence.html)")


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    for file in influence(args.run, args.out):
        print(f"wrote {file}")
