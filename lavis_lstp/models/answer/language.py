"""A language model that reads embeddings: the loss of an answer, answers, their pieces and their likelihood.

In: what stands in front of the text (a visual prefix), prompts and answers. Out: a `Reading`. Every answerer whose
language model takes `inputs_embeds`, decoder-only or encoder-decoder, is a `LanguageAnswerer` and adds how it sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.answerer import Answers, GivenUp
from lavis_lstp.models.answer.generation import arguments, checked, without_refused
from lavis_lstp.models.answer.loading import checkpoint_gradients, untie_as_in
from lavis_lstp.models.answer.lora import add_lora, matched, merge_lora
from lavis_lstp.models.answer.streaming import EndsGivenUp, Pieces, refuse_beams

IGNORED = -100
"""Label of a position that no loss looks at, as in torch and transformers."""


class LanguageAnswerer(nn.Module):
    """Base of all answerers over a language model; a subclass adds `look` and lists its parts.

    Args:
        tokenizer: of the language model.
        max_text_tokens: prompts and answers are cut to this many tokens (published: 128 for video data).
    """

    PARTS: Mapping[str, tuple[str, ...]] = {"language_model": ("language_model.",)}
    """Part -> how the keys of its weights begin."""

    def __init__(self, tokenizer, *, max_text_tokens: int = 128):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens

    @property
    def is_encoder_decoder(self) -> bool:
        """T5 is; LLaMA, which goes on from the prompt, is not."""
        return self.language_model.config.is_encoder_decoder

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the language model has scores for."""
        return self.writer.config.get_text_config().vocab_size

    # ---- text -------------------------------------------------------------------------------------------------

    def _tokenize(self, tokenizer, texts: list[str], side: str):
        return tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_text_tokens,
            padding_side=side,
            return_tensors="pt",
            return_token_type_ids=False,
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_text_tokens)["input_ids"]

    def answer_ids(self, answers: list[str]) -> list[list[int]]:
        """Tokens that follow a prompt in a decoder-only model: without what the tokenizer puts in front of a text."""
        front = self._marks_in_front()
        return [ids[front:] for ids in self._ids(answers)]

    def _marks_in_front(self) -> int:
        """Number of tokens that the tokenizer puts in front of every text: 1 for LLaMA and OPT, 0 without a begin mark.

        Raises:
            ConfigError: the tokens of a text are not found again between the marks.
        """
        marked = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for front in range(len(marked) - len(bare) + 1):
            if marked[front : front + len(bare)] == bare:
                return front
        raise ConfigError(
            f"the language model's tokenizer gives a text other tokens between its marks ({marked}) than without "
            f"marks ({bare}); answers could not be cut from it"
        )

    def decoder_targets(self, answers: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of an encoder-decoder model: labels [B,A], IGNORED where there is padding, and what the decoder is given."""
        target = self._tokenize(self.tokenizer, answers, "right").to(device)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
        return labels, self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)

    def prompt_inputs(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return inputs [B,S,D_llm] of the language model up to the answer, and their mask: real positions first."""
        text = self._tokenize(self.tokenizer, prompts, "right").to(prefix.device)
        return self._with_prefix(prefix, prefix_mask, text["input_ids"], text["attention_mask"])[:2]

    def lm_loss(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], answers: list[str]) -> Tensor:
        """Cross entropy of the answers' tokens, averaged over all answer tokens of the batch (published behaviour).

        Computed in float32 whatever the weights are. Where no answer has a token it is 0, and still part of the graph.

        Args:
            prefix: visual prefix [B,P,D_llm]; prefix_mask: [B,P], all 0 in a row without frames.
            prompts, answers: B strings each; the answer carries its own end mark where the family needs one.
        """
        return _token_loss(*self._answer_logits(prefix, prefix_mask, prompts, answers))

    def _answer_logits(
        self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], answers: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Logits [B,S,V], and the labels [B,S] they are of: IGNORED outside the answers."""
        if self.is_encoder_decoder:
            inputs, mask = self.prompt_inputs(prefix, prefix_mask, prompts)
            labels, begun = self.decoder_targets(answers, prefix.device)
            logits = self.language_model(
                inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=begun, use_cache=False
            ).logits
            return logits, labels
        ids, labels = [], []
        for prompt, answer in zip(self._ids(prompts), self.answer_ids(answers), strict=True):
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
        real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(prefix.device)
        ids = pad_sequence(ids, batch_first=True, padding_value=self._pad_id).to(prefix.device)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(prefix.device)
        inputs, mask, labels = self._with_prefix(prefix, prefix_mask, ids, real, labels)
        logits = self.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1], labels[:, 1:]

    def reading(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str]) -> PrefixReading:
        """Prompts behind their visual prefixes [B,P,D_llm], which are real where the mask [B,P] is 1."""
        return PrefixReading(self, prefix, prefix_mask, prompts)

    @torch.no_grad()
    def generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], **how: Any) -> Answers:
        """An answer to each prompt; prefix [B,P,D_llm] and its mask [B,P] as for `lm_loss`, `how` as for `write`."""
        return self.write(lambda wanted: self._generate(prefix, prefix_mask, prompts, wanted), len(prompts), **how)

    def pieces(self, rows: int) -> Pieces:
        """A streamer for `rows` answers."""
        device = self.writer.get_input_embeddings().weight.device.type
        return Pieces(rows, text_of=self._texts, ends=self._end_ids, device=device)

    @property
    def writer(self) -> nn.Module:
        """The model whose `generate` writes answers: the language model, or the whole that it is the inner part of."""
        return self.language_model

    def write(
        self,
        generate: Callable[[Mapping[str, object]], object],
        rows: int,
        *,
        generators: Sequence[torch.Generator] | None = None,
        scored: bool = True,
        given_up: GivenUp | None = None,
        streamer: Pieces | None = None,
        **settings: Any,
    ) -> Answers:
        """Answers out of what a model's `generate` gives.

        Args:
            generate: arguments of transformers' `generate`, but for the inputs -> ids of the answers [B,S], or with
                return_dict_in_generate more.
            rows: B.
            generators, scored, given_up, settings: see `Reading.answers`.
            streamer: is handed the tokens as they come.

        Raises:
            ConfigError: a setting is not known or not supported.
        """
        settings = checked(settings, encoder_decoder=self.is_encoder_decoder, num_tokens=self.num_tokens)
        model, device = self.writer, self.writer.get_input_embeddings().weight.device
        wanted = arguments(settings, model.generation_config, rows, generators, device)
        wanted |= {"return_dict_in_generate": scored, "output_logits": scored, "streamer": streamer}
        if given_up:
            wanted["stopping_criteria"] = [EndsGivenUp(given_up, rows)]
        with without_refused(model):
            made = generate(wanted)
        if not scored:
            return Answers(self._texts(made), None, None)
        scores = model.compute_transition_scores(
            made.sequences, made.logits, getattr(made, "beam_indices", None), normalize_logits=True
        ).float()
        ids = made.sequences[:, -scores.shape[1] :]
        ended = torch.isin(ids, ids.new_tensor(self._end_ids)).long()
        real = ended.cumsum(1) - ended == 0  # up to the first end mark
        return Answers(self._texts(made.sequences), scores.where(real, scores.new_zeros(())).sum(1), real.sum(1))

    def _texts(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def _generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], settings: Mapping):
        """Return ids of the answers [B,S], or with return_dict_in_generate all that transformers' `generate` gives."""
        inputs, mask = self.prompt_inputs(prefix, prefix_mask, prompts)
        if not self.is_encoder_decoder:
            inputs, mask = _left_padded(inputs, mask)
        with torch.compiler.set_stance("force_eager"):  # lengths change with each token: nothing would be reused
            # 5.x warns about, and 4.x obeys, ids of the text config that are wrong in published checkpoints
            return self.language_model.generate(
                inputs_embeds=inputs,
                attention_mask=mask,
                pad_token_id=self._pad_id,
                eos_token_id=self._end_ids,
                **settings,
            )

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def _end_ids(self) -> list[int]:
        """Ids that end an answer: the end marks of the tokenizer and of the generation config."""
        return _ids_of(self.tokenizer.eos_token_id, self.writer.generation_config.eos_token_id)

    def _with_prefix(
        self, prefix: Tensor, prefix_mask: Tensor, ids: Tensor, mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prefix and text as one, with what is real in front and the padding behind.

        So a row is what it would be alone: positions count from its first real token, and no row begins with padding,
        which in a decoder attends to nothing.

        Args:
            ids, mask: text [B,S]; labels: of the text, IGNORED where there is none.

        Returns:
            inputs [B,P+S,D_llm], mask [B,P+S] and labels [B,P+S], or None where none are given.
        """
        embedded = self.language_model.get_input_embeddings()(ids)
        inputs = torch.cat([prefix.to(embedded.dtype), embedded], dim=1)
        mask = torch.cat([prefix_mask, mask], dim=1)
        order = torch.argsort(mask, dim=1, stable=True, descending=True)
        inputs, mask = _reordered(inputs, order), mask.gather(1, order)
        if labels is not None:
            labels = torch.cat([labels.new_full(prefix_mask.shape, IGNORED), labels], dim=1).gather(1, order)
        return inputs, mask, labels

    # ---- adapters, memory, speed ------------------------------------------------------------------------------

    def add_lora(self, **settings) -> None:
        """Puts adapters on the language model; arguments as for `lora.add_lora`."""
        self._set_language_model(add_lora(self.language_model, **settings))

    def merge_lora(self) -> None:
        """Makes adapters part of the language model's weights; without any it changes nothing."""
        self._set_language_model(merge_lora(self.language_model))

    def _set_language_model(self, language_model: nn.Module) -> None:
        (prefix,) = self.PARTS["language_model"]
        parent, _, name = prefix.rstrip(".").rpartition(".")
        setattr(self.get_submodule(parent), name, language_model)

    def matched(self, state_dict: Mapping[str, Tensor], source: str, before: str = "") -> dict[str, Tensor]:
        """A state dict under the names of this backbone, and the backbone ready for it.

        Names differ with and without adapters; input and output embeddings are untied where they differ.

        Args:
            source: what is being loaded, for messages.
            before: how the keys of this backbone begin in `state_dict`.

        Raises:
            WeightsError: adapters that the model has no place for.
        """
        prefixes = [before + prefix for prefix in self.PARTS["language_model"]]
        state_dict = matched(state_dict, [before + key for key in self.state_dict()], prefixes, source)
        inner = {key.removeprefix(before): value for key, value in state_dict.items() if key.startswith(before)}
        untie_as_in(self, inner, self.writer)
        return state_dict

    def layers(self) -> Iterator[nn.Module]:
        """The repeated layers of vision tower, Q-Former and language model, which do nearly all of the work."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return (module for module in self.modules() if isinstance(module, GradientCheckpointingLayer))

    def checkpoint_gradients(self) -> None:
        """Less memory for more time: layers compute their activations again in the backward pass."""
        checkpoint_gradients(self.layers())

    def compile_layers(self, **settings) -> None:
        """torch.compile, layer by layer and in place; names in the state dict stay. Answers are made without it."""
        for layer in self.layers():
            layer.compile(**settings)


class PrefixReading:
    """A `Reading` of prompts that stand behind embeddings, by a `LanguageAnswerer`.

    What the language model makes of a prompt does not depend on the answer, so for `log_probs` it is read once and
    kept: the encoder's output of a T5, keys and values of a decoder-only model.

    Args:
        prefix: visual prefix [B,P,D_llm]; prefix_mask: [B,P], all 0 in a row without frames.
        prompts: B strings.
    """

    def __init__(self, answerer: LanguageAnswerer, prefix: Tensor, prefix_mask: Tensor, prompts: list[str]):
        self.answerer = answerer
        self.prefix, self.prefix_mask, self.prompts = prefix, prefix_mask, prompts
        self.mask: Tensor | None = None

    def loss(self, answers: list[str]) -> Tensor:
        return self.answerer.lm_loss(self.prefix, self.prefix_mask, self.prompts, answers)

    def answers(self, **how: Any) -> Answers:
        return self.answerer.generate(self.prefix, self.prefix_mask, self.prompts, **how)

    def stream(self, *, given_up: GivenUp | None = None, **how: Any) -> Iterator[list[str]]:
        refuse_beams(how)
        pieces = self.answerer.pieces(len(self.prompts))
        return pieces.of(lambda streamer, ended: self.answers(streamer=streamer, given_up=ended, **how), given_up)

    @torch.no_grad()
    def log_probs(self, rows: list[int], answers: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        if self.mask is None:
            self._read()
        which = torch.tensor(rows, device=self.mask.device)
        read = self._encoder_decoder if self.answerer.is_encoder_decoder else self._decoder_only
        return scored_answers(*read(which, answers))

    def _read(self) -> None:
        inputs, self.mask = self.answerer.prompt_inputs(self.prefix, self.prefix_mask, self.prompts)
        language_model = self.answerer.language_model
        if self.answerer.is_encoder_decoder:
            encoder = language_model.get_encoder()
            self.encoded = encoder(inputs_embeds=inputs, attention_mask=self.mask).last_hidden_state
        else:
            read = language_model(inputs_embeds=inputs, attention_mask=self.mask, use_cache=True)
            self.cache_name, self.cache = cache_of(language_model, read)
            self.lengths = self.mask.sum(1)
            self.next_logits = read.logits[torch.arange(len(inputs), device=inputs.device), self.lengths - 1]

    def _encoder_decoder(self, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A]."""
        from transformers.modeling_outputs import BaseModelOutput

        labels, begun = self.answerer.decoder_targets(answers, rows.device)
        logits = self.answerer.language_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded[rows]),
            attention_mask=self.mask[rows],
            decoder_input_ids=begun,
            use_cache=False,
        ).logits
        return logits, labels

    def _decoder_only(self, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A]; answers stand behind the padding of their prompts, which is masked."""
        language_model, told = self.answerer.language_model, self.answerer.answer_ids(answers)
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
            use_cache=True,
            **{self.cache_name: _at(self.cache, rows)},
            **places,
        ).logits
        return torch.cat([self.next_logits[rows, None], logits[:, :-1]], dim=1), labels


def cache_of(model: nn.Module, read: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns the argument that takes a cache, and the cache of an output; transformers 5.24 began to rename both."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return name, read["cache" if "cache" in read else "past_key_values"]


def _at(cache, rows: Tensor):
    """Keys and values of some rows, as often as they are named; LAVIS's own classes keep them as tuples."""
    if isinstance(cache, tuple):
        return tuple(tuple(state[rows] for state in layer) for layer in cache)
    from transformers import DynamicCache

    taken = DynamicCache()
    for number, layer in enumerate(cache.layers):
        taken.update(layer.keys[rows], layer.values[rows], number)
    return taken


