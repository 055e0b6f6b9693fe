"""Serve a model: a chat page for people, and an API for the clients that OpenAI's has.

Usage:   python serve.py                                    # http://127.0.0.1:8000
         python serve.py --stage=base --port=9000
         NANOCHAT_API_KEY=... python serve.py --host=0.0.0.0    # for others in the network
         python serve.py --blocklist=FILE                   # what is not to be asked or said
         curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
              -d '{"messages": [{"role": "user", "content": "Hi!"}], "stream": true}'
Reads:   runs/TAG/{tokenizer,STAGE}/
Serves:  POST /v1/chat/completions, /v1/completions; GET / (the page), /v1/models, /health,
         /config, /metrics, /training
Method:  one thread works the engine, in which all requests decode side by side; one thread a
         connection speaks HTTP/1.1
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http.server
import io
import ipaddress
import itertools
import json
import math
import os
import queue
import re
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import (
    GPT,
    NORM_EPS,
    STAGES,
    Engine,
    Job,
    ReplyDecoder,
    Request,
    Sampling,
    Stop,
    Tokenizer,
    at_least,
    calculate,
    check_name,
    compile_or_not,
    load_for_answers,
    newest_turns,
    one_sentence,
    parse_settings,
    read_log,
    render_prompt,
    run_dir,
    setting,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    stage: str = setting(
        "", f"which model of the run; empty = the last of {', '.join(STAGES)}", "i", ("", *STAGES)
    )
    tag: str = setting("main", "name of the run, a folder below runs/")
    step: int = setting(0, "checkpoint to load; 0 = the newest")
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 = all of this machine's")
    port: int = setting(8000, "port to listen at; 0 = any that is free")
    api_key: str = setting("", "key that clients must send; empty = NANOCHAT_API_KEY, or none")
    cors_origin: str = setting("", "origin whose pages may use the API, such as https://a.example")
    allow_host: str = setting("", "further names under which this is reached, between commas")
    temperature: float = setting(0.6, "0 = always the likeliest token", short="t")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 = all", short="k")
    top_p: float = setting(1.0, "sample among the likeliest tokens of this total probability")
    max_tokens: int = setting(256, "tokens of an answer at most")
    slots: int = setting(16, "requests that are answered side by side")
    max_waiting: int = setting(64, "requests that may wait for a slot")
    max_connections: int = setting(256, "open connections")
    max_body_bytes: int = setting(1 << 20, "size of a request's body")
    max_messages: int = setting(500, "messages of a conversation")
    max_input_chars: int = setting(
        0, "characters of a conversation or prompt; 0 = 16 a token of context"
    )
    max_choices: int = setting(8, "answers to one request (n)")
    timeout_s: float = setting(30.0, "seconds that a request may take to arrive, a client to read")
    drain_s: float = setting(60.0, "seconds in which running answers may end after SIGTERM")
    blocklist: str = setting("", "file of what is refused and masked: a regular expression a line")
    page: str = setting("", "file to serve as the page, read at each request, to edit it live")
    export: str = setting("", "write the model to this folder in Hugging Face's format, and end")
    log_content: bool = setting(False, "log what is asked and answered too")
    device: str = setting("", "cuda, xpu, mps or cpu; empty = the best present")
    dtype: str = setting(
        "",
        "of activations; empty = bfloat16 or float16 where fast",
        choices=("", "float32", "bfloat16", "float16"),
    )
    int8: bool = setting(False, "products of 8 bits: less memory, on a CPU sooner answers")
    compile: str = setting(
        "auto", "torch.compile; auto = where it pays", choices=("auto", "yes", "no")
    )

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p)  # raises
        self.api_key = self.api_key or os.environ.get("NANOCHAT_API_KEY", "")
        at_least(
            self, 1, "slots", "max_connections", "max_body_bytes", "max_messages", "max_choices"
        )
        at_least(self, 0, "max_waiting", "max_input_chars")
        if not 0 <= self.port < 65536 or not 0 < self.timeout_s <= 86400:
            raise ValueError("--port must be from 0 to 65535, --timeout-s above 0, to a day")
        if self.export and self.int8:
            raise ValueError("--export writes whole weights: leave --int8 out")
        if self.cors_origin and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/]+", self.cors_origin):
            raise ValueError("--cors-origin must be like https://a.example, without a path")
        try:
            read_page(self.page)
        except Refusal as error:
            raise ValueError(str(error)) from None
        self.blocked = read_blocklist(Path(self.blocklist).expanduser()) if self.blocklist else None


# 2. The engine at work -----------------------------------------------------------------------


class Refusal(Exception):
    """A request that is not done: HTTP status, what to say, and OpenAI's fields of an error."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param or None,
                          "code": self.code or None}}  # fmt: skip


News = queue.SimpleQueue[tuple[int, int, str]]  # which of the requests, its next id, why it ended


class Worker:
    """Works the engine in a thread of its own; others ask, read what comes, and may give up."""

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.room = engine, len(engine.rows) + max_waiting
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.owners: dict[Job, tuple[News, int]] = {}  # of the jobs that are not ended
        self.lock, self.open = threading.Lock(), 0  # requests that are not ended
        self.seconds_a_request = 1.0  # of late
        self.generated, self.failures = 0, 0  # failures: of steps, in a row
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def ask(self, requests: list[Request]) -> News:
        """Hand in requests; return where their news come. Raises Refusal if too many wait."""
        self.check()
        with self.lock:
            if self.open + len(requests) > self.room:
                wait = math.ceil(self.seconds_a_request * self.open / len(self.engine.rows))
                raise Refusal(
                    429, f"{self.open} requests are at work or wait: try again in a while",
                    code="queue_full", **{"Retry-After": str(max(1, min(wait, 600)))},
                )  # fmt: skip
            self.open += len(requests)
        news: News = queue.SimpleQueue()
        self.inbox.put(lambda: self._begin(requests, news))
        return news

    def check(self) -> None:
        """Raise a Refusal where the thread has ended, so that nobody waits for it."""
        if not self.thread.is_alive():
            raise Refusal(500, "the engine has ended: start the server again")

    def give_up(self, news: News) -> None:
        """End what is still open of it before the next step."""
        self.inbox.put(lambda: self._end(news))

    def stop(self) -> None:
        """End the thread, which a device that hangs may not let end."""
        self.inbox.put(None)
        self.thread.join(timeout=5)

    @property
    def fails(self) -> bool:
        """Say whether nobody can be answered: the thread is gone, or step after step fails."""
        return self.failures > 2 or not self.thread.is_alive()

    def _work(self) -> None:
        while True:
            try:
                while not self.engine.load or not self.inbox.empty():
                    act = self.inbox.get()
                    if act is None:
                        return
                    act()
                for job in self.engine.step():
                    self.generated += 1
                    self._tell(job, job.reply.ids[-1], job.reply.reason)
                self.failures = 0
            # such as a device out of memory, or a panic of the tokenizer, which is no Exception:
            # those at work fail, others go on
            except BaseException:  # noqa: BLE001
                self.failures += 1
                with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file
                    traceback.print_exc()
                self.engine.clear()
                for job in tuple(self.owners):
                    self._tell(job, -1, "error")

    def _begin(self, requests: list[Request], news: News) -> None:
        for which, request in enumerate(requests):
            self.owners[self.engine.submit(request)] = news, which

    def _end(self, news: News) -> None:
        for job in [job for job, owner in self.owners.items() if owner[0] is news]:
            self.engine.cancel(job)
            self._tell(job, -1, "cancel")

    def _tell(self, job: Job, one: int, reason: str) -> None:
        """Say what became of a job; its place is free before its client hears of its end."""
        news, which = self.owners[job]
        if reason:
            del self.owners[job]
            with self.lock:
                self.open -= 1
        news.put((which, one, reason))


# 3. What is blocked --------------------------------------------------------------------------

HELD = 256  # characters of a match at most, and so of an answer that wait for what follows them
MASK = "[blocked]"


@dataclass(frozen=True)
class Blocklist:
    """What no one may say, and how many characters from its first tell whether one does."""

    pattern: re.Pattern[str]
    window: int

    def end(self, text: str, at: int) -> int:
        """Return where a match that begins here ends, or `at`; it looks no further than `window`.

        So what is masked does not depend on how much of the text has arrived.
        """
        found = self.pattern.match(text, at, at + self.window)
        return found.end() if found else at

    def finds(self, text: str) -> bool:
        """Say whether a text has something that is blocked."""
        return any(self.end(text, at) > at for at in range(len(text)))


def read_blocklist(path: Path) -> Blocklist | None:
    """Read regular expressions, one a line; empty lines and those that begin with # do not count.

    Upper and lower case are the same. Python's matcher can take exponential time, in which nobody
    is served: a repetition inside another, the usual cause, is refused, and no match is longer
    than HELD, which bounds what is only polynomial; (a|a)* passes: whoever writes the file has
    the last word. Raises ValueError, which names file and line.
    """
    lines, window = [], 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"--blocklist: {path}: {why}: name a file that can be read") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"--blocklist: {path}:{number}: this is not UTF-8: save it so") from None
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line and not line.startswith("#"):
            try:
                if not all(found[0] for found in re.finditer(line, "a b.")):
                    raise ValueError("it matches where nothing is, so everywhere")
                # all lines become one pattern, in which a group's number would mean another
                if re.search(r"\\[1-9]|\(\?[P(]", line):
                    raise ValueError("it refers to a group, or names one")
                if re.search(r"[*+}].*\)[*+{]", line):
                    raise ValueError("it may repeat a repetition, which can take for ever")
            except (ValueError, re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"--blocklist: {path}:{number}: {line[:80]}: {error}: "
                                 "mend or remove this line") from None  # fmt: skip
            # without a repetition nothing matches more than its own length; 2 for ends of words
            window = max(window, HELD if re.search("[*+{]", line) else len(line) + 2)
            lines.append(f"(?:{line})")
    if not lines:
        return None
    return Blocklist(re.compile("|".join(lines), re.IGNORECASE), min(window, HELD))


class Masker:
    """Masks what is blocked in the pieces (type, text) of a reply, whatever their cuts are."""

    def __init__(self, blocklist: Blocklist):
        self.blocklist, self.kind = blocklist, "text"
        self.text, self.at = "", 0  # of this type so far, and where what is held begins

    def feed(self, kind: str, piece: str) -> list[tuple[str, str]]:
        """Return the pieces that are ready."""
        pieces = self.end() if kind != self.kind else []
        self.kind = kind
        self.text += piece
        return pieces + self._until(len(self.text) - self.blocklist.window + 1)

    def end(self) -> list[tuple[str, str]]:
        """Return what is held, as nothing of its type follows."""
        pieces = self._until(len(self.text))
        self.text, self.at = "", 0
        return pieces

    def _until(self, last: int) -> list[tuple[str, str]]:
        said = ""
        while self.at < last:
            end = self.blocklist.end(self.text, self.at)
            said += MASK if end > self.at else self.text[self.at]
            self.at = max(end, self.at + 1)
        return [(self.kind, said)] if said else []


