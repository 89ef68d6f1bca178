"""Tokenizers: a sentencepiece `tokenizer.model` becomes a `tokenizer.json` with the same ids.

transformers 5 builds a Llama tokenizer from `tokenizer.json` alone and changes ids on save and reload, so the file is
written here. Every stretch of text between special tokens is encoded as sentencepiece encodes a text of its own: with
the dummy space in front, runs of spaces kept (`legacy: true` in transformers' terms, as LLaVA and GeoChat trained).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from geochat.model.formats.sentencepiece import (
    BPE_MODEL,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
)
from geochat.model.weights import read_json


def convert_sentencepiece(file: Path, added: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of the sentencepiece model `file`.

    added: id -> text of the tokens that the checkpoint adds to the model's pieces or puts in place of them.
    Raises ValueError for a model that this conversion cannot reproduce (unigram, normalisation rules).
    """
    return tokenizer_of(SentencePieceModel.read(file), str(file), added)


def tokenizer_of(
    model: SentencePieceModel, where: str, added: dict[int, str] | None = None
) -> PreTrainedTokenizerFast:
    """As `convert_sentencepiece`, of a model that was read already; `where` names it in errors."""
    require_plain_bpe(model, where)
    texts = [text for text, _, _ in model.pieces]
    specials = {i: text for i, (text, _, kind) in enumerate(model.pieces) if kind in (UNKNOWN, CONTROL)}
    users = {i: text for i, (text, _, kind) in enumerate(model.pieces) if kind == USER_DEFINED}
    for number, text in (added or {}).items():
        if number < len(texts) and texts[number] != text:
            texts[number] = text
            users.pop(number, None)
        if number not in users:
            specials[number] = text
    vocabulary = {text: i for i, text in enumerate(texts)}
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(model),
            unk_token=texts[model.unk_id],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    replace: list[Any] = [normalizers.Replace(" ", "▁")]
    prefix: list[Any] = [normalizers.Prepend("▁")] if model.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence(prefix + replace)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if model.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(steps + strip)
    for group, special in ((specials, True), (users, False)):
        for number, text in sorted(group.items()):
            token = AddedToken(text, special=special, normalized=False)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
            if backend.token_to_id(text) != number:
                raise ValueError(
                    f"{where}: added token {text!r} should have id {number}; the ids in between are missing"
                )
    bos, eos = texts[model.bos_id], texts[model.eos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, model.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=texts[model.unk_id],
        clean_up_tokenization_spaces=False,
    )


def require_plain_bpe(model: SentencePieceModel, where: str) -> None:
    """Refuse a model that is not BPE, or changes its text before it looks at it."""
    if model.model_type != BPE_MODEL:
        raise ValueError(f"{where}: not a BPE model; give a folder that has tokenizer.json instead")
    if model.charsmap or model.remove_extra_whitespaces:
        raise ValueError(
            f"{where}: normalises its text; train it with --normalization_rule_name=identity "
            "--remove_extra_whitespaces=false, or give a folder that has tokenizer.json"
        )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merge list that makes BPE by rank choose as sentencepiece does: best score first, then leftmost."""
    rank = {text: (-score, i) for i, (text, score, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = [
        (rank[text], text[:cut], text[cut:])
        for text in rank
        for cut in range(1, len(text))
        if text[:cut] in rank and text[cut:] in rank
    ]
    merges.sort(key=lambda row: (row[0], rank[row[1]], rank[row[2]]))
    return [(left, right) for _, left, right in merges]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder.

    A folder with only `tokenizer.model` (Vicuna, LLaVA) is converted; a `tokenizer.json` is taken as it is.
    Raises ValueError when there is neither.
    """
    config = read_json(folder / "tokenizer_config.json", optional=True)
    if (folder / "tokenizer.json").exists():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    elif (folder / "tokenizer.model").exists():
        tokenizer = convert_sentencepiece(folder / "tokenizer.model", _added_tokens(folder, config))
    else:
        raise ValueError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(role)
        text = value["content"] if isinstance(value, dict) else value
        if text is not None and tokenizer.backend_tokenizer.token_to_id(text) is not None:
            setattr(tokenizer, role, text)
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, str]:
    """id -> text of the added tokens, from tokenizer_config.json or the older added_tokens.json."""
    listed = {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
    older = {int(i): text for text, i in read_json(folder / "added_tokens.json", optional=True).items()}
    return {**older, **listed}


def write_tokenizer_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    sentencepiece: bytes | None = None,
    max_length: int = 2048,
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and, where there is one, tokenizer.model.

    tokenizer: None: the one that the `tokenizer.model` of this folder describes.
    sentencepiece: the content of `tokenizer.model`.

    A sentencepiece tokenizer is declared as `LlamaTokenizer` with `legacy`, which releases 4.x and 5.x, vLLM and
    llama.cpp's converter understand alike; any other as the generic class that takes tokenizer.json as it is.
    """
    if tokenizer is None:
        tokenizer = convert_sentencepiece(folder / "tokenizer.model")
        sentencepiece = (folder / "tokenizer.model").read_bytes()
    backend = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    if sentencepiece is not None:
        (folder / "tokenizer.model").write_bytes(sentencepiece)
    roles = {
        role: getattr(tokenizer, role)
        for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(tokenizer, role) is not None
    }
    decoder = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    image = {"image_token": "<image>"} if backend.token_to_id("<image>") is not None else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if sentencepiece is None else "LlamaTokenizer",
        "legacy": True,
        "added_tokens_decoder": decoder,
        "extra_special_tokens": image,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "right",
        "processor_class": "LlavaProcessor",
        **roles,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {**roles, **image})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
