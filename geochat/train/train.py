"""Train a model: `python -m geochat.train.train --model_name_or_path M --data_path D --image_folder I --output_dir O`.

Parse, build, train, save. LoRA by default; `--lora_enable False` trains the language model and the projector (and
the tower with `--tune_vision_tower`), `--tune_mm_mlp_adapter True` on top of that only the projector.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from geochat.eval.files import write_text
from geochat.train import plan
from geochat.train.arguments import Arguments
from geochat.train.assemble import load_base, make_collator, make_trainable
from geochat.train.command_line import parse_arguments
from geochat.train.curves import LossCurve
from geochat.train.data_record import compare_data, data_record
from geochat.train.dataset import BadSampleError
from geochat.train.mixture import open_sets
from geochat.train.recipe import describe
from geochat.train.recompute import choose_recomputation
from geochat.train.saving import LossError, RunSaver, SaveError, explained, resume_point, without_zero_init
from geochat.train.sharded import require_same_layout
from geochat.train.stopping import stop_together
from geochat.train.trainer import Trainer
from geochat.train.universal import spread_anew
from geochat.train.validation import make_validation


def main(argv: list[str] | None = None) -> None:
    """Raises: SystemExit(2), after one line on stderr, for input that cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the parallelism
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, nothing a user can change
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments[2].dry_run:
            return plan.run(arguments)
        trainer, resume = prepare(arguments)
    except (ValueError, OSError) as error:
        stop_together(error)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        with explained(Path(arguments[2].output_dir), "the final model"):
            trainer.save_model()
        report_bad_samples(trainer)
    except (BadSampleError, LossError, SaveError, OSError) as error:
        stop_together(error)


def prepare(arguments: Arguments) -> tuple[Trainer, Path | None]:
    """Trainer ready to run, and the checkpoint to resume from. Raises: ValueError, OSError on unusable input."""
    model_args, data_args, args = arguments
    resume = resume_point(args)
    if resume is not None:
        require_same_layout(resume, args)
        spread_anew(resume, args)
    transformers.set_seed(args.seed)
    with without_zero_init():
        base, processor, record = load_base(arguments)
    kind, model = make_trainable(base, model_args, args)
    saver = RunSaver(kind, model, processor, record)
    saver.check(Path(args.output_dir), resume)
    train_set, eval_set = open_sets(processor, data_args, args)
    drawn_from = data_record(train_set.library.sources, data_args, args)
    if resume is not None:
        args.notes += compare_data(resume, drawn_from, allow_changed=args.allow_changed_data)
    validation = make_validation(eval_set, processor, args)
    if args.checkpointing_is_open:
        choose_recomputation(model, base, train_set, model_args, args)
    if args.process_index == 0:
        say(arguments, describe(model, processor, arguments, train_set, eval_set), resume)
    trainer = Trainer(
        base=base,
        saver=saver,
        model=model,
        args=args,
        data_collator=make_collator(processor, args, base.config._attn_implementation),
        train_dataset=train_set,
        # transformers takes an empty dictionary for validation without a loss.
        eval_dataset={} if eval_set is None and args.eval_benchmark else eval_set,
        data_record=drawn_from,
        validation=validation,
        callbacks=[LossCurve(Path(args.output_dir))],
    )
    return trainer, resume


def say(arguments: Arguments, recipe: str, resume: Path | None) -> None:
    """Print the resolved recipe and keep it in the run folder."""
    args = arguments[2]
    lines = [*(f"note: {note}" for note in args.notes), recipe]
    if resume is not None:
        lines.append(f"{'resumed from':>22}  {resume}")
    write_text(Path(args.output_dir) / "recipe.txt", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def report_bad_samples(trainer: Trainer) -> None:
    """Print how many rows were skipped over all processes and list them in `bad_samples.txt`."""
    args = trainer.args
    reasons: list[Any] = [trainer.bad_samples]
    if args.world_size > 1:
        reasons = [None] * args.world_size
        dist.all_gather_object(reasons, trainer.bad_samples)
    named = sorted({reason for part in reasons for reason in part})
    if args.process_index == 0 and named:
        file = Path(args.output_dir) / "bad_samples.txt"
        write_text(file, "\n".join(named) + "\n")
        print(f"{len(named)} rows could not be used and were skipped, listed in {file}")


def run() -> None:
    """`main` as a process of its own.

    Gloo's threads must not outlive the interpreter: that would abort the process, whatever it was about to say. A
    finished process takes leave of the others. A failed one ends at once, since they may be waiting for it.
    """
    try:
        main()
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run()
