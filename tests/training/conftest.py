"""What several files of tests of training use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.rank_team import Team


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Three processes."""
    team = Team(3)
    yield team
    team.end()
