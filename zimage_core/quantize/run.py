"""BF16 Z-Image transformer to the SVDQuant INT4 file, plain or calibrated, packed and streamed.

Plain, each linear is quantized from its weight alone. Calibrated, from what the model really puts through it while
it draws (`calibrate.py`), which takes longer and errs less. How one linear is quantized is in `solver.py`, what the
file looks like in `svdq_file.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from .. import __version__
from ..formats.identify import ModelInfo, model_info
from ..formats.load import expected_tensors, match_tensors
from ..formats.names import diffusers_svdq_module
from ..formats.safetensors import TensorFiles, open_tensors
from ..linear.adapters import Linear
from ..linear.svdq import SVDQWeights
from ..lora.apply import Bias, Delta, Lora, compose, load_lora
from ..memory.offload import BlockStreamer
from ..models.config import ZImageConfig
from ..models.transformer import PIXELS_PER_CELL, Block, ZImageTransformer
from . import calibrate
from .solver import svdq_calibrated, svdq_from_dense
from .writer import StreamedFile, block_names, check_destination, file_metadata, plan_header, quantized_linears

FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SCALES = (".weight_scale", ".scale_weight")
FP8_UNUSED = (".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")

Progress = Callable[[int, int, str], None]

EDGE = PIXELS_PER_CELL * ZImageConfig.patch_size  # pixels of a token
LARGEST = 1e6  # of what is quantized: far above any working model's weights, and its powers are still fp32 numbers
THIN = 2  # input channels for each token of the calibration pictures from which on it did more harm than good
PACE = 16  # last reports from which the time left is told: four blocks' linears
RESUMED = "resumed"  # begins what is reported of work that an earlier run did


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    rank: int,
    cap_feats: Sequence[torch.Tensor] | None = None,
    size: int = 512,
    merge: Sequence[tuple[str | Path, float]] = (),
    skip_refiners: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write `dst`, a SVDQ INT4 file, from `src`, a BF16, FP16 or FP32 transformer (file or sharded folder).

    FP8 is taken too, with a warning. rank: a multiple of 16 (32, 128 and 256 are usual). cap_feats: features (L, C)
    of the prompts to calibrate with (see `calibration_captions`), drawn at size x size pixels; None quantizes from
    the weights alone. merge: LoRA files and their strengths, made part of the weights first. skip_refiners: leave the
    refiners' linears in bf16. device: where the arithmetic runs; deterministic for a device. progress(done, total,
    what), for which `TimeLeft` has words, is called as the work goes on and once at the end, where done == total; an
    exception from it ends the run. A warning tells where cap_feats are too few or the pictures too small to help.

    `dst` is replaced if it exists, and only at the end. A calibrated run that is interrupted leaves its finished
    blocks beside it, as `dst`.partial and a small file; the same call goes on from there. Raises FileNotFoundError,
    or ValueError where the source is no dense Z-Image transformer, where it, the features or the LoRAs hold NaN or
    numbers beyond use, and as `check_request`; also where the destination cannot be written or another run is at it.
    """
    check_request(dst, size, merge)
    src, dst, device = Path(src), Path(dst), torch.device(device)
    for i, features in enumerate(cap_feats or (), 1):
        if not features.isfinite().all():
            raise ValueError(
                f"cap_feats of prompt {i}/{len(cap_feats)}: expected finite numbers, found NaN or infinity; "
                "get an undamaged text encoder"
            )
    loras = [(load_lora(path), float(strength)) for path, strength in merge]
    with _open_dense(src) as files:
        info = _dense_info(files)
        if dst.exists() and any(dst.samefile(header.path) for header in files.headers):
            raise ValueError(f"{dst}: is the source itself; choose another destination")
        header = plan_header(info.config, rank, skip_refiners)
        metadata = file_metadata(info.config, rank, skip_refiners)
        source = _Source(files, info.config, loras, device)
        notes = None
        if cap_feats is not None:
            notes = calibrate.planned_samples(info.config, len(cap_feats), size)
            _warn_if_thin(info.config, cap_feats, size)
        metadata["quantized_by"] = json.dumps(_provenance(source, cap_feats, size, merge))
        with StreamedFile(dst, header, metadata, notes) as out, torch.inference_mode():
            _Job(source, out, rank, skip_refiners, progress).run(cap_feats, size)


