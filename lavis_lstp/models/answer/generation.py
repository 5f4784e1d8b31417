"""Settings of generation, so that a row of a batch is answered as it would be alone.

In: the settings of a configuration or a call, named as in transformers. Out: the arguments of transformers' `generate`.

The language model reads embeddings, padded to the longest row, and transformers knows no token of the prompt. Settings
that count or search the answer's own tokens are followed as they are. The penalty on repetition and the drawing of
tokens are done here, because transformers takes padding for a prompt in the first and draws from one generator for all
rows in the second. Settings that depend on the padding, on the clock or on the prompt's tokens are refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lavis_lstp.config.fields import SAMPLING, check_generation
from lavis_lstp.config.fields import checked as in_range
from lavis_lstp.config.model import Generation
from lavis_lstp.errors import ConfigError, unknown_name

if TYPE_CHECKING:  # settings of a served model are checked where there is no torch
    import torch
    from torch import Tensor

MAX_NEW_TOKENS = 20
"""Length of an answer where no setting tells it; it is the default of transformers."""

FOLLOWED = frozenset(
    "max_new_tokens min_new_tokens num_beams early_stopping length_penalty use_cache no_repeat_ngram_size "
    "bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id "
    "exponential_decay_length_penalty remove_invalid_values renormalize_logits".split()
)
"""Settings that transformers follows by the answer's own tokens."""

HERE = ("do_sample", "repetition_penalty")

DRAWING = {
    "temperature": "TemperatureLogitsWarper",
    "top_h": "TopHLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}
"""Setting of `SAMPLING` -> transformers' class that applies it; in the order of transformers."""
TOP_K = 50
"""Default of transformers, in force wherever tokens are drawn."""

_OURS = "it is set by this package; leave it out"
_PROMPT = "it reads the tokens of the prompt, which is given as embeddings"
_ELSEWHERE = "transformers does not do it by itself any more, or for one row alone"
REFUSED: Mapping[str, str] = {
    "max_length": "it counts the prompt, whose length depends on the batch; set max_new_tokens",
    "min_length": "it counts the prompt, whose length depends on the batch; set min_new_tokens",
    "max_time": "answers would depend on the machine; set max_new_tokens",
    "stop_strings": "answers end with the tokenizer's end mark",
    "num_return_sequences": "a question has one answer; set it to 1",
    "encoder_repetition_penalty": _PROMPT,
    "encoder_no_repeat_ngram_size": _PROMPT,
    "token_healing": _PROMPT,
    "guidance_scale": _PROMPT,
    "watermarking_config": _PROMPT,
    "prompt_lookup_num_tokens": _PROMPT,
    "num_beam_groups": _ELSEWHERE,
    "diversity_penalty": _ELSEWHERE,
    "constraints": _ELSEWHERE,
    "force_words_ids": _ELSEWHERE,
    "penalty_alpha": _ELSEWHERE,
    "dola_layers": _ELSEWHERE,
    "assistant_early_exit": _ELSEWHERE,
    "use_mtp": _ELSEWHERE,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), _OURS),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _OURS),
    "return_dict_in_generate": _OURS,
}
NEUTRAL: Mapping[str, tuple] = {"num_return_sequences": (1,), "num_beam_groups": (1,), "guidance_scale": (1,)}
"""Values of refused settings that ask for nothing, beside null, false and 0."""


TOKENS = (
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)
"""Settings that name tokens by their numbers."""


def checked(settings: Mapping[str, Any], *, encoder_decoder: bool, num_tokens: int | None = None) -> dict[str, Any]:
    """The settings without those that ask for nothing.

    Args:
        encoder_decoder: whether the language model is a T5 rather than a LLaMA.
        num_tokens: how many it knows; None = nobody can tell.

    Raises:
        ConfigError: a setting is not known, out of range or contradicts another, or a row of a batch would not be
            answered as it is alone.
    """
    kept = {}
    for name, value in settings.items():
        if name in REFUSED:
            if value and value not in NEUTRAL.get(name, ()):
                raise ConfigError(f"generation setting {name}={value!r} is not supported: {REFUSED[name]}")
        elif name not in FOLLOWED and name not in HERE and name not in DRAWING:
            raise ConfigError(unknown_name("generation setting", name, (*FOLLOWED, *HERE, *DRAWING)))
        elif value is not None and not (isinstance(value, (Mapping, list)) and not value):
            kept[name] = value
    if isinstance(kept.get("sequence_bias"), Mapping):  # the form of a call in Python; YAML has no such keys
        kept["sequence_bias"] = list(kept["sequence_bias"].items())
    kept = in_range(kept, Generation, "generation", open=True)
    check_generation(kept, "generation")
    for name in TOKENS if num_tokens is not None else ():
        ids = [one[0] for one in kept.get(name, ())] if name == "sequence_bias" else kept.get(name)
        if unknown := [token for token in _flat(ids) if token >= num_tokens]:
            raise ConfigError(f"generation.{name}: token {unknown[0]} is not one of the language model's {num_tokens}")
    if not encoder_decoder and "forced_bos_token_id" in kept:
        raise ConfigError(
            f"generation setting forced_bos_token_id={kept['forced_bos_token_id']!r} is not supported: the answer of a "
            "decoder-only model goes on from the prompt and has no begin mark"
        )
    if kept.get("do_sample") and kept.get("num_beams", 1) > 1:
        raise ConfigError(
            f"generation setting num_beams={kept['num_beams']!r} is not supported with do_sample: beams of all rows "
            "are drawn together; set num_beams to 1, or do_sample to false"
        )
    return kept


