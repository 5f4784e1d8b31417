"""Samples of shards in the order of training, where each shard is read from one end to the other over one connection.

In: questions in the order in which they are wanted, each with its place in the reading (`runners.data_order`). Out: the
same questions in the same order; when one is given, the bytes of its sample are with its `ShardQuestions`, read by the
index and compared with their SHA-256 as those that are read at an offset.

A lane is a row of shards that are read one after the other. The shuffle buffer of a lane is what was read and is not
wanted yet: its order was drawn beforehand, so a run that goes on in the middle of an epoch begins each shard at the
first byte that is still wanted. A few samples of each lane are read ahead, and the next shard is opened when the last
sample of the one before has come.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from lavis_lstp.data.shards.questions import Place, ShardQuestions
from lavis_lstp.errors import ShardError

READ_AT_ONCE = 16
"""Lanes of one process that are waited for at the same time."""
AHEAD = 4
"""Samples of a lane that a thread reads before it hands them over: on a busy machine each handing over is a wait."""


class Wanted(NamedTuple):
    """A question by its number among all data sets; `place` in the reading is -1 for one that is not streamed."""

    index: int
    place: int


class ReadShards:
    """A stage of a `webdataset.DataPipeline`: tars to samples, through a shuffle buffer.

    Args:
        parts: (number of its first question, questions) of each data set that is streamed.
        lane: places in the reading are in one lane where they are equal when divided by this.
    """

    def __init__(self, parts: Sequence[tuple[int, ShardQuestions]], lane: int):
        self.parts = list(parts)
        self.lane = lane

    def __call__(self, source: Iterable[Wanted]) -> Iterator[int]:
        wanted = list(source)
        pool = ThreadPoolExecutor(READ_AT_ONCE, "shards")
        passes = self._passes(wanted, pool)
        try:
            for one, turn in zip(wanted, passes, strict=True):
                if turn is not None:
                    first, questions = self._part(one.index)
                    sample = questions.place_of(one.index - first)
                    questions.hand_over(sample, turn.take(sample))
                yield one.index
        finally:
            pool.shutdown(cancel_futures=True)
            for turn in filter(None, passes):
                turn.close()

    def _part(self, index: int) -> tuple[int, ShardQuestions]:
        return max((part for part in self.parts if part[0] <= index), key=lambda part: part[0])

    def _passes(self, wanted: Sequence[Wanted], pool: ThreadPoolExecutor) -> list[_Pass | None]:
        """For each question the pass through a shard that brings its sample; None where it is not streamed."""
        rows: dict[int, list[tuple[int, Place, int]]] = {}
        for number, (index, place) in enumerate(wanted):
            if place >= 0:
                first, questions = self._part(index)
                rows.setdefault(first, []).append((place, questions.place_of(index - first), number))
        found: list[_Pass | None] = [None] * len(wanted)
        begin: list[_Pass] = []
        for first, questions in self.parts:
            last = None
            for place, sample, number in sorted(rows.get(first, ())):
                lane = place // self.lane
                if last is None or (lane, sample[0]) != (last.lane, last.shard) or sample < last.end:
                    turn = _Pass(questions, lane, sample[0], pool)
                    if last is None or lane != last.lane:
                        begin.append(turn)
                    else:
                        last.following = turn
                    last = turn
                last.add(sample)
                found[number] = last
        for turn in begin:
            turn.start()
        return found


class _Pass:
    """One shard, read forward from the first sample that is wanted to the last."""

    def __init__(self, questions: ShardQuestions, lane: int, shard: int, pool: ThreadPoolExecutor):
        self.lane, self.shard = lane, shard
        self.following: _Pass | None = None
        self._questions, self._pool = questions, pool
        self._waiting: deque[Place] = deque()
        self._uses: Counter[Place] = Counter()
        self._here: dict[Place, dict[str, bytes] | ShardError] = {}
        self._reading: Future | None = None
        self._readers = questions.readers(shard)

    @property
    def end(self) -> Place:
        """The last sample."""
        return self._waiting[-1]

    def add(self, sample: Place) -> None:
        """Read a sample, too; in the order of the file."""
        if not self._uses[sample]:
            self._waiting.append(sample)
        self._uses[sample] += 1

    def start(self) -> None:
        """Read the next samples in a thread."""
        if self._reading is None and self._waiting:
            self._reading = self._pool.submit(self._read)

    def _read(self) -> list[dict[str, bytes] | ShardError]:
        found: list[dict[str, bytes] | ShardError] = []
        for sample in itertools.islice(self._waiting, AHEAD):
            try:
                found.append(self._questions.read(sample, *(reader.read_at for reader in self._readers)))
            except ShardError as error:
                found.append(error)
        return found

    def take(self, sample: Place) -> dict[str, bytes] | ShardError:
        """The content of a sample, or why it cannot be read; each question of it takes it once."""
        while sample not in self._here:
            self.start()
            found = self._reading.result()
            self._reading = None
            self._here |= {self._waiting.popleft(): content for content in found}
            if self._waiting:
                self.start()
                continue
            self.close()
            if self.following is not None:
                self.following.start()
        self._uses[sample] -= 1
        return self._here[sample] if self._uses[sample] else self._here.pop(sample)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