# 4. What is asked ----------------------------------------------------------------------------

# Fields of OpenAI's that would change the answer, with the values that ask for nothing.
UNSUPPORTED = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none"), "response_format": (None, {"type": "text"}),
    "logprobs": (None, False), "top_logprobs": (None, 0), "logit_bias": (None, {}),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "modalities": (None, ["text"]),
    "audio": (None,), "prediction": (None,), "web_search_options": (None,), "suffix": (None, ""),
    "echo": (None, False), "best_of": (None, 1), "min_p": (None, 0), "min_tokens": (None, 0),
    "repetition_penalty": (None, 1), "stop_token_ids": (None, []), "ignore_eos": (None, False),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,),
    "guided_grammar": (None,), "structured_outputs": (None,), "bad_words": (None, []),
    "typical_p": (None, 1), "length_penalty": (None, 1), "use_beam_search": (None, False),
    "chat_template": (None,), "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}  # fmt: skip
MOST = 1 << 31  # a number that stands for any


def parse_json(data: bytes) -> dict[str, Any]:
    """Read a request's body. Raises Refusal where it is no JSON object."""

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=no_number)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise Refusal(400, f"the body is not valid JSON: {what}") from None
    if not isinstance(body, dict):
        raise Refusal(400, 'the body must be a JSON object, such as {"messages": [...]}')
    return body


def check(good: Any, where: str, what: str) -> None:
    """Raise a Refusal that names a field and what is wrong with it, unless it is good."""
    if not good:
        raise Refusal(400, f"{where} {what}", where)


def number(
    body: dict[str, Any], name: str, default: Any, low: float, high: float, whole: bool = True
) -> Any:
    """Return a numeric field, or its default where it is absent or null. Raises Refusal."""
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    kind = "a whole number" if whole else "a number"
    check(good and low <= value <= high, name, f"must be {kind} from {low:g} to {high:g}")
    return value


def switch(body: dict[str, Any], name: str, where: str = "") -> bool:
    """Return a field that is true or false, and false where it is absent. Raises Refusal."""
    value = body.get(name)
    check(value is None or isinstance(value, bool), where + name, "must be true or false")
    return bool(value)


def text_of(value: Any, where: str) -> str:
    """Return a string whose half characters are replaced. Raises Refusal for anything else."""
    check(isinstance(value, str), where, "must be a string")
    return value.encode("utf-8", "replace").decode()


def parse_messages(given: Any, most: int, fits: Callable[[int], None]) -> list[dict[str, Any]]:
    """Return the conversation in this project's form: turns alternate, a user's is the last.

    A system message that nothing follows is read as the user's. fits gets the number of characters.
    Raises Refusal, which names the message that is wrong.
    """
    check(given and isinstance(given, list), "messages", "must be a list of one message or more")
    check(len(given) <= most, "messages", f"has {len(given)} messages: {most} are allowed")
    turns = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        check(isinstance(message, dict), where, "must be an object with role and content")
        role = "system" if message.get("role") == "developer" else message.get("role")
        role = "user" if role == "system" and i == len(given) - 1 else role
        roles = ("system", "user", "assistant")
        check(role in roles, f"{where}.role", "must be system, user or assistant")
        called = role == "assistant" and message.get("tool_calls")
        check(not called, f"{where}.tool_calls", "is not supported")
        parts = parse_content(message.get("content"), role, f"{where}.content")
        turns.append((role, parts, message.get("parts")))
    fits(sum(len(text_in(parts)) for _, parts, _ in turns))  # before anything is sought in them
    messages: list[dict[str, Any]] = []
    for role, parts, kept in turns:
        parts = calls_in(parts, kept) if role == "assistant" else parts
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += [{"type": "text", "text": "\n\n"}, *parts]
        else:
            messages.append({"role": role, "content": parts})
    check(messages[-1]["role"] == "user", "messages", "must end in the user's")
    for message in messages:
        if message["role"] != "assistant":
            message["content"] = text_in(message["content"])
    return messages


def text_in(content: str | list[dict[str, str]]) -> str:
    """Return all text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def parse_content(content: Any, role: str, where: str) -> list[dict[str, str]]:
    """Return the parts of a message: texts, and in an assistant's the calls of its calculator."""
    if isinstance(content, str):
        return [{"type": "text", "text": text_of(content, where)}]
    kinds = ("text", "python", "output") if role == "assistant" else ("text",)
    check(isinstance(content, list), where, "must be a string or a list of parts")
    parts = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        good = isinstance(part, dict) and part.get("type") in kinds
        check(good, here, f"must be a part of type {' or '.join(kinds)}")
        parts.append({"type": part["type"], "text": text_of(part.get("text"), f"{here}.text")})
    return parts or [{"type": "text", "text": ""}]


CALL = re.compile(r"\[([^\[\]=]{1,200}) = ([^\[\]=]{1,200})\]")


def calls_in(parts: list[dict[str, str]], kept: Any) -> list[dict[str, str]]:
    """Return the parts of an answer that a client sends back, its calls of the tool restored.

    Clients keep its text, where a call is `[37*12 = 444]`, and some the `parts` beside it. What
    the model would read otherwise is a form that it has never seen. A call is taken for one where
    the calculator says the same.
    """
    text = text_in(parts)
    with contextlib.suppress(Refusal):
        same = parse_content(kept, "assistant", "parts")
        shown = Shown()
        if text == "".join([shown.feed(**part) for part in [*same, {"type": "text", "text": ""}]]):
            if all(part["type"] == "text" for part in same):
                return same
            parts = same
    if any(part["type"] != "text" for part in parts):
        after = [*(part["type"] for part in parts[1:]), ""]  # a call that was cut has no output
        whole = [p for p, kind in zip(parts, after) if p["type"] != "python" or kind == "output"]
        return whole or [{"type": "text", "text": ""}]
    found, at = [], 0
    for call in CALL.finditer(text):
        if calculate(call[1]) == call[2] != "error":
            found += [{"type": "text", "text": text[at : call.start()]}]
            found += [{"type": "python", "text": call[1]}, {"type": "output", "text": call[2]}]
            at = call.end()
    return [part for part in [*found, {"type": "text", "text": text[at:]}] if part["text"]] or parts


def strings(value: Any, where: str, most: int) -> list[str]:
    """Return a string, or each of a list. Raises Refusal."""
    several = [value] if isinstance(value, str) else value
    good = isinstance(several, list) and len(several) <= most
    check(good, where, f"must be a string or a list of up to {most}")
    return [text_of(one, where) for one in several]


@dataclass(frozen=True)
class Wanted:
    """What a client asks for: prompts, how many answers to each, and in which form."""

    prompts: list[list[int]]
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    chat: bool
    stream: bool
    usage: bool  # a stream's last chunk tells it
    forgotten: int = 0  # messages, where the client lets the oldest go

    def requests(self) -> list[Request]:
        """Return the engine's requests; all answers differ by their seeds."""
        requests = []
        for i, prompt in enumerate(prompt for prompt in self.prompts for _ in range(self.n)):
            seed = self.sampling.seed + (i << 64)  # that no other request can have asked for
            sampling = dataclasses.replace(self.sampling, seed=seed)
            requests.append(Request(prompt, sampling, self.chat, self.stops))
        return requests


