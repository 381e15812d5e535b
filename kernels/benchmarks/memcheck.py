"""Run every op once under NVIDIA's compute-sanitizer, at small odd sizes in fp32 and bf16.

    python kernels/benchmarks/memcheck.py [op ...] [--tool memcheck|racecheck|initcheck|synccheck]

Needs a GPU and ``compute-sanitizer`` of the CUDA toolkit. The exit code is 1 if it finds something in an op.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE),) if folder not in sys.path]

import run  # noqa: E402  (it makes the rest importable)

from pretrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, unknown  # noqa: E402

TOOLS = "memcheck", "racecheck", "initcheck", "synccheck"
SIZES = {"tokens": 1515, "d": 72, "p": 72, "V": 1003, "length": 101}
FOUND = 86


def main(argv: list[str] | None = None) -> int:
    """Check the ops one after the other; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help="as of run.py (default: all)")
    parser.add_argument("--tool", choices=TOOLS, default=TOOLS[0], help="what to look for")
    parser.add_argument("--alone", action="store_true", help="run the ops in this process, without the sanitizer")
    args = parser.parse_args(argv)
    benchmarks = run.load()
    for name in args.ops:
        if name not in benchmarks:
            print(f"memcheck.py: error: {unknown('op', name, benchmarks)}", file=sys.stderr)
            return EXIT_USER_ERROR
    names = args.ops or list(benchmarks)
    if args.alone:
        for name in names:
            call(benchmarks[name])
        return EXIT_DONE
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("memcheck.py: error: compute-sanitizer is not on PATH; it is part of the CUDA toolkit", file=sys.stderr)
        return EXIT_USER_ERROR
    clean = [check(sanitizer, args.tool, name) for name in names]
    return EXIT_DONE if all(clean) else EXIT_FAILURE


def check(sanitizer: str, tool: str, name: str) -> bool:
    """Run an op in a process of its own; return whether nothing was found."""
    watched = [sys.executable, __file__, name, "--alone"]
    # every tensor gets an allocation of its own, or what lies behind its end would be torch's and pass unnoticed
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *watched]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(f"{name:27}{'clean' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    return done.returncode == 0


def call(benchmark) -> None:
    """Run each of our providers once in every mode, on the GPU if there is one."""
    import torch
    from cases import Scale

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in benchmark.shapes(Scale(full=False, quick=True)):
        small = shape | {name: size for name, size in SIZES.items() if name in shape}
        for dtype in (torch.float32, torch.bfloat16):
            inputs = benchmark.inputs(device, dtype, **small)
            for provider in benchmark.providers:
                if provider.name.startswith("medley"):
                    for mode in benchmark.modes:
                        step = provider.prepare(inputs, mode)
                        if step is not None:
                            step()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
