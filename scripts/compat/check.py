"""Plain transformers of this environment against what `make.py` wrote. Needs neither geochat nor torchvision.

    python scripts/compat/check.py --reference DIR [--report FILE]

One line per folder on standard output; `--report` takes the figures as JSON for `table.py`. Exits with 1 on a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

MAX_LOGIT_DIFFERENCE = 1e-5
Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Check every folder; 0 when all of them pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="folder that make.py wrote")
    parser.add_argument("--report", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [check(file.parent) for file in sorted(args.reference.glob("*/reference.json"))]
    if not rows:
        print(f"error: {args.reference}: holds no folder of make.py", file=sys.stderr)
        return 1
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    if args.report:
        report = {"transformers": transformers.__version__, "torch": torch.__version__, "folders": rows}
        args.report.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(any(row["failures"] for row in rows))


def check(folder: Path) -> Figures:
    """Figures of one folder; `failures` says in words what is not as it should be."""
    told = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "reference.safetensors")
    row: Figures = {"folder": folder.name, "failures": []}
    for part in (check_model, check_tokenizer, check_processor):
        try:
            row["failures"] += part(folder, told, tensors, row)
        except Exception as error:  # whatever a release raises is a finding of this check
            reason = (str(error).strip() or "no message").splitlines()[0]
            row["failures"].append(f"{part.__name__}: {type(error).__name__}: {reason}")
    return row


def check_model(folder: Path, told: Figures, tensors: dict[str, torch.Tensor], row: Figures) -> list[str]:
    """Keys, and logits in float32 with eager attention."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    row |= {kind: len(info.get(kind) or ()) for kind in kinds}
    with torch.inference_mode():
        pixels = tensors[f"pixels.{told['image']}"][None]
        logits = model.eval()(input_ids=tensors["input_ids"], pixel_values=pixels).logits[0]
    row["logits"] = (logits - tensors["logits"]).abs().max().item()
    failures = [f"{row[kind]} {kind}" for kind in kinds if row[kind]]
    if not row["logits"] <= MAX_LOGIT_DIFFERENCE:  # a NaN fails too
        failures.append(f"a logit differs by {row['logits']:.3g}")
    return failures


def check_tokenizer(folder: Path, told: Figures, tensors: dict[str, torch.Tensor], row: Figures) -> list[str]:
    """Ids of every text; what the release's own save makes of them is reported, no failure of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    wrong = differing(tokenizer, told)
    row |= {"texts": len(told["texts"]), "texts_wrong": len(wrong)}
    try:
        with tempfile.TemporaryDirectory() as copy:
            tokenizer.save_pretrained(copy)
            row["resaved_wrong"] = len(differing(AutoTokenizer.from_pretrained(copy), told))
    except Exception as error:
        row["resaved_wrong"] = type(error).__name__
    return [f"{len(wrong)} texts have other ids, the first is {wrong[0]!r}"] if wrong else []


def differing(tokenizer: Any, told: Figures) -> list[str]:
    """The texts whose ids are not the reference's."""
    pairs = zip(told["texts"], told["ids"], strict=True)
    return [text for text, ids in pairs if tokenizer(text).input_ids != ids]


def check_processor(folder: Path, told: Figures, tensors: dict[str, torch.Tensor], row: Figures) -> list[str]:
    """Pixels bit for bit, and the chat prompt: its text, and its ids with the image expanded."""
    processor, row["processor"] = load_processor(folder / "model")
    failures = []
    names = sorted(name for name in tensors if name.startswith("pixels."))
    row |= {"images": len(names), "images_wrong": 0}
    for name in names:
        with Image.open(folder.parent / "images" / name.removeprefix("pixels.")) as image:
            pixels = processor.image_processor(images=image.convert("RGB"), return_tensors="pt").pixel_values[
                0
            ]
        if not torch.equal(pixels, tensors[name]):
            row["images_wrong"] += 1
            away = (
                (pixels - tensors[name]).abs().max().item()
                if pixels.shape == tensors[name].shape
                else "shape"
            )
            failures.append(f"{name} differs ({away})")
    prompt = processor.tokenizer.apply_chat_template(
        told["turns"], add_generation_prompt=True, tokenize=False
    )
    with Image.open(folder.parent / "images" / told["image"]) as image:
        batch = processor(text=prompt, images=image, add_special_tokens=False, return_tensors="pt")
    row["prompt_equal"] = prompt == told["prompt"] and torch.equal(batch["input_ids"], tensors["input_ids"])
    return failures if row["prompt_equal"] else [*failures, "the chat prompt differs"]


def load_processor(model: Path) -> tuple[Any, str]:
    """The processor, and how it came: as a whole, or from its parts where the release cannot without torchvision."""
    try:
        processor = AutoProcessor.from_pretrained(model)
        return processor, f"AutoProcessor, {type(processor.image_processor).__name__}"
    except (ImportError, ValueError) as error:
        reason = type(error).__name__
    images = image_processor_class().from_pretrained(model)
    layout = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))
    layout.pop("processor_class")
    processor = LlavaProcessor(images, AutoTokenizer.from_pretrained(model), **layout)
    return processor, f"parts, {type(images).__name__} (AutoProcessor: {reason})"


def image_processor_class() -> Callable[..., Any]:
    """LlavaImageProcessor on Pillow, wherever the release keeps it."""
    for module, name in (("image_processing_pil_llava", "LlavaImageProcessorPil"),
                         ("image_processing_llava", "LlavaImageProcessor")):  # fmt: skip
        try:
            return getattr(importlib.import_module(f"transformers.models.llava.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError("this release has no LlavaImageProcessor")


if __name__ == "__main__":
    raise SystemExit(main())
