"""Plans: what stages take beside weights against real sizes and a GPU's figures, and how a budget is shared out."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from zimage_core import bench, cli, load_pipeline, residents, sampler, sources
from zimage_core.files import find_files
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.formats.stored import StoredLinear
from zimage_core.formats.vae import load_vae
from zimage_core.linear import backends
from zimage_core.linear.adapters import Linear
from zimage_core.linear.backends import Backend
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights, svdq_linears
from zimage_core.lora.read import Lora
from zimage_core.memory import plan
from zimage_core.memory.meta import META
from zimage_core.memory.offload import BlockStreamer
from zimage_core.memory.placement import module_bytes, weights
from zimage_core.memory.stages import CUBLAS, Request, decoding_bytes, encoding_bytes, sampling_bytes
from zimage_core.models import ops
from zimage_core.models.config import ZImageConfig
from zimage_core.models.guidance import Nag
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.models.vae import VAE, VAEConfig
from zimage_core.sampler import denoise
from zimage_core.sizes import GIB
from zimage_core.sources import Sources

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 cannot count the memory of w4a8, which it cannot run"
)
ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONFIG = ZImageConfig(n_layers=2, n_refiner_layers=1)


def sampling(model: ZImageTransformer, *sizes, **options) -> int:
    return sampling_bytes(model, Request(*sizes, **options))


@pytest.fixture
def compute_capability(monkeypatch):
    """Lets the meta device stand for an NVIDIA GPU of some compute capability."""

    def choose(sm: int) -> None:
        monkeypatch.setattr(backends.load("triton"), "capability", lambda device: sm)

    return choose


def meta_transformer(
    config: ZImageConfig, arithmetic: str, dtype: torch.dtype = BF16, rank: int = 256, fused: bool = False
) -> ZImageTransformer:
    """A transformer on the meta device; arithmetic is "dense" or a backend and its precision."""

    def svdq(n_in, n_out, bias):
        return SVDQLinear(n_in, n_out, bias, rank=rank, dtype=dtype)

    with torch.device("meta"):
        model = ZImageTransformer(config, linear=Linear if arithmetic == "dense" else svdq).to(dtype)
    for module in model.modules():
        if isinstance(module, SVDQLinear):
            name, precision = arithmetic.split()
            held = {k: v for k, v in module._buffers.items() if v is not None}
            module.load(SVDQWeights(**held), Backend(name, precision, backends.load(name), ""))
    if fused:
        kernels = pytest.importorskip("zimage_core.linear.backends.fused", exc_type=ImportError)
        model.use(ops.Ops(*(getattr(kernels, name) for name in ops.Ops._fields)))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("arithmetic", "sm", "fused", "dtype", "pictures", "size", "per_token", "fixed"),
    [
        # The widest moment is SwiGLU over [values, gates]: 2F and F of 16 bits, in w4a8 F codes more, beside the
        # block's input, x and a norm; the dequantized weight of w3_w1 where it lies beside them. Codes in fp8 have 3 R
        # columns more.
        ("triton w4a8", 90, True, BF16, 1, 1024, "(3 * 2 + 1) * f + (3 * 2 + 1) * d + 2 * 3 * r", "0"),
        ("triton w4a8", 90, True, BF16, 3, 512, "(3 * 2 + 1) * f + (3 * 2 + 1) * d + 2 * 3 * r", "0"),
        ("triton w4a16", 90, True, BF16, 1, 2048, "3 * 2 * f + 3 * 2 * d", "0"),
        # Few rows: the weight of w3_w1 with the low-rank branch, and activations that have space for it.
        ("triton w4a16", 90, True, BF16, 1, 512, "2 * 2 * f + 3 * 2 * d + 2 * r", "2 * f * (d + r) * 2"),
        ("dense", 0, True, BF16, 1, 1024, "3 * 2 * f + 3 * 2 * d", "0"),
        ("dense", 0, False, FP32, 1, 512, "4 * 4 * f + 3 * 4 * d", "0"),
        # Codes in int8 have no more columns. Before sm_80 int8 products in 32 bits lie beside the result. The residual
        # stream in 32 bits and a dequantized weight in fp16.
        ("triton w4a8", 80, True, BF16, 1, 1024, "(3 * 2 + 1) * f + (3 * 2 + 1) * d", "0"),
        ("triton w4a8", 75, True, FP16, 1, 1024, "(2 * 2 + 4 * 2) * f + (4 + 4 + 2 + 1) * d + 2 * r", "2 * f * d"),
        ("triton w4a16", 90, True, FP16, 1, 1024, "2 * 2 * f + (4 + 4 + 2) * d", "2 * f * d * 2"),
        ("reference w4a16", 0, False, BF16, 2, 1024, "2 * 2 * 2 * f + 2 * r + 3 * 2 * d", "2 * f * d * 2"),
    ],
)
def test_activations_of_the_transformer(
    compute_capability, arithmetic, sm, fused, dtype, pictures, size, per_token, fixed
):
    """The widest moment of a block, written down by hand, within 2 % at full widths."""
    compute_capability(sm)
    model = meta_transformer(CONFIG, arithmetic, dtype, fused=fused)
    sizes = {"d": CONFIG.dim, "f": CONFIG.ffn_dim, "r": 256}
    tokens = pictures * ((size // 16) ** 2 + 64)
    expected = tokens * eval(per_token, sizes) + eval(fixed, sizes)
    found = sampling(model, size, size, pictures, [60])
    assert found == pytest.approx(expected, rel=0.02)


def test_what_steers_a_picture_counts_and_tiles_take_less():
    """NAG has a second caption and a second attention beside the first, variety each picture's own caption."""
    model = meta_transformer(CONFIG, "dense")
    one = sampling(model, 1024, 1024, 1, [60])
    nag = sampling(model, 1024, 1024, 1, [60], negative=[60], guided=False, nag=Nag(1.0))
    assert one < nag < 2 * one
    assert nag < sampling(model, 1024, 1024, 1, [60], negative=[500], guided=False, nag=Nag(1.0))
    assert sampling(model, 512, 512, 4, [60], varied=True) > sampling(model, 512, 512, 4, [60])
    large = sampling(model, 2048, 2048, 1, [60], tile=128)
    latents = 4 * 16 * 256**2  # in fp32; a few of them lie beside a tile's step
    assert one < large < one + 10 * latents < sampling(model, 2048, 2048, 1, [60])


