"""The plan's numbers against the models themselves: a counter of live storages runs them on torch's meta device.

Kernels and attention that do not run there are replaced by functions that allocate what they allocate.
"""

from __future__ import annotations

import json
import re
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zimage_core import cli, load_pipeline, pipeline
from zimage_core.formats import stored as encoder_formats
from zimage_core.formats.encoder import check_text_encoder, load_text_encoder
from zimage_core.formats.identify import model_info
from zimage_core.formats.load import load_transformer
from zimage_core.formats.stored import FORMS, StoredLinear
from zimage_core.formats.vae import load_vae, read_vae_config
from zimage_core.linear import backends
from zimage_core.linear.adapters import Linear
from zimage_core.linear.backends import Backend, reference, triton
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights
from zimage_core.memory import plan
from zimage_core.memory.offload import BlockStreamer, flat_bytes, module_bytes, weights
from zimage_core.models import ops
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.models.transformer import Hooks, ZImageTransformer
from zimage_core.models.vae import VAE, VAEConfig, decode_image

GIB = 2**30
CONFIG = ZImageConfig(n_layers=2, n_refiner_layers=1)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages alive, and their peak, without those of the tensors given."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._meet(tensor.untyped_storage(), 0)

    def _meet(self, storage, size: int) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return out


