"""Vision tower, Q-Former and language model: an adapter over transformers' InstructBLIP and BLIP-2 classes.

In: pixels and strings. Out: query tokens per frame, the loss of an answer, generated answers. The language model
is called on embeddings built here (prefix, then text) and not through the classes' own `forward`, whose contract
with image placeholders changed between transformers releases. Checkpoints are the published ones: the module
`model` has the state dict of `InstructBlipForConditionalGeneration` or `Blip2ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.generation import arguments, checked
from lavis_lstp.models.answer.loading import (
    checkpoint_gradients,
    dtype_of,
    from_sizes,
    load_published,
    untie_as_in,
)
from lavis_lstp.models.answer.lora import add_lora, matched, merge_lora
from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD

IGNORED = -100
"""Label of a position that no loss looks at, as in torch and transformers."""


class Backbone(nn.Module):
    """One class for both families and both kinds of language model (T5: encoder-decoder, LLaMA: decoder-only).

    Args:
        model: the transformers model.
        tokenizer: of the language model.
        qformer_tokenizer: for InstructBLIP, whose Q-Former reads the prompt too; None for BLIP-2.
        max_text_tokens: prompts and answers are cut to this many tokens (published: 128 for video data).
    """

    PARTS: Mapping[str, tuple[str, ...]] = {
        "vision": ("model.vision_model.",),
        "qformer": ("model.qformer.",),
        "query_tokens": ("model.query_tokens",),
        "projection": ("model.language_projection.",),
        "language_model": ("model.language_model.",),
    }
    """Part -> how the keys of its weights begin."""

    def __init__(self, model: nn.Module, tokenizer, qformer_tokenizer=None, *, max_text_tokens: int = 128):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.qformer_tokenizer = qformer_tokenizer
        self.max_text_tokens = max_text_tokens

    @classmethod
    def from_pretrained(cls, path: str, *, family: str, max_text_tokens: int = 128, **settings) -> Backbone:
        """Published weights; `settings` as for `backbone_loading.load_published`."""
        return cls(*load_published(path, family=family, **settings), max_text_tokens=max_text_tokens)

    @classmethod
    def from_config_dict(cls, config: Mapping, *, family: str, max_text_tokens: int = 128, **settings) -> Backbone:
        """Random weights; `settings` as for `backbone_loading.from_sizes`."""
        return cls(*from_sizes(config, family=family, **settings), max_text_tokens=max_text_tokens)

    # ---- the parts; all that differs in a subclass over other classes' models --------------------------------------

    @property
    def vision_model(self) -> nn.Module:
        return self.model.vision_model

    @property
    def qformer(self) -> nn.Module:
        return self.model.qformer

    @property
    def query_tokens(self) -> Tensor:
        """[1,Q,D]"""
        return self.model.query_tokens

    @property
    def projection(self) -> nn.Linear:
        return self.model.language_projection

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @property
    def is_encoder_decoder(self) -> bool:
        """T5 is; LLaMA, which goes on from the prompt, is not."""
        return self.language_model.config.is_encoder_decoder

    @property
    def reads_question(self) -> bool:
        """The Q-Former does, so that what it sees in a frame depends on the question."""
        return self.qformer_tokenizer is not None

    @property
    def num_query_tokens(self) -> int:
        return self.query_tokens.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the frames that the vision tower takes, in px."""
        return self.model.config.vision_config.image_size

    def _vision(self, pixels: Tensor) -> Tensor:
        """Normalised frames [M,3,S,S] -> last hidden state, after its layer norm [M,P,D_vision]."""
        return self.vision_model(pixel_values=pixels).last_hidden_state

    def _qformer(self, queries: Tensor, features: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The Q-Former's last hidden state [M,Q or more,D].

        Args:
            queries: [M,Q,D]; features: [M,P,D_vision].
            text: input_ids [M,S] and attention_mask [M,Q+S] where the Q-Former reads the prompt, else nothing.
        """
        ones = features.new_ones(features.shape[:2], dtype=torch.long)
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=ones, **text
        ).last_hidden_state

    # ---- vision -----------------------------------------------------------------------------------------------

    def image_features(self, frames: Tensor) -> Tensor:
        """uint8 frames [M,3,H,W] -> vision tower's last hidden state (after its layer norm) [M,P,D_vision].

        Raises:
            ConfigError: the frames are not of the vision tower's size.
        """
        size = self.image_size
        if tuple(frames.shape[-2:]) != (size, size):
            raise ConfigError(
                f"the vision tower takes frames of {size}x{size} px, the data set gives "
                f"{frames.shape[-1]}x{frames.shape[-2]}; set datasets.<name>.image_size: {size}"
            )
        mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
        return self._vision(((frames.float() / 255 - mean) / std).to(dtype_of(self.vision_model)))

    def frame_tokens(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Q-Former output per frame.

        Args:
            features: [M,P,D_vision], one row per frame.
            prompts: M strings, the prompt of each frame's sample (InstructBLIP's Q-Former reads it; BLIP-2's not).

        Returns:
            [M,Q,D]: the outputs at the Q query positions.
        """
        count = features.shape[0]
        dtype = dtype_of(self.qformer)
        features, queries = features.to(dtype), self.query_tokens.to(dtype).expand(count, -1, -1)
        inputs = {}
        if self.reads_question:
            unique = list(dict.fromkeys(prompts))
            text = self._tokenize(self.qformer_tokenizer, unique, "right").to(features.device)
            row = torch.tensor([unique.index(p) for p in prompts], device=features.device)
            ones = text["attention_mask"].new_ones(count, queries.shape[1])
            inputs["input_ids"] = text["input_ids"][row]
            inputs["attention_mask"] = torch.cat([ones, text["attention_mask"][row]], dim=1)
        return self._qformer(queries, features, inputs)[:, : queries.shape[1]]

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens of the Q-Former [...,D] -> what the language model reads [...,D_llm]."""
        return self.projection(tokens.to(self.projection.weight.dtype))

    # ---- language ---------------------------------------------------------------------------------------------

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
        """What the language model reads before the answer: inputs [B,S,D_llm] and their mask, real positions first."""
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

    def generate(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        prompts: list[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        **settings,
    ) -> list[str]:
        """Answers, one string a row.

        Args:
            generators: one a row, where tokens are drawn (do_sample).
            settings: transformers' generation arguments (max_new_tokens, ...); see `models/generation.py`.

        Raises:
            ConfigError: a setting is not known or not supported.
        """
        return self._texts(self._generate(prefix, prefix_mask, prompts, self._arguments(settings, prompts, generators)))

    @torch.no_grad()
    def generate_scored(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        prompts: list[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        **settings,
    ) -> tuple[list[str], Tensor, Tensor]:
        """Answers as `generate` gives them, and how sure the language model was of each.

        Returns:
            B strings; the log-probability of their tokens up to the end mark, itself included, summed, float32 [B];
            the number of these tokens, int64 [B]. Probabilities are the model's own, before temperature, top_p and
            penalties.
        """
        wanted = {**self._arguments(settings, prompts, generators), "return_dict_in_generate": True}
        made = self._generate(prefix, prefix_mask, prompts, {**wanted, "output_logits": True})
        scores = self.language_model.compute_transition_scores(
            made.sequences, made.logits, getattr(made, "beam_indices", None), normalize_logits=True
        ).float()
        ids = made.sequences[:, -scores.shape[1] :]
        ended = torch.isin(ids, ids.new_tensor(self._end_ids)).long()
        real = ended.cumsum(1) - ended == 0  # up to the first end mark
        return self._texts(made.sequences), scores.where(real, scores.new_zeros(())).sum(1), real.sum(1)

    def _texts(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _arguments(
        self, settings: Mapping, prompts: list[str], generators: Sequence[torch.Generator] | None
    ) -> dict[str, object]:
        """Arguments of transformers' `generate`, but for inputs and special ids."""
        settings = checked(settings, encoder_decoder=self.is_encoder_decoder)
        model, embeddings = self.language_model, self.language_model.get_input_embeddings()
        return arguments(settings, model.generation_config, len(prompts), generators, embeddings.weight.device)

    @torch.no_grad()
    def _generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], settings: Mapping):
        """What transformers' `generate` gives: ids of the answers [B,S], or with return_dict_in_generate more."""
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
        """Ids that end an answer: the end marks of the tokenizer, the generation config and the model's config.

        A decoder-only model ends at the padding of its config as well, and at the begin mark of its config where that
        is not the tokenizer's. The text config of published LLaMA checkpoints has 0 and 1 as marks, their tokenizer 1
        and 2; with them, an id 0 in an output means the end.
        """
        config, generation = self.language_model.config, self.language_model.generation_config
        marks = [self.tokenizer.eos_token_id, generation.eos_token_id]
        if not self.is_encoder_decoder:
            marks += [config.pad_token_id, config.eos_token_id]
            if config.bos_token_id != self.tokenizer.bos_token_id:
                marks.append(config.bos_token_id)
        ids = [i for mark in marks for i in (mark if isinstance(mark, list | tuple) else [mark])]
        return list(dict.fromkeys(i for i in ids if i is not None and i >= 0))

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
        untie_as_in(self, inner, self.language_model)
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
