"""MuJoCo tasks under other laws."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from grpo_fed.tasks.wrappers import Heavy, Ice, Moon


class Model:
    """The parts of MuJoCo's that are changed."""

    def __init__(self) -> None:
        self.opt = type("Options", (), {"gravity": np.array([0.0, 0.0, -9.0])})()
        self.body_mass, self.body_inertia = np.array([0.0, 2.0, 4.0]), np.array([[1.0, 1.0, 2.0]])
        self.geom_friction = np.array([[0.4, 0.1, 0.1], [0.8, 0.1, 0.1]])


class Bodies(gymnasium.Env[Any, Any]):
    def __init__(self) -> None:
        self.model = Model()


def test_each_law_changes_its_own_numbers_once():
    moon, heavy, ice = (law(Bodies()).unwrapped.model for law in (Moon, Heavy, Ice))
    np.testing.assert_allclose(moon.opt.gravity, [0, 0, -1.5])
    np.testing.assert_allclose(moon.body_mass, [0, 2, 4])
    np.testing.assert_allclose(heavy.body_mass, [0, 3, 6])
    np.testing.assert_allclose(heavy.body_inertia, [[1.5, 1.5, 3]])
    np.testing.assert_allclose(heavy.opt.gravity, [0, 0, -9])
    np.testing.assert_allclose(ice.geom_friction, [[0.1, 0.1, 0.1], [0.2, 0.1, 0.1]])


def test_a_task_without_such_a_model_is_refused():
    with pytest.raises(ValueError, match="no MuJoCo model"):
        Moon(gymnasium.make("CartPole-v1"))


def test_a_real_model_is_changed_as_well():
    pytest.importorskip("mujoco", reason="MuJoCo comes with the extra `mujoco`")
    plain, moon = gymnasium.make("HalfCheetah-v5"), Moon(gymnasium.make("HalfCheetah-v5"))
    np.testing.assert_allclose(moon.unwrapped.model.opt.gravity * 6, plain.unwrapped.model.opt.gravity)
    plain.close()
    moon.close()
