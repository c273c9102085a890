"""Forecasters learn from what they see as it comes, but fit no models: that takes a second each time."""

from collections.abc import Iterator

import pytest

from moe_operator.scaling.forecast import Forecaster


@pytest.fixture(scope="module", autouse=True)
def _no_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forecaster, "refit_due", property(lambda _: False))
        yield
