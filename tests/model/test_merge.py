"""Merging: equal to PEFT's, equal after a reload, rounded once, and refused on a wrong base."""

import importlib.util
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geochat.model.adapter import AdapterSpec, BaseRecord, attach, save_adapter, trainable_groups
from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model
from geochat.model.formats.adapters import read_adapter
from geochat.model.merge import logit_gap, merge_adapter
from geochat.model.weights import open_weights

SPECS = {
    "lora": AdapterSpec(r=4, alpha=8),
    "lora, projector": AdapterSpec(r=4, alpha=8, train_projector=True),
    "dora, projector": AdapterSpec(r=4, alpha=8, use_dora=True, train_projector=True),
}


@pytest.fixture(scope="module")
def base(tiny_llm: Path, tiny_clip: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(*build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32), folder)
    return folder


def make_adapter(model, processor, folder: Path, spec: AdapterSpec, record: BaseRecord):
    draw = torch.Generator().manual_seed(0)
    adapted = attach(model, spec)
    for _, parameter in chain.from_iterable(trainable_groups(adapted).values()):
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=draw)
    save_adapter(adapted, processor, folder, base=record)
    return adapted.eval()


def logits(model, image_size: int = 84) -> torch.Tensor:
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[513] * (image_size // 14) ** 2, *range(5, 25)]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("name", SPECS)
def test_merged_model_equals_adapter_and_peft(base: Path, tmp_path: Path, name: str) -> None:
    adapted = make_adapter(*load(base), tmp_path / "a", SPECS[name], BaseRecord.of(base))
    gap = merge_adapter(tmp_path / "a", None, tmp_path / "m", max_shard_bytes=300_000)
    assert 0 < gap < 1e-5
    merged, processor = load(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=0)
    assert processor.template.name == "vicuna_v1"
    theirs = adapted.merge_and_unload()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, atol=1e-6, rtol=0, msg=key)


def test_gap_of_a_trained_model_is_that_of_the_weights(tmp_path: Path) -> None:
    """Trained weights have large logits, on which float32 arithmetic alone differs by more than the bound."""
    model, processor = load("playground/nano", dtype=torch.float32)
    make_adapter(model, processor, tmp_path / "a", SPECS["dora, projector"], BaseRecord.of("playground/nano"))
    gap = merge_adapter(tmp_path / "a", None, tmp_path / "m", torch.float32)
    assert 0 < gap < 1e-5
    assert logit_gap("playground/nano", tmp_path / "m", dtype=torch.float32) > 0.1


def test_untouched_tensors_are_copied_bit_for_bit(base: Path, tmp_path: Path) -> None:
    make_adapter(*load(base), tmp_path / "a", SPECS["lora"], BaseRecord.of(base))
    merge_adapter(tmp_path / "a", None, tmp_path / "m", probe=False)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "m/model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 14
    assert all("language_model.model.layers." in key and "_proj.weight" in key for key in changed)


@pytest.mark.parametrize("name", SPECS)
def test_half_precision_is_rounded_once(base: Path, tmp_path: Path, name: str) -> None:
    """float32 delta on the bfloat16 base, then one rounding: not PEFT's sum in bfloat16."""
    model, processor = load(base)
    save_model(model, processor, tmp_path / "half", dtype=torch.bfloat16)
    model, processor = load(tmp_path / "half", dtype=torch.float32)
    adapted = make_adapter(model, processor, tmp_path / "a", SPECS[name], BaseRecord.of(tmp_path / "half"))
    merge_adapter(tmp_path / "a", None, tmp_path / "m", probe=False)
    merged = load(tmp_path / "m")[0].state_dict()
    exact = adapted.merge_and_unload().state_dict()
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    for key, value in exact.items():
        neighbours = (merged[key].float() - value).abs() / value.abs().clamp_min(1e-12)
        assert neighbours.max() <= 2**-8, key  # half a unit in the last place


