"""What published weights call their tensors, and what this package calls them.

Tables only: for each kind of file the rules from its names to ours, and how a kind is recognised by its keys. A rule is
a regular expression for the start of a key and what replaces that start, or a `Drop`, the reason why such keys are
left out. The first rule that fits counts; a key that none fits is an error of whoever asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


class Drop(str):
    """Why keys that begin so are left out."""


Rules = tuple[tuple[str, "str | Drop"], ...]
Parts = Mapping[str, tuple[str, Rules, str]]
"""Part -> prefix of its keys in the file, rules for the rest of the key, prefix in `LSTP`."""

UNUSED_PROJECTION = Drop("temporal_projection, which nothing used")
CONSTANTS = Drop("constants that are computed")
UNUSED_POSITIONS = Drop("position embeddings, which a sampler with rotary positions does not use")

BACKBONE_RULES: Rules = (
    (r"temporal_projection\.(weight|bias)$", UNUSED_PROJECTION),  # in every published state dict
    # saved by transformers < 4.31
    (r"(qformer\.embeddings\.position_ids|language_model\..*\.rotary_emb\.inv_freq)$", CONSTANTS),
    (r"(query_tokens$|vision_model\.|qformer\.|language_model\.|language_projection\.)", r"model.\1"),
)
"""transformers' InstructBLIP or BLIP-2 -> Backbone."""

_LAYER = r"encoder\.layer\.(\d+)\."
SAMPLER_RULES: Rules = (
    (r"(temporal_)?embeddings\.position_ids$", CONSTANTS),
    (r"embeddings\.position_embeddings\.", UNUSED_POSITIONS),
    (r"embeddings\.word_embeddings\.", "text_embedding.word."),
    (r"embeddings\.token_type_embeddings\.", "text_embedding.token_type."),
    (r"embeddings\.LayerNorm\.", "text_embedding.norm."),
    (r"temporal_embeddings\.(bos|eos)$", r"flow_embedding.\1"),
    (r"temporal_embeddings\.projection\.", "flow_embedding.patch."),
    (r"temporal_embeddings\.fc\.", "flow_embedding.pool."),
    (r"temporal_embeddings\.frame_pos_embed\.", "flow_embedding.position."),
    (r"temporal_embeddings\.ln\.", "flow_embedding.norm."),
    (r"encoder\.embed_positions\.weight$", "flow_rotary"),
    (r"encoder\.c_embed_positions\.weight$", "text_rotary"),
    (_LAYER + r"attention\.self\.(query|key|value)\.", r"layers.\1.self_attention.\2."),
    (_LAYER + r"attention\.output\.dense\.", r"layers.\1.self_attention.output."),
    (_LAYER + r"attention\.output\.LayerNorm\.", r"layers.\1.self_attention.norm."),
    (_LAYER + r"crossattention\.self\.(query|key|value)\.", r"layers.\1.cross_attention.\2."),
    (_LAYER + r"crossattention\.output\.dense\.", r"layers.\1.cross_attention.output."),
    (_LAYER + r"crossattention\.output\.LayerNorm\.", r"layers.\1.cross_attention.norm."),
    (_LAYER + r"intermediate\.dense\.", r"layers.\1.feed_forward.up."),
    (_LAYER + r"output\.dense\.", r"layers.\1.feed_forward.down."),
    (_LAYER + r"output\.LayerNorm\.", r"layers.\1.feed_forward.norm."),
    (r"mrc_head\.", "head."),
)
"""Published temporal encoder (RopeBertModel) -> TemporalSampler."""

BERT_RULES: Rules = (
    (r"pooler\.", Drop("pooler, which the sampler has not")),
    (r"cls\.", Drop("heads of BERT's own training tasks")),
    *((pattern, new) for pattern, new in SAMPLER_RULES if "temporal_" not in pattern and "mrc_head" not in pattern),
    (r"embeddings\.position_ids$", CONSTANTS),
)
"""BERT -> TemporalSampler; its keys come without `bert.` and with today's names of the LayerNorms."""
NOT_IN_BERT = ("flow_embedding.*", "flow_rotary", "text_rotary", "layers.*.cross_attention.*", "head.*")
"""Keys of TemporalSampler, as patterns, that stay fresh after BERT was loaded."""


def _encoder_rules(old: str, new: str) -> Rules:
    return (
        (rf"{old}\.layer\d+\.\d+\.norm3\.", Drop("norm3, the same module as downsample.1")),
        (rf"{old}\.conv1\.", f"{new}.convnormrelu.0."),
        (rf"{old}\.norm1\.", f"{new}.convnormrelu.1."),
        (rf"{old}\.conv2\.", f"{new}.conv."),
        (rf"{old}\.(layer\d+\.\d+)\.conv(\d)\.", rf"{new}.\1.convnormrelu\2.0."),
        (rf"{old}\.(layer\d+\.\d+)\.norm(\d)\.", rf"{new}.\1.convnormrelu\2.1."),
        (rf"{old}\.(layer\d+\.\d+)\.downsample\.", rf"{new}.\1.downsample."),
    )


