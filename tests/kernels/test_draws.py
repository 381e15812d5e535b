import json
import os
import subprocess
import sys

import pytest
import torch

from fused_objectives.draws import threshold, words
from tests.kernels.corruption import KEY, draws, odd_rows


def test_a_probability_of_0_never_happens_and_one_of_1_always():
    assert threshold(0.0) == 0 and threshold(1.0) == 2**32 and threshold(0.25) == 2**30
    assert threshold(1 + 1e-12) >= 2**32 and threshold(-1e-12) <= 0  # what rounding leaves of a sum
    for wrong in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            threshold(wrong)


def test_words_are_those_of_position_sample_and_visit():
    rows = odd_rows()
    drawn = words(KEY["seed"], KEY["stream"], rows.positions, rows.segments, rows.sample_ids, rows.visits)
    for row, column in (rows.segments >= 0).nonzero().tolist():
        segment = rows.segments[row, column]
        sample = int(rows.sample_ids[segment]), int(rows.visits[segment])
        assert tuple(int(word[row, column]) for word in drawn) == draws(int(rows.positions[row, column]), *sample)
    nothing = torch.empty(0, dtype=torch.int64)
    assert len(words(1, "s", torch.zeros(3, 4, dtype=torch.int64), nothing, nothing, nothing)) == 4


def test_kernels_are_compiled_once_whatever_rates_sizes_and_seeds_are(tmp_path):
    """No number is compiled in, and all have one type; in a process without the interpreter, which compiles nothing."""
    pytest.importorskip("triton")
    script = tmp_path / "parameters.py"
    script.write_text(
        "import json\n"
        "from fused_objectives import editing, masking, replacing, swapping\n"
        "kernels = [op.CONFIGURATIONS[0].kernel for op in (editing, masking, replacing, swapping)]\n"
        "print(json.dumps([[(p.name, p.is_constexpr, p.do_not_specialize, p.annotation_type) for p in kernel.params]"
        " for kernel in kernels]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    for parameters in json.loads(result.stdout):
        assert len(parameters) > 5
        for name, compiled_in, unspecialized, kind in parameters:
            if compiled_in:
                assert name in ("IGNORED", "BLOCK", "TILE")
            elif not name.endswith("_ptr"):
                assert unspecialized and kind == "i64", name
