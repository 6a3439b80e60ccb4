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
    """Selects each set of kernels of this build in turn; sets that the CPU cannot run are reported as skipped."""
    yield from selected(request.param)


@pytest.fixture(params=[name for name in KERNELS if name != "scalar"])
def other_kernels(request):
    """As above without the scalar set, for comparisons with it."""
    yield from selected(request.param)
