"""`zimage verify` passes what is right and finds faults that were planted into the bundled model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import cli, verify
from zimage_core.demo import demo_files
from zimage_core.formats.load import load_transformer
from zimage_core.linear import layout
from zimage_core.linear.backends import Backend, reference
from zimage_core.linear.svdq import SVDQWeights

BRANCH = "codes, scales, smoothing and branch"
QKV = "layers.1.attention.to_qkv."


def planted(folder, change):
    """The bundled model with its tensors changed."""
    source = demo_files()["model"]
    tensors = load_file(source)
    change(tensors)
    with safe_open(source, "pt") as file:
        save_file(tensors, folder / "planted.safetensors", metadata=file.metadata())
    return folder / "planted.safetensors"


def replaced(tensors, prefix, change):
    """Exchange a linear's tensors for those that `change` makes of its unpacked ones."""
    weights = SVDQWeights.from_packed(tensors, prefix)
    changed = layout.pack_linear(weights.tensors() | change(weights))
    tensors.update({prefix + name: tensor.contiguous() for name, tensor in changed.items()})


def scale_off_by_two(tensors):
    tensors[f"{QKV}wscales"] *= 2


def nibbles_swapped(tensors):
    packed = tensors[f"{QKV}qweight"].view(torch.uint8)
    tensors[f"{QKV}qweight"] = ((packed << 4) | (packed >> 4)).view(torch.int8)


def branch_dropped(tensors):
    tensors[f"{QKV}proj_up"].zero_()


def branch_in_stored_order(tensors):
    replaced(tensors, QKV, lambda w: {"proj_down": w.proj_down.T.reshape(w.proj_down.shape)})


def not_a_number(tensors):
    tensors[f"{QKV}wscales"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (scale_off_by_two, "layers.1.attention.to_qkv: scale of codes to branch"),
        (nibbles_swapped, "layers.1.attention.to_qkv: codes along"),
        (branch_dropped, "layers.1.attention.to_qkv"),
        (branch_in_stored_order, "layers.1.attention.to_qkv: codes along proj_down"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found(tmp_path, fault, words):
    model = load_transformer(planted(tmp_path, fault))
    (check,) = verify.check_weights(model, torch.device("cpu"))
    assert not check.ok and words in check.found


def test_a_number_that_is_none_is_refused_as_the_file_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"wscales'?: expected finite numbers"):
        load_transformer(planted(tmp_path, not_a_number))


def test_random_weights_do_not_find_their_picture_again(tiny_files):
    report = verify.verify(**tiny_files, device="cpu", size=64)
    assert "noise removed from it" in [check.name for check in report.checks if not check.ok]


def test_metadata_that_contradicts_the_tensors_is_found(tmp_path):
    path = tmp_path / "other.safetensors"
    metadata = {"quantization_config": json.dumps({"rank": 32})}
    save_file(load_file(demo_files()["model"]), path, metadata=metadata)
    assert not verify.check_header(path, load_transformer(path)).ok


def test_the_bundled_model_passes_and_the_last_line_is_json(capsys):
    assert cli.main(["verify", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["ok"] and "everything is as it should be" in lines[-1]
    names = [check["name"] for check in report["checks"]]
    assert names[:3] == ["header", BRANCH, "a picture"] and "reference w4a4 on real inputs" in names


def test_the_command_fails_where_a_check_does(tmp_path, capsys):
    files = demo_files()
    options = ["--text-encoder", str(files["text_encoder"]), "--vae", str(files["vae"]), "--size", "128"]
    path = planted(tmp_path, scale_off_by_two)
    assert cli.main(["verify", str(path), *options, "--tokenizer", str(files["tokenizer"]), "--device", "cpu"]) == 1
    assert "FAULT" in capsys.readouterr().out


def test_a_backend_that_is_wrong_is_named(monkeypatch):
    class Off(Backend):
        def linear(self, x, prepared):
            return super().linear(x, prepared) * 1.1

    ways = {"kernels w4a16": Off("kernels", "w4a16", reference, ""), "good w4a4": Backend("", "w4a4", reference, "")}
    monkeypatch.setattr(verify, "every_way", lambda device, dtype: ways)
    report = verify.verify(device="cpu")
    assert [check.name for check in report.checks if not check.ok] == ["kernels w4a16 on real inputs"]
