// A Python module without contents in each library, so that `import` loads it and its kernels register themselves; the
// docstring says what they are built for.
#pragma once

// Before every other header. Py_LIMITED_API comes from the build.
#include <Python.h>

#include <string>

#include "codes.h"

// The module's name comes from the build, too.
#define ROUTING_MASKS_INIT_OF(name) PyInit_##name
#define ROUTING_MASKS_INIT(name) ROUTING_MASKS_INIT_OF(name)
#define ROUTING_MASKS_TEXT_OF(name) #name
#define ROUTING_MASKS_TEXT(name) ROUTING_MASKS_TEXT_OF(name)

PyMODINIT_FUNC ROUTING_MASKS_INIT(ROUTING_MASKS_MODULE)(void) {
  static const std::string docstring = routing_masks::built_for();
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, ROUTING_MASKS_TEXT(ROUTING_MASKS_MODULE), docstring.c_str(), 0, nullptr, nullptr, nullptr,
      nullptr, nullptr};
  return PyModuleDef_Init(&definition);
}
