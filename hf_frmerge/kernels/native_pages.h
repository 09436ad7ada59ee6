/*
 * Fault in and release pages of mapped files, for many ranges in one call: every call releases the interpreter lock and
 * has to win it back, which takes longer than the pages of one range.
 */

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older kernels refuse it */
#endif
#endif

typedef struct {
    char *start;
    size_t size;
} Range;

/* Addresses of a tuple of buffers, valid while the tuple lives; NULL with an exception if an item is not a buffer. */
static Range *get_ranges(PyObject *tuple, Py_ssize_t *n) {
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of buffers");
        return NULL;
    }
    *n = PyTuple_Size(tuple);
    Range *ranges = malloc((*n + 1) * sizeof *ranges);
    if (!ranges) return (Range *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < *n; i++) {
        Py_buffer view;
        if (PyObject_GetBuffer(PyTuple_GetItem(tuple, i), &view, PyBUF_C_CONTIGUOUS)) {
            free(ranges);
            return NULL;
        }
        ranges[i] = (Range){view.buf, view.len};
        PyBuffer_Release(&view);
    }
    return ranges;
}

/* Returns True if all pages could be read, False for a disk error or a truncated file, which would be SIGBUS later. */
static PyObject *py_fault_in(PyObject *module, PyObject *tuple) {
    Py_ssize_t n;
    Range *ranges = get_ranges(tuple, &n);
    if (!ranges) return NULL;
    int done = 0;
#if defined(__linux__)
    uintptr_t page = sysconf(_SC_PAGESIZE);
    done = 1;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; done && i < n; i++) {
        size_t before = (uintptr_t)ranges[i].start % page;
        done = !ranges[i].size || !madvise(ranges[i].start - before, ranges[i].size + before, MADV_POPULATE_READ);
    }
    Py_END_ALLOW_THREADS;
#endif
    free(ranges);
    return PyBool_FromLong(done);
}

/* Only pages that lie wholly inside a range are dropped: the others also hold bytes of its neighbours. */
static PyObject *py_give_back(PyObject *module, PyObject *tuple) {
    Py_ssize_t n;
    Range *ranges = get_ranges(tuple, &n);
    if (!ranges) return NULL;
#if defined(__linux__)
    uintptr_t page = sysconf(_SC_PAGESIZE);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < n; i++) {
        uintptr_t start = (uintptr_t)ranges[i].start, end = (start + ranges[i].size) / page * page;
        start = (start + page - 1) / page * page;
        if (start < end) madvise((void *)start, end - start, MADV_DONTNEED);
    }
    Py_END_ALLOW_THREADS;
#endif
    free(ranges);
    return Py_NewRef(Py_None);
}
