/*
 * For random choices: the random numbers, and the chances that follow from the ranks of the magnitudes of a row. Part
 * of native_isa.h.
 */

/*
 * Random words for the SLICE elements from `first` on; returns where the first one is. See `uniforms` in
 * elementwise.py.
 */
TARGET INLINE const Word *NAME(draw)(uint64_t key, size_t first, Word *words) {
#define MUL64(a, b) (MUL32(a, b) + ((MUL32((a) >> 32, b) + MUL32(a, (b) >> 32)) << 32))
    const uint64_t step = UINT64_C(0x9e3779b97f4a7c15);
    const U64 one = (U64){0} + UINT64_C(0xbf58476d1ce4e5b9), two = (U64){0} + UINT64_C(0x94d049bb133111eb);
    U64 state;
    for (int lane = 0; lane < U64_LANES; lane++) state[lane] = lane * step;
    state += key + (first / 2 + 1) * step;
    for (size_t k = 0; k < SLICE + (first & 1); k += 2 * U64_LANES, state += U64_LANES * step) {
        U64 z = state ^ state >> 30;
        z = MUL64(z, one);
        z ^= z >> 27;
        z = MUL64(z, two);
        *(U64 *)(words + k) = z ^ z >> 31;
    }
#undef MUL64
    return words + (first & 1);
}

#define DRAWN (SLICE + 2 * U64_LANES) /* words that `draw` needs room for */

/* Random words as numbers in [0, 1): by way of signed integers, which every level has an instruction for. */
TARGET INLINE void NAME(uniforms)(const Word *words, NAME(Slice) *out) {
    UNROLL for (int u = 0; u < UNITS; u++) {
        WIDE wide = INTS_TO_DOUBLE(*(const I32H *)(words + u * HALF) ^ INT32_MIN);
        UNROLL for (int h = 0; h < PARTS; h++) out->part[u * PARTS + h] = (wide.part[h] + 0x1p31) * 0x1p-32;
    }
}

#define SHIFTS 8 /* moves for each key after which sorting by insertion is given up */

/* One pass of a stable radix sort of pairs of key and position, by 8 bits of the key. Returns where they are now. */
TARGET static uint64_t *NAME(sort_by)(int shift, size_t count, uint64_t *from, uint64_t *to) {
    uint32_t counts[256] = {0}, place = 0;
    for (size_t k = 0; k < count; k++) counts[from[k] >> shift & 255]++;
    for (int value = 0; value < 256; value++) {
        uint32_t here = counts[value];
        counts[value] = place;
        place += here;
    }
    for (size_t k = 0; k < count; k++) to[counts[from[k] >> shift & 255]++] = from[k];
    return to;
}

/* Sort pairs by insertion, if they are nearly sorted. Returns whether they were nearly enough so. */
TARGET static int NAME(insert_pairs)(uint64_t *pairs, size_t count) {
    size_t left = SHIFTS * count;
    uint64_t largest = 0;
    for (size_t k = 0; k < count; k++) {
        uint64_t pair = pairs[k];
        if (pair >= largest) { /* most are in their place */
            largest = pair;
            continue;
        }
        size_t to = k;
        for (; to && pairs[to - 1] > pair; to--) pairs[to] = pairs[to - 1];
        pairs[to] = pair;
        if (k - to > left) return 0;
        left -= k - to;
    }
    return 1;
}

/* Chances of all experts' elements in a run of whole rows, and what it takes to find them. */
typedef struct {
    size_t stride; /* from one expert's chances to the next one's */
    double *chances, *by_rank;
    uint64_t *pairs, *other;
    float *deltas;
    Word *bins, *counts;
    uint32_t n_bins;
    NAME(Singles) singles;
} NAME(Ranking);

TARGET static int NAME(begin_ranking)(NAME(Ranking) *r, const Operand *x, const Elements *e, size_t run) {
    size_t row = e->row_len, stride = run + SLICE;
    r->stride = stride;
    for (r->n_bins = 64; r->n_bins < row && r->n_bins < 1 << 14; r->n_bins *= 2) continue;
    r->chances = calloc(e->n * stride + 3 * row, sizeof(double));
    r->deltas = calloc(stride + row + r->n_bins, sizeof(float));
    if (!r->chances || !r->deltas || NAME(begin_singles)(&r->singles, x, e->n + 1, run)) return -1;
    r->by_rank = r->chances + e->n * stride;
    r->pairs = (uint64_t *)(r->by_rank + row);
    r->other = r->pairs + row;
    r->bins = (Word *)(r->deltas + stride);
    r->counts = r->bins + row;
    double density = e->numbers[0], epsilon = e->numbers[1];
    for (size_t rank = 0; rank < row; rank++)
        r->by_rank[rank] = row == 1 ? density : (density - epsilon) + rank / (double)(row - 1) * (2.0 * epsilon);
    return 0;
}

TARGET static void NAME(end_ranking)(NAME(Ranking) *r) {
    free(r->chances);
    free(r->deltas);
    free(r->singles.zeros);
}

/*
 * Find the chances of the magnitudes of one row; equal ones rank by position. They are put into bins of equal width up
 * to six times their mean, and then sorted by insertion. Where too many are in a bin, all are sorted by bytes.
 */
TARGET static void NAME(rank_row)(const NAME(Ranking) *r, const float *deltas, size_t count, double *chances) {
    const Word *words = (const Word *)deltas;
    float total = 0;
    F32 sums = {0};
    size_t k = 0;
    for (; k + LANES <= count; k += LANES) sums += (F32)(*(const U32 *)(words + k) & 0x7fffffff);
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    for (; k < count; k++) total += __builtin_fabsf(deltas[k]);
    float scale = r->n_bins * (float)count / (6 * total), last = r->n_bins - 1;
    for (k = 0; k < count; k++) {
        float bin = __builtin_fabsf(deltas[k]) * scale;
        r->bins[k] = (uint32_t)(int32_t)(bin < last ? bin : last);
    }
    memset(r->counts, 0, r->n_bins * sizeof *r->counts);
    for (k = 0; k < count; k++) r->counts[r->bins[k]]++;
    uint32_t place = 0;
    for (uint32_t bin = 0; bin < r->n_bins; bin++) {
        uint32_t here = r->counts[bin];
        r->counts[bin] = place;
        place += here;
    }
#define PAIR(k) ((uint64_t)(words[k] & 0x7fffffff) << 32 | (k))
    uint64_t *sorted = r->pairs, *other = r->other;
    for (k = 0; k < count; k++) sorted[r->counts[r->bins[k]]++] = PAIR(k);
    if (!NAME(insert_pairs)(sorted, count)) {
        for (k = 0; k < count; k++) sorted[k] = PAIR(k);
        for (int shift = 32; shift < 64; shift += 8) {
            uint64_t *now = NAME(sort_by)(shift, count, sorted, other);
            other = sorted;
            sorted = now;
        }
    }
#undef PAIR
    for (k = 0; k < count; k++) chances[(uint32_t)sorted[k]] = r->by_rank[k];
}

/* Find the chances in the run of whole rows that begins at `start`. */
TARGET static void NAME(rank_run)(const NAME(Ranking) *r, int n, size_t row_len, size_t start, size_t count) {
    NAME(begin_run)(&r->singles, start, count);
    for (int i = 0; i < n; i++) {
        NAME(single_deltas)(&r->singles, i + 1, start, count, r->deltas);
        for (size_t row = 0; row < count; row += row_len)
            NAME(rank_row)(r, r->deltas + row, row_len, r->chances + i * r->stride + row);
    }
}
#undef SHIFTS
