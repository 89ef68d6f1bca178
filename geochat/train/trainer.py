"""transformers' Trainer with our loss, learning rates and order of samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from geochat.data.encode import IGNORE_INDEX
from geochat.model.dora import dora_layers
from geochat.model.vision import freeze_tower
from geochat.train.arguments import TrainingArguments
from geochat.train.curves import VALIDATION, append_row
from geochat.train.data_record import Record
from geochat.train.dataset import BadSampleError
from geochat.train.hooks import DummyImage, SupervisedRows
from geochat.train.mixture import Mixture
from geochat.train.norms import StepNorms
from geochat.train.packing import attention_mask, nothing
from geochat.train.recipe import offloads, parameter_groups
from geochat.train.sampler import EpochSampler
from geochat.train.saving import LossError, RunSaver, checkpoints
from geochat.train.sharded import ShardedTrainer
from geochat.train.validation import Validation, undisturbed


class Trainer(ShardedTrainer):
    """Differs from its parent in what is specific to grounded vision-language models, see the methods.

    base: the LlavaForConditionalGeneration inside `model` (the same object when there is no adapter).
    saver: writes the loadable part of every save.
    data_record: what samples are drawn from, kept with every save.
    validation: what every evaluation looks at beside the loss.
    """

    args: TrainingArguments

    def __init__(
        self,
        *,
        base: nn.Module,
        saver: RunSaver,
        data_record: Record | None = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        if not any(parameter.requires_grad for parameter in base.model.vision_tower.parameters()):
            freeze_tower(base)
        args: TrainingArguments = kwargs["args"]
        if args.compile_options:
            # Few graphs serve all layers; parameters keep their names.
            for layer in base.model.language_model.layers:
                layer.compile(**args.compile_options)
        self.rows = SupervisedRows(base.lm_head)
        self.dummy = DummyImage(base)
        self.attn_implementation, self.mask_dtype = base.config._attn_implementation, base.dtype
        self.supervised: int | None = None  # of the batch whose parts are being computed
        self.saver, self.data_record, self.validation = saver, data_record, validation
        self.bad_samples: list[str] = []
        super().__init__(**kwargs)
        # FSDP has whole weights only while a block is computed.
        if next(dora_layers(base), None) is not None and not self.is_fsdp_enabled:
            self.add_callback(StepNorms())
        # The parent hands the token count of the whole step over, and skips its own division by the accumulation,
        # exactly when this is set.
        self.model_accepts_loss_kwargs = self.args.loss_normalization == "token"

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross entropy at supervised positions, without logits anywhere else.

        Mean over the micro-batch, or (token normalisation) sum divided by the tokens of the whole step.
        """
        parts = self._as_many(inputs["parts"]) if "parts" in inputs else [inputs]
        total = sum(self._summed_loss(model, part) for part in parts)
        if num_items_in_batch is None:
            loss = total / (self.supervised or (inputs["labels"] != IGNORE_INDEX).sum())
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _summed_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "sources"}
        labels = inputs.pop("labels")  # [rows, n]
        targets = labels[:, 1:]
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = targets != IGNORE_INDEX
        if "documents" in inputs:
            documents, branches = inputs.pop("documents"), inputs.pop("branches")
            inputs["attention_mask"] = attention_mask(
                documents, branches, self.attn_implementation, self.mask_dtype
            )
        self.rows.keep, self.dummy.active = keep, "pixel_values" not in inputs
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            self.rows.keep, self.dummy.active = None, False
        return F.cross_entropy(outputs["logits"].float(), targets[keep[:, :-1]], reduction="sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Raises: LossError when the loss is NaN or infinite, before the optimizer uses its gradients."""
        sources = inputs.pop("sources", [])
        loss = self._forward_and_backward(model, inputs, num_items_in_batch)
        # Here, not before: the device has the backward pass to do meanwhile.
        if broken := self._broken(loss, sources):
            kept = checkpoints(Path(self.args.output_dir))
            raise LossError(
                f"the loss of step {self.state.global_step + 1} is {' and '.join(broken)}; "
                f"{f'{kept[-1].name} is intact' if kept else 'nothing was saved yet'}: look at these samples, or resume "
                "with a lower --learning_rate"
            )
        return loss

    def _broken(self, loss: torch.Tensor, sources: list[str]) -> list[str]:
        """Losses that are no numbers, with their samples, of all processes: gradients are spoilt for every one."""
        mine = "" if torch.isfinite(loss) else f"{float(loss):g} with the samples {', '.join(sources)}"
        if self.args.world_size == 1:
            return [mine] if mine else []
        if not self._most(len(mine)):
            return []
        found = [""] * self.args.world_size
        dist.all_gather_object(found, mine)
        return [each for each in found if each]

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward; with `--max_tokens_per_micro_batch` part after part, gradients adding up."""
        if "parts" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        parts = self._as_many(inputs["parts"])
        self.supervised = int((inputs["labels"] != IGNORE_INDEX).sum())
        state, syncs = self.accelerator.gradient_state, self.accelerator.sync_gradients
        total = torch.zeros((), device=self.args.device)
        try:
            for left, part in zip(reversed(range(len(parts))), parts, strict=True):
                state._set_sync_gradients(syncs and left == 0)
                alone = left > 0 and not self.is_deepspeed_enabled
                with self.accelerator.no_sync(model) if alone else nullcontext():
                    total += super().training_step(model, part, num_items_in_batch)
        finally:
            self.supervised = None
            state._set_sync_gradients(syncs)
        return total

    def _as_many(self, parts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """As many parts as the process has that has most, with empty ones: ZeRO-3 gathers weights in each."""
        return [*parts, *[nothing(self.args.device)] * (self._most(len(parts)) - len(parts))]

    def _most(self, mine: int) -> int:
        """The largest number of all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return mine
        count = torch.tensor(mine, device=self.args.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return int(count)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the parent's estimate knows no images

    # ---- data ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._usable, epoch_iterator), num_batches, device)

    def _usable(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Counts the rows that workers could not use. Raises: BadSampleError when the batch is lost."""
        for reason in batch.pop("bad_samples", ()):
            self.bad_samples.append(reason)
            if "input_ids" in batch or "parts" in batch:
                print(f"skipped: {reason}", flush=True)
        if "input_ids" not in batch and "parts" not in batch:
            reason = self.bad_samples[-1]
            if len(self.bad_samples) > 1:
                reason = f"no usable row was found among {len(self.bad_samples)}, the last: {reason}"
            raise BadSampleError(reason)
        return batch

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._usable(inputs), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Mixture = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = EpochSampler.of(dataset, self.args, grouped=self.args.group_by_modality_length)
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate does not reach the sampler of several processes through the loader that skips what a resumed run
        # has seen: the epoch would go on in the first one's order.
        self.sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    # ---- validation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss, and what `validation` looks at; training then goes on as if nothing had been."""
        with undisturbed(self.model):
            metrics = super().evaluate(*args, **kwargs)
            scores = self._look(self.validation) if self.validation else {}
        self.control.should_evaluate = False  # the parent sees to that only where there is a loss
        named = {f"eval_{name}": score for name, score in scores.items()}
        if named:
            self.log(dict(named))
        if self.args.process_index == 0:
            row = {"step": self.state.global_step, "loss": metrics.get("eval_loss"), "scores": scores}
            append_row(Path(self.args.output_dir) / VALIDATION, row)
        return metrics | named

    def _look(self, validation: Validation) -> dict[str, float]:
        """The first process asks, the others wait for what it has found."""
        found: list[dict[str, float]] = [{}]
        if self.args.process_index == 0:
            # Chat keeps keys and values in the type of the weights: those in float32 are asked as they are.
            with nullcontext() if self.mask_dtype == torch.float32 else self.accelerator.autocast():
                found = [validation.look(self.model, self.state.global_step)]
        if self.args.world_size > 1:
            dist.broadcast_object_list(found)
        return found[0]

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self.args, decayed)
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if offloads(self.args, "optimizer"):
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                optimizer, settings = DeepSpeedCPUAdam, {k: v for k, v in settings.items() if k != "fused"}
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer
