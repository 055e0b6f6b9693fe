"""Get text: from the hub, from files of one's own, or from the embedded world.

Usage:   python prepare.py                                 # the embedded world, no network
         python prepare.py --data=../books                 # a folder or file of one's own
         python prepare.py --data=hub --shards=8           # FineWeb-Edu; --data=climbmix
Reads:   the hub (HF_ENDPOINT, HF_TOKEN), a path, or nothing
Writes:  data/SOURCE/train-00000.parquet ... val.parquet, manifest.json; world also eval/
Method:  documents are cut at paragraph ends, then sorted by a hash of seed and text: this
         shuffles them, drops duplicates and splits off validation text in bounded memory
         and does not depend on how the files lie on the disk
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import email.utils
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
from urllib3.exceptions import MaxRetryError

from common import (
    MissingInput,
    Stop,
    base_dir,
    check_name,
    data_dir,
    format_count,
    format_duration,
    one_sentence,
    parse_settings,
    setting,
    write_json,
    written_beside,
)

# 1. Settings ---------------------------------------------------------------------------------

# name: folder below data/, repository; its last shard is for validation
HUB = {
    "hub": ("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle"),  # 1,823 shards
    "climbmix": ("climbmix", "karpathy/climbmix-400b-shuffle"),  # 6,543 shards
}
RESERVED = {"world", "eval", *(folder for folder, _ in HUB.values())}


@dataclass
class Settings:
    data: str = setting("world", "world, hub (FineWeb-Edu), climbmix, or a path of your own")
    source: str = setting(
        "", "folder below data/; none = world, fineweb-edu, climbmix, path's name"
    )
    shards: int = setting(8, "hub: shards to train on, about 250 M characters each")
    documents: int = setting(64_000, "world: documents to write, about 370 characters each")
    doc_chars: int = setting(20_000, "own files: longer documents are cut at paragraph ends")
    val_percent: float = setting(2.0, "world, own files: share of the validation documents")
    val_mb: int = setting(20, "world, own files: MB of validation text at most")
    shard_mb: int = setting(100, "world, own files: MB of text in one train shard")
    seed: int = setting(0, "world, own files: order, split, and what the world tells")
    workers: int = setting(4, "hub: downloads at once")

    def __post_init__(self) -> None:
        if self.kind == "own" and not self.path.is_dir() and not self.path.is_file():
            others = ", ".join(["world", *HUB])
            raise ValueError(f"--data={self.data}: no such file or folder, nor one of {others}")
        for name in ("shards", "documents", "val_mb", "shard_mb", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.doc_chars < 200:
            raise ValueError("--doc-chars must be 200 or more")
        if not 0 < self.val_percent <= 50:
            raise ValueError("--val-percent must be over 0 and at most 50: training needs both")
        self.source = self.source or self.default_source()
        check_name(self.source, "--source")
        if self.source == "eval":
            raise ValueError("--source=eval is the folder of the evaluation sets: take another")

    @property
    def kind(self) -> str:
        return "hub" if self.data in HUB else "world" if self.data == "world" else "own"

    @property
    def path(self) -> Path:
        return Path(self.data).expanduser().resolve()

    def default_source(self) -> str:
        """Derive the folder below data/: a fixed name, or the path's name in plain letters."""
        if self.kind != "own":
            return HUB[self.data][0] if self.kind == "hub" else "world"
        plain = unicodedata.normalize("NFKD", self.path.name.split(".")[0].lower())
        plain = plain.encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        slug = slug or "text-" + hashlib.sha256(str(self.path).encode()).hexdigest()[:6]
        return f"{slug}-files" if slug in RESERVED else slug

    def identity(self) -> dict[str, Any]:
        """Return what decides the text: two preparations with equal identities are equal."""
        if self.kind == "hub":
            return {"data": HUB[self.data][1], "shards": self.shards}
        names = ["val_percent", "val_mb", "shard_mb", "seed"]
        names += ["documents"] if self.kind == "world" else ["doc_chars"]
        place = {"data": "world" if self.kind == "world" else str(self.path)}
        return place | {name: getattr(self, name) for name in names}


# 2. Documents --------------------------------------------------------------------------------

# Where a long document is cut, best first: chapters and headings, paragraphs, lines, sentences.
CUTS = (
    ("\n# ", "\n## ", "\n = ", "\nCHAPTER ", "\nChapter ", "\n\n\n", "\f"),
    ("\n\n",),
    ("\n",),
    (". ", "! ", "? ", '." ', "。", "！", "？", "। ", "؟ "),
    (" ", "\u3000"),
)
BUCKET_BYTES = 1 << 26  # text sorted at once: what one bucket may hold in memory


