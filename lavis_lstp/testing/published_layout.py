"""Names and shapes in the published files of the temporal sampler, RAFT and BERT, written out by size.

In: sizes. Out: name -> shape, as the published code's `state_dict()` has them. Written down from the files' layout and
not from `lavis_lstp.models`, so that files made from it test the code that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable

Shapes = dict[str, list[int]]

FLOW_PATCH = 16
INTEGERS = ("position_ids", "num_batches_tracked")
"""Endings of names that hold int64."""


def _linear(name: str, size_out: int, size_in: int) -> Shapes:
    return {f"{name}.weight": [size_out, size_in], f"{name}.bias": [size_out]}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def _merged(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def _attention(name: str, width: int, source_width: int) -> Iterable[Shapes]:
    yield _linear(f"{name}.self.query", width, width)
    yield _linear(f"{name}.self.key", width, source_width)
    yield _linear(f"{name}.self.value", width, source_width)
    yield _linear(f"{name}.output.dense", width, width)
    yield _norm(f"{name}.output.LayerNorm", width)


def _layers(layers: int, width: int, inner: int, *, cross_from: int | None = None) -> Iterable[Shapes]:
    """BERT's encoder layers; those from `cross_from` on attend to a text of the same width, too."""
    for i in range(layers):
        name = f"encoder.layer.{i}"
        yield from _attention(f"{name}.attention", width, width)
        if cross_from is not None and i >= cross_from:
            yield from _attention(f"{name}.crossattention", width, width)
        yield _linear(f"{name}.intermediate.dense", inner, width)
        yield _linear(f"{name}.output.dense", width, inner)
        yield _norm(f"{name}.output.LayerNorm", width)


def _embeddings(width: int, vocab_size: int, positions: int) -> Iterable[Shapes]:
    for name, rows in (("word", vocab_size), ("token_type", 2), ("position", positions)):
        yield {f"embeddings.{name}_embeddings.weight": [rows, width]}
    yield _norm("embeddings.LayerNorm", width)