def check_request(dst: str | Path, size: int, merge: Sequence[tuple[str | Path, float]]) -> None:
    """ValueError for a destination, a size or a LoRA's strength that `quantize_checkpoint` does not take."""
    check_destination(Path(dst))
    if size <= 0 or size % EDGE:
        raise ValueError(f"size: expected a positive multiple of {EDGE} pixels, found {size}; 512 is usual")
    for path, strength in merge:
        if not math.isfinite(strength):
            raise ValueError(f"{path}: strength: expected a finite number, found {strength}; 1 is usual")


def check_source(src: str | Path) -> None:
    """ValueError unless `quantize_checkpoint` takes a file or folder, from its header alone."""
    _dense_info(_open_dense(Path(src)))


class TimeLeft:
    """Words for a quantization's progress: what it is at and, from its pace of late, how long it will still take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks = deque([(clock(), 0)], maxlen=PACE + 1)

    def __call__(self, done: int, total: int, what: str) -> str:
        """`block 3/34, attention.to_out, 4:10 left`; without a time until there is a pace to tell it from."""
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
    """The prompts and the size in pixels to calibrate with; smaller on a CPU, where it takes hours."""
    return calibrate.PROMPTS, 256 if torch.device(device).type == "cpu" else 512


def calibration_captions(
    text_encoder: str | Path,
    prompts: Sequence[str] = calibrate.PROMPTS,
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> list[torch.Tensor]:
    """Features (L, C) of the calibration prompts, from a text encoder that is read for this and dropped again.

    Its layers are streamed to a GPU, which need not hold them all. tokenizer: its folder, looked for beside the encoder
    unless named. ValueError as `load_text_encoder`.
    """
    from ..formats.encoder import load_text_encoder
    from ..models.text_encoder import encode_prompts
    from ..models.tokenizer import find_tokenizer, load_tokenizer

    device = torch.device(device)
    encoder = load_text_encoder(text_encoder)
    tokenize = load_tokenizer(tokenizer or find_tokenizer(text_encoder))
    streamer = BlockStreamer(encoder.layers)
    streamer.place(device, math.inf if device.type == "cpu" else 0)
    found = encode_prompts(encoder, tokenize, prompts, run_block=streamer.run_block, device=device)
    features = [feature.cpu() for feature in found]
    del encoder, streamer, found
    _release(device)
    return features


def _warn_if_thin(config: ZImageConfig, cap_feats: Sequence[torch.Tensor], size: int) -> None:
    tokens = calibrate.STEPS // 2 * len(cap_feats) * (size // EDGE) ** 2
    channels = max(k for _, k in quantized_linears(config).values())
    if tokens * THIN <= channels:
        warnings.warn(
            f"{len(cap_feats)} prompts at {size} x {size} pixels give {tokens} tokens to calibrate linears of "
            f"{channels} inputs, which can be worse than no calibration; take more prompts or larger pictures",
            stacklevel=3,
        )


def _check_numbers(tensor: torch.Tensor, where: str, remedy: str) -> None:
    largest = tensor.abs().amax().item()  # NaN if there is one
    if not largest <= LARGEST:
        raise ValueError(f"{where}: expected numbers up to {LARGEST:.0e}, found {largest:.1e}; {remedy}")


def _release(device: str | torch.device) -> None:
    """Give freed memory back to the GPU: what comes next asks for pieces of other sizes."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


