"""`lavis-lstp judge predictions.jsonl --judge rules|openai|local|replay`: which answers are right, and by whose word.

In: predictions, one JSON object per question with question_id, question, answer and prediction. Out: a verdict per
question as JSON lines (for `compare`, `calibrate` and `--judge replay`), the result as JSON beside it, and a table.

Rules decide first what they are sure of; the judge gets the rest, each case once, and its verdicts stay in the cache.
There is no score while a question waits for its verdict: call again, nothing is asked twice.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lavis_lstp.endpoint import cost_line
from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.files import owned, sha256_file, write_json, write_jsonl
from lavis_lstp.judging.cache import VerdictCache, default_path
from lavis_lstp.judging.compare import at_least
from lavis_lstp.judging.endpoint import EndpointJudge, OnVerdict, refuse_keys
from lavis_lstp.judging.prompts import PRESETS, Prompt, preset
from lavis_lstp.judging.replay import FORMS, Replay
from lavis_lstp.judging.rows import case_of, named, read_predictions, verdict_row, writing
from lavis_lstp.judging.rules import decide, rules_identity, undecided
from lavis_lstp.judging.scores import format_result, score_verdicts
from lavis_lstp.judging.verdict import FAILED, MISSING, OPEN, UNASKED, Case, Verdict, case_key
from lavis_lstp.metrics.resampling import RESAMPLES
from lavis_lstp.redaction import printable, without_secrets_in
from lavis_lstp.schema import Prediction

log = logging.getLogger(__name__)

JUDGES = ("rules", "openai", "local", "replay")


class Judge(Protocol):
    """Somebody who can be asked."""

    identity: str
    prompt: Prompt

    def tokens(self, cases: Sequence[Case]) -> tuple[int, int]: ...

    def judge(self, cases: Sequence[Case], on_verdict: OnVerdict) -> None: ...


class Docket:
    """The cases of one call: what rules and cache say of them, and what is left to ask.

    Args:
        judge: None leaves the rules alone, which then take what they cannot decide for wrong.
        limit: cases to ask at most; the others stay "not asked".
    """

    def __init__(self, cases: Sequence[Case], judge: Judge | None, cache: VerdictCache, limit: int | None = None):
        self.judge, self.cache = judge, cache
        self.verdicts: dict[Case, Verdict] = {}
        rules = rules_identity()
        by_rules = []
        waiting = []
        for case in dict.fromkeys(cases):
            if verdict := decide(case, rules):
                self.verdicts[case] = verdict
                by_rules.append((case_key(rules, None, case), case, verdict))
            elif judge is None:
                self.verdicts[case] = undecided(rules)
            elif known := cache.get(self._key(case)):
                self.verdicts[case] = known
            else:
                self.verdicts[case] = Verdict(judge.identity, UNASKED)
                waiting.append(case)
        cache.put(by_rules)
        self.num_decided, self.num_waiting = len(by_rules), len(waiting)
        self.num_cached = len(self.verdicts) - len(by_rules) - len(waiting) if judge else 0
        self.to_ask = waiting[:limit]

    def _key(self, case: Case) -> str:
        assert self.judge is not None
        return case_key(self.judge.identity, list(self.judge.prompt), case)

    def ask(self) -> None:
        """Put the open cases to the judge; each verdict is in the cache when the next one comes.

        Raises:
            JudgeError: the judge cannot be asked.
        """
        if self.judge is None or not self.to_ask:
            return
        from tqdm import tqdm

        with tqdm(total=len(self.to_ask), desc="judging", disable=None) as progress:

            def on_verdict(case: Case, verdict: Verdict) -> None:
                key = self._key(case)
                if verdict.status not in OPEN:
                    self.cache.put([(key, case, verdict)])
                # another process may have been first: its verdict is the one that an export will show
                self.verdicts[case] = self.cache.get(key) or verdict
                progress.update()

            self.judge.judge(self.to_ask, on_verdict)

    def preview(self, price_in: float | None, price_out: float | None) -> str:
        """What asking would take, in a line or two."""
        assert self.judge is not None
        tokens_in, tokens_out = self.judge.tokens(self.to_ask)
        left = self.num_waiting - len(self.to_ask)
        return (
            f"{len(self.verdicts)} different cases: {self.num_decided} decided by rules, {self.num_cached} in the "
            f"cache, {len(self.to_ask)} to ask{f' ({left} more are over --limit)' if left else ''}\n"
            f"{self.judge.identity}\n{cost_line(tokens_in, tokens_out, price_in, price_out)}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    refuse_keys(argv)
    args = _parser().parse_args(argv)
    if args.export:
        with VerdictCache(args.cache) as cache, writing(args.export):
            print(f"{cache.export(args.export)} verdicts written to {args.export}")
        return 0
    if not args.predictions or not args.judge:
        raise ConfigError("expected a predictions file and --judge, or --export FILE")
    rows, coverage = read_predictions(args.predictions, args.answers, allow_partial=args.allow_partial)
    cases = {key: case_of(row) for key, row in rows.items()}
    if args.judge == "replay":
        if not args.verdicts:
            raise ConfigError("--judge replay needs --verdicts FILE, the record")
        replay = Replay(args.verdicts, only=args.only, form=args.form)
        return _finish(args, rows, {key: replay.get(case) for key, case in cases.items()}, coverage)
    judge = _judge(args)
    with VerdictCache(args.cache) as cache:
        docket = Docket(list(cases.values()), judge, cache, args.limit)
        if judge is not None:
            print(printable(docket.preview(args.price_in, args.price_out)), flush=True)
            if args.preview:
                return 0
        docket.ask()
    return _finish(args, rows, {key: docket.verdicts[case] for key, case in cases.items()}, coverage)


def _judge(args: argparse.Namespace) -> Judge | None:
    if args.judge == "rules":
        return None
    if not args.model:
        raise ConfigError(f"--judge {args.judge} needs --model")
    if args.judge == "openai":
        return EndpointJudge(
            args.model,
            preset(args.prompt),
            seed=args.seed,
            concurrency=args.concurrency,
            retries=args.retries,
            timeout_s=args.timeout,
        )
    from lavis_lstp.judging.local import LocalJudge

    return LocalJudge(
        args.model,
        preset(args.prompt),
        revision=args.revision,
        weights_sha256=args.weights_sha256,
        batch_size=args.batch_size,
    )


def _finish(
    args: argparse.Namespace,
    rows: Mapping[str, Prediction],
    verdicts: Mapping[str, Verdict],
    coverage: Mapping[str, Any],
) -> int:
    """Say where verdicts and result go, and let nobody else write there.

    Raises:
        BusyError: another process does.
    """
    predictions = Path(args.predictions)
    out = Path(args.out) if args.out else predictions.with_name(f"{predictions.stem}_judged_{args.judge}.jsonl")
    result_file = out.with_suffix(".json")
    if out == result_file or {out.resolve(), result_file.resolve()} & {
        Path(p).resolve() for p in (predictions, args.answers, args.verdicts) if p
    }:
        raise ConfigError(f"--out {out} or the result, {result_file}, would replace another file; name a *.jsonl")
    with writing(out), owned(out, beside=True, leftovers=lambda name: name in (out.name, result_file.name)):
        return _write(args, rows, verdicts, coverage, out, result_file)


def _write(
    args: argparse.Namespace,
    rows: Mapping[str, Prediction],
    verdicts: Mapping[str, Verdict],
    coverage: Mapping[str, Any],
    out: Path,
    result_file: Path,
) -> int:
    """Write verdicts and result, print the table.

    Raises:
        CoverageError: questions without a verdict, and not `--allow-partial`.
    """
    with writing(out):
        result_file.unlink(missing_ok=True)  # an earlier result must not stand beside these verdicts
        write_jsonl(out, (verdict_row(key, rows[key], verdict) for key, verdict in verdicts.items()))
    waiting = {key: verdict for key, verdict in verdicts.items() if verdict.status in OPEN}
    if waiting and not args.allow_partial:
        raise CoverageError(_waiting_line(waiting, len(rows), out))
    result = {
        "format": "lavis_lstp.judged",
        "version": 1,
        **{
            name: {"file": Path(path).name, "sha256": sha256_file(path)}
            for name, path in (("predictions", args.predictions), ("answers", args.answers), ("verdicts", out))
            if path
        },
        **score_verdicts(rows, verdicts, coverage, resamples=args.resamples, seed=args.bootstrap_seed),
    }
    write_json(result_file, without_secrets_in(result))
    print(printable(f"{format_result(result)}\nwritten to {out} and {result_file}"))
    return 0


def _waiting_line(waiting: Mapping[str, Verdict], total: int, out: Path) -> str:
    counts = Counter(verdict.status for verdict in waiting.values())
    what = ", ".join(f"{status} {named(k for k, v in waiting.items() if v.status == status)}" for status in counts)
    failed = [verdict.note["error"] for verdict in waiting.values() if verdict.status == FAILED]
    last = f"; last error: {failed[-1]}" if failed else ""
    how = "the record holds none on them" if MISSING in counts else "call again to go on, nothing is asked twice"
    return (
        f"{total - len(waiting)} of {total} questions have a verdict; {what}{last}; all are listed in {out}: {how}; "
        "--allow-partial scores what is there"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp judge",
        description="Say which answers are right, and by whose word.",
        epilog="--judge openai reads OPENAI_API_KEY and OPENAI_BASE_URL from the environment, and only from there.",
    )
    add = parser.add_argument
    add("predictions", nargs="?", help="JSON lines with question_id, question, answer, prediction")
    add("--judge", choices=JUDGES, help="who decides what the rules leave open")
    add("--answers", help="questions and answers by question_id, where the predictions have none")
    add("--out", help="verdict file, *.jsonl; the result goes beside it as .json (default: beside the predictions)")
    add("--cache", default=default_path(), help="SQLite file of all verdicts (default: %(default)s)")
    add("--allow-partial", action="store_true", help="score although verdicts or predictions are missing, and say so")
    add("--resamples", type=at_least(1), default=RESAMPLES, help="of the bootstrap (default: %(default)s)")
    add("--bootstrap-seed", type=at_least(0), default=0, help="default: %(default)s")
    add(
        "--export",
        metavar="FILE",
        help="write all verdicts of the cache as JSON lines, for audit and replay; no judging",
    )
    asked = parser.add_argument_group("--judge openai, local")
    asked.add_argument("--model", help="the endpoint's name of a model; a hub id or a folder")
    asked.add_argument("--prompt", default="published", help=f"{', '.join(PRESETS)} (default: %(default)s)")
    asked.add_argument("--limit", type=at_least(0), help="ask at most so many cases in this call")
    asked.add_argument("--preview", action="store_true", help="say what asking would take, and stop")
    asked.add_argument("--price-in", type=float, help="price of a million tokens in, for the preview")
    asked.add_argument("--price-out", type=float, help="price of a million tokens out")
    openai = parser.add_argument_group("--judge openai")
    openai.add_argument("--concurrency", type=at_least(1), default=8, help="requests at a time (default: %(default)s)")
    openai.add_argument("--retries", type=at_least(0), default=6, help="of a request (default: %(default)s)")
    openai.add_argument("--timeout", type=float, default=60.0, help="seconds for one attempt (default: %(default)s)")
    openai.add_argument("--seed", type=int, default=0, help="given to the endpoint (default: %(default)s)")
    local = parser.add_argument_group("--judge local")
    local.add_argument("--revision", help="commit of a hub id; required for one")
    local.add_argument("--weights-sha256", help="refuse weights with another digest than this")
    local.add_argument("--batch-size", type=at_least(1), default=8, help="cases at a time (default: %(default)s)")
    replay = parser.add_argument_group("--judge replay")
    replay.add_argument("--verdicts", help="the record: an export, or the verdict file of an earlier call")
    replay.add_argument(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="published: pred and score as gpt-3.5 said them, counted as published (default: %(default)s)",
    )
    replay.add_argument("--only", metavar="TEXT", help="of the recorded judges the one with TEXT in its identity")
    return parser
