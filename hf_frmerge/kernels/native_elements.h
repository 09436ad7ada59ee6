/*
 * Merges that decide about every element by itself: selection and joining. Part of native_isa.h. The arithmetic is that
 * of elementwise.py, operation by operation, so that the bits are the same.
 */

/* ---- selection: what is dropped of the deltas becomes zero ---- */

/* `bounds` are those of `find_bounds`: all lower ones, all upper ones. */
TARGET INLINE void NAME(select_band)(int n, const double *bounds, NAME(Slice) *deltas) {
    for (int i = 0; i < n; i++) {
        F64 lower = (F64){0} + bounds[i], above = (F64){0} + bounds[n + i];
        EACH_PART(p) {
            F64 size = MAGNITUDE(deltas[i].part[p]);
            I64 dropped = (I64)(size < lower) | (I64)(size >= above);
            deltas[i].part[p] = WHERE(~dropped, deltas[i].part[p]);
        }
    }
}

TARGET INLINE void NAME(select_dropout)(const Elements *e, size_t start, NAME(Slice) *deltas) {
    double density = e->numbers[0], inverse = 1.0 / density;
    for (int i = 0; i < e->n; i++) {
        Word words[DRAWN];
        NAME(Slice) drawn;
        NAME(uniforms)(NAME(draw)(e->keys[i], start, words), &drawn);
        EACH_PART(p) deltas[i].part[p] = WHERE(drawn.part[p] < density, deltas[i].part[p] * inverse);
    }
}

TARGET INLINE void NAME(select_ranked)(const Elements *e, const NAME(Ranking) *ranking, size_t start, size_t at,
                                       NAME(Slice) *deltas) {
    for (int i = 0; i < e->n; i++) {
        const F64 *chances = (const F64 *)(ranking->chances + i * ranking->stride + at);
        Word words[DRAWN];
        NAME(Slice) drawn;
        NAME(uniforms)(NAME(draw)(e->keys[i], start, words), &drawn);
        EACH_PART(p) deltas[i].part[p] = WHERE(drawn.part[p] < chances[p], deltas[i].part[p] / chances[p]);
    }
}

TARGET INLINE void NAME(select_spread)(int n, double least, NAME(Slice) *deltas) {
    NAME(Slice) spread;
    NAME(spread)(deltas, n, &spread);
    for (int i = 0; i < n; i++)
        EACH_PART(p) deltas[i].part[p] = WHERE(~(I64)(spread.part[p] < least), deltas[i].part[p]);
}

TARGET INLINE void NAME(select_agreement)(const Elements *e, NAME(Slice) *deltas) {
    double ratio = e->numbers[0];
    NAME(Slice) total = {{{0}}};
    I64 agreeing[4] = {{0}};
    for (int i = 0; i < e->n; i++) EACH_PART(p) total.part[p] += (e->n * e->weights[i]) * deltas[i].part[p];
    for (int i = 0; i < e->n; i++) {
        EACH_PART(p) {
            F64 part = (e->n * e->weights[i]) * deltas[i].part[p];
            agreeing[p] -= (I64)(MAGNITUDE(part) > ratio * MAGNITUDE(total.part[p] - part)); /* true is -1 */
        }
    }
    int64_t least = (int64_t)e->numbers[1];
    for (int i = 0; i < e->n; i++)
        EACH_PART(p) deltas[i].part[p] = WHERE(~(I64)(agreeing[p] < least), deltas[i].part[p]);
}

/* ---- joining: the base plus factor * (joined deltas) ---- */

TARGET INLINE void NAME(weighted_sum)(int n, const double *weights, const NAME(Slice) *kept, NAME(Slice) *total) {
    memset(total, 0, sizeof *total);
    for (int i = 0; i < n; i++) EACH_PART(p) total->part[p] += weights[i] * kept[i].part[p];
}

TARGET INLINE void NAME(join_sum)(const Elements *e, const NAME(Slice) *kept, NAME(Slice) *base) {
    NAME(Slice) total;
    NAME(weighted_sum)(e->n, e->weights, kept, &total);
    EACH_PART(p) base->part[p] += e->factor * total.part[p];
}

/* Divide by the sum of weights, where that is positive. */
TARGET INLINE void NAME(add_mean)(const Elements *e, const NAME(Slice) *total, const NAME(Slice) *share,
                                  NAME(Slice) *base) {
    EACH_PART(p) base->part[p] += e->factor * WHERE(share->part[p] > 0, total->part[p] / share->part[p]);
}

TARGET INLINE void NAME(join_mean)(const Elements *e, const NAME(Slice) *kept, NAME(Slice) *base) {
    NAME(Slice) total, share = {{{0}}};
    NAME(weighted_sum)(e->n, e->weights, kept, &total);
    for (int i = 0; i < e->n; i++)
        EACH_PART(p) share.part[p] += WHERE(kept[i].part[p] != 0, (F64){0} + e->weights[i]);
    NAME(add_mean)(e, &total, &share, base);
}

