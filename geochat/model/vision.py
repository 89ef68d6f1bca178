"""The CLIP tower at another resolution: its position table is resampled once, when the model is built."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def resample_positions(table: Tensor, side: int, align_corners: bool = True) -> Tensor:
    """The position table of a square grid for a grid of `side` x `side` patches.

    table: [1 + n*n, C], the class row first. Returns [1 + side*side, C] in the same dtype; the class row is copied,
    the grid is resampled bicubically in float32. GeoChat used align_corners=True (transformers'
    `interpolate_pos_encoding` uses False, a different result) and released weights depend on it.
    Raises ValueError when the table belongs to no square grid.
    """
    grid = math.isqrt(table.shape[0] - 1)
    if grid * grid != table.shape[0] - 1 or grid == 0:
        raise ValueError(f"a position table of {table.shape[0]} rows is not one class row and a square grid")
    if side < 1:
        raise ValueError(f"a grid of {side} patches a side is no grid")
    if grid == side:
        return table.clone()
    patches = table[1:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, size=(side, side), mode="bicubic", align_corners=align_corners)
    patches = patches.permute(0, 2, 3, 1).reshape(side * side, -1)
    return torch.cat([table[:1], patches.to(table.dtype)])


def grid_side(image_size: int, patch_size: int) -> int:
    """Patches along one side. Raises ValueError when the image size is no multiple of the patch size."""
    if image_size < patch_size or image_size % patch_size:
        below = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"image size {image_size} is no multiple of the tower's patch size {patch_size}; "
            f"try {below} or {below + patch_size}"
        )
    return image_size // patch_size


def resize_config(config: Any, image_size: int) -> None:
    """Set the resolution in a LlavaConfig: `vision_config.image_size` and `image_seq_length`."""
    side = grid_side(image_size, config.vision_config.patch_size)
    config.vision_config.image_size = image_size
    config.image_seq_length = side * side


def resize_tower(model: Any, image_size: int) -> None:
    """Give a LlavaForConditionalGeneration (or a bare CLIPVisionModel) another resolution, in place."""
    llava = hasattr(model.config, "vision_config")
    tower = model.model.vision_tower if llava else model
    side = grid_side(image_size, tower.config.patch_size)
    embeddings = tower.embeddings
    old = embeddings.position_embedding
    table = resample_positions(old.weight.detach(), side)
    new = nn.Embedding(table.shape[0], table.shape[1], _weight=table)
    new.weight.requires_grad_(old.weight.requires_grad)
    embeddings.position_embedding = new
    embeddings.num_patches = side * side
    embeddings.num_positions = side * side + 1
    positions = torch.arange(side * side + 1, device=table.device).expand((1, -1))
    embeddings.register_buffer("position_ids", positions, persistent=False)
    embeddings.image_size = image_size
    tower.config.image_size = image_size
    if llava:
        resize_config(model.config, image_size)


def require_image_size(config: Any, image_size: int) -> None:
    """Raise ValueError when a tower cannot see images of this size as it stands.

    transformers swallows `interpolate_pos_encoding` for Llava and re-initialises a table of another size at random,
    so the resolution is changed by `resize_tower` or not at all.
    """
    own = config.vision_config.image_size
    if own != image_size:
        raise ValueError(
            f"the vision tower works at {own} px, not {image_size} px; "
            f"load it with image_size={image_size}, which resamples its position table"
        )


def blocks_read(config: Any) -> int:
    """How many blocks of the tower, from the first, lie before the last hidden state that the projector sees."""
    states = config.vision_config.num_hidden_layers + 1  # the embeddings are state 0
    layers = config.vision_feature_layer
    layers = layers if isinstance(layers, list | tuple) else [layers]
    for layer in layers:
        if not -states <= layer < states:
            raise ValueError(f"the tower has hidden states 0 to {states - 1}; there is no state {layer}")
    return max(layer % states for layer in layers)


def freeze_tower(model: nn.Module) -> None:
    """Take the vision tower of a Llava model (bare or inside PEFT) out of training and out of the autograd graph.

    `requires_grad_(False)` alone is not enough: `enable_input_require_grads` (called by activation checkpointing and
    by PEFT) makes the output of CLIP's patch embedding require gradients, and the whole frozen tower is recorded.
    """
    tower: Any = find_tower(model)
    tower.requires_grad_(False)
    if not hasattr(tower, "_grad_modes"):
        tower._grad_modes = []
        tower.register_forward_pre_hook(_enter_no_grad)
        tower.register_forward_hook(_leave_no_grad, always_call=True)


def find_tower(model: nn.Module) -> nn.Module:
    """The CLIP tower inside a Llava model, whether or not PEFT wraps it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "vision_tower":
            return module
    raise ValueError(f"{type(model).__name__} has no vision_tower")


def _enter_no_grad(tower: Any, _inputs: Any) -> None:
    tower._grad_modes.append(torch.is_grad_enabled())
    if not any(parameter.requires_grad for parameter in tower.parameters()):  # unless thawed again since
        torch.set_grad_enabled(False)


def _leave_no_grad(tower: Any, _inputs: Any, _output: Any) -> None:
    torch.set_grad_enabled(tower._grad_modes.pop())
