"""The temporal sampler: equal to the published one, blind to padding, trainable, and clear about bad sizes."""

import json

import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.weights.reading import convert_published, load_strict
from lavis_lstp.models.where.temporal_sampler import (
    MODES,
    TemporalSampler,
    boundary_loss,
    boundary_targets,
    likeliest_span,
    sinusoid_table,
    span_loss,
)

CONFIG = json.loads((GOLDEN / "temporal_encoder.json").read_text())
IO = load_file(GOLDEN / "temporal_encoder_io.safetensors")
LENGTHS = CONFIG["lens"]
FLOW_MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
TINY = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_positions": 24,
    "fusion_layer": 1,
    "text_width": 20,
    "flow_size": 32,
}


def published(**extra) -> TemporalSampler:
    """The golden weights in our class."""
    c = CONFIG["bert_config"]
    model = TemporalSampler(
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        intermediate_size=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        fusion_layer=c["fusion_layer"],
        text_width=c["encoder_width"],
        **extra,
    )
    weights = load_file(GOLDEN / "temporal_encoder_weights.safetensors")
    load_strict(model, convert_published({key.removeprefix("sd."): value for key, value in weights.items()}))
    return model.eval()


@pytest.fixture(scope="module")
def flow() -> torch.Tensor:
    i = torch.arange(3 * 7 * 2 * 224 * 224, dtype=torch.float64)
    flow = torch.sin(0.0137 * i + 0.4).float().view(3, 7, 2, 224, 224)
    return flow * FLOW_MASK[..., None, None, None]


@pytest.fixture(scope="module")
def model() -> TemporalSampler:
    return published()


def batch(lengths=(9, 4, 1), tokens=(6, 3, 5), size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    text_mask = (torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]).long()
    flow = torch.randn(len(lengths), max(lengths), 2, size, size, generator=g) * mask[..., None, None, None]
    return flow, mask, torch.randint(0, 50, text_mask.shape, generator=g), text_mask


