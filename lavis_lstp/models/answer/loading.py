"""Models of transformers with a Q-Former from the hub, a folder or random numbers, and how they are made to run.

In: names and sizes from a config. Out: model and tokenizers, for `backbone.Backbone`. Weights go through transformers'
own `from_pretrained`: safetensors, one or many files, read into an empty (meta device) model, so that memory holds them
once. The rest are switches that must change nothing but speed and memory.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_lstp.config.fields import reason
from lavis_lstp.config.other_keys import transformers_errors
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.weights.hub import BROKEN_FOLDER, where_from, where_to_put

FAMILIES = {"instructblip": "InstructBlip", "blip2": "Blip2", "instructblipvideo": "InstructBlipVideo"}
"""How the names of transformers' classes begin."""
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
QUANTIZATIONS = ("8bit", "4bit")
HUB_IDS = {"instructblip": "Salesforce/instructblip-vicuna-7b", "blip2": "Salesforce/blip2-flan-t5-xl"}
NOT_QUANTIZED = ("vision_model", "qformer", "language_projection", "language_model.lm_head", "lm_head")
"""Published weights of these learn or are small; the output layer is kept as transformers itself keeps it."""


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: object
    qformer_tokenizer: object | None
    """InstructBLIP's, whose Q-Former reads the prompt too."""


def model_classes(family: str):
    """(config class, model class) of transformers.

    Raises:
        ConfigError: the family is not known.
    """
    if family not in FAMILIES:
        raise ConfigError(unknown_name("backbone family", family, FAMILIES))
    import transformers

    kind = FAMILIES[family]
    return getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForConditionalGeneration")


# ---- published weights ----------------------------------------------------------------------------------------------


def load_published(
    name: str, *, family: str, dtype: str = "float32", attention: str | None = None, quantization: str | None = None
) -> Loaded:
    """From a folder in the hub's layout (config, safetensors, tokenizer files) or a hub id.

    Raises:
        WeightsError: files or weights are missing, damaged or of other shapes; the line says which, and where from.
        ConfigError: a setting that this machine cannot follow.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    _, model_class = model_classes(family)
    attention = checked_attention(attention)
    settings = {"attn_implementation": attention} if attention else {}
    if quantization:
        settings["quantization_config"] = quantization_config(quantization, dtype)
    where = where_from(name)
    try:
        model, found = model_class.from_pretrained(
            **where, dtype=getattr(torch, dtype), output_loading_info=True, **settings
        )
        tokenizer = as_published(AutoTokenizer.from_pretrained(**where))
        qformer_tokenizer = None
        if family != "blip2":
            qformer_tokenizer = AutoTokenizer.from_pretrained(**where, subfolder="qformer_tokenizer")
    except (*BROKEN_FOLDER, SafetensorError) as error:
        raise WeightsError(
            f"no {family} weights at '{name}' (model.backbone.weights): expected a hub id that is cached or can be "
            f"reached, such as {HUB_IDS.get(family, HUB_IDS['instructblip'])}, or a folder with its files "
            f"(config.json, *.safetensors and tokenizer files) downloaded from huggingface.co; {where_to_put(name)}; "
            f"transformers says: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(
            f"'{name}' (model.backbone.weights) lacks {len(missing)} weights of {family}, first {missing[0]}; "
            "is it of another model.backbone.family?"
        )
    say_whether_tied(model.language_model)
    for generation in (model.generation_config, model.language_model.generation_config):
        if (generation.pad_token_id or 0) < 0:  # published LLaMA configurations say -1, and 4.57 then refuses to save
            generation.pad_token_id = tokenizer.pad_token_id
    return Loaded(model, tokenizer, qformer_tokenizer)


def as_published(tokenizer):
    """Lets a LLaMA tokenizer put a blank before every stretch of text between special tokens, in place.

    So did transformers up to 4.x, and the published weights have learned it. 5.x does so once, at the start of a text
    without a blank of its own, and gives the "</s>USER" of a conversation's second turn other ids.
    """
    if type(tokenizer).__name__ == "LlamaTokenizer" and tokenizer.is_fast:
        from tokenizers.normalizers import Prepend, Replace, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    return tokenizer


def checked_attention(name: str | None) -> str | None:
    """What to ask transformers for.

    "sdpa" is its own choice wherever a part has it; asked for by name, 4.57 refuses models of which one part has not
    (its Q-Formers and T5).

    Raises:
        ConfigError: the name is not known, or its package is not installed.
    """
    if name is not None and name not in ATTENTIONS:
        raise ConfigError(unknown_name("attention (model.backbone.attention)", name, ATTENTIONS))
    if name == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise ConfigError(
            "model.backbone.attention flash_attention_2 needs the package flash-attn, which is not installed; "
            "pip install flash-attn, or use sdpa"
        )
    return None if name == "sdpa" else name


def quantization_config(kind: str, dtype: str, skipped: Iterable[str] = NOT_QUANTIZED):
    """What `from_pretrained` needs to hold the language model's linear layers in 8 or 4 bits.

    Args:
        skipped: names of the modules that stay as they are; the output layer does in any case.

    Raises:
        ConfigError: the kind is not known, or bitsandbytes or a CUDA device is missing.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(unknown_name("quantization (model.backbone.quantization)", kind, QUANTIZATIONS))
    if not importlib.util.find_spec("bitsandbytes"):
        raise ConfigError(
            f"model.backbone.quantization {kind} needs the package bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or set it to null"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.backbone.quantization {kind} needs a CUDA device, and torch sees none; set it to null"
        )
    from transformers import BitsAndBytesConfig

    skipped = list(dict.fromkeys((*skipped, "lm_head")))
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=skipped,
    )


