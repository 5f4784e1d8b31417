"""`lavis-lstp chain`: steps in order, each once, going on where it was stopped; and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavis_lstp.commands import chain as chains
from lavis_lstp.commands import cli
from lavis_lstp.commands.chain import Chain, Step, read_chain
from lavis_lstp.errors import ConfigError, LstpError

ROOT = Path(__file__).resolve().parents[2]
WRITES = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
COUNTS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))
state, go = map(pathlib.Path, sys.argv[1:])
for number in range(len(state.read_text()) if state.exists() else 0, 4):
    with open(state, "a") as file:
        file.write(str(number))
    while not go.exists():
        time.sleep(0.01)
"""
"""A step that remembers how far it came, and after the first quarter waits for a file."""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- steps


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path):
    runs = tmp_path / "runs"
    work = Chain(tmp_path)
    for _ in range(2):
        work.step("one", ["-c", WRITES, str(runs), "x"])
    assert runs.read_text() == "x" and set(work.seconds) == {"one"}
    failing = ["-c", "import sys; print('what went wrong\\n'); sys.exit(3)"]
    for _ in range(2):
        with pytest.raises(LstpError, match="step two ended with status 3: what went wrong") as error:
            work.step("two", failing)
        assert "\n" not in str(error.value) and str(tmp_path / "two" / "output.txt") in str(error.value)
    assert "two" not in work.seconds and not work.is_done("two")


def test_the_reason_is_the_users_error_even_where_more_is_printed_after_it(tmp_path):
    earlier, later = ["-c", "print('error: of the first try'); 1 / 0"], "error: no such video"
    code = f"import sys; print({later!r}); print('=====\\nChildFailedError'); sys.exit(1)"
    with pytest.raises(LstpError, match="of the first try"):
        Chain(tmp_path).step("one", earlier)
    (tmp_path / "one" / "command.json").unlink()
    with pytest.raises(LstpError, match="status 1: no such video") as error:
        Chain(tmp_path).step("one", ["-c", code])
    assert "first try" not in str(error.value)
    assert "of the first try" in (tmp_path / "one" / "output.txt").read_text()


def test_results_of_other_options_do_not_pass_for_these(tmp_path):
    Chain(tmp_path).step("one", ["-c", "pass"])
    with pytest.raises(ConfigError, match="other options.*--from one"):
        Chain(tmp_path).step("one", ["-c", "0"])


def test_results_of_an_earlier_recipe_do_not_pass_for_the_edited_ones(tmp_path):
    recipe = write(tmp_path / "r.yaml", "run: {seed: 1}")
    work, step = Chain(tmp_path), Step("one", "train", recipe=str(recipe))
    work.command = lambda step: ["-c", "pass"]
    work.run([step])
    write(recipe, "# the same\nrun:\n  seed: 1\n")
    work.run([step])
    write(recipe, "run: {seed: 2}")
    with pytest.raises(ConfigError, match="r.yaml was edited after step one was done.*--from one") as error:
        work.run([step])
    assert "\n" not in str(error.value)
    work.run(work.start_from([step], "one"))
    write(tmp_path / "one" / "done.json", '{"seconds": 3}')  # of an earlier version
    work.run([step])
    assert work.seconds == {"one": 3}


def test_the_launcher_stands_for_python_and_is_not_compared(tmp_path):
    work = Chain(tmp_path, launcher=[sys.executable, "-X", "dev"])
    code = "import sys; sys.exit(int(sys.flags.dev_mode))"
    with pytest.raises(LstpError, match="status 1"):
        work.step("one", ["-c", code], launch=True)
    Chain(tmp_path).step("one", ["-c", code], launch=True)
    with pytest.raises(ConfigError, match="cannot start no-such-launcher: No such file or directory; check --launcher"):
        Chain(tmp_path, launcher=["no-such-launcher"]).step("two", ["-c", code], launch=True)


# ---- stopped and started again


