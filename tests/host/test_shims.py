"""The shim table, the names it adds, and the packages that `import lavis` puts off."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
import types

import pytest
import torch

import lavis_lstp
from lavis_lstp.host import lazy_imports, shims
from lavis_lstp.host.shims import names


@pytest.fixture(scope="module", autouse=True)
def applied():
    lavis_lstp.register()


def _major() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])


# ---- the table


def test_the_table_says_why_and_since_when():
    assert len({row.name for row in shims.TABLE}) == len(shims.TABLE) >= 10
    for name, why, since, applied in shims.active():
        library, version = since.split()
        assert library in ("transformers", "timm", "torch", "numpy") and float(version) > 0, name
        assert len(why) > 20 and isinstance(applied, bool), name


def test_applied_only_where_missing():
    """Rows for names that transformers 4.57 still has are idle there and at work on 5.x."""
    applied = {name: applied for name, _, _, applied in shims.active()}
    assert applied[shims.BEFORE_LAVIS[0].name]
    for row in shims.BEFORE_LAVIS:
        if row.install in (names.add_model_parallel_utils, names.add_mask_methods, names.add_additional_special_tokens):
            assert applied[row.name] == (_major() >= 5), row.name


def test_applying_twice_changes_nothing():
    from transformers import PreTrainedModel, modeling_utils

    def state():
        return {**vars(modeling_utils)}, {**vars(PreTrainedModel)}, list(sys.meta_path)

    before, flags = state(), shims.active()
    shims.apply()
    shims.apply_to_lavis()
    shims.apply_to_lavis()
    assert state() == before and shims.active() == flags


def test_a_name_that_is_there_is_kept():
    owner = types.SimpleNamespace(here=1)
    assert names._add_missing(owner, here=2, gone=3)
    assert (owner.here, owner.gone) == (1, 3)
    assert not names._add_missing(owner, here=2, gone=4)
    assert (owner.here, owner.gone) == (1, 3)


# ---- the names


def test_pruning_names_work_as_lavis_uses_them():
    from transformers.modeling_utils import (
        apply_chunking_to_forward,
        find_pruneable_heads_and_indices,
        prune_linear_layer,
    )

    heads, index = find_pruneable_heads_and_indices([1, 3], 4, 2, set())
    assert heads == {1, 3} and index.tolist() == [0, 1, 4, 5]
    layer = prune_linear_layer(torch.nn.Linear(3, 8), index)
    assert layer.weight.shape == (4, 3)
    assert apply_chunking_to_forward(lambda x: x + 1, 2, 1, torch.zeros(1, 4)).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("heads", "left", "pruned"), [([0], 4, set()), ([2, 0], 3, {1}), ([3], 2, {0, 1}), ([1], 3, {1})]
)
def test_pruneable_heads_as_transformers_4(heads, left, pruned):
    """Head numbers are those of the unpruned layer; what is pruned already is not pruned again."""
    expected = {
        (0,): ({0}, [2, 3, 4, 5, 6, 7]),
        (2, 0): ({0, 2}, [4, 5]),
        (3,): ({3}, [0, 1]),
        (1,): (set(), [0, 1, 2, 3, 4, 5]),
    }[tuple(heads)]
    for find in (
        names.find_pruneable_heads_and_indices,
        sys.modules["transformers.pytorch_utils"].find_pruneable_heads_and_indices,
    ):
        found, index = find(heads, left, 2, pruned)
        assert (found, index.tolist()) == expected


def test_device_maps():
    from transformers.utils.model_parallel_utils import assert_device_map, get_device_map

    assert get_device_map(5, [0, 1]) == {0: [0, 1, 2], 1: [3, 4]}
    assert_device_map({0: [0, 1, 2], 1: [3, 4]}, 5)
    for bad in ({0: [0, 1], 1: [1, 2]}, {0: [0]}, {0: [0, 1, 2, 3]}):
        with pytest.raises(ValueError):
            assert_device_map(bad, 3)
        with pytest.raises(ValueError):
            names.assert_device_map(bad, 3)


def test_expand_mask():
    lowest = torch.finfo(torch.float16).min
    mask = names.expand_mask(torch.tensor([[1, 0]]), torch.float16, tgt_len=3)
    assert mask.shape == (1, 1, 3, 2) and mask.dtype == torch.float16
    assert mask[0, 0].tolist() == [[0, lowest]] * 3


def test_mask_methods():
    model = types.SimpleNamespace(dtype=torch.float32)
    lowest = torch.finfo(torch.float32).min
    assert names._invert_attention_mask(model, torch.tensor([[1, 0]])).tolist() == [[[[0, lowest]]]]
    assert names._invert_attention_mask(model, torch.ones(2, 3, 4)).shape == (2, 1, 3, 4)
    assert names._get_head_mask(model, None, 2) == [None, None]
    assert names._get_head_mask(model, torch.ones(4), 2).shape == (2, 1, 4, 1, 1)
    assert names._get_head_mask(model, torch.ones(2, 4), 2).shape == (2, 1, 4, 1, 1)
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    theirs = BertModel(BertConfig(**size))
    torch.testing.assert_close(
        theirs.invert_attention_mask(torch.tensor([[1, 0, 1]])),
        names._invert_attention_mask(model, torch.tensor([[1, 0, 1]])),
    )
    assert theirs.get_head_mask(torch.ones(2, 4), 2).shape == (2, 1, 4, 1, 1)


def test_additional_special_tokens(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})  # as LAVIS's BLIP does
    assert [str(token) for token in tokenizer.additional_special_tokens] == ["[ENC]"]
    assert tokenizer.additional_special_tokens_ids == [7] and tokenizer.bos_token_id == 6


# ---- packages put off


@pytest.fixture
def put_off(tmp_path, monkeypatch):
    """A package `slowpkg` that counts its imports, put off for importers named lavis.*; yields the counter."""
    package = tmp_path / "slowpkg"
    package.mkdir()
    (package / "__init__.py").write_text("import sys\nsys.slowpkg_imports.append(1)\nVALUE = 7\nclass Thing: pass\n")
    (package / "inner.py").write_text("import slowpkg\nDOUBLE = 2 * slowpkg.VALUE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    counter: list[int] = []
    monkeypatch.setattr(sys, "slowpkg_imports", counter, raising=False)
    lazy_imports.finish()
    lazy_imports.install(["slowpkg", "nosuchpkg"])
    yield counter
    lazy_imports.finish()
    for name in [name for name in sys.modules if name.split(".")[0] == "slowpkg"]:
        del sys.modules[name]


def _run_as(module: str, code: str) -> dict:
    """The namespace in which `code` has run, as a module of that name."""
    namespace = {"__name__": module}
    exec(code, namespace)
    return namespace


def test_lavis_gets_a_stand_in_until_first_use(put_off):
    pkg = _run_as("lavis.common.utils", "import slowpkg as pkg")["pkg"]
    assert put_off == []
    assert pkg.VALUE == 7 and put_off == [1]
    assert pkg.Thing is sys.modules["slowpkg"].Thing and "VALUE" in dir(pkg)


def test_others_get_the_real_thing_at_once(put_off):
    pkg = _run_as("somebody", "import slowpkg as pkg")["pkg"]
    assert put_off == [1] and type(pkg) is types.ModuleType
    assert _run_as("lavis.x", "import slowpkg as pkg")["pkg"] is pkg


def test_after_lavis_everyone_imports_the_real_package(put_off):
    pkg = _run_as("lavis.x", "import slowpkg as pkg")["pkg"]
    lazy_imports.finish()
    assert "slowpkg" not in sys.modules and put_off == []
    import slowpkg

    assert type(slowpkg) is types.ModuleType and put_off == [1]
    thing = slowpkg.Thing()
    assert isinstance(thing, pkg.Thing) and type(pickle.loads(pickle.dumps(thing))) is slowpkg.Thing
    pkg.VALUE = 8
    assert slowpkg.VALUE == 8 and put_off == [1]


def test_submodules_and_names_import_the_parent_for_good(put_off):
    _run_as("lavis.x", "import slowpkg")
    assert _run_as("lavis.y", "from slowpkg.inner import DOUBLE")["DOUBLE"] == 14
    assert put_off == [1] and type(sys.modules["slowpkg"]) is types.ModuleType
    assert sys.modules["slowpkg"].inner.DOUBLE == 14


def test_from_import_is_not_put_off(put_off):
    assert _run_as("lavis.x", "from slowpkg import VALUE")["VALUE"] == 7 and put_off == [1]


def test_threads_import_it_once(put_off):
    pkg = _run_as("lavis.x", "import slowpkg as pkg")["pkg"]
    lazy_imports.finish()
    seen, start = [], threading.Barrier(8)

    def use():
        start.wait()
        seen.append(pkg.VALUE)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [7] * 8 and put_off == [1]


def test_a_missing_package_fails_as_ever(put_off):
    with pytest.raises(ModuleNotFoundError, match="nosuchpkg"):
        _run_as("lavis.x", "import nosuchpkg")


def test_garbage_collection_is_as_before_afterwards():
    lazy_imports.finish()
    before, path = gc.get_threshold(), list(sys.meta_path)
    lazy_imports.install()
    lazy_imports.install()
    assert gc.get_threshold() != before
    lazy_imports.finish()
    lazy_imports.finish()
    assert gc.get_threshold() == before and sys.meta_path == path


IMPORT_LAVIS = """
import sys, warnings
filters = list(warnings.filters)
import lavis_lstp
lavis_lstp.register()
import lavis, lavis.common.utils
assert "pandas" not in sys.modules and "spacy" not in sys.modules, "loaded by import lavis"
assert not any("timm" in str(f[1]) for f in warnings.filters), "a warning filter was left behind"
import pandas, spacy
assert lavis.common.utils.pd.DataFrame is pandas.DataFrame
from lavis.models.img2prompt_models import img2prompt_vqa
assert img2prompt_vqa.spacy.load is spacy.load
print("fine")
"""


def test_import_lavis_loads_neither_pandas_nor_spacy_and_says_nothing():
    environment = {**os.environ, "LAVIS_LSTP_DISABLE": ""}
    run = subprocess.run([sys.executable, "-c", IMPORT_LAVIS], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.split() == ["fine"], run.stderr
    assert "FutureWarning" not in run.stderr, run.stderr
