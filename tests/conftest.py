import pytest


def pytest_collection_modifyitems(config, items):
    """What takes minutes a test is run where it is asked for: `pytest -m long`."""
    if "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run it with: pytest -m long"))
