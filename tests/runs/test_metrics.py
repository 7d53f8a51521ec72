"""The table of metrics has every key that a round's line may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.rl.objective import REPORTED_TERMS
from grpo_fed.runs.metrics import METRICS, REPORTED, TEXTS, TRAINING_RETURN, find_metric, is_timed, is_tracked
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord, SiteRecord, record_to_line
from grpo_fed.tasks.scores import ReturnScale


def full_record() -> RoundRecord:
    """Make a record of a round in which every field is in use."""
    clients = [
        ClientRecord(
            "a",
            "carts",
            64,
            3,
            dict.fromkeys(REPORTED, 0.5),
            20.0,
            0.1,
            ("actor",),
            {"torso.0": 1},
            last_kl={"joint": 0.1, "torso.0": 0.2},
            rho={"torso.0": 0.7},
            rho_by_group={"torso.0.weight": 0.7, "torso.0.bias": 0.123456},
            left={"torso.0.weight": 0.7},
            returned={"actor": 1.5},
            age=2,
            adapted=(21.0, 22.5),
            logged={"callback/heat": 2.0},
            cost=0.5,
        ),
        ClientRecord("b", "carts", failure=Failure("late", "no answer in 5 s")),
    ]
    step = AcceptedStep((AcceptedBlock("torso.0", 0.1, 0.2, 0.5, 0.3),), 0.1, 0.4, 0.6, ("a",))
    server = ServerRecord(step, {"joint": 0.1, "torso.0": 0.2}, 1, 2, 3, ("krum: took a",), rho_limit=0.5)
    cost = PrivacyCost(1.5, 1e-3, 8.0, 4, "central", 0.5, {"torso.0": 0.1})
    server = dataclasses.replace(server, merge_length=0.5, virtual_seconds=1.5, privacy=cost)
    site = SiteRecord("north", ("a", "b"), step, ("actor",), {"torso.0": 0.7}, {"actor": 0.7}, comparison={"own": 1.0})
    return RoundRecord(2, 9, 0.5, 64, clients, server, (site,), {"callback/heat": 3.0})


def mixed_record() -> RoundRecord:
    """Make a record of two carts and a pendulum: returns 10, 30 and -500, of which 10 and -1000 are those of random
    actions and 110 and 0 the references.
    """
    scales = {"carts": ReturnScale("Cart-v0", 10.0, 110.0), "pole": ReturnScale("own:make", -1000.0, 0.0)}
    clients = [
        ClientRecord("a", "carts", 64, 1, {TRAINING_RETURN: 10.0, "losses/entropy": 0.5}, 10.0, adapted=(20.0,)),
        ClientRecord("b", "carts", 64, 1, {TRAINING_RETURN: 20.0, "losses/entropy": 0.7}, 30.0, adapted=(40.0,)),
        ClientRecord("c", "pole", 64, 1, {TRAINING_RETURN: -200.0, "losses/entropy": 0.9}, -500.0, adapted=(-400.0,)),
    ]
    sites = (SiteRecord("carts", ("a", "b")), SiteRecord("mixed", ("b", "c")))
    server = ServerRecord(None, {}, 1, 2, 3)
    return RoundRecord(2, 9, 0.5, 64, clients, server, sites, scales=scales)


def keys_of(line: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a line, those of its clients too."""
    yield from line
    for client in line["clients"].values():
        yield from client


@pytest.mark.parametrize("server", [True, False], ids=["federation", "alone"])
def test_every_key_of_a_line_is_in_the_table(server: bool):
    record = full_record()
    line = record_to_line(record if server else dataclasses.replace(record, server=None))
    assert not [key for key in keys_of(line) if find_metric(key) is None and key not in TEXTS]


def test_every_row_of_the_table_is_a_key_of_some_line():
    lines = [record_to_line(record) for record in (full_record(), mixed_record())]
    keys = {key for line in lines for key in keys_of(line)}
    assert set(METRICS) <= {key if key in METRICS else key[: key.find("/") + 1] for key in keys}


def test_returns_of_unlike_environments_are_normalised_and_never_averaged():
    line = record_to_line(mixed_record())
    # normalised: evaluation 0, 0.2 and 0.5, whose interquartile mean is that of all three; training 0, 0.1 and 0.8
    assert line["eval/normalised_iqm"] == pytest.approx(0.7 / 3)
    assert (line["eval/normalised_min"], line["charts/normalised_return"]) == (0.0, pytest.approx(0.3))
    assert (line["env/Cart-v0/eval/episodic_return"], line["env/Cart-v0/charts/episodic_return"]) == (20.0, 15.0)
    assert line["env/own.make/eval/episodic_return"] == -500.0
    assert line["env/Cart-v0/eval/adapted_return"] == 30.0
    assert (line["eval/score_iqm"], line["eval/score_min"]) == (None, None)
    assert not {"eval/episodic_return", TRAINING_RETURN, "eval/adapted_return", "adaptation/1"} & line.keys()
    assert line["losses/entropy"] == pytest.approx(0.7)  # what is no return is averaged
    assert line["site/carts/eval/episodic_return"] == 20.0
    assert "site/mixed/eval/episodic_return" not in line
    assert line["clients"]["c"]["eval/episodic_return"] == -500.0