def test_prompts_pictures_and_guidance_count():
    """More prompts, more pictures and a negative prompt take more; a repeated question is answered as before."""
    model = meta_transformer(CONFIG, "dense")
    one = sampling(model, 512, 512, 1, [60])
    assert sampling(model, 512, 512, 1, [60]) == one
    angles = 4 * (32 * 32 + 64) * CONFIG.head_dim  # cosines and sines of another prompt, and its tokens in bf16
    negative = sampling(model, 512, 512, 1, [60], negative=[60]) - one
    assert negative == pytest.approx(angles + 2 * 64 * CONFIG.dim, rel=0.5)
    assert one < sampling(model, 512, 512, 1, [600]) < 2 * one < sampling(model, 512, 512, 3, [60] * 3)


# Weights of a block and its bytes, as ggml-common.h has them.
GGUF_BLOCKS = {"Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q4_0": (32, 18)}
FP32_COPIES = {
    "int8": 2,
    "float8_e4m3fn": 2,
    "nvfp4": 2.125,
    "Q8_0": 2,
    "Q4_K": 2.2,
    "Q5_K": 2.6,
    "Q6_K": 2.4,
    "Q4_0": 2.3,  # the nibbles as bytes, as floats, their product with the scales
}


def stored_parts(form: str, n: int, k: int) -> dict[str, torch.Tensor]:
    def raw(width: int) -> torch.Tensor:
        return torch.empty(n, width, dtype=torch.uint8, device="meta")

    scale = torch.empty(n, 1, device="meta")
    if form == "int8":
        return {"codes": raw(k).view(torch.int8), "scale": scale}
    if form == "nvfp4":
        return {"codes": raw(k // 2), "block_scale": raw(k // 16), "scale": scale}
    if form.startswith("float8"):
        return {"codes": raw(k), "scale": scale}
    return {"codes": raw(GGUF_BLOCKS[form][1] * k // GGUF_BLOCKS[form][0])}


def meta_encoder(form: str, config: TextEncoderConfig) -> TextEncoder:
    with META:
        encoder = TextEncoder(config, Linear if form == "float" else StoredLinear).to(BF16)
    for module in encoder.modules():
        if isinstance(module, StoredLinear):
            module.load(form, stored_parts(form, module.out_features, module.in_features))
    return encoder.requires_grad_(False)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("form", ["float", "int8", "float8_e4m3fn", "nvfp4", *GGUF_BLOCKS])
def test_activations_of_the_text_encoder(form, kernels):
    """By hand: a few tokens take a dequantized weight and, without the kernels, the fp32 copies of the 2^22 weights at
    work, many take the feed-forward's three products beside x, its sum and its norm. Within 5 %, of which small tensors
    have their part. Prompts are padded to a multiple of 32, as on a GPU."""
    if kernels:
        pytest.importorskip("triton")
    config = TextEncoderConfig(num_layers=2, vocab_size=8)
    encoder, (c, f) = meta_encoder(form, config), (config.hidden_size, config.intermediate_size)
    for module in encoder.modules():
        if isinstance(module, StoredLinear):
            module.kernels = kernels
    for tokens in (32, 2016):
        moments = [tokens * 2 * (3 * c + 3 * f)]
        if form != "float":
            copies = 0 if kernels else round(4 * FP32_COPIES[form] * 2**22)
            moments.append(2 * f * c + copies + tokens * 2 * (3 * c + f))
            moments.append(2 * f * c + tokens * 2 * (3 * c + 2 * f))
        assert encoding_bytes(encoder, tokens) == pytest.approx(max(moments), rel=0.05, abs=2**18)
        assert encoding_bytes(encoder, tokens - 12) == encoding_bytes(encoder, tokens)


@pytest.mark.parametrize("config", [VAEConfig(), VAEConfig((32, 64, 64, 64), 2, 16, 8), VAEConfig((64, 32), 1, 4, 8)])
def test_activations_of_the_vae(config):
    """By hand: at full size the last level's input, and in its second resnet x and three more tensors of its width.

    Within 2 %, for latents and for what lies there at a quarter of the size."""
    with torch.device("meta"):
        vae = VAE(config).to(BF16).requires_grad_(False)
    last, before = config.block_out_channels[:2]
    area = 768 * 1024
    found = decoding_bytes(vae, 768, 1024)
    assert found == pytest.approx(2 * area * (before + 4 * last), rel=0.02)
    two = decoding_bytes(vae, 768, 1024, pictures=2)
    assert two == pytest.approx(found + 12 * area, rel=0.02), "the first picture waits in fp32"
    if config == VAEConfig():
        assert decoding_bytes(vae, 768, 1024, tile=48) < found / 2


def test_planned_weights_are_those_of_the_model(tiny_files):
    for dtype, precision in ((BF16, "w4a16"), (FP32, "w4a4")):
        options = {"dtype": dtype, "backend": "reference", "precision": precision}
        model = load_transformer(tiny_files["model"], **options)
        sources = Sources(find_files(**tiny_files), torch.device("cpu"), **options)
        planned, planned_encoder = sources.transformer(META), sources.text_encoder(META)
        assert weights(planned.blocks, planned) == weights(model.blocks, model)
        encoder = load_text_encoder(tiny_files["text_encoder"], dtype=dtype)
        assert weights(planned_encoder.layers, planned_encoder.layers) == weights(encoder.layers, encoder.layers)
        assert module_bytes(sources.vae(META)) == module_bytes(load_vae(tiny_files["vae"]))
        # and what they take is the same wherever the weights are
        assert sampling(planned, 64, 64, 1, [9]) == sampling(model, 64, 64, 1, [9])
        assert encoding_bytes(planned_encoder, 9) == encoding_bytes(encoder, 9)


def test_captions_of_several_lengths_take_what_the_longest_do(tiny_files):
    """So that one count serves all mixtures: it takes the time of a picture at full size."""
    model = load_transformer(tiny_files["model"], dtype=BF16, backend="reference")
    mixed = sampling(model, 64, 64, 3, [9, 40, 70])
    assert mixed == sampling(model, 64, 64, 3, [70, 70, 9])
    assert mixed == pytest.approx(sampling(model, 64, 64, 3, [70, 70, 70]), rel=0.01)  # there is a mask


# ---- at full size ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    """A function: the r256 model in w4a8 on a GPU with fp8, an FP8 encoder and the VAE in bf16, on the meta device."""
    models: dict[str, torch.nn.Module] = {}

    def get() -> dict[str, torch.nn.Module]:
        if not models:
            models["transformer"] = meta_transformer(ZImageConfig(), "triton w4a8", fused=True)
            models["encoder"] = meta_encoder("float8_e4m3fn", TextEncoderConfig(vocab_size=8))
            with torch.device("meta"):
                models["vae"] = VAE().to(BF16).requires_grad_(False)
        return models

    return get


@pytest.fixture
def full_plan(full_size, compute_capability):
    """A function: the plan of one picture under a budget in GiB."""
    compute_capability(90)

    def make(budget: float | None, size: int = 1024, encode: bool = True, **limits) -> plan.Plan:
        request = plan.Request(size, size, 1, [128], encoded=128 * encode)
        found = plan.Limits(budget and int(budget * GIB), CUBLAS, **limits)
        models = full_size()
        return plan.plan_pictures(request, found, **(models if encode else models | {"encoder": None}))

    return make


def measured(bench: str) -> list[dict]:
    """The rows of a benchmark on an H200."""
    lines = (ROOT / "benchmarks" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if row["bench"] == bench and "H200" in row["machine"]["device"]]
    assert found
    return found


def test_predictions_are_within_3_percent_of_what_was_measured(full_plan):
    for row in measured("memory")[-1]["rows"]:
        predicted = full_plan(row["budget_gib"], row["size"])
        streamed = predicted.stage("transformer").blocks - predicted.stage("transformer").resident
        assert streamed == row["streamed"]
        assert predicted.peak / GIB == pytest.approx(row["measured_gib"], rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("size", "precision"), [(512, None), (1024, None), (512, "w4a8"), (1024, "w4a8"), (512, "w4a16")]
)
def test_on_a_gpu_sampling_takes_what_was_counted(size, precision):
    """Within 3 %, of which the allocator's reuse of freed blocks has its part."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend = precision and backends.select("triton", precision, device=device, dtype=BF16)
    model = bench.random_model(CONFIG, device, BF16, backend, 256)
    latents = torch.randn(1, 16, size // 8, size // 8, device=device)

    def sample() -> None:
        with torch.no_grad():
            cond = model.prepare([torch.randn(64, CONFIG.cap_feat_dim, device=device, dtype=BF16)], size, size)
            denoise(model, latents, torch.linspace(1, 0, 3), cond)

    sample()  # compiles kernels and lets cuBLAS take its workspace
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sample()
    taken = torch.cuda.max_memory_allocated(device) - before
    assert sampling(model, size, size, 1, [64]) == pytest.approx(taken, rel=0.03)


# ---- sharing a budget out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "budget"), [(1024, 4.0), (1024, 2.5), (512, 2.0), (2048, 8.0)])
def test_the_targets_fit(full_plan, size, budget):
    found = full_plan(budget, size)
    assert found.peak <= found.usable < budget * GIB
    assert found.stage("transformer").resident > 0
    assert [stage.name for stage in found.stages] == ["text encoder", "transformer", "VAE"]


def test_more_budget_streams_less_and_none_streams_nothing(full_plan):
    resident = [full_plan(b).stage("transformer").resident for b in (2.0, 3.0, 4.0, 5.5)]
    assert resident == sorted(resident) and resident[0] < resident[-1] == 34
    free = full_plan(None)
    assert all(stage.resident == stage.blocks for stage in free.stages)
    assert "no limit" in free.table()


def test_eight_bit_codes_are_kept_where_the_budget_holds_them(full_plan):
    """7 GiB beside the weights: a byte for each, and three for each number of the low-rank branch."""
    plans = {budget: full_plan(budget).stage("transformer") for budget in (None, 80, 12.5, 11.5, 5.5, 4.0)}
    assert [bool(stage.codes) for stage in plans.values()] == [True, True, True, False, False, False]
    assert plans[None].codes / GIB == pytest.approx(
        34 * sum(n * (k + 768) for n, k in bench.block_linears(ZImageConfig()).values()) / GIB, rel=0.01
    )
    assert plans[12.5].on_device == plans[11.5].on_device + plans[12.5].codes
    assert "8-bit codes kept" in full_plan(12.5).table() and "kept" not in full_plan(11.5).table()
    assert full_plan(12.5).peak <= full_plan(12.5).usable


@pytest.mark.parametrize("budget", [None, 4.0, 5.5, 80])
def test_a_budget_holds_one_model_at_a_time(full_plan, budget):
    """Whatever its size and whatever is there from the picture before: the peak is that of the largest stage alone."""
    held = {"transformer": 2 * GIB, "VAE": GIB // 6}
    for found in (full_plan(budget), full_plan(budget, resident=held)):
        assert all(stage.beside == () for stage in found.stages)
        own = [s.on_device + s.activations + CUBLAS for s in found.stages]
        assert found.peak == max(own)
        assert "stays" not in found.table()


def test_only_without_any_limit_do_models_stay(full_plan):
    held = {"transformer": 4 * GIB, "VAE": GIB // 6}
    found = full_plan(None, resident=held, stays=("transformer", "VAE"))
    assert found.stage("text encoder").beside == ("transformer", "VAE")
    assert found.stage("VAE").beside == ("transformer",)
    assert found.stage("VAE").peak > full_plan(None).stage("VAE").peak + 4 * GIB
    encoder, transformer, vae = found.table().splitlines()[2:]
    assert encoder.endswith("transformer stays, VAE stays") and transformer.endswith("VAE stays")
    assert vae.endswith("transformer stays")


def test_large_pictures_and_small_budgets_decode_in_tiles(full_plan):
    assert full_plan(8.0, 1024).tiling == "auto"
    assert full_plan(8.0, 2048).tiling == 96
    assert full_plan(1.3, 1024, encode=False).tiling == 96
    assert "in tiles of 96 cells" in full_plan(8.0, 2048).table()


def test_a_budget_that_cannot_hold_a_stage_is_refused_with_one_that_can(full_plan):
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


def test_readme_is_right_about_older_cards(full_plan, full_size, compute_capability):
    """In w4a16 on sm_86: within four blocks of the table's cards, and all resident in the 12 GB of an RTX 3060."""

    def streamed(found: plan.Plan) -> int:
        return found.stage("transformer").blocks - found.stage("transformer").resident

    pairs = [(card, size) for card in (3, 4, 6, 8, 12) for size in (512, 1024, 1536, 2048)]
    table = {pair: streamed(full_plan(pair[0] - 0.5, pair[1])) for pair in pairs}
    compute_capability(86)
    older = full_size() | {"transformer": meta_transformer(ZImageConfig(), "triton w4a16", fused=True)}
    for card, size in pairs:
        request = plan.Request(size, size, 1, [128], encoded=128)
        found = plan.plan_pictures(request, plan.Limits(int((card - 0.5) * GIB), CUBLAS), **older)
        assert abs(streamed(found) - table[card, size]) <= 4
        if card == 12:
            assert streamed(found) == 0 and found.peak < 5.65 * GIB


def test_readme_tells_what_fits(full_plan):
    """Its table, cell by cell, and the least budgets that it names."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## What fits my card")[2]
    text = re.split(r"\n##+ ", text)[0]
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
    files = pipe.files
    other = load_pipeline(
        files.model, files.text_encoder, files.vae, device="cpu", dtype="float32", precision="w4a16", vram_budget=None
    )
    stage = other("a cat", **SIZE).plan.stage("transformer")
    model = load_transformer(files.model, dtype=torch.float32, precision="w4a16")
    found = weights(model.blocks, model)
    pipe.vram_budget = stage.peak - stage.on_device + found.rest + 2 * found.slot + 2**19


def test_a_budget_changes_nothing_in_the_picture(unlimited, small):
    (expected,) = unlimited("a cat", **SIZE)
    limit(small)
    for _ in range(2):
        found = small("a cat", **SIZE)
        assert found[0].tobytes() == expected.tobytes()
        assert found.plan.peak <= found.plan.usable == small.vram_budget
        assert found.plan.stage("transformer").resident == 0
    (again,) = small("a dog", **SIZE, guidance_scale=2.0, negative_prompt="a cat")
    assert again.tobytes() == unlimited("a dog", **SIZE, guidance_scale=2.0, negative_prompt="a cat")[0].tobytes()


def test_kept_codes_change_nothing_in_the_picture(tiny_files, monkeypatch):
    """With comfy-kitchen's 8 bits, which run on a CPU: made once, anew with a LoRA, or in every call."""
    pytest.importorskip("comfy_kitchen")
    kitchen, made = backends.load("kitchen"), []
    plain = kitchen.codes

    def codes(prepared):
        made.extend([] if prepared["qweight"].is_meta else [1])  # the plan's are not made
        return plain(prepared)

    monkeypatch.setattr(kitchen, "codes", codes)
    monkeypatch.setattr(plan, "reserve", lambda budget: 0)
    options = {"device": "cpu", "dtype": "bfloat16", "backend": "kitchen", "precision": "w4a8"}
    kept, anew = (load_pipeline(**tiny_files, **options, vram_budget=budget) for budget in (None, None))
    first = kept("a cat", **SIZE)
    stage = first.plan.stage("transformer")
    linears = len(svdq_linears(kept.transformer))
    assert "8-bit codes kept" in first.plan.table() and len(made) == linears
    anew.vram_budget = stage.peak - 1
    expected = kept("a dog", **SIZE)[0].tobytes()
    assert len(made) == linears
    assert anew("a dog", **SIZE)[0].tobytes() == expected
    assert not anew.last.plan.stage("transformer").codes and len(made) > 2 * linears
    pair = {"lora_A.weight": torch.randn(16, 384), "lora_B.weight": torch.randn(384, 16)}
    lora = Lora.from_tensors({f"layers.0.attention.to_out.0.{name}": t for name, t in pair.items()})
    changed = []
    for pipe in (kept, anew):
        pipe.set_loras([(lora, 1.0)])
        changed.append(pipe("a dog", **SIZE)[0].tobytes())
    assert changed[0] == changed[1] != expected
    kept.vram_budget = anew.vram_budget
    assert kept("a dog", **SIZE)[0].tobytes() == changed[0]
    assert all(linear.codes is None for linear in svdq_linears(kept.transformer))


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
            if when(*args, **options):
                note(name, comes(*args))
            return plain(*args, **options)

        monkeypatch.setattr(owner, attribute, watched)

    def of_transformer(streamer, *_):
        return isinstance(streamer._model, torch.nn.ModuleList)  # with its ControlNets

    def of_vae(streamer, *_):
        return isinstance(streamer._model, VAE)

    def with_weights(*_, device, **options):
        return device != META

    watch(BlockStreamer, "place", "transformer", when=of_transformer)
    watch(BlockStreamer, "leave", "transformer", comes=lambda *_: False, when=of_transformer)
    watch(sources, "load_vae", "VAE", when=with_weights)
    watch(BlockStreamer, "place", "VAE", when=of_vae)
    watch(BlockStreamer, "leave", "VAE", comes=lambda *_: False, when=of_vae)
    load = sources.load_text_encoder

    def load_encoder(*args, **options):
        encoder = load(*args, **options)
        if not with_weights(*args, **options):
            return encoder
        note("text encoder", True)
        weakref.finalize(encoder, note, "text encoder", False)
        return encoder

    monkeypatch.setattr(sources, "load_text_encoder", load_encoder)
    return seen


@pytest.mark.parametrize("budget", ["too small for two", 2**40, "auto"])
def test_no_two_models_are_on_the_device(small, request, monkeypatch, budget):
    """Under a budget, and without one on a GPU, whatever is free there."""
    limit(small)
    if budget == "auto":
        monkeypatch.setattr(residents, "usable", lambda *_: 2**40)
    if not isinstance(budget, str) or budget == "auto":
        small.vram_budget = budget
    together = request.getfixturevalue("together")  # watches from here on
    for prompt in ("a cat", "a dog"):
        small(prompt, **SIZE)
    assert set(together) == {frozenset(), *(frozenset([name]) for name in ("text encoder", "transformer", "VAE"))}


def test_without_any_limit_models_stay_for_the_next_picture(small, together):
    small.vram_budget = None
    for prompt in ("a cat", "a dog"):
        found = small(prompt, **SIZE)
    assert together[-1] == {"text encoder", "transformer", "VAE"}
    assert found.plan.stage("text encoder").beside == ("transformer", "VAE")
    assert found.plan.stage("transformer").beside == ("text encoder", "VAE")
    assert found.plan.stage("VAE").beside == ("text encoder", "transformer")


def test_the_command_line_has_one_model_at_a_time_without_a_budget_too(tiny_files, tmp_path, monkeypatch, capsys):
    """It draws once, so what has done its part is dropped: no model is alive when the next one is read."""
    alive, seen = weakref.WeakSet(), []

    def watch(owner, name):
        plain = getattr(owner, name)

        def load(*args, **options):
            if options["device"] == META:
                return plain(*args, **options)
            seen.append((name, len(alive)))
            model = plain(*args, **options)
            alive.add(model)
            return model

        monkeypatch.setattr(owner, name, load)

    for name in ("load_text_encoder", "load_transformer", "load_vae"):
        watch(sources, name)
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
        found = once("a cat", **SIZE)
        assert found[0].tobytes() == expected.tobytes()
        assert found.plan.stage("VAE").beside == () and "load transformer" in [stage.name for stage in found.stages]


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
    failures, denoise = [], sampler.denoise

    def fails(model, latents, *args, **options):
        if latents.is_meta:  # for the plan
            return denoise(model, latents, *args, **options)
        failures.append(len(failures))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def fails_once(*args, **options):
        return (denoise if failures else fails)(*args, **options)

    monkeypatch.setattr(sampler, "denoise", fails_once)
    assert small("a cat", **SIZE)[0].tobytes() == expected.tobytes()
    assert len(failures) == 1 and "trying again with every block of it streamed" in caplog.text
    again = small("a cat", **SIZE)
    assert again[0].tobytes() == expected.tobytes()
    assert again.plan.stage("transformer").resident == 0, "the next picture of that size is streamed at once"
    smaller = small("a cat", **SIZE | {"height": 32}).plan.stage("transformer")
    assert smaller.resident == smaller.blocks, "a smaller one is tried with resident blocks again"
    monkeypatch.setattr(sampler, "denoise", fails)
    with pytest.raises(torch.OutOfMemoryError):
        small("a cat", **SIZE)  # with everything streamed there is no second attempt
    assert len(failures) == 2
    monkeypatch.undo()
    assert small("a cat", **SIZE)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("what", ["load text encoder", "place text encoder", "encode", "load", "place"])
def test_out_of_memory_on_the_way_to_the_device_is_survived_too(tiny_files, unlimited, monkeypatch, caplog, what):
    (expected,) = unlimited("a cat", **SIZE)
    owner, name = {
        "load text encoder": (sources, "load_text_encoder"),
        "encode": (residents, "encode_tokens"),
        "load": (sources, "load_transformer"),
    }.get(what, (BlockStreamer, "place"))
    plain, failed = getattr(owner, name), []

    def once(*args, **options):
        if options.get("device") == META and owner is sources:
            return plain(*args, **options)
        model = args[0]._model if owner is BlockStreamer else None
        if not failed and (owner is not BlockStreamer or (model is None) == (what == "place text encoder")):
            failed.append(what)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, once)
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    found = pipe("a cat", **SIZE)
    assert found[0].tobytes() == expected.tobytes()
    assert failed and "trying again with every block of it streamed" in caplog.text
    model = "text encoder" if "encode" in what else "transformer"
    assert found.plan.stage(model).resident == 0 and f"out of memory in the {model}" in caplog.text


def test_the_plan_for_json_and_for_people(unlimited, full_plan):
    made = unlimited("a cat", **SIZE).plan
    facts = made.facts()
    assert facts["budget_gib"] is None and facts["stages"][-1]["name"] == "VAE"
    lines = made.table().splitlines()
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
