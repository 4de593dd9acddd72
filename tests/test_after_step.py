"""The parts around a training step, each with a step that was made up."""

import signal
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from declip_jax import after_step
from declip_jax.after_step import Evaluate, KeepScores, Moment, Part, Profile, Report, Save, Write
from declip_jax.checkpoint import CheckpointPolicy
from declip_jax.metrics import Meter, read_metrics

SCALARS = {"train/loss": 1.0}
STATE = SimpleNamespace(eval_params={}, model_state={})


class Spy:
    """Stands for whatever a part uses: notes its calls, and answers with `answers`."""

    def __init__(self, **answers):
        self.calls, self._answers = [], answers

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            return self._answers.get(name)

        return call


class At(Part):
    def __init__(self, *steps):
        self._steps = steps

    def due(self, step):
        return step in self._steps


def moment(step, **known) -> Moment:
    return Moment(step, 16 * step, STATE, **known)


def interrupt(asked=False):
    return SimpleNamespace(asked=asked)


def found(top1=0.5):
    return [(SimpleNamespace(name="zeroshot"), {"metrics": {"top1": top1}})]


def test_a_profile_is_of_its_steps(monkeypatch):
    profiler = Spy()
    monkeypatch.setattr(after_step.jax, "profiler", profiler)
    profile = Profile((2, 3), Path("run"))
    for step in (1, 2, 3, 4):
        profile.before(step)
        profiler.calls.append(step)
        profile.after(moment(step))
    profile.close()
    assert profiler.calls == [1, ("start_trace", "run"), 2, 3, ("stop_trace",), 4]


def test_a_profile_that_is_cut_short_is_written(monkeypatch):
    profiler = Spy()
    monkeypatch.setattr(after_step.jax, "profiler", profiler)
    profile = Profile((2, 9), Path("run"))
    profile.before(5)  # of a run that was resumed
    profile.close()
    assert profiler.calls == [("start_trace", "run"), ("stop_trace",)]


def report(meter, progress, asked=False):
    batches = Spy(metrics={"data/bad_share": 0.0})
    others = [At(5), At(7)]
    return Report(3, others, meter, batches, progress, Path("run"), interrupt(asked))


def test_reports_come_every_few_steps_and_where_others_are_due():
    meter, progress = Spy(report=SCALARS), Spy()
    part = report(meter, progress)
    for step in range(1, 9):
        part.before(step)
        now = moment(step)
        part.after(now)
        assert bool(now.scalars) == (step in (3, 5, 6, 7))
    assert [call[1] for call in progress.calls] == [3, 5, 6, 7]
    assert progress.calls[0] == ("show", 3, SCALARS | {"data/bad_share": 0.0})
    # What others do after a report is not counted as training.
    assert meter.calls[:3] == [("report", 3), ("restart",), ("report", 5)]


def test_a_run_that_is_interrupted_reports_its_last_step():
    now = moment(1)
    report(Spy(report=SCALARS), Spy(), asked=True).after(now)
    assert now.scalars


def test_a_loss_that_is_no_number_is_shown_and_ends_the_run():
    progress = Spy()
    part = report(Spy(report={"train/loss": float("nan")}), progress)
    with pytest.raises(FloatingPointError, match="loss is nan at step 3; nothing was saved since"):
        part.after(moment(3))
    assert len(progress.calls) == 1


def evaluate(monkeypatch, best_metric="", tasks=("one",)):
    monkeypatch.setattr(after_step.suite, "run", lambda *args: (found(), ["broken: why"]))
    return Evaluate(4, 10, list(tasks), Spy(), best_metric, Spy(), interrupt())


def test_evaluations_come_every_few_steps_and_at_the_end(monkeypatch):
    part = evaluate(monkeypatch)
    assert [step for step in range(1, 11) if part.due(step)] == [4, 8, 10]
    assert not any(map(evaluate(monkeypatch, tasks=()).due, range(1, 11)))
    now = moment(3)
    part.after(now)
    assert now.found is None and not part.progress.calls


def test_an_evaluation_tells_what_it_found_and_what_failed(monkeypatch):
    part = evaluate(monkeypatch, "val/zeroshot/top5")
    now = moment(4)
    part.after(now)
    assert now.scores == {"val/zeroshot/top1": 0.5}
    said = "\n".join(call[1] for call in part.progress.calls if call[0] == "say")
    assert "Evaluation failed: broken: why" in said and "Evaluation at step 4:\n  val/z" in said
    assert "has no config.checkpoint.best_metric='val/zeroshot/top5'" in said
    assert part.progress.calls[0] == ("end_line",)  # before the bars of an evaluation


def test_reports_and_scores_are_one_row(tmp_path):
    part = Write(tmp_path, 0)
    part.after(moment(1))
    part.after(moment(2, scalars=SCALARS))
    part.after(moment(3, scalars=SCALARS, found=found()))
    part.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 2, **SCALARS}
    assert second == {"step": 3, **SCALARS, "val/zeroshot/top1": 0.5}


def save(best_metric="", asked=False, saved=0, loss=1.0):
    meter = Meter(16, 10)
    meter.add({"loss": jnp.float32(loss)})
    policy = CheckpointPolicy(every=3, keep=1, best_metric=best_metric)
    checkpoints = Spy(save="digest")
    return Save(policy, 10, {}, "data", checkpoints, meter, Path("run"), interrupt(asked), saved)


def test_checkpoints_come_every_few_steps_and_at_the_end():
    part = save()
    for step in range(1, 11):
        now = moment(step, found=found() if step == 4 else None)
        part.after(now)
        assert bool(now.checkpoint) == (step in (3, 6, 9, 10))
    assert [call[2] for call in part.checkpoints.calls] == [48, 96, 144, 160]


@pytest.mark.parametrize("why", [{"best_metric": "val/zeroshot/top1"}, {"asked": True}])
def test_scores_that_choose_a_checkpoint_or_would_be_lost_are_saved(why):
    part, now = save(**why), moment(4, found=found())
    part.after(moment(2))
    part.after(now)
    (call,) = part.checkpoints.calls
    assert call[0] == "save" and call[-1] == {"val/zeroshot/top1": 0.5}
    assert now.checkpoint == "digest"


def test_the_rest_is_saved_once_and_only_if_it_is_numbers():
    part = save(saved=4)
    part.rest(moment(4))
    assert not part.checkpoints.calls
    part.rest(moment(5))
    part.rest(moment(5))
    assert len(part.checkpoints.calls) == 1
    part = save(loss=float("inf"))
    with pytest.raises(FloatingPointError, match="loss is inf at step 5"):
        part.rest(moment(5))
    assert not part.checkpoints.calls


def test_scores_are_kept_of_what_was_saved(monkeypatch):
    kept, progress = [], Spy()
    monkeypatch.setattr(after_step.results, "keep", lambda *args: kept.append(args))
    part = KeepScores(Path("run"), ["absent"], progress)
    part.after(moment(1, found=found()))
    part.after(moment(2, checkpoint="digest"))
    part.after(moment(3, found=found(), checkpoint="digest"))
    assert [args[:3] for args in kept] == [(Path("run"), 3, "digest")] and kept[0][4] == ["absent"]

    def keep(*_):
        raise OSError("disk full")

    monkeypatch.setattr(after_step.results, "keep", keep)
    part.after(moment(3, found=found(), checkpoint="digest"))
    assert progress.calls == [("say", "The scores are in metrics.jsonl alone: disk full")]


def test_the_first_signal_asks_and_a_second_ctrl_c_stops(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), after_step.Interrupt() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked.asked
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopping after this step" in capfd.readouterr().err
