"""Rooms and files know each other in one direction only: the imports of the package have no circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
SHARED = {"_version", "device", "errors", "files", "identity", "images", "interrupt", "outputs", "progress"}
SHARED |= {"graph", "tables", "torch_files"}
"""Files beside the rooms. They know each other, and of the rooms `onestep` alone (`identity`)."""

KNOWS = {
    "lorad": set(),
    "diffusion": set(),
    "onestep": {"diffusion", "lorad"},
    "teachers": {"lorad", "onestep"},
    "backbones": {"diffusion", "lorad", "onestep"},
    "prompts": {"backbones"},
    "metrics": {"onestep"},
    "distill": {"backbones", "diffusion", "lorad", "onestep", "metrics", "prompts", "teachers"},
    "directions": {"backbones", "diffusion", "lorad", "onestep", "distill"},
    "tasks": {"backbones", "diffusion", "lorad", "onestep", "distill", "prompts"},
    "emoji": {"backbones", "diffusion", "metrics", "onestep", "distill", "tasks"},
    "commands": {"backbones", "directions", "distill", "emoji", "metrics", "onestep", "prompts", "tasks"}
    | {"teachers"},
    "cli": {"commands"},
    "__main__": {"cli"},
}
"""Room -> the rooms whose names it may import, wherever in its files."""
BESIDE = {"identity": {"onestep"}}


def modules():
    """Name of every module of the package -> its file."""
    found = {}
    for path in sorted((SOURCE / "wadi").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree, known):
    """The modules of the package that a file names, at its top, in functions and for type checkers alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from ({whole} if whole in known else {node.module} & known.keys())


@pytest.fixture(scope="module")
def files():
    """Module -> the modules that it imports. The package itself only hands on what people import."""
    known = modules()
    graph = {name: set(imported(ast.parse(path.read_text()), known)) for name, path in known.items()}
    assert len(graph) > 80
    del graph["wadi"]
    return graph


def room(name):
    return name.split(".")[1]


def test_files_have_no_circle(files):
    list(TopologicalSorter(files).static_order())  # a CycleError names the circle


def test_rooms_know_only_those_below_them(files):
    found = {}
    for name, others in files.items():
        for other in others - {"wadi"}:
            found.setdefault(room(name), set()).add(room(other))
    list(TopologicalSorter({name: others - {name} for name, others in found.items()}).static_order())
    allowed = {name: {name} | below | SHARED for name, below in KNOWS.items()}
    allowed |= {name: SHARED | BESIDE.get(name, set()) for name in SHARED}
    wrong = {name: others - allowed.get(name, set()) for name, others in found.items()}
    assert {name: others for name, others in wrong.items() if others} == {}


def test_whoever_lets_peft_read_an_adapter_knows_lorad(files):
    """PEFT reads an adapter of LoRaD only where `wadi.lorad` was imported before."""
    reads = re.compile(r"Peft(Model|Config)\.from_pretrained|\.load_adapter\(|inject_adapter_in_model\(")
    readers = {name for name, path in modules().items() if reads.search(path.read_text())}
    assert {"wadi.onestep.adapters", "wadi.directions.weights"} <= readers
    for name in readers:
        reached, waiting = set(), {name}
        while waiting:
            reached |= waiting
            waiting = set().union(*(files[other] for other in waiting)) - reached
        assert any(room(other) == "lorad" for other in reached), name
