// Compiled once for each instruction set, with -DVARIANT=<symbol> -DVARIANT_NAME="<name>". Only this file sees the
// set's flags, and everything it includes has internal linkage, so that no other code picks up its instructions.
#include "variant.h"

#include "forward.h"

namespace {

template <class T>
const T& as(const void* arguments) { return *static_cast<const T*>(arguments); }

void run(const Context& c, int32_t operation, const void* arguments, Arena m, int64_t* needed) {
    const bool counting = needed != nullptr;
    if (operation == MOE_QUANTIZE) {
        if (!counting) quantize(c, as<MoeQuantizeArgs>(arguments));
    } else if (operation == MOE_LINEAR) {
        if (!counting) linear(c, as<MoeLinearArgs>(arguments));
    } else if (operation == MOE_HEADS) {
        const auto& a = as<MoeHeadsArgs>(arguments);
        HeadScratch scratch = take_heads(m, c.threads, a.weight.cols);
        if (!counting) heads(c, a, scratch);
    } else if (operation == MOE_EXPERTS) {
        const auto& a = as<MoeExpertsArgs>(arguments);
        ExpertScratch scratch = take_experts(m, a.tokens, a.per_token, a.count, a.down.rows, a.down.cols, a.down.segment);
        if (!counting) experts(c, a, scratch);
    } else if (operation == MOE_ROUTE) {
        const auto& a = as<MoeRouteArgs>(arguments);
        float* scratch = m.take<float>(int64_t(a.tokens) * 3 * a.count);
        if (!counting) route(c, a, scratch);
    } else if (operation == MOE_LATENT) {
        const auto& a = as<MoeLatentArgs>(arguments);
        float* scratch = m.take<float>(int64_t(a.tokens) * (a.rank + a.rope));
        if (!counting) latent(c, a, scratch);
    } else if (operation == MOE_ATTEND) {
        const auto& a = as<MoeAttendArgs>(arguments);
        float* scratch = m.take<float>(int64_t(c.threads) * attend_scratch(a.rank + a.rope));
        if (!counting) attend(c, a, scratch);
    } else if (operation == MOE_FORWARD) {
        const auto& a = as<MoeForwardArgs>(arguments);
        ForwardScratch scratch = take_forward(m, a, c.threads);
        if (!counting) forward(c, a, scratch);
    }
    if (counting) *needed = m.used;
}

}  // namespace

extern const Variant VARIANT;
const Variant VARIANT = {VARIANT_NAME, run};
