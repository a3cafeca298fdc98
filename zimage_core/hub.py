"""Fetching the model files from the Hugging Face hub: into ComfyUI's folders, or into the hub's own cache.

Requests, tokens, progress bars, retries and the environment (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE) are
huggingface_hub's. What it lacks is done here: a stopped download goes on where it stopped (2.x deletes the part),
and nothing gets its final name before its size, its hash as the hub reports it, and its header are right. In the
cache the finished file is put where the hub keeps a blob, and hf_hub_download then only links it. Releases before 2.0
append a whole file to the part where a server ignores the range; the hash finds that, and the part is deleted.

Source: huggingface_hub/file_download.py@v2.4.0; the names of the files: the repositories themselves.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants, file_download, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from .failures import one_of
from .formats.safetensors import read_header, tensor_bytes
from .sizes import GIB
from .whole import place

CHUNK = 2**24


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository, its folder below ComfyUI's models/, and its tensors' bytes where known.

    mirrors: repositories that are known to hold the same file, for where its own is gone.
    """

    repo: str
    path: str
    folder: str
    payload: int | None = None
    mirrors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"


@dataclass(frozen=True)
class Item:
    """A file to fetch, as the hub reports it, and where it goes.

    digest: sha256, or git's sha1 of a small file. folder: where the user wants it, None for the hub's cache.
    """

    file: HubFile
    size: int
    digest: str
    commit: str
    target: Path
    folder: Path | None

    @property
    def part(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.digest[:12]}.part")


def _svdq(form: str, payload: int | None = None, *mirrors: str) -> HubFile:
    """A file of nunchaku, whose organisation has had another name."""
    others = ("nunchaku-tech/nunchaku-z-image-turbo", *mirrors)
    name = f"svdq-{form}-z-image-turbo.safetensors"
    return HubFile("nunchaku-ai/nunchaku-z-image-turbo", name, "diffusion_models", payload, others)


def _comfy(path: str, folder: str, repo: str = "Comfy-Org/z_image_turbo") -> HubFile:
    return HubFile(repo, f"split_files/{path}", folder)


WAN2GP = "DeepBeepMeep/Z-Image"
GGUFS = "leejet/Z-Image-Turbo-GGUF"
MODELS = {
    "int4-r256": _svdq("int4_r256", 4_546_023_552, WAN2GP),
    "int4-r128": _svdq("int4_r128", 4_011_249_792),
    "int4-r32": _svdq("int4_r32", 3_610_169_472),
    "fp4-r128": _svdq("fp4_r128", None, WAN2GP),
    "fp4-r32": _svdq("fp4_r32"),
    "bf16": _comfy("diffusion_models/z_image_turbo_bf16.safetensors", "diffusion_models"),
    "fp8": HubFile("T5B/Z-Image-Turbo-FP8", "z-image-turbo-fp8-e4m3fn.safetensors", "diffusion_models"),
    "int8": HubFile(WAN2GP, "ZImageTurbo_quanto_bf16_int8.safetensors", "diffusion_models"),
    "nvfp4": _comfy("diffusion_models/z_image_turbo_nvfp4.safetensors", "diffusion_models"),
    "q8_0": HubFile(GGUFS, "z_image_turbo-Q8_0.gguf", "diffusion_models"),
    "q4_0": HubFile(GGUFS, "z_image_turbo-Q4_0.gguf", "diffusion_models"),
    "base-bf16": _comfy("diffusion_models/z_image_bf16.safetensors", "diffusion_models", "Comfy-Org/z_image"),
}
TEXT_ENCODERS = {
    "fp8": _comfy("text_encoders/qwen_3_4b_fp8_mixed.safetensors", "text_encoders"),
    "bf16": _comfy("text_encoders/qwen_3_4b.safetensors", "text_encoders"),
    "q8_0": HubFile("Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q8_0.gguf", "text_encoders"),
    "q4_k_m": HubFile("Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q4_K_M.gguf", "text_encoders"),
}
VAE = _comfy("vae/ae.safetensors", "vae")
TOKENIZER = HubFile("Tongyi-MAI/Z-Image-Turbo", "tokenizer/tokenizer.json", "text_encoders/tokenizer")


