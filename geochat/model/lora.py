"""LoRA layers with fewer passes over their outputs while training.

PEFT forms B A x, scales it and adds it to W x: three tensors as wide as the output, and one more for the gradient. Here
the few columns of A x are scaled, and their product with B is added to W x as it is formed. Under autocast PEFT also
makes a float32 copy of x, for adapters of that type, only to have it rounded again for the product; that is left out. In
evaluation the layers are PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class LoraLinear(lora.Linear):
    """PEFT's linear layer with LoRA or DoRA; its parameters, their names and its merging are PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [batch, n, in] → [batch, n, out]."""
        names = self.active_adapters
        if not self.training or self.disable_adapters or self.merged or args or kwargs or len(names) != 1:
            return super().forward(x, *args, **kwargs)
        name = names[0]
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        if name in self.lora_variant:
            changed = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
            return changed.to(result.dtype)
        low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        return self.lora_B[name](low, onto=result)


class AddingLinear(nn.Linear):
    """A linear layer without bias that can add its result to another tensor within the product.

    A module, not a function of its weight: ZeRO-3 and FSDP bring weights together where a module is called.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, low: Tensor, onto: Tensor | None = None) -> Tensor:
        """low: [batch, n, in]; onto: [batch, n, out] or None."""
        if onto is None:
            return super().forward(low)
        if onto.dim() != 3 or low.dtype != onto.dtype:
            return (onto + super().forward(low)).to(onto.dtype)
        return torch.baddbmm(onto, low, self.weight.t().expand(len(onto), -1, -1))


def use_fewer_passes(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers into ours, in place. Of quantised layers, which are other classes, only B changes."""
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer) and all(up.bias is None for up in layer.lora_B.values()):
            for name, up in layer.lora_B.items():
                layer.lora_B[name] = AddingLinear(up.weight)
            if type(layer) is lora.Linear:
                layer.__class__ = LoraLinear
