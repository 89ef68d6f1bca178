"""Every layout of the family, as its own program wrote it, against what that program computed with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from geochat.data.encode import IGNORE_INDEX
from geochat.data.sample import Sample
from geochat.model.checkpoint import load, save_model
from geochat.model.formats.adapters import read_adapter
from geochat.model.formats.internlm2 import Heads, from_internlm2
from geochat.model.merge import merge_adapter
from geochat.model.open import open_model, recognise
from geochat.model.weights import State, open_weights

FOLDERS = {
    "geochat": ("geochat_tiny", 504, 1e-5),
    "llava": ("llava_tiny", 336, 1e-5),
    "vhm": ("vhm_tiny", 336, 1e-5),
    "lora": ("lora", 504, 2e-5),
    "dora": ("dora", 336, 2e-5),
    "xtuner": ("xtuner/converted", 336, 2e-5),
}
"""Expected folder → the folder in the original layout, the resolution that follows from it, the tolerance. The first three
are equal to the bit on the machine that wrote this; adapters come merged here and were attached there, at most 1e-5 apart,
which another processor may round a little further."""


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_logits_and_losses(assets: Path, name: str) -> None:
    """One argument, the folder: base, tower, resolution and layout follow from the files."""
    golden = assets / "golden"
    folder, size, tolerance = FOLDERS[name]
    base = {"base": golden / "llava_tiny"} if name == "xtuner" else {}
    tower = {"vision_tower": golden / "clip-vit-tiny-patch14-336"} if name == "xtuner" else {}
    model, processor = load(
        golden / folder, dtype=torch.float32, attn_implementation="eager", image_size=size if tower else None,
        **base, **tower,
    )  # fmt: skip
    assert processor.image_size == size
    expected = load_file(golden / f"expected/{name}/logits_last4.safetensors")
    losses = json.loads((golden / f"expected/{name}/losses.json").read_text())
    records = {row["id"]: row for row in json.loads((golden / "conversations.json").read_text())}
    encoder = processor.encoder()
    assert len(expected) >= 2
    for identity, wanted in expected.items():
        sample = Sample.from_record(records[identity])
        encoded = encoder.encode(sample)
        pixels = [processor.pixels(Image.open(golden / image).convert("RGB")) for image in sample.images]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(encoded.input_ids)[None].long(),
                pixel_values=torch.stack(pixels) if pixels else None,
            ).logits[0, :, :1000]
        torch.testing.assert_close(logits[-4:], wanted.reshape(4, -1), atol=tolerance, rtol=0)
        labels = torch.tensor(encoded.labels).long()
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX)
        assert loss.item() == pytest.approx(losses[identity]["loss"], abs=tolerance)


def assert_checksums(tensor: torch.Tensor, row: dict[str, float]) -> None:
    flat = tensor.double().numpy().reshape(-1)
    assert flat.size == row["numel"]
    assert flat.sum() == pytest.approx(row["sum"], abs=1e-4)
    assert np.linalg.norm(flat) == pytest.approx(row["l2"], abs=1e-4)
    assert flat @ np.cos(np.arange(flat.size)) == pytest.approx(row["cos_dot"], abs=1e-4)


def canonical(key: str) -> str:
    """The canonical key of a name in the checksum files."""
    if key.startswith("model.mm_projector."):
        return key.replace("model.mm_projector.0", "multi_modal_projector.linear_1").replace(
            "model.mm_projector.2", "multi_modal_projector.linear_2"
        )
    if "vision_model." in key:
        return "vision_tower.vision_model." + key.split("vision_model.")[1]
    return "language_model." + key


@pytest.mark.parametrize("name", ["lora", "dora", "xtuner"])
def test_golden_merged_checksums(assets: Path, name: str) -> None:
    golden = assets / "golden"
    options = {"base": golden / "llava_tiny"} if name == "xtuner" else {}
    state = open_model(golden / FOLDERS[name][0], **options)[1]
    expected = json.loads((golden / f"expected/{name}/merged_checksums.json").read_text())
    assert len(expected) >= 14
    for key, row in expected.items():
        assert_checksums(state[canonical(key)].read(), row)


def internlm2(golden: Path) -> tuple[State, Heads, dict]:
    config = json.loads((golden / "internlm2_tiny/config.json").read_text())
    heads = Heads.of(config)
    return from_internlm2(open_weights(golden / "internlm2_tiny"), heads, "internlm2_tiny"), heads, config


def test_golden_internlm2(assets: Path) -> None:
    """wqkv taken apart, plain and with LoRA on it; logits of an independent float64 forward pass."""
    golden = assets / "golden"
    state, heads, config = internlm2(golden)
    canonical_state = {f"language_model.{key}": entry for key, entry in state.items()}
    merged = read_adapter(golden / "internlm2_lora", heads).applied(canonical_state)
    for key, row in json.loads((golden / "expected/internlm2/split_checksums.json").read_text()).items():
        kind, name = key.split(":")
        table = canonical_state if kind == "base" else merged
        assert_checksums(table[f"language_model.{name}"].read(), row)
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: config[name] for name in (*fields, "num_key_value_heads", "rms_norm_eps")},
            max_position_embeddings=config["max_position_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        )
    ).eval()
    inputs = json.loads((golden / "expected/internlm2/inputs.json").read_text())
    wanted = load_file(golden / "expected/internlm2/logits_every4.safetensors")
    for name, table in (("base", canonical_state), ("lora", merged)):
        weights = {key.removeprefix("language_model."): entry.read().float() for key, entry in table.items()}
        llama.load_state_dict({"lm_head.weight": weights.pop("lm_head.weight"), **weights})
        with torch.no_grad():
            logits = llama(torch.tensor([inputs["input_ids"]])).logits[0, inputs["positions"]]
        torch.testing.assert_close(logits.double(), wanted[name].double(), atol=5e-5, rtol=0)


def test_a_foreign_adapter_becomes_a_canonical_folder(assets: Path, tmp_path: Path) -> None:
    """What is loaded from the original layout, saved and loaded again, is the same to the bit."""
    model, processor = load(assets / "golden/lora", dtype=torch.float32)
    save_model(model, processor, tmp_path / "merged")
    again, _ = load(tmp_path / "merged")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["lora", "dora", "xtuner"])
def test_the_merge_command_takes_a_foreign_adapter(assets: Path, tmp_path: Path, name: str) -> None:
    """LoRA, DoRA, and XTuner's, which is LoRA on language model and tower beside a projector."""
    base = assets / "golden/llava_tiny" if name == "xtuner" else None
    gap = merge_adapter(assets / "golden" / FOLDERS[name][0], base, tmp_path / "merged", torch.float32)
    assert gap < 1e-5
    expected = json.loads((assets / f"golden/expected/{name}/merged_checksums.json").read_text())
    state = open_model(tmp_path / "merged")[1]
    for key, row in expected.items():
        assert_checksums(state[canonical(key)].read(), row)


