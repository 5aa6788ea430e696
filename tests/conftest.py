"""What servers of tests learn is not what the user's own servers learn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scale import pull


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A DEEPSERVE_HOME that has the user's models, and whose history and profiles are of this run."""
    own = tmp_path_factory.mktemp("home")
    pull.models_dir().mkdir(parents=True, exist_ok=True)
    (own / "models").symlink_to(pull.models_dir().resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSERVE_HOME", str(own))
        yield
