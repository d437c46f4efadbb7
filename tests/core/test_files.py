"""Files of a run."""

from pathlib import Path

from rlhf_recipes.core.files import files_by_rank


def test_files_are_in_the_order_of_ranks_not_of_names(tmp_path: Path) -> None:
    for rank in range(12):
        (tmp_path / f"progress_{rank}.json").touch()
    (tmp_path / "other_0.json").touch()
    names = [path.name for path in files_by_rank(tmp_path, "progress_*.json")]
    assert names == [f"progress_{rank}.json" for rank in range(12)]
