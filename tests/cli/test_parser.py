"""Tests of the command line: values, help, and any words."""

import contextlib
import io

import command_line
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfbn
from tfbn.cli import main, parser


def test_the_methods_are_those_of_the_sweep():
    model = command_line.network()
    with pytest.raises(ValueError, match="Expected method") as error:
        tfbn.collect(model, None, method="no such method")
    listed = str(error.value).partition("Received")[0]
    assert {word.strip("'\",.()[]") for word in listed.split()} >= {*parser.METHODS}
    assert listed.count("'") == 2 * len(parser.METHODS)
    line = ["recalibrate", "m.keras", "--data", "x.npy", "--out", "o.keras"]
    assert parser.build().parse_args(line).method == "exact"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--batch-size", "abc"], "'abc' is not a positive whole number"),
        (["--batch-size", "0"], "'0' is not a positive whole number"),
        (["--batch-size", "-1"], "'-1' is not a positive whole number"),
        (["--batch-size", "1.5"], "'1.5' is not a positive whole number"),
        (["--batch-size", "9" * 5000], "is not a positive whole number"),
        (["--scale", "1/0"], "'1/0' is not a finite number or fraction"),
        (["--scale", "inf"], "'inf' is not a finite number or fraction"),
        (["--scale", "1e999999999"], "'1e999999999' is not a finite number or fraction"),
        (["--scale", "half"], "'half' is not a finite number or fraction"),
        (["--method", "precise"], "choose from"),
    ],
)
def test_wrong_values_are_told_in_english(capsys, arguments, says):
    with pytest.raises(SystemExit) as exited:
        main(["recalibrate", "m.keras", "--data", "x.npy", "--out", "o.keras", *arguments])
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert says in err and "invalid _" not in err


@pytest.mark.parametrize("text, value", [("1/255", 1 / 255), ("0.5", 0.5), ("2", 2.0)])
def test_fractions(text, value):
    line = f"recalibrate m --data d --out o --scale {text} --batch-size 64".split()
    args = parser.build().parse_args(line)
    assert (args.scale, args.batch_size) == (value, 64)


WORDS = [
    *parser.METHODS,
    *("inspect", "recalibrate", "compare", "export", "describe", "m.keras", "x.npy", "no/o.keras"),
    *("--data", "--out", "--out=o.keras", "--method", "--batch-size", "--scale"),
    *("--include-frozen", "--unsafe", "--json", "--check", "--help", "--version", "-h", "--"),
    *("32", "0", "-1", "1/255", "nan", "-", "="),
]


LINES = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=9)


@settings(max_examples=150)
@given(LINES)
def test_any_command_line(line):
    """It prints the usage and one error, or names a file that does not exist."""
    check_line(line)


@pytest.mark.slow
@settings(max_examples=5000)
@given(LINES)
def test_very_many_command_lines(line):
    check_line(line)


def check_line(line):
    """Return exit code and stderr of a command whose files do not exist."""
    line = [word.replace("\0", "") for word in line]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line)
        except SystemExit as exited:
            code = exited.code
    lines = err.getvalue().splitlines()
    if code == 0:
        assert lines == [] and out.getvalue().startswith(("usage: tfbn", "tfbn "))
    elif code == 2 and lines[0].startswith("usage"):
        assert lines[0].startswith("usage: tfbn") and ": error: " in err.getvalue()
        assert "invalid _" not in err.getvalue()
    else:
        assert code == 2 and out.getvalue() == ""
        assert len(lines) == 1 and lines[0].startswith("tfbn: Expected ")
        names = [word.split("=")[-1] for word in line]
        shown = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]
        assert any(name in lines[0] for name in shown)


def test_no_arguments_print_the_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out == parser.build().format_help() and err == ""