def _ids_of(*marks: int | Sequence[int] | None) -> list[int]:
    """Marks as configurations have them, one or several ids or none, as ids without repetition."""
    ids = [i for mark in marks for i in (mark if isinstance(mark, list | tuple) else [mark])]
    return list(dict.fromkeys(i for i in ids if i is not None and i >= 0))


def scored_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `Reading.log_probs` gives, of logits [M,A,V] and labels [M,A], IGNORED where there is no token."""
    counted = labels != IGNORED
    log_probs = logits.new_zeros(labels.shape, dtype=torch.float32)
    log_probs[counted] = -cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    greedy = (logits.argmax(-1) == labels) | ~counted
    return log_probs.sum(1), counted.sum(1), greedy.all(1)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over labels [B,S] that are not IGNORED; logits [B,S,V] of any float type."""
    counted = labels != IGNORED
    total = cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
    return total / counted.sum().clamp(min=1)


def _reordered(inputs: Tensor, order: Tensor) -> Tensor:
    """inputs [B,S,D] with the positions of each row in the order [B,S]."""
    return inputs.gather(1, order[:, :, None].expand_as(inputs))


def _left_padded(inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves every row's real positions, in order, to the right end.

    Generation of a decoder-only model goes on from the last position, so that must be a real one; padding inside a
    row (a sample with fewer frames than others) goes to the front as well.
    """
    order = torch.argsort(mask, dim=1, stable=True)  # zeros first, order kept on both sides
    return _reordered(inputs, order), mask.gather(1, order)
