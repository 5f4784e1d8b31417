"""`lavis-lstp chain FILE --out DIR`: several runs, one after the other, each reading what the ones before it left.

In: a chain file, for instance projects/lstp/chains/vicuna7b.yaml:

    options: [run.seed=43]                      # of every run; may be left out
    steps:
      spans: {evaluate: projects/lstp/spans_vicuna7b.yaml, options: ["run.spans_out={out}/spans_{split}.json"]}
      sampler: {train: projects/lstp/sampler_vicuna7b.yaml, options: [...]}
      flow: {command: [flow, VIDEOS, "{out}/flow"]}    # any other `lavis-lstp ...`

Out: a folder for each step in DIR. A step is the command a user would type, in a process of its own (`host.warm` says
which is forked); its words are kept in command.json, what it prints in output.txt; done.json, with a digest of its
recipe, comes last. A done step is not run again; one that was stopped goes on: training from its last checkpoint,
everything else as its command does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from lavis_lstp.errors import ConfigError, LstpError, unknown_name
from lavis_lstp.files import owned, read_record, sha256_json, strict_json, sweep, write_json
from lavis_lstp.host.warm import Warm
from lavis_lstp.redaction import printable, without_secrets, without_secrets_in
from lavis_lstp.untrusted import guard_log

logger = logging.getLogger(__name__)

KINDS = ("train", "evaluate", "command")
TELL_EVERY_S = 20.0
"""Seconds between two lines of a step that goes on."""
NO_TRIAL = "run.fast_dev_run is of one run, later ones would find nothing; use run.limit_batches=2"
STOPPED = 128 + signal.SIGTERM
STOPS = (STOPPED, -signal.SIGTERM)
"""How a process ends that SIGTERM stopped: in order, or at once."""


@dataclass(frozen=True)
class Step:
    """One step of a chain file.

    Args:
        kind: train or evaluate, `python -m lavis.<kind>`; or command, `python -m lavis_lstp`.
        recipe: what to train or evaluate.
        words: of a command.
        options: `--options` of this step.
    """

    name: str
    kind: str
    recipe: str = ""
    words: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Chain:
    """Steps, each in a folder of its own below `out`.

    Args:
        out: working folder; what `{out}` stands for in a chain file.
        options: further `--options`, for every run or, as `STEP:a.b=c`, for one.
        launcher: words that stand for `python` in front of `-m lavis.train`, such as torchrun and its arguments.

    Raises:
        ConfigError: an option that no run of a chain can follow.
    """

    def __init__(self, out: Path, options: Sequence[str] = (), launcher: Sequence[str] = ()):
        if any(option.partition("=")[0].rpartition(":")[2] == "run.fast_dev_run" for option in options):
            raise ConfigError(NO_TRIAL)
        self.out = out
        self.options = list(options)
        self.launcher = list(launcher) or [sys.executable]
        self.warm = Warm()
        self.seconds: dict[str, float] = {}
        self.about_s: dict[str, float] = {}  # how long a step takes, where that is known

    def run(self, steps: Sequence[Step], then: Callable[[Step], None] = lambda step: None) -> None:
        """Each step that is not done yet; of several, each line of the log says which it is of how many.

        Args:
            then: called with each step when it is done.

        Raises:
            ConfigError: a folder holds a step with other options, or done by a recipe that was edited since.
            LstpError: a step failed.
        """
        try:
            for number, step in enumerate(steps, 1):
                place = f"step {number} of {len(steps)}, " if len(steps) > 1 else ""
                self.step(step.name, self.command(step), launch=step.kind != "command", recipe=step.recipe, place=place)
                then(step)
        finally:
            self.warm.close()

    def command(self, step: Step) -> list[str]:
        """What stands behind `python`."""
        if step.kind == "command":
            return ["-m", "lavis_lstp", *(self._placed(word) for word in step.words)]
        own = [option.partition(":")[2] for option in self.options if _step_of(option) == step.name]
        common = [option for option in self.options if not _step_of(option)]
        options = [self._placed(option) for option in (*step.options, *common, *own)]
        options.append(f"run.output_dir={self.out / step.name}")
        if step.kind == "train":
            options.append("run.resume_ckpt_path=auto")
        return ["-m", f"lavis.{step.kind}", "--cfg-path", step.recipe, "--options", *options]

    def _placed(self, text: str) -> str:
        return text.replace("{out}", str(self.out))

    def is_done(self, name: str) -> bool:
        return (self.out / name / "done.json").is_file()

    def step(self, name: str, command: list[str], *, launch: bool = False, recipe: str = "", place: str = "") -> None:
        """Runs a command, unless `done.json` in the step's folder says that it has been run to the end.

        Args:
            launch: by the launcher, not by plain python.
            recipe: the file that the command reads; '' = none.
            place: what the log says before the step's name.

        Raises:
            ConfigError: the folder holds the same step with other options or of another recipe, whose results must not
                pass for these.
            LstpError: the command failed, or another process is at it.
            SystemExit: SIGTERM came: to this process, which passed it on, or to the command alone, as Slurm does.
        """
        folder = self.out / name
        started, done, output = folder / "command.json", folder / "done.json", folder / "output.txt"
        recorded = without_secrets_in(command)
        if started.is_file() and _command_of(started) != recorded:
            raise ConfigError(
                f"{folder} holds this step with other options ({started}); choose another --out, remove that folder, "
                f"or in a chain run it and what follows again with --from {name}"
            )
        content = _content(recipe) if recipe else {}
        digest = sha256_json(content) if recipe else None
        if done.is_file():
            before = read_record(done, {"seconds": lambda value: type(value) in (int, float)}, error=ConfigError)
            if before.get("recipe", digest) != digest:  # files of earlier versions have none
                raise ConfigError(
                    f"{recipe} was edited after step {name} was done by it ({folder}); choose another --out, or run "
                    f"the step and what follows again with --from {name}"
                )
            self.seconds[name] = before["seconds"]
            logger.info("%s: done before, in %.0f s", place + name, self.seconds[name])
            return
        launcher = self.launcher if launch else [sys.executable]
        warm = self.warm if launch and launcher == [sys.executable] and _is_on_cpu(content, command) else None
        whole = [*launcher, *command]
        logger.info("%s: %s", place + name, without_secrets(shlex.join(whole)))
        about = f", of about {self.about_s[name]:.0f} s" if name in self.about_s else ""
        if about:
            logger.info("%s: takes about %.0f s", place + name, self.about_s[name])
        with _locked(folder) as lock:
            sweep(folder, lambda name: name in (started.name, done.name))
            write_json(started, recorded)
            size = output.stat().st_size if output.is_file() else 0
            begin = time.perf_counter()
            status, stopped = _call(whole, output, lock, f"{place}{name}: %.0f s so far{about}", warm)
            stopped = stopped or status in STOPS
            if status and not stopped:
                raise LstpError(f"step {name} ended with status {status}: {_reason(output, size)} (see {output})")
            if not status:
                self.seconds[name] = time.perf_counter() - begin
                write_json(done, {"seconds": self.seconds[name], "recipe": digest})
                logger.info("%s: %.0f s", place + name, self.seconds[name])
            if stopped:
                logger.warning("SIGTERM: stopped in step %s; the same command goes on from here", name)
                raise SystemExit(STOPPED)

    def start_from(self, steps: Sequence[Step], name: str) -> list[Step]:
        """The steps from `name` on, their earlier results moved aside to `<step>.1`, `.2`, ...

        Raises:
            ConfigError: no such step.
        """
        names = [step.name for step in steps]
        if name not in names:
            raise ConfigError(unknown_name("step (--from)", name, names))
        rest = list(steps[names.index(name) :])
        for step in rest:
            folder, number = self.out / step.name, 1
            while folder.with_name(f"{step.name}.{number}").exists():
                number += 1
            if folder.exists():
                with _locked(folder):
                    folder.rename(folder.with_name(f"{step.name}.{number}"))
                logger.info("moved %s to %s.%d", folder, step.name, number)
        return rest


def _command_of(started: Path) -> list[str] | None:
    """The command in a step's `command.json`; None where the file holds something else."""
    try:
        found = strict_json(started.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _content(recipe: str) -> dict[str, Any]:
    """Return what the file says, without its comments and blanks."""
    from omegaconf import OmegaConf

    from lavis_lstp.config import find_config, load_recipe

    return OmegaConf.to_container(load_recipe(find_config(recipe)))


def _is_on_cpu(recipe: Mapping[str, Any], command: Sequence[str]) -> bool:
    """Return True where a run may be forked from a process that has imported LAVIS (host/warm.py)."""
    told = [word.removeprefix("run.device=") for word in command if word.startswith("run.device=")]
    return sys.platform == "linux" and [(recipe.get("run") or {}).get("device"), *told][-1] == "cpu"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Holds the folder's lock, also for child processes that are given the descriptor, until the last one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LstpError(
                f"{folder}: a process of an earlier call still works here; wait for it, or end it"
            ) from None
        yield lock.fileno()


