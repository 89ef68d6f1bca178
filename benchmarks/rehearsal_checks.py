"""Child processes of `rehearsal.py`: PEFT's merge, and the checks of what was written. Exits with 1 on a difference.

python benchmarks/rehearsal_checks.py same|merged|close|native|peft|imports FOLDER…
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from geochat.model.build import stored_dtype
from geochat.model.canonical import canonical_state
from geochat.model.convert import differences
from geochat.model.open import open_model
from geochat.model.weights import Entry, State, open_file, open_weights, write_file


def same(source: Path, target: Path) -> None:
    """Every tensor of a converted folder is the source's, as `convert_checkpoint.py --verify` compares them."""
    config, state, processor = open_model(target)
    wrong = differences(open_model(source, image_size=processor.image_size)[1], state, stored_dtype(config))
    if wrong:
        raise SystemExit(f"{target}: {len(wrong)} tensors differ, {wrong[:3]}")


def merged(source: Path, adapter: Path, target: Path) -> None:
    """Layers at both ends and in the middle are W + s·B·A in float32, rounded once, bit for bit; the head is as it was."""
    base, result = open_weights(source), open_weights(target)
    lora, scale = open_file(adapter / "adapter_model.bin"), _scale(adapter)
    for name in _linears(lora, "base_model.model."):
        weight, delta = base[f"{name}.weight"].read(), _delta(lora, f"base_model.model.{name}", scale)
        found = result[f"language_model.{name}.weight"].read()
        if not torch.equal(found, (delta + weight).to(weight.dtype)):
            raise SystemExit(f"{target}: {name} is not the sum of base and adapter")
    head, rows = base["lm_head.weight"].read(), result["language_model.lm_head.weight"].read()
    if not torch.equal(rows[: len(head)], head):
        raise SystemExit(f"{target}: lm_head changed")


def close(base: Path, adapter: Path, target: Path) -> None:
    """A merge is as near to W + s·B·A as rounding the product and the sum apart, as PEFT does, leaves it."""
    before, after = (canonical_state(open_weights(folder)) for folder in (base, target))
    lora, scale = open_file(adapter / "adapter_model.safetensors"), _scale(adapter)
    stem = "base_model.model.model.language_model."
    for name in _linears(lora, stem):
        key = f"language_model.model.{name}.weight"
        delta, weight = _delta(lora, stem + name, scale), before[key].read()
        exact, half = delta + weight, torch.finfo(weight.dtype)
        allowed = half.eps * (delta.abs() + exact.abs() + half.smallest_normal)
        if ((after[key].read().float() - exact).abs() > allowed).any():
            raise SystemExit(f"{target}: {name} is further from the sum than rounding explains")


def native(adapter: Path, base: Path, target: Path) -> None:
    """LLaVA's adapter under the names that PEFT gives to a LoRA on transformers' own class, so that PEFT can read it."""
    target.mkdir()
    renamed: State = {}
    for name, entry in open_file(adapter / "adapter_model.bin").items():
        renamed[name.replace("base_model.model.model.", "base_model.model.model.language_model.")] = entry
    write_file(target / "adapter_model.safetensors", renamed)
    config = json.loads((adapter / "adapter_config.json").read_text())
    # A pattern: the leaf names alone would match the tower's projections too.
    config["target_modules"] = rf".*language_model\..*\.({'|'.join(config['target_modules'])})"
    config["base_model_name_or_path"] = str(base.absolute())
    (target / "adapter_config.json").write_text(json.dumps(config))


def peft(base: Path, adapter: Path, target: Path) -> None:
    """PEFT's way: the model as a whole in its own precision, merged in place, saved; on the disk when it returns."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
    for file in target.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def imports() -> None:
    """Nothing: what a process has after importing torch, transformers and geochat."""


def _scale(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def _delta(lora: dict[str, Entry], stem: str, scale: float) -> torch.Tensor:
    a, b = (lora[f"{stem}.lora_{x}.weight"].read().float() for x in "AB")
    return (b @ a) * scale


def _linears(lora: dict[str, Entry], prefix: str) -> Iterator[str]:
    """Names of the adapted linears in the first, the middle and the last layer, without the prefix."""
    names = [name[len(prefix) :].removesuffix(".lora_A.weight") for name in lora if "lora_A" in name]
    count = 1 + max(int(name.split("layers.")[1].split(".")[0]) for name in names)
    wanted = {f"layers.{i}." for i in (0, count // 2, count - 1)}
    return (name for name in names if any(layer in name for layer in wanted))


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (same, merged, close, native, peft, imports)
}

if __name__ == "__main__":
    STEPS[sys.argv[1]](*map(Path, sys.argv[2:]))
