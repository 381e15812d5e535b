"""The command ``medley bench``, which is ``python kernels/benchmarks/run.py``."""

import csv
import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_objectives
from pretrain import bench
from pretrain.cli import main
from tests.builders import one_thread  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules():
    """Imports the benchmark's own modules, which can be once its script has been loaded."""
    bench._script()
    return importlib.import_module


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(path: Path, *arguments: str) -> list[dict]:
    assert main(["bench", *arguments, "--quick", "--csv", str(path)]) == 0
    return read(path)


def test_a_run_appends_rows_that_say_what_was_measured_where_and_when(tmp_path, capsys, modules):
    path = tmp_path / "results" / "cpu.csv"
    rows = measure(path, "segment_sums", "--providers", "medley")
    assert {row["op"] for row in rows} == {"segment_sums"}
    assert "medley" in {row["provider"] for row in rows} <= {"medley", "medley, impl=torch"}
    assert {row["metric"] for row in rows} >= {"time_ms", "peak_mib", "gb_s", "floor_fraction"}
    for row in rows:
        assert row["mode"] == "forward" and row["shape"].startswith("tokens=") and row["gpu"] and row["date"]
        assert f"torch={torch.__version__}" in row["versions"]
        low, middle, high = (float(row[name] or "nan") for name in ("p20", "p50", "p80"))
        assert middle > 0 and not low > middle and not middle > high
    again = measure(path, "segment_sums", "--providers", "medley")
    assert again[: len(rows)] == rows and len(again) == 2 * len(rows)
    output = capsys.readouterr().out
    assert "of the floor" in output and output.count("  not measured  ") == 2 * len(modules("goals").GOALS)


def test_a_missing_peer_is_named_and_the_run_goes_on(tmp_path, capsys, monkeypatch, modules):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.linear", None)
    rows = measure(tmp_path / "cpu.csv", "linear_norms", "--providers", "Opacus", "gram")
    output = capsys.readouterr().out
    assert "Opacus is left out: ModuleNotFoundError: import of opacus.grad_sample.linear halted" in output
    assert {row["provider"] for row in rows} == {"medley, method=gram"}


def test_an_op_of_ours_that_fails_fails_the_run(tmp_path, capsys, monkeypatch, modules):
    monkeypatch.setitem(sys.modules, "fused_objectives.replacing", None)
    with pytest.raises(SystemExit) as stop:
        measure(tmp_path / "cpu.csv", "replace", "--providers", "medley")
    assert stop.value.code == 1
    assert "failed: replace (medley)" in capsys.readouterr().err


def test_every_public_op_has_a_benchmark_and_is_listed(capsys):
    public = set()
    for module in pkgutil.iter_modules(fused_objectives.__path__, "fused_objectives."):
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            impl = inspect.signature(function).parameters.get("impl")
            if function.__module__ == module.name and impl and impl.kind is impl.KEYWORD_ONLY:
                public.add(f"{module.name}.{name}".removeprefix("fused_objectives."))
    assert main(["bench", "--list"]) == 0
    listed = {word.strip(",") for word in capsys.readouterr().out.split()}
    assert len(public) > 15 and public <= listed


def test_what_is_listed_exists(modules):
    for benchmark in bench._script().load().values():
        for path in benchmark.functions:
            module, function = path.split(".")
            assert callable(getattr(importlib.import_module(f"fused_objectives.{module}"), function))


