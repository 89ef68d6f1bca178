"""Other layouts and back, through the command."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from geochat.model import weights
from geochat.model.canonical import instantiate
from geochat.model.checkpoint import load, save_model, write_checkpoint
from geochat.model.convert import WRITERS, Source, differences
from geochat.model.convert import convert as run_convert
from geochat.model.extract import main as extract
from geochat.model.open import open_model
from geochat.model.probe import largest_gap, probe_logits
from geochat.model.projector import read_projector
from geochat.model.weights import State, open_weights


@pytest.fixture(scope="module")
def convert():
    script = Path(__file__).resolve().parents[2] / "scripts/convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def same(one: State, other: State, dtype: torch.dtype = torch.float16) -> bool:
    return one.keys() == other.keys() and not differences(one, other, dtype)


@pytest.mark.parametrize("folder", ["geochat_tiny", "llava_tiny", "vhm_tiny", "lora", "dora"])
def test_every_layout_to_canonical_and_back(
    assets: Path, tmp_path: Path, convert, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = assets / "golden" / folder
    for layout in ("hf", "llava"):
        target = tmp_path / layout
        assert (
            convert(["--source", str(source), "--target", str(target), "--format", layout, "--verify"]) == 0
        )
        assert "tensors equal to the source" in capsys.readouterr().out
    assert convert(["--source", str(tmp_path / "llava"), "--target", str(tmp_path / "again")]) == 0
    assert same(open_weights(tmp_path / "again"), open_weights(tmp_path / "hf"))


def test_the_original_layout_has_the_original_names(assets: Path, tmp_path: Path, convert) -> None:
    source = assets / "golden/geochat_tiny"
    convert(["--source", str(source), "--target", str(tmp_path / "out"), "--format", "llava"])
    ours, theirs = open_weights(tmp_path / "out"), open_weights(source)
    derived = ("rotary_emb.inv_freq", "position_ids")
    assert set(ours) == {key for key in theirs if not key.endswith(derived)}
    for key, entry in ours.items():
        if not key.endswith("position_embedding.weight"):
            assert torch.equal(entry.read(), theirs[key].read()), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    told = set(original) - {
        "pretraining_tp",
        "_name_or_path",
        "transformers_version",
        "freeze_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
    }
    assert told <= set(config)
    assert {key: config[key] for key in ("architectures", "model_type", "vocab_size", "torch_dtype")} == {
        key: original[key] for key in ("architectures", "model_type", "vocab_size", "torch_dtype")
    }
    tower = Path(config["mm_vision_tower"])
    assert tower == tmp_path / "out/clip-vit-patch14-504"
    assert open_weights(tower)["vision_model.embeddings.position_embedding.weight"].shape == (1297, 64)


def test_the_original_layout_may_be_moved(assets: Path, tmp_path: Path, convert) -> None:
    """config.json names the tower's place at the time of writing; the folder itself is found all the same."""
    convert(
        ["--source", str(assets / "golden/llava_tiny"), "--target", str(tmp_path / "a"), "--format", "llava"]
    )
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert same(open_model(tmp_path / "b")[1], open_model(assets / "golden/llava_tiny")[1])


def test_dtype_and_size(assets: Path, tmp_path: Path, convert) -> None:
    arguments = ["--source", str(assets / "golden/llava_tiny"), "--target", str(tmp_path / "x"), "--verify"]
    convert([*arguments, "--image-size", "504", "--dtype", "bfloat16"])
    model, processor = load(tmp_path / "x")
    assert (model.dtype, processor.image_size) == (torch.bfloat16, 504)


def test_refusals(assets: Path, tmp_path: Path, convert, refused) -> None:
    here = str(assets / "golden/llava_tiny")
    assert "is the source itself" in refused(convert, ["--source", here, "--target", here])
    assert "no checkpoint there" in refused(
        convert, ["--source", str(tmp_path), "--target", str(tmp_path / "x")]
    )
    copy = shutil.copytree(assets / "golden/geochat_tiny", tmp_path / "copy")
    (copy / "pytorch_model.bin").chmod(0o644)
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    message = refused(convert, ["--source", str(copy), "--target", str(tmp_path / "x")])
    assert "pytorch_model.bin: cannot be read as plain tensors" in message
    assert not (tmp_path / "x").exists()


