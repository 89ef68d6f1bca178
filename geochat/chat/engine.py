"""The only generation in the package: the command line, the demo and the evaluation all ask through `Chat`.

Answers do not depend on what else is in the batch: prompts are padded on the left, the mask follows the padding, and
positions count from each prompt's own first token. An image is encoded once for all the questions about it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from geochat.chat.request import Picture, Prompt, Request, batches, picture_key
from geochat.chat.runtime import Finite, Stopped, TokenQueue, default_dtype, pick_device
from geochat.data.images import open_image
from geochat.data.sample import IMAGE_TOKEN
from geochat.model import checkpoint
from geochat.model.processor import Processor

__all__ = ["Answer", "Chat", "Request"]


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    """New tokens, without the stop token."""
    finished: bool
    """False when the token budget ended the answer."""


class Chat:
    """A model and its processor, ready to answer."""

    def __init__(self, model: Any, processor: Processor, *, cache_bytes: int = 2**28) -> None:
        """`model` may carry adapters; they stay active. `cache_bytes` bounds the image features kept between calls
        (one image of the 7B model at 504 px takes 10.6 MB in bfloat16)."""
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.eval()
        self.processor = processor
        self.context: int = self.model.config.text_config.max_position_embeddings
        self._encoder = processor.encoder(max_text_tokens=self.context, truncate=False)
        self._cache_bytes = cache_bytes
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._stops = self._stop_ids()

    @classmethod
    def load(
        cls,
        path: str | Path,
        base: str | Path | None = None,
        *,
        device: str = "auto",
        load_4bit: bool = False,
        load_8bit: bool = False,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Chat:
        """Read a merged or an adapter folder. `options` go to `checkpoint.load` (base's tower, image size, attention).

        Without `dtype`: bfloat16 on a GPU that has it, float16 on other accelerators, float32 on the CPU.
        Raises ValueError (with the folder and the reason) when it cannot be read.
        """
        if load_4bit and load_8bit:
            raise ValueError("choose one of 4-bit and 8-bit")
        device = pick_device(device)
        quantization = "4bit" if load_4bit else "8bit" if load_8bit else None
        model, processor = checkpoint.load(
            Path(path),
            base=Path(base) if base else None,
            dtype=dtype or default_dtype(device),
            device=device,
            quantization=quantization,
            **options,
        )
        return cls(model, processor)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        token_budget: int = 65_536,
    ) -> list[Answer]:
        """Answer many requests, in their order. Greedy at temperature 0, else sampled.

        A batch holds at most `batch_size` requests and `token_budget` tokens (padding and new tokens included).
        Raises ValueError, naming the request by its index, for an unreadable image or a prompt beyond the context.
        """
        config = self._generation_config(max_new_tokens, temperature, top_p)
        pictures: dict[str, Picture] = {}
        prompts = [self._prepare(i, request, max_new_tokens, pictures) for i, request in enumerate(requests)]
        first_seen = {key: i for i, key in enumerate(pictures)}
        # Questions on one image stay together, neighbours in length share a batch.
        prompts.sort(key=lambda p: (len(p.images), [first_seen[key] for key in p.images], len(p.ids)))
        answers: dict[int, Answer] = {}
        for batch in batches(prompts, batch_size, token_budget, max_new_tokens):
            new_ids = self._generate(batch, pictures, config)
            for prompt, row in zip(batch, new_ids.tolist(), strict=True):
                answers[prompt.index] = self._finish(row, prompt.budget)
        return [answers[i] for i in range(len(requests))]

    def answer_each(self, requests: Sequence[Request], **options: Any) -> list[Answer | ValueError]:
        """As `answer`, but a request that cannot be asked gives its error and does not stop the others."""
        results: dict[int, Answer | ValueError] = {}
        sound: list[int] = []
        readable: set[str] = set()
        for i, request in enumerate(requests):
            try:
                pictures: dict[str, Picture] = {}
                self._prepare(0, request, options.get("max_new_tokens", 256), pictures)
                for key in pictures.keys() - readable - self._features.keys():
                    open_image(pictures[key])
                readable |= pictures.keys()
                sound.append(i)
            except ValueError as error:
                results[i] = ValueError(str(error).removeprefix("request 0: "))
        answers = self.answer([requests[i] for i in sound], **options) if sound else []
        results.update(zip(sound, answers, strict=True))
        return [results[i] for i in range(len(requests))]

    def stream(
        self, request: Request, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0
    ) -> Generator[str, None, None]:
        """The answer piece by piece; the pieces together are `Answer.text`. Closing the iterator stops the model."""
        config = self._generation_config(max_new_tokens, temperature, top_p)
        pictures: dict[str, Picture] = {}
        prompt = self._prepare(0, request, max_new_tokens, pictures)
        config.max_new_tokens = prompt.budget
        tokens = TokenQueue()
        stopped = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self._generate([prompt], pictures, config, tokens, stopped)
            except BaseException as error:  # handed to the thread that reads
                failure.append(error)
            finally:
                tokens.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from self._pieces(tokens, prompt.budget)
        finally:
            stopped.set()
            thread.join()
        if failure:
            raise failure[0]

    # -- the prompt -----------------------------------------------------------------------------------------------

    def _prepare(self, index: int, request: Request, wanted: int, pictures: dict[str, Picture]) -> Prompt:
        """Encode one request and note its images under their keys."""
        if not request.turns or request.turns[-1].role != "user":
            raise ValueError(f"request {index}: the last turn must be the user's question")
        marks = sum(turn.text.count(IMAGE_TOKEN) for turn in request.turns)
        if marks != len(request.images):
            raise ValueError(
                f"request {index}: {marks} {IMAGE_TOKEN} in the text for {len(request.images)} images"
            )
        try:
            ids = self._encoder.encode_prompt(request.turns)
            keys = [picture_key(picture) for picture in request.images]
        except ValueError as error:
            raise ValueError(f"request {index}: {error}") from None
        budget = min(wanted, self.context - len(ids))
        if budget < 1:
            raise ValueError(
                f"request {index}: {len(ids)} tokens leave no room in a context of {self.context}"
            )
        pictures.update(zip(keys, request.images))
        return Prompt(index, ids, tuple(keys), budget)

    def _embed(self, batch: Sequence[Prompt], pictures: dict[str, Picture]) -> dict[str, torch.Tensor]:
        """Left-padded embeddings [request, token, hidden], mask and positions [request, token]."""
        features = self._encode_images(dict.fromkeys(key for p in batch for key in p.images), pictures)
        width = max(len(p.ids) for p in batch)
        ids = np.full((len(batch), width), self.processor.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = prompt.ids
            mask[row, width - len(prompt.ids) :] = 1
        device = self.model.device
        token_ids, attention = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        embeds = self.model.get_input_embeddings()(token_ids)
        if features:
            flat = torch.cat([features[key] for p in batch for key in p.images])
            embeds[token_ids == self.processor.image_token_id] = flat.to(embeds.dtype)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        return {"inputs_embeds": embeds, "attention_mask": attention, "position_ids": positions}

    def _encode_images(self, keys: dict[str, None], pictures: dict[str, Picture]) -> dict[str, torch.Tensor]:
        """Projected features [token, hidden] per key; the tower sees only images that are not in the cache."""
        found = {key: self._features[key] for key in keys if key in self._features}
        missing = [key for key in keys if key not in found]
        if missing:
            pixels = torch.stack([self.processor.pixels(open_image(pictures[key])) for key in missing])
            pixels = pixels.to(self.model.device, self.model.dtype)
            output = self.model.get_image_features(pixel_values=pixels, return_dict=True)
            found |= dict(zip(missing, output.pooler_output, strict=True))
        for key in keys:
            self._features[key] = found[key]
            self._features.move_to_end(key)
        kept = sum(feature.nbytes for feature in self._features.values())
        while kept > self._cache_bytes:
            kept -= self._features.popitem(last=False)[1].nbytes
        return found

    # -- the answer -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _generate(
        self,
        batch: Sequence[Prompt],
        pictures: dict[str, Picture],
        config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        stopped: threading.Event | None = None,
    ) -> torch.Tensor:
        """New token ids [request, token], padded on the right."""
        return self.model.generate(
            **self._embed(batch, pictures),
            generation_config=config,
            logits_processor=LogitsProcessorList([Finite()]),
            stopping_criteria=StoppingCriteriaList([Stopped(stopped)] if stopped else []),
            streamer=streamer,
        )

    def _generation_config(self, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
        """Every choice is stated: the checkpoint's generation_config.json must not change how a score comes about."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} must not be negative, top_p {top_p} lies in (0, 1]")
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        rows = self.model.get_input_embeddings().weight.shape[0]
        padding = {self.processor.image_token_id, self.processor.pad_token_id}
        padding |= set(range(len(self.processor.tokenizer), rows))  # rows that only round the table up
        return GenerationConfig(
            do_sample=temperature > 0,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            pad_token_id=self.processor.pad_token_id,
            eos_token_id=self._stops,
            suppress_tokens=sorted(padding - set(self._stops)),
            use_cache=True,
            **sampling,
        )

    def _stop_ids(self) -> list[int]:
        """The tokenizer's end token and those that end an answer in the chat template."""
        tokenizer = self.processor.tokenizer
        vocabulary = tokenizer.get_vocab()
        stops = {tokenizer.eos_token_id, *(vocabulary.get(stop) for stop in self.processor.template.stop)}
        return sorted(stop for stop in stops if stop is not None)

    def _finish(self, row: list[int], budget: int) -> Answer:
        ids = row[:budget]
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        kept = tuple(ids if end is None else ids[:end])
        return Answer(self._decode(kept).strip(), kept, finished=end is not None)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _is_byte(self, token: int) -> bool:
        return self.processor.tokenizer.convert_ids_to_tokens(token).startswith("<0x")

    def _pieces(self, tokens: TokenQueue, budget: int) -> Iterator[str]:
        """Text as it grows. Outer white space and half-received characters are held back: a run of byte tokens is
        decoded as a whole, so nothing of it is certain before another kind of token follows."""
        ids: list[int] = []
        shown = ""
        for token in tokens:
            ids.append(token)
            text = self._finish(ids, budget).text
            partial = text.endswith("\ufffd") or self._is_byte(token)
            if not partial and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        rest = self._finish(ids, budget).text[len(shown) :]
        if rest:
            yield rest
