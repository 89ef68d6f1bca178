"""The same questions to a model behind an OpenAI-compatible server (`transformers serve`, vLLM, SGLang).

Pictures travel as they are, as PNG; the server resizes them and puts the chat template around the turns, with what the
checkpoint's folder says of both.
"""

from __future__ import annotations

import base64
import io
import os
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from json import JSONDecodeError
from threading import Lock
from typing import TYPE_CHECKING, Any

from geochat.chat.request import Picture, Request, picture_key
from geochat.chat.sampling import Settings
from geochat.chat.text import Answer, in_order
from geochat.data.images import open_image
from geochat.data.sample import IMAGE_TOKEN

if TYPE_CHECKING:
    from openai import OpenAI

RETRIES = 6
"""Of a request that meets a busy or failing server; the client waits longer each time, or as long as the server says."""
KEPT_PICTURES = 64


class RemoteChat:
    """A model on a server, asked as `Chat` is."""

    def __init__(
        self,
        endpoint: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        seconds: float = 300.0,
        retries: int = RETRIES,
    ) -> None:
        """
        Args:
            endpoint: address of the API, such as http://localhost:8000/v1.
            model: its name there; default: the one that the server lists.
            api_key: default: the environment's OPENAI_API_KEY, or none.
            seconds: time for one answer.
            retries: how often a request is sent again when the server is busy or fails.

        Raises ValueError when the server cannot be reached or lists no one model.
        """
        self.endpoint = endpoint
        self._client = _client(endpoint, api_key, seconds, retries)
        self.model = model or self._only_model()
        """Name of the model."""
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int = 16,
    ) -> list[Answer]:
        """As `Chat.answer`; `batch_size` requests are under way at a time. An answer has no `token_ids`."""
        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
        return in_order(self.results(requests, batch_size=batch_size, **settings))

    def answer_each(
        self, requests: Sequence[Request], *, batch_size: int = 16, **settings: Any
    ) -> list[Answer | ValueError]:
        """As `answer`, but a request that the server refuses or fails on gives its error and does not stop the others.

        Raises ConnectionError when the server is gone, or knows neither model nor key.
        """
        return [result for _, result in self.results(requests, batch_size=batch_size, **settings)]

    def results(
        self, requests: Sequence[Request], *, batch_size: int = 16, **settings: Any
    ) -> Generator[tuple[int, Answer | ValueError], None, None]:
        """As `answer_each`, each with the index of its request, as they come."""
        chosen = Settings(**settings)
        pool = ThreadPoolExecutor(batch_size)
        try:
            yield from enumerate(
                pool.map(lambda request, i: self._result(request, chosen, i), requests, count())
            )
        finally:
            pool.shutdown(cancel_futures=True)

    def stream(
        self,
        request: Request,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """As `Chat.stream`: pieces without the white space around the answer. Closing the iterator ends the request."""
        settings = Settings(max_new_tokens, temperature, top_p, seed)
        held = ""  # white space that may be the end
        begun = finished = False
        with self._errors(), self._create(request, settings, stream=True) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    finished = finished or choice.finish_reason is not None
                    text = held + (choice.delta.content or "")
                    if not begun:
                        text = text.lstrip()
                    piece = text.rstrip()
                    held = text[len(piece) :]
                    if piece:
                        begun = True
                        yield piece
        if not finished:
            raise ValueError(f"{self.endpoint}: the answer broke off")

    # -- one request ----------------------------------------------------------------------------------------------

    def _result(self, request: Request, settings: Settings, index: int) -> Answer | ValueError:
        try:
            with self._errors():
                choice = self._create(request, settings, index).choices[0]
        except ValueError as error:
            return error
        return Answer((choice.message.content or "").strip(), (), choice.finish_reason == "stop")

    def _create(self, request: Request, settings: Settings, index: int = 0, **options: Any) -> Any:
        request.check()
        if settings.temperature:
            options["top_p"] = settings.top_p
            if settings.seed is not None:
                options["seed"] = settings.seed + index
        return self._client.chat.completions.create(
            model=self.model,
            messages=self._messages(request),
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            **options,
        )

    def _messages(self, request: Request) -> Any:
        pictures = iter(request.images)
        messages = []
        for turn in request.turns:
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": self._url(next(pictures))}}
                for _ in range(turn.text.count(IMAGE_TOKEN))
            ]
            text = turn.text.replace(f"{IMAGE_TOKEN}\n", "")
            messages.append(
                {"role": turn.role, "content": [*parts, {"type": "text", "text": text}] if parts else text}
            )
        return messages

    def _url(self, picture: Picture) -> str:
        """The picture as a data URL. The latest are kept: many questions are about one picture."""
        key = picture_key(picture)
        with self._lock:
            url = self._urls.get(key)
        if url is None:
            content = io.BytesIO()
            open_image(picture).save(content, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        with self._lock:
            self._urls[key] = url
            self._urls.move_to_end(key)
            while len(self._urls) > KEPT_PICTURES:
                self._urls.popitem(last=False)
        return url

    # -- the server -----------------------------------------------------------------------------------------------

    def _only_model(self) -> str:
        try:
            with self._errors():
                names = [model.id for model in self._client.models.list()]
        except ConnectionError as error:
            raise ValueError(str(error)) from None
        if len(names) != 1:
            some = ", ".join(names[:5]) or "none"
            raise ValueError(
                f"{self.endpoint}: say which model with --endpoint-model; the server lists {some}"
            )
        return names[0]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors as one line: ValueError for this request's own, ConnectionError where no other request would
        fare better."""
        import openai

        try:
            yield
        except openai.APITimeoutError:
            raise ValueError(f"{self.endpoint}: no answer in time") from None
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"{self.endpoint}: cannot be reached ({error.__cause__ or error})"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConnectionError(f"{self.endpoint}: {error}") from None
        except (openai.OpenAIError, JSONDecodeError) as error:
            raise ValueError(f"{self.endpoint}: {error}") from None


def _client(endpoint: str, api_key: str | None, seconds: float, retries: int) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError:
        raise ValueError("an --endpoint needs the package openai: pip install 'geochat[serve]'") from None
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"{endpoint}: not an address of the form http://host:port/v1")
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=endpoint, api_key=key, timeout=seconds, max_retries=retries)
