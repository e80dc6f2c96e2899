// Whatever the compiler builds for by itself.
#include "pool_vector_loops.h"

namespace captum_dtd::cpu {

const PoolLoops<float>* float_pool_loops_generic() { return &kPoolLoops<float>; }
const PoolLoops<double>* double_pool_loops_generic() { return &kPoolLoops<double>; }

}  // namespace captum_dtd::cpu
