"""`--engine ray`: the bytes of the local engine from a cluster of two nodes, one of which is lost in the middle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_wds_http import Server, locations, serving
from test_wds_pack import content_of, media, packed  # noqa: F401 (a fixture)

from lavis_lstp.commands import cli
from lavis_lstp.data.shards import index
from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.jobs import run_jobs
from webdataset_tools.__main__ import main
from webdataset_tools.pack import Settings
from webdataset_tools.verify import verify

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
SHARDS = 6
"""One for each medium, so that each node has several to do."""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}  # a lost node is missed in 2 s, not 16
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def losing(cluster) -> Iterator[Callable]:
    """losing(done, least, most): when done() is at least that, the second node is killed with what it is doing, and
    done() is less than `most` when it is gone."""
    node = cluster.add_node(num_cpus=1)
    threads: list[threading.Thread] = []
    seen: list[float] = []
    over = threading.Event()

    def wait_and_kill(done: Callable[[], float], least: float) -> None:
        while done() < least and not over.wait(0.001):
            pass
        cluster.remove_node(node, allow_graceful=False)
        seen.append(done())

    def losing(done: Callable[[], float], least: float, most: float) -> None:
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        threads.append(threading.Thread(target=wait_and_kill, args=(done, least)))
        threads[0].start()
        seen.extend([least, most])

    yield losing
    over.set()
    threads[0].join()
    least, most, at = seen
    assert least <= at < most  # in the middle
    while len([node for node in ray.nodes() if node["Alive"]]) > 1:
        time.sleep(0.02)


class SlowServer(Server):
    """Answers after a while, so that shards take long enough for a node to be lost among them."""

    def process_request(self, request, client_address):
        time.sleep(0.05)
        super().process_request(request, client_address)


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("shards")
    packed(media, folder, max_count=1)
    return folder


@pytest.fixture
def served(shards):
    """A server of them and their addresses."""
    with serving(shards, kind=SlowServer) as server:
        yield server, locations(server, sorted(shards.glob("*.tar")))


def shards_in(out: Path) -> Callable[[], int]:
    return lambda: len(list(out.glob("*.index")))


def test_pack(media, tmp_path, losing):  # noqa: F811
    slow_enough = {"max_count": 1, "settings": Settings(frames=6, size=600)}
    packed(media, tmp_path / "local", **slow_enough)
    losing(shards_in(tmp_path / "ray"), 1, SHARDS)
    packed(media, tmp_path / "ray", **slow_enough, engine="ray")
    assert content_of(tmp_path / "ray") == content_of(tmp_path / "local")


SPANS = {"format": "lavis_lstp.spans", "version": 1, "num_frames": 4, "spans": {"q1-0": {"span": [1, 3]}}}


@pytest.mark.parametrize(
    "words",
    [
        ["flow", "--num-frames", "4", "--size", "64"],
        ["spans", "--spans", "spans.json"],
        pytest.param(["reshard", "--max-count", "1", "--shuffle", "7"], marks=pytest.mark.slow),
        pytest.param(["repair", "--decode", "1"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_verbs_that_write_sets(served, tmp_path, losing, monkeypatch, words):
    server, addresses = served
    monkeypatch.chdir(tmp_path)
    Path("spans.json").write_text(json.dumps(SPANS), encoding="utf-8")
    command = [words[0], *addresses, *words[1:], "--out"]
    assert main([*command, "local/x", "--workers", "1"]) == 0
    losing(shards_in(tmp_path / "ray"), 1, SHARDS)
    assert main([*command, "ray/x", "--engine", "ray"]) == 0
    assert content_of(tmp_path / "ray") == content_of(tmp_path / "local")
    assert len(content_of(tmp_path / "ray")) == 2 * SHARDS + 1


def test_verify(served, shards, losing):
    server, addresses = served
    whole = verify(addresses, decode=2)
    asked = len(server.served)
    losing(lambda: len(server.served), 1.3 * asked, 2 * asked)
    assert verify(addresses, decode=2, engine="ray") == whole and not whole["failed"]


def test_select_goes_on(cluster, media, tmp_path, capsys):  # noqa: F811
    rows = [row for row in json.loads((media / "annotation.json").read_text(encoding="utf-8")) if "video" in row]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    words = [
        "select",
        "--questions",
        str(tmp_path / "rows.json"),
        "--root",
        str(media),
        "--method",
        "motion",
        "-k",
        "2",
    ]
    assert cli.main([*words, "--out", str(tmp_path / "local.jsonl")]) == 0
    whole = (tmp_path / "local.jsonl").read_text(encoding="utf-8").splitlines()
    half = whole[: len(rows) // 2]
    (tmp_path / "ray.jsonl").write_text("\n".join([*half, whole[-1][:30]]), encoding="utf-8")  # as a killed run left it
    assert cli.main([*words, "--out", str(tmp_path / "ray.jsonl"), "--engine", "ray"]) == 0
    assert f"{len(rows)} questions, {len(rows) - len(half)} of them selected now" in capsys.readouterr().out
    found = (tmp_path / "ray.jsonl").read_text(encoding="utf-8").splitlines()
    assert found[: len(half)] == half
    for line, other in zip(found, whole, strict=True):
        assert {**json.loads(line), "seconds": {}} == {**json.loads(other), "seconds": {}}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://[::1]:99999"])
def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch, address):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("would wait"))
    with pytest.raises(ConfigError, match=r"no cluster at .*ray start"):
        run_jobs(print, [1], engine="ray", address=address)


def test_an_error_of_a_job_is_that_of_the_job(cluster, tmp_path):
    with pytest.raises(ShardError, match="gone.tar: no such file") as caught:
        run_jobs(index.scan, [str(tmp_path / "gone.tar")], engine="ray")
    assert caught.value.cause == "not found"
