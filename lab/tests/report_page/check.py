"""What is wrong with a page that was measured."""

import json
from pathlib import Path

REFERENCE = Path(__file__).with_name("reference.json")
WIDTHS = (390, 1280)
SETTINGS = [(width, dark) for width in WIDTHS for dark in (False, True)]

PIXELS = 3  # by which a landmark may be elsewhere
CONTRAST = 4.5  # WCAG 2, level AA
TEXT = 8  # pixels, in pictures


def read_reference():
    """Boxes of the landmarks, x, y, width and height, by name, by width of the screen."""
    return {int(width): boxes for width, boxes in json.loads(REFERENCE.read_text()).items()}


def write_reference(boxes):
    lines = [
        f'"{width}": {{\n'
        + ",\n".join(f'  "{name}": {box}' for name, box in boxes[width].items())
        + "\n}"
        for width in WIDTHS
    ]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def complaints(seen, boxes):
    """One line for each thing that is not as it should be; none for a page in order.

    Args:
        seen: From `browser.measure`.
        boxes: Where the landmarks should be.
    """
    found = []
    if seen["content"] > seen["width"]:
        found.append(f"{seen['content']} pixels wide on a screen of {seen['width']}")
    if seen["smallest"] < TEXT:
        found.append(f"text of {seen['smallest']:.1f} pixels in a picture, expected {TEXT}")
    found += [f"{name}: no text" for name, text in seen["alternatives"].items() if not text]
    found += [
        f"{text!r}: contrast of {contrast:.1f}, expected {CONTRAST}"
        for text, contrast in seen["contrasts"]
        if contrast < CONTRAST
    ]
    return found + moved(seen["landmarks"], boxes)


def moved(landmarks, boxes):
    """One line for each landmark that is new, gone or elsewhere."""
    return [
        f"{name}: at {landmarks.get(name)}, expected {boxes.get(name)}"
        for name in boxes | landmarks
        if not _near(landmarks.get(name), boxes.get(name))
    ]


def _near(one, other):
    if one is None or other is None:
        return False
    return all(abs(a - b) <= PIXELS for a, b in zip(one, other, strict=True))
