"""Canonical folders: exact keys, portable files, nothing lost between save and load, nothing half written."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from geochat.model import checkpoint as checkpoint_module
from geochat.model import weights
from geochat.model.build import build_model
from geochat.model.checkpoint import fingerprint, load, save_model


@pytest.fixture(scope="module")
def built(tiny_llm: Path, tiny_clip: Path):
    """Model and processor; a test that changes the model takes a copy."""
    return build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory) -> Path:
    """The built model on disk; a test that changes files takes `copied`."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(*built, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def logits(model, image_size: int = 84) -> torch.Tensor:
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[513] * (image_size // 14) ** 2, *range(5, 25)]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def test_keys_are_canonical(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    tower = "vision_tower.vision_model."
    layer = "language_model.model.layers.1."
    blocks = (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    )
    expected = {
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        *(f"language_model.model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"),
        *(f"language_model.model.layers.{i}.mlp.{x}_proj.weight" for i in (0, 1) for x in ("gate", "up", "down")),
        *(f"language_model.model.layers.{i}.{x}.weight" for i in (0, 1) for x in ("input_layernorm", "post_attention_layernorm")),
        *(f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
        f"{tower}embeddings.class_embedding",
        f"{tower}embeddings.patch_embedding.weight",
        f"{tower}embeddings.position_embedding.weight",
        *(f"{tower}{norm}.{part}" for norm in ("pre_layrnorm", "post_layernorm") for part in ("weight", "bias")),
        *(f"{tower}encoder.layers.{i}.{x}.{part}" for i in range(4) for x in blocks for part in ("weight", "bias")),
    }  # fmt: skip
    assert f"{layer}mlp.up_proj.weight" in keys
    assert keys == expected


def test_config_is_portable(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["dtype"] == config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"
    assert (
        config["text_config"]["rope_theta"]
        == config["text_config"]["rope_parameters"]["rope_theta"]
        == 10000.0
    )
    assert config["image_seq_length"] == 36
    assert config["tie_word_embeddings"] is False
    assert "tiny" not in json.dumps(config)  # no path of this machine
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(512, 576))


def test_reload_is_exact(built, saved: Path) -> None:
    model, processor = load(saved)
    own = built[0].state_dict()
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(built[0]))
    assert processor.template == built[1].template
    assert not model.training
    assert model.generation_config.suppress_tokens == list(range(512, 576))


def test_plain_transformers_reads_it(built, saved: Path) -> None:
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    for reader in (LlavaForConditionalGeneration, AutoModelForImageTextToText):
        model, report = reader.from_pretrained(saved, local_files_only=True, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits(model.eval()), logits(built[0]))


def test_what_transformers_writes_is_read(built, saved: Path, tmp_path: Path) -> None:
    """`save_pretrained` of a built model leaves `vision_model.` out, and a plain reload of it must still be whole."""
    shutil.copytree(saved, tmp_path / "theirs")
    built[0].save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(load(tmp_path / "theirs")[0]), logits(built[0]))
    runtime = load_file(saved / "model.safetensors")
    names = {
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.", "vision_tower.vision_model.": "model.vision_tower.",
    }  # fmt: skip
    renamed = {
        next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)): value
        for key, value in runtime.items()
    }
    save_file(renamed, tmp_path / "theirs/model.safetensors")
    assert torch.equal(logits(load(tmp_path / "theirs")[0]), logits(built[0]))


