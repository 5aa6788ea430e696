// Any machine: vectors of four floats, no flags.
#define DS_ISA portable
#include "isa.inc.h"
