"""What a server refuses: other people's files, other hosts, other pages, too much, and whatever is no request."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import os
import re
import threading
from urllib.parse import quote

import hypothesis
import psutil
import pytest
from hypothesis import strategies as st
from PIL import Image
from serving_process import WITHOUT, running, serving
from video_files import audio_file, numbered_video

import lavis_lstp
from lavis_lstp.commands import cli, serve
from lavis_lstp.errors import ConfigError, LstpError, VideoError
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.inference.settings import GENERATION, OWN

httpx = pytest.importorskip("httpx", reason=WITHOUT)
pytest.importorskip("fastapi", reason=WITHOUT)

from lavis_lstp.serving import media  # noqa: E402
from lavis_lstp.serving.files import FileStore, NoSuchFile, TooLarge  # noqa: E402
from lavis_lstp.serving.limits import Limits  # noqa: E402
from lavis_lstp.serving.protocol import IGNORED, NEUTRAL  # noqa: E402

CLIP = EXAMPLE / "clip.mp4"
SMALL = Limits(
    inline_bytes=200_000, upload_bytes=100_000, max_seconds=20, max_megapixels=0.5, most_files=3, keep_hours=1
)
CHAT, FILES = "/v1/chat/completions", "/v1/files"


@pytest.fixture(scope="module")
def predictor():
    limits = {"max_seconds": SMALL.max_seconds, "max_megapixels": SMALL.max_megapixels, "cache_bytes": 20 << 20}
    with lavis_lstp.load("example", **limits) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(predictor, tmp_path_factory):
    with running(predictor, tmp_path_factory.mktemp("uploads"), limits=SMALL) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as one:
        yield one


def data(content: bytes, kind="video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asking(url, **more) -> dict:
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": content}], **more}


def line_of(response) -> str:
    """The error of a refusal: one line, without a path of this machine."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    text = error["message"]
    assert text and "\n" not in text and "Traceback" not in text
    assert not any(place in text for place in ("/tmp", "/root", "/home", "/work", "site-packages", ".py")), text
    return text


# ---- media ----------------------------------------------------------------------------------------------------------

HLS = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"
DASH = b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>/etc/passwd</BaseURL></MPD>'


@pytest.mark.parametrize("content", [HLS, CONCAT, DASH, b"", b"text", b"%!PS-Adobe", b"\x89PNG\r\n\x1a\n" + b"\0" * 99])
@pytest.mark.parametrize("way", ["data", "upload"])
def test_playlists_and_what_is_no_video_are_refused_by_content(client, content, way):
    if way == "data":
        answer = client.post(CHAT, json=asking(data(content)))
    else:
        answer = client.post(FILES, files={"file": ("film.mp4", content, "video/mp4")}, data={"purpose": "vision"})
    assert answer.status_code == 400 and line_of(answer).startswith(("the video or picture: ", "the file: "))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "got 'file:...'"),
        ("/etc/passwd", "got '/etc/passwd"),
        ("http://127.0.0.1/x.mp4", "fetches no URLs"),
        ("HTTPS://example.org/x.mp4", "fetches no URLs"),
        ("concat:/etc/passwd|/etc/hosts", "got 'concat:...'"),
        ("subfile,,start,0,end,9,,:/etc/passwd", "got 'subfile"),
        ("file-" + "0" * 32, "no such file"),
        ("file-" + "0" * 31 + "/", "expected a data: URL"),
        ("data:video/mp4;base64", "data:video/mp4;base64,..."),
        ("data:video/mp4;base64,####", "not base64"),
    ],
)
def test_addresses_that_are_not_fetched_are_named(client, url, said):
    answer = client.post(CHAT, json=asking(url))
    assert answer.status_code in (400, 404) and said in answer.json()["error"]["message"]


