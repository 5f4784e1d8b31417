"""The net that scores time: optical flow and a question -> how likely each flow starts or ends the moment asked for.

In: flow [B,L,2,S,S] and question tokens. Out: start and end logits [B,L]. It is a post-LN BERT over one vector per
flow field with rotary positions; from layer `fusion_layer` on it also attends to the question's word embeddings.
Source: LSTP, arXiv 2402.16050 (there `RopeBertModel`), equal to it within 1e-5. Two things differ by decision: fresh
models get real sinusoid tables where the published code's were overwritten by noise, and padded flows are masked
in the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lstp.config.fields import checked
from lavis_lstp.config.model import Sampler
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.weights.hub import as_checkpoint
from lavis_lstp.models.weights.reading import load_as_ours, load_strict
from lavis_lstp.models.weights.recorded import recorded_run
from lavis_lstp.models.weights.shapes import Shapes, count, layers_of, most
from lavis_lstp.untrusted import recorded

MODES = ("fusion", "multi_modal", "vision", "text")
ROTARY_INITS = ("sinusoid", "normal")
SHOWN = ("flow_scale", "subtract_camera")
"""Settings that change what a trained sampler sees; its weights do not tell them."""
PATCH = 16
"""Side of a flow patch in px."""
_INIT_STD = 0.02
_BERT_EPS = 1e-12
_SELF_MASK = -10000.0


class SamplerOutput(NamedTuple):
    """hidden_states [B,L+2,H] (bos, flows, eos or padding); start_logits, end_logits [B,L], padded flows included.

    A tuple, because the hooks of ZeRO-3 look for tensors in tuples and dicts alone.
    """

    hidden_states: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


def sinusoid_table(positions: int, width: int) -> Tensor:
    """Rotary table [positions, width]: sin(p / 10000^(2j/width)) in the first half, cos of the same in the second."""
    j = torch.arange(width // 2, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * j / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs (x_2j, x_2j+1) of x [B,heads,S,d] by the angles in the first S rows of table [P,d]."""
    sin, cos = table[: x.shape[2]].to(x.dtype).chunk(2, dim=-1)  # [S,d/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class FlowEmbedding(nn.Module):
    """Flow -> [bos, flow_1..flow_L, 0] with `eos` behind the last real flow, positions added, normalised.

    Args:
        flow_size: side of the flow in px; the patch grid, and so a weight's shape, depends on it.
        fold: see `flow_vectors`.
    """

    def __init__(self, hidden_size: int, max_positions: int, flow_size: int, dropout: float, fold: bool):
        super().__init__()
        self.fold = fold
        self.grid = flow_size // PATCH
        self.patch = nn.Conv2d(2, hidden_size, kernel_size=PATCH, stride=PATCH)
        self.pool = nn.Linear(self.grid**2, 1)
        self.bos = nn.Parameter(torch.empty(hidden_size))
        self.eos = nn.Parameter(torch.empty(hidden_size))
        self.position = nn.Embedding(max_positions, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.dropout = nn.Dropout(dropout)

    def flow_vectors(self, flow: Tensor) -> Tensor:
        """One vector per flow field: [B,L,2,S,S] -> [B,L,H].

        Published order: patch convolution, then a weighted sum over the n*n patches, one weight per patch for all
        channels. Both are linear, so `fold` takes the sum first, over raw pixels, and applies the patch matrix once
        instead of n*n times.
        """
        batch, length = flow.shape[:2]
        if not self.fold:
            patches = self.patch(flow.flatten(0, 1)).flatten(2)  # [B*L,H,n*n]
            return self.pool(patches).view(batch, length, -1)
        pixels = flow.unflatten(-1, (self.grid, PATCH)).unflatten(-3, (self.grid, PATCH))  # [B,L,2,n,16,n,16]
        mean_patch = torch.einsum("blcyixj,yx->blcij", pixels, self.pool.weight.view(self.grid, self.grid))
        vectors = F.linear(mean_patch.reshape(batch, length, -1), self.patch.weight.flatten(1))
        return vectors + self.patch.bias * self.pool.weight.sum() + self.pool.bias

    def forward(self, flow: Tensor, flow_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B,L,2,S,S], [B,L] -> embeddings [B,L+2,H] and their mask [B,L+2], bool."""
        batch, length = flow_mask.shape
        vectors = self.flow_vectors(flow)
        zero = torch.zeros_like(vectors[:, :1])
        sequence = torch.cat([zero + self.bos, vectors, zero], dim=1)
        places = torch.arange(length + 2, device=flow_mask.device)
        real = flow_mask.bool()
        # behind the last real flow; a mask with holes (never made here) must not lose a real flow to eos
        eos_place = (real * places[1:-1]).amax(dim=1, keepdim=True) + 1 if length else places.new_ones(batch, 1)
        is_eos = places == eos_place  # [B,L+2]
        sequence = torch.where(is_eos[..., None], self.eos.to(sequence.dtype), sequence)
        edge = real.new_zeros(batch, 1)
        mask = torch.cat([~edge, real, edge], dim=1) | is_eos
        sequence = sequence + self.position.weight[: length + 2]
        return self.dropout(self.norm(sequence)), mask


class TextEmbedding(nn.Module):
    """Word plus token-type-0 embeddings, normalised: [B,S] -> [B,S,text_width]. No positions: the keys are rotated."""

    def __init__(self, vocab_size: int, width: int, dropout: float):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=_BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(input_ids) + self.token_type.weight[0]))


class Attention(nn.Module):
    """Multi-head attention with rotated queries and keys, then projection, residual and LayerNorm."""

    def __init__(self, hidden_size: int, num_heads: int, source_width: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(source_width, hidden_size)
        self.value = nn.Linear(source_width, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=_BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B,heads,S,d]

    def forward(self, x: Tensor, source: Tensor, bias: Tensor, table: Tensor, source_table: Tensor) -> Tensor:
        """x [B,S,H] attends to source [B,S2,W]; bias [B,1,1,S2] is added to the scores."""
        key = rotate(self._heads(self.key(source)), source_table)
        # Scaling the keys, not the scores, keeps half precision in range, and its rounding is nearer to the golden
        # numbers (4e-6 instead of 1.1e-5, which is also how far those are from float64).
        attended = F.scaled_dot_product_attention(
            rotate(self._heads(self.query(x)), table),
            key / math.sqrt(key.shape[-1]),
            self._heads(self.value(source)),
            attn_mask=bias.to(x.dtype),
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=1.0,
        )
        return self.norm(x + self.dropout(self.output(attended.transpose(1, 2).flatten(2))))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=_BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B,S,H] -> [B,S,H]."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class SamplerLayer(nn.Module):
    """Self-attention, cross-attention to the text where `text_width` is given, feed-forward; post-LN."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, text_width: int | None, dropout: float
    ):
        super().__init__()
        self.self_attention = Attention(hidden_size, num_heads, hidden_size, dropout)
        self.cross_attention = Attention(hidden_size, num_heads, text_width, dropout) if text_width else None
        self.feed_forward = FeedForward(hidden_size, intermediate_size, dropout)