class Kernel:
    """A Triton kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.fixture
def kernels(monkeypatch):
    """backends.triton and backends.fused without their kernels; returns the fused functions."""
    fused = pytest.importorskip("zimage_core.linear.backends.fused", exc_type=ImportError)
    stand_in = types.ModuleType("zimage_core.linear.backends.triton_kernels")
    for name in ("dequantize", "requantize", "quantize_rows", "rescale_add"):
        setattr(stand_in, name, Kernel())
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(backends, "triton_kernels", stand_in, raising=False)
    for name in ("_norm_scale", "_norm_gate_add", "_norm_rope", "_swiglu", "_swiglu_codes"):
        monkeypatch.setattr(fused, name, Kernel())
    return ops.Ops(fused.norm_scale, fused.norm_gate_add, fused.norm_rope, fused.swiglu)


@pytest.fixture
def flash(monkeypatch):
    """Attention as a GPU computes it, without the matrix of all pairs."""

    def attention(q, k, v, **options):
        return torch.empty(q.transpose(1, 2).shape, device=q.device, dtype=q.dtype).transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def attend(q, k, v, mask):
    """What flash attention allocates: its output and a number per query."""
    (b, tokens, heads, width), device = q.shape, q.device
    out, _ = torch.empty(b, tokens, heads * width, device=device, dtype=q.dtype), torch.empty(b, heads, tokens)
    return out


def meta_transformer(config: ZImageConfig, arithmetic: str, rank: int, dtype: torch.dtype) -> ZImageTransformer:
    def svdq(n_in, n_out, bias):
        return SVDQLinear(n_in, n_out, bias, rank=rank, dtype=dtype)

    with torch.device("meta"):
        model = ZImageTransformer(config, linear=Linear if arithmetic == "dense" else svdq).to(dtype)
    for module in model.modules():
        if isinstance(module, SVDQLinear):
            name, precision = arithmetic.split()[:2]
            held = {k: v for k, v in module._buffers.items() if v is not None}
            module.load(SVDQWeights(**held), Backend(name, precision, backends.load(name), ""))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("arithmetic", "fused", "dtype", "batch", "size", "tokens"),
    [
        ("triton w4a8", True, BF16, 1, (1024, 1024), 60),
        ("triton w4a8", True, BF16, 1, (512, 512), 20),
        ("triton w4a8", True, BF16, 3, (512, 768), 200),
        ("triton w4a8", True, BF16, 1, (2048, 2048), 500),
        ("triton w4a8", True, FP16, 1, (1024, 1024), 60),
        ("triton w4a8 int8", True, BF16, 1, (1024, 1024), 60),
        ("triton w4a16", True, BF16, 1, (1024, 1024), 60),
        ("triton w4a16", True, BF16, 1, (512, 512), 60),
        ("triton w4a16", True, FP16, 2, (512, 512), 60),
        ("dense", True, BF16, 1, (1024, 1024), 60),
        ("dense", False, FP32, 1, (512, 512), 60),
        ("reference w4a16", False, BF16, 2, (1024, 1024), 60),
        ("reference w4a16", False, FP16, 1, (256, 256), 20),
        ("reference w4a4", False, BF16, 1, (1024, 1024), 60),
    ],
)
def test_activations_of_the_transformer(kernels, monkeypatch, arithmetic, fused, dtype, batch, size, tokens):
    int8 = arithmetic.endswith("int8")
    monkeypatch.setattr(triton, "capability", lambda device: 80 if int8 else 90)
    model = meta_transformer(CONFIG, arithmetic, 256, dtype)
    if fused:
        model.use(kernels)
    feats = torch.empty(tokens, CONFIG.cap_feat_dim, device="meta", dtype=dtype)
    latents = torch.empty(batch, 16, size[0] // 8, size[1] // 8, device="meta")
    t, hooks = torch.empty(1, device="meta"), Hooks(attention=attend)
    with torch.no_grad():
        cond = model.prepare([feats], *size, hooks)
        known = (*model.parameters(), *model.buffers(), latents, t, cond.context, cond.cos, cond.sin)
        with LiveBytes(*known) as live:
            model(latents, t, cond, hooks)
    e, fp16 = dtype.itemsize, dtype is FP16
    rows = batch * (cond.image_tokens + plan.padded(tokens))
    need = plan.transformer_need(CONFIG, rows, 256, arithmetic, fused, e, fp16)
    assert need.total == pytest.approx(live.peak, rel=0.1 if arithmetic == "reference w4a4" else 0.01)
    conditioning = plan.conditioning_bytes(CONFIG, cond.image_tokens, [tokens], e, fp16)
    assert conditioning == sum(y.untyped_storage().nbytes() for y in (cond.context, cond.cos, cond.sin))


def stored_parts(form: str, n: int, k: int) -> dict[str, torch.Tensor]:
    def raw(width):
        return torch.empty(n, width, dtype=torch.uint8, device="meta")

    scale = torch.empty(n, 1, device="meta")
    if form == "int8":
        return {"codes": raw(k).view(torch.int8), "scale": scale}
    if form == "nvfp4":
        return {"codes": raw(k // 2), "block_scale": raw(k // 16), "scale": scale}
    if form.startswith("float8"):
        return {"codes": raw(k), "scale": scale}
    return {"codes": raw(GGUF_BLOCKS[form][1] * k // GGUF_BLOCKS[form][0])}


# Weights of a block and its bytes, as ggml-common.h has them.
GGUF_BLOCKS = {
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q3_K": (256, 110),
    "IQ4_XS": (256, 136),
}


@pytest.mark.parametrize("form", ["float", "int8", "float8_e4m3fn", "nvfp4", *GGUF_BLOCKS])
def test_activations_and_weights_of_the_text_encoder(flash, monkeypatch, form):
    if form not in {"float", *plan.FORMS}:
        pytest.importorskip("gguf")

        def on_the_host(form, parts):
            block, size = GGUF_BLOCKS[form]
            return torch.empty(len(parts["codes"]), parts["codes"].shape[1] // size * block, device="meta")

        monkeypatch.setattr(encoder_formats, "dequantize", on_the_host)
    config = TextEncoderConfig(num_layers=2, vocab_size=8)
    encoder = TextEncoder(config, Linear if form == "float" else StoredLinear, device="meta", dtype=BF16)
    for module in encoder.modules():
        if isinstance(module, StoredLinear):
            module.load(form, stored_parts(form, module.out_features, module.in_features))
    for tokens in (20, 500):
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), LiveBytes(*encoder.parameters(), *encoder.buffers(), ids) as live:
            encoder(ids)
        need = plan.encoder_need(config, tokens, [form], 2).total
        assert need == pytest.approx(live.peak, rel=0.05, abs=2**18)
    plain = TextEncoder(config, Linear, device="meta").state_dict()
    stored = {name: (form if t.ndim == 2 else "float", tuple(t.shape)) for name, t in plain.items()}
    found = plan.encoder_weights(stored, config.num_layers, 2)
    assert found.blocks == tuple(map(module_bytes, encoder.layers))
    assert found.slot == max(map(flat_bytes, encoder.layers))


def test_the_forms_are_those_of_the_encoder():
    assert plan.FORMS.keys() == FORMS.keys() - {"float"}


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig((32, 64, 64, 64), 2, 16, 8),
        VAEConfig((64, 32), 1, 4, 8),
        VAEConfig((8, 16, 64), 3, 4, 8),
    ],
)
def test_activations_and_weights_of_the_vae(flash, config):
    with torch.device("meta"):
        vae = VAE(config).to(BF16).eval().requires_grad_(False)
    assert plan.vae_weights(config, 2).total == module_bytes(vae)
    for height, width in ((512, 512), (768, 1024)):
        shape = (1, config.latent_channels, height // config.downscale, width // config.downscale)
        latents, picture = (torch.empty(s, device="meta", dtype=BF16) for s in (shape, (1, 3, height, width)))
        for half, x, encode in ((vae.decoder, latents, False), (vae.encoder, picture, True)):
            with torch.no_grad(), LiveBytes(*vae.parameters(), x) as live:
                half(x)
            assert plan.vae_values(config, encode) * height * width * 2 == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize(
    ("config", "pictures", "tile"),
    [(VAEConfig(), 3, None), (VAEConfig(), 1, 48), (VAEConfig((8, 8), 1, 16, 4), 12, None)],
)
def test_finished_pictures_and_tiles(flash, config, pictures, tile):
    with torch.device("meta"):
        vae = VAE(config).to(BF16).eval().requires_grad_(False)
        latents = torch.empty(pictures, 16, 32, 72)
        with torch.no_grad(), LiveBytes(*vae.parameters(), latents) as live:
            decode_image(vae, latents, tile or "off").mul(255).round()
    height, width = (side * config.downscale for side in latents.shape[2:])
    need = plan.vae_need(config, height, width, pictures, 2, tile)
    assert need.total == pytest.approx(live.peak, rel=0.06)


def test_weights_from_the_header_are_those_of_the_model(tiny_files):
    info = model_info(tiny_files["model"])
    for dtype, precision in ((BF16, "w4a16"), (FP32, "w4a4")):
        model = load_transformer(tiny_files["model"], dtype=dtype, backend="reference", precision=precision)
        arithmetic = plan.arithmetic(model.backend, torch.device("cpu"))
        found = plan.transformer_weights(info.config, info.rank, info.quantized_refiners, dtype.itemsize, arithmetic)
        assert found == weights(model.blocks, model)
    model = meta_transformer(CONFIG, "triton w4a8", 256, BF16)
    assert plan.transformer_weights(CONFIG, 256, True, 2, "triton w4a8") == weights(model.blocks, model)
    assert (plan.CHUNK, plan.KEPT_DENSE) == (reference.CHUNK, reference.DENSE)
    assert plan.FEW_ROWS == triton.FEW_ROWS
    config, stored = check_text_encoder(tiny_files["text_encoder"])
    encoder = load_text_encoder(tiny_files["text_encoder"], dtype=BF16)
    forms = {name: (weight.form, weight.shape) for name, weight in stored.items()}
    assert plan.encoder_weights(forms, config.num_layers, 2).total == sum(map(module_bytes, encoder.layers))
    vae = load_vae(tiny_files["vae"])
    assert plan.vae_weights(read_vae_config(tiny_files["vae"]), 4).total == module_bytes(vae)


# ---- sharing a budget out -------------------------------------------------------------------------------------


def full_plan(budget: float | None, size: int = 1024, encoder: str | None = "float8_e4m3fn", **options) -> plan.Plan:
    """The plan of the full-size r256 model on a GPU with fp8."""
    return plan.full_size_plan(size, size, budget and int(budget * GIB), encoder=encoder, **options)


@pytest.mark.parametrize(("size", "budget"), [(1024, 4.0), (1024, 2.5), (512, 2.0), (2048, 8.0)])
def test_the_targets_fit(size, budget):
    found = full_plan(budget, size)
    assert found.peak <= found.usable < budget * GIB
    assert found.stage("transformer").resident > 0
    assert [stage.name for stage in found.stages] == ["text encoder", "transformer", "VAE"]


def test_more_budget_streams_less_and_none_streams_nothing():
    resident = [full_plan(b).stage("transformer").resident for b in (2.0, 3.0, 4.0, 5.5)]
    assert resident == sorted(resident) and resident[0] < resident[-1] == 34
    free = full_plan(None)
    assert all(stage.resident == stage.blocks for stage in free.stages)
    assert "no limit" in free.table()


@pytest.mark.parametrize("budget", [None, 4.0, 5.5, 80])
def test_a_budget_holds_one_model_at_a_time(budget):
    """Whatever its size and whatever is there from the picture before: the peak is that of the largest stage alone."""
    held = {"transformer": 2 * GIB, "VAE": GIB // 6}
    for found in (full_plan(budget), full_plan(budget, held=held)):
        assert all(stage.beside == () for stage in found.stages)
        own = [s.on_device + s.activations + s.workspace + plan.CUBLAS for s in found.stages]
        assert found.peak - max(own) < 2**26  # conditioning, latents
        assert "stays" not in found.table()


def test_only_without_any_limit_do_models_stay():
    held = {"transformer": 4 * GIB, "VAE": GIB // 6}
    found = full_plan(None, held=held, together=True)
    assert found.stage("text encoder").beside == ("transformer", "VAE")
    assert found.stage("VAE").beside == ("transformer",)
    assert found.stage("VAE").peak > full_plan(None).stage("VAE").peak + 4 * GIB
    encoder, transformer, vae = found.table().splitlines()[2:]
    assert encoder.endswith("transformer stays, VAE stays") and transformer.endswith("VAE stays")
    assert vae.endswith("transformer stays")


def test_large_pictures_and_small_budgets_decode_in_tiles():
    assert full_plan(8.0, 1024).tiling == "auto"
    assert full_plan(8.0, 2048).tiling == 96
    assert full_plan(1.3, 1024, encoder=None).tiling == 96
    assert "in tiles of 96 cells" in full_plan(8.0, 2048).table()


def test_a_budget_that_cannot_hold_a_stage_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match=r"vram budget 0\.50 GiB: the .* needs .* give at least (\S+) GiB") as caught:
        full_plan(0.5)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    for _ in range(3):  # each stage may ask for more
        try:
            full_plan(least)
            break
        except ValueError as error:
            least = float(str(error).split("at least ")[1].split()[0])
    assert full_plan(least).stage("transformer").resident == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * GIB),
        ("4", 4 * GIB),
        (2.5, 2.5 * GIB),
        ("3500 MiB", 3500 * 2**20),
        ("8gb", 8e9),
        ("auto", "auto"),
        (None, None),
    ],
)
def test_budgets_are_read(text, expected):
    assert plan.parse_budget(text) == expected


@pytest.mark.parametrize("text", ["much", "0", "-4GiB", "4TiB", ""])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match="vram budget: expected auto or a size"):
        plan.parse_budget(text)


def test_readme_tells_what_fits():
    """Its table, cell by cell, and the least budgets that it names."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## What fits my card")[2]
    text = text.partition("\n## ")[0]
    heading, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    sizes = [int(cell.split(" x ")[0]) for cell in heading[1:]]
    context = float(re.search(r"the ([\d.]+) GiB that CUDA itself takes", text)[1])
    assert (heading[0], sizes, len(rows)) == ("card", [512, 1024, 1536, 2048], 4)
    for card, *cells in rows:
        for size, cell in zip(sizes, cells, strict=True):
            found = full_plan(float(card.removesuffix(" GB")) - context, size)
            stage = found.stage("transformer")
            streamed = stage.blocks - stage.resident
            expected = f"streams {streamed}" if streamed else f"all resident, {found.peak / GIB:.1f} GiB"
            tiles = ", VAE in tiles" if found.stage("VAE").note else ""
            assert cell.replace(f" of {stage.blocks} blocks", "") == expected + tiles, (card, size)
            encoder = found.stage("text encoder")
            assert (encoder.resident < encoder.blocks) == (card in ("3 GB", "4 GB")), "up to 4 GB it is streamed"
    least = re.findall(r"([\d.]+) GiB for\s(\d+) x", text)
    assert [size for _, size in least] == ["1024", "2048"]
    for budget, size in least:
        assert full_plan(float(budget), int(size))
        with pytest.raises(ValueError, match="vram budget"):
            full_plan(float(budget) - 0.1, int(size))


