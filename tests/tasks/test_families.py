"""The families against gymnasium's environments, against themselves one env copy at a time, and numbers by hand."""

from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces.utils import flatten
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from grpo_fed.tasks.families import FAMILIES, FamilyVectorEnv, all_parameters
from grpo_fed.tasks.families.generators import make_generators, seed_states
from grpo_fed.tasks.families.random_mdp import RandomMDP

CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
IDS = list(FAMILIES)


class ActionSampler:
    """Samples actions that get somewhere: random ones for some steps each, and in the valleys mostly full throttle."""

    def __init__(self, env, name, seed):
        self.space, self.name, self.generator, self.action = env.action_space, name, np.random.default_rng(seed), None

    def __call__(self, observation):
        in_valley = "MountainCar" in self.name and self.generator.random() < 0.8
        if in_valley:
            forward = observation[1] > 0
            full_throttle = np.float32([2 * forward - 1])
            return int(2 * forward) if isinstance(self.space, gymnasium.spaces.Discrete) else full_throttle
        if self.action is None or self.generator.random() < 0.4:
            self.space.seed(int(self.generator.integers(2**31)))
            self.action = self.space.sample()
        return self.action


def compare_with_gymnasium(name, steps, parameters=(), attributes=(), follow=False):
    """Step our environment and gymnasium's with equal actions.

    follow: gymnasium's takes over our state after every step. attributes: are set on gymnasium's environment.

    Returns the largest difference of observations and of rewards, and the numbers of terminations and truncations.
    """
    ours, theirs = gymnasium.make(f"grpo_fed/{name}", **dict(parameters)), gymnasium.make(name)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for attribute, value in dict(attributes).items():
        setattr(theirs.unwrapped, attribute, value)
    seeds = np.random.default_rng(7)
    sample, differences, ends = ActionSampler(ours, name, 1), np.zeros(2), [0, 0]
    (ours_sees, _), (theirs_sees, _) = ours.reset(seed=3), theirs.reset(seed=3)
    for _ in range(steps):
        differences[0] = max(differences[0], np.abs(ours_sees - theirs_sees).max())
        action = sample(ours_sees)
        ours_sees, ours_reward, *ours_ends, _ = ours.step(action)
        theirs_sees, theirs_reward, *theirs_ends, _ = theirs.step(action)
        step_differences = np.abs(ours_sees - theirs_sees).max(), abs(ours_reward - theirs_reward)
        differences = np.maximum(differences, step_differences)
        assert ours_ends == theirs_ends
        ends = np.add(ends, ours_ends)
        if any(ours_ends):
            seed = None if seeds.random() < 0.5 else int(seeds.integers(100))
            (ours_sees, _), (theirs_sees, _) = ours.reset(seed=seed), theirs.reset(seed=seed)
        elif follow:
            theirs.unwrapped.state = ours.unwrapped.vector.state[0].copy()
    return (*differences, *ends)


def test_cartpole_equals_gymnasiums_to_the_last_bit():
    observations, rewards, terminated, _ = compare_with_gymnasium("CartPole-v1", 5000)
    assert (observations, rewards) == (0, 0)
    assert terminated > 100


@pytest.mark.parametrize("name", CLASSIC)
def test_many_copies_start_where_gymnasiums_do_to_the_last_bit(name):
    seeds = np.random.default_rng(2).integers(2**31, size=200).tolist()
    ours, theirs = FamilyVectorEnv(f"grpo_fed/{name}", len(seeds)), gymnasium.make(name)
    ours.reset(seed=seeds)
    for state, seed in zip(ours.state, seeds, strict=True):
        theirs.reset(seed=seed)
        assert np.array_equal(state, theirs.unwrapped.state)


