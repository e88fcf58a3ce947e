/* SPDX-License-Identifier: MIT
 * `dirtytrack.kernel._taking`: the set of one collect as an object of CPython itself.
 *
 * cffi's ways to make a set that is freed, or given back, with its object, and to call the core, are 0.5 µs dearer, of 7
 * that a collect takes: the kernel has just flushed the processor's TLB, so that each page that is touched after it counts.
 * This module lies in the same file as `_core` and is the only C here that knows Python. */
#if defined(__has_include) && __has_include(<pyconfig.h>)
#include <pyconfig.h>
#endif
#if !defined(Py_GIL_DISABLED) && !defined(Py_DEBUG)
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <stddef.h>
#include <structmember.h>
#include "dirtytrack.h"

#define HOT __attribute__((hot)) /* beside what it calls: see DT_HOT */

typedef struct {
    PyObject_HEAD
    dt_set set; /* zeroed by the allocation */
} Taken;

static PyTypeObject *taken_type;
static freefunc taken_free;
static PyObject *failed;

HOT static void taken_dealloc(PyObject *self)
{
    dt_set_clear(&((Taken *)self)->set); /* never blocks; gives the pages back unless they were delivered */
    taken_free(self);
    Py_DECREF(taken_type); /* an instance holds its type */
}

/* As `type.__new__(type)`, which takes more steps. */
HOT static PyObject *new(PyObject *module, PyObject *type)
{
    (void)module;
    if (PyType_Check(type))
        return PyType_GenericAlloc((PyTypeObject *)type, 0);
    PyErr_SetString(PyExc_TypeError, "new() takes a type");
    return NULL;
}

static PyObject *taken_address(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromVoidPtr(&((Taken *)self)->set);
}

static PyMemberDef taken_members[] = {
    {"delivered", T_UINT, offsetof(Taken, set.delivered), 0, "0: the pages go back with it"},
    {NULL, 0, 0, 0, NULL}};
static PyGetSetDef taken_getset[] = {
    {"address", taken_address, NULL, "of the dt_set in it", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot taken_slots[] = {
    {Py_tp_dealloc, taken_dealloc}, {Py_tp_members, taken_members}, {Py_tp_getset, taken_getset}, {0, NULL}};
static PyType_Spec taken_spec = {"dirtytrack.kernel._taking.Taken", sizeof(Taken), 0, Py_TPFLAGS_DEFAULT, taken_slots};

/* SAFETY: whoever may call this keeps the listener's handle: its tracker has both. */
HOT static PyObject *take(PyObject *listener_capsule, PyObject *into)
{
    if (Py_TYPE(into) != taken_type) {
        PyErr_SetString(PyExc_TypeError, "take() fills a Taken");
        return NULL;
    }
    dt_set *set = &((Taken *)into)->set;
    dt_listener *listener = PyCapsule_GetPointer(listener_capsule, NULL);
    int code;
    if (set->block_)
        dt_set_clear(set);
    Py_BEGIN_ALLOW_THREADS
    code = dt_collect(listener, NULL, -1, set);
    Py_END_ALLOW_THREADS
    set->delivered = !code;
    if (!code)
        return Py_NewRef(into);
    dt_failure why = set->why;
    dt_set_clear(set); /* now, not when the last traceback that knows it goes */
    set->why = why;
    set->why.code = code;
    PyErr_SetObject(failed, into);
    return NULL;
}

static PyMethodDef take_method = {"take", take, METH_O, "Collect all regions into a Taken, without the GIL."};

static PyObject *taker(PyObject *module, PyObject *address)
{
    (void)module;
    void *listener = PyLong_AsVoidPtr(address);
    PyObject *capsule = listener ? PyCapsule_New(listener, NULL, NULL) : NULL;
    if (!capsule) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "there is no listener at 0");
        return NULL;
    }
    PyObject *bound = PyCFunction_NewEx(&take_method, capsule, NULL);
    Py_DECREF(capsule);
    return bound;
}

/* Of the guardian, a process that has loaded nothing but this module. */
static PyObject *guard(PyObject *module, PyObject *arguments)
{
    (void)module;
    dt_guard_wish wish = {0};
    if (!PyArg_ParseTuple(arguments, "iiiIIIIII", &wish.pid, &wish.pidfd, &wish.channel, &wish.freeze, &wish.timeout_ms,
                          &wish.suspend_seccomp, &wish.fault_step, &wish.fault_tracker, &wish.registers))
        return NULL;
    return PyLong_FromLong(dt_guard_run(&wish));
}

static PyMethodDef methods[] = {
    {"guard", guard, METH_VARARGS, "dt_guard_run of a dt_guard_wish with these fields; returns the exit status."},
    {"new", new, METH_O, "An instance of this type, not initialised."},
    {"taker", taker, METH_O, "What collects for the listener at this address, into a Taken: returns it, or raises Failed with it."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "dirtytrack.kernel._taking", NULL, -1, methods,
                                               NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__taking(void)
{
    PyObject *module = PyModule_Create(&module_definition);
    if (!module)
        return NULL;
    taken_type = (PyTypeObject *)PyType_FromSpec(&taken_spec);
    failed = PyErr_NewException("dirtytrack.kernel._taking.Failed", NULL, NULL);
    if (!taken_type || !failed || PyModule_AddObject(module, "Taken", Py_NewRef((PyObject *)taken_type)) ||
        PyModule_AddObject(module, "Failed", Py_NewRef(failed))) {
        Py_DECREF(module);
        return NULL;
    }
    taken_free = (freefunc)PyType_GetSlot(taken_type, Py_tp_free);
    return module;
}
