"""From files, folders and Hub ids to rows, exactly as they are written there."""

from rlhf_recipes.data.reading.source import Source

__all__ = ["Source"]