TARGET INLINE void NAME(join_elected)(const Elements *e, const NAME(Slice) *kept, NAME(Slice) *base) {
    NAME(Slice) votes, total = {{{0}}}, share = {{{0}}};
    NAME(weighted_sum)(e->n, e->votes, kept, &votes);
    I64 sign[4];
    EACH_PART(p) sign[p] = ~(I64)(votes.part[p] >= 0) & INT64_MIN;
    for (int i = 0; i < e->n; i++) {
        EACH_PART(p) {
            F64 along = (F64)((I64)kept[i].part[p] ^ sign[p]);
            F64 weight = WHERE(along > 0, (F64){0} + e->weights[i]);
            share.part[p] += weight;
            total.part[p] += kept[i].part[p] * weight;
        }
    }
    NAME(add_mean)(e, &total, &share, base);
}

/* ---- all of it ---- */

/* What float64 has to reach to pass thresholds that are compared in float32; `bounds` has room for two an expert. */
TARGET static void NAME(find_bounds)(const Elements *e, double *bounds) {
    if (e->kind == KEEP_SPREAD) bounds[0] = reaching((float)e->numbers[0]);
    if (e->kind != KEEP_BAND) return;
    for (int i = 0; i < e->n; i++) {
        bounds[i] = reaching((float)e->numbers[i]);
        bounds[e->n + i] = beyond((float)e->numbers[e->n + i]);
    }
}

/* Select and join the slice at element `start` of its tensor, element `at` of its run; `base` becomes the result. */
TARGET INLINE void NAME(merge_slice)(const Elements *e, const double *bounds, const NAME(Ranking) *ranking,
                                     size_t start, size_t at, NAME(Slice) *deltas, NAME(Slice) *base) {
    switch (e->kind) {
        case KEEP_BAND: NAME(select_band)(e->n, bounds, deltas); break;
        case KEEP_DROPOUT: NAME(select_dropout)(e, start, deltas); break;
        case KEEP_RANKED: NAME(select_ranked)(e, ranking, start, at, deltas); break;
        case KEEP_SPREAD: NAME(select_spread)(e->n, bounds[0], deltas); break;
        default: NAME(select_agreement)(e, deltas);
    }
    switch (e->join) {
        case JOIN_SUM: NAME(join_sum)(e, deltas, base); break;
        case JOIN_MEAN: NAME(join_mean)(e, deltas, base); break;
        default: NAME(join_elected)(e, deltas, base);
    }
}

/*
 * Merge `count` elements, of which those from `skip` on are written to `out`. Returns a bit for deltas that are not
 * finite and one for results that are not, or -1 if there is no memory.
 */
TARGET static int NAME(elementwise)(const Operand *x, size_t count, const Elements *e, size_t skip, size_t take,
                                    uint8_t *out, DType out_dtype, uint8_t *digest_bytes) {
    size_t run = ELEMENT_RUN, item = SIZE[out_dtype];
    if (e->kind == KEEP_RANKED) run = e->row_len < ELEMENT_RUN ? ELEMENT_RUN / e->row_len * e->row_len : e->row_len;
    double *merged = aligned_alloc(64, (run + SLICE) * sizeof *merged / 64 * 64 + 64), bounds[2 * MAX_OPERANDS];
    NAME(Ranking) ranking = {0};
    int failed = !merged || (e->kind == KEEP_RANKED && NAME(begin_ranking)(&ranking, x, e, run));
    NAME(find_bounds)(e, bounds);
    Digest digest = DIGEST_START;
    U64 wild = {0};
    F64 probe = {0};
    for (size_t start = 0; start < count && !failed; start += run) {
        size_t end = count - start < run ? count : start + run;
        if (e->kind == KEEP_RANKED) NAME(rank_run)(&ranking, e->n, e->row_len, start, end - start);
        for (size_t at = start; at < end; at += SLICE) {
            NAME(Slice) base, deltas[MAX_OPERANDS];
            NAME(read_slice)(x, e->n + 1, at, end, &base, deltas, &probe);
            NAME(merge_slice)(e, bounds, &ranking, e->start + at, at - start, deltas, &base);
            memcpy(merged + (at - start), &base, sizeof base);
        }
        size_t from = start < skip ? skip : start, to = end < skip + take ? end : skip + take;
        if (from >= to) continue;
        const Operand sum = {(const uint8_t *)(merged + (from - start)), F64_, 0};
        const double one = 1.0;
        uint8_t *part = out + (from - skip) * item;
        size_t doubts = 0, n = to - from;
        if (out_dtype == BF16) NAME(combine_as)(&sum, &one, 1, 0, n, part, BF16, &doubts, &wild);
        else if (out_dtype == F16) NAME(combine_as)(&sum, &one, 1, 0, n, part, F16, &doubts, &wild);
        else if (out_dtype == F32_) NAME(combine_as)(&sum, &one, 1, 0, n, part, F32_, &doubts, &wild);
        else NAME(combine_as)(&sum, &one, 1, 0, n, part, F64_, &doubts, &wild);
        if (digest_bytes) NAME(digest_advance)(&digest, out, take * item, (to - skip) * item);
    }
    free(merged);
    NAME(end_ranking)(&ranking);
    if (failed) return -1;
    if (digest_bytes) NAME(digest_end)(&digest, out, take * item, digest_bytes);
    uint64_t any = 0;
    int unbounded = 0;
    for (int lane = 0; lane < U64_LANES; lane++) {
        any |= wild[lane];
        unbounded |= probe[lane] != probe[lane];
    }
    return unbounded | (int)(any >> 63) << 1;
}

#undef UNITS
#undef SLICE
#undef ELEMENT_RUN
#undef EACH_PART
#undef WHERE
#undef MAGNITUDE
#undef DRAWN
