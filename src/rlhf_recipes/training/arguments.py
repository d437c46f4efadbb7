"""Arguments that several stages share."""

from dataclasses import dataclass, field

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.models import FrozenQuantizationArguments


@dataclass
class RewardedPromptsArguments(RowLengthArguments, FrozenQuantizationArguments):
    """Prompts and the rewards of their answers."""

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards of the answers: folders or Hub ids of reward models, or package.module:function; several are summed."
        },
    )
