"""The command line's manners: what it writes, where, what it says meanwhile, and how it is completed."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from zimage_core import cli, metadata, whole
from zimage_core.cli import completion, output
from zimage_core.formats.encoder import check_text_encoder

ROOT = Path(__file__).parents[2]
TINY = ["--width=48", "--height=32", "--steps=2", "--device=cpu"]


@pytest.fixture
def options(tiny_files):
    return [*(f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()), *TINY]


def zimage(*arguments: str, cwd: Path, **more) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zimage_core", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more)


# ---- where the pictures go ------------------------------------------------------------------------------------


def test_a_named_picture_is_replaced_and_a_default_name_is_free(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expected in ("zimage-3.png", "zimage-3-2.png", "zimage-3-3.png"):
        assert cli.main(["generate", "a cat", *options, "--seed=3"]) == 0
        assert capsys.readouterr().out.strip() == expected
    (tmp_path / "cat.png").write_bytes(b"old")
    assert cli.main(["generate", "a cat", *options, "--seed=3", "--out=cat.png"]) == 0
    assert (tmp_path / "cat.png").read_bytes() == (tmp_path / "zimage-3.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone/cat.png", "gone: no such folder; make it first"),
        ("folder.png", "folder.png: expected a file to write, found a folder"),
        ("pipe.png", "pipe.png: expected a file to write, found a device"),
        ("x" * 300 + ".png", ".png: cannot be written (file name too long)"),
        ("cat.bmp", "cat.bmp: pictures are written as PNG, WebP or JPEG; name a file that ends in .png"),
    ],
)
def test_where_no_picture_can_be_written_none_is_generated(options, tmp_path, monkeypatch, capsys, name, words):
    """Folder, name and kind, before a model is read."""
    (tmp_path / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
    elif name == "pipe.png":
        pytest.skip("the system has no named pipes")
    monkeypatch.setattr("zimage_core.pipeline.load_pipeline", lambda *_, **__: pytest.fail("read a model"))
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--batch=2"] if "." not in name[:7] else []):
        assert cli.main(["generate", "a cat", *options, f"--out={name}", *more]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="folders have other rights there")
def test_without_rights_none_is_generated(options, tmp_path, monkeypatch, capsys):
    """Root may write anywhere, so the system's refusal is played."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("zimage_core.pipeline.load_pipeline", lambda *_, **__: pytest.fail("read a model"))
    monkeypatch.setattr(whole, "create", refuse)
    for out in ([f"--out={tmp_path / 'cat.png'}"], []):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["generate", "a cat", *options, *out]) == 2
        said = capsys.readouterr().err
        assert ("cat.png" if out else "zimage-0.png") + ": cannot be written (permission denied)" in said
        assert "zimage-part" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to play with")
def test_a_full_disk_is_told_with_the_picture_s_name(options, tmp_path, monkeypatch, capsys):
    create = whole.create
    target, calls = tmp_path / "cat.png", []

    def full(path):
        calls.append(path)
        return create(path) if len(calls) == 1 else open("/dev/full", "wb", buffering=0)

    target.write_bytes(b"old")
    monkeypatch.setattr(whole, "create", full)
    assert cli.main(["generate", "a cat", *options, f"--out={target}"]) == 2
    assert f"zimage: {target}: cannot be written (no space left on device); free space" in capsys.readouterr().err
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["cat.png"]


