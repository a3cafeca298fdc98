"""BF16 Z-Image transformer to the SVDQuant INT4 file, plain or calibrated, packed and streamed.

Plain, each linear is quantized from its weight alone. Calibrated (`calibrate.py`), from its actual inputs while the
model generates pictures, which takes longer and is more accurate. `solver.py` quantizes one linear, `writer.py` writes
the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch
from torch import nn

from .. import __version__
from ..formats.identify import likely_variant, model_info
from ..formats.load import open_transformer
from ..formats.names import diffusers_svdq_module
from ..linear.svdq import SVDQWeights
from ..lora.read import load_lora
from ..memory.offload import BlockStreamer
from ..models.config import ZImageConfig
from ..models.transformer import PIXELS_PER_CELL, Block
from ..whole import check_target
from . import calibrate
from .solver import svdq_calibrated, svdq_from_dense
from .source import DenseSource, match_source
from .writer import StreamedFile, block_names, check_apart, file_metadata, nunchaku_tensors, plan_header

Progress = Callable[[int, int, str], None]

EDGE = PIXELS_PER_CELL * ZImageConfig.patch_size  # pixels of a token
THIN = 2  # input channels per calibration token from which on calibration was worse than none
PACE = 16  # last reports that the time left is computed from: four blocks' linears
PACKED = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias")
RESUMED = "resumed"  # begins the reports of work that an earlier run did


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    rank: int,
    cap_feats: Sequence[torch.Tensor] | None = None,
    size: int = 512,
    merge: Sequence[tuple[str | Path, float]] = (),
    skip_refiners: bool = False,
    variant: str | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write `dst`, a SVDQ INT4 file, from `src`, a BF16, FP16 or FP32 transformer (file or sharded folder).

    What is stored smaller is taken too, below 8 bits with a warning. rank: a multiple of 16 (32, 128 and 256 are
    usual). cap_feats: features (L, C) of the calibration prompts (see `calibration_captions`), whose pictures are
    size x size pixels; None quantizes from the weights alone. merge: LoRA files and their strengths, added to the
    weights first. skip_refiners: leave the refiners' linears in bf16. variant: "turbo" or "base", for the file's
    metadata; left out, as the source's name and metadata suggest. device: where the arithmetic runs; deterministic for
    a device. progress(done, total, what) is called during the work (`TimeLeft` words it) and once at the end with
    done == total; an exception from it ends the run. Warns if cap_feats are too few or the pictures too small to help.

    `dst` is replaced if it exists, and only at the end. An interrupted calibrated run leaves its finished blocks beside
    it under hidden names (`StreamedFile`); the same call checks them and the source, and resumes from there. Raises
    FileNotFoundError, or ValueError if the source is no dense Z-Image transformer, if it, the features or the LoRAs
    hold NaN or too large numbers, as `check_request`, and if the destination cannot be written or is being written.
    """
    check_request(dst, size, merge)
    src, dst, device = Path(src), Path(dst), torch.device(device)
    if device.type == "mps":
        raise ValueError("device mps: expected one with float64, which quantizing needs; use cpu")
    loras = [(load_lora(path), float(strength)) for path, strength in merge]
    with open_transformer(src) as (info, files):
        check_apart(dst, files)
        header = plan_header(info.config, rank, skip_refiners)
        metadata = file_metadata(info.config, rank, skip_refiners)
        source = DenseSource(files, info, loras, device)
        notes = None
        if cap_feats is not None:
            _check_captions(info.config, cap_feats, size)
            notes = calibrate.planned_samples(info.config, len(cap_feats), size)
        if found := variant or likely_variant(files):
            metadata["variant"] = found
        metadata["quantized_by"] = json.dumps(_provenance(source, cap_feats, size, merge))
        with StreamedFile(dst, header, metadata, notes) as out, torch.inference_mode():
            _Job(source, out, rank, skip_refiners, progress).run(cap_feats, size)


def check_request(dst: str | Path, size: int, merge: Sequence[tuple[str | Path, float]]) -> None:
    """ValueError if `quantize_checkpoint` would refuse the destination, the size or a LoRA's strength."""
    check_target(Path(dst))
    if size <= 0 or size % EDGE:
        raise ValueError(f"size: expected a positive multiple of {EDGE} pixels, found {size}; 512 is usual")
    for path, strength in merge:
        if not math.isfinite(strength):
            raise ValueError(f"{path}: strength: expected a finite number, found {strength}; 1 is usual")


def check_source(src: str | Path) -> None:
    """ValueError if `quantize_checkpoint` would refuse the file or folder, from its header alone."""
    with open_transformer(src) as (info, files):
        match_source(files, info)


