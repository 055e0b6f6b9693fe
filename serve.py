"""Serve a model: a chat page for people, and an API for clients of OpenAI's.

Usage:   python serve.py                                    # http://127.0.0.1:8000
         python serve.py --stage=base --port=9000
         NANOCHAT_API_KEY=... python serve.py --host=0.0.0.0    # for the whole network
         python serve.py --blocklist=FILE                   # what must not be asked or answered
         curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
              -d '{"messages": [{"role": "user", "content": "Hi!"}], "stream": true}'
Reads:   runs/TAG/{tokenizer,STAGE}/, runs/TAG/report.html
Serves:  POST /v1/chat/completions, /v1/completions; GET / (the page), /report, /v1/models,
         /health, /config, /metrics
Method:  one thread runs the engine, which decodes all requests side by side; one thread per
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
import json
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from common import (
    GPT,
    NORM_EPS,
    Engine,
    Job,
    ModelSettings,
    ReplyDecoder,
    Request,
    Sampling,
    Stop,
    Tokenizer,
    at_least,
    calculate,
    compile_or_not,
    load_for_answers,
    newest_turns,
    one_sentence,
    parse_settings,
    read_meta,
    render_call,
    render_prompt,
    run_dir,
    setting,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(ModelSettings):
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = setting(8000, "port to listen on; 0: any free one")
    api_key: str = setting("", "key that clients must send; empty: NANOCHAT_API_KEY, if it is set")
    cors_origin: str = setting("", "origin whose pages may use the API, such as https://a.example")
    allow_host: str = setting("", "names, separated by commas, that clients may also call this by")
    root_path: str = setting("", "path that a proxy puts before all others, such as /proxy/8000")
    temperature: float = setting(0.6, "0: always the likeliest token", short="t")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0: all", short="k")
    top_p: float = setting(1.0, "sample among the likeliest tokens of this total probability")
    max_tokens: int = setting(256, "tokens of an answer at most")
    slots: int = setting(16, "requests that are decoded side by side")
    max_waiting: int = setting(64, "requests that may wait until one of the --slots is free")
    max_connections: int = setting(256, "connections that may be open at once")
    max_body_bytes: int = setting(1 << 20, "size limit of a request's body")
    max_messages: int = setting(500, "messages that a conversation may have")
    max_input_chars: int = setting(
        0, "characters that a conversation or prompt may have; 0: 16 per token of the context"
    )
    max_choices: int = setting(8, "answers that one request may ask for (n)")
    timeout_s: float = setting(30.0, "seconds within which a request must arrive, a client read")
    drain_s: float = setting(60.0, "seconds that unfinished answers have after SIGTERM")
    blocklist: str = setting("", "file of regular expressions, one a line, to refuse and to mask")
    page: str = setting("", "HTML file to serve as the page, read at each request: edit it live")
    export: str = setting("", "write the model to this folder in Hugging Face's format, then end")
    log_content: bool = setting(False, "also log what is asked and answered")
    compile: str = setting(
        "auto", "torch.compile; auto = where it pays", choices=("auto", "yes", "no")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p)  # raises
        self.api_key = self.api_key or os.environ.get("NANOCHAT_API_KEY", "")
        at_least(
            self, 1, "slots", "max_connections", "max_body_bytes", "max_messages", "max_choices"
        )
        at_least(self, 0, "max_waiting", "max_input_chars")
        if not 0 <= self.port < 65536 or not 0 < self.timeout_s <= 86400:
            raise ValueError("--port must be 0 to 65535, --timeout-s above 0 and at most 86400")
        if self.export and self.int8:
            raise ValueError("--export writes unquantised weights: leave --int8 out")
        if self.cors_origin and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/]+", self.cors_origin):
            raise ValueError("--cors-origin must be like https://a.example, without a path")
        try:
            read_page(self.page)
        except Refusal as error:
            raise ValueError(str(error)) from None
        self.blocked = read_blocklist(Path(self.blocklist).expanduser()) if self.blocklist else None


# 2. Engine thread ----------------------------------------------------------------------------


class Refusal(Exception):
    """A request that is refused: HTTP status, message, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param or None,
                          "code": self.code or None}}  # fmt: skip


Updates = queue.SimpleQueue[tuple[int, int, str]]  # index of the request, new id, finish reason


class Model:
    """The model that is served; its engine runs in a thread that takes requests from others."""

    def __init__(self, engine: Engine, tag: str, stage: str, max_waiting: int, openings: list[str]):
        self.engine, self.stage, self.id, self.openings = engine, stage, f"{tag}-{stage}", openings
        self.names = (None, self.id, tag, stage, "nanochat")  # None: a request that names none
        self.context, self.slots = engine.model.config.max_seq_len, len(engine.rows)
        self.capacity, self.created = self.slots + max_waiting, int(time.time())
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.owners: dict[Job, tuple[Updates, int]] = {}  # of unfinished jobs
        self.lock, self.unfinished = threading.Lock(), 0  # requests, waiting ones too
        self.generated_tokens, self.failures = 0, 0  # failures: of steps, consecutive
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def failing(self) -> bool:
        """True if nobody can be answered: the thread has ended, or step after step fails."""
        return self.failures > 2 or not self.thread.is_alive()

    def check_name(self, name: Any) -> None:
        """Raise Refusal if another model is asked for."""
        if name not in self.names:
            message = f"the model {ascii(name)[:80]} is not served here: {self.id} is"
            raise Refusal(404, message, "model", "model_not_found")

    def submit(self, requests: list[Request]) -> Updates:
        """Hand in requests; return the queue of their updates. Raises Refusal if too many wait."""
        updates: Updates = queue.SimpleQueue()

        def begin() -> None:
            for index, request in enumerate(requests):
                self.owners[self.engine.submit(request)] = updates, index

        with self.lock:
            if self.unfinished + len(requests) > self.capacity:
                message = f"{self.unfinished} requests are running or waiting: try again later"
                raise Refusal(429, message, code="queue_full", **{"Retry-After": "2"})
            self.unfinished += len(requests)
        self.inbox.put(begin)
        return updates

    def cancel(self, updates: Updates) -> None:
        """End what is unfinished of a submission before the next step."""

        def end() -> None:
            for job in [job for job, owner in self.owners.items() if owner[0] is updates]:
                self.engine.cancel(job)
                self._report(job, -1, "cancel")

        self.inbox.put(end)

    def stop(self) -> None:
        """End the thread; a hanging device may prevent that."""
        self.inbox.put(None)
        self.thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            try:
                while not self.engine.load or not self.inbox.empty():
                    act = self.inbox.get()
                    if act is None:
                        return
                    act()
                for job in self.engine.step():
                    self.generated_tokens += 1
                    self._report(job, job.reply.ids[-1], job.reply.reason)
                self.failures = 0
            # out of memory, say, or a panic of the tokenizer, which is no Exception: the running
            # requests fail, the server goes on
            except BaseException:  # noqa: BLE001
                self.failures += 1
                with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file
                    traceback.print_exc()
                self.engine.clear()
                for job in tuple(self.owners):
                    self._report(job, -1, "error")

    def _report(self, job: Job, new_id: int, reason: str) -> None:
        """Queue an update; a finished job frees its place before its client learns of it."""
        updates, index = self.owners[job]
        if reason:
            del self.owners[job]
            with self.lock:
                self.unfinished -= 1
        updates.put((index, new_id, reason))


# 3. Blocklist --------------------------------------------------------------------------------

MAX_MATCH_CHARS = 256  # so that at most so many characters of an answer are held back


@dataclass(frozen=True)
class Blocklist:
    """What is blocked; `window` characters decide whether a match begins at the first of them.

    No match reads further, so what is masked does not depend on how much text has arrived.
    """

    pattern: re.Pattern[str]
    window: int

    def match_end(self, text: str, start: int) -> int:
        """Return the end of a match that begins at `start`, or `start`."""
        found = self.pattern.match(text, start, start + self.window)
        return found.end() if found else start

    def occurs_in(self, text: str) -> bool:
        """True if anything in the text is blocked."""
        return any(self.match_end(text, start) > start for start in range(len(text)))


