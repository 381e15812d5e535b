import os
import subprocess
import sys

import pytest
import torch

from fused_objectives.backend import uses_triton

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil
import torch
import fused_objectives
for module in pkgutil.iter_modules(fused_objectives.__path__):
    importlib.import_module("fused_objectives." + module.name)
from fused_objectives.backend import uses_triton
from fused_objectives.segments import sum_per_sample
assert sum_per_sample(torch.ones(3), torch.tensor([0, 0, 1]), 2).tolist() == [2, 1]
try:
    uses_triton("triton", torch.ones(3))
except ValueError as error:
    print(error)
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


def test_every_op_works_without_triton_and_says_so_when_asked_for_its_kernel():
    result = run(WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "impl: Triton is not installed"


def test_a_kernel_asked_for_on_the_cpu_is_refused_outside_the_interpreter():
    pytest.importorskip("triton")
    script = "import torch\nfrom fused_objectives.backend import uses_triton\nuses_triton('triton', torch.ones(3))"
    result = run(script)
    assert result.returncode == 1 and "Triton kernels do not run on 'cpu'" in result.stderr
    assert run(script, TRITON_INTERPRET="1").returncode == 0


def test_auto_takes_the_twin_on_the_cpu_and_another_word_is_refused():
    assert not uses_triton("auto", torch.ones(3)) and not uses_triton("torch", torch.ones(3))
    with pytest.raises(ValueError, match=r"^impl: 'cuda' is none of auto, triton, torch$"):
        uses_triton("cuda", torch.ones(3))