def _flat(ids: Any) -> Iterator[int]:
    if isinstance(ids, list):
        for one in ids:
            yield from _flat(one)
    elif ids is not None:
        yield ids


def arguments(
    settings: Mapping[str, Any],
    base: Any,
    rows: int,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of transformers' `generate`.

    Args:
        settings: as `checked` gives them.
        base: the language model's own generation config, which settings override.
        rows: how many prompts there are.
        generators: one for each row, to draw tokens from; None = seeded by torch's global one.

    Raises:
        ConfigError: a value that transformers does not take.
    """
    import torch
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    def value(name: str) -> Any:
        return settings.get(name, getattr(base, name, None))

    processors = LogitsProcessorList()
    if value("repetition_penalty") not in (None, 1):
        processors.append(_made(RepetitionPenaltyLogitsProcessor, "repetition_penalty", value("repetition_penalty")))
    if settings.get("do_sample"):  # never because a checkpoint asks for it: answers are drawn where a user says so
        warpers = LogitsProcessorList()
        for name, class_name in DRAWING.items():
            wanted = TOP_K if name == "top_k" and value(name) is None else value(name)
            if wanted is not None and wanted != SAMPLING[name]:
                more = {"device": device} if name == "eta_cutoff" else {}
                warpers.append(_made(_class(class_name, name), name, wanted, **more))
        if generators is None:
            generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (rows,)).tolist()]
        assert len(generators) == rows
        processors.append(_Drawn(warpers, generators))
    passed = {name: given for name, given in settings.items() if name in FOLLOWED}
    if "sequence_bias" in passed:  # in its list transformers takes no whole numbers, and 4.x no token 0
        passed["sequence_bias"] = {tuple(ids): float(bias) for ids, bias in passed["sequence_bias"]}
    return {
        "use_cache": True,
        "max_new_tokens": MAX_NEW_TOKENS,
        **passed,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "num_return_sequences": 1,
        "logits_processor": processors,
    }


@contextlib.contextmanager
def without_refused(model: torch.nn.Module) -> Iterator[None]:
    """Set the model's generation config for a while, without what `checked` refuses."""
    from transformers import GenerationConfig

    own, usual = model.generation_config, GenerationConfig()
    model.generation_config = copy.deepcopy(own)
    for name, why in REFUSED.items():
        if why != _OURS and hasattr(own, name):
            setattr(model.generation_config, name, getattr(usual, name, None))
    try:
        yield
    finally:
        model.generation_config = own


def _class(class_name: str, setting: str) -> type:
    import transformers

    if not hasattr(transformers, class_name):
        raise ConfigError(f"generation setting {setting} needs a newer transformers than {transformers.__version__}")
    return getattr(transformers, class_name)


def _made(cls: type, name: str, value: Any, **more: Any) -> Any:
    try:
        return cls(value if name == "top_k" else float(value), **more)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation setting {name}={value!r}: {str(error).splitlines()[0]}") from None


class _Drawn:
    """A logits processor that leaves each row the one token that its generator draws.

    Args:
        warpers: transformers' processors that shape the distribution.
        generators: one a row, on the CPU; the draw of a row depends on no other row, and a token's probability is
            what it is in transformers' own sampling.
    """

    def __init__(self, warpers: Sequence[Any], generators: Sequence[torch.Generator]):
        self.warpers, self.generators = warpers, generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids of the answers so far [B,S], logits [B,V] -> logits [B,V], -inf but for the token drawn."""
        import torch

        for warper in self.warpers:
            scores = warper(input_ids, scores)
        below = scores.float().softmax(-1).double().cumsum(-1)
        whole = below[:, -1:]
        drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]).to(below.device)
        token = torch.searchsorted(below, drawn * whole, right=True)
        last = (below >= whole).int().argmax(-1, keepdim=True)  # a product rounded up ends at the last one possible
        return torch.full_like(scores, -torch.inf).scatter(1, torch.minimum(token, last), 0.0)