# ---- in the pipeline, where a CPU stands in for the device ------------------------------------------------------

SIZE = {"height": 64, "width": 48, "num_inference_steps": 2, "generator": 1}


@pytest.fixture(scope="module")
def unlimited(tiny_files):
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


@pytest.fixture
def small(tiny_files, monkeypatch):
    """A pipeline whose budget holds some of the transformer's blocks."""
    monkeypatch.setattr(plan, "reserve", lambda budget: 0)
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


def limit(pipe) -> None:
    """A budget with which no block stays (the model has only three)."""
    pipe.vram_budget = None
    pipe("a cat", **SIZE)
    stage = pipe.plan.stage("transformer")
    found = weights(pipe._streamer.blocks, pipe.transformer)
    pipe.vram_budget = stage.peak - stage.on_device + found.rest + 2 * found.slot + 2**19
    pipe.transformer, pipe._streamer, pipe.vae = None, None, None
    pipe._prompts.clear()


def test_a_budget_changes_nothing_in_the_picture(unlimited, small):
    (expected,) = unlimited("a cat", **SIZE)
    limit(small)
    resident = []
    for _ in range(2):
        (found,) = small("a cat", **SIZE, on_step=lambda *_: resident.append(small._streamer.resident))
        assert found.tobytes() == expected.tobytes()
        assert small.plan.peak <= small.plan.usable == small.vram_budget
    assert resident == [0] * 4
    (again,) = small("a dog", **SIZE, guidance_scale=2.0, negative_prompt="a cat")
    assert again.tobytes() == unlimited("a dog", **SIZE, guidance_scale=2.0, negative_prompt="a cat")[0].tobytes()


