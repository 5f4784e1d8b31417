"""Frame selection: the published table, and what every selector promises."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_lstp.config.model import SELECTORS
from lavis_lstp.data.frame_numbers import sample_indices
from lavis_lstp.errors import AnnotationError, ConfigError
from lavis_lstp.models.where import selectors
from lavis_lstp.models.where.chooser import frame_scores, window_starts
from lavis_lstp.models.where.frame_selector import (
    best_spans,
    build_selector,
    candidate_frames,
    joined,
    published_grid,
    sample_generators,
    spread,
)
from lavis_lstp.models.where.selectors import select_from_scores
from lavis_lstp.models.where.temporal_sampler import SamplerOutput

CASES = json.loads((GOLDEN / "frame_selection.json").read_text())["cases"]
IDS = ("q1", "q2", "q3", "q4")


def logits(rows: int, length: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, generator=g), torch.randn(rows, length, generator=g)


def mask_of(*lengths: int, width: int | None = None) -> torch.Tensor:
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def select_frames(candidates, num_frames: int, num_selected: int, num_flows: int) -> list[int]:
    """The published selection, of which the selectors take the two parts one after the other."""
    return spread(candidate_frames(candidates, num_frames, num_flows), num_selected)


@pytest.mark.parametrize("variant", ["sf_eval", "eval_blip2"])
@pytest.mark.parametrize("make", [int, torch.tensor])
def test_equals_published(variant, make):
    crashed = 0
    for case in CASES:
        n, k, v = case["num_frames"], case["nframe"], case["of_length"]
        candidates = [(make(s), make(e)) for s, e in zip(case["cand_start"], case["cand_end"], strict=True)]
        frames = select_frames(candidates, n, k, v)
        if isinstance(case[variant], str):  # one flow: the whole video
            crashed += 1
            assert v == 1 and frames == spread(range(n), k)
        else:
            assert frames == case[variant], case
    assert crashed == 20


@given(
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 130)), max_size=3),
    st.integers(1, 130),
    st.integers(1, 12),
    st.integers(0, 130),
)
def test_select_frames_always_gives_k_sorted_valid_indices(candidates, num_frames, num_selected, num_flows):
    frames = select_frames(candidates, num_frames, num_selected, num_flows)
    assert len(frames) == num_selected
    assert frames == sorted(frames)
    assert all(type(f) is int and 0 <= f < num_frames for f in frames)


@pytest.mark.parametrize(("end", "num_frames"), [(24, 32), (8951, 30_001), (5369, 50_001)])
def test_flows_map_to_frames_in_float32(end, num_frames):
    """As published, with 0-dim tensors; float64 or whole numbers would keep 8951 of 30001."""
    mapped = int(torch.tensor(end) * (num_frames - 1) / (num_frames - 1))
    assert (mapped == end) == (num_frames == 32)
    assert candidate_frames([(0, end)], num_frames, num_frames) == list(range(mapped))


def test_spread():
    assert spread([5], 3) == [5, 5, 5]
    assert spread([0, 1, 2], 4) == [0, 0, 1, 2]
    assert spread(range(10, 26), 4) == [11, 15, 19, 23]


@given(st.integers(1, 5), st.integers(1, 20), st.data())
@settings(max_examples=60)
def test_best_span_is_the_best_of_all(rows, length, data):
    counts = [data.draw(st.integers(0, length)) for _ in range(rows)]
    # few distinct values, so that ties occur
    value = st.lists(st.integers(-2, 2), min_size=length, max_size=length)
    start, end = (torch.tensor([data.draw(value) for _ in range(rows)]).float() for _ in range(2))
    spans = best_spans(start, end, torch.arange(length) < torch.tensor(counts)[:, None]).tolist()
    for row, count in enumerate(counts):
        scores = {(s, e + 1): start[row, s] + end[row, e] for e in range(count) for s in range(e + 1)}
        if not scores:
            assert spans[row] == [0, 0]
            continue
        best = max(scores.values())
        ties = [span for span, score in scores.items() if score == best]
        assert tuple(spans[row]) == min(ties, key=lambda span: (span[1], span[0]))


@given(st.sampled_from(sorted(SELECTORS)), st.integers(1, 9), st.integers(0, 3), st.data())
@settings(max_examples=80)
def test_every_selector_gives_sorted_frames_inside_its_span(name, num_selected, context, data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    mask = mask_of(*lengths, width=20)
    num_selected = max(num_selected, *lengths) if name == "recorded" else num_selected
    spans = []
    for n in lengths:
        start = data.draw(st.integers(0, max(0, n - 1)))
        spans.append((start, data.draw(st.integers(start + 1, max(start + 1, n)))))
    selector = build_selector(name, num_selected=num_selected, context=context)
    given, draws = logits(len(lengths), 20), sample_generators(IDS[: len(lengths)])
    more = {"figure": given[1].abs(), "features": [np.eye(n, 8) for n in lengths]}
    found = selector(mask, *given, torch.tensor(spans), draws, scores=given[0], **more)
    assert found.frame_index.shape == (len(lengths), num_selected)
    assert found.frame_index.dtype == found.span.dtype == torch.long
    for index, (start, end), n in zip(found.frame_index.tolist(), found.span.tolist(), lengths, strict=True):
        if not n:
            assert index == [-1] * num_selected and (start, end) == (0, 0)
            continue
        assert 0 <= start < end <= n
        if name == "recorded":  # all of them, each once
            assert index == [*range(n), *[-1] * (num_selected - n)]
            index = index[:n]
        assert index == sorted(index)
        assert all(start <= i < end for i in index)


def test_rules_over_scores_choose_as_the_library_does():
    """And what they choose is independent of the other rows; settings are the rule's own."""
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(3))
    mask = mask_of(40, 30, width=40)
    for name, own in (("aks", {"depth": 2}), ("inverse_transform", {"power": 2.0}), ("topk", {}), ("aks", {})):
        found = build_selector(name, num_selected=6, settings=own)(mask, scores=scores)
        if name == "aks":  # of 6 frames a leaf of depth 2 gives 6 // 4, one of depth 5 none
            assert found.num_filled.tolist() == ([2, 2] if own else [6, 6])
        for row, count in enumerate((40, 30)):
            wanted = select_from_scores(scores[row, :count].tolist(), 6, name, **own)
            assert found.frame_index[row].tolist() == wanted
    with pytest.raises(ConfigError, match="selector 'aks' has no setting 'dept'"):
        build_selector("aks", settings={"dept": 1})
    with pytest.raises(ConfigError, match="selector 'uniform' has none"):
        build_selector("uniform", settings={"power": 1.0})


