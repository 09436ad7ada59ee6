/*
 * The kernels at one instruction-set level, in GCC/Clang vector extensions. native.c includes this file once per
 * level, after defining
 *
 *     ISA       suffix of every name below
 *     TARGET    function attribute that turns the instructions on
 *     LANES     float32 lanes of the registers the Gram products run in
 *     HALF      lanes of one widening or float64 step
 *     PARTS     registers that HALF doubles take
 *     CROSS     columns of a register tile off the diagonal (rows: 4), as many as the register file holds
 *     FMA       a * b + c on F32, fused or not
 *     LOAD16, STORE16        HALF 16-bit values in memory to 32-bit lanes and back; LOAD16_ALL, STORE16_ALL for LANES
 *     ANY                    whether any lane of a mask of LANES is set
 *     MUL32                  products of the low halves of two U64; SWAP64 exchanges neighbouring lanes of one
 *     CLAMP                  F64 held between two others; none is NaN
 *     TO_DOUBLE, TO_SINGLE   F32H to WIDE and back
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
#define RUN (32 * LANES) /* elements between flushes to float64: 32 additions a lane, at most 512 elements */

/* Alignment 1: a tensor starts where its file put it. */
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
    /* Exponent and mantissa moved into place; the product puts the bias right and normalises subnormals. */
    U32H magnitude = (wide & 0x7fff) << 13;
    U32H special = (U32H)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    F32H value = (F32H)magnitude * 0x1p112f;
    return (F32H)((U32H)value | special | (wide & 0x8000) << 16);
#endif
}

/* LANES values, for the loops that matter most. */
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
 * Keep `precision` significant bits, fewer below `smallest`, the least normal power of two. Beside an addend of 1.5
 * times 2^52 units of the last place wanted, the addition rounds to that place, and the subtraction is exact.
 */
TARGET INLINE F64 NAME(round)(F64 value, int precision, double smallest) {
    F64 power = (F64)((I64)value & (INT64_C(0x7ff) << 52));
    power = CLAMP(power, (F64){0} + smallest, (F64){0} + 0x1p200); /* above, room is needed for the addend */
    F64 addend = power * (1.5 * (double)(INT64_C(1) << (53 - precision)));
    F64 rounded = value + addend - addend;
    return (F64)((I64)rounded | ((I64)value & INT64_MIN)); /* the sign of zero */
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

/* Take in the blocks that lie wholly before byte `upto`; the last one, whole or not, is left for the end. */
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
    UNROLL for (int v = 0; v < 8 / U64_LANES; v++) { /* the last stripe, with the secret of its own */
        U64 value = *(const U64 *)(data + size - STRIPE + 8 * U64_LANES * v);
        U64 key = value ^ *(const U64 *)(SECRET + sizeof SECRET - STRIPE - 7 + 8 * U64_LANES * v);
        acc[v] += SWAP64(value) + MUL32(key, key >> 32);
    }
    memcpy(digest->acc, acc, sizeof acc);
    finish_digest(digest->acc, size, out);
}

/* ---- Gram ---- */

/* What every block of a Gram pass works on: room for widened runs and partial sums, and digests if they are wanted. */
typedef struct {
    double *zeros, *runs, *sums;
    Digest *digests;
    size_t count; /* elements of an operand, all blocks together */
} NAME(Scratch);

/* Digest what lies before element `upto` and was read a moment ago. */
TARGET INLINE void NAME(digest_run)(const Operand *x, int i, size_t upto, const NAME(Scratch) *scratch) {
    size_t size = SIZE[x[i].dtype];
    if (scratch->digests && !x[i].is_delta)
        NAME(digest_advance)(scratch->digests + i, x[i].data, scratch->count * size, upto * size);
}