def scaled(model: TemporalSampler) -> TemporalSampler:
    """Weights large enough that a wrong sign or a wrong mask shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


# ---- equal to the published code ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("fold", "tolerance"), [(False, 1e-5), (True, 3e-5)])
def test_golden_modes(model, flow, mode, fold, tolerance):
    sampler = published(fold_flow=True) if fold else model
    out = sampler(flow, FLOW_MASK, IO["in.question_ids"], IO["in.question_mask"], mode=mode)
    logits = torch.stack([out.start_logits, out.end_logits], dim=-1)
    torch.testing.assert_close(out.hidden_states, IO[f"out.{mode}.sequence"], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(logits, IO[f"out.{mode}.logits"], atol=tolerance, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fusion", "multi_modal"])
def test_golden_sinusoid(flow, mode):
    sampler, fresh = published(), TemporalSampler(**{**TINY, "hidden_size": 16, "max_positions": 128})
    assert torch.equal(fresh.flow_rotary, IO["table.sinusoid_128x8"])
    sampler.flow_rotary.copy_(fresh.flow_rotary)
    sampler.text_rotary.copy_(fresh.text_rotary)
    out = sampler(flow, FLOW_MASK, IO["in.question_ids"], IO["in.question_mask"], mode=mode)
    logits = torch.stack([out.start_logits, out.end_logits], dim=-1)
    torch.testing.assert_close(out.hidden_states, IO[f"out_sinus.{mode}.sequence"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, IO[f"out_sinus.{mode}.logits"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_golden_embedding_stages(model, flow):
    embedded, mask = model.flow_embedding(flow, FLOW_MASK)
    torch.testing.assert_close(embedded, IO["out.temporal_embeddings"], atol=1e-5, rtol=1e-5)
    assert torch.equal(mask.long(), IO["in.of_mask"])
    text = model.text_embedding(IO["in.question_ids"])
    torch.testing.assert_close(text, IO["out.text_embeddings"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CONFIG["mrc"], ids=lambda c: f"{c['mode']}-{c['starts']}-{c['ends']}")
def test_golden_span_loss(case):
    start_logits, end_logits = IO[f"out.{case['mode']}.logits"].unbind(-1)
    starts, ends = torch.tensor(case["starts"]), torch.tensor(case["ends"])
    loss = boundary_loss(start_logits, end_logits, starts, ends, FLOW_MASK, mask_padding=False)
    expected = case["mrc_loss"]
    assert loss.item() == pytest.approx(0.0 if expected != expected else expected, abs=1e-5)
    assert torch.equal(loss, boundary_loss(start_logits, end_logits, starts, ends))


# ---- span loss ------------------------------------------------------------------------------------------------


def test_all_ignored_gives_zero_and_zero_gradient():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = span_loss(logits, logits, torch.tensor([[-1, -1], [3, 3]]), torch.ones(2, 5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 5))


def test_targets_are_inclusive_classes():
    start, end = boundary_targets(torch.tensor([[0, 7], [2, 3], [-1, -1], [4, 4], [5, 2]]), num_flows=7)
    assert start.tolist() == [0, 2, 7, 7, 7]
    assert end.tolist() == [6, 2, 7, 7, 7]


def test_padded_flows_are_masked_by_default():
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    logits = torch.zeros(1, 5)
    span = torch.tensor([[0, 2]])
    assert span_loss(logits, logits, span, mask).item() == pytest.approx(torch.tensor(3.0).log().item())
    published = span_loss(logits, logits, span, mask, mask_padding=False)
    assert published.item() == pytest.approx(torch.tensor(5.0).log().item())
    # a target among padding teaches nothing
    assert span_loss(logits, logits, torch.tensor([[3, 5]]), mask).item() == 0
    far = logits.clone().index_fill_(1, torch.tensor([3, 4]), 1e4).requires_grad_()
    loss = span_loss(far, far, span, mask)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    assert torch.equal(far.grad[:, 3:], torch.zeros(1, 2))


@given(st.integers(1, 6), st.integers(1, 12), st.data())
@settings(max_examples=50)
def test_span_loss_is_the_mean_negative_log_likelihood(rows, length, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    start_logits, end_logits = torch.randn(2, rows, length, generator=g)
    counts = [data.draw(st.integers(1, length)) for _ in range(rows)]
    spans = []
    for count in counts:
        start = data.draw(st.integers(0, count - 1))
        spans.append((start, data.draw(st.integers(start + 1, count))))
    mask = torch.arange(length) < torch.tensor(counts)[:, None]
    expected = 0.0
    for row, (start, end) in enumerate(spans):
        real = slice(0, counts[row])
        expected -= start_logits[row, real].log_softmax(0)[start] + end_logits[row, real].log_softmax(0)[end - 1]
    loss = span_loss(start_logits, end_logits, torch.tensor(spans), mask)
    assert loss.item() == pytest.approx(expected.item() / (2 * rows), abs=1e-5)


# ---- structure ------------------------------------------------------------------------------------------------


def test_signature_of_the_full_size():
    with torch.device("meta"):
        full = TemporalSampler()
    out_positions = {"flow_rotary": [512, 64], "text_rotary": [512, 64]}
    for name, shape in out_positions.items():
        assert list(full.state_dict()[name].shape) == shape
    assert all(name not in dict(full.named_parameters()) for name in out_positions), "rotary tables are frozen"
    # 123.9 M as published, less the unused position table (512 x 768) and the tables that are buffers here
    parameters = sum(p.numel() for p in full.parameters())
    assert parameters == 123_932_615 - 512 * 768 - 2 * 512 * 64


@torch.no_grad()
@pytest.mark.parametrize("fold", [False, True])
def test_output_shapes_and_other_flow_sizes(fold):
    flow, mask, ids, text_mask = batch()
    out = TemporalSampler(**TINY, fold_flow=fold).eval()(flow, mask, ids, text_mask)
    assert out.hidden_states.shape == (3, 11, 32)
    assert out.start_logits.shape == out.end_logits.shape == (3, 9)


@torch.no_grad()
def test_folding_changes_nothing_but_rounding():
    plain = scaled(TemporalSampler(**TINY)).double().eval()
    folded = TemporalSampler(**TINY, fold_flow=True).double().eval()
    folded.load_state_dict(plain.state_dict())
    flow, mask, ids, text_mask = batch()
    a, b = (m(flow.double(), mask, ids, text_mask, mode="multi_modal").start_logits for m in (plain, folded))
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode):
    model = scaled(TemporalSampler(**TINY)).eval()
    flow, mask, ids, text_mask = batch()
    together = model(flow, mask, ids, text_mask, mode=mode)
    garbage = flow + (1 - mask)[..., None, None, None] * 7.0
    other_ids = torch.where(text_mask.bool(), ids, (ids + 1) % 50)
    noisy = model(garbage, mask, other_ids, text_mask, mode=mode)
    for row in range(3):
        n, s = int(mask[row].sum()), int(text_mask[row].sum())
        alone = model(flow[row : row + 1, :n], mask[row : row + 1, :n], ids[row : row + 1, :s], None
                      if mode in ("vision", "text") else text_mask[row : row + 1, :s], mode=mode)  # fmt: skip
        for a, b, c in zip(
            (alone.start_logits, alone.end_logits),
            (together.start_logits, together.end_logits),
            (noisy.start_logits, noisy.end_logits),
            strict=True,
        ):
            torch.testing.assert_close(b[row, :n], a[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(c[row, :n], a[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_question_and_order_of_flow_matter():
    model = scaled(TemporalSampler(**TINY)).eval()
    flow, mask, ids, text_mask = batch(lengths=(9, 9), tokens=(6, 6))
    base = model(flow, mask, ids, text_mask).start_logits
    assert not torch.allclose(base, model(flow, mask, (ids + 1) % 50, text_mask).start_logits, atol=1e-3)
    assert not torch.allclose(base.flip(1), model(flow.flip(1), mask, ids, text_mask).start_logits, atol=1e-3)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]  # keys are rotated by text position
    assert not torch.allclose(base, model(flow, mask, swapped, text_mask).start_logits, atol=1e-5)


@torch.no_grad()
def test_empty_question_and_empty_video_stay_finite():
    model = scaled(TemporalSampler(**TINY)).eval()
    flow, mask, ids, text_mask = batch()
    out = model(flow, torch.zeros_like(mask), ids, torch.zeros_like(text_mask), mode="multi_modal")
    assert out.hidden_states.isfinite().all()


@torch.no_grad()
def test_eos_follows_the_last_real_flow():
    model = TemporalSampler(**TINY).eval()
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert model.flow_embedding(torch.zeros(3, 4, 2, 32, 32), mask)[1].long().tolist() == [
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]


# ---- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fusion", "multi_modal", "vision"])
def test_gradient_reaches_what_the_mode_uses_and_nothing_else(mode):
    model = scaled(TemporalSampler(**TINY))
    out = model(*batch(), mode=mode)
    span_loss(out.start_logits, out.end_logits, torch.tensor([[1, 5], [0, 2], [0, 1]]), batch()[1]).backward()
    used = model.mode_layers(mode)
    has_text = any(model.layers[i].cross_attention is not None for i in used)
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition(".")
        expected = int(rest.split(".")[0]) in used if part == "layers" else part != "text_embedding" or has_text
        got = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        # no bias of a key, of pooling or of the head can change a softmax or a difference of logits: their gradients
        # are rounding alone, which may be exactly 0 in one torch and not in another
        if not name.endswith("key.bias") and name not in ("flow_embedding.pool.bias", "head.bias"):
            assert got == expected, name


def test_dropout_in_training_only():
    model = TemporalSampler(**TINY, dropout=0.5)
    args = batch()
    assert not torch.equal(model(*args).start_logits, model(*args).start_logits)
    model.eval()
    assert torch.equal(model(*args).start_logits, model(*args).start_logits)


def test_learns_to_find_the_moving_part():
    torch.manual_seed(0)
    model = TemporalSampler(**{**TINY, "num_layers": 2}, dropout=0.0, fold_flow=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def sample(rows):
        start = torch.randint(0, 8, (rows,))
        end = start + torch.randint(2, 5, (rows,))
        inside = (torch.arange(12) >= start[:, None]) & (torch.arange(12) < end[:, None])
        flow = torch.zeros(rows, 12, 2, 32, 32)
        flow[:, :, 0] = inside[..., None, None].float()
        ones = torch.ones(rows, 12)
        return (flow, ones, torch.ones(rows, 2).long(), torch.ones(rows, 2)), torch.stack([start, end], dim=1)

    for _ in range(120):
        args, span = sample(32)
        out = model(*args)
        loss = span_loss(out.start_logits, out.end_logits, span, args[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    args, span = sample(64)
    with torch.no_grad():
        out = model.eval()(*args)
    found = torch.stack([out.start_logits.argmax(1), out.end_logits.argmax(1) + 1], dim=1)
    assert (found == span).all(dim=1).float().mean() > 0.9


@torch.no_grad()
def test_flow_is_scaled_and_the_cameras_motion_subtracted():
    plain = scaled(TemporalSampler(**TINY)).double().eval()
    flow, mask, *text = batch()
    flow = flow.double()
    panned = flow + torch.randn(3, 9, 2, 1, 1, dtype=torch.float64)

    def logits(flow, **settings):
        sampler = TemporalSampler(**TINY, **settings).double().eval()
        sampler.load_state_dict(plain.state_dict())
        return sampler(flow, mask, *text, mode="multi_modal").start_logits

    torch.testing.assert_close(logits(flow, flow_scale=3), logits(3 * flow), atol=1e-10, rtol=0)
    assert not torch.allclose(logits(panned), logits(flow), atol=1e-3)
    still = logits(flow, subtract_camera=True)
    torch.testing.assert_close(logits(panned, subtract_camera=True), still, atol=1e-10, rtol=0)
    assert not torch.allclose(still, logits(flow), atol=1e-3)


def test_bfloat16_autocast():
    model = TemporalSampler(**TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*batch(), mode="multi_modal")
        loss = span_loss(out.start_logits, out.end_logits, torch.tensor([[1, 5], [0, 2], [0, 1]]), batch()[1])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    with torch.no_grad():
        half = model.to(torch.bfloat16).eval()(*batch(), mode="multi_modal")
    assert half.start_logits.dtype == torch.bfloat16 and half.start_logits.isfinite().all()


def test_init():
    torch.manual_seed(0)
    sizes = {**TINY, "hidden_size": 64, "vocab_size": 500, "flow_size": 224}
    model = TemporalSampler(**sizes)
    normal = TemporalSampler(**sizes, rotary_init="normal")
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert 0 < parameter.abs().max() < 0.1, name
    assert torch.equal(model.text_rotary, sinusoid_table(24, 32))
    assert normal.text_rotary.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(normal.text_rotary, normal.flow_rotary)
    assert "text_rotary" in normal.state_dict() and "flow_rotary" in normal.state_dict()


# ---- errors a user can cause ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_init": "sinus"}, "unknown rotary_init .* did you mean 'sinusoid'"),
        ({"hidden_size": 33}, "hidden_size 33 must be a multiple"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple"),
        ({"flow_size": 100}, "flow_size is 100"),
        ({"fusion_layer": 4}, "fusion_layer is 4; expected 0..3"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ConfigError, match=message):
        TemporalSampler(**{**TINY, **change})


def test_bad_calls():
    model = TemporalSampler(**TINY)
    flow, mask, ids, text_mask = batch()
    with pytest.raises(ConfigError, match="unknown sampler mode 'fussion'; did you mean 'fusion'"):
        model(flow, mask, ids, text_mask, mode="fussion")
    with pytest.raises(ConfigError, match=r"expects flow of shape \[B,L,2,32,32\].*got \[3, 9, 2, 16, 32\]"):
        model(flow[..., :16, :], mask, ids, text_mask)
    with pytest.raises(ConfigError, match="23 flows need 25 positions, the sampler has 24"):
        model(torch.zeros(1, 23, 2, 32, 32), torch.ones(1, 23), ids[:1], text_mask[:1])
    with pytest.raises(ConfigError, match="30 text tokens, the sampler has 24 positions"):
        model(flow, mask, torch.zeros(3, 30).long(), torch.ones(3, 30))


def test_a_row_counts_as_much_as_its_weight_and_the_mean_stays_one_over_rows():
    start, end = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    spans = torch.tensor([[1, 3], [0, 6], [4, 5]])
    alone = [span_loss(start[i : i + 1], end[i : i + 1], spans[i : i + 1]).item() for i in range(3)]
    found = span_loss(start, end, spans, weight=torch.tensor([1.0, 0.5, 0.0])).item()
    assert found == pytest.approx((alone[0] + 0.5 * alone[1]) / 3)
    assert torch.equal(span_loss(start, end, spans, weight=torch.ones(3)), span_loss(start, end, spans))


def test_of_several_spans_the_likeliest_is_learned_and_no_end_of_another_one():
    spans = torch.tensor([[[0, 2], [5, 7]], [[0, 2], [5, 7]], [[3, 4], [-1, -1]], [[-1, -1], [-1, -1]]])
    start, end = torch.zeros(4, 8), torch.zeros(4, 8)
    start[1, 5] = 1.0
    start[2, 0] = 9.0
    chosen = likeliest_span(start, end, spans)
    assert chosen.tolist() == [[0, 2], [5, 7], [3, 4], [-1, -1]]  # of equal ones the first
    start.requires_grad_(True)
    learned = likeliest_span(start, end, spans[1:2].expand(4, -1, -1))
    span_loss(start, end, learned).backward()
    assert start.grad[1].argmin() == 5 and start.grad[1, 0] > 0  # towards one moment, away from the other's start
    one = torch.tensor([[3, 5], [0, 2]])
    assert torch.equal(likeliest_span(start[:2], end[:2], one[:, None]), one)  # one moment stays as it is
    assert likeliest_span(torch.zeros(1, 0), torch.zeros(1, 0), spans[:1]).tolist() == [[0, 2]]  # a batch of texts
