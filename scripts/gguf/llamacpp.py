"""Answer the same questions in llama.cpp and compare: ids of the prompt, image features, greedy tokens.

    python scripts/gguf/llamacpp.py DIR [f32 f16 …]

Runs in an environment of its own with llama-cpp-python; see scripts/check_gguf.sh. Ends with 1 when something differs
that must not: an id of any prompt, or in f32 an answer but to pictures that llama.cpp pads in its own way.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image

F32 = 0  # ggml's number of the type
PADDED_ELSEWISE = ("wide", "tall")


class Outcome(NamedTuple):
    same_ids: bool
    same_answer: bool
    feature_error: float
    """Largest difference of a feature over the largest feature."""
    lead: float
    """By how much llama.cpp preferred its token where the answers part (logits)."""


class Runner:
    """A model and its tower in llama.cpp, float32 where it lets us."""

    def __init__(self, folder: Path) -> None:
        (text,), (sight,) = folder.glob("model-*.gguf"), folder.glob("mmproj-*.gguf")
        self.llama = llama_cpp.Llama(
            str(text), n_ctx=2048, n_threads=1, type_k=F32, type_v=F32, flash_attn=False, verbose=False
        )
        options = mtmd.mtmd_context_params_default()
        options.n_threads, options.use_gpu, options.print_timings = 1, False, False
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.eyes = mtmd.mtmd_init_from_file(str(sight).encode(), self.llama.model, options)
        if self.eyes is None:
            raise SystemExit(f"error: {sight}: llama.cpp does not load it")

    def ask(self, row: dict[str, Any], folder: Path, image_token: str, new_tokens: int) -> Outcome:
        """One question as geochat asked it."""
        image = folder / row["image"] if row["image"] else None
        chunks = self.chunks(row["prompt"].replace(image_token, mtmd.mtmd_default_marker().decode()), image)
        ids, error = self.read(chunks, image.with_suffix(".npy") if image else None)
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        past = llama_cpp.llama_pos(0)
        done = mtmd.mtmd_helper_eval_chunks(
            self.eyes,
            self.llama._ctx.ctx,
            chunks,
            past,
            llama_cpp.llama_seq_id(0),
            512,
            True,
            ctypes.byref(past),
        )
        if done:
            raise SystemExit(f"error: llama.cpp cannot read the prompt ({done})")
        self.llama.n_tokens = past.value
        mtmd.mtmd_input_chunks_free(chunks)
        same, lead = self.follow(row["answer"], row["finished"], new_tokens)
        return Outcome(ids == row["ids"], same, error, lead)

    def chunks(self, prompt: str, image: Path | None) -> Any:
        """Text and picture cut up by llama.cpp, with the beginning-of-sequence token."""
        data = prompt.encode()
        text = mtmd.mtmd_input_text(data, len(data), True, True)
        bitmaps = []
        if image:
            pixels = np.ascontiguousarray(Image.open(image).convert("RGB"))
            colours = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
            bitmaps.append(mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], colours))
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        chunks = mtmd.mtmd_input_chunks_init()
        if mtmd.mtmd_tokenize(self.eyes, chunks, ctypes.byref(text), array, len(bitmaps)):
            raise SystemExit("error: llama.cpp cannot tokenise the prompt")
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return chunks

    def read(self, chunks: Any, features: Path | None) -> tuple[list[int], float]:
        """Ids of the text, and how far the features of the picture are from ours."""
        ids: list[int] = []
        error = 0.0
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += [tokens[k] for k in range(count.value)]
            elif features is not None:
                wanted = np.load(features)
                if mtmd.mtmd_encode_chunk(self.eyes, chunk):
                    raise SystemExit(f"error: llama.cpp cannot see the picture of {features}")
                seen = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.eyes), wanted.shape)
                error = float(np.abs(seen - wanted).max() / np.abs(wanted).max())
        return ids, error

    def logits(self) -> np.ndarray:
        """Of the last token."""
        values = llama_cpp.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(values, (self.llama.n_vocab(),))

    def follow(self, answer: list[int], finished: bool, new_tokens: int) -> tuple[bool, float]:
        """Whether greedy decoding gives this answer; if not, llama.cpp's preference where they part."""
        ends = answer if len(answer) == new_tokens or not finished else [*answer, None]
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        for wanted in ends:
            logits = self.logits()
            best = int(logits.argmax())
            ended = llama_cpp.llama_vocab_is_eog(vocabulary, best)
            if (wanted is None and not ended) or (wanted is not None and best != wanted):
                other = llama_cpp.llama_vocab_eos(vocabulary) if wanted is None else wanted
                return False, float(logits[best] - logits[other])
            if wanted is not None:
                self.llama.eval([wanted])
        return True, 0.0


