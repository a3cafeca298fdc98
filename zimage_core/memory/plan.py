"""What a picture will take of the device's memory, told before work starts, and what is streamed to keep a budget.

Text encoder, transformer and VAE are on the device one after the other, so a budget must hold the largest of three
stages: weights that stay, two slots for streamed blocks, activations, a backend's buffers. Only without any limit do
the transformer and the VAE wait there for the next picture; the encoder never does. The activations are counted from
the code: the tensors alive at the widest moments of a block, in bytes per token or pixel. A test runs the models under
a counter of live storages and holds these formulas against it.

Legend: D width, F feed-forward width, H heads, K head width of a model (K in, N out, R rank of a linear); e bytes of
its dtype, s of the residual stream (4 where the dtype is fp16). All sizes are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from ..models.config import ZImageConfig
from ..models.text_encoder import TextEncoderConfig
from ..models.vae import AUTO_PIXELS, TILES, VAEConfig
from ..sizes import GIB, readable, round_up
from .offload import Weights

CHUNK = 2**24  # elements that backends.reference unpacks at once
FEW_ROWS = 2048  # up to which backends.triton has w4a16's low-rank branch ride in the GEMM
KEPT_DENSE = 2**20  # elements up to which backends.reference keeps a weight's dense form
ENCODER_CHUNK = 2**22  # weights that encoder_formats dequantizes at once
CUBLAS = 2**25  # the workspace that torch gives cuBLAS on Hopper and later; a quarter of it before
TOKENS_MULTIPLE = 32
GROUP = 64
UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}

# Form of an encoder's weight -> bytes per weight and per row, and the fp32 copies and the like of a chunk of weights
# while it is dequantized, in bytes per weight. `stored_form` knows GGUF's other types.
FORMS = {
    "int8": (1.0, 4, 8),
    "float8_e4m3fn": (1.0, 4, 8),
    "float8_e5m2": (1.0, 4, 8),
    "nvfp4": (0.5625, 4, 8.5),
    "Q8_0": (34 / 32, 0, 8.25),
    "Q4_K": (144 / 256, 0, 8.75),
    "Q5_K": (176 / 256, 0, 10.5),
    "Q6_K": (210 / 256, 0, 9.5),
}


@dataclass(frozen=True)
class Need:
    """What a stage takes beside its weights: buffers of the backend's, and everything that grows with the picture."""

    workspace: int
    activations: int

    @property
    def total(self) -> int:
        return self.workspace + self.activations


@dataclass(frozen=True)
class Stage:
    """One model's time on the device. on_device: its weights there, slots included; other: what else lies there.

    allowance: bytes of weights, as `offload.BlockStreamer.place` takes it; beside: the models that stay there, too.
    """

    name: str
    weights: int
    on_device: int
    blocks: int
    resident: int
    activations: int
    workspace: int
    other: int
    allowance: float
    beside: tuple[str, ...] = ()
    note: str = ""

    @property
    def peak(self) -> int:
        return self.on_device + self.activations + self.workspace + self.other


@dataclass(frozen=True)
class Plan:
    """What will be on the device when; `budget` and `usable` are None where there is no limit.

    tiling is that of `vae.VAE.decode`.
    """

    title: str
    stages: tuple[Stage, ...]
    budget: int | None
    usable: int | None
    tiling: str | int

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def table(self) -> str:
        """The plan for people, a few lines."""
        limit = "no limit" if self.budget is None else f"budget {readable(self.budget)}"
        unit, count, digits = ("MiB", 2**20, 1) if self.peak < GIB / 4 else ("GiB", GIB, 2)
        rows = [(unit, "weights", "on device", "activations", "buffers", "peak", "")]
        for stage in self.stages:
            parts = (stage.weights, stage.on_device, stage.activations, stage.workspace + stage.other, stage.peak)
            streamed = stage.blocks - stage.resident
            notes = [f"{streamed} of {stage.blocks} blocks streamed"] if streamed else []
            note = ", ".join((*notes, *filter(None, (stage.note,)), *(f"{other} stays" for other in stage.beside)))
            rows.append((stage.name, *(f"{part / count:.{digits}f}" for part in parts), note))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"{self.title}, {limit}, predicted peak {readable(self.peak)}"]
        for name, *numbers, note in rows:
            cells = [n.rjust(w) for n, w in zip(numbers, widths[1:])]
            lines.append("  ".join((f"  {name:<{widths[0]}}", *cells, note)).rstrip())
        return "\n".join(lines)

    def facts(self) -> dict:
        """The plan for `--json`, in GiB."""
        stages = []
        for stage in self.stages:
            found = asdict(stage) | {"peak": stage.peak}
            del found["allowance"]
            sizes = ("weights", "on_device", "activations", "workspace", "other", "peak")
            stages.append({k: round(v / GIB, 4) if k in sizes else v for k, v in found.items()})
        budget = None if self.budget is None else round(self.budget / GIB, 4)
        return {"budget_gib": budget, "peak_gib": round(self.peak / GIB, 4), "stages": stages}


