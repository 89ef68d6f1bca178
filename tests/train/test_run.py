"""Whole runs in this process: what they leave behind, and what they say when they cannot."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.checkpoint import load, read_checkpoint, save_model
from geochat.model.export_gguf import write_gguf
from geochat.train import arguments, saving
from geochat.train.dataset import InstructionDataset
from geochat.train.train import main
from geochat.train.trainer import Trainer


def last_error(capsys: pytest.CaptureFixture) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return last_error(capsys)


def test_full_training_leaves_canonical_folders(flags, tiny_base: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    argv = [*flags, "--output_dir", str(run), "--lora_enable", "False", "--tune_vision_tower", "True"]
    argv += [
        "--vision_tower_lr",
        "1e-4",
        "--save_steps",
        "4",
        "--save_total_limit",
        "1",
        "--save_strategy",
        "steps",
    ]
    main([*argv, "--gradient_checkpointing", "False", "--image_size", "112", "--lazy_preprocess", "True"])
    said = capsys.readouterr().out
    for fact in ("trains vision_tower", "learning rate 0.0001", "2 = 2 per device × 1 accumulation × 1 processes",
                 "112 px, crop, 64 tokens per image", "no bfloat16 hardware", "--lazy_preprocess is ignored",
                 "precision  float32", "ZeRO  off"):  # fmt: skip
        assert fact in said
    assert [path.name for path in saving.checkpoints(run)] == ["checkpoint-12"]
    model, processor = load(run)
    assert processor.image_size == 112
    assert model.config.text_config.use_cache
    before, after = load_file(tiny_base / "model.safetensors"), load_file(run / "model.safetensors")
    moved = {
        key for key in after if after[key].shape != before[key].shape or not after[key].equal(before[key])
    }
    for part in (
        "language_model.lm_head",
        "multi_modal_projector.linear_1",
        "vision_tower.vision_model.embeddings",
    ):
        assert any(key.startswith(part) for key in moved)
    rows = [json.loads(line) for line in (run / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (run / "loss.png").stat().st_size > 5000
    assert "global batch" in (run / "recipe.txt").read_text()
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("dora", ["False", "True"])
def test_every_save_is_a_loadable_adapter_without_frozen_weights(dora: str, flags, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main([*flags, "--output_dir", str(run), "--save_steps", "6", "--use_dora", dora])
    for folder in (run / "checkpoint-6", run / "checkpoint-12", run):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(".lora_" in key for key in tensors)  # GeoChat on a finished base: the projector stays
        assert any("magnitude" in key for key in tensors) == (dora == "True")
        model, processor = load(folder)
        assert processor.image_size == 84
        assert model.get_base_model().config.vision_config.image_size == 84


@pytest.mark.parametrize("checkpointing", ["True", "False"])
def test_sharing_the_image_prefix_trains_the_same_adapter(flags, tmp_path: Path, checkpointing: str) -> None:
    """All records in one batch, so that only the way of computing it differs."""
    flags = [
        *flags,
        "--per_device_train_batch_size",
        "8",
        "--lora_dropout",
        "0",
        "--gradient_checkpointing",
        checkpointing,
    ]
    ways = {
        "apart": [],
        "shared": ["--share_image_prefix", "True", "--packing", "True"],
        "parts": ["--max_tokens_per_micro_batch", "300"],
    }
    for name, more in ways.items():
        main([*flags, *more, "--output_dir", str(tmp_path / name)])
    apart, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ways)
    start = {key: torch.zeros_like(value) for key, value in apart.items() if "lora_B" in key}
    assert any(not torch.allclose(apart[key], zero, atol=1e-3) for key, zero in start.items()), "it trained"
    for key, value in (row for other in others for row in other.items()):
        torch.testing.assert_close(value, apart[key], atol=1e-5, rtol=0, msg=key)


def test_the_projector_alone(flags, tmp_path: Path) -> None:
    run, then = tmp_path / "run", tmp_path / "then"
    argv = [*flags, "--output_dir", str(run), "--lora_enable", "False", "--tune_mm_mlp_adapter", "True"]
    main(
        [
            *argv,
            "--version",
            "plain",
            "--num_train_epochs",
            "1",
            "--save_steps",
            "2",
            "--on_bad_sample",
            "skip",
        ]
    )
    assert set(load_file(run / "mm_projector.safetensors")) == {
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    main([*flags, "--output_dir", str(then), "--pretrain_mm_mlp_adapter", str(run / "mm_projector.safetensors"),
          "--max_steps", "1", "--save_strategy", "no"])  # fmt: skip
    model, _ = load(then)
    weight = model.get_base_model().model.multi_modal_projector.linear_1.weight
    assert weight.equal(load_file(run / "mm_projector.safetensors")["model.mm_projector.0.weight"])
    main([*argv, "--num_train_epochs", "2", "--resume_from_checkpoint", "True"])


def test_a_model_from_parts(flags, tiny_llm: Path, tiny_clip: Path, tmp_path: Path, capsys) -> None:
    flags[flags.index("--model_name_or_path") + 1] = str(tiny_llm)
    argv = [
        *flags,
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "1",
        "--image_size",
        "84",
        "--version",
        "v1",
    ]
    argv += ["--vision_tower", str(tiny_clip), "--mm_vision_select_layer", "-2", "--bf16", "True"]
    assert "a fresh one would stay frozen" in refused(argv, capsys)
    main([*argv, "--tune_mm_mlp_adapter", "True"])
    model, processor = load(tmp_path)
    assert processor.template.name == "vicuna_v1"
    assert model.get_base_model().config.vision_feature_layer == -2


def test_llama_cpps_files_are_a_base(flags, tiny_base: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """The pair, and its language model alone with a CLIP folder; the adapter knows its base again."""
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "pair", *read_checkpoint(tiny_base))
    for name, more in (
        ("whole", []),
        ("alone", ["--vision_tower", str(tiny_clip), "--tune_mm_mlp_adapter", "True"]),
    ):
        base = tmp_path / "pair"
        if more:
            base = tmp_path / "llm.gguf"
            (tmp_path / "pair/model-f32.gguf").rename(base)
        out = tmp_path / name
        main([*flags, "--model_name_or_path", str(base), "--output_dir", str(out), "--max_steps", "1",
              "--image_size", "84", *more])  # fmt: skip
        model, _ = load(out)
        assert model.get_base_model().config.text_config.num_hidden_layers == 2


def test_bfloat16_keeps_what_trains_in_float32(
    flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "BF16_ON_CPU", True)
    main([*flags, "--output_dir", str(tmp_path), "--max_steps", "3", "--tune_mm_mlp_adapter", "True"])
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert all(row["loss"] == row["loss"] for row in rows)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_validation_loss_is_logged(flags, tiny_records, tmp_path: Path) -> None:
    argv = [
        *flags,
        "--output_dir",
        str(tmp_path),
        "--eval_data_path",
        str(tiny_records.file),
        "--save_strategy",
        "no",
    ]
    main([*argv, "--eval_strategy", "steps", "--eval_steps", "6", "--per_device_eval_batch_size", "4"])
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [6, 12]


def test_skipped_rows_are_named_and_counted(flags, tiny_records, tmp_path: Path, capsys) -> None:
    rows = [*tiny_records.records, {**tiny_records.records[0], "image": "absent.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags[flags.index("--data_path") + 1] = str(tmp_path / "rows.json")
    run = tmp_path / "run"
    argv = [*flags, "--output_dir", str(run), "--dataloader_num_workers", "1"]
    assert "absent.png" in refused(argv, capsys)
    main([*argv, "--on_bad_sample", "skip", "--overwrite_output_dir", "True"])
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 3  # once an epoch
    assert "1 rows could not be used" in said
    assert "absent.png" in (run / "bad_samples.txt").read_text()


def test_a_bad_validation_row_is_named(flags, tiny_records, tmp_path: Path, capsys) -> None:
    rows = [*tiny_records.records, {**tiny_records.records[0], "image": "absent.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = [*flags, "--output_dir", str(tmp_path / "run"), "--eval_data_path", str(tmp_path / "rows.json")]
    argv += ["--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2", "--save_strategy", "no"]
    assert "absent.png" in refused(argv, capsys)
    main([*argv, "--on_bad_sample", "skip", "--overwrite_output_dir", "True"])
    assert "absent.png" in (tmp_path / "run/bad_samples.txt").read_text()


def test_resuming_another_adapter_is_refused(flags, tiny_base: Path, tmp_path: Path, capsys) -> None:
    argv = [*flags, "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--save_steps", "2"]
    main(argv)
    again = [*argv, "--max_steps", "4", "--resume_from_checkpoint", "True"]
    assert "--lora_r 4, now it is 8" in refused([*again, "--lora_r", "8"], capsys)
    model, processor = load(tiny_base)
    model.lm_head.weight.data.add_(0.1)
    save_model(model, processor, tmp_path / "other")
    again[again.index("--model_name_or_path") + 1] = str(tmp_path / "other")
    assert "was trained on another base" in refused(again, capsys)


def test_a_full_disk_leaves_the_previous_save(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    whole = Trainer._save_optimizer_and_scheduler

    def full(self: Trainer, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    error = refused([*flags, "--output_dir", str(tmp_path), "--save_steps", "2"], capsys)
    assert "checkpoint-4 could not be saved (No space left on device); checkpoint-2 is intact" in error
    load(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_loss_that_is_no_number_ends_the_run_with_its_samples(
    flags, tmp_path: Path, monkeypatch, capsys
) -> None:
    whole = InstructionDataset.read

    def broken(self: InstructionDataset, index: int) -> dict:
        item = whole(self, index)
        if index == 2:
            item["pixels"] = item["pixels"] * float("nan")
        return item

    monkeypatch.setattr(InstructionDataset, "read", broken)
    argv = [*flags, "--output_dir", str(tmp_path), "--save_steps", "1", "--per_device_train_batch_size", "1"]
    error = refused(argv, capsys)
    step = int(re.search(r"loss of step (\d+) is nan with the samples .*tiny.json:row 2; ", error)[1])
    if step > 1:  # where the row stands follows from the seed
        assert f"checkpoint-{step - 1} is intact" in error
        load(tmp_path / f"checkpoint-{step - 1}")
    assert not (tmp_path / f"checkpoint-{step}").exists()


def test_weights_that_are_no_numbers_are_not_saved(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    def overflow(self: Trainer, model: torch.nn.Module) -> None:
        model.get_parameter(next(n for n, p in model.named_parameters() if p.requires_grad)).data.fill_(
            float("inf")
        )

    monkeypatch.setattr(Trainer, "_clip_grad_norm", overflow)
    error = refused([*flags, "--output_dir", str(tmp_path), "--max_steps", "1", "--save_steps", "1"], capsys)
    assert "checkpoint-1 could not be saved (1 tensors are no numbers" in error
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_cannot_be_is_said_in_one_line(flags, tiny_llm: Path, tmp_path: Path, capsys) -> None:
    argv = [*flags, "--output_dir", str(tmp_path / "run")]

    def error(*extra: str) -> str:
        return refused([*argv, *extra], capsys)

    assert "unknown" in error("--version", "no_such_template")
    assert "cannot be reached" in error("--global_batch_size", "3")
    assert "no such folder" in error("--model_name_or_path", str(tmp_path / "absent"))
    plain = ["--model_name_or_path", str(tiny_llm), "--tune_mm_mlp_adapter", "True"]
    assert "--vision-tower" in error(*plain)
    assert "no such file" in error("--data_path", str(tmp_path / "absent.json"))
    assert "no such folder" in error("--image_folder", str(tmp_path / "absent"))
    assert "patch size" in error("--image_size", "100")
    assert "no checkpoint of a run" in error("--resume_from_checkpoint", str(tmp_path))
    assert "text tokens" in error("--model_max_length", "20")
    assert "--fsdp needs a launcher" in error("--fsdp", "full_shard")
    assert "leave one out" in error("--fsdp", "True", "--bits", "8")
    assert "needs a launcher" in error("--deepspeed", str(tmp_path / "zero.json"))
    assert "nothing is left to train" in error(
        "--lora_enable", "False", "--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"
    )
    assert "--report_to no_such_logger" in error("--report_to", "no_such_logger")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "model.safetensors").touch()
    assert "another kind (full)" in error()
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-7" / "trainer_state.json").touch()
    assert "no adapter_model.safetensors" in error("--resume_from_checkpoint", "True")
    assert "holds checkpoint-7 of an earlier run" in error()
