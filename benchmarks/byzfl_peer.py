"""Compare our robust merge rules and mixing with those of ByzFL, on the same random points.

ByzFL brings torchvision, whose wheel must fit torch's own build and otherwise keeps transformers from being imported.
It is therefore no development dependency. It gets an environment of its own, which sees the packages of this one:

    python -m venv /tmp/byzfl
    OURS=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    echo "$OURS" > "$(echo /tmp/byzfl/lib/python*/site-packages)/ours.pth"
    /tmp/byzfl/bin/python -m pip install --no-deps "byzfl>=0.0.11,<0.1"
    /tmp/byzfl/bin/python -m benchmarks.byzfl_peer

ByzFL's aggregators themselves need numpy, scipy and torch alone, so they are imported without the package's `__init__`,
and without torchvision. It prints a table with the largest difference of each rule and writes
benchmarks/results/byzfl.json. The command fails if a difference exceeds 1e-6.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from grpo_fed.aggregation.merge import (
    Replies,
    Reply,
    centred_clipping,
    geometric_median,
    krum,
    median,
    trimmed_mean,
)
from grpo_fed.aggregation.merge.mixing import mix_replies
from grpo_fed.policy.groups import Groups

FILE = Path(__file__).parent / "results" / "byzfl.json"
CLIENTS, HOSTILE, PARAMETERS = 10, 3, 1000
BOUND = 1e-6
"""The largest difference of a parameter that counts as equal: our rules give float32."""


def main() -> None:
    """Compare on as many draws as `--draws` says, print the differences, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    draws = parser.parse_args().draws
    theirs = load_byzfl()
    largest: dict[str, float] = {}
    for seed in range(draws):
        for rule, difference in differences(theirs, draw_points(seed)).items():
            largest[rule] = max(largest.get(rule, 0.0), difference)
    record = {
        "byzfl": version("byzfl"),
        "clients": CLIENTS,
        "hostile": HOSTILE,
        "parameters": PARAMETERS,
        "draws": draws,
        "largest": largest,
    }
    print("\n".join(format_table(record)))
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    if max(largest.values()) > BOUND:
        sys.exit(f"a rule differs by more than {BOUND:g}")


def format_table(record: Mapping[str, Any]) -> Iterator[str]:
    """Write the largest difference of each rule."""
    yield f"ByzFL {record['byzfl']}, {record['parameters']} parameters, {record['draws']} draws."
    yield ""
    yield "| rule | largest difference |"
    yield "| --- | --- |"
    for rule, difference in record["largest"].items():
        yield f"| `{rule}` | {difference:.1e} |"


def load_byzfl() -> Callable[[str], Any]:
    """Return what imports a module of ByzFL's aggregators without the `__init__` of its packages."""
    spec = find_spec("byzfl")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("byzfl is not installed here: benchmarks/byzfl_peer.py says how to install it beside this environment")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name, path in (("byzfl", folder), ("byzfl.aggregators", folder / "aggregators")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return lambda name: importlib.import_module(f"byzfl.aggregators.{name}")


def draw_points(seed: int) -> np.ndarray:
    """Draw the points of clients, the hostile ones away from the others, [K, P] float32."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(CLIENTS, PARAMETERS))
    points[:HOSTILE] += 2 * generator.normal(size=(1, PARAMETERS))
    return points.astype(np.float32)


def differences(theirs: Callable[[str], Any], points: np.ndarray) -> Mapping[str, float]:
    """Return the largest difference of a parameter for each rule.

    ByzFL's Krum sums over one neighbour less than the paper's n - f - 2, so it gets one hostile client more than ours.
    Our clipping goes by the median length of the updates, ByzFL's by a length, so this median is handed to it.
    """
    rules, exact = theirs("aggregators"), points.astype(np.float64)
    shared, size = torch.zeros(PARAMETERS), torch.tensor([float(PARAMETERS)])
    groups = Groups(("all",), torch.zeros(PARAMETERS, dtype=torch.long), size, ("all",))
    replies = Replies.of(Reply(f"c{row:02}", torch.from_numpy(point), 1.0) for row, point in enumerate(points))
    lengths = np.sort(np.linalg.norm(exact, axis=1))
    tau = 0.5 * float(lengths[(CLIENTS - 1) // 2])
    pairs = {
        "median": (median(replies, shared, groups), rules.Median()),
        "trimmed-mean": (
            trimmed_mean(replies, shared, groups, fraction=HOSTILE / CLIENTS),
            rules.TrMean(HOSTILE),
        ),
        "krum": (krum(replies, shared, groups, byzantine=HOSTILE - 1), rules.Krum(HOSTILE)),
        "multi-krum": (
            krum(replies, shared, groups, byzantine=HOSTILE - 1, keep=CLIENTS - HOSTILE),
            rules.MultiKrum(HOSTILE),
        ),
        "geometric-median": (
            geometric_median(replies, shared, groups),
            rules.GeometricMedian(nu=1e-9, T=3000),
        ),
        "centred-clipping": (
            centred_clipping(replies, shared, groups, radius=0.5),
            rules.CenteredClipping(L=1, tau=tau),
        ),
    }
    found = {
        name: float(np.abs(ours.point.double().numpy() - peer(exact)).max()) for name, (ours, peer) in pairs.items()
    }
    mixed = np.stack([reply.point.double().numpy() for reply in mix_replies(replies, shared, HOSTILE).all])
    found["mixing"] = float(np.abs(mixed - theirs("preaggregators").NNM(HOSTILE)(exact)).max())
    return found


if __name__ == "__main__":
    main()
