"""The house keeps its shape: who imports whom, where layouts are written, how long things are, what files may not name.

Each rule is a table and a function from source to violations, and each function is shown violations that it must see.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room imports rooms of lower floors and of its own, and rooms never import in a circle.
FLOORS = (
    {"errors"},
    {"params", "config", "paths", "hlo", "slices", "html_page"},
    {"sharding", "kernels"},
    {"models", "data"},
    {"costs", "numbers", "collectives", "tpu_memory", "objectives", "generation", "corpus"},
    {"training", "evaluation", "interop"},
    {"post_training", "preflight", "scaling"},
)
# Rooms that know less than their floor allows.
KNOWS_ONLY = {
    "data": {"errors", "config", "paths", "sharding"},
    "corpus": {"errors", "config", "paths", "data", "html_page"},
}
# `training` knows what an objective is, and no particular one: launch hands it one.
KNOWS_NOT = re.compile(r"lm_jax\.training\b.* imports lm_jax\.objectives\b(?!.*\.Objective$)")
OUTSIDE = {"configs", "launch", "benchmarks", "tests"}  # lm_jax never imports these

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500

# --- imports ---------------------------------------------------------------------------------------------------------


def imports(source: str, module: str, package: bool = False) -> set[str]:
    """The dotted names that a module's source imports anywhere, `from a import b` as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + package]
                base = ".".join([*parents, *filter(None, [base])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """`lm_jax.models.linear` is in `models`; `lm_jax` itself and other packages are in no room."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lm_jax" and len(parts) > 1 else None


def import_violations(module: str, imported: set[str]) -> list[str]:
    """What one module of lm_jax imports and may not."""
    wrong = [f"{module} imports {name}" for name in imported if name.split(".")[0] in OUTSIDE]
    here = room(module)
    if here is None:
        return wrong
    floors = {r: i for i, rooms in enumerate(FLOORS) for r in rooms}
    if here not in floors:
        return [*wrong, f"{module} is in a room that no floor has"]
    allowed = {r for r, floor in floors.items() if floor <= floors[here]}
    allowed = allowed & KNOWS_ONLY.get(here, allowed) | {here, "__version__"}
    for name in sorted(imported):
        edge = f"{module} imports {name}"
        if room(name) not in {None, *allowed} or KNOWS_NOT.match(edge):
            wrong.append(edge)
    return wrong


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A path of rooms that leads back to its start, if there is one."""

    def walk(path: list[str]) -> list[str] | None:
        for target in sorted(edges.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if found := walk([*path, target]):
                return found
        return None

    return next((found for start in sorted(edges) if (found := walk([start]))), None)


def modules() -> Iterator[tuple[str, set[str]]]:
    """Every module of lm_jax with what it imports."""
    for path in sorted((ROOT / "lm_jax").rglob("*.py")):
        package = path.name == "__init__.py"
        name = ".".join((path.parent if package else path.with_suffix("")).relative_to(ROOT).parts)
        yield name, imports(path.read_text("utf-8"), name, package)


def test_rooms_import_downwards() -> None:
    found = list(modules())
    assert len(found) > 5
    assert [wrong for name, imported in found for wrong in import_violations(name, imported)] == []


def test_rooms_do_not_import_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for name, imported in modules():
        if (here := room(name)) is not None:
            edges.setdefault(here, set()).update(r for i in imported if (r := room(i)) not in {None, here})
    assert circle(edges) is None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lm_jax.models.block", "import lm_jax.training.loop"),
        ("lm_jax.models.block", "from lm_jax import training"),
        ("lm_jax.models.block", "from ..training import loop"),
        ("lm_jax.kernels.norms", "def f():\n    from lm_jax.models.linear import linear"),
        ("lm_jax.data.loader", "from lm_jax.params import ParamSpec"),
        ("lm_jax.data.pipeline", "from lm_jax.corpus.rules import RULES"),
        ("lm_jax.corpus.stages", "from lm_jax.sharding import mesh"),
        ("lm_jax.training.loop", "from lm_jax.objectives.next_token import next_token"),
        ("lm_jax.training.loop", "import lm_jax.objectives.next_token"),
        ("lm_jax.costs", "from lm_jax.training.run import TrainConfig"),
        ("lm_jax.numbers", "from lm_jax.training.optimizers import make_optimizer"),
        ("lm_jax.training.loop", "from lm_jax.scaling.coordinates import measure"),
        ("lm_jax.config", "import configs.tiny"),
        ("lm_jax", "from launch import train"),
        ("lm_jax.cellar.wine", "import jax"),
    ],
)
def test_a_planted_import_is_seen(module: str, source: str) -> None:
    assert import_violations(module, imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lm_jax.training.loop", "from lm_jax import __version__, errors\nfrom lm_jax.data.loader import rows"),
        ("lm_jax.training.step", "from lm_jax.objectives.next_token import Objective"),
        ("lm_jax.models.block", "from . import linear\nfrom ..errors import UserError\nimport jax, launcher"),
    ],
)
def test_what_is_allowed_is_not_seen(module: str, source: str) -> None:
    assert import_violations(module, imports(source, module)) == []


