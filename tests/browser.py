"""A page as a real browser shows it: Chromium without a window (Debian's package `chromium`)."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def shown(page: Path, picture: Path, width: int, height: int) -> str:
    """Show `page` in a window of this size; its picture is written, and its elements returned as HTML.

    Skips the test where there is no browser.
    """
    browser = next((found for found in map(shutil.which, NAMES) if found), None)
    if browser is None:
        pytest.skip("no browser here: apt-get install --no-install-recommends chromium")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={picture.parent / 'browser'}", f"--window-size={width},{height}"]
    command += [f"--screenshot={picture}", "--dump-dom", page.as_uri()]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120, check=True
    ).stdout.decode()


def pixels(picture: Path) -> Counter[str]:
    """How many pixels of a picture have each colour, as `#rrggbb`."""
    from PIL import Image  # comes with tensorboard

    image = Image.open(picture).convert("RGB")
    found = image.getcolors(image.width * image.height)
    return Counter({"#{:02x}{:02x}{:02x}".format(*colour): count for count, colour in found})
