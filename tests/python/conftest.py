import pytest
import turboquant

TYPES = [info.name for info in turboquant.types()]
KERNELS = [kernels.name for kernels in turboquant.kernels()]


@pytest.fixture(params=TYPES)
def type_name(request):
    return request.param


def selected(name):
    if not {k.name: k.supported for k in turboquant.kernels()}[name]:
        pytest.skip(f"this CPU cannot run the {name} kernels")
    with turboquant.use_kernels(name):
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Every set of kernels of this build in turn, selected; those that the CPU cannot run are skipped, visibly."""
    yield from selected(request.param)


@pytest.fixture(params=[name for name in KERNELS if name != "scalar"])
def other_kernels(request):
    """Every set but the scalar one, for comparisons with that."""
    yield from selected(request.param)
