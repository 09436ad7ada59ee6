/*
 * Guards against SIGBUS from mapped files. If a file is truncated while it is mapped, or its disk fails, touching such
 * a page raises SIGBUS, which would end the process. The handler here replaces the rest of the mapping with zeros and
 * marks the mapping as broken; its owner checks that mark before it keeps any result.
 *
 * The handler is installed with the first guard and stays. It may interrupt the touching thread anywhere, inside malloc
 * or with a lock held, so it only uses loads, stores and system calls.
 */

#if defined(__linux__)
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

/* Guards are reused but never freed, because the handler may be reading the list at any time. */
typedef struct Guard {
    _Atomic uintptr_t start, end; /* end is 0 while the guard is not in use */
    atomic_int broken;
    struct Guard *next;
} Guard;

static _Atomic(Guard *) guards;
static uintptr_t page_size;
static struct sigaction previous; /* handler for faults outside of our mappings */
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
    /*
     * Not our mapping: reinstall the previous handler and return, so that the same access faults again and reaches it.
     * If that handler passes the fault back to us, the second time restores the default, which ends the process.
     */
    struct sigaction none = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, atomic_exchange(&passed_on, 1) ? &none : &previous, NULL);
    if (info->si_code <= 0) raise(number); /* sent by kill(): no access will fault again, so send it once more */
    errno = error;
}

/* Install the handler, also if another one has replaced it since (faulthandler does that). */
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
