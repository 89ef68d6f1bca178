"""Saves and resumes, wherever DeepSpeed and FSDP keep weights and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import trainer as parent
from transformers.trainer_callback import ExportableState

from geochat.train.arguments import TrainingArguments
from geochat.train.data_record import Record, write_record
from geochat.train.recipe import zero_stage
from geochat.train.saving import LossError, RunSaver, explained
from geochat.train.universal import forget_universal, part_again, zero_shards


class ShardedTrainer(transformers.Trainer):
    """The part of our Trainer that knows where weights lie: complete saves, frozen weights left out of them, resumes."""

    args: TrainingArguments
    saver: RunSaver
    data_record: Record | None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        resume = kwargs.get("resume_from_checkpoint")
        if self.is_fsdp_enabled and resume is not None:  # before FSDP spreads the weights
            self.saver.restore(Path(resume))
        with partly_loaded():
            return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A complete loadable folder plus trainer state, under a temporary name until everything is written.

        Raises: SaveError; the earlier checkpoints are then as they were.
        """
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
        with explained(run, name):
            staging = self.saver.open_staging(run, name, owner=self.args.should_save)
            self._barrier()
            self.save_model(str(staging), _internal_call=True)
            self._save_trainer_state(staging)
            self._barrier()
            if self.args.should_save:
                self.saver.publish(staging, run / name)
                self.saver.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._barrier()

    def _save_trainer_state(self, staging: Path) -> None:
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(staging / "trainer_state.json"))
            if self.data_record is not None:
                write_record(staging, self.data_record)

    def _load_best_model(self) -> None:
        self.saver.restore(Path(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The loadable part alone: adapter, projector or canonical folder. Collective under DeepSpeed."""
        gathered = self._gather_weights() if self._is_sharded() else None
        if self.args.should_save:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            weights = {name: (gathered or trained).get(name, p) for name, p in trained.items()}
            broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
            if broken:  # gradients that are no numbers come after a loss that is one
                raise LossError(f"{len(broken)} tensors are no numbers any more, {broken[0]} for one")
            self.saver.save(Path(output_dir or self.args.output_dir), gathered)

    def _barrier(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

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