/* Widen `count` elements, minus `base`, into `out`, and pad with zeros to whole registers. */
TARGET INLINE void NAME(fill_as)(const uint8_t *p, DType dtype, size_t count, const float *base, float *out) {
    size_t k = 0, size = SIZE[dtype];
    for (; k + LANES <= count; k += LANES) {
        __builtin_prefetch(p + (k + 2 * RUN) * size, 0, 2); /* two runs ahead, beyond the products in between */
        *(F32 *)(out + k) = NAME(widen_all)(p + k * size, dtype) - *(const F32 *)(base + k);
    }
    if (k < count) {
        uint8_t pad[4 * LANES] = {0};
        memcpy(pad, p + k * size, (count - k) * size);
        *(F32 *)(out + k) = NAME(widen_all)(pad, dtype) - *(const F32 *)(base + k);
        memset(out + count, 0, (k + LANES - count) * sizeof *out);
    }
}

TARGET static void NAME(fill)(const Operand *x, size_t start, size_t count, const float *base, float *out) {
    const uint8_t *p = x->data + start * SIZE[x->dtype];
    switch (x->dtype) {
        case BF16: NAME(fill_as)(p, BF16, count, base, out); break;
        case F16: NAME(fill_as)(p, F16, count, base, out); break;
        default: NAME(fill_as)(p, F32_, count, base, out);
    }
}

