// AVX2 with FMA.
#include "features.h"
#include "pool_vector_loops.h"

namespace captum_dtd::cpu {

#ifdef __AVX2__

const PoolLoops<float>* float_pool_loops_avx2() { return features().avx2 ? &kPoolLoops<float> : nullptr; }
const PoolLoops<double>* double_pool_loops_avx2() { return features().avx2 ? &kPoolLoops<double> : nullptr; }

#else  // compiled for another architecture

const PoolLoops<float>* float_pool_loops_avx2() { return nullptr; }
const PoolLoops<double>* double_pool_loops_avx2() { return nullptr; }

#endif

}  // namespace captum_dtd::cpu