def parse_wanted(body: dict[str, Any], chat: bool, model: Model, settings: Settings) -> Wanted:
    """Check a request for completions. Raises Refusal, which says what is wrong with it."""
    for name, harmless in UNSUPPORTED.items():
        value = body.get(name)
        some = name == "logprobs" and value == 0 and value is not False  # a text completion's
        if some or value not in harmless:
            raise Refusal(400, f"{name} is not supported", name, "unsupported_parameter")
    model.check_name(body.get("model"))
    tokenizer, context = model.engine.tokenizer, model.context
    field, most = ("messages" if chat else "prompt"), min(settings.max_choices, model.worker.room)

    # characters before the tokenizer: whoever sends megabytes is not to cost the time that they take
    def fits(size: int, limit: int = model.max_chars(settings), unit: str = "characters") -> None:
        if size > limit:
            raise Refusal(400, f"your {field} have {size:,} {unit}; at most {limit:,} are taken, "
                          f"with a context of {context:,} tokens: shorten them", field,
                          "context_length_exceeded")  # fmt: skip

    forgotten = 0
    if chat:
        messages = parse_messages(body.get("messages"), settings.max_messages, fits)
        way = body.get("truncation") or "disabled"
        check(way in ("auto", "disabled"), "truncation", "must be auto or disabled")
        if way == "auto":
            kept, prompt = newest_turns(tokenizer, messages, context)
            forgotten, messages = len(messages) - len(kept), kept
        else:
            prompt = render_prompt(tokenizer, messages)
        texts, prompts = [text_in(message["content"]) for message in messages], [prompt]
    else:
        texts = strings(body.get("prompt", ""), "prompt", most)
        check(texts, "prompt", "must have a string")
        fits(max(map(len, texts)))
        prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    fits(max(map(len, prompts)), context - 1, "tokens")
    if settings.blocked and any(map(settings.blocked.finds, texts)):
        raise Refusal(400, f"your {field} have something that this server does not take: reword it",
                      field, "content_blocked")  # fmt: skip
    options = body.get("stream_options")
    check(options is None or isinstance(options, dict), "stream_options", "must be an object")
    limit = number(body, "max_tokens", settings.max_tokens, 1, MOST)
    sampling = Sampling(
        max_tokens=number(body, "max_completion_tokens", limit, 1, MOST),
        temperature=number(body, "temperature", settings.temperature, 0, 2, whole=False),
        top_k=number(body, "top_k", settings.top_k, 0, MOST),
        top_p=number(body, "top_p", settings.top_p, 1e-9, 1, whole=False),
        seed=number(body, "seed", secrets.randbits(48), -(2**63), 2**64) % 2**64,
    )
    n = number(body, "n", 1, 1, most // len(prompts))
    usage = switch(options or {}, "include_usage", "stream_options.")
    stops = strings([] if body.get("stop") is None else body["stop"], "stop", 4)
    check(all(0 < len(one) <= 200 for one in stops), "stop", "must have from 1 to 200 characters")
    stream = switch(body, "stream")
    return Wanted(prompts, n, sampling, tuple(stops), chat, stream, usage, forgotten)


# 5. What is answered -------------------------------------------------------------------------


class Shown:
    """Turns the pieces of a reply into its text, with a call of the tool as [37*12 = 444]."""

    def __init__(self) -> None:
        self.kind, self.end = "text", "\n"  # of what was shown last: its type, its last character

    def feed(self, type: str, text: str) -> str:  # noqa: A002  # named as a part's fields are
        """Return what is shown of the next piece, which is of type "text" and empty at the end."""
        head = ""
        if (self.kind, type) == ("python", "output"):
            head = " = "
        elif type != self.kind:
            if self.kind != "text":
                head = "] " if type == "text" and text[:1].isalnum() else "]"
            if type != "text":
                head += "[" if (head or self.end)[-1].isspace() else " ["
        self.kind, self.end = type, text[-1:] or self.end
        return head + text


@dataclass
class Choice:
    """One answer in the making."""

    decoder: ReplyDecoder
    masker: Masker | None
    shown: Shown = field(default_factory=Shown)
    text: str = ""
    parts: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    reason: str = ""


class Answer:
    """Makes OpenAI's objects of what the engine brings."""

    def __init__(self, wanted: Wanted, model: Model, blocked: Blocklist | None):
        self.wanted, self.model = wanted, model
        self.id = f"{'chatcmpl' if wanted.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created, self.first_at = int(time.time()), 0.0
        self.choices = [Choice(ReplyDecoder(model.engine.tokenizer, wanted.stops, wanted.chat),
                               Masker(blocked) if blocked else None)
                        for _ in range(len(wanted.prompts) * wanted.n)]  # fmt: skip

    @property
    def done(self) -> bool:
        return all(choice.reason for choice in self.choices)

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks with which a stream begins."""
        whichs = range(len(self.choices) if self.wanted.chat else 0)
        return [self.chunk(which, role="assistant", content="") for which in whichs]

    def feed(self, which: int, one: int, reason: str) -> list[dict[str, Any]]:
        """Take the next token of a choice; return the chunks of a stream that it makes.

        Raises Refusal where the engine failed.
        """
        choice = self.choices[which]
        choice.reason = reason
        if reason == "error":
            raise Refusal(500, "the model failed; try again")
        self.first_at = self.first_at or time.monotonic()
        choice.tokens += 1
        pieces = choice.decoder.feed(one) + (choice.decoder.end() if reason else [])
        if masker := choice.masker:
            pieces = [ready for piece in pieces for ready in masker.feed(*piece)]
            pieces += masker.end() if reason else []
        chunks = [self.show(which, kind, piece) for kind, piece in pieces]
        if reason:
            if rest := choice.shown.feed("text", ""):
                choice.text += rest
                chunks.append(self.chunk(which, content=rest))
            chunks.append(self.chunk(which, reason))
        return chunks

    def show(self, which: int, kind: str, piece: str) -> dict[str, Any]:
        """Add a piece to a choice; return its chunk: as text, and in `part` as what it is."""
        choice = self.choices[which]
        text = choice.shown.feed(kind, piece) if self.wanted.chat else piece
        choice.text += text
        if not choice.parts or choice.parts[-1]["type"] != kind:
            choice.parts.append({"type": kind, "text": ""})
        choice.parts[-1]["text"] += piece
        return self.chunk(which, content=text, part={"type": kind, "text": piece})

    def chunk(self, which: int, reason: str = "", **delta: Any) -> dict[str, Any]:
        """Return a chunk of a stream; beside OpenAI's fields a part tells what a calculator did."""
        said = {"delta": delta} if self.wanted.chat else {"text": delta.get("content", "")}
        return self.envelope([self.choice(which, reason, **said)])

    def choice(self, which: int, reason: str, **said: Any) -> dict[str, Any]:
        return {"index": which, "logprobs": None, "finish_reason": reason or None, **said}

    def envelope(self, choices: list[Any], usage: dict[str, int] | None = None) -> dict[str, Any]:
        wanted = self.wanted
        kind = "chat.completion" + ".chunk" * wanted.stream if wanted.chat else "text_completion"
        made = {"id": self.id, "object": kind, "created": self.created, "model": self.model.id,
                "choices": choices}  # fmt: skip
        return {**made, "usage": usage} if wanted.usage or not wanted.stream else made

    def usage(self) -> dict[str, int]:
        """Count tokens; the calculator's and the closing ones count too."""
        asked = sum(map(len, self.wanted.prompts))
        made = sum(choice.tokens for choice in self.choices)
        usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        forgotten = self.wanted.forgotten
        return {**usage, "forgotten_messages": forgotten} if forgotten else usage

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunk with the usage, where it is asked for."""
        return [self.envelope([], self.usage())] if self.wanted.usage else []

    def whole(self) -> dict[str, Any]:
        """Return the answer that is no stream."""
        choices = []
        for which, c in enumerate(self.choices):
            message = {"role": "assistant", "content": c.text, "refusal": None, "parts": c.parts}
            said = {"message": message} if self.wanted.chat else {"text": c.text}
            choices.append(self.choice(which, c.reason, **said))
        return self.envelope(choices, self.usage())


# 6. HTTP -------------------------------------------------------------------------------------


@dataclass
class Model:
    """The model that is served, and its worker."""

    id: str
    names: tuple[str, ...]
    stage: str
    engine: Engine
    worker: Worker
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        return self.engine.model.config.max_seq_len

    def check_name(self, name: Any) -> None:
        """Raise a Refusal where another model is asked for; None is any."""
        if name is not None and name not in self.names:
            raise Refusal(404, f"the model {ascii(name)[:80]} is not served here: {self.id} is",
                          "model", "model_not_found")  # fmt: skip

    def max_chars(self, settings: Settings) -> int:
        """Return how many characters are tokenized for one answer."""
        return settings.max_input_chars or 16 * self.context


class Server(http.server.ThreadingHTTPServer):
    """Listens, gives each connection a thread up to a number, and knows what is served."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model: Model | None = None  # None while it loads
        self.draining = False
        self.lock, self.counts = threading.Lock(), collections.Counter[str]()  # for /metrics
        self.free = threading.Semaphore(settings.max_connections)
        self.hosts = {"localhost", settings.host.casefold(), socket.gethostname().casefold()}
        self.hosts |= {name.strip().casefold() for name in settings.allow_host.split(",")} - {""}
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without the look-up of the machine's name
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # no more threads
                self.free.release()
        self.count('nanochat_requests_total{path="none",code="503"}')
        body = json.dumps(Refusal(503, "too many connections: try again in a while").body())
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(f"HTTP/1.1 503 Service Unavailable\r\n{head}Retry-After: 1\r\n"
                            f"Connection: close\r\n\r\n{body}".encode())  # fmt: skip
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away; log anything else."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.say(traceback.format_exc())

    def say(self, line: str) -> None:
        """Print to the log; one that cannot be written any more stops no request."""
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file
            print(line, flush=True)

    def count(self, name: str, value: float = 1) -> None:
        """Add to a counter, whose name may end in labels."""
        with self.lock:
            self.counts[name] += value  # type: ignore[assignment]

    def is_ours(self, host: str) -> bool:
        """Say whether a Host header names this server, not a page's that a name was bent to."""
        found = HOST.fullmatch(host.casefold())
        if not found:
            return False
        name = found[1] or found[2].rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        everywhere = ipaddress.ip_address(self.server_address[0]).is_unspecified
        return everywhere or address.is_loopback or name in (*self.hosts, self.server_address[0])


ANSWERING = "nanochat_requests_in_flight"
BUCKETS = "0.05 0.1 0.2 0.5 1 2 5 10 20 60 +Inf".split()  # seconds, of the histograms
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]{0,5})?")


class Reader(io.BufferedReader):
    """Reads lines in which a lone CR is a space (RFC 9112, 2.2): it begins no header of its own."""

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        return line[:-2].replace(b"\r", b" ") + line[-2:]


class Incoming(io.RawIOBase):
    """What a socket brings until a deadline: a sender who trickles must not hold a thread."""

    def __init__(self, connection: socket.socket):
        self.connection, self.deadline = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        usual, left = self.connection.gettimeout(), self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self.connection.settimeout(left)
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(usual)


