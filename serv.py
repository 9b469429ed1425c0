# SPDX-FileCopyrightText: serv.py contributors
# SPDX-License-Identifier: MIT
"""A client for the SERV inference API in one file, without dependencies.

It needs Python 3.8 or newer.  Usage::

    import serv                 # first: export SERV_API_KEY=... SERV_MODEL=...

    system = "Be brief."
    reply = serv.chat("Hello!", system=system)      # POST /v1/chat/completions
    print(reply.text)                               # the answer, a str
    print(reply["usage"])                           # a Reply is a dict
    for piece in serv.stream("Hi!", system=system):     # pieces, as they come
        print(piece, end="", flush=True)
    serv.message("Hi!", system=system, max_tokens=99)   # POST /v1/messages

What this file does with your key: each call reads it from ``api_key`` or
from SERV_API_KEY and sends it in the Authorization header of the request to
``base_url``, and nowhere else.  This file writes it to no disk and no log,
and removes it (a key of 8 characters or more, its literal text only) from
the messages and attributes of errors, as it does with a proxy's login (in
base64, as it is sent).  It does not remove other secrets that you put into
headers.  Tools that record local variables, http.client's debuglevel and
audit hooks of Python can still see the key; so can whoever has both a record
of the traffic and the file that SSLKEYLOGFILE names.
Redirects are not followed.  Certificates are always checked.  (If
SSL_CERT_FILE or SSL_CERT_DIR is set, VERIFY_X509_STRICT is off: checks of
their form, which Python 3.13 added.)  A plain ``http://`` URL sends the key
unencrypted.  No host is contacted except the one in ``base_url``, through
your proxy if the environment names one.

Sections, top to bottom: errors; the calls; Reply, ToolCall and Stream;
building requests; reading answers; server-sent events; putting streams
together; network; command line.  Only the last two do any I/O.

If you review this file, look here first::

    the key             build_request(); Call.redact_text()
    what is opened      connect_socket(): sockets; get_tls_context(): files of
                        CAs, and by ssl the file that SSLKEYLOGFILE names.  No
                        other file (but see the command line), no thread
    the environment     SERV_API_KEY, SERV_BASE_URL, SERV_MODEL, SERV_TIMEOUT;
                        SSL_CERT_FILE, SSL_CERT_DIR; HTTPS_PROXY, HTTP_PROXY,
                        NO_PROXY, also in small letters: read at each call
    retries             send_request(), retry_wait(); Connection.post()
    time                DeadlineSocket.check()
    memory              the limits below; Answer.iter_body()
    a whole stream      "Putting streams together"; Stream._read()
    kept connections    Connection.is_usable(), keep(); close_idle()
    redirects           build_status_error()

Errors::

    ServError                       the base; raised itself for a bad key only
        APIConnectionError          no whole answer
            APITimeoutError         the time budget ran out
        APIResponseError            the answer breaks the format
        APIStatusError              the server said no; .status .message ...
            BadRequestError 400     AuthenticationError 401
            BillingError 402        PermissionDeniedError 403
            NotFoundError 404       RateLimitError 429
            InternalServerError 5xx
"""
from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import copy
import errno
import functools
import http.client
import io
import itertools
import json
import os
import random
import re
import select
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from email.utils import mktime_tz, parsedate_tz

# A type checker takes this as true.  At run time it is false, because
# importing typing would take longer than importing this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import (Any, Callable, Iterable, Iterator, Mapping,
                        NoReturn, Sequence, Union)
    Assembler = Union["ChatAssembler", "MessagesAssembler"]
    JSON = Any  # a decoded JSON value
    JSONDict = dict[str, JSON]
    Messages = Union[str, Sequence[Mapping[str, JSON]]]
    Headers = http.client.HTTPMessage

__version__ = "0.2.0"
__all__ = ["chat", "message", "stream", "iter_events", "Reply", "Stream",
           "ToolCall", "ServError", "APIConnectionError", "APITimeoutError",
           "APIResponseError", "APIStatusError", "BadRequestError",
           "AuthenticationError", "BillingError", "PermissionDeniedError",
           "NotFoundError", "RateLimitError", "InternalServerError"]

BASE_URL = "https://inference-api.openserv.ai"
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}
# The command line's models where none is named: those of the API reference.
EXAMPLES = {"chat": "gpt-5.4-mini", "messages": "claude-haiku-4.5"}
USER_AGENT = f"serv.py/{__version__} Python/{sys.version.split()[0]}"

# Times, in seconds.
TIMEOUT = 600.0         # of a whole call; answers of 298 s have been seen
MAX_TIMEOUT = 86400.0   # the largest timeout that a call accepts: a day
CONNECT_TIMEOUT = 10.0  # to connect to one address, and for a TLS handshake
CLOCK_ERROR = 0.02      # a failure this close to the deadline is a timeout:
                        # Windows' clock ticks only every 16 ms
WAIT_SLICE = 1.0        # of one poll(): Ctrl-C does not end it on Windows
KEEPALIVE = 60          # of silence before TCP probes the other side: some
                        # NATs forget a connection after 350 s
DEAD_SECONDS = 30       # without acknowledgement of what was sent; on Linux,
                        # also of an upload that the server does not read
IDLE_SECONDS = 50.0     # of keeping a connection: load balancers drop it at 60
ERROR_SECONDS = 10.0    # for the body of an error, whose status is known
STALE_SECONDS = 1.0     # if a kept connection ends within this time, before a
                        # byte of the answer, the request is sent once more;
                        # see Connection.post()
LAST_CHUNK_SECONDS = 0.01   # to reuse the connection of a stream, whose last
                            # chunk may come after [DONE]; see is_usable()

# Idle connections; the oldest are closed first.  Each takes one descriptor,
# of which a process often has 1,024.  If more threads than this make calls at
# once, some calls open a new connection.
MAX_IDLE = 256

# Sizes, in bytes.  In memory, an answer takes 3 to 10 times its size, as a
# rule.  At worst, if it is full of empty dicts, one of 32 MiB takes 2 GiB, and
# a stream of 64 MiB takes 5 GiB while its reply is built.
READ_SIZE = 1 << 16     # of one read or write
MAX_BODY = 1 << 25      # of the answer to a call, or of an event: 32 MiB
MAX_STREAM = 1 << 26    # of the answer to stream(): 64 MiB, ten times the
                        # longest that was seen
MAX_ERROR = 1 << 18     # of an error's body; the rest is not read
MAX_RECEIVED = 1 << 29  # of all that comes for one try: with heads, trailers
                        # and the sizes of chunks, which may hold a byte each
MIN_SECRET = 8          # of a key; a shorter one is a common word

# Levels of nested JSON.  The json module, and copying, recurse once a level.
# A thread on musl has a stack of 128 KiB: there, Python 3.8 crashes at 100.
MAX_DEPTH = 64
MAX_PARTS = 2000        # choices, calls or blocks of a stream
MAX_NAME = 1000         # characters of a tool's name; OpenAI allows 64


# ---------------------------------------------------------------------------
# Errors.  Everything that goes wrong with a call is a ServError.  Misuse is
# a ValueError or a TypeError instead, raised before anything is sent.
# ---------------------------------------------------------------------------

class ServError(Exception):
    """The base of every error about a call.

    It is raised itself only if there is no usable API key.

    ``str(error)`` is one line: what happened, the URL and the request id.
    ``reply`` holds what had arrived of a stream (a ``Reply``), else ``None``.
    ``request_id`` is the answer's request id, or ``None``; quote it to
    support.  ``retries`` says how many tries of the call had failed before.
    """

    reply: Reply | None = None
    request_id: str | None = None
    retries: int = 0
    _worth_a_retry: bool = False    # see retry_wait()


class APIConnectionError(ServError):
    """No whole answer: DNS, TCP, TLS, a reset, a cut body, a cut stream."""

    _worth_a_retry = True


class APITimeoutError(APIConnectionError):
    """The time budget of the call, ``timeout`` seconds, ran out."""

    _worth_a_retry = False      # no time is left


class APIResponseError(ServError):
    """The answer breaks the format: not JSON, a broken event.

    Also an answer in an encoding that was not asked for, and an answer over
    the limits at the top of this file.
    """


class APIStatusError(ServError):
    """The server said no: with its status, or with an error in a 200.

    ``status`` is the HTTP status.  For an error object in a 200, and for an
    error event in a stream, it is the status that the error's type stands
    for.  ``type``, ``code``, ``param`` and ``message`` are the server's own.
    ``body`` is the decoded JSON body, or its text.  ``headers`` are the
    answer's.  ``retry_after`` is how many seconds the server asks to wait,
    or ``None``.  A redirect is an APIStatusError too.

    For a test of your own: ``raise serv.RateLimitError("no")``.
    """

    status: int = 0

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.type: str | None = None
        self.code: str | int | None = None
        self.param: str | None = None
        self.message: str = text
        self.body: JSON = None
        self.headers: Headers = http.client.HTTPMessage()
        self.retry_after: float | None = None


class BadRequestError(APIStatusError):
    """400: the request is wrong; ``message`` and ``param`` say where."""

    status = 400


class AuthenticationError(APIStatusError):
    """401: the key is wrong."""

    status = 401