@pytest.mark.parametrize("name", IDS)
def test_a_copy_starts_where_it_would_start_alone(name):
    noise = {} if "RandomMDP" in name or "Catch" in name else {"sensor_noise": 0.1}
    seeds = list(range(1000, 1040))
    together, alone = FamilyVectorEnv(name, len(seeds), **noise), FamilyVectorEnv(name, **noise)
    starts, _ = together.reset(seed=seeds)
    for start, state, seed in zip(starts, together.state, seeds, strict=True):
        alone_start, _ = alone.reset(seed=seed)
        assert np.array_equal(start, alone_start[0])
        assert np.array_equal(state, alone.state[0])
    seldom = [None if seed % 3 else seed for seed in seeds]  # the others go on with their generators
    again, _ = together.reset(seed=seldom)
    for copy, (start, seed) in enumerate(zip(again, seldom, strict=True)):
        alone.reset(seed=seeds[copy])
        assert np.array_equal(start, alone.reset(seed=seed)[0][0])


def test_generators_made_together_equal_those_of_gymnasium():
    seeds = [0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 1, *np.random.default_rng(1).integers(2**32, size=500).tolist()]
    states = [np.random.SeedSequence(seed).generate_state(4, np.uint64) for seed in seeds]
    assert np.array_equal(seed_states(np.array(seeds, np.uint32)), np.stack(states))
    for made, seed in zip(make_generators(seeds), seeds, strict=True):
        expected = np_random(seed)[0]
        assert made.bit_generator.state == expected.bit_generator.state
        for ours, theirs in zip(made.spawn(2) + made.spawn(1), expected.spawn(2) + expected.spawn(1), strict=True):
            assert ours.bit_generator.state == theirs.bit_generator.state
        assert np.array_equal(made.random(3), expected.random(3))


def test_seeds_of_any_size_give_gymnasiums_generators():
    seeds = [*range(30), 2**32, 2**100]
    for made, seed in zip(make_generators(seeds), seeds, strict=True):
        assert made.random() == np_random(seed)[0].random()
    unseeded = [generator.random() for generator in make_generators([None] * 20)]
    assert len(set(unseeded)) == 20
    with pytest.raises(gymnasium.error.Error, match="greater or equal to zero"):
        make_generators([*range(30), -1])


def test_pendulum_observations_equal_gymnasiums_to_the_last_bit():
    observations, rewards, _, truncated = compare_with_gymnasium("Pendulum-v1", 3000)
    assert observations == 0
    # gymnasium squares scalars with pow(), which is off by one unit in the last place once in a thousand times.
    assert rewards < 1e-8
    assert truncated == 15


def test_mountain_car_equals_gymnasiums():
    observations, rewards, terminated, _ = compare_with_gymnasium("MountainCar-v0", 5000)
    # Bit for bit where numpy's cosine is the C library's, which gymnasium calls here; that differs between machines.
    assert observations < 1e-6
    assert rewards == 0
    assert terminated > 10


def test_continuous_mountain_car_steps_like_gymnasiums():
    # gymnasium's rounds its state to float32 after every step, ours does not: when it takes over our state after
    # every step they agree to float32's last place, and when it does not they differ by 5e-6 after an episode.
    observations, rewards, terminated, _ = compare_with_gymnasium("MountainCarContinuous-v0", 5000, follow=True)
    assert observations < 1e-6
    assert rewards == 0
    assert terminated > 10


def test_acrobot_steps_like_gymnasiums():
    # gymnasium squares scalars with pow(), whose last place differs; the Acrobot is chaotic and blows that up within an
    # episode, so gymnasium's takes over our state after every step.
    observations, rewards, terminated, truncated = compare_with_gymnasium("Acrobot-v1", 4000, follow=True)
    assert observations < 1e-6
    assert rewards == 0
    assert terminated >= 2
    assert truncated >= 2


