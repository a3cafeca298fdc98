"""`zimage generate --from PICTURE`, names of files, formats, sheets, aspects, several prompts."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from zimage_core import cli, metadata, notation
from zimage_core.cli.completion import subparsers
from zimage_core.sampler import SAMPLERS, SCHEDULES
from zimage_core.sizes import of_aspect


@pytest.fixture
def generate(tiny_files, tmp_path, monkeypatch, capsys):
    """generate(*arguments) -> the paths that the command printed, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    files = [f"--{part.replace('_', '-')}={path}" for part, path in tiny_files.items()]

    def run(*arguments, files=files, code=0):
        assert cli.main(["generate", *arguments, *files]) == code
        found = capsys.readouterr()
        return found.out.split() if code == 0 else found.err

    return run


SMALL = ("--width=48", "--height=32", "--steps=2", "--device=cpu", "--dtype=float32")
EVERYTHING = (
    *("--negative-prompt=a dog", "--guidance=0.5", "--nag-scale=2", "--nag-tau=1.5", "--nag-alpha=0.7"),
    *("--sampler=heun", "--schedule=beta", "--shift=2.5", "--variety=20:0.7:0.9", "--max-tokens=64", "--seed=5"),
)


def same(one, other) -> bool:
    return numpy.array_equal(*(numpy.asarray(Image.open(path)) for path in (one, other)))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_from_a_picture_comes_the_same_picture(generate, suffix):
    """Bit for bit also as JPEG, which codes equal pictures alike."""
    (first,) = generate("a cat", *SMALL, *EVERYTHING, f"--out=first.{suffix}")
    (second,) = generate(f"--from={first}", f"--out=second.{suffix}", files=())
    assert same(first, second)
    facts = [metadata.read(Image.open(path)) for path in (first, second)]
    assert facts[0] == facts[1] and facts[0]["seed"] == 5
    assert Image.open(first).format == {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[suffix]


def test_from_a_picture_that_had_others_beside_it_and_a_random_seed(generate):
    first = generate("a cat", "a tree", *SMALL, "--batch=2", "--out=a-{index}.png")
    second = generate("--from", first[2], "--out=b-{index}.png", files=())
    assert len(first) == len(second) == 4 and all(map(same, first, second))


def test_from_a_picture_that_began_with_another(generate):
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save("start.png")
    Image.new("L", (48, 32)).save("mask.png")
    (first,) = generate("a cat", *SMALL, "--image=start.png", "--pad=16,0,0,16", "--out=first.png", "--width=64")
    (second,) = generate("--from=first.png", "--out=second.png", files=())
    assert same(first, second)


def test_what_is_given_beside_from_replaces_what_the_picture_says(generate):
    generate("a cat", *SMALL, "--seed=5", "--out=first.png")
    for where in (("--from=first.png", "--seed=6"), ("--seed=6", "--from=first.png")):
        generate(*where, "--out=second.png", files=())
        assert metadata.read(Image.open("second.png"))["seed"] == 6
    generate("a tree", "--from=first.png", "--out=third.png", files=())
    assert metadata.read(Image.open("third.png"))["prompt"] == "a tree"


@pytest.mark.parametrize("facts", [{}, {"prompt": "a"}, {"prompt": "a", "options": ["--out=x"]}, {"options": [1]}])
def test_pictures_that_do_not_tell(tmp_path, capsys, facts):
    path = tmp_path / "other.png"
    path.write_bytes(metadata.png(Image.new("RGB", (4, 4)), facts))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", f"--from={path}"])
    words = capsys.readouterr().err
    assert "expected" in words and len(words.splitlines()) == 1


def test_names_of_files(generate):
    assert generate("a cat!", "two/dogs", *SMALL, "--seed=7", "--out={index}-{seed}-{prompt}.webp") == [
        "1-7-a-cat.webp",
        "2-8-two-dogs.webp",
    ]
    assert generate("a cat", *SMALL, "--batch=2", "--out={prompt}.png") == ["a-cat-1.png", "a-cat-2.png"]
    assert "expected {seed}, {index} or {prompt}" in generate("a", "--out={model}.png", code=2)
    assert "PNG, WebP or JPEG" in generate("a", "--out=a.bmp", code=2)


def test_the_choices_are_those_of_the_library():
    actions = {action.dest: action for action in subparsers(cli.build_parser())["generate"]._actions}
    assert [*actions["sampler"].choices] == [*SAMPLERS]
    assert [*actions["schedule"].choices] == ["even", *SCHEDULES]


def test_a_contact_sheet(generate):
    paths = generate("a cat", *SMALL, "--batch=3", "--out=a.png", "--sheet=all.png")
    assert paths == ["a-1.png", "a-2.png", "a-3.png", "all.png"]
    sheet = numpy.asarray(Image.open("all.png"))
    assert sheet.shape == (64, 96, 3) and (sheet[32:, 48:] == 255).all()
    assert numpy.array_equal(sheet[32:, :48], numpy.asarray(Image.open("a-3.png")))


def test_a_picture_twice_as_large(generate):
    (path,) = generate("a cat", *SMALL, "--upscale=2", "--seed=1", "--out=large.png")
    assert Image.open(path).size == (96, 64)
    (again,) = generate("--from=large.png", "--out=again.png", files=())
    assert same(path, again)


@pytest.mark.parametrize(
    "text, side, size", [("1:1", 1024, (1024, 1024)), ("16:9", 1024, (1360, 768)), ("2:3", 256, (208, 320))]
)
def test_aspects(text, side, size):
    assert of_aspect(notation.aspect(text), side) == size


def test_an_aspect_is_a_size(generate):
    assert "--aspect: expected no --width" in generate("a", "--aspect=16:9", "--width=64", code=2)
    with pytest.raises(SystemExit, match="2"):
        generate("a", "--aspect=16:0")


def test_viewers_read_the_parameters(generate):
    (path,) = generate("a cat", *SMALL, *EVERYTHING, "--out=a.webp")
    comment = Image.open(path).getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    text = comment[8:].decode("utf-16-be")
    assert text.startswith(
        "a cat\nNegative prompt: a dog\nSteps: 2, Sampler: Heun, Seed: 5, CFG scale: 1.5, Size: 48x32"
    )
