"""What every test stands on: one thread, no network, and models and a tokenizer small enough to build in a blink."""

import ipaddress
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

_caches = tempfile.TemporaryDirectory(prefix="rlhf-recipes-tests-")
# Set before torch or a Hub library is imported, because both read their environment at import.
os.environ.update(
    HF_HOME=_caches.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # exact comparisons are made on the CPU, whatever the machine has

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")  # ids 256 to 261
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)

_refused: list[str] = []


def _is_loopback(host: object) -> bool:
    """True for an address that never leaves this machine; a path (a unix socket) is one."""
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_others(function: Callable[..., Any], host_of: Callable[..., object]) -> Callable[..., Any]:
    """Wraps a function of `socket` so that it fails the test when the host it is asked for is elsewhere."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        host = host_of(*args, **kwargs)
        if not _is_loopback(host):
            _refused.append(str(host))  # remembered, because a library may swallow the failure or be in a thread
            pytest.fail(f"a test tried to reach {host!r}: tests are offline")
        return function(*args, **kwargs)

    return guarded


def _host_of_connection(this: socket.socket, address: Any) -> object:
    return address[0] if this.family in (socket.AF_INET, socket.AF_INET6) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="how often runs are killed at random moments, in all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(name, stage): lays a fault upon a run (see tests/programs/run_faults.py)"
    )


@pytest.fixture(scope="session", autouse=True)
def _closed_network() -> Iterator[None]:
    """Looking a name up and connecting both fail, unless they stay on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _refuse_others(getattr(socket.socket, name), _host_of_connection))
        patch.setattr(socket, "getaddrinfo", _refuse_others(socket.getaddrinfo, lambda host, *rest, **named: host))
        yield


@pytest.fixture(autouse=True)
def refused_connections() -> Iterator[list[str]]:
    """Fails the test at its end if a connection was refused meanwhile; a test that provokes one clears the list."""
    _refused.clear()
    yield _refused
    assert not _refused, f"tried to reach {', '.join(_refused)}: tests are offline"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums are taken in one order, so that the same seed gives the same bits."""
    try:
        import torch
    except ModuleNotFoundError:  # the rules of the house can be checked without it
        return
    torch.set_num_threads(1)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in that byte-level tokenizers use for each byte -> that byte's value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in stand_in.values()]
    return stand_in | {chr(256 + position): byte for position, byte in enumerate(others)}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], "PreTrainedTokenizerFast"]:
    """() -> a new byte-level tokenizer, for tests that change it.

    It has no merges and a byte's id is its value, so text without special tokens must become `list(text.encode())`.
    The six special tokens follow as ids 256 to 261: eos (also bos), pad, user, assistant, system, end.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make() -> "PreTrainedTokenizerFast":
        backend = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            pad_token="<|pad|>",
            extra_special_tokens=list(SPECIAL_TOKENS[2:]),
            clean_up_tokenization_spaces=False,
            model_max_length=128,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_tokenizer_with_bos(make_tokenizer: Callable[[], "PreTrainedTokenizerFast"]) -> Callable[[], Any]:
    """() -> one that puts a BOS of its own (id 260) before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    def make() -> "PreTrainedTokenizerFast":
        tokenizer = make_tokenizer()
        tokenizer.bos_token = "<|system|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|system|> $A", special_tokens=[("<|system|>", 260)]
        )
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[[], "PreTrainedTokenizerFast"]) -> "PreTrainedTokenizerFast":
    """The byte-level tokenizer, shared by all tests: whoever changes one asks `make_tokenizer` for their own."""
    return make_tokenizer()


def _tiny_config(sizes: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    shape = {"vocab_size": VOCABULARY_SIZE, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128}
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2Config(**shape | tokens | dropout | sizes)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., "GPT2LMHeadModel"]:
    """(seed=0, **config) -> a two-layer GPT-2 in eval mode without dropout, its weights drawn from `seed` alone."""

    def make(seed: int = 0, **config: Any) -> "GPT2LMHeadModel":
        import torch
        from transformers import GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(_tiny_config(config)).eval()

    return make


@pytest.fixture(scope="session")
def make_reward_model() -> Callable[..., "GPT2ForSequenceClassification"]:
    """(seed=0, num_labels=1, **config) -> a two-layer GPT-2 that scores a text, as `make_model` makes it."""

    def make(seed: int = 0, num_labels: int = 1, **config: Any) -> "GPT2ForSequenceClassification":
        import torch
        from transformers import GPT2ForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2ForSequenceClassification(_tiny_config({"num_labels": num_labels, **config})).eval()

    return make


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_reward_model: Callable[..., Any],
    tokenizer: "PreTrainedTokenizerFast",
) -> Path:  # fmt: skip
    """The folder with what the small runs of each training stage read; they write below it."""
    from programs import small_runs

    folder = tmp_path_factory.mktemp("small")
    return small_runs.prepare(
        folder, make_model(0, initializer_range=0.1), make_reward_model(3, initializer_range=0.2), tokenizer
    )
