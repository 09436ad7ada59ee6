/* Counting of magnitudes and spreads by the bits of their float32, and sums of squares. Part of native_isa.h. */

/* Count keys by their upper half; `singles` have room for a register more, as below. */
TARGET static void NAME(count_high)(const float *singles, size_t count, uint32_t *out) {
    const Word *words = (const Word *)singles;
    uint16_t keys[ELEMENT_RUN + LANES];
    for (size_t k = 0; k < count; k += LANES) STORE16_ALL(keys + k, (*(const U32 *)(words + k) & 0x7fffffff) >> 16);
    size_t k = 0;
    for (; k + 4 <= count; k += 4) {
        uint64_t four = read64((const uint8_t *)(keys + k));
        out[four & 0xffff]++;
        out[four >> 16 & 0xffff]++;
        out[four >> 32 & 0xffff]++;
        out[four >> 48]++;
    }
    for (; k < count; k++) out[keys[k]]++;
}

/* Count the keys in one of `n_bins` bins by their lower half. */
TARGET static void NAME(count_low)(const float *singles, size_t count, const int64_t *bins, int n_bins, int64_t *out) {
    const Word *words = (const Word *)singles;
    for (int b = 0; b < n_bins; b++, out += 1 << 16) {
        uint32_t bin = (uint32_t)bins[b];
        for (size_t k = 0; k < count; k += LANES) { /* few are in the bin: look at many at once */
            unsigned found = (unsigned)BITS((I32)((*(const U32 *)(words + k) & 0x7fffffff) >> 16 == bin));
            if (count - k < LANES) found &= (1u << (count - k)) - 1;
            for (; found; found &= found - 1) out[words[k + (size_t)__builtin_ctz(found)] & 0xffff]++;
        }
    }
}

/*
 * Whether the key of any spread in a whole slice may be in one of `bins`: in float32, for operands of at most 32 bits.
 *
 * With u = 2^-24 and D the sum of the magnitudes of the n deltas, a delta has an error of u times itself, the mean one
 * of (n + 2) / n u D, and so the distance to the mean, a, one of less than E = 5 u D beside u |a|. The sum of squares
 * is wrong by less than 2 E sum |a| + 2 n E^2 and, for the roundings of its own, (n + 5) u times itself; a few more are
 * for the division and what follows.
 */
TARGET INLINE int NAME(may_be_in)(const Operand *x, int n, size_t start, const int64_t *bins, int n_bins) {
    F32 base[2] = {{0}}, deltas[MAX_OPERANDS][2], mean[2] = {{0}}, sizes[2] = {{0}}, away[2] = {{0}}, sum[2] = {{0}};
    for (int i = 0; i < n; i++) {
        size_t size = SIZE[x[i].dtype];
        const uint8_t *p = x[i].data + start * size;
        NAME(prefetch_slice)(p, size);
        UNROLL for (int u = 0; u < 2; u++, p += LANES * size) {
            F32 value;
            switch (x[i].dtype) {
                case BF16: value = NAME(widen_all)(p, BF16); break;
                case F16: value = NAME(widen_all)(p, F16); break;
                default: value = NAME(widen_all)(p, F32_);
            }
            if (!i) {
                base[u] = value;
                continue;
            }
            if (!x[i].is_delta) value -= base[u];
            deltas[i][u] = value;
            mean[u] += value;
            sizes[u] += (F32)((U32)value & 0x7fffffff);
        }
    }
    float share = 1.0f / (n - 1);
    UNROLL for (int u = 0; u < 2; u++) mean[u] *= share;
    for (int i = 1; i < n; i++) {
        UNROLL for (int u = 0; u < 2; u++) {
            F32 a = deltas[i][u] - mean[u];
            away[u] += (F32)((U32)a & 0x7fffffff);
            sum[u] = FMA(a, a, sum[u]);
        }
    }
    I32 possible = {0};
    UNROLL for (int u = 0; u < 2; u++) {
        F32 spread = sum[u] * share, error = sizes[u] * (5 * 0x1p-24f);
        F32 doubt = error * 2 * (away[u] * share + error) + spread * ((n + 10) * 0x1p-24f);
        I32 low = (I32)(spread - doubt) >> 16, high = (I32)(spread + doubt) >> 16;
        /* The bound holds only where nothing under- or overflows. Where all deltas are 0, so is the spread. */
        I32 plain = (I32)((spread > 0x1p-90f) & (spread < 0x1p100f)) | (I32)(sizes[u] == 0);
        possible |= ~plain;
        for (int b = 0; b < n_bins; b++)
            possible |= (I32)(low <= (int32_t)bins[b]) & (I32)(high >= (int32_t)bins[b]);
    }
    return BITS(possible) != 0;
}

