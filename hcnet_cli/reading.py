"""Opens the data of a run, and tells whether they are still the same."""

from __future__ import annotations

import time

from hcnet_cli import build, cache, dist
from hcnet_cli.console import UserError
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.finished import data_root, data_section
from hcnet_cli.recipe import Recipe


def open_data(recipe: Recipe, eval_only: bool = False) -> DataSplits:
    """As `build.open_data`. The digest is kept: the next start knows data that did not change without reading them."""
    begun = time.time()
    data = build.open_data(recipe, eval_only)
    if dist.is_main():
        known = cache.KnownData(data.info.name, data.info.digest)
        cache.keep_data(data_root(recipe), data_section(recipe), known, begun)
    return data


def current_digest(recipe: Recipe) -> str:
    """The digest of the data as they are now; "" for a folder that holds no data set any more."""
    if known := dist.from_main(lambda: cache.known_data(data_root(recipe), data_section(recipe))):
        return known.digest
    try:
        return build.open_data(recipe).info.digest
    except UserError:
        return ""
