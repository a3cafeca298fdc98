"""The nodes without ComfyUI: registration, texts, lists, checks of inputs, example workflows.

ComfyUI's modules are stand-ins: `folder_paths` lists real folders, the rest are empty classes to inherit from.
What needs a real ComfyUI is in tests/host.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"
IDS = (
    "ZImageINT4ModelLoader",
    "ZImageTextEncoderLoader",
    "ZImagePromptEncode",
    "ZImageSampler",
    "ZImageLoraLoader",
    "ZImageVAELoader",
    "ZImageVAEDecode",
    "ZImageLoraStack",
    "ZImageQuantize",
    "ZImageCompare",
    "ZImageControlNetLoader",
    "ZImageControlNetApply",
    "ZImageLoraSwitches",
    "ZImageSize",
    "ZImageNAG",
    "ZImageVariety",
)
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
BELOW = {path.stem for path in (ROOT / "zimage_core" / "memory").glob("*.py")}
REAL_FILES = {"svdq-int4_r256-z-image-turbo.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"}
REAL_FILES |= {"RealESRGAN_x4plus.safetensors"}


def load_by_path(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


workflows = load_by_path(ROOT / "tests" / "host" / "workflows.py", "zimage_workflow_checks")


class FolderPaths(types.ModuleType):
    """`folder_paths` over real folders."""

    def __init__(self, root: Path):
        super().__init__("folder_paths")
        names = ("diffusion_models", "text_encoders", "loras", "vae")
        self.folder_names_and_paths = {name: ([str(root / name)], {".safetensors", ".sft", ".pt"}) for name in names}
        for name in names:
            (root / name).mkdir()
        self.folder_names_and_paths["linked"] = ([str(TINY.parent)], set())  # that tests link to

    def get_folder_paths(self, name):
        return self.folder_names_and_paths[name][0]

    def get_filename_list(self, name):
        roots, extensions = self.folder_names_and_paths[name]
        found = [p for root in map(Path, roots) for p in root.rglob("*") if p.suffix in extensions]
        return sorted(str(p.relative_to(roots[0])) for p in found)

    def get_full_path(self, name, file):
        return next((str(p) for p in (Path(r) / file for r in self.get_folder_paths(name)) if p.is_file()), None)


class Everything(type):
    """The class of empty classes that have every attribute."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class StandIn(types.ModuleType):
    """A module that has every name, as an empty class."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Everything(name, (), {})


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The pack, loaded by path with stand-ins; `pack.models` is the models folder."""
    root = tmp_path_factory.mktemp("models")
    names = ["conds", "latent_formats", "ldm", "ldm.common_dit", "ldm.models", "ldm.models.autoencoder", "ldm.modules"]
    names += ["ldm.modules.attention", "model_base", "model_management", "model_patcher", "patcher_extension"]
    names += ["lora", "sample", "samplers", "sd", "supported_models", "utils", "weight_adapter"]
    stand_ins = {f"comfy.{n}": StandIn(f"comfy.{n}") for n in names}
    stand_ins |= {
        "comfy": StandIn("comfy"),
        "folder_paths": FolderPaths(root),
        "latent_preview": StandIn("latent_preview"),
    }
    stand_ins["comfy.samplers"].KSampler = type("KSampler", (), {"SAMPLERS": ["euler"], "SCHEDULERS": ["simple"]})
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    module = load_by_path(ROOT / "__init__.py", "zimage_unit_pack")
    assert module.NODE_CLASS_MAPPINGS
    module.models = root
    yield module
    for name, old in before.items():
        sys.modules.pop(name)
        if old is not None:
            sys.modules[name] = old
    for name in [n for n in sys.modules if n.startswith("zimage_unit_pack")]:
        del sys.modules[name]


def object_info(pack) -> dict:
    """The pack's nodes as `/object_info` shows them."""
    return {
        name: {"input": node.INPUT_TYPES(), "output": list(node.RETURN_TYPES)}
        for name, node in pack.NODE_CLASS_MAPPINGS.items()
    }


