"""A self-teacher on a server: every version of the student is pushed to it, and only the newest teacher is believed.

For students too large to keep a second copy of in the learner. The mean is taken where the teacher is: one copy of the
student travels a step, and no average does. It needs steps one after the other: a rollout waits for no teacher of a
version that is gone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.teachers.server import TeacherClient
from potstill.types import WeightsVersion
from rollout_worker.scoring import Scoring


class Follower:
    """What a worker does when it gets new weights. One worker of a run has the `pusher`; the others take its word."""

    def __init__(self, scoring: Scoring, pusher: TeacherClient | None, *, ema_decay: float) -> None:
        self._scoring = scoring
        self._pusher = pusher
        self._ema_decay = ema_decay

    async def follow(self, version: WeightsVersion, payload: NDArray[np.uint8]) -> None:
        """Raises TeacherError when the server does not take them."""
        if self._pusher is not None:
            await self._pusher.push_weights(version, payload, ema_decay=self._ema_decay)
        self._scoring.believe(f"v{version.version}")
