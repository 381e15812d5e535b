"""The command ``medley bench``, which is ``python kernels/benchmarks/run.py``."""

import csv
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
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
DOCUMENT = ROOT / "docs" / "kernels.md"


@pytest.fixture
def modules():
    """Imports the benchmark's own modules, which can be once its script has been loaded."""
    bench._script()
    return importlib.import_module


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, *arguments: str) -> str:
    """Return the one line with which the command refuses its arguments before it measures anything."""
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("medley bench: error: ") and captured.err.count("\n") == 1
    return captured.err.strip()


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
        assert f"torch={torch.__version__}" in row["versions"] and "opacus=" in row["versions"]
        assert row["quick"] == "yes"
        low, middle, high = (float(row[name] or "nan") for name in ("p20", "p50", "p80"))
        assert middle > 0 and not low > middle and not middle > high
    again = measure(path, "segment_sums", "--providers", "medley")
    assert again[: len(rows)] == rows and len(again) == 2 * len(rows)
    output = capsys.readouterr().out
    assert "of the floor" in output and "Goals" not in output  # they are a GPU's


def test_a_missing_peer_is_named_and_the_run_goes_on(tmp_path, capsys, monkeypatch, modules):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.linear", None)
    rows = measure(tmp_path / "cpu.csv", "linear_norms", "--providers", "Opacus,gram")
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
    line = refused(capsys, "detektion", "--csv", str(tmp_path / "cpu.csv"))
    assert line == "medley bench: error: unknown op 'detektion'; did you mean 'detection'?"
    assert list(tmp_path.iterdir()) == []


def test_providers_are_one_argument_and_ops_may_follow_it(tmp_path):
    rows = measure(tmp_path / "cpu.csv", "--providers", "MEDLEY, transformers", "mask")
    assert {row["op"] for row in rows} == {"mask"}
    assert {row["provider"] for row in rows} == {"medley", "transformers"}


def test_a_provider_that_no_op_has_is_one_line(tmp_path, capsys):
    path = str(tmp_path / "cpu.csv")
    assert "unknown provider 'opakus'; did you mean 'Opacus'?" in refused(
        capsys, "--providers", "opakus", "--csv", path
    )
    assert "unknown provider 'Opacus'; valid: medley, " in refused(capsys, "swap", "mask", "--providers", "Opacus")
    assert "unknown provider ''" in refused(capsys, "swap", "--providers", "medley,")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["a,b\n1,2\n", b"\x89PNG\r\n\x1a\n\0\0\xff\xfe", "a\0b\n", "\n"])
def test_a_file_that_holds_no_results_is_refused_by_name_and_kept(tmp_path, capsys, content):
    path = tmp_path / "notes.csv"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    assert f"{path} is no file of results: " in refused(capsys, "replace", "--csv", str(path))
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    reasons = {
        str(tmp_path): "Is a directory",
        str(tmp_path / "file" / "cpu.csv"): "its folder is none",
        "/dev/full": "No space left on device",
    }
    for name, reason in reasons.items():
        assert f"cannot add results to {name}: {reason}; " in refused(capsys, "replace", "--csv", name)
    assert "--csv: the name is empty" in refused(capsys, "replace", "--csv", "")


def test_a_folder_of_figures_that_cannot_be_is_noticed_before_anything_is_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "plots"):
        line = refused(capsys, "replace", "--csv", str(tmp_path / "cpu.csv"), "--plots", str(folder))
        assert f"cannot draw into {folder}: it is no folder" in line
    assert "--plots: the name is empty" in refused(capsys, "replace", "--plots", "")
    assert "--quick measures one shape an op" in refused(capsys, "--quick", "--plots", str(tmp_path))
    assert "add --plots FOLDER" in refused(capsys, "--redraw")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["medley bench", "run.py"])
