"""The plan against what it plans: counts, bytes, batches and steps of real tiny runs, and the figures of the 7B."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from geochat.data.encode import IGNORE_INDEX
from geochat.model.adapter import AdapterSpec, attach, trainable_groups
from geochat.model.build import build_model
from geochat.model.vision import freeze_tower
from geochat.train import arguments
from geochat.train.activations import activations
from geochat.train.assemble import make_trainable
from geochat.train.command_line import parse_arguments
from geochat.train.flops import Load, ModelShape, Trained, tower_forward, work
from geochat.train.gpus import GPUS, Sizing
from geochat.train.hooks import SupervisedRows
from geochat.train.memory import NF4_BYTES, Counts, Setting, states
from geochat.train.plan import make_plan
from geochat.train.plan_facts import Plan
from geochat.train.recipe import unfreeze_tower
from geochat.train.train import main, prepare
from geochat.train.workload import Layout

VICUNA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
LORA = Trained(lora_rank=64, lora_dropout=0.05)


def shape_of_7b() -> ModelShape:
    vision = CLIPVisionConfig(**CLIP_L, image_size=504)
    return ModelShape.of(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**VICUNA), vision_feature_layer=-2)
    )


def planned(argv: list[str], tmp_path: Path) -> Plan:
    argv = [*argv, "--dry_run", "True", "--output_dir", str(tmp_path / "never")]
    return make_plan(parse_arguments(argv))


# ---- operations ----


def test_the_counted_figures_of_the_7b() -> None:
    shape = shape_of_7b()
    assert tower_forward(shape) == pytest.approx(0.91e12, rel=0.02)
    assert 2 * shape.decoder_weights == pytest.approx(12.95e9, rel=0.02)
    assert 2 * shape.adapter_weights(64) == pytest.approx(0.32e9, rel=0.02)
    # The published count takes the output layer at every position; here it sees the supervised ones only.
    everywhere = work(shape, LORA, Load(1, 1446, 1, 1446), checkpointing=True)
    assert everywhere.useful == pytest.approx(42.4e12, rel=0.02)
    assert everywhere.executed == pytest.approx(62.1e12, rel=0.02)
    here = work(shape, LORA, Load(1, 1446, 1, 50), checkpointing=True)
    assert 1 - here.useful / everywhere.useful == pytest.approx(0.0174, abs=0.001)


def test_operations_of_the_other_recipes() -> None:
    """Against 2 per weight forward, 2 for the input's gradient, 2 for the weight's, counted by hand."""
    shape, load = shape_of_7b(), Load(1, 1446, 1, 1446)
    forward = work(shape, Trained(projector=True), load, checkpointing=False).forward
    decoder = forward - tower_forward(shape) - 2 * shape.patches * shape.projector_weights
    second = 2 * shape.patches * shape.hidden**2
    projector = work(shape, Trained(projector=True), load, checkpointing=False)
    assert projector.backward - 2 * shape.patches * shape.projector_weights - second == pytest.approx(
        decoder + 2 * 1446**2 * 4096 * 32
    )
    full = work(shape, Trained(language_model=True), load, checkpointing=False)
    assert full.backward == pytest.approx(2 * decoder)


# ---- parameters, states, activations ----

KINDS = {
    "lora": [],
    "dora": ["--use_dora", "True", "--tune_mm_mlp_adapter", "True"],
    "full": ["--lora_enable", "False", "--tune_vision_tower", "True", "--tune_vit_from_layer", "1"],
    "projector": ["--lora_enable", "False", "--tune_mm_mlp_adapter", "True"],
}


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "float32") for kind in KINDS), ("lora", "bfloat16"), ("full", "bfloat16")],
)
def test_parameters_and_states_are_those_of_a_real_step(
    kind: str, precision: str, flags, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(arguments, "BF16_ON_CPU", precision == "bfloat16")
    argv = [*flags, *KINDS[kind], "--bf16", str(precision == "bfloat16")]
    plan = planned(argv, tmp_path)
    trainer, _ = prepare(parse_arguments([*argv, "--output_dir", str(tmp_path), "--save_strategy", "no"]))
    assert plan.parameters == {
        **{
            name: sum(parameter.numel() for _, parameter in members)
            for name, members in trainable_groups(trainer.model).items()
            if members
        },
        "total": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.optimizer.step()
    found = states(Counts.of(trainer.model), plan.trained, plan.setting)
    assert found == plan.footprint.states
    assert found.weights == bytes_of(trainer.model.parameters())
    assert found.gradients == bytes_of(p.grad for p in trainer.model.parameters() if p.grad is not None)
    moments = (state[key] for state in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert found.optimizer == bytes_of(moments)


def test_states_are_shared_as_zero_says() -> None:
    counts, lora = Counts(total=1000, trained=100, decoder_frozen=800), LORA
    full = Trained(language_model=True)

    def of(trained: Trained, **settings) -> tuple[int, int, int, int]:
        found = states(counts, trained, Setting(gpus=4, **settings))
        return found.weights, found.gradients, found.optimizer, found.host

    assert of(lora) == (2 * 900 + 4 * 100, 400, 800, 0)
    assert of(full) == (4 * 1000, 400, 800, 0)
    assert of(lora, stage=2) == (2000, 50, 300, 0)
    assert of(full, stage=3) == (500, 50, 300, 0)
    assert of(lora, stage=3, optimizer_8bit=True) == (500, 50, 150, 0)
    assert of(full, stage=3, offload_optimizer=True, offload_weights=True) == (0, 0, 0, 300 + 100 + 500)
    assert states(counts, full, Setting(gpus=4, stage=2)).step == 4 * 25  # gradients in float32
    assert of(lora, bits=4)[0] == round(2 * 100 + 4 * 100 + 800 * NF4_BYTES)


TINY = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, patch_size=14, image_size=84
    ),
    text_config=LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4
    ),
    image_token_index=500,
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("lora", "bfloat16"),
        ("dropout", "float32"),
        ("dropout", "autocast"),
        ("dora", "bfloat16"),
        ("full", "float32"),
        ("full", "autocast"),
        ("tower", "autocast"),
        ("tower", "bfloat16"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_activations_are_what_autograd_keeps(kind: str, mode: str, checkpointing: bool) -> None:
    """Bytes of all tensors saved for the backward pass, weights apart, within a quarter of the count."""
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(TINY)
    model: nn.Module = base
    if kind in ("full", "tower"):
        trained = Trained(language_model=True, projector=True, tower_from=0 if kind == "tower" else None)
        if kind == "tower":
            unfreeze_tower(base, None)
        else:
            freeze_tower(base)
    else:
        dropout = 0.05 if kind == "dropout" else 0.0
        trained = Trained(lora_rank=8, lora_dropout=dropout, dora=kind == "dora")
        model = attach(base, AdapterSpec(r=8, dropout=dropout, use_dora=kind == "dora"))
    if mode == "bfloat16" or (mode == "autocast" and trained.lora_rank):
        base.bfloat16()
        for parameter in model.parameters():
            if mode == "autocast" and parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    ids = torch.randint(3, 490, (2, 136))
    ids[:, 2:38] = 500
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, 100:110] = True
    pixels = torch.randn(2, 3, 84, 84, dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32)
    SupervisedRows(base.lm_head).keep = keep
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        logits = model(input_ids=ids, pixel_values=pixels, use_cache=False)["logits"]
        nn.functional.cross_entropy(logits.float(), ids[keep])
    setting = Setting(
        gpus=1,
        stage=2 if mode == "bfloat16" else None,
        checkpointing=checkpointing,
        compute_bytes=4 if mode == "float32" else 2,
        mask_bytes=4 if mode == "float32" else 2,
    )
    counted = activations(ModelShape.of(TINY), trained, setting, Load(2, 136, 2, 20)).kept
    assert counted == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.25)


# ---- batches ----


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_micro_batches_are_dealt_as_accelerate_deals_them(processes: int, drop_last: bool) -> None:
    for rows in (*range(1, 30), 61):
        for m in (1, 2, 4):
            layout = Layout(m, processes, 1, drop_last)
            batches = torch.utils.data.BatchSampler(range(rows), m, drop_last)
            shards = [
                list(
                    BatchSamplerShard(batches, processes, p, split_batches=False, even_batches=processes > 1)
                )
                for p in range(processes)
            ]
            expected = [batch for batches_ in zip(*shards, strict=True) for batch in batches_]
            assert [batch.tolist() for batch in layout.dealt(np.arange(rows))] == expected, (rows, m)
            assert layout.micro_batches(rows) == len(expected)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--group_by_modality_length", "True"],
        ["--share_image_prefix", "True", "--packing", "True"],
        ["--max_tokens_per_micro_batch", "200"],
    ],
    ids=["shuffled", "grouped", "shared", "in parts"],
)
def test_batches_and_steps_are_those_of_training(extra: list[str], flags, tmp_path: Path) -> None:
    argv = [*flags, *extra, "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2"]
    plan = planned(argv, tmp_path)
    trainer, _ = prepare(parse_arguments([*argv, "--output_dir", str(tmp_path)]))
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    parts = [part for batch in batches for part in batch.get("parts", [batch])]
    real = [
        (
            *part["input_ids"].shape,
            len(part["pixel_values"]) if "pixel_values" in part else 1,
            int((part["labels"] != IGNORE_INDEX).sum()),
        )
        for part in parts
    ]
    loads = plan.batches[plan.asked].loads
    assert [(load.rows, load.length, load.images, load.supervised) for load in loads] == real
    assert plan.rows_read == plan.rows == 8
    assert plan.steps == trainer.set_initial_training_values(trainer.args, loader)[-1]
    assert plan.micro_batches == 3 * len(batches)
    positions = sum(rows * length for rows, length, *_ in real)
    pad = trainer.data_collator.pad_token_id
    tokens = sum(int((part["input_ids"] != pad).sum()) for part in parts)
    assert plan.batches[plan.asked].padding == pytest.approx(1 - tokens / positions)


def test_long_files_are_read_in_part(flags, tiny_records, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(tiny_records.records * 40))
    flags[flags.index("--data_path") + 1] = str(rows)
    plan = planned([*flags, "--plan_rows", "40"], tmp_path)
    assert plan.rows == 320
    assert 20 <= plan.rows_read <= 80
    every = planned([*flags, "--plan_rows", "0"], tmp_path)
    assert every.rows_read == 320
    assert all(batches.laid_out == batches.of for batches in every.batches.values())
    assert every.batches["grouped"].padding < every.batches["shuffled"].padding


# ---- what fits ----


def sizing(trained: Trained, total: int, trains: int) -> Sizing:
    counts = Counts(total, trains, shape_of_7b().decoder_weights if trained.lora_rank else 0)
    return Sizing(shape_of_7b(), trained, counts, Load(1, 1446, 1, 100), share=18)


def test_the_largest_micro_batch_divides_and_the_next_does_not_fit() -> None:
    lora = sizing(LORA, 7_224_000_000, 159_907_840)
    for gpu in GPUS:
        for again in (True, False):
            setting = Setting(gpus=8, stage=2, checkpointing=again)
            size = lora.largest(setting, gpu)
            assert size is not None
            assert 18 % size == 0
            assert lora.footprint(setting, size).fits(gpu)
            larger = [m for m in lora.micro_batches if m > size]
            assert not any(lora.footprint(setting, m).fits(gpu) for m in larger)


def test_the_nearest_setting_that_fits() -> None:
    small, large = GPUS[0], GPUS[-1]
    lora = sizing(LORA, 7_224_000_000, 159_907_840)
    kept = Setting(gpus=8, stage=2, checkpointing=False)
    assert lora.nearest(kept, 18, small) == ["--per_device_train_batch_size 2"]
    full = sizing(Trained(language_model=True, projector=True), 7_064_000_000, 6_760_000_000)
    assert full.nearest(Setting(gpus=8), 18, small) == [
        "--deepspeed scripts/zero2.json",
        "--per_device_train_batch_size 9",
    ]
    assert full.nearest(Setting(gpus=1), 18, large) == ["--per_device_train_batch_size 9"]
    assert full.nearest(Setting(gpus=1), 18, small) == ["--deepspeed scripts/zero3_offload.json"]


# ---- the command ----


@pytest.fixture
def config_only(tiny_tokenizer_model: Path, tmp_path: Path) -> list[str]:
    """Flags for Vicuna-7B and CLIP-L as they are before their weights have come."""
    llm, tower = tmp_path / "vicuna", tmp_path / "clip"
    llm.mkdir()
    tower.mkdir()
    (llm / "config.json").write_text(json.dumps({"model_type": "llama", **VICUNA}))
    (llm / "tokenizer.model").write_bytes(tiny_tokenizer_model.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    (llm / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    clip = {"model_type": "clip_vision_model", **CLIP_L, "image_size": 336}
    (tower / "config.json").write_text(json.dumps(clip))
    return ["--model_name_or_path", str(llm), "--vision_tower", str(tower)]


def test_what_cannot_fit_is_refused_with_a_way_out(
    config_only, tiny_records, tmp_path, refused, capsys
) -> None:
    argv = [*config_only, "--data_path", str(tiny_records.file), "--output_dir", str(tmp_path / "never")]
    argv += ["--lora_enable", "False", "--dry_run", "True", "--plan_gpus", "4", "--plan_gpu", "a100-40g"]
    said = refused(main, [*argv, "--global_batch_size", "144", "--per_device_train_batch_size", "18"])
    assert "does not fit a100-40g" in said
    assert "the nearest setting that fits: --deepspeed scripts/zero3" in said
    said = refused(main, [*argv, "--global_batch_size", "144", "--per_device_train_batch_size", "16"])
    assert "12 or 18 per device does" in said
    main([*argv[:-2], "--bits", "16", "--deepspeed", "scripts/zero3.json", "--global_batch_size", "144",
          "--per_device_train_batch_size", "9"])  # fmt: skip
    told = capsys.readouterr().out
    assert "holds no weights: planned from its config.json alone" in told
    assert "ZeRO  stage 3" in told
    assert "144 = 9 per device × 4 accumulation × 4 processes" in told
    assert not (tmp_path / "never").exists()


def test_parts_without_their_weights_plan_the_model_that_they_make(
    flags, tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    for part, folder in (("llm", tiny_llm), ("clip", tiny_clip)):
        shutil.copytree(folder, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    argv = [
        *flags,
        "--vision_tower",
        str(tmp_path / "clip"),
        "--image_size",
        "112",
        "--tune_mm_mlp_adapter",
        "True",
    ]
    argv[argv.index("--model_name_or_path") + 1] = str(tmp_path / "llm")
    plan = planned(argv, tmp_path)
    model_args, _, args = parse_arguments([*argv, "--output_dir", str(tmp_path)])
    _, real = make_trainable(build_model(tiny_llm, tiny_clip, image_size=112)[0], model_args, args)
    assert plan.parameters["total"] == sum(parameter.numel() for parameter in real.parameters())
    assert plan.tokens.image == 7 * 64


def test_the_same_plan_twice_from_headers_alone(flags, tiny_base: Path, tmp_path: Path, refused) -> None:
    folder = tmp_path / "headers"
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    flags[flags.index("--model_name_or_path") + 1] = str(folder)
    argv = [*flags, "--output_dir", str(tmp_path / "never"), "--dry_run", "True", "--plan_gpus", "8"]
    found = []
    for name in ("one", "two"):
        main([*argv, "--plan_json", str(tmp_path / name / "plan.json")])
        found.append((tmp_path / name / "plan.json").read_text())
    assert found[0] == found[1]
    plan = json.loads(found[0])
    assert plan["tokens"]["images"] == 7
    assert plan["refusal"] is None
    assert [gpu["name"] for gpu in plan["gpus"]] == [gpu.name for gpu in GPUS]
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 999
    (folder / "config.json").write_text(json.dumps(config))
    assert "tensors do not fit the model" in refused(main, argv)
