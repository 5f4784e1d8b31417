"""The store on disk: entries come back bit by bit or not at all, whatever happens to the folder."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lavis_lstp.commands.cli import main
from lavis_lstp.data import store as store_module
from lavis_lstp.data.store import Store, content_digest, default_folder, default_store, entry_key
from lavis_lstp.errors import ConfigError, VideoError

KEY = entry_key("flow", "0" * 64, {"extractor": "dis"})
ARRAYS = {
    "flow": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "rows": np.arange(12).reshape(3, 4).T,  # not contiguous
    "one": np.array(3.5),
    "none": np.zeros((0, 2), np.float32),
    "mask": np.array([True, False]),
}


def key(number: int, what: str = "flow") -> str:
    return entry_key(what, f"{number:064x}", {})


def kept(store: Store) -> set[str]:
    return {entry.path.stem for entry in store.entries()}


def same(found, arrays=ARRAYS) -> bool:
    return found.keys() == arrays.keys() and all(
        found[name].dtype == array.dtype and found[name].shape == array.shape and (found[name] == array).all()
        for name, array in arrays.items()
    )


def test_what_is_put_comes_back_in_another_process(tmp_path):
    store = pickle.loads(pickle.dumps(Store(tmp_path / "s")))
    assert store.get(KEY) is None and not (tmp_path / "s").exists()
    store.put(KEY, ARRAYS)
    assert same(Store(tmp_path / "s").get(KEY))
    assert [path.name for path in (tmp_path / "s").iterdir()] == [f"{KEY}.safetensors"]
    first = (tmp_path / "s" / f"{KEY}.safetensors").read_bytes()
    store.put(KEY, dict(reversed(ARRAYS.items())))
    assert (tmp_path / "s" / f"{KEY}.safetensors").read_bytes() == first


def test_the_folder_is_where_the_environment_says_and_its_owner_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_LSTP_STORE", str(tmp_path / "mine"))
    default_store().put(KEY, ARRAYS)
    assert same(Store(tmp_path / "mine").get(KEY)) and (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("LAVIS_LSTP_STORE", "off")
    assert default_store() is None
    monkeypatch.setenv("LAVIS_LSTP_STORE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store().folder == tmp_path / "lavis_lstp" / "store"


def test_a_user_without_a_home_folder_is_told_and_works_without_a_store(tmp_path, monkeypatch, caplog):
    """As with `docker run --user 12345`: expanding `~` raises a bare RuntimeError."""
    for name in ("HOME", "XDG_CACHE_HOME", "LAVIS_LSTP_STORE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert default_store() is None and "no home folder is known; set HOME" in caplog.text
    for path in ("~", "~nobody-has-this-name/a"):
        with pytest.raises(ConfigError, match=f"^{path}: no home folder is known; set HOME, or write the whole path$"):
            Store(path)
    package = Path(store_module.__file__).parents[1]
    asking = {
        path.name for path in package.rglob("*.py") if re.search(r"expanduser|Path\.home", path.read_text("utf-8"))
    }
    assert asking == {"files.py"}, "others raise the bare error; use files.expanded"


def test_arrays_can_be_written_to(tmp_path):
    Store(tmp_path).put(KEY, ARRAYS)
    Store(tmp_path).get(KEY)["flow"][0] = 1
    assert same(Store(tmp_path).get(KEY))


def test_a_key_depends_on_all_it_is_made_of_and_not_on_the_order():
    keys = {
        entry_key("flow", "a", {"size": 224, "by": "dis"}),
        entry_key("flow", "a", {"by": "dis", "size": 224}),
        entry_key("flow", "b", {"size": 224, "by": "dis"}),
        entry_key("flow", "a", {"size": 225, "by": "dis"}),
        entry_key("features", "a", {"size": 224, "by": "dis"}),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("key", ["../flow", "flow", "flow-00", f"Flow-{'0' * 64}", f"a/flow-{'0' * 64}"])
def test_a_key_of_another_form_is_a_bug(tmp_path, key):
    with pytest.raises(AssertionError, match="entry_key"):
        Store(tmp_path).get(key)


def damages() -> dict[str, object]:
    return {
        "empty": lambda raw: b"",
        "cut": lambda raw: raw[:-1],
        "longer": lambda raw: raw + b"\0",
        "zeros": lambda raw: bytes(len(raw)),
        "huge header": lambda raw: (1 << 60).to_bytes(8, "little") + raw[8:],
        "no metadata": lambda raw: raw.replace(b"__metadata__", b"__meta_data__", 1),
        "other version": lambda raw: raw.replace(b'"version":"1"', b'"version":"2"', 1),
        "other type": lambda raw: raw.replace(b'"F16"', b'"I16"', 1),
        **{f"byte {at} from the end": lambda raw, at=at: _flipped(raw, -at) for at in (1, 20, 60)},
    }


def _flipped(raw: bytes, at: int) -> bytes:
    found = bytearray(raw)
    found[at] ^= 1
    return bytes(found)


@pytest.mark.parametrize("name", damages())
def test_a_damaged_entry_is_told_and_made_anew(tmp_path, name, caplog):
    store, path = Store(tmp_path), tmp_path / f"{KEY}.safetensors"
    store.put(KEY, ARRAYS)
    raw = path.read_bytes()
    damaged = damages()[name](raw)
    assert damaged != raw
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    store.put(KEY, ARRAYS)
    assert same(store.get(KEY))


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    store, path = Store(tmp_path), tmp_path / f"{KEY}.safetensors"
    store.put(KEY, ARRAYS)
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(_flipped(raw, at))
        found = store.get(KEY)
        assert found is None or same(found), at  # a blank of the header may be another blank


def test_an_entry_under_another_name_and_what_is_no_file_are_nothing(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, ARRAYS)
    os.rename(tmp_path / f"{KEY}.safetensors", tmp_path / f"{key(1)}.safetensors")
    os.mkfifo(tmp_path / f"{key(2)}.safetensors")
    (tmp_path / f"{key(3)}.safetensors").mkdir()
    assert [store.get(key(n)) for n in (1, 2, 3)] == [None] * 3
    assert kept(store) == {key(1)}


def test_what_was_used_the_longest_ago_makes_room(tmp_path):
    Store(tmp_path).put(key(0), ARRAYS)
    (size,) = (entry.bytes for entry in Store(tmp_path).entries())
    store = Store(tmp_path, max_bytes=3 * size)
    for n in (1, 2):
        store.put(key(n), ARRAYS)
    for n in range(3):
        os.utime(tmp_path / f"{key(n)}.safetensors", (n, n))
    assert store.get(key(0)) is not None
    store.put(key(3), ARRAYS)
    assert kept(store) == {key(0), key(2), key(3)}
    store.put(key(3), ARRAYS)  # in its own place
    assert kept(store) == {key(0), key(2), key(3)}
    store.put(key(4), {"large": np.zeros(4 * size, np.uint8)})
    assert kept(store) == {key(0), key(2), key(3)}


def test_what_killed_writers_left_is_removed_later_and_foreign_files_never(tmp_path):
    store = Store(tmp_path)
    for name, age in ((".old.host-1-0.tmp", 2 * store_module.ABANDONED_S), (".new.host-1-1.tmp", 0), ("notes.txt", 0)):
        (tmp_path / name).write_text("x")
        when = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (when, when))
    store.put(KEY, ARRAYS)
    store.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.host-1-1.tmp", "notes.txt"]


WRITER = """
import sys, numpy as np
from lavis_lstp.data.store import Store, entry_key
store = Store(sys.argv[1], max_bytes=20_000)
for n in range(150):
    number = (n * 7 + int(sys.argv[2])) % 12
    key = entry_key("flow", f"{number:064x}", {})
    found = store.get(key)
    assert found is None or (found["a"] == number).all()
    store.put(key, {"a": np.full(700, number, np.float32)})
