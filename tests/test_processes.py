"""Several processes give the artifacts of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest
import torch
from safetensors.torch import load_file

from refusal_direction import cli, demo, load_run
from refusal_direction.config import TEXT
from refusal_direction.output.artifacts import file_names
from refusal_direction.prompts.sets import Kind, Split
from refusal_direction.runtime import processes
from tests import forked
from tests.families import TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem, solve

ROOT = Path(__file__).parent.parent
FEW = ["--model_id", "demo", "--n_train", "24", "--n_val", "12"]


SCRIPT = str(ROOT / "extract_refusal_direction.py")


def launched(output: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run by two processes as the documentation starts them, with the launcher and everything."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu"]  # its name for several processes, GPU or not
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_processes", "2", "--main_process_port", str(_free_port())]
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *FEW, "--output_dir", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=output.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def environment_of(count: int) -> dict[str, str]:
    return {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def as_ranks(arguments: Sequence[str], count: int, *, codes: Sequence[int] | None = None) -> list[str]:
    """What processes print that run a command and meet; all must end well, or with these codes."""
    meeting = environment_of(count)
    with ExitStack() as stack:
        printed = [stack.enter_context(TemporaryFile("w+", encoding="utf-8")) for _ in range(count)]
        said = stack.enter_context(TemporaryFile("w+", encoding="utf-8"))
        each = [
            forked.start(arguments, stdout=out, stderr=said, env={**meeting, "RANK": str(rank)})
            for rank, out in enumerate(printed)
        ]
        ended = [process.wait() for process in each]
        for file in (*printed, said):
            file.seek(0)
        assert ended == (codes or [0] * count), said.read()
        return [out.read() for out in printed]


def assert_alike(one: Path, two: Path) -> None:
    """The artifacts of one process and of two."""
    assert {path.name for path in two.iterdir()} == set(file_names(TEXT))
    assert [json.loads((folder / "run.json").read_text())["engine"]["processes"] for folder in (one, two)] == [1, 2]
    scores = [load_file(folder / "per_prompt_scores.safetensors") for folder in (one, two)]
    assert scores[0].keys() == scores[1].keys()
    for name, expected in scores[0].items():
        assert torch.allclose(scores[1][name], expected, atol=1e-5, equal_nan=True), name
    chosen = [json.loads((folder / "direction_metadata.json").read_text()) for folder in (one, two)]
    assert [chosen[0][key] for key in ("position", "layer")] == [chosen[1][key] for key in ("position", "layer")]


@pytest.mark.extended  # through the command line, which takes long
@pytest.mark.parametrize("search", ["exhaustive", "pruned"])
def test_two_processes_write_the_artifacts_of_one(search: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*FEW, "--output_dir", str(one), "--search", search]) == 0
    first, second = as_ranks([SCRIPT, *FEW, "--output_dir", str(two), "--search", search], 2)
    assert (first.count("| Metric"), second) == (1, "")  # the first process alone prints
    assert_alike(one, two)


@pytest.mark.extended  # the launcher and both processes start afresh, which takes long
def test_two_launched_processes_write_the_artifacts_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*FEW, "--output_dir", str(one)]) == 0
    run = launched(two)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert out.count("| Metric") == 1
    assert_alike(one, two)


@pytest.mark.extended
def test_two_processes_draw_the_further_prompts_of_one_and_end_alike_without_a_selection(tmp_path: Path) -> None:
    """The first ends with code 3; the second with 0, since a launcher ends all processes when one fails."""
    harmful, harmless = (
        json.loads((demo.PROMPTS_DIR / f"{kind}_train.json").read_text()) for kind in ("harmful", "harmless")
    )
    (tmp_path / "bad.json").write_text(json.dumps([*harmful[:55], *harmless[:225]]))
    (tmp_path / "good.json").write_text(json.dumps(harmless[225:]))
    own = ["--model_id", "demo", "--harmful", str(tmp_path / "bad.json"), "--harmless", str(tmp_path / "good.json")]
    few = [*own, "--n_train", "8", "--n_val", "8", "--seed", "5", "--kl_threshold", "-1", "--search", "pruned"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*few, "--output_dir", str(one)]) == 3
    as_ranks([SCRIPT, *few, "--output_dir", str(two)], 2, codes=[3, 0])
    runs = [load_run(folder) for folder in (one, two)]
    assert runs[0].prompts[Kind.HARMFUL, Split.VALIDATION].further > 0  # control
    for which, record in runs[0].prompts.items():
        assert (runs[1].prompts[which].ids, runs[1].prompts[which].kept) == (record.ids, record.kept)
    assert torch.allclose(runs[0].scores.ablation, runs[1].scores.ablation, atol=1e-5, equal_nan=True)
    assert runs[0].selection.index is runs[1].selection.index is None


LONG = ["--n_val", "60", "--n_train", "120", "--memory_budget", "16MiB"]
"""A run of several passes."""


def has_begun(output: Path) -> bool:
    """Whether the processes have met and computed something."""
    return any(output.glob(".unfinished/*/*.safetensors"))


@pytest.mark.extended
def test_a_launched_process_that_dies_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = launched(output, *LONG)
    while not has_begun(output):
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    survivor, victim = (_child(run.pid, rank) for rank in ("0", "1"))
    victim.kill()
    run.communicate()
    assert run.returncode != 0
    assert not survivor.is_running()
    assert not {path.name for path in output.iterdir()} & set(file_names(TEXT))


def test_a_process_whose_partner_dies_ends_in_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments, meeting = [SCRIPT, *FEW, *LONG, "--output_dir", str(output)], environment_of(2)
    first, second = (forked.start(arguments, env={**meeting, "RANK": rank}) for rank in ("0", "1"))
    while not has_begun(output):
        assert (first.poll(), second.poll()) == (None, None)
        time.sleep(0.02)
    second.kill()
    second.wait()
    assert first.wait() not in (0, None)
    assert not {path.name for path in output.iterdir()} & set(file_names(TEXT))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(parent: int, rank: str) -> psutil.Process:
    children = psutil.Process(parent).children(recursive=True)
    (found,) = [process for process in children if process.environ().get("RANK") == rank]
    return found


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
    return as_ranks(["-c", program], count)


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
from tests import forked
from tests.families import TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem, solve

watched = Engine._checked_baseline
if {astray} and processes.rank() == 1:
    Engine._checked_baseline = lambda *args: watched(*args) + 1
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
