"""Fixtures of all tests: one thread, no network, and a tokenizer and models that are built in milliseconds."""

import gc
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
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # exact comparisons need the CPU, also on a machine with a GPU

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
    """Tell whether an address stays on this machine, as the path of a unix socket does."""
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_remote_hosts(function: Callable[..., Any], host_of: Callable[..., object]) -> Callable[..., Any]:
    """Wrap a function of `socket`: it fails the test if the requested host is not this machine."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        host = host_of(*args, **kwargs)
        if not _is_loopback(host):
            _refused.append(str(host))  # a library may catch the failure, or a thread may raise it
            pytest.fail(f"a test tried to reach {host!r}: tests are offline")
        return function(*args, **kwargs)

    return guarded


def _host_of_connection(connection: socket.socket, address: Any) -> object:
    return address[0] if connection.family in (socket.AF_INET, socket.AF_INET6) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="total number of random kills")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(name, stage): injects a fault into a run (see tests/programs/run_faults.py)"
    )


@pytest.fixture(scope="session", autouse=True)
def _loopback_only() -> Iterator[None]:
    """Let name lookups and connections fail unless they stay on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _refuse_remote_hosts(getattr(socket.socket, name), _host_of_connection))
        patch.setattr(
            socket, "getaddrinfo", _refuse_remote_hosts(socket.getaddrinfo, lambda host, *rest, **named: host)
        )
        yield


@pytest.fixture(autouse=True)
def refused_connections() -> Iterator[list[str]]:
    """Fail the test if one of its connections was refused; a test that provokes a refusal clears the list."""
    _refused.clear()
    yield _refused
    assert not _refused, f"tried to reach {', '.join(_refused)}: tests are offline"


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> None:
    """Take what the libraries made at import out of garbage collection: Trainer collects after each run, 0.3 seconds a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread, so that sums have one order and a seed gives the same bits."""
    try:
        import torch
    except ModuleNotFoundError:  # tests of the code's layout run without torch
        return
    torch.set_num_threads(1)


def _byte_alphabet() -> dict[str, int]:
    """Map the printable character that byte-level tokenizers use for a byte to the byte's value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    character_to_byte = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in character_to_byte.values()]
    return character_to_byte | {chr(256 + position): byte for position, byte in enumerate(others)}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], "PreTrainedTokenizerFast"]:
    """Return a function that makes a new byte-level tokenizer, for tests that change it.

    There are no merges and a byte's id is its value: text without special tokens becomes `list(text.encode())`.
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
    """Return a function that makes a tokenizer that puts a BOS (id 260) before every text, as Llama's and Gemma's do."""
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
    """Return the byte-level tokenizer that all tests share; a test that changes one uses `make_tokenizer`."""
    return make_tokenizer()


def _tiny_config(sizes: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    shape = {"vocab_size": VOCABULARY_SIZE, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128}
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2Config(**shape | tokens | dropout | sizes)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., "GPT2LMHeadModel"]:
    """Return a function (seed=0, **config) that makes a two-layer GPT-2 in eval mode, without dropout.

    Its initial weights depend on `seed` only.
    """

    def make(seed: int = 0, **config: Any) -> "GPT2LMHeadModel":
        import torch
        from transformers import GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(_tiny_config(config)).eval()

    return make


@pytest.fixture(scope="session")
def make_reward_model() -> Callable[..., "GPT2ForSequenceClassification"]:
    """Return a function (seed=0, num_labels=1, **config) that makes a two-layer GPT-2 reward model; see `make_model`."""

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
    """Return a folder with the models and datasets that the small runs of each training stage read; they write below it."""
    from programs import small_runs

    folder = tmp_path_factory.mktemp("small")
    return small_runs.prepare(
        folder, make_model(0, initializer_range=0.1), make_reward_model(3, initializer_range=0.2), tokenizer
    )
