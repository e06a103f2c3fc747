"""Threads of the export: their number is limited and does not change results, and settings are restored."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from emberpc.bundle.cores import usable_cores
from emberpc.export import threads
from emberpc.export.classify import linear
from emberpc.export.classify.linear import cross_validate
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.threads import Check, StoppedError, bounded_threads, run_in_threads, usable_threads
from emberpc.export.timing import Cost
from fixtures_bundles import BUNDLES

TINY = BUNDLES / "tiny"
Cores = Callable[[int], None]


class LimitError(Exception):
    """Raised by a test when its time limit has passed."""


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """A function that sets the number of usable cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda count: monkeypatch.setattr(threads, "usable_cores", lambda: count)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Pin this thread to one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def numbers(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors and one-hot targets of three labels that overlap."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, count)
    vectors = random.normal(size=(3, 16))[classes] + 1.5 * random.normal(size=(count, 16))
    return vectors.astype(np.float32), np.asarray(np.eye(3, dtype=bool)[classes])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_process_with_one_cpu_uses_one_thread(one_cpu: None) -> None:
    assert usable_cores() == usable_threads() == 1
    assert len(set(run_in_threads([lambda _check: threading.get_ident()] * 8))) == 1


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("2,1", 2), ("16", 4), ("0", 4), ("many", 4), ("", 4)])
def test_omp_num_threads_lowers_the_number_of_threads(
    value: str, expected: int, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(4)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_threads() == expected


def test_tasks_run_concurrently_and_their_results_are_in_order(cores: Cores) -> None:
    cores(3)
    meeting = threading.Barrier(3)  # each task waits until three tasks have begun
    reported: list[int] = []

    def task(number: int) -> Callable[[Check], int]:
        def run(_check: Check) -> int:
            meeting.wait(timeout=300)
            return number

        return run

    assert run_in_threads([task(number) for number in range(6)], reported.append) == list(range(6))
    assert sorted(set(reported) - {0}) == list(range(1, 7))


def test_the_option_most_limits_the_tasks_that_run_at_once(cores: Cores) -> None:
    cores(8)
    running: set[int] = set()

    def task(_check: Check) -> int:
        running.add(threading.get_ident())
        return threading.active_count()

    before = threading.active_count()
    assert max(run_in_threads([task] * 50, maximum=2)) <= before + 2
    assert len(running) <= 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("error", [LimitError, KeyboardInterrupt])
def test_an_exception_of_the_report_stops_endless_tasks(count: int, error: type[BaseException], cores: Cores) -> None:
    cores(count)
    stopped: list[bool] = []

    def endless(check: Check) -> None:
        try:
            while True:
                check()
        except StoppedError:
            stopped.append(True)
            raise

    def report(_done: int) -> None:
        raise error

    with pytest.raises(error):
        run_in_threads([endless] * 5, report)
    assert len(stopped) <= count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("emberpc-export")]


def test_a_task_that_fails_stops_the_others(cores: Cores) -> None:
    cores(2)

    def endless(check: Check) -> None:
        while True:
            check()

    def failing(_check: Check) -> None:
        raise ValueError("of the task")

    with pytest.raises(ValueError, match="of the task"):
        run_in_threads([endless, failing, endless])


def test_cpu_seconds_count_the_work_of_all_threads(cores: Cores) -> None:
    cores(2)

    def spend(_check: Check) -> float:
        start = thread_time()
        while thread_time() - start < 0.05:
            pass
        return thread_time() - start

    with Cost() as cost:
        spent = run_in_threads([spend] * 2)
    assert cost.cpu_seconds >= sum(spent)


def test_an_empty_list_of_tasks_gives_no_results() -> None:
    assert run_in_threads([]) == []