def test_limits_of_bytes_length_and_size(client, tmp_path):
    assert client.post(CHAT, json=asking(data(b"\0" * 200_000))).status_code == 413
    chunks = (b"x" * 50_000 for _ in range(10))  # no Content-Length
    assert client.post(CHAT, content=chunks, headers={"content-type": "application/json"}).status_code == 413
    big = client.post(FILES, files={"file": ("a.mp4", CLIP.read_bytes() + b"\0" * 100_000)})
    assert big.status_code == 413 and "100000 bytes" in line_of(big)
    assert client.post(FILES, files={"file": ("a.mp4", b"\0" * 3_000_000)}).status_code == 413
    long = numbered_video(tmp_path / "long.mp4", 44, fps=2).read_bytes()
    for answer in (client.post(CHAT, json=asking(data(long))), client.post(FILES, files={"file": ("a", long)})):
        assert answer.status_code == 400 and "lasts 22.0 s" in line_of(answer)
    stored = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(stored, "PNG")
    for answer in (
        client.post(CHAT, json=asking(data(stored.getvalue(), "image/png"))),
        client.post(FILES, files={"file": ("a.png", stored.getvalue())}),
    ):
        assert answer.status_code == 400 and "2000 x 2000 px" in line_of(answer)
    audio = audio_file(tmp_path / "a.mp4").read_bytes()
    assert "no video stream" in line_of(client.post(FILES, files={"file": ("a.mp4", audio)}))


CLIP_URL = data(CLIP.read_bytes())
HALF = "\ud800"  # of a surrogate pair: JSON may bring it, and it has no bytes


