"""Train the tokenizer: byte-level BPE on the text that prepare.py made.

Usage:   python train_tokenizer.py                          # vocabulary 65,536, or less on little text
         python train_tokenizer.py --vocab-size=4096 --tag=small
Reads:   data/SOURCE/train-*.parquet                        # prepare.py
Writes:  runs/TAG/tokenizer/tokenizer.json                  # readable: pattern, specials, merges
Method:  BPE (arXiv:1508.07909) over bytes, trained in Rust (tokenizer.rs), run by tiktoken
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nanochat_bpe
import tiktoken

from common import (
    SPECIAL_TOKENS,
    MissingInput,
    Stop,
    Tokenizer,
    check_name,
    format_count,
    list_shards,
    one_sentence,
    parse_settings,
    prepared_sources,
    read_texts,
    run_dir,
    setting,
    text_key,
)

# 1. Settings ---------------------------------------------------------------------------------


@dataclass
class Settings:
    tag: str = setting("main", "name of the run, a folder below runs/")
    source: str = setting("", "folder below data/ with the text; empty = the only one there")
    vocab_size: int = setting(65536, "ids, special tokens included; less where text is short")
    max_chars: int = setting(2_000_000_000, "characters of text to train on")
    doc_cap: int = setting(10_000, "characters of one document to train on; 0 = all")
    threads: int = setting(0, "threads that count words; 0 = all cores")
    restart: bool = setting(False, "train again although the run has a tokenizer")

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        least = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < least:
            raise ValueError(f"--vocab-size={self.vocab_size} must be {least} or more")
        if self.max_chars < 1 or self.doc_cap < 0 or self.threads < 0:
            raise ValueError("--max-chars must be 1 or more, --doc-cap and --threads 0 or more")


# 2. Text -------------------------------------------------------------------------------------


def find_source(source: str) -> str:
    """Return the data source to use: the named one, or the only one that is prepared."""
    if source:
        return source
    found = prepared_sources()
    if len(found) == 1:
        return found[0]
    if not found:
        raise MissingInput("no text is prepared: run `python prepare.py` first")
    raise MissingInput(f"several texts are prepared: choose --source={'|'.join(found)}")


def texts_up_to(source: str, max_chars: int, doc_cap: int) -> Iterator[str]:
    """Yield documents, each cut to doc_cap characters, until max_chars are out."""
    left = max_chars
    for path in list_shards(source, "train"):
        for text in read_texts(path):
            text = text[: min(doc_cap or len(text), left)]
            left -= len(text)
            yield text
            if left <= 0:
                return


CHARS_PER_ID = 500


def fit_vocab_size(wanted: int, num_chars: int) -> int:
    """Return the vocabulary that num_chars characters can fill: a token per 500, 512 at least.

    A rarer token is seen too seldom to be learned; the result is a multiple of 64.
    """
    return min(wanted, max(512, num_chars // CHARS_PER_ID // 64 * 64))


# 3. Evaluation -------------------------------------------------------------------------------


def evaluate_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Measure compression, one thread's encoding rate, and coverage; raise Stop if it loses text.

    Coverage: each of the 256 bytes has its token, so any byte string can be written, and every
    text comes back unchanged.
    """
    start = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    seconds = time.perf_counter() - start
    lost = [b for b in range(256) if tokenizer.encoding.encode_single_token(bytes([b])) != b]
    lost_texts = [t for t in texts if tokenizer.decode_bytes(tokenizer.encode(t)) != t.encode()]
    if lost or lost_texts:
        raise Stop(f"the tokenizer loses bytes {lost} and texts {lost_texts[:1]}: report this")
    return {
        "chars_per_token": sum(map(len, texts)) / tokens,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / tokens,
        "encode_tokens_per_s": tokens / seconds,
    }


def compare_encodings(texts: list[str]) -> dict[str, float]:
    """Return bytes per token of GPT-2's and GPT-4's encodings, where tiktoken has them at hand.

    Their files are looked for in tiktoken's cache folder only: nothing is fetched.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    host = "https://openaipublic.blob.core.windows.net"
    gpt2 = f"{host}/gpt-2/encodings/main"
    wanted = {
        "gpt2": [f"{gpt2}/vocab.bpe", f"{gpt2}/encoder.json"],
        "cl100k_base": [f"{host}/encodings/cl100k_base.tiktoken"],
    }
    found = {}
    for name, urls in wanted.items():
        keys = [hashlib.sha1(url.encode()).hexdigest() for url in urls]
        if all((Path(folder) / key).exists() for key in keys):
            tokens = sum(len(tiktoken.get_encoding(name).encode_ordinary(t)) for t in texts)
            found[name] = sum(len(text.encode()) for text in texts) / tokens
    return found


# 9. Main -------------------------------------------------------------------------------------


def main(settings: Settings) -> dict[str, float]:
    """Train, evaluate and save the tokenizer; return its measures."""
    folder = run_dir(settings.tag) / "tokenizer"
    source = find_source(settings.source)
    text = text_key(source)
    # threads and restart change no merge
    asked = {**asdict(settings), "source": source, "threads": 0, "restart": False}
    if (folder / "tokenizer.json").exists() and not settings.restart:
        have = Tokenizer.load(folder)
        if have.info["settings"] == asked:
            print(f"tokenizer: {folder} is there, {have.vocab_size:,} ids")
            if text and have.info.get("text", text) != text:
                print("tokenizer: the text has changed since this tokenizer was made: it stays; "
                      "--restart makes it anew")  # fmt: skip
            return have.info["measures"]
        raise MissingInput(
            f"{folder} was trained with other settings ({have.info['settings']}): use another "
            "--tag, or --restart to replace it"
        )
    # whether the text is too short for the vocabulary shows after as much as fills it
    enough = min(settings.max_chars, (settings.vocab_size + 64) * CHARS_PER_ID)
    seen = sum(map(len, texts_up_to(source, enough, settings.doc_cap)))
    vocab_size = fit_vocab_size(settings.vocab_size, seen)
    if vocab_size < settings.vocab_size:
        print(
            f"tokenizer: {vocab_size:,} ids instead of {settings.vocab_size:,}: the text is short"
        )
    num_chars = 0

    def counted() -> Iterator[str]:
        nonlocal num_chars
        for text in texts_up_to(source, settings.max_chars, settings.doc_cap):
            num_chars += len(text)
            yield text

    start = time.perf_counter()
    merges = nanochat_bpe.train(counted(), vocab_size - len(SPECIAL_TOKENS), settings.threads)
    seconds = time.perf_counter() - start
    rate = num_chars / seconds
    print(
        f"tokenizer: {format_count(num_chars)} characters in {seconds:.1f} s, {rate / 1e6:.1f} M/s"
    )
    tokenizer = Tokenizer(nanochat_bpe.PATTERN, merges)
    held_out = list(itertools.islice(read_texts(list_shards(source, "val")[0]), 1000))
    measures = evaluate_tokenizer(tokenizer, held_out)
    measures = {"vocab_size": tokenizer.vocab_size, "train_chars_per_s": rate, **measures}
    for name, value in measures.items():
        print(f"tokenizer: {name.replace('_', ' ')} {value:,.2f}")
    for name, value in compare_encodings(held_out).items():
        print(f"tokenizer: {name} has {value:.2f} bytes per token")
    tokenizer.info = {"source": source, "text": text, "settings": asked, "measures": measures}
    tokenizer.save(folder)
    return measures


if __name__ == "__main__":
    with one_sentence("tokenizer"):
        main(parse_settings(Settings, __doc__))