def test_adapter_trained_on_a_quantised_base(base: Path, tmp_path: Path) -> None:
    """QLoRA: bfloat16 adapter weights, merged into the full base, never into the rounded one."""
    pytest.importorskip("bitsandbytes")
    for name in ("lora, projector", "dora, projector"):
        quantised, processor = load(base, quantization="4bit", dtype=torch.bfloat16)
        adapted = make_adapter(
            quantised, processor, tmp_path / name, SPECS[name], BaseRecord.of(base)
        ).train()
        ids = torch.tensor([[1, *[513] * 36, *range(5, 25)]])
        pixels = torch.zeros(1, 3, 84, 84, dtype=torch.bfloat16)
        adapted(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        assert all(p.grad is not None for _, p in chain.from_iterable(trainable_groups(adapted).values()))
        assert merge_adapter(tmp_path / name, None, tmp_path / "m") < 2e-5


def test_base_from_parts(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """A frozen fresh projector and the resampled table end up in the merged model too."""
    model, processor = build_model(tiny_llm, tiny_clip, image_size=126, dtype=torch.float32, seed=5)
    adapted = make_adapter(
        model, processor, tmp_path / "a", SPECS["lora"], BaseRecord.of(tiny_llm, tiny_clip)
    )
    assert merge_adapter(tmp_path / "a", None, tmp_path / "m") < 1e-5
    merged, processor = load(tmp_path / "m")
    assert processor.image_size == 126
    torch.testing.assert_close(logits(merged, 126), logits(adapted, 126), atol=1e-5, rtol=0)


def test_one_tensor_at_a_time(base: Path, tmp_path: Path) -> None:
    """Nothing is read before it is written: the merged table only describes."""
    make_adapter(*load(base), tmp_path / "a", SPECS["dora, projector"], BaseRecord.of(base))
    state = open_weights(base)
    read: list[str] = []
    for key, entry in state.items():
        state[key] = entry.map(lambda tensor, key=key: read.append(key) or tensor)
    merged = read_adapter(tmp_path / "a").applied(state)
    assert read == []
    merged["language_model.lm_head.weight"].read()
    assert read == ["language_model.lm_head.weight"]


def test_wrong_bases_and_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    model, processor = load(base)
    make_adapter(model, processor, tmp_path / "a", SPECS["dora, projector"], BaseRecord.of(base))
    other, processor = load(base)
    other.lm_head.weight.data.add_(0.1)
    save_model(other, processor, tmp_path / "other")
    with pytest.raises(ValueError, match="not the base this adapter was trained on"):
        merge_adapter(tmp_path / "a", tmp_path / "other", tmp_path / "m")
    with pytest.raises(ValueError, match="which the merge reads"):
        merge_adapter(tmp_path / "a", None, tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter folder"):
        merge_adapter(base, None, tmp_path / "m")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.lora_magnitude_vector"))
    save_file({name: value for name, value in tensors.items() if name != key}, file)
    with pytest.raises(ValueError, match="has no lora_magnitude_vector"):
        merge_adapter(tmp_path / "a", None, tmp_path / "m")
    name = key.replace("lora_magnitude_vector", "lora_B.weight")
    save_file({**tensors, name: tensors[name][:10].contiguous()}, file)
    with pytest.raises(ValueError, match="does not fit this base, which has it as"):
        merge_adapter(tmp_path / "a", None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_command_line(base: Path, tmp_path: Path, capsys, refused) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts/merge_lora_weights.py"
    spec = importlib.util.spec_from_file_location("merge_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_adapter(*load(base), tmp_path / "a", SPECS["lora"], BaseRecord.of(base))
    arguments = ["--model-path", str(tmp_path / "a"), "--save-model-path", str(tmp_path / "m")]
    assert module.main(arguments) == 0
    printed = capsys.readouterr().out
    gap = float(printed.rsplit("merged model: ")[-1])
    assert 0 < gap < 1e-5
    assert module.main([*arguments, "--no-probe", "--dtype", "bfloat16", "--model-base", str(base)]) == 0
    assert load(tmp_path / "m")[0].dtype == torch.bfloat16
    assert "gap" not in capsys.readouterr().out
    arguments = ["--model-path", str(tmp_path), "--save-model-path", str(tmp_path / "m")]
    assert "no adapter folder" in refused(module.main, arguments)
    assert math.isnan(merge_adapter(tmp_path / "a", base, tmp_path / "m", probe=False))
