"""Compile every kernel for GPUs that need not be there, and say what each takes of them.

    python kernels/benchmarks/compile.py [op ...] [--arch 90 80] [--json FILE]

Takes each Configuration of ``fused_objectives`` through Triton and the ptxas that ships with it. Pointers are aligned
to 16 bytes, as torch allocates them; an integer of type ``i32:16`` is a multiple of 16. The exit code is 1 if a kernel
does not compile, spills registers to memory, or wants more shared memory than a program can have.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from types import ModuleType

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability → shared memory that one program can have (CUDA C++ Programming Guide)."""
COLUMNS = ("op", "kernel", "constants", "dtype", "warps", "arch", "registers", "spilled", "shared")

_work: list[tuple] = []  # (op, configuration, arch); workers are forked, so kernels need no pickling


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compile every kernel, without a GPU; say what each takes.")
    parser.add_argument("ops", nargs="*", metavar="op", help="module of fused_objectives or a .py file (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=[90, 80], choices=SHARED_KIB, help="compute capability")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too, unrounded, with errors")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    return parser


def load(op: str) -> ModuleType:
    """Import a module of the package by its name, or a file."""
    if not op.endswith(".py"):
        return importlib.import_module(f"fused_objectives.{op}")
    spec = importlib.util.spec_from_file_location(Path(op).stem, op)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_all(jobs: int) -> list[dict]:
    """Compile all, ``jobs`` pieces at a time; return its rows. A crash of the compiler fails its own piece only."""
    forked = multiprocessing.get_context("fork")
    rows = []
    with suppress(BrokenProcessPool), ProcessPoolExecutor(jobs, forked) as pool:
        for row in pool.map(compile_one, range(len(_work))):
            rows.append(row)
    for index in range(len(rows), len(_work)):  # none, unless something crashed
        try:
            with ProcessPoolExecutor(1, forked) as pool:
                rows.append(pool.submit(compile_one, index).result())
        except BrokenProcessPool:
            rows.append(describe(index) | {"error": "the compiler crashed"})
    return rows


def describe(index: int) -> dict:
    """Return the first columns of a piece of work's row."""
    op, (kernel, signature, constants, warps), arch = _work[index]
    pointers = [kind[1:].partition(":")[0] for kind in signature.values() if kind.startswith("*")]
    return {
        "op": op,
        "kernel": kernel.__name__,
        "constants": " ".join(f"{name}={value}" for name, value in constants.items()),
        "dtype": next((kind for kind in pointers if kind in ("bf16", "fp16")), pointers[0]),
        "warps": warps,
        "arch": arch,
    }


def compile_one(index: int) -> dict:
    """Compile a piece of work; return its row (bytes, not KiB) with ``error``, None or a text."""
    _, (kernel, signature, constants, warps), arch = _work[index]
    row = describe(index)
    try:
        row |= resources(kernel, signature, constants, warps, arch)
    except Exception as error:  # whatever Triton or ptxas raises is what this is here to report
        return row | {"error": f"{type(error).__name__}: {error}"}
    row["error"] = None
    if row["spilled"]:
        row["error"] = f"spills {row['spilled']} bytes a thread"
    elif row["shared"] > SHARED_KIB[arch] * 1024:
        row["error"] = f"wants {row['shared']} bytes of shared memory, sm_{arch} has {SHARED_KIB[arch] * 1024}"
    return row


def resources(kernel, signature, constants, warps: int, arch: int) -> dict:
    """Return the registers and spilled bytes of a thread and the shared bytes of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if {*signature, *constants} != set(kernel.arg_names) or len(signature) + len(constants) != len(kernel.arg_names):
        odd = {*signature, *constants} ^ set(kernel.arg_names) or {*signature} & {*constants}
        raise ValueError(f"signature and constants do not make up the kernel's arguments: {', '.join(sorted(odd))}")
    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        types[name], _, divisor = signature.get(name, "constexpr").partition(":")
        if divisor or types[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", int(divisor or 16)]]
    source = ASTSource(kernel, types, dict(constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}


def print_table(rows: list[dict]) -> None:
    """Print rows in columns; shared memory in KiB."""
    cells = [list(COLUMNS)]
    for row in rows:
        shown = row | {"shared": f"{row['shared'] / 1024:.1f}"} if "shared" in row else row
        cells.append([str(shown.get(column, "-")) for column in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    arguments = parser().parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # decides what kernels are when they are defined: start anew without
        os.execve(sys.executable, sys.orig_argv, os.environ)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import fused_objectives
    from fused_objectives.backend import triton

    if triton is None:
        parser().error("Triton is not installed")
    ops = arguments.ops or sorted(module.name for module in pkgutil.iter_modules(fused_objectives.__path__))
    for op in ops:
        for configuration in getattr(load(op), "CONFIGURATIONS", ()):
            _work.extend((Path(op).stem, configuration, arch) for arch in arguments.arch)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = compile_all(arguments.jobs)
    print_table(rows)
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"\n{row['op']}.{row['kernel']} ({row['constants']}) on sm_{row['arch']}: {row['error']}")
    print(f"\n{len(failed)} of {len(rows)} failed")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
