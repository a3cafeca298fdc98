"""Downloads from a small local server that answers as the hub does: whole, broken, resumed, wrong, absent, offline."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub.constants
import huggingface_hub.file_download
from filelock import FileLock

from zimage_core import hub
from zimage_core.files import find_files
from zimage_core.models import tokenizer

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34
GIT_SHA1 = ".json"  # small files are not LFS: the hub's etag is git's sha1, and there is no redirect


def safetensors(seed: int, payload: int) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [payload], "data_offsets": [0, payload]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(payload)


FILES = {
    "model": hub.HubFile("some/models", "svdq-int4.safetensors", "diffusion_models", 300_000),
    "text_encoder": hub.HubFile("some/parts", "split_files/text_encoders/qwen.safetensors", "text_encoders"),
    "gguf": hub.HubFile("some/gguf", "Qwen.gguf", "text_encoders"),
    "vae": hub.HubFile("some/parts", "split_files/vae/ae.safetensors", "vae"),
    "tokenizer": hub.TOKENIZER,
}


# The least that is one: Qwen's token and no other.
TOKENIZER = b"""{
    "added_tokens": [{"id": 0, "content": "<|im_start|>", "special": true, "normalized": false,
                      "single_word": false, "lstrip": false, "rstrip": false}],
    "model": {"type": "BPE", "vocab": {}, "merges": []}
}"""


class Hub(ThreadingHTTPServer):
    """The hub's routes over `contents`; the faults are attributes that a test sets."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {
            str(FILES["model"]): safetensors(1, 300_000),
            str(FILES["text_encoder"]): safetensors(2, 50_000),
            str(FILES["gguf"]): b"GGUF" + bytes(100),
            str(FILES["vae"]): safetensors(3, 20_000),
            str(FILES["tokenizer"]): TOKENIZER + b" " * 5000,
        }
        self.etags = {name: self.etag(name) for name in self.contents}
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # method, path, Range, Authorization
        self.break_after: list[int] = []  # bytes after which the next GETs break off
        self.reset = False  # break off with a reset instead of an orderly close
        self.ranges = True
        self.error: tuple[int, str | None] | None = None  # status, X-Error-Code
        self.headers_of_hub = True

    def etag(self, name: str) -> str:
        data = self.contents[name]
        if name.endswith(GIT_SHA1):
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[str]:
        """What was fetched, as name or name@first byte."""
        found = []
        for method, path, start, _ in self.requests:
            if method == "GET" and (name := path.rpartition("/")[2]):
                found.append(f"{name}@{start[6:-1]}" if start else name)
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server: Hub = self.server
        asked = self.headers.get("Range")
        on_cdn = self.path.startswith("/cdn/")
        if not (self.command == "GET" and not on_cdn and not self.path.endswith(GIT_SHA1)):  # the redirect aside
            server.requests.append((self.command, self.path, asked, self.headers.get("Authorization")))
        name = re.sub(r"^/cdn/|/resolve/[^/]+(?=/)", "", self.path).lstrip("/")
        status, code = server.error or ((200, None) if name in server.contents else (404, "EntryNotFound"))
        if status != 200:
            return self.head(status, {"Content-Length": "0"} | ({"X-Error-Code": code} if code else {}))
        data, etag = server.contents[name], f'"{server.etags[name]}"'
        facts = {"X-Repo-Commit": COMMIT} if server.headers_of_hub else {}
        if not on_cdn and not name.endswith(GIT_SHA1):
            facts |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
            # another host name, as a CDN is: the token must not go there
            facts |= {"Location": f"http://localhost:{server.server_port}/cdn/{name}", "Content-Length": "0"}
            return self.head(302, facts)
        facts["ETag"] = etag
        start = int(asked[6:-1]) if asked and server.ranges else 0
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.head(206 if start else 200, facts | {"Content-Length": str(len(data) - start)})
        if self.command == "GET":
            self.send(data[start:])

    def head(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: bytes):
        if not self.server.break_after:
            self.wfile.write(data)
            return
        self.wfile.write(data[: self.server.break_after.pop(0)])
        self.close_connection = True
        if self.server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's retries
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what a break loses at most
    monkeypatch.setattr(hub, "MODELS", {"int4-r256": FILES["model"]})
    monkeypatch.setattr(hub, "TEXT_ENCODERS", {"fp8": FILES["text_encoder"], "q8_0": FILES["gguf"]})
    monkeypatch.setattr(hub, "VAE", FILES["vae"])
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(5)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def comfyui(tmp_path, cache):
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    return tmp_path / "ComfyUI"


