"""Metal source of the kernels of `glmd.model.mla_kernel`.

The source uses few of Metal's functions, so that the tests can compile the same text for a CPU.
Names in capital letters are constants; `header` defines most, `split` and `reduce` replace others.
"""

from __future__ import annotations

import mlx.core as mx

from glmd.kv_cache.stored_keys import KVBits, group_size

SPLIT = """
const int lane = thread_index_in_simdgroup;
const int part = simdgroup_index_in_threadgroup;
// The lane's two places in a matrix of 8 x 8: row y, columns x and x + 1.
const int y = ((lane / 4) & 4) + (lane / 2) % 4;
const int x = ((lane / 4) & 2) * 2 + (lane % 2) * 2;

const int index = threadgroup_position_in_grid.x;
const device int* item = items + index * FIELDS;
DECLARE_KEYS
switch (item[0]) {
    CASES
    default: TAIL_KEYS
}
const int first_row = item[3];
const int count = item[4] * HEADS;  // rows of heads
int end = item[2];
if (item[0] < 0) {
    for (int row = 0; row < item[4]; row++) {
        end = metal::max(end, int(tail_positions[first_row + row]) + 1);
    }
}

// Running maximum and sum of the rows whose softmax this simdgroup computes.
float top[OWN_ROWS], total[OWN_ROWS];
int limit[OWN_ROWS];
UNROLL for (int own = 0; own < OWN_ROWS; own++) {
    const int row = own * PARTS + part;
    top[own] = LOWEST;
    total[own] = 0;
    limit[own] = row < count ? end : 0;
    if (item[0] < 0 && row < count) {
        limit[own] = int(tail_positions[first_row + row / HEADS]) + 1;
    }
}

int column[FRAGMENTS];  // the first of each fragment
UNROLL for (int f = 0; f < FRAGMENTS; f++) {
    column[f] = f < 8 ? part * 64 + f * 8 : LATENT + (part * (FRAGMENTS - 8) + f - 8) * 8;
}
T query[FRAGMENTS][ROW_TILES][2];  // transposed: dimension y, rows x and x + 1
UNROLL for (int f = 0; f < FRAGMENTS; f++) {
    UNROLL for (int r = 0; r < ROW_TILES; r++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int row = first_row + (r * 8 + x + e) / HEADS;
            const int head = (r * 8 + x + e) % HEADS;
            const bool used = r * 8 + x + e < count;
            const long latent_place = ((long)head * q_shape[1] + row) * LATENT + column[f] + y;
            const long rope_place = ((long)row * HEADS + head) * ROPE + column[f] - LATENT + y;
            query[f][r][e] = !used ? T(0.0f) : f < 8 ? q[latent_place] : q_rope[rope_place];
        }
    }
}
metal::simdgroup_matrix<float, 8, 8> sums[ROW_TILES][8];
UNROLL for (int r = 0; r < ROW_TILES; r++) {
    UNROLL for (int f = 0; f < 8; f++) {
        sums[r][f].thread_elements()[0] = 0;
        sums[r][f].thread_elements()[1] = 0;
    }
}

threadgroup float scores[PARTS][PASS][8 * ROW_TILES];
threadgroup float weights[8 * ROW_TILES][PASS];
threadgroup float factors[8 * ROW_TILES];

for (int start = item[1]; start < end; start += PASS) {
    T latent[PASS / 8][FRAGMENTS][2];  // key y, dimensions x and x + 1
    UNROLL for (int k = 0; k < PASS / 8; k++) {
        const int key = start + k * 8 + y;
        UNROLL for (int f = 0; f < FRAGMENTS; f++) {
            latent[k][f][0] = latent[k][f][1] = T(0.0f);
            if (key < end) {
                const long place = (long)key * WIDTH + column[f] + x;
                LOAD
            }
        }
    }
    UNROLL for (int k = 0; k < PASS / 8; k++) {
        UNROLL for (int r = 0; r < ROW_TILES; r++) {
            metal::simdgroup_matrix<float, 8, 8> score, a, b;
            score.thread_elements()[0] = 0;
            score.thread_elements()[1] = 0;
            UNROLL for (int f = 0; f < FRAGMENTS; f++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    a.thread_elements()[e] = float(latent[k][f][e]);
                    b.thread_elements()[e] = float(query[f][r][e]);
                }
                metal::simdgroup_multiply_accumulate(score, a, b, score);
            }
            scores[part][k * 8 + y][r * 8 + x] = score.thread_elements()[0];
            scores[part][k * 8 + y][r * 8 + x + 1] = score.thread_elements()[1];
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    UNROLL for (int own = 0; own < OWN_ROWS; own++) {
        const int row = own * PARTS + part;
        if (row < 8 * ROW_TILES) {
            const bool seen = lane < PASS && start + lane < limit[own];
            float score = LOWEST;
            if (seen) {
                score = 0;
                for (int p = 0; p < PARTS; p++) {
                    score += scores[p][lane][row];
                }
            }
            const float largest = metal::max(top[own], metal::simd_max(score));
            const float weight = seen ? metal::exp(score - largest) : 0.0f;
            const float factor = metal::exp(top[own] - largest);
            total[own] = total[own] * factor + metal::simd_sum(weight);
            top[own] = largest;
            if (lane < PASS) {
                weights[row][lane] = weight;
            }
            if (lane == 0) {
                factors[row] = factor;
            }
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    UNROLL for (int r = 0; r < ROW_TILES; r++) {
        const float factor = factors[r * 8 + y];
        UNROLL for (int f = 0; f < 8; f++) {
            sums[r][f].thread_elements()[0] *= factor;
            sums[r][f].thread_elements()[1] *= factor;
        }
        UNROLL for (int k = 0; k < PASS / 8; k++) {
            metal::simdgroup_matrix<float, 8, 8> a, b;
            a.thread_elements()[0] = weights[r * 8 + y][k * 8 + x];
            a.thread_elements()[1] = weights[r * 8 + y][k * 8 + x + 1];
            UNROLL for (int f = 0; f < 8; f++) {
                b.thread_elements()[0] = float(latent[k][f][0]);
                b.thread_elements()[1] = float(latent[k][f][1]);
                metal::simdgroup_multiply_accumulate(sums[r][f], a, b, sums[r][f]);
            }
        }
    }
}

metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
UNROLL for (int own = 0; own < OWN_ROWS; own++) {
    const int row = own * PARTS + part;
    if (row < 8 * ROW_TILES && lane == 0) {
        const bool seen = total[own] > 0;
        factors[row] = seen ? 1 / total[own] : 0.0f;
        lse[index * 8 * ROW_TILES + row] = seen ? top[own] + metal::log(total[own]) : LOWEST;
    }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
UNROLL for (int r = 0; r < ROW_TILES; r++) {
    if (r * 8 + y < count) {
        const float factor = factors[r * 8 + y];
        UNROLL for (int f = 0; f < 8; f++) {
            const long place = ((long)index * 8 * ROW_TILES + r * 8 + y) * LATENT + column[f] + x;
            out[place] = sums[r][f].thread_elements()[0] * factor;
            out[place + 1] = sums[r][f].thread_elements()[1] * factor;
        }
    }
}
"""
"""Each threadgroup: attention of an item's rows to its keys, [8 * ROW_TILES, LATENT] in float32,
and the logs of their softmax denominators."""

