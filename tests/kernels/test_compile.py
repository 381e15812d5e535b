import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_objectives
from fused_objectives.backend import triton

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "compile.py"
FAULTY = """
from fused_objectives.backend import Configuration, jit, tl

@jit
def sound_kernel(x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(x_ptr + places, tl.load(x_ptr + places) + 1)

@jit
def ill_typed_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.arange(0, BLOCK) + tl.arange(0, 2 * BLOCK))

@jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + places)
    tl.debug_barrier()
    tl.store(x_ptr + places, values + tl.sum(values))

SIGNATURE = {"x_ptr": "*fp32"}
CONFIGURATIONS = [
    Configuration(sound_kernel, SIGNATURE, {"BLOCK": 128}),
    Configuration(ill_typed_kernel, SIGNATURE, {"BLOCK": 128}),
    Configuration(spilling_kernel, SIGNATURE, {"BLOCK": 16384}, num_warps=1),
    Configuration(sound_kernel, SIGNATURE, {}),
]
"""


def run_compile(*arguments, environment=None):
    """Run the script; return its exit code, what it printed and the table it wrote."""
    table = Path(arguments[-1])
    command = [sys.executable, SCRIPT, *arguments[:-1], "--json", table]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr, json.loads(table.read_text()) if table.exists() else []


def kernels_in_source() -> set[tuple[str, str]]:
    """Return (module, name) of each ``@jit`` function of the package whose name ends in ``_kernel``."""
    found = set()
    for path in Path(fused_objectives.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
                if "jit" in decorators:
                    found.add((path.stem, node.name))
    return found


@pytest.mark.slow
def test_every_kernel_compiles_for_two_generations_of_gpus_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code, output, table = run_compile("--arch", "90", "80", tmp_path / "table.json", environment=environment)
    assert code == 0, output
    for arch in (80, 90):
        compiled = {(row["op"], row["kernel"]) for row in table if row["arch"] == arch}
        assert compiled == kernels_in_source(), "a kernel without a Configuration, or the reverse"
    assert not any(row["spilled"] or row["error"] for row in table)


def test_faulty_kernels_are_named_and_the_sound_is_compiled_even_from_an_interpreted_process(tmp_path):
    module = tmp_path / "faulty.py"
    module.write_text(FAULTY)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    code, output, table = run_compile(str(module), "--arch", "80", tmp_path / "table.json", environment=environment)
    assert code == 1
    assert "3 of 4 failed" in output
    sound, ill_typed, spilling, incomplete = table
    assert sound["error"] is None and 0 < sound["registers"] < 64 and sound["spilled"] == 0
    assert "faulty.ill_typed_kernel (BLOCK=128) on sm_80" in output and "256" in ill_typed["error"]
    assert "faulty.spilling_kernel (BLOCK=16384) on sm_80" in output and spilling["spilled"] > 0
    assert incomplete["error"].endswith("do not make up the kernel's arguments: BLOCK")