def test_bit_cost_chooses_where_the_encoder_spent_most():
    cost = torch.ones(1, 40)
    cost[0, 20:24] = 1000.0
    found = build_selector("bitcost", num_selected=4)(mask_of(40), figure=cost)
    assert set(found.frame_index[0].tolist()) <= set(range(20, 24))
    assert found.num_filled.tolist() == [1]  # one was named twice
    assert build_selector("bitcost", settings={"power": 2.0}).settings == {"power": 2.0}
    with pytest.raises(ValueError, match="selector 'bitcost' needs bit_cost"):
        build_selector("bitcost")(mask_of(40))


def test_topk_takes_the_best_scores():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.9, 0.2, 0.2], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    found = build_selector("topk", num_selected=3)(mask_of(6, 2, width=6), scores=scores)
    assert found.frame_index.tolist() == [[1, 3, 4], [0, 0, 1]] and found.span.tolist() == [[1, 5], [0, 2]]
    with pytest.raises(ValueError, match="'topk' needs scores"):
        build_selector("topk")(mask_of(6, 2, width=6))


def test_a_frame_scores_by_the_probability_that_the_span_covers_it():
    start, end = torch.full((3, 6), -20.0), torch.full((3, 6), -20.0)
    start[0, 1] = end[0, 3] = start[1, 0] = end[1, 1] = 20
    mask = mask_of(6, 3, 0, width=6)
    found = frame_scores(SamplerOutput(None, start, end), mask, mask)
    assert torch.allclose(found, torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0.0] * 6]), atol=1e-5)
    half = torch.zeros(1, 4)
    even = frame_scores(SamplerOutput(None, half, half), mask_of(4, width=4), mask_of(4, width=4))[0]
    assert even.tolist() == pytest.approx([1 / 4, 3 / 8, 3 / 8, 1 / 4])
    stretched = frame_scores(SamplerOutput(None, start[:1, :3], end[:1, :3]), mask_of(3, width=3), mask[:1])
    assert stretched.shape == (1, 6) and stretched[0, :2].max() < 1e-6 < stretched[0, 5]