@pytest.fixture
def together(monkeypatch):
    """The models on the device whenever one comes or goes, as sets."""
    there, seen = set(), []

    def note(name: str, comes: bool) -> None:
        (there.add if comes else there.discard)(name)
        seen.append(frozenset(there))

    def watch(owner, attribute: str, name: str, comes=lambda *_: True, when=lambda *_: True) -> None:
        plain = getattr(owner, attribute)

        def watched(*args, **options):
            if when(*args):
                note(name, comes(*args))
            return plain(*args, **options)

        monkeypatch.setattr(owner, attribute, watched)

    def of_transformer(streamer, *_):
        return streamer._model is not None

    watch(BlockStreamer, "place", "transformer", when=of_transformer)
    watch(BlockStreamer, "leave", "transformer", comes=lambda *_: False, when=of_transformer)
    watch(pipeline, "load_vae", "VAE")
    watch(VAE, "to", "VAE", comes=lambda vae, place: place != "cpu")  # a torch.device where it comes
    load = pipeline.load_text_encoder

    def load_encoder(*args, **options):
        note("text encoder", True)
        encoder = load(*args, **options)
        weakref.finalize(encoder, note, "text encoder", False)
        return encoder

    monkeypatch.setattr(pipeline, "load_text_encoder", load_encoder)
    return seen


