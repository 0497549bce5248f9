"""Made-up pictures of two classes, for a first try without a data set: rings and crosses, and nothing else to tell them by."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cross", "ring")


def draw_folder(folder: Path, per_class: int, seed: int) -> None:
    """Write `per_class` JPEG files for each class into folder/cross and folder/ring; the same ones for the same seed."""
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            draw(name, random).save(folder / name / f"{number:04}.jpg", quality=85)


def draw(name: str, random: np.random.Generator) -> Image.Image:
    """A cross or a ring of equal area, so that brightness says nothing; size, place, tilt, contrast and noise are random."""
    width, height = random.integers(140, 220, 2)
    ground, ink = random.permutation([random.uniform(20, 100), random.uniform(140, 250)])
    radius = min(width, height) * random.uniform(0.26, 0.40)
    x, y = np.array([width, height]) * random.uniform(0.33, 0.67, 2)
    image = Image.new("L", (int(width), int(height)), int(ground))
    pencil = ImageDraw.Draw(image)
    stroke = radius * 0.4
    if name == "ring":
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), outline=int(ink), width=int(stroke))
    else:
        # Two bars, `reach` to either side of the middle, with the area of the ring; they share a square of stroke x stroke.
        area = math.pi * (radius**2 - (radius - stroke) ** 2)
        reach = (area / stroke + stroke) / 4
        tilt = random.uniform(0, math.pi / 2)
        for angle in (tilt, tilt + math.pi / 2):
            dx, dy = reach * math.cos(angle), reach * math.sin(angle)
            pencil.line((x - dx, y - dy, x + dx, y + dy), fill=int(ink), width=int(stroke))
    noisy = np.asarray(image) + random.normal(0, 30, (int(height), int(width)))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