class Handler(http.server.BaseHTTPRequestHandler):
    """Speaks HTTP/1.1 with one client."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "nanochat", ""
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        self.settings = self.server.settings
        self.timeout, self.command = self.settings.timeout_s, ""
        super().setup()
        self.incoming = Incoming(self.connection)
        self.rfile = Reader(self.incoming)

    def finish(self) -> None:
        """Let a client that still sends read the answer, which a reset would take from it."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 1
            self.connection.settimeout(0.2)
            while time.monotonic() < end and self.connection.recv(1 << 16):
                pass
        self.rfile.close()

    def handle_one_request(self) -> None:
        self.began, self.status, self.note, self.path = time.monotonic(), 0, "", "-"
        self.incoming.deadline = self.began + self.settings.timeout_s
        self.close_connection, begun = True, False
        try:
            begun = bool(self.rfile.peek(1))  # who is idle between two requests goes unanswered
            self.incoming.deadline = time.monotonic() + self.settings.timeout_s
            self.raw_requestline = self.rfile.readline(65537)
            if self.raw_requestline in (b"\r\n", b"\n"):  # some clients end a body so
                self.raw_requestline = self.rfile.readline(65537)
            if len(self.raw_requestline) > 65536:
                self.send_error(414)
            elif self.raw_requestline and self.parse_request():  # else it has answered
                self.answer()
        except OSError as error:  # the client is gone, or takes too long
            self.close_connection = True
            if begun and isinstance(error, TimeoutError) and not self.status:
                with contextlib.suppress(OSError):
                    self.send_error(408, "its head took too long to arrive")

    def answer(self) -> None:
        """Answer one request; a failure in it is its own."""
        self.began = time.monotonic()
        self.server.count(ANSWERING)  # the server does not end meanwhile
        try:
            self.body = self.read_body()
            self.route()
        except Refusal as refusal:
            self.refuse(refusal)
        except TimeoutError:
            if self.status:  # it does not read the answer
                raise
            self.refuse(Refusal(408, "the request took too long to arrive"))
        except OSError:
            raise
        except BaseException:  # noqa: BLE001  # a panic of the tokenizer is no Exception
            self.server.say(traceback.format_exc())
            self.close_connection = True
            if not self.status:
                self.refuse(Refusal(500, "this request failed here; others go on"))
        finally:
            self.log()
            self.server.count(ANSWERING, -1)

    # what comes in

    def read_body(self) -> bytes:
        """Read the body whole. Raises Refusal where its length is not plain, and closes then."""
        headers, body = self.headers, b""
        lengths = headers.get_all("Content-Length", [])
        codings = headers.get_all("Transfer-Encoding", [])
        options = [word.strip().casefold() for word in headers.get("Connection", "").split(",")]
        closing, self.close_connection = self.close_connection or "close" in options, True
        if headers.defects or not all(TOKEN.fullmatch(name) for name in headers):
            raise Refusal(400, "a header is malformed")
        if len(headers.get_all("Host", [])) != 1 and self.request_version != "HTTP/1.0":
            raise Refusal(400, "there must be one Host header")
        self.incoming.deadline = time.monotonic() + self.settings.timeout_s
        if codings:
            chunked = [coding.casefold() for coding in codings] == ["chunked"]
            if lengths or not chunked or self.request_version == "HTTP/1.0":
                raise Refusal(400, "Transfer-Encoding must be chunked, without Content-Length")
            body = self.read_chunks()
        elif lengths:
            if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
                raise Refusal(400, "Content-Length must be one whole number")
            body = self.read_exactly(int(lengths[0]))
        elif self.command in ("POST", "PUT", "PATCH"):
            raise Refusal(411, "Content-Length is missing")
        self.close_connection = closing
        return body

    def read_exactly(self, size: int, before: int = 0) -> bytes:
        """Read bytes of a body. Raises Refusal if with those before they are too many."""
        if before + size > self.settings.max_body_bytes:
            raise Refusal(413, f"the body may have {self.settings.max_body_bytes:,} bytes at most")
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the body ends early")
        return data

    def read_chunks(self) -> bytes:
        body = bytearray()
        while True:
            line = self.rfile.readline(1024)
            if not re.fullmatch(rb"[0-9a-fA-F]{1,15}(;[^\r\n]*)?\r\n", line):
                raise Refusal(400, "a chunk's size is malformed")
            size = int(line.split(b";")[0], 16)
            body += self.read_exactly(size, len(body))
            if not size:
                break
            if self.read_exactly(2) != b"\r\n":
                raise Refusal(400, "a chunk is longer than it says")
        for _ in range(100):  # trailers
            if self.rfile.readline(8192) in (b"\r\n", b"\n"):
                return bytes(body)
        raise Refusal(400, "the chunks do not end")

    def gone(self) -> bool:
        """Say whether the client has gone away."""
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    # what goes out

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """Send the head of an answer."""
        self.status = status
        self.send_response_only(status)
        head = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", **headers}
        origin = self.settings.cors_origin
        if origin and self.headers.get("Origin") == origin:
            head |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self.close_connection:
            head["Connection"] = "close"
        elif self.request_version == "HTTP/1.0":
            head["Connection"] = "keep-alive"
        for name, value in {**head, "Date": self.date_time_string()}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        """Send an answer whole."""
        self.begin(status, {"Content-Type": kind, "Content-Length": str(len(data)), **headers})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", **headers)

    def refuse(self, refusal: Refusal) -> None:
        self.note = ascii(str(refusal))[1:-1][:200]
        self.send_json(refusal.status, refusal.body(), **refusal.headers)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """Answer what could not be parsed; the connection ends, as what follows is uncertain."""
        self.close_connection, self.command = True, self.command or "GET"
        self.headers, self.request_version = self.MessageClass(), "HTTP/1.1"
        short = self.responses.get(code, ("error",))[0]
        self.refuse(Refusal(code, f"{short}: {message}" if message else short))
        self.log()

    def log(self) -> None:
        """Log a line for the request, and count it."""
        path = ascii(self.path.split("?")[0])[1:-1][:100]
        named = path if path in ROUTES else "other"
        self.server.count(f'nanochat_requests_total{{path="{named}",code="{self.status}"}}')
        seconds = time.monotonic() - self.began
        note = f"  {self.note}" if self.note else ""
        method = ascii(self.command)[1:-1][:20]  # a terminal is not to obey what a client sent
        self.server.say(f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {method} "
                        f"{path} {self.status or 'gone'} {seconds:.2f} s{note}")  # fmt: skip

    # where it goes

    def route(self) -> None:
        """Find who answers, after the checks that all have in common. Raises Refusal."""
        headers, path = self.headers, self.path.split("?")[0].split("#")[0]
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if whole := re.fullmatch("https?://([^/]+)(.*)", path, re.IGNORECASE):  # for a proxy
            host, path = whole[1], whole[2] or "/"
        self.path = path
        if host and not self.server.is_ours(host):
            raise Refusal(403, "this server has another name: --allow-host takes further ones")
        ours = (None, f"http://{host}", f"https://{host}", self.settings.cors_origin or None)
        if origin not in ours:
            raise Refusal(403, "pages of another origin may not use this: --cors-origin lets one")
        known = re.sub("^((/v1)?/models/).*", r"\1", path)
        if known not in ROUTES:
            raise Refusal(404, f"there is no {ascii(path)[1:-1][:100]}: see /v1/models, /health")
        method, act = ROUTES[known]
        allowed = ["GET", "HEAD", "OPTIONS"] if method == "GET" else ["OPTIONS", method]
        allow = {"Allow": ", ".join(allowed)}
        if self.command not in allowed:
            raise Refusal(405, f"{path} takes {' or '.join(allowed)}", **allow)
        if self.command == "OPTIONS":
            asked = headers.get("Access-Control-Request-Headers", "")  # such as x-stainless-os
            if all(TOKEN.fullmatch(name.strip()) for name in asked.split(",")):
                allow["Access-Control-Allow-Headers"] = asked
            allow["Access-Control-Allow-Methods"] = "GET, POST"
            return self.send(200, b"", "text/plain", **allow)
        if path not in OPEN_PATHS:
            self.check_key()
        act(self)

    def check_key(self) -> None:
        """Raise Refusal unless the client sends the key, where one is wanted."""
        wanted = self.settings.api_key
        kind, _, key = self.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1", "replace"), wanted.encode())
        if wanted and not (right and kind.casefold() == "bearer"):
            raise Refusal(401, "this server wants its key, as Authorization: Bearer KEY",
                          code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})  # fmt: skip

    def ready(self) -> Model:
        """Return the model. Raises Refusal while there is none, or no more."""
        model = self.server.model
        if model is None or self.server.draining:
            what = "shutting down" if self.server.draining else "loading its model"
            raise Refusal(503, f"the server is {what}", **{"Retry-After": "5"})
        return model

    # what is answered

    def get_page(self) -> None:
        page = read_page(self.settings.page)
        policy = {"Content-Security-Policy": content_policy(page), "Referrer-Policy": "no-referrer"}
        self.send(200, page.encode(), "text/html; charset=utf-8", **policy)

    def get_models(self) -> None:
        """Answer with the list of models, or with the one that the path names."""
        model = self.ready()
        one = {"id": model.id, "object": "model", "created": model.created, "owned_by": "you"}
        _, of_one, name = self.path.partition("/models/")
        if of_one:
            model.check_name(urllib.parse.unquote(name))
        self.send_json(200, one if of_one else {"object": "list", "data": [one]})

    def get_health(self) -> None:
        server, model = self.server, self.server.model
        status = "draining" if server.draining else "ready" if model else "loading"
        status = "failing" if status == "ready" and model and model.worker.fails else status
        health: dict[str, Any] = {"status": status, "tag": self.settings.tag}
        if model:
            device = model.engine.device
            health |= {"model": model.id, "stage": model.stage, "device": device.type,
                       "memory_bytes": memory_in_use(device)}  # fmt: skip
        self.send_json(200 if status == "ready" else 503, health)

    def get_config(self) -> None:
        s, model = self.settings, self.server.model
        names = ("temperature", "top_k", "top_p", "max_tokens")
        self.send_json(200, {
            "defaults": {name: getattr(s, name) for name in names},
            "limits": {"max_body_bytes": s.max_body_bytes, "max_messages": s.max_messages,
                       "max_chars": model and model.max_chars(s)},
            "key_wanted": bool(s.api_key), "model": model and model.id,
            "stage": model and model.stage, "completes": bool(model and model.stage == "base"),
            "context": model and model.context,
        })  # fmt: skip

    def get_training(self) -> None:
        folder = run_dir(self.settings.tag)
        self.send_json(200, read_training(folder, training_state(folder)))

    def get_metrics(self) -> None:
        with self.server.lock:
            values = dict(self.server.counts)
        if model := self.server.model:
            slots, count = len(model.engine.rows), model.worker.open
            values |= {"nanochat_slots": slots, "nanochat_requests_open": count,
                       "nanochat_requests_waiting": max(0, count - slots),
                       "nanochat_tokens_generated_total": model.worker.generated}  # fmt: skip
        lines = []

        def family(key: str) -> str:
            return re.sub("_seconds_(sum|count|bucket)$", "_seconds", key.split("{")[0])

        for name, group in itertools.groupby(
            sorted(values, key=family), family
        ):  # buckets in order
            kind = "counter" if name.endswith("_total") else "gauge"
            kind = "histogram" if name.endswith("_seconds") else kind
            lines += [f"# TYPE {name} {kind}", *(f"{key} {values[key]:.15g}" for key in group)]
        self.send(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    def complete(self) -> None:
        """Answer a request for completions, whole or as a stream. Raises Refusal."""
        model, body = self.ready(), parse_json(self.body)
        wanted = parse_wanted(body, self.path.endswith("chat/completions"), model, self.settings)
        worker, answer = model.worker, Answer(wanted, model, self.settings.blocked)
        news = worker.ask(wanted.requests())
        try:
            if wanted.stream:
                self.stream(news, answer)
            else:
                collections.deque(self.follow(news, answer), maxlen=0)
                self.send_json(200, answer.whole())
        finally:
            if not answer.done:
                worker.give_up(news)
            seconds = time.monotonic() - self.began
            worker.seconds_a_request = 0.9 * worker.seconds_a_request + 0.1 * seconds
            self.count(answer, seconds)
            if self.settings.log_content:
                texts = [choice.text for choice in answer.choices]
                self.note += f"  {json.dumps({'asked': body, 'answered': texts})}"

    def count(self, answer: Answer, seconds: float) -> None:
        """Add an answer to the metrics and the log."""
        count, usage = self.server.count, answer.usage()
        count("nanochat_tokens_prompt_total", usage["prompt_tokens"])
        spans = {"request": seconds}
        if answer.first_at:
            spans["first_token"] = answer.first_at - self.began
        for name, span in spans.items():
            for bound in BUCKETS:
                count(f'nanochat_{name}_seconds_bucket{{le="{bound}"}}', span <= float(bound))
            count(f"nanochat_{name}_seconds_sum", span)
            count(f"nanochat_{name}_seconds_count")
        done = usage["completion_tokens"]
        self.note = f"{done} tokens, {done / max(seconds, 1e-9):.1f} tok/s"

    def follow(self, news: News, answer: Answer) -> Iterator[list[dict[str, Any]]]:
        """Yield the chunks that each token brings. Raises ConnectionError if the client is gone."""
        while not answer.done:
            token = None
            with contextlib.suppress(queue.Empty):
                token = news.get(timeout=0.2)
            if not token:
                answer.model.worker.check()
            if self.gone():
                raise ConnectionError("the client is gone")
            if token:
                yield answer.feed(*token)

    def stream(self, news: News, answer: Answer) -> None:
        """Send an answer as server-sent events, piece by piece as it is made."""
        chunked = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not chunked
        head = {"Content-Type": "text/event-stream; charset=utf-8",
                "X-Accel-Buffering": "no"}  # fmt: skip  # nginx would hold it back
        self.begin(200, {**head, "Transfer-Encoding": "chunked"} if chunked else head)

        def send(values: list[Any], end: str = "") -> None:
            data = ("".join(f"data: {json.dumps(value)}\n\n" for value in values) + end).encode()
            if data:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

        send(answer.opening())
        try:
            for chunks in self.follow(news, answer):
                send(chunks)
            send(answer.closing(), "data: [DONE]\n\n")
        except Refusal as refusal:  # the engine failed
            send([refusal.body()])
        if chunked:
            self.wfile.write(b"0\r\n\r\n")


MOST_POINTS = 300  # of a curve
HALF_WRITTEN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # or not there, or odd


def training_state(folder: Path) -> tuple[tuple[int, int], ...]:
    """Return time and size of the files that read_training reads, 0 where there is none."""
    files = [folder / "metrics.jsonl", *(folder / "eval" / f"{stage}.json" for stage in STAGES)]
    states = []
    for file in files:
        states.append((0, 0))
        with contextlib.suppress(OSError):
            states[-1] = (file.stat().st_mtime_ns, file.stat().st_size)
    return tuple(states)


@functools.lru_cache(maxsize=1)
def read_training(folder: Path, _state: object = None) -> dict[str, Any]:
    """Return a run's curves {stage: {name: [[step, value], ...]}} and its scores, so far.

    Viewers ask again and again: the files are read when their state is another.
    """
    curves: dict[str, dict[str, list[list[float]]]] = {}
    scores: dict[str, dict[str, list[Any]]] = {}
    for entry in read_log(folder.name):
        with contextlib.suppress(*HALF_WRITTEN):
            stage, step = entry.pop("stage"), entry.pop("step")
            for name, value in entry.items():  # in the order in which the stage writes them
                plain = isinstance(value, (int, float)) and math.isfinite(value)  # as JSON has it
                if plain and name not in ("time", "left_s"):
                    curves.setdefault(stage, {}).setdefault(name, []).append([step, value])
    for named in curves.values():
        for name, points in named.items():
            every = -(-len(points) // MOST_POINTS)
            named[name] = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    for stage in STAGES:
        with contextlib.suppress(*HALF_WRITTEN):
            tasks = json.loads((folder / "eval" / f"{stage}.json").read_text("utf-8"))["tasks"]
            scores[stage] = {task: [record.get(key) for key in ("score", "low", "high")]
                             for task, record in tasks.items()}  # fmt: skip
    return {"tag": folder.name, "curves": curves, "scores": scores}


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that this process holds on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


ROUTES: dict[str, tuple[str, Callable[[Handler], None]]] = {
    "/": ("GET", Handler.get_page),
    "/v1/chat/completions": ("POST", Handler.complete),
    "/chat/completions": ("POST", Handler.complete),
    "/v1/completions": ("POST", Handler.complete),
    "/completions": ("POST", Handler.complete),
    "/v1/models": ("GET", Handler.get_models),
    "/models": ("GET", Handler.get_models),
    "/v1/models/": ("GET", Handler.get_models),  # and a name
    "/models/": ("GET", Handler.get_models),
    "/health": ("GET", Handler.get_health),
    "/config": ("GET", Handler.get_config),
    "/metrics": ("GET", Handler.get_metrics),
    "/training": ("GET", Handler.get_training),
}
OPEN_PATHS = {"/", "/health", "/config"}  # without a key: how else would the page ask for it


# 7. Export -----------------------------------------------------------------------------------

CHAT_TEMPLATE = """{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- '<|user_start|>' + ns.system + message.content + '<|user_end|>' -}}
{%- set ns.system = '' -%}
{%- else -%}
{{- '<|assistant_start|>' + message.content + '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def export(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write a model as a Hugging Face folder of the type nanochat, which other programs load.

    Raises Stop for a model with parts that this format has no place for.
    """
    c = model.config
    windows = any(c.window(i) < c.max_seq_len for i in range(c.n_layer))
    parts = {
        "--no-smear": c.smear, "--no-value-embeds": c.value_embeds, "--no-skip": c.skip,
        "--qk-scale=1": c.qk_scale != 1, "--window-pattern=L": windows,
        "--bigram-rows=0": c.bigram_rows > 0,
    }  # fmt: skip
    if flags := " ".join(flag for flag, has in parts.items() if has):
        raise Stop(f"the format has no place for parts of this model: train one with {flags}")
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.specials[f"<|{name}|>"] for name in ("bos", "assistant_end")}
    eos = {"bos_token_id": ids["bos"], "eos_token_id": ids["assistant_end"]}
    write_json(folder / "config.json", {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "dtype": "float32",
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": 4 * c.n_embd,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.max_seq_len,
        "final_logit_softcapping": c.softcap, "hidden_act": "relu2", "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "attention_bias": False, "tie_word_embeddings": False, **eos,
    })  # fmt: skip
    ends = {"eos_token_id": [ids["assistant_end"], ids["bos"]]}  # a base model ends in a new text
    write_json(folder / "generation_config.json", {**eos, **ends, "do_sample": True})
    write_safetensors(folder / "model.safetensors", exported_weights(model))
    write_json(folder / "tokenizer.json", exported_tokenizer(tokenizer))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.max_seq_len,
        "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def exported_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights by their names in that format, whose rotation turns the other way."""
    c = model.config

    def turned(weight: Tensor) -> Tensor:
        halves = weight.view(-1, 2, c.head_dim // 2, c.n_embd)
        return halves.flip(1).reshape(weight.shape)

    weights = {"model.embed_tokens.weight": model.embed.weight[: c.vocab_size],
               "lm_head.weight": model.head.weight[: c.vocab_size]}  # fmt: skip
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in {
            "self_attn.q_proj": turned(attention.q.weight),
            "self_attn.k_proj": turned(attention.k.weight),
            "self_attn.v_proj": attention.v.weight, "self_attn.o_proj": attention.out.weight,
            "mlp.fc1": mlp.up.weight, "mlp.fc2": mlp.down.weight,
        }.items()}  # fmt: skip
    return {name: weight.detach().float().contiguous() for name, weight in weights.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write fp32 tensors: a header's length, the header in JSON, then their bytes."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.cpu().numpy().astype("<f4").tobytes())


def exported_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer as the `tokenizers` package reads it: a character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    signs = {byte: chr(byte) for byte in plain}
    signs |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spelled(one: int) -> str:
        return "".join(signs[byte] for byte in tokenizer.decode_bytes([one]))

    number = 256 + len(tokenizer.merges)
    plainly = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **plainly}
                         for name, i in tokenizer.specials.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "vocab": {spelled(i): i for i in range(number)},
                  "merges": [[spelled(a), spelled(b)] for a, b in tokenizer.merges]},
        "decoder": level,
    }  # fmt: skip


