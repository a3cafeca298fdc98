"""Fun ControlNet files for Z-Image: which variant a file is, and the strict load.

Number of layers, channels and kind of refiner follow from the header. Only 2.0 and 2.1 have the same tensors: 2.0 is
known by a refiner that was never trained, as huggingface/diffusers `loaders/single_file_utils.py@v0.42.1` and ComfyUI
`comfy_extras/nodes_model_patch.py@v0.33.0` tell them apart, or has no refiner. Files of ours, and diffusers' folders,
name the base's layers in their config; of others they follow from their number, for a base of 30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import ControlNetConfig, ZImageConfig
from .identify import EXPECTED, STORED, FileInfo, block_count, header_facts, identify, rotary_axes, unexpected
from .load import Sources, build, fill_blocks, match_tensors
from .names import CONTROL, control_tensor
from .safetensors import Shape, TensorFiles, open_tensors, read_object
from .weights import find_weights

if TYPE_CHECKING:
    from torch import nn

    from ..models.controlnet import ControlNet

WHAT = "a Z-Image ControlNet"
FORMATS = ("svdq-int4", "dense", *STORED)
"""Formats of ControlNets that are loaded."""
REFINERS = {None: "alone", "control_layers": "layers", "control_noise_refiner": "hints"}
"""diffusers' `add_control_noise_refiner` -> `ControlNetConfig.refiner`."""


@dataclass(frozen=True)
class ControlNetInfo(FileInfo):
    """A ControlNet that can be loaded. format: one of `FORMATS`."""

    config: ControlNetConfig

    @property
    def variant(self) -> str:
        """Its usual name: v1, 2.0, 2.1 or 2.1 lite."""
        if self.config.refiner == "hints":
            return "2.1 lite" if len(self.config.places) <= 3 else "2.1"
        return {"alone": "v1", "layers": "2.0"}[self.config.refiner]


def control_info(source: str | Path | TensorFiles) -> ControlNetInfo:
    """Variant, format and sizes of a ControlNet that `load_controlnet` reads. ValueError names what the file is.

    An open file is taken too, as the values of a projection may have to be read.
    """
    if not isinstance(source, TensorFiles):
        with open_tensors(source) as files:
            return control_info(files)
    files = source
    found = identify(files)
    found.require("controlnet")
    expected, remedy = EXPECTED["controlnet"]
    if found.form.id not in FORMATS:
        words = found.form.words
        raise ValueError(f"{files.path}: expected {expected}, found one in {words}; this is not read, {remedy}")
    shapes: dict[str, Shape] = {}
    for key, (_, shape) in files.tensors.items():
        target = control_tensor(key)
        if target is not None:
            shapes[target[0].removesuffix("._data")] = shape
        elif found.form.id not in STORED:  # which have marks of their own; the loader checks them
            raise unexpected(files.path, key, WHAT, remedy)
    return ControlNetInfo(**header_facts(files, found.form.id, shapes), config=_config(files, shapes))


def _config(files: TensorFiles, shapes: Mapping[str, Shape]) -> ControlNetConfig:
    """Sizes from the shapes; what no shape shows from the metadata's config, or as the published files have it."""
    for name, count in (("x_embedder.weight", 2), ("layers.0.attention.norm_q.weight", 1)):
        if len(shapes.get(name, ())) != count or 0 in shapes[name]:
            found = shapes.get(name, "none")
            raise ValueError(
                f"{files.path}: expected tensor {CONTROL}{name} of {count} axes, found {found}; download it again"
            )
    given = read_object(files.metadata.get("config") or "{}", f"{files.path}: metadata config")
    dim, columns = shapes["x_embedder.weight"]
    head_dim = shapes["layers.0.attention.norm_q.weight"][0]
    refiners, layers = block_count(shapes, "noise_refiner"), block_count(shapes, "layers")
    try:
        base = ZImageConfig(
            dim=dim,
            n_layers=given.get("n_layers", ZImageConfig.n_layers),
            n_refiner_layers=given.get("n_refiner_layers", refiners or ZImageConfig.n_refiner_layers),
            n_heads=dim // head_dim,
            axes_dims=tuple(given.get("axes_dims") or rotary_axes(head_dim)),
        )
        step = max(round(base.n_layers / layers), 1)
        places = given.get("control_layers_places") or range(0, base.n_layers, step)
        if len(places) != layers:
            raise ValueError(f"{layers} layers do not spread evenly over a model of {base.n_layers}")
        kind = REFINERS[given["add_control_noise_refiner"]] if "add_control_noise_refiner" in given else None
        patch = base.patch_size**2
        return ControlNetConfig(base, tuple(places), columns // patch, kind or _refiner(files, shapes))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{files.path}: {error}; this ControlNet is none that is known for Z-Image") from None


def _refiner(files: TensorFiles, shapes: Mapping[str, Shape]) -> str:
    """The kind of refiner; of 2.0 and 2.1 by the values of the projections."""
    if not block_count(shapes, "noise_refiner"):
        return "layers"
    if not any(name.startswith("noise_refiner.0.after_proj.") for name in shapes):
        return "alone"
    keys = {control_tensor(key): key for key in files.tensors}
    for projection in ("after_proj", "before_proj"):
        key = keys.get((f"noise_refiner.0.{projection}.weight", None))
        if key and not files.get(key).float().any():
            return "layers"
    if not any(name.startswith("noise_refiner.0.before_proj.") for name in shapes):
        return "layers"
    return "hints"


def build_controlnet(info: ControlNetInfo) -> ControlNet:
    """The model of a ControlNet's file, on the meta device."""
    from ..models.controlnet import ControlNet

    return build(ControlNet, info, info.config)


def match_controlnet(files: TensorFiles, info: ControlNetInfo, model: nn.Module) -> Sources:
    """Where each of a ControlNet's tensors is in an open file. ValueError as `match_tensors`."""
    remedy = EXPECTED["controlnet"][1]
    unread = ("noise_refiner.",) if info.config.refiner == "layers" else ()

    def unneeded(name: str) -> bool:
        return name.startswith(unread) or name.endswith(".smooth_factor_orig")

    found = find_weights(files, remedy)
    return match_tensors(files, found, model, control_tensor, remedy, unneeded, WHAT, any_form=info.format in STORED)


def load_controlnet(path: str | Path, **options: Any) -> ControlNet:
    """The ControlNet of a file or folder; options as of `load_transformer`."""
    with open_tensors(path) as files:
        info = control_info(files)
        model = build_controlnet(info)
        if options.get("precision") == "w8a8":  # of the transformer: there may be nothing in 8 bits here
            options["precision"] = "auto"
        fill_blocks(model, match_controlnet(files, info, model), info, info.config.base.head_dim, **options)
    return model
