"""Links in the models folders: followed within what ComfyUI knows and Hugging Face's cache, refused beyond."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"
DEMO = ROOT / "zimage_core" / "demo"
PARTS = {
    "diffusion_models": (TINY, "ZImageINT4ModelLoader", "model"),
    "text_encoders": (DEMO / "text_encoder", "ZImageTextEncoderLoader", "text_encoder"),
    "vae": (DEMO / "vae.safetensors", "ZImageVAELoader", "vae"),
    "loras": (DEMO / "loras" / "frame.safetensors", "ZImageLoraLoader", "lora"),
    "model_patches": (DEMO / "controlnet.safetensors", "ZImageControlNetLoader", "controlnet"),
}
"""Folder -> a file or folder for it, its loader, and the kind of the bundled one."""
REFUSED = "a link out of ComfyUI's model folders, to {}, which is not followed; add {} to extra_model_paths.yaml"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that ComfyUI does not know, with a file or folder of every kind."""
    for kind, (source, _, _) in PARTS.items():
        if source.is_dir():
            shutil.copytree(source, tmp_path / kind)
            shutil.copy(DEMO / "tokenizer" / "tokenizer.json", tmp_path / kind)
        else:
            shutil.copy(source, tmp_path / f"{kind}.safetensors")
    return tmp_path


@pytest.fixture
def models(host, tmp_path_factory, monkeypatch):
    """ComfyUI's `folder_paths` with empty models folders and nothing else; `models.base` is around them."""
    import folder_paths

    base = tmp_path_factory.mktemp("models")
    for kind in PARTS:
        (base / kind).mkdir()
    folders = {kind: ([str(base / kind)], {".safetensors"}) for kind in PARTS}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "base", base, raising=False)
    return folder_paths


def linked(models, kind: str, target: Path) -> Path:
    """A link to a file or folder in the models folder of a kind."""
    link = models.base / kind / f"mine{target.suffix}"
    link.symlink_to(target)
    return link


def validate(kind: str, name: str) -> bool | str:
    """What the loader of a kind says of a name when a prompt is sent."""
    pack = sys.modules["zimage_pack"]
    return pack.NODE_CLASS_MAPPINGS[PARTS[kind][1]].VALIDATE_INPUTS(name)


@pytest.mark.parametrize("kind", PARTS)
def test_a_link_out_is_listed_and_refused_with_its_name(host, models, elsewhere, kind):
    target = next(elsewhere.glob(f"{kind}*"))
    link = linked(models, kind, target)
    assert link.name in host.files.choices(kind, PARTS[kind][2], folders_too=True)
    assert re.match(f"{link}: {REFUSED.format(target, elsewhere)}", validate(kind, link.name))
    models.add_model_folder_path("mine", str(elsewhere))  # as extra_model_paths.yaml does
    assert validate(kind, link.name) is True


def test_links_between_models_folders_and_linked_folders_are_followed(models, elsewhere):
    """A file of another kind's folder, a file by two links, and a models folder that is itself a link."""
    (models.base / "loras" / "first.safetensors").symlink_to(elsewhere / "vae.safetensors")
    linked(models, "vae", models.base / "loras" / "first.safetensors")
    assert "model folders, to" in validate("vae", "mine.safetensors")
    (models.base / "loras" / "first.safetensors").unlink()
    shutil.copy(elsewhere / "vae.safetensors", models.base / "loras" / "first.safetensors")
    assert validate("vae", "mine.safetensors") is True
    shutil.rmtree(models.base / "loras")
    (models.base / "loras").symlink_to(elsewhere)
    assert validate("loras", "loras.safetensors") is True


def test_snapshots_in_hugging_faces_cache_are_followed(models, elsewhere, tmp_path_factory, monkeypatch):
    """As the hub's client keeps them: a folder of links to blobs beside it; the cache itself may be a link."""
    cache = tmp_path_factory.mktemp("hub")
    blobs, snapshot = (cache / "models--Qwen--Qwen3-4B" / name for name in ("blobs", "snapshots/abc"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate((elsewhere / "text_encoders").iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    linked(models, "text_encoders", snapshot)
    assert "a link out of" in validate("text_encoders", "mine")
    (elsewhere / "cache").symlink_to(cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(elsewhere / "cache"))
    assert validate("text_encoders", "mine") is True


@pytest.mark.parametrize("where", ["model.safetensors", "config.json", "more/tokenizer.json", "deeper"])
def test_what_a_folder_holds_may_not_lead_out_either(models, elsewhere, where):
    """A file, one in a folder of it, and one in a folder that is a link to another models folder."""
    folder = models.base / "text_encoders" / "mine"
    shutil.copytree(elsewhere / "text_encoders", folder)
    (folder / "round").symlink_to(folder)  # which ends
    assert validate("text_encoders", "mine") is True
    link = folder / where
    if where == "deeper":
        link.symlink_to(models.base / "vae")
        assert validate("text_encoders", "mine") is True
        link = linked(models, "vae", elsewhere / "vae.safetensors")
        found = folder / where / link.name
    else:
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(elsewhere / "text_encoders" / link.name)
        found = link
    assert validate("text_encoders", "mine").startswith(f"{found}: a link out of")


def test_a_tokenizer_beside_an_encoder_may_not_lead_out(host, models, elsewhere):
    encoder = models.base / "text_encoders" / "mine.safetensors"
    shutil.copy(elsewhere / "text_encoders" / "model.safetensors", encoder)
    shutil.copy(DEMO / "text_encoder" / "config.json", encoder.parent)
    beside = encoder.parent / "tokenizer.json"
    beside.symlink_to(elsewhere / "text_encoders" / "tokenizer.json")
    with pytest.raises(ValueError, match=f"{beside}: a link out of"):
        host.clip.load_clip(encoder.name)
    beside.unlink()
    shutil.copy(DEMO / "tokenizer" / "tokenizer.json", beside)
    assert host.clip.load_clip(encoder.name).tokenizer


def test_the_server_says_so_on_the_node(server, elsewhere):
    """Of a prompt over HTTP: the sentence stands at the loader, and nothing runs."""
    from test_server import api

    folder = server.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    (folder / "out.safetensors").symlink_to(elsewhere / "vae.safetensors")
    graph = api()
    node = next(key for key, one in graph.items() if one["class_type"] == "ZImageVAELoader")
    status, said = server.post("/prompt", {"prompt": api(**{f"n{node}__vae_name": "out.safetensors"})})
    assert status == 400
    errors = said["node_errors"][node]["errors"]
    assert "a link out of ComfyUI's model folders, to" in str(errors)
    (folder / "out.safetensors").unlink()
