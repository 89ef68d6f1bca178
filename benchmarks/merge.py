"""Merge time and peak memory: shard by shard, against PEFT's `merge_and_unload` and `save_pretrained`.

    python benchmarks/merge.py [--hidden 1536 --layers 12] [--dora] [--rounds 2]

Each run is a process of its own, in the order A B B A, with the same number of threads. Peak memory is the high-water
mark of the process above what it had after its imports. The same run checks that every merged tensor of ours is the
float32 delta on the base's weight, rounded once, bit for bit, and prints how far PEFT's sum in bfloat16 is from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SIDES = ("geochat", "peft")


def main() -> None:
    """Parse, prepare the folders, run both sides in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.work)))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        size = prepare(work, args)
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(args.rounds):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                command = [sys.executable, __file__, "--side", side, "--work", name]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                rows[side].append(json.loads(run.stdout.splitlines()[-1]))
        print(f"{'DoRA' if args.dora else 'LoRA'} r {args.rank} on {size / 1e9:.2f} GB of bfloat16 weights")
        for side in SIDES:
            figures = {key: [row[key] for row in rows[side]] for key in ("wall", "cpu", "peak")}
            print(
                f"{side:>8}: wall {median(figures['wall']):6.2f} s (least {min(figures['wall']):.2f}), "
                f"cpu {median(figures['cpu']):6.2f} s, peak memory {median(figures['peak']):6.0f} MB"
            )
        for key in ("wall", "cpu", "peak"):
            ours, theirs = (median(row[key] for row in rows[side]) for side in SIDES)
            print(f"{key:>8}: PEFT / geochat = {theirs / ours:.2f}")
        compare(work)


def prepare(work: Path, args: argparse.Namespace) -> int:
    """Write a random base in bfloat16 and an adapter on it; returns the base's bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from geochat.model.adapter import AdapterSpec, BaseRecord, attach, save_adapter, trainable_groups
    from geochat.model.build import build_model
    from geochat.model.checkpoint import save_model
    from geochat.model.weights import open_weights

    torch.manual_seed(time.time_ns() % 2**32)
    llm, clip = work / "llm", work / "clip"
    tokenizer_files(llm)
    config = LlamaConfig(
        vocab_size=512, hidden_size=args.hidden, intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(llm)
    vision_folder(clip)
    model, processor = build_model(llm, clip, image_size=84, dtype=torch.bfloat16)
    save_model(model, processor, work / "base")
    adapted = attach(model, AdapterSpec(r=args.rank, alpha=16, use_dora=args.dora))
    for _, parameter in trainable_groups(adapted)["lora"]:
        parameter.data = parameter.data.float() + 0.01 * torch.randn(parameter.shape)
    save_adapter(adapted, processor, work / "adapter", base=BaseRecord.of(work / "base"))
    return sum(entry.nbytes for entry in open_weights(work / "base").values())


def tokenizer_files(folder: Path) -> None:
    """A tokenizer of 512 words; which ones does not matter here."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 512)}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def vision_folder(folder: Path) -> None:
    """A small tower; merging does not touch it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=84,
        patch_size=14,
    )
    CLIPVisionModel(config).bfloat16().save_pretrained(folder)


def measure(side: str, work: Path) -> dict[str, float]:
    """One merge in this process."""
    import torch

    output = work / side
    shutil.rmtree(output, ignore_errors=True)
    if side == "geochat":
        from geochat.model.merge import merge_adapter as merge
    else:
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration
    before, wall, cpu = high_water(), time.perf_counter(), time.process_time()
    if side == "geochat":
        merge(work / "adapter", work / "base", output, probe=False)
    else:
        base = LlavaForConditionalGeneration.from_pretrained(work / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, work / "adapter").merge_and_unload().save_pretrained(output)
        for file in output.glob("*.safetensors"):  # ours is on the disk when it returns, so theirs must be
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": (high_water() - before) / 1e6,
    }


def high_water() -> int:
    """The most memory this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the high-water mark of a process")


def compare(work: Path) -> None:
    """Check ours against the definition, bit for bit, and say how far PEFT's is."""
    import torch

    from geochat.model.canonical import canonical_state
    from geochat.model.weights import open_file, open_weights

    base, ours = (canonical_state(open_weights(work / name)) for name in ("base", "geochat"))
    theirs = canonical_state(open_weights(work / "peft"))
    adapter = open_file(work / "adapter/adapter_model.safetensors")
    config = json.loads((work / "adapter/adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    worst = 0.0
    for key, entry in base.items():
        weight = entry.read()
        layer = (
            "base_model.model.model."
            + key.replace("language_model.model.", "language_model.")[: -len(".weight")]
        )
        if f"{layer}.lora_A.weight" in adapter:
            a, b = (adapter[f"{layer}.lora_{x}.weight"].read() for x in "AB")
            exact = weight.float() + scale * (b @ a)
            if config["use_dora"]:
                magnitude = adapter[f"{layer}.lora_magnitude_vector"].read()
                exact *= (magnitude / exact.norm(dim=1))[:, None]
                error = (ours[key].read().float() - exact).abs().max() / exact.abs().max()
                assert error < 2**-8, key
            else:
                assert torch.equal(ours[key].read(), exact.bfloat16()), key
            worst = max(worst, (theirs[key].read().float() - exact).abs().max().item())
        else:
            assert torch.equal(ours[key].read(), weight), key
    assert not math.isnan(worst)
    print(
        f"geochat equals the float32 delta rounded once; PEFT is up to {worst:.2g} away from the unrounded sum"
    )


if __name__ == "__main__":
    main()
