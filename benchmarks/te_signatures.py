"""Write down the names and parameters of Transformer Engine that Megatron-Core uses, for the stub of the tests.

    python -m benchmarks.te_signatures TRANSFORMER_ENGINE VERSION MEGATRON_CORE... > tests/te_signatures.json

TRANSFORMER_ENGINE is the folder `transformer_engine` of an unpacked wheel, MEGATRON_CORE a folder `megatron/core`.
Files are read, nothing is imported, so neither CUDA nor the compiled parts are needed. The table holds, per module,
each name that Megatron imports or reaches through `te.pytorch`: a class with the parameters of its constructor, a
function with its own (null where they could not be read), or null for any other value. Of `CALLED` it holds the
parameters of `forward` as well.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = "transformer_engine"
CALLED = {"DotProductAttention"}
"""Modules whose calls the tests check."""
_REACHED = re.compile(r"\bte\.((?:pytorch|common)(?:\.[a-z_0-9]+)*)\.([A-Z]\w*|[a-z_0-9]+(?=\())")


class Sources:
    """The modules of a package, parsed when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """Of `transformer_engine.a.b`; None = there is no such file."""
        if module not in self._trees:
            base = self._folder.joinpath(*module.split(".")[1:])
            file = next((f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()), None)
            self._trees[module] = ast.parse(file.read_text(encoding="utf-8")) if file else None
        return self._trees[module]

    def is_package(self, module: str) -> bool:
        return (self._folder.joinpath(*module.split(".")[1:]) / "__init__.py").is_file()

    def find(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """The module and statement that define a name, through re-exports."""
        tree = self.tree(module)
        if tree is None or depth > 8:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        found = self.find(source, name if alias.name == "*" else alias.name, depth + 1)
                        if found:
                            return found
        return None

    def is_compiled(self, module: str, name: str) -> bool:
        """Whether the module imports the name from Transformer Engine's extension."""
        tree = self.tree(module)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] if tree else []
        return any(
            node.module == f"{ROOT}_torch" and any(alias.name == name for alias in node.names) for node in imports
        )

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package(module)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def parameters(self, module: str, node: ast.AST, method: str = "__init__") -> str | None:
        """Of a function, or of a class's constructor or other method, as they stand in a `def`, every default shown as
        None; None = neither."""
        if isinstance(node, ast.FunctionDef):
            return _shown(node.args)
        if not isinstance(node, ast.ClassDef):
            return None
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == method:
                return _shown(part.args)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = [
                part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            return ", ".join(["self", *(f"{ast.unparse(field.target)}=None" for field in fields)])
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found:
                return self.parameters(*found, method)
        return None


def _shown(arguments: ast.arguments) -> str:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    return ast.unparse(arguments)


def names_used(file: Path) -> Iterator[tuple[str, str]]:
    """Pairs (module, name) that a file of Megatron imports from Transformer Engine or reaches through `te`."""
    text = file.read_text(encoding="utf-8")
    if ROOT not in text and "te.pytorch" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            yield from ((node.module or "", alias.name) for alias in node.names)
    yield from ((f"{ROOT}.{module}", name) for module, name in _REACHED.findall(text))


def table(folder: Path, megatron: list[Path]) -> dict[str, dict[str, object]]:
    """Module → name → {"class" or "function": parameters, "forward": those of a call}, or null for another value."""
    sources = Sources(folder)
    found: dict[str, dict[str, object]] = {}
    for module, name in sorted({pair for root in megatron for file in root.rglob("*.py") for pair in names_used(file)}):
        place = sources.find(module, name)
        if place is None:
            if sources.is_compiled(module, name):
                found.setdefault(module, {})[name] = None
            continue
        kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(place[1]))
        entry = {kind: sources.parameters(*place)} if kind else None
        if entry and name in CALLED:
            entry["forward"] = sources.parameters(*place, "forward")
        found.setdefault(module, {})[name] = entry
    return found


def main(arguments: list[str]) -> None:
    folder, version, *megatron = arguments
    print(json.dumps({"version": version, "modules": table(Path(folder), [Path(m) for m in megatron])}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