class BillingError(APIStatusError):
    """402: no credits are left; nothing was billed."""

    status = 402


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this."""

    status = 403


class NotFoundError(APIStatusError):
    """404: there is no such path or model."""

    status = 404


class RateLimitError(APIStatusError):
    """429: too many requests; ``retry_after`` may say how long to wait.

    With the type or code ``insufficient_quota``, waiting does not help.
    """

    status = 429


class InternalServerError(APIStatusError):
    """5xx: the service, or the model behind it, failed."""

    status = 500


# ---------------------------------------------------------------------------
# The calls.
# ---------------------------------------------------------------------------

def chat(messages: Messages, *, model: str | None = None,
         system: Messages | None = None, api_key: str | None = None,
         base_url: str | None = None, timeout: float | None = None,
         max_retries: int = 2, headers: Mapping[str, str] | None = None,
         **params: Any) -> Reply:
    """Send one request in the OpenAI format and return the whole answer.

        reply = serv.chat("Hello!", model="gpt-5.4-mini", system="Be brief.")
        print(reply.text)

    :param messages: a ``str`` (one user message) or a list of message
        dicts, which are sent as they are.
    :param model: default SERV_MODEL.
    :param system: the system prompt.  It is put first.  It is required,
        because SERV refuses a request without one, unless ``messages`` holds
        a ``system`` or ``developer`` entry.
    :param api_key: default SERV_API_KEY; like ``model`` and ``base_url``, it
        counts as not passed if it is empty.
    :param base_url: default SERV_BASE_URL, else the service; with or
        without ``/v1``.
    :param timeout: seconds for the whole call: connecting, every retry and
        its wait, reading the last byte.  Default SERV_TIMEOUT, else 600; at
        most a day.  It does not cover the lookup of a host name, which only
        the system can end, nor the time to decode what has arrived.
    :param max_retries: how often a failed try is repeated.  Repeated are
        connection failures (except a refused certificate or proxy login),
        408, 409, 429 (except ``insufficient_quota``) and 5xx.  If an answer
        has the header ``x-should-retry: true`` or ``false``, that decides,
        whatever the status.
        A retry may be billed.  Each is a warning to the logger ``serv``, if
        the program has imported ``logging``.

        One resend is no retry, and happens even with 0: if a reused
        connection turns out to be closed, within a second and before a byte
        of the answer, the request is sent once more.  (If the server had
        read it, that may be billed, too.)
    :param headers: added to the request; they replace ours of the same
        name, in any case.  With an ``Authorization`` no key is needed.
    :param params: every other parameter goes into the JSON body untouched.
    :return: a ``Reply``: the service's JSON, with ``text`` and more on top.
    :raise ValueError: the input cannot be sent: no model, no system prompt,
        a bad URL (also of a proxy), a bad timeout or ``max_retries``, a
        ``stream`` parameter, a value that JSON or a header cannot represent,
        or one of the headers Content-Length, Transfer-Encoding and Host.
    :raise TypeError: the input is of a wrong type, or ``extra_headers``,
        ``extra_body`` or ``extra_query`` of the SDKs is passed.
    :raise APIStatusError: the server said no; see its subclasses.
    :raise APIConnectionError: there was no whole answer; or
        ``APITimeoutError``: not within ``timeout``.
    :raise APIResponseError: the answer breaks the format.
    :raise ServError: there is no key, or no header can carry it.
    """
    request = build_request(
        "chat", messages, model=model, system=system, api_key=api_key,
        base_url=base_url, timeout=timeout, max_retries=max_retries,
        headers=headers, params=params)
    return send_request(request).build_reply()


def message(messages: Messages, *, max_tokens: int, model: str | None = None,
            system: Messages | None = None, api_key: str | None = None,
            base_url: str | None = None, timeout: float | None = None,
            max_retries: int = 2, headers: Mapping[str, str] | None = None,
            **params: Any) -> Reply:
    """Send one request in the Anthropic format; return the whole answer.

        reply = serv.message("Hello!", model="claude-haiku-4.5",
                             system="Be brief.", max_tokens=1024)

    ``max_tokens``, the most tokens that the answer may have, is required.
    ``system`` (a ``str`` or a list of text blocks) is the only place for the
    system prompt.  The rest, and every exception, is as for ``chat()``.
    """
    request = build_request(
        "messages", messages, model=model, system=system, api_key=api_key,
        base_url=base_url, timeout=timeout, max_retries=max_retries,
        headers=headers, params={"max_tokens": max_tokens, **params})
    return send_request(request).build_reply()


def stream(messages: Messages, *, endpoint: str = "chat",
           model: str | None = None, system: Messages | None = None,
           api_key: str | None = None, base_url: str | None = None,
           timeout: float | None = None, max_retries: int = 2,
           headers: Mapping[str, str] | None = None,
           **params: Any) -> Stream:
    """Send one request and return the answer as a ``Stream`` of text pieces.

        with serv.stream("Hello!", system="Be brief.") as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)

    ``endpoint`` is ``"chat"`` or ``"messages"``; the latter requires
    ``max_tokens``.  The stream is open when this returns: a refused request
    raises here.  From then on nothing is retried.  ``timeout`` covers the
    whole stream, including the time that the caller spends between pieces.

    The stream ends without an error only if the server says that the answer
    is whole: in chat by ``[DONE]``, or by a finish_reason for every choice;
    in Messages by a stop_reason, or ``message_stop``.  Some servers say so
    with ``[DONE]`` although they have cut the answer.  Then there is no
    reason: ``reply.stop_reason`` is ``None``.

    After a reason, the stream waits for the token counts.  So if a server
    sends no ``[DONE]`` or ``message_stop`` and leaves the connection open, a
    loop over the stream ends only at ``timeout`` (without an error).  The
    rest, and every exception, is as for ``chat()``.
    """
    request = build_request(
        endpoint, messages, streaming=True, model=model, system=system,
        api_key=api_key, base_url=base_url, timeout=timeout,
        max_retries=max_retries, headers=headers, params=params)
    return Stream(send_request(request))


# ---------------------------------------------------------------------------
# Reply, ToolCall and Stream: what the calls return.
# ---------------------------------------------------------------------------

# Why an answer stopped, in the words of many vendors, in any case and with
# anything around them.  Each pattern is searched in the stop reason.
BLOCKED = re.compile(r"""
    filter              # content_filter, content_filter: RECITATION
  | refus               # refusal (Claude)
  | safety | recitation | prohibited | block            # Gemini
  | spii                # Gemini: sensitive personal information
  | sensitive           # GLM
  | guardrail           # Bedrock: guardrail_intervened
  | toxic               # Cohere: ERROR_TOXIC
    # does not match: stop, end_turn, tool_calls, max_tokens, pause_turn
    """, re.VERBOSE | re.IGNORECASE)
TRUNCATED = re.compile(r"""
    length              # length (OpenAI), model_length (Mistral)
  | max_tokens | max_output_tokens      # Claude; Gemini: MAX_TOKENS
  | context_window      # model_context_window_exceeded (Claude)
    # does not match: stop, end_turn, content_filter
    """, re.VERBOSE | re.IGNORECASE)
FAILED = re.compile(r"""
    error(?!_toxic)     # error (OpenRouter), network_error (GLM)
  | insufficient_system_resource    # DeepSeek
    # does not match: stop, length, content_filter, ERROR_TOXIC
    """, re.VERBOSE | re.IGNORECASE)

# The names under which vendors send reasoning: as text, or as a list of
# entries (OpenRouter, MiniMax; LiteLLM), which have the texts of ENTRY_TEXTS.
REASONING_TEXTS = ("thinking", "reasoning_content", "reasoning")
REASONING_LISTS = ("reasoning_details", "thinking_blocks")
ENTRY_TEXTS = ("text", "thinking", "summary")


# A typing.NamedTuple would be shorter, but typing is slow to import.
class ToolCall(collections.namedtuple("ToolCall", "id name arguments")):
    """A call that the model asks for.

    What ``arguments`` is; the first row that fits:

    ==================================================  =============
    the stream is incomplete, or was cut                a ``str``
    there are arguments, and they are a JSON object     a ``dict``
    they are another text, also ``""``                  a ``str``
    there are none, and the answer has no stop reason,
    or the token limit or a filter ended it             ``""``
    there are none                                      ``{}``
    ==================================================  =============
    """

    __slots__ = ()
    # For type checkers; namedtuple() has made the fields.
    id: str | None
    name: str
    arguments: JSONDict | str


class Reply(dict):  # type: ignore[type-arg]
    """The service's JSON answer, whole and untouched, with views on top.

    The views are the same for both formats.  ``print(reply)`` shows the
    text.  ``headers`` are the answer's headers (case-insensitive),
    ``elapsed`` the seconds from the call to the last byte, ``retries`` how
    many tries had failed before.  ``partial`` is true for what has arrived
    of a stream that has not ended well.

    For a test of your own: ``serv.Reply({"choices": [...]})``.
    """

    def __init__(self, data: Mapping[str, JSON] | Iterable[tuple[str, JSON]]
                 = (), headers: Headers | None = None, elapsed: float = 0.0,
                 partial: bool = False, retries: int = 0,
                 choice_count: int = 1) -> None:
        super().__init__(data)
        self.headers: Headers = headers or http.client.HTTPMessage()
        self.elapsed = elapsed
        self.partial = partial
        self.retries = retries
        self._choice_count = choice_count   # how many were asked for

    def __str__(self) -> str:
        return self.text

    # Python calls this for missing names only; the message is better than its
    # own.  Type checkers must not see it: they would accept any name.
    if not TYPE_CHECKING:
        def __getattr__(self, name):
            raise AttributeError(
                f"a Reply has no attribute {name!r}: it is a dict, as in "
                "reply['usage'], with attributes such as reply.text")

    @property
    def message(self) -> JSONDict:
        """The assistant entry to append to ``messages`` for the next turn."""
        if "choices" not in self:       # the Messages format
            return {"role": "assistant", "content": self.get("content") or ""}
        entries = [get_dict(choice, "message")
                   for choice in get_dicts(self, "choices")]
        if not entries or not entries[0]:
            # The answer is the first choice, even if it is empty.
            return {"role": "assistant", "content": ""}
        first = entries[0]
        if not first.get("role"):
            first = {**first, "role": "assistant"}
        if self._choice_count > 1:
            return first
        # Only one was asked for.  But some gateways split the answer: the text
        # is in the first choice, the calls in the next.
        for entry in entries[1:]:
            if entry.get("tool_calls") and not first.get("tool_calls"):
                return {**first, "tool_calls": entry["tool_calls"]}
        return first

    @property
    def text(self) -> str:
        """The answer's text; ``""`` if there is none."""
        return find_text(self.message.get("content"))

    @property
    def thinking(self) -> str:
        """The reasoning text; ``""`` if there is none."""
        message = self.message
        # Chat has it beside the content, Messages in blocks of the content.
        # In content, Databricks has {"type": "reasoning", "summary": [...]}.
        texts = [find_first_text(part, (*REASONING_TEXTS, "summary"))
                 for part in [message, *get_dicts(message, "content")]]
        if any(texts):
            return "".join(texts)
        for name in REASONING_LISTS:
            texts = [find_first_text(entry, ENTRY_TEXTS)
                     for entry in get_dicts(message, name)]
            if any(texts):
                break
        return "".join(texts)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that the caller is to run; ``[]`` if there are none.

        Messages: the ``tool_use`` blocks; ``server_tool_use`` has been run.
        A call without a name is left out: nobody could run it.
        """
        calls = []
        for call in get_dicts(self.message, "tool_calls"):
            function = find_function(call)
            # A custom tool has an input instead.
            sent = function.get("arguments", function.get("input"))
            calls.append((get_str(call, "id"), function.get("name"), sent))
        for block in get_dicts(self.message, "content"):
            if block.get("type") == "tool_use":
                sent = block.get("input") or {}
                calls.append((get_str(block, "id"), block.get("name"), sent))
        may_be_cut = (self.stop_reason is None or self.truncated
                      or self.refusal is not None)
        return [ToolCall(id, name,
                         parse_arguments(sent, self.partial, may_be_cut))
                for id, name, sent in calls if name and isinstance(name, str)]

    @property
    def stop_reason(self) -> str | None:
        """``finish_reason`` or ``stop_reason``, as sent, or ``None``."""
        choices = get_dicts(self, "choices")
        if choices:
            return get_str(choices[0], "finish_reason")
        return get_str(self, "stop_reason")

    @property
    def refusal(self) -> str | None:
        """Why there is no real answer; ``None`` for an answer.

        The refusal's own text, if there is one, else the stop reason.
        """
        texts = []
        for part in [self.message, *get_dicts(self.message, "content")]:
            texts.append(find_text(part.get("refusal")))
        refusal = "".join(texts)
        if refusal:
            return refusal
        reason = self.stop_reason
        if reason and BLOCKED.search(reason):
            details = get_dict(self, "stop_details")
            return get_str(details, "explanation") or reason
        return None

    @property
    def truncated(self) -> bool:
        """True if the token limit cut the answer off."""
        return bool(TRUNCATED.search(self.stop_reason or ""))

    @property
    def usage(self) -> JSONDict:
        """The token counts, as sent; ``{}`` if there are none."""
        # In a stream, Groq has them in x_groq, Moonshot in the choice.
        places = [self, get_dict(self, "x_groq"), *get_dicts(self, "choices")]
        for place in places:
            if get_dict(place, "usage"):
                return get_dict(place, "usage")
        return {}

    @property
    def request_id(self) -> str | None:
        """The request id of the answer, or ``None``; quote it to support."""
        return find_request_id(self.headers)


class Stream:
    """An answer while it arrives: an iterator of its text pieces.

    There is one pass: a second loop continues where the first stopped.
    A stream is for one thread at a time; only ``close()`` may come from
    another.  ``with`` closes it, and so does the garbage collector.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._events = answer.take_events()
        # What ends it        its state   its connection
        # its proven end      "ended"     is kept for the next call
        # a failure: _error   "failed"    is closed
        # close()             "closed"    is closed; during a step, by the step
        self._state = "open"
        self._error: ServError | None = None
        self._is_reading = False
        # Held only while the state changes: a child that is forked meanwhile
        # would inherit it locked.  It is reentrant, because a signal handler
        # may call close() at any time.
        self._lock = threading.RLock()

    def __iter__(self) -> Stream:
        return self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Nobody refers to it any more, so that nobody reads or closes it.
        if self._state == "open":
            self._answer.connection.discard()

    def __next__(self) -> str:
        """Return the next piece of text; raise as ``events()`` does."""
        while True:
            step = self._advance()
            if step is None:
                raise StopIteration
            _, text = step
            if text:
                return text

    def events(self) -> Iterator[JSONDict]:
        """Yield every decoded event: chat chunks, or Messages events.

        :raise APIConnectionError: the stream was cut; or
            ``APITimeoutError``: the time budget ran out.
        :raise APIStatusError: the server sent an error event.
        :raise APIResponseError: an event is broken, or too large.
            Each holds in ``reply`` what had arrived.
        :raise ValueError: this stream is being read already: by another
            thread, or by the step that a signal handler has interrupted.
        """
        while True:
            step = self._advance()
            if step is None:
                return
            event, _ = step
            # The caller may change its event; the reply must not change.
            yield copy.deepcopy(event)

    @property
    def reply(self) -> Reply:
        """What has arrived so far, in the shape of a whole answer."""
        if self._error is not None and self._error.reply is not None:
            return self._error.reply    # of which the key has been removed
        return self._answer.build_reply()

    def close(self) -> None:
        """End the stream early; what had arrived stays in ``reply``.

        If another thread waits for a piece, its wait ends at once, and its
        loop ends without an error.
        """
        with self._lock:
            if self._state != "open":
                return
            self._state = "closed"
        # During a step, the connection is in use.  So close() only ends the
        # wait, and the step closes the connection when it ends.
        #
        # Neither misses the other.  A step sets _is_reading first and reads
        # _state last; close() has set _state, and now reads _is_reading.  So
        # whatever their order, at least one of them sees the other, and
        # closes.  (To close again does nothing.)
        if self._is_reading:
            self._answer.connection.end_wait()
        else:
            self._answer.connection.discard()

    def _advance(self) -> tuple[JSONDict, str] | None:
        """Return the next event, and the text that it adds; None at the end.

        :raise ServError: see events().
        """
        # This finds misuse, though not always: another thread may come between
        # the two lines.
        if self._is_reading:
            raise ValueError("this stream is being read already")
        try:
            self._is_reading = True
            if self._state == "open":
                step = self._read()
                if step is not None:
                    return step
        finally:
            self._is_reading = False
            if self._state == "closed":     # close() came during this step
                self._answer.connection.discard()
        if self._error is not None:
            # Each further step raises it again: an end would look as if the
            # answer were whole.
            raise copy_error(self._error)
        return None

    def _read(self) -> tuple[JSONDict, str] | None:
        """Return the next event and its text; None if the stream has ended.

        An error of the call (see CALL_FAILURES, in Network) ends it, too:
        _advance() raises it.
        """
        try:
            step = next(self._events, None)
            if step is not None:
                return step
            if not self._answer.is_whole():
                raise APIConnectionError("the answer was cut")
            self._end("ended")
        except CALL_FAILURES as exc:
            self._end("failed", exc)
        except BaseException:
            # Ctrl-C, or what a signal handler of the caller raised.
            self._end("failed", APIConnectionError("reading was interrupted"))
            raise
        return None

    def _end(self, state: str, exc: Exception | None = None) -> None:
        """End the stream, unless close() was faster.

        The connection is closed after an error; else the next call gets it.
        """
        error = None
        if exc is not None:
            error = self._answer.explain(exc)
            error.reply = self._answer.build_partial_reply()
        with self._lock:
            if self._state != "open":
                return
            self._error = error
            self._state = state
        if error is None:
            self._answer.connection.keep()
        else:
            self._answer.connection.discard()


# ---------------------------------------------------------------------------
# Building requests.  No I/O except reading the SERV_ variables, at each call.
# Everything is checked before anything is sent.  No message shows a value
# that may be secret: a key, a header, a URL with a password.
# ---------------------------------------------------------------------------

class Request:
    """A request that is ready to be sent, and how to send it."""

    def __init__(self, endpoint: str, address: Address, body: bytes,
                 headers: dict[str, str], secret: str, timeout: float,
                 max_retries: int, streaming: bool,
                 choice_count: int) -> None:
        self.endpoint = endpoint
        self.address = address
        self.url = address.url + PATHS[endpoint]
        self.target = urllib.parse.urlsplit(self.url).path
        self.body = body
        self.headers = headers
        self.secret = secret            # the key; to be removed from errors
        self.timeout = timeout          # seconds
        self.max_retries = max_retries
        self.streaming = streaming
        self.choice_count = choice_count    # how many were asked for


class Address(collections.namedtuple("Address", "url tls host port")):
    """Where a base URL leads; ``url`` has no ``/v1`` and no slash at its end.

    ``tls`` says whether TLS is used.
    """

    __slots__ = ()
    url: str
    tls: bool
    host: str
    port: int


def build_request(endpoint: str, messages: Messages, *,
                  streaming: bool = False, model: str | None = None,
                  system: Messages | None = None, api_key: str | None = None,
                  base_url: str | None = None, timeout: float | None = None,
                  max_retries: int = 2,
                  headers: Mapping[str, str] | None = None,
                  params: Mapping[str, JSON] | None = None) -> Request:
    """Check everything and return the request; raise what chat() raises."""
    params = params or {}
    if endpoint not in PATHS:
        raise ValueError('endpoint: expected "chat" or "messages"')
    if type(max_retries) is not int or max_retries < 0:
        raise ValueError("max_retries: expected 0, 1, 2, ...")
    body = build_body(endpoint, streaming, messages, model, system, params)
    if not isinstance(base_url, (str, type(None))):
        raise TypeError("base_url: expected a str")
    address = build_url(base_url or os.environ.get("SERV_BASE_URL")
                        or BASE_URL)
    seconds = build_timeout(timeout)
    # How many choices are asked for, in chat: a stream that brings fewer was
    # cut.  (The server refuses a wrong n.)
    choice_count = params.get("n")
    if type(choice_count) is not int or choice_count < 1:
        choice_count = 1
    own_headers = build_headers(headers)    # Named-Like-This
    # The environment's key is read last: if a check above raises, a traceback
    # that records local variables does not hold it yet.
    authorization = own_headers.get("Authorization")
    if authorization is None:
        secret = build_key(api_key)
        authorization = "Bearer " + secret
    else:
        # "Bearer sk-...": what is to be hidden is the last word.
        words = authorization.split()
        secret = words[-1] if words else ""
    accept = "text/event-stream" if streaming else "application/json"
    all_headers = {
        "Host": build_host(address), "Authorization": authorization,
        "User-Agent": USER_AGENT, "Accept": accept,
        "Content-Type": "application/json", "Accept-Encoding": "identity",
        **own_headers}
    return Request(endpoint, address, body, all_headers, secret, seconds,
                   max_retries, streaming, choice_count)


def build_body(endpoint: str, streaming: bool, messages: Messages,
               model: str | None, system: Messages | None,
               params: Mapping[str, JSON]) -> bytes:
    """Return the JSON body; it holds nothing that was not asked for."""
    check_params(endpoint, streaming, params)
    check_messages("messages", messages)
    if system is not None:
        check_messages("system", system)
        # An error in it names it.  (Later, in chat, it is a part of messages.)
        encode("system", system)
    model = model or os.environ.get("SERV_MODEL")
    if not model:
        raise ValueError("model: pass model=... or set SERV_MODEL")
    if not isinstance(model, str):
        raise TypeError("model: expected a str")
    entries: list[Mapping[str, JSON]] = (
        [{"role": "user", "content": messages}]
        if isinstance(messages, str) else list(messages))
    body: JSONDict = {"model": model, "messages": entries}
    if endpoint == "messages":
        if not has_prompt(system):
            raise ValueError("a system prompt is required: pass system=... "
                             "(a system entry in messages does not count)")
        body["system"] = system
    else:
        if system:
            entries.insert(0, {"role": "system", "content": system})
        if not any(has_prompt(entry.get("content")) for entry in entries
                   if entry.get("role") in ("system", "developer")):
            raise ValueError("a system prompt is required: pass system=...")
    body.update(params)
    if streaming:
        body["stream"] = True
    return build_json(body)


def check_params(endpoint: str, streaming: bool,
                 params: Mapping[str, JSON]) -> None:
    """Refuse what is not a parameter of the request, and say what to do."""
    if endpoint == "messages" and params.get("max_tokens") is None:
        raise TypeError("max_tokens: the Messages endpoint requires it")
    wants_stream = params.get("stream")
    if wants_stream is not None and bool(wants_stream) != streaming:
        raise ValueError("stream: call stream() for a stream, and only then")
    instead = {
        "extra_headers": "pass headers={...} instead",
        "extra_body": "pass its entries as parameters instead, **{...}",
        "extra_query": "the service takes no query; leave it out"}
    for name in instead:
        if name in params:
            raise TypeError(f"{name}: {instead[name]}")


def check_messages(name: str, value: JSON) -> None:
    """Refuse what is neither a str nor a list of dicts."""
    if isinstance(value, str):
        return
    is_list = isinstance(value, (list, tuple))
    if is_list and any(isinstance(entry, Reply) for entry in value):
        raise TypeError(f"{name}: append reply.message, not the reply itself")
    if not is_list or not all(isinstance(entry, dict) for entry in value):
        raise TypeError(f"{name}: expected a str or a list of dicts (for an "
                        "object of an SDK, its .model_dump())")


def has_prompt(content: JSON) -> bool:
    """Whether there is a prompt: any part that is not blank text."""
    parts = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        if isinstance(part, dict):
            part = part.get("text", part)
        if isinstance(part, str):
            part = part.strip()
        if part:
            return True
    return False


# One encoder for all requests: making one takes as long as a small encoding.
_encoder = json.JSONEncoder(allow_nan=False)


def build_json(body: JSONDict) -> bytes:
    """Return the JSON of a body."""
    members = [f"{_encoder.encode(name)}: {encode(name, value)}"
               for name, value in body.items()]
    return ("{" + ", ".join(members) + "}").encode()


