"""Batches: rows are checked before work starts, results are whole, kills and edits cost only what they must."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_core import batch
from zimage_core.batch.columns import PictureColumns
from zimage_core.batch.rows import Row, Rows, fingerprint
from zimage_core.batch.sink import Sink
from zimage_core.batch.store import Folder

STANDIN = Path(__file__).with_name("standin.py")
spec = importlib.util.spec_from_file_location("standin", STANDIN)
standin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(standin)
StandIn = standin.StandIn
ROOT = Path(__file__).parents[2]
SMALL = {"width": 64, "height": 64, "steps": 1}


def rows_of(source, **defaults) -> list[Row]:
    return list(Rows(source, PictureColumns(), defaults))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def prompts(count: int) -> list[dict]:
    return [{"prompt": f"cat {i}", "id": f"cat-{i:03}", **SMALL} for i in range(count)]


def state(folder: Path) -> dict[str, str]:
    """id -> hash of the picture's file, by the manifest; every line is held against its file, no file lacks a line."""
    found: dict[str, str] = {}
    for record in Sink(folder).records():
        assert record["id"] not in found, "an id is there once"
        data = (folder / record["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (record["sha256"], record["bytes"])
        found[record["id"]] = record["sha256"]
    pictures = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert pictures == {f"{name}.png" for name in found}
    assert not list(folder.rglob("*.part")), "nothing half written"
    return found


# ---- rows -----------------------------------------------------------------------------------------------------


def test_the_same_rows_from_every_format_and_from_standard_input(tmp_path, monkeypatch):
    jsonl = write(tmp_path / "a.jsonl", '{"prompt": "a cat", "id": 7, "seed": 3}\n\n{"prompt": "a, dog"}\n')
    table = write(tmp_path / "a.csv", '\ufeffid,prompt,seed\n7,a cat,3\n,"a, dog",\n')
    listed = [{"prompt": "a cat", "id": "7", "seed": 3}, {"prompt": "a, dog", "seed": None}]
    expected = rows_of(listed)
    assert [row.id for row in expected] == ["7", "000002"]
    assert expected[0].settings == {
        "prompt": "a cat", "seed": 3, "width": 1024, "height": 1024, "steps": 8, "guidance": 0.0
    }  # fmt: skip
    for source in (jsonl, table, iter(listed)):
        rows = Rows(source, PictureColumns())
        assert list(rows) == expected == list(rows)
        assert rows.check() == 2
    for source in (jsonl, table):
        stdin = io.TextIOWrapper(io.BytesIO(source.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert rows_of("-") == expected
    text = write(tmp_path / "a.txt", "a cat\n\n  a, dog\n")
    assert [row.settings["prompt"] for row in rows_of(text)] == ["a cat", "a, dog"]


def test_count_gives_pictures_with_seeds_that_follow_each_other():
    rows = rows_of([{"prompt": "a", "id": "x", "seed": 2**64 - 1, "count": 2}, {"prompt": "b", "count": "2"}])
    assert [(row.id, row.settings["seed"]) for row in rows[:2]] == [("x-1", 2**64 - 1), ("x-2", 0)]
    assert rows[3].settings["seed"] == rows[2].settings["seed"] + 1


def test_a_seed_that_is_not_given_comes_from_the_id_alone():
    (one,) = rows_of([{"prompt": "a", "id": "x"}])
    (edited,) = rows_of([{"prompt": "another", "id": "x"}])
    (other,) = rows_of([{"prompt": "a", "id": "y"}])
    assert one.settings["seed"] == edited.settings["seed"] != other.settings["seed"]


def test_settings_without_effect_leave_the_key_alone(tmp_path):
    def key(**cells) -> str:
        (row,) = rows_of([{"prompt": "a", "id": "x", **cells}])
        return row.key({})

    assert key() == key(negative_prompt="b") == key(guidance=0) == key(width="1024")
    assert key(guidance=1) != key(guidance=1, negative_prompt="b") != key()
    lora = write(tmp_path / "a.safetensors", "one")
    copy = write(tmp_path / "b.safetensors", "one")
    assert key(lora=str(lora)) == key(lora=[f"{copy}:1"]) != key(lora=f"{lora}:0.5") != key()
    before = key(lora=str(lora))
    write(lora, "other")
    assert key(lora=str(lora)) != before
    assert key(lora=f"{lora};{copy}") != key(lora=f"{copy};{lora}")


def test_large_files_are_told_apart_by_samples(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**27)
    before = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(2**27 - 1)
        file.write(b"x")
    assert fingerprint(path) != before


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"prompt": "a", "widht": 64}, "row 1: column 'widht' is unknown; columns are canny, control"),
        ({"id": "x"}, "prompt: every row needs one"),
        ({"prompt": 3}, "prompt: expected a text, found 3"),
        (
            {"prompt": "a", "width": 100},
            "width: expected a multiple of 16 pixels, found 100; the nearest are 96 and 112",
        ),
        ({"prompt": "a", "height": "64.0"}, "height: expected a whole number"),
        ({"prompt": "a", "steps": True}, "steps: expected a whole number from 1 to 100, found True"),
        ({"prompt": "a", "steps": 101}, "steps"),
        ({"prompt": "a", "seed": -1}, "seed: expected a whole number from 0"),
        ({"prompt": "a", "count": 0}, "count"),
        ({"prompt": "a", "guidance": "nan"}, "guidance: expected a number"),
        ({"prompt": "a", "guidance": -1}, "guidance: expected 0 or more"),
        ({"prompt": "a", "id": "../x"}, "id: expected at most 200 bytes of letters"),
        ({"prompt": "a", "id": "a//b"}, "id"),
        ({"prompt": "a", "id": "a\\b"}, "id"),
        ({"prompt": "a", "id": "dot."}, "id"),
        ({"prompt": "a", "id": ".hidden"}, "id"),
        ({"prompt": "a", "lora": "gone.safetensors:0.5"}, "lora: gone.safetensors: no such file"),
        ({"prompt": "a", "lora": 3}, "lora: expected texts such as FILE:STRENGTH"),
        ({"prompt": "a", "image": "gone.png"}, "image: gone.png: no such file"),
        ({"prompt": "a", "mask": "gone.png"}, "mask: there is no picture for it"),
        ({"prompt": "a", "control": "gone.safetensors"}, "control: gone.safetensors: no such file"),
        ({"prompt": "a", "control_image": "pyproject.toml"}, "control_image: there is no ControlNet for it"),
        ({"prompt": "a", "canny": "perhaps"}, "canny: expected true or false"),
        ({"prompt": "a", "image": "pyproject.toml"}, "image: pyproject.toml: expected a picture"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_row_before_work_starts(tmp_path, monkeypatch, cells, message):
    monkeypatch.chdir(ROOT)
    generator = StandIn()
    with pytest.raises(ValueError) as error:
        batch.run([cells], tmp_path, generator=generator)
    assert message in str(error.value)
    assert not generator.generated


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "row 2: expected a JSON object"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', "row 2: expected one JSON object a line, found a fault at"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "row 1: a name is there twice"),
        ("a.csv", "prompt,id\na\n", "row 1: expected 2 cells, found 1"),
        ("a.csv", "prompt,prompt\na,b\n", "the header has a column twice"),
        ("a.csv", 'prompt\n"a\n', "unexpected end of data"),
        ("a.csv", "", "no rows"),
        ("a.txt", "\n\n", "no rows"),
        ("a.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}\n', "row 2 has an id that row 1 has, too"),
        ("a.jsonl", '{"prompt": "a", "id": "x-2"}\n{"prompt": "b", "id": "x", "count": 2}\n', "row 2 has an id"),
    ],
)
def test_files_that_are_no_rows(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError) as error:
        batch.run(path, tmp_path / "out", generator=StandIn())
    assert message in str(error.value) and (
        str(path) in str(error.value) or "row 2 has" in message or "no rows" in message
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_or_not_utf8(tmp_path):
    with pytest.raises(ValueError, match=r"gone.txt: no such file; expected .jsonl, .csv or .txt"):
        rows_of(tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8, found byte 0xe9"):
        rows_of(tmp_path / "latin.txt")


def test_many_bad_rows_are_told_together_but_not_all():
    with pytest.raises(ValueError) as error:
        Rows([{"prompt": "a", "steps": 0}] * 20, PictureColumns()).check()
    assert "row 1:" in str(error.value) and "row 5:" in str(error.value) and "row 6:" not in str(error.value)


def test_the_page_on_batches_names_every_column():
    text = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
    table = text.partition("| column | default |")[2].partition("\n\n")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == PictureColumns.names | {"id", "count"}


# ---- runs -----------------------------------------------------------------------------------------------------


def test_a_run_does_what_is_missing_edited_or_failed_and_nothing_else(tmp_path):
    rows = prompts(6)
    rows[2]["prompt"] = "fail"
    first = StandIn()
    run = batch.run(rows, tmp_path, generator=first)
    assert (run.rows, run.missing) == (6, 6)
    results = {result.id: result for result in run}
    assert run.failed == 1
    assert results["cat-002"].error == "cat-002: asked to fail"
    before = state(tmp_path)
    assert len(before) == 5
    (failed,) = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert failed["id"] == "cat-002" and "asked to fail" in failed["error"]

    rows[2]["prompt"], rows[4]["steps"] = "mended", 2
    (tmp_path / "cat-000.png").unlink()
    second = StandIn()
    run = batch.run(rows, tmp_path, generator=second)
    assert run.missing == 3
    assert not [result for result in run if result.error]
    assert sorted(second.generated) == ["cat-000", "cat-002", "cat-004"]
    after = state(tmp_path)
    assert after["cat-000"] == before["cat-000"] and after["cat-004"] != before["cat-004"]
    assert not (tmp_path / "failed.jsonl").exists()

    third = StandIn()
    assert not list(batch.run(list(reversed(rows)), tmp_path, generator=third)) and not third.generated


def test_batches_hold_pictures_of_one_group_and_a_failing_one_is_tried_row_by_row(tmp_path):
    rows = prompts(5) + [{"prompt": "fail", "id": "bad", **SMALL}] + [{**SMALL, "prompt": "wide", "width": 128}]
    generator = StandIn(together=4)
    together, alone = tmp_path / "together", tmp_path / "alone"
    results = list(batch.run(rows, together, generator=generator))
    assert {result.id for result in results if result.error} == {"bad"}
    assert {result.id: result.record["together"] for result in results if not result.error} == {
        **{f"cat-{i:03}": 4 for i in range(4)}, "cat-004": 1, "000007": 1
    }  # fmt: skip
    assert generator.prepared == [7]
    list(batch.run(rows, alone, generator=StandIn(), exact=True))
    assert state(alone) == state(together)
    for folder, exact, missing in ((together, False, 1), (together, True, 5), (alone, True, 1)):
        run = batch.run(rows, folder, generator=StandIn(), exact=exact)
        assert run.missing == missing, "what was generated together is no exact result"
        run.close()


def test_long_inputs_are_done_in_chunks_and_results_come_as_they_are_done(tmp_path):
    generator = StandIn()
    run = iter(batch.run(prompts(300), tmp_path, generator=generator))
    next(run)
    assert len(generator.generated) < 300
    run.close()
    assert len(state(tmp_path)) == len(generator.generated)
    list(batch.run(prompts(300), tmp_path, generator=generator))
    assert len(generator.generated) == 300 and len(state(tmp_path)) == 300
    assert max(generator.prepared) <= 128


def test_two_runs_at_a_time_in_one_folder_are_refused(tmp_path):
    run = batch.run(prompts(1), tmp_path, generator=StandIn())
    with pytest.raises(ValueError, match="another run is working there"):
        batch.run(prompts(1), tmp_path, generator=StandIn())
    run.close()
    assert batch.run(prompts(1), tmp_path, generator=StandIn()).missing == 1


def test_a_place_that_cannot_be_written_to_is_told_before_work(tmp_path):
    write(tmp_path / "file", "")
    generator = StandIn()
    with pytest.raises(ValueError, match="results cannot be written there"):
        batch.run(prompts(1), tmp_path / "file" / "out", generator=generator)
    assert not generator.prepared


def test_a_full_disk_ends_the_run_in_one_sentence_and_the_next_goes_on(tmp_path, monkeypatch):
    real, written = os.fsync, []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 12:  # of each picture the file, and twice its folder
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ValueError, match="no space left on device; .* run the same command again"):
            list(batch.run(prompts(40), tmp_path, generator=StandIn()))
    again = StandIn()
    list(batch.run(prompts(40), tmp_path, generator=again))
    assert len(state(tmp_path)) == 40 and len(again.generated) < 40


@pytest.mark.parametrize("kind", ["memory", "file", "pyarrow"])
def test_any_file_system_of_fsspec_or_pyarrow(kind, tmp_path):
    filesystem = pytest.importorskip("pyarrow.fs").LocalFileSystem() if kind == "pyarrow" else fsspec.filesystem(kind)
    where = str(tmp_path / "out")
    rows = prompts(70)
    rows[1]["id"] = "folder/deep/cat"
    assert len(list(batch.run(rows, Sink(where, filesystem), generator=StandIn()))) == 70
    sink = Sink(where, filesystem)
    found = {record["id"]: record["sha256"] for record in sink.records()}
    list(batch.run(rows, tmp_path / "aim", generator=StandIn()))
    assert found == state(tmp_path / "aim")
    assert {name for name, _ in sink.store.files()} == {f"{name}.png" for name in found} | {"manifest.jsonl"}
    sink.store.remove("cat-003.png")
    rows[5]["prompt"] = "edited"
    again = StandIn()
    list(batch.run(rows, Sink(where, filesystem), generator=again))
    assert sorted(again.generated) == ["cat-003", "cat-005"]
    with pytest.raises(ValueError, match="need a folder or URL"):
        batch.run(rows, Sink(where, filesystem), devices=["cpu"])


def test_a_url_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing:// address: "):
        batch.run(prompts(1), "nothing://bucket/folder", generator=StandIn())


# ---- kills ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Dying(Folder):
    """A folder whose process is killed at its nth operation: that one is cut in half, none comes after it."""

    def __init__(self, folder: Path, left: int):
        super().__init__(folder)
        self.left = left

    def alive(self) -> bool:
        """Whether the operation at hand is done in full; Killed for any after the last."""
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self.left > 0

    def write_lines(self, name, lines):
        if self.alive():
            return super().write_lines(name, lines)
        (self.folder / "cut.part").write_bytes(b"".join(lines)[:20])
        raise Killed

    def remove(self, name):
        if not self.alive():
            raise Killed
        super().remove(name)

    def journal(self, name):
        journal, whole = super().journal(name), self.alive
        write = journal.write

        def cut(line):
            if not whole():
                write(line[: len(line) // 2])
                raise Killed
            write(line)

        journal.write = cut
        return journal


def test_killed_at_every_operation_nothing_is_lost_spoiled_or_done_needlessly(tmp_path):
    """An older run, edited rows, a failure, a new row: cut off at each write in turn, then run again."""
    old, rows = prompts(4), prompts(5)
    rows[1]["prompt"], rows[3]["prompt"] = "edited", "fail"
    aim = tmp_path / "aim"
    list(batch.run(rows, aim, generator=StandIn()))
    for operations in range(1, 200):
        folder = tmp_path / str(operations)
        list(batch.run(old, folder, generator=StandIn()))
        sink = Sink(folder)
        sink.store = Dying(folder, operations)
        complete = False
        with contextlib.suppress(Killed, ValueError):
            list(batch.run(rows, sink, generator=StandIn()))
            complete = sink.store.left >= 0
        again = StandIn()
        back = [{**row, "prompt": f"cat {i}"} for i, row in enumerate(rows)]
        first = back if operations % 2 else rows  # also: back to what the old run made
        results = list(batch.run(first, folder, generator=again))
        assert len(again.generated) <= 2 + (operations % 2)
        if first is rows:
            (folder / "cat-003.png").unlink(missing_ok=True)  # a kill may leave it, without a line
            assert state(folder) == state(aim)
            assert [result.id for result in results if result.error] == ["cat-003"]
        else:
            list(batch.run(prompts(5), tmp_path / "back", generator=StandIn()))
            assert state(folder) == state(tmp_path / "back")
        if complete:
            break
    assert complete and operations > 12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_history_of_edits_and_kills_ends_where_one_run_does(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("history")
    rows = prompts(4)
    for _ in range(data.draw(st.integers(1, 5))):
        for row in rows:
            row["prompt"] = data.draw(st.sampled_from(["a", "b"]))
        sink = Sink(folder)
        sink.store = Dying(folder, data.draw(st.integers(1, 25)))
        with contextlib.suppress(Killed, ValueError):
            list(batch.run(rows, sink, generator=StandIn()))
    list(batch.run(rows, folder, generator=StandIn()))
    aim = tmp_path_factory.mktemp("aim")
    list(batch.run(rows, aim, generator=StandIn()))
    assert state(folder) == state(aim)


def test_a_process_killed_at_random_moments_goes_on_where_it_was(tmp_path):
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in prompts(120)))
    aim, out = tmp_path / "aim", tmp_path / "out"
    list(batch.run(path, aim, generator=StandIn()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    chance, kills = random.Random(0), 0
    while True:
        there = len(list(out.glob("*.png")))
        process = subprocess.Popen([sys.executable, STANDIN, path, f"--out={out}", "0.02"], env=environment)
        while process.poll() is None and len(list(out.glob("*.png"))) == there:
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.random() / 2)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 3
    assert state(out) == state(aim)
