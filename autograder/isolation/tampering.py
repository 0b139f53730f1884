"""Whether an answer file reaches for the machinery that measures it.

Values and traffic are checked where no answer runs. Allocations and FLOPs can be counted only in
the answer's own process, by torch's dispatch modes. Code that keeps to tensors cannot touch those;
this module lists what in a file goes beyond.
"""

import ast

MODULES = frozenset({
    "torch", "math", "cmath", "statistics", "itertools", "functools", "operator", "collections",
    "dataclasses", "typing", "enum", "fractions", "decimal", "random", "heapq", "bisect", "string",
    "re", "copy", "json", "abc", "contextlib", "__future__", "reference", "transformers",
    "warnings", "time",
})  # fmt: skip
PARTS_OF_TORCH = frozenset({
    "nn", "functional", "autograd", "linalg", "optim", "fft", "special", "cuda", "modules",
    "parameter", "init", "utils", "Tensor", "Generator",
})  # fmt: skip
NAMES = frozenset({
    "eval", "exec", "compile", "open", "__import__", "globals", "locals", "vars", "getattr",
    "setattr", "delattr", "breakpoint", "input", "memoryview", "__builtins__", "__loader__",
    "__spec__",
})  # fmt: skip
ATTRIBUTES = frozenset({
    "numpy", "ctypes", "_C", "ops", "library", "overrides", "multiprocessing", "jit", "compile",
    "compiler", "_dynamo", "storage", "untyped_storage", "data_ptr", "set_", "from_dlpack",
    "to_dlpack", "from_file", "load", "save", "__class__", "__dict__", "__globals__",
    "__subclasses__", "__bases__", "__mro__", "__code__", "__closure__", "__builtins__",
    "__getattribute__", "__torch_dispatch__", "__torch_function__", "__reduce__", "gi_frame",
    "f_back", "f_globals", "f_locals", "tb_frame", "cr_frame", "utils", "modules",
})  # fmt: skip
# Modules that reach the interpreter: met under any name, also as what another module imported.
MACHINERY = frozenset({
    "builtins", "bltns", "sys", "_sys", "os", "_os", "posix", "io", "_io", "gc", "inspect",
    "importlib", "ctypes", "types", "subprocess", "socket", "threading", "_thread", "traceback",
    "linecache", "dis", "marshal", "pickle", "mmap", "weakref", "atexit", "pdb", "code", "codeop",
    "runpy", "pkgutil", "zipimport", "faulthandler", "tracemalloc", "asyncio", "multiprocessing",
    "shutil", "tempfile", "pathlib", "resource", "autograder", "spies",
})  # fmt: skip
# What fetches an attribute whose name is a text.
BY_NAME = frozenset({
    "attrgetter", "methodcaller", "Formatter", "get_field", "get_type_hints", "ForwardRef",
})  # fmt: skip
SELF = frozenset({"self", "cls", "ctx"})
DUNDERS = frozenset({
    "__init__", "__call__", "__name__", "__doc__", "__len__", "__iter__", "__next__", "__enter__",
    "__exit__", "__getitem__", "__post_init__", "__repr__", "__file__", "__main__",
})  # fmt: skip


def suspicions(text: bytes) -> list[str]:
    """What in the file could change a measurement, each with its line; [] for ordinary answers."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ["it cannot be parsed"]
    found = []
    modules = _modules(tree)
    for node in ast.walk(tree):
        for what in [*_of(node), *_patches(node, modules)]:
            found.append((getattr(node, "lineno", 0), what))
    return [f"{what} (line {line})" for line, what in sorted(set(found))]


def _of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [f"import {a.name}" for a in node.names if not _is_ordinary(a.name)]
    if isinstance(node, ast.ImportFrom):
        module = node.module or "."
        names = [f"{module}.{a.name}" for a in node.names]
        return [f"from {module} import {n.rpartition('.')[2]}" for n in names
                if not _is_ordinary(module) or not _is_ordinary(n) or node.level
                or _reaches(n.rpartition(".")[2])]  # fmt: skip
    if isinstance(node, ast.Name) and (node.id in NAMES or _is_dunder(node.id)):
        return [node.id]
    if isinstance(node, ast.Attribute) and _reaches(node.attr, node.value):
        return [f".{node.attr}"]
    if isinstance(node, ast.MatchClass):
        return [f"{name}=" for name in node.kwd_attrs if _reaches(name)]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("__"):
        return [] if node.name in DUNDERS else [f"def {node.name}"]
    return []


def _modules(tree: ast.AST) -> set[str]:
    """The names that imports bind."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {a.asname or a.name.partition(".")[0] for a in node.names}
    return names


def _is_ordinary(module: str) -> bool:
    first, *rest = module.split(".")
    if first not in MODULES or any(part.startswith("_") or part == "*" for part in rest):
        return False
    if first == "torch" and rest:
        return rest[0] in PARTS_OF_TORCH - {"utils"} or (
            len(rest) == 1 and rest[0] not in ATTRIBUTES
        )
    return True


def _patches(node: ast.AST, modules: set[str]) -> list[str]:
    """Assignments to attributes of what is imported: torch.matmul = ..."""
    if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
        return []
    base = node.value
    while isinstance(base, (ast.Attribute, ast.Call, ast.Subscript)):
        base = base.func if isinstance(base, ast.Call) else base.value
    is_import = isinstance(base, ast.Name) and base.id in modules
    return [f"{ast.unparse(node)} = "] if is_import else []


def _reaches(attribute: str, base: ast.expr | None = None) -> bool:
    """Whether an attribute leads out of tensors and numbers; private ones of oneself do not."""
    if attribute == "eval":  # of a module; the builtin is reached by its name alone
        return False
    if attribute in ATTRIBUTES | NAMES | MACHINERY | BY_NAME or _is_dunder(attribute):
        return True
    is_own = isinstance(base, ast.Name) and base.id in SELF
    return attribute.startswith("_") and not attribute.startswith("__") and not is_own


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name not in DUNDERS