@pytest.mark.parametrize(
    ("name", "parameters", "attributes", "tolerance"),
    [
        (
            "CartPole-v1",
            {"length": 0.3, "masscart": 0.7, "masspole": 0.25, "gravity": 5.5, "force_mag": 7.0},
            {"length": 0.3, "masscart": 0.7, "masspole": 0.25, "gravity": 5.5, "force_mag": 7.0,
             "total_mass": 0.25 + 0.7, "polemass_length": 0.25 * 0.3},
            0,
        ),
        ("Pendulum-v1", {"gravity": 7.0, "mass": 0.6, "length": 1.3}, {"g": 7.0, "m": 0.6, "l": 1.3}, 0),
        (
            "Acrobot-v1",
            {"length_1": 0.8, "length_2": 1.2, "mass_1": 1.5, "mass_2": 0.7, "nips": True},
            {"LINK_LENGTH_1": 0.8, "LINK_LENGTH_2": 1.2, "LINK_MASS_1": 1.5, "LINK_MASS_2": 0.7, "LINK_COM_POS_1": 0.4,
             "LINK_COM_POS_2": 0.6, "book_or_nips": "nips"},
            1e-6,
        ),
        ("MountainCar-v0", {"force": 0.0014, "gravity": 0.002}, {"force": 0.0014, "gravity": 0.002}, 1e-6),
        ("MountainCarContinuous-v0", {"power": 0.002}, {"power": 0.002}, 1e-6),
    ],
)  # fmt: skip
def test_parameters_have_the_effect_of_gymnasiums_attributes(name, parameters, attributes, tolerance):
    follow = name in ("Acrobot-v1", "MountainCarContinuous-v0")
    observations, rewards, *_ = compare_with_gymnasium(name, 1500, parameters, attributes, follow)
    assert observations <= tolerance
    assert rewards < 1e-8


def sample_parameters(name, num_envs, generator):
    """Sample every parameter for every env copy: the family's own near their defaults, and those of all families."""
    family = FAMILIES[name]()
    scale = generator.uniform(0.7, 1.3, size=num_envs)
    parameters = {
        key: [np.multiply(parameter.default, x).tolist() for x in scale] for key, parameter in family.parameters.items()
    }
    if name == "grpo_fed/RandomMDP-v0":
        parameters = {"seed": list(range(num_envs))}
    parameters["swap_actions"] = (generator.random(num_envs) < 0.5).tolist()
    if "permute" not in all_parameters(family):
        return parameters
    entries = all_parameters(family)["permute"].shape[0]
    parameters["permute"] = [generator.permutation(entries).tolist() for _ in range(num_envs)]
    if name != "grpo_fed/RandomMDP-v0":
        deviations = generator.uniform(0, 0.1, size=num_envs)
        parameters["sensor_noise"] = (deviations * (generator.random(num_envs) < 0.7)).tolist()
    return parameters


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_env_copy_does_not_depend_on_the_others(name, mode):
    generator = np.random.default_rng(5)
    parameters = sample_parameters(name, 64, generator)
    make = partial(FamilyVectorEnv, name, autoreset_mode=mode, max_episode_steps=40)
    many, copies = make(num_envs=64, **parameters), (0, 29, 63)
    envs_alone = [make(num_envs=1, **{key: [value[copy]] for key, value in parameters.items()}) for copy in copies]
    observations, _ = many.reset(seed=11)
    for copy, env in zip(copies, envs_alone, strict=True):
        assert np.array_equal(env.reset(seed=11 + copy)[0][0], observations[copy])
    many.action_space.seed(0)
    for step in range(300):
        actions = many.action_space.sample()
        results = many.step(actions)
        for copy, env in zip(copies, envs_alone, strict=True):
            results_alone = env.step(actions[copy : copy + 1])
            for values, values_alone in zip(results[:4], results_alone[:4], strict=True):
                assert np.array_equal(values[copy], values_alone[0]), step


