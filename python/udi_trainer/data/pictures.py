"""Reads pictures as 8-bit ones: transparent, deep and animated files too."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from .cache import Unreadable

GROUND = (128, 128, 128, 255)  # behind transparent pictures: on gray, neither black nor white drawings vanish

Still = tuple[Path, int]  # a file, and which of its pictures
Range = tuple[float, float]  # the values that become black and white


def import_pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise UserError('images need Pillow: pip install -e ".[data]"') from None
    return PIL


def open_image(path: Path, page: int = 0) -> Any:
    """Opens an image. Pillow reads the header now and the pixels when they are needed."""
    try:
        image = import_pillow().Image.open(path)
        if page:
            image.seek(page)
        return image
    except Exception as error:
        raise Unreadable(f"{path}: not a readable image ({first_line(error)})") from None


def pages(image: Any) -> int:
    """How many pictures the file holds: frames of a GIF, pages of a TIFF; previews in a camera's JPEG do not count."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def is_deep(image: Any) -> bool:
    """Whether the pixels are integers of more than 8 bits, or floats."""
    return image.mode.startswith(("I", "F"))


def loses_bits(image: Any) -> bool:
    """Whether Pillow reads the upper 8 bits only: of colors in 16 bits, and of transparent pictures in 16 bits."""
    return not is_deep(image) and any(";16" in str(tile[3]) for tile in image.tile)


def is_gray(image: Any) -> bool:
    return image.mode in ("1", "L", "LA") or is_deep(image)


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Unreadable(f"{path}: a damaged image ({first_line(error)})") from None


def values(image: Any) -> np.ndarray:
    """The pixels of a deep image."""
    x = np.asarray(image, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("NaN or inf")
    return x


def extremes(still: Still) -> Range:
    """The lowest and the highest value of a deep image."""
    with damaged(still[0]):
        x = values(open_image(*still))
        return float(x.min()), float(x.max())


def eight_bits(still: Still, limits: Range, mode: str) -> Any:
    """The picture upright, in mode L or RGB. Values of deep ones are scaled from ``limits`` and clipped."""
    pillow, image = import_pillow(), open_image(*still)
    with damaged(still[0]):
        image = pillow.ImageOps.exif_transpose(image)
        if is_deep(image):
            low, high = limits
            x = (values(image) - low) * (255 / (high - low))
            image = pillow.Image.fromarray(x.clip(0, 255).round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = pillow.Image.alpha_composite(pillow.Image.new("RGBA", image.size, GROUND), image)
        return image.convert(mode)
