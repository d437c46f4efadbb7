"""Accelerate's collective operations, limited to this process for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def this_process_only(accelerator: Any) -> Iterator[None]:
    """Within this block Accelerate's gather and reduce return what this process has, as in a run of one process.

    The model's own collectives (DDP, FSDP, DeepSpeed) are unchanged. So each process can measure its own rows, however
    many it has, with code that gathers.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # Accelerate's functions ask the one state, its methods the other.
    states = (PartialState(), accelerator.state)
    alone = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0}
    saved = [{name: getattr(state, name) for name in alone} for state in states]
    try:
        for state in states:
            vars(state).update(alone)
        yield
    finally:
        for state, values in zip(states, saved, strict=True):
            vars(state).update(values)