def assert_equal_infos(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_equal_infos(ours[key], value)
        elif value.dtype == object:
            for left, right in zip(ours[key], value, strict=True):
                assert np.array_equal(left, right)
        else:
            assert np.array_equal(ours[key], value)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("name", IDS)
def test_autoreset_equals_that_of_gymnasiums_syncvectorenv(name, mode):
    """Ours against gymnasium's vector of our single environments, or of the original where ours is it bit for bit."""
    original = name.removeprefix("grpo_fed/")
    single, noise = (original, {}) if original in ("CartPole-v1", "Pendulum-v1") else (name, {"sensor_noise": 0.1})
    if original in ("RandomMDP-v0", "Catch-v0"):
        noise = {}
    ours = gymnasium.make_vec(name, 6, autoreset_mode=mode, max_episode_steps=15, **noise)
    make = partial(gymnasium.make, single, max_episode_steps=15, disable_env_checker=True, **noise)
    theirs = SyncVectorEnv([make] * 6, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    ours.action_space.seed(2)
    assert np.array_equal(ours.reset(seed=4)[0], theirs.reset(seed=4)[0])
    ended = 0
    for step in range(150):
        actions = ours.action_space.sample()
        ours_gives, theirs_gives = ours.step(actions), theirs.step(actions)
        for index in (0, 2, 3):
            assert np.array_equal(ours_gives[index], theirs_gives[index])
            assert ours_gives[index].dtype == theirs_gives[index].dtype
        assert np.allclose(ours_gives[1], theirs_gives[1], rtol=0, atol=1e-8)  # pow() again
        assert ours_gives[1].dtype == theirs_gives[1].dtype
        assert_equal_infos(ours_gives[4], theirs_gives[4])
        done = theirs_gives[2] | theirs_gives[3]
        ended += done.sum()
        if mode is AutoresetMode.DISABLED and done.any():
            seeds = [None if copy % 2 else 100 * step + copy for copy in range(6)]
            firsts = [env.reset(seed=list(seeds), options={"reset_mask": done.copy()})[0] for env in (ours, theirs)]
            assert np.array_equal(*firsts)
    assert ended >= 40


def test_make_vec_uses_gymnasiums_default_autoreset_mode():
    assert gymnasium.make_vec("grpo_fed/CartPole-v1", 2).metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert FamilyVectorEnv("grpo_fed/CartPole-v1", 2).metadata["autoreset_mode"] is AutoresetMode.DISABLED


def test_a_done_copy_sleeps_until_it_is_reset():
    env = FamilyVectorEnv("grpo_fed/CartPole-v1", 3, sensor_noise=0.1, force_mag=[10.0, 10.0, 0.0])
    env.reset(seed=0)
    for step in range(30):
        observations, _, terminated, _, _ = env.step(np.array([1, 0, step % 2]))
    assert terminated.tolist() == [True, True, False]
    later = env.step(np.array([1, 0, 0]))
    assert np.array_equal(later[0][:2], observations[:2])
    assert not np.array_equal(later[0][2], observations[2])
    assert later[1].tolist() == [0, 0, 1]
    assert later[2].tolist() == [True, True, False]
    restarted, _ = env.reset(seed=[9, None, None], options={"reset_mask": np.array([True, False, False])})
    assert np.array_equal(restarted[1:], later[0][1:])
    assert np.array_equal(restarted[0], FamilyVectorEnv("grpo_fed/CartPole-v1", sensor_noise=0.1).reset(seed=9)[0][0])
    *_, terminated, _, _ = env.step(np.array([1, 0, 0]))
    assert terminated.tolist() == [False, True, False]


def test_callers_may_write_into_returned_arrays():
    env = FamilyVectorEnv("grpo_fed/CartPole-v1", 2)
    first, _ = env.reset(seed=0)
    first[:] = 77
    for array in env.step(np.array([0, 1]))[:4]:
        array[:] = 1
    again, _ = env.reset(seed=[5, None], options={"reset_mask": np.array([True, False])})
    assert np.abs(again).max() < 1
    assert not env.step(np.array([0, 1]))[2].any()


@pytest.mark.parametrize("name", IDS)
def test_a_seed_determines_all_observations(name):
    generator = np.random.default_rng(1)
    parameters = sample_parameters(name, 3, generator)
    env = FamilyVectorEnv(name, 3, autoreset_mode=AutoresetMode.SAME_STEP, max_episode_steps=10, **parameters)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(50)]

    def observe_episode(seed):
        return np.stack([env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)])

    observations = observe_episode(1)
    assert np.array_equal(observations, observe_episode([1, 2, 3]))
    assert np.array_equal(observations, observe_episode(np.array([1, 2, 3], dtype=np.uint64)))
    assert not np.array_equal(observations, observe_episode([7, 8, 9]))
    assert not np.array_equal(observations, observe_episode(None))


