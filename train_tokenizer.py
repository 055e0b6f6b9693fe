"""Train the tokenizer: byte-level BPE on the text that prepare.py made.

Usage:   python train_tokenizer.py                          # vocabulary 65,536, or less on little text
         python train_tokenizer.py --vocab-size=4096 --tag=small
Reads:   data/SOURCE/train-*.parquet                        # prepare.py
Writes:  runs/TAG/tokenizer/tokenizer.json                  # readable: pattern, specials, merges
Method:  BPE (arXiv:1508.07909) over bytes, trained in Rust (tokenizer.rs), run by tiktoken
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import nanochat_bpe

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
    source: str = setting("", "folder below data/ with the text; empty: the only one there")
    vocab_size: int = setting(65536, "ids, special tokens included; fewer if the text is short")
    max_chars: int = setting(2_000_000_000, "characters of text to train on at most")
    doc_cap: int = setting(10_000, "characters of each document to train on; 0: all")
    threads: int = setting(0, "threads that count words; 0: one for each core, 8 at most")
    restart: bool = setting(False, "replace the tokenizer that the run has")

    def __post_init__(self) -> None:
        check_name(self.tag, "--tag")
        smallest = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise ValueError(f"--vocab-size={self.vocab_size} must be {smallest} or more")
        if self.max_chars < 1 or self.doc_cap < 0 or self.threads < 0:
            raise ValueError("--max-chars must be 1 or more, --doc-cap and --threads 0 or more")


# 2. Text -------------------------------------------------------------------------------------


def find_source(source: str) -> str:
    """Return the named data source, or the only one that is prepared; else raise MissingInput."""
    if source:
        return source
    found = prepared_sources()
    if len(found) == 1:
        return found[0]
    if not found:
        raise MissingInput("no text is prepared: run `python prepare.py` first")
    raise MissingInput(f"several texts are prepared: choose --source={'|'.join(found)}")


def texts_up_to(source: str, max_chars: int, doc_cap: int) -> Iterator[str]:
    """Yield documents, each cut to doc_cap characters, up to max_chars in all."""
    left = max_chars
    for path in list_shards(source, "train"):
        for text in read_texts(path):
            text = text[: min(doc_cap or len(text), left)]
            left -= len(text)
            yield text
            if left <= 0:
                return


CHARS_PER_ID = 500  # of a token that is rarer a model sees too little to learn it


def fit_vocab_size(wanted: int, num_chars: int) -> int:
    """Return the vocabulary for num_chars characters: wanted, or a multiple of 64 from 512 on.

    >>> fit_vocab_size(65536, 2_000_000)
    3968
    """
    return min(wanted, max(512, num_chars // CHARS_PER_ID // 64 * 64))


# 3. Evaluation -------------------------------------------------------------------------------


def evaluate_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Measure compression and the encoding rate of one thread.

    Raises Stop if a byte has no token or a text does not come back unchanged.
    """
    start = time.perf_counter()
    ids = [tokenizer.encode(text) for text in texts]
    seconds = time.perf_counter() - start
    lost = [b for b in range(256) if tokenizer.encoding.encode_single_token(bytes([b])) != b]
    lost_texts = [t for t, one in zip(texts, ids) if tokenizer.decode_bytes(one) != t.encode()]
    if lost or lost_texts:
        raise Stop(f"the tokenizer loses bytes {lost} and texts {lost_texts[:1]}: report this")
    tokens = sum(map(len, ids))
    return {
        "chars_per_token": sum(map(len, texts)) / tokens,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / tokens,
        "encode_tokens_per_s": tokens / seconds,
    }


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
        if have.info["settings"] != asked:
            raise MissingInput(
                f"{folder} was trained with other settings ({have.info['settings']}): use another "
                "--tag, or --restart to replace it"
            )
        print(f"tokenizer: {folder} is there, {have.vocab_size:,} ids")
        if text and have.info.get("text", text) != text:
            print("tokenizer: the text has changed since this tokenizer was made: it stays; "
                  "--restart makes it anew")  # fmt: skip
        return have.info["measures"]
    # a text is too short for the vocabulary if it ends before it has filled it
    enough = min(settings.max_chars, (settings.vocab_size + 64) * CHARS_PER_ID)
    num_chars = sum(map(len, texts_up_to(source, enough, settings.doc_cap)))
    vocab_size = fit_vocab_size(settings.vocab_size, num_chars)
    if vocab_size < settings.vocab_size:
        print(
            f"tokenizer: {vocab_size:,} ids instead of {settings.vocab_size:,}: the text is short"
        )
    num_chars = 0

    def counted() -> Iterator[str]:
        nonlocal num_chars
        for document in texts_up_to(source, settings.max_chars, settings.doc_cap):
            num_chars += len(document)
            yield document

    start = time.perf_counter()
    merges = nanochat_bpe.train(counted(), vocab_size - len(SPECIAL_TOKENS), settings.threads)
    seconds = time.perf_counter() - start
    rate = num_chars / seconds
    print(
        f"tokenizer: {format_count(num_chars)} characters in {seconds:.1f} s, {rate / 1e6:.1f} M/s"
    )
    tokenizer = Tokenizer(nanochat_bpe.PATTERN, merges)
    held_out = list(itertools.islice(read_texts(list_shards(source, "val")[0]), 1000))
    measures = {"vocab_size": tokenizer.vocab_size, "train_chars_per_s": rate}
    measures |= evaluate_tokenizer(tokenizer, held_out)
    for name, value in measures.items():
        print(f"tokenizer: {name.replace('_', ' ')} {value:,.2f}")
    tokenizer.info = {"source": source, "text": text, "settings": asked, "measures": measures}
    tokenizer.save(folder)
    return measures


if __name__ == "__main__":
    with one_sentence("tokenizer"):
        main(parse_settings(Settings, __doc__))
