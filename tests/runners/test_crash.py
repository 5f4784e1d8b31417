"""Killed, interrupted, started twice, on a full disk: nothing is lost, and what is wrong is said in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lavis_lstp.errors import BROKEN_PIPE, STOPPED, BusyError, ConfigError, WeightsError, run_command
from lavis_lstp.files import complete_folder, owned, sweep, temporary, whole_file, write_json, writing_to
from lavis_lstp.models.weights.reading import weights_file
from lavis_lstp.models.weights.saved_runs import checkpoint_of_run

ROOT = Path(__file__).resolve().parents[2]


def in_child(work) -> int:
    """Status of `work` in a forked process; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- one owner


def test_a_second_start_is_refused_before_its_model_is_built(tmp_path, monkeypatch, capfd):
    from lavis_lstp.host import train
    from lavis_lstp.tasks.base import LSTPTask

    reading, writing = os.pipe()

    def first() -> None:
        with owned(tmp_path / "run"):
            os.write(writing, b"!")
            signal.pause()

    pid = os.fork()
    if pid == 0:
        try:
            first()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"!"
        monkeypatch.setattr(LSTPTask, "build_model", lambda self, cfg: pytest.fail("the model is built"))
        shapes = {"train_videos": 1, "val_videos": 1, "test_videos": 1, "train_images": 0, "size": 48}
        options = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in shapes.items()]
        options += [f"datasets.lstp_shapes.root={tmp_path / 'data'}", f"run.output_dir={tmp_path / 'run'}"]
        assert train.main(["--cfg-path", "projects/lstp/tiny_ft.yaml", "--options", *options]) == 2
        said = capfd.readouterr().err
        assert f"{tmp_path / 'run'}: process {pid} on" in said and "Traceback" not in said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_owner_is_told_who_the_first_is_and_a_dead_one_is_followed(tmp_path):
    def refused() -> None:
        with pytest.raises(BusyError, match=rf"{tmp_path}: process {os.getppid()} on \S+ \(.*\) has been .* since 2"):
            with owned(tmp_path):
                pass

    with owned(tmp_path), owned(tmp_path):  # twice by the same process, as a demo and its chain
        assert in_child(refused) == 0
    assert not list(tmp_path.iterdir())

    def dies() -> None:
        manager = owned(tmp_path)
        manager.__enter__()
        temporary(tmp_path / "half").write_text("x")
        worker = os.fork()
        if worker == 0:  # it outlives its parent
            signal.pause()
        (tmp_path / "pid").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(dies) == -signal.SIGKILL
    with owned(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".owner.json", ".owner.lock", "pid"]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_many_who_come_and_go_are_never_two_at_once(tmp_path):
    """The lock file is removed by each holder, which others may just have opened."""

    def work() -> None:
        for _ in range(60):
            try:
                with owned(tmp_path / "x", beside=True):
                    descriptor = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are inside
                    os.close(descriptor)
                    os.unlink(tmp_path / "inside")
            except BusyError:
                pass

    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4


def test_what_dead_processes_left_is_removed_and_what_is_not_theirs_stays(tmp_path):
    others = [tmp_path / ".y.tar.host-1-2.tmp", tmp_path / ".x.json.old", tmp_path / "x.tmp"]
    mine = [tmp_path / ".x.1234.tmp", temporary(tmp_path / "x")]  # as earlier versions named them, and as today
    for path in [*others, *mine]:
        path.write_text("x")
    (tmp_path / ".x.some_host-7-0.tmp").mkdir()
    sweep(tmp_path, lambda name: name == "x")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_temporary_names_are_short_enough_and_differ(tmp_path):
    long = tmp_path / ("ж" * 120 + ".safetensors")
    names = {temporary(long).name for _ in range(3)}
    assert len(names) == 3 and max(len(name.encode()) for name in names) <= 255
    with whole_file(long) as partial:
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [long.name]


# ---- the system refuses


