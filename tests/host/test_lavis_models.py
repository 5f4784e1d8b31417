"""LAVIS's own models under the installed transformers, with the tiny weights of lavis_tiny.

Runs on 5.x and on 4.57.6 (`make test-matrix`). What `generate` gives is compared with a loop without a cache written
here, batches with their single rows, beam search with trying every sequence. The losses were recorded on 4.57.6, from
the same seeded weights, and have to come out the same on every version.
"""

from __future__ import annotations

import lavis_tiny
import pytest
import torch
import torch.distributed as dist
from lavis_tiny import HEADS, IMAGE_SIZE, QUERIES, WIDTH, WORDS, build
from safetensors.torch import load_file

MODELS = ("blip2", "blip2_t5", "blip2_opt", "blip_caption")
LOSSES = {"blip2": 6.293456, "blip2_t5": 4.617587, "blip2_opt": 6.051108, "blip_caption": 3.641882}
TEXT = ["a picture of a red circle", "a picture of the blue square moves left"]
ANSWERS = ["red circle", "blue"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder of tiny weights, as working directory, and the process group of one that blip2's loss needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with lavis_tiny.hub(tmp_path_factory.mktemp("hub")) as root:
        yield root
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(hub):
    """Model name -> the tiny model, in eval mode and unchanged by the tests that share it."""
    return {name: build(name, hub) for name in MODELS}


@pytest.fixture
def image():
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def samples(image):
    return {"image": image, "text_input": list(TEXT), "text_output": list(ANSWERS)}


# ---- loading


def test_qformer_holds_the_checkpoint(hub, models):
    saved = {
        key.replace("gamma", "weight").replace("beta", "bias"): value for key, value in _saved(hub, "bert").items()
    }
    qformer = models["blip2"].Qformer
    state = qformer.state_dict()
    # LAVIS has no pooler, and one position of the vocabulary more, for [DEC].
    for key in (key for key in saved if "pooler" not in key and "token_type" not in key):
        assert torch.equal(state[key][: len(saved[key])], saved[key]), key
    head, embeddings = qformer.cls.predictions, qformer.bert.embeddings
    assert head.decoder.weight is embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias and len(head.bias) == len(models["blip2"].tokenizer)
    assert torch.equal(embeddings.position_ids, torch.arange(64)[None])
    assert torch.equal(
        state["bert.encoder.layer.1.output_query.dense.weight"], saved["bert.encoder.layer.1.output.dense.weight"]
    )


def test_t5_keeps_its_own_lm_head(hub, models):
    saved, t5 = _saved(hub, "tiny-flan-t5"), models["blip2_t5"].t5_model
    state = t5.state_dict()
    for key, value in saved.items():  # LAVIS turns T5 into bfloat16
        torch.testing.assert_close(state[key], value.bfloat16().float(), rtol=0, atol=0, msg=key)
    assert not torch.equal(state["shared.weight"], state["lm_head.weight"])
    assert t5.encoder.embed_tokens.weight.data_ptr() == t5.shared.weight.data_ptr()
    assert isinstance(t5.encoder.block[0].layer[1].DenseReluDense.act, torch.nn.Module)


def test_opt_ties_its_lm_head(hub, models):
    saved, opt = _saved(hub, "tiny-opt"), models["blip2_opt"].opt_model
    assert opt.lm_head.weight is opt.model.decoder.embed_tokens.weight
    for key, value in saved.items():
        torch.testing.assert_close(opt.state_dict()[key], value.float(), rtol=0, atol=0, msg=key)


def test_no_buffer_is_left_uninitialised(models):
    for name, model in models.items():
        for key, buffer in model.named_buffers():
            if key.endswith("position_ids"):
                assert torch.equal(buffer, torch.arange(buffer.shape[-1])[None]), (name, key)


def _saved(hub, name):
    folder = {"bert": "bert-base-uncased"}.get(name, name)
    return load_file(hub / folder / "model.safetensors")


# ---- training


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_same_on_every_version(models, image, name):
    with torch.no_grad():
        loss = models[name](samples(image))["loss"].item()
    assert loss == pytest.approx(LOSSES[name], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_gets_a_gradient(models, image, name):
    model = models[name]
    model.zero_grad()
    model(samples(image))["loss"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) > 20
    assert [key for key, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert sum(grad.abs().sum() > 0 for grad in gradients.values()) > 0.8 * len(gradients)


def test_t5_learns_one_batch(hub, image):
    model = build("blip2_t5", hub)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(samples(image))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


def test_t5_reduction_none_sums_each_row(models):
    t5 = models["blip2_t5"].t5_model
    ids, labels = torch.tensor([[5, 6, 1], [7, 8, 1]]), torch.tensor([[9, 1, -100], [10, 11, 1]])
    with torch.no_grad():
        mean = t5(input_ids=ids, labels=labels).loss
        rows = t5(input_ids=ids, labels=labels, reduction="none").loss
    assert rows.shape == (2,)
    torch.testing.assert_close(rows.sum() / 5, mean)


# ---- generating


def _visual(model, image):
    """Image features [B,P,D] with their mask, and query tokens [B,Q,D], as LAVIS's forwards make them."""
    features = model.ln_vision(model.visual_encoder(image))
    return features, torch.ones(features.shape[:2], dtype=torch.long), model.query_tokens.expand(len(image), -1, -1)


def _next_token(name, model, image):
    """(start ids [B,S], function ids [B,S] -> logits [B,V] of the next token, without any cache, end token)."""
    ones = torch.ones
    if name == "blip_caption":
        features = model.visual_encoder.forward_features(image)
        ids = model.tokenizer([model.prompt] * len(image), return_tensors="pt").input_ids[:, :-1].clone()
        ids[:, 0] = model.tokenizer.bos_token_id

        def forward(ids):
            return model.text_decoder(
                ids,
                attention_mask=ones(ids.shape, dtype=torch.long),
                encoder_hidden_states=features,
                encoder_attention_mask=ones(features.shape[:2], dtype=torch.long),
                use_cache=False,
                return_dict=True,
            )

        return ids, lambda ids: forward(ids).logits[:, -1], model.tokenizer.sep_token_id

    features, mask, queries = _visual(model, image)
    if name == "blip2":
        ids = torch.full((len(image), 1), model.tokenizer.bos_token_id)

        def forward(ids):
            return model.Qformer(
                ids,
                query_embeds=queries,
                attention_mask=ones(len(ids), QUERIES + ids.shape[1], dtype=torch.long),
                encoder_hidden_states=features,
                encoder_attention_mask=mask,
                use_cache=False,
                return_dict=True,
            )

        return ids, lambda ids: forward(ids).logits[:, -1], model.tokenizer.sep_token_id

    seen = model.Qformer.bert(
        query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=mask, return_dict=True
    ).last_hidden_state
    if name == "blip2_opt":
        prefix, start = model.opt_proj(seen), model.opt_tokenizer([model.prompt] * len(image), return_tensors="pt")

        def forward(ids):
            embeds = torch.cat([prefix, model.opt_model.get_input_embeddings()(ids)], dim=1)
            return model.opt_model(inputs_embeds=embeds, use_cache=False, return_dict=True)

        return start.input_ids, lambda ids: forward(ids).logits[:, -1], model.eos_token_id

    prompt = model.t5_tokenizer(["what shape is it ?"] * len(image), return_tensors="pt").input_ids
    embeds = torch.cat([model.t5_proj(seen), model.t5_model.shared(prompt)], dim=1)

    def forward(ids):
        return model.t5_model(inputs_embeds=embeds, decoder_input_ids=ids, use_cache=False, return_dict=True)

    return torch.zeros(len(image), 1, dtype=torch.long), lambda ids: forward(ids).logits[:, -1], 1


def _decoded(name, model, monkeypatch, image, **settings):
    """The token ids that LAVIS's `generate` hands to its tokenizer, as lists without padding."""
    seen = []
    tokenizer = {"blip2_t5": "t5_tokenizer", "blip2_opt": "opt_tokenizer"}.get(name, "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(
            type(getattr(model, tokenizer)),
            "batch_decode",
            lambda self, ids, **_: seen.extend(ids.tolist()) or ["" for _ in ids],
        )
        texts = model.generate(
            {"image": image, **({"prompt": "what shape is it ?"} if name == "blip2_t5" else {})}, **settings
        )
    assert len(texts) == len(seen)
    return seen


def _cut(ids, end, start=0):
    ids = ids[start:]
    return ids[: ids.index(end)] if end in ids else ids


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_is_argmax_without_cache(models, image, monkeypatch, name):
    model, new = models[name], 10
    ids, logits, end = _next_token(name, model, image)
    start = ids.shape[1]
    for _ in range(new):
        ids = torch.cat([ids, logits(ids).argmax(-1, keepdim=True)], dim=1)
    expected = [_cut(row, end, start) for row in ids.tolist()]
    # max_length is the number of new tokens for T5 and OPT, and of all tokens for the BERTs; OPT cuts its prompt off.
    length = new if name in ("blip2_t5", "blip2_opt") else start + new
    got = _decoded(name, model, monkeypatch, image, num_beams=1, max_length=length, min_length=1)
    assert [_cut(row, end, 0 if name == "blip2_opt" else start) for row in got] == expected
    assert len({tuple(row) for row in expected}) == 2, "the two images should not get the same words"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_batch_is_its_rows(models, image, monkeypatch, name, beams):
    def run(image):
        return _decoded(name, models[name], monkeypatch, image, num_beams=beams, max_length=14, min_length=1)

    pad = {"blip2_opt": 1}.get(name, 0)
    together, alone = run(image), [run(image[i : i + 1])[0] for i in range(2)]
    assert [_without_tail(row, pad) for row in together] == [_without_tail(row, pad) for row in alone]


def _without_tail(row, pad):
    while row and row[-1] == pad:
        row = row[:-1]
    return row


@pytest.mark.parametrize("name", ["blip2", "blip_caption"])
@torch.no_grad()
def test_beams_find_the_best_of_all_sequences(models, image, monkeypatch, name):
    """With as many beams as words, two new tokens are an exhaustive search."""
    model = models[name]
    ids, logits, end = _next_token(name, model, image)
    first = logits(ids).log_softmax(-1)  # [2,V]
    words = first.shape[1]
    second = torch.stack([logits(torch.cat([ids, torch.full((2, 1), w)], 1)).log_softmax(-1) for w in range(words)], 1)
    total = first[:, :, None] + second
    total[:, end], total[:, :, end] = -torch.inf, -torch.inf
    expected = [list(divmod(row.flatten().argmax().item(), words)) for row in total]
    start = ids.shape[1]
    got = _decoded(name, model, monkeypatch, image, num_beams=words, max_length=start + 2, min_length=start + 2)
    assert [row[start:] for row in got] == expected


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nucleus_sampling_follows_the_seed(models, image, name):
    model = models[name]

    def run(seed, **more):
        torch.manual_seed(seed)
        return model.generate({"image": image}, use_nucleus_sampling=True, max_length=12, min_length=1, **more)

    texts = [run(seed) for seed in range(3)]
    assert texts[0] == run(0) and all(len(row) == 2 for row in texts)
    assert texts[0] != texts[1] or texts[1] != texts[2]
    if name != "blip2":  # takes no num_captions
        assert len(run(0, num_captions=3)) == 6


def test_t5_answers_questions(models, image):
    answers = models["blip2_t5"].predict_answers({"image": image, "text_input": TEXT}, num_beams=2, max_len=4)
    assert len(answers) == 2 and set(" ".join(answers).split()) <= {*WORDS, "?"}


def test_qformer_extracts_features(models, image):
    for mode, field, length in (("image", "image_embeds", QUERIES), ("multimodal", "multimodal_embeds", QUERIES)):
        out = models["blip2"].extract_features({"image": image, "text_input": TEXT}, mode=mode)
        assert getattr(out, field).shape == (2, length, WIDTH) and getattr(out, field).isfinite().all()


def test_head_mask_switches_heads_off(models, image):
    """The masks that 5.x no longer makes reach LAVIS's attention: with every head off, text cannot see the image."""
    model = models["blip2"]
    features, mask, queries = _visual(model, image)

    def run(**more):
        given = {"query_embeds": queries, "encoder_hidden_states": features, "encoder_attention_mask": mask}
        return model.Qformer.bert(**given, **more, return_dict=True).last_hidden_state

    with torch.no_grad():
        assert not torch.equal(run()[0], run()[1])
        torch.testing.assert_close(*run(head_mask=torch.zeros(HEADS)))
