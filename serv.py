# SPDX-License-Identifier: MIT
"""One file between a Python program and the SERV inference API.

Usage::

    import serv                             # export SERV_API_KEY=...

    system = "Be brief."                    # and export SERV_MODEL=...
    reply = serv.chat("Hello!", system=system)  # POST /v1/chat/completions
    reply.text                              # the answer, a str
    reply["usage"]                          # the service's own JSON: a dict
    for piece in serv.stream("Hi!", system=system):     # pieces, as they come
        print(piece, end="", flush=True)
    serv.message("Hello!", system=system, max_tokens=99)    # /v1/messages

What this file does with your key: it is read from ``api_key`` or from
SERV_API_KEY at each call, and sent in the Authorization header of requests
to ``base_url``, and nowhere else.  It is cut out of every error (but for a
part of it at the very end of an answer that was itself cut); only what
records the local variables of a traceback may see it there.  No redirect is
followed, certificates are always checked (a plain ``http://`` has none, and
sends the key as it is), the key is written to no disk, and no other host is
spoken to but a proxy that you have set.

From top to bottom; whoever stops at a banner has understood all above it:
constants, errors, the three calls, Reply and Stream, building requests,
reading answers, server-sent events, putting a stream together (no I/O: at
most they read variables of the environment), the network, the command line.

Errors::

    ServError                       the base: no usable key, ...
        APIConnectionError          no whole answer
            APITimeoutError         ... within the budget
        APIResponseError            not what the format promises
        APIStatusError              the server said no; .status .message ...
            BadRequestError 400     AuthenticationError 401
            BillingError 402        PermissionDeniedError 403
            NotFoundError 404       RateLimitError 429
            InternalServerError 5xx
"""
from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import functools
import http.client
import io
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from email.utils import mktime_tz, parsedate_tz

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs more than importing this file
    from typing import (Any, Callable, Iterable, Iterator, Mapping, Sequence,
                        TypeVar, Union)
    JSONDict = dict[str, Any]
    Content = Union[str, Sequence[Mapping[str, Any]]]
    Headers = http.client.HTTPMessage
    T = TypeVar("T")

__version__ = "0.1.0"
__all__ = ["chat", "message", "stream", "iter_events", "Reply", "Stream",
           "ToolCall", "ServError", "APIConnectionError", "APITimeoutError",
           "APIResponseError", "APIStatusError", "BadRequestError",
           "AuthenticationError", "BillingError", "PermissionDeniedError",
           "NotFoundError", "RateLimitError", "InternalServerError"]

BASE_URL = "https://inference-api.openserv.ai"
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}
EXAMPLES = {"chat": "gpt-5.4-mini", "messages": "claude-haiku-4.5"}
USER_AGENT = f"serv.py/{__version__} Python/{sys.version.split()[0]}"

TIMEOUT = 600.0         # seconds for a whole call; answers of 298 s were seen
CONNECT_TIMEOUT = 10.0  # seconds for one address of a host, for a handshake
IDLE_SECONDS = 50.0     # load balancers drop silent connections after 60 s
MAX_IDLE = 100          # kept connections; of more, a call drops the oldest
KEEPALIVE = 60          # seconds to a TCP probe; NATs forget after 350
STALE_SECONDS = 1.0     # a kept connection that ends later took the request
WAIT_SECONDS = 0.1      # for a stream's last bytes, for a stalled upload

# In memory, what comes may take eighty times its bytes.
READ_SIZE = 1 << 16     # bytes asked of a connection, or given, at a time
MAX_BODY = 1 << 25      # bytes of one JSON answer, or of one event: 32 MiB
MAX_STREAM = 1 << 28    # bytes of a whole stream: a million events
MAX_ERROR = 1 << 18     # bytes kept of an error's body
MAX_DEPTH = 150         # of nested JSON, so that all of it can be recursed
MAX_PARTS = 10000       # of one list; each takes up to a kilobyte


# ---------------------------------------------------------------------------
# Errors.  Raised about a call; misuse is ValueError or TypeError instead.
# ---------------------------------------------------------------------------

class ServError(Exception):
    """The base of every error about a call; by itself, no usable key.

    ``str()`` is one line: what happened and, of a request that was tried,
    the URL and the request id.  ``reply`` is a ``Reply`` of what had arrived
    if a stream had begun, else ``None``; ``request_id`` the id that the
    service's staff ask for, or ``None``.
    """

    reply: Reply | None = None
    request_id: str | None = None


class APIConnectionError(ServError):
    """No whole answer: DNS, TCP, TLS, a reset, a cut body, a cut stream."""


class APITimeoutError(APIConnectionError):
    """The budget of the call, ``timeout`` seconds, ran out."""


class APIResponseError(ServError):
    """The answer is not what the format promises: not JSON, a broken event.

    Also an answer in an encoding that was not asked for, and one that is
    larger than the limits at the head of this file.
    """


class APIStatusError(ServError):
    """The server said no: by its status, or by an error object in a 200.

    A redirect is such a status, and an error event in a stream such an object.
    ``status`` is the HTTP status, or the one that the error's type stands
    for; ``type``, ``code``, ``param`` and ``message`` are the server's own;
    ``body`` is its decoded JSON, else its text; ``headers`` are the answer's;
    ``retry_after`` the seconds that it asks to wait, or ``None``.
    """

    status: int = 0
    type: str | None = None
    code: str | int | None = None
    param: str | None = None
    message: str = ""
    body: Any = None
    headers: Headers = http.client.HTTPMessage()
    retry_after: float | None = None


class BadRequestError(APIStatusError):
    """400: the request is wrong; ``message`` and ``param`` say where."""


class AuthenticationError(APIStatusError):
    """401: the key is wrong."""


class BillingError(APIStatusError):
    """402: no credits are left; nothing was billed."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this."""


class NotFoundError(APIStatusError):
    """404: there is no such path or model."""


class RateLimitError(APIStatusError):
    """429: too many requests; ``retry_after`` may say how long to wait."""


class InternalServerError(APIStatusError):
    """5xx: the service or the model behind it failed."""


STATUS_ERRORS: dict[int, type[APIStatusError]] = {400: BadRequestError,
    401: AuthenticationError, 402: BillingError, 403: PermissionDeniedError,
    404: NotFoundError, 429: RateLimitError, 500: InternalServerError}
# https://docs.anthropic.com/en/api/errors, and what OpenAI's servers send
STATUS_OF_TYPE = dict(invalid_request_error=400, authentication_error=401,
    billing_error=402, permission_error=403, not_found_error=404,
    request_too_large=413, rate_limit_error=429, insufficient_quota=429,
    api_error=500, server_error=500, timeout_error=504, overloaded_error=529)
ADVICE = {401: "; check key", 402: "; add credits", 404: "; check model, URL"}


# ---------------------------------------------------------------------------
# The calls.
# ---------------------------------------------------------------------------

def chat(messages: Content, *, model: str | None = None,
         system: Content | None = None, api_key: str | None = None,
         base_url: str | None = None, timeout: float | None = None,
         max_retries: int = 2, headers: Mapping[str, str] | None = None,
         **params: Any) -> Reply:
    """Ask once in the OpenAI format and return the whole answer.

        reply = serv.chat("Hello!", model="gpt-5.4-mini", system="Be brief.")
        print(reply.text)

    :param messages: a ``str`` (one user message) or a list of message
        dicts, sent as they are.
    :param model: default SERV_MODEL.
    :param system: the system prompt, put first; needed unless ``messages``
        holds a ``system`` or ``developer`` entry.
    :param api_key: default SERV_API_KEY.
    :param base_url: default SERV_BASE_URL, else the service; with or
        without ``/v1``.
    :param timeout: seconds for the whole call: connecting, every retry and
        wait, the last byte; default SERV_TIMEOUT, else 600.  Looking up a
        host name is the operating system's and alone not bounded by it.
    :param max_retries: how often a failed try is repeated: connection
        failures (but no refused certificate, nor a proxy's 407), 408, 409,
        429 (but no ``insufficient_quota``) and 5xx, or as ``x-should-retry``
        says.
    :param headers: added to the request; they replace ours of that name, in
        any case.  With an ``Authorization`` no key is needed.
    :param params: anything else goes into the JSON body untouched.
    :return: a ``Reply``, the service's JSON with ``text`` and more on top.
    :raise ValueError: the input cannot be sent (also ``TypeError``): no
        model, no system prompt, a bad URL, timeout or ``max_retries``, a
        ``stream`` parameter, what JSON or a header cannot say, a
        ``Content-Length``, ``Transfer-Encoding`` or ``Host`` of your own.
    :raise APIStatusError: the server said no; see its subclasses.
    :raise APIConnectionError: no whole answer; ``APITimeoutError``: not
        within ``timeout``.
    :raise APIResponseError: the answer is not what the format promises.
    :raise ServError: no key, or one that no header can carry.
    """
    return build_request("chat", False, **locals()).run(_Call.reply)