def test_ctrl_c_keeps_every_result_until_then_and_says_where(tmp_path, capsys, monkeypatch, modules, command):
    def interrupt(inputs, mode):
        raise KeyboardInterrupt

    script = bench._script()
    replace = script.load()["replace"]
    ours = replace.providers[0]
    stopped = dataclasses.replace(replace, providers=[ours, dataclasses.replace(ours, prepare=interrupt)])
    monkeypatch.setattr(script, "load", lambda: {"replace": stopped})
    path = tmp_path / "cpu.csv"
    arguments = ["replace", "--quick", "--csv", str(path)]
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments]) if command == "medley bench" else script.main(arguments)
    kept = read(path)
    assert stop.value.code == 130 and {row["provider"] for row in kept} == {"medley"}
    assert capsys.readouterr().err == f"\ninterrupted; {len(kept)} results are kept in {path}\n"


def test_without_a_checkout_it_says_so_in_one_line_but_has_a_help(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "run.py")
    monkeypatch.delitem(sys.modules, "medley_bench", raising=False)
    assert "no benchmarks at" in refused(capsys, "--list")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0 and "--providers WORD,..." in capsys.readouterr().out


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


def test_goals_are_judged_by_their_bounds(modules):
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

    assert first(rows(1.2, 1.0)).startswith("  met ") and first(rows(1.2, 1.0)).endswith("1.2")
    assert first(rows(1.3, 1.0)).startswith("  not met ")
    assert all(line.startswith("  not measured ") for line in goals.judge([]))


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


def run_of(records, date: str, quick: bool = False):
    return records.Run("CPU", "", "torch=2", "abc", date, "yes" if quick else "no")


def results_of(records, ops: dict[str, tuple]) -> list:
    """Return made-up times of two providers at several numbers of tokens."""
    return [
        records.Record(op, provider, "forward", f"tokens={tokens} d=8", "float32", "time_ms", 0.9, tokens / 100, 50.0)
        for op, several in ops.items()
        for provider in ("medley", "torch")
        for tokens in several
    ]


def test_figures_are_drawn_for_what_varies(tmp_path, modules):
    pytest.importorskip("matplotlib")
    plots, records = modules("plots"), modules("records")
    rows = results_of(records, {"detection": (100, 200), "swap": (100,)})
    assert list(plots.draw(rows, tmp_path, run_of(records, "2026-01-01"))) == [tmp_path / "detection.png"]
    assert (tmp_path / "detection.png").stat().st_size > 1000


def test_a_figure_names_what_varies_together_and_the_run(tmp_path, modules):
    pytest.importorskip("matplotlib")
    plots, records = modules("plots"), modules("records")
    rows = [
        records.Record("gram", "medley", "forward", f"d={width} p={width}", "float32", "time_ms", 1.0, 2.0, 3.0)
        for width in (8, 16)
    ]
    [(axis, label, fixed, _)] = plots._panels(rows)
    assert (axis, fixed) == ("d", {}) and "d and p" in label


def test_figures_are_drawn_again_from_the_last_run_of_each_op_in_a_file(tmp_path, capsys, modules):
    pytest.importorskip("matplotlib")
    records = modules("records")
    path, folder = tmp_path / "cpu.csv", tmp_path / "plots"
    records.start(path)
    records.append(path, results_of(records, {"swap": (1, 2), "mask": (1, 2)}), run_of(records, "2026-01-01"))
    records.append(path, results_of(records, {"swap": (7,)}), run_of(records, "2026-01-03", quick=True))
    records.append(path, results_of(records, {"mask": (3, 4, 5)}), run_of(records, "2026-01-02"))
    written = path.read_bytes()
    last = records.last_runs(records.read(path))
    assert {op: (run.date, len(rows)) for op, (run, rows) in last.items()} == {
        "swap": ("2026-01-01", 4),
        "mask": ("2026-01-02", 6),
    }
    assert main(["bench", "--redraw", "--csv", str(path), "--plots", str(folder)]) == 0
    assert {figure.name for figure in folder.iterdir()} == {"swap.png", "mask.png"}
    assert capsys.readouterr().out.count("drew ") == 2 and path.read_bytes() == written
    assert "cannot read results from" in refused(
        capsys, "--redraw", "--plots", str(folder), "--csv", str(tmp_path / "none.csv")
    )


