"""How a picture was made, in the text chunks of its PNG, or the EXIF data of its WebP or JPEG.

`zimage` holds everything as JSON. `parameters` is the text that A1111 writes and picture viewers and ComfyUI's import
read. The chunks `prompt` and `workflow` are ComfyUI's, which takes what they hold for the JSON of a graph, so a PNG of
this package has neither.

Source: AUTOMATIC1111/stable-diffusion-webui `modules/infotext_utils.py@v1.10.1` (quotes, the last line), ComfyUI's
frontend `scripts/pnginfo.ts`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "zimage"
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
DESCRIPTION, PROGRAM, DETAILS, COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
"""EXIF tags: of all facts as JSON, of the program, and, among the details, of A1111's text as its own WebP has it."""
SAMPLERS = {"heun": "Heun", "dpmpp_2m": "DPM++ 2M", "res_multistep": "Res Multistep"}
SOFTWARE = f"zimage-int4 {__version__}"


def encoded(picture: Image.Image, facts: Mapping[str, Any], suffix: str) -> bytes:
    """A picture as a file of that suffix, one of FORMATS: PNG and WebP without loss, JPEG of quality 95."""
    if suffix.lower() == ".png":
        return png(picture, facts)
    from PIL import Image

    exif = Image.Exif()
    exif[DESCRIPTION], exif[PROGRAM] = json.dumps(facts), SOFTWARE
    exif.get_ifd(DETAILS)[COMMENT] = b"UNICODE\0" + parameters(facts).encode("utf-16-be")
    file = io.BytesIO()
    options = {"lossless": True} if suffix.lower() == ".webp" else {"quality": 95, "subsampling": 0}
    picture.save(file, format=FORMATS[suffix.lower()], exif=exif, **options)
    return file.getvalue()


def png(picture: Image.Image, facts: Mapping[str, Any]) -> bytes:
    """The PNG of a picture. facts: prompt, seed, negative_prompt and all else that it was made with, JSON's types."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in ((CHUNK, json.dumps(facts)), ("parameters", parameters(facts)), ("Software", SOFTWARE)):
        info.add_text(name, text)
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read(picture: Image.Image) -> dict[str, Any]:
    """The facts in a picture that this package wrote. ValueError if there are none."""
    return parse(text(picture))


def text(picture: Image.Image) -> str:
    """The text in the place where this package writes facts, "None" if there is none."""
    return str(getattr(picture, "text", {}).get(CHUNK) or picture.getexif().get(DESCRIPTION))


def parse(text: str) -> dict[str, Any]:
    """The facts that a text holds as JSON. ValueError if it holds none."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"picture: expected a PNG with a text {CHUNK!r} as `zimage generate` writes it, found none")
    return facts


def parameters(facts: Mapping[str, Any]) -> str:
    """The facts as A1111 writes them: the prompts, and a last line of the numbers."""
    lines = [str(facts.get("prompt", ""))]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    named: dict[str, object] = {
        "Steps": facts.get("steps"),
        "Sampler": SAMPLERS.get(str(facts.get("sampler")), "Euler"),
        "Seed": facts.get("seed"),
    }
    if (guidance := facts.get("guidance")) is not None:
        named["CFG scale"] = guidance + 1
    if "width" in facts and "height" in facts:
        named["Size"] = f"{facts['width']}x{facts['height']}"
    named |= {"Model": facts.get("model"), "Denoising strength": facts.get("strength"), "Version": SOFTWARE}
    pairs = (f"{name}: {_quoted(str(value))}" for name, value in named.items() if value is not None)
    return "\n".join((*lines, ", ".join(pairs)))


def _quoted(text: str) -> str:
    """In quotes where a comma, colon or line end would divide it."""
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