class _Fp8Files(TensorFiles):
    """FP8 weights, with or without a scale, as the BF16 tensors that they stand for."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._fp8 = {key for key, (dtype, _) in self.tensors.items() if dtype in FP8 and key.endswith(".weight")}
        self._scales = {key: shape for key, (_, shape) in self.tensors.items() if key.endswith(FP8_SCALES)}
        self.tensors = {
            key: ("BF16" if key in self._fp8 else dtype, shape)
            for key, (dtype, shape) in self.tensors.items()
            if not key.endswith((*FP8_SCALES, *FP8_UNUSED))
        }

    def get(self, name: str) -> torch.Tensor:
        tensor = super().get(name)
        if name not in self._fp8:
            return tensor
        tensor = tensor.float()
        for scale in (name.removesuffix(".weight") + leaf for leaf in FP8_SCALES):
            if math.prod(self._scales.get(scale, ())) != 1:
                raise ValueError(f"{self.path}: {scale}: expected one number, found many; quantize the BF16 original")
            if scale in self._scales:
                tensor = tensor * super().get(scale).float()
        return tensor.to(torch.bfloat16)


def _open_dense(path: Path) -> TensorFiles:
    files = open_tensors(path)
    dtypes = {dtype for dtype, _ in files.tensors.values()}
    if dtypes.isdisjoint(FP8) or "I8" in dtypes:
        return files
    warnings.warn(f"{path}: is FP8, so its weights get rounded twice; the BF16 file gives better ones", stacklevel=3)
    return _Fp8Files(path)


def _dense_info(files: TensorFiles) -> ModelInfo:
    info = model_info(files)
    if info.format != "dense":
        raise ValueError(f"{files.path}: expected a BF16 model, found {info.format}; quantize its BF16 original")
    return info


class _Source:
    """The dense model's tensors by the model's own names, with the LoRAs made part of them."""

    def __init__(
        self, files: TensorFiles, config: ZImageConfig, loras: Sequence[tuple[Lora, float]], device: torch.device
    ):
        """ValueError if a tensor is missing or misshapen, or a LoRA does not fit."""
        self.files = files
        self.config = config
        self.device = device
        with torch.device("meta"):
            model = ZImageTransformer(config, linear=Linear)
        self.keys = match_tensors(files, expected_tensors(model, rank=0))
        self.loras = ", ".join(lora.name for lora, _ in loras)
        self.changes: dict[str, list[tuple[Delta, float]]] = {}
        for lora, strength in loras:
            for target, deltas in lora.check(model).items():
                self.changes.setdefault(target, []).extend((delta, strength) for delta in deltas)

    def get(self, name: str) -> torch.Tensor:
        """A tensor on the device, put together from its parts. ValueError if it holds NaN or is beyond `LARGEST`."""
        parts = []
        for key in self.keys[name]:
            parts.append(self.files.get(key).to(self.device))
            _check_numbers(parts[-1], f"{self.files.path}: {key}", "get an undamaged file")
        whole = torch.cat(parts)
        module, _, leaf = name.rpartition(".")
        changes = self.changes.get(module or name)
        if not changes:
            return whole
        merged = self._merged(whole, module, leaf, changes)
        _check_numbers(merged, f"{self.loras}: merged into {name}", "lower its strength")
        return merged

    def _merged(self, tensor: torch.Tensor, module: str, leaf: str, changes: list[tuple[Delta, float]]) -> torch.Tensor:
        """The tensor with the changes in it, in fp32."""
        tensor = tensor.float()
        shifts = [(delta, strength) for delta, strength in changes if isinstance(delta, Bias)]
        if leaf == "bias":
            return tensor + sum(strength * delta.get("diff_b", self.device) for delta, strength in shifts)
        if tensor.ndim == 1 or not module:
            return tensor + sum(s * delta.get("diff", self.device).view_as(tensor) for delta, s in changes)
        if shifts and f"{module}.bias" not in self.keys:
            raise ValueError(f"{module}: the LoRA adds a bias, which the INT4 file cannot hold; load it at run time")
        linear = Linear(tensor.shape[1], tensor.shape[0], bias=False, device=self.device)
        linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
        terms = compose([change for change in changes if change not in shifts], linear, module, torch.float32)
        if terms.pair and not (terms.dense or terms.krons):
            down, up = terms.pair
            return torch.addmm(tensor, up, down)
        linear.set_adapter(terms)  # what it makes of each input channel alone is the weight
        return torch.cat([linear(rows) for rows in torch.eye(tensor.shape[1], device=self.device).split(1024)]).T


class _Job:
    """One model on its way into one file."""

    BLOCK_COST, LINEAR_COST = 1, 16  # of drawing with a block and of quantizing a linear, as the progress counts them

    def __init__(self, source: _Source, out: StreamedFile, rank: int, skip_refiners: bool, progress: Progress | None):
        self.source = source
        self.out = out
        self.rank = rank
        self.progress = progress
        self.done = 0
        self.total = 0
        self.blocks = [b for b in block_names(source.config) if not (skip_refiners and "refiner" in b)]
        self.linears = [f"{block}.{linear}" for block in self.blocks for linear in calibrate.LINEARS]

    def run(self, cap_feats: Sequence[torch.Tensor] | None, size: int) -> None:
        """Write every tensor of the file."""
        self.total = len(self.linears) * self.LINEAR_COST
        self._copy_plain()
        if cap_feats is None:
            for linear in self.linears:
                self._write(linear, svdq_from_dense(self.source.get(f"{linear}.weight"), self.rank))
        else:
            self._calibrated(cap_feats, size)
        self._advance(0, self.out.path.name)

    def _copy_plain(self) -> None:
        """Everything that stays in bf16."""
        quantized = set(self.linears)
        for name in self.source.keys:
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
        device = self.source.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        config, drawing = self.source.config, "drawing what to calibrate with"
        resumed = f"{RESUMED} after block {len(self.out.finished)}/{len(self.blocks)}"
        if set(self.blocks) <= set(self.out.finished):
            self._advance(self.total, resumed)
            return
        streamed = calibrate.Streamed(
            config, self.source.get, device, dtype, on_block=lambda: self._advance(self.BLOCK_COST, drawing)
        )
        cost = self.BLOCK_COST * calibrate.blocks_to_draw(config)
        self.total += cost
        if self.out.finished:
            samples = calibrate.Samples(*(self.out.read(field.name) for field in fields(calibrate.Samples)))
            self._advance(cost, resumed)
        else:
            samples = calibrate.draw_samples(streamed, cap_feats, size)
            for name, tensor in vars(samples).items():
                self.out.write(name, tensor)
        calibrate.visit_blocks(streamed, cap_feats, samples, self._visit)

    def _visit(self, name: str, block: Block, chunks: list[calibrate.Chunk]) -> None:
        """Quantize a block's linears in place, each for the inputs that it gets from those before it."""
        if name not in self.blocks:
            return
        resumed = name in self.out.finished
        for linear in calibrate.LINEARS:
            module = block.get_submodule(linear)
            if resumed:
                weights = self._read(f"{name}.{linear}")
                self._advance(self.LINEAR_COST, f"{RESUMED} {self._at(f'{name}.{linear}')}")
            else:
                stats = calibrate.input_stats(block, linear, chunks)
                weights = svdq_calibrated(module.weight, self.rank, stats)
                self._write(f"{name}.{linear}", weights)
            module.weight.copy_(weights.dequantize())
            _release(self.source.device)
        if not resumed:
            self.out.finish(name)

    def _write(self, linear: str, weights: SVDQWeights) -> None:
        packed = weights.to_packed()
        for leaf, tensor in (packed | {"smooth_factor_orig": packed["smooth_factor"]}).items():
            self.out.write(f"{diffusers_svdq_module(linear)}.{leaf}", tensor)
        self._advance(self.LINEAR_COST, self._at(linear))

    def _read(self, linear: str) -> SVDQWeights:
        prefix = diffusers_svdq_module(linear) + "."
        leaves = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
        packed = {leaf: self.out.read(prefix + leaf).to(self.source.device) for leaf in leaves}
        return SVDQWeights.from_packed(packed)

    def _at(self, linear: str) -> str:
        """Where in the model a linear is, in words."""
        stage, index, name = linear.split(".", 2)
        return f"block {self.blocks.index(f'{stage}.{index}') + 1}/{len(self.blocks)}, {name}"

    def _advance(self, cost: int, name: str) -> None:
        self.done += cost
        if self.progress:
            self.progress(self.done, self.total, name)


