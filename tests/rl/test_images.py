"""Canonical images: every odd file becomes the same kind of picture, or a clear error."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError
from rl import images
from rl.images import MAX_SIDE, canonicalise


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def mean_colour(content: bytes | Image.Image) -> list[float]:
    return np.asarray(canonicalise(content, "x").open(), dtype=float).mean(axis=(0, 1)).round(1).tolist()


def test_transparency_is_laid_on_white() -> None:
    assert mean_colour(encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 128)))) == [227.0, 127.0, 127.0]
    assert mean_colour(encoded(Image.new("LA", (8, 8), (0, 0)))) == [255.0, 255.0, 255.0]


def test_palette_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0] * 256)
    assert mean_colour(encoded(image, transparency=0)) == [255.0, 255.0, 255.0]
    assert mean_colour(encoded(image)) == [255.0, 0.0, 0.0]


def test_exif_orientation_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = canonicalise(encoded(Image.new("RGB", (40, 80)), "JPEG", exif=exif), "x")
    assert (turned.width, turned.height) == (80, 40)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    assert mean_colour(encoded(image)) == [155.0, 155.0, 155.0]


def test_a_picture_of_ten_thousand_pixels_is_made_smaller() -> None:
    canonical = canonicalise(encoded(Image.new("1", (10_000, 5_000))), "x")
    assert (canonical.width, canonical.height) == (MAX_SIDE, MAX_SIDE // 2)


def test_canonicalising_twice_changes_nothing() -> None:
    once = canonicalise(encoded(Image.effect_noise((20, 30), 50).convert("RGBA")), "x")
    assert canonicalise(once.png, "x") == once


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "this is no image"),
        (b"<html>not found</html>", "this is no image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:500], "cannot be read"),
        (encoded(Image.new("RGB", (3, 300))), "each side must be 4 px or more"),
        (encoded(Image.new("1", (20_000, 20_000))), "pixels"),
    ],
)
def test_a_bad_image_is_refused_by_its_place(content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=f"row 7: .*{says}"):
        canonicalise(content, "row 7")


@pytest.mark.parametrize("size", [(3, 200), (4, 201), (1000, 10)])
def test_a_sliver_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="each side must be 4 px or more, and neither over 50 times the other"):
        canonicalise(Image.new("RGB", size), "row 3")


def test_bytes_are_measured_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="row 3: the image is over 1 MiB"):
        canonicalise(bytes((1 << 20) + 1), "row 3")


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: image file .*nothing\.png does not exist"):
        canonicalise(tmp_path / "nothing.png", "row 2")
