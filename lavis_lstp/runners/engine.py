"""What turns losses into changed weights: plain PyTorch, alone or under DDP.

The runner knows an engine by the methods of `TorchEngine` and nothing else, so that another engine (DeepSpeed)
replaces this file and shares the rest: data order, checkpoints, evaluation, logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.models.base_model import BaseModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_lstp import distributed
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.files import writing_to
from lavis_lstp.runners import checkpoint

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.pt"
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""`run.optimizer`; both keep the same two moments, and differ in how weights decay."""


class WholeModel:
    """A model as evaluation needs it, all of it in each process.

    Attributes:
        model: as it is trained, wrapped where an engine wraps it.
        in_step: in evaluation, too, each rank must make as many steps as the others.
    """

    optimizer: Any = None
    in_step = False

    def __init__(self, model: nn.Module):
        self.bare_model = self.model = model

    def apply(self, compute: Callable[[nn.Module], Any]) -> Any:
        """What `compute` makes of the model, with all weights within its reach."""
        return compute(self.bare_model)

    def weights_digest(self) -> str:
        return weights_digest(self.bare_model)

    def load_trained_state(self, state: Mapping[str, torch.Tensor], source: object) -> None:
        checkpoint.load_trained_state(self.bare_model, state, source)


class TorchEngine(WholeModel):
    """Adam or AdamW on the weights that require a gradient, with clipping and accumulation.

    Args:
        model: already on its device; wrapped in DDP where there is more than one process.
        optimizer: name of one of `OPTIMIZERS`.
        precision: "fp32", or "bf16" for autocast (weights and optimizer stay fp32).
        max_grad_norm: None leaves gradients as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        optimizer: str = "adamw",
        precision: str = "fp32",
        lr: float,
        weight_decay: float = 0.05,
        lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float | None = None,
        find_unused_parameters: bool = False,
    ):
        super().__init__(model)
        self.device = device
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.names, groups = parameter_groups(model, weight_decay, lr_scale)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = OPTIMIZERS[optimizer](groups, lr=lr, betas=betas)
        if distributed.world_size() > 1:
            self.model = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                find_unused_parameters=find_unused_parameters,
            )

    @property
    def needs_every_batch(self) -> bool:
        """Whether a micro-batch that cannot be read needs another in its place, which does not count."""
        return distributed.world_size() > 1

    def train_mode(self) -> None:
        self.model.train()

    def accumulate(
        self, compute: Callable[[nn.Module], Mapping[str, torch.Tensor]], *, weight: float, last: bool
    ) -> dict[str, torch.Tensor]:
        """Run one micro-batch and add `weight` times the gradient of its mean loss.

        Args:
            compute: given the model, the micro-batch's losses; "loss" is the one to follow.
            weight: so chosen that the sum over the micro-batches of a step, averaged over the ranks, is the
                mean over the samples.
            last: the step's last micro-batch; only then do ranks exchange gradients.

        Returns:
            The losses, detached, not weighted.
        """
        wait = self.model.no_sync if self.model is not self.bare_model and not last else contextlib.nullcontext
        with wait():
            with autocast(self.device, self.precision):
                try:
                    losses = compute(self.model)
                except RuntimeError as error:
                    if "find_unused_parameters" not in str(error):
                        raise
                    raise ConfigError(
                        "some trained weights got no gradient in the last step, which DDP does not expect; train fewer "
                        "parts of the model, or set run.find_unused_parameters=true"
                    ) from error
            (losses["loss"] * weight).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def clip(self) -> torch.Tensor:
        """Clip, and give the global norm before clipping, [] (on the device: reading it is the caller's choice).

        An engine that cannot part this from the update makes it here, unless the norm is not finite.
        """
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Trained weights, whole; a collective for engines that shard them."""
        return checkpoint.trained_state(self.bare_model)

    def snapshot(self) -> dict[str, Any] | None:
        """What this rank has to write of the engine's own into a checkpoint; a collective for engines that shard."""
        return {"names": self.names, "optimizer": self.optimizer.state_dict()} if distributed.is_main() else None

    def save(self, snapshot: Any, folder: Path) -> None:
        """Write it, without waiting for another rank. Called on every rank."""
        if snapshot is not None:
            with writing_to(folder / OPTIMIZER):
                torch.save(snapshot, folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Read it back.

        Raises:
            WeightsError: the optimizer belongs to other weights, or to another runner.
        """
        if not (folder / OPTIMIZER).is_file():
            raise WeightsError(
                f"no {OPTIMIZER} in {folder}: another runner saved it; resume with the run.runner it was saved with"
            )
        saved = checkpoint.load_state(folder / OPTIMIZER)
        if not {"names", "optimizer"} <= saved.keys():
            raise WeightsError(f"{folder / OPTIMIZER}: expected names and optimizer, got {', '.join(map(str, saved))}")
        if saved["names"] != self.names:
            differing = sorted(set(map(str, saved["names"])) ^ set(map(str, self.names)))[:3]
            raise WeightsError(
                f"the optimizer in {folder} belongs to other trained weights (for instance {', '.join(differing)}); "
                "resume with the model configuration it was saved with"
            )
        self.optimizer.load_state_dict(saved["optimizer"])


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Precision of a forward pass, in training and in evaluation alike."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: float = 1.0
) -> tuple[list[str], list[dict[str, Any]]]:
    """Names and optimizer groups of the trained weights: vectors and scalars (biases, norms) do not decay.

    A model class that groups its weights itself, as those of LAVIS's git main do, is asked.

    Raises:
        ConfigError: nothing is trained.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError(
            "no weight of the model is trained; name at least one part to train in model.train, for instance [qformer]"
        )
    own = getattr(type(model), "get_optimizer_params", None)
    if own is not None and own is not getattr(BaseModel, "get_optimizer_params", None):
        groups = [group for group in model.get_optimizer_params(weight_decay, lr_scale) if len(group["params"])]
        by_identity = {id(p): name for name, p in named.items()}
        return [by_identity[id(p)] for group in groups for p in group["params"]], groups
    decayed = {name: p for name, p in named.items() if p.ndim >= 2}
    plain = {name: p for name, p in named.items() if p.ndim < 2}
    groups = [
        {"params": list(part.values()), "weight_decay": decay}
        for part, decay in ((decayed, weight_decay), (plain, 0.0))
        if part
    ]
    return [*decayed, *plain], groups


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's state; see `digest_of`."""
    return digest_of(
        sorted(model.state_dict().items()), {name for name, p in model.named_parameters() if p.requires_grad}
    )


def digest_of(state: Iterable[tuple[str, torch.Tensor]], trained: Container[str], *, sample: int = 65536) -> str:
    """Digest of a state dict's items by name: `trained` tensors whole, of each other at most about `sample` numbers."""
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        if name not in trained:
            flat = flat[:: max(1, len(flat) // sample)]
        digest.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
