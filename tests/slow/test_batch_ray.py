"""Batches on a real Ray cluster on this machine: two workers on CPUs, of which one is lost on the way; S3 by moto."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from zimage_core import batch, cli

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
SMALL = {"width": 48, "height": 32, "steps": 2}


def hashes(sink: batch.Sink) -> dict[str, str]:
    return {record["id"]: record["sha256"] for record in sink.records()}


def rows_file(folder: Path, count: int) -> Path:
    path = folder / "rows.jsonl"
    rows = ({"id": f"cat-{i}", "prompt": f"cat {i}", "seed": i} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27})
    nodes = [running.add_node(num_cpus=1, object_store_memory=2**27) for _ in range(2)]
    running.wait_for_nodes()
    yield running, nodes
    ray.shutdown()
    running.shutdown()


def workers() -> list[int]:
    """Process ids of the actors that generate."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "cmdline").exists():
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::MapWorker(MapBatches(Actor))"):
                found.append(int(folder.name))
    return found


def test_a_worker_and_a_node_are_lost_and_every_row_is_there_as_on_one_machine(tiny_files, cluster, tmp_path):
    running, nodes = cluster
    path = rows_file(tmp_path, 40)
    list(batch.run(path, tmp_path / "one", **tiny_files, device="cpu", defaults=SMALL))
    out = tmp_path / "out"
    run = batch.run(path, out, **tiny_files, device="cpu", defaults=SMALL, ray=running.address, workers=(2, 2))
    assert (run.rows, run.missing) == (40, 40)
    seen = []
    for result in run:
        assert result.error is None
        seen.append(result.id)
        if len(seen) == 2:
            (victim, *_) = workers()
            os.kill(victim, signal.SIGKILL)
        if len(seen) == 10:
            running.remove_node(nodes[1], allow_graceful=False)
    assert set(seen) == {f"cat-{i}" for i in range(40)}
    assert hashes(batch.Sink(out)) == hashes(batch.Sink(tmp_path / "one"))
    (out / "cat-3.png").unlink()
    again = batch.run(path, out, **tiny_files, device="cpu", defaults=SMALL, ray=running.address, workers=(1, 1))
    assert [result.id for result in again] == ["cat-3"]


def test_what_a_cluster_refuses_is_told_before_work(tiny_files, cluster, tmp_path, capsys):
    running, _ = cluster
    models = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]

    def refused(text: str, suffix: str = ".jsonl", *options: str) -> str:
        path = tmp_path / f"rows{suffix}"
        path.write_text(text)
        command = ["batch", str(path), f"--out={tmp_path / 'out'}", "--device=cpu", f"--ray={running.address}"]
        assert cli.main([*command, *(options or models)]) == 2
        return capsys.readouterr().err

    assert "give each an id" in refused('{"prompt": "a"}\n')
    assert "width: expected a multiple of 16" in refused('{"prompt": "a", "id": "x", "width": 50}\n')
    assert "column 'size' is unknown" in refused("prompt,id,size\na,x,3\n", ".csv")
    assert "has an id that row" in refused("prompt,id\na,x\nb,x\n", ".csv")
    assert "Ray reads .jsonl and .csv" in refused("a cat\n", ".txt")
    assert "VAE" in refused("prompt,id\na,x\n", ".csv", *models, f"--text-encoder={tiny_files['vae']}")


@pytest.fixture
def s3(monkeypatch):
    """A client of a server that behaves as S3 does; processes started from now on find it, too."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**secrets, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    yield boto3.client("s3", endpoint_url=endpoint)
    server.stop()


def test_results_in_s3(tiny_files, s3, cluster, tmp_path):
    s3.create_bucket(Bucket="pictures")
    path = rows_file(tmp_path, 6)
    common = {**tiny_files, "device": "cpu", "defaults": SMALL}
    list(batch.run(path, tmp_path / "one", **common))
    aim = hashes(batch.Sink(tmp_path / "one"))
    engines = {"here": {}, "processes": {"devices": ["cpu"]}, "ray": {"ray": cluster[0].address, "workers": (1, 1)}}
    for prefix, engine in engines.items():
        place = f"s3://pictures/{prefix}"
        results = list(batch.run(path, place, **common, **engine))
        assert len(results) == 6 and not any(result.error for result in results)
        assert hashes(batch.Sink(place)) == aim
        keys = {item["Key"] for item in s3.list_objects_v2(Bucket="pictures", Prefix=prefix)["Contents"]}
        keys = {key for key in keys if not key.endswith("/")}  # pyarrow leaves such marks for folders
        assert keys == {f"{prefix}/cat-{i}.png" for i in range(6)} | {f"{prefix}/manifest.jsonl"}
        s3.delete_object(Bucket="pictures", Key=f"{prefix}/cat-2.png")
        assert [result.id for result in batch.run(path, place, **common, **engine)] == ["cat-2"]
        assert hashes(batch.Sink(place)) == aim
    begun = time.monotonic()
    with pytest.raises(ValueError, match="results cannot be written there"):
        batch.run(path, "s3://no-such-bucket/folder", **common)
    assert time.monotonic() - begun < 60
