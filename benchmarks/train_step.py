"""One LoRA training step: geochat against transformers and PEFT used plainly.

    python benchmarks/train_step.py [--images 6] [--questions 1] [--rounds 2]

Both sides take the same samples: `--images` pictures with `--questions` conversations each, 1,296 image tokens a picture,
short and long answers mixed. The peer pads them into one batch and recomputes activations, as the original does;
`peer, kept` is the same without recomputation. Ours computes logits at supervised positions only, keeps the frozen tower
out of the graph, passes over LoRA's outputs fewer times, recomputes nothing, and (`shared`) lets the conversations of a picture
share its tokens.

The sides take turns, A B C … C B A, in one process with one number of threads. In the same run, the loss and every gradient
of all sides must agree within 1e-5. Operations are counted from the shapes (geochat/train/flops.py); times are forward and
backward, no optimizer. What ours gains above the count are passes over memory that the count leaves out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from geochat.data.encode import IGNORE_INDEX
from geochat.model.adapter import LLM_LINEARS
from geochat.model.lora import use_fewer_passes
from geochat.train.arguments import TrainingArguments
from geochat.train.collate import Collator
from geochat.train.flops import ModelShape, Trained, work
from geochat.train.packing import PackingCollator
from geochat.train.trainer import Trainer
from geochat.train.workload import load_of

SIDE, PATCH, VOCABULARY, IMAGE, PAD = 504, 14, 512, 500, 501
TOKENS = (SIDE // PATCH) ** 2


def main(argv: list[str] | None = None) -> None:
    """Parse, build one model, time every side on it, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args(argv)
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    torch.manual_seed(seed)
    model = adapted(build(args.hidden, args.layers))
    samples = draw(np.random.default_rng(seed), args.images, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(model, samples, Path(folder))
        results = {name: step() for name, step in sides.items()}  # warm-up, and what must agree
        compare(results)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(args.rounds):
            for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                start, cpu = time.perf_counter(), time.process_time()
                sides[name]()
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    tokens = [len(sample["input_ids"]) for sample in samples]
    print(
        f"{args.images} pictures × {args.questions} conversations, {TOKENS} image tokens, {min(tokens)}–{max(tokens)} tokens "
        f"a sample, {torch.get_num_threads()} threads, seed {seed}; losses and gradients agree within 1e-5"
    )
    report(times, {name: operations for name, (_, _, operations) in results.items()})


def build(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """A random model in the proportions of the real one: the tower a twentieth of the work, a small output layer."""
    vision = CLIPVisionConfig(
        hidden_size=hidden // 4, intermediate_size=hidden, num_hidden_layers=4, num_attention_heads=max(1, hidden // 256),
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=TOKENS
    )
    return LlavaForConditionalGeneration(config)


def adapted(model: LlavaForConditionalGeneration, **settings: Any) -> PeftModel:
    """PEFT's adapters on every linear layer of the language model, rank a 64th of its width, and B no longer zero."""
    settings = {
        "r": model.config.text_config.hidden_size // 64,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    } | settings
    wrapped = get_peft_model(model, LoraConfig(target_modules=LLM_LINEARS, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return wrapped


def draw(random: np.random.Generator, images: int, questions: int) -> list[dict[str, Any]]:
    """Samples as the dataset gives them: half of the answers a word or two, half of them a description."""
    samples = []
    for image in range(images):
        pixels = torch.from_numpy(random.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32))
        for _ in range(questions):
            question = random.integers(3, IMAGE, random.integers(12, 70))
            answer = random.integers(
                3, IMAGE, random.integers(2, 8) if random.random() < 0.5 else random.integers(40, 160)
            )
            head = np.concatenate([[1], np.arange(3, 43), np.full(TOKENS, IMAGE)])
            ids = np.concatenate([head, question, answer]).astype(np.int32)
            labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
            labels[-len(answer) :] = answer
            samples.append(
                {
                    "input_ids": ids,
                    "labels": labels,
                    "source": "drawn",
                    "pixels": pixels,
                    "images": (str(image),),
                }
            )
    return samples


Result = tuple[float, dict[str, torch.Tensor], float]
Step = Callable[[], Result]


def make_sides(model: PeftModel, samples: list[dict[str, Any]], folder: Path) -> dict[str, Step]:
    """Every side as a function: one forward and backward pass → loss, gradients, counted operations."""
    padded = Collator(PAD)(samples)
    shared = PackingCollator(PAD, IMAGE, share=True)(samples)
    own = copy.deepcopy(model)
    use_fewer_passes(own)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, gradient_checkpointing="False")
    trainer = Trainer(
        base=own.get_base_model(), saver=None, model=own, args=arguments, data_collator=Collator(PAD)  # type: ignore[arg-type]
    )  # fmt: skip

    def peer(recompute: bool) -> Step:
        def step() -> Result:
            model.train()
            if recompute:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ids = padded["input_ids"]
            loss = model(
                input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=padded["pixel_values"],
                labels=padded["labels"],
            ).loss  # fmt: skip
            loss.backward()
            if recompute:
                model.gradient_checkpointing_disable()
                model.get_base_model().disable_input_require_grads()
            return loss.item(), gradients(model), operations(model, padded, peer=True, recompute=recompute)

        return step

    def ours(batch: dict[str, torch.Tensor]) -> Step:
        def step() -> Result:
            loss = trainer.compute_loss(own.train(), batch)
            loss.backward()
            return loss.item(), gradients(own), operations(own, batch)

        return step

    sides = {"peer": peer(True), "peer, kept": peer(False), "geochat": ours(padded)}
    if len(shared["input_ids"]) < len(samples):
        sides["shared"] = ours(shared)
    return sides


def operations(
    model: PeftModel, batch: dict[str, Any], *, peer: bool = False, recompute: bool = False
) -> float:
    """Counted from the shapes. The peer's mask makes its attention multiply all pairs, and it computes all logits; that
    recomputation draws its frozen tower into the graph is left out."""
    load = load_of(batch, masked=True)
    if peer:
        load = replace(load, causal=False, supervised=load.rows * load.length)
    config = model.get_base_model().config
    trained = Trained(lora_rank=model.peft_config["default"].r)
    return work(ModelShape.of(config), trained, load, checkpointing=recompute).executed


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Handed out, and gone from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(results: dict[str, Result]) -> None:
    """Raises AssertionError when a side disagrees with the first one."""
    first, *others = results.values()
    for loss, gradients, _ in others:
        assert abs(loss - first[0]) < 1e-5, (loss, first[0])
        assert gradients.keys() == first[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, first[1][name], atol=1e-5, rtol=0, msg=name)


def report(times: dict[str, list[tuple[float, float]]], counted: dict[str, float]) -> None:
    """The table; the first row is the peer's."""
    walls = {name: median(wall for wall, _ in rows) for name, rows in times.items()}
    cpus = {name: median(cpu for _, cpu in rows) for name, rows in times.items()}
    peer = next(iter(times))
    print(
        f"{'':>12} {'wall s':>8} {'least':>8} {'cpu s':>8} {'GFLOP':>7} {'speed':>7} {'by cpu':>7} {'by count':>9}"
    )
    for name, rows in times.items():
        print(
            f"{name:>12} {walls[name]:8.2f} {min(wall for wall, _ in rows):8.2f} {cpus[name]:8.2f} "
            f"{counted[name] / 1e9:7.0f} {walls[peer] / walls[name]:6.2f}x {cpus[peer] / cpus[name]:6.2f}x "
            f"{counted[peer] / counted[name]:8.2f}x"
        )


if __name__ == "__main__":
    main()
