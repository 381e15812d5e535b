"""One op: every provider at every shape, with all metrics, printed as they come."""

import gc
from collections.abc import Iterator

import torch
from cases import Benchmark, NotHere, Provider, Scale, Shape, Work, text_of
from floors import Floors
from records import BANDWIDTH, FLOOR, GRAPH, PEAK, RATE, TIME, Record
from timing import GRAPH_BELOW_MS, Clock, Quantiles, Step

HEADINGS = {  # metric → heading of its column
    TIME: "ms (p20 to p80)",
    GRAPH: "ms in a graph",
    PEAK: "peak MiB",
    BANDWIDTH: "GB/s",
    RATE: "TFLOP/s",
    FLOOR: "of the floor",
}
Metrics = dict[str, tuple[float | None, float, float | None]]


class Meter:
    """Measures ops on one device.

    Args:
        clock, floors: of the device.
        scale: which shapes.
        wanted: words of which a provider's name must hold one; none takes all providers.
    """

    def __init__(self, clock: Clock, floors: Floors, scale: Scale, wanted: list[str]):
        self.clock, self.floors, self.scale, self.wanted = clock, floors, scale, wanted
        self.failures: list[str] = []
        """Our own providers that failed."""
        self._told: set[tuple[str, str]] = set()

    def records(self, benchmark: Benchmark) -> Iterator[Record]:
        """Measure an op and print a table for every shape and mode."""
        self._told = set()
        providers = list(filter(self._takes, benchmark.providers))
        if not providers:
            return
        for shape in benchmark.shapes(self.scale):
            try:
                inputs = benchmark.inputs(self.clock.device, self.floors.dtype, **shape)
            except Exception as error:
                self._leave_out(benchmark, f"medley's inputs at {text_of(shape)}", error)
                continue
            for mode in benchmark.modes:
                print(f"\n{benchmark.name}  {text_of(shape)}  {mode}")
                print(self._line("", HEADINGS), flush=True)
                for provider in providers:
                    metrics = self._measure(benchmark, provider, inputs, shape, mode)
                    for metric, values in metrics.items():
                        dtype = str(self.floors.dtype).removeprefix("torch.")
                        yield Record(benchmark.name, provider.name, mode, text_of(shape), dtype, metric, *values)
            del inputs
            gc.collect()

    def _takes(self, provider: Provider) -> bool:
        if provider.gpu_only and self.clock.device == "cpu":
            return False
        return not self.wanted or any(word.lower() in provider.name.lower() for word in self.wanted)

    def _measure(self, benchmark: Benchmark, provider: Provider, inputs, shape: Shape, mode: str) -> Metrics:
        """Return a provider's metrics, empty if it has no such mode or fails."""
        try:
            step = provider.prepare(inputs, mode)
            if step is None:
                return {}
            metrics = self._metrics(provider, step, benchmark.work(shape, mode, self.floors.dtype.itemsize))
        except Exception as error:  # a peer may fail in any way, and the run goes on
            self._leave_out(benchmark, provider.name, error)
            return {}
        finally:
            step = None
            if self.clock.device == "cuda":
                torch.cuda.empty_cache()
        print(self._line(provider.name, {name: _cell(name, each) for name, each in metrics.items()}), flush=True)
        return metrics

    def _leave_out(self, benchmark: Benchmark, name: str, error: Exception) -> None:
        """Say once an op that something is left out, and why."""
        reason = _reason(error)
        if (name, reason) not in self._told:
            print(f"  {name} is left out: {reason}", flush=True)
        self._told.add((name, reason))
        if name.startswith("medley"):
            self.failures.append(f"{benchmark.name} ({name})")
        gc.collect()  # what failed may have left large things behind

    def _line(self, name: str, cells: dict[str, str]) -> str:
        line = f"  {name:36}"
        for metric in HEADINGS:
            if metric != GRAPH or self.clock.device == "cuda":
                line += f"{cells.get(metric, ''):>{26 if metric == TIME else 14}}"
        return line.rstrip()

    def _metrics(self, provider: Provider, step: Step, work: Work) -> Metrics:
        times = self.clock.milliseconds(step)
        metrics: Metrics = {TIME: times}
        if self.clock.device == "cuda" and provider.in_graph and times.p50 < GRAPH_BELOW_MS:
            try:
                metrics[GRAPH] = times = self.clock.graph_milliseconds(step)
            except Exception as error:
                print(f"  {provider.name} runs in no CUDA graph: {_reason(error)}")
        metrics[PEAK] = (None, self.clock.peak_bytes(step) / 2**20, None)
        rates = {BANDWIDTH: work.bytes / 1e6, RATE: work.flops / 1e9, FLOOR: self.floors.milliseconds(work)}
        if provider.works:
            metrics |= {name: _rates(amount, times) for name, amount in rates.items() if amount > 0}
        return metrics


def _rates(amount: float, times: Quantiles) -> Quantiles:
    """Return ``amount`` a millisecond: the slow times are the low rates."""
    return Quantiles(*(amount / time for time in reversed(times)))


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, NotHere) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0][:160]


def _cell(metric: str, values: tuple) -> str:
    low, middle, high = values
    if metric == TIME:
        return f"{short(middle)} ({short(low)} to {short(high)})"
    return f"{100 * middle:.0f} %" if metric == FLOOR else short(middle)


def short(number: float) -> str:
    """Return three digits of a number, or all before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
