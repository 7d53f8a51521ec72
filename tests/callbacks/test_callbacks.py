"""Callbacks: when they are called, what they may do, and how they are named, refused and resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fed import Scenario, resume, run
from grpo_fed.callbacks import CallbackError, CallbackList, KeepBest, RunControl, StopOnPlateau
from grpo_fed.federation.messages import Evaluate, Train
from grpo_fed.federation.rounds import Federation
from grpo_fed.rl.make import make_learners
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.folder import open_unfinished
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import ClientRecord, RoundRecord, record_to_line
from grpo_fed.runs.results import Result
from tests.support.numeric_clients import NumericTransport, numeric_federation
from tests.support.small_federation import TINY


class Diary:
    """Writes down at which moments it is called, and does something at one of them."""

    def __init__(self, do: dict[tuple[str, int], Callable[[RunControl], object]] | None = None) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.do = do or {}
        self.rounds = 0

    def _note(self, moment: str, run: RunControl, *more: object) -> None:
        self.entries.append((moment, run.round, *more))
        self.do.get((moment, run.round), lambda run: None)(run)

    def on_run_start(self, run: RunControl) -> None:
        self._note("run_start", run)

    def on_round_start(self, run: RunControl) -> None:
        self.rounds += 1
        run.log("rounds", self.rounds)
        self._note("round_start", run)

    def on_client_trained(self, run: RunControl, work: Any) -> None:
        run.log("mean", work.mean, client=work.client)
        self._note("client", run, work.client, work.steps)

    def on_merge(self, run: RunControl, merged: Any) -> None:
        self._note("merge", run, tuple(merged.weights))

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        self._note("round_end", run, bool(record.scores))

    def on_run_end(self, run: RunControl, result: Result) -> None:
        self._note("run_end", run, result.status)

    def state(self) -> int:
        return self.rounds

    def restore(self, state: Any) -> None:
        self.rounds = state


def go(
    *callbacks: object, overrides: tuple[str, ...] = ("rounds=3",), count: int = 2, out: Path | None = None, **more: Any
) -> tuple[Result, NumericTransport, list[RoundRecord]]:
    """Run a federation of numeric clients with callbacks."""
    scenario, shared_blocks, clients = numeric_federation(*overrides, count=count)
    federation = Federation(scenario, shared_blocks, clients, out, callbacks=callbacks, **more)
    records: list[RoundRecord] = []
    return federation.run(records.append), clients, records


# The moments ---------------------------------------------------------------------------------------------------------


def test_the_moments_come_in_the_order_of_the_protocol():
    diary = Diary()
    go(diary, overrides=("rounds=1",))
    assert diary.entries == [
        ("run_start", 0),
        ("round_end", 0, True),
        ("round_start", 1),
        ("client", 1, "c-0", 128),
        ("client", 1, "c-1", 128),
        ("merge", 1, ("c-0", "c-1")),
        ("round_end", 1, True),
        ("run_end", 1, "finished"),
    ]


def test_a_round_that_is_evaluated_with_the_next_one_ends_in_the_next_one():
    diary = Diary()
    _, _, records = go(diary, overrides=("rounds=2", "evaluate.every=1"), evaluate_with_next_round=True)
    moments = [entry[:2] for entry in diary.entries if entry[0] in ("round_start", "round_end")]
    assert moments == [("round_start", 1), ("round_end", 0), ("round_start", 2), ("round_end", 1), ("round_end", 2)]
    assert [record.logged.get("callback/rounds") for record in records] == [None, 1, 2]


def test_what_callbacks_log_is_in_the_line_of_its_round():
    *_, records = go(Diary({("round_end", 2): lambda run: run.log("late", float("inf"))}))
    assert [record.logged.get("callback/rounds") for record in records] == [None, 1, 2, 3]
    lines = [record_to_line(record) for record in records]
    means = [line["clients"]["c-1"].get("callback/mean") for line in lines]
    assert means == [line["clients"]["c-1"].get("charts/episodic_return") for line in lines]
    assert lines[2]["callback/mean"] == pytest.approx(lines[2]["charts/episodic_return"])
    assert [line.get("callback/late", "none") for line in lines] == ["none", "none", None, "none"]


def test_a_callback_sees_what_those_before_it_have_logged():
    seen = []

    class Reader:
        def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
            seen.append(record.logged.get("callback/x"))

    go(Diary({("round_end", 1): lambda run: run.log("x", 7)}), Reader(), overrides=("rounds=1",))
    assert seen == [None, 7]


def test_the_shared_blocks_that_a_callback_sees_are_copies():
    def spoil(run: RunControl) -> None:
        for array in run.shared.values():
            array[:] = np.nan

    _, clients, _ = go(Diary({("round_end", 1): spoil}))
    assert all(np.isfinite(train.start.shared).all() for _, train in clients.sent_of(Train))


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["round_start", "client", "merge", "round_end"])
@pytest.mark.parametrize("delayed", [False, True])
def test_a_stopped_run_ends_with_its_round_evaluated_and_its_reason(tmp_path: Path, moment: str, delayed: bool):
    diary = Diary({(moment, 2): lambda run: run.stop("it is\nenough")})
    result, clients, records = go(
        diary, overrides=("rounds=5",), out=tmp_path / "run", evaluate_with_next_round=delayed
    )
    assert (result.status, result.reason, result.rounds, result.error) == ("stopped", "it is enough", 2, None)
    assert records[-1].round == 2
    assert all(client.after is not None and client.sampled is not None for client in result.clients.values())
    last = [each.plan.number for _, each in clients.sent_of(Evaluate) if each.plan.deterministic]
    assert last == ([2, 2] if delayed else [0, 0, 2, 2])
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (document["status"], document["reason"]) == ("stopped", "it is enough")
    with pytest.raises(ValueError, match=r"stopped by a callback: it is enough; go on .* --continue"):
        open_unfinished(tmp_path / "run")


def test_a_stop_in_the_last_round_is_no_early_end():
    result, *_ = go(Diary({("round_end", 3): lambda run: run.stop("late")}))
    assert (result.status, result.reason) == ("finished", None)


def test_the_first_reason_counts():
    control = RunControl(Scenario.loads(TINY), None, dict)
    control.stop("first")
    control.stop("second")
    assert control.stop_reason == "first"
    with pytest.raises(ValueError, match="give a reason in words"):
        control.stop(" ")


# The learning rate ---------------------------------------------------------------------------------------------------


def half(run: RunControl) -> None:
    run.learning_rate = run.learning_rate / 2


@pytest.mark.parametrize("mode", ["sync", "buffered"])
def test_a_learning_rate_goes_to_the_clients_as_a_factor(mode: str):
    overrides = ("rounds=3", f"round.mode={mode}", *(["round.buffer=1.0"] if mode == "buffered" else []))
    diary = Diary({("round_start", 2): half, ("round_end", 2): half})
    _, clients, _ = go(diary, overrides=overrides)
    assert [train.rate for _, train in clients.sent_of(Train)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_factor_of_the_learning_rate_trains_like_that_learning_rate():
    def parameters(rate: float, factor: float) -> np.ndarray:
        (learner,) = make_learners(Scenario.loads(TINY, overrides=[f"objective.learning_rate={rate}"]))
        learner.scale_learning_rates(np.full(3, 1.0))
        learner.scale_learning_rates(np.full(3, factor))
        learner.train(64)
        learner.close()
        return learner.parameters.numpy()

    expected = parameters(2e-3, 1.0)
    np.testing.assert_array_equal(parameters(1e-3, 2.0), expected)
    assert not np.array_equal(parameters(1e-3, 1.0), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_is_above_0(value: float):
    control = RunControl(Scenario.loads(TINY), None, dict)
    with pytest.raises(ValueError, match="must be a number above 0"):
        control.learning_rate = value


# Resume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delayed", [False, True])
def test_a_resumed_run_ends_with_the_bits_and_the_states_of_one_that_was_not_stopped(tmp_path: Path, delayed: bool):
    overrides = ("rounds=4", "evaluate.every=1", "checkpoint.keep=4")

    def lines(folder: Path) -> list[dict[str, Any]]:
        read = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        timed = ("time/round_s", "charts/SPS", "comm/MB_total", "comm/MB_up", "comm/MB_down")
        return [{key: value for key, value in line.items() if key not in timed} for line in read]

    def begin(folder: Path, clients: NumericTransport, watch: Any, after: Any = None) -> Result:
        scenario, shared_blocks, _ = numeric_federation(*overrides, count=2)
        federation = Federation(
            scenario,
            shared_blocks,
            clients,
            folder,
            after,
            evaluate_with_next_round=delayed,
            client_files=lambda number: clients.write(folder / "states", number),
            callbacks=[Diary({("round_start", 2): half}), StopOnPlateau(patience=9)],
        )
        return federation.run(watch)

    def interrupt(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    whole = numeric_federation(*overrides, count=2)[2]
    result = begin(tmp_path / "whole", whole, lambda record: None)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "cut", numeric_federation(*overrides, count=2)[2], interrupt)
    _, after = open_unfinished(tmp_path / "cut")
    assert after is not None
    again = numeric_federation(*overrides, count=2)[2]
    again.read(after.files, after.original_names)
    resumed = begin(tmp_path / "cut", again, lambda record: None, after)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [line["callback/rounds"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4]
    assert resumed.returns.tolist() == result.returns.tolist()
    assert [train.rate for _, train in again.sent_of(Train)] == [0.5] * len(again.sent_of(Train))


def test_a_run_goes_on_with_its_callbacks_or_not_at_all(tmp_path: Path):
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    class Other:
        def on_round_start(self, run: RunControl) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        run(Scenario.loads(TINY), tmp_path / "run", stop, workers=0, callbacks=[Diary()])
    with pytest.raises(ValueError, match=r"had the callbacks tests.callbacks.test_callbacks:Diary, and now has none"):
        resume(tmp_path / "run")
    prepare_continuation(tmp_path / "run", ["rounds=3"], tmp_path / "on")
    assert resume(tmp_path / "on", callbacks=[Other()]).status == "finished"  # a run with changes may have others


# Names and errors ----------------------------------------------------------------------------------------------------


class Early:
    """Ends a run in a round."""

    def __init__(self, round: int = 2) -> None:
        self.round = round

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        if record.round == self.round:
            run.stop(f"round {self.round}")


class Typo:
    def on_round_ends(self, run: RunControl, record: RoundRecord) -> None: ...


class Half:
    def on_round_start(self, run: RunControl) -> None: ...

    def state(self) -> int:
        return 1


HERE = "tests.callbacks.test_callbacks"


@pytest.mark.parametrize("entry", [f'["{HERE}:Early"]', f'[{{ path = "{HERE}:Early", kwargs = {{ round = 1 }} }}]'])
def test_a_scenario_names_callbacks_with_their_arguments(entry: str):
    scenario = Scenario.loads(TINY, overrides=[f"callbacks={entry}"])
    assert Scenario.loads(scenario.dumps()) == scenario
    (callback,) = CallbackList(scenario).callbacks.values()
    assert (type(callback).__name__, callback.round) == ("Early", 1 if "kwargs" in entry else 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ('["early"]', 'callbacks.0: must be "package.module:Name"'),
        ("[3]", 'must be "package.module:Name", or a table of path and kwargs'),
        ('[{ path = "a:B", args = {} }]', "has args: unknown key; known here: path kwargs"),
        ("[{ kwargs = {} }]", "must have a path"),
    ],
)
def test_an_entry_that_is_no_callback_is_refused(entry: str, text: str):
    with pytest.raises(ValueError, match=re.escape(text)):
        Scenario.loads(TINY, overrides=[f"callbacks={entry}"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (f'["{HERE}:Nothing"]', f"callbacks.0 = {HERE}:Nothing: cannot be imported: AttributeError"),
        (f'[{{ path = "{HERE}:Early", kwargs = {{ n = 1 }} }}]', "unexpected keyword argument 'n'"),
        (Typo(), r"on_round_ends is no moment of a run; did you mean on_round_end\?"),
        (Half(), "only one of the methods state and restore"),
        (object(), "has none of the methods on_run_start"),
        (Early, r"is a class; give an instance of it, Early\(\.\.\.\)"),
        ('["grpo_fed.callbacks:StopOnPlateau"]', "would never stop; give it a patience or a target"),
        (
            '[{ path = "grpo_fed.callbacks:KeepBest", kwargs = { metric = "eval/score_iq" } }]',
            r"there is no such metric; did you mean eval/score_iqm\?",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path: Path, given: Any, text: str):
    overrides = [f"callbacks={given}"] if isinstance(given, str) else []
    with pytest.raises(ValueError, match=text):
        run(
            Scenario.loads(TINY, overrides=overrides),
            tmp_path / "run",
            workers=0,
            callbacks=[] if isinstance(given, str) else [given],
        )
    assert not (tmp_path / "run").exists()


def test_an_exception_in_a_callback_names_it_its_moment_and_its_round(tmp_path: Path):
    diary = Diary({("merge", 2): lambda run: run.log("a", 1) or 1 / 0})
    text = f"callback {HERE}:Diary: on_merge, round 2: ZeroDivisionError: division by zero"
    with pytest.raises(CallbackError, match=text):
        go(diary, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"
    assert diary.entries[-1] == ("run_end", 2, "failed")


def test_a_state_that_is_no_json_is_refused():
    diary = Diary()
    diary.rounds = object()  # type: ignore[assignment]
    with pytest.raises(CallbackError, match="Diary: its state cannot be saved as JSON"):
        CallbackList(Scenario.loads(TINY), [diary]).saved(RunControl(Scenario.loads(TINY), None, dict))


@pytest.mark.parametrize(
    ("name", "client", "text"),
    [("", None, "letters, digits"), ("a:b", None, "letters, digits"), ("a", "bat", "no such client; did you mean cat")],
)
def test_a_metric_has_a_name_that_files_and_mlflow_take(name: str, client: str | None, text: str):
    control = RunControl(Scenario.loads(TINY), None, dict)
    with pytest.raises(ValueError, match=text):
        control.log(name, 1.0, client)


def test_objects_are_refused_where_the_server_is_another_process(tmp_path: Path):
    with pytest.raises(ValueError, match=f"name {HERE}:Diary in the scenario"):
        run(Scenario.loads(TINY), tmp_path, engine="flower-sim", callbacks=[Diary()])


def test_clients_that_learn_alone_have_no_server_for_callbacks():
    from grpo_fed import train

    with pytest.raises(ValueError, match="callbacks are called by a federation's server; use grpo-fed run"):
        train(Scenario.loads(TINY, overrides=[f'callbacks=["{HERE}:Early"]']))


# Those that ship -----------------------------------------------------------------------------------------------------


def record_of(round: int, value: float | None) -> RoundRecord:
    """Make a record with a training return."""
    metrics = {} if value is None else {"charts/episodic_return": value}
    return RoundRecord(round, 9, 0.0, 0, [ClientRecord("ant", "ant", steps=1, metrics=metrics)])


def test_a_plateau_is_so_many_values_in_a_row_that_are_no_better():
    control = RunControl(Scenario.loads(TINY), None, dict)
    plateau = StopOnPlateau(patience=2, margin=0.5)
    stopped = []
    for round, value in enumerate([99.0, 1.0, 1.4, None, 1.6, 1.7, 2.2, 1.0, 1.0]):
        plateau.on_round_end(control, record_of(round, value))
        stopped.append(control.stop_reason is not None)
    # 99 is of round 0; 1.4 is not 0.5 better than 1; 1.6 is; 1.7 is stale; 2.2 is 0.6 better than 1.6
    assert stopped == [False] * 8 + [True]
    assert control.stop_reason == "charts/episodic_return was not better than 2.2 for 2 rounds"


def test_a_target_is_reached_from_above_where_lower_is_better():
    control = RunControl(Scenario.loads(TINY), None, dict)
    target = StopOnPlateau(target=3.0, mode="min")
    target.on_round_end(control, record_of(1, 3.1))
    assert control.stop_reason is None
    target.on_round_end(control, record_of(2, 2.5))
    assert control.stop_reason == "charts/episodic_return = 2.5 has reached 3"


def test_the_best_policies_are_kept_and_can_be_played(tmp_path: Path):
    scenario = Scenario.loads(TINY, overrides=["rounds=3", "evaluate.every=1"])
    watched: list[RoundRecord] = []
    run(scenario, tmp_path / "run", watched.append, workers=0, callbacks=[KeepBest("charts/SPS", "max"), Keeper()])
    facts = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    best = Keeper.kept[facts["round"]]
    for name, expected in best.items():
        kept = load_policy(tmp_path / "run" / "best", name)
        np.testing.assert_array_equal(kept.parameters.numpy().ravel(), expected)
    assert facts["round"] == max(watched[1:], key=lambda record: record.steps / record.seconds).round


class Keeper:
    """Saves the policies of every round beside the run."""

    kept: dict[int, dict[str, np.ndarray]] = {}  # noqa: RUF012

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        assert run.folder is not None
        folder = run.folder.parent / f"kept-{record.round}"
        folder.mkdir()
        assert not run.save_policies(folder)
        (folder / "scenario.toml").write_text(run.scenario.dumps())
        self.kept[record.round] = {
            name: load_policy(folder, name).parameters.numpy().ravel() for name in ("ant", "bee", "cat")
        }


def test_best_policies_need_a_folder_and_evaluations(tmp_path: Path):
    with pytest.raises(CallbackError, match=r"metric = 'eval/score_iqm' is of evaluations, and evaluate.every = 0"):
        go(KeepBest(), out=tmp_path / "a")
    with pytest.raises(CallbackError, match="the run has no folder to keep policies in"):
        go(KeepBest("charts/episodic_return"))
    with pytest.raises(CallbackError, match="the clients of this engine keep their policies"):
        go(KeepBest("charts/episodic_return"), out=tmp_path / "b")


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from grpo_fed.callbacks import TensorBoard

    _, _, records = go(TensorBoard(), Diary(), out=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = {point.step: point.value for point in events.Scalars("c-1/charts/episodic_return")}
    expected = {record.round: record.returns["c-1"] for record in records if record.returns}
    assert points == pytest.approx(expected)
    assert [point.value for point in events.Scalars("callback/rounds")] == [1, 2, 3]
    with pytest.raises(CallbackError, match="the run has no folder"):
        go(TensorBoard())
