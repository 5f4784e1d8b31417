"""Secrets stay out of manifests, logs and errors; `doctor --scan` finds those that got into a folder otherwise."""

from __future__ import annotations

import io
import json
import logging
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.numpy import save_file
from toy import make_runner

from lavis_lstp.commands import cli, scan
from lavis_lstp.data.shards import storage
from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.redaction import printable, recordable, without_secrets, without_secrets_in
from lavis_lstp.runners.checkpoint import CheckpointError, read_manifest
from lavis_lstp.runners.record import RunManifest
from lavis_lstp.untrusted import guard_log

WORD = "hunter2hunter2"
SECRET = {
    f"https://me:{WORD}@host/x.tar": "https://***@host/x.tar",
    f"s3://{WORD}@bucket/x-{{0..3}}.tar": "s3://***@bucket/x-{0..3}.tar",
    f"https://h/x.tar?X-Amz-Credential={WORD}&X-Amz-Signature={WORD}&part=2": (
        "https://h/x.tar?X-Amz-Credential=***&X-Amz-Signature=***&part=2"
    ),
    f"https://h/x.tar?sv=2&sig={WORD}#end": "https://h/x.tar?sv=2&sig=***#end",
    f"https://h/x?token={WORD}": "https://h/x?token=***",
    f"https://h/x?api_key={WORD}&key={WORD}": "https://h/x?api_key=***&key=***",
    f"pipe:curl -H 'Authorization: Bearer {WORD}' https://h/x": "pipe:curl -H 'Authorization: Bearer ***' https://h/x",
    f"run.api_key={WORD}": "run.api_key=***",
    f"https://h/x: refused, {WORD} no, sk-proj-{WORD}{WORD}": f"https://h/x: refused, {WORD} no, ***",
    f"hf_{WORD}{WORD}": "***",
}
HARMLESS = [
    "https://huggingface.co/owner/repository?download=true",
    "mail me@host.com",
    "model.sampler.tokenizer=bert",
    "a?tokenizer=x",
    "the password is unknown",
    "Question: what is the key? Answer:",
    "/data/@home/x.tar",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
]


@pytest.mark.parametrize("text", SECRET)
def test_a_secret_is_cut_and_the_rest_stays(text):
    assert without_secrets(text) == SECRET[text]
    assert without_secrets(SECRET[text]) == SECRET[text]
    assert without_secrets_in({"a": [text, 1, None]}) == {"a": [SECRET[text], 1, None]}


@pytest.mark.parametrize("text", HARMLESS)
def test_a_text_without_a_secret_stays(text):
    assert without_secrets(text) == text


def test_settings_that_are_secrets_by_name():
    found = without_secrets_in(
        {"api_key": WORD, "db_password": WORD, "question_key": "q", "tokenizer": "t", "secret": ""}
    )
    assert found == {"api_key": "***", "db_password": "***", "question_key": "q", "tokenizer": "t", "secret": ""}


