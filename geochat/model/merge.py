"""Put an adapter into its base: shard by shard, in float32, rounded once.

    python scripts/merge_lora_weights.py --model-path ADAPTER [--model-base BASE] --save-model-path OUT

One tensor of the base is in memory at a time, so a 7B model merges in a few gigabytes; the same arithmetic as PEFT's
`merge_and_unload`, except that the sum is never formed in the base's half precision.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geochat.errors import stop
from geochat.model.base import BaseRecord
from geochat.model.build import stored_dtype
from geochat.model.checkpoint import load, write_checkpoint
from geochat.model.open import open_model
from geochat.model.processor import Processor
from geochat.model.staging import recover
from geochat.model.weights import MAX_SHARD_BYTES

_PROBE_TOKENS = 24
_EXACT_PARAMETERS = 1_000_000_000  # above this a float64 copy asks for more memory than the merge itself


def merge_adapter(
    adapter: Path | str,
    base: Path | str | None,
    output: Path | str,
    dtype: torch.dtype | None = None,
    probe: bool = True,
    *,
    vision_tower: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> float:
    """Write the canonical folder of base and adapter together; returns the largest logit gap between the two.

    base, vision_tower: where the base is now; None: where the adapter says it is.
    dtype: of the merged weights; None: that of the base. probe: run both models on one image and one text; without
    it the gap is not measured (NaN), and the models are never loaded as a whole.
    Raises ValueError: wrong base (shapes or fingerprint), adapter of an unsupported kind, output not writable.
    """
    adapter, output = Path(adapter), Path(output)
    if not (adapter / "adapter_config.json").exists():
        raise ValueError(f"{adapter}: no adapter folder (it has no adapter_config.json)")
    recover(adapter)
    record = BaseRecord.read(adapter)
    for part in (adapter, base, vision_tower, record.model, record.vision_tower):
        if part and Path(part).exists() and output.exists() and output.samefile(part):
            raise ValueError(
                f"{output}: is {part}, which the merge reads; name another folder for the result"
            )
    config, state, processor = open_model(adapter, base=base, vision_tower=vision_tower)
    dtype = dtype or stored_dtype(config)
    write_checkpoint(output, config, state, processor, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return logit_gap(adapter, output, base, vision_tower, dtype) if probe else math.nan


def logit_gap(
    adapter: Path | str,
    merged: Path | str,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Largest difference of a logit between adapter and merged model, over a text with and one without an image.

    float32 weights are compared in float64 arithmetic (up to a billion parameters), so that the gap is what merging
    changed: in float32 two equal models that multiply in another order differ by 1e-5 of their largest logit already.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = []
    for path, options in ((adapter, {"base": base, "vision_tower": vision_tower}), (merged, {})):
        model, processor = load(path, dtype=dtype, device=device, **options)  # type: ignore[arg-type]
        if model.dtype == torch.float32 and model.num_parameters() < _EXACT_PARAMETERS:
            _to_float64(model)
        answers.append(_probe(model, processor, device))
        del model
    return max((a - b).abs().max().item() for a, b in zip(*answers, strict=True))


def _to_float64(model: Any) -> None:
    """Compute everything in float64, also the norms, which transformers would compute in float32."""

    def norm(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        weight = module.weight
        return functional.rms_norm(inputs[0], weight.shape, weight, module.variance_epsilon)

    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.register_forward_hook(norm)


def _probe(model: Any, processor: Processor, device: str) -> list[Tensor]:
    """Logits of the last positions of two inputs drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, len(processor.tokenizer) - 2, (1, _PROBE_TOKENS), generator=draw)
    side = processor.image_size
    pixels = torch.randn(1, 3, side, side, generator=draw).to(device, model.dtype)
    image = torch.full((1, processor.image_tokens), processor.image_token_id)
    with torch.inference_mode():
        seen = model(
            input_ids=torch.cat([image, text], 1).to(device),
            pixel_values=pixels,
            logits_to_keep=_PROBE_TOKENS,
        )
        read = model(input_ids=text.to(device), logits_to_keep=_PROBE_TOKENS)
    return [seen.logits.double().cpu(), read.logits.double().cpu()]


def main(argv: list[str] | None = None) -> int:
    """Command line of `scripts/merge_lora_weights.py`."""
    parser = argparse.ArgumentParser(description="Merge a LoRA or DoRA adapter into its base.")
    parser.add_argument("--model-path", required=True, type=Path, help="adapter folder")
    parser.add_argument("--model-base", type=Path, help="base folder, if it is not where the adapter says")
    parser.add_argument("--vision-tower", type=Path, help="CLIP folder of a base that was built from parts")
    parser.add_argument("--save-model-path", required=True, type=Path, help="folder for the merged model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the base"
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="do not compare logits (loads no whole model)"
    )
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        gap = merge_adapter(
            args.model_path,
            args.model_base,
            args.save_model_path,
            dtype,
            not args.no_probe,
            vision_tower=args.vision_tower,
        )
    except ValueError as error:
        stop(error)
    if not math.isnan(gap):
        print(f"largest logit gap between adapter and merged model: {gap:.3g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