@pytest.mark.parametrize(
    "body",
    [
        asking(HALF),
        asking(f"data:,{HALF}"),
        asking(CLIP_URL, **{HALF: 1}),
        asking(CLIP_URL, selector=HALF),
        {"messages": [{"role": HALF, "content": "x"}]},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"messages": [{"role": "user", "content": [{"type": HALF}]}]},
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(client, body):
    answer = client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and line_of(answer)


# ---- uploads --------------------------------------------------------------------------------------------------------


def test_a_store_keeps_to_number_owner_and_time(tmp_path):
    now = [1000.0]
    store = FileStore(tmp_path / "store", SMALL, now=lambda: now[0])

    def add(owner):
        with CLIP.open("rb") as file:
            return store.add(owner, file, filename="x\n\x1b[1m" * 99, purpose="vision")

    mine = [add("me") for _ in range(3)]
    with pytest.raises(ConfigError, match="3 files already"):
        add("me")
    theirs = add("they")
    assert {one.id for one in store.of("me")} == {one.id for one in mine} and "\x1b" not in mine[0].filename
    for wrong in (lambda: store.path("me", theirs.id), lambda: store.delete("me", theirs.id)):
        with pytest.raises(NoSuchFile):
            wrong()
    for name in ("../../etc/passwd", "file-../x", "", "file-" + "A" * 32, mine[0].id + "\n", f"{mine[0].id}/../x"):
        with pytest.raises(NoSuchFile):
            store.get("me", name)
    again = FileStore(tmp_path / "store", SMALL, now=lambda: now[0])  # a restart
    assert again.path("me", mine[1].id).read_bytes() == CLIP.read_bytes()
    with pytest.raises(TooLarge):
        again.add("new", io.BytesIO(b"\0" * 100_001), filename="x", purpose="vision")
    (tmp_path / "store" / f"{mine[1].id}.json").write_text("{")
    with pytest.raises(NoSuchFile):
        again.get("me", mine[1].id)
    now[0] += 3601
    with pytest.raises(NoSuchFile):
        again.get("me", mine[0].id)
    again.delete_old()
    assert [path.name for path in sorted(again.folder.glob("*.bin"))] == [f"{mine[1].id}.bin"]
    os.utime(again.folder / f"{mine[1].id}.bin", (0, 0))
    again.delete_old()
    assert not list(again.folder.glob("*.bin")) and again.folder.stat().st_mode & 0o077 == 0


def test_keys_part_clients_and_guard_every_endpoint(predictor, tmp_path):
    first, second = "first-key-of-16-chars", "second-key-of-16-char"
    with running(predictor, tmp_path, keys=[first, second]) as server:

        def ask(method, path, key=None, **how):
            headers = {"authorization": f"Bearer {key}".encode()} if key else {}
            return httpx.request(method, server.url + path, headers=headers, timeout=60, **how)

        for method, path in (
            ("POST", CHAT),
            ("GET", FILES),
            ("POST", FILES),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
        ):
            for wrong in (None, "x", first[:-1], "é"):
                how = {"json": asking("x")} if path == CHAT else {"files": {"file": b"x"}} if method == "POST" else {}
                answer = ask(method, path, wrong, **how)
                assert answer.status_code == 401 and "API key" in line_of(answer)
        assert httpx.get(f"{server.url}/health").status_code == 200
        stored = ask("POST", FILES, first, files={"file": ("x.mp4", CLIP.read_bytes())}).json()["id"]
        assert ask("GET", f"{FILES}/{stored}", second).status_code == 404
        assert ask("DELETE", f"{FILES}/{stored}", second).status_code == 404
        assert ask("POST", CHAT, second, json=asking(stored)).status_code == 404
        assert ask("GET", FILES, second).json()["data"] == []
        assert ask("POST", CHAT, first, json=asking(stored)).status_code == 200


def test_other_web_pages_cannot_ask(client, server):
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"}):
        for how in ({"json": asking("x")}, {"files": {"file": b"x"}}):
            path = CHAT if "json" in how else FILES
            assert client.post(path, headers=headers, **how).status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400  # DNS rebinding
    plain = client.post(CHAT, content=json.dumps(asking("x")), headers={"content-type": "text/plain"})
    assert plain.status_code == 400
    answer = client.get("/health", headers={"origin": server.url})
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    assert "server" not in answer.headers or "uvicorn" in answer.headers["server"]


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.fixture
def web():
    """A web server on this machine that redirects, answers and never ends."""
    clip = CLIP.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Host"])
            place = {"/to-self": "/clip", "/away": "http://evil.example/clip", "/file": "file:///etc/passwd"}
            place["/loop"] = "/loop"
            if self.path in place:
                self.send_response(302)
                self.send_header("Location", place[self.path])
                self.end_headers()
                return
            self.send_response(404 if self.path == "/gone" else 200)
            self.end_headers()
            self.wfile.write(clip if self.path == "/clip" else b"\0" * 300_000)

        def log_message(self, *_):
            pass

    seen: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def fetch(url, hosts, monkeypatch=None, addresses=None):
    if addresses is not None:

        async def resolved(host, port, name):
            return addresses[host]

        monkeypatch.setattr(media, "public_address", resolved)
    reader = media.MediaReader(None, hosts, SMALL)
    return asyncio.run(reader.read("me", url, "the video"))


def test_allowed_hosts_are_fetched_by_the_address_that_was_checked(web, monkeypatch):
    host, seen = web
    local = {"localhost": "127.0.0.1", "evil.example": "127.0.0.1"}
    for path in ("clip", "to-self"):
        assert fetch(f"http://{host}/{path}", [host], monkeypatch, local) == CLIP.read_bytes()
    assert set(seen) == {host}
    for path, said in (
        ("away", "host 'evil.example' is not one"),
        ("file", "not http"),
        ("loop", "redirected more than"),
        ("gone", "status 404"),
        ("endless", "more than the 200000 bytes"),
    ):
        with pytest.raises(LstpError, match=said):
            fetch(f"http://{host}/{path}", [host], monkeypatch, local)
    with pytest.raises(ConfigError, match="is not one that this server fetches from"):
        fetch(f"http://{host}/clip", ["localhost"], monkeypatch, local)  # another port
    with pytest.raises(ConfigError, match="is not one"):
        fetch(f"http://{host.replace('localhost', 'localhost.')}/clip", [host], monkeypatch, local)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:10.0.0.1]"]
)
def test_private_addresses_are_refused_even_of_allowed_hosts(host):
    with pytest.raises(ConfigError, match="not public"):
        fetch(f"http://{host}/clip", [host, host.strip("[]")])


