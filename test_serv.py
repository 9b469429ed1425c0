"""Tests of serv.py, over real sockets; also its demonstration.

    python3 -m pytest -q test_serv.py       the tests; pytest is all they need
    python3 test_serv.py "Hello!"           the command line, on a stand-in
    python3 test_serv.py --bench            the figures of README.md, measured

From top to bottom: bytes, a server on loopback that does what a test says,
a stand-in for the service, and then a group of tests for each section of
serv.py, in its order; the live checks (SERV_LIVE=1) and the promises last.
"""
import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import email.utils
import functools
import gc
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile

import serv

try:
    import pytest
except ImportError:  # demo() needs none of it

    class Nothing:
        """What can be used as any decorator, to no effect."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **options):
            return self

    pytest = Nothing()

KEY = "sk-test-0123456789"


# ---------------------------------------------------------------------------
# Bytes: what goes over the wire.
# ---------------------------------------------------------------------------

def http_answer(body=b"", status="200 OK", kind="application/json", **headers):
    """Return an HTTP answer with its length; `a_b` in headers means `a-b`."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return http_head(status, kind, content_length=len(body), **headers) + body


def http_head(status="200 OK", kind="application/json", **headers):
    """Return the head of an HTTP answer."""
    lines = ["HTTP/1.1 " + status, "Content-Type: " + kind]
    lines += ["%s: %s" % (name.replace("_", "-"), value)
              for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def chunk(data):
    """Return one chunk of a chunked body; an empty one is its end."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def sse(*events):
    """Return server-sent events: dicts as JSON (Messages ones by name)."""
    text = ""
    for event in events:
        if isinstance(event, dict):
            if "type" in event:
                text += "event: %s\n" % event["type"]
            event = json.dumps(event)
        text += "data: %s\n\n" % event
    return text.encode()


def stream_answer(*events, **headers):
    """Return a whole chunked answer of server-sent events, one a chunk."""
    head = http_head(kind="text/event-stream", transfer_encoding="chunked",
                     **headers)
    return head + b"".join(chunk(sse(e)) for e in events) + chunk(b"")


# ---------------------------------------------------------------------------
# A server on loopback that does whatever a test says.
# ---------------------------------------------------------------------------

Request = collections.namedtuple(
    "Request", "method target headers body connection")


class Server:
    """Serve each request of each connection with answer(wire, request).

    `answer` is a function, or bytes to send each time, or a list of either,
    one for each request in turn (the last one for all that follow).  `wire`
    is the connected socket.  Where the function returns False, or raises
    OSError, the connection is closed; otherwise the next request is read.
    A request is always read to its end first.  `requests` is what came;
    `connections` how often a client connected.
    """

    def __init__(self, answer, context=None, host="127.0.0.1"):
        self.answers = answer if isinstance(answer, list) else [answer]
        self.context = context
        self.requests, self.connections = [], 0
        self.lock = threading.Lock()
        self.wires = set()
        self.listener = socket.create_server(
            (host, 0), backlog=128,
            family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.listener.getsockname()[1]
        self.url = "%s://%s:%d" % ("https" if context else "http",
                                   "[%s]" % host if ":" in host else host,
                                   self.port)
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Close everything; waits until all of its threads have ended."""
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.threads[0].join(10)
        with self.lock:
            for wire in list(self.wires):
                try:
                    wire.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        for thread in self.threads[1:]:
            thread.join(10)

    def accept(self):
        while True:
            try:
                wire, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(
                target=self.converse, args=(wire, self.connections),
                daemon=True)
            with self.lock:
                self.wires.add(wire)
            self.threads.append(thread)
            thread.start()

    def converse(self, wire, number):
        plain = wire
        try:
            if self.context:
                wire = self.context.wrap_socket(wire, server_side=True)
                with self.lock:
                    self.wires.discard(plain)
                    self.wires.add(wire)
            with wire.makefile("rb") as reader:
                while True:
                    request = read_request(reader, number)
                    if request is None:
                        return
                    with self.lock:
                        self.requests.append(request)
                        turn = min(len(self.requests), len(self.answers)) - 1
                    answer = self.answers[turn]
                    if isinstance(answer, bytes):
                        wire.sendall(answer)
                    elif answer(wire, request) is False:
                        return
        except (OSError, ValueError):
            pass  # the client hung up, or the test is over
        finally:
            with self.lock:
                self.wires.discard(wire)
            wire.close()


def read_request(reader, connection):
    """Read one request whole; None at the end of the connection."""
    line = reader.readline().decode("latin-1").split()
    if len(line) != 3 or not line[2].startswith("HTTP/"):
        return None
    headers = {}
    while True:
        name, _, value = reader.readline().decode("latin-1").partition(":")
        if not name.strip():
            break
        headers[name.strip().lower()] = value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    return Request(line[0], line[1], headers, body, connection)


# ---------------------------------------------------------------------------
# A stand-in for the service.  Server(service) speaks both formats as SERV
# does; its model echoes the prompt.
# ---------------------------------------------------------------------------

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
REQUEST_ID = "req-5e12f0"


def service(wire, request):
    """Answer one request as the service would."""
    wire.sendall(service_answer(request))


def service_answer(request):
    """Return the bytes of the answer to a request."""
    chat = request.target == CHAT
    ids = {"x_openserv_request_id": REQUEST_ID}
    try:
        check_request(request)
        body = json.loads(request.body.decode())
        check_body(body, chat)
    except LookupError as exc:
        status, kind, told = exc.args
        error = {"error": {"type": kind, "message": told}}
        if not chat:
            error = {"type": "error", **error, "request_id": REQUEST_ID}
        return http_answer(error, status, **ids)
    build, split = ((chat_answer, chat_events) if chat else
                    (messages_answer, messages_events))
    answer = build(body)
    if body.get("stream"):
        return stream_answer(*split(answer, body), **ids)
    return http_answer(answer, **ids)


def check_request(request):
    """Raise LookupError(status, type, message) for a bad path or key."""
    if request.method != "POST" or request.target not in (CHAT, MESSAGES):
        raise LookupError("404 Not Found", "not_found_error",
                          "No such path: " + request.target)
    if request.headers.get("authorization") != "Bearer " + KEY:
        raise LookupError("401 Unauthorized", "authentication_error",
                          "Invalid API key.")


def check_body(body, chat):
    """Raise LookupError for a body that the service would refuse."""
    roles = [entry.get("role") for entry in body.get("messages", [])]
    wrong = None
    if not (set(roles) & {"system", "developer"} if chat
            else body.get("system")):
        wrong = ("A system prompt is required. Add a system or developer "
                 "message." if chat else
                 "A system prompt is required. Set the system field.")
    elif not body.get("model"):
        wrong = "model: Field required"
    elif not chat and not isinstance(body.get("max_tokens"), int):
        wrong = "max_tokens: Field required"
    if wrong:
        raise LookupError("400 Bad Request", "invalid_request_error", wrong)


def find_words(content):
    """Return the text of a message's content, and of tool results in it."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or find_words(part.get("content", ""))
                    for part in content or [])


def has_result(entry):
    """Whether a message brings the result of a tool."""
    return entry["role"] == "tool" or not isinstance(
        entry["content"], str) and any(
            part["type"] == "tool_result" for part in entry["content"])


def fill(schema, name="answer"):
    """Return a value that fits a JSON schema."""
    kind = schema.get("type", "object")
    if "enum" in schema:
        return schema["enum"][0]
    if kind == "object":
        return {name: fill(inner, name)
                for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [fill(schema.get("items", {"type": "string"}), name)]
    return {"string": "Paris" if name == "city" else "a " + name,
            "integer": 3, "number": 1.5, "boolean": True}.get(kind)


Said = collections.namedtuple("Said", "text call stop tokens")
# In both formats: the text, a (name, arguments) or None, why it stops
# (in the chat format's words), and the tokens (in, out).


def make_up(body, schema_of):
    """Return what the model says; `schema_of(tool)` is (name, schema)."""
    entry = body["messages"][-1]
    prompt = find_words(entry["content"])
    text, call, stop = 'You said: "%s"' % prompt, None, "stop"
    choice = body.get("tool_choice", "auto")
    wanted = body.get("response_format", {}).get("type", "text")
    limit = body.get("max_completion_tokens", body.get("max_tokens", 99))
    if "blocked" in prompt:
        text, stop = "I can't share that.", "content_filter"
    elif has_result(entry):
        text = 'The tool says: "%s"' % prompt
    elif body.get("tools") and choice not in ("none", {"type": "none"}):
        name, schema = schema_of(body["tools"][0])
        text, call, stop = "", (name, fill(schema)), "tool_calls"
    elif wanted == "json_schema":
        schema = body["response_format"]["json_schema"]["schema"]
        text = json.dumps(fill(schema))
    elif wanted == "json_object":
        text = json.dumps({"answer": text})
    if limit < 5 and not call:
        text, stop = " ".join(text.split()[:limit]), "length"
    return Said(text, call, stop, (len(prompt.split()), len(text.split())))


def chat_answer(body):
    """Return the answer of the chat endpoint."""
    said = make_up(body, lambda tool: (
        tool["function"]["name"], tool["function"].get("parameters", {})))
    entry = {"role": "assistant", "content": said.text or None,
             "refusal": None}
    if body.get("reasoning_effort", "none") != "none":
        entry["reasoning_content"] = "The user wants an answer."
    if said.call:
        entry["tool_calls"] = [{
            "id": "call_1", "type": "function", "function": {
                "name": said.call[0], "arguments": json.dumps(said.call[1])}}]
    came, went = said.tokens
    return {"id": "chatcmpl-1", "object": "chat.completion",
            "created": 1767225600, "model": body["model"],
            "choices": [{"index": 0, "message": entry, "logprobs": None,
                         "finish_reason": said.stop}],
            "usage": {"prompt_tokens": came, "completion_tokens": went,
                      "total_tokens": came + went}}


def chat_events(answer, body):
    """Yield the chunks in which a chat answer is streamed."""
    usage = answer.pop("usage")
    choice = answer.pop("choices")[0]
    entry = choice["message"]

    def event(delta, reason=None):
        return {**answer, "object": "chat.completion.chunk", "choices": [
            {"index": 0, "delta": delta, "finish_reason": reason}]}

    yield event({"role": "assistant", "content": ""})
    for name in ("reasoning_content", "content"):
        for piece in re.findall(r"\S+\s*", entry.get(name) or ""):
            yield event({name: piece})
    for index, call in enumerate(entry.get("tool_calls", [])):
        text = call["function"]["arguments"]
        call["function"]["arguments"] = ""
        yield event({"tool_calls": [{"index": index, **call}]})
        for piece in (text[:5], text[5:]):
            yield event({"tool_calls": [
                {"index": index, "function": {"arguments": piece}}]})
    yield event({}, choice["finish_reason"])
    if body.get("stream_options", {}).get("include_usage"):
        yield {**event({}), "choices": [], "usage": usage}
    yield "[DONE]"


def messages_answer(body):
    """Return the answer of the Messages endpoint."""
    said = make_up(body, lambda tool: (
        tool["name"], tool.get("input_schema", {})))
    blocks = []
    if body.get("thinking", {}).get("type") == "enabled":
        blocks.append({"type": "thinking", "signature": "c2lnbmVk",
                       "thinking": "The user wants an answer."})
    if said.text:
        blocks.append({"type": "text", "text": said.text})
    if said.call:
        blocks.append({"type": "tool_use", "id": "toolu_1",
                       "name": said.call[0], "input": said.call[1]})
    stop = {"stop": "end_turn", "tool_calls": "tool_use",
            "length": "max_tokens", "content_filter": "refusal"}[said.stop]
    return {"id": "msg_1", "type": "message", "role": "assistant",
            "model": body["model"], "content": blocks, "stop_reason": stop,
            "stop_sequence": None, "usage": {"input_tokens": said.tokens[0],
                                             "output_tokens": said.tokens[1]}}


def messages_events(answer, body):
    """Yield the events in which a Messages answer is streamed."""
    blocks, stop = answer["content"], answer["stop_reason"]
    went = answer["usage"]["output_tokens"]
    yield {"type": "message_start", "message": {
        **answer, "content": [], "stop_reason": None,
        "usage": {**answer["usage"], "output_tokens": 1}}}
    yield {"type": "ping"}
    for index, block in enumerate(blocks):
        start, deltas = split_block(dict(block))
        yield {"type": "content_block_start", "index": index,
               "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index,
                   "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "usage": {"output_tokens": went},
           "delta": {"stop_reason": stop, "stop_sequence": None}}
    yield {"type": "message_stop"}


def split_block(block):
    """Return a block as it starts, and the deltas that fill it."""
    if block["type"] == "tool_use":
        text = json.dumps(block["input"])
        return {**block, "input": {}}, [
            {"type": "input_json_delta", "partial_json": piece}
            for piece in ("", text[:5], text[5:])]
    name = block["type"]
    deltas = [{"type": name + "_delta", name: piece}
              for piece in re.findall(r"\S+\s*", block[name])]
    if name == "thinking":
        deltas.append({"type": "signature_delta",
                       "signature": block["signature"]})
        block["signature"] = ""
    return {**block, name: ""}, deltas


def demo(argv):
    """Run serv's command line against the stand-in; return its status."""
    with Server(service) as server:
        os.environ.update(SERV_BASE_URL=server.url, SERV_API_KEY=KEY,
                          NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        return serv.main(argv)


# -- What every test starts with ----------------------------------------------

LIVE = os.environ.get("SERV_LIVE") == "1"
MODEL, SYSTEM = "gpt-5.4-mini", "Be brief."


@pytest.fixture(scope="session", autouse=True)
def shared():
    """A stand-in of the tests that do not look at what it was asked."""
    gc.freeze()  # what pytest has made is much, and stays
    with Server(service) as server:
        yield server


@pytest.fixture
def standin():
    """A stand-in of a test's own."""
    with Server(service) as server:
        yield server


@pytest.fixture
def real():
    """For a test of the service itself, with the settings as they are."""
    if not LIVE:
        pytest.skip("needs SERV_LIVE=1, and the other SERV_ variables")


@pytest.fixture(autouse=True)
def settings(request, monkeypatch, shared):
    """Have the SERV_ variables lead to the stand-in, unless it is real."""
    if "real" in request.fixturenames:
        return
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("SERV_TIMEOUT", raising=False)
    server = (request.getfixturevalue("standin")
              if "standin" in request.fixturenames else shared)
    monkeypatch.setenv("SERV_BASE_URL", server.url)
    monkeypatch.setenv("SERV_API_KEY", KEY)
    monkeypatch.setenv("SERV_MODEL", MODEL)


def at_once(*cases, threads=None):
    """Run a test with each case, all at the same time: most of them wait."""
    def decorate(test):
        @functools.wraps(test)
        def run(**fixtures):
            with concurrent.futures.ThreadPoolExecutor(
                    threads or len(cases)) as pool:
                ends = [pool.submit(test, *case, **fixtures) for case in cases]
            for case, end in zip(cases, ends):
                if end.exception():
                    raise AssertionError(
                        "with %.999r" % (case,)) from end.exception()
        parameters = list(inspect.signature(test).parameters.values())
        run.__signature__ = inspect.Signature(parameters[len(cases[0]):])
        return run
    return decorate


def in_turn(*cases):
    """Run a test with each case, one after the other: each takes no time."""
    return at_once(*(case if isinstance(case, tuple) else (case,)
                     for case in cases), threads=1)


# ---------------------------------------------------------------------------
# The calls, and how their requests are built.
# ---------------------------------------------------------------------------

def message(messages, **options):
    """Call message() with a limit, which it requires."""
    return serv.message(messages, **{"max_tokens": 50, **options})


def stream_messages(messages, **options):
    """Stream in the Messages format to the end; return the reply."""
    return read_stream(messages, endpoint="messages",
                       **{"max_tokens": 50, **options})


def read_stream(messages, **options):
    """Stream to the end; return the reply."""
    with serv.stream(messages, **options) as pieces:
        text = "".join(pieces)
    assert text == pieces.reply.text
    return pieces.reply


CALLS = [serv.chat, read_stream, message, stream_messages]
each_call = pytest.mark.parametrize("call", CALLS)
two_calls = pytest.mark.parametrize("call", [CALLS[0], CALLS[3]])
chat_calls = pytest.mark.parametrize("call", CALLS[:2])
messages_calls = pytest.mark.parametrize("call", CALLS[2:])
ASKED = {"role": "user", "content": "Hi"}
REPLY = chat_answer({"model": MODEL, "messages": [ASKED]})


def body_of(request):
    return json.loads(request.body.decode())


def sent(server):
    """Return the body of the one request that came."""
    [request] = server.requests
    return body_of(request)


@each_call
def test_an_answer(call, standin):
    assert call("Hi", system=SYSTEM).text == 'You said: "Hi"'


def test_a_chat_body_holds_what_was_asked_for_and_no_more(standin):
    serv.chat("Hi", system=SYSTEM)
    assert sent(standin) == {"model": MODEL, "messages": [
        {"role": "system", "content": SYSTEM}, ASKED]}


def test_a_messages_body_holds_what_was_asked_for_and_no_more(standin):
    serv.message("Hi", system=SYSTEM, max_tokens=7)
    assert sent(standin) == {"model": MODEL, "messages": [ASKED],
                             "system": SYSTEM, "max_tokens": 7}


def test_a_stream_adds_stream_and_no_more(standin):
    read_stream("Hi", system=SYSTEM)
    assert sent(standin) == {"model": MODEL, "stream": True, "messages": [
        {"role": "system", "content": SYSTEM}, ASKED]}


def test_a_messages_stream_adds_stream_and_no_more(standin):
    stream_messages("Hi", system=SYSTEM)
    assert sent(standin) == {"model": MODEL, "messages": [ASKED],
                             "stream": True, "system": SYSTEM,
                             "max_tokens": 50}


@each_call
def test_the_head_of_a_request(call, standin):
    call("Hi", system=SYSTEM)
    [request] = standin.requests
    streamed = call in (read_stream, stream_messages)
    assert request[:2] == ("POST", CHAT if call in CALLS[:2] else MESSAGES)
    assert request.headers == {
        "accept": "text/event-stream" if streamed else "application/json",
        "accept-encoding": "identity",
        "authorization": "Bearer " + KEY,
        "content-length": str(len(request.body)),
        "content-type": "application/json",
        "host": standin.url[len("http://"):],
        "user-agent": serv.USER_AGENT}


@each_call
def test_any_parameter_is_sent_as_it_is(call, standin):
    params = {"temperature": 0.2, "stop": None, "n": 1, "seed": 0, "user": "",
              "serv_new": {"a": [1, None, False, "\u00e9 \U0001f600"]},
              "metadata": {}, "logit_bias": {"50256": -100},
              "max_completion_tokens": 2 ** 70, "endpoint_id": "chat",
              "self": 1, "body": 2, "params": {"x": 3}, "streaming": 4,
              "chat": 5, "more": 6, "name": 7, "data": 8, "url": 9}
    call("Hi", system=SYSTEM, **params)
    body = sent(standin)
    assert {name: body[name] for name in params} == params
    assert set(body) - set(params) <= {
        "model", "messages", "system", "max_tokens", "stream"}


def test_messages_are_sent_as_they_are(standin):
    messages = [{"role": "developer", "content": SYSTEM, "name": "x"},
                {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                             {"type": "image_url"}]},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "user", "content": "\u2028 \ud83d\ude00", "z": 1}]
    serv.chat(messages)
    assert sent(standin) == {"model": MODEL, "messages": json.loads(
        json.dumps(messages))}


@each_call
def test_nothing_of_the_callers_is_changed(call, standin):
    given = {"messages": [copy.deepcopy(ASKED)], "system": [
        {"type": "text", "text": SYSTEM}], "headers": {"X-A": "b"},
        "tools": [{"type": "function", "name": "f",
                   "function": {"name": "f"}}], "tool_choice": "none"}
    before = copy.deepcopy(given)
    call(**given)
    assert given == before


@chat_calls
def test_chat_puts_the_system_prompt_first(call, standin):
    system = {"role": "system", "content": "Rhyme."}
    call([ASKED, system, ASKED], system=SYSTEM)
    assert sent(standin)["messages"] == [
        {"role": "system", "content": SYSTEM}, ASKED, system, ASKED]


@pytest.mark.parametrize("role", ["system", "developer"])
@chat_calls
def test_chat_takes_a_system_prompt_among_the_messages(call, role, standin):
    messages = [ASKED, {"role": role, "content": SYSTEM}, ASKED]
    call(messages)
    assert sent(standin)["messages"] == messages


def test_a_list_of_text_blocks_is_a_system_prompt_too(standin):
    blocks = [{"type": "text", "text": SYSTEM,
               "cache_control": {"type": "ephemeral"}}]
    message("Hi", system=blocks)
    assert sent(standin)["system"] == blocks


@each_call
@in_turn(("Hi", None), ("Hi", ""), ("Hi", []), ([ASKED], None), ([], None))
def test_no_system_prompt_is_refused(messages, system, call, standin):
    with pytest.raises(ValueError, match="system=") as caught:
        call(messages, system=system)
    assert "system prompt" in str(caught.value)
    assert standin.requests == []


@each_call
@in_turn(5, b"Be brief.", True, {"a": "b"})
def test_a_system_prompt_of_a_wrong_type(system, call, standin):
    with pytest.raises((ValueError, TypeError), match="system"):
        call("Hi", system=system)
    assert standin.requests == []


@messages_calls
def test_messages_has_one_place_for_the_system_prompt(call, standin):
    with pytest.raises(ValueError, match="system="):
        call([{"role": "system", "content": SYSTEM}, ASKED])
    assert standin.requests == []


# -- Settings: arguments, else the environment, read at each call -------------

@each_call
def test_the_model_is_the_argument_else_the_variable(call, standin,
                                                     monkeypatch):
    monkeypatch.setenv("SERV_MODEL", "a")
    call("Hi", system=SYSTEM)
    call("Hi", system=SYSTEM, model="")
    monkeypatch.setenv("SERV_MODEL", "b")
    call("Hi", system=SYSTEM)
    call("Hi", system=SYSTEM, model="c")
    assert [body_of(r)["model"] for r in standin.requests] == list("aabc")


@pytest.mark.parametrize("value", [None, ""])
@each_call
def test_no_model_is_refused(call, value, standin, monkeypatch):
    monkeypatch.delenv("SERV_MODEL")
    if value is not None:
        monkeypatch.setenv("SERV_MODEL", value)
    with pytest.raises(ValueError, match="SERV_MODEL"):
        call("Hi", system=SYSTEM)
    assert standin.requests == []


@pytest.mark.parametrize("prefix", ["", "/a", "/a/b", "/v1beta"])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_forms_of_base_url(prefix, end, by, monkeypatch):
    with Server(http_answer(REPLY)) as server:
        url = server.url + prefix + end
        if by == "variable":
            monkeypatch.setenv("SERV_BASE_URL", url)
        serv.chat("Hi", system=SYSTEM,
                  base_url=url if by == "argument" else "")
    assert [r.target for r in server.requests] == [prefix + CHAT]


def test_base_url_in_capitals(standin):
    url = standin.url.replace("http", "HTTP")
    assert serv.chat("Hi", system=SYSTEM, base_url=url).request_id


@pytest.mark.parametrize("name", ["localhost", "LocalHost"])
def test_base_url_with_a_host_by_name(name, standin):
    url = standin.url.replace("127.0.0.1", name)
    serv.chat("Hi", system=SYSTEM, base_url=url)
    [request] = standin.requests
    assert request.headers["host"].lower() == url[len("http://"):].lower()


def test_base_url_with_an_ipv6_address():
    try:
        server = Server(http_answer(REPLY), host="::1")
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with server:
        for _ in range(2):  # the second on the connection of the first
            serv.chat("Hi", system=SYSTEM, base_url=server.url + "/v1")
    assert [r.headers["host"] for r in server.requests] == [
        "[::1]:%d" % server.port] * 2
    assert server.connections == 1


@in_turn(("http://h", ("http://h", False, "h", 80)),
         ("HTTPS://h/v1/", ("HTTPS://h", True, "h", 443)),
         ("https://h:/a", ("https://h:/a", True, "h", 443)),
         ("https://[fe80::1%lo]:8/v1", ("https://[fe80::1%lo]:8", True,
                                        "fe80::1%lo", 8)))
def test_the_place_of_a_base_url(url, found):
    assert serv.build_url(url) == found


def test_a_host_that_would_become_another(standin):
    """Under NFKC this is a/c.test: a host and a path."""
    with pytest.raises(ValueError, match="NFKC"):
        serv.chat("Hi", system=SYSTEM, base_url="http://\u2100.test")


BAD_URLS = [
    "ftp://127.0.0.1", "file:///etc/passwd", "127.0.0.1", "127.0.0.1:80",
    "//127.0.0.1", "localhost", "http:", "http://", "http:///v1",
    "http://:80", "https://?", "http://h:port", "http://h:65536", "http://h:0",
    "http://h:\u0663",
    "http://h:-1", "http://h?", "http://h?a=b", "http://h/v1?a=b",
    "http://h#", "http://h/#a", "http://h/a b", " http://h", "http://h ",
    "http://h\n", "http://h/\r\nX: y", "http://h\t", "http://h/\u2028",
    "http://h/\x00", "http://user@h", "http://user:password@h",
    "http://:password@h", "http://@h", "http://[::1", "http://h\\@i"]


@pytest.mark.parametrize("by", ["argument", "variable"])
@in_turn(*BAD_URLS)
def test_a_base_url_that_is_refused(url, by, monkeypatch):
    if by == "variable":
        if "\x00" in url:
            return  # no variable can hold it
        monkeypatch.setenv("SERV_BASE_URL", url)
    with pytest.raises(ValueError, match="base_url") as caught:
        serv.chat("Hi", system=SYSTEM,
                  base_url=url if by == "argument" else None)
    assert "password@" not in str(caught.value)


@each_call
def test_the_key_is_the_argument_else_the_variable(call, monkeypatch):
    with Server(service) as server:
        def ask(**options):
            try:
                call("Hi", system=SYSTEM, base_url=server.url, **options)
            except serv.AuthenticationError:
                pass
        ask()
        monkeypatch.setenv("SERV_API_KEY", "sk-b")
        ask()
        ask(api_key="")
        ask(api_key="sk-c")
    assert [r.headers["authorization"] for r in server.requests] == [
        "Bearer " + key for key in (KEY, "sk-b", "sk-b", "sk-c")]


@pytest.mark.parametrize("key", [
    KEY + "\n", KEY + "\r\n", "  %s\t" % KEY, "\u00a0" + KEY])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_white_space_around_a_key_is_dropped(key, by, standin, monkeypatch):
    if by == "variable":
        monkeypatch.setenv("SERV_API_KEY", key)
    serv.chat("Hi", system=SYSTEM,
              api_key=key if by == "argument" else None)
    assert standin.requests[0].headers["authorization"] == "Bearer " + KEY


BAD_KEYS = ["serv_\u2026", "sk-\u00e9t\u00e9-0123", "sk-0123\n4567",
            "sk-0123\r\nX: 4567", "sk-0123\x7f4567", "sk-0123\t4567",
            "sk-0123\x01", "\ud800sk-0123"]


@two_calls
@in_turn(*BAD_KEYS)
def test_a_key_that_no_header_can_carry_is_not_shown(key, call, standin):
    with pytest.raises(serv.ServError) as caught:
        call("Hi", system=SYSTEM, api_key=key)
    assert type(caught.value) is serv.ServError
    error = caught.value
    for text in (str(error), repr(error), repr(vars(error))):
        assert not any(part in text for part in
                       ("sk-", "serv_\u2026", "0123", "4567"))
    assert standin.requests == []


