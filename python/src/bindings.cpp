// The private module turboquant._core: turboquant.h for NumPy arrays.
//
// Python code (turboquant/_arrays.py) checks shapes, dtypes and names, because its errors can name the user's argument.
// This module checks what memory safety requires: every array has the size that a call reads or writes. The GIL is
// released during every call that processes data.

#include "turboquant.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

namespace py = pybind11;

namespace {

using floats = py::array_t<float, 0>;
using bytes  = py::array_t<uint8_t, 0>;

std::string kernel_names() {
    std::string names;
    for (int i = 0; i < tq_kernels_count(); i++) {
        if (i) names += ", ";
        names += tq_kernels_name(i);
        if (!tq_kernels_supported(i)) names += " (not on this CPU)";
    }
    return names;
}

[[noreturn]] void raise(tq_status status) {
    const std::string text = tq_status_text(status);
    switch (status) {
        case TQ_ERROR_MEMORY: PyErr_SetString(PyExc_MemoryError, text.c_str()); throw py::error_already_set();
        case TQ_ERROR_NULL: throw std::runtime_error(text);
        case TQ_ERROR_KERNELS_UNKNOWN:
        case TQ_ERROR_KERNELS_UNSUPPORTED: {
            // Only names from the environment cause this error, because select() reports its own.
            const char * name = std::getenv("TURBOQUANT_KERNELS");
            throw py::value_error("TURBOQUANT_KERNELS=" + std::string(name ? name : "") + ": " + text +
                                  "; kernels of this build: " + kernel_names());
        }
        default: throw py::value_error(text);
    }
}

void check(tq_status status) {
    if (status != TQ_OK) raise(status);
}

void require(bool condition, const char * what) {
    if (!condition) throw py::value_error(std::string("turboquant._core: ") + what);
}

// The rows of a two-dimensional array. Each row is contiguous, and rows do not overlap.
template <typename T> struct rows_of {
    T *       data;
    ptrdiff_t stride; // in elements
    ptrdiff_t rows, columns;
};

template <typename T, typename A> rows_of<T> rows_in(const A & array, const char * what) {
    require(array.ndim() == 2, what);
    const ptrdiff_t item = array.itemsize(), rows = array.shape(0), columns = array.shape(1);
    require(columns <= 1 || array.strides(1) == item, what);
    // The stride of a single row is arbitrary.
    const ptrdiff_t stride = rows > 1 ? array.strides(0) : columns * item;
    require(stride % item == 0 && stride >= columns * item, what);
    return {const_cast<T *>(static_cast<const T *>(array.data())), stride / item, rows, columns};
}

const tq_type_info & info_of(int type) {
    const tq_type_info * info = tq_type_get(static_cast<tq_type>(type));
    if (!info) raise(TQ_ERROR_TYPE);
    return *info;
}

size_t row_bytes_of(int type, ptrdiff_t n) {
    info_of(type);
    const size_t size = tq_row_bytes(static_cast<tq_type>(type), n);
    if (!size) raise(TQ_ERROR_LENGTH);
    return size;
}

#define TURBOQUANT_ROW(ID, ...) TQ_ROW_##ID,
constexpr int row_types[] = {TURBOQUANT_ROW_TYPES(TURBOQUANT_ROW)};
#undef TURBOQUANT_ROW

// The layout of a row of K or V, which may also have one of ggml's own types.
size_t cache_row_bytes(int type, ptrdiff_t n) {
    const tq_row_info * info = tq_row_get(type);
    if (!info) raise(TQ_ERROR_TYPE);
    if (n <= 0 || n % info->block) raise(TQ_ERROR_LENGTH);
    return static_cast<size_t>(n) / info->block * info->block_bytes;
}

py::list type_table() {
    py::list table;
    for (int i = 0; i < TQ_TYPE_COUNT; i++) {
        const tq_type_info & t = info_of(i);
        const py::array_t<int8_t> codebook(t.levels, t.codebook); // a copy
        const char * family = info_of(t.family).name;
        table.append(py::make_tuple(t.name, t.bits, t.block, t.block_bytes, t.step, codebook, family, t.file_id));
    }
    return table;
}

py::list row_table() {
    py::list table;
    for (const int type : row_types) {
        const tq_row_info & row = *tq_row_get(type);
        table.append(py::make_tuple(row.name, row.block, row.block_bytes, type));
    }
    return table;
}

std::string type_for_head(int type, int64_t head) {
    info_of(type);
    const tq_type found = tq_type_for_head(static_cast<tq_type>(type), head);
    return found == TQ_TYPE_COUNT ? "" : tq_type_get(found)->name;
}

py::bytes signs(int which) {
    const uint8_t * bits = tq_signs(which);
    require(bits != nullptr, "which must be 1 or 2");
    return py::bytes(reinterpret_cast<const char *>(bits), 16);
}

py::tuple encode(int type, const floats & source, bytes & target, int threads) {
    const auto src = rows_in<const float>(source, "source rows");
    const auto dst = rows_in<uint8_t>(target, "target rows");
    require(target.writeable() && src.rows == dst.rows, "target shape");
    require(static_cast<size_t>(dst.columns) == row_bytes_of(type, src.columns), "target row size");
    tq_encode_report report = {0, 0};
    tq_status status;
    {
        py::gil_scoped_release release;
        status = tq_encode(static_cast<tq_type>(type), src.data, src.stride, dst.data, dst.stride, src.rows,
                           src.columns, threads, &report);
    }
    check(status);
    return py::make_tuple(report.nonfinite, report.saturated);
}

void decode(int type, const bytes & source, floats & target, bool rotated, int threads) {
    const auto src = rows_in<const uint8_t>(source, "source rows");
    const auto dst = rows_in<float>(target, "target rows");
    require(target.writeable() && src.rows == dst.rows, "target shape");
    require(static_cast<size_t>(src.columns) == row_bytes_of(type, dst.columns), "source row size");
    tq_status status;
    {
        py::gil_scoped_release release;
        const auto run = rotated ? tq_decode_rotated : tq_decode;
        status = run(static_cast<tq_type>(type), src.data, src.stride, dst.data, dst.stride, src.rows, dst.columns,
                     threads);
    }
    check(status);
}

void rotate(int block, const floats & source, floats & target, bool inverse, int threads) {
    require(source.ndim() == 1 && target.ndim() == 1 && source.size() == target.size() && target.writeable(), "shape");
    require(source.size() <= 1 || (source.strides(0) == 4 && target.strides(0) == 4), "not contiguous");
    const float * src = source.data();
    float *       dst = target.mutable_data();
    const int64_t n   = source.size();
    tq_status status;
    {
        py::gil_scoped_release release;
        status = inverse ? tq_unrotate(block, src, dst, n, threads) : tq_rotate(block, src, dst, n, threads);
    }
    check(status);
}

int64_t query_bytes(int block, int64_t n) { return static_cast<int64_t>(tq_query_bytes(block, n)); }

// Prepares every row of source; the rows of target consist of tq_query blocks.
void query(int block, const floats & source, bytes & target) {
    const auto src = rows_in<const float>(source, "source rows");
    const auto dst = rows_in<uint8_t>(target, "target rows");
    const size_t size = tq_query_bytes(block, src.columns);
    if (!size) raise(TQ_ERROR_LENGTH);
    require(target.writeable() && src.rows == dst.rows && static_cast<size_t>(dst.columns) == size, "target shape");
    require(reinterpret_cast<uintptr_t>(dst.data) % alignof(tq_query32) == 0 && dst.stride % alignof(tq_query32) == 0,
            "target alignment");
    tq_status status = TQ_OK;
    {
        py::gil_scoped_release release;
        for (ptrdiff_t r = 0; r < src.rows && status == TQ_OK; r++) {
            status = tq_query(block, src.data + r * src.stride, dst.data + r * dst.stride, src.columns);
        }
    }
    check(status);
}

// target[m, r] = <query row m, encoded row r>
void dot(int type, const bytes & source, const bytes & queries, floats & target, int64_t n) {
    const auto src = rows_in<const uint8_t>(source, "source rows");
    const auto qry = rows_in<const uint8_t>(queries, "query rows");
    const auto dst = rows_in<float>(target, "target rows");
    require(static_cast<size_t>(src.columns) == row_bytes_of(type, n), "source row size");
    require(static_cast<size_t>(qry.columns) == tq_query_bytes(info_of(type).block, n), "query row size");
    require(reinterpret_cast<uintptr_t>(qry.data) % alignof(tq_query32) == 0 && qry.stride % alignof(tq_query32) == 0,
            "query alignment");
    require(target.writeable() && dst.rows == qry.rows && dst.columns == src.rows, "target shape");
    tq_status status = TQ_OK;
    {
        py::gil_scoped_release release;
        for (ptrdiff_t m = 0; m < qry.rows && status == TQ_OK; m++) {
            status = tq_dot(static_cast<tq_type>(type), src.data, src.stride, qry.data + m * qry.stride,
                            dst.data + m * dst.stride, src.rows, n);
        }
    }
    check(status);
}

// window is None or (k, v, type_k, type_v). Returns the numbers of rows of V in all tiles, and of those that were left
// out.
py::tuple attention(const floats & q, const bytes & k, const bytes & v, const py::object & mask,
                    const py::object & window, floats & out, int type_k, int type_v, float scale, float soft_cap,
                    float sparse_v, int threads) {
    require(q.ndim() == 3 && k.ndim() == 3 && v.ndim() == 3 && out.ndim() == 3, "three-dimensional arrays");
    const auto contiguous = [](const py::array & a) { return (a.flags() & py::array::c_style) != 0; };
    require(contiguous(q) && contiguous(k) && contiguous(v) && contiguous(out) && out.writeable(), "contiguous arrays");
    tq_attention_args args = {};
    args.q         = q.data();
    args.k         = k.data();
    args.v         = v.data();
    args.out       = out.mutable_data();
    args.type_k    = type_k;
    args.type_v    = type_v;
    args.n_head    = q.shape(0);
    args.n_query   = q.shape(1);
    args.head_k    = q.shape(2);
    args.n_kv_head = k.shape(0);
    args.n_kv      = k.shape(1);
    args.head_v    = out.shape(2);
    args.scale     = scale;
    args.soft_cap  = soft_cap;
    args.sparse_v  = sparse_v;
    args.threads   = threads;
    tq_attention_report report = {0, 0};
    args.report = &report;
    require(static_cast<size_t>(k.shape(2)) == cache_row_bytes(type_k, args.head_k), "k row size");
    require(static_cast<size_t>(v.shape(2)) == cache_row_bytes(type_v, args.head_v), "v row size");
    require(v.shape(0) == args.n_kv_head && v.shape(1) == args.n_kv, "v shape");
    require(out.shape(0) == args.n_head && out.shape(1) == args.n_query, "out shape");
    floats mask_rows; // keeps the array alive during the call
    if (!mask.is_none()) {
        require(py::isinstance<floats>(mask), "mask dtype");
        mask_rows = mask.cast<floats>();
        require(mask_rows.ndim() == 2 && contiguous(mask_rows) && mask_rows.shape(0) == args.n_query &&
                    mask_rows.shape(1) == args.n_kv, "mask shape");
        args.mask = mask_rows.data();
    }
    tq_attention_window newest = {};
    bytes newest_k, newest_v; // keep the arrays alive, too
    if (!window.is_none()) {
        const auto parts = window.cast<py::tuple>();
        require(parts.size() == 4 && py::isinstance<bytes>(parts[0]) && py::isinstance<bytes>(parts[1]), "window");
        newest_k      = parts[0].cast<bytes>();
        newest_v      = parts[1].cast<bytes>();
        newest.type_k = parts[2].cast<int>();
        newest.type_v = parts[3].cast<int>();
        require(newest_k.ndim() == 3 && newest_v.ndim() == 3 && contiguous(newest_k) && contiguous(newest_v), "window");
        newest.k    = newest_k.data();
        newest.v    = newest_v.data();
        newest.rows = newest_k.shape(1);
        require(newest_k.shape(0) == args.n_kv_head && newest_v.shape(0) == args.n_kv_head &&
                    newest_v.shape(1) == newest.rows && newest.rows <= args.n_kv, "window shape");
        require(static_cast<size_t>(newest_k.shape(2)) == cache_row_bytes(newest.type_k, args.head_k), "window k row");
        require(static_cast<size_t>(newest_v.shape(2)) == cache_row_bytes(newest.type_v, args.head_v), "window v row");
        args.window = &newest;
    }
    tq_status status;
    {
        py::gil_scoped_release release;
        status = tq_attention(&args);
    }
    check(status);
    return py::make_tuple(report.rows, report.left_out);
}

py::list kernels() {
    py::list list;
    for (int i = 0; i < tq_kernels_count(); i++) {
        list.append(py::make_tuple(tq_kernels_name(i), tq_kernels_supported(i) != 0));
    }
    return list;
}

py::object kernels_selected() {
    const char * name = tq_kernels_selected();
    return name ? py::object(py::str(name)) : py::object(py::none());
}

void kernels_select(const std::string & name) {
    const tq_status status = tq_kernels_select(name.c_str());
    if (status == TQ_ERROR_KERNELS_UNKNOWN || status == TQ_ERROR_KERNELS_UNSUPPORTED) {
        throw py::value_error("kernels '" + name + "': " + tq_status_text(status) + "; kernels of this build: " +
                              kernel_names());
    }
    check(status);
}

} // namespace

