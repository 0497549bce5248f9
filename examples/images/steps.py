"""What happens to the images on the executors: bytes to pixels, pixels to their variants. numpy, scipy and Pillow; no Spark."""

import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps
from scipy import ndimage

SIDE = 128
LARGEST_ANGLE = 20.0  # degrees
READ_COLUMNS = "name string, class string, subset string, features array<float>, problem string"
VARIANT_COLUMNS = "features array<float>, label int"

# A picture of SIDE x SIDE pixels, float32, from 0 (black) to 1 (white).
Pixels = np.ndarray[Any, np.dtype[np.float32]]


def read_image(content: bytes) -> Pixels:
    """An image file of any size and mode as a grey, denoised picture."""
    with Image.open(io.BytesIO(content)) as file:
        image = ImageOps.exif_transpose(file)  # a camera says beside the pixels which side is up
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, image.convert("RGBA"))  # what is transparent has no colour of its own
    grey = opaque.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return ndimage.gaussian_filter(np.asarray(grey, np.float32) / 255, sigma=1.0)


def variants(pixels: Pixels, name: str, copies: int, seed: int) -> Iterator[Pixels]:
    """The picture itself, then `copies` of it, flipped or not and turned: the same ones for the same name and seed."""
    yield pixels
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for _ in range(copies):
        flipped = pixels[:, ::-1] if random.random() < 0.5 else pixels
        angle = random.uniform(-LARGEST_ANGLE, LARGEST_ANGLE)
        yield ndimage.rotate(flipped, angle, reshape=False, order=1, mode="nearest")


def read_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Image files to READ_COLUMNS. One that cannot be read has a problem instead of features."""
    for batch in batches:
        read = [_features_or_problem(content.as_py()) for content in batch["content"]]
        yield pa.RecordBatch.from_pydict(
            {
                **{column: batch[column] for column in ("name", "class", "subset")},
                "features": pa.array([features for features, _ in read], pa.list_(pa.float32())),
                "problem": pa.array([problem for _, problem in read], pa.string()),
            }
        )


def variant_batches(batches: Iterator[pa.RecordBatch], copies: int, seed: int) -> Iterator[pa.RecordBatch]:
    """Rows with name, features and label to VARIANT_COLUMNS, 1 + copies of them for each."""
    for batch in batches:
        pictures = batch["features"].flatten().to_numpy().reshape(-1, SIDE, SIDE)
        names = batch["name"].to_pylist()
        rows = [
            variant.ravel()
            for picture, name in zip(pictures, names, strict=True)
            for variant in variants(picture, name, copies, seed)
        ]
        yield pa.RecordBatch.from_pydict(
            {
                "features": pa.array(rows, pa.list_(pa.float32())),
                "label": pa.array(np.repeat(batch["label"].to_numpy(), 1 + copies), pa.int32()),
            }
        )


def _features_or_problem(content: bytes) -> tuple[Pixels | None, str | None]:
    try:
        return read_image(content).ravel(), None
    except Exception as error:  # noqa: BLE001 - a broken file raises whatever the parser of its format stumbles over
        return None, f"{type(error).__name__}: {error}"
