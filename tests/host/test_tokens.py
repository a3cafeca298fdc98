"""Token ids of the real Qwen vocabulary, which a ComfyUI checkout carries (COMFYUI_PATH), against golden ids."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from zimage_core.models.tokenizer import COMFYUI_TOKENIZER, find_tokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["vocab.json and merges.txt", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI checkout, which carries the Qwen vocabulary")
    root = Path(os.environ["COMFYUI_PATH"])
    folder = find_tokenizer(root / "models" / "text_encoders" / "qwen_3_4b.safetensors")
    assert folder == root.absolute() / COMFYUI_TOKENIZER
    if request.param == "tokenizer.json":
        from transformers import Qwen2Tokenizer

        whole = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        folder = tmp_path_factory.mktemp("tokenizer")
        whole.save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
    return load_tokenizer(folder)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["prompt"][:20]))
def test_golden_token_ids(tokenizer, case):
    assert tokenizer(case["prompt"]) == case["input_ids"]
