"""Which module or sub-package may import which, so that there is no circle and no short cut."""

import ast
import graphlib
import pathlib

import tfbn

MAY_IMPORT = {
    **dict.fromkeys(("_requirements", "_version", "arguments", "detours"), ""),
    **dict.fromkeys(("drift", "hidden_folders", "moments", "storage"), ""),
    "blending": "arguments",
    "layer": "origins",
    "origins": "storage",
    "keras_models": "detours layer",
    "fingerprints": "keras_models",
    "copying": "keras_models layer origins",
    "conversion": "copying keras_models",
    "layer_stats": "blending keras_models moments",
    "stats_file": "_version layer_stats storage",
    "summary": "blending drift stats_file",
    "population": "arguments blending drift fingerprints keras_models layer_stats origins "
    "stats_file storage summary",
    "plots": "drift",
    "sweep": "arguments detours drift keras_models layer layer_stats moments population storage",
    "callbacks": "arguments drift fingerprints keras_models population sweep",
    "beam": "arguments keras_models population sweep",
    "serving": "_version blending copying drift fingerprints hidden_folders keras_models layer "
    "layer_stats moments origins population stats_file sweep",
    # The public API, which is `tfbn` itself, and the helpers for files and tables.
    "cli": "tfbn _version blending drift hidden_folders keras_models layer_stats serving storage",
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
