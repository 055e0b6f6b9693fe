"""Talk to a model in the terminal; a base model completes the text that it is given.

Usage:   python chat.py                                     # the newest of rl, sft, mid, base
         python chat.py -p "What is 37 times 12?"           # one answer, its tool calls shown
         printf 'Hi!\\nWho are you?\\n' | python chat.py      # piped: a turn a line
         python chat.py -i base -p "The capital of France is" -t 0
Reads:   runs/TAG/{tokenizer,STAGE}/; in a terminal also, and writes, chat_history
Keys:    Ctrl-C stops an answer, Ctrl-D ends the program, /help lists the commands
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common import (
    Engine,
    ModelSettings,
    Sampling,
    Stop,
    base_dir,
    load_for_answers,
    newest_turns,
    one_sentence,
    parse_settings,
    prompt_room,
    read_meta,
    render_call,
    setting,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings(ModelSettings):
    prompt: str = setting("", "answer this one message and exit", short="p")
    system: str = setting("", "system prompt; the first message begins with it")
    temperature: float = setting(0.6, "0: always the likeliest token", short="t")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0: all", short="k")
    top_p: float = setting(1.0, "sample among the likeliest tokens of this total probability")
    max_tokens: int = setting(256, "tokens of an answer at most")
    seed: int = setting(0, "seed of the first answer's sampling; each further answer adds 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling(0)  # raises for values out of range

    def sampling(self, turn: int) -> Sampling:
        """Return the sampling of answer number `turn`."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed + turn)


# 2. Conversation -----------------------------------------------------------------------------

Pieces = Generator[tuple[str, str], None, None]  # (type of part, text) in the order of writing


class Conversation:
    """The messages so far and the engine that answers; a base model completes the last text.

    ask and again return an answer's pieces (type, text) as they come. An answer that is not read to
    its end is remembered as far as it was read.
    """

    def __init__(self, engine: Engine, stage: str, settings: Settings):
        self.engine, self.settings, self.completes = engine, settings, stage == "base"
        self.head = [{"role": "system", "content": settings.system}] if settings.system else []
        self.messages: list[dict[str, Any]] = []
        self.answers = 0

    def ask(self, text: str) -> Pieces:
        """Answer a message. Raises ValueError if it is too long for the context."""
        text = text.encode("utf-8", "replace").decode()  # half a character becomes "?"
        asked = [*self.messages, {"role": "user", "content": text}]
        self.messages = asked if self.completes else self._fit(asked)
        sampling = self.settings.sampling(self.answers)
        self.answers += 1
        if not self.completes:
            return self._remember(self.engine.stream_reply(self.head + self.messages, sampling))
        texts = itertools.chain([text], self.engine.complete(text, sampling))
        return self._remember(("text", piece) for piece in texts)

    def again(self) -> Pieces:
        """Answer the last message again with the next seed. Raises ValueError if there is none."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return self.ask(last["content"])
        raise ValueError("nothing has been said that could be answered again")

    def _fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Drop the oldest turns, with a note, until a quarter of the context is left to answer."""
        context = self.engine.model.config.max_seq_len
        kept, prompt_ids = newest_turns(self.engine.tokenizer, self.head + messages, context)
        size, room = len(prompt_ids), prompt_room(context)
        if size > room:
            what = "it and the system prompt have" if self.head else "it has"
            raise ValueError(f"too long: {what} {size} tokens, this model reads {room} at most")
        kept = kept[len(self.head) :]
        if forgotten := (len(messages) - len(kept)) // 2:
            note(f"the context of {context} tokens is full: oldest turns forgotten: {forgotten}")
        return kept

    def _remember(self, pieces: Iterator[tuple[str, str]]) -> Pieces:
        parts: list[dict[str, str]] = []
        self.messages.append({"role": "assistant", "content": parts})
        try:
            for kind, piece in pieces:
                if not parts or parts[-1]["type"] != kind:
                    parts.append({"type": kind, "text": ""})
                parts[-1]["text"] += piece
                yield kind, piece
        finally:
            if parts and parts[-1]["type"] == "python":  # a call without its output
                parts.pop()


# 3. Terminal ---------------------------------------------------------------------------------

# A model's control characters must not control the terminal: they are printed as symbols.
HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys([*range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
COMMANDS = {
    "/reset": "forget the conversation",
    "/regen": "answer the last message again",
    '"""': "begin and end a message of several lines",
    "/quit": "exit, as Ctrl-D does",
    "/help": "list these commands",
}


ENDED = re.compile(r'\s*""".*"""\s*', re.DOTALL)  # a message of several lines, whole


def note(text: str) -> None:
    """Print a remark about the conversation to stderr."""
    print(f"({text})", file=sys.stderr, flush=True)


def show(pieces: Iterable[tuple[str, str]], dim: bool = False) -> Iterator[str]:
    """Yield what is printed for an answer's pieces: text as it comes, a tool call when complete."""
    on, off = ("\x1b[2m", "\x1b[0m") if dim else ("", "")
    expression: str | None = None  # of a call without its output
    end = "\n"  # the last character printed
    all_pieces = itertools.chain(pieces, [("text", "")])  # after which no call is incomplete
    for kind, group in itertools.groupby(all_pieces, key=lambda piece: piece[0]):
        texts = (text.translate(HARMLESS) for _, text in group)
        if kind == "python":
            expression = "".join(texts)
            continue
        if kind == "output" or expression is not None:
            call = render_call(expression or "", "".join(texts) if kind == "output" else None)
            yield f"{'' if end.isspace() else ' '}{on}{call}{off}"
            expression, end = None, "]"
        for text in filter(None, texts):
            yield " " + text if end == "]" and text[0].isalnum() else text
            end = text[-1]


def read_terminal() -> Iterator[str]:
    """Yield typed messages until Ctrl-D, or Ctrl-C twice; save them in a file of mode 600.

    A message is a line, lines that are pasted at once, or those between two triple quotes.
    """
    path = base_dir() / "chat_history"
    with contextlib.suppress(ImportError, OSError):  # no line editor, or no file: go on without
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(1000)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
    interrupted = False
    try:
        while True:
            try:
                text = input("> ")
                while text.lstrip().startswith('"""') and not ENDED.fullmatch(text):
                    text += "\n" + input("... ")
                yield text.strip()[3:-3] if ENDED.fullmatch(text) else text
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
    """Run a command, or print the answer to a message.

    Ctrl-C ends the answer and, unless the line was typed, the program.
    """
    word = line.strip()
    if word == "/help":
        return note("; ".join(f"{name}: {what}" for name, what in COMMANDS.items()))
    if word == "/reset":
        talk.messages.clear()
        return note("the conversation is forgotten")
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


def say(pieces: Pieces) -> None:
    """Print an answer as it comes."""
    with contextlib.closing(pieces):
        for text in show(pieces, sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            print(text, end="", flush=True)
    print(flush=True)


# 9. Main -------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Engine, str, str]:
    """Load the model into an engine of one slot, and print which one it is.

    Returns its stage and an opening that it may complete.
    """
    model, tokenizer, folder = load_for_answers(settings)
    engine, stage = Engine(model, tokenizer, slots=1), folder.parent.name
    note(f"{stage} model of run {settings.tag}, {folder.name}, on {engine.device.type}")
    return engine, stage, (read_meta(folder).get("openings") or ["The"])[0]


def main(settings: Settings) -> None:
    """Load a model and answer --prompt, or every line of stdin."""
    engine, stage, opening = load(settings)
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
        what = f"a text to complete, such as {opening!r}" if talk.completes else "a message"
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
        except BrokenPipeError:  # the reader, such as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