def header_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict | None = None) -> str:
    """A safetensors file of zeros; returns its name."""
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
    entries, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape) in tensors.items():
        size = sizes[dtype]
        for n in shape:
            size *= n
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    return path.name


# ---- registration and texts -----------------------------------------------------------------------------------


def test_ids_are_for_ever(pack):
    assert tuple(pack.NODE_CLASS_MAPPINGS) == IDS
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(IDS)
    assert len(set(pack.NODE_DISPLAY_NAME_MAPPINGS.values())) == len(IDS)


@pytest.mark.parametrize("name", IDS)
def test_texts_for_users(pack, name):
    node = pack.NODE_CLASS_MAPPINGS[name]
    assert len(node.DESCRIPTION) > 40 and node.DESCRIPTION.endswith(".")
    assert len(node.SEARCH_ALIASES) >= 4 and "zimage" in node.SEARCH_ALIASES
    assert node.CATEGORY.split("/")[0] == "Z-Image INT4"
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
    inputs = node.INPUT_TYPES()
    for input_name, definition in {**inputs["required"], **inputs.get("optional", {})}.items():
        assert len(definition[1]["tooltip"]) > 15, input_name
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert list(parameters)[0] == "self"
    given = {*inputs["required"], *inputs.get("optional", {}), *inputs.get("hidden", {})}
    named = {name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert set(named) - {"self"} == given if len(named) == len(parameters) else set(named) - {"self"} < given
    for optional in {*inputs.get("optional", {}), *inputs.get("hidden", {})} & set(named):
        assert parameters[optional].default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", IDS)
def test_help_pages(pack, name):
    docs = ROOT / pack.WEB_DIRECTORY / "docs"
    page = (docs / f"{name}.md").read_text(encoding="utf-8")
    inputs = pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    for input_name in (*inputs["required"], *inputs.get("optional", {})):
        assert f"**{input_name}**" in page
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        assert (docs / picture).read_bytes()[:4] == b"\x89PNG"


def test_error_toast_knows_every_node(pack):
    script = (ROOT / pack.WEB_DIRECTORY / "js" / "errors.js").read_text(encoding="utf-8")
    assert set(re.findall(r'"(ZImage\w+)"', script)) == set(IDS)


# ---- import ---------------------------------------------------------------------------------------------------


def in_new_process(code: str) -> subprocess.CompletedProcess:
    """Run code after loading the repository's root by path as module `p`, as ComfyUI's scanner and pytest do."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r})\n"
        "p = importlib.util.module_from_spec(spec); sys.modules['p'] = p; spec.loader.exec_module(p)\n"
    )
    return subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, cwd="/", check=True)


def test_import_without_comfyui_is_an_attribute_error_with_its_cause():
    code = (
        "print(p.WEB_DIRECTORY, hasattr(p, 'NODE_CLASS_MAPPINGS'), hasattr(p, 'comfy_entrypoint'))\n"
        "try: p.NODE_CLASS_MAPPINGS\n"
        "except AttributeError as error: print(error)"
    )
    run = in_new_process(code)
    first, second = run.stdout.splitlines()
    assert first == "./nodes/web False False" and re.search(
        "cannot be imported: No module named '(comfy|folder_)", second
    )
    assert "ModuleNotFoundError" in run.stderr and "cannot be imported" in run.stderr


def test_import_is_light():
    heavy = "print(sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'numpy', 'zimage_core', 'transformers'}))"
    assert in_new_process(heavy).stdout.strip() == "[]"


def taken_from_comfyui(path: Path) -> set[str]:
    """The dotted names of ComfyUI's in a file of nodes/host, apart from its modules alone."""
    tree, modules, names = ast.parse(path.read_text(encoding="utf-8")), set(), set()
    ours = ("comfy", "folder_paths", "latent_preview", "comfy_api", "comfy_execution", "server")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] in ours}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in ours:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute):
            before = dotted(node.value)
            return before and f"{before}.{node.attr}"
        return node.id if isinstance(node, ast.Name) and node.id in {name.split(".")[0] for name in modules} else None

    found = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {None}
    return {name for name in found | names if not any(module.startswith(name) for module in modules)}