def encode(name: str, value: JSON) -> str:
    """Return the JSON of a parameter; an error names the parameter."""
    try:
        return _encoder.encode(value)
    except TypeError as exc:    # it names the type, not the value
        raise TypeError(f"{name}: JSON cannot represent it: {exc}")
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{name}: JSON cannot represent it: {exc}")


@functools.lru_cache(maxsize=32)
def build_url(text: str) -> Address:
    """Return where a base URL leads.

    "https://api.test/v1/" leads to the URL "https://api.test", the host
    "api.test" and port 443; "http://[::1]:8080/proxy" to the URL as it is, the
    host "::1" and port 8080.

    :raise ValueError: it is not ``http[s]://host[:port][/path]``.
    """
    wrong = ("base_url (or SERV_BASE_URL): expected http[s]://host[:port]"
             "[/path], without a login, a query or a fragment")
    text = text.strip()
    if not text.lower().startswith(("http://", "https://")):
        raise ValueError("base_url (or SERV_BASE_URL) lacks http:// or "
                         "https:// at its beginning")
    # urlsplit() drops tabs and line breaks, and accepts "http://a b",
    # "http://user:password@host" and others of these characters.
    if not text.isprintable() or any(char in text for char in " \\?#@"):
        raise ValueError(wrong)
    host, port = parse_host(text)
    if not host:
        raise ValueError(wrong)
    parts = urllib.parse.urlsplit(text)
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        path = path[:-len("/v1")].rstrip("/")
    netloc = f"[{host}]" if ":" in host else host
    if port is not None:
        netloc = f"{netloc}:{port}"
    url = f"{parts.scheme}://{netloc}{path}"
    if not url.isascii():
        raise ValueError(wrong)
    tls = parts.scheme == "https"
    return Address(url, tls, host, port or (443 if tls else 80))


def parse_host(url: str) -> tuple[str, int | None]:
    """Return the host of a URL, in ASCII, and its port, if it names one.

    If they are wrong, the host is "".  No error is raised: one of urlsplit()
    may quote the URL, with a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        # RFC 3490: "b\u00fccher.test" is "xn--bcher-kva.test" on the wire.
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port
    except ValueError:      # also a UnicodeError
        return "", None
    # Before 3.11, urlsplit() accepts a name in brackets, http://[host], and
    # the ports "+1", "0_1", and some of Arabic digits.
    netloc = parts.netloc.rpartition("@")[2]    # without a login
    if "[" in netloc and ":" not in host:
        return "", None
    # Of "host:80" and "[::1]:80", "80".
    digits = netloc.rpartition("]")[2].partition(":")[2]
    if digits and not re.fullmatch("[0-9]+", digits):
        return "", None
    if port == 0:
        return "", None
    return host, port


def build_host(address: Address) -> str:
    """Return the Host header: without the default port, and without the
    zone of a link-local address, as in "fe80::1%eth0".
    """
    host = address.host.partition("%")[0]
    if ":" in host:
        host = f"[{host}]"
    default = 443 if address.tls else 80
    return host if address.port == default else f"{host}:{address.port}"


def build_key(api_key: str | None) -> str:
    """Return the key without white space around it; never show it."""
    key = api_key or os.environ.get("SERV_API_KEY") or ""
    if not isinstance(key, str):
        raise TypeError("api_key: expected a str")
    key = key.strip()
    if not key:
        raise ServError("no API key: set SERV_API_KEY, or in Python pass "
                        "api_key=... (keys: https://docs.openserv.ai)")
    if not key.isascii() or not key.isprintable():
        raise ServError("the API key is not printable ASCII; has it a line "
                        "break, or is it still a placeholder?")
    return key


def build_timeout(timeout: JSON) -> float:
    """Return the seconds of the argument, the variable or the default."""
    value = timeout
    if value is None or value == "":
        value = os.environ.get("SERV_TIMEOUT") or TIMEOUT
    try:
        # float() also accepts True and "1_0".
        if isinstance(value, bool) or "_" in str(value):
            raise ValueError
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = 0.0       # which is refused below
    if not 0 < seconds <= MAX_TIMEOUT:  # this refuses "nan", too
        raise ValueError("timeout (or SERV_TIMEOUT): expected seconds, above "
                         f"0 and at most {MAX_TIMEOUT:.0f}")
    return seconds


# https://www.rfc-editor.org/rfc/rfc9110#section-5: a name is a token; a
# value holds no control character except the tab.
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")


def build_headers(headers: JSON) -> dict[str, str]:
    """Return the caller's headers, Named-Like-This.

    All but three may be set, and replace ours.  A name may be a misplaced
    key: a message shows it only if it is nothing but letters and hyphens.
    """
    if not headers:
        return {}
    if not hasattr(headers, "items"):
        raise TypeError("headers: expected a dict of str names and values")
    checked = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("headers: expected a dict of str names and values")
        if name.title() in ("Content-Length", "Transfer-Encoding", "Host"):
            raise ValueError(f"headers: {name.title()} cannot be set; it "
                             "follows from the request")
        if not HEADER_NAME.fullmatch(name):
            raise ValueError("headers: a name has a space, a colon or the "
                             "like; it is not shown, as it may hold a secret")
        if not HEADER_VALUE.fullmatch(value):
            shown = "a header"
            if re.fullmatch("[A-Za-z-]+", name):
                shown = name
            raise ValueError(f"headers: the value of {shown} cannot be sent: "
                             "it has a line break, or is not latin-1")
        checked[name.title()] = value
    return checked


# ---------------------------------------------------------------------------
# Reading answers.  No I/O: JSON, text and headers in; values, or an
# exception, out.  A field of an unexpected type counts as absent, so that no
# answer, however odd, ends in a TypeError or a KeyError.
# ---------------------------------------------------------------------------

# Some servers send raw control characters in JSON strings: not strict.
_decoder = json.JSONDecoder(strict=False)


def parse_json(text: str) -> JSON:
    """Return the value of a JSON text.

    :raise ValueError: it is not JSON, or is nested deeper than MAX_DEPTH.
    """
    brackets = text.count("[") + text.count("{")
    if brackets > MAX_DEPTH and is_too_deep(text):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    text = text.strip(" \t\r\n")
    try:
        value, end = _decoder.raw_decode(text)
        if end == len(text):
            return value
        reason = "text after its end"
    except json.JSONDecodeError as exc:
        reason = exc.msg
    except ValueError:      # int() refuses 4,300 digits
        reason = "a number is too long"
    # Raised here, not above: the decoder's error would become the context of
    # this one, and it holds the text, with whatever is in it.
    raise ValueError(f"not JSON: {reason}")


def is_too_deep(text: str) -> bool:
    """Whether a JSON text is nested deeper than MAX_DEPTH.

    This is looked at before decoding, which recurses.
    """
    nesting = Nesting()
    nesting.add(text)
    return nesting.deepest > MAX_DEPTH


class Nesting:
    """How deep a JSON text is nested.

    It may come in pieces: those of a tool's arguments do, see
    ChatCall.has_whole_arguments().
    """

    def __init__(self) -> None:
        self.depth = 0              # at the end of what has come
        self.deepest = 0
        self.in_string = False
        self.after_backslash = False

    def add(self, piece: str) -> None:
        """Add a piece."""
        for char in piece:
            if self.after_backslash:
                self.after_backslash = False
            elif self.in_string:
                if char == '"':
                    self.in_string = False
                elif char == "\\":
                    self.after_backslash = True
            elif char == '"':
                self.in_string = True
            elif char in "[{":
                self.depth += 1
                if self.depth > self.deepest:
                    self.deepest = self.depth
            elif char in "]}":
                self.depth -= 1

    def is_closed(self) -> bool:
        """Whether there were brackets, and all are closed."""
        return self.deepest > 0 and self.depth == 0


def parse_arguments(value: JSON, partial: bool,
                    may_be_cut: bool = False) -> JSON:
    """Return a tool's arguments, which are JSON text or decoded JSON.

    ===================  ===================================
    the arguments        returned
    ===================  ===================================
    '{"a": 1}'           {"a": 1}
    {"a": 1}             {"a": 1}
    '[1]', '{"a', ''     the same text
    [1]                  '[1]'
    None, {}, []         {}; but '' if the answer may be cut
    ===================  ===================================

    If they are partial, they are returned as text, whatever they are.
    """
    if partial:
        if isinstance(value, str):
            return value
        return json.dumps(value) if value else ""
    if may_be_cut and not value:
        return ""       # nobody knows whether some were still to come
    if isinstance(value, str):
        try:
            decoded = parse_json(value)
        except ValueError:
            return value
        if not isinstance(decoded, dict):
            return value
        value = decoded
    if not value:
        return {}
    if not isinstance(value, dict):
        return json.dumps(value)
    # Escapes in it may stand for halves of characters: see clean_text().
    return map_text(value, clean_text)


def decode_body(data: bytes) -> str:
    """Return the text of a body, without its byte order mark."""
    return data.decode("utf-8", "replace").lstrip("\ufeff")


def get_dict(data: JSON, name: str) -> JSONDict:
    """Return a field that is a dict, else {}."""
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}


def get_dicts(data: JSON, name: str) -> list[JSONDict]:
    """Return the dicts in a field that is a list, else []."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, list):
        return []
    return [entry for entry in value if isinstance(entry, dict)]


def get_str(data: JSON, name: str) -> str | None:
    """Return a field that is a str with something in it, else None."""
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) and value else None


def find_text(content: JSON) -> str:
    """Return the text of a str, or of a list of parts or blocks."""
    return clean_text(find_raw_text(content))


def find_raw_text(content: JSON) -> str:
    """Do what find_text() does, but leave halves of characters in it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(part["text"] for part in content if is_text_part(part))


def find_first_text(data: JSONDict, names: tuple[str, ...]) -> str:
    """Return the text of the first field that has one, else ""."""
    for name in names:
        text = find_text(data.get(name))
        if text:
            return text
    return ""


def is_text_part(part: JSON) -> bool:
    """Whether an entry of a list is a part of a text."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return False
    return (part.get("type") or "text") in ("text", "output_text",
                                            "summary_text")


def clean_text(text: str) -> str:
    """Return text that can be encoded.

    JSON can hold halves of a character ("surrogates").  Two that belong
    together are joined; a half without its other becomes U+FFFD.
    """
    if text.isascii():
        return text
    # UTF-16 has halves: encoding keeps them; decoding joins "\ud83d\ude00" to
    # "\U0001f600", and replaces a half that is alone.
    return text.encode("utf-16-le", "surrogatepass").decode(
        "utf-16-le", "replace")


def find_request_id(headers: Headers) -> str | None:
    """Return the request id of an answer: SERV's own name for it first."""
    for name in ("x-openserv-request-id", "x-request-id", "request-id"):
        if headers.get(name):
            return str(headers[name])
    return None


# https://docs.anthropic.com/en/api/errors, and what OpenAI's servers send.
STATUS_OF_TYPE = {
    "invalid_request_error": 400, "authentication_error": 401,
    "billing_error": 402, "permission_error": 403, "not_found_error": 404,
    "request_too_large": 413, "rate_limit_error": 429,
    "insufficient_quota": 429, "rate_limit_exceeded": 429,
    "api_error": 500, "server_error": 500,
    "timeout_error": 504, "overloaded_error": 529}


def find_error(answer: JSON, event_name: str = "") -> JSON:
    """Return the error in a decoded answer or event; None if it is none.

    The first row that fits:

    ===  =========================================  ===========  ==========
    row  the answer                                 the error    sent by
    ===  =========================================  ===========  ==========
    1    [{"error": E}]                             E            Gemini
    2    text, in an event named "error"            the text
    3    {"choices": [...], "error": {"code": 0}}   not this: it is empty
    4    {"error": E}                               E            most
         {"error": true}                            the answer   Nitro
    5    any, in an event named "error"             the answer
         {"object": "error"} or {"type": "error"}   the answer   vLLM
    6    neither choices nor content                see find_bare_error()
    7    {"choices": [{"error": E}]}                E            OpenRouter
    8    {"choices": [{"finish_reason": "error"}]}  a message    see FAILED
    ===  =========================================  ===========  ==========
    """
    if isinstance(answer, list) and answer:                     # 1
        return find_error(answer[0], event_name)
    if not isinstance(answer, dict):                            # 2
        return answer if event_name == "error" else None
    error, choices = answer.get("error"), answer.get("choices")
    has_answer = choices is not None or answer.get("content") is not None
    if has_answer and isinstance(error, dict):                  # 3
        if not any(error.values()):
            error = None
    if error:                                                   # 4
        return answer if error is True else error
    if "error" in (event_name, answer.get("type"), answer.get("object")):
        return answer                                           # 5
    if not has_answer:                                          # 6
        return find_bare_error(answer)
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        if choice.get("error"):                                 # 7
            return choice["error"]
        reason = choice.get("finish_reason")
        if reason and FAILED.search(str(reason)):               # 8
            return {"message": f"the answer ended with {reason}"}
    return None


def find_bare_error(answer: JSONDict) -> JSON:
    """Return an error that stands where an answer should be, or None.

    The first row that fits:

    ===  ==========================================  ==========  ==========
    row  the answer                                  the error   sent by
    ===  ==========================================  ==========  ==========
    1    {"base_resp": {"status_code": 1002}}        base_resp   MiniMax
    2    {"type": "ping", "message": "Hi"}           none
    3    {"errors": E}                               E           Cloudflare
    4    {"code": 0, "message": "Hi"}                none
         {"success": true, "message": "Hi"}          none
    5    {"object": "chat.status", "message": "Hi"}  none
    6    {"message": "No."}                          the answer  DashScope
         {"detail": "No."}                           the answer  FastAPI
    7    {"id": "x"}, {"message": {}}                none
    ===  ==========================================  ==========  ==========

    Rows 4 and 5 do not count beside a type such as "rate_limit_error".
    """
    if "base_resp" in answer:                                   # 1
        response = get_dict(answer, "base_resp")
        if response.get("status_code"):     # 0 is a success
            return response
    type_name = get_str(answer, "type")
    if type_name is not None and not is_error_type(type_name):  # 2
        return None
    errors, code = answer.get("errors"), answer.get("code")
    if errors and isinstance(errors, (str, list)):              # 3
        return errors
    if type_name is None:
        if code == 0 or answer.get("success") is True:          # 4
            return None
        if get_str(answer, "object") and not code:              # 5
            return None
    text = answer.get("message") or answer.get("detail")
    if text and isinstance(text, (str, list)):                  # 6
        return answer
    return None                                                 # 7


def is_error_type(name: str) -> bool:
    """Whether a type is one of errors, such as "rate_limit_error"."""
    return name in STATUS_OF_TYPE or name.lower().endswith("error")


def parse_error(body: JSON) -> JSONDict:
    """Return ``type``, ``code``, ``param`` and ``message`` of an error.

    The body is decoded JSON, or text (a proxy's HTML).
    """
    error = find_error(body)
    if error is None:
        error = body
    if isinstance(error, list) and error:   # [{"message": "No."}]
        error = error[0]
    # FastAPI, as {"detail": {"message": "No.", "code": "x"}}
    detail = get_dict(error, "detail")
    if detail and error.keys().isdisjoint(("message", "type", "code")):
        fields = parse_error(detail)
        if fields["message"]:
            return fields
    # In {"error": "No.", "code": 404}, the code stands beside the error.
    place = error if isinstance(error, dict) else body
    code = place.get("code") if isinstance(place, dict) else None
    message = find_message(error, body) or ""
    if not isinstance(message, str):
        message = json.dumps(message)
    return {"type": get_str(error, "type"),
            "code": code if isinstance(code, (str, int)) else None,
            "param": get_str(error, "param"), "message": message}


def find_message(error: JSON, body: JSON) -> JSON:
    """Return the message of an error, which a body holds.

    ===========================================  ===============
    the body                                     the message
    ===========================================  ===============
    {"error": {"message": "No."}}                No.
    {"detail": "No."}, {"msg": "No."}            No.
    {"error": "No."}                             No.
    {"error": "Bad Request", "message": "No."}   Bad Request: No.
    {"error": "x", "error_description": "No."}   x: No.
    {"title": "No."}: no field that we know      {"title": "No."}
    {"error": {"type": "t"}}                     none
    ===========================================  ===============
    """
    if isinstance(error, dict):
        for name in ("message", "detail", "msg", "status_msg"):
            if error.get(name):
                return error[name]
        if "type" in error or "error" in error:
            return None
    beside = get_str(body, "message") or get_str(body, "error_description")
    if isinstance(error, str) and beside and beside != error:
        return f"{error}: {beside}"
    return error


