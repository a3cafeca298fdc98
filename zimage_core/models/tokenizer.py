"""Prompt to token ids: the chat template, and finding and loading Qwen's tokenizer.

Source: diffusers/pipelines/z_image/pipeline_z_image.py@v0.42.1 (template, limit).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 512
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
HUB_TOKENIZERS = (("Tongyi-MAI/Z-Image-Turbo", "tokenizer/"), ("Qwen/Qwen3-4B", ""))

_TOKENIZER_REMEDY = "put Qwen3's tokenizer.json, or its vocab.json, merges.txt and tokenizer_config.json, there"


class Tokenizer:
    """Token ids of a prompt: chat template, then byte-pair encoding, cut at 512 tokens or another limit.

    As in diffusers, special-token strings inside a prompt become those tokens.
    """

    def __init__(self, encode: Callable[[str], list[int]], where: str):
        self.encode = encode
        self.where = where
        if len(encode("<|im_start|>")) != 1:
            raise ValueError(f"{where}: expected Qwen's tokenizer, found no <|im_start|>; {_TOKENIZER_REMEDY}")

    def __call__(self, prompt: str, limit: int = MAX_TOKENS) -> list[int]:
        """Token ids of one prompt, unpadded; warns if the prompt is cut."""
        ids = self.encode(TEMPLATE.format(prompt))
        if len(ids) > limit:
            message = f"the prompt takes {len(ids)} tokens and only the first {limit} are used; shorten it"
            warnings.warn(message, stacklevel=2)
        return ids[:limit]


def load_tokenizer(path) -> Tokenizer:
    """Tokenizer from a folder with tokenizer.json, or with vocab.json and merges.txt, or from a tokenizer.json.

    Never uses the network. Raises ValueError where the files are missing, damaged or not Qwen's.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        import tokenizers

        check_json(file, "model")

        def read_fast(path: str) -> Callable[[str], list[int]]:
            fast = tokenizers.Tokenizer.from_file(path)
            fast.no_truncation()
            fast.no_padding()
            return lambda text: fast.encode(text, add_special_tokens=False).ids

        return Tokenizer(_opened(file, read_fast), str(file))
    if not has_tokenizer(path):
        raise ValueError(f"{path}: expected a tokenizer, found none of its files; {_TOKENIZER_REMEDY}")
    import transformers

    check_json(path / "vocab.json", "a")

    def read_slow(path: str) -> Callable[[str], list[int]]:
        slow = transformers.Qwen2Tokenizer.from_pretrained(path, local_files_only=True)
        return lambda text: slow(text, add_special_tokens=False)["input_ids"]

    return Tokenizer(_opened(path, read_slow), str(path))


def _opened(path: Path, read: Callable[[str], Callable[[str], list[int]]]) -> Callable[[str], list[int]]:
    """The function, text -> token ids, that `read` makes of a file or folder; ValueError if it or one word fails."""
    try:
        encode = read(str(path))
        encode("a")
        return encode
    except Exception as error:  # tokenizers has no narrower class, and transformers meets broken files with many
        words = " ".join(str(error).split())
        message = f"{path}: expected Qwen's tokenizer, found a broken one ({words}); {_TOKENIZER_REMEDY}"
        raise ValueError(message) from error


def check_json(path: Path, key: str) -> None:
    """ValueError unless a file holds a JSON object with a key (a Git LFS pointer, say, does not)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{path}: expected a JSON object with {key!r}, found otherwise; download it again")


def has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def find_tokenizer(encoder_path, comfyui=None) -> Path:
    """The folder of the tokenizer for an encoder file or folder on this machine.

    Looks beside the encoder, in `tokenizer/` there and one folder up, in the ComfyUI install (its root `comfyui`,
    or the one around the encoder), then in the hub's cache. ValueError if there is none.
    """
    path = Path(encoder_path).absolute()
    folder = path if path.is_dir() else path.parent
    roots = [*([Path(comfyui)] if comfyui else []), *path.parents, *path.resolve().parents]
    places = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for place in (*places, *(root / COMFYUI_TOKENIZER for root in roots)):
        if has_tokenizer(place):
            return place
    if cached := cached_tokenizer():
        return cached
    raise ValueError(
        f"{folder}: expected a tokenizer beside the text encoder, in ComfyUI or in the hub's cache, found none; "
        f"{_TOKENIZER_REMEDY}"
    )


def cached_tokenizer() -> Path | None:
    """The folder of Qwen3's tokenizer in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for repo, prefix in HUB_TOKENIZERS:
        for names in TOKENIZER_FILES:
            found = [try_to_load_from_cache(repo, prefix + name) for name in names]
            files = [file for file in found if isinstance(file, str)]
            if len(files) == len(names):
                return Path(files[0]).parent
    return None
