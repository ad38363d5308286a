"""What may import what, how large anything may be, and that a name means one thing.

`docs/architecture.md` says the same in words. Everything is read with `ast`; nothing is imported.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CODE = ("vxl_jax", "train", "convert", "configs")
EVERYTHING = (*CODE, "benchmarks", "tests")

FLOORS = (
    {"vxl_jax.errors", "vxl_jax.typing", "vxl_jax.version"},
    {"vxl_jax.progress", "vxl_jax.interrupts"},
    # Host only: data workers import these.
    {"vxl_jax.media"},
    {"vxl_jax.config"},
    {"vxl_jax.presets"},
    {"vxl_jax.text"},
    {"vxl_jax.stream"},
    # The network.
    {"vxl_jax.nn"},
    {"vxl_jax.models"},
    {"vxl_jax.checkpoints", "vxl_jax.planning"},
    {"vxl_jax.inference"},
    {"vxl_jax.evaluate", "vxl_jax.serve"},
    {"vxl_jax.generate"},
    # Training. Its data and configuration are host only, too.
    {"train.errors", "train.rows"},
    {"train.config"},
    {"train.data"},
    {"train.run"},
    {"train.demo", "train.inspect", "train.synthesis"},
    {"train.finetune", "train.inspect_data"},
    {"convert", "configs"},
    {"benchmarks"},
    {"tests"},
)
"""Packages from the lowest floor to the highest: one imports those of lower floors alone."""

HOST_ONLY = (*range(7), *range(13, 16))
"""Floors that no accelerator is started by: they import nothing of `HEAVY`, directly or not."""

LIGHT = {
    "vxl_jax",
    "vxl_jax.generate",
    "vxl_jax.inference",
    "vxl_jax.inference.cli",
    "vxl_jax.inference.options",
    "vxl_jax.planning.cards",
    "vxl_jax.planning.flops",
}
"""Modules of higher floors that import nothing heavy either: `--help` and refusals come at once."""

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "torch", "transformers"}

UPWARD = {
    ("train.config.cli", "configs"),  # finds a configuration by its name, when it runs
}
"""Imports (inside of a function, or for types alone) that go up, each for a reason."""

MOST_LINES, MOST_FILES, MOST_FUNCTION_LINES = 450, 14, 80

SHARED_NAMES = {"main", "CONFIG", "prepare"}
"""Names that several modules define on purpose: command lines, and what a configuration has."""


class Import(NamedTuple):
    """One import. line: in the file. early: when the module is imported. typed: for types alone."""

    module: str
    name: str | None
    line: int
    early: bool
    typed: bool


@cache
def modules(roots: tuple[str, ...] = CODE) -> dict[str, Path]:
    """Files by the name of their module."""
    found = {}
    for root in roots:
        for path in sorted((ROOT / root).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> list[Import]:
    """All imports of a file, also those inside of functions and for types alone."""
    found = []

    def visit(node: ast.AST, early: bool, typed: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            now, types = early and not inside and not checked, typed or checked
            if isinstance(child, ast.Import):
                found.extend(Import(a.name, None, child.lineno, now, types) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: a relative import"
                module = child.module or ""
                found.extend(Import(module, a.name, child.lineno, now, types) for a in child.names)
            visit(child, now, types)

    visit(tree(path), True, False)
    return found


def imported(one: Import) -> str:
    """The module that an import means."""
    full = f"{one.module}.{one.name}"
    return full if one.name and full in modules(EVERYTHING) else one.module


def floor(module: str) -> int | None:
    """Number of a module's floor; None of the public table `vxl_jax`."""
    for number, packages in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in packages):
            return number
    return None


def names_of(node: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.If):  # one of two definitions, for type checkers and at run time
        for child in (*node.body, *node.orelse):
            yield from names_of(child)


def definitions(path: Path) -> set[str]:
    return {name for node in tree(path).body for name in names_of(node)}


def test_every_module_has_a_floor():
    without = [m for m in modules(EVERYTHING) if floor(m) is None]
    assert set(without) <= {"vxl_jax", "train"}


