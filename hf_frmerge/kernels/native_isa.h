/*
 * The kernels for one instruction-set level, written in GCC/Clang vector extensions because auto-vectorised C was no
 * faster than torch. native.c includes this file once per level, after defining
 *
 *     ISA       suffix of every name below
 *     TARGET    function attribute that turns the instructions on
 *     LANES     float32 lanes of the registers the Gram products run in
 *     HALF      lanes of one widening or float64 step
 *     PARTS     registers that HALF doubles take
 *     CROSS     columns of a register tile off the diagonal (it has 4 rows), as many as there are registers for
 *     FMA       a * b + c on F32, fused or not
 *     LOAD16, STORE16        HALF 16-bit values in memory to 32-bit lanes and back; LOAD16_ALL, STORE16_ALL for LANES
 *     BITS                   a bit for every lane of a mask of LANES
 *     MUL32                  products of the low halves of two U64; SWAP64 exchanges neighbouring lanes of one
 *     CLAMP                  F64 clamped between two others; none may be NaN
 *     TO_DOUBLE, TO_SINGLE   F32H to WIDE and back; INTS_TO_DOUBLE for I32H
 *     LOAD_F16, STORE_F16    optional: HALF float16 values in memory to floats and back; LOAD_F16_ALL for LANES
 */

#define F32 NAME(f32_)    /* LANES floats */
#define F32H NAME(f32h_)  /* HALF floats */
#define F64 NAME(f64_)    /* HALF / PARTS doubles */
#define WIDE NAME(wide_)  /* HALF doubles */
#define I64 NAME(i64_)
#define U64 NAME(u64_)
#define U16H NAME(u16h_)  /* HALF of each integer type */
#define U32H NAME(u32h_)
#define I32H NAME(i32h_)
#define U32 NAME(u32_)    /* LANES of each integer type */
#define I32 NAME(i32_)
/*
 * Elements between flushes of float32 sums to float64: 32 additions per lane, at most 512 elements. Long float32 sums
 * of squares drift systematically, and cosines with them; flushing this often cost no speed.
 */
#define RUN (32 * LANES)

/* Alignment 1, because a tensor may start at any byte of its file. */
typedef float F32 __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float F32H __attribute__((vector_size(4 * HALF), aligned(1), may_alias));
typedef double F64 __attribute__((vector_size(8 * HALF / PARTS), aligned(1), may_alias));
typedef int64_t I64 __attribute__((vector_size(8 * HALF / PARTS), aligned(1), may_alias));
typedef uint64_t U64 __attribute__((vector_size(8 * HALF / PARTS), aligned(1), may_alias));
typedef uint16_t U16H __attribute__((vector_size(2 * HALF), aligned(1), may_alias));
typedef uint32_t U32H __attribute__((vector_size(4 * HALF), aligned(1), may_alias));
typedef int32_t I32H __attribute__((vector_size(4 * HALF), aligned(1), may_alias));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t I32 __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef struct __attribute__((may_alias)) {
    F64 part[PARTS];
} WIDE;

/* ---- widening: exact for every value, including subnormals, infinities and NaN ---- */

TARGET INLINE F32H NAME(widen)(const uint8_t *p, DType dtype) {
    if (dtype == F32_) return *(const F32H *)p;
    if (dtype == BF16) return (F32H)((U32H)LOAD16(p) << 16);
#ifdef LOAD_F16
    return LOAD_F16(p);
#else
    U32H wide = (U32H)LOAD16(p);
    /* Shift exponent and mantissa into place; the product then corrects the exponent bias and normalises subnormals. */
    U32H magnitude = (wide & 0x7fff) << 13;
    U32H special = (U32H)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    F32H value = (F32H)magnitude * 0x1p112f;
    return (F32H)((U32H)value | special | (wide & 0x8000) << 16);
#endif
}