def test_everything_that_is_taken_from_comfyui_is_probed():
    """`needs` names it, or something in it, or what it is in; what a function calls `memory` is model_management."""
    sys.modules.pop("zimage_needs", None)
    needs = load_by_path(ROOT / "nodes" / "host" / "needs.py", "zimage_needs")
    known = {name for names in (*needs.NODES.values(), *needs.OPTIONAL.values()) for name in names}
    files = sorted((ROOT / "nodes" / "host").glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    taken = {name for path in files if path.name != "needs.py" for name in taken_from_comfyui(path)}
    taken |= {f"comfy.model_management.{name}" for name in re.findall(r"\bmemory\.(\w+)", text) if name not in BELOW}
    taken -= {
        "comfy.model_base.BaseModel.__init__",
        "comfy.sd.__file__",
        "comfy.model_management.placement",
        "comfy.model_management.offload",
    }

    def probed(name: str) -> bool:
        return any(one == name or one.startswith(f"{name}.") or name.startswith(f"{one}.") for one in known)

    assert [name for name in sorted(taken) if not probed(name)] == []


# ---- lists and checks -----------------------------------------------------------------------------------------


def combo(pack, node: str, name: str) -> list:
    return pack.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"][name][0]


def test_demo_comes_first_where_no_file_is_there(pack):
    demo = sys.modules["zimage_unit_pack.nodes.host"].files.DEMO
    lists = (
        ("ZImageINT4ModelLoader", "model_name", "diffusion_models"),
        ("ZImageTextEncoderLoader", "encoder_name", "text_encoders"),
        ("ZImageVAELoader", "vae_name", "vae"),
    )
    for node, name, folder in lists:
        assert combo(pack, node, name) == [demo]
        file = pack.models / folder / "a.safetensors"
        file.touch()
        (pack.models / folder / "pickle.pt").touch()
        assert combo(pack, node, name) == ["a.safetensors", demo]
        file.unlink()
    folder = pack.models / "text_encoders" / "Qwen3"
    folder.mkdir()
    (folder / "config.json").touch()
    (pack.models / "text_encoders" / "q8.gguf").touch()
    assert combo(pack, "ZImageTextEncoderLoader", "encoder_name") == ["Qwen3", "q8.gguf", demo]
    (folder / "config.json").unlink()
    (pack.models / "text_encoders" / "q8.gguf").unlink()


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "..\\secret", "ABSOLUTE", "..", "/"])
@pytest.mark.parametrize("folder", ["diffusion_models", "text_encoders", "vae", "loras"])
def test_a_name_that_leads_out_of_a_folder_is_not_found(pack, folder, name):
    """Names come from whoever sends a prompt; a folder with a config.json, and a file, lie beside the models."""
    files, secret = sys.modules["zimage_unit_pack.nodes.host"].files, pack.models / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "config.json").touch()
    with pytest.raises(ValueError, match="is not in"):
        files.find(folder, str(secret) if name == "ABSOLUTE" else name, "text_encoder")
    (secret / "config.json").unlink()
    secret.rmdir()


def test_the_model_that_is_chosen_at_first_is_a_right_one(pack):
    """An SVDQuant file where there is one, else the demo: the first file by name may be any model."""
    demo, folder = sys.modules["zimage_unit_pack.nodes.host"].files.DEMO, pack.models / "diffusion_models"
    loader = pack.NODE_CLASS_MAPPINGS["ZImageINT4ModelLoader"]
    (folder / "a-flux.safetensors").touch()
    assert loader.INPUT_TYPES()["required"]["model_name"][1]["default"] == demo
    (folder / "svdq-int4_r32-z.safetensors").touch()
    assert loader.INPUT_TYPES()["required"]["model_name"][1]["default"] == "svdq-int4_r32-z.safetensors"
    (folder / "a-flux.safetensors").unlink()
    (folder / "svdq-int4_r32-z.safetensors").unlink()


