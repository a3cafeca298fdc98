"""Pictures of rows from a pipeline: how many at a time, and what the results depend on beside their rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..control import Control
from ..device import dtype_name
from ..formats.encoder import check_text_encoder
from ..formats.vae import read_vae_config
from ..linear import backends
from ..lora.read import Lora, load_lora
from ..memory.meta import META
from ..memory.plan import reserve
from ..pictures import canny, pad, read_image
from ..pipeline import load_pipeline
from .columns import STEERING
from .rows import Row, fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS, TOGETHER = 2**20, 16  # at a time on a GPU, which smaller pictures alone do not fill


class PictureGenerator:
    """A pipeline that is loaded once. options: of `load_pipeline`; exact: every picture by itself, bit for bit that of
    `zimage generate`. ValueError for files that are not what they should be."""

    def __init__(self, options: Mapping[str, Any], exact: bool = False):
        self.pipeline = pipeline = load_pipeline(**options)
        pipeline.hold_budget()
        check_text_encoder(pipeline.files.text_encoder)
        read_vae_config(pipeline.files.vae)
        self.most = 1 if exact or pipeline.device.type == "cpu" else TOGETHER  # pictures at a time
        self.automatic = pipeline.vram_budget == "auto"
        chosen = pipeline.sources.transformer(META).backend
        self.backend = chosen.name if chosen else "dense"
        self.precision = chosen.precision if chosen else None
        self._loras: dict[str, Lora] = {}

    def _arithmetic(self) -> dict[str, object]:
        found: dict[str, object] = {"backend": self.backend, "precision": self.precision}
        found["dtype"] = dtype_name(self.pipeline.dtype)
        if (attention := self.pipeline.sources.attention) != "sdpa":
            found["attention"] = attention
        return found

    def facts(self) -> dict[str, object]:
        """Hashes of the models and the arithmetic; the machine is left out, so that another may go on."""
        files = self.pipeline.files
        models = {"model": files.model, "text_encoder": files.text_encoder, "tokenizer": files.tokenizer}
        return {name: fingerprint(path) for name, path in {**models, "vae": files.vae}.items()} | self._arithmetic()

    def made_with(self) -> dict[str, object]:
        files = self.pipeline.files
        model = "bundled demo" if files.demo else files.model.name
        device = backends.describe(self.pipeline.device)
        return {"model": model, **self._arithmetic(), "device": device, "zimage": __version__}

    def plan(self) -> str:
        made = self.made_with()
        arithmetic = " ".join(str(made[name]) for name in ("backend", "precision", "dtype") if made[name])
        if self.most == 1:
            several = "one picture at a time"
        else:
            several = f"up to {self.most} small pictures at a time, which changes their rounding (--exact: one by one)"
        return f"{arithmetic} on {made['device']}, {several}"

    def group(self, row: Row) -> Hashable:
        """Everything but prompt and seed; a row with pictures is a group of its own."""
        if {"image", "controls"} & row.settings.keys():
            return row.id
        rest = {name: value for name, value in row.settings.items() if name not in ("prompt", "seed")}
        return repr(sorted(rest.items()))

    def together(self, row: Row) -> int:
        """As many as the device holds without streaming more than for one, up to about a megapixel."""
        width, height = row.settings["width"], row.settings["height"]
        count = max(1, min(self.most, PIXELS // (width * height)))
        while count > 1 and not self._fits(row, count):
            count //= 2
        return count

    def _fits(self, row: Row, count: int) -> bool:
        """Whether so many pictures like this one take no block from the device that one alone leaves there."""
        size = row.settings["height"], row.settings["width"]
        try:
            one, several = (self.pipeline.plan([row.settings["prompt"]] * n, *size) for n in (1, count))
        except ValueError:
            return False
        if several.budget is None and not self._free(several.peak):
            return False
        return several.stage("transformer").resident == one.stage("transformer").resident

    def _free(self, needed: int) -> bool:
        """Whether the GPU has so many bytes free or held by this process."""
        if self.pipeline.device.type != "cuda":
            return True
        there = torch.cuda.mem_get_info(self.pipeline.device)[0] + torch.cuda.memory_reserved(self.pipeline.device)
        return needed + reserve(there) <= there

    def _choose_budget(self, rows: Sequence[Row]) -> None:
        """Keep all models on the device where the chunk's largest picture leaves them the memory for it."""
        if not self.automatic or self.pipeline.device.type != "cuda":
            return
        largest = max(rows, key=lambda row: row.settings["width"] * row.settings["height"])
        self.pipeline.vram_budget = None
        plan = self.pipeline.plan([largest.settings["prompt"]], largest.settings["height"], largest.settings["width"])
        if not self._free(plan.peak):
            self.pipeline.vram_budget = "auto"

    def prepare(self, rows: Sequence[Row]) -> None:
        """Encode all prompts of the rows, where the text encoder has to leave the device for the transformer.

        Where it stays, or where LoRAs that change it differ, batches encode their own.
        """
        self._choose_budget(rows)
        if self.pipeline.vram_budget is None:
            return
        same = all(row.settings.get("loras") == rows[0].settings.get("loras") for row in rows)
        self.pipeline.set_loras(self._read_loras(rows[0].settings) if same else [])
        prompts = [row.settings["prompt"] for row in rows]
        prompts += [row.settings["negative_prompt"] for row in rows if "negative_prompt" in row.settings]
        self.pipeline.encode(prompts)

    def generate(self, rows: Sequence[Row]) -> list[Image]:
        settings = rows[0].settings
        image, mask = edited(settings)
        return self.pipeline(
            [row.settings["prompt"] for row in rows],
            height=settings["height"],
            width=settings["width"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            negative_prompt=settings.get("negative_prompt"),
            generator=[row.settings["seed"] for row in rows],
            image=image,
            strength=settings.get("strength", 1.0),
            mask=mask,
            feather=settings.get("feather", 0),
            control=controls(settings),
            loras=self._read_loras(settings),
            **{name: settings[name] for name in STEERING if name in settings},
        )

    def close(self) -> None:
        """Nothing: the pipeline goes with its process."""

    def _read_loras(self, settings: Mapping[str, Any]) -> list[tuple[Lora, float]]:
        """The row's LoRAs; those of the last row are kept, so that they are not read for each."""
        wanted = settings.get("loras", [])
        self._loras = {path: self._loras.get(path) or load_lora(path) for path, _ in wanted}
        return [(self._loras[path], strength) for path, strength in wanted]


def edited(settings: Mapping[str, Any]) -> tuple[Image | None, Image | None]:
    """The picture that a row starts from, with its borders, and the mask of what is repainted."""
    if "image" not in settings:
        return None, None
    if "pad" in settings:
        return pad(read_image(settings["image"]), *settings["pad"])
    return read_image(settings["image"]), read_image(settings["mask"]) if "mask" in settings else None


def controls(settings: Mapping[str, Any]) -> list[Control]:
    """The row's ControlNets with their pictures."""
    found = []
    for path, strength, start, end, picture in settings.get("controls", ()):
        image = None if picture is None else read_image(picture)
        if image is not None and settings.get("canny"):
            image = canny(image)
        found.append(Control(image, path, strength, start, end))
    return found
