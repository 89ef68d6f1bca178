"""tokenizer.json written here gives the ids of sentencepiece, before and after a save, in our hands and in transformers'."""

import json
import pickle
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from geochat.model.formats.sentencepiece import SentencePieceModel
from geochat.model.tokenizer import convert_sentencepiece, load_tokenizer, write_tokenizer_files

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    "hello",
    "",
    " ",
    " one leading space",
    "   three, and   three inside  ",
    "{<10><20><30><40>|<90>}",
    "line\n\nline\n x\ttab",
    "ünïcödé 北京 🚢 \u200b",
    "▁ a piece's own mark ▁▁",
    "USER: What? ASSISTANT: urban",
]


def fuzz(count: int) -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghinorst  \n.,<>{}|0123é北🚢"
    return ["".join(draw.choice(letters) for _ in range(draw.randint(0, 40))) for _ in range(count)]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def spm(tiny_tokenizer_model: Path):
    return sentencepiece.SentencePieceProcessor(str(tiny_tokenizer_model))


def test_ids_are_those_of_sentencepiece(tiny_tokenizer_model: Path, spm) -> None:
    tokenizer = convert_sentencepiece(tiny_tokenizer_model)
    for text in TEXTS + fuzz(2000):
        assert ids(tokenizer, text) == spm.encode(text), repr(text)


def test_ids_of_the_golden_tokenizer(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "golden/tokenizer")
    spm = sentencepiece.SentencePieceProcessor(str(assets / "golden/tokenizer/tokenizer.model"))
    for text in TEXTS + fuzz(2000):
        assert ids(tokenizer, text) == spm.encode(text), repr(text)


def test_every_stretch_between_special_tokens_starts_like_a_text(tiny_tokenizer_model: Path, spm) -> None:
    tokenizer = convert_sentencepiece(tiny_tokenizer_model)
    assert ids(tokenizer, "no</s>USER: x</s> y") == [
        *spm.encode("no"), 2, *spm.encode("USER: x"), 2, *spm.encode(" y"),
    ]  # fmt: skip


def test_decoding_gives_the_text_back(tiny_tokenizer_model: Path) -> None:
    tokenizer = convert_sentencepiece(tiny_tokenizer_model)
    for text in TEXTS:
        assert tokenizer.decode(ids(tokenizer, text)) == text.replace("▁", " ")


def test_saved_files_give_the_same_ids_everywhere(tiny_tokenizer_model: Path, spm, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = convert_sentencepiece(tiny_tokenizer_model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.backend_tokenizer.add_special_tokens(["<image>"])
    write_tokenizer_files(tmp_path, tokenizer, tiny_tokenizer_model.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "LlamaTokenizer"
    assert written["legacy"] is True
    assert written["extra_special_tokens"] == {"image_token": "<image>"}
    plain = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    again = load_tokenizer(tmp_path)
    for text in [*TEXTS, *fuzz(200), "<image>\nWhat?</s>USER: x", "<image> y"]:
        assert ids(again, text) == ids(tokenizer, text)
        assert plain(text, add_special_tokens=False).input_ids == ids(tokenizer, text), repr(text)
    assert plain("x").input_ids == [1, *spm.encode("x")]
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(again, role) == getattr(tokenizer, role) == getattr(plain, role)


def test_files_from_a_folder_with_the_model_alone(tiny_tokenizer_model: Path, spm, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_model.read_bytes())
    write_tokenizer_files(tmp_path)
    assert ids(load_tokenizer(tmp_path), "  a b") == spm.encode("  a b")


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["<|begin|>", "<|eot_id|>"], show_progress=False)
    backend.train_from_iterator(["a few words, a few more"], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert ids(tokenizer, "few words") == backend.encode("few words").ids


def test_added_tokens_take_their_ids(tiny_tokenizer_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_model.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 513, "<|im_start|>": 512}))
    tokenizer = load_tokenizer(tmp_path)
    assert ids(tokenizer, "<|im_start|><|im_end|>") == [512, 513]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 600}))
    with pytest.raises(ValueError, match="should have id 600"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_reproduced_is_refused(tiny_tokenizer_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(tiny_tokenizer_model.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        SentencePieceModel.read(broken)
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path / "nowhere")
    import io

    for options, reason in (({"model_type": "unigram"}, "not a BPE"), ({"model_type": "bpe"}, "normalises")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a few words", "some more words", "ships and planes"] * 5),
            model_writer=model, vocab_size=22, minloglevel=2, **options,
        )  # fmt: skip
        broken.write_bytes(model.getvalue())
        with pytest.raises(ValueError, match=reason):
            convert_sentencepiece(broken)


def test_tokenizers_travel_to_loader_processes(tiny_tokenizer_model: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(convert_sentencepiece(tiny_tokenizer_model)))
    assert ids(tokenizer, "a b")
