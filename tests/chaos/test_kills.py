"""A run with 20 processes killed at random moments, to the same weights as the run that nobody disturbed.

Prints its seed and the kills as JSON; POTSTILL_CHAOS_SEED chooses other moments and another order.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

from tests.disturbance import Disturbed, disturbed

STEPS = 120
VICTIMS = ("worker",) * 8 + ("learner",) * 7 + ("teacher",) * 3 + ("driver",) * 2
LONGEST_WAIT_S = 0.5  # after a step, some of which take less


def test_twenty_kills_at_random_moments_change_no_bit(place: Path):
    with disturbed(place, "long-undisturbed", f"loop.steps={STEPS}") as run:
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        undisturbed = run.weights()

    seed = int(os.environ.get("POTSTILL_CHAOS_SEED", "7"))
    chance = random.Random(seed)
    kills = []
    with disturbed(place, "killed", f"loop.steps={STEPS}", f"loop.restarts={len(VICTIMS)}") as run:
        for number, victim in enumerate(chance.sample(VICTIMS, len(VICTIMS))):
            keep_alive_until(run, 1 + number * STEPS // (len(VICTIMS) + 1))
            time.sleep(chance.uniform(0.0, LONGEST_WAIT_S))
            while not run.hurt(victim):  # it is being replaced
                keep_alive_until(run, 0)
                time.sleep(0.05)
            kills.append({"killed": victim, "after_steps": len(run.steps)})
        while run.end() != 0:
            assert run.process is not None
            assert run.process.returncode == -signal.SIGKILL, run.said
            run.start(resume=True)
        print(json.dumps({"seed": seed, "kills": kills, "weights": run.weights(), "undisturbed": undisturbed}))
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        run.check_nothing_is_left()


def keep_alive_until(run: Disturbed, steps: int) -> None:
    """Wait for the steps; a run whose driver was killed is resumed, as often as it takes."""
    while True:
        assert run.process is not None
        if run.process.poll() is not None:
            assert run.process.returncode in {0, -signal.SIGKILL}, run.process.communicate()[1]
            run.start(resume=True)
        run.look()
        if run.trained(steps):
            return
        time.sleep(0.05)
