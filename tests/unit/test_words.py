"""What is said is true and of use: budgets, sizes, devices, options, files of other layouts."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sys
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core import cli, device, load_pipeline
from zimage_core.demo import demo_files
from zimage_core.files import is_demo_like
from zimage_core.formats.identify import EXPECTED, identify
from zimage_core.formats.load import check_transformer
from zimage_core.formats.safetensors import read_header
from zimage_core.formats.vae import load_vae
from zimage_core.linear import backends
from zimage_core.memory import plan
from zimage_core.sizes import readable

SIZE = {"height": 32, "width": 32, "num_inference_steps": 1, "generator": 1}
BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def count(text: str) -> float:
    number, unit = text.split()
    return float(number) * BYTES[unit]


@pytest.mark.parametrize("budget", ["1MiB", "20MiB", "33MiB"])
def test_a_budget_that_is_refused_adds_up(tiny_files, budget):
    """What is needed and what stays free are less than given, and not more than what would do, which then does."""
    with pytest.raises(ValueError, match="vram budget") as caught:
        load_pipeline(**tiny_files, device="cpu", vram_budget=budget)("a", **SIZE)
    sizes = [count(found) for found in re.findall(r"\d[\d.]* [KMG]iB", str(caught.value))]
    given, needed, free, least = sizes
    assert needed + free > given and needed + free <= 1.02 * least  # of the words' rounding
    load_pipeline(**tiny_files, device="cpu", vram_budget=f"{least / 2**20}MiB")("a", **SIZE)


@pytest.mark.parametrize(
    ("size", "words"), [(300, "0 KiB"), (3000, "3 KiB"), (3 * 2**20, "3 MiB"), (2**29, "0.50 GiB")]
)
def test_sizes_in_words(size, words):
    assert readable(size) == words


def test_inspect_tells_a_small_file_s_size(tiny_files, capsys):
    assert cli.main(["inspect", str(tiny_files["vae"])]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^size: \d+ [KM]iB$", said, re.MULTILINE) and "gib" not in said


def test_a_file_of_another_layout_is_not_just_called_incomplete(tiny_files, tmp_path):
    """Complete, but its norms under no name that is known for them: told as such, or as laid out otherwise."""
    tensors = load_file(tiny_files["model"])
    metadata = read_header(tiny_files["model"]).metadata
    del tensors["layers.0.attention_norm1.weight"]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="found none; the file is incomplete or laid out otherwise"):
        check_transformer(tmp_path / "x.safetensors")


def test_nothing_is_expected_and_found_at_once(tiny_files, tmp_path):
    """For each kind of file and each loader, what is expected and what is found are two things."""
    files = [*tiny_files.values(), demo_files()["model"].parent / "loras" / "frame.safetensors"]
    save_file({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "small.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "half.safetensors")
    for path, role in product([*files, *tmp_path.iterdir()], EXPECTED):
        found = identify(path)
        if found.role == role:
            continue
        with pytest.raises(ValueError) as caught:
            found.require(role)
        expected, seen = re.search("expected (.*?), found (.*?)(?:;|$)", str(caught.value)).groups()
        assert expected != seen and seen not in expected


def test_a_vae_is_never_expected_where_one_is_found(tiny_files, tmp_path):
    """A damaged VAE: the sentence names what is wrong with it."""
    tensors = load_file(tiny_files["vae"])
    key = next(iter(tensors))
    changes = {"missing": {k: v for k, v in tensors.items() if k != key}}
    changes["unknown"] = tensors | {"x": tensors[key].clone()}
    for change, changed in changes.items():
        save_file(changed, tmp_path / "vae.safetensors", read_header(tiny_files["vae"]).metadata)
        with pytest.raises(ValueError) as caught:
            load_vae(tmp_path / "vae.safetensors")
        assert not re.search("expected .*VAE.*found .*VAE", str(caught.value))
        assert repr("x" if change == "unknown" else "")[1:-1] in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "mps", "xpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_backend_speaks_of_none(name, dtype, monkeypatch):
    """ "mps sm_None" was said of a Mac."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends.capability.cache_clear()
    reasons = [why or "" for _, why, _ in backends.report(torch.device(name), dtype)]
    assert backends.describe(torch.device(name)) == name
    assert not any("None" in why for why in reasons) and any(name in why for why in reasons)
    backends.capability.cache_clear()


