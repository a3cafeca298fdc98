"""CLIP: ComfyUI's own for the files that it reads, else the core's text encoder with the same interface."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from torch import nn

from ...zimage_core.files import get_tokenizer
from ...zimage_core.formats.encoder import load_text_encoder
from ...zimage_core.memory.stages import encoding_bytes, libraries
from ...zimage_core.models.text_encoder import TextEncoder
from ...zimage_core.models.tokenizer import MAX_TOKENS, TEMPLATE, Tokenizer, load_tokenizer
from ...zimage_core.sizes import readable
from . import messages
from .files import DEMO, contained, find, reads_encoder
from .patcher import Adapted, StreamingPatcher, describe_need

NO_WEIGHTS = (
    "this text encoder cannot be {} here: use a file of Qwen3-4B that Load CLIP reads, such as qwen_3_4b.safetensors"
)
TOKENS_BEHIND = 5  # of the chat template, after the prompt
LAYER = -2  # the one whose output Z-Image reads
ENCODER_PREFIX = "qwen3_4b.transformer.model."  # of weight names in ComfyUI's own Z-Image encoder


def load_clip(name: str) -> comfy.sd.CLIP:
    """Load a file or folder of `text_encoders` as CLIP: ComfyUI's own where it reads the file, else `core_clip`."""
    path = find("text_encoders", name, "text_encoder")
    if name != DEMO and reads_encoder(path):
        return comfy.sd.load_clip(
            ckpt_paths=[str(path)],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=comfy.sd.CLIPType.LUMINA2,
        )
    return core_clip(path, find("text_encoders", name, "tokenizer") if name == DEMO else None)


def half_or_float(device: torch.device) -> torch.dtype:
    """bf16 where a device has it, fp16 on a Turing, where fp32 would take twice the memory, else fp32."""
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def core_clip(path: Path, tokenizer_path: Path | None = None) -> comfy.sd.CLIP:
    """A CLIP of the core's text encoder and tokenizer."""
    root = Path(comfy.sd.__file__).parents[1]
    if tokenizer_path is None:
        tokenizer_path = get_tokenizer(path, comfyui=root)
        for file in (*tokenizer_path.glob("*.json"), *tokenizer_path.glob("*.txt")):
            contained(file, root)
    tokenizer = load_tokenizer(tokenizer_path)
    device = comfy.model_management.text_encoder_device()
    offload = comfy.model_management.text_encoder_offload_device()
    loaded = load_text_encoder(path, device=offload, dtype=half_or_float(device), compute_device=device)
    encoder = CoreEncoder(loaded)
    clip = comfy.sd.CLIP(no_init=True)  # its constructor loads a patcher of its own; below is what clone() copies
    clip.cond_stage_model = encoder
    clip.tokenizer = CoreTokenizer(tokenizer)
    clip.tokenizer_options = {}
    clip.layer_idx = clip.apply_hooks_to_conds = None
    clip.use_clip_schedule = False
    clip.patcher = EncoderPatcher(encoder, load_device=device, offload_device=offload)
    clip.patcher.is_clip = True
    return clip


class EncoderPatcher(StreamingPatcher):
    """The CLIP's patcher."""

    what = "text encoder"
    no_weights = NO_WEIGHTS


def describe_encoder(clip: comfy.sd.CLIP) -> str:
    """One line: the device memory of a text encoder."""
    if isinstance(clip.patcher, EncoderPatcher):
        need = clip.cond_stage_model.need(MAX_TOKENS)
        return f"text encoder: {describe_need(clip.patcher, need, f'for a prompt of {MAX_TOKENS} tokens')}"
    return f"text encoder: {readable(clip.patcher.model_size())} weights, run by ComfyUI itself"


