"""A vocabulary with further pieces, for scripts that it spells in bytes.

Old ids keep their meaning, and a text without the characters of `SCRIPTS` gives the same ids as before, by how the new
pieces are made:

- Byte-level BPE: new merges stand behind all old ones, so a word is first merged as it was; a new piece begins with two
  bytes that only a character of `SCRIPTS` has, so elsewhere no new merge finds its pair.
- Byte-pair pieces of sentencepiece: the same, with characters instead of bytes, and scores below the lowest.
- Unigram pieces: no new piece matches anywhere in such a text, so its best segmentation is the one it was. The penalty
  of the unknown follows the lowest score, which new pieces therefore never go below.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lm_jax.data.tokenizers import model_file
from lm_jax.data.tokenizers.huggingface import ALPHABET, HuggingFace
from lm_jax.data.tokenizers.sentencepiece import SPACE, SentencePiece, train_model
from lm_jax.data.tokenizers.tiktoken import ENCODINGS, Tiktoken, read_ranks, write_ranks
from lm_jax.data.tokenizers.tokenizer import Tokenizer
from lm_jax.errors import UserError

# First and last code points of what new pieces are made of: scripts other than Latin, with their punctuation, but no
# sign that English has too (dashes, quotation marks, arrows, emoji, joiners). Blocks of 64, which is what the first two
# bytes of a character tell apart; beyond U+FFFF of 4,096.
SCRIPTS = (
    *((0x0370, 0x1CFF), (0x1F00, 0x1FFF), (0x2E80, 0xA4FF), (0xA800, 0xAAFF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF)),
    *((0xFB40, 0xFDFF), (0xFE40, 0xFEBF), (0xFF00, 0xFFBF), (0x20000, 0x3FFFF)),
)
_RUN = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in SCRIPTS) + "]+")
_BYTES = {byte: character for character, byte in ALPHABET.items()}
_LEAST = 2  # how often a piece must occur to be learnt

Advance = Callable[[int], None]


class Extended(NamedTuple):
    """A tokenizer with more ids.

    Attributes:
      tokenizer: the new one; its further ids begin where the old one's end.
      spelt: for each of them, the old ids that spelt it.
    """

    tokenizer: Tokenizer
    spelt: list[list[int]]


def extend(tokenizer: Tokenizer, texts: Sequence[str], add: int, advance: Advance) -> Extended:
    """A tokenizer with up to `add` further pieces, learnt from the parts of some texts that are in `SCRIPTS`.

    Args:
      tokenizer: sentencepiece, byte-level BPE of Hugging Face's, or tiktoken's.
      texts: what to learn from.
      add: how many ids at most.
      advance: told how many more of them are there.

    Raises:
      UserError: where the tokenizer is of another kind, or the texts have nothing to learn.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(_RUN.findall(text))
    if not counts:
        raise UserError(
            "--source: its text has no character of a script other than Latin's\n"
            "train a new tokenizer instead: pieces that English has too would change how English is spelt"
        )
    if tokenizer.boundary is not None and not getattr(tokenizer, "names_boundary", True):
        raise UserError(
            "--tokenizer: its boundary is no token of its own, but the id behind its last, where pieces would stand\n"
            "extend one that has an end-of-text token"
        )
    if isinstance(tokenizer, HuggingFace) and tokenizer.exact:
        found = _extend_huggingface(tokenizer, counts, add, advance)
    elif isinstance(tokenizer, Tiktoken):
        found = _extend_tiktoken(tokenizer, counts, add, advance)
    elif isinstance(tokenizer, SentencePiece):
        found = _extend_sentencepiece(tokenizer, counts, add, advance)
    else:
        raise UserError(
            f"--tokenizer: one of kind {tokenizer.kind!r} cannot be extended\n"
            "give byte-level BPE (a tokenizer.json or tiktoken's) or a sentencepiece .model"
        )
    if not found.spelt:
        raise UserError("--source: it has no piece that the tokenizer does not have\ngive more text")
    return found


# ------------------------------------------------------------------------------------------------------ byte-level BPE


