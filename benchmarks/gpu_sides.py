"""The two sides of gpu_step.py: the model they share, the samples, and how each takes a run of steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from train_step import IMAGE, PAD, PATCH, SIDE, TOKENS, build, draw
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.trainer_callback import PrinterCallback

from geochat.model.adapter import LLM_LINEARS, AdapterSpec, attach
from geochat.train.arguments import TrainingArguments
from geochat.train.collate import Collator
from geochat.train.flops import ModelShape, Trained, work
from geochat.train.packing import PackingCollator
from geochat.train.trainer import Trainer
from geochat.train.workload import load_of

WARM = 2
"""Steps before those that count."""
RANK, DROPOUT = 64, 0.05


@dataclass(frozen=True)
class Way:
    """How a side runs."""

    batch: int
    recompute: bool
    attention: str


@dataclass(frozen=True)
class Measured:
    """Of one run."""

    way: Way
    samples: float
    """A second."""
    useful: float
    """Operations a second."""
    peak: int
    """Bytes."""


Run = Callable[[Way], Measured]


def big(device: torch.device, tiny: bool) -> LlavaForConditionalGeneration:
    """Random weights on the device, in the type that the frozen ones have in training."""
    if tiny:
        return build(64, 1).to(device, dtype_of(device))
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32_064)  # all else is Llama-7B's by default
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=TOKENS
    )
    torch.set_default_dtype(dtype_of(device))
    with device:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Samples(torch.utils.data.Dataset):
    """Drawn samples, with what geochat's sampler asks a dataset for."""

    def __init__(self, random: np.random.Generator, count: int, questions: int) -> None:
        self.samples = draw(random, -(-count // questions), questions)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    def lengths(self) -> np.ndarray:
        return np.array([len(sample["input_ids"]) for sample in self.samples])

    def images(self) -> np.ndarray:
        return np.array([int(sample["images"][0]) for sample in self.samples])


class Counted:
    """A collator that adds up the operations which its batches need, however they are laid out."""

    def __init__(self, collate: Collator, config: LlavaConfig, *, share: bool, masked: bool = False) -> None:
        self.collate, self.masked, self.shape = collate, masked, ModelShape.of(config)
        self.rows = PackingCollator(PAD, IMAGE, share=share)
        self.operations: list[float] = []

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = self.rows(samples)
        load, used = load_of(rows, masked=False), int((rows["input_ids"] != PAD).sum())
        needed = replace(load, length=used // load.rows)
        trained = Trained(lora_rank=RANK, lora_dropout=DROPOUT)
        self.operations.append(work(self.shape, trained, needed, checkpointing=False).useful)
        batch = self.collate(samples)
        if self.masked:
            del batch["sources"]
            batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        return batch


class Clock(transformers.TrainerCallback):
    """Seconds of every step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self.start)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peer(base: LlavaForConditionalGeneration, samples: Samples, steps: int, folder: Path) -> Run:
    """transformers' Trainer and PEFT as their documentation has it: padded, masked, the loss of the model."""
    settings = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=DROPOUT, target_modules=LLM_LINEARS)
    model = get_peft_model(base, settings)

    def run(way: Way) -> Measured:
        collate = Counted(Collator(PAD), base.config, share=False, masked=True)
        args = transformers.TrainingArguments(
            **common(way, steps, folder), gradient_checkpointing=way.recompute
        )
        trainer = transformers.Trainer(model=model, args=args, data_collator=collate, train_dataset=samples)
        return measure(trainer, collate, way)

    return run


def ours(
    base: LlavaForConditionalGeneration, samples: Samples, steps: int, folder: Path, *, share: bool
) -> Run:
    """geochat's trainer; similar lengths together, or with several samples a picture its tokens shared."""
    model = attach(base, AdapterSpec(r=RANK, dropout=DROPOUT))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()

    def run(way: Way) -> Measured:
        base.set_attn_implementation(way.attention)
        args = TrainingArguments(
            **common(way, steps, folder),
            gradient_checkpointing=str(way.recompute),
            share_image_prefix=share,
            group_by_modality_length=not share,
        )
        one_row = way.attention == "flex_attention"
        packed = PackingCollator(PAD, IMAGE, pack=one_row, one_row=one_row)
        collate = Counted(packed if share else Collator(PAD), base.config, share=share)
        trainer = Trainer(
            base=base, saver=None, model=model, args=args, data_collator=collate, train_dataset=samples  # type: ignore[arg-type]
        )  # fmt: skip
        return measure(trainer, collate, way)

    return run


def common(way: Way, steps: int, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": way.batch,
        "max_steps": WARM + steps,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_num_workers": 0,  # the collator counts
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def measure(trainer: transformers.Trainer, collate: Counted, way: Way) -> Measured:
    """Median of the steps; leaves the model as it found it."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    gc.collect()  # the optimizer of the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
        seconds = median(clock.seconds[WARM:])
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return Measured(way, way.batch / seconds, median(collate.operations) / seconds, peak)
    finally:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        model.get_base_model().gradient_checkpointing_disable()
        model.get_base_model().disable_input_require_grads()
        model.zero_grad()
