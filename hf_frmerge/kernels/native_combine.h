/*
 * The combine pass: linear combinations rounded once, the digest of the output, and whether all of it is finite. Part
 * of native_isa.h.
 */

#define QUICK 4 /* registers at a time: the loop over operands costs as much as the arithmetic on one */
#define COMBINE_RUN 8192 /* elements between digest updates: the bytes just written are still in the first cache */

/*
 * Sum of c[i] * x[i] over `units` registers: in float64, in order, with a rounding after each multiplication and each
 * addition. Sets the top bit of a lane of `wild` if its sum is NaN or rounds to infinity. The test is an integer
 * addition: the bits of non-negative floats sort like the floats, with infinity and NaN on top, and adding 2^63 minus
 * the bits of the threshold sets the top bit from the threshold on.
 */
TARGET INLINE void NAME(combine_step)(const Operand *x, const double *c, int n, size_t start, int units, uint8_t *out,
                                      DType out_dtype, U64 *wild) {
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
    UNROLL for (int u = 0; u < units; u++)
        UNROLL for (int h = 0; h < PARTS; h++)
            *wild |= ((U64)acc[u].part[h] & INT64_MAX) + ((UINT64_C(1) << 63) - OVERFLOWS_AT[out_dtype]);
    UNROLL for (int u = 0; u < units; u++) NAME(store)(acc[u], out + u * HALF * SIZE[out_dtype], out_dtype);
}

/*
 * The same in float32, for QUICK registers of LANES values, 16-bit in and bfloat16 out. Returns a bit for every
 * register in which the float64 sum of some lane might round differently; the caller must compute those again.
 *
 * The float32 and float64 sums differ by less than 2 n + 2 float32 roundings of the sum of magnitudes: one for every
 * coefficient, product and addition. If sum - doubt and sum + doubt round to the same bfloat16 number, so does the
 * float64 sum, which lies between them.
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
            __builtin_prefetch(p + 1024 + line, 0, 2); /* the hardware prefetcher stops at every page boundary */
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
        /* The bound holds only in a range where no product underflows or overflows. A magnitude of 0 is exact. */
        I32 plain = (I32)((U32)magnitude[u] - 0x08800000 < (U32){0} + (0x7b800000 - 0x08800000)); /* 2^-110 to 2^120 */
        I32 certain = (I32)(low == high) & (plain | (magnitude[u] == 0.0f));
        in_doubt |= (unsigned)(BITS(~certain) != 0) << u;
        STORE16_ALL(out + u * 2 * LANES, high);
    }
    return in_doubt;
}

/* Combine one run of a block. `doubts` counts the registers that had to be computed again in float64 so far. */
TARGET INLINE void NAME(combine_as)(const Operand *x, const double *c, int n, size_t start, size_t length,
                                    uint8_t *out, DType out_dtype, size_t *doubts, U64 *wild) {
    size_t k = 0, size = SIZE[out_dtype];
    if (out_dtype == BF16) {
        float quick[2 * MAX_OPERANDS]; /* coefficients, followed by their magnitudes */
        int narrow = 1;
        for (int i = 0; i < n; i++) {
            narrow &= SIZE[x[i].dtype] == 2;
            quick[i] = (float)c[i];
            quick[MAX_OPERANDS + i] = c[i] < 0 ? -quick[i] : quick[i];
        }
        /*
         * With coefficients such as 1/2 a large share of the sums falls midway between two bfloat16 numbers and is in
         * doubt. Stop trying once about one register in four of those seen has been.
         */
        size_t step = QUICK * LANES;
        for (; narrow && k + step <= length && *doubts < 64 + (start + k) / (4 * LANES); k += step) {
            unsigned in_doubt = NAME(combine_quickly)(x, quick, n, start + k, out + 2 * k);
            for (size_t u = k; in_doubt; u += LANES, in_doubt >>= 1) {
                if (!(in_doubt & 1)) continue;
                ++*doubts;
                for (size_t v = u; v < u + LANES; v += HALF)
                    NAME(combine_step)(x, c, n, start + v, 1, out + 2 * v, BF16, wild);
            }
        }
    }
    for (; k + 4 * HALF <= length; k += 4 * HALF)
        NAME(combine_step)(x, c, n, start + k, 4, out + k * size, out_dtype, wild);
    for (; k + HALF <= length; k += HALF) NAME(combine_step)(x, c, n, start + k, 1, out + k * size, out_dtype, wild);
    if (k == length) return;
    /* The last, incomplete register works on copies, so that it neither reads nor writes past the end. */
    uint8_t tail[MAX_OPERANDS][8 * HALF], last[8 * HALF];
    Operand padded[MAX_OPERANDS];
    for (int i = 0; i < n; i++) {
        memset(tail[i], 0, sizeof tail[i]);
        memcpy(tail[i], x[i].data + (start + k) * SIZE[x[i].dtype], (length - k) * SIZE[x[i].dtype]);
        padded[i] = (Operand){tail[i], x[i].dtype, 0};
    }
    NAME(combine_step)(padded, c, n, 0, 1, last, out_dtype, wild);
    memcpy(out + k * size, last, (length - k) * size);
}

/* Combine all blocks. `digest_bytes` has room for 16 bytes, or is NULL. Returns whether the whole output is finite. */
TARGET static int NAME(combine)(const Operand *x, int n, size_t n_blocks, size_t block_len,
                                const uint8_t *coefficients, uint8_t *out, DType out_dtype, uint8_t *digest_bytes) {
    size_t item = SIZE[out_dtype], size = n_blocks * block_len * item, doubts = 0;
    Digest digest = DIGEST_START;
    U64 wild = {0};
    for (size_t block = 0; block < n_blocks; block++) {
        Operand used[MAX_OPERANDS];
        double c[MAX_OPERANDS];
        int n_used = 0; /* operands with coefficient 0 are skipped, so that a one-hot row copies its operand exactly */
        for (int i = 0; i < n; i++, coefficients += sizeof(double)) {
            memcpy(c + n_used, coefficients, sizeof(double));
            if (c[n_used] != 0) used[n_used++] = x[i];
        }
        size_t end = (block + 1) * block_len;
        for (size_t start = end - block_len; start < end; start += COMBINE_RUN) {
            size_t length = end - start < COMBINE_RUN ? end - start : COMBINE_RUN;
            uint8_t *part = out + start * item;
            /* One inlined copy of combine_as per output dtype, so that the inner loops do not test it. */
            if (n_used == 0) memset(part, 0, length * item);
            else if (out_dtype == BF16) NAME(combine_as)(used, c, n_used, start, length, part, BF16, &doubts, &wild);
            else if (out_dtype == F16) NAME(combine_as)(used, c, n_used, start, length, part, F16, &doubts, &wild);
            else if (out_dtype == F32_) NAME(combine_as)(used, c, n_used, start, length, part, F32_, &doubts, &wild);
            else NAME(combine_as)(used, c, n_used, start, length, part, F64_, &doubts, &wild);
            if (digest_bytes) NAME(digest_advance)(&digest, out, size, (start + length) * item);
        }
    }
    if (digest_bytes) NAME(digest_end)(&digest, out, size, digest_bytes);
    uint64_t any = 0;
    for (int lane = 0; lane < U64_LANES; lane++) any |= wild[lane];
    return !(any >> 63);
}

#undef QUICK
#undef COMBINE_RUN
