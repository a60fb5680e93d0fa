"""From a receipt to its rollout: the object store where it is still there, else the run's spool.

A bundle in the object store dies with the worker that put it there; its file does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from potstill import spool
from potstill.errors import ChunkLost
from potstill.types import Bundle, Receipt, ScoredRollout


def rollouts(receipts: Sequence[Receipt]) -> list[ScoredRollout]:
    """The rollouts behind the receipts, each bundle fetched once. Raises ChunkLost when one is nowhere any more."""
    bundles = {receipt.bundle: None for receipt in receipts}
    fetched = {bundle: _opened(bundle) for bundle in bundles}
    return [fetched[receipt.bundle][receipt.position] for receipt in receipts]


def _opened(bundle: Bundle) -> list[ScoredRollout]:
    import ray

    if bundle.ref is not None:
        try:
            found: list[ScoredRollout] = ray.get(bundle.ref)
        except ray.exceptions.ObjectLostError:
            pass
        else:
            return found
    if bundle.path is None:
        raise ChunkLost("scored rollouts are lost with the worker that held them")
    return spool.read(Path(bundle.path))
