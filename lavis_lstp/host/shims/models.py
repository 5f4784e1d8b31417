"""LAVIS's own copies of BERT, OPT and T5, mended so that transformers 4.57 and 5.x can build, load and run them.

LAVIS carries the model code of transformers 4.15 to 4.26. The arithmetic in it is untouched; what is mended is how it
meets `PreTrainedModel` and `generate`: construction and loading, tied output weights, and the decoding loop.
Every `mend_*` walks over the classes of the LAVIS modules imported so far and returns whether it changed one; a class
is changed once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lavis_lstp.host.shims.names import lavis_has

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BLIP_MODULE = "lavis.models.blip_models.blip"
OPT_MODULE = "lavis.models.blip2_models.modeling_opt"
LLAMA_MODULE = "lavis.models.blip2_models.modeling_llama"
T5_MODULE = "lavis.models.blip2_models.modeling_t5"
# Output parameter -> the input parameter it shares; LAVIS relies on `get_output_embeddings`, which 5.x does not ask.
_BERT_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_OPT_TIES = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
TIED_WEIGHTS = {
    "BertLMHeadModel": _BERT_TIES,
    "BertForMaskedLM": _BERT_TIES,
    "OPTForCausalLM": _OPT_TIES,
}


def _transformers_major() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])


def _lavis_classes() -> Iterator[type[PreTrainedModel]]:
    """The subclasses of PreTrainedModel that LAVIS itself defines, parents before children."""
    from transformers import PreTrainedModel

    if lavis_has("models/blip2_models/modeling_llama.py"):  # main's; its constructors import it too late for us
        importlib.import_module(LLAMA_MODULE)
    found = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("lavis.models.") and module is not None
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == name
    }
    return iter(sorted(found, key=lambda cls: (len(cls.__mro__), cls.__module__, cls.__name__)))


# ---- construction and loading


def _off_meta(get_init_context):
    """`get_init_context` without the meta device: LAVIS's constructors fill buffers, which must hold numbers.

    On the meta device a buffer that is not in the checkpoint (position_ids) comes back uninitialised.
    """

    @classmethod
    @functools.wraps(get_init_context.__func__)
    def wrapped(cls, *args, **kwargs):
        import torch

        meta = torch.device("meta")
        return [c for c in get_init_context.__func__(cls, *args, **kwargs) if c != meta]

    return wrapped


def _keep_what_is_built(move_missing_keys):
    """What the constructor has already put on a real device is not replaced by uninitialised memory."""

    @functools.wraps(move_missing_keys)
    def wrapped(self, missing_keys, *args, **kwargs):
        state = self.state_dict()
        on_meta = {key for key in missing_keys if key not in state or state[key].is_meta}
        if on_meta or any(buffer.is_meta for buffer in self.buffers()):
            move_missing_keys(self, on_meta, *args, **kwargs)

    return wrapped


def _init_only_missing(init_weights):
    """`_init_weights` that leaves loaded parameters alone.

    It is called for a module as soon as one of its parameters is missing from the checkpoint, and LAVIS's writes in
    place into all of them. transformers marks the loaded ones.
    """

    @functools.wraps(init_weights)
    def wrapped(self, module):
        loaded = [p for p in module.parameters(recurse=False) if getattr(p, "_is_hf_initialized", False)]
        values = [p.detach().clone() for p in loaded]
        init_weights(self, module)
        for parameter, value in zip(loaded, values, strict=True):
            parameter.data.copy_(value)

    return wrapped


def _finish_construction(self):
    """`init_weights` as LAVIS's constructors call it at their end: `post_init` once, which calls it again."""
    from transformers import PreTrainedModel

    if "all_tied_weights_keys" in vars(self):
        PreTrainedModel.init_weights(self)
    else:
        self.post_init()


def mend_construction() -> bool:
    from transformers import PreTrainedModel

    if _transformers_major() < 5:
        return False
    bases = [cls for cls in _lavis_classes() if PreTrainedModel in cls.__bases__]
    fresh = [cls for cls in bases if "_lstp_construction" not in vars(cls)]
    for cls in fresh:
        cls._lstp_construction = True
        cls.get_init_context = _off_meta(vars(PreTrainedModel)["get_init_context"])
        cls._move_missing_keys_from_meta_to_device = _keep_what_is_built(
            PreTrainedModel._move_missing_keys_from_meta_to_device
        )
        cls._init_weights = _init_only_missing(cls._init_weights)
        cls.init_weights = _finish_construction
    return bool(fresh)