def test_best_span_picks_the_peaks_and_ignores_padding():
    start, end = torch.zeros(2, 20), torch.zeros(2, 20)
    start[0, 4], end[0, 11] = 5, 5
    start[1, 15], end[1, 18] = 9, 9  # padding
    start[1, 2], end[1, 2] = 5, 5
    found = build_selector("best_span")(mask_of(20, 10), start, end)
    assert found.span.tolist() == [[4, 12], [2, 3]]
    assert found.frame_index.tolist() == [[4, 6, 8, 10], [2, 2, 2, 2]]
    wider = build_selector("lstp", context=1)(mask_of(20, 10), start, end)
    assert wider.span.tolist() == [[3, 13], [1, 4]]


def test_end_before_start_is_no_span():
    start, end = torch.zeros(1, 10), torch.zeros(1, 10)
    start[0, 8], end[0, 1], end[0, 9] = 5, 6, 2
    assert build_selector("best_span")(mask_of(10), start, end).span.tolist() == [[8, 10]]
    # the published rule reaches for both peaks, finds nothing between them and takes the whole video
    assert build_selector("argmax")(mask_of(10), start, end).span.tolist() == [[0, 10]]


def test_argmax_follows_the_published_rules():
    start, end = torch.zeros(1, 16), torch.zeros(1, 16)
    start[0, 3], end[0, 11] = 5, 5
    found = build_selector("argmax")(mask_of(16), start, end)
    assert found.frame_index[0].tolist() == select_frames([(3, 11)], 16, 4, 16)
    assert found.span.tolist() == [[3, 11]]  # the end flow is not part of it, as published


def test_gumbel_follows_the_published_distribution():
    start = torch.tensor([[1.0, 0.0, 0.5, -9.0, -9.0, -9.0]])
    end = torch.tensor([[-9.0, -9.0, -9.0, 0.4, 0.0, 1.0]])
    selector, counts = build_selector("gumbel", num_selected=1), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    trials = 2000
    for _ in range(trials):
        found = selector(mask_of(6), start, end, generators=generator)
        counts[found.span[0, 0]] += 1
    # first frame of the union of two draws: the earlier start; P(first) = 1 - (1 - p)^2, with p from softmax(logits):
    # the temperature scales logits and noise alike and does not change the arg max
    p = start[0].softmax(0)
    assert counts[0].item() / trials == pytest.approx((1 - (1 - p[0]) ** 2).item(), abs=0.04)


def test_random_frames_differ_by_question_and_not_by_batch():
    selector = build_selector("random")
    together = selector(mask_of(30, 30, 30, 30), generators=sample_generators(IDS)).frame_index
    alone = [selector(mask_of(30), generators=sample_generators([i])).frame_index[0].tolist() for i in IDS]
    assert together.tolist() == alone
    assert len({tuple(row) for row in alone}) == 4
    assert all(len(set(row)) == 4 for row in alone), "drawn without replacement"
    other = selector(mask_of(30, 30, 30, 30), generators=sample_generators(IDS, seed=1)).frame_index
    assert other.tolist() != alone
    counts = torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        counts[selector(mask_of(8), generators=generator).frame_index[0]] += 1
    assert counts.min() > 430 and counts.max() < 570  # 500 each


