"""The work of the quantizing nodes: writing INT4 files, comparing pictures of several models."""

from __future__ import annotations

import logging
import warnings
from itertools import chain, count
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...zimage_core.compare import side_by_side
from ...zimage_core.quantize import run as core
from ...zimage_core.sizes import GIB
from ...zimage_core.whole import check_name
from . import messages
from .files import EXTENSIONS, NO_LORA, check_lora, choices, find

logger = logging.getLogger(__name__)

MAX_SIZE = 1024  # pixels of a calibration picture's edge
QUANTIZER_BYTES = 6 * GIB  # of device memory to calibrate a full-size model


def sources() -> list[str]:
    """Names of models to quantize: files and model folders of `diffusion_models`, the demo's BF16 file."""
    return choices("diffusion_models", "dense", folders_too=True)


def check_source(name: str) -> None:
    """ValueError unless a name of `sources` is, by its header, a Z-Image transformer that is not SVDQuant already."""
    core.check_source(find("diffusion_models", name, "dense"))


def quantize(
    model_name: str,
    rank: int,
    output_name: str,
    clip: comfy.sd.CLIP | None,
    prompts: str,
    size: int,
    stack: list[tuple[str, float]],
    node_id: str | None,
) -> str:
    """Write an INT4 file into `diffusion_models` and return its name; calibrated if there is a CLIP.

    prompts: to calibrate with, one a line, empty for the quantizer's own. size: of the calibration pictures in pixels,
    0 for the quantizer's own. stack: LoRAs to merge, (name, strength) each. An interrupted run keeps its finished
    blocks, and the same call resumes it.
    """
    from .clip import release

    if size:
        messages.check_pixels("size", size, MAX_SIZE)
    source, target = find("diffusion_models", model_name, "dense"), new_file(model_name, output_name, rank)
    loras = [(find("loras", name, "lora"), strength) for name, strength in stack if name != NO_LORA]
    for name, _ in stack:
        if name != NO_LORA:
            check_lora(name)
    device = comfy.model_management.get_torch_device()
    own_prompts, own_size = core.calibration_defaults(device)
    asked = [line.strip() for line in prompts.splitlines() if line.strip()] or own_prompts
    cap_feats = None if clip is None else [encode_features(clip, prompt) for prompt in asked]
    if clip is not None:
        release(clip.patcher)
    comfy.model_management.free_memory(QUANTIZER_BYTES, device)
    words, bar = core.TimeLeft(), comfy.utils.ProgressBar(1)

    def show(done: int, total: int, what: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        messages.say(words(done, total, what), node_id)

    given: dict[str, Any] = {"rank": rank, "cap_feats": cap_feats, "size": size or own_size, "merge": loras}
    with warnings.catch_warnings(record=True) as caught:  # of a source below 8 bits, of too few prompts
        warnings.simplefilter("always", UserWarning)
        core.quantize_checkpoint(source, target, **given, device=device, progress=show)
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        logger.warning(text)
        messages.say(text, node_id)
    return target.name


def new_file(model_name: str, output_name: str, rank: int) -> Path:
    """The path of the file to write; an empty name becomes a free one in the style of the official files.

    ValueError for a name with folders and for a file that exists.
    """
    roots = list(map(Path, folder_paths.get_folder_paths("diffusion_models")))  # models/unet, its old name, comes first
    root = next((root for root in roots if root.name == "diffusion_models"), roots[0])
    root.mkdir(parents=True, exist_ok=True)
    if output_name:
        try:
            check_name(output_name)
        except ValueError as error:
            raise ValueError(f"output_name {error}; empty is a free one") from None
        ending = "" if output_name.lower().endswith(EXTENSIONS) else EXTENSIONS[0]
        target = root / f"{output_name}{ending}"
        if target.exists():
            raise ValueError(f"{target}: is there already; choose another output_name, or leave it empty")
        return target
    stem = find("diffusion_models", model_name, "dense").stem.removesuffix("-bf16").removesuffix("_bf16")
    numbers = chain(("",), (f"-{n}" for n in count(2)))
    names = (f"svdq-int4_r{rank}-{stem}{number}{EXTENSIONS[0]}" for number in numbers)
    return next(root / name for name in names if not (root / name).exists())


def encode_features(clip: comfy.sd.CLIP, prompt: str) -> Tensor:
    """Caption features (L, C) of a prompt, on the host."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0].cpu()


def compare(labels: list[str], batches: list[Tensor], node_id: str | None) -> tuple[Tensor, str]:
    """IMAGE batches side by side as one labelled IMAGE, and their scores against the first batch as text."""
    import numpy as np
    from PIL import Image

    for label, batch in zip(labels, batches, strict=True):
        if batch.shape[:3] != batches[0].shape[:3]:
            found, wanted = ("{0} of {2} x {1}".format(*shown.shape) for shown in (batch, batches[0]))
            raise ValueError(
                f"{label}: expected {wanted} pictures as in {labels[0]}, found {found}; generate them alike"
            )
    columns = [
        [Image.fromarray((255 * picture[..., :3].clamp(0, 1)).round().byte().cpu().numpy()) for picture in batch]
        for batch in batches
    ]
    numbers = range(1, len(batches[0]) + 1)
    sheet, scores = side_by_side(labels, columns, [f"picture {number}" for number in numbers], numbers)
    text = "\n".join(f"{s.label}, picture {s.seed}: PSNR {s.psnr:.2f} dB, SSIM {s.ssim:.4f}" for s in scores)
    messages.say(text, node_id)
    return torch.from_numpy(np.asarray(sheet).astype("float32") / 255)[None], text