@pytest.mark.parametrize("key", [None, "", " ", "\n"])
@each_call
def test_no_key(call, key, standin, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    if key is not None:
        monkeypatch.setenv("SERV_API_KEY", key)
    with pytest.raises(serv.ServError, match="SERV_API_KEY") as caught:
        call("Hi", system=SYSTEM)
    assert type(caught.value) is serv.ServError
    assert caught.value.reply is None
    assert standin.requests == []


def test_a_space_is_printable_and_may_be_in_a_key():
    with Server(http_answer(REPLY)) as server:
        serv.chat("Hi", system=SYSTEM, api_key="a b~", base_url=server.url)
    assert server.requests[0].headers["authorization"] == "Bearer a b~"


@pytest.mark.parametrize("value", [
    0, -1, 0.0, float("nan"), float("inf"), "soon", "1 s", "-3", "0", "nan",
    "inf", "1_0"])
@two_calls
def test_a_timeout_that_is_refused(call, value, standin, monkeypatch):
    with pytest.raises(ValueError, match="timeout"):
        call("Hi", system=SYSTEM, timeout=value)
    monkeypatch.setenv("SERV_TIMEOUT", str(value))
    with pytest.raises(ValueError, match="SERV_TIMEOUT"):
        call("Hi", system=SYSTEM)
    assert standin.requests == []


@pytest.mark.parametrize("value", [
    None, "", 5, 0.5, 5e3, 1e300, "7", "7.5", ".5", "1e3"])
@two_calls
def test_a_timeout_that_is_taken(call, value, standin, monkeypatch):
    call("Hi", system=SYSTEM, timeout=value)
    monkeypatch.setenv("SERV_TIMEOUT", str(value or ""))
    call("Hi", system=SYSTEM)
    assert len(standin.requests) == 2


def test_a_timeout_as_an_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv("SERV_TIMEOUT", "0.05")
    assert serv.chat("Hi", system=SYSTEM, timeout=60).text
    with Server(lambda wire, request: None) as server:
        with pytest.raises(serv.APITimeoutError):
            serv.chat("Hi", system=SYSTEM, base_url=server.url)


@two_calls
@in_turn(-1, 1.5, "2", None, float("inf"), True)
def test_max_retries_is_a_whole_number(value, call, standin):
    with pytest.raises((ValueError, TypeError), match="max_retries"):
        call("Hi", system=SYSTEM, max_retries=value)
    assert standin.requests == []


# -- Headers, and input that is refused before anything is sent ---------------

@each_call
def test_headers_are_added(call, standin):
    call("Hi", system=SYSTEM, headers={
        "X-OpenServ-Prompt-Cache": "False", "x-empty": "", "x-a": "\u00e9"})
    [request] = standin.requests
    assert {name: text for name, text in request.headers.items()
            if name.startswith("x-")} == {
                "x-openserv-prompt-cache": "False", "x-empty": "",
                "x-a": "\u00e9"}
    assert request.headers["authorization"] == "Bearer " + KEY


@pytest.mark.parametrize("name", [
    "User-Agent", "Content-Type", "Accept", "Accept-Encoding"])
@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
@two_calls
def test_a_header_replaces_ours_in_any_case(call, name, change, standin):
    call("Hi", system=SYSTEM, headers={change(name): "mine"})
    assert standin.requests[0].headers[name.lower()] == "mine"


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_no_header_is_sent_twice(change):
    listener = socket.create_server(("127.0.0.1", 0))
    ours = ["Accept", "Accept-Encoding", "Authorization", "Content-Type",
            "User-Agent"]
    heads = []

    def serve():
        wire, _ = listener.accept()
        with wire, wire.makefile("rb") as reader:
            heads.extend(iter(lambda: reader.readline().decode(), "\r\n"))
            length = [int(line[15:]) for line in heads
                      if line.lower().startswith("content-length:")]
            reader.read(length[0])
            wire.sendall(http_answer(REPLY, connection="close"))

    with listener:
        thread = threading.Thread(target=serve)
        thread.start()
        serv.chat("Hi", system=SYSTEM, headers={
            change(name): "mine" for name in ours},
            base_url="http://127.0.0.1:%d" % listener.getsockname()[1])
        thread.join()
    names = sorted(line.split(":")[0].lower() for line in heads[1:])
    assert names == sorted([name.lower() for name in ours]
                           + ["content-length", "host"])


@pytest.mark.parametrize("name", ["Authorization", "authorization",
                                  "AUTHORIZATION"])
@pytest.mark.parametrize("key", [None, "", "serv_\u2026", "sk-other"])
@two_calls
def test_with_an_authorization_of_ones_own_no_key_is_needed(
        call, key, name, standin, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    call("Hi", system=SYSTEM, api_key=key, headers={name: "Bearer " + KEY})
    assert standin.requests[0].headers["authorization"] == "Bearer " + KEY


@two_calls
@in_turn(
    "Content-Length", "content-length", "Transfer-Encoding",
    "TRANSFER-ENCODING", "Host", "host", "X-A\r\nX-B", "X-A\n", "X:A", "", " ",
    "X A", "X-\u00e9")
def test_a_header_name_that_is_refused(name, call, standin):
    with pytest.raises(ValueError, match="headers"):
        call("Hi", system=SYSTEM, headers={name: "1"})
    assert standin.requests == []


@two_calls
@in_turn("a\r\nX-B: b", "a\n", "\ra", "a\n b", "a\x00", "\u2026", "a\x0b")
def test_a_header_value_that_is_refused(value, call, standin):
    with pytest.raises(ValueError, match="headers.*X-A"):
        call("Hi", system=SYSTEM, headers={"X-A": value})
    assert standin.requests == []


@each_call
@in_turn({"X-A": 1}, {"X-A": None}, {"X-A": b"a"}, {1: "a"}, {b"X-A": "a"})
def test_headers_are_str(headers, call, standin):
    with pytest.raises(TypeError, match="headers"):
        call("Hi", system=SYSTEM, headers=headers)
    assert standin.requests == []


LOOP = []
LOOP.append(LOOP)


@two_calls
@in_turn(float("nan"), float("inf"), [1, {"a": -float("inf")}], {1}, b"a",
         {"a": object()}, {("a",): 1}, LOOP, 1j)
def test_what_json_cannot_say_is_refused_by_name(value, call, standin):
    with pytest.raises((ValueError, TypeError), match="top_k"):
        call("Hi", system=SYSTEM, temperature=1, top_k=value, seed=2)
    assert standin.requests == []


@each_call
@in_turn(
    ({"messages": [{"role": "user", "content": {1}}]}, "messages"),
    ({"messages": [{"role": "user", "content": b"Hi"}]}, "messages"),
    ({"tools": [{"name": float("nan")}]}, "tools"))
def test_what_json_cannot_say_deep_inside(options, name, call, standin):
    with pytest.raises((ValueError, TypeError), match=name):
        call(**{"messages": "Hi", "system": SYSTEM, **options})
    assert standin.requests == []


@pytest.mark.parametrize("call", [serv.chat, message])
def test_stream_true_is_refused_with_a_pointer_to_stream(call, standin):
    with pytest.raises(ValueError, match=r"stream\(\)"):
        call("Hi", system=SYSTEM, stream=True)
    assert standin.requests == []


@each_call
@in_turn(None, 5, b"Hi", {"role": "user", "content": "Hi"}, ["Hi"], [None])
def test_messages_that_are_refused(messages, call, standin):
    with pytest.raises((ValueError, TypeError), match="messages"):
        call(messages, system=SYSTEM)
    assert standin.requests == []


@pytest.mark.parametrize("endpoint", ["", "message", "Chat", None, "models"])
def test_an_endpoint_that_is_refused(endpoint, standin):
    with pytest.raises(ValueError, match="endpoint.*chat.*messages"):
        serv.stream("Hi", system=SYSTEM, endpoint=endpoint)
    assert standin.requests == []


def test_messages_requires_max_tokens(standin):
    with pytest.raises(TypeError, match="max_tokens"):
        serv.message("Hi", system=SYSTEM)
    with pytest.raises((ValueError, TypeError), match="max_tokens"):
        serv.stream("Hi", system=SYSTEM, endpoint="messages")
    assert standin.requests == []


@pytest.mark.parametrize("call", [serv.chat, serv.message, serv.stream])
def test_only_messages_may_go_unnamed(call):
    with pytest.raises(TypeError):
        call("Hi", SYSTEM)


# ---------------------------------------------------------------------------
# Reply: the service's JSON, and the same views of both formats.
# ---------------------------------------------------------------------------

def get(answer, call=serv.chat, **headers):
    """Return the reply that a call makes of an answer's JSON."""
    with Server(http_answer(answer, **headers)) as server:
        return call("Hi", system=SYSTEM, base_url=server.url)


def get_chat(finish="stop", **entry):
    """Return the reply to a chat answer with these fields of its message."""
    return get({"object": "chat.completion", "choices": [
        {"index": 0, "message": {"role": "assistant", **entry},
         "finish_reason": finish}]})


def get_message(*blocks, stop="end_turn", **top):
    """Return the reply to a Messages answer with these blocks."""
    return get({"type": "message", "role": "assistant",
                "content": list(blocks), "stop_reason": stop, **top}, message)


def text_block(text):
    return {"type": "text", "text": text}


def views(reply):
    """Return what the views say, those that both formats share."""
    return {name: getattr(reply, name) for name in (
        "text", "thinking", "tool_calls", "stop_reason", "refusal",
        "truncated", "usage", "request_id")}


@pytest.mark.parametrize("call, stop, usage", [
    (serv.chat, "stop", {"prompt_tokens": 1, "completion_tokens": 3,
                         "total_tokens": 4}),
    (message, "end_turn", {"input_tokens": 1, "output_tokens": 3})])
def test_the_views_of_a_plain_answer(call, stop, usage):
    assert views(call("Hi", system=SYSTEM)) == {
        "text": 'You said: "Hi"', "thinking": "", "tool_calls": [],
        "stop_reason": stop, "refusal": None, "truncated": False,
        "usage": usage, "request_id": REQUEST_ID}


@each_call
def test_a_reply_is_a_dict_with_views_on_top(call):
    started = time.monotonic()
    reply = call("Hi", system=SYSTEM)
    took = time.monotonic() - started
    assert isinstance(reply, dict) and isinstance(reply, serv.Reply)
    assert str(reply) == reply.text
    assert repr(dict(reply)) in repr(reply)
    assert reply == dict(reply) and dict(reply) == reply
    assert json.loads(json.dumps(reply)) == reply
    assert 0 < reply.elapsed <= took
    for name in ("Content-Type", "content-type", "CONTENT-TYPE"):
        assert reply.headers[name].split(";")[0] in (
            "application/json", "text/event-stream")


@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy, lambda reply: pickle.loads(pickle.dumps(reply)),
    lambda reply: pickle.loads(pickle.dumps(reply, 2))])
@each_call
def test_copies_of_a_reply(call, copied):
    reply = call("Hi", system=SYSTEM)
    other = copied(reply)
    assert type(other) is serv.Reply and other == reply
    assert views(other) == views(reply)
    assert other.elapsed == reply.elapsed
    assert other.headers["x-openserv-request-id"] == REQUEST_ID


@pytest.mark.parametrize("call", [serv.chat, message])
def test_the_answer_is_whole_and_untouched(call):
    answer = {"choices": [{"message": {"content": "A", "x": 1}, "y": 2}],
              "content": [], "new": {"a": [1, None, 2.5e-9]}, "id": None,
              "text": "not a view", "headers": 1, "\u00e9": "\ud83d"}
    assert get(answer, call) == answer


@pytest.mark.parametrize("content, text", [
    ("A", "A"), ("", ""), (None, ""), ([], ""),
    ([text_block("A"), text_block("B")], "AB"),
    ([{"type": "image_url"}, text_block("A")], "A"),
    ([{"type": "thinking", "thinking": [text_block("Hm")]}, text_block("A")],
     "A")])
def test_text_of_chat(content, text):
    assert get_chat(content=content).text == text


def test_text_of_chat_is_that_of_the_first_choice():
    reply = get({"choices": [
        {"message": {"content": "A"}, "finish_reason": "stop"},
        {"message": {"content": "B"}, "finish_reason": "length"}]})
    assert (reply.text, reply.stop_reason, reply.truncated) == (
        "A", "stop", False)


@pytest.mark.parametrize("blocks, text", [
    ([], ""), ([text_block("A")], "A"),
    ([text_block("A "), {"type": "new"}, text_block("B")], "A B"),
    ([{"type": "thinking", "thinking": "Hm"}, text_block("A")], "A"),
    ([{"type": "tool_use", "id": "1", "name": "f", "input": {}}], "")])
def test_text_of_messages_is_that_of_all_text_blocks(blocks, text):
    assert get_message(*blocks).text == text


def test_text_can_always_be_encoded():
    text = get_chat(content="A \ud83d B \ud83d\ude00 \u00e9").text
    assert text == "A \ufffd B \U0001f600 \u00e9"


@pytest.mark.parametrize("entry", [
    {"reasoning_content": "Hm"}, {"reasoning": "Hm"},
    {"reasoning_content": "", "reasoning": "Hm"},
    {"content": [{"type": "thinking", "thinking": [text_block("Hm")]}]}])
def test_thinking_of_chat(entry):
    assert get_chat(**{"content": "A", **entry}).thinking == "Hm"


@pytest.mark.parametrize("entry", [
    {}, {"reasoning_content": None}, {"reasoning": ""}])
def test_no_thinking_in_chat(entry):
    assert get_chat(content="A", **entry).thinking == ""


def test_thinking_of_messages():
    reply = get_message({"type": "thinking", "thinking": "Hm, ",
                         "signature": "c2ln"},
                        {"type": "redacted_thinking", "data": "eA=="},
                        {"type": "thinking", "thinking": "yes."},
                        text_block("A"))
    assert (reply.thinking, reply.text) == ("Hm, yes.", "A")


@chat_calls
def test_reasoning_effort_brings_thinking(call):
    reply = call("Hi", system=SYSTEM, reasoning_effort="high")
    assert reply.thinking == "The user wants an answer."
    assert reply.text == 'You said: "Hi"'


@messages_calls
def test_a_thinking_block_is_kept_with_its_signature(call):
    reply = call("Hi", system=SYSTEM,
                 thinking={"type": "enabled", "budget_tokens": 1024})
    assert reply.thinking == "The user wants an answer."
    assert reply.message == {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "The user wants an answer.",
         "signature": "c2lnbmVk"}, text_block('You said: "Hi"')]}


# -- Tool calls ---------------------------------------------------------------

def chat_call(arguments, **more):
    """Return the fields of a chat message that calls f."""
    return {"content": None, "tool_calls": [{
        "id": "1", "type": "function", **more,
        "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("arguments, decoded", [
    ('{"a": [1, null], "b": {"c": "\\u00e9"}}',
     {"a": [1, None], "b": {"c": "\u00e9"}}),
    ("{}", {}), (" { } ", {}), ({"a": 1}, {"a": 1}), (None, {}), ("", ""),
    ('{"a": 1', '{"a": 1'), ("[1]", "[1]"), ("1", "1"), ("null", "null"),
    ('"a"', '"a"'), ('{"a": 1} {}', '{"a": 1} {}'), ("Paris", "Paris")])
def test_arguments_of_a_chat_call(arguments, decoded):
    [call] = get_chat(**chat_call(arguments)).tool_calls
    assert call == serv.ToolCall("1", "f", decoded)
    assert type(call.arguments) is type(decoded)


def test_calls_in_a_chat_answer_keep_their_order():
    calls = [{"id": str(n), "type": "function", "function": {
        "name": "f%d" % n, "arguments": '{"n": %d}' % n}} for n in range(3)]
    assert get_chat("tool_calls", tool_calls=calls).tool_calls == [
        ("0", "f0", {"n": 0}), ("1", "f1", {"n": 1}), ("2", "f2", {"n": 2})]


@pytest.mark.parametrize("calls", [None, [], [None], "x"])
def test_no_calls_in_a_chat_answer(calls):
    assert get_chat(content="A", tool_calls=calls).tool_calls == []


def test_calls_in_a_messages_answer_are_those_that_the_caller_is_to_run():
    reply = get_message(
        text_block("Let me see."),
        {"type": "server_tool_use", "id": "0", "name": "web_search",
         "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "0", "content": []},
        {"type": "mcp_tool_use", "id": "3", "name": "h", "input": {}},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}},
        {"type": "tool_use", "id": "2", "name": "g", "input": {}},
        stop="tool_use")
    assert reply.tool_calls == [("1", "f", {"a": [1]}), ("2", "g", {})]
    assert reply.text == "Let me see."


def test_a_tool_call_has_names():
    call = serv.ToolCall("1", "f", {"a": 2})
    assert (call.id, call.name, call.arguments) == ("1", "f", {"a": 2})
    assert pickle.loads(pickle.dumps(call)) == call == copy.copy(call)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}},
          "required": ["city"]}
CHAT_TOOL = {"type": "function", "function": {
    "name": "get_weather", "parameters": SCHEMA}}
MESSAGES_TOOL = {"name": "get_weather", "input_schema": SCHEMA}


@chat_calls
def test_a_tool_round_trip_in_chat(call, standin):
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    first = call(messages, system=SYSTEM, tools=[CHAT_TOOL])
    assert first.tool_calls == [("call_1", "get_weather", {"city": "Paris"})]
    assert (first.text, first.stop_reason) == ("", "tool_calls")
    messages.append(first.message)
    messages += [{"role": "tool", "tool_call_id": asked.id,
                  "content": "18 C in " + asked.arguments["city"]}
                 for asked in first.tool_calls]
    last = call(messages, system=SYSTEM, tools=[CHAT_TOOL])
    assert last.text == 'The tool says: "18 C in Paris"'
    entry = body_of(standin.requests[1])["messages"][2]
    assert entry["role"] == "assistant" and entry["content"] in (None, "")
    assert entry["tool_calls"] == [{
        "id": "call_1", "type": "function", "function": {
            "name": "get_weather", "arguments": '{"city": "Paris"}'}}]


@messages_calls
def test_a_tool_round_trip_in_messages(call, standin):
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    options = {"system": SYSTEM, "tools": [MESSAGES_TOOL],
               "thinking": {"type": "enabled", "budget_tokens": 1024}}
    first = call(messages, **options)
    assert first.tool_calls == [("toolu_1", "get_weather", {"city": "Paris"})]
    assert (first.text, first.stop_reason) == ("", "tool_use")
    messages.append(first.message)
    messages.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": asked.id,
         "content": "18 C in " + asked.arguments["city"]}
        for asked in first.tool_calls]})
    last = call(messages, **options)
    assert last.text == 'The tool says: "18 C in Paris"'
    assert body_of(standin.requests[1])["messages"][1] == {
        "role": "assistant", "content": [
            {"type": "thinking", "thinking": "The user wants an answer.",
             "signature": "c2lnbmVk"},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather",
             "input": {"city": "Paris"}}]}


@each_call
def test_tool_choice_none_brings_no_call(call):
    chat = call in (serv.chat, read_stream)
    reply = call("Hi", system=SYSTEM,
                 tools=[CHAT_TOOL if chat else MESSAGES_TOOL],
                 tool_choice="none" if chat else {"type": "none"})
    assert (reply.text, reply.tool_calls) == ('You said: "Hi"', [])


