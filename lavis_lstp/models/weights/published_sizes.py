"""Sizes of the published backbones, so that a full-size model can be built, counted or tried without its files.

In: a hub id. Out: what `backbone.config` takes. The numbers are those of the hub's config.json files; that every key
and shape of the published checkpoints follows from them is tested on the meta device.
"""

from __future__ import annotations

from typing import Any

_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
}
_QFORMER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "vocab_size": 30523,
}
_VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32001,
}
_FLAN_T5_XL = {
    "model_type": "t5",
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_heads": 32,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}

PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    name: {"num_query_tokens": 32, "vision_config": _VISION, "qformer_config": _QFORMER, "text_config": language}
    for name, language in {
        "Salesforce/instructblip-vicuna-7b": _VICUNA_7B,
        "Salesforce/instructblip-flan-t5-xl": _FLAN_T5_XL,
        "Salesforce/blip2-flan-t5-xl": _FLAN_T5_XL,
    }.items()
}
