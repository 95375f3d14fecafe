"""A bar with the figures of a run, on the standard error stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

from qspec_jax.engine.results import RunTotals


@contextlib.contextmanager
def progress_bar(num_requests: int, *, shown: bool) -> Generator[Callable[[RunTotals], None]]:
    """A function that shows figures as they change; it does nothing where none are to be shown.

    Args:
        num_requests: that will be finished at the end.
        shown: whether there is a bar.
    """
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=num_requests, unit="request", leave=False) as bar:

        def show(totals: RunTotals) -> None:
            figures = {"tokens/s": totals.tokens_per_s, "tokens/cycle": totals.tokens_per_cycle}
            bar.set_postfix({name: f"{value:.1f}" for name, value in figures.items() if value}, refresh=False)
            bar.update(totals.requests - bar.n)
            if bar.n == num_requests:
                bar.refresh()

        yield show
