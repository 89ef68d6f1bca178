"""DoRA with the norm of every weight computed once in an optimizer step.

An output of a DoRA layer is m / ‖W + s B A‖ times that of W + s B A, row by row; the norm is a constant for the gradient
(Liu et al., arXiv:2402.09353, section 4.3), so it stays the same until A or B change. PEFT computes it in every forward
pass, and again in the recomputed one. With dropout PEFT sends the dropped input through W a second time; here dropout
acts on the update alone, as in LoRA, whose expectation is the same. Without dropout, and in evaluation, outputs are
PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


class DoraLayer(DoraLinearLayer):
    """PEFT's layer of magnitudes, under the same name in the state; in evaluation it is PEFT's own."""

    def __init__(self, magnitude: nn.Parameter) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = magnitude  # [out]
        self.norm: Tensor | None = None  # float32[out], while `geochat.train.norms` holds it

    def forward(self, x: Tensor, *, base_result: Tensor | None = None, **parts: Any) -> Tensor:
        """In training: the output itself, from x [..., in], dropped out, and W x + bias [..., out]."""
        if not self.training or base_result is None:
            return super().forward(x, base_result=base_result, **parts)
        lora_a, lora_b, scaling, base = (
            parts[name] for name in ("lora_A", "lora_B", "scaling", "base_layer")
        )
        norm = weight_norm(base, lora_a, lora_b, scaling) if self.norm is None else self.norm
        scale, low = self.weight / norm, lora_a(x) * scaling
        if base.bias is None:
            return lora_b(low, onto=base_result) * scale
        return lora_b(low, onto=base_result - base.bias) * scale + base.bias


class DoraVariant(DoraLinearVariant):
    """What PEFT's linear layer asks for its output; merging is PEFT's."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if not module.training:
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        return module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result,
        )


@torch.no_grad()
def weight_norm(base_layer: nn.Module, lora_a: nn.Module, lora_b: nn.Module, scaling: float) -> Tensor:
    """‖W + scaling B A‖ of every row: float32[out]."""
    weight = dequantize_module_weight(base_layer)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), lora_b.weight.float(), lora_a.weight.float(), alpha=scaling).norm(
            dim=1
        )


def use_held_norms(model: nn.Module) -> None:
    """Replace PEFT's DoRA layers by ours, in place; parameters and their names stay.

    Their B must add: after `geochat.model.lora.use_fewer_passes`.
    """
    for layer in dora_layers(model):
        for name, magnitudes in layer.lora_magnitude_vector.items():
            layer.lora_magnitude_vector[name] = DoraLayer(magnitudes.weight)
            layer.lora_variant[name] = DoraVariant()


def dora_layers(model: nn.Module) -> Iterator[Any]:
    """PEFT's linear layers that have magnitudes."""
    for module in model.modules():
        if len(getattr(module, "lora_magnitude_vector", None) or ()):
            yield module
