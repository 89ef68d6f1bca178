"""Adapters: where they sit, what trains, and that a saved folder is complete and refuses a wrong base."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geochat.model.adapter import (
    AdapterSpec,
    BaseRecord,
    attach,
    load_adapter,
    load_adapter_state,
    save_adapter,
    trainable_groups,
)
from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model

SPECS = [
    AdapterSpec(r=4, alpha=8),
    AdapterSpec(r=4, alpha=8, train_projector=True),
    AdapterSpec(r=4, alpha=8, use_dora=True, train_projector=True),
]


@pytest.fixture(scope="module")
def base(tiny_llm: Path, tiny_clip: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(*build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32), folder)
    return folder


def shake(model, seed: int = 0):
    """Random values where training would have left some."""
    draw = torch.Generator().manual_seed(seed)
    for _, parameter in chain.from_iterable(trainable_groups(model).values()):
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return model.eval()


def logits(model) -> torch.Tensor:
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    ids = torch.tensor([[1, *[513] * 36, *range(5, 25)]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits.float()


def test_adapters_sit_on_the_language_model_only(base: Path) -> None:
    model = attach(load(base)[0], AdapterSpec(r=4, alpha=8))
    groups = trainable_groups(model)
    assert {name: len(members) for name, members in groups.items()} == {
        "lora": 2 * 7 * 2, "vision_lora": 0, "projector": 0, "vision_tower": 0, "language_model": 0,
    }  # fmt: skip
    assert all("language_model.layers." in name for name, _ in groups["lora"])
    with_projector = trainable_groups(attach(load(base)[0], AdapterSpec(r=4, train_projector=True)))
    assert len(with_projector["projector"]) == 4
    assert len(with_projector["lora"]) == 28


def test_defaults_are_geochats() -> None:
    assert AdapterSpec() == AdapterSpec(r=64, alpha=16, dropout=0.05, use_dora=False, train_projector=False)


def test_groups_of_a_plain_model(base: Path) -> None:
    model, _ = load(base)
    sizes = {name: len(members) for name, members in trainable_groups(model).items()}
    assert sizes == {"lora": 0, "vision_lora": 0, "projector": 4, "vision_tower": 71, "language_model": 21}


def test_tower_is_out_of_autograd_and_gradients_do_not_change(base: Path) -> None:
    """G4: with activation checkpointing the frozen tower must not be recorded; LoRA gradients stay as they are."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # lora_A starts at random
        model = attach(load(base)[0], AdapterSpec(r=4, alpha=8, dropout=0.0, train_projector=True))
        shake(model).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        seen = []
        tower = model.get_base_model().model.vision_tower
        tower.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2].last_hidden_state.requires_grad)
        )
        ids = torch.tensor([[1, *[513] * 36, *range(5, 25)]])
        pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        assert seen == [False]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("multi_modal_projector" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(base: Path, tmp_path: Path, spec: AdapterSpec) -> None:
    plain, processor = load(base)
    model = shake(attach(plain, spec))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "geochat_base.json",
        "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json",
    }  # fmt: skip
    again, processor = load(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert processor.image_size == 84
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["vision_config"]["image_size"] == 84
    # plain PEFT on plain transformers reads the same folder
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(base, local_files_only=True)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("train_projector", [False, True])
def test_base_from_parts(tiny_llm: Path, tiny_clip: Path, tmp_path: Path, train_projector: bool) -> None:
    """The projector comes along even when it is frozen: a fresh one exists nowhere else."""
    plain, processor = build_model(tiny_llm, tiny_clip, image_size=126, dtype=torch.float32, seed=7)
    model = shake(attach(plain, AdapterSpec(r=4, alpha=8, train_projector=train_projector)))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(tiny_llm, tiny_clip))
    again, processor = load(tmp_path / "a")
    assert processor.image_size == 126
    pixels = torch.randn(1, 3, 126, 126)
    ids = torch.tensor([[1, *[513] * 81, *range(5, 25)]])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, again))
    assert torch.equal(ours, theirs)


