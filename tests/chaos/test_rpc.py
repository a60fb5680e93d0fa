"""Runs on a Ray whose calls are late or lost, by Ray's own testing knobs: they complete, or say why not and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.conftest import STEPS
from tests.disturbance import disturbed

METHODS = (
    "CoreWorkerService.grpc_client.PushTask",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.PinObjectIDs",
)
OFTEN = {"num_failures": 20, "req_failure_prob": 10, "resp_failure_prob": 10}
LOST = dict.fromkeys(METHODS, OFTEN)
KNOBS = {
    "late": {"RAY_testing_asio_delay_us": "CoreWorkerService.grpc_client.PushTask=1000:50000"},
    "lost": {"RAY_testing_rpc_failure": json.dumps(LOST)},
}


@pytest.mark.parametrize("fault", KNOBS)
def test_calls_that_are_late_or_lost_change_no_bit(place: Path, undisturbed: str, fault: str):
    with disturbed(place, f"rpc-{fault}", f"loop.steps={STEPS}", environment=KNOBS[fault]) as run:
        if run.end() != 0:
            assert run.status == "failed"
            assert run.cause["category"] == "system"
            run.environment = {}
            run.start(resume=True)
            assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        run.check_nothing_is_left()
