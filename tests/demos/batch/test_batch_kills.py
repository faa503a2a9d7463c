"""A batch that is killed at any write ends, when it is started again, with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffplug.demos.batch.drivers import Stopped
from diffplug.demos.batch.lease import Lease
from tests.demos.batch.fake_model import faked, final_files, make, planned

__all__ = ["faked"]

PROMPTS = [f"prompt {i}" for i in range(7)]
WRITES = ("fsync", "replace", "rename", "link", "unlink")

pytestmark = [
    pytest.mark.usefixtures("faked"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills are of forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def _counting(act: Callable[[int], None]) -> Callable[[], int]:
    """Have `act` called with the number of every write of this process, before it happens."""
    count = [0]

    def before(real: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            act(count[0])
            return real(*args, **kwargs)

        return write

    for name in WRITES:
        setattr(os, name, before(getattr(os, name)))
    return lambda: count[0]


def _in_a_fork(work: Callable[[], None]) -> int:
    """Return how a process that did the work ended: 0, or the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except OSError:
            code = 28
        except Stopped:
            code = 28
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _killed_at(number: int, folder: Path, layout: str) -> int:
    def act(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        _counting(act)
        make(folder, planned(PROMPTS), layout=layout)

    return _in_a_fork(work)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_killed_at_every_write_and_started_again(tmp_path: Path, layout: str) -> None:
    make(tmp_path / "whole", planned(PROMPTS), layout=layout)
    wanted, number = final_files(tmp_path / "whole"), 0
    while True:
        number += 1
        folder = tmp_path / f"{number}"
        ended = _killed_at(number, folder, layout)
        for name, data in final_files(folder).items():
            if name.startswith("shard-"):
                assert data == wanted[name], f"{name} after a kill at write {number}"
        if ended == 0:
            break
        assert ended == signal.SIGKILL
        assert make(folder, planned(PROMPTS), layout=layout)["there"] == len(PROMPTS)
        assert final_files(folder) == wanted, f"killed at write {number}"
        assert [name for name in os.listdir(folder / ".work") if "lease" not in name] == []
    assert number > 25


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_a_full_disk_stops_it_and_room_lets_it_go_on(tmp_path: Path, layout: str) -> None:
    make(tmp_path / "whole", planned(PROMPTS), layout=layout)
    wanted = final_files(tmp_path / "whole")
    for number in (3, 9, 17, 24):
        folder = tmp_path / f"{number}"

        def act(count: int, number: int = number) -> None:
            if count == number:
                raise OSError(28, "No space left on device")

        def work(folder: Path = folder, act: Any = act) -> None:
            _counting(act)
            make(folder, planned(PROMPTS), layout=layout)

        assert _in_a_fork(work) in (0, 28)  # 0: what was refused was not needed, such as a folder's fsync
        assert all(data == wanted[n] for n, data in final_files(folder).items() if n.startswith("shard-"))
        make(folder, planned(PROMPTS), layout=layout)
        assert final_files(folder) == wanted


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_processes_that_take_each_others_leases_make_everything_once(tmp_path: Path, layout: str) -> None:
    make(tmp_path / "whole", planned(PROMPTS), layout=layout)
    folder = tmp_path / "shared"
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                make(folder, planned(PROMPTS), layout=layout, life=0.0)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    make(folder, planned(PROMPTS), layout=layout)
    assert final_files(folder) == final_files(tmp_path / "whole")


def test_the_lease_of_a_dead_process_is_taken_over_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    def take() -> None:
        if not Lease(tmp_path, "shard").take():
            raise OSError

    assert _in_a_fork(take) == 0
    mine = Lease(tmp_path, "shard")
    assert mine.take()
    assert not Lease(tmp_path, "shard").take()
    mine.drop()
    assert Lease(tmp_path, "shard").take()
    assert Lease(tmp_path, "shard", life=0.0).take()  # silent for longer than its life