def test_the_table_holds_ours_against_the_fastest_peer(tmp_path, modules, capsys):
    table, records = modules("table"), modules("records")
    path, document = tmp_path / "cpu.csv", tmp_path / "kernels.md"

    def result(provider, tokens, time):
        shape = f"tokens={tokens}"
        return [
            records.Record("detection", provider, "forward+backward", shape, "float32", metric, None, value, None)
            for metric, value in (("time_ms", time), ("peak_mib", 20.0))
        ]

    rows = [
        *result("medley", 8, 3.0),
        *result("torch", 8, 2.0),
        *result("Opacus", 8, 1.0),
        *result("its GEMMs", 8, 0.5),
    ]
    rows += [*result("medley", 4, 3.0), *result("torch", 4, 6.0)]
    records.start(path)
    records.append(path, rows, run_of(records, "2026-01-01"))
    expected = "| `detection`, forward+backward | 3 ms, 20 MiB | Opacus 1 ms, 20 MiB; torch 2 ms, 20 MiB | 0.5 ms | "
    assert table.table(path).splitlines()[2] == expected + "**3 (0.5 to 3)** |"
    document.write_text("before\n<!-- table of a file -->\nold\n<!-- end of the table -->\nbehind\n")
    assert table.main([str(path), "--into", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- table of a file -->\n| op |") and text.endswith("\nbehind\n")
    assert "old" not in text and table.table(path) in text
    (tmp_path / "other.md").touch()
    assert table.main([str(path), "--into", str(tmp_path / "other.md")]) == 2
    assert "has no place for a table" in capsys.readouterr().err


def test_the_documentation_has_the_table_of_the_committed_results(modules):
    table = modules("table")
    remedy = "run python kernels/benchmarks/table.py --into docs/kernels.md"
    assert table.table(modules("records").RESULTS / "cpu.csv") in DOCUMENT.read_text(), remedy


def test_the_documented_example_runs(capsys):
    for example in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(compile(example, str(DOCUMENT), "exec"), {})


WAITING = ("tolist", "item", "nonzero", "unique", "unique_consecutive", "__int__", "__bool__", "__index__")


@pytest.mark.parametrize("op", bench._script().load())
def test_a_twin_stands_in_a_cuda_graph_unless_it_makes_the_host_wait(op, modules, monkeypatch):
    """What would wait is called on a CPU just as well; and what is left out of graphs waits at one shape at least."""
    from fused_objectives.targets import capacity_for

    waited = []

    def noted(function):
        def note(*args, **options):
            waited.append(function)
            return function(*args, **options)

        return note

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # for twins that count what a GPU's host must not
    benchmark = bench._script().load()[op]
    twins = [provider for provider in benchmark.providers if "impl=torch" in provider.name]
    found = dict.fromkeys((provider.name for provider in twins), False)
    policies = {shape.get("policy"): shape for shape in benchmark.shapes(modules("cases").Scale(full=False))}
    for shape in policies.values():
        small = (
            shape
            | {"tokens": 320, "length": 64}
            | {name: 48 for name in ("d", "p", "V") if name in shape and op != "bert_layer"}
        )
        inputs = benchmark.inputs("cpu", torch.float32, **small)
        inputs.capacity = capacity_for(320, 0.15)  # as on a GPU
        for provider in twins:
            for mode in benchmark.modes:
                step = provider.prepare(inputs, mode)
                del waited[:]
                if step is not None:
                    step()
                found[provider.name] |= bool(waited)
    assert found == {provider.name: not provider.in_graph for provider in twins}


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
