#ifndef SWIFTEP_PYTHON_PRIVATE_H
#define SWIFTEP_PYTHON_PRIVATE_H

#include "swiftep_python.h"

void swiftep_py_owner_retain(void *owner);

#endif
