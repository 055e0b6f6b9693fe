//! Byte-level BPE training: text goes in, merges come out.
//!
//! Python:
//! ```python
//! import nanochat_bpe
//! merges = nanochat_bpe.train(documents, vocab_size=32768)   # [(left id, right id), ...]
//! tokens = nanochat_bpe.token_bytes(merges)   # ids 0..255 are the bytes, 256 + i is merges[i]
//! ranks = {token: id for id, token in enumerate(tokens)}   # for tiktoken.Encoding, along with
//! pattern = nanochat_bpe.PATTERN                           # the pattern that text is split by
//! ```
//!
//! 1. Count words. The calling thread pulls documents and fills batches of about a megabyte. Worker
//!    threads split them by `PATTERN` and count the pieces ("words"), each in tables of its own.
//!    Words of up to 15 bytes, nearly all, are packed into an integer. Time is linear in the text,
//!    memory in the distinct words.
//! 2. Merge pairs. The distinct words stand in one array, and each pair of adjacent tokens has a
//!    list of its positions. All occurrences of a pair arise at once, when the later of its two
//!    tokens is made; from then on their number can only fall. So a count in the queue is never too
//!    low, and only the pair at the top is recounted: if its count holds it wins, otherwise it
//!    returns to the queue with the right count. No other count is updated and no pair is looked
//!    up. Each merge of two tokens removes one, so time is nearly linear in the bytes of the words.
//!
//! Ties: of pairs with equal counts the one with the smallest (left id, right id) wins. The result
//! depends on the documents alone, not on their order, the machine or the number of threads.
//! Overlapping occurrences all count ("aaa" holds two of "aa"), and are merged from the left.
//! Nothing is merged across documents. If the text runs out of pairs, fewer merges are returned.
//! No two tokens have the same bytes.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::mpsc::sync_channel;
use std::sync::{LazyLock, Mutex};

use regex_syntax::hir::{Class as RegexClass, HirKind};
use rustc_hash::FxHashMap;

/// The split pattern, for `tiktoken`; [`Splitter`] implements it by hand.
pub const PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

const AUTO_THREADS: usize = 8; // one thread of Python cannot feed more
const BATCH_BYTES: usize = 1 << 20;

// 1. Types ----------------------------------------------------------------------------------------

/// The argument that is wrong, and how.
#[derive(Debug, PartialEq)]
pub enum Error {
    VocabSize(String),
    Threads(String),
    Texts(String),
    Text(String),
    Merges(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (argument, problem) = match self {
            Error::VocabSize(problem) => ("vocab_size", problem),
            Error::Threads(problem) => ("threads", problem),
            Error::Texts(problem) => ("texts", problem),
            Error::Text(problem) => ("text", problem),
            Error::Merges(problem) => ("merges", problem),
        };
        write!(f, "{argument} {problem}")
    }
}

/// A merge: the ids of the two tokens that are joined.
pub type Pair = (u32, u32);

/// Documents on their way to a worker.
#[derive(Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>, // of the documents in `text`
}

impl Batch {
    pub fn is_full(&self) -> bool {
        self.text.len() + self.ends.len() >= BATCH_BYTES // many empty documents fill it too
    }

    /// Take a document, or the beginning of a very long one up to a place where any text is split;
    /// return its bytes.
    pub fn push(&mut self, document: &str) -> usize {
        let taken = SPLITTER.boundary(document, BATCH_BYTES);
        self.text.push_str(&document[..taken]);
        self.ends.push(self.text.len());
        taken
    }
}

// 2. Splitting ------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq)]
enum Class {
    Letter,  // \p{L}
    Number,  // \p{N}
    Newline, // \r \n
    Space,   // the rest of \s
    Other,
    End, // of the text
}

/// Splits text as [`PATTERN`] does.
///
/// The classes come from the tables of `regex-syntax`, which tiktoken's engine also uses.
pub struct Splitter {
    classes: Vec<Class>, // by code point
}

pub static SPLITTER: LazyLock<Splitter> = LazyLock::new(Splitter::new);

