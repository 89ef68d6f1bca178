"""The two-layer projector by itself: made fresh, or read from a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig

from geochat.model.formats.llava import from_projector
from geochat.model.weights import State, of_tensor, open_file


def read_projector(path: Path) -> State:
    """Canonical names of a projector file, or of the one in a folder."""
    if path.is_dir():
        names = ("mm_projector.safetensors", "mm_projector.bin", "model.safetensors", "pytorch_model.bin")
        files = [path / name for name in names if (path / name).exists()]
        if not files:
            raise ValueError(f"{path}: has no {' or '.join(names)}")
        path = files[0]
    if not path.exists():
        raise ValueError(f"{path}: no such projector file")
    return from_projector(open_file(path), str(path))


def fresh_projector(config: LlavaConfig, seed: int) -> State:
    """PyTorch's default initialisation of two linear layers, from a seed of its own."""
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    hidden = config.text_config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linears = {"linear_1": nn.Linear(width, hidden), "linear_2": nn.Linear(hidden, hidden)}
    return {
        f"multi_modal_projector.{name}.{part}": of_tensor(tensor)
        for name, linear in linears.items()
        for part, tensor in linear.state_dict().items()
    }