@pytest.mark.parametrize(
    "words, node",
    [(w, IDS[0]) for w in ("nunchaku", "svdquant", "gguf", "awq", "dit loader")]
    + [(w, node) for w in ("lora", "nunchaku lora") for node in ("ZImageLoraLoader", "ZImageLoraStack")],
)
def test_nodes_are_found_by_the_words_of_other_packs(pack, words, node):
    assert words in pack.NODE_CLASS_MAPPINGS[node].SEARCH_ALIASES


def test_missing_models_folder_is_no_error(pack, monkeypatch):
    host = sys.modules["zimage_unit_pack.nodes.host"]
    monkeypatch.delitem(host.files.folder_paths.folder_names_and_paths, "diffusion_models")
    assert combo(pack, "ZImageINT4ModelLoader", "model_name") == [host.files.DEMO]
    with pytest.raises(ValueError, match="models/diffusion_models.*bundled demo"):
        host.files.find("diffusion_models", "x.safetensors", "model")


def check(pack, node: str, name: str):
    return pack.NODE_CLASS_MAPPINGS[node].VALIDATE_INPUTS(name)


def test_good_files_pass(pack):
    (pack.models / "diffusion_models" / TINY.name).symlink_to(TINY)
    assert check(pack, "ZImageINT4ModelLoader", TINY.name) is True
    assert check(pack, "ZImageINT4ModelLoader", None) is True  # linked: checked when it runs
    pairs = {"lora_down.weight": ("F32", (4, 384)), "lora_up.weight": ("F32", (384, 4))}
    tensors = {f"diffusion_model.layers.0.attention.to_q.{leaf}": what for leaf, what in pairs.items()}
    name = header_file(pack.models / "loras" / "good.safetensors", tensors)
    assert check(pack, "ZImageLoraLoader", name) is True


