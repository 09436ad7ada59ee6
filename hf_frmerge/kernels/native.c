/*
 * hf_frmerge.kernels._native: Gram matrices and linear combinations over raw tensor bytes.
 *
 * The arithmetic is in native_isa.h, which is compiled here once per instruction-set level; the caller chooses one of
 * levels(). This file checks every size before it touches the first byte, and releases the GIL while it computes.
 * Floating-point contraction must be off (-ffp-contract=off): a fused multiply-add rounds once where combine() promises
 * two roundings, and so would give other bits on machines that have one.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs GCC or Clang on a little-endian machine; without this module the torch kernels are used"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "native_digest.h"

#define MAX_OPERANDS 256

typedef enum { BF16, F16, F32_, F64_ } DType;
static const char *const DTYPE_NAMES[] = {"BF16", "F16", "F32", "F64"};
static const size_t SIZE[] = {2, 2, 4, 8};
/* Bits of the smallest float64 that rounds to infinity: half a unit in the last place above the largest number. */
static const uint64_t OVERFLOWS_AT[] = {
    UINT64_C(0x47eff00000000000), /* 0x1.ffp127 */
    UINT64_C(0x40effe0000000000), /* 0x1.ffep15 */
    UINT64_C(0x47effffff0000000), /* 0x1.ffffffp127 */
    UINT64_C(0x7ff0000000000000),
};

typedef struct {
    const uint8_t *data;
    DType dtype;
    int is_delta;
} Operand;

/* Strides are in bytes; a transposed matrix has its strides exchanged. */
typedef struct {
    const uint8_t *data;
    ptrdiff_t row, column;
} Matrix;

/* How single elements are kept and joined; numbers and order are those of elementwise.py. */
typedef uint32_t __attribute__((may_alias)) Word; /* bits of floats, and scratch that holds one or the other */
typedef uint64_t __attribute__((may_alias)) LongWord;
typedef double __attribute__((may_alias)) Real;
enum { KEEP_BAND, KEEP_DROPOUT, KEEP_RANKED, KEEP_SPREAD, KEEP_AGREEMENT };
enum { JOIN_SUM, JOIN_ELECT, JOIN_MEAN };
typedef struct {
    int n, kind, join; /* n experts */
    const double *numbers, *weights, *votes; /* votes are the weights when a sign is elected */
    const uint64_t *keys; /* of the random numbers, one for each expert */
    double factor;
    size_t start, row_len; /* place of the first element in its tensor, for random numbers and ranks */
} Elements;

/*
 * The smallest float64 that, rounded to float32, is at least `value`, which is not negative: comparing with it saves the
 * rounding. Halfway to the float32 below, a tie goes to the even one.
 */
static double reaching(float value) {
    if (value == 0) return 0;
    union { float single; uint32_t bits; } below = {value};
    int even = !(below.bits & 1);
    double upper = below.bits == 0x7f800000 ? 0x1p128 : value; /* infinity is where the next float32 would be */
    below.bits--;
    union { double wide; uint64_t bits; } middle = {below.single / 2.0 + upper / 2.0};
    middle.bits += !even;
    return middle.wide;
}

/* The smallest float64 that, rounded to float32, exceeds `value`; NaN, which nothing reaches, if that is infinite. */
static double beyond(float value) {
    union { float single; uint32_t bits; } next = {value};
    next.bits++;
    return reaching(next.single);
}

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, ISA)

/*
 * Vector operations that GCC and Clang compile badly from vector extensions: they split some conversions into pieces.
 * Those are written as intrinsics here, for each level.
 */
#if defined(__x86_64__)
#define ISA _avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define LANES 16
#define HALF 8
#define PARTS 1
#define CROSS 4
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOAD16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD16_ALL(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define STORE16_ALL(p, x) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16((__m512i)(x)))
#define BITS(mask) _mm512_movepi32_mask((__m512i)(mask))
#define MUL32(a, b) ((U64)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define SWAP64(x) ((U64)_mm512_shuffle_epi32((__m512i)(x), 0x4e))
#define STORE16(p, x) _mm_storeu_si128((__m128i *)(p), _mm256_cvtepi32_epi16((__m256i)(x)))
#define LOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_F16_ALL(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define STORE_F16(p, x) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define CLAMP(x, low, high) _mm512_min_pd(_mm512_max_pd(x, low), high)
#define TO_DOUBLE(x) ((WIDE){{_mm512_cvtps_pd(x)}})
#define INTS_TO_DOUBLE(x) ((WIDE){{_mm512_cvtepi32_pd((__m256i)(x))}})
#define TO_SINGLE(x) _mm512_cvtpd_ps(x.part[0])
#include "native_isa.h"