# ---- random weights -------------------------------------------------------------------------------------------------


def from_sizes(
    config: Mapping, *, family: str, dtype: str = "float32", seed: int = 0, attention: str | None = None
) -> Loaded:
    """Random weights drawn from `seed`, and the built-in tokenizer: for tests and models trained from nothing.

    Args:
        config: what the family's transformers config class takes (vision_config, qformer_config, text_config,
            num_query_tokens). Vocabulary sizes and special ids are filled in.
    """
    config_class, model_class = model_classes(family)
    parts = {"vision_config": {}, "qformer_config": {}, "text_config": {}}
    parts |= {key: dict(value) if isinstance(value, Mapping) else value for key, value in dict(config).items()}
    is_t5 = parts["text_config"].get("model_type") == "t5"
    tied = parts["text_config"].get("tie_word_embeddings", is_t5)
    tokenizer = tiny_tokenizer(bos=not is_t5, eos=is_t5)
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if is_t5:
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    parts["text_config"] = {**parts["text_config"], **ids}
    parts["qformer_config"] = {**parts["qformer_config"], "vocab_size": len(tokenizer)}
    if "hidden_size" in parts["vision_config"]:
        parts["qformer_config"]["encoder_hidden_size"] = parts["vision_config"]["hidden_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = model_class(config_class(**parts))
        except transformers_errors() as error:
            raise ConfigError(f"model.backbone.config: transformers cannot build it: {reason(error)}") from error
        # transformers leaves the query tokens at zero, from which identical queries never part
        nn.init.trunc_normal_(model.query_tokens, std=0.02)
        if not tied:
            untie(model.language_model)
    if attention := checked_attention(attention):
        model.set_attn_implementation(attention)
    model.to(getattr(torch, dtype))
    return Loaded(model, tokenizer, tiny_tokenizer(bos=False) if family != "blip2" else None)


# ---- input and output embeddings, one tensor or two ---------------------------------------------------------------
# FLAN-T5's differ. transformers 5 makes one of them whenever it builds a T5 from a config, whatever the config says.


def untie(language_model: nn.Module) -> None:
    """Gives the output layer a weight of its own, with the values it has."""
    head = language_model.get_output_embeddings()
    if head is not None and head.weight is language_model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    say_whether_tied(language_model)


def untie_as_in(module: nn.Module, state_dict: Mapping[str, Tensor], language_model: nn.Module) -> None:
    """Unties `language_model` where `state_dict`, of the `module` it is in, has two weights that differ."""
    head = language_model.get_output_embeddings()
    if head is None or head.weight is not language_model.get_input_embeddings().weight:
        return
    own = module.state_dict(keep_vars=True)
    given = [state_dict[key] for key, value in own.items() if value is head.weight and key in state_dict]
    if any(other.shape == given[0].shape and not torch.equal(other, given[0]) for other in given[1:]):
        untie(language_model)


def say_whether_tied(language_model: nn.Module) -> None:
    """Lets the configuration say what is: `save_pretrained` writes it, and transformers 4 ties by it when it loads."""
    head = language_model.get_output_embeddings()
    if head is not None and head.weight is not language_model.get_input_embeddings().weight:
        language_model.config.tie_word_embeddings = False


# ---- speed and memory -----------------------------------------------------------------------------------------------


def checkpoint_gradients(layers: Iterable[nn.Module]) -> None:
    """Lets layers forget their activations and compute them again in the backward pass.

    transformers' own switch acts in train mode only; a frozen language model is in eval mode, and is where most
    activations are. So each layer's `forward` is wrapped, whatever its mode, wherever gradients are recorded.
    """
    for layer in layers:
        # a partial and not a closure, so that a copy of the model computes with its own weights
        layer.forward = functools.partial(_forget_and_repeat, layer.forward)


def _forget_and_repeat(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: that of its first weight which is not quantised."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
