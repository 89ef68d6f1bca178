"""One model from an LLM folder, a CLIP folder and a projector; against the original programs' outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from geochat.data.sample import Sample
from geochat.model.build import build_model
from geochat.model.weights import open_weights

EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def golden_model(assets: Path):
    golden = assets / "golden"
    clip = golden / "clip-vit-tiny-patch14-336"
    return build_model(golden / "geochat_tiny", clip, dtype=torch.float32, attn_implementation="eager")


def open_rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_golden_features(assets: Path, golden_model) -> None:
    model, processor = golden_model
    expected = json.loads((assets / "golden/expected/geochat/features.json").read_text())
    tensors = load_file(assets / "golden/expected/geochat/features.safetensors")
    pixels = processor.pixels(open_rgb(assets / "golden/images" / expected["image"]))[None]
    with torch.no_grad():
        output = model.model.get_image_features(pixels, return_dict=True)
        tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = output.pooler_output[0]
    for name, tensor in (("tower", tower[0]), ("projected", projected)):
        assert tensor.mean().item() == pytest.approx(expected[f"{name}_mean"], abs=1e-5)
        assert tensor.std().item() == pytest.approx(expected[f"{name}_std"], abs=1e-5)
        (golden,) = [value for key, value in tensors.items() if name in key]
        torch.testing.assert_close(
            tensor[: golden.reshape(-1, 64).shape[0]], golden.reshape(-1, 64), atol=1e-5, rtol=0
        )


def test_golden_logits_and_losses(assets: Path, golden_model) -> None:
    """Batch 1, eager, float32, against GeoChat's own code; the added vocabulary rows are cut off (G6)."""
    model, processor = golden_model
    golden = assets / "golden"
    logits = load_file(golden / "expected/geochat/logits_last4.safetensors")
    losses = json.loads((golden / "expected/geochat/losses.json").read_text())
    encoder = processor.encoder()
    for record in json.loads((golden / "conversations.json").read_text()):
        sample = Sample.from_record(record)
        encoded = encoder.encode(sample)
        pixels = [processor.pixels(open_rgb(golden / name)) for name in sample.images]
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor(encoded.input_ids)[None].long(),
                pixel_values=torch.stack(pixels) if pixels else None,
            ).logits[..., :1000]
        expected = logits[record["id"]].reshape(4, -1)
        torch.testing.assert_close(output[0, -4:], expected, atol=1e-5, rtol=0)
        labels = torch.tensor(encoded.labels).long()
        loss = torch.nn.functional.cross_entropy(output[0, :-1], labels[1:], ignore_index=-100)
        assert loss.item() == pytest.approx(losses[record["id"]]["loss"], abs=1e-5)
        assert len(labels) == losses[record["id"]]["sequence_length"]


def test_vocabulary(tiny_llm: Path, tiny_clip: Path) -> None:
    model, processor = build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)
    source = open_weights(tiny_llm)
    assert (processor.pad_token_id, processor.image_token_id) == (512, 513)
    assert model.config.image_token_index == 513
    assert model.config.pad_token_id == model.config.text_config.pad_token_id == 512
    assert model.config.text_config.vocab_size == 576
    for own, name in ((model.get_input_embeddings(), "model.embed_tokens"), (model.lm_head, "lm_head")):
        table = source[f"{name}.weight"].read()
        assert own.weight.shape == (576, 64)
        assert torch.equal(own.weight[:512], table)
        mean = table.double().mean(0).float()
        assert all(torch.equal(row, mean) for row in own.weight[512:])
    generation = model.generation_config
    assert generation.suppress_tokens == list(range(512, 576))
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 512)