def test_an_unknown_scale_leaves_each_environment_its_own_mean():
    record = mixed_record()
    record = dataclasses.replace(record, scales={**record.scales, "pole": ReturnScale("own:make")})
    line = record_to_line(record)
    assert line["env/Cart-v0/eval/episodic_return"] == 20.0
    assert not {"eval/normalised_iqm", "charts/normalised_return"} & line.keys()


def test_a_line_has_rho_by_group_and_what_was_left_and_returned_to():
    line = record_to_line(full_record())
    client = line["clients"]["a"]
    assert client["rho_by_group"] == {"torso.0.weight": 0.7, "torso.0.bias": 0.1235}
    assert (client["left"], client["returned"]) == ({"torso.0.weight": 0.7}, {"actor": 1.5})
    assert (line["rho/torso.0"], line["fed/rho_limit"]) == (0.7, 0.5)
    assert not {"rho_by_group", "left", "returned"} & line["clients"]["b"].keys()


def test_a_line_has_the_metrics_of_a_site_and_what_it_left():
    line = record_to_line(full_record())
    keys = {key.removeprefix("site/north/") for key in line if key.startswith("site/north/")}
    step = {f"{kind}/torso.0" for kind in ("kl", "alpha", "budget", "wanted")} | {
        f"{kind}/joint" for kind in ("kl", "budget", "wanted")
    }
    assert keys == {"eval/episodic_return", TRAINING_RETURN, "fed/personal_groups", "rho/torso.0", *step}
    assert line["site/north/eval/episodic_return"] == 20.0
    assert line["sites"] == {
        "north": {"personal_groups": ["actor"], "left": {"actor": 0.7}, "comparison": {"own": 1.0}}
    }


def test_the_whole_has_the_greatest_rho_of_its_clients():
    clients = [ClientRecord(name, "cart", rho=rho) for name, rho in (("a", {"x": 0.2, "y": -0.4}), ("b", {"x": 0.9}))]
    line = record_to_line(RoundRecord(5, 9, 0.5, 64, clients, ServerRecord(None, {}, 1, 2, 3)))
    assert (line["rho/x"], line["rho/y"]) == (0.9, -0.4)


def test_held_out_clients_count_in_the_adaptation_of_the_whole_alone():
    clients = [
        ClientRecord("a", "carts", score=100.0, adapted=(110.0, 120.0)),
        ClientRecord("b", "new", score=20.0, adapted=(40.0, 60.0), trains=False),
        ClientRecord("c", "new", score=10.0, adapted=(80.0, 100.0), trains=False),
    ]
    line = record_to_line(RoundRecord(5, 9, 0.5, 64, clients, ServerRecord(None, {}, 1, 2, 3)))
    assert (line["eval/score_iqm"], line["eval/score_min"], line["eval/episodic_return"]) == (100.0, 100.0, 100.0)
    assert [line[f"adaptation/{updates}"] for updates in range(3)] == [15.0, 60.0, 80.0]
    assert line["eval/adapted_return"] == 80.0
    assert (line["task/carts"], line["task/new"]) == (100.0, 15.0)
    assert line["clients"]["a"]["adaptation/2"] == line["clients"]["a"]["eval/adapted_return"] == 120.0


def test_without_held_out_clients_the_adaptation_of_the_whole_is_of_all():
    clients = [
        ClientRecord(name, "carts", score=score, adapted=(2 * score,)) for name, score in (("a", 1.0), ("b", 3.0))
    ]
    line = record_to_line(RoundRecord(5, 9, 0.5, 64, clients, ServerRecord(None, {}, 1, 2, 3)))
    assert (line["adaptation/0"], line["adaptation/1"], line["eval/adapted_return"]) == (2.0, 4.0, 4.0)


def test_a_client_may_report_every_loss():
    assert {f"losses/{name}" for name in (*REPORTED_TERMS, "explained_variance", "kl", "kl_reference")} == {
        key for key in REPORTED if key.startswith("losses/")
    }


def test_an_unknown_key_has_no_row_and_is_not_tracked():
    assert find_metric("secrets/password") is None
    assert not is_tracked("secrets/password")
    assert not is_timed("secrets/password")


def test_only_times_and_rates_depend_on_the_machine():
    timed = {"time/round_s", "charts/SPS", "charts/seconds", "charts/tokens_per_second"}
    assert {key for key in METRICS if is_timed(key)} == timed