def parse_budget(text: str | int | float | None) -> int | str | None:
    """ "4GiB", "4096 MiB", "4GB", a number of GiB -> bytes; "auto" and None stay. ValueError for anything else."""
    if text is None or text == "auto":
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"vram budget: expected auto or a size such as 4GiB or 3500MiB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def reserve(budget: int) -> int:
    """What of a budget the plan leaves free, for the allocator's rounding and the libraries' small workspaces."""
    return budget // 32 + 32 * 2**20


def pieces(need: Need) -> int:
    """What torch's allocator may hold in freed pieces that the next activations do not fit into.

    Blocks are streamed rather than let that break the budget, but nothing is refused for it. Measured for the
    transformer on an H200: 0.31 GiB for 0.37 of activations and buffers at 1024 x 1024, 0.13 for 0.16 at 512 x 512.
    """
    return need.total * 7 // 8


def arithmetic(backend, device) -> str:
    """The name under which the formulas know a backend: "triton w4a8", and " int8" where it has no fp8."""
    kind = f"{backend.name} {backend.precision}"
    if kind == "triton w4a8" and not backend.module.eight_bit(device).is_floating_point:
        kind += " int8"
    return kind


def libraries(device) -> int:
    """Bytes that cuBLAS holds on a device for good: its workspace, as torch allocates it."""
    if device.type != "cuda":
        return 0
    import torch

    return CUBLAS if torch.cuda.get_device_capability(device) >= (9, 0) else CUBLAS // 4


# ---- weights --------------------------------------------------------------------------------------------------


def aligned(count: float) -> int:
    return round_up(int(count), 256)


