"""Numbers at the command line."""

import math

import click


class FiniteRange(click.FloatRange):
    """A finite number within bounds, which are all optional.

    click's own type lets NaN pass, because no comparison with it is true, and infinity where there is no
    bound.
    """

    name = "float"

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            bounds = self._describe_range()
            self.fail(
                f"{number} is not a finite number; give one"
                + (f" in the range {bounds}." if bounds else "."),
                param,
                ctx,
            )
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()