def test_errors_of_the_system_are_told_in_words(monkeypatch, capsys, tiny_files):
    for error, words in (
        (OSError(28, "No space left on device"), "zimage: no space left on device; free some space"),
        (OSError(13, "Permission denied", "x"), "zimage: x: permission denied; check the path and its permissions"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("zimage_core.cli.inspect.inspect_file", fail)
        assert cli.main(["inspect", "x"]) == 2
        assert capsys.readouterr().err.strip() == words


def test_a_value_that_begins_with_a_dash(monkeypatch, capsys):
    arguments = ["generate", "a", "--vram-budget", "-4GiB"]
    monkeypatch.setattr(sys, "argv", ["zimage", *arguments])
    with pytest.raises(SystemExit):
        cli.main(arguments)
    said = capsys.readouterr().err
    assert "write NAME=-4GiB if it is the value" in said
    assert cli.main(["generate", "a", "--vram-budget=-4GiB"]) == 2
    assert "vram budget: expected auto or a size such as 4GiB" in capsys.readouterr().err


def test_models_made_from_the_demo_are_treated_as_the_demo(tmp_path, caplog, tiny_files):
    """Its default size, and what is said outside of the sizes that it was trained on."""
    files = demo_files()
    copy = tmp_path / "made-from-it.safetensors"
    shutil.copy(files["model"], copy)
    assert is_demo_like(copy) and is_demo_like(None) and not is_demo_like(tiny_files["model"])
    pipeline = load_pipeline(copy, files["text_encoder"], files["vae"], tokenizer=files["tokenizer"], device="cpu")
    (picture,) = pipeline("a red star", num_inference_steps=1)
    assert picture.size == (256, 256) and "was trained on" not in caplog.text
    pipeline("a red star", num_inference_steps=1, height=64, width=64)
    assert "64 x 64: the bundled demo was trained on edges of 128 to 512 pixels" in caplog.text


def test_host_memory_counts_where_blocks_are_streamed_to_a_gpu():
    """16 of the blocks' 17 GiB wait on a host of 4: refused before any work, in words that add up."""
    limits = plan.Limits(budget=2**32, host=2**32)
    stage = plan.Stage("transformer", 17 * 2**30, 2**30, 34, 2, 2**20, 0, 2**30, streamed=16 * 2**30)
    request = plan.Request(64, 64, 1, [9])
    with pytest.raises(ValueError, match=r"32 of 34 blocks of the transformer would wait in 16\.00 GiB of host memory"):
        plan._checked(stage, request, limits)
    assert plan._checked(stage, request, plan.Limits(budget=2**32, host=2**35)) is stage


def test_a_plan_knows_what_waits_on_the_host(tiny_files):
    pipeline = load_pipeline(**tiny_files, device="cpu")
    whole = pipeline.plan(["a"], 32, 32).stage("transformer")
    assert whole.streamed == 0
    pipeline.vram_budget = plan.parse_budget("64MiB")
    with pytest.raises(ValueError, match="give at least (.*), or") as caught:
        pipeline.vram_budget = plan.parse_budget("1MiB")
        pipeline.plan(["a"], 32, 32)
    pipeline.vram_budget = int(count(re.search(r"give at least (\d[\d.]* \wiB)", str(caught.value))[1]))
    stage = pipeline.plan(["a"], 32, 32).stage("transformer")
    assert 0 <= stage.streamed <= stage.weights


def test_the_memory_of_windows(monkeypatch):
    """MEMORYSTATUSEX: the commit limit, memory and page file, is its fifth entry."""

    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(status):
            numbers = ctypes.cast(status, ctypes.POINTER(ctypes.c_uint64))
            assert ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] == 64  # its length
            numbers[1], numbers[3] = 2**33, 2**34
            return 1

    monkeypatch.setattr(ctypes, "windll", type("Windll", (), {"kernel32": Kernel}), raising=False)
    assert device._windows_memory() == 2**34
    monkeypatch.setattr(Kernel, "GlobalMemoryStatusEx", staticmethod(lambda status: 0))
    assert device._windows_memory() is None


def test_facts_are_whole_numbers_too(tiny_files, capsys):
    assert cli.main(["inspect", str(tiny_files["vae"]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == sum(facts["bytes_by_dtype"].values()) > 0
