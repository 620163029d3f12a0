"""What the package can say: its strings, and the sentences of the errors that it raises on purpose.

Read from the source.  What is filled in when a sentence is made is ``HOLE`` here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

HOLE = "\0"
BASE, SERVER = "DartError", "Refusal"
"""The base class of errors; the class of what the server refuses, whose status comes first."""
DEEPEST = 5
"""How many names and functions are followed from an error to its sentence."""

Function = ast.FunctionDef | ast.AsyncFunctionDef | None
Values = Mapping[str, Sequence[str]]
NOTHING: Values = {}


@dataclass(frozen=True, order=True)
class Sentence:
    """One sentence of an error class; ``status`` and ``code`` of the server's answers."""

    kind: str
    text: str
    status: int = 0
    code: str = ""


def strings(package: Path) -> list[str]:
    """Every string of the package, in errors or not; what an f-string fills in is a hole."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def sentences(package: Path) -> list[Sentence]:
    """Every sentence of an error that is made on purpose, by class and in alphabetical order."""
    modules = [
        Module(ast.parse(path.read_text(encoding="utf-8"))) for path in package.rglob("*.py")
    ]
    reader = Reader(modules)
    found = {one for module in modules for one in reader.sentences(module) if _known(one.text)}
    return sorted(found, key=lambda one: (one.kind, one.status, one.text.lstrip(HOLE).lower()))


def _known(text: str) -> bool:
    """Whether enough of a sentence is known beforehand to be found by."""
    return sum(char.isalpha() for char in text) > 7


def quoted(page: str) -> list[str]:
    """The messages that are headings of docs/faq.md; "…" stands for what differs."""
    return re.findall(r"^### `(.+?)`(?:, and .+)?$", page, re.MULTILINE)


def pieces(quotation: str) -> list[str]:
    """The fixed pieces of a quoted message."""
    return [piece.strip() for piece in quotation.split("…") if len(piece.strip()) > 3]


def holds(text: str, fixed: Sequence[str]) -> bool:
    """Whether ``text`` holds the pieces in this order."""
    return re.search(".*".join(map(re.escape, fixed)), text, re.DOTALL) is not None


class Module:
    """One file: the functions, constants and classes that its top level names."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.functions = {
            node.name: node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr)
        }

    def calls(self) -> Iterator[tuple[str, ast.Call, Function]]:
        """Every call of a plain name, with the function that it stands in."""
        waiting: list[tuple[ast.AST, Function]] = [(self.tree, None)]
        while waiting:
            node, inside = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = node
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield node.func.id, node, inside
            waiting += ((child, inside) for child in ast.iter_child_nodes(node))