def read_blocklist(path: Path) -> Blocklist | None:
    """Read regular expressions, one a line, without regard to case; # begins a comment line.

    Python's matcher can take exponential time, and nobody is served meanwhile: a repetition inside
    a repetition, the usual cause, is refused; MAX_MATCH_CHARS bounds the polynomial rest. (a|a)*
    passes: whoever writes the file has the last word. Raises ValueError with file and line.
    """
    lines, window = [], 0
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--blocklist: {path} cannot be read as UTF-8: {error}") from None
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith("#"):
            continue
        try:
            if not all(found[0] for found in re.finditer(line, "a b.")):
                raise ValueError("it matches the empty text, so everywhere")
            if re.search(r"\\[1-9]|\(\?[P(]", line):  # joined with others, its number would change
                raise ValueError("it refers to a group, or names one")
            if re.search(r"[*+}].*\)[*+{]", line):
                raise ValueError("it may repeat a repetition, which can take for ever")
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            where = f"--blocklist: {path}:{number}: {line[:80]}"
            raise ValueError(f"{where}: {error}: mend or remove this line") from None
        # without a repetition no match is longer than its expression; + 2 for \b, $, lookaheads
        window = max(window, MAX_MATCH_CHARS if re.search("[*+{]", line) else len(line) + 2)
        lines.append(f"(?:{line})")
    pattern = re.compile("|".join(lines), re.IGNORECASE)
    return Blocklist(pattern, min(window, MAX_MATCH_CHARS)) if lines else None


class Masker:
    """Masks what is blocked in the pieces (type, text) of a reply, wherever they are cut."""

    def __init__(self, blocklist: Blocklist):
        self.blocklist, self.kind = blocklist, "text"
        self.text, self.start = "", 0  # the text of this type so far; where what waits begins

    def feed(self, kind: str, piece: str) -> list[tuple[str, str]]:
        """Return the pieces that are ready."""
        pieces = self.end() if kind != self.kind else []
        self.kind = kind
        self.text += piece
        return pieces + self._masked(len(self.text) - self.blocklist.window + 1)

    def end(self) -> list[tuple[str, str]]:
        """Return what waits, as no more of its type follows."""
        pieces = self._masked(len(self.text))
        self.text, self.start = "", 0
        return pieces

    def _masked(self, stop: int) -> list[tuple[str, str]]:
        masked = ""
        while self.start < stop:
            end = self.blocklist.match_end(self.text, self.start)
            masked += "[blocked]" if end > self.start else self.text[self.start]
            self.start = max(end, self.start + 1)
        return [(self.kind, masked)] if masked else []


# 4. Requests ---------------------------------------------------------------------------------

# Fields that would change the answer: absent, null, false, 0, empty, or else the value given here.
UNSUPPORTED: dict[str, Any] = dict.fromkeys(
    """tools functions logprobs top_logprobs logit_bias presence_penalty frequency_penalty audio
    prediction web_search_options suffix echo min_p min_tokens stop_token_ids ignore_eos
    guided_json guided_regex guided_choice guided_grammar structured_outputs bad_words
    use_beam_search chat_template continue_final_message""".split()
)
UNSUPPORTED |= {"response_format": {"type": "text"}, "modalities": ["text"], "best_of": 1,
                "typical_p": 1, "repetition_penalty": 1, "length_penalty": 1}  # fmt: skip
NO_LIMIT = 1 << 31


Parts = list[dict[str, str]]  # {"type": "text" | "python" | "output", "text"}


def check(good: Any, where: str, what: str) -> None:
    """Raise Refusal, which names a field and what is wrong with it, unless it is good."""
    if not good:
        raise Refusal(400, f"{where} {what}", where)


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a request's body. Raises Refusal if it is not a JSON object."""
    try:
        body = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UTF-8 that is not valid, too
        raise Refusal(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, 'the body must be a JSON object, such as {"messages": [...]}')
    return body


def number(body: dict, name: str, default: Any, low: float, high: float, whole: bool = True) -> Any:
    """Return a numeric field, or the default if it is absent or null. Raises Refusal."""
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    kind = "a whole number" if whole else "a number"
    check(good and low <= value <= high, name, f"must be {kind} from {low:g} to {high:g}")
    return value


def boolean(body: dict, name: str, prefix: str = "") -> bool:
    """Return a field that is true or false; false if it is absent or null. Raises Refusal."""
    value = body.get(name)
    check(value is None or isinstance(value, bool), prefix + name, "must be true or false")
    return bool(value)


def text_of(value: Any, where: str) -> str:
    """Return a string with its lone surrogates replaced. Raises Refusal if it is not a string."""
    check(isinstance(value, str), where, "must be a string")
    return value.encode("utf-8", "replace").decode()


def strings(value: Any, where: str, limit: int) -> list[str]:
    """Return the strings of a list, or of one string; none for null. Raises Refusal."""
    several = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(several, list) and len(several) <= limit
    check(good, where, f"must be a string or a list of up to {limit}")
    return [text_of(one, where) for one in several]


def text_in(content: str | Parts) -> str:
    """Return all text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def parse_content(content: Any, role: str, where: str) -> Parts:
    """Return the parts of a message; an assistant's may be calls of the calculator."""
    if isinstance(content, str):
        return [{"type": "text", "text": text_of(content, where)}]
    kinds = ("text", "python", "output") if role == "assistant" else ("text",)
    check(isinstance(content, list), where, "must be a string or a list of parts")
    parts = []
    for i, part in enumerate(content):
        good = isinstance(part, dict) and part.get("type") in kinds
        check(good, f"{where}[{i}]", f"must be a part of type {' or '.join(kinds)}")
        text = text_of(part.get("text"), f"{where}[{i}].text")
        parts.append({"type": part["type"], "text": text})
    return parts or [{"type": "text", "text": ""}]


def parse_messages(given: Any, limit: int, check_size: Callable) -> list[dict[str, Any]]:
    """Return a request's conversation: roles alternate, the last turn is the user's.

    A system message that nothing follows is the user's. Raises Refusal, which names the message.
    """
    check(given and isinstance(given, list), "messages", "must be a list of one message or more")
    check(len(given) <= limit, "messages", f"has {len(given)} messages: {limit} are allowed")
    messages: list[dict[str, Any]] = []
    size = 0
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        check(isinstance(message, dict), where, "must be an object with role and content")
        role = "system" if message.get("role") == "developer" else message.get("role")
        role = "user" if role == "system" and i == len(given) - 1 else role
        known = role in ("system", "user", "assistant")
        check(known, f"{where}.role", "must be system, user or assistant")
        called = role == "assistant" and message.get("tool_calls")
        check(not called, f"{where}.tool_calls", "is not supported")
        parts = parse_content(message.get("content"), role, f"{where}.content")
        size += len(text_in(parts))
        check_size(size)  # before anything is searched for in it
        if role == "assistant":
            parts = restore_calls(parts, message.get("parts"))
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += [{"type": "text", "text": "\n\n"}, *parts]
        else:
            messages.append({"role": role, "content": parts})
    check(messages[-1]["role"] == "user", "messages", "must end with a user's message")
    for message in messages:
        if message["role"] != "assistant":
            message["content"] = text_in(message["content"])
    return messages


CALL = re.compile(r"\[([^\[\]=]{1,200}) = ([^\[\]=]{1,200})\]")


def restore_calls(parts: Parts, sent_parts: Any) -> Parts:
    """Return the parts of an answer that a client sends back, its calls of the tool restored.

    Clients keep its text, in which a call is `[37*12 = 444]`, and some the `parts` beside it; the
    model has never read a call as text. Text is a call if the calculator gives the same result.
    """
    text = text_in(parts)
    with contextlib.suppress(Refusal):
        sent = parse_content(sent_parts, "assistant", "parts")
        parts = sent if draw(sent) == text else parts
    if any(part["type"] != "text" for part in parts):
        followers = [*(part["type"] for part in parts[1:]), ""]
        # a call that was cut off has no output: the model must not read it
        whole = [part for part, follower in zip(parts, followers)
                 if part["type"] != "python" or follower == "output"]  # fmt: skip
        return whole or [{"type": "text", "text": ""}]
    found, start = [], 0
    for call in CALL.finditer(text):
        if calculate(call[1]) == call[2] != "error":
            found += [{"type": "text", "text": text[start : call.start()]}]
            found += [{"type": "python", "text": call[1]}, {"type": "output", "text": call[2]}]
            start = call.end()
    found.append({"type": "text", "text": text[start:]})
    return [part for part in found if part["text"]] or parts


