"""A plan as text."""

from __future__ import annotations

from geochat.train.flops import tower_forward
from geochat.train.gpus import GIB, GPUS, RESERVED, UTILISATION, Gpu, hours
from geochat.train.memory import Setting
from geochat.train.plan_facts import Plan

TERA = 1e12


def text(plan: Plan) -> str:
    """Computed, not measured; every section says what it rests on."""
    sections = [
        "\n".join([*(f"note: {note}" for note in plan.notes), plan.recipe]),
        "\n".join(["Data", *_rows(_data(plan))]),
        "\n".join(["Batches", *_rows(_batches(plan))]),
        "\n".join(["Operations (1 multiply-add = 2)", *_rows(_operations(plan))]),
        "\n".join(_memory(plan)),
        "\n".join(_gpus(plan)),
    ]
    return "\n\n".join(sections)


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:>22}  {value}" for name, value in rows]


def _data(plan: Plan) -> list[tuple[str, str]]:
    n, tokens = plan.rows_read, plan.tokens
    if n + plan.bad_rows >= plan.rows:
        read = f"all {n:,} usable rows, exactly"
    else:
        read = (
            f"{n:,} of {plan.rows:,}, those of micro-batches spread evenly over an epoch (--plan_rows 0: all)"
        )
    return [
        ("rows tokenised", read),
        ("text tokens", f"{tokens.text / n:,.1f} a sample, {_scaled(tokens.text, plan)} in all"),
        ("image tokens", f"{tokens.image / n:,.1f} a sample, {_scaled(tokens.image, plan)} in all"),
        ("supervised tokens", f"{tokens.supervised / n:,.1f} a sample, {_scaled(tokens.supervised, plan)} in all"),
        ("longest sample", f"{tokens.longest:,} tokens, {tokens.most_supervised:,} supervised at most"),
        *((f"tokens of {name}", f"{share:.1%}") for name, share in _several(plan.token_shares)),
    ]  # fmt: skip


def _several(shares: dict[str, float]) -> list[tuple[str, float]]:
    return list(shares.items()) if len(shares) > 1 else []


def _scaled(count: int, plan: Plan) -> str:
    """Over the file: exact where every row was read."""
    usable = plan.rows - round(plan.rows * plan.bad_rows / (plan.rows_read + plan.bad_rows))
    if usable == plan.rows_read:
        return f"{count:,}"
    return f"about {count * usable / plan.rows_read / 1e6:,.2f} million"


def _batches(plan: Plan) -> list[tuple[str, str]]:
    layout, asked = plan.layout, plan.batches[plan.asked]
    shares = [
        f"{batches.padding:.1%} {name}{' (asked)' if name == plan.asked else ''}"
        for name, batches in plan.batches.items()
    ]
    laid = "all" if asked.laid_out == asked.of else f"{asked.laid_out:,}"
    epochs = plan.steps / layout.steps(plan.rows)
    return [
        ("micro-batches", f"{asked.of:,} an epoch over {layout.processes} GPUs; {laid} laid out here"),
        ("padding", f"{', '.join(shares)}"),
        (
            "positions",
            f"{asked.positions / asked.samples:,.1f} a sample as computed, "
            f"{asked.real / asked.samples:,.1f} without padding",
        ),
        ("steps", f"{plan.steps:,}, {layout.steps(plan.rows):,} an epoch, {epochs:.4g} epochs"),
        ("at an epoch's end", plan.ending),
    ]


def _operations(plan: Plan) -> list[tuple[str, str]]:
    shape, again = plan.shape, plan.setting.checkpointing
    useful, executed = (value / TERA for value in plan.mean_work(plan.asked, again))
    asked = plan.batches[plan.asked]
    samples = asked.samples / asked.laid_out
    rows = [("tower forward", f"{tower_forward(shape) / TERA:.2f} TF an image, {shape.tower_read} blocks")]
    rows.append(
        ("language model", f"{2 * shape.decoder_weights / 1e9:.2f} GF a token forward, linear layers")
    )
    if plan.trained.lora_rank:
        adapters = 2 * shape.adapter_weights(plan.trained.lora_rank) / 1e9
        rows.append(("adapters", f"{adapters:.2f} GF a token forward"))
    name = "with recomputation" if again else "nothing recomputed"
    rows.append(
        ("one sample", f"{useful / samples:.3g} TF useful, {executed / samples:.3g} TF executed, {name}")
    )
    run = plan.run_operations(again)
    rows.append(("the run", f"{run:.3g} operations executed, padding included"))
    return rows


