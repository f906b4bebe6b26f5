"""What goes wrong on the way to the hub, as one message with its remedy.

Which client huggingface-hub has (requests, httpx, httpx2) and which errors come depends on its version, so they are
told apart by their origin and their HTTP status. What a client reads from the environment before it reaches the hub,
proxies and certificates, is named by its variable.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from minilora.errors import capped, shown
from minilora.system.cli import DISK_ERRORS

RETRY_STATUSES = {408, 429, 500, 502, 503, 504}  # of a server that may do better in a moment
HTTP_CLIENTS = ("httpx", "requests", "urllib3")  # httpx2 as well
MIRROR = "set a mirror (HF_ENDPOINT=https://hf-mirror.com)"
NO_FOLDER = (NotADirectoryError, FileExistsError)  # a file where the cache's folder would be
PROXIES = ("http_proxy", "https_proxy", "all_proxy")  # in small or large letters
CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir", "requests_ca_bundle", "curl_ca_bundle")
ENDPOINT_ERRORS = ("UnsupportedProtocol", "MissingSchema")  # names of classes
PROXY_ERRORS = ("ProxyError", "InvalidProxyURL", "InvalidSchema")


class ClientError(Exception):
    """The client fails before it reaches the hub; the text names the variable and the remedy."""


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Within it a client that cannot start, or whose proxy fails, raises ClientError."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session()  # reads proxies and certificates
    except Exception as error:
        raise ClientError(_blame(error)) from error
    try:
        yield
    except Exception as error:
        cause, endpoint = cause_of(error), constants.ENDPOINT
        name = type(cause).__name__
        # requests calls any scheme that it does not know InvalidSchema, the hub's and a proxy's.
        if name in ENDPOINT_ERRORS or (name in PROXY_ERRORS and not endpoint.startswith("http")):
            raise ClientError(f"HF_ENDPOINT is {shown(endpoint)}, expected https://...; correct or unset it") from error
        if name in PROXY_ERRORS:
            raise ClientError(_blame(cause, PROXIES)) from error
        raise


def _blame(error: BaseException, concerned: tuple[str, ...] = (*PROXIES, "no_proxy", *CERTIFICATES)) -> str:
    """Which of the variables keeps the client from the hub, what is wrong with it, and the remedy."""
    found = [(name, value) for name, value in _connection_variables() if name.lower() in concerned]
    for name, value in found:
        problem = _problem_of_proxy(value) if name.lower() in PROXIES else None
        if name.lower() in CERTIFICATES and not Path(value).exists():
            problem = "there is no such file or folder; correct it"
        if problem is not None:
            return f"{name}={_without_password(value)}: {problem}, or unset {name}"
    names = ", ".join(name for name, _ in found)
    cure = f"correct or unset {names}" if names else "correct the proxy in the system's settings"
    return f"the client cannot reach the hub ({reason_of(error)}); {cure}"


def _connection_variables() -> list[tuple[str, str]]:
    """The variables with proxies and certificates that are set."""
    known = (*PROXIES, "no_proxy", *CERTIFICATES)
    return [(name, value) for name, value in sorted(os.environ.items()) if value and name.lower() in known]


def _problem_of_proxy(value: str) -> str | None:
    """Why no client can use a proxy, and the cure, or None."""
    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme in ("socks5", "socks5h"):
        module, client = socks_package()
        is_there = importlib.util.find_spec(module) is not None
        return None if is_there else f"a SOCKS proxy takes one more package; pip install '{client}[socks]'"
    if scheme not in ("http", "https"):
        likely = "socks5" if scheme.startswith("socks") else "http"
        return f"{scheme}:// is not known, expected http://, https:// or socks5://; write {likely}://..."
    try:
        _ = urlsplit(value if "://" in value else f"http://{value}").port
    except ValueError as error:
        return f"{error}; correct it"
    return None


def socks_package() -> tuple[str, str]:
    """The module that a SOCKS proxy needs, and the client with which pip installs it."""
    import huggingface_hub

    return ("socks", "requests") if huggingface_hub.__version__.startswith("0.") else ("socksio", "httpx")


def _without_password(value: str) -> str:
    return capped(value if "@" not in value else f"...@{value.rpartition('@')[2]}")


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: a break in the middle of a file, or a server that is busy."""
    return type(error).__module__.startswith(HTTP_CLIENTS) or status_of(error) in RETRY_STATUSES