def message(messages: Content, *, max_tokens: int, model: str | None = None,
            system: Content | None = None, api_key: str | None = None,
            base_url: str | None = None, timeout: float | None = None,
            max_retries: int = 2, headers: Mapping[str, str] | None = None,
            **params: Any) -> Reply:
    """Ask once in the Anthropic format and return the whole answer.

        reply = serv.message("Hello!", model="claude-haiku-4.5",
                             system="Be brief.", max_tokens=1024)

    ``max_tokens``, the longest answer in tokens, is required.  ``system`` (a
    ``str`` or a list of text blocks) is the only place for the system prompt.
    All else, and every exception, is as for ``chat()``.
    """
    return build_request("messages", False, **locals()).run(_Call.reply)


def stream(messages: Content, *, endpoint: str = "chat",
           model: str | None = None, system: Content | None = None,
           api_key: str | None = None, base_url: str | None = None,
           timeout: float | None = None, max_retries: int = 2,
           headers: Mapping[str, str] | None = None, **params: Any) -> Stream:
    """Ask once and return the answer as a ``Stream`` of text pieces.

        with serv.stream("Hello!", system="Be brief.") as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)

    ``endpoint`` is ``"chat"`` or ``"messages"``; the latter requires
    ``max_tokens``.  The stream is open when this returns: a refused request
    raises here.  ``timeout`` bounds it up to its last event, and runs on
    while the caller holds a piece.  Once this has returned, nothing is
    retried.  All else, and every exception, is as for ``chat()``.
    """
    return build_request(streaming=True, **locals()).run(_Call.stream)


# ---------------------------------------------------------------------------
# What the calls return.
# ---------------------------------------------------------------------------

class ToolCall(collections.namedtuple("ToolCall", "id name arguments")):
    """A call that the model asks for.

    ``arguments`` is a dict; text that is no JSON object (also "") stays the
    ``str`` that it was, and of a call in a cut stream it is always a ``str``.
    What a server sends as neither is left as it is.
    """


class Reply(dict):  # type: ignore[type-arg]
    """The service's JSON answer, whole and untouched, with views on top.

    The views are the same for both formats.  ``headers`` are the answer's
    (case-insensitive), ``request_id`` the id in them that the service's
    staff ask for, ``elapsed`` the seconds from call to last byte;
    ``partial`` marks what has come of a stream that has not ended well.
    """

    def __init__(self, data: Any = (), headers: Headers | None = None,
                 elapsed: float = 0.0, partial: bool = False) -> None:
        super().__init__(data)
        self.headers: Headers = headers or http.client.HTTPMessage()
        self.elapsed, self.partial = elapsed, partial

    request_id = property(lambda self: find_request_id(self.headers))

    def __str__(self) -> str:
        return self.text

    def _choice(self) -> JSONDict:
        """Return the first choice; where there is none, the answer."""
        return [*_dicts(self.get("choices")), self][0]

    def _said(self, *names: str) -> str:
        """Return what the entry and each part say under one of the names."""
        parts = [self.message, *_dicts(self.message.get("content"))]
        said = [next(filter(None, map(part.get, names)), "") for part in parts]
        return clean_text("".join(map(find_text, said)))

    @property
    def message(self) -> JSONDict:
        """The assistant entry to append to ``messages`` for the next turn."""
        return _dict(self._choice().get("message")) or {
            "role": "assistant", "content": self.get("content", "")}

    @property
    def text(self) -> str:
        """The answer's text; ``""`` if there is none."""
        return clean_text(find_text(self.message.get("content")))

    @property
    def thinking(self) -> str:
        """The reasoning text; ``""`` if there is none."""
        # In parts or blocks, or beside the content: vendors have two names.
        return self._said("thinking", "reasoning_content", "reasoning")

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that the caller is to run; ``[]`` if there are none."""
        entry, found = self.message, []
        blocks = [block for block in _dicts(entry.get("content"))
                  if block.get("type") == "tool_use"]
        for call in _dicts(entry.get("tool_calls")) + blocks:
            # "function" or "custom" in chat; a Messages block is its own.
            spec = _dict(call.get("function") or call.get("custom")) or call
            given = spec.get("arguments", spec.get("input"))
            found.append(ToolCall(call.get("id"), spec.get("name"),
                                  parse_input(given, self.partial)))
        return found

    @property
    def stop_reason(self) -> str | None:
        """``finish_reason`` or ``stop_reason``, as sent."""
        return self._choice().get("finish_reason") or self.get("stop_reason")

    @property
    def refusal(self) -> str | None:
        """Why there is no real answer; ``None`` for an answer.

        The refusal's text, else ``"content_filter"`` or ``"refusal"``.
        """
        blocked = self.stop_reason in ("content_filter", "refusal")
        return self._said("refusal") or (self.stop_reason if blocked else None)

    @property
    def truncated(self) -> bool:
        """True where the token limit cut the answer off."""
        return self.stop_reason in (
            "length", "max_tokens", "model_context_window_exceeded")

    @property
    def usage(self) -> JSONDict:
        """The tokens counted, as sent; ``{}`` if they were not."""
        return _dict(self.get("usage"))


class Stream:
    """An answer as it comes: an iterator of its text pieces.

    One pass in all: a second loop goes on where the first stopped.  For use
    by one thread at a time; ``with`` closes it, and so does its garbage.
    """

    def __init__(self, answer: _Answer, source: Any) -> None:
        self._answer, self._source = answer, source
        next(source)  # from here on its end is the connection's

    def __iter__(self) -> Stream:
        return self

    __enter__ = __iter__

    def __next__(self) -> str:
        """Return the next piece of text; raise as ``events()`` does."""
        for _, text in self._source:
            if text:
                return str(text)
        # A second loop, after an error, must not look like an end.
        raise self._answer.error or StopIteration

    def events(self) -> Iterator[JSONDict]:
        """Yield every decoded event instead: chunks, or Messages events.

        :raise APIConnectionError: the stream was cut, or the budget ran out.
        :raise APIStatusError: the server sent an error event.
        :raise APIResponseError: an event is broken, or too large.
            Each has what had arrived in its ``reply``.
        """
        yield from (event for event, _ in self._source if event is not DONE)
        next(self, None)  # a second loop raises what ended the first

    @property
    def reply(self) -> Reply:
        """What has arrived so far, in the shape of a whole answer."""
        return self._answer.build()

    def close(self, *_: object) -> None:
        """End the stream early; what had arrived stays in ``reply``.

        Not while another thread reads from it: that is a ``ValueError``.
        """
        self._source.close()

    __exit__ = close


# ---------------------------------------------------------------------------
# Building requests.  Pure but for the SERV_ variables, read at each call.
# Everything is checked before anything is sent.  No message here shows a
# value that may be a secret: a key, a header's value, a URL with a password.
# ---------------------------------------------------------------------------

def build_request(endpoint: str, streaming: bool, params: JSONDict,
                  headers: Any = None, api_key: Any = None,
                  base_url: Any = None, timeout: Any = None,
                  max_retries: int = 2, **asked: Any) -> _Call:
    """Return a call that is ready to be sent; raise what chat() does."""
    require(endpoint in [*PATHS], 'endpoint: expected "chat" or "messages"')
    # repr() tells 2 from "2" and from True.
    require(repr(max_retries).isdigit(), "max_retries: expected 0, 1, 2 ...")
    body = build_body(endpoint == "chat", streaming, {**asked, **params})
    url, *place = build_url(str(find_setting("BASE_URL", base_url, BASE_URL)))
    given = build_headers(headers)
    # The caller's own Authorization is as secret as the key.
    own = given.get("Authorization")
    secret = build_key(api_key) if own is None else ["", *own.split()][-1]
    ours = {"Authorization": "Bearer " + secret, "User-Agent": USER_AGENT,
            "Accept": "text/event-stream" if streaming else "application/json",
            "Content-Type": "application/json", "Accept-Encoding": "identity"}
    # float() alone would take "nan", "inf" and "1_0".
    seconds = str(find_setting("TIMEOUT", timeout, TIMEOUT))
    good = re.fullmatch(r"[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", seconds)
    require(good and float(seconds), "timeout (SERV_TIMEOUT): seconds above 0")
    return _Call(endpoint == "chat", url + PATHS[endpoint], place, {
        **ours, **given}, body, secret, float(seconds), max_retries)


def require(good: Any, wrong: str, kind: type[Exception] = ValueError) -> Any:
    """Return what is good; raise an error if it is not."""
    if not good:
        raise kind(wrong)
    return good


def find_setting(name: str, value: Any, default: Any = None) -> Any:
    """Return the argument, else its variable, else the default.

    What is empty counts as not set.
    """
    unset = value is None or value == ""
    return os.environ.get("SERV_" + name) or default if unset else value


def build_body(chat: bool, streaming: bool, asked: JSONDict) -> bytes:
    """Return the JSON of a request, with nothing that was not asked for."""
    model, messages, system = map(asked.pop, ("model", "messages", "system"))
    model = find_setting("MODEL", model)
    require(isinstance(model, str), "model: pass model=... or set SERV_MODEL")
    require(chat or asked.get("max_tokens") is not None,
            "max_tokens: the Messages endpoint requires it", TypeError)
    require(asked.get("stream") in (None, streaming),
            "stream: call stream() for a stream, and only for a stream")
    for name, value in ("messages", messages), ("system", system or ""):
        require(isinstance(value, str) or isinstance(value, (list, tuple))
                and all(isinstance(it, dict) and not isinstance(it, Reply)
                        for it in value), f"{name}: expected a str or a list "
                "of dicts (append reply.message, not the reply)", TypeError)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    # In chat a prompt may also stand among the messages; one that cannot be
    # stripped is a list of parts, which counts.
    entries = [{"role": "system", "content": system}, *messages * chat]
    prompts = (getattr(it["content"], "strip", object)() for it in entries if
               it.get("content") and it.get("role") in ("system", "developer"))
    require(any(prompts), "a system prompt is required: pass system=...")
    asked.update({"stream": True} if streaming else {})
    place = {"messages": entries if system else messages} if chat else {
        "messages": messages, "system": system}
    return build_json({"model": model, **place, **asked})


_encode = json.JSONEncoder(allow_nan=False).encode  # made once: it is costly


def build_json(body: JSONDict) -> bytes:
    """Return the body's JSON, or raise naming the parameter at fault."""
    try:
        return _encode(body).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        for name in body if len(body) > 1 else ():
            build_json({name: body[name]})
        kind = TypeError if isinstance(exc, TypeError) else ValueError
        raise kind(f"{[*body][0]}: JSON cannot say it: {exc}") from None