#define ISA _avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define HALF 4
#define PARTS 1
#define CROSS 2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOAD16(p) _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define LOAD16_ALL(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define STORE16_ALL(p, x)                                                                                     \
    _mm_storeu_si128((__m128i *)(p), _mm_packus_epi32(_mm256_castsi256_si128((__m256i)(x)),                   \
                                                      _mm256_extracti128_si256((__m256i)(x), 1)))
#define BITS(mask) _mm256_movemask_ps((__m256)(mask))
#define MUL32(a, b) ((U64)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define SWAP64(x) ((U64)_mm256_shuffle_epi32((__m256i)(x), 0x4e))
#define STORE16(p, x) _mm_storel_epi64((__m128i *)(p), _mm_packus_epi32((__m128i)(x), (__m128i)(x)))
#define LOAD_F16(p) _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(p)))
#define LOAD_F16_ALL(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define STORE_F16(p, x) _mm_storel_epi64((__m128i *)(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define CLAMP(x, low, high) _mm256_min_pd(_mm256_max_pd(x, low), high)
#define TO_DOUBLE(x) ((WIDE){{_mm256_cvtps_pd(x)}})
#define INTS_TO_DOUBLE(x) ((WIDE){{_mm256_cvtepi32_pd((__m128i)(x))}})
#define TO_SINGLE(x) _mm256_cvtpd_ps(x.part[0])
#include "native_isa.h"
#endif

#define ISA _plain
#define TARGET
#define LANES 4
#define HALF 4
#define PARTS 2
#define CROSS 2
#define FMA(a, b, c) ((a) * (b) + (c))
#define LOAD16(p) __builtin_convertvector(*(const U16H *)(p), U32H)
#define LOAD16_ALL(p) LOAD16(p) /* LANES are HALF here */
#define STORE16_ALL(p, x) STORE16(p, x)
#define BITS(mask) (((mask)[0] & 1) | ((mask)[1] & 2) | ((mask)[2] & 4) | ((mask)[3] & 8))
#define MUL32(a, b) (((a) & 0xffffffff) * ((b) & 0xffffffff))
#define SWAP64(x) ((U64){(x)[1], (x)[0]})
#define STORE16(p, x) (*(U16H *)(p) = __builtin_convertvector(x, U16H))
#define CHOOSE(mask, a, b) ((F64)SELECT(mask, (I64)(a), (I64)(b)))
#define CLAMP(x, low, high) CHOOSE((x) < (low), low, CHOOSE((x) > (high), high, x))
#define TO_DOUBLE(x) ((WIDE){{{(x)[0], (x)[1]}, {(x)[2], (x)[3]}}})
#define INTS_TO_DOUBLE(x) TO_DOUBLE(x)
#define TO_SINGLE(x) ((F32H){x.part[0][0], x.part[0][1], x.part[1][0], x.part[1][1]})
#include "native_isa.h"

typedef struct {
    const char *name;
    int (*gram)(const Operand *, int, size_t, size_t, int, double *, uint8_t *);
    int (*combine)(const Operand *, int, size_t, size_t, const uint8_t *, uint8_t *, DType, uint8_t *);
    int (*count_keys)(const Operand *, int, size_t, int, const int64_t *, int, int64_t *);
    int (*energies)(const Operand *, int, size_t, float, double *);
    int (*elementwise)(const Operand *, size_t, const Elements *, size_t, size_t, uint8_t *, DType, uint8_t *);
    size_t (*count_nonfinite)(const uint8_t *, size_t, DType);
    void (*matmul32)(Matrix, Matrix, void *, size_t, size_t, size_t, int);
    void (*matmul64)(Matrix, Matrix, void *, size_t, size_t, size_t, int);
} Level;

/* Fastest first: levels() keeps this order, and callers take the first level by default. */
#define LEVEL(name, isa)                                                                                        \
    {                                                                                                           \
        name, gram##isa, combine##isa, count_keys##isa, energies##isa, elementwise##isa, count_nonfinite##isa,  \
            matmul32##isa, matmul64##isa                                                                        \
    }
