/* SPDX-License-Identifier: MIT
 * `dirtytrack.kernel._taking`: a collect, and its set, as objects of CPython itself.
 *
 * The kernel has just flushed this processor's TLB when a collect returns, and what the program wrote has emptied the
 * caches: each page and line that is touched around the call counts, and a frame of Python touches many. cffi and a method
 * in Python are 1 us dearer, of 7 that a collect takes. This module lies in the same file as `_core` and is the only C
 * here that knows Python. */
#if defined(__has_include) && __has_include(<pyconfig.h>)
#include <pyconfig.h>
#endif
#if !defined(Py_GIL_DISABLED) && !defined(Py_DEBUG)
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <structmember.h>
#include "dirtytrack.h"

#define HOT __attribute__((hot)) /* beside what it calls: see DT_HOT */

typedef struct {
    PyObject_HEAD
    dt_set set; /* zeroed by the allocation */
    bool known; /* somebody asked for it */
} Taken;

static PyTypeObject *taken_type;
static freefunc taken_free;
static PyObject *failed;

/* Where an interrupt comes as a collect returns, nobody gets its set: Python drops it on its way out, with the error set.
 * Its pages go back then, as all that is not delivered does. */
HOT static void taken_dealloc(PyObject *self)
{
    if (!((Taken *)self)->known && PyErr_Occurred())
        ((Taken *)self)->set.delivered = 0;
    dt_set_clear(&((Taken *)self)->set); /* never blocks; gives the pages back unless they were delivered */
    taken_free(self);
    Py_DECREF(taken_type); /* an instance holds its type */
}

static PyObject *taken_address(PyObject *self, void *unused)
{
    (void)unused;
    ((Taken *)self)->known = true;
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

typedef struct {
    PyObject_HEAD
    dt_listener *listener; /* whoever may call this keeps its handle */
    PyObject *made;        /* the type of what is made: DirtySet */
    PyObject *layout;      /* of what the listener watches now */
} Collecting;

static PyTypeObject *collecting_type;
static PyObject *layout_name, *held_name, *collecting_name; /* interned */

static PyObject *collecting_new(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    PyObject *address, *made;
    if (names || !PyArg_ParseTuple(arguments, "OO!", &address, &PyType_Type, &made))
        return names ? PyErr_Format(PyExc_TypeError, "Collecting() takes no keyword arguments") : NULL;
    void *listener = PyLong_AsVoidPtr(address);
    if (!listener)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "there is no listener at 0");
    Collecting *self = (Collecting *)PyType_GenericAlloc(type, 0);
    if (self) {
        self->listener = listener;
        self->made = Py_NewRef(made);
        self->layout = Py_NewRef(Py_None);
    }
    return (PyObject *)self;
}

static int collecting_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Collecting *)self)->made);
    Py_VISIT(((Collecting *)self)->layout);
    return 0;
}

static int collecting_clear(PyObject *self)
{
    Py_CLEAR(((Collecting *)self)->made);
    Py_CLEAR(((Collecting *)self)->layout);
    return 0;
}

static void collecting_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    collecting_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Its pages go back to the listener, now, not when the last traceback that knows it goes. */
static PyObject *not_delivered(PyObject *dirty, Taken *taken)
{
    taken->set.delivered = 0;
    dt_set_clear(&taken->set);
    Py_DECREF(taken);
    Py_DECREF(dirty);
    return NULL;
}

/* What could not be collected, as Failed. */
static PyObject *refused(PyObject *dirty, Taken *taken, int code)
{
    dt_failure why = taken->set.why;
    dt_set_clear(&taken->set);
    taken->set.why = why;
    taken->set.why.code = code;
    PyErr_SetObject(failed, (PyObject *)taken);
    Py_DECREF(taken);
    Py_DECREF(dirty);
    return NULL;
}

HOT static PyObject *collected(Collecting *self)
{
    PyObject *layout = self->layout; /* what the set covers at least: it may become more while others run. It holds it. */
    Taken *taken = layout ? (Taken *)PyType_GenericAlloc(taken_type, 0) : NULL;
    PyObject *dirty = taken ? PyType_GenericAlloc((PyTypeObject *)self->made, 0) : NULL;
    if (!dirty || PyObject_SetAttr(dirty, layout_name, layout) || PyObject_SetAttr(dirty, held_name, (PyObject *)taken)) {
        Py_XDECREF(taken);
        Py_XDECREF(dirty);
        return layout ? NULL : PyErr_Format(PyExc_RuntimeError, "it has been cleared");
    }
    int code;
    dt_listener *listener = self->listener;
    Py_BEGIN_ALLOW_THREADS
    code = dt_collect(listener, NULL, -1, &taken->set);
    Py_END_ALLOW_THREADS
    if (code)
        return refused(dirty, taken, code);
    taken->set.delivered = 1;
    PyObject *now = self->layout;
    if (now != layout && now) {
        PyObject *until = PyObject_CallMethod(layout, "until", "O", now);
        bool told = until && !PyObject_SetAttr(dirty, layout_name, until);
        Py_XDECREF(until);
        if (!told)
            return not_delivered(dirty, taken);
    }
    Py_DECREF(taken);
    return dirty;
}