/* Products of `rows` x `cols` widened runs; each pair's lanes go to its HALF float64 sums, `stride` pairs a row. */
TARGET INLINE void NAME(tile)(const float *a, const float *b, int rows, int cols, int diagonal, size_t count,
                              double *sums, size_t stride) {
    F32 acc[4][4];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < cols; j++) acc[i][j] = (F32){0};
    for (size_t k = 0; k < count; k += LANES) {
        F32 x[4];
        UNROLL for (int i = 0; i < rows; i++) x[i] = *(const F32 *)(a + i * RUN + k);
        UNROLL for (int j = 0; j < cols; j++) {
            F32 y = diagonal ? x[j] : *(const F32 *)(b + j * RUN + k);
            UNROLL for (int i = 0; i < rows; i++)
                if (!diagonal || i <= j) acc[i][j] = FMA(x[i], y, acc[i][j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int j = diagonal ? i : 0; j < cols; j++) {
            F32H half[LANES / HALF];
            memcpy(half, &acc[i][j], sizeof half);
            for (int h = 1; h < LANES / HALF; h++) half[0] += half[h];
            NAME(add)((WIDE *)(sums + (i * stride + j) * HALF), TO_DOUBLE(half[0]));
        }
    }
}

#define DIAGONAL(n) \
    case n: NAME(tile)(a, a, n, n, 1, count, sums, stride); break
#define OFF_DIAGONAL(n) \
    case n: NAME(tile)(a, b, 4, n, 0, count, sums, stride); break

TARGET static void NAME(diagonal_tile)(const float *a, int n, size_t count, double *sums, size_t stride) {
    switch (n) { DIAGONAL(1); DIAGONAL(2); DIAGONAL(3); DIAGONAL(4); }
}

TARGET static void NAME(cross_tile)(const float *a, const float *b, int n, size_t count, double *sums, size_t stride) {
    switch (n) {
        OFF_DIAGONAL(1);
        OFF_DIAGONAL(2);
#if CROSS == 4
        OFF_DIAGONAL(3);
        OFF_DIAGONAL(4);
#endif
    }
}

/* Upper triangle of one block, as HALF partial sums a pair. */
TARGET static void NAME(gram_block)(const Operand *x, int n, size_t start, size_t length,
                                    const NAME(Scratch) *scratch) {
    const float *zeros = (const float *)scratch->zeros;
    float *runs = (float *)scratch->runs;
    double *sums = scratch->sums;
    for (size_t done = 0; done < length; done += RUN) {
        size_t count = length - done < RUN ? length - done : RUN;
        for (int i = 0; i < n; i++) {
            NAME(fill)(x + i, start + done, count, i && !x[i].is_delta ? runs : zeros, runs + i * RUN);
            NAME(digest_run)(x, i, start + done + count, scratch);
        }
        for (int i = 0; i < n; i += 4) {
            int rows = n - i < 4 ? n - i : 4;
            NAME(diagonal_tile)(runs + i * RUN, rows, count, sums + (i * n + i) * HALF, n);
            for (int j = i + 4; j < n; j += CROSS) {
                int cols = n - j < CROSS ? n - j : CROSS;
                NAME(cross_tile)(runs + i * RUN, runs + j * RUN, cols, count, sums + (i * n + j) * HALF, n);
            }
        }
    }
}

/* The same with values widened to float64 before the subtraction and the product. */
TARGET static void NAME(gram_block_precise)(const Operand *x, int n, size_t start, size_t length,
                                            const NAME(Scratch) *scratch) {
    const double *zeros = scratch->zeros;
    double *runs = scratch->runs, *sums = scratch->sums;
    for (size_t done = 0; done < length; done += RUN) {
        size_t count = length - done < RUN ? length - done : RUN;
        for (int i = 0; i < n; i++) {
            size_t size = SIZE[x[i].dtype];
            const uint8_t *p = x[i].data + (start + done) * size;
            const double *base = i && !x[i].is_delta ? runs : zeros;
            for (size_t k = 0; k < count; k += HALF) {
                uint8_t pad[8 * HALF] = {0};
                int whole = count - k >= HALF;
                if (!whole) memcpy(pad, p + k * size, (count - k) * size);
                WIDE value = NAME(widen64)(whole ? p + k * size : pad, x[i].dtype);
                for (int h = 0; h < PARTS; h++) value.part[h] -= ((const WIDE *)(base + k))->part[h];
                *(WIDE *)(runs + i * RUN + k) = value;
            }
            NAME(digest_run)(x, i, start + done + count, scratch);
        }
        for (int i = 0; i < n; i++) {
            for (int j = i; j < n; j++) {
                const double *a = runs + i * RUN, *b = runs + j * RUN;
                WIDE acc = *(WIDE *)(sums + (i * n + j) * HALF);
                for (size_t k = 0; k < count; k += HALF)
                    UNROLL for (int h = 0; h < PARTS; h++)
                        acc.part[h] += ((const WIDE *)(a + k))->part[h] * ((const WIDE *)(b + k))->part[h];
                *(WIDE *)(sums + (i * n + j) * HALF) = acc;
            }
        }
    }
}

/* `digest_bytes` has room for 16 bytes an operand, or is NULL. */
TARGET static int NAME(gram)(const Operand *x, int n, size_t n_blocks, size_t block_len, int precise, double *out,
                             uint8_t *digest_bytes) {
    size_t n_sums = (size_t)n * n * HALF, n_runs = (size_t)n * RUN;
    NAME(Scratch) scratch = {.count = n_blocks * block_len};
    Digest digests[MAX_OPERANDS];
    scratch.zeros = aligned_alloc(64, ((RUN + n_runs + n_sums) * sizeof(double) + 63) / 64 * 64);
    if (!scratch.zeros) return -1;
    memset(scratch.zeros, 0, RUN * sizeof(double));
    scratch.runs = scratch.zeros + RUN;
    scratch.sums = scratch.runs + n_runs;
    if (digest_bytes) scratch.digests = digests;
    for (int i = 0; i < n; i++) digests[i] = DIGEST_START;
    for (size_t block = 0; block < n_blocks; block++, out += n * n) {
        memset(scratch.sums, 0, n_sums * sizeof(double));
        if (precise) NAME(gram_block_precise)(x, n, block * block_len, block_len, &scratch);
        else NAME(gram_block)(x, n, block * block_len, block_len, &scratch);
        for (int i = 0; i < n; i++) {
            for (int j = i; j < n; j++) {
                double total = 0;
                for (int h = 0; h < HALF; h++) total += scratch.sums[(i * n + j) * HALF + h];
                out[i * n + j] = out[j * n + i] = total;
            }
        }
    }
    free(scratch.zeros);
    for (int i = 0; digest_bytes && i < n; i++)
        if (!x[i].is_delta)
            NAME(digest_end)(digests + i, x[i].data, scratch.count * SIZE[x[i].dtype], digest_bytes + 16 * i);
    return 0;
}

/* ---- combine ---- */

#define QUICK 4 /* registers at a time: the loop over operands costs as much as the arithmetic on one */
#define COMBINE_RUN 8192 /* elements between looks at the digest: what was written is still in the first cache */

/* Sum of c[i] * x[i] over `units` registers: float64, in order, multiplication and addition each rounded. */
TARGET INLINE void NAME(combine_step)(const Operand *x, const double *c, int n, size_t start, int units, uint8_t *out,
                                      DType out_dtype) {
    WIDE acc[4];
    UNROLL for (int u = 0; u < units; u++)
        UNROLL for (int h = 0; h < PARTS; h++) acc[u].part[h] = -(F64){0}; /* -0 + y is y for every y, also for -0 */
#define ADD(dtype_)                                                                \
    case dtype_:                                                                   \
        UNROLL for (int u = 0; u < units; u++) {                                   \
            WIDE term = NAME(widen64)(p + u * HALF * SIZE[dtype_], dtype_);        \
            UNROLL for (int h = 0; h < PARTS; h++) term.part[h] *= c[i];           \
            NAME(add)(acc + u, term);                                              \
        }                                                                          \
        break
    for (int i = 0; i < n; i++) {
        const uint8_t *p = x[i].data + start * SIZE[x[i].dtype];
        switch (x[i].dtype) { ADD(BF16); ADD(F16); ADD(F32_); ADD(F64_); }
    }
#undef ADD
    UNROLL for (int u = 0; u < units; u++) NAME(store)(acc[u], out + u * HALF * SIZE[out_dtype], out_dtype);
}

/*
 * The same for QUICK registers of LANES values, 16-bit in and bfloat16 out, in float32 where that cannot change the
 * answer. Returns a bit for every register in which some lane is in doubt; what is written for those is worthless.
 *
 * Float32 and float64 sums differ by less than 2 n + 2 roundings of the sum of magnitudes: one for every coefficient,
 * product and addition. Where the numbers that far below and above round to the same bfloat16 number, so do both sums.
 */
TARGET INLINE unsigned NAME(combine_quickly)(const Operand *x, const float *c, int n, size_t start, uint8_t *out) {
    F32 sum[QUICK], magnitude[QUICK];
    UNROLL for (int u = 0; u < QUICK; u++) {
        sum[u] = -(F32){0};
        magnitude[u] = (F32){0};
    }
#define ADD(dtype_)                                                       \
    UNROLL for (int u = 0; u < QUICK; u++) {                              \
        F32 value = NAME(widen_all)(p + u * 2 * LANES, dtype_);           \
        F32 size = (F32)((U32)value & 0x7fffffff);                        \
        sum[u] = FMA(value, c[i] - (F32){0}, sum[u]);                     \
        magnitude[u] = FMA(size, c[MAX_OPERANDS + i] - (F32){0}, magnitude[u]); \
    }
    for (int i = 0; i < n; i++) {
        const uint8_t *p = x[i].data + start * 2;
        for (size_t line = 0; line < QUICK * 2 * LANES; line += 64)
            __builtin_prefetch(p + 1024 + line, 0, 2); /* the hardware's own stops at every page */
        if (x[i].dtype == BF16) {
            ADD(BF16);
        } else {
            ADD(F16);
        }
    }
#undef ADD
    unsigned in_doubt = 0;
    UNROLL for (int u = 0; u < QUICK; u++) {
        F32 doubt = magnitude[u] * ((2 * n + 2) * 0x1p-24f);
        U32 low = ((U32)(sum[u] - doubt) + 0x8000) >> 16, high = ((U32)(sum[u] + doubt) + 0x8000) >> 16;
        /* Products neither vanish nor overflow; zeros are exact, with their signs. */
        I32 plain = (I32)((U32)magnitude[u] - 0x08800000 < (U32){0} + (0x7b800000 - 0x08800000)); /* 2^-110 to 2^120 */
        I32 certain = (I32)(low == high) & (plain | (magnitude[u] == 0.0f));
        in_doubt |= (unsigned)(ANY(~certain) != 0) << u;
        STORE16_ALL(out + u * 2 * LANES, high);
    }
    return in_doubt;
}

/* A run of one block; `doubts` counts what could not be done in float32 so far. */
TARGET INLINE void NAME(combine_as)(const Operand *x, const double *c, int n, size_t start, size_t length,
                                    uint8_t *out, DType out_dtype, size_t *doubts) {
    size_t k = 0, size = SIZE[out_dtype];
    if (out_dtype == BF16) {
        float quick[2 * MAX_OPERANDS]; /* coefficients, and behind them their magnitudes */
        int narrow = 1;
        for (int i = 0; i < n; i++) {
            narrow &= SIZE[x[i].dtype] == 2;
            quick[i] = (float)c[i];
            quick[MAX_OPERANDS + i] = c[i] < 0 ? -quick[i] : quick[i];
        }
        /* Coefficients such as 1/2 give midpoints by the million: then trying is a waste. */
        size_t step = QUICK * LANES;
        for (; narrow && k + step <= length && *doubts < 64 + (start + k) / (4 * LANES); k += step) {
            unsigned in_doubt = NAME(combine_quickly)(x, quick, n, start + k, out + 2 * k);
            for (size_t u = k; in_doubt; u += LANES, in_doubt >>= 1) {
                if (!(in_doubt & 1)) continue;
                ++*doubts;
                for (size_t v = u; v < u + LANES; v += HALF)
                    NAME(combine_step)(x, c, n, start + v, 1, out + 2 * v, BF16);
            }
        }
    }
    for (; k + 4 * HALF <= length; k += 4 * HALF)
        NAME(combine_step)(x, c, n, start + k, 4, out + k * size, out_dtype);
    for (; k + HALF <= length; k += HALF) NAME(combine_step)(x, c, n, start + k, 1, out + k * size, out_dtype);
    if (k == length) return;
    uint8_t tail[MAX_OPERANDS][8 * HALF], last[8 * HALF]; /* the rest, copied so that no read or write goes too far */
    Operand padded[MAX_OPERANDS];
    for (int i = 0; i < n; i++) {
        memcpy(tail[i], x[i].data + (start + k) * SIZE[x[i].dtype], (length - k) * SIZE[x[i].dtype]);
        padded[i] = (Operand){tail[i], x[i].dtype, 0};
    }
    NAME(combine_step)(padded, c, n, 0, 1, last, out_dtype);
    memcpy(out + k * size, last, (length - k) * size);
}

/* `digest_bytes` has room for 16 bytes, or is NULL. */
TARGET static void NAME(combine)(const Operand *x, int n, size_t n_blocks, size_t block_len,
                                 const uint8_t *coefficients, uint8_t *out, DType out_dtype, uint8_t *digest_bytes) {
    size_t item = SIZE[out_dtype], size = n_blocks * block_len * item, doubts = 0;
    Digest digest = DIGEST_START;
    for (size_t block = 0; block < n_blocks; block++) {
        Operand used[MAX_OPERANDS];
        double c[MAX_OPERANDS];
        int n_used = 0;
        for (int i = 0; i < n; i++, coefficients += sizeof(double)) {
            memcpy(c + n_used, coefficients, sizeof(double));
            if (c[n_used] != 0) used[n_used++] = x[i];
        }
        size_t end = (block + 1) * block_len;
        for (size_t start = end - block_len; start < end; start += COMBINE_RUN) {
            size_t length = end - start < COMBINE_RUN ? end - start : COMBINE_RUN;
            uint8_t *here = out + start * item;
            if (n_used == 0) memset(here, 0, length * item);
            else if (out_dtype == BF16) NAME(combine_as)(used, c, n_used, start, length, here, BF16, &doubts);
            else if (out_dtype == F16) NAME(combine_as)(used, c, n_used, start, length, here, F16, &doubts);
            else if (out_dtype == F32_) NAME(combine_as)(used, c, n_used, start, length, here, F32_, &doubts);
            else NAME(combine_as)(used, c, n_used, start, length, here, F64_, &doubts);
            if (digest_bytes) NAME(digest_advance)(&digest, out, size, (start + length) * item);
        }
    }
    if (digest_bytes) NAME(digest_end)(&digest, out, size, digest_bytes);
}

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
#undef ANY
#undef MUL32
#undef SWAP64
#undef LOAD_F16
#undef LOAD_F16_ALL
#undef STORE_F16
#undef TO_DOUBLE
#undef CLAMP
#undef TO_SINGLE
#undef COMBINE_RUN
#undef QUICK
