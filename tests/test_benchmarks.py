"""Every benchmark at a tiny size: it runs, and prints the lines that its description promises.

No speed is asserted. `layer_gpu.py run` needs an accelerator and jax, and is left out.
"""

import pathlib
import re
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"
NUMBER = r"\d+\.\d+"

pytestmark = pytest.mark.slow


def run(script, *options):
    """The lines that a benchmark prints."""
    command = [sys.executable, BENCHMARKS / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def matching(lines, pattern):
    """How many lines begin as a pattern says."""
    return sum(bool(re.match(pattern, line)) for line in lines)


def test_every_benchmark_has_a_test():
    tested = set(re.findall(r'run\(\s*"(\w+\.py)"', pathlib.Path(__file__).read_text()))
    assert tested == {path.name for path in BENCHMARKS.glob("*.py")}


def test_layer():
    lines = run("layer.py", "--shapes", "4x4x4x8", "32x8", "--repeats", 1, "--runs", 1)
    row = r"(4x4x4x8|32x8) +(graph|XLA) +(train|infer) (clock|CPU) .*"
    assert matching(lines, f"{row}tfbn/keras {NUMBER}-{NUMBER}  ") == 2 * 2 * 2 * 2
    assert matching(lines, f"ResNet50, first step (clock|CPU  )  tfbn/keras {NUMBER}-") == 2


@pytest.mark.gpu_compile
def test_layer_gpu_compile():
    options = ("--shapes", "32x14x14x64", "--dtypes", "float32", "--gpus", "H200", "A100")
    lines = run("layer_gpu.py", "compile", *options)
    cells = ", ".join(
        f"{name} {NUMBER} / \\d+"
        for name in ("keras", "tfbn", "keras, in a graph", "tfbn, in a graph")
    )
    assert matching(lines, f"(H200|A100) 32x14x14x64 float32: {cells}") == 2


@pytest.mark.gpu_compile
def test_sweep_gpu():
    lines = run("sweep_gpu.py", "--size", 32, "--batch-size", 2, "--images", 5)
    assert matching(lines, "H200, (float32|mixed_bfloat16), ms for a batch of 2:") == 2
    assert matching(lines, f"  sweep, frontiers on the GPU {NUMBER}$") == 2
    assert matching(lines, f"  sweep, 49 levels computed again {NUMBER}$") == 2
    assert matching(lines, f"  5 images, 100 % of the frontiers on the GPU: sweep {NUMBER} s") == 2


@pytest.mark.gpu_compile
def test_layer_gpu_export_and_run(tmp_path):
    """On a CPU, whose plug-in takes the same programs."""
    lines = run("layer_gpu.py", "export", tmp_path / "hlo", "--shapes", "4x4x4x8", "32x8")
    assert lines[-1] == f"16 files in {tmp_path / 'hlo'}"
    lines = run("layer_gpu.py", "run", tmp_path / "hlo", "--repeats", 1)
    row = (
        f"(4x4x4x8|32x8) +(float32|bfloat16) +(train|infer)  keras +{NUMBER} ms, +{NUMBER} x floor"
    )
    assert matching(lines, f"{row}  tfbn +{NUMBER} ms, +{NUMBER} x floor  copy ") == 8


def test_sweep():
    lines = run("sweep.py", "--samples", 100, "--repeats", 1)
    row = f" +{NUMBER} s +{NUMBER} of the bare loop +{NUMBER} of predict +{NUMBER} of pooled"
    ways = "training=True|predict|pooled|exact|exact, memory_limit=0"
    assert matching(lines, f"(tfbn|keras): ({ways}){row}") == 10


def test_first_sweep():
    lines = run(
        "first_sweep.py",
        *("--networks", "MobileNet", "--size", 32, "--images", 4, "--batches", 2, 4),
        *("--repeats", 1),
    )
    row = f"MobileNet +(pooled|exact  ) +4 images, batches of +[24]  later {NUMBER} of predict"
    assert matching(lines, row) == 4
    assert matching(lines, f"{row} .* first {NUMBER} of the first predict$") == 2


def test_scale():
    lines = run("scale.py", "--samples", 300)
    assert matching(lines, rf" +300( +\d+){{3}} MiB +1\.000( +{NUMBER}){{2}} s") == 5
    assert matching(lines, r"ResNet-50: 53 batch norm layers, 26560 channels; gradient of") == 1
    assert matching(lines, r"  exact +49 level\(s\): 10\.00 numbers a channel; \d+ bytes") == 1


def test_serving():
    lines = run("serving.py", "--size", 32, "--batch", 2, "--repeats", 2)
    ways = "Keras|tfbn|NaN refused|tfbn, folded|without"
    assert matching(lines, f"({ways})( +{NUMBER}){{4}}$") == 5


def test_monitor_cost():
    lines = run("monitor.py", "cost", "--size", 32, "--batch", 2, "--repeats", 2)
    ways = "serve|serve beside it|monitor all, 52|monitor few, 3"
    assert matching(lines, f"({ways})( +{NUMBER}){{5}}$") == 4


def test_monitor_alarm():
    options = {"seeds": 1, "epochs": 1, "runs": 2, "requests": 17, "first-seed": 10}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    lines = run("monitor.py", "alarm", *arguments)
    row = f".* accuracy {NUMBER}, distance {NUMBER}, alarms in \\d+ of (2|20) runs"
    assert matching(lines, f"10  {row}") == matching(lines, f"all {row}") == 7


def test_monitor_noise():
    lines = run("monitor.py", "noise", "--runs", 2, "--swept", 100, "--samples", 17)
    assert matching(lines, r".* false alarms in \d of 2 runs") == 10


def test_tolerance():
    lines = run("tolerance.py", "--sizes", 1000, "--tolerances", 0.05)
    assert matching(lines, rf" +1000 +all +1000 +{NUMBER} ") == 1
    assert matching(lines, rf" +1000 +0\.05 +640( +{NUMBER}){{3}}$") == 1


def test_coverage():
    options = ("--repetitions", 2, "--seeds", 1, "--population", 2000, "--tolerance", 0.3)
    lines = run("coverage.py", *options, "--kinds", "digits", "alike", "--batches", 32)
    share = r" +\d+\.\d% \+-\d+\.\d"
    assert matching(lines, rf" +(digits|alike) +32 +\d+({share}){{4}}( +0%){{2}} +\d+$") == 2


def test_shared_layers():
    lines = run("shared_layers.py", "--seeds", 2, "--epochs", 1, "--only", "pyramid: 2")
    cells = "  ".join(rf"{kind} {NUMBER}\+-.*" for kind in ("moving", "A", "B", "C", "own"))
    assert matching(lines, f"pyramid.*, 1 epochs: {cells}") == 1
    assert matching(lines, r"    B: at rest in [012]/2 after \d+-\d+ passes") == 1


def test_shards():
    lines = run("shards.py", "--workers", 1, 2, "--shards", 2, 5, "--seconds", 0.01)
    assert matching(lines, r"bytes: task \d+ at level 1 and \d+ at 8; result \d+") == 2
    assert matching(lines, rf" +[12] +(2|5|8) +(0|0\.01)( +{NUMBER}){{3}}$") == 6
