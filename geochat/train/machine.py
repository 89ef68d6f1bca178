"""What flags ask of the machine: what must be installed, and how processes meet without a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geochat.train.arguments import TrainingArguments


def check_quantisation(args: TrainingArguments) -> None:
    """Raises: ValueError for `--bits`, or adapters on the tower, that cannot be."""
    if args.bits not in (4, 8, 16):
        raise ValueError(f"--bits {args.bits}: choose 4, 8 or 16 (float32: --bf16 False)")
    if args.bits < 16 and not args.lora_enable:
        raise ValueError(f"--bits {args.bits} needs --lora_enable True: quantised weights cannot train")
    if args.vision_lora_r and not args.lora_enable:
        raise ValueError("--vision_lora_r needs --lora_enable True")
    if args.bits == 4 and (args.quant_type != "nf4" or not args.double_quant):
        raise ValueError(
            "--bits 4 is NF4 with double quantisation: leave --quant_type and --double_quant out"
        )
    if args.bits < 16 and find_spec("bitsandbytes") is None:
        raise ValueError(f"--bits {args.bits}: bitsandbytes is not installed (pip install 'geochat[quant]')")


def check_liger(args: TrainingArguments, cuda: bool) -> None:
    """Liger's kernels without its cross entropy. Raises: ValueError where they cannot run."""
    if not args.use_liger_kernel or args.dry_run:  # a plan is made for other machines
        return
    if not cuda:
        raise ValueError("--use_liger_kernel needs a GPU: its kernels are written in Triton")
    if find_spec("liger_kernel") is None:
        raise ValueError("--use_liger_kernel: not installed here (pip install liger-kernel)")
    # It would replace the model's forward, which the trainer relies on, and logits are few here already.
    args.liger_kernel_config = {"fused_linear_cross_entropy": False, **(args.liger_kernel_config or {})}


def configure_deepspeed_on_cpu(args: TrainingArguments) -> None:
    """DeepSpeed over gloo: accelerate alone would look for an accelerator and not find the CPU backend."""
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    deepspeed.init_distributed("gloo")
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    args.accelerator_config = {"use_configured_state": True}


def configure_fsdp_on_cpu(args: TrainingArguments) -> None:
    """FSDP over gloo: accelerate offers it where it has found several accelerators."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    args.accelerator_config = {"use_configured_state": True}
