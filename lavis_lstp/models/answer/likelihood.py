"""How likely answers are: a prompt is read once, whatever number of answers may follow it.

In: visual prefixes and prompts; then answers, each to one of the prompts. Out: log-probabilities. What the language
model makes of a prompt does not depend on the answer, so it is kept: the encoder's output of a T5, keys and values of a
decoder-only model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lavis_lstp.models.answer.qformer import IGNORED, Backbone


class ReadPrompts:
    """Prompts that the language model has read.

    Args:
        prefix: visual prefix [B,P,D_llm]; prefix_mask: [B,P].
        prompts: B strings.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, prefix: Tensor, prefix_mask: Tensor, prompts: list[str]):
        self.backbone = backbone
        inputs, self.mask = backbone.prompt_inputs(prefix, prefix_mask, prompts)
        language_model = backbone.language_model
        if backbone.is_encoder_decoder:
            encoder = language_model.get_encoder()
            self.encoded = encoder(inputs_embeds=inputs, attention_mask=self.mask).last_hidden_state
        else:
            read = language_model(inputs_embeds=inputs, attention_mask=self.mask, use_cache=True)
            self.cache = read.past_key_values
            self.lengths = self.mask.sum(1)
            self.next_logits = read.logits[torch.arange(len(inputs), device=inputs.device), self.lengths - 1]

    @torch.no_grad()
    def log_probs(self, rows: list[int], answers: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each answer, end mark included.

        Args:
            rows: which prompt each answer is to, M numbers of 0..B-1; answers: M strings.

        Returns:
            sum over the answer's tokens, float32 [M]; their number, int64 [M]; and bool [M], whether each of them is
            the likeliest one at its place, so that greedy generation would have said the same.
        """
        which = torch.tensor(rows, device=self.mask.device)
        read = self._encoder_decoder if self.backbone.is_encoder_decoder else self._decoder_only
        logits, labels = read(which, answers)
        counted = labels != IGNORED
        log_probs = logits.new_zeros(labels.shape, dtype=torch.float32)
        log_probs[counted] = -cross_entropy(logits[counted].float(), labels[counted], reduction="none")
        greedy = (logits.argmax(-1) == labels) | ~counted
        return log_probs.sum(1), counted.sum(1), greedy.all(1)

    def _encoder_decoder(self, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A]."""
        from transformers.modeling_outputs import BaseModelOutput

        labels, begun = self.backbone.decoder_targets(answers, rows.device)
        logits = self.backbone.language_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded[rows]),
            attention_mask=self.mask[rows],
            decoder_input_ids=begun,
            use_cache=False,
        ).logits
        return logits, labels

    def _decoder_only(self, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A]; answers stand behind the padding of their prompts, which is masked."""
        language_model, told = self.backbone.language_model, self.backbone.answer_ids(answers)
        width = max(1, *map(len, told))
        labels = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in told], device=rows.device)
        real = (labels != IGNORED).long()
        embedded = language_model.get_input_embeddings()(labels * real)
        places = {}
        if language_model.config.model_type != "opt":  # which counts the mask by itself
            places["position_ids"] = self.lengths[rows, None] + torch.arange(width, device=rows.device)
        logits = language_model(
            inputs_embeds=embedded,
            attention_mask=torch.cat([self.mask[rows], real], dim=1),
            past_key_values=_at(self.cache, rows),
            use_cache=True,
            **places,
        ).logits
        return torch.cat([self.next_logits[rows, None], logits[:, :-1]], dim=1), labels


def _at(cache, rows: Tensor):
    """Keys and values of some rows, as often as they are named; LAVIS's own classes keep them as tuples."""
    if isinstance(cache, tuple):
        return tuple(tuple(state[rows] for state in layer) for layer in cache)
    from transformers import DynamicCache

    taken = DynamicCache()
    for number, layer in enumerate(cache.layers):
        taken.update(layer.keys[rows], layer.values[rows], number)
    return taken
