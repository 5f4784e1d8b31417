"""`lavis-lstp COMMAND ...`: a table of commands, each a `main(argv)` in a module that is imported when asked for.

In: the words of a command line. Out: the command's output and its exit status; 2, after one line on stderr, where the
input or the system is at fault.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lavis_lstp import __version__
from lavis_lstp.errors import ConfigError, run_command
from lavis_lstp.host import hook
from lavis_lstp.redaction import printable

if TYPE_CHECKING:
    from lavis_lstp.inference.predictor import Predictor

COMMANDS = {
    "ablate": ("lavis_lstp.commands.ablate:main", "compare ways of choosing frames: does the sampler help?"),
    "ask": ("lavis_lstp.commands.ask:main", "ask a question about a video file"),
    "cache": ("lavis_lstp.commands.cache:main", "show or clear what is kept on disk about videos"),
    "calibrate": ("lavis_lstp.judging.calibrate:main", "say how far two judges of the same answers agree"),
    "chain": ("lavis_lstp.commands.chain:main", "run the steps of a chain file, from where the last call stopped"),
    "chat": ("lavis_lstp.commands.chat:main", "ask question after question about a video, in a terminal or a pipe"),
    "compare": ("lavis_lstp.judging.compare:main", "test whether one model answers better than another"),
    "convert": ("lavis_lstp.commands.convert:main", "turn published weights into a small folder for model.checkpoint"),
    "demo": ("lavis_lstp.commands.demo:main", "generate data, train, evaluate and print the table"),
    "doctor": ("lavis_lstp.commands.doctor:main", "say what works on this machine, and why the rest does not"),
    "estimate": ("lavis_lstp.commands.estimate:main", "say how much memory a training run takes, before it is started"),
    "export": ("lavis_lstp.commands.export:main", "write a folder that plain transformers loads, LoRA merged"),
    "flow": ("lavis_lstp.commands.flow:main", "compute optical flow once, for `flow: precomputed`"),
    "import-answers": ("lavis_lstp.judging.published:main", "read answers and verdicts of the published evaluation"),
    "judge": ("lavis_lstp.judging.judge:main", "say which answers are right: rules, a language model, or a record"),
    "report": ("lavis_lstp.commands.report:main", "write one HTML page about evaluations: tables, plots, questions"),
    "select": ("lavis_lstp.commands.select:main", "choose the frames of a film that a question asks for"),
    "serve": ("lavis_lstp.commands.serve:main", "answer browsers, and programs that speak OpenAI's API"),
    "verify-result": ("lavis_lstp.report.result:main", "recompute the numbers of a result file from its predictions"),
    "list": ("lavis_lstp.commands.cli:list_names", "list models, datasets, tasks, runners or recipes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an error of the user's."""
    hook.sleep_while_waiting()
    width = max(map(len, COMMANDS)) + 2
    table = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in sorted(COMMANDS.items()))
    parser = argparse.ArgumentParser(
        prog="lavis-lstp",
        description="LSTP for LAVIS: look at the frames a question asks for.",
        epilog=f"commands:\n{table}\n\n`lavis-lstp COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lavis_lstp {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the command takes")
    args = parser.parse_args(argv)
    module, _, function = COMMANDS[args.command][0].partition(":")
    return run_command(lambda: getattr(importlib.import_module(module), function)(args.arguments))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options with which `ask`, `chat` and `serve` name the model that answers."""
    parser.add_argument("--example", action="store_true", help="take the shipped tiny model and the shipped clip")
    parser.add_argument("--checkpoint", help="a run's folder, one of its checkpoints, or a weights file")
    parser.add_argument("--model", default="lstp_tiny", help="without a run's folder (default: lstp_tiny)")
    parser.add_argument("--model-type", help="default: the model's default type")
    parser.add_argument("--num-frames", type=int, help="frames to read, evenly spaced (default: as the run; else 64)")
    parser.add_argument("--options", nargs="*", default=[], metavar="model.A=B", help="overrides of the model config")


def check_model_options(args: argparse.Namespace) -> None:
    """Checks what `add_model_options` added before anything slow begins; --example becomes its checkpoint.

    Raises:
        ConfigError: --example stands beside a checkpoint, or a number of frames cannot be read.
    """
    from lavis_lstp.inference.loading import EXAMPLE

    if args.example:
        if args.checkpoint:
            raise ConfigError("--example brings its own checkpoint; leave out --checkpoint")
        args.checkpoint = str(EXAMPLE)
    if args.num_frames is not None and args.num_frames < 1:
        raise ConfigError(f"--num-frames must be at least 1, got {args.num_frames}")


def built_predictor(args: argparse.Namespace, **limits: Any) -> Predictor:
    """Builds the predictor that checked options name, and prints its notes to stderr."""
    from lavis_lstp.inference.predictor import Predictor

    predictor = Predictor.build(
        args.model, args.model_type, args.checkpoint, args.options, num_frames=args.num_frames, **limits
    )
    for note in predictor.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    return predictor


def list_names(argv: Sequence[str] | None = None) -> int:
    """Print the names LAVIS knows, this package's and its own, one a line."""
    kinds = ("models", "datasets", "tasks", "runners", "recipes")
    parser = argparse.ArgumentParser(prog="lavis-lstp list", description="Names that a configuration may use.")
    parser.add_argument("kind", choices=kinds)
    kind = parser.parse_args(argv).kind
    for line in _names(kind):
        print(printable(line))
    return 0


def _names(kind: str) -> list[str]:
    """The names that LAVIS's registry would list, from our tables and LAVIS's sources; nothing is imported."""
    if kind == "recipes":
        from lavis_lstp.config import recipes

        return recipes()
    from lavis_lstp.config.data import names as datasets
    from lavis_lstp.config.lavis_names import lavis_names
    from lavis_lstp.config.run import RUNNERS, TASKS

    names = lavis_names(kind)
    if kind == "models":
        from lavis_lstp.models.variants import MODEL_TYPES

        return [f"{name}  {', '.join(types)}" for name, types in sorted({**names, **MODEL_TYPES}.items())]
    return sorted({*names, *{"datasets": datasets(), "tasks": TASKS, "runners": RUNNERS}[kind]})