@pytest.fixture
def fetch(server, comfyui):
    """Download into the ComfyUI folder."""
    return lambda *names: hub.download("int4-r256", *names, comfyui=comfyui, endpoint=server.url)


def left(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


WHOLE = {
    "diffusion_models/svdq-int4.safetensors": "model",
    "text_encoders/qwen.safetensors": "text_encoder",
    "vae/ae.safetensors": "vae",
    "text_encoders/tokenizer/tokenizer.json": "tokenizer",
}


def test_the_tables_name_the_published_files():
    assert {name: file.payload for name, file in hub.MODELS.items() if file.payload} == {
        "int4-r256": 4_546_023_552,
        "int4-r128": 4_011_249_792,
        "int4-r32": 3_610_169_472,
    }
    assert str(hub.MODELS["int4-r32"]) == "nunchaku-ai/nunchaku-z-image-turbo/svdq-int4_r32-z-image-turbo.safetensors"
    for name, file in hub.MODELS.items():
        assert file.folder == "diffusion_models" and file.name.endswith((".safetensors", ".gguf")), name
    assert hub.MODELS["fp4-r32"].path == "svdq-fp4_r32-z-image-turbo.safetensors"
    assert str(hub.VAE) == "Comfy-Org/z_image_turbo/split_files/vae/ae.safetensors"
    repo, prefix = tokenizer.HUB_TOKENIZERS[0]
    assert (hub.TOKENIZER.repo, hub.TOKENIZER.path) == (repo, prefix + "tokenizer.json"), "where it is looked for"


def test_into_comfyui(server, fetch, comfyui):
    paths = fetch()
    models = comfyui / "models"
    assert left(models) == {name: len(server.contents[str(FILES[part])]) for name, part in WHOLE.items()}
    assert paths == {
        "model": models / "diffusion_models" / "svdq-int4.safetensors",
        "text_encoder": models / "text_encoders" / "qwen.safetensors",
        "vae": models / "vae" / "ae.safetensors",
        "tokenizer": models / "text_encoders" / "tokenizer",
    }
    for part, path in paths.items():
        path = path / "tokenizer.json" if part == "tokenizer" else path
        assert path.read_bytes() == server.contents[str(FILES[part])]
    assert tokenizer.find_tokenizer(paths["text_encoder"]) == paths["tokenizer"]

    for method, path, _, token in server.requests:
        assert token == (None if path.startswith("/cdn/") else "Bearer hf_secret"), "the token stays with the hub"
        assert ("/resolve/main/" in path) == (method == "HEAD"), "what was looked up is what is fetched"
    server.requests.clear()
    assert fetch() == paths
    assert server.gets() == []


def test_other_encoders(server, fetch):
    assert fetch("q8_0")["text_encoder"].name == "Qwen.gguf"
    assert "text_encoder" not in fetch("none")
    with pytest.raises(ValueError, match="text encoder: expected one of fp8, q8_0, found 'fp4'"):
        fetch("fp4")
    with pytest.raises(ValueError, match="model: expected one of int4-r256, found 'int4-r7'"):
        hub.download("int4-r7")
    with pytest.raises(ValueError, match="expected a ComfyUI folder"):
        hub.download("int4-r256", comfyui=ROOT)


@pytest.mark.parametrize("where", ["comfyui", "cache"])
def test_where_a_repository_is_gone_the_next_is_asked(server, comfyui, cache, monkeypatch, where):
    """Checked alike; what both lack is refused by both names, and a server's own trouble asks no other."""
    data = server.contents.pop("some/models/svdq-int4.safetensors")
    file = hub.HubFile("some/models", "svdq-int4.safetensors", "diffusion_models", 300_000, ("an/other", "a/third"))
    monkeypatch.setitem(hub.MODELS, "int4-r256", file)
    folder = comfyui if where == "comfyui" else None
    with pytest.raises(ValueError, match="^some/models/svdq.*no such file.*; neither has an/other nor a/third"):
        hub.download("int4-r256", "none", comfyui=folder, endpoint=server.url)
    server.contents["a/third/svdq-int4.safetensors"] = data[:-1] + b"?"
    server.etags["a/third/svdq-int4.safetensors"] = hashlib.sha256(data).hexdigest()
    with pytest.raises(ValueError, match="^a/third/svdq.*damaged and was deleted"):
        hub.download("int4-r256", "none", comfyui=folder, endpoint=server.url)
    server.contents["a/third/svdq-int4.safetensors"] = data
    assert hub.download("int4-r256", "none", comfyui=folder, endpoint=server.url)["model"].read_bytes() == data
    server.error = (500, None)
    server.requests.clear()
    with pytest.raises(ValueError, match="error 500"):
        hub.download("int4-r256", "none", comfyui=comfyui, endpoint=server.url)
    assert not [path for _, path, _, _ in server.requests if "an/other" in path]


def test_into_the_hubs_cache(server, cache):
    paths = hub.download("int4-r256", endpoint=server.url)
    assert paths["model"].read_bytes() == server.contents["some/models/svdq-int4.safetensors"]
    for part in ("model", "text_encoder", "vae"):
        cached = huggingface_hub.try_to_load_from_cache(FILES[part].repo, FILES[part].path)
        assert cached == str(paths[part])
    assert tokenizer.cached_tokenizer() == paths["tokenizer"]
    assert not [name for name in left(cache) if ".part" in name or "blobs/." in name]
    assert len(server.gets()) == 4, "each once"

    server.requests.clear()
    paths["model"].resolve().write_bytes(b"damaged")
    assert hub.download("int4-r256", endpoint=server.url) == paths
    assert server.gets() == ["svdq-int4.safetensors"], "only the damaged one is fetched again"
    assert paths["model"].read_bytes() == server.contents["some/models/svdq-int4.safetensors"]


def test_into_the_hubs_cache_where_links_are_not_allowed(server, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download, "are_symlinks_supported", lambda *_: False)
    path = hub.download("int4-r256", "none", endpoint=server.url)["model"]
    assert not path.is_symlink()
    assert [name for name in left(cache) if "models--some--models/blobs" in name] == [], "no second copy is kept"
    server.requests.clear()
    hub.download("int4-r256", "none", endpoint=server.url)
    assert server.gets() == []


@pytest.mark.parametrize(("reset", "ranges"), [(False, True), (True, True), (False, False)])
def test_a_broken_connection_goes_on(server, fetch, reset, ranges):
    server.break_after, server.reset, server.ranges = [100_000, 100_000], reset, ranges
    assert fetch()["model"].read_bytes() == server.contents["some/models/svdq-int4.safetensors"]
    starts = [name for name in server.gets() if name.startswith("svdq")]
    assert len(starts) == 3
    assert starts[0] == "svdq-int4.safetensors"
    assert all("@" in name for name in starts[1:]), "the rest is asked for, whether the server gives it or not"


@pytest.mark.parametrize("reset", [False, True])
def test_a_stopped_download_goes_on_in_the_next_run(server, fetch, comfyui, reset):
    server.break_after, server.reset = [120_000] + [0] * 20, reset
    with pytest.raises(ValueError, match=r"broke after \d+ of 300\d+ bytes .*they are kept, run it again to go on"):
        fetch()
    ((part, size),) = left(comfyui).items()
    assert re.fullmatch(r"models/diffusion_models/\.svdq-int4\.safetensors\.[0-9a-f]{12}\.part", part)
    assert 0 < size <= 120_000
    server.break_after = []
    server.requests.clear()
    assert fetch()["model"].read_bytes() == server.contents["some/models/svdq-int4.safetensors"]
    assert server.gets()[0] == f"svdq-int4.safetensors@{size}"
    assert not [name for name in left(comfyui) if name.endswith((".part", ".lock"))]


def test_parts_of_an_older_version_and_too_long_ones_are_dropped(server, fetch, comfyui):
    folder = comfyui / "models" / "diffusion_models"
    folder.mkdir()
    (folder / ".svdq-int4.safetensors.0123456789ab.part").write_bytes(b"old")
    digest = server.etags["some/models/svdq-int4.safetensors"]
    (folder / f".svdq-int4.safetensors.{digest[:12]}.part").write_bytes(bytes(400_000))
    fetch()
    assert list(left(folder)) == ["svdq-int4.safetensors"]


@pytest.mark.parametrize("name", ["some/models/svdq-int4.safetensors", str(hub.TOKENIZER)])
@pytest.mark.parametrize("where", ["comfyui", "cache"])
def test_a_wrong_hash_leaves_nothing(server, comfyui, cache, name, where):
    server.contents[name] = server.contents[name][:-1] + b"?"
    with pytest.raises(ValueError, match=r"damaged and was deleted \(.*expected (sha256|git sha1) .*; run it again"):
        hub.download("int4-r256", comfyui=comfyui if where == "comfyui" else None, endpoint=server.url)
    paths = [path for path in left(comfyui.parent) if "/.locks/" not in path]  # those are huggingface_hub's own
    assert not [path for path in paths if Path(name).name in path or path.endswith((".part", ".lock"))]
    assert not list(cache.rglob(server.etags[name]))


@pytest.mark.parametrize(
    ("part", "data", "words"),
    [
        ("model", safetensors(4, 1000), "expected 300000 bytes of tensors, found 1000"),
        ("vae", b"<!DOCTYPE html>" + bytes(99), "a web page, not a checkpoint"),
        ("vae", safetensors(3, 1000)[:-1], "truncated"),
        ("gguf", b"GGML" + bytes(99), "expected a GGUF file"),
        ("tokenizer", b"version https://git-lfs", "expected a JSON object with 'model'"),
        ("tokenizer", b'{"model": {}}', "expected Qwen's tokenizer, found a broken one"),
        ("tokenizer", TOKENIZER.replace(b"im_start", b"im_begin"), r"found no <\|im_start\|>"),
    ],
)
def test_files_that_are_whole_but_wrong(server, fetch, comfyui, part, data, words):
    name = str(FILES[part])
    server.contents[name] = data
    server.etags[name] = server.etag(name)
    with pytest.raises(ValueError, match=words):
        fetch("q8_0")
    assert not [path for path in left(comfyui) if FILES[part].name in path]


def test_another_file_of_that_name_is_not_replaced(server, fetch, comfyui):
    mine = comfyui / "models" / "vae" / "ae.safetensors"
    mine.parent.mkdir()
    for data in (b"mine", bytes(len(server.contents[str(FILES["vae"])]))):
        mine.write_bytes(data)
        with pytest.raises(ValueError, match=r"ae.safetensors: expected .*; it is not replaced: move it away first"):
            fetch()
        assert mine.read_bytes() == data


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (
            404,
            "EntryNotFound",
            r"svdq-int4.safetensors: .* no such file \(404\).* put the file into .*diffusion_models",
        ),
        (404, "RepoNotFound", "no such repository, or hides it; check HF_ENDPOINT and HF_TOKEN"),
        (401, None, "no such repository, or hides it; check HF_ENDPOINT and HF_TOKEN"),
        (403, "GatedRepo", "only to some; accept its terms at .*/some/models and set HF_TOKEN"),
        (500, None, "answered with error 500; try again later"),
    ],
)
def test_refusals_of_the_server(server, fetch, comfyui, status, code, words):
    server.error = (status, code)
    with pytest.raises(ValueError, match=words):
        fetch()
    assert left(comfyui) == {}