# 8. Main -------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Engine, str]:
    """Load the model that the settings name into an engine; say which stage it is of."""
    model, tokenizer, folder = load_for_answers(settings)
    engine, stage = Engine(model, tokenizer, settings.slots), folder.parent.name
    device, slots = engine.device, len(engine.rows)
    print(f"serve: {stage} model of run {settings.tag}, {folder.name}, on {device.type}")
    if slots < settings.slots:
        print(f"serve: memory holds {slots} slots, not {settings.slots}: more requests wait")
    # a minute of compiling brings a small model, which is fast enough, nothing that is noticed
    pays = device.type == "cuda" or model.config.num_params() > 5e7
    choice = {"auto": "yes" if pays else "no"}.get(settings.compile, settings.compile)

    def say(text: str) -> None:
        print(f"serve: {text}", flush=True)

    if compile_or_not(choice, 0, device, say):
        engine.try_to_compile(say)
    return engine, stage


def addresses(settings: Settings, port: int) -> list[str]:
    """Return where the page can be opened."""
    hosts = [settings.host]
    if settings.host in ("0.0.0.0", "::"):
        hosts = ["127.0.0.1"]
        with (
            contextlib.suppress(OSError),  # no network
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way,
        ):
            way.connect(("192.0.2.1", 9))  # sends nothing: it looks up the way to other machines
            hosts.append(way.getsockname()[0])
        with contextlib.suppress(OSError, UnicodeError):  # a name that means nothing
            found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
            hosts += [str(entry[4][0]) for entry in found]
        hosts = [host for i, host in enumerate(hosts) if not i or not host.startswith("127.")]
    hosts = [f"[{host}]" if ":" in host else host for host in dict.fromkeys(hosts)]
    return [f"http://{host}:{port}" for host in hosts]