def test_an_address_that_cannot_be_reached_is_one_line():
    with pytest.raises((VideoError, ConfigError), match="the video: "):
        fetch("http://no-such-host.invalid/clip", ["no-such-host.invalid"])
    with pytest.raises((VideoError, ConfigError), match="the video: "):
        fetch("http://[broken/clip", ["[broken"])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "LAVIS_LSTP_API_KEY"),
        (["--host", "::"], "LAVIS_LSTP_API_KEY"),
        (["--queue", "0"], "--queue"),
        (["--max-seconds", "nan"], "--max-seconds"),
        (["--checkpoint", "x"], "--checkpoint"),
        (["--num-frames", "0"], "--num-frames"),
    ],
)
def test_bad_words_are_one_line(capsys, monkeypatch, words, said):
    monkeypatch.delenv(serve.KEY, raising=False)
    assert cli.main(["serve", "--example", *words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and said in err


def test_a_short_key_is_refused_and_not_told(capsys, monkeypatch):
    monkeypatch.setenv(serve.KEY, "long-enough-to-be-a-key,secret")
    assert cli.main(["serve", "--example"]) == 2
    err = capsys.readouterr().err
    assert serve.KEY in err and "secret," not in err and "long-enough" not in err


# ---- hostile requests -----------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.sampled_from(
        ["\ud800", "\0", "../../etc/passwd", "<script>alert(1)</script>", "$(id)", "${HOME}", "%s%n", "x" * 9999]
    ),
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=9), v, max_size=4))
URLS = st.one_of(
    st.just(CLIP_URL),
    st.sampled_from(
        ["", "data:", "data:,", "data:video/mp4;base64,AAAA", "file:///etc/passwd", "http://[", CLIP_URL[:500]]
    ),
    st.binary(max_size=64).map(data),
    st.text(max_size=40),
)
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.one_of(st.text(max_size=40), VALUES)}),
    st.builds(lambda kind, url: {"type": kind, kind: {"url": url}}, st.sampled_from(["image_url", "video_url"]), URLS),
    st.builds(
        lambda kind, value: {"type": kind, kind: value}, st.sampled_from(["video", "input_video", "file"]), VALUES
    ),
    st.dictionaries(st.sampled_from(["type", "text", "video_url"]), VALUES, max_size=3),
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "user", "assistant", "system", "tool", "\0"]),
        "content": st.one_of(st.text(max_size=40), st.lists(PARTS, max_size=3), VALUES),
    }
)
FIELDS = (
    *OWN,
    *GENERATION,
    *NEUTRAL,
    *IGNORED,
    "stream",
    "max_tokens",
    "stop",
    "seed",
    "model",
    "nonsense",
    "__class__",
)
BODIES = st.builds(
    lambda messages, more: {"messages": messages, **more},
    st.one_of(st.lists(MESSAGES, min_size=1, max_size=3), VALUES),
    st.dictionaries(
        st.sampled_from(FIELDS),
        st.one_of(VALUES, st.integers(-2, 40), st.sampled_from(["lstp", "uniform", "given", 1e308, 0.5])),
        max_size=3,
    ),
)
REQUESTS = st.one_of(
    st.builds(lambda body: ("POST", CHAT, {"content": json.dumps(body).encode()}), BODIES),
    st.builds(lambda raw: ("POST", CHAT, {"content": raw}), st.binary(max_size=200)),
    st.just(("POST", CHAT, {"content": b"[" * 50_000})),
    st.builds(
        lambda name, raw, purpose: ("POST", FILES, {"files": {"file": (name, raw)}, "data": {"purpose": purpose}}),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace").decode()),
        st.one_of(st.binary(max_size=300), st.just(CLIP.read_bytes()), st.just(CLIP.read_bytes()[:9000])),
        st.text(st.characters(codec="utf-8"), max_size=80),
    ),
    st.builds(
        lambda method, where, name: (method, f"/v1/{where}/{name}", {}),
        st.sampled_from(["GET", "DELETE", "PUT", "POST"]),
        st.sampled_from(["files", "models"]),
        st.sampled_from(["..%2f..%2fetc%2fpasswd", "file-" + "0" * 32, "%00", "%ff", "x" * 3000, "a%0d%0ab", "..;/"]),
    ),
)


