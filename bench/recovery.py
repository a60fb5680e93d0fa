"""How long a killed process holds a run up: `python -m bench.recovery [--kills 3]` prints one JSON object.

One real run of a tiny student, a process killed by SIGKILL every now and then. `rollout_worker`: seconds until the
first rollout that was begun after the kill is written; `learner`: until the next step is done. Both are a new process
that loads its libraries and a model; a larger model takes longer by its own loading.
`start_s` is what the whole run needed for its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from potstill.spans import read_spans
from tests.disturbance import Disturbed, disturbed, furnish

LIMIT_S = 300.0
IN_FLIGHT_S = 0.5  # a step that was done and not yet recorded when its learner died
CALM_STEPS = 10  # between two kills
CHANGES = ("loop.steps=1000000", "checkpoint.every=5")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each process")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        place = Path(folder)
        furnish(place)
        began = time.time()
        with disturbed(place, "recovery", *CHANGES) as run:
            run.wait_for(lambda: run.trained(1), limit_s=LIMIT_S)
            start_s = time.time() - began
            found = {
                "rollout_worker": [until_a_rollout(run) for _ in range(kills)],
                "learner": [until_a_step(run) for _ in range(kills)],
            }
    print(json.dumps({"start_s": round(start_s, 2), **{part: summary(times) for part, times in found.items()}}))


def until_a_rollout(run: Disturbed) -> float:
    killed = kill(run, "worker")

    def written() -> bool:
        return any(span.name == "generate" and span.start > killed for span in read_spans(run.folder))

    run.wait_for(written, limit_s=LIMIT_S)
    return min(s.end for s in read_spans(run.folder) if s.name == "generate" and s.start > killed) - killed


def until_a_step(run: Disturbed) -> float:
    killed = kill(run, "learner")

    def done() -> list[float]:
        return [float(step["time"]) for step in run.steps if step["time"] > killed + IN_FLIGHT_S]

    run.wait_for(lambda: bool(done()), limit_s=LIMIT_S)
    return done()[0] - killed


def kill(run: Disturbed, part: str) -> float:
    """When it was, after some calm."""
    calm = run.steps[-1]["step"] + CALM_STEPS
    run.wait_for(lambda: run.steps[-1]["step"] >= calm, limit_s=LIMIT_S)
    assert run.hurt(part)
    return time.time()


def summary(times: list[float]) -> dict[str, object]:
    return {"median_s": round(statistics.median(times), 2), "all_s": [round(seconds, 2) for seconds in times]}


if __name__ == "__main__":
    main()
