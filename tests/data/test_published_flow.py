"""Flow files of the published code: their own number of fields, from the file to spans, losses and frames."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from test_lstp import batch as frames_batch
from test_lstp import model_config
from video_files import numbered_video

from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.published_flow import read_published_flow
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.errors import ConfigError, LstpError, VideoError
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.where.frame_selector import build_selector, flows_to_frames
from lavis_lstp.models.where.temporal_sampler import spans_in_flows


def fields(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 12 and 5 frames, and flow of 3 and 70 fields."""
    root = tmp_path_factory.mktemp("published")
    for name, count, flows in (("a", 12, 3), ("b", 5, 70)):
        numbered_video(root / f"{name}.mp4", count, width=64, height=64)
        np.save(root / f"{name}_raft.npy", fields(flows))
    return root


def dataset(root, **settings) -> VideoQADataset:
    rows = [
        {"question_id": f"q{n}", "video_id": name, "video": f"{name}.mp4", "question": "what?", "answer": "red"}
        for n, name in enumerate("ab")
    ]
    settings = {"num_frames": 12, "image_size": 64, "flow": "precomputed", "flow_root": root, **settings}
    return VideoQADataset(rows, root, **settings)


def test_a_published_folder_is_read_with_its_own_number_of_fields(folder):
    data = dataset(folder)
    made = data.collater([data[0], data[1]])
    assert made["frames"].shape[:2] == (2, 12) and made["frame_mask"].sum(1).tolist() == [12, 5]
    assert made["flow"].shape == (2, 70, 2, 16, 16) and made["flow_mask"].sum(1).tolist() == [3, 70]
    assert (made["flow"][0, :3].numpy() == fields(3)).all() and not made["flow"][0, 3:].any()
    assert (made["flow"][1].numpy() == fields(70)).all()


def test_the_published_cut_to_64_is_one_key(folder):
    data = dataset(folder, max_flows=64)
    assert [len(data[i]["flow"]) for i in range(2)] == [3, 64]
    assert (data[1]["flow"].numpy() == fields(70)[uniform_centres(64, 70)]).all()
    assert data.fingerprint() != dataset(folder).fingerprint()
    for wrong, line in (({"max_flows": 0}, "max_flows must be a whole number of at least 1"), ({"flow": "none"}, "")):
        with pytest.raises(ConfigError, match=line or "max_flows is for flow: precomputed, flow is none"):
            dataset(folder, **{"max_flows": 64, **wrong})


def test_our_own_file_goes_before_a_published_one(folder, tmp_path):
    from lavis_lstp.commands.flow import write_flow

    write_flow(tmp_path / "b.safetensors", fields(5).astype(np.float16), {"version": "1", "num_frames": "5"})
    np.save(tmp_path / "b_raft.npy", fields(7))
    np.save(tmp_path / "a_raft.npy", fields(4))
    data = dataset(folder, flow_root=tmp_path)
    assert "flow_mask" not in data[1] and len(data[1]["flow"]) == 5
    made = data.collater([data[1], data[0]])  # one of each form in a batch
    assert made["flow_mask"].sum(1).tolist() == [5, 4] and made["flow"].shape[1] == 5


# ---- files that lie ------------------------------------------------------------------------------------------------


class Touches:
    def __reduce__(self):
        return (open, ("touched", "w"))


