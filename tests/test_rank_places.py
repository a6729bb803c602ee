"""Which rank solves what, and what place among ranks a launcher gives; none is started."""

import torch

from harness.formats import NVFP4
from harness.parallel.joined import first_host, place
from harness.parallel.ranks import Place
from harness.quantize.spread import assigned
from harness.solvers import AWQ, GPTQ, Problem


def test_the_largest_go_first_and_what_wants_a_site_whole_gets_it():
    weights = {"a": torch.zeros(5, 8), "b": torch.zeros(4, 8), "c": torch.zeros(3, 8)}
    posed = [Problem(weights, dict.fromkeys(weights, NVFP4(role="weight")))]
    assert assigned(GPTQ(), posed, 2) == {"a": 0, "b": 1, "c": 1}
    assert set(assigned(AWQ(), posed, 2).values()) == {0}
    assert set(assigned(GPTQ(), posed, 1).values()) == {0}


def test_who_launched_says_the_place():
    assert place({}) is None
    assert place({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) is None
    torchrun = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert place(torchrun) == Place(3, 4, 1, "env://")
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "41234",
    }
    assert place(slurm) == Place(1, 2, 0, "tcp://gpu03:21234")
    # a batch script is a process alone, whatever its job has
    assert place({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None
    assert [first_host(n) for n in ("a1", "a1,b2", "a[1,3-4],b")] == ["a1", "a1", "a1"]
