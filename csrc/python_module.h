// An empty Python module in each library, so that `import` loads it and its kernels register themselves.
#pragma once

// Before every other header. Py_LIMITED_API comes from the build.
#include <Python.h>

#define ROUTING_MASKS_PYTHON_MODULE(name)                                                      \
  PyMODINIT_FUNC PyInit_##name(void) {                                                         \
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModuleDef_Init(&definition);                                                      \
  }
