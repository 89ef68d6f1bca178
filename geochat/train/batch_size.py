"""The accumulation that reaches a global batch."""

from __future__ import annotations


def accumulation_for(target: int | None, per_device: int, accumulation: int, processes: int) -> int:
    """Micro-batches per optimizer step so that per_device × accumulation × processes = `target` exactly.

    Raises: ValueError when no whole number does it, or when a different accumulation was asked for.
    """
    if target is None:
        return accumulation
    micro = per_device * processes
    if target % micro:
        raise ValueError(
            f"--global_batch_size {target} cannot be reached: --per_device_train_batch_size {per_device} × "
            f"{processes} processes = {micro} does not divide it{_nearest_divisors(target, per_device, processes)}"
        )
    if accumulation not in (1, target // micro):
        raise ValueError(
            f"--global_batch_size {target} needs --gradient_accumulation_steps {target // micro} "
            f"({per_device} × {target // micro} × {processes} processes), not {accumulation}: leave it out"
        )
    return target // micro


def _nearest_divisors(target: int, per_device: int, processes: int) -> str:
    """The micro-batches beside `per_device` that divide the target, as the end of a message."""
    if target % processes:
        return f"; nor do {processes} processes"
    share = target // processes
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    below = [size for size in sizes if size < per_device][-1:]
    above = [size for size in sizes if size > per_device][:1]
    return f"; {' or '.join(map(str, below + above))} per device does"
