"""Benchmarks of the corruptions: what happens to tokens before a model sees them."""

import torch
from cases import (
    EMPTY_LAUNCH,
    MASK,
    SEED,
    SPECIAL,
    STREAM,
    Benchmark,
    Provider,
    Scale,
    Shape,
    SimpleNamespace,
    Step,
    Work,
    compiled,
    generator,
    layout,
    twin,
)

VOCABULARY = 30522
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
SPAN_LENGTHS = tuple(0.2 * 0.8**k / (1 - 0.8**10) for k in range(10))
"""SpanBERT's: geometric with p = 0.2, up to 10 (arXiv 1907.10529)."""
_INT = 8  # bytes


def corruption_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return rows of samples, and for whole words the ordinal of each token's word (1.5 tokens a word)."""
    inputs = layout(device, shape["tokens"], shape["length"], VOCABULARY)
    inputs.shape = shape
    inputs.rate = shape["rate"]
    inputs.draws = {"seed": SEED, "stream": STREAM}
    inputs.whose = (inputs.segments, inputs.positions, inputs.sample_ids, inputs.visits)
    special = inputs.tokens < SPECIAL
    inputs.special = special
    inputs.words = torch.where(special, -1, inputs.positions * 2 // 3)
    return inputs


def mask_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.masking import mask_tokens

        policy = inputs.shape["policy"]
        options = {
            "is_ordinary": inputs.is_ordinary,
            "ordinary_ids": inputs.ordinary_ids,
            "mask_id": MASK,
            "rate": inputs.rate,
            "mask_share": MASK_SHARE,
            "random_share": RANDOM_SHARE,
            "units": inputs.words if policy == "word" else None,
            "span_lengths": SPAN_LENGTHS if policy == "span" else (1.0,),
            "impl": impl,
            **inputs.draws,
        }
        return lambda: mask_tokens(inputs.tokens, *inputs.whose, **options)

    return prepare


def _plain_mask(tokens: torch.Tensor, special: torch.Tensor, ordinary: int, rate: float):
    """What one writes with torch alone, without making the host wait."""
    chosen = (torch.rand(tokens.shape, device=tokens.device) < rate) & ~special
    kind = torch.rand(tokens.shape, device=tokens.device)
    random = torch.randint(SPECIAL, SPECIAL + ordinary, tokens.shape, device=tokens.device)
    corrupted = torch.where(kind < MASK_SHARE, MASK, torch.where(kind < MASK_SHARE + RANDOM_SHARE, random, tokens))
    return torch.where(chosen, corrupted, tokens), torch.where(chosen, tokens, -100)


def mask_with_torch(inputs: SimpleNamespace, mode: str) -> Step | None:
    if inputs.shape["policy"] != "token":
        return None
    return lambda: _plain_mask(inputs.tokens, inputs.special, len(inputs.ordinary_ids), inputs.rate)


def mask_with_compile(inputs: SimpleNamespace, mode: str) -> Step | None:
    if inputs.shape["policy"] != "token":
        return None
    mask = compiled(_plain_mask)
    return lambda: mask(inputs.tokens, inputs.special, len(inputs.ordinary_ids), inputs.rate)


def mask_with_transformers(device: str | None):
    """transformers' collator: its masking of tensors of the inputs' device, or of the CPU as in a data loader."""

    def prepare(inputs: SimpleNamespace, mode: str) -> Step | None:
        if inputs.shape["policy"] != "token":
            return None
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(SPECIAL, VOCABULARY))]
        words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=inputs.rate)
        place = device or inputs.tokens.device.type
        tokens, special = inputs.tokens.to(place, copy=True), inputs.special.to(place)  # it changes them in place

        def step():
            with torch.device(place):
                return collator.torch_mask_tokens(tokens, special)

        return step

    return prepare


def swap_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.swapping import swap_tokens

        options = {"is_ordinary": inputs.is_ordinary, "rate": inputs.rate, "impl": impl, **inputs.draws}
        return lambda: swap_tokens(inputs.tokens, *inputs.whose, **options)

    return prepare


def _inserted_capacity(shape: Shape) -> int:
    row = max(shape["length"], min(2048, shape["tokens"]))
    return 128 * round(row * (1 + 1.1 * shape["rate"]) / 128 + 0.5)


def insert_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.editing import insert_tokens

        options = {
            "rate": inputs.rate,
            "ordinary_ids": inputs.ordinary_ids,
            "insert_id": None,
            "pad_id": 0,
            "capacity": _inserted_capacity(inputs.shape),
            "impl": impl,
            **inputs.draws,
        }
        return lambda: insert_tokens(inputs.tokens, *inputs.whose, **options)

    return prepare


