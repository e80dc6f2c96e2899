// Geometry of a 3D max pooling, free of torch and of any device.
#pragma once

#include <cstdint>

namespace captum_dtd {

// Triples are in the order T, H, W. Window o covers the input positions o * stride - padding + k * dilation, k < kernel, that
// lie inside the input. Padding is what lies before the input; with ceil_mode the last windows reach over its end.
struct MaxPool3d {
  int64_t n, c;
  int64_t in[3], out[3];
  int64_t kernel[3], stride[3], padding[3], dilation[3];
};

}  // namespace captum_dtd
