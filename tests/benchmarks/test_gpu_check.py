"""`make gpu-check` on the CPU: what it writes, and that faults, crashes, hangs and interruptions are recorded."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"

# For plugins: few entries of the catalog, and no kernel to compile.
FEW = """
from gpu import conformance, memory, ranks, sharded, steps
from poise.catalog import get
few = lambda: [get("sgd")]
conformance.entries = sharded.entries = few
conformance.FORMATS = (("float32", "fp32"), ("bfloat16", "int8"))
built = conformance.build
conformance.build = lambda entry, params, **options: built(entry, params, **{**options, "backend": "eager"})
made = steps.build
steps.build = lambda rule, params, options: made(rule, params, {**options, "backend": "eager"})
steps.ROWS = (steps.ROWS[0], steps.ROWS[-1])
memory.RULES = {"Lion": 1}
memory.FORMATS = {"int8": 1.08}
every = ranks.scenarios
ranks.scenarios = lambda device: {name: every(device)[name] for name in ("fsdp fp32 float32", "fsdp checkpoint")}
"""


# A shell that runs the tests in the background has turned interrupts off for all that they start.
LISTENING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(folder: Path, plugin: str, *options: str) -> tuple[subprocess.Popen[str], Path]:
    file, out = folder / "plugin.py", folder / "found.json"
    file.write_text(plugin)
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--plugin", str(file), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", LISTENING, *command[1:]], env=environment, **pipes), out


def check(folder: Path, plugin: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the file, and what was printed."""
    process, out = start(folder, plugin, *options)
    printed, errors = process.communicate(timeout=120)
    assert out.exists(), errors
    return process.returncode, json.loads(out.read_text()), printed


def ended(found: dict[str, Any]) -> dict[str, str]:
    return {section["name"]: section["ended"] for section in found["sections"]}


def failures(found: dict[str, Any]) -> list[str]:
    return [c["name"] for c in found["checks"] if c["passed"] is False]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """A whole run without faults."""
    return check(tmp_path_factory.mktemp("good"), FEW, "--minutes", "5")


def test_a_good_device_passes_and_everything_is_in_the_file(good: tuple[int, dict[str, Any], str]) -> None:
    code, found, printed = good
    assert code == 0, printed
    assert found["schema"] == 1 and found["finished"] is True
    assert ended(found) == dict.fromkeys(["machine", "conformance", "steps", "memory", "sharded"], "finished")
    assert all(set(c) == {"section", "name", "passed", "figure", "tolerance", "message"} for c in found["checks"])
    assert all(c["passed"] is True for c in found["checks"])
    assert {c["section"] for c in found["checks"]} == {"machine", "conformance", "steps", "sharded"}
    assert found["verdict"] == {"passed": len(found["checks"]), "failed": 0, "not_run": 0}
    assert found["machine"]["torch"] and found["machine"]["copy_gb_s"] > 0
    assert [row["name"] for row in found["steps"]] == ["null: torch's fused AdamW against itself", "adamw eager"]
    assert all(row["ratio"] > 0 and row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in found["steps"])
    assert {row["name"]: round(row["state_bytes_per_param"], 1) for row in found["memory"]}["Lion int8"] == 1.1
    assert "checks passed, 0 failed, 0 not run" in printed


def test_what_must_be_true_is_looked_at_for_every_entry_and_format(good: tuple[int, dict[str, Any], str]) -> None:
    names = {c["name"] for c in good[1]["checks"]}
    for form in ("float32 fp32", "bfloat16 int8"):
        for what in ("as on the CPU", "compiled as eager", "a schedule compiles nothing again", "resumes bit for bit"):
            assert f"sgd {form}: {what}" in names
    assert "adamw: as torch's fused one" in names
    assert "sharded: sgd: fsdp checkpoint, world of 2: as one process" in names
    assert "sharded: sgd: fsdp fp32 float32, world of 2: replicas are the same bits" in names


def test_the_file_names_no_one_and_no_place(good: tuple[int, dict[str, Any], str]) -> None:
    text = json.dumps(good[1])
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text and "/tmp" not in text
    assert socket.gethostname() not in text
    assert getpass.getuser() in ("root", "user") or getpass.getuser() not in text


