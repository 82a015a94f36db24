"""SIGTERM and SIGKILL: what a signal interrupts, and how the run ends and resumes."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from mvc_jax import caption, train
from mvc_jax.training import preemption
from mvc_jax.training.preemption import Preempted


def send():
    """Sends SIGTERM to this process; it is handled before the next line."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def unhandled():
    """Every block restores the handler that it found."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def handled(unhandled):
    with preemption.handled():
        yield


def test_normally_the_signal_interrupts_at_once(handled):
    with pytest.raises(Preempted):
        send()
        pytest.fail("was not interrupted")


def test_except_exception_does_not_catch_it(handled):
    with pytest.raises(Preempted):
        try:
            send()
        except Exception:
            pytest.fail("was caught")


def test_a_deferred_block_sees_the_request_and_ends_by_itself(handled):
    steps = []
    with (
        pytest.raises(Preempted, match="loop after step 3"),
        preemption.deferred() as stop_requested,
    ):
        for step in range(10):
            if stop_requested():
                steps.append("saved")
                send()  # again, as launchers do: not even now
                raise Preempted(f"loop after step {step}")
            if step == 2:
                send()
            steps.append(step)
    assert steps == [0, 1, 2, "saved"]


def test_a_deferred_block_that_ignores_the_request_ends_in_preempted(handled):
    with pytest.raises(Preempted), preemption.deferred():
        with preemption.deferred():
            pass
        send()
    with pytest.raises(Preempted), preemption.deferred() as stop_requested:
        assert stop_requested()


def test_an_error_in_a_deferred_block_stays_that_error(handled):
    with pytest.raises(ZeroDivisionError), preemption.deferred():
        send()
        1 / 0  # noqa: B018


def test_without_a_handler_nothing_is_requested():
    with preemption.deferred() as stop_requested:
        assert not stop_requested()


def test_a_repeated_signal_is_ignored_for_five_seconds(handled, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    with pytest.raises(Preempted):
        send()
    send()
    now[0] += 4
    send()
    now[0] += 6  # a new request
    with pytest.raises(Preempted):
        send()


def test_another_thread_installs_no_handler():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with preemption.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("stop", "where"),
    [
        (lambda *_: send(), "in caption"),
        (lambda *_: (_ for _ in ()).throw(Preempted("caption after step 3")), "step 3"),
    ],
)
def test_the_message_says_where_it_stopped_and_how_to_resume(
    tmp_path, monkeypatch, capsys, stop, where
):
    monkeypatch.setattr(caption, "run", stop)
    command = ["train", f"--workdir={tmp_path}", "--config.stages=caption"]
    monkeypatch.setattr(train.runtime, "set_up", lambda *_: None)
    assert train.main(command) == 75 == os.EX_TEMPFAIL
    price, line = capsys.readouterr().err.splitlines()
    assert price.startswith("1 of 1 stages to do; ")
    assert where in line and line.endswith("rerun the same command to resume")


# Processes that train the toy of test_training under the real `main`.

STEPS = 16


def train_toy(steps, workdir):
    """Runs in a process of the fork server."""
    import test_training

    def run(config, workdir, **_):
        state = test_training.run(workdir, steps, every=1)
        np.savez(workdir / "end.npz", *test_training.leaves(state))

    train.run = run
    return train.main(["train", f"--workdir={workdir}"])


class Run:
    """One start of the program."""

    def __init__(self, server, steps, workdir):
        self.checkpoints = workdir / "checkpoints"
        output = workdir.parent / "output"
        function = "test_preemption:train_toy"
        self._run = server.start(function, steps, str(workdir), folder=output)
        self.process = self._run.pid

    def steps(self):
        names = [path.name for path in self.checkpoints.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def wait(self):
        """Returns (exit code, standard error)."""
        code, _, errors = self._run.wait()
        return code, errors


def ends(workdir):
    with np.load(workdir / "end.npz") as arrays:
        return [arrays[name].tobytes() for name in arrays]


@pytest.fixture(scope="module")
def whole(fork_server, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, errors = Run(fork_server, STEPS, workdir).wait()
    assert code == 0, errors
    return ends(workdir)


def test_sigterm_during_training_saves_the_step_and_the_same_command_resumes(
    fork_server, whole, tmp_path
):
    run = Run(fork_server, STEPS, tmp_path / "run")
    while len(run.steps()) < 2:
        time.sleep(0.005)
    for _ in range(3):  # launchers repeat it
        os.kill(run.process, signal.SIGTERM)
        time.sleep(0.01)
    code, errors = run.wait()
    assert code == 75, errors
    newest = run.steps()[-1]
    last = errors.splitlines()[-1]
    assert last.startswith(f"stopped by SIGTERM in toy after step {newest};")
    assert newest < STEPS
    assert not list(run.checkpoints.glob("*tmp*"))
    code, errors = Run(fork_server, STEPS, tmp_path / "run").wait()
    assert code == 0, errors
    assert ends(tmp_path / "run") == whole


def test_a_run_killed_repeatedly_ends_with_the_same_state(fork_server, whole, tmp_path):
    """SIGKILL or SIGTERM at random moments; a save takes longer than a step."""
    seed = random.SystemRandom().randrange(1000)
    print(f"moments drawn from seed {seed}")
    draw = random.Random(seed)
    codes = []
    for stop in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        run = Run(fork_server, STEPS, tmp_path / "run")
        had = run.steps()
        while run.steps() == had:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(run.process, stop)
        codes.append(run.wait()[0])
    assert run.steps()[-1] < STEPS
    assert codes == [-signal.SIGKILL, 75, -signal.SIGKILL]
    code, errors = Run(fork_server, STEPS, tmp_path / "run").wait()
    assert code == 0, errors
    assert "damaged" not in errors
    assert ends(tmp_path / "run") == whole
