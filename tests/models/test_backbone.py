"""The backbone: loading as 7B weights are loaded, and switches that change speed and memory but no number."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.answer import loading as backbone_loading
from lavis_lstp.models.answer.language import PrefixReading
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.building import build_backbone
from lavis_lstp.testing.tiny_backbones import Sizes
from lavis_lstp.testing.tiny_checkpoints import write_all

FOLDERS = {
    "instructblip-vicuna-7b": "instructblip",
    "instructblip-flan-t5-xl": "instructblip",
    "blip2-flan-t5-xl": "blip2",
}
LLAMA, T5 = "instructblip-vicuna-7b", "blip2-flan-t5-xl"
PROMPTS, ANSWERS = ["USER: what moves? ASSISTANT: ", "where is the star?"], ["a red star</s>", "left</s>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("hub") / "weights", only=FOLDERS)


def build(folders, name: str, **settings) -> Backbone:
    return build_backbone(FOLDERS[name], weights=str(folders[name]), **settings).eval()


def frames_of(backbone: Backbone, count: int = 2) -> Tensor:
    size, generator = backbone.image_size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def loss_of(backbone: Backbone, prompts=PROMPTS, answers=ANSWERS) -> Tensor:
    """The whole path, one frame a row."""
    tokens = backbone.frame_tokens(backbone.image_features(frames_of(backbone, len(prompts))), prompts)
    prefix = backbone.project(tokens)
    return backbone.lm_loss(prefix, torch.ones(prefix.shape[:2], dtype=torch.long), prompts, answers)


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    return {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(value.abs().max().item(), 0.01)  # gradients that are 0 but for rounding
        assert (got[key] - value).abs().max().item() <= tolerance * scale, key


# ---- loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_weight_is_that_of_the_files(folders, name):
    """Sharded or not; FLAN-T5's output layer differs from its input embedding."""
    backbone = build(folders, name)
    files = {key: value for file in folders[name].glob("*.safetensors") for key, value in load_file(file).items()}
    own = backbone.model.state_dict()
    assert files.keys() <= own.keys()
    assert all(torch.equal(own[key], value) for key, value in files.items())
    assert all(key.endswith("coder.embed_tokens.weight") for key in own.keys() - files.keys())
    if "t5" in name:
        head, shared = (own[f"language_model.{key}.weight"] for key in ("lm_head", "shared"))
        assert not torch.equal(head, shared)
        assert torch.equal(own["language_model.encoder.embed_tokens.weight"], shared)


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_and_loaded_again(folders, name, tmp_path):
    backbone = build(folders, name)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    if backbone.qformer_tokenizer is not None:
        backbone.qformer_tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    again = build_backbone(FOLDERS[name], weights=str(tmp_path)).eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in backbone.state_dict().items())
    assert loss_of(again).item() == pytest.approx(loss_of(backbone).item(), rel=1e-6)
    if "t5" in name:  # by this line transformers 4 decides whether to tie and to scale
        assert json.loads((tmp_path / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_a_t5_from_sizes_has_two_embeddings_where_its_config_says_so():
    """transformers 5 ties them whatever the config says."""
    text = {"model_type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (False, True):
        config = {
            "text_config": {**text, "hidden_size": 16, "tie_word_embeddings": tied},
            "vision_config": {**vision, "image_size": 16, "patch_size": 8},
            "qformer_config": qformer,
            "num_query_tokens": 2,
        }
        lm = build_backbone("blip2", config=config).language_model
        assert (lm.lm_head.weight is lm.shared.weight) is tied
        assert lm.shared.weight is lm.encoder.embed_tokens.weight is lm.decoder.embed_tokens.weight
    state = {key: torch.randn_like(value) for key, value in lm.state_dict().items()}
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state[key] = state["shared.weight"]
    with torch.device("meta"):
        empty = build_backbone("blip2", config={**config, "text_config": {**text, "hidden_size": 16}})
    empty.language_model.load_state_dict(state, assign=True)
    assert all(torch.equal(value, state[key]) for key, value in empty.language_model.state_dict().items())


@pytest.mark.parametrize("name", FOLDERS)
def test_generation_and_labels_with_published_special_ids(folders, name):
    """LLaMA's text config says pad -1, eos 1, bos 0 and image_token_index null; the tokenizer is right."""
    config = json.loads((folders[name] / "config.json").read_text())
    assert config["image_token_index"] is None
    assert name != LLAMA or [config["text_config"][f"{k}_token_id"] for k in ("pad", "eos", "bos")] == [-1, 1, 0]
    backbone = build(folders, name)
    prefix, mask = torch.randn(2, 3, backbone.projection.out_features), torch.ones(2, 3, dtype=torch.long)
    answers = backbone.generate(prefix, mask, PROMPTS, max_new_tokens=3).texts
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert backbone._pad_id == backbone.tokenizer.pad_token_id >= 0


def test_weights_of_the_other_family(folders, tmp_path):
    instruct = folders["instructblip-flan-t5-xl"]
    shutil.copytree(folders[T5], tmp_path / "mixed")
    shutil.copy(instruct / "config.json", tmp_path / "mixed")
    shutil.copytree(instruct / "qformer_tokenizer", tmp_path / "mixed" / "qformer_tokenizer")
    with pytest.raises(WeightsError, match=r"lacks \d+ weights of instructblip, first .*family"):
        build_backbone("instructblip", weights=str(tmp_path / "mixed"))


OFFLINE = """
import time
from lavis_lstp.models.building import build_backbone, sampler_tokenizer
from lavis_lstp.errors import WeightsError
for get in (lambda: build_backbone("instructblip", weights="Salesforce/instructblip-vicuna-7b"),
            lambda: sampler_tokenizer("google-bert/bert-base-uncased", None)):
    start = time.monotonic()
    try:
        get()
    except WeightsError as error:
        print(time.monotonic() - start, "|", error)
"""


@pytest.mark.parametrize("offline", ["1", "0"])
def test_without_the_hub_it_takes_seconds_to_say_what_to_put_where(tmp_path, offline):
    """In offline mode, and where nothing answers at the hub's address (it would be asked for 25 s a file)."""
    env = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env.pop("LAVIS_LSTP_WEIGHTS", None)
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line, name in zip(lines, ("Salesforce/instructblip-vicuna-7b", "google-bert/bert-base-uncased"), strict=True):
        seconds, _, message = line.partition("|")
        assert float(seconds) < 20
        assert f"put it at $LAVIS_LSTP_WEIGHTS/{name}" in message
    assert "config.json, *.safetensors and tokenizer files" in lines[0]


def test_weights_below_the_environments_folder(folders, monkeypatch):
    monkeypatch.setenv("LAVIS_LSTP_WEIGHTS", str(folders[T5].parent))
    assert build_backbone("blip2", weights=T5).num_query_tokens == build(folders, T5).num_query_tokens


MEMORY = """
import json, sys, threading, torch
from lavis_lstp.models.answer.loading import load_published

def used():
    with open("/proc/self/status") as file:
        pairs = dict(line.split(":", 1) for line in file)
    return {key: int(pairs[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS", "VmHWM")}

small, folder, family, dtype = sys.argv[1:]
load_published(small, family=family, dtype=dtype)  # modules and buffers that any first load takes
before, peak, stop = used(), [0], threading.Event()

def watch():
    while not stop.wait(0.001):
        peak[0] = max(peak[0], used()["RssAnon"])

thread = threading.Thread(target=watch)
thread.start()
model = load_published(folder, family=family, dtype=dtype).model
with torch.no_grad():
    for parameter in model.parameters():
        parameter.sum()  # weights that are mapped from the file become resident when they are used
stop.set()
thread.join()
after = used()
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({
    "megabytes": size / 1e6,
    "own": (max(peak[0], after["RssAnon"]) - before["RssAnon"]) / size,
    "all": (after["VmHWM"] - before["VmRSS"]) / size,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [LLAMA, "instructblip-flan-t5-xl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_the_weights_once(folders, tmp_path, name, dtype):
    """Peak over the memory before, at most 1.1 times the weights. With another dtype than the file's, pages of the
    file itself are resident too, which the system takes back when it needs them; they are not counted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc, which this system does not have")
    sizes = Sizes(text_width=896, layers=12 if name == LLAMA else 6)
    big = write_all(tmp_path / "weights", only=[name], sizes=sizes)[name]
    command = [sys.executable, "-c", MEMORY, str(folders[name]), str(big), FOLDERS[name], dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["megabytes"] > 150
    assert found["own"] <= 1.1, found
    if dtype == "float32":
        assert 0.9 <= found["all"] <= 1.1, found


# ---- attention, quantisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLAMA, T5])
def test_eager_and_sdpa_agree(folders, name):
    losses = {}
    for attention in ("eager", "sdpa"):
        backbone = build(folders, name, attention=attention)
        losses[attention] = loss_of(backbone).item()
        parts = [backbone.vision_model] + [backbone.language_model] * (name == LLAMA)  # 4.57's T5 has no sdpa
        assert {part.config._attn_implementation for part in parts} == {attention}
    assert losses["eager"] == pytest.approx(losses["sdpa"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention": "sdpaa"}, "unknown attention .*did you mean 'sdpa'"),
        ({"quantization": "8bits"}, "unknown quantization .*did you mean '8bit'"),
        ({"source": "hubs"}, "unknown source .*did you mean 'hub'"),
        ({"source": "lavis", "attention": "sdpa"}, "attention is for source hub"),
        ({"weights": None, "config": {"x": 1}, "quantization": "8bit"}, "needs model.backbone.weights"),
    ],
)
def test_settings_that_cannot_be_followed_are_one_line(folders, settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_backbone(**{"family": "blip2", "weights": str(folders[T5]), **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "settings"),
    [("flash_attn", {"attention": "flash_attention_2"}), ("bitsandbytes", {"quantization": "4bit"})],
)
def test_packages_that_are_missing_are_named(folders, monkeypatch, package, settings):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=f"{package.replace('_attn', '-attn')}, which is not installed; pip install"):
        build(folders, T5, **settings)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantisation_reaches_transformers(folders, monkeypatch, kind):
    """bitsandbytes needs a CUDA device; here only what it would be told is looked at."""
    found = importlib.util.find_spec
    fake = SimpleNamespace(name="bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: fake if name == fake.name else found(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        build(folders, T5, quantization=kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)
    asked = {}

    def from_pretrained(**settings):
        asked.update(settings)
        raise OSError("far enough")

    monkeypatch.setattr(transformers.Blip2ForConditionalGeneration, "from_pretrained", from_pretrained)
    with pytest.raises(WeightsError, match="far enough"):
        build(folders, T5, quantization=kind, dtype="bfloat16")
    config = asked["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (kind == "8bit", kind == "4bit")
    assert config.llm_int8_skip_modules == list(backbone_loading.NOT_QUANTIZED)
    assert kind == "8bit" or config.bnb_4bit_compute_dtype == torch.bfloat16


def test_only_layers_of_the_language_model_are_quantised(folders):
    """By the rule that transformers follows: a name, or the begin of one, is skipped."""
    skipped = backbone_loading.NOT_QUANTIZED
    for name in FOLDERS:
        model = build(folders, name).model
        linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
        left = [key for key in linear if not any(key == name or f"{name}." in key for name in skipped)]
        assert left and all(key.startswith("language_model.") for key in left)
        assert not any("lm_head" in key for key in left)


# ---- gradient checkpointing, compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("learning", ["all", "projection"])
def test_gradient_checkpointing_changes_nothing(folders, name, learning):
    """With everything learning and dropout on; and with a frozen language model in eval mode, whose inputs alone
    need gradients."""
    found = []
    for switch in (False, True):
        backbone = build(folders, name, gradient_checkpointing=switch)
        if learning == "all":
            backbone.train()
        else:
            backbone.requires_grad_(False)
            backbone.projection.requires_grad_(True)
        torch.manual_seed(0)
        loss = loss_of(backbone)
        loss.backward()
        found.append((loss.item(), gradients(backbone)))
    (plain, wanted), (loss, got) = found
    assert loss == pytest.approx(plain, abs=1e-6)
    assert_close(got, wanted, 1e-6)
    assert len(wanted) == 2 if learning == "projection" else len(wanted) > 50


@pytest.mark.parametrize("name", [LLAMA, T5])
def test_gradient_checkpointing_keeps_no_activations_of_a_frozen_language_model(folders, name):
    def kept(switch: bool) -> int:
        backbone = build(folders, name, gradient_checkpointing=switch)
        backbone.requires_grad_(False)
        backbone.projection.requires_grad_(True)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(backbone)
        return total

    assert kept(True) < kept(False) / 2


def test_a_copy_of_a_checkpointed_backbone_computes_with_its_own_weights(folders):
    backbone = build(folders, LLAMA, gradient_checkpointing=True)
    copied = copy.deepcopy(backbone)
    before = loss_of(copied).item()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert loss_of(copied).item() == before


def test_compiled_layers_change_nothing(folders):
    """Traced by the compiler's front end and run as traced; the slow test runs what the compiler makes of it."""
    plain, traced = torch._dynamo.lookup_backend("aot_eager"), []

    def backend(graph, inputs):
        traced.append(torch.is_grad_enabled())
        return plain(graph, inputs)

    check_compiled(folders, LLAMA, backend=backend)
    assert traced and all(traced)  # and not for answers, whose length changes with each token


@pytest.mark.slow
@pytest.mark.parametrize("name", [LLAMA, T5])
def test_compiled_code_changes_nothing(folders, name):
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    check_compiled(folders, name, backend="inductor")


def check_compiled(folders, name, backend):
    """Loss to 1e-5; gradients to 1e-4, because fused operations round otherwise."""
    plain, compiled = build(folders, name), build(folders, name, gradient_checkpointing=True)
    keys = list(compiled.state_dict())
    torch._dynamo.reset()
    compiled.compile_layers(backend=backend)
    assert list(compiled.state_dict()) == keys
    for backbone in (plain, compiled):
        loss_of(backbone).backward()
    assert loss_of(compiled).item() == pytest.approx(loss_of(plain).item(), abs=1e-5)
    assert_close(gradients(compiled), gradients(plain), 1e-4)
    prefix, mask = torch.ones(2, 3, plain.projection.out_features), torch.ones(2, 3, dtype=torch.long)
    wanted = plain.generate(prefix, mask, PROMPTS, max_new_tokens=4).texts
    assert compiled.generate(prefix, mask, PROMPTS, max_new_tokens=4).texts == wanted


# ---- number types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_near_float32(folders, name, autocast):
    """bfloat16 has 8 bits: the loss of about 6 may be off by 1 %. Parts that learn are in float32 among it."""
    wanted = loss_of(build(folders, name)).item()
    for learning in ((), ("projection",), ("qformer", "query_tokens"), ("vision", "language_model")):
        backbone = build(folders, name, dtype="bfloat16")
        begins = tuple(begin for part in learning for begin in Backbone.PARTS[part])
        for key, parameter in backbone.named_parameters():
            if key.startswith(begins):
                parameter.data = parameter.data.float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(backbone)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted, rel=0.01), learning
        loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(backbone).values())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert loss_of(build(folders, name)).item() == pytest.approx(wanted, rel=0.01)


def test_frames_are_normalised_in_float32(folders, monkeypatch):
    """Also after everything of the model was cast, as some trainers do."""
    seen = []
    monkeypatch.setattr(Backbone, "_vision", lambda self, pixels: seen.append(pixels))
    for backbone in (build(folders, T5), build(folders, T5).bfloat16()):
        backbone.image_features(frames_of(backbone))
    assert seen[1].dtype == torch.bfloat16
    assert torch.equal(seen[0].bfloat16(), seen[1])


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_of_rows_with_and_without_frames_is_that_of_each_alone(folders, name, attention):
    """Token-weighted: rows without a prefix, with half of one, and with another prompt's length."""
    backbone = build(folders, name, attention=attention)
    prompts, answers = [*PROMPTS, "hm"], [*ANSWERS, "it is the star"]
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(3, 4, backbone.projection.out_features, generator=generator).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    together = backbone.lm_loss(prefix, mask, prompts, answers)
    total, count = 0.0, 0
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = prefix[i : i + 1, mask[i].bool()]
        alone = backbone.lm_loss(row, torch.ones(row.shape[:2], dtype=torch.long), [prompt], [answer])
        tokens = len(backbone.tokenizer(answer)["input_ids"]) - (not backbone.is_encoder_decoder)
        total, count = total + alone.item() * tokens, count + tokens
        generated = backbone.generate(
            row, torch.ones(row.shape[:2], dtype=torch.long), [prompt], max_new_tokens=4
        ).texts
        assert backbone.generate(prefix, mask, prompts, max_new_tokens=4).texts[i : i + 1] == generated
    assert together.item() == pytest.approx(total / count, rel=1e-5)
    together.backward()
    assert prefix.grad.isfinite().all() and (prefix.grad[mask == 0] == 0).all()


def test_a_batch_without_an_answer_costs_nothing(folders):
    backbone = build(folders, LLAMA)
    prefix = torch.randn(2, 3, backbone.projection.out_features, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.long)
    loss = backbone.lm_loss(prefix, mask, PROMPTS, ["", ""])
    loss.backward()
    assert loss.item() == 0 and (prefix.grad == 0).all()
    one = backbone.lm_loss(prefix, mask, PROMPTS, ["red", ""])
    alone = backbone.lm_loss(prefix[:1], mask[:1], PROMPTS[:1], ["red"])
    assert one.item() == pytest.approx(alone.item(), rel=1e-5)


class PatchBackbone(Backbone):
    """Another kind of answerer: patches of the frames, no Q-Former, a language model without a begin mark."""

    PARTS = {"vision": ("eye.",), "projection": ("bridge.",), "language_model": ("tongue.",)}
    image_size = 64
    vision_model = property(lambda self: self.eye)
    projection = property(lambda self: self.bridge)
    language_model = property(lambda self: self.tongue)

    def __init__(self):
        tokenizer = tiny_tokenizer(bos=False)
        super().__init__(None, tokenizer)
        self.eye = nn.Conv2d(3, 32, 16, stride=16)
        self.bridge = nn.Linear(32, 48)
        marks = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        sizes = {"vocab_size": len(tokenizer), "n_embd": 48, "n_layer": 1, "n_head": 2, "n_positions": 256}
        self.tongue = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **marks))

    def _vision(self, pixels: Tensor) -> Tensor:
        return self.eye(pixels).flatten(2).transpose(1, 2)

    def frame_tokens(self, features: Tensor, prompts: list[str]) -> Tensor:
        return features


def test_a_backbone_without_a_qformer_learns_and_answers():
    backbone = PatchBackbone().eval()
    loss_of(backbone).backward()
    assert set(gradients(backbone)) == {key for key, _ in backbone.named_parameters()}
    prefix = backbone.project(backbone.frame_tokens(backbone.image_features(frames_of(backbone)), PROMPTS))
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    texts, log_probs, counts = backbone.generate(prefix, mask, PROMPTS, max_new_tokens=3)
    assert len(texts) == 2 and counts.tolist() == [3, 3] and (log_probs < 0).all()
    scored, numbers, _ = PrefixReading(backbone, prefix, mask, PROMPTS).log_probs([0, 1], ANSWERS)
    expected = -loss_of(backbone) * numbers.sum()
    torch.testing.assert_close(scored.sum(), expected.detach(), rtol=1e-4, atol=1e-4)