/* Widen LANES values at once, for the inner loops. */
TARGET INLINE F32 NAME(widen_all)(const uint8_t *p, DType dtype) {
    if (dtype == F32_) return *(const F32 *)p;
    if (dtype == BF16) return (F32)((U32)LOAD16_ALL(p) << 16);
#ifdef LOAD_F16_ALL
    return LOAD_F16_ALL(p);
#else
    return NAME(widen)(p, dtype);
#endif
}

TARGET INLINE WIDE NAME(widen64)(const uint8_t *p, DType dtype) {
    if (dtype == F64_) return *(const WIDE *)p;
    F32H single = NAME(widen)(p, dtype);
    return TO_DOUBLE(single);
}

TARGET INLINE void NAME(add)(WIDE *sum, WIDE term) {
    UNROLL for (int h = 0; h < PARTS; h++) sum->part[h] += term.part[h];
}

/* ---- rounding: one round-to-nearest-even from float64; every NaN becomes the one canonical NaN ---- */

#define SELECT(mask, a, b) (((mask) & (a)) | (~(mask) & (b)))

/*
 * Round to `precision` significant bits, and to fewer below `smallest`, the smallest normal number. Adding 1.5 * 2^52
 * units of the last place to keep makes the float64 addition round to that place; the subtraction is exact.
 */
TARGET INLINE F64 NAME(round)(F64 value, int precision, double smallest) {
    F64 power = (F64)((I64)value & (INT64_C(0x7ff) << 52));
    power = CLAMP(power, (F64){0} + smallest, (F64){0} + 0x1p200); /* the addend itself must not overflow */
    F64 addend = power * (1.5 * (double)(INT64_C(1) << (53 - precision)));
    F64 rounded = value + addend - addend;
    return (F64)((I64)rounded | ((I64)value & INT64_MIN)); /* the addition loses the sign of -0 */
}

TARGET INLINE void NAME(store)(WIDE value, uint8_t *out, DType dtype) {
    UNROLL for (int h = 0; h < PARTS; h++) {
        F64 *part = value.part + h;
        if (dtype == F64_) ((I64 *)out)[h] = SELECT(*part == *part, (I64)*part, INT64_C(0x7ff8) << 48);
        if (dtype == BF16) *part = NAME(round)(*part, 8, 0x1p-126);
        if (dtype == F16) *part = NAME(round)(*part, 11, 0x1p-14);
    }
    if (dtype == F64_) return;
    F32H single = TO_SINGLE(value); /* exact, or infinity, for the 16-bit types */
    U32H bits = (U32H)SELECT(single == single, (I32H)single, 0x7fc00000);
    if (dtype == F32_) {
        *(U32H *)out = bits;
        return;
    }
    if (dtype == BF16) {
        STORE16(out, bits >> 16);
        return;
    }
#ifdef STORE_F16
    STORE_F16(out, (F32H)bits);
#else
    U32H magnitude = (U32H)((F32H)(bits & 0x7fffffff) * 0x1p-112f) >> 13; /* the inverse of widen() */
    magnitude = SELECT((U32H)(magnitude > 0x7c00), 0x7c00, magnitude);
    U32H sign = bits >> 16 & 0x8000;
    STORE16(out, SELECT((U32H)(single == single), sign | magnitude, 0x7e00));
#endif
}

/* ---- digests: see native_digest.h ---- */

#define U64_LANES (HALF / PARTS)

TARGET INLINE void NAME(digest_stripes)(U64 *acc, const uint8_t *data, size_t stripes) {
    for (size_t s = 0; s < stripes; s++) {
        UNROLL for (int v = 0; v < 8 / U64_LANES; v++) {
            U64 value = *(const U64 *)(data + s * STRIPE + 8 * U64_LANES * v);
            U64 key = value ^ *(const U64 *)(SECRET + 8 * s + 8 * U64_LANES * v);
            acc[v] += SWAP64(value) + MUL32(key, key >> 32);
        }
    }
}