def odd(folder: Path, wanted: dict[str, list]) -> bool:
    """The random model: largest differences of its logits and of its features, printed; whether they are small."""
    runner = Runner(folder / "odd")
    runner.llama.reset()
    runner.llama.eval(wanted["ids"])
    logits = runner.logits() - np.array(wanted["logits"])
    chunks = runner.chunks(mtmd.mtmd_default_marker().decode(), folder / "exact-0.png")
    feature = runner.read(chunks, folder / "odd.npy")[1]
    mtmd.mtmd_input_chunks_free(chunks)
    print(f"odd   largest difference of a logit {np.abs(logits).max():.1e}, of a feature {feature:.5f}")
    return bool(np.abs(logits).max() < 1e-3 and feature < 0.01)


def chat(folder: Path, facts: dict[str, Any]) -> bool:
    """The way of a chat program: the template in the file, the picture as an address; whether answers are the same."""
    (text,), (sight,) = (folder / "f32").glob("model-*.gguf"), (folder / "f32").glob("mmproj-*.gguf")
    rows = [row for row in facts["rows"] if row["question"] and row["shape"] == "exact"]
    same = 0
    options: dict[str, Any] = {"n_ctx": 2048, "n_threads": 1, "type_k": F32, "type_v": F32, "verbose": False}
    llama = llama_cpp.Llama(
        str(text), chat_handler=MTMDChatHandler(str(sight), verbose=False), flash_attn=False, **options
    )
    for row in rows:
        data = base64.b64encode((folder / row["image"]).read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        parts = [picture, {"type": "text", "text": row["question"]}]
        answer = llama.create_chat_completion(
            [{"role": "user", "content": parts}],
            temperature=0,
            repeat_penalty=1,
            max_tokens=facts["new_tokens"],
        )
        same += answer["choices"][0]["message"]["content"].strip() == row["text"].strip()
    print(f"chat  {same} of {len(rows)} answers the same through the template in the file")
    return same == len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/gguf/expected.py wrote")
    parser.add_argument("kinds", nargs="*", default=["f32", "f16", "bf16"], help="folders in it")
    arguments = parser.parse_args()
    facts = json.loads((arguments.folder / "expected.json").read_text())
    failed = 0
    print(f"llama-cpp-python {llama_cpp.__version__}")
    print("file  picture   questions  same ids  same answer  feature error (largest)  lead where they part")
    for kind in arguments.kinds:
        runner = Runner(arguments.folder / kind)
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for row in facts["rows"]:
            found = runner.ask(row, arguments.folder, facts["image_token"], facts["new_tokens"])
            groups[row["shape"]].append(found)
        for shape, found in groups.items():
            ids, answers = (sum(one[k] for one in found) for k in (0, 1))
            error, leads = max(one.feature_error for one in found), [one.lead for one in found if one.lead]
            parted = ", ".join(f"{lead:.3f}" for lead in sorted(leads)) or "-"
            print(f"{kind:5} {shape:8} {len(found):10} {ids:9} {answers:12} {error:24.5f}  {parted}")
            strict = kind == "f32" and shape not in PADDED_ELSEWISE
            failed |= ids < len(found) or (strict and answers < len(found))
    failed |= not chat(arguments.folder, facts)
    failed |= not odd(arguments.folder, facts["odd"])
    print("check_gguf: FAILED" if failed else "check_gguf: PASSED")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