@pytest.mark.parametrize("budget", ["too small for two", 2**40, "auto"])
def test_no_two_models_are_on_the_device(small, request, monkeypatch, budget):
    """Under a budget, and without one on a GPU, whatever is free there."""
    limit(small)
    if budget == "auto":
        monkeypatch.setattr(type(small), "_budget", lambda self: 2**40)
    if not isinstance(budget, str) or budget == "auto":
        small.vram_budget = budget
    together = request.getfixturevalue("together")  # watches from here on
    for prompt in ("a cat", "a dog"):
        small(prompt, **SIZE)
    assert set(together) == {frozenset(), *(frozenset([name]) for name in ("text encoder", "transformer", "VAE"))}


def test_without_any_limit_models_stay_for_the_next_picture(small, together):
    small.vram_budget = None
    for prompt in ("a cat", "a dog"):
        small(prompt, **SIZE)
    assert together[-1] == {"transformer", "VAE"}
    assert small.plan.stage("VAE").beside == ("transformer",)


def test_the_command_line_has_one_model_at_a_time_without_a_budget_too(tiny_files, tmp_path, monkeypatch, capsys):
    """It draws once, so what has done its part is dropped: no model is alive when the next one is read."""
    alive, seen = weakref.WeakSet(), []

    def watch(owner, name):
        plain = getattr(owner, name)

        def load(*args, **options):
            seen.append((name, len(alive)))
            model = plain(*args, **options)
            alive.add(model)
            return model

        monkeypatch.setattr(owner, name, load)

    watch(pipeline, "load_text_encoder")
    watch(pipeline.checkpoint, "load_transformer")
    watch(pipeline, "load_vae")
    options = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    size = ["--width=48", "--height=64", "--steps=1", "--seed=1", f"--out={tmp_path / 'cat.png'}"]
    assert cli.main(["generate", "a cat", "--device=cpu", "--json", *options, *size]) == 0
    assert seen == [("load_text_encoder", 0), ("load_transformer", 0), ("load_vae", 0)]
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["backend"] == "reference" and not any(stage["beside"] for stage in facts["plan"]["stages"])


def test_a_pipeline_for_once_draws_again_all_the_same(unlimited, tiny_files):
    once = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16", once=True)
    (expected,) = unlimited("a cat", **SIZE)
    for _ in range(2):
        assert once("a cat", **SIZE)[0].tobytes() == expected.tobytes()
        assert once.transformer is None and once.plan.stage("VAE").beside == ()


