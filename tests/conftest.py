"""Settings for all tests."""

import os

# Before torch and numpy load: one thread a process, whoever starts pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["MLFLOW_TRACKING_URI"] = "off"  # the tests of tracking name a store

import hypothesis

# An example's time says more about the machine than about the code, and a test fails for a change, not by chance.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")
