"""What is held out, what a vocabulary is learnt from, and tokens in = tokens out + tokens dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_jax.data.corpus import Corpus, hold_out, tokenise
from lm_jax.data.sources import Policy, find_files
from lm_jax.data.store import Store
from lm_jax.data.tokenizers import Bytes, Characters, Tokenizer, train_sentencepiece
from lm_jax.errors import UserError
from tests.support.rows import read


def corpus(path: Path, texts: list[str], share: float = 0.1, **policy: Any) -> Corpus:
    (path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return Corpus(find_files(str(path / "x.jsonl")), Policy(**policy), share)


def stored(made: Corpus, tokenizer: Tokenizer, directory: Path) -> Store:
    directory.mkdir()
    tokenise(made, tokenizer, directory)
    return Store(directory)


MANY = [f"document {n} " * (n % 7 + 1) for n in range(2000)]


def test_the_share_is_held_and_stays_when_others_come(tmp_path: Path) -> None:
    made = corpus(tmp_path, MANY)
    held = {d.text for d, h in zip(made, made.held_out, strict=True) if h}
    assert 150 < len(held) < 250
    more = corpus(tmp_path, [*(f"new {n}" for n in range(500)), *reversed(MANY)])
    assert {d.text for d, h in zip(more, more.held_out, strict=True) if h and not d.text.startswith("new")} == held
    larger = corpus(tmp_path, MANY, 0.3)
    assert held < {d.text for d, h in zip(larger, larger.held_out, strict=True) if h}
    assert not corpus(tmp_path, MANY, 0.0).held_out.any()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=9), st.floats(0.001, 0.5))
def test_both_sides_have_documents_and_equal_ones_are_on_one_side(hashes: list[int], share: float) -> None:
    array = np.array(hashes, np.uint64)
    if len(set(hashes)) == 1:
        with pytest.raises(UserError, match="all the same text"):
            hold_out(array, share)
        return
    held = hold_out(array, share)
    assert held.any() and not held.all()
    assert not set(array[held].tolist()) & set(array[~held].tolist())


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    made = corpus(tmp_path, ["", text])
    assert [d.text for d in made] == [text[:900], text[900:]]
    assert made.held_out.tolist() == [False, True] and made.sizes.tolist() == [900, 100]
    assert made.sample(50) == [text[:50]] and made.characters() == set(text)
    store = stored(made, Bytes(False), tmp_path / "store")
    assert [ids.tolist() for ids in read(store, [(0, 0, 900), (1, 0, 100)])] == [
        list(text[:900].encode()),
        list(text[900:].encode()),
    ]
    with pytest.raises(UserError, match="too few"):
        corpus(tmp_path, ["x"])


def test_a_vocabulary_is_learnt_from_what_is_trained_on(tmp_path: Path) -> None:
    made = corpus(tmp_path, MANY)
    held = {d.text for d, h in zip(made, made.held_out, strict=True) if h}
    sample = made.sample(10_000)
    assert not held & set(sample)
    assert 10_000 <= sum(map(len, sample)) < 10_200
    assert sample == corpus(tmp_path, MANY).sample(10_000)
    numbers = [int(t.split()[1]) for t in sample]
    assert max(numbers) - min(numbers) > 1500  # from all over the source
    assert made.characters() == set("document 0123456789")


def test_boundaries_stand_before_and_after_every_document(tmp_path: Path) -> None:
    store = stored(corpus(tmp_path, ["ab", "c", "żd"], 0), Bytes(), tmp_path / "store")
    assert [r.tolist() for r in read(store, [(0, 0, 4), (1, 0, 3), (2, 0, 5)])] == [
        [256, 97, 98, 256],
        [256, 99, 256],
        [256, 0xC5, 0xBC, 100, 256],
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=20),
    boundary=st.booleans(),
    characters=st.booleans(),
)
def test_tokens_in_are_tokens_out_and_tokens_dropped(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], boundary: bool, characters: bool
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    if not any(texts):
        return
    made = corpus(folder, texts, 0)
    tokenizer = Characters(made.characters(), boundary) if characters else Bytes(boundary)
    store = stored(made, tokenizer, folder / "store")
    manifest, full = store.manifest, [t for t in texts if t]
    units = [len(t) if characters else len(t.encode()) for t in full]
    kept = [n for n in units if boundary or n > 1]
    assert manifest["tokens"]["in"] == sum(units) + 2 * boundary * len(full)
    assert manifest["tokens"]["out"] == sum(kept) + 2 * boundary * len(kept) == int(store.lengths.sum())
    assert manifest["tokens"]["in"] == manifest["tokens"]["out"] + manifest["tokens"]["dropped"]
    assert manifest["dropped"].get("empty", 0) == len(texts) - len(full)
    assert (
        manifest["dropped"].get("fewer than two tokens", 0) == len(full) - len(kept) == len(full) - len(store.lengths)
    )
    assert manifest["documents"]["altered"] == 0


def test_bytes_that_are_predicted(tmp_path: Path) -> None:
    made = corpus(tmp_path, ["żab", "cd"], 0)
    for n, (tokenizer, predicted, targets) in enumerate(
        [(Bytes(), 6, 4 + 2 + 2), (Bytes(False), 6 - 2, 3 + 1), (Characters("żabcd", False), 6 - 3, 2 + 1)]
    ):
        manifest = stored(made, tokenizer, tmp_path / str(n)).manifest
        assert (manifest["bytes"]["train"], manifest["predicted_bytes"]["train"]) == (6, predicted)
        assert manifest["targets"]["train"] == targets


class Spelt(Bytes):
    """A tokenizer whose boundary can be spelt."""

    def encode(self, text: str) -> np.ndarray:
        ids = super().encode(text)
        return np.where(ids == ord("|"), self.boundary, ids).astype(np.int32)


def test_a_text_that_spells_the_boundary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl line 2: spells the token"):
        stored(corpus(tmp_path, ["ab", "a|b", "c"], 0), Spelt(), tmp_path / "refused")
    store = stored(corpus(tmp_path, ["ab", "a|b", "c"], 0, bad="drop"), Spelt(), tmp_path / "dropped")
    assert store.manifest["dropped"] == {"spells the boundary": 1}
    assert store.manifest["tokens"] == {"in": 12, "out": 7, "dropped": 5, "train": 7, "held_out": 0}


def test_text_that_does_not_come_back_is_counted(tmp_path: Path) -> None:
    class Deaf(Bytes):
        exact = False

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text.lower())

    store = stored(corpus(tmp_path, ["ab", "Ab", "AB"], 0), Deaf(), tmp_path / "store")
    assert store.manifest["documents"]["altered"] == 2
    exact = train_sentencepiece(["ab " * 99], 300, True)
    assert (
        stored(corpus(tmp_path, ["▁ab", "  \0\t", "ż"], 0), exact, tmp_path / "exact").manifest["documents"]["altered"]
        == 0
    )


def test_an_unknown_character_names_its_document(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl line 2: character 'ż'"):
        stored(corpus(tmp_path, ["ab", "ż", "a"], 0), Characters("ab"), tmp_path / "store")


def test_no_text_and_changing_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no text: left out were 2 empty"):
        corpus(tmp_path, ["", ""])
    for after in (["ab", "ce"], ["ab"], ["ab", "cd", "ef"]):
        made = corpus(tmp_path, ["ab", "cd"], 0)
        corpus(tmp_path, after, 0)
        with pytest.raises(UserError, match="changed while it was being read"):
            list(made)