def _set_output_embeddings(self, new_embeddings):
    """As LAVIS's, and the bias that the head keeps a second name for follows: else resizing leaves a stale one."""
    self.cls.predictions.decoder = new_embeddings
    self.cls.predictions.bias = new_embeddings.bias


def _tie_bias(self):
    """Asked for by `tie_weights` of 4.x, where a bias that the checkpoint has under its first name is loaded once."""
    self.decoder.bias = self.bias


def mend_tied_weights() -> bool:
    fresh = [cls for cls in _lavis_classes() if cls.__name__ in TIED_WEIGHTS and "_lstp_ties" not in vars(cls)]
    for cls in fresh:
        cls._lstp_ties = True
        ties = TIED_WEIGHTS[cls.__name__]
        if _transformers_major() >= 5:
            cls._tied_weights_keys = dict(ties)
        if ties is _BERT_TIES:
            cls.set_output_embeddings = _set_output_embeddings
            sys.modules[cls.__module__].BertLMPredictionHead._tie_weights = _tie_bias
    return bool(fresh)


# ---- generate


def _tuple_cache_forward(forward):
    """A forward that takes and returns tuples of (key, value) per layer, called with a transformers `Cache`.

    keys, values [B, heads, S, head_dim]; only the S_new columns that this call has added go into the cache.
    """

    @functools.wraps(forward)
    def wrapped(self, *args, past_key_values=None, **kwargs):
        from transformers.cache_utils import Cache

        if not isinstance(past_key_values, Cache):
            return forward(self, *args, past_key_values=past_key_values, **kwargs)
        cache, seen = past_key_values, past_key_values.get_seq_length()
        tuples = tuple((layer.keys, layer.values) for layer in cache.layers) if seen else None
        kwargs["use_cache"] = True
        outputs = forward(self, *args, past_key_values=tuples, **kwargs)
        for index, (keys, values) in enumerate(outputs.past_key_values):
            cache.update(keys[:, :, seen:], values[:, :, seen:], index)
        outputs.past_key_values = cache
        return outputs

    return wrapped


def _named_past(prepare_inputs):
    """LAVIS's `prepare_inputs_for_generation` may call the cache `past`, and wants None as long as it is empty."""
    past = "past" if "past" in inspect.signature(prepare_inputs).parameters else "past_key_values"

    @functools.wraps(prepare_inputs)
    def wrapped(self, input_ids, *args, past_key_values=None, **kwargs):
        for name in ("next_sequence_length", "is_first_iteration", "cache_position", "position_ids"):
            kwargs.pop(name, None)  # passed by newer transformers; LAVIS works positions out by itself
        filled = past_key_values is not None and past_key_values.get_seq_length() > 0
        inputs = prepare_inputs(self, input_ids, *args, **{past: past_key_values if filled else None}, **kwargs)
        inputs["past_key_values"] = past_key_values
        return inputs

    return wrapped


def _mask_with_queries(prepare_inputs):
    """An all-ones mask arrives as None; LAVIS would then build one for the text alone, without the query embeddings.

    query_embeds [B,Q,D], input_ids [B,S] -> attention_mask [B,Q+S]
    """

    @functools.wraps(prepare_inputs)
    def wrapped(self, input_ids, query_embeds=None, attention_mask=None, **kwargs):
        if attention_mask is None and query_embeds is not None:
            attention_mask = input_ids.new_ones(len(input_ids), query_embeds.shape[1] + input_ids.shape[1])
        return prepare_inputs(self, input_ids, query_embeds=query_embeds, attention_mask=attention_mask, **kwargs)

    return wrapped


def _expand_inputs_for_generation(
    self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **model_kwargs
):
    """Repeat each row `expand_size` times, but not what LAVIS's callers have already repeated for their beams."""
    import torch

    assert input_ids is not None and not is_encoder_decoder
    rows = len(input_ids)

    def expand(value):
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != rows:
            return value
        return value.repeat_interleave(expand_size, dim=0)

    if expand_size > 1:
        model_kwargs = {name: expand(value) for name, value in model_kwargs.items()}
        input_ids = expand(input_ids)
    return input_ids, model_kwargs