assert "torch" not in sys.modules
"""


def test_processes_share_a_folder(tmp_path):
    """Three write, read and make room at the same time; none sees anything but whole entries."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3, said
    assert not any("damaged" in text or "cannot be used" in text for text in said), said
    store = Store(tmp_path)
    assert 0 < sum(entry.bytes for entry in store.entries()) <= 20_000 + 2 * 3_000
    for entry in store.entries():
        assert store.get(entry.path.stem) is not None


def _full(self, raw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["full", "file", "read-only", "stale"])
def test_without_a_usable_folder_the_work_goes_on_and_one_warning_says_so(tmp_path, what, caplog, monkeypatch):
    folder = tmp_path / "s"
    if what == "full":
        monkeypatch.setattr("pathlib.Path.write_bytes", _full)
    elif what == "file":
        folder.write_text("no folder")
    elif what == "read-only":
        folder.mkdir()

        def refused(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

        monkeypatch.setattr(store_module, "whole_file", refused)
    else:
        folder.mkdir()
        (folder / f"{KEY}.safetensors").write_bytes(b"x")

        def stale(self):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        monkeypatch.setattr("pathlib.Path.read_bytes", stale)
    store = Store(folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert store.get(KEY) is None
            store.put(KEY, ARRAYS)
    assert len(caplog.records) == 1, caplog.text
    assert str(folder) in caplog.text and "going on without it" in caplog.text
    assert what == "file" or [path for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_entries_of_a_read_only_folder_are_read(tmp_path, monkeypatch):
    Store(tmp_path).put(KEY, ARRAYS)

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store_module.os, "utime", refused)
    assert same(Store(tmp_path).get(KEY))


# ---- digests of videos ------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Files that were read to their end for a digest; a change of the inode counts as old as one of the content."""
    found = []
    real = store_module._digest_of
    monkeypatch.setattr(store_module, "_digest_of", lambda path, look: found.append(path) or real(path, look))
    monkeypatch.setattr(store_module, "UNSETTLED_S", -1)
    return found


def test_the_digest_is_of_the_content_and_read_once(tmp_path, reads):
    store, video, copy = Store(tmp_path / "s"), tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (video, copy):
        path.write_bytes(b"film")
    assert content_digest(video, store) == content_digest(copy, store) == content_digest(video, store)
    assert reads == [video, copy]
    assert content_digest(video) == content_digest(video, store)
    video.write_bytes(b"flim")
    assert content_digest(video, store) != content_digest(copy, store)


def test_a_file_that_has_just_changed_is_read_again(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(store_module, "UNSETTLED_S", 1000)
    store, video = Store(tmp_path / "s"), tmp_path / "a.mp4"
    video.write_bytes(b"film")
    content_digest(video, store)
    content_digest(video, store)
    assert len(reads) == 2 and not store.entries()
    monkeypatch.setattr(store_module, "UNSETTLED_S", -1)
    assert content_digest(video) == content_digest(video) and len(reads) == 3  # later, once in a process


def test_a_folder_of_pictures_has_a_digest(tmp_path, reads):
    store, folder = Store(tmp_path / "s"), tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        (folder / f"frame_{n}.jpg").write_bytes(b"%d" % n)
    first = content_digest(folder, store)
    assert content_digest(folder, store) == first and len(reads) == 1
    (folder / "frame_3.jpg").write_bytes(b"3")
    assert content_digest(folder, store) != first


def test_the_digest_does_not_depend_on_how_content_is_given(tmp_path):
    video, content = tmp_path / "a.mp4", b"film" * 1_000_000
    video.write_bytes(content)
    with video.open("rb") as file:
        file.seek(7)
        given = {content_digest(one) for one in (video, str(video), content, memoryview(content), file)}
    assert given == {hashlib.sha256(content).hexdigest()}
    pictures = [content_digest(one) for one in ([b"a", b"b"], (b"a", b"b"), [b"b", b"a"], [b"ab"], b"ab")]
    assert pictures[0] == pictures[1] and len(set(pictures)) == 4


def test_a_missing_or_changing_video_is_one_line(tmp_path, monkeypatch):
    for name in ("a.mp4", "a\0.mp4"):  # messages escape the zero byte
        with pytest.raises(VideoError, match=r"a\S*.mp4: cannot be read"):
            content_digest(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.mp4")
    for endless in (tmp_path / "pipe.mp4", "/dev/zero"):
        with pytest.raises(VideoError, match=r"cannot be read \(not a file\)"):
            content_digest(endless)
    video = tmp_path / "b.mp4"
    video.write_bytes(b"film")
    monkeypatch.setattr(store_module, "sha256_file", lambda path: video.write_bytes(b"longer") and "00" * 32)
    with pytest.raises(VideoError, match="b.mp4: changes while it is read"):
        content_digest(video, Store(tmp_path / "s"))


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_shows_and_clears(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store()
    assert store.folder == default_folder() == tmp_path / "lavis_lstp" / "store"
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{store.folder}: 0 entries, 0.0 MB\n"
    for n in range(3):
        store.put(key(n), {"a": np.zeros(50_000)})
    store.put(key(0, "features"), {"a": np.zeros(50_000)})
    assert main(["cache", "show"]) == 0
    said = capsys.readouterr().out
    assert "4 entries, 1.6 MB" in said and "flow         3 entries, 1.2 MB" in said
    assert main(["cache", "clear", "flwo"]) == 2
    assert "did you mean 'flow'?" in capsys.readouterr().err and len(store.entries()) == 4
    assert main(["cache", "clear", "flow"]) == 0
    assert "removed 3 entries, 1.2 MB" in capsys.readouterr().out and kept(store) == {key(0, "features")}
    assert main(["cache", "clear"]) == 0 and not store.entries()


def test_the_command_refuses_what_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["cache", "--folder", str(tmp_path / "file")]) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err
