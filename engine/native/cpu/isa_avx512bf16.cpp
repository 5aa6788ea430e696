// x86-64 with AVX-512 BF16 and VNNI: AMD since Zen 4, Intel servers since Cooper Lake.
#define DS_ISA avx512bf16
#include "isa.inc.h"
