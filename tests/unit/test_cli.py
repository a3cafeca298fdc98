"""The command line: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import cli, metadata, pipeline
from zimage_core.cli.doctor import package_state
from zimage_core.formats.identify import likely_variant

ROOT = Path(__file__).parents[2]
REAL_HEADER = ROOT / "tests" / "data" / "real_model_expected_tensors_r256.json"
ZIMAGE = [sys.executable, "-m", "zimage_core"]


@pytest.fixture
def generate(tiny_files):
    options = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]

    def run(*arguments: str, prompt: str = "a cat") -> int:
        small = ["--width=48", "--height=32", "--steps=2", "--device=cpu"]
        return cli.main(["generate", prompt, *options, *small, *arguments])

    return run


@pytest.fixture(scope="session")
def full_size_file(tmp_path_factory) -> Path:
    """A sparse file with the header of the real r256 checkpoint: 4.5 GB long, a few kilobytes on the disk."""
    real = json.loads(REAL_HEADER.read_text(encoding="utf-8"))
    sizes = {"bfloat16": ("BF16", 2), "int8": ("I8", 1)}
    quantization = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 256}
    header = {"__metadata__": {"quantization_config": json.dumps(quantization), "config": json.dumps(real["config"])}}
    end = 0
    for name, (dtype, shape) in real["tensors"].items():
        code, width = sizes[dtype]
        for side in shape:
            width *= side
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + width]}
        end += width
    raw = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("real") / "real.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


@pytest.mark.parametrize(
    ("asked", "steps", "guidance"),
    [
        ([], 8, 0.0),
        (["--preset=base"], 30, 4.0),
        (["--preset=base", "--steps=3"], 3, 4.0),
        (["--preset=turbo", "--guidance=1"], 8, 1.0),
    ],
)
def test_presets_fill_in_what_is_not_given(asked, steps, guidance, tiny_files, tmp_path, capsys):
    """In `generate` and in `batch` alike."""
    files = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    small = [*files, "--width=16", "--height=16", *asked, "--device=cpu"]
    assert cli.main(["generate", "a", f"--out={tmp_path / 'a.png'}", "--json", *small]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["steps"], report["guidance"]) == (steps, guidance)
    (tmp_path / "rows.txt").write_text("a\n")
    assert cli.main(["batch", str(tmp_path / "rows.txt"), f"--out={tmp_path / 'out'}", *small]) == 0
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert (line["steps"], line["guidance"]) == (steps, guidance)


def named_model(path: Path, model: Path, metadata: dict[str, str]) -> None:
    """A transformer under another name, with more metadata."""
    with safe_open(model, "pt") as file:
        save_file(load_file(model), path, file.metadata() | metadata)


@pytest.mark.parametrize(
    ("name", "metadata", "variant"),
    [
        ("svdq-int4_r256-z-image-turbo", None, "turbo"),
        ("z_image_turbo_bf16", None, "turbo"),
        ("z_image_bf16", None, "base"),
        ("Z-Image-Base-fp8_scaled", None, "base"),
        ("my-fine-tune", None, None),
        ("z-image-demo", None, None),
        ("z_image_turbo_bf16", {"variant": "base"}, "base"),
        ("my-fine-tune", {"variant": "something"}, None),
    ],
)
def test_a_file_of_z_image_itself_is_recognized(name, metadata, variant, tiny_files, tmp_path, capsys):
    path = tmp_path / f"{name}.safetensors"
    named_model(path, tiny_files["model"], metadata or {})
    assert likely_variant(path) == variant
    assert cli.main(["inspect", str(path)]) == 0
    assert ("Z-Image base" in capsys.readouterr().out) is (variant == "base")


@pytest.mark.parametrize("name", ["z_image_bf16", "z_image_turbo_bf16"])
def test_a_file_of_z_image_itself_gets_advice(name, tiny_files, tmp_path, capsys):
    """Unless a preset or the steps are given."""
    path = tmp_path / f"{name}.safetensors"
    named_model(path, tiny_files["model"], {})
    parts = [f"--{part.replace('_', '-')}={tiny_files[part]}" for part in tiny_files if part != "model"]
    given = ["generate", "a", f"--model={path}", *parts, "--width=32", "--height=32", "--device=cpu"]
    for more, told in (([], "turbo" not in name), (["--preset=turbo", "--steps=1"], False), (["--steps=1"], False)):
        assert cli.main([*given, *more, f"--out={tmp_path / 'a.png'}"]) == 0
        assert ("--preset base is made for it" in capsys.readouterr().err) is told


def test_every_command_of_the_recipe_for_fine_tunes_can_be_entered():
    page = (ROOT / "docs" / "fine_tunes.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.+?)```", page, re.S)).replace("\\\n", " ").splitlines()
    commands = [cli.build_parser().parse_args(shlex.split(line)[1:]).command for line in lines if line]
    assert commands == ["inspect", "quantize", "compare", "verify", "convert"]


def test_generate_writes_a_png_that_knows_its_settings(generate, tmp_path, capsys):
    out = tmp_path / "cat.png"
    assert generate("--seed=3", f"--out={out}", "--json") == 0
    path, last = capsys.readouterr().out.strip().splitlines()
    assert path == str(out)
    with Image.open(out) as picture:
        assert picture.size == (48, 32)
        facts = metadata.read(picture)
    assert (facts["prompt"], facts["seed"], facts["steps"], facts["backend"]) == ("a cat", 3, 2, "reference")
    report = json.loads(last)
    assert report["images"] == [{"path": str(out), "seed": 3}]
    assert [stage["name"] for stage in report["stages"]][-1] == "decode"
    assert all({"seconds", "device_peak_gib", "host_peak_gib"} <= stage.keys() for stage in report["stages"])
    assert not list(tmp_path.glob(".*")), "no temporary file may stay behind"


def test_generate_names_batches_and_random_seeds(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate("--seed=3", "--batch=2", "--out=cat.png", prompt="") == 0
    assert capsys.readouterr().out.split() == ["cat-1.png", "cat-2.png"]
    assert generate() == 0
    (path,) = capsys.readouterr().out.split()
    with Image.open(path) as picture:
        assert path == f"zimage-{metadata.read(picture)['seed']}.png"


def test_generate_starts_from_an_image(generate, tmp_path, capsys):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "start.png")
    out = tmp_path / "out.png"
    arguments = (f"--image={tmp_path / 'start.png'}", "--strength=0.5", "--negative-prompt=é 中", "--guidance=1")
    assert generate(*arguments, f"--out={out}") == 0
    with Image.open(out) as picture:
        facts = metadata.read(picture)
    assert (facts["strength"], facts["negative_prompt"]) == (0.5, "é 中")
    assert capsys.readouterr().out.strip() == str(out)


def refused(capsys, code: int) -> str:
    """The one line of a refusal."""
    assert code == 2
    output = capsys.readouterr()
    assert not output.out
    (line,) = output.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--width=50", "nearest are 48 and 64"),
        ("--steps=0", "expected 1 to 100"),
        ("--batch=0", "at least 1"),
        ("--model=gone.safetensors", "gone.safetensors"),
        ("--out=gone/cat.png", "no such folder"),
        ("--out=cat.bmp", "ends in .png"),
        ("--image=gone.png", "gone.png: no such file"),
        ("--image=pyproject.toml", "expected a picture (PNG, JPEG"),
        ("--backend=magic", "magic"),
        ("--device=cuda:99", "--device cpu"),
        ("--dtype=int3", "bfloat16"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(generate, capsys, monkeypatch, argument, words):
    monkeypatch.chdir(ROOT)
    assert words in refused(capsys, generate(argument))


def test_wrong_and_truncated_files(generate, tiny_files, tmp_path, capsys):
    assert "VAE" in refused(capsys, generate(f"--model={tiny_files['vae']}"))
    assert "VAE" in refused(capsys, generate(f"--text-encoder={tiny_files['vae']}"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_files["model"].read_bytes()[:-1000])
    assert "truncated" in refused(capsys, generate(f"--model={cut}"))
    cut.write_bytes(tiny_files["model"].read_bytes()[:1000])
    assert "truncated" in refused(capsys, cli.main(["inspect", str(cut)]))


@pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "a cat", "--steps=many"], ["paint"]])
def test_usage_errors_are_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert "--help" in refused(capsys, stop.value.code)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 3, "out of memory; try smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory; try smaller"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 3, "out of memory; try smaller"),
        (MemoryError(), 3, "out of memory; try smaller"),
    ],
)
def test_interrupt_and_out_of_memory(generate, capsys, monkeypatch, error, code, words):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(pipeline.Pipeline, "__call__", stop)
    assert generate() == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_a_bug_keeps_its_traceback(generate, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline.Pipeline, "__call__", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        generate()


def test_inspect_tells_a_full_size_file_from_its_header(full_size_file, capsys):
    assert cli.main(["inspect", str(full_size_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "SVDQuant INT4, group 64"
    assert (facts["rank"], facts["layers"], facts["refiner_layers"]) == (256, 30, 2)
    assert facts["quantized_refiners"] is True
    assert (facts["width"], facts["heads"], facts["ffn_width"], facts["caption_width"]) == (3840, 30, 10240, 2560)
    assert facts["tensors"] == 1099
    assert facts["gib"] == round(4_546_023_552 / 2**30, 3)
    assert json.loads(facts["metadata"]["quantization_config"])["rank"] == 256
    assert facts["runs_here"]


def test_inspect_for_people(tiny_files, capsys):
    assert cli.main(["inspect", str(tiny_files["model"])]) == 0
    text = capsys.readouterr().out
    assert "rank: 32" in text
    assert "runs here: " in text and "(by its header; values are checked when it is loaded)" in text
    assert cli.main(["inspect", str(tiny_files["vae"])]) == 0
    assert "format: a VAE" in capsys.readouterr().out
    assert cli.main(["inspect", str(tiny_files["text_encoder"])]) == 0
    assert "format: a text encoder" in capsys.readouterr().out


def test_inspect_survives_a_reader_that_has_gone(tiny_files):
    process = subprocess.Popen(
        [*ZIMAGE, "inspect", str(tiny_files["vae"])], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"reference", "triton", "kitchen", "nunchaku"} == facts["backends"].keys()
    assert facts["backends"]["reference"].startswith("available")
    assert facts["torch"]
    assert cli.main(["doctor"]) == 0
    assert "backends:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "words"),
    [(["__init__.py", "nunchaku.py"], "unrelated statistics library"), (["__init__.py", "models/__init__.py"], "1.2")],
)
def test_doctor_knows_the_other_nunchaku(tmp_path, monkeypatch, files, words):
    for name in files:
        path = tmp_path / "nunchaku" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    about = tmp_path / "nunchaku-1.2.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: nunchaku\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = package_state("nunchaku")
    assert words in state
    assert state.startswith("1.2")


def test_doctor_knows_a_card_that_torch_does_not(tmp_path, monkeypatch, capsys):
    """As on Windows, where PyPI's torch has no CUDA; the driver's own tool is played."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "remedy: NVIDIA card, CPU-only torch (NVIDIA GeForce RTX 3060): pip install torch --index-url" in said
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert cli.main(["doctor"]) == 0
    assert "remedy" not in capsys.readouterr().out


