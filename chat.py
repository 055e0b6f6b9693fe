"""Talk to a model in the terminal. A base model completes the text that it is given.

Usage:   python chat.py                                     # the newest of rl, sft, mid, base
         python chat.py -p "What is 37 times 12?"           # one answer, its tool calls shown
         printf 'Hi!\\nWho are you?\\n' | python chat.py      # piped: a turn a line
         python chat.py -i base -p "The capital of France is" -t 0
Reads:   runs/TAG/{tokenizer,STAGE}/; in a terminal also, and writes, chat_history
Keys:    Ctrl-C stops an answer, Ctrl-D ends; /help lists the commands
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common import (
    STAGES,
    Engine,
    Sampling,
    Stop,
    base_dir,
    check_name,
    load_for_answers,
    newest_turns,
    one_sentence,
    parse_settings,
    prompt_room,
    setting,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    stage: str = setting(
        "", f"which model of the run; empty = the last of {', '.join(STAGES)}", "i", ("", *STAGES)
    )
    tag: str = setting("main", "name of the run, a folder below runs/")
    step: int = setting(0, "checkpoint to load; 0 = the newest")
    prompt: str = setting("", "answer this one text and end", short="p")
    system: str = setting("", "what a chat's first message begins with: who the model is to be")
    temperature: float = setting(0.6, "0 = always the likeliest token", short="t")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 = all", short="k")
    top_p: float = setting(1.0, "sample among the likeliest tokens of this total probability")
    max_tokens: int = setting(256, "tokens of an answer at most")
    seed: int = setting(0, "of the sampling; each further answer takes the next one")
    device: str = setting("", "cuda, xpu, mps or cpu; empty = the best present")
    dtype: str = setting(
        "",
        "of activations; empty = bfloat16 or float16 where fast",
        choices=("", "float32", "bfloat16", "float16"),
    )
    int8: bool = setting(False, "products of 8 bits: less memory, on a CPU sooner answers")

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        self.sampling(0)  # raises for values out of range

    def sampling(self, turn: int) -> Sampling:
        """Return the sampling of the answer number `turn`."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed + turn)


# 2. Conversation -----------------------------------------------------------------------------