@pytest.mark.parametrize(
    "node, folder, tensors, says",
    [
        (IDS[0], "diffusion_models", {"layers.0.attention.to_q.lora_A.weight": ("BF16", (4, 384))}, "LoRA"),
        (
            IDS[0],
            "diffusion_models",
            {"model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3))},
            "Stab",
        ),
        (IDS[0], "diffusion_models", {"model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64))}, "text encoder"),
        (
            IDS[0],
            "diffusion_models",
            {
                "layers.0.attention.to_out.0.qweight": ("I8", (128, 64)),
                "layers.0.attention.to_out.0.wscales": ("F8_E4M3", (8, 128)),
                "layers.0.attention.to_out.0.wcscales": ("BF16", (128,)),
            },
            "proj_down",
        ),
        (IDS[1], "text_encoders", {"encoder.block.0.layer.0.SelfAttention.q.weight": ("F16", (64, 64))}, "Qwen3"),
        (IDS[5], "vae", {"decoder.conv_in.weight": ("F16", (512, 4, 3, 3))}, "4 latent channels"),
        (IDS[5], "vae", {"layers.0.attention.to_q.lora_A.weight": ("BF16", (4, 384))}, "LoRA"),
        (IDS[4], "loras", {"layers.0.attention.to_q.weight": ("BF16", (384, 384))}, "LoRA"),
        (IDS[4], "loras", {"double_blocks.0.img_attn.qkv.lora_A.weight": ("BF16", (4, 64))}, "Flux"),
    ],
)
def test_wrong_files_get_a_sentence(pack, node, folder, tensors, says):
    name = header_file(pack.models / folder / "wrong.safetensors", tensors)
    answer = check(pack, node, name)
    assert isinstance(answer, str) and says in answer and name in answer, answer
    assert len(answer) < 500


@pytest.mark.parametrize(
    "node, folder", [(IDS[0], "diffusion_models"), (IDS[1], "text_encoders"), (IDS[4], "loras"), (IDS[5], "vae")]
)
def test_truncated_pickled_and_missing_files(pack, node, folder):
    cut = pack.models / folder / "cut.safetensors"
    cut.write_bytes(TINY.read_bytes()[:100_000])
    assert "truncated" in check(pack, node, cut.name)
    cut.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "pickle" in check(pack, node, cut.name).lower()
    cut.unlink()
    assert "is not in" in check(pack, node, "gone.safetensors")


@pytest.mark.parametrize(
    "size, denoise, says",
    [
        ((1000, 1024), 1.0, "width 1000: it must be a multiple of 16 from 16 to 4096; try 992"),
        ((64, 8192), 1.0, "height 8192: .* try 4096"),
        ((0, 64), 1.0, "width 0: .* try 16"),
        ((64, 64), 0.5, "denoise 0.5 needs a latent to start from"),
    ],
)
def test_sampler_names_the_one_input_that_is_wrong(pack, size, denoise, says):
    """When it runs: an input that is named in VALIDATE_INPUTS is blamed by ComfyUI for every other one."""
    sampler = pack.NODE_CLASS_MAPPINGS["ZImageSampler"]
    assert not hasattr(sampler, "VALIDATE_INPUTS")
    with pytest.raises(ValueError, match=f"^{says}"):
        sampler().sample(None, [], 0, 8, *size, 1, denoise=denoise)


def test_sampler_wants_a_negative_prompt_for_guidance(pack):
    sampler = pack.NODE_CLASS_MAPPINGS["ZImageSampler"]()
    for given, cfg in (({"cfg": 3.5}, "3.5"), ({"preset": "base"}, "5")):
        with pytest.raises(ValueError, match=f"^cfg {cfg} needs a negative prompt: connect one"):
            sampler.sample(None, [], 0, 8, 64, 64, 1, **given)


@pytest.mark.parametrize("node", IDS)
def test_no_more_than_one_input_is_checked_ahead(pack, node):
    check = getattr(pack.NODE_CLASS_MAPPINGS[node], "VALIDATE_INPUTS", None)
    assert check is None or len(inspect.signature(check).parameters) == 1


# ---- quantizing and comparing ---------------------------------------------------------------------------------


def test_quantizer_lists_what_it_can_take(pack):
    demo = sys.modules["zimage_unit_pack.nodes.host"].files.DEMO
    folder = pack.models / "diffusion_models" / "fine-tune"
    folder.mkdir()
    (folder / "config.json").touch()
    (pack.models / "diffusion_models" / "q8.gguf").touch()
    listed = combo(pack, "ZImageQuantize", "model_name")
    (folder / "config.json").unlink()
    (pack.models / "diffusion_models" / "q8.gguf").unlink()
    assert listed[-3:] == ["fine-tune", "q8.gguf", demo]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"size": 100}, "size 100: .* try 96"),
        ({"size": -16}, "try 16"),
        ({"size": 2048}, "try 1024"),
        ({"lora_name": "gone.safetensors"}, "is not in"),
        ({"lora_name": "broken.safetensors"}, "broken.safetensors"),
        ({"output_name": "../x"}, "a plain file name"),
        ({"output_name": "a\\b.safetensors"}, "a plain file name"),
        ({"output_name": "there"}, "is there already; choose another output_name, or leave it empty"),
    ],
)
def test_quantizer_checks_its_inputs_before_it_works(pack, changes, says):
    (pack.models / "loras" / "broken.safetensors").write_bytes(b"no file of that kind")
    (pack.models / "diffusion_models" / "there.safetensors").touch()
    given = {"model_name": "bundled demo", "lora_name": "none", "output_name": "", **changes}
    node = pack.NODE_CLASS_MAPPINGS["ZImageQuantize"]()
    with pytest.raises(ValueError, match=says):
        node.quantize(rank="32", calibrate=False, lora_strength=1.0, **given)
    (pack.models / "diffusion_models" / "there.safetensors").unlink()
    (pack.models / "loras" / "broken.safetensors").unlink()