def test_uniform_and_given():
    mask = mask_of(16, 8)
    assert build_selector("uniform")(mask).frame_index.tolist() == [[1, 5, 9, 13], [0, 2, 4, 6]]
    given_spans = torch.tensor([[8, 16], [7, 8]])
    found = build_selector("given", span_key="gold_span")(mask, span=given_spans)
    assert found.frame_index.tolist() == [[8, 10, 12, 14], [7, 7, 7, 7]]
    assert torch.equal(found.span, given_spans)


@pytest.mark.parametrize("span", [(-1, -1), (3, 3), (9, 12), (5, 2)])
def test_given_without_a_span_is_an_error(span):
    with pytest.raises(AnnotationError, match=rf"row 1 of the batch has \[{span[0]}, {span[1]}\) in 'gold_span'"):
        selector = build_selector("given", span_key="gold_span")
        selector(mask_of(16, 8), span=torch.tensor([[0, 4], span]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "uniformm"}, "unknown selector .*did you mean 'uniform'"),
        ({"name": "given", "span_key": "gold"}, "did you mean 'gold_span'"),
        ({"num_selected": 0}, "num_selected is 0"),
        ({"num_selected": "4"}, "num_selected is '4'"),
        ({"context": -1}, "context is -1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_selector(**arguments)


@pytest.mark.parametrize(("name", "needed"), [("lstp", "start_logits"), ("random", "generators"), ("given", "span")])
def test_missing_arguments(name, needed):
    with pytest.raises(ValueError, match=f"'{name}' needs {needed}"):
        build_selector(name)(mask_of(4))


def test_few_frames_are_kept_where_asked():
    mask = torch.ones(2, 8, dtype=torch.long)
    span = torch.tensor([[2, 4], [1, 8]])
    kept = build_selector("given", few_frames="keep")(mask, span=span)
    assert kept.frame_index.tolist() == [[2, 3, -1, -1], [1, 2, 4, 6]]
    assert kept.span.tolist() == span.tolist()
    doubled = build_selector("given")(mask, span=span)
    assert doubled.frame_index.tolist() == [[2, 2, 3, 3], [1, 2, 4, 6]]


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_the_grid_is_that_of_the_published_evaluation(num_flows, grid, data):
    """Candidates in flows -> frames of the grid by float32 division -> K of them -> places among all frames."""
    start, end = data.draw(st.integers(0, num_flows - 1)), data.draw(st.integers(0, num_flows - 1))
    places = published_grid(num_flows, grid)
    peaks = torch.zeros(2, 1, num_flows)
    peaks[0, 0, start], peaks[1, 0, end] = 1.0, 1.0
    mask = torch.ones(1, num_flows, dtype=torch.long)
    for mapping in ("ends", "ratio"):
        found = build_selector("argmax", grid=grid, mapping=mapping)(mask, *peaks).frame_index[0].tolist()
        s, e = (0, num_flows - 1) if start == end == 0 else (start, end)
        x = torch.tensor([s, e], dtype=torch.float32)
        on_grid = x * (grid - 1) / (num_flows - 1) if mapping == "ends" else x / num_flows * grid
        first, last = (int(value) for value in on_grid)
        inside = list(range(first, last)) or list(range(grid))
        assert found == [places[inside[i]] for i in sample_indices(4, len(inside))]


@pytest.mark.parametrize(
    ("peak", "frames"),
    [  # by hand, N = 32: V = 34, flow x -> frame int(x / 34 * 32)
        ((0, 31), range(29)),
        ((16, 31), range(15, 29)),
        ((0, 0), range(31)),  # the whole video: flow 33, of which there are 32
        ((20, 10), range(32)),  # none inside: all
    ],
)
def test_flows_are_counted_with_their_marks_as_in_the_published_video_recipes(peak, frames):
    peaks = torch.zeros(2, 1, 32)
    peaks[0, 0, peak[0]], peaks[1, 0, peak[1]] = 1.0, 1.0
    selector = build_selector("argmax", mapping="ratio", marks=2)
    found = selector(torch.ones(1, 32, dtype=torch.long), *peaks).frame_index[0].tolist()
    assert found == [frames[i] for i in sample_indices(4, len(frames))]


def test_the_grid_takes_the_second_frame_of_each_interval():
    assert published_grid(64, 32) == list(range(1, 64, 2))
    assert published_grid(32, 32) == list(range(32))
    assert published_grid(16, 32) == [i // 2 for i in range(32)]
    assert published_grid(3, 4) == [0, 1, 2, 2]  # 0 0 1 1 2 2 in intervals that begin at 0, 1, 3, 4
    assert published_grid(100, 32)[:5] == [1, 4, 7, 10, 13] and published_grid(100, 32)[-1] == 97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lstp", "grid": 32}, "belong to argmax and gumbel"),
        ({"name": "uniform", "mapping": "ratio"}, "belong to argmax and gumbel"),
        ({"name": "argmax", "mapping": "ration"}, "did you mean 'ratio'"),
        ({"name": "lstp", "marks": 2}, "belong to argmax and gumbel"),
        ({"name": "argmax", "marks": -1}, "marks is -1; expected a whole number of at least 0"),
        ({"name": "argmax", "grid": 0}, "whole number of at least 1"),
        ({"few_frames": "drop"}, "unknown model.selector.few_frames 'drop'"),
    ],
)
def test_bad_published_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_selector(**arguments)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_several_spans_have_the_largest_sum_of_evidence(length, most, seed):
    """Against every set of spans without a common frame; one span is the best span."""
    start, end = (2 * x[0].double() for x in logits(1, length, seed))
    found = selectors.best_spans(start, end, most)
    gain = [(x.log_softmax(0) + torch.tensor(length).log()).tolist() for x in (start, end)]
    spans = [(a, b) for a in range(length) for b in range(a + 1, length + 1)]

    def evidence(chosen):
        return sum(gain[0][a] + gain[1][b - 1] for a, b in chosen)

    sets = [(span,) for span in spans]
    best = max(map(evidence, sets))
    for _ in range(most - 1):
        sets = [(*one, span) for one in sets for span in spans if span[0] >= one[-1][1]]
        best = max([best, *map(evidence, sets)])
    assert evidence(found) == pytest.approx(best)
    assert 1 <= len(found) <= most
    assert [evidence([span]) for span in found] == sorted((evidence([span]) for span in found), reverse=True)
    ordered = sorted(found)
    assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))
    if most == 1:
        assert list(found[0]) == best_spans(start[None], end[None], mask_of(length)).tolist()[0]