@functools.lru_cache(maxsize=32)
def build_url(url: str) -> tuple[str, bool, str | None, int]:
    """Return a base URL without its end, ``/v1`` or a slash, and its place.

    That is whether it asks for TLS, its host, and its port.
    """
    wrong = "base_url, or SERV_BASE_URL: expected http[s]://host[:port][/path]"
    # The path is printable ASCII but for # and ?; what is kept of it is as
    # short as possible, so that none of the end stays.  urlsplit() would drop
    # a tab, and take a password.
    found = require(url.isprintable() and re.fullmatch(
        r"((?i:https?)://(?:[^]\s/@\\:?#[]+|\[[\da-fA-F:.]+(?:%\w+)?])"
        r"(?::(\d{0,5}))?(?:/[!\"$->@-~]*?)??)(?:/v1)?/*", url, re.A), wrong)
    require(0 < int(found[2] or 80) < 65536, wrong)
    parts = urllib.parse.urlsplit(url)
    tls = parts.scheme == "https"
    return found[1], tls, parts.hostname, parts.port or (443 if tls else 80)


def build_key(api_key: Any) -> str:
    """Return the key without white space around it; never show it."""
    key = find_setting("API_KEY", api_key, "")
    require(isinstance(key, str), "api_key: expected a str", TypeError)
    key = require(key.strip(), "no API key: set SERV_API_KEY", ServError)
    return str(require(key.isascii() and key.isprintable() and key, "the API "
        "key is not printable ASCII; is it still a placeholder?", ServError))


def build_headers(headers: Any) -> dict[str, str]:
    """Return the caller's headers, Names-Like-This; no value is ever shown.

    Names are tokens and values hold no control characters but tabs:
    https://www.rfc-editor.org/rfc/rfc9110#section-5.5
    """
    given, wrong = {}, "headers: expected a dict of str names and values"
    require(not headers or hasattr(headers, "items"), wrong, TypeError)
    for name, value in headers.items() if headers else ():
        good = isinstance(name, str) and isinstance(value, str)
        require(good, wrong, TypeError)
        # Neither holds a line break, so one tells where the value begins.
        require(re.fullmatch(
            r"(?ai)(?!(Content-Length|Transfer-Encoding|Host)\n)"
            r"[\w!#$%&'*+.^`|~-]+\n[\t -~\xa0-\xff]*", f"{name}\n{value}"),
            f"headers: {name!r} is not yours to set, or cannot be sent")
        given[name.title()] = value
    return given


# ---------------------------------------------------------------------------
# Reading answers.  No I/O: JSON, text, headers and errors in, values out.
# Tolerant of what is there: a field of another kind than expected counts as
# absent, so that no answer, however odd, ends in a TypeError or a KeyError.
# Only in a stream, where text would be lost, expect() refuses it.
# ---------------------------------------------------------------------------

# Some servers send raw control characters in JSON strings: not strict.
_scan = json.JSONDecoder(strict=False).scan_once  # type: ignore


def parse_json(text: str, kind: Any = object) -> Any:
    """Return the value of a JSON text if it is of a kind, else the text.

    Also the text where that is nested deeper than MAX_DEPTH: what is returned
    can be copied, pickled and dumped without an end to the stack.
    """
    whole = text.strip()
    try:
        value, end = _scan(whole, 0)
    except (StopIteration, RecursionError, ValueError):
        return text
    # What is short, or has few brackets, cannot be deep: no need to look.
    if end > 2 * MAX_DEPTH and whole.count("[") + whole.count("{") > MAX_DEPTH:
        # the values of a dict, the entries of a list; then theirs, and so on
        level = [value]
        for _ in range(MAX_DEPTH + 1):
            level = [child for node in level if isinstance(node, (dict, list))
                     for child in getattr(node, "values", node.__iter__)()]
        value = text if level else value
    return value if end == len(whole) and isinstance(value, kind) else text


def parse_input(data: Any, partial: bool) -> Any:
    """Return a tool's input decoded, {} for None; a partial one as text."""
    if partial:  # no half may look like a whole
        return data if isinstance(data, str) else json.dumps(data) * bool(data)
    data = parse_json(data, dict) if isinstance(data, str) else data
    return {} if data is None else data


def expect(value: Any, kind: type[T]) -> T:
    """Return a value that is of a kind, or an empty one for nothing."""
    good = value is None or isinstance(value, kind)
    require(good, f"expected a {kind.__name__}; got a {type(value).__name__}")
    return value or kind()


