"""What tests of learned invertible matrices share: the formats learned for, values in float64."""

import torch

from harness.formats import NVFP4, Integer, Scheme

F64 = torch.float64
TOKEN = Integer(role="activation", granularity="token", symmetric=False)
INT4 = Scheme(weight=Integer(granularity="group", group_size=32), act=TOKEN)
NV = Scheme(weight=NVFP4(), act=NVFP4(role="activation"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(found, wanted, tolerance=1e-10):
    found, wanted = found.detach(), wanted.detach()
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@torch.no_grad()
def wander(module, size=0.3):
    """Parameters far from where they begin."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.copy_(size * normal(*parameter.shape, seed=seed))
    return module
