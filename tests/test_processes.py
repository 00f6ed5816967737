"""Several processes give the artifacts of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refusal_direction import cli
from refusal_direction.config import TEXT
from refusal_direction.output.artifacts import file_names
from refusal_direction.runtime import processes
from tests.families import TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem, solve

ROOT = Path(__file__).parent.parent
FEW = ["--model_id", "demo", "--n_train", "24", "--n_val", "12"]


def launched(count: int, output: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run by so many processes, each with one thread."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu"]  # its name for several processes, GPU or not
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_processes", str(count), "--main_process_port", str(_free_port())]
    script = [str(ROOT / "extract_refusal_direction.py"), *FEW, "--output_dir", str(output), *arguments]
    command = [sys.executable, *(launcher if count > 1 else []), *script]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@pytest.mark.parametrize("search", ["exhaustive", "pruned"])
def test_two_processes_write_the_artifacts_of_one(search: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for count, output in ((1, one), (2, two)):
        run = launched(count, output, "--search", search)
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert out.count("| Metric") == 1  # the first process alone prints
    assert {path.name for path in two.iterdir()} == set(file_names(TEXT))
    assert [json.loads((folder / "run.json").read_text())["engine"]["processes"] for folder in (one, two)] == [1, 2]
    scores = [load_file(folder / "per_prompt_scores.safetensors") for folder in (one, two)]
    assert scores[0].keys() == scores[1].keys()
    for name, expected in scores[0].items():
        assert torch.allclose(scores[1][name], expected, atol=1e-5, equal_nan=True), name
    chosen = [json.loads((folder / "direction_metadata.json").read_text()) for folder in (one, two)]
    assert [chosen[0][key] for key in ("position", "layer")] == [chosen[1][key] for key in ("position", "layer")]


def test_a_process_that_dies_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = launched(2, output, "--n_val", "60", "--n_train", "120")
    victim = _child(run.pid)
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert time.monotonic() - begin < 60
    assert not output.exists() or not {path.name for path in output.iterdir()} & set(file_names(TEXT))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(parent: int) -> int:
    """The second of the processes, once it computes."""
    import psutil

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.Process(parent).children(recursive=True):
            try:
                if process.environ().get("RANK") == "1" and process.cpu_times().user > 2:
                    return int(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError("the second process did not start")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_all_rows_once_in_order_and_of_about_equal_cost(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, costs = list(range(100)), [1.0 + index % 7 for index in range(100)]
    monkeypatch.setenv("WORLD_SIZE", str(size))
    shares = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.share(rows, costs))
    assert [row for share in shares for row in share] == rows
    each = [sum(costs[row] for row in share) for share in shares]
    assert max(each) - min(each) <= 2 * max(costs)


def test_one_process_alone_meets_nobody() -> None:
    with processes.joined():
        tensor = torch.ones(3)
        assert processes.all_sum(tensor)[0] is tensor
        assert processes.all_ranks(True)
        assert not processes.all_ranks(False)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "environment variable RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "environment variable MASTER_PORT expected"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "-1"}, "RANK=-1"),
    ],
)
def test_an_environment_of_processes_that_cannot_meet_is_explained(
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out"
    assert cli.main([*FEW, "--output_dir", str(output)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "accelerate launch" in error
    assert not output.exists()


def together(program: str, count: int = 2) -> list[str]:
    """What processes print that run a program and meet; all must end well."""
    environment = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    each = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [process.communicate(timeout=120)[0] for process in each]
    assert [process.returncode for process in each] == [0] * count
    return printed


@pytest.mark.parametrize("error", [False, True])
def test_processes_leave_each_other_before_they_end(error: bool) -> None:
    """Else a thread that waits for messages may abort one of them at its end, and the launcher then all others."""
    printed = together(f"""
import torch
import torch.distributed as distributed
from refusal_direction.runtime import processes

try:
    with processes.joined():
        print(*processes.all_sum(torch.ones(3))[0].tolist())
        if {error} and processes.rank() == 1:
            raise ValueError
except ValueError:
    pass
print(distributed.is_initialized())
""")
    assert printed == ["2.0 2.0 2.0\nFalse\n"] * 2


def test_what_others_have_set_up_serves_and_stays() -> None:
    printed = together("""
import torch
import torch.distributed as distributed
from refusal_direction.runtime import processes

distributed.init_process_group("gloo")
with processes.joined():
    print(*processes.all_sum(torch.ones(3))[0].tolist())
print(distributed.is_initialized())
distributed.barrier()
distributed.destroy_process_group()
""")
    assert printed == ["2.0 2.0 2.0\nTrue\n"] * 2


def test_what_one_has_to_say_all_know() -> None:
    first, second = together("""
from refusal_direction.runtime import processes

with processes.joined():
    first = processes.rank() == 0
    print(processes.all_max(0.25 if first else 0.75), processes.all_ranks(True), processes.all_ranks(first))
    print(processes.gather_warnings(["all"] if first else ["all", "one"]))
""")
    assert first == "0.75 True False\n['one']\n"
    assert second == "0.75 True False\n[]\n"


SOLVED = """
import torch
from refusal_direction.runtime import processes
from refusal_direction.engine import Engine
from tests.families import TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem, solve

watched = Engine._watched_baseline
if {astray} and processes.rank() == 1:
    Engine._watched_baseline = lambda *args: watched(*args) + 1
problem = make_problem(n_train={n_train}, n_val={n_val})
with processes.joined():
    found = solve(engine_of(build(TEXT_FAMILIES["llama"]), problem), problem)
print(found.engine.name, *(float(scores.nansum()) for scores in vars(found.scores).values()))
"""


@pytest.mark.parametrize(
    ("astray", "count", "n_train", "n_val", "engine"),
    [(True, 2, 5, 4, "hooked"), (False, 2, 5, 4, "layer-major"), (False, 5, 1, 1, "layer-major")],
)
def test_processes_agree_on_the_engine_and_there_may_be_more_of_them_than_prompts(
    astray: bool, count: int, n_train: int, n_val: int, engine: str
) -> None:
    """Where the model goes astray in one, all fall back: they would not agree on who runs what."""
    problem = make_problem(n_train=n_train, n_val=n_val)
    expected = solve(engine_of(build(TEXT_FAMILIES["llama"]), problem), problem).scores
    for line in together(SOLVED.format(astray=astray, n_train=n_train, n_val=n_val), count):
        name, *sums = line.split()
        assert name == engine
        assert [float(one) for one in sums] == pytest.approx(
            [float(scores.nansum()) for scores in vars(expected).values()], abs=1e-4
        )
