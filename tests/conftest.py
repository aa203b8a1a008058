"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import pytest
import torch
from hypothesis import HealthCheck, settings
from playwright.sync_api import Browser, sync_playwright

# The same examples in every run, so that a failure is the change's and not the day's. No deadline: machines differ.
settings.register_profile(
    "pathwaylib", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pathwaylib")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium of the machine; tests that need it are skipped, with the reason, where there is none."""
    executable = chromium.find()
    if executable is None:
        pytest.skip("no Chromium found: install one, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        driven = playwright.chromium.launch(executable_path=executable, args=chromium.ARGUMENTS)
        yield driven
        driven.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the weights of the test and of its fixtures; skip what is marked ``cuda`` where there is no such device."""
    torch.manual_seed(0)
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