def begins_in_scripts(piece: bytes) -> bool:
    """Whether the first two bytes of a piece are of a character in `SCRIPTS`."""
    if len(piece) < 2 or piece[0] < 0xC2 or not 0x80 <= piece[1] < 0xC0:
        return False
    if piece[0] < 0xE0:
        lowest = (piece[0] & 0x1F) << 6 | piece[1] & 0x3F
    elif piece[0] < 0xF0:
        lowest = (piece[0] & 0x0F) << 12 | (piece[1] & 0x3F) << 6
    else:
        lowest = (piece[0] & 0x07) << 18 | (piece[1] & 0x3F) << 12
    return any(first <= lowest <= last for first, last in SCRIPTS)


def learn_merges(
    words: Mapping[tuple[int, ...], int], pieces: Mapping[int, bytes], first: int, add: int, advance: Advance
) -> list[tuple[int, int]]:
    """Byte-pair encoding that goes on where the old merges end (Sennrich et al. 2016).

    Args:
      words: old ids of each distinct word, and how often it occurs.
      pieces: bytes of the old ids.
      first: the id of the first new piece.
      add: how many merges at most.
      advance: told of each.

    Returns:
      The two ids that each new piece is made of, commonest first; of equally common ones the lowest ids.
    """
    spellings, counts = [list(word) for word in words], list(words.values())
    known, taken = dict(pieces), set(pieces.values())
    often: collections.Counter[tuple[int, int]] = collections.Counter()
    where: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for n, spelling in enumerate(spellings):
        for pair in itertools.pairwise(spelling):
            often[pair] += counts[n]
            where[pair].add(n)

    def fits(pair: tuple[int, int]) -> bool:
        joined = known[pair[0]] + known[pair[1]]
        return joined not in taken and begins_in_scripts(joined)

    heap = [(-n, pair) for pair, n in often.items() if n >= _LEAST and fits(pair)]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < add:
        n, pair = heapq.heappop(heap)
        if often[pair] != -n or not fits(pair):
            if often[pair] >= _LEAST and fits(pair):
                heapq.heappush(heap, (-often[pair], pair))
            continue
        new = first + len(merges)
        merges.append(pair)
        known[new] = known[pair[0]] + known[pair[1]]
        taken.add(known[new])
        touched: set[tuple[int, int]] = set()
        for at in where.pop(pair):
            word = spellings[at]
            spellings[at], gone, come = _merged(word, pair, new)
            for i in gone:
                often[word[i], word[i + 1]] -= counts[at]
            for i in come:
                fresh = spellings[at][i], spellings[at][i + 1]
                often[fresh] += counts[at]
                where[fresh].add(at)
                touched.add(fresh)
        for fresh in touched:
            if often[fresh] >= _LEAST and fits(fresh):
                heapq.heappush(heap, (-often[fresh], fresh))
        advance(1)
    return merges


def _merged(word: list[int], pair: tuple[int, int], new: int) -> tuple[list[int], list[int], list[int]]:
    """The word with the pair merged; where pairs begin that are gone from the old word, and come in the new one."""
    out: list[int] = []
    gone: set[int] = set()
    come: set[int] = set()
    i = 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            gone |= {i - 1, i, i + 1}
            come |= {len(out) - 1, len(out)}
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out, [i for i in gone if 0 <= i < len(word) - 1], [i for i in come if 0 <= i < len(out) - 1]


def _words(
    tokenizer: Tokenizer, cut: Callable[[str], Iterable[str]], runs: Mapping[str, int]
) -> dict[tuple[int, ...], int]:
    """Old ids of the words that runs of `SCRIPTS` are cut into, and how often they occur."""
    counts: collections.Counter[str] = collections.Counter()
    for run, n in sorted(runs.items()):
        for word in cut(run):
            counts[word] += n
    names = sorted(counts)
    words: collections.Counter[tuple[int, ...]] = collections.Counter()
    for name, ids in zip(names, tokenizer.encode_batch(names), strict=True):
        words[tuple(ids.tolist())] += counts[name]
    return dict(words)


def _spelt(merges: Sequence[tuple[int, int]], first: int) -> list[list[int]]:
    """The old ids that spell each new piece."""
    found: list[list[int]] = []
    for pair in merges:
        found.append([i for part in pair for i in (found[part - first] if part >= first else [part])])
    return found


