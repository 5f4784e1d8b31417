"""`--engine ray`: the same bytes from a cluster of two nodes, one of which is lost in the middle."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from test_wds_pack import content_of, media, packed  # noqa: F401 (a fixture)

from webdataset_tools.pack import Settings
from webdataset_tools.verify import verify

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")


@pytest.mark.slow
def test_two_nodes_one_of_them_lost(media, tmp_path):  # noqa: F811
    from ray.cluster_utils import Cluster

    slow_enough = {"max_count": 1, "settings": Settings(frames=6, size=600)}
    packed(media, tmp_path / "local", **slow_enough)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        out: Path = tmp_path / "ray"
        there: list[int] = []

        def lose_a_node() -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not list(out.glob("*.index")):
                time.sleep(0.001)
            there.append(len(list(out.glob("*.index"))))
            cluster.remove_node(second, allow_graceful=False)

        loser = threading.Thread(target=lose_a_node)
        loser.start()
        packed(media, out, **slow_enough, engine="ray")
        loser.join()
        assert there[0] < 6  # in the middle
        assert content_of(out) == content_of(tmp_path / "local")
        shards = sorted(map(str, out.glob("*.tar")))
        assert verify(shards, decode=1, engine="ray") == verify(shards, decode=1)
    finally:
        ray.shutdown()
        cluster.shutdown()
