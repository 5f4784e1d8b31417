"""What LAVIS 1.0.2 (and its git main) needs from libraries that have moved on since it was written.

In: the installed transformers, timm and torch, and LAVIS's own classes. Out: the same objects with the names and
methods that LAVIS expects. `TABLE` lists every shim with its reason and the version since which it is needed; each
is installed only where the thing is really missing, so on a library that still has it nothing happens.

`apply()` runs before LAVIS's first line and puts back names that LAVIS imports; `apply_to_lavis()` runs after and mends
LAVIS's model classes. Both may be called any number of times. Importing this module costs nothing: standard library
only, the libraries are imported by the shims that need them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from lavis_lstp.host import lazy_imports
from lavis_lstp.host.shims import models, names


@dataclass(frozen=True)
class Shim:
    """One row: `install()` returns whether something was missing and is now there."""

    name: str
    why: str
    since: str
    install: Callable[[], bool]


BEFORE_LAVIS = (
    Shim(
        "transformers.modeling_utils.apply_chunking_to_forward, find_pruneable_heads_and_indices, prune_linear_layer",
        "imported by med.py, Qformer.py, nlvr_encoder.py; now in pytorch_utils, and the second nowhere since 5.0",
        "transformers 4.56",
        names.add_modeling_utils_names,
    ),
    Shim(
        "transformers.utils.model_parallel_utils",
        "imported by LAVIS's T5 copy for parallelize(), which nothing calls",
        "transformers 5.0",
        names.add_model_parallel_utils,
    ),
    Shim(
        "transformers.models.clip.modeling_clip._expand_mask",
        "imported by LAVIS main's blip_diffusion; installed only for a LAVIS that has it",
        "transformers 4.35",
        names.add_clip_expand_mask,
    ),
    Shim(
        "transformers.PreTrainedModel.invert_attention_mask, get_head_mask",
        "called by LAVIS's BERT copies in every forward",
        "transformers 5.0",
        names.add_mask_methods,
    ),
    Shim(
        "transformers tokenizers: additional_special_tokens, additional_special_tokens_ids",
        "read by BLIP's init_tokenizer; renamed extra_special_tokens",
        "transformers 5.0",
        names.add_additional_special_tokens,
    ),
    Shim(
        "numpy.Inf",
        "read by albef_pretrain and alpro_retrieval in a training step; now numpy.inf",
        "numpy 2.0",
        names.add_numpy_inf,
    ),
    Shim(
        "timm.models.{hub,registry,layers,helpers}",
        "moved; imported once with the FutureWarning off, so that LAVIS's imports of them are silent",
        "timm 0.9",
        names.import_moved_timm_modules,
    ),
)

AFTER_LAVIS = (
    Shim(
        "LAVIS PreTrainedModel copies: construction",
        "constructors call init_weights() where post_init() is needed; they fill buffers, so they must not run on the "
        "meta device; _init_weights overwrites loaded weights of half-loaded modules",
        "transformers 5.0",
        models.mend_construction,
    ),
    Shim(
        "LAVIS PreTrainedModel copies: tied weights",
        "5.x ties output weights by a table in the class, without it lm_head is random; 4.57 loses the output bias",
        "transformers 5.0",
        models.mend_tied_weights,
    ),
    Shim(
        "LAVIS PreTrainedModel copies: generate",
        "GenerationMixin is no longer inherited, caches are objects and not tuples, inputs that LAVIS has repeated for "
        "its beams would be repeated again",
        "transformers 4.52",
        models.mend_generation,
    ),
    Shim(
        "lavis...modeling_opt.OPTForCausalLM: attention mask",
        "generate drops a mask of ones; LAVIS rebuilds it for the text alone, too short by the query embeddings",
        "transformers 5.18",
        models.mend_opt_mask,
    ),
    Shim(
        "lavis...modeling_t5.T5ForConditionalGeneration",
        "LAVIS's copy of T5 differs from transformers' own by the argument `reduction` alone; the copy cannot generate",
        "transformers 4.52",
        models.replace_t5,
    ),
    Shim(
        "lavis...blip.BlipBase.__init__",
        "LAVIS main refuses newer transformers, where its BLIP could not generate; with the rows above it can",
        "transformers 4.27",
        models.lift_blip_refusal,
    ),
    Shim(
        "lavis...vit, timesformer.helpers: weights from the net",
        "torch.hub.load_state_dict_from_url takes any pickle unless told not to, and LAVIS does not tell it",
        "torch 2.6",
        models.take_weights_only,
    ),
)

TABLE = BEFORE_LAVIS + AFTER_LAVIS
_applied: set[str] = set()


def _run(rows: tuple[Shim, ...]) -> None:
    _applied.update(row.name for row in rows if row.install())


def apply() -> None:
    """Put back what LAVIS imports and today's libraries no longer have. Call before LAVIS is imported.

    From here to `apply_to_lavis` imports are put off, see `lazy_imports`.
    """
    if "lavis.models" not in sys.modules:
        lazy_imports.install()
    _run(BEFORE_LAVIS)


def apply_to_lavis() -> None:
    """Mend the model classes of the LAVIS modules imported so far. Call after LAVIS is imported."""
    lazy_imports.finish()
    _run(AFTER_LAVIS)


def active() -> list[tuple[str, str, str, bool]]:
    """Every shim as (name, why, since, applied in this process)."""
    return [(row.name, row.why, row.since, row.name in _applied) for row in TABLE]