def test_errors_of_writing_name_the_file(tmp_path):
    import torch
    from safetensors.torch import save_file

    def limited(work) -> int:
        def child() -> None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            with pytest.raises(OSError) as error:
                work()
            assert str(tmp_path / "x") in error.value.filename and error.value.errno in (errno.EFBIG, errno.ENOSPC)

        return in_child(child)

    def text() -> None:
        write_json(tmp_path / "x", "x" * 10_000)

    def tensors() -> None:
        with whole_file(tmp_path / "x") as partial:
            save_file({"x": torch.zeros(1000)}, partial)

    def pickled() -> None:
        with writing_to(tmp_path / "x.pt"):
            torch.save(torch.zeros(1000), tmp_path / "x.pt")

    assert [limited(work) for work in (text, tensors, pickled)] == [0, 0, 0]
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_vanished_is_one_line(tmp_path, capsys):
    def work() -> None:
        with complete_folder(tmp_path / "out") as folder:
            shutil.rmtree(folder)
            write_json(folder / "sub" / "x.json", 1)
            shutil.rmtree(folder)
            (folder / "y").write_text("")

    assert run_command(work) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No such file or directory" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ConfigError("two\nlines"), 2, "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: /x/y: No space left on device\n"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "error: /x: Read-only file system\n"),
        (
            UnicodeEncodeError("ascii", "caf\u00e9.mp4", 3, 4, "ordinal not in range(128)"),
            2,
            "error: 'caf\\xe9.mp4' cannot be written in this locale (ascii); set PYTHONUTF8=1\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: this command needs torch, which is not installed; pip install torch. Without it: lavis-lstp select "
            "VIDEO QUESTION --method uniform, with --answer-by MODEL for a server's answer\n",
        ),
        (KeyboardInterrupt(), STOPPED, "stopped\n"),
    ],
)
def test_what_users_and_systems_cause_is_a_line_and_a_status(capsys, error, status, said):
    def command() -> None:
        raise error

    assert run_command(command) == status and capsys.readouterr().err == said
    assert (run_command(lambda: None), run_command(lambda: 3)) == (0, 3)


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_nobody_reads_the_output_and_nobody_complains(tmp_path):
    rows = [{"question_id": f"q{i}", "question": "q?", "answer": "a", "prediction": "a"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import sys; from lavis_lstp.commands import cli\n"
        "cli.main(['judge', 'p.jsonl', '--judge', 'rules', '--cache', 'c', '--out', 'a.jsonl', '--resamples', '10'])\n"
        "sys.exit(cli.main(['compare', 'a.jsonl', 'a.jsonl', '--resamples', '10']))"
    )
    for out, status in ((subprocess.PIPE, BROKEN_PIPE), ("/dev/full", 2)):
        sink = out if out == subprocess.PIPE else open(out, "w", encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=sink, stderr=subprocess.PIPE, text=True)
        if out == subprocess.PIPE:
            process.stdout.close()
            process.stdout = None
        said = process.communicate(timeout=120)[1]
        assert process.returncode == status, said
        assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_starter_closed_is_no_fault(monkeypatch, closed):
    """Python has None for it, as under `>&-` and in services."""
    monkeypatch.setattr(sys, closed, None)

    def command() -> int:
        sys.stdin.isatty(), print("a"), print("b", file=sys.stderr)
        raise ConfigError("c")

    assert run_command(command) == 2 and run_command(lambda: 3) == 3


# ---- what is newest


def saved(run: Path, step: int, *, torn: bool = False) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    if not torn:
        files = {"model.safetensors": {"bytes": 5, "sha256": ""}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_complete_checkpoints_decide_and_links_do_not(tmp_path):
    first, second = saved(tmp_path, 9), saved(tmp_path, 10)
    saved(tmp_path, 11, torn=True)
    (tmp_path / "checkpoints/last").symlink_to(first.name)
    (tmp_path / "checkpoints/best").symlink_to("step_00000001")  # dangles
    for path in (tmp_path, tmp_path / "checkpoints/last"):
        assert weights_file(path) == second / "model.safetensors"
    (tmp_path / "checkpoints/best.json").write_text(json.dumps({"checkpoint": first.name}))
    assert weights_file(tmp_path).parent == weights_file(tmp_path / "checkpoints/best").parent == first
    (tmp_path / "checkpoints/best.json").write_text('{"checkpoint": "step_00000099"}')
    assert checkpoint_of_run(tmp_path) == second
    for wrong in ("[]", "{", '{"checkpoint": 3}'):  # no kill leaves such a file, so somebody should look
        (tmp_path / "checkpoints/best.json").write_text(wrong)
        with pytest.raises(WeightsError, match="best.json"):
            checkpoint_of_run(tmp_path)
    (tmp_path / "checkpoints/best.json").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        weights_file(tmp_path / "checkpoints/none")


def test_a_resumed_run_mends_the_links_of_a_killed_one(tmp_path):
    from lavis_lstp.runners.checkpoint import CheckpointStore

    first, second = saved(tmp_path, 9), saved(tmp_path, 10)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.point("last", first)
    store.point("best", tmp_path / "checkpoints/step_00000003")
    leftover = store.temporary(11)
    leftover.mkdir()
    store.clean()
    assert os.readlink(store.folder / "last") == second.name and not os.path.lexists(store.folder / "best")
    assert not leftover.exists()


def test_a_thread_writes_while_another_does(tmp_path):
    def work(number: int) -> None:
        for _ in range(50):
            write_json(tmp_path / "x.json", number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "x.json").read_text()) in range(3) and len(list(tmp_path.iterdir())) == 1


def test_a_piece_of_the_campaign():
    """`make chaos` has many times as many trials; in a process of its own, as it forks."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "tests/chaos.py", "--trials", "6"], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
