/*
 * Merges that decide about every element by itself: counting of magnitudes, selection, joining. Part of native_isa.h.
 * The arithmetic is that of elementwise.py, operation by operation, so that the bits are the same.
 */

#define ELEMENT_RUN 512 /* elements at a time: the float64 deltas of a few experts stay in the first cache */

/* Buffers for one run: the base, the deltas one after the other, and scratch. Each has `stride` elements. */
typedef struct {
    size_t stride;
    double *base, *deltas, *total, *share;
    float *singles;
    Word *words, *order, *other;
} NAME(Run);

TARGET static int NAME(begin_run)(NAME(Run) *run, int n_deltas, size_t length) {
    size_t stride = (length + 31) / 16 * 16; /* room for a whole register after an odd first element */
    run->stride = stride;
    run->base = aligned_alloc(64, ((size_t)(n_deltas + 3) * sizeof(double) + 4 * sizeof(uint32_t)) * stride);
    if (!run->base) return -1;
    run->deltas = run->base + stride;
    run->total = run->deltas + (size_t)n_deltas * stride;
    run->share = run->total + stride;
    run->singles = (float *)(run->share + stride);
    run->words = (Word *)(run->singles + stride);
    run->order = run->words + stride;
    run->other = run->order + stride;
    return 0;
}

/* Widen elements to float64; what follows the last one up to a whole register is zero. */
TARGET static void NAME(widen_run)(const Operand *x, size_t start, size_t count, double *out) {
    size_t size = SIZE[x->dtype], k = 0;
    const uint8_t *p = x->data + start * size;
#define WIDEN(dtype_)                                                                                  \
    case dtype_:                                                                                       \
        for (; k + HALF <= count; k += HALF) *(WIDE *)(out + k) = NAME(widen64)(p + k * size, dtype_); \
        break
    switch (x->dtype) { WIDEN(BF16); WIDEN(F16); WIDEN(F32_); WIDEN(F64_); }
#undef WIDEN
    if (k == count) return;
    uint8_t pad[8 * HALF] = {0};
    memcpy(pad, p + k * size, (count - k) * size);
    *(WIDE *)(out + k) = NAME(widen64)(pad, x->dtype);
}

/* Read a run: x[0] is the base. Returns whether all deltas are finite. */
TARGET static int NAME(read_run)(const Operand *x, int n, size_t start, size_t count, const NAME(Run) *run) {
    const uint64_t exponent = UINT64_C(0x7ff) << 52;
    NAME(widen_run)(x, start, count, run->base);
    uint64_t wild = 0;
    for (int i = 1; i < n; i++) {
        double *restrict delta = run->deltas + (size_t)(i - 1) * run->stride;
        const double *restrict base = run->base;
        NAME(widen_run)(x + i, start, count, delta);
        if (!x[i].is_delta)
            for (size_t k = 0; k < count; k++) delta[k] -= base[k];
        const LongWord *bits = (const LongWord *)delta;
        for (size_t k = 0; k < count; k++) wild |= (uint64_t)((bits[k] & exponent) == exponent);
    }
    return !wild;
}

/* Variance over the experts, divided by their number, in float32. */
TARGET static void NAME(spread)(const NAME(Run) *run, int n, size_t count) {
    double *restrict mean = run->total, *restrict sum = run->share;
    memset(mean, 0, count * sizeof *mean);
    memset(sum, 0, count * sizeof *sum);
    for (int i = 0; i < n; i++) {
        const double *restrict delta = run->deltas + (size_t)i * run->stride;
        for (size_t k = 0; k < count; k++) mean[k] += delta[k];
    }
    for (size_t k = 0; k < count; k++) mean[k] /= n;
    for (int i = 0; i < n; i++) {
        const double *restrict delta = run->deltas + (size_t)i * run->stride;
        for (size_t k = 0; k < count; k++) {
            double away = delta[k] - mean[k];
            sum[k] += away * away;
        }
    }
    for (size_t k = 0; k < count; k++) run->singles[k] = (float)(sum[k] / n);
}

/* ---- counting ---- */

