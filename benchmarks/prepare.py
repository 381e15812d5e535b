"""Compare ``medley prepare`` with ``datasets.map``: MB of text a second and peak memory, at two sizes of corpus.

Both get the same JSON lines, tokenizer, length of samples and number of processes, and run in turns, each time in a
process of its own. ``datasets`` is timed on its ``map`` alone (the idiom: tokenise in batches, overflowing tokens make
further samples); loading the file into its cache is not counted. ``prepare`` is timed on everything from opening the
file to the finished folder. Memory is summed over the process tree at its peak: resident (``rss``) and the part of it
that is no mapped file, shared pages counted once (``anonymous``). MB per CPU second is what other load on the machine
disturbs least.

    python benchmarks/prepare.py [--text CORPUS.jsonl] [--megabytes 16 64] [--repeats 3] [--processes 2]
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "prepare.json"
MAX_LENGTH = 128


def run_medley(text: str, tokenizer: str, work: str, processes: int) -> tuple[float, float, int]:
    """Return seconds, CPU seconds and tokens of one run."""
    import transformers  # noqa: F401 (imported beforehand by either side)

    from pretrain.data.prepare import prepare

    began, cpu = time.perf_counter(), cpu_seconds()
    summary = prepare([text], f"{work}/out", workers=processes, tokenizer=tokenizer, max_length=MAX_LENGTH)
    return time.perf_counter() - began, cpu_seconds() - cpu, sum(summary["tokens"].values())


def run_datasets(text: str, tokenizer: str, work: str, processes: int) -> tuple[float, float, int]:
    """Return seconds, CPU seconds and tokens of one run."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    data = datasets.load_dataset("json", data_files=text, split="train", cache_dir=f"{work}/cache")

    def samples(batch):
        encoded = loaded(
            batch["text"],
            truncation=True,
            max_length=MAX_LENGTH,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return {"input_ids": encoded["input_ids"]}

    began, cpu = time.perf_counter(), cpu_seconds()
    result = data.map(samples, batched=True, num_proc=processes, remove_columns=data.column_names)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    lengths = datasets.arrow_dataset.pc.list_value_length(result.data["input_ids"])
    return seconds, cpu, datasets.arrow_dataset.pc.sum(lengths).as_py()


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


SIDES = {"medley": run_medley, "datasets": run_datasets}


def measured(side: str, text: Path, tokenizer: Path, processes: int) -> dict:
    """Run one side in a process of its own; return seconds, CPU seconds, tokens and peak memory in MB."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--side", side, str(text), str(tokenizer), work, str(processes)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        peak = {"rss": 0.0, "anonymous": 0.0}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                for kind, size in memory(process.pid).items():
                    peak[kind] = max(peak[kind], size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{side} failed: {' '.join(command)}")
    seconds, cpu, tokens = json.loads(output.splitlines()[-1])
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, **peak}


def memory(root: int) -> dict[str, float]:
    """Return the resident and the anonymous memory of a process and its descendants, in MB."""
    total = {"rss": 0.0, "anonymous": 0.0}
    pending = [root]
    while pending:
        pid = pending.pop()
        try:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pending += map(int, children.read_text().split())
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        except OSError:  # it has ended
            continue
        total["rss"] += int(fields["Rss"].split()[0]) / 1000
        total["anonymous"] += int(fields["Pss_Anon"].split()[0]) / 1000
    return total


def corpus_of(megabytes: int, source: Path, target: Path) -> float:
    """Write ``megabytes`` of text from ``source``, over and over if need be; return the MB written."""
    size = 0
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for text in itertools.cycle([json.loads(line)["text"] for line in lines]):
            if size >= megabytes * 1e6:
                return size / 1e6
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    raise AssertionError("unreachable")


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSON lines with a field 'text' (default: the embedded corpus)")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    from pretrain.data.embedded import write_corpus
    from pretrain.data.prepare import prepare

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.text is None:
            write_corpus(work / "embedded")
            args.text = work / "embedded" / "corpus.jsonl"
        prepare([args.text], work / "small", vocabulary=30522)
        print(f"{args.processes} processes, samples of at most {MAX_LENGTH} tokens")
        print(f"{'MB':>4} {'side':9}{'MB/s':>7}{'MB/CPU s':>10}{'tokens':>12}{'rss MB':>9}{'anonymous MB':>14}")
        for megabytes in args.megabytes:
            size = corpus_of(megabytes, args.text, work / "text.jsonl")
            runs = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side in SIDES:
                    runs[side].append(measured(side, work / "text.jsonl", work / "small" / "tokenizer", args.processes))
            for side in SIDES:
                row = {"megabytes": round(size, 2), "side": side}
                row["megabytes_per_second"] = round(size / statistics.median(run["seconds"] for run in runs[side]), 3)
                cpu = statistics.median(run["cpu_seconds"] for run in runs[side])
                row["megabytes_per_cpu_second"] = round(size / cpu, 3)
                row["seconds"] = [round(run["seconds"], 2) for run in runs[side]]
                row["tokens"] = runs[side][0]["tokens"]
                for kind in ("rss", "anonymous"):
                    row[f"peak_{kind}_megabytes"] = round(statistics.median(run[kind] for run in runs[side]))
                rows.append(row)
                print(
                    f"{megabytes:4} {side:9}{row['megabytes_per_second']:7.2f}"
                    f"{row['megabytes_per_cpu_second']:10.2f}{row['tokens']:12,}"
                    f"{row['peak_rss_megabytes']:9,}{row['peak_anonymous_megabytes']:14,}"
                )
            ratio = rows[-2]["megabytes_per_second"] / rows[-1]["megabytes_per_second"]
            pairs = [b["seconds"] / a["seconds"] for a, b in zip(*runs.values(), strict=True)]
            rows[-2]["times_datasets"] = round(ratio, 2)
            print(
                f"     medley is {ratio:.2f} times as fast (run by run: {', '.join(f'{pair:.2f}' for pair in pairs)})"
            )
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    document = {
        "date": date.today().isoformat(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "processes": args.processes,
        "load_average_at_end": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "datasets")},
        "python": platform.python_version(),
        "max_length": MAX_LENGTH,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        name, *paths, count = sys.argv[2:]
        print(json.dumps(SIDES[name](*paths, int(count))))
    else:
        main()
