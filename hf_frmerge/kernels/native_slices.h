/*
 * Deltas of all experts, a slice of elements at a time: few enough that what is summed over the experts stays in
 * registers, and what is kept of each in the first cache. Part of native_isa.h.
 */

#define UNITS (4 / PARTS)     /* widening steps in a slice */
#define SLICE (UNITS * HALF)  /* elements of a slice */
#define ELEMENT_RUN 512       /* elements between digest updates, and in a tree of squares; a multiple of SLICE */
#define EACH_PART(p) UNROLL for (int p = 0; p < 4; p++)

typedef struct {
    F64 part[4];
} NAME(Slice);

/* `value` where `mask` is all ones, and 0 where it is 0. */
#define WHERE(mask, value) ((F64)((I64)(mask) & (I64)(value)))
#define MAGNITUDE(value) ((F64)((I64)(value) & INT64_MAX))

/* The hardware prefetcher stops at every page boundary. */
TARGET INLINE void NAME(prefetch_slice)(const uint8_t *p, size_t size) {
    for (size_t byte = 0; byte < SLICE * size; byte += 64) __builtin_prefetch(p + 1024 + byte, 0, 2);
}

TARGET INLINE void NAME(widen_slice)(const uint8_t *p, DType dtype, NAME(Slice) *out) {
#define WIDEN(dtype_)                                                                   \
    NAME(prefetch_slice)(p, SIZE[dtype_]);                                              \
    UNROLL for (int u = 0; u < UNITS; u++) {                                            \
        WIDE wide = NAME(widen64)(p + u * HALF * SIZE[dtype_], dtype_);                 \
        UNROLL for (int h = 0; h < PARTS; h++) out->part[u * PARTS + h] = wide.part[h]; \
    }                                                                                   \
    break
    switch (dtype) {
        case BF16: WIDEN(BF16);
        case F16: WIDEN(F16);
        case F32_: WIDEN(F32_);
        default: WIDEN(F64_);
    }
#undef WIDEN
}

/* Widen the slice that begins at `start`; after the last of `count` elements follow zeros. */
TARGET INLINE void NAME(load_slice)(const Operand *x, size_t start, size_t count, NAME(Slice) *out) {
    size_t size = SIZE[x->dtype];
    const uint8_t *p = x->data + start * size;
    uint8_t pad[8 * SLICE];
    if (count - start < SLICE) {
        memset(pad, 0, sizeof pad);
        p = memcpy(pad, p, (count - start) * size);
    }
    NAME(widen_slice)(p, x->dtype, out);
}

/*
 * Read a slice of the base, which is x[0], and of the deltas of the others. `probe` becomes NaN, for good, if a delta
 * is not finite.
 */
TARGET INLINE void NAME(read_slice)(const Operand *x, int n, size_t start, size_t count, NAME(Slice) *base,
                                    NAME(Slice) *deltas, F64 *probe) {
    NAME(load_slice)(x, start, count, base);
    for (int i = 1; i < n; i++) {
        NAME(Slice) *delta = deltas + i - 1;
        NAME(load_slice)(x + i, start, count, delta);
        if (!x[i].is_delta) EACH_PART(p) delta->part[p] -= base->part[p];
        F64 nothing[4];
        EACH_PART(p) nothing[p] = delta->part[p] * 0.0;
        *probe += (nothing[0] + nothing[1]) + (nothing[2] + nothing[3]);
    }
}

/* Variance over `n` experts. */
TARGET INLINE void NAME(spread)(const NAME(Slice) *deltas, int n, NAME(Slice) *out) {
    NAME(Slice) mean = {{{0}}};
    memset(out, 0, sizeof *out);
    for (int i = 0; i < n; i++) EACH_PART(p) mean.part[p] += deltas[i].part[p];
    EACH_PART(p) mean.part[p] /= n;
    for (int i = 0; i < n; i++) {
        EACH_PART(p) {
            F64 away = deltas[i].part[p] - mean.part[p];
            out->part[p] += away * away;
        }
    }
    EACH_PART(p) out->part[p] /= n;
}

/* Round to float32. */
TARGET INLINE void NAME(narrow_slice)(const NAME(Slice) *from, float *out) {
    UNROLL for (int u = 0; u < UNITS; u++) {
        WIDE wide;
        UNROLL for (int h = 0; h < PARTS; h++) wide.part[h] = from->part[u * PARTS + h];
        *(F32H *)(out + u * HALF) = TO_SINGLE(wide);
    }
}

/*
 * Deltas in float32. The difference of two numbers of at most 24 bits, rounded to float32, is the same whether it goes
 * by way of float64 or not, so float64 is only used where an operand has it.
 */
typedef struct {
    const Operand *x;
    int wide;
    float *zeros, *base; /* of a run */
} NAME(Singles);

TARGET static int NAME(begin_singles)(NAME(Singles) *singles, const Operand *x, int n, size_t run) {
    *singles = (NAME(Singles)){.x = x, .zeros = calloc(2 * (run + LANES), sizeof(float))};
    singles->base = singles->zeros + run + LANES;
    for (int i = 0; i < n; i++) singles->wide |= x[i].dtype == F64_;
    return singles->zeros ? 0 : -1;
}

/* Get ready for the deltas of the run that begins at `start`. */
TARGET static void NAME(begin_run)(const NAME(Singles) *singles, size_t start, size_t count) {
    if (!singles->wide) NAME(fill)(singles->x, start, count, singles->zeros, singles->base);
}

/* Write the deltas of x[i] in that run; `out` has room for a slice more. */
TARGET static void NAME(single_deltas)(const NAME(Singles) *singles, int i, size_t start, size_t count, float *out) {
    const Operand *x = singles->x, pair[] = {x[0], x[i]};
    if (!singles->wide) {
        NAME(fill)(x + i, start, count, x[i].is_delta ? singles->zeros : singles->base, out);
        return;
    }
    NAME(Slice) base, delta;
    F64 probe = {0};
    for (size_t k = 0; k < count; k += SLICE) {
        NAME(read_slice)(pair, 2, start + k, start + count, &base, &delta, &probe);
        NAME(narrow_slice)(&delta, out + k);
    }
}
