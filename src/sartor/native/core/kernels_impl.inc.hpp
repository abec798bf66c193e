// Assembles one instruction-set path. The including file names it SARTOR_ISA and SARTOR_VEC.
//
// Everything is static and inside a namespace of the path: code compiled for a wide instruction
// set must never be merged by the linker into the path of an older machine.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_features.hpp"
#include "exp2.hpp"
#include "kernels.hpp"
#include "probe_parts.hpp"

#define SARTOR_STRING2(x) #x
#define SARTOR_STRING(x) SARTOR_STRING2(x)

// Loops over the registers of a tile. The portable path's "registers" are loops themselves.
#if defined(SARTOR_REGISTERS)
#define SARTOR_UNROLL _Pragma("GCC unroll 16")
#define SARTOR_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define SARTOR_UNROLL
#define SARTOR_NO_UNROLL
#endif

namespace sartor {
namespace SARTOR_ISA {

constexpr int kPrefetchBytes = 2048;
static const float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Each builds on those before it.
// clang-format off
#include SARTOR_VEC
#include "elementwise.inc.hpp"
#if !defined(SARTOR_ATTENTION_ONLY)
#include "quantize.inc.hpp"
#include "linear.inc.hpp"
#endif
#if !defined(SARTOR_LINEAR_ONLY) && !defined(SARTOR_ATTENTION_ONLY)
#include "linear_float.inc.hpp"
#endif
#if !defined(SARTOR_LINEAR_ONLY)
#include "attention.inc.hpp"
#include "attention_int8.inc.hpp"
#include "attention_lanes.inc.hpp"
#if defined(__AVX512BF16__)
#include "attention_bf16.inc.hpp"
#endif
#if !defined(SARTOR_ATTENTION_ONLY)
#include "kv_write.inc.hpp"
#include "recurrent.inc.hpp"
#include "probe.inc.hpp"
#include "sampling.inc.hpp"
#endif
#endif
// clang-format on

#if !defined(SARTOR_LINEAR_ONLY) && !defined(SARTOR_ATTENTION_ONLY)
static const Kernels kTable = {SARTOR_STRING(SARTOR_ISA),
                               quantize_rows,
                               quantize_residual,
                               arrange_rows,
                               linear_int8,
                               linear_fp32,
                               dequantize_row,
                               rms_norm,
                               layer_norm,
                               l2_norm,
                               add,
                               weighted_sum,
                               short_conv,
                               recurrent_scan,
                               mul,
                               scale,
                               softcap,
                               activation,
                               gated_activation,
                               rope,
                               attention,
                               attention_merge,
                               write_kv,
                               max_of,
                               block_maxima,
                               sum_weights,
                               sort_into_buckets,
                               collect,
                               narrow,
                               probe_int8,
                               probe_fp32,
                               probe_bf16,
                               probe_read,
                               peak_widths(),
                               {kStreams, kDirectRows, kTileRows, false}};
#endif

}  // namespace SARTOR_ISA
}  // namespace sartor
