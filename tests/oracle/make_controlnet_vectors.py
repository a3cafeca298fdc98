"""Writes tests/data/controlnet/*.safetensors: outputs of VideoX-Fun's ControlNet class, the trainer's own code.

    python tests/oracle/make_controlnet_vectors.py path/to/VideoX-Fun

The checkout (github.com/aigc-apps/VideoX-Fun, made at 804a4258) is only imported, with attention as plain torch. Each
file holds the outputs (B, 16, h, w) of `controlnet_cases.CASES` in fp32, and the official names and shapes of all
weights as JSON in its metadata. Each picture of a batch runs alone: batched with a longer caption, the class gives a v1
ControlNet other positions than alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import torch
from controlnet_cases import BASE, CASES, CHANNELS, FOLDER, PLACES, checksum, inputs, weights
from safetensors.torch import save_file
from torch.nn import functional as F


def import_class(checkout: Path) -> type:
    """ZImageControlTransformer2DModel, without its package's other imports."""
    models = checkout / "videox_fun" / "models"
    for name, path in (("videox_fun", models.parent), ("videox_fun.models", models)):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    attention = types.ModuleType("videox_fun.models.attention_utils")
    attention.attention = lambda q, k, v, attn_mask=None: F.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q, k, v)), attn_mask=attn_mask
    ).transpose(1, 2)
    sys.modules[attention.__name__] = attention
    distributed = types.ModuleType("videox_fun.dist")
    for name in ("ZMultiGPUsSingleStreamAttnProcessor", "get_sequence_parallel_rank"):
        setattr(distributed, name, None)
    distributed.get_sequence_parallel_world_size = distributed.get_sp_group = None
    sys.modules[distributed.__name__] = distributed
    return importlib.import_module("videox_fun.models.z_image_transformer2d_control").ZImageControlTransformer2DModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    model_class = import_class(parser.parse_args().checkout)
    base = {k: list(v) if isinstance(v, tuple) else v for k, v in BASE.items()}
    for variant, places in PLACES.items():
        model = model_class(
            control_layers_places=list(places),
            control_refiner_layers_places=[0, 1],
            control_in_dim=CHANNELS[variant],
            add_control_noise_refiner=variant != "v1",
            add_control_noise_refiner_correctly=variant in ("2.1", "lite"),
            n_kv_heads=BASE["n_heads"],
            **base,
        ).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        made = weights(shapes)
        model.load_state_dict(made)
        found = {}
        for case in CASES:
            pictures = zip(*inputs(case, CHANNELS[variant]), strict=True)
            with torch.no_grad():
                outs = [
                    model(
                        [latents[:, None]],
                        t[None],
                        [caption],
                        control_context=[control[:, None]],
                        control_context_scale=case.strength,
                    )[0]
                    for latents, t, caption, control in pictures
                ]
            found[case.name] = torch.cat(outs)[:, :, 0].contiguous()
            assert found[case.name].isfinite().all()
        metadata = {"shapes": json.dumps(shapes), "checksum": repr(checksum(made))}
        save_file(found, FOLDER / f"{variant}.safetensors", metadata)


if __name__ == "__main__":
    main()
