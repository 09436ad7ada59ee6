/* Arguments of the elementwise kernels; part of native.c. The first operand is the base. */

static PyObject *py_count_keys(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *tuple, *bins_object, *out_object, *result = NULL;
    Py_ssize_t count;
    int of_spread, failed = 0;
    if (!PyArg_ParseTuple(args, "sO!npOO", &level_name, &PyTuple_Type, &tuple, &count, &of_spread, &bins_object,
                          &out_object))
        return NULL;
    const Level *level = find_level(level_name);
    if (!level || (count = count_elements(1, count)) < 0) return NULL;
    Operands *operands = get_operands(tuple, count);
    if (!operands) return NULL;
    int n_streams = of_spread ? 1 : operands->n - 1, n_bins = 0;
    Py_buffer bins = {0}, out;
    if (bins_object != Py_None) {
        if (PyObject_GetBuffer(bins_object, &bins, PyBUF_C_CONTIGUOUS)) goto end;
        n_bins = n_streams ? (int)(bins.len / 8 / n_streams) : 0;
        if (!n_bins || (Py_ssize_t)n_bins * n_streams * 8 != bins.len) {
            PyErr_SetString(PyExc_ValueError, "bins must be int64, equally many for each stream");
            goto end;
        }
    }
    size_t width = bins.buf ? (size_t)n_bins << 16 : 1 << 15;
    if (!get_buffer(out_object, "out", n_streams * width * 8, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &out)) {
        Py_BEGIN_ALLOW_THREADS;
        failed = level->count_keys(operands->x, operands->n, count, of_spread, bins.buf, n_bins, out.buf);
        Py_END_ALLOW_THREADS;
        result = failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
        PyBuffer_Release(&out);
    }
end:
    if (bins.buf) PyBuffer_Release(&bins);
    release_operands(operands);
    return result;
}

static PyObject *py_energies(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *tuple, *out_object, *result = NULL;
    Py_ssize_t count;
    double threshold;
    int failed;
    if (!PyArg_ParseTuple(args, "sO!ndO", &level_name, &PyTuple_Type, &tuple, &count, &threshold, &out_object))
        return NULL;
    const Level *level = find_level(level_name);
    if (!level || (count = count_elements(1, count)) < 0) return NULL;
    Operands *operands = get_operands(tuple, count);
    if (!operands) return NULL;
    Py_buffer out;
    if (!get_buffer(out_object, "out", 8 * (operands->n - 1), PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &out)) {
        Py_BEGIN_ALLOW_THREADS;
        failed = level->energies(operands->x, operands->n, count, (float)threshold, out.buf);
        Py_END_ALLOW_THREADS;
        result = failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
        PyBuffer_Release(&out);
    }
    release_operands(operands);
    return result;
}

static PyObject *py_elementwise(PyObject *module, PyObject *args) {
    const char *level_name;
    PyObject *tuple, *objects[3], *out_object, *dtype_object, *result = NULL;
    Py_ssize_t count, start, row_len, skip;
    Elements e = {0};
    DType dtype;
    if (!PyArg_ParseTuple(args, "sO!n(iidnn)OOOnOO", &level_name, &PyTuple_Type, &tuple, &count, &e.kind, &e.join,
                          &e.factor, &start, &row_len, objects, objects + 1, objects + 2, &skip, &out_object,
                          &dtype_object))
        return NULL;
    const Level *level = find_level(level_name);
    if (!level || parse_dtype(dtype_object, &dtype) || (count = count_elements(1, count)) < 0) return NULL;
    Operands *operands = get_operands(tuple, count);
    if (!operands) return NULL;
    e.n = operands->n - 1;
    e.start = start;
    e.row_len = row_len;
    static const char *const names[] = {"numbers", "weights", "keys"};
    Py_ssize_t n_numbers = e.kind == KEEP_BAND ? 2 * e.n : 2, sizes[] = {8 * n_numbers, 16 * e.n, 8 * e.n};
    Py_buffer views[3] = {{0}}, out = {0};
    int got = 0;
    while (got < 3 && !get_buffer(objects[got], names[got], sizes[got], PyBUF_C_CONTIGUOUS, views + got)) got++;
    if (got == 3 && !PyObject_GetBuffer(out_object, &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        Py_ssize_t take = out.len / (Py_ssize_t)SIZE[dtype];
        if (e.n < 1 || start < 0 || skip < 0 || skip > count || take > count - skip || take * (Py_ssize_t)SIZE[dtype] != out.len ||
            (e.kind == KEEP_RANKED && (row_len < 1 || row_len > UINT32_MAX || count % row_len))) {
            PyErr_SetString(PyExc_ValueError, "count, start, row_len, skip and out do not fit together");
        } else {
            uint8_t digest[16];
            int wanted = out.len >= DIGEST_LEAST, flags;
            e.numbers = views[0].buf;
            e.weights = views[1].buf;
            e.votes = e.weights + e.n;
            e.keys = views[2].buf;
            Py_BEGIN_ALLOW_THREADS;
            flags = level->elementwise(operands->x, count, &e, skip, take, out.buf, dtype, wanted ? digest : NULL);
            Py_END_ALLOW_THREADS;
            if (flags < 0) PyErr_NoMemory();
            else
                result = Py_BuildValue("y#NN", wanted ? (const char *)digest : NULL, (Py_ssize_t)sizeof digest,
                                       PyBool_FromLong(!(flags & 1)), PyBool_FromLong(!(flags & 2)));
        }
        PyBuffer_Release(&out);
    }
    while (got) PyBuffer_Release(views + --got);
    release_operands(operands);
    return result;
}
