"""Every verdict, kept: one SQLite file, keyed by a digest of judge, prompt, question, answer and prediction.

In: verdicts as they come. Out: the same, at the next call, so that nothing is asked twice. Each verdict is on disk
before the next question is put (it may have cost money); the write-ahead log lets several processes use one file, where
the first verdict on a case stays. `export` writes JSON lines that `--judge replay` reads.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lavis_lstp.endpoint import kept
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import cache_folder, expanded, write_jsonl
from lavis_lstp.judging.rows import Row, verdict_fields
from lavis_lstp.judging.verdict import OPEN, Case, Verdict

VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, prediction TEXT NOT NULL,
    status TEXT NOT NULL, correct INTEGER, score INTEGER, rule TEXT NOT NULL, note TEXT NOT NULL,
    unix_time REAL NOT NULL
) WITHOUT ROWID"""
_VERDICT = "judge, status, correct, score, rule, note"


def default_path() -> Path:
    return cache_folder() / "verdicts.sqlite"


class VerdictCache:
    """An open cache; used as a context manager, by the thread that opened it.

    Args:
        path: the file, made where there is none. On a local disk: SQLite's log does not work over a network.
        timeout_s: how long to wait for another process that writes.

    Raises:
        ConfigError: the file is no cache of this version.
    """

    def __init__(self, path: str | os.PathLike, *, timeout_s: float = 60.0):
        self.path = expanded(path)
        self._db = kept(path, _TABLE, VERSION, "verdicts", timeout_s)

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM verdicts").fetchone()[0]

    def get(self, key: str) -> Verdict | None:
        row = self._db.execute(f"SELECT {_VERDICT} FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else _verdict(*row)

    def put(self, verdicts: Iterable[tuple[str, Case, Verdict]]) -> None:
        """Keep verdicts, all or none; of two on one key the first stays."""
        rows = []
        for key, case, verdict in verdicts:
            assert verdict.status not in OPEN, "no verdict"
            note = json.dumps(verdict.note, ensure_ascii=False, sort_keys=True)
            correct = None if verdict.correct is None else int(verdict.correct)
            rows.append(
                (key, verdict.judge, *case, verdict.status, correct, verdict.score, verdict.rule, note, time.time())
            )
        try:
            with self._db:  # commits; rolls back where anything, a keyboard interrupt too, comes between
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(f"INSERT OR IGNORE INTO verdicts VALUES ({','.join('?' * 11)})", rows)
        except sqlite3.Error as error:
            raise ConfigError(f"{self.path}: cannot keep a verdict ({error}); mend that and call again") from None

    def rows(self) -> Iterator[Row]:
        """All verdicts with what they are about, in an order that does not depend on when they were made."""
        columns = f"question, answer, prediction, {_VERDICT}"
        order = "question, answer, prediction, judge, key"
        for *case, judge, status, correct, score, rule, note in self._db.execute(
            f"SELECT {columns} FROM verdicts ORDER BY {order}"
        ):
            verdict = _verdict(judge, status, correct, score, rule, note)
            yield {**Case(*case)._asdict(), **verdict_fields(verdict)}

    def export(self, path: str | os.PathLike) -> int:
        """Write all verdicts as JSON lines; gives their number."""
        write_jsonl(path, self.rows())
        return len(self)


def _verdict(judge: str, status: str, correct: int | None, score: int | None, rule: str, note: str) -> Verdict:
    return Verdict(judge, status, None if correct is None else bool(correct), score, rule, json.loads(note))