def test_trained_tower_comes_along(base: Path, tmp_path: Path) -> None:
    plain, processor = load(base)
    model = attach(plain, AdapterSpec(r=4, alpha=8))
    plain.model.vision_tower.encoder.layers[2].requires_grad_(True)
    shake(model)
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    extra = load_file(tmp_path / "a/non_lora_trainables.safetensors")
    assert len(extra) == 16
    assert all(key.startswith("vision_tower.vision_model.encoder.layers.2.") for key in extra)
    assert torch.equal(logits(load(tmp_path / "a")[0]), logits(model))


def test_image_size_of_the_adapter_holds(base: Path, tmp_path: Path) -> None:
    """Trained at 126 px on an 84 px base: the base is resampled again when the adapter is loaded."""
    plain, processor = load(base, image_size=126)
    model = shake(attach(plain, SPECS[0]))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    again, processor = load(tmp_path / "a")
    assert processor.image_size == again.config.vision_config.image_size == 126


def test_resume_in_place(base: Path, tmp_path: Path) -> None:
    plain, processor = load(base)
    model = shake(attach(plain, SPECS[2]))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    before = logits(model)
    shake(model, seed=1)
    assert not torch.equal(logits(model), before)
    load_adapter_state(model, tmp_path / "a")
    assert torch.equal(logits(model), before)
    assert all(
        trainable_groups(load_adapter(load(base)[0], tmp_path / "a", trainable=True))[x]
        for x in ("lora", "projector")
    )


def test_float32_adapter_on_a_bfloat16_base(base: Path, tmp_path: Path) -> None:
    """Training keeps adapters in float32; loading them on a bfloat16 base must not round them."""
    plain, processor = load(base)
    model = shake(attach(plain, SPECS[2]))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    half, _ = load(tmp_path / "a", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    assert (logits(half) - logits(model)).abs().max() < 0.1


def test_wrong_base_is_refused(base: Path, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    plain, processor = load(base)
    model = shake(attach(plain, SPECS[1]))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert torch.equal(logits(load(tmp_path / "a", base=moved)[0]), logits(model))
    tensors = load_file(moved / "model.safetensors")
    tensors["language_model.model.norm.weight"] += 0.01
    save_file(tensors, moved / "model.safetensors")
    with pytest.raises(ValueError, match="not the base this adapter was trained on"):
        load(tmp_path / "a", base=moved)
    with pytest.raises(ValueError, match="say where it is with --model-base"):
        load(tmp_path / "a", base=tmp_path / "nowhere")
    record = json.loads((tmp_path / "a/geochat_base.json").read_text())
    (tmp_path / "a/geochat_base.json").write_text(json.dumps({**record, "fingerprint": None}))
    adapter = load_file(tmp_path / "a/adapter_model.safetensors")
    key = next(key for key in adapter if key.endswith("down_proj.lora_A.weight"))
    adapter[key] = adapter[key][:, :32].contiguous()
    save_file(adapter, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter of another base\?\).*of another shape"):
        load(tmp_path / "a")


def test_adapter_and_model_do_not_share_a_folder(base: Path, tmp_path: Path) -> None:
    plain, processor = load(base)
    save_model(plain, processor, tmp_path / "full")
    model = attach(plain, SPECS[0])
    with pytest.raises(ValueError, match="holds a full model"):
        save_adapter(model, processor, tmp_path / "full", base=BaseRecord.of(base))
    save_adapter(model, processor, tmp_path / "a", base=BaseRecord.of(base))
    with pytest.raises(ValueError, match="holds an adapter"):
        save_model(load(base)[0], processor, tmp_path / "a")
    with pytest.raises(ValueError, match="save adapters with save_adapter"):
        save_model(model, processor, tmp_path / "b")
