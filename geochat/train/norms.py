"""DoRA's weight norms, computed when an optimizer step begins and held until it ends."""

from __future__ import annotations

from typing import Any

from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import TrainerCallback

from geochat.model.dora import dora_layers, weight_norm


class StepNorms(TrainerCallback):
    """Every micro-batch of a step, and every layer that is recomputed, finds the norms of the step's weights.

    Outside a step none are held: the weights may then come from anywhere.
    """

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for layer in dora_layers(model):
            base = layer.get_base_layer()
            for name, dora in layer.lora_magnitude_vector.items():
                a, b = layer.lora_A[name], layer.lora_B[name]
                with gather_params_ctx([base.weight, a.weight, b.weight], modifier_rank=None):  # ZeRO-3
                    dora.norm = weight_norm(base, a, b, layer.scaling[name])

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for layer in dora_layers(model):
            for dora in layer.lora_magnitude_vector.values():
                dora.norm = None