def _reorder_cache(reorder_tuples):
    """Beam search of 4.57 asks the model to reorder; a `Cache` can do it itself."""

    def wrapped(self, past, beam_idx):
        if isinstance(past, tuple):
            return reorder_tuples.__get__(self)(past, beam_idx)  # a method in BERT, static in OPT
        past.reorder_cache(beam_idx)
        return past

    return wrapped


def mend_generation() -> bool:
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    if issubclass(PreTrainedModel, GenerationMixin):
        return False
    fresh = [
        cls
        for cls in _lavis_classes()
        if "prepare_inputs_for_generation" in vars(cls)
        and "_reorder_cache" in vars(cls)
        and not issubclass(cls, GenerationMixin)
    ]
    for cls in fresh:
        cls.__bases__ = (*cls.__bases__, GenerationMixin)
        cls.forward = _tuple_cache_forward(cls.forward)
        cls.prepare_inputs_for_generation = _named_past(cls.prepare_inputs_for_generation)
        cls._expand_inputs_for_generation = _expand_inputs_for_generation
        cls._reorder_cache = _reorder_cache(vars(cls)["_reorder_cache"])
    return bool(fresh)


def mend_opt_mask() -> bool:
    module = sys.modules.get(OPT_MODULE)
    if _transformers_major() < 5 or module is None or "_lstp_mask" in vars(module.OPTForCausalLM):
        return False
    cls = module.OPTForCausalLM
    cls._lstp_mask = True
    cls.prepare_inputs_for_generation = _mask_with_queries(cls.prepare_inputs_for_generation)
    return True


# ---- T5


def _own_t5() -> type[PreTrainedModel]:
    import torch.nn.functional as F
    from transformers import T5ForConditionalGeneration

    class T5WithReduction(T5ForConditionalGeneration):
        """transformers' T5 with LAVIS's argument `reduction`: "mean" over tokens, or "none" for one sum per row."""

        def forward(self, *args, reduction: str = "mean", **kwargs):
            outputs = super().forward(*args, **kwargs)
            labels = kwargs.get("labels")
            if labels is not None and reduction != "mean":
                assert reduction == "none", f"expected reduction 'mean' or 'none', got {reduction!r}"
                by_token = F.cross_entropy(outputs.logits.transpose(1, 2).float(), labels, reduction="none")
                outputs.loss = by_token.sum(1)
            return outputs

    T5WithReduction.__name__ = T5WithReduction.__qualname__ = "T5ForConditionalGeneration"
    T5WithReduction.__module__ = T5ForConditionalGeneration.__module__
    return T5WithReduction


def replace_t5() -> bool:
    """Put transformers' own T5 where LAVIS's modules have imported the copy."""
    copies = getattr(sys.modules.get(T5_MODULE), "T5ForConditionalGeneration", None)
    if copies is None or copies.__module__ != T5_MODULE:
        return False
    own = _own_t5()
    for name in [name for name in sys.modules if name.startswith("lavis.models.")]:
        module = importlib.import_module(name)
        if vars(module).get("T5ForConditionalGeneration") is copies:
            module.T5ForConditionalGeneration = own
    return True


# ---- LAVIS main


def _unless_refused(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except AssertionError as error:  # its last line; the parent is built by then
            if "not compatible with transformers" not in str(error):
                raise

    return wrapped


def lift_blip_refusal() -> bool:
    base = getattr(sys.modules.get(BLIP_MODULE), "BlipBase", None)
    if base is None or "__init__" not in vars(base) or "_lstp_refusal" in vars(base):
        return False
    base._lstp_refusal = True
    base.__init__ = _unless_refused(base.__init__)
    return True


class _Instead(types.ModuleType):
    """A module with some names of its own; any other is the real one's."""

    def __init__(self, real: types.ModuleType, **own: Any):
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def take_weights_only() -> bool:
    """LAVIS's two downloads by torch.hub, of DeiT and TimeSformer: pickles that hold more than weights are refused."""
    import torch

    load = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    mended = False
    for name, attribute, instead in (
        (
            "lavis.models.vit",
            "torch",
            lambda real: _Instead(real, hub=_Instead(real.hub, load_state_dict_from_url=load)),
        ),
        ("lavis.models.timesformer.helpers", "model_zoo", lambda real: _Instead(real, load_url=load)),
    ):
        module = sys.modules.get(name)
        if module is not None and not isinstance(getattr(module, attribute), _Instead):
            setattr(module, attribute, instead(getattr(module, attribute)))
            mended = True
    return mended