static const Level LEVELS[] = {
#if defined(__x86_64__)
    LEVEL("avx512", _avx512),
    LEVEL("avx2", _avx2),
#endif
    LEVEL("plain", _plain),
};
#define N_LEVELS ((int)(sizeof LEVELS / sizeof *LEVELS))

static int is_supported(const char *level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* F16C is older than AVX2 */
    if (!strcmp(level, "avx2")) return avx2;
    if (!strcmp(level, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !strcmp(level, "plain");
}

static const Level *find_level(const char *name) {
    for (int i = 0; i < N_LEVELS; i++)
        if (!strcmp(LEVELS[i].name, name) && is_supported(name)) return &LEVELS[i];
    PyErr_Format(PyExc_ValueError, "this machine has no kernel level '%s'; levels() lists those it has", name);
    return NULL;
}

static int parse_dtype(PyObject *name, DType *dtype) {
    for (int i = 0; i < 4; i++) {
        if (PyUnicode_Check(name) && !PyUnicode_CompareWithASCIIString(name, DTYPE_NAMES[i])) {
            *dtype = (DType)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "dtype must be 'BF16', 'F16', 'F32' or 'F64', got %R", name);
    return -1;
}

/* Get a contiguous buffer of exactly `size` bytes; returns -1 with ValueError otherwise. */
static int get_buffer(PyObject *object, const char *what, size_t size, int flags, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, flags)) {
        const char *writable = flags & PyBUF_WRITABLE ? " writable" : "";
        PyErr_Format(PyExc_ValueError, "%s must be a contiguous%s buffer", what, writable);
        return -1;
    }
    if ((size_t)view->len != size) {
        PyErr_Format(PyExc_ValueError, "%s must have %zu bytes, got %zd", what, size, view->len);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

/* Returns n_blocks * block_len, or -1 with ValueError if that many elements of 8 bytes would overflow a size. */
static Py_ssize_t count_elements(Py_ssize_t n_blocks, Py_ssize_t block_len) {
    Py_ssize_t count, bytes;
    if (n_blocks < 0 || block_len < 0 || __builtin_mul_overflow(n_blocks, block_len, &count) ||
        __builtin_mul_overflow(count, (Py_ssize_t)8, &bytes)) {
        PyErr_Format(PyExc_ValueError, "n_blocks and block_len make no sense: %zd, %zd", n_blocks, block_len);
        return -1;
    }
    return count;
}

typedef struct {
    int n;
    Operand x[MAX_OPERANDS];
    Py_buffer views[MAX_OPERANDS];
} Operands;

static void release_operands(Operands *operands) {
    for (int i = 0; i < operands->n; i++) PyBuffer_Release(&operands->views[i]);
    free(operands);
}

/* Parse a tuple of (buffer, dtype, is_delta) in which every buffer holds `count` elements. */
static Operands *get_operands(PyObject *tuple, size_t count) {
    Py_ssize_t n = PyTuple_Size(tuple);
    if (n < 1 || n > MAX_OPERANDS) {
        PyErr_Format(PyExc_ValueError, "expected 1 to %d operands, got %zd", MAX_OPERANDS, n);
        return NULL;
    }
    Operands *operands = calloc(1, sizeof *operands);
    if (!operands) return (Operands *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PyTuple_GetItem(tuple, i), *data, *dtype;
        Operand *x = &operands->x[i];
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_ValueError, "an operand must be a tuple (data, dtype, is_delta)");
        } else if (PyArg_ParseTuple(item, "OOp", &data, &dtype, &x->is_delta) && !parse_dtype(dtype, &x->dtype) &&
                   !get_buffer(data, "operand", count * SIZE[x->dtype], PyBUF_C_CONTIGUOUS, &operands->views[i])) {
            x->data = operands->views[i].buf;
            operands->n++;
            continue;
        }
        release_operands(operands);
        return NULL;
    }
    return operands;
}

static PyObject *py_levels(PyObject *module, PyObject *unused) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < N_LEVELS; i++) {
        if (!is_supported(LEVELS[i].name)) continue;
        PyObject *name = PyUnicode_FromString(LEVELS[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_gram(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *tuple, *out_object, *digests_object = Py_None;
    Py_ssize_t n_blocks, block_len, count, out_bytes;
    int precise;
    if (!PyArg_ParseTuple(args, "sO!nnpO|O", &level_name, &PyTuple_Type, &tuple, &n_blocks, &block_len, &precise,
                          &out_object, &digests_object))
        return NULL;
    const Level *level = find_level(level_name);
    if (!level || (count = count_elements(n_blocks, block_len)) < 0) return NULL;
    Operands *operands = get_operands(tuple, count);
    if (!operands) return NULL;

    PyObject *result = NULL;
    Py_buffer out, digests = {0};
    int n = operands->n, wanted = digests_object != Py_None;
    for (int i = 0; i < n; i++)
        if (wanted && !operands->x[i].is_delta && count * SIZE[operands->x[i].dtype] < DIGEST_LEAST) {
            PyErr_Format(PyExc_ValueError, "digests are of operands of at least %d bytes", DIGEST_LEAST);
            goto end;
        }
    if (__builtin_mul_overflow(n_blocks, (Py_ssize_t)n * n * 8, &out_bytes)) {
        PyErr_SetString(PyExc_ValueError, "n_blocks is too large");
        goto end;
    }
    if (get_buffer(out_object, "out", out_bytes, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &out)) goto end;
    if (!wanted || !get_buffer(digests_object, "digests", 16 * n, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &digests)) {
        for (int i = 0; i < n; i++) precise |= operands->x[i].dtype == F64_;
        int failed;
        Py_BEGIN_ALLOW_THREADS;
        failed = level->gram(operands->x, n, n_blocks, block_len, precise, out.buf, digests.buf);
        Py_END_ALLOW_THREADS;
        result = failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
        if (wanted) PyBuffer_Release(&digests);
    }
    PyBuffer_Release(&out);
end:
    release_operands(operands);
    return result;
}

static PyObject *py_combine(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *tuple, *coefficients_object, *out_object, *dtype_object;
    Py_ssize_t n_blocks, block_len, count, table_bytes;
    DType dtype;
    if (!PyArg_ParseTuple(args, "sO!OnnOO", &level_name, &PyTuple_Type, &tuple, &coefficients_object, &n_blocks,
                          &block_len, &out_object, &dtype_object))
        return NULL;
    const Level *level = find_level(level_name);
    if (!level || parse_dtype(dtype_object, &dtype) || (count = count_elements(n_blocks, block_len)) < 0) return NULL;
    Operands *operands = get_operands(tuple, count);
    if (!operands) return NULL;

    PyObject *result = NULL;
    Py_buffer table, out;
    uint8_t digest[16];
    int wanted = count * SIZE[dtype] >= DIGEST_LEAST, finite;
    if (__builtin_mul_overflow(n_blocks, (Py_ssize_t)operands->n * 8, &table_bytes))
        PyErr_SetString(PyExc_ValueError, "n_blocks is too large");
    else if (!get_buffer(coefficients_object, "coefficients", table_bytes, PyBUF_C_CONTIGUOUS, &table)) {
        if (!get_buffer(out_object, "out", count * SIZE[dtype], PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &out)) {
            Py_BEGIN_ALLOW_THREADS;
            finite = level->combine(operands->x, operands->n, n_blocks, block_len, table.buf, out.buf, dtype,
                                    wanted ? digest : NULL);
            Py_END_ALLOW_THREADS;
            /* "y#" turns a null pointer into None: short outputs have no digest. */
            result = Py_BuildValue("y#N", wanted ? (const char *)digest : NULL, (Py_ssize_t)sizeof digest,
                                   PyBool_FromLong(finite));
            PyBuffer_Release(&out);
        }
        PyBuffer_Release(&table);
    }
    release_operands(operands);
    return result;
}

static PyObject *py_count_nonfinite(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *data, *dtype_object;
    DType dtype;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "sOO", &level_name, &data, &dtype_object)) return NULL;
    const Level *level = find_level(level_name);
    if (!level || parse_dtype(dtype_object, &dtype)) return NULL;
    if (PyObject_GetBuffer(data, &view, PyBUF_C_CONTIGUOUS)) {
        PyErr_SetString(PyExc_ValueError, "data must be a contiguous buffer");
        return NULL;
    }
    size_t found = 0, size = view.len;
    if (size % SIZE[dtype] == 0) {
        Py_BEGIN_ALLOW_THREADS;
        found = level->count_nonfinite(view.buf, size / SIZE[dtype], dtype);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_Format(PyExc_ValueError, "%zu bytes are no whole number of %s elements", size, DTYPE_NAMES[dtype]);
    }
    PyBuffer_Release(&view);
    return PyErr_Occurred() ? NULL : PyLong_FromSize_t(found);
}

/* Get a matrix of float32 or float64 with any strides. */
static int get_matrix(PyObject *object, const char *what, Py_buffer *view, Matrix *matrix) {
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT)) return -1;
    if (view->ndim == 2 && (!strcmp(view->format, "f") || !strcmp(view->format, "d"))) {
        *matrix = (Matrix){view->buf, view->strides[0], view->strides[1]};
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s must be a matrix of float32 or float64", what);
    PyBuffer_Release(view);
    return -1;
}

