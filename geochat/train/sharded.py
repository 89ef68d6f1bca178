"""What DeepSpeed and FSDP need beside transformers' Trainer: saves without frozen weights, gathered weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import trainer as parent

from geochat.train.arguments import TrainingArguments
from geochat.train.recipe import zero_stage
from geochat.train.saving import RunSaver


class ShardedTrainer(transformers.Trainer):
    """The part of our Trainer that knows where weights lie."""

    args: TrainingArguments
    saver: RunSaver

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with partly_loaded():
            return super().train(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the parent, but frozen weights stay out of DeepSpeed's files for every model: the parent leaves them out
        for PEFT's models only, so that training the projector alone would write the whole model at every save."""
        engine = self.model_wrapped
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = engine.save_checkpoint
        engine.save_checkpoint = partial(whole, exclude_frozen_parameters=True)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.save_checkpoint = whole

    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled and zero_stage(self.args) == 3

    def _gather_weights(self) -> dict[str, torch.Tensor]:
        """What a save needs of weights that ZeRO-3 has spread; every process takes part."""
        import deepspeed

        weights = self.deepspeed._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=self.saver.partial
        )
        projector = {n: p for n, p in self.model.named_parameters() if "multi_modal_projector." in n}
        with deepspeed.zero.GatheredParameters(list(projector.values())):  # an adapter may carry a frozen one
            copies = {name: parameter.detach().cpu().clone() for name, parameter in projector.items()}
        return {**copies, **(weights or {})}

    def _optimizer_is_offloaded(self) -> bool:
        if not self.is_deepspeed_enabled:
            return False
        zero = self.args.hf_deepspeed_config.config.get("zero_optimization", {})
        return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def require_same_layout(resume: Path, args: TrainingArguments) -> None:
    """Raises: ValueError when the optimizer's state in a checkpoint is spread otherwise than this run wants it."""
    spread = len(list(resume.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if spread and not args.deepspeed:
        raise ValueError(f"{resume} was saved under DeepSpeed: resume with --deepspeed and the same file")
    if args.deepspeed and not spread:
        raise ValueError(f"{resume} was saved without DeepSpeed: resume without --deepspeed")
    if spread and spread != args.world_size:
        raise ValueError(
            f"{resume} was saved by {spread} processes under ZeRO, now there are {args.world_size}: resume with {spread}"
        )


@contextmanager
def partly_loaded() -> Iterator[None]:
    """Lets DeepSpeed resume from files without the frozen weights, which the base has; transformers asks for every
    weight unless the model is PEFT's."""
    load = parent.deepspeed_load_checkpoint

    def lenient(engine: nn.Module, path: str, load_module_strict: bool = False) -> None:
        load(engine, path, load_module_strict=False)

    parent.deepspeed_load_checkpoint = lenient
    try:
        yield
    finally:
        parent.deepspeed_load_checkpoint = load