def is_answer(answer: JSON, endpoint: str) -> bool:
    """Whether decoded JSON is an answer of an endpoint."""
    if endpoint == "chat":
        choices = answer.get("choices") if isinstance(answer, dict) else None
        return isinstance(choices, list) and len(choices) > 0
    if not isinstance(answer, dict) or "content" not in answer:
        return False
    return answer["content"] is None or isinstance(answer["content"], list)


def find_status(fields: JSONDict) -> int | None:
    """Return the status that an error's type, or its code, stands for."""
    for name in ("type", "code"):
        if fields[name] in STATUS_OF_TYPE:
            return STATUS_OF_TYPE[fields[name]]
    if re.fullmatch("[45][0-9][0-9]", str(fields["code"])):
        return int(fields["code"])
    return None


ADVICE = {401: "Check the key.", 402: "Add credits.",
          403: "The key may not do this.",
          404: "Check the model and the URL.", 413: "Send less."}


def add_advice(status: int, fields: JSONDict,
               retry_after: float | None) -> str:
    """Return an error's message, and what the caller can do about it."""
    message: str = fields["message"] or "no message"
    advice = ADVICE.get(status)
    if "insufficient_quota" in (fields["type"], fields["code"]):
        advice = "Waiting does not help; get quota."
    elif retry_after:
        advice = f"Wait {retry_after:g} s."
    elif 500 <= status < 600:
        advice = "Try again later."
    if not advice:
        return message
    end = "" if message.endswith((".", "!", "?")) else "."
    return f"{message}{end} {advice}"


STATUS_ERRORS: dict[int, type[APIStatusError]] = {
    400: BadRequestError, 401: AuthenticationError, 402: BillingError,
    403: PermissionDeniedError, 404: NotFoundError, 429: RateLimitError}


def build_status_error(status: int, headers: Headers,
                       body: JSON) -> APIStatusError:
    """Return the error that an answer is, by its status or by its body."""
    fields = parse_error(body)
    status_is_guess = False
    what = fields["type"]
    if 200 <= status < 300:     # the error is in the body of a good answer
        named_status = find_status(fields)
        if named_status is None:
            status_is_guess = True
            what = f"error in a {status} answer"
        status = named_status or 500
    what = what or http.client.responses.get(status, "")
    retry_after = parse_retry_after(headers, time.time())
    if 300 <= status < 400:
        why = f"not following to {headers.get('location')}; set base_url"
    else:
        why = add_advice(status, fields, retry_after)
    kind: type[APIStatusError] = STATUS_ERRORS.get(status, APIStatusError)
    if 500 <= status < 600:
        kind = InternalServerError
    error = kind(f"{status} {what}: {why}")
    error.status = status
    error.type = fields["type"]
    error.code = fields["code"]
    error.param = fields["param"]
    error.message = fields["message"]
    error.body = body
    error.headers = headers
    error.retry_after = retry_after
    error._worth_a_retry = is_worth_a_retry(error, status_is_guess)
    return error


def is_worth_a_retry(error: APIStatusError, status_is_guess: bool) -> bool:
    """Whether an answer with an error may go better another time.

    If the status is only our guess, it is not tried again: a retry may be
    billed.
    """
    # https://github.com/openai/openai-python sends and reads this header.
    advice = str(error.headers.get("x-should-retry", "")).lower()
    if advice in ("true", "false"):
        return advice == "true"
    if status_is_guess or "insufficient_quota" in (error.type, error.code):
        return False
    return error.status in (408, 409, 429) or 500 <= error.status < 600


def parse_retry_after(headers: Headers, now: float) -> float | None:
    """Return the seconds that a server asks to wait, or None.

    ``retry-after-ms`` (OpenAI), else ``Retry-After``: seconds or a date,
    https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3.  A date is relative
    to ``now``, in seconds since the epoch.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = str(headers.get(name, "")).strip()
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
            return min(float(text) * unit, 1e9)     # sleep() takes no "inf"
    try:
        date = parsedate_tz(str(headers.get("retry-after", "")))
        seconds = mktime_tz(date) - now if date else -1.0
    except (TypeError, ValueError, OverflowError, IndexError):
        return None  # not a date; each Python raises its own
    return seconds if seconds >= 0 else None


def retry_wait(error: ServError, failed: int) -> float | None:
    """Return the seconds to wait before the next try; None for no more.

    ``failed`` is how many tries had failed before: 0 at the first error.
    The server may ask for any wait, but send_request() gives up if the time
    that is left does not allow it.

    What is worth a retry is set where the error is made:

    ==================  =================================================
    APIConnectionError  yes; but not for a refused certificate, a CA file
                        or TLS context that cannot be used, and a proxy
                        that wants a login
    APITimeoutError     no
    APIStatusError      see is_worth_a_retry()
    all others          no
    ==================  =================================================
    """
    if not error._worth_a_retry:
        return None
    if isinstance(error, APIStatusError) and error.retry_after is not None:
        return error.retry_after
    wait = min(8.0, 0.5 * 2.0 ** min(failed, 8))
    # Up to 25 % less, so that clients do not retry in step.
    return wait * (1 - random.random() / 4)


def shorten(text: str, limit: int = 400) -> str:
    """Return text as one line, cut short, and safe for a terminal."""
    line = "".join(char if char.isprintable() else " " for char in text[:1000])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[:limit] + "..."


# ---------------------------------------------------------------------------
# Server-sent events.  No I/O: bytes in, events out.
# https://html.spec.whatwg.org/multipage/server-sent-events.html
# ---------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
DONE: JSONDict = {"[DONE]": True}   # stands for [DONE]; it is compared with
                                    # "is", and the caller never gets it


class EventTooLarge(ValueError):
    """An event is larger than MAX_BODY bytes."""


def iter_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the ``(event, data)`` pairs of a stream of server-sent events.

    ``chunks`` are its bytes, split anywhere.  By the rules of
    https://html.spec.whatwg.org/multipage/server-sent-events.html
    #parsing-an-event-stream: an event ends with a blank line; one without a
    ``data`` line is dropped, and so is what is pending at the end.

    :raise ValueError: an event is larger than MAX_BODY bytes.
    """
    name = b""
    data: list[bytes] = []
    size = 0
    is_first = True
    for line in iter_lines(chunks):
        if is_first:
            is_first = False
            if line.startswith(BOM):
                line = line[len(BOM):]
        if not line:
            if data:
                yield (name.decode("utf-8", "replace") or "message",
                       b"\n".join(data).decode("utf-8", "replace"))
            name, data = b"", []
            size = 0
            continue
        size += len(line)
        if size > MAX_BODY:
            raise EventTooLarge(f"larger than {MAX_BODY} bytes")
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value


