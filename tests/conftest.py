"""Settings shared by all tests: one thread, so that results do not depend on the machine's cores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# What these assert is told with its values, as in a test.
pytest.register_assert_rewrite("support")

settings.register_profile("regrow", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("regrow")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