/* Count the keys of floats by their upper half, or by their lower half of those in one of `n_bins` bins. */
TARGET static void NAME(count_run)(const float *singles, size_t count, const int64_t *bins, int n_bins, int64_t *out) {
    const Word *words = (const Word *)singles;
    if (!bins) {
        for (size_t k = 0; k < count; k++) out[(words[k] & 0x7fffffff) >> 16]++;
        return;
    }
    for (int b = 0; b < n_bins; b++, out += 1 << 16) {
        uint32_t bin = (uint32_t)bins[b];
        size_t k = 0;
        for (; k + LANES <= count; k += LANES) { /* few are in the bin: look at many at once */
            I32 found = (I32)((*(const U32 *)(words + k) & 0x7fffffff) >> 16 == bin);
            if (!ANY(found)) continue;
            for (size_t m = k; m < k + LANES; m++)
                if ((words[m] & 0x7fffffff) >> 16 == bin) out[words[m] & 0xffff]++;
        }
        for (; k < count; k++)
            if ((words[k] & 0x7fffffff) >> 16 == bin) out[words[k] & 0xffff]++;
    }
}

/*
 * Count the keys of all deltas. The difference of two numbers of at most 24 bits, rounded to float32, is the same
 * whether it goes by way of float64 or not, so float64 is only used where an operand has it.
 */
TARGET static int NAME(count_magnitudes)(const Operand *x, int n, size_t count, const int64_t *bins, int n_bins,
                                         int64_t *out) {
    size_t width = bins ? (size_t)n_bins << 16 : 1 << 15;
    float *zeros = aligned_alloc(64, 3 * ELEMENT_RUN * sizeof(float)), *base = zeros + ELEMENT_RUN;
    if (!zeros) return -1;
    memset(zeros, 0, ELEMENT_RUN * sizeof(float));
    for (size_t start = 0; start < count; start += ELEMENT_RUN) {
        size_t length = count - start < ELEMENT_RUN ? count - start : ELEMENT_RUN;
        NAME(fill)(x, start, length, zeros, base);
        for (int i = 1; i < n; i++) {
            float *delta = base + ELEMENT_RUN;
            NAME(fill)(x + i, start, length, x[i].is_delta ? zeros : base, delta);
            NAME(count_run)(delta, length, bins ? bins + (i - 1) * n_bins : NULL, n_bins, out + (i - 1) * width);
        }
    }
    free(zeros);
    return 0;
}

TARGET static int NAME(count_keys)(const Operand *x, int n, size_t count, int of_spread, const int64_t *bins,
                                   int n_bins, int64_t *out) {
    int wide = of_spread;
    for (int i = 0; i < n; i++) wide |= x[i].dtype == F64_;
    if (!wide) return NAME(count_magnitudes)(x, n, count, bins, n_bins, out);
    NAME(Run) run;
    if (NAME(begin_run)(&run, n - 1, ELEMENT_RUN)) return -1;
    size_t width = bins ? (size_t)n_bins << 16 : 1 << 15;
    for (size_t start = 0; start < count; start += ELEMENT_RUN) {
        size_t length = count - start < ELEMENT_RUN ? count - start : ELEMENT_RUN;
        NAME(read_run)(x, n, start, length, &run);
        if (of_spread) {
            NAME(spread)(&run, n - 1, length);
            NAME(count_run)(run.singles, length, bins, n_bins, out);
            continue;
        }
        for (int i = 0; i < n - 1; i++) {
            const double *delta = run.deltas + (size_t)i * run.stride;
            for (size_t k = 0; k < length; k++) run.singles[k] = (float)delta[k];
            NAME(count_run)(run.singles, length, bins ? bins + i * n_bins : NULL, n_bins, out + (size_t)i * width);
        }
    }
    free(run.base);
    return 0;
}

/* Add to `out` the squares of the elements whose spread is at least `threshold`: trees of ELEMENT_RUN, one by one. */
TARGET static int NAME(energies)(const Operand *x, int n, size_t count, float threshold, double *out) {
    NAME(Run) run;
    if (NAME(begin_run)(&run, n - 1, ELEMENT_RUN)) return -1;
    for (size_t start = 0; start < count; start += ELEMENT_RUN) {
        size_t length = count - start < ELEMENT_RUN ? count - start : ELEMENT_RUN;
        NAME(read_run)(x, n, start, length, &run);
        NAME(spread)(&run, n - 1, length);
        for (int i = 0; i < n - 1; i++) {
            const double *delta = run.deltas + (size_t)i * run.stride;
            double *restrict squares = run.total;
            for (size_t k = 0; k < length; k++) squares[k] = run.singles[k] >= threshold ? delta[k] * delta[k] : 0.0;
            memset(squares + length, 0, (ELEMENT_RUN - length) * sizeof *squares);
            for (size_t width = ELEMENT_RUN / 2; width; width /= 2)
                for (size_t k = 0; k < width; k++) squares[k] += squares[width + k];
            out[i] += squares[0];
        }
    }
    free(run.base);
    return 0;
}

