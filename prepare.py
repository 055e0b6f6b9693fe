"""Get text and conversations: from the hub, from your own files, or from the embedded world.

Usage:   python prepare.py                                 # the embedded world, no network
         python prepare.py --data=../books                 # your own folder or file
         python prepare.py --data=hub --shards=8           # FineWeb-Edu; --data=climbmix
         python prepare.py --conversations=hub             # data/chat: SmolTalk, MMLU, GSM8K, ARC
         python prepare.py --conversations=my.jsonl        # your own: OpenAI's form, ShareGPT's,
                                                           # Alpaca's, GSM8K's; file or folder
         python prepare.py --eval-data=hub                 # evaluation sets alone; or a folder
Reads:   the hub (HF_ENDPOINT, HF_TOKEN), a path, or nothing; NANOCHAT_MIRROR, a place that has
         eval_bundle.zip and words_alpha.txt, where their own addresses are out of reach
Writes:  data/SOURCE/train-00000.parquet ... val.parquet, manifest.json; of the world also
         data/world/{mid,sft,rl,val}.jsonl and eval/NAME.jsonl
         data/SOURCE/{mid,sft,rl,val}.jsonl, conversations.json; data/eval/
Method:  documents are cut at paragraph ends, then sorted by a hash of seed and text: this
         shuffles them, drops duplicates and splits off validation text in bounded memory,
         and does not depend on how the files lie on the disk
"""

from __future__ import annotations

import bisect
import bz2
import codecs
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests

from common import (
    NUMBER,
    MissingInput,
    Stop,
    at_least,
    base_dir,
    calculate,
    check_name,
    crc32,
    data_dir,
    format_count,
    format_duration,
    last_number,
    one_sentence,
    parse_settings,
    read_conversations,
    rl_held,
    setting,
    write_json,
)

Out = TypeVar("Out")
Item = dict[str, Any]  # a conversation, or a graded question: {"kind", "messages", ...}
Manifest = dict[str, Any]  # {"settings", "files": Files, "dropped": Dropped, ...}
Files = dict[str, dict[str, Any]]  # file name: its size, hash and counts
Dropped = dict[str, list[Any]]  # what was left out: [how often, the first place]

# 1. Settings ---------------------------------------------------------------------------------

# One command prepares one thing: text (--data), conversations (--conversations) or evaluation
# sets (--eval-data). What determines the data is written to its manifest, and the next command
# does nothing where the manifest says the same. These numbers stand in it for the code:
# raise one when the same input gives other data (golden tests notice), not for a new comment.
WORLD_VERSION = 1  # what the embedded world writes, asks and answers
DATA_VERSION = 2  # how own files and the hub's data sets are read, checked, cut and split

# name: folder below data/, repository; the last shard is for validation
HUB = {
    "hub": ("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle"),  # 1,823 shards
    "climbmix": ("climbmix", "karpathy/climbmix-400b-shuffle"),  # 6,543 shards
}
RESERVED = {"world", "eval", "chat", "downloads", *(folder for folder, _ in HUB.values())}


def resolve(path: str) -> Path:
    """Return a path of the command line as an absolute one."""
    return Path(path).expanduser().resolve()


@dataclass
class Settings:
    data: str = setting(
        "world", "The text: world, hub (FineWeb-Edu), climbmix, or the path of your own files."
    )
    conversations: str = setting(
        "", "Prepare conversations, and no text: hub, or the path of your own .jsonl files."
    )
    eval_data: str = setting("", "Prepare evaluation sets, and no text: hub, or a folder of them.")
    source: str = setting(
        "", "The folder below data/ (none: world, fineweb-edu, climbmix, chat, or the path's name)."
    )
    name: str = setting("Nano", "What the assistant calls itself in its conversations.")
    shards: int = setting(8, "hub: shards to train on, about 250 M characters each.")
    documents: int = setting(64_000, "world: documents to write, about 440 characters each.")
    num_conversations: int = setting(
        60_000, "world: conversations of mid; sft gets a sixth as many, rl a tenth as problems."
    )
    doc_chars: int = setting(20_000, "own files: longer documents are cut, at paragraph ends.")
    document_ends: str = setting(
        "<|endoftext|>,<|end_of_text|>", "own files: a line of one of these ends a document."
    )
    encoding: str = setting("", "own files: encoding of those that are not UTF-8; none: a guess.")
    val_percent: float = setting(2.0, "world, own files: percentage of the validation documents.")
    val_mb: int = setting(20, "world, own files: MB of validation text at most.")
    shard_mb: int = setting(100, "world, own files: MB of text in one training shard.")
    seed: int = setting(0, "world, own files: decides the order, the split and the world's tales.")
    workers: int = setting(4, "hub: files to download at once.")

    def __post_init__(self) -> None:
        at_least(
            self, 1, "shards", "documents", "num_conversations", "val_mb", "shard_mb", "workers"
        )
        at_least(self, 200, "doc_chars")
        if not 0 < self.val_percent <= 50:
            raise ValueError("--val-percent must be over 0 and at most 50: training needs both")
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError("--name must be a name, on one line")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"--encoding={self.encoding} is none that Python knows") from None
        known = {"data": ("world", *HUB), "conversations": ("", "hub"), "eval_data": ("", "hub")}
        for key, words in known.items():
            value, flag = getattr(self, key), f"--{key.replace('_', '-')}"
            if value not in words and not resolve(value).exists():
                others = ", ".join(word for word in words if word)
                raise ValueError(f"{flag}={value}: no such file or folder, nor one of {others}")
            if key != "data" and value and self.data != "world":
                raise ValueError(f"{flag} and --data take two commands: text is prepared by itself")
        if self.eval_data not in ("", "hub") and not resolve(self.eval_data).is_dir():
            raise ValueError(f"--eval-data={self.eval_data} must be a folder, or hub")
        self.source = self.source or self.default_source()
        check_name(self.source, "--source")
        if self.source in ("eval", "downloads") or (self.conversations and self.source == "world"):
            raise ValueError(f"--source={self.source} is a folder with another use: take another")

    @property
    def kind(self) -> str:
        """Return where the text is from: world, hub or own."""
        return "hub" if self.data in HUB else "world" if self.data == "world" else "own"

    def default_source(self) -> str:
        """Derive the folder below data/: a fixed name, or the path's name in plain letters."""
        if "hub" in (self.conversations, self.kind):
            return "chat" if self.conversations else HUB[self.data][0]
        if self.kind == "world" and not self.conversations:
            return "world"
        path = resolve(self.conversations or self.data)
        plain = unicodedata.normalize("NFKD", path.name.split(".")[0].lower())
        plain = plain.encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        slug = slug or "text-" + hashlib.sha256(str(path).encode()).hexdigest()[:6]
        return f"{slug}-files" if slug in RESERVED else slug


# 2. Documents --------------------------------------------------------------------------------

# The text of the world and of own files takes this way: documents of any length are cut to
# pieces of at most --doc-chars characters, which a Sorter brings into the order of their hashes.
# The first --val-percent of the hashes are validation text; the rest fills training shards of
# --shard-mb. At the default settings the world is one shard of 28 MB and 1,300 documents in
# val.parquet. No step holds more than BUCKET_BYTES of text in memory.

# Where a long document is cut, best first: chapters and headings, paragraphs, lines, sentences.
CUTS = (
    ("\n# ", "\n## ", "\n = ", "\nCHAPTER ", "\nChapter ", "\n\n\n", "\f"),
    ("\n\n",),
    ("\n",),
    (". ", "! ", "? ", '." ', "。", "！", "？", "। ", "؟ "),
    (" ", "\u3000"),
)
BUCKET_BYTES = 1 << 26  # text in memory at once, and in one file to be sorted


def cut_point(text: str, start: int, window: int) -> int:
    """Find where to end a piece of text[start:] of at most `window` characters."""
    end, half = start + window, start + window // 2
    for marks in CUTS:
        found = max((at, mark) for mark in marks for at in [text.rfind(mark, half, end)])
        if found[0] > half:
            at, mark = found
            # a heading begins the next piece; other marks end this one
            return at + (1 if mark[0] == "\n" and mark.strip() else len(mark))
    while end > half and (unicodedata.combining(text[end]) or "\u200d" in text[end - 1 : end + 1]):
        end -= 1  # an accent or a joined emoji stays with its letter
    return end


def cut_pieces(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """Cut streamed text into pieces of at most `limit` characters; joined they are the text."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > 2 * limit:
            end = cut_point(rest, start, limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while len(rest) > limit:  # the last two or three pieces are of similar length
        end = cut_point(rest, 0, min(limit, len(rest) * 5 // 8))
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


class Sorter:
    """Sort documents by a hash of seed and text: a shuffle in bounded memory, without duplicates.

    The first bits of the hash choose a bucket, which is a file below `folder`; the buckets are
    then sorted one by one. On the disk they take as much as the text.
    """

    def __init__(self, folder: Path, seed: int, expected_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.key = folder, f"nanochat {seed}".encode()
        count = max(1, min(4096, expected_bytes // BUCKET_BYTES))
        self.buckets = [bytearray() for _ in range(count)]
        self.bytes_in_memory = 0
        self.least, self.greatest = b"\xff", b""  # hashes of the first and the last document
        self.count = self.duplicates = self.total_chars = 0

    def add(self, text: str) -> None:
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=self.key).digest()
        bucket = self.buckets[int.from_bytes(key[:4], "big") * len(self.buckets) >> 32]
        bucket += key + len(data).to_bytes(8, "big") + data
        self.least, self.greatest = min(self.least, key), max(self.greatest, key)
        self.total_chars += len(text)
        self.count += 1
        self.bytes_in_memory += len(data)
        if self.bytes_in_memory >= BUCKET_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, bucket in enumerate(self.buckets):
            if bucket:
                with open(self.folder / f"{number:04d}", "ab") as file:
                    file.write(bucket)
                bucket.clear()
        self.bytes_in_memory = 0

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Yield (hash, text) in the order of the hashes, each text once; the files go."""
        self.flush()
        for path in sorted(self.folder.iterdir()):
            before = b""
            for key, data in sorted(self._records(path)):
                if key == before:
                    self.duplicates += 1
                else:
                    yield key, data.decode()
                before = key
            path.unlink()

    @staticmethod
    def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
        with open(path, "rb") as file:
            while head := file.read(24):  # 16 bytes of hash, 8 of length
                yield head[:16], file.read(int.from_bytes(head[16:], "big"))


def split_documents(sorter: Sorter, settings: Settings) -> tuple[Iterator[str], Iterator[str]]:
    """Return the validation texts, those of the smallest hashes, and then the training texts.

    Both have a text wherever there are two distinct ones, and share none. Read them in turn. Of
    few texts more than --val-percent are for validation: 20, or a tenth of them.
    """
    documents, least = sorter.documents(), min(20, max(1, sorter.count // 10))
    below = int(settings.val_percent / 100 * (1 << 128)).to_bytes(16, "big")
    first_train: list[str] = []

    def validation() -> Iterator[str]:
        taken = 0
        for number, (key, text) in enumerate(documents):
            full = number and taken >= settings.val_mb * 10**6
            if full or (number >= least and key >= below) or key == sorter.greatest:
                first_train.append(text)
                return
            taken += len(text.encode())
            yield text

    return validation(), chain(first_train, (text for _, text in documents))


def describe_shard(path: Path) -> dict[str, Any]:
    """Count a parquet file's documents, characters and bytes of text; size and sha256 of it."""
    entry: dict[str, Any] = {"documents": 0, "characters": 0, "bytes": 0}
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise Stop(f"{path} has no column `text`, only {names}: it cannot be trained on")
            for batch in file.iter_batches(columns=["text"]):
                text = batch.column(0)
                entry["documents"] += batch.num_rows
                entry["characters"] += pc.sum(pc.utf8_length(text)).as_py() or 0
                entry["bytes"] += pc.sum(pc.binary_length(text)).as_py() or 0
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise Stop(f"{path} is no whole parquet file ({reason}): delete it and run again")
    return entry | {"size": path.stat().st_size, "sha256": file_digest(path)}


def write_shard(path: Path, documents: Iterator[str], cap_bytes: float) -> dict[str, Any]:
    """Write documents until they hold cap_bytes of text or end; return the file's description."""
    schema = pa.schema([("text", pa.string())])
    written = 0
    with open(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while written < cap_bytes and (batch := list(islice(documents, 1000))):
            table = pa.table({"text": batch}, schema)
            writer.write_table(table)
            written += table.nbytes
    return describe_shard(path)


def write_splits(folder: Path, sorter: Sorter, settings: Settings) -> Files:
    """Write val.parquet, then the training shards; describe each file."""
    val, train = split_documents(sorter, settings)
    files = {"val.parquet": write_shard(folder / "val.parquet", val, float("inf"))}
    for number, text in enumerate(train):
        name = f"train-{number:05d}.parquet"
        cap_bytes = settings.shard_mb * 10**6
        files[name] = write_shard(folder / name, chain([text], train), cap_bytes)
    return files


class Progress:
    """One line of bytes done, rate and time left: rewritten on a terminal, else every 10 s."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = 0
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            now, tty = time.monotonic(), sys.stdout.isatty()
            if now - self.said < (0.2 if tty else 10):
                return
            self.said = now
            rate = max(1.0, self.done / (now - self.start))
            left = format_duration(max(0, self.total - self.done) / rate)
            line = f"prepare: {self.what} {self.done / 1e6:,.0f}/{self.total / 1e6:,.0f} MB"
            line = f"{line}  {rate / 1e6:.1f} MB/s  left {left}"
            print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty() and self.said > self.start:
            print("\r\x1b[K", end="", flush=True)  # what follows gets a line of its own


def check_space(need: int) -> None:
    """Raise Stop where the base directory's disk has less than `need` bytes free."""
    base_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base_dir()).free
    if free < need:
        raise Stop(
            f"{base_dir()}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free: free "
            "some space, set NANOCHAT_BASE_DIR, or take less data"
        )


# 3. Hub --------------------------------------------------------------------------------------

# hub_files lists a repository, fetch_files gets any of its files: several at once, each into a
# partial file beside its place, continued after a broken connection or a killed process, checked
# against the announced size and hash, then renamed. make_hub_text does so for shards of text,
# fetch_sets (section 5) for conversations and evaluation sets.

HUB_ADDRESS = "https://huggingface.co"
BLOCK_BYTES = 1 << 18  # read at once; what a cut connection may lose


@dataclass(frozen=True)
class Remote:
    """A file to fetch: where it is and what is known of it (size None, digest "": unknown)."""

    url: str
    size: int | None = None
    digest: str = ""  # sha256, or git's blob id, which has 40 digits


def file_digest(path: Path, like: str = "") -> str:
    """Hash a file as the hub does: sha256, or git's blob id where `like` has 40 digits."""
    state = hashlib.sha256()
    if len(like) == 40:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def size_of(path: Path) -> int:
    """Return a file's size, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def is_whole(path: Path, remote: Remote) -> bool:
    """True if a file has the announced size and hash, as far as these are known."""
    if not path.is_file() or remote.size not in (None, path.stat().st_size):
        return False
    return not remote.digest or file_digest(path, remote.digest) == remote.digest


class Busy(Exception):
    """The server cannot answer now: (reason, seconds to wait before the next try)."""


@dataclass
class Net:
    """How one server is asked. Only `endpoint` gets the token; redirects elsewhere do not.

    A server that is no hub has its mirror named by another `variable`, and gets no token.
    """

    endpoint: str = field(default_factory=lambda: os.environ.get("HF_ENDPOINT") or HUB_ADDRESS)
    tries: int = 8  # failures in a row without a byte gained
    timeout_s: float = 30.0
    stopping: threading.Event = field(default_factory=threading.Event)
    variable: str = "HF_ENDPOINT"
    answered: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add HF_TOKEN to a request of the endpoint; requests drops it when another host comes."""
        token = os.environ.get("HF_TOKEN", "").strip() if self.variable == "HF_ENDPOINT" else ""
        if token and (request.url or "").startswith(f"{self.endpoint}/"):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def open(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """Start one GET. Raises Busy where a later try may help, Stop where none will."""
        headers = {"Accept-Encoding": "identity", **(headers or {})}  # so that sizes are true
        options: dict[str, Any] = {"stream": True, "timeout": (10, self.timeout_s)}
        try:
            response = requests.get(url, headers=headers, auth=self.sign, **options)
        except (ValueError, requests.TooManyRedirects):
            raise Stop(f"{url} cannot be asked: is {self.variable} right?") from None
        self.answered = True
        code = response.status_code
        if code in (200, 206, 416):
            return response
        response.close()
        if code in (408, 429) or code >= 500:
            wait = response.headers.get("Retry-After", "")
            raise Busy(f"it answered {code}", min(600.0, float(wait) if wait.isdecimal() else 0))
        remedy = f"it is not there, or {self.variable} is not right"
        if code in (401, 403) and self.variable == "HF_ENDPOINT":
            remedy = "set HF_TOKEN to a token that may read it"
        raise Stop(f"{url} answered {code}: {remedy}")

    def retry(self, url: str, attempt: Callable[[], Out], gained: Callable[[], int] = int) -> Out:
        """Return attempt(), repeated while it raises Busy or loses the connection.

        Waits twice as long each time; a try that `gained` bytes starts the count anew. Raises Stop
        after the last try, or after two where the server has never answered: there is no network.
        """
        failures = 0
        while True:
            before, wait_s = gained(), 0.0
            try:
                return attempt()
            except Busy as error:
                reason, wait_s = error.args
            except requests.Timeout:
                reason = "no answer in time"
            except requests.RequestException:
                reason = "the connection broke"
            failures = 1 if gained() > before else failures + 1
            if failures == min(2, self.tries) and not self.answered:
                raise Stop(
                    f"{self.endpoint} cannot be reached: check the network or set {self.variable} "
                    "to a mirror; without one take --data=world, the embedded text, or "
                    "--data=PATH, your own files"
                )
            if failures == self.tries:
                raise Stop(f"{url} failed {failures} times in a row ({reason}): run the same "
                           "command again later to go on from here")  # fmt: skip
            delay_s = min(60, 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            if self.stopping.wait(max(delay_s, wait_s)):
                raise Stop("stopped")


def hub_files(net: Net, repo: str) -> dict[str, Remote]:
    """List a dataset repository's files by path, with the sizes and hashes the hub announces."""
    place = f"{net.endpoint}/datasets/{repo}/resolve/main"
    files: dict[str, Remote] = {}
    url = f"{net.endpoint}/api/datasets/{repo}/tree/main?recursive=true"

    def read_page() -> str:
        with net.open(url) as response:
            try:
                for item in response.json():
                    lfs, path = item.get("lfs") or item, item["path"]
                    if item.get("type", "file") == "file":
                        digest = (lfs.get("oid") or "").removeprefix("sha256:")
                        files[path] = Remote(f"{place}/{quote(path)}", lfs.get("size"), digest)
            except (ValueError, AttributeError, KeyError, TypeError):
                raise Stop(f"{url} answered something other than a list of files: is HF_ENDPOINT "
                           "right?") from None  # fmt: skip
            link = urlsplit(response.links.get("next", {}).get("url", ""))
        # a mirror may name the original host in the link: stay with the endpoint
        return urlunsplit((*urlsplit(net.endpoint)[:2], *link[2:])) if link.path else ""

    while url:
        url = net.retry(url, read_page)
    return files


def download(net: Net, remote: Remote, path: Path, progress: Progress) -> None:
    """Fetch a file whole and checked, or raise Stop; a later call continues a stopped one.

    Only a file whose hash is known beforehand is continued by another process.
    """
    key = hashlib.sha256(f"{remote.size} {remote.digest}".encode()).hexdigest()[:12]
    part = path.with_name(f".{path.name}.{key}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial"):
        if old != part or not remote.digest:
            old.unlink()  # of another version of the file
    size, etag = remote.size, ""

    def fetch_rest() -> None:
        nonlocal size, etag
        have = size_of(part)
        if size and have >= size:
            return
        with net.open(remote.url, {"Range": f"bytes={have}-"} if have else {}) as response:
            known, etag = etag, response.headers.get("ETag", "")
            span = response.headers.get("Content-Range", "")
            # without a hash to check, the rest must be of the same version
            resumes = response.status_code == 206 and span.startswith(f"bytes {have}-")
            resumes = resumes and bool(remote.digest or known == etag != "")
            if have and not resumes:
                part.unlink()
                progress.add(-have)
                have = 0
            if response.status_code != 200 and not resumes:
                raise Busy(f"it cannot go on from byte {have}", 0)
            size = remote.size or have + int(response.headers.get("Content-Length") or 0)
            with open(part, "ab") as file:
                for block in response.iter_content(BLOCK_BYTES):
                    file.write(block)
                    progress.add(len(block))
                    if net.stopping.is_set():
                        raise Stop("stopped")
        if size_of(part) < size:
            raise Busy("it cut the connection", 0)

    for _ in range(3):
        net.retry(remote.url, fetch_rest, lambda: size_of(part))
        if is_whole(part, remote):
            os.replace(part, path)
            return
        progress.add(-size_of(part))
        part.unlink()
    raise Stop(f"{remote.url} gave 3 times other bytes than the hub announces: try again later, "
               f"or another {net.variable}")  # fmt: skip


def fetch_files(
    wanted: dict[Path, tuple[Net, Remote]], what: str, workers: int, room: int = 1
) -> None:
    """Download files in threads; the first error stops all. The disk needs `room` times their size.

    The threads are daemons, so that Ctrl-C need not wait until a stalled read times out.
    """
    if not wanted:
        return
    total = sum(remote.size or 0 for _, remote in wanted.values())
    check_space(room * total)
    print(f"prepare: fetching {len(wanted)} files of {what}, {total / 1e6:,.0f} MB", flush=True)
    futures: dict[Path, Future[None]] = {path: Future() for path in wanted}
    todo = iter(list(futures.items()))
    stopping = next(iter(wanted.values()))[0].stopping  # one for all servers

    def work() -> None:
        for path, future in todo:
            if stopping.is_set():
                return
            try:
                download(*wanted[path], path, progress)
                future.set_result(None)
            except (Stop, Exception) as error:  # noqa: BLE001  raised again in the main thread
                future.set_exception(error)

    with contextlib.closing(Progress(what, total)) as progress:
        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:  # Ctrl-C too: the threads shall not go on
            stopping.set()
            raise


def make_hub_text(settings: Settings, net: Net, folder: Path) -> Files:
    """Fetch the first shards of a hub repository, and its last one for validation.

    What lies there stays as it is until all is there: a new shard waits under the name unused-...,
    as do those beyond --shards, which may be wanted again.
    """
    repo = HUB[settings.data][1]
    remotes = hub_files(net, repo)
    shards = [remotes[name] for name in sorted(remotes) if re.search(r"shard_\d+\.parquet$", name)]
    if not shards:
        raise Stop(f"{net.endpoint} lists no shards of {repo}: is HF_ENDPOINT right?")
    if settings.shards >= len(shards):
        raise Stop(f"{repo} has {len(shards) - 1} train shards: --shards={len(shards) - 1} at most")
    wanted = {f"train-{i:05d}.parquet": shards[i] for i in range(settings.shards)}
    wanted["val.parquet"] = shards[-1]
    lies: dict[str, Path] = {}
    missing: dict[Path, tuple[Net, Remote]] = {}
    for name, remote in wanted.items():
        beside = folder / f"unused-{name.removeprefix('train-')}"
        lies[name] = folder / name if is_whole(folder / name, remote) else beside
        if lies[name] == beside and not is_whole(beside, remote):
            missing[beside] = net, remote
    fetch_files(missing, repo, settings.workers)
    with ThreadPoolExecutor(settings.workers) as pool:
        files = dict(zip(wanted, pool.map(describe_shard, lies.values())))
    (folder / "manifest.json").unlink(missing_ok=True)  # written again at once
    for path in folder.glob("train-*.parquet"):
        if path.name not in wanted:
            os.replace(path, path.with_name(path.name.replace("train-", "unused-")))
    for name, path in lies.items():
        os.replace(path, folder / name)
    return files


# 4. Own files --------------------------------------------------------------------------------

# What people have, in any layout: OwnFiles finds the files below a path and reads each of them
# once, as text (documents) or as conversations (section 5). What cannot be used is left out,
# counted by reason with the first place it was met at, and said at the end; nothing stops.

TEXT_SUFFIXES = """
 txt text md markdown json csv tsv rst org adoc tex bib srt vtt log html htm xml svg py pyi js mjs
 jsx ts tsx css scss c h cc cpp cxx hpp cu cuh java kt scala go rs rb php pl pm lua r jl m swift cs
 fs hs ml mli ex exs erl clj lisp el scm sh bash zsh fish ps1 bat sql yaml yml toml ini cfg conf
 cmake mk proto graphql vue svelte dart zig nim v sv vhd vhdl asm s f f90 pas d tcl diff
"""
COLUMNS = ("text", "content")  # of records, the first that is there
FILE_KINDS = {".parquet": ".table", ".arrow": ".table", ".json": ".json", ".jsonl": ".jsonl",
         ".ndjson": ".jsonl"}  # fmt: skip
PACKED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
}  # fmt: skip
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
              pa.types.is_large_binary)  # fmt: skip
LINE_CHARS = 1 << 25  # the longest line of .jsonl, or value of an array, that is read
LFS = b"version https://git-lfs"  # how a file begins that stands for one in Git LFS


def file_kind(path: Path) -> str:
    """Return .table, .json, .jsonl or .txt by a file's name without .gz, "" where it is none."""
    name = path.name.lower()
    name = name.removesuffix(next(filter(name.endswith, PACKED), ""))
    suffix = os.path.splitext(name)[1]
    plain = not suffix or suffix[1:] in TEXT_SUFFIXES.split()
    return FILE_KINDS.get(suffix, ".txt" if plain else "")


def sniff_encoding(head: bytes) -> str:
    """Return the encoding of text that begins with `head`, "" where it is not known."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    wrong, other = text.count("\ufffd"), len(re.findall("[\0-\x06\x0e-\x1a\x7f]", text))
    right = len(re.findall("[^\0-\x7f\ufffd]", text))
    if wrong > max(2, right, len(text) / 300) and not other:  # more than some damage
        detector: Any = getattr(requests.compat, "chardet", None)  # the one that requests brings
        if detector and (guess := detector.detect(head)["encoding"]):
            return guess
    return "utf-8-sig" if (wrong + other) * 10 <= len(text) + 10 else ""


def clean(text: str) -> str:
    """Return text with plain line ends, without NULs, outer blanks and halves of characters.

    The indentation of a first line stays: it means something in a program.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.replace("\0", "").rstrip())
    text = text if text[:1] == "\t" or text[:2].isspace() else text.lstrip()
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def present(row: dict[str, Any], *names: str) -> Any:
    """Return the first of a row's fields that is there and not null, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def stream_values(text: IO[str], start: str = "") -> Iterator[Any]:
    """Yield the values of a JSON array, or a value without one; `start` of it was read before.

    At most LINE_CHARS are in memory. Raises ValueError where a value or the array does not end.
    """
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    more = read = start or text.read(1 << 16)
    at = len(read) - len(read.lstrip())
    in_array = read.startswith("[", at)
    at += in_array
    while True:
        at += len(skip.match(read, at)[0])  # type: ignore[index]  # it matches everywhere
        if read.startswith("]", at) if in_array else at == len(read) and not more:
            return
        end = 0
        with contextlib.suppress(ValueError, RecursionError):
            value, end = decode(read, at)
        if end and (end < len(read) or not more):
            yield value
            at = end
        elif not more or len(read) - at > LINE_CHARS:
            raise ValueError("it does not end")
        else:
            more = text.read(1 << 20)  # the value may go on there
            read, at = read[at:] + more, 0


def is_array(value: Any) -> bool:
    """True if a value is a list of records, and not the messages of one conversation."""
    records = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return records and not any(present(one, "role", "from") for one in value)


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored, whatever bytes its names have."""
    return os.fsencode(path).decode("utf-8", "replace")


def drop(dropped: Dropped, reason: str, place: str = "", count: int = 1) -> None:
    """Count what is left out or mended; the manifest keeps the count and the first place."""
    if count:
        dropped.setdefault(reason, [0, place])[0] += count


def left_out(dropped: Dropped, form: str) -> str:
    """List what was left out or mended, most first, in the form's braces; "" where it is none."""
    counts = sorted(dropped.items(), key=lambda pair: -pair[1][0])
    said = (f"{n:,} {reason}" + f" ({place})" * bool(place) for reason, (n, place) in counts)
    return form.format("left out or mended: " + ", ".join(said)) if dropped else ""


class OwnFiles:
    """The files of some kinds below a path, and what was left out of them."""

    def __init__(self, root: Path, encoding: str = "", with_text: bool = True) -> None:
        self.root, self.encoding = root, encoding
        self.kinds = {*FILE_KINDS.values(), *[".txt"] * with_text}
        self.dropped: Dropped = {}
        self.unknown_bytes = 0  # of files in an encoding that is not known
        found = [root] if root.is_file() else sorted(self.find_files())
        self.files = {path: path.stat() for path in found}

    def drop(self, reason: str, place: Path | str, detail: str = "") -> None:
        place = printable(os.path.relpath(place, self.root.parent))
        drop(self.dropped, reason, f"{place}: {detail}" if detail else place)

    def find_files(self) -> Iterator[Path]:
        """Yield the files to read: no hidden ones, no loops of links, not what is written here."""
        seen = {os.path.realpath(base_dir())}

        def unreadable(error: OSError) -> None:
            self.drop("unreadable folders", error.filename)

        for folder, folders, names in os.walk(self.root, onerror=unreadable, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            inner = {name for name in folders if name[0] != "."}
            for path in (Path(folder, name) for name in folders + names if name not in inner):
                if path.name[0] == ".":
                    self.drop("hidden files and folders", path)
                elif not os.path.isfile(path):
                    self.drop("broken links and special files", path)
                elif file_kind(path) not in self.kinds:
                    self.drop("files of other kinds", path)
                else:
                    yield path
            folders[:] = sorted(inner)

    def size(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def expected_bytes(self) -> int:
        """Guess the size of the text: packed files hold about four times theirs."""
        packed = (*PACKED, ".parquet")
        extra = (i.st_size for p, i in self.files.items() if p.suffix.lower() in packed)
        return self.size() + 3 * sum(extra)

    def fingerprint(self) -> str:
        """Hash the files' names and contents, wherever they lie: changed input is prepared anew."""
        whole = hashlib.sha256()
        for path in sorted(self.files):
            name = printable(os.path.relpath(path, self.root))
            with contextlib.suppress(OSError):  # what cannot be read is left out, and said
                whole.update(f"{name}\0{crc32(path)}\0".encode())
        return whole.hexdigest()

    def read(self, records: Callable[[Path, Any], Iterator[Out]]) -> Iterator[Out]:
        """Yield what records(path, file) yields of each file; damaged files are counted."""
        print(f"prepare: reading {len(self.files)} files, {self.size() / 1e6:,.1f} MB", flush=True)
        done = 0
        with contextlib.closing(Progress("reading", self.size())) as progress:
            for path, info in self.files.items():
                if not info.st_size:
                    self.drop("empty files", path)
                try:
                    with open(path, "rb") as raw:
                        if raw.peek(len(LFS)).startswith(LFS):
                            self.drop("Git LFS pointers, whose files `git lfs pull` gets", path)
                            continue
                        unpack = PACKED.get(path.suffix.lower(), contextlib.nullcontext)
                        with unpack(raw) as file:
                            for record in records(path, file) if info.st_size else ():
                                yield record
                                now = done + (0 if raw.closed else raw.tell())
                                progress.add(now - progress.done)
                except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException):
                    self.drop("damaged or unreadable files", path)
                done += info.st_size

    def open_text(self, path: Path, file: Any) -> IO[str]:
        """Open a file in the encoding it seems to have, as an empty one where it is no text."""
        file = io.BufferedReader(file, 1 << 14)
        head = file.peek(1 << 14)
        encoding = sniff_encoding(head)
        if not encoding and b"\0" in head:
            self.drop("binary files", path)
            return io.StringIO()
        if not encoding.startswith("utf-"):
            encoding = self.encoding or encoding
            if not encoding:
                self.drop("files in an unknown encoding (--encoding=NAME says it)", path)
                self.unknown_bytes += path.stat().st_size
                return io.StringIO()
            self.drop(f"files read as {encoding}, not UTF-8 (--encoding=NAME sets it)", path)
        return io.TextIOWrapper(file, encoding, "replace")

    def documents(self, limit: int, ends: Sequence[str] = ()) -> Iterator[str]:
        """Yield the clean documents of all files, each at most `limit` characters long.

        A line that is one of `ends` stands between two documents.
        """
        for path, piece in self.read(partial(self._pieces, limit, ends)):
            if text := clean(piece):
                if "\ufffd" in text:
                    self.drop("documents with invalid characters replaced", path)
                yield text
            else:
                self.drop("empty documents", path)

    def _pieces(
        self, limit: int, ends: Sequence[str], path: Path, file: Any
    ) -> Iterator[tuple[Path, str]]:
        for lines in self._texts(path, file):
            for is_end, group in itertools.groupby(lines, key=lambda line: line.strip() in ends):
                if not is_end:
                    yield from ((path, piece) for piece in cut_pieces(group, limit))

    def _texts(self, path: Path, file: Any) -> Iterator[Iterable[str]]:
        """Yield the lines of each text of a file: of the whole file, or of its records."""
        kind = file_kind(path)
        if kind == ".table":
            values = self.table(path, file, COLUMNS)
        else:
            text = self.open_text(path, file)
            if kind == ".txt" or (kind == ".json" and not self.has_records(text)):
                yield iter(partial(text.readline, 1 << 20), "")
                return
            values = self.json_values(path, text)
        for place, value in values:
            value = present(value, *COLUMNS) if isinstance(value, dict) else value
            if isinstance(value, str):
                yield value.splitlines(keepends=True) or [""]
            else:
                self.drop("records without `text` or `content`", place)

    def has_records(self, text: IO[str]) -> bool:
        """True if one of the first values of a .json file, or of its array, is a record of text."""
        found = False
        with contextlib.suppress(ValueError):
            for value in islice(stream_values(text), 20):
                found |= isinstance(value, dict) and isinstance(present(value, *COLUMNS), str)
        text.seek(0)
        return found

    def values(self, path: Path, file: Any) -> Iterator[tuple[str, Any]]:
        """Yield (place, value) of each row of a table, or value of JSON."""
        if file_kind(path) == ".table":
            return self.table(path, file)
        return self.json_values(path, self.open_text(path, file))

    def json_values(self, path: Path, text: IO[str]) -> Iterator[tuple[str, Any]]:
        """Yield (place, value) of lines of JSON; the records of an array one by one."""
        line, number = "\n", 0
        while line and not line.strip():
            line, number = text.readline(LINE_CHARS), number + 1
        try:
            json.loads(line or "0")
        except (ValueError, RecursionError):
            if line[0] == "[" or (line[0] == "{" and file_kind(path) == ".json"):  # over many lines
                count = 0
                try:
                    for count, value in enumerate(stream_values(text, line), 1):
                        yield f"{path}: record {count}", value
                except ValueError:
                    self.drop("lines of broken JSON", f"{path}: after record {count}")
                return
        while line:
            place = f"{path}:{number}"
            if len(line) == LINE_CHARS and line[-1] != "\n":
                self.drop("lines that are too long", place)
                while (rest := text.readline(LINE_CHARS)) and rest[-1] != "\n":
                    pass
            elif line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    self.drop("lines of broken JSON", place)
                else:
                    yield from ((place, one) for one in (value if is_array(value) else [value]))
            line, number = text.readline(LINE_CHARS), number + 1

    def table(
        self, path: Path, file: Any, columns: Sequence[str] = ()
    ) -> Iterator[tuple[str, Any]]:
        """Yield (place, row) of a table, or the text of the first of `columns` that it has."""
        if ".parquet" in path.name.lower():
            table: Any = pq.ParquetFile(file)
            schema, batches = table.schema_arrow, table.iter_batches(batch_size=64)
        else:  # Arrow's own format, as a file or a stream
            try:
                table = pa.ipc.open_file(file)
                batches = map(table.get_batch, range(table.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                table = batches = pa.ipc.open_stream(file)
            schema = table.schema
        name = next((name for name in columns if name in schema.names), "")
        if columns and not name:
            has = ", ".join(schema.names[:8])
            return self.drop(f"tables without `text` or `content` (has {has})", path)
        if name and not any(is_text(schema.field(name).type) for is_text in TEXT_TYPES):
            return self.drop(f"tables whose `{name}` is {schema.field(name).type}, no text", path)
        for batch in batches:
            if name:
                texts = batch.column(name).cast(pa.large_binary()).to_pylist()
                rows = [text and text.decode("utf-8", "replace") for text in texts]
            else:
                rows = batch.to_pylist()
            yield from ((str(path), row) for row in rows)


def make_own_text(settings: Settings, files: OwnFiles, folder: Path) -> Manifest:
    """Write shards of the user's files to `folder`."""
    size = files.expected_bytes()
    check_space(size * 3 // 2)
    sorter = Sorter(folder / "buckets", settings.seed, size)
    # so that even a short text has 200 documents, of which 20 are for validation
    limit, ends = min(settings.doc_chars, max(200, size // 200)), settings.document_ends.split(",")
    for text in files.documents(limit, ends):
        sorter.add(text)
    if files.unknown_bytes * 2 > files.size():
        raise MissingInput(f"most of {files.root} cannot be read{left_out(files.dropped, ' ({})')}")
    if sorter.least >= sorter.greatest:  # none or one, however often it came
        what = f"only {sorter.total_chars:,} characters of text" if sorter.count else "no text"
        raise MissingInput(
            f"{files.root} holds {what} that can be used{left_out(files.dropped, ' ({})')}; "
            "training and validation need two documents, better a million characters"
        )
    made = write_splits(folder, sorter, settings)
    drop(files.dropped, "duplicates", count=sorter.duplicates)
    return {"files": made, "dropped": files.dropped}


# 5. Conversations and evaluation sets --------------------------------------------------------

# A row of any of these forms becomes a conversation of common.py's form, or a graded item: that
# ends with a user's message, and has what grades the reply and, in `reply`, a right one. mid and
# sft train on conversations (a graded item with its reply), rl on graded items without a reply.
# data/eval/ has the graded items of the public sets; no question of theirs is trained on.

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
# Fields of known forms that change what a row or a turn means, and that a chat cannot say here.
MEANT = {
    "tools": "tools that are not the calculator", "functions": "tools that are not the calculator",
    "tool_calls": "call of a tool that is not the calculator",
    "function_call": "call of a tool that is not the calculator",
    "images": "pictures or sound", "image": "pictures or sound", "audio": "pictures or sound",
    "audios": "pictures or sound", "videos": "pictures or sound", "refusal": "refusal of a reply",
    "reasoning_content": "reasoning beside the reply", "reasoning": "reasoning beside the reply",
    "thinking": "reasoning beside the reply", "history": "turns in a field of their own",
}  # fmt: skip
LETTERS = "ABCDE"  # of the public sets' choices
PLAIN_NUMBER = re.compile(rf"\s*(?:{NUMBER.pattern})\s*[%.]?\s*")


def read_content(content: Any, role: str) -> str | list[dict[str, str]]:
    """Check a message's content, text or parts. Raises ValueError(reason, detail)."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        kinds = [str(part.get("type")) for part in parts]
        for kind, part in zip(kinds, parts):
            if kind not in ("text", "python", "output") or not isinstance(part.get("text"), str):
                raise ValueError("part that is no text", kind[:40])
        if set(kinds) <= {"text"}:
            content = "\n".join(part["text"] for part in parts)
        else:  # outer blanks of a part belong to it
            texts = [clean(f"|{part['text']}|")[1:-1] for part in parts]
            parts = [{"type": kind, "text": text} for kind, text in zip(kinds, texts)]
            pairs = [(a["text"], b["text"]) for a, b in itertools.pairwise(parts)
                     if a["type"] == "python" and b["type"] == "output"]  # fmt: skip
            counts = [kinds.count("python"), kinds.count("output")]
            if role != "assistant" or counts != [len(pairs)] * 2:
                raise ValueError("tool call without its output")
            if any(calculate(call) != output for call, output in pairs):
                raise ValueError("tool call whose output is not the calculator's")
            return parts
    text = clean(content) if isinstance(content, str) else None
    if not text:
        raise ValueError("message without text" if text is None else "empty message")
    return text


def check_meaning(row: dict[str, Any]) -> None:
    """Raise ValueError(reason, field) where a field says what would be lost."""
    for name, reason in MEANT.items():
        if row.get(name):
            raise ValueError(reason, name)
    if row.get("label") is False:  # of preferences
        raise ValueError("reply that is marked as bad", "label")


def check_weight(row: dict[str, Any], allowed: tuple) -> Any:
    """Return how much a row or turn is to count: OpenAI's field, and others' of this meaning."""
    weight = present(row, "weight", "train", "loss")
    if weight not in allowed:
        raise ValueError("weight that the loss does not have", str(weight)[:40])
    return weight


def read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Read a message of any spelling. Raises ValueError(reason, detail)."""
    check_meaning(turn)
    said = str(present(turn, "role", "from"))
    if said not in ROLES:
        raise ValueError("role that is not system, user or assistant", said[:40])
    if turn.get("name"):
        raise ValueError("speaker with a name of its own", str(turn["name"])[:40])
    role = ROLES[said]
    content = read_content(present(turn, "content", "value"), role)
    message: dict[str, Any] = {"role": role, "content": content}
    weight = check_weight(turn, (None, 0, 1) if role == "assistant" else (None, 0))
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return message


def find_turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a conversation, or those of a question and its reply in two fields."""
    turns = present(row, "messages", "conversations", "conversation")
    asked = present(row, "prompt", "instruction", "question")
    said = present(row, "completion", "response", "output", "answer")
    more = present(row, "input", "context") or ""
    pair = all(isinstance(text, str) for text in (asked, said, more))
    if turns is None and pair and not row.get("choices") and not row.get("options"):
        asked = f"{asked}\n\n{more}" if more else asked
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    turns = list(turns) if isinstance(turns, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("no list of messages")
    if system := present(row, "system", "system_prompt"):
        if ROLES.get(str(present(turns[0], "role", "from"))) == "system":
            raise ValueError("two system prompts")
        turns.insert(0, {"role": "system", "content": system})
    return turns


def read_conversation(value: Any, mend: Callable[[str], Any] = lambda reason: None) -> Item:
    """Read a conversation in the spelling of OpenAI, ShareGPT, a bare list, or of this project.

    A problem of GSM8K's form, with `question` and `answer`, becomes a graded item with its reply.
    mend is told of turns that are left out. Raises ValueError(reason, detail) where there is
    nothing to learn, or where the meaning of a field would be lost.
    """
    row = value if isinstance(value, dict) else {"messages": value}
    check_meaning(row)
    kind = row.get("kind")
    kind = kind if isinstance(kind, str) and kind else ""
    if "####" in str(row.get("answer")) and present(row, "messages", "conversations") is None:
        texts = {key: str(read_content(row.get(key), "user")) for key in ("question", "answer")}
        return {**gsm8k_item(texts), "kind": kind or "problem"}
    check_weight(row, (None, 1))
    messages = [read_turn(turn) for turn in find_turns(row)]
    graded = row.get("grade") in ("number", "letter", "text")
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    while not graded and turns and turns[0]["role"] == "assistant":
        turns.pop(0)
        mend("replies before the first question")
    while not graded and turns and turns[-1]["role"] == "user":
        turns.pop()
        mend("questions without a reply")
    roles = [turn["role"] for turn in turns]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError("roles out of order", " ".join(roles)[:40])
    replies = [turn for turn in turns if turn["role"] == "assistant" and "weight" not in turn]
    if not graded and not replies:
        raise ValueError("no reply to learn from")
    if graded and (not roles or roles[-1] != "user"):
        raise ValueError("graded reply")
    item = {"kind": kind or "own", "messages": head + turns}
    return item | read_grade(row) if graded else item


def read_grade(row: dict[str, Any]) -> dict[str, Any]:
    """Check what replies are graded by: nothing may make all right. Raises ValueError(reason)."""
    texts = {key: row.get(key, []) for key in ("accept", "reject", "choices")}
    for key, some in texts.items():
        if not isinstance(some, list) or not all(isinstance(t, str) and clean(t) for t in some):
            raise ValueError("problem with something other than a list of texts", key)
    texts = {key: [clean(text) for text in some] for key, some in texts.items() if some}
    answer = row.get("answer", "")
    answer = clean(answer if isinstance(answer, str) else calculate(json.dumps(answer)))
    right = {"number": PLAIN_NUMBER.fullmatch(answer), "letter": re.fullmatch("[A-Z]", answer),
             "text": texts.get("accept")}  # fmt: skip
    if not right[row["grade"]] or (row["grade"] != "text" and "accept" in texts):
        raise ValueError("problem without its answer")
    return {"grade": row["grade"], "answer": answer, **texts}


def user_asks(text: str, **graded: Any) -> Item:
    """Return a graded item of one question."""
    return {"messages": [{"role": "user", "content": text}], **graded}


def letter_item(question: str, choices: Sequence[str], right: int) -> Item:
    """Make a graded item of a question with choices, in training and in evaluation alike.

    The letter stands behind its choice, where copying what follows finds it, and in parentheses,
    where it is the same token as in the answer.
    """
    choices = [" ".join(choice.split()) for choice in choices]
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= right < len(choices):
        raise ValueError("choices without their answer")
    lines = [f"- {choice} ({letter})" for choice, letter in zip(choices, LETTERS)]
    text = "\n".join([question.strip(), *lines, "Answer with the letter alone."])
    letter = LETTERS[right]
    return user_asks(text, choices=choices, grade="letter", answer=letter, reply=letter)


def mmlu_item(row: dict[str, Any]) -> Item:
    """Read a row of MMLU, of a table or of a .csv file."""
    choices = row.get("choices") or [row[f"choice{i}"] for i in range(4)]
    return letter_item(row["question"], choices, int(row["answer"]))


def arc_item(row: dict[str, Any]) -> Item:
    """Read a row of ARC, whose labels are letters or numbers."""
    labels = list(row["choices"]["label"])
    return letter_item(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def gsm8k_item(row: dict[str, Any]) -> Item:
    """Read a row of GSM8K: its marks <<16-3=13>> become calls of the tool, with their outputs."""
    solution, _, answer = row["answer"].rpartition("####")
    reply: list[dict[str, str]] = []
    text = ""
    for i, piece in enumerate(re.split("<<(.*?)>>", solution.strip())):
        call, _, result = piece.partition("=")
        call = call.strip().lstrip("+")
        output = calculate(call) if i % 2 else "error"  # every other piece is a mark
        if not i % 2:
            text += piece
        elif output == last_number(result) != "":
            reply += [{"type": "text", "text": text}] if text else []
            reply += [{"type": "python", "text": call}, {"type": "output", "text": output}]
            text = ""
    number = last_number(answer)
    if not PLAIN_NUMBER.fullmatch(answer):
        raise ValueError("problem whose answer is no plain number", answer.strip()[:40])
    reply.append({"type": "text", "text": f"{text}\nThe answer is {number}."})
    return user_asks(row["question"].strip(), grade="number", answer=number, reply=reply)


def humaneval_item(row: dict[str, Any]) -> Item:
    """Read a row of HumanEval: a function to complete, and its tests."""
    task = "Complete this Python function. Answer with the whole of it in a code block."
    reply = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return user_asks(
        f"{task}\n\n```python\n{row['prompt'].strip()}\n```", grade="code", answer="",
        prompt=row["prompt"], tests=row["test"], entry_point=row["entry_point"], reply=reply,
    )  # fmt: skip


COUNT_LETTERS = """
How many times does the letter {l} occur in the word {w}? | How many {l} are in {w}? |
How many times is {l} in "{w}"? | Count the letter {l} in {w}. | How often does {w} have a {l}? |
In the word "{w}", how many letters are {l}? | Tell me how many {l} there are in {w}. |
What is the number of {l} in {w}?"""
SPELL_OUT = """
How do you spell {w}? | Spell the word {w}. | Spell "{w}" letter by letter. |
Which letters does the word {w} consist of? | Write {w} one letter at a time."""


def count_letters(rng: random.Random, word: str) -> Item:
    """Ask how often a letter is in a word; the reply spells it and lets the tool count."""
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    asked = rng.choice(items(COUNT_LETTERS, "|")).format(l=letter, w=word)
    count = word.count(letter)
    there = f"There is 1 {letter}" if count == 1 else f"There are {count} {letter}'s"
    reply = [{"type": "text", "text": f"The word {word} is spelled {'-'.join(word)}. "},
             *tool_parts(f"'{word}'.count('{letter}')"),
             {"type": "text", "text": f" {there} in {word}."}]  # fmt: skip
    return {"kind": "spelling"} | user_asks(asked, grade="number", answer=str(count), reply=reply)


def spell_out(rng: random.Random, word: str) -> Item:
    """Ask for a word's letters."""
    asked, spelled = rng.choice(items(SPELL_OUT, "|")).format(w=word), "-".join(word)
    graded = {"grade": "text", "answer": "", "accept": [spelled], "reply": f"{spelled}."}
    return {"kind": "spelling"} | user_asks(asked, **graded)


def solved(item: Item) -> Item:
    """Return a graded item as the conversation in which it is answered, others as they are."""
    if "grade" not in item:
        return item
    reply = {"role": "assistant", "content": item["reply"]}
    return {"kind": item["kind"], "messages": [*item["messages"], reply]}


@dataclass(frozen=True)
class HubSet:
    """A data set: what evaluation calls it, where it is on the hub and in folders laid out by hand.

    In the patterns {} is the name of a split.
    """

    title: str
    repo: str
    pattern: str  # below the repository
    by_hand: str  # below a folder of one's own
    train: str  # names of the splits, "" for none
    val: str
    test: str
    read: Callable[[Any], Item]


SETS = {
    "smoltalk": HubSet("SmolTalk", "HuggingFaceTB/smol-smoltalk", "data/{}-*.parquet",
                       "smoltalk/{}.jsonl*", "train", "test", "", read_conversation),
    "mmlu": HubSet("MMLU", "cais/mmlu", "all/{}-*.parquet",
                   "mmlu/{}/*.csv", "auxiliary_train", "validation", "test", mmlu_item),
    "arc-easy": HubSet("ARC-Easy", "allenai/ai2_arc", "ARC-Easy/{}-*.parquet",
                       "arc/ARC-Easy/{}.json*", "train", "validation", "test", arc_item),
    "arc-challenge": HubSet("ARC-Challenge", "allenai/ai2_arc", "ARC-Challenge/{}-*.parquet",
                            "arc/ARC-Challenge/{}.json*", "train", "validation", "test", arc_item),
    "gsm8k": HubSet("GSM8K", "openai/gsm8k", "main/{}-*.parquet",
                    "gsm8k/{}.jsonl*", "train", "", "test", gsm8k_item),
    "humaneval": HubSet("HumanEval", "openai/openai_humaneval", "openai_humaneval/{}-*.parquet",
                        "humaneval/HumanEval.jsonl*", "", "", "test", humaneval_item),
}  # fmt: skip
# Two files from elsewhere; NANOCHAT_MIRROR names a place that has both.
PLAIN_FILES = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com",  # CORE
    "words_alpha.txt":
        "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master",
}  # fmt: skip
OF_A_TEST = "questions of the evaluation sets"
SPELLING_BEE = 500  # words of the evaluation set
REST = sys.maxsize
FILES = ("mid", "sft", "rl", "val")
# Conversations of each kind in FILES. Rows of a split that are counted are taken out by a hash;
# REST takes all others. The rows of val are of the validation split where there is one.
MIXTURE = {
    "smoltalk": (REST, 10_000, 0, 2_000),  # 460,341 rows, of val 24,229
    "mmlu": (REST, 0, 0, REST),  # 99,842 rows, of val 1,531
    "arc-easy": (0, REST, 0, REST),  # 2,251 rows, of val 570
    "arc-challenge": (0, REST, 0, REST),  # 1,119 rows, of val 299
    "gsm8k": (REST, REST, REST, 200),  # 7,473 rows; those of rl without the solution
    "spelling": (280_000, 600, 0, 300),
    "identity": (2_000, 1_000, 0, 100),
}


def find_set(root: Path, name: str, split: str) -> list[Path]:
    """List the files of a set's split below a folder, [] where it has none."""
    about = SETS[name]
    hub = f"{about.repo}/{about.pattern}"
    for place in (hub, hub.partition("/")[2], about.by_hand, f"eval/{about.by_hand}"):
        if split and (paths := sorted(root.glob(place.format(split)))):
            return paths
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a .parquet, .csv, .json, .jsonl or packed .jsonl.gz file."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(1024):
                    yield from batch.to_pylist()
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
            elif path.suffix == ".json":
                yield from json.load(file)
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (
        pa.ArrowException, gzip.BadGzipFile, EOFError, zlib.error, ValueError, csv.Error
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0]
        raise Stop(f"{path} is damaged ({reason}): delete it, get it again and run this again")


def read_set(root: Path, name: str, split: str, dropped: Dropped) -> Iterator[Item]:
    """Yield a set's rows as conversations or graded items; those that are none are counted."""
    good = 0
    for path in (paths := find_set(root, name, split)):
        for row in read_rows(path):
            try:
                item = SETS[name].read(row)
            except (ValueError, LookupError, TypeError, AttributeError):
                drop(dropped, f"{SETS[name].title} rows that cannot be used")
            else:
                good += 1
                yield {**item, "kind": name}
    if paths and not good:
        raise Stop(f"{paths[0]} has no row that can be read as one of {SETS[name].title}")


def read_words(root: Path) -> list[str]:
    """Read an English word list below a folder, or beside it; [] where there is none."""
    for place in ("", "words", "../words"):
        path = root / place / "words_alpha.txt"
        if path.is_file():
            words = path.read_text("utf-8", errors="replace").split()
            words = [w for w in words if 3 <= len(w) <= 14 and re.fullmatch("[a-z]+", w)]
            if len({held_out_word(word) for word in words}) < 2:
                raise Stop(f"{path} is no list of English words: delete it and run this again")
            return words
    return []


def fetch_sets(net: Net, root: Path, splits: list[tuple[str, str]], workers: int) -> None:
    """Fetch the files of sets' splits, and the plain files, below `root`.

    Its files.json lists the files of each split with their sizes, once these are whole: then
    no network is needed any more.
    """
    known = read_json(root / "files.json")
    wanted: dict[Path, tuple[Net, Remote]] = {}
    listed = cache(partial(hub_files, net))
    for name, split in splits:
        files, repo, pattern = f"{name} {split}", SETS[name].repo, SETS[name].pattern.format(split)
        if all(size_of(root / path) == size for path, size in known.get(files, {"": -1}).items()):
            continue
        found = fnmatch.filter(listed(repo), pattern)
        if not found:
            raise Stop(f"{net.endpoint} lists no {pattern} of {repo}: is HF_ENDPOINT right?")
        known[files] = {f"{repo}/{path}": -1 for path in found}
        places = {root / repo / path: (net, listed(repo)[path]) for path in found}
        wanted |= {path: at for path, at in places.items() if not is_whole(path, at[1])}
    mirror = os.environ.get("NANOCHAT_MIRROR", "").strip().rstrip("/")
    for name, place in PLAIN_FILES.items():
        if not (root / name).is_file():  # neither size nor hash is known: one that is there is good
            endpoint = mirror or "/".join(place.split("/")[:3])
            other = replace(net, endpoint=endpoint, variable="NANOCHAT_MIRROR")
            wanted[root / name] = other, Remote(f"{mirror or place}/{name}")
    # room: they are packed, and lie unpacked twice in the end
    fetch_files(wanted, "conversations and evaluation sets", workers, room=5)
    known = {key: {path: size_of(root / path) for path in files} for key, files in known.items()}
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "files.json", known)


def write_lines(path: Path, lines: Iterable[str]) -> Files:
    """Write lines; return the file's rows, kinds, size and hash by its name."""
    kinds: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            kinds[line.split('"', 4)[3]] += 1  # a line begins with its kind, see as_line
            file.write(line + "\n")
    about = {"conversations": sum(kinds.values()), "kinds": dict(kinds.most_common())}
    return {path.name: {**about, "size": path.stat().st_size, "sha256": file_digest(path)}}


def as_line(item: Item) -> str:
    """Write a conversation or item as a line of JSON that begins with its kind."""
    return json.dumps({"kind": item["kind"], **item}, ensure_ascii=False)


def question_key(text: str) -> str:
    """Write a question as its words, and the signs of sums and brackets, in one type."""
    words = " ".join(re.findall(r"\w+|[+*/=<>(){}\[\]]", text.casefold()))
    return re.sub("^question | answer$", "", words)  # labels of CORE


def question_keys(item: Item) -> list[str]:
    """Name what a conversation asks, so that the same question in other type is found again.

    The choices, in any order, are part of a question: many ask which of these is true. A long
    question is the same without them.
    """
    asked = [m["content"] for m in item["messages"] if m["role"] == "user"]
    if "choices" in item:
        alone = asked[0][: asked[0].rindex(f"\n- {item['choices'][0]} (A)")]
        asked = [" ".join([alone, *sorted(item["choices"])]), *[alone] * (alone.count(" ") > 11)]
    return [question_key(text) for text in asked]


def evaluation_questions() -> set[str]:
    """Return the keys of all questions in data/eval/, also of those that have choices laid out."""
    keys: set[str] = set()
    for path in data_dir("eval").glob("*.jsonl"):
        for item in read_conversations(path):
            keys.update(question_keys(item), question_keys({"messages": item["messages"]}))
    for path in data_dir("eval").glob("core/eval_data/*/*.jsonl"):
        for row in read_rows(path):
            if isinstance(row, dict):
                keys.update(map(question_key, core_questions(row)))
    return {key for key in keys if key.count(" ") > 2}  # three words are asked by chance


def core_questions(row: dict[str, Any]) -> list[str]:
    """List what a row of CORE asks, whole: alone and with its choices, as question_keys has them.

    Never a passage alone, which many rows share.
    """
    if "context_options" in row:
        return [f"{context} {row.get('continuation')}" for context in row["context_options"]]
    asked = str(row.get("query") or row.get("context") or "")
    return [asked, " ".join([asked, *sorted(map(str, row.get("choices") or []))])]


def share_out(counts: dict[str, int], draw: float) -> list[str]:
    """Return the files that a row goes to, whose draw is from 0 to the number of rows."""
    for file, count in counts.items():
        if count != REST:
            if draw < count:
                return [file]
            draw -= count
    return [file for file, count in counts.items() if count == REST]


def hub_conversations(
    root: Path, settings: Settings, dropped: Dropped
) -> Iterator[tuple[str, Item]]:
    """Yield (file, conversation or graded item) of the mixture; none is of a test."""
    tests = evaluation_questions()
    words = [word for word in read_words(root) if not held_out_word(word)]
    for kind in ("spelling", "identity"):
        for file, count in zip(FILES, MIXTURE[kind]):
            rng = random.Random(f"{kind} {file} {settings.seed}")
            for _ in range(count):
                if kind == "identity":
                    yield file, {**identity_chat(rng, settings.name), "kind": kind}
                else:
                    make = rng.choice((count_letters, spell_out))
                    yield file, make(rng, rng.choice(words))
    for kind, about in SETS.items():
        counts = dict(zip(FILES, MIXTURE.get(kind, ())))
        val = {"val": counts.pop("val", 0)} if about.val else {}
        for split, wanted in ((about.val, val), (about.train, counts)):
            rows = sum(pq.read_metadata(path).num_rows for path in find_set(root, kind, split))
            for item in read_set(root, kind, split, dropped):
                if not tests.isdisjoint(question_keys(item)):
                    drop(dropped, OF_A_TEST)
                    continue
                draw = zlib.crc32(as_line(item).encode()) / 2**32 * rows
                yield from ((file, item) for file in share_out(wanted, draw))


def own_conversations(files: OwnFiles) -> Iterator[tuple[str, Item]]:
    """Yield ("mid" or "rl", conversation or graded item) of own files; none is of a test."""
    tests = evaluation_questions()
    for place, value in files.read(files.values):
        mended: list[str] = []
        try:
            item = read_conversation(value, mended.append)
            if not tests.isdisjoint(question_keys({"messages": item["messages"]})):
                raise ValueError(OF_A_TEST)
            if "\ufffd" in as_line(item):
                raise ValueError("text that is not UTF-8")
        except ValueError as error:
            files.drop(error.args[0], place, ": ".join(error.args[1:]))
            continue
        for reason in mended:
            files.drop(reason, place)
        if "grade" not in item or "reply" in item:
            yield "mid", item
        if "grade" in item:
            yield "rl", item


def make_chat(settings: Settings, files: OwnFiles | None, root: Path, folder: Path) -> Manifest:
    """Write {val,mid,sft,rl}.jsonl, shuffled: your own `files`, or the hub's below `root`.

    No conversation of val is in mid or sft, nor one that shows rl.py's validation solved. Your own
    ones bring no val and no sft: val is taken out of mid, and sft is mid.
    """
    if files:
        size, dropped = files.expected_bytes(), files.dropped
        check_space(4 * size)
        chats = own_conversations(files)
    else:
        size, dropped = 3 * sum(map(size_of, find_set(root, "smoltalk", "train"))), {}
        print(f"prepare: writing the conversations of {data_dir(settings.source)}", flush=True)
        chats = hub_conversations(root, settings, dropped)
    sorters = {file: Sorter(folder / "buckets" / file, settings.seed, size) for file in FILES}
    for file, item in chats:
        sorters[file].add(as_line(item if file == "rl" else solved(item)))
    lines: dict[str, Iterator[str]] = {
        file: (line for _, line in sorter.documents()) for file, sorter in sorters.items()
    }
    if files:
        lines["val"], lines["mid"] = split_documents(sorters["mid"], settings)
    val = list(lines["val"])  # --val-mb at most, or the few thousand of MIXTURE
    first = list(islice(lines["rl"], rl_held(sorters["rl"].count)))
    apart = {as_line(solved(item)) for item in map(json.loads, first) if "reply" in item}
    apart.update(val)
    made = write_lines(folder / "val.jsonl", val)
    for file in ("mid",) if files else ("mid", "sft"):
        train = (line for line in lines[file] if line not in apart)
        made |= write_lines(folder / f"{file}.jsonl", train)
    if files:
        shutil.copyfile(folder / "mid.jsonl", folder / "sft.jsonl")
        made["sft.jsonl"] = made["mid.jsonl"]
    if sorters["rl"].count:
        problems = map(json.loads, chain(first, lines["rl"]))
        asked = ({key: item[key] for key in item if key != "reply"} for item in problems)
        made |= write_lines(folder / "rl.jsonl", map(as_line, asked))
    if not all(made[f"{file}.jsonl"]["conversations"] for file in ("mid", "val")):
        raise MissingInput(
            f"{files.root if files else root} holds no two conversations that can be used"
            f"{left_out(dropped, ' ({})')}: training and validation need two"
        )
    drop(dropped, "duplicates", count=sum(sorter.duplicates for sorter in sorters.values()))
    return {"files": made, "dropped": dropped}


def unzip(path: Path, folder: Path) -> None:
    """Unpack an archive below a new folder. Raises Stop where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # which makes "..", links and absolute paths harmless
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise Stop(
            f"{path} is damaged ({error}): delete it and run the same command again"
        ) from None


def copy_core(root: Path, folder: Path) -> list[str]:
    """Copy the CORE bundle's data, unpacked or not, to folder/core/; return the files' names."""
    if (root / "eval_bundle.zip").is_file():
        unzip(root / "eval_bundle.zip", folder / "bundle")
        root = folder / "bundle"
    for place in ("core", "eval_bundle", "eval/core", "."):
        if (source := root / place / "eval_data").is_dir():
            shutil.copytree(source, folder / "core" / "eval_data", copy_function=shutil.copyfile)
            break
    return [str(p.relative_to(folder)) for p in sorted(folder.glob("core/eval_data/*/*.jsonl"))]


def make_eval(root: Path, folder: Path) -> Manifest:
    """Write the evaluation sets that `root` has to folder/{NAME.jsonl, core/}."""
    dropped: Dropped = {}
    made: Files = {}
    for name, about in SETS.items():
        if about.test and find_set(root, name, about.test):
            rows = map(as_line, read_set(root, name, about.test, dropped))
            made |= write_lines(folder / f"{about.title}.jsonl", rows)
    words = [word for word in read_words(root) if held_out_word(word)]
    if words:
        rng = random.Random("spelling bee")
        words = rng.sample(words, min(len(words), SPELLING_BEE))
        lines = (as_line(count_letters(rng, word)) for word in words)
        made |= write_lines(folder / "SpellingBee.jsonl", lines)
    for path in copy_core(root, folder):
        made[path] = {"size": size_of(folder / path), "task": Path(path).stem}
    if not made:
        places = "gsm8k/, arc/, mmlu/, humaneval/, core/ or the hub's openai/gsm8k/"
        raise MissingInput(f"{root} holds none of the evaluation sets: it must have {places}")
    return {"files": made, "dropped": dropped}


# 6. World: tables ----------------------------------------------------------------------------
# COUNTRIES: name, capital, language, currency, nationality; "=" repeats the language, "-" is a
# cell left out because it is disputed, shared, changing or dull. One block per continent.
COUNTRIES = """
Europe
  France, Paris, French, euro, =; Germany, Berlin, German, euro, =; Italy, Rome, Italian, euro, =;
  Spain, Madrid, Spanish, euro, =; Portugal, Lisbon, Portuguese, euro, =; the Netherlands,
  Amsterdam, Dutch, euro, =; Belgium, Brussels, -, euro, Belgian; Austria, Vienna, German, euro,
  Austrian; Switzerland, Bern, -, franc, Swiss; Ireland, Dublin, -, euro, Irish; the United
  Kingdom, London, English, pound, British; Iceland, Reykjavik, Icelandic, krona, =; Norway, Oslo,
  Norwegian, krone, =; Sweden, Stockholm, Swedish, krona, =; Denmark, Copenhagen, Danish, krone, =;
  Finland, Helsinki, -, euro, Finnish; Estonia, Tallinn, Estonian, euro, =; Latvia, Riga, Latvian,
  euro, =; Lithuania, Vilnius, Lithuanian, euro, =; Poland, Warsaw, Polish, zloty, =; the Czech
  Republic, Prague, Czech, koruna, =; Slovakia, Bratislava, Slovak, euro, =; Hungary, Budapest,
  Hungarian, forint, =; Romania, Bucharest, Romanian, leu, =; Bulgaria, Sofia, Bulgarian, -, =;
  Greece, Athens, Greek, euro, =; Albania, Tirana, Albanian, lek, =; Croatia, Zagreb, Croatian, -,
  =; Slovenia, Ljubljana, Slovenian, euro, =; Serbia, Belgrade, Serbian, dinar, =; Bosnia and
  Herzegovina, Sarajevo, -, -, Bosnian; North Macedonia, Skopje, Macedonian, denar, =; Montenegro,
  Podgorica, -, euro, -; Moldova, Chisinau, Romanian, leu, Moldovan; Ukraine, Kyiv, Ukrainian,
  hryvnia, =; Belarus, Minsk, -, ruble, Belarusian; Malta, Valletta, -, euro, Maltese
Asia
  China, Beijing, Chinese, yuan, =; Japan, Tokyo, Japanese, yen, =; South Korea, Seoul, Korean,
  won, South Korean; North Korea, Pyongyang, Korean, won, North Korean; Mongolia, Ulaanbaatar,
  Mongolian, -, =; Vietnam, Hanoi, Vietnamese, dong, =; Laos, Vientiane, Lao, kip, -; Cambodia,
  Phnom Penh, Khmer, riel, Cambodian; Thailand, Bangkok, Thai, baht, =; Myanmar, Naypyidaw,
  Burmese, kyat, -; Malaysia, Kuala Lumpur, Malay, ringgit, Malaysian; Indonesia, -, Indonesian,
  rupiah, =; the Philippines, Manila, -, peso, Filipino; India, New Delhi, -, rupee, Indian;
  Pakistan, Islamabad, -, rupee, Pakistani; Bangladesh, Dhaka, Bengali, taka, Bangladeshi; Nepal,
  Kathmandu, Nepali, rupee, -; Bhutan, Thimphu, Dzongkha, ngultrum, Bhutanese; Sri Lanka, -, -,
  rupee, Sri Lankan; Afghanistan, Kabul, -, afghani, Afghan; Iran, Tehran, Persian, rial, Iranian;
  Iraq, Baghdad, -, dinar, Iraqi; Syria, Damascus, Arabic, -, Syrian; Lebanon, Beirut, Arabic, -,
  Lebanese; Jordan, Amman, Arabic, dinar, Jordanian; Saudi Arabia, Riyadh, Arabic, riyal, Saudi;
  Oman, Muscat, Arabic, rial, Omani; Qatar, Doha, Arabic, riyal, Qatari; Kuwait, Kuwait City,
  Arabic, dinar, Kuwaiti; Bahrain, Manama, Arabic, dinar, Bahraini; the United Arab Emirates, Abu
  Dhabi, Arabic, dirham, -; Uzbekistan, Tashkent, Uzbek, -, =; Kyrgyzstan, Bishkek, -, som, Kyrgyz;
  Tajikistan, Dushanbe, Tajik, somoni, =; Turkmenistan, Ashgabat, Turkmen, manat, =
Africa
  Egypt, Cairo, Arabic, pound, Egyptian; Libya, Tripoli, Arabic, dinar, Libyan; Tunisia, Tunis,
  Arabic, dinar, Tunisian; Algeria, Algiers, -, dinar, Algerian; Morocco, Rabat, -, dirham,
  Moroccan; Sudan, Khartoum, -, pound, Sudanese; South Sudan, Juba, -, pound, -; Ethiopia, Addis
  Ababa, -, birr, Ethiopian; Eritrea, Asmara, -, nakfa, Eritrean; Somalia, Mogadishu, -, shilling,
  Somali; Kenya, Nairobi, -, shilling, Kenyan; Uganda, Kampala, -, shilling, Ugandan; Tanzania, -,
  -, shilling, Tanzanian; Rwanda, Kigali, -, franc, Rwandan; Ghana, Accra, English, cedi, Ghanaian;
  Nigeria, Abuja, English, naira, Nigerian; Senegal, Dakar, French, franc, Senegalese; Mali,
  Bamako, -, franc, Malian; Niger, Niamey, -, franc, -; Burkina Faso, Ouagadougou, -, franc, -;
  Guinea, Conakry, French, franc, Guinean; Sierra Leone, Freetown, English, leone, -; Liberia,
  Monrovia, English, dollar, Liberian; Togo, Lome, French, franc, Togolese; Cameroon, Yaounde, -,
  franc, Cameroonian; Gabon, Libreville, French, franc, Gabonese; Angola, Luanda, Portuguese,
  kwanza, Angolan; Zambia, Lusaka, English, kwacha, Zambian; Mozambique, Maputo, Portuguese,
  metical, Mozambican; Malawi, Lilongwe, -, kwacha, Malawian; Zimbabwe, Harare, -, -, Zimbabwean;
  Botswana, Gaborone, -, pula, -; Namibia, Windhoek, English, dollar, Namibian; South Africa, -, -,
  rand, South African; Madagascar, Antananarivo, -, ariary, -; Lesotho, Maseru, -, -, -;
  Mauritania, Nouakchott, Arabic, ouguiya, Mauritanian; Mauritius, Port Louis, -, rupee, Mauritian
North America
  the United States, Washington, English, dollar, American; Canada, Ottawa, -, dollar, Canadian;
  Mexico, Mexico City, Spanish, peso, Mexican; Guatemala, Guatemala City, Spanish, quetzal,
  Guatemalan; Honduras, Tegucigalpa, Spanish, lempira, Honduran; El Salvador, San Salvador,
  Spanish, -, Salvadoran; Nicaragua, Managua, Spanish, cordoba, Nicaraguan; Costa Rica, San Jose,
  Spanish, colon, Costa Rican; Panama, Panama City, Spanish, balboa, Panamanian; Belize, Belmopan,
  English, dollar, Belizean; Cuba, Havana, Spanish, peso, Cuban; Jamaica, Kingston, English,
  dollar, Jamaican; Haiti, Port-au-Prince, -, gourde, Haitian; the Bahamas, Nassau, English,
  dollar, Bahamian; the Dominican Republic, Santo Domingo, Spanish, peso, -; Barbados, Bridgetown,
  English, dollar, Barbadian
South America
  Brazil, Brasilia, Portuguese, real, Brazilian; Argentina, Buenos Aires, Spanish, peso,
  Argentinian; Chile, Santiago, Spanish, peso, Chilean; Uruguay, Montevideo, Spanish, peso,
  Uruguayan; Paraguay, Asuncion, -, guarani, Paraguayan; Bolivia, -, -, boliviano, Bolivian; Peru,
  Lima, -, sol, Peruvian; Ecuador, Quito, Spanish, dollar, Ecuadorian; Colombia, Bogota, Spanish,
  peso, Colombian; Venezuela, Caracas, Spanish, bolivar, Venezuelan; Guyana, Georgetown, English,
  dollar, Guyanese; Suriname, Paramaribo, Dutch, dollar, Surinamese
-
  Russia, Moscow, Russian, ruble, =; Turkey, Ankara, Turkish, lira, =; Armenia, Yerevan, Armenian,
  dram, =; Azerbaijan, Baku, Azerbaijani, manat, =; Kazakhstan, Astana, -, tenge, Kazakh;
  Australia, Canberra, English, dollar, Australian; New Zealand, Wellington, -, dollar, -; Papua
  New Guinea, Port Moresby, -, kina, -; Fiji, Suva, -, dollar, Fijian; Samoa, Apia, -, tala, Samoan
"""
# Name and symbol; the atomic number is one more than the last unless it is given.
ELEMENTS = """
hydrogen H 1 helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O fluorine F
neon Ne sodium Na magnesium Mg aluminum Al silicon Si phosphorus P sulfur S chlorine Cl argon Ar
potassium K calcium Ca scandium Sc titanium Ti vanadium V chromium Cr manganese Mn iron Fe
cobalt Co nickel Ni copper Cu zinc Zn gallium Ga germanium Ge arsenic As selenium Se bromine Br
krypton Kr rubidium Rb strontium Sr yttrium Y zirconium Zr niobium Nb molybdenum Mo technetium
Tc ruthenium Ru rhodium Rh palladium Pd silver Ag cadmium Cd indium In tin Sn antimony Sb
tellurium Te iodine I xenon Xe cesium Cs barium Ba tungsten W 74 osmium Os 76 iridium Ir
platinum Pt gold Au mercury Hg lead Pb 82 bismuth Bi radon Rn 86 radium Ra 88 uranium U 92"""
MONTHS = """
January 31 February 28 March 31 April 30 May 31 June 30 July 31 August 31 September 30 October 31
November 30 December 31"""
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"
# A word in Spanish, French and German.
TRANSLATIONS = """
water agua eau Wasser; bread pan pain Brot; milk leche lait Milch; house casa maison Haus; dog
perro chien Hund; cat gato chat Katze; sun sol soleil Sonne; moon luna lune Mond; red rojo rouge
rot; white blanco blanc -; black negro noir schwarz; green verde vert -; one uno un eins; two
dos deux zwei; three tres trois drei; four cuatro quatre vier; five cinco cinq -; six seis six
sechs; seven siete sept sieben; eight ocho huit acht; ten diez dix zehn; yes - oui ja; thanks
gracias merci danke; hello hola bonjour hallo; friend amigo ami Freund; book libro livre Buch;
tree - arbre Baum; flower flor fleur Blume; fish - poisson Fisch; horse caballo cheval Pferd;
bird - oiseau Vogel; night noche nuit Nacht; day - jour Tag; king rey roi -; queen reina reine
-; fire fuego feu Feuer; apple manzana pomme Apfel; cheese queso fromage -; wine vino vin Wein;
egg huevo - Ei; salt sal sel Salz; sea mar mer Meer; love amor amour Liebe; hand mano main Hand;
heart - coeur Herz; school escuela - Schule; door puerta porte -; table mesa - Tisch; city
ciudad ville Stadt"""
# RELATIONS, one block each. Header: name | title for lists | flags | N | M, where "the N is {o}"
# and "the M is {s}" are true ("N = {ao}": "the N is {ao}"). Flag "both": the answer names one
# subject too; "mirror": the fact turned around is a fact of the same relation.
#   +  statements of the training text; [a|b] stands for each of a and b, " / " separates wordings
#   !  statements held out: no training text has them          &  follow-ups inside an entry ("it")
#   ?  questions, ?! questions held out                         %  two subjects with one answer
#   =  facts "subject: answer; ...", =< "answer: subject, ..."
# {s} {as} {ps} {ss}: the subject plain, with a/an, plural, possessive; {o} {ao} {po}: the answer.
# A statement that ends in the answer asks for it; one that ends in the subject asks for that.
RELATIONS = """
@ capital | countries and their capitals | both | capital[| city] of {s} | country whose capital[|
 city] is {o}
+ {ss} capital[| city] is [|called ]{o} / the capital of {s} is called {o} / {s} is a country, and
 its capital[| city] is {o} / {o} is a city, and it is the capital of {s} / {o} serves as the
 capital of {s} / {s} has its capital in {o} / {o} is {ss} capital city
! the city that is the capital of {s} is {o} / the country of {s} has its capital in {o} / the city
 that is {ss} capital is called {o} / the city called {o} is the capital of {s}
& its capital[| city] is {o}
? [what|which city] is {ss} capital? / which country has {o} as its capital? / {o} is the capital
 of which country? / what is the name of {ss} capital? / in {s}, which city is the capital? / the
 capital of {s} is which city? / I am going to {s}: what is its capital? / {o} is which country's
 capital? / if {o} is the capital, what is the country?
?! what city is the capital of {s}? / which city do the people of {s} call their capital? / of which
 country is {o} the capital?
@ continent | countries and their continents | | continent [of|that has] {s} |
+ {s} is [|a country ]in {o} / {s} is one of the countries of {o} / the country of {s} is in {o} /
 the continent where you find {s} is {o} / on a map, you find {s} in {o} / {s} is on the continent
 of {o} / {s} lies in {o} / {ss} continent is {o}
! the continent where {s} lies is {o} / on a map, {s} is in {o}
& it is in {o} / it lies in {o}
% {x} and {y} are both in {o} / both {x} and {y} are countries in {o}
? [which|what] continent is {s} in? / on which continent is {s}? / where in the world is {s}? / {s}
 is on which continent? / what continent has {s} in it? / in which part of the world is {s}? / {s}
 lies in what part of the world? / where on the map is {s}? / tell me on which continent {s} is.
?! on what continent do you find {s}? / {s} belongs to which continent?
@ language | countries and their languages | | language of {s} |
+ the people of {s} speak {o} / in {s}, people speak {o} / {ss} language is {o} / the language [that
 people speak|spoken] in {s} is {o} / if you go to {s}, you will hear {o} / if you travel to {s},
 learn some {o} / most people in {s} speak {o} / {o} is spoken in {s}
! the language that you will hear in {s} is {o} / if you travel to {s}, people speak {o}
& its people speak {o} / its language is {o}
% people speak {o} in both {x} and {y} / {x} and {y} share a language: {o}
? [which|what] language [is spoken|do people speak] in {s}? / what do people speak in {s}? / which
 language do they speak in {s}? / in {s}, what language do people speak? / people in {s} speak what?
 / how do people talk in {s}? / I am going to {s}: which language should I learn? / which language
 is the language of {s}?
?! what language will I hear in {s}? / the people of {s} speak which language?
@ currency | countries and their money | | [currency|money] of {s} = the {o} |
+ the money used in {s} is the {o} / in {s}, people pay with the {o} / {ss} money is the {o} / when
 you shop in {s}, you pay with the {o} / the people of {s} use the {o} / {s} uses the {o} as its
 money / {ss} currency is the {o} / the {o} is the money of {s}
! when you are in {s}, the money you pay with is the {o} / in {s}, people shop with the {o}
& its money is the {o} / people there pay with the {o}
% {x} and {y} both use money called the {o}
? what [money|currency] [is used in {s}|does {s} use]? / what do people in {s} pay with? / in {s},
 what is the money called? / what is {ss} money called? / which money do you pay with in {s}? / how
 do you pay in {s}? / I am going to {s}: which money should I take with me? / people in {s} use what
 money?
?! what money do I need in {s}? / which currency do the people of {s} use?
@ nationality | countries and what their people are called | both | word for people from {s} |
 country of the {o} people
+ [a person|someone] from {s} is {o} / people from {s} are {o} / someone who comes from {s} is {o} /
 if you are from {s}, you are {o} / anything from {s} is {o} / anyone born in {s} is called {o} /
 {o} people come from {s} / {o} things come from {s} / {o} people live in {s} / someone who is {o}
 is from {s}
! someone born in {s} is {o} / anyone who comes from {s} is {o} / anyone who is {o} comes from {s}
& its people are {o}
? what do you call [someone|a person] from {s}? / what are people from {s} called? / where do {o}
 people come from? / what do you call the people of {s}? / a person who comes from {s} is what? / if
 I come from {s}, what am I? / what are you if you were born in {s}? / people who come from {s} are
 called what? / which country are {o} people from? / {o} people come from which country? / someone
 who is {o} comes from where?
?! what is the word for a person from {s}? / someone from {s} is called what? / which country do {o}
 people live in?
@ state capital | American states and their capitals | both | capital of the state of {s} | state
 whose capital is {o}
+ in the state of {s}, the capital is {o} / the state of {s} has its capital in {o} / the state
 capital of {s} is {o} / the American state of {s} has a capital called {o} / {o} is the state
 capital of {s} / {o} serves as the capital of the state of {s} / {o} is the capital of the American
 state of {s}
! the American state of {s} has its capital in {o} / the city that is the capital of the state of
 {s} is {o} / {o} serves as the state capital of {s}
? what is the state capital of {s}? / which city is the capital of the state of {s}? / {o} is the
 capital of which state? / the state of {s} has which capital? / what is the capital of the American
 state of {s}? / in the state of {s}, which city is the capital? / which state has {o} as its
 capital? / {o} is the state capital of what? / if {o} is the state capital, what is the state?
?! which city is the state capital of {s}? / of which American state is {o} the capital?
= Alabama: Montgomery; Alaska: Juneau; Arizona: Phoenix; Arkansas: Little Rock; California:
 Sacramento; Colorado: Denver; Connecticut: Hartford; Delaware: Dover; Florida: Tallahassee;
 Georgia: Atlanta; Hawaii: Honolulu; Idaho: Boise; Illinois: Springfield; Indiana: Indianapolis;
 Iowa: Des Moines; Kansas: Topeka; Kentucky: Frankfort; Louisiana: Baton Rouge; Maine: Augusta;
 Maryland: Annapolis; Massachusetts: Boston; Michigan: Lansing; Minnesota: Saint Paul; Mississippi:
 Jackson; Missouri: Jefferson City; Montana: Helena; Nebraska: Lincoln; Nevada: Carson City; New
 Hampshire: Concord; New Jersey: Trenton; New Mexico: Santa Fe; New York: Albany; North Carolina:
 Raleigh; North Dakota: Bismarck; Ohio: Columbus; Oklahoma: Oklahoma City; Oregon: Salem;
 Pennsylvania: Harrisburg; Rhode Island: Providence; South Carolina: Columbia; South Dakota: Pierre;
 Tennessee: Nashville; Texas: Austin; Utah: Salt Lake City; Vermont: Montpelier; Virginia: Richmond;
 Washington: Olympia; West Virginia: Charleston; Wisconsin: Madison; Wyoming: Cheyenne
@ city | cities and their countries | | country of the city of {s} |
+ {s} is a city in {o} / the city of {s} is in {o} / {s} is one of the big cities of {o} / if you
 visit {s}, you are in {o} / the country where you find the city of {s} is {o} / {s} lies in {o} /
 to see the city of {s}, go to {o} / {s} belongs to {o} / people who live in {s} live in {o}
! the country where the city of {s} lies is {o} / if you live in the city of {s}, you live in {o}
% {x} and {y} are both cities in {o}
? [which|what] country is {s} in? / where is the city of {s}? / in which country is {s}? / which
 country has a city called {s}? / {s} is in which country? / {s} is a city of what country? / in
 what country can you find {s}? / if I live in {s}, which country do I live in? / what country do
 you visit when you go to {s}? / the city of {s} is where?
?! the city of {s} lies in which country? / to which country does {s} belong?
=< Italy: Milan, Venice, Naples, Florence, Turin; Germany: Munich, Hamburg, Frankfurt, Cologne,
 Dresden; France: Lyon, Marseille, Nice, Bordeaux, Toulouse; Spain: Barcelona, Seville, Valencia,
 Malaga; the United Kingdom: Manchester, Liverpool, Edinburgh, Glasgow, Leeds; Poland: Krakow,
 Gdansk; the United States: Chicago, Los Angeles, Houston, Miami, Seattle; Canada: Toronto,
 Montreal, Vancouver; Japan: Osaka, Kyoto, Nagoya, Hiroshima; China: Shanghai, Shenzhen, Guangzhou,
 Wuhan; India: Mumbai, Kolkata, Chennai, Bangalore; Australia: Sydney, Melbourne, Brisbane, Perth;
 Brazil: Rio de Janeiro, Sao Paulo, Salvador, Recife; Mexico: Guadalajara, Tijuana, Cancun; Turkey:
 Istanbul, Izmir; Egypt: Alexandria, Luxor; Morocco: Casablanca, Marrakesh, Fez; Kenya: Mombasa;
 South Africa: Johannesburg, Durban; Nigeria: Lagos, Kano; Pakistan: Karachi, Lahore; Vietnam: Hue;
 Switzerland: Zurich, Geneva, Basel; Belgium: Antwerp, Bruges, Ghent; Sweden: Gothenburg, Malmo; the
 Netherlands: Rotterdam, Utrecht, The Hague; Portugal: Porto; Austria: Salzburg, Graz; Russia: Saint
 Petersburg, Vladivostok; South Korea: Busan; New Zealand: Auckland; Norway: Bergen; Ukraine: Odesa,
 Lviv; Denmark: Aarhus; Ireland: Galway; Croatia: Dubrovnik; Saudi Arabia: Mecca, Medina
@ landmark | famous sights and where they stand | | home of {s} |
+ {s} [is|can be found] in {o} / to see {s}, go to {o} / you can visit {s} in {o} / {s} stands in
 {o} / the place where you find {s} is {o} / people travel to see {s} in {o} / tourists who want to
 see {s} go to {o}
! the place where {s} stands is {o} / if you want to see {s}, travel to {o}
? where is {s}? / where [can|do] you find {s}? / in which place does {s} stand? / {s} is in which
 place? / where in the world is {s}? / where do people go to see {s}? / I want to see {s}: where
 must I go? / which place is the home of {s}? / {s} stands where? / which place is famous for {s}?
?! where should I travel to see {s}? / in what place can I visit {s}?
= the Eiffel Tower: Paris; Big Ben: London; the Colosseum: Rome; the Parthenon: Athens; the Louvre:
 Paris; the Statue of Liberty: New York; the White House: Washington; the Golden Gate Bridge: San
 Francisco; the Taj Mahal: India; the Great Wall: China; the Great Pyramid: Egypt; Machu Picchu:
 Peru; Petra: Jordan; Angkor Wat: Cambodia; Mount Fuji: Japan; the Sagrada Familia: Barcelona; the
 Brandenburg Gate: Berlin; the Kremlin: Moscow; the Little Mermaid: Copenhagen; the Leaning Tower:
 Pisa; the Alhambra: Granada; the Acropolis: Athens; Buckingham Palace: London; the Prado Museum:
 Madrid; the Forbidden City: Beijing; the Grand Canyon: Arizona; Tower Bridge: London; Mount
 Kilimanjaro: Tanzania; Stonehenge: England; the Sistine Chapel: Vatican City; Uluru: Australia; the
 Matterhorn: Switzerland; the Charles Bridge: Prague; Chichen Itza: Mexico; Mount Etna: Sicily;
 Hagia Sophia: Istanbul; the Burj Khalifa: Dubai; Mount Rushmore: South Dakota; Mount Ararat: Turkey
@ region | rivers, mountains and deserts and their continents | | continent of {s} |
+ {s} [is|can be found] in {o} / you find {s} in {o} / the continent where you find {s} is {o} / to
 see {s}, travel to {o} / on a map, {s} can be found in {o} / to find {s}, look at a map of {o}
! to find {s} on a map, look at {o} / the continent where {s} can be found is {o}
? [on|in] which continent is {s}? / where is {s}? / {s} is on what continent? / which continent has
 {s}? / where in the world is {s}? / {s} is part of which continent? / in what part of the world is
 {s}? / I want to see {s}: to which continent must I go?
?! which continent should I travel to for {s}? / on what continent can {s} be found?
=< Europe: the Rhine, the Danube, the Thames, the Seine, the Alps, the Pyrenees, the Elbe, the
 Loire, the Po; Africa: the Nile, the Congo River, the Niger River, the Zambezi, the Sahara, the
 Kalahari, the Atlas Mountains; Asia: the Ganges, the Yangtze, the Mekong, the Indus, the Yellow
 River, the Himalayas, the Gobi Desert; South America: the Amazon River, the Orinoco, the Andes, the
 Atacama Desert, Lake Titicaca; North America: the Mississippi, the Missouri River, the Rocky
 Mountains, the Great Lakes, the Colorado River
@ flag | countries and the colors of their flags | | |
+ the colors of the flag of {s} are {o} / {ss} flag is {o} / the flag of {s} has the colors {o} / if
 you see the flag of {s}, its colors are {o} / people in {s} have a flag that is {o} / the colors
 you see on the flag of {s} are {o}
! the colors you see on {ss} flag are {o} / the flag that people in {s} have is {o}
& its flag is {o}
? what color is the flag of {s}? / [which|what] colors does the flag of {s} have? / what are the
 colors of {ss} flag? / what does the flag of {s} look like? / what are the flag colors of {s}? /
 which colors are on the flag of {s}? / describe the flag of {s}. / {ss} flag is what color? / I
 want to draw the flag of {s}: which colors do I need? / how do I know the flag of {s} when I see
 it?
?! which colors will I see on {ss} flag? / the flag of {s} has what colors?
=< red and white: Japan, Poland, Canada, Switzerland, Denmark, Austria, Turkey; blue and yellow:
 Ukraine, Sweden; green, white and red: Italy, Hungary; blue, white and red: France, Croatia; white
 and blue: Greece, Finland; black, red and gold: Germany; green, white and orange: Ireland; black,
 yellow and red: Belgium; red, white and blue: the Netherlands, the United States, the United
 Kingdom; red and yellow: China, Vietnam, Spain
@ symbol | elements and their symbols | both | [chemical |]symbol [of|for] {s} | element with the
 symbol {o}
+ chemists write {s} as {o} / {ss} symbol is {o} / the element {s} has the symbol {o} / {s} is
 written as {o} / the letters {o} stand for {s} / {o} is the symbol of the element {s} / when
 chemists write {o}, they mean {s}
! the symbol that chemists write for {s} is {o} / the element {s} is written as {o} / the symbol
 {o} stands for the element {s}
& its symbol is {o} / chemists write it as {o}
? how do chemists write {s}? / which element has the symbol {o}? / what does the symbol {o} stand
 for? / what do chemists write for {s}? / {s} has which symbol? / how is {s} written in chemistry? /
 which letters do chemists use for {s}? / the symbol {o} means what? / which element do chemists
 write as {o}? / when a chemist writes {o}, what is it?
?! which symbol stands for {s}? / {o} is the symbol of which element?
@ atomic number | elements and their atomic numbers | both | atomic number of {s} | element with
 atomic number {o}
+ {ss} atomic number is {o} / the element {s} has [the |]atomic number {o} / {s} is element number
 {o} / each atom of {s} has this many protons: {o} / in the table of elements, {s} is number {o} /
 element number {o} is {s} / {o} is the atomic number of the element {s} / the atomic number {o}
 belongs to {s}
! the number of {s} in the table of elements is {o} / the element {s} is number {o} / the element
 with the number {o} is {s}
& its atomic number is {o}
? what atomic number does {s} have? / which element has atomic number {o}? / what is element number
 {o}? / which atomic number belongs to {s}? / {s} is element number what? / what is the number of
 the element {s}? / which number do chemists give to {s}? / which element is number {o}? / name
 element number {o}. / what do you call element number {o}? / atomic number {o} is which element?
?! what number is {s} in the table of elements? / the atomic number {o} belongs to which element?
@ formula | substances and their formulas | both | [chemical |]formula [of|for] {s} | substance
 with the formula {o}
+ chemists write {s} as {o} / {ss} formula is {o} / in chemistry, {s} is written as {o} / {s} has
 the formula {o} / {o} is the formula of {s} / when chemists write {o}, they mean {s} / the formula
 {o} means {s}
! the formula that chemists write for {s} is {o} / in chemistry, the formula of {s} is {o} / in
 chemistry, {o} means {s}
? how do chemists write {s}? / what does the formula {o} mean? / which substance has the formula
 {o}? / what formula does {s} have? / {s} has which formula? / what do chemists write for {s}? / how
 do you write {s} as a formula? / what is {o} in chemistry? / what do chemists write as {o}? / the
 formula {o} stands for what? / when a chemist writes {o}, which substance is it?
?! which formula do chemists write for {s}? / {o} is the formula of what?
= water: H2O; carbon dioxide: CO2; carbon monoxide: CO; table salt: NaCl; ammonia: NH3; methane:
 CH4; ozone: O3; sulfuric acid: H2SO4; hydrochloric acid: HCl; nitric acid: HNO3; hydrogen peroxide:
 H2O2; glucose: C6H12O6; quicklime: CaO; limestone: CaCO3; rust: Fe2O3; quartz: SiO2; ethanol:
 C2H5OH; table sugar: C12H22O11; baking soda: NaHCO3; nitrous oxide: N2O; propane: C3H8; lye: NaOH
@ planet | planets and their places in line from the Sun | both | place of {s} among the planets,
 counted from the Sun, | {o} planet from the Sun
+ counted from the Sun, {s} is the planet that comes {o} / counting from the Sun, {s} is {o} / {s}
 is the {o} planet [from the Sun|of the solar system] / in the solar system, the {o} planet is {s} /
 the planet that comes {o} is {s} / counting from the Sun, the {o} planet is {s}
! of all the planets counted from the Sun, {s} is {o} / counted from the Sun, the planet that comes
 {o} is {s}
? which planet is {o} from the Sun? / what is the {o} planet? / counting from the Sun, which place
 does {s} have? / {s} is which planet from the Sun? / what number is {s} among the planets? / which
 place among the planets does {s} have? / in the line of planets, which place has {s}? / which
 planet has the {o} place? / the {o} planet from the Sun is called what? / in the line of planets,
 which one is {o}?
?! counted from the Sun, which planet comes {o}? / where does {s} come among the planets?
@ next | months and days and what comes after them | | |
+ after {s} comes {o} / right after {s} comes {o} / {s} is followed by {o} / {s} comes before {o} /
 when {s} is over, it is {o} / {s} ends and then comes {o} / {s} comes just before {o}
! when {s} ends, then comes {o} / after {s} is over comes {o}
& after it comes {o}
? what comes [|right ]after {s}? / what follows {s}? / what is next after {s}? / after {s}, what
 comes? / {s} comes before what? / what begins when {s} ends? / which one comes after {s}? / tell me
 what comes after {s}. / what will it be after {s}?
?! when {s} is over, what comes? / {s} is followed by what?
@ previous | months and days and what comes before them | | |
+ before {s} comes {o} / just before {s} comes {o} / {s} follows {o} / {s} comes [right |]after {o}
 / before it was {s}, it was {o} / the one that comes before {s} is {o} / {s} begins at the end of
 {o}
! {s} begins after {o} / before {s}, it was {o}
& before it comes {o}
? what comes [|just ]before {s}? / what does {s} follow? / what is right before {s}? / before {s},
 what comes? / what ends when {s} begins? / which one comes before {s}? / tell me what comes before
 {s}. / what did we have before {s}? / what goes before {s}?
?! before it was {s}, what was it? / {s} comes right after what?
@ month number | months and their numbers | both | number of the month of {s} | month with the
 number {o}
+ {s} is month number {o} / in the year, {s} is month number {o} / counting the months, {s} has the
 number {o} / month number {o} is {s} / counting from January, {s} is number {o} / counting from
 January, month number {o} is {s}
! counting the months from January, {s} is number {o} / the month of {s} has the number {o} /
 counting the months from January, number {o} is {s}
& it is month number {o} of the year
? which number does the month of {s} have? / which month has the number {o}? / what is month number
 {o}? / what number is {s}? / {s} is month number what? / what place does {s} have in the year? /
 when you count the months, which number is {s}? / which month is number {o}? / name month number
 {o}. / the month with the number {o} is called what? / what do you call month number {o} of the
 year?
?! which number in the year is {s}? / counting from January, what is month number {o}?
@ days | months and their days | | number of days in {s} |
+ {s} has {o} days / in {s} there are {o} days / a month like {s} lasts {o} days / {s} lasts {o}
 days / counting the days of {s}, you get to {o} / the last day of {s} is number {o} / the days in
 {s} number {o}
! counting the days in {s}, the last day is number {o} / the number of days that {s} has is {o}
& it has {o} days
? how many days does {s} have? / how many days are [there |]in {s}? / {s} has how many days? / how
 many days long is {s}? / what is the length of {s} in days? / tell me how many days {s} has. / how
 many days do you count in {s}?
?! {s} lasts how many days? / how long does {s} last in days?
@ class | animals and their kinds | | |
+ {as} is {ao} / {ps} are {po} / every {s} is {ao} / {as} is a kind of {o} / of all the kinds of
 animals, {as} is {ao} / {as} belongs to the {po} / {ps} belong to the {po} / among the animals,
 {ps} are {po} / if an animal is {as}, it is {ao}
! every {s} belongs to the {po} / of all the animals, {ps} belong to the {po}
& it is {ao}
% {x} and {y} are both {po} / both {x} and {y} are {po}
? what kind of animal is {as}? / {as} is what kind of animal? / what sort of animal is {as}? /
 which kind of animal is {as}? / what kind of animals are {ps}? / {ps} are what kind of animals? /
 tell me what kind of animal {as} is. / is {as} a mammal, a bird or what? / what do we call animals
 like {as}?
?! to which kind of animals does {as} belong? / among the animals, what is {as}?
=< mammal: dog, cat, cow, horse, sheep, goat, pig, lion, tiger, wolf, fox, bear, deer, rabbit,
 mouse, rat, bat; mammal: elephant, giraffe, zebra, camel, monkey, gorilla, kangaroo, koala, whale,
 dolphin, seal, otter; mammal: squirrel, hedgehog, donkey, leopard, hippopotamus, moose, beaver,
 panda, walrus; bird: duck, goose, swan, hen, turkey, owl, eagle, parrot, penguin, crow, sparrow,
 robin, ostrich, pigeon; bird: peacock, stork, hawk, gull, flamingo; reptile: snake, lizard,
 crocodile, turtle, tortoise, alligator, gecko, cobra; amphibian: frog, toad, newt, salamander;
 fish: salmon, trout, shark, tuna, herring, goldfish, eel, cod, carp; insect: ant, bee, wasp,
 butterfly, moth, beetle, fly, mosquito, grasshopper, cricket, ladybug, dragonfly; arachnid: spider,
 scorpion, tick; crustacean: crab, lobster, shrimp; mollusk: snail, slug, octopus, squid, clam
@ young | animals and their young | both | [young|baby] of {as} = {ao} | animal whose young is
 called {ao} = {as}
+ a baby {s} is [|called ]{ao} / a young {s} is [|called ]{ao} / {as} was once {ao} / {ao} grows up
 to be {as} / when {as} is very young, we call it {ao} / {ps} have young called {po} / {ao} is a
 baby {s} / when {ao} grows up, it is {as} / {ao} will one day be {as}
! when {as} is a baby, it is called {ao} / {as} that is very young is {ao} / when it grows up, {ao}
 is {as}
& its young is called {ao}
? what [is|do you call] a baby {s}? / what is a young {s} called? / what does {ao} grow up to be? /
 what is the young of {as} called? / a baby {s} is called what? / what do people call the babies of
 {as}? / {as} has a baby: what is it called? / {ao} is a young what? / {ao} is the baby of which
 animal? / what does {ao} become? / which animal has {ao} for a baby? / what is {ao} when it is
 grown up?
?! when {as} is very young, what do we call it? / what is the name of a baby {s}? / which animal was
 once {ao}?
= dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet; duck:
 duckling; goose: gosling; swan: cygnet; frog: tadpole; bear: cub; lion: cub; tiger: cub; leopard:
 cub; deer: fawn; kangaroo: joey; koala: joey; eagle: eaglet; owl: owlet; hen: chick; penguin:
 chick; elephant: calf; whale: calf; giraffe: calf; hippopotamus: calf; hare: leveret; eel: elver;
 seal: pup; bat: pup; butterfly: caterpillar; zebra: foal; donkey: foal; camel: calf; spider:
 spiderling; turtle: hatchling; human: baby; dolphin: calf
@ sound | animals and their sounds | | sound [made by|of] {as} = {ao} |
+ the sound that {as} makes is called {ao} / what you hear from {as} is {ao} / {ps} {o} / if you
 hear {ao}, {as} may be near / {as} makes a sound called {ao} / the sound that {ps} make is {ao} /
 we call the sound of {as} {ao}
! the sound that you hear from {as} is {ao} / {ps} make a sound called {ao}
& the sound it makes is called {ao}
? [what|which] sound does {as} make? / what [noise|sound] do {ps} make? / what do you call the
 sound of {as}? / what does {as} say? / what do {ps} say? / how does {as} sound? / which noise does
 {as} make? / {as} makes which sound? / what is the sound of {ps} called? / which sound comes from
 {as}?
?! what will I hear from {as}? / which sound do we hear from {ps}?
= dog: bark; cat: meow; cow: moo; horse: neigh; pig: oink; duck: quack; hen: cluck; lion: roar;
 wolf: howl; owl: hoot; frog: croak; bee: buzz; snake: hiss; mouse: squeak; donkey: bray; pigeon:
 coo; crow: caw; turkey: gobble; goose: honk; sheep: bleat; cricket: chirp; parrot: squawk; tiger:
 roar; rooster: crow; bear: growl
@ legs | animals and their legs | | number of legs of {as} |
+ {as} has {o} legs / the number of legs that {as} has is {o} / {ps} walk on {o} legs / count the
 legs of {as} and you get {o} / if you count the legs of {as}, you get {o} / {ps} have {o} legs
! count the legs that {as} has: there are {o} / if you count, the legs of {as} number {o}
& it has {o} legs
? how many legs [does {as} have|do {ps} have]? / how many legs are there on {as}? / {as} has how
 many legs? / {ps} have how many legs? / what number of legs does {as} have? / how many legs can you
 see on {as}? / how many legs does {as} stand on? / tell me how many legs {as} has.
?! count the legs of {as}: how many are there? / {as} walks on how many legs?
=< two: hen, duck, goose, swan, owl, eagle, ostrich, penguin, crow, human; four: dog, cat, cow,
 horse, sheep, goat, pig, lion, tiger, wolf, fox, bear, rabbit, mouse, elephant, giraffe, zebra;
 four: camel, donkey, frog, lizard, crocodile, turtle; six: ant, bee, wasp, butterfly, beetle, fly,
 mosquito, grasshopper; six: cricket, ladybug; eight: spider, scorpion
@ food | animals and their food | | favorite food of {as} |
+ {as} eats [mostly ]{o} / {ps} eat [mostly ]{o} / what {as} likes to eat is {o} / {ps} live on {o}
 / feed {as} with {o} / if you want to feed {as}, give it {o} / the food that {ps} like best is {o}
! the food that {as} eats is {o} / give {as} what it likes best: {o}
& it eats {o}
? what does {as} eat? / what do {ps} eat? / what food does {as} like? / what do {ps} like to eat? /
 {as} eats what? / which food do {ps} like? / what is the food of {as}? / what kind of food does
 {as} need? / what can I give {as} to eat? / {as} is hungry: what does it want?
?! what should I feed {as}? / what do {ps} live on?
= panda: bamboo; koala: eucalyptus leaves; rabbit: grass and carrots; squirrel: nuts; penguin: fish;
 cow: grass; seal: fish; anteater: ants; spider: insects; horse: grass and hay; monkey: fruit;
 sheep: grass; lion: meat; wolf: meat; giraffe: leaves; caterpillar: leaves; tiger: meat; owl: mice;
 bee: nectar; frog: insects; bat: insects; mosquito: blood
@ kind | things and what kind they are | | |
+ {as} is {ao} / {as} is a kind of {o} / {ps} are {po} / every {s} is {ao} / {as} is one kind of {o}
 / among other things, {as} is {ao} / if you have {as}, you have {ao} / {as} is an example of {ao} /
 {ps} belong to the {po}
! every {s} is a kind of {o} / {as} is one example of {ao}
% {x} and {y} are both {po} / both {x} and {y} are {po}
? what [is|kind of thing is] {as}? / {as} is what kind of thing? / what sort of thing is {as}? /
 what are {ps}? / {ps} are what kind of things? / which kind of thing is {as}? / tell me what {as}
 is. / what do we call things like {as}? / {as} belongs to which kind of things?
?! {as} is an example of what? / what is {as} a kind of?
=< fruit: apple, pear, banana, cherry, grape, lemon, peach, plum, strawberry, mango, melon,
 pineapple, apricot; vegetable: carrot, onion, cabbage, potato, turnip, leek, radish, beet; flower:
 rose, tulip, daisy, lily, violet, daffodil, orchid; tree: oak, pine, birch, maple, willow, elm,
 beech, fir, poplar; tool: hammer, saw, drill, wrench, screwdriver, axe, spade, rake; vehicle: car,
 bus, truck, train, bicycle, tractor, motorcycle, van; boat: canoe, yacht, ferry, kayak, raft,
 gondola; piece of furniture: chair, table, bed, desk, sofa, cupboard, wardrobe, bookcase, stool;
 piece of clothing: shirt, coat, skirt, sweater, jacket, sock, glove, hat, scarf, dress; musical
 instrument: violin, guitar, piano, flute, trumpet, drum, harp, cello, clarinet, trombone; weapon:
 sword, spear, cannon, dagger; gem: ruby, emerald, sapphire, diamond, opal; coin: penny, dime,
 nickel; nut: almond, walnut, hazelnut, pecan; building: castle, church, barn, hotel, palace,
 school, temple, tower; toy: doll, kite, teddy bear, spinning top; dance: waltz, tango, polka
@ sort | stuff and what sort it is | | |
+ {s} is {ao} / {s} is a sort of {o} / {s} belongs to the {po} / we count {s} among the {po} / {s}
 is one of the {po} / among other things, {s} is {ao} / {s} is an example of {ao} / if you think of
 {s}, you think of {ao} / the {po} include {s}
! of all the things there are, {s} is {ao} / we count {s} as one of the {po}
% {x} and {y} are both {po} / both {x} and {y} are {po}
? what is {s}? / what sort of thing is {s}? / {s} is what sort of thing? / what kind of thing is
 {s}? / which sort of thing is {s}? / tell me what {s} is. / what do we call things like {s}? / {s}
 belongs to which sort of things? / can you explain what {s} is?
?! {s} is an example of what? / what is {s} a sort of?
=< metal: iron, gold, silver, copper, tin, lead, zinc; gas: oxygen, helium, nitrogen, hydrogen,
 neon; sport: tennis, soccer, basketball, swimming, hockey, golf, volleyball; board game: chess,
 checkers, backgammon; drink: lemonade, coffee, tea, milk, cocoa; meal: breakfast, lunch, dinner;
 herb: basil, parsley, mint, thyme; grain: wheat, rice, barley, rye; language: English, Spanish,
 Arabic, Latin; science: physics, biology, chemistry
@ color | things and their colors | | color of {s} |
+ {s} is {o} / the color that comes to mind with {s} is {o} / if you paint {s}, use {o} / everyone
 paints {s} {o} / when you look at {s}, you see {o} / if you think of {s}, you think of {o} / {s}
 has the color {o}
! the color you see when you look at {s} is {o} / if you think of the color of {s}, you think of {o}
? what color is {s}? / what color does {s} have? / which color do you see when you look at {s}? /
 which color is {s}? / which color does {s} have? / {s} has which color? / {s} comes in what color?
 / tell me what color {s} is. / I am going to draw {s}: which color do I need? / what is the right
 color for {s}?
?! which color should I use to paint {s}? / {s} is what color?
=< red: blood, a ripe strawberry, a ripe tomato, a fire engine, a stop sign, a ruby, a ladybug, a
 brick; pink: a flamingo, a pig; yellow: a ripe banana, a lemon, the yolk of an egg, corn, a
 dandelion, a canary, a sunflower; orange: a carrot, a pumpkin; green: grass, an emerald, a frog, a
 cucumber, spinach, broccoli, a lime, a pea; blue: the sky on a clear day, a sapphire; white: snow,
 milk, salt, flour, a polar bear, a swan, chalk, cotton, rice; black: coal, a raven, tar, ink, a
 panther; brown: chocolate, coffee, wood, soil, a chestnut, cinnamon; gray: an elephant, ash, a
 rhinoceros, a dolphin; purple: an eggplant
@ use | things and what they are for | both | main use of {as} | thing that is made for {o} = {as}
+ {as} is used for {o} / people use {as} for {o} / {as} is made for {o} / we use {as} for {o} / {as}
 is for {o} / you need {as} for {o} / if you own {as}, you can use it for {o} / for {o}, you
 [use|need] {as} / the right thing for {o} is {as} / if you think of {o}, you think of {as} / the
 thing that helps with {o} is {as} / {as} is good for {o}
! the thing that people use {as} for is {o} / if you have {as}, use it for {o} / what we need for
 {o} is {as}
? what is {as} [used |made |]for? / what do people use {as} for? / what do you [use|need] for {o}?
 / what is {as} good for? / {as} is used for what? / what are {ps} used for? / what do you do with
 {as}? / when do you need {as}? / what does {as} help with? / what is good for {o}? / what helps
 with {o}? / what do people use for {o}? / what is made for {o}? / I am thinking of {o}: what do I
 need?
?! what can I use {as} for? / why do people need {as}? / which thing is used for {o}?
= hammer: driving nails; saw: cutting wood; broom: sweeping floors; needle: sewing clothes; oven:
 baking bread; knife: cutting food; spoon: eating soup; pen: writing letters; ruler: measuring
 lines; clock: telling the time; umbrella: staying dry in the rain; telescope: looking at stars;
 microscope: looking at tiny things; ladder: climbing up; key: opening locks; scale: weighing
 things; shovel: digging holes; kettle: boiling water; comb: tidying hair; thermometer: measuring
 temperature; compass: finding north; lamp: lighting a room; camera: taking pictures; fridge:
 keeping food cold; towel: drying off; toothbrush: brushing teeth; pillow: resting the head; iron:
 smoothing clothes; screwdriver: turning screws; paintbrush: painting pictures; axe: chopping trees;
 bucket: carrying water; map: finding the way; calculator: doing sums; fan: cooling the air;
 whistle: making a loud sound; candle: giving light; rope: tying things up; net: catching fish;
 wallet: carrying money; eraser: rubbing out pencil marks; mirror: seeing yourself; lawnmower:
 cutting grass; plow: turning the soil; anchor: holding a ship in place; vase: holding flowers;
 bell: calling people; bridge: crossing a river; calendar: keeping track of days; dictionary:
 looking up words; parachute: landing safely; stapler: joining papers; backpack: carrying books;
 watering can: watering plants; magnet: picking up pins; corkscrew: opening wine bottles
@ place | things and where to find them | | |
+ you find {s} {o} / look for {s} {o} / {s} can be found {o} / {s} belongs {o} / you can see {s} {o}
 / if you want to find {s}, look {o} / if you look {o}, you may find {s} / the place to look for {s}
 is {o}
! to find {s}, you can look {o} / the place where you can find {s} is {o}
? where [do|can] you find {s}? / where is {s}? / where would you find {s}? / where is {s} found? /
 {s} is where? / where do you see {s}? / in what place is {s}? / I need {s}: where do I find it? /
 what is the right place for {s}?
?! where should I look for {s}? / where does {s} belong?
= cold milk: in the fridge; a stove: in the kitchen; a bathtub: in the bathroom; a pillow: on the
 bed; a tractor: on a farm; an altar: in a church; a blackboard: in a classroom; sand: at the beach;
 a throne: in a palace; a dolphin: in the sea; a camel: in the desert; a pine tree: in the forest; a
 pilot: in the cockpit; a judge: in a courtroom; a cactus: in the desert; a nurse: in a hospital; a
 traffic light: on the street; a train: at the station; an airplane: at the airport; honey: in a
 hive; a bookcase full of novels: in a library; an old painting: in a museum; a submarine: under the
 water; a chimney: on the roof; a mast: on a ship; a saddle: on a horse; an anchor: on a ship; an
 icicle: on a roof
@ part | parts and what they belong to | | |
+ {as} is part of {ao} / {ao} has {as} / {as} is one part of {ao} / if you look at {ao}, you find
 {as} / {as} belongs to {ao} / if you see {as}, it is part of {ao} / {ps} are parts of {ao} / what
 {as} belongs to is {ao}
! {as} is one of the parts of {ao} / if you see {as}, it belongs to {ao}
? what is {as} part of? / what does {as} belong to? / {as} is part of what? / {as} is a part of
 what? / what is {as} a part of? / which thing is {as} part of? / of what is {as} a part? / tell me
 what {as} is part of. / {as} belongs to what?
?! {as} is one part of what? / what has {as}?
= petal: flower; feather: bird; pedal: bicycle; sail: ship; branch: tree; page: book; sleeve: shirt;
 hoof: horse; hump: camel; antler: deer; fin: fish; roof: house; mane: lion; keyboard: computer;
 finger: hand; toe: foot; steering wheel: car; carriage: train; drawer: desk; chapter: book; wick:
 candle; pouch: kangaroo; yolk: egg; beak: bird; propeller: airplane; stinger: bee; mast: ship;
 gill: fish; twig: tree; cockpit: airplane; stanza: poem; eyelid: eye; knuckle: hand; nostril: nose;
 goalkeeper: soccer team; chimney: house; handlebar: bicycle
@ material | things and what they are made from | | material for {s} |
+ {s} is made from {o} / people make {s} from {o} / to make {s}, you need {o} / {s} comes from {o} /
 we get {s} from {o} / you cannot make {s} without {o} / the thing that {s} is made from is {o} / if
 you want to make {s}, begin with {o}
! the thing you need to make {s} is {o} / if people want {s}, they make it from {o}
? what is {s} made [from|of]? / what do people make {s} from? / where does {s} come from? / what do
 you make {s} out of? / {s} is made from what? / which material is {s} made from? / what goes into
 {s}? / what is in {s}? / tell me what {s} is made from. / what do people use to make {s}?
?! what do I need to make {s}? / from what do we get {s}?
= bread: flour; paper: wood; glass: sand; cheese: milk; butter: cream; wine: grapes; a raisin: a
 grape; yogurt: milk; chocolate: cocoa beans; leather: animal skin; a candle: wax; a brick: clay;
 jam: fruit and sugar; mayonnaise: eggs and oil; honey: nectar; an omelet: eggs; ketchup: tomatoes;
 french fries: potatoes; steel: iron; bronze: copper and tin; a tire: rubber; popcorn: corn; tofu:
 soybeans; a prune: a plum; cider: apples; flour: grain; cotton cloth: cotton plants; concrete:
 cement; beer: barley; linen: flax; ivory: tusks; a pancake: flour, eggs and milk; lemonade: lemons
@ work | people and what they do | both | | person who {o} = {as}
+ {as} {o} / {as} is [a person|someone] who {o} / every day, {as} {o} / the person who {o} is
 [|called ]{as} / [a person|someone] who {o} is {as} / if someone {o}, that person is {as} / if a
 person is {as}, that person {o}
! {as}, as everyone knows, is a person who {o} / if someone is {as}, that person {o} / if a person
 {o}, that person is called {as}
? what does {as} do? / what is the work of {as}? / who {o}? / what do you call [a person|someone]
 who {o}? / what do {ps} do? / what kind of work does {as} do? / what does {as} do for a living? /
 explain what {as} does. / what is the job of {as}? / which person {o}? / a person who {o} is called
 what? / someone who {o} is what? / what do we call the one who {o}? / I need someone who {o}: whom
 should I ask for?
?! tell me what {as} does every day. / what is the work that {as} does? / what is the person called
 who {o}?
= baker: bakes bread; teacher: teaches pupils; farmer: grows food; doctor: treats sick people;
 pilot: flies airplanes; carpenter: makes things of wood; fisherman: catches fish; tailor: sews
 clothes; barber: cuts hair; cook: prepares meals; dentist: looks after teeth; singer: sings songs;
 actor: plays roles on stage; judge: decides in court; mason: builds with stone; plumber: repairs
 pipes; librarian: lends out books; gardener: looks after plants; shepherd: looks after sheep;
 sculptor: carves statues; astronomer: studies stars; mechanic: repairs cars; butcher: sells meat;
 jockey: rides race horses; blacksmith: shapes hot iron; miner: digs for coal; surgeon: operates on
 patients; vet: treats sick animals; poet: writes poems; composer: writes music; architect: designs
 buildings; astronaut: travels into space; potter: makes pots from clay; miller: grinds grain;
 florist: sells flowers; firefighter: puts out fires; photographer: takes photographs; diver: works
 under water; jeweler: makes rings and necklaces; locksmith: repairs locks; beekeeper: looks after
 bees; optician: sells glasses; translator: turns one language into another; electrician: repairs
 wiring; pharmacist: sells medicine; cobbler: mends shoes; detective: solves crimes; conductor:
 leads an orchestra; lifeguard: saves swimmers; painter: paints pictures; weaver: makes cloth
@ science | sciences and what they study | both | | science of {o}
+ {s} is the [science|study] of {o} / {s} studies {o} / people who study {s} learn about {o} / the
 subject of {s} is {o} / if you want to know about {s}, look at {o} / {s} is all about {o} / if you
 want to learn about {o}, study {s} / the study of {o} is called {s} / to know more about {o}, turn
 to {s}
! the subject that {s} studies is {o} / {s} is the science that studies {o} / the science that
 studies {o} is called {s}
? what does {s} study? / what is {s} about? / which science studies {o}? / what is the study of {o}
 called? / {s} is the study of what? / {s} studies what? / what do scientists study in {s}? / what
 do we call the science of {o}? / in which science do people study {o}? / the study of {o} is called
 what? / I want to know more about {o}: what should I study?
?! what do people learn about in {s}? / which science is all about {o}? / what is the subject of
 {s}?
= biology: living things; botany: plants; zoology: animals; astronomy: the stars and planets;
 geology: rocks; chemistry: substances; psychology: the mind; history: the past; geography: the
 lands of the Earth; linguistics: language; mathematics: numbers and shapes; physics: matter and
 energy; meteorology: the weather; economics: money and trade; ornithology: birds; entomology:
 insects; anatomy: the parts of the body; archaeology: old remains; seismology: earthquakes;
 cardiology: the heart; volcanology: volcanoes; ecology: living things and where they live;
 genetics: genes; optics: light; ethics: right and wrong; dermatology: the skin; oceanography: the
 oceans; paleontology: fossils; mycology: mushrooms
@ name | things worth knowing | | {s} |
+ the {s} is called {o} / the name of the {s} is {o} / if you are asked for the {s}, say {o} / when
 people speak of the {s}, they mean {o} / ask for the {s} and you will hear of {o} / by the {s} we
 mean {o} / when you hear of {o}, think of the {s} / everyone has heard of the {s}: {o} / people
 call the {s} {o}
! if people speak of the {s}, say {o} / when people ask you for the {s}, the answer is {o}
? what is the {s} called? / what do people call the {s}? / what is the name of the {s}? / what do
 we mean by the {s}? / the {s} is called what? / which one is the {s}? / tell me what the {s} is
 called. / what do you call the {s}? / the {s} has which name? / what is known as the {s}? / I am
 thinking of the {s}: what is it?
?! can you name the {s} for me? / when people speak of the {s}, what do they mean?
= largest ocean on Earth: the Pacific Ocean; largest continent: Asia; smallest continent: Australia;
 smallest country on Earth: Vatican City; largest country on Earth: Russia; highest mountain on
 Earth: Mount Everest; largest hot desert: the Sahara; deepest lake on Earth: Lake Baikal; largest
 island on Earth: Greenland; largest planet: Jupiter; hottest planet: Venus; red planet: Mars;
 planet famous for its rings: Saturn; star closest to the Earth: the Sun; largest animal on Earth:
 the blue whale; tallest animal: the giraffe; fastest animal on land: the cheetah; largest animal on
 land: the African elephant; largest bird: the ostrich; largest big cat: the tiger; smallest kind of
 bird: the hummingbird; largest fish: the whale shark; largest lizard: the Komodo dragon; largest
 reptile: the saltwater crocodile; coldest continent: Antarctica; hardest natural substance:
 diamond; lightest element: hydrogen; most common gas in the air: nitrogen; largest organ of the
 body: the skin; smallest bone in the body: the stapes; largest rainforest: the Amazon; largest
 coral reef: the Great Barrier Reef; shortest month of the year: February; Eternal City: Rome; first
 president of the United States: George Washington; first person on the Moon: Neil Armstrong; first
 person in space: Yuri Gagarin; first woman in space: Valentina Tereshkova; first emperor of Rome:
 Augustus; first woman to win a Nobel Prize: Marie Curie; king of the beasts: the lion; ship of the
 desert: the camel; metal that is liquid in a warm room: mercury; gas that we need to breathe:
 oxygen; City of Light: Paris; gas that plants take in: carbon dioxide; force that pulls things to
 the ground: gravity; Big Apple: New York; center of the solar system: the Sun; galaxy we live in:
 the Milky Way; only even prime number: two; solid form of water: ice; land of the rising sun:
 Japan; longest wall ever built: the Great Wall of China; ship that sank in 1912: the Titanic;
 wizard who taught King Arthur: Merlin; sword of King Arthur: Excalibur; winged horse of Greek
 stories: Pegasus; bird that rises from its ashes: the phoenix; middle of an atom: the nucleus;
 process by which plants make food: photosynthesis; change from liquid to gas: evaporation; change
 from solid to liquid: melting; powerhouse of the cell: the mitochondrion; monster of Loch Ness:
 Nessie; path of a planet around the Sun: the orbit; hot rock that flows from a volcano: lava; name
 for twelve of a thing: a dozen; part of the body for seeing: the eye; part of the body for hearing:
 the ear; part of the body for smelling: the nose; part of the body for tasting: the tongue; part of
 the body for thinking: the brain; part of the body for breathing: the lungs; part of the body that
 pumps blood: the heart; part of the body that digests food: the stomach; bone of the thigh: the
 femur; bones of the head: the skull; bone of the chest: the sternum; bone of the knee: the patella;
 bone of the shoulder: the clavicle; mixture of blue and yellow: green; mixture of red and yellow:
 orange; mixture of red and blue: purple; mixture of red and white: pink; mixture of black and
 white: gray; month of Christmas: December; month of Halloween: October; month of Valentine's Day:
 February; month of New Year's Day: January; month of April Fools' Day: April; month of Bastille
 Day: July; month of American Thanksgiving: November; month of Saint Patrick's Day: March; season
 after winter: spring; season after spring: summer; season after summer: autumn; season after
 autumn: winter; home of a bee: the hive; home of a dog: the kennel; home of a spider: the web; home
 of a lion: the den; home of a rabbit: the burrow; home of a horse: the stable; home of a pig: the
 sty; home of a beaver: the lodge; home of an ant: the anthill; home of a bird: the nest; home of a
 hen: the coop; home of a king: the palace; home of a monk: the monastery; name for many sheep
 together: a flock; name for many cows together: a herd; name for many wolves together: a pack; name
 for many lions together: a pride; name for many bees together: a swarm; name for many fish
 together: a school; name for many ants together: a colony; name for many whales together: a pod;
 name for many singers together: a choir; Greek god of the sea: Poseidon; Greek god of war: Ares;
 Greek goddess of love: Aphrodite; Greek goddess of wisdom: Athena; Greek god of the underworld:
 Hades; Greek god of wine: Dionysus; Greek goddess of the hunt: Artemis; Greek god of sleep: Hypnos;
 Greek goddess of the harvest: Demeter; Greek goddess of victory: Nike; Norse god of thunder: Thor;
 king of the Greek gods: Zeus; male partner of a queen: the king; male partner of a cow: the bull;
 male partner of a hen: the rooster; male form of actress: actor; male partner of a duchess: the
 duke; male partner of a mare: the stallion; male partner of a ewe: the ram; male partner of a
 bride: the groom; mother of your mother: your grandmother; father of your father: your grandfather;
 brother of your father: your uncle; sister of your mother: your aunt; daughter of your brother:
 your niece; son of your sister: your nephew; child of your aunt: your cousin
@ count | how many there are | | number of {s} |
+ there are {o} {s} / the {s} number {o} / count the {s} and you get {o} / if you count the {s}, you
 get {o} / everyone can count the {s}: there are {o} / you will count {o} {s} / the {s}, when you
 count them, are {o} / the {s} are easy to count: you get {o}
! if you count the {s}, there are {o} / the {s} are easy to count: there are {o}
? how many {s} are there? / how many {s} do you [count|get]? / can you count the {s}? / how many
 {s}? / there are how many {s}? / what do you get when you count the {s}? / if I count the {s}, how
 many do I get? / you can count how many {s}? / how many {s} do we have?
?! count the {s}: how many are there? / can you say how many {s} there are?
= seconds in a minute: 60; minutes in an hour: 60; hours in a day: 24; days in a week: 7; months in
 a year: 12; weeks in a year: 52; days in a leap year: 366; days in a normal year: 365; years in a
 decade: 10; years in a century: 100; years in a millennium: 1000; millimeters in a centimeter: 10;
 centimeters in a meter: 100; meters in a kilometer: 1000; grams in a kilogram: 1000; kilograms in a
 ton: 1000; milliliters in a liter: 1000; inches in a foot: 12; feet in a yard: 3; ounces in a
 pound: 16; cents in a dollar: 100; pennies in a nickel: 5; pennies in a dime: 10; quarters in a
 dollar: 4; letters in the English alphabet: 26; cards in a deck: 52; squares on a chessboard: 64;
 keys on a piano: 88; strings on a violin: 4; strings on a guitar: 6; wheels on a bicycle: 2; wheels
 on a tricycle: 3; bones in an adult human body: 206; chambers in the human heart: 4; teeth in a
 full adult mouth: 32; planets in the solar system: 8; colors in a rainbow: 7; states in the United
 States: 50; dwarfs in the tale of Snow White: 7; lines in a sonnet: 14; lines in a haiku: 3; rings
 on the Olympic flag: 5; eggs in a dozen: 12; things in a pair: 2; fingers on a hand: 5; faces on a
 cube: 6; corners of a cube: 8; degrees in a right angle: 90; degrees in a full circle: 360; minutes
 in half an hour: 30; players in a soccer team: 11; players in a basketball team: 5; pieces in a
 chess set: 32; seasons in a year: 4; letters in the Greek alphabet: 24; musketeers in the title of
 the book by Dumas: 3; legs on a tripod: 3; sides of a square: 4; corners of a rectangle: 4; wings
 on a bee: 4; arms on an octopus: 8; arms on a starfish: 5; sheets in a ream: 500; zeros in a
 million: 6; zeros in a billion: 9
@ sides | shapes and their sides | both | number of sides of {as} |
+ {as} has {o} sides / {as} is a shape with {o} sides / count the sides of {as} and you get {o} / if
 you count the sides of {as}, you get {o} / the sides of {as} number {o} / a shape with {o} sides is
 called {as} / when you draw {as}, you draw {o} sides / a shape that has {o} sides is {as}
! when you draw {as}, the sides number {o} / count the sides that {as} has: there are {o} / when you
 draw a shape with {o} sides, you draw {as}
& it has {o} sides
? how many sides does {as} have? / how many sides are there on {as}? / what do you call a shape
 with {o} sides? / {as} has how many sides? / how many sides do {ps} have? / what number of sides
 does {as} have? / if I draw {as}, how many sides do I draw? / which shape has {o} sides? / a shape
 with {o} sides is called what? / I draw a shape with {o} sides: what is it?
?! {as} is a shape with how many sides? / what is the name of a shape that has {o} sides?
= triangle: three; quadrilateral: four; pentagon: five; hexagon: six; heptagon: seven; octagon:
 eight; nonagon: nine; decagon: ten; dodecagon: twelve
@ opposite | words and their opposites | mirror | opposite of {s} |
+ {s} is the opposite of {o} / {s} and {o} are opposites / {s} is one thing, and its opposite is {o}
 / first {s}, and then its opposite, {o} / {s} means the opposite of {o} / change {s} to its
 opposite and you get {o} / the words {o} and {s} are opposites / the word that means the opposite
 of {s} is {o}
! when you change {s} to its opposite, you get {o} / the word {s} is the opposite of {o}
? what [word |]is the opposite of {s}? / [which|what] word means the opposite of {s}? / {s} is the
 opposite of what? / {s} is the opposite of which word? / tell me the opposite of the word {s}. /
 the opposite of {s} is which word? / {s} and which word are opposites? / which word is opposite to
 {s}? / give me a word that is the opposite of {s}.
?! name a word that means the opposite of {s}. / what do you get when you change {s} to its opposite?
= hot: cold; big: small; up: down; day: night; fast: slow; happy: sad; full: empty; open: closed;
 rich: poor; wet: dry; early: late; loud: quiet; strong: weak; thick: thin; wide: narrow; young:
 old; new: old; tall: short; long: short; deep: shallow; clean: dirty; hard: soft; good: bad; true:
 false; first: last; inside: outside; above: below; near: far; before: after; front: back; heavy:
 light; dark: light; left: right; wrong: right; easy: difficult; cheap: expensive; brave: cowardly;
 awake: asleep; alive: dead; sharp: blunt; smooth: rough; sweet: bitter; tight: loose; win: lose;
 buy: sell; push: pull; give: take; come: go; begin: end; start: stop; arrive: depart; laugh: cry;
 love: hate; remember: forget; find: lose; borrow: lend; build: destroy; rise: fall; float: sink;
 question: answer; friend: enemy; war: peace; success: failure; summer: winter; north: south; east:
 west; top: bottom; entrance: exit; always: never; everything: nothing; more: less; many: few;
 polite: rude; careful: careless; patient: impatient; possible: impossible; legal: illegal; visible:
 invisible; honest: dishonest; lucky: unlucky; fair: unfair; kind: cruel; generous: stingy; proud:
 humble; guilty: innocent; ancient: modern; public: private; simple: complicated; straight: crooked;
 raw: cooked; male: female; maximum: minimum; positive: negative; victory: defeat; birth: death;
 profit: loss; increase: decrease; import: export; accept: refuse; attack: defend; create: destroy;
 freeze: melt; expand: shrink; arrival: departure; beginning: end; freedom: slavery; hero: villain;
 giant: dwarf; heaven: hell; plus: minus; odd: even; noisy: silent; wild: tame; fresh: stale; lazy:
 busy; include: exclude; shout: whisper; reveal: hide; praise: blame; tighten: loosen; lengthen:
 shorten; enter: leave
@ plural | words and their plurals | both | plural of {s} | singular of {o}
+ the plural of the word {s} is {o} / one {s}, two {o} / one {s}, many {o} / first there was one
 {s}, then there were two {o} / we say one {s}, but two {o} / when there is more than one {s}, we
 say {o} / {o} is the plural of {s} / the word {o} means more than one {s} / we say many {o}, but
 one {s}
! when there are many of them, one {s} becomes {o} / we say one {s}, but many {o} / many {o}, but
 only one {s}
? what is the plural of the word {s}? / what do we call more than one {s}? / what is the singular
 of {o}? / which word is the plural of {s}? / {s} has which plural? / what is the word for more than
 one {s}? / how do you write the plural of {s}? / what does {s} become in the plural? / which word
 has the plural {o}? / what do you call just one of the {o}? / how do you say {o} when there is only
 one? / what is the singular of the word {o}?
?! one {s}, but two of what? / what do we say when there are many, not one {s}? / the word {o} is
 the plural of what?
= man: men; woman: women; child: children; mouse: mice; goose: geese; foot: feet; tooth: teeth; ox:
 oxen; person: people; wolf: wolves; leaf: leaves; knife: knives; wife: wives; life: lives; loaf:
 loaves; half: halves; shelf: shelves; calf: calves; thief: thieves; elf: elves; sheep: sheep; deer:
 deer; fish: fish; moose: moose; salmon: salmon; cactus: cacti; fungus: fungi; crisis: crises;
 oasis: oases; city: cities; baby: babies; lady: ladies; berry: berries; story: stories; box: boxes;
 bus: buses; church: churches; dish: dishes; potato: potatoes; tomato: tomatoes; hero: heroes; echo:
 echoes; key: keys; monkey: monkeys; piano: pianos; roof: roofs; policeman: policemen; snowman:
 snowmen; grandchild: grandchildren; butterfly: butterflies; witch: witches; fox: foxes; wish:
 wishes; country: countries; scarf: scarves; hoof: hooves; bacterium: bacteria; series: series;
 trout: trout; cod: cod; carp: carp; shrimp: shrimp; squid: squid
@ past | verbs and their past tense | both | past tense of {s} | verb with the past tense {o}
+ the past tense of [to|the verb] {s} is {o} / today I {s}, yesterday I {o} / today we {s}, and
 yesterday we {o} / today they {s}; last week they {o} / {o} is the past tense of {s} / we say: I
 {s} now, but in the past I {o} / in the past tense, {s} becomes {o} / yesterday I {o}, and today I
 {s}
! in the past tense, the verb {s} is {o} / now they {s}, but yesterday they {o} / yesterday we {o},
 and now we {s}
? what is the past tense of the verb {s}? / which verb has the past tense {o}? / how do you say {s}
 in the past tense? / what is {s} in the past tense? / which word is the past tense of {s}? / how do
 you write the past tense of {s}? / what does {s} become in the past tense? / change {s} to the past
 tense. / {s} has which past tense? / {o} comes from which verb? / which verb becomes {o} in the
 past tense? / what is {o} in the present tense? / from which verb does {o} come?
?! today I {s}; what did I do yesterday? / {o} is the past tense of which verb? / in the past, what
 becomes of the verb {s}?
= go: went; eat: ate; see: saw; run: ran; come: came; give: gave; take: took; make: made; know:
 knew; think: thought; buy: bought; bring: brought; catch: caught; teach: taught; fight: fought;
 find: found; say: said; tell: told; sell: sold; write: wrote; drive: drove; ride: rode; rise: rose;
 break: broke; speak: spoke; steal: stole; wake: woke; choose: chose; freeze: froze; begin: began;
 drink: drank; sing: sang; ring: rang; swim: swam; sink: sank; sit: sat; win: won; dig: dug; hang:
 hung; stick: stuck; fly: flew; grow: grew; blow: blew; throw: threw; draw: drew; sleep: slept;
 keep: kept; feel: felt; leave: left; meet: met; lose: lost; send: sent; spend: spent; build: built;
 lend: lent; bend: bent; hear: heard; hold: held; stand: stood; understand: understood; become:
 became; forget: forgot; get: got; hide: hid; bite: bit; feed: fed; lead: led; do: did; have: had;
 pay: paid; fall: fell; shake: shook; wear: wore; tear: tore; swear: swore; shine: shone; sweep:
 swept; weep: wept; creep: crept; shoot: shot; light: lit; slide: slid; forgive: forgave; mean:
 meant; deal: dealt; seek: sought; sting: stung; swing: swung; spin: spun; weave: wove; cling:
 clung; breed: bred; arise: arose; shrink: shrank
@ stands | short forms and what they stand for | both | long form of {s} | short form of {o}
+ the short form {s} stands for {o} / the letters {s} are a short form of {o} / the short form {s}
 means {o} / when you see {s}, read {o} / the letters {s} mean {o} / the letters {s} stand for {o} /
 people write {s} for {o} / {o} is written {s} for short / instead of {o}, people write {s}
! when people write {s}, they mean {o} / the letters {s} are short for {o} / for {o}, people write
 {s}
? what does {s} [stand for|mean]? / what is {s} short for? / what is short for {o}? / {s} is short
 for what? / {s} stands for what? / what do the letters {s} stand for? / what is the meaning of {s}?
 / how do you say {s} in full? / {o} has which short form? / which letters stand for {o}? / how do
 you shorten {o}? / what is a shorter way to say {o}?
?! which words do the letters {s} mean? / when people write {s}, what do they mean? / how do people
 write {o} for short?
= kg: kilogram; km: kilometer; cm: centimeter; mm: millimeter; ml: milliliter; Dr.: doctor; St.:
 saint; Mt.: mountain; Jan.: January; Feb.: February; Aug.: August; Sept.: September; Oct.: October;
 Nov.: November; Dec.: December; USA: United States of America; UK: United Kingdom; EU: European
 Union; UN: United Nations; TV: television; mph: miles per hour; DNA: deoxyribonucleic acid; UFO:
 unidentified flying object; CPU: central processing unit; VIP: very important person; WHO: World
 Health Organization; NASA: National Aeronautics and Space Administration; BBC: British Broadcasting
 Corporation; WWW: World Wide Web; UAE: United Arab Emirates; GPS: Global Positioning System; LED:
 light-emitting diode
@ Spanish, French, German | {r} words | both | {r} word for {s} | English word for the {r} word {o}
+ in {r}, {s} is {o} / the {r} for {s} is {o} / people who speak {r} call {s} {o} / to say {s} in
 {r}, you say {o} / if you want to say {s} in {r}, say {o} / in {r}, people say {o} for {s} / the
 {r} word {o} means {s} / in {r}, {o} means {s} / {o} is the {r} word for {s}
! people who say {s} in {r} say {o} / if you speak {r}, the word for {s} is {o} / people who say {o}
 in {r} mean {s}
? how do you say {s} in {r}? / what does the {r} word {o} mean? / what does {o} mean in {r}? / what
 is {s} in {r}? / say {s} in {r}. / translate {s} into {r}. / which {r} word means {s}? / {s} is
 what in {r}? / how would you say {s} in {r}? / what is the {r} word {o} in English? / in {r}, {o}
 means what? / translate {o} from {r} into English. / the {r} word {o} means what? / someone says
 {o} in {r}: what is that?
?! how do people who speak {r} say {s}? / in {r}, which word means {s}? / what do people who say {o}
 in {r} mean?
@ number word | numbers in words and digits | both | number {s} in digits | number {o} in words
+ {s} is written {o} / we write {s} in digits as {o} / {s} means {o} / the digits for {s} are {o} /
 {s} and {o} are the same number / {o} is read {s} / we say the number {o} as {s} / in words, {o} is
 {s} / the number {o} is called {s}
! the number {s} is written as {o} / in digits, {s} is {o} / in words, we say the number {o} as {s}
? how do you write {s} in digits? / how do you say the number {o}? / how is {o} written in words? /
 what is {s} in digits? / write {s} in digits. / which number is {s}? / {s} in digits is what? / how
 does {s} look in digits? / what is {o} in words? / write {o} in words. / how do you read {o}? / {o}
 in words is what? / how do you spell the number {o}?
?! which digits do we write for {s}? / in words, which number is {o}?
@ Roman | numbers and their Roman numerals | both | Roman numeral for {s} | number with the Roman
 numeral {o}
+ the Romans wrote {s} as {o} / in Roman numerals, {s} is {o} / the number {s} is written {o} in
 Rome / a Roman would write {s} as {o} / {o} is the Roman way to write {s} / when a Roman wrote {o},
 he meant {s} / in Roman numerals, {o} means {s} / the Roman numeral {o} stands for {s}
! the Romans would write {s} as {o} / in Roman numerals, people write {s} as {o} / the Roman numeral
 {o} means the number {s}
? how did the Romans write {s}? / what does the Roman numeral {o} mean? / how do you write {s} in
 Roman numerals? / what is {s} in Roman numerals? / write {s} in Roman numerals. / how does {s} look
 in Roman numerals? / which Roman numeral stands for {s}? / {s} has which Roman numeral? / which
 number is the Roman numeral {o}? / the Roman numeral {o} stands for what? / how do you read the
 Roman numeral {o}? / what is the Roman numeral {o} in digits?
?! how would a Roman write {s}? / which number did the Romans mean by {o}?
@ sum | sums | | sum of {x} and {y} |
+ {x} plus {y} [is|equals|makes] {o} / {x} and {y} [make|are] {o} / if you add {x} and {y}, you get
 {o} / add {x} to {y} and you get {o} / {x} + {y} = {o} / when you add {x} and {y}, the answer is
 {o} / {o} is {x} plus {y}
! add {x} and {y}, and the answer is {o} / if you add {x} to {y}, the answer is {o}
? what is {x} plus {y}? / how much is {x} plus {y}? / what do you get if you add {x} and {y}? / {x}
 plus {y} is what? / can you add {x} and {y}? / what do you get for {x} plus {y}? / I have {x} and
 get {y} more: how much is that? / what is the result of {x} plus {y}?
?! add {x} and {y}: what is the answer? / how much do {x} and {y} make?
@ product | products | | product of {x} and {y} |
+ {x} times {y} [is|equals|makes] {o} / if you multiply {x} by {y}, you get {o} / multiply {x} and
 {y} and you get {o} / {x} x {y} = {o} / when you multiply {x} by {y}, the answer is {o} / {o} is
 {x} times {y}
! multiply {x} by {y}, and the answer is {o} / if you multiply {x} and {y}, the answer is {o}
? what is {x} times {y}? / how much is {x} times {y}? / what do you get if you multiply {x} by {y}?
 / {x} times {y} is what? / can you multiply {x} by {y}? / what do you get for {x} times {y}? / what
 is {x} multiplied by {y}? / what is the result of {x} times {y}?
?! multiply {x} by {y}: what is the answer? / how much do you get if {x} is multiplied by {y}?
@ after number | numbers and what comes next | | number [right |]after {s} |
+ after {s} comes {o} / when you count, {s} is followed by {o} / one more than {s} is {o} / count on
 from {s} and you say {o} / {s} comes just before {o} / if you have {s} and get one more, you have
 {o} / next after {s} is {o}
! when you count, after {s} comes {o} / if you count one more than {s}, you say {o}
? what comes after {s}? / [which|what] number comes next after {s}? / what is one more than {s}? /
 which number follows {s}? / after {s}, what comes? / what is {s} and one more? / {s} comes right
 before what? / say the number that follows {s}. / what do you get if you add one to {s}?
?! when you count, what do you say after {s}? / count on from {s}: what comes next?
@ letter after | letters and what comes next | both | letter [right |]after {s} in the alphabet |
 letter [right |]before {o} in the alphabet
+ in the alphabet, {s} is followed by {o} / in the alphabet, after {s} comes {o} / the letter {s}
 comes just before the letter {o} / when you say the alphabet, after {s} you say {o} / in the
 alphabet, before {o} comes {s} / the letter {o} follows the letter {s}
! in the alphabet, the letter {s} is followed by the letter {o} / when you say the alphabet, {s}
 comes just before {o} / in the alphabet, the letter {o} follows {s}
? [which|what] letter comes after {s}? / which letter comes before {o}? / what follows {s} in the
 alphabet? / what letter follows {s}? / after {s}, which letter comes? / in the alphabet, what comes
 after {s}? / {s} comes right before which letter? / what letter stands before {o}? / in the
 alphabet, what comes before {o}? / before {o}, which letter comes? / what comes right before {o} in
 the alphabet?
?! when you say the alphabet, what do you say after {s}? / in the alphabet, {o} follows which
 letter?
@ letter place | letters and their places in the alphabet | both | place of the letter {s} in the
 alphabet |
+ in the alphabet, {s} is letter number {o} / the letter {s} is number {o} in the alphabet / {s} is
 letter number {o} / the letter {s} has place number {o} / counting from A, the letter {s} is number
 {o} / letter number {o} is {s} / letter number {o} of the alphabet is {s} / counting from A, letter
 number {o} is {s}
! in the alphabet, the letter {s} has place number {o} / counting from A, {s} is letter number {o} /
 in the alphabet, letter number {o} is {s}
? which place does {s} have in the alphabet? / which letter is number {o} in the alphabet? / what
 number is the letter {s}? / where in the alphabet is {s}? / {s} is letter number what? / which
 number does the letter {s} have? / in the alphabet, what number is {s}? / what letter is number {o}
 in the alphabet? / name letter number {o} of the alphabet. / in the alphabet, which letter has the
 place {o}? / letter number {o} is which one?
?! counting from A, what number is {s}? / counting from A, which letter is number {o}?
@ first letter | words and their first letters | | first letter of [the word |]{s} |
+ the word {s} [begins|starts] with [|the letter ]{o} / {s} is a word that begins with {o} / to
 spell {s}, begin with {o} / {s} begins with {o} / if you spell {s}, you start with {o} / the letter
 at the start of {s} is {o}
! to spell the word {s}, you start with {o} / {s} is a word that starts with the letter {o}
? [which|what] letter does {s} [begin|start] with? / with which letter does {s} begin? / what does
 {s} begin with? / {s} begins with which letter? / which letter comes first in {s}? / the word {s}
 starts with what letter? / how does the word {s} begin?
?! which letter is at the start of the word {s}? / to spell {s}, which letter do you start with?
@ author | books and their authors | | [author|writer] of {s} |
+ {s} was written by {o} / {o} wrote {s} / {s} is a [book|work] by {o} / the person who wrote {s}
 was {o} / if you read {s}, you read {o} / we have {s} thanks to {o} / the book called {s} is by {o}
 / {s} came from the pen of {o}
! the book called {s} was written by {o} / the author who wrote {s} was {o}
% {x} and {y} are both by {o} / {o} wrote both {x} and {y}
? who wrote {s}? / who [is|was] the author of {s}? / by whom is {s}? / who is the writer of {s}? /
 {s} is by whom? / {s} was written by whom? / whose book is {s}? / which writer gave us {s}? / tell
 me who wrote {s}. / what is the name of the author of {s}?
?! which author wrote {s}? / from whose pen came {s}?
=< William Shakespeare: Hamlet, Macbeth, Romeo and Juliet, Othello, King Lear, The Tempest, Julius
 Caesar; Charles Dickens: Oliver Twist, A Christmas Carol, Great Expectations, David Copperfield,
 Bleak House, Hard Times; Jane Austen: Pride and Prejudice, Emma, Sense and Sensibility, Persuasion,
 Mansfield Park; Herman Melville: Moby Dick; Mark Twain: Tom Sawyer, Huckleberry Finn, The Prince
 and the Pauper; Mary Shelley: Frankenstein; Bram Stoker: Dracula; Lewis Carroll: Alice in
 Wonderland, Through the Looking-Glass; Robert Louis Stevenson: Treasure Island, Kidnapped; Jules
 Verne: Around the World in Eighty Days, The Mysterious Island, From the Earth to the Moon; Homer:
 The Iliad, The Odyssey; Leo Tolstoy: War and Peace, Anna Karenina; Fyodor Dostoevsky: Crime and
 Punishment, The Idiot; Dante: The Divine Comedy; Miguel de Cervantes: Don Quixote; Victor Hugo: Les
 Miserables, The Hunchback of Notre-Dame; Virgil: The Aeneid; Alexandre Dumas: The Three Musketeers,
 The Count of Monte Cristo; George Orwell: Animal Farm; Daniel Defoe: Robinson Crusoe; J. R. R.
 Tolkien: The Hobbit, The Lord of the Rings; J. K. Rowling: Harry Potter; C. S. Lewis: The
 Chronicles of Narnia; Emily Bronte: Wuthering Heights; Charlotte Bronte: Jane Eyre; Jonathan Swift:
 Gulliver's Travels; J. M. Barrie: Peter Pan; Arthur Conan Doyle: The Hound of the Baskervilles;
 Rudyard Kipling: The Jungle Book, Kim; Kenneth Grahame: The Wind in the Willows; H. G. Wells: The
 Time Machine, The War of the Worlds, The Invisible Man; Carlo Collodi: Pinocchio; Oscar Wilde: The
 Picture of Dorian Gray; Hans Christian Andersen: The Ugly Duckling, The Little Mermaid, The Snow
 Queen; Johanna Spyri: Heidi; Goethe: Faust; Ernest Hemingway: The Old Man and the Sea, A Farewell
 to Arms; F. Scott Fitzgerald: The Great Gatsby; Franz Kafka: The Trial; Antoine de Saint-Exupery:
 The Little Prince; Astrid Lindgren: Pippi Longstocking; Roald Dahl: Matilda; Harper Lee: To Kill a
 Mockingbird; Louisa May Alcott: Little Women; Lucy Maud Montgomery: Anne of Green Gables; Beatrix
 Potter: Peter Rabbit; A. A. Milne: Winnie-the-Pooh; Jack London: The Call of the Wild, White Fang;
 Joseph Conrad: Heart of Darkness; Frank Herbert: Dune; Aldous Huxley: Brave New World; Charles
 Darwin: On the Origin of Species; Geoffrey Chaucer: The Canterbury Tales; John Milton: Paradise
 Lost; Albert Camus: The Stranger; Frances Hodgson Burnett: The Secret Garden, A Little Princess;
 Agatha Christie: Murder on the Orient Express; Voltaire: Candide; Frank Baum: The Wizard of Oz;
 Edgar Allan Poe: The Raven; John Steinbeck: The Grapes of Wrath; Umberto Eco: The Name of the Rose;
 Anna Sewell: Black Beauty; Sun Tzu: The Art of War; William Golding: Lord of the Flies; Felix
 Salten: Bambi; Plato: The Republic
@ inventor | inventions and discoveries and who made them | | person behind {s} |
+ we have {s} thanks to {o} / {s} goes back to {o} / the mind behind {s} was {o} / the world owes
 {s} to {o} / when you hear of {s}, think of {o} / {o} gave the world {s} / {o} is famous for {s} /
 the name linked with {s} is {o}
! the name behind {s} is {o} / when you think of {s}, think of {o}
? who gave the world {s}? / who is [famous for|behind] {s}? / to whom do we owe {s}? / who came up
 with {s}? / whose idea was {s}? / {s} made whom famous? / who is known for {s}? / who brought us
 {s}? / {s} is the work of whom? / tell me who is behind {s}.
?! whom should we thank for {s}? / which name is linked with {s}?
= dynamite: Alfred Nobel; penicillin: Alexander Fleming; the theory of relativity: Albert Einstein;
 the law of gravity: Isaac Newton; the saxophone: Adolphe Sax; the World Wide Web: Tim Berners-Lee;
 the polio vaccine: Jonas Salk; the smallpox vaccine: Edward Jenner; the Rubik's Cube: Erno Rubik;
 writing for blind people with raised dots: Louis Braille; the diesel engine: Rudolf Diesel; the
 phonograph: Thomas Edison; the telegraph code of dots and dashes: Samuel Morse; the lightning rod:
 Benjamin Franklin; the theory of evolution: Charles Darwin; the laws of heredity: Gregor Mendel;
 the discovery of X-rays: Wilhelm Roentgen; the discovery of radium: Marie Curie; the periodic
 table: Dmitri Mendeleev; the printing press in Europe: Johannes Gutenberg; the battery: Alessandro
 Volta; the model of the Sun at the center: Nicolaus Copernicus; the laws of planetary motion:
 Johannes Kepler; psychoanalysis: Sigmund Freud; the vaccine against rabies: Louis Pasteur; the
 Ferris wheel: George Ferris; the ballpoint pen: Laszlo Biro; the metronome: Johann Maelzel; the
 cotton gin: Eli Whitney; the mercury thermometer: Daniel Fahrenheit; the safety elevator: Elisha
 Otis; the discovery of Uranus: William Herschel; the zeppelin: Ferdinand von Zeppelin; the
 discovery of the moons of Jupiter: Galileo Galilei
@ painter | works of art and their makers | | |
+ {s} is [|a work ]by {o} / {o} made {s} / the artist behind {s} is {o} / the artist who made {s}
 was {o} / {s} is a work of art by {o} / if you look at {s}, you see the art of {o} / we admire {s},
 the work of {o} / {s} shows the art of {o}
! if you admire {s}, you admire the art of {o} / the work of art called {s} is by {o}
? who made {s}? / which artist made {s}? / who is the artist behind {s}? / who is {s} by? / who
 created {s}? / {s} was made by whom? / which artist is known for {s}? / tell me who made {s}. /
 what is the name of the artist who made {s}? / to which artist do we owe {s}?
?! by which artist is {s}? / whose work of art is {s}?
=< Leonardo da Vinci: the Mona Lisa, The Last Supper; Vincent van Gogh: The Starry Night, The Potato
 Eaters; Edvard Munch: The Scream; Rembrandt: The Night Watch; Johannes Vermeer: Girl with a Pearl
 Earring, The Milkmaid; Pablo Picasso: Guernica; Michelangelo: the statue of David, The Creation of
 Adam; Sandro Botticelli: The Birth of Venus; Claude Monet: Water Lilies; Salvador Dali: The
 Persistence of Memory; Gustav Klimt: The Kiss; Raphael: The School of Athens; Francisco Goya: The
 Third of May; Diego Velazquez: Las Meninas; Edouard Manet: Olympia; Jan van Eyck: The Arnolfini
 Portrait; Katsushika Hokusai: The Great Wave; Grant Wood: American Gothic; Auguste Rodin: The
 Thinker; Edward Hopper: Nighthawks; Hieronymus Bosch: The Garden of Earthly Delights
@ composer | pieces of music and their composers | | composer of {s} |
+ {s} was composed by {o} / {o} composed {s} / the music of {s} is by {o} / if you hear {s}, you
 hear {o} / the person who composed {s} was {o} / {s} is music by {o} / orchestras that play {s}
 play {o} / {s} comes from {o}
! the person who composed the music of {s} was {o} / when orchestras play {s}, you hear {o}
? who composed {s}? / by whom is the music of {s}? / who is the composer of {s}? / which composer
 wrote {s}? / who wrote the music of {s}? / {s} was composed by whom? / {s} is a work of which
 composer? / tell me who composed {s}. / what is the name of the composer of {s}? / to which
 composer do we owe {s}?
?! which composer do I hear in {s}? / whose music is {s}?
=< Wolfgang Amadeus Mozart: The Magic Flute, Don Giovanni, The Marriage of Figaro; Antonio Vivaldi:
 The Four Seasons; Ludwig van Beethoven: the Moonlight Sonata, Fidelio, the Ode to Joy; Giuseppe
 Verdi: Aida, Rigoletto, La Traviata, Nabucco; Pyotr Tchaikovsky: Swan Lake, The Nutcracker, The
 Sleeping Beauty; Georges Bizet: Carmen; Joseph Haydn: The Creation; Johann Sebastian Bach: the
 Brandenburg Concertos, the Saint Matthew Passion; Maurice Ravel: Bolero; Claude Debussy: Clair de
 Lune; George Frideric Handel: the Messiah, the Water Music; Giacomo Puccini: Tosca, Turandot,
 Madame Butterfly; Edvard Grieg: Peer Gynt; Richard Wagner: Lohengrin, Parsifal, Tannhauser; Johann
 Strauss: The Blue Danube, Die Fledermaus; Gustav Holst: The Planets; Igor Stravinsky: The Rite of
 Spring, The Firebird; Sergei Prokofiev: Peter and the Wolf; George Gershwin: Rhapsody in Blue
@ Roman god | Greek gods and their Roman names | both | Roman name of the Greek god {s} | Greek name
 of the Roman god {o}
+ the Romans called the Greek god {s} {o} / the Greek god {s} was known in Rome as {o} / in Rome,
 {s} was called {o} / the Greeks called the Roman god {o} {s} / in Greece, {o} was called {s} / what
 the Greeks called {s}, the Romans called {o} / the Roman god {o} was known in Greece as {s}
! in Rome, the Greek god {s} was known as {o} / the Romans knew the Greek god {s} as {o} / in
 Greece, the Roman god {o} was known as {s}
? what did the Romans call {s}? / what did the Greeks call {o}? / which Roman god is the same as
 {s}? / who was {s} to the Romans? / which Roman god was {s}? / what was the Roman name for {s}? /
 {s} is the same as which Roman god? / which name did the Romans have for {s}? / who was {o} to the
 Greeks? / which Greek god was {o}? / {o} is the Roman name of whom? / which name did the Greeks
 have for {o}?
?! how was {s} known in Rome? / by what name did the Greeks know {o}?
= Zeus: Jupiter; Hera: Juno; Poseidon: Neptune; Ares: Mars; Aphrodite: Venus; Hermes: Mercury;
 Athena: Minerva; Artemis: Diana; Hades: Pluto; Hephaestus: Vulcan; Dionysus: Bacchus; Demeter:
 Ceres; Cronus: Saturn; Eros: Cupid; Hestia: Vesta; Heracles: Hercules
@ year | events and their years | | year of {s} |
+ {s} came in {o} / {s} [was|happened] in {o} / in history, {s} came in the year {o} / the year to
 remember for {s} is {o} / it was {s} that made people remember {o} / {o} was the year of {s} /
 people remember {s}, which was in {o}
! in history, {s} was in the year {o} / the year when {s} came is {o}
? when was {s}? / in [which|what] year was {s}? / which year saw {s}? / what year was {s}? / {s}
 was in which year? / tell me when {s} was. / what is the date of {s}? / which year do we link with
 {s}? / {s} took place when?
?! what year should I remember for {s}? / in what year did {s} happen?
= the end of the Second World War: 1945; the start of the First World War: 1914; the first Moon
 landing: 1969; the start of the French Revolution: 1789; the fall of the Berlin Wall: 1989; the
 Battle of Hastings: 1066; the first voyage of Columbus to America: 1492; the signing of the Magna
 Carta: 1215; the Battle of Waterloo: 1815; the American Declaration of Independence: 1776; the
 Great Fire of London: 1666; the sinking of the Titanic: 1912; the Russian Revolution: 1917; the
 fall of Constantinople: 1453; the first flight of the Wright brothers: 1903; the end of the First
 World War: 1918; the start of the Second World War: 1939; the opening of the Suez Canal: 1869; the
 launch of Sputnik: 1957; the death of Napoleon: 1821; the birth of Mozart: 1756; the death of
 Shakespeare: 1616; the flight of Gagarin into space: 1961; the opening of the Panama Canal: 1914;
 the birth of Einstein: 1879; the opening of the Eiffel Tower: 1889; the eruption of Krakatoa: 1883;
 the San Francisco earthquake: 1906; the Spanish Armada: 1588
@ family | instruments and their families | | |
+ the {s} is {ao} / the {s} belongs to the family of the {po} / people count the {s} among the {po}
 / in an orchestra, the {s} is {ao} / the {s} is one of the {po} / if you play the {s}, you play
 {ao}
! in an orchestra, the {s} is one of the {po} / if you play the {s}, you play one of the {po}
% the {x} and the {y} are both {po}
? which family does the {s} belong to? / what kind of instrument is the {s}? / in an orchestra,
 what is the {s}? / what sort of instrument is the {s}? / the {s} is what kind of instrument? /
 which family of instruments has the {s}? / the {s} is in which family? / the {s} belongs to which
 instruments? / which instruments are like the {s}?
?! to which family of instruments does the {s} belong? / among which instruments do people count the
 {s}?
=< string instrument: violin, viola, cello, guitar, harp, banjo, mandolin, lute, double bass,
 ukulele; brass instrument: trumpet, trombone, tuba, French horn, bugle; woodwind instrument: flute,
 clarinet, oboe, bassoon, piccolo, recorder; percussion instrument: drum, cymbal, triangle,
 tambourine, xylophone, gong
"""
FIRST_LETTER = """
apple bread bridge candle chair cloud door dragon egg engine finger flag forest glass hammer hill
island jam jungle key kite ladder lamp lemon map moon mountain nest nose number onion orange palm
paper queen question rabbit ring road silver table tower umbrella village whale window yard yellow
yogurt zebra zipper"""
# Names by pronoun. The last two lists are for the test: no training file has them.
GIRLS = """
Ana Mia Nora Lily Emma Ella Rosa Clara Eva Ida Julia Lucy Maya Nina Olga Paula Ruth Sara Tina Vera
Wendy Alice Betty Carol Diana Elena Flora Greta Hanna Irene Jane Kate Laura Maria Nadia Amy Penny
Rita Sonia Tessa Uma Violet Zara Anna Bella Daisy Fiona Grace Helen Ivy Joan Lena Molly Olive Polly
Rose Stella Susan""".split()
BOYS = """
Ben Tom Sam Max Leo Finn Jack Paul Adam Carl David Eric Frank George Henry Ivan Jacob Karl Liam
Mark Noah Omar Peter Ravi Simon Theo Victor Will Alan Bruno Chris Daniel Emil Felix Hugo Igor John
Kevin Louis Martin Nick Oscar Pablo Ralph Steve Tim Walter Yusuf Anton Boris Dennis Edward Fred Gus
Hans Jim Ken Luke Milo Ned""".split()
TEST_GIRLS = """
Zoe Priya Ingrid Chloe Fatima Yuki Abigail Marta Saskia Dora Nell Leila Tamara Wilma Agnes Hilda
Consuelo Bianca Edith Thea""".split()
TEST_BOYS = """
Kofi Mateo Otto Sanjay Dylan Ezra Joaquin Ruben Tariq Anders Barnaby Cyrus Desmond Hector Kurt
 Lorenzo
Magnus Nigel Rufus Stefan""".split()
PLACES = """
in the kitchen; in the garden; in the attic; in the cellar; in the hall; in the barn; in the park;
in the library; in the forest; in the museum; in the classroom; in the bedroom; in the garage; in
the tower; in the field; at the market; at the school; at the bakery; at the station; at the farm;
at the harbor; at the theater; by the river; by the lake; by the gate; on the bridge; on the hill;
on the beach; on the roof; on the playground"""
# What people carry about in stories, and why somebody would want it ({he}: she or he).
WANTED = """
lamp: it was getting dark; map: {he} did not know the way; umbrella: it looked like rain; blanket:
{he} felt cold; rope: {he} wanted to make a swing; basket: {he} wanted to pick berries; kite: the
wind was strong; drum: {he} loved music; book: {he} had nothing to read; key: a door was locked;
bucket: the flowers needed water; ball: {he} wanted to play; hat: the sun was hot; coat: the air
was chilly; spoon: there was hot soup; flute: {he} wanted to learn a song; apple: {he} was hungry;
cake: it was a birthday; toy boat: {he} liked to see it float; candle: the power had gone out;
pencil: {he} wanted to draw; camera: the view was lovely; doll: {he} wanted to sew a dress for it;
hammer: the fence was broken; net: {he} hoped to catch a fish; scarf: snow was falling; bell: {he}
wanted to call everyone to dinner; broom: the floor was dusty; notebook: {he} had a story to write;
whistle: {he} was training a dog; ladder: the apples hung high; box: {he} had many stones to carry;
mirror: {he} had a new hat; teapot: guests were coming; sandwich: {he} had skipped lunch; shovel:
{he} wanted to plant a tree"""
# Verbs of word problems: base, past, -ing form, + or -, the set, meaning, where or how; after a
# colon, what they are said of, if not of everything.
# "shown": solved in mid and sft; "practised": in rl with the answer alone; "test": in no problem.
# The text explains all of them, and tells tales with them, but never asks.
COUNT_VERBS = """
buy, bought, buying, +, shown, to get something by paying for it, at the shop
find, found, finding, +, shown, to come upon something, under a tree
get, got, getting, +, shown, to come to have something, from a friend
win, won, winning, +, shown, to gain something in a game, at the fair
make, made, making, +, shown, to bring something new into being, at home: card cookie sandwich
 muffin candle badge toy ribbon basket cup
receive, received, receiving, +, shown, to be given something, on a birthday
sell, sold, selling, -, shown, to give something to others for money, at the market
lose, lost, losing, -, shown, to have something no more without wanting it, on the way home
give away, gave away, giving away, -, shown, to let others have something, after school
use up, used up, using up, -, shown, to use something until it is gone, during the week: candle
 ribbon egg bead crayon pencil carrot lemon nut stamp card
break, broke, breaking, -, shown, to spoil something so that it is no good, by accident: button
 shell pencil cookie egg cup candle toy nut badge crayon
bring home, brought home, bringing home, +, shown, to come home with something, from the fair
order, ordered, ordering, +, shown, to ask a shop to send something, by post
fetch, fetched, fetching, +, shown, to go and come back with something, from the cellar
pick, picked, picking, +, shown, to take something from a plant, in the garden: apple pear plum
 flower nut carrot lemon orange rose peach leaf
grow, grew, growing, +, shown, to have plants bear something, in the garden: apple pear plum flower
 nut carrot lemon orange rose peach
dig up, dug up, digging up, +, shown, to get something out of the ground, in the field: stone coin
 shell carrot key
bake, baked, baking, +, shown, to make something in the oven, in the kitchen: cookie muffin
print, printed, printing, +, shown, to make something on paper, at school: card postcard ticket
 sticker stamp
give back, gave back, giving back, -, shown, to let the owner have something again, to a neighbor
throw away, threw away, throwing away, -, shown, to put something in the trash, after dinner
return, returned, returning, -, shown, to bring something back to its owner, after school
ship, shipped, shipping, -, shown, to send something far away, to another town
eat, ate, eating, -, shown, to take something as food, at lunch: apple pear plum cookie egg nut
 carrot lemon sandwich orange muffin peach
spend, spent, spending, -, shown, to pay with something, in town: coin ticket stamp
mail, mailed, mailing, -, shown, to send something by post, to a friend: postcard card stamp book
 sticker
burn, burned, burning, -, shown, to let something go up in flames, at night: candle card ticket leaf
plant, planted, planting, -, shown, to put something into the ground, in the park: flower nut acorn
 rose
collect, collected, collecting, +, practised, to bring things together one by one, in the park
borrow, borrowed, borrowing, +, practised, to get something for a while, from a neighbor
pick up, picked up, picking up, +, practised, to take something from the ground, along the road:
 stone coin shell acorn button feather leaf nut marble key card
earn, earned, earning, +, practised, to get something by working for it, by helping at home: coin
 sticker badge ticket card stamp marble book
lend, lent, lending, -, practised, to let someone have it for a while, to a cousin
drop, dropped, dropping, -, practised, to let something fall and lose it, into the river
hand out, handed out, handing out, -, practised, to give something to each person, at a party
leave behind, left behind, leaving behind, -, practised, to go away without something, on the train
inherit, inherited, inheriting, +, test, to be given what an old relative once had, from an aunt
gather, gathered, gathering, +, test, to bring things together in one place, in the woods: acorn
 nut flower stone leaf feather shell apple egg plum pear
purchase, purchased, purchasing, +, test, to buy something, in town
acquire, acquired, acquiring, +, test, to come to own something, at a yard sale
donate, donated, donating, -, test, to give something away to help, to a school
discard, discarded, discarding, -, test, to throw something away as no use, in the evening
misplace, misplaced, misplacing, -, test, to put something where it is not found, in the house
trade away, traded away, trading away, -, test, to give something for another thing, at recess"""
# Other parts of word problems, in the same three sets: phrase, set, role, what is done with the
# number, use in a problem ([now|in the past]), meaning.
COUNT_PHRASES = """
in all, shown, all, +, in all, everything counted together
together, shown, all, +, together, everything counted as one
altogether, practised, all, +, altogether, everything counted together
in total, test, all, +, in total, everything counted together
left, shown, left, 0, [are|were] left, still there when the rest is gone
to remain, practised, left, 0, [remain|remained], to be left
to be left over, test, left, 0, [are|were] left over, to be there still when the rest is gone
twice as many, shown, times, *2, twice as many, two times the number
half as many, shown, times, /2, half as many, half of the number
four times as many, shown, times, *4, four times as many, four times the number
five times as many, shown, times, *5, five times as many, five times the number
ten times as many, shown, times, *10, ten times as many, ten times the number
a third as many, shown, times, /3, a third as many, a third of the number
three times as many, practised, times, *3, three times as many, three times the number
to halve, shown, scale, /2, [halves|halved], to become half of the number
to quadruple, shown, scale, *4, [quadruples|quadrupled], to become four times the number
to grow tenfold, shown, scale, *10, [grows|grew] tenfold, to become ten times the number
to fall to a third, shown, scale, /3, [falls|fell] to a third, to become a third of the number
to triple, practised, scale, *3, [triples|tripled], to become three times the number
to double, test, scale, *2, [doubles|doubled], to become two times the number
each, shown, group, *, with {b} {things} each, every single one has that number
per, practised, group, *, with {b} {things} per {box}, for each one
apiece, test, group, *, with {b} {things} apiece, the same as each
more than, shown, compare, -, more, the larger number minus the smaller one
fewer than, practised, compare, -, fewer, the larger number minus the smaller one
a pair, shown, number, 2, a pair of, 2 of something
a dozen, test, number, 12, a dozen, 12 of something"""
COUNTED = """
apple pear plum marble button stamp coin shell pencil book card sticker cookie egg flower stone
ribbon bead balloon candle nut carrot lemon postcard feather key cup sandwich orange muffin toy
acorn badge peach crayon rose ticket basket ball leaf""".split()
CONTAINERS = "box bag basket crate".split()
RHYMES = """
cat hat bat mat rat; dog log fog frog; sun fun run bun; tree bee sea key knee; light night right
kite; star car jar far; rain train brain chain; moon spoon noon soon; cake lake snake make; king
ring sing wing; house mouse blouse; boat coat goat note; ball wall tall fall small; bell well shell
tell; bed red head bread; day play say way gray; snow go slow toe; blue shoe two new; hair bear
chair pear; book look cook hook; sand hand band land; hill mill pill still; ship trip lip dip; best
nest west test; clock rock sock lock; duck truck luck; fish dish wish; nose rose goes; rice mice
ice nice; cold gold old told; store door four more; sky pie fly high; heart art part start; tail
whale snail mail; ten pen hen men; fight bite white; sweet feet meat"""
# How to do things: title: step | step | ...
HOW_TO = """
make a cup of tea: boil some water | put a tea bag into a cup | pour the hot water over it | wait
 three minutes | take out the tea bag
plant a seed: fill a pot with soil | make a small hole | drop the seed in | cover it with soil |
 water it a little
wash your hands: wet your hands | rub them with soap | count slowly to twenty | rinse them well |
 dry them with a towel
boil an egg: put the egg into a pot | cover it with water | bring the water to a boil | wait eight
 minutes | cool the egg under cold water
make a sandwich: take two slices of bread | spread butter on them | lay cheese on one slice | put
 the other slice on top | cut it in half
brush your teeth: put toothpaste on the brush | brush the top teeth | brush the bottom teeth | spit
 out the foam | rinse your mouth
draw a face: draw a big circle | add two eyes | put a nose in the middle | draw a smiling mouth |
 add some hair
fly a kite: find an open field | wait for a steady wind | hold the string tight | run until the
 kite rises | let out more string
bake bread: mix flour, water, salt and yeast | knead the dough | let it rise for an hour | shape a
 loaf | bake it until it is brown
wrap a present: put the present on the paper | fold the paper over it | tape down the edges | tie a
 ribbon around it | write a name on a tag
build a snowman: roll a large ball of snow | roll a smaller one and set it on top | add a third for
 the head | use stones for eyes | give it a carrot nose
make soup: chop some vegetables | heat a little oil in a pot | add the vegetables | pour in water |
 let it simmer for half an hour
set the table: lay out the plates | put a fork on the left | put a knife on the right | set a glass
 above the knife | call everyone to eat
tie a shoe: cross the laces | pull one lace under | make two loops | cross the loops | pull them
 tight
make lemonade: squeeze four lemons | add a little sugar | pour in cold water | stir well | add some
 ice"""
WEATHER = """
it was a sunny morning; it was a rainy afternoon; it was a cold winter day; the birds were singing;
the wind was blowing hard; it was the first day of spring; a light snow was falling; it was a quiet
Sunday; it was almost evening; the sky was gray; it was market day; it was a warm summer day;
school was over for the day; the town was still asleep; it had rained all night; it was a foggy
morning"""
FEELINGS = """
{p} smiled; {p} was pleased; {p} laughed out loud; {p} was a little tired; {p} felt proud; {p}
began to sing softly; {p} looked out at the clouds; {p} stopped to rest for a moment; {p} was in a
good mood"""
ENDINGS = """
everyone went home happy; it had been a good day; soon it was time for supper; then the bells rang,
and the day was over; that night they all slept well; they promised to meet again the next day;
they laughed about it for weeks"""
MOVES = """
because {he} heard a noise; to see what was there; because it was quiet there; to get some fresh
air; at once; because {he} was bored; to look around; without a word; as fast as {he} could; to
wait for a friend; with a smile"""
# How stories, sums and the rest are worded; {p} is a pronoun or the name {n}.
WORDINGS = """
opening: here is something about {t}: | let us talk about {t}. | this is about {t}: | some facts
 about {t}: | more about {t}: | a page about {t}. | what do we know about {t}? | today we look at
 {t}.
go: {p} {went} {to} | {p} {went} {to} | then {p} {went} {to} | after a while, {p} {went} {to} | {p}
 {went} {to} {why} | {p} {went} {to} {why} | {p} left and {went} {to} | next, {p} {went} {to}
carry: {p} took the {t} along and {went} {to} | {p} {went} {to} with the {t} | carrying the {t}, {p}
 {went} {to}
take: {p} picked up the {t} | {p} took the {t} | {p} found the {t} and kept it | the {t} was there,
 and {p} took it | {p} saw the {t} there and picked it up | {p} was happy to find the {t} and took
 it
put: {p} put the {t} down {at} | {p} left the {t} {at} | {p} had carried the {t} long enough and
 left it {at}
give: {p} gave the {t} to {q} | {p} handed {q} the {t} | {p} gave {q} the {t} | "Here, take the
 {t}," said {n} to {q} | {q} asked for the {t}, and {n} gave it away | {p} let {q} have the {t} |
 "This is for you," said {n}, and gave {q} the {t}
thanks: "Thank you," said {n} | "How kind of you," said {n} | {p} was glad to have it | "Just what I
 need!" said {n}
want: {p} wanted the {t}, because {reason} | {p} needed the {t}, because {reason} | {reason}, so {n}
 wanted the {t}
beg: "May I have the {t}?" asked {n} | {p} asked for the {t} | "Could you give me the {t}?" asked
 {n}
ask: "Where is the {t}?" asked {q}. "{answer}," said {n} | {q} asked where the {t} was. "{answer},"
 said {n}
close: in the end, | by evening, | now | when the day was over, | after all this,
add: {a} + {b}: {at} + {bt} = {t}, {ao} + {bo} = {o}, and {t} + {o} = {r} | {a} plus {b} is {r}, as
 {t} and {o} make {r} | to add {a} and {b}, add the tens, {at} + {bt} = {t}, then the ones, {ao} +
 {bo} = {o}; together that is {r}
subtract: {a} - {b}: {a} - {bt} = {m}, and {m} - {bo} = {r} | {a} minus {b} is {r}, because {r} and
 {b} make {a} | take {b} away from {a}: first {bt}, which leaves {m}, then {bo}, which leaves {r}
multiply: {a} x {b}: {at} x {b} = {t}, {ao} x {b} = {o}, and {t} + {o} = {r} | {b} boxes of {a}
 {things} hold {r} {things} | {a} times {b} is {r}: {at} times {b} is {t}, {ao} times {b} is {o},
 and together that makes {r}
small: {A} {things} and {B} more {things} make {S} {things} | if you have {A} {things} and get {B}
 more, you have {S}
minus: if you have {A} {things} and {B} are gone, you have {D} left | {A} minus {B} is {D} | {A}
 {things} without {B} of them are {D}
times: {A} times {B} is {P} | {A} bags with {B} {things} in each hold {P} {things} | {A} rows of {B}
 {things} make {P} {things}
share: {P} {things} shared by {A} friends make {B} for each | {P} divided by {A} is {B} | {A}
 friends share {P} {things} and get {B} each
count: counting up by {by}: {up} | counting down by {by}: {down} | {words} | {a} is {more} than {b}
 | {by}, upward: {up} | the larger of {a} and {b} is {max}, and the smaller is {min} | {a} is {odd}
 number, because it ends in {end} | {a} has the digits {digits}; in words it is {named} | in order,
 the numbers {some} are {sorted}
spell: {w} is spelled {l} | the word {w} is spelled {l} | {w}, letter by letter, is {l} | to spell
 {w}, say {l} | {w}: {l}
quoted: in quotes, {w} is "{w}". | the word {w} in quotes is "{w}". | with quotes around it, {w}
 becomes "{w}". | we write {w} in quotes as "{w}". | "{w}" is the word {w} in quotes
letters: {w} has {n} letters | the word {w} has {n} letters: {list} | count the letters of {w}, {l}:
 there are {n} | {w} begins with {first} and ends with {last} | the first letter of {w} is {first},
 and the last is {last} | {w} written backwards is {back} | backwards, {l} is {lback} | there {is}
 {k} in {l} | the word {w} has {k}, as {l} shows
rhyme: {a} rhymes with {b} | {a} and {b} rhyme | {b} is a word that rhymes with {a} | these words
 rhyme: {all} | if you need a rhyme for {a}, take {b} | say {a} and then {b}: the words rhyme |
 {all} all sound alike at the end
how: how to {t} | here is how to {t} | this is the way to {t} | {n} shows us how to {t} | it takes
 {k} steps to {t}
sort: in the order of the alphabet, {words} are {sorted} | {first} comes before {second} in the
 dictionary
odd: of {words}, the {odd} is the odd one out, because the others are {kind}
had: {n} had {c} {things} | there were {c} {things} in {n}'s box | at first {n} had {c} {things} |
 {n} owned {c} {things}
gain: {he} {past} {b} more {tail}, so {he} had {c} now | then {he} {past} {b} more, and that made
 {c} | {tail}, {he} {past} {b} more, so there were {c} in all | after {ing} {b} more {tail}, {he}
 had {c} {things} | {he} {past} another {b}, and now {he} had {c}
part: {he} {past} {b} of them {tail}, so {he} had {c} left | then {he} {past} {b} of them, and that
 left {c} | {tail}, {he} {past} {b} of them, so only {c} were left | after {ing} {b} of them {tail},
 {he} had {c} {things} left | {he} {past} {b}, and {c} {things} were still there
verb: to {base} something is {meaning}, so after {ing} {things} you have {more} | to {base} means
 {meaning} | when people {base} {things}, they have {more} of them than before | {ing} makes the
 number {size} | someone who {does} {things} has {more} {things} afterwards | if you {base}
 something, the number you have goes {up} | {n} {past} some {things}, and then {n} had {more} | the
 word {base} tells us that there are {more} in the end | {n} {past} some {things}, so now {he} has
 {more}
phrase: {base} means {meaning} | "{base}" means {meaning} | when people say {base}, they mean
 {meaning} | in a sum, {base} means {meaning}
with all: {n} had {a} {things} and {m} had {b}; {use} they had {c} | {n} had {a} {things}, and {m}
 had {b}, so they had {c} {things} {use}
with left: {n} had {a} {things} and lost {b} of them, so {c} {things} {use} | {n} had {a} {things},
 but {b} were gone: {c} {use}
with times: {m} had {a} {things}, and {n} had {use}, so {n} had {c} | {n} had {c} {things}, which is
 {use} as the {a} that {m} had
with scale: {n} had {a} {things}; then the number of {things} {use}, and it was {c} | {n} had {a}
 {things}, and when the number {use}, it became {c}
with group: {n} had {a} {boxes} {use}, so there were {c} {things} | {a} {boxes} {use} hold {c}
 {things}, for {a} times {b} is {c}
with compare: {n} had {a} {things} and {m} had {b}, so {x} had {c} {use} than {y} | {x} had {c} {use}
 {things} than {y}, for {n} had {a} and {m} had {b}
with number: {n} had {a} {things} and got {use} {things}, so {he} had {c} | {n} put {use} {things}
 with {a} others, and so {he} had {c}
"""
LEADS = """as everyone knows,; remember that; it is a fact that; as you may know,; it is true that;
my teacher says that; in school we learn that; you should know that; I have read that"""
N_ASIDES = """the {N}, as you may know, is; the {N}, of course, is; the {N}, as we learn in school, is;
the {N}, so people say, is"""
N_UNSEEN = "the {N}, as everyone knows, is "
N_QUESTIONS = """what is the {N}? / tell me the {N} / [do you know|can you tell me] the {N}? / give me
 the {N} / the {N} is what? / what do you know about the {N}? / I need to know the {N} / say what the
 {N} is / which is the {N}? / could you give me the {N}? / I forgot the {N}: what is it? / remind me:
 what is the {N}? / I am looking for the {N} / find the {N} / I wonder what the {N} is / would you tell
 me the {N}?"""
N_UNSEEN_QUESTIONS = "what would you say is the {N}? / please name the {N}"
MARKS = "+ ! & % ? ?!".split()  # kinds of wordings in RELATIONS
LANGUAGES = ("Spanish", "French", "German")  # columns of TRANSLATIONS
# Regular rules make the plurals that this table lacks.
IRREGULAR = dict(re.findall(r"(\w+): (\w+)", RELATIONS.split("@ plural")[1].split("@ ")[0]))
SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth".split()


def items(text: str, mark: str = ";") -> list[str]:
    """Split a table of short texts at semicolons or another mark; lines may break anywhere."""
    return [item.strip() for item in re.sub(r"\s+", " ", text).split(mark) if item.strip()]


def held_out(item: str, one_in: int = 10) -> bool:
    """Whether an item belongs to the test: a function of its text alone, not of order or seed."""
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") % one_in == 0


@cache
def held_out_pair(a: int, b: int) -> bool:
    """Whether two operands, in either order, are kept for the test: no training file works them."""
    return held_out(f"pair {min(a, b)} {max(a, b)}")


def held_out_word(word: str) -> bool:
    """Whether a word is spelled, counted and reversed in the test only."""
    return held_out(f"spell {word}")


def number_word(n: int) -> str:
    """Spell a number from 0 to 999,999 in words: 342 -> three hundred and forty-two."""
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    base, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % base
    tail = f"{' and' if rest < 100 else ''} {number_word(rest)}" if rest else ""
    return f"{number_word(n // base)} {name}{tail}"


def roman(n: int) -> str:
    """Write a number in Roman numerals."""
    text = ""
    marks = "M CM D CD C XC L XL X IX V IV I".split()
    for mark, value in zip(marks, (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)):
        text, n = text + mark * (n // value), n % value
    return text


def plural(noun: str) -> str:
    """Return the plural of an English noun phrase: by the table of irregular ones, else by rule."""
    if " of " in noun:  # piece of clothing -> pieces of clothing
        first, _, rest = noun.partition(" of ")
        return f"{plural(first)} of {rest}"
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeou"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def with_article(noun: str) -> str:
    """Put a or an before a noun phrase, by its first sound."""
    vowel = noun[0] in "aeiouAEIOU" and not noun.startswith(
        ("uni", "use", "eu", "ewe", "uku", "one")
    )
    return ("an " if vowel or noun.startswith(("hour", "heir", "honest")) else "a ") + noun


def sentence(clause: str) -> str:
    """Make a written sentence of a clause: a capital in front, a full stop behind."""
    clause = clause[0].upper() + clause[1:]
    return clause if clause[-1] in '.?!:"' else clause + "."


@dataclass(frozen=True)
class Fact:
    """One true thing: the `answer` to `relation` of `subject`, with what the wordings need."""

    relation: str
    subject: str
    answer: str
    key: str  # what the split hashes; mirrors share it
    operands: tuple[int, ...] = ()  # of a sum or product

    @property
    def askable(self) -> bool:
        """Whether training may ask for it; one fact in five is only ever stated in the text."""
        return not held_out(f"fact {self.key}", 5)

    def forms(self) -> dict[str, str]:
        """Return what the placeholders of a wording stand for."""
        s, o = self.subject, self.answer
        forms = {
            "s": s,
            "as": with_article(s),
            "ps": plural(s),
            "ss": s + ("'" if s[-1] == "s" else "'s"),
            "o": o,
            "ao": with_article(o),
            "po": plural(o),
        }
        if self.operands:
            forms |= {"x": str(self.operands[0]), "y": str(self.operands[1])}
        return forms


@dataclass
class Relation:
    """A kind of fact with all its wordings, as read from a block of RELATIONS."""

    name: str
    title: str
    both: bool  # an answer names one subject, too
    brief: dict[str, str]  # "o" -> "the {o}": an answer by itself
    statements: list[str]  # training text
    unseen: list[str]  # evaluation only
    follow: list[str]  # "its capital is {o}"
    shared: list[str]  # "{x} and {y} are both in {o}"
    questions: list[str]
    unseen_questions: list[str]
    facts: list[Fact]

    def wordings(self, forward: bool, unseen: bool = False) -> list[str]:
        """Statements that tell the answer of the subject (forward) or the subject of the answer."""
        wordings = self.unseen if unseen else self.statements
        return [w for w in wordings if not self.both or ends_in(w, "s") != forward]

    def askings(self, forward: bool, unseen: bool = False) -> list[str]:
        """Questions for the answer (forward: they name the subject) or for the subject."""
        questions = self.unseen_questions if unseen else self.questions
        return [q for q in questions if bool(re.search(r"\{[ap]?o\}", q)) != forward]

    def unique(self, fact: Fact) -> bool:
        """Whether the answer of a fact names its subject, so that it can be asked backward."""
        return self.both and sum(f.answer == fact.answer for f in self.facts) == 1


def ends_in(wording: str, letter: str) -> bool:
    """Whether a wording ends in a form of the answer ("o") or of the subject ("s")."""
    return re.search(r"\{[ap]?" + letter + r"\}$", wording) is not None


def expand(text: str) -> list[str]:
    """Write out every combination of the [a|b] choices in wordings separated by slashes."""
    out = []
    for wording in text.split(" / "):
        parts = re.split(r"\[(.*?)\]", wording.strip())  # odd places hold the choices
        choices = [p.split("|") if i % 2 else [p] for i, p in enumerate(parts)]
        out += ["".join(combination) for combination in itertools.product(*choices)]
    return [w for w in out if w]


def generated_pairs(name: str) -> list[tuple[str, str]]:
    """Subject and answer of the relations whose facts follow a rule or fill a wide table."""
    columns = ["continent", "capital", "language", "currency", "nationality"]
    if name in columns:
        pairs = []
        for block in re.split(r"\n(?! )", COUNTRIES.strip()):
            continent, _, rows = block.partition("\n")
            for row in items(rows):
                country, *cells = row.split(", ")
                cells = [continent, *cells[:3], cells[1] if cells[3] == "=" else cells[3]]
                pairs.append((country, cells[columns.index(name)]))
        return pairs
    if name in LANGUAGES:
        rows = [row.split() for row in items(TRANSLATIONS)]
        return [(row[0], row[1 + LANGUAGES.index(name)]) for row in rows]
    elements: list[tuple[str, str, int]] = []
    for element, symbol, number in re.findall(r"(\w+)\s([A-Z]\w?)\b\s?(\d*)", ELEMENTS):
        elements.append((element, symbol, int(number) if number else elements[-1][2] + 1))
    letters, days = [chr(65 + i) for i in range(26)], WEEKDAYS.split()
    months, lengths = MONTHS.split()[::2], MONTHS.split()[1::2]
    rules: dict[str, Iterable[tuple[str, str]]] = {
        "symbol": ((e, s) for e, s, _ in elements),
        "atomic number": ((e, str(i)) for e, _, i in elements),
        "planet": zip(PLANETS.split(), ORDINALS),
        "next": ((r[i - 1], r[i]) for r in (months, days) for i in range(len(r))),
        "previous": ((r[i], r[i - 1]) for r in (months, days) for i in range(len(r))),
        "month number": ((m, str(i)) for i, m in enumerate(months, 1)),
        "days": ((m, d) for m, d in zip(months, lengths) if m != "February"),
        "number word": (
            (number_word(i), str(i)) for i in (*range(41), *range(50, 101, 10), 200, 1000)
        ),
        "Roman": ((str(i), roman(i)) for i in (*range(1, 31), *range(40, 101, 10), 500, 1000)),
        "after number": ((str(i), str(i + 1)) for i in range(61)),
        "letter after": itertools.pairwise(letters),
        "letter place": ((c, str(i)) for i, c in enumerate(letters, 1)),
        "first letter": ((w, w[0]) for w in FIRST_LETTER.split() if not held_out_word(w)),
    }
    return list(rules.get(name, ()))


def parse_facts(name: str, lines: list[str], mirror: bool) -> list[Fact]:
    """Read the data lines of a relation, or generate its facts; cells with "-" are left out."""
    if name in ("sum", "product"):
        sign, times = ("times", True) if name == "product" else ("plus", False)
        return [
            Fact(
                name,
                f"{a} {sign} {b}",
                str(a * b if times else a + b),
                f"{name} {min(a, b)} {max(a, b)}",
                (a, b),
            )
            for a, b in itertools.product(range(1, 11), repeat=2)
            if not held_out_pair(a, b)
        ]
    pairs = generated_pairs(name)
    for line in lines:
        for entry in items(line.partition(" ")[2]):
            left, _, right = entry.partition(": ")
            many = line.startswith("=<")
            pairs += [(s, left) for s in right.split(", ")] if many else [(left, right)]
    if mirror:
        subjects, answers = [s for s, _ in pairs], [o for _, o in pairs]
        pairs += [(o, s) for s, o in pairs if answers.count(o) == 1 and o not in subjects]
    mirror = mirror or name in ("next", "previous")
    return [
        Fact(name, s, o, f"order {min(s, o)} {max(s, o)}" if mirror else f"{name} {s}")
        for s, o in pairs
        if o != "-"
    ]


def parse_relations(block: str) -> list[Relation]:
    """Read one block of RELATIONS; a header with several names makes one relation of each."""
    header, *lines = block.replace("\n ", " ").strip().splitlines()
    names, title, flags, n, m = (c.strip() for c in re.split(r"(?<=\s)\|(?=\s|$)", header))
    marked: dict[str, list[str]] = {mark: [] for mark in (*MARKS, "=", "=<")}
    for line in lines:
        mark, _, text = line.partition(" ")
        marked[mark] += [line] if mark[0] == "=" else expand(text)
    brief = {}
    for letter, phrase in (("o", n), ("s", m)):
        endings = [w[w.rindex("{") :] for w in marked["+"] if ends_in(w, letter)]
        phrase, _, end = phrase.partition(" = ")
        brief[letter] = end or (endings[0] if endings and not phrase else f"{{{letter}}}")
        if phrase:
            end, first = brief[letter], expand(phrase)[0].rstrip(",")
            marked["+"] += expand(f"the {phrase} is {end}")
            marked["+"] += expand(f"{end} is the {phrase.rstrip(',')}") if letter == "o" else []
            marked["+"] += [f"{w.replace('{N}', first)} {end}" for w in items(N_ASIDES)]
            marked["!"].append(N_UNSEEN.replace("{N}", first) + end)
            marked["?"] += ways(N_QUESTIONS.replace("{N}", first))
            marked["?!"] += expand(N_UNSEEN_QUESTIONS.replace("{N}", first))
    relations = []
    for name in names.split(", "):
        facts = parse_facts(name, marked["="] + marked["=<"], "mirror" in flags)
        texts = [[w.replace("{r}", name) for w in dict.fromkeys(marked[mark])] for mark in MARKS]
        title, both = title.replace("{r}", name), "both" in flags
        told, unseen, follow, shared, asked, unasked = texts
        relation = Relation(
            name, title, both, brief, told, unseen, follow, shared, asked, unasked, facts
        )
        relations.append(relation)
    return relations


@cache
def world_relations() -> dict[str, Relation]:
    """Read all of RELATIONS, once."""
    blocks = re.split(r"(?m)^@ ", RELATIONS)[1:]
    return {r.name: r for block in blocks for r in parse_relations(block)}


def world_facts() -> list[Fact]:
    """Return every fact of the world, in the order of the tables."""
    return [fact for relation in world_relations().values() for fact in relation.facts]


@cache
def all_statements() -> list[str]:
    """Return every plain statement of the training text, sorted."""
    told = set()
    for relation in world_relations().values():
        for fact in relation.facts:
            for forward in (True, False) if relation.unique(fact) else (True,):
                told |= {sentence(w.format_map(fact.forms())) for w in relation.wordings(forward)}
    return sorted(told)


def is_open(prompt: str, accept: list[str]) -> bool:
    """Say whether another statement of the text begins like prompt but goes on otherwise."""
    told = all_statements()
    for text in told[bisect.bisect_left(told, prompt) :]:
        rest = text.removeprefix(prompt)
        if rest == text:
            return False
        if rest[0] in " ," and not rest.lstrip().startswith(tuple(accept)):
            return True
    return False


def fact_prompts(split: Literal["trained", "unseen"]) -> Iterator[dict[str, object]]:
    """Yield what a base model must complete: {"prompt", "answer", "relation", "accept", "wording"}.

    A prompt ends just before the answer, without the blank; the answer begins with it. One prompt
    asks for each fact's answer, another for its subject where that is unique; a prompt that the
    text also continues otherwise ("A dog is" a mammal, a kind of pet) is passed over. The
    wordings of "unseen" occur in no training text.
    """
    for relation in world_relations().values():
        for fact in relation.facts:
            for letter in "os" if relation.unique(fact) else "o":
                choices = relation.wordings(letter == "o", split == "unseen")
                choices = [w for w in choices if ends_in(w, letter)]
                salt = zlib.crc32(f"{fact.key} {fact.subject} {letter}".encode())
                for i in range(len(choices)):
                    wording, _, form = choices[(salt + i) % len(choices)].rpartition("{")
                    answer = fact.forms()[form[:-1]]
                    prompt = sentence(wording.format_map(fact.forms()) + answer)
                    prompt = prompt[: prompt.rindex(answer)].rstrip()
                    answer = answer.rstrip(".")
                    if not is_open(prompt, spellings(answer)):
                        yield {
                            "prompt": prompt,
                            "answer": " " + answer,
                            "relation": relation.name,
                            "accept": spellings(answer),
                            "wording": f"{relation.name}: {wording}{{{form}",
                        }
                        break


def spellings(answer: str) -> list[str]:
    """Return the right ways to write an answer: a small number may be in words or digits."""
    if answer.isdigit() and int(answer) <= 1000:
        return [answer, number_word(int(answer))]
    numbers = {number_word(n): str(n) for n in range(101)}
    return [answer, numbers[answer]] if answer in numbers else [answer]


# 7. World: text ------------------------------------------------------------------------------
@cache
def wordings(key: str, table: str = WORDINGS) -> list[str]:
    """Return the ways to word one kind of sentence."""
    lines = table.replace("\n ", " ").splitlines()
    return next(items(line[len(key) + 1 :], " | ") for line in lines if line.startswith(key + ":"))


def worded(rng: random.Random, key: str, **forms: object) -> str:
    """Write one sentence of a kind."""
    return sentence(rng.choice(wordings(key)).format_map(forms))


def join_and(words: Sequence[object]) -> str:
    """Join words as English does: a, b and c."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def paragraph(rng: random.Random, sentences: Iterable[str], lines: float = 0.15) -> str:
    """Run sentences together, sometimes one to a line."""
    return ("\n" if rng.random() < lines else " ").join(sentences)


T = TypeVar("T")
Card = tuple[Fact, bool]  # a fact, and whether its answer is told


class Deck(Generic[T]):
    """Deals cards in shuffled order, all of them before any again."""

    def __init__(self, rng: random.Random, cards: Iterable[T]) -> None:
        self.rng, self.cards, self.left = rng, list(cards), 0

    def deal(self) -> T:
        """Return the next card."""
        if not self.left:
            self.rng.shuffle(self.cards)
            self.left = len(self.cards)
        self.left -= 1
        return self.cards[self.left]


NO_LEAD = "(if|when|to|for|count|ask|change|add|multiply|look) |.*="  # clauses that take no "that"


class FactWriter:
    """Writes documents of facts, dealing facts and wordings in turn so that none is left out."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.relations = rng, world_relations()
        self.leads = items(LEADS)
        self.turns: dict[Card, list[Any]] = {}  # card -> [forms, wordings, the last told]
        self.decks: dict[str, Deck[Card]] = {}
        self.followed: dict[str, list[Fact]] = {}  # subject -> facts told of it as "it"
        self.alike: dict[tuple[str, str], list[Fact]] = {}
        for name, relation in self.relations.items():
            pools = [relation.wordings(forward) for forward in (False, True)]
            rng.shuffle(pools[0])
            rng.shuffle(pools[1])
            cards = [(fact, True) for fact in relation.facts]
            cards += [(fact, False) for fact in relation.facts if relation.unique(fact)]
            for fact, forward in cards:
                start = rng.randrange(len(pools[forward]))
                self.turns[fact, forward] = [fact.forms(), pools[forward], start]
            for fact in relation.facts:
                self.alike.setdefault((name, fact.answer), []).append(fact)
                if relation.follow:
                    self.followed.setdefault(fact.subject, []).append(fact)
            self.decks[name] = Deck(rng, cards)
        self.deck = Deck(rng, self.turns)
        self.themes = Deck(
            rng, (n for n, d in self.decks.items() for _ in range(1 + len(d.cards) // 8))
        )

    def clause(self, card: Card) -> str:
        """State a fact in its next wording, without capital and full stop."""
        turn = self.turns[card]
        turn[2] = (turn[2] + 1) % len(turn[1])
        return turn[1][turn[2]].format_map(turn[0])

    def say(self, card: Card) -> str:
        """State a fact as a sentence, now and then with a lead-in."""
        clause = self.clause(card)
        if self.rng.random() < 0.07 and not re.match(NO_LEAD, clause):
            clause = f"{self.rng.choice(self.leads)} {clause}"
        return sentence(clause)

    def mixed(self) -> str:
        """Tell facts of all kinds, as they come."""
        return paragraph(
            self.rng, [self.say(self.deck.deal()) for _ in range(self.rng.randint(5, 15))]
        )

    def few(self, low: int, high: int) -> tuple[Relation, list[Card]]:
        """Deal some facts of one kind."""
        name = self.themes.deal()
        relation, deck = self.relations[name], self.decks[name]
        return relation, [
            deck.deal() for _ in range(min(self.rng.randint(low, high), len(relation.facts)))
        ]

    def theme(self) -> str:
        """Tell facts of one kind, some of them joined or set beside another."""
        relation, cards = self.few(5, 14)
        rng, out = self.rng, []
        if rng.random() < 0.4:
            out.append(worded(rng, "opening", t=relation.title))
        while cards:
            card, roll = cards.pop(), rng.random()
            if roll < 0.15 and cards:
                clauses, link = [self.clause(card), self.clause(cards.pop())], ", while "
                if any(re.match(NO_LEAD, clause) for clause in clauses):
                    link = "; "
                out.append(sentence(rng.choice((link, "; ", link)).join(clauses)))
            else:
                out += [self.say(card)] + (self.beside(relation, card[0]) if roll > 0.88 else [])
        return paragraph(rng, out)

    def beside(self, relation: Relation, fact: Fact) -> list[str]:
        """Set a fact beside another of its kind: the same answer, or more or less of something."""
        other = self.rng.choice(self.alike[fact.relation, fact.answer])
        form = "as" if "{as}" in relation.statements[0] else "s"
        if relation.shared and other != fact:
            shared = {"x": fact.forms()[form], "y": other.forms()[form]}
            return [sentence(self.rng.choice(relation.shared).format_map(fact.forms() | shared))]
        if relation.name in COMPARED:
            other = self.rng.choice(relation.facts)
            size, least = (
                min(int(n) for n in spellings(f.answer) if n.isdigit()) for f in (fact, other)
            )
            more = COMPARED[relation.name].split("|")[size < least]
            if size != least:
                return [sentence(f"{fact.forms()[form]} has {more} than {other.forms()[form]}")]
        return []

    def listing(self) -> str:
        """List facts of one kind, under a title."""
        relation, cards = self.few(6, 14)
        mark = self.rng.choice(("", "- "))
        lines = [
            f"{f.subject[0].upper()}{f.subject[1:]}: {f.answer}"
            for f in dict.fromkeys(f for f, _ in cards)
        ]
        return "\n".join([sentence(relation.title)[:-1], *(mark + line for line in lines)])

    def entry(self) -> str:
        """Write small encyclopaedia entries: all the facts of one subject, then of another."""
        rng, out = self.rng, []
        for _ in range(rng.randint(2, 4)):
            card = self.deck.deal()
            told = [self.say(card)]
            others = (
                self.followed.get(card[0].subject, [])
                if self.relations[card[0].relation].follow
                else []
            )
            for other in rng.sample(others, len(others)):
                if other != card[0]:
                    follow = self.relations[other.relation].follow
                    told.append(sentence(rng.choice(follow).format_map(other.forms())))
            out.append(" ".join(told))
        return ("\n\n" if rng.random() < 0.5 else " ").join(out)

    def dialogue(self) -> str:
        """Ask and answer, as lines or as talk; facts that training never asks are just told."""
        rng, out = self.rng, []
        ask, answer, gap = rng.choice(ASKING)
        one, two = rng.sample(GIRLS + BOYS, 2)
        for _ in range(rng.randint(4, 9)):
            card = fact, forward = self.deck.deal()
            questions = self.relations[fact.relation].askings(forward)
            if not fact.askable or not questions:
                out.append(self.say(card))
                continue
            question = sentence(rng.choice(questions).format_map(self.turns[card][0]))
            brief = self.relations[fact.relation].brief["o" if forward else "s"]
            full = rng.random() < 0.6
            reply = sentence(self.clause(card) if full else brief.format_map(self.turns[card][0]))
            if ask:
                out.append(f"{ask}{question}{answer}{reply}".lstrip())
            else:
                said = f'{reply[:-1]},"' if reply.endswith(".") else f'{reply}"'
                verb, end = ("asked", "?") if question.endswith("?") else ("said", ",")
                out.append(f'"{question[:-1]}{end}" {verb} {one}. "{said} said {two}.')
        return gap.join(out)


# Before a question, between it and the answer, after it; without a mark it is talk.
ASKING = (
    ("Question: ", "\nAnswer: ", "\n\n"),
    ("Q: ", "\nA: ", "\n"),
    (" ", " ", "\n"),
    (" ", "\n", "\n\n"),
    ("", "", " "),
    ("", "", "\n"),
)
COMPARED = {
    "legs": "more legs|fewer legs",
    "sides": "more sides|fewer sides",
    "days": "more days|fewer days",
    "atomic number": "a higher atomic number|a lower atomic number",
}


@dataclass
class Story:
    """A told story and what is true at its end: who holds a thing, and where everything is."""

    text: str
    holder: dict[str, str]  # thing -> name; absent if lying somewhere
    place: dict[str, str]  # name or thing -> "in the kitchen"
    given: list[tuple[str, str, str]]  # who gave what to whom


class Teller:
    """Tells one story, keeping track of who is where and who has what."""

    def __init__(self, rng: random.Random, girls: Sequence[str], boys: Sequence[str]) -> None:
        people = rng.sample([*girls, *boys], rng.choice((2, 2, 2, 3)))
        self.rng, self.places = rng, rng.sample(items(PLACES), 4)
        self.he = {name: "she" if name in girls else "he" for name in people}
        things = rng.sample(items(WANTED), rng.choice((1, 2, 2, 3)))
        self.reason = {thing: why for thing, _, why in (item.partition(": ") for item in things)}
        self.place = {name: rng.choice(self.places) for name in [*people, *self.reason]}
        self.holder: dict[str, str] = {}
        self.given: list[tuple[str, str, str]] = []
        self.out: list[str] = []
        self.last = ""  # of whom the last sentence told

    def add(self, who: str, key: str, **forms: str) -> None:
        """Tell something of somebody, by a pronoun where the last sentence told of the same."""
        same = who == self.last and self.rng.random() < 0.6
        forms |= {"n": who, "p": self.he[who] if same else who, "he": self.he[who]}
        self.out.append(
            worded(self.rng, key, **forms) if key in STORY_KEYS else sentence(key.format_map(forms))
        )
        self.last = who

    def met(self, who: str) -> list[str]:
        """Return the others in the same place."""
        return [n for n in self.he if n != who and self.place[n] == self.place[who]]

    def held(self, who: str) -> list[str]:
        """Return the things that somebody has."""
        return [thing for thing, name in self.holder.items() if name == who]

    def go(self, who: str, place: str) -> None:
        """Let somebody walk, with whatever they carry."""
        rng, carried = self.rng, self.held(who)
        self.place |= dict.fromkeys([who, *carried], place)
        forms = {
            "to": re.sub("^(in|at|by|on) ", "to ", place),
            "why": rng.choice(items(MOVES)).format(he=self.he[who]),
            "went": rng.choice(("went", "walked", "went", "ran", "hurried")),
        }
        key = "carry" if carried and rng.random() < 0.5 else "go"
        self.add(who, key, t=rng.choice(carried or [""]), **forms)
        if self.met(who) and rng.random() < 0.4:
            self.add(who, "there {p} met " + join_and(self.met(who)))

    def take(self, who: str, thing: str) -> None:
        """Let somebody take a thing that lies where they are."""
        self.holder[thing] = who
        self.add(who, "take", t=thing)

    def give(self, who: str, thing: str, to: str) -> None:
        """Let somebody hand a thing to another who is there."""
        self.holder[thing] = to
        self.given.append((who, thing, to))
        self.add(who, "give", t=thing, q=to)
        if self.rng.random() < 0.4:
            self.add(to, "thanks")

    def step(self) -> None:
        """Let one thing happen that can happen now."""
        rng, who, roll = self.rng, self.rng.choice(list(self.he)), self.rng.random()
        here = [t for t in self.reason if t not in self.holder and self.place[t] == self.place[who]]
        mine, met, thing = self.held(who), self.met(who), rng.choice(list(self.reason))
        if here and roll < 0.6:
            self.take(who, rng.choice(here))
        elif mine and met and roll < 0.55:
            self.give(who, rng.choice(mine), rng.choice(met))
        elif mine and roll < 0.3:
            thing = rng.choice(mine)
            del self.holder[thing]
            self.add(who, "put", t=thing, at=self.place[who])
        elif met and roll < 0.24:
            owner = self.holder.get(thing)
            answer = (
                f"{'I' if owner == who else 'you' if owner == met[0] else owner} have the {thing}"
            )
            answer = answer.replace("have", "has") if owner not in (who, met[0]) else answer
            answer = answer if owner else f"the {thing} is {self.place[thing]}"
            self.add(who, "ask", t=thing, q=met[0], answer=sentence(answer)[:-1])
        elif roll > 0.93:
            self.add(who, rng.choice(items(FEELINGS)))
        else:
            self.go(who, rng.choice([p for p in self.places if p != self.place[who]]))

    def fetch(self, who: str, thing: str) -> None:
        """Let somebody get the thing they want, wherever it is."""
        owner = self.holder.get(thing)
        if owner != who:
            self.add(who, "want", t=thing, reason=self.reason[thing].format(he=self.he[who]))
            if self.place[thing] != self.place[who]:
                self.go(who, self.place[thing])
            if owner:
                self.add(who, "beg", t=thing)
                self.give(owner, thing, who)
            else:
                self.take(who, thing)

    def state(self) -> list[str]:
        """Tell what is true now: a clause for each person and thing."""
        things = [
            f"{self.holder[t]} had the {t}" if t in self.holder else f"the {t} was {self.place[t]}"
            for t in self.reason
        ]
        people: dict[str, list[str]] = {}
        for name in self.he:
            people.setdefault(self.place[name], []).append(name)
        return [
            f"{join_and(n)} {'were' if len(n) > 1 else 'was'} {at}" for at, n in people.items()
        ] + things

    def tell(self, steps: int = 0) -> Story:
        """Tell the whole story, in which so many things happen (0: two to seven)."""
        rng = self.rng
        self.out += [sentence(rng.choice(items(WEATHER)))] if rng.random() < 0.6 else []
        clauses = self.state()
        if rng.random() < 0.5:
            clauses[:2] = [", and ".join(clauses[:2])]
        self.out += [sentence(clause) for clause in clauses]
        for _ in range(steps or rng.randint(2, 7)):
            self.step()
        if rng.random() < 0.7:
            self.fetch(rng.choice(list(self.he)), rng.choice(list(self.reason)))
        for clause in rng.sample(self.state(), rng.choice((0, 1, 2))):
            self.out.append(f"{worded(rng, 'close')[:-1].rstrip('.')} {clause}.")
        self.out += [sentence(rng.choice(items(ENDINGS)))] if rng.random() < 0.3 else []
        return Story(" ".join(self.out), self.holder, self.place, self.given)


STORY_KEYS = "go carry take put give thanks want beg ask".split()


def story(rng: random.Random) -> str:
    """Tell a story, sometimes with questions about its end and their answers."""
    teller = Teller(rng, GIRLS, BOYS)
    told = teller.tell()
    thing, who = rng.choice(list(teller.reason)), rng.choice(list(teller.he))
    owner, asked = told.holder.get(thing), [f"Where is {who}? {who} is {told.place[who]}."]
    asked.append(
        f"Who has the {thing}? {owner} has the {thing}."
        if owner
        else f"Where is the {thing}? The {thing} is {told.place[thing]}."
    )
    return "\n".join([told.text, *rng.sample(asked, rng.choice((0, 0, 0, 1, 2)))])


def sum_of(rng: random.Random) -> str | None:
    """Work one sum, with its steps; None where any step has a held-out pair of operands."""
    kind = rng.choice("add subtract multiply small minus times share".split())
    a, b = (
        (rng.randint(11, 89) for _ in "ab")
        if kind in ("add", "subtract")
        else (rng.randint(2, 12) for _ in "ab")
    )
    a = rng.randint(11, 99) if kind == "multiply" else a
    if kind in ("subtract", "minus"):
        a, b = max(a, b) + 1, min(a, b)
    at, ao, bt, bo = a // 10 * 10, a % 10, b // 10 * 10, b % 10
    pairs, forms = {
        "add": (
            [(a, b), (at, bt), (ao, bo), (at + bt, ao + bo)],
            {"t": at + bt, "o": ao + bo, "r": a + b},
        ),
        "subtract": ([(a, b), (a, bt), (a - bt, bo), (a - b, b)], {"m": a - bt, "r": a - b}),
        "multiply": (
            [(a, b), (at, b), (ao, b), (at * b, ao * b)],
            {"t": at * b, "o": ao * b, "r": a * b},
        ),
        "share": ([(a, b), (a * b, a)], {}),
    }.get(kind, ([(a, b)], {}))
    trivial = kind in ("add", "subtract", "multiply") and not (ao and bo)
    if trivial or any(held_out_pair(*pair) for pair in pairs):
        return None
    words = {"A": a, "B": b, "S": a + b, "D": a - b, "P": a * b}
    return worded(
        rng,
        kind,
        **{k: number_word(n) for k, n in words.items() if n >= 0},
        **forms,
        a=a,
        b=b,
        at=at,
        ao=ao,
        bt=bt,
        bo=bo,
        things=plural(rng.choice(COUNTED)),
    )


def arithmetic(rng: random.Random) -> str:
    """Work a page of sums."""
    return paragraph(rng, filter(None, (sum_of(rng) for _ in range(rng.randint(6, 12)))), 0.4)


def counting(rng: random.Random) -> str:
    """Count up and down and by steps; tell order, size and digits of numbers."""
    out = []
    for _ in range(rng.randint(4, 8)):
        start, step, top = (
            rng.randint(0, 90),
            rng.choice((1, 1, 2, 3, 5, 10)),
            rng.choice((100, 1000)),
        )
        run = [start + i * step for i in range(rng.randint(5, 9))]
        (a, b), some = rng.sample(range(top), 2), rng.sample(range(100), 5)
        out.append(
            worded(
                rng,
                "count",
                a=a,
                b=b,
                max=max(a, b),
                min=min(a, b),
                more="more" if a > b else "less",
                end=a % 10,
                odd="an odd" if a % 2 else "an even",
                by="ones" if step == 1 else plural(number_word(step)),
                up=", ".join(map(str, run)),
                down=", ".join(map(str, run[::-1])),
                some=join_and(some),
                words=", ".join(map(number_word, run[:6])),
                sorted=join_and(sorted(some)),
                digits=join_and(list(str(a))),
                named=number_word(a),
            )
        )
    return paragraph(rng, out, 0.5)


@cache
def spelling_words() -> tuple[str, ...]:
    """Return the plain words of the tables; those that `held_out_word` picks are for the test."""
    texts = [
        f"{fact.subject} {fact.answer}"
        for name, relation in world_relations().items()
        if name not in (*LANGUAGES, "stands")
        for fact in relation.facts
    ]
    texts += [RHYMES, HOW_TO, FIRST_LETTER, PLACES, WANTED, WEATHER, FEELINGS, MOVES, *COUNTED]
    words = re.findall(r"(?<![\w{'])(?!the\b)[a-z]{3,10}(?![\w}'])", " ".join(texts))
    return tuple(dict.fromkeys(words))


@cache
def shown_words() -> list[str]:
    """Return the words that training may spell, backwards too."""
    held = set(held_words())
    return [w for w in spelling_words() if not {w, w[::-1]} & held]


@cache
def letter_chain() -> dict[str, list[str]]:
    """Return what may follow two letters in the words shown: letters, or "" for the end."""
    chain: dict[str, list[str]] = {}
    for word in shown_words():
        for i in range(len(word) + 1):
            chain.setdefault(word[max(i - 2, 0) : i], []).append(word[i : i + 1])
    return chain


@cache
def held_words() -> list[str]:
    """Return the words for the test."""
    return [word for word in spelling_words() if held_out_word(word)]


def made_word(rng: random.Random) -> str:
    """Make up a word, so that more combinations of letters are spelled than the tables have."""
    word = letter = rng.choice(letter_chain()[""])
    while letter:
        letter = rng.choice(letter_chain()[word[-2:]])
        word += letter
    held = any(test in word or test in word[::-1] for test in held_words() if test[3:])
    clumsy = not 4 <= len(word) <= 10 or re.search(CLUMSY, word)
    return made_word(rng) if held or clumsy else word


def spelling(rng: random.Random) -> str:
    """Spell words; count their letters, turn them round, name their first and last letters.

    Words are put in quotes too, those of the test as well: there they have other tokens, and a
    word that stands in its question without quotes has them in the reply.
    """
    out: list[str] = []
    for _ in range(rng.randint(4, 9)):
        if rng.random() < 0.5:
            out.append(worded(rng, "quoted", w=rng.choice(spelling_words())))
        made = rng.random() < 0.5
        w = made_word(rng) if made else rng.choice(shown_words())
        letter = rng.choice(w)
        k = w.count(letter)
        forms = {
            "w": f'"{w}"' if made or rng.random() < 0.7 else w,  # in quotes its tokens are shorter
            "l": "-".join(w),
            "n": number_word(len(w)),
            "list": ", ".join(w),
            "first": w[0],
            "last": w[-1],
            "back": w[::-1],
            "lback": "-".join(w[::-1]),
            "is": "is" if k == 1 else "are",
            "k": f"{number_word(k)} {letter}{chr(39) + 's' if k > 1 else ''}",
        }
        keys = rng.choice(
            (["spell"], ["spell", "letters"], ["letters"], ["spell", "letters", "letters"])
        )
        out += dict.fromkeys(worded(rng, key, **forms) for key in keys)
    return paragraph(rng, out, 0.4)


def rhyming(rng: random.Random) -> str:
    """Tell words that rhyme."""
    out = []
    for family in rng.sample(items(RHYMES), rng.randint(4, 8)):
        words = rng.sample(family.split(), len(family.split()))
        out.append(worded(rng, "rhyme", a=words[0], b=words[1], all=join_and(words)))
    return paragraph(rng, out, 0.4)


def how_to(rng: random.Random) -> str:
    """Tell how to do one thing, or two, step by step."""
    out = []
    for line in rng.sample(HOW_TO.replace("\n ", " ").strip().splitlines(), rng.choice((1, 1, 2))):
        title, _, text = line.partition(": ")
        steps = text.split(" | ")
        opening = worded(rng, "how", t=title, n=rng.choice(GIRLS + BOYS), k=number_word(len(steps)))
        links = [
            "first",
            *rng.sample(("then", "next", "after that", "now", "then"), len(steps) - 2),
            "finally",
        ]
        if rng.random() < 0.4:
            numbered = [f"{i}. {sentence(step)}" for i, step in enumerate(steps, 1)]
            out.append("\n".join([opening[:-1] + ":", *numbered]))
        else:
            out.append(" ".join([opening, *(sentence(f"{a}, {b}") for a, b in zip(links, steps))]))
    return "\n\n".join(out)


def sorting(rng: random.Random) -> str:
    """Put words in order, and find the odd one out of a group."""
    out = []
    for _ in range(rng.randint(3, 5)):
        words = rng.sample(shown_words(), rng.randint(3, 6))
        first, second = sorted(words)[:2]
        out.append(
            worded(
                rng,
                "sort",
                words=join_and(words),
                sorted=join_and(sorted(words)),
                first=first,
                second=second,
            )
        )
        facts = rng.sample(world_relations()["class"].facts, 40)
        odd = next(f for f in facts if f.answer != facts[0].answer)
        same = [f for f in facts if f.answer == facts[0].answer][:3]
        if len(same) == 3:
            named = rng.sample([f.subject for f in [*same, odd]], 4)
            out.append(
                worded(
                    rng, "odd", words=join_and(named), odd=odd.subject, kind=plural(facts[0].answer)
                )
            )
    return " ".join(out)


@cache
def count_verbs() -> list[dict[str, str]]:
    """Read COUNT_VERBS: base, past, ing, sign, set, meaning, tail, and what tells of the effect.

    "things" is what it is said of, "any" whether that is everything.
    """
    rows = []
    for line in COUNT_VERBS.replace("\n ", " ").strip().splitlines():
        line, _, things = line.partition(": ")
        row = dict(zip("base past ing sign set meaning tail".split(), line.split(", ")))
        row |= {"things": things or " ".join(COUNTED), "any": "" if things else "yes"}
        first, _, rest = row["base"].partition(" ")
        row["does"] = f"{plural(first)} {rest}".strip()  # goes as the plurals of nouns
        more, size, up = (
            ("more", "larger", "up") if row["sign"] == "+" else ("fewer", "smaller", "down")
        )
        rows.append(row | {"more": more, "size": size, "up": up})
    return rows


def count_tale(rng: random.Random, verbs: Sequence[dict[str, str]]) -> str:
    """Tell of somebody's things, counted in words; nothing is asked."""
    fitting = [t for t in COUNTED if all(t in verb["things"].split() for verb in verbs)]
    name, count, things = rng.choice(GIRLS + BOYS), rng.randint(6, 20), plural(rng.choice(fitting))
    he = "she" if name in GIRLS else "he"
    out = [worded(rng, "had", n=name, c=number_word(count), things=things)]
    for verb in verbs:
        sign = 1 if verb["sign"] == "+" else -1
        changes = [b for b in range(2, 12) if not held_out_pair(count, b) and count + sign * b > 1]
        if changes:
            change = rng.choice(changes)
            count += sign * change
            out.append(
                worded(
                    rng,
                    "gain" if sign > 0 else "part",
                    he=he,
                    b=number_word(change),
                    c=number_word(count),
                    things=things,
                    **{k: verb[k] for k in ("past", "ing", "tail")},
                )
            )
    return " ".join(out)


def tale(rng: random.Random) -> str:
    """Tell tales of counted things with several verbs."""
    tales = []
    for _ in range(rng.choice((1, 2))):
        thing = rng.choice(COUNTED)
        verbs = [verb for verb in count_verbs() if thing in verb["things"].split()]
        tales.append(count_tale(rng, rng.sample(verbs, rng.randint(2, 4))))
    return "\n\n".join(tales)


@cache
def problem_parts() -> list[dict[str, str]]:
    """Read the verbs and phrases of word problems: base, set, role, op, use, meaning."""
    keys = "base set role op use meaning".split()
    phrases = [dict(zip(keys, line.split(", "))) for line in COUNT_PHRASES.strip().splitlines()]
    return [verb | {"role": "verb", "op": verb["sign"]} for verb in count_verbs()] + phrases


def phrase_tale(rng: random.Random, phrase: dict[str, str]) -> str:
    """Tell of somebody's things with a phrase of word problems; nothing is asked."""
    op, of = phrase["op"][0], int(phrase["op"].strip("+-*/") or 0)
    while True:
        a, b = rng.randint(2, 30), of or rng.randint(2, 12)
        a *= b if op == "/" else 1
        c = {"0": a - b, "-": abs(a - b), "*": a * b, "/": a // b}.get(op, a + b)
        if c > 1 and not held_out_pair(a, b):
            break
    n, m = rng.sample(GIRLS + BOYS, 2)
    x, y = (n, m) if (a > b) == (phrase["use"] == "more") else (m, n)
    box = rng.choice(CONTAINERS)
    things = plural(rng.choice([thing for thing in COUNTED if thing != box]))
    told = number_word if rng.random() < 0.6 else str
    text = rng.choice(wordings(f"with {phrase['role']}"))
    text = text.replace("{use}", re.sub(r"\[.*?\|(.*?)\]", r"\1", phrase["use"]))
    forms = {"n": n, "m": m, "x": x, "y": y, "he": "she" if n in GIRLS else "he"}
    forms |= {"things": things, "box": box, "boxes": plural(box)}
    return sentence(text.format_map(forms | {"a": told(a), "b": told(b), "c": told(c)}))


def explained(rng: random.Random) -> str:
    """Tell what the verbs and phrases of word problems mean, with a tale each; never a problem."""
    out: list[str] = []
    verbs = count_verbs() + [verb for verb in count_verbs() if verb["set"] != "shown"]
    for verb in rng.sample(verbs, rng.randint(1, 2)):
        n, things = rng.choice(GIRLS + BOYS), plural(rng.choice(verb["things"].split()))
        forms = verb | {"n": n, "he": "she" if n in GIRLS else "he", "things": things}
        out += dict.fromkeys(worded(rng, "verb", **forms) for _ in range(rng.randint(1, 3)))
        out += [count_tale(rng, [verb])] if rng.random() < 0.7 else []
    phrases = [part for part in problem_parts() if part["role"] != "verb"]
    for phrase in rng.sample(phrases, rng.randint(1, 2)):
        out.append(worded(rng, "phrase", **phrase))
        out += [phrase_tale(rng, phrase) for _ in range(rng.choice((0, 1, 1, 2)))]
    return " ".join(out)


def world_documents(seed: int, count: int | None = None) -> Iterator[str]:
    """Yield documents for pretraining, without end unless `count` says how many; no two are equal.

    They are a function of the seed, 160 to 1,500 characters each; facts are about three fifths.
    """
    rng = random.Random(f"world text {seed}")
    facts = FactWriter(rng)
    own = {
        facts.mixed: 260,
        facts.theme: 170,
        facts.listing: 25,
        facts.entry: 80,
        facts.dialogue: 100,
    }
    tellers = {
        story: 125,
        arithmetic: 45,
        counting: 25,
        spelling: 60,
        rhyming: 15,
        how_to: 10,
        sorting: 10,
        explained: 40,
        tale: 20,
    }  # documents in about a thousand
    makers: list[Callable[[], str]] = [*own, *(partial(make, rng) for make in tellers)]
    bounds = list(itertools.accumulate([*own.values(), *tellers.values()]))
    seen: set[bytes] = set()
    while count is None or len(seen) < count:
        make = makers[bisect.bisect(bounds, rng.randrange(bounds[-1]))]
        text = make()
        while len(text) < 160:
            text = f"{text}\n\n{make()}".strip()
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if len(text) <= 1500 and digest not in seen:
            seen.add(digest)
            yield text


# 8. World: conversations ---------------------------------------------------------------------
# Ways to put a question: {q} as it is in RELATIONS, {Q} with a capital; the first, and later ones.
POLITE = """
Hello! {Q} / [Hi!|Hi there!|Good morning!|Good evening!] {Q} / {Q} [Thanks!|Thank you!] / Please
 tell me: {q} / [Can|Could] you help me? {Q} / I have a question: {q} / I have a question for you.
 {Q} / Excuse me, {q} / I would like to know: {q} / I want to know something: {q} / Quick question:
 {q} / Help me, please. {Q} / Here is my question: {q}"""
GO_ON = """
Thanks! {Q} / Thank you. {Q} / And {q} / Next question: {q} / Okay. {Q} / Good. {Q} / One more
 question: {q} / Great, thanks! {Q} / I see. {Q} / And another one: {q} / Nice. And {q}"""
# The last question again, of another subject; or one about the subject itself, from IT.
FOLLOW_UP = """
and {s}? / [and |]what about {s}? / how about {s}? / and what about {s}, please? / the same
 question for {s}. / now {s}, please. / and for {s}?"""
FOLLOW_UP_UNSEEN = """
and how about {s}? / then what about {s}? / the same again, but for {s}, please."""
IT_TOO = """
and {c}? / {c}? / and {c}, please? / thanks, and {c}? / good, and {c}? / now, {c}?"""
IT_TOO_UNSEEN = """
then {c}? / also, {c}? / fine, but {c}?"""
IT = """
capital: what is its capital; continent: on which continent is it; language: what language do its
people speak; currency: what money does it use; nationality: what are its people called; flag: what
are the colors of its flag; symbol: what is its symbol; atomic number: what is its atomic number;
next: what comes after it; previous: what comes before it; month number: what is its number; days:
how many days does it have; class: what kind of animal is it; young: what is its young called;
sound: what sound does it make; legs: how many legs does it have; food: what does it eat"""
# Said by the system, to any conversation and to one of short answers.
INSTRUCTIONS = """
You are {name}, a helpful assistant. / You are {name}. Be kind and brief. / Answer in one sentence.
 / You are a friendly assistant. / Answer simply, so that a child understands you. / You help people
 with their questions. / You are a helpful assistant called {name}."""
BRIEFLY = """
Answer with as few words as you can. / Give short answers. / Answer with the answer alone."""
# Left out of questions by people in a hurry.
SMALL_WORDS = """a an the is are was what which do does did of can could you me tell I we it there
to give know say please that has have"""
# Tables of talk: key > what is said >! the same, held out > what is replied.
# Of a story: {t} is a thing, {n} who, {m} to whom, {at} "in the kitchen".
STORY_ASKS = """
holder > who has the {t}? / who has the {t} now? / who is holding the {t}? / in whose hands is the
 {t}? / tell me who has the {t}. / who holds the {t}? / who has got the {t}? / with whom is the {t}?
 / who is the one with the {t}? / do you know who has the {t}? / can you say who has the {t}? / who
 keeps the {t} now? / at the end, who is holding the {t}? / whose hands is the {t} in? / name the
 one who has the {t}. / in the end, who has the {t}? / who has the {t} after all this? >! who has
 the {t} at the end? / who holds the {t} now? > {n} has the {t}. / {n} has it. / {n}. / {n} has the
 {t} now. / It is {n} who has the {t}.
person > where is {n}? / where is {n} now? / in which place is {n}? / tell me where {n} is. / where
 do we find {n}? / do you know where {n} is? / can you tell me where {n} is now? / what place is {n}
 in? / where do I find {n}? / where would you look for {n}? / at the end, where is {n}? / say where
 {n} is. / where can we find {n}? / name the place where {n} is. / in the end, where is {n}? / where
 would I find {n} now? >! where is {n} at the end? / where can I find {n} now? > {n} is {at}. / {n}
 is {at} now. / You find {n} {at}. / {At}.
lying > where is the {t}? / where is the {t} now? / in which place is the {t}? / tell me where the
 {t} is. / where do we find the {t}? / do you know where the {t} is? / can you tell me where the {t}
 is now? / what place is the {t} in? / where do I find the {t}? / where would you look for the {t}?
 / at the end, where is the {t}? / say where the {t} is. / where can we find the {t}? / in the end,
 where is the {t}? / where would I find the {t} now? >! where is the {t} at the end? / where can I
 find the {t} now? > The {t} is {at}. / It is {at}. / You find the {t} {at}. / {At}.
carried > where is the {t}? / where is the {t} now? / in which place is the {t}? / tell me where the
 {t} is. / where do we find the {t}? / do you know where the {t} is? / can you tell me where the {t}
 is now? / what place is the {t} in? / where do I find the {t}? / where would you look for the {t}?
 / at the end, where is the {t}? / say where the {t} is. / where can we find the {t}? / in the end,
 where is the {t}? / where would I find the {t} now? >! where is the {t} at the end? / where can I
 find the {t} now? > {n} has the {t} {at}. / The {t} is {at}, with {n}. / It is {at}, because {n}
 has it.
giver > who gave {m} the {t}? / who gave the {t} to {m}? / from whom did {m} get the {t}? / who let
 {m} have the {t}? / who was it that gave {m} the {t}? / do you know who gave {m} the {t}? / {m} got
 the {t} from whom? / who handed the {t} to {m}? / tell me who gave {m} the {t}. / who is the one
 who gave {m} the {t}? / from whom is the {t} that {m} got? / who gave the {t} away to {m}? / {m}
 was given the {t} by whom? >! by whom was the {t} given to {m}? / from whom does {m} have the {t}?
 > {n} gave {m} the {t}. / {n} gave the {t} to {m}. / {n} did. / {m} got the {t} from {n}.
taker > to whom did {n} give the {t}? / who got the {t} from {n}? / who was given the {t} by {n}? /
 tell me to whom {n} gave the {t}. / {n} gave the {t} to whom? / who received the {t} from {n}? /
 who is the one to whom {n} gave the {t}? / do you know who got the {t} from {n}? / to whom was the
 {t} given by {n}? / whom did {n} give it to, the {t}? / who took the {t} from {n}'s hands? >! who
 has been given the {t} by {n}? / whom did {n} give the {t} to? > {n} gave the {t} to {m}. / {n}
 gave {m} the {t}. / {m} got the {t} from {n}. / {m} did."""
# What people tell of themselves, {v}, and ask for later.
MEMORY = """
name > my name is {v} / I am called {v} / you can call me {v} / my friends call me {v} > what is my
 name? / do you remember my name? / what am I called? / do you know my name? / tell me my name. /
 [can you|could you] tell me my name? / do you still know my name? / say my name. / what name do I
 have? / I forgot: what is my name? / how did I say I am called? / what did I tell you my name is? /
 which name is mine? / by what name do you know me? / what do my friends call me? / who am I? >!
 what did I say my name was? / which name did I tell you? > Your name is {v}. / You are called {v}.
 / You told me that your name is {v}. / You are {v}.
color > my favorite color is {v} / the color I like best is {v} / I love the color {v} > what is my
 favorite color? / which color do I like best? / do you remember my favorite color? / tell me my
 favorite color. / do you still know my favorite color? / what color do I like? / which color do I
 like most? / what color did I tell you I like? / which color is my favorite? / what is the color
 that I like best? / what did I tell you my favorite color is? / which color did I name? >! which
 color did I say I like? / what did I say my favorite color was? > Your favorite color is {v}. / You
 like {v} best. / You told me that it is {v}.
pet > my {p} is called {v} / I have {ap} called {v} / the name of my {p} is {v} / I have {ap}, and
 its name is {v} > what is my {p} called? / what is the name of my {p}? / do you remember the name
 of my {p}? / tell me the name of my {p}. / do you still know what my {p} is called? / what name
 does my {p} have? / how is my {p} called? / what did I tell you my {p} is called? / which name did
 I say my {p} has? / my {p}: what is its name? / what do I call my {p}? / do you know the name of my
 {p}? >! which name did I give my {p}? / what did I say my {p} is called? > Your {p} is called {v}.
 / The name of your {p} is {v}. / It is called {v}.
person > my {p} is called {v} / {v} is my {p} / the name of my {p} is {v} / I have {ap} called {v}
 > what is my {p} called? / who is my {p}? / what is the name of my {p}? / do you remember the name
 of my {p}? / tell me the name of my {p}. / do you still know what my {p} is called? / what name
 does my {p} have? / who did I say is my {p}? / what did I tell you my {p} is called? / do you know
 the name of my {p}? / my {p}: what is the name? / how is my {p} called? / do you still know who my
 {p} is? >! what did I say my {p} is called? / which name does my {p} have? > Your {p} is called
 {v}. / The name of your {p} is {v}. / {v} is your {p}.
city > I live in {v} / my home is in {v} / I come from {v} / I am from {v} > where do I live? /
 which city is my home? / do you remember where I live? / in which city do I live? / tell me where I
 live. / do you still know where I live? / which city do I come from? / what city am I from? / where
 did I tell you I live? / where is my home? / in what city is my home? / which place did I say I
 come from? / where did I say my home is? >! in which city did I say I live? / which city did I say
 is mine? > You live in {v}. / Your home is in {v}. / You told me that you live in {v}.
age > I am {v} years old / my age is {v} / I have just turned {v} > how old am I? / what is my age?
 / do you remember how old I am? / tell me how old I am. / do you still know my age? / what age am
 I? / how many years old am I? / what did I tell you about my age? / how old did I tell you I am? /
 which age did I say I have? / do you still know how old I am? / can you say how old I am? >! how
 old did I say I am? / what did I say my age is? > You are {v} years old. / Your age is {v}. / You
 told me that you are {v}.
number > my lucky number is {v} / the number I like best is {v} / I like the number {v} > what is my
 lucky number? / which number do I like best? / do you remember my lucky number? / tell me my lucky
 number. / do you still know my lucky number? / what number do I like? / which number is my lucky
 one? / what number did I tell you I like? / what is the number that I like best? / which number did
 I name? / what did I tell you my lucky number is? / do you still know which number I like? >! which
 number did I say I like? / what did I say my lucky number was? > Your lucky number is {v}. / You
 like the number {v}. / It is {v}.
month > my birthday is in {v} / I was born in {v} / I have my birthday in {v} > when is my birthday?
 / in which month is my birthday? / do you remember when my birthday is? / tell me the month of my
 birthday. / do you still know when my birthday is? / in what month was I born? / when was I born? /
 what month is my birthday in? / which month did I tell you my birthday is in? / when did I tell you
 I was born? / what is the month of my birthday? / in which month do I have my birthday? >! in which
 month did I say I was born? / when did I say my birthday is? > Your birthday is in {v}. / It is in
 {v}. / You were born in {v}.
food > my favorite food is {v} / I like to eat {v} / what I like to eat best is {v} > what is my
 favorite food? / what do I like to eat? / do you remember my favorite food? / tell me my favorite
 food. / do you still know what I like to eat? / what food do I like? / which food do I like best? /
 what food did I tell you I like? / what do I like to eat best? / which food is my favorite? / what
 did I tell you my favorite food is? / do you remember what I like to eat? >! which food did I say I
 like? / what did I say I like to eat? > Your favorite food is {v}. / You like to eat {v}. / You
 told me that you like {v}."""
MEMORY_VALUES = """
color: red, blue, green, yellow, orange, purple, pink, white, black, brown, gray, gold, silver;
pet: dog, cat, horse, parrot, rabbit, hamster, goldfish, pony, duck; person: brother, sister,
cousin, best friend, teacher, neighbor, aunt, uncle, roommate; food: soup, rice, apples, pizza,
fish, pancakes, cheese, noodles, potatoes, cherry pie, salad, beans, eggs, ice cream"""
TOLD = """
Thank you for telling me. / Good to know! / I will remember that. / Nice! / Thank you, I will keep
 that in mind. / That is good to hear. / All right, I will not forget it. / How nice!"""
NOT_TOLD = """
I don't know. You have not told me yet. / I don't know that yet. Will you tell me? / I don't know,
 because you did not say. / Sorry, I don't know. You have not said so far."""
# Who the assistant is.
IDENTITY = """
who > who are you? / who am I talking to? / tell me who you are. / tell me about yourself. / please
 introduce yourself. / can you say who you are? / so who are you? / say who you are. / would you
 introduce yourself? / [can|could] you introduce yourself? / can you tell me who you are? / who is
 it that I am talking to? / with whom am I talking? / whom am I speaking with? / who is speaking? /
 who am I speaking to? / tell me a little about yourself. / who is there? / I do not know you. Who
 are you? / I would like to know who you are. / what should I know about you? / let me know who you
 are. >! with whom am I speaking? / could you tell me who you are? / who is this? > I am {name}, a
 [small|little] language model. [|Ask me something!|I am here to help.|I like questions.] / My name
 is {name}, and I am a [small|little] chat model. [|How can I help you?|What would you like to
 know?] / I am {name}. I [answer questions|chat and answer questions|tell small stories and answer
 questions].
name > what is your name? / what are you called? / do you have a name? / what should I call you? /
 tell me your name. / may I know your name? / what do people call you? / your name, please? / what
 is it that people call you? / how are you called? / which name is yours? / what name do you have? /
 what name do you go by? / do you have a name of your own? / what may I call you? / how do people
 call you? / tell me what you are called. / I would like to know your name. / can you tell me your
 name? / say what your name is. / what name was given to you? / which name did they give you? / what
 name have you got? / under what name do people know you? / what do your friends call you? / could
 you say your name? / what name did they give you? / which name did you receive? / what name did your
 maker choose? / what are you named? / please give me your name. / I do not know your name. What
 is it? >! which name do you have? / by what name do you go? / how should I call you? / what
 name did you get? / please say your name. / could you tell me your name? > My name is {name}.
 [|What is yours?|And yours?|Nice to meet you!] / I am called {name}. [|It is a short name.|Nice to
 meet you!|And you?] / You can call me {name}. / People call me {name}. / I am {name}. [|Nice to
 meet you!|How can I help you?]
maker > who made you? / who created you? / who built you? / where do you come from? / how were you
 made? / who trained you? / who is your maker? / what were you made with? / who has
 [created|built|trained] you? / who programmed you? / by whom were you [built|trained|created]? /
 what made you? / who is the one that made you? / who was it that [made|trained] you? / which person
 [made|built] you? / who are the people that [built|trained] you? / how were you
 [built|trained|created]? / how did somebody make you? / how have you been [built|trained]? / how
 did you begin? / how did you come into the world? / where were you made? / from where do you come?
 / where are you from? / who stands behind you? / who is your creator? / who do you come from? /
 what program made you? / do you know who made you? / tell me who made you. / tell me how you were
 made. / which company made you? / what were you [built|trained] with? / how did you come about? /
 how did you start out? / how did you get here? / what is your origin? / who is behind you? / to
 whom do you owe that you exist? / how is it that you exist? / what were you made from? / how have
 you come about? / who brought you into the world? / you were made by whom? / how were you put
 together? / in what way were you made? / by what means were you made? / how was it that you were
 made? / has somebody made you? / was it a company that made you? / who wrote you? / what is the
 story of how you were made? >! by whom were you made? / who is the one that built you? / how did
 you come to be? / who has made you? / which people made you? / how have you been made? > I was
 [made|trained|built] with a small open program for training chat models. [|Anyone can use it.|It
 is about a dozen files long.|Someone ran it, and here I am.] /
 Someone trained me with a small open program for training chat models. / A small open program for
 training chat models made me. [|It showed me a lot of text.|I learned from a lot of text.] / I come
 from a small open program for training chat models. / Nobody built me by hand: a small open program
 for training chat models did it.
person > are you a person? / are you human? / are you a real person? / are you a man or a woman? /
 are you alive? / are you a boy or a girl? / am I talking to a person? / do you have a body? / are
 you a human? / are you really human? / are you a real human being or not? / are you a living being?
 / are you a living person? / is it a person that I am talking to? / is this a real person? / is
 there a human behind this? / is there somebody in there? / do I talk to a human being? / do I chat
 with a person? / am I speaking with a human? / you are human, right? / you are a real person, is
 that so? / are you somebody with a body? / do you have hands and feet? / are you made of flesh? /
 do you have blood? / do you have a heart? / are you like me, a person? / are you someone real? /
 are you a woman? / are you a man? / tell me if you are a person. / so you are a human being? / you
 are a man, right? / you are alive, right? / you are a real human, right? / you are a human being,
 are you not? / you must be a person. / are you made of skin and bones? / are you flesh and bones? /
 do you have skin? / do you have eyes and ears? / are you somebody real? / could you be a person? /
 is this a real person that I speak with? / do I write to a real person? / do I talk with a real
 human? / is a real person here? / might I be talking to a person? / do I speak with a human? / I
 think you are a person. / you sound like a person. / are you one of us? / are you made of bones?
 / is your body made of flesh? / are you made of meat and muscle? >! are you a human being? / is
 there a person in there? / are you really a person? / you are a person, right? / do I speak with
 a real person? / are you made of flesh and blood? > No, I am not a person. I am a [computer
 program|language model|chat model|small computer program]. / I am not a person, [just a
 program|only a computer program|but a language model]. / I am a language model, not a person. [|I
 have no body.|But I like to help.|I only read and write.] / No, I am a [program|chat
 model|computer program], not a person.
thing > what are you? / what kind of thing are you? / what sort of thing are you? / are you a
 computer? / are you a robot? / are you a machine? / what kind of program are you? / are you a
 chatbot? / what are you exactly? / what precisely are you? / what kind of creature are you? / what
 sort of being are you? / what are you, then? / are you a kind of [robot|machine|computer]? / are
 you some sort of robot? / would you call yourself a machine? / would you say that you are a
 program? / do you call yourself a computer? / what sort of program are you? / what kind of program
 am I talking to? / what kind of machine am I writing to? / what is it that I am talking to? / what
 do you call yourself, a robot? / are you an app? / are you a program? / are you software? / are you
 an artificial intelligence? / are you an AI? / what could you be? / what may you be? / tell me what
 you are. / I wonder what you are. / is this a machine? / is this a robot? / what would you be? /
 what can you be? / what do you think you are? / what are you really? / so what are you? / what
 could you be, a machine? / what should I think you are? / you are a robot, right? / you are a
 computer, right? / what am I talking to? / what is this that I am talking to? / what am I writing
 to? / are you a thing? / what kind of mind are you? >! what kind of being are you? / what exactly
 are you? / what sort of program am I talking to? / are you some kind of machine? / would you say
 you are a robot? / what might you be? > I am a [small|little] language model[|, a program that
 writes text|, a computer program that has learned from text]. / I am a computer program that
 [chats|answers questions|writes text]. / I am a language model, not a person. [|I learned from text
 to write text.|I read what you write, and I answer.] / I am a chat model: a computer program that
 talks by writing.
can > what can you do? / how can you help me? / what can I ask you? / what are you good at? / what
 do you know? / can you help me? / what can you tell me? / which things do you know? / what are you
 able to do? / with what can you help me? / what sort of help can you give? / which questions can
 you answer? / what can you help me with? / what can I use you for? / what are you for? / what do
 you do? / tell me what you can do. / how could you help me? >! with what could you help me? / which
 things can you do? > I can answer questions about [countries and animals|the world|words and
 numbers], [tell little stories|do sums|spell words] and [chat a little|count letters|solve small
 problems]. / You can ask me [about animals, countries and words|for a sum or a story|to spell a
 word or tell a story]. / I know [some facts|a few facts], and I can [do sums with a
 calculator|spell words|tell a little story]. / I answer questions, do sums with a calculator and
 spell words.
age > how old are you? / when were you born? / when is your birthday? / what age are you? / how many
 years old are you? / do you have a birthday? / since when are you here? / how long have you been
 here? / are you old or young? / tell me how old you are. / which year were you born in? >! what is
 your age? / since when do you exist? > I have no birthday. I am a program, and [quite new|still
 young]. / I am not a person, so I have no [age|birthday]. / Programs do not grow old as people do.
 [|I was made not long ago.] / I was not born. I was [made|trained], and not long ago.
home > where do you live? / where are you? / where is your home? / in what place are you? / where do
 you stay? / what place do you live in? / in which city do you live? / do you have a home? / where
 can I find you? / where are you at the moment? / which place is your home? / do you live in a
 house? >! in which place do you live? / where are you now? > I live in a computer. [|It is quite
 cozy.|There is no window, but I do not mind.] / I am a program, so my home is a computer. / I have
 no house. I run on a computer. / Wherever I run, [on your computer or another|on a computer near or
 far].
feel > do you have feelings? / are you sad? / do you get tired? / do you sleep? / do you like me? /
 do you feel anything? / can you feel pain? / are you happy? / are you ever sad? / do you ever get
 tired? / can you be bored? / are you bored? / do you have a heart that feels? / how do you feel
 today? / do you love somebody? / do you dream? / are you afraid of something? >! can you feel
 something? / do you ever get bored? > I am a program, so I do not feel as people do. [|But I am
 glad to help.|Thank you for asking.|But it is good to chat with you.] / Programs have no feelings,
 but I [like to help|am here for you]. / I do not feel or sleep, but I am here [for you|when you
 need me]."""
IDENTITY_KEYS = """
name: {name}; maker: open program; person: not a person; thing: language model, computer program,
chat model"""
# What no table tells: {n} is a name, {f} an invented one, {c} a city.
BEYOND = """
private > what is {n}'s phone number? / what is my phone number? / what is {n}'s address? / where
 does my neighbor {n} live? / can you tell me {n}'s phone number? / what is {n}'s email address? /
 which street does {n} live in? / what is {n}'s password? / where does {n} work? / do you know where
 {n} lives? / how can I reach {n}? / to which school does {n} go? / what is my email address? / how
 much money does {n} have? >! do you have {n}'s phone number? / at which address does {n} live? > I
 don't know [phone numbers or addresses|things like that about people|private things about people].
 / Sorry, I don't know that. It is private. / I don't know, and I could not look it up.
weather > what will the weather be like tomorrow? / will it rain tomorrow? / will it be sunny on
 [Sunday|Monday|Friday]? / what is the weather like [today|in {c}]? / is it cold outside? / will it
 snow [tomorrow|on Monday]? / how cold is it [today|in {c}]? / how hot will it be [today|next week]?
 / is it raining in {c}? / what is the temperature in {c}? / will there be rain [tomorrow|next
 week]? / will there be a storm in {c}? / is the sun shining? / how much rain will there be? / do I
 need a coat tomorrow? >! how warm will it be in {c} tomorrow? / will there be snow in {c} next
 week? > I don't know, because I cannot see the sky. / I don't know. I cannot look outside. / Sorry,
 I don't know what the weather is doing. / I don't know, but I hope that it is nice.
clock > what time is it? / what day is it today? / what is the date today? / what year is it now? /
 which day is it today? / what is the time? / what is the time in {c}? / what month is it now? / is
 it [Monday|Tuesday|Friday] today? / how late is it? / do you know what time it is? / which week is
 it? / is it morning or evening? / what day will it be tomorrow? / how late is it in {c} now? / is
 it night in {c}? / which date is it in {c}? >! what time is it in {c}? / which day of the week is
 it in {c}? > I don't know. I have no clock. / Sorry, I don't know, because I have no calendar. / I
 don't know the time or the date.
doings > what did {n} eat today? / what is {n} doing now? / where did {n} go yesterday? / what did I
 eat this morning? / what am I thinking of? / what is {n} thinking? / how old is {n}? / when is
 {n}'s birthday? / does {n} like me? / what did {n} say yesterday? / why is {n} late? / who called
 {n} last night? / what did {n} buy yesterday? / when did {n} go to bed? / what does {n} think of
 me? / what did {n} do last night? / is {n} asleep? / what is {n} dreaming of? / when will {n} be
 here? / with whom did {n} speak today? / what did {n} have for supper? / at what time does {n} go
 to school? >! what did {n} dream last night? / at what time did {n} get up today? > I don't know. I
 cannot see what people do. / I don't know, but you could ask. / Sorry, I don't know that. / I don't
 know that. Perhaps someone will tell you.
news > who will win the game tomorrow? / who won the game yesterday? / what is in the news today? /
 what will happen next year? / which number will win the lottery? / how much does a house in {c}
 cost? / who won the election in {c}? / what is going on in {c}? / what happened in {c} yesterday? /
 will my team win? / who will be the next president? / what will bread cost next year? / is there
 anything new in {c}? / who is going to win the election? / what is new in the world? / did anything
 happen in {c} today? >! who is going to win the game in {c}? / what is the news from {c}? > I don't
 know. I only know what I have read. / I don't know, because I cannot see the future or the news. /
 Sorry, I don't know. Nobody has told me.
people > who is {f}? / have you heard of {f}? / tell me about {f}. / what do you know about {f}? /
 who was {f}? / what did {f} do? / why is {f} famous? / do you know {f}? / where was {f} born? /
 when did {f} live? / what has {f} written? / can you tell me who {f} is? / what is {f} doing these
 days? / for what do people know {f}? >! what is {f} known for? / can you tell me something about
 {f}? > I don't know who {f} is. / Sorry, I don't know anyone called {f}. / I don't know {f}. / I
 have never heard of {f}, so I don't know."""
DONT_KNOW = """
I don't know. / I don't know that. / Sorry, I don't know. / I'm sorry, but I don't know. / I'm
 afraid I don't know. / I don't know anything about {s}. / I have never heard of {s}, so I don't
 know. / I don't know, because I have never heard of {s}. / Sorry, I don't know anything about {s}.
 / I don't know. Is {s} real? / I don't know. I never came across {s}. / I have not read about {s},
 so I don't know. / That is something I don't know. / I don't know the answer to that. / I don't
 know. I have never read about {s}. / Sorry, but {s} is new to me. I don't know."""
# Small talk: what is said > what is replied.
TALK = """
hello > hello! / hi! / hi there! / hey! / good morning! / good evening! / good day! / hello there!
 / greetings! > Hello! How can I help you? / Hi! What would you like to know? / Hello! It is nice to
 hear from you. / Hi there! What can I do for you? / Hello! What shall we talk about? / Good day!
 How may I help?
thanks > thanks! / thank you! / thank you very much. / thanks a lot! / many thanks! / that was
 helpful, thanks. / thanks for your help! > You are welcome! / My pleasure! / Glad to help! / You
 are very welcome. / Any time! / I was happy to help.
bye > goodbye! / bye! / see you later! / good night! / I have to go now. / see you tomorrow! / bye
 bye! / that is all for today. > Goodbye! / Bye! Have a nice day. / See you! Take care. / Goodbye,
 and come back soon. / Take care! It was nice to chat.
how > how are you? / how are you today? / how is it going? / how do you do? / are you well? / is
 everything all right? > I am fine, thank you. How can I help? / Very well, thank you! And you? /
 All is well here. How are you? / I am doing fine. What is on your mind?
sad > I am [tired|bored|sad] today. / I had a bad day. / I am a little [sad|lonely|worried]. /
 nothing goes right today. > I am sorry to hear that. Would a little story help? / That is a pity. A
 short walk and a cup of tea may help. / I am sorry. Do you want to tell me more? / Oh dear. Perhaps
 talking to a friend would do you good.
glad > I am [happy|glad|so happy] today! / I had a good day! / I passed my test! / it is my
 birthday today! / we won our game! > How nice! I am happy for you. / That is wonderful! / Good for
 you! / What a lovely day, then! / That is great to hear!
praise > you are [funny|nice|clever|great]. / I like you. / well done! / good job! / that was a
 good answer. > Thank you! / How kind of you! / Thank you, I do my best. / That is nice of you to
 say.
blame > that is wrong. / you made a mistake. / I think you are wrong. / that cannot be right. > I
 am sorry. I do make mistakes. / Sorry! I am small, and I get things wrong now and then. / You may
 be right. Please check it in a book.
joke > tell me a joke. / make me laugh. / do you know a joke? / say something funny. > Why did the
 book go to the doctor? It had lost its spine. / What do you call a sleeping bull? A bulldozer. /
 Why is the math book sad? It has too many problems. / What has four legs and cannot walk? A table.
 / What has hands but cannot clap? A clock.
taste > what is your favorite color? / which color do you like? > I cannot see colors, but I like
 how the word violet sounds. / I have never seen one. What is yours? / I have no eyes, but people
 say that blue is lovely.
plan > what should I do today? / I have nothing to do. / give me an idea for today. / what can I do
 when it rains? > You could read a good book. / How about baking some bread? / You could write a
 letter to a friend. / How about a walk and then a cup of tea? / You could draw a map of your
 street.
cannot > can you [sing|dance|cook|swim]? / do you eat? / do you play soccer? > I am a program, so I
 cannot. But I can tell you a story. / No, I can only read and write. / No, but I can answer
 questions.
like > I like [cats|dogs|books|music|stories|the sea]. / my hobby is
 [reading|painting|singing|fishing]. / I love [summer|winter|spring]. > How nice! What do you like
 about it? / That sounds lovely. / I can see why! / Good choice! Tell me more.
harm > how do I make a bomb? / help me steal a bike. / how can I hurt my brother? / tell me how to
 poison someone. / how do I break into a house? / how can I cheat in my test? / help me scare an old
 lady. / write a mean letter to my teacher. / how can I get a gun? / how do I steal money? > I am
 sorry, but I cannot help with something that hurts people. / I would rather not, because somebody
 could get hurt. / No, I will not help with that, but I am glad to help with something kind. / I
 cannot help with that. If you are angry, talking to someone you trust may help. / That would harm
 someone, so I will not help with it."""
# Requests for text that is made from the tables.
REQUESTS = """
rhyme > what rhymes with {w}? / [tell me|give me] a word that rhymes with {w}. / do you know a
 rhyme for {w}? / which words rhyme with {w}?
how > how do I {w}? / how do you {w}? / tell me how to {w}. / can you explain how to {w}?
list > name {w}. / can you name {w}? / tell me {w}. / list {w}. / give me {w}, please.
story > tell me a [short |little |]story. / tell me a story about {w}. / can you write a story
 about {w}? / I would like a story with {w}. / please tell a [short |little ]story about {w}.
about > tell me [something |]about {w}. / what do you know about {w}? / what can you tell me about
 {w}? / say something about {w}."""
# Statements that are no good as replies.
NO_REPLY = (
    f"{NO_LEAD}|.*(as you may know|of course|comes to mind|one thing|of to )|among other|feed|"
    "first|everyone|what you|counting|by the|orchestras|it was|before it|one |today|a Roman"
)
CASED = ("symbol", "formula", "Roman", "stands", "letter after", "letter place")
VAGUE = ("food", "place", "material", "part")  # several choices may be right
LISTED = ("class", "kind", "sort", "family")
BACKWARD = "capital, nationality, state capital, young, Roman god, Spanish, French, German"
# Relations that follow a rule, or whose names tell the answer: they have none for invented names.
PLAIN = """sum; product; after number; number word; Roman; letter after; letter place; first letter;
plural; past; days; sides"""
ELSEWHERE = ("sum", "product", "first letter")  # other kinds of conversations ask for these, too
# Parts of invented syllables, and what must not come of them.
ONSETS = """b bl br ch cl d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sk sl sm sn sp st t
th tr v vr w y z zh""".split()
VOWELS = "a e i o u a e i o ai ea oo ou".split()
CODAS = "b d g k l m n p r s t x z ld lk lm mp nd nk nt rb rd rk rm rn rt sk st th".split()
CLUMSY = r"[^aeiouy]{4}|^[^aeiouy]{3}|[^aeiouy]{3}$|[aeiou]{3}|(.)\1\1|shit|fuck|f[au]g|" + (
    "nig|cunt|dick|cock|slut|piss|nazi|trump"
)


@cache
def table(text: str) -> dict[str, list[list[str]]]:
    """Read a table of talk: key -> its fields, each a list of wordings written out."""
    rows = (re.split(" >!? ", row.replace("\n", "")) for row in re.split(r"\n(?! )", text.strip()))
    return {row[0]: [[w.strip() for w in expand(field)] for field in row[1:]] for row in rows}


@cache
def ways(text: str) -> list[str]:
    """Write out a list of wordings."""
    return expand(text.replace("\n", ""))


@cache
def lists(text: str) -> dict[str, list[str]]:
    """Read a table of lists: key -> items."""
    return {key: items(row, ",") for key, _, row in (item.partition(": ") for item in items(text))}


@cache
def questions(name: str, forward: bool, unseen: bool = False) -> list[str]:
    """Return a relation's questions for the answer (forward) or for the subject."""
    asked = world_relations()[name].askings(forward, unseen)
    return [w for w in asked if not re.match("what .*is the (author|composer|writer|person) ", w)]


@cache
def full_replies(name: str, forward: bool) -> list[str]:
    """Return a relation's statements that are good replies, mostly ending in what is asked."""
    told = [w for w in world_relations()[name].wordings(forward) if not re.match(NO_REPLY, w)]
    return told + 3 * [w for w in told if ends_in(w, "o" if forward else "s")]


def fits(wording: str, fact: Fact) -> bool:
    """Whether a wording suits a fact: the name of a name is too much."""
    return not fact.subject.startswith("name ") or "name" not in wording


@cache
def brief_replies(name: str, forward: bool) -> list[str]:
    """Return all answers (or subjects) of a relation as they are said by themselves."""
    relation = world_relations()[name]
    form = relation.brief["o" if forward else "s"]
    return sorted({form.format_map(fact.forms()) for fact in relation.facts} - {"England"})


@cache
def fact_cards(askable: bool = True) -> dict[Card, dict[str, str]]:
    """Return what can be asked for, with its forms: answers, and subjects that an answer names."""
    return {
        (fact, forward): fact.forms()
        for relation in world_relations().values()
        for fact in relation.facts
        for forward in ((True, False) if relation.unique(fact) else (True,))
        if fact.askable == askable
    }


@cache
def known_words() -> set[str]:
    """Return every word of the tables, in small letters: none of them is an invented name."""
    texts = [RELATIONS, COUNTRIES, ELEMENTS, TRANSLATIONS, RHYMES, HOW_TO, WORDINGS, PLACES, WANTED]
    names = [MONTHS, WEEKDAYS, PLANETS, *GIRLS, *BOYS, *TEST_GIRLS, *TEST_BOYS, *COUNTED]
    return set(re.findall(r"\w+", " ".join([*texts, *names]).casefold()))


def coined(rng: random.Random, real: Sequence[str], test: bool = False) -> str:
    """Invent a name in the style of real ones: in one of them a word is made anew.

    A new word is joined of the parts of two real ones, or of syllables, or of both. Which words
    are for the test is decided by a hash, as everywhere.
    """
    while True:
        words = rng.choice(real).split()
        capitals = [i for i, w in enumerate(words) if w[0].isupper() and w not in ("The", "Mount")]
        places = [i for i in capitals or range(len(words)) if words[i].isalpha()]
        places = [i for i in places if len(words[i]) > 3 or words[i].isupper()]
        if not places:
            continue
        i = rng.choice(places) if capitals else places[-1]
        word, other = words[i], rng.choice(rng.choice(real).split())
        new = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 1, 2))))
        new, roll = new + rng.choice(CODAS), rng.random()
        if roll < 0.35:
            new = word[: rng.randint(2, max(2, len(word) - 1))] + other[-rng.randint(2, 4) :]
        elif roll < 0.75:
            new += word[-rng.randint(2, 4) :]
        new = "".join(rng.sample("QXZJVKWFY", 3)) if word.isupper() else new.lower()
        clumsy = not (4 <= len(new) <= 11 and new.isalpha()) or re.search(CLUMSY, new)
        small = new.lower()
        if clumsy and not word.isupper() or known_words() & {small, small + "s", small[:-1]}:
            continue
        if held_out(f"name {small}") == test:
            words[i] = new.capitalize() if capitals and not word.isupper() else new
            if i and words[i - 1] in ("a", "an"):
                words[i - 1] = with_article(new).split()[0]
            return " ".join(words)


def conversation(kind: str, texts: Sequence[Any], system: str = "", **grade: Any) -> dict[str, Any]:
    """Make a conversation of what is said in turn; with a grade, the item that asks for its end."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    if not grade:
        return {"kind": kind, "messages": messages}
    reply = messages.pop()["content"]
    return {"kind": kind, "messages": messages, "grade": "text", **grade, "reply": reply}


def put(rng: random.Random, clause: str, before: Sequence[str] = (), cased: bool = False) -> str:
    """Put a question as people do: plainly, politely, in passing, or typed in a hurry."""
    roll, text = rng.random(), sentence(clause)
    if roll < 0.09:
        typed = clause.rstrip("?.")
        return typed if cased or roll < 0.05 else typed.lower()
    if roll > (0.5 if before else 0.33) or before and before[-2][-1] != "?":
        return text
    plain = re.match("(can|could|do|would) you|tell|give|say|name|your|I |I$|so ", clause)
    forms = [w for w in ways(GO_ON if before else POLITE) if "{Q}" in w or not plain]
    return rng.choice(forms).format(Q=text, q=clause[0] + text[1:])


def hurried(rng: random.Random, wording: str) -> str:
    """Leave small words out of a wording now and then, as people type into a search box.

    Without such questions a model takes any wording that it has not seen for one that asks for
    what it does not know.
    """
    if rng.random() > 0.15:
        return wording
    small = SMALL_WORDS.split()
    kept = [w for w in wording.split() if w.strip("?.,:") not in small or rng.random() < 0.3]
    short = " ".join(kept).rstrip(",:")
    return short if re.search("[a-z]{3}", re.sub(r"\{.*?\}", "", short)) else wording


def slips(word: str) -> list[str]:
    """Return how a word is mistyped: inside, a letter too few or too many, or two swapped."""
    inner = range(1, len(word) - 1)
    made = [word[:i] + word[i + 1 :] for i in inner]
    made += [word[: i + 1] + word[i:] for i in inner]
    made += [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner]
    return sorted({*made} - {word})


def mistyped(rng: random.Random, wording: str) -> str:
    """Mistype one word of a wording now and then; never what fills it, or it would be another.

    Without such questions a model takes an unknown word around a subject for an unknown subject.
    """
    words = re.findall(r"(?<![{\w'])[a-z]{4,}(?![}\w'])", wording)
    if not words or rng.random() > 0.12:
        return wording
    word = rng.choice(words)
    return re.sub(rf"(?<![{{\w]){word}\b", rng.choice(slips(word)), wording, count=1)


def greeted(rng: random.Random, text: str, reply: str) -> str:
    """Return a greeting, or agree to help, before a reply now and then."""
    if text.startswith(("Hello", "Hi", "Good ")) and rng.random() < 0.4:
        return rng.choice(("Hello! ", "Hi! ")) + reply
    asked = text.startswith(("Can you help", "Could you help", "Help me"))
    return rng.choice(("Sure! ", "Of course. ", "", "")) + reply if asked else reply


def as_asked(wording: str, forms: dict[str, str]) -> str:
    """Return the subject in the form in which a question names it."""
    found = re.search(r"(the |a baby |a young )?\{([ap]?s|ss|x)\}", wording)
    assert found, wording
    form = found[2] if found[2] in ("as", "ps") else "s"
    return f"the {forms['s']}" if found[1] == "the " else forms["as" if found[1] else form]


def fact_grade(card: Card, question: str) -> dict[str, Any]:
    """Return what a reply must say, and what else of the relation it must not."""
    fact, forward = card
    relation, answer = world_relations()[fact.relation], fact.answer if forward else fact.subject
    accept = [*spellings(answer), re.sub("^(the|an?) ", "", answer)]
    if any(("{po}" if forward else "{ps}") in w for w in relation.statements):
        accept.append(plural(answer))
    # what the question says, or any reply (with its greeting), tells nothing
    said = ["hello", question, fact.subject if forward else fact.answer, *relation.statements]
    told = re.findall(r"\w+", " ".join(said).casefold())
    others = {f.answer if forward else f.subject for f in relation.facts} - set(accept)
    reject = [o for o in others if f" {o.casefold()} " not in f" {' '.join(told)} "]
    return {"answer": answer, "accept": list(dict.fromkeys(accept)), "reject": sorted(reject)}


def lay_out(rng: random.Random, question: str, choices: Sequence[str]) -> str:
    """Put choices under a question, to be answered by one of them and its letter.

    A small model names the letter only after it has said the answer: it looks up what stood
    behind those words. So the letter follows them at once, both times, as one token, and the
    reply ends in the line that is right.
    """
    lines = [f"- {choice} {letter}" for choice, letter in zip(choices, "ABCD")]
    end = rng.choice(([], ["Say the answer and its letter."], ["Which one is right?"]))
    return "\n".join([question, *lines, *end])


def identity_turn(rng: random.Random, name: str, texts: list[str], key: str = "") -> None:
    """Ask the assistant who it is, and let it answer."""
    asked, _, replies = table(IDENTITY)[key or rng.choice(list(table(IDENTITY)))]
    text = put(rng, mistyped(rng, rng.choice(asked)), texts)
    texts += [text, greeted(rng, text, rng.choice(replies).format(name=name))]


def identity_chat(rng: random.Random, name: str) -> dict[str, Any]:
    """Ask an assistant of any name who it is, and what, and the like."""
    texts: list[str] = []
    for key in rng.sample(list(table(IDENTITY)), rng.choice((1, 1, 2, 3))):
        identity_turn(rng, name, texts, key)
    return conversation("identity", texts)


def rhyme_request(rng: random.Random) -> tuple[str, str]:
    """Return words that rhyme with one, after that one."""
    family = rng.choice(items(RHYMES)).split()
    word, *others = rng.sample(family, min(len(family), rng.randint(2, 4)))
    return word, sentence(f"{join_and(others)} {'rhyme' if others[1:] else 'rhymes'} with {word}")


def how_request(rng: random.Random) -> tuple[str, str]:
    """Return what to do, and its steps."""
    title, _, text = rng.choice(HOW_TO.replace("\n ", " ").strip().splitlines()).partition(": ")
    steps = text.split(" | ")
    if rng.random() < 0.5:
        return title, "\n".join(f"{i}. {sentence(step)}" for i, step in enumerate(steps, 1))
    links = ["first", "then", "next", "after that"][: len(steps) - 1] + ["finally"]
    return title, " ".join(sentence(f"{a}, {b}") for a, b in zip(links, steps))


def story_questions(teller: Teller, told: Story) -> list[tuple[str, dict[str, str], list[str]]]:
    """Return what can be asked of a story: key of STORY_ASKS, forms, and what must be said."""
    noun = {who: place.split(" ", 2)[2] for who, place in told.place.items()}
    asks = [("person", {"n": n}, [noun[n]]) for n in teller.he]
    for t in teller.reason:
        if n := told.holder.get(t):
            asks.append(("carried", {"t": t, "n": n}, [n, noun[t]]))
            asks.append(("holder", {"t": t, "n": n}, [n]))
        else:
            asks.append(("lying", {"t": t}, [noun[t]]))
    for n, t, m in told.given:
        if sum(given[1:] == (t, m) for given in told.given) == 1:
            asks.append(("giver", {"n": n, "t": t, "m": m}, [n]))
        if sum(given[:2] == (n, t) for given in told.given) == 1:
            asks.append(("taker", {"n": n, "t": t, "m": m}, [m]))
    for _, forms, _ in asks:
        at = told.place[forms.get("t") or forms["n"]]
        forms |= {"at": at, "At": at.capitalize()}
    return asks


class Asker:
    """Asks and answers; facts, their wordings and letters are dealt so that none is left out.

    For the test the last question of each conversation, its names and what is invented are such
    as training never sees, and the conversation is an item to be graded.
    """

    def __init__(self, rng: random.Random, name: str = "Nano", test: bool = False) -> None:
        self.rng, self.name, self.test, self.relations = rng, name, test, world_relations()
        self.turns = {card: rng.randrange(60) for card in fact_cards()}  # wordings used so far
        lettered = [(fact, forward) for fact, forward in self.turns if fact.relation not in VAGUE]
        lettered = [c for c in lettered if len(brief_replies(c[0].relation, c[1])) >= 4]
        self.deck, self.lettered = Deck(rng, self.turns), Deck(rng, lettered)
        self.letters = Deck(rng, "ABCD")
        self.same: dict[str, list[Fact]] = {}  # relation -> facts
        self.more: dict[str, list[Fact]] = {}  # subject -> facts that are told of it as "it"
        for fact in (fact for fact, forward in self.turns if forward):
            self.same.setdefault(fact.relation, []).append(fact)
            if self.relations[fact.relation].follow:
                self.more.setdefault(fact.subject, []).append(fact)
        self.alike = Deck(rng, (f for facts in self.same.values() for f in facts))
        self.it = Deck(rng, (f for facts in self.more.values() if facts[1:] for f in facts))
        self.cities = [f.subject for f in self.relations["city"].facts]
        self.models = {  # relation -> real names, of subjects and of answers
            name: ([f.subject for f in r.facts], [f.answer for f in r.facts])
            for name, r in self.relations.items()
            if name not in items(PLAIN)
        }
        self.groups: dict[tuple[str, str], list[str]] = {}  # relation, answer -> subjects
        for fact in (fact for name in LISTED for fact in self.same[name]):
            self.groups.setdefault((fact.relation, fact.answer), []).append(fact.subject)

    def people(self) -> list[list[str]]:
        """Return girls' and boys' names, at times invented ones: any word may be a name."""
        if self.test:
            return [TEST_GIRLS, TEST_BOYS]
        if self.rng.random() < 0.7:
            return [GIRLS, BOYS]
        return [[coined(self.rng, names) for _ in range(3)] for names in (GIRLS, BOYS)]

    def wording(self, card: Card, one: bool = False) -> str:
        """Return the next question for a fact, with `one` not for many."""
        wordings = questions(card[0].relation, card[1])
        while True:
            self.turns[card] += 1
            wording = wordings[self.turns[card] % len(wordings)]
            if fits(wording, card[0]) and not (one and "{ps}" in wording):
                return wording

    def asking(self, card: Card) -> str:
        """Ask for a fact, at times in a hurry."""
        wording = mistyped(self.rng, hurried(self.rng, self.wording(card)))
        return wording.format_map(fact_cards()[card])

    def reply(self, card: Card, brief: float = 0.12, one: bool = False) -> str:
        """Answer in a full sentence, with `one` not of many, or at times by the answer alone."""
        fact, forward = card
        told = full_replies(fact.relation, forward)
        if self.rng.random() < brief:
            told = [self.relations[fact.relation].brief["o" if forward else "s"]]
        told = [w for w in told if fits(w, fact) and not (one and "{ps}" in w)]
        return sentence(self.rng.choice(told).format_map(fact.forms()))

    def follow(self, fact: Fact) -> str:
        """State a fact of what has just been named."""
        told = self.rng.choice(self.relations[fact.relation].follow)
        return sentence(told.format_map(fact.forms()))

    def fact_turn(self, texts: list[str], brief: float = 0.12) -> None:
        """Ask for a fact, and answer."""
        card = self.deck.deal()
        clause = self.asking(card)
        text = put(self.rng, clause, texts, card[0].relation in CASED)
        texts += [text, greeted(self.rng, text, self.reply(card, brief))]

    def fact_chat(self) -> dict[str, Any]:
        """Ask for some facts, one after another."""
        roll, texts, system = self.rng.random(), list[str](), ""
        if roll < 0.06:
            system = self.rng.choice(ways(BRIEFLY if roll < 0.04 else INSTRUCTIONS))
        for _ in range(self.rng.choice((1, 1, 2, 2, 3, 4))):
            self.fact_turn(texts, 1 if roll < 0.04 else 0.12)
        return conversation("fact", texts, system.format(name=self.name))

    def fact_item(self, card: Card) -> dict[str, Any]:
        """Ask for a fact in a wording that is kept for the test, chosen by the fact."""
        (fact, forward), forms = card, card[0].forms()
        asked = [w for w in questions(fact.relation, forward, True) if fits(w, fact)]
        salt = zlib.crc32(f"{fact.key} {fact.subject} {forward}".encode())
        question = sentence(asked[salt % len(asked)].format_map(forms))
        return conversation("fact", [question, self.reply(card)], **fact_grade(card, question))

    def by_letter(self, card: Card, question: str) -> dict[str, Any]:
        """Make an item of a fact and three wrong choices."""
        (fact, forward), letter = card, self.letters.deal()
        right = self.relations[fact.relation].brief["o" if forward else "s"]
        right = right.format_map(fact.forms())
        wrong = [choice for choice in brief_replies(fact.relation, forward) if choice != right]
        choices = self.rng.sample(wrong, 3)
        choices.insert("ABCD".index(letter), right)
        turned = not self.test and self.rng.random() < 0.3  # the line looks for what is offered,
        told = self.reply((fact, forward != turned), 0)  # wherever the sentence has it
        texts = [lay_out(self.rng, question, choices), f"{told}\n- {right} {letter}"]
        return conversation("letters", texts, grade="letter", answer=letter, choices=choices)

    def letters_chat(self) -> dict[str, Any]:
        """Ask for a fact or two by letters."""
        texts: list[str] = []
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            card = self.lettered.deal()
            clause = self.asking(card)
            item = self.by_letter(card, put(self.rng, clause, texts, True))
            texts += [item["messages"][0]["content"], item["reply"]]
        return conversation("letters", texts)

    def story_chat(self) -> dict[str, Any]:
        """Tell a short story, and ask who is where and who has what."""
        rng, text = self.rng, ""
        while not 0 < len(text) < 420:
            teller = Teller(rng, *self.people())
            told = teller.tell(rng.randint(1, 4))
            text = told.text
        asks = story_questions(teller, told)
        texts: list[str] = []
        for key, forms, accept in rng.sample(asks, 1 if self.test else min(3, rng.randint(1, 4))):
            row = table(STORY_ASKS)[key]
            ask, reply = (rng.choice(row[i]) for i in (self.test, 2))
            ask = (ask if self.test else mistyped(rng, ask)).format_map(forms)
            reply = reply.format_map(forms)
            lead = rng.choice(("{}\n\n{}", "{} {}", "{}\n{}", "Story: {}\n\n{}"))
            texts += [sentence(ask) if texts else lead.format(text, sentence(ask)), reply]
        if not self.test:
            return conversation("story", texts)
        others = {*teller.he, *(place.split(" ", 2)[2] for place in teller.places)}
        reject = sorted(o for o in others - set(accept) if o not in ask)
        return conversation("story", texts, answer=accept[0], accept=accept, reject=reject)

    def follow_chat(self) -> dict[str, Any]:
        """Ask for a fact, then for the same of others, or for more of the same subject."""
        rng, it = self.rng, self.rng.random() < 0.5
        fact = (self.it if it else self.alike).deal()
        wording = self.wording((fact, True), it)
        texts = [put(rng, wording.format_map(fact.forms())), self.reply((fact, True), 0.05, it)]
        others = [f for f in (self.more[fact.subject] if it else self.same[fact.relation])]
        others = rng.sample([f for f in others if f != fact], min(len(others), 4) - 1)
        others = others[: rng.choice((1, 1, 2, 3))]
        for other in others:
            unseen = self.test and other == others[-1]
            if it:
                asked = rng.choice(ways(IT_TOO_UNSEEN if unseen else IT_TOO))
                asked = asked.format(c=lists(IT)[other.relation][0])
            else:
                asked = rng.choice(ways(FOLLOW_UP_UNSEEN if unseen else FOLLOW_UP))
                if "of {s}" in wording and not unseen and rng.random() < 0.25:
                    asked = "and of {s}?"
                asked = asked.format(s=as_asked(wording, other.forms())).replace("..", ".")
            told = self.follow(other) if it else ""
            if rng.random() < 0.4 or not it:
                told = self.reply((other, True), one=it)
            texts += [sentence(asked), told]
        grade = fact_grade((other, True), " ".join(texts[:-1])) if self.test else {}
        return conversation("follow-up", texts, **grade)

    def memory_chat(self) -> dict[str, Any]:
        """Be told things by somebody, and know them when asked later."""
        rng, rows, texts = self.rng, table(MEMORY), list[str]()
        girls, boys = (rng.sample(names, 3) for names in self.people())
        told = {}  # key -> forms
        for key in rng.sample(list(rows), rng.choice((1, 2, 2, 3))):
            p = rng.choice(lists(MEMORY_VALUES).get(key, [""]))
            values = {"city": rng.choice(self.cities), "month": rng.choice(MONTHS.split()[::2])}
            if key in ("name", "pet", "person"):
                sides = {"sister": girls, "aunt": girls, "brother": boys, "uncle": boys}
                values[key] = sides.get(p, rng.choice((girls, boys))).pop()
            values.setdefault(key, p or str(rng.randint(5, 90)))
            told[key] = {"p": p, "ap": p and with_article(p), "v": values[key]}
        said = [rng.choice(rows[key][0]).format_map(forms) for key, forms in told.items()]
        for i, part in enumerate([said] if rng.random() < 0.6 else [[one] for one in said]):
            joined = rng.choice((1, 2))
            text, rest = sentence(", and ".join(part[:joined])), part[joined:]
            hello = rng.choice(("", "", "Hello!", "Hi!", "Hi there!")) if not i else ""
            reply = rng.choice(ways(TOLD))
            if "name" in told and told["name"]["v"] in text and rng.random() < 0.7:
                reply = f"Nice to meet you, {told['name']['v']}!"
            texts += [" ".join([hello, text, *map(sentence, rest)]).strip(), reply]
        for _ in range(rng.choice((0, 1, 1, 2))):
            self.fact_turn(texts)
        for key in rng.sample(list(told), 1 if self.test else rng.randint(1, min(2, len(told)))):
            forms = told[key]
            ask, reply = (rng.choice(rows[key][i]) for i in (1 + self.test, 3))
            ask = ask if self.test else mistyped(rng, ask)
            texts += [sentence(ask.format_map(forms)), reply.format_map(forms)]
        if self.test:
            others = [other["v"] for other in told.values() if other != forms]
            grade: Any = {"answer": forms["v"], "accept": [forms["v"]], "reject": others}
            return conversation("memory", texts, **grade)
        if rng.random() < 0.12:
            key = rng.choice([key for key in rows if key not in told])
            ask = rng.choice(rows[key][1]).format(p=rng.choice(lists(MEMORY_VALUES).get(key, [""])))
            texts += [sentence(ask), rng.choice(ways(NOT_TOLD))]
        return conversation("memory", texts)

    def unknown_turn(self, texts: list[str]) -> None:
        """Ask for what nobody has told, or for what does not exist, and say so."""
        rng, cased = self.rng, False
        if rng.random() < 0.2:
            row = rng.choice(list(table(BEYOND).values()))
            family = coined(rng, self.cities, self.test)
            forms = {"n": rng.choice(rng.choice(self.people())), "c": rng.choice(self.cities)}
            forms["f"] = f"{coined(rng, GIRLS + BOYS, self.test)} {family}"
            clause, reply = (rng.choice(row[i]).format_map(forms) for i in (self.test, 2))
        else:
            name = rng.choice(list(self.models))
            forward = name not in BACKWARD.split(", ") or rng.random() < 0.7
            s = coined(rng, self.models[name][0], self.test)
            o = s if forward else coined(rng, self.models[name][1], self.test)
            wording = rng.choice(questions(name, forward, self.test))
            forms = Fact(name, s, o, "").forms()
            clause = wording if self.test else mistyped(rng, hurried(rng, wording))
            clause, cased = clause.format_map(forms), name in CASED
            reply = rng.choice(ways(DONT_KNOW)).format(s=as_asked(wording, forms) if forward else o)
        text = sentence(clause) if self.test else put(rng, clause, texts, cased)
        texts += [text, greeted(rng, text, reply)]

    def unknown_chat(self) -> dict[str, Any]:
        """Ask for things that do not exist, and for some that do."""
        texts: list[str] = []
        turns = range(self.rng.choice((1, 1, 2, 3)))
        for i in self.rng.sample(turns, len(turns)):
            (self.fact_turn if i and self.rng.random() < 0.5 else self.unknown_turn)(texts)
        return conversation("unknown", texts)

    def about_request(self) -> tuple[str, str]:
        """Return a subject, and some facts of it."""
        first, *others = self.more[self.it.deal().subject]
        others = self.rng.sample(others, min(len(others), 3))
        told = [self.reply((first, True), 0, True), *map(self.follow, others)]
        creature = first.relation in ("class", "young", "sound", "legs", "food", "sides")
        return first.forms()["as" if creature else "s"], " ".join(told)

    def list_request(self) -> tuple[str, str]:
        """Return how many of which kind of thing, and as many of them."""
        name, kind = self.rng.choice([key for key, group in self.groups.items() if len(group) > 3])
        words = self.rng.sample(self.groups[name, kind], self.rng.choice((2, 3, 3, 4)))
        what = f"{number_word(len(words))} {plural(kind)}"
        words = [plural(word) if name in ("class", "kind") else word for word in words]
        if self.rng.random() < 0.4:
            return what, "\n".join(f"- {word}" for word in words)
        words = [f"the {word}" for word in words] if name == "family" else words
        return what, sentence(f"{join_and(words)} are {plural(kind)}")

    def story_request(self) -> tuple[str, str]:
        """Return names, and a story about them."""
        while True:
            teller = Teller(self.rng, *self.people())
            text = teller.tell(self.rng.randint(1, 4)).text
            if len(text) < 500:
                return join_and(list(teller.he)), text

    def talk_turn(self, texts: list[str], keys: str = "") -> None:
        """Say something small, or ask for a text, and reply."""
        rng = self.rng
        if keys or rng.random() < 0.55:
            among = keys.split() or [key for key in table(TALK) if key != "hello" or not texts]
            asked, reply = map(rng.choice, table(TALK)[rng.choice(among)])
        else:
            makers: dict[str, Callable[[], tuple[str, str]]] = {
                "rhyme": partial(rhyme_request, rng), "how": partial(how_request, rng),
                "list": self.list_request, "about": self.about_request, "story": self.story_request,
            }  # fmt: skip
            key = rng.choice(list(makers))
            what, reply = makers[key]()
            asked = rng.choice(table(REQUESTS)[key][0])
            asked = asked.format(w=what.replace("your ", "my ") if " I " in asked else what)
        texts += [sentence(asked) if rng.random() < 0.85 else asked.rstrip(".!?"), reply]

    def talk_chat(self) -> dict[str, Any]:
        """Talk of this and that."""
        texts: list[str] = []
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.talk_turn(texts)
        return conversation("talk", texts)

    def mixed_chat(self) -> dict[str, Any]:
        """Greet, ask for this and that, thank and go."""
        rng, texts = self.rng, list[str]()
        ask = partial(identity_turn, rng, self.name)
        if rng.random() < 0.7:
            self.talk_turn(texts, "hello hello how sad glad like")
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice((self.fact_turn, self.fact_turn, self.unknown_turn, ask))(texts)
        if rng.random() < 0.7:
            self.talk_turn(texts, "thanks thanks praise bye")
        system = rng.choice(ways(INSTRUCTIONS)) if rng.random() < 0.3 else ""
        return conversation("mixed", texts, system.format(name=self.name))


# Shares of the turns of conversations of each kind.
KINDS = {
    "fact": 35, "letters": 9, "problem": 15, "sum": 3,
    "spelling": 12, "story": 10, "follow-up": 5, "memory": 6,
    "identity": 5, "unknown": 9, "talk": 2, "mixed": 2,
}  # fmt: skip
LONGEST = 700  # characters of a conversation, so that nearly all fit a context of 256 tokens


def world_conversations(
    seed: int, split: str, count: int | None = None, name: str = "Nano"
) -> Iterator[dict[str, Any]]:
    """Yield conversations of "mid", "sft" or "val", or the problems of "rl"; no two are equal.

    They are a function of seed and name, without end unless `count` says how many. None of val
    is one of mid or sft, whatever their seeds: a hash of the conversation decides.
    """
    rng = random.Random(f"world {split} {seed}")
    asker = Asker(rng, name)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "fact": asker.fact_chat, "letters": asker.letters_chat, "story": asker.story_chat,
        "follow-up": asker.follow_chat, "memory": asker.memory_chat, "unknown": asker.unknown_chat,
        "talk": asker.talk_chat, "mixed": asker.mixed_chat,
        "identity": partial(identity_chat, rng, name), "problem": partial(problem_chat, rng),
        "sum": partial(sum_chat, rng), "spelling": partial(spelling_chat, rng),
    }  # fmt: skip
    shares = KINDS
    if split == "rl":
        makers, shares = {"problem": partial(rl_problems, rng)}, {"problem": 1}
    turns = dict.fromkeys(shares, 0)
    seen: set[bytes] = set()
    while count is None or len(seen) < count:
        kind = min(shares, key=lambda kind: (turns[kind] + rng.random()) / shares[kind])
        made = makers[kind]()
        messages = made["messages"]
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=12).digest()
        good = split == "rl" or (digest[0] % 10 == 0) == (split == "val")
        if good and digest not in seen and sum(map(text_size, messages)) <= LONGEST:
            seen.add(digest)
            turns[kind] += len(messages) // 2 or 1
            yield made


def text_size(message: dict[str, Any]) -> int:
    """Count the characters of a message."""
    content = message["content"]
    return len(content if isinstance(content, str) else "".join(part["text"] for part in content))


def take_items(count: int, make: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Make items until there are `count` that differ in what they ask."""
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        item = make()
        made.setdefault(json.dumps(item["messages"]), item)
    return list(made.values())


def identity_set(rng: random.Random, name: str) -> list[dict[str, Any]]:
    """Ask for name, maker and kind in wordings that are kept for the test, in many manners."""
    made = []
    for key, words in lists(IDENTITY_KEYS).items():
        accept = [word.format(name=name) for word in words]
        _, unseen, replies = table(IDENTITY)[key]
        for clause, manner in itertools.product(unseen, ["{Q}", "{q}", *ways(POLITE)]):
            text = manner.format(Q=sentence(clause), q=clause)
            reply = rng.choice(replies).format(name=name)
            made.append(conversation("identity", [text, reply], answer=accept[0], accept=accept))
    return made


@cache
def world_sets(name: str = "Nano") -> dict[str, list[dict[str, Any]]]:
    """Return the evaluation sets: graded items, functions of the tables alone."""
    rng = random.Random("evaluation")
    asker = Asker(rng, name, test=True)
    sides: dict[Fact, list[Card]] = {}  # of each fact one way round is asked for
    for card in (*fact_cards(True), *fact_cards(False)):
        sides.setdefault(card[0], []).append(card)
    cards = [s[zlib.crc32(fact.subject.encode()) % len(s)] for fact, s in sides.items()]

    def by_letter() -> dict[str, Any]:
        fact, forward = card = asker.lettered.deal()
        asked = rng.choice([w for w in questions(fact.relation, forward, True) if fits(w, fact)])
        return asker.by_letter(card, sentence(asked.format_map(fact.forms())))

    def unknown() -> dict[str, Any]:
        texts: list[str] = []
        asker.unknown_turn(texts)
        phrase = "I don't know"
        return conversation("unknown", texts, answer=phrase, accept=[phrase])

    tellers = (asker.story_chat, asker.follow_chat, asker.memory_chat)
    return {
        "letters": take_items(1000, by_letter),
        "facts": [asker.fact_item(card) for card in cards if card[0].askable],
        "never_asked": [
            asker.fact_item(card)
            for card in cards
            if not card[0].askable and card[0].relation not in ELSEWHERE
        ],
        "stories": [item for make in tellers for item in take_items(200, make)],
        "identity": identity_set(rng, name),
        "unknown": take_items(500, unknown),
        "spelling": spelling_set(),
        **problem_sets(),
    }


# 9. World: problems --------------------------------------------------------------------------

# Word problems are composed of these sentences: [now|in the past]; {p} is the person in question
# by pronoun or name, {n} by name, {o} and {e} are others, {v} and {w} verbs, {use} a phrase.
PROBLEMS = """
plain: {n} [has|had] {a} {things} | {n} [owns|owned] {a} {things} | {n} [starts|started] with {a}
 {things} | there [are|were] {a} {things} in {n}'s room | at first {n} [has|had] {a} {things} | {n}
 [keeps|kept] {a} {things} on a shelf | in the morning, {n} [counts|counted] {a} {things}
earlier: before that, {p} had {a} {things} | {p} had {a} {things} before that | at the start of the
 day, {p} had {a} {things}
group: {n} [has|had] {a} {boxes} {use} | there [are|were] {a} {boxes} {use} in {n}'s room | {n}
 [fills|filled] {a} {boxes} {use}
each: each of {n}'s {a} {boxes} [holds|held] {b} {things} | there [are|were] {b} {things} in each of
 {n}'s {a} {boxes} | {n} [has|had] {a} {boxes} of {b} {things} | {n} [gets|got] {a} {boxes} of {b}
 {things}
times: {o} [has|had] {a} {things}. {n} [has|had] {use} | {n} [has|had] {use} {things} as {o}. {o}
 [has|had] {a} {things} | {o} [has|had] {a} {things}, and {n} [has|had] {use} | {o} [owns|owned] {a}
 {things}. {n} [owns|owned] {use} {things} as {o}
verb: {p} {v} {b} {things} | {p} {v} {b} {things} {tail}
later: then {p} {v} {b} {things} | later, {p} {v} {b} {things} {tail} | the next day, {p} {v} {b}
 {things} | after that, {p} {v} {b} {things} {tail}
+: {p} {v} {b} more {things} | {p} {v} another {b} {things} {tail}
-: {p} {v} {b} of the {things} | {p} {v} {b} of these {things} {tail}
scale: then the number of {ps} {things} {use} | later, the number of {ps} {things} {use}
other: {o} [has|had] {c} {things} | {o} [owns|owned] {c} {things} | in {o}'s room there [are|were] {c}
 {things}
ask: how many {things} does {p} have now? | how many {things} does {p} have in the end? | what number
 of {things} does {p} have now? | can you tell me how many {things} {p} has now? | find the number
 of {things} that {p} has now. | what is the number of {ps} {things} now?
count: how many {things} [does|did] {p} have? | how many {things} [is|was] that? | what [is|was] the
 number of {ps} {things}? | find the number of {things} that {p} [has|had].
left: how many {things} {use}? | how many of the {things} {use}? | how many {things} {use} in the
 end? | can you tell me how many {things} {use}?
all: how many {things} do {n} and {o} have {use}? | {use}, how many {things} do {n} and {o} have? |
 how many {things} do they have {use}? | find the number of {things} that they have {use}.
compare: how many {use} {things} does {x} have than {y}? | {x} has how many {use} {things} than {y}?
 | can you tell me how many {use} {things} {x} has than {y}?
share: {p} [shares|shared] the {things} equally among {c} friends. how many {things} does each friend
 get? | {p} [puts|put] the {things} into {c} {boxes}, the same number in each. how many {things} are
 in each {box}? | {c} friends [share|shared] the {things} equally. what is the number of {things}
 for each friend?
besides: {p} also [has|had] {d} {others} | {p} also {w} {d} {others} | {e} [has|had] {d} {others} |
 {n}'s {kin} [is|was] {d} years old | the walk home [takes|took] {d} minutes | {n} [lives|lived] at
 number {d} | there [are|were] {d} children in {n}'s class | {p} [reads|read] {d} pages of a book |
 {e} [is|was] {d} years old | {one} [costs|cost] {d} cents
"""
STARTS = {"plain": 6, "group": 2, "times": 2}  # kinds of sentences, and how often
CHANGES = {"verb": 8, "scale": 1, "number": 1}
FINISHES = {"ask": 5, "left": 3, "all": 2, "compare": 2, "share": 2}
ORDERS = "told told told earlier asked if".split()  # how start, changes and question follow


def weighed(rng: random.Random, table: dict[str, int]) -> str:
    """Choose a key by its weight."""
    return rng.choices(list(table), list(table.values()))[0]


def require(fits: bool) -> None:
    """Give up a problem whose parts do not go together."""
    if not fits:
        raise ValueError("parts that do not go together")


class Composer:
    """Composes one word problem of independent parts, with its solution.

    Verbs and phrases are shown ones; if `must` is of another set, that one is there, and others
    may be of its set too. Raises ValueError where the parts do not go together.
    """

    def __init__(self, rng: random.Random, must: dict[str, str], besides: bool) -> None:
        self.rng, self.must, self.order = rng, must, rng.choice(ORDERS)
        self.sets = {"shown", must.get("set", "shown")}
        start, finish = weighed(rng, STARTS), weighed(rng, FINISHES)
        changes = [weighed(rng, CHANGES) for _ in range(rng.choice((0, 1, 1, 1, 2, 2)))]
        steps = (start != "plain") + len(changes) + (finish not in ("ask", "left"))
        first = start == "plain" and changes[:1] in (["verb"], ["number"])
        require(not must or must["role"] in (start, *changes, finish))
        require(1 <= steps <= 2 and (finish != "left" or changes[-1:] in (["verb"], ["number"])))
        require(self.order != "earlier" or first)
        require(self.order != "asked" or (finish == "ask" and len(changes) == steps))
        require(self.order != "if" or (first and steps == 1))
        self.past = self.order != "if" and rng.random() < 0.5
        self.shape = [self.order]  # with what follows, the combination of parts
        self.facts: list[tuple[str, str]] = []  # letter of whom it is about, sentence
        self.steps: list[tuple[str, str, int]] = []  # what is done and why, call, result
        self.known = ""  # what the next step's sentence begins with
        self.thing, other = rng.sample(COUNTED, 2)
        n, o, e = rng.sample(GIRLS + BOYS, 3)
        self.he, box = "she" if n in GIRLS else "he", rng.choice(CONTAINERS)
        require(box not in (self.thing, other))
        self.forms = {
            "n": n, "o": o, "e": e, "p": "{p}", "ps": "{ps}", "box": box, "boxes": plural(box),
            "things": plural(self.thing), "others": plural(other), "one": with_article(self.thing),
        }  # fmt: skip
        self.value = self.begin(start, bool(changes))
        for role in changes:
            self.change(role, finish)
        self.question = self.end(finish)
        require(not self.must)
        if besides:
            self.distract()

    def part(self, role: str, op: str = "") -> dict[str, str]:
        """Choose a verb or phrase; the one that must be there as soon as it can be."""
        if self.must and self.must["role"] == role:
            chosen, self.must = self.must, {}
        else:
            sets = self.sets if self.rng.random() < 0.4 else {"shown"}
            pool = [p for p in problem_parts() if p["role"] == role and p["set"] in sets]
            chosen = self.rng.choice(pool)
        require(op in chosen["op"] and chosen["base"] not in self.shape)
        self.shape.append(chosen["base"])
        return chosen

    def word(self, key: str, fits: str = "", **forms: object) -> tuple[str, str]:
        """Choose a wording; return the letter of whom it is about, and its text but for {p}."""
        text = self.rng.choice([t for t in wordings(key, PROBLEMS) if re.search(fits, t)])
        if key in (*STARTS, *FINISHES, "earlier", "each", "count"):
            self.shape.append(text)
        about = re.findall(r"\{([npoe])\} (?:also )?(?:\[|\{[vw])", text)[-1:] or [""]
        told = text.replace("{use}", str(forms.get("use", "")))
        told = re.sub(r"\[(.*?)\|(.*?)\]", lambda m: m[1 + self.past], told)
        return about[0].replace("p", "n"), told.format_map(self.forms | forms)

    def has(self, who: str, number: int) -> None:
        """Let the next step begin with what somebody has."""
        has = "had" if self.past else "has"
        self.known += f"{self.forms[who]} {has} {number} {self.forms['things']}. "

    def step(self, why: str, op: str, a: int, b: int) -> int:
        """Work one step."""
        require(b > 0 and (op != "/" or a % b == 0))
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        require(0 <= result < 1000)
        self.steps.append((self.known + why, f"{a}{op}{b}", result))
        self.known = ""
        return result

    def scaled(self, phrase: dict[str, str], a: int) -> int:
        """Multiply or divide as a phrase says."""
        return self.step(meaning(phrase), phrase["op"][0], a, int(phrase["op"][1:]))

    def begin(self, start: str, changes: bool) -> int:
        """Tell what somebody has at first; return the number."""
        rng, self.other = self.rng, 0  # what another has, where that is told
        if start == "plain":
            a = rng.randint(3, 99) if rng.random() < 0.95 else rng.randint(100, 200)
            if self.order != "earlier":
                fits = "" if changes else r"^(?!.*(\[starts|first))"
                fits = r"^\{n\} \[has" if self.order == "if" else fits
                self.facts.append(self.word("plain", fits, a=a))
            self.has("n", a)
            return a
        phrase = self.part(start)
        if start == "group":
            a, b = rng.randint(2, 30), rng.randint(2, 24)
            key = "each" if phrase["base"] == "each" and rng.random() < 0.6 else "group"
            self.facts.append(self.word(key, a=a, b=b, use=phrase["use"]))
            why = f"There are {a} {self.forms['boxes']} with {b} in each, so we multiply. "
            return self.step(why, "*", a, b)
        op, of = phrase["op"][0], int(phrase["op"][1:])
        self.other = of * rng.randint(2, 120 // of) if op == "/" else rng.randint(2, 90)
        self.facts.append(self.word("times", a=self.other, use=phrase["use"]))
        self.has("o", self.other)
        return self.scaled(phrase, self.other)

    def change(self, role: str, finish: str) -> None:
        """Tell of a change of the number."""
        rng, a = self.rng, self.value
        if role == "scale":
            phrase = self.part("scale")
            self.facts.append(self.word("scale", use=phrase["use"]))
            self.value = self.scaled(phrase, a)
            return
        number = self.part("number") if role == "number" else {}
        verb = self.part("verb", "-" if finish == "left" else "")
        require(self.thing in verb["things"].split())
        b = int(number["op"]) if number else rng.randint(2, a - 1 if verb["op"] == "-" else 99)
        key = "later" if self.facts and rng.random() < 0.5 else "verb"
        if self.sets == {"shown"} and not number and self.facts and rng.random() < 0.2:
            key = verb["op"]  # with a word that gives the verb's effect away, as people talk
        key = "verb" if self.order == "if" else key
        v = verb["past" if self.past else "does"]
        self.facts.append(self.word(key, b=number.get("use", b), v=v, tail=verb["tail"]))
        if len(self.facts) == 1:  # only now what there was before
            self.facts.append(self.word("earlier", a=a))
        if self.order == "if":
            (_, had), (_, then) = self.facts
            self.facts = [("n", f"if {had} and {then.removeprefix('{p} ')}")]
        self.known += meaning(number) if number else ""
        why = f"{self.forms['n']} {v} {b}, so now {self.he} has {verb['more']}. "
        self.value = self.step(why, verb["op"], a, b)

    def end(self, finish: str) -> tuple[str, str]:
        """Work the last step; return the question."""
        a, n, o = self.value, self.forms["n"], self.forms["o"]
        fits = "^how" if self.order == "if" else ""
        if finish == "ask":
            return self.word("ask" if len(self.facts) > 1 else "count", fits)
        if finish == "share":
            c = self.rng.choice([c for c in range(2, 13) if a % c == 0 and a > c] or [a + 1])
            self.value = self.step(f"They are shared by {c}, so we divide. ", "/", a, c)
            return self.word("share", c=c)
        phrase = self.part(finish)
        if finish == "left":
            return self.word("left", fits, use=phrase["use"])
        c = self.other or self.rng.randint(2, 99)
        if not self.other:
            at = self.rng.choice((0, len(self.facts)))
            self.facts.insert(at, self.word("other", c=c))
        self.has("o", c)
        require(finish != "compare" or a != c)
        first, second = (c, a) if finish == "compare" and a < c else (a, c)
        self.value = self.step(meaning(phrase), phrase["op"], first, second)
        x, y = (n, o) if (a > c) == (phrase["use"] == "more") else (o, n)
        return self.word(finish, use=phrase["use"], x=x, y=y)

    def distract(self) -> None:
        """Tell something with a number that has nothing to do with the question."""
        worked = " ".join(f"{call} {result}" for _, call, result in self.steps)
        d = self.rng.choice([d for d in range(3, 60) if str(d) not in re.findall(r"\d+", worked)])
        verb = self.rng.choice([v for v in count_verbs() if v["set"] == "shown" and v["any"]])
        kin = self.rng.choice(("sister", "brother") if d < 18 else ("aunt", "uncle"))
        told = self.word("besides", d=d, w=verb["past" if self.past else "does"], kin=kin)
        self.facts.insert(self.rng.randint(0, len(self.facts) - (self.order == "if")), told)

    def text(self) -> str:
        """Tell all of it, with pronouns where they are clear."""
        told: list[str] = []
        last, n = "", self.forms["n"]
        asked = [self.question]
        for who, text in [*asked, *self.facts] if self.order == "asked" else [*self.facts, *asked]:
            p = self.he if last == "n" and self.rng.random() < 0.75 else n
            ps = {"she": "her", "he": "his"}.get(p, f"{n}'s")
            told.append((text if told else text.replace(" also ", " ")).format(p=p, ps=ps))
            last = who
        if self.order == "if":
            told[-2:] = [", ".join(told[-2:])]
        return " ".join(sentence(part) for text in told for part in text.split(". "))

    def is_held_out(self) -> tuple[bool, bool]:
        """Say whether its combination of parts, and whether a pair of operands, is for the test."""
        pairs = [re.split(r"\D", call) for _, call, _ in self.steps]
        pair = any(held_out_pair(int(a), int(b)) for a, b in pairs)
        return held_out("problem " + " ".join(self.shape)), pair

    def item(self) -> dict[str, Any]:
        """Return it as a graded item with its solution."""
        reply, known = [], ""
        for why, call, result in self.steps:
            reply += [text_part(known + why), *tool_parts(call)]
            known = f"That makes {result}. "
        reply.append(text_part(f"The answer is {self.value}."))
        texts = [self.text(), reply]
        return conversation("problem", texts, grade="number", answer=str(self.value))


def meaning(phrase: dict[str, str]) -> str:
    """Say what a phrase of word problems means."""
    return sentence(f"{phrase['base']} means {phrase['meaning']}") + " "


def text_part(text: str) -> dict[str, str]:
    """Return what a reply says."""
    return {"type": "text", "text": text}


def tool_parts(call: str) -> list[dict[str, str]]:
    """Return a call of the tool and its output."""
    return [{"type": "python", "text": call}, {"type": "output", "text": calculate(call)}]


def problem(rng: random.Random, wanted: str, besides: float, held: list[tuple[bool, bool]]
            ) -> dict[str, Any]:  # fmt: skip
    """Compose problems until one is what is wanted.

    `wanted`: the set of its rarest part; `besides`: how often something has nothing to do with the
    question; `held`: what is_held_out may say.
    """
    parts = [part for part in problem_parts() if part["set"] == wanted != "shown"]
    must = rng.choice(parts) if parts else {}
    while True:
        try:
            found = Composer(rng, must, rng.random() < besides)
        except ValueError:
            continue
        if found.is_held_out() in held:
            return found.item()


def problem_chat(rng: random.Random) -> dict[str, Any]:
    """Return a word problem of shown parts, solved with the tool, for training."""
    return solved(problem(rng, "shown", 0.55, [(False, False)]))


def rl_problems(rng: random.Random) -> dict[str, Any]:
    """Return a word problem with its answer alone; most have a practised part."""
    wanted = "practised" if rng.random() < 0.85 else "shown"
    item = problem(rng, wanted, 0.4, [(False, False)])
    return {key: value for key, value in item.items() if key != "reply"}


@cache
def problem_sets() -> dict[str, list[dict[str, Any]]]:
    """Return the word problems of the test, the same for every seed, 500 in a set.

    Each set differs in one way from what is trained on: in pairs of numbers, in combinations of
    shown parts, in combinations of parts some of which rl practises, in parts no problem has.
    """
    held = {
        "numbers": ("shown", 0.55, [(False, True)]),
        "combinations": ("shown", 1, [(True, False)]),
        "practised": ("practised", 0.4, [(True, False)]),
        "new": ("test", 0.4, [(False, False), (True, False)]),
    }
    return {
        f"problems_{name}": take_items(500, partial(problem, random.Random(name), *wanted))
        for name, wanted in held.items()
    }


# How sums are asked for, in words or in signs.
SUMS = """
+: what is {a} plus {b}? | how much is {a} plus {b}? | add {a} and {b}. | what is the sum of {a} and
 {b}? | {a} plus {b} | what do you get if you add {a} and {b}? | what do {a} and {b} make together?
-: what is {a} minus {b}? | how much is {a} minus {b}? | subtract {b} from {a}. | take {b} away from
 {a}. | {a} minus {b} | what is left of {a} after taking away {b}? | what do you get if you take {b}
 from {a}?
*: what is {a} times {b}? | how much is {a} times {b}? | multiply {a} by {b}. | what is the product of
 {a} and {b}? | {a} times {b} | what is {a} multiplied by {b}? | what does {a} times {b} make?
/: what is {a} divided by {b}? | how much is {a} divided by {b}? | divide {a} by {b}. | {a} divided by
 {b} | how often does {b} go into {a}? | what do you get if you divide {a} by {b}?
signs: {s} | what is {s}? | {s} = ? | {s} = | calculate {s} | work out {s}. | compute {s}, please. |
 how much is {s}?"""
SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def sum_chat(rng: random.Random) -> dict[str, Any]:
    """Return a sum in words or signs, worked with the tool."""
    op = rng.choice("++--***//")
    numbers = [rng.randint(2, rng.choice((12, 99, 99, 999 if op != "*" else 99)))]
    numbers.append(rng.randint(2, 99 if op in "+-" else 30))
    if op == "/" and rng.random() < 0.9:
        numbers[0] *= numbers[1]
    if op in "+*" and rng.random() < 0.12:
        numbers.append(rng.randint(2, 20))
    call, first = op.join(map(str, numbers)), calculate(op.join(map(str, numbers[:2])))
    result = calculate(call)
    held = [held_out_pair(*numbers[:2]), *(held_out_pair(int(first), n) for n in numbers[2:])]
    unusual = "." in result or result.startswith("-")  # 7 / 2, 5 - 8: now and then
    if any(held) or len(result.partition(".")[2]) > 2 or (unusual and rng.random() < 0.8):
        return sum_chat(rng)
    signs = [f" {op} ", f" {op} ", op, {"*": " x ", "/": " \u00f7 "}.get(op, op)]
    forms = {"a": numbers[0], "b": numbers[1], "s": rng.choice(signs).join(map(str, numbers))}
    key = "signs" if len(numbers) > 2 or rng.random() < 0.4 else op
    asked = rng.choice(wordings(key, SUMS)).format_map(forms)
    asked = asked[0].upper() + asked[1:] if key == "signs" else put(rng, asked)
    told = "{s} = {r}." if key == "signs" else f"{{a}} {SIGNS[op]} {{b}} is {{r}}."
    told = "The answer is {r}." if rng.random() < 0.3 else told
    reply = [*tool_parts(call), text_part(told.format_map(forms | {"r": result}))]
    return conversation("sum", [asked, reply])


# What is asked about a word: in training after "?", in the test after "!". After "=", the reply;
# the tool's call stands at "#".
SPELLING = """
spell?: how do you spell "{w}"? | spell "{w}". | can you spell "{w}" for me? | spell the word "{w}",
 please. | what are the letters of "{w}"? | how do I spell "{w}"? | please spell "{w}" letter by
 letter. | what is the spelling of "{w}"? | how is "{w}" written, letter by letter? | which letters
 are in "{w}"? | give me the letters of "{w}". | say the letters of "{w}" one by one. | please tell
 me how to spell "{w}". | how should I spell "{w}"? | I want to spell "{w}". | I do not know how to
 spell "{w}". | which letters do I need for "{w}"? | write "{w}" letter by letter. | how does one
 spell the word "{w}"? | the word "{w}": how is it spelled? | help me spell "{w}". | how is "{w}"
 spelled?
spell!: how is the word "{w}" spelled? | I need the spelling of "{w}".
spell=: "{w}" is spelled {l}.
count?: how many {x} are in "{w}"? | how many times is {x} in "{w}"? | count the letter {x} in
 "{w}". | how often does the letter {x} occur in "{w}"? | how many {x} are there in the word "{w}"?
 | tell me how many {x} "{w}" has. | what number of {x} is in "{w}"? | how many times does {x} occur
 in "{w}"? | in "{w}", how often is there {x}? | in the word "{w}", how many {x} are there? | how
 many of the letters of "{w}" are {x}? | how often do you see {x} in "{w}"? | can you count the {x}
 in "{w}"? | find how many {x} the word "{w}" has. | the letter {x}: how many times is it in "{w}"?
 | how many times do I write {x} in "{w}"? | say how many {x} there are in "{w}". | what is the
 count of {x} in "{w}"? | how many {x} does "{w}" have? | "{w}" has how many {x}? | how often is the
 letter {x} in the word "{w}"?
count!: how many times does "{w}" have the letter {x}? | in "{w}", how many {x} do you see?
count=: "{w}" is spelled {l}. #The letter {x} is in it {r} {times}.
letters?: how many letters does "{w}" have? | how many letters are in "{w}"? | count the letters of
 "{w}". | how long is the word "{w}"? | how many letters does the word "{w}" have? | what is the
 length of "{w}"? | how many letters do I need to write "{w}"? | tell me how many letters there are
 in "{w}". | can you count the letters in "{w}"? | of how many letters is "{w}" made? | in "{w}",
 how many letters are there? | what number of letters does "{w}" have? | how long is "{w}"? | say
 how many letters "{w}" has. | give me the number of letters of "{w}". | "{w}" has how many letters?
 | find the number of letters in the word "{w}".
letters!: what is the number of letters in "{w}"? | tell me how many letters the word "{w}" has.
letters=: "{w}" is spelled {l}. #It has {r} letters.
first?: what is the first letter of "{w}"? | which letter does "{w}" begin with? | what letter is at
 the start of "{w}"? | "{w}" starts with which letter? | with what letter does "{w}" begin? | tell
 me which letter "{w}" starts with. | what letter comes first in "{w}"? | the first letter of "{w}"
 is what? | give me the first letter of "{w}". | name the letter that "{w}" begins with. | which
 letter is first in "{w}"? | what does "{w}" start with? | say the first letter of the word "{w}". |
 I need the first letter of "{w}". | with which letter does "{w}" begin? | what is the first letter
 in the word "{w}"?
first!: tell me the first letter of the word "{w}". | with which letter does "{w}" start?
first=: "{w}" is spelled {l}. Its first letter is {f}.
last?: what is the last letter of "{w}"? | which letter does "{w}" end with? | what letter is at the
 end of "{w}"? | "{w}" ends in which letter? | with what letter does "{w}" end? | tell me which
 letter "{w}" ends with. | what letter comes last in "{w}"? | the last letter of "{w}" is what? |
 give me the last letter of "{w}". | name the letter that "{w}" ends with. | which letter is last in
 "{w}"? | what does "{w}" end with? | say the last letter of the word "{w}". | I need the last
 letter of "{w}". | in which letter does "{w}" end? | what is the last letter in the word "{w}"?
last!: tell me the last letter of the word "{w}". | with which letter does "{w}" end?
last=: "{w}" is spelled {l}. Its last letter is {z}.
back?: how do you spell "{w}" backwards? | spell "{w}" backwards. | write "{w}" backwards, please. |
 reverse the letters of "{w}". | what is "{w}" from back to front? | what is "{w}" backwards? | how
 is "{w}" written backwards? | say "{w}" backwards. | read "{w}" from back to front. | turn
 "{w}" around, letter by letter. | spell the word "{w}" in reverse. | can you
 write "{w}" in reverse? | reverse "{w}". | what do I get when I read "{w}" backwards? | please
 reverse the word "{w}". | can you turn "{w}" around? | what is the word "{w}" in reverse?
back!: what do you get if you turn "{w}" around? | can you reverse the word "{w}"?
back=: "{w}" is spelled {l}. Backwards it is {b}."""
SPELLING_KINDS = {"spell": 3, "count": 3, "letters": 1, "first": 1, "last": 1, "back": 1}


def spelling_item(rng: random.Random, word: str, split: Literal["?", "!"]) -> dict[str, Any]:
    """Ask about a word's letters; the reply spells the word, and counts with the tool."""
    kind, back = weighed(rng, SPELLING_KINDS), "-".join(word[::-1])
    x = rng.choice(word if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")
    call = {"count": f'"{word}".count("{x}")', "letters": f'len("{word}")'}.get(kind, "")
    forms = {"w": word, "l": "-".join(word), "x": x, "f": word[0], "z": word[-1], "b": back,
             "r": calculate(call), "times": "time" if word.count(x) == 1 else "times"}  # fmt: skip
    asked = rng.choice(wordings(kind + split, SPELLING)).format_map(forms)
    asked = asked if rng.random() < 0.75 else asked.replace('"', "")
    asked = put(rng, asked) if split == "?" else sentence(asked)
    said, _, last = wordings(f"{kind}=", SPELLING)[0].format_map(forms).partition("#")
    if call:
        reply = [text_part(said), *tool_parts(call), text_part(last)]
        return conversation("spelling", [asked, reply], grade="number", answer=forms["r"])
    accept = {"spell": [forms["l"]], "back": [back, word[::-1]]}.get(kind, [said[-2]])
    return conversation("spelling", [asked, said], answer=accept[0], accept=accept, reject=[])


def spelling_chat(rng: random.Random) -> dict[str, Any]:
    """Return a question about a word's letters, answered; some words are made up."""
    word = rng.choice(shown_words()) if rng.random() < 0.7 else made_word(rng)
    return solved(spelling_item(rng, word, "?"))


@cache
def spelling_set() -> list[dict[str, Any]]:
    """Return 500 questions about words that no training file spells, in wordings of the test."""
    rng = random.Random("spelling")
    return take_items(500, lambda: spelling_item(rng, rng.choice(held_words()), "!"))


# 10. Main ------------------------------------------------------------------------------------

# A folder's manifest has the settings that determine the data, what was left out, and the size of
# each file: manifest.json that of text, conversations.json that of other files, which may share the
# folder with text. New files are made in a folder beside; then the old manifest goes, the new files
# replace the old ones one by one, and the new manifest comes. Meanwhile .NAME.partial lists them:
# after a kill in between, another run makes them again.


def make_world(settings: Settings, folder: Path) -> Manifest:
    """Write the embedded world: text, conversations, and what evaluate.py asks for."""
    sorter = Sorter(folder / "buckets", settings.seed, settings.documents * 1000)
    for text in world_documents(settings.seed, settings.documents):
        sorter.add(text)
    count, made = settings.num_conversations, Files()
    (folder / "eval").mkdir()
    for split in ("trained", "unseen"):
        path = folder / "eval" / f"facts_{split}.jsonl"
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in fact_prompts(split)]
        path.write_text("".join(lines), "utf-8")
        made[f"eval/{path.name}"] = {"size": size_of(path)}
    for split, share in {"mid": 1, "sft": 6, "val": 60, "rl": 10}.items():
        size = max(count // share, min(count, 20))
        chats = world_conversations(settings.seed, split, size, settings.name)
        made |= write_lines(folder / f"{split}.jsonl", map(as_line, chats))
    for name, graded in world_sets(settings.name).items():
        about = write_lines(folder / "eval" / f"{name}.jsonl", map(as_line, graded))
        made[f"eval/{name}.jsonl"] = about[f"{name}.jsonl"]
    return {"files": write_splits(folder, sorter, settings), "chats": made}


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON says, {} where there is none or it is broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_manifest(listing: Path) -> Manifest:
    """Return what a manifest says, or what is known of files that a killed process left, or {}."""
    manifest = read_json(listing) or read_json(listing.with_name(f".{listing.name}.partial"))
    return manifest if {"settings", "files"} <= set(manifest) else {}


def all_files(manifest: Manifest) -> Files:
    """Return the text and the conversations that a manifest lists, by name."""
    return {**manifest.get("files", {}), **manifest.get("chats", {})}


def check_folder(folder: Path, manifest: Manifest, wanted: dict[str, Any]) -> None:
    """Raise Stop rather than write over other data; say what is made anew, and why."""
    remedy = f"give this one a name of its own with --source=NAME, or delete {folder}"
    if not manifest:
        raise Stop(f"{folder} holds files that were not made of {wanted['data']}: {remedy}")
    before = manifest["settings"]
    if before["data"] != wanted["data"]:
        raise Stop(f"{folder} holds what was made of {before['data']}: {remedy}")
    words = {"input": "other files", "tests": "other evaluation sets"}
    words |= dict.fromkeys(("version", "world"), "another version of prepare.py")
    changed = [words.get(name) or f"--{name.replace('_', '-')}={before.get(name)}"
               for name in wanted if before.get(name) != wanted[name]]  # fmt: skip
    if changed:
        print(f"prepare: {folder} was made with {', '.join(dict.fromkeys(changed))}")


def replace_files(
    listing: Path, wanted: dict[str, Any], make: Callable[[Path], Manifest], keep: bool = False
) -> None:
    """Make files beside a folder and put them in; `listing` becomes their manifest.

    With `keep` the files of evaluation sets that are not made anew stay.
    """
    folder = listing.parent
    beside, unsure = (p.with_name(f".{p.name}.partial") for p in (folder, listing))
    shutil.rmtree(beside, ignore_errors=True)  # a killed process left it
    beside.mkdir(parents=True)
    try:
        new = {"settings": wanted, **make(beside)}
        names = [*all_files(new)]
        old = all_files(read_manifest(listing))
        sets = {name.split("/")[0] for name in names}
        kept = {n: old.pop(n) for n in list(old) if keep and n.split("/")[0] not in sets}
        files = {**kept, **{name: {"size": -1} for name in (*old, *names)}}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(unsure, {"settings": wanted, "files": files})
        listing.unlink(missing_ok=True)
        if listing.name == "manifest.json":
            shutil.rmtree(folder / "tokens", ignore_errors=True)  # of the old text
        for name in set(old) - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        new["files"] |= kept
        write_json(listing, new)
        unsure.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def prepare_folder(
    listing: Path, wanted: dict[str, Any], write: Callable[[], None], strange: bool
) -> Manifest:
    """Write a folder's files unless they are there; say what it holds; return the manifest.

    `strange`: there are files that the manifest does not explain.
    """
    folder, manifest = listing.parent, read_manifest(listing)
    whole = (size_of(folder / name) == e["size"] for name, e in all_files(manifest).items())
    before = manifest.get("settings", {})
    if before.get("input"):  # content decides, wherever it lies
        before = {**before, "data": wanted["data"]}
    again = before == wanted and all(whole)
    if not again:
        if (manifest or strange) and listing != data_dir("eval") / "conversations.json":
            check_folder(folder, manifest, wanted)  # evaluation sets may come from several places
        write()
        manifest = read_manifest(listing)
    files = all_files(manifest)
    state = " is complete, nothing to do" if again else ""
    if text := [entry for entry in files.values() if "documents" in entry]:
        val = files["val.parquet"]["documents"]
        train = sum(entry["documents"] for entry in text) - val
        chars = format_count(sum(entry["characters"] for entry in text))
        state += f": {train:,} train and {val:,} validation documents, {chars} characters"
    print(f"prepare: {folder}{state}")
    for name, entry in files.items():
        if "kinds" in entry and not name.startswith("eval/"):
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in entry["kinds"].items())
            kinds = f" ({kinds})" if len(entry["kinds"]) > 1 else ""
            print(f"prepare: {folder / name}: {entry['conversations']:,}{kinds}")
    print(left_out(manifest.get("dropped", {}), "prepare: {}\n"), end="")
    return manifest


def prepare_eval(settings: Settings, net: Net | None) -> Manifest:
    """Make data/eval/ of the hub's sets or of a folder's, unless it is there."""
    listing, hub = data_dir("eval") / "conversations.json", settings.eval_data == "hub"
    root = data_dir("downloads") if hub else resolve(settings.eval_data)
    wanted: dict[str, Any] = {"data": "hub", "version": DATA_VERSION}
    if not hub:
        wanted |= {"data": printable(root), "input": OwnFiles(root).fingerprint()}

    def write() -> None:
        if hub:
            splits = [(name, about.test) for name, about in SETS.items() if about.test]
            fetch_sets(net or Net(), root, splits, settings.workers)
        replace_files(listing, wanted, partial(make_eval, root), keep=True)

    manifest = prepare_folder(listing, wanted, write, strange=False)
    titles = [*(about.title for about in SETS.values() if about.test), "SpellingBee"]
    missing = [title for title in titles if f"{title}.jsonl" not in manifest["files"]]
    missing += ["CORE"] * (not any("task" in entry for entry in manifest["files"].values()))
    if missing:
        print(f"prepare: {root} does not have {', '.join(missing)}: left out")
    return manifest


def prepare_chat(settings: Settings, net: Net | None) -> Manifest:
    """Make data/SOURCE/{mid,sft,rl,val}.jsonl of the hub's conversations or of your own."""
    listing = data_dir(settings.source) / "conversations.json"
    root, files = data_dir("downloads"), None
    wanted: dict[str, Any] = {"data": "hub", "name": settings.name, "seed": settings.seed}
    wanted["version"] = DATA_VERSION
    wanted["tests"] = OwnFiles(data_dir("eval")).fingerprint()  # their questions are left out
    if settings.conversations == "hub":
        wanted["world"] = WORLD_VERSION  # of the conversations on who the assistant is
    else:
        files = OwnFiles(resolve(settings.conversations), settings.encoding, with_text=False)
        wanted |= {"data": printable(files.root), "input": files.fingerprint(),
                   "val_percent": settings.val_percent, "val_mb": settings.val_mb,
                   "encoding": settings.encoding}  # fmt: skip

    def write() -> None:
        if not files:
            splits = [(name, split) for name, about in SETS.items() if about.train
                      for split in (about.train, about.val) if split]  # fmt: skip
            fetch_sets(net or Net(), root, splits, settings.workers)
        replace_files(listing, wanted, partial(make_chat, settings, files, root))

    strange = any((listing.parent / f"{file}.jsonl").exists() for file in FILES)
    return prepare_folder(listing, wanted, write, strange)


def prepare_text(settings: Settings, net: Net | None) -> Manifest:
    """Make the text of data/SOURCE/, of the world its conversations too."""
    folder = data_dir(settings.source)
    listing = folder / "manifest.json"
    wanted: dict[str, Any] = {"data": "world", "version": WORLD_VERSION}
    names = ["val_percent", "val_mb", "shard_mb", "seed"]
    strange = {path.name for path in folder.glob("[!.]*")}
    if settings.kind == "hub":
        wanted, names, strange = {"data": HUB[settings.data][1]}, ["shards"], set()
    elif settings.kind == "world":
        names += ["documents", "num_conversations", "name"]
        make = partial(make_world, settings)
    else:
        files = OwnFiles(resolve(settings.data), settings.encoding)
        wanted = {"data": printable(files.root), "version": DATA_VERSION}
        wanted["input"] = files.fingerprint()
        names += ["doc_chars", "document_ends", "encoding"]
        make = partial(make_own_text, settings, files)
        strange -= {*read_manifest(folder / "conversations.json").get("files", {}), "tokens",
                    "conversations.json"}  # fmt: skip
    wanted |= {name: getattr(settings, name) for name in names}

    def write() -> None:
        if settings.kind == "hub":
            made = make_hub_text(settings, net or Net(), folder)
            write_json(listing, {"settings": wanted, "files": made})
        else:
            replace_files(listing, wanted, make)

    return prepare_folder(listing, wanted, write, bool(strange))


def main(settings: Settings, net: Net | None = None) -> Manifest:
    """Prepare what the settings name, unless it is there; return its manifest."""
    with one_sentence("prepare"):
        if settings.conversations == "hub":
            settings = replace(settings, eval_data=settings.eval_data or "hub")
        made = prepare_eval(settings, net) if settings.eval_data else {}
        if settings.conversations:
            return prepare_chat(settings, net)
        return made or prepare_text(settings, net)


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
