/*
 * Mapped files whose pages cannot be read any more: the file was cut short, or the disk fails. The system answers with
 * SIGBUS, which would end the process. Here the rest of the mapping becomes zeros and the mapping is marked as broken,
 * for its owner to ask about before anything made of it is kept.
 *
 * The handler is installed with the first guard and stays. It runs on the thread that touched the page, whatever that
 * was doing, and so only loads, stores and makes system calls.
 */

#if defined(__linux__)
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

/* Guards are used again, never freed: the handler may be looking at them. */
typedef struct Guard {
    _Atomic uintptr_t start, end; /* an end of 0: not in use */
    atomic_int broken;
    struct Guard *next;
} Guard;

static _Atomic(Guard *) guards;
static uintptr_t page_size;
static struct sigaction previous; /* who is asked about the mappings of others */
static atomic_int passed_on;

static void on_sigbus(int number, siginfo_t *info, void *context) {
    int error = errno;
    uintptr_t address = (uintptr_t)info->si_addr, page = address - address % page_size;
    for (Guard *guard = info->si_code > 0 ? atomic_load(&guards) : NULL; guard; guard = guard->next) {
        uintptr_t end = atomic_load(&guard->end);
        if (address >= end || address < atomic_load(&guard->start) || end != atomic_load(&guard->end)) continue;
        atomic_store(&guard->broken, 1);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap((void *)page, end - page, PROT_READ, flags, -1, 0) == MAP_FAILED) break;
        errno = error;
        return;
    }
    /* Back to whoever was there before, for the same touch again; if that leads here once more, the process ends. */
    struct sigaction none = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, atomic_exchange(&passed_on, 1) ? &none : &previous, NULL);
    if (info->si_code <= 0) raise(number); /* sent by a process: there is no touch that would come again */
    errno = error;
}

/* Installed again if somebody else was in between (faulthandler does that). */
static void watch_sigbus(void) {
    struct sigaction current, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGBUS, NULL, &current);
    if (current.sa_flags & SA_SIGINFO && current.sa_sigaction == on_sigbus) return;
    page_size = sysconf(_SC_PAGESIZE);
    previous = current;
    atomic_store(&passed_on, 0);
    sigaction(SIGBUS, &ours, NULL);
}

static Guard *find_guard(PyObject *number) {
    void *wanted = PyLong_AsVoidPtr(number);
    for (Guard *guard = atomic_load(&guards); guard && !PyErr_Occurred(); guard = guard->next)
        if (guard == wanted) return guard;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "expected what guard() returned");
    return NULL;
}

static PyObject *py_guard(PyObject *module, PyObject *buffer) {
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_C_CONTIGUOUS)) return NULL;
    watch_sigbus();
    Guard *guard = atomic_load(&guards);
    while (guard && atomic_load(&guard->end)) guard = guard->next;
    if (!guard) {
        guard = calloc(1, sizeof *guard);
        if (guard) {
            guard->next = atomic_load(&guards);
            atomic_store(&guards, guard);
        }
    }
    if (guard) {
        atomic_store(&guard->broken, 0);
        atomic_store(&guard->start, (uintptr_t)view.buf);
        atomic_store(&guard->end, (uintptr_t)view.buf + view.len);
    }
    PyBuffer_Release(&view);
    return guard ? PyLong_FromVoidPtr(guard) : PyErr_NoMemory();
}

static PyObject *py_unguard(PyObject *module, PyObject *number) {
    Guard *guard = find_guard(number);
    if (!guard) return NULL;
    atomic_store(&guard->end, 0);
    return Py_NewRef(Py_None);
}

static PyObject *py_is_broken(PyObject *module, PyObject *number) {
    Guard *guard = find_guard(number);
    return guard ? PyBool_FromLong(atomic_load(&guard->broken)) : NULL;
}
#else
static PyObject *py_guard(PyObject *module, PyObject *buffer) { return PyLong_FromLong(0); }
static PyObject *py_unguard(PyObject *module, PyObject *number) { return Py_NewRef(Py_None); }
static PyObject *py_is_broken(PyObject *module, PyObject *number) { return Py_NewRef(Py_False); }
#endif
