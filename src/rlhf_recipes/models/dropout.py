"""Turn dropout off in any architecture, also where a rate is a plain number that no module holds."""

from torch import nn


def disable_dropout_(module: nn.Module | None) -> None:
    """Set every dropout rate to 0: with dropout, the probability ratio of an update would not start at 1."""
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        # Some models keep rates as plain numbers: attention_dropout, attn_dropout, layerdrop.
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
