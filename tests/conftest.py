import pytest


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """What is printed is as wide as in a pipe, whatever runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


def pytest_collection_modifyitems(config, items):
    """What takes minutes a test is left to `pytest -m long`."""
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