def hostile(folder):
    good = fields(3)
    np.save(folder / "good.npy", good)
    raw = (folder / "good.npy").read_bytes()
    np.save(folder / "objects.npy", np.array([Touches()], dtype=object), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(pickle.dumps(Touches()))
    (folder / "huge.npy").write_bytes(raw.replace(b"(3, 2, 16, 16)", b"(1<<50, 2, 9,)"))
    (folder / "large.npy").write_bytes(raw.replace(b"(3, 2, 16, 16), }   ", b"(3000000,2,999,999)}"))
    (folder / "negative.npy").write_bytes(raw.replace(b"(3, 2, 16, 16)", b"(-3,-2,16, 16)"))
    (folder / "cut.npy").write_bytes(raw[:-1])
    (folder / "longer.npy").write_bytes(raw + b"\0")
    (folder / "header.npy").write_bytes(raw[:40])
    (folder / "call.npy").write_bytes(raw.replace(b"'fortran_order': False", b"'fortran_order':open(1)"))
    (folder / "nested.npy").write_bytes(raw[:10] + b"(" * 110 + raw[120:])
    (folder / "version.npy").write_bytes(raw[:6] + b"\7\0" + raw[8:])
    (folder / "empty.npy").write_bytes(b"")
    np.savez(folder / "zip.npy.npz", flow=good)
    (folder / "zip.npy").write_bytes((folder / "zip.npy.npz").read_bytes())
    np.save(folder / "none.npy", good[:0])
    np.save(folder / "flat.npy", good[:, 0])
    np.save(folder / "planes.npy", np.concatenate([good, good], axis=1))
    np.save(folder / "double.npy", good.astype(np.float64))
    np.save(folder / "turned.npy", np.asfortranarray(good))
    good[1, 0, 3, 3] = np.nan
    np.save(folder / "nan.npy", good)
    return sorted(path for path in folder.glob("*.npy") if path.name != "good.npy")


def test_files_that_lie_are_one_line_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = hostile(tmp_path)
    assert len(paths) == 19
    for path in paths:
        with pytest.raises(VideoError) as caught:
            read_published_flow(path)
        line = str(caught.value)
        assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 500, path.name
    assert not (tmp_path / "touched").exists()
    with pytest.raises(VideoError, match="gone.npy: cannot be read"):
        read_published_flow(tmp_path / "gone.npy")


# ---- from flows to frames and back ---------------------------------------------------------------------------------


def test_frames_become_flows_as_recorded(golden):
    cases = json.loads((golden / "pseudo_span.json").read_text())["cases"]
    cases = [case for case in cases if isinstance(case["flow_span"], list) and case["span"][0] >= 0 and case["scores"]]
    cases = [case for case in cases if case["span"][1] >= case["span"][0]]
    assert len(cases) > 20
    for case in cases:
        span = torch.tensor([[case["span"][0], case["span"][1] + 1]])
        sizes = (torch.tensor([len(case["scores"])]), torch.tensor([case["of_length"]]))
        start, end = spans_in_flows(span, *sizes)[0].tolist()
        assert [start, end - 1] == case["flow_span"], case


def test_spans_without_a_moment_and_of_one_frame():
    span = torch.tensor([[-1, -1], [3, 3], [0, 1], [0, 8]])
    found = spans_in_flows(span, torch.tensor([8, 8, 1, 8]), torch.tensor([5, 5, 5, 1]))
    assert found.tolist() == [[-1, -1], [3, 3], [0, 5], [0, 1]]


def test_flows_become_frames_as_far_along():
    assert flows_to_frames((0, 5), 12, 5) == (0, 12) and flows_to_frames((4, 5), 12, 5) == (11, 12)
    assert flows_to_frames((1, 3), 12, 5) == (2, 6) and flows_to_frames((0, 1), 12, 1) == (0, 12)
    assert [flows_to_frames((a, b), 9, 9) for a in range(9) for b in range(a + 1, 10)] == [
        (a, b) for a in range(9) for b in range(a + 1, 10)
    ]


@pytest.mark.parametrize(("name", "expected"), [("best_span", [2, 6]), ("argmax", [2, 5]), ("gumbel", None)])
def test_selectors_map_flows_to_frames(name, expected):
    logits = torch.full((1, 7), -50.0)
    start, end = logits.clone(), logits.clone()
    start[0, 1], end[0, 2] = 50.0, 50.0
    start[0, 6] = end[0, 6] = 90.0  # padding
    masks = torch.ones(1, 12, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    selector = build_selector(name, num_selected=4)
    found = selector(masks[0], start, end, generators=torch.Generator().manual_seed(0), flow_mask=masks[1])
    assert found.span.tolist() == [expected or [2, 5]]
    assert set(found.frame_index[0].tolist()) <= set(range(*found.span[0].tolist()))


# ---- the model -----------------------------------------------------------------------------------------------------


def samples_with(flows: list[int], frames: list[int], seed: int = 0) -> dict:
    made = frames_batch(frames, seed)
    flow = torch.from_numpy(fields(len(flows) * max(flows), 32, seed)).view(len(flows), max(flows), 2, 32, 32)
    mask = (torch.arange(max(flows))[None] < torch.tensor(flows)[:, None]).long()
    return {**made, "flow": flow, "flow_mask": mask}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = model_config(flow={"name": "precomputed", "flow_size": None}, sampler={"flow_size": 32})
    config |= {"losses": ["lm", "span"], "train": ["sampler", "qformer"]}
    return LSTP.from_config(config).eval()


def test_flows_fewer_or_more_than_frames_train_and_answer_alike_in_any_batch(model):
    together = samples_with([5, 11, 3], [8, 4, 8])
    losses = model(together)
    assert torch.isfinite(losses["loss"]) and losses["span_loss"] > 0
    answers = model.answer(together)
    assert answers["start_logits"].shape == (3, 11)
    for row, (flows, frames) in enumerate(zip([5, 11, 3], [8, 4, 8], strict=True)):
        alone = {key: value[row : row + 1] for key, value in together.items()}
        alone |= {"flow": alone["flow"][:, :flows], "flow_mask": alone["flow_mask"][:, :flows]}
        alone |= {"frames": alone["frames"][:, :frames], "frame_mask": alone["frame_mask"][:, :frames]}
        found = model.answer(alone)
        torch.testing.assert_close(found["start_logits"][0], answers["start_logits"][row, :flows])
        assert found["frame_index"].tolist() == [answers["frame_index"][row].tolist()]
        assert found["prediction"] == answers["prediction"][row : row + 1]
        start, end = found["span"][0].tolist()
        assert 0 <= start < end <= frames


def test_a_picture_beside_videos_and_a_flow_without_its_mask(model):
    mixed = samples_with([5, 1], [8, 1])
    assert torch.isfinite(model(mixed)["loss"])
    del mixed["flow_mask"]
    with pytest.raises(LstpError, match=r"expected \[B,T\] = \[2, 8\] fields"):
        model.answer(mixed)


def test_a_given_span_of_a_question_without_a_moment_is_the_whole_video(model):
    made = {**samples_with([5, 5], [8, 8]), "span": torch.tensor([[1, 3], [-1, -1]])}
    selector, model.chooser.selector = model.selector, build_selector("given")
    try:
        assert model.chooser({**made, "no_moment": torch.tensor([0, 1])}).span.tolist() == [[1, 3], [0, 8]]
        with pytest.raises(LstpError, match="means that the sample brings none"):
            model.chooser(made)
    finally:
        model.chooser.selector = selector
