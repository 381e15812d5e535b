import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from fused_objectives import philox as module
from fused_objectives.philox import below, philox, scalar_seed, stream_id, uniform, uniforms

ONES = 0xFFFFFFFF
# From kat_vectors of Random123: counter, key, result of philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture
def raw_key(monkeypatch):
    """Lets a stream be named by its number."""
    monkeypatch.setattr(module, "stream_id", int)


def reference(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4×32-10 as the paper writes it, on Python's integers of any length."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(c[0] * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers_of_random123(raw_key, counter, key, result):
    expected = [int(word, 16) for word in result.split()]
    assert list(philox(key[0], key[1], *counter)) == expected
    assert list(reference(counter, key)) == expected
    assert [word.item() for word in philox(key[0], key[1], *(np.array([c]) for c in counter))] == expected
    assert [word.item() for word in philox(key[0], key[1], *(torch.tensor([c]) for c in counter))] == expected


def test_numpy_torch_and_python_integers_agree_bit_for_bit():
    rng = np.random.default_rng(3)
    counters = rng.integers(0, 2**32, (4, 1237))
    counters[:, :2] = [[0, ONES]] * 4
    key = 0xDEADBEEF, stream_id("a stream")
    arrays = philox(key[0], "a stream", *counters)
    tensors = philox(key[0], "a stream", *torch.from_numpy(counters))
    expected = np.array([reference(tuple(c), key) for c in counters.T.tolist()]).T
    for array, tensor, words in zip(arrays, tensors, expected, strict=True):
        assert array.dtype == np.int64 and tensor.dtype == torch.int64
        assert array.tolist() == tensor.tolist() == words.tolist()
    assert scalar_seed(key[0], "a stream", *counters[:, 5].tolist()) == expected[0, 5]


def test_counters_beyond_32_bits_count_by_their_low_word_and_shapes_broadcast():
    big = np.arange(5)[:, None] + 2**40
    words = philox(1, "x", big, np.arange(3))
    assert words[0].shape == (5, 3)
    assert np.array_equal(words[0], philox(1, "x", np.arange(5)[:, None], np.arange(3))[0])
    assert philox(1, "x", np.empty(0, np.int64))[0].shape == (0,)
    assert philox(1, "x", torch.empty(0, 7, dtype=torch.int64))[3].shape == (0, 7)


def test_seed_stream_and_every_counter_change_every_word():
    base = philox(1, "a", 1, 2, 3, 4)
    others = [(2, "a", 1, 2, 3, 4), (1, "b", 1, 2, 3, 4), *((1, "a", *np.eye(4, dtype=int)[i] + 7) for i in range(4))]
    for other in others:
        seed, stream, *counter = other
        assert all(a != b for a, b in zip(base, philox(seed, stream, *map(int, counter)), strict=True))


def test_words_are_uniform_in_every_bit_and_bucket_and_independent_of_each_other():
    n = 200_003
    words = philox(7, "uniform", np.arange(n))
    for word in words:
        ones = ((word[:, None] >> np.arange(32)) & 1).sum(0)
        assert np.abs(ones - n / 2).max() < 5 * np.sqrt(n / 4)
        assert stats.chisquare(np.bincount(below(word, 97), minlength=97)).pvalue > 1e-4
    assert np.abs(np.corrcoef(np.stack(words)) - np.eye(4)).max() < 5 / np.sqrt(n)
    assert abs(np.corrcoef(words[0][:-1], words[0][1:])[0, 1]) < 5 / np.sqrt(n)
    assert stats.kstest(uniforms(7, "uniform", np.arange(n)), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_uniform_and_below_stay_inside_their_ranges_at_the_extremes(make):
    extremes = make([0, 1, ONES - 1, ONES])
    values = uniform(extremes)
    assert values.tolist() == [0, 2**-32, 1 - 2**-31, 1 - 2**-32]
    assert below(extremes, 30_522).tolist() == [0, 0, 30_521, 30_521]
    assert below(extremes, 1).tolist() == [0, 0, 0, 0]


def test_tritons_philox_gives_the_same_words(tmp_path):
    """Triton reads its interpreter switch at import, so it runs in a process of its own."""
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def kernel(out_ptr, seed, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    words = tl.philox(seed, i, i * 3, i * 0 + 5, i * 0 + 6)\n"
        "    for w in tl.static_range(4):\n"
        "        tl.store(out_ptr + w * N + i, words[w].to(tl.int64))\n"
        f"out = torch.empty(4, 64, dtype=torch.int64)\n"
        f"kernel[(1,)](out, {(stream_id('s') << 32 | 17) - 2**64 * (stream_id('s') >> 31)}, 64)\n"
        "print((out & 0xFFFFFFFF).tolist())\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    i = np.arange(64)
    assert np.array_equal(np.array(json.loads(result.stdout)), np.stack(philox(17, "s", i, i * 3, 5, 6)))
