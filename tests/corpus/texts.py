"""Texts made on the spot: sentences of words drawn by their rank, and what is planted in them; and all work on them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from lm_jax.corpus import folders, stages
from lm_jax.corpus.config import PrepareConfig

COMMON = (
    *("the", "of", "and", "to", "a", "in", "that", "have", "with", "be", "was", "for", "it", "on", "as", "are", "this"),
    *("by", "at", "from", "or", "an", "which", "but", "not"),
)


def vocabulary(rng: random.Random, size: int = 3000) -> list[str]:
    """The common words of English, and made-up ones."""
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    return [*COMMON] + ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(size - len(COMMON))]


def sentence(rng: random.Random, words: Sequence[str], length: int = 14) -> str:
    chosen = [rng.choice(COMMON if rng.random() < 0.4 else words) for _ in range(length)]
    return " ".join(chosen).capitalize() + "."


def prose(seed: int, sentences: int = 12) -> str:
    """A document that every rule keeps: paragraphs of sentences."""
    rng = random.Random(seed)
    words = vocabulary(random.Random(7))
    lines = [" ".join(sentence(rng, words) for _ in range(3)) for _ in range(-(-sentences // 3))]
    return "\n\n".join(lines)


def jaccard(a: str, b: str, size: int = 5) -> float:
    """The Jaccard similarity of two texts' sets of shingles, by sets of tuples of words."""
    sets = []
    for text in (a, b):
        words = [w.strip(".,;:!?\"'()").lower() for w in text.split()]
        sets.append({tuple(words[i : i + size]) for i in range(len(words) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, changes: int, seed: int) -> str:
    """A text with other words in so many places."""
    rng = random.Random(seed)
    words = text.split(" ")
    for at in rng.sample(range(len(words)), changes):
        words[at] = f"changed{rng.randrange(10**6)}"
    return " ".join(words)


def write_jsonl(path: Path, texts: Sequence[str], **more: object) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def planned(out: Path, c: PrepareConfig) -> folders.Plan:
    """The plan of a config, written down in its folder."""
    plan = stages.make_plan(out, c)
    folders.write_plan(plan)
    return plan


def work_on(plan: folders.Plan) -> None:
    """All stages in this process, one task after another."""
    for stage in stages.stages_of(plan):
        for task in range(stages.tasks_of(plan, stage)):
            stages.run_task(plan.out, stage, task)
