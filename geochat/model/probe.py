"""Two models that should be one: how far their logits are apart on the same image and text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geochat.model.processor import Processor

_TOKENS = 24
_EXACT_PARAMETERS = 1_000_000_000  # above this a float64 copy asks for more memory than the work itself


def probe_logits(model: Any, processor: Processor) -> list[Tensor]:
    """Logits [1, 24, vocabulary] in float64 on the CPU: of a text after an image, and of the text alone. Both are drawn
    from a fixed seed.

    A float32 model of up to a billion parameters computes in float64 and stays so, so that a gap is one of the weights:
    in float32 two equal models that multiply in another order differ by 1e-5 of their largest logit already.
    """
    if model.dtype == torch.float32 and model.num_parameters() < _EXACT_PARAMETERS:
        _to_float64(model)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, len(processor.tokenizer) - 2, (1, _TOKENS), generator=draw)
    side = processor.image_size
    pixels = torch.randn(1, 3, side, side, generator=draw).to(model.device, model.dtype)
    image = torch.full((1, processor.image_tokens), processor.image_token_id)
    with torch.inference_mode():
        seen = model(
            input_ids=torch.cat([image, text], 1).to(model.device),
            pixel_values=pixels,
            logits_to_keep=_TOKENS,
        )
        read = model(input_ids=text.to(model.device), logits_to_keep=_TOKENS)
    return [seen.logits.double().cpu(), read.logits.double().cpu()]


def largest_gap(one: list[Tensor], other: list[Tensor], columns: int | None = None) -> float:
    """Largest difference of two results of `probe_logits`, over the first `columns` words of the vocabulary."""
    return max((a - b)[..., :columns].abs().max().item() for a, b in zip(one, other, strict=True))


def _to_float64(model: Any) -> None:
    """Compute everything in float64, also the norms, which transformers would compute in float32."""

    def norm(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        weight = module.weight
        return functional.rms_norm(inputs[0], weight.shape, weight, module.variance_epsilon)

    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.register_forward_hook(norm)
