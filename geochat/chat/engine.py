"""The only way to ask a model: the command line, the demo and the evaluation all ask through `Chat`.

Answers do not depend on what else is in the batch, nor on what was asked before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from geochat.chat.batch import Batch
from geochat.chat.pictures import Pictures
from geochat.chat.prefixes import Prefixes
from geochat.chat.request import Prompt, Request
from geochat.chat.rows import Row
from geochat.chat.runtime import default_dtype, free_bytes, pick_device, token_bytes
from geochat.chat.sampling import Settings
from geochat.chat.text import Answer, Pieces, decode, in_order
from geochat.model import checkpoint
from geochat.model.processor import Processor

__all__ = ["Answer", "Chat", "Request"]

MOST_ROWS = 128
"""Questions answered at a time where memory allows for more."""


class Chat:
    """A model and its processor, ready to answer."""

    def __init__(
        self,
        model: Any,
        processor: Processor,
        *,
        cache_bytes: int = 2**28,
        prefix_bytes: int | None = None,
    ) -> None:
        """`model` may carry adapters; they stay active.

        Args:
            cache_bytes: bound on the image features kept between calls (one image of the 7B model at 504 px takes
                10.6 MB in bfloat16).
            prefix_bytes: bound on the keys and values kept between calls (the same image: 0.7 GB); default: an eighth
                of the memory that is free now.
        """
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.eval()
        self.processor = processor
        self.context: int = self.model.config.text_config.max_position_embeddings
        self._encoder = processor.encoder(max_text_tokens=self.context, truncate=False)
        self._pictures = Pictures(self.model, processor, cache_bytes)
        if prefix_bytes is None:
            prefix_bytes = free_bytes(self.model.device) // 8
        self._prefixes = Prefixes(prefix_bytes)
        self._stops = self._stop_ids()
        self._silent = self._silent_ids()

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
        seed: int | None = None,
        batch_size: int | None = None,
        token_budget: int | None = None,
    ) -> list[Answer]:
        """Answer many requests, in their order. Greedy at temperature 0, else sampled: request i with `seed` + i, or
        from torch's own generator.

        At most `batch_size` requests are answered at a time, of at most `token_budget` tokens together (new ones
        included); default: what half of the free memory holds.
        Raises ValueError, naming the request by its index, for an unreadable image or a prompt beyond the context.
        """
        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
        return in_order(self.results(requests, batch_size=batch_size, token_budget=token_budget, **settings))

    def answer_each(self, requests: Sequence[Request], **options: Any) -> list[Answer | ValueError]:
        """As `answer`, but a request that cannot be asked gives its error and does not stop the others."""
        answers: dict[int, Answer | ValueError] = {}
        for i, result in self.results(requests, **options):
            if not isinstance(result, Answer | ValueError):
                raise result
            answers[i] = result
        return [answers[i] for i in range(len(requests))]

    def stream(
        self,
        request: Request,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """The answer piece by piece; the pieces together are `Answer.text`. Closing the iterator stops the model.

        The conversation's keys and values are kept for its next turn, which begins where this one ends.
        """
        row = self.row(request, Settings(max_new_tokens, temperature, top_p, seed), keep=True)
        batch = self.batch()
        pieces = Pieces(self.processor.tokenizer)
        batch.admit([row])
        try:
            while not row.ended:
                if piece := pieces.grow(row.ids):
                    yield piece
                batch.step()
        finally:
            if not row.ended:
                batch.drop(row)
        if row.error is not None:
            raise row.error
        if piece := pieces.end(row.ids):
            yield piece

    # -- for those who run a batch of their own -------------------------------------------------------------------

    def batch(self) -> Batch:
        """An empty batch of this model."""
        return Batch(self.model, self._pictures, self._prefixes, self._stops, self._silent)

    def row(self, request: Request, settings: Settings, *, index: int = 0, keep: bool = False) -> Row:
        """A request as a row of a batch. Raises ValueError when it cannot be asked."""
        request.check()
        ids = self._encoder.encode_prompt(request.turns)
        prompt = Prompt.of(ids, request.images, self.processor.image_token_id)
        budget = min(settings.max_new_tokens, self.context - len(ids))
        if budget < 1:
            raise ValueError(f"{len(ids)} tokens leave no room in a context of {self.context}")
        return Row(prompt, budget, settings.sampler(index), index, keep)

    def finish(self, row: Row) -> Answer:
        """The answer of a row that has ended."""
        return Answer(decode(self.processor.tokenizer, row.ids), tuple(row.ids), row.finished)

    def token_budget(self) -> int:
        """Tokens that half of the free memory holds."""
        each = token_bytes(self.model.config.text_config, self.model.dtype)
        return free_bytes(self.model.device) // 2 // each

    # -- many requests --------------------------------------------------------------------------------------------

    def results(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        **settings: Any,
    ) -> Generator[tuple[int, Answer | Exception], None, None]:
        """As `answer_each`, each with the index of its request, as they come. A request at which the model breaks gives
        its error too."""
        chosen = Settings(**settings)
        rows: list[Row] = []
        for i, request in enumerate(requests):
            try:
                rows.append(self.row(request, chosen, index=i))
            except ValueError as error:
                yield i, error
        for row in self._ended(rows, batch_size or MOST_ROWS, token_budget or self.token_budget()):
            yield row.index, self.finish(row) if row.error is None else row.error

    def _ended(self, rows: list[Row], most: int, tokens: int) -> Iterator[Row]:
        """Rows as they end. Questions on one image stay together; new ones come in when a quarter of the places is free,
        so that they come in together."""
        order = {
            key: i for i, key in enumerate(dict.fromkeys(key for row in rows for key in row.prompt.images))
        }
        rows.sort(key=lambda row: ([order[key] for key in row.prompt.images], len(row.prompt.ids)))
        waiting, batch = deque(rows), self.batch()
        while waiting or batch.rows:
            free = len(batch.rows) <= most * 3 // 4
            if free and (arriving := batch.fitting(waiting, most, tokens)):
                for _ in arriving:
                    waiting.popleft()
                yield from batch.admit(arriving, waiting)
            yield from batch.step()

    def _stop_ids(self) -> list[int]:
        """The tokenizer's end token and those that end an answer in the chat template."""
        tokenizer = self.processor.tokenizer
        vocabulary = tokenizer.get_vocab()
        stops = {tokenizer.eos_token_id, *(vocabulary.get(stop) for stop in self.processor.template.stop)}
        return sorted(stop for stop in stops if stop is not None)

    def _silent_ids(self) -> list[int]:
        """Tokens without text: placeholders, and rows that only round the table up."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        padding = {self.processor.image_token_id, self.processor.pad_token_id}
        padding |= set(range(len(self.processor.tokenizer), rows))
        return sorted(padding - set(self._stops))