class TimeLeft:
    """Words for a quantization's progress: the current step and, from its recent pace, the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks = deque([(clock(), 0)], maxlen=PACE + 1)

    def __call__(self, done: int, total: int, what: str) -> str:
        """`block 3/34, attention.to_out, 4:10 left`; without a time until the pace is known."""
        now = self._clock()
        if what.startswith(RESUMED):
            self._marks.clear()
        self._marks.append((now, done))
        start, before = self._marks[0]
        if done >= total or done == before:
            return what
        seconds = round((now - start) / (done - before) * (total - done))
        hours, minutes = divmod(seconds // 60, 60)
        left = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f"{what}, {left} left"


def calibration_defaults(device: str | torch.device) -> tuple[tuple[str, ...], int]:
    """The prompts and the size in pixels to calibrate with; smaller on a CPU, where calibration takes hours."""
    return calibrate.PROMPTS, 256 if torch.device(device).type == "cpu" else 512


def caption_width(model: str | Path) -> int:
    """Width of the captions that a transformer of any format takes, from its header."""
    return model_info(model).config.cap_feat_dim


def calibration_captions(
    text_encoder: str | Path,
    prompts: Sequence[str] = calibrate.PROMPTS,
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> list[torch.Tensor]:
    """Features (L, C) of the calibration prompts, from a text encoder that is read here and freed afterwards.

    Its layers are streamed to a GPU. tokenizer: its folder; by default `find_tokenizer`'s. ValueError as
    `load_text_encoder`.
    """
    from ..formats.encoder import load_text_encoder
    from ..models.text_encoder import encode_prompts
    from ..models.tokenizer import find_tokenizer, load_tokenizer

    device = torch.device(device)
    encoder = load_text_encoder(text_encoder)
    tokenize = load_tokenizer(tokenizer or find_tokenizer(text_encoder))
    streamer = BlockStreamer(list(encoder.layers))
    streamer.place(device, math.inf if device.type == "cpu" else 0)
    found = encode_prompts(encoder, tokenize, prompts, run_block=streamer.run_block, device=device)
    features = [feature.cpu() for feature in found]
    del encoder, streamer, found
    _release(device)
    return features


def _check_captions(config: ZImageConfig, cap_feats: Sequence[torch.Tensor], size: int) -> None:
    """ValueError if captions hold NaN or infinity; a warning if there are too few tokens to calibrate with."""
    for i, features in enumerate(cap_feats, 1):
        if not features.isfinite().all():
            raise ValueError(
                f"cap_feats of prompt {i}/{len(cap_feats)}: expected finite numbers, found NaN or infinity; "
                "get an undamaged text encoder"
            )
    tokens = calibrate.STEPS // 2 * len(cap_feats) * (size // EDGE) ** 2
    channels = max(k for _, k in config.linears.values())
    if tokens * THIN <= channels:
        warnings.warn(
            f"{len(cap_feats)} prompts at {size} x {size} pixels give {tokens} tokens to calibrate linears of "
            f"{channels} inputs, which can be worse than no calibration; take more prompts or larger pictures",
            stacklevel=3,
        )


def _release(device: str | torch.device) -> None:
    """Return cached memory to the GPU, as what follows allocates other sizes."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def noted_samples(
    out: StreamedFile, streamed: calibrate.Streamed, cap_feats: Sequence[torch.Tensor], size: int
) -> calibrate.Samples:
    """The calibration samples: those in an earlier run's notes, else new ones, which are noted."""
    if out.finished:
        return calibrate.Samples(*(out.read(field.name) for field in fields(calibrate.Samples)))
    samples = calibrate.generate_samples(streamed, cap_feats, size)
    for name, tensor in vars(samples).items():
        out.write(name, tensor)
    return samples


class Job:
    """Quantizes a model's linears into one file.

    stored: from the model's name of a module to the file's. words: what to report of a linear.
    """

    LINEAR_COST = 16  # of quantizing a linear, for the progress

    def __init__(
        self,
        out: StreamedFile,
        rank: int,
        device: torch.device,
        progress: Progress | None,
        stored: Callable[[str], str],
        words: Callable[[str], str],
    ):
        self.out, self.rank, self.device, self.progress = out, rank, device, progress
        self.stored, self.words = stored, words
        self.done = self.total = 0

    def visit(self, name: str, block: Block, chunks: list[calibrate.Chunk], linears: Iterable[str]) -> None:
        """Quantize a block's linears in place, each for its inputs from those before it; or read an earlier run's."""
        resumed = self.stored(name) in self.out.finished
        for linear in linears:
            module, full = cast(nn.Linear, block.get_submodule(linear)), f"{name}.{linear}"
            if resumed:
                weights = self._read(self.stored(full))
                self.advance(self.LINEAR_COST, f"{RESUMED} {self.words(full)}")
            else:
                weights = svdq_calibrated(module.weight, self.rank, calibrate.input_stats(block, linear, chunks))
                self.write(full, weights)
            module.weight.copy_(weights.dequantize())
            _release(self.device)
        if not resumed:
            self.out.finish(self.stored(name))

    def write(self, linear: str, weights: SVDQWeights) -> None:
        for leaf, tensor in nunchaku_tensors(weights).items():
            self.out.write(f"{self.stored(linear)}.{leaf}", tensor)
        self.advance(self.LINEAR_COST, self.words(linear))

    def _read(self, module: str) -> SVDQWeights:
        """What an earlier run made of a linear."""
        leaves = [leaf for leaf in PACKED if f"{module}.{leaf}" in self.out.header]
        return SVDQWeights.from_packed({leaf: self.out.read(f"{module}.{leaf}").to(self.device) for leaf in leaves})

    def advance(self, cost: int, what: str) -> None:
        self.done += cost
        if self.progress:
            self.progress(self.done, self.total, what)


