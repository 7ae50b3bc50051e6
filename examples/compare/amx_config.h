// Included before every C++ file of llama.cpp. `_tile_loadconfig` of GCC 12 tells the optimizer that the instruction
// reads only 8 of the 64 bytes. The shapes of the tiles are then not stored, and llama.cpp stops with SIGILL on a
// processor with AMX.
#if defined(__AMX_TILE__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