def test_nothing_is_fetched_if_one_file_is_missing(server, fetch, comfyui):
    del server.contents[str(FILES["vae"])]
    with pytest.raises(ValueError, match=r"some/parts/split_files/vae/ae.safetensors: .*no such file"):
        fetch()
    assert server.gets() == []
    assert left(comfyui) == {}


def test_a_server_that_is_no_hub(server, fetch):
    server.headers_of_hub = False
    with pytest.raises(ValueError, match="does not report commit, size and hash"):
        fetch()


def test_no_space_is_found_before_anything_is_fetched(server, fetch, comfyui, monkeypatch):
    total = sum(len(server.contents[str(FILES[part])]) for part in WHOLE.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, total - 1))
    with pytest.raises(ValueError, match=r"GiB of free space, found .*; free some, or choose another disk"):
        fetch()
    assert server.gets() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, total))
    fetch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    fetch()  # nothing to come


def test_a_disk_that_fills_up_on_the_way(server, fetch, comfyui, monkeypatch):
    def fill(url, file, **_):
        file.write(bytes(7))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", fill)
        with pytest.raises(ValueError, match=r"svdq-int4.safetensors: the disk is full; run it again"):
            fetch()
    ((part, size),) = left(comfyui).items()
    assert part.endswith(".part")
    assert size == 7


