"""Files of others: what they hold is never in a message, and their names never lead elsewhere."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core import cli, load_pipeline, pictures, whole
from zimage_core.lora.read import load_lora

SECRET = "hunter2-correct-horse"
SIZE = {"height": 32, "width": 32, "num_inference_steps": 1}
TEXTS = {
    "text": SECRET,
    "JSON": json.dumps({"password": SECRET}),
    "a string": json.dumps(SECRET),
    "a list": json.dumps([SECRET]),
    "broken JSON": '{"password": "' + SECRET,
    "lines": f"root:{SECRET}:0:0\n" * 3,
    "bytes": f"\xff{SECRET}",
}
SIDE_FILES = {
    "model": ("config.json", "model.safetensors.index.json"),
    "text_encoder": ("config.json", "model.safetensors.index.json", "tokenizer.json"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors.index.json"),
}


@pytest.fixture
def said(caplog, capsys):
    """A function that runs something and returns all that was said."""

    def run(work) -> str:
        caplog.set_level(logging.DEBUG)
        with warnings.catch_warnings(record=True) as caught:
            try:
                work()
                refused = ""
            except ValueError as error:
                refused = str(error)
        output = capsys.readouterr()
        return "\n".join([refused, caplog.text, output.out, output.err, *(str(one.message) for one in caught)])

    return run


@pytest.mark.parametrize("kind", TEXTS)
def test_what_another_file_holds_is_not_told(tiny_files, tmp_path, kind, said):
    """A file under any name that is read, as a link to one elsewhere would be."""
    data = TEXTS[kind].encode("latin-1")
    for part, names in SIDE_FILES.items():
        for name in names:
            folder = tmp_path / f"{part}-{name}"
            folder.mkdir()
            save_file(load_file(tiny_files[part]), folder / "model.safetensors")  # without a config of its own
            if part == "text_encoder":
                shutil.copy(tiny_files[part].parent / "tokenizer.json", folder)
            (folder / name).write_bytes(data)
            assert SECRET not in said(lambda p=part, f=folder: load_pipeline(**{**tiny_files, p: f})("a", **SIZE))
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(data)
    for part in SIDE_FILES:
        assert SECRET not in said(lambda p=part: load_pipeline(**{**tiny_files, p: path})("a", **SIZE))
    assert SECRET not in said(lambda: load_lora(path))
    assert SECRET not in said(lambda: pictures.read_image(path))
    assert SECRET not in said(lambda: cli.main(["inspect", str(path)]))
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "workflow.json").write_bytes(data)
    command = ["batch", str(tmp_path / "prompts.txt"), f"--out={tmp_path / 'out'}", "--comfyui=http://localhost:1"]
    assert SECRET not in said(lambda: cli.main([*command, f"--workflow={tmp_path / 'workflow.json'}"]))


@pytest.mark.parametrize("kind", TEXTS)
def test_nor_what_a_lora_s_or_scheduler_s_config_holds(tiny_files, tmp_path, kind, said):
    data = TEXTS[kind].encode("latin-1")
    lora = tmp_path / "lora"
    lora.mkdir()
    pair = {"lora_A.weight": torch.ones(4, 128), "lora_B.weight": torch.ones(128, 4)}
    named = {f"base_model.model.layers.0.attention.to_out.0.{leaf}": tensor for leaf, tensor in pair.items()}
    save_file(named, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_bytes(data)
    assert SECRET not in said(lambda: load_lora(lora))
    for name in ("transformer", "scheduler"):
        (tmp_path / name).mkdir()
    shutil.copy(tiny_files["model"], tmp_path / "transformer" / "model.safetensors")
    (tmp_path / "scheduler" / "scheduler_config.json").write_bytes(data)
    assert SECRET not in said(lambda: load_pipeline(**{**tiny_files, "model": tmp_path / "transformer"}))


def test_control_characters_are_escaped_in_everything_that_the_command_says(tiny_files, tmp_path, capfd):
    """In a log line, a warning, an error and a fact; a newline divides lines only where we wrote it."""
    path = tmp_path / "lora\x1b[2J.safetensors"
    save_file({"nothing\x1b]0;x\x07.lora_A.weight": torch.ones(4, 4)}, path)
    target = tmp_path / "x.png"
    code = cli.main(["generate", "a", f"--lora={path}", "--steps=1", "--device=cpu", f"--out={target}"])
    shown = capfd.readouterr()
    assert code == 2 and "\\x1b[2J" in shown.err
    cli.main(["inspect", str(path)])
    shown = shown.err + "".join(capfd.readouterr())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown)


def test_log_lines_of_the_command_are_printable():
    record = logging.LogRecord("x", logging.INFO, "", 0, "a plan\n  of \x1b[31m%s", ("two\x07lines",), None)
    assert cli.Printable().format(record) == "a plan\n  of \\x1b[31mtwo\\x07lines"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("../x", "a folder"), ("a/b", "a folder"), ("a\\b", "a folder"), ("/x", "a folder"), ("C:x", "a character"),
        ("a?", "a character"), ("a\x00b", "a character"), ("a\nb", "a character"), ('"a"', "a character"),
        ("CON", "a name that Windows keeps"), ("nul.sft", "a name that Windows keeps"), ("LPT1.x", "a name"),
        (".hidden", "a point or a space"), ("a.", "a point or a space"), ("a ", "a point or a space"), ("..", "a"),
        ("-q", "a dash"), ("ü" * 101, "202 bytes"),
    ],
)  # fmt: skip
def test_names_that_some_system_does_not_take(name, found):
    with pytest.raises(ValueError, match=f"expected a plain file name of up to 200 bytes, found {found}"):
        whole.check_name(name)


@pytest.mark.parametrize("name", ["svdq-int4_r32-x", "Ein Bild (2).safetensors", "模型", "a.b.c", "console", "x" * 200])
def test_names_that_every_system_takes(name, tmp_path):
    whole.check_name(name)
    whole.write(tmp_path / name, b"x")
    whole.lock(Path(tmp_path / name)).release()
