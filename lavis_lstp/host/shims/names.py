"""Names that LAVIS imports and today's transformers and timm no longer offer.

Each function puts one group of names where LAVIS looks for them, if it is not there, and returns whether it did.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _add_missing(owner: object, **values: object) -> bool:
    missing = [name for name in values if not hasattr(owner, name)]
    for name in missing:
        setattr(owner, name, values[name])
    return bool(missing)


def find_pruneable_heads_and_indices(
    heads: list[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], torch.Tensor]:
    """The heads still to prune, and the rows [n_kept * head_size] (int64) that stay.

    `heads` are numbered as in the unpruned layer, `n_heads` counts those left.
    """
    import torch

    heads = set(heads) - already_pruned_heads
    keep = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in heads:
        keep[head - sum(pruned < head for pruned in already_pruned_heads)] = False
    return heads, keep.flatten().nonzero().flatten()


def add_modeling_utils_names() -> bool:
    from transformers import modeling_utils, pytorch_utils

    _add_missing(pytorch_utils, find_pruneable_heads_and_indices=find_pruneable_heads_and_indices)
    return _add_missing(
        modeling_utils,
        apply_chunking_to_forward=pytorch_utils.apply_chunking_to_forward,
        find_pruneable_heads_and_indices=pytorch_utils.find_pruneable_heads_and_indices,
        prune_linear_layer=pytorch_utils.prune_linear_layer,
    )


def get_device_map(n_layers: int, devices: list[int]) -> dict[int, list[int]]:
    """Layers dealt out to devices in equal runs."""
    per_device = -(-n_layers // len(devices))
    return {
        device: list(range(start, min(start + per_device, n_layers)))
        for device, start in zip(devices, range(0, n_layers, per_device), strict=False)
    }


def assert_device_map(device_map: dict[int, list[int]], num_blocks: int) -> None:
    """Raises ValueError unless each of `num_blocks` layers lies on exactly one device."""
    blocks = sorted(block for layers in device_map.values() for block in layers)
    if blocks != list(range(num_blocks)):
        raise ValueError(f"expected each of the layers 0..{num_blocks - 1} once in the device map, got {blocks}")


def add_model_parallel_utils() -> bool:
    name = "transformers.utils.model_parallel_utils"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    module = types.ModuleType(name, "Stand-in for a module that transformers 5 has dropped.")
    module.get_device_map, module.assert_device_map = get_device_map, assert_device_map
    sys.modules[name] = module
    return True


def expand_mask(mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> torch.Tensor:
    """Mask [B,S] of 1 and 0 -> additive mask [B,1,T,S]: 0 where 1, the lowest `dtype` value where 0."""
    import torch

    rows, src_len = mask.shape
    hidden = mask[:, None, None, :].expand(rows, 1, tgt_len or src_len, src_len) == 0
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, torch.finfo(dtype).min)


def lavis_has(relative: str) -> bool:
    """Whether the installed LAVIS has this file or folder; does not import it."""
    spec = importlib.util.find_spec("lavis")
    return spec is not None and any((Path(root) / relative).exists() for root in spec.submodule_search_locations or ())


def add_clip_expand_mask() -> bool:
    if not lavis_has("models/blip_diffusion_models"):
        return False
    from transformers.models.clip import modeling_clip

    return _add_missing(modeling_clip, _expand_mask=expand_mask)


def _invert_attention_mask(self, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
    """Mask [B,S] or [B,T,S] of 1 and 0 -> additive mask [B,1,1,S] or [B,1,T,S] in the model's dtype."""
    import torch

    mask = encoder_attention_mask
    mask = mask[:, None, :, :] if mask.dim() == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min


def _get_head_mask(self, head_mask: torch.Tensor | None, num_hidden_layers: int, is_attention_chunked: bool = False):
    """None -> [None] * layers; [heads] or [layers, heads] -> [layers, 1, heads, 1, 1] in the model's dtype."""
    if head_mask is None:
        return [None] * num_hidden_layers
    if head_mask.dim() == 1:
        head_mask = head_mask.expand(num_hidden_layers, -1)
    head_mask = head_mask[:, None, :, None, None].to(self.dtype)
    return head_mask.unsqueeze(-1) if is_attention_chunked else head_mask


def add_numpy_inf() -> bool:
    import numpy

    return _add_missing(numpy, Inf=numpy.inf)


def add_mask_methods() -> bool:
    from transformers import PreTrainedModel

    return _add_missing(PreTrainedModel, invert_attention_mask=_invert_attention_mask, get_head_mask=_get_head_mask)


def import_moved_timm_modules() -> bool:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Importing from timm\.models\.\w+ is deprecated", FutureWarning)
        for name in ("hub", "registry", "layers", "helpers"):
            importlib.import_module(f"timm.models.{name}")
    return True


def add_additional_special_tokens() -> bool:
    from transformers import PreTrainedTokenizerBase

    if "additional_special_tokens" in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES:
        return False
    return _add_missing(
        PreTrainedTokenizerBase,
        additional_special_tokens=property(lambda self: self.extra_special_tokens),
        additional_special_tokens_ids=property(lambda self: self.extra_special_tokens_ids),
    )