static PyObject *py_matmul(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *left_object, *right_object, *out_object, *result = NULL;
    Py_buffer left_view, right_view, out;
    Matrix left, right;
    if (!PyArg_ParseTuple(args, "sOOO", &level_name, &left_object, &right_object, &out_object)) return NULL;
    const Level *level = find_level(level_name);
    if (!level || get_matrix(left_object, "left", &left_view, &left)) return NULL;
    if (!get_matrix(right_object, "right", &right_view, &right)) {
        Py_ssize_t rows = left_view.shape[0], depth = left_view.shape[1], columns = right_view.shape[1], bytes;
        if (right_view.shape[0] != depth || right_view.itemsize != left_view.itemsize)
            PyErr_SetString(PyExc_ValueError, "left and right must be of one type and (m, k) and (k, n)");
        else if (__builtin_mul_overflow(rows, columns, &bytes) ||
                 __builtin_mul_overflow(bytes, left_view.itemsize, &bytes))
            PyErr_SetString(PyExc_ValueError, "the product is too large");
        else if (!get_buffer(out_object, "out", bytes, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &out)) {
            /* A matrix times its own transpose, recognised by its memory: only half of it is computed. */
            int symmetric = left.data == right.data && rows == columns && left.row == right.column &&
                            left.column == right.row;
            Py_BEGIN_ALLOW_THREADS;
            (left_view.itemsize == 4 ? level->matmul32 : level->matmul64)(left, right, out.buf, rows, depth, columns,
                                                                          symmetric);
            Py_END_ALLOW_THREADS;
            result = Py_NewRef(Py_None);
            PyBuffer_Release(&out);
        }
        PyBuffer_Release(&right_view);
    }
    PyBuffer_Release(&left_view);
    return result;
}

