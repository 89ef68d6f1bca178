"""llama.cpp's files: written, read back, and computed as llama.cpp computes."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from geochat.data.sample import Turn
from geochat.data.templates import TEMPLATES, get_template
from geochat.model.adapter import AdapterSpec, attach, save_adapter
from geochat.model.base import BaseRecord
from geochat.model.build import build_model, read_parts
from geochat.model.checkpoint import fingerprint, load, read_checkpoint
from geochat.model.convert import differences, main
from geochat.model.export_gguf import add_metadata, write_gguf
from geochat.model.formats.gguf import gguf_name, gguf_template, pairs_together
from geochat.model.formats.gguf_file import open_gguf
from geochat.model.formats.gguf_read import read_text
from geochat.model.formats.sentencepiece import SentencePieceModel
from geochat.model.inspect import describe
from geochat.model.open import open_model, recognise
from geochat.model.tokenizer import load_tokenizer, tokenizer_of
from geochat.model.weights import Entry, of_tensor, open_weights

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model as GGUF, float32."""
    folder = tmp_path_factory.mktemp("gguf") / "pair"
    write_gguf(folder, *read_checkpoint(tiny_model))
    return folder


def copied(pair: Path, target: Path) -> Path:
    return shutil.copytree(pair, target)


def changed(file: Path, target: Path, values: dict[str, object], quantise: bool = False) -> Path:
    """A copy of a GGUF file through the gguf package, with other metadata or with its matrices in Q8_0."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(
        target, values.get("general.architecture", open_gguf(file).metadata["general.architecture"])
    )
    facts = {**open_gguf(file).metadata, **values, "general.architecture": None}
    add_metadata(writer, {key: value for key, value in facts.items() if value is not None})
    for tensor in reader.tensors:
        if quantise and tensor.data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("folder", ["geochat_tiny", "llava_tiny", "vhm_tiny"])
def test_there_and_back(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    source = ["--source", str(assets / "golden" / folder)]
    probe = [] if folder == "llava_tiny" else ["--no-probe"]
    main([*source, "--target", str(tmp_path / "gguf"), "--format", "gguf", "--verify", *probe])
    assert "tensors equal to the source, token ids too" in capsys.readouterr().out
    main([*source, "--target", str(tmp_path / "hf")])
    main(["--source", str(tmp_path / "gguf"), "--target", str(tmp_path / "again")])
    before, after = open_weights(tmp_path / "hf"), open_weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert not differences(before, after, torch.float16)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert ours["vision_feature_layer"] == theirs["vision_feature_layer"]
    unused = {"architectures", "projection_dim", "bos_token_id", "eos_token_id", "pad_token_id"}
    for part in ("text_config", "vision_config"):
        assert {key: ours[part][key] for key in ours[part].keys() - unused} == {
            key: theirs[part][key] for key in theirs[part].keys() - unused
        }


def test_the_pair_is_the_model(tiny_model: Path, pair: Path) -> None:
    assert recognise(pair) == recognise(pair / "model-f32.gguf") == "gguf"
    assert fingerprint(pair) == fingerprint(pair / "model-f32.gguf")
    model, processor = load(pair)
    original, own = load(tiny_model)
    for key, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert (model.dtype, processor.image_size, processor.template) == (torch.float32, 84, own.template)
    assert processor.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    rows = dict(describe(pair)[0])
    assert rows["kind"] == "model, GGUF files (llama.cpp)"


def test_a_language_model_where_a_folder_would_do(
    pair: Path, tiny_model: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    file = shutil.copy(pair / "model-f32.gguf", tmp_path / "llm.gguf")
    assert recognise(tmp_path / "llm.gguf") == recognise(tmp_path) == "llm"
    config, state, _ = read_parts(file, tiny_clip, image_size=84)
    wanted = read_checkpoint(tiny_model)[1]
    for key, entry in state.items():
        if key.startswith("language_model."):
            assert torch.equal(entry.read()[:500], wanted[key].read()[:500]), key
    assert config.text_config.max_position_embeddings == 4096
    record = BaseRecord.of(file, tiny_clip)
    assert record.moved_to(None, None) == record
    with pytest.raises(ValueError, match="a language model alone"):
        open_model(file)
    with pytest.raises(ValueError, match="has no vision tower; give its CLIP folder with --vision-tower"):
        read_parts(file)


def test_an_adapter_on_a_pair_takes_the_tower_its_record_names(
    pair: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """The record may name a CLIP folder beside the pair; attached and merged alike, that tower is the model's."""
    plain, processor = build_model(pair, tiny_clip, image_size=84, dtype=torch.float32)
    record = BaseRecord.of(pair, tiny_clip)
    save_adapter(attach(plain, AdapterSpec(r=4, alpha=8)), processor, tmp_path / "a", base=record)
    named, merged = read_parts(pair, tiny_clip, image_size=84, seed=None)[1], open_model(tmp_path / "a")[1]
    attached = load(tmp_path / "a")[0].get_base_model().model.vision_tower.state_dict()
    tower = [key for key in merged if key.startswith("vision_tower.")]
    for key in tower:
        assert torch.equal(merged[key].read(), named[key].read()), key
        assert torch.equal(attached[key.removeprefix("vision_tower.vision_model.")], named[key].read()), key
    own = open_model(pair)[1]
    assert any(not torch.equal(own[key].read(), merged[key].read()) for key in tower)