# "warnings are errors" but for three that gymnasium's own CartPole and Pendulum give for the same spaces.
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is.*infinity")
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_finds_no_mistake(name):
    check_env(gymnasium.make(name).unwrapped)
    noise = {} if "MDP" in name or "Catch" in name else {"sensor_noise": 0.1}
    check_env(gymnasium.make(name, swap_actions=True, **noise).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_pictures_change_with_the_state(name):
    env = gymnasium.make(name, render_mode="rgb_array")
    env.reset(seed=0)
    env.action_space.seed(0)
    frames = [env.render()]
    for _ in range(8):
        env.step(env.action_space.sample())
        frames.append(env.render())
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames)
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])


def test_a_picture_equals_gymnasiums():
    ours = gymnasium.make("grpo_fed/CartPole-v1", render_mode="rgb_array", length=0.3)
    theirs = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    theirs.unwrapped.length = 0.3
    for env in (ours, theirs):
        env.reset(seed=1)
    assert np.array_equal(ours.render(), theirs.render())
    vector = gymnasium.make_vec("grpo_fed/CartPole-v1", 2, render_mode="rgb_array", length=0.3)
    vector.reset(seed=1)
    assert np.array_equal(vector.render()[0], ours.render())
    assert gymnasium.make("grpo_fed/CartPole-v1").unwrapped.render() is None


@pytest.mark.parametrize("name", IDS)
def test_swapped_actions_are_mirrored(name):
    plain, swapped = FamilyVectorEnv(name, 2), FamilyVectorEnv(name, 2, swap_actions=[False, True])
    space = plain.single_action_space
    plain.reset(seed=0)
    swapped.reset(seed=0)
    space.seed(3)
    for _ in range(20):
        action = space.sample()
        mirrored = space.n - 1 - action if isinstance(space, gymnasium.spaces.Discrete) else -action
        expected, got = plain.step(np.stack([action, mirrored])), swapped.step(np.stack([action, action]))
        assert np.array_equal(got[0], expected[0])
        assert np.array_equal(got[1], expected[1])


def test_permute_reorders_the_observation_entries():
    plain = FamilyVectorEnv("grpo_fed/Acrobot-v1", 2)
    permuted = FamilyVectorEnv("grpo_fed/Acrobot-v1", 2, permute=[[5, 4, 0, 1, 3, 2], None])
    (a, _), (b, _) = plain.reset(seed=0), permuted.reset(seed=0)
    for _ in range(10):
        assert np.array_equal(b[0], a[0][[5, 4, 0, 1, 3, 2]])
        assert np.array_equal(b[1], a[1])
        actions = plain.action_space.sample()
        a, b = plain.step(actions)[0], permuted.step(actions)[0]
    assert permuted.single_observation_space.high[0] == np.float32(9 * np.pi)
    assert permuted.single_observation_space.high[5] == np.float32(9 * np.pi)  # the copy in its usual order


def test_permute_reorders_the_one_hot_vector_of_a_number():
    plain, permuted = (
        FamilyVectorEnv("grpo_fed/RandomMDP-v0"),
        FamilyVectorEnv("grpo_fed/RandomMDP-v0", permute=[2, 0, 1, 5, 3, 4]),
    )
    space = plain.single_observation_space
    (a, _), (b, _) = plain.reset(seed=0), permuted.reset(seed=0)
    for _ in range(30):
        assert np.array_equal(flatten(space, b[0]), flatten(space, a[0])[[2, 0, 1, 5, 3, 4]])
        a, b = plain.step(np.array([0]))[0], permuted.step(np.array([0]))[0]


