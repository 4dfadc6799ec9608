"""Small enough to read."""

import ast

from tests.architecture.source import name_of, product_files, syntax

FILE_LINES = 400
FUNCTION_LINES = 60
ARGUMENTS = 7


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def too_many_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """More than ARGUMENTS; a constructor's keyword-only ones do not count: it declares fields, as a dataclass does."""
    counted = function.args.posonlyargs + function.args.args
    if function.name != "__init__":
        counted = counted + function.args.kwonlyargs
    return len([argument for argument in counted if argument.arg not in ("self", "cls")]) > ARGUMENTS


def test_sizes():
    wrong = []
    for path in product_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            wrong.append(f"{name_of(path)} has {lines} lines")
        for function in functions(syntax(path)):
            length = function.end_lineno - function.lineno + 1
            if length > FUNCTION_LINES:
                wrong.append(f"{name_of(path)}: {function.name} has {length} lines")
            if too_many_arguments(function):
                wrong.append(f"{name_of(path)}: {function.name} has more than {ARGUMENTS} arguments")
    assert not wrong, "\n".join(wrong)


def test_every_file_says_what_it_is():
    silent = [name_of(path) for path in product_files() if syntax(path).body and not ast.get_docstring(syntax(path))]
    assert not silent, "no docstring at the top of " + ", ".join(silent)
