"""A judge on this machine: a causal language model of transformers that can only write a verdict.

In: cases. Out: a verdict for each. Of all texts the model may write one of twelve, {"pred": "yes", "score": 0} to
{"pred": "no", "score": 5}, token by token the likeliest that still leads to one of them: nothing to parse, nothing
refused. The identity holds a digest of the weights that were read, because a name and even a folder can change.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.files import sha256_file, sha256_json
from lavis_lstp.judging.endpoint import OnVerdict
from lavis_lstp.judging.prompts import Prompt
from lavis_lstp.judging.verdict import MAX_SCORE, PREDS, REFUSED, Case, Verdict, identity
from lavis_lstp.models.weights.hub import BROKEN_FOLDER, check_configurations, local_path, where_to_put

_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")
_VERDICTS = {
    json.dumps({"pred": pred, "score": score}): (pred == "yes", score)
    for pred, score in itertools.product(PREDS, range(MAX_SCORE + 1))
}
Trie = dict[int, Any]
"""Token id -> the tokens that may follow; the end token leads to (correct, score)."""


class LocalJudge:
    """Asks a model in this process, on a GPU where there is one.

    Args:
        model: folder, name below $LAVIS_LSTP_WEIGHTS, or hub id.
        revision: commit of a hub id, 40 digits; a branch would not pin anything.
        weights_sha256: digest that the weights must have, as the identity shows it.
        batch_size: cases at a time, of similar length. Padding changes the last bits of the model's numbers, so another
            batch size can change a verdict that was a tie.

    Raises:
        ConfigError: a hub id without a commit, a folder with one, or a tokenizer that knows no end.
        WeightsError: no model there, not in safetensors files, or not the expected one.
    """

    def __init__(
        self,
        model: str,
        prompt: Prompt,
        *,
        revision: str | None = None,
        weights_sha256: str | None = None,
        batch_size: int = 8,
    ):
        folder = _folder(model, revision)
        weights = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
        if not weights:
            raise WeightsError(f"{folder}: holds no *.safetensors; other files are not read, as they can run code")
        digest = sha256_json(weights)
        if weights_sha256 is not None and digest != weights_sha256:
            raise WeightsError(f"{folder}: the weights have the digest {digest}, expected {weights_sha256}")
        beside = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.suffix in _BESIDE_WEIGHTS}
        self.prompt, self.batch_size = prompt, batch_size
        self._load(folder)
        self.identity = identity(
            "local",
            model=model if revision else folder.name,
            revision=revision,
            weights=digest,
            files=sha256_json(beside)[:12],
            dtype=str(self._model.dtype).removeprefix("torch."),
            prompt=f"{prompt.name}:{prompt.digest}",
        )

    def _load(self, folder: Path) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "auto" if device == "cuda" else torch.float32
        check_configurations(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (*BROKEN_FOLDER, SafetensorError) as error:
            said = " ".join(str(error).split())[:160]  # transformers lists all models it knows
            raise WeightsError(f"{folder}: no causal language model of transformers ({said})") from None
        if missing := sorted(found["missing_keys"]):
            raise WeightsError(
                f"{folder}: the weights lack {len(missing)} of the model's, first {missing[0]}; transformers draws "
                "those anew each time, and the verdicts with them"
            )
        self._end = self._tokenizer.eos_token_id
        if self._end is None:
            raise ConfigError(f"{folder}: the tokenizer has no eos_token, so a verdict would have no end")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = model.to(device).eval()
        self._trie, self._depth = self._verdict_tokens(folder)

    def _verdict_tokens(self, folder: Path) -> tuple[Trie, int]:
        trie: Trie = {}
        written = {text: tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in _VERDICTS}
        if len(set(written.values())) < len(written):
            raise ConfigError(f"{folder}: the tokenizer writes two verdicts in the same way; name another model")
        for text, tokens in written.items():
            node = trie
            for token in tokens:
                node = node.setdefault(token, {})
            node[self._end] = _VERDICTS[text]
        return trie, max(map(len, written.values())) + 1

    def tokens(self, cases: Sequence[Case]) -> tuple[int, int]:
        """How many tokens asking takes, in and, at most, out."""
        return sum(len(self._encode(case)) for case in cases), self._depth * len(cases)

    def judge(self, cases: Sequence[Case], on_verdict: OnVerdict) -> None:
        """Ask all, the shortest first, so that little is padded; `on_verdict` gets each as its batch is done."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        encoded = sorted(((self._encode(case), case) for case in cases), key=lambda pair: (len(pair[0]), pair[1]))
        fitting = []
        for ids, case in encoded:
            if limit is not None and len(ids) + self._depth > limit:
                note = {"text": f"{len(ids)} tokens are too many for the model's {limit}"}
                on_verdict(case, Verdict(self.identity, REFUSED, note=note))
            else:
                fitting.append((ids, case))
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for (_, case), (correct, score) in zip(batch, self._answer([ids for ids, _ in batch]), strict=True):
                on_verdict(case, Verdict(self.identity, correct=correct, score=score))

    def _encode(self, case: Case) -> list[int]:
        """Tokens of the prompt; one message, as not every chat template has a place for instructions."""
        text = "\n\n".join(self.prompt.render(case))
        if self._tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids = self._tokenizer.encode(f"{text}\nVerdict:")
        return ids[:-1] if ids[-1] == self._end else ids

    def _answer(self, rows: list[list[int]]) -> list[tuple[bool, int]]:
        import torch
        from transformers import GenerationConfig

        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._model.device)
        width = padded["input_ids"].shape[1]

        def allowed(row: int, ids: torch.Tensor) -> list[int]:
            node = self._walk(ids[width:].tolist())
            return list(node) if isinstance(node, dict) else [self._tokenizer.pad_token_id]

        # a configuration of its own: the model's may sample, or punish repeated quotes
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._depth,
            eos_token_id=self._end,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=padded["input_ids"],
                attention_mask=padded["attention_mask"],
                generation_config=config,
                prefix_allowed_tokens_fn=allowed,
            )
        return [self._walk(ids) for ids in out[:, width:].tolist()]

    def _walk(self, ids: Sequence[int]) -> Any:
        """Where tokens lead: a node of the trie, or the verdict at its end."""
        node: Any = self._trie
        for token in ids:
            if not isinstance(node, dict):
                break  # padding behind the end
            node = node[token]
        return node


def _folder(model: str, revision: str | None) -> Path:
    found = local_path(model)
    if found is not None and found.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision is for a hub id, and '{model}' is the folder {found}; pin it by its weights")
        return found.resolve()
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConfigError(
            f"'{model}' is no folder, and a hub id needs --revision with a commit of 40 digits, got {revision!r}; or "
            + where_to_put(model)
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *(f"*{ending}" for ending in _BESIDE_WEIGHTS)]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise WeightsError(f"cannot get '{model}' at {revision} ({line}); {where_to_put(model)}") from None
