"""The documentation says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden import dump_docs, dump_numbers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "WORKSPACE.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]


def test_the_page_of_configs_is_that_of_the_code() -> None:
    assert dump_docs.FILE.read_text() == dump_docs.text(), "run python -m tests.golden.dump_docs"


def test_the_page_of_numbers_is_that_of_the_code() -> None:
    assert dump_numbers.FILE.read_text() == dump_numbers.page(), "run python -m tests.golden.dump_numbers"


@pytest.mark.parametrize("case", list(dump_numbers.cases()), ids=lambda c: f"{c.model}, {c.what}")
def test_published_figures_are_met_as_far_as_is_said(case: dump_numbers.Case) -> None:
    if case.published is None:
        assert 0 < case.ours < 1  # a rate of use that chips can have
    else:
        assert abs(case.ours / case.published - 1) <= case.apart
        assert bool(case.note) or case.apart <= 3e-3  # what is further off than by rounding is explained


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_files_and_modules_that_exist(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:launch|tests|benchmarks)[\w.]+)", text))
    configs = set(re.findall(r"--config=(configs/[\w/]+\.py)", text))
    wanted = [ROOT / (m.replace(".", "/").rstrip("/") + ".py") for m in modules] + [ROOT / c for c in configs]
    assert [str(p.relative_to(ROOT)) for p in wanted if not p.exists()] == []
