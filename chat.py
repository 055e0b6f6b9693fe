"""Talk to a model in the terminal. A base model completes the text that it is given.

Usage:   python chat.py -i base                             # a line of text, its continuation
         python chat.py -i base -p "The capital of France is" -t 0
         echo "Once upon a time" | python chat.py -i base   # piped: a completion a line
Reads:   runs/TAG/{tokenizer,STAGE}/                        # train_tokenizer.py, pretrain.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common import (
    Engine,
    Sampling,
    Tokenizer,
    check_name,
    find_checkpoint,
    load_model,
    one_sentence,
    parse_settings,
    pick_device,
    pick_dtype,
    run_dir,
    setting,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    stage: str = setting("base", "which model of the run", short="i", choices=("base",))
    tag: str = setting("main", "name of the run, a folder below runs/")
    step: int = setting(0, "checkpoint to load; 0 = the newest")
    prompt: str = setting("", "answer this one text and end", short="p")
    temperature: float = setting(0.6, "0 = always the likeliest token", short="t")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 = all", short="k")
    top_p: float = setting(1.0, "sample among the likeliest tokens of this total probability")
    max_tokens: int = setting(128, "tokens of an answer at most")
    seed: int = setting(0, "of the sampling; each further answer takes the next one")
    device: str = setting("", "cuda, mps or cpu; empty = the best present")
    dtype: str = setting(
        "", "of activations; empty = bfloat16 where fast", choices=("", "float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        self.sampling(0)  # raises for values out of range

    def sampling(self, turn: int) -> Sampling:
        """Return the sampling of the answer number `turn`."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed + turn)


# 2. Conversation -----------------------------------------------------------------------------


def read_prompts(settings: Settings) -> Iterator[str]:
    """Yield the one prompt of -p, or lines from the terminal or a pipe until their end."""
    if settings.prompt:
        yield settings.prompt
        return
    if not sys.stdin.isatty():
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
        return
    import readline  # noqa: F401  gives input() its history and editing

    print("Type the beginning of a text; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        yield line


def print_pieces(pieces: Iterable[str]) -> None:
    """Print pieces as they come; Ctrl-C ends the answer, not the program."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Load a model and answer prompts until there are no more."""
    folder = find_checkpoint(settings.tag, settings.stage, settings.step)
    tokenizer = Tokenizer.load(run_dir(settings.tag) / "tokenizer")
    device = pick_device(settings.device)
    engine = Engine(load_model(folder, device, pick_dtype(device, settings.dtype)), tokenizer)
    if not settings.prompt:
        print(f"{folder} on {device}", file=sys.stderr)
    for turn, prompt in enumerate(read_prompts(settings)):
        print(prompt, end="", flush=True)
        print_pieces(engine.complete(prompt, settings.sampling(turn)))


if __name__ == "__main__":
    with one_sentence("chat"):
        main(parse_settings(Settings, __doc__))
