// What the modules of all devices share: torch's tensors as the kernels see them, and the answers to Python.
#pragma once

#include <Python.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checks.h"

namespace captum_dtd {

template <typename Element>
Element element(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::Float32;
    case ScalarType::Double: return Element::Float64;
    case ScalarType::BFloat16: return Element::BFloat16;
    default: return Element::Float16;
  }
}

// A tensor of at most five dimensions, broadcast over those that it lacks and those of size 1 if it is a bound. Inputs are only
// read: a view serves them and the result alike.
template <typename View>
View view(const Tensor& tensor, bool broadcasts = false) {
  View v;
  v.data = const_cast<void*>(tensor.const_data_ptr());
  const int64_t leading = 5 - tensor.dim();
  for (int64_t a = 0; a < tensor.dim(); ++a) v.stride[leading + a] = broadcasts && tensor.size(a) == 1 ? 0 : tensor.stride(a);
  return v;
}

inline PyObject* to_python(const std::vector<std::string>& names) {
  PyObject* result = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* item = result ? PyUnicode_FromString(name.c_str()) : nullptr;
    if (!item || PyList_Append(result, item) != 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  return result;
}

// The element type that a Python argument names; null, with an exception set, where there is none.
template <typename Element>
std::optional<Element> parse_element(PyObject* arguments) {
  const char* dtype = nullptr;
  if (!PyArg_ParseTuple(arguments, "s", &dtype)) return std::nullopt;
  const std::string_view asked = dtype;
  if (asked == "float32") return Element::Float32;
  if (asked == "float64") return Element::Float64;
  if (asked == "bfloat16") return Element::BFloat16;
  if (asked == "float16") return Element::Float16;
  PyErr_Format(PyExc_ValueError, "dtype must be 'float32', 'float64', 'bfloat16' or 'float16', got '%s'", dtype);
  return std::nullopt;
}

}  // namespace captum_dtd