def of_document(client) -> tuple[list[tuple[str, str]], st.SearchStrategy]:
    """Every operation of the OpenAPI document, and requests to them with any value for any name that it knows."""
    document = client.get("/openapi.json").json()
    operations = [(method.upper(), path) for path, one in document["paths"].items() for method in one]
    properties = [one.get("properties", {}) for one in document["components"]["schemas"].values()]
    names = st.sampled_from(sorted({name for one in properties for name in one}))
    bodies = st.one_of(st.dictionaries(names, VALUES, max_size=5), VALUES).map(json.dumps).map(str.encode)
    values = st.text(st.characters(codec="utf-8"), max_size=20).map(lambda text: quote(text, safe=""))
    requests = st.builds(
        lambda call, value, body: (call[0], re.sub(r"{[^}]*}", value, call[1]), {"content": body}, call),
        st.sampled_from(operations),
        values,
        bodies,
    )
    return operations, requests


def send(client, request) -> int:
    """The status of a hostile request, which is never the server's fault."""
    method, path, how = request[:3]
    headers = {"content-type": "application/json"} if "content" in how else {}
    answer = client.request(method, path, headers=headers, **how)
    assert answer.status_code < 500, (answer.status_code, answer.text, request)
    if answer.status_code >= 400 and answer.headers["content-type"].startswith("application/json"):
        text = answer.json()["error"]["message"]
        assert "\n" not in text and len(text) < 600 and "Traceback" not in text
        assert not any(place in text for place in ("/tmp/", "/root/", "site-packages")), text
    if answer.status_code == 200 and path == FILES and method == "POST":
        client.delete(f"{FILES}/{answer.json()['id']}")
    return answer.status_code


def hostile(client, count: int, size=lambda: 0) -> list[int]:
    """Sends `count` requests to every endpoint, none of which may give a 500; `size()` after each."""
    statuses, sizes, reached = [], [], set()
    operations, documented = of_document(client)

    @hypothesis.settings(
        max_examples=count // 2,
        derandomize=count < 1000,  # so few may miss an endpoint; many are others each time
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    def each(request):
        statuses.append(send(client, request))
        reached.update(request[3:])
        sizes.append(size())

    for requests in (REQUESTS, documented):
        hypothesis.given(requests)(each)()
    assert {200, 400} <= set(statuses) and len(statuses) >= count * 0.9
    assert reached == set(operations)
    return sizes


def test_hostile_requests_are_the_clients_fault(client, server):
    hostile(client, 240)
    assert len(server.line) == 0


@pytest.mark.slow
def test_ten_thousand_hostile_requests_leave_the_memory_flat(tmp_path):
    """Threads, the allocator's pools and the cache fill up in the first 2,000; the others take less than 40 MB more."""
    limits = ["--cache-mb", "20", "--max-upload-mb", "0.1", "--max-megapixels", "0.5", "--max-seconds", "20"]
    with serving(tmp_path, *limits, "--no-page") as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        measured = []

        def size():
            measured.append(psutil.Process(process.pid).memory_info().rss)
            if len(measured) % 1000 == 0:
                print(f"{len(measured)} requests: {measured[-1] / 2**20:.0f} MB", flush=True)
            return measured[-1]

        sizes = hostile(client, 10_000, size)
    grown = (max(sizes[-1000:]) - max(sizes[1000:2000])) / 2**20
    assert grown < 40, f"{grown:.0f} MB more after {len(sizes)} requests"
