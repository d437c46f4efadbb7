"""The benchmarks' arithmetic: turns of workers, ratios, exponents, and operation counts."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def test_median_and_quartiles_by_hand(program: Any) -> None:
    peers = program("peers")
    assert peers.median_and_quartiles([1.0, 5.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert peers.median_and_quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert peers.as_ratio([1.0, 5.0, 2.0, 4.0, 3.0]) == "3.00x (2.00-4.00)"


def test_workers_take_turns_and_only_their_measurements_are_read(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes log when they work: never both at once, and the warm-up rounds are not returned."""
    peers = program("peers")
    script, shared = tmp_path / "worker.py", tmp_path / "turns"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from peers import work_on_request\n"
        "report, done = work_on_request(lambda: None), 0\n"
        "while True:\n"
        "    print('chatter')\n"
        "    open(sys.argv[2], 'a').write(sys.argv[1])\n"
        "    done += 1\n"
        "    report({'seconds': 1.0, 'done': done})\n"
    )
    monkeypatch.setattr(peers, "HERE", tmp_path)
    workers = [peers.Worker(name, "worker.py", [name, str(shared)]) for name in "ab"]
    try:
        results = peers.take_turns(workers, rounds=3, warm_up=2)
    finally:
        for worker in workers:
            worker.close()
    assert [[round["done"] for round in rounds] for rounds in results] == [[3, 4, 5], [3, 4, 5]]
    assert shared.read_text() == "ab" * 5


def test_a_worker_that_ends_is_reported_with_its_log_file(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = program("peers")
    (tmp_path / "worker.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(peers, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"ended before its result; see .*dying\.log"):
        peers.Worker("dying", "worker.py", []).wait()
    assert "no such thing" in (tmp_path / "results" / "logs" / "dying.log").read_text()


def test_exponent_recovers_a_power_law(program: Any) -> None:
    sizes = [1.0, 2.0, 8.0, 20.0]
    assert program("growth").exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert program("growth").exponent(sizes, [4.0] * 4) == pytest.approx(0.0)


def test_operation_counts_match_pytorch_flop_counter(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass of all rows on the meta device. FlopCounterMode counts attention without its causal mask."""
    growth = program("growth")
    width, layers, heads, vocabulary = program("ppo_worker").SHAPES["14M"]
    rows, length = growth.BATCH, 80
    with torch.device("meta"):
        config = GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        with FlopCounterMode(display=False) as counter:
            model.transformer(torch.zeros(rows, length, dtype=torch.long))
    counted = counter.get_total_flops()
    operations = growth.work(growth.CASES["defaults"], {"tokens": rows * length, "answers": rows * 48})
    attention = 4 * rows * layers * length**2 * width  # QK^T and the weighted sum of V, two operations each
    assert operations["score"] == pytest.approx(counted - attention / 2, rel=1e-3)
    head = 2 * width * vocabulary * rows * 48
    skipped = 2 * 2 * width * 4 * width * rows * (length - 48)  # the last layer's MLP, for prompt tokens
    assert operations["forward"] == pytest.approx(2 * (operations["score"] - skipped + head))
    assert operations["update"] == pytest.approx(4 * 3 * (operations["score"] - skipped + head))
    upper = growth.work(growth.CASES["two upper layers"], {"tokens": rows * length, "answers": rows * 48})
    assert upper["update"] == pytest.approx(4 * (operations["score"] - 3 * skipped + 2 * head)), (
        "a third of the layers is trained"
    )
    equal_lengths = lambda arguments: {"input_ids": [[1] * 32] * 64}  # noqa: E731
    monkeypatch.setattr(growth, "prompts_of", equal_lengths)
    same = growth.work(growth.CASES["same algorithm, float32"], {"tokens": rows * length, "answers": rows * 48})
    assert growth.trl_to_ours(3) == pytest.approx(growth.work_of_trl(prompt=32) / sum(same.values()))
    padded = growth.work_of_trl(prompt=32, response=48)  # the same number of tokens as above
    head_on_all_tokens = 2 * width * vocabulary * rows * length
    assert padded == pytest.approx(
        4 * operations["score"] + head + head_on_all_tokens + 12 * (2 * operations["score"] + head_on_all_tokens)
    )