@given(st.text())
def test_a_terminal_sees_no_control_character(text):
    shown = printable(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown
    assert shown == text or any(ord(c) < 32 or ord(c) >= 127 for c in text)


def test_errors_and_logs_carry_neither_secret_nor_escape():
    said = f"https://me:{WORD}@host/x\x1b[31m\u202e: no"
    for kind in (ConfigError, ShardError, CheckpointError):
        assert str(kind(said)) == "https://***@host/x\\x1b[31m\\u202e: no"
    stream, logger = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        guard_log()
        guard_log()
        logging.getLogger("lavis_lstp.any").warning("%s: %s", said, "\x07")
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == "https://***@host/x\\x1b[31m\\u202e: no: \\x07\n" and len(handler.filters) == 1


def test_an_address_that_cannot_be_read_is_named_without_its_secrets(caplog):
    address = f"http://me:{WORD}@127.0.0.1:9/x.tar?sig={WORD}"
    with caplog.at_level(logging.INFO), pytest.raises(ShardError) as caught:
        storage.read_all(address, storage.Retry(attempts=2, wait_s=0))
    assert WORD not in str(caught.value) + caplog.text and "127.0.0.1:9/x.tar" in str(caught.value)


# ---- what is recorded ------------------------------------------------------------------------------------------------


def config_with(monkeypatch) -> object:
    monkeypatch.setenv("LSTP_TEST_KEY", WORD)
    return OmegaConf.create(
        {
            "run": {"seed": "${oc.decode:${oc.env:LSTP_TEST_SEED,'7'}}", "name": "${model.name}"},
            "model": {
                "name": "tiny",
                "weights": "${oc.env:LSTP_TEST_KEY}/w",
                "again": "${model.weights}",
                "n": [1, None],
            },
            "data": f"https://me:{WORD}@host/${{model.name}}",
        }
    )


def test_what_the_environment_gives_is_recorded_as_it_was_written(monkeypatch):
    config = config_with(monkeypatch)
    found = recordable(config, resolved=["run.seed", "run.absent"])
    assert found["run"] == {"seed": 7, "name": "tiny"}
    assert found["model"]["weights"] == found["model"]["again"] == "${oc.env:LSTP_TEST_KEY}/w"
    assert found["model"]["n"] == [1, None] and found["data"] == "https://***@host/tiny"
    assert config.model.weights == f"{WORD}/w", "the run itself has the value"


def test_a_runs_manifests_hold_no_secret(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["train", f"data=https://me:{WORD}@host/x.tar"])
    runner = make_runner(tmp_path, max_epoch=1)
    runner.recorded_config = {**runner.recorded_config, **recordable({"data": f"https://me:{WORD}@host"})}
    runner.train()
    files = [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")]
    assert {"run_manifest.json", "manifest.json"} <= {file.name for file in files}
    assert not [file for file in files if WORD in file.read_text()]
    (folder,) = tmp_path.glob("checkpoints/step_*")
    assert read_manifest(folder)["config"]["data"] == "https://***@host"


def test_a_failed_runs_error_holds_no_secret(tmp_path):
    manifest = RunManifest(tmp_path / "m.json", {"config": {"api_key": WORD}})
    with pytest.raises(ValueError), manifest.running():
        raise ValueError(f"cannot open https://me:{WORD}@host/x?token={WORD}")
    assert WORD not in (tmp_path / "m.json").read_text()


# ---- doctor --scan ---------------------------------------------------------------------------------------------------

AWS = "AKIA" + "IOSFODNN7EXAMPLZ"
GITHUB = "ghp_" + "a1B2" * 9


def test_a_scan_names_file_line_and_kind_and_never_the_secret(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log.jsonl").write_text('{"a": 1}\n' + json.dumps({"said": f"key {AWS}"}) + "\n")
    (tmp_path / "page.html").write_text(f"<p>one\n<p>https://me:{WORD}@host/\n<img src='data:image/png;base64,{AWS}'>")
    (tmp_path / "\x1b[31m.txt").write_text(f"token {GITHUB}\n")
    save_file({}, str(tmp_path / "w.safetensors"), metadata={"by": f"hf_{WORD}{WORD}"})
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        raw = json.dumps({"a": 1, "source": f"\\u0068ttps://me:{WORD}@host/x"}).replace("\\\\u", "\\u").encode()
        info = tarfile.TarInfo("a.json")
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    (tmp_path / "cache.db").write_bytes(b"\0\1\2" + GITHUB.encode() + b"\0\0")
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    assert cli.main(["doctor", "--scan", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for place in (
        "deep/log.jsonl:2: AWS Access Key",
        "page.html:2: Basic Auth Credentials",
        "\\x1b[31m.txt:1: GitHub Token",
        "w.safetensors (header):1: Hugging Face token",
        "x.tar, a.json:3: Basic Auth Credentials",
        "cut.tar:0: not searched to its end",
        "cache.db (strings):1: GitHub Token",
    ):
        assert place in said, place
    assert len(said.splitlines()) == 9 and "8 places" in said, "what is there of the cut shard was searched, too"
    assert WORD not in said and AWS not in said and GITHUB not in said and "\x1b" not in said


def test_a_clean_folder_passes_the_scan(tmp_path, capsys):
    config = {"data": "https://***@host/x?sig=***", "weights": "${oc.env:KEY}", "sha256": "0123456789abcdef" * 4}
    (tmp_path / "run_manifest.json").write_text(json.dumps(config))
    (tmp_path / "log.jsonl").write_text(json.dumps({"question": "APACHE helicopter? the key is in the door"}) + "\n")
    assert cli.main(["doctor", "--scan", str(tmp_path)]) == 0
    assert "no key or password found" in capsys.readouterr().out
    assert cli.main(["doctor", "--scan", str(tmp_path / "none")]) == 2


def test_a_key_far_into_a_long_line_is_found():
    assert scan.kinds_in("x " * scan.LONGEST_LINE + GITHUB) == {"GitHub Token"}
