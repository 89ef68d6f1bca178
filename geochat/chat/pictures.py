"""Pictures on their way into the language model: read ahead in threads, seen by the tower once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from geochat.chat.request import Picture, Prompt
from geochat.data.images import open_image
from geochat.model.processor import Processor

Keyed = tuple[str, Picture]
READERS = 2
AHEAD = 8
"""Pictures read before their turn; one takes 3 MB at 504 px."""


class Pictures:
    """Features of pictures by their keys."""

    def __init__(self, model: Any, processor: Processor, limit: int) -> None:
        """`limit`: bytes of features kept between questions."""
        self._model, self._processor, self._limit = model, processor, limit
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._pixels: dict[str, Future[torch.Tensor]] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")

    def read_ahead(self, prompts: Iterable[Prompt]) -> None:
        """Begin to read the pictures of the next prompts, as many as may wait; what else was read is forgotten."""
        wanted: set[str] = set()
        for prompt in prompts:
            wanted |= set(prompt.images)
            self._read(prompt.needed())
            if len(wanted) >= AHEAD:
                break
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key in wanted}

    def check(self, needed: Sequence[Keyed]) -> None:
        """Raises ValueError with the reason when one of these pictures cannot be read."""
        self._read(needed)
        for key, _ in needed:
            if key in self._pixels:
                try:
                    self._pixels[key].result()
                except ValueError:
                    del self._pixels[key]
                    raise

    def features(self, needed: Sequence[Keyed]) -> torch.Tensor:
        """Projected features [token, hidden] of these pictures, one after another; the tower sees only those that it has
        not seen lately."""
        self._read(needed)
        found = {key: self._features[key] for key, _ in needed if key in self._features}
        if missing := list(dict.fromkeys(key for key, _ in needed if key not in found)):
            pixels = torch.stack([self._pixels.pop(key).result() for key in missing])
            pixels = pixels.to(self._model.device, self._model.dtype)
            output = self._model.get_image_features(pixel_values=pixels, return_dict=True)
            found |= dict(zip(missing, output.pooler_output, strict=True))
        self._keep(found)
        return torch.cat([found[key] for key, _ in needed])

    def _read(self, pictures: Sequence[Keyed]) -> None:
        for key, picture in pictures:
            if key not in self._features and key not in self._pixels:
                self._pixels[key] = self._pool.submit(self._open, picture)

    def _open(self, picture: Picture) -> torch.Tensor:
        return self._processor.pixels(open_image(picture))

    def _keep(self, used: dict[str, torch.Tensor]) -> None:
        for key, feature in used.items():
            self._features[key] = feature
            self._features.move_to_end(key)
        kept = sum(feature.nbytes for feature in self._features.values())
        while kept > self._limit:
            kept -= self._features.popitem(last=False)[1].nbytes
