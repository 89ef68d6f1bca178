"""What the compatibility check compares with: canonical folders, and what this project computes with each.

    python scripts/compat/make.py --output DIR [--nano playground/nano]

Writes DIR/<name>/model (a canonical folder as every writer of this project leaves it) and beside it reference.json and
reference.safetensors: token ids of hard texts, a chat prompt, pixels of some pictures, and logits in float32.
`check.py` holds another transformers release to them. With GEOCHAT_ASSETS, golden vectors add a model at 504 px, and the
keys of the exported original layout are compared with those of a folder that the original program wrote.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from geochat.data.sample import Turn
from geochat.model.canonical import DERIVED_BUFFERS
from geochat.model.checkpoint import load, save_model
from geochat.model.convert import Source, convert
from geochat.model.weights import open_weights

TURNS = (
    ("user", "<image>\nWhere is the  harbour?"),
    ("assistant", "At the top left; 3 ships lie there."),
    ("user", "[identify] What is at {<12><20><44><61>|<30>}?"),
)
"""Three turns, so that text follows an end of sequence."""
TEXTS = (
    "",
    "a",
    " a",
    "  two spaces  and   three, a trailing one ",
    "\n\nUSER:\tx\n",
    "A chat.  USER: <image>\nWhat is this? ASSISTANT: a port</s>USER: How many? ASSISTANT: 3</s>",
    "</s>USER: yes</s> USER: no</s>\nUSER",
    "before <image> in the middle<image>after",
    "<s>one</s><s>two<unk><pad>",
    "<p> ships </p> {<0><0><100><100>|<90>}<delim>{<1><2><3><4>|<5>}",
    "Überflug über Zürich – 3 × 5 m² (≈ 15 m²)",
    "港に船が三隻 🚢🛰️ \u200d e\u0301 \u00a0 \ufeff",
    "1234567890 0.5 -7e3 x_y-z/…",
    "".join(map(chr, range(33, 127))),
)
SIZES = {"square": (96, 96), "wide": (211, 64), "tall": (53, 160), "large": (700, 513), "dot": (2, 5)}
"""Width and height; releases 4.x take a picture that is 1 or 3 pixels high for one whose channels come first."""


def main(argv: list[str] | None = None) -> int:
    """Write every folder; says what was left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--nano", type=Path, default=Path("playground/nano"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Path, Path], None]] = {
        "nano": lambda nano, model: shutil.copytree(nano, model) and None,
        "fine-tuned": fine_tuned,
        "internlm2": internlm2,
    }
    assets = os.environ.get("GEOCHAT_ASSETS")
    golden = Path(assets) / "golden/geochat_tiny" if assets else None
    if golden is not None and golden.is_dir():
        makers["geochat-504"] = lambda _, model: convert(Source(golden), model, "hf", progress=False) and None
    shutil.rmtree(args.output, ignore_errors=True)
    pictures(args.output / "images")
    for name, make in makers.items():
        make(args.nano, args.output / name / "model")
        write_reference(args.output / name, args.output / "images")
        print(f"{name}: written")
    if "geochat-504" not in makers:
        print("geochat-504: left out (GEOCHAT_ASSETS names no folder with golden/geochat_tiny)")
        return 0
    assert golden is not None
    assert_original_keys(golden, args.output / "llava")
    return 0


def fine_tuned(nano: Path, model: Path) -> None:
    """Every weight changed and in float32, in several files."""
    network, processor = load(nano, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=draw)
    save_model(network, processor, model, max_shard_bytes=5_000_000)


def internlm2(nano: Path, model: Path) -> None:
    """An InternLM2 after its conversion: two key-value heads for six query heads, and a rotary base of a million, which
    releases 4.x and 5.x read from different fields. Weights are large, so that positions matter in the logits."""
    network, processor = load(nano, dtype=torch.float32)
    config = copy.deepcopy(network.config)
    config.text_config.num_key_value_heads = 2
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    torch.manual_seed(2)
    network = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "language_model" in name and parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    save_model(network, processor, model)


def pictures(folder: Path) -> None:
    """Drawn pictures of odd shapes, without loss."""
    folder.mkdir(parents=True)
    for name, (width, height) in SIZES.items():
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        pen = ImageDraw.Draw(image)
        for k in range(1, 12):
            corner = (width * k // 17, height * (12 - k) // 15)
            pen.ellipse(
                [*corner, corner[0] + width // 5, corner[1] + height // 4], fill=(20 * k, 255 - 17 * k, 9 * k)
            )
        image.save(folder / f"{name}.png")


def write_reference(folder: Path, images: Path) -> None:
    """What this project makes of DIR/<name>/model: ids, prompt, pixels, logits [S, V]."""
    model, processor = load(folder / "model", dtype=torch.float32, attn_implementation="eager")
    tensors: dict[str, Any] = {}
    for file in sorted(images.iterdir()):
        with Image.open(file) as image:
            tensors[f"pixels.{file.name}"] = processor.pixels(image)
    turns = [Turn(role, text) for role, text in TURNS]
    prompt = torch.from_numpy(processor.encoder().encode_prompt(turns)).long()[None]
    pixels = tensors["pixels.large.png"][None]
    with torch.inference_mode():
        tensors["logits"] = model(input_ids=prompt, pixel_values=pixels).logits[0].contiguous()
    tensors["input_ids"] = prompt
    save_file(tensors, folder / "reference.safetensors")
    backend = processor.tokenizer.backend_tokenizer
    told = {
        "texts": TEXTS,
        "ids": [backend.encode(text).ids for text in TEXTS],
        "turns": [{"role": turn.role, "content": turn.text} for turn in turns],
        "prompt": processor.tokenizer.bos_token + processor.template.render(turns, True),
        "image": "large.png",
    }
    (folder / "reference.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def assert_original_keys(golden: Path, target: Path) -> None:
    """The exported original layout has the keys that the original program wrote, but for derived buffers."""
    convert(Source(golden), target, "llava", progress=False)
    ours = set(open_weights(target))
    theirs = {key for key in open_weights(golden) if not key.endswith(DERIVED_BUFFERS)}
    if ours != theirs:
        raise SystemExit(
            f"error: the original layout differs in {len(ours ^ theirs)} keys: {sorted(ours ^ theirs)[:3]}"
        )
    print(f"original layout: {len(ours)} keys, the same as in the folder that the original program wrote")


if __name__ == "__main__":
    raise SystemExit(main())
