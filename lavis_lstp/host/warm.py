"""A process that has imported LAVIS, and from which `python -m lavis.train ...` is forked: the imports are paid once.

In, over a socket: the words behind `-m`, and two open files: where the output goes, and one that the command is to
keep open. Out: the command's process id, then its exit status. One command at a time; each is a process of its own,
finds the modules as they are after the imports, and goes on where whoever started it dies.

For runs on the CPU, and on Linux: a process that has looked for a GPU cannot be forked into one that uses it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

MOST_BYTES = 1 << 17
"""Of the words of a command, as for one argument of a program."""


class Warm:
    """The process; the first command starts it, and `close` ends it."""

    def __init__(self) -> None:
        self._asked: socket.socket | None = None

    def start(self, words: Sequence[str], output: int, held: int) -> Forked:
        """Run `python -m WORDS`, which writes to the open file `output` and keeps `held` open.

        Raises:
            OSError: Python cannot be started, or has ended.
        """
        if self._asked is None:
            self._asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", __name__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=output, stderr=output)
        socket.send_fds(self._asked, [os.fsencode("\0".join(words))], [output, held])
        return Forked(self._asked)

    def close(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None
            with contextlib.suppress(subprocess.TimeoutExpired):  # a command that nobody waits for is still at work
                self._process.wait(timeout=1)


class Forked:
    """One command: what `subprocess.Popen` is to a program, as far as a chain asks for it."""

    def __init__(self, told: socket.socket):
        self._told = told
        self._pid: int | None = None
        self._stopped = False

    def terminate(self) -> None:
        """Send SIGTERM, or send it as soon as there is a process."""
        self._stopped = True
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """Return the exit status, negative for a signal; 1 where it could not be forked, of which the output tells.

        Raises:
            subprocess.TimeoutExpired: it is still at work after `timeout` seconds.
        """
        self._told.settimeout(timeout)
        try:
            if self._pid is None:
                first = self._told.recv(64)
                if not first:
                    return 1
                self._pid = int(first)
                if self._stopped:
                    self.terminate()
            return int(self._told.recv(64) or 1)
        except TimeoutError:
            raise subprocess.TimeoutExpired("python", timeout) from None


def main(descriptor: int) -> None:
    """Serve commands until the other end is closed; returns in that case alone."""
    stops = {signal.SIGINT, signal.SIGTERM}  # they are for the command, whose status is still to be told
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    with socket.socket(fileno=descriptor) as asked:
        while True:
            words, files, *_ = socket.recv_fds(asked, MOST_BYTES, 2)
            if not words:
                return
            output = files[0]
            for stream in (1, 2):
                os.dup2(output, stream)
            import lavis  # noqa: F401

            gc.freeze()  # what is imported is garbage in no command, and looking for it copies its memory
            pid = os.fork()
            if not pid:
                break
            for file in files:
                os.close(file)
            with contextlib.suppress(BrokenPipeError):  # who asked has died, and the next look will tell
                asked.send(str(pid).encode())
                asked.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    os.close(output)
    module, *arguments = os.fsdecode(words).split("\0")  # which no word of a command holds
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