def start(out: Path) -> subprocess.Popen:
    """A process that runs three steps; returns when the second one waits, or the process has ended."""
    code = (
        "import sys; from pathlib import Path; from lavis_lstp.commands.chain import Chain; out = Path(sys.argv[1])\n"
        f"work = Chain(out); work.step('first', ['-c', {WRITES!r}, str(out / 'first.txt'), 'x'])\n"
        f"work.step('counts', ['-c', {COUNTS!r}, str(out / 'counts.txt'), str(out / 'go')])\n"
        f"work.step('last', ['-c', {WRITES!r}, str(out / 'last.txt'), 'x'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE, text=True)
    counts = out / "counts.txt"
    wait_for(lambda: (counts.exists() and counts.stat().st_size) or process.poll() is not None)
    return process


def wait_for(condition) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "nothing happened for five minutes"
        time.sleep(0.01)


def at_work(folder: Path) -> bool:
    try:
        with chains._locked(folder):
            return False
    except LstpError:
        return True


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_chain_that_was_killed_goes_on_where_it_was(tmp_path, sent):
    process = start(tmp_path)
    process.send_signal(sent)
    process.communicate(timeout=300)
    assert process.returncode == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    assert (tmp_path / "counts.txt").read_text() == "0" and not Chain(tmp_path).is_done("counts")
    if sent == signal.SIGKILL:  # the step outlives the chain, and must not get a twin
        again = start(tmp_path)
        assert "a process of an earlier call still works here" in again.communicate(timeout=300)[1]
        assert again.returncode == 1 and (tmp_path / "counts.txt").read_text() == "0"
    (tmp_path / "go").touch()
    if sent == signal.SIGKILL:
        wait_for(lambda: (tmp_path / "counts.txt").read_text() == "0123")
        wait_for(lambda: not at_work(tmp_path / "counts"))
    again = start(tmp_path)
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert (tmp_path / "counts.txt").read_text() == "0123"  # nothing twice
    assert (tmp_path / "first.txt").read_text() == (tmp_path / "last.txt").read_text() == "x"


STOPPED_ALONE = ["raise SystemExit(143)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]


@pytest.mark.parametrize("code", STOPPED_ALONE)
def test_a_step_that_was_signalled_alone_is_stopped_and_not_failed(tmp_path, code):
    """On preemption Slurm signals the tasks below the chain, not the chain; run.sbatch queues the job again at 143."""
    with pytest.raises(SystemExit) as stopped:
        Chain(tmp_path).step("one", ["-c", code])
    assert stopped.value.code == 143 and not Chain(tmp_path).is_done("one")


def test_sigterm_reaches_a_step_that_then_ends_well(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); open(sys.argv[1], 'w')\n"
    run = f"Chain(Path({str(tmp_path)!r})).step('one', ['-c', {code + 'time.sleep(60)'!r}, {str(tmp_path / 'up')!r}])"
    command = f"from pathlib import Path; from lavis_lstp.commands.chain import Chain; {run}"
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "up").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    assert Chain(tmp_path).is_done("one")  # its work is done and is not to be done again


@pytest.mark.slow
def test_a_chain_of_forked_runs_that_was_stopped_ends_with_the_weights_of_the_commands_typed(tmp_path):
    sizes = {"train_videos": 1, "val_videos": 1, "test_videos": 1, "train_images": 600}
    options = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in sizes.items()]
    options += [f"datasets.lstp_shapes.root={tmp_path / 'shapes'}", "run.max_epoch=4", "run.log_freq=1"]
    evaluation = {"evaluate": "projects/lstp/tiny_eval.yaml", "options": ["model.checkpoint={out}/base"]}
    evaluation["options"] += ["model.selector.name=uniform", "model.flow.name=none", "datasets.lstp_shapes.flow=none"]
    steps = {"base": {"train": "projects/lstp/tiny_base.yaml"}, "eval": evaluation}
    file = write(tmp_path / "c.yaml", json.dumps({"options": options, "steps": steps}))
    for step in read_chain(file):  # as they would be typed
        subprocess.run([sys.executable, *Chain(tmp_path / "typed").command(step)], check=True)
    output = tmp_path / "chain/base/output.txt"
    command = [sys.executable, "-m", "lavis_lstp", "chain", str(file), "--out", str(tmp_path / "chain")]
    process = subprocess.Popen(command)
    wait_for(lambda: process.poll() is not None or (output.exists() and "step 3:" in output.read_text()))
    process.terminate()
    assert process.wait(timeout=300) == 143 and not Chain(tmp_path / "chain").is_done("base")
    subprocess.run(command, check=True)
    assert "starting at step" in output.read_text()
    for name in ("base/checkpoints/*/model.safetensors", "eval/result/test_video_qa.jsonl"):
        typed, chained = (next((tmp_path / out).glob(name)).read_bytes() for out in ("typed", "chain"))
        assert typed == chained, name


# ---- chain files

FILE = """
options: ["datasets.d.root={out}/data"]
steps:
  spans: {evaluate: a.yaml, options: ["run.spans_out={out}/spans_{split}.json"]}
  flow: {command: [flow, "{out}/data", --size, 64]}
  lstp: {train: b.yaml}
"""


