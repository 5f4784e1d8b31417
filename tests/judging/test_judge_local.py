"""The local judge: a tiny random LLaMA can write nothing but a verdict, and the one it finds likeliest."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
from judge_server import write_predictions
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.judging.judge import main as judge
from lavis_lstp.judging.local import LocalJudge
from lavis_lstp.judging.prompts import preset
from lavis_lstp.judging.verdict import Case
from lavis_lstp.testing.tiny_tokenizers import llama_files

CASES = [Case(f"what happens in part {n}?", f"walrus {n}", "a seal" * (1 + n % 5)) for n in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA with weights so large that different prompts get different verdicts."""
    folder = tmp_path_factory.mktemp("judge") / "tiny-judge"
    files = llama_files()
    config = LlamaConfig(
        vocab_size=520,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1500,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def verdicts(local, cases=CASES):
    found = {}

    def keep(case, verdict):
        assert case not in found
        found[case] = verdict

    local.judge(cases, keep)
    assert set(found) == set(cases)
    return {case: (v.correct, v.score) for case, v in found.items()}


def test_the_likeliest_verdict_and_nothing_else(folder):
    local = LocalJudge(str(folder), preset("strict"))
    found = verdicts(local)
    assert len(Counter(found.values())) > 1, "the model has opinions"
    assert verdicts(LocalJudge(str(folder), preset("strict"), batch_size=1)) == found
    model = LlamaForCausalLM.from_pretrained(folder)
    for case in CASES[:3]:
        ids, node = local._encode(case), local._trie
        while isinstance(node, dict):  # greedy by hand, without batch, padding and cache
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            best = max(node, key=lambda token: float(logits[token]))
            ids, node = [*ids, best], node[best]
        assert node == found[case]


def test_the_prompt_counts(folder):
    strict, published = (LocalJudge(str(folder), preset(name)) for name in ("strict", "published"))
    assert verdicts(strict) != verdicts(published)
    assert strict.identity != published.identity


def test_a_chat_template_is_used(folder, tmp_path):
    plain = LocalJudge(str(folder), preset("strict"))
    shutil.copytree(folder, tmp_path / "chat")
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<judge>"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    chat = LocalJudge(str(tmp_path / "chat"), preset("strict"))
    text = chat._tokenizer.decode(chat._encode(CASES[0]))
    assert text.startswith("<user>You grade answers") and text.endswith("<judge>")
    assert chat.identity != plain.identity


def test_pinned_by_its_weights(folder, tmp_path):
    first = LocalJudge(str(folder), preset("strict"))
    digest = first.identity.split("weights=")[1].split()[0]
    assert first.identity.startswith(f"local model=tiny-judge weights={digest} files=")
    LocalJudge(str(folder), preset("strict"), weights_sha256=digest)
    with pytest.raises(WeightsError, match=f"have the digest {digest}, expected {'0' * 64}"):
        LocalJudge(str(folder), preset("strict"), weights_sha256="0" * 64)
    other = tmp_path / "tiny-judge"
    shutil.copytree(folder, other)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7, 7] += 1e-3
    model.save_pretrained(other)
    assert LocalJudge(str(other), preset("strict")).identity != first.identity


def test_a_hub_id_needs_a_commit(folder, tmp_path):
    for revision in (None, "main", "abc1234"):
        with pytest.raises(ConfigError, match="needs --revision with a commit of 40 digits"):
            LocalJudge("nobody/judge", preset("strict"), revision=revision)
    with pytest.raises(WeightsError, match="cannot get 'nobody/judge' at 0000"):
        LocalJudge("nobody/judge", preset("strict"), revision="0" * 40)
    with pytest.raises(ConfigError, match="--revision is for a hub id"):
        LocalJudge(str(folder), preset("strict"), revision="0" * 40)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="holds no .*safetensors"):
        LocalJudge(str(tmp_path), preset("strict"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="no causal language model"):
        LocalJudge(str(tmp_path), preset("strict"))
    other = tmp_path / "clip"
    shutil.copytree(folder, other)
    (other / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WeightsError, match=r"no causal language model of transformers \(.{,160}\)$"):
        LocalJudge(str(other), preset("strict"))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_not_all_there_are_refused(folder, tmp_path, tied):
    other = tmp_path / "part"
    shutil.copytree(folder, other)
    if tied:
        model = LlamaForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
        model.tie_weights()
        model.save_pretrained(other)
        LocalJudge(str(other), preset("strict"))  # one matrix in two places is not missing
    weights = load_file(other / "model.safetensors")
    assert tied != ("lm_head.weight" in weights)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="lack 1 of the model's, first model.layers.1.mlp.up_proj.weight"):
        LocalJudge(str(other), preset("strict"))
    whole = (folder / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(WeightsError, match="no causal language model"):
        LocalJudge(str(other), preset("strict"))
    (other / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(WeightsError, match="no causal language model"):
        LocalJudge(str(other), preset("strict"))


def test_too_long_is_unjudged(folder):
    local = LocalJudge(str(folder), preset("strict"))
    long = Case("q", "a", "word " * 1500)
    found = verdicts(local, [*CASES[:3], long])
    assert found[long] == (None, None) and found[CASES[0]] is not None


def test_the_command_and_the_cache(folder, tmp_path, monkeypatch, capsys):
    write_predictions(tmp_path / "p.jsonl", 4)
    words = [str(tmp_path / "p.jsonl"), "--judge", "local", "--model", str(folder), "--cache", str(tmp_path / "c")]
    assert judge([*words, "--preview"]) == 0
    assert "4 to ask" in capsys.readouterr().out
    assert judge(words) == 0
    result = json.loads((tmp_path / "p_judged_local.json").read_text())
    (name,) = result["judges"]
    assert name.startswith("local model=tiny-judge weights=") and result["num_scored"] == 4
    before = (tmp_path / "p_judged_local.jsonl").read_bytes()
    monkeypatch.setattr(LocalJudge, "_answer", None)
    assert judge(words) == 0, "all of it is in the cache"
    assert (tmp_path / "p_judged_local.jsonl").read_bytes() == before
