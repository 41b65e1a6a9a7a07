"""The arrows of the tree: the nouns import no verb, verbs never import each other, the edge needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
VERBS = ("train", "export", "deploy")
WITH_TORCH = {
    "cliplet.teacher",
    "cliplet.snippets",
    "cliplet.classifier",
    "cliplet.vision_tower",
    "cliplet.tower_files",
    "cliplet.trunk_files",
    "cliplet.view_kernels",
    "cliplet.score_kernels",
    "cliplet.runners.torch_runner",
    "cliplet.runners.torch_encoder",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    named = parts if parts[0] == "cliplet" else ("cliplet", *parts)
    return ".".join(named).removesuffix(".__init__")


def sources(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, anywhere in it."""
    here = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def verb_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "cliplet" and len(parts) > 1 and parts[1] in VERBS else None


@pytest.mark.parametrize("path", sources("cliplet"), ids=module_name)
def test_a_noun_imports_no_verb(path: Path) -> None:
    assert [name for name in imports(path) if verb_of(name)] == []


@pytest.mark.parametrize("path", [p for verb in VERBS for p in sources(verb)], ids=module_name)
def test_a_verb_imports_no_other_verb(path: Path) -> None:
    own = verb_of(module_name(path))
    assert [name for name in imports(path) if verb_of(name) not in (None, own)] == []


def test_the_edge_and_the_package_import_no_torch() -> None:
    modules = [module_name(p) for folder in ("cliplet", "deploy") for p in sources(folder)]
    edge = [name for name in modules if name not in WITH_TORCH and name != "cliplet.cli"]
    assert len(edge) > 15
    code = (
        "import sys, importlib\n"
        f"for name in {edge!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'torchvision', 'open_clip', 'timm', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_cliplet_is_light() -> None:
    code = (
        "import sys, cliplet\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pyarrow', 'click'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
