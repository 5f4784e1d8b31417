"""Tiny video language models of today in the hub's layout: config, safetensors, tokenizer, processor, chat template.

In: a name and a seed. Out: a folder that transformers' AutoModelForImageTextToText and AutoProcessor load as they load
the published one. The classes, the order of the parts and the kinds of marks are the published ones, only sizes are
small; the tokenizer knows bytes and marks and nothing else, and nothing is downloaded. They need transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

SIDE = 56
"""px; a frame is resized to it where the processor does not take any size."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO' }}{% else %}{{ 'IMAGE' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As in Qwen, LLaVA-OneVision and InternVL, with IMAGE and VIDEO for what stands for these."""
SPOKEN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO\n' }}{% else %}{{ 'IMAGE\n' }}{% endif %}{% endfor %}"
    "END{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""With a begin mark in the text, as in LLaVA-NeXT-Video, SmolVLM and Gemma."""


class Made(NamedTuple):
    config: Mapping[str, Any]
    processor: Any


class VideoLLM(NamedTuple):
    """hub_id: the published model that this is the layout of; end: mark that ends an answer."""

    hub_id: str
    make: Callable[[], Made]
    end: str


def _tokenizer(end: str, marks: Mapping[str, str], begin: str | None = None, others: tuple[str, ...] = ()) -> Any:
    """Bytes and marks. `marks`: name of an attribute of the tokenizer -> mark; `begin` is put in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(dict.fromkeys(m for m in (begin, end, "<pad>", *marks.values(), *others) if m)))
    if begin:
        number = core.token_to_id(begin)
        core.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token="<pad>", bos_token=begin, extra_special_tokens=dict(marks)
    )


def _text(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    begin = {"bos_token_id": tokenizer.bos_token_id}
    return {"model_type": model_type, **TEXT, "vocab_size": len(tokenizer), **ends, **begin, **more}


# ---- Qwen -----------------------------------------------------------------------------------------------------------


def _qwen_parts(patch: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    marks |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = _tokenizer("<|im_end|>", marks, others=("<|im_start|>",))
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    unit = (2 * patch) ** 2
    sizes = {"patch_size": patch, "size": {"shortest_edge": 4 * unit, "longest_edge": 16 * unit}}
    return tokenizer, ids, sizes


def _qwen2_5_vl() -> Made:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer, ids, sizes = _qwen_parts(14)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=_around(CHATML)
    )
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = _text(tokenizer, "qwen2_5_vl_text", rope_parameters=rope)
    return Made({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, **ids}, processor)


def _qwen3_vl() -> Made:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer, ids, sizes = _qwen_parts(16)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes),
        chat_template=_around(CHATML),
    )
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 5e6}
    text = _text(tokenizer, "qwen3_vl_text", head_dim=8, rope_parameters=rope)
    return Made({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, **ids}, processor)


def _around(template: str) -> str:
    """Qwen's marks around what stands for a video or an image."""
    return template.replace("'VIDEO'", "'<|vision_start|><|video_pad|><|vision_end|>'").replace(
        "'IMAGE'", "'<|vision_start|><|image_pad|><|vision_end|>'"
    )


# ---- LLaVA, InternVL, SmolVLM, Gemma --------------------------------------------------------------------------------

MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}


def _marked(template: str, image: str, video: str, end: str = "") -> str:
    return template.replace("IMAGE", image).replace("VIDEO", video).replace("END", end)


def _llava_onevision() -> Made:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    tokenizer = _tokenizer("<|im_end|>", {"image_token": "<image>", "video_token": "<video>"}, others=("<|im_start|>",))
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**SQUARE, image_grid_pinpoints=grid),
        tokenizer,
        LlavaOnevisionVideoProcessor(**SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_marked(CHATML, "<image>", "<video>"),
    )
    return Made(
        {
            "model_type": "llava_onevision",
            "text_config": _text(tokenizer, "qwen2"),
            "vision_config": {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            "image_token_index": tokenizer.image_token_id,
            "video_token_index": tokenizer.video_token_id,
            "image_grid_pinpoints": grid,
        },
        processor,
    )


def _llava_next_video() -> Made:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    tokenizer = _tokenizer("</s>", {"image_token": "<image>", "video_token": "<video>"}, begin="<s>")
    grid, square = [[SIDE, SIDE], [SIDE, 2 * SIDE]], {"height": SIDE, "width": SIDE}
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=grid),
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=_marked(SPOKEN, "<image>", "<video>", " "),
    )
    return Made(
        {
            "model_type": "llava_next_video",
            "text_config": _text(tokenizer, "llama"),
            "vision_config": {"model_type": "clip_vision_model", **TOWER, "projection_dim": 16},
            "image_token_index": tokenizer.image_token_id,
            "video_token_index": tokenizer.video_token_id,
            "image_grid_pinpoints": grid,
        },
        processor,
    )


