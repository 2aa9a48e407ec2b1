"""A page in headless Chromium: measured, and photographed."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlencode

import matplotlib

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FRAME = Path(__file__).with_name("frame.html")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SECONDS = 120


def measure(page, width, dark):
    """What frame.html finds out about a page: a dict."""
    done = _browse(page, width, 1000, dark, "--dump-dom")
    found = re.search("<pre hidden[^>]*>(.+)</pre>", done.stdout)
    if not found:
        raise RuntimeError(f"{BROWSER} measured nothing: {done.stdout[-500:]}{done.stderr[-500:]}")
    return json.loads(html.unescape(found[1]))


def photograph(page, width, dark, path):
    """Store the whole page as a PNG file."""
    from PIL import Image

    height = measure(page, width, dark)["height"]
    _browse(page, width, height, dark, f"--screenshot={path}")
    with Image.open(path) as picture:
        picture.crop((0, 0, width, height)).save(path)


def _browse(page, width, height, dark, what):
    fonts = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}
    query = {name: (FONTS / file).as_uri() for name, file in fonts.items()}
    query |= {"page": Path(page).resolve().as_uri(), "width": width}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        return subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                "--virtual-time-budget=5000",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--user-data-dir={home}",
                f"--window-size={max(width, 500)},{height}",
                what,
                f"{FRAME.as_uri()}?{urlencode(query)}",
            ],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "HOME": home},
        )
