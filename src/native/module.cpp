// The Python module regrow.kernels._native: picks the instruction set once and passes calls on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nb = nanobind;

namespace regrow {

namespace plain {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
};

// The best that the processor has, or a lower one named by the environment variable REGROW_ISA.
InstructionSet choose() {
    const char* variable = std::getenv("REGROW_ISA");
    const std::string wanted = variable ? variable : "";
    bool named = wanted.empty() || wanted == "plain";
#if defined(__x86_64__)
    named = named || wanted == "avx2" || wanted == "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512cd");
    if (has_avx512 && (wanted.empty() || wanted == "avx512")) return {"avx512", &avx512::kernels};
    if (has_avx2 && (wanted.empty() || wanted == "avx2")) return {"avx2", &avx2::kernels};
#endif
    if (!named) throw std::invalid_argument("REGROW_ISA=" + wanted + " names no instruction set of this build");
    if (!wanted.empty() && wanted != "plain") throw std::invalid_argument("this processor lacks REGROW_ISA=" + wanted);
    return {"plain", &plain::kernels};
}

// Python passes a geometry as its numbers, in the order of the struct.
template <class... Rest>
auto with_geometry(void (*run)(int, bool, int, const Geometry&, Rest...)) {
    return [run](int dtype, bool index64, int threads, Int images, Int channels, Int height, Int width, Int filters, Int kernel_height,
                 Int kernel_width, Int stride_height, Int stride_width, Int padding_height, Int padding_width, Int dilation_height,
                 Int dilation_width, Int groups, Rest... rest) {
        const Geometry geometry{images,       channels,      height,       width,          filters,       kernel_height,   kernel_width,
                                stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width, groups};
        run(dtype, index64, threads, geometry, rest...);
    };
}

}  // namespace

NB_MODULE(_native, module) {
    const InstructionSet chosen = choose();
    const Kernels& kernels = *chosen.kernels;
    const auto released = nb::call_guard<nb::gil_scoped_release>();
    module.def("isa", [chosen] { return std::string(chosen.name); });
    module.def("spmm", kernels.spmm, released);
    module.def("backward", kernels.backward, released);
    module.def("transpose", kernels.transpose, released);
    module.def("transpose_index", kernels.transpose_index, released);
    module.def("conv_forward", with_geometry(kernels.conv_forward), released);
    module.def("conv_input_gradient", with_geometry(kernels.conv_input_gradient), released);
    module.def("conv_backward", with_geometry(kernels.conv_backward), released);
    module.def("unit_spmm", kernels.unit_spmm, released);
    module.def("unit_backward", kernels.unit_backward, released);
    module.def("unit_conv_forward", with_geometry(kernels.unit_conv_forward), released);
    module.def("unit_conv_input_gradient", with_geometry(kernels.unit_conv_input_gradient), released);
    module.def("unit_conv_backward", with_geometry(kernels.unit_conv_backward), released);
}

}  // namespace regrow
