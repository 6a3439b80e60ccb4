import pytest

import turboquant

TYPES = [info.name for info in turboquant.types()]
KERNELS = [kernels.name for kernels in turboquant.kernels()]


@pytest.fixture(params=TYPES)
def type_name(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Every set of kernels of this build in turn, selected; those that the CPU cannot run are skipped, visibly."""
    if not {k.name: k.supported for k in turboquant.kernels()}[request.param]:
        pytest.skip(f"this CPU cannot run the {request.param} kernels")
    with turboquant.use_kernels(request.param):
        yield request.param