def _internvl() -> Made:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer("<|im_end|>", {**marks, "video_token": "<video>"}, others=("<|im_start|>",))
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**SQUARE, **MEAN_STD),
        tokenizer,
        InternVLVideoProcessor(**SQUARE, **MEAN_STD),
        image_seq_length=4,
        chat_template=_marked(CHATML, "<IMG_CONTEXT>", "<video>"),
    )
    tower = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [14, 14]}
    return Made(
        {
            "model_type": "internvl",
            "text_config": _text(tokenizer, "qwen2"),
            "vision_config": {"model_type": "internvl_vision", **tower},
            "image_token_id": tokenizer.context_image_token_id,
            "image_seq_length": 4,
        },
        processor,
    )


def _smolvlm() -> Made:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    marks = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    marks |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    others = ("<|im_start|>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
    tokenizer = _tokenizer("<end_of_utterance>", marks, others=others)
    edges = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    sampling = {"video_sampling": {"max_frames": 64, "fps": 1, "video_size": {"longest_edge": SIDE}}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**edges),
        tokenizer,
        SmolVLMVideoProcessor(**edges, **sampling),
        image_seq_len=4,
        chat_template=_marked(SPOKEN, "<image>", "<video>", "<end_of_utterance>\n").replace(
            "{{ bos_token }}", "{{ '<|im_start|>' }}"
        ),
    )
    return Made(
        {
            "model_type": "smolvlm",
            "text_config": _text(tokenizer, "llama"),
            "vision_config": {"model_type": "smolvlm_vision", **TOWER},
            "image_token_id": tokenizer.image_token_id,
            "scale_factor": 2,
            "pad_token_id": tokenizer.pad_token_id,
        },
        processor,
    )


def _gemma3() -> Made:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer("<end_of_turn>", marks, begin="<bos>", others=("<start_of_turn>",))
    processor = Gemma3Processor(
        Gemma3ImageProcessor(**SQUARE, **MEAN_STD),
        tokenizer,
        image_seq_length=4,
        chat_template=_marked(SPOKEN, "<start_of_image>", "", "<end_of_turn>\n"),
    )
    local = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return Made(
        {
            "model_type": "gemma3",
            "text_config": _text(tokenizer, "gemma3_text", head_dim=8, query_pre_attn_scalar=8, **local),
            "vision_config": {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": tokenizer.image_token_id,
            "boi_token_index": tokenizer.boi_token_id,
            "eoi_token_index": tokenizer.eoi_token_id,
        },
        processor,
    )


VIDEO_LLMS: dict[str, VideoLLM] = {
    "qwen2_5_vl": VideoLLM("Qwen/Qwen2.5-VL-7B-Instruct", _qwen2_5_vl, "<|im_end|>"),
    "qwen3_vl": VideoLLM("Qwen/Qwen3-VL-8B-Instruct", _qwen3_vl, "<|im_end|>"),
    "llava_onevision": VideoLLM("llava-hf/llava-onevision-qwen2-7b-ov-hf", _llava_onevision, "<|im_end|>"),
    "llava_next_video": VideoLLM("llava-hf/LLaVA-NeXT-Video-7B-hf", _llava_next_video, "</s>"),
    "internvl": VideoLLM("OpenGVLab/InternVL3-8B-hf", _internvl, "<|im_end|>"),
    "smolvlm": VideoLLM("HuggingFaceTB/SmolVLM2-2.2B-Instruct", _smolvlm, "<end_of_utterance>"),
    "gemma3": VideoLLM("google/gemma-3-4b-it", _gemma3, "<end_of_turn>"),
}


def can_be_written() -> bool:
    """Whether transformers is new enough."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def write_video_llm(folder: Path, *, name: str, seed: int = 0, dtype: str = "float32", spread: float = 0.02) -> None:
    """Writes one of VIDEO_LLMS.

    Args:
        spread: standard deviation of the random weights; with 0.02 all answers are alike.
    """
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

    made = VIDEO_LLMS[name].make()
    values = {key: value for key, value in made.config.items() if key != "model_type"}
    config = CONFIG_MAPPING[made.config["model_type"]](**values)
    config.initializer_range = spread
    for part in (config.text_config, config.vision_config):
        part.initializer_range = spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # Gemma's projection begins at zero, and would see nothing
                torch.nn.init.normal_(weight, std=spread)
    tokenizer = made.processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