/* ---- selection ---- */

/* Random words for the elements from `first` on; returns where the first one is. See `uniforms` in elementwise.py. */
TARGET static const Word *NAME(draw)(uint64_t key, size_t first, size_t count, Word *words) {
    uint64_t counter = first / 2, pairs = (first + count + 1) / 2 - counter;
#define MUL64(a, b) (MUL32(a, b) + ((MUL32((a) >> 32, b) + MUL32(a, (b) >> 32)) << 32))
    const U64 one = (U64){0} + UINT64_C(0xbf58476d1ce4e5b9), two = (U64){0} + UINT64_C(0x94d049bb133111eb);
    U64 state, step = (U64){0} + UINT64_C(0x9e3779b97f4a7c15) * U64_LANES;
    for (int lane = 0; lane < U64_LANES; lane++) state[lane] = key + (counter + lane + 1) * UINT64_C(0x9e3779b97f4a7c15);
    for (size_t k = 0; k < pairs; k += U64_LANES, state += step) { /* the buffer has room for whole registers */
        U64 z = state ^ state >> 30;
        z = MUL64(z, one);
        z ^= z >> 27;
        z = MUL64(z, two);
        *(U64 *)(words + 2 * k) = z ^ z >> 31;
    }
#undef MUL64
    return words + (first & 1);
}

#define SHIFTS 8 /* moves for each key after which sorting by insertion is given up */

/* One pass of a stable radix sort, by the byte at `shift`. Returns where the order is now. */
TARGET static Word *NAME(sort_by)(const Word *keys, int shift, size_t count, uint32_t *counts, Word *from, Word *to) {
    uint32_t place = 0;
    for (int value = 0; value < 256; value++) {
        uint32_t here = counts[value];
        if (here == count) return from; /* all keys have this byte */
        counts[value] = place;
        place += here;
    }
    for (size_t k = 0; k < count; k++) to[counts[keys[from[k]] >> shift & 255]++] = from[k];
    return to;
}

/* Sort by insertion what is nearly sorted. Returns whether it was nearly enough so. */
TARGET static int NAME(insert_keys)(const Word *keys, size_t count, Word *order) {
    size_t left = SHIFTS * count;
    for (size_t k = 1; k < count; k++) {
        uint32_t which = order[k], key = keys[which];
        size_t to = k;
        for (; to && keys[order[to - 1]] > key; to--) order[to] = order[to - 1];
        order[to] = which;
        if (k - to > left) return 0;
        left -= k - to;
    }
    return 1;
}

/*
 * Rank the magnitudes of one row; equal ones by position. They are put into bins, of which there are many in each of
 * the 16 binades below the largest, and then sorted by insertion. Where a bin has too many, all are sorted by bytes.
 */
TARGET static void NAME(rank_row)(const double *row, size_t count, const NAME(Run) *run, double *rank) {
    Word *keys = (Word *)run->singles, *from = run->order, *other = run->other;
    uint32_t counts[2048] = {0}, largest = 0, place = 0;
    int bits = count < 512 ? 8 : 11, shift = 27 - bits;
    for (size_t k = 0; k < count; k++) run->singles[k] = __builtin_fabsf((float)row[k]);
    for (size_t k = 0; k < count; k++) largest = keys[k] > largest ? keys[k] : largest;
    uint32_t last = (1u << bits) - 1, lowest = largest >> shift > last ? (largest >> shift) - last : 0;
#define BIN(key) ((key) >> shift > lowest ? ((key) >> shift) - lowest : 0)
    for (size_t k = 0; k < count; k++) counts[BIN(keys[k])]++;
    for (uint32_t bin = 0; bin <= last; bin++) {
        uint32_t here = counts[bin];
        counts[bin] = place;
        place += here;
    }
    for (size_t k = 0; k < count; k++) from[counts[BIN(keys[k])]++] = (uint32_t)k;
#undef BIN
    if (!NAME(insert_keys)(keys, count, from)) {
        memset(counts, 0, sizeof counts);
        for (size_t k = 0; k < count; k++) {
            for (int byte = 0; byte < 4; byte++) counts[256 * byte + (keys[k] >> 8 * byte & 255)]++;
            from[k] = (uint32_t)k;
        }
        for (int byte = 0; byte < 4; byte++) {
            Word *sorted = NAME(sort_by)(keys, 8 * byte, count, counts + 256 * byte, from, other);
            if (sorted != from) other = from;
            from = sorted;
        }
    }
    for (size_t k = 0; k < count; k++) rank[from[k]] = (double)k;
}
#undef SHIFTS

