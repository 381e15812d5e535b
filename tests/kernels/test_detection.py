import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_objectives import detection
from fused_objectives.backend import INTERPRETED
from fused_objectives.detection import WIDEST, _detection, _hidden_gradient, detection_loss
from fused_objectives.targets import IGNORED
from tests.kernels.accuracy import assert_as_accurate

IMPLEMENTATIONS = ("triton", "torch") if INTERPRETED else ("torch",)
LENGTHS = (7, 0, 1, 30, 12)
INPUTS = ("hidden", "weight", "bias")


def make(lengths=LENGTHS, width=24, device="cpu", dtype=torch.float32, scale=1.0, seed=0):
    """Return arguments: padding before, between and behind samples, some labels ignored, poison where none may look."""
    generator = torch.Generator().manual_seed(seed)
    segments = [-1]
    for sample, length in enumerate(lengths):
        segments += [sample] * length + [-1] * (sample % 2)
    segments = torch.tensor(segments)
    tokens, samples = len(segments), len(lengths)
    labels = torch.randint(2, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORED
    hidden = scale * torch.randn(tokens, width, generator=generator)
    hidden[(segments < 0) | (labels == IGNORED)] = torch.nan
    arguments = {
        "hidden": hidden.to(dtype),
        "weight": torch.randn(width, generator=generator).to(dtype),
        "labels": labels,
        "segments": segments,
        "bias": torch.randn(1, generator=generator).to(dtype),
        "sample_weights": torch.tensor([0.5, 2.0, 1.5, 0.0, 3.0, 1.0])[:samples],
        "token_weights": torch.rand(tokens, generator=generator).round(decimals=1),
    }
    return {name: value.to(device) for name, value in arguments.items()} | {"samples": samples}


def plain(arguments, dtype=None):
    """Do the same by torch's functions in ``dtype`` (None: the inputs'); return results and gradients."""
    inputs = [arguments[name] for name in INPUTS]
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in inputs
    )
    labels, segments, samples = (arguments[name] for name in ("labels", "segments", "samples"))
    places = ((labels != IGNORED) & (segments >= 0)).nonzero()[:, 0]
    owners = segments[places]
    chosen = F.linear(hidden[places], weight[None], bias)[:, 0]
    losses = F.binary_cross_entropy_with_logits(chosen, labels[places].to(chosen.dtype), reduction="none")
    weighted = losses
    if arguments.get("token_weights") is not None:
        weighted = weighted * arguments["token_weights"][places].to(losses.dtype)
    total = weighted
    if arguments.get("sample_weights") is not None:
        total = weighted * arguments["sample_weights"][owners].to(losses.dtype)
    total = total.sum()
    total.backward()
    return {
        "total": total.detach(),
        "sums": losses.new_zeros(samples).index_add(0, owners, weighted).detach(),
        "counts": torch.bincount(owners, minlength=samples),
        "per_token": losses.new_zeros(len(labels)).index_put((places,), losses).detach(),
        "logits": losses.new_zeros(len(labels)).index_put((places,), chosen).detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "bias": None if bias is None else bias.grad,
    }


def ours(arguments, impl, upstream=None):
    """Run the op and its backward pass; return results and gradients."""
    arguments = dict(arguments)
    for name in INPUTS:
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().requires_grad_()
    result = detection_loss(**arguments, impl=impl)
    result.total.backward(upstream)
    gradients = {name: None if arguments[name] is None else arguments[name].grad for name in INPUTS}
    return {name: value.detach() for name, value in result._asdict().items()} | gradients


def assert_right(arguments, impl):
    found, expected, exact = ours(arguments, impl), plain(arguments), plain(arguments, torch.float64)
    assert torch.equal(found["counts"], exact["counts"])
    for name in INPUTS:
        assert arguments[name] is found[name] is None or found[name].dtype == arguments[name].dtype
    # Single numbers together with others of their kind: plain torch's error of one number can be zero by chance.
    for names in (["total", "sums"], ["per_token"], ["logits"], ["hidden"], ["weight", "bias"]):
        values = [
            torch.cat([results[name].flatten() for name in names if results[name] is not None])
            for results in (found, expected, exact)
        ]
        assert_as_accurate(*values)
    ignored = (arguments["labels"] == IGNORED) | (arguments["segments"] < 0)
    assert not found["per_token"][ignored].any()
    assert not found["logits"][ignored].any()
    assert not found["hidden"][ignored].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("width", [1, 24, 257, 768])