// noconvert: an argument of another dtype raises TypeError and is not copied silently.
PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.attr("version") = TURBOQUANT_VERSION;
    m.def("type_table", &type_table);
    m.def("row_table", &row_table);
    m.def("type_for_head", &type_for_head, py::arg("type"), py::arg("head"));
    m.def("signs", &signs, py::arg("which"));
    m.def("encode", &encode, py::arg("type"), py::arg("source").noconvert(), py::arg("target").noconvert(),
          py::arg("threads"));
    m.def("decode", &decode, py::arg("type"), py::arg("source").noconvert(), py::arg("target").noconvert(),
          py::arg("rotated"), py::arg("threads"));
    m.def("rotate", &rotate, py::arg("block"), py::arg("source").noconvert(), py::arg("target").noconvert(),
          py::arg("inverse"), py::arg("threads"));
    m.def("query_bytes", &query_bytes, py::arg("block"), py::arg("n"));
    m.def("query", &query, py::arg("block"), py::arg("source").noconvert(), py::arg("target").noconvert());
    m.def("dot", &dot, py::arg("type"), py::arg("source").noconvert(), py::arg("queries").noconvert(),
          py::arg("target").noconvert(), py::arg("n"));
    m.def("attention", &attention, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
          py::arg("mask"), py::arg("window"), py::arg("out").noconvert(), py::arg("type_k"), py::arg("type_v"),
          py::arg("scale"), py::arg("soft_cap"), py::arg("sparse_v"), py::arg("threads"));
    m.def("kernels", &kernels);
    m.def("kernels_selected", &kernels_selected);
    m.def("kernels_select", &kernels_select, py::arg("name"));
    m.def("kernels_check", [] { check(tq_kernels_status()); });
}