def test_commands_are_those_a_user_would_type(tmp_path):
    steps = read_chain(write(tmp_path / "c.yaml", FILE))
    options = ["run.seed=1", "spans:run.batch_size_eval=4", "lstp:run.init_lr=1e-3"]
    spans, flow, lstp = (Chain(Path("o"), options).command(step) for step in steps)
    common = "datasets.d.root=o/data"
    assert spans == (
        f"-m lavis.evaluate --cfg-path a.yaml --options {common} run.spans_out=o/spans_{{split}}.json run.seed=1 "
        "run.batch_size_eval=4 run.output_dir=o/spans"
    ).split(" ")
    assert flow == "-m lavis_lstp flow o/data --size 64".split(" ")
    assert lstp == (
        f"-m lavis.train --cfg-path b.yaml --options {common} run.seed=1 run.init_lr=1e-3 run.output_dir=o/lstp "
        "run.resume_ckpt_path=auto"
    ).split(" ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "expected a mapping of steps"),
        ("steps: {}", "expected a mapping of steps"),
        ("steps: {a: {train: x}}\nmore: 1", "nothing else but options; got ['steps', 'more']"),
        ("steps: {a: {train: x, evaluate: y}}", "step a: expected one of train, evaluate, command"),
        ("steps: {a: {trian: x}}", "step a: expected one of train, evaluate, command"),
        ("steps: {a/b: {train: x}}", "step a/b"),
        ("steps: {a: {command: flow}}", "step a: command: expected a list of words, got 'flow'"),
        ("steps: {a: {command: [flow], options: [a.b=c]}}", "further words"),
        ("steps: {a: {train: x, options: run.seed=1}}", "step a: options: expected a list of words"),
        ("steps: {a: [", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_with_a_chain_file_is_said_in_one_line(tmp_path, text, said):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as error:
        read_chain(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def run(*words: object) -> int:
    return cli.main(["chain", *map(str, words)])


def test_the_command_runs_lists_and_starts_from_a_step(tmp_path, capsys):
    text = "steps: {one: {command: [--version]}, two: {command: [list, --help]}, three: {command: [--version]}}"
    path, out = write(tmp_path / "c.yaml", text), tmp_path / "out"
    assert run(path, "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: one ")
    assert run(path, "--out", out, "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "one (done): python -m lavis_lstp --version" and len(listed) == 3
    before = (out / "one" / "done.json").stat().st_mtime_ns
    assert run(path, "--out", out, "--from", "two") == 0
    assert (out / "one" / "done.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == ["one", "three", "three.1", "two", "two.1"]
    assert json.loads((out / "two" / "command.json").read_text()) == ["-m", "lavis_lstp", "list", "--help"]


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    tiny, out = "projects/lstp/chains/tiny.yaml", tmp_path / "out"
    missing = write(tmp_path / "missing.yaml", "steps: {one: {train: projects/lstp/tiny_fft.yaml}}")
    one = "{one: {train: projects/lstp/tiny_base.yaml}}"
    trial = write(tmp_path / "trial.yaml", f"{{options: [run.fast_dev_run=true], steps: {one}}}")
    failing = write(tmp_path / "failing.yaml", "steps: {one: {command: [no-such-command]}}")
    cases = [
        ([], "name a chain file; known: "),
        (["projects/lstp/chains/tinny.yaml"], "did you mean 'projects/lstp/chains/tiny.yaml'"),
        ([tiny, "--from", "samplr"], r"unknown step \(--from\) 'samplr'; did you mean 'sampler'"),
        ([tiny, "--options", "samplr:run.seed=1"], "did you mean 'sampler'"),
        ([tiny, "--options", "flow:run.seed=1"], "known: base, lstp, sampler, spans"),
        ([tiny, "--options", "run.seed"], "option 'run.seed' has no value"),
        ([tiny, "--options", "run.fast_dev_run=true"], "of one run, .*; use run.limit_batches=2"),
        ([tiny, "--options", "sampler:run.fast_dev_run=true"], "of one run, .*; use run.limit_batches=2"),
        ([trial], "step one: .* of one run, .*; use run.limit_batches=2"),
        ([tiny, "--options", "sampler:run.int_lr=1"], "step sampler: .*did you mean 'run.init_lr'"),
        ([missing], "step one: unknown config file 'projects/lstp/tiny_fft.yaml'; did you mean"),
        ([failing], f"step one ended with status 2: .*no-such-command.* \\(see {out}/one/output.txt\\)"),
    ]
    for words, said in cases:
        assert run(*words, "--out", out) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and re.search(said, lines[0]), (words, lines)


def test_the_files_there_are_can_be_listed_and_read(capsys):
    assert run("--list") == 0
    listed = capsys.readouterr().out.split()
    assert "projects/lstp/chains/tiny.yaml" in listed
    for name in listed:
        steps = read_chain(chains.find_chain(name))
        chains.check_recipes(Chain(Path("out")), steps)
        assert all(isinstance(step, Step) for step in steps)


def test_a_step_that_goes_on_says_so(tmp_path, caplog, monkeypatch):
    from lavis_lstp.commands import chain

    monkeypatch.setattr(chain, "TELL_EVERY_S", 0.1)
    one = chain.Chain(tmp_path)
    one.about_s["slow"] = 2
    with caplog.at_level("INFO"):
        one.step("slow", ["-c", "import time; time.sleep(0.7)"], place="step 2 of 3, ")
    said = [record.getMessage() for record in caplog.records]
    assert "step 2 of 3, slow: takes about 2 s" in said
    assert any(re.fullmatch(r"step 2 of 3, slow: \d s so far, of about 2 s", line) for line in said)