REDUCE = """
const int index = threadgroup_position_in_grid.x;
const int row = index / HEADS, head = index % HEADS;
const int start = offsets[row], end = offsets[row + 1];
float top = LOWEST, total = 0;
const device float* lse = lse0;
const device float* out = out0;
for (int i = start; i < end; i++) {
    switch (entries[2 * i]) { CASES }
    top = metal::max(top, float(lse[entries[2 * i + 1] + head]));
}
float sums[SHARE];
UNROLL for (int s = 0; s < SHARE; s++) {
    sums[s] = 0;
}
const int thread_index = thread_position_in_threadgroup.x;
for (int i = start; i < end; i++) {
    switch (entries[2 * i]) { CASES }
    const long place = entries[2 * i + 1] + head;
    const float weight = metal::exp(lse[place] - top);
    total += weight;
    UNROLL for (int s = 0; s < SHARE; s++) {
        sums[s] += weight * out[place * LATENT + s * THREADS + thread_index];
    }
}
UNROLL for (int s = 0; s < SHARE; s++) {
    const long place = (long)head * (offsets_shape[0] - 1) + row;
    result[place * LATENT + s * THREADS + thread_index] = T(sums[s] / total);
}
"""
"""Each threadgroup: one head of one row, from all items of the row."""


PROJECT = """
const int row = threadgroup_position_in_grid.x;
const int thread_index = thread_position_in_threadgroup.x;
const device T* source = compressed + (long)row * WIDTH;
device T* target = kv + (long)row * WIDTH;
float sum = 0;
for (int i = thread_index; i < LATENT; i += THREADS) {
    sum += float(source[i]) * float(source[i]);
}
sum = metal::simd_sum(sum);
threadgroup float sums[THREADS / 32];
if (thread_index_in_simdgroup == 0) {
    sums[simdgroup_index_in_threadgroup] = sum;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
float total = 0;
for (int i = 0; i < THREADS / 32; i++) {
    total += sums[i];
}
const float factor = metal::precise::rsqrt(total / LATENT + EPS);
for (int i = thread_index; i < LATENT; i += THREADS) {
    target[i] = T(float(weight[i]) * float(T(float(source[i]) * factor)));
}
for (int i = thread_index; i < (HEADS + 1) * (ROPE / 2); i += THREADS) {
    const int head = i / (ROPE / 2), pair = i % (ROPE / 2);
    const float frequency = metal::precise::exp2(-float(pair) / (ROPE / 2) * LOG2_BASE);
    const float angle = float(positions[row]) * frequency;
    const float cosine = metal::precise::cos(angle), sine = metal::precise::sin(angle);
    const device T* from = source + LATENT;
    device T* to = target + LATENT;
    if (head < HEADS) {
        from = q + ((long)row * HEADS + head + 1) * QUERY - ROPE;
        to = q_rope + ((long)row * HEADS + head) * ROPE;
    }
    const int first = PAIRED ? 2 * pair : pair;
    const int second = PAIRED ? first + 1 : first + ROPE / 2;
    const float a = from[first], b = from[second];
    to[first] = T(a * cosine - b * sine);
    to[second] = T(a * sine + b * cosine);
}
"""
"""Each threadgroup: norm of a row's latent, rotation of its key and of its queries."""