def test_structured_output():
    schema = {"type": "object", "properties": {
        "name": {"type": "string"}, "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}}}}
    reply = serv.chat("Ada is 36.", system=SYSTEM, response_format={
        "type": "json_schema", "json_schema": {
            "name": "person", "schema": schema}})
    assert json.loads(reply.text) == {
        "name": "a name", "age": 3, "tags": ["a tags"]}


# -- Why it stopped, and the next turn ----------------------------------------

@pytest.mark.parametrize("finish, entry, refusal", [
    ("stop", {"content": "A"}, None),
    ("stop", {"content": "A", "refusal": None}, None),
    ("stop", {"content": "A", "refusal": ""}, None),
    ("stop", {"content": None}, None),
    ("length", {"content": "A"}, None),
    ("tool_calls", {"content": None}, None),
    ("stop", {"content": None, "refusal": "No."}, "No."),
    ("content_filter", {"content": "I can't share that."}, "content_filter"),
    ("content_filter", {"content": None}, "content_filter"),
    ("content_filter", {"content": None, "refusal": "No."}, "No."),
    ("stop", {"content": [{"type": "refusal", "refusal": "No."}]}, "No.")])
def test_refusals_in_chat(finish, entry, refusal):
    assert get_chat(finish, **entry).refusal == refusal


@pytest.mark.parametrize("stop, refusal", [
    ("end_turn", None), ("max_tokens", None), ("tool_use", None),
    (None, None), ("new", None), ("refusal", "refusal")])
def test_refusals_in_messages(stop, refusal):
    assert get_message(text_block("A"), stop=stop).refusal == refusal


@each_call
def test_a_blocked_answer(call):
    reply = call("blocked, please", system=SYSTEM)
    refusal = "content_filter" if call in CALLS[:2] else "refusal"
    assert (reply.text, reply.refusal, reply.stop_reason) == (
        "I can't share that.", refusal, refusal)


@pytest.mark.parametrize("finish, truncated", [
    ("length", True), ("stop", False), ("content_filter", False),
    ("tool_calls", False), (None, False), ("new", False)])
def test_truncated_in_chat(finish, truncated):
    reply = get_chat(finish, content="A")
    assert (reply.truncated, reply.stop_reason) == (truncated, finish)


@pytest.mark.parametrize("stop, truncated", [
    ("max_tokens", True), ("model_context_window_exceeded", True),
    ("end_turn", False), ("stop_sequence", False), ("pause_turn", False),
    (None, False)])
def test_truncated_in_messages(stop, truncated):
    reply = get_message(text_block("A"), stop=stop)
    assert (reply.truncated, reply.stop_reason) == (truncated, stop)


@each_call
def test_an_answer_cut_off_by_the_limit(call):
    limit = "max_completion_tokens" if call in CALLS[:2] else "max_tokens"
    reply = call("one two three", system=SYSTEM, **{limit: 3})
    assert (reply.text, reply.truncated) == ('You said: "one', True)


@each_call
def test_the_next_turn(call, standin):
    messages = [{"role": "user", "content": "Hi"}]
    reply = call(messages, system=SYSTEM)
    messages += [reply.message, {"role": "user", "content": "And now?"}]
    assert call(messages, system=SYSTEM).text == 'You said: "And now?"'
    turns = body_of(standin.requests[1])["messages"][-3:]
    assert turns[0] == ASKED and turns[1]["role"] == "assistant"
    assert turns[1]["content"] in (
        'You said: "Hi"', [text_block('You said: "Hi"')])


def test_the_entry_of_chat_is_the_answers_own():
    entry = {"role": "assistant", "content": None, "refusal": "No.", "new": 1}
    assert get({"choices": [{"message": entry}]}).message == entry


def test_the_entry_of_messages_holds_all_blocks():
    blocks = [{"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
              {"type": "redacted_thinking", "data": "eA=="},
              {"type": "new", "x": None}, text_block("A"),
              {"type": "tool_use", "id": "1", "name": "f", "input": {}}]
    assert get_message(*blocks).message == {"role": "assistant",
                                            "content": blocks}


# -- The rest of the views ----------------------------------------------------

@pytest.mark.parametrize("usage, seen", [
    ({"total_tokens": 0}, {"total_tokens": 0}), ({}, {}), (None, {}),
    ([], {}), (3, {})])
def test_usage(usage, seen):
    assert get_message(usage=usage).usage == seen


def test_no_usage():
    assert get_chat(content="A").usage == {}


@pytest.mark.parametrize("headers, seen", [
    ({"x_openserv_request_id": "a", "x_request_id": "b", "request_id": "c"},
     "a"),
    ({"request_id": "c", "x_request_id": "b"}, "b"),
    ({"request_id": "c"}, "c"), ({"X_OPENSERV_REQUEST_ID": "a"}, "a"),
    ({"x_openserv_request_id": "", "request_id": "c"}, "c"), ({}, None)])
def test_request_id(headers, seen):
    assert get(REPLY, **headers).request_id == seen


@pytest.mark.parametrize("choice", [
    {}, {"message": None}, {"message": {}}, {"message": "x"}, None, "x",
    {"message": {"content": 5, "tool_calls": 6, "refusal": None}}])
def test_an_odd_choice_breaks_no_view(choice):
    reply = get({"choices": [choice]})
    assert views(reply) == {
        "text": "", "thinking": "", "tool_calls": [], "stop_reason": None,
        "refusal": None, "truncated": False, "usage": {}, "request_id": None}
    assert isinstance(reply.message, dict)


@pytest.mark.parametrize("block", [
    None, "x", {}, {"type": None}, {"type": "text"}, {"type": "thinking"},
    {"type": "text", "text": None}, {"type": "thinking", "thinking": 5}])
def test_an_odd_block_breaks_no_view(block):
    reply = get_message(block, text_block("A"), stop=None)
    assert views(reply) == {
        "text": "A", "thinking": "", "tool_calls": [], "stop_reason": None,
        "refusal": None, "truncated": False, "usage": {}, "request_id": None}
    assert reply.message["content"] == [block, text_block("A")]


# ---------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------

SCRIPT = os.path.abspath(serv.__file__)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command line here; return its status, output and errors."""
    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return (serv.main(list(argv)), *capsys.readouterr())
    return run


def start(*argv, **options):
    """Start the command line as a process of its own."""
    python = [sys.executable, "-S", "-W", "error"]  # -S: half the time
    return subprocess.Popen([*python, SCRIPT, *argv], **{
        "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE, **options})


def run_process(*argv, stdin=b"", **environment):
    """Run the command line in a process; return status, output, errors."""
    with start(*argv, stdin=subprocess.PIPE,
               env={**os.environ, **environment}) as process:
        out, err = process.communicate(stdin, 20)
    return process.returncode, out, err


def one_line(err):
    """Whether errors are one line as they ought to be."""
    return re.fullmatch("serv: [^\n\r]+\n", err) is not None


HI = 'You said: "Hi"\n'
each_endpoint = pytest.mark.parametrize("endpoint", ["chat", "messages"])
each_way = pytest.mark.parametrize("way", [(), ("--no-stream",)])


@each_way
@each_endpoint
def test_only_the_answer_is_printed(endpoint, way, cli):
    assert cli("-e", endpoint, *way, "Hi") == (0, HI, "")


@at_once(([SCRIPT],), (["-m", "serv"],))
def test_as_a_script_and_as_a_module(way):
    done = subprocess.run(
        [sys.executable, "-W", "error", *way, "Hi"], timeout=20,
        cwd=os.path.dirname(SCRIPT), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, HI.encode(), b"")


def test_the_stand_in_can_be_tried_without_a_key_or_pytest():
    folders = [os.path.dirname(os.path.abspath(__file__)),
               os.path.dirname(SCRIPT)]
    code = ("import sys; import %s as tests; "
            "sys.exit(tests.demo(sys.argv[1:]))" % __name__)
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code, "Hello!"], timeout=20,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PYTHONPATH": os.pathsep.join(folders),
             "PYTHONDONTWRITEBYTECODE": "1", "http_proxy": "http://none"})
    assert (shown.returncode, shown.stdout.decode().splitlines()) == (
        0, ['You said: "Hello!"'])


@pytest.mark.parametrize("argv, stdin, prompt", [
    (["Hi"], "", "Hi"), (["a", "b  c", "d"], "", "a b  c d"),
    ([], "piped", "piped"), (["-"], "piped", "piped"),
    (["Sum", "up:"], "piped\ntext", "Sum up:\n\npiped\ntext"),
    (["Sum up:", "-"], "piped", "Sum up:\n\npiped"),
    (["a", "-m", "x", "b"], "", "a b"),
    (["\u00e9"], "\U0001f600", "\u00e9\n\n\U0001f600")])
def test_the_prompt(argv, stdin, prompt, cli, standin):
    status, _, err = cli(*argv, stdin=stdin)
    assert (status, err) == (0, "")
    assert sent(standin)["messages"][-1] == {"role": "user",
                                             "content": prompt}


def test_the_indentation_of_a_piped_prompt_is_kept(cli, standin):
    assert cli(stdin="    indented\n  less\n")[0] == 0
    prompt = sent(standin)["messages"][-1]["content"]
    assert prompt.rstrip("\n") == "    indented\n  less"


@pytest.mark.parametrize("argv", [[], ["-"], [""], ["-", "-"]])
def test_no_prompt_is_wrong_usage(argv, cli, standin):
    status, out, err = cli(*argv)
    assert (status, out, one_line(err)) == (2, "", True)
    assert standin.requests == []


@pytest.mark.parametrize("endpoint, argv, body", [
    ("chat", [], {}), ("messages", [], {"max_tokens": 4096}),
    ("chat", ["-n", "7"], {"max_completion_tokens": 7}),
    ("messages", ["-n", "7"], {"max_tokens": 7}),
    ("messages", ["--max-tokens", "7"], {"max_tokens": 7}),
    ("messages", ["-o", "max_tokens=8"], {"max_tokens": 8}),
    ("chat", ["-o", "max_tokens=8"], {"max_tokens": 8}),
    ("chat", ["-o", "temperature=0.5", "-o", "stop=[\"a\", null]",
              "--option", "user=ann", "-o", "x={\"y\": true}", "-o", "z=",
              "-o", "e=a=b", "-o", "q=\"1\"", "-o", "t=true"],
     {"temperature": 0.5, "stop": ["a", None], "user": "ann",
      "x": {"y": True}, "z": "", "e": "a=b", "q": "1", "t": True})])
@each_way
def test_the_parameters_that_are_sent(endpoint, argv, body, way, cli,
                                      standin):
    assert cli("-s", SYSTEM, "-e", endpoint, *way, *argv, "Hi")[0] == 0
    prompt = ({"messages": [{"role": "system", "content": SYSTEM}, ASKED]}
              if endpoint == "chat" else
              {"system": SYSTEM, "messages": [ASKED]})
    streamed = {} if way else {"stream": True}
    assert sent(standin) == {"model": MODEL, **prompt, **streamed, **body}


@each_endpoint
def test_a_limit_of_0_is_not_passed_over(endpoint, cli, standin):
    status, _, err = cli("-e", endpoint, "-n", "0", "Hi")
    limits = [body_of(request).get("max_tokens" if endpoint == "messages"
                                   else "max_completion_tokens")
              for request in standin.requests]
    assert (status, limits) in ((2, []), (3, [0]))
    assert one_line(err)


@each_endpoint
def test_the_model(endpoint, cli, standin, monkeypatch):
    monkeypatch.setenv("SERV_MODEL", "from-the-variable")
    cli("-e", endpoint, "Hi")
    cli("-e", endpoint, "--model", "from-the-flag", "Hi")
    monkeypatch.setenv("SERV_MODEL", "")
    cli("-e", endpoint, "Hi")
    monkeypatch.delenv("SERV_MODEL")
    cli("-e", endpoint, "Hi")
    example = {"chat": "gpt-5.4-mini", "messages": "claude-haiku-4.5"}
    assert [body_of(r)["model"] for r in standin.requests] == [
        "from-the-variable", "from-the-flag"] + [example[endpoint]] * 2


def test_the_system_prompt(cli, standin):
    cli("Hi")
    cli("--system", "Rhyme.", "Hi")
    first, second = [body_of(r)["messages"][0] for r in standin.requests]
    assert first["role"] == "system" and "helpful" in first["content"]
    assert second == {"role": "system", "content": "Rhyme."}


@each_way
def test_headers_of_the_command_line(way, cli, standin):
    cli("-H", "X-A: 1: 2", "--header", "user-agent:mine", *way, "Hi")
    [request] = standin.requests
    assert request.headers["x-a"] == "1: 2"
    assert request.headers["user-agent"] == "mine"


@each_endpoint
def test_json_prints_the_whole_reply(endpoint, cli, standin):
    status, out, err = cli("-e", endpoint, "--json", "Hi \u00e9")
    build = chat_answer if endpoint == "chat" else messages_answer
    assert (status, err) == (0, "")
    assert json.loads(out) == build(sent(standin))


@each_endpoint
def test_verbose_tells_id_time_and_tokens_on_stderr(endpoint, cli):
    status, out, err = cli("-v", "-e", endpoint, "-o",
                           'stream_options={"include_usage": true}', "Hi")
    assert (status, out, one_line(err)) == (0, HI, True)
    assert REQUEST_ID in err and re.search(r"\d\.\d+ ?s", err)
    assert re.search(r"tokens\D+1\b", err) and re.search(r"tokens\D+3\b", err)


@pytest.mark.parametrize("flag", ["--version", "--help", "-h"])
def test_flags_that_ask_the_program(flag, cli, standin, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    status, out, err = cli(flag)
    assert (status, err) == (0, "")
    assert ("usage:" in out) == (flag != "--version")
    assert (serv.__version__ in out) == (flag == "--version")
    assert standin.requests == []


def test_no_flag_takes_the_key(cli, standin):
    assert "key" not in re.findall(r"--([a-z-]+)", cli("--help")[1])
    for argv in (["--api-key", "x"], ["--key=x"], ["-o", "api_key=sk-x"]):
        status, out, err = cli(*argv, "Hi")
        assert (status, out, one_line(err)) == (2, "", True)
        assert "sk-x" not in err
    assert standin.requests == []


# -- Exit status, and what goes where -----------------------------------------

@pytest.mark.parametrize("argv", [
    ["-e", "models", "Hi"], ["-n", "few", "Hi"], ["-n"], ["--unknown", "Hi"],
    ["-o", "temperature", "Hi"], ["-o", "=1", "Hi"], ["-H", "X-A", "Hi"],
    ["-H", ": a", "Hi"], ["-H", "Host: a", "Hi"], ["-s", "", "Hi"],
    ["-o", "model=m", "Hi"], ["-o", "stream=true", "Hi"],
    ["-o", "messages=[]", "Hi"], ["-o", "system=Rhyme.", "Hi"],
    ["-o", "timeout=1", "Hi"], ["-o", "max_retries=0", "Hi"],
    ["-o", "base_url=http://h", "Hi"], ["-o", "headers={}", "Hi"],
    ["-o", "endpoint=messages", "Hi"],
    ["-H", "X-A: a\nX-B: b", "Hi"]])
def test_wrong_usage(argv, cli, standin):
    status, out, err = cli(*argv)
    assert (status, out, one_line(err)) == (2, "", True), err
    assert standin.requests == []


@pytest.mark.parametrize("name, value", [
    ("SERV_BASE_URL", "example.com"), ("SERV_TIMEOUT", "soon")])
def test_a_wrong_variable(name, value, cli, standin, monkeypatch):
    monkeypatch.setenv(name, value)
    status, out, err = cli("Hi")
    assert (status, out, one_line(err)) == (2, "", True)
    assert standin.requests == []


@pytest.mark.parametrize("key", ["", "\n", "serv_\u2026"])
@each_way
@each_endpoint
def test_no_usable_key(endpoint, way, key, cli, standin, monkeypatch):
    monkeypatch.setenv("SERV_API_KEY", key)
    status, out, err = cli("-e", endpoint, *way, "Hi")
    assert (status, out, one_line(err)) == (1, "", True)
    assert standin.requests == []


def say_no(told, status="400 Bad Request"):
    return http_answer({"error": {"type": "invalid_request_error",
                                  "message": told}}, status,
                       x_openserv_request_id=REQUEST_ID)


@pytest.mark.parametrize("answer, says", [
    (say_no("No such thing."), "No such thing."),
    (say_no("Line 1\r\nline\x1b[2J 2\u2028line 3"), "Line 1"),
    (say_no("\u00e9" * 5000), "\u00e9"),
    (http_answer(b"<html>\n<h1>Bad gateway</h1>\n</html>",
                 "502 Bad Gateway", "text/html", x_should_retry="false"),
     "502"),
    (http_answer(b"<html>\nSign in\n</html>", kind="text/html"), "Sign in"),
    (http_head("301 Moved", location="http://elsewhere", content_length=0),
     "http://elsewhere"),
    (say_no("Your key %s is bad." % KEY, "401 Unauthorized"), "401")])
@each_way
def test_a_failed_call(answer, says, way, cli, monkeypatch):
    with Server(answer) as server:
        monkeypatch.setenv("SERV_BASE_URL", server.url)
        status, out, err = cli(*way, "Hi")
    assert (status, out, one_line(err)) == (1, "", True), err
    assert says in err and KEY not in err
    assert len(err.splitlines()) == 1 and err[:-1].isprintable()


def test_no_connection(cli, monkeypatch):
    with Server(b"") as server:
        pass
    monkeypatch.setenv("SERV_BASE_URL", server.url)
    monkeypatch.setenv("SERV_TIMEOUT", "0.3")
    status, out, err = cli("Hi")
    assert (status, out, one_line(err)) == (1, "", True)


def delta(text, reason=None):
    """Return a chunk of a chat stream."""
    return {"object": "chat.completion.chunk", "choices": [{
        "index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def test_a_cut_stream(cli, monkeypatch):
    data = http_head(kind="text/event-stream") + sse(delta("Half an"))
    with Server([lambda wire, request: wire.sendall(data) or False]) as server:
        monkeypatch.setenv("SERV_BASE_URL", server.url)
        status, out, err = cli("Hi")
    assert (status, out.rstrip("\n"), one_line(err)) == (1, "Half an", True)


@each_way
@each_endpoint
def test_a_blocked_answer_ends_with_3(endpoint, way, cli):
    status, out, err = cli("-e", endpoint, *way, "blocked")
    assert (status, out) == (3, "I can't share that.\n")
    assert one_line(err) and "blocked" in err


@each_way
@each_endpoint
def test_an_answer_that_was_cut_off_ends_with_3(endpoint, way, cli):
    status, out, err = cli("-e", endpoint, "-n", "2", *way, "Hi")
    assert (status, out) == (3, "You said:\n")
    assert one_line(err) and "token limit" in err


@pytest.mark.parametrize("argv", [["blocked"], ["-n", "2", "Hi"]])
@each_endpoint
def test_with_json_too(endpoint, argv, cli, standin):
    status, out, err = cli("-e", endpoint, "--json", *argv)
    build = chat_answer if endpoint == "chat" else messages_answer
    assert (status, json.loads(out)) == (3, build(sent(standin)))
    assert one_line(err)


# -- The command that is printed, run for real --------------------------------

NASTY = ["$HOME `id` $(id) \\ \"q\" 'p' !", "@/etc/hostname",
         "\u00e9\U0001f600", "a\nb\n\nc\t%d%%", "'; exit 1; '"]


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")


@needs_curl
@pytest.mark.parametrize("argv", [
    ["-H", "X-A: 'b' $c \"d\" @e", "-o", "x={\"y\": \"$z\"}", *NASTY],
    ["-e", "messages", "-n", "9", "-s", "'$HOME'\n", "--no-stream", "Hi"],
    ["-H", "User-Agent: mine", "-H", "X-Empty:", "Hi"],
    ["-m", "a/b'c", "-H", "Accept: */*", "Hi"],
    ["-H", "authorization: Bearer " + KEY, "Hi"],
    ["What is 'Authorization: Bearer $SERV_API_KEY' in it?"],
    ["-H", "X-Too: Authorization: Bearer $SERV_API_KEY", "Hi"]])
def test_a_dry_run_prints_what_curl_then_sends(argv, cli, standin, tmp_path,
                                               monkeypatch):
    assert cli(*argv)[0] == 0
    monkeypatch.delenv("SERV_API_KEY")  # it needs none
    status, out, err = cli("--dry-run", *argv)
    assert (status, err, len(standin.requests)) == (0, "", 1)
    run_shell(out, tmp_path)
    ours, curls = standin.requests
    assert curls[:4] == ours[:4]


def run_shell(command, home):
    """Run a command that is to say nothing on standard error."""
    shell = subprocess.run(
        ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        timeout=20, env={**os.environ, "HOME": str(home), "SERV_API_KEY": KEY})
    assert (shell.returncode, shell.stderr) == (0, b"")


@pytest.mark.parametrize("key, said, status", [
    (KEY, b'You said: "Hi"\n', 0), ("", b"", 1)])
def test_standard_error_may_be_closed(key, said, status, standin):
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, SCRIPT, "Hi"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=20,
        env={**os.environ, "SERV_API_KEY": key, "SERV_BASE_URL": standin.url})
    assert (shell.stdout, shell.returncode) == (said, status)


def test_standard_output_may_not_be_closed(standin):
    """Nothing is asked, which would be billed and read by nobody."""
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, SCRIPT, "Hi"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=20,
        env={**os.environ, "SERV_BASE_URL": standin.url})
    assert (shell.stderr, shell.returncode, standin.requests) == (
        b"serv: standard output is closed\n", 1, [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this one")
def test_standard_error_may_be_full(standin):
    run = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", sys.executable, SCRIPT,
         "Hi"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=20,
        env={**os.environ, "SERV_BASE_URL": standin.url})
    assert (run.stdout, run.returncode) == (b'You said: "Hi"\n', 0)


@needs_curl
@pytest.mark.parametrize("path", ["/it's/$HOME", "/{a,b}/[1-2]", "/a/../b"])
def test_a_dry_run_of_a_base_url_with_odd_characters(path, cli, tmp_path,
                                                     monkeypatch):
    with Server(http_answer(REPLY)) as server:
        monkeypatch.setenv("SERV_BASE_URL", server.url + path)
        assert cli("--no-stream", "Hi")[0] == 0
        run_shell(cli("--no-stream", "--dry-run", "Hi")[1], tmp_path)
    ours, curls = server.requests
    assert curls[:4] == ours[:4]


@each_endpoint
def test_a_dry_run_sends_nothing_and_does_not_show_the_key(endpoint, cli,
                                                           standin):
    status, out, err = cli("-e", endpoint, "--dry-run", "Hi")
    assert (status, err) == (0, "")
    assert out.startswith("curl ")
    assert "$SERV_API_KEY" in out and KEY not in out
    assert standin.requests == []


# -- Processes: pipes, signals, terminals -------------------------------------

class Pausing:
    """A service that streams a piece, then waits to be told to go on."""

    def __init__(self, first, *rest):
        self.first, self.rest = delta(first), rest
        self.go_on = threading.Event()

    def __call__(self, wire, request):
        wire.sendall(http_head(kind="text/event-stream") + sse(self.first))
        if self.go_on.wait(20):
            for event in self.rest:
                wire.sendall(sse(event))
        return False


@pytest.fixture
def pausing(monkeypatch):
    """Start a service that pauses; the SERV_ variables lead to it."""
    servers = []

    def run(*texts):
        service = Pausing(*texts)
        servers.append((service, Server(service)))
        monkeypatch.setenv("SERV_BASE_URL", servers[-1][1].url)
        return service.go_on
    yield run
    for service, server in servers:
        service.go_on.set()
        server.stop()


def test_pieces_are_printed_as_they_come(pausing):
    go_on = pausing("One ", delta("two", "stop"), "[DONE]")
    with start("Hi") as process:
        assert process.stdout.read(4) == b"One "
        go_on.set()
        assert process.communicate(timeout=20) == (b"two\n", b"")
    assert process.returncode == 0


@pytest.fixture
def interrupts():
    """Let processes be interrupted also where the tests themselves cannot."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_answer(pausing, interrupts):
    pausing("One ")
    with start("Hi") as process:
        assert process.stdout.read(4) == b"One "
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (130, b"")
    assert one_line(err.decode()) and b"interrupted" in err


@at_once(((),), (("--no-stream",),))
def test_an_interrupt_while_waiting(way, interrupts):
    came = threading.Event()

    def silent(wire, request):
        came.set()

    with Server(silent) as server:
        with start(*way, "Hi", env={
                **os.environ, "SERV_BASE_URL": server.url}) as process:
            assert came.wait(20)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"")
    assert one_line(err.decode()) and b"interrupted" in err


def test_a_closed_pipe_ends_it_quietly(pausing):
    go_on = pausing("One ", *[delta("two " * 1000)] * 100, "[DONE]")
    with start("Hi") as process:
        assert process.stdout.read(4) == b"One "
        process.stdout.close()
        go_on.set()
        err = process.stderr.read()
        assert (process.wait(20), err) == (1, b"")


@at_once(("--no-stream",), ("--dry-run",), ("--help",))
def test_a_pipe_that_was_closed_before(way):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with start(way, "Hi", stdout=writer) as process:
            err = process.stderr.read()
            assert (process.wait(20), err) == (1, b"")
    finally:
        os.close(writer)


@at_once(
    (["Echo"], "d\u00e9j\u00e0 \U0001f600".encode(),
     "Echo\n\nd\u00e9j\u00e0 \U0001f600"),
    ([], b"a \xff b", "a \ufffd b"), ([b"a \xff b"], b"", "a \ufffd b"))
def test_bytes_are_text_and_not_fatal_where_they_are_none(argv, stdin, prompt):
    with Server(service) as server:
        status, out, err = run_process(
            *argv, stdin=stdin, PYTHONUTF8="1", SERV_BASE_URL=server.url)
    assert (status, err) == (0, b"")
    assert out.decode() == 'You said: "%s"\n' % prompt
    assert sent(server)["messages"][1]["content"] == prompt


@at_once(((),), (("--json",),))
def test_what_the_terminals_encoding_cannot_say_is_replaced(way):
    status, out, err = run_process(
        *way, "d\u00e9j\u00e0", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (status, err) == (0, b"")
    assert b"d?j?" in out and out.isascii()


@at_once(("--no-stream",), ("--json",))
def test_half_a_character_is_replaced(way):
    answer = chat_answer({"model": MODEL, "messages": [
        {"role": "user", "content": "a \ud83d b"}]})
    with Server(http_answer(answer)) as server:
        status, out, err = run_process(way, "Hi", SERV_BASE_URL=server.url)
    assert (status, err) == (0, b"")
    assert b"a \xef\xbf\xbd b" in out or b"a ? b" in out


def test_an_error_in_an_encoding_that_cannot_say_it():
    with Server(say_no("No \u00e9.")) as server:
        status, out, err = run_process("Hi", PYTHONIOENCODING="ascii",
                                       SERV_BASE_URL=server.url)
    assert (status, out) == (1, b"")
    assert one_line(err.decode("ascii")) and b"No ?." in err


@pytest.mark.skipif(not shutil.which("sh"), reason="needs sh")
def test_standard_input_that_is_closed():
    shell = subprocess.run(
        ["sh", "-c", 'exec "$0" "$1" Hi <&-', sys.executable, SCRIPT],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert (shell.returncode, shell.stdout, shell.stderr) == (
        0, HI.encode(), b"")


def on_screen(data):
    """Return what a line of a terminal shows after some output."""
    line, column = [], 0
    for part in re.findall("\r|\x1b\\[K|\x1b\\[2K|.", data):
        if part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            del line[column if part == "\x1b[K" else 0:]
        else:
            line[column:column + 1] = part
            column += 1
    return "".join(line).rstrip()


def read_terminal(terminal, until):
    """Read what is written to a terminal up to a text."""
    data = ""
    while until not in data:
        data += os.read(terminal, 1000).decode()
    return data


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs terminals")
@at_once(((),), (("--no-stream",),))
def test_on_a_terminal_a_note_says_what_is_waited_for(way):
    came, go_on = threading.Event(), threading.Event()

    def slow(wire, request):
        came.set()
        return go_on.wait(20) and service(wire, request)

    terminal, line = os.openpty()
    try:
        with Server(slow) as server:
            with start(*way, "Hi", stdin=line, stderr=line, env={
                    **os.environ, "SERV_BASE_URL": server.url}) as process:
                try:
                    note = read_terminal(terminal, MODEL)
                    assert came.wait(20)
                finally:
                    go_on.set()
                assert process.stdout.read() == HI.encode()
                assert process.wait(20) == 0
            os.write(line, b"#")  # after all that the process wrote
            rest = read_terminal(terminal, "#")
    finally:
        os.close(terminal)
        os.close(line)
    assert on_screen(note) == on_screen(note).strip() != ""
    assert on_screen(note + rest) == "#"


# ---------------------------------------------------------------------------
# Live: the service itself, or any other that speaks both formats.  They cost
# money, so they run only where SERV_LIVE is 1; SERV_BASE_URL, SERV_API_KEY
# and SERV_MODEL say where.  What a model says is its own affair: these tests
# look at the shapes only.
# ---------------------------------------------------------------------------

WEATHER = "What is the weather in Paris?"


def whole(reply):
    """Whether a reply has all that an answer ought to have."""
    return (isinstance(reply.text, str) and bool(reply.stop_reason)
            and reply.refusal is None and reply.elapsed > 0
            and json.loads(json.dumps(reply)) == reply)


def limit(call):
    """Return the limit of an answer, as the endpoint wants it named."""
    chat = call in ("chat", serv.chat, read_stream)
    return {"max_completion_tokens" if chat else "max_tokens": 200}


@each_call
def test_live_turns(call, real):
    messages = [{"role": "user", "content": "My name is Ada. Say hello."}]
    for question in ("What is my name?", "Thank you!"):
        reply = call(messages, system=SYSTEM, **limit(call))
        assert whole(reply) and reply.text
        assert reply.message["role"] == "assistant"
        messages += [reply.message, {"role": "user", "content": question}]


@each_endpoint
def test_live_stream(endpoint, real):
    with serv.stream("Count to five.", endpoint=endpoint, system=SYSTEM,
                     **limit(endpoint)) as pieces:
        texts = list(pieces)
    assert len(texts) > 1 and all(texts)
    assert "".join(texts) == pieces.reply.text
    assert whole(pieces.reply)


@each_endpoint
def test_live_events(endpoint, real):
    with serv.stream("Say hello.", endpoint=endpoint, system=SYSTEM,
                     **limit(endpoint)) as stream:
        events = list(stream.events())
    if endpoint == "chat":
        assert all("choices" in event for event in events)
    else:
        kinds = [event["type"] for event in events if event["type"] != "ping"]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert whole(stream.reply) and stream.reply.text


@chat_calls
def test_live_tool_round_trip_in_chat(call, real):
    messages = [{"role": "user", "content": WEATHER}]
    first = call(messages, system=SYSTEM, tools=[CHAT_TOOL],
                 tool_choice="required", **limit(call))
    assert whole(first) and first.tool_calls
    for asked in first.tool_calls:
        assert asked.id and asked.name == "get_weather"
        assert isinstance(asked.arguments["city"], str)
    messages.append(first.message)
    messages += [{"role": "tool", "tool_call_id": asked.id, "content": "18 C"}
                 for asked in first.tool_calls]
    last = call(messages, system=SYSTEM, tools=[CHAT_TOOL],
                tool_choice="none", **limit(call))
    assert whole(last) and last.text and not last.tool_calls


@messages_calls
def test_live_tool_round_trip_in_messages(call, real):
    messages = [{"role": "user", "content": WEATHER}]
    first = call(messages, system=SYSTEM, tools=[MESSAGES_TOOL],
                 tool_choice={"type": "any"}, **limit(call))
    assert whole(first) and first.tool_calls
    for asked in first.tool_calls:
        assert asked.id and asked.name == "get_weather"
        assert isinstance(asked.arguments["city"], str)
    messages.append(first.message)
    messages.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": asked.id, "content": "18 C"}
        for asked in first.tool_calls]})
    last = call(messages, system=SYSTEM, tools=[MESSAGES_TOOL], **limit(call))
    assert whole(last)


@each_call
def test_live_refusals_by_the_server(call, real):
    with pytest.raises(serv.AuthenticationError) as caught:
        call("Hi", system=SYSTEM, api_key="sk-no-such-key", **limit(call))
    assert caught.value.status == 401
    assert "sk-no-such-key" not in str(caught.value)


@each_way
@each_endpoint
def test_live_command_line(endpoint, way, real, cli):
    status, out, err = cli("-v", "-e", endpoint, "-n", "100", *way, "Hello!")
    assert status in (0, 3) and out.strip()
    assert err.startswith("serv: request id ")


# ---------------------------------------------------------------------------
# Server-sent events, by the WHATWG rules.
# ---------------------------------------------------------------------------

SSE_CASES = [
    # Which lines there are: LF, CRLF and CR end one, and nothing else does.
    (b"data: a\n\ndata: b\n\n", [("message", "a"), ("message", "b")]),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", [("message", "a"), ("message", "b")]),
    (b"data: a\r\rdata: b\r\r", [("message", "a"), ("message", "b")]),
    (b"data: a\r\n\ndata: b\n\r\n", [("message", "a"), ("message", "b")]),
    (b"data: a\ndata: b\rdata: c\r\ndata\n\n", [("message", "a\nb\nc\n")]),
    (b"data: a\x0bb\x0cc\x1cd\x1de\x1ef\x00g\n\n",
     [("message", "a\vb\fc\x1cd\x1de\x1ef\0g")]),
    ("data: a\u0085b\u2028c\u2029\n\n".encode(),
     [("message", "a\u0085b\u2028c\u2029")]),
    # What a line says: a field and its value, less one space.
    (b"data:a\n\n", [("message", "a")]),
    (b"data:  a \n\n", [("message", " a ")]),
    (b"data:\ta: b\n\n", [("message", "\ta: b")]),
    (b"data\n\n", [("message", "")]),
    (b"data:\n\n", [("message", "")]),
    (b"data\ndata\n\n", [("message", "\n")]),
    (b"data: {\ndata:\ndata: }\n\n", [("message", "{\n\n}")]),
    (b": data: a\n:\n\n", []),
    (b": a comment\ndata: a\n: another\n\n", [("message", "a")]),
    (b"id: 1\nretry: 3000\nretry: soon\ndata: a\nnew: b\n\n",
     [("message", "a")]),
    (b"DATA: a\n data: b\ndata : c\ndat: d\ndatas: e\n\n", []),
    # What an event is called, and for how long.
    (b"event: ping\ndata: a\n\ndata: b\n\n",
     [("ping", "a"), ("message", "b")]),
    (b"data: a\nevent: ping\n\n", [("ping", "a")]),
    (b"event: first\nevent: last\ndata: a\n\n", [("last", "a")]),
    (b"event: ping\nevent\ndata: a\n\n", [("message", "a")]),
    (b"event: ping\n\ndata: a\n\n", [("message", "a")]),
    (b"event: ping\nid: 1\n\n", []),
    # One byte order mark is dropped, at the very start.
    (b"\xef\xbb\xbfdata: a\n\n", [("message", "a")]),
    (b"\xef\xbb\xbf\ndata: a\n\n", [("message", "a")]),
    (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [("message", "a")]),
    (b"data: \xef\xbb\xbfa\n\n", [("message", "\ufeffa")]),
    # Text is UTF-8, and what is not becomes U+FFFD.
    ("event: \u00e9\ndata: \u20ac \U0001f600\n\n".encode(),
     [("\u00e9", "\u20ac \U0001f600")]),
    (b"data: \xff\xfea\xe2\x82\n\n", [("message", "\ufffd\ufffda\ufffd")]),
    # What is pending at the end is discarded.
    (b"", []),
    (b"\n\r\n\r", []),
    (b"data: a\n\ndata: lost", [("message", "a")]),
    (b"data: a\n\ndata: lost\n", [("message", "a")]),
    (b"data: a\n\ndata: lost\r\n", [("message", "a")]),
]


@pytest.mark.parametrize("data, pairs", SSE_CASES)
def test_events_are_read_however_they_are_cut(data, pairs):
    drops = [data[i:i + 1] for i in range(len(data))]
    assert list(serv.iter_events([data])) == pairs
    assert list(serv.iter_events(drops)) == pairs
    assert list(serv.iter_events(
        itertools.chain.from_iterable((b"", drop, b"") for drop in drops)
    )) == pairs
    for cut in range(len(data)):
        assert list(serv.iter_events([data[:cut], data[cut:]])) == pairs


@pytest.mark.parametrize("junk", [b":\xff\xfe\ndata: lost", b"lost\n", b"\0"])
@in_turn(*SSE_CASES)
def test_junk_behind_events_does_not_change_them(data, pairs, junk):
    assert list(serv.iter_events([data + junk])) == pairs
    assert list(serv.iter_events([data, junk])) == pairs


def test_an_event_is_there_with_its_last_byte():
    def chunks():
        for data in (b"data: a\n", b"\n", b"data: b\r", b"\r"):
            yield data
            sent.append(data)
    sent = []
    events = serv.iter_events(chunks())
    assert (next(events), len(sent)) == (("message", "a"), 1)
    assert (next(events), len(sent)) == (("message", "b"), 3)


@pytest.mark.parametrize("size", [64, 65536])
def test_a_line_of_5_megabytes_in_pieces(size):
    data = b"data: " + b"x" * 5000000 + b"\n\n"
    pieces = (data[i:i + size] for i in range(0, len(data), size))
    assert list(serv.iter_events(pieces)) == [("message", "x" * 5000000)]


@pytest.mark.parametrize("line", [b"", b"data: ", b"event: ", b": "])
def test_an_event_that_does_not_end_is_given_up(line):
    piece = line + b"x" * 65536 + b"\n" * bool(line)
    taken = []
    with pytest.raises(ValueError):
        for _ in serv.iter_events(map(lambda p: taken.append(1) or p,
                                      itertools.repeat(piece))):
            pass
    assert len(taken) * len(piece) <= serv.MAX_BODY + 2 * len(piece)


# ---------------------------------------------------------------------------
# Stream: how it is read.
# ---------------------------------------------------------------------------

STREAM_HEAD = http_head(kind="text/event-stream", transfer_encoding="chunked")


def stream_chunk(delta=None, finish=None, **fields):
    """Return a chunk of a chat stream, of its first choice."""
    return dict({"id": "c1", "object": "chat.completion.chunk", "created": 1,
                 "model": "m", "choices": [{
                     "index": 0, "delta": delta or {},
                     "finish_reason": finish}]}, **fields)


def stream_text(*texts):
    """Return the chunks of a chat stream that says these texts."""
    return [stream_chunk({"content": text}) for text in texts]


def stream_block(index, block, *deltas):
    """Return the events of a content block of the Messages format."""
    return [{"type": "content_block_start", "index": index,
             "content_block": block}] + [
        {"type": "content_block_delta", "index": index, "delta": delta}
        for delta in deltas] + [{"type": "content_block_stop", "index": index}]


def stream_said(*texts):
    """Return a Messages stream up to the end of its one text block."""
    return [{"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
        "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1}}}] + stream_block(
            0, {"type": "text", "text": ""},
            *({"type": "text_delta", "text": text} for text in texts))


def stream_end(reason="end_turn"):
    """Return the last events of a Messages stream."""
    return [{"type": "message_delta", "usage": {"output_tokens": 5},
             "delta": {"stop_reason": reason, "stop_sequence": None}},
            {"type": "message_stop"}]


def stream_open(server, endpoint="chat", **options):
    """Return a stream from a server, without retries."""
    if endpoint == "messages":
        options["max_tokens"] = 9
    return serv.stream("Hi", endpoint=endpoint, system="s", timeout=20,
                       base_url=server.url, max_retries=0, **options)


def stream_read(answer, endpoint="chat"):
    """Return the pieces of a stream, and the reply at its end."""
    with Server(answer) as server:
        stream = stream_open(server, endpoint)
        return list(stream), stream.reply


def stream_error(answer, endpoint="chat"):
    """Return the pieces of a stream, and the error at its end."""
    pieces = []
    with Server(answer) as server:
        stream = stream_open(server, endpoint)
        with pytest.raises(serv.ServError) as caught:
            for piece in stream:
                pieces.append(piece)
        with pytest.raises(type(caught.value)):
            next(stream)  # a second loop is no silent end either
        with pytest.raises(type(caught.value)):
            next(stream.events())
        assert caught.value.reply == stream.reply
    return pieces, caught.value


def stream_closing(data):
    """Return an answer that sends data and closes the connection."""
    def answer(wire, request):
        wire.sendall(data)
        return False
    return answer


STREAM_HELLO = stream_text("Hel", "lo") + [stream_chunk({}, "stop"), "[DONE]"]
STREAM_OPENINGS = [
    ("chat", stream_text("Hel", "lo")),
    ("messages", stream_said("Hel", "lo"))]


@pytest.mark.parametrize("endpoint, events", [
    ("chat", STREAM_HELLO),
    ("messages", stream_said("Hel", "lo") + stream_end())])
def test_a_piece_is_there_before_the_next_is_sent(endpoint, events):
    def answer(wire, request):
        wire.sendall(STREAM_HEAD)
        for event in events:
            wire.sendall(chunk(sse(event)))
            if "Hel" in str(event):
                assert taken.wait(10)
        wire.sendall(chunk(b""))
    taken = threading.Event()
    with Server(answer) as server:
        pieces = iter(stream_open(server, endpoint))
        assert next(pieces) == "Hel"
        taken.set()
        assert list(pieces) == ["lo"]


def test_a_stream_is_open_before_its_first_event():
    def answer(wire, request):
        wire.sendall(STREAM_HEAD)
        assert opened.wait(10)
        wire.sendall(b"".join(map(chunk, (sse(*STREAM_HELLO), b""))))
    opened = threading.Event()
    with Server(answer) as server:
        stream = stream_open(server)
        opened.set()
        assert "".join(stream) == "Hello"


def test_a_stream_is_its_own_iterator_and_one_pass():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        assert iter(stream) is stream
        for piece in stream:  # noqa: B007
            break
        assert (piece, list(stream), list(stream)) == ("Hel", ["lo"], [])


def test_events_are_whole_and_as_sent():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        assert list(stream_open(server).events()) == STREAM_HELLO[:-1]


def test_events_of_messages_are_whole_and_as_sent():
    events = stream_said("Hello") + [{"type": "ping"}] + stream_end()
    with Server(stream_answer(*events)) as server:
        assert list(stream_open(server, "messages").events()) == events


def test_pieces_and_events_share_one_pass():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        assert next(stream) == "Hel"
        assert next(stream.events()) == STREAM_HELLO[1]
        assert list(stream) == []
        assert stream.reply.text == "Hello"


def test_the_reply_grows_with_the_stream():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        said = [(stream.reply.text, stream.reply.stop_reason)]
        for _ in stream.events():
            said.append((stream.reply.text, stream.reply.stop_reason))
        assert said == [("", None), ("Hel", None), ("Hello", None),
                        ("Hello", "stop")]


def test_the_reply_of_a_stream_has_what_any_reply_has():
    answer = stream_answer(*STREAM_HELLO, X_Request_Id="r1")
    with Server(answer) as server:
        stream = stream_open(server)
        assert (stream.reply.request_id, stream.reply.text) == ("r1", "")
        list(stream)
    elapsed = stream.reply.elapsed
    assert isinstance(stream.reply, serv.Reply) and 0 < elapsed < 20
    assert stream.reply.headers["content-TYPE"] == "text/event-stream"
    assert stream.reply.elapsed == elapsed  # it ended with the last byte


def test_a_reply_is_a_copy_that_the_stream_does_not_change():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        next(stream)
        early = stream.reply
        early["choices"][0]["message"]["content"] = "changed"
        early["choices"].append("changed")
        assert "".join(stream) == "lo"
        assert stream.reply.text == "Hello"
        assert len(stream.reply["choices"]) == 1


# ---------------------------------------------------------------------------
# Stream: its reply is what the call without streaming would have returned.
# ---------------------------------------------------------------------------

def stream_whole(said, finish="stop", **fields):
    """Return a whole chat answer."""
    return dict({"id": "c1", "object": "chat.completion", "created": 1,
                 "model": "m", "choices": [{
                     "index": 0, "finish_reason": finish, "message": dict(
                         {"role": "assistant", "content": None}, **said)}]},
                **fields)


def stream_message(content, reason="end_turn", **fields):
    """Return a whole Messages answer."""
    return dict({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
        "content": content, "stop_reason": reason, "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 5}}, **fields)


def stream_choice(index, delta, finish=None, **fields):
    """Return a chunk of one of several choices of a chat stream."""
    return stream_chunk(choices=[dict(
        {"index": index, "delta": delta, "finish_reason": finish}, **fields)])


def stream_token(text):
    """Return the log probability of a token."""
    return {"token": text, "logprob": -0.5, "bytes": list(text.encode()),
            "top_logprobs": [{"token": text, "logprob": -0.5}]}


STREAM_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 1}}
STREAM_CHAT = {
    "text": (
        [stream_chunk({"role": "assistant", "content": ""})]
        + stream_text("Hel", "lo") + [stream_chunk({}, "stop"), "[DONE]"],
        stream_whole({"content": "Hello"})),
    "no text": (
        [stream_chunk({"role": "assistant", "content": ""}, "stop")],
        stream_whole({"content": ""})),
    "white space": (
        stream_text(" ", "\n", "a", " ") + [stream_chunk({}, "stop")],
        stream_whole({"content": " \na "})),
    "cut by the limit": (
        stream_text("Hel") + [stream_chunk({}, "length")],
        stream_whole({"content": "Hel"}, "length")),
    "role in every chunk": (
        [stream_chunk({"role": "assistant", "content": text})
         for text in ("Hel", "lo")] + [stream_chunk({}, "stop")],
        stream_whole({"content": "Hello"})),
    "refusal": (
        [stream_chunk({"role": "assistant", "content": None, "refusal": ""}),
         stream_chunk({"refusal": "I "}), stream_chunk({"refusal": "won't."}),
         stream_chunk({}, "stop"), "[DONE]"],
        stream_whole({"refusal": "I won't."})),
    "blocked": (
        stream_text("I can't share that.")
        + [stream_chunk({}, "content_filter")],
        stream_whole({"content": "I can't share that."}, "content_filter")),
    "reasoning": (
        [stream_chunk({"role": "assistant", "reasoning_content": "Well"}),
         stream_chunk({"reasoning_content": ", yes."}),
         stream_chunk({"content": "Yes."}), stream_chunk({}, "stop")],
        stream_whole({"reasoning_content": "Well, yes.", "content": "Yes."})),
    "usage in the last chunk": (
        [stream_chunk({"content": "Hi"}, usage=None),
         stream_chunk({}, "stop", usage=None),
         stream_chunk(choices=[], usage=STREAM_USAGE), "[DONE]"],
        stream_whole({"content": "Hi"}, usage=STREAM_USAGE)),
    "usage in every chunk": (
        [stream_chunk({"content": "H"}, usage=dict(
            STREAM_USAGE, completion_tokens=1, total_tokens=4)),
         stream_chunk({"content": "i"}, usage=STREAM_USAGE),
         stream_chunk({}, "stop", usage=STREAM_USAGE), "[DONE]"],
        stream_whole({"content": "Hi"}, usage=STREAM_USAGE)),
    "several choices": (
        [stream_choice(1, {"role": "assistant", "content": "B"}),
         stream_choice(0, {"role": "assistant", "content": "A"}),
         stream_choice(1, {"content": "b"}), stream_choice(0, {}, "stop"),
         stream_choice(1, {}, "length"), "[DONE]"],
        dict(stream_whole({}), choices=[
            {"index": 0, "finish_reason": "stop",
             "message": {"role": "assistant", "content": "A"}},
            {"index": 1, "finish_reason": "length",
             "message": {"role": "assistant", "content": "Bb"}}])),
    "several choices in a chunk": (
        [stream_chunk(choices=[
            {"index": number, "delta": {"content": text},
             "finish_reason": "stop"} for number, text in enumerate("AB")])],
        dict(stream_whole({}), choices=[
            {"index": number, "finish_reason": "stop",
             "message": {"role": "assistant", "content": text}}
            for number, text in enumerate("AB")])),
    "logprobs": (
        [stream_choice(0, {"content": "Hel"}, logprobs={
            "content": [stream_token("Hel")], "refusal": None}),
         stream_choice(0, {"content": "lo"}, logprobs={
             "content": [stream_token("l"), stream_token("o")],
             "refusal": None}),
         stream_choice(0, {}, "stop", logprobs=None), "[DONE]"],
        dict(stream_whole({}), choices=[{
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": {"content": list(map(stream_token, (
                "Hel", "l", "o"))), "refusal": None}}])),
    "logprobs of a refusal": (
        [stream_choice(0, {"refusal": text}, logprobs={
            "content": None, "refusal": [stream_token(text)]})
         for text in ("N", "o")] + [stream_chunk({}, "stop")],
        dict(stream_whole({}), choices=[{
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": None,
                        "refusal": "No"},
            "logprobs": {"content": None, "refusal": [
                stream_token("N"), stream_token("o")]}}])),
    "fields nobody knows": (
        [dict(stream_choice(0, {"content": "Hi", "mood": {"is": "good"}},
                            score=[1, 2], filters={"hate": {"low": True}}),
              system_fingerprint="f", citations=["u"], speed=1),
         dict(stream_choice(0, {}, "stop", filters={"hate": {"low": False}}),
              system_fingerprint="f", citations=["u", "v"], speed=2)],
        dict(stream_whole({}), system_fingerprint="f", citations=["u", "v"],
             speed=2, choices=[{
                 "index": 0, "finish_reason": "stop", "score": [1, 2],
                 "filters": {"hate": {"low": False}},
                 "message": {"role": "assistant", "content": "Hi",
                             "mood": {"is": "good"}}}])),
    "content as parts": (
        [stream_chunk({"role": "assistant", "content": [
            {"type": "text", "text": "Hi"}, {"type": "image", "url": "u"}]}),
         stream_chunk({}, "stop")],
        stream_whole({"content": [{"type": "text", "text": "Hi"},
                                  {"type": "image", "url": "u"}]})),
    "control characters": (
        ['{"id": "c1", "object": "chat.completion.chunk", "created": 1, '
         '"model": "m", "choices": [{"index": 0, "delta": {"content": '
         '"a\t\x01\x0b\x1f"}, "finish_reason": "stop"}]}'],
        stream_whole({"content": "a\t\x01\x0b\x1f"})),
}


