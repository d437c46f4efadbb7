"""The small runs under FSDP2 as Accelerate sets it up, which it does on GPUs alone: here on CPU processes. Run by torchrun.

small_runs_fsdp.py FOLDER JOBS [CONFIG]     as small_runs.py; CONFIG: a file of accelerate_configs
"""

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, state
from accelerate.utils import DistributedType
from torch.distributed._functional_collectives import AsyncCollectiveTensor

ROOT = Path(__file__).resolve().parents[2]


def as_on_gpus(config: str) -> None:
    """Set what `accelerate launch` would for that file, and let Accelerate take it for processes without a GPU."""
    told = yaml.safe_load((ROOT / "accelerate_configs" / config).read_text())["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.update({name.upper(): str(value) for name, value in told.items()})
    begin = state.AcceleratorState.__init__

    def sharding(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    gather = Accelerator.get_state_dict

    def gathered(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Their copy from a GPU waits until they are there; on a CPU nobody does."""
        found = gather(self, *args, **kwargs)
        return {name: each.wait() if isinstance(each, AsyncCollectiveTensor) else each for name, each in found.items()}

    state.AcceleratorState.__init__ = sharding
    Accelerator.get_state_dict = gathered


if __name__ == "__main__":
    as_on_gpus(sys.argv[3] if len(sys.argv) > 3 else "fsdp2.yaml")
    sys.path.insert(0, str(ROOT / "tests"))
    from programs import small_runs

    from rlhf_recipes import runs
    from rlhf_recipes.core.errors import one_line_errors

    runs.check_launch = lambda training: None  # which refuses just that
    with one_line_errors():
        small_runs.main(Path(sys.argv[1]), Path(sys.argv[2]))
