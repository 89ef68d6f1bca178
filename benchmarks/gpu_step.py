"""A 7B LoRA training step on one GPU: geochat against transformers' Trainer with PEFT, each with its best setting.

    python benchmarks/gpu_step.py [--questions 3] [--steps 6]
    python benchmarks/gpu_step.py --tiny     (the whole path with a small model, on any machine)

Vicuna-7B's shape with ViT-L/14 at 504 px and random weights, bfloat16, LoRA of rank 64 with dropout 0.05 on every linear
layer, AdamW: whole steps of both trainers on samples of about 1,446 tokens, `--questions` of them about each picture. Both
sides share the frozen weights. Each searches the micro-batch (doubled until the memory is full) with and without
recomputation, geochat also the attention; then the two best take turns, A B B A. MFU is what the samples need, without
padding or recomputation (geochat/train/flops.py), over a matrix product measured in the same run. That the sides compute
the same is asserted on a small model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from train_step import IMAGE, PAD, PATCH, SIDE, TOKENS, adapted, build, compare, draw, make_sides
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


def main(argv: list[str] | None = None) -> None:
    """Parse, check, measure the peak, search both sides, let the best take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1, help="samples about each picture")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--largest", type=int, default=64, help="most samples in a micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no GPU here: --tiny runs the same path with a small model")
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        small = adapted(build(64, 1))
        compare({name: step() for name, step in make_sides(small, draw(random, 1, 3), Path(folder)).items()})
        print(f"the sides agree within 1e-5 on a small model; seed {seed}", flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = matmul_peak(device, 256 if args.tiny else 8192)
        print(f"matrix product: {peak / 1e12:.4g} TFLOP/s in {dtype_of(device)}", flush=True)
        base = big(device, args.tiny)
        # The same weights in other modules: adapters and hooks of one side are not the other's.
        twin = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
        samples = Samples(random, args.largest * (WARM + args.steps), args.questions)
        runs = {
            "Trainer + PEFT": peer(base, samples, args.steps, Path(folder)),
            "geochat": ours(twin, samples, args.steps, Path(folder), share=args.questions > 1),
        }
        masked = args.questions > 1 and device.type == "cuda"
        kinds = {"Trainer + PEFT": ["sdpa"], "geochat": ["sdpa", "flex_attention"] if masked else ["sdpa"]}
        best = {name: search(name, run, kinds[name], args.largest) for name, run in runs.items()}
        turns = [(name, runs[name](best[name])) for name in [*runs, *list(runs)[::-1]]]
    report(turns, peak)


# ---- what is run ----


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


# ---- measuring ----


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


def search(name: str, run: Run, kinds: Iterable[str], largest: int) -> Way:
    """The fastest way, micro-batches doubled until the memory is full."""
    found: list[Measured] = []
    for recompute, attention in product((False, True), kinds):
        batch = 1
        while batch <= largest and (measured := attempt(run, Way(batch, recompute, attention))):
            found.append(measured)
            print(f"{name:>15} {line(measured)}", flush=True)
            batch *= 2
    return max(found, key=lambda measured: measured.samples).way


def attempt(run: Run, way: Way) -> Measured | None:
    """None when the memory does not hold it."""
    try:
        return run(way)
    except torch.OutOfMemoryError:
        return None


def matmul_peak(device: torch.device, side: int) -> float:
    """Operations a second of a square matrix product, the best of several."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype_of(device)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = now()
        for _ in range(5):
            a @ b
        best = min(best, (now() - start) / 5)
    return 2 * side**3 / best


def line(measured: Measured) -> str:
    way = measured.way
    how = f"{way.batch:4} × {way.attention}, {'recomputed' if way.recompute else 'kept'}"
    return f"{how:34} {measured.samples:8.3f} samples/s {measured.peak / 2**30:7.1f} GiB"


def report(turns: list[tuple[str, Measured]], peak: float) -> None:
    """Both sides at their best; the first one is the peer."""
    print("\ntaking turns, each with its best:")
    rates: dict[str, list[float]] = {}
    for name, measured in turns:
        rates.setdefault(name, []).append(measured.samples)
        print(f"{name:>15} {line(measured)} {measured.useful / peak:7.1%} MFU")
    first, second = (median(values) for values in rates.values())
    print(f"geochat is {second / first:.2f}x the peer")


if __name__ == "__main__":
    main()