def test_a_wrong_op_is_one_line_with_the_nearest_and_exit_code_two(tmp_path, capsys):
    assert main(["bench", "detektion", "--csv", str(tmp_path / "cpu.csv")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "medley bench: error: unknown op 'detektion'; did you mean 'detection'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_results_is_refused_and_kept(tmp_path, capsys):
    path = tmp_path / "notes.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["bench", "replace", "--csv", str(path)]) == 2
    assert "is no file of results" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_without_a_checkout_it_says_so_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "run.py")
    monkeypatch.delitem(sys.modules, "medley_bench", raising=False)
    assert main(["bench", "--list"]) == 2
    captured = capsys.readouterr()
    assert "medley bench: error: no benchmarks at" in captured.err and len(captured.err.splitlines()) == 1


def test_the_script_runs_from_a_checkout_that_is_not_installed(tmp_path):
    command = [sys.executable, "-S", "-c"]
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path.append({site!r}); import runpy; sys.argv = ['run.py', '--list']; "
    code += f"runpy.run_path({str(ROOT / 'kernels' / 'benchmarks' / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "masking.mask_tokens" in done.stdout, done.stderr


SHAPE = {"tokens": 64, "d": 16, "V": 40, "rate": 0.25}


def test_the_heads_flops_and_bytes_are_those_of_its_gemms_and_tensors(modules):
    losses = modules("losses")
    inputs = losses.head_inputs("cpu", torch.float32, **SHAPE)
    targets = len(inputs.places)
    assert targets == 16 and int((inputs.targets >= 0).sum()) == targets
    for mode in ("forward", "forward+backward"):
        work = losses.head_work(SHAPE, mode, 4)
        for provider in (losses.head_gemms, losses.head_of_places_with_torch):
            step = provider(inputs, mode)
            with FlopCounterMode(display=False) as counter:
                step()
            assert counter.get_total_flops() == work.flops
        read = inputs.hidden[inputs.places].nbytes + inputs.weight.nbytes + inputs.targets.nbytes
        written = inputs.hidden.nbytes + inputs.weight.nbytes
        assert work.bytes == read + written * (mode != "forward")


def test_the_layers_flops_are_those_that_torch_counts(modules):
    norms = modules("norms")
    shape = {"tokens": 64, "d": 64, "length": 32}
    inputs = norms.bert_inputs("cpu", torch.float32, **shape)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        inputs.layer(inputs.rows).sum().backward()
    assert counter.get_total_flops() == norms.bert_work(shape, "forward+backward", 4).flops


def test_every_provider_of_the_head_computes_the_same_loss_gradients(modules):
    losses = modules("losses")
    inputs = losses.head_inputs("cpu", torch.float32, **SHAPE)
    inputs.sample_weights.fill_(1.0)
    plain = losses.head_with_torch(inputs, "forward+backward")()
    for prepare in (
        losses.head_with("torch"),
        losses.head_anew,
        losses.head_of_places_with_torch,
        losses.head_with_torchs_own,
    ):
        try:
            gradients = prepare(inputs, "forward+backward")()
        except losses.NotHere:
            continue
        for ours, expected in zip(gradients, plain, strict=False):
            assert torch.allclose(ours, expected, atol=1e-5)


def test_providers_of_linear_norms_agree(modules):
    norms = modules("norms")
    inputs = norms.linear_inputs("cpu", torch.float32, tokens=96, d=16, length=32, p=24)
    expected = norms.instantiate_with_torch(inputs, "forward")()
    for method in ("gram", "instantiate"):
        ours = norms.ours(norms.LINEAR, *norms.PAIR, method=method)(inputs, "forward")()
        assert torch.allclose(ours, expected, rtol=1e-4)


def test_samples_fill_their_rows_and_begin_and_end_with_special_tokens(modules):
    cases = modules("cases")
    inputs = cases.layout("cpu", 4096, 128, 1000)
    assert inputs.tokens.shape == (2, 2048) and inputs.samples == 32
    flat, places = inputs.tokens.flatten(), inputs.positions.flatten()
    assert ((flat < cases.SPECIAL) == ((places == 0) | (places == 127))).all()
    assert torch.equal(inputs.segments.flatten(), torch.arange(4096) // 128)


def test_goals_are_judged_by_their_bounds_and_need_a_gpu(modules):
    goals, records = modules("goals"), modules("records")

    def rows(medley, gemms):
        shape = "tokens=65536 d=768 V=30522 rate=0.15"
        times = {"medley": medley, goals.GEMMS: gemms}
        return [
            records.Record("linear_ce", name, "forward+backward", shape, "bfloat16", "time_ms", None, time, None)
            for name, time in times.items()
        ]

    def first(*arguments):
        return goals.judge(*arguments)[0]

    assert first(rows(1.2, 1.0), "cuda").startswith("  met ") and first(rows(1.2, 1.0), "cuda").endswith("1.2")
    assert first(rows(1.3, 1.0), "cuda").startswith("  not met ")
    assert first(rows(1.2, 1.0), "cpu").startswith("  not measured ")
    assert all(line.startswith("  not measured ") for line in goals.judge([], "cuda"))


def test_the_goals_look_up_what_a_run_measures(modules):
    """Every name, mode and shape that a goal asks for is one of a benchmark's."""
    goals, cases = modules("goals"), modules("cases")
    benchmarks = bench._script().load()
    asked = []

    class Recording(goals.Results):
        def median(self, op, provider, mode, shape, metric="time_ms"):
            asked.append((op, provider, mode, shape))
            return 1.0

        def others(self, *arguments):
            return [1.0]

    for goal in goals.GOALS:
        assert goal.ratio(Recording([])) == 1
    assert len(asked) > 10
    for op, provider, mode, shape in asked:
        benchmark = benchmarks[op]
        assert provider in [each.name for each in benchmark.providers] and mode in benchmark.modes
        assert shape in [cases.text_of(each) for each in benchmark.shapes(cases.Scale(quick=True))]


def test_figures_are_drawn_for_what_varies(tmp_path, modules):
    pytest.importorskip("matplotlib")
    plots, records = modules("plots"), modules("records")
    rows = [
        records.Record(op, provider, "forward", f"tokens={tokens} d=8", "float32", "time_ms", 0.9, tokens / 100, 50.0)
        for op, several in (("detection", (100, 200)), ("swap", (100,)))
        for provider in ("medley", "torch")
        for tokens in several
    ]
    assert list(plots.draw(rows, tmp_path, "CPU")) == [tmp_path / "detection.png"]
    assert (tmp_path / "detection.png").stat().st_size > 1000


def test_quantiles_of_repetitions_are_in_order(modules):
    times = modules("timing").Clock("cpu", 0.01).milliseconds(lambda: torch.ones(10).sum())
    assert 0 < times.p20 <= times.p50 <= times.p80 < math.inf


def test_peak_memory_counts_what_lives_at_the_same_time(modules):
    def step():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first, second
        return torch.empty(1 << 20, dtype=torch.uint8)

    assert 2 << 20 <= modules("timing").Clock("cpu", 0.01).peak_bytes(step) < 2.1 * (1 << 20)


def test_every_op_can_be_run_alone_for_the_sanitizer(modules, capsys):
    memcheck = modules("memcheck")
    assert memcheck.main(["mask", "detection", "segment_sums", "--alone"]) == 0
    assert memcheck.main(["maks", "--alone"]) == 2
    assert "did you mean 'mask'?" in capsys.readouterr().err


def test_the_sanitizer_runs_in_a_process_an_op_and_its_findings_fail(modules, tmp_path, capsys, monkeypatch):
    memcheck = modules("memcheck")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memcheck.main(["swap"]) == 2
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().err
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"; case "$*" in *swap*) exit 86;; esac\n')
    tool.chmod(0o755)
    assert memcheck.main(["swap", "mask", "--tool", "racecheck"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["swap", "FAILED"] and lines[-1].split() == ["mask", "clean"]
    assert "--tool racecheck" in lines[1] and lines[1].endswith("swap --alone")