KILLED = """
import os, signal, sys
from pathlib import Path
from zimage_core import whole
whole.sync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
whole.write(Path(sys.argv[1]), b"half")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_what_a_killed_run_left_goes_with_the_next(options, tmp_path):
    """Its own only: what another picture's run, a run that goes on, or the user has there stays."""
    target = tmp_path / "cat.png"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", KILLED, target], env=environment).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".zimage-part") and left.read_bytes() in (b"", b"half")
    mine = [tmp_path / ".cat.png.part", tmp_path / "cat.png.zimage-part"]
    alive = whole._part(target, str(os.getppid()))
    for path in (*mine, alive):
        path.write_bytes(b"kept")
    assert cli.main(["generate", "a cat", *options, f"--out={target}"]) == 0
    assert not left.exists() and all(path.read_bytes() == b"kept" for path in (*mine, alive))
    assert Image.open(target).size == (48, 32)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    target = tmp_path / "cat.png"
    target.write_bytes(b"old")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"cat\.png: cannot be written \(permission denied\)"):
        whole.write(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


# ---- what a picture says --------------------------------------------------------------------------------------

A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # infotext_utils.py, re_param
FACTS = {"prompt": 'a cat, "Hi"\nSteps: 3', "seed": 7, "steps": 8, "guidance": 0.0, "width": 48, "height": 32}


def test_other_programs_read_a_picture_s_texts(tmp_path):
    """ComfyUI parses the chunks prompt and workflow as JSON, so they are not there; A1111 finds its numbers."""
    facts = FACTS | {"negative_prompt": "blur", "model": "a, b: c.safetensors", "strength": 0.5}
    path = tmp_path / "x.png"
    path.write_bytes(metadata.png(Image.new("RGB", (48, 32)), facts))
    with Image.open(path) as picture:
        texts = dict(picture.text)
        assert metadata.read(picture) == facts
    assert set(texts) == {"zimage", "parameters", "Software"}
    *lines, last = texts["parameters"].strip().split("\n")
    found = {name: json.loads(value) if value[0] == '"' else value for name, value in A1111.findall(last)}
    assert len(found) >= 3 and (found["Steps"], found["Seed"], found["Size"]) == ("8", "7", "48x32")
    assert (found["CFG scale"], found["Model"]) == ("1.0", "a, b: c.safetensors")
    assert "\n".join(lines) == FACTS["prompt"] + "\nNegative prompt: blur"


def test_pictures_without_our_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a PNG with a text 'zimage'"):
        metadata.read(Image.new("RGB", (4, 4)))


# ---- what is said ---------------------------------------------------------------------------------------------


def test_what_a_run_says(options, tmp_path, capsys):
    """The plan and the seed on stderr; nothing of backends that are not there; -q nothing, -v the backends."""
    target = f"--out={tmp_path / 'a.png'}"
    plain = zimage("generate", "a cat", *options, "--seed=7", target, "--batch=2", cwd=tmp_path)
    assert plain.stdout.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    assert "predicted peak" in plain.stderr and "seed 7 to 8\n" in plain.stderr
    assert "nunchaku" not in plain.stderr and max(map(len, plain.stderr.splitlines())) < 120
    quiet = zimage("generate", "a cat", *options, "--strength=0.5", target, "-q", cwd=tmp_path)
    assert (quiet.stdout.split(), quiet.stderr) == ([str(tmp_path / "a.png")], "")
    wrong = zimage("generate", "a cat", *options, "--steps=0", "--quiet", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    wordy = zimage("generate", "a cat", *options, target, "-v", cwd=tmp_path)
    assert "nunchaku: " in wordy.stderr
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "a cat", "-q", "-v"])
    assert "not allowed with" in capsys.readouterr().err


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = output.Progress()
    progress.start("quantize", 1)
    for done in range(1, 101):
        now[0] += 1.0
        progress.say(f"block {done}/100")
        progress.step(done, 100)
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "zimage: quantize 10/100, 0:10, block 10/100"
    assert lines[-1] == "zimage: quantize 90/100, 1:30, block 90/100" and len(lines) == 9


