"""`--gradient_checkpointing auto`: activations are kept where the memory that is free holds them."""

from __future__ import annotations

import os

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn

from geochat.model.adapter import trainable_groups
from geochat.train.arguments import ModelArguments, TrainingArguments
from geochat.train.dataset import InstructionDataset
from geochat.train.flops import ModelShape
from geochat.train.gpus import GIB, HEADROOM, Sizing
from geochat.train.memory import Counts
from geochat.train.plan import of_longest, setting_of, trained_of
from geochat.train.workload import Reader

LONGEST = 256
"""Rows that are tokenised: those with the most words."""


def choose_recomputation(
    model: nn.Module,
    base: nn.Module,
    dataset: InstructionDataset,
    model_args: ModelArguments,
    args: TrainingArguments,
) -> None:
    """Decide before training, on every process alike; see `geochat.train.memory` for what is counted.

    base: the LlavaForConditionalGeneration inside `model`. FSDP and eager attention are not counted: recomputed.
    """
    attention = base.config._attn_implementation
    if args.fsdp or attention == "eager":
        args.recompute(True, f"{'FSDP' if args.fsdp else 'eager attention'} is not counted")
        return
    reader = Reader(dataset)
    reader.items(np.argsort(np.abs(dataset.lengths()))[-LONGEST:].tolist())
    if not reader.counts:
        args.recompute(True, "none of the longest rows can be used")
        return
    groups = {name for name, members in trainable_groups(model).items() if members}
    sizing = Sizing(
        ModelShape.of(base.config),
        trained_of(groups, model_args, args),
        Counts.of(model),
        of_longest(reader.tokens(dataset.processor.image_tokens)),
        share=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        budget=args.max_tokens_per_micro_batch,
    )
    setting = setting_of(args).changed(checkpointing=False)
    if args.device.type == "cpu":
        setting = setting.changed(mask_bytes=setting.compute_bytes)
    memory = available(args.device)
    kept = sizing.footprint(setting, args.per_device_train_batch_size)
    args.recompute(
        not kept.holds(memory),
        f"keeping them needs {kept.total / GIB:.1f} GiB at {sizing.sample.length:,} tokens a sample, "
        f"{HEADROOM:.0%} of {memory / GIB:.1f} GiB are allowed",
    )


def available(device: torch.device) -> int:
    """Bytes that training may have, those that this process holds already included; the least over all processes."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = psutil.virtual_memory().available // beside + psutil.Process().memory_info().rss
    if dist.is_available() and dist.is_initialized():
        least = torch.tensor(memory, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        memory = int(least)
    return memory