def test_a_table_of_1297_rows_is_taken_as_it_is(assets: Path, tmp_path: Path) -> None:
    golden = assets / "golden"
    folder = shutil.copytree(golden / "geochat_tiny", tmp_path / "geochat")
    shutil.copytree(golden / "clip-vit-tiny-patch14-336", tmp_path / "clip-vit-tiny-patch14-336")
    (folder / "pytorch_model.bin").chmod(0o644)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (key,) = [key for key in tensors if key.endswith("position_embedding.weight")]
    assert tensors[key].shape[0] == 577
    expected = load_file(golden / "expected/geochat/position_embedding.safetensors")
    (table,) = expected.values()
    tensors[key] = table
    torch.save(tensors, folder / "pytorch_model.bin")
    state = open_model(folder)[1]
    assert torch.equal(state["vision_tower.vision_model.embeddings.position_embedding.weight"].read(), table)


def test_missing_parts_are_named_with_their_flag(assets: Path, tmp_path: Path) -> None:
    golden = assets / "golden"
    llava = shutil.copytree(golden / "llava_tiny", tmp_path / "llava")
    with pytest.raises(
        ValueError, match=r"clip-vit-tiny-patch14-336, which is not on this disk.*--vision-tower"
    ):
        open_model(llava)
    assert (
        open_model(llava, vision_tower=golden / "clip-vit-tiny-patch14-336")[0].vision_config.image_size
        == 336
    )
    adapter = shutil.copytree(golden / "dora", tmp_path / "dora")
    with pytest.raises(ValueError, match=r"its base llava_tiny is not on this disk.*--model-base"):
        open_model(adapter)
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"q_proj has no lora_magnitude_vector.*non_lora_trainables\.bin"):
        open_model(adapter, base=golden / "llava_tiny")
    with pytest.raises(ValueError, match=r"does not fit this base.*is it the right base"):
        read_adapter(golden / "internlm2_lora").applied(open_weights(golden / "llava_tiny"))


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("geochat_tiny", "llava"),
        ("llava_tiny", "llava"),
        ("llava_tiny_pretrain", "projector"),
        ("vhm_tiny", "llava"),
        ("lora", "adapter"),
        ("dora", "adapter"),
        ("internlm2_tiny", "llm"),
        ("clip-vit-tiny-patch14-336", "clip"),
        ("xtuner/converted", "xtuner"),
    ],
)
def test_recognised_from_the_files(assets: Path, tmp_path: Path, folder: str, kind: str) -> None:
    copy = shutil.copytree(assets / "golden" / folder, tmp_path / "x")
    assert recognise(copy) == kind
    if kind in ("projector", "llm", "clip"):
        with pytest.raises(ValueError, match="alone, not a model that sees"):
            open_model(copy)
