"""The usual way with transformers, which the benchmarks measure Medley against: one sample a row, padded."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling
from transformers.trainer_pt_utils import LengthGroupedSampler

from pretrain.data.store import Store
from pretrain.model.vocabulary import Vocabulary


@dataclass(frozen=True)
class Measurement:
    """Timed training steps: real tokens, seconds on the clock, seconds of all the process's threads, the losses."""

    tokens: int
    seconds: float
    cpu_seconds: float
    losses: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_microseconds_per_token(self) -> float:
        return self.cpu_seconds / self.tokens * 1e6


class Stopwatch:
    """Counts both kinds of seconds from ``start`` to ``stop``; waits for the GPU at both."""

    def __init__(self, device: str):
        self.device = device

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> tuple[float, float]:
        return tuple(now - began for now, began in zip(self._now(), self._began, strict=True))

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Settings:
    """What both sides train alike. ``samples`` a step; ``warmup`` steps come before the ``steps`` that are timed."""

    samples: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    gradient_clipping: float
    bf16: bool
    device: str


def examples(store: Store, vocabulary: Vocabulary) -> list[dict]:
    """Return all samples as a tokenizer would: lists of ids, and which of them are special, so that the collator does
    not look them up again in every batch."""
    special = np.zeros(vocabulary.size, np.int64)
    special[vocabulary.special_ids] = 1
    samples = (store[index] for index in range(len(store)))
    return [
        {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "special_tokens_mask": special[ids].tolist(),
        }
        for ids in samples
    ]


def collator(tokenizer, multiple: int | None = None) -> DataCollatorForLanguageModeling:
    """Return transformers' masking collator with its defaults: dynamic padding, 15 % masked, 80/10/10."""
    return DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=multiple)


def build_model(config, weights: dict[str, torch.Tensor], device: str):
    """Return transformers' own masked-language model with given weights."""
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.load_state_dict(weights)
    return model.to(device)


def has_trainer() -> bool:
    """Whether transformers' ``Trainer`` can be used: it needs accelerate."""
    from transformers.utils import is_accelerate_available

    return is_accelerate_available()


class GroupedByLength(Sampler):
    """Batches of samples of like length as transformers groups them, in random order.

    Its own order begins with the longest and falls over fifty batches, so that a few steps would not show the average.
    """

    def __init__(self, lengths: list[int], samples: int):
        self.lengths, self.samples = lengths, samples

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        indices = torch.tensor(list(LengthGroupedSampler(self.samples, lengths=self.lengths)))
        batches = indices.split(self.samples)
        return iter(torch.cat([batches[number] for number in torch.randperm(len(batches))]).tolist())


def run_trainer(model, dataset, tokenizer, settings: Settings, lengths: list[int] | None, folder: str) -> Measurement:
    """Train with transformers' ``Trainer``, logging and saving off, and time the steps after the warm-up.

    ``lengths`` of the samples are given if batches are to hold samples of like length.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == settings.warmup:
                watch.start()
            elif state.global_step == args.max_steps:
                seconds.extend(watch.stop())

    class Counting(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            if lengths:
                return GroupedByLength(lengths, settings.samples)
            return super()._get_train_sampler(*args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            tokens.append(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            losses.append(loss.detach())
            return loss

    tokens, losses, seconds, watch = [], [], [], Stopwatch(settings.device)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=settings.warmup + settings.steps,
        per_device_train_batch_size=settings.samples,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.gradient_clipping,
        bf16=settings.bf16,
        use_cpu=settings.device == "cpu",
        dataloader_num_workers=0,
        remove_unused_columns=False,  # or the special tokens' mask would go, which spares the collator work
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator(tokenizer, _multiple(settings)),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return _measurement(tokens, losses, settings, seconds)


def run_loop(model, dataset, tokenizer, settings: Settings, lengths: list[int] | None) -> Measurement:
    """Train with the shortest loop there is, for machines without accelerate; same collator, sampler and optimizer."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings.learning_rate,
        settings.betas,
        settings.eps,
        settings.weight_decay,
        fused=True,
    )
    sampler = GroupedByLength(lengths, settings.samples) if lengths else RandomSampler(dataset)
    collate = collator(tokenizer, _multiple(settings))
    loader = DataLoader(dataset, settings.samples, sampler=sampler, collate_fn=collate)
    tokens, losses, watch = [], [], Stopwatch(settings.device)
    batches = _endless(loader)
    model.train()
    for step in range(settings.warmup + settings.steps):
        if step == settings.warmup:
            watch.start()
        inputs = {name: each.to(settings.device, non_blocking=True) for name, each in next(batches).items()}
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        tokens.append(inputs["attention_mask"].sum())
        losses.append(loss.detach())
    return _measurement(tokens, losses, settings, watch.stop())


def _endless(loader: DataLoader):
    while True:
        yield from loader


def _multiple(settings: Settings) -> int | None:
    return 8 if settings.device == "cuda" else None  # tensor cores like it


def _measurement(tokens: list, losses: list, settings: Settings, seconds) -> Measurement:
    timed = slice(settings.warmup, None)
    return Measurement(int(sum(tokens[timed])), *seconds, [float(loss) for loss in losses[timed]])