def download(model: str, text_encoder: str = "fp8", *, comfyui=None, endpoint: str | None = None) -> dict[str, Path]:
    """Fetch all that a picture needs: `model` and `text_encoder` name rows of the tables; "none" for no encoder.

    Returns the paths, named as load_pipeline's arguments. They are below `comfyui`/models, or in the hub's cache.
    Raises ValueError for unknown names, a folder that is no ComfyUI, and as `fetch_all` does.
    """
    files = {"model": MODELS[one_of("model", model, MODELS)]}
    if text_encoder != "none":
        files["text_encoder"] = TEXT_ENCODERS[one_of("text encoder", text_encoder, TEXT_ENCODERS)]
    files |= {"vae": VAE, "tokenizer": TOKENIZER}
    models = None
    if comfyui is not None:
        models = Path(comfyui) / "models"
        if not models.is_dir():
            raise ValueError(f"{comfyui}: expected a ComfyUI folder, found no models/ in it; check the path")
    paths = dict(zip(files, fetch_all(files.values(), models, endpoint)))
    return paths | {"tokenizer": paths["tokenizer"].parent}


def download_tokenizer(endpoint: str | None = None) -> Path:
    """Fetch Qwen3's tokenizer into the hub's cache and return its folder. Raises ValueError as `fetch_all` does."""
    return fetch_all([TOKENIZER], None, endpoint)[0].parent


def fetch_all(files: Iterable[HubFile], models: Path | None, endpoint: str | None = None) -> list[Path]:
    """Fetch files into ComfyUI's `models` folder, or into the hub's cache; what is there already is only checked.

    Every file is looked up, and the disks' free space compared, before the first byte is fetched. Without a network,
    files that are there are taken as they are. Raises ValueError where a file cannot be had, with the remedy.
    """
    endpoint = endpoint or constants.ENDPOINT
    found = [look_up(file, models / file.folder if models else None, endpoint) for file in files]
    check_space([item for item in found if isinstance(item, Item) and not item.target.is_file()])
    return [fetch(item, endpoint) if isinstance(item, Item) else item for item in found]


def look_up(file: HubFile, folder: Path | None, endpoint: str) -> Item | Path:
    """What the hub reports of a file for a folder or (None) its cache; the local file if the hub is out of reach.

    Where its repository is gone or has it no more, the next that is known to hold it is asked.
    """
    gone: list[ValueError] = []
    for repo in (file.repo, *file.mirrors):
        try:
            return _look_up(replace(file, repo=repo, mirrors=()), folder, endpoint)
        except _Gone as error:
            gone.append(error)
    asked = f"; neither has {' nor '.join(file.mirrors)}" if file.mirrors else ""
    raise ValueError(f"{gone[0]}{asked}")


class _Gone(ValueError):
    """A file that its repository does not have."""


def _look_up(file: HubFile, folder: Path | None, endpoint: str) -> Item | Path:
    try:
        found = file_download.get_hf_file_metadata(hf_hub_url(file.repo, file.path, endpoint=endpoint))
    except (HTTPError, OSError) as error:
        local = folder / file.name if folder else try_to_load_from_cache(file.repo, file.path)
        if isinstance(error, HfHubHTTPError) or not isinstance(local, (str, Path)) or not Path(local).is_file():
            refused = refusal(file, folder, endpoint, error)
            missing = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 404)
            raise (_Gone(str(refused)) if missing else refused) from None
        check_format(Path(local), file)
        return Path(local)
    digest, size, commit = found.etag or "", found.size, found.commit_hash
    if size is None or not commit or len(digest) not in (40, 64) or set(digest) - set("0123456789abcdef"):
        raise ValueError(
            f"{file}: the server at {endpoint} does not report commit, size and hash as the hub does, so the "
            "file could not be checked; set HF_ENDPOINT to another server, or unset it"
        )
    if folder:
        target = folder / file.name
    elif isinstance(cached := try_to_load_from_cache(file.repo, file.path, revision=commit), str):
        target = Path(cached).resolve()
    else:
        target = Path(
            constants.HF_HUB_CACHE,
            file_download.repo_folder_name(repo_id=file.repo, repo_type="model"),
            "blobs",
            digest,
        )
    return Item(file, size, digest, commit, target, folder)


def check_space(items: Iterable[Item]) -> None:
    """ValueError unless every disk has space for what is still to come."""
    needed: Counter[int] = Counter()  # bytes by disk
    for item in items:
        folder = next(parent for parent in item.target.parents if parent.is_dir())
        disk = folder.stat().st_dev
        needed[disk] += item.size - (item.part.stat().st_size if item.part.is_file() else 0)
        if needed[disk] > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"{folder}: expected {needed[disk] / GIB:.2f} GiB of free space, found {free / GIB:.2f}; free some, or "
                "choose another disk with --comfyui or HF_HOME"
            )