def _call(command: Sequence[str], output: Path, lock: int, going_on: str, warm: Warm | None) -> tuple[int, bool]:
    """Exit status, and whether SIGTERM came; it is passed on, and the command may take its time to save.

    Args:
        going_on: what to log every `TELL_EVERY_S` seconds, with the seconds so far.
        warm: starts `python -m ...` with LAVIS imported; None = as any other program.
    """
    begin = time.perf_counter()
    process, stopped = None, False

    def pass_on(*unused: Any) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, pass_on) if main else None
    try:
        with open(output, "a", encoding="utf-8") as log:
            try:
                if warm:
                    process = warm.start(command[2:], log.fileno(), lock)
                else:
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
            except OSError as error:
                raise ConfigError(f"cannot start {command[0]}: {error.strerror}; check --launcher") from error
            if stopped:
                process.terminate()
            while True:
                try:
                    return process.wait(timeout=TELL_EVERY_S), stopped
                except subprocess.TimeoutExpired:
                    logger.info(going_on, time.perf_counter() - begin)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _reason(output: Path, start: int) -> str:
    """The line that says why: an error of ours, which torchrun hides under its own, else the last one."""
    with open(output, encoding="utf-8", errors="replace") as log:
        log.seek(start)
        lines = [line.strip() for line in log if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    return (ours or lines[-1:] or ["no output"])[0].removeprefix("error: ")


# ---- chain files ------------------------------------------------------------------------------------------------


def read_chain(path: Path) -> list[Step]:
    """The steps of a chain file.

    Raises:
        ConfigError: it is not of the form that this module's text shows.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    content = content if isinstance(content, Mapping) else {}
    steps = content.get("steps")
    if not isinstance(steps, Mapping) or not steps or not set(content) <= {"options", "steps"}:
        raise ConfigError(f"{path}: expected a mapping of steps, and nothing else but options; got {list(content)}")
    common = _words(content.get("options", []), f"{path}: options")
    return [_read_step(str(name), step, common, f"{path}: step {name}") for name, step in steps.items()]


def _read_step(name: str, step: Any, common: tuple[str, ...], where: str) -> Step:
    given = [kind for kind in KINDS if isinstance(step, Mapping) and kind in step]
    if len(given) != 1 or not set(step) <= {given[0], "options"} or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"{where}: expected one of {', '.join(KINDS)}, and options; got {step!r}")
    kind = given[0]
    if kind == "command":
        if "options" in step:
            raise ConfigError(f"{where}: a command takes its options as further words of the list")
        return Step(name, kind, words=_words(step[kind], f"{where}: command"))
    options = _words(step.get("options", []), f"{where}: options")
    return Step(name, kind, recipe=str(step[kind]), options=(*common, *options))


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, (str, int, float)) for word in value):
        raise ConfigError(f"{where}: expected a list of words, got {value!r}")
    return tuple(map(str, value))


def _step_of(option: str) -> str:
    """`spans:run.seed=1` -> `spans`; '' where it is for every step."""
    return option.partition("=")[0].rpartition(":")[0]


def check_options(options: Sequence[str], steps: Sequence[Step]) -> None:
    """Raise ConfigError for an option that is not of the form [STEP:]A.B=C, or for no run of this chain."""
    runs = [step.name for step in steps if step.kind != "command"]
    for option in options:
        if "=" not in option:
            raise ConfigError(f"option '{option}' has no value; write [STEP:]A.B=VALUE")
        if _step_of(option) and _step_of(option) not in runs:
            raise ConfigError(unknown_name(f"step in option {option}:", _step_of(option), runs))


def find_chain(path: str) -> Path:
    """As given, else among the chains of the package or its checkout.

    Raises:
        ConfigError: it is nowhere.
    """
    from lavis_lstp.config import PACKAGE

    for root in (Path(), PACKAGE, PACKAGE.parent):
        if (root / path).is_file():
            return root / path
    raise ConfigError(unknown_name("chain file", path, chains()))


def chains() -> list[str]:
    """Chain files that are found without a checkout."""
    from lavis_lstp.config import project_files

    return project_files("lstp/chains/*.yaml")


def check_recipes(chain: Chain, steps: Sequence[Step]) -> None:
    """Completes every run's configuration now: a misspelt key should not wait for the days that step 1 takes.

    Raises:
        ConfigError: step, file and key that are wrong, or a recipe or the chain file makes a trial of one run.
    """
    from lavis_lstp import register
    from lavis_lstp.config import Config

    register()
    for step in steps:
        if step.kind == "command":
            continue
        command = chain.command(step)
        try:
            config = Config(SimpleNamespace(cfg_path=step.recipe, options=command[command.index("--options") + 1 :]))
            if config.run_cfg.get("fast_dev_run"):
                raise ConfigError(NO_TRIAL)
        except ConfigError as error:
            raise type(error)(f"step {step.name}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp chain", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="chain file, such as projects/lstp/chains/tiny.yaml")
    parser.add_argument("--out", type=Path, help="working folder (default: output/chains/NAME)")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--nproc", type=int, help="processes, one a GPU, on this machine")
    processes.add_argument("--launcher", default="", help='instead of python, such as "torchrun --nproc_per_node 8"')
    parser.add_argument("--from", dest="start", metavar="STEP", help="run STEP and what follows again, even if done")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="[STEP:]A.B=C", help="overrides")
    parser.add_argument("--list", action="store_true", help="show the steps and run none; without a file, the files")
    args = parser.parse_args(argv)
    if args.list and not args.file:
        print(printable("\n".join(chains())))
        return 0
    if not args.file:
        raise ConfigError(f"name a chain file; known: {', '.join(chains())}")
    launcher = shlex.split(args.launcher)
    if args.nproc:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]
    steps = read_chain(find_chain(args.file))
    check_options(args.options, steps)
    chain = Chain(args.out or Path("output/chains", Path(args.file).stem), args.options, launcher)
    if args.list:
        for step in steps:
            state = "done" if chain.is_done(step.name) else "to do"
            print(printable(without_secrets(f"{step.name} ({state}): python {shlex.join(chain.command(step))}")))
        return 0
    check_recipes(chain, steps)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    guard_log()
    with owned(chain.out):
        chain.run(chain.start_from(steps, args.start) if args.start else steps)
    print(f"{chain.out}: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in chain.seconds.items())}")
    return 0