class CheckedRequest:
    """A client's request for completions: here each field is checked and gets its default."""

    def __init__(self, body: dict[str, Any], chat: bool, model: Model, settings: Settings):
        """Check a request's body. Raises Refusal, which says what is wrong with it."""
        for name, harmless in UNSUPPORTED.items():
            value = body.get(name)
            asks = name == "logprobs" and value == 0 and value is not False  # in a text completion
            if asks or (value and value != harmless):
                raise Refusal(400, f"{name} is not supported", name, "unsupported_parameter")
        model.check_name(body.get("model"))
        self.chat, self.field = chat, "messages" if chat else "prompt"
        self.model, self.settings, self.forgotten = model, settings, 0
        most = min(settings.max_choices, model.capacity)
        self.prompts = self._chat_prompt(body) if chat else self._text_prompts(body, most)
        self._check_size(max(map(len, self.prompts)), model.context - 1, "tokens")
        self.n = number(body, "n", 1, 1, most // len(self.prompts))
        limit = number(body, "max_tokens", settings.max_tokens, 1, NO_LIMIT)
        self.sampling = Sampling(
            max_tokens=number(body, "max_completion_tokens", limit, 1, NO_LIMIT),
            temperature=number(body, "temperature", settings.temperature, 0, 2, whole=False),
            top_k=number(body, "top_k", settings.top_k, 0, NO_LIMIT),
            top_p=number(body, "top_p", settings.top_p, 0, 1, whole=False),
            seed=number(body, "seed", secrets.randbits(48), -(2**63), 2**64) % 2**64,
        )
        self.stops = tuple(strings(body.get("stop"), "stop", 4))
        options = body.get("stream_options")
        good = all(0 < len(stop) <= 200 for stop in self.stops)
        check(good, "stop", "must have from 1 to 200 characters")
        check(options is None or isinstance(options, dict), "stream_options", "must be an object")
        self.stream = boolean(body, "stream")
        self.stream_usage = boolean(options or {}, "include_usage", "stream_options.")

    def _chat_prompt(self, body: dict[str, Any]) -> list[list[int]]:
        tokenizer, limit = self.model.engine.tokenizer, self.settings.max_messages
        given = parse_messages(body.get("messages"), limit, self._check_size)
        truncation = body.get("truncation") or "disabled"
        check(truncation in ("auto", "disabled"), "truncation", "must be auto or disabled")
        messages, prompt_ids = given, list[int]()
        if truncation == "auto":
            messages, prompt_ids = newest_turns(tokenizer, given, self.model.context)
        self.forgotten = len(given) - len(messages)
        self._check_blocked([text_in(message["content"]) for message in messages])
        return [prompt_ids or render_prompt(tokenizer, messages)]

    def _text_prompts(self, body: dict[str, Any], limit: int) -> list[list[int]]:
        texts = strings(body.get("prompt", ""), "prompt", limit)
        check(texts, "prompt", "must have a string")
        self._check_size(max(map(len, texts)))
        self._check_blocked(texts)
        tokenizer = self.model.engine.tokenizer
        return [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]

    def _check_size(self, size: int, limit: int = 0, unit: str = "characters") -> None:
        # characters are counted before tokenizing: of megabytes it would take seconds
        limit = limit or self.settings.max_input_chars or 16 * self.model.context
        if size > limit:
            raise Refusal(400, f"your {self.field} have {size:,} {unit}; at most {limit:,} are "
                          f"taken, with a context of {self.model.context:,} tokens: shorten them",
                          self.field, "context_length_exceeded")  # fmt: skip

    def _check_blocked(self, texts: list[str]) -> None:
        if self.settings.blocked and any(map(self.settings.blocked.occurs_in, texts)):
            raise Refusal(400, f"your {self.field} have text that this server refuses: reword it",
                          self.field, "content_blocked")  # fmt: skip

    def for_engine(self) -> list[Request]:
        """Return the engine's request for each answer; their seeds differ."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        seed = self.sampling.seed  # plus what makes seeds that no other request can ask for
        samplings = [dataclasses.replace(self.sampling, seed=seed + (i << 64))
                     for i in range(len(prompts))]  # fmt: skip
        return [Request(prompt, sampling, self.chat, self.stops)
                for prompt, sampling in zip(prompts, samplings)]  # fmt: skip


# 5. Answers ----------------------------------------------------------------------------------


def draw(parts: Parts, ended: bool = True) -> str:
    """Return the text of a reply; a call of the tool is drawn once its output is complete."""
    text, expression, called = "", "", False
    for part in parts:
        if part["type"] == "python":
            expression = part["text"]
        elif part["type"] == "text":
            text += " " * (called and part["text"][:1].isalnum()) + part["text"]
        elif ended or part is not parts[-1]:
            text += " " * (text[-1:].strip() != "") + render_call(expression, part["text"])
        called = part["type"] == "output"
    return text


@dataclass
class Choice:
    """One answer in the making."""

    decoder: ReplyDecoder
    masker: Masker | None
    text: str = ""
    parts: Parts = field(default_factory=list)
    tokens: int = 0
    reason: str = ""

    def feed(self, new_id: int, reason: str, chat: bool) -> Iterator[dict[str, Any]]:
        """Take the next token; yield what a stream says of it. `part` tells text from calls."""
        self.reason = reason
        self.tokens += 1
        pieces = self.decoder.feed(new_id) + (self.decoder.end() if reason else [])
        if self.masker:
            pieces = [ready for piece in pieces for ready in self.masker.feed(*piece)]
            pieces += self.masker.end() if reason else []
        for kind, piece in pieces:
            if not self.parts or self.parts[-1]["type"] != kind:
                self.parts.append({"type": kind, "text": ""})
            self.parts[-1]["text"] += piece
            drawn = draw(self.parts, False)[len(self.text) :] if chat else piece
            self.text += drawn
            yield {"content": drawn, "part": {"type": kind, "text": piece}}
        if reason and chat and (rest := draw(self.parts)[len(self.text) :]):
            self.text += rest
            yield {"content": rest}


class Completion:
    """The answers to a request in the making, as OpenAI's objects."""

    def __init__(self, asked: CheckedRequest):
        self.asked, self.chat, self.first_token_at = asked, asked.chat, 0.0
        name, blocked = "chatcmpl" if self.chat else "cmpl", asked.settings.blocked
        kind = f"chat.completion{'.chunk' * asked.stream}" if self.chat else "text_completion"
        self.head = {"id": f"{name}-{secrets.token_hex(12)}", "object": kind,
                     "created": int(time.time()), "model": asked.model.id}  # fmt: skip
        self.choices = []
        for _ in range(len(asked.prompts) * asked.n):
            decoder = ReplyDecoder(asked.model.engine.tokenizer, asked.stops, self.chat)
            self.choices.append(Choice(decoder, Masker(blocked) if blocked else None))

    @property
    def done(self) -> bool:
        return all(choice.reason for choice in self.choices)

    def feed(self, index: int, new_id: int, reason: str) -> list[dict[str, Any]]:
        """Take a choice's next token; return its chunks of a stream. Raises Refusal on "error"."""
        if reason == "error":
            self.choices[index].reason = reason
            raise Refusal(500, "the model failed; try again")
        self.first_token_at = self.first_token_at or time.monotonic()
        deltas = self.choices[index].feed(new_id, reason, self.chat)
        chunks = [self.chunk(index, "", delta) for delta in deltas]
        return chunks + ([self.chunk(index, reason, {})] if reason else [])

    def chunk(self, index: int, reason: str, delta: dict[str, Any]) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        usage = {"usage": None} if self.asked.stream_usage else {}
        return {**self.head, "choices": [self.choice(index, reason, said)], **usage}

    def choice(self, index: int, reason: str, said: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "logprobs": None, "finish_reason": reason or None, **said}

    def whole(self) -> dict[str, Any]:
        """Return the answer that is not streamed, or a stream's last chunk, with the usage."""
        choices = []
        for index, c in enumerate(self.choices):
            message = {"role": "assistant", "content": c.text, "refusal": None, "parts": c.parts}
            said = {"message": message} if self.chat else {"text": c.text}
            choices.append(self.choice(index, c.reason, said))
        return {**self.head, "choices": choices * (not self.asked.stream), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Count tokens, those of the calculator and the closing ones too."""
        prompt, lost = sum(map(len, self.asked.prompts)), self.asked.forgotten
        made = sum(choice.tokens for choice in self.choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return usage | ({"forgotten_messages": lost} if lost else {})


# 6. HTTP -------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Listens, gives each connection a thread, up to --max-connections, and counts for /metrics."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model: Model | None = None  # None while it loads
        self.draining = False
        self.lock, self.counts = threading.Lock(), collections.defaultdict[str, float](float)
        self.free_connections = threading.Semaphore(settings.max_connections)
        names = {"localhost", settings.host, socket.gethostname(), *settings.allow_host.split(",")}
        self.names = {name.strip().casefold() for name in names} - {""}
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)

    def server_bind(self) -> None:
        super(http.server.HTTPServer, self).server_bind()  # HTTPServer's looks up names
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free_connections.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # no more threads
                self.free_connections.release()
        self.count('nanochat_requests_total{path="none",code="503"}')
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Too Many Connections\r\nContent-Length: 0\r\n"
                            b"Retry-After: 1\r\nConnection: close\r\n\r\n")  # fmt: skip
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, unless it is a client that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.say(traceback.format_exc())

    def say(self, line: str) -> None:
        """Print to the log; a request goes on if the log cannot be written."""
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file
            print(line, flush=True)

    def count(self, name: str, value: float = 1) -> None:
        """Add to a counter, whose name may end in labels."""
        with self.lock:
            self.counts[name] += value

    def has_name(self, host: str) -> bool:
        """True if a Host header is an IP address or a name of this server.

        A page of another site whose name was pointed at this machine sends its own name.
        """
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
            return name.rstrip(".") in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


IN_FLIGHT = "nanochat_requests_in_flight"
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Incoming(io.RawIOBase):
    """What a socket brings until a deadline: who sends a byte a minute must not hold a thread."""

    def __init__(self, connection: socket.socket):
        self.connection, self.deadline = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        usual, left = self.connection.gettimeout(), self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            return self.connection.recv_into(buffer)
        except TimeoutError:
            raise Refusal(408, "the request took too long to arrive") from None
        finally:
            self.connection.settimeout(usual)


class Reader(io.BufferedReader):
    """Reads lines, in which a lone CR is a space (RFC 9112, 2.2), so that it begins no header."""

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        return line[:-2].replace(b"\r", b" ") + line[-2:]


class Handler(http.server.BaseHTTPRequestHandler):
    """Speaks HTTP/1.1 with one client."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "nanochat", ""
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        self.settings = self.server.settings
        super().setup()
        self.connection.settimeout(self.settings.timeout_s)
        self.incoming = Incoming(self.connection)
        self.rfile = self.reader = Reader(self.incoming)

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
        """Answer one request; an error in it ends no other."""
        self.status, self.note, self.command, self.path = 0, "", "-", "-"
        self.headers, self.request_version = self.MessageClass(), "HTTP/1.1"
        self.incoming.deadline = time.monotonic() + self.settings.timeout_s
        self.close_connection, begun = True, False
        try:
            begun = bool(self.reader.peek(1))
            self.began = time.monotonic()
            self.incoming.deadline = self.began + self.settings.timeout_s
            self.server.count(IN_FLIGHT, begun)  # the server waits for it before it ends
            super().handle_one_request()
        except Refusal as refusal:
            self.close_connection |= refusal.status == 408
            if begun and not self.status:  # an idle client between two requests gets no answer
                self.refuse(refusal)
        except OSError:  # the client is gone
            raise
        except BaseException:  # noqa: BLE001  # a panic of the tokenizer is no Exception
            self.server.say(traceback.format_exc())
            self.close_connection = True
            if not self.status:
                self.refuse(Refusal(500, "this request failed here; others go on"))
        finally:
            if begun:
                self.log()
                self.server.count(IN_FLIGHT, -1)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """Refuse what could not be parsed, and close, as it is uncertain where it ends."""
        self.close_connection, self.request_version = True, "HTTP/1.1"
        short = self.responses.get(code, ("error",))[0]
        raise Refusal(code, f"{short}: {message}" if message else short)

    def log_message(self, *_: Any) -> None:
        """Print nothing: log() prints a line for each request."""

    # input

    def read_body(self) -> bytes:
        """Read the whole body.

        Raises Refusal if its length is not beyond doubt; the connection then closes, so that
        nothing of the body can be taken for a second request.
        """
        headers, size = self.headers, 0
        closing = self.close_connection or self.request_version == "HTTP/1.0"
        self.close_connection = True
        if headers.defects or not all(HEADER_NAME.fullmatch(name) for name in headers):
            raise Refusal(400, "a header is malformed")
        if len(headers.get_all("Host", [])) != 1 and self.request_version != "HTTP/1.0":
            raise Refusal(400, "there must be one Host header")
        if "Transfer-Encoding" in headers:
            raise Refusal(411, "Transfer-Encoding is not supported: send a Content-Length")
        if lengths := headers.get_all("Content-Length", []):
            if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
                raise Refusal(400, "Content-Length must be one whole number")
            size = int(lengths[0])
        elif self.command == "POST":
            raise Refusal(411, "Content-Length is missing")
        if size > self.settings.max_body_bytes:
            raise Refusal(413, f"the body may have {self.settings.max_body_bytes:,} bytes at most")
        self.incoming.deadline = time.monotonic() + self.settings.timeout_s
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the body ends early")
        self.close_connection = closing
        return body

    def client_gone(self) -> bool:
        """True if the client has closed its connection. Raises OSError if it was reset."""
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(self.settings.timeout_s)

    # output

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
        for name, value in {**head, "Date": self.date_time_string()}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        """Send a whole answer."""
        self.begin(status, {"Content-Type": kind, "Content-Length": str(len(data)), **headers})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", **headers)

    def refuse(self, refusal: Refusal) -> None:
        self.note = ascii(str(refusal))[1:-1][:200]  # a terminal must not obey what a client sent
        self.send_json(refusal.status, refusal.body(), **refusal.headers)

    def log(self) -> None:
        """Log a line for the request, and count it."""
        texts = self.command or "-", self.path.split("?")[0]
        method, path = (ascii(text)[1:-1][:100] for text in texts)
        label = path if path in ROUTES else "other"
        self.server.count(f'nanochat_requests_total{{path="{label}",code="{self.status}"}}')
        seconds = time.monotonic() - self.began
        note = f"  {self.note}" if self.note else ""
        self.server.say(f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {method[:20]} "
                        f"{path} {self.status or 'gone'} {seconds:.2f} s{note}")  # fmt: skip

    # routes

    def answer(self) -> None:
        """Make the checks that all requests need, and call who answers. Raises Refusal."""
        root = self.settings.root_path.rstrip("/")
        if root and f"{self.path}/".startswith(f"{root}/"):  # not all proxies take it away
            self.path = self.path[len(root) :] or "/"
        self.body, headers, path = self.read_body(), self.headers, self.path.split("?")[0]
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if host and not self.server.has_name(host):
            raise Refusal(403, "this server has another name: --allow-host adds names")
        named = filter(None, self.settings.allow_host.split(","))  # as a proxy is, not Host
        ours = (None, f"http://{host}", f"https://{host}", self.settings.cors_origin or None)
        if origin not in ours and (origin or "").partition("://")[2].split(":")[0] not in named:
            raise Refusal(403, "pages of another origin may not use this: --cors-origin allows one")
        act = ROUTES.get(re.sub("^((/v1)?/models/).+", r"\1", path))
        if act is None:
            raise Refusal(404, f"there is no {ascii(path)[1:-1][:100]}: see /v1/models, /health")
        allowed = ["POST", "OPTIONS"] if act is Handler.complete else ["GET", "HEAD", "OPTIONS"]
        allow = {"Allow": ", ".join(allowed)}
        if self.command not in allowed:
            raise Refusal(405, f"{path} takes {' or '.join(allowed)}", **allow)
        if self.command == "OPTIONS":  # a browser asks before a page of --cors-origin may
            allow["Access-Control-Allow-Headers"] = "Authorization, *"
            allow["Access-Control-Allow-Methods"] = "GET, POST"
            return self.send(200, b"", "text/plain", **allow)
        if path not in OPEN_PATHS:
            self.check_key(view=path == "/report")
        act(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def check_key(self, view: bool) -> None:
        """Raise Refusal unless the client sends the key, if there is one.

        A browser that opens a view asks for it as a password, with any user name.
        """
        kind, _, key = self.headers.get("Authorization", "").partition(" ")
        if view and kind.casefold() == "basic":
            with contextlib.suppress(ValueError):
                key, kind = base64.b64decode(key).decode("latin-1").partition(":")[2], "bearer"
        wanted = self.settings.api_key
        right = hmac.compare_digest(key.strip().encode("latin-1", "replace"), wanted.encode())
        if wanted and not (right and kind.casefold() == "bearer"):
            challenge = 'Basic realm="nanochat: the key is the password"' if view else "Bearer"
            raise Refusal(401, "this server wants its key, as Authorization: Bearer KEY",
                          code="invalid_api_key", **{"WWW-Authenticate": challenge})  # fmt: skip

    def ready_model(self) -> Model:
        """Return the model. Raises Refusal before it has loaded and after SIGTERM."""
        model = self.server.model
        if model is None or self.server.draining:
            what = "shutting down" if self.server.draining else "loading its model"
            raise Refusal(503, f"the server is {what}", **{"Retry-After": "5"})
        return model

    def get_page(self) -> None:
        page = read_page(self.settings.page)
        policy = {"Content-Security-Policy": content_policy(page), "Referrer-Policy": "no-referrer"}
        self.send(200, page.encode(), "text/html; charset=utf-8", **policy)

    def get_report(self) -> None:
        """Send the report that evaluate.py has written of the run."""
        path = run_dir(self.settings.tag) / "report.html"
        if not path.exists():
            command = f"python evaluate.py --report --tag={self.settings.tag}"
            raise Refusal(404, f"this run has no report yet: `{command}` writes it")
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        self.send(200, path.read_bytes(), "text/html; charset=utf-8", **policy)

    def get_models(self) -> None:
        """Send the list of models, or the one that the path names."""
        model = self.ready_model()
        one = {"id": model.id, "object": "model", "created": model.created, "owned_by": "you"}
        _, names_one, name = self.path.split("?")[0].partition("/models/")
        if names_one:
            model.check_name(urllib.parse.unquote(name))
        self.send_json(200, one if names_one else {"object": "list", "data": [one]})

    def get_health(self) -> None:
        model, health = self.server.model, {"status": "loading", "tag": self.settings.tag}
        if model:
            health |= {"status": "failing" if model.failing else "ready", "model": model.id,
                       "stage": model.stage, "device": model.engine.device.type}  # fmt: skip
        health |= {"status": "draining"} if self.server.draining else {}
        self.send_json(200 if health["status"] == "ready" else 503, health)

    def get_config(self) -> None:
        s, model = self.settings, self.server.model
        self.send_json(200, {
            "defaults": {k: getattr(s, k) for k in ("temperature", "top_k", "top_p", "max_tokens")},
            "limits": {"max_body_bytes": s.max_body_bytes, "max_messages": s.max_messages,
                       "max_chars": s.max_input_chars or (model and 16 * model.context)},
            "key_wanted": bool(s.api_key), "model": model and model.id,
            "stage": model and model.stage, "completes": bool(model and model.stage == "base"),
            "context": model and model.context, "openings": model and model.openings,
        })  # fmt: skip

    def get_metrics(self) -> None:
        """Send the counters in the form that Prometheus reads."""
        with self.server.lock:
            values = dict(self.server.counts)
        if model := self.server.model:
            values |= {"nanochat_slots": model.slots, "nanochat_requests_open": model.unfinished,
                       "nanochat_requests_waiting": max(0, model.unfinished - model.slots),
                       "nanochat_tokens_generated_total": model.generated_tokens}  # fmt: skip
        text = "".join(f"{name} {value:.15g}\n" for name, value in sorted(values.items()))
        self.send(200, text.encode(), "text/plain; version=0.0.4")

    def complete(self) -> None:
        """Answer a request for completions, whole or as a stream. Raises Refusal."""
        model, body, count = self.ready_model(), parse_json(self.body), self.server.count
        asked = CheckedRequest(body, "/chat/" in self.path, model, self.settings)
        completion, updates = Completion(asked), model.submit(asked.for_engine())
        try:
            if asked.stream:
                self.stream(updates, completion)
            else:
                collections.deque(self.follow(updates, completion), maxlen=0)
                self.send_json(200, completion.whole())
        finally:
            if not completion.done:
                model.cancel(updates)
            usage, seconds = completion.usage(), time.monotonic() - self.began
            made = usage["completion_tokens"]
            self.note = f"{made} tokens, {made / max(seconds, 1e-9):.1f} tok/s"
            count("nanochat_tokens_prompt_total", usage["prompt_tokens"])
            count("nanochat_answers_total")
            count("nanochat_answer_seconds_total", seconds)
            if completion.first_token_at:
                span = completion.first_token_at - self.began
                count("nanochat_first_token_seconds_total", span)
            if self.settings.log_content:
                texts = [choice.text for choice in completion.choices]
                self.note += f"  {json.dumps({'asked': body, 'answered': texts})}"

    def follow(self, updates: Updates, completion: Completion) -> Iterator[list[Any]]:
        """Yield the chunks of each token. Raises ConnectionError if the client is gone."""
        while not completion.done:
            update = None
            with contextlib.suppress(queue.Empty):
                update = updates.get(timeout=0.2)
            if not update and not completion.asked.model.thread.is_alive():
                raise Refusal(500, "the engine has ended: restart the server")
            if self.client_gone():
                raise ConnectionError("the client is gone")
            if update:
                yield completion.feed(*update)

    def stream(self, updates: Updates, completion: Completion) -> None:
        """Send an answer as server-sent events, piece by piece as it is made."""
        chunked = self.request_version != "HTTP/1.0"
        head = {"Content-Type": "text/event-stream; charset=utf-8",
                "X-Accel-Buffering": "no"}  # fmt: skip  # or nginx would hold it back
        self.begin(200, {**head, "Transfer-Encoding": "chunked"} if chunked else head)

        def send(values: list[Any], end: str = "") -> None:
            data = ("".join(f"data: {json.dumps(value)}\n\n" for value in values) + end).encode()
            if data:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

        opened = range(len(completion.choices) if completion.chat else 0)
        send([completion.chunk(i, "", {"role": "assistant", "content": ""}) for i in opened])
        try:
            for chunks in self.follow(updates, completion):
                send(chunks)
            send([completion.whole()] if completion.asked.stream_usage else [], "data: [DONE]\n\n")
        except Refusal as refusal:  # the engine failed
            send([refusal.body()])
        if chunked:
            self.wfile.write(b"0\r\n\r\n")


ROUTES: dict[str, Callable[[Handler], None]] = {
    "/": Handler.get_page, "/report": Handler.get_report, "/health": Handler.get_health,
    "/config": Handler.get_config, "/metrics": Handler.get_metrics,
    "/v1/chat/completions": Handler.complete, "/v1/completions": Handler.complete,
    "/v1/models": Handler.get_models, "/v1/models/": Handler.get_models,  # and a name
}  # fmt: skip
# for clients whose base URL has no /v1
ROUTES |= {path[3:]: act for path, act in ROUTES.items() if path.startswith("/v1/")}
OPEN_PATHS = {"/", "/health", "/config"}  # no key needed: the page must load to ask for one


# 7. Export -----------------------------------------------------------------------------------

CHAT_TEMPLATE = """{{- bos_token -}}{%- set ns = namespace(system='') -%}
{%- for message in messages -%}{%- if message.role == 'system' -%}
{%- set ns.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- '<|user_start|>' + ns.system + message.content + '<|user_end|>' -}}
{%- set ns.system = '' -%}
{%- else -%}{{- '<|assistant_start|>' + message.content + '<|assistant_end|>' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def export(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write a model as a Hugging Face folder of the type nanochat.

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
    bos, end = (tokenizer.specials[name] for name in ("<|bos|>", "<|assistant_end|>"))
    write_json(folder / "config.json", {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "dtype": "float32",
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": 4 * c.n_embd,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.max_seq_len,
        "final_logit_softcapping": c.softcap, "hidden_act": "relu2", "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": bos, "eos_token_id": end,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {  # a base model ends where a new text begins
        "bos_token_id": bos, "eos_token_id": [end, bos], "do_sample": True,
    })  # fmt: skip
    write_safetensors(folder / "model.safetensors", export_weights(model))
    write_json(folder / "tokenizer.json", export_tokenizer(tokenizer))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.max_seq_len,
        "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def export_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights under the format's names.

    It rotates the other way, so the halves of each head of q and k change places.
    """
    c = model.config

    def swap_halves(weight: Tensor) -> Tensor:  # (heads * head_dim, C)
        return weight.view(-1, 2, c.head_dim // 2, c.n_embd).flip(1).reshape(weight.shape)

    weights = {"model.embed_tokens.weight": model.embed.weight[: c.vocab_size],
               "lm_head.weight": model.head.weight[: c.vocab_size]}  # fmt: skip
    for i, block in enumerate(model.blocks):
        attention: Any = block.attention
        mlp: Any = block.mlp
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in {
            "self_attn.q_proj": swap_halves(attention.q.weight),
            "self_attn.k_proj": swap_halves(attention.k.weight),
            "self_attn.v_proj": attention.v.weight, "self_attn.o_proj": attention.out.weight,
            "mlp.fc1": mlp.up.weight, "mlp.fc2": mlp.down.weight,
        }.items()}  # fmt: skip
    return {name: weight.detach().float().contiguous() for name, weight in weights.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write fp32 tensors: the header's length, the header as JSON, then their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.cpu().numpy().astype("<f4").tobytes())


def export_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer in the format of the `tokenizers` package: a character per byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spell(one: int) -> str:
        return "".join(characters[byte] for byte in tokenizer.decode_bytes([one]))

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **flags}
                         for name, i in tokenizer.specials.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE",
                  "vocab": {spell(i): i for i in range(256 + len(tokenizer.merges))},
                  "merges": [[spell(a), spell(b)] for a, b in tokenizer.merges]},
        "decoder": level,
    }  # fmt: skip


# 8. Main -------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Engine, str, list[str]]:
    """Load the model that the settings name into an engine; return it, the stage and openings."""
    model, tokenizer, folder = load_for_answers(settings)
    engine, stage = Engine(model, tokenizer, settings.slots), folder.parent.name

    def say(text: str) -> None:
        print(f"serve: {text}", flush=True)

    say(f"{stage} model of run {settings.tag}, {folder.name}, on {engine.device.type}")
    if len(engine.rows) < settings.slots:
        say(f"memory holds {len(engine.rows)} of {settings.slots} slots: more requests wait")
    # a small model on a CPU is fast enough that the minute of compiling is not earned back
    pays = engine.device.type == "cuda" or model.config.num_params() > 5e7
    choice = {"auto": "yes" if pays else "no"}.get(settings.compile, settings.compile)
    if compile_or_not(choice, 0, engine.device, say):
        engine.try_to_compile(say)
    return engine, stage, read_meta(folder).get("openings") or []


def addresses(host: str, port: int) -> list[str]:
    """Return where the page can be opened: for 0.0.0.0 here, and from other machines."""
    hosts = ["127.0.0.1"] if host in ("0.0.0.0", "::") else [host]
    if hosts != [host]:
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as way:
            way.connect(("192.0.2.1", 9))  # sends nothing: it looks up the way to other machines
            hosts.append(way.getsockname()[0])
    return [f"http://[{one}]:{port}" if ":" in one else f"http://{one}:{port}" for one in hosts]


def main(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers may end."""
    if settings.export:
        folder = Path(settings.export).expanduser()
        export(folder, *load_for_answers(settings)[:2])
        return print(f"written: {folder}")
    try:
        server = Server(settings)
    except OSError as error:
        raise Stop(f"serve: cannot listen on {settings.host}:{settings.port} ({error.strerror}): "
                   "take another --port or --host") from None  # fmt: skip
    ending = threading.Event()

    def end(*_: Any) -> None:
        # nobody is answered yet, and compiling may take minutes; or this is the second signal
        if server.model is None or ending.is_set():
            os._exit(0)
        ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        for address in addresses(settings.host, server.server_port):
            print(f"serve: {address}", flush=True)
        if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_key:
            print("serve: anyone who reaches this machine can use it: --api-key asks for a key")
        engine, stage, openings = load(settings)
        model = Model(engine, settings.tag, stage, settings.max_waiting, openings)
        server.model = model
        print("serve: ready; Ctrl-C ends", flush=True)
        ending.wait()
        server.draining = True
        if model.unfinished:
            print(f"serve: {model.unfinished} answers may end within {settings.drain_s:g} s; "
                  "Ctrl-C ends at once", flush=True)  # fmt: skip
        deadline = time.monotonic() + settings.drain_s
        while server.counts[IN_FLIGHT] and time.monotonic() < deadline:
            time.sleep(0.05)
        model.stop()
    finally:
        server.shutdown()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)


# 9. The page ---------------------------------------------------------------------------------


def read_page(path: str) -> str:
    """Return the page, or that of a file. Raises Refusal if it cannot be read."""
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
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanochat</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --bg: light-dark(#fff, #1c1c1a);
  --side: light-dark(#f5f5f3, #161615); --text: light-dark(#1d1d1b, #eceae4);
  --soft: light-dark(#63625d, #a5a39b); --line: light-dark(#dedcd6, #3a3936);
  --tint: light-dark(#efede8, #2c2b28); --accent: light-dark(#b4481e, #e08a5f);
  --bad: light-dark(#b3261e, #f2b8b5);
  --edge: 1px solid var(--line) }
* { box-sizing: border-box }
body { margin: 0; height: 100dvh; display: grid; grid-template: "side main" 1fr / 17rem 1fr;
  font: 1rem/1.55 system-ui, sans-serif; background: var(--bg); color: var(--text) }
button, input, textarea, header a { font: inherit; color: inherit; background: none;
  border: 1px solid transparent; border-radius: .6rem; padding: .35rem .6rem; min-height: 2.2rem;
  text-decoration: none }
button { cursor: pointer }
button:hover, header a:hover, li.now { background: var(--tint) }
button:disabled { opacity: .45; cursor: default }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.strong, .strong:hover { background: var(--accent); color: var(--bg) }
input, textarea { border: var(--edge); background: var(--bg); width: 100% }
nav { grid-area: side; background: var(--side); border-right: var(--edge); min-height: 0;
  display: flex; flex-direction: column; gap: .5rem; padding: .75rem }
nav ol { list-style: none; margin: 0; padding: 0; overflow-y: auto; flex: 1 }
nav li { display: flex; border-radius: .6rem }
li > button:first-child, h1 { flex: 1; text-align: left; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis }
li > button:not(:first-child) { color: var(--soft); padding: .35rem }
main { grid-area: main; display: flex; flex-direction: column; min-width: 0; min-height: 0 }
header { display: flex; align-items: center; gap: .5rem; padding: .5rem .75rem;
  border-bottom: var(--edge) }
h1 { font-size: 1rem; margin: 0 }
#menu, #notice:empty, [hidden] { display: none }
#log { flex: 1; overflow-y: auto; padding: 1rem }
#log > * { max-width: 46rem; margin: 0 auto 1.25rem }
.empty { text-align: center; color: var(--soft); padding-top: 18vh }
.empty button { border-color: var(--line); margin: .25rem; color: var(--text) }
.said { overflow-wrap: anywhere; white-space: pre-wrap }
.user > .said { background: var(--tint); border-radius: 1rem; padding: .6rem 1rem;
  margin-left: auto; width: fit-content; max-width: 85% }
.said > div + div { margin-top: .7rem }
.tools { display: flex; flex-wrap: wrap; align-items: center; font-size: .82rem;
  color: var(--soft); min-height: 2.2rem }
.user .tools { justify-content: flex-end }
.editing > .said, :invalid { outline: 2px solid var(--accent) }
.card, pre { border: var(--edge); border-radius: .6rem; background: var(--side);
  font: .9rem/1.7 ui-monospace, monospace; overflow-x: auto }
.card { width: fit-content; max-width: 100%; padding: .1rem .6rem; margin: .3rem 0 }
.card b { color: var(--accent) }
pre { padding: .75rem; position: relative; margin: .7rem 0 }
pre button { position: absolute; top: .2rem; right: .2rem; font: .8rem system-ui, sans-serif }
code { font-family: ui-monospace, monospace }
.trouble, #notice { color: var(--bad) }
#notice { margin: 0; padding: .5rem 1rem; border-bottom: var(--edge) }
form { padding: .5rem 1rem 1rem }
form > div { max-width: 46rem; margin: auto; display: flex; gap: .5rem; align-items: flex-end;
  border: var(--edge); border-radius: 1.2rem; padding: .4rem }
form > div:focus-within { border-color: var(--accent) }
form textarea, form textarea:focus-visible { border: 0; resize: none; max-height: 40vh;
  background: none; outline: none; field-sizing: content }
aside { inset: 0 0 0 auto; width: min(22rem, 100vw); height: 100dvh; background: var(--side);
  color: var(--text); border: 0; border-left: var(--edge); padding: 1rem }
aside label { display: block; margin: .75rem 0; font-size: .9rem; color: var(--soft) }
aside output { float: right }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@media (max-width: 720px) {
  body { grid-template: "main" 1fr / 1fr }
  nav { position: fixed; inset: 0 auto 0 0; width: min(20rem, 85vw); z-index: 2;
    box-shadow: 0 0 2rem #0003 }
  body:not(.open) nav { display: none }
  header { gap: .2rem; padding: .5rem .3rem }
  #menu { display: inline-block }
}
.writing::after { content: "\25CF" }
</style></head>
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
    <button id="export">Export</button>
    <a href="report" target="_blank">Report</a>
    <button popovertarget="drawer">Settings</button>
  </header>
  <p id="notice" role="alert"></p>
  <div id="log" role="log" aria-live="off" aria-label="Conversation" tabindex="0"></div>
  <form id="form"><div>
    <textarea id="text" rows="1" placeholder="Ask something" aria-label="Message"></textarea>
    <button id="send" class="strong">Send</button>
  </div></form>
  <p id="state" class="unseen" role="status"></p>
</main>
<aside id="drawer" aria-label="Settings" popover>
  <button popovertarget="drawer" aria-label="Close settings">Close</button>
  <label>Temperature <output></output>
    <input id="temperature" type="range" min="0" max="2" step="0.05"></label>
  <label>Top k (0: off) <input id="top_k" type="number" min="0" step="1" required></label>
  <label>Top p <output></output>
    <input id="top_p" type="range" min="0" max="1" step="0.05"></label>
  <label>Most tokens of an answer <input id="max_tokens" type="number" min="1" required></label>
  <label>System prompt <textarea id="system" rows="4"></textarea></label>
  <label>Key of this server <input id="key" type="password" autocomplete="off"></label>
  <button id="defaults">Back to the server's values</button>
</aside>
<script>
"use strict";
const $ = (id) => document.getElementById(id);
const STORE = "nanochat/", UNNAMED = "New chat", UNREACHED = "The server cannot be reached.";
const KNOBS = ["temperature", "top_k", "top_p", "max_tokens"];
const IDEAS = ["Who are you?", "What is 37 times 12?", "What is the capital of France?",
  "How many times is the letter r in strawberry?"];
let config = { defaults: {} }, options = {}, chats = []; // options: what the user has changed
let now = location.hash.slice(1), draft = "", editing = -1; // a chat's id; a message's index
const runs = new Map(), warnings = {}; // running answers by conversation id; notices by subject

function say(text) { $("state").textContent = text } // to screen readers
function warn(subject, text) {
  warnings[subject] = text;
  const all = Object.values(warnings).join(" ").trim();
  if ($("notice").textContent !== all) $("notice").textContent = all;
}
// Each conversation has its own key, so that tabs don't overwrite each other's.
function write(name, value) {
  let full = "";
  try {
    if (value) localStorage.setItem(STORE + name, JSON.stringify(value));
    else localStorage.removeItem(STORE + name);
  } catch { full = "This browser's storage is full: delete or export conversations." }
  warn("storage", full);
}
function save(c) { if (c.messages.length && chats.includes(c)) write(c.id, c) }
function load(key) {
  let id = key.slice(STORE.length), found = null;
  try { found = JSON.parse(localStorage.getItem(key)) } catch { /* not ours, or no storage */ }
  if (id === "options") options = found || {};
  else if (key.startsWith(STORE) && !runs.has(id)) {
    chats = chats.filter((c) => c.id !== id);
    if (found?.messages) chats.push(found);
    for (const m of found?.messages ?? []) // earlier versions stored an answer's parts alone
      if (typeof m.content !== "string")
        Object.assign(m, { parts: m.content, content: m.content.map((p) => p.text).join(" ") });
    chats.sort((a, b) => (a.id < b.id ? 1 : -1));
  }
}

// Elements are made of text alone: nothing that a person or a model writes becomes HTML.
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  made.append(...children.flat());
  return made;
}
// A button that calls ACTS[act](at, itself): what is redrawn needs no listeners of its own.
function button(text, act, at = "", more = {}) {
  return h("button", { type: "button", "data-act": act, "data-at": at, ...more }, text);
}
// Equal nodes stay, and with them the focus, a selected text, a button that is held down.
function redraw(box, made) {
  const focused = box.contains(document.activeElement);
  made.forEach((node, i) => {
    const old = box.childNodes[i];
    if (!old) box.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (box.childNodes.length > made.length) box.lastChild.remove();
  if (focused && !box.contains(document.activeElement)) box.focus({ preventScroll: true });
}
// Markdown: code blocks, and marks within a line; lists and tables stay as they are written.
const MARKS = new RegExp(["`([^`\\n]+)`", "\\*\\*([^*\\n]+)\\*\\*", "^#{1,6} +([^\\n]+)",
  "(?<!\\w)[*_]([^*_\\s](?:[^*_\\n]*[^*_\\s])?)[*_](?!\\w)",
  "\\[([^\\]\\n]+)\\]\\((https?:\\/\\/[^\\s)]+)\\)"].join("|"), "gm");
function inline(text) {
  const out = [];
  let last = 0;
  for (const m of text.matchAll(MARKS)) {
    out.push(text.slice(last, m.index));
    if (m[1]) out.push(h("code", {}, m[1]));
    else if (m[4]) out.push(h("em", {}, m[4]));
    else if (m[6]) out.push(h("a", { href: m[6], target: "_blank", rel: "noopener" }, m[5]));
    else out.push(h("strong", {}, m[2] || m[3]));
    last = m.index + m[0].length;
  }
  return [...out, text.slice(last)];
}
function markdown(text) { // every second piece is between fences
  return text.split(/^[ \t]*```[^\n]*\n?/m).flatMap((piece, i) => (i % 2
    ? h("pre", { tabindex: 0 }, button("Copy", "copy"), h("code", {}, piece.trimEnd()))
    : piece.split(/\n{2,}/).filter((p) => p.trim()).map((p) => h("div", {}, inline(p.trim())))));
}

// Conversations -------------------------------------------------------------------------------
const chat = (id = now) => chats.find((c) => c.id === id);
const running = (c = chat()) => runs.get(c.id);
function open(id) {
  menu(false);
  if (id === now && chat()) return;
  leave();
  now = id;
  history.replaceState(null, "", "#" + id);
  fill(); draw(); $("text").focus();
}
function begin() {
  const id = Date.now() + Math.random().toString(16).slice(2, 8);
  const blank = chats.find((c) => !c.messages.length);
  if (!blank) chats.unshift({ id, title: UNNAMED, messages: [] });
  open(blank ? blank.id : id);
}
function rename(id) {
  const c = chat(id), title = prompt("Name of this conversation", c.title);
  if (title) { c.title = title; save(c); follow(draw) }
}
function remove(id) {
  if (!confirm(`Delete "${chat(id).title}"?`)) return;
  running(chat(id))?.abort.abort();
  chats = chats.filter((c) => c.id !== id);
  write(id, null);
  home();
}
function home() { // a conversation that is gone gives way to the newest
  if (chat()) follow(draw);
  else if (chats.length) open(chats[0].id);
  else begin();
}
function drawList() {
  const wanted = $("find").value.toLowerCase();
  const fits = (c) => [c.title, ...c.messages.map((m) => m.content)].some((text) =>
    text.toLowerCase().includes(wanted));
  redraw($("chats"), chats.filter(fits).map(({ id, title }) => {
    const named = (what) => ({ title: what, "aria-label": `${what} ${title}` });
    return h("li", { class: id === now && "now" },
      button(title, "open", id, { "aria-current": id === now && "true" }),
      button("\u270e", "rename", id, named("Rename")),
      button("\u2715", "remove", id, named("Delete")));
  }));
}
function drawSaid(message) {
  if (message.role === "user") return [message.content];
  const out = [];
  for (const { type, text } of message.parts) {
    if (type === "text") out.push(...markdown(text));
    else if (type === "output") out.at(-1)?.append(h("b", {}, " = " + text));
    else out.push(h("div", { class: "card", role: "group", "aria-label": "calculator" }, text));
  }
  return out;
}
function drawMessage(message, at, { length }) {
  const mine = message.role === "user", run = running(), busy = run?.message === message;
  const last = at === length - 1, tools = h("div", { class: "tools" });
  const add = (name, act) => tools.append(button(name, act, at, { disabled: !!run }));
  if (mine && at === editing) add("Cancel", "cancel");
  else if (mine) add("Edit", "edit");
  else if (!busy) {
    tools.append(button("Copy", "copy", at));
    if (last) add(message.trouble ? "Try again" : "Regenerate", "again");
    if (message.note) tools.append(h("span", {}, message.note));
    if (message.trouble)
      tools.append(h("span", { class: "trouble", role: last && "alert" }, message.trouble));
  }
  return h("article", { class: message.role + (at === editing ? " editing" : ""),
    "aria-label": mine ? "You" : "Answer", "aria-busy": busy && "true" },
    h("div", { class: "said" + (busy ? " writing" : "") }, drawSaid(message)), tools);
}
function draw() {
  const { title, messages } = chat();
  const ideas = config.completes ? config.openings : IDEAS;
  const hello = config.model ? `This is ${config.model}. What would you like to know?` : "Hello!";
  drawList();
  $("title").textContent = title;
  redraw($("log"), messages.length ? messages.map(drawMessage) : [h("div", { class: "empty" },
    h("p", {}, hello), ideas.map((idea) => button(idea, "ask", idea)))]);
  $("send").textContent = running() ? "Stop" : "Send";
  $("log").scrollTop = $("log").scrollHeight;
}
function follow(change) { // a reader who has scrolled up stays there
  const log = $("log"), top = log.scrollTop, near = log.scrollHeight - top - log.clientHeight < 80;
  change();
  log.scrollTop = near ? log.scrollHeight : top;
}

// Asking --------------------------------------------------------------------------------------
function ask(text) {
  const c = chat();
  if (running() || !text.trim()) return;
  const replaced = editing < 0 ? [] : c.messages.splice(editing);
  if (editing < 0 && text === draft) draft = "";
  editing = -1;
  if (c.title === UNNAMED) c.title = text.trim().slice(0, 60);
  c.messages.push({ role: "user", content: text });
  fill(); answer(c, replaced);
}
function again() {
  const c = chat();
  answer(c, c.messages.splice(c.messages.findLastIndex((m) => m.role === "user") + 1));
}
function edit(at) { leave(); editing = Number(at); fill(); follow(draw); $("text").focus() }
function cancel() { editing = -1; fill(); follow(draw); $("text").focus() }
function leave() { // an edit that is interrupted becomes a draft: nothing typed is lost
  const text = $("text").value;
  if (editing >= 0 && chat()?.messages[editing]?.content !== text) keepDraft(text);
  editing = -1;
}
function keepDraft(text) { draft = draft ? `${draft}\n${text}` : text }
function fill() { $("text").value = chat()?.messages[editing]?.content ?? draft }

// What an answer replaces is kept, and stays stored, until something of the answer arrives.
async function answer(c, replaced) {
  const [body, lost] = requestBody(c.messages), began = performance.now();
  const message = { role: "assistant", content: "", parts: [] };
  const abort = new AbortController(), { signal } = abort;
  c.messages.push(message);
  runs.set(c.id, { abort, message });
  if (!replaced.length) save(c);
  draw(); say("Answering");
  let usage = {}, reason = "", frame = 0;
  try {
    const response = await fetch(config.completes ? "v1/completions" : "v1/chat/completions",
      { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      for (const { delta, text, finish_reason } of event.choices) {
        add(message, delta ?? { content: text, part: { type: "text", text } });
        reason = finish_reason || reason;
      }
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        if (chat() === c) follow(() => redraw($("log").lastChild.firstChild, drawSaid(message)));
      });
    }
    if (!reason) throw new Error("The server ended before the answer did.");
    message.note = note(usage, reason, (performance.now() - began) / 1000, lost);
  } catch (error) {
    if (signal.aborted) message.note = "stopped";
    else {
      message.trouble = error instanceof TypeError ? UNREACHED : error.message;
      configure(); // it may be gone, and come back as another
    }
  }
  cancelAnimationFrame(frame);
  runs.delete(c.id);
  if (replaced.length && !message.parts.length) {
    const [{ role, content }] = c.messages.splice(-2, 2, ...replaced);
    if (replaced[0].role === "user") { keepDraft(content); fill() }
    else c.messages.splice(-1, 0, { role, content });
    c.messages.at(-1).trouble = message.trouble;
  }
  save(c);
  if (chat() === c) follow(draw);
  const said = chat() === c && message.content; // is read out
  say(message.trouble || (signal.aborted ? "Stopped" : said || "Answered"));
}
function add(message, { content = "", part }) {
  message.content += content;
  const last = message.parts.at(-1);
  if (last && last.type === part?.type) last.text += part.text;
  else if (part?.text) message.parts.push({ ...part });
}
function note({ completion_tokens, total_tokens, forgotten_messages = 0 }, reason, seconds, lost) {
  const full = total_tokens < config.context ? "cut at the limit of tokens" : "the context is full";
  const forgotten = lost + forgotten_messages;
  return `${completion_tokens} tokens, ${(completion_tokens / seconds).toFixed(0)} a second, `
    + (reason === "length" ? full : "finished")
    + (forgotten ? `; oldest ${forgotten} messages forgotten` : "");
}
function requestBody(messages) { // and how many messages it leaves out
  const body = { stream: true, stream_options: { include_usage: true } };
  for (const knob of KNOBS) body[knob] = options[knob]; // undefined: the server's default
  if (config.completes) return [{ ...body, prompt: messages.at(-1).content }, 0];
  const { max_chars, max_messages } = config.limits ?? {};
  const head = options.system ? [{ role: "system", content: options.system }] : [];
  const all = messages.filter((m) => m.content), said = all.slice(1 - max_messages);
  const size = () => [...head, ...said].reduce((n, m) => n + m.content.length, 0);
  while (said.length > 1 && size() > max_chars) said.shift();
  const sent = said.map(({ role, content, parts }) => ({ role, content, parts }));
  return [{ ...body, messages: [...head, ...sent], truncation: "auto" }, all.length - said.length];
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
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.replace(/^data: /, ""));
    }
  }
}
async function refusal(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status === 429) return "Many people are asking right now. Wait a moment.";
  if (response.status === 401) {
    $("drawer").showPopover();
    $("key").focus();
    return "This server wants its key: give it in the settings.";
  }
  const long = error.code === "context_length_exceeded" ? "This message is too long. " : "";
  return long + (error.message || `The server answered ${response.status}.`);
}
function headers() {
  const key = options.key || "";
  if (/[^\x20-\xff]/.test(key)) throw new Error("The key in the settings has odd characters.");
  return { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) };
}

// Controls ------------------------------------------------------------------------------------
const ACTS = { ask, again, edit, cancel, open, rename, remove, copy };
async function copy(at, target) {
  const text = at ? chat().messages[at].content : target.nextSibling.textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text) }
  catch { // over HTTP from another machine there is only the old way
    const area = h("textarea", { class: "unseen" }, text);
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    target.focus();
  }
  target.textContent = done ? "Copied" : "Not copied";
  say(target.textContent);
}
function menu(shown) {
  document.body.classList.toggle("open", shown);
  $("menu").setAttribute("aria-expanded", shown);
}
function settle() { // shows the settings
  for (const name of [...KNOBS, "system", "key"]) {
    const output = $(name).parentElement.querySelector("output");
    $(name).value = options[name] ?? config.defaults[name] ?? "";
    if (output) output.textContent = $(name).value;
  }
}
let retry = 0;
async function configure() {
  let missing = UNREACHED;
  try {
    config = await (await fetch("config")).json();
    missing = config.model ? "" : "The server is loading its model.";
  } catch { /* it is asked again */ }
  warn("server", missing);
  clearTimeout(retry);
  if (missing) retry = setTimeout(configure, 2000);
  else { settle(); follow(draw) }
}
function stop() { running()?.abort.abort() }
$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running()) stop(); else ask($("text").value);
};
$("text").oninput = () => { if (editing < 0) draft = $("text").value };
$("text").onkeydown = (event) => {
  // 229: Safari's, of the key that ends a composition
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  ask($("text").value);
};
$("new").onclick = begin;
$("find").oninput = drawList;
$("menu").onclick = () => menu(!document.body.classList.contains("open"));
$("drawer").oninput = ({ target: { id, value } }) => {
  if (!$(id).checkValidity()) return;
  options[id] = KNOBS.includes(id) ? Number(value) : value;
  write("options", options);
  if (id.startsWith("t")) settle();
};
$("defaults").onclick = () => {
  for (const name of [...KNOBS, "system"]) delete options[name];
  write("options", options); settle(); say("The settings are the server's");
};
$("export").onclick = () => { // as Markdown
  const { title, messages } = chat(), who = { user: "You", assistant: "Answer" };
  const text = [`# ${title}\n`, ...messages.map((m) => `**${who[m.role]}:** ${m.content}\n`)];
  const href = URL.createObjectURL(new Blob([text.join("\n")]));
  h("a", { download: `${title.replace(/[^\w-]+/g, "-")}.md`, href }).click();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing || event.target === $("find")) return;
  if (document.body.classList.contains("open")) { menu(false); $("menu").focus() }
  else if ($("drawer").matches(":popover-open")) return; // the browser closes it
  else if (editing >= 0) cancel();
  else stop();
};
document.addEventListener("click", ({ target }) => { // a click beside the list closes it first
  if (!target.closest("nav, #menu")) menu(false);
  if (target.dataset.act) ACTS[target.dataset.act](target.dataset.at, target);
}, true);
addEventListener("storage", ({ key }) => { // another tab has written
  const was = chat()?.messages[editing]?.content;
  load(key || "");
  if (chat()?.messages[editing]?.content !== was) { leave(); fill() }
  settle(); home();
});
addEventListener("pagehide", () => chats.filter(running).forEach((c) =>
  running(c).message.content && save(c)));
try { Object.keys(localStorage).forEach(load) } catch { /* this browser keeps nothing */ }
settle(); home(); configure();
</script></body></html>
"""

if __name__ == "__main__":
    with one_sentence("serve"):
        main(parse_settings(Settings, __doc__))