def explain(error: Exception, kind: str, name: str, local: str) -> str:
    """What went wrong and what to do, as the rest of a message."""
    from huggingface_hub import constants, errors

    cause, status, endpoint = cause_of(error), status_of(error), constants.ENDPOINT
    reason = reason_of(cause)
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    by_type = {
        errors.HFValidationError: f"is no hub name, expected owner/name; check the name, or {local}",
        errors.GatedRepoError: f"is gated ({status}); accept its terms at {page} and set HF_TOKEN to a token of that "
        "account",
        errors.RevisionNotFoundError: "has no such revision; check model.revision or --revision",
        errors.RepositoryNotFoundError: f"no such {kind} on the hub, or private; check the name, set HF_TOKEN, or "
        f"{local}",
        ClientError: f"{cause}, or {local}",
        UnicodeEncodeError: "HF_TOKEN holds characters that no token has; correct it",  # it goes into a header
    }
    by_status = {
        401: "the hub refused your token (401); correct HF_TOKEN, or the token that `hf auth login` has kept",
        403: f"the hub refused access ({reason}); give the token in HF_TOKEN the right to read it, or {local}",
        407: f"the proxy asks for a login ({reason}); write HTTPS_PROXY=http://user:password@host:port",
        429: f"the hub has had too many requests (429); wait some minutes, set HF_TOKEN, {MIRROR}, or {local}",
    }
    for type_, message in by_type.items():
        if isinstance(cause, type_):
            return message
    failed = f"download failed ({reason}); run it again, {MIRROR}, or {local}"
    if status is not None:
        return by_status.get(status, failed)
    if isinstance(error, OSError) and (error.errno in DISK_ERRORS or isinstance(error, NO_FOLDER)):
        return f"cannot be stored in {constants.HF_HUB_CACHE} ({error}); make room there, or set HF_HOME"
    if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError):
        return f"not in the cache {constants.HF_HUB_CACHE}, or not all of it; unset HF_HUB_OFFLINE, or {local}"
    bad_answer = (errors.FileMetadataError, ValueError, AssertionError, AttributeError, LookupError, TypeError)
    if isinstance(cause, bad_answer) or not endpoint.startswith("http"):
        return f"{endpoint!r} does not answer as a hub does ({reason}); correct HF_ENDPOINT, or {local}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        concerned = CERTIFICATES if "certificate" in reason.lower() else PROXIES
        checked = ["the network", *(name for name, _ in _connection_variables() if name.lower() in concerned)]
        return (
            f"not in the cache, and {endpoint} cannot be reached ({reason}); check {' and '.join(checked)}, {MIRROR}, "
            f"or {local}"
        )
    return f"{failed}, or set HF_HUB_DISABLE_XET=1" if isinstance(error, RuntimeError) else failed  # hf-xet's error


def cause_of(error: Exception) -> BaseException:
    """What `snapshot_download` met before it looked into the cache in vain and raised `error`."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__ is not None:
        return error.__cause__
    return error


def status_of(error: Exception) -> int | None:
    """The hub's HTTP status, None for an error of another kind."""
    status = getattr(getattr(cause_of(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def reason_of(error: BaseException) -> str:
    """The first line of an error's text, after the name of a Python error that does not explain itself."""
    text = capped(str(error).strip().partition("\n")[0], 200)
    return f"{type(error).__name__}: {text}" if type(error).__module__ == "builtins" or not text else text
