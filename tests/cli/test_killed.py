"""What the program survives: it is killed again and again, and must end as if nothing had been. Minutes long: `-m slow`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compare.toys import without_seconds

from poise.compare.results import Results

pytestmark = pytest.mark.slow

KILLS = 10
POISE = [sys.executable, "-m", "poise.cli"]
COMPARE = ["compare", "digits", "--methods", "adamw,lion,slow=adamw(lr=1e-4)", "--trials", "5", "--steps", "60", "--seeds", "3"]
TRAIN = ["train", "code-lm", "--method", "muon", "--state", "int8", "--steps", "500", "--checkpoint-every", "40", "--json"]


def killed_after(arguments: list[str], seconds: float) -> bool:
    """Start the program, kill it and everything that it started; whether it was still at work."""
    process = subprocess.Popen([*POISE, *arguments], start_new_session=True, stdout=subprocess.DEVNULL, env=environment())
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def environment() -> dict[str, Any]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_study_of_two_workers_killed_ten_times_is_the_study_of_one(tmp_path: Path) -> None:
    whole = [*COMPARE, "--workers", "1", "--out", str(tmp_path / "whole")]
    started = time.monotonic()
    subprocess.run([*POISE, *whole], check=True, stdout=subprocess.DEVNULL, env=environment())
    length = time.monotonic() - started
    broken = [*COMPARE, "--workers", "2", "--out", str(tmp_path / "broken")]
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        if killed_after(broken, moments.uniform(0.1, 0.5) * length):
            kills += 1
        else:  # it had finished: once more from the start
            subprocess.run([*POISE, *broken, "--fresh"], check=True, stdout=subprocess.DEVNULL, env=environment(), timeout=600)
            (tmp_path / "broken" / "journal.db").unlink()
    subprocess.run([*POISE, *broken], check=True, stdout=subprocess.DEVNULL, env=environment())
    ours, theirs = (Results.read(tmp_path / name / "results.json") for name in ("broken", "whole"))
    assert without_seconds(ours) == without_seconds(theirs)


@pytest.mark.hf
def test_a_run_killed_three_times_is_the_same_run_and_loads_in_transformers(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outcome = json.loads(subprocess.check_output([*POISE, *TRAIN, "--out", str(whole)], env=environment()))
    for passes in (100, 220, 370):
        kill_at(broken, passes)
    again = json.loads(subprocess.check_output([*POISE, *TRAIN, "--out", str(broken)], env=environment()))
    assert again["resumed_from"] >= 360 and again["loss"] == outcome["loss"]
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (broken, whole))
    assert ours == theirs

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from poise.models import GPT, GPTConfig

    model: Any = AutoModelForCausalLM.from_pretrained(broken / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(broken / "model")
    config = json.loads((broken / "model" / "config.json").read_text())
    twin = GPT(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))
    twin.load_state_dict(torch.load(broken / "checkpoint.pt", weights_only=True)["model"])
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens), rtol=0, atol=1e-5)
    prompt = tokenizer("import ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert text.startswith("import ") and len(text) > 20


def kill_at(folder: Path, passes: int) -> None:
    """Start the run and kill it some time after so many passes are on disk."""
    process = subprocess.Popen(
        [*POISE, *TRAIN, "--out", str(folder)], start_new_session=True, stdout=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + 300
    progress = folder / "progress.json"
    while not progress.exists() or json.loads(progress.read_text())["passes_taken"] < passes:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
