"""What a run trained as a folder of the hub's layout, and over the wire to a stand-in for the hub and back."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading

import pytest
import torch
from huggingface_hub import ModelCard, constants, file_download
from lavis.common.registry import registry
from safetensors.torch import load_file, save_file
from test_predictor import ASKED, CLIP, same

import lavis_lstp
from lavis_lstp import LSTP, TemporalSampler
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.models.weights import hub, sharing


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder whose checkpoint is the example's in two: a sampler run, and what began with it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    weights = load_file(EXAMPLE / "model.safetensors")
    manifest = json.loads((EXAMPLE / "manifest.json").read_text())
    manifest["config"]["model"] |= {"checkpoint": [str(folder / "first")]}
    manifest["config"]["run"] = {"seed": 17, "task": "video_qa", "output_dir": "/home/me/secret place"}
    manifest["config"]["datasets"]["lstp_shapes"] |= {"root": "/home/me/videos", "frames": "exact"}
    place = folder / "checkpoints" / "step_00000003"
    for path, mine in ((folder / "first", True), (place, False)):
        path.mkdir(parents=True)
        save_file({k: v for k, v in weights.items() if k.startswith("sampler.") == mine}, path / "model.safetensors")
    facts = {"bytes": (place / "model.safetensors").stat().st_size, "sha256": "0" * 64}
    (place / "manifest.json").write_text(json.dumps(manifest | {"files": {"model.safetensors": facts}}))
    (folder / "result").mkdir()
    counted = {"exact_match": 0.25, "num_scored": 4, "num_questions": 9, "partial": True, "agg_metrics": 0.25}
    (folder / "result" / "test_video_qa_metrics.json").write_text(json.dumps(counted))
    judged = {"accuracy": 0.75, "score": 3.5, "judges": {"gpt|x": 8}, "num_scored": 8, "num_questions": 8}
    (folder / "result" / "test_video_qa_judged_gpt.json").write_text(json.dumps(judged))
    return folder


def test_a_folder_for_the_hub_answers_as_the_run_and_names_no_place_of_this_machine(run, tmp_path):
    out = sharing.save_for_hub(run, tmp_path / "shared", license="mit")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "manifest.json", "model.safetensors"]
    with lavis_lstp.load(run) as before, lavis_lstp.load(out) as after:
        assert same(before.answer(CLIP, ASKED), after.answer(CLIP, ASKED)) and after.num_frames == 64
    written = (out / "README.md").read_text() + (out / "manifest.json").read_text()
    assert "/home/me" not in written and str(run) not in written
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "lavis_lstp"
    for said in (
        "seed 17",
        "`lstp_shapes`: num_frames 64",
        "| run, test_video_qa_metrics | exact_match | 0.2500 | 4 of 9, PARTIAL: not the score of the data set |",
        "| run, test_video_qa_judged_gpt | accuracy | 0.7500 | 8 of 8 | gpt\\|x |",
        "| `sampler` | ",
    ):
        assert said in card.text, said


def test_no_part_of_a_configuration_names_a_place_of_this_machine(tmp_path):
    places = {key: tmp_path / key for key in ("clip", "bert", "words", "raft.pth")}
    for place in places.values():
        place.mkdir()
    model = {
        "backbone": {"weights": "Salesforce/blip2-flan-t5-xl", "endpoint": {"cache": str(tmp_path / "answers")}},
        "sampler": {"weights": str(places["bert"]), "tokenizer": str(places["words"])},
        "scorer": {"weights": str(places["clip"])},
        "flow": {"weights": str(places["raft.pth"])},
    }
    shared = sharing._shared(model, {"datasets": {}, "run": {"output_dir": str(tmp_path)}}, False)
    assert str(tmp_path) not in json.dumps(shared)
    assert shared["model"]["scorer"] == {"weights": "clip"}
    assert shared["model"]["backbone"]["weights"] == "Salesforce/blip2-flan-t5-xl"


def test_the_sampler_alone_goes_in_front_of_another_model(run, tmp_path):
    out = sharing.save_for_hub(run, tmp_path / "sampler", license="mit", sampler_only=True)
    weights = load_file(out / "model.safetensors")
    assert weights and all(key.startswith("sampler.") for key in weights)
    with lavis_lstp.load(out) as loaded:
        state = loaded.model.state_dict()
        assert all(bool((state[key] == value).all()) for key, value in weights.items())
    with lavis_lstp.load("lstp_tiny", options=[f"model.checkpoint={out}", "model.backbone.seed=5"]) as other:
        assert bool((other.model.state_dict()[key := next(iter(weights))] == weights[key]).all())


def test_what_cannot_be_shared_is_one_line(run, tmp_path):
    with pytest.raises(ConfigError, match="name a license"):
        sharing.save_for_hub(run, tmp_path / "a", license=" ")
    with pytest.raises(WeightsError, match="no manifest of a run"):
        sharing.save_for_hub(run / "first", tmp_path / "a", license="mit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="exists already"):
        sharing.save_for_hub(run, tmp_path / "full", license="mit")
    assert not (tmp_path / "a").exists()
    with pytest.raises(WeightsError, match="no checkpoint at 'hf://me/lstp-x'"):
        lavis_lstp.load("hf://me/lstp-x")  # the tests are offline
    with pytest.raises(ConfigError, match="me/lstp-x: the hub cannot be reached"):
        lavis_lstp.push_to_hub(run, "me/lstp-x", license="mit")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as one upload and one download of small files need."""

    files: dict[str, bytes] = {}
    private: list[bool] = []
    commit = "a" * 40

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, value) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_of_the_test":
            return self.answer(b'{"error": "who are you?"}', 401, Content_Type="application/json")
        if self.path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            wanted = json.loads(raw)  # releases say it in different ways
            self.private.append(wanted.get("private") or wanted.get("visibility") == "private")
            return self.tell({"url": f"http://{self.headers['Host']}/me/lstp-x"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(raw)["files"]
            return self.tell({"files": [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        assert self.path == "/api/models/me/lstp-x/commit/main", self.path
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        where = f"http://{self.headers['Host']}/me/lstp-x/commit/{self.commit}"
        return self.tell({"success": True, "commitOid": self.commit, "commitUrl": where})

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/me/lstp-x/resolve/main/") and name in self.files:
            body = self.files[name]
            return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.commit)
        if self.path.startswith("/api/models/me/lstp-x"):
            return self.tell({"id": "me/lstp-x", "sha": self.commit, "siblings": []})
        return self.answer(status=200 if self.path == "/" else 404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def at_hub(tmp_path, monkeypatch):
    """The address of the stand-in, which huggingface_hub takes for the hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # the older hub takes the name from there
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "private", [])
    hub.hub_answers.cache_clear()
    yield url
    server.shutdown()
    server.server_close()
    hub.hub_answers.cache_clear()


def test_a_run_goes_to_the_hub_and_comes_back(run, at_hub):
    with pytest.raises(ConfigError, match="the hub does not take it"):
        lavis_lstp.push_to_hub(run, "me/lstp-x", license="mit", token="hf_of_nobody")
    found = lavis_lstp.push_to_hub(run, "me/lstp-x", license="mit", private=True, token="hf_of_the_test")
    assert found == f"{at_hub}/me/lstp-x/commit/{Hub.commit}" and Hub.private == [True]
    assert sorted(Hub.files) == ["README.md", "manifest.json", "model.safetensors"]
    with lavis_lstp.load(run) as before, lavis_lstp.load("hf://me/lstp-x") as after:
        assert same(before.answer(CLIP, ASKED), after.answer(CLIP, ASKED))


def equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("sampler_only", [False, True])
def test_a_model_goes_to_the_hub_as_it_is_now_and_comes_back(run, at_hub, sampler_only):
    model = LSTP.from_pretrained(run)  # a path
    with torch.no_grad():
        model.sampler.head.bias += 1  # learnt since the run
    how = {"license": "mit", "token": "hf_of_the_test", "sampler_only": sampler_only}
    assert model.push_to_hub("me/lstp-x", run=run, **how).endswith(Hub.commit)
    card = Hub.files["README.md"].decode()
    assert "license: mit" in card and "seed 17" in card and "num_frames 64" in card and "0.7500 | 8 of 8" in card
    assert equal(TemporalSampler.from_pretrained("me/lstp-x").state_dict(), model.sampler.state_dict())
    again = LSTP.from_pretrained("me/lstp-x")
    assert type(again).__name__ == "LstpTiny" and equal(again.sampler.state_dict(), model.sampler.state_dict())
    assert equal(again.state_dict(), model.state_dict()) is not sampler_only
    assert again.built_from["flow"]["name"] == "dis" and again.built_from["backbone"] == model.built_from["backbone"]


def test_a_sampler_alone_sees_flow_as_its_run_showed_it(run, tmp_path, caplog):
    where = tmp_path / "run" / "checkpoints" / "step_00000001"
    where.mkdir(parents=True)
    (where / "model.safetensors").write_bytes((run / "first" / "model.safetensors").read_bytes())
    manifest = json.loads((EXAMPLE / "manifest.json").read_text(encoding="utf-8"))
    for given, wanted in (({"flow_scale": 30, "subtract_camera": True}, (30, True)), ({}, (1.0, False))):
        manifest["config"]["model"]["sampler"] = given
        (where / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        sampler = TemporalSampler.from_pretrained(where)
        assert (sampler.flow_scale, sampler.subtract_camera) == wanted
        LSTP.from_pretrained(str(run)).load_checkpoint(str(where))
        said = "was trained with flow_scale=30, and this model has 1.0; set model.sampler.flow_scale=30"
        assert (said in caplog.text) is bool(given)
        caplog.clear()
    manifest["config"]["model"]["sampler"] = {"flow_scale": "${oc.env:HOME}"}
    (where / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match="flow_scale is a variable"):
        TemporalSampler.from_pretrained(str(where))


def test_a_card_tells_of_no_run_where_none_is_named(run, tmp_path):
    model = LSTP.from_pretrained(str(run))
    card = (sharing.save_for_hub(None, tmp_path / "out", license="mit", model=model) / "README.md").read_text()
    assert "No run is recorded." in card and "Nobody has evaluated" in card and str(run) not in card
    model.loaded_parts.add("lora")
    with pytest.raises(ConfigError, match="has no lora any more; share the run's folder"):
        sharing.save_for_hub(run, tmp_path / "other", license="mit", model=model)


def test_names_that_lead_to_no_model_are_one_line(run, tmp_path):
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip" / "model.safetensors").write_bytes((run / "first" / "model.safetensors").read_bytes())
    (tmp_path / "blip" / "manifest.json").write_text('{"config": {"model": {"arch": "blip2"}}}')
    for name, error, said in (
        ("defalt", ConfigError, "model_type 'defalt'.*did you mean 'default'"),
        ("me/lstp-y", WeightsError, "no checkpoint at 'hf://me/lstp-y'"),  # the tests are offline
        (str(tmp_path / "gone"), WeightsError, "no weights at"),
        (str(run / "first"), WeightsError, "no manifest of an LSTP"),
        (str(tmp_path / "blip"), WeightsError, "no manifest of an LSTP"),
    ):
        with pytest.raises(error, match=said) as caught:
            registry.get_model_class("lstp_tiny").from_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="has no weights of a temporal sampler"):
        TemporalSampler.from_pretrained(str(run))  # its checkpoint has all but that
    broken = load_file(run / "first" / "model.safetensors")
    broken.pop("sampler.head.bias")
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match="sampler's weights of .*head.bias"):
        TemporalSampler.from_pretrained(str(tmp_path / "broken.safetensors"))
