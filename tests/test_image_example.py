"""The image example: its steps alone, then the whole, and what it says where it cannot work."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

EXAMPLE = Path(__file__).parents[1] / "examples" / "images"


def load(name: str) -> ModuleType:
    """A file of the example; they find each other by the folder of the script, which is on no path here."""
    spec = importlib.util.spec_from_file_location(f"image_example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps = load("steps")
synthetic = load("synthetic")


def picture(mode: str, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """From black on the left to white on the right."""
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1))
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    return Image.fromarray(ramp.astype(np.uint8)).convert("RGB").convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG")]
    + [(mode, "PNG") for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("P", "GIF"), ("RGB", "BMP"), ("I;16", "TIFF")],
)
def test_images_of_every_mode_become_the_same_grey_picture(mode: str, kind: str) -> None:
    pixels = steps.read_image(file_of(picture(mode), kind))
    assert pixels.shape == (128, 128)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[64, 4:-4], np.linspace(0, 1, 128)[4:-4], atol=0.06)


def test_what_is_transparent_is_white() -> None:
    assert steps.read_image(file_of(Image.new("RGBA", (9, 9), (0, 0, 0, 0)))).min() == 1
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([0, 0, 0])
    assert steps.read_image(file_of(palette, transparency=0)).min() == 1


def test_an_image_stands_upright_as_its_camera_noted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = steps.read_image(file_of(picture("RGB"), "JPEG", exif=exif))
    np.testing.assert_allclose(turned, steps.read_image(file_of(picture("RGB"), "JPEG"))[::-1, ::-1], atol=0.03)


def test_denoising_removes_most_of_the_noise() -> None:
    noise = np.random.default_rng(0).normal(128, 30, (128, 128)).clip(0, 255).astype(np.uint8)
    assert steps.read_image(file_of(Image.fromarray(noise))).std() < 0.4 * (noise / 255).std()


def test_variants_depend_on_name_and_seed_alone_and_begin_with_the_picture_itself() -> None:
    pixels = steps.read_image(file_of(synthetic.draw("cross", np.random.default_rng(0)), "JPEG"))

    def variants(name: str, seed: int) -> np.ndarray:
        return np.stack(list(steps.variants(pixels, name, 5, seed)))

    first = variants("cross/0.jpg", 1)
    assert first.shape == (6, 128, 128)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(first[0], pixels)
    np.testing.assert_array_equal(first, variants("cross/0.jpg", 1))
    assert all((first[i] != first[j]).any() for i in range(6) for j in range(i))
    assert (first[1:] != variants("cross/1.jpg", 1)[1:]).any(axis=(1, 2)).all()
    assert (first[1:] != variants("cross/0.jpg", 2)[1:]).any(axis=(1, 2)).all()


def test_a_file_that_is_no_image_becomes_a_problem_that_says_why() -> None:
    whole = file_of(picture("RGB"), "JPEG")
    for content in (b"", b"GIF89a", b"no image", whole[: len(whole) // 2]):
        features, problem = steps._features_or_problem(content)
        assert features is None
        assert re.match(r"\w+: .+", problem)


def test_mean_brightness_does_not_tell_the_made_up_classes_apart() -> None:
    random = np.random.default_rng(0)
    means = {name: [np.asarray(synthetic.draw(name, random)).mean() for _ in range(200)] for name in synthetic.CLASSES}
    cross, ring = (np.array(means[name]) for name in synthetic.CLASSES)
    ring_is_brighter = (ring[:, None] > cross[None, :]).mean()  # the area under the ROC curve
    assert 0.4 < ring_is_brighter < 0.6


# All in one process: to start Java and to import TensorFlow takes seconds.
SEVERAL_RUNS = """
import json, sys, train

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        train.main()
    except SystemExit as error:
        print("stopped:", error)
    print("end of a run", flush=True)
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run on made-up pictures; and what it printed, and those on folders that cannot be trained on."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    folder = tmp_path_factory.mktemp("images")
    broken = folder / "made-up" / "ring" / "broken one.jpg"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\xff\xd8\xff\xe0 the beginning of a JPEG file")
    for name in ("one/cat", "broken/cat", "broken/dog", "few/cat", "few/dog"):
        (folder / name).mkdir(parents=True)
        file = folder / name / "1.png"
        file.write_bytes(b"no image") if "broken" in name else picture("RGB").save(file)
    runs = [["--epochs", "3"]] + [["--images", str(folder / case[0]), *case[1:]] for case, _ in REFUSED]
    common = ["--master", "local[2]", "--output", str(folder)]
    finished = subprocess.run(
        [sys.executable, "-c", SEVERAL_RUNS, json.dumps([common + run for run in runs])],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished.stdout.split("end of a run\n")[:-1]


@pytest.mark.spark
@pytest.mark.slow
def test_it_learns_the_made_up_pictures_and_leaves_out_what_it_cannot_read(outcome: tuple[Path, list[str]]) -> None:
    folder, (output, *_) = outcome
    assert "training on made-up pictures" in output
    assert "301 image files, of which 1 cannot be read" in output
    assert re.search(r"left out: ring/broken one\.jpg: \w*Error: \w+", output)
    assert "cross: 105 train, 15 validation, 30 test" in output
    # Four variants of each of about 210 images for training, 32 for each of two ranks at a time; none of any other image.
    assert len(re.findall(r"^Epoch \d/3 - 14 steps .* val_accuracy: ", output, re.MULTILINE)) == 3
    found = re.search(r"held-out accuracy ([0-9.]+) on (\d+) images; .* class: ([0-9.]+)", output)
    assert found is not None, output
    accuracy, images, guess = float(found[1]), int(found[2]), float(found[3])
    assert images in (60, 61)
    assert guess < 0.52
    assert accuracy >= 0.75
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as chart:
            assert chart.format == "PNG"
            assert len(chart.convert("L").getcolors()) > 10, f"{name} is empty"
    assert (folder / "model.keras").stat().st_size > 1e6


# Arguments, of which the first is a folder; what is printed, in this order.
REFUSED = [
    (["nowhere"], ["--images .*nowhere: this folder cannot be read", "Path does not exist"]),
    (["one"], ["1 image files, of which 0 cannot be read", "All images are of one class, 'cat'"]),
    (
        ["broken"],
        ["2 image files, of which 2 cannot be read", "left out: dog/1.png", "stopped: No image can be read"],
    ),
    (["few"], ["cat: 0 train, 0 validation, 1 test", "Too few images: none is left for train"]),
    (
        ["few", "--classes", "cat", "cow"],
        [r"stopped: --classes names \['cow'\], but there are only images of \['cat'\]"],
    ),
]


@pytest.mark.spark
@pytest.mark.slow
def test_a_folder_that_cannot_be_trained_on_is_refused_with_the_reason(outcome: tuple[Path, list[str]]) -> None:
    _, (_, *outputs) = outcome
    for (_, patterns), output in zip(REFUSED, outputs, strict=True):
        assert re.search(".*".join(patterns), output, re.DOTALL), output
