"""Loss at supervised positions only equals the full-logit loss, value and gradients; towers and text-only batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geochat.data.encode import IGNORE_INDEX
from geochat.model.adapter import AdapterSpec, attach
from geochat.model.build import build_model
from geochat.train.arguments import ModelArguments, TrainingArguments
from geochat.train.collate import Collator
from geochat.train.dataset import InstructionDataset
from geochat.train.recipe import choose_trainable
from geochat.train.saving import RunSaver
from geochat.train.trainer import Trainer


@pytest.fixture
def parts(tiny_llm: Path, tiny_clip: Path):
    torch.manual_seed(0)
    model, processor = build_model(tiny_llm, tiny_clip, None, image_size=84, dtype=torch.float32)
    return model, processor


@pytest.fixture
def dataset(parts, tiny_records) -> InstructionDataset:
    from geochat.data.store import InstructionStore

    return InstructionDataset(InstructionStore(tiny_records.file), tiny_records.image_folder, parts[1])


def make_trainer(
    model: nn.Module, base: nn.Module, dataset: InstructionDataset, folder: Path, **flags
) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, gradient_checkpointing=False, **flags)
    return Trainer(
        base=base,
        saver=RunSaver("full", model, dataset.processor, None),  # type: ignore[arg-type]
        model=model,
        args=args,
        data_collator=Collator(dataset.processor.pad_token_id),
        train_dataset=dataset,
    )


def full_logit_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], pixel_values=batch.get("pixel_values")).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_same_loss_and_gradients_as_with_all_logits(kind: str, parts, dataset, tmp_path: Path) -> None:
    base, processor = parts
    if kind == "lora":
        model = attach(base, AdapterSpec(r=4, dropout=0.0, train_projector=True))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    else:
        model = base
        choose_trainable(base, ModelArguments("m", tune_vision_tower=True))
    trainer = make_trainer(model, base, dataset, tmp_path)
    batch = Collator(processor.pad_token_id)([dataset[i] for i in range(len(dataset))])

    expected = full_logit_loss(model, batch)
    expected.backward()
    expected_gradients = gradients(model)
    seen: list[torch.Size] = []
    handle = base.lm_head.register_forward_hook(lambda layer, args, output: seen.append(output.shape))
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    handle.remove()

    assert seen == [torch.Size([int((batch["labels"] != IGNORE_INDEX).sum()), base.lm_head.out_features])]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-5, msg=name)


def test_padding_changes_nothing(parts, dataset, tmp_path: Path) -> None:
    base, processor = parts
    trainer = make_trainer(base, base, dataset, tmp_path)
    collate = Collator(processor.pad_token_id)
    samples = [dataset[i] for i in range(len(dataset))]
    counts = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples]
    with torch.no_grad():
        single = [trainer.compute_loss(base, collate([sample])) * n for sample, n in zip(samples, counts)]
        together = trainer.compute_loss(base, collate(samples))
    torch.testing.assert_close(together, sum(single) / sum(counts), atol=1e-5, rtol=1e-5)


def test_token_normalisation_divides_by_the_whole_step(parts, dataset, tmp_path: Path) -> None:
    base, processor = parts
    trainer = make_trainer(base, base, dataset, tmp_path, loss_normalization="token")
    assert trainer.model_accepts_loss_kwargs
    collate = Collator(processor.pad_token_id)
    halves = [collate([dataset[i] for i in part]) for part in (range(3), range(3, 8))]
    batches, count = trainer.get_batch_samples(iter([dict(half) for half in halves]), 2, torch.device("cpu"))
    with torch.no_grad():
        loss = sum(trainer.compute_loss(base, batch, num_items_in_batch=count) for batch in batches)
        whole = full_logit_loss(base, collate([dataset[i] for i in range(8)]))
    torch.testing.assert_close(loss, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_stays_out_of_autograd(checkpointing: bool, parts, dataset, tmp_path: Path) -> None:
    base, processor = parts
    model = attach(base, AdapterSpec(r=4, dropout=0.0, train_projector=True))
    trainer = make_trainer(model, base, dataset, tmp_path)
    if checkpointing:
        model.gradient_checkpointing_enable()
    outputs: list[torch.Tensor] = []
    base.model.vision_tower.register_forward_hook(
        lambda m, a, output: outputs.append(output.last_hidden_state)
    )
    model.train()
    trainer.compute_loss(model, Collator(processor.pad_token_id)([dataset[0]])).backward()
    assert not outputs[0].requires_grad
    assert base.model.multi_modal_projector.modules_to_save["default"].linear_1.weight.grad is not None


def test_a_text_only_batch_runs_tower_and_projector_with_zero_weight(parts, dataset, tmp_path: Path) -> None:
    base, processor = parts
    choose_trainable(base, ModelArguments("m", tune_vision_tower=True))
    trainer = make_trainer(base, base, dataset, tmp_path)
    batch = Collator(processor.pad_token_id)([dataset[7]])
    assert "pixel_values" not in batch
    expected = full_logit_loss(base, batch)
    loss = trainer.compute_loss(base, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    trained = [(name, p) for name, p in base.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []
    assert float(base.model.multi_modal_projector.linear_1.weight.grad.abs().max()) == 0.0


def test_every_part_has_its_learning_rate(parts, dataset, tmp_path: Path) -> None:
    base, _ = parts
    choose_trainable(base, ModelArguments("m", tune_vision_tower=True, tune_vit_from_layer=2))
    flags = {"learning_rate": 1e-3, "mm_projector_lr": 1e-4, "vision_tower_lr": 1e-5, "weight_decay": 0.1}
    groups = make_trainer(base, base, dataset, tmp_path, **flags).create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {1e-3, 1e-4, 1e-5}
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in base.parameters() if p.requires_grad)
    tower = {name for name, p in base.model.vision_tower.named_parameters() if p.requires_grad}
    assert {name.split("layers.")[1][0] for name in tower} == {
        "2"
    }  # block 3 is behind the layer that is read
    frozen_lm = ModelArguments("m", freeze_backbone=True, freeze_mm_mlp_adapter=True)
    choose_trainable(base, frozen_lm)
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainer(base, base, dataset, tmp_path).create_optimizer()
