"""One suite for every executor: what is submitted is taken once, in any order; failures carry the user's lines."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ops.simulation.executor import Failure, InProcesses, InThisProcess, executor_of
from shared.errors import FedMQError, SettingsError
from tests.simulation.runs import TASK
from worker.task import Context, Task
from worker.training import Trainer, Training, seed_everything

SEED = 3


def trainer_of():
    """Return a trainer of the task, seeded as the simulator does."""
    seed_everything(SEED)
    return Trainer(Task.load(TASK))


@pytest.fixture(scope="module")
def trainer():
    return trainer_of()


@pytest.fixture(scope="module", params=[1, 2])
def executor(request, trainer):
    with contextlib.closing(executor_of(TASK, trainer, request.param, SEED)) as executor:
        yield executor


numbers = iter(range(10**6))


def training(base, seed, **settings):
    """Return something to train."""
    return Training(Context("client-1", 0, seed, {"share": "1", "shares": "2"} | settings), base)


def test_each_is_taken_once_in_any_order(executor, trainer):
    base = trainer.initial()
    expected = {seed: trainer.train(training(base, seed)) for seed in range(7)}
    submitted = {next(numbers): seed for seed in range(7)}
    for number, seed in submitted.items():
        executor.submit(number, training(base, seed))
    for number, seed in reversed(submitted.items()):
        taken = executor.take(number)
        np.testing.assert_array_equal(taken.delta, expected[seed].delta)
        assert taken.result == expected[seed].result
    with pytest.raises(KeyError):
        executor.take(number)


def test_a_training_does_not_see_the_one_before(executor, trainer):
    first, second = trainer.initial(), trainer.initial()
    second.weights[:] = 1
    order = [(next(numbers), base) for base in (first, second, first)]
    for number, base in order:
        executor.submit(number, training(base, 1))
    deltas = [executor.take(number).delta for number, _ in order]
    np.testing.assert_array_equal(deltas[0], deltas[2])
    assert not np.array_equal(deltas[0], deltas[1])


def test_what_the_task_raises_is_a_failure_with_its_line(executor, trainer):
    base, number = trainer.initial(), next(numbers)
    executor.submit(number, training(base, 1, raises="1"))
    failure = executor.take(number)
    assert failure.message == "train() of " + trainer.task.name + " raised ValueError: share 1 has no data"
    assert 'raise ValueError(f"share {share} has no data")' in failure.trace
    executor.submit(next_number := next(numbers), training(base, 1, invalid="1"))
    assert executor.take(next_number) == Failure(
        f"train() of {trainer.task.name} reports 0 samples and 2 steps: both must be positive", ""
    )


def test_what_is_dropped_is_gone_and_the_rest_goes_on(executor, trainer):
    base, all_numbers = trainer.initial(), [next(numbers) for _ in range(9)]
    for number in all_numbers:
        executor.submit(number, training(base, number))
    for number in all_numbers[::2]:
        executor.drop(number)
    for number in all_numbers[1::2]:
        expected = trainer.train(training(base, number)).delta
        np.testing.assert_array_equal(executor.take(number).delta, expected)
    with pytest.raises(KeyError):
        executor.take(all_numbers[0])


def test_it_says_how_many_keep_it_busy(executor):
    assert executor.window >= 1


@pytest.fixture
def pool():
    with contextlib.closing(InProcesses(TASK, 2, SEED)) as pool:
        yield pool


def files_of(pool):
    """Return the files of weights."""
    return list(Path(pool._folder.name).iterdir())


def test_weights_are_on_the_memory_disk_as_long_as_they_are_needed(pool, trainer):
    for version in range(4):
        base = trainer.initial()
        for _ in range(3):
            pool.submit(number := next(numbers), training(base, version))
            pool.drop(number) if version % 2 else pool.take(number)
    deadline = time.monotonic() + 20
    while len(files_of(pool)) > 1 and time.monotonic() < deadline:  # dropped ones go when they are done
        time.sleep(0.05)
        pool.submit(number := next(numbers), training(base, 0))
        pool.take(number)
    assert len(files_of(pool)) == 1
    folder = Path(pool._folder.name)
    pool.close()
    assert not folder.exists()


def test_a_killed_process_is_one_clear_error_and_nothing_hangs(pool, trainer):
    base, waiting = trainer.initial(), [next(numbers) for _ in range(4)]
    for number in waiting:
        pool.submit(number, training(base, 1, sleep="0.5"))
    while not pool._pool._processes:
        time.sleep(0.05)
    os.kill(next(iter(pool._pool._processes)), signal.SIGKILL)
    with pytest.raises(FedMQError, match="a training process died"):
        for number in waiting:
            pool.take(number)
    with pytest.raises(FedMQError, match="a training process died"):
        pool.submit(next(numbers), training(base, 1))


def test_closing_does_not_wait_for_a_long_training(pool, trainer):
    pool.submit(number := next(numbers), training(trainer.initial(), 1))
    pool.take(number)
    processes = list(pool._pool._processes)
    pool.submit(next(numbers), training(trainer.initial(), 1, sleep="100"))
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 10
    assert not any(psutil.pid_exists(pid) for pid in processes)


def test_what_a_user_has_to_mend_is_raised_here_too(pool, trainer, tmp_path):
    """A worked task that misses its data says so by a SettingsError."""
    task = tmp_path / "missing.py"
    task.write_text(
        "import numpy as np\nfrom shared.errors import SettingsError\n"
        "def build():\n    return {'w': np.zeros(3)}\n"
        "def train(model, context):\n    raise SettingsError('give FEDMQ_DATA')\n"
    )
    trainer = Trainer(Task.load(str(task)))
    for processes in (1, 2):
        executor = executor_of(str(task), trainer, processes, SEED)
        with contextlib.closing(executor), pytest.raises(SettingsError, match="give FEDMQ_DATA"):
            executor.submit(0, training(trainer.initial(), 1))
            executor.take(0)


PARENT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.unit.test_simulation_executor import SEED, TASK, InProcesses, trainer_of, training
if __name__ == "__main__":
    pool, trainer = InProcesses(TASK, 2, SEED), trainer_of()
    base = trainer.initial()
    for number in range(4):
        pool.submit(number, training(base, 1, sleep="0.3"))
    pool.take(3)
    print(pool._folder.name, *pool._pool._processes, flush=True)
    time.sleep(100)
"""


def test_no_process_is_left_behind_by_a_kill(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=str(Path(__file__).parents[2])))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        folder, *processes = parent.stdout.readline().split()
        assert len(processes) == 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (any(map(running, processes)) or Path(folder).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, processes))
    assert not Path(folder).exists()


def running(pid):
    """Tell whether a process is there and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    return False


def test_one_process_is_this_one(trainer):
    assert isinstance(executor_of(TASK, trainer, 1, SEED), InThisProcess)
