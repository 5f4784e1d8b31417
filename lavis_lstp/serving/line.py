"""The line of questions: read in parallel, answered in batches, bounded, and left by whoever goes away.

In: questions, from the API and from the page. Out: tickets, each with the pieces of its answer and its prediction.
Everything but decoding and the model runs in the server's event loop, so there is nothing to lock: a question is read
in a thread of its own (a kept video waits for nobody's decoding), and one thread answers batches of what is there
together. Questions with other settings wait for the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from lavis_lstp.errors import BusyError, LstpError
from lavis_lstp.inference.prediction import Asked, Cancelled, Prediction
from lavis_lstp.inference.predictor import Predictor
from lavis_lstp.serving.limits import Limits
from lavis_lstp.serving.metrics import Metrics

GATHERING, MOST_GATHERING_S = 0.25, 0.05
"""Waiting for a batch to fill takes at most this share of the last batch's time, and so many seconds."""
FORGETS = 0.9  # of the mean of seconds that a question takes, at each batch
STOPPING = "the server is stopping; ask again when it is back"


class Full(BusyError):
    """The line is as long as it may be.

    Attributes:
        retry_after_s: when a place should be free.
    """

    def __init__(self, waiting: int, retry_after_s: int):
        super().__init__(f"{waiting} questions wait already; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Stopping(BusyError):
    """The server ends before the answer does."""


@dataclass(eq=False)
class Ticket:
    """A question in the line.

    Attributes:
        ready: done when the video has been read; its error is that of the video.
        result: the prediction.
    """

    ready: asyncio.Future[Asked]
    result: asyncio.Future[Prediction]
    cancel: threading.Event = field(default_factory=threading.Event)
    asked: Asked | None = None
    _pieces: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it is written; its error, where it has one, is that of `result`."""
        while (piece := await self._pieces.get()) is not None:
            yield piece

    def finish(self, outcome: Prediction | Exception) -> None:
        for future in (self.ready, self.result):
            if not future.done() and isinstance(outcome, Exception):
                future.set_exception(outcome)
                future.exception()  # nobody may be left who would look at it
        if not self.result.done():
            self.result.set_result(outcome)
        self._pieces.put_nowait(None)


class Line:
    """The line of questions of one server; the module's docstring explains it.

    Args:
        predictor: what reads and answers.
        limits: how long the line may be, how large a batch, how many decode at once.
        metrics: what is counted.
    """

    def __init__(self, predictor: Predictor, limits: Limits, metrics: Metrics):
        self.predictor, self.limits, self.metrics = predictor, limits, metrics
        self._tickets: set[Ticket] = set()
        self._ready: deque[Ticket] = deque()
        self._wake = asyncio.Event()
        self._readers = ThreadPoolExecutor(limits.most_waiting, "lavis_lstp reader")
        self._model = ThreadPoolExecutor(1, "lavis_lstp model")
        self._seconds = 0.5  # that a question takes
        self._stopped = False
        self._answering: asyncio.Task | None = None
        self._reading: set[asyncio.Task] = set()

    def __len__(self) -> int:
        return len(self._tickets)

    def start(self) -> None:
        self._answering = asyncio.create_task(self._answer_batches())

    async def stop(self) -> None:
        """End every question with one line, and wait for the batch that the model is at."""
        self._stopped = True
        for ticket in list(self._tickets):
            ticket.cancel.set()
            self._leave(ticket, Stopping(STOPPING))
        if self._answering:
            self._answering.cancel()
        self._readers.shutdown(wait=False, cancel_futures=True)
        await asyncio.get_running_loop().run_in_executor(None, self._model.shutdown)

    def join(self, video: Any, question: str, *, stream: bool = False, **how: Any) -> Ticket:
        """A place in the line; arguments as for `Predictor.prepare`.

        Args:
            stream: whether the pieces are wanted: making texts of each row at each token takes the model's time.

        Raises:
            Full: there is none.
        """
        if self._stopped:
            raise Stopping(STOPPING)
        if len(self._tickets) >= self.limits.most_waiting:
            wait = math.ceil(max(1.0, self._seconds * len(self._tickets)))
            self.metrics.refused.inc()
            raise Full(len(self._tickets), wait)
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop.create_future(), loop.create_future())
        self._tickets.add(ticket)
        task = asyncio.create_task(self._read(ticket, video, question, stream, how))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return ticket

    def give_up(self, ticket: Ticket) -> None:
        """Free the place of a question that nobody waits for; its row of a batch ends with the next token."""
        ticket.cancel.set()
        self._leave(ticket, Cancelled("the answer was given up"))

    def _leave(self, ticket: Ticket, outcome: Prediction | Exception) -> None:
        if ticket in self._tickets:
            self._tickets.discard(ticket)
            self.metrics.answered(outcome)
        if ticket in self._ready:
            self._ready.remove(ticket)
        ticket.finish(outcome)

    async def _read(self, ticket: Ticket, video: Any, question: str, stream: bool, how: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()

        def tell(piece: str) -> None:
            loop.call_soon_threadsafe(ticket._pieces.put_nowait, piece)

        prepare = functools.partial(
            self.predictor.prepare, video, question, on_text=tell if stream else None, cancel=ticket.cancel, **how
        )
        try:
            asked = await loop.run_in_executor(self._readers, prepare)
        except Exception as error:  # handed to whoever waits
            self._leave(ticket, error)
            return
        if ticket in self._tickets:
            ticket.asked = asked
            ticket.ready.set_result(asked)
            self._ready.append(ticket)
            self._wake.set()

    def _take(self) -> list[Ticket]:
        """The oldest question, and those behind it that may share its batch."""
        key = self._ready[0].asked.settings.batch_key
        alike = [ticket for ticket in self._ready if ticket.asked.settings.batch_key == key]
        taken = alike[: self.limits.most_in_batch]
        for ticket in taken:
            self._ready.remove(ticket)
        return taken

    async def _answer_batches(self) -> None:
        loop = asyncio.get_running_loop()
        expected, wait = 1, 0.0
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                await self._gather(expected, wait)
                if not self._ready:
                    break
                batch, started = self._take(), perf_counter()
                await self._answer(loop, batch)
                took = perf_counter() - started
                expected, wait = len(batch), min(MOST_GATHERING_S, GATHERING * took)
                self._seconds = FORGETS * self._seconds + (1 - FORGETS) * took / len(batch)
                self.metrics.batch.observe(len(batch))

    async def _gather(self, expected: int, seconds: float) -> None:
        """Wait a little for as many questions as the last batch had: clients that got their answers ask again at once,
        and the first of them would otherwise be answered alone while the others wait. A client alone waits for nobody.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while len(self._ready) < min(expected, self.limits.most_in_batch) and (left := end - loop.time()) > 0:
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left)

    async def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[Ticket]) -> None:
        try:
            asked = [ticket.asked for ticket in batch]
            found: list[Any] = await loop.run_in_executor(self._model, self.predictor.answer_many, asked)
        except Exception as error:  # handed to whoever waits
            if len(batch) > 1 and not isinstance(error, LstpError):  # such as memory: each alone
                for ticket in batch:
                    await self._answer(loop, [ticket])
                return
            found = [error] * len(batch)
        for ticket, outcome in zip(batch, found, strict=True):
            self._leave(ticket, outcome)
