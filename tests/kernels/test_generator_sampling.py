import importlib

import numpy as np
import pytest
import torch
from scipy import stats

from fused_objectives.backend import jit, tl
from fused_objectives.generator_sampling import linear_cross_entropy_and_sample
from fused_objectives.gumbel import Sampling, gumbel, gumbel_of
from fused_objectives.linear_cross_entropy import linear_cross_entropy
from fused_objectives.philox import philox, philox_of_key
from fused_objectives.softmax_epilogue import ALIGNMENT, Terms, softmax_epilogue
from fused_objectives.targets import IGNORED
from pretrain import bench

SEED, STREAM = 7, "generator"


class Rows:
    """Logits with noise of their own: two samples in runs, one ignored row."""

    def __init__(self, place, rows=24, vocabulary=1013, scale=1.0):
        generator = torch.Generator().manual_seed(rows)
        padded = -(-vocabulary // ALIGNMENT) * ALIGNMENT
        logits = torch.randn(rows, padded, generator=generator) * scale
        self.logits = logits.to(place.device, place.dtype)[:, :vocabulary]
        self.bias = torch.randn(vocabulary, generator=generator).to(place.device)
        self.positions = torch.arange(rows) * 3
        self.segments = (torch.arange(rows) >= rows // 3).long()
        self.sample_ids, self.visits = torch.tensor([2**40 + 5, 11]), torch.tensor([0, 2])
        self.labels = torch.randint(vocabulary, (rows,), generator=generator).to(place.device)
        self.labels[1] = IGNORED
        self.device = place.device

    def sample(self, impl, temperature=1.0, soft_cap=None, gradient=False):
        rows = len(self.logits)
        tensors = (self.positions, self.segments, self.sample_ids, self.visits)
        sampling = Sampling(*(x.to(self.device) for x in tensors), SEED, STREAM, temperature)
        losses, log_normalizers, weights = (torch.ones(rows, device=self.device) for _ in range(3))
        tokens = torch.full((rows,), -7, device=self.device)
        logits = torch.full((rows, self.logits.stride(0)), torch.nan).to(self.logits)[:, : self.logits.shape[1]]
        logits.copy_(self.logits)
        terms = Terms(0.0, 0.0, soft_cap)
        arguments = (logits, self.bias, self.labels, weights, terms, gradient, losses, log_normalizers)
        softmax_epilogue(*arguments, sampling, tokens, impl)
        return tokens.cpu()

    def perturbed(self, temperature=1.0, soft_cap=None):
        """Scores plus noise in fp64, straight from the description."""
        scores = self.logits.cpu().double().numpy() + self.bias.cpu().double().numpy()
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        rows, vocabulary = scores.shape
        for row in range(rows):
            sample = int(self.segments[row])
            wide = int(self.sample_ids[sample])
            counter = np.array([int(self.positions[row])])
            key = philox(SEED, STREAM, counter, wide & 0xFFFFFFFF, wide >> 32, int(self.visits[sample]))[:2]
            words = np.stack(philox_of_key(*(int(word[0]) for word in key), np.arange(-(-vocabulary // 4)))).T.reshape(
                -1
            )[:vocabulary]
            scores[row] = scores[row] / temperature - np.log(-np.log1p(-(words + 0.5) / 2.0**32))
        return scores


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    ("temperature", "soft_cap", "vocabulary"), [(1.0, None, 1013), (0.5, 3.0, 2050), (2.0, None, 3)]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_token_is_the_largest_perturbed_score(place, impl, temperature, soft_cap, vocabulary, gradient):
    rows = Rows(place, vocabulary=vocabulary)
    tokens = rows.sample(impl, temperature, soft_cap, gradient)
    exact = rows.perturbed(temperature, soft_cap)
    assert tokens[1] == -1
    for row in (row for row in range(len(tokens)) if row != 1):
        best = exact[row].max()
        assert best - exact[row, tokens[row]] < 8 * np.finfo(np.float32).eps * (1 + abs(best))
    clear = np.diff(np.sort(exact, 1)[:, -2:], axis=1)[:, 0] > 1e-4
    clear[1] = False
    assert np.array_equal(tokens.numpy()[clear], exact.argmax(1)[clear]) and clear.sum() > 15


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(place, impl, temperature):
    draws = 200 if impl == "triton" and place.device == "cpu" else 20000  # interpreted, a row takes 20 ms
    rows = Rows(place, rows=draws, vocabulary=9)
    rows.logits[:] = torch.linspace(-0.5, 0.5, 9).to(rows.logits)
    rows.bias.zero_()
    tokens = rows.sample(impl, temperature)
    expected = (rows.logits[0].cpu().double() / temperature).softmax(0).numpy()
    counts = np.bincount(np.delete(tokens.numpy(), 1), minlength=9)
    assert stats.chisquare(counts, expected * (draws - 1)).pvalue > 1e-3
    if draws < 20000:
        return
    neighbours = np.histogram2d(tokens[2:-1], tokens[3:], bins=range(10))[0]
    assert stats.chisquare(neighbours.ravel(), np.outer(expected, expected).ravel() * neighbours.sum()).pvalue > 1e-3


@jit
def gumbel_kernel(words_ptr, noise_ptr, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + place, mask=place < count, other=0).to(tl.uint32)
    tl.store(noise_ptr + place, gumbel_of(words), mask=place < count)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_noise_is_exact_at_both_ends_of_the_words_and_falls_between(place, impl):
    edge = 2**32 // 16  # where the series ends
    ends = [0, 1, 2, 3, 100, 2**16, edge - 2, edge - 1, edge, edge + 1, 2**31, 2**32 - 2**16, *range(2**32 - 4, 2**32)]
    words = torch.tensor(sorted({*ends, *range(5, 2**32, 2**22 + 1)}), device=place.device)
    noise = torch.full(words.shape, torch.nan, device=place.device)
    if impl == "triton":
        gumbel_kernel[(1,)](words, noise, len(words), BLOCK=2048)
    else:
        noise = gumbel(words)
    share = (words.cpu().double() + 0.5) / 2.0**32
    exact = -(-torch.log1p(-share)).log()
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert torch.allclose(noise.cpu().double(), exact, rtol=0, atol=3e-6)
    assert (noise.diff() < 1e-6).all()  # but for the last digit, where the series ends
    assert 22.8 < noise[0] < 22.9 and -3.14 < noise[-1] < -3.12
    assert noise[0] - noise[1] > 1 and noise[-4] - noise[-1] > 0.01


@pytest.fixture
def batch(place):
    generator = torch.Generator().manual_seed(1)
    tokens, width, vocabulary = 40, 16, 211
    tensors = {
        "hidden": torch.randn(tokens, width, generator=generator).to(place.dtype),
        "weight": torch.randn(vocabulary, width, generator=generator).to(place.dtype),
        "bias": torch.randn(vocabulary, generator=generator).to(place.dtype),
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "segments": torch.repeat_interleave(torch.tensor([-1, 0, 1, 2]), torch.tensor([2, 20, 11, 7])),
        "positions": torch.cat([torch.zeros(2), *(torch.arange(n) for n in (20, 11, 7))]).long(),
        "sample_ids": torch.tensor([5, 2**33, 5]),
        "visits": torch.tensor([0, 3, 1]),
    }
    tensors["targets"][::3] = IGNORED
    return {name: tensor.to(place.device) for name, tensor in tensors.items()}


def run(batch, samples=3, **options):
    return linear_cross_entropy_and_sample(**batch, samples=samples, seed=SEED, stream=STREAM, **options)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tokens_stand_at_the_targets_and_the_loss_is_the_linear_cross_entropy(batch, impl):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 5.0, "impl": impl, "chunk_rows": 8}
    loss, tokens = run(batch, **options)
    is_target = (batch["targets"] != IGNORED) & (batch["segments"] >= 0)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens == -1, ~is_target) and (tokens[is_target] < 211).all()
    names = ("hidden", "weight", "targets", "segments")
    plain = linear_cross_entropy(*(batch[name] for name in names), 3, bias=batch["bias"], **options)
    torch.testing.assert_close(loss[:5], plain[:5])
    assert loss.squared_norms is None


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_token_depends_on_neither_chunks_nor_room_nor_packing(batch, impl):
    expected = run(batch, impl=impl).tokens
    for options in ({"chunk_rows": 3}, {"capacity": 40}, {"chunk_rows": 7, "capacity": 30}):
        assert torch.equal(run(batch, impl=impl, **options).tokens, expected)
    order = torch.cat([torch.arange(33, 40), torch.arange(2), torch.arange(2, 22), torch.arange(22, 33)])
    per_sample = torch.tensor([2, 0, 1])
    moved = {name: tensor[order.to(tensor.device)] for name, tensor in batch.items() if len(tensor) == 40}
    renamed = torch.tensor([1, 2, 0, -1], device=order.device).to(moved["segments"].device)[moved["segments"]]
    ids = {name: batch[name][per_sample.to(batch[name].device)] for name in ("sample_ids", "visits")}
    tokens = run({**batch, **moved, **ids, "segments": renamed}, impl=impl).tokens
    assert torch.equal(tokens, expected[order.to(expected.device)])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_another_seed_visit_or_position_draws_anew(batch, impl):
    batch = {**batch, "hidden": batch["hidden"] * 0.1}
    expected = run(batch, impl=impl).tokens
    for change in (
        {"visits": batch["visits"] + 1},
        {"sample_ids": batch["sample_ids"] + 2**32},
        {"positions": batch["positions"] + 1},
    ):
        tokens = run({**batch, **change}, impl=impl).tokens
        assert (tokens != expected)[tokens >= 0].float().mean() > 0.5
    arguments = {**batch, "samples": 3, "impl": impl, "stream": STREAM}
    assert not torch.equal(linear_cross_entropy_and_sample(**arguments, seed=SEED + 1).tokens, expected)
    assert torch.equal(linear_cross_entropy_and_sample(**arguments, seed=SEED + 2**32).tokens, expected)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_generator_that_is_sure_samples_its_argmax(batch, impl):
    logits = batch["hidden"].float() @ batch["weight"].float().t() + batch["bias"].float()
    tokens = run(batch, temperature=1e-3, impl=impl).tokens
    assert torch.equal(tokens[tokens >= 0], logits.argmax(1)[tokens >= 0])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_impossible_entry_is_never_sampled_and_broken_ones_never_leave_the_vocabulary(batch, impl):
    bias = torch.full((211,), -torch.inf, device=batch["bias"].device, dtype=batch["bias"].dtype)
    bias[[4, 150]] = 0
    tokens = run({**batch, "bias": bias}, temperature=100.0, impl=impl).tokens
    assert set(tokens.tolist()) == {-1, 4, 150}
    bias.zero_()[9] = torch.nan
    tokens = run({**batch, "bias": bias}, impl=impl).tokens
    assert 9 not in tokens and len(tokens.unique()) > 5
    tokens = run({**batch, "hidden": batch["hidden"] * torch.nan}, impl=impl).tokens
    assert set(tokens.tolist()) == {-1, 0}


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_tie_goes_to_the_lowest_entry(place, impl):
    rows = Rows(place, rows=3, vocabulary=5000)
    rows.bias[[276, 277, *range(300, 5000, 1024), 4372]] = torch.inf  # in one block of the kernel's and in others
    assert rows.sample(impl).tolist() == [276, -1, 276]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_nothing_to_sample_is_fine(batch, impl):
    nothing = {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}
    for capacity in (None, 0, 5):
        loss, tokens = run(nothing, capacity=capacity, impl=impl)
        assert loss.total == 0 and (tokens == -1).all()
    empty = {name: x if name in ("weight", "bias") else x[:0] for name, x in batch.items()}
    assert run(empty, samples=0, impl=impl).tokens.shape == (0,)


def test_arguments_without_meaning_are_refused(batch):
    with pytest.raises(ValueError, match="temperature"):
        run(batch, temperature=0.0)
    with pytest.raises(ValueError, match="visits"):
        run({**batch, "visits": batch["visits"][1:]})


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_it_compiles_into_one_graph(batch, impl):
    def step(hidden):
        loss, tokens = run({**batch, "hidden": hidden}, impl=impl)
        return loss.total, tokens

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = batch["hidden"].clone().requires_grad_()
        total, tokens = function(hidden)
        results.append((total.detach(), tokens, *torch.autograd.grad(total, hidden)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("gradient", [False, True])
def test_sampling_keeps_nothing_of_the_vocabularys_size_a_target(gradient):
    """What it needs besides the logits is that of a block of rows in the twin, however many targets there are."""
    bench._script()  # its modules can be imported then
    clock, vocabulary, width = importlib.import_module("timing").Clock("cpu", 0.01), 8197, 8

    def peak(targets: int, samples: bool) -> int:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(targets, width, generator=generator).requires_grad_(gradient)
        weight = torch.randn(vocabulary, width, generator=generator).requires_grad_(gradient)
        places = torch.arange(targets)
        of_rows, of_samples = (places, torch.zeros_like(places), 1), (places, torch.tensor([5]), torch.tensor([0]))
        arguments = (hidden, weight, *of_rows, *(of_samples if samples else ()))
        keys = {"seed": SEED, "stream": STREAM} if samples else {}
        function = linear_cross_entropy_and_sample if samples else linear_cross_entropy
        return clock.peak_bytes(lambda: function(*arguments, impl="torch", **keys))

    logits = 4 * vocabulary
    bare, sampled = (np.array([peak(targets, samples) for targets in (128, 384)]) for samples in (False, True))
    assert (bare > [128 * logits, 384 * logits]).all()
    more = sampled - bare
    assert more.max() < 128 * logits and more[1] - more[0] < logits