def test_a_budget_that_is_too_small_is_told_before_any_work(small):
    small.vram_budget = 2**10
    stages = []
    with pytest.raises(ValueError, match="vram budget .* give at least"):
        small("a cat", **SIZE, on_stage=lambda *stage: stages.append(stage))
    assert not stages
    small.vram_budget = None
    assert small("a cat", **SIZE)


def test_out_of_memory_while_sampling_streams_everything_once_and_is_remembered(unlimited, small, monkeypatch, caplog):
    (expected,) = unlimited("a cat", **SIZE)
    block, failures = small, []
    run = type(unlimited)._denoise

    def denoise(self, *args):
        if self._streamer.resident:
            failures.append(self._streamer.resident)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return run(self, *args)

    monkeypatch.setattr(type(unlimited), "_denoise", denoise)
    assert block("a cat", **SIZE)[0].tobytes() == expected.tobytes()
    assert len(failures) == 1 and "trying again with every block of it streamed" in caplog.text
    assert block("a cat", **SIZE)[0].tobytes() == expected.tobytes()
    assert len(failures) == 1, "the next picture of that size is streamed at once"
    assert block.plan.stage("transformer").resident == 0, "and its plan says so"
    with pytest.raises(torch.OutOfMemoryError):
        block("a cat", **SIZE | {"height": 32})  # smaller: tried with resident blocks again ...
        monkeypatch.setattr(type(unlimited), "_denoise", always_fails)
        block("a cat", **SIZE)
    monkeypatch.undo()
    assert block("a cat", **SIZE)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("what", ["load text encoder", "place text encoder", "encode", "load", "place"])
def test_out_of_memory_on_the_way_to_the_device_is_survived_too(tiny_files, unlimited, monkeypatch, caplog, what):
    (expected,) = unlimited("a cat", **SIZE)
    owner, name = {
        "load text encoder": (pipeline, "load_text_encoder"),
        "encode": (pipeline, "encode_prompts"),
        "load": (pipeline.checkpoint, "load_transformer"),
    }.get(what, (BlockStreamer, "place"))
    plain, failed = getattr(owner, name), []

    def once(*args, **options):
        model = args[0]._model if owner is BlockStreamer else None
        if not failed and (owner is not BlockStreamer or (model is None) == (what == "place text encoder")):
            failed.append(what)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, once)
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    assert pipe("a cat", **SIZE)[0].tobytes() == expected.tobytes()
    assert failed and "trying again with every block of it streamed" in caplog.text
    model = "text encoder" if "encode" in what else "transformer"
    assert pipe.plan.stage(model).resident == 0 and f"out of memory in the {model}" in caplog.text


def always_fails(self, *args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_plan_for_json_and_for_people(unlimited):
    unlimited("a cat", **SIZE)
    facts = unlimited.plan.facts()
    assert facts["budget_gib"] is None and facts["stages"][-1]["name"] == "VAE"
    lines = unlimited.plan.table().splitlines()
    assert lines[0].startswith("1 picture of 48 x 64, no limit, predicted peak")
    assert len({line.rindex(".") for line in lines[2:]}) == 1
    assert lines[1].split()[0] == "MiB" and full_plan(None).table().splitlines()[1].split()[0] == "GiB"


def test_the_command_line_prints_the_plan_and_keeps_it(tiny_files, tmp_path, capsys, caplog):
    options = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    size = ["--width=48", "--height=64", "--steps=1", "--seed=1", f"--out={tmp_path / 'cat.png'}"]
    assert cli.main(["generate", "a cat", "--device=cpu", "--json", "--vram-budget=60MiB", *options, *size]) == 0
    assert "1 picture of 48 x 64, budget 60 MiB, predicted peak" in caplog.text
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert facts["budget_gib"] == round(60 / 1024, 4) and [s["name"] for s in facts["stages"]][1] == "transformer"
    for budget, words in (("lots", "expected auto or a size"), ("1MiB", "give at least")):
        assert cli.main(["generate", "a cat", "--device=cpu", f"--vram-budget={budget}", *options, *size]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line


def test_a_full_size_plan_without_a_file_is_that_of_its_parts():
    found = full_plan(4.0)
    transformer = found.stage("transformer")
    assert transformer.weights == plan.transformer_weights(ZImageConfig(), 256, True, 2, "triton w4a8").total
    assert replace(found, title="") != found
