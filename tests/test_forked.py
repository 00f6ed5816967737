"""A forked command is what a fresh process would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

SHOWN = """
import os, sys
print(sys.argv, __name__, sys.stdout.encoding, os.getcwd(), os.environ.get("ONE"), os.environ.get("OTHER"))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", ["script", "-c", "-m"])
def test_it_sees_and_gives_back_what_a_fresh_one_does(kind: str, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(SHOWN)
    arguments = {"script": ["shown.py"], "-c": ["-c", SHOWN], "-m": ["-m", "shown"]}[kind]
    own = {key: value for key, value in os.environ.items() if key != "OTHER"}
    env = {**own, "ONE": "1", "PYTHONIOENCODING": "ascii"}
    done = forked.run([*arguments, "3", "4"], cwd=tmp_path, env=env)
    fresh = subprocess.run(
        [sys.executable, *arguments, "3", "4"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout, done.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert done.returncode == 3
    assert " 1 None" in done.stdout


def test_an_exception_is_shown_and_what_was_registered_runs_at_the_end() -> None:
    done = forked.run(["-c", "import atexit; atexit.register(print, 'end'); raise ValueError('no')"])
    assert done.returncode == 1
    assert done.stdout == "end\n"
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: no\n")


def test_it_can_be_killed() -> None:
    process = forked.start(["-c", "import time; time.sleep(600)"])
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert process.poll() == -signal.SIGKILL


def test_several_run_side_by_side(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = forked.start(["-c", "print(open('pipe').read())"], cwd=tmp_path)
    writer = forked.start(["-c", "open('pipe', 'w').write('hello')"], cwd=tmp_path)
    assert (reader.wait(), writer.wait()) == (0, 0)


def test_what_one_does_to_a_module_the_next_does_not_see() -> None:
    program = "import torch; print(hasattr(torch, 'changed')); torch.changed = True"
    assert [forked.run(["-c", program]).stdout for _ in range(2)] == ["False\n"] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork it is a fresh process")
def test_torch_has_been_imported_already() -> None:
    """Control: else nothing is won."""
    assert forked.run(["-c", "import sys; print('torch' in sys.modules)"]).stdout == "True\n"
