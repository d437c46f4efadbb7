"""The small runs under FSDP2 as Accelerate sets it up, which it does on GPUs alone: here on CPU processes.

small_runs_fsdp.py FOLDER JOBS [CONFIG]     as small_runs.py, run by torchrun; CONFIG: a file of accelerate_configs
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, state
from accelerate.utils import DistributedType
from torch.distributed._functional_collectives import AsyncCollectiveTensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from programs import small_runs  # noqa: E402

from rlhf_recipes.training import run  # noqa: E402


def shard_on_cpus_(config: str) -> None:
    """Set the variables that `accelerate launch` sets for that file, and patch Accelerate to shard on processes without GPU."""
    settings = yaml.safe_load((ROOT / "accelerate_configs" / config).read_text())["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    initialize = state.AcceleratorState.__init__

    def initialize_sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    get_state_dict = Accelerator.get_state_dict

    def get_complete_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait for the tensors that are being gathered; Accelerate's copy from a GPU waits, one on a CPU does not."""
        tensors = get_state_dict(self, *args, **kwargs)
        return {
            name: each.wait() if isinstance(each, AsyncCollectiveTensor) else each for name, each in tensors.items()
        }

    state.AcceleratorState.__init__ = initialize_sharded
    Accelerator.get_state_dict = get_complete_state_dict
    run.check_launch = lambda training: None  # it refuses FSDP on CPUs


def run_jobs(folder: Path, jobs: Sequence[Mapping[str, Any]], config: str = "fsdp2.yaml") -> None:
    shard_on_cpus_(config)
    small_runs.run_jobs(folder, jobs)


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), *sys.argv[3:4])
