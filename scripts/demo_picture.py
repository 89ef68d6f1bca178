"""Take the picture of the web demo that the documentation shows.

    python scripts/demo_picture.py --output docs/images/demo.png

Starts the demo with nano, shows it an example scene, asks for a description and photographs the page. Needs the serve
and dev extras and a chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from geochat.data.staged import staged
from geochat.errors import stop

QUESTION = "[grounding] Describe the image in detail."
PATIENCE = 120_000  # milliseconds


def photograph(url: str, chromium: str, output: Path) -> None:
    """Ask about the first example scene and write the page as a picture of few colours."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.locator("#scenes button").first.click()
        status = page.locator("#status input, #status textarea")
        expect(status).to_have_value(re.compile("pixels"), timeout=PATIENCE)
        page.fill("#question textarea", QUESTION)
        page.press("#question textarea", "Enter")
        page.wait_for_selector("#png:not([disabled])")
        page.wait_for_timeout(1000)  # the picture with the boxes is on its way
        with staged(output) as temporary:
            page.screenshot(path=temporary, full_page=True, type="png")
            with Image.open(temporary) as whole:
                whole.convert("RGB").quantize(128).save(temporary, format="PNG", optimize=True)
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.png"))
    arguments = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        stop(ValueError("no chromium on this machine"))
    from geochat.chat.engine import Chat
    from geochat.chat.service import Service
    from geochat.serve.gradio_web_server import NANO, launch

    with tempfile.TemporaryDirectory() as folder:
        service = Service(Chat.load(NANO, device="cpu"))
        blocks = launch(service, Path(folder) / "files", "127.0.0.1", None, None, NANO.name)
        photograph(blocks.local_url, chromium, arguments.output)
        blocks.close(verbose=False)
        service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
