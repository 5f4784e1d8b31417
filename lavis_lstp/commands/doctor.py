"""`lavis-lstp doctor`: what works on this machine, and why the rest does not.

In: the environment. Out: a report for people, or JSON; exit status 1 if the main job, training and asking the
built-in model on this machine, could not run. Each check imports what it checks and nothing is downloaded. With
`--scan FOLDER` it looks for keys in a folder instead, and the status is 1 where there are any; with `--lavis` it prints
the tested table of LAVIS's own models.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lavis_lstp.commands import scan
from lavis_lstp.redaction import printable

REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "peft": "peft",
    "av": "av",
    "opencv-python-headless": "cv2",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "safetensors": "safetensors",
    "webdataset": "webdataset",
}
"""Distribution -> module that the main job imports."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `required` says whether the main job needs it."""

    part: str
    name: str
    usable: bool
    detail: str
    required: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--scan", metavar="FOLDER", help="look for keys and passwords in a folder instead")
    parser.add_argument(
        "--lavis", action="store_true", help="which of LAVIS's own models work here, and why others do not"
    )
    args = parser.parse_args(argv)
    if args.lavis:
        from lavis_lstp.host import lavis_table

        rows = [row._asdict() for row in lavis_table.ROWS]
        print(json.dumps(rows, indent=2) if args.json else lavis_table.table())
        return 0
    if args.scan:
        found, text = scan.report(args.scan)
        print(json.dumps([one._asdict() for one in found], indent=2) if args.json else printable(text))
        return 1 if found else 0
    findings = examine()
    broken = [finding.name for finding in findings if finding.required and not finding.usable]
    if args.json:
        report = {"usable": not broken, "broken": broken, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        print(_as_text(findings, broken))
    return 1 if broken else 0


def examine() -> list[Finding]:
    """Run all checks, in the order in which the main job would meet them."""
    return [*_system(), *_packages(), *_devices(), *_main_job(), *_shims(), *_optional()]


def _system() -> list[Finding]:
    from lavis_lstp import __version__

    return [
        Finding(
            "system", "python", sys.version_info >= (3, 10), f"{platform.python_version()} on {platform.platform()}"
        ),
        Finding("system", "lavis_lstp", True, f"{__version__} in {Path(__file__).parents[1]}"),
        _try("system", "import hook", _hook),
        _try("system", "temporary folder", _write_somewhere, required=True),
    ]


def _hook() -> str:
    """What makes a process that never mentions this package import it: `lavis_lstp.pth` in a site folder.

    Raises:
        RuntimeError: it is switched off, or not installed.
    """
    if os.environ.get("LAVIS_LSTP_DISABLE", "0") not in ("", "0"):
        raise RuntimeError("off: LAVIS_LSTP_DISABLE is set")
    for folder in _site_folders():
        file = Path(folder, "lavis_lstp.pth")
        if file.is_file() and "import lavis_lstp" in file.read_text(encoding="utf-8"):
            return f"on: `import lavis` registers this package, by {file}"
    raise RuntimeError(
        "off: no folder of this environment has lavis_lstp.pth; install the package (pip install .), "
        "or begin programs with `import lavis_lstp; lavis_lstp.register()`"
    )


def _site_folders() -> list[str]:
    """Folders whose .pth files may have been read at start; `site.addsitedir` leaves what it read in `sys.path`."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _packages() -> list[Finding]:
    return [
        _try("packages", name, lambda module=module, name=name: _import_version(module, name), required=True)
        for name, module in REQUIRED.items()
    ]


def _devices() -> list[Finding]:
    def gpu() -> str:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device; everything runs on the CPU")
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Finding("devices", "cpu", True, f"{cores} cores"), _try("devices", "gpu", gpu)]


def _main_job() -> list[Finding]:
    def lavis() -> str:
        import lavis

        return f"{_version('salesforce-lavis')} in {Path(lavis.__file__).parent}"

    def plugin() -> str:
        from lavis.common.registry import registry

        from lavis_lstp import register

        register()
        ours = [name for name in registry.list_models() + registry.list_datasets() if name.startswith("lstp")]
        return f"registered {', '.join(ours)}"

    def model() -> str:
        from lavis.models import load_model

        return f"lstp_tiny builds, {load_model('lstp_tiny').show_n_params()} parameters"

    def codec() -> str:
        import av

        av.codec.Codec("h264", "r")
        return f"PyAV {av.__version__} decodes H.264"

    found = [_try("main job", "video", codec, required=True)]
    for name, check in {"lavis": lavis, "plug-in": plugin, "model": model}.items():
        found.append(_try("main job", name, check, required=True))
        if not found[-1].usable:  # what follows would only repeat this in other words
            break
    return found


def _shims() -> list[Finding]:
    from lavis_lstp.host import shims

    return [
        Finding("shims", name, True, f"{'active' if active else 'not needed'}; since {since}; {why}")
        for name, why, since, active in shims.active()
    ]


def _optional() -> list[Finding]:
    def deepspeed() -> str:
        if importlib.util.find_spec("deepspeed") is None:
            raise RuntimeError("not installed; pip install 'lavis_lstp[deepspeed]'")
        return f"{_version('deepspeed')}, found but not imported"  # its import looks for compilers and may take long

    def decord() -> str:
        return _import_version("decord", "eva-decord" if _on_arm_mac() else "decord")

    found = [_try("optional", "deepspeed", deepspeed), _try("optional", "decord", decord)]
    for size in ("Large", "Small"):
        found.append(_try("weights", f"raft_{size.lower()}", lambda size=size: _raft_weights(size)))
    from lavis_lstp.models.weights.hub import HUB_MODELS

    return found + [_try("weights", repo, lambda repo=repo: _hub_weights(repo)) for repo in HUB_MODELS]


def _raft_weights(size: str) -> str:
    import torch

    from lavis_lstp.models.where.flow import RAFT_URLS

    url = RAFT_URLS[f"raft_{size.lower()}"]
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not file.is_file():
        raise RuntimeError(f"nothing downloads them by itself; put {url} there as {file}")
    return str(file)


def _hub_weights(repo: str) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    for name in ("config.json", "LSTP-7B.ckpt"):
        file = try_to_load_from_cache(repo, name)
        if isinstance(file, str):
            return str(Path(file).parent)
    raise RuntimeError(f"not downloaded; `hf download {repo}` puts it under {HF_HUB_CACHE}")


def _try(part: str, name: str, check: Callable[[], str], required: bool = False) -> Finding:
    """A check that raises is a part that is not usable, and the exception says why."""
    try:
        return Finding(part, name, True, check(), required)
    except Exception as error:  # whatever breaks an import is the finding
        return Finding(part, name, False, _one_line(error), required)


def _one_line(error: Exception) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return first if isinstance(error, RuntimeError) else f"{type(error).__name__}: {first}"


def _import_version(module: str, distribution: str) -> str:
    importlib.import_module(module)
    return _version(distribution)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _write_somewhere() -> str:
    with tempfile.NamedTemporaryFile() as handle:
        return f"{Path(handle.name).parent} is writable"


def _on_arm_mac() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _as_text(findings: Sequence[Finding], broken: Sequence[str]) -> str:
    lines, part = [], None
    for finding in findings:
        if finding.part != part:
            part = finding.part
            lines.append(f"\n{part}" if lines else part)
        mark = "ok" if finding.usable else ("BROKEN" if finding.required else "no")
        lines.append(f"  {mark:<7}{finding.name}: {finding.detail}")
    verdict = f"The main job cannot run: {', '.join(broken)}." if broken else "The main job can run."
    return "\n".join([*lines, "", verdict])
