"""Put an adapter into its base: shard by shard, in float32, rounded once.

    python scripts/merge_lora_weights.py --model-path ADAPTER [--model-base BASE] --save-model-path OUT

One tensor of the base is in memory at a time, so a 7B model merges in a few gigabytes; the same arithmetic as PEFT's
`merge_and_unload`, except that the sum is never formed in the base's half precision.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from geochat.errors import stop
from geochat.model.build import stored_dtype
from geochat.model.checkpoint import load, write_checkpoint
from geochat.model.formats import xtuner
from geochat.model.open import open_adapter
from geochat.model.probe import largest_gap, probe_logits
from geochat.model.staging import recover
from geochat.model.weights import MAX_SHARD_BYTES, resume_key


def merge_adapter(
    adapter: Path | str,
    base: Path | str | None,
    output: Path | str,
    dtype: torch.dtype | None = None,
    probe: bool = True,
    *,
    vision_tower: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> float:
    """Write the canonical folder of base and adapter together; returns the largest logit gap between the two.

    base, vision_tower: where the base is now; None: where the adapter says it is.
    dtype: of the merged weights; None: that of the base. probe: run both models on one image and one text; without
    it the gap is not measured (NaN), and the models are never loaded as a whole. progress: show a bar by tensor.
    A merge that was killed goes on where it was when it is called again.
    Raises ValueError: wrong base (shapes or fingerprint), adapter of an unsupported kind, output not writable.
    """
    adapter, output = Path(adapter), Path(output)
    foreign = not (adapter / "adapter_config.json").exists()
    if foreign and not any((adapter / part).is_dir() for part in xtuner.PARTS):
        raise ValueError(f"{adapter}: no adapter folder (it has no adapter_config.json)")
    recover(adapter)
    opened = open_adapter(adapter, base=base, vision_tower=vision_tower)
    for part in (adapter, opened.model, opened.vision_tower):
        if part and part.exists() and output.exists() and output.samefile(part):
            raise ValueError(
                f"{output}: is {part}, which the merge reads; name another folder for the result"
            )
    config, state, processor = opened.merged()
    dtype = dtype or stored_dtype(config)
    key = resume_key(state, [adapter, opened.model, opened.vision_tower], "merged", dtype, max_shard_bytes)
    write_checkpoint(
        output,
        config,
        state,
        processor,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        resume=key,
        progress=progress,
    )
    return logit_gap(adapter, output, base, vision_tower, dtype) if probe else math.nan


def logit_gap(
    adapter: Path | str,
    merged: Path | str,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Largest difference of a logit between adapter and merged model, over a text with and one without an image."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = []
    for path, options in ((adapter, {"base": base, "vision_tower": vision_tower}), (merged, {})):
        model, processor = load(path, dtype=dtype, device=device, **options)  # type: ignore[arg-type]
        answers.append(probe_logits(model, processor))
        del model
    return largest_gap(answers[0], answers[1])


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
            progress=True,
        )
    except ValueError as error:
        stop(error)
    if not math.isnan(gap):
        print(f"largest logit gap between adapter and merged model: {gap:.3g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
