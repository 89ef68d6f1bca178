"""transformers' Trainer with our loss, learning rates, order of samples and saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.trainer_callback import ExportableState

from geochat.data.encode import IGNORE_INDEX
from geochat.model.dora import dora_layers
from geochat.model.vision import freeze_tower
from geochat.train.arguments import TrainingArguments
from geochat.train.dataset import BadSampleError, InstructionDataset
from geochat.train.norms import StepNorms
from geochat.train.packing import attention_mask, nothing
from geochat.train.recipe import parameter_groups
from geochat.train.sampler import EpochSampler
from geochat.train.saving import RunSaver, checkpoints, explained
from geochat.train.sharded import ShardedTrainer


class LossError(RuntimeError):
    """The loss or the weights are no numbers any more; the message names the samples of the batch."""


class SupervisedRows:
    """Lets the output layer see only the positions that have a target.

    A pre-hook on the layer itself, so that it acts inside DDP, DeepSpeed and PEFT wrappers alike. With 1 296 image
    tokens and short answers nine in ten logits would be computed to be thrown away.
    """

    def __init__(self, output_layer: nn.Module) -> None:
        self.keep: torch.Tensor | None = None  # bool[batch, n]
        output_layer.register_forward_pre_hook(self._select)

    def _select(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self.keep is None:
            return None
        return (inputs[0][self.keep], *inputs[1:])  # [batch, n, hidden] → [supervised, hidden]


class DummyImage:
    """Sends a zero-weighted image through tower and projector when a batch has none.

    Otherwise ranks with and without images disagree on which parameters take part, and DDP and ZeRO-3 wait for
    ever. The pre-hook sits on the language model: the same place in the order of modules as for a real image.
    """

    def __init__(self, model: nn.Module) -> None:
        self.active = False
        self.model = model.model
        size = model.config.vision_config.image_size
        self.shape = (1, model.config.vision_config.num_channels, size, size)
        self.model.language_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.active:
            return None
        embeds = kwargs["inputs_embeds"]
        pixels = torch.zeros(self.shape, device=embeds.device, dtype=embeds.dtype)
        features = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return args, {
            **kwargs,
            "inputs_embeds": embeds + 0.0 * torch.cat(list(features)).sum().to(embeds.dtype),
        }


class Trainer(ShardedTrainer):
    """Differs from its parent in what is specific to grounded vision-language models, see the methods.

    base: the LlavaForConditionalGeneration inside `model` (the same object when there is no adapter).
    saver: writes the loadable part of every save.
    """

    args: TrainingArguments

    def __init__(self, *, base: nn.Module, saver: RunSaver, **kwargs: Any) -> None:
        if not any(parameter.requires_grad for parameter in base.model.vision_tower.parameters()):
            freeze_tower(base)
        args: TrainingArguments = kwargs["args"]
        if args.compile_options:
            for (
                layer
            ) in base.model.language_model.layers:  # one graph serves all; parameters keep their names
                layer.compile(**args.compile_options)
        self.rows = SupervisedRows(base.lm_head)
        self.dummy = DummyImage(base)
        self.attn_implementation, self.mask_dtype = base.config._attn_implementation, base.dtype
        self.supervised: int | None = None  # of the batch whose parts are being computed
        self.saver = saver
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
        parts = inputs.get("parts") or [inputs]
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
        """Forward and backward; with `--max_tokens_per_micro_batch` part after part, gradients adding up.

        Every process computes as many parts as the one that has most: ZeRO-3 gathers weights in each.
        """
        if "parts" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        parts = list(inputs["parts"])
        parts += [nothing(self.args.device)] * (self._most(len(parts)) - len(parts))
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
        dataset: InstructionDataset = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(
            len(dataset),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            batch=self.args.train_batch_size * self.args.world_size,
            lengths=dataset.lengths() if self.args.group_by_modality_length else None,
            images=dataset.images() if self.args.share_image_prefix else None,
            micro_batch=self.args.train_batch_size,
        )

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self.args, decayed)
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self._optimizer_is_offloaded():
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                optimizer, settings = DeepSpeedCPUAdam, {k: v for k, v in settings.items() if k != "fused"}
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    # ---- saves ----

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
