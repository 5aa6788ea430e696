// x86-64 with AVX2, FMA and F16C: Intel since 2013, AMD since 2017.
#define DS_ISA avx2
#include "isa.inc.h"