def test_losses_and_gradients_are_those_of_torchs_functions(place, impl, width):
    assert_right(make(width=width, device=place.device, dtype=place.dtype), impl)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("given", itertools.product([False, True], repeat=3))
def test_whatever_is_not_given_counts_as_one_and_no_bias_as_zero(place, impl, given):
    arguments = make(device=place.device, dtype=place.dtype)
    for name, present in zip(("bias", "sample_weights", "token_weights"), given, strict=True):
        arguments[name] = arguments[name] if present else None
    assert_right(arguments, impl)


def test_kernels_take_the_widest_rows_and_refuse_wider(place):
    arguments = make((3, 2), WIDEST, place.device, place.dtype)
    assert_right(arguments, "triton")
    wider = make((3, 2), WIDEST + 1, place.device, place.dtype)
    assert_right(wider, "torch")
    with pytest.raises(ValueError, match="width"):
        detection_loss(**wider, impl="triton")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_confident_logits_overflow_nothing_and_keep_their_small_losses(place, impl):
    hidden = torch.tensor([-1e4, -80.0, -15.0, -8.0, 0.0, 8.0, 15.0, 80.0, 1e4]).repeat(2)[:, None]
    arguments = {
        "hidden": hidden.to(place.device, place.dtype),
        "weight": torch.ones(1, device=place.device, dtype=place.dtype),
        "labels": torch.tensor([0] * 9 + [1] * 9, device=place.device),
        "segments": torch.zeros(18, dtype=torch.int64, device=place.device),
        "samples": 1,
        "bias": None,
    }
    assert_right(arguments, impl)
    exact = plain(arguments, torch.float64)
    found = ours(arguments, impl)
    digits = 1e-6 if place.device == "cpu" else 4e-6  # a GPU's fast exponential loses some far from 0
    for name, tolerance in (("per_token", digits), ("hidden", digits if place.dtype == torch.float32 else 1e-2)):
        visible = exact[name].abs() > 1e-30  # fp32 holds no exp(-80) ulp for ulp on a GPU that flushes subnormals
        ratio = (found[name].double() / exact[name])[visible]
        assert visible.sum() > 10 and (ratio - 1).abs().max() < tolerance, name


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_if_all_is_ignored_loss_and_gradients_are_zero(place, impl):
    arguments = make(device=place.device, dtype=place.dtype)
    hidden, labels, segments = arguments["hidden"], arguments["labels"], arguments["segments"]
    everywhere = torch.full_like(labels, IGNORED), segments
    nowhere = torch.ones_like(labels), torch.full_like(segments, -1)
    for arguments["labels"], arguments["segments"] in (everywhere, nowhere):
        for value in ours(arguments, impl).values():
            assert not value.any()
    no_samples = {"samples": 0, "sample_weights": arguments["sample_weights"][:0]}
    found = ours(arguments | no_samples, impl)
    assert found["sums"].shape == found["counts"].shape == (0,)
    assert found["hidden"].shape == hidden.shape and not found["hidden"].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 24), (0, 0)])
