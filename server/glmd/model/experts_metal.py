"""Metal source of the kernels of `glmd.model.experts_kernel`.

As in `glmd.model.mla_metal`, the source uses few of Metal's functions, and names in capital letters
are constants of `glmd.model.mla_metal.header`. `PRODUCT` is text of two kernels.
"""

from __future__ import annotations

ROUTE = """
const int lane = thread_index_in_simdgroup;
const int own = thread_position_in_threadgroup.x;
const int rows = logits_shape[0], pairs = rows * TOP;
threadgroup int chosen[MOST * TOP], first[MOST * TOP];

for (int row = simdgroup_index_in_threadgroup; row < rows; row += SIMDGROUPS) {
    float logit[SHARE], score[SHARE];
    UNROLL for (int i = 0; i < SHARE; i++) {
        const int expert = i * 32 + lane;
        const bool exists = expert < EXPERTS;
        logit[i] = exists ? float(logits[row * EXPERTS + expert]) : 0.0f;
        const float larger = 1 / (1 + metal::exp(-metal::abs(logit[i])));
        score[i] = logit[i] < 0 ? 1 - larger : larger;
        score[i] = exists ? score[i] + float(bias[expert]) : LOWEST;
    }
    float logs[TOP];  // of the scores
    float top = LOWEST, total = 0;
    UNROLL for (int k = 0; k < TOP; k++) {
        float best = LOWEST;
        int place = EXPERTS - 1;  // an expert in any case, even if no score is a number
        UNROLL for (int i = 0; i < SHARE; i++) {
            if (score[i] > best) {
                best = score[i];
                place = i * 32 + lane;
            }
        }
        const float largest = metal::simd_max(best);
        const int expert = metal::simd_min(best == largest ? place : EXPERTS - 1);
        float found = 0;
        UNROLL for (int i = 0; i < SHARE; i++) {
            if (i * 32 + lane == expert) {
                found = logit[i];
                score[i] = LOWEST;
            }
        }
        found = metal::simd_sum(found);
        logs[k] = metal::min(found, 0.0f) - metal::log(1 + metal::exp(-metal::abs(found)));
        top = metal::max(top, logs[k]);
        if (lane == 0) {
            chosen[row * TOP + k] = expert;
        }
    }
    UNROLL for (int k = 0; k < TOP; k++) {
        logs[k] = metal::exp(logs[k] - top);
        total += logs[k];
    }
    if (lane == 0) {
        UNROLL for (int k = 0; k < TOP; k++) {
            weights[row * TOP + k] = SCALE * logs[k] / total;
        }
    }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

int place = 0;
if (own < pairs) {
    bool leads = true;
    for (int pair = 0; pair < pairs; pair++) {
        const bool same = chosen[pair] == chosen[own] && pair < own;
        place += chosen[pair] < chosen[own] || same;
        leads = leads && !same;
    }
    order[place] = own;
    first[own] = leads;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

int before = 0, count = 0;
for (int pair = 0; pair < pairs; pair++) {
    count += first[pair];
    before += first[pair] && own < pairs && chosen[pair] < chosen[own];
}
if (own < pairs && first[own]) {
    groups[2 * before] = place;
    groups[2 * before + 1] = chosen[own];
}
const int slots = metal::min(pairs, EXPERTS);
for (int group = count + own; group <= slots; group += SIMDGROUPS * 32) {
    groups[2 * group] = pairs;
    groups[2 * group + 1] = 0;
}
"""
"""One threadgroup: experts of all rows, weights of the pairs (row, expert), the pairs in the order
of their experts, and where in that order each expert's group begins. Groups behind the last are
empty."""

GATE_UP = """
const int lane = thread_index_in_simdgroup;
const int index = threadgroup_position_in_grid.x;
const int group = index / TILES;
const int start = groups[2 * group], end = groups[2 * group + 2];
const int tile = index % TILES * SIMDGROUPS + simdgroup_index_in_threadgroup;
// Outputs of the gate, and as many of the up projection behind them.
const int first = tile * (OUTPUTS / 2);
const long expert = groups[2 * group + 1];

for (int from = start; from < end; from += ROWS) {
    const int rows = metal::min(ROWS, end - from);
    const device T* source[ROWS];
    long output[OUTPUTS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        source[r] = x + (long)(order[from + metal::min(r, rows - 1)] / TOP) * INPUTS;
    }
    UNROLL for (int o = 0; o < OUTPUTS; o++) {
        output[o] = (expert * 2 + o / (OUTPUTS / 2)) * MIDDLE + first + o % (OUTPUTS / 2);
    }
    PRODUCT
    UNROLL for (int r = 0; r < ROWS; r++) {
        if (r < rows) {
            UNROLL for (int o = 0; o < OUTPUTS / 2; o++) {
                const float gate = metal::simd_sum(sums[o][r]);
                const float up = metal::simd_sum(sums[OUTPUTS / 2 + o][r]);
                const float larger = 1 / (1 + metal::exp(-metal::abs(gate)));
                if (lane == 0) {
                    const float share = gate < 0 ? 1 - larger : larger;
                    middle[(long)(from + r) * MIDDLE + first + o] = T(gate * share * up);
                }
            }
        }
    }
}
"""
"""Each simdgroup: some values of silu(gate) x up, of all pairs of a group."""

