import pytest

from tests.harness import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Gloo processes shared by the whole session; `ranks.run(function, *args, world=4)`."""
    pool = Ranks()
    yield pool
    pool.close()
