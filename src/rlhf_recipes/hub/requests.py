"""Send requests to the Hub: retry transient errors, and report others in one line without secrets."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.secrets import redact

T = TypeVar("T")

RETRY_WAITS = (2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each retry, unless the Hub sends Retry-After
MAX_WAIT = 300.0  # seconds; a longer Retry-After is cut to this
READ_TIMEOUT = 300.0  # seconds without a byte before a connection fails
TRANSIENT_STATUSES = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may not occur again on a retry

STATUS_MESSAGES = {
    401: "the Hub rejects the token; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access there; use one with write access",
    404: "the repo or branch does not exist, or is not visible to this token; check hub_model_id",
    409: "another process changes the repo at the same time; wait and try again",
    412: "another process changes the repo at the same time; wait and try again",
    429: "too many requests; wait and try again",
}
# The query of an upload URL is a secret: it grants write access.
URL_QUERY = re.compile(r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]*")

logger = logging.getLogger(__name__)


class ContentMismatch(Exception):
    """A file on the Hub differs from the file that was sent."""


class _WithTimeout:
    """Wrap a factory of HTTP clients to set a read timeout on each client.

    huggingface_hub calls the factory at the first request and again after each connection error.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        client = self.make()
        client.timeout = READ_TIMEOUT
        return client


def api(token: str | None) -> Any:
    """Return an `HfApi` with the token; also install the read timeout in huggingface_hub, once per process."""
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils import _http

    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    if not isinstance(make, _WithTimeout):
        set_client_factory(_WithTimeout(make))
    return HfApi(token=require_token(token), library_name="rlhf-recipes")


def require_token(token: str | None) -> str:
    """Return the given token, or the one of the environment or of `hf auth login`.

    Raises:
        UserError: there is no token, or it contains characters that an HTTP header cannot hold.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise UserError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to one with write access")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            "the token for the Hub contains a space, a line break or another invalid character; "
            "give it as it was issued"
        )
    return token


def with_retries(request: Callable[[], T]) -> T:
    """Call `request` and return its result; retry on transient errors, of which huggingface_hub retries only some."""
    for default_wait in RETRY_WAITS:
        try:
            return request()
        except Exception as error:
            if not _is_transient(error):
                raise
            wait = min(_retry_after(error) or default_wait, MAX_WAIT)
            cause = status_of(error) or type(_root_cause(error)).__name__
            logger.warning("a request to the Hub failed (%s); retrying in %g seconds", cause, wait)
            time.sleep(wait)
    return request()


@contextmanager
def one_line_hub_errors(start: str, end: str, token: str | None) -> Iterator[None]:
    """Within this block, any error becomes a `UserError`: `start`, the reason, `end`.

    Neither the message nor huggingface_hub's log contains the token or another secret.

    Raises:
        UserError: any error in the block.
    """
    library_logger = logging.getLogger("huggingface_hub")
    handlers = [*library_logger.handlers, *logging.getLogger().handlers]
    redacting = _RedactingFilter(token)
    for handler in handlers:
        handler.addFilter(redacting)
    try:
        yield
    except Exception as error:
        raise UserError(redact(f"{start}: {reason(error)}{end}", token)) from None
    finally:
        for handler in handlers:
            handler.removeFilter(redacting)


class _RedactingFilter(logging.Filter):
    def __init__(self, token: str | None) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(URL_QUERY.sub(r"\1", record.getMessage()), self.token), ()
        return True


def reason(error: Exception) -> str:
    """Return why a request failed, and the fix, on one line."""
    if isinstance(error, (UserError, ContentMismatch)):
        return str(error)
    status = status_of(error)
    if status is None:
        cause = _one_line(_root_cause(error)) or type(error).__name__
        if _is_connection_error(error):
            return f"the connection failed ({cause}); check the network and try again"
        return cause
    message = STATUS_MESSAGES.get(
        status, f"the Hub answers {status}" + ("; wait and try again" if status >= 500 else "")
    )
    # An OSError's text repeats the request; the Hub's own message is shorter. Other errors explain themselves.
    details = _server_message(error) if isinstance(error, OSError) else _one_line(error)
    return f"{message} ({details})" if details else message


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the Hub's response, or None if there was no response."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _server_message(error: Exception) -> str:
    """Return the message in the Hub's response; empty if there is none."""
    messages = (getattr(cause, "server_message", None) for cause in _causes(error))
    return _one_line(next((message for message in messages if message), ""))


def _one_line(text: object) -> str:
    return " ".join(URL_QUERY.sub(r"\1", str(text)).split())[:300]


def _is_transient(error: Exception) -> bool:
    status = status_of(error)
    return status in TRANSIENT_STATUSES if status is not None else _is_connection_error(error)


def _retry_after(error: Exception) -> float | None:
    """Return the seconds in the response's Retry-After header, if any."""
    response = _response(error)
    seconds = "" if response is None else str(response.headers.get("Retry-After", ""))
    return float(seconds) if seconds.isdigit() else None


def _is_connection_error(error: Exception) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
    return not offline and any(isinstance(cause, (HTTPError, ConnectionError, TimeoutError)) for cause in causes)


def _response(error: BaseException) -> Any:
    return next((cause.response for cause in _causes(error) if getattr(cause, "response", None) is not None), None)


def _causes(error: BaseException) -> Iterator[Any]:
    """Yield the error, its cause, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _root_cause(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]