def test_a_damaged_folder_is_refused_and_nothing_written(
    assets: Path, tmp_path: Path, convert, refused
) -> None:
    sound = tmp_path / "sound"
    model, processor = load(assets / "golden/geochat_tiny", dtype=torch.float32)
    save_model(model, processor, sound, max_shard_bytes=300_000)
    index = sound / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    first = sorted(set(places["weight_map"].values()))[0]
    norm = "language_model.model.norm.weight"

    def damaged(change) -> str:
        folder = shutil.copytree(sound, tmp_path / "damaged", dirs_exist_ok=True)
        change(folder)
        message = refused(convert, ["--source", str(folder), "--target", str(tmp_path / "x")])
        assert not (tmp_path / "x").exists()
        shutil.rmtree(folder)
        return message

    def cut(folder: Path) -> None:
        whole = (folder / first).read_bytes()
        (folder / first).write_bytes(whole[:-100])

    def point_elsewhere(folder: Path) -> None:
        changed = {**places, "weight_map": {**places["weight_map"], norm: "../secret.safetensors"}}
        (folder / index.name).write_text(json.dumps(changed))

    def lose(folder: Path) -> None:
        changed = {key: name for key, name in places["weight_map"].items() if name != first}
        (folder / index.name).write_text(json.dumps({**places, "weight_map": changed}))

    def rename_key(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if norm in tensors:
                tensors["language_model.model.nrom.weight"] = tensors.pop(norm)
                save_file(tensors, file)

    def reshape(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if norm in tensors:
                tensors[norm] = tensors[norm][:-1].contiguous()
                save_file(tensors, file)

    def whole_numbers(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if norm in tensors:
                tensors[norm] = tensors[norm].to(torch.int32)
                save_file(tensors, file)

    assert "1 no floating point (language_model.model.norm.weight is torch.int32)" in damaged(whole_numbers)
    assert re.search(rf"{first}: \d+ bytes, but its header announces \d+", damaged(cut))
    assert "names '../secret.safetensors', which is no file of this folder" in damaged(point_elsewhere)
    assert "missing (" in damaged(lose)
    assert "1 missing (language_model.model.norm.weight); 1 unexpected (language_model.model.nrom" in damaged(
        rename_key
    )
    assert "norm.weight is [63], should be [64]" in damaged(reshape)


def test_a_killed_conversion_goes_on_where_it_was(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third shard is written: nothing looks finished; the second call writes only what was missing."""
    source, target, other = tmp_path / "geochat", tmp_path / "x", tmp_path / "y"
    shutil.copytree(assets / "golden/geochat_tiny", source)
    shutil.copytree(assets / "golden/clip-vit-tiny-patch14-336", tmp_path / "clip-vit-tiny-patch14-336")
    killed = """
import os, signal, sys
from pathlib import Path
from geochat.model import checkpoint, convert, weights

convert.WRITERS["hf"] = lambda *a, **k: checkpoint.write_checkpoint(*a, **k, max_shard_bytes=300_000)
plain = weights.write_file
def write(file, state, *rest):
    if file.name.startswith("model-00003"):
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    plain(file, state, *rest)
weights.write_file = write
convert.convert(convert.Source(Path(sys.argv[1])), sys.argv[2], "hf", progress=False)
"""
    assert subprocess.run([sys.executable, "-c", killed, str(source), str(target)]).returncode == -9
    assert [entry.name for entry in target.iterdir()] == [".saving"]
    with pytest.raises(ValueError, match="its save was stopped: run the command again"):
        open_model(target)
    shutil.copytree(target, other)

    written: list[str] = []
    write_file = weights.write_file

    def noted(file: Path, *rest) -> None:
        written.append(file.name.removesuffix(".partial"))
        write_file(file, *rest)

    def in_small_shards(*given, **named) -> None:
        write_checkpoint(*given, **named, max_shard_bytes=300_000)

    monkeypatch.setattr(weights, "write_file", noted)
    monkeypatch.setitem(WRITERS, "hf", in_small_shards)
    run_convert(Source(source), target, "hf", progress=False)
    everything = sorted(file.name for file in target.glob("model-*.safetensors"))
    assert written == everything[2:]
    assert not (target / ".saving").exists()
    assert same(open_model(target)[1], open_model(source)[1])
    written.clear()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    run_convert(Source(source), other, "hf", progress=False)
    assert written == everything, "the source is another one now: nothing of the first is used"


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (Path.mkdir, (self.folder,))


def test_a_pickle_with_code_is_refused(assets: Path, tmp_path: Path, convert, refused) -> None:
    copy = shutil.copytree(assets / "golden/geochat_tiny", tmp_path / "copy")
    (copy / "pytorch_model.bin").chmod(0o644)
    torch.save({"model.norm.weight": Code(tmp_path / "ran")}, copy / "pytorch_model.bin")
    message = refused(convert, ["--source", str(copy), "--target", str(tmp_path / "x")])
    assert "cannot be read as plain tensors" in message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x").exists()


BASES = {"lora": {}, "dora": {}, "xtuner/converted": {"base": "llava_tiny"}}


@pytest.mark.parametrize("folder", BASES)
def test_an_adapter_stays_an_adapter(assets: Path, tmp_path: Path, convert, folder: str, capsys) -> None:
    """`--format peft`: loads attached, merges to the same weights, and plain PEFT reads it on the canonical base."""
    golden, target = assets / "golden", tmp_path / "adapter"
    base = golden / BASES[folder].get("base", "geochat_tiny" if folder == "lora" else "llava_tiny")
    arguments = ["--source", str(golden / folder), "--target", str(target), "--format", "peft", "--verify"]
    assert convert([*arguments, "--model-base", str(base)]) == 0
    assert "tensors equal to the source, token ids too; largest logit gap" in capsys.readouterr().out
    expected = open_model(golden / folder, base=base)
    merged = instantiate(*expected[:2], folder, dtype=torch.float32)
    attached, processor = load(target, dtype=torch.float32)
    assert isinstance(attached, PeftModel)
    assert largest_gap(probe_logits(attached, processor), probe_logits(merged, processor)) < 1e-5
    convert(["--source", str(base), "--target", str(tmp_path / "base"),
             "--image-size", str(expected[0].vision_config.image_size), "--dtype", "float32"])  # fmt: skip
    plain, processor = load(tmp_path / "base", dtype=torch.float32)
    if folder == "xtuner/converted":
        assert not (target / "non_lora_trainables.safetensors").exists()
    theirs = PeftModel.from_pretrained(plain, target).eval()
    assert largest_gap(probe_logits(theirs, processor), probe_logits(merged, processor)) < 1e-5


def test_a_narrower_adapter_is_verified_as_it_is_written(
    assets: Path, tmp_path: Path, convert, capsys
) -> None:
    golden, target = assets / "golden", tmp_path / "adapter"
    arguments = ["--source", str(golden / "lora"), "--target", str(target), "--format", "peft", "--verify"]
    assert convert([*arguments, "--dtype", "bfloat16", "--model-base", str(golden / "geochat_tiny")]) == 0
    assert "tensors equal to the source" in capsys.readouterr().out
    written = load_file(target / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_only_adapters_become_adapters(assets: Path, tmp_path: Path, convert, refused) -> None:
    source = ["--source", str(assets / "golden/llava_tiny"), "--target", str(tmp_path / "x")]
    assert "is no adapter; --format peft takes adapters only" in refused(
        convert, [*source, "--format", "peft"]
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("layout", ["hf", "peft"])
def test_xtuner_training_checkpoint(assets: Path, tmp_path: Path, convert, layout: str, refused) -> None:
    """The .pth gives what its converted folder gives; alpha, which it does not hold, can be stated."""
    golden = assets / "golden"
    source = [
        "--source",
        str(golden / "xtuner/iter_10.pth"),
        "--target",
        str(tmp_path / "x"),
        "--format",
        layout,
    ]
    assert "does not name its base; say where it is with --model-base" in refused(convert, source)
    places = [
        "--model-base",
        str(golden / "llava_tiny"),
        "--vision-tower",
        str(golden / "clip-vit-tiny-patch14-336"),
    ]
    assert convert([*source, *places, "--dtype", "float32", "--verify"]) == 0
    converted = open_model(golden / "xtuner/converted", base=golden / "llava_tiny")[1]
    assert same(open_model(tmp_path / "x")[1], converted, torch.float32)
    convert([*source, *places, "--dtype", "float32", "--lora-alpha", "8", "--vision-lora-alpha", "1"])
    changed = differences(open_model(tmp_path / "x")[1], converted, torch.float32)
    assert len(changed) == 14
    assert all(key.startswith("language_model.") for key in changed)


def test_xtuner_pickle_needs_the_flag(assets: Path, tmp_path: Path, convert, refused) -> None:
    golden, file = assets / "golden", tmp_path / "any name"
    tensors = torch.load(golden / "xtuner/iter_10.pth", weights_only=True)
    torch.save({**tensors, "message_hub": Code(tmp_path / "ran")}, file)
    command = ["--source", str(file), "--target", str(tmp_path / "x"), "--model-base", str(golden / "llava_tiny"),
               "--vision-tower", str(golden / "clip-vit-tiny-patch14-336")]  # fmt: skip
    assert "give --allow-pickle, which lets it run code" in refused(convert, command)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x").exists()
    assert convert([*command, "--allow-pickle"]) == 0
    assert (tmp_path / "ran").exists()


def test_extracted_projector(assets: Path, tmp_path: Path, refused) -> None:
    golden = assets / "golden"
    command = ["--model-path", str(golden / "llava_tiny"), "--output"]
    assert "name it .safetensors" in refused(extract, [*command, str(tmp_path / "mm_projector.bin")])
    file = tmp_path / "mm_projector.safetensors"
    assert extract([*command, str(file)]) == 0
    assert set(load_file(file)) == {
        f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    state = open_model(golden / "llava_tiny")[1]
    for key, entry in read_projector(file).items():
        assert torch.equal(entry.read(), state[key].read())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


SAVE_WITH_DEEPSPEED = """
import sys
import deepspeed, torch
deepspeed.init_distributed("gloo")
model = torch.nn.Module()
for name, tensor in torch.load(sys.argv[1], weights_only=True)["state_dict"].items():
    place = model
    *path, last = name.split(".")
    for part in path:
        if not hasattr(place, part):
            place.add_module(part, torch.nn.Module())
        place = getattr(place, part)
    place.register_parameter(last, torch.nn.Parameter(tensor.float()))
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
)
engine.save_checkpoint(sys.argv[2], tag="iter_10.pth", exclude_frozen_parameters=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
def test_xtuner_checkpoint_that_deepspeed_split(assets: Path, tmp_path: Path, convert, refused) -> None:
    pytest.importorskip("deepspeed")
    golden = assets / "golden"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0",
             "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # fmt: skip
    command = [sys.executable, "-c", SAVE_WITH_DEEPSPEED, str(golden / "xtuner/iter_10.pth"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **alone})
    assert (tmp_path / "iter_10.pth").is_dir()
    arguments = ["--source", str(tmp_path / "iter_10.pth"), "--target", str(tmp_path / "x"), "--dtype", "float32",
                 "--model-base", str(golden / "llava_tiny"), "--vision-tower", str(golden / "clip-vit-tiny-patch14-336")]  # fmt: skip
    assert "set of pickles" in refused(convert, arguments)
    assert convert([*arguments, "--allow-pickle", "--verify"]) == 0
    converted = open_model(golden / "xtuner/converted", base=golden / "llava_tiny")[1]
    assert same(open_model(tmp_path / "x")[1], converted, torch.float32)


def test_a_tower_that_is_not_needed_need_not_be_there(tiny_model: Path, tmp_path: Path, convert) -> None:
    arguments = ["--source", str(tiny_model), "--target", str(tmp_path / "x"), "--vision-tower", "moved away"]
    assert convert(arguments) == 0


def test_the_key_of_a_stopped_conversion_knows_every_part(assets: Path, tmp_path: Path) -> None:
    """XTuner's adapters lie in folders of their own, and the tensors they change are named after the base's files."""
    folder, base = tmp_path / "converted", assets / "golden/llava_tiny"
    shutil.copytree(assets / "golden/xtuner/converted", folder)
    state = open_model(folder, base=base, vision_tower=assets / "golden/clip-vit-tiny-patch14-336")[1]
    before = weights.resume_key(state, [folder])
    assert weights.resume_key(state, [folder]) == before
    adapter = folder / "llm_adapter/adapter_model.safetensors"
    os.utime(adapter, (0, 0))
    assert weights.resume_key(state, [folder]) != before