/* Count the spreads with their keys in one of `bins` by their lower half. Few are: most slices need no float64. */
TARGET static void NAME(count_low_spreads)(const Operand *x, int n, int wide, size_t start, size_t count,
                                           const int64_t *bins, int n_bins, int64_t *out) {
    NAME(Slice) base, deltas[MAX_OPERANDS], spread;
    F64 probe = {0};
    float values[SLICE];
    for (size_t k = 0; k < count; k += SLICE) {
        size_t left = count - k < SLICE ? count - k : SLICE;
        if (!wide && left == SLICE && !NAME(may_be_in)(x, n, start + k, bins, n_bins)) continue;
        NAME(read_slice)(x, n, start + k, start + count, &base, deltas, &probe);
        NAME(spread)(deltas, n - 1, &spread);
        NAME(narrow_slice)(&spread, values);
        NAME(count_low)(values, left, bins, n_bins, out);
    }
}

TARGET static void NAME(single_spreads)(const Operand *x, int n, size_t start, size_t count, float *out) {
    NAME(Slice) base, deltas[MAX_OPERANDS], spread;
    F64 probe = {0};
    for (size_t k = 0; k < count; k += SLICE) {
        NAME(read_slice)(x, n, start + k, start + count, &base, deltas, &probe);
        NAME(spread)(deltas, n - 1, &spread);
        NAME(narrow_slice)(&spread, out + k);
    }
}

#define HIGH ((size_t)1 << 15)
#define LOW ((size_t)1 << 16)
#define STRETCH ((size_t)1 << 22) /* elements that are counted in 32 bits, to be gentle to the first cache */

/* Count the keys of all deltas, or of the spread. */
TARGET static int NAME(count_keys)(const Operand *x, int n, size_t count, int of_spread, const int64_t *bins,
                                   int n_bins, int64_t *out) {
    int n_streams = of_spread ? 1 : n - 1;
    NAME(Singles) singles;
    uint32_t *counts = calloc(n_streams * HIGH, sizeof *counts);
    if (NAME(begin_singles)(&singles, x, n, ELEMENT_RUN) || !counts) {
        free(singles.zeros);
        free(counts);
        return -1;
    }
    float values[ELEMENT_RUN + SLICE];
    for (size_t start = 0; start < count; start += ELEMENT_RUN) {
        size_t length = count - start < ELEMENT_RUN ? count - start : ELEMENT_RUN;
        if (of_spread && bins) {
            NAME(count_low_spreads)(x, n, singles.wide, start, length, bins, n_bins, out);
            continue;
        }
        if (!of_spread) NAME(begin_run)(&singles, start, length);
        for (int i = 0; i < n_streams; i++) {
            if (of_spread) NAME(single_spreads)(x, n, start, length, values);
            else NAME(single_deltas)(&singles, i + 1, start, length, values);
            if (bins) NAME(count_low)(values, length, bins + i * n_bins, n_bins, out + i * n_bins * LOW);
            else NAME(count_high)(values, length, counts + i * HIGH);
        }
        if (bins || ((start + length) % STRETCH && start + length < count)) continue;
        for (size_t k = 0; k < n_streams * HIGH; k++) out[k] += counts[k];
        memset(counts, 0, n_streams * HIGH * sizeof *counts);
    }
    free(singles.zeros);
    free(counts);
    return 0;
}
#undef HIGH
#undef LOW
#undef STRETCH

/* Add to `out` the squares of the elements whose spread is at least `threshold`: trees of ELEMENT_RUN, one by one. */
TARGET static int NAME(energies)(const Operand *x, int n, size_t count, float threshold, double *out) {
    size_t n_squares = (size_t)(n - 1) * ELEMENT_RUN;
    double *squares = aligned_alloc(64, n_squares * sizeof *squares), least = reaching(threshold);
    if (n > 1 && !squares) return -1;
    NAME(Slice) base, deltas[MAX_OPERANDS], spread;
    F64 probe = {0};
    for (size_t start = 0; start < count; start += ELEMENT_RUN) {
        size_t length = count - start < ELEMENT_RUN ? count - start : ELEMENT_RUN;
        if (length < ELEMENT_RUN) memset(squares, 0, n_squares * sizeof *squares);
        for (size_t k = 0; k < length; k += SLICE) {
            NAME(read_slice)(x, n, start + k, count, &base, deltas, &probe);
            NAME(spread)(deltas, n - 1, &spread);
            for (int i = 0; i < n - 1; i++) {
                F64 *to = (F64 *)(squares + (size_t)i * ELEMENT_RUN + k);
                EACH_PART(p) to[p] = WHERE(spread.part[p] >= least, deltas[i].part[p] * deltas[i].part[p]);
            }
        }
        for (int i = 0; i < n - 1; i++) {
            double *restrict tree = squares + (size_t)i * ELEMENT_RUN;
            for (size_t width = ELEMENT_RUN / 2; width; width /= 2)
                for (size_t k = 0; k < width; k++) tree[k] += tree[width + k];
            out[i] += tree[0];
        }
    }
    free(squares);
    return 0;
}