def _extend_huggingface(tokenizer: HuggingFace, runs: Mapping[str, int], add: int, advance: Advance) -> Extended:
    values = json.loads(tokenizer.content)
    vocab, first = values["model"]["vocab"], tokenizer.vocab_size
    cutter = tokenizer.library.pre_tokenizer

    def cut(run: str) -> Iterator[str]:
        for piece, _ in cutter.pre_tokenize_str(run):
            yield bytes(ALPHABET[c] for c in piece).decode("utf-8")

    pieces = {i: tokenizer.bytes_for(i) for i in range(first)}
    merges = learn_merges(_words(tokenizer, cut, runs), pieces, first, add, advance)
    # Added tokens stand in the vocabulary as well from now on: the library counts what is in it to find their ids.
    vocab |= {token["content"]: token["id"] for token in values["added_tokens"]}
    names = {i: "".join(_BYTES[b] for b in piece) for i, piece in pieces.items()}
    listed = values["model"]["merges"]
    for i, pair in enumerate(merges, start=first):
        names[i] = names[pair[0]] + names[pair[1]]
        vocab[names[i]] = i
        # Files of old versions write a merge as one string.
        listed.append(
            " ".join(names[p] for p in pair) if listed and isinstance(listed[0], str) else [names[p] for p in pair]
        )
    made = HuggingFace(json.dumps(values, ensure_ascii=False).encode("utf-8"), tokenizer.boundary is not None)
    return Extended(made, _spelt(merges, first))


def _extend_tiktoken(tokenizer: Tiktoken, runs: Mapping[str, int], add: int, advance: Advance) -> Extended:
    import regex  # what tiktoken itself cuts text with where it is not compiled

    table, first = read_ranks(tokenizer.ranks), tokenizer.vocab_size
    known = ENCODINGS.get(tokenizer.pattern)
    cut = regex.compile(known.pattern if known else tokenizer.pattern).findall
    pieces = {i: piece for piece, i in table.items()}
    merges = learn_merges(_words(tokenizer, cut, runs), pieces, first, add, advance)
    for i, (a, b) in enumerate(merges, start=first):
        pieces[i] = pieces[a] + pieces[b]
        table[pieces[i]] = i
    made = Tiktoken(write_ranks(table), tokenizer.pattern, tokenizer.special, tokenizer.boundary is not None)
    return Extended(made, _spelt(merges, first))


# ------------------------------------------------------------------------------------------------------- sentencepiece


def _extend_sentencepiece(tokenizer: SentencePiece, runs: Mapping[str, int], add: int, advance: Advance) -> Extended:
    kind = model_file.model_type(tokenizer.model)
    if kind not in (model_file.BPE, model_file.UNIGRAM):
        raise UserError(
            "--tokenizer: a sentencepiece model of words or characters cannot be extended\ngive bpe or unigram"
        )
    old = model_file.pieces(tokenizer.model)
    there = {piece.text for piece in old}
    lowest = min(piece.score for piece in old if piece.type == model_file.NORMAL)
    texts = [run for run, n in sorted(runs.items()) for _ in range(n)]
    name = "bpe" if kind == model_file.BPE else "unigram"
    learnt = model_file.pieces(train_model(texts, add + 2, name, byte_fallback=False, eos_id=-1))
    fresh = [p for p in learnt if p.type == model_file.NORMAL and p.text not in there and _RUN.fullmatch(p.text)][:add]
    if kind == model_file.BPE:
        added = [p._replace(score=lowest - 1 - n) for n, p in enumerate(fresh)]
    else:
        added = [p._replace(score=max(p.score, lowest)) for p in fresh]
    model = model_file.with_pieces(tokenizer.model, added)
    made = SentencePiece(model, tokenizer.boundary is not None, exact_parts=True)
    advance(len(added))
    return Extended(made, [_ids(tokenizer, piece.text) for piece in added])


def _ids(tokenizer: SentencePiece, text: str) -> list[int]:
    """The ids of a text, without the space that a model may put in front."""
    ids = tokenizer.encode(text).tolist()
    return ids[1:] if tokenizer.processor.id_to_piece(ids[0]) == SPACE else ids