def test_the_projector_file_may_lie_elsewhere(pair: Path, tmp_path: Path) -> None:
    for name in ("model", "mmproj"):
        (tmp_path / name).mkdir()
        shutil.copy(pair / f"{name}-f32.gguf", tmp_path / name)
    moved = open_model(tmp_path / "model", vision_tower=tmp_path / "mmproj/mmproj-f32.gguf")[1]
    assert not differences(open_model(pair)[1], moved, torch.float32)


def test_rows_stand_as_the_rotation_wants_them() -> None:
    """Scores of rotated queries and keys, as transformers rotates and as llama.cpp does: neighbouring pairs."""
    heads, kv_heads, width, positions = 4, 2, 8, 5
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(positions, 16, generator=draw, dtype=torch.float64)
    weights = {
        part: torch.randn(count * width, 16, generator=draw, dtype=torch.float64)
        for part, count in (("q", heads), ("k", kv_heads))
    }
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)[None].double()

    def in_pairs(vectors: torch.Tensor) -> torch.Tensor:  # [position, head, width]
        even, odd = vectors[..., 0::2], vectors[..., 1::2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.einsum("phw,qhw->hpq", queries, keys.repeat_interleave(heads // kv_heads, dim=1))

    plain = {part: (x @ weight.T).reshape(positions, -1, width) for part, weight in weights.items()}
    twice = torch.cat([angles, angles], dim=-1)
    ours = apply_rotary_pos_emb(
        plain["q"].transpose(0, 1)[None],
        plain["k"].transpose(0, 1)[None],
        twice.cos()[None],
        twice.sin()[None],
    )
    wanted = scores(*(part[0].transpose(0, 1) for part in ours))
    stored = {}
    for part, weight in weights.items():
        key = f"language_model.model.layers.0.self_attn.{part}_proj.weight"
        entry = pairs_together(key, of_tensor(weight), heads, kv_heads)
        stored[part] = (x @ entry.read().T).reshape(positions, -1, width)
        assert torch.equal(pairs_together(key, entry, heads, kv_heads, backwards=True).read(), weight)
    torch.testing.assert_close(scores(in_pairs(stored["q"]), in_pairs(stored["k"])), wanted)
    assert (scores(in_pairs(plain["q"]), in_pairs(plain["k"])) - wanted).abs().max() > 1


def test_quantised_files_are_read(pair: Path, tmp_path: Path) -> None:
    for part in ("model", "mmproj"):
        changed(pair / f"{part}-f32.gguf", tmp_path / f"{part}-q8.gguf", {}, quantise=True)
    config, state, _ = open_model(tmp_path)
    assert config.dtype == torch.float16
    for key, entry in open_model(pair)[1].items():
        found, wanted = state[key].read().float(), entry.read()
        # Half a step of a block; its scale and the result are rounded to float16.
        assert (found - wanted).abs().max() <= wanted.abs().max() / 127 * 0.6, key
    assert state["language_model.model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


def vocabularies(tiny_model: Path, folder: Path) -> Iterator[tuple[object, SentencePieceModel]]:
    """Tokenizers as they are, and what their GGUF file says of them."""
    config, state, processor = read_checkpoint(tiny_model)
    write_gguf(folder / "plain", config, state, processor)
    yield processor.tokenizer, read_text(folder / "plain/model-f32.gguf").vocabulary
    parts = folder / "parts"
    parts.mkdir()
    (parts / "tokenizer.model").write_bytes(processor.sentencepiece)
    names = {str(512 + i): {"content": f"<|im_{name}|>"} for i, name in enumerate(("start", "end"))}
    (parts / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": names}))
    tokenizer = load_tokenizer(parts)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.backend_tokenizer.add_special_tokens(["<image>"])
    processor = replace(
        processor,
        tokenizer=tokenizer,
        image_token_id=515,
        pad_token_id=514,
        template=get_template("internlm2_chat"),
    )
    write_gguf(folder / "chat", config, state, processor)
    yield tokenizer, read_text(folder / "chat/model-f32.gguf").vocabulary


def test_ids_are_those_of_the_original_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    cases = []
    for original, vocabulary in vocabularies(tiny_model, tmp_path):
        rebuilt = tokenizer_of(vocabulary, "rebuilt")
        parsed = SentencePieceModel.parse(vocabulary.serialise(), "again")
        assert parsed.pieces == vocabulary.pieces
        assert (parsed.unk_id, parsed.bos_id, parsed.eos_id) == (0, 1, 2)
        reference = spm.SentencePieceProcessor(model_proto=vocabulary.serialise())
        assert (reference.bos_id(), reference.eos_id(), reference.unk_id()) == (1, 2, 0)
        cases.append((original.backend_tokenizer, rebuilt.backend_tokenizer, reference))
    words = st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "USER:", " harbour", "\n", "  ", "▁", "🚢"]
    )

    @given(st.lists(st.one_of(words, st.text(max_size=8)), max_size=8).map("".join))
    @settings(max_examples=60)
    def same(text: str) -> None:
        for original, rebuilt, reference in cases:
            ids = original.encode(text, add_special_tokens=False).ids
            assert rebuilt.encode(text, add_special_tokens=False).ids == ids
            if "<" not in text:  # sentencepiece itself does not look for special tokens in a text
                assert reference.encode(text) == ids

    same()
    assert 513 in cases[1][1].encode("<|im_end|>").ids


def test_stops_and_template_travel(tiny_model: Path, tmp_path: Path) -> None:
    list(vocabularies(tiny_model, tmp_path))
    facts = open_gguf(tmp_path / "chat/model-f32.gguf").metadata
    assert (facts["tokenizer.ggml.eos_token_id"], facts["tokenizer.ggml.eot_token_id"]) == (2, 513)
    assert facts["tokenizer.ggml.token_type"][510:] == [1, 1, 3, 3]
    assert len(facts["tokenizer.ggml.tokens"]) == 514
    processor = open_model(tmp_path / "chat")[2]
    assert processor.template == get_template("internlm2_chat")
    assert "tokenizer.ggml.eot_token_id" not in open_gguf(tmp_path / "plain/model-f32.gguf").metadata


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_the_file(name: str) -> None:
    """In plain Jinja it renders what ours does; llama.cpp's server and Python's handler send a picture as a mark."""
    template = get_template(name)
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A ship."), Turn("user", "Where?")]
    wanted = template.render(turns, True)
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(gguf_template(template.jinja))

    def render(content: object) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        messages[0]["content"] = content
        return plain.render(messages=messages, add_generation_prompt=True, bos_token="")

    assert render("<image>\nWhat?") == wanted
    if name == "plain":
        return  # it knows no picture but <image>; nobody chats with a model of the first stage
    for mark in ("<__media__>", "<__media_a8Xq__>"):
        for content in (
            f"{mark}What?",
            f"{mark}\nWhat?",
            [{"type": "text", "text": mark}, {"type": "text", "text": "What?"}],
        ):
            assert render(content) == wanted.replace("<image>", mark)


def test_one_tensor_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    alive: list[int] = [0, 0]  # now, at most

    def watched(entry: Entry) -> Entry:
        def read() -> torch.Tensor:
            tensor = entry.read().clone()
            alive[0] += 1
            alive[1] = max(alive)
            weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
            return tensor

        return replace(entry, read=read)

    config, state, processor = read_checkpoint(tiny_model)
    write_gguf(tmp_path / "x", config, {key: watched(entry) for key, entry in state.items()}, processor)
    assert alive[1] <= 2


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_types_and_leftovers(
    tiny_model: Path, pair: Path, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = copied(pair, tmp_path / "x")
    (folder / "model-q4_0.gguf").write_bytes(b"made by hand")
    write_gguf(folder, *read_checkpoint(tiny_model), dtype=dtype)
    assert sorted(file.name for file in folder.iterdir()) == [
        f"mmproj-{name}.gguf", f"model-{name}.gguf", "model-q4_0.gguf",
    ]  # fmt: skip
    tensors = (
        open_gguf(folder / f"model-{name}.gguf").tensors | open_gguf(folder / f"mmproj-{name}.gguf").tensors
    )
    for key, entry in tensors.items():
        patches = key == "v.patch_embd.weight" and dtype is torch.bfloat16
        assert entry.dtype == (torch.float32 if len(entry.shape) == 1 or patches else dtype), key
    (folder / "model-q4_0.gguf").unlink()
    assert not differences(read_checkpoint(tiny_model)[1], open_model(folder)[1], dtype, rows=512)


def test_what_llama_cpp_cannot_do_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def message(change: object = None, **other: object) -> str:
        config, state, processor = read_checkpoint(tiny_model)
        if change:
            change(config)
        with pytest.raises(ValueError) as caught:
            write_gguf(tmp_path / "x", config, state, replace(processor, **other))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x").exists()
        return str(caught.value)

    assert "no tokenizer.model" in message(sentencepiece=None)
    assert "vision_feature_layer [4, 2]" in message(lambda c: setattr(c, "vision_feature_layer", [4, 2]))
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    assert "rope scaling yarn" in message(lambda c: setattr(c.text_config, "rope_parameters", rope))
    assert "hidden_act gelu in the language" in message(
        lambda c: setattr(c.text_config, "hidden_act", "gelu")
    )
    assert "class token" in message(lambda c: setattr(c, "vision_feature_select_strategy", "full"))
    config, state, processor = read_checkpoint(tiny_model)
    with pytest.raises(ValueError, match="holds another checkpoint"):
        write_gguf(tiny_model, config, state, processor)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        write_gguf(tmp_path / "x", config, state, processor, dtype=torch.float64)
    broken = replace(
        processor, sentencepiece=processor.sentencepiece.replace("▁harbour".encode(), "▁narbour".encode())
    )
    with pytest.raises(ValueError, match=r"token \d+ is '▁harbour', which its tokenizer.model does not have"):
        write_gguf(tmp_path / "x", config, state, broken)


def test_other_files_are_refused(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sight = pair / "model-f32.gguf", pair / "mmproj-f32.gguf"

    def message(file: Path, read: Callable[[Path], object] = open_model, **values: object) -> str:
        target = changed(file, tmp_path / "x.gguf", values) if values else file
        with pytest.raises(ValueError) as caught:
            read(target)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def as_text(file: Path) -> object:
        return open_model(file, vision_tower=sight)

    def as_sight(file: Path) -> object:
        return open_model(text, vision_tower=file)

    assert "a qwen2 model; of GGUF language" in message(text, **{"general.architecture": "qwen2"})
    assert "its tokenizer is 'gpt2'" in message(text, as_text, **{"tokenizer.ggml.model": "gpt2"})
    assert "rope scaling 'yarn' is not read" in message(text, as_text, **{"llama.rope.scaling.type": "yarn"})
    assert "a mixture of experts" in message(text, as_text, **{"llama.expert_count": 8})
    assert "has no llama.block_count" in message(text, as_text, **{"llama.block_count": None})
    assert "llama.block_count is a str" in message(text, as_text, **{"llama.block_count": "two"})
    assert "projector ldp; clip and mlp" in message(sight, as_sight, **{"clip.projector_type": "ldp"})
    assert "takes pictures in tiles" in message(
        sight, as_sight, **{"clip.vision.image_grid_pinpoints": [336, 672]}
    )
    assert "image_mean is not CLIP's" in message(
        sight, as_sight, **{"clip.vision.image_mean": [0.5, 0.5, 0.5]}
    )
    assert "name the language model's file" in message(sight)
    assert "cannot be read (No such file" in message(tmp_path / "nowhere.gguf")
    for extra in ("model-two.gguf", "mmproj-two.gguf"):
        folder = copied(pair, tmp_path / extra)
        shutil.copy(folder / f"{extra.split('-')[0]}-f32.gguf", folder / extra)
        assert "holds several" in message(folder)
    quantised = changed(text, tmp_path / "q8.gguf", {}, quantise=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'gguf" in message(quantised)


@pytest.mark.parametrize("kept", [0, 3, 20, 900, 60_000, -1])
def test_damaged_files_are_refused(pair: Path, tmp_path: Path, kept: int) -> None:
    data = (pair / "model-f32.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"x\.gguf: (cut short|no GGUF file)"):
        open_model(tmp_path / "x.gguf")


def test_a_stopped_conversion_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    def stopped() -> torch.Tensor:
        raise KeyboardInterrupt

    config, state, processor = read_checkpoint(tiny_model)
    key = "multi_modal_projector.linear_1.weight"  # in the second file
    broken = {**state, key: replace(state[key], read=stopped)}
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "x", config, broken, processor, resume="key")
    assert not list((tmp_path / "x").glob("*.gguf"))
    kept = (tmp_path / "x/.saving/model-f32.gguf").stat().st_mtime_ns
    write_gguf(tmp_path / "x", config, state, processor, resume="key")
    assert (tmp_path / "x/model-f32.gguf").stat().st_mtime_ns == kept
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == ["mmproj-f32.gguf", "model-f32.gguf"]


def test_the_source_is_not_written_over(pair: Path, refused: Callable[..., str]) -> None:
    file = str(pair / "model-f32.gguf")
    assert "is the source itself" in refused(main, ["--source", file, "--target", str(pair)])


def test_names_follow_llama_cpp() -> None:
    """Against the table of the gguf package, which converts from transformers' names."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        "post_attention_layernorm",
    ):
        key = f"model.layers.3.{name}"
        assert gguf_name(f"language_model.{key}.weight") == table.get_name(key) + ".weight"
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        assert gguf_name(f"language_model.{name}.weight") == table.get_name(name) + ".weight"
    assert gguf_name("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias") == "v.blk.1.ffn_down.bias"
    assert gguf_name("language_model.model.layers.1.mystery.weight") is None