def test_without_tokens_there_is_nothing(place, impl, tokens, width):
    arguments = make((), width, place.device, place.dtype)
    tokenwise = ("hidden", "labels", "segments", "token_weights")
    arguments |= {name: arguments[name][:tokens] for name in tokenwise}
    arguments |= {"samples": 2, "sample_weights": None}
    found = ours(arguments, impl)
    assert found["total"] == 0 and found["sums"].tolist() == [0, 0] and found["counts"].tolist() == [0, 0]
    assert found["hidden"].shape == (tokens, width)
    assert found["weight"].shape == (width,) and not found["weight"].any() and not found["bias"].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_strides_of_inputs_do_not_matter(place, impl):
    arguments = make(width=48, device=place.device, dtype=place.dtype)
    arguments["token_weights"].fill_(0.7)
    arguments["sample_weights"].fill_(1.3)
    expected = ours(arguments, impl)
    poison = torch.full_like(arguments["hidden"], torch.nan)
    strided = {
        "hidden": [
            arguments["hidden"].t().contiguous().t(),
            torch.cat([poison, arguments["hidden"], poison], 1)[:, 48:96],
            torch.stack([arguments["hidden"], poison], 2)[:, :, 0],
        ],
        "weight": [torch.stack([arguments["weight"], poison[0]], 1)[:, 0]],
        "labels": [torch.stack([arguments["labels"], 1 - arguments["labels"]], 1)[:, 0]],
        "segments": [torch.stack([arguments["segments"]] * 2, 1)[:, 0]],
        "token_weights": [torch.full((1,), 0.7, device=place.device).expand(len(poison))],
        "sample_weights": [torch.full((), 1.3, device=place.device).expand(len(LENGTHS))],
    }
    for name, choices in strided.items():
        for choice in choices:
            assert not choice.is_contiguous()
            for key, value in ours(arguments | {name: choice}, impl).items():
                assert torch.equal(value, expected[key]), (name, key)
    row = torch.ones(1, 48, device=place.device, dtype=place.dtype)
    repeated = {"hidden": row.expand(len(poison), -1)}, {"hidden": row.repeat(len(poison), 1)}
    expanded, contiguous = (ours(arguments | hidden, impl) for hidden in repeated)
    assert all(torch.equal(expanded[key], contiguous[key]) for key in expanded)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gradients_scale_with_the_upstream_gradient_also_an_expanded_one(place, impl):
    arguments = make(device=place.device, dtype=place.dtype)
    once = ours(arguments, impl)
    twice = ours(arguments, impl, torch.full((1,), 2.0, device=place.device).expand(3)[1])
    for name in INPUTS:
        assert torch.equal(twice[name], 2 * once[name])
    hidden = arguments["hidden"].clone().requires_grad_()
    detection_loss(**arguments | {"hidden": hidden}, impl=impl).total.expand(2, 3).sum().backward()
    assert torch.allclose(hidden.grad, 6 * once["hidden"], rtol=1e-2 if place.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_total_is_differentiable_and_each_input_alone_gets_its_gradient(place, impl):
    arguments = make(device=place.device, dtype=place.dtype)
    everything = ours(arguments, impl)
    for name in INPUTS:
        alone = arguments[name].clone().requires_grad_()
        result = detection_loss(**arguments | {name: alone}, impl=impl)
        assert [value.requires_grad for value in result] == [True, False, False, False, False]
        result.total.backward()
        assert torch.equal(alone.grad, everything[name])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_losses_are_the_same_bits_whether_gradients_are_wanted_or_not(place, impl):
    arguments = make(device=place.device, dtype=place.dtype)
    expected = detection_loss(**arguments, impl=impl)
    assert not expected.total.requires_grad
    arguments["hidden"].requires_grad_()
    wanted = detection_loss(**arguments, impl=impl)
    with torch.no_grad():
        unwanted = detection_loss(**arguments, impl=impl)
    assert wanted.total.requires_grad and not unwanted.total.requires_grad
    for result in (wanted, unwanted):
        assert all(torch.equal(value, other) for value, other in zip(result, expected, strict=True))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_gradients_that_are_wanted_are_computed(place, impl, monkeypatch):
    arguments = make(device=place.device, dtype=place.dtype)
    *_, slopes, weight_gradient, bias_gradient = _detection(*operands(arguments), False, impl)
    assert slopes.numel() == weight_gradient.numel() == bias_gradient.numel() == 0
    asked = []
    monkeypatch.setattr(detection, "_detection", lambda *args: asked.append(args[-2]) or _detection(*args))
    monkeypatch.setattr(detection, "_hidden_gradient", None)
    detection_loss(**arguments, impl=impl)
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        detection_loss(**arguments, impl=impl)
    detection_loss(**arguments, impl=impl).total.backward()
    assert asked == [False, False, True]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_autocast_changes_nothing(place, impl):
    arguments = make(device=place.device, dtype=place.dtype)
    expected = ours(arguments, impl)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        found = ours(arguments, impl)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inputs_of_different_dtypes_mix(place):
    arguments = make(device=place.device, dtype=place.dtype)
    for name in ("weight", "bias", "sample_weights", "token_weights"):
        for dtype in (torch.float32, torch.float64):
            mixed = arguments | {name: arguments[name].to(dtype)}
            found, exact = ours(mixed, "triton"), plain({**mixed, "hidden": mixed["hidden"].double()}, torch.float64)
            assert found["weight"].dtype == mixed["weight"].dtype and found["bias"].dtype == mixed["bias"].dtype
            assert torch.allclose(found["total"].double(), exact["total"])
            assert torch.allclose(found["hidden"].double(), exact["hidden"], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 300])
