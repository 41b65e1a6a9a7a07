"""Which attributes sources read: what holds every setting to be used somewhere."""

from __future__ import annotations

import ast
from collections.abc import Iterable


def attributes_read(sources: Iterable[str], owners: Iterable[str]) -> set[str]:
    """Attributes that are read of anything called one of `owners`: `recipe.seed`, `self.recipe.seed`."""
    known = set(owners)
    return {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _name(node.value) in known
    }


def _name(node: ast.expr) -> str:
    """`recipe` of `recipe` and of `self.recipe`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