class Reader:
    """Follows errors to their sentences."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = modules
        self.classes: dict[str, ast.ClassDef] = {}
        bases = {BASE, SERVER}
        for _ in range(2):  # classes of errors, and classes of those
            for module in modules:
                for name, node in module.classes.items():
                    if name in bases or bases & {ast.unparse(base) for base in node.bases}:
                        self.classes[name] = node
                        bases.add(name)

    def sentences(self, module: Module) -> Iterator[Sentence]:
        """The sentences of the errors that one file makes."""
        for name, call, inside in module.calls():
            if name not in self.classes:
                continue
            status, code = 0, ""
            arguments = list(call.args)
            if name == SERVER:
                status = int(ast.literal_eval(arguments.pop(0)))
                codes = [k.value for k in call.keywords if k.arg == "code"] or arguments[2:3]
                code = "".join(self.texts(codes[0], module, inside)) if codes else ""
            if arguments:
                for text in self._made(name, arguments, module, inside):
                    yield Sentence(name, text, status, code)

    def _made(
        self, name: str, arguments: Sequence[ast.expr], module: Module, inside: Function
    ) -> Sequence[str]:
        """What a class makes of its arguments: its own sentence, or the first of them."""
        for node in self.classes[name].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__" and name != SERVER:
                names = [one.arg for one in node.args.args[1:]]
                values = {
                    known: self.texts(given, module, inside)
                    for known, given in zip(names, arguments, strict=False)
                }
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                        return self.texts(call.args[0], module, None, values)
        return self.texts(arguments[0], module, inside)

    def texts(
        self,
        node: ast.expr,
        module: Module,
        inside: Function,
        values: Values = NOTHING,
        deep: int = 0,
    ) -> list[str]:
        """Everything that an expression can be, with holes."""

        def follow(part: ast.expr) -> list[str]:
            return self.texts(part, module, inside, values, deep + 1)

        if isinstance(node, ast.Constant):
            return [] if node.value is None else [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return _joined([_filled(part, module, values) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([follow(node.left), follow(node.right)])
        if isinstance(node, ast.IfExp):
            return follow(node.body) + follow(node.orelse)
        if isinstance(node, ast.BoolOp):
            return [text for part in node.values for text in follow(part)]
        if isinstance(node, ast.Name) and node.id in values:
            return list(values[node.id])
        if isinstance(node, ast.Name) and deep < DEEPEST:
            return self._name(node.id, module, inside, deep) or [HOLE]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            return self._given(node.attr, module, deep) or [HOLE]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and deep < DEEPEST:
            return self._returned(node.func.id, module, deep) or [HOLE]
        return [HOLE]

    def _name(self, name: str, module: Module, inside: Function, deep: int) -> list[str]:
        """A constant of the file, what is assigned in the function, or what its callers give."""
        for known in (module, *self.modules):
            if name in known.constants:
                return self.texts(known.constants[name], known, None, deep=deep + 1)
        if inside is None:
            return []
        found: list[str] = []
        for node in ast.walk(inside):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.NamedExpr):
                targets = [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found += self.texts(node.value, module, inside, deep=deep + 1)  # type: ignore[attr-defined]
        names = [one.arg for one in inside.args.args]
        if not found and name in names:
            for called, call, caller in module.calls():
                if called == inside.name and len(call.args) > names.index(name):
                    given = call.args[names.index(name)]
                    found += self.texts(given, module, caller, deep=deep + 1)
        return found

    def _given(self, name: str, module: Module, deep: int) -> list[str]:
        """What the classes of the file are made with, where an argument is called ``name``."""
        found: list[str] = []
        for made, call, caller in module.calls():
            body = module.classes[made].body if made in module.classes else []
            for node in body:
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    names = [one.arg for one in node.args.args[1:]]
                    if name in names and len(call.args) > names.index(name):
                        given = call.args[names.index(name)]
                        found += self.texts(given, module, caller, deep=deep + 1)
        return found

    def _returned(self, name: str, here: Module, deep: int) -> list[str]:
        """What a function of the package returns, as far as that is text."""
        for module in (here, *self.modules):
            if name in module.functions:
                inside = module.functions[name]
                nodes = (node for node in ast.walk(inside) if isinstance(node, ast.Return))
                values = [node.value for node in nodes if node.value is not None]
                return [
                    text
                    for value in values
                    if not (isinstance(value, ast.Constant) and value.value is None)
                    for text in self.texts(value, module, inside, deep=deep + 1)
                ]
        return []


def _filled(part: ast.expr, module: Module, values: Values) -> list[str]:
    """One piece of an f-string: its text, a constant of the file, or a hole."""
    if isinstance(part, ast.Constant):
        return [str(part.value)]
    inner = part.value if isinstance(part, ast.FormattedValue) else part
    if isinstance(inner, ast.Name) and inner.id in values:
        return list(values[inner.id])
    known = module.constants.get(inner.id) if isinstance(inner, ast.Name) else None
    return [str(known.value)] if isinstance(known, ast.Constant) else [HOLE]


def _joined(parts: Sequence[Sequence[str]]) -> list[str]:
    """All ways to put one of each part in a row."""
    return ["".join(chosen) for chosen in product(*parts)]