def _provenance(
    source: _Source,
    cap_feats: Sequence[torch.Tensor] | None,
    size: int,
    merge: Sequence[tuple[str | Path, float]],
) -> dict[str, object]:
    """How the file was made, which also tells whether a half-finished one was made the same way."""
    weights, captions = hashlib.sha256(), hashlib.sha256()
    for name, keys in sorted(source.keys.items()):
        parts = [source.files.get(key).flatten() for key in keys]
        count, place = sum(map(len, parts)), 0
        weights.update(f"{name} {count} {parts[0].dtype}".encode())
        step = max(count // 16, 1)
        for part in parts:  # however a tensor is cut into parts, the same of its values are taken
            weights.update(part[-place % step :: step].float().numpy().tobytes())
            place += len(part)
    made: dict[str, object] = {"tool": "zimage-int4", "version": __version__, "source": weights.hexdigest()[:16]}
    if merge:
        made["merged"] = [
            f"{Path(path).name}:{strength} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
            for path, strength in merge
        ]
    if cap_feats is None:
        return made | {"method": "svd"}
    for features in cap_feats:
        captions.update(features.float().cpu().numpy().tobytes())
    return made | {
        "method": "smooth, svd, gptq; block by block",
        "prompts": len(cap_feats),
        "size": size,
        "captions": captions.hexdigest()[:16],
    }
