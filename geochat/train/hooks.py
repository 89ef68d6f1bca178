"""What the trainer hangs on parts of the model: the positions that have a target, an image where a batch has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
