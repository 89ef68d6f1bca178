"""What autograd keeps between forward and backward, in bytes, counted module by module.

The counts follow transformers' Llama and CLIP and PEFT's LoRA as they are run here: fused attention without a mask,
no fused kernels beside it, logits at supervised positions only.
"""

from __future__ import annotations

from dataclasses import dataclass

from geochat.train.flops import Load, ModelShape, Trained
from geochat.train.memory import Setting


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one GPU."""

    decoder: int
    """Kept by the decoder layers: everything, or with checkpointing the input of each."""
    tail: int
    """Behind them: final norm, and log-probabilities [supervised, vocabulary] in float32."""
    vision: int
    """Kept by projector and tower where these train."""
    inputs: int
    """Pixels, ids and labels as they come from the loader."""
    passing: int
    """The most that lives for a moment beside all this: a layer that is recomputed and its gradients, or the
    gradients of the logits."""
    frozen_tower: int
    """What a tower that does not train holds before the decoder begins; gone when it does."""

    @property
    def kept(self) -> int:
        """What autograd holds when the backward pass begins."""
        return self.decoder + self.tail + self.vision

    @property
    def peak(self) -> int:
        return self.inputs + max(self.kept + self.passing, self.frozen_tower)


def activations(shape: ModelShape, trained: Trained, setting: Setting, load: Load) -> Activations:
    """Of one micro-batch on one GPU."""
    c, positions = setting.compute_bytes, load.rows * load.length
    pictures, targets = load.images, load.supervised
    stream = _stream_bytes(trained, setting)
    layer = positions * decoder_layer(shape, trained, setting)
    if setting.checkpointing:
        decoder = positions * shape.layers * stream * shape.hidden
    else:
        decoder = shape.layers * layer
    tail = positions * 4 * shape.hidden + targets * 4 * shape.vocabulary
    if trained.language_model:  # normalised values for the norm's weight, rows for the output layer's
        tail += positions * stream * shape.hidden + targets * c * shape.hidden
    backward = positions * 4 * c * shape.ffn + (layer if setting.checkpointing else 0)
    logits = targets * (4 + c) * shape.vocabulary
    inputs = 4 * pictures * shape.patches * shape.patch_weights + 2 * 8 * positions
    rows = pictures * (shape.patches + 1)
    return Activations(
        decoder=decoder,
        tail=tail,
        vision=pictures * vision(shape, trained, setting),
        inputs=inputs,
        passing=max(backward, logits),
        frozen_tower=rows * c * ((shape.tower_blocks + 1) * shape.tower_hidden + 2 * shape.tower_ffn),
    )


def _mixed(setting: Setting) -> bool:
    """Autocast: float32 weights that train, rounded when they are used."""
    return setting.stage is None and setting.compute_bytes < 4


def _stream_bytes(trained: Trained, setting: Setting) -> int:
    """Of an element of the residual stream: float32 under autocast when the embeddings are."""
    return 4 if _mixed(setting) and not trained.lora_rank else setting.compute_bytes


def decoder_layer(shape: ModelShape, trained: Trained, setting: Setting) -> int:
    """Bytes for each position that one decoder layer keeps."""
    h, f, c = shape.hidden, shape.ffn, setting.compute_bytes
    # RMSNorm computes on a float32 copy of its input, and keeps it for the square and for the product.
    kept = 2 * 4 * h
    # Attention: q, k, v after rotation, the output, one float32 log-sum for each head.
    kept += c * (2 * shape.width + 2 * shape.kv_width) + 4 * shape.heads
    # silu(gate) × up: gate for silu, both factors for the product.
    kept += 3 * c * f
    if trained.lora_rank:
        if trained.lora_dropout:  # every adapter drops by itself: its own input and mask
            kept += (c + setting.mask_bytes) * sum(i for i, _ in shape.linears)
        elif _mixed(setting):  # every adapter rounds its own input
            kept += c * sum(i for i, _ in shape.linears)
        else:  # q, k and v share theirs, gate and up too; o shares the output of attention
            kept += c * (2 * h + f)
        kept += c * trained.lora_rank * len(shape.linears)
        if trained.dora:  # the sum of weight's and adapter's results, which the magnitudes multiply
            kept += c * sum(o for _, o in shape.linears)
    elif trained.language_model:
        # Inputs of the linear layers, rounded apart for each under autocast; o shares the output of attention.
        kept += c * (5 * h + f) if _mixed(setting) else c * (2 * h + f)
        kept += 2 * _stream_bytes(trained, setting) * h  # normalised values for the weights of the norms
    return kept


def vision(shape: ModelShape, trained: Trained, setting: Setting) -> int:
    """Bytes for each image that projector and tower keep."""
    c, d, f = setting.compute_bytes, shape.tower_hidden, shape.tower_ffn
    tower_trains = trained.tower_from is not None
    projector = 0
    if trained.projector:  # both inputs, and that of the GELU
        projector = c * (shape.feature_layers * d + 2 * shape.hidden)
    elif tower_trains:
        projector = c * shape.hidden
    kept = shape.patches * projector
    if trained.tower_from is None:
        return kept
    mixed = _mixed(setting)
    stream = 4 if mixed else c
    if trained.tower_from == 0:  # the patch embedding keeps the pixels, the norm behind it its input
        kept += shape.patches * (c * shape.patch_weights + 2 * stream * d)
    # Per position: inputs of both norms; those of q, k, v and fc1; q, k, v and the output of attention with one
    # log-sum for each head; x and its sigmoid for the quick GELU, and the input of fc2.
    block = 2 * stream * d + (4 if mixed else 2) * c * d + 4 * c * d + 4 * shape.tower_heads + 3 * c * f
    if setting.checkpointing:
        return kept + (shape.patches + 1) * shape.tower_read * stream * d
    return kept + (shape.patches + 1) * (shape.tower_read - trained.tower_from) * block