DOWN = """
const int lane = thread_index_in_simdgroup;
const int part = simdgroup_index_in_threadgroup;
const int first = threadgroup_position_in_grid.x * OUTPUTS;
const int count = residual_shape[0], slots = groups_shape[0] - 1;
// A cell belongs to one lane of each simdgroup.
threadgroup float cells[SIMDGROUPS][MOST * OUTPUTS];
for (int cell = lane; cell < count * OUTPUTS; cell += 32) {
    cells[part][cell] = 0;
}

for (int group = part; group < slots; group += SIMDGROUPS) {
    const int start = groups[2 * group], end = groups[2 * group + 2];
    const long expert = groups[2 * group + 1];
    for (int from = start; from < end; from += ROWS) {
        const int rows = metal::min(ROWS, end - from);
        const device T* source[ROWS];
        long output[OUTPUTS];
        UNROLL for (int r = 0; r < ROWS; r++) {
            source[r] = middle + (long)(from + metal::min(r, rows - 1)) * INPUTS;
        }
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
            output[o] = expert * HIDDEN + first + o;
        }
        PRODUCT
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (r < rows) {
                const int pair = order[from + r];
                UNROLL for (int o = 0; o < OUTPUTS; o++) {
                    const float sum = metal::simd_sum(sums[o][r]);
                    const int cell = pair / TOP * OUTPUTS + o;
                    if (lane == cell % 32) {
                        cells[part][cell] += weights[pair] * sum;
                    }
                }
            }
        }
    }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
const int own = thread_position_in_threadgroup.x;
for (int cell = own; cell < count * OUTPUTS; cell += SIMDGROUPS * 32) {
    const long place = (long)(cell / OUTPUTS) * HIDDEN + first + cell % OUTPUTS;
    float sum = float(residual[place]) + float(shared[place]);
    for (int p = 0; p < SIMDGROUPS; p++) {
        sum += cells[p][cell];
    }
    out[place] = T(sum);
}
"""
"""Each threadgroup: some values of all rows, from all their experts. Its simdgroups take turns in
the groups."""

PRODUCT = """
float sums[OUTPUTS][ROWS];
UNROLL for (int o = 0; o < OUTPUTS; o++) {
    UNROLL for (int r = 0; r < ROWS; r++) {
        sums[o][r] = 0;
    }
}
for (int k = lane * 8; k < INPUTS; k += 32 * 8) {
    float values[ROWS][8], total[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        total[r] = 0;
        if (r < rows) {
            UNROLL for (int i = 0; i < 8; i++) {
                values[r][i] = float(source[r][k + i]);
                total[r] += values[r][i];
            }
        }
    }
    // Eight weights are BITS bytes, in at most two words.
    const int byte = k / 8 * BITS;
    const int shift = byte % 4 * 8;
    UNROLL for (int o = 0; o < OUTPUTS; o++) {
        const long place = output[o] * (INPUTS / 32 * BITS) + byte / 4;
        const uint one = words[place];
        const uint two = byte % 4 + BITS > 4 ? words[place + 1] : 0u;
        const uint low = one >> shift | two << 1 << (31 - shift);
        const uint high = two >> shift;
        float weight[8];
        UNROLL for (int i = 0; i < 8; i++) {
            const int bit = i * BITS;
            const uint bits = bit >= 32 ? high >> (bit - 32)
                : bit + BITS <= 32 ? low >> bit : low >> bit | high << (32 - bit);
            weight[i] = float(bits & MASK);
        }
        const long scaled = output[o] * (INPUTS / GROUP) + k / GROUP;
        const float scale = float(scales[scaled]), bias = float(biases[scaled]);
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (r < rows) {
                float sum = 0;
                UNROLL for (int i = 0; i < 8; i++) {
                    sum += weight[i] * values[r][i];
                }
                sums[o][r] += scale * sum + bias * total[r];
            }
        }
    }
}
"""
"""Each lane's share of the products of `rows` rows with OUTPUTS quantised rows of weights."""


def gate_up() -> str:
    """`GATE_UP` with its product."""
    return GATE_UP.replace("PRODUCT", PRODUCT)


def down() -> str:
    """`DOWN` with its product."""
    return DOWN.replace("PRODUCT", PRODUCT)
