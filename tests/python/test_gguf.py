"""import turboquant.gguf: the types in the gguf package, in a file and back."""
import subprocess
import sys

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

import turboquant  # noqa: E402
import turboquant.gguf  # noqa: E402
from turboquant import reference  # noqa: E402

IDS = {t.name: t.file_id for t in turboquant.types()}


def tensor(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_members(type_name):
    member = turboquant.gguf.ggml_type(type_name)
    enum = gguf.GGMLQuantizationType
    assert member is enum(IDS[type_name]) is enum[type_name.upper()] is getattr(enum, type_name.upper())
    assert member == IDS[type_name] and isinstance(member, enum) and isinstance(member, int)
    assert member.name == type_name.upper() and member.value == IDS[type_name] and member in list(enum)
    assert repr(member) == f"<GGMLQuantizationType.{type_name.upper()}: {IDS[type_name]}>"
    info = next(t for t in turboquant.types() if t.name == type_name)
    assert gguf.GGML_QUANT_SIZES[member] == (info.block, info.block_bytes)


def test_ids_are_frozen():
    frozen = {"turbo4": 512, "turbo4_64": 513, "turbo4_32": 514, "turbo3": 515, "turbo3_64": 516, "turbo3_32": 517,
              "turbo2": 518, "turbo2_64": 519, "turbo2_32": 520, "turbo4_tcq": 525, "turbo4_tcq_64": 526,
              "turbo4_tcq_32": 527, "turbo3_tcq": 528, "turbo3_tcq_64": 529, "turbo3_tcq_32": 530, "turbo2_tcq": 531,
              "turbo2_tcq_64": 532, "turbo2_tcq_32": 533}
    assert IDS.items() >= frozen.items() and len(set(IDS.values())) == len(IDS)


def test_registering_again_changes_nothing():
    before = list(gguf.GGMLQuantizationType), dict(gguf.GGML_QUANT_SIZES), dict(gguf.quants._type_traits)
    turboquant.gguf.register()
    assert before == (list(gguf.GGMLQuantizationType), dict(gguf.GGML_QUANT_SIZES), dict(gguf.quants._type_traits))


def test_conversions_are_the_core(type_name):
    member = turboquant.gguf.ggml_type(type_name)
    x = tensor((3, 37, 256))
    q = gguf.quants.quantize(x, member)
    np.testing.assert_array_equal(q, turboquant.quantize(x, type_name))
    np.testing.assert_array_equal(gguf.dequantize(q, member), turboquant.dequantize(q, type_name))
    with pytest.raises(gguf.quants.QuantError, match="shape"):
        gguf.quants.quantize(x[..., :100], member)


def test_file_round_trip(tmp_path):
    """Every type in one file, next to a stock tensor, and a 1-D one."""
    path = tmp_path / "types.gguf"
    tensors = {name: tensor((5, 384), seed) for seed, name in enumerate(IDS)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("turboquant.test", 7)
    plain = tensor((4, 32), 99)
    writer.add_tensor("stock", plain)
    for name, x in tensors.items():
        writer.add_tensor(name, turboquant.quantize(x, name), raw_dtype=turboquant.gguf.ggml_type(name))
    writer.add_tensor("vector", turboquant.quantize(plain[:1].repeat(4, 1)[0], "turbo3"),
                      raw_dtype=gguf.GGMLQuantizationType.TURBO3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(read["stock"].data, plain)
    for name, x in tensors.items():
        found = read[name]
        info = next(t for t in turboquant.types() if t.name == name)
        assert found.tensor_type == IDS[name] and found.tensor_type.name == name.upper()
        assert found.shape.tolist() == [384, 5] and found.n_bytes == 5 * info.row_bytes(384)
        np.testing.assert_array_equal(found.data, turboquant.quantize(x, name))
        np.testing.assert_array_equal(gguf.dequantize(found.data, found.tensor_type),
                                      reference.dequantize(reference_bytes(found.data), name))
    assert read["vector"].shape.tolist() == [128]


def reference_bytes(data):
    return np.array(data)  # out of the memory map


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_without_gguf_the_error_says_what_to_install():
    done = run_python("import sys; sys.modules['gguf'] = None; sys.path_importer_cache.clear()\n"
                      "import turboquant\n"
                      "try: import turboquant.gguf\n"
                      "except ModuleNotFoundError as e: print(e, e.name)")
    assert done.stdout == "turboquant.gguf needs the package gguf: pip install 'turboquant[gguf]' gguf\n", done.stderr


@pytest.mark.parametrize("name, value", [("TURBO4", 99), ("OTHER", 512)])
def test_a_gguf_with_other_types_in_our_place_is_refused(name, value):
    done = run_python("import gguf, enum\n"
                      "members = {m.name: m.value for m in gguf.GGMLQuantizationType}\n"
                      f"other = enum.IntEnum('GGMLQuantizationType', {{**members, {name!r}: {value}}})\n"
                      "gguf.GGMLQuantizationType = other\n"
                      "try: import turboquant.gguf\n"
                      "except RuntimeError as e: print(e)")
    assert f"has <GGMLQuantizationType.{name}: {value}> already, so TURBO4 = 512" in done.stdout, done.stderr
