"""Whatever a call, a command line, a row of a batch, a picture or another program says: one ValueError, or done.

Beside `test_properties.py`, which is about files; how many examples is in `strategies.py`.
"""

from __future__ import annotations

import csv
import importlib.util
import inspect
import io
import json
import os
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import changed_bytes, commands, many, texts, values, write_controlnet

from zimage_core import Control, batch, cli, load_pipeline, metadata, pictures, tune
from zimage_core.batch import comfyui
from zimage_core.batch.columns import PictureColumns
from zimage_core.batch.rows import Rows
from zimage_core.cli import restore
from zimage_core.cli.completion import subparsers
from zimage_core.models.guidance import Nag
from zimage_core.pipeline import Pipeline
from zimage_core.sampler import SAMPLERS, SCHEDULES
from zimage_core.variety import Variety

spec = importlib.util.spec_from_file_location("standin", Path(__file__).with_name("standin.py"))
standin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(standin)
StandIn = standin.StandIn
SIZE = {"height": 32, "width": 32, "num_inference_steps": 1, "generator": 1}
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
    "RGBX",
    "La",
    "RGBa",
    "PA",
]


# ---- the library's calls --------------------------------------------------------------------------------------

sides = st.integers(1, 80)
images = st.builds(Image.new, st.sampled_from(MODES), st.tuples(sides, sides), st.integers(0, 255))
tensors = st.builds(
    lambda shape, fill, dtype: torch.full(shape, fill, dtype=dtype),
    st.lists(st.sampled_from([0, 1, 4, 16, 64]), max_size=4),
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)
things = st.one_of(
    values,
    images,
    tensors,
    st.lists(images | tensors | values, max_size=3),
    st.sampled_from([b"a", Path("x"), object(), sys, (), {1}, torch.Generator(), Variety(3.0), *SAMPLERS, *SCHEDULES]),
)
ARGUMENTS = [
    name for name in inspect.signature(Pipeline.__call__).parameters if name not in ("self", "callback_on_step_end")
]


@pytest.fixture(scope="module")
def net(tiny_files, control_tensors, tmp_path_factory) -> Path:
    """A ControlNet that may repaint."""
    return write_controlnet(tmp_path_factory.mktemp("net") / "net.safetensors", tiny_files["model"], control_tensors)


@pytest.fixture(scope="module")
def tiny(tiny_files):
    return load_pipeline(**tiny_files, device="cpu")


def asked(found: object) -> bool:
    """Whether a number is one of thousands of pictures, which are allowed and take their time."""
    return not isinstance(found, int) or not 20 < found < 2**21


@many
@given(given=st.dictionaries(st.sampled_from(ARGUMENTS), things, min_size=1, max_size=2))
def test_calls(tiny, given):
    """Arguments of any type."""
    if all(asked(given.get(name)) for name in ("num_images_per_prompt", "num_inference_steps", "height", "width")):
        with suppress(ValueError):
            tiny(**{"prompt": "a", **SIZE, **given})


@many
@given(image=images, mask=images, control=images, feather=st.integers(-1, 2**40), strength=st.floats(), range=st.tuples(
    st.floats(), st.floats()))  # fmt: skip
def test_start_pictures_masks_and_control_pictures(tiny, net, image, mask, control, feather, strength, range):
    """Of any mode and size."""
    with suppress(ValueError):
        work = Control(control, net, strength, *range)
        asked = {**SIZE, "height": None, "width": None} if min(image.size) > 15 else SIZE
        made = tiny("a", **asked, image=image, mask=mask, feather=feather, control=work)
        assert made[0].mode == "RGB"


@many
@given(image=images, borders=st.lists(st.integers(-1, 64) | st.integers(), min_size=4, max_size=4))
def test_borders(image, borders):
    with suppress(ValueError):
        padded, mask = pictures.pad(image, *borders)
        assert padded.size == mask.size and padded.width % 16 == padded.height % 16 == 0