def sizes_in(shapes: Shapes) -> dict[str, int]:
    """Arguments of `TemporalSampler` for weights of these shapes; of BERT's alone, those that it fixes."""
    layers = layers_of(shapes, r"layers\.(\d+)\.")
    crossed = layers_of(shapes, r"layers\.(\d+)\.cross_attention\.")
    sizes = {
        "num_layers": count(layers),
        "hidden_size": most(shapes, (r"(layers|flow_embedding)\..*norm\.weight$", 0), ("head.weight", 1)),
        "intermediate_size": most(shapes, (r"feed_forward\.up\.", 0), (r"feed_forward\.down\.weight", 1)),
        "vocab_size": most(shapes, ("text_embedding.word", 0)),
        "text_width": most(shapes, (r"text_embedding\.(word|token_type)", 1), (r"text_embedding\.norm", 0)),
        "max_positions": most(shapes, ("flow_embedding.position", 0), ("_rotary", 0)),
        "fusion_layer": crossed[0] if crossed else None,
    }
    if pooled := most(shapes, ("flow_embedding.pool.weight", 1)):
        sizes["flow_size"] = PATCH * math.isqrt(pooled)
    hidden = sizes["hidden_size"] or 0
    tables = {name: shape for name, shape in shapes.items() if len(shape) == 2 and shape[1] in range(2, hidden + 1, 2)}
    width = most(tables, ("_rotary", 1))
    if width and hidden % width == 0:
        sizes["num_heads"] = hidden // width
    return {name: size for name, size in sizes.items() if size is not None}


