"""`lavis-lstp serve --example` as a user starts and ends it."""

from __future__ import annotations

import json
import sys

import pytest
from serving_process import WITHOUT, serving

from lavis_lstp.commands import cli, serve
from lavis_lstp.inference.loading import EXAMPLE

ROW = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))[1]


def test_it_answers_ends_at_sigterm_and_keeps_uploads(tmp_path):
    httpx = pytest.importorskip("httpx", reason=WITHOUT)
    pytest.importorskip("gradio", reason=WITHOUT)
    with serving(tmp_path) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        assert "LSTP" in client.get("/").text and client.get("/health").json()["status"] == "ok"
        stored = client.post("/v1/files", files={"file": ("clip.mp4", (EXAMPLE / "clip.mp4").read_bytes())}).json()
        content = [{"type": "video_url", "video_url": {"url": stored["id"]}}, {"type": "text", "text": ROW["question"]}]
        asked = {"messages": [{"role": "user", "content": content}]}
        made = client.post("/v1/chat/completions", json=asked).json()
        assert made["choices"][0]["message"]["content"] == ROW["answer"] and made["model"] == "lstp-example"
        assert list((tmp_path / "tmp").glob("lavis_lstp_page_*"))
    assert process.returncode == 0
    assert not list((tmp_path / "tmp").glob("lavis_lstp_page_*"))
    assert (tmp_path / "files" / f"{stored['id']}.bin").read_bytes() == (EXAMPLE / "clip.mp4").read_bytes()


def test_without_the_extra_the_line_to_install_it_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--example"]) == 2
    assert "pip install 'lavis_lstp[serve]' (missing: uvicorn)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.9.1", True), ("0.0.0.0", False), ("::", False),
     ("localhost.example.org", False), ("192.168.1.2", False), ("", False)],
)  # fmt: skip
def test_which_addresses_are_of_this_machine_alone(host, alone):
    assert serve.is_loopback(host) is alone
