"""Images are canonicalised once, here; rollout, reference, learner and judge all get the same pixels."""

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from cluster.errors import DataError

MIN_SIDE = 4
MAX_ASPECT = 50
MAX_SIDE = 2048
MAX_PIXELS = 120_000_000
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CanonicalImage:
    """An upright RGB picture without transparency, at most `MAX_SIDE` on its longer side, stored as PNG."""

    png: bytes
    digest: str
    """SHA-256 of size and pixels, in hex."""
    width: int
    height: int

    @property
    def url(self) -> str:
        """As a data URL, which chat APIs take."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGB")


def canonicalise(source: Image.Image | bytes | Path, where: str) -> CanonicalImage:
    """Turn an image by its EXIF orientation, put transparency on white, convert to RGB and bound its size.

    vLLM's loader does the first two and transformers' processors do neither, so the same file would give the
    sampler and the trainer different pixels. `where` names the image in error messages.

    Raises:
        DataError: the file is missing, not an image, truncated, too large to decode, or under `MIN_SIDE` pixels.
    """
    image = source if isinstance(source, Image.Image) else _decode(source, where)
    image = ImageOps.exif_transpose(image)
    image = _flatten(image)
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(
            f"{where}: the image is {image.width}x{image.height}, but each side must be {MIN_SIDE} px or more, and "
            f"neither over {MAX_ASPECT} times the other"
        )
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return CanonicalImage(buffer.getvalue(), digest, image.width, image.height)


def _decode(source: bytes | Path, where: str) -> Image.Image:
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(f"{where}: image file {source} does not exist")
        if source.stat().st_size > MAX_BYTES:
            raise DataError(f"{where}: image file {source} is over {MAX_BYTES >> 20} MiB; make it smaller")
        where = f"{where}: {source.name}"
        source = source.read_bytes()
    if len(source) > MAX_BYTES:
        raise DataError(f"{where}: the image is over {MAX_BYTES >> 20} MiB; make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source))
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{where}: the image is {image.width}x{image.height}; at most {MAX_PIXELS:,} pixels are decoded"
                )
            image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: this is no image; replace the file or remove its row") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the image cannot be read ({error}); replace the file or remove its row") from error
    return image


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255 instead of scaling
        return image.convert("F").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
