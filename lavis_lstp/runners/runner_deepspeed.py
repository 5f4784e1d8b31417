"""`run.runner: runner_deepspeed`: RunnerLSTP with DeepSpeed's ZeRO in place of plain PyTorch.

In: what RunnerLSTP takes, and `run.deepspeed`. Out: the same files; a checkpoint's optimizer is one file per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry

from lavis_lstp import distributed
from lavis_lstp.config.run import RunSettings
from lavis_lstp.errors import ConfigError
from lavis_lstp.runners.deepspeed import config as deepspeed_config
from lavis_lstp.runners.deepspeed.engine import DeepSpeedEngine, DividedModel, import_deepspeed
from lavis_lstp.runners.runner_lstp import RunnerLSTP


@registry.register_runner("runner_deepspeed")
class RunnerDeepSpeed(RunnerLSTP):
    @classmethod
    def check_run(cls, run: Mapping[str, Any]) -> None:
        """Raise ConfigError where the two configurations do not go together, or DeepSpeed is not installed."""
        given, settings = cls._both(run)
        if not settings.evaluate:
            import_deepspeed(settings.torch_device())
            deepspeed_config.complete(given, settings, distributed.world_size())

    def read_settings(self) -> RunSettings:
        """Run settings and DeepSpeed's, each with what only the other says."""
        run = self.plain_config["run"]
        given, settings = self._both(run)
        stage = (given.get("zero_optimization") or {}).get("stage", 0)
        self.divided = stage == 3 and distributed.world_size() > 1
        if not settings.evaluate or self.divided:  # a checkpoint's weights can be evaluated without DeepSpeed
            import_deepspeed(settings.torch_device())
            self.deepspeed = deepspeed_config.complete(given, settings, distributed.world_size())
        run["deepspeed"] = given  # not the file's name: a checkpoint says what was in it
        return settings

    @staticmethod
    def _both(run: Mapping[str, Any]) -> tuple[dict[str, Any], RunSettings]:
        """The DeepSpeed configuration as given, and the run settings with what only it says."""
        if run.get("deepspeed") is None:
            raise ConfigError(
                "run.runner=runner_deepspeed needs run.deepspeed, for instance projects/lstp/deepspeed/zero2.json"
            )
        given = deepspeed_config.load(run["deepspeed"])
        return given, deepspeed_config.settings_with(run, given)

    def build_evaluation_engine(self) -> DividedModel | None:
        if not self.divided:
            return None
        return DividedModel(self.bare_model, self.deepspeed, device=self.device, precision=self.settings.precision)

    def build_engine(self) -> DeepSpeedEngine:
        return DeepSpeedEngine(self.bare_model, self.deepspeed, **self.engine_settings())
