"""A command line, LLaVA's and GeoChat's among them (`geochat.train.legacy`), as the arguments of a run."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from itertools import pairwise
from types import MappingProxyType

import transformers
from transformers.trainer_utils import IntervalStrategy

from geochat.train.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments
from geochat.train.legacy import translate_legacy, with_their_defaults, without_effect
from geochat.train.presets import with_preset


def parse_arguments(argv: list[str]) -> Arguments:
    """Raises: ValueError, with the flag's name, for a flag or value that cannot be used."""
    translated, notes = translate_legacy(argv)
    argv = with_preset(with_their_defaults(argv, translated, notes), notes)
    for arguments in (ModelArguments, DataArguments, TrainingArguments):
        _show_in_help(arguments)
    parser = transformers.HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments),  # type: ignore[arg-type]
        prog="python -m geochat.train.train",
        allow_abbrev=False,
    )
    model, data, training, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    if training.vision_lora_r and model.tune_vision_tower:
        raise ValueError("--vision_lora_r and --tune_vision_tower are two ways to train the tower: give one")
    _require_an_occasion(data, training)
    training.notes = notes + training.notes + without_effect(argv, model, training)
    return model, data, training


def _require_an_occasion(data: DataArguments, training: TrainingArguments) -> None:
    """`--eval_steps` alone says that there is validation; something to validate on without it says nothing of when."""
    wanted = {
        "--eval_data_path": data.eval_data_path,
        "--val_share": data.val_share,
        "--eval_benchmark": training.eval_benchmark,
    }
    flag = next((name for name, value in wanted.items() if value), None)
    if flag is None or training.eval_strategy != IntervalStrategy.NO:
        return
    if not training.eval_steps:
        raise ValueError(f"{flag} needs --eval_steps N, or --eval_strategy epoch: when to validate")
    training.eval_strategy, training.do_eval = IntervalStrategy.STEPS, True


def _show_in_help(arguments: type) -> None:
    """Give every field of a dataclass the text below it, and its default, as what `--help` says of the flag."""
    (tree,) = ast.parse(inspect.getsource(arguments)).body
    assert isinstance(tree, ast.ClassDef)
    below = {
        node.target.id: " ".join(text.value.value.split())
        for node, text in pairwise(tree.body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    for entry in fields(arguments):
        if entry.name in vars(arguments).get("__annotations__", {}):
            said = below.get(entry.name, "").replace("`", "").replace("%", "%%")
            shown = f"{said} (default: %(default)s)".strip()
            entry.metadata = MappingProxyType({**entry.metadata, "help": shown})