def test_the_number_of_programs_does_not_matter(place, monkeypatch, programs):
    monkeypatch.setattr(detection, "_programs", lambda columns, device: programs)
    assert_right(make((1300,), 3, place.device, place.dtype), "triton")


def poisoned(function, allocated):
    def allocate(*args, **options):
        memory = function(*args, **options)
        if memory.is_floating_point():
            allocated.append(memory.fill_(torch.nan))
        return memory

    return allocate


@pytest.mark.parametrize("gradients", [True, False])
def test_all_memory_is_written_also_what_is_none_of_the_results(place, monkeypatch, gradients):
    """Then a tool that looks for memory that is read before it is written has nothing to report."""
    arguments = make(width=300, device=place.device, dtype=place.dtype)
    arguments["hidden"].nan_to_num_()
    run = ours if gradients else torch.no_grad()(lambda given, impl: detection_loss(**given, impl=impl)._asdict())
    expected, allocated = run(arguments, "triton"), []
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), allocated))
    found = run(arguments, "triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(allocated) > 3 and not any(memory.isnan().any() for memory in allocated)


def test_runs_repeat_to_the_bit(place):
    arguments = make((500,), device=place.device, dtype=place.dtype)
    first, second = ours(arguments, "triton"), ours(arguments, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shapes_that_disagree_are_refused_by_name():
    arguments = make()
    wrong = {
        "weight": arguments["weight"][None],
        "labels": arguments["labels"][1:],
        "segments": arguments["segments"][:, None],
        "bias": torch.zeros(()),
        "sample_weights": torch.ones(9),
        "token_weights": torch.ones(1),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            detection_loss(**arguments | {name: value})


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_a_label_that_is_neither_0_nor_1_poisons_its_token_and_the_gradients(place, impl, label):
    arguments = make(device=place.device, dtype=place.dtype)
    for weights in (None, torch.zeros_like(arguments["token_weights"])):
        arguments["token_weights"] = weights
        expected = ours(arguments, impl)
        token = int((arguments["labels"] == 1).nonzero()[-1])
        sample = int(arguments["segments"][token])
        labels = arguments["labels"].clone()
        labels[token] = label
        found = ours(arguments | {"labels": labels}, impl)
        assert torch.equal(found["counts"], expected["counts"]) and torch.equal(found["logits"], expected["logits"])
        assert found["total"].isnan()
        assert found["per_token"].isnan().nonzero().tolist() == [[token]]
        assert found["sums"].isnan().nonzero().tolist() == [[sample]]
        assert found["hidden"].isnan().any(1).nonzero().tolist() == [[token]]
        assert found["weight"].isnan().all() and found["bias"].isnan().all()


def operands(arguments):
    names = ("hidden", "weight", "bias", "labels", "segments", "samples", "sample_weights", "token_weights")
    return tuple(arguments[name] for name in names)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ops_pass_torchs_checks(impl):
    arguments = make()
    for gradients in (False, True):
        for absent in ((), ("bias", "sample_weights", "token_weights")):
            given = arguments | dict.fromkeys(absent)
            for name in INPUTS:
                if given[name] is not None:
                    given[name] = given[name].detach().nan_to_num().requires_grad_(gradients)
            torch.library.opcheck(_detection, (*operands(given), gradients, impl))
    upstream, slopes = torch.tensor(2.0), torch.randn(9)
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(_hidden_gradient, (upstream, slopes, arguments["weight"], dtype, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_compiled_op_gives_the_same_bits(impl):
    arguments = make()
    expected = ours(arguments, impl)
    inputs = {name: arguments[name].clone().requires_grad_() for name in INPUTS}
    compiled = torch.compile(lambda given: detection_loss(**given, impl=impl), fullgraph=True, backend="aot_eager")
    result = compiled(arguments | inputs)
    result.total.backward()
    for name, value in result._asdict().items():
        assert torch.equal(value, expected[name])
    for name in INPUTS:
        assert torch.equal(inputs[name].grad, expected[name])
