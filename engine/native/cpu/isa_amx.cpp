// x86-64 with AMX for bf16 (beside AVX-512): Intel servers since Sapphire Rapids.
#define DS_ISA amx
#include "isa.inc.h"
