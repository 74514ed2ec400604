"""Which module or sub-package may import which, so that there is no circle and no short cut."""

import ast
import graphlib
import importlib
import pathlib

import tfbn

MAY_IMPORT = {
    **dict.fromkeys(("_requirements", "_version", "arguments"), ""),
    **dict.fromkeys(("files", "graphs"), ""),
    "stats": "_version arguments files",
    "layer": "files",
    "models": "layer stats",
    "population": "arguments layer models stats files",
    "plots": "stats",
    "sweep": "arguments graphs layer models population stats files",
    "callbacks": "arguments models population stats sweep",
    "beam": "arguments models population stats sweep",
    "serving": "_version graphs files layer models population stats sweep",
    # The public API, `tfbn`, and the helpers for files and tables.
    "cli": "tfbn _version callbacks files models serving stats files sweep",
}


def imported(tree):
    """The modules and sub-packages of tfbn that a file imports to run."""
    pending = [tree]
    for node in pending:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        names = [name.name for name in getattr(node, "names", ()) if isinstance(name, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{name}" for name in names]
        yield from ([*name.split("."), "tfbn"][1] for name in names if name.startswith("tfbn"))


def test_modules_import_only_those_below_them():
    package, seen = pathlib.Path(tfbn.__file__).parent, set()
    for file in package.rglob("*.py"):
        name = file.relative_to(package).with_suffix("").parts[0]
        if name not in ("__init__", "__main__"):
            seen.add(name)
            allowed = {name, *MAY_IMPORT[name].split()}
            assert {*imported(ast.parse(file.read_text()))} <= allowed, file
    assert seen == MAY_IMPORT.keys()
    graphlib.TopologicalSorter({n: below.split() for n, below in MAY_IMPORT.items()}).prepare()


def test_type_checkers_see_the_names_that_are_imported_when_used():
    tree = ast.parse(pathlib.Path(tfbn.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == tfbn._MODULES
    assert {*seen, "__version__"} == {*tfbn.__all__}
    for name, module in seen.items():
        assert getattr(tfbn, name) is getattr(importlib.import_module(module), name)
