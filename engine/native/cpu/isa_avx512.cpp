// x86-64 with AVX-512 F, BW, VL and DQ: Intel servers since 2017, AMD since Zen 4.
#define DS_ISA avx512
#include "isa.inc.h"