def _dict(value: Any) -> JSONDict:
    """Return a dict as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[JSONDict]:
    """Return the dicts of a list; none of anything else."""
    entries = value if isinstance(value, list) else ()
    return [entry for entry in entries if isinstance(entry, dict)]


def find_text(content: Any) -> str:
    """Return the text of a str, or of a list of parts, blocks or deltas."""
    return content if isinstance(content, str) else "".join([
        part["text"] for part in _dicts(content) if part.get("type", "text") in
        ("text", "output_text") and isinstance(part.get("text"), str)])


def clean_text(text: str) -> str:
    """Join the halves of surrogate pairs; a half alone becomes U+FFFD."""
    return text if text.isascii() else text.encode(
        "utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def find_request_id(headers: Headers) -> str | None:
    """Return the request id of an answer, as SERV or its kin name it."""
    names = ("x-openserv-request-id", "x-request-id", "request-id")
    return next(filter(None, map(headers.get, names)), None)


def is_error(name: str, event: JSONDict) -> bool:
    """Whether a decoded answer or event is an error, in any known shape.

    An ``error`` field; ``type`` or ``object`` or the event's name "error"
    (vLLM's is flat); a choice that ends in an error (OpenRouter); a bare
    message where choices should be (FastAPI).
    """
    kind, choices = event.get("type"), event.get("choices")
    bare = choices is None and (event.get("message") or event.get("detail"))
    return "error" in (name, kind, event.get("object")) or any([
        part.get("error") or part.get("finish_reason") == "error"
        for part in [event, *_dicts(choices)]]) or isinstance(
            bare or None, (str, list)) and (str(kind) in STATUS_OF_TYPE or
            str(kind or "error").lower().endswith("error"))


def parse_error(body: Any) -> JSONDict:
    """Return ``type``, ``code``, ``param`` and ``message`` of an error.

    The body is decoded JSON of any shape, or text (a proxy's HTML).
    """
    found = body[0] if isinstance(body, list) and body else body
    for part in [_dict(found), *_dicts(_dict(found).get("choices"))]:
        found = part.get("error") or found
    found = _dict(found) or {"message": found or ""}
    told = found.get("message") or found.get("detail") or ""
    return {"type": find_text(found.get("type")) or None,
            "code": found.get("code"), "param": found.get("param"),
            "message": told if isinstance(told, str) else json.dumps(told)}


def parse_retry_after(headers: Headers, now: float) -> float | None:
    """Return the seconds that a server asks to wait, or None.

    Seconds or an HTTP date (https://www.rfc-editor.org/rfc/rfc9110
    #section-10.2.3) relative to ``now``, in seconds since the epoch;
    ``retry-after-ms`` first, as OpenAI sends it.
    """
    for name, unit in ("retry-after-ms", 0.001), ("retry-after", 1.0):
        value = str(headers.get(name, "")).strip()
        if re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", value):
            return float(value) * unit
    # what is no date raises any of these, on 3.8 to 3.14
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
        date: Any = parsedate_tz(value)  # asctime()'s, without a zone, is GMT
        return mktime_tz(date) - now if mktime_tz(date) >= now else None
    return None


def retry_wait(error: ServError, attempt: int) -> float | None:
    """Return the seconds to wait before one more try; None for no more.

    ``attempt`` counts the failed tries before the one of this error.
    """
    # What no retry mends: a refused certificate, a proxy that wants a login.
    again = isinstance(error, APIConnectionError) and not (
        isinstance(error.__cause__, ssl.SSLCertVerificationError)
        or "connection failed: 407 " in str(error.__cause__))
    if isinstance(error, APIStatusError):
        again = ((error.status in (408, 409, 429) or error.status >= 500)
                 and "insufficient_quota" not in (error.type, error.code))
        told = str(error.headers.get("x-should-retry")).lower()
        again = {"true": True, "false": False}.get(told, again)
    # up to a quarter less, so that not all of many come back at once
    wait = min(8.0, 0.5 * 2 ** min(attempt, 8)) * (1 - random.random() / 4)
    asked = getattr(error, "retry_after", None)
    return None if not again else wait if asked is None else asked


def shown(text: str, most: int = 400) -> str:
    """Return one line of a text, cut short, and safe for a terminal."""
    line = "".join(char if char.isprintable() else " " for char in text[:1000])
    line = " ".join(line.split())
    return line[:most] + "..." * (len(line) > most)


def redact(value: Any, regex: str) -> Any:
    """Return a copy of a value in which nothing matches the regex."""
    if isinstance(value, str):
        return re.sub(regex, "[api key]", value)
    if type(value) in (list, tuple):
        return type(value)([redact(entry, regex) for entry in value])
    if isinstance(value, (dict, http.client.HTTPMessage)):
        value = copy.copy(value)  # it may be a caller's
        # Headers are no items of their object, but hide in an attribute.
        for part in map(_dict, (value, getattr(value, "__dict__", None))):
            for key in [*part]:
                part[redact(key, regex)] = redact(part.pop(key), regex)
    return value


# ---------------------------------------------------------------------------
# Server-sent events.  Pure: bytes in, events out.  What is pending is looked
# at again only with the blank line that ends it, so that time is linear.
# ---------------------------------------------------------------------------

ONE_EVENT = r"(?:event: ?(.*)\n)?data: ?(.*)\n\n"
# Each finds the values of a field, on lines that begin with their line feed.
NAMES, DATA = r"(?m)\nevent(?:: ?(.*))?$", r"(?m)\ndata(?:: ?(.*))?$"
DONE: JSONDict = {}  # made of [DONE]; it also stands where there is no event


def iter_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the ``(event, data)`` pairs of a stream of server-sent events.

    ``chunks`` are its bytes, cut anywhere.  By the rules of
    https://html.spec.whatwg.org/multipage/server-sent-events.html
    #parsing-an-event-stream: an event ends with a blank line, one without
    any ``data`` line is none, and what is pending at the end is discarded.

    :raise ValueError: an event in pieces grows beyond MAX_BODY bytes.
    """
    held, after_cr, between = bytearray(), False, False
    codec = "utf-8-sig"  # for the first, which drops one byte order mark
    one_event, names, fields = map(re.compile, (ONE_EVENT, NAMES, DATA))
    for chunk in filter(None, chunks):
        # Nearly always a chunk is one event, which C can read as a whole.
        if between and 13 not in chunk:  # CR
            if event := one_event.fullmatch(chunk.decode(codec, "replace")):
                yield event[1] or "message", event[2]
                continue
        # the second half of a CRLF that was cut in two
        skip, after_cr = after_cr and chunk[:1] == b"\n", chunk[-1:] == b"\r"
        held += chunk[skip:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n\n" in held[-len(chunk) - 1:]:
            *blocks, held = held.split(b"\n\n")
            for block in blocks:
                text, codec = "\n" + block.decode(codec, "replace"), "utf-8"
                if data := fields.findall(text):
                    name = ["", *names.findall(text)][-1] or "message"
                    yield name, "\n".join(data)
        require(len(held) <= MAX_BODY, "an event over MAX_BODY bytes")
        between = not (held or after_cr)


def parse_event(name: str, data: str) -> Any:
    """Return an event's JSON object, DONE at the end, None for noise.

    A Messages event that lacks its ``type`` gets it from the event's name.

    :raise ValueError: the data is not what the format promises.
    """
    event = parse_json(data, dict)
    if event is data:  # no object
        text = data.strip()
        if text in ("", "[DONE]") and name != "error":
            return DONE if text else None  # a keep-alive
        if text[:1] != "{" and not re.match("message|error|content_b", name):
            return None  # a vendor's own event
        require(name == "error", "not one JSON object, or nested too deeply")
        event = {"message": data}
    if name != "message" and not ("type" in event or "choices" in event):
        event["type"] = name
    return event


# ---------------------------------------------------------------------------
# Putting a stream together.  No I/O.  What has come is a tree, in which a text
# that grows is a StringIO, and a list whose entries come in pieces a _Grown:
# each event adds to it in place, so that time is linear in the length of the
# stream and memory is that of the answer.  build() makes plain JSON of it, on
# demand.
# ---------------------------------------------------------------------------

# What is said once of an entry, however often it is repeated.
LABELS = frozenset(("id", "index", "type", "name", "role", "format"))
# Of which kinds the values are that grow in an object of this name; none in a
# tool's.  A dict among them tells that the lists PLACED come in pieces, too.
PLACED = "content", "tool_calls", "thinking"
GROWS: Any = {"message": (str, list, dict), "input": (), "arguments": ()}


def merge(whole: JSONDict, piece: Any, grows: Any = (str, list)) -> None:
    """Add what a piece says to an object, in place.

    None, "", {} and [] erase nothing, and a label stays what it was first.
    All else that is new replaces what was there, but for values of the kinds
    that grow: those go behind one another.
    """
    for key, value in piece.items():
        old = whole.get(key)
        if isinstance(value, dict) and (value or not old):
            whole[key] = _dict(old)
            merge(whole[key], value, grows and GROWS.get(key, grows))
        elif value in (None, "", {}, []) or old and grows and key in LABELS:
            # a copy, for a list may grow, and this one is the event's own
            whole[key] = copy.copy(value) if old is None else old
        elif not isinstance(value, grows) or key in LABELS:
            whole[key] = value
        elif isinstance(value, list) and not (key in PLACED and dict in grows):
            whole[key] = old if isinstance(old, list) else []
            whole[key].extend(value)
        else:
            kind = io.StringIO if isinstance(value, str) else _Grown
            if not isinstance(old, (kind, _Grown)):
                whole[key] = kind()
                whole[key].write(getattr(old, "getvalue", str)())
            whole[key].write(value)


class _Grown:
    """A list whose entries come in pieces: choices, blocks, calls, parts.

    Each is known by its ``index``, or lacking that (Mistral) by its ``id``;
    lacking both, it is the hindmost, if the piece is first in its list and
    either a call's next or text of the same type.
    """

    def __init__(self) -> None:
        self.entries: Any = {}  # by their places in the list
        # Where the entry of an index or id is; of None, the hindmost.
        self.places: dict[Any, int] = {}

    def put(self, label: Any, begins: Any, entry: Any,
            grows: Any = (str, list)) -> Any:
        """Add to what has a label, or begin it; return what it is then.

        It begins where its index says, or if that is taken behind all.
        """
        place, behind = self.places.get(label), self.places.get(None, -1) + 1
        if begins or place is None:
            require(len(self.entries) < MAX_PARTS, "too many parts")
            taken = not isinstance(label, int) or label in self.entries
            place = behind if taken else label
            self.places.update({label: place, None: max(place, behind - 1)})
        merge(self.entries, {place: entry}, grows)
        return self.entries[place]

    def write(self, value: Any) -> None:
        """Add the entries of a list; a str is one text part."""
        if isinstance(value, str):
            value = [{"type": "text", "text": value}] if value else []
        for number, entry in enumerate(value):
            piece = _dict(entry)
            label, known = find_index(piece, None), piece.get("id") or None
            name = _dict(piece.get("function")).get("name")
            before = _dict(self.entries.get(self.places.get(label, -1)))
            # Gemini counts every call as 0: a new id and name is a new call.
            begins = known and name and known != (before.get("id") or known)
            if label is None:
                text = before.get("type") == piece.get("type") in (
                    "text", "thinking")
                goes_on = before and (text or "function" in piece and not name)
                begins = not known and (number > 0 or not goes_on)
                label = known and str(known)
            self.put(label, begins, entry, GROWS["message"])

    def getvalue(self) -> list[Any]:
        """Return the entries in order."""
        return [self.entries[place] for place in sorted(self.entries)]


def find_index(entry: JSONDict, default: Any) -> Any:
    """Return the ``index`` of a choice, block or call, else the default."""
    index = entry["index"] if isinstance(entry.get("index"), int) else default
    require(index is None or 0 <= index < MAX_PARTS, "an index out of range")
    return index


class _Answer:
    """An answer put together from its events, in either format."""

    def __init__(self, chat: bool, headers: Headers) -> None:
        self.chat, self.headers = chat, headers
        self.top: JSONDict = {}  # the answer, but for its choices or blocks
        self.parts = _Grown()  # these
        # The event that came last, if it did no more than add a text; its
        # delta, which holds the text; and to what the text was added.
        self.repeats: Any = ({}, {}, None)
        self.done, self.elapsed = False, 0.0  # at the last event; seconds
        self.error: BaseException | None = None  # that ended it

    @property
    def whole(self) -> bool:
        """Whether what has arrived proves that nothing is missing."""
        ends = [choice["finish_reason"] for choice in self.parts.getvalue()
                ] if self.chat else [self.top.get("stop_reason")]
        return bool(ends) and (self.done or all(ends))

    def add(self, name: str, event: JSONDict) -> str | None:
        """Add an event; return what it adds to the (first choice's) text.

        Of an error nothing is added, and None is returned.
        """
        if event is DONE:
            self.done = self.chat or self.whole
        # Nearly every event repeats the last one, but for its text.
        key = "content" if self.chat else "text"
        last, delta, grown = self.repeats
        try:
            place = event["choices"][0] if self.chat else event
            text = delta[key] = place["delta"][key]
            if event == last and type(text) is str and name != "error":
                grown.write(text)
                return text
        except (LookupError, TypeError):
            pass  # another kind of event
        if is_error(name, event):
            return None
        self.repeats = {}, {}, None
        return self._add_chunk(event) if self.chat else self._add_event(event)

    def _add_chunk(self, chunk: JSONDict) -> str:
        top, text = dict(chunk), ""
        listed = expect(top.pop("choices", None), list)
        for number, choice in enumerate(listed):
            entry = {"finish_reason": None, **expect(choice, dict)}
            delta, index = entry.pop("delta", None), find_index(entry, number)
            if delta in (None, {}) and index not in self.parts.places:
                delta = entry.get("message")  # a whole answer as one event
            message = {"role": None, "content": None, **expect(delta, dict)}
            whole = {**entry, "index": index, "message": message}
            part = self.parts.put(index, False, whole, (list,))
            text += find_text(message["content"]) * (index == 0)
        merge(self.top, top, ())
        if (text and len(listed) == 1 and [*(delta or ())] == ["content"]
                and {dict, list}.isdisjoint(map(type, [
                    *entry.values(), *top.values()]))):
            delta = dict(delta)
            last = {**chunk, "choices": [{**choice, "delta": delta}]}
            self.repeats = last, delta, part["message"]["content"]
        return text

    def _add_event(self, event: JSONDict) -> str:
        kind = event.get("type") or "message"
        if kind in ("message", "message_start", "message_delta"):
            top = dict(event)
            top.update(expect(top.pop("message", top.pop("delta", {})), dict))
            merge(self.top, top, ())
            # The blocks that it has are added as if an event began each.
            return "".join([self._add_event({
                "type": "content_block_start", "content_block": block})
                for block in expect(top.get("content"), list)
                if block != {"type": "text", "text": ""}])
        self.done = self.done or kind == "message_stop"
        starts = kind == "content_block_start"
        if not starts and kind != "content_block_delta":
            return ""
        delta = expect(event.get("content_block" if starts else "delta"), dict)
        index = find_index(event, len(self.parts.entries) if starts else None)
        block = {"input" if key == "partial_json" else key: value
                 for key, value in delta.items()}
        block["type"] = str(block.get("type") or "text").replace("_delta", "")
        if "citation" in block:
            block["citations"] = [block.pop("citation")]
        # Some gateways count every block as 0: begun again, it is another.
        part, text = self.parts.put(index, starts, block), find_text([block])
        if text and not starts and len(block) == 2:
            delta = dict(delta)
            self.repeats = {**event, "delta": delta}, delta, part["text"]
        return text

    def build(self, failed: bool = False) -> Reply:
        """Return what has come, as the call without streaming would.

        Until it is whole a tool's input stays text, so that half an input is
        never taken for one.
        """
        partial = failed or not self.whole or self.error is not None
        tree = {**self.top, "choices" if self.chat else "content": self.parts}
        top: JSONDict = json.loads(clean_text(json.dumps(
            tree, ensure_ascii=False, default=lambda node: node.getvalue())))
        if self.chat:
            top["object"] = "chat.completion"
            for entry in [choice["message"] for choice in top["choices"]]:
                entry["role"] = entry["role"] or "assistant"
                for call in _dicts(entry.get("tool_calls")):
                    call.pop("index", None)
                    call.setdefault("type", "function")
        else:
            top = {"role": "assistant", **top, "type": "message"}
            for block in [it for it in top["content"] if "input" in it]:
                # which is {} where nothing came of it
                block["input"] = parse_input(block["input"] or {}, partial)
        return Reply(top, self.headers, self.elapsed, partial)


# ---------------------------------------------------------------------------
# Network: the only I/O but the command line's.  http.client speaks HTTP, over
# a socket on which every wait ends with the call's deadline.  Whatever fails
# there comes out as a ServError; a connection is kept only after an answer
# that was read to its end.
#
# From the bottom up: a connection with its deadline; where connections go
# (address, proxy, CA); the kept ones; and a call, which makes its tries, each
# of them send, then read a whole answer or begin a stream.
# ---------------------------------------------------------------------------

NETWORK_ERRORS = OSError, UnicodeError, http.client.HTTPException
_idle: list[_Connection] = []  # oldest first
_lock = threading.RLock()  # a signal's handler may call, too


class _Connection(io.RawIOBase):
    """A connection that serves one call at a time, and then the next.

    To http.client it is a socket and, through a buffer, its file.  That
    closes both when it is done with them, which does nothing here: release()
    does it.
    """

    def __init__(self, route: Any) -> None:
        # Kept: an earlier call left it, and nothing has come in this one.
        self.route, self.pid, self.kept = route, os.getpid(), False
        self.sock: Any = None  # the real socket, or TLS

    def send(self, call: _Call) -> Any:
        """Send a call's request; return the answer, of which the head is read.

        A kept connection on which something waits (the end, or a 408 that
        nobody asked for) is made anew: that is no answer to this request.
        """
        self.unsent: Any = b""
        self.deadline, self.wanted = call.deadline, True
        self.soon = time.monotonic() + STALE_SECONDS
        if self.kept and self.receive(bytearray(1), 0) is not None:
            self.release()
        tls, host, port, proxy, login, *authority = self.route
        # Never kept: one that has closed itself dials anew, without TLS.
        client: Any = http.client.HTTPConnection(*(proxy or (host, port)))
        url, headers = "/" + call.url.split("/", 3)[3], call.headers
        if proxy and tls:
            client.set_tunnel(host, port, login)
        elif proxy:
            url, headers = call.url, {**headers, **login}
        # The Host header omits the default port.
        client.default_port, client.sock = 443 if tls else 80, self
        if not self.kept:
            self.sock = dial(client.host, client.port, self.deadline)
            if proxy and tls:
                client._tunnel()
            if tls:
                with _lock:
                    context = get_tls_context(*authority)
                self.sock = context.wrap_socket(self.ready(CONNECT_TIMEOUT),
                                                server_hostname=host)
        client.request("POST", url, call.body, headers)
        response = client.getresponse()
        while response.status < 200:  # http.client skips only 100
            response.headers = None  # begin() reads an answer just once
            response.begin()
        # What is defective in the header may quote a line with the key.
        vars(response.headers).update(defects=[], _payload="")
        # http.client takes the end of the connection for that of the header.
        require(not self.ended, "closed inside the header", OSError)
        return response

    def close(self) -> None:
        pass

    def readable(self) -> bool:
        return True

    def makefile(self, mode: str) -> Any:
        return io.BufferedReader(self, READ_SIZE)

    def ready(self, at_most: float) -> Any:
        """Return the real socket, to wait for at_most, or what is left.

        Raise socket.timeout if nothing is.
        """
        left = self.deadline - time.monotonic()
        # Parent and child would both read parts of one answer.
        if left <= 0 or self.pid != os.getpid():
            raise socket.timeout("time is up, or it was opened before a fork")
        self.sock.settimeout(min(left, at_most))
        return self.sock

    def sendall(self, data: bytes) -> None:
        self.unsent = memoryview(bytes(self.unsent) + data)

    def readinto(self, buffer: Any) -> Any:
        """Send what is to be sent, head and body at once, and read."""
        while self.unsent and self.wanted:
            sock = self.ready(WAIT_SECONDS)
            with contextlib.suppress(OSError):
                self.unsent = self.unsent[sock.send(self.unsent[:READ_SIZE]):]
            # The answer (413, say) tells more than the broken pipe.
            if self.unsent and (size := self.receive(buffer, 0)) is not None:
                # An interim answer, or a part of one, still wants the rest.
                self.wanted = not re.match(b"HTTP/1.. [2-5]", buffer[:size])
                return size
        return self.receive(buffer)

    def receive(self, buffer: Any, at_most: float = 86400.0) -> Any:
        """Return how many bytes came, 0 at their end, None for not yet.

        No wait is above a day: poll(), beneath, takes no more than 24.
        """
        try:
            size = self.ready(at_most).recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        self.kept, self.ended = self.kept and not size, not size
        return size

    def release(self, response: Any = None) -> None:
        """Keep it for the next call if the answer is at its end, or close."""
        self.idle_since, self.kept = time.monotonic(), False
        if response is not None:
            self.deadline = min(self.deadline, self.idle_since + WAIT_SECONDS)
            # A stream ends with [DONE], but its body with one empty chunk
            # more, which may be late, or never come: then it is closed.
            with response, contextlib.suppress(*NETWORK_ERRORS):
                self.kept = not (self.unsent or response.will_close
                                 or response.length or response.read1(1))
        if self.kept:
            self.unsent = b""  # what is sent still holds the whole request
            with _lock:
                _idle.append(self)
        elif self.sock is not None:
            self.sock.close()


def dial(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of a host that answers.

    No address may take more than CONNECT_TIMEOUT, nor more than its share
    of what is left, so that a dead one leaves time for the next.
    """
    found: Any = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    share = min(CONNECT_TIMEOUT, (deadline - time.monotonic()) / len(found))
    for number, (*_, where) in enumerate(found, 1):
        with contextlib.suppress(*[OSError] * (number < len(found))):
            # numeric by now: nothing is looked up again
            sock = socket.create_connection(where[:2], max(share, 0.001))
            break
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Systems have one or the other: after how long a silence to probe.
    for name in vars(socket).keys() & {"TCP_KEEPIDLE", "TCP_KEEPALIVE"}:
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE)
    return sock


@functools.lru_cache(maxsize=None)
def get_tls_context(*authority: str | None) -> ssl.SSLContext:
    """Return the context for a CA setting, which only tells them apart.

    It costs tens of milliseconds.
    """
    return ssl.create_default_context()


def find_route(call: _Call) -> Any:
    """Return what connections for a call have in common, as it is now.

    Whether TLS is on, host, port, what http.client is to be told of a proxy
    (where it is and, as a header, its login), and for TLS the CA setting.
    """
    tls, get = call.place[0], os.environ.get
    name, proxy, login = "https_proxy" if tls else "http_proxy", None, None
    if get(name) or get(name.upper()):
        from urllib import request  # not loaded where there is no proxy
        asked = request.Request(call.url)
        found = request.getproxies().get(asked.type, "")
        require(re.fullmatch(r"(?i)(http://)?([^/]*@)?([^\s/:@]+|"
                             r"\[[\da-f:.]+])(:\d{1,5})?(/.*)?|", found),
                name + ": expected http://[user:password@]host:port")
        if found:  # urllib's own handler turns the request to the proxy
            request.ProxyHandler({}).proxy_open(asked, found, asked.type)
        if asked.host != call.url.split("/")[2]:
            proxy, login = (asked.host,), asked.headers
    authority = map(get, ("SSL_CERT_FILE", "SSL_CERT_DIR") * tls)
    return (*call.place, proxy, login, *authority)


def take_connection(route: Any) -> _Connection:
    """Return a connection, a kept one if there is; drop the old ones."""
    # The newest is the likeliest to be alive; the oldest are at the front.
    with _lock:
        while _idle and (len(_idle) > MAX_IDLE or IDLE_SECONDS
                         < time.monotonic() - _idle[0].idle_since):
            _idle.pop(0).release()
        for connection in reversed(_idle):
            if connection.route == route:
                _idle.remove(connection)
                return connection
    return _Connection(route)


def close_idle() -> None:
    """Close what is kept: at exit, and in a child, whose parent keeps it."""
    global _lock
    _lock = threading.RLock()  # another thread may have held it at the fork
    while _idle:
        _idle.pop().release()


atexit.register(close_idle)
getattr(os, "register_at_fork", dict)(after_in_child=close_idle)  # not Windows


class _Call(collections.namedtuple(
        "_Call", "chat url place headers body secret timeout max_retries")):
    """One call: its request, its deadline, its tries, its errors.

    ``place`` is its server, as build_url() tells it; ``connection`` is that of
    this try, ``response`` None until one begins.
    """

    __repr__ = object.__repr__  # the other one would show the key

    def run(self, read: Callable[[_Call], T]) -> T:
        """Return what ``read`` makes of the answer, after some tries."""
        self.started, outer = time.monotonic(), sys.exc_info()[1]
        self.deadline, tries, stale = self.started + self.timeout, 0, False
        while True:
            take = _Connection if stale else take_connection
            connection = self.connection = take(find_route(self))
            self.response: Any = None
            try:
                self.response = connection.send(self)
                return read(self)
            except (ServError, *NETWORK_ERRORS) as exc:
                # A kept connection that ends at once, before a byte of the
                # answer, was closed while it was idle: no failed try, but made
                # anew.  Later, the request was read, and may be billed.
                stale = connection.kept and time.monotonic() < connection.soon
                connection.release(self.response)
                try:  # "as" lets go of the error, which holds this frame
                    raise self.explain(exc, outer)
                except ServError as error:
                    wait = 0.0 if stale else retry_wait(error, tries)
                    tries += not stale
                    # Without room for the wait there is no use in waiting.
                    if (wait is None or tries > self.max_retries
                            or time.monotonic() + wait >= self.deadline):
                        raise
            except BaseException:
                connection.release()
                raise
            time.sleep(wait)

    def reply(self) -> Reply:
        """Return the whole answer."""
        reply = Reply(self.read_answer(), self.response.headers)
        reply.elapsed = time.monotonic() - self.started
        self.connection.release(self.response)
        return reply

    def stream(self) -> Stream:
        """Return the answer as a stream."""
        answer = _Answer(self.chat, self.response.headers)
        # A server that does not stream may still have answered, in JSON: that
        # is a stream of one event.  Anything else read_answer() refuses.
        pairs = iter_events(self.iter_body(MAX_STREAM))
        kind = self.response.headers.get_content_type()
        if self.response.status // 100 != 2 or kind != "text/event-stream":
            pairs = iter([("message", json.dumps(self.read_answer()))])
            answer.done = True
        return Stream(answer, self.iter_stream(answer, pairs))

    def iter_stream(self, answer: _Answer, pairs: Any) -> Iterator[Any]:
        """Yield events and what each adds to the text, up to a proven end."""
        half, outer = "", None  # half a character, waiting for its other half
        try:
            yield DONE, ""  # for Stream(), so that close() is seen from now on
            outer = sys.exc_info()[1]
            for name, data in pairs:
                answer.elapsed = time.monotonic() - self.started
                if answer.elapsed >= self.timeout:
                    raise OSError("still coming")
                if (event := parse_event(name, data)) is None:
                    continue
                if (text := answer.add(name, event)) is None:
                    raise self.refused(200, event)
                if half or not text.isascii():
                    starts = event.get("type") == "content_block_start"
                    text = (clean_text(half) if starts else half) + text
                    end = len(text) - ("\ud800" <= text[-1:] <= "\udbff")
                    text, half = clean_text(text[:end]), text[end:]
                yield event, text
                outer = sys.exc_info()[1]
                if answer.done:
                    break
            require(answer.whole, "it ended early", http.client.HTTPException)
            self.connection.release(self.response)
        except BaseException as exc:
            self.connection.release()
            cut = isinstance(exc, NETWORK_ERRORS)
            # What proves an answer whole proves it also before a reset.
            if not (answer.whole and cut and time.monotonic() < self.deadline):
                if not isinstance(exc, GeneratorExit):
                    answer.error = self.explain(exc, outer, answer.build(True))
                known = cut or isinstance(exc, (ServError, ValueError))
                raise answer.error if known and answer.error else exc
        yield DONE, clean_text(half)

    def read_answer(self) -> JSONDict:
        """Read a whole JSON answer; raise the error that it is, if it is."""
        good, data = 200 <= self.response.status < 300, io.BytesIO()
        try:
            data.writelines(self.iter_body(MAX_BODY if good else MAX_ERROR))
        except (ServError, *NETWORK_ERRORS):
            self.response.will_close = True  # not to be kept
            if good:  # else the status is the news, even without its body
                raise
        text = data.getvalue().decode("utf-8", "replace").lstrip("\ufeff")
        answer = parse_json(text)
        if not good or is_error("", _dict(answer)):
            raise self.refused(self.response.status, answer)
        found = _dict(answer).get("choices" if self.chat else "content")
        require(isinstance(found, list) and (found or not self.chat),
                f"not a JSON answer: {text or 'nothing'}", APIResponseError)
        return _dict(answer)

    def iter_body(self, limit: int) -> Iterator[bytes]:
        """Yield the bytes of a body as they come, up to its proven end."""
        for name in "content-encoding", "transfer-encoding":
            coding = str(self.response.headers.get(name) or "identity")
            require(coding.lower() in ("identity", "chunked"),
                    f"{name} {coding}, not asked for", APIResponseError)
        while data := self.response.read1(READ_SIZE):
            if (limit := limit - len(data)) < 0:
                raise APIResponseError("answer too large")
            yield data
        # http.client is silent of a body shorter than its Content-Length.
        if left := self.response.length:
            raise http.client.IncompleteRead(b"", left)

    def refused(self, status: int, body: Any) -> ServError:
        """Return the error for a status, or for an error object in a 200."""
        fields, headers = parse_error(body), self.response.headers
        kind, code = fields["type"], str(fields["code"])
        if 200 <= status < 300:
            good = re.fullmatch("[45][0-9][0-9]", code)
            status = STATUS_OF_TYPE.get(kind) or int(code if good else 500)
        why = (fields["message"] or "no message") + ADVICE.get(status, "")
        if 300 <= status < 400:
            why = f"not following to {headers.get('location')}; set base_url"
        error = STATUS_ERRORS.get(min(status, 500), APIStatusError)(
            f"{status} {kind or http.client.responses.get(status, '')}: {why}")
        vars(error).update(fields, status=status, headers=headers, body=body,
                           retry_after=parse_retry_after(headers, time.time()))
        return error

    def explain(self, exc: Any, outer: Any, reply: Any = None) -> ServError:
        """Return what was raised as an error of this call, without the key.

        The key is cut out of all that the error is chained to as well, up to
        ``outer``, which the caller was handling already; and before the
        message is cut short, which would leave half a key.
        """
        error, what = exc, str(exc) or type(exc).__name__
        if not isinstance(error, ServError):
            kind: type[ServError] = APIConnectionError
            found = "the answer was cut" if self.response else "no answer" + (
                " through the proxy" if self.connection.route[3] else "")
            if time.monotonic() >= self.deadline:
                kind, found = APITimeoutError, f"not within {self.timeout:g} s"
            elif isinstance(exc, ssl.SSLCertVerificationError):
                what += "; for a CA of your own, set SSL_CERT_FILE to its PEM"
            elif type(exc) is ValueError:
                kind, found = APIResponseError, "a broken event"
            error = kind(f"{found}: {what}")
            error.__cause__ = exc
        headers: Any = getattr(self.response, "headers", {})
        error.reply, error.request_id = reply, find_request_id(headers)
        # repr() doubles a backslash, and "x" or "local" is also a word
        key = re.sub(r"(\\\\)+", r"(?<!\\\\)\\\\+", re.escape(self.secret))
        regex = key if self.secret[7:] else rf"(?<!\w){key or '(?!)'}(?!\w)"
        link: Any = error
        while link is not None and link is not outer:
            link.args, link.__dict__ = redact((link.args, vars(link)), regex)
            link = link.__cause__ or link.__context__
        told = error.request_id and f", request id {shown(error.request_id)}"
        error.args = (f"{shown(error.args[0])} (POST {self.url}{told or ''})",)
        return error


# ---------------------------------------------------------------------------
# Command line.  The answer goes to standard output, all else to standard
# error; no option takes the key.
# ---------------------------------------------------------------------------

def main(argv: Sequence[str] | None = None) -> int:
    """usage: serv [options] [PROMPT ...]    or: python3 serv.py [options] ...

Ask a model of SERV.  Standard input, if piped, follows the prompt; a prompt
of - asks for it by name.

  -m, --model NAME         default: SERV_MODEL, else gpt-5.4-mini, or for
                           messages claude-haiku-4.5
  -s, --system TEXT        the system prompt (a plain helpful assistant)
  -e, --endpoint FORMAT    chat (the default) or messages
  -n, --max-tokens N       the longest answer; for messages 4096 if not given
  -o, --option NAME=VALUE  any parameter of the request; JSON, else text
  -H, --header 'NAME: VALUE'  any header of the request
      --no-stream          print the answer when all of it is there
      --json               print the whole answer as JSON
      --dry-run            print the request as a curl command; needs no key
  -v, --verbose            tell the request id, the time and the tokens
      --version, --help

  serv "Why is the sky blue?"
  git diff | serv -e messages -m claude-haiku-4.5 "Review this change."
  serv -o temperature=0 -n 200 --json "Three names for a cat." | jq .usage

SERV_API_KEY holds the key; SERV_BASE_URL, SERV_MODEL and SERV_TIMEOUT
(seconds) are read too.  Exit status: 0 a whole answer, 1 the call failed or
nobody reads, 2 wrong usage, 3 blocked or cut off by the token limit, 130
interrupted.
"""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # if it was closed
    for file in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        getattr(file, "reconfigure", dict)(errors="replace")
    try:
        require(sys.stdout, "standard output is closed", OSError)
        args = parse_args(argv)
        # Neither the help nor the version reads standard input.
        text = args.told or args.dry_run and build_curl(build_call(args))
        if not text:
            return print_answer(args, build_call(args))
        print(text.strip(), flush=True)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, ServError, OSError, ValueError, TypeError) as e:
        say(str(e) or "interrupted")
        return (130 if isinstance(e, KeyboardInterrupt) else
                1 if isinstance(e, (ServError, OSError)) else 2)


def say(*lines: str) -> None:
    """Print lines to standard error, but for empty ones."""
    for line in filter(None, lines):
        print("serv: " + line, file=sys.stderr)


def parse_args(argv: Sequence[str] | None) -> Any:
    """Return the options of the command line; ValueError where it is wrong."""
    import argparse
    parser: Any = argparse.ArgumentParser(usage="", add_help=False)
    parser.error = functools.partial(require, False)  # it would exit
    add = parser.add_argument
    add("prompt", nargs="*")
    add("-m", "--model")
    add("-s", "--system", default="You are a helpful assistant.")
    add("-e", "--endpoint", choices=list(PATHS), default="chat")
    add("-n", "--max-tokens", type=int)
    for names in "-o --option", "-H --header":
        add(*names.split(), action="append", default=[])
    for names in "--no-stream", "--json", "--dry-run", "-v --verbose":
        add(*names.split(), action="store_true")
    for names, told in (("--version", "serv " + __version__),
                        ("-h --help", main.__doc__ or "see README.md")):  # -OO
        add(*names.split(), action="store_const", dest="told", const=told)
    return parser.parse_intermixed_args(argv)


def build_call(args: Any) -> _Call:
    """Return the call that the command line asks for."""
    texts = [" ".join(word for word in args.prompt if word != "-")]
    if sys.stdin and ("-" in args.prompt or not sys.stdin.isatty()):
        texts.append(sys.stdin.read().rstrip())
    prompt = require("\n\n".join(filter(None, texts)), "no prompt; see --help")
    args.streaming = not (args.no_stream or args.json)
    chat = args.endpoint == "chat"
    params: JSONDict = {} if chat else {"max_tokens": 4096}
    if args.verbose and chat and args.streaming:  # it tells the tokens
        params["stream_options"] = {"include_usage": True}
    params.update(iter_pairs(args.option, "=", parse_json))
    # what stream() has arguments for; the last is **params
    bad = params.keys() & {*stream.__code__.co_varnames[:-1], "stream"}
    require(not bad, f"-o sets no {' or '.join(sorted(bad))}; see --help")
    limit = "max_completion_tokens" if chat else "max_tokens"
    params.update({} if args.max_tokens is None else {limit: args.max_tokens})
    headers = dict(iter_pairs(args.header, ":", str.strip))
    args.model = find_setting("MODEL", args.model, EXAMPLES[args.endpoint])
    return build_request(args.endpoint, args.streaming, params, headers,
                         "$SERV_API_KEY" * args.dry_run, model=args.model,
                         system=args.system, messages=clean_text(prompt))


def iter_pairs(options: list[str], sign: str, read: Any) -> Iterator[Any]:
    """Yield the name and the value read of each NAME=VALUE or NAME: VALUE."""
    for name, found, text in (option.partition(sign) for option in options):
        # Not shown: what stands there may be a key.
        require(name and found, f"an option lacks its NAME{sign}VALUE")
        yield name, read(text)


def build_curl(call: _Call) -> str:
    """Return the curl command of a call; the shell puts the key in."""
    from shlex import quote
    ours = "Authorization: Bearer $SERV_API_KEY"
    # curl takes "Name;" for an empty header
    lines = [f"{name}: {text}" if text else name + ";"
             for name, text in call.headers.items()]
    return " \\\n  ".join(["curl -gsSN --path-as-is " + quote(call.url), *[
        "-H " + (f'"{line}"' if line == ours else quote(line))
        for line in lines], "--data-raw " + quote(call.body.decode())])


def print_answer(args: Any, call: _Call) -> int:
    """Print the answer to a call; return the exit status."""
    tty: Any = sys.stderr if sys.stderr.isatty() else io.StringIO()
    print("serv: waiting for", args.model, end="", file=tty, flush=True)
    # as wide as the note, and the ^C that a terminal may have put behind it
    blank, text = f"\r{' ' * (len(args.model) + 20)}\r", ""
    try:
        found: Any = call.run(_Call.stream if args.streaming else _Call.reply)
        for piece in found if args.streaming else [found]:
            print(blank, end="", file=tty, flush=True)
            text = str(piece) if not args.json else json.dumps(
                piece, indent=2, ensure_ascii=False)
            print(text, end="", flush=True)
            blank = ""
    finally:
        print(blank, end="", file=tty, flush=True)
        print(end="\n" if text[-1:] not in ("", "\n") else "", flush=True)
    reply = found.reply if args.streaming else found
    wrong = ("blocked: " + shown(reply.refusal) if reply.refusal else
             "cut off by the token limit" * reply.truncated)
    told = (f"request id {reply.request_id or 'none'}, {reply.elapsed:.1f} s, "
            f"{json.dumps(reply.usage) if reply.usage else 'tokens not told'}")
    tools = reply.tool_calls and "the answer calls tools; --json shows them"
    say(told * args.verbose, tools * (not args.json), wrong)
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
