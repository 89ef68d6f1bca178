"""Floating-point operations of training, counted from the shapes of the model.

One multiply-add is two operations, so a linear layer of P weights costs 2 P for each token forward, 2 P for the
gradient of its input, and 2 P for that of its weights where these train (Kaplan et al., arXiv:2001.08361, appendix
B). Norms, activations, rotary embeddings, the optimizer and DoRA's weight norms (once a step) are left out: they are
bound by memory or below 1 %.
Attention is causal and multiplies only the half that is needed, as the fused kernels do: 2 n² × width for each layer
forward (Q Kᵀ and P V, half of 2 n² × width each), twice that backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlavaConfig

from geochat.model.vision import blocks_read


@dataclass(frozen=True)
class ModelShape:
    """The sizes that costs depend on; `width` is heads × size of a head."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    width: int
    kv_width: int
    vocabulary: int
    tower_hidden: int
    tower_ffn: int
    tower_blocks: int
    tower_read: int
    """Blocks whose output reaches the projector: 23 of CLIP-L's 24 for layer -2."""
    tower_heads: int
    patches: int
    patch_weights: int
    """Weights of one output channel of the patch embedding."""
    feature_layers: int
    """Hidden states of the tower that the projector sees, concatenated."""

    @classmethod
    def of(cls, config: LlavaConfig) -> ModelShape:
        text, tower, layers = config.text_config, config.vision_config, config.vision_feature_layer
        layers = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        head = text.head_dim or text.hidden_size // text.num_attention_heads
        return cls(
            hidden=text.hidden_size,
            ffn=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            width=head * text.num_attention_heads,
            kv_width=head * text.num_key_value_heads,
            vocabulary=text.vocab_size,
            tower_hidden=tower.hidden_size,
            tower_ffn=tower.intermediate_size,
            tower_blocks=tower.num_hidden_layers,
            tower_read=blocks_read(config),
            tower_heads=tower.num_attention_heads,
            patches=(tower.image_size // tower.patch_size) ** 2,
            patch_weights=tower.num_channels * tower.patch_size**2,
            feature_layers=len(layers),
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        h, f, q, kv = self.hidden, self.ffn, self.width, self.kv_width
        return [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]

    @property
    def decoder_weights(self) -> int:
        """Weights of all linear layers of the decoder, without embeddings and output layer."""
        return self.layers * sum(i * o for i, o in self.linears)

    def adapter_weights(self, rank: int) -> int:
        """Weights of A [rank, in] and B [out, rank] beside every linear layer of the decoder."""
        return self.layers * rank * sum(i + o for i, o in self.linears)

    @property
    def projector_weights(self) -> int:
        return self.feature_layers * self.tower_hidden * self.hidden + self.hidden**2


@dataclass(frozen=True)
class Trained:
    """What gets gradients."""

    lora_rank: int = 0
    """0: no adapters."""
    lora_dropout: float = 0.0
    dora: bool = False
    language_model: bool = False
    projector: bool = False
    tower_from: int | None = None
    """First block of the tower that trains; None: the tower is frozen."""


@dataclass(frozen=True)
class Load:
    """One micro-batch as the model sees it; one sample of n positions is `Load(1, n, 1, targets)`."""

    rows: int
    length: int
    """Positions of every row, image placeholders and padding included."""
    images: int
    supervised: int
    """Positions that reach the output layer, over all rows."""
    causal: bool = True
    """False: rows of several samples under a mask, which SDPA multiplies in full."""


@dataclass(frozen=True)
class Work:
    """Operations. `useful` is what the mathematics asks for; `repeated` is computed a second time or for nothing."""

    forward: float
    backward: float
    repeated: float

    @property
    def useful(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.forward + self.backward + self.repeated


def tower_block(shape: ModelShape) -> int:
    """One block of the tower on one image, forward; its attention is not causal: 4 n² × hidden."""
    n = shape.patches + 1
    weights = 4 * shape.tower_hidden**2 + 2 * shape.tower_hidden * shape.tower_ffn
    return 2 * n * weights + 4 * n * n * shape.tower_hidden


def tower_forward(shape: ModelShape) -> int:
    """One image through patch embedding and the blocks that are read."""
    patches = 2 * shape.patches * shape.patch_weights * shape.tower_hidden
    return patches + shape.tower_read * tower_block(shape)


def work(shape: ModelShape, trained: Trained, load: Load, *, checkpointing: bool) -> Work:
    """One micro-batch. checkpointing: decoder layers, and blocks of a tower that trains, run forward twice."""
    positions, images = load.rows * load.length, load.images
    linear = 2 * positions * shape.decoder_weights
    adapters = 2 * positions * shape.adapter_weights(trained.lora_rank)
    attention = (2 if load.causal else 4) * positions * load.length * shape.width * shape.layers
    head = 2 * load.supervised * shape.hidden * shape.vocabulary
    projector = 2 * images * shape.patches * shape.projector_weights
    tower = images * tower_forward(shape)
    forward = linear + adapters + attention + head + projector + tower

    # The gradient of the input passes through every decoder layer, whatever trains: the first adapter, the projector
    # and the tower all lie below.
    both = 2 if trained.language_model else 1
    backward = both * (linear + head) + 2 * adapters + 2 * attention
    tower_trains = trained.tower_from is not None
    if trained.projector or tower_trains:
        first = 2 * images * shape.patches * shape.feature_layers * shape.tower_hidden * shape.hidden
        inputs = projector if tower_trains else projector - first
        backward = backward + inputs + (projector if trained.projector else 0)
    if trained.tower_from is not None:
        backward = backward + 2 * images * (shape.tower_read - trained.tower_from) * tower_block(shape)

    decoder = linear + adapters + attention
    repeated: float = (
        images * (shape.tower_blocks - shape.tower_read) * tower_block(shape)
    )  # run, but not read
    if checkpointing:
        repeated = repeated + decoder
        if tower_trains:
            repeated = repeated + images * shape.tower_read * tower_block(shape)
    return Work(forward, backward, repeated)