def test_a_wrong_rule_and_a_missed_tolerance_are_reported_and_make_the_exit_code_1(tmp_path: Path) -> None:
    plugin = (
        FEW
        + """
from poise.optim.transforms.adaptive import adam
right = adam.update
adam.update = lambda self, u, state, x, k: 1.001 * right(self, u, state, x, k)
conformance.DRIFT["fp32"] = -1.0
"""
    )
    code, found, printed = check(tmp_path, plugin, "--sections", "conformance")
    assert code == 1
    assert failures(found) == [
        "sgd float32 fp32: near the CPU's float32 run", "adamw: as torch's fused one", "adamw: as torch's foreach one",
    ]  # fmt: skip
    wrong = next(c for c in found["checks"] if c["name"] == "adamw: as torch's fused one")
    assert wrong["figure"] > wrong["tolerance"] > 0
    assert "FAILED adamw: as torch's fused one" in printed
    assert found["verdict"]["failed"] == 3 and found["verdict"]["passed"] > 5


FAULTS = """
import os, time
from gpu import machine, memory, steps
from gpu.settings import Check, Found
good = lambda name: lambda: Found([Check(name, True)])
def raises(): raise ValueError("no such thing as /home/someone/secret/file.py on this card")
"""


@pytest.mark.slow
def test_a_crash_a_hang_and_an_error_are_recorded_and_what_follows_still_runs(tmp_path: Path) -> None:
    plugin = FAULTS + (
        """
def crash(): os.kill(os.getpid(), 11)
def hang(): time.sleep(600)
machine.tasks = lambda s: {"a": good("a"), "crash": crash, "b": good("b"), "raises": raises, "c": good("c")}
steps.tasks = lambda s: raises()
memory.tasks = lambda s: {"d": good("d"), "hang": hang, "e": good("e")}
"""
    )
    code, found, _ = check(tmp_path, plugin, "--sections", "machine,steps,memory", "--stall", "15", "--minutes", "5")
    assert code == 1
    assert found["finished"] is True
    told = {c["name"]: (c["passed"], c["message"]) for c in found["checks"]}
    assert [name for name, (passed, _) in told.items() if passed] == ["a", "b", "c", "d", "e"]
    assert told["crash"] == (False, "crashed by signal 11 (SIGSEGV)")
    assert told["hang"][0] is False and told["hang"][1].startswith("did not finish in")
    assert told["raises"] == (False, "ValueError: no such thing as file.py on this card")
    assert told["steps: begins"] == (False, "failed: ValueError: no such thing as file.py on this card")
    assert [section["restarts"] for section in found["sections"]] == [1, 0, 1]
    assert ended(found)["memory"] == "finished"


@pytest.mark.slow
def test_what_does_not_fit_into_the_time_is_listed_as_not_run(tmp_path: Path) -> None:
    plugin = FAULTS + (
        """
def slow(s): time.sleep(s.seconds + 0.2); return Found([Check("slow", True)])
machine.tasks = lambda s: {"slow": lambda: slow(s), "late": good("late"), "later": good("later")}
"""
    )
    code, found, printed = check(tmp_path, plugin, "--sections", "machine", "--minutes", "0.25")
    assert code == 0
    assert ended(found) == {"machine": "out of time"}
    assert [(c["name"], c["passed"], c["message"]) for c in found["checks"]] == [
        ("slow", True, ""), ("late", None, "not run: time"), ("later", None, "not run: time"),
    ]  # fmt: skip
    assert "1 checks passed, 0 failed, 2 not run" in printed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_a_readable_file_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    marker = tmp_path / "worker"
    plugin = FAULTS + (
        f"""
from pathlib import Path
def hang(): Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(600)
machine.tasks = lambda s: {{"a": good("a"), "hang": hang}}
"""
    )
    process, out = start(tmp_path, plugin, "--sections", "machine,memory")
    until = time.time() + 60
    while not (marker.exists() and marker.read_text()) and time.time() < until:
        time.sleep(0.05)
    while not json.loads(out.read_text())["checks"] and time.time() < until:
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == 130
    found = json.loads(out.read_text())
    assert found["finished"] is False
    assert ended(found) == {"machine": "interrupted", "memory": "not begun"}
    assert [c["name"] for c in found["checks"]] == ["a"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_without_a_gpu_it_explains_itself_and_nothing_has_failed(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert run.returncode == 0
    for said in ("ten minutes", "torch 2.", "PYTHON=", "VENV=", "TORCH_INDEX=", "--device cpu --quick"):
        assert said in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--sections", "machines"], "machines"), (["--minutes", "0"], "--minutes"), (["--plugin", "absent.py"], "absent.py")],
)
def test_bad_options_are_refused_by_name(options: list[str], named: str) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert named in run.stderr
