// NumPy arrays as kernels see tensors: of any strides, narrow types as their bits in uint16.
#pragma once

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>

#include "../../csrc/problems.h"

// None is a view of nothing.
inline captum_dtd::View view_of(const pybind11::object& object) {
  captum_dtd::View view;
  if (object.is_none()) return view;
  const auto array = pybind11::cast<pybind11::array>(object);
  view.data = const_cast<void*>(array.data());
  for (int a = 0; a < 5; ++a) view.stride[a] = array.strides(a) / array.itemsize();
  return view;
}

inline captum_dtd::Element element_named(const std::string& dtype) {
  using captum_dtd::Element;
  if (dtype == "float32") return Element::Float32;
  if (dtype == "float64") return Element::Float64;
  if (dtype == "bfloat16") return Element::BFloat16;
  if (dtype == "float16") return Element::Float16;
  throw std::invalid_argument(dtype);
}

// A table [rows][output time][tap] of int64, of one row or as many as there are examples; None is none. The array is read where
// it lies.
inline captum_dtd::TimeTable table_of(const pybind11::object& object) {
  if (object.is_none()) return {};
  const auto numbers = pybind11::cast<pybind11::array_t<int64_t, pybind11::array::c_style>>(object);
  return {numbers.data(), numbers.shape(0) > 1};
}