def transformer_weights(config, rank: int, quantized_refiners: bool, e: int, arithmetic: str) -> Weights:
    """Bytes of a transformer from its header; rank 0 for a dense one. arithmetic: "dense", "triton w4a8", ..."""
    d, f = config.dim, config.ffn_dim
    adaln = min(d, 256)

    def linear(k: int, n: int, quantized: bool) -> list[int]:
        if not quantized:
            return [n * k * e]
        sizes = [n * k // 2, *(e * size for size in (n * (k // GROUP), k, rank * k, n * rank))]
        if arithmetic == "reference w4a16" and n * k <= KEPT_DENSE:
            sizes.append(n * k * e)
        return sizes + ([4 * n] if arithmetic.startswith("triton w4a8") else [])

    def block(quantized: bool, modulated: bool) -> tuple[int, int]:
        sizes = [d * e] * 4 + [config.head_dim * e] * 2
        for k, n in ((d, 3 * d), (d, d), (d, 2 * f), (f, d)):
            sizes += linear(k, n, quantized)
        if modulated:
            sizes += [4 * d * adaln * e, 4 * d * e]
        return sum(sizes), sum(map(aligned, sizes))

    kinds = [(bool(rank) and quantized_refiners, modulated) for modulated in (False, True)]
    kinds = [kind for kind in kinds for _ in range(config.n_refiner_layers)] + [(bool(rank), True)] * config.n_layers
    found = [block(*kind) for kind in kinds]
    patch, c = config.patch_dim, config.cap_feat_dim
    rest = d * patch + d + 256 * 1024 + 1024 + 1024 * adaln + adaln  # x_embedder, t_embedder
    rest += c + d * c + d + 2 * d + patch * d + patch + d * adaln + d  # cap_embedder, pad tokens, final layer
    return Weights(rest * e, tuple(size for size, _ in found), max((size for _, size in found), default=0))


def stored_form(form: str, e: int) -> tuple[float, int, float]:
    """The row of FORMS for any form; other GGUF types are dequantized on the host and come back in fp32."""
    if form == "float":
        return e, 0, 0
    if form in FORMS:
        return FORMS[form]
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    return size / block, 0, 4


def encoder_weights(stored: Mapping[str, tuple[str, tuple[int, ...]]], layers: int, e: int) -> Weights:
    """Bytes of an encoder's first `layers` layers from (form, shape) of each weight; its token table stays outside."""
    blocks = [[] for _ in range(layers)]
    for name, (form, shape) in stored.items():
        match = re.match(r"layers\.(\d+)\.", name)
        if match and int(match[1]) < layers:
            count = 1
            for side in shape:
                count *= side
            each, per_row, _ = stored_form(form, e)
            blocks[int(match[1])].append(int(count * each) + (per_row * shape[0] if len(shape) > 1 else 0))
    slot = max((sum(map(aligned, block)) for block in blocks), default=0)
    return Weights(0, tuple(map(sum, blocks)), slot)


def vae_weights(config, e: int) -> Weights:
    """Bytes of a VAE."""
    total = 0

    def conv(k: int, n: int, edge: int = 3) -> int:
        return n * k * edge * edge + n

    def resnet(k: int, n: int) -> int:
        return 2 * k + conv(k, n) + 2 * n + conv(n, n) + (conv(k, n, 1) if k != n else 0)

    channels = config.block_out_channels
    for order, more, ends in (
        (channels, 0, (3, 2 * config.latent_channels)),
        (channels[::-1], 1, (config.latent_channels, 3)),
    ):
        middle = channels[-1]
        total += conv(ends[0], order[0]) + 2 * order[-1] + conv(order[-1], ends[1])
        total += 2 * resnet(middle, middle) + 2 * middle + 4 * conv(middle, middle, 1)
        for i, n in enumerate(order):
            k = order[max(i - 1, 0)]
            total += resnet(k, n) + (config.layers_per_block - 1 + more) * resnet(n, n)
            total += conv(n, n) if i < len(order) - 1 else 0
    return Weights(total * e)


# ---- activations ----------------------------------------------------------------------------------------------


def linear_need(arithmetic: str, k: int, n: int, rank: int, rows: int, e: int, fp16: bool = False) -> tuple[int, int]:
    """(buffer, activations) that a linear takes beside its input and its output, at its widest moment."""
    if arithmetic == "dense":
        return 0, 0
    if arithmetic == "triton w4a16":
        if rows > FEW_ROWS or fp16:
            return n * k * e, 0
        return n * (k + rank) * e, rows * (k + rank) * e
    if arithmetic == "triton w4a8":
        return n * k, rows * (k + 4 + rank * e + (2 * n if fp16 else 0))
    if arithmetic == "triton w4a8 int8":
        return n * k, rows * (k + 4 + rank * e + 4 * n)
    if arithmetic == "reference w4a16":
        if n * k <= KEPT_DENSE:
            return 0, 0
        return n * k * e, rows * max(k * e, (rank + n) * e)
    if arithmetic == "reference w4a4":
        part = min(n, max(128, CHUNK // max(rows, k)))  # rows of the weight at a time
        return part * k * e, max(rows * 12 * k, rows * (k * (e + 1) + 4 * rank + 20 * part))
    return 0, rows * (k // 2 + k // 32 + 4 * rank)  # kitchen, nunchaku: codes, scales, the low-rank product


def transformer_need(config, rows: int, rank: int, arithmetic: str, fused: bool, e: int, fp16: bool = False) -> Need:
    """What a block takes for `rows` tokens (of all pictures): the widest of its moments.

    fused: whether norms, rotary positions and SwiGLU run as Triton kernels (`backends.fused`).
    """
    d, f, s = config.dim, config.ffn_dim, 4 if fp16 else e
    moments: list[tuple[int, int]] = []

    def moment(per_row: float, linear: tuple[int, int] = (0, 0)) -> None:
        moments.append((linear[0], round(rows * per_row) + linear[1]))

    def need(k: int, n: int) -> tuple[int, int]:
        return linear_need(arithmetic, k, n, rank, rows, e, fp16)

    c = int(fused and arithmetic.startswith("triton w4a8"))  # bytes of a code, made ahead of the linear and kept
    inside = (s + e) * d  # x and its norm
    moment(inside + 3 * d * e, need(d, 3 * d))
    turned = 0
    if not fused:
        moment(inside + 5 * d * e + 12 * d)  # q done, k normed, its turned halves in fp32
        turned = 2 * d * e
    moment(inside + c * d + 5 * d * e + turned + 4 * config.n_heads, need(d, d))
    moment((2 * s + e) * d + (0 if fused else 2 * d * max(s, e)))
    ahead = (2 * s + e) * d  # the block's input, x, the norm of x
    moment(ahead + c * d + (1 if fused else 2) * d * e)  # the attention's result is still there
    moment(ahead + 2 * f * e, need(d, 2 * f))
    moment(ahead + c * d + (3 if fused else 4) * f * e + c * f)
    moment(ahead + c * d + (f + d) * e, need(f, d))
    workspace, activations = max(moments, key=sum)
    return Need(workspace, activations)


def conditioning_bytes(config, image_tokens: int, captions: Sequence[int], e: int, fp16: bool = False) -> int:
    """Bytes of a `Conditioning`: refined caption tokens and the rotary angles of all tokens."""
    longest = max(map(padded, captions))
    context = len(captions) * longest * config.dim * (4 if fp16 else e)
    return context + len(captions) * (image_tokens + longest) * config.head_dim * 4


def latents_bytes(height: int, width: int, pictures: int) -> int:
    """Bytes of what the sampler holds in fp32: latents, flow, the predicted image, their successors."""
    return 6 * pictures * height * width


def padded(tokens: int) -> int:
    """Tokens with their padding."""
    return round_up(tokens, TOKENS_MULTIPLE)


def encoder_need(config, tokens: int, forms: Sequence[str], e: int) -> Need:
    """What a layer takes for one prompt, and a weight while it is dequantized."""
    c, f = config.hidden_size, config.intermediate_size
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    residual = 3 * c * e  # x before and after the attention, its norm
    moments = [
        (0, tokens * (residual + 3 * f * e)),
        (0, tokens * (2 * c * e + 12 * c)),
        (0, tokens * ((2 * c + q + 2 * k) * e + 10 * q)),
    ]
    chunks = [stored_form(form, e)[2] * min(ENCODER_CHUNK, f * c) for form in forms if form != "float"]
    if chunks:
        moments.append((round(f * c * e + max(chunks)), tokens * (residual + f * e)))
        moments.append((f * c * e, tokens * (residual + 2 * f * e)))
    return Need(*max(moments, key=sum))


def vae_values(config, encode: bool = False) -> float:
    """Values (in the VAE's dtype) per pixel of the picture that are alive at the widest moment of the decoder.

    Each moment: the input of the level, that of its layer, and within a resnet or a change of size the tensors that
    it makes; a level's size is a share of the picture's pixels.
    """
    channels = config.block_out_channels if encode else config.block_out_channels[::-1]
    count, moments = len(channels), []
    resnets = config.layers_per_block + (not encode)
    for level, n in enumerate(channels):
        share = 4.0 ** (-level if encode else level + 1 - count)
        first = channels[max(level - 1, 0)]
        for i in range(resnets):
            k = first if i == 0 else n
            held = (first if i else 0) + k
            moments.append((held + k + n) * share)
            moments.append((held + (3 * n if k != n or not i else 2 * n)) * share)
            moments.append((held + 3 * n) * share)
        if level < count - 1:
            moments.append((first + n + (n + n / 4 if encode else 8 * n)) * share)
    moments.append((channels[-1] * 2 + 3) * (4.0 ** (1 - count) if encode else 1))
    return max(moments)


def vae_need(config, height: int, width: int, pictures: int, e: int, tile: int | None) -> Need:
    """What decoding takes, whole or in tiles of `tile` cells, and the finished pictures in fp32."""
    area, values = height * width, vae_values(config)
    done = 12 * area  # a picture in fp32
    latents = 4 * config.latent_channels * pictures * (height // config.downscale) * (width // config.downscale)
    if tile is None:
        working = round(values * area * e)
    else:
        edge = tile * config.downscale
        piece = min(edge, height) * min(edge, width)
        working = round((values * e + 12) * piece) + 16 * area
    return Need(0, max(working + latents + (pictures - 1) * done, latents + 2 * pictures * done, 3 * pictures * done))


# ---- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A model for the plan: its weights, and what it takes beside them."""

    weights: Weights
    need: Need
    other: int = 0


def make_plan(
    *,
    title: str,
    encoder: Part | None,
    transformer: Part,
    vae: Weights,
    vae_config,
    height: int,
    width: int,
    pictures: int,
    vae_itemsize: int,
    budget: int | None,
    together: bool,
    streamed: Collection[str] = (),
    libraries: int = 0,
    held: Mapping[str, int] | None = None,
) -> Plan:
    """Share a budget out.

    encoder is None where the prompts are known already; together leaves transformer and VAE on the device through the
    others' stages; streamed names models of which no block may stay; libraries is what cuBLAS and the like hold for
    good; held tells bytes that "transformer" and "VAE" have on the device now, from the picture before. Raises
    ValueError where the budget does not hold a stage even with every block streamed.
    """
    usable = None if budget is None else budget - reserve(budget)
    room = float("inf") if usable is None else usable
    held = dict(held or {}) if together else {}
    stages = []
    for name, part in (("text encoder", encoder), ("transformer", transformer)):
        if part is None:
            continue
        fixed = part.need.total + part.other + libraries
        weights, allowance = part.weights, 0 if name in streamed else room - fixed - pieces(part.need)
        resident, on_device = weights.within(allowance)
        if fixed + on_device > room:
            raise _too_small(name, fixed + on_device, budget, title)
        others = {other: count for other, count in held.items() if other != name}
        stages.append(
            Stage(
                name=name,
                weights=weights.total,
                on_device=on_device,
                blocks=len(weights.blocks),
                resident=resident,
                activations=part.need.activations,
                workspace=part.need.workspace,
                other=part.other + libraries + sum(others.values()),
                allowance=allowance,
                beside=tuple(others),
            )
        )
    others = {"transformer": stages[-1].on_device} if together else {}

    cells = max(height, width) // vae_config.downscale
    tiles = [tile for tile in TILES if tile < cells]
    for tile in tiles if tiles and height * width > AUTO_PIXELS else [None, *tiles]:
        need = vae_need(vae_config, height, width, pictures, vae_itemsize, tile)
        peak = vae.total + need.total + libraries
        if peak <= room:
            break
    else:
        raise _too_small("VAE", peak, budget, title)
    stages.append(
        Stage(
            name="VAE",
            weights=vae.total,
            on_device=vae.total,
            blocks=0,
            resident=0,
            activations=need.activations,
            workspace=0,
            other=libraries + sum(others.values()),
            allowance=room,
            beside=tuple(others),
            note="" if tile is None else f"in tiles of {tile} cells",
        )
    )
    return Plan(title, tuple(stages), budget, usable, tile or "auto")


def full_size_plan(
    height: int,
    width: int,
    budget: int | None,
    *,
    rank: int = 256,
    encoder: str | None = "float8_e4m3fn",
    tokens: int = 128,
    arithmetic: str = "triton w4a8",
    together: bool = False,
    held: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of one picture by Z-Image Turbo's models in bf16 on a recent GPU, without any file.

    encoder: the form of its weights, None for prompts that are known; together and held as for `make_plan`.
    """
    config, vae_config, e = ZImageConfig(), VAEConfig(), 2
    side = 8 * config.patch_size
    image_tokens = padded((height // side) * (width // side))
    part = None
    if encoder is not None:
        sizes = TextEncoderConfig()
        stored = {}
        c, f, d = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
        q, k = sizes.num_heads * d, sizes.num_kv_heads * d
        for i in range(sizes.num_layers):
            for name, shape in enumerate(((q, c), (k, c), (k, c), (c, q), (f, c), (f, c), (c, f))):
                stored[f"layers.{i}.{name}"] = (encoder, shape)
            stored |= {f"layers.{i}.norm{j}": ("float", (n,)) for j, n in enumerate((c, c, d, d))}
        part = Part(encoder_weights(stored, sizes.num_layers, e), encoder_need(sizes, tokens, [encoder], e))
    return make_plan(
        title=f"1 picture of {width} x {height}",
        encoder=part,
        transformer=Part(
            transformer_weights(config, rank, True, e, arithmetic),
            transformer_need(config, image_tokens + padded(tokens), rank, arithmetic, True, e),
            conditioning_bytes(config, image_tokens, [tokens], e) + latents_bytes(height, width, 1),
        ),
        vae=vae_weights(vae_config, e),
        vae_config=vae_config,
        height=height,
        width=width,
        pictures=1,
        vae_itemsize=e,
        budget=budget,
        together=together,
        libraries=CUBLAS,
        held=held,
    )


def _too_small(name: str, needed: int, budget: int, title: str) -> ValueError:
    least = next(b for b in range(2**26, 2**50, 2**26) if b - reserve(b) >= needed)
    return ValueError(
        f"vram budget {readable(budget)}: the {name} needs {readable(needed)} for {title} even when all that can be "
        f"streamed is; give at least {readable(least)}, or draw smaller or fewer pictures at a time"
    )
