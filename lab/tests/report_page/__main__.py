"""Compare the page of `tdlrt report` with the reference.

Where something is wrong, pictures of the page as it was when the reference was written, of the page
as it is, and of what differs go to build/report_page.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from report_page.browser import BROWSER, measure, photograph
from report_page.check import (
    REFERENCE,
    SETTINGS,
    complaints,
    read_reference,
    write_reference,
)
from report_page.runs import write_full_sweep

ROOT = Path(__file__).parents[3]
OUT = ROOT / "build" / "report_page"
WRITE = "import sys; from tdlrt_lab.reports.write import write_report; write_report({!r})"


def main(update):
    if BROWSER is None:
        sys.exit("error: no Chromium on the PATH")
    reference, boxes, failed = read_reference(), {}, False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sweep").mkdir()
        write_full_sweep(folder / "sweep")
        after, before = _page(folder, ROOT, "after"), None
        for width, dark in SETTINGS:
            name = f"{width}-{'dark' if dark else 'light'}"
            seen = measure(after, width, dark)
            boxes[width] = seen["landmarks"]
            found = complaints(seen, reference[width])
            print("\n  ".join([f"{name}: {len(found)} wrong", *found]))
            if found:
                failed = True
                before = before or _page_of_the_reference(folder)
                _draw(name, before, after, width, dark)
    if update:
        write_reference(boxes)
    return failed and not update


def _page(folder, source, name):
    """The page as the code below `source` writes it."""
    command = [sys.executable, "-c", WRITE.format(str(folder / "sweep"))]
    path = os.pathsep.join(str(source / name) for name in ("src", "lab/src"))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return (folder / "sweep" / "report" / "index.html").rename(folder / f"{name}.html")


def _page_of_the_reference(folder):
    """The page as it was at the commit that wrote the reference."""
    git = ["git", "-C", str(ROOT)]
    log = [*git, "log", "-1", "--format=%H", "--", str(REFERENCE)]
    revision = subprocess.run(log, check=True, capture_output=True, text=True).stdout.strip()
    archive = [*git, "archive", "--output", str(folder / "source.tar"), revision, "src", "lab/src"]
    subprocess.run(archive, check=True)
    shutil.unpack_archive(folder / "source.tar", folder / "source")
    return _page(folder, folder / "source", "before")


def _draw(name, before, after, width, dark):
    OUT.mkdir(parents=True, exist_ok=True)
    pictures = []
    for word, page in (("before", before), ("after", after)):
        path = OUT / f"{name}-{word}.png"
        photograph(page, width, dark, path)
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    height = max(picture.height for picture in pictures)
    # Beyond the end of a picture everything is black.
    one, other = (picture.crop((0, 0, width, height)) for picture in pictures)
    ImageChops.difference(one, other).save(OUT / f"{name}-difference.png")
    print(f"  see {OUT.relative_to(ROOT)}/{name}-*.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m report_page", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the reference anew")
    sys.exit(main(parser.parse_args().update))
