"""The rehearsal at real size, at a small size: its files are what they say, and its checks can fail."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from geochat.model.convert import Source, convert
from geochat.model.merge import merge_adapter
from geochat.model.weights import open_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def modules():
    """`rehearsal_model`, `rehearsal_checks` and `rehearsal_measure`, which import one another by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import rehearsal_checks
        import rehearsal_measure
        import rehearsal_model

        yield rehearsal_model, rehearsal_checks, rehearsal_measure
        for name in [name for name in sys.modules if name.startswith("rehearsal")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folders(modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, _, _ = modules
    work = tmp_path_factory.mktemp("rehearsal")
    shape = made.Shape.scaled(2, 32)
    made.write_source(work / "source", shape, 1_000_000, ROOT / "playground/nano/tokenizer.model")
    made.write_adapter(work / "adapter", shape, work / "source")
    return work


def test_the_full_size_is_that_of_the_release(modules) -> None:
    shape = modules[0].Shape()
    sizes = {name: math.prod(size) for name, size in shape.tensors().items() if "inv_freq" not in name}
    language = {
        name: size for name, size in sizes.items() if "vision" not in name and "mm_projector" not in name
    }
    assert sum(language.values()) == 6_738_415_616  # Vicuna-7B
    assert (
        sum(size for name, size in sizes.items() if "vision" in name) == 303_507_456
    )  # CLIP ViT-L/14 at 336 px
    assert len([name for name in sizes if "vision" in name]) == 391
    assert sum(math.prod(size) for size in shape.lora().values()) == 159_907_840  # LoRA r 64 on every linear


def test_files_are_real_pickles(modules, folders: Path) -> None:
    files = sorted((folders / "source").glob("pytorch_model-*.bin"))
    assert len(files) == 3
    loaded = {key: value for file in files for key, value in torch.load(file, weights_only=True).items()}
    entries = open_weights(folders / "source")
    assert loaded.keys() == entries.keys()
    assert all(torch.equal(entries[key].read(), value) for key, value in loaded.items())
    assert all(value.dtype == torch.float16 and value.float().std() > 0.005 for value in loaded.values())


def test_steps_and_their_checks(modules, folders: Path) -> None:
    _, checks, _ = modules
    source, adapter, hf, merged = (folders / name for name in ("source", "adapter", "hf", "merged"))
    convert(Source(source), hf, "hf", progress=False)
    checks.same(source, hf)
    merge_adapter(adapter, None, merged, probe=False)
    checks.merged(source, adapter, merged)
    checks.native(adapter, hf, folders / "native")
    merge_adapter(folders / "native", None, folders / "ours", probe=False)
    checks.close(hf, folders / "native", folders / "ours")
    checks.peft(hf, folders / "native", folders / "peft")
    checks.close(hf, folders / "native", folders / "peft")
    with pytest.raises(SystemExit, match="tensors differ"):
        checks.same(source, merged)
    with pytest.raises(SystemExit, match="is not the sum"):
        checks.merged(source, adapter, hf)
    with pytest.raises(SystemExit, match="further from the sum"):
        checks.close(hf, folders / "native", hf)


def test_measured_memory_and_its_floor(modules, tmp_path: Path) -> None:
    measured = modules[2].measured
    command = [sys.executable, "-c", "import time; x = bytearray(b'1' * 200_000_000); time.sleep(0.2)"]
    run = measured(command)
    assert run.peak > 200e6
    assert run.own > 200e6
    assert run.wall > 0.2
    assert not run.stopped
    assert measured([sys.executable, "-c", "import time; time.sleep(60)"], floor=2**60).stopped
    with pytest.raises(RuntimeError, match=r"(?s)exit 3.*the reason"):
        measured([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], log=tmp_path / "log")