/* Digest the blocks that end before byte `upto`. The last block, whole or not, is left to digest_end(). */
TARGET INLINE void NAME(digest_advance)(Digest *digest, const uint8_t *data, size_t size, size_t upto) {
    size_t last = (size - 1) / DIGEST_BLOCK, end = upto / DIGEST_BLOCK < last ? upto / DIGEST_BLOCK : last;
    if (digest->blocks >= end) return;
    U64 acc[8 / U64_LANES], prime = (U64){0} + PRIME32_1;
    memcpy(acc, digest->acc, sizeof acc);
    for (; digest->blocks < end; digest->blocks++) {
        NAME(digest_stripes)(acc, data + digest->blocks * DIGEST_BLOCK, DIGEST_BLOCK / STRIPE);
        UNROLL for (int v = 0; v < 8 / U64_LANES; v++) {
            U64 key = acc[v] ^ acc[v] >> 47 ^ *(const U64 *)(SECRET + sizeof SECRET - STRIPE + 8 * U64_LANES * v);
            acc[v] = MUL32(key, prime) + (MUL32(key >> 32, prime) << 32);
        }
    }
    memcpy(digest->acc, acc, sizeof acc);
}

TARGET static void NAME(digest_end)(Digest *digest, const uint8_t *data, size_t size, uint8_t out[16]) {
    NAME(digest_advance)(digest, data, size, size);
    size_t done = digest->blocks * DIGEST_BLOCK;
    U64 acc[8 / U64_LANES];
    memcpy(acc, digest->acc, sizeof acc);
    NAME(digest_stripes)(acc, data + done, (size - 1 - done) / STRIPE);
    UNROLL for (int v = 0; v < 8 / U64_LANES; v++) { /* the last stripe uses another part of the secret */
        U64 value = *(const U64 *)(data + size - STRIPE + 8 * U64_LANES * v);
        U64 key = value ^ *(const U64 *)(SECRET + sizeof SECRET - STRIPE - 7 + 8 * U64_LANES * v);
        acc[v] += SWAP64(value) + MUL32(key, key >> 32);
    }
    memcpy(digest->acc, acc, sizeof acc);
    finish_digest(digest->acc, size, out);
}

#include "native_gram.h"
#include "native_combine.h"
#include "native_slices.h"
#include "native_counting.h"
#include "native_ranks.h"
#include "native_elements.h"

#define SCALAR float
#define VECTOR F32
#define MATMUL NAME(matmul32)
#define TILE NAME(tile32)
#define PACK NAME(pack32)
#define SWEEP NAME(sweep32)
#include "native_matmul.h"

#define SCALAR double
#define VECTOR F64
#define MATMUL NAME(matmul64)
#define TILE NAME(tile64)
#define PACK NAME(pack64)
#define SWEEP NAME(sweep64)
#include "native_matmul.h"

/* ---- counting ---- */

TARGET static size_t NAME(count_nonfinite)(const uint8_t *p, size_t count, DType dtype) {
    size_t found = 0;
#define COUNT(type, exponent)                                            \
    for (size_t k = 0; k < count; k++) {                                 \
        type bits;                                                       \
        memcpy(&bits, p + k * sizeof bits, sizeof bits);                 \
        found += (bits & (type)(exponent)) == (type)(exponent);          \
    }                                                                    \
    break
    switch (dtype) {
        case BF16: COUNT(uint16_t, 0x7f80);
        case F16: COUNT(uint16_t, 0x7c00);
        case F32_: COUNT(uint32_t, 0x7f800000);
        case F64_: COUNT(uint64_t, UINT64_C(0x7ff) << 52);
    }
#undef COUNT
    return found;
}

#undef ISA
#undef TARGET
#undef LANES
#undef HALF
#undef PARTS
#undef CROSS
#undef FMA
#undef LOAD16
#undef LOAD16_ALL
#undef STORE16
#undef STORE16_ALL
#undef BITS
#undef MUL32
#undef SWAP64
#undef LOAD_F16
#undef LOAD_F16_ALL
#undef STORE_F16
#undef TO_DOUBLE
#undef CLAMP
#undef TO_SINGLE
#undef INTS_TO_DOUBLE
