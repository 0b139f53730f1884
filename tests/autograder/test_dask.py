"""A dask cluster grades a class, and a worker of it that is killed costs nothing."""

import json
import os
import signal
import threading
import time

import pytest

from autograder.classroom import command
from autograder.classroom.batch import VERDICTS
from autograder.isolation import sandbox
from tests.autograder.test_class import KINDS, _hand_in, _verdicts

distributed = pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable()),
    pytest.mark.filterwarnings("default"),
]


def test_a_killed_worker_loses_and_doubles_nothing(course, tmp_path_factory, monkeypatch):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    handed_in = _hand_in(folder, 6)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
        local_directory=str(tmp_path_factory.mktemp("dask")), silence_logs=50,
    ) as cluster:  # fmt: skip
        victim = cluster.workers[0].pid

        def kill_once_under_way():
            verdicts, deadline = out / VERDICTS, time.monotonic() + 60
            while time.monotonic() < deadline:
                if verdicts.exists() and len(verdicts.read_bytes().splitlines()) >= 5:
                    os.kill(victim, signal.SIGKILL)
                    return
                time.sleep(0.02)

        killer = threading.Thread(target=kill_once_under_way)
        killer.start()
        address = cluster.scheduler_address
        status = command.main([str(folder), "--out", str(out), "--scheduler", address])
        killer.join()
    assert status == 1  # the huge ones
    found = _verdicts(out)
    assert {n: found[n]["earned"] for n in found} == {n: KINDS[k][1] for n, k in handed_in.items()}
    keys = [json.loads(line)["key"] for line in (out / VERDICTS).read_text().splitlines()]
    assert len(keys) == len(set(keys))
