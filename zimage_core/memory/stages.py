"""What each stage of a picture takes of the device beside a model's weights, by running the stage on the meta device.

Every function takes a model on any device and returns bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import sampler
from ..models.controlnet import ControlNet
from ..models.guidance import Nag
from ..models.text_encoder import PADDED, TextEncoder
from ..models.transformer import PIXELS_PER_CELL, TOKENS_MULTIPLE, Conditioning, Hooks, ZImageTransformer
from ..models.vae import VAE, VAEConfig, decode_image
from ..sizes import round_up
from ..tiles import Tiles
from .meta import META, LiveBytes, M, on_meta, peak_bytes
from .placement import slots

CUBLAS = 2**25  # the workspace that torch gives cuBLAS on Hopper and later; a quarter of it before

_known: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What one call asks for.

    captions: tokens of one caption for all pictures, or of one for each; negative: those of the negative prompts in the
    same way, none where nothing follows them; encoded: tokens of the longest prompt that is still to be encoded, 0
    where all are known. guided: whether guidance follows the negative prompts, as nag does. varied: whether each
    picture begins with features of its own. tile: cells of a tile's edge, None for whole pictures.
    """

    height: int
    width: int
    pictures: int
    captions: Sequence[int]
    negative: Sequence[int] = ()
    encoded: int = 0
    guided: bool = True
    nag: Nag | None = None
    varied: bool = False
    tile: int | None = None

    def __str__(self) -> str:
        count = f"{self.pictures} pictures" if self.pictures > 1 else "1 picture"
        return f"{count} of {self.width} x {self.height}"


def encoding_bytes(encoder: TextEncoder, tokens: int) -> int:
    """Encoding one prompt, padded as on a GPU."""
    tokens = round_up(tokens, PADDED)

    def encode(model: TextEncoder, live: LiveBytes) -> None:
        model.embed_tokens = encoder.embed_tokens  # the token table stays where it is
        ids = torch.zeros(1, tokens, dtype=torch.long, device=next(slots(encoder.embed_tokens))[2].device)
        model(ids, run_block=live.run_block, device=META)

    return _counted(encoder, tokens, encode)


def sampling_bytes(transformer: ZImageTransformer, request: Request, controls: Sequence[ControlNet] = ()) -> int:
    """Preparing prompts and sampling all pictures of a request together.

    controls: the ControlNets beside the transformer, one for each control picture.
    """
    captions, negative = map(_padded, (request.captions, request.negative))
    request = replace(request, captions=captions, negative=negative, encoded=0)
    pictures, nag = request.pictures, request.nag

    def sample(model: ZImageTransformer, live: LiveBytes) -> None:
        hooks = Hooks(run_block=live.run_block)

        cells = request.height // PIXELS_PER_CELL, request.width // PIXELS_PER_CELL
        tiles = Tiles.over(*cells, request.tile or max(cells))
        first = replace(tiles, rows=tiles.rows[:2], columns=tiles.columns[:1])  # the others take no more

        def prepare(prompt: Sequence[int]) -> Conditioning:
            feats = [torch.empty(n, model.config.cap_feat_dim, dtype=model.dtype, device=META) for n in prompt]
            return model.prepare(feats, PIXELS_PER_CELL * tiles.height, PIXELS_PER_CELL * tiles.width, hooks)

        cond, *others = map(prepare, filter(None, (captions, negative)))
        contexts = [torch.empty(1, net.config.channels, tiles.height, tiles.width, device=META) for net in controls]
        prepared = tuple(on_meta(net).prepare(x, model, cond) for net, x in zip(controls, contexts))
        early = [prepare((captions * pictures)[:pictures])] if request.varied else []
        if nag:
            cond, *early = (model.guided(found, others[0], nag) for found in (cond, *early))
        cond, *others = (replace(found, controls=prepared) for found in (cond, *others))
        forward = functools.partial(model, hooks=hooks)
        sampler.denoise(
            first.model(forward) if request.tile else forward,
            torch.empty(pictures, model.config.in_channels, *cells, device=META),
            torch.linspace(1, 0, 3),
            cond,
            negative=others[0] if others and request.guided else None,
            guidance=float(bool(others) and request.guided),
            early=(early[0], 0.4) if early else None,
            on_step=lambda *_: None,
        )

    kinds = tuple((net.config, net.backend, net.x_embedder.weight.dtype) for net in controls)
    return _counted(transformer, (request, kinds), sample)


def _padded(captions: Sequence[int]) -> tuple[int, ...]:
    """Lengths of captions as they are padded, all but the first as the longest: others take no more."""
    lengths = [round_up(tokens, TOKENS_MULTIPLE) for tokens in captions]
    longest = max(lengths, default=0)
    first = longest if set(lengths) == {longest} else longest - TOKENS_MULTIPLE
    return (first, *[longest] * (len(lengths) - 1)) if lengths else ()


def decoding_bytes(vae: VAE, height: int, width: int, pictures: int = 1, tile: int | None = None) -> int:
    """Decoding pictures one after another, whole or in tiles of `tile` cells."""
    return _decoding_bytes(vae.config, vae.decoder.conv_in.weight.dtype, height, width, pictures, tile)


@functools.cache
def _decoding_bytes(
    config: VAEConfig, dtype: torch.dtype, height: int, width: int, pictures: int, tile: int | None
) -> int:
    with META:
        vae = VAE(config).to(dtype)
    decoder: nn.Module = vae.decoder
    plain, down = decoder.forward, config.downscale

    def decode(live: LiveBytes) -> None:
        decoder.forward = lambda x: live.run_once(decoder, plain, x)
        latents = torch.empty(pictures, config.latent_channels, height // down, width // down, device=META)
        decode_image(vae, latents, tile or "off").mul_(255).round_()

    return peak_bytes(decode)


def _counted(model: M, key: Hashable, run: Callable[[M, LiveBytes], object]) -> int:
    """Peak bytes of run(the model on the meta device, the counter); counted once for a model and its adapters."""
    return remembered(model, key, lambda: peak_bytes(functools.partial(run, on_meta(model))))


def remembered(model: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
    """What make() returned for a model, with the adapters that it has, and a key."""
    known, key = _known.setdefault(model, {}), (getattr(model, "adapter_version", 0), key)
    if key not in known:
        known[key] = make()
    return known[key]


def libraries(device: torch.device) -> int:
    """Bytes that cuBLAS holds on a device for good: its workspace, as torch allocates it."""
    if device.type != "cuda":
        return 0
    return CUBLAS if torch.cuda.get_device_capability(device) >= (9, 0) else CUBLAS // 4
