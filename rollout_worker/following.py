"""A self-teacher on a server: every version of the student is pushed to it, and only the newest teacher is believed.

For students too large to keep a second copy of in the learner. The mean is taken where the teacher is: one copy of the
student travels a step, and no average does. It needs steps one after the other: a rollout waits for no teacher of a
version that is gone.

A push that fails leaves the teacher behind the student. It is made up for when the weights are loaded again, of the
same version or of a later one; where a push got there and only its answer was lost, that is found out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.errors import TeacherRefused
from potstill.teachers.server import TeacherClient
from potstill.types import WeightsVersion
from rollout_worker.scoring import Scoring


class Follower:
    """What a worker does when it gets new weights. One worker of a run has the `pusher`; the others take its word."""

    def __init__(self, scoring: Scoring, pusher: TeacherClient | None, *, ema_decay: float) -> None:
        self._scoring = scoring
        self._pusher = pusher
        self._ema_decay = ema_decay
        self.is_behind = False  # the student has weights that the teacher may not have

    async def follow(self, version: WeightsVersion, payload: NDArray[np.uint8]) -> None:
        """Raises TeacherError when the server does not take them; the teacher is then behind."""
        self.is_behind = True
        if self._pusher is not None:
            await self._push(self._pusher, version, payload)
        self._scoring.believe(_revision(version))
        self.is_behind = False

    async def _push(self, pusher: TeacherClient, version: WeightsVersion, payload: NDArray[np.uint8]) -> None:
        try:
            await pusher.push_weights(version, payload, ema_decay=self._ema_decay)
        except TeacherRefused:
            if (await pusher.capabilities()).revision != _revision(version):
                raise


def _revision(version: WeightsVersion) -> str:
    """As the server calls itself once it has the version."""
    return f"v{version.version}"