def main(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then may end."""
    if settings.export:
        model, tokenizer, _ = load_for_answers(settings)
        folder = Path(settings.export).expanduser()
        export(folder, model, tokenizer)
        return print(f"written: {folder}")
    try:
        server = Server(settings)
    except OSError as error:
        raise Stop(f"serve: {settings.host}:{settings.port} cannot be listened at "
                   f"({error.strerror}): take another --port or --host") from None  # fmt: skip
    ending = threading.Event()

    def end(*_: Any) -> None:
        # nobody is answered yet, and compiling may take minutes; or it is asked for again
        if server.model is None or ending.is_set():
            os._exit(0)
        ending.set()

    before = {n: signal.signal(n, end) for n in (signal.SIGINT, signal.SIGTERM)}
    listening = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    listening.start()
    try:
        for address in addresses(settings, server.server_port):
            print(f"serve: {address}", flush=True)
        if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_key:
            print("serve: anyone who reaches this machine can use it: --api-key wants a key")
        engine, stage = load(settings)
        name, worker = f"{settings.tag}-{stage}", Worker(engine, settings.max_waiting)
        names = (name, settings.tag, stage, "nanochat")
        server.model = Model(name, names, stage, engine, worker)
        print("serve: ready; Ctrl-C ends", flush=True)
        ending.wait()
        server.draining = True
        if running := worker.open:
            print(f"serve: {running} answers may end within {settings.drain_s:g} s; Ctrl-C ends "
                  "at once", flush=True)  # fmt: skip
        deadline = time.monotonic() + settings.drain_s
        while server.counts[ANSWERING] and time.monotonic() < deadline:
            time.sleep(0.05)
        worker.stop()
    finally:
        server.shutdown()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)


# 9. The page --------------------------------------------------------------------------------


def read_page(path: str) -> str:
    """Return the page, or that in a file of one's own. Raises Refusal where it cannot be read."""
    try:
        return Path(path).read_text("utf-8") if path else PAGE
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(503, f"--page={path} cannot be read: {error}") from None


@functools.cache
def content_policy(page: str) -> str:
    """Return a policy under which only the page's own script and style run."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")  # fmt: skip


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanochat</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --bg: light-dark(#fff, #1c1c1a);
  --side: light-dark(#f5f5f3, #161615); --text: light-dark(#1d1d1b, #eceae4);
  --soft: light-dark(#63625d, #a5a39b); --line: light-dark(#dedcd6, #3a3936);
  --mine: light-dark(#efede8, #2c2b28); --accent: light-dark(#b4481e, #e08a5f);
  --code: light-dark(#f4f2ee, #262522); --bad: light-dark(#b3261e, #f2b8b5);
  --edge: 1px solid var(--line) }
:root[data-theme=dark] { color-scheme: dark }
:root[data-theme=light] { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0; height: 100dvh; display: grid; grid-template: "side main" 1fr / 17rem 1fr;
  font: 1rem/1.55 system-ui, sans-serif; background: var(--bg); color: var(--text) }
button, input, textarea, select { font: inherit; color: inherit; background: none;
  border: 1px solid transparent; border-radius: .6rem; padding: .35rem .6rem; min-height: 2.2rem }
button { cursor: pointer }
button:hover, nav li.now { background: var(--mine) }
button:disabled { opacity: .45; cursor: default }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.strong, .strong:hover { background: var(--accent); color: var(--bg) }
.strong:hover { filter: brightness(1.08) }
input, textarea, select { border: var(--edge); background: var(--bg) }
input, textarea { width: 100% }
nav { grid-area: side; background: var(--side); border-right: var(--edge);
  display: flex; flex-direction: column; gap: .5rem; padding: .75rem; min-height: 0 }
nav ol { list-style: none; margin: 0; padding: 0; overflow-y: auto; flex: 1 }
nav li { display: flex; border-radius: .6rem }
nav li > button:first-child, h1 { flex: 1; text-align: left; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis }
nav li > button:not(:first-child) { color: var(--soft); padding: .35rem }
main { grid-area: main; display: flex; flex-direction: column; min-width: 0; min-height: 0 }
header { display: flex; align-items: center; gap: .5rem; padding: .5rem .75rem;
  border-bottom: var(--edge) }
header h1 { font-size: 1rem; margin: 0 }
header select { width: 6rem }
#menu { display: none }
#log, #training { flex: 1; overflow-y: auto; padding: 1rem }
#log > * { max-width: 46rem; margin: 0 auto 1.25rem }
.empty { text-align: center; color: var(--soft); padding-top: 18vh }
.empty button { border-color: var(--line); margin: .25rem; color: var(--text) }
.user > .said { background: var(--mine); border-radius: 1rem; padding: .6rem 1rem;
  margin-left: auto; width: fit-content; max-width: 85%; white-space: pre-wrap }
.said { overflow-wrap: anywhere }
.said > :first-child { margin-top: 0 }
.said > :last-child { margin-bottom: 0 }
.tools { display: flex; gap: .1rem; flex-wrap: wrap; align-items: center; font-size: .82rem;
  color: var(--soft); min-height: 2.2rem }
.user .tools { justify-content: flex-end }
.editing > .said, :invalid { outline: 2px solid var(--accent) }
.card, pre, figure { border: var(--edge); border-radius: .6rem; background: var(--code) }
.card { display: inline-flex; gap: .5rem; padding: .1rem .6rem; margin: .15rem 0; max-width: 100%;
  font: .9rem ui-monospace, monospace; line-height: 1.7; overflow-x: auto; vertical-align: middle }
.card b { color: var(--accent) }
pre { padding: .75rem; overflow-x: auto; position: relative }
pre button { position: absolute; top: .2rem; right: .2rem; font-size: .8rem }
code { font-family: ui-monospace, monospace; font-size: .9em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: var(--edge); padding: .25rem .6rem; text-align: left }
.trouble, #notice { color: var(--bad) }
#notice { margin: 0; padding: .5rem 1rem; border-bottom: var(--edge) }
#notice:empty { display: none }
#training h2 { font-size: 1rem; margin: 1rem 0 .5rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem }
figcaption { font-size: .85rem; color: var(--soft) }
svg { width: 100%; height: 7rem; display: block }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke }
form { padding: .5rem 1rem 1rem }
form > div { max-width: 46rem; margin: auto; display: flex; gap: .5rem; align-items: flex-end;
  border: var(--edge); border-radius: 1.2rem; padding: .4rem }
form > div:focus-within { border-color: var(--accent) }
form textarea { border: 0; resize: none; max-height: 40vh; background: none }
form textarea:focus-visible { outline: none }
aside { position: fixed; inset: 0 0 0 auto; width: min(22rem, 100vw); background: var(--side);
  border-left: var(--edge); padding: 1rem; overflow-y: auto; z-index: 3;
  box-shadow: 0 0 2rem #0003 }
aside label { display: block; margin: .75rem 0; font-size: .9rem; color: var(--soft) }
aside output { float: right }
#defaults { border: var(--edge) }
[hidden] { display: none !important }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@media (max-width: 720px) {
  body { grid-template: "main" 1fr / 1fr }
  nav { position: fixed; inset: 0 auto 0 0; width: min(20rem, 85vw); z-index: 2;
    box-shadow: 0 0 2rem #0003 }
  body:not(.open) nav { display: none }
  #menu { display: inline-block }
  header { gap: .2rem; padding: .5rem }
  header select { width: 3.2rem }
}
@media (prefers-reduced-motion: no-preference) { .writing::after { content: "\25CF";
  animation: blink 1s infinite } @keyframes blink { 50% { opacity: .2 } } }
</style>
</head>
<body>
<nav aria-label="Conversations">
  <button id="new" class="strong">New chat</button>
  <input id="find" type="search" placeholder="Search" aria-label="Search conversations">
  <ol id="chats" tabindex="-1"></ol>
</nav>
<main>
  <header>
    <button id="menu" aria-label="Conversations" aria-expanded="false">&#9776;</button>
    <h1 id="title">nanochat</h1>
    <select id="export" aria-label="Export this conversation">
      <option value="">Export</option><option value="md">Markdown</option>
      <option value="json">JSON</option>
    </select>
    <button id="view">Training</button>
    <button id="options" aria-expanded="false" aria-controls="drawer">Settings</button>
  </header>
  <p id="notice" role="alert"></p>
  <div id="log" role="log" aria-live="off" aria-label="Conversation" tabindex="0"></div>
  <div id="training" aria-label="Training" tabindex="0" hidden></div>
  <form id="form">
    <div>
      <label class="unseen" for="text">Message</label>
      <textarea id="text" rows="1" placeholder="Ask something"></textarea>
      <button id="send" class="strong">Send</button>
    </div>
  </form>
  <p id="state" class="unseen" role="status"></p>
</main>
<aside id="drawer" aria-label="Settings" hidden>
  <button id="close" aria-label="Close settings">Close</button>
  <label>Temperature <output></output>
    <input id="temperature" type="range" min="0" max="2" step="0.05"></label>
  <label>Top k, 0 is off <input id="top_k" type="number" min="0" step="1" required></label>
  <label>Top p <output></output>
    <input id="top_p" type="range" min="0.05" max="1" step="0.05"></label>
  <label>Tokens of an answer at most
    <input id="max_tokens" type="number" min="1" step="1" required></label>
  <label>System prompt <textarea id="system" rows="4"></textarea></label>
  <button id="defaults">Back to the server's values</button>
  <label>Key of this server <input id="key" type="password" autocomplete="off"></label>
  <label>Colors <select id="theme"><option value="">as the system</option>
    <option value="light">light</option><option value="dark">dark</option></select></label>
</aside>
<script>
"use strict";
const $ = (id) => document.getElementById(id);
const STORE = "nanochat/", KNOBS = ["temperature", "top_k", "top_p", "max_tokens"];
const UNREACHED = "The server cannot be reached.";
let config = { defaults: {} }, options = {}, chats = []; // options: what the user has changed
let tab = { now: "", draft: "" }, editing = null; // this tab's; editing: a message
const runs = new Map(), warnings = {}; // answers in the making, by their conversations' ids

function say(text) { $("state").textContent = text }
function warn(about, text) {
  if ((warnings[about] || "") === text) return;
  warnings[about] = text;
  $("notice").textContent = Object.values(warnings).join(" ").trim();
}
// Each conversation has a key of its own, so that tabs don't overwrite each other's.
function write(name, value, where = "localStorage") {
  let full = "";
  try {
    if (value) window[where].setItem(STORE + name, JSON.stringify(value));
    else window[where].removeItem(STORE + name);
  } catch { full = "This browser's storage is full: delete or export conversations." }
  if (where === "localStorage") warn("storage", full);
}
function read(name, where = "localStorage") {
  try { return JSON.parse(window[where].getItem(STORE + name)) } catch { return null }
}
function keep(c = chat()) { if (c.messages.length && chats.includes(c)) write(c.id, c) }
function keepTab() { write("tab", tab, "sessionStorage") }
function recall(key) {
  if (!key.startsWith(STORE)) return;
  const id = key.slice(STORE.length), found = read(id);
  if (id === "options") options = found || {};
  else if (!runs.has(id)) {
    chats = chats.filter((c) => c.id !== id);
    if (found && found.id === id && Array.isArray(found.messages)) chats.push(found);
    chats.sort((a, b) => (a.id < b.id ? 1 : -1));
  }
}

// Elements are made of text alone: nothing that a person or a model writes becomes HTML.
function h(tag, attributes = {}, ...children) {
  const space = ["svg", "polyline"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const made = document.createElementNS("http://www.w3.org/" + space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat());
  return made;
}

// Markdown ------------------------------------------------------------------------------------
const MARKS = new RegExp(["`([^`]+)`", "\\*\\*([^*]+)\\*\\*",
  "(?<!\\w)[*_]([^*_\\s](?:[^*_]*[^*_\\s])?)[*_](?!\\w)",
  "\\[([^\\]]+)\\]\\((https?:\\/\\/[^\\s)]+)\\)"].join("|"), "g");
function inline(text) {
  const out = [];
  let last = 0;
  for (const m of text.matchAll(MARKS)) {
    out.push(text.slice(last, m.index));
    if (m[1]) out.push(h("code", {}, m[1]));
    else if (m[2]) out.push(h("strong", {}, inline(m[2])));
    else if (m[3]) out.push(h("em", {}, m[3]));
    else out.push(h("a", { href: m[5], target: "_blank", rel: "noopener noreferrer" }, m[4]));
    last = m.index + m[0].length;
  }
  return [...out, text.slice(last)];
}
function copier(text) {
  return h("button", { type: "button", onclick: async ({ target }) => {
    let done = true;
    try { await navigator.clipboard.writeText(text) }
    catch { // another machine's page has it over HTTPS alone
      const area = h("textarea", { class: "unseen" });
      area.value = text;
      document.body.append(area);
      area.focus();
      area.select();
      done = document.execCommand("copy");
      area.remove();
      target.focus();
    }
    target.textContent = done ? "Copied" : "Not copied";
    say(target.textContent);
  } }, "Copy");
}
const FENCE = /^(\s*)```/;
function markdown(text) {
  const lines = text.split("\n"), out = [];
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
  const table = (at) =>
    lines[at].includes("|") && /^[\s|:]*-[\s|:-]*$/.test(lines[at + 1] || "");
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    let found;
    if ((found = FENCE.exec(line))) {
      const end = lines.findIndex((l, j) => j > i && FENCE.test(l));
      const stop = end < 0 ? lines.length : end, indent = new RegExp(`^\\s{0,${found[1].length}}`);
      const code = lines.slice(i + 1, stop).map((l) => l.replace(indent, "")).join("\n");
      out.push(h("pre", { tabindex: 0 }, copier(code), h("code", {}, code)));
      i = stop + 1;
    } else if ((found = /^(#{1,4}) ([^]*)/.exec(line))) {
      out.push(h("h" + (found[1].length + 2), {}, inline(found[2])));
      i++;
    } else if (/^\s*([-*]|\d+[.)]) /.test(line)) {
      const numbered = /^\s*\d/.test(line), items = [];
      const kind = numbered ? /^\s*\d+[.)] ([^]*)/ : /^\s*[-*] ([^]*)/;
      for (; i < lines.length && (found = kind.exec(lines[i])); i++) items.push(found[1]);
      const start = numbered ? { start: parseInt(line, 10) } : {};
      out.push(h(numbered ? "ol" : "ul", start, items.map((item) => h("li", {}, inline(item)))));
    } else if (table(i)) {
      const rows = [];
      const head = cells(line);
      for (i += 2; i < lines.length && lines[i].includes("|"); i++) rows.push(cells(lines[i]));
      const row = (tag) => (r) => h("tr", {}, r.map((c) => h(tag, {}, inline(c))));
      out.push(h("table", {}, row("th")(head), rows.map(row("td"))));
    } else if (line.trim()) {
      const paragraph = [];
      const other = /^(\s*```|#{1,4} |\s*([-*]|\d+[.)]) )/;
      do paragraph.push(lines[i++]);
      while (i < lines.length && lines[i].trim() && !other.test(lines[i]) && !table(i));
      const joined = paragraph.flatMap((l, j) => (j ? [h("br"), ...inline(l)] : inline(l)));
      out.push(h("p", {}, joined));
    } else i++;
  }
  return out;
}

// Conversations -------------------------------------------------------------------------------
const chat = () => chats.find((c) => c.id === tab.now);
const running = (c = chat()) => runs.get(c.id);
function textOf({ content }) {
  if (typeof content === "string") return content;
  let text = "";
  for (const part of content) {
    if (part.type === "python") text += (/\S$/.test(text) ? " [" : "[") + part.text;
    else if (part.type === "output") text += ` = ${part.text}]`;
    else text += (/\]$/.test(text) && /^\w/.test(part.text) ? " " : "") + part.text;
  }
  return text;
}

function open(id) {
  look(false);
  menu(false);
  if (id === tab.now) return;
  leave();
  tab.now = id;
  keepTab(); fill(); draw(); $("text").focus();
}
function begin() {
  const blank = chats.find((c) => !c.messages.length && !c.title);
  if (blank) return open(blank.id);
  const id = String(Date.now()) + Math.random().toString(16).slice(2, 8);
  chats.unshift({ id, title: "", messages: [] });
  open(id);
}
function home() { if (chats.length) open(chats[0].id); else begin() }
function rename(c) {
  const title = prompt("Name of this conversation", c.title);
  if (title) { c.title = title; keep(c); follow(draw) }
}
function remove(c) {
  if (!confirm(`Delete "${c.title || "New chat"}"?`)) return;
  stop(c);
  chats = chats.filter((other) => other !== c);
  write(c.id, null);
  if (c.id === tab.now) home(); else drawList();
}
// Elements are made anew; one that had the focus hands it to its successor, or else to the box.
function refill(box, made) {
  const all = () => [...box.querySelectorAll("button, a, pre")];
  const was = document.activeElement, at = all().indexOf(was);
  box.replaceChildren(...made);
  if (at < 0) return;
  const next = all()[at], same = next && next.textContent === was.textContent;
  (same ? next : box).focus({ preventScroll: true });
}
// What is as it was stays: a text that is selected, a button that is held down.
function renew(box, made) {
  made.forEach((node, i) => {
    const old = box.childNodes[i];
    if (!old) box.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (box.childNodes.length > made.length) box.lastChild.remove();
}
function drawList() {
  const wanted = $("find").value.toLowerCase();
  const fits = (c) => [c.title, ...c.messages.map(textOf)].some((text) =>
    text.toLowerCase().includes(wanted));
  refill($("chats"), chats.filter(fits).map((c) => {
    const name = c.title || "New chat", now = c.id === tab.now;
    const small = (what, sign, act) =>
      h("button", { title: what, "aria-label": `${what} ${name}`, onclick: () => act(c) }, sign);
    return h("li", { class: now ? "now" : "" },
      h("button", { onclick: () => open(c.id), "aria-current": now && "true" }, name),
      small("Rename", "\u270e", rename), small("Delete", "\u2715", remove));
  }));
}
function drawSaid(message) {
  if (message.role === "user") return [message.content];
  const out = [];
  let text = "", call = null;
  for (const part of message.content) {
    if (part.type === "text") { text += part.text; call = null; continue }
    if (part.type === "python") {
      out.push(...markdown(text));
      text = "";
      const named = { class: "card", role: "group", "aria-label": "calculator" };
      call = h("span", named, h("span", {}, part.text));
      out.push(h("p", {}, call));
    } else if (call) call.append(h("b", {}, "= " + part.text));
  }
  return out.concat(markdown(text));
}
function drawMessage(message) {
  const run = running(), mine = message.role === "user", busy = run && run.message === message;
  const button = (name, act) => h("button", { onclick: act, disabled: !!run }, name);
  const tools = h("div", { class: "tools" }), last = message === chat().messages.at(-1);
  if (mine && message === editing) tools.append(button("Cancel", () => edit(null)));
  else if (mine) tools.append(button("Edit", () => edit(message)));
  else if (!busy) {
    tools.append(copier(textOf(message)));
    if (last) tools.append(button(message.trouble ? "Try again" : "Regenerate", again));
    if (last && message.before) tools.append(button("Undo", undo));
    if (message.note) tools.append(h("span", {}, message.note));
    if (message.trouble) {
      tools.append(h("span", { class: "trouble", role: last && "alert" }, message.trouble));
    }
  }
  const said = h("div", { class: "said" + (busy ? " writing" : "") }, drawSaid(message));
  return h("article", { class: message.role + (message === editing ? " editing" : ""),
    "aria-label": mine ? "You" : "Answer", "aria-busy": busy && "true" }, said, tools);
}
const IDEAS = ["Who are you?", "What is 37 times 12?", "What is the capital of France?",
  "How many times is the letter r in strawberry?"];
function draw() {
  drawList();
  const c = chat();
  $("title").textContent = c.title || "New chat";
  const begun = c.messages.length > 0;
  const ideas = config.completes ? ["The capital of France is"] : IDEAS;
  refill($("log"), begun ? c.messages.map(drawMessage) : [h("div", { class: "empty" },
    h("p", {}, config.model ? `This is ${config.model}. What would you like to know?` : "Hello!"),
    ideas.map((idea) => h("button", { onclick: () => ask(idea) }, idea)))]);
  $("send").textContent = running() ? "Stop" : "Send";
  $("log").scrollTop = $("log").scrollHeight;
}
// A reader who has scrolled up stays there.
function follow(change) {
  const log = $("log"), top = log.scrollTop, near = log.scrollHeight - top - log.clientHeight < 80;
  change();
  log.scrollTop = near ? log.scrollHeight : top;
}

// Asking --------------------------------------------------------------------------------------
function ask(text) {
  const c = chat(), at = c.messages.indexOf(editing);
  if (running() || !text.trim()) return;
  const before = at < 0 ? null : { at, messages: c.messages.splice(at) };
  const failed = c.messages.at(-1)?.before;
  if (at < 0 && text === tab.draft) tab.draft = "";
  if (at < 0 && failed?.messages[0].role === "assistant") // who goes on has the old answer again
    c.messages.splice(failed.at, c.messages.length, ...failed.messages);
  c.messages.push({ role: "user", content: text });
  c.title ||= text.trim().slice(0, 60);
  editing = null;
  keepTab(); fill(); answer(before);
}
function again() {
  const { messages } = chat(), at = messages.findLastIndex((m) => m.role === "user") + 1;
  const old = messages.splice(at);
  answer(old[0].before || (old[0].content.length ? { at, messages: old } : null));
}
// What an answer was to take the place of is kept until something of it has come.
function undo() {
  const { messages } = chat(), { at, messages: old } = messages.at(-1).before;
  const [made] = messages.splice(at, messages.length, ...old);
  keep();
  if (old[0].role !== "user") return draw();
  edit(old[0]);
  $("text").value = made.content;
  grow();
}
function leave() { // an edit that is interrupted becomes a draft: nothing typed is lost
  const text = $("text").value;
  if (editing && editing.content !== text) tab.draft = tab.draft ? `${tab.draft}\n${text}` : text;
  editing = null;
}
function edit(message) {
  if (message) { leave(); keepTab() } // another edit that this one interrupts
  editing = message;
  fill(); follow(draw); $("text").focus();
}
function fill() {
  $("text").value = editing ? editing.content : tab.draft;
  grow();
}
function stop(c) { const run = running(c); if (run) run.abort.abort() }

async function answer(before) {
  const c = chat(), message = { role: "assistant", content: [], ...(before && { before }) };
  const mine = { abort: new AbortController(), message };
  const sent = c.messages.map((m) => ({ role: m.role, content: m.content }));
  c.messages.push(message);
  runs.set(c.id, mine);
  keep(); draw(); say("Answering");
  const began = performance.now();
  let tokens = 0, total = 0, lost = 0, reason = "", frame = 0;
  try {
    const system = options.system ? [{ role: "system", content: options.system }] : [];
    const body = { stream: true, stream_options: { include_usage: true } };
    for (const knob of KNOBS) body[knob] = options[knob]; // the server's, where it is undefined
    if (config.completes) body.prompt = sent.at(-1).content;
    else {
      const said = sent.filter((m) => m.content.length), all = said.length;
      const { max_chars, max_messages } = config.limits ?? {};
      const size = () => [...system, ...said].reduce((n, m) => n + textOf(m).length, 0);
      while (said.length > 1 && (size() > max_chars || said.length >= max_messages)) said.shift();
      lost = all - said.length;
      Object.assign(body, { messages: [...system, ...said], truncation: "auto" });
    }
    const response = await fetch(config.completes ? "/v1/completions" : "/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), headers: headers(), signal: mine.abort.signal,
    });
    if (!response.ok) throw new Error(await trouble(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        ({ completion_tokens: tokens, total_tokens: total } = event.usage);
        lost += event.usage.forgotten_messages || 0;
      }
      for (const choice of event.choices) {
        const part = choice.delta ? choice.delta.part : { type: "text", text: choice.text };
        if (part && part.text) add(message, part);
        reason = choice.finish_reason || reason;
      }
      frame = frame || requestAnimationFrame(() => {
        frame = 0;
        if (chat() === c) follow(() => renew($("log").lastChild.firstChild, drawSaid(message)));
      });
    }
    if (!reason) throw new Error("The server ended before the answer did.");
    const seconds = (performance.now() - began) / 1000;
    const full = total < config.context ? "cut at the limit of tokens" : "the context is full";
    const why = reason === "length" ? full : "finished";
    message.note = `${tokens} tokens, ${(tokens / seconds).toFixed(0)} a second, ${why}`
      + (lost ? `; oldest ${lost} messages forgotten` : "");
  } catch (error) {
    if (mine.abort.signal.aborted) message.note = "stopped";
    else {
      message.trouble = error instanceof TypeError ? `${UNREACHED} What you wrote is kept.`
        : error.message;
      configure(); // it may be gone, and come back as another
    }
  }
  cancelAnimationFrame(frame);
  runs.delete(c.id);
  keep(c);
  if (chat() === c) follow(draw);
  const done = mine.abort.signal.aborted ? "Stopped" : "Answered";
  say(message.trouble || (chat() === c && textOf(message)) || done);
}
function add(message, part) {
  delete message.before;
  const last = message.content.at(-1);
  if (last && last.type === part.type) last.text += part.text;
  else message.content.push({ type: part.type, text: part.text });
}
async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
async function trouble(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status === 401) {
    toggle(true);
    $("key").focus();
    return "This server wants its key: give it in the settings.";
  }
  if (response.status === 429) return "Many people are asking right now. Wait a moment.";
  const long = error.code === "context_length_exceeded";
  return (long ? "This message is too long for the model. " : "")
    + (error.message || `The server answered ${response.status}.`);
}
function headers() {
  if (/[^\x20-\xff]/.test(options.key || ""))
    throw new Error("The key in the settings has characters that a key can't have.");
  const key = options.key ? { Authorization: "Bearer " + options.key } : {};
  return { "Content-Type": "application/json", ...key };
}

// Training ------------------------------------------------------------------------------------
const short = (x) => Math.abs(x) >= 1000 ? Math.round(x).toLocaleString()
  : String(+x.toPrecision(3));
function curve(name, points) {
  const [xs, ys] = [0, 1].map((i) => points.map((p) => p[i])), last = ys.at(-1);
  const [left, right, low, high] = [xs, ys].flatMap((of) => [Math.min(...of), Math.max(...of)]);
  const at = ([x, y]) => `${100 * (x - left) / (right - left || 1)},` +
    `${50 - 50 * (y - low) / (high - low || 1)}`;
  const label = `${name}: from ${short(ys[0])} to ${short(last)}`;
  return h("figure", {},
    h("svg", { viewBox: "-1 -1 102 52", preserveAspectRatio: "none", role: "img",
      "aria-label": label }, h("polyline", { points: points.map(at).join(" ") })),
    h("figcaption", {}, `${name}: ${short(last)} at step ${short(right)} ` +
      `(${short(low)} to ${short(high)})`));
}
function scoreTable(scores) {
  const stages = Object.keys(scores);
  const tasks = [...new Set(stages.flatMap((stage) => Object.keys(scores[stage])))];
  const shown = (task, record) => {
    if (!record || record[0] == null) return "";
    if (task.endsWith("bpb")) return record[0].toFixed(3);
    const [score, low, high] = record.map((x) => (100 * x).toFixed(1));
    return record[1] == null ? score : `${score} [${low}, ${high}]`;
  };
  return h("table", {}, h("tr", {}, ["task", ...stages].map((name) => h("th", {}, name))),
    tasks.map((task) => h("tr", {}, h("th", {}, task),
      stages.map((stage) => h("td", {}, shown(task, scores[stage][task]))))));
}
async function drawTraining() {
  let run;
  try {
    const response = await fetch("/training", { headers: headers() });
    if ($("training").hidden) return;
    if (response.status === 401) clearInterval(watching); // until a key is given
    if (!response.ok) throw new Error(await trouble(response));
    run = await response.json();
    warn("training", "");
  } catch (error) {
    if ($("training").hidden) return;
    return warn("training", error instanceof TypeError ? UNREACHED : error.message);
  }
  const blocks = [h("h2", {}, `Run ${run.tag}: scores in percent, with 95% intervals`),
    Object.keys(run.scores).length ? scoreTable(run.scores) : h("p", {}, "No scores yet.")];
  for (const [stage, named] of Object.entries(run.curves)) {
    const curves = Object.entries(named).filter(([, points]) => points.length > 1);
    blocks.push(h("h2", {}, stage), h("div", { class: "curves" },
      curves.map(([name, points]) => curve(name, points))));
  }
  $("training").replaceChildren(...blocks);
}
let watching = 0;
function look(training) {
  for (const id of ["log", "form"]) $(id).hidden = training;
  $("training").hidden = !training;
  $("view").textContent = training ? "Chat" : "Training";
  clearInterval(watching);
  warn("training", "");
  if (training) { drawTraining(); watching = setInterval(drawTraining, 5000) }
}

// Controls ------------------------------------------------------------------------------------
function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + "px";
}
function toggle(shown) {
  $("drawer").hidden = !shown;
  $("options").setAttribute("aria-expanded", shown);
  if (shown) $("temperature").focus(); else $("options").focus();
}
function exported(c, kind) {
  const turn = (m) => `**${m.role === "user" ? "You" : "Answer"}:** ${textOf(m)}\n`;
  const text = kind === "json" ? JSON.stringify(c, null, 1)
    : [`# ${c.title}\n`, ...c.messages.map(turn)].join("\n");
  const name = (c.title || "chat").replace(/[^\w-]+/g, "-");
  const href = URL.createObjectURL(new Blob([text]));
  h("a", { download: `${name}.${kind}`, href }).click();
  URL.revokeObjectURL(href);
}
function menu(shown) {
  document.body.classList.toggle("open", shown);
  $("menu").setAttribute("aria-expanded", shown);
}
function settle() {
  for (const name of [...KNOBS, "system", "key", "theme"]) {
    const field = $(name), shown = field.parentElement.querySelector("output");
    const show = () => {
      if (shown) shown.textContent = field.value;
      if (name === "theme") document.documentElement.dataset.theme = field.value;
    };
    field.value = options[name] ?? config.defaults[name] ?? "";
    field.oninput = () => {
      show();
      if (!field.checkValidity()) return;
      options[name] = KNOBS.includes(name) ? Number(field.value) : field.value;
      write("options", options);
    };
    show();
  }
}
let retry = 0;
async function configure() {
  let missing = UNREACHED;
  try {
    const response = await fetch("/config");
    if (response.ok) {
      config = await response.json();
      missing = config.model ? "" : "The server is loading its model.";
    }
  } catch { /* it is asked again */ }
  warn("server", missing);
  clearTimeout(retry);
  if (missing) retry = setTimeout(configure, 2000);
  else { settle(); follow(draw) }
}
$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running()) stop(); else ask($("text").value);
};
$("text").oninput = () => {
  if (!editing) tab.draft = $("text").value;
  keepTab(); grow();
};
$("text").onkeydown = (event) => {
  // 229: Safari's, of the key that ends a composition
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    ask($("text").value);
  }
};
$("new").onclick = begin;
$("find").oninput = drawList;
$("menu").onclick = () => menu(!document.body.classList.contains("open"));
$("options").onclick = () => toggle($("drawer").hidden);
$("view").onclick = () => look($("training").hidden);
$("key").onchange = () => { if (!$("training").hidden) look(true) };
$("close").onclick = () => toggle(false);
$("defaults").onclick = () => {
  for (const name of [...KNOBS, "system"]) delete options[name];
  write("options", options); settle(); say("The settings are the server's");
};
$("export").onchange = () => {
  if ($("export").value) exported(chat(), $("export").value);
  $("export").value = "";
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing || event.target === $("find")) return;
  if (document.body.classList.contains("open")) { menu(false); $("menu").focus() }
  else if (!$("drawer").hidden) toggle(false);
  else if (editing) edit(null);
  else stop();
};
document.addEventListener("click", ({ target }) => { // beside the list, before what is clicked acts
  if (!target.closest("nav, #menu")) menu(false);
}, true);
addEventListener("storage", ({ key }) => { // another tab has written
  const at = chat()?.messages.indexOf(editing), was = editing;
  recall(key || "");
  if (editing && key === STORE + tab.now) {
    const now = chat()?.messages[at];
    if (now?.content === was.content) editing = now; else { leave(); keepTab(); fill() }
  }
  if (key === STORE + "options") settle();
  else if (!chat()) home();
  else if (key === STORE + tab.now) follow(draw);
  else drawList();
});
addEventListener("pagehide", () => {
  chats.filter((c) => running(c)).forEach((c) => keep(c));
  if (editing) { leave(); keepTab(); edit(null) }
});
function start() {
  try { Object.keys(localStorage).forEach(recall) } catch { /* this browser keeps nothing */ }
  tab = { ...tab, ...read("tab", "sessionStorage") };
  settle(); fill();
  if (chat()) draw(); else begin();
  configure();
}
start();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    with one_sentence("serve"):
        main(parse_settings(Settings, __doc__))