def delete_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.editing import delete_tokens

        options = {"rate": inputs.rate, "is_ordinary": inputs.is_ordinary, "pad_id": 0, "capacity": None, "impl": impl}
        return lambda: delete_tokens(inputs.tokens, *inputs.whose, **options, **inputs.draws)

    return prepare


def replacing_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return rows of samples with a fraction ``rate`` of slots, and a sampled token for each slot."""
    from fused_objectives.targets import compact

    inputs = layout(device, shape["tokens"], shape["length"], VOCABULARY)
    inputs.shape = shape
    chosen = torch.rand(shape["tokens"], device=device, generator=generator(device)) < shape["rate"]
    targets = compact(chosen, int(chosen.sum()))
    inputs.slots = targets.slots.view_as(inputs.tokens)
    inputs.sampled = inputs.tokens.flatten()[targets.places].roll(1)
    return inputs


def replace_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.replacing import replace_tokens

        return lambda: replace_tokens(inputs.tokens, inputs.segments, inputs.slots, inputs.sampled, impl=impl)

    return prepare


def _plain_replace(tokens, segments, slots, sampled):
    replaced = torch.where(slots < 0, tokens, sampled[slots.clamp(min=0)])
    return replaced, torch.where(segments < 0, -100, (replaced != tokens).long())


def replace_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    return lambda: _plain_replace(inputs.tokens, inputs.segments, inputs.slots, inputs.sampled)


def replace_with_compile(inputs: SimpleNamespace, mode: str) -> Step:
    replace = compiled(_plain_replace)
    return lambda: replace(inputs.tokens, inputs.segments, inputs.slots, inputs.sampled)


def both(prepare, waits: bool = True) -> tuple[Provider, Provider]:
    """Return our op as it is used, and on a GPU its plain-torch twin there."""
    return Provider("medley", prepare("auto")), twin(prepare("torch"), waits)


def moved(arrays: int):
    """Return the work of reading and writing that many int64 arrays of one element a token."""
    return lambda shape, mode, size: Work(bytes=arrays * _INT * shape["tokens"])


def _swept(scale: Scale) -> list[Shape]:
    return scale.sweep(scale.base("tokens", "length", "rate"))


def _masked(scale: Scale) -> list[Shape]:
    base = scale.base("tokens", "length", "rate", policy="token")
    return [*scale.sweep(base), base | {"policy": "word"}, base | {"policy": "span"}]


def inserted_work(shape: Shape, mode: str, size: int) -> Work:
    rows = shape["tokens"] // max(shape["length"], min(2048, shape["tokens"]))
    return Work(bytes=_INT * (3 * shape["tokens"] + 5 * rows * _inserted_capacity(shape)))


BENCHMARKS = [
    Benchmark(
        "mask",
        "hide tokens for masked language modelling: single tokens, whole words, spans",
        ("masking.mask_tokens",),
        _masked,
        corruption_inputs,
        moved(5),
        [
            *both(mask_with),
            Provider("torch", mask_with_torch),
            Provider("torch.compile", mask_with_compile),
            Provider("transformers", mask_with_transformers(None), in_graph=False),
            Provider("transformers on the CPU", mask_with_transformers("cpu"), gpu_only=True, in_graph=False),
            EMPTY_LAUNCH,
        ],
    ),
    Benchmark(
        "swap",
        "permute some tokens of each sample",
        ("swapping.swap_tokens",),
        _swept,
        corruption_inputs,
        moved(5),
        [*both(swap_with), EMPTY_LAUNCH],
    ),
    Benchmark(
        "insert",
        "insert tokens, and lay the samples out anew",
        ("editing.insert_tokens",),
        _swept,
        corruption_inputs,
        inserted_work,
        [*both(insert_with), EMPTY_LAUNCH],
    ),
    Benchmark(
        "delete",
        "delete tokens, and lay the samples out anew",
        ("editing.delete_tokens",),
        _swept,
        corruption_inputs,
        moved(8),
        [*both(delete_with), EMPTY_LAUNCH],
    ),
    Benchmark(
        "replace",
        "put a generator's tokens in their places",
        ("replacing.replace_tokens",),
        _swept,
        replacing_inputs,
        moved(5),
        [
            *both(replace_with, waits=False),
            Provider("torch", replace_with_torch),
            Provider("torch.compile", replace_with_compile),
            EMPTY_LAUNCH,
        ],
    ),
]