def fetch(item: Item, endpoint: str) -> Path:
    """Receive, check and place one file, one process at a time; returns its path. ValueError where that fails."""
    lock = Path(constants.HF_HUB_CACHE, ".locks", f"{item.digest}.lock")
    for folder in (item.target.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            fetch_locked(item, endpoint)
    except Timeout:
        raise ValueError(f"{item.target}: another process is downloading it; wait for that one to end") from None
    if item.folder:
        return item.target
    try:
        linked = Path(hf_hub_download(item.file.repo, item.file.path, endpoint=endpoint))  # the blob is there already
    except (HTTPError, OSError) as error:
        raise refusal(item.file, None, endpoint, error) from None
    if not linked.is_symlink() and not item.target.samefile(linked):
        item.target.unlink()  # where links are not allowed the hub has made a copy
    return linked


def fetch_locked(item: Item, endpoint: str) -> None:
    """Have the whole file under its final name; another file of that name is replaced in the hub's cache only."""
    if item.target.is_file():
        try:
            return check_file(item.target, item)
        except ValueError as error:
            if item.folder:
                raise ValueError(f"{error}; it is not replaced: move it away first") from None
            item.target.unlink()
    receive(item, endpoint)
    try:
        check_file(item.part, item)
    except ValueError as error:
        item.part.unlink()
        raise ValueError(f"{item.file}: the download is damaged and was deleted ({error}); run it again") from None
    place(item.part, item.target)


def receive(item: Item, endpoint: str) -> None:
    """Append to the part of a file until it is whole; the part stays where this fails, an older version's goes."""
    for stale in set(item.part.parent.glob(f".{item.target.name}.*.part")) - {item.part}:
        stale.unlink()
    url = hf_hub_url(item.file.repo, item.file.path, revision=item.commit, endpoint=endpoint)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    too_long = item.part.is_file() and item.part.stat().st_size > item.size
    with item.part.open("wb" if too_long else "ab") as file:
        while (start := file.tell()) < item.size:
            try:
                file_download.http_get(
                    url,
                    file,
                    resume_size=start,
                    headers=headers,
                    expected_size=item.size,
                    displayed_filename=item.file.name,
                )
            except HfHubHTTPError as error:
                raise refusal(item.file, item.folder, endpoint, error) from None
            except (HTTPError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                    words = "the disk is full" if error.errno == errno.ENOSPC else str(error)
                    raise ValueError(f"{item.target}: {words}; run it again when that is solved, it goes on") from None
                if file.tell() <= start:  # a connection that brings nothing at all, after http_get's own retries
                    raise ValueError(
                        f"{item.file}: the connection to {endpoint} broke after {start} of {item.size} bytes "
                        f"({type(error).__name__}); they are kept, run it again to go on"
                    ) from None
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path, item: Item) -> None:
    """ValueError unless a file has the size and the hash that the hub reports, and a header that can be read."""
    if (size := path.stat().st_size) != item.size:
        raise ValueError(f"{path}: expected {item.size} bytes, found {size}")
    git = len(item.digest) == 40
    digest = hashlib.sha1(f"blob {size}\0".encode()) if git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != item.digest:
        name = "git sha1" if git else "sha256"
        raise ValueError(f"{path}: expected {name} {item.digest}, found {digest.hexdigest()}")
    check_format(path, item.file)


def check_format(path: Path, file: HubFile) -> None:
    """ValueError unless a file is what its name in the repository says, by its header, and all of a tokenizer."""
    if file.path.endswith(".safetensors"):
        found = sum(tensor_bytes(dtype, shape) for dtype, shape in read_header(path).tensors.values())
        if file.payload not in (None, found):
            raise ValueError(f"{path}: expected {file.payload} bytes of tensors, found {found}; is it another model?")
    elif file.path.endswith(".json"):
        from .models.tokenizer import load_tokenizer

        load_tokenizer(path)
    else:
        with path.open("rb") as opened:
            if (start := opened.read(4)) != b"GGUF":
                raise ValueError(f"{path}: expected a GGUF file, found one that begins with {start!r}")


def refusal(file: HubFile, folder: Path | None, endpoint: str, error: Exception) -> ValueError:
    """One sentence for what went wrong between us and the hub, with the remedy."""
    by_hand = f", or put the file into {folder} yourself" if folder else ""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        problem = f"it is not on this machine and HF_HUB_OFFLINE forbids the network; unset that{by_hand}"
    elif isinstance(error, GatedRepoError) or status == 403:
        problem = f"{endpoint} gives it only to some; accept its terms at {endpoint}/{file.repo} and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError) or status == 401:
        problem = f"{endpoint} has no such repository, or hides it; check HF_ENDPOINT and HF_TOKEN"
    elif status == 404:
        problem = f"{endpoint} has no such file (404); it may have moved, look at {endpoint}/{file.repo}{by_hand}"
    elif status is not None:
        problem = f"{endpoint} answered with error {status}; try again later"
    else:
        words = " ".join(str(error).split()) or type(error).__name__
        problem = f"the connection to {endpoint} failed ({words}); check the network and proxy{by_hand}"
    return ValueError(f"{file}: {problem}")