def test_imports_go_down():
    """Also those inside of functions and for types: they are read as dependencies."""
    wrong = []
    for module, path in modules().items():
        here = floor(module)
        for one in imports(path):
            there = floor(imported(one))
            if here is None or there is None or (module, imported(one)) in UPWARD:
                continue
            same = module.split(".")[:2] == imported(one).split(".")[:2]
            if module.split(".")[0] in ("convert", "configs"):
                same = module.split(".")[0] == imported(one).split(".")[0]
            if there > here or (there == here and not same):
                wrong.append(f"{module}:{one.line}: {imported(one)}")
    assert wrong == []


def test_there_is_no_circle():
    graph = {
        module: {imported(one) for one in imports(path) if not one.typed}
        & modules().keys() - {module}
        for module, path in modules().items()
    }
    for module in ("vxl_jax", "train.config.cli"):
        # The public table, and the configurations that are found by name.
        graph[module] -= {"configs", *(m for m in graph if m.startswith("configs"))}
    # Who imports nobody, or whom nobody imports, is in no circle.
    while graph:
        used = set().union(*graph.values())
        inside = {m: edges & graph.keys() for m, edges in graph.items() if m in used}
        inside = {m: edges for m, edges in inside.items() if edges}
        if inside == graph:
            break
        graph = inside
    assert sorted(graph) == []


def test_host_packages_import_nothing_heavy():
    heavy: dict[str, set[str]] = {}

    def reached(module: str) -> set[str]:
        if module not in heavy:
            heavy[module] = set()
            package = module.rpartition(".")[0]
            if package in modules():  # its __init__ is run first
                heavy[module] |= reached(package)
            for one in imports(modules()[module]) if module in modules() else ():
                if not one.early:
                    continue
                if one.module.split(".")[0] in HEAVY:
                    heavy[module].add(one.module)
                elif imported(one) in modules():
                    heavy[module] |= reached(imported(one))
        return heavy[module]

    light = [m for m in modules() if floor(m) in HOST_ONLY or m in LIGHT]
    assert [f"{m}: {sorted(reached(m))}" for m in light if reached(m)] == []


def test_private_names_stay_in_their_module():
    wrong = [
        f"{module}:{one.line}: {one.module}.{one.name}"
        for module, path in modules().items()
        for one in imports(path)
        if one.module.split(".")[0] in CODE and one.name and one.name.startswith("_")
        if one.name != "__version__"
    ]
    assert wrong == []


def test_names_come_from_where_they_are_defined():
    """Not by way of another module; but packages may give out what is inside of them."""
    wrong = []
    for module, path in modules(EVERYTHING).items():
        for one in imports(path):
            source = modules().get(one.module)
            if source is None or one.name is None or imported(one) != one.module:
                continue
            if source.name != "__init__.py" and one.name not in definitions(source):
                wrong.append(f"{module}:{one.line}: {one.module}.{one.name}")
    assert wrong == []


def test_files_are_short():
    long = {}
    for module, path in modules(EVERYTHING).items():
        lines = len(path.read_text().splitlines())
        if lines > MOST_LINES:
            long[module] = lines
    assert long == {}


def test_folders_are_small():
    count: dict[Path, int] = defaultdict(int)
    for path in modules(EVERYTHING).values():
        count[path.parent.relative_to(ROOT)] += 1
    assert {str(k): n for k, n in count.items() if n > MOST_FILES} == {}


def test_functions_are_short():
    long = {}
    for module, path in modules(EVERYTHING).items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                name = f"{module}.{node.name}"
                if lines > MOST_FUNCTION_LINES:
                    long[name] = lines
    assert long == {}


def test_a_name_means_one_thing():
    """Public names of modules, and the names of packages and modules themselves."""
    places = defaultdict(list)
    for module, path in modules().items():
        for name in definitions(path) - SHARED_NAMES:
            if not name.startswith("_"):
                places[name].append(module)
    assert {name: where for name, where in sorted(places.items()) if len(where) > 1} == {}
