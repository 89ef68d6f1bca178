"""Where the command line's pictures come from: a file, an address on the web, folders and lists."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from geochat.data.images import FORMATS, open_image
from geochat.data.staged import staged

MAX_BYTES = 64 * 2**20
"""An address may give this much and no more."""
SECONDS = 30.0
"""Time for the whole of a download."""


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def open_picture(source: str) -> Image.Image:
    """RGB picture of a file or an http(s) address. ValueError names it and the reason."""
    return open_image(fetch(source)) if is_url(source) else open_image(source)


def fetch(url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> io.BytesIO:
    """Content of an address, bounded in size and time. ValueError names the address and the reason."""
    deadline = time.monotonic() + seconds
    quoted = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")
    request = urllib.request.Request(quoted, headers={"User-Agent": "geochat"})
    content = io.BytesIO()
    content.name = url  # what open_image calls it in its errors
    try:
        with _web().open(request, timeout=seconds) as response:
            while piece := response.read1(2**16):
                content.write(piece)
                if content.tell() > max_bytes:
                    raise ValueError(f"{url}: larger than {max_bytes / 2**20:.0f} MB")
                if time.monotonic() > deadline:
                    raise ValueError(f"{url}: not complete after {seconds:.0f} s")
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: cannot be reached ({error.reason})") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if str(error).startswith(url):
            raise
        raise ValueError(f"{url}: cannot be read ({error})") from None
    content.seek(0)
    return content


def _web() -> urllib.request.OpenerDirector:
    """What follows http and https only: no redirect leads to a file or to another scheme."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def gather(sources: Sequence[Path]) -> list[Path]:
    """Pictures of folders (by name), of lists (.txt, a path on each line, from the list's folder on) and single files.

    Files need not exist. Raises ValueError for a folder or a list without pictures, and for two of one name.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += pictures_in(source)
        elif source.suffix == ".txt":
            found += _listed(source)
        else:
            found.append(source)
    first: dict[str, Path] = {}
    for file in found:
        if first.setdefault(file.name, file) != file:
            raise ValueError(
                f"{file}: {first[file.name]} has the same name; ask about them one after another"
            )
    return list(first.values())


def _listed(source: Path) -> list[Path]:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not a readable list of pictures ({error})") from None
    found = [source.parent / line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{source}: no pictures in this list")
    return found


def pictures_in(folder: Path) -> list[Path]:
    """Files of a folder whose names end like a picture's, by name. ValueError when there is none."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in known and not p.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: no pictures in this folder")
    return found


def check_writable(path: Path) -> None:
    """ValueError when a picture could not be saved under this name."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: the name must end in .png, .jpg or another picture format")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.absolute().parent}")


def save_picture(image: Image.Image, path: Path) -> None:
    """Raises ValueError when it cannot be written."""
    try:
        with staged(path) as temporary:
            image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None
