"""The quantizer: the file that it writes, its arithmetic, and what is left behind when it fails."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from dense_files import CONFIG, diffusers_names, digest
from safetensors.torch import load_file, save_file

from zimage_core import __version__, whole
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.identify import likely_variant
from zimage_core.formats.load import load_transformer
from zimage_core.formats.safetensors import read_header
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.memory.offload import BlockStreamer
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import encode_prompts
from zimage_core.models.tokenizer import find_tokenizer, load_tokenizer
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quantize.run import TimeLeft, calibration_captions, quantize_checkpoint
from zimage_core.quantize.solver import low_rank, svdq_from_dense
from zimage_core.quantize.writer import StreamedFile, diffusers_config, file_metadata, plan_header

pytestmark = pytest.mark.filterwarnings("ignore:.* tokens to calibrate linears of:UserWarning")

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"


def comfy_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors as ComfyUI's BF16 file names them: fused q, k, v, apart w1, w3."""
    named = {}
    for key, tensor in state.items():
        for ours, theirs in (("to_qkv", "qkv"), ("to_out", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
            key = key.replace(ours, theirs)
        if "w3_w1" in key:
            for part, rows in zip(("w3", "w1"), tensor.chunk(2), strict=True):
                named[key.replace("w3_w1", part)] = rows.clone()
        else:
            named[key] = tensor
    return named


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = ZImageTransformer(CONFIG).to(torch.bfloat16).state_dict()
    return {key: torch.randn_like(value) if key.endswith("pad_token") else value for key, value in state.items()}


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "dense.safetensors"
    save_file(diffusers_names(dense), path, {"config": json.dumps(diffusers_config(CONFIG))})
    return path


def test_planned_header_is_the_real_files():
    real = json.loads((DATA / "real_model_expected_tensors_r256.json").read_text())
    expected = {k: ({"bfloat16": "BF16", "int8": "I8"}[d], tuple(shape)) for k, (d, shape) in real["tensors"].items()}
    assert plan_header(ZImageConfig(), 256) == expected
    assert diffusers_config(ZImageConfig()) == real["config"]
    assert len(plan_header(ZImageConfig(), 256, skip_refiners=True)) == 1027


def test_header_and_metadata_equal_those_of_a_genuine_file(tmp_path):
    config = ZImageConfig(dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, axes_lens=(256, 64, 64))
    torch.manual_seed(0)
    state = ZImageTransformer(config).to(torch.bfloat16).state_dict()
    save_file(diffusers_names(state), tmp_path / "a", {"config": json.dumps(diffusers_config(config))})
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", rank=32)
    genuine, written = read_header(TINY), read_header(tmp_path / "b")
    assert list(written.tensors.items()) == list(genuine.tensors.items())
    made = json.loads(written.metadata.pop("quantized_by"))
    assert (made["tool"], made["version"], made["method"]) == ("zimage-int4", __version__, "svd")
    assert written.metadata == genuine.metadata


@pytest.mark.parametrize("rank", [16, 128])
def test_linear_is_within_half_a_step_of_its_weight(rank):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 384, generator=generator)
    smooth = torch.rand(384, generator=generator) + 0.5
    quantized = svdq_from_dense(weight, rank, smooth)
    steps = quantized.wscales.float().repeat_interleave(64, 1) / quantized.smooth_factor.float()
    assert ((quantized.dequantize() - weight).abs() <= 0.51 * steps + 1e-6).all()  # scales are rounded to bf16


def test_low_rank_is_the_best_one():
    weight = torch.randn(200, 330, generator=torch.Generator().manual_seed(2))
    best = torch.linalg.svdvals(weight)[16:].square().sum().sqrt()
    for matrix in (weight, weight.T):
        up, down = low_rank(matrix, 16)
        assert torch.dist(matrix, up @ down) == pytest.approx(best.item(), rel=1e-3)


def test_zero_weights_stay_zero():
    assert svdq_from_dense(torch.zeros(128, 128), 16).dequantize().count_nonzero() == 0


@pytest.mark.parametrize("skip_refiners", [False, True])
def test_quantized_model_is_close_to_its_source(source, tmp_path, skip_refiners):
    quantize_checkpoint(source, tmp_path / "q.safetensors", rank=128, skip_refiners=skip_refiners)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    caption = torch.randn(9, CONFIG.cap_feat_dim, generator=generator)
    outputs = []
    for path in (source, tmp_path / "q.safetensors"):
        model = load_transformer(path, dtype=torch.float32, backend="reference", precision="w4a16")
        with torch.inference_mode():
            outputs.append(model(latents, torch.tensor([0.3]), model.prepare([caption], 64, 96)))
    assert torch.dist(*outputs) < 0.12 * outputs[0].norm()


def test_name_styles_shards_and_repetition_give_the_same_file(dense, source, tmp_path):
    save_file(comfy_names(dense), tmp_path / "comfy.safetensors", {"config": json.dumps(diffusers_config(CONFIG))})
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    named = diffusers_names(dense)
    names = sorted(named)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: named[key] for key in keys}, sharded / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    digests = set()
    for i, src in enumerate((source, source, tmp_path / "comfy.safetensors", sharded)):
        quantize_checkpoint(src, tmp_path / f"{i}", rank=16)
        digests.add(digest(tmp_path / f"{i}"))
    assert len(digests) == 1


