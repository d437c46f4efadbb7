"""Inject faults into runs of every training stage and count what is lost.

run_faults.py [KILLS]   inject every fault, kill runs at random moments KILLS times in all (120), and print the table of
                        docs/scaling.md
"""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS)]


class FaultCounts:
    """A pytest plugin that counts, for each fault, how often tests injected it and how often a run lost something."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.stages: dict[str, dict[str, None]] = {}
        self.lost: Counter[str] = Counter()
        self._faults: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        selected = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected
        for item in selected:
            marker = item.get_closest_marker("fault")
            assert marker is not None
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            stage = str(parameters.get("case", parameters.get("stage", marker.kwargs.get("stage", ""))))
            self._faults[item.nodeid] = (marker.args[0].format(**parameters), stage.partition(",")[0])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name, stage = self._faults[report.nodeid]
        self.stages.setdefault(name, {})[stage] = None
        self.tries[name] += int(dict(report.user_properties).get("tries", 1)) if report.when == "call" else 0
        self.lost[name] += report.failed


def main(kills: int = 120) -> int:
    from rlhf_recipes.system.hardware import describe_hardware

    counts = FaultCounts()
    files = [str(TESTS / "stages" / f"test_{name}.py") for name in ("fault_tolerance", "data_parallel")]
    code = pytest.main([*files, "-q", "-p", "no:cacheprovider", "--kills", str(kills)], plugins=[counts])
    print(
        f"\nMeasured {time.strftime('%Y-%m-%d')} on {describe_hardware()}, by `python tests/programs/run_faults.py {kills}`.\n"
    )
    print("| what happens | to | times | lost |\n|---|---|---|---|")
    for name, tries in counts.tries.items():
        print(f"| {name} | {', '.join(counts.stages[name])} | {tries} | {counts.lost[name]} |")
    print(f"| all | | {sum(counts.tries.values())} | {sum(counts.lost.values())} |")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
