"""Which setting fits which GPU, and how long a run would take there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from geochat.train.activations import Activations, activations
from geochat.train.flops import Load, ModelShape, Trained
from geochat.train.memory import Counts, Setting, States, states

GIB = 2**30
RESERVED = 0.06
"""Share of a GPU that is not for tensors: CUDA's context, communication buffers, gaps in the allocator. Assumed."""
UTILISATION = (0.35, 0.55)
"""Share of the peak that a run reaches, slow and fast, on all operations it executes. Assumed, never measured here:
GeoChat's own run on three A100 (25 hours, 318,000 samples) comes to 0.23 by the same count."""

HEADROOM = 0.75
"""Share of the free memory that a run may come to when it is to keep its activations unasked. The tests hold the count of
activations to a quarter; no GPU has been asked."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes, as nvidia-smi reports them."""
    peak: float
    """bfloat16 operations a second, dense, from NVIDIA's data sheets (H100 and H200: SXM)."""


GPUS = (
    Gpu("a100-40g", 40_960 * 2**20, 312e12),
    Gpu("a100-80g", 81_920 * 2**20, 312e12),
    Gpu("h100-80g", 81_559 * 2**20, 989e12),
    Gpu("h200-141g", 143_771 * 2**20, 989e12),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU."""

    states: States
    activations: Activations

    @property
    def total(self) -> int:
        return self.states.total + max(self.activations.peak, self.states.step)

    def fits(self, gpu: Gpu) -> bool:
        return self.total <= (1 - RESERVED) * gpu.memory

    def holds(self, memory: int) -> bool:
        """Whether it is safe to go without recomputation with so many bytes."""
        return self.total <= HEADROOM * memory


@dataclass(frozen=True)
class Sizing:
    """A model and its data; what remains open is the setting."""

    shape: ModelShape
    trained: Trained
    counts: Counts
    sample: Load
    """The most that one sample of a micro-batch takes; see `geochat.train.plan.worst`."""
    share: int
    """Samples of one GPU in one optimizer step."""
    budget: int | None = None
    """Most positions computed at once (`--max_tokens_per_micro_batch`); a longer row is computed by itself."""

    def footprint(self, setting: Setting, micro_batch: int) -> Footprint:
        one, rows = self.sample, micro_batch
        if self.budget is not None:
            rows = min(micro_batch, max(1, self.budget // one.length))
        load = Load(rows, one.length, one.images * rows, one.supervised * rows, one.causal)
        return Footprint(
            states(self.counts, self.trained, setting), activations(self.shape, self.trained, setting, load)
        )

    @property
    def micro_batches(self) -> list[int]:
        """The sizes that divide a GPU's share, largest first: accumulation then reaches the global batch exactly."""
        return [size for size in range(self.share, 0, -1) if self.share % size == 0]

    def largest(self, setting: Setting, gpu: Gpu, most: int | None = None) -> int | None:
        """The largest micro-batch of at most `most` that fits; None when not even one sample does."""
        sizes = (size for size in self.micro_batches if most is None or size <= most)
        return next((size for size in sizes if self.footprint(setting, size).fits(gpu)), None)

    def nearest(self, setting: Setting, micro_batch: int, gpu: Gpu) -> list[str] | None:
        """The flags of the setting that fits and costs least to change to; None when nothing fits.

        A smaller micro-batch costs least: with the accumulation that makes up for it, the steps stay the same.
        Sharing states (ZeRO) costs communication, recomputing a third more time, 8-bit moments a little accuracy,
        main memory a multiple of the time.
        """
        found: list[tuple[int, int, list[str]]] = []
        for (stage_cost, staged), (again_cost, again), (small_cost, small) in product(
            _stages(setting), _recomputed(setting), _small_moments(setting)
        ):
            changes = staged | again | small
            flags = [f"{name} {value}" for name, (value, _) in changes.items()]
            candidate = setting
            for _, fields in changes.values():
                candidate = candidate.changed(**fields)
            size = self.largest(candidate, gpu, micro_batch)
            if size is not None:
                smaller = size < micro_batch
                flags += [f"--per_device_train_batch_size {size}"] if smaller else []
                found.append((stage_cost + again_cost + small_cost + smaller, -size, flags))
        return min(found)[2] if found else None


Change = tuple[int, dict[str, tuple[str, dict[str, object]]]]
"""Cost, and flag → (value, fields of the setting)."""


def _stages(setting: Setting) -> list[Change]:
    found: list[Change] = [(0, {})]
    now = -1 if setting.stage is None else setting.stage
    if setting.gpus > 1:
        for cost, stage in ((2, 2), (4, 3)):
            if stage > now and not (stage == 3 and setting.bits < 16):
                found.append((cost, {"--deepspeed": (f"scripts/zero{stage}.json", {"stage": stage})}))
    if not setting.offload_weights and setting.bits == 16:
        fields: dict[str, object] = {"stage": 3, "offload_optimizer": True, "offload_weights": True}
        found.append((16, {"--deepspeed": ("scripts/zero3_offload.json", fields)}))
    return found


def _recomputed(setting: Setting) -> list[Change]:
    found: list[Change] = [(0, {})]
    if not setting.checkpointing:
        found.append((3, {"--gradient_checkpointing": ("True", {"checkpointing": True})}))
    return found


def _small_moments(setting: Setting) -> list[Change]:
    found: list[Change] = [(0, {})]
    if not setting.optimizer_8bit:
        found.append((8, {"--optim": ("adamw_bnb_8bit", {"optimizer_8bit": True})}))
    return found


def hours(operations: float, gpus: int, gpu: Gpu) -> tuple[float, float]:
    """Of a run of this many executed operations: at the upper and at the lower end of `UTILISATION`."""
    slow, fast = (operations / (gpus * gpu.peak * rate) / 3600 for rate in UTILISATION)
    return fast, slow