def test_cross_validation_does_not_depend_on_the_number_of_threads(cores: Cores) -> None:
    vectors, targets = numbers()
    found = []
    for count in (1, 2, 5):
        cores(count)
        found.append(cross_validate(vectors, targets))
    for other in found[1:]:
        assert other.c == found[0].c
        for ours, theirs in (
            (other.logits, found[0].logits),
            (other.head.weights, found[0].head.weights),
            (other.head.bias, found[0].head.bias),
        ):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("count", [1, 2])
def test_a_time_limit_stops_cross_validation_inside_a_fit(
    count: int, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(count)
    fit = linear.fit_head

    def again_and_again(*arguments: object, check: Check, **options: object) -> None:
        while True:
            fit(*arguments, check=check, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "fit_head", again_and_again)

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        raise LimitError

    with pytest.raises(LimitError):
        cross_validate(*numbers(), progress=report)


def test_vectors_do_not_depend_on_the_number_of_threads(cores: Cores) -> None:
    texts = [f"text {'and more ' * (number % 7)}{number}" for number in range(60)]
    found = []
    for count in (1, 2, 5):
        cores(count)
        runner = OnnxRunner(TINY / "onnx" / "model.onnx", TINY / "tokenizer.json", 64, 0)
        found.append(runner.run(texts, "sentence_embedding").tobytes())
    assert found[0] == found[1] == found[2]


def settings() -> tuple[int, list[tuple[str, int]], dict[str, str]]:
    """Return the threads of torch and of each BLAS, and the environment."""
    pools = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"]
    return torch.get_num_threads(), pools, dict(os.environ)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Let torch use three threads, as a caller may have set."""
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


def test_thread_settings_of_the_caller_are_restored(three_threads: None, cores: Cores) -> None:
    cores(2)
    before = settings()
    with bounded_threads():
        assert torch.get_num_threads() == 2
        assert {threads for _, threads in settings()[1]} == {1}
        with bounded_threads(1):
            assert run_in_threads([lambda _check: torch.get_num_threads()] * 3) == [1, 1, 1]
        assert torch.get_num_threads() == 2
    assert settings() == before
    with pytest.raises(LimitError), bounded_threads():
        raise LimitError
    assert settings() == before


def test_torch_uses_no_more_threads_than_its_caller_allowed(three_threads: None, cores: Cores) -> None:
    cores(16)
    with bounded_threads():
        assert torch.get_num_threads() == 3


def test_torch_uses_one_thread_if_its_threads_may_spin(
    three_threads: None, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(2)
    monkeypatch.setattr(threads, "_torch_sleeps", False)
    with bounded_threads():
        assert torch.get_num_threads() == 1


#: A module in place of torch, which takes 1 s to load, with the functions that `bounded_threads` calls.
_TORCH = "def get_num_threads(): return 1\ndef set_num_threads(count): pass\n"


@pytest.mark.parametrize(
    ("first", "own", "expected", "real"),
    [
        ("", None, "PASSIVE None True", True),
        ("", "passive", "passive passive True", False),
        ("", "ACTIVE", "ACTIVE ACTIVE False", False),
        ("import torch", None, "None None False", False),
        pytest.param("import torch", "PASSIVE", "PASSIVE PASSIVE True", False, marks=pytest.mark.slow),
    ],
)
def test_waiting_threads_sleep_unless_the_user_set_another_policy(
    first: str, own: str | None, expected: str, real: bool, tmp_path: Path
) -> None:
    """torch reads OMP_WAIT_POLICY when it is loaded: emberpc sets it before and removes it afterwards."""
    if not real:
        (tmp_path / "torch.py").write_text(_TORCH)
    script = (
        f"import os\n{first}\nfrom emberpc.export import threads\n"
        "def policy(): return os.environ.get('OMP_WAIT_POLICY')\n"
        "before = policy()\n"
        "with threads.bounded_threads(): print(before, policy(), threads._torch_sleeps)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        **({} if own is None else {"OMP_WAIT_POLICY": own}),
    }
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == expected


def test_importing_the_export_does_not_load_torch() -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}; import emberpc.export.errors; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "False"