def stream_pair(endpoint, events, answer):
    """Check that a streamed and a plain answer come to the same."""
    def reply(wire, request):
        streamed = json.loads(request.body).get("stream")
        wire.sendall(stream_answer(*events) if streamed
                     else http_answer(answer))
    ask = {"system": "s", "max_retries": 0, "timeout": 20}
    with Server(reply) as server:
        plain = (serv.chat if endpoint == "chat" else serv.message)(
            "Hi", base_url=server.url, **ask, **(
                {} if endpoint == "chat" else {"max_tokens": 9}))
        stream = stream_open(server, endpoint)
        pieces = list(stream)
    assert stream.reply == plain == answer
    assert "".join(pieces) == plain.text
    for name in ("text", "thinking", "tool_calls", "stop_reason", "refusal",
                 "truncated", "message", "usage"):
        assert getattr(stream.reply, name) == getattr(plain, name)
    return plain


@pytest.mark.parametrize("name", STREAM_CHAT)
def test_a_streamed_chat_is_what_chat_returns(name):
    stream_pair("chat", *STREAM_CHAT[name])


def stream_call(arguments=None, name=None, id=None, **fields):
    """Return a piece of a tool call of a chat stream."""
    function = {"name": name, "arguments": arguments}
    if id:
        fields.update(id=id, type="function")
    return dict(fields, function={
        key: value for key, value in function.items() if value is not None})


STREAM_CALLS = {
    "one whole": [[stream_call('{"a": 1}', "f", "x", index=0)]],
    "in pieces": [
        [stream_call("", "f", "x", index=0)], [stream_call('{"a"', index=0)],
        [stream_call(": 1}", index=0)]],
    "parallel": [
        [stream_call("", "f", "x", index=0)],
        [stream_call('{"a": 1}', index=0)],
        [stream_call("", "g", "y", index=1)], [stream_call("{}", index=1)]],
    "parallel, mixed": [
        [stream_call("", "f", "x", index=0),
         stream_call("", "g", "y", index=1)],
        [stream_call("{", index=1), stream_call('{"a": ', index=0)],
        [stream_call("1}", index=0), stream_call("}", index=1)]],
    "the second first": [
        [stream_call("{}", "g", "y", index=1)],
        [stream_call('{"a": 1}', "f", "x", index=0)]],
    "index from 1": [
        [stream_call("", "f", "x", index=1)],
        [stream_call('{"a": 1}', index=1)],
        [stream_call("{}", "g", "y", index=2)]],
    "index with gaps": [
        [stream_call('{"a": 1}', "f", "x", index=0)],
        [stream_call("{", "g", "y", index=7)], [stream_call("}", index=7)]],
    "no index, whole": [
        [stream_call('{"a": 1}', "f", "x")], [stream_call("{}", "g", "y")]],
    "no index, whole, at once": [
        [stream_call('{"a": 1}', "f", "x"), stream_call("{}", "g", "y")]],
    "no index, in pieces": [
        [stream_call("", "f", "x")], [stream_call('{"a"')],
        [stream_call(": 1}")],
        [stream_call("{", "g", "y")], [stream_call("}")]],
    "no index, by id": [
        [stream_call('{"a"', "f", "x"), stream_call("", "g", "y")],
        [stream_call(": 1}", id="x")], [stream_call("{}", id="y")]],
    "id and name in every piece": [
        [stream_call('{"a"', "f", "x", index=0)],
        [stream_call(": 1}", "f", "x", index=0)],
        [stream_call("{", "g", "y", index=1)],
        [stream_call("}", "g", "y", index=1)]],
    "no index, id and name in every piece": [
        [stream_call('{"a"', "f", "x")], [stream_call(": 1}", "f", "x")],
        [stream_call("{}", "g", "y")]],
    "null and empty labels in later pieces": [
        [stream_call('{"a"', "f", "x", index=0)],
        [{"index": 0, "id": None, "type": None, "function": {
            "name": None, "arguments": ": "}}],
        [{"index": 0, "id": "", "type": "", "function": {
            "name": "", "arguments": "1}"}}]],
    "all at index 0": [
        [stream_call('{"a": 1}', "f", "x", index=0)],
        [stream_call("{}", "g", "y", index=0)]],
    "none and null between": [
        [], None, [stream_call('{"a": 1}', "f", "x", index=0)], None, []],
}


@pytest.mark.parametrize("name", STREAM_CALLS)
def test_streamed_tool_calls_are_what_chat_returns(name):
    pieces = STREAM_CALLS[name]
    calls = [("x", "f", '{"a": 1}'), ("y", "g", "{}")][
        :2 if '"y"' in json.dumps(pieces) else 1]
    plain = stream_pair("chat", [
        stream_chunk({"tool_calls": piece}) for piece in pieces] + [
        stream_chunk({}, "tool_calls"), "[DONE]"], stream_whole({
            "tool_calls": [{"id": id, "type": "function", "function": {
                "name": name, "arguments": arguments}}
                for id, name, arguments in calls]}, "tool_calls"))
    assert plain.tool_calls == [
        serv.ToolCall(id, name, json.loads(arguments))
        for id, name, arguments in calls]


STREAM_CITED = {"type": "char_location", "cited_text": "c",
                "document_index": 0, "start_char_index": 0,
                "end_char_index": 1}
STREAM_MESSAGES = {
    "text": (
        stream_said("Hel", "lo"), "end_turn",
        [{"type": "text", "text": "Hello"}]),
    "two texts": (
        stream_said("Hel") + stream_block(
            1, {"type": "text", "text": "lo"},
            {"type": "text_delta", "text": "!"}), "end_turn",
        [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]),
    "cut by the limit": (
        stream_said("Hel"), "max_tokens", [{"type": "text", "text": "Hel"}]),
    "refusal": (
        stream_said("I"), "refusal", [{"type": "text", "text": "I"}]),
    "tools": (
        stream_said("I ask.") + stream_block(
            1, {"type": "tool_use", "id": "x", "name": "f", "input": {}},
            *({"type": "input_json_delta", "partial_json": text}
              for text in ("", '{"a"', ": 1}"))) + stream_block(
            2, {"type": "tool_use", "id": "y", "name": "g", "input": {}}),
        "tool_use",
        [{"type": "text", "text": "I ask."},
         {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}},
         {"type": "tool_use", "id": "y", "name": "g", "input": {}}]),
    "a tool without input": (
        stream_said("") + stream_block(
            1, {"type": "tool_use", "id": "x", "name": "f", "input": {}},
            {"type": "input_json_delta", "partial_json": ""}), "tool_use",
        [{"type": "text", "text": ""},
         {"type": "tool_use", "id": "x", "name": "f", "input": {}}]),
    "a tool of the server": (
        stream_said("") + stream_block(
            1, {"type": "server_tool_use", "id": "x", "name": "web_search",
                "input": {}},
            {"type": "input_json_delta", "partial_json": '{"q": "a"}'}
        ) + stream_block(2, {
            "type": "web_search_tool_result", "tool_use_id": "x",
            "content": [{"type": "web_search_result", "url": "u"}]}),
        "end_turn",
        [{"type": "text", "text": ""},
         {"type": "server_tool_use", "id": "x", "name": "web_search",
          "input": {"q": "a"}},
         {"type": "web_search_tool_result", "tool_use_id": "x",
          "content": [{"type": "web_search_result", "url": "u"}]}]),
    "thinking": (
        stream_said("")[:1] + stream_block(
            0, {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "We"},
            {"type": "thinking_delta", "thinking": "ll."},
            {"type": "signature_delta", "signature": "c2ln"}) + stream_block(
            1, {"type": "redacted_thinking", "data": "ZGF0YQ=="}
        ) + stream_block(
            2, {"type": "text", "text": ""},
            {"type": "text_delta", "text": "Yes."}), "end_turn",
        [{"type": "thinking", "thinking": "Well.", "signature": "c2ln"},
         {"type": "redacted_thinking", "data": "ZGF0YQ=="},
         {"type": "text", "text": "Yes."}]),
    "citations": (
        stream_said("")[:1] + stream_block(
            0, {"type": "text", "text": "", "citations": []},
            {"type": "citations_delta", "citation": STREAM_CITED},
            {"type": "text_delta", "text": "a"},
            {"type": "citations_delta", "citation": dict(
                STREAM_CITED, document_index=1)}), "end_turn",
        [{"type": "text", "text": "a", "citations": [
            STREAM_CITED, dict(STREAM_CITED, document_index=1)]}]),
    "citations of one source": (
        stream_said("")[:1] + stream_block(
            0, {"type": "text", "text": "a"},
            {"type": "citations_delta", "citation": {
                "type": "new", "id": "d", "index": 0, "cited_text": "b"}},
            {"type": "citations_delta", "citation": {
                "type": "new", "id": "d", "index": 0, "cited_text": "c"}}),
        "end_turn",
        [{"type": "text", "text": "a", "citations": [
            {"type": "new", "id": "d", "index": 0, "cited_text": "b"},
            {"type": "new", "id": "d", "index": 0, "cited_text": "c"}]}]),
    "blocks nobody knows": (
        stream_said("a") + stream_block(
            1, {"type": "picture", "url": "u", "size": {"x": 1}}) + [
            {"type": "new_event", "text": "no"}, {"type": "ping"}],
        "end_turn",
        [{"type": "text", "text": "a"},
         {"type": "picture", "url": "u", "size": {"x": 1}}]),
}


@pytest.mark.parametrize("name", STREAM_MESSAGES)
def test_a_streamed_message_is_what_message_returns(name):
    events, reason, content = STREAM_MESSAGES[name]
    stream_pair("messages", events + stream_end(reason),
                stream_message(content, reason))


def test_unknown_fields_of_a_streamed_message_are_kept():
    start, end = stream_said("a"), stream_end()
    start[0]["message"].update(container={"id": "b"}, tier="one")
    start[1]["content_block"]["mood"] = "good"
    end[0]["delta"]["why"] = "done"
    end[0]["usage"]["server_tool_use"] = {"web_search_requests": 1}
    answer = stream_message(
        [{"type": "text", "text": "a", "mood": "good"}], why="done",
        container={"id": "b"}, tier="one")
    answer["usage"]["server_tool_use"] = {"web_search_requests": 1}
    stream_pair("messages", start + end, answer)


def test_usage_of_a_message_is_replaced_field_by_field():
    events = stream_said("a") + [
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": n}}
        for n in (2, 4)] + stream_end()
    assert stream_read(stream_answer(*events), "messages")[1].usage == {
        "input_tokens": 3, "output_tokens": 5}


@pytest.mark.parametrize("texts, whole", [
    (["a\ud83d", "\ude00b"], "a\U0001f600b"),
    (["\ud83d", "", "\ude00"], "\U0001f600"),
    (["\ud83d\ude00"], "\U0001f600"),
    (["\ud83d", "\ud83d\ude00"], "\ufffd\U0001f600"),
    (["\ud83d", "\ude00\ud83d", "\ude00"], "\U0001f600\U0001f600"),
    (["a\ud83d"], "a\ufffd"),
    (["\ude00", "a"], "\ufffda"),
    (["\ud83d", "a"], "\ufffda"),
    (["a\ud83d", "\u20ac"], "a\ufffd\u20ac"),
])
@pytest.mark.parametrize("endpoint", ["chat", "messages"])
def test_halves_of_a_character_are_joined(endpoint, texts, whole):
    events = (stream_text(*texts) + [stream_chunk({}, "stop"), "[DONE]"]
              if endpoint == "chat" else stream_said(*texts) + stream_end())
    pieces, reply = stream_read(stream_answer(*events), endpoint)
    assert ("".join(pieces), reply.text) == (whole, whole)
    assert "" not in pieces
    for text in pieces + [json.dumps(reply, ensure_ascii=False)]:
        text.encode()


def test_a_half_waits_for_its_other_half():
    with Server(stream_answer(*stream_text("a\ud83d", "\ude00"), stream_chunk(
            {}, "stop"))) as server:
        stream = stream_open(server)
        assert next(stream) == "a"
        stream.reply.text.encode()
        assert list(stream) == ["\U0001f600"]


# ---------------------------------------------------------------------------
# Stream: how it ends.
# ---------------------------------------------------------------------------

STREAM_CUTS = [
    ("chat", []),
    ("chat", ["[DONE]"]),
    ("chat", [stream_chunk(choices=[], usage=STREAM_USAGE)]),
    ("chat", stream_text("Hel", "lo")),
    ("chat", [stream_chunk({"content": "Hello"}, "")]),
    ("chat", [stream_choice(0, {"content": "Hello"}, "stop"),
              stream_choice(1, {"content": "B"})]),
    ("messages", []),
    ("messages", [{"type": "ping"}]),
    ("messages", stream_said("Hel", "lo")),
    ("messages", stream_said("Hello")[:-1]),
    ("messages", stream_said("Hello") + [
        {"type": "message_delta", "usage": {"output_tokens": 5},
         "delta": {"stop_reason": None}}]),
]


@pytest.mark.parametrize("tail", [
    chunk(b""), b"", b"5\r\nda", b"zz\r\n",
    chunk(b'data: {"id": "c1", "choi') + chunk(b""), chunk(b"data: x") * 2])
@pytest.mark.parametrize("endpoint, events", STREAM_CUTS)
def test_a_cut_stream_is_an_error(endpoint, events, tail):
    data = STREAM_HEAD + b"".join(chunk(sse(event)) for event in events)
    pieces, error = stream_error(stream_closing(data + tail), endpoint)
    assert type(error) is serv.APIConnectionError
    said = "Hello" if "Hel" in str(events) else ""
    assert ("".join(pieces), error.reply.text) == (said, said)
    assert (error.reply.stop_reason == "stop") == ('"stop"' in json.dumps(
        events))


@pytest.mark.parametrize("head, tail", [
    (http_head(kind="text/event-stream"), b""),
    (http_head(kind="text/event-stream", content_length=9999), b"")])
def test_a_cut_stream_that_is_not_chunked_is_an_error(head, tail):
    data = head + sse(*stream_text("Hel", "lo")) + tail
    pieces, error = stream_error(stream_closing(data))
    assert type(error) is serv.APIConnectionError
    assert (pieces, error.reply.text) == (["Hel", "lo"], "Hello")


@pytest.mark.parametrize("endpoint, events", [
    ("chat", STREAM_HELLO[:-1]),
    ("chat", [stream_choice(1, {"content": "B"}, "length"),
              stream_choice(0, {"content": "Hello"}, "stop")]),
    ("chat", STREAM_HELLO[:2] + ["[DONE]"]),
    ("messages", stream_said("Hello") + stream_end()[:1]),
    ("messages", stream_said("Hello") + stream_end()[1:])])
@pytest.mark.parametrize("tail", [chunk(b""), b""])
def test_a_stream_with_its_proof_is_whole(endpoint, events, tail):
    data = STREAM_HEAD + b"".join(chunk(sse(event)) for event in events)
    pieces, reply = stream_read(stream_closing(data + tail), endpoint)
    assert ("".join(pieces), reply.text) == ("Hello", "Hello")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "{}"])
@pytest.mark.parametrize("endpoint", ["chat", "messages"])
def test_a_tool_call_of_a_cut_stream_never_looks_finished(endpoint, text):
    events = [stream_chunk({"tool_calls": [
        stream_call(text, "f", "x", index=0)]})] if endpoint == "chat" else (
        stream_said("")[:1] + stream_block(
            0, {"type": "tool_use", "id": "x", "name": "f", "input": {}},
            {"type": "input_json_delta", "partial_json": text})[:-1])
    error = stream_error(stream_answer(*events), endpoint)[1]
    assert error.reply.tool_calls == [serv.ToolCall("x", "f", text)]
    with Server(stream_answer(*events)) as server:
        stream = stream_open(server, endpoint)
        for _ in events:
            next(stream.events())
        assert stream.reply.tool_calls == error.reply.tool_calls
        stream.close()
        assert stream.reply.tool_calls == error.reply.tool_calls


@at_once(*itertools.product([
    ("chat", STREAM_HELLO),
    ("messages", stream_said("Hel", "lo") + stream_end())], [
    b"", sse(stream_chunk({"content": "no"}), {"error": "no"})]))
def test_a_stream_ends_with_its_last_event(stream, more):
    endpoint, events = stream

    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(*events) + more))
        while wire.recv(65536):  # the end never comes
            pass
        return False
    pieces, reply = stream_read(answer, endpoint)
    assert (pieces, reply.text) == (["Hel", "lo"], "Hello")


def stream_drop(stream):
    """Leave a stream to the garbage collector."""
    del stream
    gc.collect()


def stream_leave(stream):
    """Leave a stream by the end of its block."""
    with stream as same:
        assert same is stream


@pytest.mark.parametrize("leave", [
    serv.Stream.close, stream_leave, stream_drop])
@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_left_early_is_closed(leave, begun):
    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(STREAM_HELLO[0])))
        try:
            assert wire.recv(1) == b""
        except ConnectionError:
            pass  # a reset is an end too
        closed.set()
        return False
    closed, streams = threading.Event(), []
    with Server(answer) as server, warnings.catch_warnings(
            record=True) as warned:
        warnings.simplefilter("always")
        streams.append(stream_open(server))
        if begun:
            assert next(streams[0]) == "Hel"
        leave(streams.pop())
        assert closed.wait(10)
    assert warned == []


def test_a_closed_stream_is_at_its_end_and_keeps_its_reply():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        assert next(stream) == "Hel"
        stream.close()
        stream.close()
        assert (list(stream), list(stream.events())) == ([], [])
        assert stream.reply.text == "Hel"


def test_an_exception_in_the_block_is_the_callers_own():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        with pytest.raises(ZeroDivisionError):
            with stream_open(server) as stream:
                for _ in stream:
                    1 / 0  # noqa: B018
        assert (stream.reply.text, list(stream)) == ("Hel", [])


# ---------------------------------------------------------------------------
# Stream: errors in it.
# ---------------------------------------------------------------------------

STREAM_TYPES = [  # what the type of an error stands for
    ("invalid_request_error", 400, "BadRequestError"),
    ("authentication_error", 401, "AuthenticationError"),
    ("billing_error", 402, "BillingError"),
    ("permission_error", 403, "PermissionDeniedError"),
    ("not_found_error", 404, "NotFoundError"),
    ("request_too_large", 413, "APIStatusError"),
    ("rate_limit_error", 429, "RateLimitError"),
    ("api_error", 500, "InternalServerError"),
    ("server_error", 500, "InternalServerError"),
    ("overloaded_error", 529, "InternalServerError"),
    ("an_error_nobody_knows", 500, "InternalServerError"),
]


@pytest.mark.parametrize("kind, status, name", STREAM_TYPES)
@pytest.mark.parametrize("endpoint, events", STREAM_OPENINGS)
def test_the_type_of_an_error_event_says_the_status(endpoint, events, kind,
                                                    status, name):
    event = {"type": "error", "error": {"type": kind, "message": "No."}}
    pieces, error = stream_error(stream_answer(
        *events + [event], X_Request_Id="r1"), endpoint)
    assert (pieces, error.reply.text) == (["Hel", "lo"], "Hello")
    assert type(error) is getattr(serv, name)
    assert (error.status, error.type, error.message, error.request_id) == (
        status, kind, "No.", "r1")
    assert (error.code, error.param, error.body) == (None, None, event)
    assert error.headers["x-request-id"] == "r1"


def stream_told(status, message="No.", kind=None, code=None, param=None):
    """Return what an error event tells."""
    return status, message, kind, code, param


STREAM_TOLD = [
    # An object in `error`, with or without what is expected in it.
    ('data: {"error": {"message": "No.", "type": "t", "param": "p"}}',
     stream_told(500, kind="t", param="p")),
    ('data: {"error": {"message": "No.", "code": 400}}',
     stream_told(400, code=400)),
    ('data: {"error": {"message": "No.", "code": 599}}',
     stream_told(599, code=599)),
    ('data: {"error": {"message": "No.", "code": 399}}',
     stream_told(500, code=399)),
    ('data: {"error": {"message": "No.", "code": 600}}',
     stream_told(500, code=600)),
    ('data: {"error": {"message": "No.", "code": "no_way"}}',
     stream_told(500, code="no_way")),
    ('data: {"error": {"message": "No.", "code": 400, '
     '"type": "overloaded_error"}}',
     stream_told(529, kind="overloaded_error", code=400)),
    ('data: {"error": {"message": "No.", "code": 404, "type": "t"}}',
     stream_told(404, kind="t", code=404)),
    # A bare string, and other shapes.
    ('data: {"error": "No."}', stream_told(500)),
    ('data: {"type": "error", "error": "No."}', stream_told(500)),
    ('event: error\ndata: {"error": {"message": "No."}}', stream_told(500)),
    ('event: error\ndata: {"type": "error", "message": "No."}',
     stream_told(500, kind="error")),
    ('event: error\ndata: No.', stream_told(500, kind="error")),
    # vLLM's is flat.
    ('data: {"object": "error", "message": "No.", "type": "BadRequestError", '
     '"param": null, "code": 400}',
     stream_told(400, kind="BadRequestError", code=400)),
    ('data: {"object": "error", "message": "No.", "type": "t"}',
     stream_told(500, kind="t")),
    ('data: {"message": "No.", "type": "BadRequestError", "code": 400}',
     stream_told(400, kind="BadRequestError", code=400)),
    ('data: {"message": "No.", "choices": null}', stream_told(500)),
    # OpenRouter's has choices too.
    ('data: {"id": "c1", "error": {"code": 502, "message": "No."}, "choices":'
     ' [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}',
     stream_told(502, code=502)),
    ('data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "error", '
     '"error": {"code": 429, "message": "No."}}]}',
     stream_told(429, code=429)),
]


@pytest.mark.parametrize("event, told", STREAM_TOLD)
@pytest.mark.parametrize("tail", ["", "data: [DONE]\n\n"])
def test_an_error_event_in_any_shape(event, told, tail):
    events = sse(*stream_text("Hel", "lo")) + (event + "\n\n" + tail).encode()
    data = STREAM_HEAD + chunk(events) + chunk(b"")
    pieces, error = stream_error(stream_closing(data))
    assert (pieces, error.reply.text) == (["Hel", "lo"], "Hello")
    assert isinstance(error, serv.APIStatusError)
    assert (error.status, error.message, error.type, error.code,
            error.param) == told


def test_a_finish_reason_of_error_is_an_error():
    events = stream_text("Hello") + [stream_chunk({}, "error"), "[DONE]"]
    pieces, error = stream_error(stream_answer(*events))
    assert (pieces, error.reply.text) == (["Hello"], "Hello")
    assert (type(error), error.status) == (serv.InternalServerError, 500)


@pytest.mark.parametrize("endpoint, events", [
    ("chat", STREAM_HELLO[:-1]),
    ("messages", stream_said("Hel", "lo") + stream_end()[:-1])])
def test_an_error_after_the_finish_is_an_error(endpoint, events):
    pieces, error = stream_error(stream_answer(
        *events + [{"type": "error", "error": {"type": "api_error"}}]),
        endpoint)
    assert (pieces, error.reply.text) == (["Hel", "lo"], "Hello")
    assert type(error) is serv.InternalServerError


@pytest.mark.parametrize("value", [None, {}, "", False])
def test_an_empty_error_is_none(value):
    events = [dict(event, error=value) for event in STREAM_HELLO[:-1]]
    assert stream_read(stream_answer(*events))[0] == ["Hel", "lo"]


STREAM_BROKEN = [
    ("chat", "data: {"), ("chat", "data: Hello"), ("chat", "data: [1]"),
    ("chat", "data: 1"), ("chat", 'data: "a"'), ("chat", "data: null"),
    ("chat", 'data: {"choices": 1}'), ("chat", 'data: {"choices": [1]}'),
    ("chat", 'data: {"choices": [{"index": -1, "delta": {}}]}'),
    ("chat", 'data: {"choices": [{"index": 0, "delta": "a"}]}'),
    ("chat", 'data: {"choices": [{"index": 0, "delta": {"tool_calls": '
             '[{"index": -1, "function": {"arguments": "{}"}}]}}]}'),
    ("messages", "event: content_block_delta\ndata: {"),
    ("messages", "event: message_stop\ndata: [DONE"),
    ("messages", "event: message_delta\ndata: []"),
    ("messages", 'data: {"type": "content_block_delta", "index": -1, "delta":'
                 ' {"type": "text_delta", "text": "a"}}'),
    ("messages", 'data: {"type": "content_block_start", "index": -1, '
                 '"content_block": {"type": "text", "text": "a"}}'),
    ("messages", 'data: {"type": "content_block_delta", "index": 0, '
                 '"delta": []}'),
    ("messages", 'data: {"type": "content_block_start", "index": 1, '
                 '"content_block": 1}'),
]


@pytest.mark.parametrize("endpoint, event", STREAM_BROKEN)
def test_a_broken_event_is_an_error(endpoint, event):
    events = dict(STREAM_OPENINGS)[endpoint] + (
        STREAM_HELLO if endpoint == "chat" else stream_end())
    data = sse(*dict(STREAM_OPENINGS)[endpoint]) + (event + "\n\n").encode()
    pieces, error = stream_error(
        STREAM_HEAD + chunk(data) + chunk(sse(*events)) + chunk(b""), endpoint)
    assert type(error) is serv.APIResponseError
    assert ("".join(pieces), error.reply.text) == ("Hello", "Hello")


def test_an_event_over_the_limit_is_an_error():
    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(*stream_text("Hello"))))
        wire.sendall(chunk(b"data: "))
        for _ in range(serv.MAX_BODY // len(data) + 2):
            wire.sendall(data)
        return False
    data = chunk(b"x" * (1 << 20))
    pieces, error = stream_error(answer)
    assert type(error) is serv.APIResponseError
    assert (pieces, error.reply.text) == (["Hello"], "Hello")


# ---------------------------------------------------------------------------
# Stream: what else a server may send.
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [
    "event: vendor\ndata: not JSON", "event: vendor\ndata: [1]",
    "event: ping\ndata:", "data:", "data: ", ": a comment", "id: 1",
    "retry: 1", 'event: vendor\ndata: {"type": "vendor", "n": 1}',
    'event: ping\ndata: {"type": "ping"}'])
@pytest.mark.parametrize("endpoint, events", [
    ("chat", STREAM_HELLO),
    ("messages", stream_said("Hel", "lo") + stream_end())])
def test_noise_between_events_is_ignored(endpoint, events, noise):
    noise = (noise + "\n\n").encode()
    data = noise + b"".join(sse(event) + noise for event in events)
    pieces, reply = stream_read(
        STREAM_HEAD + chunk(data) + chunk(b""), endpoint)
    assert (pieces, reply.text) == (["Hel", "lo"], "Hello")


def test_unknown_kinds_of_delta_do_not_break_a_stream():
    events = stream_said("Hello")
    events.insert(2, {"type": "content_block_delta", "index": 0, "delta": {
        "type": "new_delta", "news": [1]}})
    pieces, reply = stream_read(
        stream_answer(*events + stream_end()), "messages")
    assert (pieces, reply.text) == (["Hello"], "Hello")


def test_the_name_of_an_event_stands_in_for_its_type():
    data = b""
    for event in stream_said("Hel", "lo") + stream_end():
        data += b"event: %s\n" % event.pop("type").encode()
        data += b"data: %s\n\n" % json.dumps(event).encode()
    pieces, reply = stream_read(
        STREAM_HEAD + chunk(data) + chunk(b""), "messages")
    assert pieces == ["Hel", "lo"]
    assert reply == stream_message([{"type": "text", "text": "Hello"}])


@pytest.mark.parametrize("endpoint, answer", [
    ("chat", stream_whole({"content": "Hello"}, usage=STREAM_USAGE)),
    ("chat", stream_whole({"content": "Hello"}, None)),
    ("messages", stream_message([{"type": "text", "text": "Hello"}], None)),
    ("messages", stream_message([{"type": "text", "text": "Hel"},
                                 {"type": "text", "text": "lo"}]))])
def test_a_plain_answer_comes_as_one_piece(endpoint, answer):
    pieces, reply = stream_read(http_answer(answer), endpoint)
    assert (pieces, reply) == (["Hello"], answer)


def test_a_plain_answer_with_a_tool_call_is_whole():
    answer = stream_whole({"tool_calls": [{
        "id": "x", "type": "function", "function": {
            "name": "f", "arguments": '{"a": 1}'}}]}, "tool_calls")
    pieces, reply = stream_read(http_answer(answer))
    assert (pieces, reply) == ([], answer)
    assert reply.tool_calls == [serv.ToolCall("x", "f", {"a": 1})]


@pytest.mark.parametrize("body", [
    {"error": {"type": "rate_limit_error", "message": "No."}},
    {"type": "error", "error": {"type": "rate_limit_error"}}])
@pytest.mark.parametrize("status", ["200 OK", "429 Too Many Requests"])
def test_a_refused_stream_raises_at_once(body, status):
    with Server(http_answer(body, status)) as server:
        with pytest.raises(serv.RateLimitError) as caught:
            stream_open(server)
    assert (caught.value.status, caught.value.reply) == (429, None)


@pytest.mark.parametrize("kind", ["text/html", "application/json", "a/b"])
def test_what_is_no_stream_is_shown(kind):
    page = b"<html><body>Sign in to the network" + b"." * 9999
    with Server(http_answer(page, kind=kind)) as server:
        with pytest.raises(serv.APIResponseError) as caught:
            stream_open(server)
    assert "<html><body>Sign in to the network" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", [
    "text/event-stream; charset=utf-8", "TEXT/Event-Stream",
    "text/event-stream;charset=UTF-8"])
def test_a_stream_is_known_by_its_type(kind):
    data = http_head(kind=kind) + sse(*STREAM_HELLO)
    assert stream_read(stream_closing(data))[0] == ["Hel", "lo"]


@pytest.mark.parametrize("length, size", [(1 << 15, 4), (1 << 20, 512)])
@pytest.mark.parametrize("endpoint", ["chat", "messages"])
def test_a_long_tool_call_in_small_pieces(endpoint, length, size):
    given = json.dumps({"a": "x" * length})
    texts = [given[i:i + size] for i in range(0, len(given), size)]
    if endpoint == "chat":
        pattern = json.dumps(stream_chunk({"tool_calls": [
            stream_call("%s", index=0)]}))
        first = [stream_chunk({"tool_calls": [
            stream_call("", "f", "x", index=0)]})]
        last = [stream_chunk({}, "tool_calls")]
    else:
        first = stream_said("")[:1] + stream_block(0, {
            "type": "tool_use", "id": "x", "name": "f", "input": {}})[:1]
        pattern = json.dumps(stream_block(0, {}, {
            "type": "input_json_delta", "partial_json": "%s"})[1])
        last = stream_end("tool_use")
    data = "".join("data: %s\n\n" % pattern % json.dumps(text)[1:-1]
                   for text in texts).encode()
    pieces, reply = stream_read(STREAM_HEAD + chunk(
        sse(*first) + data + sse(*last)) + chunk(b""), endpoint)
    assert pieces == []
    assert reply.tool_calls == [
        serv.ToolCall("x", "f", {"a": "x" * length})]


@pytest.mark.parametrize("endpoint", ["chat", "messages"])
def test_a_stream_of_20000_events(endpoint):
    texts = ["%d " % number for number in range(20000)]
    events = (stream_text(*texts) + [stream_chunk({}, "stop")]
              if endpoint == "chat" else stream_said(*texts) + stream_end())
    pieces, reply = stream_read(
        STREAM_HEAD + chunk(sse(*events)) + chunk(b""), endpoint)
    assert (pieces, reply.text) == (texts, "".join(texts))


# ---------------------------------------------------------------------------
# Errors: the tree, and what each of them tells.
# ---------------------------------------------------------------------------

ERROR_BASES = {
    "ServError": Exception, "APIConnectionError": "ServError",
    "APITimeoutError": "APIConnectionError", "APIResponseError": "ServError",
    "APIStatusError": "ServError", "BadRequestError": "APIStatusError",
    "AuthenticationError": "APIStatusError", "BillingError": "APIStatusError",
    "PermissionDeniedError": "APIStatusError",
    "NotFoundError": "APIStatusError", "RateLimitError": "APIStatusError",
    "InternalServerError": "APIStatusError"}
