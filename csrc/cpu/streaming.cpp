#include "streaming.h"

namespace captum_dtd::cpu {

void settle_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace captum_dtd::cpu
