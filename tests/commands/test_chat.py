"""`lavis-lstp chat` over a pipe, and its line editor in a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lavis_lstp.commands import chat, cli
from lavis_lstp.inference.loading import EXAMPLE

ROWS = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))


def talk(monkeypatch, capsys, lines, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = cli.main(["chat", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_question_a_line_with_commands_between(monkeypatch, capsys, tmp_path):
    asked = [row["question"] for row in ROWS[:3]]
    sheet, record = tmp_path / "sheet.png", tmp_path / "talk.json"
    lines = [asked[0], "", f"/frames {sheet}", "/set num_selected=2", asked[1], "/set num_selected=", "/set", asked[2]]
    code, out, err = talk(monkeypatch, capsys, [*lines, f"/save {record}", "/quit", "unheard"], "--example")
    assert code == 0 and err == ""
    turns = json.loads(record.read_text())["turns"]
    assert [turn["question"] for turn in turns] == asked and turns[0]["prediction"] == ROWS[0]["answer"]
    assert [len(turn["frame_index"]) for turn in turns] == [4, 2, 4]
    assert out.startswith(f"{ROWS[0]['answer']}\n  [3.00 to 4.20 s; frames at ") and "nothing is set" in out
    with Image.open(sheet) as picture:
        assert picture.width > 3 * picture.height
    assert "\x1b" not in out and "unheard" not in out


def test_turns_are_read_until_a_reset(monkeypatch, capsys, tmp_path):
    record = tmp_path / "talk.json"
    words = (str(EXAMPLE / "clip.mp4"), "--checkpoint", str(EXAMPLE))
    talk(monkeypatch, capsys, ["one?", "two?", f"/save {record}"], *words)
    assert json.loads(record.read_text())["turns"][1]["prompt"].startswith("USER: <video>\none? ASSISTANT: ")
    talk(monkeypatch, capsys, ["one?", "/reset", "two?", f"/save {record}"], *words)
    (turn,) = json.loads(record.read_text())["turns"]
    assert turn["prompt"] == "USER: <video>\ntwo? ASSISTANT: "
    talk(monkeypatch, capsys, ["one?", "two?", f"/save {record}"], *words, "--no-history")
    assert "one?" not in json.loads(record.read_text())["turns"][1]["prompt"]


def test_subtitles_are_read_until_another_video(monkeypatch, capsys, tmp_path):
    record, file, clip = tmp_path / "talk.json", tmp_path / "s.srt", EXAMPLE / "clip.mp4"
    file.write_text("1\n00:00:00,000 --> 00:10:00,000\nsaid\n", encoding="utf-8")
    saved = ["one?", f"/save {record}", f"/video {clip}", "two?", f"/subtitles {file}", "three?", f"/save {record}.b"]
    code, *_ = talk(monkeypatch, capsys, saved, "--example", "--subtitles", str(file))
    turns = [turn for path in (record, f"{record}.b") for turn in json.loads(Path(path).read_text("utf-8"))["turns"]]
    assert code == 0 and [turn.get("subtitles", {}).get("lines") for turn in turns] == [1, None, 1]


def test_a_line_that_fails_is_one_line_and_the_conversation_goes_on(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "x\x1b[31m.mp4"
    broken.write_text("no video")
    lines = ["/frames", "/vidio x", "/video nowhere.mp4", "/set num_selectd=3", "/set top_p", f"/save {tmp_path}/a/\0"]
    lines += ["/save ~nobody-of-this-name/x.json", "/save", f"/save {tmp_path}"]
    lines += [f"/video {broken}", "what?", f"/video {EXAMPLE / 'clip.mp4'}"]
    code, out, err = talk(monkeypatch, capsys, [*lines, ROWS[1]["question"]], "--example")
    said = err.splitlines()
    assert code == 2 and len(said) == 10 and all(line.startswith("error: ") for line in said), err
    assert "'/video'" in said[1] and "num_selected" in said[3] and "\x1b" not in err
    assert out.startswith(ROWS[1]["answer"])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere.mp4"], "nowhere.mp4"), (["--example", "--checkpoint", "x"], "--checkpoint"),
     (["--example", "--num-frames", "0"], "--num-frames")],
)  # fmt: skip
def test_bad_words_are_one_line(monkeypatch, capsys, words, said):
    code, out, err = talk(monkeypatch, capsys, [], *words)
    assert code == 2 and not out and len(err.splitlines()) == 1 and said in err


def test_it_ends_when_nobody_reads_the_answers(monkeypatch):
    class Closed:
        def line(self, line: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdin", io.StringIO("one?\ntwo?\n"))
    with pytest.raises(BrokenPipeError):  # run_command makes it status 141, without a word
        chat.converse(Closed())


def test_a_sheet_is_shown_where_the_terminal_has_colours(monkeypatch, capsys, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    talking = chat.Chat(predictor=None, video=str(EXAMPLE / "clip.mp4"), history=False)
    talking.turns.append(type("Turn", (), {"frame_times_s": [1.0, 2.0]}))
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLORTERM", "truecolor")
    talking.frames(str(tmp_path / "sheet.png"))
    assert shown.getvalue().count("▀") > 500
    shown.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    talking.frames(str(tmp_path / "sheet.png"))
    assert "sheet.png" in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_a_terminal_gets_a_prompt_and_a_streamed_answer():
    pytest.importorskip("prompt_toolkit", reason="prompt_toolkit is not installed (pip install '.[test]')")
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "lavis_lstp", "chat", "--example"]
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    os.set_blocking(leader, False)
    seen, at = b"", 0

    def see(mark: bytes) -> None:
        nonlocal seen, at
        deadline = time.monotonic() + 300
        while mark not in seen[at:]:
            assert process.poll() is None and time.monotonic() < deadline, seen
            try:
                seen += os.read(leader, 65536)
            except BlockingIOError:
                time.sleep(0.05)
        at = seen.index(mark, at) + len(mark)

    prompt = b"\x1b[0m>"
    try:
        see(prompt)
        os.write(leader, ROWS[1]["question"].encode() + b"\r")
        see(b"frames at")
        see(prompt)  # before it the terminal is not the editor's, and Ctrl-D would be lost
        os.write(leader, b"\x04")  # Ctrl-D
        assert process.wait(300) == 0 and b"bar" in seen.split(b"right?")[-1]
    finally:
        process.kill()
        os.close(leader)