ERROR_STATUSES = [
    (400, "BadRequestError"), (401, "AuthenticationError"),
    (402, "BillingError"), (403, "PermissionDeniedError"),
    (404, "NotFoundError"), (408, "APIStatusError"), (409, "APIStatusError"),
    (413, "APIStatusError"), (418, "APIStatusError"), (422, "APIStatusError"),
    (429, "RateLimitError"), (500, "InternalServerError"),
    (502, "InternalServerError"), (503, "InternalServerError"),
    (529, "InternalServerError"), (599, "InternalServerError")]


def error_chat(server, **options):
    """Ask in the chat format, without retries."""
    return serv.chat("Hi", **dict({
        "base_url": server.url, "system": "s", "max_retries": 0,
        "timeout": 20}, **options))


def error_message(server, **options):
    """Ask in the Messages format, without retries."""
    return serv.message("Hi", **dict({
        "base_url": server.url, "system": "s", "max_retries": 0,
        "timeout": 20, "max_tokens": 9}, **options))


def error_stream(server, **options):
    """Ask for a stream, without retries, and read it."""
    return list(stream_open(server, **options))


def error_of(answer, call=error_chat, **options):
    """Return the error that a call raises for an answer."""
    with Server(answer) as server:
        with pytest.raises(serv.ServError) as caught:
            call(server, **options)
        assert len(server.requests) == 1
    return caught.value


error_calls = pytest.mark.parametrize(
    "call", [error_chat, error_message, error_stream])


def test_the_tree_of_errors():
    found = {name for name in serv.__all__ if name.endswith("Error")}
    assert found == set(ERROR_BASES)
    for name, base in ERROR_BASES.items():
        base = getattr(serv, base) if isinstance(base, str) else base
        assert getattr(serv, name).__bases__ == (base,)
        assert getattr(serv, name).__doc__


@error_calls
@pytest.mark.parametrize("status, name", ERROR_STATUSES)
def test_a_status_says_the_class(call, status, name):
    body = {"error": {"message": "No\n way.", "type": "t", "code": "c",
                      "param": "p"}}
    with Server(http_answer(body, "%d Told" % status, retry_after="7",
                            x_request_id="r1")) as server:
        with pytest.raises(serv.APIStatusError) as caught:
            call(server)
    error = caught.value
    assert type(error) is getattr(serv, name)
    assert (error.status, error.type, error.code, error.param) == (
        status, "t", "c", "p")
    assert (error.message, error.body) == ("No\n way.", body)
    assert error.headers["X-REQUEST-ID"] == error.request_id == "r1"
    assert (error.retry_after, error.reply) == (7, None)
    path = "messages" if call is error_message else "chat/completions"
    for part in (str(status), "No way.", "r1", server.url + "/v1/" + path):
        assert part in str(error)
    assert str(error).isprintable()  # so it is one line


def test_an_error_without_more_than_a_status():
    error = error_of(http_answer(b"", "400 Bad Request"))
    assert (error.type, error.code, error.param, error.request_id,
            error.retry_after) == (None,) * 5
    assert error.body == "" and "400" in str(error)


@error_calls
def test_the_status_outweighs_the_type(call):
    error = error_of(http_answer({"type": "error", "error": {
        "type": "overloaded_error", "message": "No."}}, "400 No"), call)
    assert (type(error), error.status, error.type) == (
        serv.BadRequestError, 400, "overloaded_error")


@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "No."}}, "No."),
    ({"error": "No."}, "No."),
    ({"message": "No."}, "No."),
    ({"detail": "No."}, "No."),
    ({"detail": [{"loc": ["body"], "msg": "No."}]}, "No."),
    ({"object": "error", "message": "No.", "code": 40301}, "No."),
    ([{"error": {"message": "No.", "code": 403}}], "No."),
    ({"error": {"message": {"why": "No."}}}, "No."),
    ({"error": ["No."]}, "No."),
    (["No."], "No."),
    ("No.", "No."),
    ({}, ""), ([], ""), (None, ""), (5, ""), ({"error": None}, ""),
    ({"error": {}}, ""), ({"error": {"message": None}}, ""),
    ({"error": {"message": "No.", "type": 5, "param": [1]}}, "No."),
])
@error_calls
def test_an_error_in_any_shape(call, body, message):
    error = error_of(http_answer(body, "403 Forbidden"), call)
    assert type(error) is serv.PermissionDeniedError
    assert error.body == body and isinstance(error.message, str)
    assert message in error.message and message in str(error)
    assert error.type is None or isinstance(error.type, str)
    assert str(error).isprintable()
    assert pickle.loads(pickle.dumps(error)).body == body


@pytest.mark.parametrize("data, text", [
    (b"<html><title>No way</title>\r\n" + b"." * 9999,
     "<html><title>No way</title>\r\n" + "." * 9999),
    (b"{No way", "{No way"), (b"No way \xff", "No way \ufffd"),
    ("\ufeffNo way \u20ac".encode(), "No way \u20ac")])
@error_calls
def test_an_error_that_is_not_json(call, data, text):
    error = error_of(http_answer(data, "502 Bad Gateway", "text/html"), call)
    assert (type(error), error.status, error.body) == (
        serv.InternalServerError, 502, text)
    assert "No way" in str(error) and str(error).isprintable()
    assert len(str(error)) < 1000


@error_calls
@pytest.mark.parametrize("kind, status, name", STREAM_TYPES)
def test_a_200_may_be_an_error(call, kind, status, name):
    body = {"type": "error", "error": {"type": kind, "message": "No."}}
    error = error_of(http_answer(body, request_id="r1"), call)
    assert type(error) is getattr(serv, name)
    assert (error.status, error.type, error.message, error.body) == (
        status, kind, "No.", body)
    assert (error.request_id, error.reply) == ("r1", None)


@error_calls
@pytest.mark.parametrize("body, status", [
    ({"error": "No."}, 500), ({"error": {"message": "No."}}, 500),
    ({"error": {"message": "No.", "code": 503}}, 503),
    ({"object": "error", "message": "No.", "code": 404}, 404),
    ({"detail": "No."}, 500)])
def test_a_200_may_be_an_error_in_any_shape(call, body, status):
    error = error_of(http_answer(body), call)
    assert (error.status, error.message, error.body) == (status, "No.", body)


@error_calls
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_names_its_target(call, status):
    with Server(http_answer(stream_whole({"content": "Hi"}))) as other:
        error = error_of(http_answer(b"", "%d Moved" % status,
                                     location=other.url + "/here"), call)
        assert (other.connections, other.requests) == (0, [])
    assert (type(error), error.status) == (serv.APIStatusError, status)
    assert other.url + "/here" in str(error)
    assert error.headers["location"] == other.url + "/here"


@pytest.mark.parametrize("headers, found", [
    ({"x_openserv_request_id": "a", "x_request_id": "b", "request_id": "c"},
     "a"),
    ({"request_id": "c", "x_request_id": "b"}, "b"),
    ({"request_id": "c"}, "c"),
    ({"X_REQUEST_ID": "b"}, "b"), ({"cf_ray": "d"}, None)])
def test_the_request_id_of_an_error_and_of_a_reply(headers, found):
    error = error_of(http_answer({}, "400 No", **headers))
    assert error.request_id == found and (found or "") in str(error)
    answer = http_answer(stream_whole({"content": "Hi"}), **headers)
    with Server(answer) as server:
        assert error_chat(server).request_id == found


def error_facts(error):
    """Return all that an error says, as values that can be compared."""
    facts = {name: getattr(error, name) for name in (
        "status", "type", "code", "param", "message", "body", "retry_after",
        "request_id", "reply") if hasattr(error, name)}
    facts["headers"] = list(getattr(error, "headers", {}).items())
    return type(error), str(error), error.args, facts


def error_samples():
    """Return one error of each class, by the name of the class."""
    body = {"error": {"message": "No.", "type": "t", "code": 7, "param": "p"}}
    answers = [http_answer(body, "%d No" % status, retry_after="3",
                           x_request_id="r1") for status, _ in ERROR_STATUSES]
    answers += [http_answer(b"?", x_request_id="r1"),
                stream_closing(http_head(content_length=5))]
    errors = [error_of(answer) for answer in answers]
    with pytest.raises(serv.ServError) as caught:
        serv.chat("Hi", system="s", api_key="\u2026")
    errors.append(caught.value)
    for tail in (sse({"error": {"code": 429}}), b"data: {\n\n", b""):
        errors.append(stream_error(STREAM_HEAD + chunk(
            sse(*stream_text("Hello")) + tail) + chunk(b""))[1])
    with Server(lambda wire, request: wire.recv(1)) as server:
        with pytest.raises(serv.APITimeoutError) as caught:
            error_chat(server, timeout=0.02)
    return errors + [caught.value]


def test_errors_can_be_pickled_and_copied():
    errors = error_samples()
    assert {type(error).__name__ for error in errors} == set(ERROR_BASES)
    for error in errors:
        same = [pickle.loads(pickle.dumps(error, protocol))
                for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for other in same:
            assert other.__cause__ is other.__context__ is None
        for other in same + [copy.copy(error), copy.deepcopy(error)]:
            assert error_facts(other) == error_facts(error)
            assert type(other.reply) is type(error.reply)


def test_an_error_of_the_network_has_its_cause():
    with Server(b"") as server:
        pass  # so that nobody listens there any more
    with pytest.raises(serv.APIConnectionError) as caught:
        error_chat(server)
    error = caught.value
    assert isinstance(error.__cause__, OSError)
    assert server.url + "/v1/chat/completions" in str(error)
    assert (error.request_id, error.reply) == (None, None)


def test_a_broken_event_has_its_cause_and_request_id():
    error = stream_error(stream_answer("{", Request_Id="r1"))[1]
    assert isinstance(error.__cause__, ValueError)
    assert error.request_id == "r1" and "r1" in str(error)


# ---------------------------------------------------------------------------
# Errors: none of them holds the key, not even where the server echoes it.
# ---------------------------------------------------------------------------

def key_texts(value, seen):
    """Yield every text that can be reached from a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
    elif id(value) not in seen and not callable(value):
        seen[id(value)] = value
        yield repr(value)
        parts = []
        if isinstance(value, dict):
            parts += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            parts += value
        elif hasattr(value, "items"):
            parts += value.items()
        if isinstance(value, BaseException):
            yield str(value)
            parts += traceback.format_exception(
                type(value), value, value.__traceback__)
            parts += [value.__cause__, value.__context__]
            parts += [getattr(value, name) for name in dir(value)
                      if not name.startswith("__")]
        parts += getattr(value, "__dict__", {}).values()
        for part in parts:
            yield from key_texts(part, seen)


def assert_no_key(error, key=KEY):
    """Check that nothing which can be reached from an error holds the key."""
    for text in key_texts(error, {}):
        assert key not in text
    data = pickle.dumps(error)
    assert key.encode() not in data
    for text in key_texts(pickle.loads(data), {}):
        assert key not in text
    assert key[:12] not in str(error)  # cut short it would still be most of it


KEY_HTML = b"<html><p>" + b"." * 360 + KEY.encode() + b"</p>"
KEY_ECHOES = {
    "body": http_answer({"error": {
        "message": "Bad " + KEY, "type": KEY, "code": KEY, "param": KEY,
        KEY: [{"a": [KEY]}]}}, "401 No"),
    "bare string": http_answer({"error": KEY}, "401 No"),
    "list": http_answer([[KEY], {KEY: KEY}], "401 No"),
    "body of a 200": http_answer({"error": {"message": KEY, "type": KEY}}),
    "no answer": http_answer({"said": KEY}),
    "header": http_answer({}, "401 No", X_Echo=KEY, X_Request_Id="r" + KEY),
    "reason": http_answer({}, "401 " + KEY),
    "redirect": http_answer({}, "307 Go", location="http://a.test/" + KEY),
    "encoding": http_answer({}, content_encoding=KEY),
    "page": http_answer(KEY_HTML, "403 No", "text/html"),
    "page of a 200": http_answer(KEY_HTML, kind="text/html"),
    "status line": b"HTTP/1.1 " + KEY.encode() + b" No\r\n\r\n",
    "no status line": KEY.encode() + b"\r\n\r\n",
    "length of a chunk": http_head(
        transfer_encoding="chunked") + KEY.encode() + b"\r\n",
    "length": http_head(content_length=KEY) + b"{}",
    "cut body": http_head(content_length=999) + KEY.encode(),
    "error event": stream_answer({"error": {
        "message": KEY, "type": KEY, "code": KEY, "param": KEY}}),
    "broken event": stream_answer('{"a": "%s' % KEY),
    "event of no text": stream_answer({"choices": KEY}),
    "cut stream": stream_answer(*stream_text("a" + KEY)),
    "two pieces": stream_answer(*stream_text(KEY[:9], KEY[9:])),
    "two pieces and an error": stream_answer(
        *stream_text(KEY[:9], KEY[9:]), {"error": {"message": KEY}}),
    "tool call": stream_answer(*(stream_chunk({"tool_calls": [
        stream_call(text, "f", "x", index=0)]}) for text in (
            KEY[:9], KEY[9:]))),
    "header of a stream": stream_answer("{", X_Echo=KEY, X_Request_Id=KEY),
}


@pytest.mark.parametrize("name", KEY_ECHOES)
@error_calls
def test_the_key_is_in_no_part_of_an_error(call, name):
    assert_no_key(error_of(stream_closing(KEY_ECHOES[name]), call))


@error_calls
@pytest.mark.parametrize("options", [
    {"api_key": "sk-other-%s"}, {"api_key": " sk-other-%s\n"},
    {"headers": {"Authorization": "Bearer sk-other-%s"}},
    {"headers": {"authorization": "sk-other-%s"}}])
def test_no_other_key_is_in_an_error(call, options, monkeypatch):
    other = "sk-other-0123456789"
    options = json.loads(json.dumps(options) % "0123456789")
    monkeypatch.delenv("SERV_API_KEY")
    error = error_of(http_answer(
        {"error": {"message": "Bad key " + other}}, "401 No"), call, **options)
    assert_no_key(error, other)
    assert "Bad key" in error.message


def test_a_key_in_a_stream_is_in_no_error_that_is_raised_again():
    with Server(KEY_ECHOES["two pieces and an error"]) as server:
        stream = stream_open(server)
        for _ in range(3):
            with pytest.raises(serv.APIStatusError) as caught:
                list(stream)
            assert_no_key(caught.value)


@pytest.mark.parametrize("key", [KEY + "\u2026", KEY + "\n x", KEY + "\0"])
def test_a_key_that_cannot_be_sent_is_not_shown(key):
    with pytest.raises(serv.ServError) as caught:
        serv.chat("Hi", system="s", api_key=key)
    assert_no_key(caught.value)


# ---------------------------------------------------------------------------
# The network: what its tests have in common.
# ---------------------------------------------------------------------------

NET_HOME = os.path.dirname(os.path.abspath(serv.__file__))


def net_said(text):
    """Return the JSON of a chat answer."""
    return {"object": "chat.completion", "choices": [{
        "index": 0, "message": {"role": "assistant", "content": text},
        "finish_reason": "stop"}]}


def net_delta(text, reason=None):
    """Return the JSON of a chat stream's chunk."""
    return {"object": "chat.completion.chunk", "choices": [{
        "index": 0, "delta": {"content": text}, "finish_reason": reason}]}


NET_OK = http_answer(net_said("Hello!"))
NET_STREAM = stream_answer(net_delta("Hel"), net_delta("lo!", "stop"),
                           "[DONE]")
NET_SSE = http_head(kind="text/event-stream", transfer_encoding="chunked")
NET_CHUNKED = http_head(transfer_encoding="chunked")


def net_prompt(request):
    """Return what a request asks."""
    return json.loads(request.body)["messages"][-1]["content"]


def net_echo(wire, request):
    """Answer with what was asked, as a stream if that was asked for."""
    text = net_prompt(request)
    if json.loads(request.body).get("stream"):
        wire.sendall(stream_answer(net_delta(text[:1]),
                                   net_delta(text[1:], "stop"), "[DONE]"))
    else:
        wire.sendall(http_answer(net_said(text)))


def net_hang_up(wire, request):
    """Close the connection instead of an answer."""
    return False


def net_last(data):
    """Return an answer that sends data and then closes the connection."""
    def answer(wire, request):
        wire.sendall(data)
        return False
    return answer


def net_reset(data=b""):
    """Return an answer that sends data and then resets the connection."""
    def answer(wire, request):
        wire.sendall(data)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                        struct.pack("ii", 1, 0))
        return False
    return answer


def net_hold(data=b""):
    """Return an answer that sends data and then nothing, nor the end."""
    def answer(wire, request):
        wire.sendall(data)
        while wire.recv(1 << 16):
            pass
        return False
    return answer


def net_drip(head, piece, seconds=0.01):
    """Return an answer that never ends: a head, then pieces."""
    def answer(wire, request):
        wire.sendall(head)
        while True:
            wire.sendall(piece)
            time.sleep(seconds)
    return answer


class NetRaw(Server):
    """A server whose function gets each wire before any request is read."""

    def converse(self, wire, number):
        with wire:
            try:
                self.answers[0](wire)
            except (OSError, ValueError):
                pass  # the client hung up, or the test is over


@contextlib.contextmanager
def net_deaf(full=False):
    """Listen, and never accept; with a full backlog nobody gets in."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(64 if full else 0):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.05)[1]:
                break
        yield "127.0.0.1:%d" % listener.getsockname()[1]


def net_stream(server, prompt="Hi", **options):
    """Return a stream from a server, or a URL; without retries."""
    options = dict({"system": "s", "max_retries": 0, "timeout": 20.0,
                    "base_url": getattr(server, "url", server)}, **options)
    return serv.stream(prompt, **options)


def net_chat(server, prompt="Hi", **options):
    """Return the text of an answer."""
    options = dict({"system": "s", "max_retries": 0, "timeout": 20.0,
                    "base_url": getattr(server, "url", server)}, **options)
    return serv.chat(prompt, **options).text


def net_read(server, prompt="Hi", **options):
    """Return the text of a stream."""
    return "".join(net_stream(server, prompt, **options))


def net_short(value):
    """Return a short name of a parameter; None for pytest's own."""
    return str(value)[-25:] if isinstance(value, (bytes, dict)) else None


net_calls = pytest.mark.parametrize("call", [net_chat, net_read])


def net_error(kind, call, *args, **options):
    """Return the error that a call raises."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    return caught.value


def net_run(script, *args, flags=(), **environment):
    """Run a Python script, which finds serv, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *map(str, args)],
        env=dict(os.environ, PYTHONPATH=NET_HOME, PYTHONDONTWRITEBYTECODE="1",
                 **environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
        universal_newlines=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# A CA, and a server's certificate of 127.0.0.1 and localhost with its key,
# of no worth but for these tests.
NET_CA = """\
-----BEGIN CERTIFICATE-----
MIIBZzCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAaMRgwFgYDVQQDDA9zZXJ2LnB5
IHRlc3QgQ0EwIBcNMDAwMTAxMDAwMDAwWhgPMjEyNjAxMDEwMDAwMDBaMBoxGDAW
BgNVBAMMD3NlcnYucHkgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IA
BBnu9Vs7A0jnKHVv9CJSLSZUX5nOgDbRHjm0tdw0jNCtsfJ7hu6lBeQ5OJtABwZw
uKcBiWGy6/RJR/J0hJjJAl6jQjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/
BAQDAgEGMB0GA1UdDgQWBBTEq8Gln2rQAkDDDsRqdCkN8saHVzAKBggqhkjOPQQD
AgNIADBFAiEAvQZJfZbgW+xnYBz44TBpb9qqWUzf3PxD7AA2n8lPZ64CIBKqfSJr
2rR8gYdLLZ3wnzFecNx4ZR960toydy6X7UAQ
-----END CERTIFICATE-----
"""
NET_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBvDCCAWKgAwIBAgIBAjAKBggqhkjOPQQDAjAaMRgwFgYDVQQDDA9zZXJ2LnB5
IHRlc3QgQ0EwIBcNMDAwMTAxMDAwMDAwWhgPMjEyNjAxMDEwMDAwMDBaMB4xHDAa
BgNVBAMME3NlcnYucHkgdGVzdCBzZXJ2ZXIwWTATBgcqhkjOPQIBBggqhkjOPQMB
BwNCAARSMsuTRbQ+zE0Z4X0QGJxeCMOb0qGfEHqTf7C0xpeAYbWY5UUGEw8wQKhD
UiZ+wT12h3TxtR4+XIVUWnr7Sa6Oo4GSMIGPMAwGA1UdEwEB/wQCMAAwDgYDVR0P
AQH/BAQDAgeAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMB0GA1UdDgQWBBSDsHNIQzif
k8Nf2Ri3PMOK90n2yDAfBgNVHSMEGDAWgBTEq8Gln2rQAkDDDsRqdCkN8saHVzAa
BgNVHREEEzARhwR/AAABgglsb2NhbGhvc3QwCgYIKoZIzj0EAwIDSAAwRQIgfqgK
xKmcyk0X7OSxpRY4OgR0OTeEzF69PlyS1fTtLj4CIQCXE98r8e1sqi+nxD/XVrdi
ABcU+U052ulIOoavfCh7ig==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQghIiVG3odCj7ND4D9
wZzO+5GNEqgwhlMoMRS4ekw4btihRANCAARSMsuTRbQ+zE0Z4X0QGJxeCMOb0qGf
EHqTf7C0xpeAYbWY5UUGEw8wQKhDUiZ+wT12h3TxtR4+XIVUWnr7Sa6O
-----END PRIVATE KEY-----
"""


@pytest.fixture
def net_tls(tmp_path, monkeypatch):
    """Trust the CA above; return the TLS context of its server."""
    (tmp_path / "ca.pem").write_text(NET_CA)
    (tmp_path / "server.pem").write_text(NET_CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(tmp_path / "server.pem"))
    return context


# ---------------------------------------------------------------------------
# One budget bounds the whole call.
# ---------------------------------------------------------------------------

NET_BUDGET = 0.1


def net_timeout(call, *args, **options):
    """Return the error of a call that ends with its budget, in time."""
    begun = time.monotonic()
    error = net_error(serv.APITimeoutError, call, *args, timeout=NET_BUDGET,
                      **options)
    elapsed = time.monotonic() - begun
    assert NET_BUDGET - 0.01 <= elapsed <= NET_BUDGET + 0.5
    assert error.__class__ is serv.APITimeoutError
    return error


NET_DRIPS = {
    "continue": net_drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header": net_drip(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "headers": net_drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.03),
    "body": net_drip(http_head(content_length=10 ** 6), b" "),
    "chunks": net_drip(NET_CHUNKED, chunk(b" ")),
    "chunk size": net_drip(NET_CHUNKED, b"0"),
    "comments": net_drip(NET_SSE, chunk(b": ping\n\n")),
    "pings": net_drip(NET_SSE, chunk(b"event: ping\ndata: {}\n\n")),
}


@at_once(*itertools.product([net_chat, net_read], NET_DRIPS))
def test_no_drip_stretches_the_budget(call, name):
    with Server(NET_DRIPS[name]) as server:
        net_timeout(call, server, max_retries=2)
        assert len(server.requests) == 1


@at_once(*itertools.product([net_chat, net_read], [
    ("http", False, 2), ("http", True, 2), ("https", False, 2),
    ("http", False, 1 << 23)]))
def test_a_server_that_does_nothing(call, how):
    scheme, full, length = how
    with net_deaf(full) as place:
        error = net_timeout(call, scheme + "://" + place, "x" * length)
    assert "0.1 s" in str(error)


def test_a_proxy_that_drips(monkeypatch):
    @at_once(*itertools.product([net_chat, net_read], ["http", "https"]))
    def ask(call, scheme):
        net_timeout(call, scheme + "://host.test")

    with Server(net_drip(b"HTTP/1.1 200 OK\r\n", b"X-More: x\r\n")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url)
        ask()


NET_DEAD_ADDRESS = """
import json, socket, sys, time
found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(port)))
         for port in sys.argv[2:]]
look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *args, **more: (
    found if host == "several.test" else look_up(host, *args, **more))
import serv
serv.CONNECT_TIMEOUT = 0.2
begun = time.monotonic()
try:
    said = serv.chat("Hi", system="s", base_url="http://several.test",
                     timeout=float(sys.argv[1]), max_retries=0).text
except serv.ServError as error:
    said = type(error).__name__
print(json.dumps([said, time.monotonic() - begun]))
"""


@at_once((20, ["dead", "live"], "Hello!", 2),
         (0.3, ["dead", "dead", "dead"], "APITimeoutError", 0.8))
def test_dead_addresses_give_way_and_do_not_add_up(timeout, places, end, most):
    with net_deaf(full=True) as place, Server(NET_OK) as server:
        ports = {"dead": place.split(":")[1], "live": server.port}
        said, elapsed = json.loads(net_run(
            NET_DEAD_ADDRESS, timeout, *(ports[each] for each in places)))
    assert said == end and elapsed <= most


def test_a_retry_that_does_not_fit_the_budget_is_not_waited_for():
    busy = http_answer({}, "503 Busy", retry_after_ms="50")
    begun = time.monotonic()
    with Server(busy) as server:
        net_error(serv.InternalServerError, net_chat, server, timeout=0.3,
                  max_retries=100)
        assert time.monotonic() - begun < 0.5
        assert 2 <= len(server.requests) <= 7


@at_once((net_chat,), (net_read,))
def test_all_tries_share_one_budget(call):
    busy = http_answer({}, "503 Busy", retry_after_ms="20")
    with Server([busy, busy, net_hold()]) as server:
        net_timeout(call, server, max_retries=5)
        assert len(server.requests) == 3


@at_once((b"",), (chunk(b": ping\n\n"),), (chunk(b"data: "),), (b"1",))
def test_a_stream_out_of_time_keeps_what_had_arrived(tail):
    head = NET_SSE + chunk(sse(net_delta("Hel")))
    with Server(net_drip(head, tail)) as server:
        error = net_timeout(net_read, server)
    assert error.reply.text == "Hel" and error.reply.stop_reason is None


@at_once(("",), ("Hel",))
def test_the_budget_runs_on_while_the_caller_holds_what_came(taken):
    with Server(NET_STREAM) as server:
        stream = net_stream(server, timeout=0.2)
        assert not taken or next(stream) == taken
        time.sleep(0.25)
        error = net_error(serv.APITimeoutError, next, stream)
        net_error(serv.APITimeoutError, next, stream)
    assert error.reply.text.startswith(taken)


# ---------------------------------------------------------------------------
# Kept connections.
# ---------------------------------------------------------------------------

def test_twenty_calls_share_one_connection():
    with Server(net_echo) as server:
        for number in range(20):
            call = (net_chat, net_read)[number % 2]
            assert call(server, "no. %d" % number) == "no. %d" % number
        assert server.connections == 1


def test_an_error_answer_does_not_cost_the_connection():
    with Server([http_answer({}, "400 Bad Request"), NET_OK]) as server:
        net_error(serv.BadRequestError, net_chat, server)
        assert net_chat(server) == "Hello!"
        assert server.connections == 1


@net_calls
def test_a_connection_closed_while_idle_is_replaced(call):
    with Server([net_last(NET_OK), net_echo]) as server:
        assert net_chat(server) == "Hello!"
        assert call(server) == "Hi"
        assert (server.connections, len(server.requests)) == (2, 2)


@net_calls
@pytest.mark.parametrize("lost", [net_hang_up, net_reset()],
                         ids=["close", "reset"])
def test_a_connection_lost_as_the_request_comes_is_replaced(call, lost):
    with Server([NET_OK, lost, net_echo]) as server:
        assert net_chat(server) == "Hello!"
        assert call(server) == "Hi"
        assert [each.connection for each in server.requests] == [1, 1, 2]


@net_calls
@pytest.mark.parametrize("begun", [
    b"H", b"HTTP/1.1 200 OK\r\n", NET_CHUNKED], ids=net_short)
def test_no_second_request_once_an_answer_has_begun(call, begun):
    with Server([NET_OK, net_last(begun), NET_OK]) as server:
        net_chat(server)
        net_error(serv.APIConnectionError, call, server)
        assert len(server.requests) == 2


@net_calls
@pytest.mark.parametrize("lost", [net_hang_up, net_reset()],
                         ids=["close", "reset"])
def test_a_lost_new_connection_is_an_error(call, lost):
    with Server([lost, NET_OK]) as server:
        net_error(serv.APIConnectionError, call, server)
        assert len(server.requests) == 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("then", ["close", "keep", "with the answer"])
def test_an_unsolicited_408_is_not_the_next_answer(whole, then):
    late = http_answer({"error": {"message": "idle"}}, "408 Request Timeout",
                       connection="close")
    late = late if whole else late[:20]
    called, sent = threading.Event(), threading.Event()

    def answer(wire, request):
        if request.connection > 1:
            return net_echo(wire, request)
        if then == "with the answer":
            wire.sendall(NET_OK + late)
        else:
            wire.sendall(NET_OK)
            called.wait(10)
            wire.sendall(late)
        sent.set()
        return then != "close"

    with Server(answer) as server:
        assert net_chat(server) == "Hello!"
        called.set()
        sent.wait(10)
        # "with the answer" it may be used again, for it is in order
        assert net_chat(server) in ("Hi", "Hello!")
        if then != "with the answer":
            assert server.connections == 2


@pytest.mark.parametrize("data", [
    http_answer(net_said("Hello!"), connection="close"),
    http_answer(net_said("Hello!"), connection="Keep-Alive, Close"),
    NET_OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    NET_STREAM.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1),
], ids=["close", "list", "1.0", "stream"])
def test_a_connection_that_is_to_be_closed_is(data):
    with Server(data) as server:
        call = net_read if b"event-stream" in data else net_chat
        assert [call(server), call(server)] == ["Hello!", "Hello!"]
        assert server.connections == 2


def test_a_stream_closed_early_does_not_leave_its_rest_to_others():
    with Server([NET_STREAM, net_echo]) as server:
        with net_stream(server) as stream:
            assert next(stream) == "Hel"
        assert list(stream) == [] and stream.reply.text == "Hel"
        assert net_chat(server, "mine") == "mine"
        assert server.connections == 2


def test_a_stream_ends_with_its_last_event_though_the_wire_stays_open():
    open_end = NET_STREAM[:-len(chunk(b""))]
    with Server([open_end, net_echo]) as server:
        begun = time.monotonic()
        assert net_read(server, timeout=30) == "Hello!"
        assert time.monotonic() - begun < 2
        assert net_chat(server, "mine") == "mine"
        assert server.connections == 2


def test_many_hosts_do_not_keep_the_last_from_being_kept(monkeypatch):
    with Server(net_echo) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        for number in range(getattr(serv, "MAX_IDLE", 100) + 5):
            net_chat("http://host-%d.test" % number)
        count = proxy.connections
        net_chat("http://host-%d.test" % number)
        assert proxy.connections == count


def test_each_of_64_threads_gets_its_own_answers():
    together = threading.Barrier(64, timeout=20)

    def work(number):
        together.wait()
        for turn in range(4):
            mine = "%d of %d" % (turn, number)
            call = net_read if (turn + number) % 4 == 0 else net_chat
            assert call(server, mine) == mine
        return number

    with Server(net_echo) as server:
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert list(pool.map(work, range(64))) == list(range(64))
        assert server.connections <= 64


def test_a_kept_connection_is_probed_and_sends_at_once():
    with Server(net_echo) as server:
        net_chat(server)
        place = ("127.0.0.1", server.port)
        socks = [each for each in gc.get_objects()
                 if type(each) is socket.socket and each.fileno() >= 0]
        mine = []
        for sock in socks:
            with contextlib.suppress(OSError):
                if sock.getpeername() == place:
                    mine.append(sock)
        if not mine:
            pytest.skip("this Python does not show its sockets")
        for sock in mine:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP,
                                       socket.TCP_KEEPIDLE) == 60


NET_FORK = """
import os, sys, serv
ask = dict(system="s", base_url=sys.argv[1], timeout=20.0, max_retries=0)
for turn in range(4):
    assert serv.chat("warm", **ask).text == "warm"
    child = os.fork()
    for number in range(5):
        mine = "%d.%d of %s" % (turn, number, "parent" if child else "child")
        assert serv.chat(mine, **ask).text == mine
        assert "".join(serv.stream(mine, **ask)) == mine
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""

NET_FORK_IN_STREAM = """
import os, sys, serv
ask = dict(system="s", base_url=sys.argv[1], timeout=20.0, max_retries=0)
stream = serv.stream("stream", **ask)
assert next(stream) == "Hel"
child = os.fork()
if not child:
    assert serv.chat("from the child", **ask).text == "from the child"
    if sys.argv[2] == "read":
        try:
            next(stream)
        except serv.ServError:
            pass
    elif sys.argv[2] == "close":
        stream.close()
    del stream
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert serv.chat("go on", **ask).text == "go on"
assert "".join(stream) == "lo!"
"""

