"""What DeepSpeed and FSDP need beside transformers' Trainer: saves without frozen weights, gathered weights, a resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import trainer as parent

from geochat.train.arguments import TrainingArguments
from geochat.train.recipe import zero_stage
from geochat.train.saving import RunSaver
from geochat.train.universal import forget_universal, part_again, zero_shards


class ShardedTrainer(transformers.Trainer):
    """The part of our Trainer that knows where weights lie."""

    args: TrainingArguments
    saver: RunSaver

    def train(self, *args: Any, **kwargs: Any) -> Any:
        resume = kwargs.get("resume_from_checkpoint")
        if self.is_fsdp_enabled and resume is not None:  # before FSDP spreads the weights
            self.saver.restore(Path(resume))
        with partly_loaded():
            return super().train(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the parent, but frozen weights stay out of DeepSpeed's files for every model: the parent leaves them out
        for PEFT's models only, so that training the projector alone would write the whole model at every save."""
        engine = self.model_wrapped
        if self.is_fsdp_enabled:
            self._save_fsdp(output_dir)
            return
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = engine.save_checkpoint
        engine.save_checkpoint = partial(whole, exclude_frozen_parameters=True)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.save_checkpoint = whole

    def _save_fsdp(self, output_dir: str) -> None:
        """Optimizer and schedule alone: the parent would write the frozen weights too."""
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            self.saver.restore(Path(resume_from_checkpoint))

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and zero_stage(self.args) == 3)

    def _gather_weights(self) -> dict[str, torch.Tensor]:
        """What a save needs of weights that ZeRO-3 or FSDP has spread; every process takes part."""
        if self.is_fsdp_enabled:
            return self._gather_from_fsdp()
        import deepspeed

        weights = self.deepspeed._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=self.saver.partial
        )
        projector = {n: p for n, p in self.model.named_parameters() if "multi_modal_projector." in n}
        with deepspeed.zero.GatheredParameters(list(projector.values())):  # an adapter may carry a frozen one
            copies = {name: parameter.detach().cpu().clone() for name, parameter in projector.items()}
        return {**copies, **(weights or {})}

    def _gather_from_fsdp(self) -> dict[str, torch.Tensor]:
        """One tensor after the other, and of an adapter's frozen weights only those that its folder may carry."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not self.saver.partial or parameter.requires_grad or "multi_modal_projector." in name:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if self.args.should_save:
                    found[name] = whole.detach().cpu()
        return found

    def _optimizer_is_offloaded(self) -> bool:
        if not self.is_deepspeed_enabled:
            return False
        zero = self.args.hf_deepspeed_config.config.get("zero_optimization", {})
        return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def require_same_layout(resume: Path, args: TrainingArguments) -> None:
    """Raises: ValueError when the optimizer's state in a checkpoint is spread otherwise than this run can read it."""
    signs = {
        "--deepspeed": bool(zero_shards(resume)),
        "--fsdp": (resume / "optimizer.bin").exists(),
        "": (resume / "optimizer.pt").exists(),
    }
    before = next((flag for flag, there in signs.items() if there), None)
    now = "--deepspeed" if args.deepspeed else "--fsdp" if args.fsdp else ""
    if before is not None and before != now:
        which = f"with {before}: resume with it" if before else f"without {now}: resume without it"
        raise ValueError(f"{resume} has the optimizer's state of a run {which}")
    if before == "--deepspeed":
        weights_spread = any(resume.glob("global_step*/zero_pp_rank_*_model_states.pt"))
        if weights_spread != (zero_stage(args) == 3):
            which = "3" if weights_spread else "2 or below"
            raise ValueError(f"{resume} was saved under ZeRO stage {which}: resume with that stage")


@contextmanager
def partly_loaded() -> Iterator[None]:
    """Lets DeepSpeed resume from files without the frozen weights, which the base has; transformers asks for every
    weight unless the model is PEFT's."""
    load = parent.deepspeed_load_checkpoint

    def lenient(engine: nn.Module, path: str, load_module_strict: bool = False) -> None:
        groups = engine.optimizer.param_groups
        own = [{key: group[key] for key in group if key != "params"} for group in groups]
        load(engine, path, load_module_strict=False)
        if engine.load_universal_checkpoint():
            rates = torch.load(Path(path) / parent.SCHEDULER_NAME, weights_only=True)["_last_lr"]
            part_again(engine.optimizer, own, rates)
            forget_universal(Path(path))

    parent.deepspeed_load_checkpoint = lenient
    try:
        yield
    finally:
        parent.deepspeed_load_checkpoint = load