TARGET static void NAME(select_band)(const Elements *e, const NAME(Run) *run, size_t count) {
    for (int i = 0; i < e->n; i++) {
        double *restrict delta = run->deltas + (size_t)i * run->stride;
        float lower = (float)e->numbers[i], upper = (float)e->numbers[e->n + i];
        for (size_t k = 0; k < count; k++) {
            float size = __builtin_fabsf((float)delta[k]);
            delta[k] = (size < lower) | (size > upper) ? 0.0 : delta[k];
        }
    }
}

/* A random word as a number in [0, 1): by way of a signed integer, which every level has an instruction for. */
#define UNIFORM(word) (((double)(int32_t)((word) ^ 0x80000000u) + 0x1p31) * 0x1p-32)

TARGET static void NAME(select_dropout)(const Elements *e, const NAME(Run) *run, size_t start, size_t count) {
    double density = e->numbers[0], inverse = 1.0 / density;
    for (int i = 0; i < e->n; i++) {
        double *restrict delta = run->deltas + (size_t)i * run->stride;
        const Word *words = NAME(draw)(e->keys[i], start, count, run->words);
        for (size_t k = 0; k < count; k++) {
            double grown = delta[k] * inverse;
            delta[k] = UNIFORM(words[k]) >= density ? 0.0 : grown;
        }
    }
}

TARGET static void NAME(select_ranked)(const Elements *e, const NAME(Run) *run, size_t start, size_t count) {
    double density = e->numbers[0], epsilon = e->numbers[1];
    double *restrict share = run->share;
    for (int i = 0; i < e->n; i++) {
        double *restrict delta = run->deltas + (size_t)i * run->stride;
        for (size_t row = 0; row < count; row += e->row_len) {
            NAME(rank_row)(delta + row, e->row_len, run, share + row);
            for (size_t k = row; k < row + e->row_len; k++)
                share[k] = e->row_len == 1 ? density
                                           : (density - epsilon) + share[k] / (double)(e->row_len - 1) * (2.0 * epsilon);
        }
        const Word *words = NAME(draw)(e->keys[i], start, count, run->words);
        for (size_t k = 0; k < count; k++) {
            double grown = delta[k] / share[k];
            delta[k] = UNIFORM(words[k]) >= share[k] ? 0.0 : grown;
        }
    }
}

#undef UNIFORM

TARGET static void NAME(select_spread)(const Elements *e, const NAME(Run) *run, size_t count) {
    float threshold = (float)e->numbers[0];
    NAME(spread)(run, e->n, count);
    for (int i = 0; i < e->n; i++) {
        double *restrict delta = run->deltas + (size_t)i * run->stride;
        for (size_t k = 0; k < count; k++) delta[k] = run->singles[k] < threshold ? 0.0 : delta[k];
    }
}

TARGET static void NAME(select_agreement)(const Elements *e, const NAME(Run) *run, size_t count) {
    double ratio = e->numbers[0], *restrict total = run->total, *restrict agreeing = run->share;
    memset(total, 0, count * sizeof *total);
    memset(agreeing, 0, count * sizeof *agreeing);
    for (int i = 0; i < e->n; i++) {
        const double *restrict delta = run->deltas + (size_t)i * run->stride;
        double weight = e->n * e->weights[i];
        for (size_t k = 0; k < count; k++) total[k] += weight * delta[k];
    }
    for (int i = 0; i < e->n; i++) {
        const double *restrict delta = run->deltas + (size_t)i * run->stride;
        double weight = e->n * e->weights[i];
        for (size_t k = 0; k < count; k++) {
            double part = weight * delta[k];
            agreeing[k] += __builtin_fabs(part) > ratio * __builtin_fabs(total[k] - part) ? 1.0 : 0.0;
        }
    }
    for (int i = 0; i < e->n; i++) {
        double *restrict delta = run->deltas + (size_t)i * run->stride;
        for (size_t k = 0; k < count; k++) delta[k] = agreeing[k] < e->numbers[1] ? 0.0 : delta[k];
    }
}

/* ---- joining ---- */

