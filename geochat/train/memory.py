"""Memory of one GPU while training, in bytes, computed from shapes and settings.

States (weights, gradients, optimizer) follow from what transformers' Trainer and DeepSpeed allocate and are exact up
to padding. Activations count the tensors that autograd keeps, layer by layer; how they follow from the modules is
said at each formula. tests/train/test_plan.py holds both against a real step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from geochat.train.flops import Trained

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantisation: 4 bits, an 8-bit scale for each 64 of them, and a float32 for
each 256 scales (Dettmers et al., arXiv:2305.14314, section 3)."""


@dataclass(frozen=True)
class Setting:
    """How a run is laid out on its GPUs."""

    gpus: int
    stage: int | None = None
    """ZeRO stage; None: no DeepSpeed."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    checkpointing: bool = True
    compute_bytes: int = 2
    """Of an activation: 2 in bfloat16, 4 in float32."""
    optimizer_8bit: bool = False
    bits: int = 16
    """Of the frozen linear layers of the language model."""
    live_weights: int = 1_000_000_000
    """Weights that ZeRO-3 keeps gathered at once (`stage3_max_live_parameters`), and steps at once
    (`sub_group_size`, the same number in scripts/zero3.json)."""
    mask_bytes: int = 1
    """Of an element of a dropout mask: bool on a GPU. The CPU kernel keeps it in the type of its input."""

    def changed(self, **changes: object) -> Setting:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, in elements."""

    total: int
    trained: int
    decoder_frozen: int
    """Weights of the language model's linear layers that do not train: what `bits` quantises."""

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        named = [(name, _elements(p), p.requires_grad) for name, p in model.named_parameters()]
        return cls(
            total=sum(size for _, size, _ in named),
            trained=sum(size for _, size, trains in named if trains),
            decoder_frozen=sum(
                size
                for name, size, trains in named
                if not trains and "_proj." in name and "language_model." in name
            ),
        )


def _elements(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes: two weights of 4 bits lie in a byte
    return parameter.numel() if state is None else state.shape.numel()


@dataclass(frozen=True)
class States:
    """Bytes that stay for the whole run on one GPU, and in the main memory of its process."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Second copies: float32 weights rounded for autocast, buckets of data-parallel sums, weights that ZeRO-3
    gathers for a while."""
    step: int
    """For a moment at each optimizer step, when the activations are gone."""
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


def states(counts: Counts, trained: Trained, setting: Setting) -> States:
    """Weights, gradients and optimizer of AdamW.

    Without DeepSpeed what trains is float32 (weight, gradient, two moments: 16 bytes), and frozen weights have the
    compute type beside LoRA, float32 otherwise; autocast keeps a rounded copy of what trains. With DeepSpeed all
    weights and gradients have the compute type, and the optimizer holds a float32 copy and two moments: 12 bytes,
    shared by the GPUs (Rajbhandari et al., arXiv:1910.02054, section 3). Stage 2 shares gradients too, stage 3
    weights. At a step DeepSpeed makes float32 copies of the gradients, in stage 3 of so many at once.
    8-bit AdamW keeps the moments in one byte each.
    """
    c, n, t = setting.compute_bytes, setting.gpus, counts.trained
    deepspeed = setting.stage is not None
    moments = 2 if setting.optimizer_8bit else 8
    frozen_bytes = c if deepspeed or trained.lora_rank else 4
    trained_bytes = c if deepspeed else 4
    weights = (counts.total - t) * frozen_bytes + t * trained_bytes
    if setting.bits < 16:
        small = NF4_BYTES if setting.bits == 4 else 1.0
        weights -= round(counts.decoder_frozen * (frozen_bytes - small))
    if not deepspeed:
        rounded = t * c if c < 4 else 0
        buckets = 4 * t if n > 1 else 0
        return States(weights, 4 * t, moments * t, rounded + buckets, step=0, host=0)
    stage = setting.stage or 0
    gradients = _share(t * c, n if stage >= 2 else 1)
    optimizer = _share(t * (4 + moments), n if stage >= 1 else 1)
    buffers = host = 0
    step = 4 * _share(t, n if stage >= 1 else 1) if c < 4 else 0
    if stage >= 3:
        step = min(step, 4 * setting.live_weights)
        if n > 1 or setting.offload_weights:
            buffers = c * min(setting.live_weights, counts.total)
        weights = _share(weights, n)
    if setting.offload_optimizer:
        host += optimizer + _share(4 * t, n)  # gradients leave the GPU as they come, in float32
        optimizer = gradients = step = 0
    if setting.offload_weights and stage >= 3:
        host += weights
        weights = 0
    return States(weights, gradients, optimizer, buffers, step, host)


def _share(size: int, parts: int) -> int:
    return -(-size // parts)