def test_the_file_says_which_z_image_it_is(source, tmp_path):
    """As asked for, or as the source's own metadata say; a name that says nothing leaves it open."""
    for variant in ("base", None):
        quantize_checkpoint(source, tmp_path / "q.safetensors", rank=16, variant=variant)
        assert likely_variant(tmp_path / "q.safetensors") == variant


def test_lora_is_merged_before_quantizing(dense, source, tmp_path):
    generator = torch.Generator().manual_seed(8)
    pair = {"lora_A": torch.randn(4, 384, generator=generator), "lora_B": torch.randn(384, 4, generator=generator) / 50}
    name = "diffusion_model.layers.0.attention.to_k"
    save_file({f"{name}.{leaf}.weight": tensor for leaf, tensor in pair.items()}, tmp_path / "lora.safetensors")
    merged = dict(dense)
    key = "layers.0.attention.to_qkv.weight"
    q, k, v = merged[key].float().chunk(3)
    merged[key] = torch.cat([q, k + 0.5 * pair["lora_B"] @ pair["lora_A"], v])
    save_file(diffusers_names(merged), tmp_path / "merged", {"config": json.dumps(diffusers_config(CONFIG))})

    quantize_checkpoint(source, tmp_path / "a", rank=16, merge=[(tmp_path / "lora.safetensors", 0.5)])
    quantize_checkpoint(tmp_path / "merged", tmp_path / "b", rank=16)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    prefix = "layers.0.attention.to_qkv"
    weights = [SVDQWeights.from_packed(file, prefix + ".").dequantize() for file in (a, b)]
    assert torch.dist(*weights) < 0.02 * weights[0].norm()
    same = [name for name in a if not name.startswith(prefix)]
    assert all(torch.equal(a[name], b[name]) for name in same)
    assert "lora.safetensors:0.5" in read_header(tmp_path / "a").metadata["quantized_by"]