def iter_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream: they end with LF, CRLF or CR.

    A CR at the end of a chunk ends a line at once.  A line in pieces is joined
    only when its end is here, so that time stays linear.

    ===================================  ==========
    the chunks                           the lines
    ===================================  ==========
    b"a\\nb\\r\\n"                       b"a", b"b"
    b"a", b"b\\n"                        b"ab"
    b"a\\r", b"\\nb\\n"                  b"a", b"b"
    b"a\\n", b"b", of which no end came  b"a"
    ===================================  ==========
    """
    pieces: list[bytes] = []    # of a line whose end has not come
    size = 0                    # of these pieces
    after_cr = False            # the bytes so far end with CR
    for chunk in chunks:
        # The LF belongs to the CR before it, and ends no line.
        if after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            after_cr = False
        if not chunk:
            continue
        after_cr = chunk.endswith(b"\r")
        # Lines of bytes end at LF, CR and CRLF only; those of a str also at
        # U+2028 and others.
        lines = chunk.splitlines()
        rest = b""
        if not chunk.endswith((b"\n", b"\r")):
            rest = lines.pop()
        if lines and pieces:
            lines[0] = b"".join(pieces) + lines[0]
            pieces, size = [], 0
        yield from lines
        if rest:
            pieces.append(rest)
            size += len(rest)
            if size > MAX_BODY:
                raise EventTooLarge(f"larger than {MAX_BODY} bytes")


def parse_events(name: str, data: str) -> list[JSONDict]:
    """Return the decoded events of one SSE event; DONE stands for [DONE].

    That is one JSON object, as a rule; none for noise; and several where a
    server lost the blank line between them.  A Messages event that lacks
    its ``type`` gets it from the event's name.

    :raise APIResponseError: the data breaks the format.
    """
    events: list[JSONDict] = []
    for value in parse_data(name, data):
        if value is DONE:
            events.append(DONE)
        elif isinstance(value, dict):
            # By the WHATWG rules, an event without a name is a "message".
            # Those of chat have no type, and get none.
            lacks_type = "type" not in value and "choices" not in value
            if lacks_type and name != "message":
                value["type"] = name
            events.append(value)
        else:
            # [{"error": ...}], or a text in an event named "error".  What is
            # no error is noise, such as null.
            error = find_error(value, name)
            if error is not None:
                events.append({"error": error})
    return events


def parse_data(name: str, data: str) -> list[JSON]:
    """Return the JSON values in the data of one SSE event.

    The first row that fits:

    ==============================  =====================================
    the data                        the values
    ==============================  =====================================
    JSON                            one
    text in an event named "error"  the text
    JSON or [DONE] on each line     these; blank lines have been lost
    nothing                         none; it keeps the connection alive
    text, in an event of a vendor   none, unless the text begins with {
    any other text                  APIResponseError
    ==============================  =====================================

    An event is a vendor's if its name is none of the Messages format.
    """
    try:
        return [parse_json(data)]
    except ValueError as exc:
        reason = str(exc)
    if name == "error":
        return [data]
    try:
        return [DONE if line.strip() == "[DONE]" else parse_json(line)
                for line in data.split("\n") if line.strip()]
    except ValueError:
        pass
    # An event without a name is called "message".
    is_known = name == "message" or name.startswith(
        ("message_", "content_block_"))
    if not is_known and not data.lstrip().startswith("{"):
        return []
    raise APIResponseError(f"a broken event: {reason}: {data}")


def parse_stream_error(body: JSON) -> JSON:
    """Return the error in a body that is an event stream, else the body.

    The body came with an error's status, so its first event is the error,
    whatever its name.
    """
    if not isinstance(body, str):
        return body
    for _, data in iter_events([body.encode("utf-8", "replace")]):
        events = parse_events("error", data)
        if events:
            return events[0]
    return body


def read_beginning(chunks: Iterator[bytes]) -> bytes:
    """Read enough of a body for is_event_stream(); return what was read.

    iter_body() bounds how many blank lines may come.
    """
    head = b""
    for chunk in chunks:
        head = (head + chunk).lstrip()  # blank lines mean nothing here
        if head.startswith(BOM):
            head = head[len(BOM):].lstrip()
        if len(head) >= len(b"event:"):
            break
    return head


def is_event_stream(head: bytes, is_labelled: bool) -> bool:
    """Whether a body that begins so is an event stream.

    Gateways get the label, Content-Type, wrong both ways.  So it counts only
    for a body that is empty, or cut in its first word, such as b"da".
    """
    fields = (b":", b"data:", b"event:", b"id:", b"retry:")
    if head.startswith(fields):
        return True
    is_cut = any(field.startswith(head) for field in fields)
    return is_cut and is_labelled       # an empty one counts as cut, too


# ---------------------------------------------------------------------------
# Putting streams together.  No I/O: events in; text pieces, and in the end
# an answer as the call without streaming returns it, out.
#
# What proves a stream whole, by `whole` of each class:
#
#     chat         [DONE], or a finish_reason for every choice; in both cases
#                  there must be as many choices as the request asked for
#     Messages     a stop_reason; or message_stop, if message_start has come
#
# If content comes after a reason, the reason no longer counts: another one
# must come.  After [DONE] and message_stop, nothing is read.
#
# How the next piece of a field is added to what has come of it:
#
#     a text that comes in pieces, or a list      grow()
#     an object whose texts come in pieces        grow_object()
#     anything else                               put(): it is replaced, or
#                                                 merged if it is an object
#
# Where servers differ from the two references, a comment names one that does,
# and a table in test_serv.py has the bytes.
# ---------------------------------------------------------------------------

# The texts that come in pieces: of a message of chat; and of a function or
# custom tool, or spoken audio.  Those of an entry of a list are ENTRY_TEXTS.
MESSAGE_TEXTS = ("content", "refusal", *REASONING_TEXTS)
OBJECT_TEXTS = ("arguments", "input", "data", "transcript")


class GrowingText:
    """A text that comes in pieces.  They are joined when it is asked for."""

    def __init__(self, text: str) -> None:
        self.pieces = [text]

    def get(self) -> str:
        """Return the text so far."""
        return "".join(self.pieces)


class GrowingList:
    """A list whose entries come in pieces, as content parts do.

    1. A piece with an index belongs to the entry of its type and index:
       {"index": 0, "text": "He"} and {"index": 0, "text": "llo"} are one.
    2. Without an index, the first piece of an event continues the last entry,
       if that is a text and has its type and id: {"type": "text", "text":
       "He"} and, in the next event, {"type": "text", "text": "llo"} are one.
    3. Any other piece is a new entry: so two citations stay two.
    """

    def __init__(self) -> None:
        self.entries: list[JSON] = []
        self.by_key: dict[tuple[str, int], JSONDict] = {}

    def add(self, pieces: list[JSON]) -> None:
        """Add the pieces of one event."""
        for number, piece in enumerate(pieces):
            if not isinstance(piece, dict):
                self.entries.append(piece)
                continue
            entry = self.find_entry(piece, is_first=number == 0)
            for name, value in piece.items():
                if name in ENTRY_TEXTS or isinstance(value, list):
                    grow(entry, name, value)
                else:
                    put(entry, name, value)

    def find_entry(self, piece: JSONDict, is_first: bool) -> JSONDict:
        """Return the entry that a piece continues, or a new one."""
        index = piece.get("index")
        if isinstance(index, int):                              # 1
            key = (str(piece.get("type")), index)   # a type may be any JSON
            if key not in self.by_key:
                self.by_key[key] = self.begin()
            return self.by_key[key]
        if is_first and self.can_continue_last(piece):          # 2
            last: JSONDict = self.entries[-1]
            return last
        return self.begin()                                     # 3

    def begin(self) -> JSONDict:
        """Add an empty entry and return it."""
        entry: JSONDict = {}
        self.entries.append(entry)
        return entry

    def can_continue_last(self, piece: JSONDict) -> bool:
        """Whether the last entry is a text with the piece's type and id."""
        last = self.entries[-1] if self.entries else None
        if not isinstance(last, dict):
            return False
        for name in ("type", "id"):
            # A piece such as {"signature": "..."} may have neither.
            value = piece.get(name)
            if value is not None and value != last.get(name):
                return False
        return any(last.get(name) is not None for name in ENTRY_TEXTS)


def grow(target: JSONDict, name: str, value: JSON) -> None:
    """Add a piece to a field that is a text, or a list of parts.

    ===================  =============================================
    the piece            what becomes of the field
    ===================  =============================================
    a text               a text grows; a list gets one part more
    a list               a list gets its parts, and a text becomes a
                         list: its first part
    "", None, [], {}     nothing
    an object, a number  it is replaced, unless it was a text or list:
                         then APIResponseError
    ===================  =============================================
    """
    old = target.get(name)
    if value and isinstance(value, str):
        if isinstance(old, GrowingText):
            old.pieces.append(value)
        elif isinstance(old, GrowingList):      # Magistral sends both
            old.add([{"type": "text", "text": value}])
        else:
            # put() leaves a plain str: "" in the last branch below, and a
            # text with which a block began.
            begun = old if isinstance(old, str) else ""
            target[name] = GrowingText(begun + value)
    elif value and isinstance(value, list):
        if not isinstance(old, GrowingList):
            target[name] = GrowingList()
            if isinstance(old, GrowingText):
                target[name].entries.append({"type": "text", "text": old})
        target[name].add(value)
    elif isinstance(old, (GrowingText, GrowingList)) and not is_empty(value):
        raise APIResponseError(f"a broken event: {name} was text and is now "
                               f"{type(value).__name__}")
    else:
        put(target, name, value)


def grow_object(target: JSONDict, name: str, piece: JSONDict) -> None:
    """Add a piece to a field that is an object with texts in pieces.

    That is what a call calls (function, custom; function_call before there
    were tools), or spoken audio.
    """
    if not isinstance(target.get(name), dict):
        target[name] = {}
    fields = target[name]
    for key, value in piece.items():
        if key in OBJECT_TEXTS:
            grow(fields, key, value)
        elif key == "name" and isinstance(value, str):
            # Names come in pieces ("get_", then "time"), or whole in every
            # piece ("get_time", then "get_time").  So what begins with the
            # name so far replaces it.
            name_so_far = get_str(fields, key) or ""
            if not value.startswith(name_so_far):
                value = name_so_far + value
            if len(value) > MAX_NAME:
                raise APIResponseError("a broken event: a name is longer than "
                                       f"{MAX_NAME} characters")
            fields[key] = value
        else:
            put(fields, key, value)


def put(target: JSONDict, name: str, value: JSON) -> None:
    """Set a field, unless the value is empty and something is there.

    Unlike grow(), it replaces texts and lists.  Objects are merged.  A copy
    of the value is set, because the next piece may be merged into it, and the
    event must stay as it was sent.
    """
    old = target.get(name)
    if isinstance(old, dict) and isinstance(value, dict):
        for key, entry in value.items():
            put(old, key, entry)
    elif old is None or not is_empty(value):
        target[name] = copy.deepcopy(value)


def is_empty(value: JSON) -> bool:
    """Whether a value is None, "", {} or []; 0 and False are values."""
    return not value and not isinstance(value, (int, float))


def map_text(value: JSON, change: Callable[[str], str]) -> JSON:
    """Return a copy of a JSON value in which a function changed each text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, GrowingText):
        return change(value.get())
    if isinstance(value, GrowingList):
        value = value.entries
    if isinstance(value, list):
        return [map_text(entry, change) for entry in value]
    if isinstance(value, dict):
        return {change(name): map_text(entry, change)
                for name, entry in value.items()}
    return value


class HalfCharacter:
    """Joins a character whose halves come in two pieces of the text.

    JSON can hold halves ("surrogates"), and some servers cut an emoji in two.
    A half at the end of a piece waits for the next piece.
    """

    def __init__(self) -> None:
        self.waiting = ""

    def join(self, piece: str, is_last: bool) -> str:
        """Return what can be shown now; after the last piece, all of it."""
        if piece.isascii() and not self.waiting:
            return piece
        text = self.waiting + piece
        self.waiting = ""
        last = text[-1:]
        if not is_last and "\ud800" <= last <= "\udbff":   # a first half
            self.waiting = last
            text = text[:-1]
        return clean_text(text)


class ChatAssembler:
    """Puts the chunks of a chat stream together.

    https://platform.openai.com/docs/api-reference/chat-streaming
    The answer's text is the text of choice 0.
    """

    def __init__(self, choice_count: int = 1) -> None:
        self.choice_count = choice_count    # how many were asked for
        self.fields: JSONDict = {}      # of the answer, except its choices
        self.choices: dict[int, ChatChoice] = {}
        self.half = HalfCharacter()
        self.done = False               # [DONE] has come

    @property
    def whole(self) -> bool:
        """Whether what has arrived is proven to be the whole answer."""
        if len(self.choices) < self.choice_count:
            return False    # even at [DONE]: a choice was lost
        return self.done or all(choice.finished
                                for choice in self.choices.values())

    def add(self, chunk: JSONDict) -> str:
        """Add a chunk; return what it adds to the answer's text.

        :raise APIResponseError: the chunk breaks the format.
        """
        if chunk is DONE:
            self.done = True
            return ""
        if "choices" not in chunk and "usage" not in chunk:
            return ""       # a vendor's own event
        fields = dict(chunk)
        fields.pop("choices", None)
        # OpenAI pads chunks with this; it is no part of the answer.
        fields.pop("obfuscation", None)
        # Most chunks repeat these fields, which need not be put again.
        if fields != self.fields:
            for name, value in fields.items():
                put(self.fields, name, value)
        text = ""
        is_last = False
        for number, choice in enumerate(expect_list(chunk, "choices")):
            if not isinstance(choice, dict):
                raise APIResponseError("a broken event: a choice is not an "
                                       "object")
            index = choice.get("index")
            if not isinstance(index, int):
                index = number
            if index not in self.choices:
                if len(self.choices) >= MAX_PARTS:
                    raise APIResponseError(f"more than {MAX_PARTS} choices")
                self.choices[index] = ChatChoice()
            added = self.choices[index].add(choice)
            if index == 0:
                text += added
                is_last = self.choices[index].finished
        return self.half.join(text, is_last)

    def build(self, clean: Callable[[str], str] = clean_text) -> JSONDict:
        """Return what has arrived as chat() would.

        Each text goes through ``clean``, which may remove secrets, too.
        """
        choices = [{"index": index, **self.choices[index].build()}
                   for index in sorted(self.choices)]
        answer: JSONDict = map_text(
            {**self.fields, "object": "chat.completion", "choices": choices},
            clean)
        return answer


class ChatChoice:
    """One choice of a chat answer."""

    def __init__(self) -> None:
        self.fields: JSONDict = {"finish_reason": None}
        self.message: JSONDict = {"role": "assistant", "content": None}
        self.calls: list[ChatCall] = []
        self.call_of_id: dict[str, ChatCall] = {}
        self.call_of_index: dict[int, ChatCall] = {}    # the newest
        self.has_content = False
        self.finished = False   # it has a finish_reason, and no content since

    def add(self, choice: JSONDict) -> str:
        """Add a choice of a chunk; return what it adds to the text."""
        delta = expect_dict(choice, "delta")
        if not delta and not self.has_content:
            # The whole answer may be here, in one message.  Beside or after
            # deltas, a message only repeats them (Perplexity).
            delta = expect_dict(choice, "message")
        adds_content = self.add_delta(delta)
        if adds_content:
            self.has_content = True
        self.add_fields(choice)
        # A finish_reason stands for the content beside it, but not for what
        # comes after it.  DashScope sends the text "null" until the end.
        reason = choice.get("finish_reason")
        if reason and reason != "null":
            self.finished = True
        elif adds_content:
            self.finished = False
        return find_raw_text(delta.get("content"))

    def add_fields(self, choice: JSONDict) -> None:
        """Add what stands beside the delta, such as the finish_reason."""
        fields = dict(choice)
        for name in ("index", "delta", "message"):
            fields.pop(name, None)
        if isinstance(fields.get("logprobs"), dict):
            self.add_logprobs(fields.pop("logprobs"))
        if fields != self.fields:   # most chunks repeat them, too
            for name, value in fields.items():
                put(self.fields, name, value)

    def add_delta(self, delta: JSONDict) -> bool:
        """Add to the message; return whether there was any content."""
        adds_content = False
        for name, value in delta.items():
            if value and name != "role":    # some repeat it in every chunk
                adds_content = True
            if name == "tool_calls":
                for piece in expect_list(delta, name):
                    if isinstance(piece, dict):
                        self.add_call(piece)
            elif name in MESSAGE_TEXTS or isinstance(value, list):
                grow(self.message, name, value)
            elif name in ("audio", "function_call") and isinstance(value,
                                                                   dict):
                grow_object(self.message, name, value)
            else:
                put(self.message, name, value)
        return adds_content

    def add_logprobs(self, logprobs: JSONDict) -> None:
        """Add the log probabilities of tokens: lists that go on."""
        if not isinstance(self.fields.get("logprobs"), dict):
            self.fields["logprobs"] = {}
        target = self.fields["logprobs"]
        for name, value in logprobs.items():
            if isinstance(value, list) and isinstance(target.get(name), list):
                target[name].extend(value)
            else:
                put(target, name, value)

    def add_call(self, piece: JSONDict) -> None:
        """Add a piece of a tool call.

        It goes to the call of its id; if that is new, to the newest call of
        its index.  A piece without an index begins a call if it has an id
        that is new, and continues the last call if it has none.
        """
        id, index = piece.get("id"), piece.get("index")
        call = None
        if isinstance(id, str) and id in self.call_of_id:
            call = self.call_of_id[id]
        elif isinstance(index, int):
            call = self.call_of_index.get(index)
        elif self.calls and not id:
            call = self.calls[-1]
        if call is None or call.is_followed_by(piece):
            if len(self.calls) >= MAX_PARTS:
                raise APIResponseError(f"more than {MAX_PARTS} calls")
            call = ChatCall(index)
            self.calls.append(call)
            if isinstance(index, int):
                self.call_of_index[index] = call
        if isinstance(id, str) and id:
            self.call_of_id[id] = call
        call.add(piece)

    def build(self) -> JSONDict:
        """Return the choice; a call without a name is none."""
        message = dict(self.message)
        calls = [call.build() for call in self.calls if call.get_name()]
        if calls:
            message["tool_calls"] = calls
        return {**self.fields, "message": message}


class ChatCall:
    """One tool call of a choice."""

    def __init__(self, index: JSON) -> None:
        self.index = index      # of its first piece
        self.fields: JSONDict = {}      # all, except the index
        # Of the pieces of the arguments that has_whole_arguments() has seen.
        # It is asked only if a piece has a name; so most calls need none.
        self.nesting = Nesting()
        self.pieces_seen = 0

    def add(self, piece: JSONDict) -> None:
        """Add a piece."""
        for name, value in piece.items():
            if name in ("function", "custom") and isinstance(value, dict):
                grow_object(self.fields, name, value)
            elif name == "id" and self.fields.get("id"):
                pass        # some send another id in each piece
            elif name != "index":
                put(self.fields, name, value)

    def get_name(self) -> JSON:
        """Return the name of what is called, if it has come."""
        return find_function(self.fields).get("name")

    def is_followed_by(self, piece: JSONDict) -> bool:
        """Whether a piece for this call begins the next call instead.

        Some servers give all calls one index (Gemini) or one id (Mistral).
        Others repeat the name, or send another id, in every piece of a call.
        So a piece must have a name; and before the arguments are a whole
        object, another name and another id.  After that, one sign is enough.

        Examples, of pieces at one index:

        ===================  ===================  =====================
        id, name, arguments  the next piece       begins the next call
        ===================  ===================  =====================
        a   f   {"x":        a   f   1}           no
        a   f   {"x":        b   f   1}           no
        a   f                b   g                yes
        -   get_             a   time             no, the id comes late
        a   f   {"x": 1}     b   f   {"y": 2}     yes
        a   f   {"x": 1}     a   f   {"y": 2}     no; yes, if at the
                                                  next index
        -   f   {"x": 1}     -   f   {"y": 2}     yes
        -   f   {"x": 1}     -   f                no
        ===================  ===================  =====================
        """
        function = find_function(piece)
        name, id = function.get("name"), piece.get("id")
        if not name:
            return False
        own_id = self.fields.get("id")
        has_other_name = name != self.get_name()
        has_other_id = id not in (None, "", own_id)
        if not self.has_whole_arguments():
            return bool(own_id) and has_other_name and has_other_id
        index = piece.get("index")
        if has_other_name or has_other_id:
            return True
        if isinstance(index, int) and index != self.index:
            return True
        return not id and begins_object(function.get("arguments"))

    def has_whole_arguments(self) -> bool:
        """Whether the arguments so far are a whole JSON object."""
        arguments = get_dict(self.fields, "function").get("arguments")
        if not isinstance(arguments, GrowingText):
            return isinstance(arguments, dict)
        for piece in arguments.pieces[self.pieces_seen:]:
            self.nesting.add(piece)
        self.pieces_seen = len(arguments.pieces)
        return self.nesting.is_closed()

    def build(self) -> JSONDict:
        """Return the call."""
        default = "custom" if get_dict(self.fields, "custom") else "function"
        return {**self.fields, "type": self.fields.get("type") or default}


def find_function(call: JSONDict) -> JSONDict:
    """Return what a call, or a piece of one, calls; {} if it does not say."""
    return get_dict(call, "function") or get_dict(call, "custom")


def begins_object(arguments: JSON) -> bool:
    """Whether a piece of arguments begins an object."""
    if isinstance(arguments, str):
        return arguments.lstrip().startswith("{")
    return isinstance(arguments, dict)


def add_input(block: JSONDict, piece: JSON) -> None:
    """Add a piece of a tool's input, which is text, or is whole."""
    if isinstance(piece, str):
        grow(block, "input", piece)
    else:
        block["input"] = piece


def takes_input(block: JSONDict) -> bool:
    """Whether a block is a tool's: tool_use, server_tool_use, ..."""
    return "input" in block or str(block["type"]).endswith("tool_use")


def fits(block: JSONDict, kind: str) -> bool:
    """Whether a delta for a block of a kind can go to this block."""
    if kind == "tool_use":
        return takes_input(block)
    block_type: str = block["type"]
    return block_type == kind


class MessagesAssembler:
    """Puts the events of a Messages stream together.

    https://docs.anthropic.com/en/docs/build-with-claude/streaming
    """

    def __init__(self) -> None:
        self.fields: JSONDict = {}      # of the message, except its blocks
        self.blocks: list[JSONDict] = []
        # The newest block, and the newest tool, of each index; and the
        # indexes whose newest block has stopped.
        self.by_index: dict[int | None, JSONDict] = {}
        self.tools: dict[int | None, JSONDict] = {}
        self.stopped: set[int | None] = set()
        self.half = HalfCharacter()
        self.started = False            # message_start has come
        self.done = False               # message_stop has come
        # Whether what has arrived is proven whole.  Content that comes later
        # withdraws the proof.
        self.whole = False

    def add(self, event: JSONDict) -> str:
        """Add an event; return what it adds to the answer's text.

        :raise APIResponseError: the event breaks the format.
        """
        kind, index = event.get("type"), event.get("index")
        if not isinstance(index, int):
            index = None
        text = ""
        if kind == "message_start":
            self.started = True
            text = self.add_message(expect_dict(event, "message"))
        elif kind == "message":     # a whole message as one event
            text = self.add_message(event)
        elif kind == "content_block_start":
            self.whole = False
            block = expect_dict(event, "content_block")
            self.begin_block(index, block)
            text = find_raw_text([block])
        elif kind == "content_block_delta":
            self.whole = False
            text = self.add_delta(index, expect_dict(event, "delta"))
        elif kind == "content_block_stop":
            self.stopped.add(index)
        elif kind == "message_delta":
            self.add_fields(expect_dict(event, "delta"))
            self.add_fields({name: value for name, value in event.items()
                             if name not in ("type", "delta")})
        elif kind == "message_stop":
            self.done = True
            if self.started:
                self.whole = True
        # Nothing to do for ping, and for events yet unknown.
        return self.half.join(text, is_last=self.whole)

    def add_message(self, message: JSONDict) -> str:
        """Add a message with the blocks that it has; return their text."""
        blocks = get_dicts(message, "content")
        for block in blocks:
            self.begin_block(None, block)
        self.add_fields({name: value for name, value in message.items()
                         if name != "content"})
        return find_raw_text(blocks)

    def add_fields(self, fields: JSONDict) -> None:
        """Set fields of the message; counts replace the earlier ones."""
        for name, value in fields.items():
            put(self.fields, name, value)
        if fields.get("stop_reason"):
            self.whole = True

    def begin_block(self, index: int | None, fields: JSONDict) -> JSONDict:
        """Begin a block with the fields that it has, and return it."""
        if len(self.blocks) >= MAX_PARTS:
            raise APIResponseError(f"more than {MAX_PARTS} blocks")
        block: JSONDict = {"type": fields.get("type") or "text"}
        for name, value in fields.items():
            if name in ("text", "thinking"):
                grow(block, name, value)
            elif name != "type":
                put(block, name, value)
        self.blocks.append(block)
        self.by_index[index] = block
        self.stopped.discard(index)
        if takes_input(block):
            self.tools[index] = block
        return block

    def find_block(self, index: int | None, kind: str) -> JSONDict:
        """Return the block that a delta of a kind goes to.

        By the reference, that is the block of its index.  But some gateways
        send no content_block_start, give every delta the index 0, or send a
        text in the middle of a tool's input.  So there are three candidates:
        the first that is of the kind is taken; if none is, a block begins.
        """
        block = self.by_index.get(index)
        if block is None and index is not None:
            if index < 0:       # LiteLLM
                raise APIResponseError("a broken event: a delta for no block")
            return self.begin_block(index, {"type": kind})
        last = self.blocks[-1] if self.blocks else None
        tool = self.tools.get(index)
        if index in self.stopped:
            # All deltas have the index 0, and this one is for the last block.
            candidates = [last, block, tool]
        else:
            # If the block is a text amid a tool's input, this is for the tool.
            candidates = [block, tool, last]
        for candidate in candidates:
            if candidate is not None and fits(candidate, kind):
                return candidate
        return self.begin_block(index, {"type": kind})

    def add_delta(self, index: int | None, delta: JSONDict) -> str:
        """Add a delta to its block; return what it adds to the text."""
        kind = delta.get("type") or "text_delta"
        # Some gateways send "" for a block of another kind: we ignore it, so
        # that it begins no block.
        if kind == "text_delta":
            text = delta.get("text")
            if text:
                block = self.find_block(index, "text")
                grow(block, "text", text)
                return find_raw_text(text)
        elif kind == "thinking_delta":
            if delta.get("thinking"):
                block = self.find_block(index, "thinking")
                grow(block, "thinking", delta["thinking"])
        elif kind == "signature_delta":
            if delta.get("signature"):
                block = self.find_block(index, "thinking")
                put(block, "signature", delta["signature"])
        elif kind == "input_json_delta":
            if delta.get("partial_json"):
                block = self.find_block(index, "tool_use")
                add_input(block, delta["partial_json"])
        elif kind == "citations_delta":
            block = self.find_block(index, "text")
            if not isinstance(block.get("citations"), list):
                block["citations"] = []
            if delta.get("citation"):
                block["citations"].append(delta["citation"])
        else:
            self.add_unknown(index, delta)
        return ""

    def add_unknown(self, index: int | None, delta: JSONDict) -> None:
        """Add a delta of a type yet unknown.

        Only the known types change text, thinking and input.
        """
        block = self.by_index.get(index)
        if block is None:
            return
        for name, value in delta.items():
            if name not in ("type", "text", "thinking", "input"):
                grow(block, name, value)

    def build(self, clean: Callable[[str], str] = clean_text) -> JSONDict:
        """Return what has arrived as message() would.

        Each text goes through ``clean``, which may remove secrets, too.  A
        tool's input is decoded, and {} if there is none; before the answer is
        whole, it is a text.  Empty text blocks, which Claude would refuse in
        the next turn, are left out.
        """
        content = []
        for block in self.blocks:
            block = map_text(block, clean)
            if takes_input(block):
                block["input"] = parse_arguments(block.get("input") or {},
                                                 partial=not self.whole)
            if block["type"] != "text" or block.get("text"):
                content.append(block)
        fields = map_text({"role": "assistant", **self.fields}, clean)
        return {**fields, "type": "message", "content": content}


def expect_dict(data: JSONDict, name: str) -> JSONDict:
    """Return a field that is a dict; {} for nothing."""
    value = data.get(name)
    if isinstance(value, dict):
        return value
    if not is_empty(value):
        raise APIResponseError(f"a broken event: {name} is not an object")
    return {}


def expect_list(data: JSONDict, name: str) -> list[JSON]:
    """Return a field that is a list; [] for nothing."""
    value = data.get(name)
    if isinstance(value, list):
        return value
    if not is_empty(value):
        raise APIResponseError(f"a broken event: {name} is not a list")
    return []


# ---------------------------------------------------------------------------
# Network.  Except for the command line, the only I/O.  http.client speaks
# HTTP.  It does so over a socket of our own class, in which every wait ends
# with the deadline of the call.
#
# From the bottom up: the socket; TLS; the route of a call (proxy, CA); a
# connection; the kept connections; a call, which explains its errors; an
# answer, while it is read; send_request(), which tries until one is good.
#
# A comment with "Undocumented" names what this relies on though no
# documentation says it.  It is so in Python 3.8 to 3.13, on which the tests
# run.
# ---------------------------------------------------------------------------

class NetworkError(Exception):
    """An OSError of one of our sockets; the caller never sees it.

    It is made where the OSError is raised.  So any other OSError comes from
    the caller's own code, such as a signal handler that raises TimeoutError
    in the middle of a call, and is not caught.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause.with_traceback(None)


def to_network_error(exc: OSError) -> Exception:
    """Return what to raise in place of an OSError: a NetworkError.

    TimeoutError("mine"), raised by a signal handler just while a socket
    worked, is returned as it is.  It has no ``errno``; all that the system
    and ssl raise have one.  (The timeouts of the socket module have none, but
    only settimeout() makes these, and it is not used here.)
    """
    return exc if exc.errno is None else NetworkError(exc)


def copy_error(error: ServError) -> ServError:
    """Return what to raise of an error that we keep: a copy, with its cause.

    The error itself would get a traceback, whose frames refer to the error:
    they would wait for the garbage collector.  And its context may quote the
    server.
    """
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied


# What is caught: failures of the network, and all failures of a call.
# APIConnectionError is raised here, too, as for an answer that was cut.
# OverflowError comes from http.client, for a chunk with a size far below 0.
NETWORK_FAILURES = (NetworkError, APIConnectionError,
                    http.client.HTTPException, OverflowError)
CALL_FAILURES = (ServError, *NETWORK_FAILURES)


# What is set on every socket, where the system has it: send at once; probe a
# silent connection; take a dead path for lost (in milliseconds).
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE),    # Linux
    (socket.IPPROTO_TCP, "TCP_KEEPALIVE", KEEPALIVE),   # macOS
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", DEAD_SECONDS * 1000)]


class DeadlineSocket(socket.socket):
    """A socket in which every wait ends with a deadline.

    Beneath, it does not block, and waits by poll().  With settimeout(), the
    socket module would raise a TimeoutError, as a caller's signal handler may
    do in the middle of a call; nobody could tell them apart.

    For http.client, it looks like a socket that blocks::

        HTTPResponse.read1()  ->  recv_into()  ->  when_ready(receive_now)
        HTTPConnection.send()  ->  sendall()   ->  when_ready(send_now)

    when_ready() waits.  receive_now() and send_now() do not: they call the
    method of socket.socket, or in a TLSSocket, of ssl.SSLSocket.
    """

    # Undocumented: SSLContext.wrap_socket() makes its sockets without a call
    # of __init__().  So these are set after construction.
    deadline = 0.0      # by time.monotonic()
    owner = 0           # the process that opened it
    received = 0        # bytes that have come since it was set to 0

    def receive_now(self, buffer: Any) -> int:
        """Receive what is here, without waiting; return how many bytes."""
        return socket.socket.recv_into(self, buffer)

    def send_now(self, data: Any) -> int:
        """Send what can be sent without waiting; return how many bytes."""
        return socket.socket.send(self, data)

    def check(self) -> float:
        """Return the seconds left.

        :raise NetworkError: none is left.
        :raise APIConnectionError: this is a child of the process that opened
            it.  Parent and child would each read parts of one answer.
        """
        if self.owner != os.getpid():
            raise APIConnectionError("the connection was opened before a fork")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise build_network_error(errno.ETIMEDOUT)
        return left

    def wait(self, writing: bool) -> None:
        """Wait until the socket can be read, or written."""
        while not is_ready(self, writing, min(self.check(), WAIT_SLICE)):
            pass

    def when_ready(self, operation: Callable[..., Any], *args: Any,
                   writing: bool = False) -> Any:
        """Return what an operation returns, once it need not wait."""
        while True:
            self.check()
            wait_to_write = writing
            try:
                return operation(*args)
            except BlockingIOError:
                pass
            # TLS may have to read before it can write, and the reverse.
            except ssl.SSLWantReadError:
                wait_to_write = False
            except ssl.SSLWantWriteError:
                wait_to_write = True
            except OSError as exc:
                raise to_network_error(exc)
            self.wait(wait_to_write)

    def connect(self, address: Any) -> None:
        """Connect to an address."""
        code = self.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            self.wait(writing=True)
            code = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise build_network_error(code)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a buffer.  (makefile() passes only that.)

        :raise APIResponseError: the server has sent more than MAX_RECEIVED.
        """
        try:
            size = self.when_ready(self.receive_now, buffer)
        except OSError as exc:  # a signal handler's
            # In Python 3.8 and 3.9, SocketIO looks at args[0], which a bare
            # `raise TimeoutError` lacks.
            if not exc.args:
                exc.args = ("",)
            raise
        self.received += size
        if self.received > MAX_RECEIVED:
            raise APIResponseError(f"more than {MAX_RECEIVED} bytes came")
        return int(size)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of it."""
        view = memoryview(data)
        while len(view) > 0:
            size = self.when_ready(self.send_now, view[:READ_SIZE],
                                   writing=True)
            view = view[size:]

    def has_input(self) -> bool:
        """Whether anything has come, or the end; it does not wait.

        A byte that has come is lost: the connection is of no more use.  No
        check for a fork is needed: a child has no idle connections.

        :raise NetworkError: the connection is broken.
        """
        try:
            self.receive_now(bytearray(1))
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as exc:
            raise to_network_error(exc)
        return True

    def shut_down(self) -> None:
        """End the connection, and with it a wait in another thread.

        Not in a child process, whose parent still uses it.
        """
        if self.owner == os.getpid():
            # Undocumented: SSLSocket.shutdown() forgets the encryption.  With
            # it, a thread that reads would take what comes for plain text.
            with contextlib.suppress(OSError):  # it has ended already
                socket.socket.shutdown(self, socket.SHUT_RDWR)


class TLSSocket(DeadlineSocket, ssl.SSLSocket):  # type: ignore[misc]
    """The same with TLS: only the two methods that do not wait differ.

    Those of ssl.SSLSocket, which they call, call OpenSSL and none of the
    methods above.
    """

    def receive_now(self, buffer: Any) -> int:
        """Receive and decrypt what is here, without waiting."""
        return ssl.SSLSocket.recv_into(self, buffer)

    def send_now(self, data: Any) -> int:
        """Encrypt and send what can be sent without waiting."""
        return ssl.SSLSocket.send(self, data)


def build_network_error(code: int) -> NetworkError:
    """Return the error of a number of the system, an ``errno``."""
    return NetworkError(OSError(code, os.strerror(code)))


def build_setup_error(text: str) -> APIConnectionError:
    """Return an error of the set-up on this side, which no retry mends."""
    error = APIConnectionError(text)
    error._worth_a_retry = False
    return error


def is_ready(sock: socket.socket, writing: bool, seconds: float) -> bool:
    """Wait for some seconds at most; return whether a socket is ready."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if writing else select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    # Windows.  There, select() reports a connection that is refused only as
    # an exception, its third list.
    if writing:
        return any(select.select([], [sock], [sock], seconds))
    return any(select.select([sock], [], [], seconds))


def open_socket(host: str, port: int, deadline: float) -> DeadlineSocket:
    """Connect to the first address of a host that answers.

    No address takes more than CONNECT_TIMEOUT, nor more than its share of
    the time left, so that a dead one leaves time for the next.
    """
    try:
        addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except OSError as exc:      # a gaierror, as a rule
        raise to_network_error(exc)
    cause = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for number, address in enumerate(addresses):
        now = time.monotonic()
        share = max(deadline - now, 0.0) / (len(addresses) - number)
        try:
            return connect_socket(address, now + min(share, CONNECT_TIMEOUT))
        except NetworkError as exc:
            cause = exc.cause
    raise NetworkError(cause)   # of the last address


def connect_socket(info: Any, deadline: float) -> DeadlineSocket:
    """Return a socket that is connected to an address of getaddrinfo()."""
    family, kind, protocol, _, address = info
    try:
        sock = DeadlineSocket(family, kind, protocol)
    except OSError as exc:      # as for IPv6, if the system has none
        raise to_network_error(exc)
    sock.setblocking(False)
    sock.owner = os.getpid()
    sock.deadline = deadline
    try:
        sock.connect(address)
        set_options(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def set_options(sock: socket.socket) -> None:
    """Set the options that the system has and accepts."""
    for level, name, value in SOCKET_OPTIONS:
        if hasattr(socket, name):
            # Some refuse an option: it helps, but no call depends on it.
            with contextlib.suppress(OSError):
                sock.setsockopt(level, getattr(socket, name), value)


def start_tls(sock: DeadlineSocket, host: str, context: ssl.SSLContext,
              deadline: float) -> DeadlineSocket:
    """Return the socket with TLS, its certificate and host name checked."""
    # wrap_socket() takes the descriptor over, and detaches the old socket from
    # it.  It returns a TLSSocket, as get_tls_context() has asked for.  (ssl
    # does not report a connection that ends without TLS's close_notify.  That
    # is no danger: HTTP or JSON tells whether an answer is whole.)
    try:
        secure = context.wrap_socket(sock, server_hostname=host,
                                     do_handshake_on_connect=False)
    except OSError as exc:
        raise to_network_error(exc)
    if not isinstance(secure, TLSSocket):
        # A package has replaced ssl.SSLContext by its own.
        secure.close()
        raise build_setup_error("ssl.SSLContext was replaced (by truststore?):"
                                " its sockets know no deadline")
    secure.owner = os.getpid()
    secure.deadline = min(deadline, time.monotonic() + CONNECT_TIMEOUT)
    try:
        secure.when_ready(secure.do_handshake)
    except BaseException:
        secure.close()
        raise
    return secure


# TLS contexts by their CA settings; creating one takes tens of milliseconds.
# A CA file that changes later is not read again.
_tls_contexts: dict[tuple[str | None, str | None], ssl.SSLContext] = {}


def get_tls_context(ca_file: str | None,
                    ca_dir: str | None) -> ssl.SSLContext:
    """Return a TLS context: of a CA file, or of what the system trusts.

    =============  ============  ======================================
    SSL_CERT_FILE  SSL_CERT_DIR  what is trusted
    =============  ============  ======================================
    -              -             what the system trusts
    -              a folder      the system's file, and the folder: both
                                 are OpenSSL's own doing
    a file         -             the file
    a file         a folder      the file, and the folder
    =============  ============  ======================================

    :raise APIConnectionError: a file cannot be loaded.  The next call tries
        it again.
    """
    context = _tls_contexts.get((ca_file, ca_dir))
    if context is not None:
        return context
    try:
        if ca_file:
            context = ssl.create_default_context(cafile=ca_file, capath=ca_dir)
        else:
            context = ssl.create_default_context()
    except OSError as exc:  # an SSLError too: no certificate is in the file
        if exc.errno is None:   # see to_network_error()
            raise
        if exc.filename:    # Python sets it for SSLKEYLOGFILE only
            name = exc.filename
        elif ca_file:
            name = f"SSL_CERT_FILE={ca_file}"
        else:
            name = "the system's CA store"
        raise build_setup_error(f"{name} cannot be loaded: "
                                f"{exc.strerror or exc}")
    if ca_file or ca_dir:
        # Python 3.13 added checks of a certificate's form that many a
        # company's own CA fails, as for its key usage.  Chain, date and host
        # name are checked all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # The default from Python 3.10; the system may ask for more.
    context.minimum_version = max(context.minimum_version,
                                  ssl.TLSVersion.TLSv1_2)
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = TLSSocket
    # Another thread may have been faster; then its context is taken.
    return _tls_contexts.setdefault((ca_file, ca_dir), context)


class Proxy(collections.namedtuple("Proxy", "host port login")):
    """An http proxy; ``login`` is its Proxy-Authorization header, or None."""

    __slots__ = ()
    host: str
    port: int
    login: str | None


class Route(collections.namedtuple(
        "Route", "tls host port proxy ca_file ca_dir")):
    """How a call gets to its server, as the environment is now.

    Calls of equal routes share connections.
    """

    __slots__ = ()
    tls: bool
    host: str
    port: int
    proxy: Proxy | None
    ca_file: str | None
    ca_dir: str | None


def find_route(address: Address) -> Route:
    """Return the route to an address.

    :raise ValueError: the proxy's URL is wrong.
    """
    ca_file = ca_dir = None
    if address.tls:
        ca_file = os.environ.get("SSL_CERT_FILE") or None
        ca_dir = os.environ.get("SSL_CERT_DIR") or None
    return Route(address.tls, address.host, address.port,
                 find_proxy(address), ca_file, ca_dir)


def find_proxy(address: Address) -> Proxy | None:
    """Return the proxy that the environment names for an address, or None.

    :raise ValueError: its URL is wrong.
    """
    scheme = "https" if address.tls else "http"
    name = scheme + "_proxy"
    if not os.environ.get(name) and not os.environ.get(name.upper()):
        return None
    # Imported only here: it is slow to load, and most calls have no proxy.
    import urllib.request
    text = urllib.request.getproxies().get(scheme)
    if not text:
        return None     # it ignores HTTP_PROXY in a CGI program
    # NO_PROXY may name an IPv6 host with and without brackets.  Undocumented:
    # proxy_bypass() takes "host:port", and looks only at the environment, if
    # a proxy is named there.
    for host in (address.host, f"[{address.host}]"):
        if urllib.request.proxy_bypass(f"{host}:{address.port}"):
            return None
    proxy = parse_proxy(text.strip())
    if proxy is None:
        raise ValueError(f"{name}: expected "
                         "http://[user[:password]@]host[:port]")
    return proxy


def parse_proxy(text: str) -> Proxy | None:
    """Return the proxy that a URL names; None if it is wrong.

    It raises nothing: an error of urlsplit() may show the password.
    """
    if "://" not in text:
        text = "http://" + text
    host, port = parse_host(text)
    if not host or " " in host or not host.isprintable():
        return None
    parts = urllib.parse.urlsplit(text)
    if parts.scheme != "http" or parts.path not in ("", "/"):
        return None
    login = None
    if parts.username is not None:
        user = urllib.parse.unquote(parts.username)
        password = urllib.parse.unquote(parts.password or "")
        try:
            # What was no UTF-8 in the environment becomes its bytes again.
            words = f"{user}:{password}".encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:      # Windows' may hold half a character
            return None
        login = "Basic " + base64.b64encode(words).decode()
    return Proxy(host, port or 80, login)


class Response(http.client.HTTPResponse):
    """An answer, without the interim answers that may come before it.

    https://www.rfc-editor.org/rfc/rfc9110#section-15.2
    """

    def begin(self) -> None:
        """Read the head of the answer.

        http.client itself skips 100, but not 102 and 103.
        """
        super().begin()
        while self.status < 200 and self.status != 101:
            # Undocumented: begin() reads a head only if there is none yet.
            self.headers = None     # type: ignore[assignment]
            super().begin()


class Connection(http.client.HTTPConnection):
    """A connection to a server, for one call after the other.

    It is closed after anything except an answer that was read to its end.
    """

    response_class = Response   # Undocumented: getresponse() makes one.

    def __init__(self, route: Route) -> None:
        peer = route.proxy or route
        super().__init__(peer.host, peer.port)
        self.route = route
        self.idle_since = 0.0       # by time.monotonic()
        self.deadline = 0.0         # of the call that uses it
        # The socket, until the end.  http.client has its own reference,
        # `sock`, which it sets to None at an answer with "Connection: close".
        self.wire: DeadlineSocket | None = None
        self.response: http.client.HTTPResponse | None = None
        self.is_broken = False      # the network failed after a whole answer

    def connect(self) -> None:
        """Connect, through the proxy and with TLS where the route says so."""
        route = self.route
        wire = open_socket(self.host, self.port, self.deadline)
        self.wire = wire
        wire.deadline = self.deadline
        if route.tls:
            if route.proxy:
                open_tunnel(wire, route)
            context = get_tls_context(route.ca_file, route.ca_dir)
            wire = start_tls(wire, route.host, context, self.deadline)
            self.wire = wire
        self.sock = wire

    def post(self, call: Call) -> http.client.HTTPResponse:
        """Send the request; return the answer, of which the head is read.

        The server may have closed a connection that was kept.  Then its end
        comes soon, and before a byte of the answer: the request is sent once
        more, on a new connection, but once a call only.  If the end comes
        later, the server may have processed the request, and billed it.
        """
        self.deadline = call.deadline
        if self.wire is not None:       # it was kept
            limit = min(time.monotonic() + STALE_SECONDS, call.deadline)
            try:
                return self.post_once(call.request)
            except NETWORK_FAILURES:
                is_soon = time.monotonic() < limit
                was_closed = is_soon and self.wire.received == 0
                if not was_closed or call.resent:
                    raise
            call.resent = True
            self.discard()
        self.connect()
        return self.post_once(call.request)

    def post_once(self, request: Request) -> http.client.HTTPResponse:
        """Do what post() says, on the connection as it is."""
        assert self.wire is not None
        self.wire.deadline = self.deadline
        self.wire.received = 0
        target, headers = request.target, request.headers
        if self.route.proxy and not self.route.tls:
            target = request.url
            if self.route.proxy.login:
                headers = {**headers,
                           "Proxy-Authorization": self.route.proxy.login}
        cause = None
        try:
            self.request("POST", target, request.body, headers)
        except NetworkError as exc:
            # If the server stopped reading, it may have said why (413): its
            # answer is read all the same.  (For the next call, is_usable()
            # will find that the connection is broken.)  Undocumented:
            # getresponse() allows it, for the request counts as sent before
            # its bytes are sent.
            cause = exc.cause
        try:
            self.response = self.getresponse()
        except http.client.RemoteDisconnected:
            if cause is not None:
                raise NetworkError(cause)
            raise
        return self.response

    def is_usable(self, limit: float) -> bool:
        """Whether the last answer is at its end and nothing has come since."""
        assert self.wire is not None and self.response is not None
        self.wire.deadline = limit
        self.wire.received = 0
        try:
            # Where the last answer was left   What read1() does
            # at its end                       it returns b"" at once
            # at [DONE], the last event        it waits, until the limit, for
            #                                  the last chunk, and returns b""
            # before more of it                it returns a byte
            if self.response.read1(1):
                return False
            # Nothing may wait in the socket, not even the end.
            if self.wire.has_input():
                return False
        except NETWORK_FAILURES:
            return False
        # If http.client has read bytes beyond the answer, this drops them: so
        # they cannot become the beginning of the next answer.
        self.response.close()
        return True

    def keep(self) -> None:
        """Leave it to the next call, if there can be one."""
        # `sock` is None if it was closed.  Undocumented: also if the answer
        # says "Connection: close".
        can_be_kept = (self.wire is not None and self.sock is not None
                       and not self.is_broken)
        # tinyproxy garbles the next request where there was no CONNECT.
        if self.route.proxy is not None and not self.route.tls:
            can_be_kept = False
        # After 101, the server speaks another protocol.
        if self.response is not None and self.response.status == 101:
            can_be_kept = False
        # A stream that was opened before a fork is the parent's to keep.
        if self.wire is not None and self.wire.owner != os.getpid():
            can_be_kept = False
        if can_be_kept:
            self.idle_since = time.monotonic()
            _idle.append(self)
            close_old()
        else:
            self.discard()

    def limit_wait(self, seconds: float) -> None:
        """Wait no longer than some seconds for the rest of this answer."""
        if self.wire is not None:
            self.wire.deadline = min(self.deadline,
                                     time.monotonic() + seconds)

    def end_wait(self) -> None:
        """End a wait in another thread, which then finds the end."""
        if self.wire is not None:
            self.wire.shut_down()

    def discard(self) -> None:
        """Close it for good; the other side is told at once."""
        self.end_wait()
        # Closing fails if others have closed its descriptor already.
        if self.wire is not None:
            with contextlib.suppress(OSError):
                self.wire.close()
        if self.response is not None:
            with contextlib.suppress(OSError):
                self.response.close()
        with contextlib.suppress(OSError):
            self.close()


def open_tunnel(sock: DeadlineSocket, route: Route) -> None:
    """Have a route's proxy connect a socket to the server.

    https://www.rfc-editor.org/rfc/rfc9110#section-9.3.6

    :raise APIConnectionError: the proxy refuses.
    """
    assert route.proxy is not None
    host = f"[{route.host}]" if ":" in route.host else route.host
    target = f"{host}:{route.port}"
    head = [f"CONNECT {target} HTTP/1.1", f"Host: {target}",
            f"User-Agent: {USER_AGENT}"]
    if route.proxy.login:
        head.append(f"Proxy-Authorization: {route.proxy.login}")
    sock.sendall("\r\n".join([*head, "", ""]).encode())
    # Undocumented: a response can be made of any socket.  Leaving "with"
    # closes its buffer, but not the socket.  Nothing is lost in the buffer:
    # with TLS, the client speaks first.
    with Response(sock, method="CONNECT") as response:
        response.begin()
        status = response.status
    if not 200 <= status < 300:
        reason = http.client.responses.get(status, "")
        text = f"the proxy refused: {status} {reason}"
        if status == 407:       # it wants a login
            raise build_setup_error(text)
        raise APIConnectionError(text)


# The idle connections, oldest first.  There is no lock, because each single
# operation of a list is atomic, with and without the GIL (connections are
# compared by identity).  So neither a thread nor a signal handler that makes a
# call can find it locked.
_idle: list[Connection] = []


def take_out(connection: Connection) -> bool:
    """Remove an idle connection; False if another thread was faster."""
    try:
        _idle.remove(connection)
    except ValueError:
        return False
    return True


def take_connection(route: Route) -> Connection:
    """Return a connection for a route: the newest idle one, or a new one.

    The waits of is_usable() take LAST_CHUNK_SECONDS at most, together.  Only
    connections on which a stream was left at [DONE] need one.
    """
    close_old()
    limit = time.monotonic() + LAST_CHUNK_SECONDS
    for connection in reversed(_idle[:]):
        if connection.route == route and take_out(connection):
            if connection.is_usable(limit):
                return connection
            connection.discard()
    return Connection(route)


def close_old() -> None:
    """Close what has been idle too long, and what is too many."""
    oldest = time.monotonic() - IDLE_SECONDS
    for connection in _idle[:]:     # the oldest first
        is_too_old = connection.idle_since < oldest
        are_too_many = len(_idle) > MAX_IDLE
        if not is_too_old and not are_too_many:
            break
        if take_out(connection):
            connection.discard()


def close_idle() -> None:
    """Close all: at exit, and in a child, whose parent goes on with them."""
    for connection in _idle[:]:
        if take_out(connection):
            connection.discard()


atexit.register(close_idle)
if hasattr(os, "register_at_fork"):     # not on Windows
    os.register_at_fork(after_in_child=close_idle)


class Call:
    """A call: its request, its route, its time, and how often it failed."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.route = find_route(request.address)
        self.started = time.monotonic()
        self.deadline = self.started + request.timeout
        self.retries = 0        # tries that have failed so far
        self.resent = False     # see Connection.post()
        # What is removed from errors, because a server may repeat it.
        secrets = [request.secret]
        if self.route.proxy and self.route.proxy.login:
            secrets.append(self.route.proxy.login.split()[-1])
        self.secrets = [text for text in secrets if len(text) >= MIN_SECRET]

    def redact_text(self, text: str) -> str:
        """Return text of the server without secrets, as clean text."""
        text = clean_text(text)
        for secret in self.secrets:
            text = text.replace(secret, "[removed]")
            # An answer that was cut may end in the middle of a secret: with
            # "sk-abcdefgh" of "sk-abcdefghijkl".  If it is half of it or more,
            # it is removed, too.
            start = text.rfind(secret[:max(MIN_SECRET, len(secret) // 2)])
            if start >= 0 and secret.startswith(text[start:]):
                text = text[:start] + "[removed]"
        return text

    def redact_headers(self, headers: Headers) -> Headers:
        """Return headers of the server without secrets."""
        redacted = http.client.HTTPMessage()
        redacted.set_payload("")    # str() needs one
        for name, value in headers.items():
            redacted[self.redact_text(name)] = self.redact_text(value)
        return redacted

    def explain(self, exc: Exception,
                headers: Headers | None) -> ServError:
        """Return what was raised as an error of this call.

        ``headers`` are the answer's, if its head had come.

        ========================================  ==================
        what was raised; the first row that fits  the error
        ========================================  ==================
        a failure of the network at the deadline  APITimeoutError
        a ServError                               itself
        any other failure of the network          APIConnectionError
        ========================================  ==================

        Only an exception of the system becomes the cause: those of
        http.client quote the server, which may have echoed the key.
        """
        is_late = time.monotonic() >= self.deadline - CLOCK_ERROR
        error: ServError
        if is_late and isinstance(exc, NETWORK_FAILURES):
            error = APITimeoutError(
                f"timed out: not within {self.request.timeout:g} s; raise "
                "timeout (or SERV_TIMEOUT), or ask for less")
        elif isinstance(exc, ServError):
            # The traceback would keep this try in memory.
            error = exc.with_traceback(None)
        else:
            what = "no answer" if headers is None else "the answer was cut"
            text = str(exc) or type(exc).__name__
            if isinstance(exc, NetworkError):
                text += find_hint(exc.cause, self.route)
            error = APIConnectionError(f"{what}: {text}")
        if isinstance(exc, NetworkError):
            error.__cause__ = exc.cause
            if isinstance(exc.cause, ssl.SSLCertVerificationError):
                error._worth_a_retry = False
        self.complete_error(error, headers)
        return error

    def complete_error(self, error: ServError,
                       headers: Headers | None) -> None:
        """Add to an error where and when it happened, and clean it."""
        error.retries = self.retries
        where = "POST " + self.request.url
        proxy = self.route.proxy
        if proxy:
            where += f" through the proxy {proxy.host}:{proxy.port}"
        request_id = None
        if headers is not None:
            request_id = find_request_id(headers)
        if request_id:
            error.request_id = self.redact_text(request_id)
            where += ", request id " + shorten(error.request_id)
        # The key goes before it is cut short: half a key would not be found.
        text = shorten(self.redact_text(str(error)))
        error.args = (f"{text} ({self.redact_text(where)})",)


def find_hint(exc: OSError, route: Route) -> str:
    """Return what would help against a failure of the network."""
    if isinstance(exc, (ConnectionRefusedError, socket.gaierror)):
        if route.proxy:
            return "; check the proxy"
        return "; check base_url (or SERV_BASE_URL) and the network"
    if isinstance(exc, ssl.SSLError) and not isinstance(
            exc, ssl.SSLCertVerificationError):
        return "; does the server speak https?  Check base_url"
    # OpenSSL's numbers for: nobody trusted has signed it (18 and 19: it has
    # signed itself; 20 and 21: its issuer is not known).
    unknown = getattr(exc, "verify_code", 0) in (18, 19, 20, 21)
    if unknown and not (route.ca_file or route.ca_dir):
        return ("; for a company's own CA, set SSL_CERT_FILE to the path of "
                "its PEM file")
    return ""


class Answer:
    """An answer while it is read: its head is here, its body comes."""

    def __init__(self, call: Call, connection: Connection,
                 response: http.client.HTTPResponse) -> None:
        self.call = call
        self.connection = connection
        self.response = response
        self.is_good = 200 <= response.status < 300
        # The Content-Length; None if the body is chunked, or ends with the
        # connection.  Undocumented.  (http.client counts it down later.)
        self.length = response.length
        content_type = response.headers.get_content_type()
        self.is_labelled = content_type == "text/event-stream"
        self.at_end = False         # the body was read to its end
        self.elapsed = 0.0          # seconds from the call to the last byte
        # The answer, if it came as plain JSON, once it is whole.
        self.plain_json: JSONDict | None = None
        # Of a stream: what puts it together, and its events, each with the
        # text that it adds.
        self.assembler: Assembler
        if call.request.endpoint == "chat":
            self.assembler = ChatAssembler(call.request.choice_count)
        else:
            self.assembler = MessagesAssembler()
        self.events: Iterator[tuple[JSONDict, str]] = iter(())

    def take_events(self) -> Iterator[tuple[JSONDict, str]]:
        """Return the events of a stream, and let go of them.

        They come from a generator, which refers to this answer.  If both
        referred to each other, they would stay in memory until the garbage
        collector runs.
        """
        events = self.events
        self.events = iter(())
        return events

    def begin(self) -> None:
        """Read what must be read before the call returns.

        =====================================  =========================
        the answer to                          what is read
        =====================================  =========================
        a call, or it has the status of an     all of it
        error
        stream(), labelled as an event stream  nothing: its first event
                                               may take minutes
        stream(), not labelled as one          the first event; it may be
                                               an error
        =====================================  =========================

        :raise Exception: one of CALL_FAILURES, also if the answer is an error.
        """
        if not self.is_good:
            self.connection.limit_wait(ERROR_SECONDS)
        if not self.call.request.streaming or not self.is_good:
            self.plain_json = self.parse(self.read_body(b"", self.iter_body()))
            return
        self.events = self.iter_stream()
        if not self.is_labelled:
            first = next(self.events, None)
            if first is not None:
                self.events = itertools.chain([first], self.events)

    def iter_stream(self) -> Iterator[tuple[JSONDict, str]]:
        """Yield each decoded event of a stream, and the text that it adds.

        Some servers answer with plain JSON instead.  Then the whole answer is
        one event.
        """
        chunks = self.iter_body()
        head = read_beginning(chunks)
        if is_event_stream(head, self.is_labelled):
            try:
                yield from self.iter_decoded(itertools.chain([head], chunks))
            except NETWORK_FAILURES:
                if not self.assembler.whole:
                    raise
                # It was whole before.
                self.connection.is_broken = True
        else:
            self.plain_json = self.parse(self.read_body(head, chunks))
            yield self.plain_json, Reply(self.plain_json).text

    def iter_decoded(self, chunks: Iterator[bytes]
                     ) -> Iterator[tuple[JSONDict, str]]:
        """Do what iter_stream() says, up to the last event of the format."""
        assembler = self.assembler
        deadline = self.call.deadline
        try:
            for name, data in iter_events(chunks):
                for event in parse_events(name, data):
                    # No socket tells this if the events were read at once,
                    # and the caller held a piece beyond the deadline.  Once
                    # the answer is whole, the rest (the usage) may be late.
                    now = time.monotonic()
                    if now >= deadline and not assembler.whole:
                        raise APITimeoutError("an event came too late")
                    self.elapsed = now - self.call.started
                    if event is DONE:
                        assembler.add(DONE)
                        return      # what comes after it does not count
                    if find_error(event, name) is not None:
                        raise self.build_error(event)
                    yield event, assembler.add(event)
                    # Proven whole or not, we read on, for the usage, until
                    # [DONE], message_stop or the end.
                    if assembler.done:
                        return
        except EventTooLarge as exc:
            raise APIResponseError(f"a broken event: {exc}")

    def iter_body(self) -> Iterator[bytes]:
        """Yield the bytes of the body as they come.

        Its end is that of the Content-Length, the last chunk, or, where the
        head names neither, that of the connection.
        """
        response = self.response
        coding = str(response.headers.get("content-encoding") or "identity")
        if coding.lower() != "identity":
            raise APIResponseError(f"cannot decode content-encoding {coding}")
        coding = str(response.headers.get("transfer-encoding") or "identity")
        if coding.lower() not in ("identity", "chunked"):
            raise APIResponseError(f"cannot decode transfer-encoding {coding}")
        limit = MAX_STREAM if self.call.request.streaming else MAX_BODY
        if not self.is_good:
            limit = MAX_ERROR
        size = 0
        while True:
            data = response.read1(READ_SIZE)
            if not data:
                break
            size += len(data)
            if size > limit:
                raise APIResponseError(f"the answer is larger than {limit} "
                                       "bytes")
            yield data
        # http.client does not report a body shorter than its Content-Length.
        if self.length is not None and size < self.length:
            raise APIConnectionError("the answer was cut: it lacks "
                                     f"{self.length - size} bytes")
        self.at_end = True
        self.elapsed = time.monotonic() - self.call.started
        response.close()

    def read_body(self, head: bytes, chunks: Iterator[bytes]) -> bytes:
        """Return a whole body, which begins with ``head``."""
        data = io.BytesIO()
        data.write(head)
        try:
            for chunk in chunks:
                data.write(chunk)
        except CALL_FAILURES as exc:
            # An error status is the news, even without its whole body; also
            # if the time for it is over.
            if self.is_good:
                raise
            # If nothing of it could be read, as for its encoding, the reason
            # stands in its place.
            if isinstance(exc, APIResponseError) and not data.getvalue():
                return str(exc).encode()
        return data.getvalue()

    def parse(self, data: bytes) -> JSONDict:
        """Return a whole JSON answer; raise the error that it is, if so."""
        text = decode_body(data)
        try:
            answer = parse_json(text)
            is_json = True
            why = ""
        except ValueError as exc:
            answer = text
            is_json = False
            why = f" ({exc})"
        if not self.is_good:
            raise self.build_error(parse_stream_error(answer))
        if is_json and find_error(answer) is not None:
            raise self.build_error(answer)
        if not is_json and self.looks_cut(text.strip()):
            raise APIConnectionError("the answer was cut")
        if not is_answer(answer, self.call.request.endpoint):
            raise APIResponseError(f"not the JSON of an answer{why}; check "
                                   "base_url and the proxy: "
                                   + (text or "nothing"))
        return answer   # type: ignore[no-any-return]

    def looks_cut(self, text: str) -> bool:
        """Whether a body that is not JSON looks like a part of an answer.

        That is asked only if the body ends with the connection: then nothing
        else tells whether it is whole.  An empty one looks cut, too: if a head
        is cut, http.client takes what has come for a whole head.
        """
        if self.length is not None or self.response.chunked:
            return False
        if not text:
            return True
        return text.startswith("{") and not text.endswith("}")

    def build_error(self, body: JSON) -> APIStatusError:
        """Return the error for a status, or for an error object in a 200."""
        headers = self.call.redact_headers(self.response.headers)
        return build_status_error(self.response.status, headers,
                                  map_text(body, self.call.redact_text))

    def explain(self, exc: Exception) -> ServError:
        """Return what was raised while this answer was read as an error."""
        return self.call.explain(exc, self.response.headers)

    def is_whole(self) -> bool:
        """Whether what has arrived is the whole answer."""
        return self.plain_json is not None or self.assembler.whole

    def build_reply(self) -> Reply:
        """Return what has arrived."""
        data = self.plain_json
        if data is None:
            data = self.assembler.build()
        return Reply(data, self.response.headers, self.elapsed,
                     not self.is_whole(), self.call.retries,
                     self.call.request.choice_count)

    def build_partial_reply(self) -> Reply:
        """Return what had arrived of a stream that failed, without the key."""
        if self.plain_json is not None:
            data = map_text(self.plain_json, self.call.redact_text)
        else:
            data = self.assembler.build(self.call.redact_text)
        headers = self.call.redact_headers(self.response.headers)
        return Reply(data, headers, self.elapsed, True, self.call.retries,
                     self.call.request.choice_count)


def log_warning(text: str) -> None:
    """Log a warning, if the application uses logging (it is slow to load)."""
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.getLogger("serv").warning(text)


def send_request(request: Request,
                 warn: Callable[[str], None] = log_warning) -> Answer:
    """Return a good answer, after as many tries as the request allows.

    It is whole, or a stream that has begun.  Each retry is a line to ``warn``.
    """
    call = Call(request)
    while True:
        result = try_once(call)
        if isinstance(result, Answer):
            return result
        wait = retry_wait(result, call.retries)
        # Without room for the wait there is no use in waiting.
        if (wait is None or call.retries == request.max_retries
                or time.monotonic() + wait >= call.deadline):
            raise copy_error(result)
        call.retries += 1
        warn(f"retry {call.retries} of {request.max_retries} in {wait:.1f} s: "
             f"{result}")
        time.sleep(wait)


def try_once(call: Call) -> Answer | ServError:
    """Send the request of a call; return a good answer, or the error.

    The connection stays open for a stream.  The next call gets it if the
    answer was read to its end, even if that is an error; else it is closed.
    """
    connection = take_connection(call.route)
    answer = None
    result: Answer | ServError
    try:
        response = connection.post(call)
        answer = Answer(call, connection, response)
        answer.begin()
        result = answer
    except CALL_FAILURES as exc:
        headers = answer.response.headers if answer is not None else None
        result = call.explain(exc, headers)
    except BaseException:       # Ctrl-C, for example
        connection.discard()
        raise
    if call.request.streaming and isinstance(result, Answer):
        return result
    if answer is not None and answer.at_end:
        connection.keep()
    else:
        connection.discard()
    return result


# ---------------------------------------------------------------------------
# Command line.  The answer goes to standard output, everything else to
# standard error.  There is no option for the key.
# ---------------------------------------------------------------------------

HELP = """\
usage: serv [options] [PROMPT ...]      or: python3 serv.py [options] ...

Ask a model of SERV.  Piped standard input is the prompt, or is appended to
it; in a `while read` loop or a service, add < /dev/null.  - reads standard
input; -- ends the options.  SERV_API_KEY holds the key; SERV_BASE_URL,
SERV_MODEL and SERV_TIMEOUT (seconds) are read too.

  -m, --model NAME         default: SERV_MODEL, else gpt-5.4-mini, or for
                           messages claude-haiku-4.5
  -s, --system TEXT        the system prompt (a plain helpful assistant)
  -e, --endpoint FORMAT    chat (the default) or messages
  -n, --max-tokens N       at most N tokens; for messages 4096 if not given
  -o, --option NAME=VALUE  any parameter of the request; JSON, else text
  -H, --header 'NAME: VALUE'  any header of the request
      --no-stream          print the answer only when it is complete
      --json               print the whole answer as JSON
      --dry-run            print the request as a curl command; needs no key
  -v, --verbose            print request id, time, tokens and retries
      --version, --help

Exit status: 0 a whole answer, 1 the call failed or the output was closed,
2 wrong usage, 3 blocked or cut off by the token limit, 130 interrupted.
"""

KEY_OF_SHELL = "$SERV_API_KEY"      # stands for the key in a dry run

# What -o cannot set, and what sets it instead.
INSTEAD = {
    "model": "use -m", "system": "use -s", "endpoint": "use -e",
    "messages": "the prompt is the arguments", "headers": "use -H",
    "stream": "use --no-stream", "api_key": "set SERV_API_KEY",
    "base_url": "set SERV_BASE_URL", "timeout": "set SERV_TIMEOUT",
    "max_retries": "it is always 2 here", "extra_headers": "use -H",
    "extra_body": "use -o for each entry", "extra_query": "SERV takes none"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    if sys.stderr is None:      # it was closed
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        say("cannot write the output: it is closed")
        return 1
    prepare_streams()
    try:
        return run_command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except ServError as exc:
        say(str(exc))
        return 1
    except OSError as exc:      # of standard output: others are ServErrors
        discard_output()
        closed = isinstance(exc, BrokenPipeError) or (
            os.name == "nt" and exc.errno == errno.EINVAL)
        if not closed:
            say(f"cannot write the output: {exc}")
        return 1
    except (ValueError, TypeError) as exc:
        say(str(exc))
        return 2


def prepare_streams() -> None:
    """Let no text be fatal that an encoding cannot represent."""
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")
            if os.name == "nt" and not file.isatty():
                # Before Python 3.15, Windows' pipes are in its ANSI code.
                file.reconfigure(encoding="utf-8")


def discard_output() -> None:
    """Send what is left of the output nowhere, or Python would fail at exit.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    with contextlib.suppress(OSError):      # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print a line to standard error."""
    try:
        print("serv: " + shorten(text, 1000), file=sys.stderr, flush=True)
    except OSError:     # closed, or a full disk: nobody can be told
        sys.stderr = open(os.devnull, "w")


def run_command(argv: Sequence[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    args = parse_args([clean_text(word) for word in argv])
    if args.help:
        print(HELP, end="", flush=True)
        return 0
    if args.version:
        print("serv " + __version__, flush=True)
        return 0
    request = build_command_request(args)
    if args.dry_run:
        print(build_curl(request), flush=True)
        return 0
    reply = print_answer(args, request)
    return report(args, reply)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the options; raise ValueError if they are wrong."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """A parser that raises."""

        def error(self, message: str) -> NoReturn:
            # As "argument -m/--model: expected one argument".  Only the name
            # is shown: the rest may quote a value, which may be a key.
            name = message.partition(":")[0]
            raise ValueError(f"{name}: lacks a value, or takes none; "
                             "see --help")

    parser = Parser(usage="", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("prompt", nargs="*")
    add("-m", "--model")
    add("-s", "--system", default="You are a helpful assistant.")
    add("-e", "--endpoint", default="chat")
    add("-n", "--max-tokens")
    add("-o", "--option", action="append", default=[])
    add("-H", "--header", action="append", default=[])
    add("--no-stream", action="store_true")
    add("--json", action="store_true")
    add("--dry-run", action="store_true")
    add("-v", "--verbose", action="store_true")
    add("--version", action="store_true")
    add("-h", "--help", action="store_true")
    # What comes after "--" is cut off first: argparse treats it in another
    # way in each Python.
    end = argv.index("--") if "--" in argv else len(argv)
    # "Intermixed": options may stand between the words of the prompt.
    args, unknown = parser.parse_known_intermixed_args(argv[:end])
    if unknown:
        # Of --name=VALUE and -xVALUE, only the name.
        match = re.match("--[A-Za-z_-]+|-[A-Za-z]", unknown[0])
        name = match.group() if match else ""
        raise ValueError(f"unrecognized option {name}; see --help (for a "
                         "parameter of the request: -o NAME=VALUE)")
    if args.endpoint not in PATHS:
        raise ValueError("-e: expected chat or messages")
    if args.max_tokens is not None:
        if not re.fullmatch("[0-9]+", args.max_tokens):
            raise ValueError("-n: expected a whole number, 0 or more")
        args.max_tokens = int(args.max_tokens)
    args.use_stdin = "-" in args.prompt
    args.prompt = [word for word in args.prompt if word != "-"]
    args.prompt += argv[end + 1:]
    return args


def build_command_request(args: argparse.Namespace) -> Request:
    """Return the request that the command line asks for."""
    texts = [" ".join(args.prompt), read_stdin(args.use_stdin)]
    prompt = "\n\n".join(text for text in texts if text)
    if not prompt:
        raise ValueError("no prompt; give it as an argument, or pipe it in; "
                         "see --help")
    if not args.system.strip():
        raise ValueError("-s: the system prompt is empty; SERV requires one")
    streaming = not (args.no_stream or args.json)
    params: JSONDict = {}
    limit = "max_completion_tokens"
    if args.endpoint == "messages":
        limit = "max_tokens"
        params[limit] = 4096
    elif args.verbose and streaming:
        params["stream_options"] = {"include_usage": True}  # the tokens
    for name, value in split_options(args.option, "=", "-o"):
        if name in INSTEAD:
            raise ValueError(f"-o cannot set {name}: {INSTEAD[name]}")
        params[name] = parse_value(value)
    if args.max_tokens is not None:
        params[limit] = args.max_tokens
    headers = dict(split_options(args.header, ":", "-H"))
    args.model = (args.model or os.environ.get("SERV_MODEL")
                  or EXAMPLES[args.endpoint])
    return build_request(
        args.endpoint, prompt, streaming=streaming, model=args.model,
        system=args.system, params=params,
        api_key=KEY_OF_SHELL if args.dry_run else None,
        headers=headers)


def read_stdin(by_name: bool) -> str:
    """Return standard input if it is piped, or asked for by name."""
    if sys.stdin is None or (sys.stdin.isatty() and not by_name):
        return ""
    try:
        return clean_text(sys.stdin.read().rstrip())
    except (OSError, TypeError):
        # nohup opens it for writing.  If it does not block and has nothing
        # yet, the io module gets None to decode, before Python 3.14.
        return ""


def split_options(options: list[str], sign: str,
                  flag: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each NAME=VALUE or NAME: VALUE."""
    for option in options:
        name, found, value = option.partition(sign)
        if not name or not found:
            # Not shown: it may be a key.
            raise ValueError(f"{flag} lacks its NAME{sign}VALUE; see --help")
        yield name, value if sign == "=" else value.strip()


def parse_value(text: str) -> JSON:
    """Return the value of a text that is JSON, else the text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def build_curl(request: Request) -> str:
    """Return the curl command of a request of a dry run."""
    from shlex import quote
    lines = ["curl -gsSN --path-as-is " + quote(request.url)]
    for name, value in request.headers.items():
        if name == "Host":
            continue    # curl sends its own
        # curl takes "Name;" for an empty header.
        header = f"{name}: {value}" if value else f"{name};"
        if (name, value) == ("Authorization", "Bearer " + KEY_OF_SHELL):
            # The shell puts the key into "... Bearer $SERV_API_KEY".
            lines.append(f'-H "{header}"')
        else:
            lines.append("-H " + quote(header))
    lines.append("--data-raw " + quote(request.body.decode()))
    return " \\\n  ".join(lines)


class Note:
    """A note on a terminal that says what is being waited for."""

    def __init__(self, text: str) -> None:
        self.text = ""
        if sys.stderr.isatty():
            # It must fit in one line, or it cannot be erased.
            self.text = shorten(text, 34)
            print(self.text, end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        """Erase it, and the ^C that a terminal may have put after it."""
        if self.text:
            spaces = " " * (len(self.text) + len("^C"))
            print(f"\r{spaces}\r", end="", file=sys.stderr, flush=True)
            self.text = ""

    def say(self, text: str) -> None:
        """Print a line in its place."""
        self.erase()
        say(text)


def print_answer(args: argparse.Namespace, request: Request) -> Reply:
    """Send the request, print the answer and return it."""
    note = Note(f"serv: waiting for {args.model}")
    try:
        warn = note.say if args.verbose else log_warning
        answer = send_request(request, warn)
        if request.streaming:
            pieces = Stream(answer)
            print_pieces(pieces, note)
            return pieces.reply
        reply = answer.build_reply()
        text = reply.text
        if args.json:
            text = json.dumps(reply, indent=2, ensure_ascii=False)
        print_pieces([text], note)
        return reply
    finally:
        note.erase()


def print_pieces(pieces: Iterable[str], note: Note) -> None:
    """Print pieces as they come, and end the last line."""
    last = ""
    try:
        for piece in pieces:
            note.erase()
            if sys.stdout.isatty():
                piece = disarm(piece)
            last = piece or last    # before it is printed: Ctrl-C may come
            print(piece, end="", flush=True)
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)


def disarm(text: str) -> str:
    """Replace control characters, so that no model drives the terminal."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def report(args: argparse.Namespace, reply: Reply) -> int:
    """Say what the answer's text does not show; return the exit status."""
    if args.verbose:
        usage = json.dumps(reply.usage) if reply.usage else "no token counts"
        say(f"request id {reply.request_id or 'none'}, "
            f"{reply.elapsed:.1f} s, {usage}")
    if reply.tool_calls and not args.json:
        say("the answer calls tools; --json shows them")
    if reply.refusal:
        say("blocked: " + reply.refusal)
        return 3
    if reply.truncated:
        say("cut off by the token limit")
        return 3
    if reply.stop_reason is None:   # [DONE] proves it whole, but see stream()
        say("the server gave no reason for the end; it may be cut off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
