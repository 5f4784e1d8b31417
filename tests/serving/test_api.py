"""The API with the unmodified `openai` client, and by hand where a client would not send such things."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from serving_process import ANSWER, ASKED, CLIP, ROWS, WITHOUT, running
from video_files import numbered_video

openai = pytest.importorskip("openai", reason=WITHOUT)
httpx = pytest.importorskip("httpx", reason=WITHOUT)
pytest.importorskip("fastapi", reason=WITHOUT)

from lavis_lstp.serving.limits import Limits  # noqa: E402

URL = f"data:video/mp4;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
LONG = {"min_new_tokens": 300, "max_new_tokens": 300}


@pytest.fixture(scope="module")
def server(predictor, tmp_path_factory):
    with running(predictor, tmp_path_factory.mktemp("uploads")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(colour="red") -> str:
    stored = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(stored, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"


def about(part: dict, question: str = ASKED) -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


VIDEO = {"type": "video_url", "video_url": {"url": URL}}


# ---- the openai client ----------------------------------------------------------------------------------------------


def test_a_whole_answer_carries_its_evidence(client, predictor):
    made = client.chat.completions.create(model="any", messages=about(VIDEO))
    direct = predictor.answer(CLIP, ASKED)
    assert made.choices[0].message.content == ANSWER and made.choices[0].finish_reason == "stop"
    assert made.model == "lstp-example" and made.usage.completion_tokens == direct.log_prob["tokens"]
    lstp = made.lstp
    assert lstp["span_s"] == list(direct.span_s) and lstp["frame_index"] == direct.frame_index
    assert lstp["frame_times"] == direct.frame_times_s and lstp["scores"] == direct.scores and lstp["seconds"]


def test_a_streamed_answer_is_the_whole_one_in_pieces(client):
    settings = {"max_tokens": 12, "extra_body": {"min_new_tokens": 12}}
    whole = client.chat.completions.create(model="any", messages=about(VIDEO, "tell me"), **settings)
    stream = client.chat.completions.create(
        model="any", messages=about(VIDEO, "tell me"), stream=True, stream_options={"include_usage": True}, **settings
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 2 and "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].lstp["span_s"] == whole.lstp["span_s"]


@pytest.mark.parametrize(
    "messages",
    [
        about({"type": "video", "video": URL}),
        about({"type": "input_video", "input_video": {"data": URL.partition(",")[2], "format": "mp4"}}),
        about({"type": "file", "file": {"file_data": URL, "filename": "../../x.mp4"}}),
        about(VIDEO, f"<video>\n{ASKED}"),
        [{"role": "user", "content": [VIDEO]}, {"role": "user", "content": ASKED}],
        [{"role": "system", "content": ""}, *about(VIDEO)],
    ],
    ids=["qwen", "input_video", "file", "llava", "two messages", "system"],
)
def test_other_habits_of_messages_mean_the_same(client, messages):
    made = client.chat.completions.create(model="any", messages=messages)
    assert made.choices[0].message.content == ANSWER and made.lstp["span_s"] == pytest.approx([5.6, 7.0])


def test_pictures_and_texts(client):
    one = client.chat.completions.create(
        model="m", messages=about({"type": "image_url", "image_url": {"url": picture()}})
    )
    assert one.lstp["span_s"] is None and len(one.lstp["candidate_times"]) == 1
    several = [{"type": "image_url", "image_url": {"url": picture(colour)}} for colour in ("red", "green", "blue")]
    messages = [{"role": "user", "content": [*several, {"type": "text", "text": ASKED}]}]
    film = client.chat.completions.create(model="m", messages=messages)
    assert film.lstp["candidate_times"] == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-3) and film.lstp["span_s"]
    text = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert text.lstp["frame_index"] == [] and text.choices[0].message.content


def test_turns_settings_and_stops(client, predictor):
    turns = [*about(VIDEO, "one?"), {"role": "assistant", "content": "two"}, {"role": "user", "content": ASKED}]
    made = client.chat.completions.create(model="m", messages=turns, extra_body={"num_selected": 2})
    direct = predictor.answer(CLIP, ASKED, history=[("one?", "two")], num_selected=2)
    assert made.choices[0].message.content == direct.prediction and made.lstp["frame_index"] == direct.frame_index
    drawn = {"temperature": 2.0, "top_p": 0.9, "seed": 5, "max_tokens": 6}
    pair = [client.chat.completions.create(model="m", messages=about(VIDEO), **drawn) for _ in range(2)]
    assert pair[0].choices[0].message.content == pair[1].choices[0].message.content
    greedy = {"temperature": 0, "top_p": 0.9, "extra_body": {"top_k": 5}}
    same = client.chat.completions.create(model="m", messages=about(VIDEO), **greedy)
    assert same.choices[0].message.content == predictor.answer(CLIP, ASKED).prediction
    stopped = client.chat.completions.create(model="m", messages=about(VIDEO), stop=["ar", "x"])
    assert stopped.choices[0].message.content == "b"
    (text,) = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(model="m", messages=about(VIDEO), stop="ar", stream=True)
        if chunk.choices[0].delta.content
    ]
    assert text == "b"


def test_subtitles_are_a_text_and_never_the_name_of_a_file(client, predictor, tmp_path):
    text = "1\n00:00:00,000 --> 00:10:00,000\nsaid\n"
    made = client.chat.completions.create(model="m", messages=about(VIDEO), extra_body={"subtitles": text})
    direct = predictor.answer(CLIP, ASKED, subtitles=[(0, 600, "said")])
    assert made.choices[0].message.content == direct.prediction and made.lstp["subtitles"]["lines"] == 1
    whole = {"subtitles": "WEBVTT\n\n" + text[2:].replace(",", "."), "subtitles_window_s": "whole"}
    made = client.chat.completions.create(model="m", messages=about(VIDEO), extra_body=whole)
    assert made.lstp["subtitles"] == {"window_s": None, "lines": 1, "left_out": 0}
    (tmp_path / "s.srt").write_text(text, encoding="utf-8")
    for wrong in ("1\n00:00 - 00:01\n\n2\nx\n", '[{"text": "x"}]', str(tmp_path / "s.srt")):
        with pytest.raises(openai.BadRequestError, match="times"):
            client.chat.completions.create(model="m", messages=about(VIDEO), extra_body={"subtitles": wrong})


def test_files_are_uploaded_named_listed_and_deleted(client, server):
    with CLIP.open("rb") as file:
        stored = client.files.create(file=("..\x1b[31m/../evil.mp4", file), purpose="user_data")
    assert stored.bytes == CLIP.stat().st_size and "\x1b" not in stored.filename
    for part in (
        {"type": "file", "file": {"file_id": stored.id}},
        {"type": "video_url", "video_url": {"url": stored.id}},
        {"type": "input_video", "input_video": {"file_id": stored.id}},
    ):
        assert client.chat.completions.create(model="m", messages=about(part)).choices[0].message.content == ANSWER
    assert [one.id for one in client.files.list()] == [stored.id]
    assert client.files.retrieve(stored.id).filename == stored.filename
    client.files.delete(stored.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(stored.id)
    assert not list(server.files.folder.iterdir())


def test_models_health_and_metrics(client, server):
    assert [one.id for one in client.models.list()] == ["lstp-example"]
    assert client.models.retrieve("lstp-example").owned_by == "lavis_lstp"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/5")
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{server.url}/metrics").text
    assert (
        re.search(r'lstp_questions_total\{outcome="answered"\} [1-9]', metrics) and "lstp_batch_size_count" in metrics
    )


# ---- load -----------------------------------------------------------------------------------------------------------


def test_questions_that_are_there_together_share_a_batch_and_settings_stay_apart(client, predictor, monkeypatch):
    sizes, answer = [], predictor.answer_many
    gate = threading.Event()

    def slowly(asked):
        gate.wait(10)
        sizes.append((len(asked), len({one.settings.batch_key for one in asked})))
        return answer(asked)

    monkeypatch.setattr(predictor, "answer_many", slowly)

    def ask(number):
        settings = {"num_selected": 2} if number == 4 else {}
        row = ROWS[number % len(ROWS)]
        made = client.chat.completions.create(model="m", messages=about(VIDEO, row["question"]), extra_body=settings)
        return number == 4 or made.choices[0].message.content == row["answer"]

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask, 0)
        time.sleep(0.5)
        rest = [pool.submit(ask, number) for number in range(1, 9)]
        time.sleep(1)
        gate.set()
        assert first.result() and all(one.result() for one in rest)
    assert sorted(size for size, _ in sizes) == [1, 1, 7] and all(kinds == 1 for _, kinds in sizes)


def test_beyond_the_line_is_429_and_who_goes_away_frees_a_place(predictor, tmp_path, monkeypatch):
    gate, answer = threading.Event(), predictor.answer_many
    monkeypatch.setattr(predictor, "answer_many", lambda asked: gate.wait(20) and answer(asked))
    with running(predictor, tmp_path, limits=Limits(most_waiting=2)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
        impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=1.0)
        with ThreadPoolExecutor(3) as pool:
            stays = pool.submit(client.chat.completions.create, model="m", messages=about(VIDEO))
            leaves = pool.submit(impatient.chat.completions.create, model="m", messages=about(VIDEO))
            _until(lambda: len(server.line) == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(model="m", messages=about(VIDEO))
            assert int(refused.value.response.headers["retry-after"]) >= 1 and "2 questions wait" in str(refused.value)
            with pytest.raises(openai.APITimeoutError):
                leaves.result()
            _until(lambda: len(server.line) == 1)
            second = pool.submit(client.chat.completions.create, model="m", messages=about(VIDEO))
            _until(lambda: len(server.line) == 2)
            gate.set()
            assert stays.result().choices[0].message.content == second.result().choices[0].message.content == ANSWER
        assert len(server.line) == 0


def test_a_stream_that_is_left_ends_the_answer(client, server):
    stream = client.chat.completions.create(
        model="m", messages=about(VIDEO, "tell me"), stream=True, extra_body={"min_new_tokens": 4000}, max_tokens=4000
    )
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    _until(lambda: len(server.line) == 0, 5)
    started = time.monotonic()
    assert client.chat.completions.create(model="m", messages=about(VIDEO)).choices[0].message.content == ANSWER
    assert time.monotonic() - started < 10


def test_slow_videos_delay_no_question_about_a_kept_one(client, server, predictor, tmp_path, monkeypatch):
    client.chat.completions.create(model="m", messages=about(VIDEO))
    gate, decode = threading.Event(), predictor.reader._decode
    monkeypatch.setattr(predictor.reader, "_decode", lambda *a: gate.wait(20) and decode(*a))
    with ThreadPoolExecutor(10) as pool:
        try:
            other = base64.b64encode(numbered_video(tmp_path / "slow.mp4", 4).read_bytes()).decode()
            part = {"type": "input_video", "input_video": {"data": other}}
            slow = [pool.submit(client.chat.completions.create, model="m", messages=about(part)) for _ in range(10)]
            _until(lambda: len(server.line) == 10)
            made = client.chat.completions.create(model="m", messages=about(VIDEO), timeout=10)
            assert made.choices[0].message.content == ANSWER and not any(one.done() for one in slow)
        finally:
            gate.set()
        assert all(one.result().choices for one in slow)


def test_a_question_under_way_ends_with_a_clear_error_when_the_server_stops(predictor, tmp_path):
    with running(predictor, tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
        pool = ThreadPoolExecutor(1)
        told = pool.submit(
            client.chat.completions.create, model="m", messages=about(VIDEO, "tell me"), max_tokens=4000,
            extra_body={"min_new_tokens": 4000},
        )  # fmt: skip
        _until(lambda: len(server.line) == 1)
        import asyncio

        asyncio.run_coroutine_threadsafe(server.line.stop(), server.line._answering.get_loop()).result(20)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            told.result(20)


def _until(true, seconds=15):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
