/* The Gram pass: Gram matrices of differences, and digests of the bytes read for them. Part of native_isa.h. */

/* Buffers of a Gram pass, shared by all blocks: widened runs, partial sums, and digests if they are wanted. */
typedef struct {
    double *zeros, *runs, *sums;
    Digest *digests;
    size_t count; /* elements of one operand over all blocks */
} NAME(Scratch);

/* Extend the digest of operand `i` to element `upto`: the bytes before it were just read and are in the cache. */
TARGET INLINE void NAME(digest_run)(const Operand *x, int i, size_t upto, const NAME(Scratch) *scratch) {
    size_t size = SIZE[x[i].dtype];
    if (scratch->digests && !x[i].is_delta)
        NAME(digest_advance)(scratch->digests + i, x[i].data, scratch->count * size, upto * size);
}

/* Widen `count` elements, minus `base`, into `out`, and pad with zeros to whole registers. */
TARGET INLINE void NAME(fill_as)(const uint8_t *p, DType dtype, size_t count, const float *base, float *out) {
    size_t k = 0, size = SIZE[dtype];
    for (; k + LANES <= count; k += LANES) {
        __builtin_prefetch(p + (k + 2 * RUN) * size, 0, 2); /* two runs ahead: products are computed in between */
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

/*
 * Inner products of `rows` x `cols` widened runs, kept in registers. The LANES float32 partial sums of each pair are
 * then added to its HALF float64 sums; a row of `sums` has `stride` pairs.
 */
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

/* The same with values widened to float64 before the subtraction and the product: slower, but nothing overflows. */
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

/* Compute the Gram matrices of all blocks. `digest_bytes` has room for 16 bytes per operand, or is NULL. */
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
