"""Commands that are forked from a process with LAVIS imported end, print, are stopped and hold locks as programs do."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from lavis_lstp.host.warm import Warm

STEP = """
import os, signal, sys, time
ready = "lavis" in sys.modules
seen, sys.seen = getattr(sys, "seen", "nothing"), "a module of an earlier command"
import multiprocessing
print(sys.argv[1:], ready, seen, __name__, sys.modules["__main__"].__dict__ is globals(), flush=True)
what = sys.argv[1]
if what == "waits":
    open(sys.argv[2], "w").close()
    time.sleep(300)
if what == "saves":
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(5))
    open(sys.argv[2], "w").close()
    time.sleep(300)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "until":
    open(sys.argv[2], "w").close()
    while not os.path.exists(sys.argv[3]):
        time.sleep(0.01)
if what == "raises":
    1 / 0
if what == "interrupted":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has switched off
    signal.raise_signal(signal.SIGINT)
sys.exit(int(what) if what.isdecimal() else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    (folder / "a_step.py").write_text(STEP, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def warm(folder):
    before = os.getcwd()
    os.chdir(folder)  # where `python -m` finds a module
    warm = Warm()
    yield warm
    warm.close()
    os.chdir(before)


def run(warm, folder, *words, do=lambda command: None):
    """Exit status and output of one command."""
    with (
        open(folder / "output.txt", "w+", encoding="utf-8") as output,
        open(folder / "lock", "w", encoding="utf-8") as lock,
    ):
        command = warm.start(["a_step", *map(str, words)], output.fileno(), lock.fileno())
        do(command)
        status = command.wait(timeout=300)
        output.seek(0)
        return status, output.read()


def appears(path):
    until = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("0", 0, ""),
        ("3", 3, ""),
        ("dies", -signal.SIGKILL, ""),
        ("raises", 1, "ZeroDivisionError"),
        ("interrupted", 1, "KeyboardInterrupt"),
    ],
)
def test_a_command_ends_as_a_program_would(warm, folder, what, status, said):
    found, output = run(warm, folder, what, "two words", "")
    assert found == status and said in output
    assert output.startswith(f"['{what}', 'two words', ''] True nothing __main__ True\n")  # LAVIS is there


def test_a_module_that_is_not_there_is_said(warm, folder):
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        assert warm.start(["no_such_step"], output.fileno(), output.fileno()).wait(timeout=300) == 1
        output.seek(0)
        assert "no_such_step" in output.read()


@pytest.mark.parametrize(("what", "status"), [("waits", -signal.SIGTERM), ("saves", 5)])
def test_a_command_is_stopped_by_sigterm_and_may_save_first(warm, folder, tmp_path, what, status):
    def stop(command):
        appears(tmp_path / "up")
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(timeout=0.01)
        command.terminate()

    assert run(warm, folder, what, tmp_path / "up", do=stop)[0] == status


def test_a_command_that_is_stopped_before_it_began_is_stopped(folder, monkeypatch):
    monkeypatch.chdir(folder)
    fresh = Warm()
    assert run(fresh, folder, "waits", folder / "up", do=lambda command: command.terminate())[0] == -signal.SIGTERM
    fresh.close()


def test_a_command_outlives_who_asked_for_it_and_holds_its_lock(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    program = (
        "from lavis_lstp.host.warm import Warm; import sys, time; up, go = sys.argv[1:]\n"
        "import fcntl; lock = open('held', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); log = open('log', 'w')\n"
        "Warm().start(['a_step', 'until', up, go], log.fileno(), lock.fileno()).wait(300)"
    )
    asker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "up"), str(tmp_path / "go")])
    appears(tmp_path / "up")
    asker.kill()
    asker.wait()
    with open(folder / "held", encoding="utf-8") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (tmp_path / "go").touch()
        fcntl.flock(lock, fcntl.LOCK_EX)  # free when the command has ended
    assert "Traceback" not in (folder / "log").read_text(encoding="utf-8")
