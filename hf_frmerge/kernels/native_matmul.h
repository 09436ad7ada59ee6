/*
 * Matrix products that add in the order of the inner dimension, with a rounding after each product and each addition.
 * Lanes are columns of the result, so no sum is split between lanes and the bits are the same at every level. Part of
 * native_isa.h, included once for each type, after
 *
 *     SCALAR, VECTOR    float and F32, or double and F64
 *     MATMUL            name of the function; TILE, PACK and SWEEP are the names of its parts
 */

#define WIDTH (2 * sizeof(VECTOR) / sizeof(SCALAR)) /* columns of a panel */
#define DEPTH 128 /* rows of a panel, at most 16 KiB: half of a first-level cache */
#define PANELS 4  /* panels packed at a time, so that more than one or two cache lines of a row of `right` are read */
#define AT(matrix, i, k) \
    (*(const SCALAR *)((matrix).data + (ptrdiff_t)(i) * (matrix).row + (ptrdiff_t)(k) * (matrix).column))

/* Add the products of a panel to `rows` rows of `out`. */
TARGET INLINE void TILE(Matrix left, size_t i, size_t k, size_t run, const SCALAR *panel, SCALAR *out, size_t stride,
                        int rows) {
    VECTOR sum[4][2];
    UNROLL for (int r = 0; r < rows; r++) memcpy(sum[r], out + r * stride, sizeof sum[r]);
    for (size_t p = 0; p < run; p++) {
        const VECTOR *row = (const VECTOR *)(panel + p * WIDTH);
        UNROLL for (int r = 0; r < rows; r++) {
            SCALAR factor = AT(left, i + r, k + p);
            sum[r][0] += factor * row[0];
            sum[r][1] += factor * row[1];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) memcpy(out + r * stride, sum[r], sizeof sum[r]);
}

/* Copy `columns` columns of `right` into at most PANELS panels; the last panel is padded with zeros. */
TARGET INLINE void PACK(Matrix right, size_t k, size_t run, size_t j, size_t columns, SCALAR *panels) {
    if (columns % WIDTH) memset(panels + columns / WIDTH * DEPTH * WIDTH, 0, run * WIDTH * sizeof *panels);
    for (size_t p = 0; p < run && right.column == sizeof(SCALAR); p++)
        for (size_t c = 0; c < columns; c += WIDTH)
            memcpy(panels + c * DEPTH + p * WIDTH, &AT(right, k + p, j + c),
                   (columns - c < WIDTH ? columns - c : WIDTH) * sizeof *panels);
    for (size_t c = 0; c < columns && right.column != sizeof(SCALAR); c++)
        for (size_t p = 0; p < run; p++)
            panels[c / WIDTH * DEPTH * WIDTH + p * WIDTH + c % WIDTH] = AT(right, k + p, j + c);
}

/* Add the products of one panel, of which `wide` columns count, to the first `end` rows of `out`. */
TARGET static void SWEEP(Matrix left, size_t k, size_t run, const SCALAR *panel, SCALAR *out, size_t stride,
                         size_t wide, size_t rows, size_t end) {
    SCALAR edge[4 * WIDTH] = {0};
    for (size_t i = 0; i < end; i += 4, out += 4 * stride) {
        /* A panel that is not full works on a copy (`edge`), because registers reach beyond the last column. */
        int high = rows - i < 4 ? rows - i : 4, whole = wide == WIDTH;
        SCALAR *tile = whole ? out : edge;
        size_t step = whole ? stride : WIDTH;
        for (int r = 0; r < high && !whole; r++) memcpy(edge + r * WIDTH, out + r * stride, wide * sizeof *out);
        switch (high) {
            case 1: TILE(left, i, k, run, panel, tile, step, 1); break;
            case 2: TILE(left, i, k, run, panel, tile, step, 2); break;
            case 3: TILE(left, i, k, run, panel, tile, step, 3); break;
            default: TILE(left, i, k, run, panel, tile, step, 4);
        }
        for (int r = 0; r < high && !whole; r++) memcpy(out + r * stride, edge + r * WIDTH, wide * sizeof *out);
    }
}

/* If `symmetric`, only the elements on and above the diagonal are computed, and then mirrored. */
TARGET static void MATMUL(Matrix left, Matrix right, void *result, size_t rows, size_t depth, size_t columns,
                          int symmetric) {
    SCALAR *out = result, panels[PANELS * DEPTH * WIDTH] __attribute__((aligned(64)));
    memset(out, 0, rows * columns * sizeof *out);
    for (size_t j = 0; j < columns; j += PANELS * WIDTH) {
        size_t wide = columns - j < PANELS * WIDTH ? columns - j : PANELS * WIDTH;
        for (size_t k = 0; k < depth; k += DEPTH) {
            size_t run = depth - k < DEPTH ? depth - k : DEPTH;
            PACK(right, k, run, j, wide, panels);
            for (size_t c = 0; c < wide; c += WIDTH) {
                size_t some = wide - c < WIDTH ? wide - c : WIDTH;
                size_t end = symmetric && j + c + some < rows ? j + c + some : rows;
                SWEEP(left, k, run, panels + c * DEPTH, out + j + c, columns, some, rows, end);
            }
        }
    }
    for (size_t i = 0; symmetric && i < rows; i++)
        for (size_t j = 0; j < i; j++) out[i * columns + j] = out[j * columns + i];
}

#undef SCALAR
#undef VECTOR
#undef MATMUL
#undef TILE
#undef PACK
#undef SWEEP
#undef WIDTH
#undef DEPTH
#undef PANELS
#undef AT
