"""Batches of real pictures: those of `zimage generate`, whatever is done before, after or beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.torch import save_file

from zimage_core import batch, cli, metadata
from zimage_core.batch.columns import PictureColumns
from zimage_core.batch.pictures import PictureGenerator
from zimage_core.batch.rows import Rows
from zimage_core.formats.identify import model_info
from zimage_core.models.config import ControlNetConfig

SMALL = {"width": 48, "height": 32, "steps": 2}


def hashes(folder: Path) -> dict[str, str]:
    return {record["id"]: record["sha256"] for record in batch.Sink(folder).records()}


@pytest.fixture(scope="module")
def control(control_tensors, tiny_files, tmp_path_factory) -> Path:
    """A ControlNet for the tiny model."""
    base = model_info(tiny_files["model"]).config
    config = {"n_layers": base.n_layers, "axes_dims": base.axes_dims, "control_layers_places": [0]}
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file(control_tensors(ControlNetConfig(base, (0,), 33, "hints")), path, {"config": json.dumps(config)})
    return path


@pytest.fixture
def options(tiny_files) -> list[str]:
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    return [*(f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()), *small, "--device=cpu"]


def test_a_batch_is_what_generate_makes_of_each_row(options, control, tmp_path, capsys):
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((64, 64)).save(start)
    Image.new("L", (64, 64)).save(mask)
    with Image.open(mask) as picture:
        picture.paste(255, (16, 16, 40, 40))
        picture.save(mask)
    rows = [
        {"id": "plain", "prompt": "a cat", "seed": 3},
        {"id": "guided", "prompt": "a dog", "seed": 4, "guidance": 1.5, "negative_prompt": "é 中"},
        {"id": "folder/from-image", "prompt": "a cat", "seed": 5, "image": "start.png", "strength": 0.5},
        {"id": "large", "prompt": "a cat", "seed": 6, "width": 64, "height": 64},
        {"id": "masked", "prompt": "a cat", "seed": 9, "image": "start.png", "mask": "mask.png", "feather": 4},
        {
            "id": "padded",
            "prompt": "a cat",
            "seed": 9,
            "image": "start.png",
            "pad": "0,0,32,0",
            "width": 96,
            "height": 64,
        },
        {
            "id": "guided-by",
            "prompt": "a cat",
            "seed": 9,
            "control": f"{control}:0.7:0-0.8",
            "control_image": "start.png",
        },
        {
            **{"id": "steered", "prompt": "a cat", "seed": 2, "sampler": "heun", "schedule": "beta", "shift": 2.0},
            **{"nag_scale": 2.0, "negative_prompt": "a dog", "variety": 20.0},
        },
        {"id": "several", "prompt": "a long prompt of a cat", "seed": 7, "count": 2},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert cli.main(["batch", str(file), f"--out={out}", *options, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[-1])
    assert (facts["rows"], facts["generated"], facts["there"], facts["failed"]) == (10, 10, 0, 0)
    assert "10 pictures, 0 of them are there, 10 to generate; reference w4a16 bfloat16 on cpu" in captured.err
    single = {
        "plain": ["a cat", "--seed=3"],
        "guided": ["a dog", "--seed=4", "--guidance=1.5", "--negative-prompt=é 中"],
        "folder/from-image": ["a cat", "--seed=5", f"--image={start}", "--strength=0.5"],
        "large": ["a cat", "--seed=6", "--width=64", "--height=64"],
        "masked": ["a cat", "--seed=9", f"--image={start}", f"--mask={mask}", "--feather=4"],
        "padded": ["a cat", "--seed=9", f"--image={start}", "--pad=0,0,32,0", "--width=96", "--height=64"],
        "guided-by": ["a cat", "--seed=9", f"--control={control}:0.7:0-0.8", f"--control-image={start}"],
        "steered": ["a cat", "--seed=2", "--sampler=heun", "--schedule=beta", "--shift=2", "--nag-scale=2"]
        + ["--negative-prompt=a dog", "--variety=20"],
        "several-1": ["a long prompt of a cat", "--seed=7"],
        "several-2": ["a long prompt of a cat", "--seed=8"],
    }
    for name, arguments in single.items():
        prompt, *rest = arguments
        assert cli.main(["generate", prompt, *options, *rest, f"--out={tmp_path / 'one.png'}"]) == 0
        with Image.open(tmp_path / "one.png") as one, Image.open(out / f"{name}.png") as other:
            assert one.tobytes() == other.tobytes(), name
            of_one, of_other = metadata.read(one), metadata.read(other)
            for fact in ("prompt", "seed", "negative_prompt", "steps", "guidance", "width", "backend"):
                assert of_one.get(fact) == of_other.get(fact), fact
    capsys.readouterr()
    assert cli.main(["batch", str(file), f"--out={out}", *options]) == 0
    assert "0 pictures generated" in capsys.readouterr().out


def test_a_row_that_fails_is_told_recorded_and_leaves_the_rest_alone(options, tmp_path, capsys):
    (tmp_path / "no.safetensors").write_bytes(b"no lora")
    file = tmp_path / "rows.csv"
    file.write_text("id,prompt,lora\nbad,a cat,no.safetensors\ngood,a cat,\n")
    out = tmp_path / "out"
    assert cli.main(["batch", str(file), f"--out={out}", *options]) == 1
    captured = capsys.readouterr()
    assert "zimage: bad: " in captured.err and "no.safetensors" in captured.err
    assert "1 pictures generated" in captured.out and "1 failed" in captured.out
    assert list(hashes(out)) == ["good"]
    assert cli.main(["batch", str(file), f"--out={out}", *options, "--width=50"]) == 2
    assert "rows.csv, row 1: width: expected a multiple of 16" in capsys.readouterr().err


def test_a_picture_depends_on_its_row_alone(tiny_files, tmp_path):
    rows = [{"id": f"cat-{i}", "prompt": "a cat " * (1 + i), "seed": i, **SMALL} for i in range(5)]
    models = {**tiny_files, "device": "cpu"}
    list(batch.run(rows, tmp_path / "one", **models))
    list(batch.run(rows[3:], tmp_path / "other", **models))
    list(batch.run(rows[::-1], tmp_path / "other", **models))
    list(batch.run(rows, tmp_path / "resident", **models, vram_budget=None))  # each batch encodes its own prompts
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other") == hashes(tmp_path / "resident")
    assert batch.run(rows, tmp_path / "one", **models, precision="w4a16").missing == 0
    changed = batch.run(rows, tmp_path / "two", **models, precision="w4a4")
    list(changed)
    assert not set(hashes(tmp_path / "one").values()) & set(hashes(tmp_path / "two").values())


def test_a_folder_keeps_to_the_arithmetic_that_it_began_with(tiny_files, tmp_path):
    rows = [{"id": "a", "prompt": "a cat", **SMALL}]
    models = {**tiny_files, "device": "cpu"}
    list(batch.run(rows, tmp_path, **models, precision="w4a4", dtype="float32"))
    run = batch.run(rows, tmp_path, **models)
    assert run.missing == 0 and "w4a4 float32" in run.note
    run.close()
    run = batch.run(rows, tmp_path, **models, precision="w4a16")
    assert run.missing == 1 and "w4a16 float32" in run.note
    run.close()


def test_what_worker_processes_refuse_is_told_before_work(tiny_files, tmp_path):
    rows = [{"prompt": "a cat", **SMALL}]
    with pytest.raises(ValueError, match="VAE"):
        batch.run(rows, tmp_path, **{**tiny_files, "text_encoder": tiny_files["vae"]}, devices=["cpu"])
    with pytest.raises(ValueError, match="cuda:77"):
        batch.run(rows, tmp_path, **tiny_files, devices=["cuda:77"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--workers=2"], "--workers is for --ray"),
        (["--workflow=a.json"], "are for --comfyui URL"),
        (["--set=5.seed=seed"], "are for --comfyui URL"),
        (["--output=9"], "are for --comfyui URL"),
    ],
)
def test_options_of_another_engine_are_refused(tmp_path, capsys, given, words):
    (tmp_path / "rows.txt").write_text("a cat\n")
    assert cli.main(["batch", str(tmp_path / "rows.txt"), f"--out={tmp_path / 'out'}", *given]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_holds_for_all_rows_is_said_once(tmp_path, caplog):
    rows = [{"prompt": f"a red circle {i}", "width": 32, "height": 32, "steps": 1} for i in range(3)]
    assert all(result.error is None for result in batch.run(rows, tmp_path, device="cpu"))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["32 x 32"]


def test_gpus_that_are_not_there_are_refused(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "a.txt").write_text("a cat\n")
    for asked, words in (("all", "torch sees no GPU here"), ("some", "expected all or numbers")):
        assert cli.main(["batch", str(tmp_path / "a.txt"), f"--out={tmp_path}", f"--gpus={asked}"]) == 2
        assert words in capsys.readouterr().err


def test_pictures_made_together_differ_by_rounding_and_only_as_many_as_memory_allows(tiny_files, tmp_path):
    """On a CPU, where they are not, as it gains nothing: told to, as on a GPU. A level of 255 is bf16's rounding."""
    rows = [{"id": f"cat-{i}", "prompt": "a cat " * (1 + i), "seed": i, **SMALL} for i in range(6)]
    list(batch.run(rows, tmp_path / "one", **tiny_files, device="cpu", dtype="float32"))
    options = {**tiny_files, "device": "cpu", "dtype": "float32"}
    generator = PictureGenerator(options)
    generator.most = 4
    results = list(batch.run(rows, tmp_path / "four", generator=generator))
    assert sorted(result.record["together"] for result in results) == [2, 2, 4, 4, 4, 4]
    for path in (tmp_path / "one").glob("*.png"):
        with Image.open(path) as one, Image.open(tmp_path / "four" / path.name) as other:
            assert abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max() <= 1
    row = next(iter(Rows([{"prompt": "a cat", "width": 256, "height": 256}], PictureColumns())))
    assert generator.together(row) == 4
    one, four = (generator.pipeline.plan(["a cat"] * n, 256, 256) for n in (1, 4))
    assert four.peak > one.peak
    tight = PictureGenerator({**options, "vram_budget": (one.peak + four.peak) / 2 / 2**30 + 0.04})
    tight.most = 4
    assert tight.together(row) < 4