class CoreTokenizer:
    """The core's tokenizer with the interface of ComfyUI's. There are no prompt weights in Z-Image."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, llama_template: str | None = None, **kwargs
    ) -> dict:
        """{"zimage": one row of (id, weight 1)}. Long prompts are not cut, as in ComfyUI; the library does cut them."""
        ids = self.tokenizer.encode((llama_template or TEMPLATE).format(text))
        return {"zimage": [[(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(ids)]]}

    def untokenize(self, token_weight_pair):
        return [(pair, "") for pair in token_weight_pair]

    def state_dict(self) -> NoReturn:
        raise ValueError(NO_WEIGHTS.format("saved"))


class CoreEncoder(Adapted):
    """The core's text encoder with the interface of ComfyUI's."""

    core: TextEncoder

    def __init__(self, encoder: TextEncoder):
        linears = [(name, m) for name, m in encoder.named_modules() if hasattr(m, "in_features")]
        sizes = {f"{ENCODER_PREFIX}{name}.weight": (m.out_features, m.in_features) for name, m in linears}
        shapes = {name: torch.empty(size, device="meta", dtype=encoder.dtype) for name, size in sizes.items()}
        super().__init__(encoder, list(encoder.layers), shapes)
        self.manual_cast_dtype = None
        self.dtypes = {encoder.dtype}

    @property
    def encoder(self) -> TextEncoder:
        return self.core

    @property
    def body(self) -> nn.Module:
        """The layers; the token table stays on the host."""
        return self.core.layers

    def need(self, tokens: int) -> int:
        """Bytes of activations for a prompt of this length, and of a weight while it is dequantized."""
        device = comfy.model_management.text_encoder_device()
        return encoding_bytes(self.encoder, tokens) + libraries(device)

    def memory_estimation_function(self, tokens: dict, device=None) -> int:
        """`need` of the longest row; ComfyUI calls this before it places the layers."""
        return self.need(max(map(len, tokens.get("zimage", ())), default=1))

    def state_dict(self, *args, **kwargs) -> Any:
        """{name: empty tensor} of the linears as in ComfyUI's own encoder: for key maps, not for saving."""
        return dict(self.stock)

    def encode_token_weights(self, tokens: dict):
        """Features (1, L, C) fp32, None for the pooled vector, the mask: as from ComfyUI's Z-Image encoder."""
        outputs = []
        for row in tokens["zimage"]:
            ids, words = [pair[0] for pair in row], self.encoder.config.vocab_size
            if max(ids) >= words:
                raise ValueError(
                    f"the tokenizer gives token {max(ids)}, this text encoder knows {words}: put the tokenizer files "
                    "that belong to it beside it"
                )
            where = {"run_block": self.streamer.run_block, "device": self.streamer.device}
            outputs.append(self.encoder(torch.tensor([ids]), **where).float())
        cond = torch.cat(outputs).to(comfy.model_management.intermediate_device())
        return cond, None, {"attention_mask": torch.ones(cond.shape[:2], dtype=torch.int64)}

    def set_clip_options(self, options: dict) -> None:
        """ValueError for another layer than that which Z-Image was trained on: the last is not even loaded."""
        layer = options.get("layer")
        if layer not in (None, LAYER):
            raise ValueError(
                f"Z-Image reads layer {LAYER} of its text encoder, not {layer}: remove CLIP Set Last Layer, or set it "
                f"to {LAYER}"
            )

    def generate(self, *args, **kwargs) -> NoReturn:
        raise ValueError(NO_WEIGHTS.format("used to write text"))

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, sd):
        return [], []


def length_of(tokens: dict) -> int:
    """The longest row of a CLIP's tokens."""
    return max((len(row) for rows in tokens.values() for row in rows), default=0)


def words_cut(clip: comfy.sd.CLIP, prompt: str, limit: int) -> str:
    """The first words of a prompt that are cut off at a limit of tokens."""
    words = prompt.split()

    def end(count: int) -> int:
        return length_of(clip.tokenize(" ".join(words[:count]))) - TOKENS_BEHIND

    kept = bisect.bisect_right(range(1, len(words) + 1), limit, key=end)
    return " ".join(words[kept : kept + 6])


def encode_prompt(clip: comfy.sd.CLIP, prompt: str, limit: int = MAX_TOKENS) -> list:
    """CONDITIONING of a prompt, cut at a limit of tokens; the node says what is cut, and that a long one is long.

    The encoder leaves the device afterwards, to make it free for sampling.
    """
    tokens = clip.tokenize(prompt)
    length, text = length_of(tokens), ""
    if length > limit:
        tokens = {name: [row[:limit] for row in rows] for name, rows in tokens.items()}
        text = f"{length} tokens, the first {limit} are used: cut from {words_cut(clip, prompt, limit)!r} on"
    elif length > MAX_TOKENS:
        text = f"{length} tokens: Z-Image was trained on prompts of up to {MAX_TOKENS}"
    if text:
        messages.say(text, messages.executing_node())
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    release(clip.patcher)
    return conditioning


def release(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Take one model off its device and out of ComfyUI's list of loaded ones."""
    if patcher.load_device == patcher.offload_device:
        return
    keep = [
        m for m in comfy.model_management.current_loaded_models if m.model is not None and not m.model.is_clone(patcher)
    ]
    comfy.model_management.free_memory(1e30, patcher.load_device, keep)
