"""Samples in one sequence: the same loss and gradients as apart, nothing seen across, images brought together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geochat.data.encode import IGNORE_INDEX
from geochat.data.store import InstructionStore
from geochat.model.adapter import AdapterSpec, attach
from geochat.model.build import build_model
from geochat.train.arguments import TrainingArguments
from geochat.train.collate import Collator
from geochat.train.dataset import InstructionDataset
from geochat.train.packing import PackingCollator, allowed, attention_mask, fill, join, shared_prefix
from geochat.train.sampler import EpochSampler
from geochat.train.saving import RunSaver
from geochat.train.trainer import Trainer

MODES = {
    "shared": {"share": True},
    "packed": {"share": False, "pack": True, "one_row": True},
    "shared, packed": {"share": True, "pack": True},
    "shared, one row": {"share": True, "pack": True, "one_row": True},
    "padded, in parts": {"share": False, "budget": 300},
    "shared, in parts": {"share": True, "pack": True, "budget": 1},
}


@pytest.fixture(params=["sdpa", "eager"])
def parts(request, tiny_llm: Path, tiny_clip: Path):
    torch.manual_seed(0)
    options = {"image_size": 84, "dtype": torch.float32, "attn_implementation": request.param}
    return build_model(tiny_llm, tiny_clip, None, **options)


@pytest.fixture
def dataset(parts, tiny_records) -> InstructionDataset:
    return InstructionDataset(InstructionStore(tiny_records.file), tiny_records.image_folder, parts[1])


def with_lora(base: nn.Module) -> nn.Module:
    model = attach(base, AdapterSpec(r=4, dropout=0.0, train_projector=True))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def trainer_of(
    model: nn.Module, base: nn.Module, dataset: InstructionDataset, folder: Path, **flags
) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, gradient_checkpointing=False, **flags)
    saver = RunSaver("adapter", model, dataset.processor, None)  # type: ignore[arg-type]
    collator = Collator(dataset.processor.pad_token_id)
    return Trainer(
        base=base, saver=saver, model=model, args=args, data_collator=collator, train_dataset=dataset
    )


def loss_and_gradients(
    trainer: Trainer, model: nn.Module, batch: dict
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("mode", MODES)
def test_the_same_loss_and_gradients_as_apart(mode: str, parts, dataset, tmp_path: Path) -> None:
    """All eight records: several questions about an image, several turns, a text without an image."""
    base, processor = parts
    model = with_lora(base)
    trainer = trainer_of(model, base, dataset, tmp_path)
    samples = [dataset[i] for i in range(len(dataset))]
    apart = Collator(processor.pad_token_id)(samples)
    together = PackingCollator(processor.pad_token_id, processor.image_token_id, **MODES[mode])(samples)
    parts_of = together.get("parts", [together])
    assert (together["labels"] != IGNORE_INDEX).sum() == (apart["labels"] != IGNORE_INDEX).sum()
    pictures = sum(len(part["pixel_values"]) for part in parts_of if "pixel_values" in part)
    assert (pictures, len(apart["pixel_values"])) == (4 if "shared" in mode else 7, 7)
    assert len(parts_of) > 1 or "budget" not in MODES[mode]
    assert any("documents" in part for part in parts_of) or mode == "padded, in parts"
    expected = loss_and_gradients(trainer, model, apart)
    found = loss_and_gradients(trainer, model, together)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert len(found[1]) > 10
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("normalization", ["micro_batch", "token"])
def test_parts_add_up_to_the_step(parts, dataset, tmp_path: Path, normalization: str) -> None:
    """Through `training_step`, which goes backward after each part."""
    base, processor = parts
    model = with_lora(base)
    trainer = trainer_of(model, base, dataset, tmp_path, loss_normalization=normalization)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    samples = [dataset[i] for i in range(len(dataset))]
    found = {}
    for name, budget in (("whole", None), ("parts", 250)):
        batch = PackingCollator(processor.pad_token_id, processor.image_token_id, budget=budget)(samples)
        supervised = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        assert (supervised is not None) == (normalization == "token")
        loss = trainer.training_step(model, batch, supervised)
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = loss.item(), gradients
        model.zero_grad()
    assert len(batch["parts"]) > 2
    assert found["parts"][0] == pytest.approx(found["whole"][0], abs=1e-5)
    for key, gradient in found["parts"][1].items():
        torch.testing.assert_close(gradient, found["whole"][1][key], atol=1e-5, rtol=0, msg=key)


def test_nothing_is_seen_across(parts, dataset) -> None:
    """Other words in one branch, or in another document, change no logit outside it."""
    model, processor = parts
    samples = [dataset[i] for i in (0, 1, 2, 3)]
    batch = PackingCollator(
        processor.pad_token_id, processor.image_token_id, share=True, pack=True, one_row=True
    )(samples)
    ids, documents, branches = batch["input_ids"], batch["documents"], batch["branches"]
    implementation = model.config._attn_implementation

    def logits(ids: torch.Tensor) -> torch.Tensor:
        mask = attention_mask(documents, branches, implementation, torch.float32)
        with torch.no_grad():
            return model(
                input_ids=ids,
                pixel_values=batch["pixel_values"],
                position_ids=batch["position_ids"],
                attention_mask=mask,
            ).logits

    before = logits(ids)
    changed = (documents == 0) & (branches == 1)
    assert 0 < changed.sum() < (documents == 0).sum()
    other = torch.where(changed, (ids + 7) % 400 + 3, ids)
    after = logits(other)
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.allclose(before[changed], after[changed])


def test_positions_and_visibility_are_those_of_the_sample_alone(dataset) -> None:
    samples = [dataset[i] for i in (0, 1)]
    (document,) = join(samples, dataset.processor.image_token_id)
    prefix = shared_prefix(samples)
    assert prefix > dataset.processor.image_tokens
    sees = allowed(
        torch.zeros(1, len(document), dtype=torch.long), torch.tensor(document.branches)[None].long()
    )[0, 0]
    for number, sample in enumerate(samples, 1):
        own = np.flatnonzero((document.branches == 0) | (document.branches == number))
        assert document.input_ids[own].tolist() == sample["input_ids"].tolist()
        assert document.positions[own].tolist() == list(range(len(own)))
        block = sees[own][:, own]
        assert torch.equal(block, torch.ones_like(block).tril())
        outside = np.setdiff1d(np.arange(len(document)), own)
        assert not sees[own][:, outside].any()


def test_texts_that_differ_before_the_image_are_not_joined(dataset) -> None:
    one, two = dataset[0], dict(dataset[1])
    two["input_ids"] = two["input_ids"].copy()
    two["input_ids"][2] += 1
    assert len(join([one, two], dataset.processor.image_token_id)) == 2
    assert len(join([one, dataset[1]], dataset.processor.image_token_id)) == 1


@pytest.mark.parametrize("implementation", ["flex_attention"])
def test_block_mask_is_the_same_rule(implementation: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    documents = torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2, [0] * 16])
    branches = torch.tensor(
        [[0] * 3 + [1] * 3 + [2] * 3 + [0, 0, 1, 1, 1] + [0, 0], [0] * 4 + [1] * 6 + [2] * 6]
    )
    block = attention_mask(documents, branches, implementation, torch.float32)
    dense = create_mask(block.mask_mod, 2, None, 16, 16, device="cpu")
    assert torch.equal(dense, allowed(documents, branches))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.booleans())
@settings(max_examples=50, deadline=None)
def test_rows_hold_every_document_once(sizes: list[int], one_row: bool) -> None:
    documents = [
        join([{"input_ids": np.zeros(n, np.int32), "labels": np.zeros(n, np.int32)}], 9)[0] for n in sizes
    ]
    capacity = sum(sizes) if one_row else max(sizes)
    rows = fill(documents, capacity)
    assert sorted(map(id, documents)) == sorted(id(document) for row in rows for document in row)
    assert all(sum(map(len, row)) <= capacity for row in rows)
    assert len(rows) == 1 or not one_row


@given(
    st.lists(st.integers(-1, 30), min_size=1, max_size=300),
    st.integers(1, 16),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_grouping_by_image_is_a_permutation(
    images: list[int], micro_batch: int, seed: int, grouped: bool
) -> None:
    lengths = np.where(np.array(images) < 0, -1, 1) * np.random.default_rng(seed).integers(1, 99, len(images))
    sampler = EpochSampler(
        len(images), seed=seed, batch=micro_batch, images=np.array(images), micro_batch=micro_batch,
        lengths=lengths if grouped else None,
    )  # fmt: skip
    order = list(sampler)
    assert sorted(order) == list(range(len(images)))
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(len(images)))


def test_samples_of_an_image_meet() -> None:
    """GeoChat_Instruct has 2.2 records an image; nearly all of an image's records share its micro-batch."""
    random = np.random.default_rng(0)
    images = random.permutation(np.repeat(np.arange(4000), random.integers(1, 5, 4000)))
    sampler = EpochSampler(len(images), seed=3, batch=32, images=images, micro_batch=16)
    order = np.array(list(sampler))
    whole = len(order) - len(order) % 16
    kinds = sum(len(set(batch)) for batch in images[order[:whole]].reshape(-1, 16))
    assert kinds <= 1.02 * 4000
    first = images[order[:16]]
    assert len(set(first)) > 1
    sampler.set_epoch(1)
    assert Counter(images[list(sampler)][:16]) != Counter(first)


def test_images_that_fill_no_micro_batch_are_cut() -> None:
    """Twenty records an image and micro-batches of 32: no images fill one, yet nothing is carried along for ever."""
    images = np.random.default_rng(0).permutation(np.repeat(np.arange(5000), 20))
    order = np.array(list(EpochSampler(len(images), seed=3, batch=32, images=images, micro_batch=32)))
    kinds = sum(len(set(batch)) for batch in images[order].reshape(-1, 32))
    assert kinds < 5000 * 2


def test_an_image_is_read_once_for_its_samples(dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from geochat.train import dataset as module

    opened: list[str] = []
    plain = module.open_image
    monkeypatch.setattr(module, "open_image", lambda path: opened.append(path.name) or plain(path))
    first, second = dataset[0]["pixels"], dataset[1]["pixels"]
    assert torch.equal(first, second)
    assert opened == ["square.png"]