net_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
plain_and_tls = at_once((False,), (True,))


@net_forks
@plain_and_tls
def test_a_fork_shares_no_connection(secure, net_tls):
    with Server(net_echo, net_tls if secure else None) as server:
        net_run(NET_FORK, server.url)


@net_forks
@at_once((False, "read"), (False, "close"), (True, "close"), (True, "exit"))
def test_a_child_does_not_disturb_its_parents_stream(secure, child, net_tls):
    told = threading.Event()

    def answer(wire, request):
        if net_prompt(request) == "stream":
            cut = NET_STREAM.index(chunk(sse(net_delta("lo!", "stop"))))
            wire.sendall(NET_STREAM[:cut])
            told.wait(20)
            wire.sendall(NET_STREAM[cut:])
        else:
            net_echo(wire, request)
            if net_prompt(request) == "go on":
                told.set()

    with Server(answer, net_tls if secure else None) as server:
        net_run(NET_FORK_IN_STREAM, server.url, child)


NET_NO_FILES = """
import os, resource, sys, serv
ask = dict(system="s", base_url=sys.argv[1], timeout=20.0, max_retries=0)
serv.chat("Hi", **ask)
known = set(sys.modules)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    serv.chat("Hi", **ask)
except serv.AuthenticationError as error:
    print(error)
print(*(set(sys.modules) - known))
"""


def test_a_failure_loads_nothing():
    """It could not be loaded then; and a child of a fork could wait for it."""
    pytest.importorskip("resource")
    bad = http_answer({"error": "bad key " + KEY}, "401 Unauthorized")
    with Server([NET_OK, bad]) as server:
        told = net_run(NET_NO_FILES, server.url, SERV_API_KEY=KEY).split("\n")
        assert (len(server.requests), server.connections) == (2, 1)
    assert told[0].startswith("401 Unauthorized: bad key [api key]")
    assert told[1:] == ["", ""]


NET_CYCLES = """
import gc, sys, serv
gc.disable()
for url in sys.argv[1:]:
    gc.collect()
    try:
        serv.chat("Hi", system="s", base_url=url, timeout=20.0, max_retries=1)
    except serv.ServError as error:
        pass
    print(gc.collect())
"""


def test_a_failed_try_is_not_left_to_the_collector():
    """It holds the whole request."""
    bad = http_answer({"error": "no"}, "429 Too Many", retry_after=0)
    cut = net_last(NET_OK[:-1])
    answers = [bad, NET_OK], [bad], [net_hang_up, NET_OK], [cut]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(answer)) for answer in answers]
        urls = [server.url for server in servers]
        found = net_run(NET_CYCLES, *urls, SERV_API_KEY=KEY).split()
    assert found == ["0"] * len(answers)


NET_TIDY = """
import gc, sys, serv
ask = dict(system="s", base_url=sys.argv[1], timeout=20.0, max_retries=0)
stream = serv.stream("abandoned", **ask)
next(stream)
del stream
never_read = serv.stream("never read", **ask)
del never_read
events = serv.stream("events", **ask).events()
next(events)
del events
gc.collect()
try:
    with serv.stream("left by an exception", **ask) as stream:
        next(stream)
        raise KeyError
except KeyError:
    pass
for bad in "refused", "cut":
    for call in serv.chat, serv.stream:
        try:
            "".join(call(bad, **ask))
            raise SystemExit("no error")
        except serv.ServError as error:
            held = error
gc.collect()
kept = serv.chat("kept", **ask)
still_open = serv.stream("open at exit", **ask)
next(still_open)
"""


@plain_and_tls
def test_nothing_is_left_open(secure, net_tls):
    def answer(wire, request):
        prompt = net_prompt(request)
        if prompt == "refused":
            wire.sendall(http_answer({}, "401 No"))
        elif prompt == "cut":
            wire.sendall(NET_SSE + chunk(sse(net_delta("Hel"))))
            return False
        else:
            net_echo(wire, request)

    with Server(answer, net_tls if secure else None) as server:
        assert net_run(NET_TIDY, server.url, flags=[
            "-X", "dev", "-W", "error::ResourceWarning"]) == ""


# ---------------------------------------------------------------------------
# Retries.
# ---------------------------------------------------------------------------

def net_refusal(status, kind=None, **headers):
    """Return an error answer that asks for a retry at once."""
    body = {"error": {"message": "no", "type": kind}}
    return http_answer(body, "%d No" % status,
                       **dict({"retry_after_ms": "0"}, **headers))


@net_calls
@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_passing_trouble_is_retried(call, status):
    with Server([net_refusal(status)] * 2 + [net_echo]) as server:
        assert call(server, max_retries=2) == "Hi"
        assert len(server.requests) == 3
        assert len({request.body for request in server.requests}) == 1


@net_calls
@pytest.mark.parametrize("status", [
    302, 400, 401, 402, 403, 404, 405, 410, 413, 422, 451])
def test_a_refusal_is_not_retried(call, status):
    with Server([net_refusal(status), net_echo]) as server:
        error = net_error(serv.APIStatusError, call, server, max_retries=5)
        assert error.status == status
        assert len(server.requests) == 1


@pytest.mark.parametrize("error", [
    {"type": "insufficient_quota"}, {"code": "insufficient_quota"}])
def test_an_empty_purse_is_not_retried(error):
    answer = http_answer({"error": dict(error, message="pay")}, "429 No",
                         retry_after_ms="0")
    with Server([answer, NET_OK]) as server:
        net_error(serv.RateLimitError, net_chat, server, max_retries=5)
        assert len(server.requests) == 1


@net_calls
@pytest.mark.parametrize("status, told, count", [
    (400, "true", 2), (401, "True", 2), (503, "false", 1), (429, "false", 1),
    (400, "maybe", 1), (503, "", 2)])
def test_x_should_retry_decides(call, status, told, count):
    answer = net_refusal(status, x_should_retry=told)
    with Server([answer, net_echo]) as server:
        with contextlib.suppress(serv.APIStatusError):
            call(server, max_retries=5)
        assert len(server.requests) == count


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_as_many_retries_as_asked_for(retries):
    with Server(net_refusal(503)) as server:
        net_error(serv.InternalServerError, net_chat, server,
                  max_retries=retries)
        assert len(server.requests) == retries + 1


@pytest.mark.parametrize("headers, seconds", [
    ({"retry_after_ms": "1500"}, 1.5),
    ({"retry_after_ms": "0", "retry_after": "7"}, 0),
    ({"retry_after_ms": "soon", "retry_after": "7"}, 7),
    ({"retry_after_ms": "-1", "retry_after": "7"}, 7),
    ({"retry_after": "7"}, 7),
    ({"retry_after": " 7.5 "}, 7.5),
    ({"retry_after": "0"}, 0),
    ({"retry_after": "-1"}, None),
    ({"retry_after": "soon"}, None),
    ({"retry_after": ""}, None),
    ({"retry_after": "nan"}, None),
    ({"retry_after": "inf"}, None),
    ({"retry_after": "1_000"}, None),
    ({"retry_after": "\xb2"}, None),
    ({"retry_after": "Sun, 06 Nov 1994 08:49:37 GMT"}, None),
    ({"retry_after": "Sun, 99 Nov 1994 99:49:37 GMT"}, None),
    ({"retry_after": "Sun, 06 Nov 99999 08:49:37 GMT"}, None),
    ({}, None)])
def test_what_a_server_asks_to_wait(headers, seconds):
    with Server(http_answer({}, "503 Busy", **headers)) as server:
        error = net_error(serv.InternalServerError, net_chat, server)
    assert error.retry_after == seconds


def test_a_date_to_wait_for():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    with Server(http_answer({}, "503 Busy", retry_after=date)) as server:
        error = net_error(serv.InternalServerError, net_chat, server)
    assert 90 < error.retry_after <= 100


@at_once(
    ({"retry_after_ms": "200"}, 0.2, 0.7), ({"retry_after": "0.2"}, 0.2, 0.7),
    ({"retry_after": "0"}, 0, 0.3), ({"retry_after_ms": "0"}, 0, 0.3))
def test_the_wait_is_what_the_server_asks_for(headers, least, most):
    with Server([http_answer({}, "429 Slow", **headers), NET_OK]) as server:
        begun = time.monotonic()
        assert net_chat(server, max_retries=1) == "Hello!"
        assert least <= time.monotonic() - begun <= most


