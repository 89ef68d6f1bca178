"""Train a model: `python -m geochat.train.train --model_name_or_path M --data_path D --image_folder I --output_dir O`.

Parse, build, train, save. LoRA by default; `--lora_enable False` trains the language model and the projector (and
the tower with `--tune_vision_tower`), `--tune_mm_mlp_adapter True` on top of that only the projector.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from geochat.eval.files import write_text
from geochat.model.adapter import AdapterSpec, attach, trainable_groups
from geochat.model.base import BaseRecord
from geochat.model.build import build_model
from geochat.model.checkpoint import load
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.open import recognise
from geochat.model.processor import Processor
from geochat.model.weights import open_weights, read_json
from geochat.train import plan
from geochat.train.arguments import IMAGE_MODES, DataArguments, ModelArguments, TrainingArguments
from geochat.train.collate import Collator
from geochat.train.command_line import parse_arguments
from geochat.train.curves import LossCurve
from geochat.train.data_record import compare_data, data_record
from geochat.train.dataset import BadSampleError
from geochat.train.mixture import open_sets
from geochat.train.packing import PackingCollator
from geochat.train.recipe import (
    choose_states,
    choose_trainable,
    compute_dtype,
    describe,
    unfreeze_tower,
    zero_stage,
)
from geochat.train.recompute import choose_recomputation
from geochat.train.saving import (
    Kind,
    LossError,
    RunSaver,
    SaveError,
    explained,
    load_projector,
    resume_point,
    without_zero_init,
)
from geochat.train.sharded import require_same_layout
from geochat.train.stopping import stop_together
from geochat.train.trainer import Trainer
from geochat.train.universal import spread_anew
from geochat.train.validation import make_validation

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def main(argv: list[str] | None = None) -> None:
    """Raises: SystemExit(2), after one line on stderr, for input that cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the parallelism
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, nothing a user can change
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments[2].dry_run:
            return plan.run(arguments, make_trainable, make_collator)
        trainer, resume = prepare(arguments)
    except (ValueError, OSError) as error:
        stop_together(error)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        with explained(Path(arguments[2].output_dir), "the final model"):
            trainer.save_model()
        report_bad_samples(trainer)
    except (BadSampleError, LossError, SaveError, OSError) as error:
        stop_together(error)


def prepare(arguments: Arguments) -> tuple[Trainer, Path | None]:
    """Trainer ready to run, and the checkpoint to resume from. Raises: ValueError, OSError on unusable input."""
    model_args, data_args, args = arguments
    resume = resume_point(args)
    if resume is not None:
        require_same_layout(resume, args)
        spread_anew(resume, args)
    transformers.set_seed(args.seed)
    with without_zero_init():
        base, processor, record = load_base(arguments)
    kind, model = make_trainable(base, model_args, args)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing is left to train: every part is frozen by a flag")
    saver = RunSaver(kind, model, processor, record)
    saver.check(Path(args.output_dir), resume)
    train_set, eval_set = open_sets(processor, data_args, args)
    drawn_from = data_record(train_set.library.sources, data_args, args)
    if resume is not None:
        args.notes += compare_data(resume, drawn_from, allow_changed=args.allow_changed_data)
    validation = make_validation(eval_set, processor, args)
    if args.checkpointing_is_open:
        choose_recomputation(model, base, train_set, model_args, args)
    if args.process_index == 0:
        say(arguments, describe(model, processor, arguments, train_set, eval_set), resume)
    trainer = Trainer(
        base=base,
        saver=saver,
        model=model,
        args=args,
        data_collator=make_collator(processor, args, base.config._attn_implementation),
        train_dataset=train_set,
        # transformers takes an empty dictionary for validation without a loss.
        eval_dataset={} if eval_set is None and args.eval_benchmark else eval_set,
        data_record=drawn_from,
        validation=validation,
        callbacks=[LossCurve(Path(args.output_dir))],
    )
    return trainer, resume