def test_a_planted_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


# --- layouts ---------------------------------------------------------------------------------------------------------


def partition_specs(source: str) -> list[int]:
    """The lines that build a PartitionSpec, under whatever name it was imported."""
    tree = ast.parse(source)
    names = {"PartitionSpec", "P"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname for a in node.names if a.name in {"PartitionSpec", "P"} and a.asname}
        elif isinstance(node, ast.Assign) and _last_name(node.value) in names:
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _last_name(node.func) in names]


def _last_name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def test_layouts_are_written_in_one_file() -> None:
    home = ROOT / "lm_jax" / "sharding.py"
    assert partition_specs(home.read_text("utf-8"))
    files = [p for d in ("lm_jax", "launch", "configs") for p in sorted((ROOT / d).rglob("*.py")) if p != home]
    assert [f"{p.relative_to(ROOT)}:{line}" for p in files for line in partition_specs(p.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from jax.sharding import PartitionSpec\ns = PartitionSpec('data')",
        "from jax.sharding import PartitionSpec as P\nx = f(P())",
        "from jax.sharding import PartitionSpec as Spec\nx = Spec(None)",
        "import jax\nx = jax.sharding.PartitionSpec(None)",
        "import jax\nx = jax.P('data')",
        "import jax\nS = jax.sharding.PartitionSpec\nx = S('data')",
    ],
)
def test_a_planted_layout_is_seen(source: str) -> None:
    assert partition_specs(source)


def test_a_layout_s_type_alone_is_not_seen() -> None:
    source = "from jax.sharding import PartitionSpec\nfrom lm_jax.sharding import partition\n"
    assert (
        partition_specs(source + "def f(s: PartitionSpec): return partition('batch'), isinstance(s, PartitionSpec)")
        == []
    )


# --- length ----------------------------------------------------------------------------------------------------------


def too_long(source: str) -> list[str]:
    """A file of more lines than a room has, functions of more than a screen."""
    lines = len(source.splitlines())
    wrong = [f"file has {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                wrong.append(f"{node.name} has {length} lines")
    return wrong


def test_nothing_is_too_long() -> None:
    files = [
        p for d in ("lm_jax", "launch", "configs", "benchmarks", "tests") for p in sorted((ROOT / d).rglob("*.py"))
    ]
    assert [f"{p.relative_to(ROOT)}: {w}" for p in files for w in too_long(p.read_text("utf-8"))] == []


def test_a_planted_length_is_seen() -> None:
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert too_long(function) == [f"f has {MAX_FUNCTION_LINES + 1} lines"]
    assert too_long("x = 1\n" * (MAX_FILE_LINES + 1)) and not too_long("x = 1\n" * MAX_FILE_LINES)


# --- what files may not name -----------------------------------------------------------------------------------------

# Written in pieces, so that this file does not name them.
FOREIGN = {
    "a machine's path": re.compile(r"(?<![\w.\-/:])/(?:" + "work|root|home|Users|mnt|opt/\\w*venv" + r")/[\w.]"),
    "a registry's address": re.compile("(?i)py" + r"pi\.org|python" + r"hosted\.org|download\.py" + r"torch\.org"),
    "an index setting": re.compile("--(?:extra-)?" + "index-url|--find" + "-links|--default" + "-index"),
}


def foreign(text: str) -> list[str]:
    """What a file names that only holds on one machine."""
    return [
        f"line {number}: {what}: {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FOREIGN.items()
        for match in pattern.finditer(line)
    ]


def own_files() -> list[Path]:
    """What git holds or would hold; without git, all but hidden folders and a run's outputs."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        return [ROOT / n for n in names if n and (ROOT / n).is_file()]
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f == ".ci" or not (f[0] in "._" or f in {"runs", "build", "dist"})]
        found += [Path(folder, f) for f in files]
    return found


def test_files_name_no_machine_and_no_registry() -> None:
    files = own_files()
    assert ROOT / "setup.cfg" in files and ROOT / ".ci" / "run" in files
    wrong = []
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # arrays and pictures
        wrong += [f"{path.relative_to(ROOT)}: {w}" for w in foreign(text)]
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "work/main/x.py",
        "PY = '/" + "home/ada/.venv/bin/python'",
        "-i https://" + "pypi" + ".org/simple",
        "# uv pip compile --extra-" + "index-url https://a.b",
        "https://files.python" + "hosted.org/x.whl",
    ],
)
def test_a_planted_name_is_seen(text: str) -> None:
    assert foreign(f"line\n{text}\n")


def test_a_bucket_is_not_a_machine() -> None:
    assert foreign("gs://bucket/" + "home/x a/" + "opt/x /opt/python3 https://a.b/" + "work/x ../" + "root/x") == []
