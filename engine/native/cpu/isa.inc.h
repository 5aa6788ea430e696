// One instruction set's kernels and their table. Included by each isa_*.cpp, which is compiled with that set's flags and
// names it in DS_ISA. Everything lives in a namespace of its own, and no header with templates or non-static inline
// functions is used: the linker would keep one copy of them for all sets, and a machine without that copy's would stop.
#include "cpu.h"

#include <math.h>
#include <sched.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DS_JOIN(a, b) a##b
#define DS_NAME(prefix, isa) DS_JOIN(prefix, isa)

namespace DS_NAME(ds_, DS_ISA) {
namespace matrix {
#include "linear.inc.h"
}
#include "ops.inc.h"
#include "sample.inc.h"
}  // namespace

extern "C" {
extern const ds_kernel DS_NAME(ds_kernels_, DS_ISA)[DS_KINDS];
#define DS_KERNEL(name) DS_NAME(ds_, DS_ISA)::name
const ds_kernel DS_NAME(ds_kernels_, DS_ISA)[DS_KINDS] = {  // in the order of ds_kind
    DS_KERNEL(embed),      DS_KERNEL(rms_norm),  DS_KERNEL(matrix::linear), DS_KERNEL(head_norm),
    DS_KERNEL(rope_store), DS_KERNEL(attention), DS_KERNEL(swiglu),         DS_KERNEL(take_rows),
    DS_KERNEL(sample),     DS_KERNEL(score),     DS_KERNEL(meet),
};
}
