"""PIL pictures for a generation that starts from one: sizes, masks, soft edges, borders to fill in, outlines.

A mask is white where a picture is to be repainted. Legend: B batch, H x W pixels, h x w the latents' cells.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .failures import integer
from .formats.safetensors import check_file
from .models.transformer import PIXELS_PER_CELL
from .sizes import MAX_SIDE, MULTIPLE

FILE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow raises for damaged files."""
ORIENTATION = 0x0112  # in EXIF data
MODES = ("L", "LA", "RGB", "RGBA")
FEATHER = 8  # pixels, by default

logger = logging.getLogger(__name__)


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture file, opened. ValueError for one that is none of `FILE_FORMATS`, is damaged, or is far too large."""
    check_file(path)
    try:
        with Image.open(path, formats=FILE_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        expected = f"a picture ({', '.join(FILE_FORMATS)})"
        raise ValueError(f"{path}: expected {expected}, found another file; save it as PNG") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; make it smaller first") from None
    except BROKEN as error:
        raise ValueError(f"{path}: expected a whole picture, found a damaged one ({error}); get it again") from None


def read_image(path: str | Path) -> Image.Image:
    """The picture of a file, `upright`; of an animation the first one. ValueError as `open_picture`."""
    with open_picture(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            logger.warning("%s: holds several pictures; the first is used", path)
        image.load()
        return upright(image)


def file_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `read_image` would give, from the file's header."""
    with open_picture(path) as image:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data say, in one of `MODES`; gray of more than 8 bits becomes 8-bit gray."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(turned, dtype=np.float64))
        largest = values.max(initial=0)
        if turned.mode == "F" and largest <= 1:
            values = values * 255
        elif turned.mode.startswith("I;16") or largest > 255:
            values = values / 257  # 65535 is white
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if turned.mode in MODES and "transparency" not in turned.info:
        return turned.copy()
    return turned.convert("RGBA" if turned.has_transparency_data else "RGB")


def checked_picture(name: str, image: object) -> Image.Image | None:
    """A picture, upright, or None; ValueError, under its name, for anything else."""
    if image is not None and not isinstance(image, Image.Image):
        raise ValueError(f"{name}: expected a PIL image, found {type(image).__name__}; open a file with PIL.Image.open")
    return None if image is None else upright(image)


def checked_pictures(name: str, images: object) -> list[Image.Image]:
    """One picture, several or None as a list, upright. ValueError, under its name, for anything else."""
    given = images if isinstance(images, list | tuple) else [images]
    return [found for image in given if (found := checked_picture(name, image)) is not None]


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright picture in RGB, on white where it is transparent."""
    image = upright(image)
    if image.mode not in ("RGBA", "LA"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB, resized to cover width x height and cropped in the middle."""
    return ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) fp32 in -1..1 of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def control_picture(image: Image.Image, width: int, height: int) -> Image.Image:
    """A control picture in RGB at a size: stretched to it, as the trainer's code does, which is logged."""
    if image.size != (width, height):
        logger.info("control picture: resized from %d x %d to %d x %d", *image.size, width, height)
    return to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)


def check_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """A mask in gray (mode L). ValueError for colours, transparency, another size than the picture's, or all black."""
    if mask.size != image.size:
        found = "{} x {}".format(*mask.size)
        raise ValueError(f"mask: expected the picture's size {image.size[0]} x {image.size[1]}, found {found}")
    if "A" in mask.getbands() and np.asarray(mask.getchannel("A")).min() < 255:
        raise ValueError("mask: expected black and white without transparency; save it without an alpha channel")
    bands = np.asarray(mask.convert("RGB"), dtype=np.int16)
    if np.ptp(bands, axis=2).max() > 8:  # more than JPEG leaves of a gray
        raise ValueError("mask: expected black and white, found colours; white is what is repainted")
    gray = Image.fromarray(bands[..., 0].astype(np.uint8))
    if not gray.getbbox():
        raise ValueError("mask: it is black everywhere, so nothing would be repainted; white is what is repainted")
    return gray


def mask_tensor(mask: Image.Image) -> Tensor:
    """(1, 1, H, W) fp32 in 0..1 of a gray picture."""
    return torch.from_numpy(np.array(mask))[None, None] / 255


def soften(mask: Tensor, feather: int) -> Tensor:
    """A mask (B, 1, H, W) with an edge that falls from 1 to 0 within 2 `feather` pixels outside of it; 0 beyond."""
    if feather < 1:
        return mask
    side = 2 * feather + 1
    grown = F.max_pool2d(F.max_pool2d(mask, (side, 1), 1, (feather, 0)), (1, side), 1, (0, feather))
    for kernel, padding in (((side, 1), (feather, 0)), ((1, side), (0, feather))):
        grown = F.avg_pool2d(grown, kernel, 1, padding, count_include_pad=False)
    return torch.where(mask >= 1, mask, grown.clamp(max=1))


def repainted_cells(mask: Tensor) -> Tensor:
    """(B, 1, h, w) of 0 and 1: the latents' cells in which a mask (B, 1, H, W) has anything above 0."""
    return (F.max_pool2d(mask, PIXELS_PER_CELL) > 0).to(mask.dtype)


def composite(generated: Image.Image, source: Image.Image, mask: Tensor) -> Image.Image:
    """The generated picture where the mask (1, 1, H, W) is 1, the source where it is 0, bit for bit."""
    weights = Image.fromarray((mask[0, 0] * 255).round().to(torch.uint8).numpy())
    return Image.composite(generated, source, weights)


def pad(image: Image.Image, left: int, top: int, right: int, bottom: int) -> tuple[Image.Image, Image.Image]:
    """A picture with borders to fill in, and the mask of them; until then they repeat the picture's edge.

    ValueError for negative borders, none at all, or sides that do not become multiples of 16 pixels.
    """
    borders = {"left": left, "top": top, "right": right, "bottom": bottom}
    if any(not 0 <= integer("pad", border) <= MAX_SIDE for border in borders.values()) or not any(borders.values()):
        raise ValueError(
            f"pad: expected borders of 0 pixels or more, one at least, and up to {MAX_SIDE}, found {borders}"
        )
    width, height = image.width + left + right, image.height + top + bottom
    for name, side in (("width", width), ("height", height)):
        if side % MULTIPLE:
            raise ValueError(
                f"pad: with its borders the picture is {width} x {height}, expected a {name} that is a multiple of "
                f"{MULTIPLE}; add {-side % MULTIPLE} more or {side % MULTIPLE} fewer pixels"
            )
    pixels = np.asarray(to_rgb(image))
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), around, constant_values=255)
    return Image.fromarray(np.pad(pixels, (*around, (0, 0)), mode="edge")), Image.fromarray(mask)


def canny(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """A picture's outlines, white on black, as the ControlNets were trained on; needs OpenCV.

    high: the gradient at which an edge starts, low: down to which it continues. ValueError without OpenCV, or unless
    0 <= low <= high.
    """
    try:
        import cv2
    except ImportError:
        raise ValueError("outlines need OpenCV: pip install opencv-python-headless") from None
    if not 0 <= low <= high:
        raise ValueError(f"canny: expected 0 <= low <= high, found {low} and {high}; 100 and 200 are usual")
    return Image.fromarray(cv2.Canny(np.array(to_rgb(image)), low, high)).convert("RGB")