impl Splitter {
    fn new() -> Self {
        let mut classes = vec![Class::Other; char::MAX as usize + 1];
        for (pattern, class) in [
            (r"\s", Class::Space),
            (r"[\r\n]", Class::Newline),
            (r"\p{L}", Class::Letter),
            (r"\p{N}", Class::Number),
        ] {
            let parsed = regex_syntax::parse(pattern).map(|hir| hir.into_kind());
            if let Ok(HirKind::Class(RegexClass::Unicode(ranges))) = parsed {
                for range in ranges.iter() {
                    classes[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
        }
        Splitter { classes }
    }

    /// The class of the character at `at`, and where the next one begins.
    #[inline(always)]
    fn class(&self, text: &str, at: usize) -> (Class, usize) {
        match text.as_bytes().get(at) {
            Some(byte) if byte.is_ascii() => (self.classes[usize::from(*byte)], at + 1),
            Some(_) => self.wide_class(text, at),
            None => (Class::End, at),
        }
    }

    #[inline(never)]
    fn wide_class(&self, text: &str, at: usize) -> (Class, usize) {
        let wide = text[at..].chars().next().unwrap_or_default();
        (self.classes[wide as usize], at + wide.len_utf8())
    }

    /// The end of the run of `class` that begins at `at`.
    #[inline(always)]
    fn run(&self, text: &str, mut at: usize, class: Class) -> usize {
        loop {
            let (found, next) = self.class(text, at);
            if found != class {
                return at;
            }
            at = next;
        }
    }

    /// The end of the piece that begins at `start`, which must lie inside `text`.
    #[inline(always)]
    fn piece_end(&self, text: &str, start: usize) -> usize {
        let rest = &text.as_bytes()[start..];
        let (first, next) = self.class(text, start);
        if first == Class::Letter {
            return self.run(text, next, Class::Letter);
        }
        let (second, end) = self.class(text, next);
        match (first, second) {
            (Class::Number, Class::Number) => end,
            (Class::Number, _) => next,
            (Class::Newline, _) => self.whitespace(text, start),
            _ if rest[0] == b'\'' && contraction(rest) > 0 => start + contraction(rest),
            (_, Class::Letter) => self.run(text, end, Class::Letter),
            (Class::Space, Class::Other) if rest[0] == b' ' => self.symbols(text, end),
            (Class::Space, _) => self.whitespace(text, start),
            _ => self.symbols(text, next),
        }
    }

    /// The rest of ` ?[^\s\p{L}\p{N}]++[\r\n]*`.
    fn symbols(&self, text: &str, at: usize) -> usize {
        self.run(text, self.run(text, at, Class::Other), Class::Newline)
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: to the last newline of the run if it has one, else all of it at
    /// the end of the text, else all but its last character, if that leaves any.
    fn whitespace(&self, text: &str, start: usize) -> usize {
        let (mut last, mut at, mut newline) = (start, start, None);
        loop {
            let (class, next) = self.class(text, at);
            match class {
                Class::Newline => newline = Some(next),
                Class::Space => {}
                _ => {
                    let whole = class == Class::End || last == start;
                    return newline.unwrap_or(if whole { at } else { last });
                }
            }
            (last, at) = (at, next);
        }
    }

    /// The pieces of `text`, in order; together they are all of it.
    #[inline(always)]
    pub fn pieces<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        let mut end = 0;
        std::iter::from_fn(move || {
            let start = end;
            if start == text.len() {
                return None;
            }
            end = self.piece_end(text, start);
            Some(&text[start..end])
        })
    }

    /// The first place from `from` on where every text is split: after a letter that ends a word.
    fn boundary(&self, text: &str, from: usize) -> usize {
        let mut at = (from..text.len())
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(text.len());
        loop {
            let (class, next) = self.class(text, at);
            let in_word = class == Class::Letter && self.class(text, next).0 == Class::Letter;
            if class == Class::End || class == Class::Letter && !in_word {
                return next;
            }
            at = next;
        }
    }
}

/// The length of `'(?i:[sdmt]|ll|ve|re)` at the start of `text`, else 0.
fn contraction(text: &[u8]) -> usize {
    match text.get(1..) {
        Some([b's' | b'S' | b'd' | b'D' | b'm' | b'M' | b't' | b'T', ..]) => 2,
        Some([b'l' | b'L', b'l' | b'L', ..]) => 3,
        Some([b'v' | b'V' | b'r' | b'R', b'e' | b'E', ..]) => 3,
        Some([0xC5, 0xBF, ..]) => 3, // U+017F, the long s: an s where case is ignored
        _ => 0,
    }
}

// 3. Counting words -------------------------------------------------------------------------------

const PACKED: usize = 15; // bytes; the sixteenth holds the length

/// How often each distinct word occurs.
#[derive(Default)]
pub struct Words {
    short: FxHashMap<u128, u64>,
    long: FxHashMap<Box<[u8]>, u64>,
}

impl Words {
    pub fn add_text(&mut self, text: &str) {
        let mut start = 0;
        for piece in SPLITTER.pieces(text) {
            let sixteen = text.as_bytes().get(start..start + 16);
            match sixteen.map(TryInto::try_into) {
                Some(Ok(bytes)) if piece.len() <= PACKED => self.add_short(bytes, piece.len(), 1),
                _ => self.add(piece.as_bytes(), 1), // long, or at the end of the text
            }
            start += piece.len();
        }
    }

    /// Count the word of `length` bytes that `bytes` begins with.
    #[inline(always)]
    fn add_short(&mut self, bytes: [u8; 16], length: usize, count: u64) {
        let word = u128::from_le_bytes(bytes) & ((1 << (8 * length)) - 1);
        let key = word | (length as u128) << (8 * PACKED);
        *self.short.entry(key).or_default() += count;
    }

    fn add(&mut self, word: &[u8], count: u64) {
        if word.len() <= PACKED {
            let mut bytes = [0; 16];
            bytes[..word.len()].copy_from_slice(word);
            self.add_short(bytes, word.len(), count);
        } else if let Some(known) = self.long.get_mut(word) {
            *known += count;
        } else {
            self.long.insert(word.into(), count);
        }
    }

    fn plus(mut self, other: Words) -> Words {
        other.for_each(|word, count| self.add(word, count));
        self
    }

    fn for_each(self, mut f: impl FnMut(&[u8], u64)) {
        for (key, count) in self.short {
            let bytes = key.to_le_bytes();
            f(&bytes[..usize::from(bytes[PACKED])], count);
        }
        for (word, count) in self.long {
            f(&word, count);
        }
    }
}

/// Count the words of all documents on `threads` workers; 0: one a core, `AUTO_THREADS` at most.
///
/// `fill` runs on the calling thread, puts documents into a batch until it is full, and returns
/// false when there are no more; its error ends the counting and is returned.
pub fn count_words<E>(
    mut threads: usize,
    mut fill: impl FnMut(&mut Batch) -> Result<bool, E>,
) -> Result<Words, E> {
    if threads == 0 {
        threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(AUTO_THREADS));
    }
    let (sender, receiver) = sync_channel::<Batch>(threads + 1);
    let receiver = Mutex::new(receiver);
    let next_batch = || receiver.lock().ok().and_then(|queue| queue.recv().ok());
    let work = || {
        let mut words = Words::default();
        while let Some(batch) = next_batch() {
            let mut start = 0;
            for end in batch.ends {
                words.add_text(&batch.text[start..end]);
                start = end;
            }
        }
        words
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut filled = Ok(true);
        while let Ok(true) = filled {
            let mut batch = Batch::default();
            filled = fill(&mut batch);
            if filled.is_ok() && sender.send(batch).is_err() {
                break; // every worker has panicked: the join below raises its panic
            }
        }
        drop(sender);
        let counted = workers.into_iter().map(|worker| match worker.join() {
            Ok(words) => words,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        let words = counted.reduce(Words::plus).unwrap_or_default();
        filled.map(|_| words)
    })
}

// 4. Merging pairs --------------------------------------------------------------------------------

const GAP: u32 = u32::MAX; // the slot between two words
const DEAD: u32 = u32::MAX - 1; // the start of a token that is now the right part of another

/// A pair in the queue. The greatest is merged next: highest count, then smallest ids.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    count: u64, // never below the true one
    pair: Reverse<Pair>,
    start: usize, // of its list in `Trainer::positions`
    length: usize,
}

/// The distinct words lie in `slots`, one slot for each byte. A token's id stands in the first and
/// the last slot that it covers, so its neighbours are found from the lengths of tokens alone.
struct Trainer {
    slots: Vec<u32>,
    word_of: Vec<u32>, // by slot
    counts: Vec<u64>,  // by word
    queue: BinaryHeap<Candidate>,
    positions: Vec<u32>, // the lists of all candidates, each ascending
    lengths: Vec<usize>, // in bytes, by id
}

impl Trainer {
    fn new(words: Words) -> Result<Self, Error> {
        let (mut slots, mut word_of, mut counts) = (vec![GAP], Vec::new(), Vec::new());
        words.for_each(|word, count| {
            slots.extend(word.iter().map(|byte| u32::from(*byte)));
            slots.push(GAP);
            word_of.resize(slots.len(), counts.len() as u32);
            counts.push(count);
        });
        if slots.len() > DEAD as usize {
            return Err(Error::Texts("hold more than 4 GB of distinct words".into()));
        }
        let mut lists = vec![Vec::new(); 1 << 16];
        for (at, two) in slots.windows(2).enumerate() {
            if two[0] != GAP && two[1] != GAP {
                lists[(two[0] << 8 | two[1]) as usize].push(at as u32);
            }
        }
        let mut trainer = Trainer {
            slots,
            word_of,
            counts,
            queue: BinaryHeap::new(),
            positions: Vec::new(),
            lengths: vec![1; 256],
        };
        for (pair, list) in (0..).zip(lists) {
            trainer.enqueue((pair >> 8, pair & 255), list.into_iter());
        }
        Ok(trainer)
    }

    fn enqueue(&mut self, pair: Pair, list: impl Iterator<Item = u32>) {
        let start = self.positions.len();
        self.positions.extend(list);
        let list = &self.positions[start..];
        self.queue.push(Candidate {
            count: list.iter().map(|at| self.count_at(*at as usize)).sum(),
            pair: Reverse(pair),
            start,
            length: list.len(),
        });
    }

    fn count_at(&self, slot: usize) -> u64 {
        self.counts[self.word_of[slot] as usize]
    }

    /// Recount the top pair. If its count holds, remove it from the queue and return it.
    fn settle_top(&mut self) -> Option<Candidate> {
        let mut top = self.queue.peek_mut()?;
        let Reverse((left, right)) = top.pair;
        let skip = self.lengths[left as usize];
        let (mut count, mut kept) = (0, top.start);
        for i in top.start..top.start + top.length {
            let at = self.positions[i] as usize;
            if self.slots[at] == left && self.slots[at + skip] == right {
                count += self.counts[self.word_of[at] as usize];
                self.positions[kept] = at as u32;
                kept += 1;
            }
        }
        let holds = count == top.count;
        (top.count, top.length) = (count, kept - top.start);
        holds.then(|| PeekMut::pop(top))
    }

    /// Merge a pair into a new token, and queue the pairs that this makes.
    fn join(&mut self, winner: &Candidate) {
        let Reverse((left, right)) = winner.pair;
        let skip = self.lengths[left as usize];
        let length = skip + self.lengths[right as usize];
        let id = self.lengths.len() as u32;
        self.lengths.push(length);
        let mut sides = [Vec::new(), Vec::new()]; // neighbour before or after, and position
        for i in winner.start..winner.start + winner.length {
            let at = self.positions[i] as usize;
            let (middle, end) = (at + skip, at + length);
            if self.slots[at] != left || self.slots[middle] != right {
                continue; // it overlaps with the occurrence before, which was merged
            }
            self.slots[middle] = DEAD;
            self.slots[at] = id;
            self.slots[end - 1] = id;
            let (before, after) = (self.slots[at - 1], self.slots[end]);
            if before != GAP {
                let start = at - self.lengths[before as usize];
                sides[0].push(u64::from(before) << 32 | start as u64);
            }
            if after != GAP {
                sides[1].push(u64::from(after) << 32 | at as u64);
            }
        }
        for (side, mut list) in sides.into_iter().enumerate() {
            list.sort_unstable();
            for group in list.chunk_by(|one, next| one >> 32 == next >> 32) {
                let other = (group[0] >> 32) as u32;
                let pair = if side == 0 { (other, id) } else { (id, other) };
                self.enqueue(pair, group.iter().map(|entry| *entry as u32));
            }
        }
    }
}

/// Find the merges, in order, for a vocabulary of `vocab_size` tokens, the 256 bytes included.
///
/// `check` is called now and then; its error ends the training and is returned.
pub fn find_merges<E: From<Error>>(
    words: Words,
    vocab_size: usize,
    mut check: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut trainer = Trainer::new(words)?;
    let (mut merges, mut work) = (Vec::new(), 0);
    while merges.len() + 256 < vocab_size {
        let Some(top) = trainer.queue.peek().filter(|top| top.count > 0) else {
            break; // no pair is left
        };
        work += 1 + top.length;
        if work > 1 << 16 {
            check()?;
            work = 0;
        }
        if let Some(winner) = trainer.settle_top() {
            trainer.join(&winner);
            merges.push(winner.pair.0);
        }
    }
    Ok(merges)
}

/// The bytes of every token: first the 256 bytes, then one for each merge.
pub fn token_bytes(merges: &[Pair]) -> Result<Vec<Vec<u8>>, Error> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    for (i, (left, right)) in merges.iter().enumerate() {
        match (tokens.get(*left as usize), tokens.get(*right as usize)) {
            (Some(left), Some(right)) => tokens.push([left.as_slice(), right].concat()),
            _ => return Err(Error::Merges(format!("item {i} joins a later id"))),
        }
    }
    Ok(tokens)
}

// 5. Python ---------------------------------------------------------------------------------------

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod nanochat_bpe {
    use std::time::{Duration, Instant};

    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;
    use pyo3::types::{PyBytes, PyString};

    use super::{Batch, Error, Pair, SPLITTER};

    const MAX_VOCAB_SIZE: usize = 1 << 30; // ids are u32, and the top ones are marks
    const MAX_THREADS: usize = 256;

    #[pymodule_export]
    const PATTERN: &str = super::PATTERN;

    impl From<Error> for PyErr {
        fn from(error: Error) -> PyErr {
            PyValueError::new_err(error.to_string())
        }
    }

    /// An integer within bounds; anything else is an error that names the argument.
    fn integer(
        value: &Bound<'_, PyAny>,
        (low, high): (usize, usize),
        error: fn(String) -> Error,
    ) -> PyResult<usize> {
        let n = value.extract().unwrap_or(usize::MAX);
        if (low..=high).contains(&n) {
            return Ok(n);
        }
        let got = value.repr()?;
        Err(error(format!(
            "must be an integer from {low} to {high}, not {got}"
        ))
        .into())
    }

    /// Replace `text` by the string's text. A value that is no string or not Unicode is an error.
    fn read(
        value: &Bound<'_, PyAny>,
        text: &mut String,
        error: impl Fn(String) -> Error,
    ) -> PyResult<()> {
        let Ok(string) = value.cast::<PyString>() else {
            return Err(error(format!("must be str, not {}", value.get_type().name()?)).into());
        };
        // not `to_str`: that would leave a second copy of the text inside the Python string
        let bytes = string
            .encode_utf8()
            .map_err(|why| error(format!("is not Unicode: {why}")))?;
        let utf8 = std::str::from_utf8(bytes.as_bytes()).map_err(|why| error(why.to_string()))?;
        text.clear();
        text.push_str(utf8);
        Ok(())
    }

    /// Train on an iterable of strings; returns the merges in order, as pairs of ids.
    ///
    /// Ids 0..255 are the bytes, id 256 + i is merge i. Special tokens are not part of vocab_size.
    /// Fewer than vocab_size - 256 merges come back if the text runs out of pairs. threads=0 uses
    /// the machine's, up to 8; the merges do not depend on it. Ctrl-C stops it, without the GIL.
    #[pyfunction]
    #[pyo3(signature = (texts, vocab_size, threads=None))]
    fn train(
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        vocab_size: &Bound<'_, PyAny>,
        threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Pair>> {
        let vocab_size = integer(vocab_size, (256, MAX_VOCAB_SIZE), Error::VocabSize)?;
        let threads = threads.map_or(Ok(0), |n| integer(n, (0, MAX_THREADS), Error::Threads))?;
        if texts.is_instance_of::<PyString>() || !texts.hasattr("__iter__")? {
            let got = texts.get_type().name()?;
            return Err(Error::Texts(format!("must be an iterable of strings, not {got}")).into());
        }
        let iterator = texts.try_iter()?.unbind();
        let (mut document, mut taken, mut number) = (String::new(), 0, 0);
        let mut fill = |py: Python<'_>, batch: &mut Batch| -> PyResult<bool> {
            py.check_signals()?;
            while !batch.is_full() {
                if taken == document.len() {
                    let Some(item) = iterator.bind(py).clone().next() else {
                        return Ok(false);
                    };
                    let error = |why| Error::Texts(format!("item {number} {why}"));
                    read(&item?, &mut document, error)?;
                    (taken, number) = (0, number + 1);
                }
                taken += batch.push(&document[taken..]);
            }
            Ok(true)
        };
        py.detach(|| {
            let fill = |batch: &mut Batch| Python::attach(|py| fill(py, batch));
            let words = super::count_words(threads, fill)?;
            let mut checked = Instant::now();
            super::find_merges(words, vocab_size, || {
                if checked.elapsed() > Duration::from_millis(50) {
                    Python::attach(|py| py.check_signals())?;
                    checked = Instant::now();
                }
                Ok(())
            })
        })
    }

    /// The bytes of every token, by id: 256 single bytes, then one for each merge.
    #[pyfunction]
    fn token_bytes(py: Python<'_>, merges: Vec<Pair>) -> PyResult<Vec<Bound<'_, PyBytes>>> {
        let tokens = super::token_bytes(&merges)?;
        Ok(tokens.iter().map(|token| PyBytes::new(py, token)).collect())
    }

    /// The pieces that training splits a text into, exactly as PATTERN does.
    #[pyfunction]
    fn split(text: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
        let mut string = String::new();
        read(text, &mut string, Error::Text)?;
        Ok(SPLITTER.pieces(&string).map(str::to_owned).collect())
    }
}

// 6. Tests ----------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;

    fn train(texts: &[&str], vocab_size: usize, threads: usize) -> Result<Vec<Pair>, Error> {
        let mut texts = texts.iter();
        let words = count_words(threads, |batch| {
            let text = texts.next(); // a batch for each, so that the workers share them
            Ok(text.map(|text| batch.push(text)).is_some())
        })?;
        find_merges(words, vocab_size, || Ok(()))
    }

    #[test]
    fn splits_by_the_pattern() {
        for pieces in [
            "I|'m| here|,| don|'T|'ſ|tuff| ''|ll|'Re|'l",
            "12|3| |45|٣٣|½",
            "a|  | b| \n\n| | c|\t\r\n|\td|  ",
            " ?!\n\n|(x|)\r| ...<|y|>|\u{a0}é中文|。",
        ] {
            let expected: Vec<_> = pieces.split('|').collect();
            let text = expected.concat();
            assert_eq!(SPLITTER.pieces(&text).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn joins_the_most_frequent_pair_and_of_equals_the_smallest() {
        let overlapping = Ok(vec![(97, 97), (256, 97), (256, 257)]);
        let equal = Ok(vec![(97, 98), (32, 256), (99, 100)]);
        for threads in [0, 1, 3] {
            assert_eq!(train(&["aaaaa"], 300, threads), overlapping);
            assert_eq!(train(&["ab ab", "cd"], 300, threads), equal);
            assert_eq!(train(&["a", "b", ""], 300, threads), Ok(vec![]));
        }
    }

    #[test]
    fn errors_come_out() {
        let error = || Error::Text("is wrong".into());
        assert_eq!(count_words(2, |_| Err(error())).err(), Some(error()));
        assert_eq!(error().to_string(), "text is wrong");
        assert!(token_bytes(&[(97, 98), (256, 257)]).is_err());
        let tokens = token_bytes(&[(97, 98)]);
        assert_eq!(tokens.map(|tokens| tokens[256].clone()), Ok(b"ab".to_vec()));
    }
}