def shown_in(checkpoint: str) -> dict[str, Any]:
    """Returns what a run made of flow before its sampler saw it, by the keys `SHOWN`; {} where no manifest says.

    Raises:
        WeightsError, ConfigError: no weights are there, or the manifest beside them cannot be used.
    """
    manifest, config = recorded_run(checkpoint)
    section = config["model"].get("sampler") if config else None
    given = {key: section[key] for key in SHOWN if key in section} if isinstance(section, Mapping) else {}
    return checked(recorded(given, manifest), Sampler, f"{manifest}: model.sampler")


class TemporalSampler(nn.Module):
    """Scores each flow field as start and as end of the moment that a question asks for.

    Args:
        hidden_size: H, of the flow stream.
        num_layers: of which those from `fusion_layer` on have cross-attention.
        vocab_size: of the BERT tokenizer that made `input_ids`.
        max_positions: flows + 2, and text tokens, can be at most this many.
        text_width: of the text embeddings; the published model has H.
        rotary_init: "sinusoid", or "normal" for tables of noise as in the published code. The tables are buffers:
            frozen, saved, and loaded from a checkpoint like weights.
        dropout: on embeddings, attention probabilities and the output of each block.
        flow_size: side of the flow in px, a multiple of 16.
        fold_flow: embed the flow by the same linear map in another order: on two cores 0.01 s instead of 0.6 s
            for 4 x 64 flows at full size, but 1.2e-5 from the golden outputs after two layers, not 2e-6.
        flow_scale: flow is multiplied by it. A fresh sampler adds positions of N(0, 0.02) to vectors that are about
            0.0004 times the norm of a field, so it hardly sees motion of a fraction of a px.
        subtract_camera: first subtract from each field its median, (u, v) each for itself.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown `rotary_init`.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        vocab_size: int = 30522,
        max_positions: int = 512,
        fusion_layer: int = 6,
        text_width: int = 768,
        rotary_init: str = "sinusoid",
        *,
        dropout: float = 0.1,
        flow_size: int = 224,
        fold_flow: bool = False,
        flow_scale: float = 1.0,
        subtract_camera: bool = False,
    ):
        super().__init__()
        if rotary_init not in ROTARY_INITS:
            raise ConfigError(unknown_name("rotary_init (model.sampler)", rotary_init, ROTARY_INITS))
        if hidden_size % (2 * num_heads):
            raise ConfigError(
                f"model.sampler: hidden_size {hidden_size} must be a multiple of 2 x num_heads {num_heads} "
                "(rotary positions turn pairs of numbers)"
            )
        if flow_size < PATCH or flow_size % PATCH:
            raise ConfigError(f"model.sampler.flow_size is {flow_size}; expected a positive multiple of {PATCH}")
        if not 0 <= fusion_layer <= num_layers:
            raise ConfigError(f"model.sampler.fusion_layer is {fusion_layer}; expected 0..{num_layers} (num_layers)")
        self.fusion_layer = fusion_layer
        self.max_positions = max_positions
        self.flow_size = flow_size
        self.flow_scale, self.subtract_camera = flow_scale, subtract_camera
        self.flow_embedding = FlowEmbedding(hidden_size, max_positions, flow_size, dropout, fold_flow)
        self.text_embedding = TextEmbedding(vocab_size, text_width, dropout)
        self.layers = nn.ModuleList(
            SamplerLayer(hidden_size, num_heads, intermediate_size, text_width if i >= fusion_layer else None, dropout)
            for i in range(num_layers)
        )
        self.head = nn.Linear(hidden_size, 2)
        table = sinusoid_table(max_positions, hidden_size // num_heads)
        self.register_buffer("flow_rotary", table)
        self.register_buffer("text_rotary", table.clone())
        self.reset_parameters()
        if rotary_init == "normal":
            self.flow_rotary.normal_(std=_INIT_STD)
            self.text_rotary.normal_(std=_INIT_STD)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **settings: Any) -> TemporalSampler:
        """Loads the sampler of a checkpoint, and nothing else of it; its sizes are read off the weights.

        Args:
            name: a run's folder, one of its checkpoints, a published file, or owner/name of a repository that
                `LSTP.push_to_hub` filled.
            settings: dropout and fold_flow, which the weights do not tell. What the sampler is shown (flow_scale,
                subtract_camera) is as in the run that trained it.

        Raises:
            WeightsError: nothing is there, or it has no sampler or a damaged one.
        """
        name = os.fspath(name)
        checkpoint = as_checkpoint(name)
        found = load_as_ours(checkpoint)
        state = {key.removeprefix("sampler."): value for key, value in found.items() if key.startswith("sampler.")}
        if not state:
            raise WeightsError(f"{name}: has no weights of a temporal sampler; name the run that trained one")
        sizes = sizes_in({key: value.shape for key, value in state.items()})
        sampler = cls(**sizes, **shown_in(checkpoint), **settings)
        load_strict(sampler, state, what=f"the sampler's weights of {name}")
        return sampler

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear and Embedding N(0, 0.02), LayerNorm 1 and 0, convolution, bos and eos truncated normal 0.02."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INIT_STD)
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.flow_embedding.bos, std=_INIT_STD)
        nn.init.trunc_normal_(self.flow_embedding.eos, std=_INIT_STD)

    def mode_layers(self, mode: str) -> range:
        """Indices of the layers that a mode runs; `text` is the published name for the same run as `vision`.

        Raises:
            ConfigError: for an unknown mode.
        """
        if mode not in MODES:
            raise ConfigError(unknown_name("sampler mode", mode, MODES))
        first = self.fusion_layer if mode == "fusion" else 0
        last = len(self.layers) if mode in ("fusion", "multi_modal") else self.fusion_layer
        return range(first, last)

    def freeze_unused_layers(self, mode: str) -> None:
        """Layers that `mode` does not run get no gradient, which DDP would otherwise wait for."""
        used = self.mode_layers(mode)
        for i, layer in enumerate(self.layers):
            if i not in used:
                layer.requires_grad_(False)

    def forward(
        self,
        flow: Tensor,
        flow_mask: Tensor,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        mode: str = "fusion",
    ) -> SamplerOutput:
        """Scores the flows of a batch.

        Args:
            flow: float [B,L,2,S,S], (u, v) in px per frame or normalised, as the model was trained; 0 where padded.
            flow_mask: [B,L], 1 = real, real ones first.
            input_ids: int64 [B,S] of a BERT tokenizer; not needed in the modes "vision" and "text".
            text_mask: [B,S], 1 = real.
            mode: "fusion": layers from `fusion_layer` on, straight on the flow embeddings; "multi_modal": all
                layers; "vision" and "text": those before `fusion_layer`.

        Raises:
            ConfigError: an unknown mode, a flow of another size, or more flows or tokens than positions.
        """
        layers = self.mode_layers(mode)
        self._check(flow, input_ids)
        # ZeRO-3 would bring a weight named here for this module, and take it away before the one that uses it is done
        flow = flow.to(next(self.flow_embedding.parameters()).dtype)
        if self.subtract_camera:
            flow = flow - flow.flatten(-2).median(dim=-1).values[..., None, None]
        x, mask = self.flow_embedding(flow * self.flow_scale, flow_mask)
        bias = (1.0 - mask.to(x.dtype))[:, None, None] * _SELF_MASK
        text = text_bias = None
        if any(self.layers[i].cross_attention is not None for i in layers):
            text = self.text_embedding(input_ids)
            text_bias = (1.0 - text_mask.to(text.dtype))[:, None, None] * torch.finfo(text.dtype).min
        for i in layers:
            layer = self.layers[i]
            x = layer.self_attention(x, x, bias, self.flow_rotary, self.flow_rotary)
            if layer.cross_attention is not None:
                x = layer.cross_attention(x, text, text_bias, self.flow_rotary, self.text_rotary)
            x = layer.feed_forward(x)
        start_logits, end_logits = self.head(x[:, 1:-1]).unbind(-1)
        return SamplerOutput(x, start_logits, end_logits)

    def _check(self, flow: Tensor, input_ids: Tensor | None) -> None:
        size, length = self.flow_size, flow.shape[1]
        if tuple(flow.shape[2:]) != (2, size, size):
            raise ConfigError(
                f"the sampler expects flow of shape [B,L,2,{size},{size}] (model.sampler.flow_size), "
                f"got {list(flow.shape)}; set the flow extractor's flow_size to {size}"
            )
        if length + 2 > self.max_positions:
            raise ConfigError(
                f"{length} flows need {length + 2} positions, the sampler has {self.max_positions}; "
                "set model.sampler.window, lower datasets.<name>.num_frames or raise model.sampler.max_positions"
            )
        if input_ids is not None and input_ids.shape[1] > self.max_positions:
            raise ConfigError(
                f"{input_ids.shape[1]} text tokens, the sampler has {self.max_positions} positions; "
                "shorten the question or raise model.sampler.max_positions"
            )


def boundary_targets(span: Tensor, num_flows: int) -> tuple[Tensor, Tensor]:
    """Half-open spans [...,2] in flows -> start and end class [...], the last flow of the span included.

    Negative or empty spans give `num_flows`, the class that `boundary_loss` ignores.
    """
    start, end = span.long().unbind(-1)
    known = (start >= 0) & (end > start)
    ignored = torch.full_like(start, num_flows)
    return torch.where(known, start, ignored), torch.where(known, end - 1, ignored)


def likeliest_span(start_logits: Tensor, end_logits: Tensor, spans: Tensor) -> Tensor:
    """Of M spans of each row, of which finding one is right, the one whose ends the logits like best: int64 [B,2].

    Learning that one at each step (hard EM, arXiv 1909.04849) keeps one span as it is, and never joins the start of a
    moment to the end of another one, as targets spread over all of them do.

    Args:
        start_logits, end_logits: [B,L].
        spans: int64 [B,M,2], half-open in flows; (-1, -1) = no further span. Of equally good ones the first is taken.
    """
    length = start_logits.shape[-1]
    if length == 0 or spans.shape[1] == 1:
        return spans[:, 0]
    start, end = boundary_targets(spans, length)
    places = [(start_logits, start), (end_logits, end)]
    score = sum(logits.detach().float().gather(1, place.clamp(max=length - 1)) for logits, place in places)
    best = score.masked_fill(start == length, -torch.inf).argmax(dim=1)
    return spans[torch.arange(len(spans), device=spans.device), best]


def spans_in_flows(span: Tensor, num_frames: Tensor, num_flows: Tensor) -> Tensor:
    """Half-open spans int64 [B,2] in frames -> in flows, of videos whose flows are not one a frame.

    As published: int(frame / (N - 1) * (L - 1)) of the first and of the last frame, in float64; the one frame of N = 1
    is every flow. (-1, -1) and empty spans stay as they are.

    Args:
        num_frames, num_flows: int64 [B], N and L of each video.
    """
    ends = torch.stack([span[:, 0], span[:, 1] - 1], dim=1)
    found = (ends.double() / (num_frames - 1).clamp(min=1)[:, None] * (num_flows - 1)[:, None]).long()
    found[:, 1] = torch.where(num_frames > 1, found[:, 1], num_flows - 1) + 1
    known = (span[:, 0] >= 0) & (span[:, 1] > span[:, 0])
    return torch.where(known[:, None], found, span)


def boundary_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start: Tensor,
    end: Tensor,
    flow_mask: Tensor | None = None,
    *,
    mask_padding: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean of the cross-entropies of start and end over L classes, as a float32 scalar.

    Args:
        start_logits, end_logits: [B,L].
        start, end: int64 [B], both part of the span; clamped to [0, L], L = ignored. All ignored gives 0.
        flow_mask: [B,L]; padded flows then take no probability, and a target among them is ignored.
        mask_padding: False gives the published loss, in which padded flows compete.
        weight: [B], factors on the cross-entropies of each row; the mean is over rows, whatever they weigh.
    """
    length = start_logits.shape[-1]
    if length == 0:  # a batch of texts
        return (start_logits.float().sum() + end_logits.float().sum()) / 2
    losses = []
    for logits, target in ((start_logits, start), (end_logits, end)):
        logits, target = logits.float(), target.clamp(0, length)
        if flow_mask is not None and mask_padding:
            real = flow_mask.to(logits.device).bool()
            logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
            padded = ~F.pad(real, (0, 1), value=True).gather(1, target[:, None])[:, 0]
            target = target.masked_fill(padded, length)
        each = F.cross_entropy(logits, target, ignore_index=length, reduction="none")
        each = each if weight is None else each * weight.to(each)
        losses.append(each.sum() / (target != length).sum().clamp(min=1))
    return (losses[0] + losses[1]) / 2


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    span: Tensor,
    flow_mask: Tensor | None = None,
    **how,
) -> Tensor:
    """`boundary_loss` for half-open spans int64 [B,2] in flows; (-1, -1) and empty spans are ignored."""
    return boundary_loss(start_logits, end_logits, *boundary_targets(span, start_logits.shape[-1]), flow_mask, **how)