class Conversation:
    """What was said so far, and the engine that answers; a base model completes the last text."""

    def __init__(self, engine: Engine, stage: str, settings: Settings):
        self.engine, self.settings, self.completes = engine, settings, stage == "base"
        system = settings.system
        self.head = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self.answers = 0

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """Return the pieces (type, text) of the answer. Raises ValueError if text is too long."""
        text = text.encode("utf-8", "replace").decode()  # half a character becomes "?"
        asked = [*self.messages, {"role": "user", "content": text}]
        self.messages = asked if self.completes else self._fit(asked)
        return self._answer(text)

    def again(self) -> Iterator[tuple[str, str]]:
        """Answer the last message once more, by other chances. Raises ValueError if none is."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return self.ask(last["content"])
        raise ValueError("nothing has been said that could be answered again")

    def _fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Forget the oldest turns, saying so, until a quarter of the context is left to answer."""
        tokenizer, context = self.engine.tokenizer, self.engine.model.config.max_seq_len
        kept, prompt_ids = newest_turns(tokenizer, self.head + messages, context)
        kept, size, room = kept[len(self.head) :], len(prompt_ids), prompt_room(context)
        if size > room:
            what = "it and the system prompt have" if self.head else "it has"
            raise ValueError(f"too long: {what} {size} tokens, this model reads {room} at most")
        if forgotten := (len(messages) - len(kept)) // 2:
            note(f"the context of {context} tokens is full: oldest turns forgotten: {forgotten}")
        return kept

    def _answer(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield the pieces of an answer; what came of it until it is ended is what was said."""
        sampling = self.settings.sampling(self.answers)
        self.answers += 1
        if self.completes:
            texts = itertools.chain([text], self.engine.complete(text, sampling))
            pieces: Iterator[tuple[str, str]] = zip(itertools.repeat("text"), texts)
        else:
            pieces = self.engine.stream_reply(self.head + self.messages, sampling)
        parts: list[dict[str, str]] = []
        self.messages.append({"role": "assistant", "content": parts})
        try:
            for kind, piece in pieces:
                if not parts or parts[-1]["type"] != kind:
                    parts.append({"type": kind, "text": ""})
                parts[-1]["text"] += piece
                yield kind, piece
        finally:
            if parts and parts[-1]["type"] == "python":  # a call that got no result
                parts.pop()


# 3. Terminal ---------------------------------------------------------------------------------

# A model's control characters must not drive the terminal: they are shown as signs.
HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys([*range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
COMMANDS = {
    "/reset": "forget what was said and begin anew",
    "/regen": "answer the last message once more",
    "/quit": "end, as Ctrl-D does",
    "/help": "list these commands",
}


def note(text: str) -> None:
    """Say something beside the conversation."""
    print(f"({text})", file=sys.stderr, flush=True)


def show(pieces: Iterable[tuple[str, str]], dim: bool = False) -> Iterator[str]:
    """Turn the pieces of an answer into what is printed: a call of the tool as [37*12 = 444]."""
    on, off = ("\x1b[2m", "\x1b[0m") if dim else ("", "")
    last, end = "text", "\n"  # the type of what was printed last; its last character
    for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        texts = (text.translate(HARMLESS) for _, text in group)
        if kind == "text":
            for text in texts:
                yield " " + text if end == "]" and text[:1].isalnum() else text
                end = text[-1:] or end
        else:
            call = "".join(texts)
            call = f" = {call}]" if kind == "output" else call
            if kind == "python" or last != "python":
                call = f"[{call}" if end.isspace() else f" [{call}"
            yield f"{on}{call}{off}"
            end = call[-1]
        last = kind


def read_terminal() -> Iterator[str]:
    """Yield typed lines until Ctrl-D, or Ctrl-C twice; keep them in a file for the owner alone."""
    path = base_dir() / "chat_history"
    with contextlib.suppress(ImportError, OSError):  # no line editor, or no file: do without
        import readline

        readline.set_history_length(1000)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
    interrupted = False
    try:
        while True:
            try:
                yield input("> ")
                interrupted = False
            except (EOFError, KeyboardInterrupt) as ending:
                print(file=sys.stderr)
                if interrupted or isinstance(ending, EOFError):
                    return
                note("Ctrl-C once more ends, as Ctrl-D and /quit do")
                interrupted = True
    finally:
        with contextlib.suppress(KeyError, OSError):
            sys.modules["readline"].write_history_file(path)


def respond(line: str, talk: Conversation, typed: bool) -> None:
    """Do what a line asks: a command, or else print the answer as it comes.

    Ctrl-C ends an answer and, where nobody types, the program.
    """
    word = line.strip()
    if word == "/help":
        return note("; ".join(f"{name}: {what}" for name, what in COMMANDS.items()))
    if word == "/reset":
        talk.messages.clear()
        return note("what was said is forgotten")
    if word.startswith("/") and word not in COMMANDS and not talk.completes:
        return note(f"{word.split()[0]} is no command; there are {', '.join(COMMANDS)}")
    try:
        say(talk.again() if word == "/regen" else talk.ask(line))
    except ValueError as error:
        note(str(error))
    except KeyboardInterrupt:
        if not typed:
            raise
        print(flush=True)


def say(pieces: Iterator[tuple[str, str]]) -> None:
    """Print an answer as it comes."""
    with contextlib.closing(pieces):  # type: ignore[type-var]
        for text in show(pieces, sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            print(text, end="", flush=True)
    print(flush=True)


# 9. Main -------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Engine, str]:
    """Load the model that the settings name, into an engine of one slot; say which one it is."""
    model, tokenizer, folder = load_for_answers(settings)
    engine, stage = Engine(model, tokenizer, slots=1), folder.parent.name
    note(f"{stage} model of run {settings.tag}, {folder.name}, on {engine.device.type}")
    return engine, stage


def main(settings: Settings) -> None:
    """Load a model and answer until nothing more is asked."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes or characters foreign to the locale
    engine, stage = load(settings)
    if stage == "base" and settings.system:
        raise Stop("--system is for a model that chats; -i base completes a text as it is")
    talk = Conversation(engine, stage, settings)
    if settings.prompt:
        try:
            return say(talk.ask(settings.prompt))
        except ValueError as error:
            raise Stop(str(error)) from None
    typed = sys.stdin.isatty()
    if typed:
        what = "a text to complete" if talk.completes else "a message"
        note(f"type {what}, or /help")
    for line in read_terminal() if typed else sys.stdin:
        line = line.rstrip("\r\n")
        if line.strip() == "/quit":
            return
        if line.strip():
            respond(line, talk, typed)


if __name__ == "__main__":
    with one_sentence("chat"):
        try:
            main(parse_settings(Settings, __doc__))
        except BrokenPipeError:  # whoever read has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