def _variants(plan: Plan) -> list[tuple[str, Setting]]:
    plain = plan.setting.changed(stage=None, offload_optimizer=False, offload_weights=False)
    found = [("no ZeRO", plain)]
    found += [(f"ZeRO-{stage}", plain.changed(stage=stage)) for stage in (2, 3)]
    offload = plain.changed(stage=3, offload_optimizer=True, offload_weights=True)
    return [*found, ("ZeRO-3 offload", offload)]


def _memory(plan: Plan) -> list[str]:
    """The states of each ZeRO stage, then what micro-batches add."""
    sizes = _shown(plan)
    lines = [
        f"Memory of each of {plan.processes} GPUs in GiB, every sample as long as the longest read",
        f"{'':>22}  {'weights':>9}{'gradients':>11}{'optimizer':>11}{'buffers':>9}{'main memory':>13}"
        + "".join(f"{f'batch {m}':>10}" for m in sizes),
    ]
    for name, setting in _variants(plan):
        kept = plan.sizing.footprint(setting, 1).states
        totals = (plan.sizing.footprint(setting, m).total for m in sizes)
        lines.append(
            f"{name:>22}  {_gib(kept.weights):>9}{_gib(kept.gradients):>11}{_gib(kept.optimizer):>11}"
            f"{_gib(kept.buffers):>9}{_gib(kept.host):>13}"
            + "".join(f"{_gib(total):>10}" for total in totals)
        )
    for name, again in (("recomputed", True), ("kept", False)):
        setting = plan.setting.changed(checkpointing=again)
        peaks = (plan.sizing.footprint(setting, m).activations.peak for m in sizes)
        lines.append(f"{f'activations {name}':>22}  {'':>53}" + "".join(f"{_gib(p):>10}" for p in peaks))
    state = "recomputed" if plan.setting.checkpointing else "kept"
    lines.append(f"{'':>22}  totals with activations {state}; main memory is for each GPU's process")
    return lines


def _shown(plan: Plan) -> list[int]:
    """A few micro-batches that divide a GPU's share: one sample, the one asked for, and some between and above."""
    asked, sizes = plan.layout.micro_batch, sorted(plan.sizing.micro_batches)
    wanted = {1, asked} | {min(sizes, key=lambda size: abs(size - goal)) for goal in (4, 16)}
    return sorted(wanted)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _gpus(plan: Plan) -> list[str]:
    slow, fast = UTILISATION
    lines = [
        f"GPUs, {plan.processes} of each; hours are assumed to reach {slow:.0%} to {fast:.0%} of the peak on all "
        "operations executed",
        f"{'':>22}  {'GiB':>7}{'needs':>8}{'fits':>6}{'hours':>14}  largest micro-batch × accumulation: "
        "recomputed, hours; kept, hours",
    ]
    for gpu in GPUS:
        need = plan.footprint
        cells = f"{_gib(gpu.memory):>7}{_gib(need.total):>8}{'yes' if need.fits(gpu) else 'no':>6}"
        lines.append(
            f"{gpu.name:>22}  {cells}{_hours(plan, gpu, plan.setting.checkpointing):>14}  "
            f"{_largest(plan, gpu, True)}; {_largest(plan, gpu, False)}"
        )
    lines.append(
        f"{'':>22}  {RESERVED:.0%} of each GPU is left free for CUDA, communication and gaps: assumed"
    )
    return lines


def _largest(plan: Plan, gpu: Gpu, again: bool) -> str:
    size = plan.sizing.largest(plan.setting.changed(checkpointing=again), gpu)
    if size is None:
        return "none"
    return f"{size} × {plan.sizing.share // size}, {_hours(plan, gpu, again)}"


def _hours(plan: Plan, gpu: Gpu, again: bool) -> str:
    fast, slow = hours(plan.run_operations(again), plan.processes, gpu)
    return f"{_short(fast)}–{_short(slow)}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