def test_a_prompt_from_standard_input(options, tmp_path, monkeypatch, capsys):
    target = tmp_path / "a.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\non blue\n"))
    assert cli.main(["generate", "-", *options, f"--out={target}"]) == 0
    assert metadata.read(Image.open(target))["prompt"] == "a red circle\non blue"
    for data, words in ((b" \n", "found nothing"), (b"caf\xe9", "expected UTF-8 text on standard input")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert cli.main(["generate", "-", *options, f"--out={target}"]) == 2
        assert words in capsys.readouterr().err


def test_the_tokenizer_of_a_smaller_encoder_is_named(tiny_files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("zimage_core.models.tokenizer.cached_tokenizer", lambda: None)
    (tmp_path / "elsewhere").mkdir()
    small = tmp_path / "elsewhere" / "small.safetensors"
    assert cli.main(["quantize-encoder", str(tiny_files["text_encoder"]), str(small)]) == 0
    check_text_encoder(small)
    folder = tiny_files["text_encoder"].parent
    assert f"its tokenizer is in {folder}: copy it beside {small}, or name it with --tokenizer" in caplog.text
    caplog.clear()
    shutil.copy(folder / "tokenizer.json", small.parent)
    assert cli.main(["quantize-encoder", str(tiny_files["text_encoder"]), str(small)]) == 0
    assert "tokenizer" not in caplog.text


# ---- help and completion --------------------------------------------------------------------------------------

COMMANDS = completion.subparsers(cli.build_parser())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_with_its_default_or_limits(command):
    for action in COMMANDS[command]._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        assert action.help, action.option_strings or action.dest
        if not action.option_strings or action.nargs == 0 or action.required:
            continue
        if isinstance(action.default, int | float | str) and action.default != "":
            assert re.search(r"default", action.help), action.option_strings
        if action.type in (int, float):
            assert re.search(r"\d", action.help), action.option_strings


def test_bash_completes_commands_options_and_values(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    script = zimage("completion", "bash", cwd=tmp_path).stdout

    def complete(*words: str) -> list[str]:
        line = " ".join(map(repr, words))
        code = (
            f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _zimage; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("zimage", "quant") == ["quantize", "quantize-encoder"]
    assert complete("zimage", "generate", "--ne") == ["--negative-prompt"]
    assert complete("zimage", "generate", "--preset", "") == ["turbo", "base"]
    assert complete("zimage", "completion", "f") == ["fish"]
    assert complete("zimage", "generate", "pict") == []  # files, which bash itself completes


COMPLETED = {
    "zimage quanti": ["quantize", "quantize-encoder"],
    "zimage generate --neg": ["--negative-prompt"],
    "zimage generate --preset ": ["base", "turbo"],
    "zimage generate --sampler=h": ["--sampler=heun"],
    "zimage completion f": ["fish"],
    "zimage generate --image pict": ["picture.png"],
    "zimage inspect pict": ["picture.png"],
}


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("line", COMPLETED)
def test_fish_completes(tmp_path, line):
    (tmp_path / "picture.png").touch()
    (tmp_path / "zimage.fish").write_text(zimage("completion", "fish", cwd=tmp_path).stdout)
    command = ["fish", "--no-config", "-c", f"source zimage.fish; complete -C '{line}'"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sorted(offer.partition("\t")[0] for offer in found.splitlines()) == COMPLETED[line]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("line", [line for line in COMPLETED if "=" not in line])
def test_zsh_completes(tmp_path, line):
    """In a terminal, as its completion runs nowhere else: Tab, then a key that prints what the line has become."""
    import pty

    (tmp_path / "picture.png").touch()
    (tmp_path / "zimage.zsh").write_text(zimage("completion", "zsh", cwd=tmp_path).stdout)
    shown = "tell() { print -r -- \"<$BUFFER>\" }; zle -N tell; bindkey '^X' tell; setopt automenu"
    (tmp_path / ".zshrc").write_text(f"PS1='ready'; source zimage.zsh; {shown}\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-i"], os.environ | {"ZDOTDIR": str(tmp_path), "TERM": "dumb", "COLUMNS": "200"})

    def until(mark: bytes) -> bytes:
        seen = b""
        while mark not in seen:
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)
        return seen

    try:
        until(b"ready")
        os.write(terminal, line.encode() + b"\t\x18")
        found = until(b">").rpartition(b"<")[2].partition(b">")[0].decode()
        if len(COMPLETED[line]) > 1:  # what they share; the next Tab takes the first of them
            os.write(terminal, b"\t\x18")
            found = until(b">").rpartition(b"<")[2].partition(b">")[0].decode()
        assert found.split()[-1] == COMPLETED[line][0]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_names_every_option(shell, tmp_path, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command, parser in COMMANDS.items():
        assert command in script
        for action in parser._actions:
            for name in action.option_strings:
                assert (f"-l {name[2:]}" if shell == "fish" and name.startswith("--") else name.lstrip("-")) in script
    if (path := shutil.which(shell)) is not None:
        checked = subprocess.run([path, "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
