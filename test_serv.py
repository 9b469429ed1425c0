"""The tests of serv.py: the book of how the client and the service behave.

    python3 -m pytest -q test_serv.py    the tests; they need pytest only
    python3 test_serv.py "Hello!"        the command line, on the fake service
    python3 test_serv.py --bench         measures the figures of README.md

For tests of your own: ``with test_serv.Server(test_serv.service) as server:``
runs the fake service; give each call ``base_url=server.url`` and
``api_key=test_serv.KEY``.

Where to look for what is often asked:

    a cut answer    "Broken and cut answers"; of a cut stream:
                    "How a stream ends, whole or cut",
                    "What proves a stream whole"
    retries         which: "Whether to try again, and when"; how often and
                    how long, over sockets: "Retries"; what is sent once more
                    on a new connection, and what never: "Kept connections"
    errors          their classes and what they say: "Errors";
                    what is one: "Which answers are errors"; in a stream:
                    "Errors in a stream: .reply has what had arrived"
    the key         from where: "Settings: the argument, else the variable,
                    read at each call"; as which header: "The key"; that no
                    error shows it: "The key is in one header, and in no
                    error"; what a proxy sees: "Proxies"
    timeouts        "One budget bounds the whole call"
    tools           "Tool calls", "The next turn"; in streams, Gemini's calls
                    with index 0 too: "Chat: which call a piece belongs to",
                    "Messages: blocks"
    redirects       never followed: "Errors"
    Ctrl-C          "Signals", "close(), and interrupts",
                    "Processes: redirections, pipes, signals"
    limits          "Hostile servers"
    idle, forks     "Kept connections", "Sockets, descriptors, forks"
    a full disk     "Processes: redirections, pipes, signals"
    the fake        what it says, and what it refuses: "Fake service"

The map.  Each line is a banner of this file, and below it are its parts.
From "Errors" to "Command line" they are the sections of serv.py in its order;
only "Reply, ToolCall and Stream" is tested in two: "Replies" and "Streams".

    Bytes                       what goes over the wire
    Fake service                both formats; its model repeats the prompt
    Raw server                  does on loopback what a test tells it to do
    Fixtures                    and the helpers that many tests share
    Errors                      the tree, and what an error says
    The calls                   their arguments, and what they refuse
    Replies                     the same views of both formats
        Text and thinking; Tool calls; Why it stopped; The next turn;
        Odd answers break no view
    Building requests           the body, the URL, the key, headers, timeout
        The body;
        Settings: the argument, else the variable, read at each call; The URL;
        The key; Headers
    Reading answers             what is an error; when to retry
        JSON; What is an answer; Which answers are errors;
        Whether to try again, and when
    Server-sent events          bytes in, events out
    Putting streams together    events in, the whole answer out
        Chat: what grows, and what replaces;
        Chat: which call a piece belongs to; Chat: what else a chunk holds;
        Messages: blocks; Both formats; What proves a stream whole
    Streams                     pieces, ends, errors, close()
        What else may come in a stream;
        Stream, JSON or page: told by the first bytes;
        How a stream ends, whole or cut; close(), and interrupts;
        Errors in a stream: .reply has what had arrived;
        Random answers, as vendors stream them; How a random answer is made
    Network                     connections, time, retries, proxies, limits
        One budget bounds the whole call; Retries; Kept connections;
        Sockets, descriptors, forks; Broken and cut answers; Signals;
        Hostile servers; The key is in one header, and in no error; Proxies;
        TLS; Where it runs: flags, archives, processes, loops, a cloud;
        The certificates of the tests of TLS
    Command line                options, output, exit status
        What is sent; What is printed; What the program says of itself;
        Exit status 2: wrong usage, said in words of the command line;
        Exit status 1: no key, or the call failed;
        Exit status 3: blocked, or cut off by the token limit;
        --dry-run: the command that it prints is run for real;
        Processes: redirections, pipes, signals; A terminal, 40 columns wide
    Live checks                 of the real service, with SERV_LIVE=1
    README and promises         what is written about serv.py is true
        The blocks of README.md; The recipes of README.md, on a bad day;
        What README.md says about serv.py;
        pyproject.toml: one module, one version;
        serv.py: its sections, what it imports, and what it never does;
        test_serv.py
    Benchmark                   the figures of README.md
"""
import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import email.message
import email.utils
import errno
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
import weakref
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
SHORT = 600  # characters: no error's text is longer, whatever came
ROOT = os.path.dirname(os.path.abspath(serv.__file__))


def table(names, rows):
    """Run a test with each row of a dict, whose keys state the rules."""
    return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))


# ---------------------------------------------------------------------------
# Bytes
#
# What goes over the wire.
# ---------------------------------------------------------------------------

def http_answer(body=b"", status="200 OK", kind="application/json", **headers):
    """Return an HTTP answer with its length; `a_b` in headers means `a-b`."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return http_head(status, kind, content_length=len(body), **headers) + body


def error_answer(status, message="no"):
    """Return an error answer that wants the next try at once."""
    return http_answer({"error": {"message": message}}, "%d No" % status,
                       retry_after_ms="0")


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


STREAM_HEAD = http_head(kind="text/event-stream", transfer_encoding="chunked")


def bare_answer(text, **fields):
    """Return the JSON of a chat answer, with no more fields than it needs.

    `fields` are more of its message.
    """
    return {"object": "chat.completion", "choices": [{
        "index": 0, "message": {"role": "assistant", "content": text,
                                **fields}, "finish_reason": "stop"}]}


def bare_chunk(text, reason=None):
    """Return the JSON of a chunk of a chat stream, as bare."""
    return {"object": "chat.completion.chunk", "choices": [{
        "index": 0, "delta": {"content": text}, "finish_reason": reason}]}


Request = collections.namedtuple(
    "Request", "method target headers body connection number", defaults=[1])
# A request that has come.  The names in `headers` are in lower case.
# `connection` and `number` count the server's connections and requests,
# from 1.


def closing(answer):
    """Return what sends an answer to a request and then hangs up."""
    def send(wire, request):
        wire.sendall(answer)
        return False
    return send


# ---------------------------------------------------------------------------
# Fake service
#
# Server(service) speaks both formats as SERV does.  Its model repeats the
# prompt, calls the first tool that it is given, and fills in JSON schemas.  A
# prompt with "parallel" in it makes it call each of the tools at once.  A
# prompt with "blocked" in it is refused; a limit below 5 tokens cuts the text
# off.  What SERV would refuse gets a 400, 401 or 404: see FAKE_REFUSES, and
# the tests below it.  The request ids of its answers are "req-1", "req-2" ...
# ---------------------------------------------------------------------------

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
# What the SDKs, or other calls of serv, take as an argument; no server knows
# it, but whoever moves to serv may leave it in a call.
CLIENT_ARGUMENTS = ("endpoint", "http_client", "betas", "auth_token",
                    "default_headers", "organization", "project")
CHAT_PARTS = ("text", "image_url", "input_audio", "file", "refusal")
REQUEST_ID = "req-%d"  # of a request by its number
BAD_REQUEST = ("400 Bad Request", "invalid_request_error")


class Refusal(Exception):
    """The fake service says no: a status line, a type, a message."""


def service(wire, request):
    """Answer one request as the service would.

    Its model repeats the prompt, or calls the first tool; if "parallel" is in
    the prompt, it calls each of the tools.
    """
    wire.sendall(service_answer(request))


def service_answer(request):
    """Return the bytes of the answer to a request, whatever it holds."""
    request_id = REQUEST_ID % request.number
    ids = {"x_openserv_request_id": request_id}
    try:
        check_request(request)
        body = parse_body(request.body)
        answer, events = make_answer(body, request.target)
    except Refusal as exc:
        status, kind, text = exc.args
        error = {"error": {"type": kind, "message": text}}
        if request.target == MESSAGES:
            error = {"type": "error", **error, "request_id": request_id}
        return http_answer(error, status, **ids)
    if body.get("stream"):
        return stream_answer(*events, **ids)
    return http_answer(answer, **ids)


def make_answer(body, target):
    """Return the answer to a body, and the events of the same as a stream."""
    check_format, build, split = (
        (check_chat, chat_answer, chat_events) if target == CHAT else
        (check_messages, messages_answer, messages_events))
    try:
        check_format(body)
        return build(body), list(split(build(body), body))
    except (AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as exc:  # something deep inside: a schema is not one
        raise Refusal(*BAD_REQUEST, "Cannot read the request: %r" % exc)


def check_request(request):
    """Raise Refusal for a bad path or key."""
    if request.method != "POST" or request.target not in (CHAT, MESSAGES):
        raise Refusal("404 Not Found", "not_found_error",
                      "No such path: " + request.target)
    if request.headers.get("authorization") != "Bearer " + KEY:
        raise Refusal("401 Unauthorized", "authentication_error",
                      "Invalid API key.")


def parse_body(data):
    """Return the decoded body; raise Refusal if it is no JSON object."""
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise Refusal(*BAD_REQUEST, "The body is not JSON.")
    check(isinstance(body, dict), "The body is not a JSON object.")
    check(isinstance(body.get("model"), str) and body["model"],
          "model: Field required")
    check(body.get("messages") and are_objects(body["messages"]),
          "messages: expected a list of objects")
    for entry in body["messages"]:
        check(isinstance(entry.get("role"), str), "role: Field required")
        check(is_content(entry.get("content")), "content: expected text or "
              "a list of objects")
        check(entry["role"] != "user" or entry.get("content"),
              "content: Field required")
    for name in ("max_tokens", "max_completion_tokens"):
        check(type(body.get(name, 1)) is int and body.get(name, 1) >= 0,
              name + ": expected a whole number")
    check(type(body.get("n", 1)) is int and 1 <= body.get("n", 1) <= 8,
          "n: expected 1 to 8")
    check(isinstance(body.get("response_format") or {}, dict),
          "response_format: expected an object")
    check(are_objects(body.get("tools") or []),
          "tools: expected a list of objects")
    for name in ("temperature", "top_p"):
        value = body.get(name)
        check(value is None or type(value) in (int, float),
              name + ": expected a number")
    for name in CLIENT_ARGUMENTS:
        check(name not in body, "Unrecognized request argument: " + name)
    return body


def check_chat(body):
    """Raise Refusal for a body that the chat endpoint would refuse."""
    roles = {entry["role"] for entry in body["messages"]}
    check(roles <= {"system", "developer", "user", "assistant", "tool"},
          "role: expected system, developer, user, assistant or tool")
    check(roles & {"system", "developer"}, "A system prompt is required. "
          "Add a system or developer message.")
    for tool in body.get("tools") or []:
        check(isinstance(tool.get("function"), dict)
              and isinstance(tool["function"].get("name"), str),
              "tools: function.name: Field required")
    check_parts(body, lambda kind: kind in CHAT_PARTS)
    choice = body.get("tool_choice", "auto")
    check(choice in ("none", "auto", "required") or isinstance(choice, dict),
          "tool_choice: expected none, auto, required or an object")
    turns = [([], [])]  # the calls of an entry, and the results behind it
    for entry in body["messages"]:
        if entry["role"] == "tool":
            turns[-1][1].append(entry.get("tool_call_id"))
        else:
            calls = entry.get("tool_calls") or []
            turns.append(([call["id"] for call in calls], []))
    for calls, results in turns:
        check_results(calls, results, "tool_call_id")


def check_messages(body):
    """Raise Refusal for a body that the Messages endpoint would refuse."""
    roles = {entry["role"] for entry in body["messages"]}
    check("system" not in roles,
          "role: not system; use the top-level system field")
    check(roles <= {"user", "assistant"}, "role: expected user or assistant")
    check(body.get("system") and is_content(body["system"]),
          "A system prompt is required. Set the system field.")
    check("max_tokens" in body, "max_tokens: Field required")
    check_parts(body, lambda kind: kind not in CHAT_PARTS[1:])
    for tool in body.get("tools") or []:
        check(isinstance(tool.get("name"), str), "tools: name: Field required")
    check(isinstance(body.get("tool_choice", {}), dict),
          "tool_choice: expected an object")
    thinking = body.get("thinking") or {"type": "disabled"}
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    check(kind in ("enabled", "disabled", "adaptive"), "thinking: expected "
          "{type: enabled, budget_tokens}")
    if kind == "enabled":
        check("budget_tokens" in thinking,
              "thinking: budget_tokens: Field required")
        budget = thinking["budget_tokens"]
        check(type(budget) is int and budget >= 1024,
              "thinking: budget_tokens: expected 1024 or more")
        check(budget < body["max_tokens"],
              "thinking: budget_tokens: expected less than max_tokens")
    calls = []
    for entry in body["messages"] + [{}]:
        check_results(calls, find_ids(entry, "tool_result", "tool_use_id"),
                      "tool_use_id")
        calls = find_ids(entry, "tool_use", "id")


def check_parts(body, is_known):
    """Raise Refusal for a part of a message whose type is not known."""
    for entry in body["messages"]:
        for part in find_parts(entry.get("content")):
            kind = part.get("type")
            check(isinstance(kind, str) and is_known(kind),
                  "content: unknown type of a part")


def find_parts(content):
    return [] if content is None or isinstance(content, str) else content


def find_ids(entry, kind, name):
    """Return the ids in the blocks of this type of a message."""
    return [block.get(name) for block in entry.get("content") or []
            if isinstance(block, dict) and block.get("type") == kind]


def check_results(calls, results, name):
    """Raise Refusal unless each call has a result, and each result a call."""
    for each in results:
        check(each in calls, name + ": no such call in the message before it")
    for each in calls:
        check(each in results, name + ": expected a result of each call")


def check(good, wrong):
    """Raise a Refusal of a request that is not good."""
    if not good:
        raise Refusal(*BAD_REQUEST, wrong)


def are_objects(value):
    return isinstance(value, list) and all(
        isinstance(entry, dict) for entry in value)


def is_content(value):
    return value is None or isinstance(value, str) or are_objects(value)


def find_words(content):
    """Return the text of a message's content, and of tool results in it."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or find_words(part.get("content"))
                    for part in content or [])


def find_prompt(messages):
    """Return the text of the last message; of results, that of all."""
    results = itertools.takewhile(lambda entry: entry["role"] == "tool",
                                  reversed(messages))
    return " ".join(find_words(entry.get("content")) for entry in
                    reversed(list(results) or messages[-1:]))


def has_result(entry):
    """Whether a message brings the result of a tool."""
    return entry["role"] == "tool" or any(
        part.get("type") == "tool_result" for part in
        entry["content"] if isinstance(part, dict))


def fill(schema, name="answer"):
    """Return a value that fits a JSON schema."""
    kind = schema.get("type", "object")
    if "enum" in schema:
        return schema["enum"][0]
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        return {name: fill(inner, name)
                for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [fill(schema.get("items", {"type": "string"}), name)]
    return {"string": "Paris" if name == "city" else "a " + name,
            "integer": 3, "number": 1.5, "boolean": True}.get(kind)


Said = collections.namedtuple("Said", "text calls stop tokens")
# In both formats: the text, each call as (name, arguments), why it stops
# (in the chat format's words), and the tokens (in, out).


def make_up(body, schema_of):
    """Return what the model says; `schema_of(tool)` is (name, schema)."""
    entry = body["messages"][-1]
    prompt = find_prompt(body["messages"])
    text, calls, stop = 'You said: "%s"' % prompt, [], "stop"
    choice = body.get("tool_choice", "auto")
    wanted = (body.get("response_format") or {}).get("type", "text")
    limit = body.get("max_completion_tokens", body.get("max_tokens", 99))
    is_forced = choice == "required" or (
        isinstance(choice, dict)
        and choice.get("type") in ("any", "tool", "function"))
    if "blocked" in prompt:
        text, stop = "I can't share that.", "content_filter"
    elif has_result(entry) and not is_forced:
        text = 'The tool says: "%s"' % prompt
    elif body.get("tools") and choice not in ("none", {"type": "none"}):
        called = body["tools"] if "parallel" in prompt else body["tools"][:1]
        calls = [(name, fill(schema))
                 for name, schema in map(schema_of, called)]
        text, stop = "", "tool_calls"
    elif wanted == "json_schema":
        schema = body["response_format"]["json_schema"]["schema"]
        text = json.dumps(fill(schema))
    elif wanted == "json_object":
        text = json.dumps({"answer": text})
    if limit < 5 and not calls:
        text, stop = " ".join(text.split()[:limit]), "length"
    return Said(text, calls, stop, (len(prompt.split()), len(text.split())))


def chat_answer(body):
    """Return the answer of the chat endpoint."""
    said = make_up(body, lambda tool: (
        tool["function"]["name"], tool["function"].get("parameters", {})))
    count = body.get("n", 1)
    entry = {"role": "assistant", "content": said.text or None,
             "refusal": None}
    if body.get("reasoning_effort", "none") != "none":
        entry["reasoning_content"] = "The user wants an answer."
    if said.calls:
        entry["tool_calls"] = [{
            "id": "call_%d" % number, "type": "function", "function": {
                "name": name, "arguments": json.dumps(arguments)}}
            for number, (name, arguments) in enumerate(said.calls, 1)]
    came, went = said.tokens[0], said.tokens[1] * count
    return {"id": "chatcmpl-1", "object": "chat.completion",
            "created": 1767225600, "model": body["model"],
            "choices": [{"index": number, "message": copy.deepcopy(entry),
                         "logprobs": None, "finish_reason": said.stop}
                        for number in range(count)],
            "usage": {"prompt_tokens": came, "completion_tokens": went,
                      "total_tokens": came + went}}


def chat_events(answer, body):
    """Yield the chunks in which a chat answer is streamed."""
    usage = answer.pop("usage")
    choices = answer.pop("choices")
    answer["object"] = "chat.completion.chunk"
    for choice in choices:
        for delta, reason in split_choice(choice):
            yield {**answer, "choices": [{"index": choice["index"],
                                          "delta": delta,
                                          "finish_reason": reason}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**answer, "choices": [], "usage": usage}
    yield "[DONE]"


def split_choice(choice):
    """Yield each delta of a choice, and its finish reason."""
    entry = choice["message"]
    yield {"role": "assistant", "content": ""}, None
    for name in ("reasoning_content", "content"):
        for piece in re.findall(r"\S+\s*", entry.get(name) or ""):
            yield {name: piece}, None
    for index, call in enumerate(entry.get("tool_calls", [])):
        text = call["function"]["arguments"]
        call["function"]["arguments"] = ""
        yield {"tool_calls": [{"index": index, **call}]}, None
        for piece in (text[:5], text[5:]):
            yield {"tool_calls": [
                {"index": index, "function": {"arguments": piece}}]}, None
    yield {}, choice["finish_reason"]


def messages_answer(body):
    """Return the answer of the Messages endpoint."""
    said = make_up(body, lambda tool: (
        tool["name"], tool.get("input_schema", {})))
    blocks = []
    if (body.get("thinking") or {}).get("type") == "enabled":
        blocks.append({"type": "thinking", "signature": "c2lnbmVk",
                       "thinking": "The user wants an answer."})
    if said.text:
        blocks.append({"type": "text", "text": said.text})
    for number, (name, arguments) in enumerate(said.calls, 1):
        blocks.append({"type": "tool_use", "id": "toolu_%d" % number,
                       "name": name, "input": arguments})
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


# What the fake service refuses: change a good request, and see.
FAKE_SYSTEM = {"role": "system", "content": "s"}
FAKE_SAYS = {"role": "user", "content": "Hi"}
FAKE_BODIES = {
    CHAT: {"model": "m", "messages": [FAKE_SYSTEM, FAKE_SAYS]},
    MESSAGES: {"model": "m", "max_tokens": 2000, "system": "s",
               "messages": [FAKE_SAYS]}}
FAKE_REFUSES = {
    # the path, what is changed of its good body (None: left out), the message
    "an empty body": (CHAT, b"", "The body is not JSON."),
    "a body that is no text": (CHAT, b"\xff", "The body is not JSON."),
    "a body that is too deep": (CHAT, b"[" * 100000, "The body is not JSON."),
    "a body that is a list": (
        CHAT, b"[{}]", "The body is not a JSON object."),
    "no model": (CHAT, {"model": None}, "model: Field required"),
    "a model that is no text": (CHAT, {"model": 5}, "model: Field required"),
    "no messages": (
        CHAT, {"messages": None}, "messages: expected a list of objects"),
    "an empty list of messages": (
        CHAT, {"messages": []}, "messages: expected a list of objects"),
    "messages that are text": (
        CHAT, {"messages": "Hi"}, "messages: expected a list of objects"),
    "a message that is text": (
        CHAT, {"messages": ["Hi"]}, "messages: expected a list of objects"),
    "a message without a role": (
        CHAT, {"messages": [{"content": "Hi"}]}, "role: Field required"),
    "chat: a role of no one": (
        CHAT, {"messages": [FAKE_SYSTEM, {"role": "bot", "content": "Hi"}]},
        "role: expected system, developer, user, assistant or tool"),
    "messages: a role of chat": (
        MESSAGES, {"messages": [{"role": "tool", "content": "Hi"}]},
        "role: expected user or assistant"),
    "messages: a system message": (
        MESSAGES, {"messages": [FAKE_SYSTEM, FAKE_SAYS]},
        "role: not system; use the top-level system field"),
    "content that is a number": (
        CHAT, {"messages": [{"role": "user", "content": 5}]},
        "content: expected text or a list of objects"),
    "a message of a user without content": (
        CHAT, {"messages": [{"role": "user"}]}, "content: Field required"),
    "messages: thinking that is no object": (
        MESSAGES, {"thinking": True},
        "thinking: expected {type: enabled, budget_tokens}"),
    "messages: thinking of an unknown type": (
        MESSAGES, {"thinking": {"type": "on"}},
        "thinking: expected {type: enabled, budget_tokens}"),
    "chat: no system prompt": (
        CHAT, {"messages": [FAKE_SAYS]}, "A system prompt is required. Add a "
        "system or developer message."),
    "messages: no system prompt": (
        MESSAGES, {"system": None}, "A system prompt is required. Set the "
        "system field."),
    "messages: a system prompt that is a number": (
        MESSAGES, {"system": 5}, "A system prompt is required. Set the "
        "system field."),
    "messages: no max_tokens": (
        MESSAGES, {"max_tokens": None}, "max_tokens: Field required"),
    "max_tokens below 0": (
        MESSAGES, {"max_tokens": -1}, "max_tokens: expected a whole number"),
    "max_completion_tokens that is text": (
        CHAT, {"max_completion_tokens": "9"},
        "max_completion_tokens: expected a whole number"),
    "temperature that is text": (
        CHAT, {"temperature": "0.5"}, "temperature: expected a number"),
    "top_p that is a list": (
        MESSAGES, {"top_p": [1]}, "top_p: expected a number"),
    "no choices": (CHAT, {"n": 0}, "n: expected 1 to 8"),
    "more than 8 choices": (CHAT, {"n": 9}, "n: expected 1 to 8"),
    "tools that are no list": (
        CHAT, {"tools": 5}, "tools: expected a list of objects"),
    "a tool that is text": (
        CHAT, {"tools": ["f"]}, "tools: expected a list of objects"),
    "chat: a tool of the Messages format": (
        CHAT, {"tools": [{"name": "f"}]},
        "tools: function.name: Field required"),
    "messages: a tool of the chat format": (
        MESSAGES, {"tools": [{"function": {"name": "f"}}]},
        "tools: name: Field required"),
    "chat: a tool_choice of an unknown word": (
        CHAT, {"tool_choice": "any"},
        "tool_choice: expected none, auto, required or an object"),
    "messages: a tool_choice that is a word": (
        MESSAGES, {"tool_choice": "auto"}, "tool_choice: expected an object"),
    "a response_format that is text": (
        CHAT, {"response_format": "json"},
        "response_format: expected an object"),
    "an argument of a client": (
        CHAT, {"http_client": {}},
        "Unrecognized request argument: http_client"),
    "chat: a part of the Messages format": (
        CHAT, {"messages": [{"role": "system", "content": "s"},
                            {"role": "user", "content": [
                                {"type": "image", "source": {}}]}]},
        "content: unknown type of a part"),
    "messages: a part of the chat format": (
        MESSAGES, {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {}}]}]},
        "content: unknown type of a part"),
    "messages: thinking without a budget": (
        MESSAGES, {"thinking": {"type": "enabled"}},
        "thinking: budget_tokens: Field required"),
    "messages: too small a budget of thinking": (
        MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1023}},
        "thinking: budget_tokens: expected 1024 or more"),
    "messages: a budget of thinking that takes all tokens": (
        MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        "thinking: budget_tokens: expected less than max_tokens"),
}


def fake_ask(target=CHAT, body=b"", method="POST", key=KEY):
    """Return the status of the fake service's answer, and its JSON."""
    if isinstance(body, dict):
        body = json.dumps({name: value for name, value in body.items()
                           if value is not None}).encode()
    head, _, answer = service_answer(Request(
        method, target, {"authorization": "Bearer " + key}, body, 1)
    ).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(answer.decode())


@table("target, change, message", FAKE_REFUSES)
def test_what_the_fake_service_refuses(target, change, message):
    body = change if isinstance(change, bytes) else {
        **FAKE_BODIES[target], **change}
    error = {"error": {"type": "invalid_request_error", "message": message}}
    if target == MESSAGES:
        error = {"type": "error", **error, "request_id": REQUEST_ID % 1}
    assert fake_ask(target, body) == (400, error)


FAKE_CALLS = {
    CHAT: {"role": "assistant", "tool_calls": [
        {"id": call_id, "type": "function", "function": {
            "name": "f", "arguments": "{}"}} for call_id in "12"]},
    MESSAGES: {"role": "assistant", "content": [
        {"type": "tool_use", "id": call_id, "name": "f", "input": {}}
        for call_id in "12"]}}


def fake_results(target, call_ids):
    """Return messages with the results of these calls."""
    if target == CHAT:
        return [{"role": "tool", "tool_call_id": call_id, "content": "x"}
                for call_id in call_ids]
    return [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": call_id, "content": "x"}
        for call_id in call_ids]}]


NO_CALL = (400, "no such call in the message before it")
NO_RESULT = (400, "expected a result of each call")


@pytest.mark.parametrize("target", [CHAT, MESSAGES])
@table("messages, end", {
    # "calls" with the ids 1 and 2, ids of results, or what the "user" says
    "a result of each call": (["calls", "12", "user"], (200, None)),
    "in another order": (["calls", "21"], (200, None)),
    "a result without calls": (["1"], NO_CALL),
    "a result of no such call": (["calls", "123"], NO_CALL),
    "a result that is late": (["calls", "12", "user", "1"], NO_CALL),
    "a call without a result": (["calls", "1"], NO_RESULT),
    "calls without results": (["calls", "user"], NO_RESULT),
    "calls at the end": (["calls"], NO_RESULT)})
def test_the_fake_service_takes_a_result_of_each_call(target, messages, end):
    body = copy.deepcopy(FAKE_BODIES[target])
    for each in messages:
        body["messages"] += (
            [FAKE_CALLS[target]] if each == "calls" else
            [FAKE_SAYS] if each == "user" else fake_results(target, each))
    status, answer = fake_ask(target, body)
    message = answer.get("error", {}).get("message")
    name = "tool_call_id: " if target == CHAT else "tool_use_id: "
    assert (status, message) == (end[0], end[1] and name + end[1])


def test_the_fake_service_refuses_a_wrong_key_with_401_and_path_with_404():
    body = FAKE_BODIES[CHAT]
    assert fake_ask(CHAT, body, key="sk-other") == (401, {"error": {
        "type": "authentication_error", "message": "Invalid API key."}})
    for method, target in (("POST", "/v1/models"), ("GET", CHAT)):
        assert fake_ask(target, body, method) == (404, {"error": {
            "type": "not_found_error", "message": "No such path: " + target}})


@pytest.mark.parametrize("target", [CHAT, MESSAGES])
def test_the_fake_service_answers_every_body(target):
    tool = {"name": "f", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "array"}}}},
        "input_schema": {"properties": {"a": {"enum": [1]}}}}
    good = FAKE_BODIES[target]
    whole = {**good, "tools": [tool], "tool_choice": {"type": "auto"},
             "response_format": {"type": "json_schema", "json_schema": {
                 "schema": {"type": "object"}}}, "stream_options": {},
             "thinking": {"type": "enabled", "budget_tokens": 1024},
             "reasoning_effort": "low", "n": 2, "messages": [
                 *good["messages"], FAKE_CALLS[target],
                 *fake_results(target, "12"), FAKE_SAYS]}
    assert fake_ask(target, whole)[0] == 200
    for path in json_paths(whole):
        for odd in (None, 5, "x", True, [], [None], ["x"], {}, {"a": 1}):
            body = copy.deepcopy(whole)
            place = body
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = odd
            status, answer = fake_ask(target, json.dumps(body).encode())
            if status == 200:
                assert "choices" in answer or "content" in answer, body
            else:
                assert status == 400 and answer["error"]["message"], body
                assert answer["error"]["type"] == "invalid_request_error"


def json_paths(value, path=()):
    """Yield the path of each value inside a JSON value."""
    entries = (value.items() if isinstance(value, dict) else
               enumerate(value) if isinstance(value, list) else ())
    for step, inner in entries:
        yield path + (step,)
        yield from json_paths(inner, path + (step,))


# ---------------------------------------------------------------------------
# Raw server
#
# It answers on loopback in whatever way a test says.
# ---------------------------------------------------------------------------

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
        self.lock, self.stopped = threading.Lock(), False
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
        self.stopped = True
        with contextlib.suppress(OSError), socket.socket(
                self.listener.family) as wake:
            wake.settimeout(10)  # nothing else ends accept() on all systems
            wake.connect(self.listener.getsockname())
        self.threads[0].join(10)
        self.listener.close()
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
            if self.stopped:
                wire.close()
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
                        request = request._replace(
                            number=len(self.requests) + 1)
                        self.requests.append(request)
                    turn = min(request.number, len(self.answers)) - 1
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
        name = name.strip().lower()
        before = headers[name] + ", " if name in headers else ""
        headers[name] = before + value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    return Request(line[0], line[1], headers, body, connection)


def demo(argv):
    """Run serv's command line against the fake service; return its status."""
    with Server(service) as server:
        os.environ.update(SERV_BASE_URL=server.url, SERV_API_KEY=KEY,
                          NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        return serv.main(argv)


# ---------------------------------------------------------------------------
# Fixtures
#
# What every test starts with, and the helpers that many tests share.
# ---------------------------------------------------------------------------

FOUND = dict(os.environ)
LIVE = FOUND.get("SERV_LIVE") == "1"
MODEL, SYSTEM = "gpt-5.4-mini", "Be brief."


@pytest.fixture(scope="session", autouse=True)
def shared():
    """A fake service for the tests that do not look at its requests.

    The SERV_ variables lead to it, past any proxy.
    """
    if hasattr(gc, "freeze"):  # what pytest has made is much, and stays
        gc.freeze()
    with Server(service) as server, pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                patch.delenv(name)
        patch.delenv("SERV_TIMEOUT", raising=False)
        patch.setenv("SERV_BASE_URL", server.url)
        patch.setenv("SERV_API_KEY", KEY)
        patch.setenv("SERV_MODEL", MODEL)
        yield server


@pytest.fixture
def fake(monkeypatch):
    """A fake service of a test's own, to which SERV_BASE_URL leads."""
    with Server(service) as server:
        monkeypatch.setenv("SERV_BASE_URL", server.url)
        yield server


@pytest.fixture
def real(monkeypatch):
    """For a test of the real service, with the settings as they were."""
    if not LIVE:
        pytest.skip("needs SERV_LIVE=1, and the other SERV_ variables")
    for name in "SERV_BASE_URL", "SERV_API_KEY", "SERV_MODEL":
        monkeypatch.delenv(name)
    for name, value in FOUND.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def clock():
    """What puts the clock of the budgets forward by some seconds.

    It never goes back: connections are kept by this clock.
    """
    real, steps = time.monotonic, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: real() + sum(steps))
        yield steps.append


@pytest.fixture
def naps(monkeypatch):
    """The seconds of each sleep; none of them takes any time."""
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.fixture
def received(monkeypatch):
    """The size of each piece that a socket without TLS has received."""
    sizes, receive = [], socket.socket.recv_into

    def recv_into(*args):
        sizes.append(receive(*args))
        return sizes[-1]

    monkeypatch.setattr(socket.socket, "recv_into", recv_into)
    return sizes


def message(messages, **options):
    """Call message() with a limit, which it requires."""
    return serv.message(messages, **{"max_tokens": 50, **options})


def chat_streamed(messages, **options):
    """Call stream(), read it to its end, and return the reply."""
    with serv.stream(messages, **options) as pieces:
        text = "".join(pieces)
    assert text == pieces.reply.text
    return pieces.reply


def message_streamed(messages, **options):
    """Call stream() for the other format in the same way."""
    return chat_streamed(messages, endpoint="messages",
                         **{"max_tokens": 50, **options})


CHAT_CALLS = [serv.chat, chat_streamed]
MESSAGES_CALLS = [message, message_streamed]
CALLS = CHAT_CALLS + MESSAGES_CALLS
each_call = pytest.mark.parametrize("call", CALLS)
plain_calls = pytest.mark.parametrize("call", [serv.chat, message])
each_endpoint = pytest.mark.parametrize("endpoint", ["chat", "messages"])
ASKED = {"role": "user", "content": "Hi"}
REPLY = chat_answer({"model": MODEL, "messages": [ASKED]})


def body_of(request):
    return json.loads(request.body.decode())


def sent(server):
    """Return the body of the one request that came."""
    [request] = server.requests
    return body_of(request)


def open_stream(server, endpoint="chat", prompt="Hi", **options):
    """Return a stream from a server, or a URL; without retries."""
    if endpoint == "messages":
        options["max_tokens"] = 9
    return serv.stream(prompt, **{
        "endpoint": endpoint, "system": SYSTEM, "timeout": 20.0,
        "max_retries": 0, "base_url": getattr(server, "url", server),
        **options})


def error_of(answer, call=serv.chat, **options):
    """Return the error that a call raises for an answer; it asks once."""
    with Server(answer) as server:
        with pytest.raises(serv.ServError) as caught:
            call("Hi", **{"system": SYSTEM, "base_url": server.url,
                          "max_retries": 0, "timeout": 20, **options})
        assert len(server.requests) == 1
    return caught.value


# ---------------------------------------------------------------------------
# Errors
#
# The tree, what an error says, and errors that a caller makes for a test.
# Which answers are errors, and of which class, is under "Reading answers".
# ---------------------------------------------------------------------------

ERROR_TREE = [
    # the name, its base, the status of one that a caller makes
    ("ServError", "Exception", None),
    ("APIConnectionError", "ServError", None),
    ("APITimeoutError", "APIConnectionError", None),
    ("APIResponseError", "ServError", None),
    ("APIStatusError", "ServError", 0),
    ("BadRequestError", "APIStatusError", 400),
    ("AuthenticationError", "APIStatusError", 401),
    ("BillingError", "APIStatusError", 402),
    ("PermissionDeniedError", "APIStatusError", 403),
    ("NotFoundError", "APIStatusError", 404),
    ("RateLimitError", "APIStatusError", 429),
    ("InternalServerError", "APIStatusError", 500),
]
ERROR_STATUSES = [
    (400, "BadRequestError"), (401, "AuthenticationError"),
    (402, "BillingError"), (403, "PermissionDeniedError"),
    (404, "NotFoundError"), (408, "APIStatusError"), (409, "APIStatusError"),
    (413, "APIStatusError"), (418, "APIStatusError"), (422, "APIStatusError"),
    (429, "RateLimitError"), (500, "InternalServerError"),
    (502, "InternalServerError"), (503, "InternalServerError"),
    (529, "InternalServerError"), (599, "InternalServerError"),
    (600, "APIStatusError")]
ERROR_BODY = {"error": {"message": "No\n way.", "type": "t", "code": "c",
                        "param": "p"}}
NO_FACTS = {"status": 0, "type": None, "code": None, "param": None,
            "message": "", "body": None, "retry_after": None,
            "request_id": None, "reply": None, "retries": 0, "headers": {}}


def error_facts(error):
    """Return all that an error tells, as values that can be compared."""
    facts = {name: getattr(error, name) for name in NO_FACTS
             if hasattr(error, name)}
    return {**facts, "class": type(error), "str": str(error),
            "headers": dict(facts.get("headers", {}))}


def test_every_error_is_public_in_the_tree_and_in_the_docstring():
    names = {name for name, _, _ in ERROR_TREE}
    assert names == {name for name in serv.__all__ if name.endswith("Error")}
    assert names == {name for name, value in vars(serv).items()
                     if isinstance(value, type)
                     and issubclass(value, serv.ServError)}
    for name in names:
        assert re.search(r"\b%s\b" % name, serv.__doc__), name


@pytest.mark.parametrize("name, base, status", ERROR_TREE)
def test_an_error_can_be_made_by_hand(name, base, status):
    kind = getattr(serv, name)
    assert [each.__name__ for each in kind.__bases__] == [base]
    assert kind.__doc__ != getattr(serv, base, Exception).__doc__
    facts = {"class": kind, "str": "no", "reply": None, "retries": 0,
             "request_id": None, "headers": {}}
    if status is not None:
        facts.update({**NO_FACTS, "status": status, "message": "no"})
    assert error_facts(kind("no")) == facts


def test_an_error_made_by_hand_has_headers_of_its_own():
    one, other = serv.RateLimitError("no"), serv.RateLimitError("no")
    one.headers["Retry-After"] = "7"
    assert one.headers["retry-after"] == "7"
    assert len(other.headers) == len(serv.RateLimitError("no").headers) == 0


@each_call
def test_an_error_says_all_that_is_known(call):
    answer = http_answer(ERROR_BODY, "418 Teapot", retry_after="7",
                         x_request_id="r1")
    error = error_of(answer, call)
    text = str(error)
    assert error_facts(error) == {
        "class": serv.APIStatusError, "str": text, "status": 418, "type": "t",
        "code": "c", "param": "p", "message": "No\n way.", "body": ERROR_BODY,
        "retry_after": 7, "request_id": "r1", "reply": None, "retries": 0,
        "headers": {"Content-Type": "application/json", "retry-after": "7",
                    "content-length": str(len(json.dumps(ERROR_BODY))),
                    "x-request-id": "r1"}}
    assert error.headers["X-REQUEST-ID"] == "r1"
    path = CHAT if call in CHAT_CALLS else MESSAGES
    for part in ("418", "No way.", "r1", "http://127.0.0.1:", path):
        assert part in text
    assert text.isprintable()  # so it is one line


def test_an_error_that_says_no_more_than_its_status():
    error = error_of(http_answer(b"", "400 Bad Request"))
    assert error_facts(error) == {
        **NO_FACTS, "class": serv.BadRequestError, "str": str(error),
        "status": 400, "body": "", "headers": {
            "Content-Type": "application/json", "content-length": "0"}}
    assert "400" in str(error)


@pytest.mark.parametrize("status, name", ERROR_STATUSES)
def test_the_class_follows_the_status(status, name):
    error = error_of(http_answer({}, "%d Told" % status))
    assert (type(error).__name__, error.status) == (name, status)


def test_the_status_of_an_answer_outweighs_the_type_in_it():
    error = error_of(http_answer({"type": "error", "error": {
        "type": "overloaded_error", "message": "No."}}, "400 No"))
    assert (type(error), error.status, error.type) == (
        serv.BadRequestError, 400, "overloaded_error")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_names_its_target(status):
    with Server(service) as other:
        target = other.url + "/here"
        error = error_of(http_answer(b"", "%d Moved" % status,
                                     location=target))
        assert other.connections == 0
    assert (type(error), error.status, error.headers["location"]) == (
        serv.APIStatusError, status, target)
    assert target in str(error)


@pytest.mark.parametrize("text, shown", [
    (b"<html><title>No way</title>\r\n" + b"." * 9999,
     "<html><title>No way</title>\r\n" + "." * 9999),
    (b"{No way", "{No way"), (b"No way \xff", "No way \ufffd"),
    ("\ufeffNo way \u20ac".encode(), "No way \u20ac")],
    ids=["a page", "broken JSON", "no UTF-8", "a byte order mark"])
def test_the_body_of_an_error_that_is_not_json_is_its_text(text, shown):
    error = error_of(http_answer(text, "502 Bad Gateway", "text/html"))
    assert (type(error), error.status, error.body) == (
        serv.InternalServerError, 502, shown)
    assert "No way" in str(error) and str(error).isprintable()
    assert len(str(error)) < SHORT


@pytest.mark.parametrize("kind", ["multipart/mixed; boundary=x",
                                  "message/rfc822"])
def test_the_headers_of_any_kind_of_answer_can_be_shown(kind):
    error = error_of(http_answer(b"{}", "400 No", kind))
    assert str(error.headers) == (
        "Content-Type: %s\ncontent-length: 2\n\n" % kind)


@table("headers, request_id", {
    "SERV's own goes first": (
        {"x_openserv_request_id": "id-a", "x_request_id": "id-b",
         "request_id": "id-c"}, "id-a"),
    "then x-request-id": (
        {"request_id": "id-c", "x_request_id": "id-b"}, "id-b"),
    "then request-id": ({"request_id": "id-c"}, "id-c"),
    "in any case": ({"X_REQUEST_ID": "id-b"}, "id-b"),
    "an empty one is none": (
        {"x_openserv_request_id": "", "request_id": "id-c"}, "id-c"),
    "no other header": ({"cf_ray": "id-d"}, None)})
def test_the_request_id_of_an_error_and_of_a_reply(headers, request_id):
    error = error_of(http_answer({}, "400 No", **headers))
    assert error.request_id == request_id
    assert re.findall("id-.", str(error)) == [request_id][:bool(request_id)]
    with Server(http_answer(REPLY, **headers)) as server:
        reply = serv.chat("Hi", system=SYSTEM, base_url=server.url)
    assert reply.request_id == request_id


def test_a_cut_stream_says_how_many_tries_had_failed():
    cut = stream_answer(bare_chunk("A"))
    with Server([error_answer(503), cut]) as server:
        with pytest.raises(serv.APIConnectionError) as caught:
            chat_streamed("Hi", system=SYSTEM, base_url=server.url,
                          max_retries=2)
    assert (caught.value.retries, caught.value.reply.retries) == (1, 1)


def error_samples():
    """Yield one error of each class, as calls raise them."""
    for status in (400, 401, 402, 403, 404, 409, 429, 500):
        yield error_of(http_answer(ERROR_BODY, "%d No" % status,
                                   retry_after="3", x_request_id="r1"))
    yield error_of(http_answer(b"?", x_request_id="r1"))
    yield error_of(closing(http_head(content_length=5)))
    for end in ([{"error": {"code": 429}}], ["{"], []):
        yield error_of(stream_answer(bare_chunk("Hello"), *end), chat_streamed)
    with Server(lambda wire, request: None) as server:
        for options in ({"timeout": 0.05}, {"api_key": "\u2026"}):
            with pytest.raises(serv.ServError) as caught:
                serv.chat("Hi", system=SYSTEM, base_url=server.url, **options)
            yield caught.value


def test_errors_can_be_pickled_and_copied():
    errors = list(error_samples())
    assert {type(error).__name__ for error in errors} == {
        name for name, _, _ in ERROR_TREE}
    assert [error.reply for error in errors].count(None) == len(errors) - 3
    for error in errors:
        others = [pickle.loads(pickle.dumps(error, protocol))
                  for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for other in others + [copy.copy(error), copy.deepcopy(error)]:
            assert error_facts(other) == error_facts(error)
            assert type(other.reply) is type(error.reply)


@pytest.mark.parametrize("answer", [
    http_answer(b"{"), stream_answer("{"), closing(http_head(
        content_length=9)), closing(http_head(transfer_encoding="chunked")
                                    + b"x\r\n"), closing(b"x\r\n"),
    closing(b"")],
    ids=["no JSON", "broken event", "cut", "no chunk", "no HTTP", "nothing"])
def test_a_cause_is_of_the_system_and_never_what_might_quote_the_server(
        answer):
    """One with a cause: test_a_refused_connection_is_tried_again."""
    assert error_of(answer, chat_streamed).__cause__ is None


# ---------------------------------------------------------------------------
# The calls
#
# chat(), message() and stream(): their arguments, and what they all do.
# ---------------------------------------------------------------------------

CALL_ARGUMENTS = {
    "model": None, "system": None, "api_key": None, "base_url": None,
    "timeout": None, "max_retries": 2, "headers": None}


@pytest.mark.parametrize("call, own", [
    (serv.chat, {}), (serv.message, {"max_tokens": inspect.Parameter.empty}),
    (serv.stream, {"endpoint": "chat"})], ids=["chat", "message", "stream"])
def test_the_arguments_of_a_call(call, own):
    first, *named, last = inspect.signature(call).parameters.values()
    assert (first.name, first.kind) == (
        "messages", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert {each.name: each.default for each in named} == {
        **own, **CALL_ARGUMENTS}
    assert {each.kind for each in named} == {inspect.Parameter.KEYWORD_ONLY}
    assert (last.name, last.kind) == (
        "params", inspect.Parameter.VAR_KEYWORD)


@each_call
def test_a_call_from_its_request_to_its_answer(call, fake):
    reply = call("Hi", system=SYSTEM, model="m")
    assert (reply.text, reply["model"]) == ('You said: "Hi"', "m")
    [request] = fake.requests
    chat = call in CHAT_CALLS
    streaming = call in (chat_streamed, message_streamed)
    assert request[:2] == ("POST", CHAT if chat else MESSAGES)
    assert request.headers == {  # a header that came twice has both values
        "accept": "text/event-stream" if streaming else "application/json",
        "accept-encoding": "identity", "authorization": "Bearer " + KEY,
        "content-length": str(len(request.body)),
        "content-type": "application/json",
        "host": fake.url[len("http://"):], "user-agent": serv.USER_AGENT}
    body = {"model": "m", "messages": [ASKED]}
    if chat:
        body["messages"].insert(0, {"role": "system", "content": SYSTEM})
    else:
        body.update(system=SYSTEM, max_tokens=50)
    if streaming:
        body["stream"] = True
    assert body_of(request) == body


@each_call
def test_any_parameter_is_sent_as_it_is(call, fake, monkeypatch):
    monkeypatch.setitem(globals(), "CLIENT_ARGUMENTS", ())  # none is refused
    params = {"temperature": 0.2, "stop": None, "n": 1, "seed": 0, "user": "",
              "serv_new": {"a": [1, None, False, "\u00e9 \U0001f600"]},
              "metadata": {}, "logit_bias": {"50256": -100},
              "max_completion_tokens": 2 ** 70,
              # names that a careless client would use for itself
              "self": 1, "body": 2, "params": {"x": 3}, "streaming": 4,
              "chat": 5, "more": 6, "name": 7, "data": 8, "url": 9, "key": 10}
    if call in (serv.chat, message):
        params["endpoint"] = "mine"
    call("Hi", system=SYSTEM, **params)
    body = sent(fake)
    assert {name: body.pop(name) for name in params} == params
    assert set(body) <= {"model", "messages", "system", "max_tokens", "stream"}


@each_call
def test_nothing_of_the_callers_is_changed(call):
    given = {"messages": [copy.deepcopy(ASKED)], "system": [
        {"type": "text", "text": SYSTEM}], "headers": {"X-A": "b"},
        "tools": [{"type": "function", "name": "f",
                   "function": {"name": "f"}}],
        "tool_choice": {"type": "none"}}
    before = copy.deepcopy(given)
    call(**given)
    assert given == before


CALL_MISUSES = {
    "no system prompt": ({"system": None}, ValueError, "system="),
    "no JSON": ({"top_k": {1}}, TypeError, "top_k"),
    "a bad header": ({"headers": {"Host": "h"}}, ValueError, "headers"),
    "a bad URL": ({"base_url": "ftp://h"}, ValueError, "base_url"),
    "a bad timeout": ({"timeout": 0}, ValueError, "timeout"),
    "bad retries": ({"max_retries": -1}, ValueError, "max_retries"),
    "a bad key": ({"api_key": "\u2026"}, serv.ServError, "API key"),
    "extra_headers": ({"extra_headers": {"X-A": "b"}}, TypeError,
                      "extra_headers.*headers="),
    "extra_body": ({"extra_body": {"top_k": 1}}, TypeError, "extra_body"),
    "extra_query": ({"extra_query": {"a": "b"}}, TypeError, "extra_query"),
}


@table("arguments, error, match", CALL_MISUSES)
@pytest.mark.parametrize("call", [
    serv.chat, message, serv.stream,
    lambda messages, **arguments: serv.stream(
        messages, endpoint="messages", max_tokens=9, **arguments)],
    ids=["chat", "message", "stream", "stream of messages"])
def test_misuse_is_refused_before_anything_is_sent(
        call, arguments, error, match, fake):
    with pytest.raises(error, match=match):
        call("Hi", **{"system": SYSTEM, **arguments})
    assert fake.connections == 0


@plain_calls
def test_stream_true_is_refused_with_a_pointer_to_stream(call):
    with pytest.raises(ValueError, match=r"stream\(\)"):
        call("Hi", system=SYSTEM, stream=True)


def test_messages_requires_max_tokens():
    with pytest.raises(TypeError, match="max_tokens"):
        serv.message("Hi", system=SYSTEM)
    with pytest.raises(TypeError, match="max_tokens"):
        serv.stream("Hi", system=SYSTEM, endpoint="messages")


@pytest.mark.parametrize("endpoint", ["", "message", "Chat", None, "models"])
def test_an_endpoint_is_chat_or_messages(endpoint):
    with pytest.raises(ValueError, match="endpoint.*chat.*messages"):
        serv.stream("Hi", system=SYSTEM, endpoint=endpoint)


# ---------------------------------------------------------------------------
# Replies
#
# The service's JSON as a dict, and the same views of both formats.
# ---------------------------------------------------------------------------

def chat_reply(finish="stop", **entry):
    """Return the reply of a chat answer with these fields of its message."""
    return serv.Reply({"object": "chat.completion", "choices": [
        {"index": 0, "message": {"role": "assistant", **entry},
         "finish_reason": finish}]})


def message_reply(*blocks, stop="end_turn", **top):
    """Return the reply of a Messages answer with these blocks."""
    return serv.Reply({"type": "message", "role": "assistant",
                       "content": list(blocks), "stop_reason": stop, **top})


def text_block(text):
    return {"type": "text", "text": text}


def views(reply):
    """Return what the views say, except `message`."""
    return {name: getattr(reply, name) for name in (
        "text", "thinking", "tool_calls", "stop_reason", "refusal",
        "truncated", "usage", "request_id", "retries", "partial")}


NO_VIEWS = {
    "text": "", "thinking": "", "tool_calls": [], "stop_reason": None,
    "refusal": None, "truncated": False, "usage": {}, "request_id": None,
    "retries": 0, "partial": False}


@each_call
def test_a_reply_is_a_dict_with_views_on_top(call):
    reply = call("Hi", system=SYSTEM)
    assert isinstance(reply, dict) and type(reply) is serv.Reply
    assert str(reply) == reply.text
    assert repr(dict(reply)) in repr(reply)
    assert reply == dict(reply) == json.loads(json.dumps(reply))
    kind = reply.headers["content-TYPE"]
    assert kind == reply.headers["Content-Type"]
    assert kind in ("application/json", "text/event-stream")


@pytest.mark.parametrize("call, stop, usage", [
    (serv.chat, "stop", {"prompt_tokens": 1, "completion_tokens": 3,
                         "total_tokens": 4}),
    (message, "end_turn", {"input_tokens": 1, "output_tokens": 3})],
    ids=["chat", "messages"])
def test_the_views_of_a_plain_answer(call, stop, usage, fake):
    assert views(call("Hi", system=SYSTEM)) == {
        **NO_VIEWS, "text": 'You said: "Hi"', "stop_reason": stop,
        "usage": usage, "request_id": REQUEST_ID % 1}


@each_call
def test_the_time_of_a_reply_is_that_from_the_call_to_the_last_byte(
        call, clock):
    def busy(wire, request):
        clock(5)
        wire.sendall(error_answer(503))

    def good(wire, request):
        clock(5)
        service(wire, request)

    with Server([busy, good]) as server:
        started = time.monotonic()
        reply = call("Hi", system=SYSTEM, base_url=server.url)
        took = time.monotonic() - started
    assert 10 <= reply.elapsed <= took


@each_call
def test_replies_can_be_pickled_and_copied(call, fake):
    def facts(reply):
        return {**views(reply), "type": type(reply), "dict": dict(reply),
                "elapsed": reply.elapsed, "headers": dict(reply.headers)}

    reply = call("Hi", system=SYSTEM)
    others = [pickle.loads(pickle.dumps(reply, protocol))
              for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in others + [copy.copy(reply), copy.deepcopy(reply)]:
        assert facts(other) == facts(reply)
        assert other.headers["X-OPENSERV-request-id"] == REQUEST_ID % 1


@plain_calls
def test_the_answer_is_whole_and_untouched(call):
    answer = {"choices": [{"message": {"content": "A", "x": 1}, "y": 2}],
              "content": [], "new": {"a": [1, None, 2.5e-9]}, "id": None,
              "text": "not a view", "headers": 1, "\u00e9": "\ud83d"}
    with Server(http_answer(answer)) as server:
        assert call("Hi", system=SYSTEM, base_url=server.url) == answer


# -- Text and thinking --------------------------------------------------------

THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
CHAT_TEXTS = {
    # fields of the message, the text, the thinking
    "text": ({"content": "A"}, "A", ""),
    "no text": ({"content": ""}, "", ""),
    "null": ({"content": None}, "", ""),
    "no content": ({}, "", ""),
    "a part without a type is text": (
        {"content": [{"type": None, "text": "A"}, {"type": "", "text": "B"}]},
        "AB", ""),
    "parts are joined, but for those of another type": (
        {"content": [text_block("A"), {"type": "image_url"}, {"text": "B"},
                     {"type": "output_text", "text": "C"}]}, "ABC", ""),
    "thinking in parts (Magistral)": (
        {"content": [{"type": "thinking", "thinking": [text_block("Hm")]},
                     text_block("A")]}, "A", "Hm"),
    "reasoning_content (DeepSeek)": (
        {"content": "A", "reasoning_content": "Hm"}, "A", "Hm"),
    "reasoning (OpenRouter)": ({"content": "A", "reasoning": "Hm"}, "A", "Hm"),
    "an empty field gives way to the other": (
        {"content": "A", "reasoning_content": "", "reasoning": "Hm"}, "A",
        "Hm"),
    "of two fields with the thinking one is read": (
        {"content": "A", "reasoning_content": "Hm", "reasoning": "Hm"}, "A",
        "Hm"),
    "details (MiniMax)": (
        {"content": "A", "reasoning_details": [
            {"type": "reasoning.text", "text": "Hm"},
            {"type": "reasoning.encrypted", "data": "eA=="},
            {"type": "reasoning.summary", "summary": "."}]}, "A", "Hm."),
    "blocks (LiteLLM)": (
        {"content": "A", "thinking_blocks": [THOUGHT]}, "A", "Hm."),
    "a summary in parts (Databricks)": (
        {"content": [{"type": "reasoning", "summary": [
            {"type": "summary_text", "text": "Hm"}]}, text_block("A")]},
        "A", "Hm"),
    "details beside the same as text (OpenRouter)": (
        {"content": "A", "reasoning": "Hm", "reasoning_details": [
            {"type": "reasoning.text", "text": "Hm"}]}, "A", "Hm"),
    "half a character is U+FFFD, two halves are one": (
        {"content": "\ud83d B \ud83d\ude00", "reasoning": "\ud83d"},
        "\ufffd B \U0001f600", "\ufffd"),
}
MESSAGES_TEXTS = {
    # the blocks, the text, the thinking
    "no blocks": ([], "", ""),
    "text blocks are joined": (
        [text_block("A "), {"type": "new", "text": 5}, text_block("B")],
        "A B", ""),
    "thinking blocks are joined": (
        [THOUGHT, {"type": "redacted_thinking", "data": "eA=="}, THOUGHT,
         text_block("A")], "A", "Hm.Hm."),
    "a tool is no text": (
        [{"type": "tool_use", "id": "1", "name": "f", "input": {}}], "", ""),
}


@table("entry, text, thinking", CHAT_TEXTS)
def test_the_text_and_the_thinking_of_chat(entry, text, thinking):
    reply = chat_reply(**entry)
    assert (reply.text, reply.thinking) == (text, thinking)


@table("blocks, text, thinking", MESSAGES_TEXTS)
def test_the_text_and_the_thinking_of_messages(blocks, text, thinking):
    reply = message_reply(*blocks)
    assert (reply.text, reply.thinking) == (text, thinking)


def test_the_first_of_several_choices_speaks():
    reply = serv.Reply({"choices": [
        {"message": {"content": "A"}, "finish_reason": "stop"},
        {"message": {"content": "B"}, "finish_reason": "length"}]})
    assert (reply.text, reply.stop_reason, reply.truncated) == (
        "A", "stop", False)


# -- Tool calls ---------------------------------------------------------------

def chat_call(arguments="{}", id="1", name="f"):
    return {"id": id, "type": "function",
            "function": {"name": name, "arguments": arguments}}


@table("arguments, decoded", {
    "an object": ('{"a": [1, null], "b": {"c": "\\u00e9"}}',
                  {"a": [1, None], "b": {"c": "\u00e9"}}),
    "halves of a character": ('{"a": "\\ud83d\\ude00 \\ud83d"}',
                              {"a": "\U0001f600 \ufffd"}),
    "an empty object": ("{}", {}), "blanks": (" { } ", {}),
    "not text, but an object": ({"a": 1}, {"a": 1}),
    "not text, but null": (None, {}), "nothing": ("", ""),
    "a cut object": ('{"a": 1', '{"a": 1'), "a list": ("[1]", "[1]"),
    "a number": ("1", "1"), "null": ("null", "null"), "a text": ('"a"', '"a"'),
    "two objects": ('{"a": 1} {}', '{"a": 1} {}'),
    "no JSON": ("Paris", "Paris")})
def test_arguments_are_decoded_if_they_are_an_object_else_stay_text(
        arguments, decoded):
    [call] = chat_reply(tool_calls=[chat_call(arguments)]).tool_calls
    assert call == ("1", "f", decoded)
    assert type(call.arguments) is type(decoded)


def test_arguments_that_are_nested_too_deeply_stay_text():
    for depth, kind in ((serv.MAX_DEPTH, dict), (serv.MAX_DEPTH + 1, str),
                        (100000, str)):
        text = '{"a":' * depth + "1" + "}" * depth
        [call] = chat_reply(tool_calls=[chat_call(text)]).tool_calls
        assert type(call.arguments) is kind
        assert call.arguments == (text if kind is str else json.loads(text))


SPLIT_CALLS = [  # gpt-5.4 behind a gateway: the text in one, the call in one
    {"index": 0, "finish_reason": "stop",
     "message": {"role": "assistant", "content": "I look."}},
    {"index": 1, "finish_reason": "tool_calls", "message": {
        "role": "assistant", "content": None, "tool_calls": [chat_call()]}}]
SERVER_BLOCKS = [
    {"type": "server_tool_use", "id": "0", "name": "web_search",
     "input": {"query": "x"}},
    {"type": "web_search_tool_result", "tool_use_id": "0", "content": []},
    {"type": "mcp_tool_use", "id": "3", "name": "h", "input": {}}]
TOOL_CALLS = {
    "chat: calls keep their order": (
        chat_reply(tool_calls=[chat_call('{"n": 2}', "b", "g"), chat_call()]),
        [("b", "g", {"n": 2}), ("1", "f", {})]),
    "chat: a custom tool gets text": (
        chat_reply(tool_calls=[{"id": "1", "type": "custom", "custom": {
            "name": "f", "input": "SELECT 1"}}]), [("1", "f", "SELECT 1")]),
    "chat: null": (chat_reply(tool_calls=None), []),
    "chat: none": (chat_reply(tool_calls=[]), []),
    "chat: what is no call": (chat_reply(tool_calls=[None]), []),
    "chat: what is no list": (chat_reply(tool_calls="x"), []),
    "chat: a call without a name is none": (
        chat_reply(tool_calls=[chat_call(name=""), chat_call(id="2")]),
        [("2", "f", {})]),
    "chat: the calls of a later choice, where the first has none": (
        serv.Reply({"choices": copy.deepcopy(SPLIT_CALLS)}), [("1", "f", {})]),
    "chat: not the calls of a later choice, if two were asked for": (
        serv.Reply({"choices": copy.deepcopy(SPLIT_CALLS)}, choice_count=2),
        []),
    "chat: the calls of the first choice, where it has some": (
        serv.Reply({"choices": [
            {"message": {"tool_calls": [chat_call("{}", "0", "g")]}},
            {"message": {"tool_calls": [chat_call()]}}]}), [("0", "g", {})]),
    "messages: only what the caller is to run": (
        message_reply(*SERVER_BLOCKS, {
            "type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}},
            text_block("A"), {
                "type": "tool_use", "id": "2", "name": "g", "input": {}}),
        [("1", "f", {"a": [1]}), ("2", "g", {})]),
    "chat: cut off before any argument": (
        serv.Reply({"choices": [{"finish_reason": "length", "message": {
            "tool_calls": [chat_call(None)]}}]}), [("1", "f", "")]),
    "messages: cut off before any argument": (
        serv.Reply({**message_reply({"type": "tool_use", "id": "1",
                                     "name": "f", "input": {}}),
                    "stop_reason": "max_tokens"}), [("1", "f", "")]),
    "chat: filtered before any argument": (
        serv.Reply({"choices": [{
            "finish_reason": "content_filter", "message": {
                "tool_calls": [chat_call(None)]}}]}), [("1", "f", "")]),
    "messages: no argument, and no reason that it ended": (
        serv.Reply({**message_reply({"type": "tool_use", "id": "1",
                                     "name": "f", "input": {}}),
                    "stop_reason": None}), [("1", "f", "")]),
    "messages: a call without a name is none": (
        message_reply({"type": "tool_use", "id": "1", "input": {}}), []),
    "messages: input that is no object is text": (
        message_reply({"type": "tool_use", "id": "1", "name": "f",
                       "input": [1]}), [("1", "f", "[1]")]),
    "messages: half a character in the input": (
        message_reply({"type": "tool_use", "id": "1", "name": "f",
                       "input": {"a": "\ud83d"}}),
        [("1", "f", {"a": "\ufffd"})]),
    "messages: no input is an empty one": (
        message_reply({"type": "tool_use", "id": "1", "name": "f"}),
        [("1", "f", {})]),
}


@table("reply, calls", TOOL_CALLS)
def test_the_tool_calls_of_a_reply(reply, calls):
    assert reply.tool_calls == calls
    assert all(type(call) is serv.ToolCall for call in reply.tool_calls)


def test_a_tool_call_has_names():
    call = serv.ToolCall("1", "f", {"a": 2})
    assert (call.id, call.name, call.arguments) == ("1", "f", {"a": 2})
    assert pickle.loads(pickle.dumps(call)) == call == copy.copy(call)


# -- Why it stopped -----------------------------------------------------------

STOP_WORDS = {
    # what it means, as a server says it
    "an end": [
        "stop", "end_turn", "tool_calls", "tool_use", "function_call",
        "stop_sequence", "pause_turn", "STOP", "new", None],
    "cut off": [
        "length", "max_tokens", "model_context_window_exceeded",
        "MAX_TOKENS",  # Gemini, where it is not translated
        "model_length",  # Mistral
        "max_output_tokens"],
    "blocked": [
        "content_filter", "refusal", "Content_Filter",
        "content_filter: PROHIBITED_CONTENT",  # Gemini
        "content_filter: RECITATION",
        "function_call_filter: MALFORMED_FUNCTION_CALL", "SAFETY", "safety",
        "RECITATION", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII",
        "sensitive",  # GLM
        "guardrail_intervened",  # Bedrock
        "ERROR_TOXIC"],  # Cohere
}


@pytest.mark.parametrize("meaning, word", [
    pytest.param(meaning, word, id="%s: %s" % (meaning, word))
    for meaning, words in STOP_WORDS.items() for word in words])
def test_a_stop_reason_is_an_end_or_says_cut_off_or_blocked(meaning, word):
    for reply in (chat_reply(word, content="A"),
                  message_reply(text_block("A"), stop=word)):
        assert (reply.stop_reason, reply.refusal, reply.truncated) == (
            word, word if meaning == "blocked" else None,
            meaning == "cut off")


REFUSALS = {
    "chat: null": (chat_reply(content="A", refusal=None), None),
    "chat: empty": (chat_reply(content="A", refusal=""), None),
    "chat: its text": (chat_reply(content=None, refusal="No."), "No."),
    "chat: its text, rather than the reason": (
        chat_reply("content_filter", content=None, refusal="No."), "No."),
    "chat: a part": (
        chat_reply(content=[{"type": "refusal", "refusal": "No."}]), "No."),
    "chat: no message beside the reason (Gemini)": (
        serv.Reply({"choices": [{"index": 0, "finish_reason":
                                 "content_filter: RECITATION"}]}),
        "content_filter: RECITATION"),
    "messages: no text beside the reason": (
        serv.Reply({"type": "message", "content": None,
                    "stop_reason": "refusal"}), "refusal"),
    "messages: the explanation, rather than the reason": (
        message_reply(stop="refusal", stop_details={
            "type": "refusal", "category": "cyber", "explanation": "No."}),
        "No."),
    "messages: no explanation": (
        message_reply(stop="refusal", stop_details={
            "type": "refusal", "explanation": None}), "refusal"),
    "messages: no details": (
        message_reply(stop="refusal", stop_details=None), "refusal"),
}


@table("reply, refusal", REFUSALS)
def test_the_refusal_of_a_reply(reply, refusal):
    assert reply.refusal == refusal


# -- The next turn ------------------------------------------------------------

MESSAGE_BLOCKS = [
    THOUGHT, {"type": "redacted_thinking", "data": "eA=="},
    {"type": "new", "x": None}, text_block("A"), *SERVER_BLOCKS,
    {"type": "tool_use", "id": "1", "name": "f", "input": {}}]
CHAT_ENTRY = {"role": "assistant", "content": None, "refusal": "No.",
              "new": 1, "tool_calls": [chat_call()]}
ENTRIES = {
    "chat: the answer's own": (
        serv.Reply({"choices": [{"message": CHAT_ENTRY}]}), CHAT_ENTRY),
    "chat: a role that the server has left out": (
        serv.Reply({"choices": [{"message": {"content": "A"}}]}),
        {"role": "assistant", "content": "A"}),
    "chat: with the calls of a later choice": (
        serv.Reply({"choices": copy.deepcopy(SPLIT_CALLS)}),
        {"role": "assistant", "content": "I look.",
         "tool_calls": [chat_call()]}),
    "messages: all blocks": (
        message_reply(*MESSAGE_BLOCKS, id="msg_1"),
        {"role": "assistant", "content": MESSAGE_BLOCKS}),
}


@table("reply, entry", ENTRIES)
def test_the_entry_for_the_next_turn(reply, entry):
    before = copy.deepcopy(reply)
    assert reply.message == entry
    assert reply == before


CITY_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ROUND_TRIPS = {
    # the calls, their options, the tool's result, what is sent before it
    "chat": (
        CHAT_CALLS, {"reasoning_effort": "high", "tools": [
            {"type": "function", "function": {
                "name": "get_weather", "parameters": CITY_SCHEMA}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
        {"role": "assistant", "tool_calls": [chat_call(
            '{"city": "Paris"}', "call_1", "get_weather")],
         "reasoning_content": "The user wants an answer."}),
    "messages": (
        MESSAGES_CALLS, {
            "max_tokens": 2048,
            "thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [
                {"name": "get_weather", "input_schema": CITY_SCHEMA}]},
        {"role": "user", "content": [{
            "type": "tool_result", "tool_use_id": "toolu_1",
            "content": "18 C"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "The user wants an answer.",
             "signature": "c2lnbmVk"},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather",
             "input": {"city": "Paris"}}]}),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@table("calls, options, result, entry", ROUND_TRIPS)
def test_a_tool_round_trip(calls, options, result, entry, streamed, fake):
    call, options = calls[streamed], {"system": SYSTEM, **options}
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    reply = call(messages, **options)
    [tool_call] = reply.tool_calls
    assert tool_call[1:] == ("get_weather", {"city": "Paris"})
    assert (reply.text, reply.thinking) == ("", "The user wants an answer.")
    messages += [reply.message, result]
    assert call(messages, **options).text == 'The tool says: "18 C"'
    came = body_of(fake.requests[1])["messages"][-2]
    assert {name: came.get(name) for name in entry} == entry
    assert '"%s"' % tool_call.id in json.dumps(result)


PARALLEL_TRIPS = {
    # the calls, the tools f and g, the messages with their results
    "chat": (
        CHAT_CALLS, [{"type": "function", "function": {"name": name}}
                     for name in "fg"],
        [{"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
         {"role": "tool", "tool_call_id": "call_2", "content": "20 C"}]),
    "messages": (
        MESSAGES_CALLS, [{"name": name, "input_schema": {}} for name in "fg"],
        [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1",
             "content": "18 C"},
            {"type": "tool_result", "tool_use_id": "toolu_2",
             "content": "20 C"}]}]),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@table("calls, tools, results", PARALLEL_TRIPS)
def test_a_round_trip_of_parallel_calls(calls, tools, results, streamed):
    call, options = calls[streamed], {"system": SYSTEM, "tools": tools}
    messages = [{"role": "user", "content": "Both, in parallel."}]
    reply = call(messages, **options)
    assert [each[1:] for each in reply.tool_calls] == [("f", {}), ("g", {})]
    messages += [reply.message, *results]
    assert call(messages, **options).text == 'The tool says: "18 C 20 C"'


# -- Odd answers break no view ------------------------------------------------

@pytest.mark.parametrize("name", ["choices", "content", "model_dump"])
def test_a_reply_that_is_used_as_an_object_says_that_it_is_a_dict(name):
    with pytest.raises(AttributeError, match="%r: it is a dict" % name):
        getattr(serv.Reply(REPLY), name)


@table("answer", {
    "in the answer": {"usage": {"total_tokens": 1}, "choices": [
        {"usage": {"total_tokens": 2}}]},
    "in the choice (Moonshot)": {
        "choices": [{"usage": {"total_tokens": 1}}]},
    "beside it (Groq)": {"x_groq": {"id": "r", "usage": {"total_tokens": 1}},
                         "choices": [{}]}})
def test_the_usage_of_a_reply_is_found_where_it_was_sent(answer):
    assert serv.Reply(answer).usage == {"total_tokens": 1}


@pytest.mark.parametrize("usage, seen", [
    ({"total_tokens": 0}, {"total_tokens": 0}), ({}, {}), (None, {}),
    ([], {}), (3, {})], ids=repr)
def test_the_usage_of_a_reply_is_a_dict(usage, seen):
    assert message_reply(usage=usage).usage == seen


@pytest.mark.parametrize("choices", [
    [], None, "x", [None], ["x"], [{}], [{"message": None}],
    [{"message": {}}], [{"message": "x"}],
    [{"message": {"content": 5, "tool_calls": 6, "refusal": None}}],
    [{"message": {"content": [None, "x", 5, {}], "reasoning": 5}}]],
    ids=repr)
def test_an_odd_choice_breaks_no_view(choices):
    reply = serv.Reply({"choices": choices})
    assert views(reply) == NO_VIEWS
    assert isinstance(reply.message, dict)


@pytest.mark.parametrize("block", [
    None, "x", {}, {"type": None}, {"type": "text"}, {"type": "thinking"},
    {"type": "text", "text": None}, {"type": "thinking", "thinking": 5}],
    ids=repr)
def test_an_odd_block_breaks_no_view(block):
    reply = message_reply(block, text_block("A"), stop=None)
    assert views(reply) == {**NO_VIEWS, "text": "A"}
    assert reply.message["content"] == [block, text_block("A")]


# ---------------------------------------------------------------------------
# Building requests
#
# Pure, except for the SERV_ variables: arguments in; URL, headers, body out.
# ---------------------------------------------------------------------------

def build(endpoint="chat", **arguments):
    """Return a request, with a system prompt, and max_tokens for Messages."""
    arguments = {"messages": "Hi", "system": SYSTEM, **arguments}
    if endpoint == "messages":
        arguments["params"] = {"max_tokens": 9, **arguments.get("params", {})}
    return serv.build_request(endpoint, **arguments)


def built_headers(**arguments):
    """Return the headers of a request by names in lower case."""
    headers = build(**arguments).headers
    lower = {name.lower(): value for name, value in headers.items()}
    assert len(lower) == len(headers)  # no name is there twice
    return lower


# -- The body -----------------------------------------------------------------

SYSTEM_ENTRY = {"role": "system", "content": SYSTEM}
SYSTEM_BLOCKS = [{"type": "text", "text": SYSTEM,
                  "cache_control": {"type": "ephemeral"}}]
LONG_CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                 {"type": "image_url"}]},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "user", "content": "\u2028 \ud83d \U0001f600", "z": 1}]
BODIES = {
    "chat: a list is sent as it is, after the prompt": (
        "chat", {"messages": LONG_CHAT},
        {"messages": [SYSTEM_ENTRY] + LONG_CHAT}),
    "chat: the prompt goes before another prompt": (
        "chat", {"messages": [ASKED, SYSTEM_ENTRY]},
        {"messages": [SYSTEM_ENTRY, ASKED, SYSTEM_ENTRY]}),
    "chat: a system entry anywhere is a prompt": (
        "chat", {"system": None, "messages": [ASKED, SYSTEM_ENTRY]},
        {"messages": [ASKED, SYSTEM_ENTRY]}),
    "chat: a developer entry is a prompt": (
        "chat", {"system": "", "messages": [
            {"role": "developer", "content": SYSTEM_BLOCKS}, ASKED]},
        {"messages": [
            {"role": "developer", "content": SYSTEM_BLOCKS}, ASKED]}),
    "chat: blocks are a prompt": (
        "chat", {"system": SYSTEM_BLOCKS}, {"messages": [
            {"role": "system", "content": SYSTEM_BLOCKS}, ASKED]}),
    "chat: nothing but parameters is added": (
        "chat", {"params": {"max_tokens": 5, "stop": None}},
        {"messages": [SYSTEM_ENTRY, ASKED], "max_tokens": 5, "stop": None}),
    "messages: blocks are a prompt": (
        "messages", {"system": SYSTEM_BLOCKS},
        {"messages": [ASKED], "system": SYSTEM_BLOCKS, "max_tokens": 9}),
    "messages: blocks that are no text are a prompt": (
        "messages", {"system": [{"type": "file", "file": {}}]},
        {"messages": [ASKED], "system": [{"type": "file", "file": {}}],
         "max_tokens": 9}),
    "messages: a list is sent as it is": (
        "messages", {"messages": LONG_CHAT},
        {"messages": LONG_CHAT, "system": SYSTEM, "max_tokens": 9}),
}


@table("endpoint, arguments, body", BODIES)
def test_the_body_of_a_request(endpoint, arguments, body):
    data = build(endpoint, **arguments).body
    assert json.loads(data.decode()) == {"model": MODEL, **body}


NO_PROMPTS = {
    "no prompt": ("chat", None, "Hi"), "an empty one": ("chat", "", "Hi"),
    "no blocks": ("messages", [], "Hi"),
    "a blank one": ("messages", " \n", "Hi"),
    "a user's words": ("chat", None, [ASKED]),
    "no messages": ("chat", None, []),
    "an empty entry": (
        "chat", None, [{"role": "developer", "content": ""}, ASKED]),
    "a blank block": ("messages", [text_block(" ")], "Hi"),
    "a block without text": ("chat", [{}], "Hi"),
    "an entry of blank parts": (
        "chat", None, [{"role": "system", "content": [
            text_block(""), text_block(" ")]}, ASKED]),
    "an entry, where Messages wants a field": (
        "messages", None, [SYSTEM_ENTRY, ASKED]),
}


@table("endpoint, system, messages", NO_PROMPTS)
def test_a_call_without_a_system_prompt_is_refused(endpoint, system, messages):
    says = "system prompt.*system="
    if endpoint == "messages":
        says += ".*a system entry in messages does not count"
    with pytest.raises(ValueError, match=says):
        build(endpoint, system=system, messages=messages)


def test_a_model_is_a_str():
    with pytest.raises(TypeError, match="model: expected a str"):
        build(model=5)


@pytest.mark.parametrize("name", ["messages", "system"])
@pytest.mark.parametrize("value", [5, b"Hi", {"a": "b"}, ["Hi"], [None]],
                         ids=repr)
def test_messages_and_system_are_str_or_list_of_dicts(name, value):
    with pytest.raises(TypeError, match=name):
        build(**{name: value})


def test_a_reply_in_messages_is_refused_with_a_pointer_to_its_message():
    with pytest.raises(TypeError, match=r"messages.*reply\.message"):
        build(messages=[ASKED, serv.Reply(REPLY)])


BODY_LOOP = []
BODY_LOOP.append(BODY_LOOP)
NO_JSON = {
    "NaN": (float("nan"), ValueError), "a loop": (BODY_LOOP, ValueError),
    "an infinity deep inside": ([1, {"a": -float("inf")}], ValueError),
    "a set": ({1}, TypeError), "bytes": (b"a", TypeError),
    "an object deep inside": ([{"a": object()}], TypeError),
    "a tuple as a key": ({("a",): 1}, TypeError),
}


@table("value, error", NO_JSON)
def test_what_json_cannot_say_is_refused_by_name(value, error):
    with pytest.raises(error, match="top_k"):
        build(params={"a": 1, "top_k": value, "b": 2})
    with pytest.raises(error, match="messages"):
        build(messages=[{"role": "user", "content": value}])
    for endpoint in ("chat", "messages"):
        with pytest.raises(error, match="system"):
            build(endpoint, system=[{"type": "text", "text": value}])


def test_max_tokens_of_none_counts_as_missing():
    with pytest.raises(TypeError, match="max_tokens"):
        build("messages", params={"max_tokens": None})


@pytest.mark.parametrize("arguments, name", [
    ({"messages": [{"role": "system", "content": 0}]}, "messages"),
    ({"params": {"tools": 0}}, "tools")], ids=["messages", "a parameter"])
def test_json_that_is_too_deep_is_refused_by_name(arguments, name):
    deep = []
    for _ in range(100000):
        deep = [deep]
    place = arguments.get("params") or arguments["messages"][0]
    place.update({key: deep for key, value in place.items() if value == 0})
    with pytest.raises(ValueError, match=name):
        build(**arguments)
    while deep:  # or its garbage would be as deep
        deep = deep.pop()


# -- Settings: the argument, else the variable, read at each call -------------

SETTINGS = {
    "model": (lambda request: json.loads(request.body.decode())["model"],
              "SERV_MODEL", "%s"),
    "api_key": (lambda request: {name.lower(): value for name, value in
                                 request.headers.items()}["authorization"],
                "SERV_API_KEY", "Bearer %s"),
    "base_url": (lambda request: request.url, "SERV_BASE_URL", "%s" + CHAT)}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_the_argument_else_the_variable(name, monkeypatch):
    read, variable, form = SETTINGS[name]
    a, b, c = "http://a", "http://b", "http://c"
    monkeypatch.setenv(variable, a)
    assert read(build()) == form % a
    assert read(build(**{name: ""})) == form % a
    monkeypatch.setenv(variable, b)
    assert read(build(**{name: None})) == form % b
    assert read(build(**{name: c})) == form % c


@pytest.mark.parametrize("variable", [None, ""])
def test_what_an_error_asks_for_where_no_setting_is_set(variable, monkeypatch):
    for name in ("SERV_MODEL", "SERV_API_KEY", "SERV_BASE_URL",
                 "SERV_TIMEOUT"):
        if variable is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, variable)
    with pytest.raises(ValueError, match="SERV_MODEL"):
        build(api_key=KEY)
    with pytest.raises(serv.ServError, match="SERV_API_KEY") as caught:
        build(model="m")
    assert type(caught.value) is serv.ServError
    request = build(model="m", api_key=KEY)
    assert request.url == "https://inference-api.openserv.ai" + CHAT
    assert request.timeout == 600


@pytest.mark.parametrize("value", [
    0, -1, 0.0, 86401, 10 ** 400, float("nan"), float("inf"), "soon", True,
    [5]], ids=lambda value: repr(value)[:9])
def test_a_timeout_that_is_refused(value):
    with pytest.raises(ValueError, match="timeout"):
        build(timeout=value)


@pytest.mark.parametrize("value", [
    "soon", "1 s", "-3", "0", "86401", "nan", "inf", "1_0"])
def test_a_timeout_in_the_variable_that_is_refused(value, monkeypatch):
    monkeypatch.setenv("SERV_TIMEOUT", value)
    with pytest.raises(ValueError, match="SERV_TIMEOUT"):
        build()
    build(timeout=5)  # then nobody looks at the variable


@pytest.mark.parametrize("value, seconds", [
    (0.001, 0.001), (5, 5), (86400, 86400), ("7", 7), ("7.5", 7.5),
    (".5", 0.5), ("1e3", 1000)])
def test_a_timeout_that_is_taken(value, seconds, monkeypatch):
    assert build(timeout=value).timeout == seconds
    monkeypatch.setenv("SERV_TIMEOUT", str(value))
    assert build().timeout == seconds


def test_the_timeout_of_the_variable_counts(monkeypatch):
    monkeypatch.setenv("SERV_TIMEOUT", "0.05")
    with Server(lambda wire, request: None) as server:
        with pytest.raises(serv.APITimeoutError):
            serv.chat("Hi", system=SYSTEM, base_url=server.url)


@pytest.mark.parametrize("value", [-1, 1.5, "2", None, float("inf"), True])
def test_max_retries_is_a_whole_number(value):
    with pytest.raises(ValueError, match="max_retries"):
        build(max_retries=value)


# -- The URL ------------------------------------------------------------------

@pytest.mark.parametrize("endpoint", ["chat", "messages"])
@pytest.mark.parametrize("prefix", ["", "/a", "/a/b", "/v1beta", "/v1/x"])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "//", "//v1//"])
def test_a_base_url_with_and_without_v1(endpoint, prefix, end):
    url = "https://h:8" + prefix
    assert build(endpoint, base_url=url + end).url == (
        url + (CHAT if endpoint == "chat" else MESSAGES))


@pytest.mark.parametrize("blanks", [" %s", "%s ", "%s\n", "\t%s\r\n"])
def test_white_space_around_a_base_url_is_dropped(blanks, monkeypatch):
    url = blanks % "http://h/v1"
    assert build(base_url=url).url == "http://h" + CHAT
    monkeypatch.setenv("SERV_BASE_URL", url)
    assert build().url == "http://h" + CHAT


@pytest.mark.parametrize("url, place", [
    ("http://h", ("http://h", False, "h", 80)),
    ("https://h/v1/", ("https://h", True, "h", 443)),
    ("http://h:8/a/v1", ("http://h:8/a", False, "h", 8)),
    ("https://h:/a", ("https://h/a", True, "h", 443)),
    ("http://[::1]:8", ("http://[::1]:8", False, "::1", 8)),
    ("https://[fe80::1%lo]:8/v1",
     ("https://[fe80::1%lo]:8", True, "fe80::1%lo", 8)),
    ("http://h/~a!$-._%41/[1]", ("http://h/~a!$-._%41/[1]", False, "h", 80)),
    ("http://b\u00fccher.test:8/v1", (
        "http://xn--bcher-kva.test:8", False, "xn--bcher-kva.test", 8))])
def test_where_a_base_url_leads(url, place):
    assert serv.build_url(url) == place


BAD_URLS = {
    "another scheme": ["ftp://h", "file:///etc/passwd", "socks5://h",
                       "data:text/plain,hi", "unix:///run/s",
                       "javascript:1"],
    "no scheme": ["127.0.0.1", "127.0.0.1:80", "//h", "localhost", "h/v1"],
    "no host": ["http:", "http://", "http:///v1", "http://:80", "https://?",
                "http:h"],
    "a bad port": ["http://h:port", "http://h:65536", "http://h:0",
                   "http://h:-1", "http://h:99999", "http://h:\u0663",
                   "http://h:+1", "http://h:0_1", "http://[::1]:+1"],
    "a query": ["http://h?", "http://h?a=b", "http://h/v1?a=b"],
    "a fragment": ["http://h#", "http://h/#a"],
    "white space inside": ["http://h/a b", "http://e h/", "http://h/\r\nX: y",
                           "http://h/ HTTP/1.1\r\nX: y\r\n\r\nz",
                           "http://h/\ta", "http://h\n.test", "http:// h"],
    "control characters": ["http://h/\x00", "http://h/\x7f", "http://h\x1b/"],
    "a user": ["http://user@h", "http://user:password@h",
               "http://:password@h", "http://@h", "http://h\\@i"],
    "no address": ["http://[::1", "http://[h]"],
    "a path beyond ASCII": ["http://h/\u2028a", "http://h/\u00e9"],
    "a host that would become another": ["http://\u2100.test"],  # a/c.test
}


@pytest.mark.parametrize("url", [
    pytest.param(url, id="%s: %a" % (rule, url))
    for rule, urls in BAD_URLS.items() for url in urls])
def test_a_base_url_that_is_refused(url):
    with pytest.raises(ValueError, match="base_url") as caught:
        build(base_url=url)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("base_url, host", [
    ("http://h", "h"), ("http://h:80/a", "h"), ("HTTPS://h:443", "h"),
    ("http://h:443", "h:443"), ("https://h:8/v1", "h:8"),
    ("http://[::1]:8", "[::1]:8"), ("https://[fe80::1%lo]/v1", "[fe80::1]"),
    ("http://b\u00fccher.test", "xn--bcher-kva.test")])
def test_the_host_header_follows_the_url(base_url, host):
    assert built_headers(base_url=base_url)["host"] == host


@pytest.mark.parametrize("base_url", [5, b"http://h", ["http://h"]], ids=repr)
def test_a_base_url_is_a_str(base_url):
    with pytest.raises(TypeError, match="base_url"):
        build(base_url=base_url)


def test_an_ipv6_address_can_be_called():
    try:
        server = Server(service, host="::1")
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with server:
        for _ in range(2):  # the second on the connection of the first
            serv.chat("Hi", system=SYSTEM, base_url=server.url + "/v1")
    assert [(request.headers["host"], request.connection)
            for request in server.requests] == [
                ("[::1]:%d" % server.port, 1)] * 2


# -- The key ------------------------------------------------------------------

@pytest.mark.parametrize("key, header", [
    (KEY + "\n", KEY), (KEY + "\r\n", KEY), ("  %s\t" % KEY, KEY),
    ("\u00a0" + KEY, KEY), ("a b~", "a b~")], ids=ascii)
def test_white_space_around_a_key_is_dropped(key, header, monkeypatch):
    assert built_headers(api_key=key)["authorization"] == "Bearer " + header
    if key.isascii():  # or it might not fit into the environment
        monkeypatch.setenv("SERV_API_KEY", key)
        assert built_headers()["authorization"] == "Bearer " + header


@pytest.mark.parametrize("key", [
    "serv_\u2026", "sk-\u00e9t\u00e9-0123", "sk-0123\n4567",
    "sk-0123\r\nX: 4567", "sk-0123\x7f4567", "sk-0123\t4567", "sk-0123\x01x",
    "\ud800sk-0123"], ids=ascii)
def test_a_key_that_no_header_can_carry_is_not_shown(key):
    with pytest.raises(serv.ServError) as caught:
        build(api_key=key)
    error = caught.value
    assert type(error) is serv.ServError
    shown = repr(error) + str(error) + repr(vars(error))
    for part in ("sk-", "serv_\u2026", "0123", "4567"):
        assert part not in shown


@pytest.mark.parametrize("key", [" ", "\t\r\n"], ids=ascii)
def test_a_key_of_white_space_counts_as_missing(key):
    with pytest.raises(serv.ServError, match="SERV_API_KEY"):
        build(api_key=key)


@pytest.mark.parametrize("name", [
    "Authorization", "authorization", "AUTHORIZATION"])
@pytest.mark.parametrize("key", [None, "", "serv_\u2026", "sk-other"])
def test_with_an_authorization_of_ones_own_no_key_is_needed(
        key, name, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    headers = built_headers(api_key=key, headers={name: "Basic x"})
    assert headers["authorization"] == "Basic x"


# -- Headers ------------------------------------------------------------------

OUR_HEADERS = {
    "accept": "application/json", "accept-encoding": "identity",
    "authorization": "Bearer " + KEY, "content-type": "application/json",
    "user-agent": serv.USER_AGENT}


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("name", OUR_HEADERS)
def test_a_header_replaces_ours_in_any_case(name, change):
    headers = built_headers(base_url="http://h",
                            headers={change(name): "mine"})
    assert headers == {"host": "h", **OUR_HEADERS, name: "mine"}


@each_call
def test_headers_are_added(call, fake):
    call("Hi", system=SYSTEM, headers={
        "X-OpenServ-Prompt-Cache": "False", "x-empty": "", "x-a": "\u00e9",
        "USER-AGENT": "mine"})
    [request] = fake.requests
    assert {name: value for name, value in request.headers.items()
            if name.startswith("x-") or name in OUR_HEADERS} == {
                **OUR_HEADERS, "accept": "text/event-stream" if call in (
                    chat_streamed, message_streamed) else "application/json",
                "x-openserv-prompt-cache": "False", "x-empty": "",
                "x-a": "\u00e9", "user-agent": "mine"}


BAD_NAMES = [
    "Content-Length", "content-length", "TRANSFER-ENCODING", "Host", "host",
    "X-A\r\nX-B", "X-A\n", "X-B: 1\r\nX-A", "X:A", "", " ", "X A", "X-\u00e9"]
BAD_VALUES = [
    "a\r\nX-B: b", "a\n", "\ra", "a\r\n b", "a\n b", "a\x00", "a\x0b",
    "a\x7f", "a\x85", "\u2026", "a\u010ab"]  # whose lower byte is a line feed


@pytest.mark.parametrize("name, value", [
    *((name, "1") for name in BAD_NAMES),
    *(("X-A", value) for value in BAD_VALUES),
    ("Authorization", "Bearer a\r\nX-B: 1")], ids=ascii)
def test_headers_that_are_refused(name, value):
    with pytest.raises(ValueError, match="headers") as caught:
        build(headers={name: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("headers, shown", [
    ({"X-Secret": KEY + "\n"}, "the value of X-Secret "),
    ({KEY: "\n"}, "the value of a header "),
    ({"Authorization: Bearer " + KEY: ""}, "a name ")],  # mixed up
    ids=["a bad value", "the key as a name", "a whole line as a name"])
def test_a_refused_header_is_named_unless_it_may_be_the_key(headers, shown):
    with pytest.raises(ValueError, match="headers: " + shown) as caught:
        build(headers=headers)
    assert KEY not in str(caught.value)


def test_a_refused_name_is_not_shown_where_no_key_is_known(monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    with pytest.raises(ValueError, match="headers: a name ") as caught:
        build(headers={"Authorization: Bearer " + KEY: ""})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("headers", [
    {"X-A": 1}, {"X-A": None}, {"X-A": b"a"}, {1: "a"}, {b"X-A": "a"},
    [("a", "b")], "a: b", 5], ids=repr)
def test_headers_are_a_mapping_of_str_to_str(headers):
    with pytest.raises(TypeError, match="headers"):
        build(headers=headers)


# ---------------------------------------------------------------------------
# Reading answers
#
# Pure: an answer's JSON, text and headers in; values and errors out.
# ---------------------------------------------------------------------------

# -- JSON ---------------------------------------------------------------------

@table("text, value", {
    "an object": ('{"a": [1, null, true, 2.5]}', {"a": [1, None, True, 2.5]}),
    "a list": ("[]", []), "a number": ("5", 5), "null": ("null", None),
    "a text": ('"a"', "a"),
    "blank lines around it (OpenRouter, while it waits)": (
        "\n\n  {}\r\n", {}),
    "raw control characters": ('{"a": "\t\n"}', {"a": "\t\n"}),
    "half a character": ('"\\ud83d"', "\ud83d")})
def test_what_is_json_is_decoded(text, value):
    assert serv.parse_json(text) == value


@pytest.mark.parametrize("text", [
    "", " ", "{", '{"a": 1} {}', "[1,]", "<html>", "None", "{'a': 1}",
    '{"a"}', "tru", "data: {}", "\ufeff"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        serv.parse_json(text)


DEEP_FORMS = {"lists": ("[", "1", "]"), "objects": ('{"a":', "1", "}"),
              "both": ('[{"a":', "1", "}]"),
              "open lists": ("[", "", ""), "open objects": ('{"a":', "", "")}


@table("left, middle, right", DEEP_FORMS)
def test_json_that_is_too_deep_is_not_decoded(left, middle, right):
    step = left.count("[") + left.count("{")

    def nest(depth):
        return left * (depth // step) + middle + right * (depth // step)

    if right:
        deepest = nest(serv.MAX_DEPTH)
        assert json.dumps(serv.parse_json(deepest),
                          separators=(",", ":")) == deepest
    for depth in (serv.MAX_DEPTH + step, 100000):
        with pytest.raises(ValueError):
            serv.parse_json(nest(depth))


def test_an_escape_may_come_in_two_pieces():
    nesting = serv.Nesting()
    for piece, closed in (('{"a\\', False), ('"}', False), ('b\\\\"', False),
                          (': []', False), ("}", True)):
        nesting.add(piece)
        assert nesting.is_closed() is closed


def test_the_deepest_json_can_be_copied_pickled_and_dumped():
    text = "[" * serv.MAX_DEPTH + "]" * serv.MAX_DEPTH
    value = serv.parse_json(text)
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
    assert json.dumps(value) == repr(value) == text


def test_brackets_in_a_text_are_not_deep():
    text = "[{" * 1000
    for value in ([text + '"' + text], {text: text}, ["\\", text], [[]] * 999):
        assert serv.parse_json(json.dumps(value)) == value
    with pytest.raises(ValueError):
        serv.parse_json('["\\\\", %s%s, "\\\\"]' % ("[" * 999, "]" * 999))


# -- What is an answer --------------------------------------------------------

@pytest.mark.parametrize("call, body, text, stop_reason", [
    (serv.chat, b"\n   \n\n" + json.dumps(REPLY).encode(),
     'You said: "Hi"', "stop"),
    (message, b'{"type": "message", "content": null, '
     b'"stop_reason": "refusal"}', "", "refusal"),
    (serv.chat, b'{"choices": [{"finish_reason": "SAFETY"}]}', "", "SAFETY")],
    ids=["blank lines first", "content: null", "no message"])
def test_an_answer_may_be_as_bare_as_this(call, body, text, stop_reason):
    with Server(http_answer(body)) as server:
        reply = call("Hi", system=SYSTEM, base_url=server.url)
    assert reply == json.loads(body.decode())
    assert (reply.text, reply.stop_reason) == (text, stop_reason)


NO_ANSWERS = {
    # the body of a 200, what the error shows of it
    "a page": (b"<html>Log in</html>", "<html>Log in</html>"),
    "no text": (b"\xff\xfe", "\ufffd\ufffd"),
    "null": (b"null", "null"), "a list": (b"[1, 2]", "[1, 2]"),
    "a number": (b"5", "5"), "an empty object": (b"{}", "{}"),
    "choices that are no list": (b'{"choices": 1}', '{"choices": 1}'),
    "half an object": (b'{"choices": [{"mess', '{"choices": [{"mess'),
    "another object": (b'{"object": "list", "data": []}', '"list"'),
    "an answer in an envelope": (
        b'{"data": {"choices": []}, "success": true}', '"success": true'),
    "an event stream": (b'data: {"choices": []}\n\n', "data: {"),
}


@table("body, shown", NO_ANSWERS)
@plain_calls
def test_what_is_no_answer_is_an_error_that_shows_it(call, body, shown):
    error = error_of(http_answer(body, x_request_id="r1"), call)
    assert type(error) is serv.APIResponseError
    assert (error.request_id, error.reply) == ("r1", None)
    assert shown in str(error) and str(error).isprintable()


# -- Which answers are errors -------------------------------------------------

ERRORS = {
    # an answer or event that is an error; what it says, the status
    "OpenAI": (
        {"error": {"message": "No.", "type": "rate_limit_error",
                   "code": "slow_down", "param": "model"}},
        ("rate_limit_error", "slow_down", "model", "No."), 429),
    "Anthropic": (
        {"type": "error", "error": {"type": "overloaded_error",
                                    "message": "No."}},
        ("overloaded_error", None, None, "No."), 529),
    "text": ({"error": "No."}, (None, None, None, "No."), None),
    "text beside a code": (
        {"error": "No.", "code": 404}, (None, 404, None, "No."), 404),
    "a number in code (OpenRouter)": (
        {"error": {"message": "No.", "code": 402}},
        (None, 402, None, "No."), 402),
    "in a list (Gemini)": (
        [{"error": {"code": 429, "message": "No.",
                    "status": "RESOURCE_EXHAUSTED"}}],
        (None, 429, None, "No."), 429),
    "errors (Cloudflare)": (
        {"success": False, "errors": [{"code": 5007, "message": "No."}],
         "messages": [], "result": None}, (None, 5007, None, "No."), None),
    "an empty error, where there is no answer": (
        {"error": {"message": "", "type": None}}, (None, None, None, ""),
        None),
    "an object of another name, with a code": (
        {"object": "chat.completion.chunk", "code": 500, "message": "No."},
        (None, 500, None, "No."), 500),
    "errors beside success": (
        {"code": 0, "errors": ["No."]}, (None, 0, None, "No."), None),
    "flat (vLLM)": (
        {"object": "error", "message": "No.", "type": "BadRequestError",
         "param": None, "code": 404},
        ("BadRequestError", 404, None, "No."), 404),
    "a code that stands for a status (OpenAI)": (
        {"error": {"type": "tokens", "code": "rate_limit_exceeded",
                   "message": "No."}},
        ("tokens", "rate_limit_exceeded", None, "No."), 429),
    "a type and a message": (
        {"type": "insufficient_quota", "message": "No."},
        ("insufficient_quota", None, None, "No."), 429),
    "a code and a message (DashScope)": (
        {"code": "DataInspectionFailed", "message": "No.",
         "request_id": "r"}, (None, "DataInspectionFailed", None, "No."),
        None),
    "a message alone": ({"message": "No."}, (None, None, None, "No."), None),
    "detail (FastAPI)": ({"detail": "No."}, (None, None, None, "No."), None),
    "a list of details (FastAPI)": (
        {"detail": [{"loc": ["body"], "msg": "No."}]},
        (None, None, None, '[{"loc": ["body"], "msg": "No."}]'), None),
    "in a choice (OpenRouter)": (
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "error",
                      "error": {"message": "No.", "code": 502}}]},
        (None, 502, None, "No."), 502),
    "beside choices": (
        {"error": {"message": "No.", "type": "api_error"}, "choices": "x"},
        ("api_error", None, None, "No."), 500),
}


@table("answer, says, status", ERRORS)
def test_what_an_error_says_and_stands_for(answer, says, status):
    fields = serv.parse_error(answer)
    assert fields == dict(zip(("type", "code", "param", "message"), says))
    assert serv.find_status(fields) == status
    assert serv.find_error(answer) is not None


@table("answer, says, status", ERRORS)
def test_an_error_in_a_200_is_raised(answer, says, status):
    error = error_of(http_answer(answer, request_id="r1"))
    assert isinstance(error, serv.APIStatusError)
    assert (error.status, error.body, error.request_id, error.reply) == (
        status or 500, answer, "r1", None)
    assert (error.type, error.code, error.param, error.message) == says


@each_call
def test_an_error_in_a_200_is_raised_by_every_call(call):
    error = error_of(http_answer(ERRORS["Anthropic"][0]), call)
    assert (type(error), error.status, error.message) == (
        serv.InternalServerError, 529, "No.")


@pytest.mark.parametrize("reason", [
    "error", "network_error",  # GLM
    "insufficient_system_resource",  # DeepSeek
    "ERROR_LIMIT",  # Cohere
    "ERROR: no"])
def test_a_finish_reason_that_says_the_server_failed_is_an_error(reason):
    answer = {"choices": [{"message": {"content": "Part"},
                           "finish_reason": reason}]}
    assert serv.find_error(answer) is not None
    error = error_of(http_answer(answer))
    assert (error.body, error.reply) == (answer, None)
    late = error_of(stream_answer(
        bare_chunk("Part"), bare_chunk("", reason), "[DONE]"), chat_streamed)
    assert (late.reply.text, late.reply.partial) == ("Part", True)
    for each in (error, late):
        assert (type(each), each.status) == (serv.InternalServerError, 500)
        assert reason in str(each)


@pytest.mark.parametrize("status", [
    None, {}, {"status_code": 0}, {"status_code": "0"}], ids=repr)
def test_a_good_status_of_minimax_hides_no_error(status):
    body = {"base_resp": status, "message": "No."}
    assert serv.find_error(body) is not None


def test_a_broken_event_is_shown():
    with pytest.raises(serv.APIResponseError, match="upstream timed out"):
        serv.parse_events("message", "upstream timed out")


def test_blank_lines_before_a_body_do_not_count():
    assert serv.read_beginning(iter([b"\r\n" * 999, b" \n{", b"}"])) == b"{}"


@pytest.mark.parametrize("event", [
    {}, {"message": None}, {"text": "x"}, {"choices": []}, {"type": "error"}],
    ids=repr)
def test_an_event_named_error_is_one_whatever_it_holds(event):
    assert serv.find_error(event, "error") is not None


NO_ERRORS = {
    "a chat answer": ({"choices": [{"message": {"content": "A"}}]}, ""),
    "a Messages answer": (
        {"type": "message", "content": [], "stop_reason": None}, ""),
    "error: null beside an answer": (
        {"error": None, "choices": [{"message": {"content": "A"}}]}, ""),
    "an empty error beside an answer": (
        {"error": {"code": 0, "message": "", "type": None},
         "choices": [{"message": {"content": "A"}}]}, ""),
    "a message beside choices": ({"message": "No.", "choices": []}, ""),
    "a choice that a filter ended": (
        {"choices": [{"delta": {}, "finish_reason": "content_filter"}]}, ""),
    "a ping": ({"type": "ping"}, "ping"),
    "a start": ({"type": "message_start", "message": {"content": []}},
                "message_start"),
    "a status that is good (MiniMax)": (
        {"base_resp": {"status_code": 0, "status_msg": "success"}}, ""),
    "a vendor's notice": ({"type": "quota", "message": "50 left"}, "quota"),
    "an object of a vendor's own": (
        {"object": "chat.completion.status", "message": "queued"}, ""),
    "code: 0": ({"code": 0, "message": "ok"}, ""),
    "success": ({"success": True, "message": "ok"}, ""),
    "a choice whose reason is no failure (Cohere)": (
        {"choices": [{"delta": {}, "finish_reason": "ERROR_TOXIC"}]}, ""),
    "no detail": ({"detail": ""}, ""),
    "empty details": ({"detail": [], "usage": {}}, ""),
    "no errors": ({"errors": [], "usage": {}}, ""),
    "nothing": ({}, ""),
}


@table("event, name", NO_ERRORS)
def test_what_is_no_error(event, name):
    assert serv.find_error(event, name) is None


ERROR_BODIES = {
    # what the body of an error status says, where it is odd
    "an object for a message": (
        {"error": {"message": {"why": "No."}}},
        (None, None, None, '{"why": "No."}')),
    "a list for an error": ({"error": ["No."]}, "No."),
    "true for an error (Nitro)": ({"error": True, "message": "No."}, "No."),
    "a type of errors beside success": (
        {"code": 0, "type": "overloaded_error", "message": "No."},
        ("overloaded_error", 0, None, "No.")),
    "two texts (Fastify)": ({"error": "Bad Request", "message": "No."},
                            (None, None, None, "Bad Request: No.")),
    "a description (RFC 6749)": (
        {"error": "invalid_token", "error_description": "No."},
        (None, None, None, "invalid_token: No.")),
    "msg (Zhipu)": ({"code": 401, "msg": "No.", "success": False},
                    (None, 401, None, "No.")),
    "status_msg (MiniMax)": (
        {"base_resp": {"status_code": 1002, "status_msg": "No."}}, "No."),
    "an object as detail (FastAPI)": (
        {"detail": {"message": "No.", "code": "insufficient_quota"}},
        (None, "insufficient_quota", None, "No.")),
    "an error in a detail (FastAPI)": (
        {"detail": {"error": {"message": "No.", "type": "t"}}},
        ("t", None, None, "No.")),
    "two texts in a detail (FastAPI)": (
        {"detail": {"error": "not_found", "message": "No.", "code": "c"}},
        (None, "c", None, "not_found: No.")),
    "a detail beside a message": (
        {"error": {"message": "No.", "type": "t", "param": "p",
                   "detail": {"max": 2}}}, ("t", None, "p", "No.")),
    "a detail beside a code": (
        {"code": "c", "message": "No.", "detail": {"field": "f"}},
        (None, "c", None, "No.")),
    "a detail without a message": (
        {"detail": {"type": "quota", "reason": "No."}},
        (None, None, None, '{"type": "quota", "reason": "No."}')),
    "by field (ASP.NET)": ({"errors": {"model": ["No."]}},
                           (None, None, None, '{"errors": {"model": ["No."]}}')
                           ),
    "words nobody knows": ({"title": "No."}, '{"title": "No."}'),
    "a list": (["No."], "No."),
    "text": ("No.", (None, None, None, "No.")),
    "an empty object": ({}, (None, None, None, "")),
    "an empty list": ([], (None, None, None, "")),
    "null": (None, (None, None, None, "")),
    "error: null": ({"error": None}, (None, None, None, "")),
    "an empty error": ({"error": {}}, (None, None, None, "")),
    "no message": ({"error": {"type": "t", "message": None}},
                   ("t", None, None, "")),
    "a type that is no text": (
        {"error": {"message": "No.", "type": 5}}, (None, None, None, "No.")),
}


@table("body, says", ERROR_BODIES)
def test_what_an_odd_error_says(body, says):
    fields = serv.parse_error(body)
    if isinstance(says, str):
        assert says in fields["message"]
    else:
        assert fields == dict(zip(("type", "code", "param", "message"), says))
    error = error_of(http_answer(body, "403 Forbidden"))
    assert (type(error), error.body) == (serv.PermissionDeniedError, body)
    assert (fields["message"] or "403") in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize("body", [
    b'data: {"error": {"message": "No.", "code": "c"}}\n\n',
    b'event: error\ndata: {"type": "error", "error": {"message": "No.", '
    b'"code": "c"}}\n\ndata: [DONE]\n\n'], ids=["chat", "Messages"])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_the_body_of_an_error_may_be_an_event_stream(body, kind):
    error = error_of(http_answer(body, "429 Slow", kind), chat_streamed)
    assert (type(error), error.message, error.code) == (
        serv.RateLimitError, "No.", "c")


STATUSES = [
    ("invalid_request_error", 400), ("authentication_error", 401),
    ("billing_error", 402), ("permission_error", 403),
    ("not_found_error", 404), ("request_too_large", 413),
    ("rate_limit_error", 429), ("insufficient_quota", 429),
    ("api_error", 500), ("server_error", 500), ("timeout_error", 504),
    ("overloaded_error", 529), ("an_error_nobody_knows", None)]
STATUS_CODES = [
    (400, 400), (599, 599), (399, None), (600, None), (40301, None),
    ("429", 429), ("rate_limit_error", 429), ("odd", None), (True, None)]


@pytest.mark.parametrize("type, code, status", [
    *((type, None, status) for type, status in STATUSES),
    *((None, code, status) for code, status in STATUS_CODES),
    (None, None, None), ("rate_limit_error", 500, 429), ("new", 503, 503)])
def test_the_status_of_an_error_in_a_200_is_by_its_type_else_by_its_code(
        type, code, status):
    assert serv.find_status({"type": type, "code": code, "param": None,
                             "message": ""}) == status


@table("status, fields, wait, says", {
    "400": (400, {}, None, "No"),
    "401": (401, {}, None, "No. Check the key."),
    "402, no message": (402, {"message": ""}, None,
                        "no message. Add credits."),
    "404, a whole sentence": (404, {"message": "No!"}, None,
                              "No! Check the model and the URL."),
    "413": (413, {}, None, "No. Send less."),
    "429": (429, {}, None, "No"),
    "429, a wait": (429, {}, 7.0, "No. Wait 7 s."),
    "429, no quota": (429, {"code": "insufficient_quota"}, 7.0,
                      "No. Waiting does not help; get quota."),
    "503": (503, {}, None, "No. Try again later."),
    "503, a wait": (503, {}, 0.5, "No. Wait 0.5 s.")})
def test_what_an_error_advises(status, fields, wait, says):
    fields = {"type": None, "code": None, "message": "No", **fields}
    assert serv.add_advice(status, fields, wait) == says


@table("body, says", {
    "a type": ({"type": "rate_limit_error"}, "429 rate_limit_error: slow"),
    "a code": ({"code": 429}, "429 Too Many Requests: slow"),
    "neither": ({}, "500 error in a 200 answer: slow. Try again later.")})
def test_what_an_error_in_a_200_is_called(body, says):
    error = error_of(http_answer({"error": {"message": "slow", **body}}))
    assert str(error).startswith(says + " (POST ")


# -- Whether to try again, and when -------------------------------------------

def made(status, should_retry=None, **fields):
    """Return an error of a status, as a server's answer makes it."""
    error = serv.APIStatusError("no")
    error.status = status
    if should_retry is not None:
        error.headers["X-Should-Retry"] = should_retry
    for name, value in fields.items():
        setattr(error, name, value)
    return error


RETRIED = {
    # an error; is its status the server's own word, or our guess for an
    # error in a 200?  Is it tried again?
    "408: the server waited too long": (made(408), True, True),
    "409: a conflict": (made(409), True, True),
    "429: too many requests": (made(429), True, True),
    **{"%d: any 5xx" % status: (made(status), True, True)
       for status in (500, 501, 502, 503, 504, 505, 529, 599)},
    **{"%d: a redirect" % status: (made(status), True, False)
       for status in (301, 302, 303, 307, 308)},
    **{"%d: any other 4xx" % status: (made(status), True, False)
       for status in (400, 401, 402, 403, 404, 405, 407, 410, 413, 422, 425,
                      451)},
    "600: no 5xx": (made(600), True, False),
    "429 for want of money, by type": (
        made(429, type="insufficient_quota"), True, False),
    "429 for want of money, by code": (
        made(429, code="insufficient_quota"), True, False),
    "400, told to retry": (made(400, "true"), True, True),
    "401, told to retry": (made(401, "True"), True, True),
    "503, told not to": (made(503, "false"), True, False),
    "429, told not to": (made(429, "False"), True, False),
    "400, told nothing that is known": (made(400, "maybe"), True, False),
    "503, told nothing that is known": (made(503, ""), True, True),
    "500, a guess": (made(500), False, False),
    "429, a guess": (made(429), False, False),
    "500, a guess, told to retry": (made(500, "true"), False, True),
}


@table("error, known, again", RETRIED)
def test_which_statuses_are_retried(error, known, again):
    assert serv.is_worth_a_retry(error, not known) is again


@pytest.mark.parametrize("error, again", [
    (serv.APIConnectionError("no"), True), (serv.ServError("no"), False),
    (serv.APIResponseError("no"), False)], ids=repr)
def test_which_other_errors_are_retried(error, again):
    assert (serv.retry_wait(error, 0) is not None) == again


@pytest.mark.parametrize("failed, most", [
    (0, 0.5), (1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (100, 8), (5000, 8)])
def test_the_wait_is_3_to_4_quarters_of_one_that_doubles_from_half_to_8_s(
        failed, most):
    waits = [serv.retry_wait(serv.APIConnectionError("no"), failed)
             for _ in range(100)]
    assert most * 3 / 4 <= min(waits) <= max(waits) <= most
    assert max(waits) - min(waits) > most / 8  # so clients get out of step


RETRIED_200 = {
    # an error in a 200; how often the call asks
    "a type that is retried": ({"type": "overloaded_error"}, 2),
    "a code that is retried": ({"code": 503}, 2),
    "a type that is not": ({"type": "invalid_request_error"}, 1),
    "a type that is not, though the code is": (
        {"type": "invalid_request_error", "code": 503}, 1),
    "a code that is not": ({"code": 404}, 1),
    "neither": ({}, 1),
    "neither that is known": ({"type": "new", "code": "odd"}, 1),
}


@table("fields, asks", RETRIED_200)
def test_an_error_in_a_200_is_retried_where_it_stands_for_a_status(
        fields, asks):
    answer = http_answer({"error": {"message": "No.", **fields}},
                         retry_after_ms="0")
    with Server(answer) as server:
        with pytest.raises(serv.APIStatusError):
            serv.chat("Hi", system=SYSTEM, base_url=server.url, max_retries=1)
        assert len(server.requests) == asks


DATE = 784111777  # Sun, 06 Nov 1994 08:49:37 GMT
RETRY_AFTER = {
    # Retry-After, retry-after-ms, the seconds to wait
    "seconds": ("7", None, 7), "a part of a second": ("7.5", None, 7.5),
    "no wait": ("0", None, 0), "blanks": (" 7 ", None, 7),
    "a day": ("86400", None, 86400),
    "as good as for ever": ("9" * 16, None, 1e9),
    "for ever": ("9" * 999, None, 1e9),
    "less than nothing": ("-1", None, None), "empty": ("", None, None),
    "a word": ("soon", None, None), "nan": ("nan", None, None),
    "inf": ("inf", None, None), "an underscore": ("1_000", None, None),
    "an exponent": ("1e3", None, None),
    "a digit beyond ASCII": ("\u00b2", None, None),
    "milliseconds": (None, "1500", 1.5),
    "milliseconds go first": ("7", "0", 0),
    "milliseconds that are a word": ("7", "soon", 7),
    "milliseconds below 0": ("7", "-1", 7),
    "neither": (None, None, None),
    "a date": ("Sun, 06 Nov 1994 08:49:37 GMT", None, 60),
    "a date in another zone": ("Sun, 06 Nov 1994 10:49:37 +0200", None, 60),
    "a date of the old form": ("Sunday, 06-Nov-94 08:49:37 GMT", None, 60),
    "a date in the past": ("Sun, 06 Nov 1994 08:47:37 GMT", None, None),
    "a date in no month": ("Sun, 06 Foo 1994 08:49:37 GMT", None, None),
    "a date too far away": ("Sun, 06 Nov 99999 08:49:37 GMT", None, None)}


@table("seconds, milliseconds, wait", RETRY_AFTER)
def test_what_wait_the_headers_ask_for(seconds, milliseconds, wait):
    headers = email.message.Message()
    for name, value in (("Retry-After", seconds),
                        ("Retry-After-Ms", milliseconds)):
        if value is not None:
            headers[name] = value
    assert serv.parse_retry_after(headers, DATE - 60) == wait


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs time.tzset()")
@pytest.mark.parametrize("date", [
    "Sun Nov  6 08:49:37 1994", "Sun, 06 Nov 1994 08:49:37 -0000"])
def test_a_date_without_a_zone_is_gmt_wherever_the_machine_is(
        date, monkeypatch):
    headers = email.message.Message()
    headers["Retry-After"] = date
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert serv.parse_retry_after(headers, DATE - 60) == 60
    finally:
        monkeypatch.undo()
        time.tzset()


# ---------------------------------------------------------------------------
# Server-sent events
#
# Bytes in, (event, data) pairs out, by the WHATWG rules; then what a pair
# holds: a JSON object, or [DONE], or noise.
# ---------------------------------------------------------------------------

SSE_CASES = {  # bytes; their events: (name, data), or data alone
    # Which lines there are: LF, CRLF and CR end one, and nothing else does.
    "LF": (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    "CR": (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    "CRLF and LF": (b"data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
    "all three": (b"data: a\ndata: b\rdata: c\r\ndata\n\n", ["a\nb\nc\n"]),
    "control characters end no line": (
        b"data: a\x0bb\x0cc\x1cd\x1de\x1ef\x00g\n\n",
        ["a\vb\fc\x1cd\x1de\x1ef\0g"]),
    "nor do the line ends of Unicode": (
        "data: a\u0085b\u2028c\u2029\n\n".encode(),
        ["a\u0085b\u2028c\u2029"]),
    # What a line says: a field and its value, less one space.
    "no space": (b"data:a\n\n", ["a"]),
    "one space is dropped": (b"data:  a \n\n", [" a "]),
    "a tab is kept": (b"data:\ta: b\n\n", ["\ta: b"]),
    "a field without a colon": (b"data\n\n", [""]),
    "a field without a value": (b"data:\n\n", [""]),
    "lines of data join with LF": (b"data\ndata: {\ndata:\n\n", ["\n{\n"]),
    "a comment is no event": (b": data: a\n:\n\n", []),
    "comments in an event": (b": one\ndata: a\n: two\n\n", ["a"]),
    "id, retry, unknown fields": (
        b"id: 1\nretry: 3000\nretry: soon\nretry: " + b"9" * 5000
        + b"\ndata: a\nnew: b\n\n\n\n", ["a"]),
    "fields that look alike": (
        b"DATA: a\n data: b\ndata : c\ndat: d\ndatas: e\n\n", []),
    # What an event is called, and for how long.
    "a name is of one event": (b"event: ping\ndata: a\n\ndata: b\n\n",
                               [("ping", "a"), "b"]),
    "a name behind the data": (b"data: a\nevent: ping\n\n", [("ping", "a")]),
    "the last name": (b"event: one\nevent: two\ndata: a\n\n", [("two", "a")]),
    "an empty name": (b"event: ping\nevent\ndata: a\n\n", ["a"]),
    "a name without data": (b"event: ping\nid: 1\n\ndata: a\n\n", ["a"]),
    # One byte order mark is dropped, at the very start.
    "a mark": (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    "a mark alone on its line": (b"\xef\xbb\xbf\ndata: a\n\n", ["a"]),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "a mark later": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", ["a"]),
    "a mark in a value": (b"data: \xef\xbb\xbfa\n\n", ["\ufeffa"]),
    "half a mark": (b"\xef\xbbdata: a\n\ndata: b\n\n", ["b"]),
    # Text is UTF-8, and what is not becomes U+FFFD.
    "UTF-8": ("event: \u00e9\ndata: \u20ac \U0001f600\n\n".encode(),
              [("\u00e9", "\u20ac \U0001f600")]),
    "no UTF-8": (b"data: \xff\xfea\xe2\x82\xe2\x82\xac\xe2\x82\n\n",
                 ["\ufffd\ufffda\ufffd\u20ac\ufffd"]),
    "UTF-16": (b"\xff\xfe" + "data: a\n\n".encode("utf-16-le"), []),
    # What is pending at the end is discarded.
    "nothing": (b"", []),
    "empty lines": (b"\n\r\n\r", []),
    "half a line at the end": (b"data: a\n\ndata: lost", ["a"]),
    "no empty line at the end": (b"data: a\n\ndata: lost\n", ["a"]),
    "the same with CRLF": (b"data: a\r\n\r\ndata: lost\r\n", ["a"]),
}


@table("data, events", SSE_CASES)
def test_sse_events_however_they_are_cut(data, events):
    pairs = [("message", event) if isinstance(event, str) else event
             for event in events]
    drops = [data[i:i + 1] for i in range(len(data))]
    halves = [[data[:cut], data[cut:]] for cut in range(min(len(data), 99))]
    for chunks in ([data], drops, [b"", *drops, b""], *halves):
        assert list(serv.iter_events(chunks)) == pairs
    for junk in (b":\xff\xfe\ndata: lost", b"lost\n", b"\0"):
        assert list(serv.iter_events([data + junk])) == pairs
        assert list(serv.iter_events([data, junk])) == pairs


def test_sse_an_event_is_there_with_its_last_byte():
    def chunks():
        for data in (b"data: a\n", b"\n", b"data: b\r", b"\r"):
            yield data
            taken.append(data)
    taken = []
    events = serv.iter_events(chunks())
    assert (next(events), len(taken)) == (("message", "a"), 1)
    assert (next(events), len(taken)) == (("message", "b"), 3)


@pytest.mark.parametrize("size", [64, 65536])
def test_sse_a_line_of_5_megabytes_in_pieces(size):
    data = b"data: " + b"x" * 5000000 + b"\n\n"
    pieces = (data[i:i + size] for i in range(0, len(data), size))
    assert list(serv.iter_events(pieces)) == [("message", "x" * 5000000)]


@pytest.mark.parametrize("line", [b"", b"data: ", b"event: ", b": "])
def test_sse_an_event_that_does_not_end_is_given_up(line):
    piece = line + b"x" * (1 << 20) + (b"\n" if line else b"")
    taken = []
    with pytest.raises(ValueError):
        for _ in serv.iter_events(map(lambda p: taken.append(1) or p,
                                      itertools.repeat(piece, 80))):
            pass
    assert len(taken) * len(piece) <= serv.MAX_BODY + 2 * len(piece)


SSE_PARSED = {  # the name and the data of an event; what it holds
    "an object": ("message", ' {"a": 1} ', [{"a": 1}]),
    "an object over several lines": ("message", '{\n"a":\n1}', [{"a": 1}]),
    "control characters": ("message", '{"a": "\x01\t"}', [{"a": "\x01\t"}]),
    "half a character": ("message", r'{"a": "\ud83d"}', [{"a": "\ud83d"}]),
    "the end": ("message", " [DONE] ", [serv.DONE]),
    # The blank line between two events got lost (Claude Sonnet with adaptive
    # thinking, behind a gateway).
    "two objects": ("message", '{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]),
    "an object and the end": ("message", '{"a": 1}\n\n[DONE]',
                              [{"a": 1}, serv.DONE]),
    # JSON that is no object is noise, and so is nothing.
    "nothing": ("message", " ", []),
    "a number": ("message", "1", []),
    "a text": ("message", '"a"', []),
    "null": ("message", "null", []),
    "a list": ("message", "[1]", []),
    "a ping without data": ("ping", "", []),
    "a vendor's own words": ("debug", "hello world", []),
    # The event's name stands in for a type that is missing.
    "a type by name": ("content_block_stop", '{"index": 0}',
                       [{"type": "content_block_stop", "index": 0}]),
    "a type goes before the name": ("message_stop", '{"type": "ping"}',
                                    [{"type": "ping"}]),
    "a chunk has no type": ("chunk", '{"choices": []}', [{"choices": []}]),
}


@table("name, data, events", SSE_PARSED)
def test_sse_what_an_event_holds(name, data, events):
    parsed = serv.parse_events(name, data)
    assert parsed == events
    assert [event is serv.DONE for event in parsed] == [
        event is serv.DONE for event in events]


# ---------------------------------------------------------------------------
# Putting streams together
#
# Events in; out comes what the call without streaming would have returned.
# ---------------------------------------------------------------------------

def chat_chunk(delta=None, finish=None, top=(), **choice):
    """Return a chunk of a chat stream.

    `choice` are more fields of its one choice, `top` more of the chunk.
    """
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1,
            "model": "m", "choices": [{"index": 0, "delta": delta or {},
                                       "finish_reason": finish, **choice}],
            **dict(top)}


def chat_whole(message, finish="stop", top=(), **choice):
    """Return a whole chat answer, in the same way."""
    return {"id": "c1", "object": "chat.completion", "created": 1,
            "model": "m", "choices": [{
                "index": 0, "finish_reason": finish, "message": {
                    "role": "assistant", "content": None, **message},
                **choice}], **dict(top)}


def stream_text(*texts):
    """Return the chunks of a chat stream that says these texts."""
    return [chat_chunk({"content": text}) for text in texts]


def stream_parts(*texts, kind="text"):
    """Return content parts of a type; their text has the type's name."""
    return [{"type": kind, kind: text} for text in texts]


def stream_detail(text, kind="text", **fields):
    """Return a list of one of OpenRouter's reasoning details."""
    fields = {"type": "reasoning." + kind, **fields}
    if "id" not in fields:
        fields.setdefault("index", 0)
    if text:
        fields[kind] = text
    return {"reasoning_details": [fields]}


def stream_build(assembler, events):
    """Put events together; return the answer, whose text is in the pieces."""
    text = "".join([assembler.add(event) for event in events])
    answer = assembler.build()
    assert text == serv.Reply(answer).text
    return answer


# -- Chat: what grows, and what replaces --------------------------------------

STREAM_DELTAS = {  # the deltas of a choice; its message, at the end
    "text": ([{"role": "assistant", "content": ""}, {"content": "Hel"},
              {"content": "lo"}], {"content": "Hello"}),
    "white space, and what repeats": (
        [{"content": text} for text in (" ", "\n", "\n", "a", " ")],
        {"content": " \n\na "}),
    "an empty text": ([{"role": "assistant", "content": ""}],
                      {"content": ""}),
    "no text": ([{"role": "assistant"}], {}),
    "a role in each piece (Perplexity)": (
        [{"role": "assistant", "content": text} for text in ("Hel", "lo")],
        {"content": "Hello"}),
    "a refusal": (
        [{"content": None, "refusal": ""}, {"refusal": "I "},
         {"refusal": "won't."}], {"refusal": "I won't."}),
    "no refusal": ([{"content": "Hi", "refusal": None}],
                   {"content": "Hi", "refusal": None}),
    "reasoning_content (DeepSeek)": (
        [{"content": None, "reasoning_content": "We"},
         {"reasoning_content": "ll."},
         {"content": "Yes.", "reasoning_content": None}],
        {"content": "Yes.", "reasoning_content": "Well."}),
    "reasoning (vLLM, OpenRouter)": (
        [{"reasoning": "We"}, {"reasoning": "ll."}], {"reasoning": "Well."}),
    "null, {} and [] erase nothing": (
        [{"content": "Hel", "reasoning": "a", "mood": "b"},
         *({"role": no, "content": no, "reasoning": no, "mood": no,
            "tool_calls": no} for no in (None, {}, [])), {"content": "lo"}],
        {"content": "Hello", "reasoning": "a", "mood": "b"}),
    "a text that grows elsewhere: the last": (
        [{"summary": "a", "data": "b"}] * 2, {"summary": "a", "data": "b"}),
    "lists and texts in an object nobody knows: the last": (
        [{"content": "a", "more": {"list": [1], "content": "b"}}] * 2,
        {"content": "aa", "more": {"list": [1], "content": "b"}}),
    "a list nobody knows, then a text": (
        [{"images": [{"url": "u"}]}, {"images": "none"}], {"images": "none"}),
    "a function_call whose name comes in pieces": (
        [{"function_call": {"name": "get_"}},
         {"function_call": {"name": "time", "arguments": "{"}},
         {"function_call": {"arguments": "}"}}],
        {"function_call": {"name": "get_time", "arguments": "{}"}}),
    "a text nobody knows: the last": (
        [{"mood": "bad"}, {"mood": "good"}], {"mood": "good"}),
    "an object nobody knows: field by field": (
        # open-webui/computer#224: the signature of Gemini beside its calls
        [{"extra": {"a": 1}}, {"extra": {"google": {"signature": "S"}}},
         {"extra": {"google": {"signature": "S"}}}],
        {"extra": {"a": 1, "google": {"signature": "S"}}}),
    # Lists: text parts go on, other parts begin.
    "parts of a text": (
        [{"content": stream_parts("Hel")}, {"content": stream_parts("lo")}],
        {"content": stream_parts("Hello")}),
    "parts of other types": (
        [{"content": stream_parts("a")}, {"content": [{"type": "image"}]},
         {"content": stream_parts("b")}],
        {"content": [*stream_parts("a"), {"type": "image"},
                     *stream_parts("b")]}),
    "a part without a type: to the last": (
        [{"blocks": [{"type": "thinking", "thinking": "a"}]},
         {"blocks": [{"signature": "S"}]}],
        {"blocks": [{"type": "thinking", "thinking": "a",
                     "signature": "S"}]}),
    "a list that came whole": ([{"content": stream_parts("a", "b")}],
                               {"content": stream_parts("a", "b")}),
    "a list in a part (Magistral)": (
        [{"content": ""},
         {"content": stream_parts(stream_parts("We"), kind="thinking")},
         {"content": stream_parts(stream_parts("ll."), kind="thinking")},
         {"content": "Y"}, {"content": "es."}],
        {"content": stream_parts(stream_parts("Well."), kind="thinking")
         + stream_parts("Yes.")}),
    "a text before parts is a part": (
        [{"content": "Hel"}, {"content": stream_parts("lo")},
         {"content": "!"}], {"content": stream_parts("Hello!")}),
    # agno#8794, langchain#36401, open-webui#26404: sent back in pieces, they
    # are refused in the next turn.
    "reasoning details: by type and index": (
        [{"reasoning": "We", **stream_detail("We", format="f")},
         {"reasoning": "ll.", **stream_detail("ll.", format="f")},
         stream_detail("", signature="S"), stream_detail("So.", index=1),
         stream_detail("", kind="encrypted", data="E")],
        {"reasoning": "Well.", "reasoning_details": [
            {"type": "reasoning.text", "index": 0, "text": "Well.",
             "format": "f", "signature": "S"},
            {"type": "reasoning.text", "index": 1, "text": "So."},
            {"type": "reasoning.encrypted", "index": 0, "data": "E"}]}),
    "reasoning details: a summary": (
        [stream_detail(text, kind="summary") for text in ("We", "ll.")],
        stream_detail("Well.", kind="summary")),
    "reasoning details: an index is a key, never a size": (
        [stream_detail(text, index=index) for text in ("We", "ll.")
         for index in (-1, 10 ** 9)],
        {"reasoning_details": [
            {"type": "reasoning.text", "index": index, "text": "Well."}
            for index in (-1, 10 ** 9)]}),
    "reasoning details: an id in place of the index": (
        [stream_detail(text, id="r") for text in ("We", "ll.")],
        stream_detail("Well.", id="r")),
    "reasoning details: another id": (
        [stream_detail("a", id=id) for id in "rs"],
        {"reasoning_details": [
            {"type": "reasoning.text", "id": id, "text": "a"}
            for id in "rs"]}),
    "a signature that is repeated": (
        [stream_detail("a", signature="S"), stream_detail("", signature="S")],
        stream_detail("a", signature="S")),
    "thinking blocks: no index, the signature last": (  # litellm#29428
        [{"thinking_blocks": [
            {"type": "thinking", "thinking": text, "signature": signature}]}
         for text, signature in (("We", ""), ("ll.", ""), ("", "S"))],
        {"thinking_blocks": [{"type": "thinking", "thinking": "Well.",
                              "signature": "S"}]}),
    "annotations: nothing says that they go on": (  # OpenRouter
        [{"annotations": [{"type": "url_citation", "url_citation": url}]}
         for url in "uv"],
        {"annotations": [{"type": "url_citation", "url_citation": url}
                         for url in "uv"]}),
    "spoken audio": (
        [{"audio": {"id": "a", "transcript": "Hel", "data": "QU"}},
         {"audio": {"transcript": "lo", "data": "JD"}},
         {"audio": {"expires_at": 9}}],
        {"audio": {"id": "a", "transcript": "Hello", "data": "QUJD",
                   "expires_at": 9}}),
    "a function call, as it was before there were tools": (
        [{"function_call": {"name": "f", "arguments": ""}},
         {"function_call": {"arguments": '{"a"'}},
         {"function_call": {"arguments": ": 1}"}}],
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}}),
    "lists of texts go on": ([{"notes": ["a"]}, {"notes": ["b"]}],
                             {"notes": ["a", "b"]}),
}


@table("deltas, message", STREAM_DELTAS)
def test_stream_of_chat_what_grows_and_what_replaces(deltas, message):
    events = [chat_chunk(delta) for delta in deltas]
    assert stream_build(serv.ChatAssembler(), [
        *events, chat_chunk({}, "stop")]) == chat_whole(message)


# -- Chat: which call a piece belongs to --------------------------------------
#
# 1. A piece with an id that has come continues the call of that id.
# 2. A piece with a new id and no index begins a call.
# 3. Any other piece continues the newest call of its index; without an index,
#    the last call.  If there is none, it begins one.
# 4. But a name begins a call, too, where both have ids and the names differ;
#    or where the arguments so far are a whole object, and the piece brings an
#    id, another name or the beginning of another object.
# 5. A call keeps its first id.  A name that differs from the call's goes on
#    with it.
# 6. The calls are in the order in which they begin.  A call without a name is
#    none.
#
# A piece is written "index id name arguments", with "-" for what it lacks;
# " | " stands between chunks, and " & " between the pieces of one chunk.  So
# '0 x f | 0 - - {"a" | 0 - - : 1}' is three chunks, each with a piece of the
# call at index 0: the first has its id x and its name f, the others have the
# arguments, '{"a"' and ': 1}'.  The call is '- x f {"a": 1}'.

def stream_call(text, **fields):
    """Return a piece of a call, as it is written above."""
    words = text.split(" ", 3)  # arguments may have spaces
    index, id, name, arguments = words + [""] * (4 - len(words))
    piece = {"function": {}, **fields}
    if index != "-":
        piece["index"] = int(index)
    if id != "-":
        piece.update(id=id, type="function")
    if name not in ("", "-"):
        piece["function"]["name"] = name
    if arguments != "-":
        piece["function"]["arguments"] = arguments
    return piece


STREAM_CALLS = {  # the pieces, the calls
    "one whole": ('0 x f {"a": 1}', '- x f {"a": 1}'),
    "in pieces": ('0 x f | 0 - - {"a" | 0 - - : 1}', '- x f {"a": 1}'),
    "one after the other": ('0 x f | 0 - - {"a": 1} | 1 y g | 1 - - {}',
                            '- x f {"a": 1} & - y g {}'),
    "whole arguments, then another name alone": (
        "0 - f {} | 0 - g", "- - f {} & - - g"),
    "two without id or arguments, at two indexes": (
        "0 - f | 1 - f", "- - f & - - f"),
    "mixed": ("0 x f & 1 y g | 1 - - { & 0 - - { | 0 - - } | 1 - - }",
              "- x f {} & - y g {}"),
    "the second first": ("1 y g {} | 0 x f {}", "- y g {} & - x f {}"),
    "an index from 1, with gaps": (
        "1 x f { | 1 - - } | 7 y g { | 7 - - }", "- x f {} & - y g {}"),
    "an index is a key, never a size": (
        "-1 x f { | -1 - - } | 1000000000 y g { | 1000000000 - - }",
        "- x f {} & - y g {}"),
    "id and name in each piece": (
        "0 x f { | 0 x f } | 1 y g { | 1 y g }", "- x f {} & - y g {}"),
    "no index, whole (Mistral)": ("- x f {} & - y g {}",
                                  "- x f {} & - y g {}"),
    "no index, in pieces": ("- x f | - - - { | - - - } | - y g { | - - - }",
                            "- x f {} & - y g {}"),
    "no index, by id": ("- x f { & - y g { | - x - } | - y - }",
                        "- x f {} & - y g {}"),
    "no index, id and name in each piece": (
        "- x f { | - x f } | - y g { | - y g }", "- x f {} & - y g {}"),
    "no index, the id before the name": (
        "- x f {} | - y - | - y g {}", "- x f {} & - y g {}"),
    "no index, the same function twice, before any arguments": (
        "- x f | - y f {}", "- x f & - y f {}"),
    "all at index 0 (Gemini)": ("0 x f {} | 0 y g {} | 0 z g {}",
                                "- x f {} & - y g {} & - z g {}"),
    # dyedd/lens#49, omnigent-ai/omnigent#28
    "all at index 0, without ids (Gemini)": (
        '0 - f {"a": 1} | 0 - g { | 0 - - }', '- - f {"a": 1} & - - g {}'),
    "the same function twice at index 0, with ids": (
        "0 x f | 0 - - {} | 0 y f | 0 - - {}", "- x f {} & - y f {}"),
    "the same function twice at index 0, without ids": (
        '0 - f {"a": 1} | 0 - f {"a": 2}',
        '- - f {"a": 1} & - - f {"a": 2}'),
    "neither index nor id": ("- - f {} & - - g { | - - - }",
                             "- - f {} & - - g {}"),
    "another id in each piece (poolsideai/pool#9)": (
        "0 x f | 0 y f { | 0 z f }", "- x f {}"),
    "an id that comes late (use-agent-os/agent-os#3265)": (
        "0 - - | 0 x f {}", "- x f {}"),
    "a name in pieces": ("0 x get_ | 0 - time {}", "- x get_time {}"),
    "a name in pieces, and an id that comes late": (
        "0 - get_ | 0 x time {}", "- x get_time {}"),
    "a name said again behind whole arguments": (
        "0 x f {} | 0 - f ", "- x f {}"),
    "a new id with another name, before any arguments": (
        "0 x f | 0 y g {}", "- x f & - y g {}"),
    "more arguments behind whole ones: no telling whose": (
        "0 x f {} | 0 - - {}", "- x f {}{}"),
    "a name beside arguments that go on behind whole ones": (
        "0 - f {} | 0 - f , 1", "- - f {}, 1"),
    "arguments that are no JSON": ('0 x f {"a": ', '- x f {"a": '),
    "a call without a name is none (LiteLLM)": ("-1 - - {} | 0 x f {}",
                                                "- x f {}"),
    "one id for all, at two indexes (Mistral)": (
        "0 null f {} | 1 null f {}", "- null f {} & - null f {}"),
    "one id for all, and other names": (
        "- null f {} & - null g { | - null - }",
        "- null f {} & - null g {}"),
    "one id for all, the arguments by index": (
        '0 x f | 0 - - {"a":1} | 1 x g | 1 - - {}',
        '- x f {"a":1} & - x g {}'),
    "one id at another index, before whole arguments": (
        "0 x f { | 1 x f }", "- x f {}"),
    "one id and one name behind whole arguments: no telling": (
        "0 x f {} | 0 x f {}", "- x f {}{}"),
    "a name that grows": ("0 x get | 0 - get_time {}", "- x get_time {}"),
}


@table("pieces, calls", STREAM_CALLS)
def test_stream_of_chat_which_call_a_piece_belongs_to(pieces, calls):
    events = [chat_chunk({"tool_calls": [
        stream_call(text) for text in part.split(" & ")]})
        for part in pieces.split(" | ")]
    assert stream_build(serv.ChatAssembler(), [
        *events, chat_chunk({}, "tool_calls")]) == chat_whole(
            {"tool_calls": [{"type": "function", **stream_call(text)}
                            for text in calls.split(" & ")]}, "tool_calls")


STREAM_SIGNED = {"extra_content": {"google": {"thought_signature": "S"}}}


@table("pieces, call", {
    "null and empty labels in later pieces (LM Studio)": (
        [stream_call("0 x f {"),
         {"index": 0, "id": None, "type": None, "function": {
             "name": None, "arguments": '"a":'}},
         {"index": 0, "id": "", "type": "", "function": {
             "name": "", "arguments": " 1}"}}],
        stream_call('- x f {"a": 1}')),
    "arguments that are an object": (
        [{"index": 0, "id": "x", "type": "function", "function": {
            "name": "f", "arguments": {"a": 1}}}, stream_call("0 - - ")],
        {"id": "x", "type": "function", "function": {
            "name": "f", "arguments": {"a": 1}}}),
    "arguments that are an object, repeated": (
        [{"index": 0, "id": "x", "type": "function", "function": {
            "name": "f", "arguments": {"content": "a", "list": [
                {"index": 0, "text": "b"}, {"index": 0, "text": "c"}]}}}] * 2,
        {"id": "x", "type": "function", "function": {
            "name": "f", "arguments": {"content": "a", "list": [
                {"index": 0, "text": "b"}, {"index": 0, "text": "c"}]}}}),
    "null for a custom tool, beside a function": (
        [{**stream_call("0 x get_"), "custom": None},
         {**stream_call("0 - time {}"), "custom": None}],
        {**stream_call("- x get_time {}"), "custom": None}),
    "a function that begins as an empty list": (
        [{"index": 0, "id": "x", "type": "function", "function": []},
         stream_call("0 - f {}")], stream_call("- x f {}")),
    "a custom tool": (
        [{"index": 0, "id": "x", "type": "custom", "custom": {
            "name": "f", "input": "Hel"}},
         {"index": 0, "custom": {"input": "lo"}}],
        {"id": "x", "type": "custom", "custom": {
            "name": "f", "input": "Hello"}}),
    "a custom tool without a type": (
        [{"index": 0, "id": "x", "type": None, "custom": {
            "name": "f", "input": "Hello"}}],
        {"id": "x", "type": "custom", "custom": {
            "name": "f", "input": "Hello"}}),
    "a name that is a number, then text": (
        [{"index": 0, "id": "x", "function": {"name": 5}},
         stream_call("0 - f {}")], stream_call("- x f {}")),
    "a signature, repeated (Gemini)": (
        [stream_call("0 x f {", **STREAM_SIGNED),
         stream_call("0 - - }", **STREAM_SIGNED)],
        stream_call("- x f {}", **STREAM_SIGNED)),
    "a signature in an entry of its own (Gemini)": (
        [stream_call("- x f {}"), STREAM_SIGNED],
        stream_call("- x f {}", **STREAM_SIGNED))})
def test_stream_of_chat_fields_of_a_call(pieces, call):
    events = [chat_chunk({"tool_calls": [piece]}) for piece in pieces]
    assert stream_build(serv.ChatAssembler(), [
        *events, chat_chunk({}, "stop")]) == chat_whole(
            {"tool_calls": [call]})


def test_stream_of_chat_two_custom_tools_at_one_index():
    calls = [{"id": id, "type": "custom", "custom": {
        "name": name, "input": "Hello"}} for id, name in ("xf", "yg")]
    assert stream_build(serv.ChatAssembler(), [
        *(chat_chunk({"tool_calls": [{"index": 0, **call}]})
          for call in calls),
        chat_chunk({}, "stop")]) == chat_whole({"tool_calls": calls})


# -- Chat: what else a chunk holds --------------------------------------------

STREAM_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 1}}
STREAM_HI = {"index": 0, "finish_reason": "stop", "message": {
    "role": "assistant", "content": "Hi"}}
STREAM_CHUNKS = {  # chunks; their answer
    "usage in the last chunk": (
        [chat_chunk({"content": "Hi"}, "stop", {"usage": None}),
         chat_chunk(top={"choices": [], "usage": STREAM_USAGE})],
        chat_whole({"content": "Hi"}, top={"usage": STREAM_USAGE})),
    "usage in each chunk: the last": (
        [chat_chunk({"content": "Hi"}, top={"usage": {
            "prompt_tokens": 3, "completion_tokens": 1}}),
         chat_chunk({}, "stop", {"usage": STREAM_USAGE}),
         chat_chunk(top={"choices": [], "usage": None})],
        chat_whole({"content": "Hi"}, top={"usage": STREAM_USAGE})),
    "usage without choices": (
        [chat_chunk({"content": "Hi"}, "stop"), {"usage": STREAM_USAGE}],
        chat_whole({"content": "Hi"}, top={"usage": STREAM_USAGE})),
    "several choices, mixed": (
        [chat_chunk({"content": "H"}, index=1),
         chat_chunk({"content": "H"}), chat_chunk({"content": "i"}),
         chat_chunk({"content": "i"}, "stop", index=1),
         chat_chunk({}, "stop")],
        chat_whole({}, top={"choices": [
            STREAM_HI, {**STREAM_HI, "index": 1}]})),
    "several choices in a chunk": (
        [chat_chunk(top={"choices": [
            {"index": index, "delta": {"content": "Hi"},
             "finish_reason": "stop"} for index in (0, 1)]})],
        chat_whole({}, top={"choices": [
            STREAM_HI, {**STREAM_HI, "index": 1}]})),
    "no index, no `object` (Moonshot)": (
        [{"choices": [{"delta": {"content": "Hi"}}]},
         {"choices": [{"finish_reason": "stop"}]}],
        {"object": "chat.completion", "choices": [STREAM_HI]}),
    "logprobs go on": (
        [chat_chunk({"content": "Hel"}, logprobs={
            "content": [{"token": "Hel"}], "refusal": None}),
         chat_chunk({"content": "lo"}, logprobs={
             "content": [{"token": "l"}, {"token": "o"}], "refusal": None}),
         chat_chunk({}, "stop", logprobs=None)],
        chat_whole({"content": "Hello"}, logprobs={
            "content": [{"token": text} for text in ("Hel", "l", "o")],
            "refusal": None})),
    "fields nobody knows: the last": (
        [chat_chunk({"content": "Hi"}, score=[1, 2], filters={"low": True},
                    top={"citations": ["u"], "speed": 1}),
         chat_chunk({}, "stop", filters={"low": False},
                    top={"citations": ["u", "v"], "speed": 2})],
        chat_whole({"content": "Hi"}, score=[1, 2], filters={"low": False},
                   top={"citations": ["u", "v"], "speed": 2})),
    "padding (OpenAI)": (
        [chat_chunk({"content": "Hi"}, "stop", {"obfuscation": "aB3"})],
        chat_whole({"content": "Hi"})),
    "empty fields first, and a bare choice last (Azure)": (
        [{"choices": [], "id": "", "model": "", "object": "",
          "prompt_filter_results": [{"prompt_index": 0}]},
         chat_chunk({"content": "Hi"}, "stop"),
         {"choices": [{"index": 0, "finish_reason": None, "filters": {
             "low": True}}], "id": "", "model": "", "object": ""}],
        chat_whole({"content": "Hi"}, filters={"low": True}, top={
            "prompt_filter_results": [{"prompt_index": 0}]})),
    "a bare choice (Gemini, blocked)": (
        [chat_chunk(top={"choices": [
            {"index": 0, "finish_reason": "content_filter: RECITATION"}]})],
        chat_whole({}, "content_filter: RECITATION")),
    "a whole message": (
        [chat_chunk(top={"choices": []}),
         chat_chunk(top={"choices": [STREAM_HI]}),
         chat_chunk(top={"choices": [
             {**STREAM_HI, "index": 1, "delta": {}}]})],
        chat_whole({}, top={"choices": [
            STREAM_HI, {**STREAM_HI, "index": 1}]})),
    "a whole message behind its pieces": (
        [*stream_text("H", "i"), chat_chunk(top={"choices": [STREAM_HI]})],
        chat_whole({"content": "Hi"})),
    "the message so far beside the delta (Perplexity, Writer)": (
        [chat_chunk({"content": "H"}, message={"content": "H"}),
         chat_chunk({"content": "i"}, message={"content": None}),
         chat_chunk({"content": None}, "stop", message={"content": "Hi"})],
        chat_whole({"content": "Hi"})),
    "events of a vendor's own": (
        [{"type": "hermes.tool.progress", "tool": "f"}, {"type": "ping"},
         {"id": "other"}, chat_chunk({"content": "Hi"}, "stop")],
        chat_whole({"content": "Hi"})),
}


@table("chunks, whole", STREAM_CHUNKS)
def test_stream_of_chat_chunks_and_their_answer(chunks, whole):
    assert stream_build(serv.ChatAssembler(), [*chunks, serv.DONE]) == whole


# -- Messages: blocks ---------------------------------------------------------

STREAM_TOOL = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
STREAM_STARTS = {"text": {"text": ""}, "tool_use": STREAM_TOOL,
                 "thinking": {"thinking": "", "signature": ""}}


def stream_start(*content, **fields):
    """Return the first event of a Messages stream."""
    return {"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
        "content": list(content), "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1}, **fields}}


def stream_end(reason="end_turn", **fields):
    """Return the last events of a Messages stream."""
    return [{"type": "message_delta", "usage": {"output_tokens": 5},
             "delta": {"stop_reason": reason, "stop_sequence": None,
                       **fields}}, {"type": "message_stop"}]


def messages_whole(content, reason="end_turn", **fields):
    """Return a whole Messages answer."""
    return {"id": "msg_1", "type": "message", "role": "assistant",
            "model": "m", "content": content, "stop_reason": reason,
            "stop_sequence": None, "usage": {
                "input_tokens": 3, "output_tokens": 5}, **fields}


def stream_blocks(script):
    """Return the events of blocks, of a script of "index what value | ...".

    "1 begin text" begins a block of a type, "begin {...}" one of these
    fields, "end" ends it; "text Hi" is a text_delta, and so are thinking and
    signature; "json {" is an input_json_delta, "delta {...}" any other, and
    "{...}" any event.  Without an index it is 0; "-" stands for none.

    So "begin text | text Hel | text lo | end | 1 begin tool_use | 1 json {}"
    are a block with the text "Hello", and at index 1 a tool's with no input.
    """
    events = []
    for line in script.split(" | "):
        if line[0] == "{":
            events.append(json.loads(line))
            continue
        index, _, line = (line if line[0] in "-0123456789" else
                          "0 " + line).partition(" ")
        what, _, value = line.partition(" ")
        event = {"type": "content_block_" + {
            "begin": "start", "end": "stop"}.get(what, "delta")}
        if index != "-":
            event["index"] = int(index)
        if what == "begin":
            event["content_block"] = (
                {"type": value, **STREAM_STARTS[value]}
                if value in STREAM_STARTS else json.loads(value))
        elif what == "delta":
            event["delta"] = json.loads(value)
        elif what == "json":
            event["delta"] = {"type": "input_json_delta",
                              "partial_json": value}
        elif what != "end":
            event["delta"] = {"type": what + "_delta", what: value}
        events.append(event)
    return events


def stream_said(*texts):
    """Return a Messages stream of these texts, up to their block's end."""
    return [stream_start(), *stream_blocks(" | ".join([
        "begin text", *("text " + text for text in texts), "end"]))]


STREAM_BLOCKS = {  # a script between the first and the last event; content
    # Each delta that the reference names.
    "text_delta": ("begin text | text Hel | text lo | end",
                   stream_parts("Hello")),
    "input_json_delta": (
        'begin tool_use | json | json {"a" | json : 1} | end',
        [{**STREAM_TOOL, "input": {"a": 1}}]),
    "thinking_delta, signature_delta": (
        "begin thinking | thinking We | thinking ll. | signature S | end",
        [{"type": "thinking", "thinking": "Well.", "signature": "S"}]),
    "citations_delta": (
        'begin {"type": "text", "text": "", "citations": []} | text Hi'
        + 2 * ' | delta {"type": "citations_delta", "citation": {"n": 1}}',
        [{"type": "text", "text": "Hi", "citations": [{"n": 1}, {"n": 1}]}]),
    "citations_delta, not announced": (
        'begin {"type": "text", "text": "Hi", "citations": null} | '
        'delta {"type": "citations_delta", "citation": {"n": 1}}',
        [{"type": "text", "text": "Hi", "citations": [{"n": 1}]}]),
    "compaction_delta": (
        'begin {"type": "compaction", "content": null} | '
        'delta {"type": "compaction_delta", "content": "Sum."}',
        [{"type": "compaction", "content": "Sum."}]),
    "a delta nobody knows": (
        'begin text | text Hel | delta null | text lo | '
        'delta {"type": "new_delta", "news": [1], "text": "no"}',
        [{"type": "text", "text": "Hello", "news": [1]}]),
    # What a block begins with.
    "a text": ('begin {"type": "text", "text": "Hel"} | text lo',
               stream_parts("Hello")),
    "no input": ("begin tool_use | json | end", [STREAM_TOOL]),
    "an input that is no JSON (vllm#34887)": (
        'begin tool_use | json a": 1 | json }',
        [{**STREAM_TOOL, "input": 'a": 1}'}]),
    "an input in the start": (
        'begin {"type": "tool_use", "input": {"content": [{"n": 1}]}}',
        [{"type": "tool_use", "input": {"content": [{"n": 1}]}}]),
    'an input of "" or null (one-api)': (
        'begin {"type": "tool_use", "input": ""} | json {"a": 1} | '
        '1 begin {"type": "tool_use", "input": null}',
        [{"type": "tool_use", "input": {"a": 1}},
         {"type": "tool_use", "input": {}}]),
    "an input that is an object": (
        'begin tool_use | '
        'delta {"type": "input_json_delta", "partial_json": {"a": 1}} | '
        'delta {"type": "input_json_delta", "partial_json": {}}',
        [{**STREAM_TOOL, "input": {"a": 1}}]),
    "a tool of the server, and its result": (
        'begin {"type": "server_tool_use", "input": {}} | json {"q": 1} | '
        '1 begin {"type": "web_search_tool_result", "content": [{"type": "r",'
        ' "u": 1}, {"type": "r", "u": 2}]}',
        [{"type": "server_tool_use", "input": {"q": 1}},
         {"type": "web_search_tool_result", "content": [
             {"type": "r", "u": 1}, {"type": "r", "u": 2}]}]),
    "a signature in the start, and repeated": (
        'begin {"type": "thinking", "thinking": "a", "signature": "S"} | '
        'thinking b | signature S',
        [{"type": "thinking", "thinking": "ab", "signature": "S"}]),
    "blocks nobody knows": (
        'begin {"type": "redacted_thinking", "data": "D"} | end | '
        '1 begin {"type": "picture", "size": {"x": 1}} | 1 end',
        [{"type": "redacted_thinking", "data": "D"},
         {"type": "picture", "size": {"x": 1}}]),
    "an empty text is none: it would be refused (MaxKB#6683)": (
        "begin text | end | 1 begin tool_use | 1 end", [STREAM_TOOL]),
    # Events that say nothing of the blocks.
    "pings, and events nobody knows": (
        '{"type": "ping"} | begin text | {"type": "news", "index": 0, "text":'
        ' "no"} | text Hi | {"type": "content_block_news", "index": 0}',
        stream_parts("Hi")),
    "a second message_start": (
        'begin text | text Hel | {"type": "message_start", "message": {"id": '
        '"msg_1", "content": []}} | text lo', stream_parts("Hello")),
    # Which block a delta belongs to: that of its index, else the newest.
    "side by side": (
        "begin text | 1 begin tool_use | text Hel | 1 json { | text lo | "
        "1 json }", [*stream_parts("Hello"), STREAM_TOOL]),
    "no index": ("- begin text | - text Hel | - text lo | - begin tool_use",
                 [*stream_parts("Hello"), STREAM_TOOL]),
    "all at index 0": (
        'begin text | text Hel | end | begin tool_use | json {"a": 1} | end |'
        ' begin text | text lo | end',
        [*stream_parts("Hel"), {**STREAM_TOOL, "input": {"a": 1}},
         *stream_parts("lo")]),
    "all deltas at index 0": (
        'begin {"type": "thinking", "thinking": ""} | thinking Hm | end | '
        '1 begin text | text Hel | text lo | 1 end | 2 begin tool_use | '
        'json {"a": 1} | 2 end',
        [*stream_parts("Hm", kind="thinking"), *stream_parts("Hello"),
         {**STREAM_TOOL, "input": {"a": 1}}]),
    "all deltas at index 0, of two tools": (
        'begin tool_use | json {"a": 1} | end | 1 begin tool_use | '
        'json {"b": 2} | 1 end',
        [{**STREAM_TOOL, "input": {"a": 1}},
         {**STREAM_TOOL, "input": {"b": 2}}]),
    "an index that is begun again": (
        'begin tool_use | end | begin tool_use | 1 begin tool_use | '
        'json {"a": 1} | 1 json {"b": 2}',
        [STREAM_TOOL, {**STREAM_TOOL, "input": {"a": 1}},
         {**STREAM_TOOL, "input": {"b": 2}}]),
    "an unknown delta goes to the newest block of its index": (
        'begin tool_use | json {"a": 1} | end | begin {"type": "compaction"} '
        '| delta {"type": "compaction_delta", "content": "Sum."}',
        [{**STREAM_TOOL, "input": {"a": 1}},
         {"type": "compaction", "content": "Sum."}]),
    "a signature goes to the newest block of its index": (
        'begin tool_use | end | begin {"type": "thinking", "thinking": ""} | '
        'thinking Hm | 1 begin text | 1 text Hi | signature S',
        [STREAM_TOOL,
         {"type": "thinking", "thinking": "Hm", "signature": "S"},
         *stream_parts("Hi")]),
    "a tool gets its input behind a text of its index": (
        'begin tool_use | end | begin text | text Hi | 1 begin tool_use | '
        'json {"a": 1} | 1 json {"b": 2}',
        [{**STREAM_TOOL, "input": {"a": 1}}, *stream_parts("Hi"),
         {**STREAM_TOOL, "input": {"b": 2}}]),
    "a delta after the end of its block": (
        'begin tool_use | json {"a" | end | 1 begin text | json : 1} | '
        '1 text Hi', [{**STREAM_TOOL, "input": {"a": 1}},
                      *stream_parts("Hi")]),
    "a tool without an input": (
        'begin {"type": "tool_use", "id": "t1", "name": "f"} | end',
        [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]),
    "a tool with an empty text for an input": (
        'begin {"type": "tool_use", "id": "t1", "name": "f", "input": ""}',
        [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]),
    "a citation that is not there": (
        'begin text | delta {"type": "citations_delta"} | text Hi',
        [{**stream_parts("Hi")[0], "citations": []}]),
    "no block": ("begin null | text Hi", stream_parts("Hi")),
    "no types": ('begin {} | delta {"text": "Hel"} | delta {"text": "lo"}',
                 stream_parts("Hello")),
    # A delta of another type than its block begins a new one.
    "thinking in a text (litellm#33938, claude-code-router#1725)": (
        'begin {"type": "thinking", "thinking": ""} | thinking Hm | '
        '1 begin text | 1 thinking Oh | 1 text Hi',
        [*stream_parts("Hm", "Oh", kind="thinking"), *stream_parts("Hi")]),
    "two thinking blocks that were not begun": (
        "thinking A | signature S | end | 1 thinking B | 1 signature T",
        [{"type": "thinking", "thinking": "A", "signature": "S"},
         {"type": "thinking", "thinking": "B", "signature": "T"}]),
    "an input at an index that was not begun": (
        'begin tool_use | json {"a": 1} | end | 1 json {"b": 2}',
        [{**STREAM_TOOL, "input": {"a": 1}},
         {"type": "tool_use", "input": {"b": 2}}]),
    "an input at the index of a text": (
        'begin tool_use | json {"a": 1} | end | 1 begin text | 1 text Hi | '
        '1 json {"b": 2}',
        [{**STREAM_TOOL, "input": {"a": 1}}, *stream_parts("Hi"),
         {"type": "tool_use", "input": {"b": 2}}]),
    "a signature after the end of its block": (
        'begin {"type": "thinking", "thinking": ""} | thinking A | end | '
        '1 begin text | 1 text Hi | signature S',
        [{"type": "thinking", "thinking": "A", "signature": "S"},
         *stream_parts("Hi")]),
    "an input in pieces, then as an object": (
        'begin tool_use | json { | delta {"type": "input_json_delta", '
        '"partial_json": {"a": 1}}', [{**STREAM_TOOL, "input": {"a": 1}}]),
    "a text of a type yet unknown": (
        'begin {"type": "new", "content": "Sum"} | delta {"type": '
        '"new_delta", "content": "ma"} | delta {"type": "new_delta", '
        '"content": "ry"}', [{"type": "new", "content": "Summary"}]),
    "a text at the index of another block goes on with the last": (
        'begin {"type": "thinking", "thinking": "Hm"} | 1 begin text | '
        '1 text Hel | text lo',
        [*stream_parts("Hm", kind="thinking"), *stream_parts("Hello")]),
    "a text in a tool (sglang)": (
        'begin tool_use | json {"a": 1} | text Hel | text lo',
        [{**STREAM_TOOL, "input": {"a": 1}}, *stream_parts("Hello")]),
    "a text in the middle of an input": (
        'begin tool_use | json {"a" | text Hi | json : 1}',
        [{**STREAM_TOOL, "input": {"a": 1}}, *stream_parts("Hi")]),
    "an empty input in another block begins none": (
        "begin text | text Hel | json | text lo", stream_parts("Hello")),
    "an empty text in another block begins none (LiteLLM)": (
        'begin {"type": "thinking", "thinking": ""} | thinking We | text | '
        'thinking ll. | signature S',
        [{"type": "thinking", "thinking": "Well.", "signature": "S"}]),
}


@table("script, content", STREAM_BLOCKS)
def test_stream_of_messages_blocks_and_their_deltas(script, content):
    assert stream_build(serv.MessagesAssembler(), [
        stream_start(), *stream_blocks(script), *stream_end()
    ]) == messages_whole(content)


@pytest.mark.parametrize("indexes", [
    [0, 1, 2], [2, 0, 1], [1, 10 ** 9, -4], [0, 0, 0], [0, 1, 0, 1, 0, 1],
    ["-", "-", "-"], [0, "-", "-"], ["-", 1, "-"]],
    ids=["in order", "in another order", "gaps, and below 0", "all at 0",
         "two indexes in turn", "no indexes", "an index, then none",
         "an index in the middle"])
def test_stream_of_messages_blocks_are_in_the_order_they_begin(indexes):
    assembler = serv.MessagesAssembler()
    order = "ABCDEF"[:len(indexes)]
    for index, text in zip(indexes, order):
        for event in stream_blocks("{0} begin text | {0} text {1}".format(
                index, text)):
            assembler.add(event)
    assert serv.Reply(assembler.build()).text == order


STREAM_FIELDS = {  # events; their answer
    "a stop sequence, and no usage at the end": (
        stream_said("a") + [{"type": "message_delta", "delta": {
            "stop_reason": "stop_sequence", "stop_sequence": "!"}}],
        messages_whole(stream_parts("a"), "stop_sequence", stop_sequence="!",
                       usage={"input_tokens": 3, "output_tokens": 1})),
    "usage is replaced field by field": (
        stream_said("a") + [
            {"type": "message_delta", "delta": {"stop_reason": None},
             "usage": {"output_tokens": 4, "cache": {"read": 1}}},
            *stream_end()],
        messages_whole(stream_parts("a"), usage={
            "input_tokens": 3, "output_tokens": 5, "cache": {"read": 1}})),
    "fields nobody knows": (
        [stream_start(container={"id": "b"}, tier="one"), *stream_blocks(
            'begin {"type": "text", "text": "a", "mood": "good"}'),
         *stream_end(why="done")],
        messages_whole([{"type": "text", "text": "a", "mood": "good"}],
                       container={"id": "b"}, tier="one", why="done")),
    "a whole message in message_start": (
        [stream_start(*stream_parts("a", "")), *stream_end()],
        messages_whole(stream_parts("a"))),
    "a second message_start with more to say": (
        [*stream_said("a"), stream_start(model="n"), *stream_end()],
        messages_whole(stream_parts("a"), model="n")),
}


@table("events, whole", STREAM_FIELDS)
def test_stream_of_messages_fields_of_the_answer(events, whole):
    assert stream_build(serv.MessagesAssembler(), events) == whole


# -- Both formats -------------------------------------------------------------

def stream_events(endpoint, *texts):
    """Return an assembler, and the events of a stream of these texts."""
    if endpoint == "chat":
        return serv.ChatAssembler(), [
            *stream_text(*texts), chat_chunk({}, "stop"), serv.DONE]
    return serv.MessagesAssembler(), stream_said(*texts) + stream_end()


@each_endpoint
def test_stream_what_is_built_grows_and_is_a_copy(endpoint):
    assembler, events = stream_events(endpoint, "Hel", "lo")
    texts = []
    for event in events:
        assembler.add(event)
        answer = assembler.build()
        texts.append(serv.Reply(answer).text)
        (answer.get("choices") or answer["content"]).clear()
        answer.clear()
    assert [text for text, _ in itertools.groupby(texts)] == [
        "", "Hel", "Hello"][endpoint == "chat":]


@each_endpoint
@pytest.mark.parametrize("length, size", [(1 << 15, 4), (1 << 20, 512)])
def test_stream_a_long_tool_call_in_small_pieces(endpoint, length, size):
    given = json.dumps({"a": "x" * length})
    texts = [given[i:i + size] for i in range(0, len(given), size)]
    if endpoint == "chat":
        answer = stream_build(serv.ChatAssembler(), [
            chat_chunk({"tool_calls": [stream_call("0 x f " + text)]})
            for text in texts])
    else:
        answer = stream_build(serv.MessagesAssembler(), [
            stream_start(), *stream_blocks(" | ".join([
                "begin tool_use", *("json " + text for text in texts)]))])
    assert serv.Reply(answer).tool_calls == [
        serv.ToolCall("x", "f", {"a": "x" * length})]


@table("texts", {
    "pieces that continue an object": ['{"a": {}', *[', "a": {}'] * 20000,
                                       "}"],
    "pieces that could be objects of their own": ['{"a": "', *["{}"] * 20000,
                                                  '"}'],
    "pieces of white space": ['{"a": 1', *[" "] * 20000, "}"]})
def test_stream_a_name_in_each_piece_of_a_long_call_costs_no_more(texts):
    """Whether the arguments so far are whole, is not read off all of them."""
    begun = time.process_time()  # what other programs do does not count
    answer = stream_build(serv.ChatAssembler(), [
        chat_chunk({"tool_calls": [stream_call("0 - f " + text)]})
        for text in texts])
    [call] = serv.Reply(answer).tool_calls
    assert call.arguments == json.loads("".join(texts))
    assert time.process_time() - begun < 4


@pytest.mark.parametrize("first", ["Hi", [{"type": "text", "text": "Hi"}]],
                         ids=["text", "parts"])
@pytest.mark.parametrize("then", [5, {"a": 1}, True], ids=repr)
def test_stream_what_was_text_is_not_replaced_by_something_else(first, then):
    assembler = serv.ChatAssembler()
    assert assembler.add(chat_chunk({"content": first})) == "Hi"
    with pytest.raises(serv.APIResponseError, match="content was text and is"):
        assembler.add(chat_chunk({"content": then}))
    assert serv.Reply(assembler.build()).text == "Hi"


def test_stream_a_tools_name_has_at_most_1000_characters():
    def build_name(pieces):
        return stream_build(serv.ChatAssembler(), [
            chat_chunk({"tool_calls": [{"index": 0, "function": {
                "name": "%05d" % number}}]}) for number in range(pieces)])

    assert len(serv.Reply(build_name(200)).tool_calls[0].name) == 1000
    with pytest.raises(serv.APIResponseError, match="a name is longer than"):
        build_name(201)


@each_endpoint
def test_stream_of_20000_events_is_put_together(endpoint):
    texts = ["%d " % number for number in range(20000)]
    answer = stream_build(*stream_events(endpoint, *texts))
    assert serv.Reply(answer).text == "".join(texts)


# -- What proves a stream whole -----------------------------------------------

STREAM_PROOFS = {
    # how many choices were asked for (None: Messages), events; is it whole?
    "chat: nothing": (1, [], False),
    "chat: [DONE] alone": (1, [serv.DONE], False),
    "chat: [DONE] and no choice": (
        1, [{"choices": [], "usage": STREAM_USAGE}, serv.DONE], False),
    "chat: text": (1, stream_text("a"), False),
    "chat: text and [DONE] (Snowflake)": (
        1, [*stream_text("a"), serv.DONE], True),
    "chat: a finish_reason": (
        1, [chat_chunk({"content": "a"}, "stop")], True),
    "chat: any finish_reason": (1, [chat_chunk({}, "eos_token")], True),
    "chat: a finish_reason, then null": (
        1, [chat_chunk({}, "stop"), chat_chunk({"content": ""})], True),
    "chat: a finish_reason, then more text": (
        1, [chat_chunk({}, "stop"), *stream_text("a")], False),
    "chat: an empty finish_reason": (1, [chat_chunk({}, "")], False),
    "chat: the text null for a finish_reason (DashScope)": (
        1, [chat_chunk({"content": "a"}, "null")], False),
    "chat: one choice of two": (2, [chat_chunk({}, "stop")], False),
    "chat: one choice of two, [DONE]": (
        2, [chat_chunk({}, "stop"), serv.DONE], False),
    "chat: two choices, one finish_reason": (
        2, [chat_chunk({}, "stop"), chat_chunk({}, index=1)], False),
    "chat: two choices, one finish_reason, [DONE] (LiteLLM)": (
        2, [chat_chunk({}, "stop"), chat_chunk({}, index=1), serv.DONE],
        True),
    "chat: two choices, two finish_reasons": (
        2, [chat_chunk({}, "stop", index=1), chat_chunk({}, "stop")],
        True),
    "chat: more choices than asked for": (
        1, [chat_chunk({}, "stop"), chat_chunk({}, index=1)], False),
    "messages: a ping": (None, [{"type": "ping"}], False),
    "messages: message_start": (None, [stream_start()], False),
    "messages: a block": (None, stream_said("a"), False),
    "messages: no stop_reason": (
        None, [*stream_said("a"), stream_end(None)[0]], False),
    "messages: message_stop alone": (None, [{"type": "message_stop"}], False),
    "messages: a block and message_stop": (
        None, [*stream_said("a")[1:], {"type": "message_stop"}], False),
    "messages: message_start and message_stop": (
        None, [stream_start(), {"type": "message_stop"}], True),
    "messages: a stop_reason": (None, stream_end()[:1], True),
    "messages: a stop_reason, then a block": (
        None, [stream_end()[0], *stream_blocks("begin text")], False),
    "messages: a stop_reason, then more of a block": (
        None, [*stream_said("a"), stream_end()[0], *stream_blocks("text b")],
        False),
    "messages: a stop_reason in message_start": (
        None, [stream_start(stop_reason="end_turn")], True),
}


@table("choices, events, whole", STREAM_PROOFS)
def test_stream_what_proves_it_whole(choices, events, whole):
    assembler = (serv.ChatAssembler(choices) if choices else
                 serv.MessagesAssembler())
    stream_build(assembler, events)
    assert assembler.whole is whole


# ---------------------------------------------------------------------------
# Streams
#
# Over sockets: pieces and events, what else may come, how a stream ends,
# close(), and errors.
# ---------------------------------------------------------------------------

STREAM_OPEN = {"chat": stream_text("Hel", "lo"),  # no end of it yet
               "messages": stream_said("Hel", "lo")}
STREAM_DONE = {"chat": [chat_chunk({}, "stop"), "[DONE]"],
               "messages": stream_end()}
STREAM_HELLO = {name: STREAM_OPEN[name] + STREAM_DONE[name]
                for name in STREAM_OPEN}
STREAM_ANSWER = {"chat": chat_whole({"content": "Hello"}),
                 "messages": messages_whole(stream_parts("Hello"))}


def stream_bytes(data, kind="text/event-stream", size=1 << 20):
    """Return an answer of a type (None for none), in chunks of a size."""
    head = http_head(kind=kind or "", transfer_encoding="chunked")
    if kind is None:
        head = head.replace(b"Content-Type: \r\n", b"")
    return head + b"".join(chunk(data[i:i + size]) for i in range(
        0, len(data), size)) + chunk(b"")


def stream_result(answer, endpoint="chat", **options):
    """Return the pieces of a stream, and the reply at its end."""
    with Server(answer) as server:
        stream = open_stream(server, endpoint, **options)
        pieces = list(stream)
        assert list(stream) == list(stream.events()) == []
    assert not stream.reply.partial
    return pieces, stream.reply


def stream_error(answer, endpoint="chat", **options):
    """Return the error of a stream that says "Hello" before it fails."""
    pieces = []
    with Server(answer) as server:
        stream = open_stream(server, endpoint, **options)
        with pytest.raises(serv.ServError) as caught:
            for piece in stream:
                pieces.append(piece)
        for again in (stream, stream.events()):  # no silent end either
            with pytest.raises(type(caught.value)):
                next(again)
    assert "".join(pieces) == caught.value.reply.text == "Hello"
    assert caught.value.reply.partial and stream.reply.partial
    assert caught.value.reply == stream.reply
    return caught.value


STREAM_READS = {"chat": chat_streamed, "messages": message_streamed}


@each_endpoint
def test_stream_a_piece_is_there_before_the_next_is_sent(endpoint):
    def answer(wire, request):
        wire.sendall(STREAM_HEAD)
        assert opened.wait(10)  # it is open before its first event
        for event in STREAM_HELLO[endpoint]:
            wire.sendall(chunk(sse(event)))
            if "Hel" in str(event):
                assert taken.wait(10)
        wire.sendall(chunk(b""))
    opened, taken = threading.Event(), threading.Event()
    with Server(answer) as server:
        pieces = open_stream(server, endpoint)
        opened.set()
        assert next(pieces) == "Hel"
        taken.set()
        assert list(pieces) == ["lo"]


def test_stream_is_one_pass_of_pieces_and_events():
    with Server(stream_answer(*STREAM_HELLO["chat"])) as server:
        stream = open_stream(server)
        assert iter(stream) is stream
        for piece in stream:
            assert piece == "Hel"
            break
        assert next(stream.events()) == STREAM_HELLO["chat"][1]
        assert (list(stream), stream.reply.text) == ([], "Hello")


def stream_wipe(value):
    """Empty a dict or a list, and all that are in it."""
    if isinstance(value, (dict, list)):
        for inner in list(value.values() if isinstance(value, dict)
                          else value):
            stream_wipe(inner)
        value.clear()


@each_endpoint
def test_stream_events_are_as_sent_and_the_callers_own(endpoint):
    expected = [{"type": "ping"}, *STREAM_OPEN[endpoint], *(
        [chat_chunk({"notes": [{"n": n}]}, top={"usage": STREAM_USAGE})
         for n in (1, 2)] if endpoint == "chat" else
        stream_blocks('1 begin {"type": "a", "notes": [{"n": 1}]}')),
        STREAM_DONE[endpoint][0]]
    replies = []
    with Server(stream_answer(*expected, STREAM_DONE[endpoint][1])) as server:
        for change in (stream_wipe, len):  # the reply is no less for it
            stream = open_stream(server, endpoint)
            for event in expected:
                given = next(stream.events())
                assert given == event
                change(given)
            list(stream)
            replies.append(stream.reply)
    assert replies[0] == replies[1] and replies[0].text == "Hello"


def test_stream_reply_can_be_read_at_any_time():
    answer = stream_answer(*STREAM_HELLO["chat"], X_Request_Id="r1")
    with Server(answer) as server:
        stream = open_stream(server)
        seen = [stream.reply]
        seen += [stream.reply for _ in stream.events()] + [stream.reply]
    assert [(reply.text, reply.stop_reason, reply.partial)
            for reply in seen] == [
        ("", None, True), ("Hel", None, True), ("Hello", None, True),
        ("Hello", "stop", False), ("Hello", "stop", False)]
    reply = seen[-1]
    assert isinstance(reply, serv.Reply)
    assert reply == STREAM_ANSWER["chat"]
    assert (reply.request_id, reply.retries) == ("r1", 0)
    assert reply.headers["content-TYPE"] == "text/event-stream"
    assert 0 < reply.elapsed < 20
    assert stream.reply.elapsed == reply.elapsed  # up to the last byte


def test_stream_all_choices_that_were_asked_for_are_waited_for():
    first = chat_chunk({"content": "Hello"}, "stop")
    both = stream_answer(first, chat_chunk({}, "stop", index=1))
    assert len(stream_result(both, n=2)[1]["choices"]) == 2
    error = stream_error(stream_answer(first, "[DONE]"), n=2)
    assert type(error) is serv.APIConnectionError


# -- What else may come in a stream -------------------------------------------

@table("noise", {
    "a comment": ": OPENROUTER PROCESSING", "an id": "id: 1",
    "a retry": "retry: 1", "data without text": "data:",
    "a name without data": "event: ping",
    "a ping": 'event: ping\ndata: {"type": "ping"}',
    "a ping without a name": 'data: {"type": "ping"}',
    "a vendor's event": 'event: hermes.tool.progress\ndata: {"tool": "f"}',
    "a vendor's text": "event: vendor\ndata: not JSON",
    "a filter's text": "event: content_filter\ndata: ok",
    "a vendor's notice": 'event: quota\ndata: {"message": "50 left"}',
    "JSON that is no object": 'data: "a"',
    "error: null": 'data: {"error": null}'})
@each_endpoint
def test_stream_noise_changes_nothing(endpoint, noise):
    noise = (noise + "\n\n").encode()
    data = noise + b"".join(
        sse(event) + noise for event in STREAM_HELLO[endpoint])
    assert stream_result(stream_bytes(data), endpoint) == (
        ["Hel", "lo"], STREAM_ANSWER[endpoint])


def test_stream_the_name_of_an_event_stands_in_for_its_type():
    data = b"".join(b"event: %s\n" % event["type"].encode() + sse(json.dumps(
        {name: event[name] for name in event if name != "type"}))
        for event in STREAM_HELLO["messages"])
    assert stream_result(stream_bytes(data), "messages") == (
        ["Hel", "lo"], STREAM_ANSWER["messages"])


@each_endpoint
def test_stream_blank_lines_that_got_lost(endpoint):
    data = sse(*STREAM_HELLO[endpoint]).replace(b"\n\n", b"\n") + b"\n"
    assert stream_result(stream_bytes(data), endpoint) == (
        ["Hel", "lo"], STREAM_ANSWER[endpoint])


@pytest.mark.parametrize("texts, whole", [
    (["a\ud83d", "\ude00b"], "a\U0001f600b"),
    (["\ud83d", "", "\ude00"], "\U0001f600"),
    (["\ud83d\ude00"], "\U0001f600"),
    (["\ud83d", "\ud83d\ude00"], "\ufffd\U0001f600"),
    (["\ud83d", "\ude00\ud83d", "\ude00"], "\U0001f600\U0001f600"),
    (["a\ud83d"], "a\ufffd"), (["\ude00", "a"], "\ufffda"),
    (["\ud83d", "a"], "\ufffda"), (["a\ud83d", "\u20ac"], "a\ufffd\u20ac"),
], ids=ascii)
@each_endpoint
def test_stream_halves_of_a_character_are_joined(endpoint, texts, whole):
    events = (stream_text(*texts) if endpoint == "chat"
              else stream_said(*texts))
    pieces, reply = stream_result(
        stream_answer(*events, *STREAM_DONE[endpoint]), endpoint)
    assert "".join(pieces) == reply.text == whole
    assert "" not in pieces
    for text in [*pieces, json.dumps(reply, ensure_ascii=False)]:
        text.encode()


def test_stream_a_half_waits_for_its_other_half():
    with Server(stream_answer(*stream_text("a\ud83d", "\ude00"),
                              "[DONE]")) as server:
        stream = open_stream(server)
        assert (next(stream), stream.reply.text) == ("a", "a\ufffd")
        assert list(stream) == ["\U0001f600"]


# -- Stream, JSON or page: told by the first bytes ----------------------------

STREAM_LABELS = ["text/event-stream", "TEXT/Event-Stream; charset=utf-8",
                 "application/json", "text/plain", None]


@pytest.mark.parametrize("first", [
    b"", b"\xef\xbb\xbf", b"\n\r\n", b": hello\n\n", b"id: 1\n", b"retry: 1\n",
    b"event: message\n"], ids=ascii)
@pytest.mark.parametrize("kind, size", [
    *((kind, 1 << 20) for kind in STREAM_LABELS), (None, 1)])
def test_stream_is_known_by_its_first_bytes(kind, first, size):
    data = stream_bytes(first + sse(*STREAM_HELLO["chat"]), kind, size)
    assert stream_result(data) == (["Hel", "lo"], STREAM_ANSWER["chat"])


@pytest.mark.parametrize("first", [b"", b"\n \r\n\t", b"\xef\xbb\xbf"],
                         ids=ascii)
@pytest.mark.parametrize("kind, size", [
    *((kind, 1 << 20) for kind in STREAM_LABELS), ("text/event-stream", 1)])
def test_stream_plain_json_comes_as_one_piece(kind, first, size):
    data = first + json.dumps(STREAM_ANSWER["chat"]).encode()
    assert stream_result(stream_bytes(data, kind, size)) == (
        ["Hello"], STREAM_ANSWER["chat"])


@pytest.mark.parametrize("endpoint, answer, pieces", [
    ("chat", chat_whole({"content": "Hello"}, None), ["Hello"]),
    ("chat", chat_whole({"tool_calls": [stream_call("- x f {}")]}), []),
    ("chat", chat_whole({}, top={"choices": [
        STREAM_HI, {**STREAM_HI, "index": 1}]}), ["Hi"]),
    ("messages", messages_whole([*stream_parts("Hel"), STREAM_TOOL,
                                 *stream_parts("", "lo")]), ["Hello"]),
    ("messages", {"content": stream_parts("Hello")}, ["Hello"])],
    ids=["chat: no reason to stop", "chat: a call", "chat: two choices",
         "messages: blocks", "messages: content alone"])
def test_stream_plain_json_is_whole_and_untouched(endpoint, answer, pieces):
    assert stream_result(http_answer(answer), endpoint) == (pieces, answer)


@pytest.mark.parametrize("kind", STREAM_LABELS)
@pytest.mark.parametrize("body, name", [
    ({"error": {"type": "rate_limit_error", "message": "No."}},
     "RateLimitError"),
    ([{"error": {"code": 402, "message": "No."}}], "BillingError")],
    ids=["an object", "a list"])
def test_stream_a_json_error_is_that_error(kind, body, name):
    error = error_of(stream_bytes(json.dumps(body).encode(), kind),
                     chat_streamed)
    assert (type(error).__name__, error.message) == (name, "No.")


def test_stream_a_refused_request_raises_at_once():
    with Server(http_answer({"error": {"message": "No."}},
                            "429 Too Many Requests")) as server:
        with pytest.raises(serv.RateLimitError) as caught:
            open_stream(server)
    assert (caught.value.message, caught.value.reply) == ("No.", None)


@pytest.mark.parametrize("kind", STREAM_LABELS)
@pytest.mark.parametrize("body", [
    "<html><body>Sign in", "Internal trouble", '"text"',
    '{"success": true, "data": {}}'])  # cline/cline#13348
def test_stream_what_is_no_answer_is_an_error_that_shows_it(kind, body):
    error = error_of(stream_bytes((body + " " * 9999).encode(), kind),
                     chat_streamed)
    assert type(error) is serv.APIResponseError
    assert body in str(error) and len(str(error)) < SHORT


# -- How a stream ends, whole or cut ------------------------------------------

@table("more", {"nothing": b"", "more": sse({"error": "no"}, "{")})
@each_endpoint
def test_stream_ends_with_its_last_event(endpoint, more):
    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(*STREAM_HELLO[endpoint]) + more))
        while wire.recv(65536):  # the end never comes
            pass
        return False
    assert stream_result(answer, endpoint) == (
        ["Hel", "lo"], STREAM_ANSWER[endpoint])


@pytest.mark.parametrize("tail", [chunk(b""), b"", b"5\r\nda"],
                         ids=["ended", "closed", "cut"])
@each_endpoint
def test_stream_with_its_proof_is_whole_however_it_ends(endpoint, tail):
    data = STREAM_HEAD + chunk(sse(*STREAM_HELLO[endpoint][:-1])) + tail
    assert stream_result(closing(data), endpoint) == (
        ["Hel", "lo"], STREAM_ANSWER[endpoint])


def test_stream_that_is_broken_behind_its_proof_leaves_no_connection():
    data = STREAM_HEAD + chunk(sse(*STREAM_HELLO["chat"][:-1])) + b"zz\r\n"
    with Server([data, http_answer(bare_answer("Hi"))]) as server:
        stream = open_stream(server)
        assert "".join(stream) == "Hello"
        serv.chat("Hi", system="s", model="m", api_key="k",
                  base_url=server.url)
        assert server.connections == 2


@table("tail", {
    "the body ends": chunk(b""),
    "the connection ends": b"",
    "it ends in a chunk": b"5\r\nda",
    "it ends in no chunk": b"zz\r\n",
    "it ends in an event": chunk(b'data: {"id": "c1", "choi') + chunk(b""),
    "it ends before the blank line": None})
@each_endpoint
def test_stream_that_is_cut_is_an_error(endpoint, tail):
    data = chunk(sse(*STREAM_OPEN[endpoint]))
    if tail is None:
        tail = chunk(sse(STREAM_DONE[endpoint][0])[:-1]) + chunk(b"")
    error = stream_error(closing(STREAM_HEAD + data + tail), endpoint)
    assert type(error) is serv.APIConnectionError
    assert (error.reply.text, error.reply.partial) == ("Hello", True)


@pytest.mark.parametrize("body", [b"", b"\r\n", b"da", b"event"])
def test_stream_that_is_cut_in_its_first_word_is_an_error(body):
    data = chunk(body) if body else b""
    with Server(closing(STREAM_HEAD + data + chunk(b""))) as server:
        error = net_error(serv.APIConnectionError, list, open_stream(server))
    assert "cut" in str(error) and error.reply.partial


@table("head", {
    "no length": http_head(kind="text/event-stream"),
    "a length": http_head(kind="text/event-stream", content_length=9999),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"})
def test_stream_that_is_cut_and_not_chunked_is_an_error(head):
    error = stream_error(closing(head + sse(*STREAM_OPEN["chat"])))
    assert type(error) is serv.APIConnectionError
    assert (error.reply.text, error.reply.partial) == ("Hello", True)


@pytest.mark.parametrize("given, piece, shown", [
    ("", "", ""), ("", "{", "{"), ("", '{"a": 1}', '{"a": 1}'),
    ("", "{}", "{}"), ({"a": 1}, "", '{"a": 1}'), ({}, "", "")],
    ids=["none yet", "begun", "all of it", "all of it, empty", "an object",
         "an empty object"])
@each_endpoint
def test_stream_a_call_of_a_cut_stream_never_looks_finished(
        endpoint, given, piece, shown):
    events = [chat_chunk({"tool_calls": [{
        "index": 0, "id": "x", "function": {"name": "f", "arguments": text}}]})
        for text in (given, piece)]
    if endpoint == "messages":
        events = [stream_start(), *stream_blocks("begin %s | json %s" % (
            json.dumps({**STREAM_TOOL, "input": given}), piece))]
    calls = [serv.ToolCall("x", "f", shown)]
    with Server(stream_answer(*events)) as server:
        stream = open_stream(server, endpoint)
        source = stream.events()
        for _ in events:
            next(source)
        assert stream.reply.tool_calls == calls
        with pytest.raises(serv.APIConnectionError) as caught:
            next(source)
    assert caught.value.reply.tool_calls == calls


# -- close(), and interrupts --------------------------------------------------

def test_stream_yields_the_events_as_they_were_sent():
    """A piece is not changed by the next one, although they are merged."""
    chunks = [chat_chunk({"tool_calls": [
        {"index": 0, "id": "a", "more": {"x": 1}, "function": {"name": "f"}},
        {"index": 0, "more": {"y": 2}}]}),
        chat_chunk({}, "stop", logprobs={"content": [{"token": "a"}]}),
        chat_chunk({}, "stop", logprobs={"content": [{"token": "b"}]})]
    with Server(stream_answer(*chunks, "[DONE]")) as server:
        stream = open_stream(server)
        assert list(stream.events()) == chunks
    assert stream.reply.message["tool_calls"][0]["more"] == {"x": 1, "y": 2}


def test_the_calls_of_a_later_choice_are_its_own_if_two_were_asked_for():
    answer = {"choices": copy.deepcopy(SPLIT_CALLS)}
    with Server(http_answer(answer)) as server:
        for count, calls in ((1, [("1", "f", {})]), (2, [])):
            reply = serv.chat("Hi", system="s", base_url=server.url, n=count)
            assert reply.tool_calls == calls
            assert copy.copy(reply).tool_calls == calls
            assert pickle.loads(pickle.dumps(reply)).tool_calls == calls


def stream_drop(stream):
    """Leave a stream to the garbage collector."""
    del stream
    gc.collect()


def stream_leave(stream):
    """Leave a stream by the end of its block."""
    with stream as same:
        assert same is stream


def stream_watched(closed):
    """Return an answer of one piece, which notes that the client left."""
    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(*stream_text("Hel"))))
        try:
            assert wire.recv(1) == b""
        except ConnectionError:
            pass  # a reset is an end too
        closed.set()
        return False
    return answer


@table("leave", {"close()": serv.Stream.close, "with": stream_leave,
                 "abandoned": stream_drop})
@pytest.mark.parametrize("begun", [False, True], ids=["unread", "begun"])
def test_stream_left_early_is_closed(leave, begun):
    closed, streams = threading.Event(), []
    with Server(stream_watched(closed)) as server, warnings.catch_warnings(
            record=True) as warned:
        warnings.simplefilter("always")
        streams.append(open_stream(server))
        if begun:
            assert next(streams[0]) == "Hel"
        leave(streams.pop())
        gc.collect()  # PyPy still held it in the call
        assert closed.wait(10)
    assert warned == []


@pytest.mark.skipif(sys.implementation.name != "cpython",
                    reason="needs the counts of references")
def test_stream_that_is_abandoned_leaves_nothing_to_the_collector():
    with Server(stream_watched(threading.Event())) as server:
        stream = open_stream(server)
        assert next(stream) == "Hel"
        headers = weakref.ref(stream.reply.headers)
        gc.disable()
        try:
            del stream
            assert headers() is None
        finally:
            gc.enable()


def test_stream_that_is_closed_is_at_its_end_and_keeps_its_reply():
    with Server(stream_answer(*STREAM_HELLO["chat"])) as server:
        stream = open_stream(server)
        assert next(stream) == "Hel"
        stream.close()
        stream.close()
        assert (list(stream), list(stream.events())) == ([], [])
        assert (stream.reply.text, stream.reply.partial) == ("Hel", True)


def test_stream_closed_from_another_thread_ends_the_wait_at_once():
    closed, begun, ended = (threading.Event() for _ in range(3))
    pieces = []

    def read():
        for piece in stream:
            pieces.append(piece)
            begun.set()
        ended.set()

    with Server(stream_watched(closed)) as server:
        stream = open_stream(server, timeout=60)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert begun.wait(20)
        assert not ended.wait(0.05)  # it waits for a second piece
        stream.close()
        assert ended.wait(5) and closed.wait(5)  # not for all of 60 s
        reader.join(20)
    assert (pieces, stream.reply.text) == (["Hel"], "Hel")
    assert stream.reply.partial and list(stream) == []


def test_stream_has_one_reader_at_a_time():
    begun, ended = threading.Event(), threading.Event()

    def read():
        for _ in stream:
            begun.set()
        ended.set()

    with Server(stream_watched(threading.Event())) as server:
        stream = open_stream(server, timeout=60)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert begun.wait(20)
        assert not ended.wait(0.05)  # it waits for a second piece
        with pytest.raises(ValueError, match="being read already"):
            next(stream)
        assert not ended.is_set()  # the first reader goes on
        stream.close()
        assert ended.wait(5)
        reader.join(20)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize("act, pieces", [(next, ["Hel", "lo"]),
                                         (serv.Stream.close, ["Hel"])],
                         ids=["read: refused", "close(): it ends"])
def test_stream_used_by_a_signal_handler_while_it_is_read(act, pieces):
    def handle(number, frame):
        while frame is not None and not acted.is_set():
            if frame.f_code.co_name == "is_ready":  # it waits
                try:
                    act(stream)
                except ValueError as error:
                    refused.append(error)
                acted.set()
            frame = frame.f_back

    def answer(wire, request):
        wire.sendall(STREAM_HEAD + chunk(sse(*stream_text("Hel"))))
        assert opened.wait(10)
        while not acted.wait(0.02):
            os.kill(os.getpid(), signal.SIGUSR1)
        with contextlib.suppress(ConnectionError):
            wire.sendall(chunk(sse(chat_chunk({"content": "lo"}, "stop")))
                         + chunk(b""))
        return False

    opened, acted, refused = threading.Event(), threading.Event(), []
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with Server(answer) as server:
            stream = open_stream(server)
            seen = [next(stream)]
            opened.set()
            seen += list(stream)
    finally:
        acted.set()
        signal.signal(signal.SIGUSR1, before)
    assert (seen, len(refused)) == (pieces, act is next)


def test_stream_an_exception_in_its_block_is_the_callers_own():
    with Server(stream_answer(*STREAM_HELLO["chat"])) as server:
        with pytest.raises(ZeroDivisionError):
            with open_stream(server) as stream:
                for _ in stream:
                    1 / 0  # noqa: B018
        assert (stream.reply.text, list(stream)) == ("Hel", [])


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize("said", [[], ["Hel"]], ids=["nothing", "a piece"])
def test_stream_that_is_interrupted_does_not_end_in_silence(said):
    def interrupt(number, frame):
        while frame is not None and not ended.is_set():
            if frame.f_code.co_filename == serv.__file__:
                ended.set()
                raise LookupError("the caller's own")
            frame = frame.f_back  # it does not wait yet

    def answer(wire, request):
        wire.sendall(STREAM_HEAD)
        for event in stream_text(*said):
            wire.sendall(chunk(sse(event)))
        assert opened.wait(10)
        while not ended.wait(0.02):
            os.kill(os.getpid(), signal.SIGUSR1)
        wire.sendall(chunk(sse(*STREAM_HELLO["chat"])) + chunk(b""))

    opened, ended = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Server(answer) as server:
            stream = open_stream(server)
            pieces = [next(stream) for _ in said]
            opened.set()
            with pytest.raises(LookupError):
                next(stream)
            with pytest.raises(serv.APIConnectionError) as caught:
                next(stream)
            assert pieces == said and stream.reply.partial
            assert caught.value.reply.text == "".join(said)
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, before)


# -- Errors in a stream: .reply has what had arrived --------------------------

@table("event, kind, status, message", {
    # Some of what "Which answers are errors" lists, over a socket.
    # What the type stands for, else a number in the code, else 500.
    "by type (Anthropic)": (
        'event: error\ndata: {"type": "error", "error": {"type": '
        '"overloaded_error", "message": "No."}}',
        "InternalServerError", 529, "No."),
    "by code (Perplexity)": (
        'event: error\ndata: {"error": {"message": "No.", '
        '"type": "invalid_request", "code": 400}}',
        "BadRequestError", 400, "No."),
    "by neither": ('data: {"error": {"message": "No.", "code": 600}}',
                   "InternalServerError", 500, "No."),
    # In other shapes.
    "a list (Gemini)": (
        'data: [{"error": {"code": 429, "message": "No."}}]',
        "RateLimitError", 429, "No."),
    "flat (DashScope)": (
        'data: {"code": "DataInspectionFailed", "message": "No."}',
        "InternalServerError", 500, "No."),
    "in a chunk (OpenRouter)": (
        'data: {"id": "c1", "error": {"code": 502, "message": "No."}, '
        '"choices": [{"index": 0, "delta": {"content": "no"}, '
        '"finish_reason": "error"}]}', "InternalServerError", 502, "No."),
    # By the event's name, whatever it holds.
    "a named text": ("event: error\ndata: No.",
                     "InternalServerError", 500, "No."),
    "a named [DONE]": ("event: error\ndata: [DONE]",
                       "InternalServerError", 500, "[DONE]"),
    "a named nothing": ("event: error\ndata:",
                        "InternalServerError", 500, ""),
    "a named event": ("event: error\ndata: " + json.dumps(chat_chunk()),
                      "InternalServerError", 500, json.dumps(chat_chunk()))})
@pytest.mark.parametrize("done", [False, True], ids=["open", "proven"])
@each_endpoint
def test_stream_an_error_event_is_raised_with_its_status(
        endpoint, done, event, kind, status, message):
    events = STREAM_HELLO[endpoint][:-1] if done else STREAM_OPEN[endpoint]
    error = stream_error(stream_bytes(
        sse(*events) + (event + "\n\n").encode() + sse("[DONE]")), endpoint)
    assert (type(error).__name__, error.status, error.message) == (
        kind, status, message)


@each_endpoint
def test_stream_an_error_as_the_first_event(endpoint):
    error = error_of(stream_answer(
        {"type": "error", "error": {"message": "No.", "code": 429}}),
        STREAM_READS[endpoint])
    assert (type(error), error.message) == (serv.RateLimitError, "No.")


STREAM_DEEP = "[" * 2000 + "]" * 2000


@table("endpoint, event", {
    "half an object": ("chat", "data: {"),
    "a text": ("chat", "data: Hello"),
    "no JSON": ("chat", "data: {'a': 1}"),
    "an object and more": ("chat", 'data: {"choices": []} x'),
    "half an object under a name": (
        "chat", 'event: chunk\ndata: {"choices": [{"delta": "LO'),
    "choices that are no list": ("chat", 'data: {"choices": 1}'),
    "a choice that is no object": ("chat", 'data: {"choices": [1]}'),
    "a delta that is no object": ("chat", 'data: {"choices": [{"delta": 1}]}'),
    "a text that becomes a number": (
        "chat", 'data: {"choices": [{"delta": {"content": 1}}]}'),
    "too deep": ("chat", 'data: {"choices": [], "a": %s}' % STREAM_DEEP),
    "half an event": ("messages", "event: content_block_delta\ndata: {"),
    "half an end": ("messages", "event: message_stop\ndata: [DONE"),
    "a block that is no object": (
        "messages", 'data: {"type": "content_block_start", "index": 1, '
                    '"content_block": 1}'),
    "a block's delta that is no object": (
        "messages", 'data: {"type": "content_block_delta", "index": 0, '
                    '"delta": [1]}'),
    "a delta of a block that was not begun": (
        "messages", 'data: {"type": "content_block_delta", "index": -1, '
                    '"delta": {"type": "text_delta", "text": "a"}}'),
    "too deep a block": (
        "messages", 'data: {"type": "content_block_start", "index": 1, '
                    '"content_block": {"type": "a", "a": %s}}' % STREAM_DEEP)})
def test_stream_a_broken_event_is_an_error(endpoint, event):
    data = sse(*STREAM_OPEN[endpoint]) + (event + "\n\n").encode()
    error = stream_error(stream_bytes(
        data + sse(*STREAM_HELLO[endpoint])), endpoint)
    assert type(error) is serv.APIResponseError


def test_stream_of_messages_input_that_is_too_deep_stays_text():
    """Of chat: test_deep_json_ends_no_process_with_a_small_stack."""
    deep = '{"a": %s}' % STREAM_DEEP
    answer = stream_build(serv.MessagesAssembler(), [
        stream_start(), *stream_blocks("begin tool_use | json " + deep),
        *stream_end()])
    assert serv.Reply(answer).tool_calls == [serv.ToolCall("x", "f", deep)]


# -- Random answers, as vendors stream them -----------------------------------
#
# A random answer is cut into a stream in the manner of a vendor, and this
# into packets: it comes back equal.  Cut short anywhere, it is not whole, and
# no call of a tool looks finished.  SERV_FUZZ=100000 tries that many.

FUZZ = int(os.environ.get("SERV_FUZZ") or 320)


@pytest.mark.parametrize("manner", [
    "OpenAI", "Gemini", "DeepSeek", "Mistral", "vLLM", "OpenRouter",
    "Anthropic", "gateway"])
def test_stream_fuzz_random_answers_as_vendors_stream_them(manner):
    chat = manner not in ("Anthropic", "gateway")
    now = []  # what the server sends

    def send(wire, request):
        wire.sendall(STREAM_HEAD)
        for packet in now:
            wire.sendall(chunk(packet) if packet else b"")
        wire.sendall(chunk(b""))

    with Server(send) as server:
        for turn in range(FUZZ // 8):
            rng = random.Random("%s %d" % (manner, turn))
            whole, events, proof = (fuzz_chat if chat else fuzz_messages)(
                rng, manner)
            expected, options = fuzz_clean(whole), {}
            if chat:
                options["n"] = len(whole["choices"])
            parts = fuzz_sse(rng, events)
            data = b"".join(parts)
            cut = data[:rng.randrange(len(b"".join(parts[:proof + 1])) - 1)]
            for body, good in ((data, True), (cut, False)):
                assembler = (serv.ChatAssembler(options["n"]) if chat
                             else serv.MessagesAssembler())
                now[:] = fuzz_packets(rng, body)
                text = fuzz_feed(assembler, now)
                answer = assembler.build()
                assert assembler.whole is good, (manner, turn)
                if good:
                    assert answer == expected, (manner, turn)
                    assert text == serv.Reply(expected).text, (manner, turn)
                else:
                    assert all(isinstance(given, str) for given in
                               fuzz_calls(answer)), (manner, turn)
                if turn % 20:
                    continue
                stream = open_stream(server, "chat" if chat else "messages",
                                     **options)
                if good:
                    assert "".join(stream) == text, (manner, turn)
                    assert stream.reply == expected, (manner, turn)
                    continue
                with pytest.raises(serv.APIConnectionError) as caught:
                    list(stream)
                assert caught.value.reply.partial
                assert caught.value.reply == answer, (manner, turn)
                for call in caught.value.reply.tool_calls:
                    assert isinstance(call.arguments, str), (manner, turn)


@each_endpoint
def test_stream_fuzz_whatever_an_event_holds_is_taken_or_broken(endpoint):
    for turn in range(FUZZ // 4):
        rng = random.Random(turn)
        chat = endpoint == "chat"
        _, events, _ = (fuzz_chat if chat else fuzz_messages)(rng, rng.choice(
            ["OpenAI", "Gemini", "Mistral", "OpenRouter"]))
        assembler = serv.ChatAssembler() if chat else serv.MessagesAssembler()
        for event in events:
            for _ in range(rng.choice([0, 0, 1, 2])):
                event = fuzz_change(rng, event)
            try:
                for each in serv.parse_events("message", json.dumps(event)):
                    if serv.find_error(each) is None:
                        assembler.add(each)
            except serv.APIResponseError:
                pass  # a broken event
        answer = assembler.build()
        json.dumps(answer, ensure_ascii=False).encode()
        serv.Reply(answer).text.encode()
        assert chat or assembler.whole or all(
            isinstance(given, str) for given in fuzz_calls(answer)), turn


# -- How a random answer is made ----------------------------------------------

FUZZ_TEXTS = ["a", "word ", "\n", "\t", "\x00", "\u00e9", "\x85", "\u2028",
              "\ud83d\ude00", "\ud83d", "\ude00", '"', "\\", "{", "data: "]


def fuzz_text(rng, texts=FUZZ_TEXTS):
    """Return a text, with emoji as two halves, and halves alone."""
    return "".join(rng.choices(texts, k=rng.randrange(12))) + "."


def fuzz_object(rng):
    """Return an object for a tool, or one that nobody knows."""
    def text():
        return fuzz_text(rng, FUZZ_TEXTS[:9]).encode(
            "utf-16", "surrogatepass").decode("utf-16")
    return {name: rng.choice([
        text(), rng.randrange(9), 0.5, True, [text(), {"a": text()}],
        {"index": 1, "text": text(), "type": "b"}])
        for name in rng.sample("abcd", rng.randrange(1, 4))}


def fuzz_json(rng):
    """Return an object as JSON text, with emoji escaped or as two halves."""
    text = json.dumps(fuzz_object(rng), ensure_ascii=rng.random() < 0.5)
    return text.replace("\U0001f600", "\ud83d\ude00")


def fuzz_cut(rng, text, most=4):
    """Return a text, or bytes, cut into pieces; some may be empty."""
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(most)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]


def fuzz_clean(value):
    """Return a value with halves joined, and U+FFFD for those alone."""
    text = json.dumps(json.loads(json.dumps(value)), ensure_ascii=False)
    return json.loads(re.sub("[\ud800-\udfff]", "\ufffd", text))


def fuzz_chat_message(rng, manner):
    """Return the message of a choice, and the deltas that say it."""
    text, thought = fuzz_text(rng), fuzz_text(rng)
    says, thinks = rng.random() < 0.8, rng.random() < 0.5
    message = {"role": "assistant", "content": text if says else None}
    deltas = [{"role": "assistant", "content": "" if says else None}]
    name = {"DeepSeek": "reasoning_content", "vLLM": "reasoning",
            "OpenRouter": "reasoning"}.get(manner)
    if manner == "OpenAI":
        message["refusal"] = deltas[0]["refusal"] = None
        if rng.random() < 0.1:
            message["refusal"] = thought
            deltas += [{"refusal": part} for part in fuzz_cut(rng, thought)]
    if thinks and name:
        message[name] = thought
        for part in fuzz_cut(rng, thought):
            deltas.append({name: part, "content": None})
            if manner == "OpenRouter":
                deltas[-1].update(stream_detail(part))
        if manner == "OpenRouter":
            message.update(stream_detail(thought, signature="S"))
            deltas.append(stream_detail("", signature="S"))
    if thinks and manner == "Mistral":
        message["content"] = stream_parts(
            stream_parts(thought), kind="thinking") + stream_parts(text)
        says = True
        deltas += [{"content": stream_parts(stream_parts(part),
                                            kind="thinking")}
                   for part in fuzz_cut(rng, thought)]
    if says:
        deltas += [{"content": part} for part in fuzz_cut(rng, text)]
    if rng.random() < 0.3:
        message["unknown"] = fuzz_object(rng)
        deltas.append({"unknown": message["unknown"]})
    calls, whole = [], []
    for index in range(rng.choice([0, 0, 1, 2, 3])):
        given = fuzz_json(rng)
        call = {"id": "call_%d" % index, "type": "function", "function": {
            "name": rng.choice("fg"), "arguments": given}}
        if manner == "Gemini":
            call.update(STREAM_SIGNED if index == 0 else {})
            if thinks:
                del call["id"]
            deltas.append({"tool_calls": [{**call, "index": 0}]})
        elif manner == "Mistral":
            whole.append(call)
        else:
            first, *more = fuzz_cut(rng, given)
            deltas.append({"tool_calls": [{
                **call, "index": index, "function": {
                    **call["function"], "arguments": first}}]})
            deltas += [{"tool_calls": [{"index": index, "function": {
                "arguments": part}}]} for part in more]
        calls.append(call)
    if calls:
        message["tool_calls"] = calls
    if whole:
        deltas.append({"tool_calls": whole})
    return message, deltas


def fuzz_chat(rng, manner):
    """Return an answer, its events, and which of them proves it whole."""
    answer = {"id": "c1", "object": "chat.completion", "created": 1,
              "model": "m", "unknown": fuzz_object(rng)}
    usage = {"prompt_tokens": rng.randrange(99), "completion_tokens": 9}
    choices, queues, chunks = [], [], []
    count = rng.choice([1, 1, 2, 3]) if manner in ("OpenAI", "vLLM") else 1
    for index in range(count):
        message, deltas = fuzz_chat_message(rng, manner)
        steps = [{"index": index, "delta": delta, "finish_reason": None}
                 for delta in deltas]
        if manner in ("OpenAI", "vLLM", "OpenRouter"):
            steps.append({"index": index, "delta": {}})
        finish = rng.choice(["stop", "length", "tool_calls"])
        steps[-1]["finish_reason"] = finish
        choice = {"index": index, "message": message, "finish_reason": finish}
        if manner == "OpenAI":
            choice["logprobs"] = {"content": [], "refusal": None}
            for step in steps:
                token = {"token": fuzz_text(rng)}
                step["logprobs"] = {"content": [token], "refusal": None}
                choice["logprobs"]["content"].append(token)
        queues.append(steps)
        choices.append(choice)
    while any(queues):
        step = rng.choice([steps for steps in queues if steps]).pop(0)
        chunks.append({**answer, "object": "chat.completion.chunk",
                       "choices": [step]})
        if manner == "OpenAI":
            chunks[-1].update(usage=None, obfuscation=fuzz_text(rng))
        elif manner in ("Gemini", "vLLM"):
            chunks[-1]["usage"] = {**usage, "completion_tokens": len(chunks)}
    proof = len(chunks) - 1
    if manner in ("OpenAI", "OpenRouter"):
        chunks.append({**chunks[-1], "choices": []})
    chunks[-1]["usage"] = usage
    done = ["[DONE]"] if rng.random() < 0.8 else []
    return {**answer, "choices": choices, "usage": usage}, [
        *chunks, *done], proof


def fuzz_block(rng):
    """Return a content block, as it begins, and the deltas that fill it."""
    kind = rng.choice(["text", "text", "thinking", "tool_use",
                       "server_tool_use", "redacted_thinking", "picture"])
    if kind == "text":
        block = {"type": kind, "text": fuzz_text(rng)}
        deltas = [{"type": "text_delta", "text": part}
                  for part in fuzz_cut(rng, block["text"])]
        if rng.random() < 0.3:
            block["citations"] = [fuzz_object(rng) for _ in deltas]
            deltas += [{"type": "citations_delta", "citation": cited}
                       for cited in block["citations"]]
        return block, {"type": kind, "text": ""}, deltas
    if kind == "thinking":
        block = {"type": kind, "thinking": fuzz_text(rng), "signature": "S"}
        return block, {**block, "thinking": "", "signature": ""}, [
            *({"type": "thinking_delta", "thinking": part}
              for part in fuzz_cut(rng, block["thinking"])),
            {"type": "signature_delta", "signature": "S"}]
    if kind.endswith("tool_use"):
        given = fuzz_json(rng) if rng.random() < 0.8 else ""
        block = {**STREAM_TOOL, "type": kind, "input": json.loads(
            given or "{}")}
        return block, {**block, "input": {}}, [
            {"type": "input_json_delta", "partial_json": part}
            for part in fuzz_cut(rng, given)]
    block = {"type": kind, "data": fuzz_object(rng)}
    return block, block, []


def fuzz_messages(rng, manner):
    """Return an answer, its events, and which of them proves it whole."""
    unknown = {"unknown": fuzz_object(rng)}
    blocks, events = [], [stream_start(**unknown)]
    for index in range(rng.randrange(1, 5)):
        block, begins, deltas = fuzz_block(rng)
        blocks.append(block)
        events.append({"type": "content_block_start", "index": index,
                       "content_block": begins})
        for delta in deltas:
            events.append({"type": "content_block_delta", "index": index,
                           "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
        if rng.random() < 0.3:
            events.append({"type": rng.choice(["ping", "news"])})
    if manner == "gateway":  # LiteLLM and its kin
        for event in events:
            if "index" in event:
                event["index"] = 0
    reason = rng.choice(["end_turn", "tool_use", "max_tokens"])
    details = {"stop_details": fuzz_object(rng)}
    return messages_whole(blocks, reason, **unknown, **details), [
        *events, *stream_end(reason, **details)], len(events)


def fuzz_sse(rng, events):
    """Return each event as bytes, in one of the forms that servers choose."""
    end = rng.choice(["\n", "\r\n", "\r"])
    space, named = rng.choice([" ", ""]), rng.random() < 0.5
    parts = []
    for event in events:
        text = event
        if isinstance(event, dict):
            text = json.dumps(event, ensure_ascii=rng.random() < 0.5)
            if re.search("[\ud800-\udfff]", text):
                text = json.dumps(event)
        lines = ["data:" + space + text, "", ""]
        if named and "type" in event:
            lines.insert(0, "event: " + event["type"])
        if rng.random() < 0.1:
            lines.insert(0, ": still here" + end)
        parts.append(end.join(lines).encode())
    return [rng.choice([b"\xef\xbb\xbf", b"", b""]) + parts[0], *parts[1:]]


def fuzz_feed(assembler, packets):
    """Give packets to an assembler; return the text that they add."""
    return "".join([
        assembler.add(event) for pair in serv.iter_events(packets)
        for event in serv.parse_events(*pair)])


def fuzz_packets(rng, data):
    """Return data cut into packets."""
    if rng.random() < 0.1:
        return [data[i:i + 1] for i in range(len(data))]
    return fuzz_cut(rng, data, 40)


def fuzz_calls(answer):
    """Return the arguments of the calls of all tools in an answer."""
    return [call["function"]["arguments"]
            for choice in answer.get("choices", [])
            for call in choice["message"].get("tool_calls", [])] + [
        block["input"] for block in answer.get("content", [])
        if "input" in block]


def fuzz_change(rng, value):
    """Return JSON of which one value, at random, is another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        value = copy.copy(value)
        key = rng.choice(list(value) if isinstance(value, dict)
                         else range(len(value)))
        value[key] = fuzz_change(rng, value[key])
        return value
    return rng.choice([None, 0, -1, 0.5, True, "", "x", [], {}, ["x"], [[]],
                       [{}], {"a": 1}, {"index": {}}, [{"text": []}]])


# ---------------------------------------------------------------------------
# Network
#
# What can happen to a connection, and how a call ends then.
# ---------------------------------------------------------------------------

# Nothing came, or not all of it; or it came and is no answer.
NET_FAIL, NET_ODD = serv.APIConnectionError, serv.APIResponseError


NET_OK = http_answer(bare_answer("Hello!"))
NET_STREAM = stream_answer(bare_chunk("Hel"), bare_chunk("lo!", "stop"),
                           "[DONE]")
NET_CHUNKED = http_head(transfer_encoding="chunked")
NET_BEGUN = STREAM_HEAD + chunk(sse(bare_chunk("Hel")))
NET_END = chunk(b"")


def net_prompt(request):
    """Return the prompt of a request."""
    return body_of(request)["messages"][-1]["content"]


def net_echo(wire, request):
    """Answer with the prompt, as a stream if the request wants one."""
    text = net_prompt(request)
    if body_of(request).get("stream"):
        wire.sendall(stream_answer(bare_chunk(text[:1]),
                                   bare_chunk(text[1:], "stop"), "[DONE]"))
    else:
        wire.sendall(http_answer(bare_answer(text)))


def net_reset(data=b""):
    """Return an answer that sends data and then resets the connection."""
    def answer(wire, request):
        wire.sendall(data)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(
            "hh" if os.name == "nt" else "ii", 1, 0))
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


class NetBare(Server):
    """A server whose function gets each wire before any request is read."""

    def converse(self, wire, number):
        with wire, contextlib.suppress(OSError):
            self.answers[0](wire)


@contextlib.contextmanager
def net_deaf(full=False):
    """Listen, and never accept; with a full backlog nobody gets in."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(64 if full else 0):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.02)[1]:
                break
        yield listener.getsockname()[1]


@pytest.fixture
def net_names(monkeypatch):
    """Hosts of the tests' own, each a list of addresses; others have none.

    The names of a system's resolver cannot be had for a test.
    """
    names, look_up = {}, socket.getaddrinfo

    def find(host, port, *args, **options):
        if not host.endswith(".test"):
            return look_up(host, port, *args, **options)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name not known")
        return [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                 socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
                for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    return names


def net_chat(server, prompt="Hi", **options):
    """Return the text of an answer; without retries, if none are asked for."""
    options = {"system": "s", "max_retries": 0, "timeout": 20.0,
               "base_url": getattr(server, "url", server), **options}
    return serv.chat(prompt, **options).text


def net_stream(server, prompt="Hi", **options):
    """Return the text of a stream, in the same way."""
    return "".join(open_stream(server, prompt=prompt, **options))


net_calls = pytest.mark.parametrize("call", [net_chat, net_stream])


def net_error(kind, call, *args, **options):
    """Return the error that a call raises, of this class and no other."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert type(caught.value) is kind
    return caught.value


def net_within(seconds, work, least=0):
    """Return what work() does; if it is late, it gets a second chance.

    It is never to take less than the least.
    """
    for _ in range(2):
        begun = time.monotonic()
        result = work()
        elapsed = time.monotonic() - begun
        assert elapsed >= least
        if elapsed <= seconds:
            break
    assert elapsed <= seconds
    return result


NET_PRELUDE = """
import os, sys, serv
ask = dict(system="s", base_url=sys.argv[1], timeout=20.0, max_retries=0)
"""


def net_run(script, *args, flags=(), prelude=NET_PRELUDE):
    """Run a Python script, which finds serv, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", prelude + script, *map(str, args)],
        env=dict(os.environ, PYTHONPATH=ROOT,
                 PYTHONDONTWRITEBYTECODE=""),  # it is compiled once
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
        universal_newlines=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def net_context(folder, certificate="good"):
    """Return the TLS context of a server with one of NET_CERTIFICATES."""
    path = os.path.join(str(folder), "server.pem")
    with open(path, "w") as file:
        file.write(NET_CERTIFICATES[certificate] + NET_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
def net_ca(tmp_path, monkeypatch):
    """Trust the CA of the tests; return the file that it is in."""
    path = tmp_path / "6f7000d9.0"  # as `openssl x509 -hash` names it
    path.write_text(NET_CA)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


@pytest.fixture
def net_tls(net_ca, tmp_path):
    """Trust the CA of the tests; return the TLS context of its server."""
    return net_context(tmp_path)


@contextlib.contextmanager
def net_silent(place, context):
    """Yield the URL and the server of what is silent at a place of a call.

    Nobody gets in where it is silent at "connect": there is no server.
    """
    if place == "connect":
        with net_deaf(full=True) as port:
            yield "http://127.0.0.1:%d" % port, None
        return
    if place in ("handshake", "upload"):
        over = threading.Event()
        with NetBare(lambda wire: over.wait(20)) as server:
            try:
                yield ("https" if place == "handshake" else "http") + (
                    server.url[4:]), server
            finally:
                over.set()
        return
    answer = {"head": net_hold(), "TLS": net_hold(),
              "body": net_hold(STREAM_HEAD), "stream": net_hold(NET_BEGUN),
              "the wait for a retry": http_answer(
                  {}, "503 Busy", retry_after=1)}[place]
    with Server(answer, context if place == "TLS" else None) as server:
        yield server.url, server


plain_and_tls = pytest.mark.parametrize(
    "secure", [False, True], ids=["plain", "TLS"])
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_alarm = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs SIGALRM")


# -- One budget bounds the whole call -----------------------------------------

NET_BUDGET = 0.06


def net_timeout(call, *args, **options):
    """Return the error of a call that ends with its budget, in time."""
    # 20 ms early is in time: clocks and waits of some systems are coarse.
    return net_within(NET_BUDGET + 0.5, lambda: net_error(
        serv.APITimeoutError, call, *args, timeout=NET_BUDGET, **options),
        least=NET_BUDGET - 0.03)


@table("call, answer", {
    "interim answers": (net_chat, net_drip(
        b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0)),
    "a header": (net_chat, net_drip(b"HTTP/1.1 200 OK\r\nX: ", b"x")),
    "headers": (net_stream, net_drip(
        b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.03)),
    "a body": (net_chat, net_drip(http_head(content_length=10 ** 6), b" ")),
    "chunks": (net_chat, net_drip(NET_CHUNKED, chunk(b" "))),
    "the size of a chunk": (net_chat, net_drip(NET_CHUNKED, b"0")),
    "comments": (net_stream, net_drip(STREAM_HEAD, chunk(b": ping\n\n"))),
    "trailers": (net_chat, net_drip(
        NET_CHUNKED + NET_END[:-2], b"X: y\r\n", 0)),
    "pings": (net_stream, net_drip(
        STREAM_HEAD, chunk(b"event: ping\ndata: {}\n\n")))})
def test_no_drip_stretches_the_budget(call, answer):
    with Server(answer) as server:
        error = net_timeout(call, server, max_retries=2)
    assert "0.06 s" in str(error) and server.url in str(error)


def test_an_error_whose_body_drips_is_that_error(clock, received):
    def answer(wire, request):
        received.clear()
        wire.sendall(http_head("500 Oops"))
        while not received:  # until the head has come
            time.sleep(0.001)
        clock(20)
        net_drip(b"", b"x")(wire, request)

    with Server(answer) as server:
        net_error(serv.InternalServerError, net_chat, server, timeout=20)


@pytest.mark.parametrize("place", [
    "connect", "handshake", "upload", "head", "TLS", "body"])
def test_a_silent_server_ends_with_the_budget(place, net_tls):
    prompt = "x" * (1 << 23 if place == "upload" else 1)
    with net_silent(place, net_tls) as (url, _):
        net_timeout(net_stream, url, prompt)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_drips_ends_with_the_budget(scheme, monkeypatch):
    with Server(net_drip(b"HTTP/1.1 200 OK\r\n", b"X-More: x\r\n")) as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        net_timeout(net_chat, scheme + "://host.test")


def test_the_last_20_ms_of_a_budget_count_as_over():
    """Clocks and waits of some systems are no finer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        net_error(serv.APITimeoutError, net_chat, "http://127.0.0.1:%d"
                  % closed.getsockname()[1], timeout=0.015)


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses when it is full")
@table("addresses, limit, timeout, end", {
    "gives way to the next": (["dead", "live"], 0.06, 10, "Hello!"),
    "takes its share of a small budget": (
        ["dead", "live"], 10, 0.4, "Hello!"),
    "does not take the whole budget": (["dead"], 0.06, 10, NET_FAIL),
    "does not add up with others": (
        ["dead"] * 9, 0.03, 0.15, serv.APITimeoutError)})
def test_an_address_that_does_not_answer(
        addresses, limit, timeout, end, net_names, monkeypatch):
    def call():
        try:
            return net_chat("http://a.test", timeout=timeout)
        except serv.ServError as error:
            return type(error)

    monkeypatch.setattr(serv, "CONNECT_TIMEOUT", limit)
    with net_deaf(full=True) as dead, Server(NET_OK) as server:
        ports = {"dead": dead, "live": server.port}
        net_names["a.test"] = [
            ("127.0.0.1", ports[each]) for each in addresses]
        # A busy machine gets a second chance to connect in time.
        assert net_within(1.5, call) == end or net_within(1.5, call) == end


def test_an_address_of_a_family_that_the_system_lacks_gives_way(monkeypatch):
    with Server(NET_OK) as server:
        live = (socket.AF_INET, socket.SOCK_STREAM, 0, "",
                ("127.0.0.1", server.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [
            (250, socket.SOCK_STREAM, 0, "", ("x", 1)), live])
        assert net_chat(server) == "Hello!"


def test_a_timeout_is_not_tried_again(clock):
    """The budget is the whole call's, and it is spent."""
    def answer(wire, request):
        clock(20)
        net_drip(b"", b"H")(wire, request)

    with Server(answer) as server:
        error = net_error(serv.APITimeoutError, net_chat, server,
                          max_retries=2, timeout=20)
        assert len(server.requests) == 1 and error.retries == 0


def test_the_body_of_an_error_is_not_waited_for_until_the_end(monkeypatch):
    monkeypatch.setattr(serv, "ERROR_SECONDS", 0.05)

    def stall(wire, request):
        wire.sendall(http_head("503 Busy", content_length=99) + b"half")
        wire.recv(1)
        return False

    with Server([stall, stall, NET_OK]) as server:
        error = net_error(serv.InternalServerError, net_chat, server,
                          max_retries=0)
        assert (error.status, error.body) == (503, "half")
        assert net_chat(server, max_retries=1) == "Hello!"


def test_all_tries_share_one_budget(clock):
    def busy(wire, request):
        clock(12)
        data = error_answer(503)
        if len(server.requests) == 2:
            data = data[:9]  # so that the client must wait once more
        wire.sendall(data)

    with Server(busy) as server:
        error = net_error(serv.APITimeoutError, net_chat, server,
                          max_retries=5, timeout=20)
        assert error.retries == 1 and len(server.requests) == 2


def test_a_wait_that_the_budget_cannot_hold_is_not_begun():
    with Server(http_answer({}, "503 Busy", retry_after="25")) as server:
        net_error(serv.InternalServerError, net_chat, server, max_retries=9)
        assert len(server.requests) == 1


def test_a_stream_out_of_time_keeps_what_had_arrived(clock):
    arrived = threading.Event()

    def answer(wire, request):
        wire.sendall(NET_BEGUN)
        arrived.wait(10)
        clock(20)
        net_drip(b"", b"1")(wire, request)

    with Server(answer) as server:
        stream = open_stream(server, timeout=20)
        assert next(stream) == "Hel"
        arrived.set()
        error = net_error(serv.APITimeoutError, next, stream)
    assert (error.reply.text, error.reply.partial) == ("Hel", True)


def test_the_budget_runs_on_while_the_caller_holds_a_piece(clock):
    answer = stream_answer(bare_chunk("Hel"), bare_chunk("lo", "stop"))
    with Server(answer) as server:
        stream = open_stream(server, timeout=20)
        assert next(stream) == "Hel"
        clock(20)
        for _ in range(2):
            error = net_error(serv.APITimeoutError, next, stream)
    assert (error.reply.text, error.reply.partial) == ("Hel", True)


@pytest.mark.parametrize("endpoint, events", [
    ("chat", [bare_chunk("Hel", "stop"),
              {"choices": [], "usage": {"n": 1}}, "[DONE]"]),
    ("messages", [*stream_said("Hel"), *stream_end()])],
    ids=["chat: usage, [DONE]", "messages: message_stop"])
def test_what_is_here_behind_a_proven_end_is_never_too_late(
        endpoint, events, clock):
    with Server(stream_answer(*events)) as server:
        stream = open_stream(server, endpoint, timeout=20)
        seen = stream.events()
        while not stream.reply.stop_reason:
            next(seen)
        clock(20)
        assert len(list(seen)) == 1
    assert (stream.reply.text, stream.reply.partial) == ("Hel", False)
    assert stream.reply.usage


# -- Retries ------------------------------------------------------------------
#
# That max_retries is 2 if it is not given: test_the_arguments_of_a_call, and
# test_by_default_a_call_is_tried_three_times.

def net_advice(status, advice):
    """Return an error answer that says whether to try again."""
    return http_answer({}, "%d No" % status, retry_after_ms="0",
                       x_should_retry=advice)


@table("call, answer, tries", {
    "503": (net_chat, error_answer(503), 2),
    "503 to a stream": (net_stream, error_answer(503), 2),
    "400": (net_chat, error_answer(400), 1),
    "400 to a stream": (net_stream, error_answer(400), 1),
    "400 with x-should-retry: true": (net_chat, net_advice(400, "true"), 2),
    "503 with x-should-retry: false": (net_chat, net_advice(503, "false"), 1),
    "a cut answer": (net_chat, closing(NET_OK[:-5]), 2),
    "the head of a stream": (net_stream, closing(STREAM_HEAD), 1),
    "a piece of a stream": (net_stream, closing(NET_BEGUN), 1),
    "an error event": (net_stream, closing(STREAM_HEAD + chunk(sse({"error": {
        "type": "overloaded_error"}}))), 1)})
def test_what_is_tried_again_with_the_same_body(call, answer, tries, naps):
    with Server([answer, net_echo]) as server:
        if tries == 2:
            assert call(server, max_retries=1) == "Hi"
            assert server.requests[0].body == server.requests[1].body
        else:
            with pytest.raises(serv.ServError) as caught:
                call(server, max_retries=1)
            assert caught.value.retries == 0
        assert len(server.requests) == tries


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_a_call_is_retried_as_often_as_max_retries_says(retries):
    with Server(error_answer(503)) as server:
        error = net_error(serv.InternalServerError, net_chat, server,
                          max_retries=retries)
        assert error.retries == retries == len(server.requests) - 1


@pytest.mark.parametrize("call", CALLS)
def test_by_default_a_call_is_tried_three_times(call):
    with Server(error_answer(503)) as server:
        error = net_error(serv.InternalServerError, call, "Hi", system="s",
                          base_url=server.url)
        assert error.retries == 2 == len(server.requests) - 1


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_reply_says_how_many_tries_had_failed(failures):
    answers = [error_answer(503)] * failures + [net_echo]
    with Server(answers * 2) as server:
        reply = serv.chat("Hi", system="s", base_url=server.url,
                          max_retries=3)
        with open_stream(server, max_retries=3) as stream:
            assert reply.text == "".join(stream) == "Hi"
        assert reply.retries == stream.reply.retries == failures


def test_a_refused_connection_is_tried_again(naps):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = "http://127.0.0.1:%d" % closed.getsockname()[1]
        error = net_error(NET_FAIL, net_chat, url, max_retries=1)
    assert error.retries == 1 and url + CHAT in str(error)
    assert isinstance(error.__cause__, ConnectionRefusedError)
    assert len(naps) == 1 and 0.375 <= naps[0] <= 0.5


def test_a_host_without_an_address_is_a_connection_error(net_names):
    error = net_error(NET_FAIL, net_chat, "http://a.test")
    assert re.search("Name not known.*http://a.test/", str(error))


NET_DATE = 2000000000  # in the year 2033


@table("headers, seconds", {
    "Retry-After: none": ({"retry_after": "0"}, 0),
    "retry-after-ms: none": ({"retry_after_ms": "0"}, 0),
    "Retry-After: longer than by default": ({"retry_after": "9.5"}, 9.5),
    "retry-after-ms: longer than by default": (
        {"retry_after_ms": "9500"}, 9.5),
    "Retry-After: until a date": ({"retry_after": email.utils.formatdate(
        NET_DATE, usegmt=True)}, 1.25)})
def test_the_wait_is_what_the_server_says(headers, seconds, naps, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NET_DATE - 1.25)
    slow = http_answer({}, "429 Slow", **headers)
    with Server([slow, slow, NET_OK]) as server:
        assert net_chat(server, max_retries=2, timeout=60) == "Hello!"
    assert naps == [seconds] * 2


def test_each_retry_is_a_warning_of_the_logger_serv(caplog):
    with Server([error_answer(503), error_answer(429), NET_OK]) as server:
        net_chat(server, max_retries=2)
    assert [(each.name, each.levelname) for each in caplog.records] == [
        ("serv", "WARNING")] * 2
    assert "503" in caplog.messages[0] and "429" in caplog.messages[1]
    assert KEY not in caplog.text


NET_LOADS_NOTHING = """
serv.chat("Hi", **ask)
known = set(sys.modules)
for call in serv.chat, serv.stream:
    try:
        "".join(call("Hi", **dict(ask, max_retries=1)))
    except serv.BadRequestError as error:
        print(error.retries, "logging" in sys.modules)
print(*(set(sys.modules) - known))
"""


def test_a_failure_loads_nothing_and_without_logging_says_nothing():
    """Out of files it could load nothing; and loading may wait for a lock."""
    failures = [error_answer(503), error_answer(400)] * 2
    with Server([NET_OK, *failures]) as server:
        assert net_run(NET_LOADS_NOTHING, server.url) == (
            "1 False\n1 False\n\n")


# -- Kept connections ---------------------------------------------------------

def test_twenty_calls_share_one_connection():
    with Server(net_echo) as server:
        for number in range(20):
            call = (net_chat, net_stream)[number % 2]
            assert call(server, "no. %d" % number) == "no. %d" % number
        assert server.connections == 1


@table("first, kept", {
    "an error answer": (http_answer({}, "400 Bad"), True),
    "an error of a 200": (http_answer({"error": {"message": "no"}}), True),
    "Connection: close": (http_answer(
        bare_answer(""), connection="close"), False),
    "close in a list": (http_answer(
        bare_answer(""), connection="Keep-Alive, Close"), False),
    "HTTP/1.0": (NET_OK.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
    "a stream that is to be closed": (NET_STREAM.replace(
        b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1), False),
    "no last chunk": (NET_STREAM[:-len(NET_END)], False),
    "a chunk far below 0 in its place": (
        NET_STREAM[:-len(NET_END)] + b"-" + b"f" * 24 + b"\r\n", False),
    "an error event": (stream_answer({"error": {"message": "no"}}), False),
    "an unknown encoding": (http_head(
        transfer_encoding="gzip, chunked", content_length=0) + NET_OK,
        False)})
def test_after_which_answers_a_connection_is_kept(first, kept):
    with Server([first, net_echo]) as server:
        with contextlib.suppress(serv.ServError):
            (net_stream if b"event-" in first else net_chat)(server)
        assert net_chat(server, "mine") == "mine"
        assert server.connections == (1 if kept else 2)


def test_a_last_chunk_that_comes_after_done_neither_delays_nor_breaks(
        monkeypatch):
    monkeypatch.setattr(serv, "LAST_CHUNK_SECONDS", 2)
    over = {}

    def answer(wire, request):
        text = net_prompt(request)
        data = stream_answer(bare_chunk(text, "stop"), "[DONE]")
        wire.sendall(data[:-len(NET_END)])
        over[text].wait(5)
        wire.sendall(NET_END)

    def call():
        for text in "abcdef":
            over[text] = threading.Event()
            assert net_stream(server, text) == text
            over[text].set()

    with Server(answer) as server:
        # Who waited for a last chunk at [DONE] would wait each time.
        net_within(serv.LAST_CHUNK_SECONDS, call)
        assert server.connections == 1


def test_last_chunks_that_never_come_delay_a_call_once_together(monkeypatch):
    monkeypatch.setattr(serv, "LAST_CHUNK_SECONDS", 0.1)

    def answer(wire, request):
        if b"stream" in request.body:
            wire.sendall(NET_STREAM[:-len(NET_END)])
        else:
            wire.sendall(NET_OK)

    with Server(answer) as server:
        streams = [open_stream(server) for _ in range(20)]
        for stream in streams:
            assert "".join(stream) == "Hello!"
        begun = time.monotonic()
        net_chat(server)
        assert time.monotonic() - begun < 1  # with a limit for each: 2
        assert server.connections == 21


def test_a_stream_closed_early_leaves_its_rest_to_nobody():
    with Server([NET_STREAM, net_echo]) as server:
        with open_stream(server) as stream:
            assert next(stream) == "Hel"
        assert net_chat(server, "mine") == "mine"
        assert server.connections == 2


@pytest.mark.parametrize("call", [serv.chat, chat_streamed])
@table("answers, connections, good", {
    # what the server does, and which connection each request comes on
    "closed while idle": ([closing(NET_OK), net_echo], [1, 2], True),
    "reset while idle": ([net_reset(NET_OK), net_echo], [1, 2], True),
    "closed as the request comes": (
        [NET_OK, closing(b""), net_echo], [1, 1, 2], True),
    "reset as the request comes": (
        [NET_OK, net_reset(), net_echo], [1, 1, 2], True),
    "closed behind a byte": (
        [NET_OK, closing(b"H"), net_echo], [1, 1], False),
    "closed behind a head": (
        [NET_OK, closing(STREAM_HEAD), net_echo], [1, 1], False)})
def test_a_kept_connection_that_is_lost_is_replaced_without_a_retry(
        call, answers, connections, good, monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 20)  # also on a busy machine
    with Server(answers) as server:
        assert net_chat(server) == "Hello!"
        if connections[1] == 2:
            server.threads[1].join(10)  # until the server has closed it
        options = {"system": "s", "base_url": server.url, "max_retries": 0}
        if good:
            reply = call("Hi", **options)
            assert (reply.text, reply.retries) == ("Hi", 0)
        else:
            assert net_error(NET_FAIL, call, "Hi", **options).retries == 0
        assert [each.connection for each in server.requests] == connections


def test_what_replaces_a_connection_that_broke_off_an_upload_is_kept(
        monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 20)

    def answer(wire):
        is_first = server.connections == 1
        with wire.makefile("rb") as reader:
            while read_request(reader, 0):
                wire.sendall(NET_OK)
                if is_first:
                    wire.recv(1 << 10)  # of the next request, a part
                    break

    with NetBare(answer) as server:
        for prompt in ("Hi", "x" * (1 << 23), "Hi", "Hi"):
            assert net_chat(server, prompt, max_retries=0) == "Hello!"
        assert server.connections == 2


def test_a_new_connection_that_is_lost_is_not_replaced():
    with Server([closing(b""), NET_OK]) as server:
        net_error(NET_FAIL, net_chat, server, max_retries=0)
        assert len(server.requests) == 1


@pytest.mark.parametrize("size", [999, 20], ids=["whole", "in part"])
def test_a_408_that_nobody_asked_for_is_not_the_next_answer(size):
    late = http_answer({"error": {"message": "idle"}}, "408 Request Timeout",
                       connection="close")[:size]
    called, was_late = threading.Event(), threading.Event()

    def answer(wire, request):
        if request.connection > 1:
            return net_echo(wire, request)
        wire.sendall(NET_OK)
        called.wait(10)
        wire.sendall(late)
        was_late.set()

    with Server(answer) as server:
        assert net_chat(server) == "Hello!"
        called.set()
        was_late.wait(10)
        assert net_chat(server, "mine") == "mine"
        assert server.connections == 2


def test_a_request_that_was_held_for_a_second_is_not_sent_again(monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 0)  # instead of a second
    with Server([NET_OK, closing(b""), NET_OK]) as server:
        net_chat(server)
        net_error(NET_FAIL, net_chat, server, max_retries=0)
        assert len(server.requests) == 2


def test_a_lost_request_is_not_sent_to_every_kept_connection(monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 20)
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
        net_error(NET_FAIL, net_chat, server, max_retries=0)
        # Four opened the connections.  The fifth was lost with one of them,
        # and was sent once more.
        assert len(server.requests) == 6


def test_a_call_is_sent_once_more_only_once(monkeypatch):
    monkeypatch.setattr(serv, "STALE_SECONDS", 20)
    # Of the second call: lost; sent once more; tried again, and lost again.
    with Server([NET_OK, closing(b""), error_answer(503), closing(b""),
                 NET_OK]) as server:
        net_chat(server)
        error = net_error(NET_FAIL, net_chat, server, max_retries=1)
        assert len(server.requests) == 4
    assert error.retries == 1


def test_after_101_no_connection_is_kept():
    with Server([b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
                 NET_OK]) as server:
        net_error(serv.APIStatusError, net_chat, server)
        assert net_chat(server) == "Hello!"
        assert server.connections == 2


def test_of_too_many_the_oldest_is_dropped(monkeypatch):
    monkeypatch.setattr(serv, "MAX_IDLE", 2)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(net_echo)) for _ in range(4)]
        for server in servers + servers[::-1]:
            net_chat(server)
        assert [each.connections for each in servers] == [2, 2, 1, 1]


def test_no_more_than_max_idle_are_kept(monkeypatch):
    monkeypatch.setattr(serv, "MAX_IDLE", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            net_chat(stack.enter_context(Server(net_echo)))
        assert len(serv._idle) == 2


def test_an_old_connection_is_not_used(monkeypatch):
    with Server(net_echo) as server:
        net_chat(server)
        monkeypatch.setattr(serv, "IDLE_SECONDS", 0)
        net_chat(server)
        assert server.connections == 2


def test_64_threads_get_their_own_answers_and_keep_their_connections():
    together = threading.Barrier(64, timeout=20)

    def work(number):
        for turn in range(3):
            together.wait()
            mine = "%d of %d" % (turn, number)
            call = net_stream if (turn + number) % 3 == 0 else net_chat
            assert call(server, mine) == mine
        return number

    with Server(net_echo) as server:
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert list(pool.map(work, range(64))) == list(range(64))
        assert server.connections <= 64


def test_closing_what_is_idle_disturbs_no_thread_that_calls():
    def work(number):
        return [net_chat(server, str(number)) for _ in range(40)]

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Server(net_echo) as server:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                ends = [pool.submit(work, number) for number in range(4)]
                while not all(end.done() for end in ends):
                    serv.close_idle()
            assert [end.result() for end in ends] == [
                [str(number)] * 40 for number in range(4)]
    finally:
        sys.setswitchinterval(switch)


# -- Sockets, descriptors, forks ----------------------------------------------

def net_options(port, level, option):
    """Return an option of each socket of this process that leads to a port."""
    if not os.path.isdir("/dev/fd"):
        pytest.skip("this system does not list the files of a process")
    values = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            number = os.dup(int(name))
            try:
                sock = socket.socket(fileno=number)
            except OSError:
                os.close(number)
                continue
            with sock:
                if sock.getpeername()[1] == port:
                    values.append(sock.getsockopt(level, option))
    return values


@table("level, option, value", {
    "small packets go at once": (socket.IPPROTO_TCP, "TCP_NODELAY", True),
    "quiet paths are kept open": (socket.SOL_SOCKET, "SO_KEEPALIVE", True),
    "from a minute on": (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60),
    "dead paths are noticed": (
        socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 30000)})
def test_the_options_of_a_socket(level, option, value):
    if not hasattr(socket, option):
        pytest.skip("this system has no " + option)
    with Server(net_echo) as server:
        net_chat(server)
        [found] = net_options(server.port, level, getattr(socket, option))
    assert type(value)(found) == value  # of a flag, any bit is true


def test_an_option_that_the_system_refuses_is_skipped(monkeypatch):
    monkeypatch.setattr(socket, "TCP_KEEPIDLE", 9999, raising=False)
    with socket.socket() as sock, pytest.raises(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, 9999, 1)
    with Server(NET_OK) as server:
        assert net_chat(server) == "Hello!"


def net_scoped():
    """Return a link-local address of this machine and its scope."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for address, scope, *_ in map(str.split, file):
            if address.startswith("fe80"):
                return ":".join(re.findall("....", address)), int(scope, 16)
    pytest.skip("no link-local address is known of this machine")


def test_a_link_local_address_keeps_its_scope(net_names):
    host, scope = net_scoped()
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind((host, 0, 0, scope))
        listener.listen(1)
        listener.settimeout(5)
        net_names["a.test"] = [listener.getsockname()]
        net_error(serv.APITimeoutError, net_chat, "http://a.test", timeout=.1)
        listener.accept()[0].close()  # it had connected


NET_CLOSED_UNDERNEATH = """
for turn in range(2):
    serv.chat("Hi", **ask)
    os.closerange(3, 64)  # as a daemon does
    assert serv.chat("Hi", **ask).text == "Hi"
    stream = serv.stream("Hi", **ask)
    assert next(stream) == "H"
    os.closerange(3, 64)
    try:
        next(stream)
    except serv.APIConnectionError as error:
        print(type(error).__name__, error.reply.text)
"""


@pytest.mark.skipif(os.name == "nt", reason="sockets are no descriptors")
def test_a_descriptor_closed_underneath_heals(net_tls):
    def answer(wire, request):
        if not body_of(request).get("stream"):
            return net_echo(wire, request)
        wire.sendall(STREAM_HEAD + chunk(sse(bare_chunk("H"))))

    with Server(answer, net_tls) as server:
        assert net_run(NET_CLOSED_UNDERNEATH, server.url) == (
            "APIConnectionError H\n" * 2)


NET_FORK = """
for action in "read", "close", "exit":
    assert serv.chat("warm", **ask).text == "warm"
    stream = serv.stream("stream", **ask)
    assert next(stream) == "Hel"
    assert serv.chat("to be kept", **ask).text == "to be kept"
    child = os.fork()
    if not child:
        for text in "child 1", "child 2", "child 3":
            assert serv.chat(text, **ask).text == text
        if action == "read":
            try:
                next(stream)
                raise SystemExit("it is the parent's")
            except serv.APIConnectionError:
                pass
        elif action == "close":
            stream.close()
        del stream
        sys.exit()
    for text in "mine 1", "mine 2", "mine 3":
        assert serv.chat(text, **ask).text == text
    assert os.waitpid(child, 0)[1] == 0
    assert serv.chat("go on", **ask).text == "go on"
    assert "".join(stream) == "lo!"
"""


@needs_fork
@plain_and_tls
def test_a_fork_shares_no_connection_and_leaves_streams_to_the_parent(
        secure, net_tls):
    go_on = threading.Semaphore(0)

    def answer(wire, request):
        if net_prompt(request) == "stream":
            wire.sendall(NET_BEGUN)
            go_on.acquire(timeout=20)
            wire.sendall(NET_STREAM[len(NET_BEGUN):])
        else:
            net_echo(wire, request)
            if net_prompt(request) == "go on":
                go_on.release()

    with Server(answer, net_tls if secure else None) as server:
        net_run(NET_FORK, server.url)
        both = [{each.connection for each in server.requests
                 if net_prompt(each).startswith("child") == child}
                for child in (True, False)]
    assert len(both[0]) == 3 and not both[0] & both[1]


NET_FORK_BUFFERED = """
stream = serv.stream("Hi", **ask)
assert next(stream) == "Hel"    # the rest, with its end, is here as well
child = os.fork()
if not child:
    assert "".join(stream) == "lo!" and not serv._idle
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert "".join(stream) == "lo!" and len(serv._idle) == 1
"""


@needs_fork
def test_a_stream_that_ends_in_a_child_leaves_its_connection_to_the_parent():
    with Server(NET_STREAM) as server:
        net_run(NET_FORK_BUFFERED, server.url)


NET_CLOSE_AFTER_FORK = """
stream = serv.stream("stream", **ask)
next(stream)
reader, writer = os.pipe()
if not os.fork():
    os.close(writer)
    os.read(reader, 1)  # until the parent is done
    os._exit(0)
stream.close()
print(serv.chat("Has it ended?", **ask).text)
"""


@needs_fork
def test_a_stream_closed_after_a_fork_ends_for_the_server():
    ended = threading.Event()

    def answer(wire, request):
        if net_prompt(request) != "stream":
            said = "yes" if ended.wait(5) else "no"
            return wire.sendall(http_answer(bare_answer(said)))
        wire.sendall(NET_BEGUN)
        if not wire.recv(1):
            ended.set()
        return False

    with Server(answer) as server:
        assert net_run(NET_CLOSE_AFTER_FORK, server.url) == "yes\n"


NET_TIDY = """
import gc
for ask["base_url"] in sys.argv[1:]:
    stream = serv.stream("abandoned", **ask)
    next(stream)
    del stream
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


def test_nothing_is_left_open(net_tls):
    def answer(wire, request):
        if net_prompt(request) == "refused":
            wire.sendall(http_answer({}, "401 No"))
        elif net_prompt(request) == "cut":
            wire.sendall(NET_BEGUN)
            return False
        else:
            net_echo(wire, request)

    with Server(answer) as plain, Server(answer, net_tls) as secure:
        assert net_run(NET_TIDY, plain.url, secure.url, flags=[
            "-X", "dev", "-W", "error::ResourceWarning"]) == ""


NET_CYCLES = """
import gc, time
gc.disable()
time.sleep = lambda seconds: None  # the waits take no time
ask["max_retries"] = 1

def call(name):
    try:
        if name == "closed":
            with serv.stream("Hi", **ask) as stream:
                return next(stream)
        if name == "chat":
            return serv.chat("Hi", **ask).text
        return "".join(serv.stream("Hi", **ask))
    except serv.ServError as error:
        return type(error).__name__

names = ["closed"] + ["chat", "stream"] * 9
for name, ask["base_url"] in zip(names, sys.argv[1:]):
    gc.collect()
    print(call(name), gc.collect())
"""
NET_FAILED_TRIES = [
    # a stream that is closed after its first piece
    ([closing(NET_BEGUN)], ("Hel", 1)),
    # what the server does; how chat() and stream() end, and after how many
    # requests
    ([error_answer(429), NET_OK], ("Hello!", 2), ("Hello!", 2)),
    ([closing(b""), NET_OK], ("Hello!", 2), ("Hello!", 2)),
    ([error_answer(429)], ("RateLimitError", 2), ("RateLimitError", 2)),
    ([closing(NET_OK[:-1])],
     ("APIConnectionError", 2), ("APIConnectionError", 2)),
    ([closing(NET_BEGUN)],
     ("APIConnectionError", 2), ("APIConnectionError", 1))]


@pytest.mark.skipif(sys.implementation.name != "cpython",
                    reason="other collectors count otherwise")
def test_what_has_ended_is_not_left_to_the_collector():
    """It holds the whole request, and a socket."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(answers))
                   for answers, *ends in NET_FAILED_TRIES for _ in ends]
        printed = net_run(NET_CYCLES, *(server.url for server in servers))
        tries = [len(server.requests) for server in servers]
    wanted = [end for _, *ends in NET_FAILED_TRIES for end in ends]
    assert printed == "".join("%s 0\n" % end for end, _ in wanted)
    assert tries == [number for _, number in wanted]


# -- Broken and cut answers ---------------------------------------------------

@net_calls
@table("data, kind, says", {
    # what the server sends before it hangs up; the error, and a word of it
    "a cut body": (NET_OK[:-9], NET_FAIL, "cut"),
    "no body": (http_head(content_length=9), NET_FAIL, "cut"),
    "a cut chunk": (NET_CHUNKED + b"ff\r\n{", NET_FAIL, "cut"),
    "no last chunk": (NET_CHUNKED + chunk(json.dumps(
        bare_answer("Hi")).encode()), NET_FAIL, "cut"),
    "no chunk": (NET_CHUNKED, NET_FAIL, "cut"),
    "the size zz": (NET_CHUNKED + b"zz\r\n{}\r\n", NET_FAIL, "cut"),
    "the size -5": (NET_CHUNKED + b"-5\r\n{}\r\n", NET_FAIL, "cut"),
    "a size far below 0": (
        NET_CHUNKED + b"-" + b"f" * 24 + b"\r\n{}\r\n", NET_FAIL, "cut"),
    "no size": (NET_CHUNKED + b"\r\n{}\r\n", NET_FAIL, "cut"),
    "nothing": (b"", NET_FAIL, "clos"),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
                         serv.APIStatusError, "101"),
    "a cut body without a length": (
        http_head() + b'{"choices": [{"mess', NET_FAIL, "the answer was cut"),
    "a body without a length that is too deep": (
        http_head() + b'{"a": ' * 99 + b"1" + b"}" * 99, NET_ODD,
        "nested deeper than 64 levels.*a"),
    "a cut status line": (b"HTTP/1.1 2", NET_FAIL, "no answer"),
    "no header": (
        b"HTTP/1.1 200 OK\r\n", NET_FAIL, "the answer was cut"),
    "a cut header": (
        b"HTTP/1.1 200 OK\r\nContent-Ty", NET_FAIL, "the answer was cut"),
    "a header without an end": (
        NET_OK[:NET_OK.index(b"\r\n\r\n") + 2], NET_FAIL,
        "the answer was cut"),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", NET_FAIL, "SSH-2.0"),
    "TLS": (b"\x15\x03\x03\x00\x02\x02\x28", NET_FAIL, "no answer"),
    "no text": (b"\0\1\2\r\n\r\n", NET_FAIL, "no answer"),
    "the status 999999": (
        b"HTTP/1.1 999999 What\r\n\r\n", NET_FAIL, "999999"),
    "gzip": (http_answer(gzip.compress(b"{}"), content_encoding="gzip"),
             NET_ODD, "cannot decode content-encoding gzip"),
    "gzip, with an error's status": (
        http_answer(gzip.compress(b"{}"), "500 No", content_encoding="gzip"),
        serv.InternalServerError, "500.*cannot decode content-encoding gzip"),
    "an unknown encoding": (
        http_head(transfer_encoding="br, chunked"), NET_ODD, "br, chunked"),
    "no content": (http_answer(b"", "204 No Content"), NET_ODD, "nothing"),
    "a cut error": (http_head("500 Oops", content_length=99) + b"half",
                    serv.InternalServerError, "500.*half"),
    "an error without a body": (http_head(
        "401 No", transfer_encoding="chunked") + b"zz",
        serv.AuthenticationError, "401")})
def test_a_broken_answer_is_an_error_that_says_so(call, data, kind, says):
    with Server(closing(data)) as server:
        error = net_error(kind, call, server)
        assert len(server.requests) == 1
    assert re.search(says, str(error)) and error.reply is None
    assert server.url in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("size", [0, 10, len(NET_OK) - 5])
def test_a_reset_is_a_connection_error(size):
    with Server(net_reset(NET_OK[:size])) as server:
        net_error(NET_FAIL, net_chat, server)


def test_a_stream_that_is_reset_keeps_what_came():
    arrived = threading.Event()

    def answer(wire, request):
        wire.sendall(NET_BEGUN)
        arrived.wait(10)
        return net_reset()(wire, request)

    with Server(answer) as server:
        stream = open_stream(server)
        assert next(stream) == "Hel"
        arrived.set()
        error = net_error(NET_FAIL, next, stream)
    assert (error.reply.text, error.reply.partial) == ("Hel", True)


@pytest.mark.parametrize("secure", [True, False],
                         ids=["http to TLS", "https to none"])
def test_the_wrong_scheme_is_a_connection_error(secure, net_tls):
    with Server(net_echo, net_tls if secure else None) as server:
        url = server.url.split(":", 1)[1]
        net_error(NET_FAIL, net_chat, ("http:" if secure else "https:") + url,
                  timeout=5)


def test_an_error_before_the_end_of_the_upload_is_read():
    def answer(wire):
        wire.recv(1 << 10)
        wire.sendall(http_answer({"error": {"message": "too large"}},
                                 "413 Payload Too Large"))

    with NetBare(answer) as server:
        error = net_error(serv.APIStatusError, net_chat, server,
                          "x" * (1 << 23))
    assert (error.status, error.message) == (413, "too large")


def test_an_upload_that_is_refused_without_an_answer_says_why():
    with NetBare(lambda wire: wire.recv(1 << 10)) as server:
        error = net_error(NET_FAIL, net_chat, server, "x" * (1 << 23))
    assert isinstance(error.__cause__, OSError)


@plain_and_tls
@table("interim", {
    "102": b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n",
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
    "many": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "Connection: close": b"HTTP/1.1 103 E\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 102 Processing\r\n\r\n"})
def test_an_interim_answer_is_skipped(secure, interim, net_tls):
    """http.client would close itself, and dial anew without TLS."""
    with Server(interim + NET_OK, net_tls if secure else None) as server:
        assert [net_chat(server) for _ in range(2)] == ["Hello!"] * 2
        assert len(server.requests) == 2


def test_an_interim_answer_does_not_end_an_upload():
    def answer(wire):
        wire.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        with wire.makefile("rb") as reader:
            assert len(read_request(reader, 0).body) > 1 << 23
        wire.sendall(NET_OK)

    with NetBare(answer) as server:
        assert net_chat(server, "x" * (1 << 23)) == "Hello!"


# -- Signals ------------------------------------------------------------------

@contextlib.contextmanager
def net_alarm(handler, seconds=0.04):
    """Have a handler called by a signal, once."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class NetBareTimeout(TimeoutError):
    """What `raise TimeoutError` raises: it has no arguments."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        super().__init__()


@needs_alarm
@pytest.mark.parametrize("place, raised", [
    *((place, TimeoutError) for place in (
        "connect", "handshake", "upload", "head", "TLS", "body", "stream",
        "the wait for a retry")),
    *itertools.product(("head", "stream"), (
        OSError, KeyboardInterrupt, NetBareTimeout))])
def test_what_a_signals_handler_raises_comes_out(place, raised, net_tls):
    """And nothing is sent again: it might be billed."""
    def handler(*_):
        raise mine

    mine = raised(errno.EPIPE, "the caller's own")
    prompt, seconds = "Hi", 0.04
    if place == "upload":
        prompt, seconds = "x" * (1 << 23), 0.15
    with net_silent(place, net_tls) as (url, server):
        with pytest.raises(raised) as caught, net_alarm(handler, seconds):
            net_stream(url, prompt, max_retries=5, timeout=2)
        assert caught.value is mine and mine.__cause__ is None
        if server:
            assert server.connections <= 1 and len(server.requests) <= 1


@pytest.mark.parametrize("error, ours", [
    (TimeoutError("mine"), False), (TimeoutError(), False),
    (ConnectionResetError(errno.ECONNRESET, "reset"), True),
    (socket.gaierror(socket.EAI_NONAME, "no name"), True),
    (ssl.SSLError(1, "alert"), True)], ids=repr)
def test_an_error_without_a_number_is_not_the_systems(error, ours):
    def operation():
        raise error

    with serv.DeadlineSocket() as sock:
        sock.owner, sock.deadline = os.getpid(), time.monotonic() + 60
        with pytest.raises(Exception) as caught:
            sock.when_ready(operation)
    raised = caught.value
    assert (raised.cause if ours else raised) is error


@needs_alarm
def test_a_signals_handler_may_make_a_call_in_the_middle_of_another():
    said = []

    def answer(wire, request):
        while net_prompt(request) == "outer" and not said:
            time.sleep(0.001)
        net_echo(wire, request)

    with Server(answer) as server:
        net_chat(server, "to be kept")
        with net_alarm(lambda *_: said.append(net_chat(server, "inner"))):
            assert net_chat(server, "outer") == "outer"
    assert said == ["inner"]


# -- Hostile servers ----------------------------------------------------------

# The limits, of which README.md says some.  The tests lower those that would
# take long to reach.
LIMITS = {
    "TIMEOUT": 600, "MAX_TIMEOUT": 86400, "CONNECT_TIMEOUT": 10,
    "IDLE_SECONDS": 50, "STALE_SECONDS": 1, "LAST_CHUNK_SECONDS": 0.01,
    "MAX_IDLE": 256, "MAX_BODY": 32 << 20, "MAX_STREAM": 64 << 20,
    "MAX_ERROR": 256 << 10, "MAX_RECEIVED": 512 << 20, "MIN_SECRET": 8,
    "MAX_DEPTH": 64,
    "MAX_PARTS": 2000, "MAX_NAME": 1000}


def test_the_limits_are_these():
    assert {name: getattr(serv, name) for name in LIMITS} == LIMITS


@table("assembler, make", {
    "chat: choices": (serv.ChatAssembler, lambda number: [
        {"choices": [{"index": index} for index in range(number)]}]),
    "chat: calls": (serv.ChatAssembler, lambda number: [
        chat_chunk({"tool_calls": [{"index": index}
                                   for index in range(number)]})]),
    "messages: blocks": (serv.MessagesAssembler, lambda number: [
        {"type": "content_block_start", "index": index}
        for index in range(number)]),
    "messages: blocks of message_start": (
        serv.MessagesAssembler, lambda number: [
            stream_start(*stream_parts(*["a"] * number))])})
def test_an_answer_of_a_stream_has_at_most_2000_parts_of_a_kind(
        assembler, make):
    stream_build(assembler(), make(2000))
    with pytest.raises(serv.APIResponseError, match="more than 2000"):
        stream_build(assembler(), make(2001))


def net_flood(head, piece):
    """Return an answer that never ends, as fast as it is taken."""
    return net_drip(head, piece * max(1, (1 << 16) // len(piece)), 0)


NET_LONG = STREAM_HEAD + b"fffffffffff\r\n"  # a chunk of 17 terabytes
NET_FLOODS = {
    # the call, what comes once, what comes for ever, the error, the limit
    "head: a line without an end": (
        net_chat, b"HTTP/1.1 200 ", b"x", NET_FAIL, "a line"),
    "head: a header without an end": (
        net_chat, b"HTTP/1.1 200 OK\r\nX: ", b"x", NET_FAIL, "a line"),
    "head: headers without number": (
        net_chat, b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", NET_FAIL, "a line"),
    "head: a header folded without an end": (
        net_chat, b"HTTP/1.1 200 OK\r\nX: y\r\n", b" y\r\n", NET_FAIL,
        "a line"),
    "head: headers of an interim answer": (
        net_chat, b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n", NET_FAIL,
        "a line"),
    "head: interim answers without number": (
        net_chat, b"", b"HTTP/1.1 100 Continue\r\n\r\n", NET_ODD,
        "MAX_RECEIVED"),
    "body: trailers without number": (
        net_chat, NET_CHUNKED + b"0\r\n", b"X: y\r\n", NET_ODD,
        "MAX_RECEIVED"),
    "body without a length": (
        net_chat, http_head(), b" ", NET_ODD, "MAX_BODY"),
    "body of a huge length": (
        net_chat, http_head(content_length=10 ** 15), b" ", NET_ODD,
        "MAX_BODY"),
    "body in chunks": (
        net_chat, NET_CHUNKED, chunk(b" " * 999), NET_ODD, "MAX_BODY"),
    "body in one huge chunk": (
        net_chat, NET_CHUNKED + b"fffffffffff\r\n", b" ", NET_ODD,
        "MAX_BODY"),
    "body: the size of a chunk": (
        net_chat, NET_CHUNKED, b"0", NET_FAIL, "a line"),
    "body: the extension of a chunk": (
        net_chat, NET_CHUNKED + b"1;", b"x", NET_FAIL, "a line"),
    "body: the trailer": (
        net_chat, NET_CHUNKED + b"0\r\n", b"x", NET_FAIL, "a line"),
    "body of an error": (
        net_chat, http_head("500 Oops"), b"x", serv.InternalServerError,
        "MAX_ERROR"),
    "stream: a page instead": (
        net_stream, http_head(kind="text/html"), b"<br>", NET_ODD,
        "MAX_STREAM"),
    "stream: a line without an end": (
        net_stream, NET_LONG, b"x", NET_ODD, "MAX_STREAM"),
    "event: a data line without an end": (
        net_stream, NET_LONG + b"data: ", b"x", NET_ODD, "MAX_BODY"),
    "event: data lines without number": (
        net_stream, NET_LONG, b"data: x\n", NET_ODD, "MAX_BODY"),
    "event: names without number": (
        net_stream, NET_LONG, b"event: x\n", NET_ODD, "MAX_BODY"),
    "stream: comments without end": (
        net_stream, STREAM_HEAD, chunk(b": ping\n\n" * 99), NET_ODD,
        "MAX_STREAM"),
    "stream: text without end": (
        net_stream, STREAM_HEAD, chunk(sse(bare_chunk("x" * 999))), NET_ODD,
        "MAX_STREAM"),
    "stream: pieces of tool calls without number": (
        net_stream, STREAM_HEAD, chunk(sse({"choices": [{"delta": {
            "tool_calls": [{"id": str(turn)} for turn in range(999)]}}]})),
        NET_ODD, "MAX_STREAM")}


@table("call, head, piece, kind, limit", NET_FLOODS)
def test_a_flood_is_bounded_by_a_limit_not_by_the_budget(
        call, head, piece, kind, limit, received, monkeypatch):
    limits = {"MAX_BODY": 1 << 18, "MAX_STREAM": 1 << 19,
              "MAX_ERROR": 1 << 16, "MAX_RECEIVED": 1 << 22}
    for name in limits:
        monkeypatch.setattr(serv, name, limits[name])
    limits["a line"] = 1 << 16  # of http.client
    with Server(net_flood(head, piece)) as server:
        error = net_error(kind, call, server)
    # Ends of lines and sizes of chunks are not counted (1 byte of 9, at
    # most).  The last read may be too much, and the buffer may be full.
    assert sum(received) <= limits[limit] * 9 / 8 + (1 << 17)
    assert len(str(error)) < SHORT
    assert len(getattr(error, "body", "")) <= limits["MAX_ERROR"]


@net_calls
def test_what_is_within_the_limits_is_taken_whole(call):
    text = "0123456789" * 10 ** 6
    answer = http_answer(bare_answer(text)) if call is net_chat else (
        stream_answer(bare_chunk(text, "stop")))
    with Server(answer) as server:
        assert net_within(5, lambda: call(server)) == text


# Each in a thread with the smallest stack that a common system gives (musl).
NET_SMALL_STACK = """
import json, threading
threading.stack_size(128 << 10)
ends = {}
def work(name, call):
    try:
        reply = call(name, **ask)
        if call is serv.stream:
            list(reply.events())
            reply = reply.reply
        ends[name] = reply.text or type(reply.tool_calls[0].arguments).__name__
    except serv.ServError as error:
        ends[name] = type(error).__name__
        assert len(str(error)) < %d
for name in sys.argv[2:]:
    call = serv.stream if name.startswith("stream") else serv.chat
    thread = threading.Thread(target=work, args=(name, call))
    thread.start()
    thread.join()
print(json.dumps(ends))
""" % SHORT


def net_call_of(name, arguments):
    """Return a choice with a tool call, as a message or a delta."""
    return {"choices": [{"index": 0, "finish_reason": "tool_calls", name: {
        "content": None, "tool_calls": [{"index": 0, "id": "a", "function": {
            "name": "f", "arguments": arguments}}]}}]}


def net_deep(text):
    """Yield cases of JSON in an answer: a name, its end, the answer."""
    field = ('%s, "y": %s}' % (json.dumps(bare_answer("x"))[:-1],
                               text)).encode()
    yield "answer", "APIResponseError", http_answer(text.encode())
    yield "field", "APIResponseError", http_answer(field)
    yield "error", "InternalServerError", http_answer(field, "500 Oops")
    yield "stream", "APIResponseError", stream_answer(bare_chunk("x"), text)
    yield "arguments", "str", http_answer(net_call_of("message", text))
    yield "stream of arguments", "str", stream_answer(
        net_call_of("delta", text))


def test_deep_json_ends_no_process_with_a_small_stack():
    ends, answers = {}, {}
    for depth in 1000, 20000:
        for text in ("[" * depth, "[" * depth + "]" * depth,
                     '{"a":' * depth + "1" + "}" * depth):
            for name, end, answer in net_deep(text):
                name += " %s %d" % (text[:5] + text[-1:], depth)
                ends[name], answers[name] = end, answer
    # What is not too deep, but nearly; brackets in a text are not counted.
    depth = serv.MAX_DEPTH - 2
    near = dict(bare_answer("x"), y=json.loads("[" * depth + "]" * depth))
    event = dict(bare_chunk("x", "stop"), y=near["y"])
    text = '[{"' * 9999 + "\\" * 3
    for name, end, answer in (
            ("near", "x", http_answer(near)),
            ("stream near", "x", stream_answer(event)),
            ("error near", "InternalServerError", http_answer(near, "500 O")),
            ("flat", "x", http_answer(dict(bare_answer("x"), y=[[]] * 9999))),
            ("text", text, http_answer(bare_answer(text))),
            ("stream of text", text, stream_answer(bare_chunk(text, "stop")))):
        ends[name], answers[name] = end, answer
    with Server(lambda wire, request: wire.sendall(
            answers[net_prompt(request)])) as server:
        printed = net_run(NET_SMALL_STACK, server.url, *answers)
    assert json.loads(printed) == ends


NET_PARTS = [
    NET_OK, NET_STREAM, error_answer(503), http_head(content_length=-1),
    http_head("100 Continue", transfer_encoding="gzip"), b"HTTP/1.0 200\r\n",
    b"Content-Type: \xff;=;\r\n", b"Content-Encoding: \xe9\r\n",
    b"Retry-After: \xb2\r\n", b"Location: \xff\r\n", b"\r\n", b"{}", b"\0"]


@table("head", {"HTTP": b"", "behind a status": b"HTTP/1.1 200 OK\r\n",
                "a stream": http_head(kind="text/event-stream")})
def test_random_bytes_are_an_answer_or_an_error_of_one_line(head):
    def answer(wire, request):
        pick, data = random.Random(net_prompt(request)), head
        for _ in range(pick.randrange(1, 16)):
            part = pick.choice(NET_PARTS)
            begin = pick.choice([0, pick.randrange(len(part))])
            data += part[begin:pick.randrange(begin, len(part)) + 1]
            data += bytes(pick.choices(range(256), k=pick.choice([0, 0, 2])))
        wire.sendall(data)
        return False

    ends = set()
    with Server(answer) as server:
        for turn in range(120):
            try:
                (net_stream if turn % 3 else net_chat)(server, str(turn))
            except serv.ServError as error:
                assert "\n" not in str(error)
                ends.add(type(error))
    assert {NET_FAIL, NET_ODD} <= ends and serv.APITimeoutError not in ends


# -- The key is in one header, and in no error --------------------------------

def test_the_key_is_in_one_header_only():
    with Server(net_echo) as server:
        net_chat(server)
        [request] = server.requests
    assert request.headers["authorization"] == "Bearer " + KEY
    assert str(request).count(KEY) == 1


def net_texts(value, seen):
    """Yield every text that can be reached from a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
    elif id(value) not in seen and not callable(value):
        seen[id(value)] = value
        yield repr(value)
        parts = list(getattr(value, "__dict__", {}).values())
        if hasattr(value, "items"):
            parts += [part for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set)):
            parts += value
        if isinstance(value, BaseException):
            yield str(value)
            parts += traceback.format_exception(
                type(value), value, value.__traceback__)
            parts += [getattr(value, name) for name in dir(value)
                      if not name.startswith("__")]
            parts += [value.__cause__, value.__context__]
        for part in parts:
            yield from net_texts(part, seen)


def net_assert_secret(error, key=KEY):
    """Check that nothing that can be reached from an error holds a key."""
    data = pickle.dumps(error)
    for text in (*net_texts(error, {}), *net_texts(pickle.loads(data), {})):
        assert key not in text
    assert key.encode() not in data
    assert key[:12] not in str(error)  # a part of it where a message is cut
    assert isinstance(error.__cause__, (OSError, type(None)))
    # What a collector of local variables would show of our own objects.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if type(value).__module__ == "serv":
                assert key not in repr(value)
                if isinstance(value, collections.abc.Collection):
                    assert key not in repr(list(value))


NET_PAGE = b"<html><p>" + b"." * 360 + KEY.encode() + b"</p>"
NET_TWO_PIECES = bare_chunk(KEY[:9]), bare_chunk(KEY[9:])
NET_ECHOES = {
    "error: every field of it": http_answer({"error": {
        "message": "Bad " + KEY, "type": KEY, "code": KEY, "param": KEY,
        KEY: [{"a": [KEY]}]}}, "401 No"),
    "error: a text": http_answer({"error": KEY}, "401 No"),
    "error: in nested lists": http_answer([[KEY], {KEY: KEY}], "401 No"),
    "error: in a detail, where the message is cut short": http_answer(
        {"detail": ["x" * 380 + KEY]}, "422 No"),
    "error: in a 200": http_answer({"error": {"message": KEY, "type": KEY}}),
    "200: JSON that is no answer": http_answer({"said": KEY}),
    "headers: a value, the request id": http_answer(
        {}, "401 No", X_Echo=KEY, X_Request_Id="r" + KEY),
    "headers: the content type": http_answer({}, "401 No", "text/" + KEY),
    "status line: the reason": http_answer({}, "401 " + KEY),
    "headers: where a redirect leads": http_answer(
        {}, "307 Go", location="http://a.test/" + KEY),
    "headers: the content encoding": http_answer({}, content_encoding=KEY),
    "page of an error": http_answer(NET_PAGE, "403 No", "text/html"),
    "page of a 200": http_answer(NET_PAGE, kind="text/html"),
    "200: a text": http_answer(KEY.encode()),
    "status line: a folded header behind it": (
        b"HTTP/1.1 401 No\r\n folded " + KEY.encode()
        + b"\r\nContent-Length: 2\r\n\r\n{}"),
    "status line: in place of the status": (
        b"HTTP/1.1 " + KEY.encode() + b" No\r\n\r\n"),
    "status line: in place of all of it": KEY.encode() + b"\r\n\r\n",
    "headers: the parts of a broken multipart head": (
        b"HTTP/1.1 401 No\r\nContent-Type: multipart/mixed; "
        b"boundary=b\r\nno\r\n--b\r\n " + KEY.encode() + b"\r\n\r\n"),
    "body: the size of a chunk": NET_CHUNKED + KEY.encode() + b"\r\n",
    "headers: the content length": http_head(content_length=KEY) + b"{}",
    "body: cut behind it": http_head(content_length=999) + KEY.encode(),
    "stream: an error event": stream_answer({"error": {
        "message": KEY, "type": KEY, "code": KEY, "param": KEY}}),
    "stream: a broken event": stream_answer('{"a": "%s' % KEY),
    "stream: choices that are no list": stream_answer({"choices": KEY}),
    "stream: text, then a cut": stream_answer(bare_chunk("a" + KEY)),
    "stream: text in two pieces, then a cut": stream_answer(*NET_TWO_PIECES),
    "stream: text in two pieces, then an error": stream_answer(
        *NET_TWO_PIECES, {"error": {"message": KEY}}),
    "stream: arguments in two pieces": stream_answer(*(
        {"choices": [{"delta": {"tool_calls": [{
            "index": 0, "id": "a", "function": {
                "name": "f", "arguments": text}}]}}]}
        for text in (KEY[:9], KEY[9:]))),
    "stream: its headers": stream_answer("{", X_Echo=KEY, X_Request_Id=KEY),
    "headers: a name": http_answer({}, "401 No", **{"X-" + KEY: "1"}),
}


@net_calls
@table("data", NET_ECHOES)
def test_the_key_is_in_no_part_of_an_error(call, data):
    with Server(closing(data)) as server:
        with pytest.raises(serv.ServError) as caught:
            call(server)
    net_assert_secret(caught.value)
    for name in getattr(caught.value, "headers", {}):
        assert " " not in name  # RFC 9110


def test_an_error_that_a_stream_raises_again_is_as_clean():
    with Server(NET_ECHOES[
            "stream: text in two pieces, then an error"]) as server:
        stream = open_stream(server)
        for _ in range(3):
            net_assert_secret(net_error(
                serv.InternalServerError, list, stream))


@table("size, shown", {
    "its beginning, which all may share": (8, "Bad key: %s" % KEY[:8]),
    "half of it: it is removed": (9, "Bad key: [removed]"),
    "all but one": (len(KEY) - 1, "Bad key: [removed]"),
    "all": (len(KEY), "Bad key: [removed]")})
def test_a_part_of_the_key_at_the_end_of_a_cut_answer(size, shown):
    data = b"Bad key: " + KEY[:size].encode()
    head = http_head("401 No", content_length=99)
    with Server(closing(head + data)) as server:
        error = net_error(serv.AuthenticationError, net_chat, server)
    assert error.message == error.body == shown
    assert shown in str(error)


def test_a_part_of_the_key_at_the_end_of_a_cut_stream():
    data = stream_answer(bare_chunk("a" + KEY[:-1]))
    with Server(closing(data)) as server:
        error = net_error(serv.APIConnectionError, list, open_stream(server))
    assert error.reply.text == "a[removed]"


NET_OTHER_KEY = "sk-other-0123456789"


@table("options", {
    "an argument": {"api_key": NET_OTHER_KEY},
    "an argument with white space": {"api_key": " %s\n" % NET_OTHER_KEY},
    "a header": {"headers": {"Authorization": "Bearer " + NET_OTHER_KEY}},
    "a header with white space": {
        "headers": {"authorization": "Bearer\t %s " % NET_OTHER_KEY}},
    "a header without a scheme": {
        "headers": {"authorization": NET_OTHER_KEY}}})
def test_no_key_of_the_call_is_in_an_error(options, monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")
    with Server(http_answer({"error": {"message": "Bad key " + NET_OTHER_KEY}},
                            "401 No")) as server:
        error = net_error(serv.AuthenticationError, net_chat, server,
                          **options)
    net_assert_secret(error, NET_OTHER_KEY)
    assert "Bad key" in error.message


@table("key, shown", {
    "1 character": ("o", "the services of chat"),
    "4, in the URL too": ("chat", "the services of chat"),
    "7": ("service", "the services of chat"),
    "8: it is removed": ("services", "the [removed] of chat")})
def test_a_key_of_less_than_8_characters_is_no_secret(key, shown):
    with Server(http_answer({"error": "the services of chat"},
                            "401 No")) as server:
        error = net_error(serv.AuthenticationError, net_chat, server,
                          api_key=key)
    assert error.message == shown and shown in str(error)
    assert server.url + CHAT in str(error)


def test_no_object_of_ours_shows_the_key():
    request = serv.build_request("chat", "Hi", system="s")
    assert request.headers["Authorization"] == "Bearer " + KEY
    assert KEY not in repr(request) + str(request)
    with pytest.raises(TypeError):
        list(request)
    with Server(NET_BEGUN) as server, open_stream(server) as stream:
        assert KEY not in repr(stream) + repr(stream.reply)


# -- Proxies ------------------------------------------------------------------

def net_basic(login):
    return login and "Basic " + base64.b64encode(
        login.encode("utf-8", "surrogateescape")).decode()


def net_tunnel(context, seen):
    """Return the answer of a proxy to CONNECT; what comes inside is seen."""
    def answer(wire, request):
        if request.method != "CONNECT":
            return False
        wire.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(wire, server_side=True) as inner:
            with inner.makefile("rb") as reader:
                while True:
                    inside = read_request(reader, request.connection)
                    if inside is None:
                        return False
                    seen.append(inside)
                    net_echo(inner, inside)
    return answer


NET_LOGINS = {
    "none": ("", None), "user and password": ("user:pass@", "user:pass"),
    "quoted": ("us%20er:p%40s%25s%3A@", "us er:p@s%s:"),
    "no UTF-8": ("us\udcffer:pass@", "us\udcffer:pass"),
    "an address in it": ("user:p[::1]w@", "user:p[::1]w"),
    "user only": ("token-%31@", "token-1:"),
    "user and no password": ("user:@", "user:")}


@table("login, decoded", NET_LOGINS)
def test_an_http_proxy_gets_the_whole_url(login, decoded, monkeypatch):
    with Server(net_echo) as proxy:
        monkeypatch.setenv("http_proxy", "http://%s127.0.0.1:%d" % (
            login, proxy.port))
        assert net_chat("http://host.test:81/base") == "Hi"
        [request] = proxy.requests
    assert request[:2] == (
        "POST", "http://host.test:81/base/v1/chat/completions")
    assert request.headers["host"] == "host.test:81"
    assert request.headers["authorization"] == "Bearer " + KEY
    assert request.headers.get("proxy-authorization") == net_basic(decoded)


@table("login, decoded", NET_LOGINS)
def test_an_https_call_goes_through_a_tunnel_that_is_kept(
        login, decoded, net_tls, monkeypatch):
    seen = []
    with Server(net_tunnel(net_tls, seen)) as proxy:
        monkeypatch.setenv("https_proxy", "http://%s127.0.0.1:%d" % (
            login, proxy.port))
        assert net_chat("https://localhost") == "Hi"
        assert net_stream("https://localhost") == "Hi"
        [connect] = proxy.requests
        serv.close_idle()  # so that the proxy is done with it
    headers = {"host": "localhost:443", "user-agent": serv.USER_AGENT,
               "proxy-authorization": net_basic(decoded)}
    assert connect[:4] == ("CONNECT", "localhost:443", {
        name: value for name, value in headers.items() if value}, b"")
    assert [(each.target, each.headers["host"], each.headers["authorization"],
             each.headers.get("proxy-authorization")) for each in seen] == [
        ("/v1/chat/completions", "localhost", "Bearer " + KEY, None)] * 2


def test_the_login_of_a_proxy_that_repeats_it_is_in_no_error(monkeypatch):
    basic = net_basic("user:pass").split()[1]
    with Server(http_answer("Proxy-Authorization: Basic " + basic,
                            "407 No", "text/html")) as proxy:
        monkeypatch.setenv("http_proxy", "http://user:pass@127.0.0.1:%d"
                           % proxy.port)
        error = net_error(serv.APIStatusError, net_chat, "http://host.test")
    net_assert_secret(error, basic)
    assert "Basic [removed]" in str(error)


def test_a_connection_to_a_proxy_without_a_tunnel_is_not_kept(monkeypatch):
    """tinyproxy garbles what follows a stream."""
    with Server(net_echo) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        for _ in range(2):
            net_stream("http://host.test")
        assert proxy.connections == 2


@pytest.mark.parametrize("name", [
    "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"])
def test_the_variables_that_name_a_proxy(name, monkeypatch):
    with Server(http_answer({}, "403 No")) as proxy:
        monkeypatch.setenv(name, "127.0.0.1:%d" % proxy.port)
        with pytest.raises(serv.ServError):
            net_chat(name[:-6].lower() + "://host.test")
        assert len(proxy.requests) == 1


def test_a_change_of_the_environment_is_seen(monkeypatch):
    with Server(net_echo) as proxy, Server(net_echo) as server:
        for value, counts in (("", (1, 0)), (proxy.url, (1, 1)),
                              ("", (2, 1))):
            monkeypatch.setenv("http_proxy", value)
            net_chat(server)
            assert (len(server.requests), len(proxy.requests)) == counts


@table("value, host, direct", {
    "an address": ("127.0.0.1", "127.0.0.1", True),
    "a star is all": ("*", "127.0.0.1", True),
    "a list": ("a.test, 127.0.0.1", "127.0.0.1", True),
    "a port that fits": ("127.0.0.1:{port}", "127.0.0.1", True),
    "another port": ("127.0.0.1:1", "127.0.0.1", False),
    "nothing": ("", "127.0.0.1", False),
    "a name in any case": ("LocalHost", "localhost", True),
    "the end of a name is another": ("calhost", "localhost", False),
    "a name": ("a.test", "a.test", True),
    "another name": ("a.test", "b.test", False),
    "a name and a port": ("a.test:{port}", "a.test", True),
    "a domain": ("a.test", "b.a.test", True),
    "a domain behind a dot": (".a.test", "b.a.test", True),
    "a domain that only looks alike": ("a.test", "ba.test", False),
    "IPv6": ("::1", "[::1]", True),
    "IPv6 in brackets": ("[::1]", "[::1]", True),
    "IPv6 in a list": ("a.test,::1", "[::1]", True),
    "IPv6 and a port": ("[::1]:{port}", "[::1]", True),
    "another IPv6": ("::2", "[::1]", False)})
def test_no_proxy_names_hosts_that_are_called_directly(
        value, host, direct, net_names, monkeypatch):
    try:
        server = Server(net_echo, host="::1" if ":" in host else "127.0.0.1")
    except OSError:
        pytest.skip("this system has no IPv6")
    net_names[host] = [("127.0.0.1", server.port)]
    with server, Server(net_echo) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//u:p@"))
        monkeypatch.setenv("no_proxy", value.format(port=server.port))
        net_chat("http://%s:%d" % (host, server.port))
        assert (len(server.requests), proxy.connections) == (
            (1, 0) if direct else (0, 1))
        for request in server.requests:
            assert request.target == CHAT
            assert "proxy-authorization" not in request.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "a.test"])
def test_no_proxy_may_be_in_capitals(host, net_names, monkeypatch):
    with Server(net_echo) as server:
        net_names["a.test"] = [("127.0.0.1", server.port)]
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", host)
        assert net_chat("http://%s:%d" % (host, server.port)) == "Hi"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("url", [
    "http:/user:opensesame@host:3128", "http://user:opensesame",
    "https://user:opensesame@host", "socks5://user:opensesame@host",
    "http://user:opensesame@", "http://user:opensesame@host:x",
    "http://user:opensesame@host:+1", "http://user:opensesame@[host]:80",
    "http://\udcff:opensesame@host:x",
    "http://user:opensesame@[fe80::1%%%s]" % ("a" * 70),
    "http://user:opensesame@ho st:80", "http://user:opensesame@ho\x7fst:80",
    # more than 65535 would wrap round, to port 1 here
    "http://user:opensesame@127.0.0.1:65537"])
def test_a_proxy_that_is_no_http_url_is_refused_without_its_login(
        scheme, url, monkeypatch):
    monkeypatch.setenv(scheme + "_proxy", url)
    error = net_error(ValueError, net_chat, scheme + "://host.test")
    assert scheme + "_proxy" in str(error)
    net_assert_secret(error, "opensesame")


def test_a_proxy_login_with_half_a_character_is_refused():
    """Windows' environment can hold one; that of other systems cannot."""
    assert serv.parse_proxy("http://\ud800:opensesame@host:80") is None


@pytest.fixture
def net_proxied(monkeypatch):
    """Make calls of a scheme through a proxy with a login; they fail.

    The proxy answers once; returned are the requests and the error, in which
    the host and the proxy are named, and neither key nor login.
    """
    def run(scheme, answer, kind, **options):
        with Server(answer) as proxy:
            place = "127.0.0.1:%d" % proxy.port
            monkeypatch.setenv(scheme + "_proxy",
                               "http://user:opensesame@" + place)
            error = net_error(kind, net_chat, scheme + "://host.test",
                              **options)
        assert "host.test" in str(error) and place in str(error)
        net_assert_secret(error)
        net_assert_secret(error, "opensesame")
        return proxy.requests, error
    return run


@table("scheme, kind", {"http": ("http", serv.APIStatusError),
                        "a tunnel": ("https", NET_FAIL)})
def test_a_proxys_407_is_not_tried_again(scheme, kind, net_proxied):
    """Some lock an account after three wrong logins."""
    requests, error = net_proxied(scheme, http_answer(
        b"Log in", "407 Proxy Authentication Required", retry_after=0), kind,
        max_retries=2)
    assert len(requests) == 1 and error.retries == 0
    assert "407" in str(error)


@table("data, says", {
    "a refusal": (http_answer(KEY.encode(), "403 " + KEY), "403"),
    "nothing": (b"", "no answer"),
    "a cut answer": (b"HTTP/1.1 2", "no answer"),
    "no text": (b"\0\1\2\r\n\r\n", "no answer"),
    "no status": (b"HTTP/1.1 x y\r\n", "no answer")})
def test_a_proxy_that_makes_no_tunnel_is_named_without_its_login(
        data, says, net_proxied):
    requests, error = net_proxied("https", closing(data), NET_FAIL,
                                  max_retries=0)
    assert [request.method for request in requests] == ["CONNECT"]
    assert KEY not in str(requests)
    assert says in str(error)


def test_a_dead_proxy_is_named_and_not_gone_round(monkeypatch):
    with socket.socket() as closed, Server(NET_OK) as server:
        closed.bind(("127.0.0.1", 0))
        place = "127.0.0.1:%d" % closed.getsockname()[1]
        monkeypatch.setenv("http_proxy", "http://user:opensesame@" + place)
        error = net_error(NET_FAIL, net_chat, server)
        assert server.connections == 0
    assert place in str(error) and "opensesame" not in str(error)


@pytest.mark.parametrize("scheme, target", [
    ("http", "http://xn--bcher-kva.test/v1/chat/completions"),
    ("https", "xn--bcher-kva.test:443")])
def test_a_host_that_is_not_ascii_is_sent_in_its_idna_form(
        scheme, target, monkeypatch):
    with Server(http_answer({}, "403 No")) as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        with pytest.raises(serv.ServError):
            net_chat(scheme + "://b\u00fccher.test")
        [request] = proxy.requests
    assert request.target == target
    assert request.headers["host"].split(":")[0] == "xn--bcher-kva.test"


# -- TLS ----------------------------------------------------------------------

@table("setting, certificate", {
    "a file": ("SSL_CERT_FILE", "good"),
    "a folder": ("SSL_CERT_DIR", "good"),
    # Python 3.13 refuses it by default; companies have many such.
    "an old certificate": ("SSL_CERT_FILE", "old")})
def test_a_ca_of_ones_own_is_trusted(setting, certificate, net_ca, tmp_path,
                                     monkeypatch):
    protocols = []

    def answer(wire, request):
        protocols.append(wire.selected_alpn_protocol())
        net_echo(wire, request)

    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv(setting, str(
        net_ca if "FILE" in setting else tmp_path))
    with Server(answer, net_context(tmp_path, certificate)) as server:
        assert [net_chat(server), net_stream(server)] == ["Hi", "Hi"]
        assert server.connections == 1
        assert server.requests[0].headers["host"] == server.url[8:]
    assert protocols == ["http/1.1"] * 2


def test_tls_is_1_2_or_newer():
    """Python's own default from 3.10; older ones take what OpenSSL takes."""
    context = serv.get_tls_context(None, None)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_tls_is_newer_where_the_system_asks_for_it(tmp_path, monkeypatch):
    make = ssl.create_default_context

    def make_strict():
        context = make()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    monkeypatch.setattr(ssl, "create_default_context", make_strict)
    context = serv.get_tls_context(None, str(tmp_path))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3


@table("setting, certificate, host, says, hint", {
    "unknown CA, nothing set": (
        None, "good", "127.0.0.1", "verify failed", True),
    "unknown CA, set": (
        "SSL_CERT_FILE", "good", "127.0.0.1", "verify failed", False),
    "expired": ("SSL_CERT_DIR", "expired", "127.0.0.1", "expired", False),
    "another host": (
        "SSL_CERT_DIR", "good", "a.test", "a.test", False)})
def test_a_refused_certificate_is_final_and_hints_at_a_ca_if_none_is_set(
        setting, certificate, host, says, hint, net_ca, tmp_path,
        monkeypatch, net_names):
    monkeypatch.delenv("SSL_CERT_FILE")
    if setting:
        net_ca.write_text(NET_CA if "DIR" in setting else
                          NET_CERTIFICATES["expired"])
        monkeypatch.setenv(setting, str(
            tmp_path if "DIR" in setting else net_ca))
    with Server(net_echo, net_context(tmp_path, certificate)) as server:
        net_names["a.test"] = [("127.0.0.1", server.port)]
        error = net_error(NET_FAIL, net_chat, "https://%s:%d" % (
            host, server.port), max_retries=5)
        assert (server.connections, server.requests) == (1, [])
    assert re.search(says, str(error), re.I) and error.retries == 0
    assert ("SSL_CERT_FILE" in str(error)) == hint


@table("content", {"missing": None, "empty": "", "text": "none\n"})
def test_a_ca_file_that_cannot_be_used_is_named_and_not_kept(
        content, net_tls, monkeypatch, tmp_path):
    path = tmp_path / "late.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with Server(net_echo, net_tls) as server:
        for _ in range(2):
            with pytest.raises(serv.ServError) as caught:
                net_chat(server)
            assert str(path) in str(caught.value)
            assert "SSL_CERT_FILE" in str(caught.value)
        path.write_text(NET_CA)
        assert net_chat(server) == "Hi"


def test_a_file_for_tls_keys_that_cannot_be_written_is_named(
        net_tls, monkeypatch, tmp_path):
    path = tmp_path / "none" / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    with Server(net_echo, net_tls) as server:
        error = net_error(NET_FAIL, net_chat, server, max_retries=5)
    assert str(path) in str(error) and "SSL_CERT_FILE" not in str(error)
    assert error.retries == 0


def test_a_ca_is_loaded_once(net_tls, net_ca):
    """It costs tens of milliseconds."""
    with Server(http_answer(bare_answer("Hi"), connection="close"),
                net_tls) as server:
        net_chat(server)
        net_ca.write_text(NET_CERTIFICATES["expired"])
        assert net_chat(server) == "Hi"
        assert server.connections == 2


def test_a_kept_connection_does_not_outlive_its_ca(net_tls, monkeypatch):
    with Server(net_echo, net_tls) as server:
        assert net_chat(server) == "Hi"
        monkeypatch.delenv("SSL_CERT_FILE")
        net_error(NET_FAIL, net_chat, server)


# -- Where it runs: flags, archives, processes, loops, a cloud ----------------

NET_CALL = """
import sys
sys.path.insert(0, sys.argv[2])
%s
print(serv.chat("Hi", system="s", base_url=sys.argv[1]).text,
      *serv.stream("Hi", system="s", base_url=sys.argv[1]))
"""


@table("flags, place, line", {
    "isolated, without site, from a zip file": (
        ["-I", "-S", "-W", "error", "-bb", "-X", "dev"], "all.zip",
        "import serv"),
    "without docstrings, in a package": (
        ["-OO", "-E", "-s", "-W", "error"], "",
        "from package._vendor import serv")})
def test_it_runs_with_these_flags_from_these_places(
        flags, place, line, tmp_path):
    with zipfile.ZipFile(str(tmp_path / "all.zip"), "w") as archive:
        archive.write(serv.__file__, "serv.py")
    vendor = tmp_path / "package" / "_vendor"
    vendor.mkdir(parents=True)
    shutil.copy(serv.__file__, str(vendor / "serv.py"))
    with Server(net_echo) as server:
        assert net_run(NET_CALL % line, server.url, tmp_path / place,
                       flags=flags, prelude="") == "Hi H i\n"


def test_two_copies_under_two_names_share_nothing(monkeypatch):
    modules = []
    for name in "net_serv_one", "net_serv_other":
        spec = importlib.util.spec_from_file_location(name, serv.__file__)
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, modules[-1])
        spec.loader.exec_module(modules[-1])
    with Server(net_echo) as server:
        for module in modules * 2:
            assert module.chat("Hi", system="s",
                               base_url=server.url).text == "Hi"
        assert server.connections == 2
    assert modules[0].ServError is not modules[1].ServError


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


@pytest.mark.skipif(sys.implementation.name != "cpython",
                    reason="other interpreters audit their reads as writes")
def test_importing_does_nothing_else():
    assert net_run(NET_IMPORT, ROOT, flags=["-I", "-S", "-B"],
                   prelude="") == "[] 1 []\n"


NET_POOLS = {
    "threads": lambda: concurrent.futures.ThreadPoolExecutor(4),
    "a spawned process": lambda: concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"))}


@table("make_pool", NET_POOLS)
def test_in_an_event_loop_replies_and_errors_come_from(make_pool):
    import asyncio
    if (make_pool is NET_POOLS["a spawned process"]
            and sys.implementation.name != "cpython"):
        pytest.skip("some builds of PyPy cannot spawn a pool")

    async def work():
        loop = asyncio.get_running_loop()
        with make_pool() as pool:
            return await asyncio.gather(*(loop.run_in_executor(
                pool, functools.partial(serv.chat, text, system="s",
                                        base_url=server.url))
                for text in "abc!"), return_exceptions=True)

    def answer(wire, request):
        if net_prompt(request) != "!":
            return net_echo(wire, request)
        wire.sendall(http_answer({"error": "pay"}, "402 No"))

    with Server(answer) as server:
        *replies, error = asyncio.run(work())
    assert replies == [bare_answer(text) for text in "abc"]
    assert {type(reply) for reply in replies} == {serv.Reply}
    assert (type(error), error.message) == (serv.BillingError, "pay")


NET_LAMBDA = """
import serv

def handler(event, context):
    return serv.chat(event["prompt"], system="Be brief.", timeout=20)
"""


@pytest.mark.skipif(importlib.util.find_spec("awslambdaric") is None,
                    reason="needs awslambdaric")
def test_a_lambda_function_keeps_its_connection(tmp_path):
    shutil.copy(serv.__file__, str(tmp_path / "serv.py"))
    (tmp_path / "app.py").write_text(NET_LAMBDA)
    posted, over, events = [], threading.Event(), iter("AB")

    def runtime(wire, request):
        if request.method == "POST":
            posted.append((request.target, body_of(request)))
            return wire.sendall(http_answer({}, "202 Accepted"))
        prompt = next(events, None)
        if prompt is None:
            over.set()
            return net_hold()(wire, request)
        wire.sendall(http_answer(
            {"prompt": prompt}, lambda_runtime_aws_request_id="id-" + prompt,
            lambda_runtime_deadline_ms=int(1000 * time.time()) + 60000,
            lambda_runtime_invoked_function_arn="arn:aws:lambda:f",
            lambda_runtime_trace_id="Root=1"))

    with Server(net_echo) as server, Server(runtime) as api:
        environment = dict(
            os.environ, AWS_LAMBDA_RUNTIME_API=api.url[7:],
            SERV_BASE_URL=server.url, LAMBDA_TASK_ROOT=str(tmp_path))
        environment.pop("PYTHONPATH", None)
        with subprocess.Popen(
                [sys.executable, "-m", "awslambdaric", "app.handler"],
                cwd=str(tmp_path), env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL) as process:
            try:
                assert over.wait(20)
            finally:
                process.kill()
        assert (server.connections, len(server.requests)) == (1, 2)
    assert posted == [
        ("/2018-06-01/runtime/invocation/id-%s/response" % prompt,
         bare_answer(prompt)) for prompt in "AB"]


# -- The certificates of the tests of TLS -------------------------------------
#
# Of no worth except for these tests: a CA; certificates of 127.0.0.1 and
# localhost, the second expired, the third without the extension that Python
# 3.13 has begun to ask for; the key of all three.

NET_CA = """\
-----BEGIN CERTIFICATE-----
MIIBZzCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAaMRgwFgYDVQQDDA9zZXJ2LnB5
IHRlc3QgQ0EwIBcNMDAwMTAxMDAwMDAwWhgPMjEyNjAxMDEwMDAwMDBaMBoxGDAW
BgNVBAMMD3NlcnYucHkgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IA
BFfeftMDNXhA0ucjIMKKfArCAL0cTOt0z5k8yXXvk5cRMo/t2nx4Ua26GPOBMURn
u97dndKawWPzxzMFoqdd4X2jQjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/
BAQDAgEGMB0GA1UdDgQWBBSDJ7qKRp7EVMp3n6fMt7WwPpIbnzAKBggqhkjOPQQD
AgNIADBFAiEA+FNPSoJ5so68T1S7ceXAw/o/wtcr2RLIMSidN4rbqkMCIGA3ARWu
d7WbU5gaisQ9lfdcKuzMjurQPKpLuPJzhRdp
-----END CERTIFICATE-----
"""
NET_CERTIFICATES = {"good": """\
-----BEGIN CERTIFICATE-----
MIIBWjCCAQGgAwIBAgIBAjAKBggqhkjOPQQDAjAaMRgwFgYDVQQDDA9zZXJ2LnB5
IHRlc3QgQ0EwIBcNMDAwMTAxMDAwMDAwWhgPMjEyNjAxMDEwMDAwMDBaMBExDzAN
BgNVBAMMBnNlcnZlcjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABFlSyqoDatiB
PgXvC1FKUNRUU/RBfm6w9GKAQ+cC1gFrLtqb5BHdwzPMKrqUWJJJuC3mNUx8uweq
i1mL7xui+aujPzA9MBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAfBgNVHSME
GDAWgBSDJ7qKRp7EVMp3n6fMt7WwPpIbnzAKBggqhkjOPQQDAgNHADBEAiApa0V2
AQfcJMQOKuDXnvnSch+TCzVb8/TeIx82T90HrAIgEEE0zftL5BFaLVDTXbU2IkUc
HuXq4B+TlJS64vK/Y0E=
-----END CERTIFICATE-----
""", "expired": """\
-----BEGIN CERTIFICATE-----
MIIBWDCB/6ADAgECAgEDMAoGCCqGSM49BAMCMBoxGDAWBgNVBAMMD3NlcnYucHkg
dGVzdCBDQTAeFw0wMDAxMDEwMDAwMDBaFw0wMTAxMDEwMDAwMDBaMBExDzANBgNV
BAMMBnNlcnZlcjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABFlSyqoDatiBPgXv
C1FKUNRUU/RBfm6w9GKAQ+cC1gFrLtqb5BHdwzPMKrqUWJJJuC3mNUx8uweqi1mL
7xui+aujPzA9MBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAfBgNVHSMEGDAW
gBSDJ7qKRp7EVMp3n6fMt7WwPpIbnzAKBggqhkjOPQQDAgNIADBFAiAx5uJ95m1c
71Fz1L54GubJ584IexWrVPXHymHdnEuRmAIhAMh1kkJCSy4W4RKMRsQjHymA0Ug6
Ii8hc+LtFE0XIMMb
-----END CERTIFICATE-----
""", "old": """\
-----BEGIN CERTIFICATE-----
MIIBOTCB4KADAgECAgEEMAoGCCqGSM49BAMCMBoxGDAWBgNVBAMMD3NlcnYucHkg
dGVzdCBDQTAgFw0wMDAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFowETEPMA0G
A1UEAwwGc2VydmVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEWVLKqgNq2IE+
Be8LUUpQ1FRT9EF+brD0YoBD5wLWAWsu2pvkEd3DM8wqupRYkkm4LeY1THy7B6qL
WYvvG6L5q6MeMBwwGgYDVR0RBBMwEYcEfwAAAYIJbG9jYWxob3N0MAoGCCqGSM49
BAMCA0gAMEUCIDgwReKMWc/Ckd+zKHnFxfYqz8y0rsK/BsehHy2kHvD6AiEA2uSa
kF9GLwXK6P9IA1Qk9nVjGf21w+om6ALb7m6mikg=
-----END CERTIFICATE-----
"""}
NET_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+v2aZa2UaXD9buzx
3nzUE4mImHH37Jd8DqCQ5+2uPyWhRANCAARZUsqqA2rYgT4F7wtRSlDUVFP0QX5u
sPRigEPnAtYBay7am+QR3cMzzCq6lFiSSbgt5jVMfLsHqotZi+8bovmr
-----END PRIVATE KEY-----
"""


# ---------------------------------------------------------------------------
# Command line
#
# main() runs here where it can.  A process is started where one matters: for
# redirections, pipes and signals.
# ---------------------------------------------------------------------------

HI = 'You said: "Hi"\n'  # the fake service's answer to "Hi"
SECRET = "sk-secret"     # a value that no message may show
CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
each_way = pytest.mark.parametrize("way", [[], ["--no-stream"]], ids=str)
on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
needs_sh = pytest.mark.skipif(not shutil.which("sh"), reason="needs sh")


@pytest.fixture
def cli(monkeypatch):
    """Run the command line here; return its status, output and errors."""
    def run(*argv, encoding="utf-8", **files):
        files = {"stdin": b"", "stdout": b"", "stderr": b"", **files}
        ours = {name: io.TextIOWrapper(io.BytesIO(data), encoding,
                                       newline="\n", write_through=True)
                for name, data in files.items() if isinstance(data, bytes)}
        with monkeypatch.context() as patch:
            for name in files:
                patch.setattr(sys, name, ours.get(name, files[name]))
            status = serv.main(list(argv))
        return (status, *(ours[name].buffer.getvalue().decode(encoding)
                          for name in ("stdout", "stderr") if name in ours))
    return run


@pytest.fixture
def answering(monkeypatch):
    """Start a server with these answers; SERV_BASE_URL leads to it."""
    with contextlib.ExitStack() as stack:
        def run(*answers):
            server = stack.enter_context(Server(list(answers)))
            monkeypatch.setenv("SERV_BASE_URL", server.url)
            return server
        yield run


def is_one_line(err):
    """Whether errors are one line, which any terminal may show."""
    return err.startswith("serv: ") and err[:-1].isprintable() and (
        err[-1] == "\n")


# -- What is sent -------------------------------------------------------------

@table("argv, stdin, prompt", {
    "one argument": (["Hi"], b"", "Hi"),
    "arguments are joined by spaces": (["a", "b  c", "d"], b"", "a b  c d"),
    "options may stand between": (["a", "-m", "x", "b"], b"", "a b"),
    "-- ends the options": (["--", "-m", "--help"], b"", "-m --help"),
    "-- after an argument": (["a", "--", "-v"], b"", "a -v"),
    "a second -- is a word": (["a", "--", "--"], b"", "a --"),
    "standard input": ([], b"piped", "piped"),
    "- is standard input": (["-"], b"piped", "piped"),
    "it follows the arguments": (["a", "b:"], b"c\nd", "a b:\n\nc\nd"),
    "it follows them with - too": (["a:", "-"], b"piped", "a:\n\npiped"),
    "its indentation is kept": ([], b"    a\n  b\n", "    a\n  b"),
    "an undecodable argument": (["a \udcff"], b"", "a \ufffd"),
    "an undecodable standard input": ([], b"a \xff b", "a \ufffd b")})
def test_the_prompt_is_the_arguments_then_standard_input(
        argv, stdin, prompt, cli, fake):
    status, _, err = cli(*argv, stdin=stdin)
    assert (status, err) == (0, "")
    assert sent(fake)["messages"][-1]["content"] == prompt


def test_a_standard_input_that_is_late_is_waited_for(cli):
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w") as late:
        late.write("Hi")
        threading.Timer(0.05, late.close).start()
        assert cli(stdin=stdin) == (0, HI, "")


@on_posix
def test_a_non_blocking_standard_input_with_nothing_yet_is_empty(cli):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader) as stdin, open(writer, "w"):
        assert cli("Hi", stdin=stdin) == (0, HI, "")


@table("argv, stdin", {
    "nothing": ([], b""), "blanks": ([""], b" \n"),
    "- twice": (["-", "-"], b""), "standard input is closed": ([], None)})
def test_no_prompt_is_wrong_usage(argv, stdin, cli, fake):
    status, out, err = cli(*argv, stdin=stdin)
    assert (status, out, is_one_line(err)) == (2, "", True)
    assert "no prompt" in err and fake.requests == []


@table("endpoint, argv, body", {
    "no more than that": ("chat", [], {}),
    "messages: 4096 tokens": ("messages", [], {"max_tokens": 4096}),
    "messages: -n": ("messages", ["-n", "7"], {"max_tokens": 7}),
    "messages: -o": ("messages", ["-o", "max_tokens=7"], {"max_tokens": 7}),
    "chat: -n": ("chat", ["--max-tokens", "7"], {"max_completion_tokens": 7}),
    "0 is a limit": ("chat", ["-n", "0"], {"max_completion_tokens": 0}),
    "-m": ("chat", ["-m", "a"], {"model": "a"}),
    "messages: -s": ("messages", ["-s", "Rhyme.", "-n", "7"],
                     {"system": "Rhyme.", "max_tokens": 7}),
    "JSON": ("chat", ["-o", "temperature=0.5", "-o", 'a={"b": [true]}'],
             {"temperature": 0.5, "a": {"b": [True]}}),
    "else text": ("chat", ["--option", "a=b=c", "-o", "d="],
                  {"a": "b=c", "d": ""}),
    "undecodable": ("chat", ["-o", "a=\udcff"], {"a": "\ufffd"})})
def test_options_become_parameters_of_the_body(
        endpoint, argv, body, cli, fake):
    cli("-e", endpoint, "--no-stream", *argv, "Hi")
    system = "You are a helpful assistant."
    prompt = ({"messages": [{"role": "system", "content": system}, ASKED]}
              if endpoint == "chat" else
              {"system": system, "messages": [ASKED]})
    assert sent(fake) == {"model": MODEL, **prompt, **body}


@each_endpoint
@pytest.mark.parametrize("variable", ["of-the-variable", "", None])
def test_the_model_that_no_option_names(endpoint, variable, cli, fake,
                                        monkeypatch):
    monkeypatch.delenv("SERV_MODEL")
    if variable is not None:
        monkeypatch.setenv("SERV_MODEL", variable)
    assert cli("-e", endpoint, "Hi") == (0, HI, "")
    example = {"chat": "gpt-5.4-mini", "messages": "claude-haiku-4.5"}
    assert sent(fake)["model"] == (variable or example[endpoint])


@table("header, name, value", {
    "a second colon": ("X-A: 1: 2", "x-a", "1: 2"),
    "it replaces ours": ("user-agent:mine", "user-agent", "mine"),
    "empty": ("X-A:", "x-a", "")})
def test_a_header_option_is_split_at_its_first_colon(
        header, name, value, cli, fake):
    assert cli("-H", header, "Hi") == (0, HI, "")
    assert fake.requests[0].headers[name] == value


# -- What is printed ----------------------------------------------------------

@each_way
@each_endpoint
def test_only_the_answer_is_printed(endpoint, way, cli, fake):
    assert cli("-e", endpoint, *way, "Hi") == (0, HI, "")
    assert sent(fake).get("stream", False) == (way == [])


@pytest.mark.parametrize("text, out", [
    ("a", "a\n"), ("a\n", "a\n"), ("", ""), (None, "")])
def test_one_line_end_closes_an_answer(text, out, cli, answering):
    answering(http_answer(bare_answer(text)))
    assert cli("--no-stream", "Hi") == (0, out, "")


@each_endpoint
def test_json_prints_the_whole_reply(endpoint, cli, fake):
    status, out, err = cli("-e", endpoint, "--json", "Hi \u00e9")
    build = chat_answer if endpoint == "chat" else messages_answer
    assert (status, json.loads(out), err) == (0, build(sent(fake)), "")


@each_way
@each_endpoint
def test_verbose_tells_request_id_time_and_tokens(endpoint, way, cli, fake):
    status, out, err = cli("-v", "-e", endpoint, *way, "Hi")
    assert (status, out, is_one_line(err)) == (0, HI, True)
    assert REQUEST_ID % 1 in err and re.search(r"\b\d\.\d+ ?s\b", err)
    assert re.search(r"tokens\D+1\b.*tokens\D+3\b", err)


@each_way
def test_an_answer_that_calls_tools_says_how_to_see_them(way, cli):
    tools = 'tools=[{"type": "function", "function": {"name": "f"}}]'
    status, out, err = cli("-o", tools, *way, "Hi")
    assert (status, out, is_one_line(err)) == (0, "", True)
    assert "tools" in err and "--json" in err


@table("way, answer, out, err", {
    "an answer": ([], service, 'You said: "d?j?"\n', ""),
    "an answer as JSON": (["--json"],
                          http_answer(bare_answer("d\u00e9j\u00e0")),
                          '"d?j?"', ""),
    "half a character": (["--no-stream"], http_answer(bare_answer("a\ud83db")),
                         "a?b\n", ""),
    "an error": ([], error_answer(400, "No \u00e9."), "", "No ?.")})
def test_what_an_encoding_lacks_is_replaced(way, answer, out, err, cli,
                                            answering):
    answering(answer)
    _, *told = cli(*way, "d\u00e9j\u00e0", encoding="ascii")
    for expected, text in zip((out, err), told):
        assert expected in text if expected else text == ""


# -- What the program says of itself ------------------------------------------

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_terminal_and_tells_every_option(flag, cli, fake,
                                                     monkeypatch):
    monkeypatch.delenv("SERV_API_KEY")  # it needs none
    status, out, err = cli(flag)
    lines = out.splitlines()
    assert (status, err, fake.requests) == (0, "", [])
    assert lines[0].startswith("usage: ")
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    assert set(re.findall("--[a-z][a-z-]*", out)) == {
        "--model", "--system", "--endpoint", "--max-tokens", "--option",
        "--header", "--no-stream", "--json", "--dry-run", "--verbose",
        "--version", "--help"}  # none takes the key
    assert [word for word in ("SERV_API_KEY", "SERV_MODEL", "< /dev/null",
                              " 130 ") if word not in out] == []


def test_the_version_is_printed_without_a_call(cli, fake):
    assert cli("--version") == (0, "serv %s\n" % serv.__version__, "")
    assert fake.requests == []


# -- Exit status 2: wrong usage, said in words of the command line ------------

@pytest.mark.parametrize("argv, says", [
    (["--api-key=" + SECRET], "unrecognized option --api-key"),
    (["--api-key", SECRET], "unrecognized option --api-key"),
    (["--modle=" + SECRET], "unrecognized option --modle"),
    (["-k" + SECRET], "unrecognized option -k"),
    (["--json=" + SECRET], "--json"),
    (["--max_tokens", "9"], "unrecognized option --max_tokens"),
    (["--no=" + SECRET], "unrecognized option --no"),
    (["-e", SECRET], "-e: expected chat or messages"),
    (["-n", SECRET], "-n: expected a whole number"),
    (["-n", "1.5"], "-n: expected a whole number"),
    (["-n"], "-n"),
    (["-s", ""], "-s"),
    (["-o", SECRET], "-o"),
    (["-o", "=" + SECRET], "-o"),
    (["-H", SECRET], "-H"),
    (["-H", ": " + SECRET], "-H"),
    (["-H", SECRET + " x: a"], "header"),
    (["-H", "Host: " + SECRET], "Host"),
    (["-H", "X-A: " + SECRET + "\nX-B: b"], "header"),
    (["-o", "model=" + SECRET], "-m"),
    (["-o", "system=" + SECRET], "-s"),
    (["-o", "endpoint=" + SECRET], "-e"),
    (["-o", "headers=" + SECRET], "-H"),
    (["-o", "extra_headers=" + SECRET], "-H"),
    (["-o", "messages=" + SECRET], "prompt"),
    (["-o", "stream=true"], "--no-stream"),
    (["-o", "api_key=" + SECRET], "SERV_API_KEY"),
    (["-o", "base_url=" + SECRET], "SERV_BASE_URL"),
    (["-o", "timeout=1"], "SERV_TIMEOUT"),
    (["-o", "max_retries=0"], "max_retries")],
    ids=lambda value: str(value) if isinstance(value, list) else "")
def test_wrong_usage_ends_with_2_and_shows_no_secret(argv, says, cli, fake):
    status, out, err = cli(*argv, "Hi")
    assert (status, out, is_one_line(err)) == (2, "", True), err
    assert says in err and SECRET not in err
    assert fake.requests == []


@pytest.mark.parametrize("name, value", [
    ("SERV_BASE_URL", "example.com"), ("SERV_TIMEOUT", "soon")])
def test_a_wrong_variable_is_named(name, value, cli, monkeypatch):
    monkeypatch.setenv(name, value)
    status, out, err = cli("Hi")
    assert (status, out, is_one_line(err)) == (2, "", True) and name in err


# -- Exit status 1: no key, or the call failed --------------------------------

@pytest.mark.parametrize("key", [
    "", "\n", os.fsdecode("serv_\u2026".encode())], ids=repr)
def test_without_a_usable_key_it_ends_with_1(key, cli, fake, monkeypatch):
    monkeypatch.setenv("SERV_API_KEY", key)
    status, out, err = cli("Hi")
    assert (status, out, is_one_line(err)) == (1, "", True)
    assert "API" in err and "serv_" not in err and fake.requests == []


@table("answer, says", {
    "a message": (error_answer(400, "No such thing."), "No such thing."),
    "a long message: cut short": (
        error_answer(400, "\u00e9" * 5000), "\u00e9" * 300),
    "an echo of the key": (error_answer(401, KEY), "401"),
    "HTML": (http_answer(b"<html>\nSign in\n</html>", kind="text/html"),
             "Sign in"),
    "a redirect": (http_head("301 Moved", location="http://elsewhere",
                             content_length=0), "http://elsewhere")})
def test_a_failed_call_is_told_in_one_line(answer, says, cli, answering):
    answering(answer)
    status, out, err = cli("Hi")
    assert (status, out, is_one_line(err)) == (1, "", True)
    assert says in err and KEY not in err and len(err) < SHORT


@table("end", {
    "cut": b"", "a broken event": sse("{"),
    "an error event": sse({"error": {"type": "overloaded_error"}})})
def test_what_had_come_of_a_failed_stream_is_printed(end, cli, answering):
    head = http_head(kind="text/event-stream")
    answering(closing(head + sse(bare_chunk("Half an")) + end))
    status, out, err = cli("Hi")
    assert (status, out, is_one_line(err)) == (1, "Half an\n", True)


# -- Exit status 3: blocked, or cut off by the token limit --------------------

@each_endpoint
@pytest.mark.parametrize("way", [[], ["--no-stream"], ["--json"]], ids=str)
@table("argv, text, says", {
    "blocked": (["blocked"], "I can't share that.", "blocked"),
    "cut off": (["-n", "2", "Hi"], "You said:", "token limit")})
def test_an_answer_that_is_not_whole_ends_with_3(endpoint, way, argv, text,
                                                 says, cli):
    status, out, err = cli("-e", endpoint, *way, *argv)
    assert (status, is_one_line(err)) == (3, True) and says in err
    if way == ["--json"]:
        out = serv.Reply(json.loads(out)).text + "\n"
    assert out == text + "\n"


def test_an_answer_without_a_reason_is_doubted_on_standard_error(
        cli, answering):
    answering(stream_answer(bare_chunk("Half"), "[DONE]"))
    status, out, err = cli("Hi")
    assert (status, out, is_one_line(err)) == (0, "Half\n", True)
    assert "may be cut off" in err


@table("argv, answer, status, says", {
    "a request id": (["-v"], http_answer(REPLY, request_id="a\x1b[2J\x9b5mb"),
                     0, "request id a.+b"),
    "why it is blocked": (
        [], http_answer(bare_answer(None, refusal="a%sb" % CONTROLS)), 3,
        "blocked: a.+b"),
    "an error": ([], error_answer(400, "a%s\u2028b" % CONTROLS), 1, "a.+b")})
def test_a_server_cannot_drive_a_terminal(argv, answer, status, says, cli,
                                          answering):
    answering(answer)
    ended, out, err = cli(*argv, "--no-stream", "Hi")
    assert (ended, is_one_line(err)) == (status, True)
    assert re.search(says, err)


# -- --dry-run: the command that it prints is run for real --------------------

@each_endpoint
def test_a_dry_run_needs_no_key_and_sends_nothing(endpoint, cli, fake,
                                                  monkeypatch):
    argv = ["-e", endpoint, "--dry-run", "Hi"]
    with_key = cli(*argv)
    monkeypatch.delenv("SERV_API_KEY")
    status, out, err = cli(*argv)
    assert with_key == (status, out, err) == (0, out, "")
    assert out.startswith("curl ") and "$SERV_API_KEY" in out
    assert KEY not in out and fake.requests == []


@needs_sh
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@table("path, argv", {
    "what a shell expands": ("", [
        "$HOME `id` $(id) \\ \"q\" 'p' !", "a\nb\n\nc\t%d%%", "'; exit 1; '"]),
    "what curl reads": ("", ["@/etc/hostname", "\u00e9\U0001f600"]),
    "headers and options": ("", [
        "-H", "X-A: 'b' $c \"d\" @e", "-o", 'x={"y": "$z"}', "Hi"]),
    "messages": ("", ["-e", "messages", "-n", "9", "-s", "'$HOME'\n", "Hi"]),
    "ours replaced, and none": ("", ["-H", "Accept: */*", "-H", "X-A:", "Hi"]),
    "an authorization of one's own": ("", [
        "-H", "authorization: Bearer " + KEY, "--no-stream", "Hi"]),
    "our line elsewhere": ("", [
        "-H", "X-A: Authorization: Bearer $SERV_API_KEY",
        "'Authorization: Bearer $SERV_API_KEY'"]),
    "a path for the shell": ("/it's/$HOME", ["Hi"]),
    "a path that curl would change": ("/{a,b}/[1-2]/../c", ["Hi"])})
def test_curl_sends_what_a_dry_run_prints(path, argv, cli, fake, tmp_path,
                                          monkeypatch):
    monkeypatch.setenv("SERV_BASE_URL", fake.url + path)
    monkeypatch.setenv("HOME", str(tmp_path))  # for curl: no .curlrc
    cli(*argv)
    status, command, err = cli("--dry-run", *argv)
    assert (status, err) == (0, "")
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    ours, curls = fake.requests
    assert curls[:4] == ours[:4]


# -- Processes: redirections, pipes, signals ----------------------------------

def cli_start(*argv, program=("-m", "serv"), shell=(), variables=None,
              **options):
    """Start the command line as a process of its own; with -S it is faster."""
    python = [sys.executable, "-S", "-W", "error"]
    return subprocess.Popen(
        [*shell, *python, *program, *argv],
        env={**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": ROOT,
             "PYTHONDONTWRITEBYTECODE": "", **(variables or {})}, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE, **options})


def cli_end(process, stdin=None):
    """Wait for a process; return its status, output and errors."""
    out, err = process.communicate(stdin, timeout=30)
    return (process.returncode, *(
        data.decode("utf-8").replace(os.linesep, "\n")
        for data in (out, err)))


def test_it_runs_as_a_script():
    with cli_start("Hi", program=[serv.__file__]) as process:
        assert cli_end(process) == (0, HI, "")


def test_the_fake_service_can_be_tried_without_a_key_or_pytest():
    with cli_start("Hi", program=[__file__], variables={
            "SERV_API_KEY": "", "SERV_BASE_URL": "",
            "http_proxy": "http://127.0.0.1:9"}) as process:
        assert cli_end(process) == (0, HI, "")


def test_bytes_that_are_no_text_are_replaced():
    argv = [b"\xc3\xa9 \xff"] if os.name == "posix" else ["\u00e9 \ufffd"]
    utf8 = {} if os.name == "nt" else {"PYTHONUTF8": "1",
                                       "PYTHONIOENCODING": ""}
    with cli_start(*argv, stdin=subprocess.PIPE, variables=utf8) as process:
        assert cli_end(process, b"\xf0\x9f\x98\x80 \xff") == (
            0, 'You said: "\u00e9 \ufffd\n\n\U0001f600 \ufffd"\n', "")


FULL = (1, "", "serv: .*No space left on device.*\n")


@needs_sh
@table("redirection, argv, variables, end, asked", {
    "standard input is closed": ("<&-", ["Hi"], {}, (0, HI, ""), 1),
    "nohup opens it for writing": (
        "0>/dev/null", ["Hi"], {}, (0, HI, ""), 1),
    "standard output is closed: nothing is asked": (
        ">&-", ["Hi"], {},
        (1, "", "serv: cannot write the output: it is closed\n"), 0),
    "a full disk": (">/dev/full", ["Hi"], {}, FULL, 1),
    "a full disk, unbuffered": (
        ">/dev/full", ["Hi"], {"PYTHONUNBUFFERED": "1"}, FULL, 1),
    "a full disk, --json": (">/dev/full", ["--json", "Hi"], {}, FULL, 1),
    "errors are closed": ("2>&-", ["Hi"], {}, (0, HI, ""), 1),
    "errors are closed, and no key": (
        "2>&-", ["Hi"], {"SERV_API_KEY": ""}, (1, "", ""), 0),
    "errors go to a full disk": (
        "2>/dev/full", ["Hi"], {"SERV_API_KEY": ""}, (1, "", ""), 0)})
def test_what_a_closed_or_full_redirection_leads_to(
        redirection, argv, variables, end, asked, fake):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with cli_start(*argv, shell=["sh", "-c", 'exec "$@" ' + redirection, "sh"],
                   variables=variables) as process:
        status, out, err = cli_end(process)
    assert (status, out) == end[:2] and re.fullmatch(end[2], err), err
    assert len(fake.requests) == asked


@table("flags, told", {
    "not unasked": ([], ""), "with -v": (
        ["-v"], "serv: .*503.*\nserv: .*429.*\nserv: .*request id.*\n")})
def test_a_line_tells_each_retry(flags, told, answering):
    answering(error_answer(503), error_answer(429), service)
    with cli_start(*flags, "Hi") as process:
        status, out, err = cli_end(process)
    assert (status, out) == (0, HI) and re.fullmatch(told, err), err


def test_verbose_of_one_run_does_not_make_the_next_tell_retries(
        cli, answering):
    busy = error_answer(503)
    answering(service, busy, service)
    assert cli("-v", "Hi")[:2] == (0, HI)
    assert cli("Hi") == (0, HI, "")


class Pausing:
    """A service that sends an event, or none, and waits for `go_on`."""

    def __init__(self, first=b"", *rest):
        self.first, self.rest = first, rest
        self.came, self.go_on = threading.Event(), threading.Event()

    def __call__(self, wire, request):
        if self.first:
            wire.sendall(http_head(kind="text/event-stream")
                         + sse(self.first))
        self.came.set()
        if self.go_on.wait(30):
            wire.sendall(sse(*self.rest))
        return False


def test_a_piece_is_printed_as_it_comes(answering):
    model = Pausing(bare_chunk("One "), bare_chunk("two", "stop"), "[DONE]")
    answering(model)
    with cli_start("Hi") as process:
        assert process.stdout.read(4) == b"One "
        model.go_on.set()
        assert cli_end(process) == (0, "two\n", "")


def test_a_pipe_that_closes_midway_ends_it_quietly(answering):
    model = Pausing(bare_chunk("One "), bare_chunk("two " * 99999), "[DONE]")
    answering(model)
    with cli_start("Hi") as process:
        assert process.stdout.read(4) == b"One "
        process.stdout.close()
        model.go_on.set()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("argv", [["Hi"], ["--help"]], ids=str)
def test_a_pipe_that_was_closed_ends_it_quietly(argv):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe, cli_start(*argv, stdout=pipe) as process:
        assert process.stderr.read() == b""
    assert process.returncode == 1


@on_posix
@table("argv, piece, rest", {
    "before the answer": ([], b"", ""),
    "before the answer, --no-stream": (["--no-stream"], b"", ""),
    "while it is streamed: the line is ended": ([], b"One ", "\n")})
def test_an_interrupt_ends_with_130(argv, piece, rest, answering):
    model = Pausing(piece and bare_chunk(piece.decode()))
    answering(model)
    # A shell's & starts what ignores interrupts, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with cli_start(*argv, "Hi") as process:
            assert model.came.wait(30)
            assert process.stdout.read(len(piece)) == piece
            time.sleep(0.05 if piece else 0)  # until it waits for the next
            process.send_signal(signal.SIGINT)
            ended = cli_end(process)
    finally:
        signal.signal(signal.SIGINT, before)
        model.go_on.set()
    assert ended == (130, rest, "serv: interrupted\n")


# -- A terminal, 40 columns wide ----------------------------------------------

class Terminal:
    """A terminal: its `keyboard`, a file to write to, and what it shows."""

    def __init__(self):
        self.inside, end = os.openpty()
        pytest.importorskip("fcntl").ioctl(
            end, pytest.importorskip("termios").TIOCSWINSZ,
            struct.pack("4H", 24, 40, 0, 0))
        self.keyboard = open(os.dup(end), encoding="utf-8")
        self.file = open(end, "w", encoding="utf-8")
        self.data = ""

    def close(self):
        self.keyboard.close()
        self.file.close()
        os.close(self.inside)

    def read(self, until):
        """Read what is written up to a text; return all that was so far."""
        while until not in self.data:
            assert select.select([self.inside], [], [], 9)[0], self.data
            self.data += os.read(self.inside, 9999).decode()
        return self.data

    def written(self):
        """Return all that was written."""
        print("\0", end="", file=self.file, flush=True)
        return self.read("\0").rstrip("\0").replace("\r\n", "\n")


def cli_screen(data):
    """Return the lines that a terminal shows after it was sent some text."""
    lines = []
    for line in data.split("\n"):
        *erased, text = line.split("\r")  # each begins again on the left
        assert all(len(note) < 40 for note in erased), "wider than the window"
        for part in reversed(erased):
            text += part[len(text):]
        lines.append(text.rstrip())
    return lines


@pytest.fixture
def terminal():
    if not hasattr(os, "openpty"):
        pytest.skip("needs terminals")
    terminal = Terminal()
    if not terminal.file.isatty():
        pytest.skip("its terminals are none")
    yield terminal
    terminal.close()


def test_a_note_needs_no_size_of_its_terminal(monkeypatch):
    class Nul(io.StringIO):  # as Windows' NUL
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Nul())
    note = serv.Note("waiting")
    note.erase()
    note.erase()
    assert sys.stderr.getvalue() == "waiting\r         \r"


@each_way
@pytest.mark.parametrize("model", [MODEL, "wider-than-the-window-" * 5],
                         ids=["short", "wider than the window"])
def test_a_note_says_what_is_waited_for_until_it_comes(model, way, cli,
                                                       answering, terminal):
    def answer(wire, request):
        notes.append(terminal.read(model[:9]))
        service(wire, request)

    notes = []
    answering(answer)
    assert cli("-m", model, *way, "Hi", stdout=terminal.file,
               stderr=terminal.file) == (0,)
    assert notes[0].startswith("serv: ")
    assert cli_screen(terminal.written()) == HI.split("\n")


@table("argv, answers, status, shown", {
    "refused": ([], [error_answer(400, "No.")], 1, "serv: .*No.*\n"),
    "cut": ([], [closing(http_head(kind="text/event-stream") + sse(
        bare_chunk("Half an")))], 1, "Half an\nserv: .*\n"),
    "retried": (["-v"], [error_answer(503), service],
                0, "serv: .*503.*\n%sserv: request id .*\n" % HI)})
def test_nothing_of_the_note_is_left(argv, answers, status, shown, cli,
                                     answering, terminal):
    answering(*answers)
    assert cli(*argv, "Hi", stdout=terminal.file,
               stderr=terminal.file) == (status,)
    screen = "\n".join(cli_screen(terminal.written()))
    assert re.fullmatch(shown, screen) and MODEL not in screen


@table("way, answer", {
    "streamed": ([], stream_answer(
        *map(bare_chunk, CONTROLS), bare_chunk(".", "stop"))),
    "whole": (["--no-stream"], http_answer(bare_answer(CONTROLS + "."))),
    "as JSON": (["--json"], http_answer(bare_answer(CONTROLS + ".")))})
def test_an_answer_cannot_drive_a_terminal(way, answer, cli, answering,
                                           terminal):
    answering(answer)
    assert cli(*way, "Hi", stdout=terminal.file) == (0, "")
    written = terminal.written()
    assert set(written) & set(CONTROLS) <= set("\t\n")
    if way != ["--json"]:
        assert written == re.sub("[^\t\n]", "\ufffd", CONTROLS) + ".\n"


def test_in_a_pipe_an_answer_is_as_it_was_sent(cli, answering):
    answering(http_answer(bare_answer(CONTROLS)))
    assert cli("--no-stream", "Hi") == (0, CONTROLS + "\n", "")


@table("argv, prompt", {
    "not read unasked": (["Hi"], "Hi"), "- reads it": (["-"], "typed")})
def test_a_terminal_is_read_only_where_a_dash_asks_for_it(
        argv, prompt, cli, fake, terminal):
    os.write(terminal.inside, b"typed\n\x04\x04")  # Ctrl-D ends it
    assert cli(*argv, stdin=terminal.keyboard)[0] == 0
    assert sent(fake)["messages"][-1]["content"] == prompt


# ---------------------------------------------------------------------------
# Live checks
#
# Of the service itself, or of any other that speaks both formats.  They cost
# money, so they run only with SERV_LIVE=1; SERV_BASE_URL, SERV_API_KEY and
# SERV_MODEL say where.  They look at the shape of an answer only: what a
# model says is its own affair.
# ---------------------------------------------------------------------------

LIVE_LIMIT = {"chat": {"max_completion_tokens": 200},
              "messages": {"max_tokens": 200}}
LIVE_SCHEMA = {"type": "object", "required": ["city"],
               "properties": {"city": {"type": "string"}}}
LIVE_TOOL = {
    "chat": {"type": "function", "function": {
        "name": "get_weather", "parameters": LIVE_SCHEMA}},
    "messages": {"name": "get_weather", "input_schema": LIVE_SCHEMA}}
live_ways = pytest.mark.parametrize("streamed", [False, True],
                                    ids=["whole", "streamed"])


def live_call(endpoint, streamed, messages, **options):
    """Return the reply to a call, and check that it is a whole answer."""
    options = {"system": SYSTEM, **LIVE_LIMIT[endpoint], **options}
    if streamed:
        with serv.stream(messages, endpoint=endpoint, **options) as stream:
            pieces = list(stream)
        reply = stream.reply
        assert "".join(pieces) == reply.text and all(pieces)
        assert len(pieces) > 1 or reply.tool_calls
    else:
        call = serv.chat if endpoint == "chat" else serv.message
        reply = call(messages, **options)
    assert reply.stop_reason and reply.refusal is None and not reply.partial
    assert reply.elapsed > 0 and json.loads(json.dumps(reply)) == reply
    return reply


@live_ways
@each_endpoint
def test_live_turns(endpoint, streamed, real):
    messages = [{"role": "user", "content": "My name is Ada. Say hello."}]
    for question in ("What is my name?", "Thank you!"):
        reply = live_call(endpoint, streamed, messages)
        assert reply.text and reply.message["role"] == "assistant"
        messages += [reply.message, {"role": "user", "content": question}]


@each_endpoint
def test_live_events(endpoint, real):
    with serv.stream("Say hello.", endpoint=endpoint, system=SYSTEM,
                     **LIVE_LIMIT[endpoint]) as stream:
        events = list(stream.events())
    assert stream.reply.text and not stream.reply.partial
    if endpoint == "chat":
        assert all("choices" in event for event in events)
    else:
        types = [event["type"] for event in events if event["type"] != "ping"]
        assert (types[0], types[-1]) == ("message_start", "message_stop")


@live_ways
@each_endpoint
def test_live_tools(endpoint, streamed, real):
    chat = endpoint == "chat"
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    tools = {"tools": [LIVE_TOOL[endpoint]]}
    first = live_call(endpoint, streamed, messages, **tools,
                      tool_choice="required" if chat else {"type": "any"})
    assert first.tool_calls
    for call in first.tool_calls:
        assert call.id and call.name == "get_weather"
        assert isinstance(call.arguments["city"], str)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "18 C"}
               if chat else {"type": "tool_result", "tool_use_id": call.id,
                             "content": "18 C"} for call in first.tool_calls]
    messages += [first.message, *(
        results if chat else [{"role": "user", "content": results}])]
    if chat:
        tools["tool_choice"] = "none"
    last = live_call(endpoint, streamed, messages, **tools)
    assert not chat or (last.text and not last.tool_calls)


@live_ways
@each_endpoint
def test_live_wrong_key(endpoint, streamed, real):
    with pytest.raises(serv.AuthenticationError) as caught:
        live_call(endpoint, streamed, "Hi", api_key="sk-no-such-key")
    assert caught.value.status == 401
    assert "sk-no-such-key" not in str(caught.value)


@each_way
@each_endpoint
def test_live_command_line(endpoint, way, real, cli):
    status, out, err = cli("-v", "-e", endpoint, "-n", "100", *way, "Hello!")
    assert status in (0, 3) and out.strip()
    assert err.startswith("serv: request id ")


# ---------------------------------------------------------------------------
# README and promises
#
# Every block of README.md runs and prints what README.md says.  What it says
# about serv.py is true, and serv.py is made as it promises to be.
# ---------------------------------------------------------------------------

def read_project_file(name):
    """Return the text of a file of the project; "" where it is not here."""
    path = os.path.join(ROOT, name)
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


SOURCE = read_project_file("serv.py")
README = read_project_file("README.md")
PYPROJECT = read_project_file("pyproject.toml")
needs_readme = pytest.mark.skipif(
    not README, reason="README.md is not beside serv.py")
needs_pyproject = pytest.mark.skipif(
    not PYPROJECT, reason="pyproject.toml is not beside serv.py")


# -- The blocks of README.md --------------------------------------------------

Block = collections.namedtuple("Block", "title kind marks code output")
# The heading above it; python, sh or text; the comments above it; the code;
# the output that follows it, or None where that is the model's words.


def parse_blocks(text):
    """Return the blocks of a README; a text block is the output of the last.

    Comments (`<!-- ... -->`) mark the block that follows.
    """
    blocks, marks, title = [], [], ""
    for heading, mark, kind, code in re.findall(
            r"^(?:#+ ([^\n]*)|<!-- ([^\n]*) -->|```(\w+)\n(.*?)^```)$", text,
            re.M | re.S):
        if heading:
            title, marks = heading, []
        elif mark:
            marks.append(mark)
        elif kind == "text" and "help" not in marks:
            if "the model's words" not in marks:
                blocks[-1] = blocks[-1]._replace(output=code)
            marks = []
        else:
            blocks.append(Block(title, kind, marks, code, None))
            marks = []
    return blocks


BLOCKS = parse_blocks(README)
NOT_HERE = {"-m pip ": "it installs something",
            "-m pytest -q test_serv.py": "it would run this test again"}
ENGINES = {"dask": "distributed", "ray": "ray", "pyspark": "pyspark",
           "anthropic": "anthropic", "openai": "openai"}


def find_block(title, number=0):
    """Return the code of a Python block below a heading."""
    return [block.code for block in BLOCKS
            if block.title == title and block.kind == "python"][number]


def needs_a_process(block):
    """Whether a program changes the environment, or needs other packages."""
    return re.search(r"os\.environ\.update|^(?:from|import) (?:%s)\b"
                     % "|".join(ENGINES), block.code, re.M)


def why_not(block):
    """Return why a block cannot run here, or None."""
    for words, reason in NOT_HERE.items():
        if words in block.code:
            return reason
    if block.kind == "sh":
        for tool in "bash", "zip", "sha256sum":
            if tool in "bash " + block.code and not shutil.which(tool):
                return "there is no %s here" % tool
    for package, module in ENGINES.items():
        if re.search(r"^(from|import) %s\b" % package, block.code, re.M):
            if not importlib.util.find_spec(module):
                return "%s is not installed" % module
    return None


def clean_environment(**more):
    """Return the environment without what would change an example."""
    return dict({name: value for name, value in os.environ.items()
                 if not re.match("SERV_|SSL_CERT_|PYTEST", name)
                 and not name.lower().endswith("_proxy")}, **more)


class Reader:
    """Someone who has README.md, and the files in a folder of their own.

    `here` is the environment after the lines that lead to the fake
    service; `bare` that of someone without a key, behind a proxy.
    """

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        path = os.pathsep.join([os.path.dirname(sys.executable),
                                os.environ.get("PATH", "")])
        self.bare = clean_environment(
            COLUMNS="80", PYTHONIOENCODING="utf-8", PATH=path,
            PYSPARK_PYTHON=sys.executable, RAY_USAGE_STATS_ENABLED="0",
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            PYTEST_ADDOPTS="--assert=plain",
            HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
        self.here = dict(self.bare, SERV_BASE_URL=server.url,
                         SERV_API_KEY=KEY, SERV_MODEL="gpt-5.4-mini",
                         no_proxy="127.0.0.1")

    def run(self, *command, env=None):
        """Run a command in the folder; return what it prints."""
        done = subprocess.run(
            command, cwd=self.folder, env=env or self.here, timeout=120,
            input="", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(self.server.url, serv.BASE_URL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader of README.md, with its named programs already saved."""
    folder = str(tmp_path_factory.mktemp("reader"))
    for name in "serv.py", "test_serv.py":
        if os.path.exists(os.path.join(ROOT, name)):
            path = shutil.copy(os.path.join(ROOT, name), folder)
            py_compile.compile(path)  # once, not in each program
    for block in BLOCKS:
        for name in re.findall(r"\A# (\w+\.py)\n", block.code):
            with open(os.path.join(folder, name), "w") as file:
                file.write(block.code)
    with Server(service) as server:
        yield Reader(folder, server)


def run_here(code, server, monkeypatch):
    """Run a program of README.md in this process; return its names."""
    monkeypatch.setenv("SERV_BASE_URL", server.url)
    names = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    return names


@needs_readme
@pytest.mark.parametrize("block", [
    pytest.param(block, id="%d %s" % (number, block.title))
    for number, block in enumerate(BLOCKS) if block.kind != "text"])
def test_readme_block_prints_what_readme_says(block, reader, monkeypatch,
                                              capsys):
    if why_not(block):
        pytest.skip(why_not(block))
    if block.kind == "sh":
        # What is about "test_..." needs no key.
        env = reader.bare if "test_" in block.code else reader.here
        output = reader.run("bash", "-e", "-c", block.code, env=env)
    elif needs_a_process(block):
        output = reader.run(sys.executable, "-c", block.code)
    else:
        monkeypatch.chdir(reader.folder)
        run_here(block.code, reader.server, monkeypatch)
        output = capsys.readouterr().out
    if block.output is not None:
        assert output == block.output
    lines = iter(output.splitlines())
    for line in re.findall(r"# -> (.*)$", block.code, re.M):
        assert line in lines, output  # each after the one before
    shown = re.findall(r"\bprint\(.*# (?:->|e\.g\.) ", block.code)
    assert len(output.splitlines()) >= len(shown), output


@needs_readme
def test_readme_blocks_are_all_run():
    kinds = collections.Counter(block.kind for block in BLOCKS)
    assert set(kinds) == {"python", "sh", "text"}
    assert kinds["python"] > 20 and kinds["sh"] > 8
    assert [block.marks for block in BLOCKS if block.kind == "text"] == [
        ["help"]]
    outputs = len(re.findall(r"^```text$", README, re.M)) - kinds["text"]
    assert README.count("\n```") == 2 * (len(BLOCKS) + outputs)


def test_readme_blocks_are_told_apart():
    assert parse_blocks(
        "# One\n```sh\na\n```\n```text\nb\n```\n## Two\n<!-- x -->\n"
        "```python\nc\n```\n<!-- the model's words -->\n```text\nd\n```\n"
        "<!-- help -->\n```text\ne\n```\n") == [
            Block("One", "sh", [], "a\n", "b\n"),
            Block("Two", "python", ["x"], "c\n", None),
            Block("Two", "text", ["help"], "e\n", None)]


@needs_readme
def test_readme_lines_at_the_top_lead_to_the_fake_also_with_a_proxy(reader):
    if not os.path.exists(os.path.join(reader.folder, "test_serv.py")):
        pytest.skip("test_serv.py is not beside serv.py")
    lines = find_block("serv.py")
    code = lines + find_block("A conversation") + find_block("Messages")
    assert reader.run(  # with -S there is no pytest
        sys.executable, "-S", "-c", code, env=reader.bare) == (
        'You said: "What is my name?"\n' + 'You said: "Hello!"\n' * 2
        + "end_turn\n")


# -- The recipes of README.md, on a bad day -----------------------------------

def chat_calls_tools(*calls):
    """Return a chat answer with calls of (name, arguments)."""
    return http_answer(bare_answer("", tool_calls=[
        {"id": "call_%d" % number, "type": "function", "function": {
            "name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)]))


def message_calls(name, given):
    """Return a Messages answer that calls a tool."""
    return http_answer({"type": "message", "role": "assistant",
                        "stop_reason": "tool_use", "content": [
                            {"type": "tool_use", "id": "toolu_1",
                             "name": name, "input": given}]})


def bodies(server):
    """Return the bodies of the requests that came."""
    return [body_of(request) for request in server.requests]


@needs_readme
def test_readme_tool_loop_tells_the_model_what_failed(monkeypatch):
    with Server([chat_calls_tools(("weather", '{"town": "Rome"}'),
                                  ("weather", '["Rome"]'), ("time", "{}")),
                 service]) as server:
        run_here(find_block("Tools"), server, monkeypatch)
        results = bodies(server)[1]["messages"][-3:]
    assert [entry["tool_call_id"] for entry in results] == [
        "call_0", "call_1", "call_2"]
    assert [entry["content"].split("(")[0] for entry in results] == [
        "failed: TypeError", "failed: ValueError", "failed: KeyError"]


@needs_readme
def test_readme_tool_loop_tells_claude_what_failed(monkeypatch):
    with Server([message_calls("weather", {"town": "Rome"}),
                 service]) as server:
        run_here(find_block("Tools", 1), server, monkeypatch)
        [result] = bodies(server)[1]["messages"][-1]["content"]
    assert result["is_error"] is True
    assert (result["type"], result["tool_use_id"]) == ("tool_result",
                                                       "toolu_1")
    assert result["content"].startswith("TypeError")


@needs_readme
@pytest.mark.parametrize("number, answer", [
    (0, chat_calls_tools(("weather", '{"city": "Rome"}'))),
    (1, message_calls("weather", {"city": "Rome"}))],
    ids=["chat", "messages"])
def test_readme_tool_loop_ends_after_ten_turns(number, answer, monkeypatch):
    with Server(answer) as server:
        run_here(find_block("Tools", number), server, monkeypatch)
    assert len(server.requests) == 10


@needs_readme
def test_readme_json_recipe_shows_the_model_its_mistake(monkeypatch):
    wrong = '{"name": "Ada", "age": "36"}'
    with Server([http_answer(bare_answer(wrong)), service]) as server:
        names = run_here(find_block("JSON by a schema"), server, monkeypatch)
        assert bodies(server)[1]["messages"][-2:] == [
            {"role": "assistant", "content": wrong},
            {"role": "user", "content": "That is wrong: ValueError('age is "
             "not an integer'). Send the JSON again."}]
    assert names["person"] == {"name": "a name", "age": 3}


@needs_readme
def test_readme_json_recipe_gives_up_after_two_answers(monkeypatch):
    with Server(http_answer(bare_answer("no"))) as server:
        with pytest.raises(SystemExit, match="no person: no"):
            run_here(find_block("JSON by a schema"), server, monkeypatch)
    assert len(server.requests) == 2


@needs_readme
def test_readme_second_model_answers_for_the_first(monkeypatch, capsys):
    down = error_answer(529)
    title = "A second model, when the first is late or down"
    with Server([down, down, service]) as server:
        run_here(find_block(title), server, monkeypatch)
        assert [body["model"] for body in bodies(server)] == [
            "gpt-5.4-mini", "gpt-5.4-mini", "claude-haiku-4.5"]
    assert capsys.readouterr().out == "claude-haiku-4.5\n"


@needs_readme
def test_readme_log_tells_of_retries(monkeypatch, caplog):
    caplog.set_level("INFO")
    with Server([error_answer(503), service]) as server:
        run_here(find_block("A log"), server, monkeypatch)
    [line] = [record.getMessage() for record in caplog.records
              if record.name == "my.program"]
    assert re.fullmatch(r"request id %s, \d\.\d s, tokens \d+, retries 1"
                        % (REQUEST_ID % 2), line)
    assert [record.levelname for record in caplog.records
            if record.name == "serv"] == ["WARNING"]


@needs_readme
def test_readme_batch_goes_on_where_it_was_killed(tmp_path, monkeypatch,
                                                  capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"".join(b'{"id": "prompt-%d"}\n' % number
                              for number in range(17)) + b'{"id": "pro')
    code = find_block("From one call to a million")
    with Server([error_answer(400), service]) as server:
        with pytest.raises(SystemExit, match="some failed; run this again"):
            run_here(code, server, monkeypatch)
        assert len(server.requests) == 3
        assert path.read_bytes().count(b"\n") == 19
        assert re.search("^prompt-1[789] failed: 400 Bad Request",
                         capsys.readouterr().out, re.M)
        run_here(code, server, monkeypatch)  # asks only what had failed
        assert len(server.requests) == 4
        assert capsys.readouterr().out == "20 of 20\n"
        run_here(code, server, monkeypatch)
        assert len(server.requests) == 4
        assert capsys.readouterr().out == (
            "nothing to do: 20 of 20 are done\n")
    assert sorted(json.loads(line)["id"] for line
                  in path.read_text().splitlines()) == sorted(
                      "prompt-%d" % number for number in range(20))


@needs_readme
@table("status, kind", {
    "a wrong key": ("401 No", "authentication_error"),
    "no credits": ("402 No", "billing_error"),
    "a key that may not": ("403 No", "permission_error"),
    "a wrong model": ("404 No", "not_found_error"),
    "no quota": ("429 No", "insufficient_quota")})
def test_readme_batch_stops_where_every_call_fails(status, kind, tmp_path,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = find_block("From one call to a million").replace(
        "range(20)", "range(200)").replace("3000", "30000")
    no = http_answer({"error": {"type": kind, "message": "no"}}, status)
    with Server(no) as server:
        with pytest.raises(SystemExit, match="stopped: no call would succeed"):
            run_here(code, server, monkeypatch)
        assert 1 <= len(server.requests) < 64  # two for each thread
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


@needs_readme
def test_readme_batch_stops_where_there_is_no_server(tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.chdir(tmp_path)
    code = find_block("From one call to a million").replace(
        "range(20)", "range(200)").replace("max_retries=8", "max_retries=0")
    with Server(service) as server:
        pass
    with pytest.raises(SystemExit, match="stopped: no call would succeed"):
        run_here(code, server, monkeypatch)
    failed = capsys.readouterr().out.count("failed: no answer: ")
    assert 1 <= failed < 64  # two for each thread


@needs_readme
def test_readme_batch_without_a_key_asks_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SERV_API_KEY")
    with Server(service) as server:
        with pytest.raises(SystemExit, match="stopped: no call would succeed"):
            run_here(find_block("From one call to a million"), server,
                     monkeypatch)
        assert server.requests == []


@pytest.fixture
def web_handler(monkeypatch):
    """README's web handler; no thread of it is left waiting."""
    with Server(service) as server:
        names = run_here(find_block("A web handler in asyncio"), server,
                         monkeypatch)
    yield names
    names["threads"].shutdown(wait=True)


async def read_opened(names, prompt):
    """Yield the pieces as README's web handler opens and reads them."""
    import asyncio
    pieces = await asyncio.get_running_loop().run_in_executor(
        names["threads"], names["ask"], prompt)
    async for piece in names["read"](pieces):
        yield piece


@needs_readme
def test_readme_web_handler_turns_a_refusal_into_a_status(
        web_handler, answering, capsys):
    import asyncio
    answering(error_answer(401))
    capsys.readouterr()
    asyncio.run(web_handler["handle"]("Hi"))
    assert capsys.readouterr().out.startswith("502 401 Unauthorized: no. ")


@needs_readme
def test_readme_web_handler_ends_the_stream_of_a_client_that_left(
        web_handler, answering):
    import asyncio
    closed = threading.Event()

    async def leave():
        pieces = read_opened(web_handler, "Hi")
        assert await pieces.__anext__() == "Hel"
        waiting = asyncio.ensure_future(pieces.__anext__())
        await asyncio.sleep(0.05)  # so that a thread waits for a piece
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    answering(stream_watched(closed))
    asyncio.run(leave())
    assert closed.wait(10)


@needs_readme
def test_readme_web_handler_left_before_it_opens_closes_when_it_opens(
        web_handler, answering):
    import asyncio
    asked, left, closed = (threading.Event() for _ in range(3))

    def answer(wire, request):
        asked.set()
        left.wait(10)
        return stream_watched(closed)(wire, request)

    async def leave():
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(
            read_opened(web_handler, "Hi").__anext__())
        assert await loop.run_in_executor(None, asked.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    answering(answer)
    asyncio.run(leave())
    left.set()
    for _ in range(100):
        gc.collect()
        if closed.wait(0.1):
            break
    assert closed.is_set()


@needs_readme
def test_readme_lambda_handler_returns_what_lambda_can_send(monkeypatch):
    class Context:
        def get_remaining_time_in_millis(self):
            return 2900

    with Server(service) as server:
        handler = run_here(find_block("AWS Lambda"), server,
                           monkeypatch)["lambda_handler"]
        answer = json.loads(json.dumps(handler({"prompt": "Hello!"},
                                               Context())))
        [body] = bodies(server)
    assert answer["choices"][0]["message"]["content"] == 'You said: "Hello!"'
    assert body["messages"][-1] == {"role": "user", "content": "Hello!"}


@needs_readme
def test_readme_zip_is_a_whole_function(reader):
    if not shutil.which("zip") or not shutil.which("bash"):
        pytest.skip("there is no zip or no bash here")
    [block] = [block for block in BLOCKS if block.code.startswith("zip ")]
    reader.run("bash", "-e", "-c", block.code)
    with zipfile.ZipFile(os.path.join(reader.folder, "function.zip")) as file:
        assert sorted(file.namelist()) == ["lambda_function.py", "serv.py"]
        assert file.read("serv.py").decode() == SOURCE


# -- What README.md says about serv.py ----------------------------------------

@needs_readme
def test_readme_help_is_the_real_one(capsys, monkeypatch):
    """To repair it: COLUMNS=80 python3 serv.py --help, below its mark."""
    [block] = [block for block in BLOCKS if "help" in block.marks]
    monkeypatch.setenv("COLUMNS", "80")
    assert serv.main(["--help"]) == 0
    assert tuple(capsys.readouterr()) == (block.code, "")


@needs_readme
def test_readme_signatures_are_the_real_ones():
    written = dict(re.findall(r"^### `serv\.(\w+)(\(.*\))`$", README, re.M))
    assert set(written) == {"chat", "message", "stream", "iter_events"}
    for name, signature in written.items():
        parameters = inspect.signature(getattr(serv, name)).parameters
        assert signature == str(inspect.Signature([
            parameter.replace(annotation=parameter.empty)
            for parameter in parameters.values()]))


@needs_readme
def test_readme_has_every_public_name_and_setting():
    for name in serv.__all__:
        assert re.search(r"\b%s\b" % name, README), name
    for name, value in inspect.getmembers(serv.Reply):
        if isinstance(value, property):
            assert "`.%s`" % name in README, name
    for name in vars(serv.Reply({})):
        assert name.startswith("_") or "`.%s`" % name in README, name
    for name in set(re.findall(r"\bSERV_[A-Z_]*[A-Z]", SOURCE)):
        assert "`%s`" % name in README, name


@needs_readme
def test_readme_names_nothing_that_serv_does_not_have():
    for name in set(re.findall(r"\bserv\.([A-Za-z_]+)", README)) - {"py"}:
        assert name in serv.__all__, name


@needs_readme
@pytest.mark.parametrize("words", [
    "`%s`, the default address" % serv.BASE_URL,
    "`timeout` (%g seconds)" % serv.TIMEOUT,
    "An answer above %d MiB" % (serv.MAX_BODY >> 20),
    "a stream above %d MiB" % (serv.MAX_STREAM >> 20),
    "nested more than %d levels" % serv.MAX_DEPTH,
    "Up to %d idle connections" % serv.MAX_IDLE,
    "(of %d characters or more)" % serv.MIN_SECRET,
    "stops reading a large request for %d s" % serv.DEAD_SECONDS,
    "docs.openserv.ai"])
def test_readme_figures_are_the_real_ones(words):
    assert words in " ".join(README.split())


@needs_readme
def test_readme_truststore_gets_an_error_that_says_so(reader):
    pytest.importorskip("truststore")
    with Server(service) as server:
        output = reader.run(sys.executable, "-c", (
            "import truststore, serv\ntruststore.inject_into_ssl()\n"
            "try:\n    serv.chat('Hi', system='s', base_url=%r)\n"
            "except serv.APIConnectionError as error:\n    print(error)\n"
            % server.url.replace("http:", "https:")))
    assert output.startswith("ssl.SSLContext was replaced (by truststore?)")


@needs_readme
def test_readme_errors_have_the_real_statuses():
    [table] = re.findall(r"^\| exception \|.*?\n\n", README, re.M | re.S)
    written = dict(re.findall(r"^\| `(\w+)` (\d\w\w) \|", table, re.M))
    assert written.pop("InternalServerError") == "5xx"
    assert serv.InternalServerError("no").status // 100 == 5
    assert {name: str(getattr(serv, name)("no").status)
            for name in written} == written
    errors = {name for name in serv.__all__ if name.endswith("Error")}
    assert errors | {"ValueError", "TypeError"} == set(
        re.findall(r"`(\w+Error)`", " ".join(
            line.split(" | ")[0] for line in table.splitlines())))


@needs_readme
def test_readme_shows_an_error_as_it_looks(shared):
    [line] = re.findall(r"<!-- an error -->\n(?:<.*>\n)?```text\n(.*)\n",
                        README)
    with pytest.raises(serv.AuthenticationError) as caught:
        serv.chat("Hello!", system="s", api_key="not-a-key")
    assert str(caught.value).replace(
        os.environ["SERV_BASE_URL"], serv.BASE_URL).replace(
            caught.value.request_id, "7f9c2c1e") == line


@needs_readme
def test_readme_first_screen_says_how_to_start_and_the_measured_figures():
    screen = README[:README.index("The tests need pytest")]
    assert len(screen.splitlines()) <= 65
    assert [block.code.split("#")[0].strip()
            for block in parse_blocks(screen)] == [
        'python3 test_serv.py "Hello!"', find_block("serv.py").strip(),
        "export SERV_API_KEY=your-key", 'python3 serv.py "Hello!"']
    for name in "import", "memory":
        [row] = re.findall(r"^\| %s.*\|$" % name, README, re.M)
        ours, _, openai, anthropic = [
            cell.strip() for cell in row.split("|")[2:6]]
        [line] = re.findall(r"^- .*%s.*\n" % (
            "import" if name == "import" else "MiB"), screen, re.M)
        assert re.findall(r"\d+", line) == [ours, openai, anthropic]


@needs_readme
def test_readme_attributes_are_those_of_the_first_of_n_choices(shared):
    reply = serv.chat("Hi", system="s", n=2)
    with serv.stream("Hi", system="s", n=2) as pieces:
        assert "".join(pieces) == reply.text == 'You said: "Hi"'
    for each in reply, pieces.reply:
        assert [(choice["index"], choice["message"]["content"],
                 choice["finish_reason"]) for choice in each["choices"]] == [
            (number, 'You said: "Hi"', "stop") for number in range(2)]
        assert not each.partial
    one = serv.chat("Hi", system="s")
    assert (reply.usage["completion_tokens"]
            == 2 * one.usage["completion_tokens"])


@needs_readme
def test_readme_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", README, re.M)}
    for link in re.findall(r"\]\(#([^)]*)\)", README):
        assert link in headings
    for link in re.findall(r"\]\(([\w.]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, link)), link


@needs_readme
def test_readme_names_no_package_of_others_and_no_path_of_a_machine():
    for text in (README, PYPROJECT):
        assert not re.search(r"pip install (-U |--upgrade )?serv\b(?!-)", text)
        assert not re.search(r"/(home|root|tmp|work|opt|Users)/", text)


@needs_readme
def test_readme_ends_with_the_license():
    words = " ".join(README[README.index("\n## License\n"):].split())
    assert "Copyright (c) 2026 serv.py contributors" in words
    for part in ("Permission is hereby granted, free of charge, to any person",
                 "The above copyright notice and this permission notice shall",
                 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY'):
        assert part in words
    assert words.endswith("THE USE OR OTHER DEALINGS IN THE SOFTWARE.")


# -- pyproject.toml: one module, one version ----------------------------------

@needs_pyproject
def test_pyproject_takes_the_version_from_the_file(capsys):
    assert 'dynamic = ["version", "description"]' in PYPROJECT
    assert not re.search(r"^(version|description) *=", PYPROJECT, re.M)
    assert re.search(r"^dependencies = \[\]$", PYPROJECT, re.M)
    assert re.search(r'^license = "MIT"$', PYPROJECT, re.M)
    assert serv.main(["--version"]) == 0
    assert tuple(capsys.readouterr()) == ("serv %s\n" % serv.__version__, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", serv.__version__)


@needs_pyproject
def test_wheel_holds_one_module_and_the_command(tmp_path):
    pytest.importorskip("flit_core")
    for name in "serv.py", "README.md", "pyproject.toml":
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


# -- serv.py: its sections, what it imports, and what it never does -----------

SECTIONS = ["Errors", "The calls", "Reply, ToolCall and Stream",
            "Building requests", "Reading answers", "Server-sent events",
            "Putting streams together", "Network", "Command line"]
STANDARD_LIBRARY = {
    "__future__", "argparse", "array", "atexit", "base64", "collections",
    "contextlib", "copy", "datetime", "email", "errno", "functools", "http",
    "io", "itertools", "json", "logging", "math", "os", "random", "re",
    "select", "selectors", "shlex", "shutil", "socket", "ssl", "string",
    "struct", "sys", "threading", "time", "types", "typing", "urllib",
    "weakref"}
# Modules that do I/O, or read a clock; and what does not of what they hold.
IMPURE = {"socket", "ssl", "http", "urllib", "sys", "time", "print", "open",
          "input", "threading", "os", "select", "selectors", "shutil",
          "atexit"}
PURE = ("socket.timeout", "ssl.SSLError", "ssl.SSLCertVerificationError",
        "http.client.HTTPMessage", "http.client.HTTPException",
        "http.client.IncompleteRead", "http.client.responses",
        "http.client.RemoteDisconnected", "urllib.parse",
        "sys.version_info", "sys.version", "sys.exc_info", "os.environ",
        "threading", "time.monotonic", "time.time")


def find_banners(source):
    """Return [(line number, title)] of the sections of a file."""
    return [(source.count("\n", 0, found.start()) + 2, found[1])
            for found in re.finditer(r"""
                ^\# \ -{70,}\n
                \# \ (\w[^\n.:]*) ([.:].*)? \n  # a title, and maybe a text
                (\#.*\n)*?
                \# \ -{70,}$""", source, re.M | re.X)]


def drop_annotations(tree):
    """Return a tree without its type annotations and TYPE_CHECKING block."""
    for node in ast.walk(tree):
        for name in "annotation", "returns":
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return tree


def find_impure(source, limit):
    """Return [(line, name)] of what does I/O above a line."""
    tree, impure = drop_annotations(ast.parse(source)), []
    parents = {child: node for node in ast.walk(tree)
               for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id in IMPURE
                and node.lineno < limit):
            line, name = node.lineno, node.id
            while isinstance(parents[node], ast.Attribute):
                node = parents[node]
                name += "." + node.attr
            if not (name + ".").startswith(tuple(it + "." for it in PURE)):
                impure.append((line, name))
    return sorted(impure)


def run_alone(script):
    """Run a script that finds serv, but no other package and no setting."""
    return subprocess.check_output(
        [sys.executable, "-I", "-S", "-W", "error", "-c",
         "import sys\nsys.path.insert(0, %r)\n%s" % (ROOT, script)],
        universal_newlines=True).split()


def test_sections_are_in_order():
    assert [title for _, title in find_banners(SOURCE)] == SECTIONS


def test_only_the_network_and_the_command_line_do_io():
    [limit] = [line for line, title in find_banners(SOURCE)
               if title == "Network"]
    assert find_impure(SOURCE, limit) == []


def test_io_is_found_where_it_is():
    assert find_impure("x: time.sleep = 1\nos.environ\nos.getcwd()\n"
                       "print(socket.timeout)\nopen(1)\nopen(2)\n", 6) == [
        (3, "os.getcwd"), (4, "print"), (5, "open")]


def test_file_imports_only_the_standard_library():
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names <= STANDARD_LIBRARY
    if hasattr(sys, "stdlib_module_names"):  # 3.10
        assert STANDARD_LIBRARY <= sys.stdlib_module_names


def test_file_imports_on_its_own_and_loads_no_slow_module():
    """What a call does not need costs its time only where it is used."""
    assert run_alone("""
import serv
print(serv.__version__, *sorted({'typing', 'asyncio', 'argparse', 'logging',
                                 'urllib.request'} & set(sys.modules)))
""") == [serv.__version__]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason=(
    "what the standard library loads is another matter there"))
def test_file_loads_little_beyond_what_speaks_http():
    assert set(run_alone("""
import http.client, json
known = set(sys.modules)
import serv
print(*set(sys.modules) - known)""")) <= {
        "serv", "__future__", "atexit", "contextlib",
        "copy", "weakref", "threading", "_weakrefset",
        # which http.client loads itself before 3.13
        "random", "_random", "bisect", "_bisect", "math", "_sha2"}


@pytest.mark.parametrize("words", [
    "eval(", "exec(", "pickle.", "import pickle", "subprocess", "urlopen",
    "verify_mode", "check_hostname", "_create_unverified", "os.system"])
def test_file_runs_no_other_code_and_weakens_no_tls(words):
    assert words not in SOURCE


def test_lines_have_at_most_79_columns():
    assert max(map(len, SOURCE.splitlines())) <= 79


def test_public_names_are_these_and_the_errors():
    names = {}
    exec("from serv import *", names)
    del names["__builtins__"]
    assert sorted(names) == sorted(serv.__all__)
    assert {name for name in names if not name.endswith("Error")} == {
        "chat", "message", "stream", "iter_events", "Reply", "Stream",
        "ToolCall"}


def test_public_things_have_docstrings():
    bare = [name for name in serv.__all__ if not getattr(serv, name).__doc__]
    for kind in serv.Reply, serv.Stream, serv.ToolCall:
        bare += [name for name, value in vars(kind).items()
                 if not name.startswith("_") and not value.__doc__]
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(node.name)
    assert bare == []


def test_help_begins_with_what_people_look_for():
    import pydoc
    lines = pydoc.plain(pydoc.render_doc(serv)).splitlines()
    start = "\n".join(lines[:40])
    for words in ("SERV_API_KEY", "SERV_MODEL", "serv.chat(", "serv.stream(",
                  "serv.message(", "system=", ".text"):
        assert words in start, words


def test_license_travels_with_the_file():
    assert SOURCE.startswith(
        "# SPDX-FileCopyrightText: serv.py contributors\n"
        "# SPDX-License-Identifier: MIT\n")


# -- test_serv.py -------------------------------------------------------------

def find_map(source):
    """Return {title: [the titles of its parts]} of the banners of a file."""
    found = [(line, title, []) for line, title in find_banners(source)]
    for number, line in enumerate(source.splitlines(), 1):
        part = re.fullmatch("# -- (.*?) -+", line)
        if part:
            [*_, (_, _, parts)] = [each for each in found if each[0] < number]
            parts.append(part[1])
    return {title: parts for _, title, parts in found}


def read_map(text):
    """Return the same, as the docstring of this file writes it."""
    written = {}
    for line in text.splitlines():
        title = re.fullmatch(r"    (\w[\w,() -]*?)  +\w.*", line)
        if title:
            written[title[1]] = ""
        elif re.match(r" {8}\S", line):  # parts, divided by ";"
            written[list(written)[-1]] += " " + line.strip()
    return {title: [part.strip() for part in parts.split(";") if part.strip()]
            for title, parts in written.items()}


def test_map_of_this_file_is_right():
    found = find_map(read_project_file("test_serv.py"))
    questions, _, written = __doc__.partition("The map.")
    assert read_map(written) == found
    assert list(read_map(written)) == list(found)
    titles = {title for each in found for title in (each, *found[each])}
    asked = re.findall('"(.*?)"', " ".join(questions.partition(
        "Where to look")[2].split()))
    assert len(asked) > 9 and set(asked) <= titles


def test_each_section_of_serv_has_its_groups_of_tests_in_order():
    groups = list(read_map(__doc__.partition("The map.")[2]))
    groups = groups[groups.index("Errors"):groups.index("Live checks")]
    sections = ["Replies" if title == "Reply, ToolCall and Stream" else title
                for title in SECTIONS]
    sections.insert(sections.index("Network"), "Streams")
    assert groups == sections


# ---------------------------------------------------------------------------
# Benchmark
#
# python3 test_serv.py --bench prints the table of README.md.  Each figure is
# measured in a process of its own, which imports nothing but its client,
# against a server on loopback.
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

def chat_event(number, delta, finish_reason=None):
    # As OpenAI sends them: obfuscation is padding that differs each time.
    padding = ("%x" % (number * 0x9e3779b97f4a7c15 + 0xabcdef))[-14:]
    return dict(id="c1", object="chat.completion.chunk", created=1, model="m",
        service_tier="default", system_fingerprint="fp_1", choices=[dict(
            index=0, delta=delta, logprobs=None,
            finish_reason=finish_reason)],
        usage=None, obfuscation=padding[number % 8:])

def events(messages, texts):
    if messages:
        yield dict(type="message_start", message=dict(
            MESSAGE, content=[], stop_reason=None))
        yield dict(type="content_block_start", index=0, content_block=dict(
            type="text", text=""))
    number = -1
    for number, text in enumerate(texts):
        yield dict(type="content_block_delta", index=0, delta=dict(
            type="text_delta", text=text)) if messages else chat_event(
                number, dict(content=text))
    if messages:
        yield dict(type="content_block_stop", index=0)
        yield dict(type="message_delta", usage=dict(output_tokens=7),
                   delta=dict(stop_reason="end_turn", stop_sequence=None))
        yield dict(type="message_stop")
    else:
        yield chat_event(number + 1, {}, "stop")

def chunk(event):
    name = "event: %s\n" % event["type"] if "type" in event else ""
    data = ("%sdata: %s\n\n" % (name, json.dumps(event))).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)

def now_in_turn(count):  # each text is the time at which it is sent
    for _ in range(count):
        yield str(time.monotonic_ns())

async def answer(writer, messages, what, count):
    await asyncio.sleep(count / 1000 if what == b"sleep" else 0)
    if what in (b"call", b"sleep"):
        data = json.dumps(MESSAGE if messages else CHAT).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\n")
    if what == b"paced":
        for event in events(messages, now_in_turn(count)):
            writer.write(chunk(event))
            await asyncio.sleep(0.002)
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

BENCH_MEMORY = '''
import os, re, resource
call('call=1')
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if os.path.exists('/proc/self/status'):  # the other is inherited
    with open('/proc/self/status') as file:
        peak = int(re.search('VmHWM:[^0-9]*([0-9]+)', file.read())[1])
print(peak / 1024)
'''
BENCH_CALLS = '''
call('call=1'); start = time.process_time()
for _ in range(400): call('call=1')
print((time.process_time() - start) / 400 * 1e6)
'''
BENCH_LATENCY = '''
waits = [time.monotonic_ns() - int(sent) for sent in stream('paced=300')]
print(sorted(waits)[len(waits) // 2] / 1e3)
'''
BENCH_EVENTS = '''
list({0}('events=10')); start = time.process_time()
assert sum(1 for _ in {0}('events={1}')) == {1}
print((time.process_time() - start) / {1} * 1e6)
'''
BENCH_THREADS = '''
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(64)
list(pool.map(call, ['call=1'] * 64)); start = time.perf_counter()
list(pool.map(call, ['sleep=20'] * 1500))
print(1500 / (time.perf_counter() - start))
'''
# What is measured, of what its process costs or prints: the code, and the
# function of the client that it needs.
BENCH = {
    "import, ms CPU": ("cpu", "", "import"),
    "script with one call, ms": ("wall", "call('call=1')", "call"),
    "memory after one call, MiB": ("printed", BENCH_MEMORY, "call"),
    "one more call, us CPU": ("printed", BENCH_CALLS, "call"),
    "from server to caller, us": ("printed", BENCH_LATENCY, "stream"),
    "event of a chat stream, us CPU": (
        "printed", BENCH_EVENTS.format("stream", 5000), "stream"),
    "the same, of 100,000, us CPU": (
        "printed", BENCH_EVENTS.format("stream", 100000), "stream"),
    "event of a Messages stream, us CPU": (
        "printed", BENCH_EVENTS.format("message_stream", 5000),
        "message_stream"),
    "64 threads, calls/s": ("printed", BENCH_THREADS, "call")}


@contextlib.contextmanager
def start_bench_server():
    """Run the server of the benchmark; yield its URL."""
    server = subprocess.Popen([sys.executable, "-c", BENCH_SERVER],
                              stdout=subprocess.PIPE)
    try:
        yield "http://127.0.0.1:%d" % int(server.stdout.readline())
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def bench_one(what, client, url):
    """Return one figure of one client, measured in a process of its own."""
    import resource
    figure, then, _ = BENCH[what]
    code = "import time\nbase = %r\n%s\n%s" % (url, BENCH_CLIENTS[client],
                                               then)
    env = dict(os.environ, NO_PROXY="*", no_proxy="*", PYTHONPATH=ROOT,
               PYTHONDONTWRITEBYTECODE="")  # nobody compiles at each start
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True,
                          stdout=subprocess.PIPE)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if figure == "cpu":
        return (sum(after[:2]) - sum(before[:2])) * 1e3
    return wall * 1e3 if figure == "wall" else float(done.stdout)


def can_bench(client, what):
    """Whether a client has what a figure needs."""
    if client == "http.client" and what == "64 threads, calls/s":
        return False  # its one connection serves one thread
    return BENCH[what][2] == "import" or (
        "def %s(" % BENCH[what][2] in BENCH_CLIENTS[client])


def bench(rounds=3):
    """Print the table of README.md: of some rounds, the best of each."""
    clients = [client for client in BENCH_CLIENTS
               if importlib.util.find_spec(client.replace(".py", ""))]
    with start_bench_server() as url:
        print("| | %s |\n|---|%s" % (" | ".join(clients),
                                     "---:|" * len(clients)))
        for what in BENCH:
            values = {client: [] for client in clients
                      if can_bench(client, what)}
            for _ in range(rounds + 1):  # the first warms the caches
                for client in values:
                    values[client].append(bench_one(what, client, url))
            # The least of a cost is what other work of the machine adds to.
            best = max if what.endswith("/s") else min
            cells = []
            for client in clients:
                if client in values:
                    value = best(values[client][1:])
                    cells.append("%.*f" % (value < 10, value))
                else:
                    cells.append("")
            print("| %s | %s |" % (what, " | ".join(cells)), flush=True)


@pytest.fixture(scope="module")
def bench_url():
    """The URL of the benchmark's server."""
    with start_bench_server() as url:
        yield url


def test_benchmark_streams_events_as_they_are_sent_by_default(bench_url):
    """OpenAI pads each event with another `obfuscation`."""
    with open_stream(bench_url, prompt="events=50") as pieces:
        events = list(pieces.events())
    with open_stream(bench_url, "messages", "events=50") as pieces:
        text = "".join(pieces)
    padding = [event["obfuscation"] for event in events]
    assert len(padding) == 51 and len(set(padding)) == 51
    assert len(set(map(len, padding))) > 5
    assert [event["choices"][0]["delta"] for event in events] == [
        {"content": "tok%d " % number} for number in range(50)] + [{}]
    assert text == "".join("tok%d " % number for number in range(50))


@pytest.mark.parametrize("what", BENCH)
def test_benchmark_code_compiles_and_serv_has_each_figure(what):
    for client, code in BENCH_CLIENTS.items():
        compile(code + BENCH[what][1], client, "exec")
    assert can_bench("serv.py", what)


@pytest.mark.parametrize("client", ["serv.py", "http.client"])
@pytest.mark.parametrize("what, big, small", [
    ("script with one call, ms", "", ""),
    ("one more call, us CPU", "400", "4"),
    ("from server to caller, us", "paced=300", "paced=20"),
    ("event of a chat stream, us CPU", "5000", "500")])
def test_benchmark_measures_a_figure_on_a_small_scale(
        client, what, big, small, bench_url, monkeypatch):
    pytest.importorskip("resource")
    figure, code, needs = BENCH[what]
    assert big in code
    monkeypatch.setitem(BENCH, what, (
        figure, code.replace(big, small) if big else code, needs))
    assert 0 < bench_one(what, client, bench_url) < 60e6


@needs_readme
def test_benchmark_makes_the_table_of_readme():
    rows = README.partition("<!-- bench -->\n")[2].split("\n\n")[0]
    head, _, *figures = rows.splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == list(
        BENCH_CLIENTS)
    written = {row.split("|")[1].strip(): row.split("|")[2:-1]
               for row in figures}
    assert list(written) == list(BENCH)
    for what, cells in written.items():
        assert [bool(cell.strip()) for cell in cells] == [
            can_bench(client, what) for client in BENCH_CLIENTS]


if __name__ == "__main__":
    sys.exit(bench() if sys.argv[1:] == ["--bench"] else demo(sys.argv[1:]))
