"""Nodes around the sampler for the ComfyUI that `comfyui.py` starts, and the numbers of its process over HTTP.

Not part of the pack: ComfyUI loads this file as a custom node of its own.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch
from aiohttp import web
from safetensors.torch import save_file
from server import PromptServer

PACK = Path(__file__).resolve().parents[1]
LOOP = "sample_euler"  # ComfyUI's function that runs the steps
ONCE = "prepare"  # the pack's function that runs once per prompt, within the first step
POLL_S = 0.01

logger = logging.getLogger(__name__)


class Watch:
    """The least free memory that the device had while this was on, and host waits for it that torch warned of."""

    def __init__(self):
        self.lowest: int | None = None
        self.syncs: Counter[tuple[str, str]] = Counter()
        self._stop: threading.Event | None = None

    def memory(self, on: bool) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None
        if on:
            self.lowest, self._stop = None, threading.Event()
            threading.Thread(target=self._poll, args=(self._stop,), daemon=True).start()

    def _poll(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            free = torch.cuda.mem_get_info()[0]
            self.lowest = free if self.lowest is None else min(self.lowest, free)

    def sync(self, on: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if on else "default")
        if on:
            self.syncs.clear()
            warnings.simplefilter("always")
            warnings.showwarning = self._show

    def _show(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Count a warning under where in a step it came from: the pack's innermost line, or who else's."""
        if "synchronizing" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != warnings.__file__]
        names = [frame.name for frame in stack]
        if LOOP not in names:
            self.syncs["outside the steps", ""] += 1
            return
        inner = stack[len(names) - names[::-1].index(LOOP) :]
        ours = [frame for frame in inner if Path(frame.filename).resolve().is_relative_to(PACK)]
        kind = "ComfyUI's, in a step"
        if ours:
            kind = "once per prompt" if any(frame.name == ONCE for frame in ours) else "in a step"
        site = (ours or stack)[-1]
        where = Path(site.filename).resolve().relative_to(PACK) if ours else Path(site.filename).name
        self.syncs[kind, f"{where}:{site.lineno} {site.name}"] += 1


watch = Watch()


def stats() -> dict:
    """Bytes of this process on the device by torch, and of the whole device; what ComfyUI holds there."""
    found = {"lowest": watch.lowest, "syncs": [[*key, count] for key, count in watch.syncs.items()]}
    loaded = [m for m in memory.current_loaded_models if m.model is not None]
    found["models"] = [[type(m.model.model).__name__, m.model_loaded_memory()] for m in loaded]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"free": free, "total": total, "used": total - free}
        found |= {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
        found |= {"reserved": torch.cuda.memory_reserved()}
    return found


@PromptServer.instance.routes.get("/zimage_probe")
async def get_stats(request):
    gc.collect()
    return web.json_response(stats())


@PromptServer.instance.routes.post("/zimage_probe")
async def set_watch(request):
    asked = await request.json()
    if "memory" in asked:
        watch.memory(asked["memory"])
    if "sync" in asked:
        watch.sync(asked["sync"])
    return web.json_response(stats())


class ZImageProbeBegin:
    """Right before the sampler: notes what is there and begins to count anew. `take` makes ComfyUI sample again."""

    CATEGORY = "Z-Image INT4/benchmark"
    FUNCTION = "begin"
    RETURN_TYPES = ("MODEL", "CONDITIONING")
    begun = (0.0, {})

    @classmethod
    def INPUT_TYPES(cls):
        asked = {"take": ("INT", {"default": 0, "max": 2**31}), "alone": ("BOOLEAN", {"default": False})}
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), **asked}}

    def begin(self, model, positive, take, alone):
        if alone:
            memory.unload_all_models()
            memory.soft_empty_cache()
        before = stats()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        logger.info("probe: begin %d", take)
        ZImageProbeBegin.begun = (time.perf_counter(), before)
        return model, positive


class ZImageProbeEnd:
    """Right after the sampler: what it took; the latents go into a file."""

    CATEGORY = "Z-Image INT4/benchmark"
    FUNCTION = "end"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "take": ("INT", {"default": 0, "max": 2**31})}}

    def end(self, latent, take):
        samples = latent["samples"].cpu()
        begun, before = ZImageProbeBegin.begun
        found = {"sample_s": time.perf_counter() - begun, "before": before, "after": stats()}
        logger.info("probe: end %d", take)
        path = Path(folder_paths.get_output_directory()) / f"probe_{take}.safetensors"
        save_file({"samples": samples.contiguous()}, path)
        return {"ui": {"probe": [found | {"latents": str(path)}]}, "result": (latent,)}


NODE_CLASS_MAPPINGS = {"ZImageProbeBegin": ZImageProbeBegin, "ZImageProbeEnd": ZImageProbeEnd}