def test_sensor_noise_is_gaussian_on_observations_alone():
    deviations = [0.0, 0.5, 2.0]
    clear = FamilyVectorEnv("grpo_fed/MountainCar-v0", 3, max_episode_steps=-1)
    noisy = FamilyVectorEnv("grpo_fed/MountainCar-v0", 3, max_episode_steps=-1, sensor_noise=deviations)
    differences = [noisy.reset(seed=0)[0] - clear.reset(seed=0)[0]]
    for _ in range(3000):
        actions = np.array([1, 1, 1])
        differences.append(noisy.step(actions)[0] - clear.step(actions)[0])
    assert np.array_equal(noisy.state, clear.state)
    noise = np.array(differences)  # 6,002 draws a copy: the standard errors are 1.3 % (mean) and 0.9 % (deviation)
    assert not noise[:, 0].any()
    assert np.allclose(noise.mean(axis=(0, 2)), 0, atol=0.08)
    assert np.allclose(noise.std(axis=(0, 2)), deviations, rtol=0.04)
    assert abs(np.corrcoef(noise[:-1, 1, 0], noise[1:, 1, 0])[0, 1]) < 0.06
    assert noisy.single_observation_space.high.tolist() == [np.inf, np.inf]


def test_a_random_mdp_follows_its_transition_table():
    num_envs = 500
    env = FamilyVectorEnv("grpo_fed/RandomMDP-v0", num_envs, states=4, actions=2, seed=3, max_episode_steps=-1)
    transitions, rewards = RandomMDP(states=4, actions=2).tables(3)
    assert np.allclose(transitions.sum(axis=2), 1)
    assert np.array_equal(env.constants["P"][7], transitions)
    counts, generator = np.zeros((4, 2, 4)), np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    assert np.bincount(state, minlength=4).min() > 90  # starts are uniform: 125 each, give or take 10
    for _ in range(200):
        actions = generator.integers(2, size=num_envs)
        successors, gained, *_ = env.step(actions)
        assert np.array_equal(gained, rewards[state, actions])
        np.add.at(counts, (state, actions, successors), 1)
        state = successors
    # At least 5,000 visits of each pair: a standard error of at most 0.007.
    assert counts.sum(axis=2).min() > 5000
    assert np.allclose(counts / counts.sum(axis=2, keepdims=True), transitions, atol=0.025)


def test_a_random_mdps_values_equal_the_closed_form():
    gamma, family = 0.9, RandomMDP(states=3, actions=2)
    transitions, rewards = family.tables(8)
    values = np.linalg.solve(np.eye(3) - gamma * transitions.mean(axis=1), rewards.mean(axis=1))  # uniform policy
    env = FamilyVectorEnv(family, 4000, seed=8)
    start, _ = env.reset(seed=0)
    generator, returns = np.random.default_rng(0), np.zeros(4000)
    for step in range(90):  # 0.9^90 = 8e-5
        returns += gamma**step * env.step(generator.integers(2, size=4000))[1]
    assert np.allclose([returns[start == state].mean() for state in range(3)], values, atol=0.06)


def test_env_copies_may_have_different_mdps():
    env = FamilyVectorEnv("grpo_fed/RandomMDP-v0", 2, seed=[4, 5])
    assert np.array_equal(env.constants["R"][1], RandomMDP().tables(5)[1])
    assert not np.array_equal(env.constants["P"][0], env.constants["P"][1])


def test_a_point_mass_steps_as_worked_by_hand():
    env = FamilyVectorEnv("grpo_fed/PointMass-v0", 3, goal=[[0.5, 0.5], [0.05, 0.0], [-1.0, 0.0]], drag=0.5)
    env.reset(seed=0)
    env.state[:] = [[0, 0, 0, 0], [0, 0, 0.2, 0], [0.99, 0, 1, 0]]
    observations, rewards, terminated, *_ = env.step(np.array([[1, -1], [0, 0], [9, 0]], dtype=np.float32))
    # Copy 0: speed 0.1 both ways, position 0.01. Copy 1: drag takes 0.01 of 0.2. Copy 2: 1 + 0.1 (1 - 0.5) is over the
    # speed limit, and 0.99 + 0.1 is behind the wall.
    assert np.allclose(observations[0], [0.01, -0.01, 0.1, -0.1])
    assert np.allclose(observations[1], [0.019, 0, 0.19, 0])
    assert np.allclose(observations[2], [1, 0, 0, 0])
    assert np.allclose(rewards, [-np.hypot(0.49, 0.51), -0.031, -2])
    assert terminated.tolist() == [False, True, False]