@many
@given(numbers=st.lists(things, min_size=1, max_size=3), build=st.sampled_from([Variety, Nag, Control]))
def test_numbers_of_nag_variety_and_controls(numbers, build):
    with suppress(ValueError):
        found = build(*numbers) if build is not Control else build(None, "x", *numbers)
        assert all(isinstance(number, int | float) for number in vars(found).values() if number not in (None, "x"))


# ---- rows of a batch ------------------------------------------------------------------------------------------

COLUMNS = sorted(PictureColumns.names | {"id", "count"})
cells = st.dictionaries(st.sampled_from(COLUMNS), values, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that rows can name."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (32, 32)).save(folder / "x.png")
    (folder / "x.safetensors").write_bytes(b"")
    return folder


def table(rows: list[dict]) -> str:
    """Rows as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


rows = st.lists(cells, max_size=4).map(lambda found: [{"prompt": "a", **row} for row in found])
TEXTS = {
    ".jsonl": rows.map(lambda found: "\n".join(map(json.dumps, found)))
    | st.sampled_from(["[" * 10**5, '{"a":' * 10**5]),
    ".csv": rows.map(table),
    ".txt": texts,
    "": texts | rows.map(table),
}


@pytest.mark.parametrize("suffix", TEXTS)
@many
@given(data=st.data(), place=st.floats(0, 1), more=st.binary(max_size=6), cut=st.booleans(), change=st.booleans())
def test_rows(folder, suffix, data, place, more, cut, change):
    """Any cells, any bytes: settings that JSON holds, or a sentence that names the file."""
    raw = data.draw(TEXTS[suffix]).encode("utf-8", "surrogatepass")
    path = folder / f"rows{suffix}"
    path.write_bytes(changed_bytes(raw, place, more, cut) if change else raw)
    try:
        source = Rows(path, PictureColumns(folder))
        count = source.check()
        if count < 50:
            assert len([json.dumps(row.settings, allow_nan=False) for row in source]) == count
    except ValueError as error:
        assert len(str(error)) < 6000


@many
@given(found=cells)
def test_files_that_rows_name(folder, found):
    """Where a picture, a mask or a ControlNet is there."""
    paths = {
        "image": "x.png",
        "mask": "x.png",
        "control": "x.safetensors",
        "control_image": "x.png",
        "lora": "x.safetensors",
    }
    named = {name: paths.get(name, value) for name, value in found.items()}
    with suppress(ValueError):
        (row, *_) = Rows([{"prompt": "a", **named}], PictureColumns(folder))
        assert row.key({}) and row.file.endswith(".png")


# ---- pictures that say how they were made ---------------------------------------------------------------------

OPTIONS = subparsers(cli.build_parser())
GENERATE = [
    action.option_strings[0] for action in OPTIONS["generate"]._actions if action.option_strings and action.nargs != 0
]
WRONG = ["-1", "0", "nan", "inf", "1e400", "9" * 400, "x", "", "meta", "gone.safetensors:nan", "/", ".", "\udcff", "[]",
    "1.5", "a\0b"]  # fmt: skip
stored = st.builds("{}={}".format, st.sampled_from([*GENERATE, "--canny", "--exec"]), st.sampled_from(WRONG) | texts)
facts = values | st.fixed_dictionaries({}, optional={
    "prompt": values, "prompts": values | st.lists(texts, max_size=3), "options": values | st.lists(stored, max_size=3),
})  # fmt: skip


@many
@given(facts=facts, suffix=st.sampled_from([".png", ".webp", ".jpg"]), place=st.floats(0, 1),
    data=st.binary(max_size=8),
    cut=st.booleans(), change=st.booleans())  # fmt: skip
def test_pictures_to_start_again_from(tmp_path_factory, facts, suffix, place, data, cut, change):
    path = tmp_path_factory.mktemp("from") / f"x{suffix}"
    picture = Image.new("RGB", (4, 4))
    with suppress(ValueError):
        raw = metadata.encoded(picture, facts if isinstance(facts, dict) else {"prompt": facts}, suffix)
        path.write_bytes(changed_bytes(raw, place, data, cut) if change else raw)
        prompts, options = restore.read(path)
        assert all(isinstance(text, str) for text in (*prompts, *options))
    shutil.rmtree(path.parent)


@commands
@given(prompts=st.lists(texts, max_size=2), options=st.lists(stored, min_size=1, max_size=3))
def test_commands_of_pictures(tiny_files, tmp_path_factory, capsys, monkeypatch, prompts, options):
    """A stranger's picture: the command makes pictures or ends with a line, and reads nothing from standard input."""
    folder = tmp_path_factory.mktemp("from")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", None)
    for name in tiny_files:
        options = [option for option in options if not option.startswith(f"--{name.replace('_', '-')}=")]
    facts = {"prompts": prompts, "options": options}
    (folder / "x.png").write_bytes(metadata.png(Image.new("RGB", (4, 4)), facts))
    code, error = run(["generate", *files(tiny_files), "--from=x.png", "--out=y-{index}.png"], capsys)
    assert code in (0, 2) and (code == 0) == (len(os.listdir(folder)) > 1), error


# ---- command lines --------------------------------------------------------------------------------------------


def files(tiny_files) -> list[str]:
    parts = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    return [*parts, "--steps=1", "--width=32", "--height=32", "--device=cpu"]


def run(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit code and standard error of the command."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error


@commands
@given(
    option=st.sampled_from([name for name in GENERATE if name not in ("--out", "--sheet")]),
    value=st.sampled_from(WRONG),
)
def test_options_of_generate(tiny_files, tmp_path_factory, capsys, monkeypatch, option, value):
    """A wrong value of any option ends with exit code 2 and a line, and writes no picture."""
    folder = tmp_path_factory.mktemp("command")
    monkeypatch.chdir(folder)
    code, error = run(["generate", "a", *files(tiny_files), f"{option}={value}", "--out=x.png"], capsys)
    assert code in (0, 2) and (code == 2) != Path("x.png").exists(), error


@commands
@given(command=st.sampled_from(["batch", "quantize", "quantize-encoder", "convert", "inspect", "compare", "verify"]),
    data=st.data())  # fmt: skip
def test_options_of_other_commands(tiny_files, tmp_path_factory, capsys, monkeypatch, command, data):
    folder = tmp_path_factory.mktemp("command")
    monkeypatch.chdir(folder)
    Path("rows.txt").write_text("a\n")
    elsewhere = ("--ray", "--comfyui", "--workers", "--gpus")  # other processes and machines
    actions = [action for action in OPTIONS[command]._actions if action.nargs != 0 and action.dest != "help"]
    names = [action.option_strings[0] if action.option_strings else action.dest for action in actions]
    name, value = (
        data.draw(st.sampled_from([name for name in names if name not in elsewhere])),
        data.draw(st.sampled_from(WRONG)),
    )
    model, encoder = str(tiny_files["model"]), str(tiny_files["text_encoder"])
    given = {
        "batch": {"file": "rows.txt", "--out": "out", **dict(part.split("=") for part in files(tiny_files))},
        "quantize": {"src": "gone.safetensors", "dst": "q.safetensors"},
        "quantize-encoder": {"src": encoder, "dst": "q.safetensors"},
        "convert": {"src": model, "dst": "q.safetensors", "--to": "kitchen"},
        "inspect": {"file": model},
        "compare": {"prompt": "a", **dict(part.split("=") for part in files(tiny_files))},
        "verify": {"model": model, "--device": "cpu"},
    }[command]
    given = {key: found for key, found in given.items() if key in names} | {name: value}
    arguments = [found if not key.startswith("-") else f"{key}={found}" for key, found in given.items()]
    code, error = run([command, *arguments], capsys)
    assert code in (0, 1, 2), error


# ---- what other programs wrote, or a batch that was killed ------------------------------------------------------


@many
@given(kept=values | st.fixed_dictionaries({"key": st.just({"a": "b"}), "ways": values | st.dictionaries(
    st.sampled_from(["triton w4a8", "triton w4a16", "fused w4a8", "attention int8", "x"]), values | st.dictionaries(
    st.sampled_from(["few_ms", "many_ms", "w8_ms", "w16_ms", "error", "refused"]), values))}))  # fmt: skip
def test_figures_of_tune(tmp_path_factory, kept):
    """A cache file with other content is none, or one that `auto` can choose from."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "x.json").write_text(json.dumps(kept))
    record = tune.read(folder / "x.json", {"a": "b"})
    if record is not None:
        tune.describe(record)
        with suppress(ValueError):
            tune.pick(record, [("triton", "w4a8"), ("triton", "w4a16")])
    shutil.rmtree(folder)


LINES = ("file", "bytes", "key", "error", "together", "seed", "made_with")
record = values | st.fixed_dictionaries({"id": st.sampled_from("ab") | values}, optional=dict.fromkeys(LINES, values))


@commands
@given(lines=st.lists(record, max_size=4), place=st.floats(0, 1), data=st.binary(max_size=8), cut=st.booleans(),
    name=st.sampled_from(["manifest.jsonl", "journal-x.jsonl", "failed.jsonl"]))  # fmt: skip
def test_what_a_batch_left(tmp_path_factory, lines, place, data, cut, name):
    """Whatever is in its lists: the next run makes what is missing, and then nothing is."""
    folder = tmp_path_factory.mktemp("batch")
    rows = [{"id": one, "prompt": one, "width": 32, "height": 32} for one in "ab"]
    assert len(list(batch.run(rows, folder, generator=StandIn()))) == 2
    there = (folder / name).read_bytes() if (folder / name).exists() else b""
    more = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / name).write_bytes(changed_bytes(there, place, data, cut) + more)
    list(batch.run(rows, folder, generator=StandIn()))
    assert not list(batch.run(rows, folder, generator=StandIn()))
    assert {"a.png", "b.png"} <= set(os.listdir(folder))
    shutil.rmtree(folder)


workflow = values | st.dictionaries(st.sampled_from("12"), values | st.fixed_dictionaries({}, optional={
    "class_type": st.sampled_from(["SaveImage", "KSampler"]) | values, "inputs": values | st.dictionaries(
        st.sampled_from(["seed", "text"]), values)}))  # fmt: skip


@many
@given(content=workflow, target=st.sampled_from(["1.seed=seed", "2.text=prompt", "=", "1.=", "3.x=y"]) | texts)
def test_workflows_of_comfyui(tmp_path_factory, content, target):
    folder = tmp_path_factory.mktemp("workflow")
    (folder / "x.json").write_text(json.dumps(content))
    with suppress(ValueError):
        found = comfyui.read_workflow(folder / "x.json")
        columns = comfyui.WorkflowColumns(found, [target])
        json.dumps(columns.settings({"prompt": "a", "x": 3}, 5))
    shutil.rmtree(folder)


@pytest.fixture
def complete(monkeypatch):
    """Of nodes/host/replace.py, in a ComfyUI without other packs."""
    comfyui, host = types.ModuleType("nodes"), types.ModuleType("zimage_host")
    comfyui.NODE_CLASS_MAPPINGS, host.__path__ = {}, [str(Path(__file__).parents[2] / "nodes" / "host")]
    monkeypatch.setitem(sys.modules, "nodes", comfyui)
    monkeypatch.setitem(sys.modules, "zimage_host", host)
    return importlib.import_module("zimage_host.replace").complete


STACKS = [f"NunchakuZImageTurboLoraStackV{version}" for version in (1, 2, 3, 4)]
slot = values | st.fixed_dictionaries({}, optional={"enabled": values, "lora_name": values, "lora_strength": values})
inputs = st.dictionaries(st.sampled_from(["model", "lora_count", "stack_enabled", "lora_1", "lora_11", "lora_x"]), slot)
node = values | st.fixed_dictionaries(
    {"class_type": st.sampled_from([*STACKS, "NunchakuZImageDiTLoader"]) | values},
    optional={"inputs": inputs | values, "_meta": values},
)


@many
@given(request=values | st.fixed_dictionaries({"prompt": values | st.dictionaries(st.sampled_from("123"), node)}))
def test_prompts_with_nodes_of_other_packs(complete, request):
    """As they come to the server: changed or left alone; ComfyUI itself refuses what is none."""
    assert complete(request) is request