def test_quantizer_refuses_what_is_int4_already(pack):
    path = pack.models / "diffusion_models" / "int4.safetensors"
    path.symlink_to(TINY)
    assert "expected a BF16 model, found svdq-int4" in check(pack, "ZImageQuantize", path.name)
    path.unlink()


def test_quantizer_names_its_file(pack, monkeypatch):
    host = sys.modules["zimage_unit_pack.nodes.host"]
    known = host.files.folder_paths.folder_names_and_paths
    roots, extensions = known["diffusion_models"]
    monkeypatch.setitem(known, "diffusion_models", ([str(pack.models / "unet"), *roots], extensions))
    folder, new_file = pack.models / "diffusion_models", host.quantize.new_file
    usual = folder / "svdq-int4_r32-z-image-demo.safetensors"
    assert new_file(host.files.DEMO, "", 32) == usual
    usual.touch()
    assert new_file(host.files.DEMO, "", 32).name == "svdq-int4_r32-z-image-demo-2.safetensors"
    usual.unlink()
    assert new_file(host.files.DEMO, "mine", 32) == folder / "mine.safetensors"
    assert new_file(host.files.DEMO, "mine.sft", 32) == folder / "mine.sft"


def test_quantizer_wants_a_clip_to_calibrate(pack):
    node = pack.NODE_CLASS_MAPPINGS["ZImageQuantize"]()
    with pytest.raises(ValueError, match="connect a CLIP, or switch calibrate off"):
        node.quantize("bundled demo", "32", True, "none", 1.0, "")


def test_compare_makes_a_sheet_of_what_is_connected(pack):
    import torch

    grey, near = torch.full((2, 24, 32, 3), 0.5), torch.full((2, 24, 32, 4), 0.5)  # the second with an alpha channel
    near[1, :12] = 0.6
    node = pack.NODE_CLASS_MAPPINGS["ZImageCompare"]()
    sheet, scores = node.compare(grey, near, "BF16", "INT4", image_d=grey, label_d="again")
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.dtype is torch.float32 and sheet.amax() == 1
    assert sheet.shape[2] > 3 * 170 and sheet.shape[1] > 2 * 24
    assert scores.splitlines()[0].startswith("INT4, picture 1: PSNR inf dB, SSIM 1.0000")
    assert re.fullmatch(r"INT4, picture 2: PSNR 2\d\.\d\d dB, SSIM 0\.\d+", scores.splitlines()[1])
    assert [line.split(",")[0] for line in scores.splitlines()] == ["INT4", "INT4", "again", "again"]
    with pytest.raises(ValueError, match="INT4: expected 2 of 32 x 24 pictures as in BF16, found 1 of 32 x 24"):
        node.compare(grey, near[:1], "BF16", "INT4")


# ---- example workflows ----------------------------------------------------------------------------------------


