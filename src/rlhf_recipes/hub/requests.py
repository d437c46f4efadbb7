"""Requests to the Hub that are made again when that may help, and that end in one line without secrets."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.secrets import redact

T = TypeVar("T")

WAITS = (2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try, where the Hub names none
MAX_WAIT = 300.0  # what it may name
READ_TIMEOUT = 300.0  # seconds without a byte, after which a connection counts as dead
TRANSIENT_STATUSES = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # answers that may be another one the next time

REASONS = {
    401: "the Hub does not know the token; log in anew with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; give one with write access to it",
    404: "the Hub knows no such repo or branch, or does not show it to this token; check hub_model_id",
    409: "somebody else changes it at the same time; wait and try again",
    412: "somebody else changes it at the same time; wait and try again",
    429: "the Hub asks for patience (too many requests); wait and try again",
}
QUERY = re.compile(
    r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]*"
)  # whoever has the query of an upload's address can write there

logger = logging.getLogger(__name__)


class ContentMismatch(Exception):
    """What the Hub holds is not what it was given."""


class _WithTimeout:
    """Makes the library's clients as before, but none that waits without end: it makes one at first, and one anew after each
    connection that was refused."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        client = self.make()
        client.timeout = READ_TIMEOUT
        return client


def api(token: str | None) -> Any:
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils import _http

    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    if not isinstance(make, _WithTimeout):
        set_client_factory(_WithTimeout(make))
    return HfApi(token=require_token(token), library_name="rlhf-recipes")


def require_token(token: str | None) -> str:
    """The token that was given, or that of the environment or of `hf auth login`.

    Raises:
        UserError: there is none, or it is none that could be sent.
    """
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise UserError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to one with write access")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError("the token for the Hub holds a space or a line break; give it as it was issued")
    return found


def with_retries(act: Callable[[], T]) -> T:
    """What `act` returns, on one of a few tries; the library itself repeats only some of its requests."""
    for wait in WAITS:
        try:
            return act()
        except Exception as error:
            if not _may_pass(error):
                raise
            pause = min(_retry_after(error) or wait, MAX_WAIT)
            what = status_of(error) or type(_deepest(error)).__name__
            logger.warning("a request to the Hub failed (%s); it is made again in %g seconds", what, pause)
            time.sleep(pause)
    return act()


@contextmanager
def one_line_hub_errors(start: str, end: str, token: str | None) -> Iterator[None]:
    """Whatever goes wrong becomes a `UserError` between `start` and `end`; neither it nor the log holds a secret."""
    log = logging.getLogger("huggingface_hub")
    handlers = [*log.handlers, *logging.getLogger().handlers]
    blot = _RedactingFilter(token)
    for handler in handlers:
        handler.addFilter(blot)
    try:
        yield
    except Exception as error:
        raise UserError(redact(f"{start}: {reason(error)}{end}", token)) from None
    finally:
        for handler in handlers:
            handler.removeFilter(blot)


class _RedactingFilter(logging.Filter):
    def __init__(self, token: str | None) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(QUERY.sub(r"\1", record.getMessage()), self.token), ()
        return True


def reason(error: Exception) -> str:
    """Why a request failed and what to do, on one line."""
    if isinstance(error, (UserError, ContentMismatch)):
        return str(error)
    status = status_of(error)
    if status is None:
        told = _line(_deepest(error))
        if _is_connection(error):
            return f"the connection failed ({told or type(error).__name__}); look at the network and try again"
        return told or type(error).__name__
    why = REASONS.get(status, f"the Hub answers {status}" + ("; wait and try again" if status >= 500 else ""))
    words = _answer(error) if isinstance(error, OSError) else _line(error)  # others say themselves what was amiss
    return f"{why} ({words})" if words else why


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer, or None if it did not answer."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _answer(error: Exception) -> str:
    """What the Hub says itself, if anything."""
    said = next((each.server_message for each in _causes(error) if getattr(each, "server_message", None)), "")
    return _line(said)


def _line(said: object) -> str:
    return " ".join(QUERY.sub(r"\1", str(said)).split())[:300]


def _may_pass(error: Exception) -> bool:
    status = status_of(error)
    return status in TRANSIENT_STATUSES if status is not None else _is_connection(error)


def _retry_after(error: Exception) -> float | None:
    response = _response(error)
    seconds = "" if response is None else str(response.headers.get("Retry-After", ""))
    return float(seconds) if seconds.isdigit() else None


def _is_connection(error: Exception) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    offline = any(isinstance(each, OfflineModeIsEnabled) for each in causes)
    return not offline and any(isinstance(each, (HTTPError, ConnectionError, TimeoutError)) for each in causes)


def _response(error: BaseException) -> Any:
    return next((each.response for each in _causes(error) if getattr(each, "response", None) is not None), None)


def _causes(error: BaseException) -> Iterator[Any]:
    """The error, what caused it, and so on."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _deepest(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]