def test_one_process_at_a_time(server, fetch, cache):
    (cache / ".locks").mkdir(parents=True)
    with (
        FileLock(cache / ".locks" / f"{server.etags[str(FILES['model'])]}.lock"),
        pytest.raises(ValueError, match="another process is downloading it"),
    ):
        fetch()


@pytest.mark.parametrize("where", ["comfyui", "cache"])
@pytest.mark.parametrize("cut", ["offline", "network"])
def test_without_network(server, comfyui, monkeypatch, where, cut):
    options = {"comfyui": comfyui if where == "comfyui" else None}
    whole = hub.download("int4-r256", endpoint=server.url, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    if cut == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.download("int4-r256", endpoint=closed, **options) == whole, "what is there is enough"
    remedy = {"offline": "HF_HUB_OFFLINE forbids the network; unset that", "network": "check the network and proxy"}
    with pytest.raises(ValueError, match=rf"^some/gguf/Qwen.gguf: .*{remedy[cut]}"):
        hub.download("int4-r256", "q8_0", endpoint=closed, **options)


def test_the_pipeline_fetches_a_missing_tokenizer(tiny_files, tmp_path, monkeypatch, server, cache):
    encoder = tmp_path / "alone" / "encoder.safetensors"
    encoder.parent.mkdir()
    shutil.copy(tiny_files["text_encoder"], encoder)
    files = {**tiny_files, "text_encoder": encoder}
    download = hub.download_tokenizer
    monkeypatch.setattr(hub, "download_tokenizer", lambda: download(server.url))
    assert find_files(**files).tokenizer == tokenizer.cached_tokenizer() is not None
    shutil.rmtree(cache)
    server.error = (500, None)
    with pytest.raises(ValueError, match=r"found none; put Qwen3's .*Downloading it failed too: .*error 500"):
        find_files(**files)


def run_cli(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`zimage download` with the test's table of models, in a process of its own, as the environment is read once."""
    code = (
        "import sys; from zimage_core import cli, hub\n"
        "hub.MODELS = {'int4-r256': hub.HubFile('some/models', 'svdq-int4.safetensors', 'diffusion_models', 300000)}\n"
        "hub.VAE = hub.HubFile('some/parts', 'split_files/vae/ae.safetensors', 'vae')\n"
        "sys.exit(cli.main(['download', *sys.argv[1:]]))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"} | environment
    command = [sys.executable, "-c", code, "int4-r256", "--text-encoder=none", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_heeds_the_environment(server, tmp_path):
    done = run_cli(tmp_path, HF_ENDPOINT=server.url, HF_TOKEN="hf_other", TQDM_POSITION="-1")
    assert done.returncode == 0, done.stderr
    options = dict(line.removeprefix("--").split("=", 1) for line in done.stdout.splitlines())
    assert options.keys() == {"model", "vae", "tokenizer"}
    assert Path(options["model"]).is_relative_to(tmp_path / "home")
    assert Path(options["model"]).read_bytes() == server.contents["some/models/svdq-int4.safetensors"]
    assert "svdq-int4.safetensors" in done.stderr, "a progress bar, which TQDM_POSITION asks for without a terminal"
    assert ("HEAD", "Bearer hf_other") in {(method, token) for method, _, _, token in server.requests}

    done = run_cli(tmp_path, f"--comfyui={tmp_path}", HF_ENDPOINT=server.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a ComfyUI folder" in done.stderr
    (tmp_path / "models").mkdir()
    done = run_cli(tmp_path, f"--comfyui={tmp_path}", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert "HF_HUB_OFFLINE forbids the network" in line
