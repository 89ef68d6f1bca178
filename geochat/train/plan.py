"""What a run would do, need and cost, before it starts: `python -m geochat.train.train … --dry_run True`.

Reads configurations, headers of weight files, tokenizer and instruction file; no weights, no images, no GPU. The same
flags and files give the same plan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection

import numpy as np

from geochat.eval.files import write_json
from geochat.model.adapter import trainable_groups
from geochat.train.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments
from geochat.train.assemble import make_collator, make_trainable
from geochat.train.flops import Load, ModelShape, Trained
from geochat.train.gpus import GPUS, Sizing
from geochat.train.memory import Counts, Setting
from geochat.train.mixture import open_sets
from geochat.train.outline import outline
from geochat.train.plan_facts import Plan
from geochat.train.plan_text import text
from geochat.train.recipe import compute_dtype, describe, offloads, zero_stage
from geochat.train.sampler import EpochSampler
from geochat.train.workload import Batches, Layout, Reader, Tokens, lay_out


def make_plan(arguments: Arguments) -> Plan:
    """Raises: ValueError on unusable input."""
    model_args, data_args, args = arguments
    outlined = outline(model_args, data_args, args)
    _, model = make_trainable(outlined.model, model_args, args)
    groups = {
        name: sum(parameter.numel() for _, parameter in members)
        for name, members in trainable_groups(model).items()
        if members
    }
    dataset, validation = open_sets(outlined.processor, data_args, args, look_for_images=False)
    collate = make_collator(outlined.processor, args, model_args.attn_implementation)
    layout = Layout(
        args.per_device_train_batch_size,
        args.world_size,
        args.gradient_accumulation_steps,
        args.dataloader_drop_last,
    )
    reader = Reader(dataset)
    masked = model_args.attn_implementation in ("sdpa", "eager")
    batches = {
        name: lay_out(
            np.array(list(EpochSampler.of(dataset, args, grouped=grouped))),
            layout,
            reader,
            collate,
            args.plan_rows,
            masked=masked,
        )
        for name, grouped in (("shuffled", False), ("grouped", True))
    }
    asked = "grouped" if args.group_by_modality_length else "shuffled"
    steps = layout.steps(len(dataset))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    trained = trained_of(groups, model_args, args)
    tokens = reader.tokens(outlined.processor.image_tokens)
    shape, counts, setting = ModelShape.of(outlined.config), Counts.of(model), setting_of(args)
    most = worst(tokens, batches[asked], args)
    share = layout.micro_batch * layout.accumulation
    sizing = Sizing(shape, trained, counts, most, share, args.max_tokens_per_micro_batch)
    checked = next((gpu for gpu in GPUS if gpu.name == args.plan_gpu), None)
    if args.checkpointing_is_open:
        gpu = checked or max(GPUS, key=lambda gpu: gpu.memory)
        again = not sizing.footprint(setting.changed(checkpointing=False), layout.micro_batch).holds(
            gpu.memory
        )
        args.recompute(again, f"as an empty {gpu.name} decides")
        setting = setting.changed(checkpointing=again)
    return Plan(
        recipe=describe(model, outlined.processor, arguments, dataset, validation),
        notes=[*args.notes, *outlined.notes, *_bad_rows(reader, data_args)],
        parameters=groups | {"total": counts.total},
        rows=len(dataset),
        rows_read=len(reader.counts),
        bad_rows=len(reader.bad),
        tokens=tokens,
        token_shares=reader.token_shares(),
        layout=layout,
        asked=asked,
        batches=batches,
        steps=total,
        micro_batches=_run_micro_batches(layout, len(dataset), total),
        ending=layout.ending(len(dataset)),
        shape=shape,
        trained=trained,
        setting=setting,
        sizing=sizing,
        checked=checked,
    )


def worst(tokens: Tokens, batches: Batches, args: TrainingArguments) -> Load:
    """The most that one sample takes of what is computed at once, of what was read.

    Where every sample has a row, all may be as long as the longest. Where rows are shared, the fullest micro-batch says
    how much a sample takes there; its fullest part where it is computed in parts.
    """
    if not (args.packing or args.share_image_prefix):
        return of_longest(tokens)
    m = 1 if args.max_tokens_per_micro_batch else args.per_device_train_batch_size
    return Load(
        rows=1,
        length=-(-max(load.rows * load.length for load in batches.loads) // m),
        images=-(-max(load.images for load in batches.loads) // m),
        supervised=-(-max(load.supervised for load in batches.loads) // m),
    )


def of_longest(tokens: Tokens) -> Load:
    """A sample in a row of its own, as long as the longest that was read."""
    return Load(1, tokens.longest, max(tokens.most_images, 1), tokens.most_supervised)


def _run_micro_batches(layout: Layout, rows: int, steps: int) -> int:
    """Over all processes: whole epochs, and the steps of the last one."""
    each = layout.micro_batches(rows) // layout.processes
    epochs, rest = divmod(steps, layout.steps(rows))
    return layout.processes * (epochs * each + min(rest * layout.accumulation, each))


def trained_of(groups: Collection[str], model_args: ModelArguments, args: TrainingArguments) -> Trained:
    return Trained(
        lora_rank=args.lora_r if args.lora_enable else 0,
        lora_dropout=args.lora_dropout,
        dora=args.lora_enable and args.use_dora,
        language_model="language_model" in groups,
        projector="projector" in groups,
        tower_from=(model_args.tune_vit_from_layer or 0)
        if {"vision_tower", "vision_lora"} & set(groups)
        else None,
    )


def setting_of(args: TrainingArguments) -> Setting:
    return Setting(
        gpus=args.world_size,
        stage=zero_stage(args) if args.deepspeed else None,
        offload_optimizer=offloads(args, "optimizer"),
        offload_weights=offloads(args, "param"),
        checkpointing=bool(args.gradient_checkpointing),
        compute_bytes=compute_dtype(args).itemsize,
        optimizer_8bit="8bit" in str(args.optim),
        bits=args.bits,
        live_weights=int(args.zero_configuration.get("stage3_max_live_parameters", 1_000_000_000)),
    )


def _bad_rows(reader: Reader, data_args: DataArguments) -> list[str]:
    if not reader.bad:
        return []
    then = "training stops at the first" if data_args.on_bad_sample == "error" else "training skips them"
    first = reader.bad[min(reader.bad)]
    return [f"{len(reader.bad)} of the rows read cannot be used, {then}: {first}"]


def run(arguments: Arguments) -> None:
    """Print the plan and, where asked, write it. Raises: ValueError, when the run fits no GPU or input is unusable."""
    if os.environ.get("RANK", "0") != "0":
        return  # under a launcher one process plans for all
    plan = make_plan(arguments)
    print(text(plan), flush=True)
    if arguments[2].plan_json:
        write_json(arguments[2].plan_json, plan.as_json())
    if refusal := plan.refusal():
        raise ValueError(refusal)