static PyObject *collecting_collect(PyObject *self, PyObject *unused)
{
    (void)unused;
    return collected((Collecting *)self);
}

static PyMemberDef collecting_members[] = {
    {"layout", T_OBJECT_EX, offsetof(Collecting, layout), 0, "the sets' layout, from the next collect on"},
    {NULL, 0, 0, 0, NULL}};
static PyMethodDef collecting_methods[] = {
    {"collect", collecting_collect, METH_NOARGS, "Collect all regions, without the GIL; raises Failed with a Taken."},
    {NULL, NULL, 0, NULL}};
static PyType_Slot collecting_slots[] = {
    {Py_tp_new, collecting_new}, {Py_tp_traverse, collecting_traverse}, {Py_tp_clear, collecting_clear},
    {Py_tp_dealloc, collecting_dealloc}, {Py_tp_members, collecting_members}, {Py_tp_methods, collecting_methods}, {0, NULL}};
static PyType_Spec collecting_spec = {"dirtytrack.kernel._taking.Collecting", sizeof(Collecting), 0,
                                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, collecting_slots};

/* ---- a tracker's method -------------------------------------------------------------------------------------------- */

static PyObject *otherwise; /* the method in Python */

static PyObject *called_with(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    PyObject *given = PyTuple_New(n + 1), *options = PyDict_New(), *result = NULL;
    bool made = given && options;
    for (Py_ssize_t i = 0; made && i <= n; i++)
        made = !PyTuple_SetItem(given, i, Py_NewRef(i ? arguments[i - 1] : self));
    for (Py_ssize_t i = 0; made && i < named; i++)
        made = !PyDict_SetItem(options, PyTuple_GetItem(names, i), arguments[n + i]);
    if (made)
        result = PyObject_Call(otherwise, given, options);
    Py_XDECREF(given);
    Py_XDECREF(options);
    return result;
}

/* The error that is meant is the tracker's to make. */
static PyObject *explained(PyObject *self)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *error = PyObject_CallMethod(self, "_explained", "O", value);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return NULL;
}

HOT static PyObject *tracker_collect(PyObject *self, PyObject *const *arguments, Py_ssize_t n, PyObject *names)
{
    if (n || names)
        return called_with(self, arguments, n, names);
    PyObject *collecting = PyObject_GetAttr(self, collecting_name), *dirty;
    if (!collecting)
        return NULL;
    if (Py_TYPE(collecting) != collecting_type)
        dirty = PyErr_Format(PyExc_TypeError, "its _collecting is no Collecting");
    else if (!(dirty = collected((Collecting *)collecting)) && PyErr_ExceptionMatches(failed))
        explained(self);
    Py_DECREF(collecting);
    return dirty;
}

/* A method's words are where its definition is: in Python. */
static PyMethodDef tracker_method = {"collect", (PyCFunction)(void (*)(void))tracker_collect, METH_FASTCALL | METH_KEYWORDS,
                                     NULL};

static PyObject *quick_collect(PyObject *module, PyObject *arguments)
{
    (void)module;
    static char words[8192];
    PyObject *type, *method;
    const char *said;
    if (!PyArg_ParseTuple(arguments, "O!Os", &PyType_Type, &type, &method, &said))
        return NULL;
    if (PyOS_snprintf(words, sizeof words, "%s", said) >= (int)sizeof words)
        return PyErr_Format(PyExc_ValueError, "the words are too long");
    tracker_method.ml_doc = words;
    PyObject *before = otherwise;
    otherwise = Py_NewRef(method);
    Py_XDECREF(before);
    return PyDescr_NewMethod((PyTypeObject *)type, &tracker_method);
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
    {"quick_collect", quick_collect, METH_VARARGS, "A method of this type that collects, or calls this one where it is given anything."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "dirtytrack.kernel._taking", NULL, -1, methods,
                                               NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__taking(void)
{
    PyObject *module = PyModule_Create(&module_definition);
    if (!module)
        return NULL;
    taken_type = (PyTypeObject *)PyType_FromSpec(&taken_spec);
    collecting_type = (PyTypeObject *)PyType_FromSpec(&collecting_spec);
    failed = PyErr_NewException("dirtytrack.kernel._taking.Failed", NULL, NULL);
    layout_name = PyUnicode_InternFromString("_layout");
    held_name = PyUnicode_InternFromString("_held");
    collecting_name = PyUnicode_InternFromString("_collecting");
    if (!taken_type || !collecting_type || !failed || !layout_name || !held_name || !collecting_name ||
        PyModule_AddObject(module, "Collecting", Py_NewRef((PyObject *)collecting_type)) ||
        PyModule_AddObject(module, "Taken", Py_NewRef((PyObject *)taken_type)) ||
        PyModule_AddObject(module, "Failed", Py_NewRef(failed))) {
        Py_DECREF(module);
        return NULL;
    }
    taken_free = (freefunc)PyType_GetSlot(taken_type, Py_tp_free);
    return module;
}