def test_fp8_source_is_read_without_a_warning(dense, source, tmp_path):
    fp8 = {}
    for key, tensor in diffusers_names(dense).items():
        if tensor.ndim == 2 and "refiner" in key and key.endswith(".weight"):
            scale = tensor.abs().amax().float() / 448
            fp8[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            fp8[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            fp8[key] = tensor
    fp8["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(fp8, tmp_path / "fp8", {"config": json.dumps(diffusers_config(CONFIG))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "a", rank=128)
    quantize_checkpoint(source, tmp_path / "b", rank=128)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    prefix = "noise_refiner.0.feed_forward.net.2."
    weights = [SVDQWeights.from_packed(file, prefix).dequantize() for file in (a, b)]
    assert torch.dist(*weights) < 0.15 * weights[0].norm()


@pytest.mark.parametrize("rank", [None, 16])
def test_synthetic_files_load(tmp_path, rank):
    path = Path(__file__).parents[2] / "benchmarks" / "make_synthetic.py"
    spec = importlib.util.spec_from_file_location("make_synthetic", path)
    make_synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_synthetic)
    assert make_synthetic.write_synthetic(tmp_path / "f", CONFIG, rank) == (tmp_path / "f").stat().st_size
    model = load_transformer(tmp_path / "f", dtype=torch.float32)
    with torch.inference_mode():
        cond = model.prepare([torch.ones(5, CONFIG.cap_feat_dim)], 64, 64)
        output = model(torch.randn(1, 16, 8, 8), torch.tensor([0.5]), cond)
    assert 0.3 < output.std() < 3


def test_progress_counts_to_the_end(source, tmp_path):
    calls = []
    quantize_checkpoint(source, tmp_path / "q", rank=16, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and len(set(done)) == 12  # the linears of three blocks
    assert [call[2] for call in calls[:5:4]] == ["block 1/3, attention.to_qkv", "block 2/3, attention.to_qkv"]
    assert calls[-1][0] == calls[-1][1]


def test_nothing_is_left_when_interrupted(source, tmp_path):
    (tmp_path / "q").write_bytes(b"the file that was there")

    def interrupt(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "q", rank=16, progress=interrupt)
    assert left(tmp_path) == ["q"]
    assert (tmp_path / "q").read_bytes() == b"the file that was there"


def model_output(path: Path, precision: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 16, 16, 16, generator=generator)
    caption = torch.randn(30, CONFIG.cap_feat_dim, generator=generator)
    model = load_transformer(path, dtype=torch.float32, backend="reference", precision=precision)
    with torch.inference_mode():
        return model(latents, torch.tensor([0.4]), model.prepare([caption], 128, 128))


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_calibration_beats_rounding_to_nearest(outliers, calibrated, tmp_path, precision):
    quantize_checkpoint(outliers, tmp_path / "plain", rank=32)
    right = model_output(outliers, precision)
    plain, ours = (torch.dist(model_output(path, precision), right) for path in (tmp_path / "plain", calibrated))
    assert ours < 0.75 * plain


def test_calibrated_file_has_the_same_header_and_says_how_it_was_made(outliers, calibrated, tmp_path):
    quantize_checkpoint(outliers, tmp_path / "plain", rank=32)
    plain, ours = read_header(tmp_path / "plain"), read_header(calibrated)
    assert ours.tensors == plain.tensors
    made, plainly = (json.loads(header.metadata.pop("quantized_by")) for header in (ours, plain))
    assert (made["tool"], made["prompts"], made["size"]) == ("zimage-int4", 2, 96)
    assert made["source"] == plainly["source"] and made["method"] != plainly["method"]
    assert ours.metadata == plain.metadata


LEFTOVERS = [".q.zimage-done", ".q.zimage-part"]
HEADER, NOTES = {"b.x": ("BF16", (2, 3)), "c.x": ("BF16", (2, 3))}, {"n": ("F32", (1, 5)), "p": ("I64", (1,))}
VALUES = {"b.x": torch.ones(2, 3).to(torch.bfloat16), "n": torch.rand(1, 5), "p": torch.tensor([7])}


def left(folder: Path) -> list[str]:
    """The names in a folder, but for locks, which stay."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".zimage-lock"))


def begin(path: Path) -> None:
    """Finish one of two sections, and stop."""
    with pytest.raises(RuntimeError), StreamedFile(path, HEADER, {}, NOTES) as out:
        for name, value in VALUES.items():
            out.write(name, value)
        out.finish("b")
        raise RuntimeError


@pytest.mark.parametrize(
    ("failing", "error", "raised"),
    [("fsync", OSError(5, "Input/output error"), ValueError), ("replace", KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_what_is_finished_is_kept_when_the_end_fails(tmp_path, monkeypatch, failing, error, raised):
    def fail(*_):
        raise error

    begin(tmp_path / "q")
    with pytest.raises(raised), StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out:
        out.write("c.x", VALUES["b.x"])
        out.finish("c")
        monkeypatch.setattr(os, failing, fail)
    monkeypatch.undo()
    assert left(tmp_path) == LEFTOVERS
    with StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out:
        assert out.finished == ["b", "c"]
    assert torch.equal(load_file(tmp_path / "q")["c.x"], VALUES["b.x"])
    assert left(tmp_path) == ["q"]


@pytest.mark.parametrize(
    "damage", ["cut off", "header", "a tensor's byte", "a note's byte", "the list", "the list's hash", "gone"]
)
def test_damaged_leftovers_are_made_afresh(tmp_path, damage):
    """Whichever byte of what was finished is another one, nothing of it is used, and the run says so."""
    begin(tmp_path / "q")
    part, done = tmp_path / ".q.zimage-part", tmp_path / ".q.zimage-done"
    old, listed = part.read_bytes(), done.read_bytes()
    flipped = {"header": 20, "a note's byte": len(old) - 1, "a tensor's byte": old.index(b"\x80\x3f") + 1}
    if damage == "gone":
        part.unlink()
    elif damage == "cut off":
        part.write_bytes(old[:-10])
    elif damage.startswith("the list"):
        first, line = listed.splitlines(keepends=True)
        done.write_bytes(first + (b"{}\n" if damage == "the list" else line.replace(line[-20:-10], b"0123456789")))
    else:
        at = flipped[damage]
        part.write_bytes(old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :])
    with warnings.catch_warnings(record=True) as caught:
        begin(tmp_path / "q")
    said = [str(warning.message) for warning in caught]
    words = f"{part}: the leftovers are damaged; of 1 finished parts 0 are used; the rest is made afresh"
    assert said == ([] if damage == "gone" else [words])
    assert part.read_bytes() == old and done.read_bytes() == listed


def test_what_is_before_the_damage_is_used(tmp_path):
    begin(tmp_path / "q")
    with pytest.raises(RuntimeError), StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out:
        out.write("c.x", VALUES["b.x"])
        out.finish("c")
        place = out._offsets["c.x"]
        raise RuntimeError
    with (tmp_path / ".q.zimage-part").open("r+b") as file:
        file.seek(place)
        file.write(b"!")
    with (
        pytest.warns(UserWarning, match="of 2 finished parts 1 are used"),
        StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out,
    ):
        assert out.finished == ["b"]
        out.write("c.x", VALUES["b.x"])
        out.finish("c")
    assert torch.equal(load_file(tmp_path / "q")["c.x"], VALUES["b.x"])


def test_a_list_of_finished_sections_may_end_anywhere(tmp_path):
    begin(tmp_path / "q")
    with (tmp_path / ".q.zimage-done").open("a") as record:
        record.write('{"section": "c", "sha')
    stop = pytest.raises(ValueError, match="tensors missing: c.x")
    with stop, StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out:
        assert out.finished == ["b"]


@pytest.mark.parametrize("ending", ["part", "done", "lock"])
@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_files_of_others_are_neither_written_nor_followed(tmp_path, ending, kind):
    """Neither the names that the quantizer uses itself, nor those that a user would: his stay as they are."""
    mine = {tmp_path / name: name for name in ("q.partial", "q.partial.finished", "mine")}
    for path, text in mine.items():
        path.write_text(text)
    taken = tmp_path / f".q.zimage-{ending}"
    if kind == "file" and ending != "lock":
        taken.write_text("mine")
    elif kind != "file":
        taken.symlink_to(tmp_path / ("mine" if kind == "link" else "gone"))
    if kind == "file" and ending == "lock":  # which holds nothing
        begin(tmp_path / "q")
    else:
        with pytest.raises(ValueError, match=rf"\.q\.zimage-{ending}: expected .* move it away"):
            begin(tmp_path / "q")
        assert taken.is_symlink() or taken.read_text() == "mine"
    assert all(path.read_text() == text for path, text in mine.items()) and not (tmp_path / "gone").exists()


def test_a_lock_outlives_its_holder(tmp_path):
    """Were it removed, one run could hold the removed file and another the new one."""
    begin(tmp_path / "q")
    before = (tmp_path / ".q.zimage-lock").stat().st_ino
    with StreamedFile(tmp_path / "q", HEADER, {}, NOTES) as out:
        out.write("c.x", VALUES["b.x"])
    assert (tmp_path / ".q.zimage-lock").stat().st_ino == before and not (tmp_path / ".q.zimage-lock").read_bytes()


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(whole.FileLock, "acquire", refuse)
    begin(tmp_path / "q")
    assert left(tmp_path) == LEFTOVERS


@pytest.mark.skipif(sys.platform == "win32", reason="folders are synced by the system")
def test_files_and_folders_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    log, sync, replace = [], os.fsync, os.replace
    name = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(name(descriptor)) or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new: log.append("rename") or replace(old, new))
    with StreamedFile(tmp_path / "q", HEADER, {}) as out:
        out.write("b.x", VALUES["b.x"])
        out.write("c.x", VALUES["b.x"])
    assert log[-4:] == [".q.zimage-part", tmp_path.name, "rename", tmp_path.name]


def test_notes_are_reserved_with_the_file_and_not_part_of_it(tmp_path):
    begin(tmp_path / "f")
    with StreamedFile(tmp_path / "f", HEADER, {}, NOTES) as out:
        assert out.partial.stat().st_size == out.size + 28
        assert all(torch.equal(out.read(name), value) for name, value in VALUES.items())
        out.write("c.x", VALUES["b.x"])
    assert (tmp_path / "f").stat().st_size == out.size
    assert load_file(tmp_path / "f").keys() == HEADER.keys()


def test_two_runs_do_not_write_one_file(outliers, tmp_path):
    """Neither in this process nor in another; nothing of the first run's is touched."""
    header, tensor = {"b": ("BF16", (2, 3))}, torch.randn(2, 3).to(torch.bfloat16)
    run = "from zimage_core.quantize.run import quantize_checkpoint as q"
    code = f"import sys; {run}; q(sys.argv[1], sys.argv[2], rank=32)"
    with StreamedFile(tmp_path / "q", header, {}, {}) as out:
        with pytest.raises(ValueError, match="another run is writing it; wait until it is done"):
            quantize_checkpoint(outliers, tmp_path / "q", rank=32)
        command = [sys.executable, "-c", code, str(outliers), str(tmp_path / "q")]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1].startswith(f"ValueError: {tmp_path / 'q'}: another run is writing it")
        out.write("b", tensor)
    assert torch.equal(load_file(tmp_path / "q")["b"], tensor)
    assert left(tmp_path) == ["q"]
    with StreamedFile(tmp_path / "q", header, {}) as out:
        out.write("b", tensor)


def test_a_disk_that_is_full_at_the_first_tensor_leaves_nothing(outliers, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    write = StreamedFile.write

    def fill_up(self, name, tensor):
        self._file.close()
        self._file = Full()
        write(self, name, tensor)

    monkeypatch.setattr(StreamedFile, "write", fill_up)
    with pytest.raises(ValueError, match="No space left on device; free"):
        quantize_checkpoint(outliers, tmp_path / "q", rank=32)
    assert left(tmp_path) == []


def test_time_left_follows_the_pace_of_late():
    now = [100.0]
    words = TimeLeft(lambda: now[0])

    def after(seconds: float, done: int, what: str = "block 3/34, attention.to_out") -> str:
        now[0] += seconds
        return words(done, 1000, what)

    assert after(10, 0) == "block 3/34, attention.to_out"
    assert after(10, 16).endswith("attention.to_out, 20:30 left")  # 20 s for 16 of 1000, 984 to go
    for i in range(2, 30):
        said = after(2, 16 * i)
    assert said.endswith(", 1:07 left")  # 2 s for 16, 536 to go
    assert after(0, 500, "resumed block 4/34, attention.to_out") == "resumed block 4/34, attention.to_out"
    assert after(800, 600).endswith(", 53:20 left") and after(8000, 601).endswith(", 9:39:24 left")
    assert after(1, 1000, "q.safetensors") == "q.safetensors"


def test_leftovers_serve_the_same_job_only(tmp_path):
    header = {"b.x": ("BF16", (2, 3)), "c.x": ("BF16", (2, 3))}
    tensor = torch.randn(2, 3).to(torch.bfloat16)
    with pytest.raises(RuntimeError), StreamedFile(tmp_path / "f", header, {"a": "1"}, notes={}) as out:
        out.write("b.x", tensor)
        out.finish("b")
        raise RuntimeError
    with StreamedFile(tmp_path / "f", header, {"a": "1"}, notes={}) as out:
        assert out.finished == ["b"]
        assert torch.equal(out.read("b.x"), tensor)
        out.write("c.x", tensor)
    assert torch.equal(load_file(tmp_path / "f")["b.x"], tensor)
    with pytest.raises(RuntimeError), StreamedFile(tmp_path / "g", header, {"a": "1"}, notes={}) as out:
        out.finish("b")
        raise RuntimeError
    with (
        pytest.warns(UserWarning, match="g.zimage-part: the leftovers are of a run with other settings"),
        pytest.raises(RuntimeError),
        StreamedFile(tmp_path / "g", header, {"a": "2"}, notes={}) as out,
    ):
        assert out.finished == []
        raise RuntimeError
    assert left(tmp_path) == ["f"]


def test_bad_input_is_refused_in_a_sentence(dense, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    damaged = diffusers_names(dense)
    damaged["layers.0.feed_forward.w1.weight"] = damaged["layers.0.feed_forward.w1.weight"] * float("nan")
    save_file(damaged, tmp_path / "nan")
    for src, dst, rank, message in (
        (tmp_path / "nan", out / "q", 16, "feed_forward.w1.weight: expected numbers up to 1e.06, found nan; get an"),
        (TINY, out / "q", 16, "expected a BF16 model, found svdq-int4"),
        (source, source, 16, "is the source itself"),
        (source, out / "q", 24, "rank: expected a multiple of 16"),
        (source, out / "q", 400, "rank: expected a multiple of 16 up to 384"),
        (source, out / "none" / "q", 16, "choose another folder"),
        (source, out, 16, f"^{out}: expected a file to write, found a folder"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            quantize_checkpoint(src, dst, rank=rank)
        assert "\n" not in str(caught.value)
    assert left(out) == []
    assert source.is_file()


def test_numbers_that_cannot_be_computed_with_are_refused_in_a_sentence(dense, source, captions, tmp_path):
    (tmp_path / "out").mkdir()
    huge = {key: tensor.float() for key, tensor in diffusers_names(dense).items()}
    huge["layers.0.feed_forward.w2.weight"][0, 0] = 3.4e38
    save_file(huge, tmp_path / "huge")
    name = "diffusion_model.layers.0.attention.to_k"
    pair = {"lora_A": torch.ones(4, 384), "lora_B": torch.ones(384, 4)}
    save_file({f"{name}.{leaf}.weight": tensor for leaf, tensor in pair.items()}, tmp_path / "lora")
    damaged = [captions[0], captions[1] * float("nan")]
    for src, options, message in (
        (tmp_path / "huge", {}, "huge: layers.0.feed_forward.w2.weight: expected numbers up to .*, found 3.4e.38"),
        (source, {"merge": [(tmp_path / "lora", 1e30)]}, "lora: merged into layers.*to_qkv.weight: .*; lower its"),
        (source, {"merge": [(tmp_path / "lora", float("nan"))]}, "lora: strength: expected a finite number, found nan"),
        (source, {"merge": [(tmp_path / "lora", float("-inf"))]}, "strength: expected a finite number, found -inf"),
        (source, {"cap_feats": damaged}, "cap_feats of prompt 2/2: expected finite numbers, found NaN or infinity"),
        *((source, {"size": size}, "size: expected a positive multiple of 16 pixels") for size in (-64, 0, 72)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            quantize_checkpoint(src, tmp_path / "out" / "q", rank=16, **options)
        assert "\n" not in str(caught.value)
    assert left(tmp_path / "out") == []


def test_a_thin_calibration_gets_a_warning(outliers, captions, tmp_path):
    """Two pictures of 8 x 8 tokens at four sigmas each are half as many as there are inputs, of 9 x 9 more."""

    def stop(*_):
        raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (128, 144):
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(outliers, tmp_path / "q", rank=16, cap_feats=captions, size=size, progress=stop)
    (warning,) = caught
    assert "2 prompts at 128 x 128 pixels give 512 tokens to calibrate linears of 1024 inputs" in str(warning.message)


def test_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ValueError, match="No space left on device; free 6 MiB"):
        StreamedFile(tmp_path / "q", plan_header(CONFIG, 16), file_metadata(CONFIG, 16))
    assert left(tmp_path) == []


def test_streamed_file_takes_only_what_is_planned(tmp_path):
    header = {"b": ("BF16", (2, 3)), "a": ("I8", (4,))}
    b, a = torch.randn(2, 3).to(torch.bfloat16), torch.arange(4, dtype=torch.int8)
    with StreamedFile(tmp_path / "f", header, {"made": "here"}) as out:
        out.write("a", a)
        with pytest.raises(ValueError, match="b: expected BF16"):
            out.write("b", b.float())
        with pytest.raises(ValueError, match="c: expected no such tensor"):
            out.write("c", a)
        out.write("b", b.T.contiguous().T)
    loaded = load_file(tmp_path / "f")
    assert torch.equal(loaded["a"], a) and torch.equal(loaded["b"], b)
    with pytest.raises(ValueError, match="1 tensors missing: b"), StreamedFile(tmp_path / "g", header, {}) as out:
        out.write("a", a)
    assert left(tmp_path) == ["f"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_text_encoder_need_not_fit_on_a_gpu(tiny_files, monkeypatch):
    encoder, prompts = tiny_files["text_encoder"], ["a cat", "two dogs"]
    resident, place = [], BlockStreamer.place

    def watched(streamer, *args):
        place(streamer, *args)
        resident.append(streamer.resident)

    monkeypatch.setattr(BlockStreamer, "place", watched)
    found = calibration_captions(encoder, prompts, device="cuda")
    assert resident == [0]
    whole, tokenizer = load_text_encoder(encoder, device="cuda"), load_tokenizer(find_tokenizer(encoder))
    expected = encode_prompts(whole, tokenizer, prompts)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(found, expected, strict=True))