def test_shards(built, tmp_path: Path) -> None:
    save_model(*built, tmp_path / "m", max_shard_bytes=200_000)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in built[0].parameters())
    assert torch.equal(logits(load(tmp_path / "m")[0]), logits(built[0]))
    save_model(*built, tmp_path / "m")  # one file now: the shards and their index go
    assert [file.name for file in (tmp_path / "m").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(built, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(*built, tmp_path / "m", dtype=dtype)
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    model, _ = load(tmp_path / "m")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert load(tmp_path / "m", dtype=torch.float32)[0].dtype == torch.float32


def test_another_resolution_resamples_the_table(built, saved: Path, tmp_path: Path) -> None:
    from geochat.model.vision import resample_positions

    model, processor = load(saved, image_size=126)
    table = built[0].model.vision_tower.embeddings.position_embedding.weight
    own = model.model.vision_tower.embeddings.position_embedding.weight
    assert torch.equal(own, resample_positions(table, 9))
    assert (processor.image_size, processor.image_tokens, model.config.image_seq_length) == (126, 81, 81)
    save_model(model, processor, tmp_path / "larger")
    again, processor = load(tmp_path / "larger")
    assert processor.image_size == again.config.vision_config.image_size == 126
    assert torch.equal(logits(again, 126), logits(model, 126))


def test_a_tower_of_another_size_than_the_processor_is_refused(built, copied: Path, tmp_path: Path) -> None:
    model, processor = built
    with pytest.raises(ValueError, match="works at 84 px, not 504 px; load it with image_size=504"):
        save_model(model, processor.with_image_size(504), tmp_path / "m")
    processor.with_image_size(504).save(copied)
    with pytest.raises(ValueError, match="works at 84 px, not 504 px"):
        load(copied)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_damaged_key_sets_are_refused(copied: Path, change: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    key = "multi_modal_projector.linear_1.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["language_model.extra"] = torch.ones(1)
    else:
        tensors[key] = tensors[key][:3].contiguous()
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 (of another )?{change}"):
        load(copied)


def test_truncated_files_are_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: \d+ bytes, but its header announces"):
        load(copied)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cut short"):
        load(copied)


def test_other_folders_are_refused(tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint there"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a language model alone"):
        load(tiny_llm)


@pytest.mark.parametrize("after_commit", [False, True])
def test_interrupted_save(built, copied: Path, monkeypatch, after_commit: bool) -> None:
    """A save that dies leaves the old model; one that dies while moving finished files is completed by the next load."""
    model, processor = copy.deepcopy(built[0]), built[1]
    before = logits(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    if after_commit:
        moves = []
        original = Path.replace

        def die(self: Path, target: Path) -> Path:
            moves.append(self.name)
            if len(moves) == 3:
                raise KeyboardInterrupt
            return original(self, target)

        monkeypatch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, processor, copied)
        monkeypatch.undo()
        assert torch.equal(logits(load(copied)[0]), logits(model))
    else:
        original_write = weights.write_file

        def full(file: Path, state: weights.State, *_: object) -> None:
            original_write(file, state)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(weights, "write_file", full)
        with pytest.raises(ValueError, match=r"No space left on device\); the previous save is unchanged"):
            save_model(model, processor, copied, max_shard_bytes=300_000)
        monkeypatch.undo()
        assert torch.equal(logits(load(copied)[0]), before)
        assert not any(entry.is_dir() for entry in copied.iterdir())


def test_a_wrong_write_is_noticed(built, tmp_path: Path, monkeypatch) -> None:
    def forget(folder: Path, state: weights.State, *_: object) -> list[str]:
        return weights.write_weights(folder, dict(list(state.items())[:-1]))

    monkeypatch.setattr(checkpoint_module, "write_weights", forget)
    with pytest.raises(ValueError, match=r"as written\): tensors do not fit the model: 1 missing"):
        save_model(*built, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_gathered_state_is_written_instead_of_the_model(built, tmp_path: Path) -> None:
    model, processor = built
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    save_model(model, processor, tmp_path / "m", state=gathered)
    assert torch.equal(load(tmp_path / "m")[0].lm_head.weight, model.lm_head.weight + 1)


def test_fingerprint_follows_the_content(built, saved: Path, tmp_path: Path) -> None:
    model, processor = copy.deepcopy(built[0]), built[1]
    save_model(model, processor, tmp_path / "shards", max_shard_bytes=200_000)
    assert fingerprint(saved) == fingerprint(tmp_path / "shards")
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert fingerprint(tmp_path) == fingerprint(saved)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01)
    save_model(model, processor, tmp_path / "shards")
    assert fingerprint(saved) != fingerprint(tmp_path / "shards")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_loading_spares_head_tower_and_projector(
    built, saved: Path, tmp_path: Path, bits: str
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, processor = load(saved, quantization=bits, dtype=torch.float32)
    kind = bitsandbytes.nn.Linear4bit if bits == "4bit" else bitsandbytes.nn.Linear8bitLt
    quantised = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert len(quantised) == 14
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
    gap = (logits(model) - logits(built[0])).abs().max()
    assert 0 < gap < 0.5
    with pytest.raises(ValueError, match="quantised model cannot be saved"):
        save_model(model, processor, tmp_path / "q")
    with pytest.raises(ValueError, match="'2bit'; it can be"):
        load(saved, quantization="2bit")
