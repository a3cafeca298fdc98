"""Prompts: reading what a call is given, and a cache of the features of the latest prompts."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from .lora.read import Loras
from .models.tokenizer import MAX_TOKENS, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .job import Job

KEPT = 32  # prompts, a megabyte each
Caption: TypeAlias = "str | Tensor"
"""A prompt, or its features (L, C)."""

logger = logging.getLogger(__name__)


class Captions:
    """A cache on the host, prompt -> cap_feats (L, C), of the prompts that were used last."""

    def __init__(self, tokenizer: Path):
        self.wanted = 0  # prompts of the last `Pipeline.encode`, which are kept however many
        self._tokenizer_file = tokenizer
        self._feats: OrderedDict[str, Tensor] = OrderedDict()
        self._made_by: tuple[Loras, int] = ((), MAX_TOKENS)  # the text encoder's LoRAs, the limit of tokens

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._tokenizer_file)

    def find(self, job: Job) -> None:
        """Give a job the cached features of its texts, and the tokens of the texts that are not cached."""
        if (made_by := (_encoder_loras(job.loras), job.limit)) != self._made_by:
            self._feats.clear()
            self._made_by = made_by
        for text in job.texts:
            if text in self._feats:
                job.feats[text] = self._feats[text]
            elif text not in job.tokens:
                job.tokens[text] = self.tokenizer(text, job.limit)

    def keep(self, job: Job) -> None:
        """Cache the features of a job's texts; the oldest entries are dropped when there are too many."""
        for text in job.texts:
            self._feats[text] = job.feats[text]
            self._feats.move_to_end(text)
        while len(self._feats) > max(KEPT, self.wanted):
            self._feats.popitem(last=False)


def read_captions(name: str, texts: Any, embeds: Any) -> list[Caption]:
    """Prompts, or the features given instead of them, as a list.

    ValueError, under their name, unless they are either Unicode text or finite tensors (L, C).
    """
    if embeds is not None:
        many = isinstance(embeds, Sequence) or isinstance(embeds, Tensor) and embeds.ndim == 3
        given = list(embeds) if many else [embeds]
        if texts is not None:
            raise ValueError(f"{name}: expected text or features (embeds), found both; leave one out")
        for feats in given:
            if not isinstance(feats, Tensor) or feats.ndim != 2 or not len(feats) or not feats.isfinite().all():
                found = tuple(feats.shape) if isinstance(feats, Tensor) else type(feats).__name__
                raise ValueError(f"{name} embeds: expected finite tensors (tokens, width), found {found}")
        return [feats.detach().cpu() for feats in given]
    prompts = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else [texts]
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: expected UTF-8 text, found other bytes; save or type it as UTF-8") from None
    return prompts


def read_negative(positive: int, guided: bool, texts: Any, embeds: Any) -> list[Caption]:
    """The negative prompts, one for all prompts or one for each; none without guidance.

    ValueError as `read_captions`, and for another number of them. Logs a warning if they have no effect.
    """
    found = read_captions("negative prompt", "" if texts is None and embeds is None else texts, embeds)
    if len(found) not in (1, positive):
        raise ValueError(f"negative prompts: expected 1, or {positive} as there are prompts, found {len(found)}")
    if not guided and any(isinstance(one, Tensor) or one for one in found):
        logger.warning(
            "negative prompt: has no effect without guidance; give a guidance above 0, 1 say, or a NAG scale"
        )
    return found if guided else []


def _encoder_loras(loras: Loras) -> Loras:
    """The LoRAs that change the text encoder."""
    return tuple((found, strength) for found, strength in loras if found.text_encoder)
