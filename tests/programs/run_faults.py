"""What can happen to a run, and what is lost by it.

run_faults.py [KILLS]   lay every fault upon every training stage, kill runs at random moments so often in all (120), and
                        print the table of docs/scaling.md
"""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS)]


class MaskedMeans:
    """Of the tests that lay a fault: how often it was laid, and how often the run did not go on as if nothing had been."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.stages: dict[str, dict[str, None]] = {}
        self.lost: Counter[str] = Counter()
        self._faults: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        laid = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in laid])
        items[:] = laid
        for item in laid:
            marker = item.get_closest_marker("fault")
            assert marker is not None
            given = item.callspec.params if hasattr(item, "callspec") else {}
            stage = str(given.get("case", given.get("stage", marker.kwargs.get("stage", ""))))
            self._faults[item.nodeid] = (marker.args[0].format(**given), stage.partition(",")[0])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name, stage = self._faults[report.nodeid]
        self.stages.setdefault(name, {})[stage] = None
        self.tries[name] += int(dict(report.user_properties).get("tries", 1)) if report.when == "call" else 0
        self.lost[name] += report.failed


def main(kills: int = 120) -> int:
    from rlhf_recipes.system.hardware import describe_hardware

    tally = MaskedMeans()
    places = [str(TESTS / "stages" / f"test_{name}.py") for name in ("fault_tolerance", "data_parallel")]
    code = pytest.main([*places, "-q", "-p", "no:cacheprovider", "--kills", str(kills)], plugins=[tally])
    print(
        f"\nMeasured {time.strftime('%Y-%m-%d')} on {describe_hardware()}, by `python tests/programs/run_faults.py {kills}`.\n"
    )
    print("| what happens | to | times | lost |\n|---|---|---|---|")
    for name, tries in tally.tries.items():
        print(f"| {name} | {', '.join(tally.stages[name])} | {tries} | {tally.lost[name]} |")
    print(f"| all | | {sum(tally.tries.values())} | {sum(tally.lost.values())} |")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
