"""The optimizer's state under ZeRO, in a form that knows nothing of stages and numbers of processes.

    <checkpoint>/optimizer_00000_of_00002.safetensors   "exp_avg/<weight>", "exp_avg_sq/<weight>", with bf16 also
    <checkpoint>/optimizer_00001_of_00002.safetensors   "master/<weight>", each whole, flat and in fp32

Each process writes every n-th weight's. So a checkpoint is what DeepSpeed calls universal as it is: any number of
processes reads it at any stage, no conversion is run, and no pickle is opened. Collecting costs 8 bytes (bf16 12) of
communication for each trained number and save; frozen weights have no state and are not touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lavis_lstp import distributed
from lavis_lstp.errors import WeightsError
from lavis_lstp.files import strict_json

MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"optimizer_(\d{5})_of_(\d{5})\.safetensors")


class OptimizerState:
    """Reads and writes the state of one DeepSpeed engine, weight by weight.

    Args:
        engine: DeepSpeed's.
        stage: of ZeRO.
    """

    def __init__(self, engine: Any, stage: int):
        self.stage = stage
        self.wrapper = engine.optimizer
        self.base: torch.optim.Optimizer = engine.basic_optimizer
        halves = getattr(self.wrapper, "fp16_groups", None) if stage == 0 else None
        pairs = zip(halves, self.wrapper.fp32_groups, strict=True) if halves else ()
        self.masters = {id(half): full for group in pairs for half, full in zip(*group, strict=True)}
        if self.masters:  # DeepSpeed has made a step on nothing, which counts in Adam's correction and decays weights
            self.base.state.clear()
            for group in zip(halves, self.wrapper.fp32_groups, strict=True):
                for half, full in zip(*group, strict=True):
                    full.data.copy_(half.data)

    # ---- one weight ---------------------------------------------------------------------------------------------

    def get(self, parameter: torch.Tensor, key: str | None) -> torch.Tensor:
        """A moment, or with None the fp32 copy, of a weight of any shape; whole, in each process; a collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            master = self.masters.get(id(parameter), parameter)
            return (master if key is None else self.base.state[master][key]).detach()
        if key is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def set(self, parameter: torch.Tensor, key: str | None, value: Any) -> None:
        """Put this process's part of a flat `value` [N] (a tensor or a slice of a file) where it belongs."""
        if self.stage == 0:
            master = self.masters.get(id(parameter), parameter)
            target = master if key is None else self.base.state[master][key]
            target.data.copy_(value[:].reshape(target.shape))
        elif self.stage == 3:
            self._set_partition(parameter, key, value)
        elif parameter._hp_mapping is not None:  # at stages 1 and 2 a weight may lie in another process altogether
            where = parameter._hp_mapping.lp_fragment_address
            target = parameter._hp_mapping.get_hp_fragment(key)
            target.data.copy_(value[where.start : where.start + where.numel])

    def _set_partition(self, parameter: torch.Tensor, key: str | None, value: Any) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel
        start = size * distributed.rank()
        part = value[min(start, parameter.ds_numel) : min(start + size, parameter.ds_numel)]
        part = torch.nn.functional.pad(part, (0, size - len(part)))  # the last part is filled up
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    # ---- all of them --------------------------------------------------------------------------------------------

    def share(self, parameters: Mapping[str, torch.Tensor], precision: str) -> dict[str, Any]:
        """What this process writes: {"tensors", "step"}; a collective."""
        self._link()
        rank, world_size = distributed.rank(), distributed.world_size()
        tensors = {}
        for number, (name, parameter) in enumerate(parameters.items()):
            for label, key in _keys(precision):
                whole = self.get(parameter, key)
                if number % world_size == rank:
                    tensors[f"{label}/{name}"] = whole.flatten().float().to("cpu", copy=True)
        step = next(int(state["step"]) for state in self.base.state.values())
        return {"tensors": tensors, "step": step}

    def write(self, share: dict[str, Any], folder: Path) -> None:
        name = f"optimizer_{distributed.rank():05d}_of_{distributed.world_size():05d}.safetensors"
        about = {"format": "lavis_lstp.optimizer", "version": 1, "step": share["step"]}
        save_file(share["tensors"], str(folder / name), metadata={"about": json.dumps(about)})

    def read(self, folder: Path, parameters: Mapping[str, torch.Tensor], precision: str) -> None:
        """Put back what any number of processes wrote.

        Raises:
            WeightsError: there is none, a file is missing, or the weights or their sizes differ.
        """
        self._begin()
        expected = {f"{label}/{name}": (p, key) for name, p in parameters.items() for label, key in _keys(precision)}
        found: set[str] = set()
        for path in _files(folder):
            with safe_open(path, framework="pt") as file:
                step = _step(file.metadata(), path)
                for entry in file.keys():
                    found.add(entry)
                    if entry in expected:
                        parameter, key = expected[entry]
                        _check_size(file.get_slice(entry), parameter, entry, path)
                        self.set(parameter, key, file.get_slice(entry))
        differing = sorted({name.partition("/")[2] for name in found ^ expected.keys()})
        if differing:
            raise WeightsError(
                f"the optimizer in {folder} belongs to other trained weights or another run.precision (for instance "
                f"{', '.join(differing[:3])}); resume with the configuration it was saved with"
            )
        for state in self.base.state.values():
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step

    def _begin(self) -> None:
        """Give the optimizer the state it has after a first step: torch makes it no sooner."""
        counts = isinstance(self.base, (torch.optim.Adam, torch.optim.AdamW))
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.base.state[flat] = {"step": torch.tensor(0.0) if counts else 0, **zeros}
        self._link()

    def _link(self) -> None:
        """Tell each weight of stages 1 and 2 where its state lies: DeepSpeed does so after its first step, but
        then only the first parameter group has any."""
        if hasattr(self.wrapper, "_lazy_init_hp_params_optimizer_state"):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that torch's optimizer works on."""
        if self.stage == 3:
            return list(self.wrapper.fp32_partitioned_groups_flat)
        return [p for group in self.base.param_groups for p in group["params"]]


def _keys(precision: str) -> list[tuple[str, str | None]]:
    """(label in a file, key of the optimizer's state); fp32 weights are themselves in the checkpoint."""
    return [*((key, key) for key in MOMENTS), *([("master", None)] if precision == "bf16" else [])]


def _files(folder: Path) -> list[Path]:
    found = {m.group(1): (path, int(m.group(2))) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))}
    if not found:
        raise WeightsError(
            f"no optimizer_*.safetensors in {folder}: another runner saved it; resume with the run.runner it is of"
        )
    wanted = next(iter(found.values()))[1]
    if len(found) != wanted:
        raise WeightsError(
            f"{folder} has {len(found)} of {wanted} files optimizer_*.safetensors; copy all of them there"
        )
    return [path for _, (path, _) in sorted(found.items())]


def _step(metadata: dict[str, str] | None, path: Path) -> int | float:
    try:
        step = strict_json((metadata or {})["about"])["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if type(step) not in (int, float):
        raise WeightsError(f"{path}: its header does not say of which step it is; it is no optimizer's state of a run")
    return step


def _check_size(slice_: Any, parameter: torch.Tensor, entry: str, path: Path) -> None:
    saved, wanted = slice_.get_shape()[0], getattr(parameter, "ds_numel", parameter.numel())
    if saved != wanted:
        raise WeightsError(
            f"{entry} in {path} has {saved} numbers, the weight has {wanted}; resume with the same model"
        )