@pytest.mark.parametrize("wait", ["86400", "999999999999999", "9" * 400,
                                  "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_wait_beyond_the_budget_raises_at_once(wait):
    with Server(http_answer({}, "429 Slow", retry_after=wait)) as server:
        begun = time.monotonic()
        # 400 digits may count as no number: then the back-off does not fit
        net_error(serv.RateLimitError, net_chat, server, max_retries=5,
                  timeout=0.1 if len(wait) > 99 else 600)
        assert time.monotonic() - begun < 0.5
        assert len(server.requests) == 1


def net_retry_refused():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # it does not listen yet

    def serve():
        listener.listen(5)
        with listener.accept()[0] as wire, wire.makefile("rb") as reader:
            read_request(reader, 1)
            wire.sendall(NET_OK)

    url = "http://127.0.0.1:%d" % listener.getsockname()[1]
    timer = threading.Timer(0.1, serve)
    with listener:
        net_error(serv.APIConnectionError, net_chat, url)
        timer.start()
        assert net_chat(url, max_retries=3) == "Hello!"
        timer.join()


def net_retry_cut():
    with Server([net_last(NET_OK[:-5]), NET_OK]) as server:
        assert net_chat(server, max_retries=1) == "Hello!"
        assert len(server.requests) == 2


@at_once((net_retry_refused,), (net_retry_cut,))
def test_a_refused_connection_and_a_cut_answer_are_retried(check):
    check()


@pytest.mark.parametrize("begun", [
    NET_SSE, NET_SSE + chunk(sse(net_delta("Hel"))),
    NET_SSE + chunk(sse({"error": {"type": "overloaded_error"}}))],
    ids=["head", "piece", "error"])
def test_a_stream_that_has_begun_is_not_retried(begun):
    with Server([net_last(begun), NET_STREAM]) as server:
        net_error(serv.ServError, net_read, server, max_retries=5)
        assert len(server.requests) == 1


@net_calls
def test_a_refused_certificate_is_not_retried(call, net_tls, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with Server(NET_OK, net_tls) as server:
        begun = time.monotonic()
        net_error(serv.APIConnectionError, call, server, max_retries=5)
        assert time.monotonic() - begun < 0.5
        assert server.connections == 1


# ---------------------------------------------------------------------------
# Broken answers.
# ---------------------------------------------------------------------------

NET_BROKEN = [
    # what the server sends before it hangs up, the error, what that says
    (NET_OK[:-9], serv.APIConnectionError, "cut"),
    (http_head(content_length=9), serv.APIConnectionError, "cut"),
    (NET_CHUNKED + b"ff\r\n{", serv.APIConnectionError, "cut"),
    (NET_CHUNKED + chunk(json.dumps(net_said("Hi")).encode()),
     serv.APIConnectionError, "cut"),
    (NET_CHUNKED, serv.APIConnectionError, "cut"),
    (NET_CHUNKED + b"zz\r\n{}\r\n", serv.APIConnectionError, ""),
    (NET_CHUNKED + b"-5\r\n{}\r\n", serv.APIConnectionError, ""),
    (NET_CHUNKED + b"\r\n{}\r\n", serv.APIConnectionError, ""),
    (NET_CHUNKED + b"f" * 40 + b"\r\n{}\r\n", serv.ServError, ""),
    (b"", serv.APIConnectionError, "clos"),
    (b"HTTP/1.1 2", serv.APIConnectionError, ""),
    (b"HTTP/1.1 200 OK\r\n", serv.APIConnectionError, "header"),
    (b"HTTP/1.1 200 OK\r\nContent-Ty", serv.APIConnectionError, "header"),
    (NET_OK[:NET_OK.index(b"\r\n\r\n") + 2], serv.APIConnectionError,
     "header"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", serv.APIConnectionError, "SSH-2.0"),
    (b"\x15\x03\x03\x00\x02\x02\x28", serv.APIConnectionError, ""),
    (b"\0\1\2\r\n\r\n", serv.APIConnectionError, ""),
    (b"HTTP/1.1 999999 What\r\n\r\n", serv.APIConnectionError, ""),
    (http_answer(gzip.compress(b"{}"), content_encoding="gzip"),
     serv.APIResponseError, "gzip"),
    (http_answer(b"?", content_encoding="br"), serv.APIResponseError, "br"),
    (http_answer(b"<html>Log in</html>", kind="text/html"),
     serv.APIResponseError, "<html>Log in"),
    (http_answer(b"\xff\xfe\xfd"), serv.APIResponseError, "JSON"),
    (http_answer(b""), serv.APIResponseError, "nothing"),
    (http_answer(b"", "204 No Content"), serv.APIResponseError, "nothing"),
    (http_answer(b"null"), serv.APIResponseError, "null"),
    (http_answer(b"[]"), serv.APIResponseError, "\\[\\]"),
    (http_answer(b"{}"), serv.APIResponseError, "{}"),
    (http_answer(b'{"choices": 1}'), serv.APIResponseError, "choices"),
    (http_head() + b'{"choices": [{"mess', serv.APIResponseError, "choices"),
    (http_answer({"error": {"type": "rate_limit_error", "message": "slow"}}),
     serv.RateLimitError, "429.*slow"),
    (http_answer({"error": "broke"}), serv.InternalServerError, "broke"),
    (http_head("500 Oops", content_length=99) + b"half",
     serv.InternalServerError, "500.*half"),
    (http_head("401 No", transfer_encoding="chunked") + b"zz",
     serv.AuthenticationError, "401"),
    (http_answer(b"<h1>Bad gateway</h1>", "502 Bad Gateway", "text/html"),
     serv.InternalServerError, "502.*Bad gateway"),
]


@net_calls
@pytest.mark.parametrize("data, kind, says", NET_BROKEN, ids=net_short)
def test_a_broken_answer(call, data, kind, says):
    with Server(net_last(data)) as server:
        error = net_error(serv.ServError, call, server)
        assert isinstance(error, kind)
        assert re.search(says, str(error))
        assert server.url in str(error) and "\n" not in str(error)
        assert len(server.requests) == 1


@net_calls
@pytest.mark.parametrize("size", [0, 10, 30, len(NET_OK) - 5])
def test_a_reset(call, size):
    with Server(net_reset(NET_OK[:size])) as server:
        net_error(serv.APIConnectionError, call, server)


def net_cut_stream(data, kind):
    with Server(net_last(data)) as server:
        stream = net_stream(server)
        assert next(stream) == "Hel"
        error = net_error(kind, list, stream)
    assert error.reply.text == "Hel"
    assert stream.reply == error.reply
    return str(error)


@pytest.mark.parametrize("tail, kind", [
    (b"", serv.APIConnectionError),
    (chunk(b""), serv.APIConnectionError),
    (b"ff\r\ndata", serv.APIConnectionError),
    (b"zz\r\n", serv.APIConnectionError),
    (chunk(b"data: {]\n\n"), serv.APIResponseError),
    (chunk(b"data: 7\n\n"), serv.APIResponseError),
    (chunk(sse({"error": {"message": "no"}})), serv.InternalServerError),
], ids=net_short)
def test_a_broken_stream(tail, kind):
    net_cut_stream(NET_SSE + chunk(sse(net_delta("Hel"))) + tail, kind)


def test_a_stream_reset_midway():
    got = threading.Event()

    def answer(wire, request):
        wire.sendall(NET_SSE + chunk(sse(net_delta("Hel"))))
        got.wait(10)
        return net_reset()(wire, request)

    with Server(answer) as server:
        stream = net_stream(server)
        assert next(stream) == "Hel"
        got.set()
        error = net_error(serv.APIConnectionError, next, stream)
    assert error.reply.text == "Hel"


@net_calls
@pytest.mark.parametrize("then", ["close", "hold", "read"])
def test_an_answer_during_an_upload_is_read(call, then):
    def answer(wire):
        data = b""
        while b"\r\n\r\n" not in data:
            data += wire.recv(1 << 10)
        wire.sendall(http_answer({"error": {"message": "too large"}},
                                 "413 Payload Too Large"))
        if then == "hold":
            over.wait(20)
        while then == "read" and wire.recv(1 << 16):
            pass

    over = threading.Event()
    with NetRaw(answer) as server:
        begun = time.monotonic()
        error = net_error(serv.APIStatusError, call, server, "x" * (1 << 24))
        assert time.monotonic() - begun < 3
        over.set()
    assert (error.status, error.message) == (413, "too large")


# ---------------------------------------------------------------------------
# Hostile servers.
# ---------------------------------------------------------------------------

def net_flood(head, piece):
    """Return an answer that never ends, as fast as it is taken."""
    piece *= max(1, (1 << 18) // len(piece))

    def answer(wire, request):
        wire.sendall(head)
        while True:
            wire.sendall(piece)
    return answer


NET_FLOODS = {
    "status line": net_flood(b"HTTP/1.1 200 ", b"x"),
    "header line": net_flood(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "header block": net_flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "folded header": net_flood(b"HTTP/1.1 200 OK\r\nX: y\r\n", b" y\r\n"),
    "continue": net_flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "continue with headers": net_flood(
        b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n"),
    "body": net_flood(http_head(), b" "),
    "long body": net_flood(http_head(content_length=10 ** 15), b" "),
    "chunks": net_flood(NET_CHUNKED, chunk(b" " * 999)),
    "one chunk": net_flood(NET_CHUNKED + b"fffffffffff\r\n", b" "),
    "chunk size": net_flood(NET_CHUNKED, b"0"),
    "chunk extension": net_flood(NET_CHUNKED + b"1;", b"x"),
    "trailers": net_flood(NET_CHUNKED + b"0\r\n", b"X: y\r\n"),
    "error body": net_flood(http_head("500 Oops"), b"x"),
    "html": net_flood(http_head(kind="text/html"), b"<br>"),
    "event line": net_flood(NET_SSE + b"fffffffffff\r\n", b"x"),
    "data line": net_flood(NET_SSE + b"fffffffffff\r\ndata: ", b"x"),
    "data lines": net_flood(NET_SSE + b"fffffffffff\r\n", b"data: x\n"),
    "name lines": net_flood(NET_SSE + b"fffffffffff\r\n", b"event: x\n"),
    "comments": net_flood(NET_SSE, chunk(b": ping\n\n" * 99)),
    "text": net_flood(NET_SSE, chunk(sse(net_delta("x" * 999)))),
    "choices": net_flood(NET_SSE, chunk(sse({"choices": [{}] * 9999}))),
    "calls": net_flood(NET_SSE, chunk(sse({"choices": [{"delta": {
        "tool_calls": [{"id": str(turn)} for turn in range(999)]}}]}))),
}

NET_HOSTILE = """
import json, os, re, resource, sys, serv
def peak():
    if os.path.exists("/proc/self/status"):  # Linux lets a child inherit
        with open("/proc/self/status") as file:  # its parent's ru_maxrss
            used = re.search("VmHWM:[^0-9]*([0-9]+)", file.read())
        return int(used.group(1)) >> 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used // (1 << 20 if sys.platform == "darwin" else 1 << 10)
ask = dict(system="s", base_url=sys.argv[1], timeout=0.15, max_retries=0)
serv.MAX_BODY = serv.MAX_STREAM = 1 << 22
before, ends = peak(), []
for flood in sys.argv[2:]:
    for call in serv.chat, serv.stream:
        try:
            "".join(call(flood, **ask))
            ends.append([flood, "no error"])
        except serv.ServError as error:
            ends.append([flood, type(error).__name__])
            assert len(str(error)) < 2000, flood
print(json.dumps([ends, peak() - before]))
"""


def test_no_flood_fills_the_memory():
    pytest.importorskip("resource")
    names = list(NET_FLOODS)
    with Server(lambda wire, request: NET_FLOODS[net_prompt(request)](
            wire, request)) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            told = list(pool.map(lambda part: json.loads(net_run(
                NET_HOSTILE, server.url, *names[part::4])), range(4)))
    assert sum(megabytes for _, megabytes in told) < 150
    ends = [end for part, _ in told for end in part]
    assert [end for end in ends if end[1] not in (
        "APIConnectionError", "APIResponseError", "APITimeoutError",
        "InternalServerError")] == []
    assert [end for end in ends if end[0] == "error body"] == [
        ["error body", "InternalServerError"]] * 2


def test_many_a_continue_before_an_answer():
    with Server(b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + NET_OK) as server:
        assert net_chat(server) == "Hello!"


NET_DEEP = ["[" * 100000, "[" * 100000 + "]" * 100000,
            '{"a":' * 100000 + "1" + "}" * 100000]


@net_calls
@pytest.mark.parametrize("text", NET_DEEP, ids=["open", "list", "dict"])
def test_deep_json_in_an_answer(call, text):
    with Server(http_answer(text.encode())) as server:
        net_error(serv.APIResponseError, call, server)
    inside = '{"choices": [{"message": {"content": "", "x": %s}}]}' % text
    with Server(http_answer(inside.encode())) as server:
        net_error(serv.APIResponseError, call, server)


@net_calls
@pytest.mark.parametrize("text", NET_DEEP, ids=["open", "list", "dict"])
def test_deep_json_in_an_error(call, text):
    with Server(http_answer(text.encode(), "500 Oops")) as server:
        error = net_error(serv.InternalServerError, call, server)
    assert len(str(error)) < 2000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("text", NET_DEEP, ids=["open", "list", "dict"])
def test_deep_json_in_an_event(text):
    assert net_cut_stream(NET_SSE + chunk(sse(net_delta("Hel")) + sse(text)),
                          serv.APIResponseError)


def test_an_event_of_20_megabytes():
    text = "0123456789" * (2 * 10 ** 6)
    with Server(stream_answer(net_delta(text, "stop"), "[DONE]")) as server:
        assert net_read(server) == text


def test_an_answer_of_20_megabytes():
    text = "0123456789" * (2 * 10 ** 6)
    with Server(http_answer(net_said(text))) as server:
        assert net_chat(server) == text


def test_a_stream_in_packets_of_two_bytes():
    texts = ["piece %d, \u20ac \U0001f600;" % turn for turn in range(50)]
    data = stream_answer(*map(net_delta, texts), net_delta("", "stop"),
                         "[DONE]")

    def answer(wire, request):
        for start in range(0, len(data), 2):
            wire.sendall(data[start:start + 2])

    with Server(answer) as server:
        assert list(net_stream(server)) == texts


NET_HTTP_PARTS = [
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 ", b"HTTP/1.0 200\r\n", b"200 OK",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 503 \xff\r\n", b"\r\n",
    b"\n", b"\r", b": ", b"Content-Length: ", b"5\r\n", b"-1\r\n",
    b"9" * 30 + b"\r\n", b"\xb2\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n", b"Content-Type: text/event-stream\r\n",
    b"Content-Type: \xff;=;\r\n", b"Content-Encoding: \xe9\r\n",
    b"Retry-After: \xb2\r\n", b"Location: \xff\r\n", b"Connection: close\r\n",
    b"\r\n\r\n", b"0\r\n\r\n", b"{}", b"data: {}\n\n", b"\0", b"\xff\xfe",
    NET_OK, NET_OK[:40], NET_STREAM, NET_STREAM[:150]]
NET_SSE_PARTS = [
    b"data", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf",
    b"event: error\n", b"event: ", b"data: ", b"data: [DONE]\n\n", b"id: 1\n",
    b"{", b"}", b"[", b"]", b"null", b"-1", b"1e999", b'"', b",",
    b'"choices":', b'"index":', b'"delta":', b'"content":', b'"tool_calls":',
    b'"function":', b'"arguments":', b'"type":', b'"error":', b'"message":',
    b'"finish_reason":"stop"', b'"usage":', b'"a"', b"\\ud83d", b"\xff",
    b'{"choices":[', b'{"choices":[{"index":0,"delta":{"content":',
    b'"x"}}]}\n\n', sse(net_delta("a")), sse(net_delta("b", "stop")),
    sse({"type": "content_block_delta", "index": 0, "delta": {
        "type": "text_delta", "text": "c"}})]


def net_fuzz(parts, turns, head=b""):
    """Ask for garbage, another each time; return how the calls ended."""
    def answer(wire, request):
        pick = random.Random(net_prompt(request))
        data = b"".join(
            pick.choice(parts) if pick.random() < 0.95
            else bytes(pick.randrange(256) for _ in range(pick.randrange(9)))
            for _ in range(pick.randrange(1, 16)))
        wire.sendall(head + data)
        return False

    ends = collections.Counter()
    with Server(answer) as server:
        for turn in range(turns):
            endpoint = "messages" if turn % 5 == 0 else "chat"
            call = net_chat if turn % 3 == 0 else net_read
            options = {} if call is net_chat else {
                "endpoint": endpoint, "max_tokens": 9}
            try:
                call(server, str(turn), timeout=5.0, **options)
                ends["answer"] += 1
            except serv.ServError as error:
                assert "\n" not in str(error)
                ends[type(error).__name__] += 1
    return ends


def test_random_bytes_for_http():
    ends = net_fuzz(NET_HTTP_PARTS, 500)
    assert ends["APIConnectionError"] and ends["APIResponseError"]
    assert not ends["APITimeoutError"]


def test_random_bytes_behind_a_good_status_line():
    ends = net_fuzz(NET_HTTP_PARTS, 500, b"HTTP/1.1 200 OK\r\n")
    assert ends["APIConnectionError"] and ends["APIResponseError"]
    assert not ends["APITimeoutError"]


def test_random_bytes_for_events():
    ends = net_fuzz(NET_SSE_PARTS, 600,
                    http_head(kind="text/event-stream"))
    assert len(ends) > 3 and not ends["APITimeoutError"]


# ---------------------------------------------------------------------------
# The key goes to one host, in one header.
# ---------------------------------------------------------------------------

@net_calls
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(call, status):
    with Server(net_echo) as other:
        place = other.url + "/v1/elsewhere"
        with Server(http_answer(b"", "%d Moved" % status,
                                location=place)) as server:
            error = net_error(serv.APIStatusError, call, server)
            assert len(server.requests) == 1
        assert other.connections == 0
    assert error.status == status and place in str(error)


@net_calls
def test_the_key_is_in_one_header_only(call):
    seen = []

    def answer(wire):
        data = wire.recv(1 << 16)
        while not data.endswith(b"}"):
            data += wire.recv(1 << 16)
        seen.append(data)
        wire.sendall(NET_OK)

    with NetRaw(answer) as server:
        call(server)
    assert seen[0].count(KEY.encode()) == 1
    assert ("\r\nAuthorization: Bearer %s\r\n" % KEY).encode() in seen[0]


NET_TELLTALES = [
    b"HTTP/1.1 401 No\r\n folded " + KEY.encode() +
    b"\r\nContent-Length: 2\r\n\r\n{}",
    http_answer({"error": {"message": "Bearer " + KEY, "type": KEY,
                           "code": KEY, "param": KEY, KEY: [KEY]}}, "401 No"),
    http_answer({"detail": ["x" * 380 + KEY]}, "422 No"),
    http_answer({}, "401 No", x_request_id=KEY, x_echo=KEY),
    http_answer(b"", "302 Found", location="http://host.test/?key=" + KEY),
    http_answer(b"<p>" + KEY.encode(), "403 " + KEY, "text/html"),
    http_answer(b"{}", content_encoding=KEY),
    http_answer(KEY.encode()), http_answer({"error": KEY}),
    KEY.encode() + b"\r\n", b"HTTP/1.1 " + KEY.encode() + b"\r\n\r\n",
    NET_CHUNKED + KEY.encode() + b"\r\n",
    http_head(content_length=99) + KEY.encode(),
    b"HTTP/1.1 401 No\r\nContent-Type: multipart/mixed; boundary=b\r\nno\r\n"
    b"--b\r\n " + KEY.encode() + b"\r\n\r\n",
    NET_SSE + chunk(sse({"error": {"message": KEY, "type": KEY}})),
    NET_SSE + chunk(b"data: {" + KEY.encode() + b"\n\n"),
    NET_SSE + chunk(sse(net_delta(KEY))),
]


def net_secrets(error):
    """Return all that an error could tell: text, values, causes, lines."""
    chain = [error]
    for link in chain:
        chain += [other for other in (link.__cause__, link.__context__)
                  if other is not None and other not in chain]
    told = [pickle.dumps(error).decode("latin-1")]
    for link in chain:
        told += [str(link), repr(link), repr(link.args), repr(vars(link))]
        headers = getattr(link, "headers", None)
        told += [repr(headers.items())] if headers else []
    told += traceback.format_exception(type(error), error,
                                       error.__traceback__)
    return "\n".join(told)


@net_calls
@pytest.mark.parametrize("data", NET_TELLTALES, ids=net_short)
def test_no_error_tells_the_key(call, data):
    with Server(net_last(data)) as server:
        error = net_error(serv.ServError, call, server)
    if b"chat.completion.chunk" in data:  # what the model says is the reply
        error.reply = None
    assert KEY not in net_secrets(error)
    assert KEY[:-4] not in str(error)


NET_INJECTIONS = [
    dict(headers={"X-Test": "a\r\nX-Evil: 1"}),
    dict(headers={"X-Test": "a\nX-Evil: 1"}),
    dict(headers={"X-Test": "a\rX-Evil: 1"}),
    dict(headers={"X-Test": "a\r\n X-Evil: 1"}),
    dict(headers={"X-Test": "a\0b"}),
    dict(headers={"X-Test": "a\u010ab"}),
    dict(headers={"X-Test\r\nX-Evil": "1"}),
    dict(headers={"X-Evil: 1\r\nX-Test": "1"}),
    dict(headers={"": "1"}), dict(headers={"X Test": "1"}),
    dict(headers={"Authorization": "Bearer a\r\nX-Evil: 1"}),
    dict(headers={"Content-Length": "1"}), dict(headers={"HOST": "evil"}),
    dict(headers={"transfer-encoding": "chunked"}),
    dict(api_key="a\r\nX-Evil: 1"), dict(api_key="a\nb"),
    dict(api_key="a\0b"), dict(api_key="serv_\u2026"),
]


@net_calls
@in_turn(*NET_INJECTIONS)
def test_an_injected_header_is_refused_unsent(options, call):
    with Server(NET_OK) as server:
        error = net_error((ValueError, TypeError, serv.ServError), call,
                          server, **options)
        assert server.connections == 0
    assert "\n" not in str(error)


@in_turn(
    "/\r\nX-Evil: 1", "/ HTTP/1.1\r\nX-Evil: 1\r\n\r\n", "/a b", "\n", "\t",
    " ", "/\u2028", "/?a=b", "/#a", "/\0", "\r\n.evil.test", "\\@evil.test")
def test_an_injected_url_is_refused_unsent(tail):
    with Server(NET_OK) as server:
        net_error(ValueError, net_chat, server.url + tail)
        assert server.connections == 0


@net_calls
@in_turn(
    "file:///etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1/a",
    "gopher://127.0.0.1:70/", "data:text/plain,hi", "unix:///run/socket",
    "javascript:1", "127.0.0.1:80", "//127.0.0.1", "http:127.0.0.1",
    "https://", "http://:80", "http://a:b@127.0.0.1", "http://a@127.0.0.1",
    "http://127.0.0.1:x", "http://127.0.0.1:99999", "http://[::1",
    "http://evil test/")
def test_other_urls_are_refused(url, call):
    net_error(ValueError, call, url)


# ---------------------------------------------------------------------------
# Restricted networks: proxies, and certificates of one's own.
# ---------------------------------------------------------------------------

def net_basic(login):
    return "Basic " + base64.b64encode(login.encode()).decode()


def net_tunnel(context, seen, answers=1):
    """Return the answer of a proxy to CONNECT; what comes inside is seen."""
    def answer(wire, request):
        if request.method != "CONNECT":
            return False
        wire.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(wire, server_side=True) as inner:
            with inner.makefile("rb") as reader:
                for left in range(answers - 1, -1, -1):
                    seen.append(read_request(reader, request.connection))
                    inner.sendall(NET_OK if left else http_answer(
                        net_said("Hello!"), connection="close"))
        return False
    return answer


@net_calls
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_an_http_proxy_gets_the_whole_url(call, name, monkeypatch):
    with Server(net_echo) as proxy:
        place = "127.0.0.1:%d" % proxy.port
        monkeypatch.setenv(name, "http://us%20er:p%40ss%3A@" + place)
        assert call("http://host.test:81/base") == "Hi"
        request, = proxy.requests
    assert request.method == "POST"
    assert request.target == "http://host.test:81/base/v1/chat/completions"
    assert request.headers["host"] == "host.test:81"
    assert request.headers["authorization"] == "Bearer " + KEY
    assert request.headers["proxy-authorization"] == net_basic("us er:p@ss:")


@net_calls
@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_an_https_call_goes_through_a_tunnel(call, name, net_tls,
                                             monkeypatch):
    seen = []
    with Server(net_tunnel(net_tls, seen)) as proxy:
        place = "127.0.0.1:%d" % proxy.port
        monkeypatch.setenv(name, "http://user:p%25ss@" + place)
        assert call("https://localhost") == "Hello!"
        connect, = proxy.requests
    assert (connect.method, connect.target) == ("CONNECT", "localhost:443")
    assert connect.headers["proxy-authorization"] == net_basic("user:p%ss")
    assert KEY not in str(connect)
    assert seen[0].target == "/v1/chat/completions"
    assert seen[0].headers["host"] == "localhost"
    assert seen[0].headers["authorization"] == "Bearer " + KEY
    assert "proxy-authorization" not in seen[0].headers


def test_a_tunnel_is_kept(net_tls, monkeypatch):
    seen = []
    with Server(net_tunnel(net_tls, seen, answers=3)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        assert [net_chat("https://localhost") for _ in range(3)] == [
            "Hello!"] * 3
        assert (proxy.connections, len(proxy.requests)) == (1, 1)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize("value", [
    "127.0.0.1", "*", "host.test, 127.0.0.1", "127.0.0.1:{port}"])
def test_no_proxy(name, value, monkeypatch):
    with Server(net_echo) as proxy, Server(net_echo) as server:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//u:p@"))
        monkeypatch.setenv(name, value.format(port=server.port))
        assert net_chat(server) == "Hi"
        assert (proxy.connections, len(server.requests)) == (0, 1)
        assert "proxy-authorization" not in server.requests[0].headers
        assert server.requests[0].target.startswith("/v1/")


def test_a_change_of_the_environment_is_seen(monkeypatch):
    with Server(net_echo) as proxy, Server(net_echo) as server:
        net_chat(server)
        monkeypatch.setenv("http_proxy", proxy.url)
        net_chat(server)
        assert (server.connections, proxy.connections) == (1, 1)
        monkeypatch.setenv("http_proxy", "")
        net_chat(server)
        assert (server.connections, proxy.connections) == (1, 1)
        assert (len(server.requests), len(proxy.requests)) == (2, 1)


@net_calls
def test_an_http_proxy_that_wants_a_login(call, monkeypatch):
    with Server(http_answer(b"Log in", "407 Proxy Authentication Required",
                            "text/plain")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        error = net_error(serv.APIStatusError, call, "http://host.test")
    assert error.status == 407


@net_calls
@pytest.mark.parametrize("data, says", [
    (http_answer(b"Log in", "407 Proxy Authentication Required"), "407"),
    (http_answer(KEY.encode(), "403 " + KEY), "403"), (b"", ""),
    (b"HTTP/1.1 2", ""), (b"\0\1\2\r\n\r\n", ""), (b"HTTP/1.1 x y\r\n", "")],
    ids=net_short)
def test_a_proxy_that_opens_no_tunnel(call, data, says, monkeypatch):
    with Server(net_last(data)) as proxy:
        place = "127.0.0.1:%d" % proxy.port
        monkeypatch.setenv("https_proxy", "http://user:opensesame@" + place)
        error = net_error(serv.APIConnectionError, call, "https://host.test",
                          timeout=5)
        assert {request.method for request in proxy.requests} == {"CONNECT"}
        assert KEY not in str(proxy.requests)
    told = net_secrets(error)
    assert says in str(error) and KEY not in told
    assert "opensesame" not in told


def test_a_proxys_wrong_login_is_not_tried_again(monkeypatch):
    """Some lock an account after three."""
    said = http_answer(b"Log in", "407 Proxy Authentication Required")
    with Server(net_last(said)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        error = net_error(serv.APIConnectionError, net_chat,
                          "https://host.test", max_retries=2)
        assert len(proxy.requests) == 1
    assert "407" in str(error)


def test_a_dead_proxy_is_not_gone_round(monkeypatch):
    with socket.socket() as closed, Server(NET_OK) as server:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", "127.0.0.1:%d"
                           % closed.getsockname()[1])
        error = net_error(serv.APIConnectionError, net_chat, server)
        assert server.connections == 0
    assert "through the proxy" in str(error)


@net_calls
def test_a_ca_of_ones_own(call, net_tls):
    with Server(net_echo, net_tls) as server:
        assert [call(server), call(server)] == ["Hi", "Hi"]
        assert server.connections == 1
        assert server.requests[0].headers["host"] == server.url[8:]


@net_calls
def test_an_unknown_ca_is_refused(call, net_tls, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with Server(net_echo, net_tls) as server:
        error = net_error(serv.APIConnectionError, call, server)
        assert server.requests == []
    assert re.search("certificate verify failed", str(error), re.I)
    assert "SSL_CERT_FILE" in str(error)


@net_calls
def test_a_certificate_of_another_host_is_refused(call, net_tls,
                                                  monkeypatch):
    seen = []
    with Server(net_tunnel(net_tls, seen)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        error = net_error(serv.APIConnectionError, call, "https://host.test")
    assert re.search("hostname mismatch", str(error), re.I)
    assert "host.test" in str(error) and seen == []


def test_a_kept_connection_does_not_outlive_its_ca(net_tls, monkeypatch):
    with Server(net_echo, net_tls) as server:
        assert net_chat(server) == "Hi"
        monkeypatch.delenv("SSL_CERT_FILE")
        net_error(serv.APIConnectionError, net_chat, server)


@net_calls
def test_a_ca_file_that_is_not_there(call, net_tls, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with Server(net_echo, net_tls) as server:
        net_error(serv.APIConnectionError, call, server)


@pytest.mark.parametrize("secure", [True, False])
def test_https_to_http_and_back(secure, net_tls):
    with Server(net_echo, net_tls if secure else None) as server:
        url = server.url.replace("https", "http") if secure else (
            server.url.replace("http", "https"))
        net_error(serv.APIConnectionError, net_chat, url, timeout=5)


NET_CONTEXTS = """
import os, ssl, sys, threading
made, new = [], ssl.SSLContext.__new__.__code__
def watch(frame, event, arg):
    if event == "call" and frame.f_code is new:
        made.append(1)
sys.setprofile(watch)
threading.setprofile(watch)
import serv
def call():
    serv.chat("Hi", system="s", base_url=sys.argv[1], timeout=20.0,
              max_retries=0)
for name in sys.argv[2], sys.argv[3], sys.argv[2]:
    os.environ["SSL_CERT_FILE"] = name
    call()
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(len(made))
"""


def test_one_tls_context_for_each_ca(net_tls, tmp_path):
    answer = http_answer(net_said("Hi"), connection="close")
    (tmp_path / "other.pem").write_text(NET_CA)
    with Server(answer, net_tls) as server:
        assert net_run(NET_CONTEXTS, server.url, tmp_path / "ca.pem",
                       tmp_path / "other.pem") == "2\n"
        assert server.connections == 15


# ---------------------------------------------------------------------------
# Restricted interpreters.
# ---------------------------------------------------------------------------

NET_CALL = """
import sys
sys.path.insert(0, sys.argv[2])
%s
print(serv.chat("Hi", system="s", base_url=sys.argv[1]).text,
      *serv.stream("Hi", system="s", base_url=sys.argv[1]))
"""


@at_once((["-I", "-S", "-W", "error", "-bb", "-X", "dev"],),
         (["-OO", "-E", "-s", "-W", "error"],))
def test_under_flags(flags):
    with Server(net_echo) as server:
        assert net_run(NET_CALL % "import serv", server.url, NET_HOME,
                       flags=flags) == "Hi H i\n"


def test_from_a_zip_file_and_vendored(tmp_path):
    with zipfile.ZipFile(str(tmp_path / "all.zip"), "w") as archive:
        archive.write(serv.__file__, "serv.py")
    vendor = tmp_path / "package" / "_vendor"
    vendor.mkdir(parents=True)
    shutil.copy(serv.__file__, str(vendor / "serv.py"))

    @at_once((tmp_path / "all.zip", "import serv"),
             (tmp_path, "from package._vendor import serv"))
    def run(path, line):
        with Server(net_echo) as server:
            assert net_run(NET_CALL % line, server.url, path,
                           flags=["-I", "-S"]) == "Hi H i\n"
    run()


def test_twice_under_two_names():
    def load(name):
        spec = importlib.util.spec_from_file_location(name, serv.__file__)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    try:
        one, other = load("net_serv_one"), load("net_serv_other")
        with Server(net_echo) as server:
            for module in one, other, one, other:
                assert module.chat("Hi", system="s", base_url=server.url,
                                   ).text == "Hi"
            assert server.connections == 2
        assert one.ServError is not other.ServError
    finally:
        sys.modules.pop("net_serv_one", None)
        sys.modules.pop("net_serv_other", None)


NET_IMPORT = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
done, writes = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.", "shutil.",
                         "_thread.start", "urllib.", "http.", "ftplib.")):
        if event not in ("os.listdir", "os.scandir", "os.putenv"):
            done.append((event, args))
    elif event == "open" and (set(str(args[1])) & set("wax+")
                              or (args[2] or 0) & writes):
        done.append((event, args))
sys.addaudithook(watch)
import serv
done, all_done = [], done
print(all_done, threading.active_count(), sorted(
    name for name in sys.modules if "." not in name
    and "site-packages" in str(getattr(sys.modules[name], "__file__", ""))))
"""


def test_importing_does_nothing_else():
    assert net_run(NET_IMPORT, NET_HOME, flags=["-I", "-S", "-B"]) == (
        "[] 1 []\n")


# ---------------------------------------------------------------------------
# Threads, processes, event loops, and a function in a cloud.
# ---------------------------------------------------------------------------

def test_in_a_thread_pool():
    with Server(net_echo) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            said = pool.map(lambda number: net_chat(server, str(number)),
                            range(20))
            assert list(said) == [str(number) for number in range(20)]


def test_replies_and_errors_cross_from_a_spawned_process():
    spawn = multiprocessing.get_context("spawn")
    refused = http_answer({"error": {"message": "pay", "type":
                                     "billing_error"}}, "402 No",
                          x_request_id="r1")
    with Server([http_answer(net_said("Hello!"), x_request_id="r0"),
                 refused]) as server:
        ask = dict(system="s", base_url=server.url)
        with concurrent.futures.ProcessPoolExecutor(
                1, mp_context=spawn) as pool:
            reply = pool.submit(serv.chat, "Hi", **ask).result(20)
            error = pool.submit(serv.chat, "Hi", **ask).exception(20)
        assert server.connections == 1
    assert type(reply) is serv.Reply and reply == net_said("Hello!")
    assert (reply.text, reply.request_id) == ("Hello!", "r0")
    assert reply.elapsed > 0
    assert type(error) is serv.BillingError
    assert (error.status, error.message, error.request_id) == (
        402, "pay", "r1")
    assert error.headers["X-Request-ID"] == "r1"


@pytest.mark.skipif(sys.version_info < (3, 9), reason="needs Python 3.9")
def test_in_an_event_loop():
    import asyncio

    async def work():
        return await asyncio.gather(*(
            asyncio.to_thread(net_chat, server, str(number))
            for number in range(8)))

    with Server(net_echo) as server:
        assert asyncio.run(work()) == [str(number) for number in range(8)]


NET_LAMBDA = """
import serv

def handler(event, context):
    return serv.chat(event["prompt"], system="Be brief.", timeout=20)
"""


def test_in_a_lambda_function(tmp_path):
    if importlib.util.find_spec("awslambdaric") is None:
        pytest.skip("needs awslambdaric")
    shutil.copy(serv.__file__, str(tmp_path / "serv.py"))
    (tmp_path / "app.py").write_text(NET_LAMBDA)
    posted, over = [], threading.Event()
    numbers = itertools.count()

    def runtime(wire, request):
        if request.method == "POST":
            posted.append((request.target, json.loads(request.body)))
            wire.sendall(http_answer({}, "202 Accepted"))
            return
        number = next(numbers)
        if number == 2:
            over.set()
            return net_hold()(wire, request)
        wire.sendall(http_answer(
            {"prompt": "no. %d" % number},
            lambda_runtime_aws_request_id="id-%d" % number,
            lambda_runtime_deadline_ms=int(1000 * time.time()) + 60000,
            lambda_runtime_invoked_function_arn="arn:aws:lambda:f",
            lambda_runtime_trace_id="Root=1"))

    with Server(net_echo) as server, Server(runtime) as api:
        environment = dict(
            os.environ, AWS_LAMBDA_RUNTIME_API=api.url[7:],
            SERV_BASE_URL=server.url, LAMBDA_TASK_ROOT=str(tmp_path))
        environment.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", "app.handler"],
            cwd=str(tmp_path), env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        with process:
            try:
                assert over.wait(20)
            finally:
                process.kill()
        assert server.connections == 1 and len(server.requests) == 2
    assert posted == [
        ("/2018-06-01/runtime/invocation/id-%d/response" % number,
         net_said("no. %d" % number)) for number in range(2)]


# ---------------------------------------------------------------------------
# Odd ones: what was met once, and must not be met again.
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("status", ["102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_skipped(status):
    interim = ("HTTP/1.1 %s\r\nLink: </a>\r\n\r\n" % status).encode()
    with Server(interim + NET_OK) as server:
        assert [net_chat(server), net_chat(server)] == ["Hello!"] * 2
        assert (len(server.requests), server.connections) == (2, 1)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("interim", [
    b"HTTP/1.1 103 Early Hints\r\nConnection: close\r\n\r\n",
    b"HTTP/1.0 102 Processing\r\n\r\n"])
def test_an_interim_answer_that_closes(interim, secure, net_tls):
    """http.client closes itself then, and would dial anew by itself."""
    with Server(interim + NET_OK, net_tls if secure else None) as server:
        assert [net_chat(server) for _ in range(3)] == ["Hello!"] * 3
        assert (len(server.requests), server.connections) == (3, 1)


def test_an_answer_in_an_unknown_encoding_costs_its_connection():
    bad = http_head(transfer_encoding="gzip, chunked", content_length=0)
    with Server([bad + NET_OK, NET_OK]) as server:
        net_error(serv.APIResponseError, net_chat, server)
        assert net_chat(server) == "Hello!"
        assert server.connections == 2


def test_exceptions_that_the_caller_handles_are_left_alone():
    notes = [KEY]
    try:
        try:
            raise KeyError(notes)
        except KeyError as exc:
            raise exc from exc  # a chain without an end
    except KeyError as outer:
        with Server(http_answer({"error": "no"}, "400 Bad Request")) as server:
            net_error(serv.BadRequestError, net_chat, server)
            net_error(serv.BadRequestError, net_read, server)
        assert outer.args[0] is notes and notes == [KEY]


@pytest.mark.parametrize("value", ["Bearer %s ", "Bearer\t%s", "%s"])
def test_an_authorization_of_the_callers_own_is_secret(value, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    secret = "own-secret-0123456789"
    body = {"error": {"message": "bad key " + secret}}
    with Server(http_answer(body, "401 Unauthorized")) as server:
        with pytest.raises(serv.AuthenticationError) as caught:
            net_chat(server, headers={"authorization": value % secret})
    assert_no_key(caught.value, secret)


@pytest.mark.parametrize("form", [
    "HTTP/1.1 %s OK\r\n\r\n", http_head(
        transfer_encoding="chunked").decode() + "%s\r\n"],
    ids=["status", "chunk"])
@pytest.mark.parametrize("key", [r"own\secret\012", r"\\own.secret", r"o\x"])
def test_a_key_with_a_backslash_is_cut_out_of_what_quotes_it(form, key):
    with Server((form % key).encode()) as server:
        with pytest.raises(serv.APIConnectionError) as caught:
            net_chat(server, api_key=key)
    assert_no_key(caught.value, key)
    assert_no_key(caught.value, repr(key)[1:-1])


def test_a_key_of_backslashes_is_looked_for_in_linear_time():
    body = {"error": {"message": "\\" * 3000}}
    begun = time.monotonic()
    with Server(http_answer(body, "400 No")) as server:
        with pytest.raises(serv.BadRequestError):
            net_chat(server, api_key="\\\\leading")
    assert time.monotonic() - begun < 5  # cubic time is three times that


@pytest.mark.parametrize("kind", [
    "multipart/mixed; boundary=x", "message/rfc822"])
def test_the_headers_of_any_kind_of_answer_can_be_shown(kind):
    with Server(http_answer({"error": "no"}, "400 No", kind)) as server:
        error = net_error(serv.BadRequestError, net_chat, server)
    assert str(error.headers).startswith("Content-")


@pytest.mark.parametrize("place", ["system", "messages"])
def test_a_system_prompt_that_is_too_deep_is_named(place):
    deep = []
    for _ in range(100000):
        deep = [deep]
    said = dict({"messages": "Hi", "system": [{"type": "text", "text": deep}]},
                **{place: [{"role": "system", "content": deep}]})
    with pytest.raises(ValueError, match="messages: JSON cannot say it"):
        serv.chat(model="m", api_key=KEY, **said)
    while deep:  # or its garbage would be as deep
        deep = deep.pop()


def test_an_interrupt_before_the_first_piece_is_no_other_error():
    with Server(stream_answer(*STREAM_HELLO)) as server:
        stream = stream_open(server)
        with pytest.raises(KeyboardInterrupt):
            stream._source.throw(KeyboardInterrupt)
        assert stream.reply.partial
        with pytest.raises(serv.APIConnectionError):
            next(stream)


def test_every_choice_of_a_json_answer_to_a_stream_is_there():
    answer = {"object": "chat.completion", "choices": [
        {"index": i, "finish_reason": "stop", "message": {
            "role": "assistant", "content": text}}
        for i, text in enumerate("AB")]}
    pieces, reply = stream_read(http_answer(answer))
    assert (pieces, reply) == (["A"], answer)


def test_an_empty_object_erases_nothing():
    call = {"index": 0, "id": "a", "function": {
        "name": "f", "arguments": '{"q": 1}'}}
    pieces, reply = stream_read(stream_answer(
        stream_chunk({"content": "abc", "tool_calls": [call]}),
        stream_chunk({"content": {}, "tool_calls": [
            {"index": 0, "function": {"arguments": {}}}]}),
        stream_chunk({"tool_calls": {}}, "tool_calls"), "[DONE]"))
    assert (pieces, reply.text) == (["abc"], "abc")
    assert reply.tool_calls == [("a", "f", {"q": 1})]


def test_an_empty_object_does_not_erase_a_tools_input():
    events = stream_block(0, {"type": "tool_use", "id": "a", "name": "f"}, *(
        {"type": "input_json_delta", "partial_json": part}
        for part in ('{"q": 1}', {})))
    reply = stream_read(stream_answer(*events, *stream_end()), "messages")[1]
    assert reply.tool_calls == [("a", "f", {"q": 1})]


@pytest.mark.parametrize("endpoint, events", STREAM_OPENINGS,
                         ids=["chat", "messages"])
def test_a_named_error_that_repeats_the_last_event_is_one(endpoint, events):
    last = [each for each in events if "lo" in json.dumps(each)][-1]
    wire = http_head(kind="text/event-stream") + sse(*events) + (
        "event: error\ndata: %s\n\n" % json.dumps(last)).encode()
    pieces, error = stream_error(stream_closing(wire), endpoint)
    assert ("".join(pieces), error.reply.text) == ("Hello", "Hello")
    assert isinstance(error, serv.InternalServerError)


@each_endpoint
@pytest.mark.parametrize("data", ["", "[DONE]", "x"])
def test_a_named_error_is_one_whatever_its_data(endpoint, data):
    events = dict(STREAM_OPENINGS)[endpoint]
    wire = http_head(kind="text/event-stream") + sse(*events) + (
        "event: error\ndata: %s\n\n" % data).encode() + sse("[DONE]")
    pieces, error = stream_error(stream_closing(wire), endpoint)
    assert ("".join(pieces), error.status) == ("Hello", 500)


@pytest.mark.parametrize("entries", [
    [{"id": "d", "url": "a"}, {"id": "d", "url": "b"}],
    [{"index": 20000, "url": "a"}, {"index": -1, "url": "b"}]])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_list_in_a_block_is_kept_as_it_comes(entries, streamed):
    block = {"type": "web_search_tool_result", "tool_use_id": "s",
             "content": entries}
    answer = http_answer(stream_message([block]))
    if streamed:
        answer = stream_answer(*stream_said(), *stream_block(1, block),
                               *stream_end())
    reply = stream_read(answer, "messages")[1]
    assert reply["content"][-1] == block


def test_a_tools_input_named_message_is_kept_as_it_comes():
    given = {"message": {"text": "hi", "content": [
        {"index": 1, "a": 1}, {"index": 1, "a": 2}, {"index": -1}]}}
    events = stream_block(0, {"type": "tool_use", "id": "a", "name": "f",
                              "input": given})
    reply = stream_read(stream_answer(*events, *stream_end()), "messages")[1]
    assert reply.tool_calls == [("a", "f", given)]


def test_a_whole_message_beside_an_empty_delta_is_read():
    whole = stream_whole({"content": "hello"})
    whole["choices"][0]["delta"] = {}
    pieces, reply = stream_read(stream_answer(whole, "[DONE]"))
    assert (pieces, reply.text) == (["hello"], "hello")


@pytest.mark.parametrize("event, told", [
    ({"type": "insufficient_quota", "message": "over"}, "over"),
    ({"type": "request_too_large", "message": "big"}, "big"),
    ({"message": None, "detail": "no"}, "no"),
    ({"detail": [{"msg": "no"}]}, '[{"msg": "no"}]')])
@each_endpoint
def test_a_flat_error_is_one(event, told, endpoint):
    wire = stream_answer(*dict(STREAM_OPENINGS)[endpoint], "%s" % json.dumps(
        event), "[DONE]")
    pieces, error = stream_error(wire, endpoint)
    assert ("".join(pieces), error.message) == ("Hello", told)


@pytest.mark.parametrize("name, event", [
    ("quota", {"message": "50 left"}), ("", {"detail": [], "usage": {}}),
    ("content_filter", "ok"), ("", {"detail": ""})])
@each_endpoint
def test_a_notice_is_no_error(name, event, endpoint):
    wire = http_head(kind="text/event-stream") + sse(
        *dict(STREAM_OPENINGS)[endpoint])
    wire += ("event: %s\ndata: %s\n\n" % (name, json.dumps(
        event) if isinstance(event, dict) else event)).encode()
    wire += sse(*([stream_chunk({}, "stop"), "[DONE]"]
                  if endpoint == "chat" else stream_end()))
    assert "".join(stream_read(stream_closing(wire), endpoint)[0]) == "Hello"


def test_text_without_a_type_comes_in_pieces():
    events = stream_block(0, {}, {"text": "Hel"}, {"text": "lo"})
    pieces, reply = stream_read(
        stream_answer(*events, *stream_end()), "messages")
    assert (pieces, reply.text) == (["Hel", "lo"], "Hello")


@pytest.mark.parametrize("entries", [
    [{"type": "a", "index": 9, "file": "x"}, {"type": "a", "index": 9,
                                              "file": "y"}],
    [{"id": "d", "chunk": "one"}, {"id": "d", "chunk": "two"}],
    [{"index": 30, "u": "x"}, {"index": 10, "u": "y"}]])
@pytest.mark.parametrize("cut", [1, 2])
def test_unknown_lists_are_kept_as_they_come(entries, cut):
    events = [stream_chunk({"notes": part}) for part in
              (entries[:cut], entries[cut:]) if part]
    reply = stream_read(stream_answer(
        *events, stream_chunk({}, "stop"), "[DONE]"))[1]
    assert reply.message["notes"] == entries


@pytest.mark.parametrize("values, last", [
    ((False, "no"), "no"), (({"a": 1}, "t"), "t"), ((5, "a"), "a"),
    (("a", 5), 5), ((5, ["a"]), ["a"]), (("a", {"b": 1}), {"b": 1})])
@pytest.mark.parametrize("name", ["x", "reasoning", "citations"])
def test_a_field_may_change_its_kind(values, last, name):
    events = [stream_chunk({name: value}) for value in values]
    reply = stream_read(stream_answer(
        *events, stream_chunk({}, "stop"), "[DONE]"))[1]
    assert reply.message[name] == last


def test_an_input_that_comes_as_an_object():
    events = [
        {"type": "content_block_start", "index": 0, "content_block": {
            "type": "tool_use", "id": "t", "name": "f", "input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": {
            "type": "input_json_delta", "partial_json": {"a": 1}}},
        {"type": "message_stop"}]
    reply = stream_read(stream_answer(*events), "messages")[1]
    assert reply.tool_calls == [serv.ToolCall("t", "f", {"a": 1})]


def test_blocks_that_are_all_counted_as_0():
    events = []
    for block, delta in (
            ({"type": "text", "text": ""},
             {"type": "text_delta", "text": "hey"}),
            ({"type": "tool_use", "id": "t", "name": "f", "input": {}},
             {"type": "input_json_delta", "partial_json": '{"a": 1}'})):
        events += [
            {"type": "content_block_start", "index": 0,
             "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0}]
    reply = stream_read(stream_answer(*events, {"type": "message_stop"}),
                        "messages")[1]
    assert reply["content"] == [
        {"type": "text", "text": "hey"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]


@pytest.mark.parametrize("begun, order", [
    ([0, 1, 2], "ABC"), ([2, 0, 1], "BCA"), ([1, 7, 4], "ACB"),
    ([0, 0, 0], "ABC"), ([0, 1, 0, 1, 0, 1], "ABCDEF"),
    ([0, 0, 1], "ABC"), ([0, 0, 1, 1, 2], "ABCDE"), ([1, 0, 0], "BAC"),
    ([None, None, None], "ABC"), ([0, None, None], "ABC"),
    ([None, 1, None], "ABC")])
def test_blocks_stand_by_their_index_or_as_they_are_begun(begun, order):
    events = []
    for index, text in zip(begun, "ABCDEF"):
        where = {} if index is None else {"index": index}
        events += [
            {"type": "content_block_start", **where,
             "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", **where,
             "delta": {"type": "text_delta", "text": text}},
            {"type": "content_block_stop", **where}]
    reply = stream_read(stream_answer(*events, {"type": "message_stop"}),
                        "messages")[1]
    assert [block["text"] for block in reply["content"]] == [*order]


@pytest.mark.parametrize("headers", [[("a", "b")], "a: b", 5])
def test_headers_are_a_mapping(headers, standin):
    with pytest.raises(TypeError, match="headers"):
        serv.chat("Hi", system="s", headers=headers)
    assert standin.requests == [] or standin.requests[-1].headers


def test_a_broken_event_of_a_vendors_name_is_broken():
    events = b"".join(b"event: chunk\n" + sse(event) for event in (
        stream_chunk({"content": "a"}), '{"choices": [{"delta": "LO'))
    with Server(http_head(kind="text/event-stream",
                          content_length=len(events)) + events) as server:
        stream = stream_open(server)
        assert next(stream) == "a"
        with pytest.raises(serv.APIResponseError):
            next(stream)


def test_many_fields_cost_what_they_weigh():
    big = dict(stream_chunk({"content": "a"}),
               **{"k%d" % i: 0 for i in range(50000)})
    events = [dict(stream_chunk({"content": "b"}), z=i) for i in range(1100)]
    pieces, reply = stream_read(stream_answer(
        big, *events, stream_chunk({}, "stop"), "[DONE]"))
    assert (len(pieces), reply["z"], reply["k9"]) == (1101, 1099, 0)


def test_a_stream_that_was_interrupted_does_not_end_in_silence():
    def answer(wire, request):
        wire.sendall(NET_SSE + chunk(sse(stream_chunk({"content": "a"}))))
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    config = {"key": KEY}

    def interrupt(*_):
        raise LookupError(config)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Server(answer) as server:
            stream = stream_open(server)
            with pytest.raises(LookupError):
                list(stream)
            with pytest.raises(serv.APIConnectionError) as caught:
                list(stream)
        assert caught.value.reply.text == "a"
        assert config == {"key": KEY}  # the caller's own
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs tzset()")
def test_a_date_without_a_zone_is_gmt(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = time.asctime(time.gmtime(time.time() + 86400))
        with Server(http_answer({}, "429 Too Many", retry_after=date)) as here:
            error = net_error(serv.RateLimitError, net_chat, here)
        assert 86000 < error.retry_after <= 86400
    finally:
        monkeypatch.undo()
        time.tzset()


def test_halves_in_two_blocks_are_read_as_they_are_replied():
    events = stream_said("a\ud83d") + stream_block(
        1, {"type": "text", "text": "\ude00b"}) + stream_end()
    pieces, reply = stream_read(stream_answer(*events), "messages")
    assert "".join(pieces) == reply.text


def test_a_costly_event_does_not_stretch_the_budget():
    event = b'data: {"choices": [' + b"{}," * 300000 + b"{}]}\n\n"
    begun = time.monotonic()
    with Server(NET_SSE + chunk(event) + chunk(b"")) as server:
        net_error(serv.ServError, net_read, server, timeout=1.0)
    assert time.monotonic() - begun <= 1.5


def test_a_costly_error_does_not_stretch_the_budget():
    body = b'{"error": {"message": "no"}, "x": [' + b"[], " * 3000000 + b"0]}"
    begun = time.monotonic()
    with Server(http_answer(body, "500 No")) as server:
        error = net_error(serv.InternalServerError, net_chat, server,
                          timeout=1.0)
    assert len(error.body) <= serv.MAX_ERROR
    assert time.monotonic() - begun <= 1.5


def test_a_connection_reset_while_idle_is_replaced():
    with Server([net_reset(NET_OK), net_echo]) as server:
        assert net_chat(server) == "Hello!"
        # until the reset is here
        select.select([serv._idle[-1].sock], [], [], 5)
        assert net_chat(server, max_retries=0) == "Hi"
        assert server.connections == 2


def test_a_request_that_was_read_is_not_sent_again(monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 0)  # as if it came later
    with Server([NET_OK, net_hang_up, NET_OK]) as server:
        net_chat(server)
        net_error(serv.APIConnectionError, net_chat, server, max_retries=0)
        assert len(server.requests) == 2


def test_a_lost_request_is_sent_once_more_not_to_every_kept_connection():
    meet = threading.Barrier(4)

    def answer(wire, request):
        if len(server.requests) > 4:
            return False
        meet.wait(10)
        wire.sendall(NET_OK)

    with Server(answer) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(net_chat, [server] * 4))
        assert server.connections == 4
        net_error(serv.APIConnectionError, net_chat, server, max_retries=0)
        assert len(server.requests) == 4 + 2


STREAM_AT_ONCE = {"index": 0, "finish_reason": "stop", "message": {
    "role": "assistant", "content": "hello"}}


@pytest.mark.parametrize("events", [
    [{"choices": [], "id": "a"}, {"choices": [STREAM_AT_ONCE], "id": "a"}],
    [{"choices": [STREAM_AT_ONCE]}],
    [{"choices": [{"index": 0, "delta": {"content": "hello"}}]},
     {"choices": [STREAM_AT_ONCE]}]],
    ids=["behind an empty chunk", "alone", "behind its own pieces"])
def test_a_whole_message_in_a_stream_is_read_once(events):
    pieces, reply = stream_read(stream_answer(*events, "[DONE]"))
    assert ("".join(pieces), reply.text) == ("hello", "hello")


def test_a_kept_connection_does_not_keep_the_request():
    with Server([http_answer(REPLY)]) as server:
        net_chat(server, "x" * (1 << 20))
        assert not serv._idle[-1].unsent
        assert isinstance(serv._idle[-1].unsent, bytes)


def test_a_whole_message_may_lack_its_type():
    answer = {"role": "assistant", "content": [text_block("Hello!")],
              "stop_reason": "end_turn"}
    pieces, reply = stream_read(http_answer(answer), "messages")
    assert (pieces, reply.text, reply.partial) == (["Hello!"], "Hello!", False)


def test_a_message_may_start_with_an_empty_block():
    start = {"type": "message_start", "message": {
        "role": "assistant", "content": [text_block("")]}}
    events = [start, *stream_block(0, text_block("Hi"))] + stream_end()
    reply = stream_read(stream_answer(*events), "messages")[1]
    assert reply["content"] == [text_block("Hi")]


@pytest.mark.parametrize("key", ["content", "reasoning_content", "refusal"])
def test_an_empty_list_erases_no_text(key):
    events = [stream_chunk({key: "Hi"}), stream_chunk({key: []}),
              stream_chunk({key: "!"}), stream_chunk({}, "stop")]
    reply = stream_read(stream_answer(*events, "[DONE]"))[1]
    assert reply.message[key] == "Hi!"


@at_once(*[("chat", [
    stream_chunk({"role": "assistant", "annotations": []}),
    stream_chunk({"annotations": [{"n": 1}]}),
    stream_chunk({"annotations": [{"n": 2}]}), stream_chunk({}, "stop")]),
    ("messages", stream_said()[:1] + stream_block(
        0, {"type": "text", "text": "", "citations": []},
        *[{"type": "citations_delta", "citation": {"n": n}} for n in (1, 2)])
     + stream_end())])
def test_events_stay_as_they_came(endpoint, events):
    end = ["[DONE]"] * (endpoint == "chat")
    with Server(stream_answer(*events, *end)) as server:
        assert [*stream_open(server, endpoint).events()] == events


def test_each_choice_may_come_as_a_whole_message():
    events = [{"choices": [dict(STREAM_AT_ONCE, index=index, message={
        "content": text})]} for index, text in enumerate("AB")]
    reply = stream_read(stream_answer(*events, "[DONE]"))[1]
    assert [choice["message"]["content"] for choice in reply["choices"]] == [
        "A", "B"]


@pytest.mark.parametrize("block", [{}, {"input": {}}, {"input": None}])
@pytest.mark.parametrize("text, given", [('{"a": 1}', {"a": 1}), ("", {})])
def test_a_block_that_is_begun_without_an_index(block, text, given):
    events = [
        {"type": "content_block_start", "content_block": dict(
            block, type="tool_use", id="a", name="f")},
        {"type": "content_block_delta", "index": 0, "delta": {
            "type": "input_json_delta", "partial_json": text}},
        {"type": "message_stop"}]
    reply = stream_read(stream_answer(*events), "messages")[1]
    assert reply.tool_calls == [("a", "f", given)]


def test_what_a_caller_does_to_an_event_does_not_hide_the_next():
    events = [stream_chunk({"content": "a"}, usage={"total": total})
              for total in (1, 2)]
    with Server(stream_answer(*events, stream_chunk({}, "stop"))) as server:
        with stream_open(server) as stream:
            for event in stream.events():
                if event.get("usage"):
                    event["usage"]["total"] += 1
        assert (stream.reply.usage, stream.reply.text) == ({"total": 2}, "aa")


@net_calls
@pytest.mark.parametrize("url", [
    "http:/user:opensesame@host:3128", "http://user:opensesame",
    "https://user:opensesame@host", "socks5://user:opensesame@host",
    "http://user:opensesame@", "http://user:opensesame@host:x"])
def test_a_proxy_that_is_no_url_is_refused_without_its_password(
        call, url, monkeypatch):
    monkeypatch.setenv("http_proxy", url)
    with pytest.raises(ValueError, match="http_proxy") as caught:
        call("http://host.test")
    assert "opensesame" not in net_secrets(caught.value)


def test_an_entry_that_is_no_object_is_not_gone_on_with():
    events = [stream_chunk({"tool_calls": calls}) for calls in (
        ["x"], [{"function": {"arguments": "y"}}])]
    reply = stream_read(stream_answer(
        *events, stream_chunk({}, "stop"), "[DONE]"))[1]
    assert len(reply.message["tool_calls"]) == 2


@pytest.mark.parametrize("given, shown", [
    ({"a": 1}, '{"a": 1}'), ([1], "[1]"), ({}, ""), ([], ""), (None, "")])
def test_a_calls_object_does_not_look_finished_in_a_cut_stream(given, shown):
    call = {"index": 0, "id": "a", "type": "function", "function": {
        "name": "f", "arguments": given}}
    error = stream_error(
        stream_answer(stream_chunk({"tool_calls": [call]})))[1]
    assert error.reply.tool_calls == [("a", "f", shown)]
    events = stream_said("x") + [{
        "type": "content_block_start", "index": 1, "content_block": {
            "type": "tool_use", "id": "a", "name": "f", "input": given}}]
    error = stream_error(stream_answer(*events), "messages")[1]
    assert error.reply.tool_calls == [("a", "f", shown)]


@pytest.mark.parametrize("given", [
    {"content": [{"id": "a", "x": 1}, {"id": "a", "x": 2}]},
    {"thinking": [{"index": 7, "x": 1}, {"index": 2, "x": 2}]},
    {"name": "n", "text": "t", "list": [1, 1], "in": {"tool_calls": [{}]}}])
def test_an_object_for_a_tool_is_left_as_it_is(given):
    call = {"id": "a", "type": "function", "function": {
        "name": "f", "arguments": given}}
    block = {"type": "tool_use", "id": "a", "name": "f", "input": given}
    for endpoint, events in (
            ("chat", [stream_chunk({"tool_calls": [dict(call, index=0)]}),
                      stream_chunk({}, "tool_calls")]),
            ("messages", stream_block(0, block) + stream_end("tool_use"))):
        reply = stream_read(stream_answer(*events), endpoint)[1]
        assert reply.tool_calls == [("a", "f", given)]


def test_an_error_event_is_one_whatever_stands_beside_it():
    error = stream_error(stream_answer(
        {"error": {"type": "rate_limit_error", "message": "slow"},
         "choices": "none"}))[1]
    assert type(error) is serv.RateLimitError


@net_calls
@pytest.mark.parametrize("parts", [
    ["HTTP/1.1 100 Continue\r\n\r\n"], ["HTTP/1.1 103 Early Hints\r\n\r\n"],
    ["H", "TTP/1.1 100 Continue\r\n\r\n"],
    ["HTTP/1.1 103 E\r\n", "Link: </a>; rel=preload\r\n", "\r\n"]])
def test_an_interim_answer_does_not_end_an_upload(call, parts):
    def answer(wire):
        with wire.makefile("rb") as reader:
            lines = list(iter(reader.readline, b"\r\n"))
            [left] = [int(line.split(b":")[1]) for line in lines
                      if line.lower().startswith(b"content-length:")]
            for part in parts:
                wire.sendall(part.encode())
                left -= len(reader.read(1 << 21))  # the part is seen by then
            reader.read(left)
        wire.sendall(NET_OK)

    with NetRaw(answer) as server:
        assert call(server, "x" * (1 << 24)) == "Hello!"


@pytest.mark.parametrize("entry", ["{}", '{"a":"b"}'])
@pytest.mark.parametrize("name", ["content", "tool_calls"])
def test_many_entries_without_an_index_are_too_many(name, entry):
    event = b'data: {"choices": [{"index": 0, "delta": {"%s": [%s]}}]}\n\n' % (
        name.encode(), b",".join([entry.encode()] * 20000))
    with Server(NET_SSE + chunk(event) + chunk(b"")) as server:
        net_error(serv.APIResponseError, net_read, server)


# ---------------------------------------------------------------------------
# The promises: what README.md and pyproject.toml say, and how serv.py is made.
# ---------------------------------------------------------------------------


ROOT = os.path.dirname(os.path.abspath(serv.__file__))


def read_file(name):
    """Return the text of one of the project's files; "" without a checkout."""
    if not os.path.exists(os.path.join(ROOT, name)):
        return ""
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


SOURCE, README, PYPROJECT = map(read_file, ("serv.py", "README.md",
                                       "pyproject.toml"))
TREE = ast.parse(SOURCE)
in_checkout = pytest.mark.skipif(not (README and PYPROJECT), reason=(
    "README.md and pyproject.toml are not here: the file was copied"))


# -- README.md: every block runs, and prints what it is said to print ---------

Block = collections.namedtuple("Block", "title kind marks code output exact")


def parse_blocks(text):
    """Return the blocks of code of a README, each with the output it shows.

    An output below a "the model's words" comment is an example of what may
    come; other comments are the ``marks`` of the block that follows.  Beside
    a print(), "# -> ..." is its output, "# e.g. ..." an example of it.
    """
    found, marks, title = [], [], ""
    for heading, mark, kind, code in re.findall(
            r"^(?:#+ ([^\n]*)|<!-- ([^\n]*) -->|```(\w+)\n(.*?)^```)$", text,
            re.M | re.S):
        title = heading or title
        if heading:
            marks = []
        elif mark:
            marks.append(mark)
        elif kind == "text" and "help" not in marks:
            found[-1] = found[-1]._replace(
                output=code, exact="the model's words" not in marks)
            marks = []
        else:
            found.append(Block(title, kind, marks, code, None, False))
            marks = []
    return found


BLOCKS = parse_blocks(README)
NOT_HERE = {"-m pip ": "installs something: .ci/run does that",
            "-m pytest": "would run this test again and again"}
ENGINES = {"dask": "distributed", "ray": "ray", "pyspark": "pyspark"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A place with the file, where the README's blocks run."""
    path = str(tmp_path_factory.mktemp("readme"))
    for name in ("serv.py", "test_serv.py"):
        if os.path.exists(os.path.join(ROOT, name)):
            shutil.copy(os.path.join(ROOT, name), path)
    py_compile.compile(os.path.join(path, "serv.py"))  # once, not each time
    return path


@contextlib.contextmanager
def serve():
    """A service on loopback, and an environment that leads to it."""
    own = {name: value for name, value in os.environ.items()
           if not name.upper().startswith(("SERV_", "SSL_CERT_"))
           and not name.upper().endswith("_PROXY")}
    with Server(service) as server:
        server.env = dict(
            own, SERV_BASE_URL=server.url, SERV_API_KEY=KEY,
            SERV_MODEL="gpt-5.4-mini", COLUMNS="80", PYTHONIOENCODING="utf-8",
            PATH=os.path.dirname(sys.executable) + os.pathsep
            + own.get("PATH", ""), PYSPARK_PYTHON=sys.executable,
            RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
        yield server


def run_in(command, served, place, text=""):
    """Run a command as a reader of the README would; return its output."""
    done = subprocess.run(command, cwd=place, env=served.env, timeout=120,
                          input=text, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def why_not(block):
    """Return why a block of the README cannot run here, or None."""
    for word, reason in NOT_HERE.items():
        if word in block.code:
            return reason
    missing = [module for word, module in ENGINES.items()
               if re.search(r"^(from|import) %s\b" % word, block.code, re.M)
               and not importlib.util.find_spec(module)]
    if block.kind == "sh":
        missing = [tool for tool in ("bash", "zip", "sha256sum")
                   if tool in block.code + "bash" and not shutil.which(tool)]
    return "there is no %s here" % missing[0] if missing else None


@pytest.fixture(scope="module")
def outputs(place):
    """What the README's blocks print, by number; they run two at a time."""
    def run(number):
        with serve() as served:
            if "test_serv.py" in BLOCKS[number].code:
                for name in [name for name in served.env if "SERV_" in name]:
                    del served.env[name]  # needs no key
            return run_in(commands[number], served, place).replace(
                served.url, serv.BASE_URL)

    commands = {}
    for number, block in enumerate(BLOCKS):
        commands[number] = ["bash", "-e", "-c", block.code]
        if block.kind == "python":
            name = (re.findall(r"\A# (\w+\.py)\n", block.code)
                    or ["ex%d.py" % number])[0]
            commands[number] = [sys.executable, name]
            with open(os.path.join(place, name), "w") as file:
                file.write(block.code)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return {number: pool.submit(run, number)
                for number, block in enumerate(BLOCKS)
                if block.kind != "text" and not why_not(block)}


@pytest.mark.parametrize("number, block", [
    pair for pair in enumerate(BLOCKS) if pair[1].kind != "text"],
    ids=lambda value: getattr(value, "title", None))
def test_readme_block_runs(number, block, outputs):
    if number not in outputs:
        pytest.skip(why_not(block))
    output = outputs[number].result()
    if block.output is not None and block.exact:
        assert output == block.output
    told = re.findall(r"^ *print\(.*  # (->|e\.g\.) (.*)$", block.code, re.M)
    assert len(output.splitlines()) >= len(told) - block.code.count("if ")
    for arrow, line in told:
        assert arrow != "->" or line in output.splitlines()


@in_checkout
def test_readme_blocks_are_all_run():
    kinds = collections.Counter(block.kind for block in BLOCKS)
    assert set(kinds) == {"python", "sh", "text"}  # "text": the help
    assert kinds["python"] > 12 and kinds["sh"] > 6 and kinds["text"] == 1
    shown = [block for block in BLOCKS if block.output is not None]
    assert README.count("\n```") == 2 * len(BLOCKS + shown)


@in_checkout
def test_readme_stand_in_needs_no_pytest(place):
    if not os.path.exists(os.path.join(place, "test_serv.py")):
        pytest.skip("test_serv.py is not beside serv.py")
    with serve() as served:
        told = run_in([sys.executable, "-S", "test_serv.py", "Hello!"],
                      served, place)
    assert told == 'You said: "Hello!"\n'


@in_checkout
def test_readme_lambda_handler(tmp_path):
    [block] = [b for b in BLOCKS if b.code.startswith("# lambda_function.py")]
    (tmp_path / "lambda_function.py").write_text(block.code)
    shutil.copy(serv.__file__, str(tmp_path))
    with serve() as served:
        output = run_in([sys.executable, "-c", """
import json, lambda_function
class Context:
    def get_remaining_time_in_millis(self):
        return 2900
print(json.dumps(lambda_function.lambda_handler(
    {"prompt": "Hello!"}, Context())))"""], served, str(tmp_path))
    answer = serv.Reply(json.loads(output))
    assert answer["object"] == "chat.completion" and answer.text
    sent = json.loads(served.requests[0].body)
    assert sent["messages"][-1] == {"role": "user", "content": "Hello!"}


@in_checkout
def test_readme_zip_is_a_whole_function(place):
    path = os.path.join(place, "function.zip")
    if not os.path.exists(path):
        pytest.skip("there is no zip here")
    with zipfile.ZipFile(path) as file:
        assert sorted(file.namelist()) == ["lambda_function.py", "serv.py"]
        assert file.read("serv.py").decode() == SOURCE


@in_checkout
def test_readme_help_is_the_real_one(cli, monkeypatch):
    """To mend it: COLUMNS=80 python3 serv.py --help, below <!-- help -->."""
    [block] = [block for block in BLOCKS if "help" in block.marks]
    monkeypatch.setenv("COLUMNS", "80")
    assert cli("--help") == (0, block.code, "")


@in_checkout
def test_readme_signatures_are_the_real_ones():
    told = dict(re.findall(r"^### `serv\.(\w+)(\(.*\))`$", README, re.M))
    assert set(told) == {"chat", "message", "stream", "iter_events"}
    for name, signature in told.items():
        real = inspect.signature(getattr(serv, name))
        bare = [p.replace(annotation=p.empty)
                for p in real.parameters.values()]
        assert signature == str(inspect.Signature(bare))


@in_checkout
def test_readme_tells_of_every_public_name_and_setting():
    for name in serv.__all__:
        assert re.search(r"\b%s\b" % name, README), name
    for name, value in inspect.getmembers(serv.Reply):
        if isinstance(value, property):
            assert "`.%s`" % name in README, name
    for name in set(re.findall(r"\bSERV_[A-Z_]+", SOURCE)) - {"SERV_"}:
        assert "`%s`" % name in README, name
    assert "(%g seconds)" % serv.TIMEOUT in README


@in_checkout
def test_readme_errors_have_the_real_statuses():
    told = dict(re.findall(r"^\| `(\w+)` (\d\w\w) \|", README, re.M))
    real = {kind.__name__: str(status)
            for status, kind in serv.STATUS_ERRORS.items()}
    assert told == dict(real, InternalServerError="5xx")


@in_checkout
def test_readme_is_short_and_keeps_to_itself():
    lines = README.splitlines()
    assert len(lines) <= 510
    assert "```sh" in lines[:15]
    for text in (README, PYPROJECT):
        assert not re.search(r"pip install (-U |--upgrade )?serv\b(?!-)", text)
        assert not re.search(r"/(home|root|tmp|work|opt|Users)/", text)


# -- pyproject.toml: one module, one version ----------------------------------

@in_checkout
def test_pyproject_takes_the_version_from_the_file(cli):
    assert re.search(r'^dynamic = \["version", "description"\]', PYPROJECT,
                     re.M)
    assert not re.search(r"^(version|description) *=", PYPROJECT, re.M)
    assert re.search(r"^dependencies = \[\]$", PYPROJECT, re.M)
    assert cli("--version") == (0, "serv %s\n" % serv.__version__, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", serv.__version__)


@in_checkout
def test_wheel_holds_one_module_and_the_command(tmp_path):
    pytest.importorskip("flit_core")
    for name in ("serv.py", "README.md", "pyproject.toml"):
        shutil.copy(os.path.join(ROOT, name), str(tmp_path))
    name = subprocess.check_output(
        [sys.executable, "-c", "import flit_core.buildapi as build\n"
         "print(build.build_wheel('.'))"], cwd=str(tmp_path),
        universal_newlines=True).splitlines()[-1]
    assert name == "serv_client-%s-py3-none-any.whl" % serv.__version__
    with zipfile.ZipFile(str(tmp_path / name)) as wheel:
        files = {file.rpartition("/")[2]: wheel.read(file).decode()
                 for file in wheel.namelist()}
    assert set(files) == {"serv.py", "METADATA", "RECORD", "WHEEL",
                          "entry_points.txt"}
    assert files["serv.py"] == SOURCE
    assert "serv=serv:main" in files["entry_points.txt"].replace(" ", "")
    assert "Requires-Dist" not in files["METADATA"]
    assert "Requires-Python: >=3.8\n" in files["METADATA"]
    assert "Summary: %s\n" % serv.__doc__.splitlines()[0] in files["METADATA"]


# -- serv.py: small, plain, and pure above its network ------------------------

SECTIONS = ["Errors", "The calls", "What the calls return",
            "Building requests", "Reading answers", "Server-sent events",
            "Putting a stream", "Network", "Command line"]
IMPURE = {"socket", "ssl", "http", "urllib", "sys", "time", "print", "open",
          "input", "threading", "os", "subprocess", "atexit"}
# What is no I/O in those modules, and what is read at each call.
PURE = ("socket.timeout", "ssl.SSLCertVerificationError", "ssl.SSLError",
        "http.client.HTTPMessage", "http.client.HTTPException",
        "http.client.IncompleteRead", "http.client.responses", "urllib.parse",
        "sys.version_info", "sys.version", "sys.exc_info", "os.environ",
        "time.monotonic",
        "time.time")


def find_docstrings(tree):
    """Return {node: docstring node or None} of a module and all in it."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node: node.body[0] if ast.get_docstring(node) else None
            for node in ast.walk(tree) if isinstance(node, nodes)}


def drop_annotations(tree):
    """Return a tree without its type annotations and TYPE_CHECKING block."""
    for node in ast.walk(tree):
        for name in "annotation", "returns":
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return tree


def find_banners():
    """Return [(line number, title)] of the sections of serv.py."""
    lines = SOURCE.splitlines()
    return [(number + 1, lines[number][2:])
            for number in range(1, len(lines) - 1)
            if re.fullmatch("# -{70,}", lines[number - 1])
            and re.match("# [^-]", lines[number])]


def test_lines_fit_a_terminal():
    assert max(map(len, SOURCE.splitlines())) <= 79


def test_file_imports_only_the_standard_library():
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    if hasattr(sys, "stdlib_module_names"):  # 3.10
        assert names <= sys.stdlib_module_names
    assert names <= {
        "__future__", "argparse", "atexit", "base64", "collections",
        "contextlib", "copy", "datetime", "email", "functools", "http", "io",
        "itertools", "json", "os", "random", "re", "shlex", "socket", "ssl",
        "sys", "threading", "time", "typing", "urllib"}


def run_alone(script):
    """Run a script that finds serv, and not even the working place,
    site-packages or the environment; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c",
         "import sys\nsys.path.insert(0, %r)\n%s" % (ROOT, script)],
        stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().split()


def test_file_imports_on_its_own():
    assert run_alone("""
import serv
assert not {'typing', 'asyncio', 'argparse', 'urllib.request'} & set(
    sys.modules)
print(serv.__version__)""") == [serv.__version__]


def test_file_loads_little_beyond_what_speaks_http():
    assert set(run_alone("""
import http.client, json
known = set(sys.modules)
import serv
print(*(set(sys.modules) - known))""")) <= {
        "serv", "__future__", "atexit", "contextlib",
        "copy", "weakref", "threading", "_weakrefset",
        # which http.client loads itself before 3.13
        "random", "_random", "bisect", "_bisect", "math", "_sha2"}


def test_sections_are_in_order():
    banners = find_banners()
    assert len(banners) == len(SECTIONS), banners
    for (_, title), start in zip(banners, SECTIONS):
        assert title.startswith(start)


def test_only_the_network_and_the_command_line_do_io():
    limit = next(number for number, title in find_banners()
                 if title.startswith("Network"))
    tree, bad = drop_annotations(ast.parse(SOURCE)), []
    parents = {child: node for node in ast.walk(tree)
               for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id in IMPURE
                and node.lineno < limit):
            path = node.id
            while isinstance(parents[node], ast.Attribute):
                node = parents[node]
                path += "." + node.attr
            if not (path + ".").startswith(tuple(p + "." for p in PURE)):
                bad.append((node.lineno, path))
    assert not bad


def test_no_request_goes_out_by_other_ways():
    """No eval, pickle or subprocess; urllib opens nothing."""
    for word in ("eval(", "exec(", "import pickle", "subprocess", "urlopen",
                 "verify_mode", "check_hostname", "_create_unverified"):
        assert word not in SOURCE, word


def test_public_names():
    assert sorted(serv.__all__) == sorted([
        "chat", "message", "stream", "iter_events", "Reply", "Stream",
        "ToolCall", "ServError", "APIConnectionError", "APITimeoutError",
        "APIResponseError", "APIStatusError", "BadRequestError",
        "AuthenticationError", "BillingError", "PermissionDeniedError",
        "NotFoundError", "RateLimitError", "InternalServerError"])
    space = {}
    exec("from serv import *", space)
    assert set(space) - {"__builtins__"} == set(serv.__all__)
    errors = {name for name, value in vars(serv).items()
              if isinstance(value, type) and issubclass(value, Exception)}
    assert errors <= set(serv.__all__)


def test_errors_form_the_tree_of_the_docstring():
    parent = {}
    for name in serv.__all__:
        kind = getattr(serv, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            parent[name] = kind.__bases__[0].__name__
            assert re.search(r"\b%s\b" % name, serv.__doc__), name
    direct = {name for name, base in parent.items() if base == "ServError"}
    assert parent.pop("ServError") == "Exception"
    assert direct == {"APIConnectionError", "APIResponseError",
                      "APIStatusError"}
    assert parent.pop("APITimeoutError") == "APIConnectionError"
    assert all(parent[name] == "APIStatusError"
               for name in set(parent) - direct)


def test_public_things_have_docstrings():
    for node, docstring in find_docstrings(TREE).items():
        public = not getattr(node, "name", "module").startswith("_")
        if isinstance(node, ast.ClassDef) and node.name in serv.__all__:
            for part in find_docstrings(node):
                hidden = part.name.startswith("_")
                assert hidden or ast.get_docstring(part), part.name
        if node in TREE.body or node is TREE:
            assert docstring is not None or not public, node.name


def test_licence_line_travels_with_the_file():
    assert SOURCE.startswith("# SPDX-License-Identifier: MIT\n")


# ---------------------------------------------------------------------------
# Benchmark: python3 test_serv.py --bench.  Each measurement is a process of
# its own, with nothing imported but its client, against a server on loopback.
# ---------------------------------------------------------------------------

BENCH_SERVER = r'''
import asyncio, json, re, time

CHAT = dict(id="c1", object="chat.completion", created=1, model="m", choices=[
    dict(index=0, finish_reason="stop", logprobs=None, message=dict(
        role="assistant", content="Hello!", refusal=None))],
    usage=dict(prompt_tokens=18, completion_tokens=7, total_tokens=25))
MESSAGE = dict(id="m1", type="message", role="assistant", model="m",
    content=[dict(type="text", text="Hello!")], stop_reason="end_turn",
    stop_sequence=None, usage=dict(input_tokens=16, output_tokens=7))
made = {}

def events(messages, texts):
    if messages:
        yield dict(type="message_start", message=dict(
            MESSAGE, content=[], stop_reason=None))
        yield dict(type="content_block_start", index=0, content_block=dict(
            type="text", text=""))
    for text in texts:
        yield dict(type="content_block_delta", index=0, delta=dict(
            type="text_delta", text=text)) if messages else dict(
            CHAT, object="chat.completion.chunk", usage=None, choices=[dict(
                index=0, delta=dict(content=text), finish_reason=None)])
    if messages:
        yield dict(type="content_block_stop", index=0)
        yield dict(type="message_delta", usage=dict(output_tokens=7),
                   delta=dict(stop_reason="end_turn", stop_sequence=None))
        yield dict(type="message_stop")
    else:
        yield dict(CHAT, object="chat.completion.chunk", choices=[dict(
            index=0, delta={}, finish_reason="stop")])

def chunk(event):
    name = "event: %s\n" % event["type"] if "type" in event else ""
    data = ("%sdata: %s\n\n" % (name, json.dumps(event))).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)

async def answer(writer, messages, what, count):
    await asyncio.sleep(count / 1000 if what == b"sleep" else 0)
    if what in (b"call", b"sleep"):
        data = json.dumps(MESSAGE if messages else CHAT).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\n")
    if what == b"paced":  # each text is the time at which it is sent
        for event in events(messages, iter(lambda: str(time.monotonic_ns()),
                                           None)):
            writer.write(chunk(event))
            await asyncio.sleep(0.002)
            count -= 1
            if not count:
                event["choices"][0].update(delta={}, finish_reason="stop")
                writer.write(chunk(event))
                break
    else:
        if (messages, count) not in made:
            made[messages, count] = b"".join(map(chunk, events(
                messages, ("tok%d " % i for i in range(count)))))
        writer.write(made[messages, count])
    done = b"" if messages else b"e\r\ndata: [DONE]\n\n\r\n"
    writer.write(done + b"0\r\n\r\n")
    await writer.drain()

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(re.search(
                rb"(?i)content-length: *(\d+)", head).group(1)))
            what, count = re.search(
                rb"(call|sleep|events|paced)=(\d+)", body).groups()
            await answer(writer, b"/messages" in head[:99], what, int(count))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 26)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
'''

BENCH_CLIENTS = {
    "serv.py": '''
import serv
def call(text):
    return serv.chat(text, model="m", system="s", api_key="k",
                     base_url=base).text
def stream(text, **more):
    with serv.stream(text, model="m", system="s", api_key="k", base_url=base,
                     **more) as pieces:
        yield from pieces
        assert pieces.reply.stop_reason
def message_stream(text):
    return stream(text, endpoint="messages", max_tokens=99)
''',
    "http.client": '''
import http.client, json
connection = http.client.HTTPConnection(base[7:])
def post(text, **more):
    connection.request("POST", "/v1/chat/completions", json.dumps(dict(
        model="m", messages=[{"role": "system", "content": "s"},
                             {"role": "user", "content": text}],
        **more)).encode(), {"Authorization": "Bearer k"})
    return connection.getresponse()
def call(text):
    return json.loads(post(text).read())["choices"][0]["message"]["content"]
def stream(text):
    response, rest = post(text, stream=True), b""
    for data in iter(lambda: response.read1(65536), b""):
        *lines, rest = (rest + data).split(b"\\n")
        for line in lines:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    yield delta["content"]
''',
    "openai": '''
import openai
client = openai.OpenAI(api_key="k", base_url=base + "/v1")
def ask(text):
    return dict(model="m", messages=[{"role": "system", "content": "s"},
                                     {"role": "user", "content": text}])
def call(text):
    answer = client.chat.completions.create(**ask(text))
    return answer.choices[0].message.content
def stream(text):
    with client.chat.completions.stream(**ask(text)) as events:
        for event in events:
            if event.type == "content.delta":
                yield event.delta
        events.get_final_completion()
''',
    "anthropic": '''
import anthropic
client = anthropic.Anthropic(auth_token="k", api_key=None, base_url=base)
def ask(text):
    return dict(model="m", max_tokens=99, system="s",
                messages=[{"role": "user", "content": text}])
def call(text):
    return client.messages.create(**ask(text)).content[0].text
def message_stream(text):
    with client.messages.stream(**ask(text)) as events:
        yield from events.text_stream
        events.get_final_message()
'''}

# name, unit: the code that prints it, or what its process costs
BENCH = {
    "import, ms CPU": "cpu",
    "script with one call, ms": "wall",
    "memory after one call, MiB": (
        "import os, re, resource\ncall('call=1')\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "if os.path.exists('/proc/self/status'):  # the other is inherited\n"
        "    with open('/proc/self/status') as file:\n"
        "        peak = int(re.search('VmHWM:[^0-9]*([0-9]+)', file.read())"
        "[1])\n"
        "print(peak / 1024)"),
    "one more call, us CPU": (
        "call('call=1'); start = time.process_time()\n"
        "for _ in range(400): call('call=1')\n"
        "print((time.process_time() - start) / 400 * 1e6)"),
    "from server to caller, us": (
        "waits = [time.monotonic_ns() - int(sent)\n"
        "         for sent in stream('paced=300')]\n"
        "print(sorted(waits)[150] / 1e3)")}
for _name, _stream, _count in (
        ("event of a chat stream, us CPU", "stream", 5000),
        ("the same, of 100,000, us CPU", "stream", 100000),
        ("event of a Messages stream, us CPU", "message_stream", 5000)):
    BENCH[_name] = (
        "list({0}('events=10')); start = time.process_time()\n"
        "assert sum(1 for _ in {0}('events={1}')) == {1}\n"
        "print((time.process_time() - start) / {1} * 1e6)").format(
            _stream, _count)
BENCH["64 threads, calls/s"] = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(64)\n"
        "list(pool.map(call, ['call=1'] * 64)); start = time.perf_counter()\n"
        "list(pool.map(call, ['sleep=20'] * 1500))\n"
        "print(1500 / (time.perf_counter() - start))")


def bench_one(what, who, base):
    """Return one figure of one client, measured in a process of its own."""
    import resource
    then = {"cpu": "", "wall": "call('call=1')"}.get(BENCH[what], BENCH[what])
    code = "import time\nbase = %r\n%s\n%s" % (base, BENCH_CLIENTS[who], then)
    env = dict(os.environ, NO_PROXY="*", PYTHONPATH=os.path.dirname(
        os.path.abspath(serv.__file__)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True,
                          stdout=subprocess.PIPE)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(after[:2]) - sum(before[:2])
    return {"cpu": cpu * 1e3, "wall": wall * 1e3}.get(BENCH[what]) or float(
        done.stdout)


def bench(rounds=3):
    """Print the README's table: the best of some rounds of each figure."""
    import importlib.util
    clients = [who for who in BENCH_CLIENTS
               if importlib.util.find_spec(who.replace(".py", ""))]
    server = subprocess.Popen([sys.executable, "-c", BENCH_SERVER],
                              stdout=subprocess.PIPE)
    base = "http://127.0.0.1:%d" % int(server.stdout.readline())
    try:
        print("| | %s |\n|---|%s" % (" | ".join(clients),
                                     "---:|" * len(clients)))
        for what, code in BENCH.items():
            [need] = re.findall(r"\b(call|stream|message_stream)\(", code)[
                :1] or ["call"]
            got = {who: [] for who in clients
                   if "def %s(" % need in BENCH_CLIENTS[who]
                   and (who, what[:2]) != ("http.client", "64")}
            for _ in range(rounds + 1):  # the first warms the caches
                for who in got:
                    got[who].append(bench_one(what, who, base))
            # The least of a cost is what the machine's other work adds to.
            best = max if what.endswith("/s") else min
            found = {who: best(got[who][1:]) for who in got}
            cells = ["%.*f" % (found[who] < 10, found[who])
                     if who in got else "" for who in clients]
            print("| %s | %s |" % (what, " | ".join(cells)), flush=True)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


if __name__ == "__main__":
    sys.exit(bench() if sys.argv[1:] == ["--bench"] else demo(sys.argv[1:]))