#include "native_elements_py.h"
#include "native_faults.h"
#include "native_pages.h"

static PyMethodDef METHODS[] = {
    {"levels", py_levels, METH_NOARGS, "levels() -> list of the instruction-set levels this machine has, best first"},
    {"gram", py_gram, METH_VARARGS, "gram(level, ((data, dtype, is_delta), ...), n_blocks, block_len, precise, out, digests=None)"},
    {"combine", py_combine, METH_VARARGS,
     "combine(level, ((data, dtype, is_delta), ...), coefficients, n_blocks, block_len, out, out_dtype)"
     " -> (digest of out, or None if it is short; whether all of it is finite)"},
    {"count_keys", py_count_keys, METH_VARARGS, "count_keys(level, operands, count, of_spread, bins or None, out)"},
    {"energies", py_energies, METH_VARARGS, "energies(level, operands, count, threshold, out): squares are added to out"},
    {"elementwise", py_elementwise, METH_VARARGS,
     "elementwise(level, operands, count, (kind, join, factor, start, row_len), numbers, weights, keys, skip, out, out_dtype)"
     " -> (digest of out, or None if it is short; whether the deltas are finite; whether the output is)"},
    {"count_nonfinite", py_count_nonfinite, METH_VARARGS, "count_nonfinite(level, data, dtype) -> int"},
    {"matmul", py_matmul, METH_VARARGS, "matmul(level, left, right, out): out = left @ right, sums in the order of the inner dimension"},
    {"fault_in", py_fault_in, METH_O, "fault_in((buffer, ...)) -> whether all pages of all of them can be read now"},
    {"give_back", py_give_back, METH_O, "give_back((buffer, ...)): unmap the pages wholly inside of them"},
    {"guard", py_guard, METH_O, "guard(buffer) -> number; unreadable pages of it read as zeros from now on"},
    {"unguard", py_unguard, METH_O, "unguard(number): call it before the buffer is unmapped"},
    {"is_broken", py_is_broken, METH_O, "is_broken(number) -> whether a page of the buffer could not be read"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Gram matrices and linear combinations over raw tensor bytes.",
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&MODULE); }
