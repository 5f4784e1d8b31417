"""The `run` section: every key, its type, its default and its meaning, in one place.

A row is (type, default, meaning). The default is written into the configuration where the user's file has no value;
`None` leaves the key out, so that the runner or task that reads it decides. A runner or task class adds keys of its
own in a class attribute `RUN_KEYS`, a mapping of name to meaning.
"""

from __future__ import annotations

NUMBER, INTEGER, BOOLEAN = "a number", "a whole number", "true or false"
TEXT, LIST, MAPPING, ANY = "text", "a list", "a mapping", ""

RUN_KEYS: dict[str, tuple[str, object, str]] = {
    # what runs
    "task": (TEXT, None, "task to run; the one key without which nothing can run"),
    "runner": (TEXT, None, "runner class; runner_lstp, with LAVIS's own models and tasks runner_base"),
    "evaluate": (BOOLEAN, False, "evaluate only; lavis.evaluate sets it"),
    "seed": (INTEGER, 42, "seed of every generator; the rank is added"),
    "output_dir": (TEXT, "output", "where results go; relative to the current folder"),
    "resume_ckpt_path": (TEXT, None, "run or checkpoint to go on from or evaluate; auto = this run's (runner_lstp)"),
    "log_freq": (INTEGER, None, "steps between two log lines"),
    # data
    "train_splits": (LIST, None, "splits to train on"),
    "valid_splits": (LIST, None, "splits to validate on after each epoch"),
    "test_splits": (LIST, None, "splits to evaluate at the end"),
    "train_dataset_ratios": (MAPPING, None, "sampling ratio by data set"),
    "batch_size_train": (INTEGER, None, "samples in a training batch of one process"),
    "batch_size_eval": (INTEGER, None, "samples in an evaluation batch of one process"),
    "num_workers": (INTEGER, None, "loader processes"),
    "use_dist_eval_sampler": (BOOLEAN, None, "share the evaluation data among processes"),
    # optimization
    "max_epoch": (INTEGER, None, "epochs"),
    "max_iters": (NUMBER, None, "steps (runner_iter)"),
    "iters_per_inner_epoch": (NUMBER, None, "steps between two validations (runner_iter)"),
    "accum_grad_iters": (INTEGER, None, "batches whose gradients make one step"),
    "lr_sched": (TEXT, None, "learning rate schedule"),
    "init_lr": (NUMBER, None, "learning rate after warm-up"),
    "min_lr": (NUMBER, None, "learning rate at the end"),
    "warmup_lr": (NUMBER, None, "learning rate at the first step of warm-up"),
    "warmup_steps": (INTEGER, None, "steps of warm-up"),
    "lr_decay_rate": (NUMBER, None, "factor by epoch, for the step schedule"),
    "lr_layer_decay": (NUMBER, None, "factor by layer (LAVIS's git main)"),
    "weight_decay": (NUMBER, None, "AdamW's"),
    "beta2": (NUMBER, None, "AdamW's"),
    "amp": (ANY, None, "mixed precision"),
    "save_freq": (INTEGER, None, "epochs between two checkpoints (LAVIS's git main)"),
    "save_last": (BOOLEAN, None, "keep the last checkpoint (LAVIS's git main)"),
    "val_freq": (INTEGER, None, "epochs between two validations (LAVIS's git main)"),
    # processes
    "device": (TEXT, None, "cpu, cuda or auto (also where absent): cuda if there is a device"),
    "distributed": (BOOLEAN, False, "set from torchrun's environment"),
    "world_size": (INTEGER, 1, "set from torchrun's environment"),
    "dist_url": (TEXT, "env://", "where the processes meet"),
    # generation
    "max_len": (INTEGER, None, "most tokens generated"),
    "min_len": (INTEGER, None, "fewest tokens generated"),
    "num_beams": (INTEGER, None, "beams of the search; 1 = greedy"),
    "length_penalty": (NUMBER, None, "exponent on the length in beam search"),
    "repetition_penalty": (NUMBER, None, "factor on tokens already there"),
    "temperature": (NUMBER, None, "of sampling"),
    "top_p": (NUMBER, None, "share of probability sampled from"),
    "top_k": (INTEGER, None, "most tokens sampled from"),
    "prompt": (TEXT, None, "text in front of, or around, the question"),
    # single tasks and models of LAVIS
    "inference_method": (TEXT, None, "generate or rank (vqa)"),
    "num_ans_candidates": (INTEGER, None, "answers to rank (vqa)"),
    "report_metric": (BOOLEAN, None, "compute metrics after evaluation"),
    "k_test": (INTEGER, None, "candidates to re-rank (retrieval)"),
    "block_num": (INTEGER, None, "layer of the attention map (pnp_vqa)"),
    "cap_max_length": (INTEGER, None, "longest caption (pnp_vqa)"),
    "cap_min_length": (INTEGER, None, "shortest caption (pnp_vqa)"),
    "num_captions": (INTEGER, None, "captions made (pnp_vqa)"),
    "num_captions_fid": (INTEGER, None, "captions in one reader input (pnp_vqa)"),
    "internal_bsz_fid": (INTEGER, None, "reader batch (pnp_vqa)"),
    "num_patches": (INTEGER, None, "image patches kept (pnp_vqa)"),
}

LAVIS_RUNNER_DEFAULTS: dict[str, object] = {
    "batch_size_train": 8,
    "batch_size_eval": 8,
    "num_workers": 2,
    "max_epoch": 1,
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": 1e-4,
    "min_lr": 0,
    "weight_decay": 0.05,
}
"""What LAVIS's own runners read and have no default for; `runner_lstp` has its own in `runners/settings.py`."""

SET_AT_RUN_TIME = frozenset({"rank", "gpu", "dist_backend"})
"""Keys that the launcher writes into the configuration, as LAVIS's does; legal in a file, never needed there."""


def run_defaults(own_runner: bool) -> dict[str, object]:
    """What a `run` section holds where the user's file says nothing.

    Args:
        own_runner: the runner is this package's, and chooses what is not listed here.
    """
    defaults = {name: default for name, (_, default, _) in RUN_KEYS.items() if default is not None}
    return defaults if own_runner else {**LAVIS_RUNNER_DEFAULTS, **defaults}