def test_every_workflow_and_blueprint_is_written_by_the_script():
    folder = ROOT / "example_workflows"
    sys.path.insert(0, str(folder))
    templates = load_by_path(folder / "templates.py", "zimage_templates")
    sys.path.remove(str(folder))
    assert {path.stem for path in WORKFLOWS} == set(templates.TEMPLATES)
    assert {path.stem for path in BLUEPRINTS} == {blueprint.name for blueprint in templates.BLUEPRINTS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_matches_the_nodes(pack, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    api = json.loads(workflows.api_path(path).read_text(encoding="utf-8"))
    assert workflows.check_pair(graph, api, object_info(pack), REAL_FILES) == []
    assert any(node["type"] in IDS for node in graph["nodes"])
    assert any(node["type"] == "MarkdownNote" for node in graph["nodes"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_has_a_thumbnail(path):
    from PIL import Image

    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 128


def test_only_text_to_image_needs_downloads():
    """But for the file of an upscale model, which there is no demo of."""
    needs = {path.stem for path in WORKFLOWS if any(name in path.read_text(encoding="utf-8") for name in REAL_FILES)}
    assert needs == {"Z-Image text to image", "Z-Image upscale"}


def test_files_that_must_be_fetched_have_links():
    for path in WORKFLOWS:
        graph = json.loads(path.read_text(encoding="utf-8"))
        notes = "\n".join(str(n["widgets_values"]) for n in graph["nodes"] if n["type"] == "MarkdownNote")
        for node in graph["nodes"]:
            for value in node.get("widgets_values") or ():
                if value in REAL_FILES:
                    models = {m["name"]: m for m in node["properties"]["models"]}
                    assert models[value]["url"].startswith("https://huggingface.co/")
                    assert models[value]["url"] in notes and f"**{models[value]['directory']}**" in notes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_graphs_read_from_left_to_right_and_nothing_overlaps(path):
    """With room below each node for the lines that it shows after a run, see tests/host/test_editor.py."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes, title = {node["id"]: node for node in graph["nodes"]}, 30
    notes = [node["id"] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    for _, source, out, target, into, _ in graph["links"]:
        start, end = nodes[source], nodes[target]
        x1, y1 = start["pos"][0] + start["size"][0], start["pos"][1] + 20 * out + 14
        x2, y2 = end["pos"][0], end["pos"][1] + 20 * into + 14
        assert x1 + 50 <= x2, (start["type"], end["type"])
        for other in nodes.keys() - {source, target, *notes}:
            (x, y), (w, h) = nodes[other]["pos"], nodes[other]["size"]
            left, right = max(x, x1), min(x + w, x2)
            if left >= right:
                continue
            edges = sorted(y1 + (y2 - y1) * (at - x1) / (x2 - x1) for at in (left, right))
            free = edges[1] < y - title or edges[0] > y + h
            assert free, f"{start['type']} -> {end['type']} runs behind {nodes[other]['type']}"
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in graph["nodes"]]
    for i, (x, y, w, h, kind) in enumerate(boxes):
        for x2, y2, w2, h2, other in boxes[:i]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - title or y2 + h2 <= y - title
            assert apart, f"{kind} lies over {other}"


@pytest.mark.parametrize("language", ["zh", "ja"])
@pytest.mark.parametrize("node", IDS)
def test_help_pages_in_other_languages(node, language):
    """What `make.py` writes now: every input, and as many notes as the English page has."""
    docs, folder = ROOT / "nodes" / "web" / "docs", ROOT / "example_workflows"
    sys.path[:0] = [str(folder), str(ROOT / "tests" / "host")]
    make = load_by_path(folder / "make.py", "zimage_make")
    page = (docs / node / f"{language}.md").read_text(encoding="utf-8")
    assert page == make.help_page(node, language)
    english = (docs / f"{node}.md").read_text(encoding="utf-8").partition("## Good to know")[2]
    notes = json.loads((ROOT / "locales" / language / "help.json").read_text(encoding="utf-8")).get(node, [])
    assert len(notes) == english.count("\n- ")


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_locales_name_and_explain_every_node_and_input(pack, language):
    """All of them and no others, so that a node or input that is new, renamed or gone is translated with it."""
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(IDS)
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        found, inputs = texts[name], node.INPUT_TYPES()
        assert set(found) == {"display_name", "description", "inputs", "outputs"}
        assert set(found["inputs"]) == {*inputs["required"], *inputs.get("optional", {})}
        assert list(found["outputs"]) == [str(i) for i in range(len(node.RETURN_TYPES))]
        for text in (*found["inputs"].values(), *found["outputs"].values()):
            assert set(text) == {"name", "tooltip"} and all(text.values())
        assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", found["description"])
    parts = {part for node in pack.NODE_CLASS_MAPPINGS.values() for part in node.CATEGORY.split("/")}
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    assert set(main["nodeCategories"]) == parts