def test_doctor_without_torch(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert cli.main(["doctor"]) == 1
    assert "torch is missing; install it" in capsys.readouterr().out


def test_quantize_then_inspect_and_draw(tiny_files, tmp_path, capsys):
    from safetensors.torch import save_file

    from zimage_core.models.config import ZImageConfig
    from zimage_core.models.transformer import ZImageTransformer

    torch.manual_seed(0)
    config = ZImageConfig(dim=384, n_heads=3, n_layers=1, n_refiner_layers=1, cap_feat_dim=64)
    dense, small = tmp_path / "dense.safetensors", tmp_path / "small.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in ZImageTransformer(config).state_dict().items()}, dense)
    assert cli.main(["quantize", str(dense), str(small), "--rank=16"]) == 0
    assert capsys.readouterr().out.strip() == str(small)
    assert cli.main(["inspect", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 16
    files = [f"--model={small}", f"--text-encoder={tiny_files['text_encoder']}", f"--vae={tiny_files['vae']}"]
    size = ["--width=32", "--height=32", "--steps=1", f"--out={tmp_path / 'small.png'}"]
    assert cli.main(["generate", "a cat", *files, *size]) == 0
    capsys.readouterr()
    code = cli.main(["quantize", str(small), str(tmp_path / "again.safetensors"), "--no-calibration"])
    assert "expected a BF16 model" in refused(capsys, code)


def test_quantize_calibrates_where_there_is_an_encoder(tiny_files, tmp_path, monkeypatch, capsys):
    """What the options hand to the quantizer, whose own tests run it."""
    from zimage_core.quantize import run as quantize

    asked = []
    monkeypatch.setattr(quantize, "quantize_checkpoint", lambda *a, **k: asked.append(k))
    src, dst = str(tiny_files["model"]), str(tmp_path / "out.safetensors")
    encoder = [f"--text-encoder={tiny_files['text_encoder']}"]
    assert cli.main(["quantize", src, dst, "--rank=32", "--merge=a.safetensors:0.8", *encoder]) == 0
    assert len(asked[0]["cap_feats"]) == 16 and asked[0]["size"] == 256
    assert (asked[0]["rank"], asked[0]["merge"]) == (32, [("a.safetensors", 0.8)])
    assert capsys.readouterr().err == ""
    assert cli.main(["quantize", src, dst]) == 0
    assert asked[1]["cap_feats"] is None
    assert "without --text-encoder" in capsys.readouterr().err
    assert cli.main(["quantize", src, dst, "--no-calibration", *encoder]) == 0
    assert asked[2]["cap_feats"] is None
    assert capsys.readouterr().err == ""


def test_quantize_takes_prompts_a_size_and_dense_refiners(tiny_files, tmp_path, monkeypatch, capsys):
    """What the options hand to the quantizer; a prompt that is not built in gives features that are not."""
    from zimage_core.quantize import run as quantize

    asked = []
    monkeypatch.setattr(quantize, "quantize_checkpoint", lambda *a, **k: asked.append(k))
    monkeypatch.setattr(quantize, "calibration_captions", lambda encoder, prompts, **k: list(prompts))
    src, dst = str(tiny_files["model"]), str(tmp_path / "out.safetensors")
    encoder = [f"--text-encoder={tiny_files['text_encoder']}"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  黄昏时分的外滩 \n", encoding="utf-8")
    options = [f"--prompts={prompts}", "--size=128", "--skip-refiners"]
    assert cli.main(["quantize", src, dst, *options, *encoder]) == 0
    assert asked[0]["cap_feats"] == ["a red circle", "黄昏时分的外滩"]
    assert (asked[0]["size"], asked[0]["skip_refiners"]) == (128, True)
    capsys.readouterr()
    for given in (options, [*options, *encoder, "--no-calibration"]):
        assert "name a --text-encoder" in refused(capsys, cli.main(["quantize", src, dst, *given]))
    for content, words in ((b"\n \n", "expected a prompt a line"), (b"caf\xe9", "expected UTF-8 text")):
        prompts.write_bytes(content)
        assert words in refused(capsys, cli.main(["quantize", src, dst, *options, *encoder]))
    for given, words in (
        (["--size=0"], "expected a positive multiple of 16 pixels, found 0"),
        (["--size=-64"], "found -64"),
        (["--merge=a.safetensors:inf"], "a.safetensors: strength: expected a finite number"),
    ):
        assert words in refused(capsys, cli.main(["quantize", src, dst, *given, *encoder]))
    assert "found a folder" in refused(capsys, cli.main(["quantize", src, str(tmp_path), *encoder]))
    prompts.unlink()
    assert "no such file" in refused(capsys, cli.main(["quantize", src, dst, *options, *encoder])).lower()
    assert len(asked) == 1


def test_quantize_shows_the_time_left(tiny_files, tmp_path, monkeypatch):
    from zimage_core.quantize import run as quantize

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def work(*args, progress, **options):
        for done, what in ((0, "block 3/34, attention.to_qkv"), (50, "block 3/34, attention.to_out")):
            time.sleep(0.2)
            progress(done, 100, what)
        progress(100, 100, "out.safetensors")

    monkeypatch.setattr(quantize, "quantize_checkpoint", work)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["quantize", "a", str(tmp_path / "b"), "--no-calibration"]) == 0
    assert re.search(r"quantize .* 50% 00:0\d, block 3/34, attention\.to_out, 0:0\d left", sys.stderr.getvalue())


@pytest.mark.parametrize(
    ("device", "words"), [("cuda:99", "device cuda:99 is not there"), ("foo", "device 'foo' is no torch device")]
)
def test_quantize_encoder_on_a_device_that_is_not_there(tiny_files, tmp_path, capsys, device, words):
    command = ["quantize-encoder", str(tiny_files["text_encoder"]), str(tmp_path / "small.safetensors")]
    assert words in refused(capsys, cli.main([*command, f"--device={device}"]))
    assert list(tmp_path.iterdir()) == []


def test_quantizing_into_a_folder_names_the_folder(tiny_files, tmp_path, capsys):
    code = cli.main(["quantize-encoder", str(tiny_files["text_encoder"]), str(tmp_path)])
    assert f"zimage: {tmp_path}: expected a file to write, found a folder" in refused(capsys, code)
    assert list(tmp_path.iterdir()) == [] and not list(tmp_path.parent.glob("*.partial"))


def test_compare_writes_a_sheet_and_scores(tmp_path, capsys, monkeypatch):
    """The demo's BF16 source against its INT4 file."""
    from zimage_core.demo import demo_files

    files = {name: str(path) for name, path in demo_files().items()}
    models = [str(ROOT / "demo_training" / "z-image-demo-bf16.safetensors"), files["model"]]
    parts = [f"--{name.replace('_', '-')}={files[name]}" for name in ("text_encoder", "tokenizer", "vae")]
    size = ["--width=128", "--height=128", "--seeds", "0", "--device=cpu"]
    out = tmp_path / "sheet.png"
    prompt = "a red star on a white background"
    assert cli.main(["compare", prompt, "--models", *models, *parts, *size, f"--out={out}", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["sheet"] == str(out) and Image.open(out).width > 2 * 128
    assert [row["label"] for row in last["scores"]] == [models[1]]
    assert last["scores"][0]["psnr"] > 25 and last["scores"][0]["ssim"] > 0.9
    code = cli.main(["compare", "a red star", "--models", models[0], *parts, *size])
    assert "two models or more" in refused(capsys, code)
    monkeypatch.setattr(pipeline.Pipeline, "__call__", lambda *_, **__: pytest.fail("drew before it refused"))
    for second, words in (("gone", "gone: the model is not there"), (files["vae"], "found a VAE")):
        command = ["compare", "a red star", "--models", models[0], second, *parts, *size]
        assert words in refused(capsys, cli.main(command))
    command = ["compare", "a red star", "--models", *models, *parts, *size, "--precision", "auto", "w9"]
    assert "w9" in refused(capsys, cli.main(command))


def test_compare_takes_a_precision_for_each_model(tmp_path, capsys):
    """The same file twice: nothing but the precision differs."""
    from zimage_core.demo import demo_files

    model, *parts = (str(demo_files()[name]) for name in ("model", "text_encoder", "tokenizer", "vae"))
    parts = [f"--{name}={path}" for name, path in zip(("text-encoder", "tokenizer", "vae"), parts, strict=True)]
    options = ["--width=64", "--height=64", "--steps=2", "--seeds=1", "--device=cpu", f"--out={tmp_path / 'a.png'}"]
    command = ["compare", "a red star", "--models", model, model, *parts, *options, "--json"]
    assert cli.main([*command, "--precision", "w4a16", "w4a4"]) == 0
    (score,) = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert score["label"] == f"{model} w4a4" and score["psnr"] is not None and score["psnr"] < 60
    assert "is there twice" in refused(capsys, cli.main(command))
    assert "expected 1 or 2" in refused(capsys, cli.main([*command, "--precision", "w4a16", "w4a4", "w4a8"]))


def test_compare_gives_a_bf16_model_no_precision(tmp_path, capsys, monkeypatch):
    from zimage_core import compare
    from zimage_core.demo import demo_files

    files = {name: str(path) for name, path in demo_files().items()}
    dense, parts = str(ROOT / "demo_training" / "z-image-demo-bf16.safetensors"), []
    for name in ("text_encoder", "tokenizer", "vae"):
        parts.append(f"--{name.replace('_', '-')}={files[name]}")
    seen = []
    monkeypatch.setattr(compare, "compare", lambda prompt, models, *_, **__: seen.append(list(models)) or (sheet, []))
    sheet = Image.new("RGB", (16, 16))
    command = ["compare", "x", "--models", dense, files["model"], files["model"], *parts, "--device=cpu"]
    assert cli.main([*command, f"--out={tmp_path / 'a.png'}", "--precision", "w4a4", "w4a16", "w4a4"]) == 0
    assert seen == [[dense, f"{files['model']} w4a16", f"{files['model']} w4a4"]]


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "what, words",
    [
        ("that no real weights were at hand", r"\A(?:.*\n){1,8}.*Real weights were never at hand"),
        (
            "where Windows gets a torch with CUDA",
            r"Windows, NVIDIA.*pip install torch --index-url https://download.pytorch",
        ),
        ("what doctor says without it", r'"NVIDIA card, CPU-only torch"'),
        ("Triton's name there", r"triton-windows"),
        ("that PowerShell knows no &&", r"PowerShell.*&&|&&.*PowerShell"),
        ("an M2 Mac", r"\| Mac \(M1 and later\)"),
        ("cards before sm_89", r"sm_75"),
        ("the host's memory", r"RAM|host memory"),
        ("how much is downloaded", r"download.*GB|GB.*download"),
        ("LoRA calls in the library", r"set_loras\("),
        ("what the demo knows", r"128 to 512 pixels"),
    ],
)
def test_the_readme_tells_a_newcomer(what, words):
    assert re.search(words, README), what


def test_the_draw_command_of_the_readme_follows_its_prompt(tmp_path, monkeypatch, capsys):
    """The bundled demo generates a red circle in the top left corner on blue; colours by the larger channel."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("pip install . && zimage generate ")]
    assert cli.main(shlex.split(line)[5:] + ["--seed=1", "--device=cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == "bundled demo"
    with Image.open("picture.png") as picture:
        assert picture.size == (256, 256)
        red, _, blue = picture.getpixel((70, 70))
        assert red > 150 > 100 > blue
        red, _, blue = picture.getpixel((200, 200))
        assert blue > 150 > 100 > red


def test_the_demo_says_what_it_does_not_know(tmp_path, caplog):
    """Logged before it starts, with the words and sizes that it knows."""
    command = ["generate", "a cat", "--width=64", "--height=64", "--steps=1", "--seed=1", "--device=cpu"]
    assert cli.main([*command, f"--out={tmp_path / 'a.png'}"]) == 0
    said = caplog.text
    caplog.clear()
    assert "'a cat': the bundled demo knows no word of this prompt" in said and "crescent" in said
    assert "64 x 64: the bundled demo was trained on edges of 128 to 512 pixels" in said
    command = ["generate", "three small stars", "--width=128", "--height=256", *command[4:]]
    assert cli.main([*command, f"--out={tmp_path / 'b.png'}"]) == 0
    assert "bundled demo knows" not in caplog.text and "was trained on" not in caplog.text