def sampler_shapes(
    *,
    width: int,
    layers: int,
    heads: int,
    inner: int,
    vocab_size: int,
    positions: int,
    fusion_layer: int,
    flow_size: int,
) -> Shapes:
    """The temporal encoder (published class: RopeBertModel)."""
    head = width // heads

    def parts() -> Iterable[Shapes]:
        yield from _embeddings(width, vocab_size, positions)
        flow = "temporal_embeddings"
        yield {f"{flow}.bos": [width], f"{flow}.eos": [width], f"{flow}.position_ids": [1, positions]}
        yield {f"{flow}.projection.weight": [width, 2, FLOW_PATCH, FLOW_PATCH], f"{flow}.projection.bias": [width]}
        yield _linear(f"{flow}.fc", 1, (flow_size // FLOW_PATCH) ** 2)
        yield {f"{flow}.frame_pos_embed.weight": [positions, width]}
        yield _norm(f"{flow}.ln", width)
        yield {f"encoder.{name}embed_positions.weight": [positions, head] for name in ("", "c_")}
        yield from _layers(layers, width, inner, cross_from=fusion_layer)
        yield _linear("mrc_head", 2, width)

    return _merged(parts())


def bert_shapes(*, width: int, layers: int, inner: int, vocab_size: int, positions: int) -> Shapes:
    """bert-base-uncased: `bert.`, norms that say gamma and beta, heads of its training; no tied weight twice."""

    def body() -> Iterable[Shapes]:
        yield from _embeddings(width, vocab_size, positions)
        yield from _layers(layers, width, inner)
        yield _linear("pooler.dense", width, width)

    def heads() -> Iterable[Shapes]:
        yield {"cls.predictions.bias": [vocab_size]}
        yield _linear("cls.predictions.transform.dense", width, width)
        yield _norm("cls.predictions.transform.LayerNorm", width)
        yield _linear("cls.seq_relationship", 2, width)

    shapes = {**{f"bert.{name}": shape for name, shape in _merged(body()).items()}, **_merged(heads())}
    old = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    for now, before in old:
        shapes = {name.replace(now, before): shape for name, shape in shapes.items()}
    return shapes


def _conv(name: str, size_out: int, size_in: int, *kernel: int) -> Shapes:
    kernel = kernel if len(kernel) == 2 else (*kernel, *kernel)
    return {f"{name}.weight": [size_out, size_in, *kernel], f"{name}.bias": [size_out]}


def _batch_norm(name: str, width: int) -> Shapes:
    running = {f"{name}.running_mean": [width], f"{name}.running_var": [width], f"{name}.num_batches_tracked": []}
    return {**_norm(name, width), **running}


def _raft_encoder(name: str, *, norms: bool) -> Iterable[Shapes]:
    """Six residual blocks of two convolutions; `norms`: BatchNorm (the context encoder), else norms without weights."""
    norm = _batch_norm if norms else (lambda name, width: {})
    yield norm(f"{name}.norm1", 64)
    yield _conv(f"{name}.conv1", 64, 3, 7)
    before = 64
    for layer, width in enumerate((64, 96, 128), 1):
        for i in range(2):
            block = f"{name}.layer{layer}.{i}"
            yield _conv(f"{block}.conv1", width, before, 3)
            yield _conv(f"{block}.conv2", width, width, 3)
            yield norm(f"{block}.norm1", width)
            yield norm(f"{block}.norm2", width)
            if before != width:
                yield norm(f"{block}.norm3", width)
                yield _conv(f"{block}.downsample.0", width, before, 1)
                yield norm(f"{block}.downsample.1", width)  # the same module as norm3
            before = width
    yield _conv(f"{name}.conv2", 256, 128, 1)


def raft_shapes() -> Shapes:
    """princeton-vl RAFT, "basic", at its only size."""

    def parts() -> Iterable[Shapes]:
        yield from _raft_encoder("fnet", norms=False)
        yield from _raft_encoder("cnet", norms=True)
        motion = "update_block.encoder"
        yield _conv(f"{motion}.convc1", 256, 4 * 81, 1)
        yield _conv(f"{motion}.convc2", 192, 256, 3)
        yield _conv(f"{motion}.convf1", 128, 2, 7)
        yield _conv(f"{motion}.convf2", 64, 128, 3)
        yield _conv(f"{motion}.conv", 126, 256, 3)
        for i, kernel in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                yield _conv(f"update_block.gru.conv{gate}{i}", 128, 384, *kernel)
        yield _conv("update_block.flow_head.conv1", 256, 128, 3)
        yield _conv("update_block.flow_head.conv2", 2, 256, 3)
        yield _conv("update_block.mask.0", 256, 128, 3)
        yield _conv("update_block.mask.2", 576, 256, 1)

    return _merged(parts())


def lavis_shapes(
    *,
    vision_width: int,
    vision_layers: int,
    vision_inner: int,
    patch_size: int,
    patches: int,
    width: int,
    layers: int,
    inner: int,
    positions: int,
    queries: int,
    projection: str,
    text_width: int,
    vocab_size: int | None = None,
) -> Shapes:
    """LAVIS's own BLIP-2, or with a `vocab_size` of its Q-Former InstructBLIP, without the language model.

    `projection` is t5_proj or llm_proj. A Q-Former that reads no text has lost its word embeddings and half of its
    feed-forwards, not its position_ids.
    """

    def vision() -> Iterable[Shapes]:
        yield {"cls_token": [1, 1, vision_width], "pos_embed": [1, patches + 1, vision_width]}
        yield _conv("patch_embed.proj", vision_width, 3, patch_size)
        for i in range(vision_layers):
            yield _norm(f"blocks.{i}.norm1", vision_width)
            yield {f"blocks.{i}.attn.{name}_bias": [vision_width] for name in "qv"}
            yield {f"blocks.{i}.attn.qkv.weight": [3 * vision_width, vision_width]}
            yield _linear(f"blocks.{i}.attn.proj", vision_width, vision_width)
            yield _norm(f"blocks.{i}.norm2", vision_width)
            yield _linear(f"blocks.{i}.mlp.fc1", vision_inner, vision_width)
            yield _linear(f"blocks.{i}.mlp.fc2", vision_width, vision_inner)

    def qformer() -> Iterable[Shapes]:
        yield {"embeddings.position_ids": [1, positions]}
        if vocab_size:
            yield {"embeddings.word_embeddings.weight": [vocab_size, width]}
            yield {"embeddings.position_embeddings.weight": [positions, width]}
        yield _norm("embeddings.LayerNorm", width)
        for i in range(layers):
            layer = f"encoder.layer.{i}"
            yield from _attention(f"{layer}.attention", width, width)
            if i % 2 == 0:
                yield from _attention(f"{layer}.crossattention", width, vision_width)
            for kind in ("", "_query") if vocab_size else ("_query",):
                yield _linear(f"{layer}.intermediate{kind}.dense", inner, width)
                yield _linear(f"{layer}.output{kind}.dense", width, inner)
                yield _norm(f"{layer}.output{kind}.LayerNorm", width)

    def parts() -> Iterable[Shapes]:
        yield {"query_tokens": [1, queries, width]}
        yield {f"visual_encoder.{name}": shape for name, shape in _merged(vision()).items()}
        yield _norm("ln_vision", vision_width)
        yield {f"Qformer.bert.{name}": shape for name, shape in _merged(qformer()).items()}
        yield _linear(projection, text_width, width)

    return _merged(parts())