def test_frames_are_spread_over_all_spans_and_do_not_depend_on_the_batch():
    start, end = torch.zeros(2, 40), torch.zeros(2, 40)
    start[0, [4, 30]], end[0, [7, 33]] = torch.tensor([8.0, 7.0]), torch.tensor([8.0, 7.0])
    start[1, 2], end[1, 5] = 8.0, 8.0
    mask = mask_of(40, 20)
    selector = build_selector("lstp", num_selected=4, max_spans=3)
    both = selector(mask, start, end)
    assert both.spans == [[(4, 8), (30, 34)], [(2, 6)]]
    assert both.span.tolist() == [[4, 8], [2, 6]]
    assert both.frame_index.tolist() == [[4, 6, 30, 32], [2, 3, 4, 5]]
    alone = selector(mask[1:, :20], start[1:, :20], end[1:, :20])
    assert alone.spans == both.spans[1:] and alone.frame_index.tolist() == both.frame_index.tolist()[1:]
    wide = build_selector("lstp", num_selected=4, max_spans=3, context=12)(mask, start, end)
    assert wide.spans[0] == [(0, 40)], "spans that meet are one"
    assert build_selector("lstp")(mask, start, end).spans is None
    with pytest.raises(ConfigError, match="max_spans belongs to best_span"):
        build_selector("topk", max_spans=2)


