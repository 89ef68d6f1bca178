"""What a checkpoint folder is: layout, parts, sizes, resolution, template, and what is missing of it on this disk.

    python -m geochat.model.inspect FOLDER [--model-base DIR] [--vision-tower DIR]

Reads headers and configuration, no weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from geochat.errors import stop
from geochat.model.base import FILE as BASE_FILE
from geochat.model.formats import xtuner
from geochat.model.open import Opened, open_model, recognise
from geochat.model.weights import State, open_files, open_weights, read_json

KINDS = {
    "canonical": "model, canonical layout (llava-hf)",
    "adapter": "adapter",
    "llava": "model, LLaVA's original layout",
    "llm": "language model alone",
    "clip": "vision tower alone",
    "xtuner": "XTuner's converted folder",
    "projector": "projector alone (first stage)",
    "pth": "XTuner's training checkpoint",
    "gguf": "model, GGUF files (llama.cpp)",
}
PARTS = {
    "language_model.": "language model",
    "vision_tower.": "vision tower",
    "multi_modal_projector.": "projector",
}

Rows = list[tuple[str, str]]


def describe(
    path: Path, base: Path | None = None, vision_tower: Path | None = None
) -> tuple[Rows, str | None]:
    """Lines (what, value), and why the model cannot be put together on this disk (None: it can)."""
    kind = recognise(path)
    rows: Rows = [("kind", KINDS[kind])]
    if kind == "adapter":
        rows += _adapter(path)
    if kind == "pth":
        return _training_checkpoint(path, rows)
    if kind in ("llm", "clip", "projector"):
        files = sorted(path.glob("mm_projector.*"))
        return rows + _sizes(
            open_files(files) if kind == "projector" else open_weights(path), {"": "weights"}
        ), None
    try:
        opened = open_model(path, base=base, vision_tower=vision_tower)
    except ValueError as error:
        return rows, str(error)
    return rows + _model(opened), None


def _adapter(path: Path) -> Rows:
    config = read_json(path / "adapter_config.json")
    dora = config.get("peft_type") == "DORA" or config.get("use_dora")
    ours = (path / BASE_FILE).exists()
    named = read_json(path / BASE_FILE)["model"] if ours else config.get("base_model_name_or_path")
    return [
        (
            "adapter",
            f"{'DoRA' if dora else 'LoRA'}, rank {config.get('r')}, alpha {config.get('lora_alpha')}",
        ),
        ("written by", "geochat" if ours else "another program"),
        ("base", str(named)),
    ]


def _training_checkpoint(path: Path, rows: Rows) -> tuple[Rows, str | None]:
    try:
        tensors = xtuner.training_tensors(path)
    except ValueError as error:
        return rows, str(error)
    names = {"llm.": "language model", "visual_encoder.": "vision tower", "projector.": "projector"}
    return rows + _sizes(tensors, names), "convert it with scripts/convert_checkpoint.py --model-base BASE"


def _model(opened: Opened) -> Rows:
    config, state, processor = opened
    text, vision = config.text_config, config.vision_config
    return [
        *_sizes(state, PARTS),
        ("language model is", f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.vocab_size} rows"),
        ("vision tower is", f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, patch {vision.patch_size}"),
        ("features", f"of hidden state {config.vision_feature_layer}, class token dropped"),
        ("image", f"{vision.image_size} px, {processor.image_tokens} tokens, {processor.image_mode}"),
        ("template", processor.template.name),
        ("tokenizer", f"{len(processor.tokenizer)} tokens, tokenizer.model {'in' if processor.sentencepiece else 'not in'} it"),
    ]  # fmt: skip


def _sizes(state: State, parts: dict[str, str]) -> Rows:
    rows: Rows = []
    for prefix, name in parts.items():
        own = [entry for key, entry in state.items() if key.startswith(prefix)]
        count = sum(math.prod(entry.shape) for entry in own)
        dtypes = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in own}))
        size = sum(entry.nbytes for entry in own) / 1e6
        rows.append((name, f"{len(own)} tensors, {count:,} parameters, {dtypes}, {size:,.1f} MB"))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m geochat.model.inspect", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--model-base", type=Path, help="base of an adapter, where not where the adapter says"
    )
    parser.add_argument(
        "--vision-tower", type=Path, help="CLIP folder of a model that does not hold its tower"
    )
    args = parser.parse_args(argv)
    try:
        rows, missing = describe(args.folder, args.model_base, args.vision_tower)
    except ValueError as error:
        stop(error)
    print(args.folder)
    for what, value in rows:
        print(f"{what:>20}  {value}")
    if missing:
        print(f"{'incomplete':>20}  {missing}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