RAFT_RULES: Rules = (
    *_encoder_rules("fnet", "feature_encoder"),
    *_encoder_rules("cnet", "context_encoder"),
    (r"update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"update_block\.flow_head\.", "update_block.flow_head."),
    (r"update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"update_block\.mask\.2\.", "mask_predictor.conv."),
)
"""princeton-vl RAFT, "basic" -> torchvision raft_large: 179 keys -> 169."""

_STAGE_ONE = Drop("heads of BLIP-2's first training stage")
_BERT_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
_LAVIS_RULES: Rules = (
    (r"query_tokens$", "query_tokens"),
    (r"visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),  # q_bias, v_bias, qkv
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
    (r"Qformer\.cls\.", Drop("the Q-Former's masked-language head")),
    (r"Qformer\.bert\.embeddings\.position_ids$", CONSTANTS),
    (_BERT_LAYER + r"(attention|crossattention)\.self\.", r"qformer.encoder.layer.\1.\2.attention."),
    (
        _BERT_LAYER + r"(attention\.output|crossattention\.output|intermediate_query|output_query)\.",
        r"qformer.encoder.layer.\1.\2.",
    ),
    (r"(t5|opt|llm)_proj\.", "language_projection."),
    (r"llm_model\..*\.rotary_emb\.inv_freq$", CONSTANTS),
    (r"(t5|opt|llm)_model\.", "language_model."),
    (r"(vision_proj|text_proj|itm_head)\.|temp$", _STAGE_ONE),
)
_NO_TEXT = Drop("what reads text in the Q-Former: BLIP-2's sees none")
LAVIS_BLIP2_RULES: Rules = (
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.", _NO_TEXT),
    (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.", _NO_TEXT),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    *_LAVIS_RULES,
)
"""LAVIS's BLIP-2 -> transformers' Blip2ForConditionalGeneration."""
LAVIS_INSTRUCT_RULES: Rules = (
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.", r"qformer.embeddings.\1_embeddings."),
    (_BERT_LAYER + r"(intermediate|output)\.", r"qformer.encoder.layer.\1.\2."),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    *_LAVIS_RULES,
)
"""LAVIS's InstructBLIP -> transformers' InstructBlipForConditionalGeneration."""

KINDS: dict[str, Parts] = {
    "lstp": {
        "backbone": ("model.", BACKBONE_RULES, "backbone."),
        "sampler": ("temporal_encoder.", SAMPLER_RULES, "sampler."),
        "flow": ("of_extractor.", RAFT_RULES, "flow.model."),
    },
    "sampler": {"sampler": ("", SAMPLER_RULES, "sampler.")},
    "raft": {"flow": ("", RAFT_RULES, "flow.model.")},
    "bert": {"sampler": ("", BERT_RULES, "sampler.")},
    "lavis_blip2": {"backbone": ("", LAVIS_BLIP2_RULES, "backbone.model.")},
    "lavis_instruct": {"backbone": ("", LAVIS_INSTRUCT_RULES, "backbone.model.")},
}
"""Kind of published file -> its parts: a whole LSTP, its sampler alone, RAFT, BERT, or one of LAVIS's models."""
ALONE = {"sampler": "sampler", "raft": "flow"}
"""Kinds that hold one part of LSTP and nothing else."""

_WHOLE = tuple(prefix for prefix, _, _ in KINDS["lstp"].values())
_SIGNS = (
    ("lavis", re.compile(r"Qformer\.|visual_encoder\.|ln_vision\.|(t5|opt|llm)_(proj|model)\.")),
    ("raft", re.compile(r"(fnet|cnet|update_block)\.")),
    ("sampler", re.compile(r"(temporal_embeddings|mrc_head)\.|encoder\.c?_?embed_positions\.")),
    ("bert", re.compile(r"(bert|embeddings|encoder\.layer|pooler|cls)\.")),
)


def kind_of(keys: Iterable[str]) -> str | None:
    """The entry of `KINDS` that a file's keys, without `module.`, belong to; None where nothing points to one."""
    keys = list(keys)
    if any(key.startswith(_WHOLE) for key in keys):
        return "lstp"
    kind = next((kind for kind, sign in _SIGNS if any(sign.match(key) for key in keys)), None)
    if kind != "lavis":
        return kind
    # BLIP-2's own first stage reads text as well, and has these heads; InstructBLIP has not
    first_stage = any(key.startswith(("vision_proj.", "text_proj.", "itm_head.")) for key in keys)
    reads_text = "Qformer.bert.embeddings.word_embeddings.weight" in keys
    return "lavis_instruct" if reads_text and not first_stage else "lavis_blip2"


def today(key: str, kind: str) -> str:
    """A key without what only its writer's tools put there: `module.`, `bert.`, and TensorFlow's gamma and beta."""
    key = key.removeprefix("module.")
    if kind == "bert":
        key = key.removeprefix("bert.")
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
        key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
    return key


def rename(key: str, parts: Parts) -> str | Drop | None:
    """The key's new name, the reason why it is left out, or None where no rule fits."""
    for old_prefix, rules, new_prefix in parts.values():
        if not key.startswith(old_prefix):
            continue
        rest = key[len(old_prefix) :]
        for pattern, replacement in rules:
            if match := re.match(pattern, rest):
                if isinstance(replacement, Drop):
                    return replacement
                return new_prefix + match.expand(replacement) + rest[match.end() :]
    return None
