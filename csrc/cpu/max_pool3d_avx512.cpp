// AVX-512 (F, BW, DQ, VL).
#include "features.h"
#include "pool_vector_loops.h"

namespace captum_dtd::cpu {

#ifdef __AVX512F__

const PoolLoops<float>* float_pool_loops_avx512() { return features().avx512 ? &kPoolLoops<float> : nullptr; }
const PoolLoops<double>* double_pool_loops_avx512() { return features().avx512 ? &kPoolLoops<double> : nullptr; }

#else  // compiled for another architecture

const PoolLoops<float>* float_pool_loops_avx512() { return nullptr; }
const PoolLoops<double>* double_pool_loops_avx512() { return nullptr; }

#endif

}  // namespace captum_dtd::cpu