_TYPES = {mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float"}

_VECTORS = {
    "DECLARE_KEYS": "const device T* keys;",
    "CASE": "keys = keys{};",
    "TAIL_KEYS": "keys = tails + (long)item[5] * tails_shape[1] * WIDTH;",
    "LOAD": "latent[k][f][0] = keys[place]; latent[k][f][1] = keys[place + 1];",
}

_QUANTIZED = {
    "DECLARE_KEYS": "const device uint* words; const device T* scales; const device T* biases;",
    "CASE": "words = words{0}; scales = scales{0}; biases = biases{0};",
    "TAIL_KEYS": """{
        const long before = (long)item[5] * tail_words_shape[1];
        words = tail_words + before * (WIDTH / VALUES);
        scales = tail_scales + before * (WIDTH / SHARED);
        biases = tail_biases + before * (WIDTH / SHARED);
    }""",
    "LOAD": """
        const uint word = words[place / VALUES] >> (int(place % VALUES) * BITS);
        const float scale = scales[place / SHARED], bias = biases[place / SHARED];
        latent[k][f][0] = T(float(word & MASK) * scale + bias);
        latent[k][f][1] = T(float((word >> BITS) & MASK) * scale + bias);
    """,
}


def split(buffers: int, bits: KVBits) -> str:
    """`SPLIT` for so many segments, whose values have `bits` bits."""
    parts = _VECTORS if bits == 16 else _QUANTIZED
    case = parts["CASE"]
    cases = " ".join(f"case {i}: {case.format(i)} break;" for i in range(buffers))
    source = SPLIT.replace("CASES", cases)
    for name in ("DECLARE_KEYS", "TAIL_KEYS", "LOAD"):
        source = source.replace(name, parts[name])
    return source


def reduce(launches: int) -> str:
    """`REDUCE` for so many launches."""
    cases = " ".join(f"case {i}: lse = lse{i}; out = out{i}; break;" for i in range(launches))
    return REDUCE.replace("CASES", cases)


def quantized(width: int, bits: KVBits) -> dict[str, str | int]:
    """Constants for keys of `width` values of `bits` bits; none for 16."""
    if bits == 16:
        return {}
    mask = f"{(1 << bits) - 1}u"
    return {"BITS": bits, "VALUES": 32 // bits, "MASK": mask, "SHARED": group_size(width)}


def header(dtype: mx.Dtype, constants: dict[str, str | int]) -> str:
    """Includes and constants before a kernel."""
    lines = ["#include <metal_stdlib>", "#include <metal_simdgroup_matrix>"]
    lines += [f"#define {name} {value}" for name, value in constants.items()]
    lines += ["#define LOWEST -1e30f", f"#define T {_TYPES[dtype]}"]
    # Arrays that are indexed by loops are in registers only if the loops are unrolled.
    lines += ['#define UNROLL _Pragma("clang loop unroll(full)")']
    return "\n".join(lines) + "\n"