def test_building_is_deterministic(tiny_llm: Path, tiny_clip: Path) -> None:
    torch.manual_seed(1)
    first = build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)[0].state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)[0].state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_pickles_and_shards_are_read(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    expected = build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)[0].state_dict()
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    tensors = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old releases stored it
    keys = sorted(tensors)
    names = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(keys)}
    for name in set(names.values()):
        torch.save({key: tensors[key] for key in keys if names[key] == name}, llm / name)
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    tower = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    whole = {**tower, "logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(4)}
    whole["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    torch.save(whole, clip / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    state = build_model(llm, clip, image_size=84, dtype=torch.float32)[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    (llm / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="names pytorch_model-00002-of-00002"):
        build_model(llm, clip, image_size=84)


def test_tied_embeddings_are_untied(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    tensors = load_file(llm / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, llm / "model.safetensors")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = build_model(llm, tiny_clip, image_size=84)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


PREFIXES = ("model.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector.", "model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_projector_files(tiny_llm: Path, tiny_clip: Path, tmp_path: Path, prefix: str) -> None:
    draw = torch.Generator().manual_seed(3)
    layers = {
        f"{prefix}{layer}.{part}": torch.randn(*shape, generator=draw)
        for layer in (0, 2)
        for part, shape in (("weight", (64, 64)), ("bias", (64,)))
    }
    torch.save(layers, tmp_path / "mm_projector.bin")
    model, _ = build_model(tiny_llm, tiny_clip, tmp_path / "mm_projector.bin", image_size=84)
    projector = model.model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, layers[f"{prefix}0.weight"])
    assert torch.equal(projector.linear_2.bias, layers[f"{prefix}2.bias"])


def test_llava_folder_brings_its_projector_and_a_file_replaces_it(assets: Path) -> None:
    golden = assets / "golden"
    clip = golden / "clip-vit-tiny-patch14-336"
    own = open_weights(golden / "llava_tiny")["model.mm_projector.0.weight"].read().float()
    model, _ = build_model(golden / "llava_tiny", clip, image_size=336, dtype=torch.float32)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, own)
    stage1 = golden / "llava_tiny_pretrain"
    model, _ = build_model(golden / "llava_tiny", clip, stage1, image_size=336, dtype=torch.float32)
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, own)


def test_golden_concatenated_feature_layers(assets: Path) -> None:
    """VHM's layers 1, 2 and 3, side by side: the projector of its folder takes three times the tower's width."""
    golden = assets / "golden"
    model, processor = build_model(
        golden / "vhm_tiny", golden / "vhm_tiny/vision_tower", image_size=336, dtype=torch.float32,
        attn_implementation="eager",
    )  # fmt: skip
    assert model.config.vision_feature_layer == [1, 2, 3]
    assert model.model.multi_modal_projector.linear_1.in_features == 192
    expected = load_file(golden / "expected/vhm/logits_last4.safetensors")
    for row in json.loads((golden / "expected/vhm/tokens.json").read_text()):
        ids = torch.tensor(row["input_ids"])
        image = (ids == -200).nonzero().item()
        ids = torch.cat([ids[:image], torch.full((576,), processor.image_token_id), ids[image + 1 :]])
        pixels = processor.pixels(open_rgb(golden / row["image"]))[None]
        with torch.no_grad():
            output = model(input_ids=ids[None], pixel_values=pixels).logits[0, -4:, :1000]
        torch.testing.assert_close(output, expected[row["id"]].reshape(4, -1), atol=2e-5, rtol=0)


def test_wrong_folders_are_named(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Llama-architecture folder is needed"):
        build_model(tiny_clip, tiny_clip)
    with pytest.raises(ValueError, match="a CLIP folder is needed"):
        build_model(tiny_llm, tiny_llm)
    with pytest.raises(ValueError, match=r"no config\.json"):
        build_model(tmp_path, tiny_clip)
    with pytest.raises(ValueError, match="no multiple of the tower's patch size 14; try 490 or 504"):
        build_model(tiny_llm, tiny_clip, image_size=500)
    with pytest.raises(ValueError, match="unknown chat template 'vicuna_v9'"):
        build_model(tiny_llm, tiny_clip, image_size=84, template="vicuna_v9")
    torch.save({"mm_projector.0.weight": torch.ones(3, 3)}, tmp_path / "small.bin")
    with pytest.raises(ValueError, match=r"missing.*shape"):
        build_model(tiny_llm, tiny_clip, tmp_path / "small.bin", image_size=84)
    torch.save({"model.embed_tokens.weight": torch.ones(3, 3)}, tmp_path / "small.bin")
    with pytest.raises(ValueError, match="no part of a two-layer projector"):
        build_model(tiny_llm, tiny_clip, tmp_path / "small.bin", image_size=84)


class Malicious:
    def __reduce__(self):
        return (print, ("run by the pickle",))


def test_pickles_cannot_run_code(tiny_llm: Path, tiny_clip: Path, tmp_path: Path, capfd) -> None:
    torch.save({"mm_projector.0.weight": Malicious()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        build_model(tiny_llm, tiny_clip, tmp_path / "mm_projector.bin", image_size=84)
    assert "run by the pickle" not in capfd.readouterr().out