class _Job(Job):
    """Quantizes one transformer into one file."""

    BLOCK_COST = 1  # of running a block on the samples

    def __init__(
        self, source: DenseSource, out: StreamedFile, rank: int, skip_refiners: bool, progress: Progress | None
    ):
        super().__init__(out, rank, source.device, progress, diffusers_svdq_module, self._at)
        self.source = source
        self.blocks = [b for b in block_names(source.config) if not (skip_refiners and "refiner" in b)]
        self.linears = [f"{block}.{linear}" for block in self.blocks for linear in source.config.linears]

    def run(self, cap_feats: Sequence[torch.Tensor] | None, size: int) -> None:
        """Write every tensor of the file."""
        self.total = len(self.linears) * self.LINEAR_COST
        self._copy_plain()
        if cap_feats is None:
            for linear in self.linears:
                self.write(linear, svdq_from_dense(self.source.get(f"{linear}.weight"), self.rank))
        else:
            self._calibrated(cap_feats, size)
        self.advance(0, self.out.path.name)

    def _copy_plain(self) -> None:
        """Write the tensors that stay in bf16."""
        quantized = set(self.linears)
        for name in self.source.stored:
            module, _, leaf = name.rpartition(".")
            if module in quantized:
                continue
            tensor, stored = self.source.get(name).to(torch.bfloat16), diffusers_svdq_module(module)
            if stored.endswith("to_qkv"):  # of a refiner that stays dense
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    self.out.write(f"{stored.removesuffix('qkv')}{part}.{leaf}", rows)
                continue
            stored = f"{stored}.{leaf}" if stored else leaf
            self.out.write(stored, tensor.reshape(self.out.header[stored][1]))

    def _calibrated(self, cap_feats: Sequence[torch.Tensor], size: int) -> None:
        """Generate the samples, or read an earlier run's, and quantize block by block."""
        device = self.source.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        config, generating = self.source.config, "generating calibration samples"
        resumed = f"{RESUMED} after block {len(self.out.finished)}/{len(self.blocks)}"
        if set(self.blocks) <= set(self.out.finished):
            self.advance(self.total, resumed)
            return
        streamed = calibrate.Streamed(
            config, self.source.get, device, dtype, on_block=lambda: self.advance(self.BLOCK_COST, generating)
        )
        cost = self.BLOCK_COST * calibrate.blocks_run(config)
        self.total += cost
        if self.out.finished:
            self.advance(cost, resumed)
        samples = noted_samples(self.out, streamed, cap_feats, size)
        calibrate.visit_blocks(streamed, cap_feats, samples, self._visit)

    def _visit(self, name: str, block: Block, chunks: list[calibrate.Chunk]) -> None:
        if name in self.blocks:
            self.visit(name, block, chunks, self.source.config.linears)

    def _at(self, linear: str) -> str:
        """A linear's block number and name, in words."""
        stage, index, name = linear.split(".", 2)
        return f"block {self.blocks.index(f'{stage}.{index}') + 1}/{len(self.blocks)}, {name}"


def _provenance(
    source: DenseSource, cap_feats: Sequence[torch.Tensor] | None, size: int, merge: Sequence[tuple[str | Path, float]]
) -> dict[str, object]:
    """How the file is made; a run resumes an earlier one only if it agrees."""
    made: dict[str, object] = {"tool": "zimage-int4", "version": __version__, "source": source.digest()}
    if merge:
        made["merged"] = [
            f"{Path(path).name}:{strength} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
            for path, strength in merge
        ]
    if cap_feats is None:
        return made | {"method": "svd"}
    captions = hashlib.sha256()
    for features in cap_feats:
        captions.update(features.float().cpu().numpy().tobytes())
    return made | {
        "method": "smooth, svd, gptq; block by block",
        "prompts": len(cap_feats),
        "size": size,
        "captions": captions.hexdigest()[:16],
    }
