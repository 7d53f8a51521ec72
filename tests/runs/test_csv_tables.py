"""A run as tables: a row for each client and round, and a row for each client."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas
import pytest

from grpo_fed.runs.csv_tables import read_pandas, write_csv
from grpo_fed.runs.results import ClientResult, Result
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = SampleRun(
        returns=lambda number, client: None if (number, client) == (1, 1) else 10.0 * number + client,
        departed=lambda number, client: ("actor",) if client == 1 else (),
    )
    return write_run(tmp_path, sample_scenario([("cart", 2, "CartPole-v1")], "rounds = 3"), made)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_every_client_has_a_row_for_every_round(folder: Path):
    rows = rows_of(write_csv(folder)[0])
    assert [(row["round"], row["client"]) for row in rows] == [(str(r), f"cart-{k}") for r in (1, 2, 3) for k in (0, 1)]
    assert [row["charts/episodic_return"] for row in rows] == ["10.0", "", "20.0", "21.0", "30.0", "31.0"]
    assert {row["entry"] for row in rows} == {"cart"}
    assert len({row["server:comm/MB_up"] for row in rows if row["round"] == "2"}) == 1


def test_every_client_has_a_row_of_its_results(folder: Path):
    rows = rows_of(write_csv(folder)[1])
    assert [(row["client"], row["env"], row["departed"]) for row in rows] == [
        ("cart-0", "CartPole-v1", ""),
        ("cart-1", "CartPole-v1", "actor"),
    ]
    assert all(float(row["return"]) >= 0 for row in rows)


def test_pandas_reads_the_same_from_the_folder_and_from_the_files(folder: Path):
    for by, path in zip(("round", "client"), write_csv(folder), strict=True):
        table, written = read_pandas(folder, by), pandas.read_csv(path)
        assert list(table) == list(written)
        for name in table.select_dtypes("number"):
            assert np.allclose(table[name].astype(float), written[name].astype(float), equal_nan=True)
    with pytest.raises(ValueError, match="by = 'day': must be round or client"):
        read_pandas(folder, "day")  # type: ignore[arg-type]


def test_a_result_gives_its_table(folder: Path):
    client = ClientResult("CartPole-v1", 10.0, 1.0, 1.0, 20.0, 7, 1536)
    result = Result("a", 0, "cpu", "finished", None, 3, 65.0, 3072, {"cart-0": client}, folder)
    means = result.to_pandas().groupby("round")["charts/episodic_return"].mean()
    assert means.to_dict() == {1: 10.0, 2: 20.5, 3: 30.5}
    assert list(result.to_pandas("client")["client"]) == ["cart-0", "cart-1"]
    homeless = Result("a", 0, "cpu", "finished", None, 3, 65.0, 3072, {"cart-0": client}, None)
    with pytest.raises(ValueError, match="no folder to read its rounds from: give it one with out="):
        homeless.to_pandas()