def test_a_point_mass_may_observe_its_goal():
    env = gymnasium.make("grpo_fed/PointMass-v0", observe_goal=True, goal=(-0.25, 0.75))
    assert env.reset(seed=0)[0][4:].tolist() == [-0.25, 0.75]
    assert gymnasium.make("grpo_fed/PointMass-v0").observation_space.shape == (4,)


def test_damping_slows_the_pendulum():
    env = FamilyVectorEnv("grpo_fed/Pendulum-v1", 2, damping=[0.0, 0.4], mass=2.0, length=0.5, gravity=0.0)
    env.reset(seed=0)
    env.state[:] = [0.0, 1.0]
    speeds = env.step(np.zeros((2, 1), dtype=np.float32))[0][:, 2]
    assert np.allclose(speeds, [1, 1 - 3 / (2 * 0.5**2) * 0.4 * 0.05])


@pytest.mark.parametrize(("arguments", "limit"), [({}, 200), ({"max_episode_steps": 7}, 7)])
def test_episodes_are_truncated_at_the_step_limit(arguments, limit):
    single, env = (
        gymnasium.make("grpo_fed/Pendulum-v1", **arguments),
        gymnasium.make_vec("grpo_fed/Pendulum-v1", 2, **arguments),
    )
    single.reset(seed=0)
    env.reset(seed=0)
    for step in range(1, limit + 1):
        _, _, terminated, truncated, _ = env.step(np.zeros((2, 1), dtype=np.float32))
        assert single.step(np.zeros(1, dtype=np.float32))[3] == (step == limit)
        assert truncated.tolist() == [step == limit] * 2
        assert not terminated.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lenght": 0.3}, 'CartPole: lenght: unknown parameter; did you mean "length"?'),
        ({"length": -0.3}, "CartPole: length: -0.3 is outside its limits; give a value from 0.01 to 100"),
        ({"length": float("nan")}, "length: nan is outside its limits"),
        ({"length": "long"}, "length: 'long' is outside its limits"),
        ({"gravity": [1.0, 2.0, 3.0]}, "gravity: .* give a number, or a list with a number for each of 2 env copies"),
        ({"permute": [0, 1, 2]}, "permute: .* give 4 numbers, or a list"),
        ({"permute": [0, 1, 2, 2]}, r"permute: \[0, 1, 2, 2\] must hold each of 0 to 3 once"),
        ({"sensor_noise": -1}, "sensor_noise: -1 is outside"),
        ({"family": "grpo_fed/CartPoel-v1"}, 'unknown family; did you mean "grpo_fed/CartPole-v1"?'),
        ({"max_episode_steps": 0}, "max_episode_steps: 0: give at least 1, or -1"),
        (
            {"family": "grpo_fed/RandomMDP-v0", "states": [3, 4]},
            "states: .* determines shapes; give all env copies",
        ),
        ({"family": "grpo_fed/RandomMDP-v0", "states": 0}, "states: 0: give a whole number from 1"),
        ({"family": "grpo_fed/RandomMDP-v0", "sensor_noise": 0.1}, "sensor_noise: .* has no noise; leave it at 0"),
        ({"family": "grpo_fed/RandomMDP-v0", "state": 5}, 'state: unknown parameter; did you mean "states"?'),
    ],
)
def test_a_wrong_argument_is_refused_with_a_cure(arguments, message):
    with pytest.raises(ValueError, match=message):
        FamilyVectorEnv(**{"family": "grpo_fed/CartPole-v1", "num_envs": 2, **arguments})


def test_a_wrong_reset_or_action_is_refused():
    env = FamilyVectorEnv("grpo_fed/CartPole-v1", 2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.array([0, 0]))
    for seed, options, message in [
        ([1, 2, 3], None, "3 seeds for 2 env copies"),
        (None, {"reset_mask": [True, False]}, "must be an array of 2 bools"),
        (None, {"low": 0}, "'low'.*unknown; use reset_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(seed=seed, options=options)
    single = gymnasium.make("grpo_fed/CartPole-v1")
    single.reset()
    with pytest.raises(ValueError, match="action 2 is not in"):
        single.unwrapped.step(2)