def load_base(arguments: Arguments) -> tuple[nn.Module, Processor, BaseRecord]:
    """The model to start from, its processor, and what an adapter will remember of it."""
    model_args, data_args, args = arguments
    folder = Path(model_args.model_name_or_path or "")
    if not folder.is_dir() and not is_gguf(folder):
        raise ValueError(f"--model_name_or_path {folder}: no such folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter: merge it first (scripts/merge_lora_weights.py)")
    # Without DeepSpeed the weights that train stay in float32 and the forward pass is autocast; DeepSpeed keeps
    # float32 copies itself and wants one dtype.
    dtype = compute_dtype(args) if args.lora_enable or args.deepspeed else torch.float32
    quantised: dict[str, Any] = {}
    if args.quantization:
        if zero_stage(args) == 3:
            raise ValueError(
                f"--bits {args.bits} with ZeRO-3: quantised weights cannot be spread; use scripts/zero2.json"
            )
        quantised = {"quantization": args.quantization, "device": str(args.device)}
    tower = Path(model_args.vision_tower) if model_args.vision_tower else None
    projector = Path(model_args.pretrain_mm_mlp_adapter) if model_args.pretrain_mm_mlp_adapter else None
    if is_canonical(folder):
        model, processor = load(
            folder,
            image_size=model_args.image_size,
            dtype=dtype,
            **quantised,
            attn_implementation=model_args.attn_implementation,
        )
        choose_states(model.config, model_args.feature_layer, folder)
        if model_args.version:
            processor = processor.with_template(model_args.version)
        if projector:
            load_projector(model, projector)
        if tower:
            args.notes.append(f"--vision_tower is not used: {folder} holds its tower")
            tower = None
    else:
        frozen = model_args.projector_is_frozen(args.lora_enable)
        if frozen and projector is None and not brings_projector(folder, tower):
            raise ValueError(
                f"{folder} holds no projector, and a fresh one would stay frozen: give one with "
                "--pretrain_mm_mlp_adapter, or train it with --tune_mm_mlp_adapter True"
            )
        model, processor = build_model(
            folder,
            tower,
            projector,
            image_size=model_args.image_size or 504,
            template=model_args.version,
            dtype=dtype,
            feature_layer=model_args.feature_layer,
            **quantised,
            attn_implementation=model_args.attn_implementation,
        )
    processor.image_mode = IMAGE_MODES[data_args.image_aspect_ratio]
    return model, processor, BaseRecord.of(folder, tower, projector)


def brings_projector(folder: Path, tower: Path | None) -> bool:
    """Whether the language model (LLaVA's layout, GGUF) or the tower (GGUF's `mmproj`) comes with a projector."""
    if is_gguf(tower) or is_gguf(folder):
        return is_gguf(tower) or recognise(folder) == "gguf"
    return any("mm_projector" in key for key in open_weights(folder))


def is_canonical(folder: Path) -> bool:
    """True for a folder of `LlavaForConditionalGeneration`; LLaVA's own layout shares its `model_type`."""
    if is_gguf(folder):
        return False
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(f"{folder}: no config.json, so this is no model folder")
    return "LlavaForConditionalGeneration" in read_json(config).get("architectures", [])


def make_trainable(
    base: nn.Module, model_args: ModelArguments, args: TrainingArguments
) -> tuple[Kind, nn.Module]:
    """Attach adapters or unfreeze parts."""
    if args.lora_enable:
        spec = AdapterSpec(
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            use_dora=args.use_dora,
            train_projector=model_args.tune_mm_mlp_adapter,
            vision_r=args.vision_lora_r,
            vision_alpha=args.vision_lora_alpha,
        )
        model = attach(base, spec)
        if model_args.tune_vision_tower:
            unfreeze_tower(base, model_args.tune_vit_from_layer)
        if not args.deepspeed:
            for members in trainable_groups(model).values():
                for _, parameter in members:
                    parameter.data = parameter.data.float()
        return "adapter", model
    choose_trainable(base, model_args)
    only_projector = model_args.tune_mm_mlp_adapter and not model_args.tune_vision_tower
    return ("projector" if only_projector else "full"), base


def make_collator(processor: Processor, args: TrainingArguments, attention: str) -> Collator:
    """How samples become a batch. Raises: ValueError when the attention cannot do what the flags ask for."""
    if not (args.share_image_prefix or args.packing or args.max_tokens_per_micro_batch):
        return Collator(processor.pad_token_id)
    if args.share_image_prefix and attention not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"--attn_implementation {attention} cannot keep the questions about one image apart: with "
            "--share_image_prefix use sdpa or flex_attention"
        )
    return PackingCollator(
        processor.pad_token_id,
        processor.image_token_id,
        share=args.share_image_prefix,
        pack=args.packing,
        one_row=attention not in ("sdpa", "eager"),
        budget=args.max_tokens_per_micro_batch,
    )


def say(arguments: Arguments, recipe: str, resume: Path | None) -> None:
    """Print the resolved recipe and keep it in the run folder."""
    args = arguments[2]
    lines = [*(f"note: {note}" for note in args.notes), recipe]
    if resume is not None:
        lines.append(f"{'resumed from':>22}  {resume}")
    write_text(Path(args.output_dir) / "recipe.txt", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def report_bad_samples(trainer: Trainer) -> None:
    """Print how many rows were skipped over all processes and list them in `bad_samples.txt`."""
    args = trainer.args
    reasons: list[Any] = [trainer.bad_samples]
    if args.world_size > 1:
        reasons = [None] * args.world_size
        dist.all_gather_object(reasons, trainer.bad_samples)
    named = sorted({reason for part in reasons for reason in part})
    if args.process_index == 0 and named:
        file = Path(args.output_dir) / "bad_samples.txt"
        write_text(file, "\n".join(named) + "\n")
        print(f"{len(named)} rows could not be used and were skipped, listed in {file}")


def run() -> None:
    """`main` as a process of its own.

    Gloo's threads must not outlive the interpreter: that would abort the process, whatever it was about to say. A
    finished process takes leave of the others. A failed one ends at once, since they may be waiting for it.
    """
    try:
        main()
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run()