def test_spans_that_touch_are_joined_under_the_better_rank():
    assert joined([(10, 12), (0, 3), (12, 15), (20, 21)]) == [(10, 15), (0, 3), (20, 21)]
    assert joined([(0, 2), (4, 6), (1, 5)]) == [(0, 6)]


@given(st.integers(0, 200), st.integers(2, 40), st.integers(0, 39))
def test_windows_cover_every_flow(length, window, overlap):
    overlap = min(overlap, window - 1)
    starts = window_starts(length, window, overlap)
    covered = {t for start in starts for t in range(start, start + window)}
    assert covered >= set(range(length)) and starts[-1] == max(0, length - window)
    assert all(b - a <= window - overlap for a, b in zip(starts, starts[1:], strict=False))


def test_auto_shows_as_many_frames_as_the_scores_ask_for():
    selector = build_selector("topk", num_selected="auto", least_selected=2, most_selected=5, mass=0.8)
    mask = mask_of(10, 6, 4, width=10)
    scores = torch.zeros(3, 10)
    scores[0, 7] = 1.0  # one frame has it all
    scores[1, :6] = 1.0  # none stands out: 5 of 6 have 0.8
    scores[2, :4] = torch.tensor([0.1, 1.0, 1.0, 1.0])
    found = selector(mask, scores=scores)
    assert found.num_shown.tolist() == [2, 5, 3]
    assert [sum(i >= 0 for i in row) for row in found.frame_index.tolist()] == [2, 5, 3]
    assert 7 in found.frame_index[0].tolist() and found.frame_index[2].tolist() == [1, 2, 3, -1, -1]
    alone = selector(mask[2:, :4], scores=scores[2:, :4])
    assert alone.frame_index.tolist() == [[1, 2, 3]], "K is of the sample, not of its batch"
    none = selector(torch.zeros(2, 3).long(), scores=torch.zeros(2, 3))
    assert none.frame_index.tolist() == [[-1], [-1]] and none.num_shown.tolist() == [0, 0]


def test_auto_repeats_no_frame_of_a_short_span():
    start, end, scores = torch.zeros(1, 9), torch.zeros(1, 9), torch.ones(1, 9)
    start[0, 3], end[0, 4] = 9.0, 9.0
    selector = build_selector("lstp", num_selected="auto")
    assert selector(mask_of(9), start, end, scores=scores).frame_index.tolist() == [[3, 4]]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(1, 9), st.integers(0, 9))
def test_auto_takes_the_fewest_frames_that_reach_the_mass(scores, mass, least, more):
    count = selectors.num_for_mass(scores, mass, least, least + more)
    assert min(least, len(scores)) <= count <= min(least + more, len(scores))
    above = sorted((score - min(scores) for score in scores), reverse=True)
    if least < count < least + more and sum(above) > 0:
        assert sum(above[: count - 1]) - 1e-6 < mass * sum(above) < sum(above[:count]) + 1e-6
    assert (
        count == selectors.num_for_mass([score - 2 for score in scores], mass, least, least + more) or sum(above) < 1e-9
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "uniform", "num_selected": "auto"}, "auto needs scores, and 'uniform' asks for none"),
        ({"name": "lstp", "num_selected": "many"}, "num_selected is 'many'"),
        ({"name": "lstp", "num_selected": "auto", "least_selected": 9, "most_selected": 8}, "most_selected is 8"),
    ],
)
def test_an_adaptive_number_that_cannot_be_is_one_line(settings, said):
    with pytest.raises(ConfigError) as caught:
        build_selector(**settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)
