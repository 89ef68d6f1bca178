"""Arguments of training: LLaVA's flag names, GeoChat's recipe as defaults."""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.hf_argparser import string_to_bool
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from geochat.model.weights import read_json
from geochat.train.batch_size import accumulation_for
from geochat.train.machine import (
    check_liger,
    check_quantisation,
    configure_deepspeed_on_cpu,
    configure_fsdp_on_cpu,
)

TEMPLATE_NAMES = {"v1": "vicuna_v1"}
"""LLaVA's `--version` names that differ from ours."""

BF16_ON_CPU = False
"""CPUs compute bfloat16 correctly but slowly; tests switch it on to take the path that GPUs take."""

IMAGE_MODES: dict[str, Literal["pad", "crop"]] = {"pad": "pad", "square": "crop", "crop": "crop"}
"""LLaVA's `--image_aspect_ratio` → what the processor does."""


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = None
    """Folder of a model of ours or of llava-hf layout, of an LLM (then `--vision_tower` too), or of LLaVA-1.5."""
    vision_tower: str | None = None
    """CLIP folder, when the model folder does not hold the tower."""
    pretrain_mm_mlp_adapter: str | None = None
    """Projector file (`mm_projector.bin` or safetensors) that replaces the model's own."""
    version: str | None = None
    """Chat template; default: the checkpoint's own, or for a model built from parts the one that the language model's
    special tokens are made for (`vicuna_v1` where it has none)."""
    image_size: int | None = None
    """Pixels per side. Default: the folder's own, or 504 for a model built from parts."""
    mm_vision_select_layer: list[int] | None = None
    """Hidden state of the tower that the projector sees, or several, joined. Default: what the model folder says, or
    -2."""
    mm_projector_type: str = "mlp2x_gelu"
    mm_use_im_start_end: bool = False
    attn_implementation: str = "sdpa"
    tune_mm_mlp_adapter: bool = False
    """With LoRA: train the projector too. Without: train nothing but the projector (LLaVA's first stage)."""
    freeze_mm_mlp_adapter: bool = False
    freeze_backbone: bool = False
    """Without LoRA: keep the language model as it is."""
    tune_vision_tower: bool = False
    tune_vit_from_layer: int | None = None
    """With `--tune_vision_tower`: first CLIP block that trains, counted from 0; default, and -1: all."""

    def projector_is_frozen(self, lora: bool) -> bool:
        """Whether the flags leave the projector as it is."""
        return self.freeze_mm_mlp_adapter or (lora and not self.tune_mm_mlp_adapter)

    @property
    def feature_layer(self) -> int | list[int] | None:
        """`--mm_vision_select_layer` as transformers wants it."""
        layers = self.mm_vision_select_layer
        return layers[0] if layers is not None and len(layers) == 1 else layers

    def __post_init__(self) -> None:
        if self.tune_vit_from_layer == -1:
            self.tune_vit_from_layer = None
        if self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: the folder of the model to start from")
        if self.mm_projector_type != "mlp2x_gelu":
            raise ValueError(f"--mm_projector_type {self.mm_projector_type}: only mlp2x_gelu exists")
        if self.mm_use_im_start_end:
            raise ValueError("--mm_use_im_start_end True is not supported: no released checkpoint uses it")
        self.version = TEMPLATE_NAMES.get(self.version or "", self.version)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] | None = None
    """Instruction file, JSON or JSONL; or several; or a mixture file, YAML (docs/training.md)."""
    image_folder: list[str] | None = None
    """Folder of the images; or one for each file of `--data_path`."""
    data_weights: list[float] | None = None
    """How often each file of `--data_path` is seen in an epoch; 0.5 takes a half of it. Default: once."""
    eval_data_path: str | None = None
    """Instruction file, or mixture file, to validate on at every evaluation (`--eval_steps N`)."""
    val_share: float | None = None
    """Hold this share of the rows out, no picture of theirs in training, and validate on them."""
    image_aspect_ratio: str = "pad"
    on_bad_sample: Literal["skip", "error"] = "error"
    """A record that cannot be used (image missing or corrupt, malformed, nothing to learn, text too long):
    stop with its name, or take the next one instead, name it and count it."""
    truncate_text: bool = False
    """Cut texts above `--model_max_length` as the originals do, instead of treating them as bad samples."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ValueError("--data_path is missing: the instruction file (JSON or JSONL)")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise ValueError(f"--val_share {self.val_share:g}: a share lies between 0 and 1")
        if self.val_share is not None and self.eval_data_path:
            raise ValueError("--val_share and --eval_data_path are two ways to validate: give one")
        if self.image_aspect_ratio not in IMAGE_MODES:
            raise ValueError(
                f"--image_aspect_ratio {self.image_aspect_ratio}: choose one of {', '.join(IMAGE_MODES)}"
            )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; everything of transformers' own arguments, plus LLaVA's and ours."""

    output_dir: str = ""
    preset: str | None = None
    """Name of a published recipe, whose values then stand in for the defaults; see docs/training.md."""
    lora_enable: bool = True
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    use_dora: bool = False
    bits: int = 16
    """4 or 8: quantise the language model (tower, projector and lm_head stay whole), with LoRA on top."""
    double_quant: bool = True
    quant_type: str = "nf4"
    vision_lora_r: int = 0
    """Rank of LoRA in the blocks of the vision tower that the projector sees; 0: none there."""
    vision_lora_alpha: int = 16
    learning_rate: float = 2e-4
    mm_projector_lr: float | None = None
    """Learning rate of the projector; default: `--learning_rate`."""
    vision_tower_lr: float | None = None
    """Learning rate of the vision tower; default: `--learning_rate`."""
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    """Below 1: share of all steps."""
    weight_decay: float = 0.0
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    global_batch_size: int | None = None
    """Samples per optimizer step over all processes; the accumulation that reaches it is derived."""
    loss_normalization: Literal["micro_batch", "token"] = "micro_batch"
    """`micro_batch`: mean over the tokens of each micro-batch, as LLaVA and GeoChat do; `token`: over the step."""
    model_max_length: int = 2048
    """Text tokens kept per sample; the image tokens come on top."""
    group_by_modality_length: bool = False
    """Batches of similar length, image and text-only samples apart."""
    share_image_prefix: bool = False
    """Samples of one image share its tokens: each image is seen once per micro-batch. The loss and gradients of a
    micro-batch are the same; which samples meet in one is not, since those of an image are brought together."""
    max_tokens_per_micro_batch: int | None = None
    """Compute a micro-batch in parts of at most so many tokens (image tokens and padding included). Memory then follows
    this and not `--per_device_train_batch_size`; loss and gradients are the same."""
    packing: bool = False
    """Fill rows with several samples instead of padding each to the longest; none sees another."""
    eval_benchmark: list[str] | None = None
    """Benchmarks to score at every evaluation: names, or .toml files (docs/evaluate.md)."""
    eval_benchmark_limit: int | None = None
    """Ask only the first questions of each."""
    eval_dialogues: int = 4
    """Validation records that the model is asked at every evaluation, for a page with their boxes drawn."""
    allow_changed_data: bool = False
    """Resume although the data, or the order in which they are drawn, are not those of the checkpoint."""
    bf16: bool = True
    """Where the hardware has it; float32 otherwise."""
    gradient_checkpointing: str = field(  # type: ignore[assignment]
        default="True", metadata={"nargs": "?", "const": "True"}
    )
    """Compute activations a second time for the backward pass instead of keeping them: `True`, `False`, or `auto`: where
    the memory that is free when training begins would not hold them."""
    logging_steps: float = 10
    save_steps: float = 500
    save_total_limit: int | None = 2
    logging_nan_inf_filter: bool = False
    """A loss that is no number ends the run instead."""
    report_to: str = "none"
    overwrite_output_dir: bool = False
    """Delete the checkpoints of an earlier run in `--output_dir` instead of refusing to start."""
    remove_unused_columns: bool = False
    dataloader_num_workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    dry_run: bool = False
    """Print what the run would do, need and cost, and end; reads no weights and no images, and needs no GPU."""
    plan_gpus: int | None = None
    """With `--dry_run`: GPUs of the run; default: the processes started."""
    plan_gpu: Literal["a100-40g", "a100-80g", "h100-80g", "h200-141g"] | None = None
    """With `--dry_run`: the GPU that must hold the run; default: any of these."""
    plan_rows: int = 2000
    """With `--dry_run`: rows to tokenise at most, for each order of samples; 0: all."""
    plan_json: str | None = None
    """With `--dry_run`: file to write the plan to."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []  # one line for each request that this machine cannot honour
        if not self.output_dir:
            raise ValueError("--output_dir is missing: the folder of this run")
        check_quantisation(self)
        self.checkpointing_is_open = str(self.gradient_checkpointing).lower() == "auto"
        self.checkpointing_reason = ""
        self.gradient_checkpointing = self.checkpointing_is_open or _boolean(  # type: ignore[assignment]
            "--gradient_checkpointing", self.gradient_checkpointing
        )
        if str(self.fsdp).lower() in ("true", "false"):
            self.fsdp = str(self.fsdp).lower() == "true"
        if self.fsdp:
            self._configure_fsdp()
        if self.load_best_model_at_end and (self.deepspeed or self.fsdp):
            raise ValueError(
                "--load_best_model_at_end goes neither with --deepspeed nor with --fsdp: the best checkpoint is kept, "
                "use its folder"
            )
        self.zero_configuration: dict[str, Any] = {}
        planned_deepspeed = self._set_deepspeed_aside() if self.dry_run else None
        if self.deepspeed and "RANK" not in os.environ:
            raise ValueError("--deepspeed needs a launcher: start with torchrun or deepspeed")
        self.gradient_accumulation_steps = accumulation_for(
            self.global_batch_size,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            self._processes(),
        )
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 and not ((cuda and is_torch_bf16_gpu_available()) or BF16_ON_CPU or self.dry_run):
            self.bf16 = False
            self.notes.append("no bfloat16 hardware here: training in float32")
        if self.tf32 and not is_torch_tf32_available():
            self.tf32 = None
            self.notes.append("no TF32 hardware here: --tf32 has no effect")
        check_liger(self, cuda)
        self._take_over_compilation()
        if not cuda:
            self.use_cpu = True
            self.dataloader_pin_memory = False
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other
            if self.deepspeed:
                configure_deepspeed_on_cpu(self)
            elif self.fsdp:
                configure_fsdp_on_cpu(self)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trainable parameter is used in every batch
        with warnings.catch_warnings():  # the new name of the flag is missing in transformers 5.16
            warnings.simplefilter("ignore", FutureWarning)
            super().__post_init__()
        if planned_deepspeed is not None:
            self.deepspeed = planned_deepspeed
        elif self.deepspeed:
            self.zero_configuration = self.hf_deepspeed_config.config.get("zero_optimization", {})
        for name in self.report_to:
            if find_spec(name) is None:
                raise ValueError(f"--report_to {name}: not installed here (pip install {name})")
        if self.n_gpu > 1:
            self._n_gpu = 1
            self.notes.append(
                "one process uses one GPU: launch with torchrun or deepspeed to use all of them"
            )

    def recompute(self, again: bool, reason: str) -> None:
        """What `--gradient_checkpointing auto` came to, and the numbers it rests on."""
        self.gradient_checkpointing, self.checkpointing_reason = again, reason  # type: ignore[assignment]
        if hasattr(self, "activation_checkpointing"):  # the name from transformers 5.23 on
            self.activation_checkpointing = again

    def _take_over_compilation(self) -> None:
        """torch.compile for each decoder layer, by the trainer; the parent would compile the whole model."""
        self.compile_options: dict[str, Any] | None = None
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            if self.deepspeed or self.fsdp:
                raise ValueError(
                    "--torch_compile goes neither with --deepspeed nor with --fsdp: leave one out"
                )
            backend = self.torch_compile_backend or "inductor"
            self.compile_options = {"backend": backend, "mode": self.torch_compile_mode, "dynamic": True}
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None

    def _processes(self) -> int:
        """Of the run, or of the run that is planned."""
        if not self.dry_run or self.plan_gpus is None:
            return int(os.environ.get("WORLD_SIZE", "1"))
        if self.plan_gpus < 1:
            raise ValueError(f"--plan_gpus {self.plan_gpus}: a run needs at least one")
        return self.plan_gpus

    @property
    def world_size(self) -> int:
        return self._processes() if self.dry_run else super().world_size

    def _set_deepspeed_aside(self) -> str | None:
        """A plan is made for other machines: DeepSpeed's file is read, and nothing of DeepSpeed is started."""
        path: str | None = self.deepspeed
        if path:
            self.zero_configuration = read_json(Path(path)).get("zero_optimization", {})
        self.deepspeed = None  # type: ignore[assignment]
        return path

    @property
    def samples_per_step(self) -> int:
        """Of an optimizer step, over all processes: the global batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def order_seed(self) -> int:
        """What the order of samples, fractions of files and the validation split are drawn with."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def quantization(self) -> Literal["4bit", "8bit"] | None:
        """`--bits` as the model floor wants it."""
        return {4: "4bit", 8: "8bit"}.get(self.bits)  # type: ignore[return-value]

    def _configure_fsdp(self) -> None:
        """FSDP2, one unit for each block of the language model and of the tower, unless `--fsdp_config` says otherwise."""
        if self.deepspeed or self.bits < 16:
            raise ValueError("--fsdp goes neither with --deepspeed nor with --bits: leave one out")
        if self.dry_run:
            raise ValueError(
                "--dry_run does not count FSDP: plan with --deepspeed scripts/zero3.json instead"
            )
        if "RANK" not in os.environ:
            raise ValueError("--fsdp needs a launcher: start with torchrun")
        if self.fsdp_config is None:
            self.fsdp_config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"]}


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def _boolean(flag: str, value: object) -> bool:
    try:
        return string_to_bool(value)
    except ArgumentTypeError:
        raise ValueError(f"{flag} {value}: choose True, False or auto") from None