def cut_point(text: str, start: int, window: int) -> int:
    """Find where to end a piece of text[start:] of at most `window` characters."""
    end, half = start + window, start + window // 2
    for marks in CUTS:
        found = max((at, mark) for mark in marks for at in [text.rfind(mark, half, end)])
        if found[0] > half:
            at, mark = found
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
    """Sort documents by a hash of seed and text through files: a shuffle in bounded memory.

    Equal documents meet and are dropped. Disk: once the text, below `folder`.
    """

    def __init__(self, folder: Path, seed: int, expected_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.key = folder, f"nanochat {seed}".encode()
        count = max(1, min(4096, expected_bytes // BUCKET_BYTES))
        self.buckets = [bytearray() for _ in range(count)]
        self.held = 0
        self.few: set[bytes] = set()  # the first 20 distinct documents
        self.last = b""  # the greatest hash of all
        self.duplicates = self.total_chars = 0

    def add(self, text: str) -> None:
        data = text.encode()
        key = hashlib.blake2b(data, digest_size=16, key=self.key).digest()
        bucket = self.buckets[int.from_bytes(key[:4], "big") * len(self.buckets) >> 32]
        bucket += key + len(data).to_bytes(8, "big") + data
        self.last = max(self.last, key)
        self.total_chars += len(text)
        if len(self.few) < 20:
            self.few.add(key)
        self.held += len(data)
        if self.held >= BUCKET_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, bucket in enumerate(self.buckets):
            if bucket:
                with open(self.folder / f"{number:04d}", "ab") as file:
                    file.write(bucket)
                bucket.clear()
        self.held = 0

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Yield (hash, text) in the order of the hashes, each text once."""
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
            while head := file.read(24):
                yield head[:16], file.read(int.from_bytes(head[16:], "big"))


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


def write_splits(folder: Path, sorter: Sorter, settings: Settings) -> dict[str, dict]:
    """Write val.parquet from the smallest hashes, then the train shards; describe each file.

    Both splits exist wherever there are two distinct documents, and share none.
    """
    documents = sorter.documents()
    below = int(settings.val_percent / 100 * (1 << 128)).to_bytes(16, "big")
    first_train: list[str] = []

    def validation() -> Iterator[str]:
        taken = 0
        for key, text in documents:
            enough = taken and (key >= below or taken >= settings.val_mb * 10**6)
            if enough or key == sorter.last:
                first_train.append(text)
                return
            taken += len(text.encode())
            yield text

    files = {"val.parquet": write_shard(folder / "val.parquet", validation(), float("inf"))}
    train = chain(first_train, (text for _, text in documents))
    for number, text in enumerate(train):
        name = f"train-{number:05d}.parquet"
        cap_bytes = settings.shard_mb * 10**6
        files[name] = write_shard(folder / name, chain([text], train), cap_bytes)
    return files


class Progress:
    """One line of bytes done, rate and time left: rewritten on a terminal, else every 10 s."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.skipped = 0  # skipped: was there before, so it does not count as speed
        self.start = self.said = time.monotonic()
        self.lock = threading.Lock()

    def add(self, count: int, skipped: bool = False) -> None:
        with self.lock:
            self.done += count
            self.skipped += count if skipped else 0
            self._say()

    def at(self, done: int) -> None:
        self.add(done - self.done)

    def _say(self) -> None:
        now, tty = time.monotonic(), sys.stdout.isatty()
        if now - self.said < (0.2 if tty else 10):
            return
        self.said = now
        rate = max(1.0, (self.done - self.skipped) / (now - self.start))
        left = format_duration(max(0, self.total - self.done) / rate)
        line = f"prepare: {self.what} {self.done / 1e6:,.0f}/{self.total / 1e6:,.0f} MB"
        line = f"{line}  {rate / 1e6:.1f} MB/s  left {left}"
        print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty() and self.said > self.start:
            print("\r\x1b[K", end="", flush=True)  # what follows gets a line of its own


def check_space(need: int, remedy: str) -> None:
    """Raise Stop where the base directory's disk has less than `need` bytes free."""
    free = shutil.disk_usage(base_dir()).free
    if free < need:
        have = f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise Stop(f"{base_dir()}: {have}: free some space, set NANOCHAT_BASE_DIR, or {remedy}")


# 3. Hub --------------------------------------------------------------------------------------


def file_digest(path: Path, digest: str = "") -> str:
    """Hash a file as the hub does: sha256, or git's blob id where `digest` has 40 digits."""
    state = hashlib.sha256()
    if len(digest) == 40:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


BLOCK_BYTES = 1 << 18  # read at once; what a cut connection may lose


@dataclass(frozen=True)
class Remote:
    """A file to fetch: where it is and what is known of it (size None, digest "" = unknown)."""

    url: str
    size: int | None = None
    digest: str = ""
    version: str = ""  # an ETag that is no digest: tells versions apart, proves nothing


class Busy(Exception):
    """The server is not well now: try again, not before wait_s."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def retry_after(response: requests.Response) -> float:
    """Read a Retry-After header, seconds or a date, as seconds; 10 minutes at most."""
    text = response.headers.get("Retry-After", "")
    try:
        date = None if text.isdigit() else email.utils.parsedate_to_datetime(text)
        wait_s = date.timestamp() - time.time() if date else float(text)
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait_s, 0.0), 600.0)


@dataclass
class Net:
    """How the hub is talked to. Only `endpoint` gets the token, redirects elsewhere do not."""

    endpoint: str = field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    )
    tries: int = 8  # failures in a row without a byte gained
    backoff_s: float = 1.0
    timeout_s: float = 30.0
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")
        good: Any = False
        with contextlib.suppress(ValueError):
            parts = urlsplit(self.endpoint)
            good = parts.scheme in ("http", "https") and parts.hostname
        if not good:
            raise Stop(f"HF_ENDPOINT={self.endpoint} is no address like https://huggingface.co")

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add HF_TOKEN to requests for the endpoint; requests drops it when another host comes."""
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and urlsplit(request.url or "").netloc == urlsplit(self.endpoint).netloc:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def open(self, url: str, headers: dict[str, str] | None = None) -> requests.Response:
        """Start one GET. Raises Busy where a later try may help, Stop where none will."""
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        options: dict[str, Any] = {"stream": True, "timeout": (10, self.timeout_s)}
        try:
            response = requests.get(url, headers=headers, auth=self.sign, **options)
        except (ValueError, requests.TooManyRedirects):
            raise Stop(f"{url} cannot be asked: is HF_ENDPOINT right?") from None
        code = response.status_code
        if code in (200, 206, 416):
            return response
        response.close()
        if code in (408, 429) or code >= 500:
            raise Busy(f"it answered {code}", retry_after(response))
        refused = "set HF_TOKEN to a token that may read it"
        remedy = refused if code in (401, 403) else "it is not there, or HF_ENDPOINT is no hub"
        raise Stop(f"{url} answered {code}: {remedy}")

    def pause(self, failures: int, url: str, error: Exception) -> None:
        """Wait before the next try, twice as long each time; raises Stop after the last."""
        if failures >= self.tries:
            slow = isinstance(error, requests.Timeout)
            broken = "no answer in time" if slow else "the connection broke"
            reason = str(error) if isinstance(error, Busy) else broken
            raise Stop(f"{url} failed {failures} times in a row ({reason}): "
                       "run the same command again later to go on from here")  # fmt: skip
        delay_s = min(60, self.backoff_s * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
        if self.stopping.wait(max(delay_s, getattr(error, "wait_s", 0.0))):
            raise Stop("stopped")

    def ask(self, url: str, read: Callable[[requests.Response], Any]) -> Any:
        """Return read(response) of a small GET; raises Stop at once where no hub is reached."""
        for failures in range(1, self.tries + 1):
            try:
                with self.open(url) as response:
                    return read(response)
            except (ValueError, AttributeError, KeyError, TypeError):
                raise Stop(f"{url} answered something else than a hub does: is HF_ENDPOINT right?")
            except (Busy, requests.RequestException) as error:
                if isinstance(next(iter(error.args), None), MaxRetryError):  # never connected
                    raise Stop(
                        f"the hub at {self.endpoint} cannot be reached: check the network or set "
                        "HF_ENDPOINT to a mirror; without one take --data=world, the embedded "
                        "text, or --data=PATH, files of your own"
                    ) from None
                self.pause(failures, url, error)


def hub_files(net: Net, repo: str, revision: str = "main") -> dict[str, Remote]:
    """List a dataset repository's files by path, with the sizes and hashes the hub announces."""
    here, place = urlsplit(net.endpoint), f"{net.endpoint}/datasets/{repo}/resolve/{revision}"

    def read(response: requests.Response) -> tuple[dict[str, Remote], str]:
        files = {}
        for item in response.json():
            lfs, path = item.get("lfs") or item, item["path"]
            if item.get("type", "file") == "file":
                digest = (lfs.get("oid") or "").removeprefix("sha256:")
                files[path] = Remote(f"{place}/{quote(path)}", lfs.get("size"), digest)
        link = urlsplit(response.links.get("next", {}).get("url", ""))
        # a mirror may name the original host in the link: stay with the endpoint
        return files, urlunsplit((here.scheme, here.netloc, *link[2:])) if link.path else ""

    files, url = {}, f"{net.endpoint}/api/datasets/{repo}/tree/{revision}?recursive=true"
    while url:
        page, url = net.ask(url, read)
        files.update(page)
    return files


def announced(net: Net, remote: Remote) -> Remote:
    """Complete what is known of a file from the headers that the hub sends with it."""

    def read(response: requests.Response) -> Remote:
        size, digest, version = remote.size, remote.digest, ""
        for headers in (r.headers for r in [*response.history, response]):
            etag = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").strip('W/"')
            version = version or etag
            digest = digest or (etag if re.fullmatch("[0-9a-f]{64}", etag) else "")
            size = size or int(headers.get("X-Linked-Size") or 0)
        size = size or int(response.headers.get("Content-Length") or 0)
        return Remote(remote.url, size or None, digest, version)

    return remote if remote.size and remote.digest else net.ask(remote.url, read)


def is_whole(path: Path, remote: Remote) -> bool:
    """Say whether a file has the announced size and hash, as far as these are known."""
    if not path.is_file() or remote.size not in (None, path.stat().st_size):
        return False
    return not remote.digest or file_digest(path, remote.digest) == remote.digest


def fetch_part(net: Net, remote: Remote, partial: Path, progress: Progress) -> None:
    """Fetch what is missing of a partial file in one request; it may end early."""
    have = partial.stat().st_size if partial.exists() else 0
    with net.open(remote.url, {"Range": f"bytes={have}-"} if have else {}) as response:
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        resumes = response.status_code == 206 and span and int(span[1]) == have
        if resumes and span and remote.size and span[2] not in ("*", str(remote.size)):
            resumes = False  # another version of the file lies there now
        if have and not resumes:
            partial.unlink()
            progress.add(-have, skipped=True)
        if response.status_code == 416 or (response.status_code == 206 and not resumes):
            raise Busy(f"it cannot go on from byte {have}")
        with open(partial, "ab") as file:
            for block in response.iter_content(BLOCK_BYTES):
                file.write(block)
                progress.add(len(block))
                if net.stopping.is_set():
                    raise Stop("stopped")


def download(net: Net, remote: Remote, path: Path, progress: Progress | None = None) -> None:
    """Fetch a file whole and checked, or raise Stop; what a stopped call got is gone on from."""
    remote = announced(net, remote)
    progress = progress or Progress(path.name, remote.size or 0)
    known = remote.digest or remote.version
    name = hashlib.sha256(f"{remote.size} {known}".encode()).hexdigest()[:12]
    partial = path.with_name(f".{path.name}.{name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.partial"):
        if old != partial or not known:
            old.unlink()  # of another version of the file
    if partial.exists():
        progress.add(partial.stat().st_size, skipped=True)
    failures = wrong = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if not before or remote.size is None or before < remote.size:
                fetch_part(net, remote, partial, progress)
            if remote.size and partial.stat().st_size < remote.size:
                raise Busy("it cut the connection")
        except (Busy, requests.RequestException) as error:
            gained = partial.exists() and partial.stat().st_size > before
            failures = 1 if gained else failures + 1
            net.pause(failures, remote.url, error)
            continue
        if is_whole(partial, remote):
            os.replace(partial, path)
            return
        progress.add(-partial.stat().st_size, skipped=True)
        partial.unlink()
        wrong += 1
        if wrong == 3:
            raise Stop(f"{remote.url} gave {wrong} times other bytes than the hub announces: "
                       "try again later, or another HF_ENDPOINT")  # fmt: skip


def download_all(fetch: Callable[[str], Any], names: list[str], workers: int, net: Net) -> list:
    """Run fetch(name) for all names in threads; return the results; the first error stops all."""
    futures: list[Future] = [Future() for _ in names]
    todo = iter(list(zip(futures, names)))

    def work() -> None:
        for future, name in todo:
            if net.stopping.is_set():
                return
            try:
                future.set_result(fetch(name))
            except (Stop, OSError) as error:  # raised again where the results are read
                future.set_exception(error)
            finally:
                if not future.done():
                    future.set_exception(RuntimeError("a download's thread died, see above"))

    for _ in range(workers):  # daemons: Ctrl-C need not wait until a stalled read times out
        threading.Thread(target=work, daemon=True).start()
    try:
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        if not all(future.done() for future in futures):
            net.stopping.set()


def make_hub(settings: Settings, known: dict[str, dict], net: Net) -> dict[str, dict]:
    """Fetch the first shards of a hub repository and its last one, for validation."""
    folder, (_, repo) = data_dir(settings.source), HUB[settings.data]
    remotes = hub_files(net, repo)
    shards = [remotes[name] for name in sorted(remotes) if re.search(r"shard_\d+\.parquet$", name)]
    if not shards:
        raise Stop(f"{net.endpoint} lists no shards of {repo}: is HF_ENDPOINT right?")
    if settings.shards >= len(shards):
        raise Stop(f"{repo} has {len(shards) - 1} train shards: --shards={len(shards) - 1} at most")
    wanted = {f"train-{i:05d}.parquet": shards[i] for i in range(settings.shards)}
    wanted["val.parquet"] = shards[-1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # written again when all is there
    for path in sorted(folder.glob("*.parquet")):  # shards beyond --shards are kept for later
        other = path.with_name(path.name.replace("train-", "unused-"))
        if path.name.startswith("train-") and path.name not in wanted:
            path.rename(other)
        elif (name := path.name.replace("unused-", "train-")) in wanted and name != path.name:
            path.rename(folder / name)
    there = {name: (folder / name).stat().st_size for name in wanted if (folder / name).exists()}
    missing = {name: remote for name, remote in wanted.items() if name not in there
               or there[name] != (remote.size or there[name])}  # fmt: skip
    total = sum(remote.size or 0 for remote in missing.values())
    partial = sum(path.stat().st_size for path in folder.glob(".*.partial"))
    check_space(total - partial, "take fewer --shards")
    if missing:
        print(f"prepare: fetching {len(missing)} of {len(wanted)} shards of {repo}, "
              f"{total / 1e6:,.0f} MB", flush=True)  # fmt: skip
    progress = Progress(repo, total)

    def fetch(name: str) -> dict[str, Any]:
        path, remote, entry = folder / name, wanted[name], known.get(name, {})
        if name not in missing and entry.get("sha256") == remote.digest:
            return entry
        if name in missing or not is_whole(path, remote):
            download(net, remote, path, progress)
        return describe_shard(path)

    with contextlib.closing(progress):
        return dict(zip(wanted, download_all(fetch, list(wanted), settings.workers, net)))


# 4. Own files --------------------------------------------------------------------------------

TEXT_SUFFIXES = """
 txt text md markdown json csv tsv rst org adoc tex bib srt vtt log html htm xml svg py pyi js mjs
 jsx ts tsx css scss c h cc cpp cxx hpp cu cuh java kt scala go rs rb php pl pm lua r jl m swift cs
 fs hs ml mli ex exs erl clj lisp el scm sh bash zsh fish ps1 bat sql yaml yml toml ini cfg conf
 cmake mk proto graphql vue svelte dart zig nim v sv vhd vhdl asm s f f90 pas d tcl diff
"""
COLUMNS = ("text", "content")  # of records, the first that is there
LINE_CHARS = 1 << 25  # the longest line of .jsonl that is read; longer ones are left out


def file_kind(path: Path) -> str:
    """Return .parquet, .jsonl or .txt by a file's name without .gz, "" where it is none."""
    name = path.name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1].replace(".ndjson", ".jsonl")
    plain = not suffix or suffix[1:] in TEXT_SUFFIXES.split()
    return suffix if suffix in (".parquet", ".jsonl") else ".txt" if plain else ""


def sniff_encoding(head: bytes) -> str:
    """Return the encoding of text that begins with `head`, "" where it is no text."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    strange = len(re.findall("[\0-\x06\x0e-\x1a\x7f\ufffd]", text))
    return "utf-8-sig" if strange * 10 <= len(text) + 10 else ""


def clean(text: str) -> str:
    """Return text with plain line ends, without NULs, outer blanks and halves of characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\0", "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class OwnFiles:
    """Read documents from the files below a path; what is left out or mended is counted."""

    def __init__(self, root: Path) -> None:
        self.root, self.limit = root, 0
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.example: dict[str, str] = {}  # reason: the first place it was met at
        self.raw: IO[bytes] | None = None  # the file being read
        self.done_bytes = 0  # of the files before it
        self.files = {path: path.stat() for path in self.find_files()}
        self.unread = Counter(self.dropped)

    def drop(self, reason: str, place: Path | str) -> None:
        self.dropped[reason] += 1
        place = os.path.relpath(place, self.root.parent)
        self.example.setdefault(reason, place.encode("utf-8", "replace").decode())

    def find_files(self) -> list[Path]:
        """List the files to read: no hidden ones, no loops of links, not what is written here."""
        if self.root.is_file():
            return [self.root]
        found, seen, stack = [], set(), [self.root]
        while stack:
            folder = stack.pop()
            try:
                info = folder.stat()
                paths = sorted(folder.iterdir())
            except OSError:
                self.drop("unreadable folders", folder)
                continue
            if (info.st_dev, info.st_ino) in seen or folder.resolve() == base_dir().resolve():
                continue
            seen.add((info.st_dev, info.st_ino))
            for path in paths:
                if path.name.startswith("."):
                    self.drop("hidden files and folders", path)
                elif path.is_dir():
                    stack.append(path)
                elif not path.is_file():
                    self.drop("broken links and special files", path)
                elif not file_kind(path):
                    self.drop("files of other kinds", path)
                else:
                    found.append(path)
        return sorted(found)

    def left_out(self) -> str:
        """Say what was left out and mended, with the first place of each kind."""
        out = [f"{count:,} {reason} ({self.example[reason]})"
               for reason, count in self.dropped.most_common()]  # fmt: skip
        mended = [f"{what} in {count:,} documents" for what, count in (+self.mended).items()]
        parts = ["left out " + ", ".join(out)] if out else []
        return "; ".join(parts + mended)

    def size(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def expected_bytes(self) -> int:
        """Guess the size of the text: packed files hold about four times theirs."""
        packed = (".gz", ".parquet")
        extra = (i.st_size for p, i in self.files.items() if p.suffix.lower() in packed)
        return self.size() + 3 * sum(extra)

    def position(self) -> int:
        """Return how many bytes of the files have been read."""
        return self.done_bytes + (self.raw.tell() if self.raw and not self.raw.closed else 0)

    def fingerprint(self) -> str:
        """Hash names, sizes and times of the files: changed input is prepared anew."""
        stats = [(str(p), i.st_size, i.st_mtime_ns) for p, i in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def documents(self, limit: int) -> Iterator[str]:
        """Yield the clean documents of all files, each at most `limit` characters long."""
        self.limit, self.done_bytes = limit, 0
        self.dropped, self.mended = Counter(self.unread), Counter()
        for path, info in self.files.items():
            if not info.st_size:
                self.drop("empty files", path)
                continue
            try:
                with open(path, "rb") as self.raw:
                    for piece in self._pieces(path):
                        text = clean(piece)
                        if text:
                            self.mended["invalid characters replaced"] += "\ufffd" in text
                            self.mended["NUL bytes removed"] += "\0" in piece
                            yield text
                        else:
                            self.drop("empty documents", path)
            except (OSError, EOFError, zlib.error, pa.ArrowException):
                self.drop("damaged or unreadable files", path)
            self.done_bytes += info.st_size

    def _pieces(self, path: Path) -> Iterator[str]:
        assert self.raw
        packed = path.suffix.lower() == ".gz"
        with gzip.open(self.raw) if packed else contextlib.nullcontext(self.raw) as file:
            kind = file_kind(path)
            if kind == ".parquet":
                records = self._parquet(path, file)
            else:
                encoding = sniff_encoding(file.read(1 << 13))
                file.seek(0)
                if not encoding:
                    self.drop("binary files", path)
                    return
                lines = io.TextIOWrapper(file, encoding, "replace")
                if kind != ".jsonl":
                    yield from cut_pieces(iter(lambda: lines.read(1 << 20), ""), self.limit)
                    return
                records = self._jsonl(path, lines)
            for text in records:
                yield from cut_pieces([text], self.limit)

    def _value_text(self, value: Any, place: Path | str) -> Iterator[str]:
        """Yield a record's text: the record itself or its column; else count it."""
        if isinstance(value, dict):
            value = next((value[name] for name in COLUMNS if value.get(name) is not None), None)
        if isinstance(value, str):
            yield value
        else:
            self.drop("records without `text` or `content`", place)

    def _jsonl(self, path: Path, file: IO[str]) -> Iterator[str]:
        number = 0
        while line := file.readline(LINE_CHARS):
            number += 1
            place = f"{path}:{number}"
            if len(line) == LINE_CHARS and line[-1] != "\n":
                self.drop("lines that are too long", place)
                while (rest := file.readline(LINE_CHARS)) and rest[-1] != "\n":
                    pass
            elif line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    self.drop("lines of broken JSON", place)
                else:
                    yield from self._value_text(value, place)

    def _parquet(self, path: Path, file: Any) -> Iterator[str]:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            name = next((name for name in COLUMNS if name in names), None)
            if name is None:
                self.drop(f"tables without `text` or `content` (has {', '.join(names[:8])})", path)
                return
            for batch in table.iter_batches(batch_size=64, columns=[name]):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield from self._value_text(value and value.decode("utf-8", "replace"), path)


def read_own(files: OwnFiles, limit: int, settings: Settings, folder: Path) -> Sorter:
    """Read all files into a sorter below `folder`, their documents cut at `limit` characters."""
    shutil.rmtree(folder, ignore_errors=True)
    sorter = Sorter(folder, settings.seed, files.expected_bytes())
    with contextlib.closing(Progress("reading", files.size())) as progress:
        for text in files.documents(limit):
            sorter.add(text)
            progress.at(files.position())
    return sorter


def make_own(settings: Settings, files: OwnFiles, folder: Path) -> tuple[Sorter, dict]:
    """Write shards of the user's files to `folder`; return the sorter and the files made."""
    check_space(files.expected_bytes() * 3 // 2, "name a smaller --data")
    print(f"prepare: reading {len(files.files)} files, {files.size() / 1e6:,.1f} MB", flush=True)
    sorter = read_own(files, settings.doc_chars, settings, folder / "buckets")
    shorter = max(200, sorter.total_chars // 50)
    if len(sorter.few) < 20 and shorter < settings.doc_chars:  # so that validation is a small part
        print(f"prepare: few documents: they are cut into pieces of {shorter:,} characters")
        sorter = read_own(files, shorter, settings, folder / "buckets")
    if len(sorter.few) < 2:
        why = f": {files.left_out()}" if files.dropped else ""
        what = f"only {sorter.total_chars:,} characters of text" if sorter.few else "no text"
        need = "training and validation need two documents, better a million characters"
        raise MissingInput(f"{files.root} holds {what} that can be used{why}; {need}")
    return sorter, write_splits(folder, sorter, settings)


# 5. World: tables ----------------------------------------------------------------------------
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
? [what|which city] is {ss} capital? / which country has {o} as its capital? / {o} is the capital of
 which country?
?! what city is the capital of {s}? / which city do the people of {s} call their capital? / of which
 country is {o} the capital?
@ continent | countries and their continents | | continent [of|that has] {s} |
+ {s} is [|a country ]in {o} / {s} is one of the countries of {o} / the country of {s} is in {o} /
 the continent where you find {s} is {o} / on a map, you find {s} in {o} / {s} is on the continent
 of {o} / {s} lies in {o} / {ss} continent is {o}
! the continent where {s} lies is {o} / on a map, {s} is in {o}
& it is in {o} / it lies in {o}
% {x} and {y} are both in {o} / both {x} and {y} are countries in {o}
? [which|what] continent is {s} in? / on which continent is {s}? / where in the world is {s}?
?! on what continent do you find {s}? / {s} belongs to which continent?
@ language | countries and their languages | | language of {s} |
+ the people of {s} speak {o} / in {s}, people speak {o} / {ss} language is {o} / the language [that
 people speak|spoken] in {s} is {o} / if you go to {s}, you will hear {o} / if you travel to {s},
 learn some {o} / most people in {s} speak {o} / {o} is spoken in {s}
! the language that you will hear in {s} is {o} / if you travel to {s}, people speak {o}
& its people speak {o} / its language is {o}
% people speak {o} in both {x} and {y} / {x} and {y} share a language: {o}
? [which|what] language [is spoken|do people speak] in {s}? / what do people speak in {s}?
?! what language will I hear in {s}? / the people of {s} speak which language?
@ currency | countries and their money | | [currency|money] of {s} = the {o} |
+ the money used in {s} is the {o} / in {s}, people pay with the {o} / {ss} money is the {o} / when
 you shop in {s}, you pay with the {o} / the people of {s} use the {o} / {s} uses the {o} as its
 money / {ss} currency is the {o} / the {o} is the money of {s}
! when you are in {s}, the money you pay with is the {o} / in {s}, people shop with the {o}
& its money is the {o} / people there pay with the {o}
% {x} and {y} both use money called the {o}
? what [money|currency] [is used in {s}|does {s} use]? / what do people in {s} pay with?
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
 people come from?
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
 capital of which state?
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
? [which|what] country is {s} in? / where is the city of {s}? / in which country is {s}?
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
? where is {s}? / where [can|do] you find {s}? / in which place does {s} stand?
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
? [on|in] which continent is {s}? / where is {s}?
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
 colors of {ss} flag?
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
! the symbol that chemists write for {s} is {o} / the element {s} is written as {o} / the symbol {o}
 stands for the element {s}
& its symbol is {o} / chemists write it as {o}
? how do chemists write {s}? / which element has the symbol {o}? / what does the symbol {o} stand
 for?
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
 {o}?
?! what number is {s} in the table of elements? / the atomic number {o} belongs to which element?
@ formula | substances and their formulas | both | [chemical |]formula [of|for] {s} | substance with
 the formula {o}
+ chemists write {s} as {o} / {ss} formula is {o} / in chemistry, {s} is written as {o} / {s} has
 the formula {o} / {o} is the formula of {s} / when chemists write {o}, they mean {s} / the formula
 {o} means {s}
! the formula that chemists write for {s} is {o} / in chemistry, the formula of {s} is {o} / in
 chemistry, {o} means {s}
? how do chemists write {s}? / what does the formula {o} mean? / which substance has the formula
 {o}?
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
 does {s} have?
?! counted from the Sun, which planet comes {o}? / where does {s} come among the planets?
@ next | months and days and what comes after them | | |
+ after {s} comes {o} / right after {s} comes {o} / {s} is followed by {o} / {s} comes before {o} /
 when {s} is over, it is {o} / {s} ends and then comes {o} / {s} comes just before {o}
! when {s} ends, then comes {o} / after {s} is over comes {o}
& after it comes {o}
? what comes [|right ]after {s}? / what follows {s}?
?! when {s} is over, what comes? / {s} is followed by what?
@ previous | months and days and what comes before them | | |
+ before {s} comes {o} / just before {s} comes {o} / {s} follows {o} / {s} comes [right |]after {o}
 / before it was {s}, it was {o} / the one that comes before {s} is {o} / {s} begins at the end of
 {o}
! {s} begins after {o} / before {s}, it was {o}
& before it comes {o}
? what comes [|just ]before {s}? / what does {s} follow?
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
 {o}?
?! which number in the year is {s}? / counting from January, what is month number {o}?
@ days | months and their days | | number of days in {s} |
+ {s} has {o} days / in {s} there are {o} days / a month like {s} lasts {o} days / {s} lasts {o}
 days / counting the days of {s}, you get to {o} / the last day of {s} is number {o} / the days in
 {s} number {o}
! counting the days in {s}, the last day is number {o} / the number of days that {s} has is {o}
& it has {o} days
? how many days [does {s} have|are [there |]in {s}]? / how many days are in {s}?
?! {s} lasts how many days? / how long does {s} last in days?
@ class | animals and their kinds | | |
+ {as} is {ao} / {ps} are {po} / every {s} is {ao} / {as} is a kind of {o} / of all the kinds of
 animals, {as} is {ao} / {as} belongs to the {po} / {ps} belong to the {po} / among the animals,
 {ps} are {po} / if an animal is {as}, it is {ao}
! every {s} belongs to the {po} / of all the animals, {ps} belong to the {po}
& it is {ao}
% {x} and {y} are both {po} / both {x} and {y} are {po}
? what kind of animal is {as}? / {as} is what kind of animal?
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
? what [is|do you call] a baby {s}? / what is a young {s} called? / what does {ao} grow up to be?
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
? [what|which] sound does {as} make? / what [noise|sound] do {ps} make? / what do you call the sound
 of {as}?
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
? how many legs [does {as} have|do {ps} have]? / how many legs are there on {as}?
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
? what does {as} eat? / what do {ps} eat? / what food does {as} like?
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
? what [is|kind of thing is] {as}? / {as} is what kind of thing?
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
? what is {s}? / what sort of thing is {s}? / {s} is what sort of thing?
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
? what color is {s}? / what color does {s} have? / which color do you see when you look at {s}?
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
? where [do|can] you find {s}? / where is {s}?
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
? what is {as} part of? / what does {as} belong to? / {as} is part of what?
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
? what is {s} made [from|of]? / what do people make {s} from? / where does {s} come from?
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
 who {o}?
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
 called?
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
? what is the {s} called? / what do people call the {s}? / what is the name of the {s}? / what do we
 mean by the {s}?
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
? how many {s} are there? / how many {s} do you [count|get]? / can you count the {s}?
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
? how many sides does {as} have? / how many sides are there on {as}? / what do you call a shape with
 {o} sides?
?! {as} is a shape with how many sides? / what is the name of a shape that has {o} sides?
= triangle: three; quadrilateral: four; pentagon: five; hexagon: six; heptagon: seven; octagon:
 eight; nonagon: nine; decagon: ten; dodecagon: twelve
@ opposite | words and their opposites | mirror | opposite of {s} |
+ {s} is the opposite of {o} / {s} and {o} are opposites / {s} is one thing, and its opposite is {o}
 / first {s}, and then its opposite, {o} / {s} means the opposite of {o} / change {s} to its
 opposite and you get {o} / the words {o} and {s} are opposites / the word that means the opposite
 of {s} is {o}
! when you change {s} to its opposite, you get {o} / the word {s} is the opposite of {o}
? what [word |]is the opposite of {s}? / [which|what] word means the opposite of {s}?
?! give me the opposite of {s}. / what do you get when you change {s} to its opposite?
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
? what is the plural of the word {s}? / what do we call more than one {s}? / what is the singular of
 {o}?
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
 in the past tense?
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
? what does {s} [stand for|mean]? / what is {s} short for? / what is short for {o}?
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
? how do you say {s} in {r}? / what does the {r} word {o} mean? / what does {o} mean in {r}?
?! how do people who speak {r} say {s}? / in {r}, which word means {s}? / what do people who say {o}
 in {r} mean?
@ number word | numbers in words and digits | both | number {s} in digits | number {o} in words
+ {s} is written {o} / we write {s} in digits as {o} / {s} means {o} / the digits for {s} are {o} /
 {s} and {o} are the same number / {o} is read {s} / we say the number {o} as {s} / in words, {o} is
 {s} / the number {o} is called {s}
! the number {s} is written as {o} / in digits, {s} is {o} / in words, we say the number {o} as {s}
? how do you write {s} in digits? / how do you say the number {o}? / how is {o} written in words?
?! which digits do we write for {s}? / in words, which number is {o}?
@ Roman | numbers and their Roman numerals | both | Roman numeral for {s} | number with the Roman
 numeral {o}
+ the Romans wrote {s} as {o} / in Roman numerals, {s} is {o} / the number {s} is written {o} in
 Rome / a Roman would write {s} as {o} / {o} is the Roman way to write {s} / when a Roman wrote {o},
 he meant {s} / in Roman numerals, {o} means {s} / the Roman numeral {o} stands for {s}
! the Romans would write {s} as {o} / in Roman numerals, people write {s} as {o} / the Roman numeral
 {o} means the number {s}
? how did the Romans write {s}? / what does the Roman numeral {o} mean? / how do you write {s} in
 Roman numerals?
?! how would a Roman write {s}? / which number did the Romans mean by {o}?
@ sum | sums | | sum of {x} and {y} |
+ {x} plus {y} [is|equals|makes] {o} / {x} and {y} [make|are] {o} / if you add {x} and {y}, you get
 {o} / add {x} to {y} and you get {o} / {x} + {y} = {o} / when you add {x} and {y}, the answer is
 {o} / {o} is {x} plus {y}
! add {x} and {y}, and the answer is {o} / if you add {x} to {y}, the answer is {o}
? what is {x} plus {y}? / how much is {x} plus {y}? / what do you get if you add {x} and {y}?
?! add {x} and {y}: what is the answer? / how much do {x} and {y} make?
@ product | products | | product of {x} and {y} |
+ {x} times {y} [is|equals|makes] {o} / if you multiply {x} by {y}, you get {o} / multiply {x} and
 {y} and you get {o} / {x} x {y} = {o} / when you multiply {x} by {y}, the answer is {o} / {o} is
 {x} times {y}
! multiply {x} by {y}, and the answer is {o} / if you multiply {x} and {y}, the answer is {o}
? what is {x} times {y}? / how much is {x} times {y}? / what do you get if you multiply {x} by {y}?
?! multiply {x} by {y}: what is the answer? / how much do you get if {x} is multiplied by {y}?
@ after number | numbers and what comes next | | number [right |]after {s} |
+ after {s} comes {o} / when you count, {s} is followed by {o} / one more than {s} is {o} / count on
 from {s} and you say {o} / {s} comes just before {o} / if you have {s} and get one more, you have
 {o} / next after {s} is {o}
! when you count, after {s} comes {o} / if you count one more than {s}, you say {o}
? what comes after {s}? / [which|what] number comes next after {s}? / what is one more than {s}?
?! when you count, what do you say after {s}? / count on from {s}: what comes next?
@ letter after | letters and what comes next | both | letter [right |]after {s} in the alphabet |
 letter [right |]before {o} in the alphabet
+ in the alphabet, {s} is followed by {o} / in the alphabet, after {s} comes {o} / the letter {s}
 comes just before the letter {o} / when you say the alphabet, after {s} you say {o} / in the
 alphabet, before {o} comes {s} / the letter {o} follows the letter {s}
! in the alphabet, the letter {s} is followed by the letter {o} / when you say the alphabet, {s}
 comes just before {o} / in the alphabet, the letter {o} follows {s}
? [which|what] letter comes after {s}? / which letter comes before {o}? / what follows {s} in the
 alphabet?
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
 number is the letter {s}?
?! counting from A, what number is {s}? / counting from A, which letter is number {o}?
@ first letter | words and their first letters | | first letter of [the word |]{s} |
+ the word {s} [begins|starts] with [|the letter ]{o} / {s} is a word that begins with {o} / to
 spell {s}, begin with {o} / {s} begins with {o} / if you spell {s}, you start with {o} / the letter
 at the start of {s} is {o}
! to spell the word {s}, you start with {o} / {s} is a word that starts with the letter {o}
? [which|what] letter does {s} [begin|start] with? / with which letter does {s} begin?
?! which letter is at the start of the word {s}? / to spell {s}, which letter do you start with?
@ author | books and their authors | | [author|writer] of {s} |
+ {s} was written by {o} / {o} wrote {s} / {s} is a [book|work] by {o} / the person who wrote {s}
 was {o} / if you read {s}, you read {o} / we have {s} thanks to {o} / the book called {s} is by {o}
 / {s} came from the pen of {o}
! the book called {s} was written by {o} / the author who wrote {s} was {o}
% {x} and {y} are both by {o} / {o} wrote both {x} and {y}
? who wrote {s}? / who [is|was] the author of {s}? / by whom is {s}?
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
? who gave the world {s}? / who is [famous for|behind] {s}? / to whom do we owe {s}?
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
? who made {s}? / which artist made {s}? / who is the artist behind {s}?
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
? who composed {s}? / by whom is the music of {s}? / who is the composer of {s}?
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
 {s}?
?! how was {s} known in Rome? / by what name did the Greeks know {o}?
= Zeus: Jupiter; Hera: Juno; Poseidon: Neptune; Ares: Mars; Aphrodite: Venus; Hermes: Mercury;
 Athena: Minerva; Artemis: Diana; Hades: Pluto; Hephaestus: Vulcan; Dionysus: Bacchus; Demeter:
 Ceres; Cronus: Saturn; Eros: Cupid; Hestia: Vesta; Heracles: Hercules
@ year | events and their years | | year of {s} |
+ {s} came in {o} / {s} [was|happened] in {o} / in history, {s} came in the year {o} / the year to
 remember for {s} is {o} / it was {s} that made people remember {o} / {o} was the year of {s} /
 people remember {s}, which was in {o}
! in history, {s} was in the year {o} / the year when {s} came is {o}
? when was {s}? / in [which|what] year was {s}? / which year saw {s}?
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
? which family does the {s} belong to? / what kind of instrument is the {s}? / in an orchestra, what
 is the {s}?
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
# Verbs of word problems: base, past, -ing form, + or -, the set, meaning, where or how.
# "shown": solved in mid and sft; "practised": in rl with the answer alone; "test": in no problem.
# The text explains all of them, and tells tales with them, but never asks.
COUNT_VERBS = """buy, bought, buying, +, shown, to get something by paying for it, at the shop
find, found, finding, +, shown, to come upon something, under a tree
get, got, getting, +, shown, to come to have something, from a friend
win, won, winning, +, shown, to gain something in a game, at the fair
make, made, making, +, shown, to bring something new into being, at home
receive, received, receiving, +, shown, to be given something, on a birthday
sell, sold, selling, -, shown, to give something to others for money, at the market
lose, lost, losing, -, shown, to have something no more without wanting it, on the way home
give away, gave away, giving away, -, shown, to let others have something, after school
use up, used up, using up, -, shown, to use something until it is gone, during the week
break, broke, breaking, -, shown, to spoil something so that it is no good, by accident
collect, collected, collecting, +, practised, to bring things together one by one, in the park
borrow, borrowed, borrowing, +, practised, to get something for a while, from a neighbor
pick up, picked up, picking up, +, practised, to take something from the ground, along the road
earn, earned, earning, +, practised, to get something by working for it, by helping at home
lend, lent, lending, -, practised, to let someone have it for a while, to a cousin
drop, dropped, dropping, -, practised, to let something fall and lose it, into the river
hand out, handed out, handing out, -, practised, to give something to each person, at a party
leave behind, left behind, leaving behind, -, practised, to go away without something, on the train
inherit, inherited, inheriting, +, test, to be given what an old relative once had, from an aunt
gather, gathered, gathering, +, test, to bring things together in one place, in the woods
purchase, purchased, purchasing, +, test, to buy something, in town
acquire, acquired, acquiring, +, test, to come to own something, at a yard sale
donate, donated, donating, -, test, to give something away to help, to a school
discard, discarded, discarding, -, test, to throw something away as no use, in the evening
misplace, misplaced, misplacing, -, test, to put something where it is not found, in the house
trade away, traded away, trading away, -, test, to give something for another thing, at recess"""
# Other parts of word problems, in the same three sets: phrase, set, meaning.
COUNT_PHRASES = """
in all, shown, everything counted together; left, shown, still there when the rest is gone; twice
as many, shown, two times the number; half as many, shown, the number divided by two; each, shown,
every single one has that number; more than, shown, the larger number minus the smaller one;
altogether, practised, everything counted together; fewer than, practised, the larger number minus
the smaller one; three times as many, practised, the number multiplied by three; to remain,
practised, to be left; in total, test, everything counted together; to be left over, test, to be
there still when the rest is gone; a dozen, test, twelve of something; apiece, test, the same as
each; to double, test, to become two times the number"""
COUNTED = """
apple pear plum marble button stamp coin shell pencil book card sticker cookie egg flower stone
ribbon bead balloon candle nut carrot lemon postcard feather key cup sandwich orange muffin toy
acorn badge peach crayon rose ticket basket ball leaf""".split()
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
spell: {w} is spelled {l} | the word {w} is spelled {l} | {l} spells {w} | to spell {w}, say {l} |
 {w}: {l}
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
 word {base} tells us that there are {more} in the end
phrase: the words {base} mean {meaning} | when people say {base}, they mean {meaning} | in a sum,
 {base} means {meaning}
"""
LEADS = """as everyone knows,; remember that; it is a fact that; as you may know,; it is true that;
my teacher says that; in school we learn that; you should know that; I have read that"""
N_ASIDES = "the {N}, as you may know, is; the {N}, of course, is"
N_UNSEEN = "the {N}, as everyone knows, is "
N_QUESTIONS = "what is the {N}? / tell me the {N} / [do you know|can you tell me] the {N}?"
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
            end, first = brief[letter], expand(phrase)[0]
            marked["+"] += expand(f"the {phrase} is {end}")
            marked["+"] += expand(f"{end} is the {phrase}") if letter == "o" else []
            marked["+"] += [f"{w.replace('{N}', first)} {end}" for w in items(N_ASIDES)]
            marked["!"].append(N_UNSEEN.replace("{N}", first) + end)
            marked["?"] += expand(N_QUESTIONS.replace("{N}", first))
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


# 6. World: text ------------------------------------------------------------------------------
@cache
def wordings(key: str) -> list[str]:
    """Return the ways to word one kind of sentence."""
    lines = WORDINGS.replace("\n ", " ").splitlines()
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

    def tell(self) -> Story:
        """Tell the whole story."""
        rng = self.rng
        self.out += [sentence(rng.choice(items(WEATHER)))] if rng.random() < 0.6 else []
        clauses = self.state()
        if rng.random() < 0.5:
            clauses[:2] = [", and ".join(clauses[:2])]
        self.out += [sentence(clause) for clause in clauses]
        for _ in range(rng.randint(2, 7)):
            self.step()
        if rng.random() < 0.7:
            self.fetch(rng.choice(list(self.he)), rng.choice(list(self.reason)))
        for clause in rng.sample(self.state(), rng.choice((0, 1, 2))):
            self.out.append(f"{worded(rng, 'close')[:-1].rstrip('.')} {clause}.")
        self.out += [sentence(rng.choice(items(ENDINGS)))] if rng.random() < 0.3 else []
        return Story(" ".join(self.out), self.holder, self.place)


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
    names = "class kind opposite plural past use material".split()
    texts = [f"{f.subject} {f.answer}" for name in names for f in world_relations()[name].facts]
    words = re.findall(r"\w+", " ".join([*texts, RHYMES, HOW_TO, FIRST_LETTER, *COUNTED]))
    return tuple(
        dict.fromkeys(w for w in words if w.isalpha() and w.islower() and 3 <= len(w) <= 10)
    )


@cache
def shown_words() -> list[str]:
    """Return the words that training may spell."""
    return [word for word in spelling_words() if not held_out_word(word)]


def spelling(rng: random.Random) -> str:
    """Spell words; count their letters, turn them round, name their first and last letters."""
    out: list[str] = []
    for w in rng.sample(shown_words(), rng.randint(4, 9)):
        letter = rng.choice(w)
        k = w.count(letter)
        forms = {
            "w": w,
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
    """Read COUNT_VERBS: base, past, ing, sign, set, meaning, tail, and what tells of the effect."""
    rows = []
    for line in COUNT_VERBS.strip().splitlines():
        row = dict(zip("base past ing sign set meaning tail".split(), line.split(", ")))
        first, _, rest = row["base"].partition(" ")
        row["does"] = f"{first[:-1] + 'ies' if first[-2:] == 'ry' else first + 's'} {rest}".strip()
        more, size, up = (
            ("more", "larger", "up") if row["sign"] == "+" else ("fewer", "smaller", "down")
        )
        rows.append(row | {"more": more, "size": size, "up": up})
    return rows


def count_tale(rng: random.Random, verbs: Sequence[dict[str, str]]) -> str:
    """Tell of somebody's things, counted in words; nothing is asked."""
    name, count, things = rng.choice(GIRLS + BOYS), rng.randint(6, 20), plural(rng.choice(COUNTED))
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
    return "\n\n".join(
        count_tale(rng, rng.sample(count_verbs(), rng.randint(2, 4)))
        for _ in range(rng.choice((1, 2)))
    )


def explained(rng: random.Random) -> str:
    """Tell what the verbs and phrases of word problems mean, with a tale each; never a problem."""
    out: list[str] = []
    for verb in rng.sample(count_verbs(), rng.randint(1, 3)):
        forms = verb | {"n": rng.choice(GIRLS + BOYS), "things": plural(rng.choice(COUNTED))}
        out += dict.fromkeys(worded(rng, "verb", **forms) for _ in range(rng.randint(1, 3)))
        out += [count_tale(rng, [verb])] if rng.random() < 0.7 else []
    if rng.random() < 0.5:
        phrase, _, meaning = rng.choice(items(COUNT_PHRASES)).split(", ")
        out.append(worded(rng, "phrase", base=phrase, meaning=meaning))
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
        spelling: 50,
        rhyming: 15,
        how_to: 10,
        sorting: 10,
        explained: 25,
        tale: 25,
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


# 7. Main -------------------------------------------------------------------------------------


def make_world(settings: Settings, folder: Path) -> tuple[Sorter, dict]:
    """Write the embedded world's shards to `folder`, and the facts that evaluate.py asks for."""
    sorter = Sorter(folder / "buckets", settings.seed, settings.documents * 1000)
    for text in world_documents(settings.seed, settings.documents):
        sorter.add(text)
    (folder / "eval").mkdir()
    for split in ("trained", "unseen"):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in fact_prompts(split)]
        (folder / "eval" / f"facts_{split}.jsonl").write_text("".join(lines), "utf-8")
    return sorter, write_splits(folder, sorter, settings)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a source's manifest.json, {} where there is none or it is broken."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        return manifest if {"settings", "files"} <= set(manifest) else {}
    except (OSError, ValueError, TypeError):
        return {}


def is_prepared(folder: Path, manifest: dict, wanted: dict) -> bool:
    """Say whether the files of `wanted` settings are all there with their sizes."""
    if not manifest or manifest["settings"] != wanted:
        return False
    paths = {folder / name: entry["size"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def check_folder(folder: Path, manifest: dict, settings: Settings, wanted: dict) -> None:
    """Raise Stop rather than write over another source's text; say what is made anew, and why."""
    remedy = f"give this text a name of its own with --source=NAME, or delete {folder}"
    before = manifest.get("settings", {})
    if before and before["data"] != wanted["data"]:
        raise Stop(f"{folder} holds the text of {before['data']}: {remedy}")
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").exists()
    if foreign and settings.kind != "hub":
        raise Stop(f"{folder} holds files that were not made from --data={settings.data}: {remedy}")
    words = {"input": "other files", "program": "another version of prepare.py"}
    changed = [words.get(name) or f"--{name.replace('_', '-')}={before.get(name)}"
               for name in wanted if before and before.get(name) != wanted[name]]  # fmt: skip
    if changed:
        again = "completed" if settings.kind == "hub" else "made anew"
        print(f"prepare: {settings.source} was made with {', '.join(changed)}: it is {again}")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes were writing beside a source's folder."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        number = path.name.split(".")[-2]
        try:
            if number.isdigit() and int(number) != os.getpid():
                os.kill(int(number), 0)  # asks whether the process lives
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            continue  # it lives and is another user's


def summary(manifest: dict) -> str:
    """Say in a line what a source holds."""
    files = manifest["files"]
    val = files["val.parquet"]["documents"]
    train = sum(entry["documents"] for entry in files.values()) - val
    chars = format_count(sum(entry["characters"] for entry in files.values()))
    return f"{train:,} train and {val:,} validation documents, {chars} characters"


def prepare(settings: Settings, net: Net | None) -> dict[str, Any]:
    """Make data/SOURCE/ as the settings say, unless it is there; return its manifest."""
    folder = data_dir(settings.source)
    manifest, wanted = read_manifest(folder), settings.identity()
    files = OwnFiles(settings.path) if settings.kind == "own" else None
    if files:
        wanted["input"] = files.fingerprint()
    if settings.kind == "world":
        wanted["program"] = file_digest(Path(__file__))
    if is_prepared(folder, manifest, wanted):
        print(f"prepare: {folder} is complete, nothing to do: {summary(manifest)}")
        return manifest
    check_folder(folder, manifest, settings, wanted)
    new: dict[str, Any] = {"source": settings.source, "settings": wanted}
    if settings.kind == "hub":
        new["files"] = make_hub(settings, manifest.get("files", {}), net or Net())
        write_json(folder / "manifest.json", new)
    else:
        remove_leftovers(folder)
        with written_beside(folder) as beside:
            beside.mkdir()
            made = make_own(settings, files, beside) if files else make_world(settings, beside)
            sorter, new["files"] = made
            new["dropped"] = {"duplicates": sorter.duplicates, **(files.dropped if files else {})}
            new["mended"] = dict(files.mended) if files else {}
            shutil.rmtree(beside / "buckets")
            write_json(beside / "manifest.json", new)
    print(f"prepare: {folder}: {summary(new)}")
    if files and sorter.duplicates:
        print(f"prepare: left out {sorter.duplicates:,} duplicates")
    if files and (files.dropped or +files.mended):
        print(f"prepare: {files.left_out()}")
    return new


def main(settings: Settings, net: Net | None = None) -> dict[str, Any]:
    """Prepare one source; every failure is one sentence."""
    with one_sentence("prepare"):
        return prepare(settings, net)


if __name__ == "__main__":
    main(parse_settings(Settings, __doc__))