/* Put base + factor * (joined deltas) into run->base. */
TARGET static void NAME(join_run)(const Elements *e, const NAME(Run) *run, size_t count) {
    double *restrict total = run->total, *restrict share = run->share, *restrict base = run->base;
    Real *restrict vote = (Real *)run->words; /* two buffers of words hold one of doubles */
    memset(total, 0, count * sizeof *total);
    memset(share, 0, count * sizeof *share);
    for (int i = 0; i < e->n; i++) {
        const double *restrict kept = run->deltas + (size_t)i * run->stride;
        double weight = e->join == JOIN_ELECT ? e->votes[i] : e->weights[i];
        for (size_t k = 0; k < count; k++) total[k] += weight * kept[k];
    }
    if (e->join == JOIN_SUM) {
        for (size_t k = 0; k < count; k++) base[k] += e->factor * total[k];
        return;
    }
    if (e->join == JOIN_ELECT) {
        for (size_t k = 0; k < count; k++) vote[k] = total[k] >= 0 ? 1.0 : -1.0;
        memset(total, 0, count * sizeof *total);
    }
    for (int i = 0; i < e->n; i++) {
        const double *restrict kept = run->deltas + (size_t)i * run->stride;
        double weight = e->weights[i];
        if (e->join == JOIN_MEAN) {
            for (size_t k = 0; k < count; k++) share[k] += kept[k] != 0 ? weight : 0.0;
            continue;
        }
        for (size_t k = 0; k < count; k++) {
            double agrees = kept[k] * vote[k] > 0 ? weight : 0.0;
            share[k] += agrees;
            total[k] += kept[k] * agrees;
        }
    }
    for (size_t k = 0; k < count; k++) {
        double mean = total[k] / (share[k] > 0 ? share[k] : 1.0);
        base[k] += e->factor * (share[k] > 0 ? mean : 0.0);
    }
}

/*
 * Merge `count` elements, of which those from `skip` on are written to `out`. Returns a bit for deltas that are not
 * finite and one for results that are not, or -1 if there is no memory.
 */
TARGET static int NAME(elementwise)(const Operand *x, size_t count, const Elements *e, size_t skip, size_t take,
                                    uint8_t *out, DType out_dtype, uint8_t *digest_bytes) {
    size_t length = e->kind == KEEP_RANKED ? e->row_len : ELEMENT_RUN, item = SIZE[out_dtype];
    if (e->kind == KEEP_RANKED && length < ELEMENT_RUN) length *= ELEMENT_RUN / length; /* several short rows */
    NAME(Run) run;
    if (NAME(begin_run)(&run, e->n, length)) return -1;
    Digest digest = DIGEST_START;
    U64 wild = {0};
    int unbounded = 0;
    for (size_t start = 0; start < count; start += length) {
        size_t run_len = count - start < length ? count - start : length;
        unbounded |= !NAME(read_run)(x, e->n + 1, start, run_len, &run);
        switch (e->kind) {
            case KEEP_BAND: NAME(select_band)(e, &run, run_len); break;
            case KEEP_DROPOUT: NAME(select_dropout)(e, &run, e->start + start, run_len); break;
            case KEEP_RANKED: NAME(select_ranked)(e, &run, e->start + start, run_len); break;
            case KEEP_SPREAD: NAME(select_spread)(e, &run, run_len); break;
            default: NAME(select_agreement)(e, &run, run_len);
        }
        NAME(join_run)(e, &run, run_len);
        size_t from = start < skip ? skip : start, to = start + run_len < skip + take ? start + run_len : skip + take;
        if (from >= to) continue;
        const Operand merged = {(const uint8_t *)(run.base + (from - start)), F64_, 0};
        const double one = 1.0;
        uint8_t *part = out + (from - skip) * item;
        size_t doubts = 0, n = to - from;
        if (out_dtype == BF16) NAME(combine_as)(&merged, &one, 1, 0, n, part, BF16, &doubts, &wild);
        else if (out_dtype == F16) NAME(combine_as)(&merged, &one, 1, 0, n, part, F16, &doubts, &wild);
        else if (out_dtype == F32_) NAME(combine_as)(&merged, &one, 1, 0, n, part, F32_, &doubts, &wild);
        else NAME(combine_as)(&merged, &one, 1, 0, n, part, F64_, &doubts, &wild);
        if (digest_bytes) NAME(digest_advance)(&digest, out, take * item, (to - skip) * item);
    }
    free(run.base);
    if (digest_bytes) NAME(digest_end)(&digest, out, take * item, digest_bytes);
    uint64_t any = 0;
    for (int lane = 0; lane < U64_LANES; lane++) any |= wild[lane];
    return unbounded | (int)(any >> 63) << 1;
}

#undef ELEMENT_RUN
