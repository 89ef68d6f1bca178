"""Write the nano language model, untrained: a Llama of 2 million parameters and its own sentencepiece tokenizer.

    python scripts/nano/make_llm.py --output playground/runs/nano/llm

The tokenizer is trained on the generator's own questions and answers and on a list of words of the field. One thing is put in by
hand: the numbers of the box grammar, `<0>` … `<100>`, are single pieces, so a box costs eight tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import LlamaConfig, LlamaForCausalLM

from geochat.data.boxes import BOX_PATTERN
from geochat.data.sample import Turn
from geochat.data.synthetic import KINDS, draw_scene
from geochat.data.synthetic_tasks import conversation
from geochat.data.templates import TEMPLATES
from geochat.model.tokenizer import write_tokenizer_files

VOCABULARY = 1022
"""Pieces of the tokenizer; with <image> and <pad> the table has 1 024 rows."""

WORDS = (
    "airport bareland baseball field beach bridge center church commercial dense residential desert farmland forest "
    "industrial meadow medium residential mountain park parking playground pond port railway station resort river school "
    "sparse residential square stadium storage tanks viaduct car truck bus minibus cyclist "
    "many some several two three four green trees buildings are in is on and with near around next to by both sides of "
    "a an the it this that there piece large small white blue red gray brown yellow dark light long curved straight water "
    "road roads cars boats ships planes houses roofs parked runway terminal sand sea waves ocean grass land ground lawn "
    "track football court tennis swimming pool highway cross overpass railway tracks train tank factory workshop lines "
    "rows arranged neatly orderly surrounded located between two parts one side other side across over through under"
)
"""Words of remote-sensing captions and class lists, so that fine-tuning on real pictures finds whole pieces for them."""


def corpus() -> list[str]:
    """Lines of text: dialogues about scenes without their boxes, the system prompts, and the words above."""
    lines = [WORDS] * 60
    for seed in range(1000):
        rng = np.random.default_rng([seed, 2])
        for question in conversation(draw_scene(seed, side=96), rng, 8):
            lines += [question.text.replace("\n", " "), question.answer]
    for template in TEMPLATES.values():
        lines += [template.render([Turn("user", "")], add_generation_prompt=True).replace("\n", " ")] * 400
    return [re.sub(BOX_PATTERN, " ", line) for line in lines if line.strip()]


def box_pieces() -> list[str]:
    """The pieces of the box grammar in the order in which they must merge: `<1`, `<12`, then `<12>`."""
    opened = [f"<{n}" for n in range(10)] + [f"<{n}" for n in range(10, 100)] + ["<100"]
    return [*opened, *(f"<{n}>" for n in range(101)), "▁{"]


def train_tokenizer(lines: list[str]) -> bytes:
    """A BPE tokenizer in Llama's manner: byte fallback, dummy prefix, no normalisation, digits apart."""
    extra = box_pieces()
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=buffer, model_type="bpe", vocab_size=VOCABULARY - len(extra),
        character_coverage=1.0, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        required_chars="{}<>|0123456789", num_threads=1, minloglevel=2, max_sentence_length=8192,
    )  # fmt: skip
    model = proto.ModelProto.FromString(buffer.getvalue())
    normal = proto.ModelProto.SentencePiece.NORMAL
    trained = [piece for piece in model.pieces if piece.type == normal]
    first = next(i for i, piece in enumerate(model.pieces) if piece.type == normal)
    head = list(model.pieces)[:first]
    del model.pieces[:]
    model.pieces.extend(head)
    for rank, piece in enumerate(extra):
        model.pieces.add(piece=piece, score=-float(rank), type=normal)
    for piece in trained:
        model.pieces.add(piece=piece.piece, score=piece.score - len(extra), type=normal)
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString())


def model_piece(file: Path, piece: str) -> int:
    return int(spm.SentencePieceProcessor(model_file=str(file)).piece_to_id(piece))


def number_embeddings(hidden: int, spread: float) -> torch.Tensor:
    """Embeddings [101, hidden] of the box numbers: waves of seven lengths, so that neighbours are alike from the start."""
    n = torch.arange(101)[:, None]
    angles = 2 * torch.pi * n / torch.tensor([400.0, 200.0, 100.0, 50.0, 25.0, 12.5, 6.25])
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [101, 14], every row of length √7
    axes = torch.linalg.qr(torch.randn(hidden, 14))[0]  # orthonormal columns
    return waves @ axes.T * (spread * hidden**0.5 / 7**0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "tokenizer.model").write_bytes(train_tokenizer(corpus()))
    write_tokenizer_files(args.output)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=448, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    table = model.model.embed_tokens.weight.data
    ids = torch.tensor([model_piece(args.output / "tokenizer.model", f"<{n}>") for n in range(101)])
    table[ids] = number_embeddings(config.hidden_size, 0.02)
    pieces = spm.SentencePieceProcessor(model_file=str(args.output / "tokenizer.model"))
    for kind in KINDS:  # one and several are nearly the same word; the data would teach it, more slowly
        one, several = (pieces.encode(text)[-1] for text in (kind, f"{kind}s"))
        table[several] = table[one] + 0.3 * (table[several] - table[one])
    model.lm_head.weight.data.copy_(table)  # a word that is seen points at the same word that is said
    model.save_pretrained(args.output)
    print(json.dumps({"output": str(args.output), "pieces": VOCABULARY}))


if __name__ == "__main__":
    main()
