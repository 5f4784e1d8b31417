"""A served model as an answerer, against a server on loopback that keeps what it was sent and reads the frames."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from video_files import numbered_video, read_number

from lavis_lstp.commands import cli
from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.endpoint import ADDRESS, KEY, EndpointError
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate
from lavis_lstp.models.answer.answerer import build_answerer
from lavis_lstp.models.lstp import LSTP

SECRET = "sk-test-not-a-real-key-0000"


class Stub:
    """Answers with the numbers of the frames it was shown, or as `deed` says; `seen` has all requests."""

    def __init__(self):
        self.seen: list[dict] = []
        self.deed = lambda request: None
        self.at_once = self.most = 0
        self.lock = threading.Lock()
        self.together: threading.Barrier | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.seen.append({"key": self.headers["Authorization"], "path": self.path, **request})
                    stub.at_once += 1
                    stub.most = max(stub.most, stub.at_once)
                if stub.together is not None:
                    stub.together.wait(20)
                if request.get("stream"):
                    return self.in_pieces(request)
                status, body = stub.deed(request) or (200, answer(" ".join(map(str, numbers_in(request)))))
                data = json.dumps(body).encode()
                with stub.lock:
                    stub.at_once -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "5")
                self.end_headers()
                self.wfile.write(data)

            def in_pieces(self, request):
                """A word at a time; `cut` breaks off behind the first, `next_word` is waited for before the others."""
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                said = stub.deed(request) or f" {' '.join(map(str, numbers_in(request)))} \n"
                events = [{"choices": [{"index": 0, "delta": {"content": f"{word} "}}]} for word in said.split(" ")]
                events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                events.append({"choices": [], "usage": answer("")["usage"]})
                for number, event in enumerate(events[:1] if stub.cut else events):
                    if number == 2:
                        stub.next_word.wait(20)
                    whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **event}
                    self.wfile.write(b"data: " + json.dumps(whole).encode() + b"\n\n")
                self.wfile.write(b"" if stub.cut else b"data: [DONE]\n\n")

        self.cut, self.next_word = False, threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def answer(text: str | None, **more) -> dict:
    message = {"role": "assistant", "content": text, "refusal": None, **more}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def pictures_in(request: dict) -> list[np.ndarray]:
    """The frames of a request, uint8 [3,H,W], as a server would decode them."""
    found = []
    for part in request["messages"][-1]["content"]:
        url = part.get(part["type"], {}).get("url", "") if part["type"] != "text" else ""
        head, _, data = url.partition(",")
        assert head in ("", "data:video/jpeg;base64", "data:image/jpeg;base64")
        found += [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data.split(",") if one]
    return [picture.transpose(2, 0, 1) for picture in found]


def numbers_in(request: dict) -> list[int]:
    return [read_number(picture) for picture in pictures_in(request)]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    monkeypatch.setenv(ADDRESS, made.url)
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """300 numbered frames, 30 a second."""
    return numbered_video(tmp_path_factory.mktemp("film") / "film.mp4", 300, fps=30)


def made(**changes) -> LSTP:
    served = {key: changes.pop(key) for key in ("frames", "concurrency", "retries", "cache") if key in changes}
    backbone = {"source": "endpoint", "weights": "served-1", "endpoint": {"image_size": 64, **served}, **changes}
    selector = {"name": "uniform", "num_selected": 4}
    section = {
        "arch": "lstp_video_llm",
        "prompt": "{question}",
        "train": [],
        "selector": selector,
        "backbone": backbone,
    }
    return LSTP.from_config(section).eval()


def batch(film: Path, chosen: list[list[int]], questions: list[str] | None = None) -> dict:
    from lavis_lstp.data.video.reading import read_frames

    frames = [read_frames(film, indices=numbers, size=64) for numbers in chosen]
    return {
        "frames": torch.stack([torch.from_numpy(one.frames) for one in frames]),
        "frame_times": torch.stack([torch.from_numpy(one.times_s.astype(np.float32)) for one in frames]),
        "frame_mask": torch.ones(len(chosen), len(chosen[0]), dtype=torch.long),
        "text_input": questions or [f"what is in part {i}?" for i in range(len(chosen))],
    }


CHOSEN = [[40, 147, 218, 295], [0, 1, 2, 3], [7, 30, 60, 299]]


def test_chosen_frames_arrive_as_a_video_with_their_true_times(stub, film):
    found = made().answer(batch(film, CHOSEN), max_new_tokens=5)
    assert found["prediction"] == [" ".join(str(i % 38) for i in numbers) for numbers in CHOSEN]
    by_text = {request["messages"][-1]["content"][-1]["text"]: request for request in stub.seen}
    for row, numbers in enumerate(CHOSEN):
        request = by_text[f"what is in part {row}?"]
        told = request["media_io_kwargs"]["video"]
        assert [i / told["fps"] for i in told["frames_indices"]] == pytest.approx([n / 30 for n in numbers], abs=6e-4)
        assert all(type(i) is int for i in told["frames_indices"]) and told["num_frames"] == 4
        assert told["total_num_frames"] > max(told["frames_indices"])
        assert [part["type"] for part in request["messages"][-1]["content"]] == ["video_url", "text"]
        assert (request["model"], request["temperature"], request["max_completion_tokens"]) == ("served-1", 0, 5)
        assert request["key"] == f"Bearer {SECRET}" and request["path"] == "/v1/chat/completions"
    assert [one["tokens"] for one in found["log_prob"]] == [3, 3, 3]


def test_images_are_sent_where_they_are_asked_for_and_only_there(stub, film):
    found = made(frames="images", times_in_prompt=True).answer(batch(film, CHOSEN[:1]))
    (request,) = stub.seen
    content = request["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 4 + ["text"] and "media_io_kwargs" not in request
    assert content[-1]["text"] == "The frames show these seconds of the video: 1.3, 4.9, 7.3, 9.8.\nwhat is in part 0?"
    assert found["prediction"] == ["2 33 28 29"]
    stub.deed = lambda request: (400, {"error": {"message": "video_url is not supported"}})
    with pytest.raises(EndpointError, match="video_url is not supported.*backbone.endpoint.frames=images") as caught:
        made().answer(batch(film, CHOSEN))
    assert "\n" not in str(caught.value)
    assert all(request["messages"][-1]["content"][0]["type"] == "video_url" for request in stub.seen[1:])


def test_nothing_is_asked_twice_and_a_failure_loses_no_answer(stub, film):
    samples = batch(film, CHOSEN)
    stub.deed = lambda r: (500, {"error": {"message": "down"}}) if "part 1" in json.dumps(r["messages"][-1]) else None
    with pytest.raises(EndpointError, match=r"no answer to 1 of 3 questions, last: .*down.*call again to go on"):
        made(retries=0).answer(samples)
    stub.deed = lambda request: None
    count = len(stub.seen)
    assert made().answer(samples)["prediction"][1] == "0 1 2 3" and len(stub.seen) == count + 1
    made().answer({**samples, "text_input": ["what?", *samples["text_input"][1:]]})
    assert len(stub.seen) == count + 2, "another question is another request"
    made().answer(samples, max_new_tokens=99)
    assert len(stub.seen) == count + 5, "other settings are other requests"


def test_errors_of_the_server_are_retried_and_questions_go_out_together(stub, film):
    left = [2]

    def once(request):
        left[0] -= 1
        return (503, {"error": {"message": "busy"}}) if left[0] >= 0 else None

    stub.deed = once
    assert made(retries=3).answer(batch(film, CHOSEN[:1]))["prediction"] == ["2 33 28 29"]
    assert len(stub.seen) == 3
    stub.together = threading.Barrier(3)
    made(concurrency=3).answer(batch(film, CHOSEN, ["a?", "b?", "c?"]))
    assert stub.most == 3


def test_a_refusal_is_an_answer_and_half_an_answer_is_none(stub, film):
    stub.deed = lambda request: (200, answer(None, refusal="I would rather not."))
    assert made().answer(batch(film, CHOSEN[:1]))["prediction"] == ["I would rather not."]
    stub.deed = lambda request: (400, {"error": {"message": "filtered", "code": "content_filter"}})
    assert "filtered" in made().answer(batch(film, CHOSEN[1:2]))["prediction"][0]
    for body in (answer(None), {"choices": []}):
        stub.deed = lambda request, body=body: (200, body)
        with pytest.raises(EndpointError, match="gave no answer to 1 of 1"):
            made().answer(batch(film, CHOSEN[2:]))


def test_drawn_answers_have_a_seed_of_their_question(stub, film):
    samples = {**batch(film, CHOSEN), "question_id": ["a", "b", "c"]}
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    made().answer(samples, **drawn)
    asked = {request["messages"][-1]["content"][-1]["text"]: request for request in stub.seen}
    assert len({request["seed"] for request in asked.values()}) == 3
    assert all((r["temperature"], r["top_p"], r["top_k"]) == (0.7, 0.9, 5) for r in asked.values())
    made().answer({key: value[1:2] for key, value in samples.items()}, **drawn)
    assert len(stub.seen) == 3, "the same draw, whatever else is in the batch"
    pieces = list(made().stream(samples, **drawn))
    assert pieces == [made().answer(samples, **drawn)["prediction"]], "what is kept is one piece"


def streamed(generator) -> tuple[list[list[str]], dict]:
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


def test_an_answer_arrives_in_the_server_s_pieces(stub, film):
    samples = batch(film, CHOSEN[:1])
    stream = made().stream(samples)
    assert next(stream) == ["2"]  # the server waits for `next_word` before it sends more
    stub.next_word.set()
    pieces, found = streamed(stream)
    assert "".join(text for (text,) in pieces) == " 33 28 29" and found["prediction"] == ["2 33 28 29"]
    assert found["log_prob"][0]["tokens"] == 3 and stub.seen[0]["stream_options"] == {"include_usage": True}
    assert made().answer(samples)["prediction"] == ["2 33 28 29"] and len(stub.seen) == 1, "kept as any answer"
    pieces, found = streamed(made().stream(batch(film, CHOSEN, ["what is in part 0?", "b?", "c?"])))
    assert pieces[0] == ["2 33 28 29", "", ""], "what is kept comes at once"
    wanted = [" ".join(str(i % 38) for i in numbers) for numbers in CHOSEN]
    assert ["".join(column) for column in zip(*pieces, strict=True)] == found["prediction"] == wanted


def test_a_stream_that_is_cut_or_given_up_is_no_answer(stub, film):
    stub.cut = True
    with pytest.raises(EndpointError, match="no answer to 1 of 1 questions, last: the stream"):
        list(made().stream(batch(film, CHOSEN[:1])))
    stub.cut = False
    stub.next_word.set()
    calls = []  # before the question twice, then with each piece: " ", "2 ", ...
    samples = batch(film, CHOSEN[:1])
    pieces, found = streamed(made().stream(samples, given_up=lambda row: calls.append(row) or len(calls) > 3))
    assert pieces == [["2"]] and found["prediction"] == ["2"]
    assert made().answer(batch(film, CHOSEN[:1]))["prediction"] == ["2 33 28 29"], "half an answer is not kept"


def test_a_question_is_answered_where_there_is_no_torch(stub, film, capsys):
    script = "import sys\nsys.modules['torch'] = None\nimport lavis_lstp\n"
    script += "found = lavis_lstp.select(sys.argv[1], 'what?', 4, 'uniform')\n"
    script += "print(found.answer('served-1', 'Q: {question}', endpoint={'image_size': 64}, max_new_tokens=7))"
    done = subprocess.run([sys.executable, "-c", script, film], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == " ".join(str(i % 38) for i in (37, 112, 187, 262)), done.stderr
    (request,) = stub.seen
    assert request["messages"][-1]["content"][-1]["text"] == "Q: what?" and request["max_completion_tokens"] == 7
    told = request["media_io_kwargs"]["video"]
    seconds = [i / told["fps"] for i in told["frames_indices"]]
    assert seconds == pytest.approx([i / 30 for i in (37, 112, 187, 262)], abs=6e-4)
    words = ["select", str(film), "what?", "-k", "4", "--method", "uniform", "--answer-by", "served-1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.rstrip().endswith("\n37 36 35 34")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda m, s: m.answer(s, num_beams=2), "an endpoint has no beams"),
        (lambda m, s: m.answer(s, no_repeat_ngram_size=2), "no_repeat_ngram_size is not one that an endpoint"),
        (lambda m, s: m.score_options({**s, "options": [["a", "b"]]}), "run.choose=generate"),
        (lambda m, s: m({**s, "text_output": ["x"]}), "nothing learns behind an endpoint"),
        (lambda m, s: m.backbone.add_lora(r=2), "has no weights here"),
    ],
)
def test_what_an_endpoint_cannot_do_is_said(stub, film, work, said):
    model = made()
    with pytest.raises(ConfigError, match=said):
        work(model, batch(film, CHOSEN[:1]))
    assert not stub.seen


def test_the_key_is_in_the_environment_alone(stub, film, monkeypatch):
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        made().answer(batch(film, CHOSEN[:1]))
    with pytest.raises(ConfigError, match="expected the model as the server calls it"):
        build_answerer("endpoint", {"weights": None, "endpoint": {"frames": "video", "image_size": 8, "cache": None}})
    with pytest.raises(ConfigError, match="model.backbone.endpoint is for source endpoint"):
        build_answerer("transformers", {"weights": "x", "endpoint": {"frames": "images"}})


def config(film: Path, folder: Path, **model) -> Path:
    rows = [
        {"question_id": f"q{i}", "video": film.name, "question": f"what is in part {i}?", "answer": "x"}
        for i in range(3)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    info = {"annotations": {"test": {"storage": str(folder / "rows.json")}}, "videos": {"storage": str(film.parent)}}
    run = {"task": "video_qa", "runner": "runner_lstp", "evaluate": True, "device": "cpu", "test_splits": ["test"]}
    whole = {
        "model": {"arch": "lstp_video_llm", "model_type": "endpoint", "backbone": {"weights": "served-1"}, **model},
        "datasets": {"lstp_video_qa": {"num_frames": 8, "image_size": 64, "build_info": info}},
        "run": {**run, "output_dir": str(folder / "out"), "batch_size_eval": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    return folder / "config.yaml"


def test_evaluating_needs_no_weights_and_goes_on_from_the_cache(stub, film, tmp_path, capsys):
    path = config(film, tmp_path)
    preview = ["estimate", "--cfg-path", str(path), "--price-in", "1", "--price-out", "2"]
    assert cli.main(preview) == 0 and not stub.seen
    printed = capsys.readouterr().out
    assert "3 questions with 24 frames" in printed and "tokens in" in printed and "at these prices" in printed
    auto = ["num_selected=auto", "most_selected=5", "name=topk"]
    assert cli.main([*preview, "--options", *(f"model.selector.{one}" for one in auto)]) == 0
    assert "3 questions with 15 frames" in capsys.readouterr().out
    assert evaluate.main(["--cfg-path", str(path)]) == 0
    rows = list(read_jsonl(tmp_path / "out" / "result" / "test_video_qa.jsonl"))
    shown = uniform_centres(8, 300)
    assert [row["prediction"] for row in rows] == [" ".join(str(i % 38) for i in shown)] * 3
    assert rows[0]["log_prob"]["sum"] is None and len(stub.seen) == 3
    assert evaluate.main(["--cfg-path", str(path), "--options", "run.output_dir=" + str(tmp_path / "again")]) == 0
    assert len(stub.seen) == 3
    again = (tmp_path / "again" / "result" / "test_video_qa.jsonl").read_bytes()
    assert again == (tmp_path / "out" / "result" / "test_video_qa.jsonl").read_bytes()
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not any(SECRET.encode() in path.read_bytes() for path in written)


def test_ask_answers_over_an_endpoint(stub, film, tmp_path, capsys):
    words = ["ask", str(film), "what?", "--model", "lstp_video_llm", "--model-type", "endpoint", "--num-frames", "4"]
    words += ["--options", "model.backbone.weights=served-1", "model.selector.num_selected=4"]
    words += ["--json", "--picture", str(tmp_path / "picture.png")]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] == " ".join(str(i % 38) for i in (37, 112, 187, 262))
