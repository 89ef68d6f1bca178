"""The one decoding loop: questions that are answered together, and join and leave between tokens.

An answer does not depend on what else is in the batch. Beginnings that prompts share are computed once, see
`geochat.chat.attention`; what is its own, a prompt computes in its own row, under a mask and at its own positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from geochat.chat.attention import OwnTokens, View, shared_prefix_attention
from geochat.chat.pictures import Pictures
from geochat.chat.prefixes import Prefix, Prefixes, longest, shared_tokens
from geochat.chat.request import Prompt
from geochat.chat.rows import Row, passes
from geochat.chat.runtime import lock_of
from geochat.chat.sampling import choose

PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of prompts in one pass through the model, padding included. A CPU does not compute faster what is wider, and its
caches hold less."""
LOOK_AHEAD = 256
"""Coming rows among which pictures to read are looked for."""


class Batch:
    """Rows in progress."""

    def __init__(
        self,
        model: Any,
        pictures: Pictures,
        prefixes: Prefixes,
        stops: Sequence[int],
        silent: Sequence[int],
    ) -> None:
        """
        Args:
            model: a LlavaForConditionalGeneration.
            stops: tokens that end an answer.
            silent: tokens that are never said.
        """
        self.rows: list[Row] = []
        self._lock = lock_of(model)
        self._model, self._language = model, model.model.language_model
        self._pictures, self._prefixes = pictures, prefixes
        self._stops = frozenset(stops)
        self._silent = torch.tensor(list(silent), dtype=torch.long, device=model.device)
        self._pass_tokens = PASS_TOKENS.get(model.device.type, PASS_TOKENS["cpu"])
        self._own = OwnTokens(model.config.text_config, model.dtype, model.device)

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in memory, or will be when every answer is as long as it may be."""
        prefixes = {id(row.prefix): len(row.prefix) for row in self.rows}
        own = sum(len(row.prompt.ids) - row.shared + row.budget for row in self.rows)
        return own + sum(prefixes.values())

    def fitting(self, waiting: Iterable[Row], most: int, tokens: int) -> list[Row]:
        """The first of the waiting rows, as many as there is room for: `most` rows of `tokens` tokens in all. A row that is
        alone always fits."""
        chosen: list[Row] = []
        used = self.tokens
        with self._lock:
            for row in itertools.islice(waiting, most - len(self.rows)):
                signature = row.prompt.signature
                found = self._find(row.prompt)
                shared = found[1] if found else 0
                if chosen:  # neighbours share the most
                    shared = max(shared, shared_tokens(signature, chosen[-1].prompt.signature))
                used += len(row.prompt.ids) - shared + row.budget
                if used > tokens and (chosen or self.rows):
                    break
                chosen.append(row)
        return chosen

    def admit(self, rows: Sequence[Row], coming: Iterable[Row] = ()) -> list[Row]:
        """Take rows in and choose their first tokens. Returns those that ended with it, or cannot be asked (`error`).

        `coming`: rows of which the next will be; their pictures are read meanwhile.
        """
        with self._lock, torch.inference_mode():
            ahead = itertools.islice(coming, LOOK_AHEAD)
            self._pictures.read(self._unknown(rows), self._unknown(ahead))
            # None of the prefixes may go meanwhile.
            held = [found[0] for row in rows if (found := self._find(row.prompt))]
            sound = [row for row in rows if self._readable(row, held)]
            leaders, followers = self._sort(sound, held)
            for part in passes(leaders, self._pass_tokens):
                self._begin(part)
                held += [row.prefix for row in part]
            for row in followers:
                found = self._find(row.prompt, held)
                assert found, "a row follows a prefix that is held, or a leader's"
                row.prefix, row.shared = found
                self._prefixes.use(row.prefix)
            for part in passes(followers, self._pass_tokens):
                self._follow(part)
            return [row for row in rows if row not in sound] + self._leave()

    def step(self) -> list[Row]:
        """One more token for every row. Returns the rows that ended with it; they have left."""
        with self._lock, torch.inference_mode():
            if self.rows:
                self._extend(self.rows, 0, [np.array(row.ids[-1:]) for row in self.rows])
            return self._leave()

    def drop(self, row: Row) -> None:
        """Take a row out."""
        with self._lock, torch.inference_mode():
            place, last = self.rows.index(row), len(self.rows) - 1
            if row.keep and row.length and row.error is None:
                with suppress(torch.OutOfMemoryError):  # the next turn then begins anew
                    self._prefixes.keep(self._whole(row, place))
            if place != last:
                self.rows[place] = self.rows[last]
                self._own.move(last, place)
            self.rows.pop()

    # -- prompts --------------------------------------------------------------------------------------------------

    def _find(self, prompt: Prompt, held: Sequence[Prefix] = ()) -> tuple[Prefix, int] | None:
        running = {id(row.prefix): row.prefix for row in self.rows}
        return longest(prompt.signature, [*self._prefixes.kept, *running.values(), *held])

    def _unknown(self, rows: Iterable[Row]) -> Iterator[Prompt]:
        """Prompts that go on from no prefix."""
        return (row.prompt for row in rows if not self._find(row.prompt))

    def _sort(self, rows: Sequence[Row], held: Sequence[Prefix]) -> tuple[list[Row], list[Row]]:
        """Those whose prompts are computed whole, and those that will find a prefix once these are."""
        leaders: list[Row] = []
        followers: list[Row] = []
        for row in rows:
            signature = row.prompt.signature
            led = any(shared_tokens(signature, leader.prompt.signature) for leader in leaders)
            (followers if led or self._find(row.prompt, held) else leaders).append(row)
        return leaders, followers

    def _readable(self, row: Row, held: Sequence[Prefix]) -> bool:
        """Whether the pictures that are still to be seen can be; else the row has its error."""
        found = self._find(row.prompt, held)
        try:
            self._pictures.check(row.prompt.needed(found[1] if found else 0))
        except ValueError as error:
            row.error = error
        return row.error is None

    def _begin(self, rows: list[Row]) -> None:
        """Prompts of which nothing is known: computed whole, padded on the right, where causal attention sees none of it."""
        parts = [row.prompt.ids for row in rows]
        output = self._language(inputs_embeds=self._embed(rows, parts), use_cache=True)
        ends = [len(part) - 1 for part in parts]
        for i, row in enumerate(rows):
            layers = [
                (layer.keys[i, :, : ends[i] + 1].clone(), layer.values[i, :, : ends[i] + 1].clone())
                for layer in output.past_key_values.layers
            ]
            row.prefix = Prefix(row.prompt.signature, layers)
            row.shared = len(row.prefix)
            self._prefixes.keep(row.prefix)
        self.rows += rows
        self._say(rows, output.last_hidden_state, ends)

    def _follow(self, rows: list[Row]) -> None:
        """Prompts that go on from a prefix."""
        start = len(self.rows)
        self.rows += rows
        self._extend(rows, start, [row.prompt.ids[row.shared :] for row in rows])

    def _extend(self, rows: list[Row], start: int, parts: list[np.ndarray]) -> None:
        """Compute the next tokens of neighbouring rows, padded on the right, and choose what follows them."""
        embeds = self._embed(rows, parts)
        view = View(self._own, rows, start, embeds.shape[1])
        with shared_prefix_attention(self._language.config):
            output = self._language(
                inputs_embeds=embeds, position_ids=view.positions, use_cache=False, view=view
            )
        self._say(rows, output.last_hidden_state, [len(part) - 1 for part in parts])
        for place, (row, part) in enumerate(zip(rows, parts, strict=True), start):
            row.length += len(part)  # last: a pass that failed may be tried again
            if row.error is not None:
                self._own.clear(place)

    def _embed(self, rows: list[Row], parts: list[np.ndarray]) -> torch.Tensor:
        """[row, token, hidden] of the last tokens of each prompt, or of new ones; pictures among them put in."""
        image = self._model.config.image_token_id
        ids = np.zeros((len(rows), max(map(len, parts))), dtype=np.int64)
        for i, part in enumerate(parts):
            ids[i, : len(part)] = part
        token_ids = torch.from_numpy(ids).to(self._model.device)
        embeds = self._model.get_input_embeddings()(token_ids)
        needed = [
            keyed
            for row, part in zip(rows, parts, strict=True)
            if image in part
            for keyed in row.prompt.needed(row.shared)
        ]
        if needed:
            embeds[token_ids == image] = self._pictures.features(needed).to(embeds.dtype)
        return embeds

    # -- answers --------------------------------------------------------------------------------------------------

    def _say(self, rows: list[Row], hidden: torch.Tensor, ends: list[int]) -> None:
        """Choose each row's next token from its hidden state at `ends`."""
        last = hidden[torch.arange(len(rows)), torch.tensor(ends)]
        scores = self._model.get_output_embeddings()(last).float()
        scores[:, self._silent] = float("-inf")
        for row, token in zip(rows, choose(scores, [row.sampler for row in rows]), strict=True):
            if token is None:
                dtype = str(hidden.dtype).removeprefix("torch.")
                row.error = RuntimeError(
                    f"the model's scores are not numbers ({dtype}); load it in a wider dtype"
                )
            elif token in self._stops:
                row.finished = True
            else:
                row.ids.append(token)

    def _leave(self) -> list[Row]:
        ended = [row for row in self.rows if row.ended]
        for row in ended:
            self.drop(row)
        return ended

    def _whole(self, row: Row, place: int) -> Prefix:
        """Prompt and answer as one prefix, as far as they have been computed."""
        own = self._own.row(place, row.length)
        layers = [
            (
                torch.cat([keys[:, : row.shared], mine[0]], dim=1),
                torch.cat([values[:, : row.shared], mine[1]], dim=1),
            )
            for (keys, values), mine in zip(row.prefix.layers, own, strict=True)
        ]
        signature = np.concatenate([row.prompt.signature, np.array(row.ids, dtype=np.int64)])
        return Prefix(signature[: row.shared + row.length], layers)
